"""Where completions end in the languages after the first seven, and in real files of all, cut at
random places.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from sources import SOURCES, Peer, fetch_sources, files_of
from test_ending import cases, check, check_case, run, title

from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES
from cerebrum.text.prompt import prepare

# As in test_ending.py: the prompt up to «, the part to keep up to », what the model writes behind
# it, and for an infill the suffix after ‖.
ROWS = [
    ("java block: a member of a record",
     "record Point(int x, int y) {\n  double size() {\n«    return x + y;\n  }\n»\n  int z() {}"),
    ("java end: an infill", "class A {\n    int twice(int x) {\n        return «2 * x;»\n    }\n"
                            "}‖\n    }\n}"),
    ("C# block: another name", "class A {\n  int F() {\n«    return 1;\n  }\n»\n  int G"),
    ("kotlin block: a method",
     "class A(val b: String) : Base() {\n  fun f(): Int {\n«    return xs.sumOf { it.net }\n  }\n"
     "»\n  fun g() {}"),
    ("kotlin block: when", 'fun f(x: Int) = when (x) {\n«  1 -> "one"\n  else -> {\n    "many"\n'
                           '  }\n}\n»\nfun g() {}'),
    ("kotlin block: a chain", "fun f() {}\n\nval names = users\n«  .map { it.name }\n  .sorted()\n"
                              "»\nfun g() {}"),
    ("swift block: members",
     "struct A: Codable {\n  let id: Int\n«  let name: String\n"
     "\n  enum Keys: String {\n    case id\n  }\n}\n»\nfunc f() {}"),
    ("php block: without its opening tag", "function f($x) {\n«    return $x + 1;\n}\n»\n"
                                           "echo f(1);"),
    ("ruby block: a definition in one line",
     "class A\n  def a = 1\n  def b(x) = x\n\n  def c\n«    3\n  end\n»\n  def d"),
    ("ruby block: a script ends at a blank line",
     '# print it\n«each("a.txt") do |line|\n\n  puts line\nend\n»\nputs "done"'),
    ("ruby block: describe", 'describe Account do\n  it "adds" do\n«    expect(2).to eq(2)\n  end\n'
                             '»\n  it "fails" do'),
    ("ruby end: an infill", "def twice(x)\n  «2 * x»\nend\nputs‖\nend\nputs twice(2)"),
    ("lua block: an argument",
     'describe("f", function()\n  it("works", function()\n«    assert(f)\n  end)\nend)\n»\n'
     'describe("g", function()'),
    ("shell block: a script ends at a blank line", "# count lines\n«wc -l -- *.txt |\n    sort -n\n"
                                                   "»\necho ready"),
    ("sql block: a table", "CREATE TABLE bills (\n«  id integer,\n  note text DEFAULT ';'\n);\n»\n"
                           "CREATE TABLE more ("),
    ("sql block: a statement up to a blank line",
     "SELECT «name, CASE WHEN total > 100 THEN 'a;b' ELSE 'it''s' END\n"
     "FROM customers -- it's\nORDER BY total;\n»\nSELECT 1;"),
    ("sql block: CRLF, and no semicolon", "SELECT a\r\n«FROM b\r\n»\r\nSELECT 2\r\n"),
    ("html block: the innermost element",
     "<body>\n  <ul class=\"it's\">\n    <li>One</li>\n"
     "«    <li>It's two <br> or <b>more</b></li>\n    <!-- </ul> -->\n  </ul>\n»  <p>Next</p>"),
    ("html end: an infill", "<table>\n  <tr>\n«    <td>a</td>\n»  </tr>\n  <tr>‖  </tr>\n  <tr>\n"
                            "    <td>x</td>"),
    ("css block: a rule",
     "p { margin: 0; }\n.menu > li {\n«  color: red; /* } */\n"
     '  background: url(https://a.org/a;b.png) "}";\n}\n»\n.menu { }'),
    ("css block: the first rule", "/* links that were visited */\n«a:visited {\n  color: purple;\n"
                                  "}\n»\nb { }"),
    ("json block: the innermost object",
     '{\n  "name": "a",\n  "scripts": {\n«    "test": "echo \\"}\\"",\n'
     '    "build": "make {a,b}"\n  },\n»  "dependencies": {'),
    ("json block: the innermost array", '{\n  "files": [\n«    "a",\n    "b"\n  ],\n»  "more": 1'),
    ("json end: an infill of an array", '{\n  "a": [\n«    1,\n    2\n»  ],\n  "z": 2\n}‖  ],\n'
                                        '  "b": 2\n}'),
    ("json end: an infill", '{\n  "a": «1,\n  "b": 2»,\n  "c": 3‖,\n  "c": 3\n}'),
    ("yaml block: the innermost mapping",
     'services:\n  web:\n    image: nginx\n«    ports:\n      - "80:80"\n'
     "    command: echo it's \"fine\" # don't\n»  db:\n    image: postgres"),
    ("yaml block: a text in a block",
     "jobs:\n  test:\n    steps:\n«      - run: |\n          if true; then\n\n"
     "          echo \"it's\n          fi\n        env: {A: \"b: c\"}\n      - name: two\n"
     "»  more: 1"),
    ("yaml block: up to the next document", "a:\n«  b: 1\n»---\nc: 1"),
    ("yaml block: top level ends at a blank line", 'version: 3\n«name: test\non: [push, "pull\n'
                                                   '  request"]\n»\njobs:'),
    ("dockerfile block: up to a blank line",
     "FROM debian:13\n«RUN apt-get update && \\\n    # it's a comment\n\n"
     "    apt-get install -y curl \"a b\" && \\\n    echo 'don'\n»\nCMD [\"a\"]"),
    ("markdown block: a paragraph", "# Use\n«It runs\nby `make`.\n»\n## More"),
    ("toml block: a table", "[package]\n«version = \"0.1\"\ntext = \"\"\"\n[x]\n\nit's\"\"\"\n»\n"
                            "[dependencies]"),
    ("makefile block: a recipe", "all: a b\n«\tcc -o it's a.c\n»\nclean:"),
    ("scala block: a method",
     'class Bill(val net: Int) {\n  def total() = {\n«    s"${net} }"\n  }\n»\n  def close() = {}'),
    ("scala block: a body below =",
     "def f(x: Int): Int =\n«  val y = g('{', '\"', 'a)\n\n  y * 2\nend f\n»\ndef h(x: Int) = 1\n"),
    ("scala block: behind =", "object X:\n  def f: Int = «1\n»\n  def g = 2\n"),
    ("scala block: branches of a script", "if x then\n«  g()\n\n  h()\nelse if y then\n  k()\n"
                                          "else\n  z\n»\nh(1)\n"),
    ("scala block: an object", "object X:\n«  val y = 1\n\n  def f(x: Int) =\n    y\n»\nobject Y:\n"
                               "  val z = 1\n"),
    ("scala block: cases",
     "def f(x: Int): String = x match\n«  case 1 => \"a\"\n  case _ =>\n    try g()\n"
     "    finally h()\n»\ndef z = 1\n"),
    ("scala block: the outer function",
     "object A:\n  private[a] def f(y: Int): Int =\n    def go(z: Int) =\n«      z\n    go(y)\n»\n"
     "  def g = 1\n"),
    ("scala block: a signature", "def f(\n«    x: Int,\n    y: Int\n): Int =\n  x + y\n»\n"
                                 "def g = 1\n"),
    ("scala block: an extension", "extension (x: Int)\n«  def f = x\n\n  def g =\n    1\n»\n"
                                  "@main def h() = 2\n"),
    ("scala block: an argument below a colon",
     "def f(xs: Xs) =\n«  xs.map: x =>\n    x + 1\n  .filter(\n    _ > 1\n\n  )\n»\ndef g = 1\n"),
    ("scala block: a body without braces in braces",
     "class A {\n  def f(y: Int): Int =\n«    val z = y\n    z + y\n»\n  def g = {\n    1\n"
     "  }\n}\n"),
    ("scala block: a body in braces without braces around",
     "object A:\n  def f(y: Int) = {\n«    if (y > 1) {\n      1\n    } else {\n      2\n    }\n"
     "  }\n»\n  def g = 1\n"),
    ("scala block: else below a brace",
     "class A {\n  val x = if (a) {\n«    1\n  }\n  else {\n    2\n  }\n»\n  def g = 1\n}\n"),
    ("scala block: braces on lines of their own",
     "class A\n{\n  def f(): Int =\n«  {\n    1\n  }\n»\n  def g = 1\n}\n"),
    ("scala block: the first definition", "import a.b\n«\nobject X:\n  def f = 1\n»\nobject Y:\n"),
    ("scala block: a member",
     "object A:\n  /** Sum. */\n«  def f(x: Int): Int =\n    val y = 1\n\n    y\n»\n  def g = 1\n"),
    ("scala block: a helper", "def f(x: Int) =\n«  h(x)\n\ndef h(x: Int) =\n  2\n»\ndef g = 1\n"),
    ("dart block: a method",
     "class Bill {\n  int total(int net) {\n«    return \"\"\"it's }\"\"\".length;\n  }\n»\n"
     "  int other() {}"),
    ("perl block: code", "sub total {\n«    my ($net) = @_;\n"
                         "    return \"it's }\" if $net =~ /}/;\n}\n»\nsub other {"),
    ("r block: a function", "total <- function(net) {\n«  if (net > 0) {\n    \"it's }\" # }\n  }\n"
                            "}\n»\nother <- 1"),
    ("zig block: a function of a type",
     "const Bill = struct {\n    fn total(net: u8) u8 {\n«        const a =\n"
     "            \\\\ it's \"}\n        ;\n        return '}';\n    }\n»\n    fn other() void {}"),
    ("powershell block: code", "function Total($net) {\n«    <# it's } #>\n"
                               "    if ($net) { 'C:\\' }\n}\n»\nTotal 1"),
    ("powershell block: backticks and here-strings",
     'function F {\n«  $a = "C:\\Temp\\"\n  $b = "`"}" + @"\nit\'s "x" } "@\n"@\n  $c = @\'\n"} `\n'
     '\'@\n}\n»\nF\n'),
    ("powershell block: a line that goes on", "$a = «Get-Item `\n  -Path b\n»$c = 1\n"),
    ("c block: one brace in each branch of a conditional",
     "int f() {\n«#ifdef A\n  if (a) {\n#elif B\n  if (b) {\n# if C\n    g(\n# else\n    h(\n"
     "# endif\n"
     "    1);\n#else\n  {\n#endif\n    i();\n  }\n}\n»\nint g() {\n}\n"),
    ("c block: a header in each branch",
     "/* f */\n«#ifdef A\nint f(int a) {\n#else\nint f(long a) {\n#endif\n  return a;\n}\n»\n"
     "int g() {\n}\n"),
    ("c block: a body's end in each branch",
     "int f() {\n«#ifdef A\n  return 1;\n}\n#else\n  return 2;\n}\n#endif\n»int g() {\n}\n"),
    ("c block: a cursor in a branch",
     "int f() {\n#ifdef A\n  if (a) {\n«#else\n  if (b) {\n#endif\n    g();\n  }\n}\n»\n"
     "int g() {\n}\n"),
    ("csharp block: one brace in each branch",
     "class A {\n  int F() {\n«#if A\n    if (a) {\n#else\n    if (b) {\n#endif\n    }\n  }\n»\n"
     "  int G() {"),
    ("dockerfile block: here-documents",
     "FROM a\n«RUN <<-'EOF' cat && cat <<\"END\" > /x\na\n\n\tEOF\n\nb\nEND\nRUN <<X\n\nc\nX\n»\n"
     "CMD d\n"),
    ("dockerfile block: in a here-document", "FROM a\nRUN <<EOF\n«b\n\nc\nEOF\n»\nCMD d\n"),
    ("makefile block: define in define",
     "A = 1\n«override define B =\na\n\n define C\n\nc\nendef # C\n\nb # it's\nendef\nD = 2\n»\n"
     "all: x\n"),
    ("makefile block: in a define", "define A\n«a\n\nb\nendef\n»\nall: x\n"),
    ("julia block: code", "function f(net)\n«  #= it's\n  end =#\n  for x in net\n    y = x'\n"
                          "  end\nend\n»\nother()"),
    ("elixir block: code",
     "defmodule A do\n  def f(x) do\n«    if x, do: \"it's\", else: 'b'\n  end\n»\n  def other do"),
    ("haskell block: equations",
     "f :: Int -> Int\n«f n\n  | n > 0 = f' 'a'\n  | otherwise = 0 {- it's -}\n»\nother = 1"),
]  # fmt: skip
LONG = r'''
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
            a \"""  }
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
«            var a = @"C:\""} \";
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
  r = /end "/
=begin
end
=end
  sql = <<~SQL
    end
    don't "
  SQL
  out << <<~EOS
    end
  don't
  EOS
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
    echo if then fi 'C:\'
    echo "${x:-it's}" \{ \( \) \{
    a=(if then fi)
    echo $(( (1 + y) << A )) $(( a[(1<<B)] ))
    echo "$x" done

# note
    echo \"
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
    diff <(cat << eof) <(cat <<b) # it's
}
eof
don't
b
    read -r a <<< "x
}"
    echo $((1 << 2)) "$#" # it's }
    echo ${#1} "
}"
    echo It\'s
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
  /* c; */ and y = 'C:\' and z in (

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
=== sql block: a query of dbt, in which no semicolon is
{{ config(materialized='table') }}
«
{# it's a; #}
with a as (
    select * from {{ ref('a') }}

)

select * from a

-- only new ones
where x > 1
»
select 2
=== sql block: a statement without a semicolon, and a comment
-- all
«SELECT a
FROM b
»
/* the
   next */
SELECT 2
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
=== sql block: below the end of a body that begins above the window
    x := 1;
END
$$ LANGUAGE plpgsql;

«SELECT 1;
»SELECT 2;
=== sql block: a trigger
create trigger t
«after insert or update on a for each row begin
  update b set c = 1 where d = new.e;

  select case when a then 1 end;
end;
»
select 1;
=== sql block: a procedure of MySQL
-- sums
«DELIMITER //

CREATE PROCEDURE p()
BEGIN
  IF a THEN
    SELECT 1;
  ELSE
    CASE x WHEN 1 THEN SELECT 2; END CASE;
  END IF;
  WHILE x DO
    SET x = 1;
  END WHILE;
END //
»
CREATE PROCEDURE q()
=== sql block: another delimiter of MySQL
DELIMITER $$
«CREATE PROCEDURE p()
BEGIN
  SELECT 1;
END$$
»DELIMITER ;
=== sql block: a batch of T-SQL
CREATE PROCEDURE p AS
BEGIN
«  IF @x = 1
  BEGIN
    SELECT [end], @begin FROM [begin]
  END
  ELSE SELECT 2

  BEGIN TRY
    BEGIN TRANSACTION
    COMMIT
  END TRY
END
GO
»
CREATE PROCEDURE q AS
=== sql block: a block of T-SQL up to a blank line
IF @x = 1
«BEGIN
  SELECT 1
END
»
SELECT 2
=== sql block: a procedure of Oracle
CREATE OR REPLACE PROCEDURE p IS
BEGIN
«  NULL;
END p;
»/
=== sql block: a transaction is no block
BEGIN;
«BEGIN IMMEDIATE TRANSACTION;
»COMMIT;
=== sql block: a command to psql
SELECT 1
«FROM a \gset
»\echo x
=== sql block: columns with the names of blocks
CREATE TABLE e (
«  begin timestamp,
  end timestamp
);
»SELECT begin, end FROM e;
=== sql block: a bracket that was never closed
INSERT INTO a (b;

«SELECT 1; SELECT
2;
»SELECT 3;
=== sql block: a blank line first
SELECT a
FROM b
«
SELECT c
FROM d;
»SELECT 3;
=== sql block: an UPDATE above a new statement
UPDATE users SET
«    active = false
WHERE id = 7;»
INSERTS‖

SELECT 1;
=== sql block: an UPDATE in a body
CREATE FUNCTION f() AS $$
BEGIN
«  UPDATE a SET x = 1
  WHERE y;
»INSERTS‖  DELETE FROM b;
END;
$$ LANGUAGE plpgsql;
=== sql block: a trigger in a gap
CREATE TRIGGER t
«AFTER UPDATE ON a
BEGIN
INSERTSEND;»
INSERTS‖

CREATE TABLE x (a int);
'''.replace(
    "INSERTS",
    "".join(f"  INSERT INTO log VALUES ({n}, 'the note with number {n}');\n" for n in range(12)),
)


@pytest.mark.parametrize("case", cases(ROWS, LONG), ids=title)
def test_ends(case: tuple[str, str]) -> None:
    check_case(case)


# (language, prompt«gap»suffix): a model that runs on with the suffix.
GAPS = [
    # The suffix begins like something in the middle of a line, or at another indentation.
    ("python", "def f(x):\n«    if x:\n        return 1\n    y = 2\n»    return y\n"),
    ("java", "class A {\n  int f(int x) {\n«    // return 2 x\n    int y = x * 2;\n»    return y;\n"
             "  }\n}\n"),
    ("kotlin", "fun f(x: Int): Int {\n«    if (x < 0) return 0\n    val y = x * 2\n"
               "»    return y\n}\n"),
    ("shell", 'f() {\n«    if [ -z "$1" ]; then\n        return 1\n    fi\n    y=2\n'
              '»    return 0\n}\n'),
    ("ruby", "def index\n«  respond_to do |format|\n    format.html\n»    format.json { a }\n"
             "  end\nend\n"),
    ("yaml", "steps:\n«      - uses: checkout\n      - name: Set up\n»        uses: setup\n"),
    # What follows the block that the gap begins with.
    ("java", "class A {\n  void f() {\n«    if (x) {\n      throw e;\n    }\n    y = 2;\n"
             "»    print(y);\n  }\n"),
    ("ruby", "def f(x)\n«  unless x\n    a\n  end\n  y = 2\n»  puts y\nend\n"),
    ("javascript", "function f(x) {\n«  if (x) {\n    a()\n  }\n  else {\n    b()\n  }\n"
                   "  let y = 2\n»  print(y)\n}\n"),
    ("python", "def f(x):\n«    for a in x:\n        b(a)\n    else:\n        c()\n    y = 2\n"
               "»    print(y)\n"),
    ("css", ".a {\n  color: red;\n}\n\n«.b {\n  color: blue;\n}\n.c {\n  margin: 0;\n}\n».d {\n"
            "  margin: 1px;\n}\n"),
    ("json", '{\n«  "name": "app",\n  "version": "1",\n»  "versions": []\n}\n'),
    # Headers of closures and blocks with parameters.
    ("ruby", "def a\n  xs.each «do |x|\n    puts x\n  end»\n  y\nend\n"),
    ("swift", "func f() {\n    items.forEach { item in\n«        print(item)\n    }\n"
              "»    done()\n}\n"),
    # The cursor is in the brackets of a header.
    ("shell", 'f() {\n    if [ -n «"$1" ]; then\n        echo 1\n    fi»\n    echo 2\n}\n'),
    ("lua", "function f(t)\n  if check(«t) then\n    a()\n  end»\n  b()\nend\n"),
    # Lines that go on.
    ("java", "void f() {\n«  var names = users.stream()\n    .filter(u -> u.age > 18)\n"
             "    .toList();\n»  f(names);\n"),
    ("dockerfile", 'FROM a\nRUN apt-get update «&& \\\n    apt-get install -y curl»\n\n'
                   'CMD ["x"]\n'),
    # The suffix is outside of the block that the cursor is in.
    ("java", "void f() {\n  if (x == null) {\n    throw new Illeg«alArgumentException();\n  }»\n"
             "  h();\n}\n"),
    ("cpp", "namespace a {\nvoid f() {\n    g(«1);\n}»\nvoid h() {\n}\n}\n"),
    ("javascript", "switch (x) {\n  case 1:\n    a(«1);»\n  case 2:\n    b();\n}\n"),
    ("scala", "object A:\n  def f(x: Expr[Int]) =\n«    '{ $x + g(1) }\n\n  def g(x: Int) =\n"
              "    h(1)\n»  val y = 1\n"),
    ("c", "int f() {\n  if (z) {\n«#if A\n  if (a) {\n#else\n  if (b) {\n#endif\n    g(1);\n  }\n"
          "»  h(1);\n  }\n}\n"),
    # Paragraphs.
    ("markdown", "# A\n\n«First paragraph here.\n\nSecond one here.\n\n»## B\n\nText\n"),
]  # fmt: skip


@pytest.mark.parametrize(("language", "text"), GAPS)
def test_gaps(language: str, text: str) -> None:
    prompt, gap, suffix = text.replace("»", "«").split("«")
    for pieces in ([gap + suffix], list(gap + suffix)):
        assert run(Ending("infill", language, prompt, suffix, "auto"), pieces)[0] == gap


@pytest.mark.parametrize("language", LANGUAGES)
def test_an_instruction_about_each_language(language: str) -> None:
    """Its answer is code alone, in any language, even between fences of shells."""
    sent = prepare(
        {"language": language, "prompt": "x\n", "instruction": "y"}, "instruct", 1000, 3.0
    )
    asked, begun = sent.body["messages"]
    assert (asked["content"], begun["content"]) == (
        f"y\n\n```{language}\nx\n```",
        f"```{language}\n",
    )
    before = f"Here:\n```{language}\n"
    check("instruct", language, "", "", f"{before}x\n```\n", ("x\n", "stop"), len(before))


def test_an_instruction_about_a_text_with_fences() -> None:
    """Its answer does not end at the first of them."""
    text = "# Use\n\n```\nmake run\n```\n\nThe `x` is below.\n\n```\nx\n```\nEnd.\n"
    sent = prepare(
        {"language": "markdown", "prompt": text, "instruction": "y"}, "instruct", 1000, 3.0
    )
    asked, begun = sent.body["messages"]
    assert asked["content"] == f"y\n\n````markdown\n{text}````"
    check("instruct", "markdown", begun["content"], "", f"{text}````\nThat is it.", (text, "stop"))


# --------------------------------------------------------------------------------------- real files

FILES, CUTS, MAX_FILE_BYTES = 40, 10, 60_000
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
            yield path, text, place if text[line:place].strip() else line, peer
        chosen += 1
        if chosen == FILES:
            return


# The languages that models.toml lists; the others are tried nightly.
OFTEN = ("python", "javascript", "typescript", "rust", "c", "cpp", "go")


@pytest.mark.slow
@pytest.mark.parametrize(
    "language",
    [pytest.param(name, marks=() if name in OFTEN else pytest.mark.nightly) for name in LANGUAGES],
)
def test_real_files(language: str) -> None:
    """Cut at random places, with the rest of the file as what a model writes: no end is inside a
    string or comment.
    """
    if reason := fetch_sources():
        pytest.skip(reason)
    files = files_of([str(SOURCES)], language, 200, MAX_FILE_BYTES)
    if len(files) < 5:
        pytest.skip(f"only {len(files)} files of {language} in the sources that could be fetched")
    ends, wrong = 0, []
    for path, text, place, peer in cuts(files, language, random.Random(language)):
        out, reason = Ending("complete", language, text[:place], None, "auto").feed(
            text[place : place + REST_CHARS]
        )
        if reason == "block":
            ends += 1
            if peer.inside(place + len(out)):
                wrong.append((path.name, place, text[place + len(out) - 80 : place + len(out)]))
    assert wrong == []
    assert ends >= 10, "hardly any completion ended"
