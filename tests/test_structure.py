"""The structure and the size of the source: who may import whom, and how much a statement says."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import ROOT, rows

# Our modules that a file, or else each file of a folder, may import beside its own folder and
# cerebrum_common.
IMPORTABLE = """
cerebrum_common.py |
cm4d.py            | check fields http metrics request service settings text pi
vpsd.py            | check fields http metrics request service settings text vps
cerebrum_lsp.py    |  # one file on a laptop
cerebrum           | fields settings
cerebrum/fields.py |
cerebrum/check.py  | fields settings pi vps  # of the machine that it runs on, and for types
cerebrum/text      |
cerebrum/pi        | fields http metrics request settings text
cerebrum/vps       | fields metrics request settings text
"""
MAY = {path: {f"cerebrum.{name}" for name in names.split()} for path, names in rows(IMPORTABLE)}
FILES = sorted(
    path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *(ROOT / "cerebrum").rglob("*.py")]
)

TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    """`cerebrum.pi` for the path cerebrum/pi, `cerebrum.pi.kind` for cerebrum/pi/kind.py; "" for
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
def test_imports_point_down(file: str):
    folder = Path(file).parent
    folders = {".".join(name.split(".")[:2]) for name in IMPORTS[file]} - {"cerebrum_common"}
    if len(folder.parts) > 1:
        folders -= {name_of(folder)}
    assert folders <= MAY[file if file in MAY else str(folder)]


def test_no_module_imports_itself_through_others() -> None:
    TopologicalSorter(
        {name_of(Path(file)): names for file, names in IMPORTS.items()}
    ).prepare()  # or CycleError


def test_a_name_is_defined_once_or_where_the_glossary_says() -> None:
    """A word of the glossary also names no module but its own. Both daemons have rooms of the same
    names, so they count as one file.
    """
    text = (ROOT / "docs/design.md").read_text()
    entries = re.findall(r"^- \*\*(.+?)\*\*:((?:.|\n )+)", text, re.M)
    meanings = dict(entries)
    assert len(meanings) == len(entries)
    places = dict[str, str]()
    for file in FILES:
        path = str(file).removeprefix("cerebrum/").replace("cm4d", "vpsd")
        nodes = ast.parse((ROOT / file).read_text()).body
        names = {node.name for node in nodes if hasattr(node, "name")}
        names |= {file.stem} & meanings.keys()
        for name in names - {"main"}:
            place = places.setdefault(name, f"`{path}`")
            assert f"`{path}`" in meanings.get(name.lower(), place), name


# ----------------------------------------------------------------------- how much a statement says

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
# Since Python 3.12 an f-string is several tokens. Here it is one, as in 3.11.
F_STRING = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)
DISPLAYS = (ast.Dict, ast.List, ast.Set, ast.Tuple)
DATA = {"cerebrum/text/languages.py"}  # a table, as are displays that get a name in capitals
MOST_TOKENS = 103_500  # of the product
LIMITS = {  # (mean tokens of a statement, 90th percentile, percent above 24, longest)
    "product": (FILES, (9.6, 18, 3.0, 60)),
    "tests": (TESTS, (11.3, 22, 5.0, 110)),
}


def is_docstring(node: ast.stmt | None) -> bool:
    value = node.value if isinstance(node, ast.Expr) else None
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def is_table(node: ast.stmt | None) -> bool:
    """Whether a statement gives a display of data, or a call with one, a name in capitals."""
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    value = node.value
    if isinstance(value, ast.Call) and value.args:
        value = value.args[0]
    return isinstance(target, ast.Name) and target.id.isupper() and isinstance(value, DISPLAYS)


class Statement(NamedTuple):
    """A logical line of a file that is no docstring."""

    line: int
    tokens: int
    is_data: bool


def statements(file: Path) -> Iterator[Statement]:
    source = (ROOT / file).read_text()
    nodes = {
        node.lineno: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)
    }
    begun = count = depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            node = nodes.get(begun)
            if not is_docstring(node):
                yield Statement(begun, count, is_table(node) or str(file) in DATA)
            begun = count = 0
        elif token.type not in SILENT:
            begun = begun or token.start[0]
            count += depth == 0
            depth += (token.type == F_STRING[0]) - (token.type == F_STRING[1])


def figures(files: Sequence[Path]) -> tuple[int, tuple[float, int, float, int]]:
    """All tokens, and the four figures of the statements that are no data."""
    found = list(chain.from_iterable(map(statements, files)))
    sizes = sorted(statement.tokens for statement in found if not statement.is_data) or [0]
    total = sum(statement.tokens for statement in found)
    mean = round(sum(sizes) / len(sizes), 2)
    above = round(100 * sum(size > 24 for size in sizes) / len(sizes), 1)
    return total, (mean, sizes[len(sizes) * 9 // 10], above, sizes[-1])


def faults(file: Path) -> Iterator[tuple[int, str]]:
    """(line, what it has) of each statement that says more than one thing."""
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        match node:
            case ast.IfExp():
                inner = [child for child in ast.walk(node) if isinstance(child, ast.IfExp)]
                if len(inner) > 1:
                    yield node.lineno, "a conditional expression inside another"
            case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=values)):
                if len(targets) > 2 and len(values) > 2:
                    yield node.lineno, "more than two values assigned at once"
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                if len(node.generators) > 1 or len(node.generators[0].ifs) > 1:
                    yield node.lineno, "a comprehension with more than one for or if"


@pytest.mark.parametrize("name", LIMITS)
def test_statements_are_short(name: str):
    files, limits = LIMITS[name]
    _, found = figures(files)
    assert [figure for figure, limit in zip(found, limits, strict=True) if figure > limit] == []


def test_the_product_is_small() -> None:
    assert figures(FILES)[0] <= MOST_TOKENS


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=str)
def test_a_statement_says_one_thing(file: Path):
    assert list(faults(file)) == []


def main() -> None:
    for name, (files, _) in LIMITS.items():
        total, (mean, percentile, above, longest) = figures(files)
        print(f"{name}: {total} tokens, {mean} a statement, 90th percentile {percentile},")
        print(f"    {above} % above 24, longest {longest}")
    if not sys.argv[1:]:
        return
    for file in [file for file in [*FILES, *TESTS] if str(file).startswith(sys.argv[1])]:
        long = [row for row in statements(file) if row.tokens > 24 and not row.is_data]
        print(f"{file}: {figures([file])}")
        print("    above 24 (line:tokens):", *(f"{row.line}:{row.tokens}" for row in long))


if __name__ == "__main__":
    main()
