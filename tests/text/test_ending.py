"""Where a completion ends: what a model writes after a prompt and where that is cut, however tokens split the text."""

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

from cerebrum.text import ending
from cerebrum.text.ending import Ending
from cerebrum.text.languages import LANGUAGES
from cerebrum.text.stages import StopStrings

# Each case is a text: the prompt up to «, the part to keep up to », what the model writes after that, and for an infill
# the suffix after ‖. Its head names the language, the reason to end and what the case shows.
CASES = r'''
=== python block: a function
def f(n):«
    return n
»

print(f(1))
=== python block: docstring first
def f():
    """Doc.

    x"""
«    return 1
»x = f()
=== python block: nested: the whole function
def f(xs):
    for x in xs:
«        print(x)
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
=== python block: brackets
def f():
«    x = [
1,
]
    return (
x)
»
f()
=== python block: a text at column 0
def f():
«    return """
text
"""
»
f()
=== python block: a comment at column 0
def f():
«    x = 1
# note
    return x
»
# Tests
f()
=== python block: comments at column 0 below blank lines
def f():
«    x = 1

# note
# more

    return g(x)

# what it calls
def g(x):
    return x
»
# Tests
f()
=== python end: a comment below a blank line, last
def f():
«    return 1
»
# Tests

=== python block: a long comment below a blank line
def f():
«    return 1
»
# 1----- 2------ 3------ 4------ 5------ 6------ 7------ 8------ 9------ 10----- 11----- 12-----
# 1----- 2------ 3------ 4------ 5------ 6------ 7------ 8------ 9------ 10----- 11----- 12-----
# 1----- 2------ 3------ 4------ 5------ 6------ 7------ 8------ 9------ 10----- 11----- 12-----
=== python block: a continued line
def f():
«    return 1 + \
2
»f()
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
=== python block: a helper that it calls
def f(x):
«    return g(x) + g(1)


def g(x):
    return h(x)

def h(x):
    return x
»
def k(x):
    return x
=== rust block: a helper that it calls
fn f(x: i32) -> i32 {
«    g(x)
}

fn g(x: i32) -> i32 {
    x
}
»
fn main() {
    f(1);
}
=== python block: a prompt cut out of a file within a docstring
ends with eol, if it does.
    """
    if not s:
        return ""
    x = 1
«    return x
»
def g():
    """Doc."""
=== python block: a statement
y = «[1,

2]
z = 1
»
print(y)
=== python block: after a comment
# Greatest common divisor
«import math

def gcd(a, b):
    return math.gcd(a, b)
»
print(1)
=== python block: no body comes
def f():
    """Doc."""
«»

def g():
    pass
=== python stop: a fence
def f():
«    return 1
»```

This function
=== python block: strings with quotes
def f():
«    x = 'it\'s' + "#" + r'\'' + f"{x!r}"  # don't
    return x
»f()
=== python block: typed indentation again
def f():
    x = 1
    «    return x
»
f()
=== javascript block: javascript
function f(s) {
«  return s + "}" + '}' + `}${s + "}"}` + /[}]\}/.source; // }
}
»
f();
=== javascript block: an apostrophe in JSX
function F({ ok }) {«
  return ok && <p>Don't</p>
}
»
function g() {}
=== javascript block: a slash between braces in JSX
function F({ a, b, c }) {«
  const d = <p>{a}/{c && (b)}</p>;
  const e = <p>{b} / {c && (
    b
  )}</p>;
  return (
    <p>{a}/{c && (
      <b>{b} / {"("}</b>
    )}</p>
  );
}
»
function g() {}
=== javascript block: a regex behind a block
function f(s) {«
  if (s) { h(); }
  /[({]/.test(s) && h();
}
»
function g() {}
=== cpp block: an apostrophe between hexadecimal digits
int f() {«
    return 0xFF'FF;
}
»
int g() {}
=== python block: prefixes of strings
def f(x):«
    return b'}' + x if x in'abc' else rb'{'
»
g()
=== javascript block: division
function f(a, b) {
«  return (a) / b / 2; /* } */
}
»
f();
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
function f(xs) {
  xs.forEach(x => {
«    g(x);
  });
  return xs;
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
=== typescript block: a whole class
class A<T> {
«  x: T;
  f(): T {
    return this.x;
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
=== typescript block: an interface
interface A {
«  b: { c: number };
}
»
const a = 1;
=== rust block: lifetimes and characters
fn f<'a>(x: &'a str) -> &'a str {
«    let c = '{'; let d = '\'';
    'l: loop { break 'l; }
    x
}
»
fn g() {
=== rust block: raw strings
fn f() -> &str {
«    let a = r"\"; let b = r#"}"}"#;
    "two
lines}"
}
»
fn main() {
=== rust block: an impl's method
impl A {
    fn f(&self) -> i32 {
«        match self.x { 1 => 2, _ => 3 }
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
=== c block: preprocessor, characters
int f(char c) {
«#define OPEN { // don't
    if (c == '{' || c == '"') { return 1; }
    return 0;
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
=== c block: a struct
struct node {
«    int value;
    struct node *next;
};
»
int main() {
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

int f(void) {
    return 1;
}
»
int main() {
=== cpp block: digits and raw strings
int f() {
«    auto s = R"(})"; int n = 1'000'0; std::vector<int> v{1, 2};
    return n;
}
»
int main() {
=== cpp block: a raw string with a name
int f() {
«    auto s = u8R"json({"a": ")"})json"; auto t = STR"a(" R"(\)";
    return 1;
}
»
int main() {
=== cpp block: a raw string with a long name in the prompt
const char *page = R"delimiter12(a " b {)delimiter12";
int f() {
«    return 1;
}
»
int main() {
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
=== c stop: a fence right behind
int f() {
«    return 1;
}»```

This
=== cpp block: in a namespace
namespace a {

int f() {
«    return 1;
}

}  // namespace a
»
int main() {
=== go block: go
func f() {
«	s := `}` + "}"
	for _, c := range s {
		if c == '}' {
			return
		}
	}
}
»
func g() {
=== go block: a method of go
type S struct {
	x int
}

func (s *S) X() int {
«	return s.x
}
»
func g() {
=== go block: the rest of main
package main

func main() {
	for {
«		break
	}
}
»
func g() {
=== python stop: a line
def f():
    x = 1
    «y = x»
    return y
‖
    return y
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
=== rust stop: a line of a call
foo(
    a,
«    b,
»    c,
);
‖    c,
);
=== c stop: a condition
int f(int x) {
    «if (x) {»
        return 1;
‖
        return 1;
    }
    return 0;
}
=== go end: an argument
fmt.Println(«f(x), "a)"»)
}
‖)
=== python block: the rest of the last line, which the text writes itself
def f(a, b):
    «retu»rn a

# Test the function
print(f(3, 5))
‖rn a
=== python block: a paragraph below a line without its rest
def f(a):
    r«eturn a»

    return [x + 1 for x in sorted(a) if x > 0 and is_even(x) and not is_prime(x) and x not in seen_before(a)]
‖for x in a]
=== python stop: a line of a dictionary
names = {
    'one': 1,
«    'eight': 8,»
    'nine': 9
}
print(names)
‖
    'nine': 9
}
show(names)
=== python end: entries between brackets that the editor has closed
config = {«
    'entry number 0': compute_the_value_of(0),
    'entry number 1': compute_the_value_of(1),
    'entry number 2': compute_the_value_of(2),
    'entry number 3': compute_the_value_of(3),
    'entry number 4': compute_the_value_of(4),
    'entry number 5': compute_the_value_of(5),
    'entry number 6': compute_the_value_of(6),
    'entry number 7': compute_the_value_of(7),
    'entry number 8': compute_the_value_of(8),
    'entry number 9': compute_the_value_of(9),
    'entry number 10': compute_the_value_of(10),
    'entry number 11': compute_the_value_of(11),
»‖}

print(config)
=== javascript end: a long body before its bracket
function f(a) {
«  const value0 = computeTheNextValue(0);
  const value1 = computeTheNextValue(1);
  const value2 = computeTheNextValue(2);
  const value3 = computeTheNextValue(3);
  const value4 = computeTheNextValue(4);
  const value5 = computeTheNextValue(5);
  const value6 = computeTheNextValue(6);
  const value7 = computeTheNextValue(7);
  const value8 = computeTheNextValue(8);
  const value9 = computeTheNextValue(9);
  const value10 = computeTheNextValue(10);
  const value11 = computeTheNextValue(11);
  const value12 = computeTheNextValue(12);
  const value13 = computeTheNextValue(13);
»‖}

function g() {
=== python end: a long rest of a function
def f(a):
    «value0 = compute_the_next_value(0)
    value1 = compute_the_next_value(1)
    value2 = compute_the_next_value(2)
    value3 = compute_the_next_value(3)
    value4 = compute_the_next_value(4)
    value5 = compute_the_next_value(5)
    value6 = compute_the_next_value(6)
    value7 = compute_the_next_value(7)
    value8 = compute_the_next_value(8)
    value9 = compute_the_next_value(9)
    value10 = compute_the_next_value(10)
    value11 = compute_the_next_value(11)
    value12 = compute_the_next_value(12)
    value13 = compute_the_next_value(13)
»‖

def g():
    pass
=== python end: the suffix's line with a remark, at the end
def add(a, b):
    «return a + b»

print(add(1, 2))  # Output: 3‖

print(add(1, 2))
=== python stop: the suffix's line with a remark, and more
def add(a, b):
    «return a + b»

print(add(1, 2))  # Output: 3
print(add(3, 4))
‖

print(add(1, 2))
=== python end: a closed string
print("«hello»")‖")
=== python stop: a closed string, and more
print("«hello»")
print("world")
‖")
=== javascript end: a closed string
x = '«hello»';‖';
=== c stop: a closed string, and its block
int main() {
    printf("«hello»");
}
‖");
=== python end: the second string of a call
print("a", "«b", "c»")‖")
=== go end: the type in aligned columns
type A struct {
	Na«me»‖     string
}
=== python stop: several lines up to the rest of a line
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
=== python stop: indentation half typed before the suffix
def f(x):
    if x:
        a = «g(x)
    »    return a + 1
    return 2
‖    return a + 1
    return 2
=== python stop: several lines of a call
x = dict(
    a=1,
«    b=two(
        2,
    ),
»    cc=three(3),
)
‖    cc=three(3),
)
=== python stop: lines that begin alike
self.assertEqual(a, 1)
«self.assertEqual(b, 2)
self.assertEqual(c, 3)
»self.assertEqual(dd, 4)
‖self.assertEqual(dd, 4)
self.assertEqual(ee, 5)
=== python block: the lost rest of a line
valu«e = compute()»
other = compute_more()
another = compute_it_all(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19)
‖ if elsewhere() else None
=== python block: a blank line at the end of the cursor's block
def add(a, b):
    return «a + b»

print(add(3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19))
print(add(21, 28, 35, 42, 49, 56, 63, 70, 77, 84, 91, 98, 105, 112, 119, 126, 133))
print(add(33, 44, 55, 66, 77, 88, 99, 110, 121, 132, 143, 154, 165, 176, 187, 198, 209))
print(add(69, 92, 115, 138, 161, 184, 207, 230, 253, 276, 299, 322, 345, 368, 391, 414, 437))
print(add(123, 164, 205, 246, 287, 328, 369, 410, 451, 492, 533, 574, 615, 656, 697, 738, 779))
‖


print(add(1, 2))
=== python end: a blank line inside the cursor's block
def f(a):
    x = «a + 1

    y = compute_another_value(x)
    return y»‖

print(f(1))
=== python block: a comment outside the block of the gap
def f(text):
    text = text.strip()
«    return text == text[::-1]
»
# Test the function
print(f(""))
print(f(3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19))
print(f(21, 28, 35, 42, 49, 56, 63, 70, 77, 84, 91, 98, 105, 112, 119, 126, 133))
print(f(33, 44, 55, 66, 77, 88, 99, 110, 121, 132, 143, 154, 165, 176, 187, 198, 209))
print(f(69, 92, 115, 138, 161, 184, 207, 230, 253, 276, 299, 322, 345, 368, 391, 414, 437))
print(f(123, 164, 205, 246, 287, 328, 369, 410, 451, 492, 533, 574, 615, 656, 697, 738, 779))
‖    return True
=== python stop: a fence below a gap
def f(xs):
    evens = «[x for x in xs if x % 2 == 0]
    return evens»
```

This solution keeps the even numbers.
‖
    return [min(evens)]
=== javascript stop: a fence below a gap
function f(a) {
  const b = «g(a);
  return b;»
```
This solution
‖
  return c;
}
=== python stop: a fence below examples in a gap
def f(xs):
    ys = []
«    return xs
»
print(f(1))
```
‖    return ys
=== python end: a fence in a docstring in a gap
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
=== python block: a short rest, and other lines below it
env['CONTENT_LENGTH'«] »= ''
env['SCRIPT_FILENAME'] = self.path
env['REMOTE_ADDR'] = self.client_address[0]
‖=''
env['SCRIPT_NAME'] = ''
=== python stop: an import like the next
import sys
«import os»
import re
import string
‖
import re
import string
=== c stop: several lines
int f(int *a, int n) {
    int sum = «0;
    for (int i = 0; i < n; i++) {
        sum += »a[i] * weights[i];
    }
    return sum;
‖a[i] * weights[i];
    }
    return sum;
}
=== rust stop: several lines
fn f(xs: &[i32]) -> i32 {
    let tot«al: i32 = xs.iter().sum();
    let count = xs.le»n() as i32;
    total / count
‖n() as i32;
    total / count
}
=== javascript stop: several lines
function f(xs) {
  const total = «xs.reduce((a, b) => a + b);
  const mean = total »/ xs.length;
  return mean;
‖/ xs.length;
  return mean;
}
=== go stop: several lines
func f(xs []int) int {
	tot«al := 0
	for _, x := range xs {
		total +»= x * weight
	}
‖= x * weight
	}
	return total
}
=== none stop: a line
def f():
    x = 1
    «y = x»
    return y
‖
    return y
=== none stop: several lines up to the rest of a line
sub f {
    my $total = su«m(@_);
    my $count = »scalar(@_);
    return $total / $count;
‖scalar(@_);
    return $total / $count;
}
=== none stop: the line's rest
local x = f(a«, b)»
return x
‖
return x
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
=== none stop: a fence is text where there are some
# Title
```sh
«make test»
```

Then run it.
‖
```

Then run it.
=== cpp block: a constructor with an initializer list
A::A(int x)
«    : a{x},
      b(x)
{
    c = x;
}
»
int f() {
=== javascript block: a chain of calls
fetch(u)
  .then(r => {
«    g(r);
  })
  .catch(e => {
    h(e);
  });
»
f();
=== rust block: a raw string with three marks
fn f() {
«    let a = r###"}"##"###;
}
»
fn g() {
=== javascript block: if and else without braces
if (x)
«  y();
else z();
»
f();
=== javascript block: an else whose statement is on the next line
if (x)
«  y();
else
  z();
»
f();
=== javascript block: an if in a loop, without braces
for (const a of b)
«  if (a)
    f(a);
»
g();
=== python block: an async helper
async def main():
«    await f(1)

async def f(x):
    return x
»
async def g():
    pass
=== go block: a package
package main
«
import "fmt"

func main() {
	fmt.Println(1)
}
»
func f() {
=== javascript block: an import without a semicolon
import a from "a"
«
function f() {
  return a;
}
»
f();
=== kotlin block: a package without a semicolon
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
=== python block: a window that starts in a docstring
    Returns x.
    """
    return x

def g(x):
«    """Doc."""
    return x
»
def h():
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
=== python stop: an if with else in a gap
if level:
«    a()
else:
    b()»

c()
‖
c()
=== javascript stop: the rest of a function
function f(items) {
  let sum = 0;
  sum += total(items){«
    x();
  }
»  return sum;
}
‖  return sum;
}
=== java block: a member after a comment
class A {
    /** The sum. */
«    int sum() {
        return 1;
    }
»
    int g() { return 2; }
}
=== python block: a member after a decorator
class A:
    x = 1

    @property
«    def f(self):
        return 1
»
    def g(self):
        return 2
=== python block: a member after a comment
class A:
    x = 1

    # the sum
«    def f(self):
        return 1
»
    def g(self):
        return 2
=== rust block: a function after a doc comment
impl A {
    fn a() {}

    /// The sum.
«    fn sum(&self) -> i32 {
        1
    }
»
    fn g() {}
}
=== typescript block: a member after a comment
class A {
  // The sum.
«  sum() {
    return 1;
  }
»
  g() {}
}
=== kotlin block: a function after a doc comment
class A {
    /** The sum. */
«    fun sum(): Int {
        return 1
    }
»
    fun g() {}
}
=== python block: a docstring that names a function
def f():
    «"""Like resume()."""
    return 1
»
def resume():
    pass
=== c block: a macro over lines
#define M(a) \
«    do { a; } while (0)
»int f() {
=== javascript block: no semicolons
const x =« f(1)
»const y = 2
=== shell block: a bracket in a regex
f() {
    if [[ $x =~ ^[{]$ ]]; then
«        echo 1
    fi
}
»
g() {
=== none stop: indentation in tabs
all: x
	«make y»
	make zzz
‖
	make zzz
'''

