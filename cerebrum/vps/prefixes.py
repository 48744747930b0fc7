"""Keeps computed sequences in memory and on disk, and finds the longest prefix shared with a new prompt."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebrum.vps.llama import common_prefix, write_atomically
from cerebrum_common import log

MIN_PREFIX = 16  # tokens; a shorter sequence is computed faster than it is stored and restored
STORE_SECONDS = 3.0  # after this long without a request, idle sequences are stored


@dataclass(slots=True)
class Parked:
    """A sequence outside the context: its tokens, and llama.cpp's serialised KV state for exactly these tokens."""

    tokens: list[int]
    state: bytes

    @property
    def size(self) -> int:
        return len(self.state) + 4 * len(self.tokens)


class PrefixStore:
    """Recent sequences within a budget of bytes; the least recently used one is dropped first. Owned by one worker.

    With `whole`, a sequence cannot be cut: its beginnings are kept beside it, and it serves only prompts that go on
    with it.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.size, self.whole = budget, 0, False
        self.entries: OrderedDict[int, Parked] = OrderedDict()
        self._next = 0

    def covers(self, tokens: list[int]) -> bool:
        """Whether an entry can stand for a sequence of `tokens`. If so, the entry counts as just used."""
        for key, entry in self.entries.items():
            if entry.tokens == tokens or (not self.whole and entry.tokens[: len(tokens)] == tokens):
                self.entries.move_to_end(key)
                return True
        return False

    def add(self, entry: Parked) -> None:
        """Keep `entry`, drop the entries that it extends, then drop the least recently used down to the budget."""
        if entry.size > self.budget:
            return
        for key, old in list(self.entries.items()):
            if entry.tokens == old.tokens or (not self.whole and entry.tokens[: len(old.tokens)] == old.tokens):
                self._drop(key)
        self.entries[self._next] = entry
        self._next += 1
        self.size += entry.size
        while self.size > self.budget:
            self._drop(next(iter(self.entries)))

    def _drop(self, key: int) -> None:
        self.size -= self.entries.pop(key).size

    def best(self, prompt: list[int]) -> tuple[Parked | None, int]:
        """The entry with the longest useful prefix of `prompt`, and the length of that prefix."""
        best, length = None, 0
        for key, entry in self.entries.items():
            common = common_prefix(entry.tokens, prompt)
            if common > length and (not self.whole or common == len(entry.tokens) < len(prompt)):
                best, length = key, common
        if best is None:
            return None, 0
        self.entries.move_to_end(best)
        return self.entries[best], length


KV_MAGIC = b"cerebrum-kv-4\n"


def encode_parked(entry: Parked, key: str) -> bytes:
    """The bytes of a file: magic, sha256 of the rest, a line with key and number of tokens, tokens as int32, state."""
    tokens = struct.pack(f"<{len(entry.tokens)}i", *entry.tokens)
    rest = f"{key} {len(entry.tokens)}\n".encode() + tokens + entry.state
    return KV_MAGIC + hashlib.sha256(rest).digest() + rest


def decode_parked(data: bytes, key: str) -> Parked:
    """The entry in a file made for `key`; ValueError if the file is damaged, truncated, or made for another key."""
    start = len(KV_MAGIC) + 32
    if not data.startswith(KV_MAGIC) or hashlib.sha256(memoryview(data)[start:]).digest() != data[start - 32 : start]:
        raise ValueError("damaged")
    begin = data.index(b"\n", start) + 1
    made_for, count = data[start:begin].decode().split()
    if made_for != key:
        raise ValueError("made for another model, context or library")
    end = begin + 4 * int(count)
    return Parked(list(struct.unpack(f"<{count}i", data[begin:end])), data[end:])


def save_parked(folder: Path, key: str, entries: Sequence[Parked], tick: Callable[[], object] = bool) -> None:
    """Write a model's parked sequences, the most recently used last, and remove all other files of the folder. `tick`
    is called before each write."""
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
    """Read parked sequences back, the least recently used first. A damaged, foreign or oversized file is removed."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        try:
            if path.stat().st_size > budget:
                raise ValueError("over the budget")
            yield decode_parked(path.read_bytes(), key)
        except (OSError, ValueError, struct.error) as error:
            log.info("parked sequence %s removed: %s", path.name, error)
            with contextlib.suppress(OSError):
                path.unlink()
