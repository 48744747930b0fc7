"""Where a completion ends: what a model writes after a prompt and where that is cut, however tokens
split the text.
"""

from __future__ import annotations

import doctest
import itertools
import random
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebrum.text import ending, languages, prompt
from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES
from cerebrum.text.stages import StopStrings

Outcome = tuple[str, str | None]  # everything that is sent, and why it ends
# Each case is a text: the prompt up to «, the part to keep up to », what the model writes after
# that, and for an infill the suffix after ‖. Its head names the language, the reason to end and
# what the case shows.
CALLS = "".join(
    f"print(add({', '.join(map(str, range(first, first + 28)))}))\n"
    for first in (3, 31, 101, 201, 301)
)
VALUES = "".join(f"    value{number} = compute_the_next_value({number}),\n" for number in range(14))
ROWS = [
    ("python block: a docstring with a call",
     "def f():\n«    '''Like resume().'''\n    return 1\n»\n\ndef resume():\n    pass"),
    ("python block: docstring first", 'def f():\n    """Doc.\n\n    x"""\n«    return 1\n»x = f()'),
    ("python block: the whole function", "def f(xs):\n  for x in xs:\n«    print(x)\n  return 1\n"
                                         "»\ny = 1"),
    ("python block: a class",
     "class A:\n  x = 1\n«\n  def f(self):\n    return 1\n\n  def g(self):\n    return 2\n»\n"
     "class B:"),
    ("python block: comments at column 0 below blank lines",
     "def f():\n«    x = 1\n\n# note\n# more\n\n    return g(x)\n"
     "\n# what it calls\ndef g(x):\n    return x\n»\n# Tests\nf()"),
    ("python end: a comment below a blank line, last", "def f():\n«    return 1\n»\n# Tests\n"),
    ("python block: a header with a comment", "def f(x):  # why\n    if x:\n«        g()\n"
                                              "    return 1\n»\nf()"),
    ("python block: else", "if a:\n«    b()\nelif c:\n    d()\nelse:\n    e()\n»\nelsewhere = 1"),
    ("python block: try", "try:\n«    b()\nexcept E:\n    d()\nfinally:\n    e()\n»\nf()"),
    ("python block: helpers",
     "def f(x):\n«  return g(x) + g(1)\n\n\ndef g(x):\n  return h(x)\n\nasync def h(x):\n"
     "  return x\n»\ndef k(x):"),
    ("rust block: a helper that it calls",
     "fn f(x: i32) -> u8 {\n«  g(x)\n}\n\nfn g(x: i32) -> u8 {\n  x\n}\n»\nfn main() {"),
    ("python block: a window that starts in a docstring",
     '    Returns x.\n    """\n    if not s:\n        return ""\n'
     '    x = 1\n«    return x\n»\ndef g():\n    """Doc."""'),
    ("python block: a window that starts in a docstring and ends in one",
     '    Returns x.\n    """\n    y = 1\n    return x\n\ndef g(x):\n'
     '    """\n«    Doc.\n\n    More.\n    """\n    return x\n»\ndef h():'),
    ("python block: a statement", "y = «[1,\n\n2]\nz = 1\n»\nprint(y)"),
    ("python block: after a comment",
     "# The gcd\n«import math\n\ndef gcd(a, b):\n    return math.gcd(a, b)\n»\nprint(1)"),
    ("python block: a decorator",
     "class A:\n  x = 1\n\n  @property\n«  def f(self):\n    return 1\n»\n  def g(self):\n"
     "    return 2"),
    ("python block: a member and a comment",
     "class A:\n  x = 1\n\n  # sum\n«  def f(self):\n    return 1\n»\n  def g(self):\n"
     "    return 2"),
    ("python block: a blank line above the member",
     "class A:\n  x = 1\n\n  # sum\n«\n  def f(self):\n    return 1\n»\n  def g(self):\n"
     "    return 2"),
    ("python block: repeated lines before the end", "def f():\n«    a()\n    a()\n    a()\n"
                                                    "    a()\n»x = 1"),
    ("python block: no body comes", 'def f():\n    """Doc."""\n«»\n\ndef g():\n    pass'),
    ("python stop: a fence", "def f():\n«    return 1\n»```\n\nThis function"),
    ("python block: typed indentation again", "def f():\n    x = 1\n    «    return x\n»\nf()"),
    ("javascript block: a callback", "app.get('/', (req, res) => {\n«  res.send({a: 1});\n});\n»\n"
                                     "app.listen();"),
    ("javascript block: an expression", "const f = (xs, k) =>« xs.reduce((a, x) => {\n  return a;\n"
                                        "}, {});\n»\nf();"),
    ("javascript block: a chain of calls",
     "fetch(u)\n .then(r => {\n«  g(r);\n })\n .catch(e => {\n  h(e);\n });\n»\nf();"),
    ("javascript block: an inner callback",
     "function f(a) {\n  a.map(x => {\n«    g(x);\n  });\n  return a;\n}\n»\nf([]);"),
    ("javascript block: the class's end comes along", "class A {\n  f() {\n«    return 1;\n  }\n}\n"
                                                      "»\nnew A();"),
    ("javascript block: else on a new line", "if (a) {\n«  b();\n}\nelse {\n  c();\n}\n»d();"),
    ("javascript block: if and else without braces", "if (x)\n«  y();\nelse\n  z();\n»\nf();"),
    ("javascript block: an if in a loop, without braces", "for (const a of b)\n«  if (a)\n"
                                                          "    f(a);\n»\ng();"),
    ("javascript block: import, no semicolon", 'import a from "a"\n«\nfunction f() {\n  return a;\n'
                                               '}\n»\nf();'),
    ("javascript block: an if without semicolons", "if (x)« return\n»const y = 2"),
    ("javascript block: a loop without braces", "for (;;)«\n  g();\n»\nf();"),
    ("javascript block: no semicolons", "const x =« f(1) // one\n»const y = 2"),
    ("typescript block: a whole class",
     "class A<T> {\n«  x: { y: T };\n  f(): T {\n    return 1;\n  }\n}\n»\nnew A();"),
    ("typescript block: a member and a comment",
     "class A {\n  // Sum.\n«  sum() {\n    return 1;\n  }\n»\n  g() {}\n}"),
    ("java block: a member after a comment",
     "class A {\n  /** Sum. */\n«  int sum() {\n    return 1;\n  }\n»\n  int g() { return 2; }\n}"),
    ("rust block: lifetimes, characters and raw strings",
     "fn f<'a>(x: &'a str) -> &'a str {\n«    let c = '{'; let d = '\\'';\n"
     "    'l: loop { break 'l; }\n"
     '    let a = r"\\"; let b = r#"}"}"#; let e = r###"}"##"###;\n    "two\nlines}"\n}\n»\n'
     'fn g() {'),
    ("rust block: an impl's method",
     "impl A {\n  fn f(&self) -> i32 {\n«    match x { 1 => 2, _ => 3 }\n  }\n}\n»\nfn main() {}"),
    ("rust block: a signature in progress", "fn f(x: i32)« -> i32 {\n    x + 1\n}\n»\nfn main() {"),
    ("c block: directives, characters",
     "int f(char c) {\n«#define A { // don't\n  if (c == '{' || c == '\"') { return 1; }\n}\n»\n"
     "int main() {"),
    ("c block: a brace on its own line",
     "int f(int x)\n«{\n  if (x)\n  {\n    return 1;\n  }\n  return 0;\n}\n»\nint main()"),
    ("c block: a typedef", "typedef struct {\n«    int x;\n} point;\n»\nint main() {"),
    ("c block: after includes",
     "#include <stdio.h>\n\n«struct a {\n  int x;\n};\n\nint f() {\n  return 1;\n}\n»\n"
     "int main() {"),
    ("c block: a macro over lines", "#define M(a) \\\n«    do { a; } while (0)\n»int f() {"),
    ("c stop: a fence right behind", "int f() {\n«    return 1;\n}»```\n\nThis"),
    ("cpp block: a class",
     "template <typename T>\nclass Queue {\n«public:\n    void push(T x) { items.push_back(x); }\n"
     "private:\n    std::vector<T> items;\n};\n»\nint main() {"),
    ("cpp block: in a namespace", "namespace a {\n\nint f() {\n«  return 1;\n}\n\n"
                                  "}  // namespace a\n»\nint main() {"),
    ("cpp block: an initializer list", "A::A(int x)\n«    : a{x},\n      b(x)\n{\n    c = x;\n}\n"
                                       "»\nint f() {"),
    ("go block: a method of go",
     'type S struct {\n\tx int\n}\n\nfunc (s *S) X() int {\n«\tt := `}` + "}"\n'
     "\tfor _, c := range t {\n\t\tif c == '}' {\n\t\t\treturn\n\t\t}\n\t}\n}\n»\nfunc g() {"),
    ("go block: a package", 'package main\n«\nimport "fmt"\n\nfunc main() {\n\tfmt.Println(1)\n}\n'
                            '»\nfunc f() {'),
    ("go block: a variable", "var x =« f(1)\n»var y = 2"),
    ("kotlin block: package, no semicolon", "package a\n«\nimport b.C\n\nfun f() {\n    C()\n}\n»\n"
                                            "fun g() {"),
    ("kotlin block: below a class without a body",
     "class Empty\n\nfun f() {\n  if (x) {\n«    g()\n  }\n  h()\n}\n»\nfun k() {}"),
    ("shell end: a shebang", "#!/bin/bash\n«\nset -e\n\nf() {\n    echo 1\n}\n\nf\n»"),
    ("python stop: a whole line", "def f():\n    x = 1\n«    y = x\n»    return y\n‖    return y"),
    ("python stop: the line's rest", "def f(a«, b):»\n    return a\n‖\n    return a"),
    ("python stop: within a string", 'x = "hello« world»"\ny = 1\n‖"\ny = 1'),
    ("python stop: an opening bracket", "encoding_m«ap = »{\n    1: 2}\n‖{\n    1: 2}"),
    ("python stop: a header", "def f():\n    «if x:»\n        return 1\n‖\n        return 1"),
    ("python stop: the suffix at once", "def f():\n«»    return the_value_of(x)\n"
                                        "‖    return the_value_of(x)"),
    ("python stop: brackets", "x = 1\n«y = f(\n    1,\n)»\nz = 3\n‖\nz = 3"),
    ("python stop: indentation again", "def f():\n    x = 1\n    «    return x»\n\nf()\n‖\n\nf()"),
    ("javascript stop: a block", "function f(x) {\n«  if (x) {\n    g();\n  }\n»}\n\nf();\n‖}\n"
                                 "\nf();"),
    ("javascript stop: a block to close", "function f(x) {\n«  if (x) {\n    g();\n  }\n}»\n\n"
                                          "f();\n‖\n\nf();"),
    ("go end: an argument", 'fmt.Println(«f(x), "a)"»)\n}\n‖)'),
    ("python block: the last line's rest, written again",
     "def f(a, b):\n    «retu»rn a\n\n# Test it\nprint(f(3, 5))\n‖rn a"),
    ("python stop: a line of a dictionary",
     "x = {\n  'one': 1,\n«  'eight': 8,»\n  'nine': 9\n}\nprint(x)\n‖\n  'nine': 9\n}\nshow(x)"),
    ("python end: the suffix's line with a remark",
     "def f(a, b):\n  «return a + b»\n\nprint(f(1, 2))  # Output: 3‖\n\nprint(f(1, 2))"),
    ("python stop: a remark, and more",
     "def f(a, b):\n  «return a + b»\n\nprint(f(1, 2))  # 3\nprint(f(3, 4))\n‖\n\nprint(f(1, 2))"),
    ("python end: more than a remark", "def f(a, b):\n  return «a + b\n\n\nprint(f(1, 2)) + 1\n»‖\n"
                                       "\n\nprint(f(1, 2))"),
    ("python end: a closed string", 'print("«hello»")‖")'),
    ("python stop: a closed string, and more", 'print("«hello»")\nprint("world")\n‖")'),
    ("python end: the call's second string", 'print("a", "«b", "c»")‖")'),
    ("go end: the type in aligned columns", "type A struct {\n\tNa«me»‖     string\n}"),
    ("python stop: several lines",
     "def f(xs):\n  total = su«m(xs)\n  count = len(xs)\n  return total / »max(count, 1)\n"
     "‖max(count, 1)"),
    ("python stop: a rest that comes twice", "x = f(a«, 1)\ny = g(b»)\nz = h(c)\n‖)\nz = h(c)"),
    ("python stop: a word begun in the gap", "import os\n«import lo»gging\nimport sys\n‖gging\n"
                                             "import sys"),
    ("python stop: blank lines and spaces differ", "a = so«me»=thing(1)\n\nb = other(2)\n"
                                                   "‖ = thing(1)\nb = other(2)"),
    ("python stop: indentation half typed",
     "def f(x):\n  if x:\n    a = «g(x)\n  »  return a + 1\n  return 2\n‖  return a + 1\n"
     "  return 2"),
    ("python stop: lines of a call",
     "x = dict(\n  a=1,\n«  b=two(\n    2,\n  ),\n»  cc=three(3),\n)\n‖  cc=three(3),\n)"),
    ("python stop: lines that begin alike",
     "self.eq(a, 1)\n«self.eq(b, 2)\nself.eq(c, 3)\n»self.eq(dd, 4)\n‖self.eq(dd, 4)\n"
     "self.eq(ee, 5)"),
    ("python end: a blank line in the block",
     "def f(a):\n  x = «a + 1\n\n  y = compute_another(x)\n  return y»‖\n\nprint(f(1))"),
    ("python stop: a fence below a gap",
     "def f(xs):\n  a = «[x for x in xs if x]\n  return a»\n```\n\nThis keeps\n‖\n"
     "  return [min(a)]"),
    ("python stop: a fence below an example", "def f(xs):\n  y = []\n«  return xs\n»\nprint(f(1))\n"
                                              "```\n‖  return y"),
    ("python end: a fence in a docstring",
     "def f():\n«    '''Doc.\n\n    ```\n    f()\n    ```\n    '''\n    return 1\n»‖\ndef g():\n"
     "    pass"),
    ("python block: a short rest, and other lines below it",
     "env['CONTENT_LENGTH'«] »= ''\nenv['SCRIPT_FILENAME'] = self.path\n"
     "env['REMOTE_ADDR'] = self.client_address[0]\n‖=''\nenv['SCRIPT_NAME'] = ''"),
    ("python stop: an import like the next",
     "import sys\n«import os»\nimport re\nimport stat\n‖\nimport re\nimport stat"),
    ("python stop: an if with else in a gap", "if level:\n«    a()\nelse:\n    b()»\n\nc()\n"
                                              "‖\nc()"),
    ("go stop: several lines",
     "func f(xs []int) int {\n\ts«um := 0\n\tfor _, x := range xs {\n"
     "\t\tsum +»= x * weight\n\t}\n‖= x * weight\n\t}\n\treturn 1"),
    ("none stop: a line", "def f():\n    x = 1\n    «y = x»\n    return y\n‖\n    return y"),
    ("none stop: a bracket", "puts f(«a, g(b)»)\ny = 1\n‖)\ny = 1"),
    ("none block: a body",
     "void f(int x) {«\n    g(x);\n»}\n\nvoid h() {\n    another();\n"
     "    and_another_one(that, is, longer, than, the, rest, of, the, line, may, wait, for, it);\n"
     "‖}\n\nint main() {"),
    ("none stop: lifetimes", "fn f<'a>(x: &'a str) -> &'a str {\n  let y = cut(«x, size(x)»);\n"
                             "  y\n}\n‖);\n  y\n}"),
    ("none stop: a fence of a text's own", "# Title\n```sh\n«make test»\n```\n\nThen run it.\n‖\n"
                                           "```\n\nThen run it."),
    ("none stop: indentation in tabs", "all: x\n\t«make y»\n\tmake zzz\n‖\n\tmake zzz"),
    ("python stop: CRLF, a line", "def f():\r\n    x = 1\r\n«    y = 2»\r\n    return x\r\n‖\r\n"
                                  "    return x\r\n"),
    ("python stop: CRLF, a whole line", "x = 1\r\n«y = 2\r\n»return x\r\n‖return x\r\n"),
    ("python stop: many blank lines", "x = 1\n«y = 2»\n\n  z = 3\nw‖" + "\n" * 50 + "  z = 3\n"),
    ("python block: a long comment below a blank line", "def f():\n«    return 1\n»\n" + 3 * f"# {90 * '-'}\n"),
    ("python block: within the brackets of a header", f"if f(\na,\n«b,\n»{CALLS}‖c,\n):\n"
                                                      f"    g()\n"),
    ("python end: entries between brackets that the editor has closed", f"c = {{«\n{VALUES}»‖}}\n\n"
                                                                        f"print(c)"),
    ("javascript end: a long body before its bracket", f"function f(a) {{\n«{VALUES}»‖}}\n\n"
                                                       f"function g() {{"),
    ("python end: a long rest of a function", f"def f(a):\n    «{VALUES.lstrip()}»‖\n\ndef g():\n"
                                              f"    pass"),
    ("python block: a blank line at the end of the cursor's block",
     f"def add(a, b):\n    return «a + b»\n\n{CALLS}‖\n\n\nprint(add(1, 2))\n"),
    ("python block: a comment outside the block of the gap",
     f"def f(x):\n    x = x.strip()\n«    return x == x[::-1]\n»\n# Test it\nprint(f(''))\n"
     f"{CALLS}‖    return True"),
    ("javascript block: a model that never comes to the suffix",
     f"function f(x) {{\n«  if (x) {{\n    a()\n  }}\n»{CALLS}‖  done(x)\n}}\n"),
    # Without a language that we know.
    ("none block: two blank lines", "def f\n«  1\nend\n»\n\ndef g\n"),
    ("cobol block: two blank lines", "def f\n«  1\nend\n»\n\ndef g\n"),
    ("none block: two blank lines and a blank suffix", "def f\n«  1\nend\n»\n\ndef g\n‖\n"),
    ("none block: blank lines with spaces", "a\n«b\n»  \n\t\nc"),
    ("none end: one blank line", "a\n«b\n\nc\n»"),
    ("none block: blank lines first", "a\n«\n\n\nb\n»\n\nc"),
    ("none block: within a line", "a = «b\n»\n\nc"),
    ("none end: a fence", "# Title\n«```\nx\n```\n»"),
    ("none repeat: repetition", "a\n«self.a = a\nself.a = a\n»" + "self.a = a\n" * 11),
]  # fmt: skip
LONG = r'''
=== python block: what ends no function
def f():
«    x = "" + g([
1,
])
    x = """
text
"""
# note
    x = 1 + \
2
    x = 'it\'s' + "#" + r'\'' + f"{x!r}"  # don't
    x = b'}' + x if x in'abc' else rb'{'
    return (
x)
»
f()
=== javascript block: strings, templates, regexes, divisions and JSX
function F({ a, b, c }) {«
  const s = "}" + '}' + `}${a + "}"}` + /[}]\}/.source; // }
  if (s) { h(); }
  /[({]/.test(s) && h();
  const d = <p>{a}/{c && (b)}</p>;
  const e = <p>{b} / {c && (
    b
  )}</p>;
  const f = (a) / b / 2; /* } */
  const g = <p>Don't {a}/{c && (
    <b>{b} / {"("}</b>
  )}</p>;
  return g
}
»
function g() {}
=== cpp block: digits and raw strings, one with a long name in the prompt
const char *page = R"delimiter12(a " b {)delimiter12";
int f() {
«    auto s = R"(})"; int n = 1'000'0 + 0xFF'FF; std::vector<int> v{1, 2};
    auto u = u8R"json({"a": ")"})json"; auto t = STR"a(" R"(\)";
    return n;
}
»
int main() {
=== python block: a paragraph below a line without its rest
def f(a):
    r«eturn a»

    return [x + 1 for x in sorted(a) if x > 0 and is_even(x) and not is_prime(x) and x not in seen_before(a)]
‖for x in a]
=== python block: the lost rest of a line
valu«e = compute()»
other = compute_more()
another = compute_it_all(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)
‖ if elsewhere() else None
'''

