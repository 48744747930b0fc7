"""Which mode a prompt implies, and what is sent of a long one."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from os.path import commonprefix
from pathlib import Path
from typing import Any

import pytest
from test_ending import cases

from cerebrum.text.languages import LANGUAGES
from cerebrum.text.prompt import (
    NEAR,
    SOON,
    WINDOW,
    Prepared,
    detect_mode,
    nearer,
    prepare,
    steady_suffix,
    weigh,
)
from cerebrum_common import HttpError

PYTHON_FILE = Path(argparse.__file__).read_text("utf-8")

FUNCTION = "def get(url):\n    return requests.get(url).text\n"
# Prompts that are code, and those that are instructions, by language. A person would take those
# that are "wrong" the other way. They err towards complete; `mode` or `instruction` corrects them.
COMPLETE = r'''
=== python
def fibonacci(n):
=== python
def has_close(numbers, threshold):
    """Check if any two numbers are close.
    """

=== python
# Sort the list
=== python
# Refactor this to use async
def get(url):
    return requests.get(url).text

=== python
# Write a function that sorts a list
def sort_list(items):
=== python
# Copyright 2024 The Authors
# Licensed under the MIT license
import os
import sys

=== python
#!/usr/bin/env python3
import sys

def main():
    pass

=== python
"""Explain this module."""
import os

=== python
print(the_list)
sort(a, b)
find = 3

=== python
return a if b else c
=== python
query = """
SELECT a FROM b
=== python
select name from users
=== python
CREATE TABLE users (id INT, name TEXT)
=== python
explain select * from users
=== python



=== python
for a in the_list:
    print(a)

=== python, wrong
编写一个对列表排序的函数
=== python, wrong
fizzbuzz in python
=== python, wrong
Return the sum of two numbers
=== c
#define MAX(a, b) ((a) > (b) ? (a) : (b))

=== c
// Reads all of the input
int read_all(void) {
    return 1;
}

=== cpp
delete this;
=== rust
use my::module;
use the::other;
=== go
package main

import "fmt"

