#!/usr/bin/env python3
"""Draws mutants of the product: one changed line each, by a seed, for `run.py`.

    python3 -m venv /tmp/mutants && /tmp/mutants/bin/pip install cosmic-ray
    /tmp/mutants/bin/python mutants/draw.py [--seed 1] [--count 60] [FILE ...]

cosmic-ray makes them. What a list looks like stands in `run.py`; it outlives changes of other
lines.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import random

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator, operator_names
from run import ROOMS, ROOT, list_of

# Of the operators that replace one operator by each other one, these are enough.
TWINS = "Add_Sub Sub_Add Mul_Div FloorDiv_Mul Mod_FloorDiv Eq_NotEq NotEq_Eq Lt_LtE LtE_Lt Gt_GtE GtE_Gt Is_IsNot IsNot_Is"
SKIPPED = ("Replace", "VariableReplacer", "VariableInserter", "NumberReplacer")


def chosen() -> list[str]:
    twins = [
        f"core/Replace{kind}Operator_{twin}"
        for kind in ("Binary", "Comparison")
        for twin in TWINS.split()
    ]
    plain = [
        name for name in operator_names() if not name.removeprefix("core/").startswith(SKIPPED)
    ]
    words = [
        f"core/Replace{word}"
        for word in ("TrueWithFalse", "FalseWithTrue", "AndWithOr", "OrWithAnd")
    ]
    words += [
        "core/ReplaceBreakWithContinue",
        "core/ReplaceContinueWithBreak",
        "core/NumberReplacer",
    ]
    words += [f"core/ReplaceUnaryOperator_Delete_{name}" for name in ("Not", "USub")]
    return [name for name in operator_names() if name in {*twins, *plain, *words}]


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


def meaning(source: str) -> str:
    return ast.dump(Bare().visit(ast.parse(source)))


def draw(path: str, count: int, seed: int) -> list[tuple[int, str, str]]:
    """(number of the copy, line, new line) of `count` mutants, each on a line of its own."""
    source = (ROOT / path).read_text()
    lines = source.split("\n")
    plain = meaning(source)
    nodes = walk(get_ast(source))
    chances = list[tuple[str, int]]()
    for name in chosen():
        with contextlib.suppress(
            AttributeError
        ):  # an operator that cannot read this file makes no mutants of it
            positions = sum(len([*get_operator(name)().mutation_positions(node)]) for node in nodes)
            chances += [(name, occurrence) for occurrence in range(positions)]
    random.Random(f"{seed} {path}").shuffle(chances)
    found = dict[int, str]()
    for name, occurrence in chances:
        mutated = MutationVisitor.mutate_code(source, get_operator(name)(), occurrence)
        new = mutated.split("\n") if mutated else lines
        changed = [
            number
            for number, pair in enumerate(zip(lines, new, strict=False))
            if pair[0] != pair[1]
        ]
        if len(changed) == 1 and len(new) == len(lines) and changed[0] not in found:
            with contextlib.suppress(SyntaxError):
                if meaning("\n".join(new)) != plain:
                    found[changed[0]] = new[changed[0]]
        if len(found) == count:
            break
    return [
        (1 + lines[:number].count(lines[number]), lines[number], found[number])
        for number in sorted(found)
    ]


def walk(node: object) -> list[object]:
    return [node, *(one for child in getattr(node, "children", ()) for one in walk(child))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("files", nargs="*", default=list(ROOMS))
    options = parser.parse_args()
    for path in options.files:
        mutants = draw(path, options.count, options.seed)
        list_of(path).write_text("".join(f"{copy}\t{line}\t{new}\n" for copy, line, new in mutants))
        print(f"{path}: {len(mutants)} mutants")


if __name__ == "__main__":
    main()
