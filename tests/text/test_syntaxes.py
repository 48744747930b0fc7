"""Where completions end in the languages after the first seven, and what is sent of a long file in them.
`test_real_files` cuts real files of each language at random places."""

from __future__ import annotations

import bisect
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import MODELS
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, Error, String
from test_ending import cases, check, check_case, title

from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES, language_of_file
from cerebrum.text.prompt import detect_mode, prepare

# As in test_ending.py: the prompt up to «, the part to keep up to », what the model writes behind it, and for an infill
# the suffix after ‖.
CASES = r'''
=== java block: a method of a class
/**
 * A class of the bank's.
 */
public class Account {
    public int balance() {
«        return this.balance; // "}" is no brace
    }
»
    public void close() {
    }
=== java block: an escaped end of a text block
class A {
    String f() {
«        return """
            a \"""  }
            """;
    }
»
    int g() {}
=== java block: a record is completed member by member
record Point(int x, int y) {
    double length() {
«        return Math.sqrt(x * x + y * y);
    }
»
    int z() { return 0; }
=== java block: a character that is a quote
class A {
    boolean f(char c) {
«        return c == '"' || c == '\'' || c == '}';
    }
»
    int g() {}
=== java block: try and catch
class A {
    void f() {
        try {
«            g();
        } catch (Exception e) {
            h();
        }
    }
»
    void g() {}
=== java end: an infill
class A {
    int twice(int x) {
        return «2 * x;»
    }
}‖
    }
}
=== csharp block: a method, with a namespace and attributes around it
namespace Shop
{
    [Serializable]
    public class Bill
    {
        public decimal Total()
        {
«            return lines.Sum(line => line.Net);
        }
»
        public void Pay() { }
=== csharp block: a verbatim string, doubled quotes, an interpolated one
class A {
    string F() {
«        var a = @"C:\""} \";
        var b = $"{a}: {(a.Length > 3 ? "}" : "{")}";
        var c = $@"{b} "" }
";
        return a + b + c;
    }
»
    int G() => 3;
=== csharp block: a raw string in more quotes
class A {
    string F() {
«        return """"
            """ }
            """";
    }
»
    int G() => 3;
=== csharp block: a region is no comment of Python's
class A {
    #region it's here
    int F() {
«        return 1;
    }
»    #endregion
=== kotlin block: a function of a class with a constructor
class Account(val owner: String) : Base() {
    fun balance(): Int {
«        return lines.sumOf { it.net }
    }
»
    fun close() {}
=== kotlin block: when
fun f(x: Int) = when (x) {
«    1 -> "one"
    else -> {
        "many"
    }
}
»
fun g() {}
=== swift block: members without semicolons
struct A: Codable {
    let id: Int
«    let name: String

    enum CodingKeys: String, CodingKey {
        case id
    }
}
»
func f() {}
=== kotlin block: a statement that goes on
fun f() {}

val names = users
«    .map { it.name }
    .sorted()
»
fun g() {}
=== swift block: marks around a string
func f() {
«    let a = ##"a "# }"##
    /* x /* y */ " } */
}
»
func g() {}
=== swift block: a method of an extension
extension Account {
    func total() -> Int {
«        guard let lines = lines else { return 0 }
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
        return array_sum(array_map(fn($line) => $line->net, $this->lines));
    }
»
    public function pay(): void {}
=== php block: strings over lines
function f($a) {
«    $b = "{$a['x']} it's } 
    more }";
    return $b;
}
»
function g() {}
=== php block: without its opening tag
function f($x) {
«    return $x + 1;
}
»
echo f(1);
=== ruby block: blocks and modifiers
def f(xs)
«  xs.each do |x|
    puts x unless x.nil?
    while x > 0 do
      x -= 1
    end
    y = if x then 1 else 2 end
  end
  nil
end
»
f([1])
=== ruby block: strings, symbols and keys that hold keywords
def f
«  a = { if: 1, end: 2 }
  b = "end #{a.map { |k, v| "#{k} end" }.join(" ")} it's"
  c = :end
  d = self.class.begin
  e = 'end'
  r = /end "/
  [a, b, c, d, e, r]
end
»
f
=== ruby block: rescue and ensure
def f
  begin
«    g
  rescue Error => e
    h
  ensure
    i
  end
end
»
g
=== ruby block: a definition in one line
class A
  def a = 1
  def b(x) = x + 1

  def c
«    3
  end
»
  def d
=== ruby block: =begin and =end
=begin
def f
=end
def g
«  1
=begin
end
=end
end
»
h
=== ruby block: a script ends at a blank line
# print the lines
«File.foreach("a.txt") do |line|

  puts line
end
»
puts "done"
=== ruby block: describe
describe Account do
  it "adds" do
«    expect(1 + 1).to eq(2)
  end
»
  it "subtracts" do
=== ruby end: an infill
def twice(x)
  «2 * x»
end
puts‖
end
puts twice(2)
=== ruby block: here-documents
def f
«  sql = <<~SQL
    end
    don't "
  SQL
  run(sql)
  out << <<~EOS
    end
  don't
  EOS
end
»
f
=== ruby block: a shift is no here-document
def f
«  1 << B
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
  return function() return a end
end
»
return M
=== lua block: long strings and comments
function f()
«  --[[ end
  it's ]]
  -- don't end
  local s = [[
end "]] .. [==[ ]] end ]==]
  return s, #s
end
»
f()
=== lua block: a function as an argument
describe("f", function()
  it("works", function()
«    assert(f(1) == 1)
  end)
end)
»
describe("g", function()
=== shell block: a function
greet() {
«    if [[ -n $1 ]]; then
        echo "It's ${1:-"}"} $(date "+%F }") fi"
    fi
    for name in "$@"; do echo done; done
}
»
greet
=== shell block: case and its parentheses
pick() {
    case $1 in
«        a | b) echo "esac" ;;
        'c') echo c ;;
        *) return 1 ;;
    esac
}
»
pick a
=== shell block: here-documents
usage() {
«    cat <<EOF
Usage: don't }
EOF
    cat <<-'END' | sed 's/a/b/'
	}
	END
    diff <(cat << eof) <(cat <<b) # it's
}
eof
don't
b
    read -r a <<< "x
}"
    echo It\'s \" ${x//\'/}
    echo $((1 << 2)) ${#1} "$#" # it's }
}
»
usage
=== shell block: escapes, expansions and arithmetic
f() {
«    echo "${x:-it's}" \{ \( \) \{
    a=(if then fi)
    echo $(( (1 + y) << A )) $(( a[(1<<B)] ))
    echo "$x" done
}
»
f
=== shell block: a comment at column 0 below a blank line
f() {
«    a

# note
    b
}
»
# what follows
f a
=== shell block: a script ends at a blank line
# count the lines of each file
«wc -l -- *.txt |
    sort -n
»
echo ready
=== shell block: words that are no keywords
backup() {
«    dd if=/dev/zero of=x bs=1 count=1
    git log --oneline done-file
    echo if then fi
}
»
backup
=== sql block: a table
CREATE TABLE bills (
«    id integer PRIMARY KEY,
    note text DEFAULT ';'
);
»
CREATE TABLE more (
=== html block: the innermost element
<body>
  <ul class="it's">
    <li>One</li>
«    <li>It's two <br> or <b>more</b></li>
    <!-- </ul> -->
  </ul>
»  <p>Next</p>
=== html end: an infill of rows
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
  background: url(https://example.org/a;b.png) "}";
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
=== json block: the innermost object
{
  "name": "a",
  "scripts": {
«    "test": "echo \"}\"",
    "build": "make {a,b}"
  },
»  "dependencies": {
=== json block: the innermost array
{
  "files": [
«    "a",
    "b"
  ],
»  "more": 1
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
=== sql block: a statement up to a blank line
SELECT «name, CASE WHEN total > 100 THEN 'a;b' ELSE 'it''s' END
FROM customers -- it's
ORDER BY total;
»
SELECT 1;
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
=== scala block: a method of a class
class Bill(val net: Int) {
  def total(): Int = {
«    s"${net} }"
  }
»
  def close() = {}
=== dart block: a method of a class
class Bill {
  int total(int net) {
«    return """it's }""".length;
  }
»
  int other() {}
=== perl block: a function
sub total {
«    my ($net) = @_;
    return "it's }" if $net =~ /}/;
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
=== powershell block: a function
function Total($net) {
«    <# it's } #>
    if ($net) { 'C:\' }
}
»
Total 1
=== julia block: a function
function total(net)
«    #= it's
    end =#
    for x in net
        y = x'
    end
end
»
other()
=== elixir block: a function of a module
defmodule Bill do
  def total(net) do
«    if net, do: "it's", else: 'b'
  end
»
  def other do
=== haskell block: equations
total :: Int -> Int
«total n
  | n > 0 = f' 'a'
  | otherwise = 0 {- it's -}
»
other = 1
'''  # noqa: W291


