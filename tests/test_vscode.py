"""The extension for VS Code: the file that the Pi hands out, and its code under node, with a Pi and
a `vscode` that are played (tests/vscode).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from engines import free_port
from harness import (
    CAPTURED,
    FILES,
    KEY,
    ROOT,
    certificate,
    daemon,
    variables,
    wait_until,
)
from scripted import pi_with
from test_clients import CACHE
from test_peers import needs

from cerebrum.pi import files
from cerebrum_common import VERSION
from cerebrum_lsp import Settings, read_settings

FOLDER = ROOT / "vscode"
PACKAGE = json.loads((FOLDER / "package.json").read_text())
OLDEST = PACKAGE["engines"]["vscode"].removeprefix("^")


# Of a package whose files are all "{}", also on Python 3.13.
SHA256 = "3519d0f41361dd4b4af8cc2d949d36e26def813c73f022e349e303989b78671f"


def test_a_version_gives_the_same_file_everywhere(tmp_path: Path):
    for name in (*files.PARTS, "extension.js~"):
        (tmp_path / name).write_text("{}")
    package = {"name": "n", "version": "1", "publisher": "p", "engines": {"vscode": "^1"}}
    (tmp_path / "package.json").write_text(json.dumps(package))
    command = [sys.executable, ROOT / "cerebrum/pi/files.py", tmp_path]
    packed = subprocess.run(command, check=True, capture_output=True).stdout
    assert hashlib.sha256(packed).hexdigest() == SHA256


def test_the_file_has_all_that_vs_code_wants() -> None:
    with zipfile.ZipFile(io.BytesIO(files.pack(FOLDER))) as archive:
        assert archive.testzip() is None
        names = archive.namelist()
        manifest = ElementTree.fromstring(archive.read("extension.vsixmanifest"))
        types = archive.read("[Content_Types].xml").decode()
    own = {f"extension/{path.name}" for path in FOLDER.iterdir()}
    assert {*names} == own | {"[Content_Types].xml", "extension.vsixmanifest"}
    endings = {name.rpartition(".")[2] for name in own}
    assert endings | {"vsixmanifest"} == {*re.findall('Extension="(.*?)"', types)}
    schema = "{http://schemas.microsoft.com/developer/vsx-schema/2011}"
    (identity,) = manifest.iter(f"{schema}Identity")
    expected = {"Language": "en-US", "Id": "cerebrum", "Version": VERSION, "Publisher": "cerebrum"}
    assert identity.attrib == expected
    assert all(asset.get("Path") in names for asset in manifest.iter(f"{schema}Asset"))


def test_a_damaged_folder_is_no_extension(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        files.pack(tmp_path)
    for damaged in ("{", "[]", '{"name": 1}'):
        (tmp_path / "package.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"^Expecting |: expected "):
            files.pack(tmp_path)


async def test_the_pi_hands_them_out_without_a_key() -> None:
    packed = files.pack(FOLDER)
    async with pi_with(client_keys=(KEY,)) as (pi, _):
        reply = await pi.get("/cerebrum.vsix")
        assert (reply.status, reply.body) == (200, packed)
        reply = await pi.get("/cerebrum-jetbrains.zip")
        packed_template = files.pack_template(ROOT / "cerebrum_lsp.py")
        assert (reply.one("content-type"), reply.body) == ("application/zip", packed_template)
        activity = (await pi.get("/v1/activity", X_API_Key=KEY)).json
        assert activity["extension"] == hashlib.sha256(packed).hexdigest()


def test_the_template_for_jetbrains_ides(tmp_path: Path):
    """LSP4IJ, by its source, imports files of these names. In a command it expands the home folder,
    and double quotes keep spaces.
    """
    home = tmp_path / "Anna Smith"
    packed = files.pack_template(ROOT / "cerebrum_lsp.py")
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        archive.extractall(home)
    folder = home / "cerebrum-jetbrains"
    names = {"cerebrum_lsp.py", "initializationOptions.json", "template.json"}
    assert {path.name for path in folder.iterdir()} == names
    template = json.loads((folder / "template.json").read_text())
    assert template["fileTypeMappings"] == [{"fileType": {"patterns": ["*"]}}]
    command = template["programArgs"]["default"]
    assert template["programArgs"]["windows"] == command.replace("python3", "py")
    run = [*shlex.split(command.replace("$USER_HOME$", f"{home}")), "--version"]
    assert subprocess.check_output(run, text=True) == f"cerebrum_lsp.py {VERSION}\n"
    options = json.loads((folder / "initializationOptions.json").read_text())
    assert read_settings(options, Settings()) == Settings("http://pi.local:7000", "")


# --------------------------------------------------------------------------------------- under node


def npm_install(folder: Path, *packages: str) -> None:
    command = [needs("npm"), "install", "--silent", "--no-audit", "--no-fund", *packages]
    subprocess.run(command, cwd=folder, check=True)


def installed(versions: Mapping[str, str]) -> Path:
    """The folder with packages of npm, which are installed once."""
    folder = CACHE / "node_modules"
    lacking = []
    for name, version in versions.items():
        package = folder / name / "package.json"
        if not package.exists() or not json.loads(package.read_text())["version"].startswith(
            version
        ):
            lacking.append(f"{name}@{version}")
    if lacking:
        CACHE.mkdir(parents=True, exist_ok=True)
        npm_install(CACHE, *lacking)
    return folder


@pytest.mark.clients
def test_its_rules(tmp_path: Path):
    """By the node of the oldest VS Code that it supports."""
    node = installed({"node": "22"}) / "node/bin/node"
    trusted = certificate(tmp_path, "trusted", "IP:127.0.0.2")
    files = [*trusted.values(), *certificate(tmp_path, "strange").values()]
    done = subprocess.run(
        [node, "--test", "--test-reporter=tap", f"{ROOT}/tests/vscode/extension.test.cjs"],
        env={**os.environ, "CERTIFICATES": " ".join(files), "SSL_CERT_FILE": files[0]},
        **CAPTURED,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr


@pytest.mark.clients
def test_its_types() -> None:
    """By the types of the oldest VS Code that it supports."""
    types = {"@types/vscode": OLDEST, "@types/node": "22"}
    folder = installed({"typescript": "5.9", "node": "22", **types})
    options = (
        "--noEmit --allowJs --checkJs --strict --skipLibCheck --module commonjs --target es2022"
    )
    roots = ["--typeRoots", f"{folder}/@types", "--types", "node,vscode"]
    files = [f"{path}" for path in sorted(FOLDER.glob("*.js"))]
    compiler = f"{folder}/typescript/bin/tsc"
    command = [f"{folder}/node/bin/node", compiler, *options.split(), *roots, *files]
    done = subprocess.run(command, cwd=CACHE, **CAPTURED)
    assert (done.returncode, done.stdout) == (0, "")


# ----------------------------------------------------------------------------- in the real VS Code

INSTALLED = Path("~/.cache/cerebrum/vscode").expanduser()
# Of code-server, VS Code in a browser, with the node that each needs: VS Code 1.105, a year older
# than 1.139.
VERSIONS = {"4.105.1": "node@22", "4.139.1": "node@24"}
CODE = "node_modules/code-server"
NATIVE = (
    "@vscode/spdlog",
    "@vscode/native-watchdog",
    "node-pty",
    "@parcel/watcher",
    "@vscode/fs-copyfile",
)
# The Pi is asked in spite of the proxy; it is at another address.
QUIET = """{
    "security.workspace.trust.enabled": false,
    "workbench.startupEditor": "none",
    "telemetry.telemetryLevel": "off",
    "extensions.autoUpdate": false,
    "http.proxy": "http://127.0.0.1:9",
    "workbench.secondarySideBar.defaultVisibility": "hidden",
    "editor.quickSuggestions": {"other": "off"}}"""
HOST = "127.0.0.2"  # of the Pi: 127.0.0.1 never goes by a proxy
SUM = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n"
CIRCLE = "function area(radius: number): number {\n  return\n}\n"
CELLS = ["def double(x):\n    return 2 * x", "def triple(x):\n"]


def install(version: str) -> Path:
    """Install a VS Code once; the folder."""
    node = needs("node")
    place = INSTALLED / version
    if not Path("/usr/include/node/node.h").exists():
        pytest.skip("building VS Code's modules needs the headers of node: apt install libnode-dev")
    if not (place / "complete").exists():
        place.mkdir(parents=True, exist_ok=True)
        built = {"overrides": {"argon2": "0.44.0"}}  # older ones are built by a script
        (place / "package.json").write_text(json.dumps(built))
        npm_install(place, VERSIONS[version], "playwright-core@1.57", "node-gyp@11")
        npm_install(place, "--ignore-scripts", f"code-server@{version}")
        of_vscode = place / CODE / "lib/vscode"
        text = (of_vscode / "package.json").read_text()
        if "parcel-bundler/" in text:  # only GitHub has this one
            text = re.sub('"@parcel/watcher": "[^"]*"', '"@parcel/watcher": "2.5.1"', text)
            (of_vscode / "package.json").write_text(text)
            (of_vscode / "npm-shrinkwrap.json").unlink()
        for folder in (of_vscode, of_vscode / "extensions"):
            npm_install(folder, "--ignore-scripts", "--omit=dev")
        gyp = place / "node_modules/node-gyp/bin/node-gyp.js"
        modules = [of_vscode / "node_modules" / name for name in NATIVE]
        for module in filter(Path.exists, modules):
            subprocess.run([node, f"{gyp}", "rebuild", "--nodedir=/usr"], cwd=module, check=True)
        (place / "complete").touch()
    return place


def make_project(folder: Path) -> None:
    folder.mkdir()
    files = {
        "sum.py": SUM,
        "word.py": SUM,
        "crlf.py": SUM.replace("\n", "\r\n").replace("def subtract", '"""😀"""\r\ndef subtract'),
        "area.ts": CIRCLE,
        "two.py": "a = 1\nb = 2\n",
        "change.py": "def f(a, b):\n    return a + b\n",
    }
    for name, text in files.items():
        (folder / name).write_bytes(text.encode())
    shape: dict[str, Any] = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}}
    shape["metadata"]["language_info"] = {"name": "python"}
    cell = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells = [{**cell, "id": f"c{n}", "source": text} for n, text in enumerate(CELLS)]
    (folder / "book.ipynb").write_text(json.dumps({**shape, "cells": cells}))


@contextmanager
def code_server(place: Path, folder: Path, vsix_file: Path, **environ: str) -> Iterator[str]:
    """VS Code with an extension; its address."""
    data, extensions = folder / "data", folder / "extensions"
    (data / "User").mkdir(parents=True)
    (data / "User/settings.json").write_text(QUIET)
    entry = [f"{place}/node_modules/node/bin/node", str(place / CODE / "out/node/entry.js")]
    folders = ["--user-data-dir", f"{data}", "--extensions-dir", f"{extensions}"]
    environment = {"PATH": os.environ["PATH"], "HOME": f"{folder}", **environ}
    adding = [*entry, *folders, "--install-extension", f"{vsix_file}"]
    subprocess.run(adding, env=environment, check=True, capture_output=True)
    port = free_port()
    command = [*entry, "--auth", "none", "--bind-addr", f"127.0.0.1:{port}", *folders]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_until(lambda: is_listening(port), "VS Code listens")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()


@contextmanager
def driven(place: Path, **given) -> Iterator[Iterator[tuple[str, Any]]]:
    """Someone uses this VS Code; what is seen at each step."""
    asked = {
        "chromium": needs("chromium"),
        "picture": os.environ.get("PICTURE", f"{given['folder']}.png"),
        "steps": os.environ.get("STEPS", "").split() or None,
        **given,
    }
    driver = subprocess.Popen(
        [needs("node"), f"{ROOT}/tests/vscode/real.cjs"],
        env={**os.environ, "NODE_PATH": f"{place}/node_modules"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin
    assert driver.stdout
    try:
        with driver.stdin as sent:
            sent.write(json.dumps(asked))
        yield (json.loads(line) for line in driver.stdout)
    finally:
        driver.kill()
        driver.wait()


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.clients
@pytest.mark.nightly
@pytest.mark.parametrize("version", VERSIONS)
def test_in_the_real_one(version, tmp_path) -> None:
    place = install(version)
    project = tmp_path / "project"
    make_project(project)
    with ExitStack() as stack:
        # It takes requests however busy VS Code keeps the machine.
        easy = variables("CEREBRUM_MAX_CPU_PERCENT=100 CEREBRUM_MIN_FREE_MB=256")
        models = str(FILES["qwen_0_5b"].parent)
        started = daemon("vpsd", tmp_path / "vps", CEREBRUM_MODELS_DIR=models, **easy)
        vps = stack.enter_context(started)
        tls = certificate(tmp_path, "pi", f"IP:{HOST}")
        authority = tls["CEREBRUM_CM4_TLS_CERT"]
        given = {"CEREBRUM_CM4_HOST": HOST, **tls}
        given["CEREBRUM_VPS_URL"] = f"http://127.0.0.1:{vps.port}"
        pi = stack.enter_context(ExitStack())
        first = pi.enter_context(daemon("cm4d", tmp_path / "pi", **given))
        url = f"https://{HOST}:{first.port}"
        file = tmp_path / "cerebrum.vsix"
        file.write_bytes(files.pack(FOLDER))
        environ = {"SSL_CERT_FILE": authority}  # of a system that trusts this CA
        code = stack.enter_context(code_server(place, tmp_path / "code", file, **environ))
        of_pi = {"pi": url, "key": KEY, "instruction": "add type hints"}
        steps = stack.enter_context(driven(place, url=code, folder=f"{project}", **of_pi))
        seen, accepted = {}, 0
        for step, what in steps:
            seen[step] = what
            if step == "stop":
                accepted = first.stdout().count("POST /v1/accepted 200")
                pi.close()
            if step == "start":
                again = {**given, "CEREBRUM_CM4_PORT": f"{first.port}"}
                stack.enter_context(daemon("cm4d", tmp_path / "pi", **again))
    assert "failed" not in seen, seen["failed"]
    assert seen["a wrong key"] == "Cerebrum: the Pi asks for a key, or for another one"
    for step in ("ghost text", "crlf"):
        assert seen[step] == "a - b"
    assert seen["two cursors"] == []
    assert seen["notices"] == [f"Cerebrum: no Pi answers at {HOST}:{first.port} (ECONNREFUSED)"]
    # A completion at the end of a file may have line ends of its own.
    left = {path.name: path.read_bytes().decode().rstrip() for path in project.iterdir()}
    assert left["sum.py"] == SUM + "    return a - b"
    assert left["word.py"].startswith(SUM + "    return a")
    assert left["crlf.py"].endswith("def subtract(a, b):\r\n    return a - b")
    assert "return " + seen["typescript"] in left["area.ts"]
    source = "".join(json.loads(left["book.ipynb"])["cells"][1]["source"])
    assert source.rstrip() == CELLS[1] + "    return 3 * x"
    assert left["two.py"] == "#a = 1\n#b = 2"
    assert accepted == 4  # by Tab: one word of a text is not counted
    undone, changed = seen["undone"]
    assert ("int" in undone, "int" in changed) == (False, True)
    assert seen["untitled"] == "a - b"
    assert "int" in left["change.py"].partition("\n")[0]
