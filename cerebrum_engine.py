"""llama.cpp: one loaded model, and the thread that schedules, drafts and keeps prefixes for it. Without HTTP:

    import pathlib, queue
    from cerebrum_engine import CompletionRequest, Job, Settings, Worker, start_library
    start_library()
    worker = Worker("qwen", pathlib.Path("model.gguf"), Settings())
    worker.start()
    events, batch = queue.SimpleQueue(), [{}]
    worker.submit(worker.prepare(Job(CompletionRequest("def fibonacci(n):", language="python"), events.put)))
    while "done" not in batch[-1]:
        batch = events.get()
        print(*(event.get("token", "") for event in batch), sep="", end="", flush=True)

(A request that fails ends with an HttpError in the list.)

Who owns what
- One `Worker` thread for each loaded model owns that model's llama context; nobody else touches it. Only a `Job`
  crosses over, by the worker's inbox. Its events come back by a function of the job's, called by the worker's thread,
  and a job that was submitted always gets a last one. A job is cancelled by a flag, and a running `llama_decode` by a
  byte that llama.cpp's abort callback reads.
- A worker is a scheduler over sequences. A sequence lives in a slot of the KV cache while it runs and until the slot is
  needed. Then it is parked in `PrefixStore` as bytes, which are also what is written to disk on unload.
- `Baton`: llama.cpp's threads spin, so two models computing at once on two cores would crawl. One decodes at a time.

Shortcut: a model's jinja chat template is never run (CVE-2024-34359). llama.cpp's own table of templates is used.
"""

from __future__ import annotations

import bisect
import codecs
import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import os
import queue
import re
import struct
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# llama.cpp's threads meet at a barrier hundreds of times for each token, and by default they spin there for
# milliseconds. If another program occupies a core, the spinning keeps the thread that everyone waits for from running,
# and a token can take ten times as long. A much lower value makes the threads sleep too often on a quiet machine.
# libgomp reads the variable once, when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llama_cpp
import llama_cpp.llama_cpp as _llama
import numpy as np
import psutil

from cerebrum_common import HttpError, log, request_id_var
from cerebrum_ending import Cutter, Ending, wants_extras
from cerebrum_metrics import CANCELLED, Tally

llama: Any = _llama  # ctypes: its signatures are C's, and its type stubs do not pass strict checking
MB = 1 << 20

# ---------------------------------------------------------------------------------- settings and requests

KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
MAX_SEED = 2**32 - 2  # 2**32 - 1 asks llama.cpp for a random seed
FLASH_ATTENTION = (llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama.LLAMA_FLASH_ATTN_TYPE_ENABLED)


def usable_cores() -> int:
    """Number of physical cores among the CPUs that this process may use. A second thread on a core only makes llama.cpp
    wait."""
    cpus = os.sched_getaffinity(0)
    siblings = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings)


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are run. All workers of a process use the same settings."""

    threads: int = field(default_factory=usable_cores)
    n_ctx: int = 4096  # tokens of one sequence, its prompt and completion together
    sequences: int = 2  # at a time
    kv_type: str = "f16"  # of the KV cache; q8_0 takes half the memory
    micro_batch: int = 256  # tokens of a chunk that are computed together; needs memory for their attention
    flash_attention: bool = False
    fixed_threads: bool = False  # the user chose the number of threads
    cache_mb: int = 256  # of parked sequences, in memory and on disk
    draft: bool = True
    # Calibration, parked sequences, tuned files.
    state_dir: Path = field(default_factory=lambda: Path("~/.local/state/cerebrum").expanduser())

    @property
    def uses_flash_attention(self) -> bool:
        """A quantized cache needs it."""
        return self.flash_attention or self.kv_type != "f16"


@dataclass(frozen=True, slots=True)
class TunedFile:
    """The model in an encoding that is faster on this machine; see cerebrum_encoding.py."""

    path: Path  # the published file itself, if only the settings differ
    settings: Settings
    source: str  # sha256 that the published file must have
    encoding: str  # for a person


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What a caller asks for. The caller has checked the ranges.

    Either `prompt` or `messages`, pairs of a role (system, user, assistant) and a text, is given. A `suffix` makes it
    fill-in-the-middle. With `heal` the prompt's last token may be an unfinished one. `extra` has (name, text) of other
    files.
    """

    prompt: str | None = None
    messages: Sequence[tuple[str, str]] | None = None
    suffix: str | None = None
    filename: str = ""
    extra: Sequence[tuple[str, str]] = ()
    language: str | None = None
    mode: str = "complete"  # or infill, instruct
    stop_at: str = "auto"  # or none
    indent: int = 0  # characters; the completion ends before a line that is indented less
    stop: Sequence[str] = ()
    max_tokens: int = 512  # 0 only reads the prompt into the cache
    predict_ms: int = 0  # ends a completion that takes longer and has a line end; 0: no limit
    temperature: float = 0.4
    top_p: float = 0.95
    seed: int | None = None  # the same seed gives the same text, at a temperature above 0
    heal: bool = False
    progress: bool = False


def begun_answer(messages: Sequence[tuple[str, str]]) -> str:
    """The beginning of the answer, if the messages end with one; the model continues it."""
    role, content = messages[-1]
    return content if role == "assistant" else ""


# ---------------------------------------------------------------------------------------------------- policy: memory


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions in a GGUF's header that decide how much memory the model needs."""

    layers: int
    kv_width: int  # elements of K and V of one token in one layer
    heads: int
    embedding: int
    feed_forward: int
    vocabulary: int


def rss_bytes() -> int:
    """Resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def estimate_bytes(file_size: int, shape: Shape, settings: Settings) -> dict[str, int]:
    """Bytes that a model will need when loaded: its weights, KV cache and compute buffers."""
    element = 2.0 if settings.kv_type == "f16" else 34 / 32  # q8_0: 32 values and a scale in 34 bytes
    cells, outputs = settings.sequences * settings.n_ctx, settings.sequences * (MAX_DRAFT + 1)
    per_cell = 2 if settings.uses_flash_attention else 4 * shape.heads + 2  # bytes; without it, scores of all cells
    per_token = 4 * (8 * shape.embedding + 3 * shape.feed_forward) + per_cell * cells
    return {
        "weights": file_size,
        "kv": int(cells * shape.layers * shape.kv_width * element),
        "compute": settings.micro_batch * per_token + 2 * 4 * outputs * shape.vocabulary,
    }


# ------------------------------------------------------------------------------------- policy: schedule

CALIBRATION_SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
CALIBRATION_SECONDS = 0.4  # spent on each size; at least one decode
LEARN_FROM_TOKENS = 24  # the time of smaller decodes varies too much
LEARNING_RATE = 0.3
MIN_SLOWDOWN, MAX_SLOWDOWN = 0.5, 8.0  # limits what a single odd decode can do
DISTURBED = 0.7  # a slowdown below this means that the machine was busy during calibration
PAUSE_SECONDS = 0.25  # longest pause of a running stream while a chunk of another prompt is read …
PAUSE_TOKENS = 6  # … or the time of this many of its own tokens, if that is longer
PREFILL_SECONDS = 2.0  # longest chunk when no stream is running: progress is reported after each
MAX_CHUNK = 512  # n_batch


class Costs:
    """Seconds of one `llama_decode` by its number of tokens: calibrated points, interpolated linearly.

    The table never changes, because grouping and drafting depend only on its proportions. `slowdown` is the measured
    time of chunks divided by the table's. It grows with the length of the contexts, and matters where a chunk must not
    take longer than some time.
    """

    def __init__(self, table: Mapping[int, float]) -> None:
        self.sizes = sorted(table)
        self.seconds = [table[size] for size in self.sizes]
        self.slowdown = 1.0

    def learn(self, tokens: int, seconds: float) -> None:
        """A decode of `tokens` took `seconds`."""
        if tokens >= LEARN_FROM_TOKENS:
            seen = min(max(seconds / self(tokens), MIN_SLOWDOWN), MAX_SLOWDOWN)
            self.slowdown += LEARNING_RATE * (seen - self.slowdown)

    def __call__(self, tokens: int) -> float:
        if len(self.sizes) == 1:
            return self.seconds[0] * tokens / self.sizes[0]
        right = min(max(bisect.bisect_left(self.sizes, tokens), 1), len(self.sizes) - 1)
        (x0, x1), (y0, y1) = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        return y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    def beside(self, others: int, tokens: int) -> float:
        """The share of one sequence in a decode of its `tokens` and one token of each of `others`, in seconds. Every
        sequence pays an equal part of a decode of one token each; this one also pays for its further tokens."""
        return self(others + tokens) - self(others + 1) * others / (others + 1)

    def longest(self, seconds: float) -> int:
        """Tokens of the longest chunk that will take at most `seconds`: at least 1, at most MAX_CHUNK."""
        return max(1, bisect.bisect_right(range(1, MAX_CHUNK + 1), seconds / self.slowdown, key=self))


def group_by_cost(sizes: Sequence[int], costs: Costs) -> list[list[int]]:
    """Which works (by index) share a `llama_decode`: those that cost less together than one after the other.

    Two single tokens may be slower together (0.5B) or faster (1.5B). A token beside a chunk is nearly free.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for group in groups:
            total = sum(sizes[i] for i in group)
            if total + sizes[index] <= MAX_CHUNK and costs(total + sizes[index]) < costs(total) + costs(sizes[index]):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def share_size(costs: Costs, token_seconds: float) -> int:
    """How many tokens may be decoded at once while a stream waits that takes `token_seconds` for each of its own."""
    return costs.longest(max(PAUSE_SECONDS, PAUSE_TOKENS * token_seconds))


