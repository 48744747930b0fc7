"""llama.cpp: one loaded model, and the thread that schedules, drafts and keeps prefixes for it.

Who owns what
- One `Worker` thread for each loaded model owns that model's llama context; nobody else touches it. Only a `Job`
  crosses over, by the worker's inbox; its events come back by the `Outlet`. A job is cancelled by a flag, and a running
  `llama_decode` by the abort byte.
- A worker is a scheduler over sequences. A sequence lives in a slot of the KV cache while it runs and until the
  slot is needed; then it is parked in `PrefixStore` as bytes, which is also what is written to disk on unload.
- `Baton`: llama.cpp's threads spin, so two models computing at once on two cores would crawl; one decodes at a time.

Shortcut: a model's jinja chat template is never run (CVE-2024-34359); llama.cpp's own table of templates is used.
"""

from __future__ import annotations

import asyncio
import bisect
import codecs
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import queue
import re
import struct
import tempfile
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# llama.cpp's threads meet at a barrier hundreds of times a token. By default they spin there for milliseconds, which
# keeps the core from the very thread that they wait for when another program has taken its place: beside one busy
# program a token can take ten times as long; with much less, the threads sleep too often on a quiet machine. libgomp
# reads this once, when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llama_cpp
import llama_cpp.llama_cpp as _llama
import numpy as np
import psutil

from cerebrum_code import Ending, StopStrings, wants_extras
from cerebrum_common import HttpError, Model, chunk, log, request_id_var, sse_event, timestamp

llama: Any = _llama  # ctypes: its signatures are C's, and its type stubs do not pass strict checking
MB = 1 << 20

# ------------------------------------------------------------------------------------------------------------ settings


KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
FLASH_ATTENTION = (llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama.LLAMA_FLASH_ATTN_TYPE_ENABLED)


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are run: threads of llama.cpp, tokens of context of each of `max_concurrent` sequences, the KV cache's
    type, megabytes of parked sequences, whether to draft, and the folder of what outlives the process."""

    threads: int
    n_ctx: int
    kv_type: str
    cache_mb: int
    draft: bool
    max_concurrent: int
    state_dir: Path


def usable_cores() -> int:
    """Physical cores among the CPUs that this process may use: a second hardware thread only makes llama.cpp wait."""
    cpus = os.sched_getaffinity(0)
    siblings = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings)


# ---------------------------------------------------------------------------------------------------- policy: memory


@dataclass(frozen=True, slots=True)
class Shape:
    """What a GGUF's header tells of the memory that it will need."""

    layers: int
    kv_width: int  # elements of K and V of one token in one layer
    heads: int
    embedding: int
    feed_forward: int
    vocabulary: int


def needs_flash_attention(kv_type: str) -> bool:
    """On a CPU flash attention is slower behind long contexts: decoding 16 tokens behind 2,000 takes 1.3 times as long.
    Only a quantized cache cannot do without."""
    return kv_type != "f16"


def estimate_bytes(file_size: int, shape: Shape, n_ctx: int, slots: int, kv_type: str) -> dict[str, int]:
    """Bytes of weights, KV cache and compute buffers of a model, before it is loaded."""
    element = 2.0 if kv_type == "f16" else 34 / 32  # q8_0: 32 values and a scale in 34 bytes
    cells, outputs = slots * n_ctx, slots * (MAX_DRAFT + 1)
    per_cell = 2 if needs_flash_attention(kv_type) else 4 * shape.heads + 2  # without it, the scores of all cells
    per_token = 4 * (8 * shape.embedding + 3 * shape.feed_forward) + per_cell * cells
    return {
        "weights": file_size,
        "kv": int(cells * shape.layers * shape.kv_width * element),
        "compute": MICRO_BATCH * per_token + 2 * 4 * outputs * shape.vocabulary,
    }


# ------------------------------------------------------------------------------------- policy: schedule

CALIBRATION_SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
CALIBRATION_SECONDS = 0.4  # for each size, or one decode of it
LEARN_FROM_TOKENS = 24  # smaller decodes vary too much to judge the machine by
LEARNING_RATE = 0.3
MIN_SLOWDOWN, MAX_SLOWDOWN = 0.5, 8.0  # one odd decode must not change the plan by more
DISTURBED = 0.7  # a slowdown below this means that the calibration ran while the machine was busy
PAUSE_SECONDS = 0.25  # how long a running stream may pause while a chunk of another prompt is read …
PAUSE_TOKENS = 6  # … or this many of its own tokens' time, where that is longer
PREFILL_SECONDS = 2.0  # one chunk of a prompt when nobody else waits: how often progress is reported
MAX_CHUNK = 512  # n_batch
MICRO_BATCH = 256  # n_ubatch: as fast as more, with half of the memory for attention


class Costs:
    """Seconds of one `llama_decode` by its number of tokens: calibrated points, straight lines between and beyond.

    The table itself never changes, since grouping and drafting depend on its proportions only. `slowdown` is how many
    times longer chunks really take than the table says. It grows with the length of the contexts, and bounds the
    chunks whose absolute time matters.
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
        """Seconds of `tokens` of one sequence in a decode that `others` share with a token each: what more than one
        token adds is its own, the rest is shared."""
        return self(others + tokens) - self(others + 1) * others / (others + 1)

    def longest(self, seconds: float) -> int:
        """Tokens of the longest chunk that will take at most `seconds`: at least 1, at most MAX_CHUNK."""
        return max(1, bisect.bisect_right(range(1, MAX_CHUNK + 1), seconds / self.slowdown, key=self))


def group_by_cost(sizes: Sequence[int], costs: Costs) -> list[list[int]]:
    """Which works (by index) share a `llama_decode`: those that together cost less than one after the other.

    Two single tokens are slower together on a 0.5B and faster on a 1.5B; a token beside a chunk is nearly free.
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


def share_size(costs: Costs) -> int:
    """Tokens that one of several streams may decode at once without starving the others."""
    return costs.longest(max(PAUSE_SECONDS, PAUSE_TOKENS * costs(1)))


def chunk_size(missing: int, reading: Sequence[int], streams: bool, costs: Costs) -> int:
    """Tokens to read next of a prompt that lacks `missing`.

    Beside running `streams` a chunk is bounded by the pause that it makes in them. Otherwise `reading` holds what each
    prompt under way lacks, this one included: a chunk is at most twice the shortest of them, so a short prompt does not
    wait for a long one, and two of similar length are read in one decode.
    """
    if streams:
        return min(missing, share_size(costs))
    return min(missing, 2 * min(reading), costs.longest(PREFILL_SECONDS / len(reading)))


# --------------------------------------------------------------------------------------- policy: drafts