# Answers of a chat, the code between « and ».
ANSWERS = r'''
=== stop: chatter around
Sure! Here is it:

```python
«def f():
    pass
»```

This function
=== end: bare code
«def f():
    pass
»
=== stop: bare code, then a fence
«import os
x = 1
»```

That
=== end: no language
```
«x = 1
»```
=== stop: tildes
~~~py
«x = '```'
```
»~~~
bye
=== stop: indented
1. Do:
   ```python
«   if x:
       y()
»   ```
bye
=== stop: a nested block
```markdown
«# T
```sh
ls
```
end
»```
bye
=== stop: a fence in a docstring
```python
«def f():
    """
    ```
    x
    ```
    """
»```
bye
=== stop: a shell command first
Install:
```bash
pip install x
```
Then:
```python
«import x
»```
More
=== end: prose alone
«I cannot do that.»
=== end: code in the thoughts before it
<think>
Like this:
```python
x = 2
```
</think>
```python
«x = 1
»```
=== end: thoughts whose start is in the prompt
Perhaps:
x = 2
</think>
```python
«x = 1
»
=== end: cut off
```python
«x = 1
y =»
'''

# (title, the start of the answer that the model is given, what it writes, what is sent and why it ends)
BEGUN = [
    ("a fence", "```python\n", "x = 1\n```\nThat is it.", ("x = 1\n", "stop")),
    ("a fence after chatter", "Sure:\n```python\n", "x = 1\n```", ("x = 1\n", None)),
    ("some of the code", "```python\ndef f():\n    '''", "```\n'''\n```\n", ("```\n'''\n", "stop")),
    ("a block that is closed", "```\nx\n```\nAnd", ":\n```\ny\n```\n", ("y\n", "stop")),
    ("another language's fence", "```bash\nls", " -l\n```\nThat is it.", (" -l\n", "stop")),
    ("another language's block", "```bash\nls\n```\nAnd", " that is it.", (" that is it.", None)),
    ("its fence once more", "```python\n", "```python\nx = 1\n```\nThat is it.", ("x = 1\n", "stop")),
    ("a longer fence", "````markdown\n", "```\nx\n```\ny\n````\n", ("```\nx\n```\ny\n", "stop")),
    ("a short fence in its place", "````markdown\n", "```\nx\n```\ny\n```", ("```\nx\n```\ny\n", None)),
    ("the end of a block", "````markdown\n", "y\n```\nx\n```", ("y\n```\nx\n```", None)),
    ("chatter alone", "Here you", " are:\n```\ny\n```\n", ("y\n", "stop")),
    ("code without a fence", "import os\n", "x = 1\n", ("x = 1\n", None)),
]

