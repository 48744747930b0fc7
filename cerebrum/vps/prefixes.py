"""Keeps computed sequences in a context, in memory and on disk, and finds the longest prefix of a
new prompt.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cerebrum.settings import write_atomically
from cerebrum.vps.llama import Llama, Slot
from cerebrum_common import log

MIN_PREFIX = 16  # tokens; a shorter sequence is computed faster than it is stored and restored
TOKEN_BYTES = 4
DIGEST_BYTES = 32
STORE_SECONDS = 3.0  # after this long without a request, idle sequences are stored
BLOCK = 64  # tokens that are compared at once, which is faster than one by one


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of `a` and `b`, two sequences of one type."""
    limit = min(len(a), len(b))
    length = 0
    while length < limit and a[length : length + BLOCK] == b[length : length + BLOCK]:
        length += BLOCK
    while length < limit and a[length] == b[length]:
        length += 1
    return min(length, limit)


@dataclass(slots=True)
class Parked:
    """A sequence outside the context: its tokens, and llama.cpp's serialised KV state for exactly
    these tokens.
    """

    tokens: list[int]
    state: bytes | memoryview
    low: bool = False  # of a request of low priority


class PrefixStore:
    """Recent sequences whose states are within a budget of bytes. Those of low priority are dropped
    first, and displace only each other; of each kind, the least recently used one goes. Owned by
    one worker.

    The sequences of a recurrent model cannot be cut: each serves only prompts that go on with it,
    and its beginnings are entries of their own.
    """

    def __init__(self, budget: int, recurrent: bool) -> None:
        self.budget = budget
        self.recurrent = recurrent
        self.entries = list[Parked]()  # the most recently used last

    @property
    def size(self) -> int:
        return sum(len(entry.state) for entry in self.entries)

    def touch(self, entry: Parked) -> None:
        """Count the entry as just used."""
        self.entries.remove(entry)
        self.entries.append(entry)

    def _replaces(self, new: list[int], old: list[int]) -> bool:
        """Whether a sequence of the tokens `new` serves every prompt that `old` serves."""
        kept = new if self.recurrent else new[: len(old)]
        return kept == old

    def renew(self, tokens: list[int], low: bool) -> bool:
        """Count an entry that can stand for a sequence of `tokens` as just used. False if there is
        none.
        """
        for entry in self.entries:
            if self._replaces(entry.tokens, tokens):
                entry.low = entry.low and low
                self.touch(entry)
                return True
        return False

    def drop_for(self, tokens: list[int], size: int, low: bool) -> bool:
        """Drop the entries that `tokens` extend, and others until `size` bytes more are within the
        budget. False, with nothing dropped, if that is impossible.
        """
        protected_bytes = sum(len(old.state) for old in self.entries if low > old.low)
        if protected_bytes + size > self.budget:
            return False
        self.entries = [
            old for old in self.entries if low > old.low or not self._replaces(tokens, old.tokens)
        ]
        self.shrink(self.budget - size)
        return True

    def shrink(self, size: int) -> None:
        """Drop entries down to `size` bytes."""
        while self.entries and self.size > size:
            least_useful = max(self.entries, key=lambda entry: entry.low)
            self.entries.remove(least_useful)

    def add(self, entry: Parked) -> None:
        """Add `entry`, if it can be within the budget."""
        if self.drop_for(entry.tokens, len(entry.state), entry.low):
            self.entries.append(entry)

    def reusable(self, tokens: list[int], prompt: list[int]) -> int:
        """How many first tokens of a prompt a sequence of these tokens saves. The prompt's last
        token is computed in any case, for the logits after it.
        """
        common = min(common_prefix(tokens, prompt), len(prompt) - 1)
        must_be_cut = common < len(tokens)
        return 0 if self.recurrent and must_be_cut else common

    def best(self, prompt: list[int]) -> tuple[Parked | None, int]:
        """The entry with the longest useful prefix of `prompt`, and the length of that prefix."""

        def length(entry: Parked) -> int:
            return self.reusable(entry.tokens, prompt)

        best = max(self.entries, key=length, default=None)
        return best, length(best) if best else 0


