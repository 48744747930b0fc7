"""Examples that people try first, in eight languages: what stands above and below a gap."""

from __future__ import annotations

GAP = "«"  # where the cursor is
TEXTS = r"""
=== python
def add(a, b):
    «

print(add(1, 2))
=== python
def fibonacci(n):
    «

print(fibonacci(10))
=== python
def hello(name):
    print(«)

hello('you')
=== python
class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
«
    def pop(self):
        return self.items.pop()
=== python
def main():
    «

if __name__ == '__main__':
    main()
=== python
numbers = [3, 1, 2]
«
print(total)
=== javascript
function add(a, b) {
  «
}

console.log(add(1, 2));
=== javascript
function fibonacci(n) {
  «
}

console.log(fibonacci(10));
=== javascript
const hello = (name) => «;

hello('you');
=== javascript
class Stack {
  constructor() {
    this.items = [];
  }

  push(item) {
«  }

  pop() {
    return this.items.pop();
  }
}
=== javascript
const users = [{ name: 'a', age: 3 }];
const names = «
console.log(names);
=== typescript
function add(a: number, b: number): number {
  «
}

console.log(add(1, 2));
=== typescript
export function fibonacci(n: number): number {
  «
}

console.log(fibonacci(10));
=== typescript
interface User {
  name: string;
«}

const user: User = { name: 'a', age: 3 };
=== typescript
class Stack<T> {
  private items: T[] = [];

  push(item: T): void {
«  }

  pop(): T | undefined {
    return this.items.pop();
  }
}
=== typescript
async function load(url: string) {
  const answer = await «
  return answer.json();
}
=== go
package main

func add(a, b int) int {
	«
}

func main() {
	println(add(1, 2))
}
=== go
package main

import "fmt"

func fibonacci(n int) int {
«}

func main() {
	fmt.Println(fibonacci(10))
}
=== go
package main

import "fmt"

func main() {
	fmt.Println(«)
}
=== go
package main

type Stack struct {
	items []int
}

func (s *Stack) Push(item int) {
	«
}

func (s *Stack) Len() int {
	return len(s.items)
}
=== rust
fn add(a: i32, b: i32) -> i32 {
    «
}

fn main() {
    println!("{}", add(1, 2));
}
=== rust
fn fibonacci(n: u64) -> u64 {
«}

fn main() {
    println!("{}", fibonacci(10));
}
=== rust
fn main() {
    let name = "you";
    println!(«);
}
=== rust
struct Stack {
    items: Vec<i32>,
}

impl Stack {
    fn push(&mut self, item: i32) {
        «
    }

    fn len(&self) -> usize {
        self.items.len()
    }
}
=== cpp
#include <iostream>

int add(int a, int b) {
    «
}

int main() {
    std::cout << add(1, 2) << std::endl;
    return 0;
}
=== cpp
int fibonacci(int n) {
«}

int main() {
    return fibonacci(10);
}
=== cpp
#include <iostream>

int main() {
    std::cout << «;
    return 0;
}
=== cpp
#include <vector>

class Stack {
public:
    void push(int item) {
        «
    }

    int size() const { return items.size(); }

private:
    std::vector<int> items;
};
=== cpp
int value(int kind) {
    switch (kind) {
    case 1:
        return 10;
«    default:
        return 0;
    }
}
=== java
class Main {
    static int add(int a, int b) {
        «
    }

    public static void main(String[] args) {
        System.out.println(add(1, 2));
    }
}
=== java
class Main {
    static int fibonacci(int n) {
«    }

    public static void main(String[] args) {
        System.out.println(fibonacci(10));
    }
}
=== java
class Hello {
    public static void main(String[] args) {
        System.out.println(«);
    }
}
=== java
import java.util.*;

class Stack {
    private List<Integer> items = new ArrayList<>();

    void push(int item) {
        «
    }

    int size() {
        return items.size();
    }
}
=== shell
#!/bin/bash

add() {
  «
}

add 1 2
=== shell
#!/bin/bash

hello() {
  echo «
}

hello you
=== shell
#!/bin/sh

for file in *.txt; do
«done
=== shell
#!/bin/bash

if [ -z "$1" ]; then
  «
fi

echo "done"
"""
# By language.
EXAMPLES = dict[str, list[str]]()
for _text in TEXTS.split("\n=== ")[1:]:
    _language, _, _code = _text.partition("\n")
    EXAMPLES.setdefault(_language, []).append(_code.rstrip("\n") + "\n")