def chunk_size(missing: int, reading: Sequence[int], token_seconds: float | None, costs: Costs) -> int:
    """How many of a prompt's `missing` tokens to read next.

    While streams are running, the chunk is limited by how long the fastest of them may pause; `token_seconds` is the
    time of one of its tokens, None if there is no stream. Otherwise the chunk is at most twice as long as the shortest
    prompt being read (`reading` has the missing tokens of each, including this one). A short prompt then does not wait
    for a long one, and two of similar length are read in one decode.
    """
    if token_seconds is not None:
        return min(missing, share_size(costs, token_seconds))
    return min(missing, 2 * min(reading), costs.longest(PREFILL_SECONDS / len(reading)))


# --------------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # this many tokens must repeat before the tokens that followed them are drafted
MAX_DRAFT = 63
MAX_CHANGE = 8  # tokens of a change in a copy, old or new; after a longer one the copy is searched for anew
NEAR = 48  # after a change the copy usually continues within this many tokens
STREAKS = (GRAM, 5, 8, 12, 16, 24, 32)  # acceptance is counted separately from each of these lengths on
PRIORS = (0.55, 0.65, 0.78, 0.88, 0.92, 0.95, 0.97)  # acceptance of each before anything is known
PRIOR_WEIGHT = 12.0  # in tokens
FORGET = 0.997  # for each decoded token, since a text may begin to repeat late
CREDIT_TOKENS = 4.0  # initial credit of a model
CREDIT_LIMIT = 10.0  # repeating text cannot earn more for text that does not repeat
LOSS_SHARE = 0.01  # of the time spent without drafts may be lost by trying them


class Acceptance:
    """How often drafted tokens were right, by the draft's streak and by whether decoding is greedy.

    Owned by a worker and kept across requests. `credit` limits what drafts may lose, in units of the time of one token
    without drafts. It grows by a share of the time spent without drafts and by what drafts win, and falls by what they
    lose.
    """

    def __init__(self) -> None:
        self.right = {(greedy, bucket): 0.0 for greedy in (True, False) for bucket in range(len(STREAKS))}
        self.wrong = dict(self.right)
        self.credit = CREDIT_TOKENS

    @staticmethod
    def bucket(streak: int) -> int:
        return bisect.bisect_right(STREAKS, streak) - 1

    def probability(self, greedy: bool, streak: int) -> float:
        """Probability that the next drafted token is right."""
        key = greedy, self.bucket(streak)
        prior = PRIORS[key[1]] * (1.0 if greedy else 0.9)
        return (self.right[key] + prior * PRIOR_WEIGHT) / (self.right[key] + self.wrong[key] + PRIOR_WEIGHT)

    def learn(self, greedy: bool, streak: int, drafted: int, accepted: int) -> None:
        """Of a draft of `drafted` tokens the first `accepted` were right."""
        key = greedy, self.bucket(streak)
        for table in (self.right, self.wrong):
            table[key] *= FORGET**accepted
        self.right[key] += accepted
        self.wrong[key] += accepted < drafted

    def spend(self, cost: float, gained: float) -> None:
        """Book one decode: its cost by the table, and the tokens `gained` over plain decoding (0 without a draft)."""
        earned = gained if gained else LOSS_SHARE * cost
        self.credit = min(CREDIT_LIMIT, self.credit + earned)
        if not gained:
            for table in (self.right, self.wrong):
                for key in table:
                    table[key] *= FORGET


def draft_length(probability: float, limit: int, costs: Costs, others: int = 0) -> int:
    """The draft length with the most expected tokens per second; 0 if drafting does not pay.

    Only `limit` and lengths that fill a decode of a calibrated size (with one token of each of `others`) are
    considered: 28 to 31 tokens take as long as 32.
    """
    best, rate = 0, 1.03 / costs.beside(others, 1)
    for length in (*(size - 1 - others for size in costs.sizes), limit):
        if not 0 < length <= limit:
            continue
        expected = (1 - probability ** (length + 1)) / (1 - probability)
        price = costs.beside(others, length + 1)
        if expected / price > rate:
            best, rate = length, expected / price
    return best


class Drafter:
    """Proposes the next tokens of one sequence by looking up what followed the same tokens before: in the sequence
    itself (source 0), or in an earlier sequence with the same prefix (source 1).

    Text that is copied with changes goes on after each change. `changes` maps replaced tokens to the tokens that came
    in their place, and the same change is expected wherever the same tokens are copied again, as in a rename.
    """

    def __init__(self, tokens: Sequence[int], guide: Sequence[int] = (), common: int = 0) -> None:
        self.sources = [list(tokens), list(guide)]
        self.index: dict[tuple[int, ...], list[tuple[int, int]]] = {}  # places after each GRAM tokens
        for position in range(max(GRAM, common), len(guide) + 1):
            self._add(1, position)
        for position in range(GRAM, len(tokens) + 1):
            self._add(0, position)
        self.at: tuple[int, int] | None = None  # source and position of the token expected next
        self.streak = 0  # consecutive tokens the draft predicted correctly; after a change some are credited
        self.before_change = 0  # the streak before the latest mismatch
        self.changed_from = 0  # position in the own sequence where the latest change began
        self.changes: dict[tuple[int, ...], list[int]] = {}
        self.done = 0  # how many tokens of the change expected at `at` have come
        if len(guide) > common == len(tokens):
            self.at, self.streak = (1, common), min(common, STREAKS[-1])
        else:
            self._search()

    def _add(self, source: int, end: int) -> None:
        self.index.setdefault(tuple(self.sources[source][end - GRAM : end]), []).append((source, end))

    def advance(self, token: int) -> None:
        """The sequence went on with `token`."""
        own, known = self.sources[0], bool(self.streak)
        if known:
            self._follow(token)
        own.append(token)
        if len(own) >= GRAM:
            self._add(0, len(own))
        if not known:
            self._realign()
        if not self.streak:
            self._search()

    def _follow(self, token: int) -> None:
        """Move past `token` if it was expected; otherwise the streak ends."""
        assert self.at
        expected, place, done = self._next(self.at, self.done)
        if token == expected:
            self.streak, self.at, self.done = self.streak + 1, place, done
            return
        if change := self._change(self.at):
            del self.changes[change[0]]
            if token == change[0][0] and not self.done:  # this time it was left unchanged
                self.streak, self.at = self.streak + 1, (self.at[0], self.at[1] + 1)
                return
        self.before_change, self.streak = self.streak, 0
        self.changed_from, self.done = len(self.sources[0]) - self.done, 0

    def _change(self, place: tuple[int, int]) -> tuple[tuple[int, ...], list[int]] | None:
        """The change expected at `place`; the longest one if several begin alike."""
        tokens, position = self.sources[place[0]], place[1]
        for length in range(MAX_CHANGE, 0, -1) if self.changes else ():
            old = tuple(tokens[position : position + length])
            if old in self.changes:
                return old, self.changes[old]
        return None

    def _next(self, place: tuple[int, int], done: int) -> tuple[int | None, tuple[int, int], int]:
        """The token expected at `place` after `done` tokens of a change there, and then the next place and `done`."""
        source, position = place
        if change := self._change(place):
            old, new = change
            last = done + 1 == len(new)
            return new[done], (source, position + len(old)) if last else place, 0 if last else done + 1
        if position == len(self.sources[source]):
            return None, place, 0
        return self.sources[source][position], (source, position + 1), 0

    def _realign(self) -> None:
        """After a change, find where the copy continues, and remember the change.

        A replacement of equal length is confirmed by one matching token, any other by two. An insertion or deletion is
        remembered together with the token after it.
        """
        came = len(self.sources[0]) - self.changed_from
        if not self.at or came > MAX_CHANGE:
            return
        own, (source, position) = self.sources[0][-came:], self.at
        end = self.changed_from if source == 0 else len(self.sources[1])  # the change itself is not part of the copy
        other = self.sources[source][position : min(position + MAX_CHANGE + 1, end)]
        for replaced, sure in itertools.product(range(1, min(MAX_CHANGE, len(other))), (1, 2)):
            new = own[: came - sure]
            if new and own[-sure:] == other[replaced : replaced + sure] and (sure > 1 or len(new) == replaced):
                self.changes[tuple(other[:replaced])] = new
                self.at, self.streak = (source, position + replaced + sure), sure + min(self.before_change, 16)
                return

    def _search(self) -> None:
        """Find the place after an earlier occurrence of the latest tokens, if possible near the place just lost."""
        own = self.sources[0]
        places = [place for place in self.index.get(tuple(own[-GRAM:]), ())[-16:] if place != (0, len(own))]
        if not places:
            return
        near = [place for place in places if self.at and self.at[0] == place[0] and abs(place[1] - self.at[1]) <= NEAR]
        if near and self.at:
            self.at = min(near, key=lambda place: abs(place[1] - self.at[1]))  # type: ignore[index]
            self.streak = self._matched(self.at) + min(self.before_change, 16)
        else:
            self.at = max(places, key=lambda place: (self._matched(place), place[1]))
            self.streak = self._matched(self.at)

    def _matched(self, place: tuple[int, int]) -> int:
        """How many of the latest tokens also precede `place`."""
        own, other, count = self.sources[0], self.sources[place[0]], 0
        limit = min(STREAKS[-1], len(own), place[1])
        while count < limit and own[-1 - count] == other[place[1] - 1 - count]:
            count += 1
        return count

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next. `streak` tells how likely they are."""
        if not self.at or self.streak < GRAM:
            return []
        place, done = self.at, self.done
        tokens: list[int] = []
        while len(tokens) < limit:
            token, place, done = self._next(place, done)
            if token is None:
                break
            tokens.append(token)
        return tokens


# ------------------------------------------------------------------------------------- policy: prefixes

# A step of the worker that takes longer has hung: it takes at most a few seconds, or a multiple of what was measured.
STEP_SECONDS, SLOWEST = 120.0, 20.0
MIN_PREFIX = 16  # tokens; a shorter sequence is computed faster than it is stored and restored
STORE_SECONDS = 3.0  # after this long without a request, idle sequences are stored


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of `a` and `b`, two sequences of one type."""
    limit = min(len(a), len(b))
    start = 0
    while start < limit and a[start : start + 64] == b[start : start + 64]:
        start += 64
    start = min(start, limit)
    while start < limit and a[start] == b[start]:
        start += 1
    return start


