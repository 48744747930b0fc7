"""The table of languages: which lines import, define or comment. And which language a text is in
whose client does not say so.
"""

from __future__ import annotations

import pytest
from test_ending import cases

from cerebrum.text.languages import LANGUAGES, guess_language
from cerebrum.text.scanner import scanner_of

# A language's lines, with the name that they define between « and »; the others define nothing. ⇥
# stands for a tab, ⏎ for a line end.
LINES = r"""
=== python
def «f»(n):
    async def «fetch»(self):
class «Stack»(Generic[T]):
⇥def «tabbed»(self):
«LIMIT» = 3
«names»: dict[str, int] = {}
type «Pair» = tuple[int, int]
«café» = 1
«define» = 1
    local = 3
a == b
a.b = c
f(x=1)
return x
# def f():
classify(x)
=== javascript
function «add»(a, b) {
  function «inner»() {
async function «load»() {
function* «items»() {
function *«items»() {
export default class «Cart» extends Base {
export default function «App»() {
export const «add» = (a, b) => a + b
const «$» = require('jquery')
let «count» = 0
  «render»() {
  async #«load»(url, { retry = 3 } = {}) {
  static «of»(...items) {
  get «size»() {
  const local = 1
  *[Symbol.iterator]() {
  if (a) {
  while (next()) {
  it('works', () => {
  foo(function () {
functional()
// function add() {
=== typescript
export interface «Bill» {
type «Id» = string | number
export const enum «Color» {
enum «Color» {
export abstract class «Shape» {
declare function «load»(url: string): Promise<void>
  private async «load»<T>(url: string): Promise<T> {
  protected override «area»(): number {
namespace «Shop» {
declare module 'x' {
=== rust
fn «main»() {
pub(crate) async fn «load»(url: &str) -> Result<()> {
pub unsafe extern "C" fn «call»() {
    const fn «zero»() -> u8 {
pub struct «Bill»<'a> {
enum «Color» {
pub trait «Shape»: Sized {
type «Id» = u64;
const «LIMIT»: usize = 3;
static mut «COUNT»: u8 = 0;
macro_rules! «square» {
mod «tests» {
impl «Bill» {
impl<'a, T: Into<u8>> From<T> for «Bill»<'a> {
impl fmt::Display for shop::«Bill» {
    let x = 3;
// fn main() {
fnord(x);
=== c
#define «MAX»(a, b) ((a) > (b))
#  define «LIMIT» 3
int «main»(void) {
static inline const char *«name_of»(struct bill *b)
struct «bill» {
struct «bill»
typedef struct «node» {
typedef struct {⏎    long net;⏎} «bill_t»;
typedef unsigned long «word_t»;
enum «color» { RED, GREEN };
union «value» {
«add_up»(long a, long b)⏎{
int «one»(void) { return 1; }
int declared(int a);
struct bill *pointer;
struct bill value = {0};
    return call(a, b)
    else if (a) {
    if (a) {
    call(a);
    x = call(a,
    while (call(a)) {
/* int main(void) { */
=== cpp
class «Bill» : public Item {
template <typename T> class «Stack» {
template <typename T, template <class> class C> struct «Box» {
enum class «Color» {
namespace «shop» {
namespace «shop»
using «Id» = std::uint64_t;
std::vector<std::pair<int, int>> «pairs_of»(const Bill& b) {
void Bill::«add»(Item item) {
Bill::«Bill»(long net) : net_(net) {
Bill::«~Bill»() {
    virtual «~Bill»() {
    int «size»() const noexcept {
constexpr auto «twice»(auto x) -> decltype(x) {
class Forward;
    throw Error(a)
    delete find(a)
=== go
func «main»() {
func (b *Bill) «Total»() int {
func «Map»[T any](items []T) []T {
type «Bill» struct {
type «ID» = uint64
var «ErrGone» = errors.New("gone")
const «Limit» = 3
⇥x := 3
const (
⇥var local int
// func main() {
=== java
public class «Account» extends Base<String> {
public final class «Bill»
interface «Shape» permits Circle {
public enum «Color» {
record «Point»(int x, int y) {
@SuppressWarnings("x") class «Loud» {
    public static Map<String, List<Integer>> «of»(int a) {
    private static <T extends Comparable<T>> T «max»(List<T> items) {
    public «Account»(String owner) {
    @Override public int «size»() {
    int declared(int a);
    return call(a) {
    } else if (a) {
    else if (a) {
    int x = call(a);
    new Thread(() -> {
// class Account {
=== csharp
public sealed class «Bill» : Item
public record struct «Point»(int X, int Y);
struct «Pair» {
    public async Task<int> «LoadAsync»(string url)
    public int «Twice»(int x) => 2 * x;
    public string «Name» { get; set; }
    public int «Total» => lines.Sum();
    foreach (var x in y) {
    var x = Call(a);
    await Call(a) {
=== shell
«greet»() {
function «greet» {
  «inner» () {
export «PATH»=/bin
«LIMIT»=3
readonly «NAME»=x
echo a
if [ x = y ]; then
# greet() {
=== kotlin
data class «Point»(val x: Int, val y: Int)
sealed interface «Shape» {
object «Registry» {
typealias «Id» = Long
    override suspend fun «load»(url: String): Int {
fun <T> List<T>.«second»(): T = this[1]
const val «LIMIT» = 3
    val local = 3
    function(x)
// fun main() {
=== swift
public final class «Account»: Base {
struct «Point»<T> {
extension «Account»: Equatable {
    class func «shared»() -> Account {
    @discardableResult func «add»(_ x: Int) -> Int {
let «limit» = 3
    let local = 3
    functional()
=== scala
final case class «Point»(x: Int)
  def «f»[A](a: A): A = {
val «limit» = 3
  val local = 3
=== dart
abstract class «Shape» {
  Future<int> «load»(String url) async {
    return total(a);
=== php
final class «Bill» extends Item
abstract class «Shape» {
trait «Loud» {
function &«total»(array $lines): int {
    public static function «of»(int $a): self
    $f = function ($x) {
    return total($a);
# function f() {
=== perl
sub «total» {
our %«rates» = (
=== r
«total» <- function(x) {
«limit» = 3
=== zig
pub fn «main»() !void {
const «Point» = struct {
    const local = 3;
=== powershell
function «Total»($x) {
class «Bill» {
=== css
.«menu» > li {
#«top»:hover {
@mixin «wide»($x) {
  «--accent»: red;
«$width»: 3px;
a:hover {
  color: red;
=== json
  "name": "a",
{
=== ruby
def «balance»
  def self.«of»(a)
class Shop::«Bill» < Item
module «Shop»
«LIMIT» = 3
define_method(:a) do
  x = 3
  A == B
# def f
=== lua
function M.«f»(a)
local function «g»()
function Account:«close»()
M.«h» = function(a)
local «limit» = 3
  local inner = 3
functional()
-- function f()
=== julia
function «total»(x)
mutable struct «Bill»
const «LIMIT» = 3
=== elixir
defmodule Shop.«Bill» do
  def «total»(x) do
  defp «rate»(x) do
=== haskell
data «Shape» = Circle
«total» :: Int -> Int
  where x = 3
=== sql
CREATE TABLE «bills» (
create or replace function shop.«total»(x int)
CREATE UNIQUE INDEX IF NOT EXISTS "«by» name" ON a (b);
CREATE TEMPORARY VIEW `«v»` AS
SELECT a FROM b;
-- CREATE TABLE a
=== html
<div id='a'>
=== yaml
«services»:
«on»: push
  web:
- a: b
a:b
=== toml
[«tool.ruff»]
[[«models»]]
x = [1]
=== markdown
## «Deploy it»
#hashtag
text # more
=== dockerfile
FROM golang:1 AS «build»
ARG «VERSION»=3
ENV «PATH» /bin
FROM debian
RUN from a as b
=== makefile
«build/%.o»: %.c
«CFLAGS» += -O2
⇥cc -o a: b
"""
# Lines that import begin with «.
IMPORTS = r"""
=== javascript
«import fs from 'fs'
«import {
«import 'x.css'
«const a = require('a')
«export * from './b'
import('x').then(f)
import.meta.url
important()
const a = b
export const a = 1
// import a
=== typescript
«import type { A } from './a'
«import A = require('a')
export interface From {
=== rust
«use std::fmt;
«pub use a::b;
«pub(crate) use a::{
«extern crate serde;
«mod tests;
«pub mod a;
mod tests {
user(x);
    use super::*;
// use a;
=== c
«#include <stdio.h>
«#  include "a.h"
«#import <a.h>
#define include 1
// #include <a.h>
include(a);
#ifdef A
=== cpp
«using namespace std;
«using std::vector;
«import std;
using Id = int;
using_it(a);
=== go
«import "fmt"
«import (
«package main
«import f "x"
⇥x = "a"
imported := 1
packages()
=== java
«import java.util.List;
«import static a.B.c;
«package a.b;
important();
// import a;
=== csharp
«using System;
«global using A = B.C;
«using static A;
«namespace A.B;
using (var a = b) {
using var a = b();
namespace A {
=== kotlin
«import a.b.*
«package a
importance = 1
    import a
=== swift
«import Foundation
«@testable import A
imported()
// import A
=== php
«<?php
«use A\B;
«namespace A;
«require_once 'a.php';
«include 'b';
user();
    use Loud;
function () use ($a) {
=== css
«@import 'a';
«@charset "utf-8";
«@use 'b';
@media print {
a { }
=== scala
«import a.b.C
«package a
imports()
=== dart
«import 'a.dart';
«part of b;
imported();
=== perl
«use strict;
«require a;
used();
=== r
«library(dplyr)
«source('a.R')
libraries <- 1
=== powershell
«Import-Module A
«. ./a.ps1
Important
"""


