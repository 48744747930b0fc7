"""The table of languages: which lines import, define or comment, and that no line is expensive to search. And which
language a text is in whose client does not say so."""

from __future__ import annotations

import doctest
import time

import pytest

from cerebrum.text import languages
from cerebrum.text.languages import LANGUAGES, guess_language

DEFINES: dict[str, dict[str, str]] = {  # a line, and the name that it defines
    "python": {
        "def f(n):": "f",
        "    async def fetch(self):": "fetch",
        "class Stack(Generic[T]):": "Stack",
        "\tdef tabbed(self):": "tabbed",
        "LIMIT = 3": "LIMIT",
        "names: dict[str, int] = {}": "names",
        "type Pair = tuple[int, int]": "Pair",
        "café = 1": "café",
        "define = 1": "define",
    },
    "javascript": {
        "function add(a, b) {": "add",
        "  function inner() {": "inner",
        "async function load() {": "load",
        "function* items() {": "items",
        "function *items() {": "items",
        "export default class Cart extends Base {": "Cart",
        "export default function App() {": "App",
        "export const add = (a, b) => a + b": "add",
        "const $ = require('jquery')": "$",
        "let count = 0": "count",
        "  render() {": "render",
        "  async #load(url, { retry = 3 } = {}) {": "load",
        "  static of(...items) {": "of",
        "  get size() {": "size",
    },
    "typescript": {
        "export interface Bill {": "Bill",
        "type Id = string | number": "Id",
        "export const enum Color {": "Color",
        "enum Color {": "Color",
        "export abstract class Shape {": "Shape",
        "declare function load(url: string): Promise<void>": "load",
        "  private async load<T>(url: string): Promise<T> {": "load",
        "  protected override area(): number {": "area",
        "namespace Shop {": "Shop",
    },
    "rust": {
        "fn main() {": "main",
        "pub(crate) async fn load(url: &str) -> Result<()> {": "load",
        'pub unsafe extern "C" fn call() {': "call",
        "    const fn zero() -> u8 {": "zero",
        "pub struct Bill<'a> {": "Bill",
        "enum Color {": "Color",
        "pub trait Shape: Sized {": "Shape",
        "type Id = u64;": "Id",
        "const LIMIT: usize = 3;": "LIMIT",
        "static mut COUNT: u8 = 0;": "COUNT",
        "macro_rules! square {": "square",
        "mod tests {": "tests",
        "impl Bill {": "Bill",
        "impl<'a, T: Into<u8>> From<T> for Bill<'a> {": "Bill",
        "impl fmt::Display for shop::Bill {": "Bill",
    },
    "c": {
        "#define MAX(a, b) ((a) > (b))": "MAX",
        "#  define LIMIT 3": "LIMIT",
        "int main(void) {": "main",
        "static inline const char *name_of(struct bill *b)": "name_of",
        "struct bill {": "bill",
        "struct bill": "bill",
        "typedef struct node {": "node",
        "typedef struct {\n    long net;\n} bill_t;": "bill_t",
        "typedef unsigned long word_t;": "word_t",
        "enum color { RED, GREEN };": "color",
        "union value {": "value",
        "add_up(long a, long b)\n{": "add_up",
        "int one(void) { return 1; }": "one",
    },
    "cpp": {
        "class Bill : public Item {": "Bill",
        "template <typename T> class Stack {": "Stack",
        "template <typename T, template <class> class C> struct Box {": "Box",
        "enum class Color {": "Color",
        "namespace shop {": "shop",
        "namespace shop": "shop",
        "using Id = std::uint64_t;": "Id",
        "std::vector<std::pair<int, int>> pairs_of(const Bill& b) {": "pairs_of",
        "void Bill::add(Item item) {": "add",
        "Bill::Bill(long net) : net_(net) {": "Bill",
        "Bill::~Bill() {": "~Bill",
        "    virtual ~Bill() {": "~Bill",
        "    int size() const noexcept {": "size",
        "constexpr auto twice(auto x) -> decltype(x) {": "twice",
    },
    "go": {
        "func main() {": "main",
        "func (b *Bill) Total() int {": "Total",
        "func Map[T any](items []T) []T {": "Map",
        "type Bill struct {": "Bill",
        "type ID = uint64": "ID",
        'var ErrGone = errors.New("gone")': "ErrGone",
        "const Limit = 3": "Limit",
    },
    "java": {
        "public class Account extends Base<String> {": "Account",
        "public final class Bill": "Bill",
        "interface Shape permits Circle {": "Shape",
        "public enum Color {": "Color",
        "record Point(int x, int y) {": "Point",
        '@SuppressWarnings("x") class Loud {': "Loud",
        "    public static Map<String, List<Integer>> of(int a) {": "of",
        "    private static <T extends Comparable<T>> T max(List<T> items) {": "max",
        "    public Account(String owner) {": "Account",
        "    @Override public int size() {": "size",
    },
    "csharp": {
        "public sealed class Bill : Item": "Bill",
        "public record struct Point(int X, int Y);": "Point",
        "struct Pair {": "Pair",
        "    public async Task<int> LoadAsync(string url)": "LoadAsync",
        "    public int Twice(int x) => 2 * x;": "Twice",
        "    public string Name { get; set; }": "Name",
        "    public int Total => lines.Sum();": "Total",
    },
    "kotlin": {
        "data class Point(val x: Int, val y: Int)": "Point",
        "sealed interface Shape {": "Shape",
        "object Registry {": "Registry",
        "typealias Id = Long": "Id",
        "    override suspend fun load(url: String): Int {": "load",
        "fun <T> List<T>.second(): T = this[1]": "second",
        "const val LIMIT = 3": "LIMIT",
    },
    "swift": {
        "public final class Account: Base {": "Account",
        "struct Point<T> {": "Point",
        "extension Account: Equatable {": "Account",
        "    class func shared() -> Account {": "shared",
        "    @discardableResult func add(_ x: Int) -> Int {": "add",
        "let limit = 3": "limit",
    },
    "php": {
        "final class Bill extends Item": "Bill",
        "abstract class Shape {": "Shape",
        "trait Loud {": "Loud",
        "function &total(array $lines): int {": "total",
        "    public static function of(int $a): self": "of",
    },
    "css": {
        ".menu > li {": "menu",
        "#top:hover {": "top",
        "@mixin wide($x) {": "wide",
        "  --accent: red;": "--accent",
        "$width: 3px;": "$width",
    },
    "ruby": {
        "def balance": "balance",
        "  def self.of(a)": "of",
        "class Shop::Bill < Item": "Bill",
        "module Shop": "Shop",
        "LIMIT = 3": "LIMIT",
    },
    "lua": {
        "function M.f(a)": "f",
        "local function g()": "g",
        "function Account:close()": "close",
        "M.h = function(a)": "h",
        "local limit = 3": "limit",
    },
    "shell": {
        "greet() {": "greet",
        "function greet {": "greet",
        "  inner () {": "inner",
        "export PATH=/bin": "PATH",
        "LIMIT=3": "LIMIT",
        "readonly NAME=x": "NAME",
    },
    "sql": {
        "CREATE TABLE bills (": "bills",
        "create or replace function shop.total(x int)": "total",
        'CREATE UNIQUE INDEX IF NOT EXISTS "by name" ON a (b);': "by",
        "CREATE TEMPORARY VIEW `v` AS": "v",
    },
    "yaml": {"services:": "services", "on: push": "on"},
    "toml": {"[tool.ruff]": "tool.ruff", "[[models]]": "models"},
    "markdown": {"## Deploy it": "Deploy it"},
    "dockerfile": {"FROM golang:1 AS build": "build", "ARG VERSION=3": "VERSION", "ENV PATH /bin": "PATH"},
    "makefile": {"build/%.o: %.c": "build/%.o", "CFLAGS += -O2": "CFLAGS"},
    "scala": {"final case class Point(x: Int)": "Point", "  def f[A](a: A): A = {": "f", "val limit = 3": "limit"},
    "dart": {"abstract class Shape {": "Shape", "  Future<int> load(String url) async {": "load"},
    "perl": {"sub total {": "total", "our %rates = (": "rates"},
    "r": {"total <- function(x) {": "total", "limit = 3": "limit"},
    "zig": {"pub fn main() !void {": "main", "const Point = struct {": "Point"},
    "powershell": {"function Total($x) {": "Total", "class Bill {": "Bill"},
    "julia": {"function total(x)": "total", "mutable struct Bill": "Bill", "const LIMIT = 3": "LIMIT"},
    "elixir": {"defmodule Shop.Bill do": "Bill", "  def total(x) do": "total", "  defp rate(x) do": "rate"},
    "haskell": {"data Shape = Circle": "Shape", "total :: Int -> Int": "total"},
}  # fmt: skip
DEFINE_NOTHING = {
    "python": ["    local = 3", "a == b", "a.b = c", "f(x=1)", "return x", "# def f():", "classify(x)"],
    "javascript": [
        "  const local = 1", "  *[Symbol.iterator]() {", "  if (a) {", "  while (next()) {", "  it('works', () => {",
        "  foo(function () {", "functional()", "// function add() {",
    ],
    "typescript": ["declare module 'x' {"],
    "rust": ["    let x = 3;", "// fn main() {", "fnord(x);"],
    "c": [
        "int declared(int a);", "struct bill *pointer;", "struct bill value = {0};", "    return call(a, b)",
        "    else if (a) {", "    if (a) {", "    call(a);", "    x = call(a,", "    while (call(a)) {",
        "/* int main(void) { */",
    ],
    "cpp": ["class Forward;", "    throw Error(a)", "    delete find(a)"],
    "go": ["\tx := 3", "const (", "\tvar local int", "// func main() {"],
    "java": [
        "    int declared(int a);", "    return call(a) {", "    } else if (a) {", "    else if (a) {",
        "    int x = call(a);", "    new Thread(() -> {", "// class Account {",
    ],
    "csharp": ["    foreach (var x in y) {", "    var x = Call(a);", "    await Call(a) {"],
    "kotlin": ["    val local = 3", "    function(x)", "// fun main() {"],
    "swift": ["    let local = 3", "    functional()"],
    "php": ["    $f = function ($x) {", "    return total($a);", "# function f() {"],
    "css": ["a:hover {", "  color: red;"],
    "json": ['  "name": "a",', "{"],
    "ruby": ["define_method(:a) do", "  x = 3", "  A == B", "# def f"],
    "lua": ["  local inner = 3", "functional()", "-- function f()"],
    "shell": ["echo a", "if [ x = y ]; then", "# greet() {"],
    "sql": ["SELECT a FROM b;", "-- CREATE TABLE a"],
    "html": ["<div id='a'>"],
    "yaml": ["  web:", "- a: b", "a:b"],
    "toml": ["x = [1]"],
    "markdown": ["#hashtag", "text # more"],
    "dockerfile": ["FROM debian", "RUN from a as b"],
    "makefile": ["\tcc -o a: b"],
    "scala": ["  val local = 3"],
    "dart": ["    return total(a);"],
    "zig": ["    const local = 3;"],
    "haskell": ["  where x = 3"],
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
    "java": (["import java.util.List;", "import static a.B.c;", "package a.b;"], ["important();", "// import a;"]),
    "csharp": (
        ["using System;", "global using A = B.C;", "using static A;", "namespace A.B;"],
        ["using (var a = b) {", "using var a = b();", "namespace A {"],
    ),
    "kotlin": (["import a.b.*", "package a"], ["importance = 1", "    import a"]),
    "swift": (["import Foundation", "@testable import A"], ["imported()", "// import A"]),
    "php": (
        ["<?php", "use A\\B;", "namespace A;", "require_once 'a.php';", "include 'b';"],
        ["user();", "    use Loud;", "function () use ($a) {"],
    ),
    "css": (["@import 'a';", '@charset "utf-8";', "@use 'b';"], ["@media print {", "a { }"]),
    "json": ([], ['{"import": 1}']),
    "ruby": (["require 'a'", "require_relative 'b'", "include Loud"], ["required = 1", "  include Loud"]),
    "lua": (["local a = require 'b'", 'require("c")', "local a, b = require 'd'"], ["local a = b", "required()"]),
    "shell": (["source a.sh", ". ./b.sh", "set -e"], ["sources=1", "settle", "./run.sh"]),
    "sql": (["USE shop;", "set x = 1;", "\\connect a"], ["SELECT 1;", "users"]),
    "html": ([], ["<link rel=stylesheet>"]),
    "yaml": ([], ["import: a"]),
    "toml": ([], ["import = 1"]),
    "markdown": ([], ["import a"]),
    "makefile": (["include a.mk", "-include b"], ["included = 1"]),
    "scala": (["import a.b.C", "package a"], ["imports()"]),
    "dart": (["import 'a.dart';", "part of b;"], ["imported();"]),
    "perl": (["use strict;", "require a;"], ["used();"]),
    "r": (["library(dplyr)", "source('a.R')"], ["libraries <- 1"]),
    "powershell": (["Import-Module A", ". ./a.ps1"], ["Important"]),
    "julia": (["using A", "import B: c"], ["user()"]),
    "elixir": (["alias A.B", "use C"], ["used = 1"]),
    "haskell": (["import qualified Data.Map as M", "module A where"], ["imported = 1"]),
}
LINES = [(name, line, defined) for name, lines in DEFINES.items() for line, defined in lines.items()]
LINES += [(name, line, None) for name, lines in DEFINE_NOTHING.items() for line in lines]