@dataclass(slots=True)
class Parked:
    """A sequence outside the context: its tokens, and llama.cpp's serialised KV state for exactly these."""

    tokens: list[int]
    state: bytes

    @property
    def size(self) -> int:
        return len(self.state) + 4 * len(self.tokens)


class PrefixStore:
    """Recent sequences within a budget of bytes; the least recently used one is dropped first. Owned by one worker."""

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self.entries: OrderedDict[int, Parked] = OrderedDict()
        self._next = 0

    def covers(self, tokens: list[int]) -> bool:
        """Whether an entry begins with `tokens`. If so, the entry counts as just used."""
        for key, entry in self.entries.items():
            if len(entry.tokens) >= len(tokens) and entry.tokens[: len(tokens)] == tokens:
                self.entries.move_to_end(key)
                return True
        return False

    def add(self, entry: Parked) -> None:
        """Keep `entry`, and drop the entries that it extends, then the oldest ones over the budget."""
        if entry.size > self.budget:
            return
        for key, old in list(self.entries.items()):
            if entry.tokens[: len(old.tokens)] == old.tokens:
                self._drop(key)
        self.entries[self._next] = entry
        self._next += 1
        self.size += entry.size
        while self.size > self.budget:
            self._drop(next(iter(self.entries)))

    def _drop(self, key: int) -> None:
        self.size -= self.entries.pop(key).size

    def best(self, prompt: list[int]) -> tuple[Parked | None, int]:
        """The entry with the longest common prefix with `prompt`, and the length of that prefix."""
        best, length = None, 0
        for key, entry in self.entries.items():
            common = common_prefix(entry.tokens, prompt)
            if common > length:
                best, length = key, common
        if best is None:
            return None, 0
        self.entries.move_to_end(best)
        return self.entries[best], length


KV_MAGIC = b"cerebrum-kv-3\n"


def encode_parked(entry: Parked, key: str) -> bytes:
    """The bytes of a file: magic, sha256 of the rest, length of the header, header as JSON, tokens as int32, state."""
    tokens = struct.pack(f"<{len(entry.tokens)}i", *entry.tokens)
    header = json.dumps({"key": key, "tokens": len(entry.tokens)}).encode()
    rest = struct.pack("<I", len(header)) + header + tokens + entry.state
    return KV_MAGIC + hashlib.sha256(rest).digest() + rest


def decode_parked(data: bytes, key: str) -> Parked:
    """The entry in a file made for `key`; ValueError if the file is damaged, truncated, or made for another key."""
    start = len(KV_MAGIC) + 32
    rest = memoryview(data)[start:]
    if not data.startswith(KV_MAGIC) or hashlib.sha256(rest).digest() != data[len(KV_MAGIC) : start]:
        raise ValueError("damaged")
    (size,) = struct.unpack_from("<I", rest)
    header = json.loads(bytes(rest[4 : 4 + size]))
    if header["key"] != key:
        raise ValueError("made for another model, context or library")
    tokens_end = 4 + size + 4 * header["tokens"]
    tokens = list(struct.unpack(f"<{header['tokens']}i", rest[4 + size : tokens_end]))
    return Parked(tokens, bytes(rest[tokens_end:]))


# ------------------------------------------------------------------------------------------ policy: text

# The word before the cursor, with the preceding character that tokenizers merge into it; or the white space there. Long
# words and scripts without spaces are left alone, because every healed token costs a decode.
UNFINISHED = re.compile(r"(?:[^\r\n\w]|_)?(?<![^\W\d_])[A-Za-z]{1,24}\Z|[ \t]+\Z")
HEAL_CANDIDATES = 512  # likeliest tokens that are checked


def heal_from(prompt: str) -> int:
    """Where the text begins that the model is to write again in tokens of its own ("token healing").

    A model seldom writes `ort` after the tokens of `imp`, because its training text has one token there, ` import`.
    """
    match = UNFINISHED.search(prompt, max(0, len(prompt) - 64))
    return match.start() if match else len(prompt)


class TextAssembler:
    """Turns tokens' bytes into text that may be sent: whole characters, up to a stop string or the natural end."""

    def __init__(self, stops: Sequence[str], ending: Ending) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.cutter = Cutter(stops, ending)

    def feed(self, data: bytes) -> tuple[str, str | None]:
        """The text to send now, and why the completion has ended (None: it goes on)."""
        return self.cutter.feed(self.decoder.decode(data))

    def flush(self, whole: bool = True) -> str:
        """As `Cutter.flush`. The bytes of an incomplete character are dropped."""
        return self.cutter.flush(whole)


# ---------------------------------------------------------------------------------------- IO: llama.cpp


class ModelError(Exception):
    """A model file that llama.cpp cannot load. The message is fit for a client."""


_log_tail: deque[str] = deque(maxlen=20)  # llama.cpp's latest messages, logged when a load fails


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def keep_log(_level: int, text: bytes, _data: Any) -> None:
    _log_tail.append(text.decode("utf-8", "replace").rstrip())


def start_library() -> None:
    """Once in a process, before the first worker starts."""
    llama.llama_log_set(keep_log, None)
    llama.llama_backend_init()


ABORTED = 2  # what llama_decode returns after the abort callback has returned true