def lines_of(table: str) -> list[str]:
    lines = table.replace("⇥", "\t").split("\n")
    return [line.replace("⏎", "\n") for line in lines]


@pytest.mark.parametrize(("name", "table"), cases(LINES))
def test_definitions(name, table):
    for case in lines_of(table):
        before, *marked = case.replace("»", "«").split("«")
        defined = marked[0] if marked else None
        line = before + "".join(marked)
        windows = f"{line}\r\n".replace("\n{", "\r\n{")
        for text in (line, f"{line}\n", f"\n\n{line}\nx\n", windows):
            match = LANGUAGES[name].defines.search(text)
            assert (match and match[match.lastindex or 0]) == defined, line
            assert match is None or not text[: match.start()].strip("\r\n"), line


@pytest.mark.parametrize(("name", "table"), cases(IMPORTS))
def test_imports(name, table):
    pattern = LANGUAGES[name].imports
    for case in lines_of(table):
        line, imports = case.removeprefix("«"), case.startswith("«")
        assert bool(pattern.match(line)) == imports, line
        assert bool(pattern.match(f"\ufeff{line}")) == imports, line  # at the start of a file
        assert bool(pattern.search(f"x\n{line}\n")) == imports, line


ENDS = {"[=[": "]=]", '##"': '"##', 'r#"': '"#', '$@"': '"', "$'": "'", '"""': '"""'}


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_comment_behind_code_changes_nothing(name):
    language = LANGUAGES[name]
    for code in ("x = 1", "x = 1;", "f() {"):
        alone = scanner_of(language, f"{code} \n")
        for opening, closing in language.comments:
            scanner = scanner_of(language, f"{code} {opening} why{closing.strip()}\n")
            assert (scanner.head.split(), scanner.last) == (alone.head.split(), alone.last), opening