# Answers of a chat, the code between « and ».
ANSWERS = [
    (
        "python stop: chatter around",
        "Sure! Here is it:\n\n```python\n«def f():\n    pass\n»```\n\nThis function",
    ),
    ("python end: bare code", "«def f():\n    pass\n»"),
    ("python stop: bare code, then a fence", "«import os\nx = 1\n»```\n\nThat"),
    ("python end: no language", "```\n«x = 1\n»```"),
    ("python stop: tildes", "~~~py\n«x = '```'\n```\n»~~~\nbye"),
    ("python stop: indented", "1. Do:\n   ```python\n«   if x:\n       y()\n»   ```\nbye"),
    ("python stop: a nested block", "```markdown\n«# T\n```sh\nls\n```\nend\n»```\nbye"),
    ("markdown stop: a nested block", "```markdown\n«# T\n```sh\nls\n```\nend\n»```\nDone.\n"),
    (
        "python stop: in a docstring",
        '```python\n«def f():\n    """\n    ```\n    x\n    ```\n    """\n»```\nbye',
    ),
    ("python end: prose alone", "«I cannot do that.»"),
    (
        "python end: code in the thoughts",
        "<think>Like:\n```python\nx = 2\n```\n</think>\n```python\n«x = 1\n»```",
    ),
    ("python end: thoughts right above", "<think>\nhm</think>```python\n«x = 1\n»```"),
    ("python end: thoughts begun in the prompt", "Perhaps:\nx = 2\n</think>\n```python\n«x = 1\n»"),
    ("python end: cut off", "```python\n«x = 1\ny =»"),
    (
        "python stop: a shell command first",
        "Run:\n```bash\npip install x\n```\nThen:\n```python\n«x\n»```\nMore",
    ),
    (
        "python stop: a fence in a command",
        "Run:\n```bash\ncat <<E\n```x\nE\n```\nThen:\n```python\n«x\n»```\n",
    ),
    ("shell stop: a shell command", "Here:\n```bash\n«ls\n»```\nDone.\n"),
    ("json stop: json", "Here:\n```json\n«{}\n»```\nDone.\n"),
    ("python stop: json first", "Given:\n```json\n{}\n```\nuse:\n```\n«x\n»```\n"),
    (
        "python stop: a heading and prose",
        "### Sum\n\n**Note**: `f` adds.\n```python\n«x\n»```\n\n### Use\nIt is f.",
    ),
    ("shell stop: a heading right above", "# Sum\n```sh\n«ls\n»```\nDone.\n"),
    ("yaml stop: headings and a list", "# Sum\n\n## Steps\n\n1. Do:\n- that\n```\n«a: 1\n»```\n"),
    ("ruby stop: a heading that is not English", "# Lösung\n\nFür alle:\n```ruby\n«x\n»```\n"),
    (
        "python stop: a heading, then a shell command",
        "# A\nRun:\n```sh\nls\n```\nThen:\n```py\n«x\n»```\nx",
    ),
    ("c stop: a heading", "## Sum\nint x;\n```c\n«int y;\n»```\n"),
    ("python stop: a comment", "«# Sum\n\n# of all\nX = 1\n»```\nThat"),
    ("shell stop: a comment", "«# List\nls -l\n»```\nThat"),
    ("r stop: a comment", "«# Sum\nDf <- read(x)\n»```\nThat"),
    ("yaml stop: a comment", "«# Sum\n- name: x\n»```\nThat"),
    ("dockerfile stop: a comment", "«# Build\nFROM a\n»```\nThat"),
    ("shell stop: a shebang", "«#!/bin/sh\n# List\nls\n»```\nThat"),
    ("c stop: a directive", "«#include <a.h>\nint x;\n»```\nThat"),
    ("python end: a heading and prose alone", "«### Sum\n\nI cannot do that.\n»"),
    ("python end: a comment alone", "«# Sum»"),
    (
        "python end: shell commands alone",
        "Run:\n```bash\n«ls\n»```\nor\n```sh\nls -l\n```\nin a shell.\n",
    ),
    ("python end: a shell command alone", "Run:\n```bash\n«ls\n»```"),
]