@pytest.mark.parametrize(("name", "line", "defined"), LINES)
def test_definitions(name: str, line: str, defined: str | None) -> None:
    for text in (line, f"{line}\n", f"\n\n{line}\nx\n", f"{line}\r\n".replace("\n{", "\r\n{")):
        match = LANGUAGES[name].defines.search(text)
        assert (match and match[match.lastindex or 0]) == defined
        assert match is None or not text[: match.start()].strip("\r\n")


@pytest.mark.parametrize("name", LANGUAGES)
def test_imports(name: str) -> None:
    imports, others = IMPORTS.get(name, ([], []))
    for line in imports:
        assert LANGUAGES[name].imports.match(line), line
        assert LANGUAGES[name].imports.search(f"x\n{line}\n"), line
    for line in others:
        assert not LANGUAGES[name].imports.search(line), line


def test_the_ends_of_strings() -> None:
    ends = {"[=[": "]=]", '##"': '"##', 'r#"': '"#', '$@"': '"', "$'": "'", '"""': '"""'}
    found = {opening: end for language in LANGUAGES.values() for opening, end in language.literals}
    assert {opening: found[opening] for opening in ends} == ends


def test_no_name_means_two_languages() -> None:
    for language in LANGUAGES.values():
        assert {*language.raw} <= {*language.strings, *language.texts}
        assert language.blocks in ("braces", "brackets", "indent", "lines", "tree")
    words = {alias for name, language in LANGUAGES.items() for alias in (name, *language.aliases)}
    assert len(words) == sum(1 + len(language.aliases) for language in LANGUAGES.values()), "a name means two languages"
    files = [file for language in LANGUAGES.values() for file in (*language.endings, *language.filenames)]
    assert len(files) == len(set(files)), "a file's name means two languages"
    assert files == [file.lower() for file in files]