GRAM = 3  # tokens that must repeat before their continuation is looked at
MAX_DRAFT = 63
CHANGE = 8  # what a copy goes on after has fewer tokens, on either side
NEAR = 48  # after a changed token a copy usually goes on within so many tokens of where it was
RUN_BUCKETS = (GRAM, 5, 8, 12, 16, 24, 32)  # repeated tokens before the draft: the more, the better it is
PRIORS = (0.55, 0.65, 0.78, 0.88, 0.92, 0.95, 0.97)
PRIOR_WEIGHT = 12.0  # tokens that a prior counts for
FORGET = 0.997  # per decoded token: a text may begin to repeat later
CREDIT_TOKENS = 4.0  # what the first drafts of a model may lose, in the time of so many tokens without drafts
CREDIT_LIMIT = 10.0  # what repeating text may earn for text that does not repeat
LOSS_SHARE = 0.01  # of the time spent without drafts may be lost by trying them


class Acceptance:
    """How often drafted tokens were right, by the length of the repeated run and by whether decoding is greedy.

    Owned by a worker and kept over its requests. `credit` bounds what drafts may lose: it grows by a share of the
    time spent without them and by what they win, and falls by what they lose. Its unit is the time of one token without
    drafts.
    """

    def __init__(self) -> None:
        self.right = {(greedy, bucket): 0.0 for greedy in (True, False) for bucket in range(len(RUN_BUCKETS))}
        self.wrong = dict(self.right)
        self.credit = CREDIT_TOKENS

    @staticmethod
    def bucket(run: int) -> int:
        return bisect.bisect_right(RUN_BUCKETS, run) - 1

    def probability(self, greedy: bool, run: int) -> float:
        """That the next drafted token is right."""
        key = greedy, self.bucket(run)
        prior = PRIORS[key[1]] * (1.0 if greedy else 0.9)
        return (self.right[key] + prior * PRIOR_WEIGHT) / (self.right[key] + self.wrong[key] + PRIOR_WEIGHT)

    def learn(self, greedy: bool, run: int, drafted: int, accepted: int) -> None:
        key = greedy, self.bucket(run)
        for table in (self.right, self.wrong):
            table[key] *= FORGET**accepted
        self.right[key] += accepted
        self.wrong[key] += accepted < drafted

    def spend(self, cost: float, gained: float) -> None:
        """Book one decode: what it cost by the table, and `gained` over plain decoding (0 without a draft)."""
        earned = gained if gained else LOSS_SHARE * cost
        self.credit = min(CREDIT_LIMIT, self.credit + earned)
        if not gained:
            for table in (self.right, self.wrong):
                for key in table:
                    table[key] *= FORGET


def draft_length(probability: float, limit: int, costs: Costs, others: int = 0) -> int:
    """How many tokens to draft: the length with the most expected tokens per second, 0 if drafting does not pay. It is
    `limit` or makes, with a token each of `others`, a decode of a calibrated size: 28 to 31 tokens take as long as 32.
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
    """Proposes the next tokens of one sequence from where its last tokens stood before: in its own prompt and output
    (source 0) or in an earlier sequence with the same prefix (source 1). It looks tokens up, it computes nothing.

    A copy that differs somewhere goes on soon after. `changes` remembers what was replaced there by what, and that is
    expected wherever the same is copied again: a rename looks like this.
    """

    def __init__(self, tokens: Sequence[int], guide: Sequence[int] = (), common: int = 0) -> None:
        self.sources = [list(tokens), list(guide)]
        self.index: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for position in range(max(GRAM, common), len(guide) + 1):
            self._add(1, position)
        for position in range(GRAM, len(tokens) + 1):
            self._add(0, position)
        self.at: tuple[int, int] | None = None
        self.run = 0  # how far the pointer can be trusted: tokens in a row that were as it said, and some from before
        self.trusted = 0  # the run before the last mismatch
        self.lost = 0  # where in the own sequence that was, or where the change began in which it was
        self.changes: dict[tuple[int, ...], list[int]] = {}  # what came, by the tokens that it replaced
        self.done = 0  # so many tokens of the change at the pointer have come
        if len(guide) > common == len(tokens):
            self.at, self.run = (1, common), min(common, RUN_BUCKETS[-1])
        else:
            self._search()

    def _add(self, source: int, end: int) -> None:
        self.index.setdefault(tuple(self.sources[source][end - GRAM : end]), []).append((source, end))

    def advance(self, token: int) -> None:
        """The sequence went on with `token`."""
        own, known = self.sources[0], bool(self.run)
        if known:
            self._follow(token)
        own.append(token)
        if len(own) >= GRAM:
            self._add(0, len(own))
        if not known:
            self._realign()
        if not self.run:
            self._search()

    def _follow(self, token: int) -> None:
        """Move the pointer over `token`, or lose the place there."""
        assert self.at
        expected, place, done = self._next(self.at, self.done)
        if token == expected:
            self.run, self.at, self.done = self.run + 1, place, done
            return
        if change := self._change(self.at):
            del self.changes[change[0]]
            if token == change[0][0] and not self.done:  # for once not changed
                self.run, self.at = self.run + 1, (self.at[0], self.at[1] + 1)
                return
        self.trusted, self.run = self.run, 0
        self.lost, self.done = len(self.sources[0]) - self.done, 0

    def _change(self, place: tuple[int, int]) -> tuple[tuple[int, ...], list[int]] | None:
        """The change that is expected of what stands at `place`: of the longest, where one begins like another."""
        tokens, position = self.sources[place[0]], place[1]
        for length in range(CHANGE, 0, -1) if self.changes else ():
            old = tuple(tokens[position : position + length])
            if old in self.changes:
                return old, self.changes[old]
        return None

    def _next(self, place: tuple[int, int], done: int) -> tuple[int | None, tuple[int, int], int]:
        """The token expected at `place`, behind `done` tokens of a change there; and the same two for the next one."""
        source, position = place
        if change := self._change(place):
            old, new = change
            last = done + 1 == len(new)
            return new[done], (source, position + len(old)) if last else place, 0 if last else done + 1
        if position == len(self.sources[source]):
            return None, place, 0
        return self.sources[source][position], (source, position + 1), 0

    def _realign(self) -> None:
        """Find where the copy goes on after a change of a few tokens, and remember the change; of a mere insertion or
        deletion together with the token behind it. One token tells it if as many have come as were replaced, else
        two."""
        came = len(self.sources[0]) - self.lost
        if not self.at or came > CHANGE:
            return
        own, (source, position) = self.sources[0][-came:], self.at
        end = self.lost if source == 0 else len(self.sources[1])  # what has just come is no copy of itself
        other = self.sources[source][position : min(position + CHANGE + 1, end)]
        for replaced, sure in itertools.product(range(1, min(CHANGE, len(other))), (1, 2)):
            new = own[: came - sure]
            if new and own[-sure:] == other[replaced : replaced + sure] and (sure > 1 or len(new) == replaced):
                self.changes[tuple(other[:replaced])] = new
                self.at, self.run = (source, position + replaced + sure), sure + min(self.trusted, 16)
                return

    def _search(self) -> None:
        own = self.sources[0]
        places = [place for place in self.index.get(tuple(own[-GRAM:]), ())[-16:] if place != (0, len(own))]
        if not places:
            return
        near = [place for place in places if self.at and self.at[0] == place[0] and abs(place[1] - self.at[1]) <= NEAR]
        if near and self.at:
            self.at = min(near, key=lambda place: abs(place[1] - self.at[1]))  # type: ignore[index]
            self.run = self._matched(self.at) + min(self.trusted, 16)
        else:
            self.at = max(places, key=lambda place: (self._matched(place), place[1]))
            self.run = self._matched(self.at)

    def _matched(self, place: tuple[int, int]) -> int:
        """How many of the last tokens also stand before `place`."""
        own, other, count = self.sources[0], self.sources[place[0]], 0
        limit = min(RUN_BUCKETS[-1], len(own), place[1])
        while count < limit and own[-1 - count] == other[place[1] - 1 - count]:
            count += 1
        return count

    def propose(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next; their likelihood is judged by `run`."""
        if not self.at or self.run < GRAM:
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

