"""The Pi's policy for prompts: which way they ask, and what of a long one is sent."""

from __future__ import annotations

import argparse
import ast
import itertools
import random
import time
from pathlib import Path
from typing import Any

import pytest

from cerebrum_common import HttpError
from cm4d import Prepared, Ratio, detect_mode, prepare, weigh

PYTHON_FILE = Path(argparse.__file__).read_text("utf-8")

# What a prompt is taken for. WRONG marks guesses that a person would make differently; they all err towards complete,
# except the last, and `mode` or `instruction` is the way out.
WRONG = True
FUNCTION = "def get(url):\n    return requests.get(url).text\n"
COMPLETE = [
    ("python", "def fibonacci(n):"),
    ("python", "async def fetch():"),
    ("python", 'def has_close(numbers, threshold):\n    """Check if any two numbers are close.\n    """\n'),
    ("python", "from typing import List\n\n\ndef f(x: List[int]) -> int:\n    '''Write a sum.'''\n"),
    ("python", "# Sort the list"),
    ("python", "# Sort the list\n"),
    ("python", "# Write a function that sorts a list\n"),
    ("python", "# Write a function that sorts a list\ndef sort_list(items):"),
    ("python", "# Refactor this to use async\n"),
    ("python", "# Refactor this to use async\ndef get(url):\n"),
    ("python", "# Make this faster\ndef get(url):\n    "),
    ("python", '# Rewrite this recursively\ndef f(x):\n    """The sum."""\n'),
    ("python", "# Convert Celsius to Fahrenheit\ndef convert(c):\n    return c * 9 / 5 + 32\n"),
    ("python", "# Update this when adding a model\nMODELS = [\n    1,\n]\n"),
    ("python", "# Change this to your key\nKEY = 1\nURL = 2\n"),
    ("python", "# Use this function to parse dates\ndef parse(x):\n    return x\n"),
    ("python", "# TODO: refactor this to use async\n" + FUNCTION),
    ("python", "# Fix this later\n" + FUNCTION),
    ("python", "# Fix this when the API changes\n" + FUNCTION),
    ("python", "# Convert this to a string\ntext = str(value)\n"),
    ("python", "# Copyright 2024 The Authors\n# Licensed under the MIT license\nimport os\nimport sys\n"),
    ("python", "#!/usr/bin/env python3\nimport sys\n\ndef main():\n    pass\n"),
    ("python", "# -*- coding: utf-8 -*-\nimport sys\nx = 1\n"),
    ("python", "#!/usr/bin/env python3\n# Refactor this to use async\n" + FUNCTION, WRONG),
    ("python", '"""Explain this module."""\nimport os\n'),
    ("python", "import os\n# Refactor this to use async\n" + FUNCTION),
    ("python", FUNCTION + "# Refactor the above to use async\n", WRONG),
    ("python", "print(the_list)\nsort(a, b)\nfind = 3\n"),
    ("python", "write = 1\ncreate = write\n"),
    ("python", "return a if b else c"),
    ("python", "import a, b\nfrom x import y"),
    ("python", "query = '''\nSELECT a FROM b"),
    ("python", "select name from users"),
    ("python", "CREATE TABLE users (id INT, name TEXT)"),
    ("python", "explain select * from users"),
    ("python", "hello"),
    ("python", "x"),
    ("python", "\n\n"),
    ("python", "class Stack:"),
    ("python", "for a in the_list:\n    print(a)\n"),
    ("python", "Schreibe eine Funktion, die eine Liste sortiert", WRONG),
    ("python", "Écris une fonction qui trie une liste", WRONG),
    ("python", "编写一个对列表排序的函数", WRONG),
    ("python", "fizzbuzz in python", WRONG),
    ("python", "Return the sum of two numbers", WRONG),
    ("c", "#include <stdio.h>\n\nint main(void) {"),
    ("c", "#define MAX(a, b) ((a) > (b) ? (a) : (b))\n"),
    ("c", "# Refactor this to use realloc\nint f(void) {\n    return 1;\n}\n", WRONG),
    ("c", "/* Convert this to bytes */\nint f("),
    ("c", "// Reads all of the input\nint read_all(void) {\n    return 1;\n}\n"),
    ("cpp", "delete this;"),
    ("cpp", "template <typename T>\nclass that : public base {"),
    ("rust", "use my::module;\nuse the::other;"),
    ("rust", "/// Converts this type into a string.\npub fn to_s(x: u8) -> String {"),
    ("go", "package main\n\nimport \"fmt\"\n\nfunc main() {"),
    ("go", "// Package foo does this.\npackage foo\n\nfunc A() {}\n"),
    ("javascript", "async function to(x) {"),
    ("javascript", "// Convert this to TypeScript\nfunction add(a, b) {"),
    ("javascript", "describe('a thing', () => {\n  it('works', () => {"),
    ("javascript", "delete a.b\nlet the = 1"),
    ("typescript", "export abstract class that extends Base {"),
    ("typescript", "/**\n * Make this configurable later.\n */\nexport function f() {\n  return 1\n}\n"),
]
INSTRUCT = [
    ("python", "Write a function that reverses a string"),
    ("python", "write a function that reverses a string."),
    ("python", "Write Python code to parse a CSV file"),
    ("python", "Write quicksort"),
    ("python", "Implement quicksort in place"),
    ("python", "Explain this code:\n\n" + FUNCTION),
    ("python", "Explain what `yield from` does"),
    ("python", "Please add type hints to this:\n" + FUNCTION),
    ("python", "Can you write a web server?"),
    ("python", "How do I read a file line by line?"),
    ("python", "What does this function return?\n\n" + FUNCTION),
    ("python", "I need a class for matrices"),
    ("python", "Create a class Stack with push and pop"),
    ("python", "Given a list of integers, return the two that add up to a target"),
    ("python", "A function that returns the n-th prime"),
    ("python", "Python function to check if a number is prime"),
    ("python", "Write a function add(a, b):\n- it adds\n- it never fails"),
    ("python", "\n  Sort a list of tuples by the second element\n"),
    ("python", "Refactor this to use async:\n\n" + FUNCTION),
    ("python", "# Refactor this to use async\n" + FUNCTION),
    ("python", "# Refactor this to use async\n# and aiohttp.\n\n" + FUNCTION),
    ("python", "# Refactor this to use async\n" + FUNCTION.rstrip()),
    ("python", "# Please simplify this code\n" + FUNCTION),
    ("python", "# Add type hints\n" + FUNCTION),
    ("python", "# Add error handling to this function\n" + FUNCTION),
    ("python", "# Make it faster\n" + FUNCTION),
    ("python", "# Fix the bug in this function\n" + FUNCTION),
    ("python", "# Convert this to a dataclass\nclass A:\n    def __init__(self):\n        self.a = 1\n"),
    ("python", "# Convert this to a string\ntext = str(value)\nprint(text)\n", WRONG),
    ("javascript", "// Convert this to TypeScript\nfunction add(a, b) {\n  return a + b\n}\n"),
    ("javascript", "/* Convert this to TypeScript */\nfunction add(a, b) {\n  return a + b\n}\n"),
    ("typescript", "/**\n * Rewrite this with async/await.\n */\nfunction f() {\n  return g().then(h)\n}"),
    ("rust", "// Make this function generic\nfn add(a: u8, b: u8) -> u8 {\n    a + b\n}\n"),
    ("c", "// Optimize the loop below\nfor (int i = 0; i < n; i++) {\n    s += a[i];\n}\n"),
    ("cpp", "Write a C++ program that uses std::vector"),
    ("go", "Translate this Python to Go:\n\nprint('hi')\nprint('ho')\n"),
    ("go", "// Add comments\nfunc A() int {\n\treturn 1\n}\n"),
]


@pytest.mark.parametrize("case", COMPLETE, ids=lambda case: case[1][:30])
def test_code_is_completed(case: tuple[Any, ...]) -> None:
    assert detect_mode({"language": case[0], "prompt": case[1]}) == "complete"


@pytest.mark.parametrize("case", INSTRUCT, ids=lambda case: case[1][:30])
def test_an_instruction_is_followed(case: tuple[Any, ...]) -> None:
    assert detect_mode({"language": case[0], "prompt": case[1]}) == "instruct"
