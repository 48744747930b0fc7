"""The walls: who may import whom, and that each daemon starts without the other machine's
folder.
"""

from __future__ import annotations

import ast
import asyncio
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import pytest
from harness import ROOT, Client, copy_program, program, settings

BOTH = {
    f"cerebrum.{name}"
    for name in ("check", "fields", "http", "metrics", "service", "settings", "text")
}
# what a file, or else each file of a folder, may import beside its own folder and cerebrum_common
MAY = {
    "cerebrum_common.py": set[str](),
    "cm4d.py": BOTH | {"cerebrum.pi"},
    "vpsd.py": BOTH | {"cerebrum.vps"},
    "cerebrum_lsp.py": set[str](),  # one file on a laptop
    "cerebrum": {"cerebrum.fields", "cerebrum.settings"},
    "cerebrum/fields.py": set[str](),
    "cerebrum/check.py": {
        "cerebrum.fields",
        "cerebrum.settings",
        "cerebrum.vps",
    },  # the latter: --check, on the VPS
    "cerebrum/text": set[str](),
    "cerebrum/pi": {
        "cerebrum.fields",
        "cerebrum.http",
        "cerebrum.settings",
        "cerebrum.metrics",
        "cerebrum.text",
    },
    "cerebrum/vps": {"cerebrum.fields", "cerebrum.settings", "cerebrum.metrics", "cerebrum.text"},
}
FILES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *(ROOT / "cerebrum").rglob("*.py")]
)


def name_of(path: Path) -> str:
    """`cerebrum.pi` for the path cerebrum/pi, `cerebrum.pi.page` for cerebrum/pi/page.py; "" for
    the root.
    """
    return ".".join(path.parts).removesuffix(".py")


MODULES = {name_of(file) for file in FILES} | {name_of(file.parent) for file in FILES}


def imported(source: str, package: str) -> set[str]:
    """Our modules that a file of this package imports, at its top or inside a function."""
    names = set[str]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else base for name in inner}
    return {name for name in names if name.split(".")[0] in MODULES}


IMPORTS = {str(file): imported((ROOT / file).read_text(), name_of(file.parent)) for file in FILES}


@pytest.mark.parametrize("file", IMPORTS)
def test_imports_point_down(file: str) -> None:
    folder = Path(file).parent
    folders = {".".join(name.split(".")[:2]) for name in IMPORTS[file]} - {"cerebrum_common"}
    if len(folder.parts) > 1:
        folders -= {name_of(folder)}
    assert folders <= MAY[file if file in MAY else str(folder)]


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(
        {name_of(Path(file)): names for file, names in IMPORTS.items()}
    ).prepare()  # or CycleError


@pytest.mark.parametrize(("name", "absent"), [("cm4d", "vps"), ("vpsd", "pi")])
def test_a_daemon_starts_without_the_other_machines_folder(
    name: str, absent: str, tmp_path: Path
) -> None:
    copy_program(name, tmp_path)
    assert not (tmp_path / "cerebrum" / absent).exists()
    command = [sys.executable, "-u", str(tmp_path / f"{name}.py")]
    with program(name, command, tmp_path, settings(tmp_path)) as daemon:
        state = asyncio.run(Client(port=daemon.port).get("/health")).json
        assert state["status"] == ("unhealthy" if name == "cm4d" else "healthy")