REPEAT = [
    ("a line", "x = 1\nself.a = a\n" + "self.a = a\n" * 13, "x = 1\nself.a = a\nself.a = a\n"),
    ("a block", "try:\n    a()\nexcept E:\n    b()\n" * 5, "try:\n    a()\nexcept E:\n    b()\n" * 2),
    ("closing braces", "    }\n" * 9, ""),
    ("a table", "    [0, 0, 0],\n" * 12, ""),
    ("numbers", "".join(f"    {n}: {n * n},\n" for n in range(99)), ""),
    ("four alike", "f.readline()\n" * 4 + "g()\n", ""),
    ("blank lines", "x = 1\n\n\n\n\n\n\n\n\ny = 2\n", ""),
    ("nested closers", "".join(f"{' ' * n}</div>\n" for n in range(24, 0, -2)), ""),
    ("equal closers", "</div>\n" * 9, ""),
    ("eleven equal calls", "f.readline()\n" * 11 + "g()\n", ""),
    ("a long string", 's = "' + "=" * 200 + '"\n', ""),
    ("a ruler", "# " + "-" * 100 + "\n", ""),
]


def test_the_examples_of_the_module_are_true() -> None:
    assert doctest.testmod(ending).failed == 0


def run(ending: Ending, pieces: list[str]) -> tuple[str, str | None]:
    """(everything that is sent, why it ends)."""
    out = ""
    for piece in pieces:
        text, reason = ending.feed(piece)
        out += text
        if reason:
            return out, reason
    return out + ending.flush(), None