class Sequences:
    """The sequences of a model: in the slots of its context, running or idle, and parked in the
    store. Owned by one worker.
    """

    def __init__(self, model: Llama, count: int, budget: int) -> None:
        self.model = model
        self.store = PrefixStore(budget, model.recurrent)
        self.slots = [Slot(i) for i in range(count)]
        # Idle sequences leave the context, so that only running ones occupy cells.
        self.parks = model.unified and budget > 0

    def known(self, prompt: list[int]) -> int:
        """How many first tokens of a prompt need not be read."""
        _, stored = self.store.best(prompt)
        live = [self.store.reusable(slot.tokens, prompt) for slot in self.slots]
        return max(stored, *live)

    def take_slot(self, prompt: list[int], free: list[Slot], low: bool) -> tuple[Slot, list[int]]:
        """Prepare one of the free slots for the prompt, so that it holds the longest known prefix.
        Returns the slot, and the guide: the sequence that has this prefix, if it is long enough.

        The prefix stays where it is, or comes from the store, or from another slot.
        """

        def reusable(slot: Slot) -> int:
            return self.store.reusable(slot.tokens, prompt)

        # 1. Which sequence has the longest prefix? A running recurrent state goes on and cannot be
        # shared.
        entry, stored = self.store.best(prompt)
        candidates = free if self.model.recurrent else self.slots
        nearest = max(candidates, key=reusable)
        live = reusable(nearest)
        if stored <= live or stored < MIN_PREFIX:
            entry = None  # not worth restoring
        guide = []
        if max(stored, live) >= MIN_PREFIX:
            source = entry or nearest
            guide = source.tokens[:]
        if entry:
            self.store.touch(entry)
        # 2. Which slot? The nearest, unless trimming would lose more tokens than it keeps: then
        # another gets a copy. With `parks`, step 3 stores what is trimmed. An entry is restored to
        # the slot that was not used for longest, which may be the nearest.
        loses = len(nearest.tokens) > 2 * live
        can_stay = nearest in free and not entry and (self.parks or not loses)
        oldest = min(free, key=lambda slot: slot.used)
        slot = nearest if can_stay else oldest
        # 3. Park the idle sequences, or in separate caches only the slot's own: there, idle cells
        # slow nobody else.
        for other in free if self.parks else [slot]:
            if other is not nearest or entry:
                self.park(other)
            elif loses or low:  # what will be cut, or marked low, is stored first
                self.back_up(other)
        # 4. Bring the prefix to the slot.
        self._bring(slot, entry, nearest, live)
        self.model.cut(slot, reusable(slot))
        slot.low = low
        return slot, guide

    def _bring(self, slot: Slot, entry: Parked | None, nearest: Slot, length: int) -> None:
        """Bring a stored sequence to an empty slot, or else a prefix of the nearest one's. All is
        read again if llama.cpp rejects it, or if there is no memory for a copy: between separate
        caches it takes some for a while, and may take no more than the saved prompts.
        """
        if entry and self.model.restore(slot, entry.state):
            slot.tokens = entry.tokens[:]
        elif entry:
            self.model.cut(slot, 0)
            self.store.entries = [other for other in self.store.entries if other is not entry]
        elif slot is not nearest and length >= MIN_PREFIX:
            fits = self.model.unified or self.model.state_size(nearest) <= self.store.budget
            if fits and self.model.copy_prefix(nearest, slot, length):
                slot.tokens = nearest.tokens[:length]

    def back_up(self, slot: Slot) -> None:
        """Copy the slot's sequence to the store, if it can be within the budget. Others are dropped
        first: all together would take too much memory.
        """
        tokens = slot.tokens
        if len(tokens) < MIN_PREFIX or self.store.renew(tokens, slot.low):
            return
        size = self.model.state_size(slot)
        if self.store.drop_for(tokens, size, slot.low):
            self.store.add(Parked(tokens[:], self.model.save(slot), slot.low))

    def park(self, slot: Slot) -> None:
        """Move an idle slot's sequence to the store."""
        self.back_up(slot)
        self.model.cut(slot, 0)


def encode_parked(entry: Parked, key: str) -> tuple[bytes, bytes | memoryview]:
    """A file in two parts: sha256 of the key and the rest, the number of tokens and the tokens as
    int32; state.
    """
    head = array("i", [len(entry.tokens), *entry.tokens]).tobytes()
    return _digest(key, head, entry.state) + head, entry.state


def decode_parked(data: bytes, key: str) -> Parked:
    """The entry in a file made for `key`; ValueError if the file is damaged, truncated, or made for
    another key.
    """
    rest = memoryview(data)[DIGEST_BYTES:]
    if data[:DIGEST_BYTES] != _digest(key, rest):
        raise ValueError("damaged, or made for another model, context or library")
    count = int.from_bytes(rest[:TOKEN_BYTES], sys.byteorder)
    end = TOKEN_BYTES * (1 + count)
    tokens = rest[TOKEN_BYTES:end].cast("i").tolist()
    return Parked(tokens, rest[end:])


def _digest(key: str, *parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256(key.encode())
    for part in parts:
        digest.update(part)
    return digest.digest()


def save_parked(
    folder: Path, key: str, entries: Sequence[Parked], tick: Callable[[], object]
) -> None:
    """Write a model's parked sequences, those of low priority first and then the most recently used
    last, and remove all other files of the folder. `tick` is called before each write.
    """
    # The priority is not saved, but what is loaded first is dropped first.
    ordered = sorted(entries, key=lambda entry: not entry.low)
    files = {folder / f"{order:04d}.kv": entry for order, entry in enumerate(ordered)}
    try:
        for path, entry in files.items():
            tick()
            write_atomically(path, *encode_parked(entry, key))
        for path in set(folder.glob("*")) - files.keys():
            path.unlink()
    except OSError as error:
        log.warning("parked sequences not saved: %s", error.strerror)


def load_parked(folder: Path, key: str) -> Iterator[Parked]:
    """Read parked sequences back, the least recently used first. A damaged or foreign file is
    removed.
    """
    for path in sorted(folder.glob("*")):
        try:
            yield decode_parked(path.read_bytes(), key)
        except (OSError, ValueError) as error:
            log.info("parked sequence %s removed: %s", path.name, error)
            with contextlib.suppress(OSError):
                path.unlink()
