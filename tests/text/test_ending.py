"""Where a completion ends: what a model writes after a prompt and where that is cut, however tokens
split the text.
"""

from __future__ import annotations

import doctest
import itertools
import random
import re
import textwrap
from collections.abc import Iterator
from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebrum.text import ending, languages, prompt
from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES
from cerebrum.text.stages import StopStrings

Outcome = tuple[str, str | None]  # everything that is sent, and why it ends
Asked = tuple[Any, ...]  # the arguments of Ending
VALUES = "".join(f"    value{number} = compute_the_next_value({number}),\n" for number in range(14))
CALLED = "".join(f"  console.log(item, {number});\n" for number in range(8))
DOCUMENTED = "".join(
    f" * line {number} says what the function is for, and what it returns.\n" for number in range(8)
)
LONG = {  # lines that are long together, by their names in the cases
    "calls": "".join(f"print(add({[*range(first, first + 28)]}))\n" for first in range(3, 303, 60)),
    "values": VALUES,
    "called": CALLED,
    "bare calls": CALLED.replace(";", ""),
    "documented": DOCUMENTED,
    "documented by ///": DOCUMENTED.replace(" * ", "/// "),
}
# Each case is a text: the prompt up to «, the part to keep up to », what the model writes after
# that, and for an infill the suffix after ‖. Its head names the language, the reason to end, the
# least indentation and what the case shows.
ROWS = [
    (
        "python stop: CRLF, a line",
        "def f():\r\n    x = 1\r\n«    y = 2»\r\n    return x\r\n‖\r\n    return x\r\n",
    ),
    ("python stop: CRLF, a whole line", "x = 1\r\n«y = 2\r\n»return x\r\n‖return x\r\n"),
    (
        "python block: CRLF, a line that goes on",
        "def f():\r\n«    x = 1 + \\\r\n        2\r\n»" + VALUES + "‖    return x\r\n",
    ),
    (
        "python block: CRLF, a window that starts in a docstring",
        '    x.\r\n    """\r\n\r\n    def g(x):\r\n«        """Doc."""\r\n        return x\r\n»'
        '\r\n    def h(x):\r\n        """Doc."""\r\n        return x\r\n',
    ),
    (
        "python block: tabs, a window that starts in a docstring",
        '\tx.\n\t"""\n\n\tdef g(x):\n«\t\t"""Doc."""\n\t\treturn x\n»\n\tdef h(x):\n\t\treturn x\n',
    ),
    ("none block: blank lines with spaces", "a\n«b\n»  \n\t\nc"),
    ("none end 2: CRLF, a line that is indented less", "  a\r\n  «b\r\n  c»\r\nd‖\r\ne\r\n"),
]
TEXTS = r'''
=== python block: docstring first
def f():
    """Doc.

    x"""
«    return 1
»x = f()
=== python block: the whole function
def f(xs):
  for x in xs:
«    print(x)
  return 1
»
y = 1
=== python block: a class
class A:
  x = 1
«
  def f(self):
    return 1

  def g(self):
    return 2
»
class B:
=== python block: a header with a comment
def f(x):  # why
    if x:
«        g()
    return 1
»
f()
=== python block: else
if a:
«    b()
elif c:
    d()
else:
    e()
»
elsewhere = 1
=== python block: try
try:
«    b()
except E:
    d()
finally:
    e()
»
f()
=== python block: helpers
def f(x):
«  return g(x) + g(1)


def g(x):
  return h(x)

async def h(x):
  return x
»
def k(x):
=== rust block: a helper that it calls
fn f(x: i32) -> u8 {
«  g(x)
}

fn g(x: i32) -> u8 {
  x
}
»
fn main() {
=== python block: a window that starts in a docstring
    Returns x.
    """
    if not s:
        return ""
    x = 1
«    return x
»
def g():
    """Doc."""
=== python block: a window that starts in a docstring and ends in one
    Returns x.
    """
    y = 1
    return x

def g(x):
    """
«    Doc.

    More.
    """
    return x
»
def h():
=== python block: a statement
y = «[1,

2]
z = 1
»
print(y)
=== python block: a decorator
class A:
  x = 1

  @property
«  def f(self):
    return 1
»
  def g(self):
    return 2
=== python block: a member and a comment
class A:
  x = 1

  # sum
«  def f(self):
    return 1
»
  def g(self):
    return 2
=== python block: below the last member
class A:
    # a name
«    n = 1
»print(A)
=== javascript end: a brace in a template
import fs from 'fs';

«console.log(`${fs}`);
const a = 1;
»
=== python block: a blank line above the member
class A:
  x = 1

  # sum
«
  def f(self):
    return 1
»
  def g(self):
    return 2
=== python block: repeated lines before the end
def f():
«    a()
    a()
    a()
    a()
»x = 1
=== python stop: a fence
def f():
«    return 1
»```

This function
=== python block: typed indentation again
def f():
    x = 1
    «    return x
»
f()
=== javascript block: a callback
app.get('/', (req, res) => {
«  res.send({a: 1});
});
»
app.listen();
=== javascript block: an expression
const f = (xs, k) =>« xs.reduce((a, x) => {
  return a;
}, {});
»
f();
=== javascript block: an inner callback
function f(a) {
  a.map(x => {
«    g(x);
  });
  return a;
}
»
f([]);
=== javascript block: the class's end comes along
class A {
  f() {
«    return 1;
  }
}
»
new A();
=== javascript block: else on a new line
if (a) {
«  b();
}
else {
  c();
}
»d();
=== javascript block: import, no semicolon
import a from "a"
«
function f() {
  return a;
}
»
f();
=== javascript block: an if without semicolons
if (x)« return
»const y = 2
=== typescript block: a whole class
class A<T> {
«  x: { y: T };
  f(): T {
    return 1;
  }
}
»
new A();
=== typescript block: a member and a comment
class A {
  // Sum.
«  sum() {
    return 1;
  }
»
  g() {}
}
=== java block: a member after a comment
class A {
  /** Sum. */
«  int sum() {
    return 1;
  }
»
  int g() { return 2; }
}
=== rust block: lifetimes, characters and raw strings
fn f<'a>(x: &'a str) -> &'a str {
«    let c = '{'; let d = '\'';
    'l: loop { break 'l; }
    let a = r"a"; let b = r#"}"}"#; let e = r###"}"##"###;
    "two
lines}"
}
»
fn g() {
=== rust block: an impl's method
impl A {
  fn f(&self) -> i32 {
«    match x { 1 => 2, _ => 3 }
  }
}
»
fn main() {}
=== rust block: a signature in progress
fn f(x: i32)« -> i32 {
    x + 1
}
»
fn main() {
=== c block: directives, characters
int f(char c) {
«#define A { // don't
  if (c == '{' || c == '"') { return 1; }
}
»
int main() {
=== c block: a brace on its own line
int f(int x)
«{
  if (x)
  {
    return 1;
  }
  return 0;
}
»
int main()
=== c block: a typedef
typedef struct {
«    int x;
} point;
»
int main() {
=== c block: after includes
#include <stdio.h>

«struct a {
  int x;
};
»
int f() {
=== cpp block: a class
template <typename T>
class Queue {
«public:
    void push(T x) { items.push_back(x); }
private:
    std::vector<T> items;
};
»
int main() {
=== cpp block: in a namespace
namespace a {

int f() {
«  return 1;
}

}  // namespace a
»
int main() {
=== cpp block: an initializer list
A::A(int x)
«    : a{x},
      b(x)
{
    c = x;
}
»
int f() {
=== go block: a method of go
type S struct {
	x int
}

func (s *S) X() int {
«	t := `}` + "}"
	for _, c := range t {
		if c == '}' {
			return
		}
	}
}
»
func g() {
=== go block: a package
package main
«
import "fmt"

func main() {
	fmt.Println(1)
}
»
func f() {
=== go block: a remark behind a variable
package m

var x =« 1 // one
»var y = 2
=== c block: a remark behind a declaration
static int x =« 1; /* one */
»static int y = 2;
=== sql block: a remark behind a statement
SELECT a FROM« b; -- all
»SELECT c;
=== go block: a variable
var x =« f(1)
»var y = 2
=== kotlin block: package, no semicolon
package a
«
import b.C

fun f() {
    C()
}
»
fun g() {
=== shell end: a shebang
#!/bin/bash
«
set -e

f() {
    echo 1
}

f
»
=== python stop: a whole line
def f():
    x = 1
«    y = x
»    return y
‖    return y
=== python stop: the line's rest
def f(a«, b):»
    return a
‖
    return a
=== python stop: within a string
x = "hello« world»"
y = 1
‖"
y = 1
=== python stop: an opening bracket
encoding_m«ap = »{
    1: 2}
‖{
    1: 2}
=== python stop: a header
def f():
    «if x:»
        return 1
‖
        return 1
=== python stop: the suffix at once
def f():
«»    return the_value_of(x)
‖    return the_value_of(x)
=== python stop: brackets
x = 1
«y = f(
    1,
)»
z = 3
‖
z = 3
=== python stop: indentation again
def f():
    x = 1
    «    return x»

f()
‖

f()
=== javascript stop: a block
function f(x) {
«  if (x) {
    g();
  }
»}

f();
‖}

f();
=== javascript stop: a block to close
function f(x) {
«  if (x) {
    g();
  }
}»

f();
‖

f();
=== go end: an argument
fmt.Println(«f(x), "a)"»)
}
‖)
=== python stop: a line of a dictionary
x = {
  'one': 1,
«  'eight': 8,»
  'nine': 9
}
print(x)
‖
  'nine': 9
}
show(x)
=== python end: more than a remark
def f(a, b):
  return «a + b


print(f(1, 2)) + 1
»‖


print(f(1, 2))
=== python end: a closed string
print("«hello»")‖")
=== python end: the call's second string
print("a", "«b", "c»")‖")
=== go end: the type in aligned columns
type A struct {
	Na«me»‖     string
}
=== python stop: several lines
def f(xs):
  total = su«m(xs)
  count = len(xs)
  return total / »max(count, 1)
‖max(count, 1)
=== python stop: a rest that comes twice
x = f(a«, 1)
y = g(b»)
z = h(c)
‖)
z = h(c)
=== python stop: a word begun in the gap
import os
«import lo»gging
import sys
‖gging
import sys
=== python stop: blank lines and spaces differ
a = so«me»=thing(1)

b = other(2)
‖ = thing(1)
b = other(2)
=== python stop: indentation half typed
def f(x):
  if x:
    a = «g(x)
  »  return a + 1
  return 2
‖  return a + 1
  return 2
=== python stop: lines of a call
x = dict(
  a=1,
«  b=two(
    2,
  ),
»  cc=three(3),
)
‖  cc=three(3),
)
=== python stop: lines that begin alike
self.eq(a, 1)
«self.eq(b, 2)
self.eq(c, 3)
»self.eq(dd, 4)
‖self.eq(dd, 4)
self.eq(ee, 5)
=== python end: a blank line in the block
def f(a):
  x = «a + 1

  y = compute_another(x)
  return y»‖

print(f(1))
=== python stop: a fence below a gap
def f(xs):
  a = «[x for x in xs if x]
  return a»
```

This keeps
‖
  return [min(a)]
=== python stop: an import like the next
import sys
«import os»
import re
import stat
‖
import re
import stat
=== python stop: an if with else in a gap
if level:
«    a()
else:
    b()»

c()
‖
c()
=== go stop: several lines
func f(xs []int) int {
	s«um := 0
	for _, x := range xs {
		sum +»= x * weight
	}
‖= x * weight
	}
	return 1
=== none stop: a line
def f():
    x = 1
    «y = x»
    return y
‖
    return y
=== none stop: a bracket
puts f(«a, g(b)»)
y = 1
‖)
y = 1
=== none block: a body
void f(int x) {«
    g(x);
»}

void h() {
    another();
    and_another_one(that, is, longer, than, the, rest, of, the, line, may, wait, for, it);
‖}

int main() {
=== none stop: lifetimes
fn f<'a>(x: &'a str) -> &'a str {
  let y = cut(«x, size(x)»);
  y
}
‖);
  y
}
=== none stop: a fence of a text's own
# Title
```sh
«make test»
```

Then run it.
‖
```

Then run it.
=== none stop: indentation in tabs
all: x
	«make y»
	make zzz
‖
	make zzz
=== python stop: many blank lines
x = 1
«y = 2»

  z = 3
w‖

















































  z = 3

=== python block: a long comment below a blank line
def f():
«    return 1
»
# ------------------------------------------------------------------------------------------
# ------------------------------------------------------------------------------------------
# ------------------------------------------------------------------------------------------

=== none block: two blank lines
def f
«  1
end
»

def g

=== cobol block: two blank lines
def f
«  1
end
»

def g

=== none block: two blank lines and a blank suffix
def f
«  1
end
»

def g
‖

=== none end: one blank line
a
«b

c
»
=== none block: blank lines first
a
«


b
»

c
=== none block: within a line
a = «b
»

c
=== none end: a fence
# Title
«```
x
```
»
=== none repeat: repetition
a
«self.a = a
self.a = a
»self.a = a
self.a = a
self.a = a
self.a = a
self.a = a
self.a = a
self.a = a
self.a = a
self.a = a
self.a = a
self.a = a

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
=== javascript block: strings, templates, divisions and JSX
function F({ a, b, c }) {«
  const s = "}" + '}' + `}${a + "}"}`; // }
  if (s) { h(); }
  const d = <p>{a}/{c && (b)}</p>;
  const e = <p>{b} / {c && (
    b
  )}</p>;
  const f = (a) / b / 2; /* } */
  return g
}
»
function g() {}
=== cpp block: digits and raw strings
int f() {
«    auto s = R"(})"; int n = 1'000'0 + 0xFF'FF;
    std::vector<int> v{1, 2};
    return n;
}
»
int main() {
=== python block: a paragraph below a line without its rest
def f(a):
    r«eturn a»

    return [x + 1 for x in sorted(a) if x > 0 and is_even(x) and not is_prime(x) and
            x not in seen_before(a)]
‖for x in a
=== cpp block: the suffix closes braces, and the cursor is in parentheses
std::string name_of(const std::string& path) {
    return "";
  }
std::string end_of(const std::string& path) {
  size_t dot = path.rfind('.');
  if (dot == path.npo«s) {»
    return "";
  }
  return path.substr(dot + 1);
⟨called⟩
⟨called⟩
‖
    return "";
  }
  return path.substr(dot);
}

std::string begin_of(const std::string& path) {
=== python block: the suffix has the next docstring
def f():
    """Read it.

    Raises«:
        ValueError: it is empty
    """
    read()»

⟨calls⟩
‖
def g():
    """Write it."""
=== go block: the suffix closes a brace that the text has to open
func stored(v *Value) *Stored {
	if v«alue == nil {
		return »nil
	}
	return &Stored{ID: value.ID, At: value.At}
}

func named(value *Value) string {
	return value.Name
}
‖nil
	}
	result := &Stored{ID: value.ID}
	return result
}
=== typescript block: parameters above statements
function f(
  a?: string,
«  b: string,
): void {
»⟨called⟩
⟨called⟩
⟨called⟩
‖  const kept = read(a);
=== python block: the lost rest of a line
valu«e = compute()»
other = compute_more()
another = compute_it_all(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)
‖ if elsewhere() else None
=== java end: a prompt that begins within the block that the text closes
            x += 1;
«            count += 1;
        }
        total += item.price;
»‖    }
    return total;
}

=== java end: no more than the end of such a block
            x += 1;
«        }
»‖        total += y;
    }
}

=== java end: a block within such blocks
        if (a) {
            b();
«        }
        c();
»‖    }
}

=== java end: such blocks, with none of their ends in the suffix
    a();
«    b();
}

int f() {
»‖    return 1;

=== rust stop: code behind lines of documentation
/// «Adds.
/// Two of them.
»fn add() {
    1
}
‖fn add() {
    1

=== yaml end: a fence in a text
a:
«  b: |
    ```
    code
    ```
  c: 1
»
=== html end: a fence in a text
<pre>
«```
code
```
</pre>
»
=== dockerfile end: a fence in a text
FROM a
«RUN echo '```' > a
RUN b
»
=== javascript block: a slash in a class of a regex
function f(s) {
«  return /[^/"]+/.test(s);
}
»
function g() {
}

=== perl block: operators that quote
sub f {
«  my $s = shift;
  $s =~ s!"!'!;
  $s =~ y/{/(/;
  $s =~ s/"/'/;
  return $s =~ m|[{]|;
}
»
sub g {
}

=== perl block: a here-document
sub f {
«  print <<~"END";
    don't {
    END
}
»
sub g {
}

=== python end: an argument twice
x = minimum(first«, value»‖, value)
y = 2

=== python end: two lines, the second of which is the suffix's
def f(x):
«    first(x)
»    second(x)‖    second(x)
    return x

=== python end: typed indentation again: all of it
def f():
    x = 1
    «    y(1)»‖
z(2)

=== python end: typed indentation: the missing space
def f():
    x = 1
   « y(1)»‖
z(2)

=== javascript end: typed indentation again: all of a line that closes a block
f(() => {
    x();
  «  y(1)»‖
z(2)

=== python end: typed indentation: three of four, and all of it
def f():
    x = 1
   «    y(1)»‖
z(2)

=== python end: typed indentation: less than is typed
def f():
    if x:
        «    y(1)»‖
z(2)

=== python end: typed indentation: the rest of it, which is longer
def f():
    if x:
 «       y(1)»‖
z(2)

=== go end: typed indentation again: tabs again
func f() {
	x()
	«	y(1)»‖
z(2)

=== go end: typed indentation: spaces for tabs
func f() {
	x()
	«    y(1)»‖
z(2)

=== json end: typed indentation again: an array
{
  "a": [
    «    y(1)»‖
z(2)

=== none end: typed indentation again: no language
def f
  x
  «  y(1)»‖
z(2)

=== none block 2: a line that is indented less
def f
«  a
  b
»end
=== none block 2: a line below blank ones that is indented less
def f
«  a
»
end
=== none end 2: blank lines
def f
«  a

  b
»
=== none block 2: the cursor's own line
def f
«a
  b
»end
=== none block 2: within a line
  x = «a
  b
»end
=== none block 1: tabs
f:
«	a
	b
»c

=== none block 2: fewer tabs
f:
«		a
»	b

=== none end 0: no indentation is wanted
def f
«  a
end
»
=== python block 8: an indentation is wanted
def f():
    if x:
«        a
»    b

=== none end 2: an infill's line end
  x = 1
  «[»
1]‖
  zzz = 3

=== none end 2: an infill of whole lines
  x = 1
«  y = [
»1]‖  zzz = 3

=== python block: within the brackets of a header
if f(
a,
«b,
»⟨calls⟩
‖c,
):
    g()

=== python end: entries between brackets that the editor has closed
c = {«
⟨values⟩
»‖}

print(c)
=== javascript block: a call in an inner block, whose brackets the suffix is not in
function f(a, b) {
  if (a) {
«    log(a);
»    if (b) {
      return g(
⟨values⟩
‖    return h(a);
  }
}
=== javascript end: a long body before its bracket
function f(a) {
«⟨values⟩
»‖}

function g() {
=== javascript end: a callback in a call that the editor has closed
items.forEach(«(item) => {
⟨called⟩
  total += item.price;
}»‖);

done();

=== typescript end: a callback at the end of a file
test(«'a', () => {
⟨called⟩
  expect(total).toBe(0);
}»‖);

=== javascript stop: a callback whose call the model closes
items.forEach(«(item) => {
⟨called⟩
}»);

done();
‖);

done();

=== javascript end: a bracket in a string of a callback
items.forEach(«(item) => {
  log(')');
⟨called⟩
}»‖);

done();

=== lua end: a callback in a call that the editor has closed
run(«'a', function(b)
⟨bare calls⟩
end»‖)

print(b)

=== elixir end: a callback in a call that the editor has closed
run(«a, fn b ->
⟨bare calls⟩
end»‖)

print(b)

=== ruby end: a list between brackets that the editor has closed
A = %i[«one two
⟨values⟩
  three»‖].freeze

puts A

=== r end: a block in a call that the editor has closed
test_that(«'a', {
⟨bare calls⟩
}»‖)

test_that('b', {

=== java block: a bracket of the suffix, in a prompt that begins within its block
        x += 1;
«        count += 1;
»    }
⟨values⟩
‖    } // end
}

=== javascript end: a comment of documentation, which the suffix closes
/**
 * «Adds.
⟨documented⟩
 * @returns the sum»‖
 */
function add(a, b) {

=== javascript end: a comment of documentation, which nothing closes
/**
 * «Adds.
⟨documented⟩
 */»‖
function add(a, b) {

=== python end: a docstring that nothing closes
def add(a, b):
    """«Adds.
⟨documented⟩
    """»‖
    return a + b

=== rust end: lines of documentation
/// «Adds.
⟨documented by ///⟩
/// The sum.»‖
fn add() {

=== python block: a blank line at the end of the cursor's block
def add(a, b):
    return «a + b»

⟨calls⟩
‖


print(add(1, 2))

=== python block: a comment outside the block of the gap
def f(x):
    x = x.strip()
«    return x == x[::-1]
»
# Test it
print(f(''))
⟨calls⟩
‖    return True
=== javascript block: a model that never comes to the suffix
function f(x) {
«  if (x) {
    a()
  }
»⟨calls⟩
‖  done(x)
}

=== python block: a docstring with a call
def f():
«    """Like resume()."""
    return 1
»

def resume():
    pass
=== python end: a fence in a docstring
def f():
«    """Doc.

    ```
    f()
    ```
    """
    return 1
»‖
def g():
    pass
=== python end: a long rest of a function
def f(a):
    «value = compute()
⟨values⟩
»‖

def g():
    pass
=== python block: settings list
import os

INSTALLED_APPS = [
    "a",
«    "b",
]
»
MIDDLEWARE = [
    "c",
]

TEMPLATES = {}
=== python block: call
parser.add_argument(
«    "--name",
    help="x",
)
»
args = parser.parse_args()
=== python block: dedent of code in a test
def test_a():
    code = textwrap.dedent("""
        def f():
            return 1
    """)
«    assert run(code) == 1
»
def test_b():
    pass
=== cpp block: below public
class Stack {
public:
«    Stack() = default;
    void push(int x) { data.push_back(x); }
private:
    std::vector<int> data;
};
»
int main() {
=== cpp block: below private
class Stack {
public:
    Stack();
private:
«    int n;
    int m;
};
»
int main() {
=== c block: macro with expression in progress
#define MAX(a, b) \
«    ((a) > (b) ? (a) : (b))
»
int main(void)
{
=== c block: two signatures
#ifdef A
int f(int x) {
#else
int f(long x) {
#endif
«    return x;
}
»
int g(int x) {
    return x;
}
=== perl block: bytes divided by the model
sub f {
    my $bytes = shift;
«    my $kb = $bytes/1024;
    return $kb;
}
»
sub g {
    return 1;
}
=== perl block: not
sub f {
«    return 1 if $x =~ m/a/ && $keys!~/b/;
}
»
sub g {
    return 1;
}
=== php block: template
<?php
function show($user) {
    ?>
    <p>Don't panic, <?= $user ?></p>
    <?php
«    return 1;
}
»
function other() {
    return 2;
}
=== shell block: heredoc in lower case
f() {
  cat <<eof
Don't {
eof
«  return 1
}
»
g() {
  return 2
}
=== python block: script with a docstring with an example
"""
Backup.

Usage::

    backup = Backup("x")
    backup.run()
"""
import os

for name in os.listdir("."):
«    print(name)
»x = 1
y = 2
=== python block: top-level list, within the line
xs = [
    1,
    «2,
    3,
]
»
ys = [4]
=== go block: import list with one
import (
	"fmt"
«	"os"
)
»
func main() {
}
=== r block: library call in progress
library(
«  dplyr
)
»
f <- function(x) {
  x
}
=== cpp block: slots
class A : public QObject {
    Q_OBJECT
public slots:
«    void a();
    void b();
};
»
int main() {
=== python block: a fence at the margin of a template
P = """
Write:

«```
{code}
```
"""
»
def f():
    pass
=== java block: if at top in a script
if (x)
«    y();
else
    z();
»
w();
=== rust block: windows path
fn f() {
    let p = r"C:\dir\";
«    p.len();
}
»
fn g() {
}
=== csharp block: interpolated verbatim
class A
{
    string F()
    {
        var p = $@"{d}\" + @"say ""hi""";
«        return p;
    }
»
    int G() { return 1; }
}
=== kotlin block: regex in raw string
fun f() {
    val re = """\d+\"""".toRegex()
«    re.find("x")
}
»
fun g() {
}
=== scala block: raw quote at the end
def f() = {
  val re = """a "quoted"""".r
«  re.toString
}
»
def g() = {
  1
}
=== perl block: hash in sort
sub f {
    my @s = sort { $a->{y} <=> $b->{y} } @x;
    my $n = $#s;
    my ($q, $r) = ($x/2, $y/2);
«    return $q;
}
»
sub g {
}
=== sql block: mysql delimiter
DELIMITER $$
CREATE PROCEDURE p()
BEGIN
«  SELECT 1;
END$$
»
DELIMITER ;
SELECT 2;
=== python stop: a gap inside a docstring's fence
def f():
    """Doc.

    ```
«    f(1)
»    ```
    """
    return 1
‖    ```
    """
    return 1
=== shell block: the model writes a comment at the margin
f() {
«    x=1
# y=2
    echo $x
}
»
g() {
    :
}
=== yaml block: a comment at the margin
a:
  b:
«    c: 1
# d: 2
    e: 3
»
f: 1
=== ruby block: begin and end of a block comment
def f
«  a
=begin
text
=end
  b
end
»
def g
end
=== python block: a gap in a triple-quoted string, the model misses the suffix
QUERY = """
SELECT a
«FROM t
»JOIN u1 ON u1.id = t.u1
JOIN u2 ON u2.id = t.u2
JOIN u3 ON u3.id = t.u3
JOIN u4 ON u4.id = t.u4
JOIN u5 ON u5.id = t.u5
JOIN u6 ON u6.id = t.u6
JOIN u7 ON u7.id = t.u7
JOIN u8 ON u8.id = t.u8
JOIN u9 ON u9.id = t.u9
JOIN u10 ON u10.id = t.u10
JOIN u11 ON u11.id = t.u11
JOIN u12 ON u12.id = t.u12
JOIN u13 ON u13.id = t.u13
JOIN u14 ON u14.id = t.u14
JOIN u15 ON u15.id = t.u15
JOIN u16 ON u16.id = t.u16
JOIN u17 ON u17.id = t.u17
JOIN u18 ON u18.id = t.u18
‖WHERE x = 1
"""
=== none block: a gap of a comment with an apostrophe, the model misses the suffix
let f x =
«  (* don't *)
»  let one = one_thing_of_it and_another in
  let two = two_thing_of_it and_another in
  let three = three_thing_of_it and_another in
  let four = four_thing_of_it and_another in
  let five = five_thing_of_it and_another in
  let six = six_thing_of_it and_another in
  let seven = seven_thing_of_it and_another in
  let eight = eight_thing_of_it and_another in
  let nine = nine_thing_of_it and_another in
  let ten = ten_thing_of_it and_another in
‖  x + 1
=== json block: in scripts of a package
{
  "name": "a",
  "scripts": {
    "a": "b",
«    "c": "d"
  },
»
  "dependencies": {
    "x": "1"
  }
}

=== python stop: a remark behind the suffix's line
def add(a, b):
    «return a + b»

print(add(1, 2))  # Output: 3
‖

print(add(1, 2))
=== javascript stop: a semicolon more
function add(a, b) {
  «return a + b»
}

console.log(add(1, 2)); // 3
‖
}

console.log(add(1, 2))
=== javascript stop: a semicolon less
const x = 1
«const y = 2
»const total = x + y
‖const total = x + y;
=== go stop: a comma less
	a: 1,
«	b: 2,
»	other: 3
‖	other: 3,
=== javascript stop: a remark within whole lines
const x = 1
«const y = 2
»const total = x + y; // 3
const more = 4; // it
‖const total = x + y;
const more = 4;
=== python end: rest of the line and a remark
def hello(name):
    print(«f'Hello {name}!'»)  # This will print "Hello, you!"
‖)

hello('you')
=== javascript end: rest of the line and a remark
function hello(name) {
  console.log(«name»); // prints
‖);
}
=== javascript stop: another url is no remark
const a = 1;
«const url = "http://one";
»const other = "http://two";
‖const other = "http://two";
=== java stop: break twice
switch (x) {
case 1:
    one();
    break;
case 2:
«    two();
»    break;
default:
    three();
}
‖    break;
default:
    three();
}
=== c stop: the line above equals the suffix's first
switch (x) {
case 0:
    break;
«case 1:
    one();
»    break;
default:
    three();
}
‖    break;
default:
    three();
}
=== python block: q is not perl's
x = 1
«y = 2
»
z = 3
=== perl block: an apostrophe in q{}
sub f {
    my $a = q{it's};
«    return $a;
}
»
sub g {
}
=== perl block: y and pipe
sub f {
«    my $a = $y|1;
    return $a;
}
»
sub g {
}
=== java block: an escaped quote in a text block
class A {
    String f() {
        var s = """
            a \""" b
            """;
«        return s;
    }
»
    int g() { return 1; }
}
=== python block: an escaped quote
def f():
    s = """a \""" b"""
«    return s
»
def g():
    pass
=== swift block: an escaped quote
func f() -> String {
    let s = """
    a \""" b
    """
«    return s
}
»
func g() {
}
=== kotlin block: four quotes
fun f(): String {
    val s = """say "hi""""
«    return s
}
»
fun g() {
}
=== python end: a notebook's query
import pandas as pd
query = """
select a
from b
where c = 1
"""
df = pd.read_sql(query, con)
«df.head()
»
=== python block: a comment at the margin
def f():
    x = 1
«    y = 2
# z = 3
    return x + y
»
def g():
    pass
=== makefile block: a comment at the margin
all:
	a
«	b
# c
	d
»
clean:
	rm a
=== lua block: a comment at the margin
function f()
  local a = 1
«  local b = 2
-- local c = 3
  return a
end
»
function g()
end
=== php block: require begun
<?php
require_once(
«    'a.php'
);
»
function f() {
    return 1;
}
=== c block: do in a define
#define SWAP(a, b) do { \
«    int t = a; \
    a = b; \
    b = t; \
} while (0)
»
int main(void)
{
    return 0;
}
=== c block: a define above
#define SWAP(a, b) do { \
    int t = a; \
} while (0)

int main(void)
{
«    return 0;
}
»
int f(void)
{
=== shell block: a quote in quotes
f() {
  echo 'it'\''s'
«  return 1
}
»
g() {
  return 2
}
=== shell block: shift in arithmetic
f() {
  x=$((1<<n))
«  return 1
}
»
g() {
  return 2
}
=== sql block: begin is a column
SELECT a
FROM b
«WHERE begin < 5;
»
SELECT 2;
=== json block: an inner array
{
  "a": [
    1,
«    2
  ],
»  "b": 2
}
=== lua block: a long comment
--[==[ a
function x()
]==]
function f()
«  return 1
end
»
function g()
end
=== shell block: a gap in a heredoc, the model misses the suffix
cat <<EOF
one
«two
»three three three three three three three three three three three three three
four four four four four four four four four four four four four four four four
five five five five five five five five five five five five five five five five
six six six six six six six six six six six six six six six six six six six six
seven seven seven seven seven seven seven seven seven seven seven seven seven seven
eight eight eight eight eight eight eight eight eight eight eight eight eight eight
nine nine nine nine nine nine nine nine nine nine nine nine nine nine nine nine
ten ten ten ten ten ten ten ten ten ten ten ten ten ten ten ten ten ten ten ten
‖last
EOF
=== go block: import of one line is no statement
package main

import "fmt"
«
func main() {
	fmt.Println(1)
}
»
func g() {
}
=== typescript block: ternary by lines
function f(a: boolean) {
  const x = a ?
    1 :
«    2;
  return x;
}
»
function g() {
}
=== cpp block: case in a switch
int f(int x) {
    switch (x) {
    case 1:
«        return 1;
    default:
        return 2;
    }
}
»
int g() {
    return 1;
}
=== c block: a macro whose parameter reads as a branch
void f(void) {
#if A
  if (a) {
#define TEXT(elem) #elem
«    g();
  }
#endif
}
»
void h(void) {
=== javascript block: a regex behind an arrow
const f = () => {
«  const isBrace = (x) => /\{/.test(x);
  return isBrace;
};
»
const g = () => {
=== javascript block: finally on a line of its own
f(1);
try {
  f(2);
} catch (e) {
«  f(3);
}
finally {
  f(4);
}
»
f(5);
=== python block: the suffix closes the cursor's bracket first
def f():
    x = get(a, «b»)
⟨values⟩
‖ * c)
    return x
'''

