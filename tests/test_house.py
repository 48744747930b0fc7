"""The walls: who may import whom, and that each daemon starts without the other machine's folder."""

from __future__ import annotations

import ast
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from harness import ROOT, copy_program, program, settings

MAY = {  # what the modules of a folder may import, beside their own folder and cerebrum_common
    "": {"cerebrum.settings", "cerebrum.vps"},  # the latter: --check, on the VPS
    "text": set[str](),
    "pi": {"cerebrum.http", "cerebrum.settings", "cerebrum.metrics", "cerebrum.text"},
    "vps": {"cerebrum.settings", "cerebrum.metrics", "cerebrum.text"},
}
MODULES = sorted((ROOT / "cerebrum").rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Our modules that a file imports, at its top or inside a function."""
    names = set[str]()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.split(".")[0] in ("cerebrum", "cerebrum_common", "cm4d", "vpsd")}


@pytest.mark.parametrize("file", MODULES, ids=[str(file.relative_to(ROOT)) for file in MODULES])
def test_imports_point_down(file: Path) -> None:
    room = file.relative_to(ROOT / "cerebrum").parent.name
    own = f"cerebrum.{room}" if room else "cerebrum"
    folders = {".".join(name.split(".")[:2]) for name in imported(file)} - {"cerebrum_common", own}
    assert folders <= MAY[room]


def test_what_both_share_imports_nothing_of_ours() -> None:
    assert imported(ROOT / "cerebrum_common.py") == set()


@pytest.mark.parametrize(("name", "absent"), [("cm4d", "vps"), ("vpsd", "pi")])
def test_a_daemon_starts_without_the_other_machines_folder(name: str, absent: str, tmp_path: Path) -> None:
    copy_program(name, tmp_path)
    assert not (tmp_path / "cerebrum" / absent).exists()
    command = [sys.executable, "-u", str(tmp_path / f"{name}.py")]
    with program(name, command, tmp_path, settings(tmp_path)) as daemon:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{daemon.port}/health") as answer:
                state = json.load(answer)
        except urllib.error.HTTPError as error:  # the Pi has no VPS here
            state = json.load(error)
        assert state["status"] == ("unhealthy" if name == "cm4d" else "healthy")