@pytest.mark.parametrize("case", cases(CASES), ids=title)
def test_ends(case: str) -> None:
    check_case(case)


# (language, prompt, the gap, the suffix, what a model writes behind the gap if that is not the suffix)
GAPS: list[tuple[str, str, str, str, str | None]] = [
    # The suffix begins like something in the middle of a line, or at another indentation.
    ("python", "def f(x):\n", "    if x:\n        return 1\n    y = 2\n", "    return y\n", None),
    ("java", "class A {\n    int f(int x) {\n", "        // return the double\n        int y = x * 2;\n",
     "        return y;\n    }\n}\n", None),
    ("java", "class A {\n    int f(int x) {\n",
     "        if (x < 0) {\n            return 0;\n        }\n        int y = 2;\n",
     "        return y;\n    }\n}\n", None),
    ("kotlin", "fun f(x: Int): Int {\n", "    if (x < 0) return 0\n    val y = x * 2\n", "    return y\n}\n", None),
    ("swift", "func f(x: Int?) -> Int {\n", "    guard let x = x else { return 0 }\n    let y = x\n",
     "    return y\n}\n", None),
    ("lua", "function f(x)\n", "  if not x then return nil end\n  local y = 2\n", "  return y\nend\n", None),
    ("shell", "f() {\n", "    if [ -z \"$1\" ]; then\n        return 1\n    fi\n    y=2\n", "    return 0\n}\n", None),
    ("ruby", "def index\n", "  respond_to do |format|\n    format.html\n", "    format.json { a }\n  end\nend\n", None),
    ("yaml", "steps:\n", "      - uses: checkout\n      - name: Set up\n", "        uses: setup\n", None),
    # What follows the block that the gap begins with.
    ("java", "class A {\n    void f(int x) {\n",
     "        if (x < 0) {\n            throw new E();\n        }\n        int y = 2;\n",
     "        print(y);\n    }\n}\n", None),
    ("ruby", "def f(x)\n", "  unless x\n    a\n  end\n  y = 2\n", "  puts y\nend\n", None),
    ("shell", "f() {\n", "    if a; then\n        b\n    fi\n    y=2\n", "    echo $y\n}\n", None),
    ("javascript", "function f(x) {\n", "  if (x) {\n    a()\n  }\n  else {\n    b()\n  }\n  let y = 2\n",
     "  print(y)\n}\n", None),
    ("python", "def f(x):\n", "    for a in x:\n        b(a)\n    else:\n        c()\n    y = 2\n",
     "    print(y)\n", None),
    ("php", "<?php\nfunction f() {\n", "    try {\n        g();\n    }\n    catch (E $e) {\n        h();\n    }\n",
     "    p();\n}\n", None),
    ("css", ".a {\n  color: red;\n}\n\n", ".b {\n  color: blue;\n}\n.c {\n  margin: 0;\n}\n",
     ".d {\n  margin: 1px;\n}\n", None),
    ("json", "{\n", '  "name": "app",\n  "version": "1",\n', '  "versions": []\n}\n', None),
    # The same, and the model never comes to the suffix.
    ("javascript", "function f(x) {\n", "  if (x) {\n    a()\n  }\n", "  done(x)\n}\n",
     "".join(f"  somethingElse{n}(entirely, different)\n" for n in range(20))),
    # Headers of closures and blocks with parameters.
    ("ruby", "def a\n  xs.each ", "do |x|\n    puts x\n  end", "\n  y\nend\n", None),
    ("ruby", "def f\n  items.each { |item|\n", "    puts item\n  }\n", "  done\nend\n", None),
    ("swift", "func f() {\n    items.forEach { item in\n", "        print(item)\n    }\n", "    done()\n}\n", None),
    ("kotlin", "fun f() {\n    items.forEach { item ->\n", "        println(item)\n    }\n", "    done()\n}\n", None),
    # The cursor is in the brackets of a header.
    ("shell", "f() {\n    if [ -n ", "\"$1\" ]; then\n        echo 1\n    fi", "\n    echo 2\n}\n", None),
    ("lua", "function f(t)\n  if check(", "t) then\n    a()\n  end", "\n  b()\nend\n", None),
    ("ruby", "def f(t)\n  if check(", "t)\n    a\n  end", "\n  b\nend\n", None),
    # Lines that go on.
    ("java", "class A {\n    void f() {\n",
     "        var names = users.stream()\n            .filter(user -> user.isActive() && user.getAge() > 18)\n"
     "            .map(User::getName)\n            .collect(Collectors.toList());\n",
     "        print(names);\n    }\n}\n", None),
    ("dockerfile", "FROM a\nRUN apt-get update ", "&& \\\n    apt-get install -y curl", "\n\nCMD [\"x\"]\n", None),
    ("shell", "f() {\n    docker run ", "--rm \\\n        -v a:b x", "\n}\n", None),
    # The suffix is outside of the block that the cursor is in.
    ("java", "class A {\n    void f() {\n        if (x == null) {\n            throw new Illeg",
     "alArgumentException();\n        }",
     "\n        h();\n    }\n}\n", None),
    ("cpp", "namespace a {\nvoid f() {\n    g(", "1);\n}", "\nvoid h() {\n}\n}\n", None),
    ("javascript", "switch (x) {\n  case 1:\n    a(", "1);", "\n  case 2:\n    b();\n}\n", None),
    # Paragraphs.
    ("markdown", "# A\n\n", "First paragraph here.\n\nSecond one here.\n\n", "## B\n\nText\n", None),
]  # fmt: skip