def fingerprint(path: Path) -> str:
    """The key of caches made for a model file: a hash of its size, modification time, first and last MiB."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(MB))
        file.seek(max(0, stat.st_size - MB))
        digest.update(file.read(MB))
    return digest.hexdigest()


class Llama:
    """One model and its context: the ctypes calls and nothing else.

    Used only by its worker's thread, except for `encode`, which reads the vocabulary, and `abort`, which sets a byte.
    """

    def __init__(self, path: Path, settings: Settings, progress: Callable[[float], bool]) -> None:
        callback = llama.llama_progress_callback(lambda done, _data: progress(done))
        params = llama.llama_model_default_params()
        params.progress_callback = callback
        # Not mapped: many weights are repacked in memory, and the mapped pages would stay as well. The system counts
        # mapped pages as available memory, so a second model would seem to fit.
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ModelError("llama.cpp cannot load this file; it is damaged, cut short or of an unknown kind")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self.vocab))
        self.logits_row = ctypes.c_float * self.n_vocab
        self.pieces: dict[int, bytes] = {}  # a cache for `piece`
        trained = int(llama.llama_model_n_ctx_train(self.model))
        self.n_ctx = min(settings.n_ctx, trained) if trained > 0 else settings.n_ctx
        # llama.cpp calls the abort callback for every graph node. A Python function would take the GIL each time. The C
        # library's strlen has a matching signature, and on a string of at most one byte it tells whether the byte is
        # set.
        self.abort_flag = ctypes.create_string_buffer(2)
        # A prompt may still be encoded while its client has left and the model is being unloaded.
        self.vocab_lock, self.closed = threading.Lock(), False
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama.ggml_abort_callback)
        self.batch = llama.llama_batch_init(MAX_CHUNK, 0, 1)
        for i in range(MAX_CHUNK):
            self.batch.n_seq_id[i] = 1
        params = llama.llama_context_default_params()
        params.n_ctx = self.n_ctx * settings.sequences
        params.n_batch, params.n_ubatch = MAX_CHUNK, settings.micro_batch
        params.n_seq_max = settings.sequences
        # One token and its draft for every slot. By default the logits buffer would take 300 MB.
        params.n_outputs_max = settings.sequences * (MAX_DRAFT + 1)
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = FLASH_ATTENTION[settings.uses_flash_attention]
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        params.kv_unified = True  # lets sequences share a micro-batch, and a prefix without copying it
        params.no_perf = True
        params.abort_callback = self._strlen
        params.abort_callback_data = ctypes.addressof(self.abort_flag)
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            self.close()
            raise ModelError("llama.cpp cannot make a context for this model; there is too little memory")
        self.memory = llama.llama_get_memory(self.context)

    def close(self) -> None:
        with self.vocab_lock:
            self.closed = True
        llama.llama_batch_free(self.batch)
        if self.context:
            llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    def abort(self) -> None:
        """Make a running `decode` end soon. Called by any thread."""
        self.abort_flag[0] = b"\x01"

    def decode(self, parts: Sequence[tuple[Slot, list[int], int]]) -> int:
        """One `llama_decode`. Each part is (slot, tokens to append, how many of the last tokens get logits). Returns 0,
        or ABORTED; anything else is a fault."""
        index = 0
        batch = self.batch
        for slot, tokens, outputs in parts:
            for i, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = len(slot.tokens) + i
                batch.seq_id[index][0] = slot.id
                batch.logits[index] = i >= len(tokens) - outputs
                index += 1
        batch.n_tokens = index
        return int(llama.llama_decode(self.context, batch))

    def logits(self, index: int) -> Any:
        """float32[n_vocab] for batch position `index`: llama.cpp's own buffer, valid until the next decode."""
        logits = llama.llama_get_logits_ith(self.context, index)
        row: Any = self.logits_row.from_address(ctypes.addressof(logits.contents))
        return np.frombuffer(row, np.float32)

    def greedy(self, index: int) -> int:
        """The likeliest token at batch position `index`; of equally likely ones the first, as in llama.cpp's greedy
        sampler."""
        return int(self.logits(index).argmax())

    def restrict(self, index: int, start: bytes) -> None:
        """Exclude at batch position `index` every token that contradicts the text `start`. A token may cover a part of
        `start` or go beyond it. Only the likeliest tokens are checked, and the tokenizer's own choice."""
        row = self.logits(index)
        likeliest = np.argpartition(row, -HEAL_CANDIDATES)[-HEAL_CANDIDATES:].tolist()
        pieces = [(token, self.piece(token)) for token in likeliest + self.tokenize(start, False)[:1]]
        fits = [token for token, piece in pieces if piece and piece[: len(start)] == start[: len(piece)]]
        kept = row[fits]
        row.fill(-np.inf)
        row[fits] = kept

    def computed(self, slot: Slot) -> int:
        """How many tokens the slot's KV cells hold. After an abort, whole micro-batches of the decode are in them."""
        return int(llama.llama_memory_seq_pos_max(self.memory, slot.id)) + 1

    def trim(self, slot: Slot, length: int) -> None:
        """Drop the slot's KV cells from position `length` on."""
        llama.llama_memory_seq_rm(self.memory, slot.id, length, -1)

    def copy_prefix(self, source: Slot, target: Slot, length: int) -> None:
        """Let the empty `target` share the first cells of `source`."""
        llama.llama_memory_seq_cp(self.memory, source.id, target.id, 0, length)

    def save(self, slot: Slot) -> bytes:
        """The slot's KV state, for `restore`."""
        size = llama.llama_state_seq_get_size(self.context, slot.id)
        buffer = (ctypes.c_uint8 * size)()
        written = llama.llama_state_seq_get_data(self.context, buffer, size, slot.id)
        return bytes(memoryview(buffer)[:written])

    def restore(self, slot: Slot, state: bytes) -> bool:
        """Fill the empty slot with what `save` gave for any slot; False if llama.cpp does not take it."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return int(llama.llama_state_seq_set_data(self.context, buffer, len(state), slot.id)) == len(state)

    def piece(self, token: int) -> bytes:
        """A token's bytes. Control tokens have none."""
        if token not in self.pieces:
            buffer = ctypes.create_string_buffer(256)
            size = int(llama.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False))
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = int(llama.llama_token_to_piece(self.vocab, token, buffer, -size, 0, False))
            self.pieces[token] = buffer.raw[:size]
        return self.pieces[token]

    def is_end(self, token: int) -> bool:
        return bool(llama.llama_vocab_is_eog(self.vocab, token))

    def tokenize(self, text: str | bytes, first: bool, special: bool = False) -> list[int]:
        """Text to tokens. `first` adds the tokens that the model expects at the beginning of a text. With `special`,
        the names of control tokens in the text become those tokens."""
        data = text.encode() if isinstance(text, str) else text
        room = len(data) + 8
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocab, data, len(data), tokens, room, first, special)
        return list(tokens[: max(0, count)])

    def encode(self, request: CompletionRequest) -> tuple[list[int], bytes]:
        """A request's prompt as tokens (plain, fill-in-the-middle or chat), and the end of its text that is left out
        for healing. What a user sends is always text, never control tokens. HttpError 400 if a suffix is given and the
        model has no fill-in-the-middle tokens."""
        with self.vocab_lock:
            if self.closed:
                raise HttpError("SHUTTING_DOWN", "the model has just been unloaded")
            if request.messages:
                return self._encode_chat(request.messages), b""
            prompt = request.prompt or ""
            if request.heal and llama.llama_vocab_type(self.vocab) == llama.LLAMA_VOCAB_TYPE_BPE:
                start = heal_from(prompt)
                if tokens := self._encode_text(request, prompt[:start]):
                    return tokens, prompt[start:].encode()
            return self._encode_text(request, prompt), b""

    def _encode_text(self, request: CompletionRequest, prompt: str) -> list[int]:
        if request.suffix is None:
            files = self._encode_files(request)
            if not files:
                return self.tokenize(prompt, True)
            return [*self.tokenize("", True), *files, *self.tokenize(prompt, False)]
        before, after, middle = (
            int(getattr(llama, f"llama_vocab_fim_{name}")(self.vocab)) for name in ("pre", "suf", "mid")
        )
        if min(before, after, middle) < 0:
            raise HttpError(
                "INVALID_REQUEST", "suffix: expected a model with fill-in-the-middle tokens, got one without"
            )
        start, files = self.tokenize("", True), self._encode_files(request)
        text, suffix = self.tokenize(prompt, False), self.tokenize(request.suffix, False)
        return [*start, *files, before, *text, after, *suffix, middle]

    def _encode_files(self, request: CompletionRequest) -> list[int]:
        """Other files' texts, each behind the model's mark for a file and its name; then the name of the file itself.
        A model without the mark gets the texts alone."""
        mark, name = int(llama.llama_vocab_fim_sep(self.vocab)), request.filename
        files = [text if mark < 0 else f"{name}\n{text}" for name, text in request.extra]
        if name and mark >= 0 and (files or request.suffix is not None):
            files.append(name)
        marks = [mark] if mark >= 0 else []
        return [token for file in files for token in (*marks, *self.tokenize(file.rstrip("\n") + "\n", False))]

    def _encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Apply the chat template to placeholders, then put the messages in their places: the template's own text may
        contain control tokens, the messages may not. If the last message is the assistant's, the answer begins with
        it."""
        begun = begun_answer(messages)
        messages = messages[: len(messages) - bool(begun)]
        marks = [f"\x01{number}\x02" for number in range(len(messages))]
        chat = (llama.llama_chat_message * len(messages))(
            *(
                llama.llama_chat_message(role.encode(), mark.encode())
                for (role, _), mark in zip(messages, marks, strict=True)
            )
        )
        template = llama.llama_model_chat_template(self.model, None)
        buffer = ctypes.create_string_buffer(4096 + 128 * len(messages))
        for name in (template, b"chatml"):
            size = llama.llama_chat_apply_template(name, chat, len(messages), True, buffer, len(buffer))
            if size >= 0:
                break
        rest, tokens = buffer.raw[:size].decode(), []
        for number, ((_, content), mark) in enumerate(zip(messages, marks, strict=True)):
            glue, found, rest = rest.partition(mark)
            tokens += self.tokenize(glue, number == 0, special=True)
            tokens += self.tokenize(content, False) if found else []
        return tokens + self.tokenize(rest, False, special=True) + self.tokenize(begun, False)


class Sampler:
    """Chooses the next token of one request: the likeliest at temperature 0, else by top-k 40, top-p, min-p,
    temperature and the seed.

    Drafts do not change what is chosen: each position is sampled in turn, with one random number a token. But the size
    of a batch changes how logits are rounded. A request with a seed must give the same text again (`exact`), so nothing
    of it is drafted or batched, and the prompt's last token is decoded alone whether or not the rest is cached.
    """

    def __init__(self, request: CompletionRequest) -> None:
        self.greedy = request.temperature == 0
        self.exact = request.seed is not None and not self.greedy
        self.chain = None
        if self.greedy:
            return
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        seed = request.seed if request.seed is not None else int.from_bytes(os.urandom(4), "little") % MAX_SEED
        for sampler in (
            llama.llama_sampler_init_top_k(40),
            llama.llama_sampler_init_top_p(request.top_p, 1),
            llama.llama_sampler_init_min_p(0.05, 1),
            llama.llama_sampler_init_temp(request.temperature),
            llama.llama_sampler_init_dist(seed),
        ):
            llama.llama_sampler_chain_add(self.chain, sampler)

    def sample(self, model: Llama, index: int) -> int:
        if self.greedy:
            return model.greedy(index)
        return int(llama.llama_sampler_sample(self.chain, model.context, index))

    def close(self) -> None:
        chain, self.chain = self.chain, None
        if chain:
            llama.llama_sampler_free(chain)


# -------------------------------------------------------------------------------------------- IO: worker

Event = dict[str, Any]  # {"token", "total_tokens"}, {"progress": {"stage", "done", "total"}} or {"done": True, …}
MAX_BACKLOG = 256  # deliveries that a client has not read yet, before its job pauses
RESUME_BACKLOG = 64  # whoever reads the deliveries calls `Worker.wake` when so few are left


class Job:
    """A request on its way through a worker.

    The worker's thread calls `deliver` with a list of events, the last of which is a done event or an HttpError. It
    pauses the job while `unread()` is MAX_BACKLOG or more. `cancelled` is written by the other side only.
    """

    def __init__(
        self,
        request: CompletionRequest,
        deliver: Callable[[list[Event | HttpError]], None],
        unread: Callable[[], int] = lambda: 0,
    ) -> None:
        self.request, self.deliver, self.unread = request, deliver, unread
        self.prompt: list[int] = []
        self.max_tokens = request.max_tokens
        self.heal = b""  # what the completion begins with and the client already has
        self.cancelled = False
        self.started = self.submitted = time.monotonic()
        self.request_id = request_id_var.get()

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.request.progress:
            self.deliver([{"progress": {"stage": stage, "done": done, "total": total}}])


@dataclass(slots=True)
class ModelTally(Tally):
    """Totals of a model's completions and of the work on them, whether or not it is loaded. The worker's thread
    writes all but the loads."""

    drafts: int = 0  # decodes of drafted tokens
    decodes: int = 0  # calls of llama_decode
    decoded_sequences: int = 0  # in all of them
    prompt_seconds: float = 0.0  # from the start of each completion to its first token
    token_seconds: float = 0.0  # from there to its last token
    loads: int = 0
    failed_loads: int = 0
    load_seconds: float = 0.0  # of those that succeeded


@dataclass(slots=True)
class Slot:
    """A sequence id of the context, and the tokens whose KV it holds. `used` orders idle slots by age."""

    id: int
    tokens: list[int] = field(default_factory=list)
    run: Run | None = None
    used: float = 0.0


class Run:
    """A job in its slot: what has been decoded, what is still to do, and the counters for the result."""

    def __init__(self, job: Job, slot: Slot, cached: int, guide: list[int]) -> None:
        request, turns = job.request, job.request.messages or ()
        self.job, self.slot, self.cached, self.guide, self.heal = job, slot, cached, guide, job.heal
        prompt = begun_answer(turns) if turns else "" if request.mode == "instruct" else request.prompt or ""
        asked = [content for role, content in turns if role == "user"]
        ending = Ending(
            request.mode,
            request.language,
            prompt,
            request.suffix,
            request.stop_at,
            extras=wants_extras(asked),
            indent=request.indent,
        )
        self.text = TextAssembler(request.stop, ending)
        self.sampler = Sampler(request)
        self.drafter: Drafter | None = None
        self.pending: int | None = None  # sampled, not yet decoded
        self.generated = self.drafted = self.accepted = 0
        self.beside = 0  # other streams' tokens in the same decode
        self.started, self.first_token, self.last_token = time.monotonic(), 0.0, 0.0
        self.has_line = False  # a line end has been generated
        self.outbox: list[Event | HttpError] = []

    @property
    def prefilling(self) -> bool:
        return self.pending is None

    def result(self, reason: str) -> Event:
        """The done event."""
        job, now = self.job, time.monotonic()
        span = self.last_token - self.first_token
        return {
            "done": True,
            "total_tokens": self.generated,
            "inference_time": round(now - job.started, 3),
            "mode": job.request.mode,
            "finish_reason": reason,
            "prompt_tokens": len(job.prompt),
            "cached_tokens": self.cached,
            "load_time": round(job.submitted - job.started, 4),
            "ttft": round(self.first_token - job.submitted, 4) if self.first_token else None,
            "tokens_per_second": round((self.generated - 1) / span, 2) if span > 0 else None,
            "draft_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        }


@dataclass(slots=True)
class Work:
    """What one sequence wants of the next decode: tokens to append, the last `outputs` of them with logits."""

    run: Run
    tokens: list[int]
    outputs: int


class Baton:
    """What the workers of one process share: whose turn it is to compute.

    llama.cpp's threads spin, so two models that compute at once on two cores would crawl. A worker holds the baton for
    one decode, and it is passed on in the order of asking. `active` has the workers with running sequences, and the
    seconds that one token takes each of them.
    """

    def __init__(self) -> None:
        self.active: dict[Worker, float] = {}
        self._lock = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False

    def note(self, worker: Worker, token_seconds: float | None) -> None:
        """`worker` has running sequences, each token of which takes so long; None: it has none any more."""
        with self._lock:
            self.active.pop(worker, None)
            if token_seconds is not None:
                self.active[worker] = token_seconds

    def fastest_other(self, worker: Worker) -> float | None:
        """Seconds of one token of the fastest other worker that waits while this one computes; None: nobody does."""
        with self._lock:
            return min((seconds for other, seconds in self.active.items() if other is not worker), default=None)


class Worker(threading.Thread):
    """Owns one model's llama context, from load to unload.

    `ready` and `ended` are settled by the thread: `ready` when the model is loaded (or with the HttpError that tells
    why not), `ended` when everything is freed. Every submitted job gets a last event, whatever happens.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        settings: Settings,
        sha256: str = "",
        baton: Baton | None = None,
        tuned: TunedFile | None = None,
        tally: ModelTally | None = None,
    ) -> None:
        super().__init__(name=f"worker-{name}", daemon=True)
        self.model, self.path, self.settings, self.sha256, self.tuned = name, path, settings, sha256, tuned
        self.encoding = "published"
        self.baton = baton or Baton()
        self.inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.ready: Future[None] = Future()
        self.ended: Future[None] = Future()
        self.stopping = False
        self.load_progress = 0.0
        self.memory_bytes = 0  # that loading added
        self.llama: Llama | None = None
        self.store = PrefixStore(settings.cache_mb * MB)
        self.slots = [Slot(i) for i in range(settings.sequences)]
        self.waiting: list[Job] = []
        self.tally = tally or ModelTally()
        self.running: list[Run] = []  # in the llama_decode that is under way; written by the thread, read by all
        self.due = math.inf  # when the step that is under way must have ended; monotonic; written by the thread
        self._door = threading.Lock()  # between a job that is handed over and the end of the thread
        self._closed = False
        self._farewell = HttpError("SHUTTING_DOWN", f"model {name} is being unloaded; try again")

    # -- called by any other thread

    def prepare(self, job: Job) -> Job:
        """Turn the job's prompt into tokens, once the model is loaded. HttpError 400 with the figures if they do not
        fit into the context. A megabyte of text takes a second: an event loop leaves this to a thread."""
        self.ready.result()
        assert self.llama
        job.prompt, job.heal = self.llama.encode(job.request)
        count, n_ctx = len(job.prompt), self.llama.n_ctx
        if not 0 < count < n_ctx:
            raise HttpError(
                "INVALID_REQUEST",
                f"prompt: expected 1 to {n_ctx - 1} tokens, got {count}",
                extra={"prompt_tokens": count, "n_ctx": n_ctx},
            )
        job.max_tokens = min(job.request.max_tokens, n_ctx - count)
        return job

    def tokenize(self, text: str, first: bool, special: bool) -> list[int]:
        """`Llama.tokenize`, once the model is loaded."""
        self.ready.result()
        assert self.llama
        with self.llama.vocab_lock:
            if self.llama.closed:
                raise self._farewell
            return self.llama.tokenize(text, first, special)

    def submit(self, job: Job) -> None:
        """Hand a prepared job over; its events begin to arrive."""
        job.progress("queued", 0, 1)
        job.submitted = time.monotonic()
        with self._door:
            if not self._closed:
                self.inbox.put(job)
                return
        job.deliver([self._farewell])

    def cancel(self, job: Job) -> None:
        """Nobody wants the job's result any more. A decode that works for cancelled jobs alone is aborted."""
        job.cancelled = True
        self.inbox.put(None)
        running = self.running
        if self.llama and running and all(run.job.cancelled for run in running):
            self.llama.abort()

    def wake(self) -> None:
        """A paused job's client has read on."""
        self.inbox.put(None)

    def stop(self) -> None:
        """End the thread soon, without waiting for it; sequences are saved to disk first."""
        self.stopping = True
        self.inbox.put(None)
        if self.llama:
            self.llama.abort()

    # -- the thread

    def _beat(self) -> bool:
        """Note progress for the watchdog. Returns whether to stop."""
        self.due = time.monotonic() + STEP_SECONDS
        return self.stopping

    def run(self) -> None:
        try:
            self.due = time.monotonic() + STEP_SECONDS
            failure = self._load_logged()
            if failure is None:
                self.ready.set_result(None)
                self._serve()
            self._close()
            if failure is not None:  # only now, when its memory is free
                self.ready.set_exception(failure)
        finally:
            self.due = math.inf
            if not self.ready.done():
                self.ready.set_exception(self._farewell)
            self.ended.set_result(None)

    def _load_logged(self) -> HttpError | None:
        """Load the model; why that failed, if it did."""
        try:
            self._load()
        except Exception as error:
            return self._load_failure(error)
        return None

    def _serve(self) -> None:
        try:
            while not self._beat():
                self._turn()
        except Exception:
            log.exception("model %s: the worker failed; the next request loads the model again", self.model)
            self.stopping = True
            self._farewell = HttpError("INTERNAL_ERROR", f"model {self.model} failed and is loaded again; see the log")

    def _load_failure(self, error: Exception) -> HttpError:
        if self.stopping:
            return HttpError("SHUTTING_DOWN", f"model {self.model}: loading was given up")
        if isinstance(error, ModelError):
            log.error("model %s: %s; llama.cpp said: %s", self.model, error, " | ".join(_log_tail)[-1000:])
            return HttpError("MODEL_LOAD_FAILED", f"model {self.model} ({self.path.name}): {error}")
        log.error("model %s: loading failed", self.model, exc_info=error)
        return HttpError("MODEL_LOAD_FAILED", f"model {self.model}: loading failed; see the log")

    def _load(self) -> None:
        before = rss_bytes()
        self.llama = self._open()
        settings = self.settings
        params = f"{settings.sequences} {settings.kv_type} {settings.micro_batch} {settings.uses_flash_attention}"
        key = f"{fingerprint(self.path)} {llama_cpp.__version__} {self.llama.n_ctx} {params}"
        self.key = hashlib.sha256(key.encode()).hexdigest()
        self.acceptance = Acceptance()
        self.costs = load_costs(self.llama, self.calibration, self.baton, self._beat)
        for entry in load_parked(self.kv_dir, self.key, self.store.budget):
            self._beat()
            self.store.add(entry)
        self.memory_bytes = max(0, rss_bytes() - before - self.store.size)
        log.info(
            "model %s loaded (%s): %d MB; decode of 1/2/16 tokens %.1f/%.1f/%.1f ms; %d sequences restored",
            self.model, self.encoding, self.memory_bytes // MB, *(self.costs(n) * 1e3 for n in (1, 2, 16)),
            len(self.store.entries),
        )  # fmt: skip

    def _open(self) -> Llama:
        """The model from the tuned file, or from the published one if that is what works."""

        def progress(done: float) -> bool:
            self.load_progress = done
            return not self._beat()

        if tuned := self.tuned:
            try:
                check_digest(self.path, tuned.source, self.settings.state_dir, self._beat)
                model = Llama(tuned.path, tuned.settings, progress)
            except (ModelError, OSError) as error:
                if self.stopping:
                    raise
                log.warning("model %s: the published file is used, not the tuned one: %s", self.model, error)
            else:
                self.path, self.settings, self.encoding = tuned.path, tuned.settings, tuned.encoding
                return model
        check_digest(self.path, self.sha256, self.settings.state_dir, self._beat)
        return Llama(self.path, self.settings, progress)

    @property
    def calibration(self) -> Path:
        return self.settings.state_dir / "calibration" / f"{self.key[:32]}-{self.settings.threads}.json"

    @property
    def kv_dir(self) -> Path:
        return self.settings.state_dir / "kv" / self.model

    def _close(self) -> None:
        """Answer every job, save the parked sequences, free the model: each step even if the one before it fails."""
        with self._door:
            self._closed = True
        self.baton.note(self, None)
        for run in [slot.run for slot in self.slots if slot.run]:
            with self._logged("ending a request"):
                self._fail(run, self._farewell)
        for job in [*self.waiting, *self._drain()]:
            with self._logged("refusing a request"):
                job.deliver([self._farewell])
        if not self.llama:
            return
        if self.ready.done():  # else the slots hold nothing yet
            with self._logged("saving parked sequences"):
                for slot in self.slots:
                    self._beat()
                    self._park(slot)
                save_parked(self.kv_dir, self.key, list(self.store.entries.values()), self._beat)
        self.store = PrefixStore(0)
        with self._logged("freeing the model"):
            self.llama.close()

    @contextlib.contextmanager
    def _logged(self, step: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            log.exception("model %s: %s failed", self.model, step)

    def _drain(self) -> Iterator[Job]:
        with contextlib.suppress(queue.Empty):
            while True:
                if job := self.inbox.get_nowait():
                    yield job

    def _runs(self) -> list[Run]:
        """The running sequences whose clients keep up."""
        return [slot.run for slot in self.slots if slot.run and slot.run.job.unread() < MAX_BACKLOG]

    def _turn(self) -> None:
        """Take what came, let every sequence say what it wants next, and decode that in the cheapest grouping."""
        self._take()
        runs = self._runs()
        self.baton.note(self, self.costs(1) if runs else None)
        if not runs:
            self._recalibrate()
            if job := self._wait():
                self.waiting.append(job)
            return
        works: list[Work] = []
        for run in runs:
            with self._blamed_on(run):
                works.append(self._next_work(run, runs))
        shared = [work for work in works if not work.run.sampler.exact]
        groups = group_by_cost([len(work.tokens) for work in shared], self.costs)
        steps = [[shared[i] for i in group] for group in groups]
        for step in steps + [[work] for work in works if work.run.sampler.exact]:
            members = [work for work in step if work.run.slot.run is work.run]
            if members and not self.stopping:
                self._step(members)

    def _take(self) -> None:
        """Start the jobs that have come, and repeat until the inbox is empty: more may come while a sequence is parked,
        which takes milliseconds."""
        while True:
            self.waiting += self._drain()
            self._drop_cancelled()
            self._start_waiting()
            if self.inbox.empty():
                return

    def _wait(self) -> Job | None:
        """The next job, or None for a mere wake-up. Idle sequences are stored after STORE_SECONDS of quiet, when no
        request has to wait for that: one of 3,500 tokens takes a fifth of a second."""
        with contextlib.suppress(queue.Empty):
            return self.inbox.get(timeout=STORE_SECONDS)
        for slot in self.slots:
            if self.inbox.empty() and not slot.run:
                self._store(slot)
        self.due = math.inf
        try:
            return self.inbox.get()
        finally:
            self.due = time.monotonic() + STEP_SECONDS

    def _recalibrate(self) -> None:
        """Calibrate again if the last calibration ran on a busy machine, and nobody waits here or at another model."""
        assert self.llama
        busy = any(slot.run for slot in self.slots) or self.baton.fastest_other(self) is not None
        if self.costs.slowdown > DISTURBED or busy:
            return
        for slot in self.slots:
            self._park(slot)
        self.llama.abort_flag[0] = b"\x00"
        table = calibrate(self.llama, self.calibration, self.baton, lambda: self._beat() or not self.inbox.empty())
        if table:
            self.costs = Costs(table)

    def _drop_cancelled(self) -> None:
        self.waiting = [job for job in self.waiting if not job.cancelled]
        for slot in self.slots:
            if slot.run and slot.run.job.cancelled:
                self._release(slot.run, CANCELLED)

    def _start_waiting(self) -> None:
        for job in list(self.waiting):
            free = [slot for slot in self.slots if not slot.run]
            if not free:
                return
            if self._prefix_is_coming(job.prompt):
                continue
            self.waiting.remove(job)
            try:
                self._start(job, free)
            except Exception:
                log.exception("request %s could not be started", job.request_id)
                for slot in free:  # whatever was half done there
                    self._forget(slot)
                job.deliver([HttpError("INTERNAL_ERROR", "internal error; see the log")])

    def _prefix_is_coming(self, prompt: list[int]) -> bool:
        """Whether a running prefill will soon have computed more of this prompt than anything has now."""
        leaders = [slot.run for slot in self.slots if slot.run and slot.run.prefilling]
        have = max(common_prefix(slot.tokens, prompt) for slot in self.slots)
        have = max(have, self.store.best(prompt)[1])
        return any(
            min(common_prefix(run.job.prompt, prompt), len(prompt) - 1) > max(have, len(run.slot.tokens)) + MIN_PREFIX
            for run in leaders
        )

    def _start(self, job: Job, free: list[Slot]) -> None:
        """Give the job a slot that holds as much of its prompt as is known anywhere; the rest is prefilled."""
        assert self.llama
        prompt = job.prompt
        entry, stored = self.store.best(prompt)
        nearest = max(self.slots, key=lambda slot: common_prefix(slot.tokens, prompt))
        live = common_prefix(nearest.tokens, prompt)
        source = entry if entry and stored > live else nearest
        guide = source.tokens[:]
        from_store = stored > live and stored >= MIN_PREFIX
        in_place = nearest in free and not from_store
        slot = nearest if in_place else min(free, key=lambda slot: slot.used)
        for other in free:
            if other is not slot or not in_place:
                self._park(other)
            elif len(slot.tokens) > 2 * live:  # more is lost than kept
                self._store(slot)
        if entry and from_store:
            if self.llama.restore(slot, entry.state):
                slot.tokens = entry.tokens[:]
        elif not in_place:
            self.llama.copy_prefix(nearest, slot, live)
            slot.tokens = prompt[:live]
        # The prompt's last token is computed in any case, for the logits after it.
        cached = min(common_prefix(slot.tokens, prompt), len(prompt) - 1)
        self.llama.trim(slot, cached)
        slot.tokens = prompt[:cached]
        job.progress("prefill", cached, len(prompt))
        self.tally.cached_tokens += cached
        slot.run = Run(job, slot, cached, guide)

    def _park(self, slot: Slot) -> None:
        """Move an idle slot's sequence to the store, so that only running sequences occupy KV cells."""
        self._store(slot)
        self._forget(slot)

    def _store(self, slot: Slot) -> None:
        assert self.llama
        if len(slot.tokens) >= MIN_PREFIX and self.store.budget and not self.store.covers(slot.tokens):
            self.store.add(Parked(slot.tokens[:], self.llama.save(slot)))

    def _forget(self, slot: Slot) -> None:
        assert self.llama
        self.llama.trim(slot, 0)
        slot.tokens = []

    def _next_work(self, run: Run, runs: list[Run]) -> Work:
        prompt, slot = run.job.prompt, run.slot
        if run.pending is None:
            missing = len(prompt) - len(slot.tokens)
            reading = [len(other.job.prompt) - len(other.slot.tokens) for other in runs if other.prefilling]
            whole = missing - (run.sampler.exact and missing > 1)
            size = chunk_size(whole, reading, self._pace(own=len(reading) < len(runs)), self.costs)
            end = len(slot.tokens) + size
            outputs = int(end == len(prompt) and run.job.max_tokens > 0)
            return Work(run, prompt[len(slot.tokens) : end], outputs)
        run.beside = self._beside(run, runs)
        draft = self._draft(run, self._pace(own=len(runs) > 1))
        return Work(run, [run.pending, *draft], 1 + len(draft))

    def _pace(self, own: bool) -> float | None:
        """Seconds of one token of the fastest stream that waits for a decode, of this model (`own`) or of another."""
        paces = [self.costs(1)] * own
        if (other := self.baton.fastest_other(self)) is not None:
            paces.append(other)
        return min(paces, default=None)

    def _beside(self, run: Run, runs: list[Run]) -> int:
        """How many streams' tokens will share this one's decode: more tokens then cost less than they would alone."""
        if run.sampler.exact:
            return 0
        streams = sum(not (other is run or other.prefilling or other.sampler.exact) for other in runs)
        return streams if self.costs(streams + 1) < (streams + 1) * self.costs(1) else 0

    def _draft(self, run: Run, pace: float | None) -> list[int]:
        assert self.llama
        assert run.drafter
        room = min(
            MAX_DRAFT,
            run.job.max_tokens - run.generated - 1,
            self.llama.n_ctx - len(run.slot.tokens) - 2,
            MAX_DRAFT if pace is None else share_size(self.costs, pace) - 1,
        )
        if not self.settings.draft or run.sampler.exact or run.heal or room <= 0:
            return []
        if self.acceptance.credit <= 0 and run.drafter.streak < STREAKS[-1]:
            return []
        tokens = run.drafter.propose(room)
        if not tokens:
            return []
        probability = self.acceptance.probability(run.sampler.greedy, run.drafter.streak)
        return tokens[: draft_length(probability, len(tokens), self.costs, run.beside)]

    def _step(self, works: list[Work]) -> None:
        """One llama_decode and what follows from it for each of its sequences."""
        assert self.llama
        self.llama.abort_flag[0] = b"\x00"
        try:
            self.running = [work.run for work in works]
            if self.stopping or all(run.job.cancelled for run in self.running):
                return
            with self.baton:
                size = sum(len(work.tokens) for work in works)
                self.due = time.monotonic() + max(STEP_SECONDS, SLOWEST * self.costs(size))
                begin = time.perf_counter()
                code = self.llama.decode([(work.run.slot, work.tokens, work.outputs) for work in works])
                seconds = time.perf_counter() - begin
        finally:
            self.running = []
        if code:
            self._after_failure(works, code)
            return
        self.costs.learn(size, seconds)
        self.tally.decodes += 1
        self.tally.decoded_sequences += len(works)
        base = 0
        for work in works:
            with self._blamed_on(work.run):
                if work.run.prefilling:
                    self._after_prefill(work, base)
                else:
                    self._after_decode(work, base)
            base += len(work.tokens)
        for work in works:
            self._flush(work.run)

    def _after_failure(self, works: list[Work], code: int) -> None:
        """The decode was aborted, or llama.cpp could not do it."""
        assert self.llama
        for work in works:
            slot = work.run.slot
            if work.run.prefilling:  # what was read before the abort stays useful as a prefix
                # But not the prompt's last token: its logits are missing, so it has to be decoded again.
                read = min(self.llama.computed(slot) - len(slot.tokens), len(work.tokens) - 1)
                slot.tokens += work.tokens[: max(0, read)]
                self.tally.prompt_tokens += max(0, read)
            self.llama.trim(slot, len(slot.tokens))
            if code != ABORTED:
                log.error("llama_decode answered %d", code)
                self._fail(work.run, HttpError("INTERNAL_ERROR", "the model could not be evaluated"))

    @contextlib.contextmanager
    def _blamed_on(self, run: Run) -> Iterator[None]:
        """What goes wrong with one request ends that one alone."""
        try:
            yield
        except Exception:
            log.exception("request %s", run.job.request_id)
            self._fail(run, HttpError("INTERNAL_ERROR", "internal error; see the log"))
            self._forget(run.slot)  # its tokens and its cells may no longer agree

    def _after_prefill(self, work: Work, base: int) -> None:
        run, slot = work.run, work.run.slot
        slot.tokens += work.tokens
        self.tally.prompt_tokens += len(work.tokens)
        run.job.progress("prefill", len(slot.tokens), len(run.job.prompt))
        if len(slot.tokens) < len(run.job.prompt):
            return
        if not work.outputs:
            self._finish(run, "length")
            return
        run.job.progress("decode", 0, run.job.max_tokens)
        run.pending = self._sample(run, base + len(work.tokens) - 1)
        ended = self._emit(run, run.pending)
        self._flush(run)
        if not ended:  # only now: it takes a millisecond for each thousand tokens
            run.drafter = Drafter(run.job.prompt, run.guide, common_prefix(run.guide, run.job.prompt))
            run.drafter.advance(run.pending)

    def _after_decode(self, work: Work, base: int) -> None:
        """Accept drafted tokens as long as the target's own choice at each position is the drafted one."""
        assert self.llama
        run, slot, drafted = work.run, work.run.slot, len(work.tokens) - 1
        before, streak = run.generated, run.drafter.streak if run.drafter else 0
        accepted = 0
        for i, token in enumerate(work.tokens):
            slot.tokens.append(token)
            run.pending = self._sample(run, base + i)
            if self._emit(run, run.pending) or i == drafted or run.pending != work.tokens[i + 1]:
                break
            accepted += 1
        cost = self.costs.beside(run.beside, drafted + 1) / self.costs.beside(run.beside, 1)
        self.acceptance.spend(cost, run.generated - before - cost if drafted else 0.0)
        if drafted:
            self.llama.trim(slot, len(slot.tokens))
            self.acceptance.learn(run.sampler.greedy, streak, drafted, accepted)
            run.drafted += drafted
            run.accepted += accepted
            self.tally.drafts += 1
            self.tally.draft_tokens += drafted
            self.tally.accepted_tokens += accepted

    def _sample(self, run: Run, index: int) -> int:
        assert self.llama
        if run.heal:
            self.llama.restrict(index, run.heal)
        return run.sampler.sample(self.llama, index)

    def _emit(self, run: Run, token: int) -> bool:
        """Account for one sampled token; True if the completion ends with it."""
        assert self.llama
        run.last_token = time.monotonic()
        if not run.generated:
            run.first_token = run.last_token
        if self.llama.is_end(token):
            self._finish(run, "stop")
            return True
        piece = self.llama.piece(token)
        known = min(len(piece), len(run.heal))
        run.heal, piece = run.heal[known:], piece[known:]
        counts = bool(piece) or not known  # a token that repeats what the client has does not
        run.generated += counts
        self.tally.tokens += counts
        if run.drafter:
            run.drafter.advance(token)
        text, reason = run.text.feed(piece)
        if text:
            run.outbox.append({"token": text, "total_tokens": run.generated})
        full = len(run.slot.tokens) + 1 >= self.llama.n_ctx
        run.has_line = run.has_line or b"\n" in piece
        limit = run.job.request.predict_ms
        late = limit > 0 and run.has_line and 1000 * (run.last_token - run.first_token) > limit
        if not reason and (run.generated >= run.job.max_tokens or full or late):
            reason = "length"
            self._finish(run, reason)
        elif reason:
            self._finish(run, reason, flush=False)
        return reason is not None

    def _finish(self, run: Run, reason: str, flush: bool = True) -> None:
        if flush and (text := run.text.flush(reason == "stop")):
            run.outbox.append({"token": text, "total_tokens": run.generated})
        run.outbox.append(run.result(reason))
        self._release(run, reason)

    def _fail(self, run: Run, error: HttpError) -> None:
        if run.slot.run is not run:
            return  # it has had its last event
        run.outbox.append(error)
        self._release(run, error.code)

    def _release(self, run: Run, reason: str) -> None:
        """The slot is idle again; its sequence stays, as a prefix of what may come."""
        run.slot.run = None
        tally = self.tally
        tally.prompt_seconds += (run.first_token or time.monotonic()) - run.started
        if run.first_token:
            tally.token_seconds += run.last_token - run.first_token
            tally.spoke(run.first_token - run.job.submitted, run.last_token - run.job.submitted, run.generated)
        tally.end(reason)
        run.slot.used = time.monotonic()
        run.sampler.close()
        self._flush(run)

    def _flush(self, run: Run) -> None:
        """Deliver what is in the outbox."""
        if run.outbox:
            events, run.outbox = run.outbox, []
            run.job.deliver(events)


# --------------------------------------------------------------------------------- IO: files of a worker


def file_digest(path: Path, tick: Callable[[int], None]) -> str:
    """The file's sha256. `tick` gets the number of bytes read, again and again; what it raises ends the reading."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(4 * MB):
            digest.update(data)
            done += len(data)
            tick(done)
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """The file's size and the time of its last change, in nanoseconds. Unlike the time of writing, no program can set
    that back."""
    stat = path.stat()
    return f"{stat.st_size}.{stat.st_ctime_ns}"


def check_digest(path: Path, sha256: str, state_dir: Path, stopping: Callable[[], bool]) -> None:
    """ModelError unless the file has this sha256 (empty: not checked). A good result is remembered by the file's
    stamp."""
    if not sha256:
        return
    stamp = state_dir / "verified" / f"{path.name}.{file_stamp(path)}.{sha256[:16]}"
    if stamp.exists():
        return

    def tick(_done: int) -> None:
        if stopping():
            raise ModelError("cancelled")

    if (got := file_digest(path, tick)) != sha256:
        raise ModelError(f"expected sha256 {sha256}, got {got}; fetch it again")
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def load_costs(model: Llama, path: Path, baton: Baton, give_up: Callable[[], bool]) -> Costs:
    """The calibration for this model file, library and thread count: read from disk, or measured now and written."""
    try:
        table = {int(size): float(seconds) for size, seconds in json.loads(path.read_text()).items()}
        if tuple(sorted(table)) == CALIBRATION_SIZES and min(table.values()) > 0:
            return Costs(table)
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    table = calibrate(model, path, baton, give_up)
    if not table:
        raise ModelError("loading was given up")
    return Costs(table)


def calibrate(model: Llama, path: Path, baton: Baton, give_up: Callable[[], bool]) -> dict[int, float]:
    """Measure and write the table. Returns an empty one if `give_up()` became true in between."""
    table = measure_costs(model, baton, give_up)
    if table:
        with contextlib.suppress(OSError):
            write_atomically(path, json.dumps(table).encode())
    return table


def measure_costs(model: Llama, baton: Baton, give_up: Callable[[], bool]) -> dict[int, float]:
    """Seconds of one decode of each of CALIBRATION_SIZES tokens, the best of several; an empty table if given up.

    Every size gets about the same total time, so small sizes, whose differences matter most, are measured most often.
    Another model may decode between two measurements.
    """
    table = dict.fromkeys(CALIBRATION_SIZES, float("inf"))
    spent = dict.fromkeys(CALIBRATION_SIZES, 0.0)
    warm, slot = False, Slot(0)  # the first decode after a load takes twice as long and is not counted
    while min(spent.values()) < CALIBRATION_SECONDS:
        if give_up():
            return {}
        size = min(spent, key=lambda size: spent[size])
        with baton:
            begin = time.perf_counter()
            code = model.decode([(slot, [1] * size, size)])
            seconds = time.perf_counter() - begin
        model.trim(slot, 0)
        if code == ABORTED:  # by a stop, or by a cancelled job that came late
            return {}
        if code:
            raise ModelError("llama.cpp cannot evaluate this model")
        if not warm:
            warm = True
            continue
        table[size] = min(table[size], seconds)
        spent[size] += seconds
    return table


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file in one step. The file and a new folder are for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}")  # of one name, so that what a killed process left is replaced
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=0o600)) as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise


def save_parked(folder: Path, key: str, entries: Sequence[Parked], tick: Callable[[], object] = bool) -> None:
    """Write a model's parked sequences, the most recently used last, in place of those that were there before. `tick`
    is called before each."""
    try:
        names = set()
        for order, entry in enumerate(entries):
            tick()
            name = f"{order:04d}.kv"
            write_atomically(folder / name, encode_parked(entry, key))
            names.add(name)
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink()
    except OSError as error:
        log.warning("parked sequences not saved: %s", error.strerror)


def load_parked(folder: Path, key: str, budget: int) -> Iterator[Parked]:
    """Read them back, the least recently used first. A damaged or foreign file is removed."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            if path.stat().st_size > budget:
                raise ValueError("over the budget")
            yield decode_parked(path.read_bytes(), key)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            log.info("parked sequence %s removed: %s", path.name, error)
            with contextlib.suppress(OSError):
                path.unlink()