def test_the_ends_of_strings():
    found = {}
    for language in LANGUAGES.values():
        found |= dict(language.literals)
    assert found | ENDS == found


def test_no_name_means_two_languages():
    assert dict(cases(LINES)).keys() == LANGUAGES.keys()
    words, files = [*LANGUAGES], list[str]()
    for language in LANGUAGES.values():
        assert language.blocks in ("braces", "brackets", "statements", "indent", "lines", "tree")
        words += language.aliases.split()
        files += f"{language.endings} {language.filenames}".split()
    for names in (words, files):
        assert sorted(names) == sorted({name.lower() for name in names})


# ------------------------------------------------------------------------------ guessing a language

# A language's files.
FILENAMES = r"""
python: a.py /home/me/a.pyi a.pyw A.PY a.ipynb
javascript: a.js a.test.jsx a.mjs a.cjs
typescript: a.ts a.d.ts a.tsx a.mts
rust: src/main.rs
c: a.c a.h
cpp: a.cpp a.cc a.hxx a.cu a.ipp
go: C:\src\a.go
java: src/A.java
csharp: Program.cs
kotlin: build.gradle.kts
swift: a.swift
php: index.php
ruby: a.rb /home/me/Gemfile Vagrantfile
none: Gemfile.lock dockerfiles a. go src.d/c a.py.orig
lua: a.lua
shell: run.sh /home/me/.bashrc .zprofile
sql: a.SQL
html: index.htm
css: a.scss
json: package.json
yaml: .github/workflows/ci.yml
toml: Cargo.toml
markdown: README.md
dockerfile: C:\app\Dockerfile web.dockerfile Containerfile Dockerfile.dev
makefile: Makefile rules.mk
r: a.R
perl: a.pm
"""
# By the text before the cursor: its shebang, what a plugin writes above it, or the fence that is
# open at its end.
TEXTS = """
=== python
#!/usr/bin/env python3

=== python
#!/usr/bin/env -S uv run --script

=== python
#! /usr/local/bin/python3.11 -u

=== python
#!python

=== python
# language: python

=== python
# sum.py
def add(a, b):
=== python
# license: MIT
# language: python

=== python
Some text
```python
x = 1

=== typescript
#!/usr/bin/env -S deno run --allow-net

=== typescript
#!/usr/bin/env bun

=== typescript
#!/usr/bin/env ts-node

=== typescript
# file: x.ts

=== typescript
~~~ts

=== javascript
#!/usr/bin/env A=1 node

=== javascript
#!/usr/bin/env nodejs

=== javascript
# Language: JavaScript

=== shell
#!/opt/python/bin/bash

=== shell
#!/bin/sh

=== shell
#!/bin/ash

=== ruby
#!/usr/bin/env ruby

=== lua
#!/usr/bin/lua5.4

=== lua
#!/usr/bin/luajit

=== none
#!/usr/bin/awk

=== none
#!/usr/bin/env
=== none
#!
=== none
x
#!/usr/bin/env python3

=== none
# see sum.py
x
=== none
x
# a.rs
=== none
# language: cobol

=== none
language: python

=== none
```python
x = 1
```

=== none
```
x = 1

=== none
```cobol

=== none
a ```python

=== cpp
// language: C++

=== go
-- filetype=go

=== go
<!-- filename: a.go -->

=== go
```rs
fn f() {}
```
and
```go

=== rust
// Path: src/main.rs
fn main() {
=== rust
# language: cobol
# path: a.rs

=== csharp
```c#

=== csharp
# language: C#

=== kotlin
```kotlin

=== sql
-- filetype=sql

=== html
<!-- filename: a.html -->

"""
# The file's name, the text before the cursor, the names of other files, the language.
ROWS = """
run      | #!/usr/bin/python                                |                       | python
         | import os⏎⏎def g(x):⏎    os.c                    | a.py                  | python
         | import os⏎os.rs                                  | a.py                  | python
         | x = 1                                            | a.rs b.rs             | rust
         | x = 1                                            | a.rs b.go c.go        | go
         | x = 1                                            | README.md Makefile a.ts | typescript
a.go     | #!/usr/bin/env python3⏎                          | a.rs                  | go
         | #!/usr/bin/env python3⏎# language: go⏎```rust⏎   | a.c                   | python
         | # language: go⏎```rust⏎                          | a.c                   | go
         | ```rust⏎                                         | a.c                   | rust
notes.md | ```rust⏎                                         | a.c                   | markdown
         | x = 1                                            | a.json b.json c.rb    | ruby
"""
GUESSES = [
    ("", "", [], ""),
    ("", "x\n" * 300 + "# language: python\n", [], ""),
    ("", "x = 1", ["README.md", "", "c"], ""),
    ("", "#!/usr/bin/env python3\r\nimport os\r\n", [], "python"),
    ("", "// src/sum.test.ts\r\nlet x", [], "typescript"),
    ("", "```go\r\nx := 1\r\n", [], "go"),
]
for line in lines_of(ROWS.strip("\n")):
    name, text, others, language = (cell.strip(" ") for cell in line.split("|"))
    GUESSES.append((name, text, others.split(), language))
for line in lines_of(FILENAMES.strip()):
    language, _, names = line.partition(":")
    GUESSES += [(name, "", [], language.replace("none", "")) for name in names.split()]
GUESSES += [("", text, [], language.replace("none", "")) for language, text in cases(TEXTS)]


@pytest.mark.parametrize(("filename", "text", "others", "language"), GUESSES, ids=str)
def test_guesses(filename, text, others, language):
    assert guess_language(filename, text, others) == language