def check(
    mode: str, language: str | None, prompt: str, suffix: str, text: str, expected: tuple[str, str | None]
) -> None:
    """Feed the text whole, by characters, and in random pieces."""
    for seed in range(4):
        generator = random.Random(seed)
        pieces, rest = [text] if seed == 0 else list(text) if seed == 1 else [], text
        while seed > 1 and rest:
            size = generator.randint(1, 9)
            pieces.append(rest[:size])
            rest = rest[size:]
        assert run(Ending(mode, language, prompt, suffix, "auto"), pieces) == expected


@pytest.mark.parametrize(
    ("prompt", "text", "suffix", "sent", "reason"),
    [
        ("def f():\r\n    x = 1\r\n", "    y = 2\r\n    return x\r\n", "\r\n    return x\r\n", "    y = 2", "stop"),
        ("x = 1\r\n", "y = 2\r\nreturn x\r\n", "return x\r\n", "y = 2\r\n", "stop"),
    ],
)
def test_line_ends_of_windows(prompt: str, text: str, suffix: str, sent: str, reason: str) -> None:
    check("infill", "python", prompt, suffix, text, (sent, reason))


def test_the_suffix_is_below_many_blank_lines() -> None:
    check("infill", "python", "x = 1\n", "\n" * 50 + "  z = 3\n", "y = 2\n\n  z = 3\nw", ("y = 2", "stop"))


