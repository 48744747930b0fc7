"""The cost of a decode on this machine, how much of a prompt is read at once, which model answers
in time, and which worker decodes next.

`Costs` are measured when a model is loaded, and adjusted from then on. The policy is pure.
"""

from __future__ import annotations

import bisect
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cerebrum.vps.llama import MAX_CHUNK, Llama, ModelError, Slot

# --------------------------------------------------------------------------------- policy: schedule

MEASURED = (1, 2, 4, 8, 16)  # tokens of the decodes that are measured
LEARN_FROM_TOKENS = 24  # the time of smaller decodes varies too much
LEARNING_RATE = 0.3
# These limit the effect of a single odd decode.
MIN_SLOWDOWN = 0.5
MAX_SLOWDOWN = 8.0
PAUSE_SECONDS = 0.25  # longest pause of a running stream while a chunk of another prompt is read
PAUSE_TOKENS = 6  # the time of this many of its own tokens may pass too, if that is longer
# Longest chunk when no stream is running; a longer piece is aborted when another request comes.
# Progress is reported after each chunk, but short chunks are read slower.
PREFILL_SECONDS = 4.0


class Costs:
    """Seconds of one `llama_decode` by its number of tokens: `costs(16)` are those of 16 tokens.
    Some sizes were measured; straight lines lead from one to the next, and beyond the largest. On
    many CPUs the second token of a decode costs far more than the third.

    `slowdown` is the real time of chunks divided by that. It grows with the length of the contexts,
    and matters where a chunk has a time limit.
    """

    def __init__(self, measured: Mapping[int, float]) -> None:
        """`measured` has the seconds by the number of tokens: one token, and more in order."""
        self.sizes = list(measured)
        # Fewer tokens never take more time: another program was busy then.
        self.seconds = np.minimum.accumulate([*measured.values()][::-1])[::-1]
        first = self.seconds[0]
        # Of each further token. A point that was measured on a busy machine must not make long
        # chunks cheap.
        self.further = max(self.seconds[-1] - first, first) / (self.sizes[-1] - 1)
        self.slowdown = 1.0

    def learn(self, tokens: int, seconds: float) -> None:
        """Adjust the slowdown: a decode of `tokens` took `seconds`."""
        if tokens >= LEARN_FROM_TOKENS:
            slowdown = min(max(seconds / self(tokens), MIN_SLOWDOWN), MAX_SLOWDOWN)
            self.slowdown += LEARNING_RATE * (slowdown - self.slowdown)

    def __call__(self, tokens: float) -> float:
        beyond = max(0, tokens - self.sizes[-1])
        return float(np.interp(tokens, self.sizes, self.seconds) + self.further * beyond)

    def reading(self, tokens: int) -> float:
        """Seconds to read so many tokens of a prompt."""
        return self.slowdown * self(tokens)

    def longest(self, seconds: float) -> int:
        """Tokens of the longest chunk that will take at most `seconds`: at least 1, at most
        MAX_CHUNK.
        """
        sizes = range(1, MAX_CHUNK + 1)
        # The search compares the seconds of the sizes, which `self` gives, not the sizes.
        return max(1, bisect.bisect_right(sizes, seconds / self.slowdown, key=self))


def longest_delay(token_seconds: float) -> float:
    """How long a stream may be delayed whose tokens take `token_seconds` each."""
    return max(PAUSE_SECONDS, PAUSE_TOKENS * token_seconds)


def chunk_size(
    missing: int, reading: Sequence[int], token_seconds: float, costs: Costs, piece: int
) -> int:
    """How many of a prompt's `missing` tokens to read next.

    While streams are running, the pause allowed to the fastest stream limits the chunk;
    `token_seconds` is the time of one token of that stream, infinity without a stream. Otherwise
    the chunk is at most twice as long as the shortest prompt being read (`reading` lists the
    missing tokens of each prompt, including this one). A short prompt then does not wait for a long
    one, and two prompts of similar length are read in one decode. All that is read in one takes at
    most PREFILL_SECONDS, but a prompt that is read alone comes in whole pieces of `piece` tokens,
    since the weights are read once for each piece, whatever its length.
    """
    if token_seconds < math.inf:
        return min(missing, costs.longest(longest_delay(token_seconds)))
    longest = costs.longest(PREFILL_SECONDS / len(reading))
    if len(reading) == 1:
        longest = max(piece, longest - longest % piece)
    return min(missing, 2 * min(reading), longest)


