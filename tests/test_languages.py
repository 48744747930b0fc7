"""The table of languages: which lines import, define or comment, and that no line is expensive to search. And which
language a text is in whose client does not say so."""

from __future__ import annotations

import time

import pytest

from cerebrum_code import LANGUAGES, guess_language

DEFINES = {
    "python": [
        ("def f(n):", "f"),
        ("    async def fetch(self):", "fetch"),
        ("class Stack(Generic[T]):", "Stack"),
        ("\tdef tabbed(self):", "tabbed"),
        ("LIMIT = 3", "LIMIT"),
        ("names: dict[str, int] = {}", "names"),
        ("type Pair = tuple[int, int]", "Pair"),
        ("café = 1", "café"),
        ("    local = 3", None),
        ("a == b", None),
        ("a.b = c", None),
        ("f(x=1)", None),
        ("return x", None),
        ("# def f():", None),
        ("define = 1", "define"),
        ("classify(x)", None),
    ],
    "javascript": [
        ("function add(a, b) {", "add"),
        ("  function inner() {", "inner"),
        ("async function load() {", "load"),
        ("function* items() {", "items"),
        ("function *items() {", "items"),
        ("export default class Cart extends Base {", "Cart"),
        ("export default function App() {", "App"),
        ("export const add = (a, b) => a + b", "add"),
        ("const $ = require('jquery')", "$"),
        ("let count = 0", "count"),
        ("  const local = 1", None),
        ("  render() {", "render"),
        ("  async #load(url, { retry = 3 } = {}) {", "load"),
        ("  static of(...items) {", "of"),
        ("  get size() {", "size"),
        ("  *[Symbol.iterator]() {", None),
        ("  if (a) {", None),
        ("  while (next()) {", None),
        ("  it('works', () => {", None),
        ("  foo(function () {", None),
        ("functional()", None),
        ("// function add() {", None),
    ],
    "typescript": [
        ("export interface Bill {", "Bill"),
        ("type Id = string | number", "Id"),
        ("export const enum Color {", "Color"),
        ("enum Color {", "Color"),
        ("export abstract class Shape {", "Shape"),
        ("declare function load(url: string): Promise<void>", "load"),
        ("declare module 'x' {", None),
        ("  private async load<T>(url: string): Promise<T> {", "load"),
        ("  protected override area(): number {", "area"),
        ("namespace Shop {", "Shop"),
    ],
    "rust": [
        ("fn main() {", "main"),
        ("pub(crate) async fn load(url: &str) -> Result<()> {", "load"),
        ('pub unsafe extern "C" fn call() {', "call"),
        ("    const fn zero() -> u8 {", "zero"),
        ("pub struct Bill<'a> {", "Bill"),
        ("enum Color {", "Color"),
        ("pub trait Shape: Sized {", "Shape"),
        ("type Id = u64;", "Id"),
        ("const LIMIT: usize = 3;", "LIMIT"),
        ("static mut COUNT: u8 = 0;", "COUNT"),
        ("macro_rules! square {", "square"),
        ("mod tests {", "tests"),
        ("impl Bill {", "Bill"),
        ("impl<'a, T: Into<u8>> From<T> for Bill<'a> {", "Bill"),
        ("impl fmt::Display for shop::Bill {", "Bill"),
        ("    let x = 3;", None),
        ("// fn main() {", None),
        ("fnord(x);", None),
    ],
    "c": [
        ("#define MAX(a, b) ((a) > (b))", "MAX"),
        ("#  define LIMIT 3", "LIMIT"),
        ("int main(void) {", "main"),
        ("static inline const char *name_of(struct bill *b)", "name_of"),
        ("struct bill {", "bill"),
        ("struct bill", "bill"),
        ("typedef struct node {", "node"),
        ("typedef struct {\n    long net;\n} bill_t;", "bill_t"),
        ("typedef unsigned long word_t;", "word_t"),
        ("enum color { RED, GREEN };", "color"),
        ("union value {", "value"),
        ("add_up(long a, long b)\n{", "add_up"),
        ("int one(void) { return 1; }", "one"),
        ("int declared(int a);", None),
        ("struct bill *pointer;", None),
        ("struct bill value = {0};", None),
        ("    return call(a, b)", None),
        ("    else if (a) {", None),
        ("    if (a) {", None),
        ("    call(a);", None),
        ("    x = call(a,", None),
        ("    while (call(a)) {", None),
        ("/* int main(void) { */", None),
    ],
    "cpp": [
        ("class Bill : public Item {", "Bill"),
        ("template <typename T> class Stack {", "Stack"),
        ("template <typename T, template <class> class C> struct Box {", "Box"),
        ("enum class Color {", "Color"),
        ("namespace shop {", "shop"),
        ("namespace shop", "shop"),
        ("using Id = std::uint64_t;", "Id"),
        ("std::vector<std::pair<int, int>> pairs_of(const Bill& b) {", "pairs_of"),
        ("void Bill::add(Item item) {", "add"),
        ("Bill::Bill(long net) : net_(net) {", "Bill"),
        ("Bill::~Bill() {", "~Bill"),
        ("    virtual ~Bill() {", "~Bill"),
        ("    int size() const noexcept {", "size"),
        ("constexpr auto twice(auto x) -> decltype(x) {", "twice"),
        ("class Forward;", None),
        ("    throw Error(a)", None),
        ("    delete find(a)", None),
    ],
    "go": [
        ("func main() {", "main"),
        ("func (b *Bill) Total() int {", "Total"),
        ("func Map[T any](items []T) []T {", "Map"),
        ("type Bill struct {", "Bill"),
        ("type ID = uint64", "ID"),
        ("var ErrGone = errors.New(\"gone\")", "ErrGone"),
        ("const Limit = 3", "Limit"),
        ("\tx := 3", None),
        ("const (", None),
        ("\tvar local int", None),
        ("// func main() {", None),
    ],
}  # fmt: skip
IMPORTS = {
    "python": (
        ["import os", "import a.b as c, d", "from x import y", "from . import z", "from .a.b import ("],
        ["    import os", "important = 1", "from_x = 1", "from the beginning of time", "# import os", "x = imports()"],
    ),
    "javascript": (
        ["import fs from 'fs'", "import {", "import 'x.css'", "const a = require('a')", "export * from './b'"],
        ["import('x').then(f)", "import.meta.url", "important()", "const a = b", "export const a = 1", "// import a"],
    ),
    "typescript": (["import type { A } from './a'", "import A = require('a')"], ["export interface From {"]),
    "rust": (
        ["use std::fmt;", "pub use a::b;", "pub(crate) use a::{", "extern crate serde;", "mod tests;", "pub mod a;"],
        ["mod tests {", "user(x);", "    use super::*;", "// use a;"],
    ),
    "c": (
        ["#include <stdio.h>", '#  include "a.h"', "#import <a.h>"],
        ["#define include 1", "// #include <a.h>", "include(a);", "#ifdef A"],
    ),
    "cpp": (["using namespace std;", "using std::vector;", "import std;"], ["using Id = int;", "using_it(a);"]),
    "go": (['import "fmt"', "import (", "package main", 'import f "x"'], ['\tx = "a"', "imported := 1", "packages()"]),
}
COMMENTS = {
    "python": ("#", None),
    "javascript": ("//", ("/*", "*/")),
    "typescript": ("//", ("/*", "*/")),
    "rust": ("//", ("/*", "*/")),
    "c": ("//", ("/*", "*/")),
    "cpp": ("//", ("/*", "*/")),
    "go": ("//", ("/*", "*/")),
}


