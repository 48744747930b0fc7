"""Statistics of completions: totals since the start, one tally per model, and the last half
hour.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Collection, Sequence
from datetime import date
from itertools import pairwise
from operator import add
from typing import NamedTuple

from cerebrum.fields import Field, JsonObject, Members
from cerebrum.metrics import CANCELLED, Tally
from cerebrum.pi.completion import SUPERSEDED, Completion
from cerebrum_common import HttpError, Model

HISTORY_STEP_SECONDS = 30
HISTORY_STEPS = 60  # half an hour
# What an editor reports: the length, and the confidence that came with the completion.
ACCEPTED = {"characters": Field(int, 1, 10**6, required=True), "confidence": Field(float, 0, 1)}
BANDS = (0, 0.2, 0.4, 0.6, 0.8)  # of confidence, each up to the next
# Completions that began, those that ended with an error, tokens.
SERIES = ("requests", "failed", "tokens")


class History:
    """The counts in each of the last HISTORY_STEPS steps: differences between the totals given to
    `sample`.
    """

    def __init__(self, now: float) -> None:
        self._step = int(now // HISTORY_STEP_SECONDS)
        size = HISTORY_STEPS + 1
        self._totals = deque([(0, 0, 0)] * size, maxlen=size)  # at the end of each step

    def sample(self, now: float, totals: tuple[int, int, int]) -> None:
        """Record the totals of SERIES at `now` (seconds, monotonic)."""
        step = int(now // HISTORY_STEP_SECONDS)
        passed = min(step - self._step, HISTORY_STEPS + 1)
        self._totals.extend([self._totals[-1]] * passed)
        self._totals[-1] = totals
        self._step = step

    def describe(self) -> JsonObject:
        """`{"step_s": 30, "requests": [...], "failed": [...], "tokens": [...]}`, the oldest step
        first.
        """
        described: JsonObject = {"step_s": HISTORY_STEP_SECONDS}
        for name, totals in zip(SERIES, zip(*self._totals, strict=True), strict=True):
            described[name] = [new - old for old, new in pairwise(totals)]
        return described


class Usage(NamedTuple):
    """What one client has used."""

    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0  # that its completions held a place
    accepted: int = 0  # completions


class People:
    """What each named client has used, since the start and today, by this machine's clock."""

    def __init__(self) -> None:
        self.total = dict[str, Usage]()
        self._today = defaultdict[str, Usage](Usage)
        self._day = date.today()

    def configure(self, names: Collection[str]) -> None:
        self.total = {name: self.total.get(name, Usage()) for name in names}
        for gone in self._today.keys() - names:
            del self._today[gone]

    def add(self, name: str, used: Usage) -> None:
        """Count what a client has used, if it has a name."""
        if name not in self.total:
            return
        for table in (self.total, self._of_today()):
            table[name] = Usage(*map(add, table[name], used))

    def describe(self) -> list[JsonObject]:
        """The member `clients` of /v1/stats."""
        today = self._of_today()
        entries = []
        for name, used in self.total.items():
            entry = {"name": name, **used._asdict()}
            entries.append(entry | {"today": today[name]._asdict()})
        return entries

    def _of_today(self) -> dict[str, Usage]:
        today = date.today()
        if self._day != today:
            self._day = today
            self._today.clear()
        return self._today


class Counting:
    """Owns the totals of completions, but for those that `Broadcasts` answers without a backend."""

    def __init__(self) -> None:
        self.started = self.failed = 0  # completions that were computed, and those that failed
        # Completions that editors' users accepted, and their length.
        self.accepted = self.accepted_characters = 0
        self.tallies = dict[str, Tally]()  # by model
        self.running = set[Completion]()
        self.by_confidence = {least: {"suggested": 0, "accepted": 0} for least in BANDS}
        self.history = History(time.monotonic())
        self.people = People()

    def configure(self, models: Sequence[Model], names: Collection[str]) -> None:
        """Count for these models too, from now on, and for the clients of these names alone."""
        self.tallies = {model.id: Tally() for model in models} | self.tallies
        self.people.configure(names)

    @property
    def tokens(self) -> int:
        """Tokens that came, also of completions that still run."""
        ended = sum(tally.tokens for tally in self.tallies.values())
        return ended + sum(completion.tokens for completion in self.running)

    def count_band(self, name: str, confidence: float) -> None:
        """Count an infill with a text as "suggested" or "accepted", by the confidence of its first
        line.
        """
        band = max(least for least in BANDS if confidence >= least)
        self.by_confidence[band][name] += 1

    def accept(self, client: str, characters: int, confidence: float | None) -> dict[str, int]:
        """Count a completion that a client accepted, and return the totals."""
        if confidence is not None:
            self.count_band("accepted", confidence)
        self.people.add(client, Usage(accepted=1))
        self.accepted += 1
        self.accepted_characters += characters
        return {"accepted": self.accepted, "accepted_characters": self.accepted_characters}

    @contextlib.asynccontextmanager
    async def completion(self, completion: Completion) -> AsyncIterator[None]:
        """Count the start and the end of a completion, and note its figures for the log. Without a
        client who waits, only its work counts.
        """
        self.started += completion.counts
        self.running.add(completion)
        reason = CANCELLED
        try:
            yield
        except Exception as error:
            reason = error.code if isinstance(error, HttpError) else "INTERNAL_ERROR"
            self.failed += bool(completion.clients) and reason != SUPERSEDED
            raise
        finally:
            self.running.discard(completion)
            completion.notes |= completion.figures()
            self.share(completion)
            if completion.counts or completion.clients or completion.tokens:
                self._tally(completion, reason)

    def _tally(self, completion: Completion, reason: str) -> None:
        """Count the end of a completion for its model."""
        tally = self.tallies.setdefault(completion.model or "none", Tally())
        attempt = completion.attempt
        tally.ended[(attempt and attempt.reason) or reason] += 1
        if attempt and attempt.first:
            tally.tokens += attempt.tokens
            # The time of the last token is known only for a whole answer.
            tokens = attempt.tokens if attempt.last else 1
            started, last = completion.started, attempt.last or attempt.first
            tally.spoke(attempt.first - started, last - started, tokens)

    def typed(self, client: str, unseen: float | None) -> None:
        """Count a completion that an earlier one has answered. `unseen`: the confidence of a text
        that nobody has seen until now.
        """
        self.people.add(client, Usage(completions=1))
        if unseen is not None:
            self.count_band("suggested", unseen)

    def share(self, completion: Completion) -> None:
        """Count what has come of a completion for each client who waits for it; they divide the
        tokens and the seconds evenly.
        """
        now = time.monotonic()
        tokens = sum(attempt.tokens for attempt in completion.attempts)
        seconds = sum((attempt.left or now) - attempt.begun for attempt in completion.attempts)
        among = len(completion.clients)
        for number, client in enumerate(completion.clients, 1):
            # Whole tokens, with the right sum.
            part = tokens * number // among - tokens * (number - 1) // among
            self.people.add(client, Usage(1, part, round(seconds / among, 3)))

    def work(self, model: str, result: Members) -> None:
        """Count the work that a backend reports."""
        tally = self.tallies[model]
        cached = result.get("cached_tokens", 0)
        tally.prompt_tokens += max(0, result.get("prompt_tokens", 0) - cached)
        tally.cached_tokens += cached
        tally.draft_tokens += result.get("draft_tokens", 0)
        tally.accepted_tokens += result.get("accepted_tokens", 0)