# Answers of a chat, the code between « and ».
ANSWERS = r"""
=== python stop: chatter around
Sure! Here is it:

```python
«def f():
    pass
»```

This function
=== python end: bare code
«def f():
    pass
»
=== python end: no language
```
«x = 1
»```
=== python stop: indented
1. Do:
   ```python
«   if x:
       y()
»   ```
bye
=== python stop: settings before the code
First install it:
```yaml
a: 1
```
or patch it:
```diff
- a
+ b
```
Then:
```python
«x = 1
»```
Done.
=== markdown end: a README with blocks of its own
Here it is:

```markdown
«# Title

```sh
make
```

```
plain
```

End.
»```
That is it.
=== python stop: a nested block
```markdown
«# T
```sh
ls
```
end
»```
bye
=== markdown end: a nested block
```markdown
«# T
```sh
ls
```
end
»```
Done.

=== python end: prose alone
«I cannot do that.»
=== python end: code in the thoughts
<think>Like:
```python
x = 2
```
</think>
```python
«x = 1
»```
=== python end: thoughts right above
<think>
hm</think>```python
«x = 1
»```
=== python end: thoughts begun in the prompt
Perhaps:
x = 2
</think>
```python
«x = 1
»
=== python end: cut off
```python
«x = 1
y =»
=== python stop: a shell command first
Run:
```bash
pip install x
```
Then:
```python
«x
»```
More
=== python stop: a fence in a command
Run:
```bash
cat <<E
```x
E
```
Then:
```python
«x
»```

=== shell stop: a shell command
Here:
```bash
«ls
»```
Done.

=== json stop: json
Here:
```json
«{}
»```
Done.

=== python stop: json first
Given:
```json
{}
```
use:
```
«x
»```

=== python stop: a heading and prose
### Sum

**Note**: `f` adds.
```python
«x
»```

### Use
It is f.
=== shell stop: a heading right above
# Sum
```sh
«ls
»```
Done.

=== yaml stop: headings and a list
# Sum

## Steps

1. Do:
- that
```
«a: 1
»```

=== ruby stop: a heading that is not English
# Lösung

Für alle:
```ruby
«x
»```

=== python stop: a heading, then a shell command
# A
Run:
```sh
ls
```
Then:
```py
«x
»```
x
=== c stop: a heading
## Sum
int x;
```c
«int y;
»```

=== python end: a heading and prose alone
«### Sum

I cannot do that.
»
=== python end: a comment alone
«# Sum»
=== python end: shell commands alone
Run:
```bash
«ls
»```
or
```sh
ls -l
```
in a shell.

=== python end: a shell command alone
Run:
```bash
«ls
»```
=== python stop: a fence that is begun
```python
¦«x = 1
»```
That is it.
=== python end: a fence after chatter that is begun
Sure:
```python
¦«x = 1
»```
=== python stop: some of the code
```python
def f():
    '''¦«```
'''
»```

=== python stop: a block that is closed
```
x
```
And¦:
```
«y
»```

=== python end: another language's block
```bash
ls
```
And ¦«that is it.»
=== python stop: its fence once more
```python
¦```python
«x = 1
»```
That is it.
=== python stop: line breaks alone
```python
¦«

x = 1
»```
Yes.
=== python stop: a longer fence
````markdown
¦«```
x
```
y
»````

=== python end: the end of a block
````markdown
¦«y
```
x
```»
=== python stop: chatter that is begun
Here you¦ are:
```
«y
»```

=== python end: code that is begun
import os
¦«x = 1
»
=== python stop: thoughts that are begun
<think>
hm¦ x</think>
```python
«abcdef = 1
»```

=== python stop: a fence in a docstring
¦```python
«def f():
    '''Example:

    ```
    f()
    ```
    '''
    return 1
»```

It returns 1.
=== python stop: a fence in a string at the margin
¦```python
«PROMPT = '''
```
{code}
```
'''
»```

=== kotlin stop: a fence in documentation
¦```kotlin
«/**
 * ```
 * f()
 * ```
 */
fun f() = 1
»```

=== javascript stop: a fence of tildes
Here:
¦~~~js
«f();
»~~~
That is it.

"""