# (title, the start of the answer that the model is given, what it writes, what is sent and why it
# ends)
BEGUN = [
    ("a fence", "```python\n", "x = 1\n```\nThat is it.", ("x = 1\n", "stop")),
    ("a fence after chatter", "Sure:\n```python\n", "x = 1\n```", ("x = 1\n", None)),
    ("some of the code", "```python\ndef f():\n    '''", "```\n'''\n```\n", ("```\n'''\n", "stop")),
    ("a block that is closed", "```\nx\n```\nAnd", ":\n```\ny\n```\n", ("y\n", "stop")),
    ("another language's fence", "```bash\nls", " -l\n```\nThat is it.", (" -l\n", "stop")),
    ("another language's block", "```bash\nls\n```\nAnd", " that is it.", (" that is it.", None)),
    (
        "its fence once more",
        "```python\n",
        "```python\nx = 1\n```\nThat is it.",
        ("x = 1\n", "stop"),
    ),
    ("a longer fence", "````markdown\n", "```\nx\n```\ny\n````\n", ("```\nx\n```\ny\n", "stop")),
    (
        "a short fence in its place",
        "````markdown\n",
        "```\nx\n```\ny\n```",
        ("```\nx\n```\ny\n", None),
    ),
    ("the end of a block", "````markdown\n", "y\n```\nx\n```", ("y\n```\nx\n```", None)),
    ("chatter alone", "Here you", " are:\n```\ny\n```\n", ("y\n", "stop")),
    ("code without a fence", "import os\n", "x = 1\n", ("x = 1\n", None)),
    (
        "thoughts",
        "<think>\nhm",
        " x</think>\n```python\nabcdef = 1\n```\n",
        ("abcdef = 1\n", "stop"),
    ),
]