@pytest.mark.parametrize(
    ("line", "sent", "reason"),
    [
        ("print(add(1, 2))  # Output: 3\n", "a + b", "stop"),
        ("print(add(1, 2)) # 3\nmore()\n", "a + b", "stop"),
        ("print(add(1, 2)) + 1\n", "a + b\n\n\nprint(add(1, 2)) + 1\n", None),
    ],
)
def test_a_remark_does_not_hide_the_suffix(line: str, sent: str, reason: str | None) -> None:
    prompt, suffix = "def add(a, b):\n    return ", "\n\n\nprint(add(1, 2))\n"
    check("infill", "python", prompt, suffix, f"a + b\n\n\n{line}", (sent, reason))


@pytest.mark.parametrize("size", [1, 3, 999])
def test_thoughts_that_the_answer_was_begun_with(size: int) -> None:
    ending, text = Ending("instruct", "python", "<think>\nhm", None, "auto"), " x</think>\n```python\nabcdef = 1\n```\n"
    assert run(ending, [text[at : at + size] for at in range(0, len(text), size)]) == ("abcdef = 1\n", "stop")


def cases(texts: str) -> list[str]:
    return texts.removeprefix("\n=== ").removesuffix("\n").split("\n=== ")


def title(case: str | tuple[str, ...]) -> str:
    return case.partition("\n")[0] if isinstance(case, str) else case[0]


