#!/usr/bin/env python3
"""Draws mutants of the product: one changed line each, by a seed, for `run.py`.

    python3 -m venv /tmp/mutants && /tmp/mutants/bin/pip install cosmic-ray
    /tmp/mutants/bin/python mutants/draw.py [--seed 1] [--count 24] [FILE ...]

cosmic-ray makes them. What a list looks like stands in `run.py`; it outlives changes of other
lines.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import random
import re
from functools import cache

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator, operator_names
from run import ROOMS, ROOT, list_of

# cosmic-ray's operators. Of those that replace one operator by each other one, these are enough.
CHOSEN = re.compile(r"""(?x) core/ (
    Replace(Binary|Comparison)Operator_(
        Add_Sub | Sub_Add | Mul_Div | FloorDiv_Mul | Mod_FloorDiv | Eq_NotEq | NotEq_Eq
        | Lt_LtE | LtE_Lt | Gt_GtE | GtE_Gt | Is_IsNot | IsNot_Is)
    | Replace(TrueWithFalse | FalseWithTrue | AndWithOr | OrWithAnd)
    | Replace(BreakWithContinue | ContinueWithBreak)
    | ReplaceUnaryOperator_Delete_(Not | USub)
    | NumberReplacer
    | (?!Replace | VariableReplacer | VariableInserter) .*
)""")


class Bare(ast.NodeTransformer):
    """Drops annotations, which are never evaluated."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(0)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]


@cache
def meaning(source: str) -> str:
    return ast.dump(Bare().visit(ast.parse(source)))


def draw(path: str, count: int, seed: int) -> list[tuple[int, str, str]]:
    """(number of the copy, line, new line) of `count` mutants, each on a line of its own."""
    source = (ROOT / path).read_text()
    lines = source.split("\n")
    chances = chances_in(source)
    random.Random(f"{seed} {path}").shuffle(chances)
    found = dict[int, str]()
    for name, occurrence in chances:
        mutated = MutationVisitor.mutate_code(source, get_operator(name)(), occurrence)
        number = changed_line(source, mutated or source)
        if number is not None and number not in found:
            found[number] = mutated.split("\n")[number]
        if len(found) == count:
            break
    copies = {number: 1 + lines[:number].count(lines[number]) for number in sorted(found)}
    return [(copy, lines[number], found[number]) for number, copy in copies.items()]


def chances_in(source: str) -> list[tuple[str, int]]:
    """(name of an operator, number of a place where it applies)."""
    nodes = walk(get_ast(source))
    chances = list[tuple[str, int]]()
    for name in filter(CHOSEN.fullmatch, operator_names()):
        operator = get_operator(name)()
        # An operator that cannot read this file makes no mutants of it.
        with contextlib.suppress(AttributeError):
            places = sum(len([*operator.mutation_positions(node)]) for node in nodes)
            chances += [(name, occurrence) for occurrence in range(places)]
    return chances


def changed_line(source: str, mutated: str) -> int | None:
    """The number of the only line that differs; None if others differ too, if the meaning is the
    same or if it is no Python.
    """
    old = source.split("\n")
    new = mutated.split("\n")
    if len(new) != len(old):
        return None
    changed = [number for number, line in enumerate(new) if line != old[number]]
    if len(changed) != 1:
        return None
    with contextlib.suppress(SyntaxError):
        if meaning(mutated) != meaning(source):
            return changed[0]
    return None


def walk(node: object) -> list[object]:
    nodes = [node]
    for child in getattr(node, "children", ()):
        nodes += walk(child)
    return nodes


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=plain)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("files", nargs="*", default=list(ROOMS))
    options = parser.parse_args()
    for path in options.files:
        mutants = draw(path, options.count, options.seed)
        list_of(path).write_text("".join(f"{copy}\t{line}\t{new}\n" for copy, line, new in mutants))
        print(f"{path}: {len(mutants)} mutants")


if __name__ == "__main__":
    main()