func main() {
=== javascript
describe('a thing', () => {
  it('works', () => {
=== javascript
delete a.b
let the = 1
=== typescript
export abstract class that extends Base {
=== markdown
How do I install it?

Run
=== markdown
# Title

Write a
=== sql
CREATE PROCEDURE foo()
=== sql
create extension if not exists
=== sql
EXPLAIN ALL a
=== sql
describe users
=== dockerfile
ADD a b
=== yaml
generate foo: x
=== shell
find . -name '*.txt'
=== shell
make install
=== html
<p>Write a letter
'''
INSTRUCT = """
=== python
Write a function that reverses a string
=== python
Write Python code to parse a CSV file
=== python
Write quicksort
=== python
Explain this code:

def get(url):
    return requests.get(url).text

=== python
Explain what `yield from` does
=== python
Please add type hints to this:
def get(url):
    return requests.get(url).text

=== python
Can you write a web server?
=== python
How do I read a file line by line?
=== python
What does this function return?

def get(url):
    return requests.get(url).text

=== python
I need a class for matrices
=== python
Create a class Stack with push and pop
=== python
Given a list of integers, return the two that add up to a target
=== python
A function that returns the n-th prime
=== python
Python function to check if a number is prime
=== python
Write a function add(a, b):
- it adds
- it never fails
=== python

  Sort a list of tuples by the second element

=== python
Refactor this to use async:

def get(url):
    return requests.get(url).text

=== cpp
Write a C++ program that uses std::vector
=== go
Translate this Python to Go:

print('hi')
print('ho')

=== markdown
Write a README for a shop
=== sql
Write a query that lists all customers
=== sql
explain this query
=== dockerfile
Add a user
=== shell
Find all files that are larger than 1 GB
"""


@pytest.mark.parametrize(("prompts", "mode"), [(COMPLETE, "complete"), (INSTRUCT, "instruct")])
def test_the_mode_of_a_prompt(prompts, mode):
    for head, text in cases(prompts):
        assert (text, detect_mode({"language": head.split(",")[0], "prompt": text})) == (text, mode)


DECIDED = r"""
infill {"prompt": "def f(", "suffix": "):\n    return 1\n"}
infill {"prompt": "Write a stack", "suffix": "\nx = 1\n"}
infill {"prompt": "", "suffix": "x = 1\n"}
complete {"prompt": "def f(", "suffix": ""}
complete {"prompt": "def f(", "suffix": "\n"}
infill {"prompt": "def f(", "suffix": "", "mode": "infill"}
instruct {"prompt": "def get(url):\n    return url\n", "instruction": "Make this async"}
instruct {"prompt": "", "instruction": "Write a stack"}
complete {"prompt": "def f(", "instruction": ""}
complete {"prompt": "def f(", "mode": "auto"}
instruct {"prompt": "def f(", "mode": "instruct"}
complete {"prompt": "Write a stack", "mode": "complete"}
instruct {"prompt": "Write a stack", "mode": null, "suffix": null, "instruction": null}
"""


@pytest.mark.parametrize("row", DECIDED.strip().splitlines())
def test_fields_decide_before_the_prompt(row):
    mode, _, fields = row.partition(" ")
    assert detect_mode({"language": "python", **json.loads(fields)}) == mode


CONTRADICTIONS = """
suffix: {"prompt": "a", "mode": "infill"}
suffix: .*got 1 {"prompt": "a", "mode": "complete", "suffix": "b"}
suffix: {"prompt": "a", "mode": "instruct", "suffix": "b"}
instruction: {"prompt": "a", "mode": "complete", "instruction": "do"}
instruction: .*got 2 {"prompt": "a", "suffix": "b", "instruction": "do"}
prompt: {"prompt": "", "mode": "complete"}
prompt: {"prompt": "", "mode": "instruct"}
"""


@pytest.mark.parametrize("row", CONTRADICTIONS.strip().splitlines())
def test_fields_that_contradict_are_named(row):
    message, brace, fields = row.partition("{")
    with pytest.raises(HttpError, match=message) as caught:
        detect_mode({"language": "python", **json.loads(brace + fields)})
    assert caught.value.status == 400


# ------------------------------------------------------------------------------------------ fitting


def prepared(
    text: str, language: str = "python", mode: str = "complete", budget: int = 3500, **more: Any
) -> Prepared:
    return prepare({"language": language, "prompt": text, **more}, mode, budget)


def instructed(text: str, instruction: str | None = None) -> tuple[str, list[str]]:
    """The message to a model, and the parts that are kept."""
    result = prepared(text, mode="instruct", instruction=instruction)
    question, answer = result.body["messages"]
    assert answer == {"role": "assistant", "content": "```python\n"}
    assert question["role"] == "user"
    return question["content"], result.kept["parts"]


@pytest.mark.parametrize("prompt", ["x", FUNCTION, "\r\n\ta = '漢字'\r\n", "\n" * 500])
def test_what_fits_is_sent_unchanged(prompt):
    result, around = prepared(prompt), {"suffix": "\n)\n", "filename": "a.py"}
    assert result.body == {"mode": "complete", "prompt": prompt, "heal": True}
    assert result.kept == {"characters": len(prompt), "of": len(prompt), "parts": ["all"]}
    result = prepared(prompt, mode="infill", **around)
    assert result.body == {"mode": "infill", "prompt": prompt, "heal": True, **around}
    assert result.kept["parts"] == ["all"]
    count = len(prompt) + 2
    result = prepared(prompt, mode="instruct", instruction="Do")
    assert result.kept == {"characters": count, "of": count, "parts": ["all"]}


LONG_CODE = 60 * FUNCTION  # goes before the instruction
INSTRUCTIONS = [
    ("Write a stack", None, "Write a stack"),
    (FUNCTION, "Make this async", f"Make this async\n\n```python\n{FUNCTION}```"),
    ("x = 1", " Explain\n", "Explain\n\n```python\nx = 1\n```"),
    ("", "Write a stack", "Write a stack"),
    (LONG_CODE, "Make this async", f"```python\n{LONG_CODE}```\n\nMake this async"),
]


def test_an_instruction_is_answered_by_code():
    for prompt, instruction, content in INSTRUCTIONS:
        assert instructed(prompt, instruction)[0] == content


# A statement that fills a file.
LONG = {
    "python": "def f%d(a):\n    return a\n\n\n",
    "typescript": "function f%d(a: number): number {\n  return a\n}\n\n",
    "c": "static int f%d(int a)\n{\n    return a;\n}\n\n",
    "csharp": "    int F%d(int x)\n    {\n        return x;\n    }\n\n",
    "ruby": "def f%d(x)\n  x\nend\n\n",
    "sql": "INSERT INTO f VALUES (%d);\n\n",
    "html": "<p>%d</p>\n",
    "css": "p%d {\n  width: 1px;\n}\n\n",
}


@pytest.mark.parametrize("language", LONG)
def test_of_a_long_file_a_window_of_whole_statements_is_sent(language):
    statement = LONG[language]
    text = "".join([*(statement % n for n in range(2000)), "cursor"])
    result = prepared(text, language, budget=1200)
    mark = LANGUAGES[language].remark("... lines left out") + "\n"
    window = result.body["prompt"].removeprefix(mark)
    assert len(mark) + len(window) == len(result.body["prompt"])
    assert text.endswith(window)
    number = re.search(r"\d+", window)
    assert number
    assert window.startswith(statement % int(number[0]))
    assert 2400 < result.weight <= 1196 * 3.5
    assert result.kept["parts"] == ["window"]


def test_an_infill_keeps_both_sides_of_the_cursor():
    """A window, however large the context is: half of it below the cursor, or what the text above
    leaves; an eighth where the suffix is read last.
    """
    cut = 60_000
    fields = {"prompt": PYTHON_FILE[:cut], "suffix": PYTHON_FILE[cut:], "language": "python"}
    last = prepare(fields, "infill", 3500).body["suffix"]
    assert WINDOW * 0.08 < weigh(last) <= WINDOW / 8
    result = prepare(fields, "infill", 3500, layout="spmv2")
    prompt, suffix = result.body["prompt"], result.body["suffix"]
    assert PYTHON_FILE[:cut].endswith(prompt.partition("left out\n")[2])
    assert PYTHON_FILE[cut:].startswith(suffix)
    assert suffix[-1] == "\n"
    assert WINDOW * 0.4 < weigh(suffix) <= WINDOW / 2
    assert WINDOW * 0.7 < result.weight <= WINDOW
    assert result.kept["parts"] == ["window", "suffix"]
    short = prepared("x = ", mode="infill", suffix=PYTHON_FILE)
    assert short.body["prompt"] == "x = "
    assert WINDOW * 0.8 < weigh(short.body["suffix"]) < WINDOW
    fields = {"prompt": PYTHON_FILE, "language": "python"}
    assert prepare(fields, "complete", 3500, is_editors=True).weight <= WINDOW
    assert prepare(fields, "complete", 3500).weight > 3 * WINDOW


def test_an_instruction_on_a_long_file_gets_what_it_names():
    text = PYTHON_FILE + "\n\nx = 1\n" * 3000
    asked = "Let FileType open gzip files as well"
    content, parts = instructed(text, asked)
    assert "class FileType(object):" in content
    assert asked in content
    assert parts == ["window"]
    content, parts = instructed(f"def first():\n    pass\n\n\n{text}", "Document first")
    assert content.startswith("```python\ndef first():\n    pass\n")
    assert parts == ["window"]
    commented = "# Здесь считается сумма всех покупок.\nx = 1\n" * 4000
    text_before = f"{commented}def total(cart):\n    return sum(cart)\n"
    content, parts = instructed(text_before + commented, "Rename total to grand_total")
    assert "def total(cart):\n    return sum(cart)\n" in content
    assert parts == ["window"]
    content, parts = instructed("", "Write a stack. " * 60_000)
    assert content.startswith("Write a stack. Write")
    assert parts == ["instruction"]
    content, parts = instructed(text, "Write a stack. " * 60_000)
    assert "x = 1\n" in content
    assert parts == ["instruction", "window"]


def test_someone_typing_keeps_the_cache():
    lines = PYTHON_FILE.splitlines(keepends=True)
    prompts = [prepared("".join(lines[:at])).body["prompt"] for at in range(1700, 1800)]
    pairs = itertools.pairwise(prompts)
    saved = sorted(len(commonprefix(pair)) / len(pair[1]) for pair in pairs)  # noqa: RUF071
    assert sum(saved) / len(saved) > 0.95
    assert saved[5] > 0.9  # 95 of 100 lines; at the others the window moves


ODD = {
    "a file": PYTHON_FILE,
    "one line": "x" * 300_000 + "end",
    "empty lines": "\n" * 300_000,
    "CRLF": "a = 1\r\n" * 40_000,
    "tabs": "\t\tif x:\n\t\t\ty()\n" * 15_000,
    "digits": "0123456789, " * 20_000,
    "Chinese": "# 这个函数对列表进行排序\n" * 20_000,
    "emoji": "\U0001f600" * 60_000,
    "quotes": '"""' * 60_000,
    "brackets": "(" * 300_000,
    "imports": "import (\n" * 30_000,
    "open comment": "/* a\n" * 60_000,
    "deep": "".join(" " * (n % 180) + f"def f{n}():\n" for n in range(3000)),
}


@pytest.mark.parametrize("language", ["python", "c"])
@pytest.mark.parametrize("name", ODD)
def test_odd_texts_fit(name, language):
    text = ODD[name]
    for budget, suffix in itertools.product((3500, 700, 60), (None, text)):
        mode = "infill" if suffix else "complete"
        result = prepared(text, language, mode, budget, suffix=suffix)
        prompt, below = result.body["prompt"], result.body.get("suffix", "")
        assert result.weight == weigh(prompt + below) <= (budget - 4) * 3.5
        assert prompt[-4:] == text[-4:]
        assert text.startswith(below)


@pytest.mark.parametrize("lines", [60, 240, 1200])
def test_typing_adds_to_a_prompt_that_has_the_suffix_first(lines):
    """Whether the file is short, just fits or is long: what is read for all keys together is little
    more than what is read once.
    """
    file = PYTHON_FILE.splitlines(keepends=True)
    above = "".join(file[:lines])
    below = "".join(file[lines : lines + 400])
    read, before = 0, ""
    for end in range(200):
        fields = {"prompt": above + PYTHON_FILE[:end], "suffix": below, "language": "python"}
        body = prepare(fields, "infill", 3000, "spmv2").body
        text = steady_suffix(body["suffix"]) + body["prompt"]
        assert text.startswith(below[:100])
        assert text.endswith(fields["prompt"][-100:])
        read += len(text) - len(commonprefix([text, before]))  # noqa: RUF071
        before = text
    assert read < 2.5 * len(before)


FAR = PYTHON_FILE[:8000]
BELOW = PYTHON_FILE[8000:9000]


@pytest.mark.parametrize("layout", ["psm", "spm", "spmv2"])
def test_what_may_be_read_instead_of_a_window(layout):
    """All is from near the cursor, and the less the nearer."""
    fields = {"prompt": FAR, "suffix": BELOW, "extra": [], "language": "python"}
    whole = {**fields, **prepare(fields, "infill", 3000, layout).body}
    *first, more, less = nearer(whole, layout)
    for part, room in ((more, SOON), (less, NEAR)):
        assert 0.8 * room < weigh(part["prompt"] + part["suffix"]) <= room
        assert FAR.endswith(part["prompt"].partition("left out\n")[2])
        assert BELOW.startswith(part["suffix"])
        assert part["extra"] == ()
    assert len(more["suffix"]) >= len(less["suffix"])
    assert [*map(list, first)] == [["suffix"]] * (layout == "psm")  # each key reads it anew
    for part in first:
        assert 0 < weigh(part["suffix"]) <= weigh(less["suffix"])
    end = {**fields, "suffix": None}
    assert [part["suffix"] for part in nearer(end, layout)] == [None, None]


def test_a_window_may_be_smaller():
    fields = {"prompt": FAR, "suffix": BELOW, "language": "python"}
    sent = prepare(fields, "infill", 3000, around=SOON)
    assert 0.8 * SOON < sent.weight <= SOON
    assert prepare(fields, "complete", 3000, around=SOON).weight > SOON  # no editor's


def test_nothing_is_left_out_of_a_layout_of_the_models_own():
    prompt = "<|file_sep|>original/a.py\n" + "x = 1\n" * 5000
    result = prepared(prompt, budget=100, special=True)
    assert result.body == {"mode": "complete", "prompt": prompt}
    assert result.kept == {"characters": len(prompt), "of": len(prompt), "parts": ["all"]}