REPEAT = [  # (title, text, what is sent of it if the text is cut)
    ("a line", "x = 1\nself.a = a\n" + "self.a = a\n" * 13, "x = 1\nself.a = a\nself.a = a\n"),
    (
        "a block",
        "try:\n    a()\nexcept E:\n    b()\n" * 5,
        "try:\n    a()\nexcept E:\n    b()\n" * 2,
    ),
    ("closing braces", "    }\n" * 9, ""),
    ("a table", "    [0, 0, 0],\n" * 12, ""),
    ("numbers", "".join(f"    {n}: {n * n},\n" for n in range(40)), ""),
    ("blank lines", "x = 1\n\n\n\n\n\n\n\n\ny = 2\n", ""),
    ("nested closers", "".join(f"{' ' * n}</div>\n" for n in range(24, 0, -2)), ""),
    ("equal closers", "</div>\n" * 9, ""),
    ("eleven equal calls", "f.readline()\n" * 11 + "g()\n", ""),
    ("a long string", 's = "' + "=" * 200 + '"\n', ""),
]
REPEATED = [
    (name, "", f"```\n{text}", (sent, "repeat") if sent else (text, None))
    for name, text, sent in REPEAT
]


@pytest.mark.parametrize("module", [ending, languages, prompt])
def test_the_examples_of_the_modules_are_true(module: object) -> None:
    assert doctest.testmod(module).failed == 0


