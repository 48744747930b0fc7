"""No accepted body keeps the Pi's event loop from everything else: the longest time between two of
its ticks.

The test compares it with a regular expression's time for 400 kB, so that it holds on any machine.
It counts this process's CPU time, all threads together: programs beside it take time as well, and
a thread that holds the interpreter's lock stops the others. tests/bench/prepare.py prints wall
time.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import ask, post
from scripted import CHUNKED, Backend, Pi, answer, backend_at, chunk, event, pi_for

from cerebrum.fields import MAX_DELIMITERS, parse_json
from cerebrum.http import MAX_BODY_BYTES
from cerebrum.pi.kind import read_tokens
from cerebrum_common import HttpError

MAX_STALL = 3.0  # times `find_words`, which takes 20 ms on a slow machine
RUNS = 5  # the least counts: what else a machine does mostly adds to it
NATIVE = "/v1/complete/stream"
CODE, CHAT = "/v1/completions", "/v1/chat/completions"
INFILL, TOKENS = "/infill", "/tokenize"
MODULES = ("argparse", "ast", "inspect", "subprocess", "tarfile", "typing")
SOURCES = Path(os.__file__).parent
PYTHON = "".join((SOURCES / f"{name}.py").read_text("utf-8") for name in MODULES)[:400_000]
ROWS = [{"id": n, "tags": ["a", "b"], "more": {"x": n, "y": None}} for n in range(4000)]
DATA = json.dumps(ROWS, indent=2)[:400_000].ljust(400_000)


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """As many units between the two as a body can have."""
    count = (MAX_BODY_BYTES - len(before) - len(after)) // len(unit)
    return before + (unit * count).removesuffix(b",") + after


def dump(**members: Any) -> bytes:
    return json.dumps(members).encode()


NESTED = b"[" * 60 + b"]" * 60 + b","
ARRAYS = {"objects": b"{},", "zeros": b"0,", "strings": b'"",', "arrays": b"[[[[]]]],"}
TURN = {"role": "user", "content": "x" * 900}
PART = {"filename": "a.py", "text": PYTHON[:3800]}
MARKS = rb"<|file_sep|>a\n", b'<|fim_prefix|><|fim_suffix|>b<|fim_middle|>"}'
HALVES = {"input_prefix": PYTHON[:200_000], "input_suffix": PYTHON[200_000:]}
FASTER = "Speed up the method parse_args"
HALF_OF_THEM = b"{}," * (MAX_DELIMITERS // 2 - 4)
MOST_NESTED = NESTED * (MAX_DELIMITERS // 61 - 1)
BODIES = {
    **{name: (CODE, filled(b'{"x":[', unit, b"]}"), 400) for name, unit in ARRAYS.items()},
    "most values": (CODE, b'{"prompt":"a","x":[' + HALF_OF_THEM + b"0]}", 200),
    "nested": (CODE, b'{"prompt":"a","x":[' + MOST_NESTED + b"0]}", 200),
    "line ends": (CODE, filled(b'{"prompt":"', rb"\n", b'"}'), 200),
    "tabs": (CODE, filled(b'{"prompt":"', rb"\t", b'"}'), 200),
    "letters": (CODE, filled(b'{"prompt":"', b"a", b'"}'), 200),
    "stop": (CODE, filled(b'{"prompt":"a","stop":"', b"a", b'"}'), 200),
    "messages": (CHAT, dump(messages=[TURN] * 1000), 200),
    "files": (INFILL, dump(input_extra=[PART] * 256, input_prefix="a"), 200),
    "marks": (CODE, filled(b'{"prompt":"', *MARKS), 200),
    "python": (NATIVE, dump(language="python", prompt=PYTHON), 200),
    "data": (CODE, dump(filename="a.json", prompt=DATA), 200),
    "gap": (INFILL, dump(filename="a.py", **HALVES), 200),
    "instruction": (NATIVE, dump(language="python", prompt=PYTHON, instruction=FASTER), 200),
    "tokens": (TOKENS, filled(b'{"content":"', b"1", b'"}'), 200),
}  # fmt: skip


def find_words(clock: Callable[[], float]) -> float:
    start = clock()
    re.findall(r"\w+", PYTHON)
    return clock() - start


async def stall(
    pi: Pi, path: str, body: bytes, clock: Callable[[], float]
) -> tuple[float, float, int]:
    """The longest time between two ticks of the loop while the Pi answers, as a multiple of
    `find_words` right after it and in seconds, and the status.
    """
    asked = asyncio.create_task(ask(pi.port, post(path, body)))
    longest, last = 0.0, clock()
    while not asked.done():
        await asyncio.sleep(0)
        now = clock()
        longest, last = max(longest, now - last), now
    return longest / find_words(clock), longest, asked.result().status


async def stalls(
    clock: Callable[[], float] = time.process_time,
) -> dict[str, tuple[float, float, int]]:
    """For each of BODIES the least `stall`. The engine takes 131,072 tokens."""
    text = {"text": "a", "delta": {"content": "a"}}
    last = event(choices=[text | {"finish_reason": "stop"}], stop=True)
    script = [CHUNKED, chunk(event(choices=[text])), chunk(last), b"0\r\n\r\n"]
    engine = Backend([script], models=answer(200, {"data": [{"id": "qwen_0_5b"}]}))
    engine.props = answer(200, {"default_generation_settings": {"n_ctx": 131_072}})
    tokens = Backend([[answer(200, {"tokens": [123] * MAX_BODY_BYTES})]], models=engine.models)
    found = {}
    async with engine, tokens:
        for backend in (engine, tokens):
            async with pi_for(backend_at(backend.port, api="llama.cpp")) as pi:
                for name, (path, body, _) in BODIES.items():
                    if (path == TOKENS) == (backend is tokens):
                        runs = [await stall(pi, path, body, clock) for _ in range(RUNS)]
                        found[name] = min(runs)
    return found


MARKED = {"0": 1, '"a"': 1, "{}": 2, r'"\\\\"': 1}  # a value, and how many marks it adds to a list
TEXTS = ("[{,:", '"\\', '"\\,"')


@pytest.mark.parametrize(("value", "marks"), MARKED.items())
def test_which_marks_count(value, marks):
    most = (MAX_DELIMITERS - 2) // marks
    fits, more = (f'{{"x":[{",".join([value] * count)}]}}'.encode() for count in (most, most + 1))
    assert parse_json(fits) == json.loads(fits)
    with pytest.raises(HttpError) as refused:
        parse_json(more)
    message = "expected a JSON object: expected at most 20000 commas, colons and opening brackets"
    assert (refused.value.status, refused.value.message) == (400, message)


@pytest.mark.parametrize("text", TEXTS)
def test_marks_in_a_text_do_not_count(text):
    body = dump(x=text * MAX_DELIMITERS)
    assert parse_json(body) == json.loads(body)


TOKEN_ANSWERS = {
    b'{"tokens": []}': b"",
    b'{"tokens": [1, 23]}': b"1,23",
    b'{"tokens":[1,23]}\n': b"1,23",
}
NO_TOKENS = (
    b"", b'{"tokens": 1}', b'{"tokens": [1,]}', b'{"tokens": [,1]}', b'{"tokens": [1,,2]}',
    b'{"tokens": [-1]}', b'{"tokens": ["a"]}', b'{"tokens": [1], "a": [2]}', b'{"tokens": [1]',
)  # fmt: skip


@pytest.mark.parametrize("given", [*TOKEN_ANSWERS, *NO_TOKENS])
def test_the_answer_of_tokens(given):
    if given in TOKEN_ANSWERS:
        assert read_tokens(given) == TOKEN_ANSWERS[given]
    else:
        with pytest.raises(HttpError):
            read_tokens(given)


async def test_no_body_stalls_the_loop():
    gc.freeze()  # to go through pytest's objects takes longer than through the daemon's
    try:
        found = await stalls()
    finally:
        gc.unfreeze()
    for name, (_, _, expected) in BODIES.items():
        assert found[name][2] == expected, name
    stalled = {name: ratio for name, (ratio, _, _) in found.items() if ratio > MAX_STALL}
    assert stalled == {}