@pytest.mark.parametrize("case", GAPS, ids=lambda case: f"{case[0]} {case[2][:20]!r}")
def test_gaps(case: tuple[str, str, str, str, str | None]) -> None:
    language, prompt, gap, suffix, behind = case
    for size in (1, 7, 10_000):
        ending, sent, text = Ending("infill", language, prompt, suffix, "auto"), "", gap + (behind or suffix)
        for start in range(0, len(text), size):
            piece, reason = ending.feed(text[start : start + size])
            sent += piece
            if reason:
                break
        else:
            sent += ending.flush()
        assert sent == gap


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_instruction_about_each_language(language: str) -> None:
    """Its answer is code alone, in any language, even between fences of shells."""
    sent = prepare({"language": language, "prompt": "x\n", "instruction": "y"}, "instruct", 1000, 3.0)
    asked, begun = sent.body["messages"]
    assert (asked["content"], begun["content"]) == (f"y\n\n```{language}\nx\n```", f"```{language}\n")
    check("instruct", language, "", "", f"Here:\n```{language}\nx\n```\n", ("x\n", "stop"))


def test_an_instruction_about_a_text_with_fences() -> None:
    """Its answer does not end at the first of them."""
    text = "# Use\n\n```\nmake run\n```\n\nThe `x` is below.\n\n```\nx\n```\nEnd.\n"
    asked, begun = prepare({"language": "markdown", "prompt": text, "instruction": "y"}, "instruct", 1000, 3.0).body[
        "messages"
    ]
    assert asked["content"] == f"y\n\n````markdown\n{text}````"
    ending = Ending("instruct", "markdown", begun["content"], None, "auto")
    assert ending.feed(f"{text}````\nThat is it.") == (text, "stop")