@pytest.mark.parametrize(("name", "line", "defined"), [(n, *row) for n, rows in DEFINES.items() for row in rows])
def test_definitions(name: str, line: str, defined: str | None) -> None:
    for text in (line, f"{line}\n", f"\n\n{line}\nx\n", f"{line}\r\n".replace("\n{", "\r\n{")):
        match = LANGUAGES[name].defines.search(text)
        assert (match and match[match.lastindex or 0]) == defined
        assert match is None or not text[: match.start()].strip("\r\n")


@pytest.mark.parametrize("name", LANGUAGES)
def test_imports(name: str) -> None:
    imports, others = IMPORTS[name]
    for line in imports:
        assert LANGUAGES[name].imports.match(line), line
        assert LANGUAGES[name].imports.search(f"x\n{line}\n"), line
    for line in others:
        assert not LANGUAGES[name].imports.search(line), line


def test_each_language_has_its_comments_and_strings() -> None:
    assert {name: (one.line_comment, one.block_comment) for name, one in LANGUAGES.items()} == COMMENTS
    for language in LANGUAGES.values():
        openings = [opening for opening, _ in language.strings]
        assert openings == sorted(openings, key=len, reverse=True)
        assert language.multiline <= set(openings)
        assert language.raw <= set(openings)
    assert [name for name, language in LANGUAGES.items() if language.indented] == ["python"]


