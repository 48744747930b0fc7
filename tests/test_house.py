"""The walls: who may import whom, and that each daemon starts without the other machine's
folder.
"""

from __future__ import annotations

import ast
import asyncio
import io
import sys
import tokenize
from collections.abc import Iterator
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
        "cerebrum.http",  # for a type
        "cerebrum.settings",
        "cerebrum.pi",  # on the Pi, and for types
        "cerebrum.vps",  # on the VPS, and for types
    },
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

TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))


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


# ----------------------------------------------------------------------- how much a statement says

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
DISPLAYS = (ast.Dict, ast.List, ast.Set, ast.Tuple)
# Data in files of their own. Elsewhere a table is a display that is given a name in capitals.
DATA = {"cerebrum/text/languages.py"}
# What reads better in spite of a rule below: (file, line of code) and why.
BETTER: dict[tuple[str, str], str] = {}


def read(file: Path) -> tuple[str, ast.Module]:
    source = (ROOT / file).read_text()
    return source, ast.parse(source)


def is_docstring(node: ast.stmt) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def is_table(node: ast.stmt) -> bool:
    """Whether a statement gives a display of data, or a call with one, a name in capitals."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    value = node.value
    if isinstance(value, ast.Call) and value.args:
        value = value.args[0]
    return isinstance(target, ast.Name) and target.id.isupper() and isinstance(value, DISPLAYS)


def lines_of(tree: ast.Module, source: str) -> Iterator[tuple[int, int, bool]]:
    """(first line, tokens, whether it is a table) of each logical line but the docstrings."""
    nodes = {node.lineno: node for node in ast.walk(tree) if isinstance(node, ast.stmt)}
    tokens = list[tokenize.TokenInfo]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            node = nodes.get(tokens[0].start[0])
            if not node or not is_docstring(node):
                yield tokens[0].start[0], len(tokens), bool(node and is_table(node))
            tokens = []
        elif token.type not in SILENT:
            tokens.append(token)


def figures(files: list[Path]) -> dict[str, float]:
    total, sizes = 0, list[int]()
    for file in files:
        source, tree = read(file)
        for _, size, is_data in lines_of(tree, source):
            total += size
            if not is_data and str(file) not in DATA:
                sizes.append(size)
    sizes = sorted(sizes) or [0]
    return {
        "tokens": total,
        "a statement": round(sum(sizes) / len(sizes), 2),
        "90th percentile": sizes[len(sizes) * 9 // 10],
        "percent above 24": round(100 * sum(size > 24 for size in sizes) / len(sizes), 1),
        "longest": sizes[-1],
    }


def faults(file: Path) -> Iterator[tuple[int, str]]:
    """(line, what it has) of each statement that says more than one thing."""
    for node in ast.walk(read(file)[1]):
        match node:
            case ast.IfExp():
                inner = [one for one in ast.walk(node) if isinstance(one, ast.IfExp)]
                if len(inner) > 1:
                    yield node.lineno, "a conditional expression inside another"
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                if len(targets) > 2 and len(values) > 2:
                    yield node.lineno, "more than two values assigned at once"
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                if len(node.generators) > 1 or len(node.generators[0].ifs) > 1:
                    yield node.lineno, "a comprehension with more than one for or if"


if __name__ == "__main__":
    for name, files in (("product", FILES), ("tests", TESTS)):
        print(name, figures(files))
    if sys.argv[1:]:
        for file in [*FILES, *TESTS]:
            if not str(file).startswith(sys.argv[1]):
                continue
            print(f"{file}: {figures([file])}")
            source, tree = read(file)
            long = [row for row in lines_of(tree, source) if row[1] > 24 and not row[2]]
            print("   above 24 (line, tokens):", *(f"{line}:{size}" for line, size, _ in long))
            for line, fault in faults(file):
                print(f"   {line}: {fault}")