@pytest.mark.parametrize(
    ("language", "prompt", "mode"),
    [
        ("markdown", "Write a README for a shop", "instruct"),
        ("markdown", "How do I install it?\n\nRun ", "complete"),
        ("markdown", "# Title\n\nWrite a ", "complete"),
        ("sql", "Write a query that lists all customers", "instruct"),
        ("sql", "CREATE TABLE a (", "complete"),
        ("sql", "CREATE PROCEDURE foo()", "complete"),
        ("sql", "CREATE ROLE admin WITH", "complete"),
        ("sql", "create extension if not exists", "complete"),
        ("sql", "EXPLAIN UPDATE a SET b = 1", "complete"),
        ("sql", "EXPLAIN ALL a", "complete"),
        ("sql", "describe users", "complete"),
        ("sql", "explain this query", "instruct"),
        ("dockerfile", "ADD a b", "complete"),
        ("dockerfile", "Add a user", "instruct"),
        ("yaml", "generate foo: x", "complete"),
        ("shell", "find . -name '*.txt'", "complete"),
        ("shell", "make install", "complete"),
        ("shell", "Find all files that are larger than 1 GB", "instruct"),
        ("html", "<p>Write a letter", "complete"),
        ("yaml", "name: test", "complete"),
        ("dockerfile", "FROM debian", "complete"),
        ("ruby", "# Refactor this\ndef f\n  1\nend\n", "instruct"),
        ("lua", "-- Refactor this function\nfunction f()\nend\n", "instruct"),
        ("css", "/* Simplify this */\na {\n  color: red;\n}\n", "instruct"),
    ],
)
def test_code_or_instruction(language: str, prompt: str, mode: str) -> None:
    assert detect_mode({"language": language, "prompt": prompt}) == mode


