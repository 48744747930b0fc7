"""What editors install, as zips: the extension for VS Code, and the language server with the
template by which LSP4IJ, a plugin for JetBrains' IDEs, starts it.

    python3 cerebrum/pi/vsix.py vscode >cerebrum.vsix

Pure but for reading the extension's folder. The same version gives the same bytes on every Pi.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import quoteattr

# Nothing else that lies in the folder, such as an editor's copy, gets into the file.
FILES = (
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
    """The file for `code --install-extension`. OSError if one of the FILES cannot be read,
    ValueError if package.json is damaged.
    """
    package = json.loads((folder / "package.json").read_text("utf-8"))
    try:
        names = {key: quoteattr(package[key]) for key in ("name", "version", "publisher")}
        manifest = MANIFEST.format(engine=quoteattr(package["engines"]["vscode"]), **names)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("package.json: expected name, version, publisher and engines") from None
    files = {f"extension/{name}": (folder / name).read_bytes() for name in FILES}
    files |= {"[Content_Types].xml": TYPES, "extension.vsixmanifest": manifest.encode()}
    return zip_of(files)


def pack_template(server: bytes) -> bytes:
    """The folder that LSP4IJ imports as a template: `server`, and the files of TEMPLATE."""
    files = {"cerebrum_lsp.py": server, **TEMPLATE}
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


if __name__ == "__main__":
    sys.stdout.buffer.write(pack(Path(sys.argv[1])))