def check_case(case: str) -> None:
    head, _, text = case.partition("\n")
    language, reason, *name = head.replace(":", "").split()
    prompt, _, rest = text.partition("«")
    kept, _, more = rest.partition("»")
    more, infill, suffix = more.partition("‖")
    expected = kept.lstrip(" ") if "again" in name else kept
    known = None if language == "none" else language
    why = None if reason == "end" else reason
    check("infill" if infill else "complete", known, prompt, suffix, kept + more, (expected, why))


OPENS = """def f(x):
    {} \"""
    x = 1
    \"""
    """


@pytest.mark.parametrize(
    ("language", "prompt"),
    [
        *(("python", OPENS.format(before)) for before in ("return", "yield", "x = x +", "return 'a' %", "return not")),
        ("python", '    Text that ends here.\n    "\n    x = 1\n    '),
        ("python", '    It ends here. "\n    x = 1\n    '),
        ("javascript", "const f = (text) => /`/.test(text)\n"),
        ("shell", "cut -d'\"' -f2 names\n"),
        ("shell", 'x="`tr -d \'"\' <names`"\nf() {\n    '),
        ("shell", 'x="$(case $y in a) echo "it\'s" ;; esac)"\nf() {\n    '),
    ],
)
def test_the_cursor_is_in_code(language: str, prompt: str) -> None:
    assert ending.scan(LANGUAGES[language], prompt).closer == ""