@pytest.mark.parametrize("name", ["c#", "C#", "CSharp", "cs"])
def test_other_names_of_a_language(name: str) -> None:
    body = "        return 1;\n    }\n"
    check("complete", name, "class A {\n    int F() {\n", "", f"{body}\n    int G", (body, "block"))


@pytest.mark.parametrize(
    ("language", "answer", "sent", "reason"),
    [
        ("shell", "Here:\n```bash\nls\n```\nDone.\n", "ls\n", "stop"),
        ("python", "Run:\n```bash\nls\n```\n```python\nx\n```\n", "x\n", "stop"),
        ("python", "Given:\n```json\n{}\n```\nuse:\n```\nx\n```\n", "x\n", "stop"),
        ("python", "Run:\n```bash\nls\n```\nor\n```sh\nls -l\n```\nin a shell.\n", "ls\n", None),
        ("python", "Run:\n```bash\nls\n```", "ls\n", None),
        ("json", "Here:\n```json\n{}\n```\nDone.\n", "{}\n", "stop"),
        ("markdown", "```markdown\n# T\n```sh\nls\n```\nend\n```\nDone.\n", "# T\n```sh\nls\n```\nend\n", "stop"),
    ],
)
def test_the_block_of_an_answer(language: str, answer: str, sent: str, reason: str | None) -> None:
    check("instruct", language, "", "", answer, (sent, reason))


# --------------------------------------------------------------------------------------------- real files

CACHE = MODELS.parent / "sources"
# Debian's source packages; together they have files in every language, 27 MB packed.
PACKAGES = (
    "thrift", "flatbuffers", "jekyll", "capistrano", "phpmyadmin", "icinga2", "docker-compose", "ansible-lint",
    "lua-penlight",
)  # fmt: skip
FILES, CUTS, MAX_FILE_BYTES = 40, 10, 60_000
REST_CHARS = 6000  # that a model would write behind a cut
LEXERS = {"csharp": "csharp", "shell": "bash", "dockerfile": "docker"}  # pygments' names


