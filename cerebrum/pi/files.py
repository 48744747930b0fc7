"""What the Pi hands out as files: its page, the language server, the extension for VS Code, and the
template by which LSP4IJ, a plugin for JetBrains' IDEs, starts the language server.

    python3 cerebrum/pi/files.py vscode >cerebrum.vsix

Pure but for reading the files. The same version gives the same bytes on every Pi.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr

# ---------------------------------------------------------------------------------------- the page

POLICY = (
    "default-src 'none'; script-src %s; style-src %s; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'"
)
HEADERS = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
)


def headers_of(text: bytes) -> tuple[tuple[str, str], ...]:
    """The headers that confine a page to its own script, style and server."""
    policy = POLICY % (sources(b"script", text), sources(b"style", text))
    return (("Content-Security-Policy", policy), *HEADERS)


def sources(tag: bytes, text: bytes) -> str:
    """The sources of one kind that a Content-Security-Policy allows: the page's own, by their
    hashes.
    """
    allowed = []
    text = text.replace(b"\r\n", b"\n")  # as browsers read it before they hash
    for inline in re.findall(rb"<%b>(.*?)</%b>" % (tag, tag), text, re.S):
        digest = base64.b64encode(hashlib.sha256(inline).digest())
        allowed.append(f"'sha256-{digest.decode()}'")
    return " ".join(allowed) or "'none'"


# --------------------------------------------------------------------------- what editors install

# Nothing else that lies in the folder, such as an editor's copy, gets into the file.
PARTS = (
    "README.md",
    "change.js",
    "extension.js",
    "icon.png",
    "package.json",
    "pi.js",
    "text.js",
)
TYPES = b"""<?xml version="1.0" encoding="utf-8"?>
<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">\
<Default Extension="json" ContentType="application/json"/>\
<Default Extension="js" ContentType="application/javascript"/>\
<Default Extension="md" ContentType="text/markdown"/>\
<Default Extension="png" ContentType="image/png"/>\
<Default Extension="vsixmanifest" ContentType="text/xml"/></Types>
"""
MANIFEST = """<?xml version="1.0" encoding="utf-8"?>
<PackageManifest Version="2.0.0" xmlns="http://schemas.microsoft.com/developer/vsx-schema/2011">\
<Metadata><Identity Language="en-US" Id={name} Version={version} Publisher={publisher}/>\
<DisplayName>Cerebrum</DisplayName>\
<Description>Code completions from the Raspberry Pi at home</Description>\
<Properties><Property Id="Microsoft.VisualStudio.Code.Engine" Value={engine}/>\
<Property Id="Microsoft.VisualStudio.Code.ExtensionKind" Value="ui,workspace"/></Properties>\
<Icon>extension/icon.png</Icon></Metadata>\
<Installation><InstallationTarget Id="Microsoft.VisualStudio.Code"/></Installation><Dependencies/>\
<Assets>\
<Asset Type="Microsoft.VisualStudio.Code.Manifest" Path="extension/package.json" \
Addressable="true"/>\
<Asset Type="Microsoft.VisualStudio.Services.Content.Details" Path="extension/README.md" \
Addressable="true"/>\
<Asset Type="Microsoft.VisualStudio.Services.Icons.Default" Path="extension/icon.png" \
Addressable="true"/></Assets></PackageManifest>
"""
# Any file is served. The Pi knows a language by the IDE's name for it, or else by the file's name.
TEMPLATE = {
    "template.json": b"""{
  "name": "Cerebrum",
  "programArgs": {
    "default": "python3 \\"$USER_HOME$/cerebrum-jetbrains/cerebrum_lsp.py\\"",
    "windows": "py \\"$USER_HOME$/cerebrum-jetbrains/cerebrum_lsp.py\\""
  },
  "fileTypeMappings": [
    {"fileType": {"patterns": ["*"]}}
  ]
}
""",
    "initializationOptions.json": b"""{
  "url": "http://pi.local:7000",
  "key": ""
}
""",
}


def pack(folder: Path) -> bytes:
    """The file for `code --install-extension`. OSError if one of its PARTS cannot be read,
    ValueError if package.json is damaged.
    """
    package = json.loads((folder / "package.json").read_text("utf-8"))
    try:
        names = {key: quoteattr(package[key]) for key in ("name", "version", "publisher")}
        manifest = MANIFEST.format(engine=quoteattr(package["engines"]["vscode"]), **names)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("package.json: expected name, version, publisher and engines") from None
    files = {f"extension/{name}": (folder / name).read_bytes() for name in PARTS}
    files |= {"[Content_Types].xml": TYPES, "extension.vsixmanifest": manifest.encode()}
    return zip_of(files)


def pack_template(server: Path) -> bytes:
    """The folder that LSP4IJ imports as a template: the language server, and the files of
    TEMPLATE.
    """
    files = {"cerebrum_lsp.py": server.read_bytes(), **TEMPLATE}
    return zip_of({f"cerebrum-jetbrains/{name}": files[name] for name in files})


def zip_of(files: Mapping[str, bytes]) -> bytes:
    """A zip of the files by their names. Its bytes depend on them alone."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # stored, of 1980
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, files[name])
    return packed.getvalue()


# By path: what each is made of beside the daemon, its media type, and how it is made; OSError or
# ValueError if that is missing or damaged.
FILES: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "/": ("cerebrum/pi/page.html", "text/html; charset=utf-8", Path.read_bytes),
    "/cerebrum_lsp.py": ("cerebrum_lsp.py", "text/x-python; charset=utf-8", Path.read_bytes),
    "/cerebrum-jetbrains.zip": ("cerebrum_lsp.py", "application/zip", pack_template),
    "/cerebrum.vsix": ("vscode", "application/vsix", pack),
}


if __name__ == "__main__":
    sys.stdout.buffer.write(pack(Path(sys.argv[1])))
