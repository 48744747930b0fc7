"""Where completions end in the languages after the first seven, and in real files of all, cut at
random places.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import SOURCES, Peer, fetch_sources, files_of
from test_ending import cases, check, check_case, title

from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES
from cerebrum.text.prompt import prepare

# As in test_ending.py: the prompt up to «, the part to keep up to », what the model writes behind
# it, and for an infill the suffix after ‖.
CRLF = "sql block: CRLF", "SELECT a\r\n«FROM b;\r\n»\r\nSELECT 2;\r\n"
TEXTS = r'''
=== java block: a member of a record
record Point(int x, int y) {
  double size() {
«    return x + y;
  }
»
  int z() {}
=== java end: an infill
class A {
    int twice(int x) {
        return «2 * x;»
    }
}‖
    }
}
=== C# block: another name
class A {
  int F() {
«    return 1;
  }
»
  int G
=== kotlin block: a method
class A(val b: String) : Base() {
  fun f(): Int {
«    return xs.sumOf { it.net }
  }
»
  fun g() {}
=== kotlin block: when
fun f(x: Int) = when (x) {
«  1 -> "one"
  else -> {
    "many"
  }
}
»
fun g() {}
=== kotlin block: a chain
fun f() {}

val names = users
«  .map { it.name }
  .sorted()
»
fun g() {}
=== swift block: members
struct A: Codable {
  let id: Int
«  let name: String

  enum Keys: String {
    case id
  }
}
»
func f() {}
=== php block: without its opening tag
function f($x) {
«    return $x + 1;
}
»
echo f(1);
=== ruby block: a definition in one line
class A
  def a = 1
  def b(x) = x

  def c
«    3
  end
»
  def d
=== ruby block: a script ends at a blank line
# print it
«each("a.txt") do |line|

  puts line
end
»
puts "done"
=== ruby block: describe
describe Account do
  it "adds" do
«    expect(2).to eq(2)
  end
»
  it "fails" do
=== ruby end: an infill
def twice(x)
  «2 * x»
end
puts‖
end
puts twice(2)
=== lua block: an argument
describe("f", function()
  it("works", function()
«    assert(f)
  end)
end)
»
describe("g", function()
=== shell block: a script ends at a blank line
# count lines
«wc -l -- *.txt |
    sort -n
»
echo ready
=== sql block: a table
CREATE TABLE bills (
«  id integer,
  note text DEFAULT ';'
);
»
CREATE TABLE more (
=== sql block: a statement up to a blank line
SELECT «name, CASE WHEN total > 100 THEN 'a;b' ELSE 'it''s' END
FROM customers -- it's
ORDER BY total;
»
SELECT 1;
=== html block: the innermost element
<body>
  <ul class="it's">
    <li>One</li>
«    <li>It's two <br> or <b>more</b></li>
    <!-- </ul> -->
  </ul>
»  <p>Next</p>
=== html end: an infill
<table>
  <tr>
«    <td>a</td>
»  </tr>
  <tr>‖  </tr>
  <tr>
    <td>x</td>
=== css block: a rule
p { margin: 0; }
.menu > li {
«  color: red; /* } */
  background: url(https://a.org/a;b.png) "}";
}
»
.menu { }
=== css block: the first rule
/* links that were visited */
«a:visited {
  color: purple;
}
»
b { }
=== json end: an infill of an array
{
  "a": [
«    1,
    2
»  ],
  "z": 2
}‖  ],
  "b": 2
}
=== json end: an infill
{
  "a": «1,
  "b": 2»,
  "c": 3‖,
  "c": 3
}
=== yaml block: the innermost mapping
services:
  web:
    image: nginx
«    ports:
      - "80:80"
    command: echo it's "fine" # don't
»  db:
    image: postgres
=== yaml block: a text in a block
jobs:
  test:
    steps:
«      - run: |
          if true; then

          echo "it's
          fi
        env: {A: "b: c"}
      - name: two
»  more: 1
=== yaml block: up to the next document
a:
«  b: 1
»---
c: 1
=== yaml block: top level ends at a blank line
version: 3
«name: test
on: [push, "pull
  request"]
»
jobs:
=== dockerfile block: up to a blank line
FROM debian:13
«RUN apt-get update && \
    # it's a comment

    apt-get install -y curl "a b" && \
    echo 'don'
»
CMD ["a"]
=== markdown block: a paragraph
# Use
«It runs
by `make`.
»
## More
=== toml block: a table
[package]
«version = "0.1"
text = """
[x]