def fetch_sources() -> None:
    """Unpack the original sources of PACKAGES below CACHE. Skip the test if Debian's archive cannot be reached."""
    done = CACHE / f"done-{'-'.join(PACKAGES)}"
    if done.exists():
        return
    if not shutil.which("apt-get"):
        pytest.skip("needs apt-get")
    lists = CACHE / "lists"
    (lists / "partial").mkdir(parents=True, exist_ok=True)
    stanzas = [
        stanza.replace("Types: deb\n", "Types: deb-src\n")
        for file in sorted(Path("/etc/apt/sources.list.d").glob("*.sources"))
        for stanza in f"\n{file.read_text()}".split("\n\n")
        if "URIs: http" in stanza
    ]
    sources = CACHE / "debian.sources"
    sources.write_text("\n\n".join(stanzas) + "\n")
    options = [f"-oDir::Etc::sourcelist={sources}", "-oDir::Etc::sourceparts=-", f"-oDir::State::Lists={lists}"]
    options += [f"-oDir::Cache={CACHE}"]
    updated = subprocess.run(["apt-get", "update", "-q", *options], cwd=CACHE, capture_output=True, text=True)
    if updated.returncode:
        pytest.skip(f"Debian's archive cannot be reached: {updated.stderr[-200:]}")
    for package in PACKAGES:  # an archive may lack one
        command = ["apt-get", "source", "-q", "--tar-only", "--download-only", *options, package]
        subprocess.run(command, cwd=CACHE, capture_output=True)
    archives = list(CACHE.glob("*.orig*.tar.*"))
    for archive in archives:
        subprocess.run(["tar", "xf", archive, "--one-top-level", "--no-same-owner"], cwd=CACHE, capture_output=True)
    if len(archives) == len(PACKAGES):
        done.touch()


@pytest.fixture(scope="module")
def sources() -> dict[str, list[Path]]:
    """Files of a few hundred lines at most, by language."""
    fetch_sources()
    found: dict[str, list[Path]] = {name: [] for name in LANGUAGES}
    for folder, folders, files in os.walk(CACHE):
        folders.sort()
        for file in sorted(files):
            path, language = Path(folder, file), language_of_file(file)
            if language and path.is_file() and 200 < path.stat().st_size < MAX_FILE_BYTES:
                found[language].append(path)
    return found


class Peer:
    """What pygments takes for strings and comments of a text."""

    def __init__(self, language: str, text: str) -> None:
        self.line_comment = LANGUAGES[language].line_comment
        lexer = get_lexer_by_name(LEXERS.get(language, language), stripnl=False, ensurenl=False)
        self.text = text
        self.tokens = [(start, start + len(value), kind) for start, kind, value in lexer.get_tokens_unprocessed(text)]
        self.starts = [start for start, _, _ in self.tokens]

    @property
    def sure(self) -> bool:
        """It has understood the text. It does not know MySQL's quotes in SQL, and takes text in Markdown for code."""
        return not any(kind in Error for _, _, kind in self.tokens)

    def inside(self, place: int) -> bool:
        """Whether a place is inside a string or comment."""
        number = bisect.bisect_left(self.starts, place) - 1
        start, end, kind = self.tokens[number]
        line = self.text[: place - 1].rpartition("\n")[2].lstrip()
        if self.line_comment and line.startswith(self.line_comment):
            return False  # Rust's lines of documentation are comments each
        if kind in String.Backtick or kind in Comment.Preproc or kind in Comment.PreprocFile:
            return False
        if start < place < end:
            return kind in String or kind in Comment
        following = self.tokens[number + 1][2] if number + 1 < len(self.tokens) else None
        return kind in String and following in String and self.text[place - 1] == "\n"


def cuts(files: list[Path], language: str, chance: random.Random) -> Iterator[tuple[Path, str, int, Peer]]:
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
            yield path, text, place if text[line:place].strip() else line, peer
        chosen += 1
        if chosen == FILES:
            return


# The languages that models.toml lists; the others are tried nightly.
OFTEN = ("python", "javascript", "typescript", "rust", "c", "cpp", "go")


@pytest.mark.slow
@pytest.mark.parametrize(
    "language", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.nightly) for name in LANGUAGES]
)
def test_real_files(language: str, sources: dict[str, list[Path]]) -> None:
    """Cut at random places, with the rest of the file as what a model writes: no end is inside a string or comment."""
    files = sources[language]
    if len(files) < 5:
        pytest.skip(f"only {len(files)} files of {language} in the sources that could be fetched")
    ends, wrong = 0, []
    for path, text, place, peer in cuts(files, language, random.Random(language)):
        out, reason = Ending("complete", language, text[:place], None, "auto").feed(text[place : place + REST_CHARS])
        if reason == "block":
            ends += 1
            if peer.inside(place + len(out)):
                wrong.append((path.name, place, text[place + len(out) - 80 : place + len(out)]))
    assert wrong == []
    assert ends >= 10, "hardly any completion ended"