def test_the_examples_of_the_module_are_true() -> None:
    assert doctest.testmod(languages).failed == 0


HOSTILE = [
    "a", "a ", "a(", "(a", "((", "<", "template<", "template <> ", "::", "a::", "* ", "& ", "typedef {", "typedef ",
    "export ", "const ", "  static ", " foo(", "  a((b)", "pub(crate) ", "impl<", "impl a for ", "import ", "from ",
    "x: ", "from a import b", "# define", "\t", " ", "struct a ", "func (a) ", "enum class ", "int a(", "int a b ",
    "using a", "async ", "create table ", "fun ", "public ", "@a(b) ", "local a", "x.", "def ", "#a", "class A b",
    "--a", "unsafe ", "/*", "//", "\\", "\"", "{", "}", "=", "[", ".", "é", "\0",
]  # fmt: skip


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_line_is_expensive(name: str) -> None:
    language = LANGUAGES[name]
    for unit in HOSTILE:
        line = unit * (40_000 // len(unit))
        texts = [line, f"int {line}", f"typedef struct {{{line}"]
        for text in (*texts, "\n".join([line[:300]] * 300), "\n".join([line[:30]] * 3000)):
            started = time.thread_time()
            for pattern in (language.defines, language.imports):
                sum(1 for _ in pattern.finditer(text))
            assert time.thread_time() - started < 1, (unit, len(text))  # 40 KB; 40 times the slowest


# ----------------------------------------------------------------------------------------- guessing a language

# By a file's name.
FILENAMES = {
    "python": ["a.py", "/home/me/a.pyi", "a.pyw", "A.PY"],
    "javascript": ["a.js", "a.test.jsx", "a.mjs", "a.cjs"],
    "typescript": ["a.ts", "a.d.ts", "a.tsx", "a.mts"],
    "rust": ["src/main.rs"],
    "c": ["a.c", "a.h"],
    "cpp": ["a.cpp", "a.cc", "a.hxx"],
    "go": ["C:\\src\\a.go"],
    "java": ["src/A.java"],
    "csharp": ["Program.cs"],
    "kotlin": ["build.gradle.kts"],
    "swift": ["a.swift"],
    "php": ["index.php"],
    "ruby": ["a.rb", "/home/me/Gemfile"],
    "": ["Gemfile.lock", "dockerfiles", "a.", "go", "src.d/c", "a.py.orig"],
    "lua": ["a.lua"],
    "shell": ["run.sh", "/home/me/.bashrc"],
    "sql": ["a.SQL"],
    "html": ["index.htm"],
    "css": ["a.scss"],
    "json": ["package.json"],
    "yaml": [".github/workflows/ci.yml"],
    "toml": ["Cargo.toml"],
    "markdown": ["README.md"],
    "dockerfile": ["C:\\app\\Dockerfile", "web.dockerfile", "Containerfile"],
    "makefile": ["Makefile", "rules.mk"],
    "r": ["a.R"],
    "perl": ["a.pm"],
}  # fmt: skip
# By the text before the cursor: its shebang, what a plugin writes above it, or the fence that is open at its end.
TEXTS = {
    "python": [
        "#!/usr/bin/env python3\n", "#!/usr/bin/env python3\r\nimport os\r\n", "#! /usr/local/bin/python3.11 -u\n",
        "#!python\n", "# language: python\n", "# sum.py\ndef add(a, b):", "# license: MIT\n# language: python\n",
        "Some text\n```python\nx = 1\n",
    ],
    "typescript": [
        "#!/usr/bin/env -S deno run --allow-net\n", "#!/usr/bin/env bun\n", "// src/sum.test.ts\r\nlet x",
        "# file: x.ts\n", "~~~ts\n",
    ],
    "javascript": ["#!/usr/bin/env A=1 node\n", "# Language: JavaScript\n"],
    "shell": ["#!/opt/python/bin/bash\n", "#!/bin/sh\n"],
    "ruby": ["#!/usr/bin/env ruby\n"],
    "lua": ["#!/usr/bin/lua5.4\n"],
    "": [
        "#!/usr/bin/awk\n", "#!/usr/bin/env", "#!", "x\n#!/usr/bin/env python3\n", "# see sum.py\nx", "x\n# a.rs",
        "# language: cobol\n", "language: python\n", "```python\nx = 1\n```\n", "```\nx = 1\n", "```cobol\n",
        "a ```python\n",
    ],
    "cpp": ["// language: C++\n"],
    "go": [
        "-- filetype=go\n", "<!-- filename: a.go -->\n", "```rs\nfn f() {}\n```\nand\n```go\n", "```go\r\nx := 1\r\n",
    ],
    "rust": ["// Path: src/main.rs\nfn main() {", "# language: cobol\n# path: a.rs\n"],
    "csharp": ["```c#\n", "# language: C#\n"],
    "kotlin": ["```kotlin\n"],
    "sql": ["-- filetype=sql\n"],
    "html": ["<!-- filename: a.html -->\n"],
}  # fmt: skip
# (the file's name, the text before the cursor, the names of other files, the language)
GUESSES: list[tuple[str, str, list[str], str]] = [
    *((name, "", [], language) for language, names in FILENAMES.items() for name in names),
    *(("", text, [], language) for language, texts in TEXTS.items() for text in texts),
    ("", "", [], ""),
    ("run", "#!/usr/bin/python", [], "python"),
    ("", "import os\n\ndef g(x):\n    os.c", ["a.py"], "python"),
    ("", "import os\nos.rs", ["a.py"], "python"),
    ("", "x\n" * 300 + "# language: python\n", [], ""),
    ("", "x = 1", ["a.rs", "b.rs"], "rust"),
    ("", "x = 1", ["a.rs", "b.go", "c.go"], "go"),
    ("", "x = 1", ["README.md", "Makefile", "a.ts"], "typescript"),
    ("", "x = 1", ["README.md", "", "c"], ""),
    ("a.go", "#!/usr/bin/env python3\n", ["a.rs"], "go"),
    ("", "#!/usr/bin/env python3\n# language: go\n```rust\n", ["a.c"], "python"),
    ("", "# language: go\n```rust\n", ["a.c"], "go"),
    ("", "```rust\n", ["a.c"], "rust"),
    ("notes.md", "```rust\n", ["a.c"], "markdown"),
    ("notes.txt", "```rust\n", ["a.c"], "rust"),
    ("", "x = 1", ["a.json", "b.yml", "README.md", "Dockerfile"], ""),
    ("", "x = 1", ["a.json", "b.json", "c.rb"], "ruby"),
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
