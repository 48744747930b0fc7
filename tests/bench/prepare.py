"""How long preparing a prompt takes, and how much of it the prefix cache keeps while someone types.

    python tests/bench/prepare.py

Prints one line of JSON. Milliseconds are the best of several runs. `shared` is the part of a prompt
that equals the start of the prompt before it, in characters, over 300 typed lines of each of six
files; `chat_shared` the same over the turns of a chat with pieces of these files. `unnamed` is the
share of definitions that an instruction on such a file names and its prompt lacks. `stall_ms` is
the longest time between two ticks of the Pi's event loop for each body of tests/pi/test_stalls.py:
wall time, median of five.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import statistics
import sys
import time
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pi"))
import test_stalls

from cerebrum.text.languages import LANGUAGES
from cerebrum.text.prompt import common_length, prepare

MODULES = ("argparse", "ast", "inspect", "subprocess", "tarfile", "typing")
FILES = [Path(os.__file__).with_name(f"{module}.py").read_text("utf-8") for module in MODULES]
BUDGET = 3500
TARGETS = {"ms_100_kb": 10, "stall_ms": 50, "shared_mean": 0.9}
ROLES = "user", "assistant"
TURNS, TURN = 200, 1500  # characters of a turn
DEFINITIONS = 10  # of a file


def prepared(prompt: str) -> str:
    fields = {"language": "python", "prompt": prompt}
    return str(prepare(fields, "complete", BUDGET).body["prompt"])


def milliseconds(prompt: str, runs: int) -> float:
    seconds = timeit.repeat(lambda: prepared(prompt), number=1, repeat=runs)
    return round(1000 * min(seconds), 2)


def shares(file: str) -> Iterator[float]:
    """Of each prompt, the part that equals the start of the prompt before it."""
    lines = file.splitlines(keepends=True)[:2000]
    counts = range(len(lines) - 300, len(lines))
    prompts = (prepared("".join(lines[:count])) for count in counts)
    for before, prompt in itertools.pairwise(prompts):
        yield common_length(before, prompt) / len(prompt)


def chat_shared() -> float:
    text = "".join(FILES)
    turns = [{"role": ROLES[at % 2], "content": text[at * TURN :][:TURN]} for at in range(TURNS)]
    chats = list[str]()
    for count in range(1, TURNS, 2):
        messages = prepare({"messages": turns[:count]}, "chat", BUDGET).body["messages"]
        chats.append("".join(message["content"] for message in messages))
    pairs = list(itertools.pairwise(chats))
    known = sum(common_length(before, chat) for before, chat in pairs)
    return known / sum(len(chat) for _, chat in pairs)


def unnamed(file: str) -> Iterator[bool]:
    """Of some definitions, whether the prompt lacks one that its instruction names."""
    for match in itertools.islice(LANGUAGES["python"].defines.finditer(file), DEFINITIONS):
        asked = f"Let {match[match.lastindex or 0]} log what it does"
        fields = {"language": "python", "prompt": file, "instruction": asked}
        content = prepare(fields, "instruct", BUDGET).body["messages"][0]["content"]
        yield match[0] not in content


def main() -> None:
    text = "".join(FILES)
    found = list(itertools.chain.from_iterable(map(shares, FILES)))
    lacking = list(itertools.chain.from_iterable(map(unnamed, FILES)))
    logging.disable()
    stalls = asyncio.run(test_stalls.stalls(time.perf_counter))
    result: dict[str, Any] = {
        "ms_10_kb": milliseconds(text[:10_000], 30),
        "ms_100_kb": milliseconds(text[:100_000], 30),
        "ms_1_mib": milliseconds((text * 3)[: 1 << 20], 5),
        "ms_1_mib_of_empty_lines": milliseconds("\n" * (1 << 20), 3),
    }
    shared = {
        "shared_mean": statistics.mean(found),
        "chat_shared": chat_shared(),
        "unnamed": statistics.mean(lacking),
    }
    result |= {name: round(share, 4) for name, share in shared.items()}
    result["stall_ms"] = {name: round(1000 * wall, 1) for name, (_, wall, _) in stalls.items()}
    print(json.dumps(result | {"targets": TARGETS}))


if __name__ == "__main__":
    main()