@pytest.mark.parametrize("prompt", ['def f():\n    return """\n    x', 'x = 1\n\n"""\ndef f', "def f():\n    g('''a"])
def test_the_cursor_is_in_a_string(prompt: str) -> None:
    assert ending.scan(LANGUAGES["python"], prompt).closer in ("'''", '"""')


@pytest.mark.parametrize("case", cases(CASES), ids=title)
def test_code(case: str) -> None:
    check_case(case)


@pytest.mark.parametrize("case", cases(ANSWERS), ids=title)
def test_chat(case: str) -> None:
    head, _, text = case.partition("\n")
    code = text[text.index("«") + 1 : text.index("»")]
    answer = text.replace("«", "").replace("»", "")
    check("instruct", "python", "", "", answer, (textwrap.dedent(code), "stop" if head.startswith("stop") else None))


@pytest.mark.parametrize("case", BEGUN, ids=title)
def test_a_begun_answer(case: tuple[str, str, str, tuple[str, str | None]]) -> None:
    _, begun, text, expected = case
    check("instruct", "python", begun, "", text, expected)


@pytest.mark.parametrize("case", REPEAT, ids=title)
def test_repeat(case: tuple[str, str, str]) -> None:
    _, text, sent = case
    check("instruct", "python", "", "", "```\n" + text, (sent, "repeat") if sent else (text, None))


def test_one_line_without_end() -> None:
    text, reason = run(Ending("complete", "python", "x = [", "", "auto"), list("0, " * 300))
    assert reason == "repeat"
    assert len(text) <= 400


@pytest.mark.parametrize("language", ["python", "cobol", "", None])
def test_off(language: str | None) -> None:
    text = "    pass\n\n\n\nprint(1)\n```\n" + "x\n" * 20
    assert run(Ending("complete", language, "def f():\n", "", "none", indent=4), list(text)) == (text, None)
    assert run(Ending("infill", language, "def f():\n", "\nprint(1)\n", "none", indent=4), [text]) == (text, None)
    assert run(Ending("instruct", language, "", "", "none"), ["```\nx\n```\nbye"]) == ("x\n", "stop")


# (title, prompt, what the model writes, what is sent and why it ends), without a language that we know
UNKNOWN = [
    ("two blank lines", "def f\n", "  1\nend\n\n\ndef g\n", ("  1\nend\n", "block")),
    ("blank lines with spaces", "a\n", "b\n  \n\t\nc", ("b\n", "block")),
    ("one blank line", "a\n", "b\n\nc\n", ("b\n\nc\n", None)),
    ("blank lines first", "a\n", "\n\n\nb\n\n\nc", ("\n\n\nb\n", "block")),
    ("within a line", "a = ", "b\n\n\nc", ("b\n", "block")),
    ("a fence", "# Title\n", "```\nx\n```\n", ("```\nx\n```\n", None)),
    ("repetition", "a\n", "self.a = a\n" * 13, ("self.a = a\n" * 2, "repeat")),
]


@pytest.mark.parametrize("language", ["cobol", "", None])
@pytest.mark.parametrize("case", UNKNOWN, ids=title)
def test_an_unknown_language(case: tuple[str, str, str, tuple[str, str | None]], language: str | None) -> None:
    _, prompt, text, expected = case
    check("complete", language, prompt, "", text, expected)
    check("infill", language, prompt, "\n", text, expected)