MIN_PREFIX = 16  # tokens; a shorter sequence is computed sooner than looked after
STORE_SECONDS = 3.0  # of idleness, before sequences are stored that a next request may push out of the context


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` (of one type) have in common at their beginning."""
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
    """A sequence outside of the context: its tokens and llama.cpp's serialised KV state for exactly these."""

    tokens: list[int]
    state: bytes

    @property
    def size(self) -> int:
        return len(self.state) + 4 * len(self.tokens)


class PrefixStore:
    """Recent sequences within a budget of bytes, least recently useful out first. Owned by one worker."""

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self.entries: OrderedDict[int, Parked] = OrderedDict()
        self._next = 0

    def covers(self, tokens: list[int]) -> bool:
        """Whether an entry already begins with `tokens`; it then counts as useful."""
        for key, entry in self.entries.items():
            if len(entry.tokens) >= len(tokens) and entry.tokens[: len(tokens)] == tokens:
                self.entries.move_to_end(key)
                return True
        return False

    def add(self, entry: Parked) -> None:
        """Keep `entry`, drop what it extends, then what is over the budget."""
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
        """The entry with the longest prefix in common with `prompt`, and that length."""
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
    """A file: magic, sha256 of all that follows, header length, header JSON, tokens as int32, state."""
    tokens = struct.pack(f"<{len(entry.tokens)}i", *entry.tokens)
    header = json.dumps({"key": key, "tokens": len(entry.tokens)}).encode()
    rest = struct.pack("<I", len(header)) + header + tokens + entry.state
    return KV_MAGIC + hashlib.sha256(rest).digest() + rest


def decode_parked(data: bytes, key: str) -> Parked:
    """The entry of a file made for `key`; ValueError if the file is damaged, cut short or of another model."""
    start = len(KV_MAGIC) + 32
    rest = memoryview(data)[start:]
    if not data.startswith(KV_MAGIC) or hashlib.sha256(rest).digest() != data[len(KV_MAGIC) : start]:
        raise ValueError("damaged")
    (size,) = struct.unpack_from("<I", rest)
    header = json.loads(bytes(rest[4 : 4 + size]))
    if header["key"] != key:
        raise ValueError("of another model, context or library")
    tokens_end = 4 + size + 4 * header["tokens"]
    tokens = list(struct.unpack(f"<{header['tokens']}i", rest[4 + size : tokens_end]))
    return Parked(tokens, bytes(rest[tokens_end:]))


# ------------------------------------------------------------------------------------------ policy: text

# The word before the cursor, with the character that tokenizers take together with it, or the white space there. Not a
# long word, nor one of a script without spaces: all of its tokens are to be decoded.
UNFINISHED = re.compile(r"(?:[^\r\n\w]|_)?(?<![^\W\d_])[A-Za-z]{1,24}\Z|[ \t]+\Z")
HEAL_CANDIDATES = 512  # the likeliest tokens that are looked at


def heal_from(prompt: str) -> int:
    """Where in `prompt` the text begins that the model's own tokens shall say again ("token healing").

    After the tokens of `imp` a model seldom writes `ort`: in what it has read, that was one token, ` import`.
    """
    match = UNFINISHED.search(prompt, max(0, len(prompt) - 64))
    return match.start() if match else len(prompt)


class TextAssembler:
    """Tokens' bytes to text that may be sent: whole UTF-8 characters, up to a stop string or the natural end."""

    def __init__(self, stops: Sequence[str], ending: Ending) -> None:
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.stops, self.ending = StopStrings(stops), ending

    def feed(self, data: bytes) -> tuple[str, str | None]:
        """(text to send now, why the completion has ended or None)."""
        text, stopped = self.stops.feed(self.decoder.decode(data))
        text, reason = self.ending.feed(text)
        if stopped and not reason:
            return text + self.ending.flush(), "stop"
        return text, reason

    def flush(self, whole: bool = True) -> str:
        """What is still held when the tokens have ended: by the model's own end (`whole`), or cut short."""
        text, stopped = self.stops.feed(self.decoder.decode(b"", final=True))
        text, reason = self.ending.feed(text if stopped else text + self.stops.held)
        return text if reason else text + self.ending.flush(whole)


# ---------------------------------------------------------------------------------------- IO: llama.cpp


def begun_answer(messages: Sequence[tuple[str, str]]) -> str:
    """What the assistant has said already, and is to go on with."""
    role, content = messages[-1]
    return content if role == "assistant" else ""


class ModelError(Exception):
    """A model file that llama.cpp cannot load; the message is fit for a client."""


_log_tail: deque[str] = deque(maxlen=20)  # llama.cpp's last words, for our log when a load fails


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(_level: int, text: bytes, _data: Any) -> None:
    _log_tail.append(text.decode("utf-8", "replace").rstrip())


def start_library() -> None:
    llama.llama_log_set(_keep_log, None)
    llama.llama_backend_init()


GGUF_UINT32 = 4  # enum gguf_type


class _GgufInit(ctypes.Structure):
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def read_shape(path: Path) -> Shape:
    """The memory-relevant part of a GGUF's header, by llama.cpp's own reader. ModelError if it is not a GGUF."""
    lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    lib.ggml_log_set(_keep_log, None)  # a copy of what llama.cpp has loaded: the wheel holds it under several names
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _GgufInit]
    for name, result in {"find_key": ctypes.c_int64, "get_val_str": ctypes.c_char_p, "get_val_u32": ctypes.c_uint32,
                         "get_arr_n": ctypes.c_size_t, "get_kv_type": ctypes.c_int}.items():  # fmt: skip
        function = getattr(lib, f"gguf_{name}")
        function.restype = result
        function.argtypes = [ctypes.c_void_p, ctypes.c_char_p if name == "find_key" else ctypes.c_int64]
    handle = lib.gguf_init_from_file(str(path).encode(), _GgufInit(True, None))
    if not handle:
        raise ModelError("not a readable GGUF file")
    try:

        def number(key: str, default: int) -> int:
            place = lib.gguf_find_key(handle, key.encode())
            if place < 0 or lib.gguf_get_kv_type(handle, place) != GGUF_UINT32:
                return default
            return int(lib.gguf_get_val_u32(handle, place))

        place = lib.gguf_find_key(handle, b"general.architecture")
        if place < 0:
            raise ModelError("a GGUF file without an architecture")
        arch = lib.gguf_get_val_str(handle, place).decode()
        heads = number(f"{arch}.attention.head_count", 1)
        kv_heads = number(f"{arch}.attention.head_count_kv", heads)
        width = number(f"{arch}.embedding_length", 0)
        vocabulary = lib.gguf_find_key(handle, b"tokenizer.ggml.tokens")
        k_width = number(f"{arch}.attention.key_length", width // heads)
        v_width = number(f"{arch}.attention.value_length", width // heads)
        return Shape(
            layers=number(f"{arch}.block_count", 0),
            kv_width=kv_heads * (k_width + v_width),
            heads=heads,
            embedding=width,
            feed_forward=number(f"{arch}.feed_forward_length", 4 * width),
            vocabulary=int(lib.gguf_get_arr_n(handle, vocabulary)) if vocabulary >= 0 else 0,
        )
    finally:
        lib.gguf_free(ctypes.c_void_p(handle))


def fingerprint(path: Path) -> str:
    """What a cache made for this model file is keyed by: size, time of change, first and last MiB."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(MB))
        file.seek(max(0, stat.st_size - MB))
        digest.update(file.read(MB))
    return digest.hexdigest()


class Llama:
    """One model and its context: the ctypes calls and nothing else. Used by its worker's thread alone, except
    `encode`, which reads only the vocabulary, and `abort`, which sets a byte.
    """

    def __init__(self, path: Path, config: Settings, progress: Callable[[float], bool]) -> None:
        callback = llama.llama_progress_callback(lambda done, _data: progress(done))
        params = llama.llama_model_default_params()
        params.progress_callback = callback
        # Not mapped: many weights are repacked in memory, and the file's pages would stay beside them. What the system
        # counts as available would hold the mapped ones too, and a second model seem to fit.
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_model_load_from_file(str(path).encode(), params)
        if not self.model:
            raise ModelError("llama.cpp cannot load this file; it is damaged, cut short or of an unknown kind")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self.vocab))
        self.logits_row = ctypes.c_float * self.n_vocab
        self.pieces: dict[int, bytes] = {}  # what `piece` has told
        trained = int(llama.llama_model_n_ctx_train(self.model))
        self.n_ctx = min(config.n_ctx, trained) if trained > 0 else config.n_ctx
        # The abort callback is asked for every graph node. A Python one would take the GIL each time; strlen of a
        # one-byte string is a C function of the same shape that answers whether the byte is set.
        self.abort_flag = ctypes.create_string_buffer(2)
        self.vocab_lock, self.closed = threading.Lock(), False  # a prompt may still be read when its client has left
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama.ggml_abort_callback)
        self.batch = llama.llama_batch_init(MAX_CHUNK, 0, 1)
        for i in range(MAX_CHUNK):
            self.batch.n_seq_id[i] = 1
        params = llama.llama_context_default_params()
        params.n_ctx = self.n_ctx * config.max_concurrent
        params.n_batch, params.n_ubatch = MAX_CHUNK, MICRO_BATCH
        params.n_seq_max = config.max_concurrent
        # Of a token and its draft, for every slot: the logits buffer would otherwise be 300 MB.
        params.n_outputs_max = config.max_concurrent * (MAX_DRAFT + 1)
        params.n_threads = params.n_threads_batch = config.threads
        params.flash_attn_type = FLASH_ATTENTION[needs_flash_attention(config.kv_type)]
        params.type_k = params.type_v = KV_TYPES[config.kv_type]
        params.kv_unified = True  # one ubatch may hold tokens of several sequences; a prefix is shared without a copy
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
        """Make a running `decode` end soon; called from the event loop."""
        self.abort_flag[0] = b"\x01"

    def decode(self, parts: Sequence[tuple[Slot, list[int], int]]) -> int:
        """One `llama_decode` that appends to each slot its tokens, with logits for the last so many of them: 0, or 2 if
        it was aborted; anything else is a fault."""
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
        """The float32[n_vocab] of batch position `index`, in place: valid until the next decode."""
        logits = llama.llama_get_logits_ith(self.context, index)
        row: Any = self.logits_row.from_address(ctypes.addressof(logits.contents))
        return np.frombuffer(row, np.float32)

    def greedy(self, index: int) -> int:
        """The likeliest token at batch position `index`; the first of equals, as llama.cpp's greedy sampler."""
        return int(self.logits(index).argmax())

    def restrict(self, index: int, start: bytes) -> None:
        """Leave at batch position `index` only the tokens that the text `start` may begin with, whether they end within
        it or go on: those among the likeliest, and the tokenizer's own."""
        row = self.logits(index)
        likeliest = np.argpartition(row, -HEAL_CANDIDATES)[-HEAL_CANDIDATES:].tolist()
        pieces = [(token, self.piece(token)) for token in likeliest + self.tokenize(start, False)[:1]]
        fits = [token for token, piece in pieces if piece and piece[: len(start)] == start[: len(piece)]]
        kept = row[fits]
        row.fill(-np.inf)
        row[fits] = kept

    def computed(self, slot: Slot) -> int:
        """How many tokens the slot's KV cells hold: after an abort those of whole micro-batches."""
        return int(llama.llama_memory_seq_pos_max(self.memory, slot.id)) + 1

    def trim(self, slot: Slot, length: int) -> None:
        """Drop the slot's KV cells from position `length` on."""
        llama.llama_memory_seq_rm(self.memory, slot.id, length, -1)

    def copy_prefix(self, source: Slot, target: Slot, length: int) -> None:
        """Let the empty `target` share the first cells of `source`."""
        llama.llama_memory_seq_cp(self.memory, source.id, target.id, 0, length)

    def save(self, slot: Slot) -> bytes:
        size = llama.llama_state_seq_get_size(self.context, slot.id)
        buffer = (ctypes.c_uint8 * size)()
        written = llama.llama_state_seq_get_data(self.context, buffer, size, slot.id)
        return bytes(memoryview(buffer)[:written])

    def restore(self, slot: Slot, state: bytes) -> bool:
        """Fill the empty slot with what `save` gave for any slot; False if llama.cpp does not take it."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return int(llama.llama_state_seq_set_data(self.context, buffer, len(state), slot.id)) == len(state)

    def piece(self, token: int) -> bytes:
        """A token's bytes; control tokens have none."""
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
        """Text to tokens; `first` adds what the model wants at the beginning, `special` reads control tokens."""
        data = text.encode() if isinstance(text, str) else text
        room = len(data) + 8
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocab, data, len(data), tokens, room, first, special)
        return list(tokens[: max(0, count)])

    def encode(self, fields: Mapping[str, Any]) -> tuple[list[int], bytes]:
        """A request's prompt to tokens: plain, fill-in-the-middle or chat; and the end of its text that they leave to
        the model's own tokens (`heal`). What a user sends is text, never control tokens. HttpError 400 if the model
        has no fill-in-the-middle tokens."""
        with self.vocab_lock:
            if self.closed:
                raise HttpError("SHUTTING_DOWN", "the model has just been unloaded")
            if fields["messages"]:
                return self._encode_chat(fields["messages"]), b""
            prompt = fields["prompt"]
            if fields["heal"] and llama.llama_vocab_type(self.vocab) == llama.LLAMA_VOCAB_TYPE_BPE:
                start = heal_from(prompt)
                if tokens := self._encode_text(fields, prompt[:start]):
                    return tokens, prompt[start:].encode()
            return self._encode_text(fields, prompt), b""

    def _encode_text(self, fields: Mapping[str, Any], prompt: str) -> list[int]:
        if fields["suffix"] is None:
            return self.tokenize(prompt, True)
        before, after, middle = (
            int(getattr(llama, f"llama_vocab_fim_{name}")(self.vocab)) for name in ("pre", "suf", "mid")
        )
        if min(before, after, middle) < 0:
            raise HttpError(
                "INVALID_REQUEST", "suffix: expected a model with fill-in-the-middle tokens, got one without"
            )
        file_mark = int(llama.llama_vocab_fim_sep(self.vocab))
        name = fields["filename"]
        head = [file_mark, *self.tokenize(name + "\n", False)] if name and file_mark >= 0 else []
        start = self.tokenize("", True)
        text, suffix = self.tokenize(prompt, False), self.tokenize(fields["suffix"], False)
        return [*start, *head, before, *text, after, *suffix, middle]

    def _encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """The chat template around placeholders: its own text may hold control tokens, the messages' may not. A last
        message of the assistant's is what its answer begins with."""
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


MAX_SEED = 2**32 - 2  # 2**32 - 1 asks llama.cpp for a random seed


class Sampler:
    """The next token of one request: the likeliest at temperature 0, else top-k 40, top-p, min-p, temperature, seed.

    With drafts the target is sampled at each position in turn, one random number a token, so drafts change nothing but
    the rounding of the logits, by the size of the batch. Where the text must come again (`exact`: by a seed) nothing is
    drafted or batched, and the prompt's last token is decoded alone, whether or not the rest is cached.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.greedy = fields["temperature"] == 0
        self.exact = fields["seed"] is not None and not self.greedy
        self.chain = None
        if self.greedy:
            return
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        seed = fields["seed"] if fields["seed"] is not None else int.from_bytes(os.urandom(4), "little") % MAX_SEED
        for sampler in (
            llama.llama_sampler_init_top_k(40),
            llama.llama_sampler_init_top_p(fields["top_p"], 1),
            llama.llama_sampler_init_min_p(0.05, 1),
            llama.llama_sampler_init_temp(fields["temperature"]),
            llama.llama_sampler_init_dist(seed),
        ):
            llama.llama_sampler_chain_add(self.chain, sampler)

    def sample(self, model: Llama, index: int) -> int:
        if self.greedy:
            return model.greedy(index)
        return int(llama.llama_sampler_sample(self.chain, model.context, index))

    def close(self) -> None:
        if self.chain:
            llama.llama_sampler_free(self.chain)


# -------------------------------------------------------------------------------------------- IO: worker

Event = dict[str, Any]  # what goes over the wire as one SSE event; or an HttpError in its place
MAX_BACKLOG = 256  # events that a client has not read yet, before its job pauses
RESUME_BACKLOG = 64


class Job:
    """One request on its way through a worker. The loop writes `cancelled`, the worker only reads it.

    Events arrive on the loop, and a list is one network write: tokens by `send_now`, where the answer is a stream
    whose client keeps up, all else in `events`, where the handler waits for it.
    """

    def __init__(self, fields: dict[str, Any], outlet: Outlet) -> None:
        self.fields, self.outlet = fields, outlet
        self.prompt: list[int] = []
        self.heal = b""  # what the completion begins with and the client already has
        self.events: asyncio.Queue[list[Event | HttpError]] = asyncio.Queue()
        self.send_now: Callable[[bytes], bool] | None = None
        self.sent = 0.0  # when `send_now` last took something
        self.cancelled = False
        self.started = self.handed_over = time.monotonic()
        self.request_id = request_id_var.get()

    def send(self, *events: Event | HttpError) -> None:
        """Called by any thread."""
        self.outlet.put((self, list(events)))

    def progress(self, stage: str, done: int, total: int) -> None:
        if self.fields["progress"]:
            self.send({"progress": {"stage": stage, "done": done, "total": total}})


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
        fields = job.fields
        self.job, self.slot, self.cached = job, slot, cached
        self.sampler = Sampler(fields)
        mode, prompt = fields["mode"], fields["prompt"]
        turns = fields["messages"] or []
        if turns or mode == "instruct":
            prompt = begun_answer(turns) if turns else ""
        asked = [content for role, content in turns if role == "user"]
        ending = Ending(mode, fields["language"], prompt, fields["suffix"], fields["stop_at"], wants_extras(asked))
        self.text = TextAssembler(fields["stop"], ending)
        self.guide, self.heal = guide, job.heal
        self.drafter: Drafter | None = None
        self.pending: int | None = None  # sampled, not yet decoded
        self.generated = self.drafted = self.accepted = 0
        self.beside = 0  # other streams' tokens in the same decode
        self.first_token = self.last_token = 0.0
        self.outbox: list[Event | HttpError] = []

    @property
    def prefilling(self) -> bool:
        return self.pending is None

    def result(self, reason: str) -> Event:
        """The done event."""
        fields, now = self.job.fields, time.monotonic()
        span = self.last_token - self.first_token
        return {
            "done": True,
            "language": fields["language"] or "",
            "model": fields["model"],
            "total_tokens": self.generated,
            "inference_time": round(now - self.job.started, 3),
            "timestamp": timestamp(),
            "mode": fields["mode"],
            "finish_reason": reason,
            "prompt_tokens": len(self.job.prompt),
            "cached_tokens": self.cached,
            "load_time": round(self.job.handed_over - self.job.started, 4),
            "ttft": round(self.first_token - self.job.handed_over, 4) if self.first_token else None,
            "tokens_per_second": round((self.generated - 1) / span, 2) if span > 0 else None,
            "draft_tokens": self.drafted,
            "accepted_tokens": self.accepted,
        }


@dataclass(slots=True)
class Work:
    """What one sequence wants of the next decode: tokens to append, and how many of the last give logits."""

    run: Run
    tokens: list[int]
    outputs: int


class Baton:
    """A lock that is passed on in the order of asking, so that two models take turns decode by decode."""

    def __init__(self) -> None:
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


# As os.eventfd_write, which releases the interpreter's lock meanwhile.
_eventfd_write = ctypes.PyDLL(None).eventfd_write
_eventfd_write.argtypes = (ctypes.c_int, ctypes.c_uint64)


class Outlet:
    """The way of events from the workers' threads to the loop, and there to clients and handlers.

    To wake the loop by `call_soon_threadsafe` is to hand it the interpreter's lock, and the worker, whose next
    llama_decode would release it, has it back only when the loop has sent the token: a hundredth of a token's time.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._sent: deque[tuple[Job, list[Event | HttpError]]] = deque()
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.add_reader(self._fd, self._deliver)

    def put(self, *sent: tuple[Job, list[Event | HttpError]]) -> None:
        """Called by any thread. What is put together wakes the loop once."""
        self._sent += sent
        _eventfd_write(self._fd, 1)

    def close(self) -> None:
        """When no thread is left that could put."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _deliver(self) -> None:
        os.eventfd_read(self._fd)
        while self._sent:
            job, events = self._sent.popleft()
            if not send_tokens(job, events):
                job.events.put_nowait(events)


def send_tokens(job: Job, events: list[Event | HttpError]) -> bool:
    """Send events straight to the client, without waking a task, if they are nothing but tokens and it keeps up."""
    if job.send_now is None or job.cancelled or not job.events.empty():
        return False
    if isinstance(events[-1], HttpError) or "token" not in events[-1]:  # only the last can be none
        return False
    if not job.send_now(chunk(b"".join(map(sse_event, events)))):  # type: ignore[arg-type]
        return False
    job.sent = time.monotonic()
    return True


class Worker(threading.Thread):
    """Owns one model's llama context, from load to unload. See the top of the file for what crosses its border."""

    def __init__(
        self, model: Model, path: Path, config: Settings, baton: Baton, loop: asyncio.AbstractEventLoop, estimate: int
    ) -> None:
        super().__init__(name=f"worker-{model.id}", daemon=True)
        self.spec, self.config, self.baton, self.loop = model, config, baton, loop
        self.path = path
        self.inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.stopping = False
        self.ready: asyncio.Future[None] = loop.create_future()
        self.ready.add_done_callback(lambda future: future.exception())  # nobody may be left to hear of a failure
        self.load_progress = 0.0
        self.memory_bytes = 0  # when it was loaded
        self.estimate = estimate  # bytes that it will use in time: attention's buffers fill as contexts grow
        self.llama: Llama | None = None
        self.store = PrefixStore(config.cache_mb * MB)
        self.jobs: set[Job] = set()  # the loop's: submitted or being prepared, so not to be unloaded
        self.last_used = time.time()
        self.drafted = self.accepted = 0
        self.running: list[Run] = []  # in the llama_decode that is under way; written by the thread, read by the loop

    # -- called by the event loop

    def submit(self, job: Job) -> None:
        self.inbox.put(job)

    def cancel(self, job: Job) -> None:
        """The client left, or a newer request took its place. A decode that works for nobody else is aborted."""
        job.cancelled = True
        self.inbox.put(None)
        running = self.running
        if self.llama and running and all(run.job.cancelled for run in running):
            self.llama.abort()

    def wake(self) -> None:
        """A paused job's client has read on."""
        self.inbox.put(None)

    def stop(self) -> None:
        """End the thread after the decode that is under way; sequences are saved to disk first."""
        self.stopping = True
        self.inbox.put(None)
        if self.llama:
            self.llama.abort()

    # -- the thread

    def run(self) -> None:
        try:
            self._load()
        except ModelError as error:
            self._free()
            if self.stopping:
                self._report(HttpError("SHUTTING_DOWN", f"model {self.spec.id}: loading was given up"))
                return
            log.error("model %s: %s; llama.cpp said: %s", self.spec.id, error, " | ".join(_log_tail)[-1000:])
            self._report(HttpError("MODEL_LOAD_FAILED", f"model {self.spec.id} ({self.spec.file}): {error}"))
            return
        except Exception:
            self._free()
            log.exception("model %s: loading failed", self.spec.id)
            self._report(HttpError("MODEL_LOAD_FAILED", f"model {self.spec.id}: loading failed; see the log"))
            return
        self._report(None)
        try:
            while not self.stopping:
                self._turn()
        except Exception:
            log.exception("model %s: the worker failed; it is loaded anew for the next request", self.spec.id)
            self.stopping = True
        finally:
            self._close()

    def _free(self) -> None:
        if self.llama:
            self.llama.close()

    def _report(self, error: HttpError | None) -> None:
        def settle() -> None:
            if not self.ready.done():
                self.ready.set_exception(error) if error else self.ready.set_result(None)

        with contextlib.suppress(RuntimeError):
            self.loop.call_soon_threadsafe(settle)

    def _load(self) -> None:
        before = psutil.Process().memory_info().rss
        check_digest(self.path, self.spec.sha256, self.config.state_dir, lambda: self.stopping)

        def progress(done: float) -> bool:
            self.load_progress = done
            return not self.stopping

        self.llama = Llama(self.path, self.config, progress)
        kv_type = self.config.kv_type
        params = f"{llama_cpp.__version__} {self.llama.n_ctx} {self.config.max_concurrent} {kv_type}"
        self.key = hashlib.sha256(f"{fingerprint(self.path)} {params}".encode()).hexdigest()
        self.slots = [Slot(i) for i in range(self.config.max_concurrent)]
        self.waiting: list[Job] = []
        self.acceptance = Acceptance()
        self.costs = load_costs(self.llama, self.calibration, self.baton)
        for entry in load_parked(self.kv_dir, self.key, self.store.budget):
            self.store.add(entry)
        self.memory_bytes = max(0, psutil.Process().memory_info().rss - before - self.store.size)
        log.info(
            "model %s loaded: %d MB; decode of 1/2/16 tokens %.1f/%.1f/%.1f ms; %d sequences restored",
            self.spec.id, self.memory_bytes // MB, *(self.costs(n) * 1e3 for n in (1, 2, 16)), len(self.store.entries),
        )  # fmt: skip

    @property
    def calibration(self) -> Path:
        return self.config.state_dir / "calibration" / f"{self.key[:32]}-{self.config.threads}.json"

    @property
    def kv_dir(self) -> Path:
        return self.config.state_dir / "kv" / self.spec.id

    def _close(self) -> None:
        assert self.llama
        for slot in self.slots:
            if slot.run:
                self._fail(slot.run, HttpError("SHUTTING_DOWN", "the backend is shutting down"))
            self._park(slot)
        for job in [*self.waiting, *self._drain()]:
            job.send(HttpError("SHUTTING_DOWN", "the backend is shutting down"))
        save_parked(self.kv_dir, self.key, list(self.store.entries.values()))
        self.store = PrefixStore(0)
        self.llama.close()

    def _drain(self) -> Iterator[Job]:
        with contextlib.suppress(queue.Empty):
            while True:
                if job := self.inbox.get_nowait():
                    yield job

    def _turn(self) -> None:
        """Take what came, let every sequence say what it wants next, and decode that in the cheapest grouping."""
        runs = [slot.run for slot in self.slots if slot.run and slot.run.job.events.qsize() < MAX_BACKLOG]
        if not runs:
            self._recalibrate()
            if job := self._wait():
                self.waiting.append(job)
        self._take()
        runs = [slot.run for slot in self.slots if slot.run and slot.run.job.events.qsize() < MAX_BACKLOG]
        works = [self._next_work(run, runs) for run in runs]
        shared = [work for work in works if not work.run.sampler.exact]
        groups = group_by_cost([len(work.tokens) for work in shared], self.costs)
        steps = [[shared[i] for i in group] for group in groups]
        for step in steps + [[work] for work in works if work.run.sampler.exact]:
            members = [work for work in step if work.run.slot.run is work.run]
            if members and not self.stopping:
                self._step(members)

    def _take(self) -> None:
        """Start what came, and what comes meanwhile: to store the sequence whose slot it gets may take milliseconds."""
        while True:
            self.waiting += self._drain()
            self._drop_cancelled()
            self._start_waiting()
            if self.inbox.empty():
                return

    def _wait(self) -> Job | None:
        """What comes next. When nothing does for a while, idle sequences are stored, for then no request waits for it:
        one of 3,500 tokens takes a fifth of a second."""
        with contextlib.suppress(queue.Empty):
            return self.inbox.get(timeout=STORE_SECONDS)
        for slot in self.slots:
            if self.inbox.empty() and not slot.run:
                self._store(slot)
        return self.inbox.get()

    def _recalibrate(self) -> None:
        """Calibrate again when nobody waits and the last calibration ran on a busy machine."""
        assert self.llama
        if self.costs.slowdown > DISTURBED or any(slot.run for slot in self.slots):
            return
        for slot in self.slots:
            self._park(slot)
        self.llama.abort_flag[0] = b"\x00"
        table = calibrate(self.llama, self.calibration, self.baton, lambda: self.stopping or not self.inbox.empty())
        if table:
            self.costs = Costs(table)

    def _drop_cancelled(self) -> None:
        self.waiting = [job for job in self.waiting if not job.cancelled]
        for slot in self.slots:
            if slot.run and slot.run.job.cancelled:
                self._release(slot.run)

    def _start_waiting(self) -> None:
        for job in list(self.waiting):
            free = [slot for slot in self.slots if not slot.run]
            if not free:
                return
            if not self._prefix_is_coming(job.prompt):
                self._start(job, free)
                self.waiting.remove(job)  # only now: if that fails, the worker ends and tells those who wait

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
        cached = common_prefix(slot.tokens, prompt)
        self.llama.trim(slot, cached)
        slot.tokens = prompt[:cached]
        # The prompt's last token is computed in any case, for the logits after it.
        cached = min(cached, len(prompt) - 1)
        self.llama.trim(slot, cached)
        slot.tokens = prompt[:cached]
        slot.run = Run(job, slot, cached, guide)
        job.progress("prefill", cached, len(prompt))

    def _park(self, slot: Slot) -> None:
        """Move an idle slot's sequence to the store, so that the cells of the running ones are all there are."""
        assert self.llama
        self._store(slot)
        self.llama.trim(slot, 0)
        slot.tokens = []

    def _store(self, slot: Slot) -> None:
        assert self.llama
        if len(slot.tokens) >= MIN_PREFIX and self.store.budget and not self.store.covers(slot.tokens):
            self.store.add(Parked(slot.tokens[:], self.llama.save(slot)))

    def _next_work(self, run: Run, runs: list[Run]) -> Work:
        prompt, slot = run.job.prompt, run.slot
        if run.pending is None:
            missing = len(prompt) - len(slot.tokens)
            reading = [len(other.job.prompt) - len(other.slot.tokens) for other in runs if other.prefilling]
            streams = len(reading) < len(runs)
            whole = missing - (run.sampler.exact and missing > 1)
            size = chunk_size(whole, reading, streams, self.costs)
            end = len(slot.tokens) + size
            outputs = int(end == len(prompt) and run.job.fields["max_tokens"] > 0)
            return Work(run, prompt[len(slot.tokens) : end], outputs)
        run.beside = self._beside(run, runs)
        draft = self._draft(run, others=len(runs) > 1)
        return Work(run, [run.pending, *draft], 1 + len(draft))

    def _beside(self, run: Run, runs: list[Run]) -> int:
        """How many streams' tokens will share this one's decode: more tokens then cost less than they would alone."""
        if run.sampler.exact:
            return 0
        streams = sum(not (other is run or other.prefilling or other.sampler.exact) for other in runs)
        return streams if self.costs(streams + 1) < (streams + 1) * self.costs(1) else 0

    def _draft(self, run: Run, others: bool) -> list[int]:
        assert self.llama
        assert run.drafter
        room = min(
            MAX_DRAFT,
            run.job.fields["max_tokens"] - run.generated - 1,
            self.llama.n_ctx - len(run.slot.tokens) - 2,
            share_size(self.costs) - 1 if others else MAX_DRAFT,
        )
        if not self.config.draft or run.sampler.exact or run.heal or room <= 0:
            return []
        if self.acceptance.credit <= 0 and run.drafter.run < RUN_BUCKETS[-1]:
            return []
        tokens = run.drafter.propose(room)
        if not tokens:
            return []
        probability = self.acceptance.probability(run.sampler.greedy, run.drafter.run)
        return tokens[: draft_length(probability, len(tokens), self.costs, run.beside)]

    def _step(self, works: list[Work]) -> None:
        """One llama_decode and what follows from it for each of its sequences."""
        assert self.llama
        self.llama.abort_flag[0] = b"\x00"
        self.running = [work.run for work in works]
        if self.stopping or all(work.run.job.cancelled for work in works):
            return
        try:
            with self.baton:
                begin = time.perf_counter()
                code = self.llama.decode([(work.run.slot, work.tokens, work.outputs) for work in works])
                seconds = time.perf_counter() - begin
        finally:
            self.running = []
        if code:
            for work in works:
                slot = work.run.slot
                if work.run.prefilling:  # what was read before the abort stays useful as a prefix
                    # Less the last one: where the other sequences' part was aborted, its logits are gone.
                    read = min(self.llama.computed(slot) - len(slot.tokens), len(work.tokens) - 1)
                    slot.tokens += work.tokens[: max(0, read)]
                self.llama.trim(slot, len(slot.tokens))
                if code != 2:
                    log.error("llama_decode answered %d", code)
                    self._fail(work.run, HttpError("INTERNAL_ERROR", "the model could not be evaluated"))
            return
        self.costs.learn(sum(len(work.tokens) for work in works), seconds)
        base = 0
        for work in works:
            with self._blamed_on(work.run):
                if work.run.prefilling:
                    self._after_prefill(work, base)
                else:
                    self._after_decode(work, base)
            base += len(work.tokens)
        self._flush(*(work.run for work in works))

    @contextlib.contextmanager
    def _blamed_on(self, run: Run) -> Iterator[None]:
        """What goes wrong with one request ends that one alone."""
        try:
            yield
        except Exception:
            log.exception("request %s", run.job.request_id)
            self._fail(run, HttpError("INTERNAL_ERROR", "internal error; see the log"))

    def _after_prefill(self, work: Work, base: int) -> None:
        assert self.llama
        run, slot = work.run, work.run.slot
        slot.tokens += work.tokens
        run.job.progress("prefill", len(slot.tokens), len(run.job.prompt))
        if len(slot.tokens) < len(run.job.prompt):
            return
        if not work.outputs:
            self._finish(run, "length")
            return
        self._begin(run, self._sample(run, base + len(work.tokens) - 1))

    def _begin(self, run: Run, token: int) -> None:
        """The first token is there."""
        run.job.progress("decode", 0, run.job.fields["max_tokens"])
        run.pending = token
        run.first_token = time.monotonic()
        ended = self._emit(run, token)
        self._flush(run)
        if not ended:  # only now: it takes a millisecond for each thousand tokens
            run.drafter = Drafter(run.job.prompt, run.guide, common_prefix(run.guide, run.job.prompt))
            run.drafter.advance(run.pending)

    def _after_decode(self, work: Work, base: int) -> None:
        """Accept drafted tokens as long as the target's own choice at each position is the drafted one."""
        assert self.llama
        run, slot, drafted = work.run, work.run.slot, len(work.tokens) - 1
        before, repeated = run.generated, run.drafter.run if run.drafter else 0
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
            self.acceptance.learn(run.sampler.greedy, repeated, drafted, accepted)
            run.drafted += drafted
            run.accepted += accepted
            self.drafted += drafted
            self.accepted += accepted

    def _sample(self, run: Run, index: int) -> int:
        assert self.llama
        if run.heal:
            self.llama.restrict(index, run.heal)
        return run.sampler.sample(self.llama, index)

    def _emit(self, run: Run, token: int) -> bool:
        """Account for one sampled token; True if the completion ends with it."""
        assert self.llama
        if self.llama.is_end(token):
            self._finish(run, "stop")
            return True
        piece = self.llama.piece(token)
        known = min(len(piece), len(run.heal))
        run.heal, piece = run.heal[known:], piece[known:]
        run.last_token = time.monotonic()
        if not run.generated:
            run.first_token = run.last_token
        run.generated += bool(piece) or not known  # one that only says what the client has is none for it
        if run.drafter:
            run.drafter.advance(token)
        text, reason = run.text.feed(piece)
        if text:
            run.outbox.append({"token": text, "total_tokens": run.generated})
        full = len(run.slot.tokens) + 1 >= self.llama.n_ctx
        if not reason and (run.generated >= run.job.fields["max_tokens"] or full):
            reason = "length"
            self._finish(run, reason)
        elif reason:
            self._finish(run, reason, flush=False)
        return reason is not None

    def _finish(self, run: Run, reason: str, flush: bool = True) -> None:
        if flush and (text := run.text.flush(reason == "stop")):
            run.outbox.append({"token": text, "total_tokens": run.generated})
        run.outbox.append(run.result(reason))
        self._release(run)

    def _fail(self, run: Run, error: HttpError) -> None:
        run.outbox.append(error)
        self._release(run)

    def _release(self, run: Run) -> None:
        """The slot is idle again; its sequence stays, as a prefix of what may come."""
        self._flush(run)
        run.sampler.close()
        run.slot.run = None
        run.slot.used = time.monotonic()

    def _flush(self, *runs: Run) -> None:
        """Send what is in the outboxes, at once for all."""
        if sent := [(run.job, run.outbox) for run in runs if run.outbox]:
            runs[0].job.outlet.put(*sent)
            for run in runs:
                run.outbox = []


# --------------------------------------------------------------------------------- IO: files of a worker


def check_digest(path: Path, sha256: str, state_dir: Path, stopping: Callable[[], bool]) -> None:
    """ModelError unless the file is the one that models.toml means. The result is remembered by size and time."""
    if not sha256:
        return
    stat = path.stat()
    stamp = state_dir / "verified" / f"{path.name}.{stat.st_size}.{stat.st_mtime_ns}.{sha256[:16]}"
    if stamp.exists():
        return
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(4 * MB):
            digest.update(data)
            if stopping():
                raise ModelError("cancelled")
    if (got := digest.hexdigest()) != sha256:
        raise ModelError(f"expected sha256 {sha256}, got {got}; fetch it again")
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def load_costs(model: Llama, path: Path, baton: Baton) -> Costs:
    """The calibration for this model file, library and thread count: from disk, or measured now and written."""
    try:
        table = {int(size): float(seconds) for size, seconds in json.loads(path.read_text()).items()}
        if tuple(sorted(table)) == CALIBRATION_SIZES and min(table.values()) > 0:
            return Costs(table)
    except (OSError, ValueError, AttributeError):
        pass
    return Costs(calibrate(model, path, baton, lambda: False))


def calibrate(model: Llama, path: Path, baton: Baton, give_up: Callable[[], bool]) -> dict[int, float]:
    """Measure and write; an empty table if `give_up` said so in between."""
    table = measure_costs(model, baton, give_up)
    if table:
        with contextlib.suppress(OSError):
            write_atomically(path, json.dumps(table).encode())
    return table


def measure_costs(model: Llama, baton: Baton, give_up: Callable[[], bool]) -> dict[int, float]:
    """Seconds of one decode of each of CALIBRATION_SIZES tokens, the best of several. Each size gets about the same
    time, so the small ones, between which the differences count, are measured often, all through that time.
    Between two of them another model may decode."""
    table = dict.fromkeys(CALIBRATION_SIZES, float("inf"))
    spent = dict.fromkeys(CALIBRATION_SIZES, 0.0)
    warm, slot = False, Slot(0)  # the first decode after a load takes twice as long
    while min(spent.values()) < CALIBRATION_SECONDS:
        if give_up():
            return {}
        size = min(spent, key=lambda size: spent[size])
        with baton:
            begin = time.perf_counter()
            code = model.decode([(slot, [1] * size, size)])
            seconds = time.perf_counter() - begin
        model.trim(slot, 0)
        if code and give_up():
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
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(data)
    os.replace(file.name, path)


def save_parked(folder: Path, key: str, entries: Sequence[Parked]) -> None:
    """Write a model's warm sequences, the most useful last; what was there before goes."""
    try:
        names = set()
        for order, entry in enumerate(entries):
            name = f"{order:04d}.kv"  # in the order of use
            write_atomically(folder / name, encode_parked(entry, key))
            names.add(name)
        if folder.is_dir():
            for path in folder.iterdir():
                if path.name not in names:
                    path.unlink()
    except OSError as error:
        log.warning("warm sequences not saved: %s", error.strerror)


def load_parked(folder: Path, key: str, budget: int) -> Iterator[Parked]:
    """Read them back, least useful first. A damaged or foreign file is removed."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            if path.stat().st_size > budget:
                raise ValueError("over the budget")
            yield decode_parked(path.read_bytes(), key)
        except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
            log.info("warm sequence %s removed: %s", path.name, error)
            with contextlib.suppress(OSError):
                path.unlink()