MUCH_LATER = 3.0  # a draft model answers where its model takes so many times as long
NEARLY = 1.1  # times the shortest time; no less of a prompt is read to gain less than that


def part_in_time(seconds: Sequence[float], limit: float) -> int:
    """The first part of a prompt that is read within `limit` seconds, or else nearly as soon as any
    other.
    """
    enough = max(limit, NEARLY * min(seconds))
    return next(part for part, needed in enumerate(seconds) if needed <= enough)


def who_answers(large: Sequence[float], small: Sequence[float], limit: float) -> tuple[bool, int]:
    """(whether the draft model answers, which part of the prompt is read for that). `large` and
    `small` are the seconds that the model and its draft model need to read what they lack of each
    part, the whole prompt first; `small` is empty if the draft model may not answer. `limit` is in
    seconds.
    """
    part = part_in_time(large, limit)
    if small and large[part] > limit:
        early = part_in_time(small, limit)
        if large[part] >= MUCH_LATER * small[early]:
            return True, early
    return False, part


class Baton:
    """What the workers of one process share:

    - A lock: only its holder computes. llama.cpp's threads spin, so two models that compute at once
      on two cores would crawl. A worker holds the baton for one decode; the workers that wait get
      it in the order of asking.
    - A table of those that work for somebody: `active` maps each decoder with runs of normal
      priority to its seconds per token. While it is not empty (`busy`), prompts of low priority
      wait; and no chunk delays the streams of `others` for long.
    """

    def __init__(self) -> None:
        self.active = dict[object, float]()
        self._turn = threading.Condition()
        self._queue = deque[object]()  # the holder, then those that wait

    @property
    def busy(self) -> bool:
        """Whether a request of normal priority is running."""
        return bool(self.active)

    def __enter__(self) -> None:
        ticket = object()
        with self._turn:
            self._queue.append(ticket)
            self._turn.wait_for(lambda: self._queue[0] is ticket)

    def __exit__(self, *_: object) -> None:
        with self._turn:
            self._queue.popleft()
            self._turn.notify_all()

    def note(self, decoder: object, token_seconds: float | None) -> None:
        """Record a running decoder's seconds per token; None removes the record."""
        with self._turn:
            if token_seconds is None:
                self.active.pop(decoder, None)
            else:
                self.active[decoder] = token_seconds

    def others(self, decoder: object) -> list[float]:
        """Seconds per token of each other active decoder, which waits while this one computes."""
        with self._turn:
            return [pace for other, pace in self.active.items() if other is not decoder]


def decode(model: Llama, slot: Slot, tokens: list[int], outputs: int) -> float:
    """Append the tokens and return the seconds. ModelError if llama.cpp fails."""
    begin = time.perf_counter()
    if model.decode([(slot, tokens, outputs)]):
        raise ModelError("llama.cpp cannot evaluate this model")
    seconds = time.perf_counter() - begin
    slot.tokens += tokens
    return seconds


def measure_costs(model: Llama, baton: Baton, give_up: Callable[[], bool]) -> Costs:
    """The costs of a model that was just loaded. ModelError if llama.cpp fails or `give_up` returns
    True. Another model may decode between two measurements.
    """
    slot = Slot(0)
    fastest = dict.fromkeys(MEASURED, math.inf)
    for size in (1, *MEASURED, 1, MEASURED[-1]):  # the first decode after a load is slow
        if give_up():
            raise ModelError("cancelled")
        tokens = [7919 * number % model.n_vocab for number in range(size)]  # of many experts
        with baton:
            seconds = decode(model, slot, tokens, min(size, model.outputs))
        fastest[size] = min(seconds, fastest[size])
        model.cut(slot, 0)
    return Costs(fastest)