# (title, language, prompt, suffix or None, indent, what the model writes, what is sent and why it ends)
LEAST_INDENTS = [
    ("a line that is indented less", None, "def f\n", None, 2, "  a\n  b\nend\n", ("  a\n  b\n", "block")),
    ("below blank lines", None, "def f\n", None, 2, "  a\n\nend\n", ("  a\n", "block")),
    ("blank lines", None, "def f\n", None, 2, "  a\n\n  b\n", ("  a\n\n  b\n", None)),
    ("the cursor's own line", None, "def f\n", None, 2, "a\n  b\nend", ("a\n  b\n", "block")),
    ("within a line", None, "  x = ", None, 2, "a\n  b\nend", ("a\n  b\n", "block")),
    ("tabs", None, "f:\n", None, 1, "\ta\n\tb\nc\n", ("\ta\n\tb\n", "block")),
    ("fewer tabs", None, "f:\n", None, 2, "\t\ta\n\tb\n", ("\t\ta\n", "block")),
    ("none wanted", None, "def f\n", None, 0, "  a\nend\n", ("  a\nend\n", None)),
    ("of Python", "python", "def f():\n    if x:\n", None, 8, "        a\n    b\n", ("        a\n", "block")),
    ("an infill's line end", None, "  x = 1\n  ", "\n  zzz = 3\n", 2, "[\n1]", ("[", "block")),
    ("an infill of whole lines", None, "  x = 1\n", "  zzz = 3\n", 2, "  y = [\n1]", ("  y = [\n", "block")),
]


@pytest.mark.parametrize("case", LEAST_INDENTS, ids=title)
def test_least_indentation(case: tuple[str, str | None, str, str | None, int, str, tuple[str, str | None]]) -> None:
    _, language, prompt, suffix, indent, text, expected = case
    for pieces in ([text], list(text)):
        mode = "complete" if suffix is None else "infill"
        assert run(Ending(mode, language, prompt, suffix, "auto", indent=indent), pieces) == expected


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
    ("tabs below spaces", "javascript", "f(() => {\n  x();\n});\nif (y) {\n\tif (z) {\n\t", "\t", "\t"),
    ("C", "c", "int f() {\n    x();\n   ", "     ", " "),
    ("JavaScript", "javascript", "f(() => {\n  x();\n  ", "  ", ""),
    ("Rust", "rust", "fn f() {\n    x();\n  ", "  ", "  "),
    ("no language", None, "def f\n  x\n ", "  ", " "),
    ("no language, a header", None, "class A\n  def f\n   ", "  ", " "),
    ("no language, a header, all of it", None, "class A\n  def f\n    ", "    ", ""),
]


@pytest.mark.parametrize("case", TYPED, ids=title)
def test_typed_indentation(case: tuple[str, str | None, str, str, str]) -> None:
    _, language, prompt, written, sent = case
    for pieces in ([f"{written}y(1)"], list(f"{written}y(1)")):
        assert run(Ending("infill", language, prompt, "\nz(2)\n", "auto"), pieces) == (f"{sent}y(1)", None)


SNIPPETS = r"""def f(): if x: else: return x class A { } { ( ) ' " / // /* */ # \ ` ``` ~~~ ${ ; , : = @ é r#"
    R"( R"a( 1""".split()  # noqa: SIM905
PIECES = st.lists(st.sampled_from(["\n", "\n\n", "    ", "  ", " ", "\t", '"""', *SNIPPETS]), max_size=60)


@given(
    mode=st.sampled_from(["complete", "infill", "instruct"]),
    language=st.sampled_from(["python", "javascript", "typescript", "rust", "c", "cpp", "go", None]),
    prompt=PIECES,
    suffix=PIECES,
    pieces=PIECES,
    indent=st.sampled_from([0, 2, 4]),
)
def test_any_split(
    mode: str, language: str | None, prompt: list[str], suffix: list[str], pieces: list[str], indent: int
) -> None:
    args = (mode, language, "".join(prompt), "".join(suffix), "auto", indent)
    text = "".join(pieces)
    whole = run(Ending(*args), [text])
    assert run(Ending(*args), pieces) == whole
    assert run(Ending(*args), list(text)) == whole


# -------------------------------------------------------------------------------------------- stop strings


def splits(text: Any) -> Iterator[list[Any]]:
    """Every way to cut a short text, or bytes, into pieces."""
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
def test_stop_strings_over_every_split(stops: list[str], text: str, sent: str, stopped: str | None) -> None:
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
    assert matcher.feed("a<") == ("a", None)
    assert matcher.feed("b") == ("<b", None)
    assert matcher.feed("\n") == ("", None)
    assert matcher.feed("c") == ("\nc", None)