it's"""
»
[dependencies]
=== makefile block: a recipe
all: a b
«	cc -o it's a.c
»
clean:
=== scala block: a method
class Bill(val net: Int) {
  def total() = {
«    s"${net} }"
  }
»
  def close() = {}
=== scala block: a body below =
def f(x: Int): Int =
«  val y = g('{', '"', 'a)

  y * 2
end f
»
def h(x: Int) = 1

=== scala block: behind =
object X:
  def f: Int = «1
»
  def g = 2

=== scala block: branches of a script
if x then
«  g()

  h()
else if y then
  k()
else
  z
»
h(1)

=== scala block: an object
object X:
«  val y = 1

  def f(x: Int) =
    y
»
object Y:
  val z = 1

=== scala block: cases
def f(x: Int): String = x match
«  case 1 => "a"
  case _ =>
    try g()
    finally h()
»
def z = 1

=== scala block: the outer function
object A:
  private[a] def f(y: Int): Int =
    def go(z: Int) =
«      z
    go(y)
»
  def g = 1

=== scala block: a signature
def f(
«    x: Int,
    y: Int
): Int =
  x + y
»
def g = 1

=== scala block: an extension
extension (x: Int)
«  def f = x

  def g =
    1
»
@main def h() = 2

=== scala block: an argument below a colon
def f(xs: Xs) =
«  xs.map: x =>
    x + 1
  .filter(
    _ > 1

  )
»
def g = 1

=== scala block: a body without braces in braces
class A {
  def f(y: Int): Int =
«    val z = y
    z + y
»
  def g = {
    1
  }
}

=== scala block: a body in braces without braces around
object A:
  def f(y: Int) = {
«    if (y > 1) {
      1
    } else {
      2
    }
  }
»
  def g = 1

=== scala block: else below a brace
class A {
  val x = if (a) {
«    1
  }
  else {
    2
  }
»
  def g = 1
}

=== scala block: braces on lines of their own
class A
{
  def f(): Int =
«  {
    1
  }
»
  def g = 1
}

=== scala block: the first definition
import a.b
«
object X:
  def f = 1
»
object Y:

=== scala block: a member
object A:
  /** Sum. */
«  def f(x: Int): Int =
    val y = 1

    y
»
  def g = 1

=== scala block: a helper
def f(x: Int) =
«  h(x)

def h(x: Int) =
  2
»
def g = 1

=== dart block: a method
class Bill {
  int total(int net) {
«    return """it's }""".length;
  }
»
  int other() {}
=== perl block: code
sub total {
«    my ($net) = @_;
    return "it's }" if $net;
}
»
sub other {
=== r block: a function
total <- function(net) {
«  if (net > 0) {
    "it's }" # }
  }
}
»
other <- 1
=== zig block: a function of a type
const Bill = struct {
    fn total(net: u8) u8 {
«        const a =
            \\ it's "}
        ;
        return '}';
    }
»
    fn other() void {}
=== powershell block: code
function Total($net) {
«    <# it's } #>
    if ($net) { 'C:\' }
}
»
Total 1
=== powershell block: backticks and here-strings
function F {
«  $a = "C:\Temp\"
  $b = "`"}" + @"
it's "x" } "@
"@
  $c = @'
"} `
'@
}
»
F

=== powershell block: a line that goes on
$a = «Get-Item `
  -Path b
»$c = 1

=== dockerfile block: in a here-document
FROM a
RUN <<EOF
«b

c
EOF
»
CMD d

=== julia block: code
function f(net)
«  #= it's
  end =#
  for x in net
    y = x'
  end
end
»
other()
=== elixir block: code
defmodule A do
  def f(x) do
«    if x, do: "it's", else: 'b'
  end
»
  def other do
=== haskell block: equations
f :: Int -> Int
«f n
  | n > 0 = f' 'a'
  | otherwise = 0 {- it's -}
»
other = 1
=== java block: a method
/**
 * A class of the bank's.
 */
public class Account {
    public int balance(char c) {
«        if (c == '"' || c == '\'' || c == '}') {
            g(); // "}" is no brace
        } catch (Exception e) {
            h();
        }
        return """
            a }
            """;
    }
»
    public void close() {
=== csharp block: a method
namespace Shop
{
    #region it's here
    [Serializable]
    public class Bill
    {
        public string Name()
        {
«            var a = @"C: ""} ";
            var b = $"{a}: {(a.Length > 3 ? "}" : "{")}";
            var c = $@"{b} "" }
";
            return """"
                """ }
                """";
        }
»        #endregion
=== swift block: a method of an extension
extension Account {
    func total() -> Int {
«        let a = ##"a "# }"##
        /* x /* y */ " } */
        guard let lines = lines else { return 0 }
        return lines.reduce(0) { $0 + $1.net }
    }
»
    func close() {}
=== php block: a method behind a comment and an attribute
<?php
/** A bill's lines. */
#[Entity]
final class Bill
{
    public function total(): int
    {
«        # it's the sum
        $b = "{$a['x']} it's }
        more }";
        return array_sum(array_map(fn($line) => $line->net, $this->lines));
    }
»
    public function pay(): void {}
=== ruby block: blocks and modifiers
def f(xs)
  begin
«    xs.each do |x|
      puts x unless x.nil?
      while x > 0 do
        x -= 1
      end
      y = if x then 1 else 2 end
    end
  rescue Error => e
    h
  ensure
    i
  end
  nil
end
»
f([1])
=== ruby block: keywords in strings, symbols, keys, comments and here-documents
=begin
def f
=end
def g
«  a = { if: 1, end: 2 }
  b = "end #{a.map { |k, v| "#{k} end" }.join(" ")} it's"
  c = :end
  e = 'end'
  sql = <<~SQL
    end
    don't "
  SQL
  1 << B
end
»
f
=== lua block: a function
local M = {}
function M.f(a)
«  if a then
    for i = 1, 3 do print("end", 'end') end
  elseif b then
    repeat a = a - 1 until a == 0
  end
  --[[
end ]]
  -- don't end
  local s = [[
end "]] .. [==[ ]] end ]==]
  return function() return s, #s end
end
»
return M
=== shell block: a function
greet() {
«    if [[ -n $1 && $x =~ ^[{]$ ]]; then
        echo "It's ${1:-"}"} $(date "+%F }") fi"
    fi
    for name in "$@"; do echo done; done
    case $1 in
        a | b) echo "esac" ;;
        *) return 1 ;;
    esac
    git log --oneline done-file
    echo if then fi 'C:'
    echo "${x:-it's}" \{ \( \) \{
    a=(if then fi)
    echo "$x" done
}
»
# what follows
greet
=== shell block: here-documents
usage() {
«    cat <<EOF
Usage: don't }
EOF
    cat <<-'END' | sed 's/a/b/'
	}
	END
    read -r a <<< "x
}"
    echo $((1 << 2)) "$#" # it's }
}
»
usage
=== sql block: an UPDATE whose WHERE is not indented
UPDATE users SET
«    active = false

WHERE id = 7;
»
SELECT 1;
=== sql block: a delete, with semicolons in comments and strings
delete from users
«using a

where x = ';' -- a; it's b
  /* c; */ and y = 'C:' and z in (

1);
»select 1;
=== sql block: a DELETE behind WITH
WITH old AS (SELECT id FROM a)
«
DELETE FROM b

WHERE id IN (SELECT id FROM old);
»
SELECT 1;
=== sql block: clauses in column 0, and a CASE
SELECT
«    ARRAY[CASE WHEN begin_at > end_date THEN 'a' END], (CASE
        WHEN t.end > 3 THEN 1
    END) AS b, CASE x WHEN 1 THEN 2 END/100
FROM c
JOIN d ON c.x = d.x
WHERE (
    a
)
AND b
ORDER BY 1
;
»
SELECT 1;
=== sql block: the statement behind common tables
WITH a AS (
«    SELECT 1
    WHERE 2 IN (SELECT 3)
),

b AS (
    SELECT 2
)

SELECT * FROM a, b;
»
SELECT 1;
=== sql block: a SELECT for an INSERT
INSERT INTO a (b, c)
«
SELECT b, c

FROM d
UNION ALL

SELECT e, f FROM g
ON CONFLICT DO UPDATE SET x = 1

WHERE y;
»
SELECT 1;
=== sql block: a whole function
CREATE FUNCTION f(a int)
«RETURNS int

LANGUAGE plpgsql

AS $fn$
DECLARE
    x text := 'C:\';
BEGIN
    x := $a$it's; $$;$a$;

    RETURN x;
END;
$fn$;
»
SELECT 1;
=== sql block: a function, from within its body and indentation again
CREATE FUNCTION f() RETURNS trigger AS $body$
BEGIN
    x := 1;
    «    NEW.a = $$x$$;

    RETURN NEW;
END;
$body$ LANGUAGE plpgsql;
»
SELECT 1;
=== sql block: a trigger
create trigger t
«after insert or update on a for each row begin
  update b set c = 1 where d = new.e;

  select case when a then 1 end;
end;
»
select 1;
=== sql block: a procedure of Oracle
CREATE OR REPLACE PROCEDURE p IS
BEGIN
«  CASE a WHEN 1 THEN q; END CASE;
END p;
»/
=== sql block: a transaction is no block
BEGIN;
«BEGIN TRANSACTION;
»COMMIT;
=== sql block: columns with the names of blocks
CREATE TABLE e (
«  begin timestamp,
  end timestamp
);
»SELECT begin, end FROM e;
=== sql block: a blank line first
SELECT a
FROM b
«
SELECT c
FROM d;
»SELECT 3;
=== shell block: a here-document whose name has a dash
f() {
  cat <<END-OF
}
END-OF
«  return 1
}
»
g() {
=== ruby block: a class << self without a space
class A
  class <<self
    def f
«      1
    end
»
    def g
=== sql block: a transaction of a kind opens no block
BEGIN IMMEDIATE;
UPDATE a SET b = 1
«WHERE c = 2;
»
SELECT 1;
=== perl block: elsif on a line of its own
sub f {
  return 1;
}

if ($a) {
«  f(1);
}
elsif ($b) {
  f(2);
}
»
f(3);
=== powershell block: a function without parentheses that it calls
function Get-All {
«  foo(1)
}

function foo {
  param($x)
  $x
}
»
function bar {
'''.replace(
    "INSERTS",
    "".join(f"  INSERT INTO log VALUES ({n}, 'the note with number {n}');\n" for n in range(12)),
)
# A model that runs on with the suffix.
GAPS = r"""
=== python stop: gap 1
def f(x):
«    if x:
        return 1
    y = 2
»    return y
‖    return y

=== java stop: gap 1
class A {
  int f(int x) {
«    // return 2 x
    int y = x * 2;
»    return y;
  }
}
‖    return y;
  }
}

=== kotlin stop: gap 1
fun f(x: Int): Int {
«    if (x < 0) return 0
    val y = x * 2
»    return y
}
‖    return y
}

=== shell stop: gap 1
f() {
«    if [ -z "$1" ]; then
        return 1
    fi
    y=2
»    return 0
}
‖    return 0
}

=== ruby stop: gap 1
def index
«  respond_to do |format|
    format.html
»    format.json { a }
  end
end
‖    format.json { a }
  end
end

=== yaml stop: gap 1
steps:
«      - uses: checkout
      - name: Set up
»        uses: setup
‖        uses: setup

=== java stop: gap 2
class A {
  void f() {
«    if (x) {
      throw e;
    }
    y = 2;
»    print(y);
  }
‖    print(y);
  }

=== ruby stop: gap 2
def f(x)
«  unless x
    a
  end
  y = 2
»  puts y
end
‖  puts y
end

=== javascript stop: gap 1
function f(x) {
«  if (x) {
    a()
  }
  else {
    b()
  }
  let y = 2
»  print(y)
}
‖  print(y)
}

=== python stop: gap 2
def f(x):
«    for a in x:
        b(a)
    else:
        c()
    y = 2
»    print(y)
‖    print(y)

=== css stop: gap 1
.a {
  color: red;
}

«.b {
  color: blue;
}
.c {
  margin: 0;
}
».d {
  margin: 1px;
}
‖.d {
  margin: 1px;
}

=== json stop: gap 1
{
«  "name": "app",
  "version": "1",
»  "versions": []
}
‖  "versions": []
}

=== ruby stop: gap 3
def a
  xs.each «do |x|
    puts x
  end»
  y
end
‖
  y
end

=== swift stop: gap 1
func f() {
    items.forEach { item in
«        print(item)
    }
»    done()
}
‖    done()
}

=== shell stop: gap 2
f() {
    if [ -n «"$1" ]; then
        echo 1
    fi»
    echo 2
}
‖
    echo 2
}

=== lua stop: gap 1
function f(t)
  if check(«t) then
    a()
  end»
  b()
end
‖
  b()
end

=== java stop: gap 3
void f() {
«  var names = users.stream()
    .filter(u -> u.age > 18)
    .toList();
»  f(names);
‖  f(names);

=== dockerfile stop: gap 1
FROM a
RUN apt-get update «&& \
    apt-get install -y curl»

CMD ["x"]
‖

CMD ["x"]

=== java stop: gap 4
void f() {
  if (x == null) {
    throw new Illeg«alArgumentException();
  }»
  h();
}
‖
  h();
}

=== cpp stop: gap 1
namespace a {
void f() {
    g(«1);
}»
void h() {
}
}
‖
void h() {
}
}

=== javascript stop: gap 2
switch (x) {
  case 1:
    a(«1);»
  case 2:
    b();
}
‖
  case 2:
    b();
}

=== scala stop: gap 1
object A:
  def f(x: Expr[Int]) =
«    '{ $x + g(1) }

  def g(x: Int) =
    h(1)
»  val y = 1
‖  val y = 1

=== c stop: gap 1
int f() {
  if (z) {
«#if A
  if (a) {
#else
  if (b) {
#endif
    g(1);
  }
»  h(1);
  }
}
‖  h(1);
  }
}

=== markdown stop: gap 1
# A

«First paragraph here.

Second one here.

»## B

Text
‖## B

Text

"""


@pytest.mark.parametrize("case", [CRLF, *cases(TEXTS), *cases(GAPS)], ids=title)
def test_ends(case):
    check_case(case)


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_instruction_about_each_language(language):
    """Its answer is code alone, in any language, even between fences of shells."""
    asked = {"language": language, "prompt": "x\n", "instruction": "y"}
    question, begun = prepare(asked, "instruct", 1000).body["messages"]
    assert question["content"] == f"y\n\n```{language}\nx\n```"
    assert begun["content"] == f"```{language}\n"
    before = f"Here:\n```{language}\n"
    chat = "instruct", language, "", "", "auto"
    # A bare fence may open a block of Markdown's own.
    reason = None if language == "markdown" else "stop"
    check(chat, f"{before}x\n```\n", ("x\n", reason), len(before))


def test_an_instruction_about_a_text_with_fences():
    """Its answer does not end at the first of them."""
    text = "# Use\n\n```\nmake run\n```\n\nThe `x` is below.\n\n```\nx\n```\nEnd.\n"
    asked = {"language": "markdown", "prompt": text, "instruction": "y"}
    question, begun = prepare(asked, "instruct", 1000).body["messages"]
    assert question["content"] == f"y\n\n````markdown\n{text}````"
    chat = "instruct", "markdown", begun["content"], "", "auto"
    check(chat, f"{text}````\nThat is it.", (text, "stop"))


# --------------------------------------------------------------------------------------- real files

FILES, CUTS = 40, 10
MAX_FILE_BYTES = 60_000
REST_CHARS = 6000  # that a model would write behind a cut


def cuts(
    files: list[Path], language: str, chance: random.Random
) -> Iterator[tuple[Path, str, int, Peer]]:
    """(path, text, place to cut it, what pygments says of the text) for some of the files."""
    chosen = 0
    for path in chance.sample(files, len(files)):
        text = path.read_text("utf-8", "replace").replace("\r\n", "\n")
        peer = Peer(language, text)
        if "\r" in text or not peer.sure or (language == "sql" and "`" in text):
            continue
        for _ in range(CUTS):
            place = chance.randrange(len(text))
            line = text.rfind("\n", 0, place) + 1
            # Indentation that is typed already is not sent again, so the end would be elsewhere.
            if not text[line:place].strip():
                place = line
            yield path, text, place, peer
        chosen += 1
        if chosen == FILES:
            return


# The languages that models.toml lists; the others are tried nightly.
OFTEN = ("python", "javascript", "typescript", "rust", "c", "cpp", "go")


SELDOM = [pytest.param(name, marks=pytest.mark.nightly) for name in LANGUAGES if name not in OFTEN]


@pytest.mark.slow
@pytest.mark.parametrize("language", [*OFTEN, *SELDOM])
def test_real_files(language):
    """Cut at random places, with the rest of the file as what a model writes: no end is inside a
    string or comment.
    """
    if reason := fetch_sources():
        pytest.skip(reason)
    files = files_of([str(SOURCES)], language, 200, MAX_FILE_BYTES)
    if len(files) < 5:
        pytest.skip(f"only {len(files)} files of {language} in the sources that could be fetched")
    ends = 0
    wrong = []
    for path, text, place, peer in cuts(files, language, random.Random(language)):
        ending = Ending("complete", language, text[:place], None, "auto")
        out, reason = ending.feed(text[place : place + REST_CHARS])
        if reason == "block":
            end = place + len(out)
            ends += 1
            if peer.inside(end):
                wrong.append((path.name, place, text[end - 80 : end]))
    assert wrong == []
    assert ends >= 10, "hardly any completion ended"
