"""The cost of a decode on this machine, which sequences share a decode, and which worker decodes next.

`Costs` are measured when a model is loaded for the first time, and adjusted from then on. The policy is pure.
"""

from __future__ import annotations

import bisect
import contextlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cerebrum.vps.llama import MAX_CHUNK, Llama, ModelError, Slot, write_atomically

# ------------------------------------------------------------------------------------- policy: schedule

CALIBRATION_SIZES = (1, 2, 3, 4, 8, 16, 32, 64)
CALIBRATION_SECONDS = 0.4  # spent on each size; at least two decodes
LEARN_FROM_TOKENS = 24  # the time of smaller decodes varies too much
LEARNING_RATE = 0.3
MIN_SLOWDOWN, MAX_SLOWDOWN = 0.5, 8.0  # limits the effect of a single odd decode
PAUSE_SECONDS = 0.25  # longest pause of a running stream while a chunk of another prompt is read
PAUSE_TOKENS = 6  # the time of this many of its own tokens may pass too, if that is longer
# Longest chunk when no stream is running. Progress is reported after each chunk, but short chunks are read slower.
PREFILL_SECONDS = 4.0


class Costs:
    """Seconds of one `llama_decode` by its number of tokens: calibrated points, interpolated linearly.

    The table never changes, because grouping and drafting depend only on its proportions. `slowdown` is the measured
    time of chunks divided by the table's. The slowdown grows with the length of the contexts, and matters where a chunk
    has a time limit.
    """

    def __init__(self, table: Mapping[int, float]) -> None:
        self.sizes = sorted(table)
        # More tokens never take less time: a point above a later one was measured while the machine was busy.
        self.seconds = [min(table[later] for later in self.sizes[place:]) for place in range(len(self.sizes))]
        self.slowdown = 1.0

    def learn(self, tokens: int, seconds: float) -> None:
        """Adjust the slowdown: a decode of `tokens` took `seconds`."""
        if tokens >= LEARN_FROM_TOKENS:
            seen = min(max(seconds / self(tokens), MIN_SLOWDOWN), MAX_SLOWDOWN)
            self.slowdown += LEARNING_RATE * (seen - self.slowdown)

    def __call__(self, tokens: int) -> float:
        right = min(max(bisect.bisect_left(self.sizes, tokens), 1), len(self.sizes) - 1)
        (x0, x1), (y0, y1) = self.sizes[right - 1 : right + 1], self.seconds[right - 1 : right + 1]
        slope = (y1 - y0) / (x1 - x0)
        if tokens > x1:  # a disturbed point must not make long chunks cheap
            return y1 + max(slope, y1 / x1 / 2) * (tokens - x1)
        return y0 + slope * (tokens - x0)

    def longest(self, seconds: float) -> int:
        """Tokens of the longest chunk that will take at most `seconds`: at least 1, at most MAX_CHUNK."""
        return max(1, bisect.bisect_right(range(1, MAX_CHUNK + 1), seconds / self.slowdown, key=self))


def group_by_cost(sizes: Sequence[int], costs: Costs) -> list[list[int]]:
    """Group works (by index) that cost less in one shared `llama_decode` than one after the other.

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
    """The largest decode that may delay a stream whose tokens take `token_seconds` each."""
    return costs.longest(max(PAUSE_SECONDS, PAUSE_TOKENS * token_seconds))


def chunk_size(missing: int, reading: Sequence[int], token_seconds: float, costs: Costs) -> int:
    """How many of a prompt's `missing` tokens to read next.

    While streams are running, the pause allowed to the fastest stream limits the chunk; `token_seconds` is the time of
    one token of that stream, infinity without a stream. Otherwise the chunk is at most twice as long as the shortest
    prompt being read (`reading` lists the missing tokens of each prompt, including this one). A short prompt then does
    not wait for a long one, and two prompts of similar length are read in one decode.
    """
    if token_seconds < math.inf:
        return min(missing, share_size(costs, token_seconds))
    return min(missing, 2 * min(reading), costs.longest(PREFILL_SECONDS / len(reading)))


class Baton:
    """A lock shared by the workers of one process: only its holder computes.

    llama.cpp's threads spin, so two models that compute at once on two cores would crawl. A worker holds the baton for
    one decode; the workers that wait get the baton in the order of asking. `active` maps each decoder with running
    sequences to its seconds per token.
    """

    def __init__(self) -> None:
        self.active: dict[object, float] = {}
        self._turn = threading.Condition()
        self._queue: deque[object] = deque()  # the holder, then those that wait

    def __enter__(self) -> None:
        ticket = object()
        with self._turn:
            self._queue.append(ticket)
            self._turn.wait_for(lambda: self._queue[0] is ticket)

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._queue.popleft()
            self._turn.notify_all()

    def note(self, worker: object, token_seconds: float | None) -> None:
        """Record a running worker's seconds per token; None removes the record."""
        with self._turn:
            self.active.pop(worker, None)
            if token_seconds is not None:
                self.active[worker] = token_seconds

    def fastest_other(self, worker: object) -> float:
        """Seconds per token of the fastest other worker that waits while this one computes; infinity if none waits."""
        with self._turn:
            return min((seconds for other, seconds in self.active.items() if other is not worker), default=math.inf)


def load_costs(model: Llama, path: Path, baton: Baton, give_up: Callable[[], bool]) -> Costs:
    """The calibration for this model file, library and thread count: read from disk, or measured now and written."""
    try:
        table = {int(size): float(seconds) for size, seconds in json.loads(path.read_text()).items()}
        if tuple(sorted(table)) == CALIBRATION_SIZES and min(table.values()) > 0:
            return Costs(table)
    except (OSError, ValueError, AttributeError, TypeError):
        pass
    return calibrate(model, path, baton, give_up)


def calibrate(model: Llama, path: Path, baton: Baton, give_up: Callable[[], bool]) -> Costs:
    """Measure and write the seconds of one decode of each of CALIBRATION_SIZES tokens, the least of several. ModelError
    if llama.cpp fails or `give_up` returns True.

    Every size gets about the same total time, so small sizes, whose differences matter most, are measured most often.
    Another model may decode between two measurements.
    """
    times: dict[int, list[float]] = {size: [] for size in CALIBRATION_SIZES}
    warm, slot = False, Slot(0)  # the first decode after a load takes twice as long and is not counted
    tokens = [7919 * place % model.n_vocab for place in range(max(CALIBRATION_SIZES))]  # of many experts
    while missing := [size for size, seen in times.items() if len(seen) < 2 or sum(seen) < CALIBRATION_SECONDS]:
        if give_up():
            raise ModelError("cancelled")
        size = min(missing, key=lambda size: sum(times[size]))
        with baton:
            begin = time.perf_counter()
            code = model.decode([(slot, tokens[:size], size)])
            seconds = time.perf_counter() - begin
        model.trim(slot, 0)
        if code:
            raise ModelError("llama.cpp cannot evaluate this model")
        if warm:
            times[size].append(seconds)
        warm = True
    table = {size: min(seen) for size, seen in times.items()}
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(table).encode())
    return Costs(table)