def run(ending: Ending, pieces: list[str]) -> Outcome:
    out = ""
    for piece in pieces:
        text, reason = ending.feed(piece)
        out += text
        if reason:
            return out, reason
    return out + ending.flush(), None


def check(
    mode: str,
    language: str | None,
    prompt: str,
    suffix: str,
    text: str,
    expected: Outcome,
    start: int = 0,
) -> None:
    """Feed the text whole, by characters, and in random pieces."""
    chance = random.Random(len(text))
    places = sorted(chance.sample(range(len(text) + 1), len(text) // 4))
    pieces = [text[start:stop] for start, stop in itertools.pairwise([0, *places, len(text)])]
    for split in ([text], list(text), pieces):
        ending = Ending(mode, language, prompt, suffix, "auto")
        assert (run(ending, split), ending.start) == (expected, start)


def cases(rows: list[tuple[str, str]], long: str) -> list[tuple[str, str]]:
    texts = long.removeprefix("\n=== ").removesuffix("\n").split("\n=== ")
    return [*rows, *((head, text) for head, _, text in (one.partition("\n") for one in texts))]


def title(case: tuple[str, ...]) -> str:
    return case[0]


def check_case(case: tuple[str, str]) -> None:
    head, text = case
    language, reason, *name = head.replace(":", "").split()
    prompt, _, rest = text.partition("«")
    kept, _, more = rest.partition("»")
    more, infill, suffix = more.partition("‖")
    expected = kept.lstrip(" ") if "again" in name else kept
    known, why = None if language == "none" else language, None if reason == "end" else reason
    check("infill" if infill else "complete", known, prompt, suffix, kept + more, (expected, why))


@pytest.mark.parametrize("case", cases(ROWS, LONG), ids=title)
def test_code(case: tuple[str, str]) -> None:
    check_case(case)


@pytest.mark.parametrize("case", ANSWERS, ids=title)
def test_chat(case: tuple[str, str]) -> None:
    head, text = case
    language, reason = head.partition(":")[0].split()
    code = text[text.index("«") + 1 : text.index("»")]
    answer, why = text.replace("«", "").replace("»", ""), None if reason == "end" else reason
    check("instruct", language, "", "", answer, (textwrap.dedent(code), why), text.index("«"))


@pytest.mark.parametrize("case", BEGUN + REPEATED, ids=title)
def test_an_answer(case: tuple[str, str, str, Outcome]) -> None:
    _, begun, text, expected = case
    check("instruct", "python", begun, "", text, expected, text.index(expected[0]))


HALF = [(f"word{number} ", 0.5) for number in range(9)]  # each costs a bit
# prompt, suffix, tokens, what is sent, and how many tokens are read before that is known (0: it
# goes on)
DOUBTS = [
    ("x = ", "\ny = 2\n", [("1", 0.9), ("\n", 0.9), *HALF], "1", 6),
    ("x = ", "\ny = 2\n", [("1", 0.001), ("\n", 0.001), *HALF], "1", 6),
    ("x = ", "\ny = 2\n", [("1", 0.9), ("\n", 0.9), *((word, 0.9) for word, _ in HALF)], "1", 0),
    ("x = ", "\ny = 2\n", [("1", 0.9), ("\n", 0.9), ("z ", 0.0)], "1", 3),
    ("a = 1\n", "y = 2\n", [("x = 1", 0.9), ("\n", 0.9), *HALF], "x = 1\n", 9),
    ("    ", "\ny = 2\n", [("x = 1", 0.9), ("\n", 0.9), *HALF], "x = 1", 9),
    ("a = (", ")\ny = 2\n", [("1, ", 0.9), ("2)", 0.9), ("\n", 0.9), *HALF], "1, 2", 7),
    (
        "def f():\n    if x:\n        ",
        "\n\nf()\n",
        [("a()", 0.9), ("\n        ", 0.9), *HALF[:8]],
        "a()",
        0,
    ),
]


@pytest.mark.parametrize(("prompt", "suffix", "tokens", "kept", "read"), DOUBTS)
def test_an_unsure_text_behind_a_possible_end_is_not_followed_for_long(
    prompt: str, suffix: str, tokens: list[tuple[str, float]], kept: str, read: int
) -> None:
    ending, sent = Ending("infill", "python", prompt, suffix, "auto"), ""
    for number, (text, probability) in enumerate(tokens, 1):
        out, reason = ending.feed(text, probability)
        sent += out
        if reason:
            assert (sent, reason, number) == (kept, "block", read)
            return
    assert (sent, read) == (kept, 0)


def test_one_line_without_end() -> None:
    text, reason = run(Ending("complete", "python", "x = [", "", "auto"), list("0, " * 300))
    assert reason == "repeat"
    assert len(text) <= 400


OPENS = 'def f(x):\n    {} """\n    x = 1\n    """\n    '


@pytest.mark.parametrize(
    ("language", "prompt", "in_code"),
    [
        *(
            ("python", OPENS.format(it), True)
            for it in ("return", "yield", "x = x +", "return 'a' %", "return not")
        ),
        ("python", '    Text that ends here.\n    "\n    x = 1\n    ', True),
        ("python", '    It ends here. "\n    x = 1\n    ', True),
        ("javascript", "const f = (text) => /`/.test(text)\n", True),
        ("shell", "cut -d'\"' -f2 names\n", True),
        ("shell", 'x="`tr -d \'"\' <names`"\nf() {\n    ', True),
        ("shell", 'x="$(case $y in a) echo "it\'s" ;; esac)"\nf() {\n    ', True),
        ("python", 'def f():\n    return """\n    x', False),
        ("python", 'x = 1\n\n"""\ndef f', False),
        ("python", "def f():\n    g('''a", False),
    ],
)
def test_whether_the_cursor_is_in_code(language: str, prompt: str, in_code: bool) -> None:
    assert (ending.scan(LANGUAGES[language], prompt).closer == "") == in_code


@pytest.mark.parametrize("language", ["python", "cobol", None])
def test_off(language: str | None) -> None:
    text = "    pass\n\n\n\nprint(1)\n```\n" + "x\n" * 20
    assert run(Ending("complete", language, "def f():\n", "", "none", indent=4), list(text)) == (
        text,
        None,
    )
    assert run(
        Ending("infill", language, "def f():\n", "\nprint(1)\n", "none", indent=4), [text]
    ) == (text, None)
    assert run(Ending("instruct", language, "", "", "none"), ["```\nx\n```\nbye"]) == (
        "x\n",
        "stop",
    )


# (title, language, prompt, suffix or None, indent, what the model writes, what is sent and why it
# ends)
LEAST_INDENTS = [
    (
        "a line that is indented less",
        None,
        "def f\n",
        None,
        2,
        "  a\n  b\nend\n",
        ("  a\n  b\n", "block"),
    ),
    ("below blank lines", None, "def f\n", None, 2, "  a\n\nend\n", ("  a\n", "block")),
    ("blank lines", None, "def f\n", None, 2, "  a\n\n  b\n", ("  a\n\n  b\n", None)),
    ("the cursor's own line", None, "def f\n", None, 2, "a\n  b\nend", ("a\n  b\n", "block")),
    ("within a line", None, "  x = ", None, 2, "a\n  b\nend", ("a\n  b\n", "block")),
    ("tabs", None, "f:\n", None, 1, "\ta\n\tb\nc\n", ("\ta\n\tb\n", "block")),
    ("fewer tabs", None, "f:\n", None, 2, "\t\ta\n\tb\n", ("\t\ta\n", "block")),
    ("none wanted", None, "def f\n", None, 0, "  a\nend\n", ("  a\nend\n", None)),
    (
        "of Python",
        "python",
        "def f():\n    if x:\n",
        None,
        8,
        "        a\n    b\n",
        ("        a\n", "block"),
    ),
    ("an infill's line end", None, "  x = 1\n  ", "\n  zzz = 3\n", 2, "[\n1]", ("[", "block")),
    (
        "an infill of whole lines",
        None,
        "  x = 1\n",
        "  zzz = 3\n",
        2,
        "  y = [\n1]",
        ("  y = [\n", "block"),
    ),
]


@pytest.mark.parametrize("case", LEAST_INDENTS, ids=title)
def test_least_indentation(
    case: tuple[str, str | None, str, str | None, int, str, Outcome],
) -> None:
    _, language, prompt, suffix, indent, text, expected = case
    for pieces in ([text], list(text)):
        mode = "complete" if suffix is None else "infill"
        assert (
            run(Ending(mode, language, prompt, suffix, "auto", indent=indent), pieces) == expected
        )


# (title, language, prompt, white space that the model writes first, what is sent of it)
TYPED = [
    ("all of it", "python", "def f():\n    x = 1\n    ", "    ", ""),
    ("the missing space", "python", "def f():\n    x = 1\n   ", " ", " "),
    ("three of four, and all again", "python", "def f():\n    x = 1\n   ", "    ", " "),
    ("half of a deeper block", "python", "def f():\n    if x:\n        y()\n    ", "    ", "    "),
    ("a body's half", "python", "def f():\n  x = 1\n\ndef g():\n ", " ", " "),
    ("a body's first level", "python", "def f():\n    if x:\n    ", "    ", "    "),
    ("tabs", "go", "func f() {\n\tif x {\n\t\ty()\n\t", "\t", "\t"),
    ("tabs again", "go", "func f() {\n\tx()\n\t", "\t", ""),
    (
        "tabs below spaces",
        "javascript",
        "f(() => {\n  x();\n});\nif (y) {\n\tif (z) {\n\t",
        "\t",
        "\t",
    ),
    ("an array", "json", '{\n  "a": [\n  ', "  ", "  "),
    ("C", "c", "int f() {\n    x();\n   ", "     ", " "),
    ("Rust", "rust", "fn f() {\n    x();\n  ", "  ", "  "),
    ("no language", None, "def f\n  x\n ", "  ", " "),
    ("no language, a header", None, "class A\n  def f\n   ", "  ", " "),
    ("no language, a header, all of it", None, "class A\n  def f\n    ", "    ", ""),
]


@pytest.mark.parametrize("case", TYPED, ids=title)
def test_typed_indentation(case: tuple[str, str | None, str, str, str]) -> None:
    _, language, prompt, written, sent = case
    check("infill", language, prompt, "\nz(2)\n", f"{written}y(1)", (f"{sent}y(1)", None))


SNIPPETS = r"""def f(): if x: else: return x class A { } { ( ) ' " / // /* */ # \ ` ``` ~~~ ${ ; , : = @ é r#"
    R"( R"a( 1 #if #else #endif define endef <<A A then @' '@ $$ $a$ BEGIN END CASE UPDATE""".split()  # noqa: SIM905
PIECES = st.lists(
    st.sampled_from(["\n", "\n\n", "    ", "  ", " ", "\t", '"""', *SNIPPETS]), max_size=60
)


TEXTS = PIECES.map("".join)
ASKED = st.tuples(
    st.sampled_from(["complete", "infill", "instruct"]),
    st.sampled_from(
        [
            "python",
            "javascript",
            "rust",
            "cpp",
            "go",
            "ruby",
            "scala",
            "powershell",
            "makefile",
            "sql",
            None,
        ]
    ),
    *(TEXTS, TEXTS, st.just("auto"), st.sampled_from([0, 2, 4])),
)


@given(asked=ASKED, pieces=PIECES)
def test_any_split(asked: Any, pieces: list[str]) -> None:
    text = "".join(pieces)
    whole = run(Ending(*asked), [text])
    assert run(Ending(*asked), pieces) == whole
    assert run(Ending(*asked), list(text)) == whole


# ------------------------------------------------------------------------------------- stop strings


def splits(text: str) -> Iterator[list[str]]:
    """Every way to cut a short text into pieces."""
    for mask in range(1 << (len(text) - 1)):
        cuts = [0, *(i + 1 for i in range(len(text) - 1) if mask >> i & 1), len(text)]
        yield [text[a:b] for a, b in itertools.pairwise(cuts)]


STOPS: list[tuple[list[str], str, str, str | None]] = [
    # stops, text, what is sent, whether it stopped
    ([], "hello", "hello", None),
    (["\n\n"], "a\nb\n\nc", "a\nb", "stop"),
    (["abc"], "ababcx", "ab", "stop"),
    (["aab"], "aaaab", "aa", "stop"),
    (["END", "E."], "aEENDb", "aE", "stop"),
    (["abcX", "c"], "zabcX", "zab", "stop"),  # the first to be complete
    (["bc", "abc"], "zabcd", "z", "stop"),  # complete at the same place: the longer one
    (["xyz"], "abxy", "abxy", None),
    (["x"], "x", "", "stop"),
    (["é!"], "ré!a", "r", "stop"),
    (["abab!", "babx"], "xababx", "xa", "stop"),  # what was held is a part of another one
    (["aaab", "aab"], "aaaab", "a", "stop"),  # both at once
]


@pytest.mark.parametrize(("stops", "text", "sent", "stopped"), STOPS)
def test_stop_strings_over_every_split(
    stops: list[str], text: str, sent: str, stopped: str | None
) -> None:
    for pieces in splits(text):
        matcher, out = StopStrings(stops), ""
        for piece in pieces:
            passed, found = matcher.feed(piece)
            out += passed
            assert sent.startswith(out), "what was sent cannot be taken back"
            if found:
                break
        assert (out if found else out + matcher.flush(whole=True), found) == (sent, stopped)


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    matcher = StopStrings(["</s>", "\n\n"])
    sent = [matcher.feed(piece) for piece in ("a<", "b", "\n", "c")]
    assert sent == [("a", None), ("<b", None), ("", None), ("\nc", None)]