HOSTILE = [
    "a", "a ", "a(", "(a", "((", "<", "template<", "template <> ", "::", "a::", "* ", "& ", "typedef {", "typedef ",
    "export ", "const ", "  static ", " foo(", "  a((b)", "pub(crate) ", "impl<", "impl a for ", "import ", "from ",
    "x: ", "from a import b", "# define", "\t", " ", "struct a ", "func (a) ", "enum class ", "int a(", "int a b ",
    "using a", "async ", "unsafe ", "/*", "//", "\\", "\"", "{", "}", "=", "[", ".", "é", "\0",
]  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_line_is_expensive(name: str) -> None:
    language = LANGUAGES[name]
    for unit in HOSTILE:
        line = unit * (100_000 // len(unit))
        texts = [line, f"int {line}", f"typedef struct {{{line}"]
        for text in (*texts, "\n".join([line[:300]] * 300), "\n".join([line[:30]] * 3000)):
            started = time.thread_time()
            for pattern in (language.defines, language.imports):
                assert sum(1 for _ in pattern.finditer(text)) >= 0
            assert time.thread_time() - started < 2, (unit, len(text))  # 100 KB; 40 times the slowest


# ----------------------------------------------------------------------------------------- guessing a language

# (the file's name, the text before the cursor, the names of other files, the language)
GUESSES: list[tuple[str, str, list[str], str]] = [
    ("a.py", "", [], "python"),
    ("/home/me/a.pyi", "", [], "python"),
    ("a.pyw", "", [], "python"),
    ("A.PY", "", [], "python"),
    ("a.js", "", [], "javascript"),
    ("a.test.jsx", "", [], "javascript"),
    ("a.mjs", "", [], "javascript"),
    ("a.cjs", "", [], "javascript"),
    ("a.ts", "", [], "typescript"),
    ("a.d.ts", "", [], "typescript"),
    ("a.tsx", "", [], "typescript"),
    ("a.mts", "", [], "typescript"),
    ("src/main.rs", "", [], "rust"),
    ("a.c", "", [], "c"),
    ("a.h", "", [], "c"),
    ("a.cpp", "", [], "cpp"),
    ("a.cc", "", [], "cpp"),
    ("a.hxx", "", [], "cpp"),
    ("C:\\src\\a.go", "", [], "go"),
    ("a.java", "", [], ""),
    ("Makefile", "", [], ""),
    ("go", "", [], ""),
    ("src.d/c", "", [], ""),
    ("a.py.orig", "", [], ""),
    ("", "", [], ""),
    # a shebang
    ("", "#!/usr/bin/env python3\n", [], "python"),
    ("", "#!/usr/bin/env python3\r\nimport os\r\n", [], "python"),
    ("run", "#!/usr/bin/python", [], "python"),
    ("", "#! /usr/local/bin/python3.11 -u\n", [], "python"),
    ("", "#!/usr/bin/env -S deno run --allow-net\n", [], "typescript"),
    ("", "#!/usr/bin/env A=1 node\n", [], "javascript"),
    ("", "#!/usr/bin/env bun\n", [], "typescript"),
    ("", "#!python\n", [], "python"),
    ("", "#!/opt/python/bin/bash\n", [], ""),
    ("", "#!/bin/sh\n", [], ""),
    ("", "#!/usr/bin/env", [], ""),
    ("", "#!", [], ""),
    ("", "x\n#!/usr/bin/env python3\n", [], ""),
    # what plugins write above the text
    ("", "# language: python\n", [], "python"),
    ("", "// language: C++\n", [], "cpp"),
    ("", "-- filetype=go\n", [], "go"),
    ("", "# Language: JavaScript\n", [], "javascript"),
    ("", "// Path: src/main.rs\nfn main() {", [], "rust"),
    ("", "# sum.py\ndef add(a, b):", [], "python"),
    ("", "// src/sum.test.ts\r\nlet x", [], "typescript"),
    ("", "# see sum.py\nx", [], ""),
    ("", "import os\n\ndef g(x):\n    os.c", ["a.py"], "python"),
    ("", "import os\nos.rs", ["a.py"], "python"),
    ("", "x\n# a.rs", [], ""),
    ("", "# file: x.ts\n", [], "typescript"),
    ("", "<!-- filename: a.go -->\n", [], "go"),
    ("", "# license: MIT\n# language: python\n", [], "python"),
    ("", "# language: cobol\n# path: a.rs\n", [], "rust"),
    ("", "# language: cobol\n", [], ""),
    ("", "language: python\n", [], ""),
    ("", "x\n" * 300 + "# language: python\n", [], ""),
    # the fence that is open at the end
    ("", "Some text\n```python\nx = 1\n", [], "python"),
    ("", "```rs\nfn f() {}\n```\nand\n```go\n", [], "go"),
    ("", "~~~ts\n", [], "typescript"),
    ("", "```go\r\nx := 1\r\n", [], "go"),
    ("", "```python\nx = 1\n```\n", [], ""),
    ("", "```\nx = 1\n", [], ""),
    ("", "```cobol\n", [], ""),
    ("", "a ```python\n", [], ""),
    # other files
    ("", "x = 1", ["a.rs", "b.rs"], "rust"),
    ("", "x = 1", ["a.rs", "b.go", "c.go"], "go"),
    ("", "x = 1", ["README.md", "Makefile", "a.ts"], "typescript"),
    ("", "x = 1", ["README.md", "", "c"], ""),
    # which of them counts
    ("a.go", "#!/usr/bin/env python3\n", ["a.rs"], "go"),
    ("", "#!/usr/bin/env python3\n# language: go\n```rust\n", ["a.c"], "python"),
    ("", "# language: go\n```rust\n", ["a.c"], "go"),
    ("", "```rust\n", ["a.c"], "rust"),
    ("notes.md", "```rust\n", ["a.c"], "rust"),
]


@pytest.mark.parametrize(("filename", "text", "others", "language"), GUESSES, ids=str)
def test_guesses(filename: str, text: str, others: list[str], language: str) -> None:
    assert guess_language(filename, text, others) == language


@pytest.mark.parametrize(
    "unit", ["/", "/a", "/env ", "-a ", "a", "a1", "+", "A=1 ", "```", "\n```a", "\n#", "# language:", " "]
)
def test_no_guess_is_expensive(unit: str) -> None:
    line = unit * (100_000 // len(unit))
    for text in (line, f"#!{line}", f"#!/usr/bin/env {line}", f"# language: {line}"):
        started = time.thread_time()
        assert guess_language(line, text, [line]) in ("", *LANGUAGES)
        assert time.thread_time() - started < 2, text[:40]