REPEAT = [  # (title, text, what is sent of it if the text is cut)
    ("a line", "x = 1\nself.a = a\n" + "self.a = a\n" * 13, "x = 1\nself.a = a\nself.a = a\n"),
    (
        "a block",
        "try:\n    a()\nexcept E:\n    b()\n" * 5,
        "try:\n    a()\nexcept E:\n    b()\n" * 2,
    ),
    ("closing braces", "    }\n" * 9, ""),
    ("numbers", "".join(f"    {n}: {n * n},\n" for n in range(40)), ""),
    ("blank lines", "x = 1\n\n\n\n\n\n\n\n\ny = 2\n", ""),
    ("nested closers", "".join(f"{' ' * n}</div>\n" for n in range(24, 0, -2)), ""),
    ("equal closers", "</div>\n" * 9, ""),
    ("eleven equal calls", "f.readline()\n" * 11 + "g()\n", ""),
    ("a long string", 's = "' + "=" * 200 + '"\n', ""),
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


def check(asked: Asked, text: str, expected: Outcome, start: int = 0) -> None:
    """Feed the text whole, by characters, and in random pieces."""
    chance = random.Random(len(text))
    places = sorted(chance.sample(range(len(text) + 1), len(text) // 4))
    cuts = itertools.pairwise([0, *places, len(text)])
    pieces = [text[start:stop] for start, stop in cuts]
    for split in ([text], list(text), pieces):
        ending = Ending(*asked)
        assert (run(ending, split), ending.start) == (expected, start)


def cases(texts: str) -> list[tuple[str, str]]:
    for name, lines in LONG.items():
        texts = texts.replace(f"⟨{name}⟩\n", lines)
    parts = texts.removeprefix("\n=== ").removesuffix("\n").split("\n=== ")
    return [(head, text) for head, _, text in (part.partition("\n") for part in parts)]


def title(case: tuple[str, ...]) -> str:
    return case[0]


def check_case(case: tuple[str, str]) -> None:
    head, text = case
    kind, _, name = head.partition(": ")
    language, reason, *least = kind.split()
    prompt, _, rest = text.partition("«")
    kept, _, more = rest.partition("»")
    more, infill, suffix = more.partition("‖")
    known = None if language == "none" else language
    mode = "infill" if infill else "complete"
    sent = kept.lstrip(" \t") if "again" in name else kept
    outcome = sent, None if reason == "end" else reason
    check((mode, known, prompt, suffix, "auto", int(*least)), kept + more, outcome)


@pytest.mark.parametrize("case", [*ROWS, *cases(TEXTS)], ids=title)
def test_code(case: tuple[str, str]) -> None:
    check_case(case)


@pytest.mark.parametrize("case", cases(ANSWERS), ids=title)
def test_chat(case: tuple[str, str]) -> None:
    head, text = case
    language, reason = head.partition(":")[0].split()
    begun, _, text = text.rpartition("¦")  # what the model is given
    start = text.index("«")
    code = textwrap.dedent(text[start + 1 : text.index("»")])
    answer = text.replace("«", "").replace("»", "")
    outcome = code, None if reason == "end" else reason
    check(("instruct", language, begun, "", "auto"), answer, outcome, start)


@pytest.mark.parametrize("case", REPEAT, ids=title)
def test_repetition(case: tuple[str, str, str]) -> None:
    _, text, sent = case
    expected = (sent, "repeat") if sent else (text, None)
    check(("instruct", "python", "", "", "auto"), f"```\n{text}", expected, 4)


TENTHS = "⁰¹²³⁴⁵⁶⁷⁸⁹"


def tokens_of(text: str) -> list[tuple[str, float]]:
    """Tokens, each of which ends with its probability in tenths."""
    found = re.findall(f"([^{TENTHS}]*)([{TENTHS}]+)", text)
    return [(token, int(normalize("NFKC", tenths)) / 10) for token, tenths in found]


HALF = "".join(f"word{number} ⁵" for number in range(9))  # each costs a bit
# prompt, suffix, tokens, what is sent, and how many tokens are read before that is known (0: it
# goes on)
DOUBTS = [
    ("x = ", "\ny = 2\n", f"1⁹\n⁹{HALF}", "1", 3),
    ("x = ", "\ny = 2\n", f"1⁰\n⁰{HALF}", "1", 3),
    ("x = ", "\ny = 2\n", "1⁹\n⁹" + HALF.replace("⁵", "¹⁰"), "1", 0),
    ("x = ", "\ny = 2\n", "1⁹\n⁹z ⁰", "1", 3),
    ("a = 1\n", "y = 2\n", f"x = 1⁹\n⁹{HALF}", "x = 1\n", 8),
    ("    ", "\ny = 2\n", f"x = 1⁹\n⁹{HALF}", "x = 1", 8),
    ("a = b", " + 1\ny = 2\n", f"⁹\n⁹{HALF}", "", 8),
    # Each line begins anew.
    ("a = 1\n", "y = 2\n", "x = 1\n⁹" + HALF.replace(" ⁵", "\n¹"), "x = 1\n", 0),
    # The rest of the line, written by the model itself.
    ("a = (", ")\ny = 2\n", f"1, ⁹2)⁹\n⁹{HALF}", "1, 2", 4),
    ("def f():\n    if x:\n        ", "\n\nf()\n", f"a()⁹\n        ⁹{HALF}", "a()", 0),
    # Text that has left the block of the cursor.
    ("if a:\n    a = b", "\n    f(a)\n", " * c⁹\n⁹print⁹", " * c", 3),
    ("if a:\n    a = 1\n", "    f(a)\n", "    b = 2⁹\n⁹print⁹", "    b = 2\n", 3),
    ("if a:\n    a = b", " + 1\n    f(a)\n", " * c⁹\n⁹print⁹", " * c", 3),
    ("if a:\n    a = b", " + 1\n", " * c⁹\n⁹print⁹", " * c", 3),
    # The suffix has lines that are indented as little.
    ("if a:\n    a = b", " + 1\n    f(a)\nb\n", " * c⁹\n⁹print⁹", " * c", 0),
    ("if a:\n    a = b", " + 1\nf(a)\n", " * c⁹\n⁹print⁹", " * c", 0),
    # In a list that ends below, after a comment in one, and in a comment of several lines.
    ("a = [\n", "]\n", '    "b",⁹\n⁹    ⁹"c",⁰\n⁹', '    "b",\n    "c",\n', 0),
    ("a = [\n    # The", "\n]\n", " first⁹\n⁹    b,⁹\n⁹    ⁹c⁰\n⁹", " first\n    b,\n    c", 0),
    ("def f():\n    # The", "\n    a()\n", " first⁹\n⁹    ⁹# line⁰\n⁹", " first\n    # line", 0),
]


@pytest.mark.parametrize(("prompt", "suffix", "tokens", "kept", "read"), DOUBTS)
def test_an_unsure_text_behind_a_possible_end_is_not_followed_for_long(
    prompt: str, suffix: str, tokens: str, kept: str, read: int
) -> None:
    ending = Ending("infill", "python", prompt, suffix, "auto")
    sent = ""
    for number, (text, probability) in enumerate(tokens_of(tokens), 1):
        out, reason = ending.feed(text, probability)
        sent += out
        if reason:
            assert (sent, reason, number) == (kept, "block", read)
            return
    assert (sent, read) == (kept, 0)


def test_one_line_without_end() -> None:
    ending = Ending("complete", "python", "x = [", "", "auto")
    text, reason = run(ending, list("0, " * 300))
    assert reason == "repeat"
    assert len(text) <= 400


CURSORS = [  # (language, prompt, whether the cursor is in code)
    ("python", '    Text that ends here.\n    "\n    x = 1\n    ', True),
    ("python", '    It ends here. "\n    x = 1\n    ', True),
    ("shell", "cut -d'\"' -f2 names\n", True),
    ("shell", 'x="`tr -d \'"\' <names`"\nf() {\n    ', True),
    ("shell", 'x="$(case $y in a) echo "it\'s" ;; esac)"\nf() {\n    ', True),
    ("python", 'def f():\n    return """\n    x', False),
    ("python", 'x = 1\n\n"""\ndef f', False),
    ("python", "def f():\n    g('''a", False),
]


def test_whether_the_cursor_is_in_code() -> None:
    for language, text, in_code in CURSORS:
        assert (ending.scan(LANGUAGES[language], text).closer == "") == in_code


def test_a_semicolon_ends_a_statement_without_the_line_below() -> None:
    ends = Ending("complete", "javascript", "const a = f(", None, "auto")
    assert ends.feed("1);\n") == ("1);\n", "block")
    waits = Ending("complete", "javascript", "const a = f(", None, "auto")
    assert waits.feed("1)\n") == ("1)", None)


@pytest.mark.parametrize("language", ["python", "cobol", None])
def test_off(language: str | None) -> None:
    text = "    pass\n\n\n\nprint(1)\n```\n" + "x\n" * 20
    for mode in ("complete", "infill"):
        ending = Ending(mode, language, "def f():\n", "\nprint(1)\n", "none", indent=4)
        assert run(ending, list(text)) == (text, None)
    chat = Ending("instruct", language, "", "", "none")
    assert run(chat, ["```\nx\n```\nbye"]) == ("x\n", "stop")


SNIPPETS = r"""
    def f(): if x: else: return x class A { } { ( ) ' " / // /* */ # \ ` ``` ~~~ ${ ; , : = @ é r#"
    R"( R"a( 1 #if #else #endif define endef <<A A then @' '@ $$ $a$ BEGIN END CASE UPDATE
""".split()  # noqa: SIM905
BLANKS = ["\n", "\n\n", "    ", "  ", " ", "\t", '"""']
PIECES = st.lists(st.sampled_from([*BLANKS, *SNIPPETS]), max_size=60)
TEXT = PIECES.map("".join)
MODE = st.sampled_from(["complete", "infill", "instruct"])
KNOWN = ["python", "javascript", "rust", "cpp", "go", "ruby", "scala", "powershell", "makefile"]
LANGUAGE = st.sampled_from([*KNOWN, "sql", None])
INDENT = st.sampled_from([0, 2, 4])
ASKED = st.tuples(MODE, LANGUAGE, TEXT, TEXT, st.just("auto"), INDENT)


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
        inner = [place + 1 for place in range(len(text) - 1) if mask >> place & 1]
        cuts = itertools.pairwise([0, *inner, len(text)])
        yield [text[start:stop] for start, stop in cuts]


# Stops, text, what is sent. ⏎ stands for a line end.
STOPS = """
          | hello    | hello
⏎⏎        | a⏎b⏎⏎c   | a⏎b
abc       | ababcx   | ab
aab       | aaaab    | aa
END E.    | aEENDb   | aE
abcX c    | zabcX    | zab       # the first to be complete
bc abc    | zabcd    | z         # complete at the same place: the longer one
xyz       | abxy     | abxy
x         | x        |
é!        | ré!a     | r
abab! babx| xababx   | xa        # what was held is a part of another one
aaab aab  | aaaab    | a         # both at once
"""


@pytest.mark.parametrize("row", STOPS.strip("\n").split("\n"))
def test_stop_strings_over_every_split(row: str) -> None:
    cells = row.replace("⏎", "\n").partition("#")[0].split("|")
    stops, text, sent = (cell.strip(" ") for cell in cells)
    for pieces in splits(text):
        matcher = StopStrings(stops.split(" ") if stops else [])
        out = ""
        for piece in pieces:
            passed, found = matcher.feed(piece)
            out += passed
            assert sent.startswith(out), "what was sent cannot be taken back"
            if found:
                break
        if not found:
            out += matcher.flush(whole=True)
        assert (out, found) == (sent, None if sent == text else "stop")


def test_stop_strings_hold_back_no_more_than_needed() -> None:
    matcher = StopStrings(["</s>", "\n\n"])
    sent = [matcher.feed(piece) for piece in ("a<", "b", "\n", "c")]
    assert sent == [("a", None), ("<b", None), ("", None), ("\nc", None)]
