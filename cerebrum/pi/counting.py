"""Statistics of completions: totals since the start, one tally per model, what each client has used
and keeps, and the last half hour.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import date, timedelta
from itertools import pairwise
from operator import add
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

from cerebrum.fields import Field, JsonObject, Members, parse_json
from cerebrum.metrics import CANCELLED, Tally
from cerebrum.pi.completion import (
    CURSOR_CHARS,
    MAX_TYPED_CHARS,
    SUPERSEDED,
    Answered,
    Completion,
    CompletionRequest,
    Evicted,
    set_newest,
)
from cerebrum.settings import write_atomically
from cerebrum_common import HttpError, Model, log

HISTORY_STEP_SECONDS = 30
HISTORY_STEPS = 60  # half an hour
ACCEPTED = {"characters": Field(int, 1, 10**6, required=True)}  # what an editor reports
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
        passed = step - self._step
        self._totals.extend([self._totals[-1]] * passed)
        self._totals[-1] = totals
        self._step = step

    def describe(self) -> JsonObject:
        """`{"step_s": 30, "requests": [...], "failed": [...], "tokens": [...]}`, the oldest step
        first.
        """
        described: JsonObject = {"step_s": HISTORY_STEP_SECONDS}
        for name, totals in zip(SERIES, zip(*self._totals, strict=True), strict=True):
            # A completion's tokens are out of the total between its last token and its end.
            described[name] = [max(0, new - old) for old, new in pairwise(totals)]
        return described


class Usage(NamedTuple):
    """What one client has used."""

    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0  # that its completions held a place
    accepted: int = 0  # completions
    # Characters of hints, the texts that editors show; how many of them were then in the file.
    shown: int = 0
    kept: int = 0

    def plus(self, other: Iterable[float]) -> Usage:
        return Usage(*map(add, self, other))


MONTH_DAYS = 30
MAX_ENTRIES = 1000  # a month of MAX_CLIENTS; takes up to half of MAX_FILE_BYTES
MAX_FILE_BYTES = 1 << 18
SAVE_SECONDS = 60


class People:
    """What each named client has used, and those without a name ("") together: since the start, and
    by days of this machine's clock, which a file keeps over a restart. Whatever is wrong with the
    file costs no more than these figures.
    """

    def __init__(self, path: Path) -> None:
        self.total = dict[str, Usage]()
        self._path = path
        self._days = read_days(path)  # by day and name, "2025-12-25 anna"
        self._saved = "{}"
        self._due = 0.0

    def configure(self, names: Collection[str]) -> None:
        self.total = {name: self.total.get(name, Usage()) for name in ("", *names)}

    def add(self, client: str, used: Usage) -> None:
        name = client if client in self.total else ""
        self.total[name] = self.total[name].plus(used)
        day = f"{date.today()} {name}"
        so_far = self._days.get(day, Usage())
        set_newest(self._days, day, so_far.plus(used), MAX_ENTRIES)

    def describe(self) -> list[JsonObject]:
        """The members `unnamed` and `clients` of /v1/stats."""
        entries = []
        for name, total in self.total.items():
            entry = {
                "name": name,
                **total._asdict(),
                "today": self._last(1, name),
                "month": self._last(MONTH_DAYS, name),
            }
            entries.append(entry)
        return entries

    def _last(self, days: int, name: str) -> JsonObject:
        used = Usage()
        for age in range(days):
            day = f"{date.today() - timedelta(age)} {name}"
            used = used.plus(self._days.get(day, Usage()))
        return used._asdict()

    def save(self, now: float) -> None:
        """Write the file if it has changed, at most every SAVE_SECONDS of `now` (monotonic)."""
        if now < self._due:
            return
        days = json.dumps(self._days)
        if days != self._saved:
            self._due = now + SAVE_SECONDS
            with contextlib.suppress(OSError):  # a full disk, say
                write_atomically(self._path, days.encode())
                self._saved = days


def read_days(path: Path) -> dict[str, Usage]:
    """What a file of `People` has; nothing if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            found = parse_json(file.read(MAX_FILE_BYTES))
        return {day: Usage().plus(used) for day, used in found.items()}
    except (OSError, HttpError, TypeError) as error:
        log.info("%s: the figures of days begin anew: %s", path, error)
        return {}


# -------------------------------------------------------------------------------- what a user keeps

HINT_SECONDS = 60  # from the request for a hint to the next one
MAX_HINTS = 256  # remembered


def characters_kept(above: str, hint: str, prompt: str) -> int:
    """How many characters of a hint stand behind its place in a newer prompt; 0 if this is not near
    the prompt's end. `above`: the end of the text before the hint, at most CURSOR_CHARS. Both
    texts begin with "\\0" where the editor's window begins, which moves in a longer file.

    >>> characters_kept("\\0x = ", "foo(a)", "\\0x = foo(b")
    4
    """
    nearby = prompt[-CURSOR_CHARS - len(hint) - MAX_TYPED_CHARS :]
    behind = nearby.partition(above)[2]
    return len(commonprefix([hint, behind]))  # noqa: RUF071, characters are meant


# --------------------------------------------------------------------------------------- the totals


class Counting:
    """Owns the totals of completions, but for those that `Broadcasts` answers without a backend;
    and the last hint in each file, to count how much of it stays.
    """

    def __init__(self, path: Path) -> None:
        self.started = self.failed = 0  # completions that were computed, and those that failed
        # Completions that editors' users accepted, and their length.
        self.accepted = self.accepted_characters = 0
        self.tallies = dict[str, Tally]()  # by model
        self.history = History(time.monotonic())
        self.people = People(path)
        # By file: what precedes the hint, its text, and when it was asked for.
        self.hints = dict[str, tuple[str, str, float]]()

    def configure(self, models: Sequence[Model], names: Collection[str]) -> None:
        """Count for these models too, from now on, and for the clients of these names alone."""
        self.tallies = {model.id: Tally() for model in models} | self.tallies
        self.people.configure(names)

    def accept(self, client: str, characters: int) -> dict[str, int]:
        """Count a completion that a client accepted, and return the totals."""
        self.people.add(client, Usage(accepted=1))
        self.accepted += 1
        self.accepted_characters += characters
        return {"accepted": self.accepted, "accepted_characters": self.accepted_characters}

    def count_hint(self, request: CompletionRequest, now: float, text: str) -> None:
        """Count what an infill's prompt has of the last hint in its file; then the text, which its
        client is shown, unless it is the rest of this hint. `now`: when the client asked.
        """
        # A model may write either form of line ends, and an editor inserts its own.
        text = text.replace("\r\n", "\n")
        prompt = "\0" + request.fields.prompt.replace("\r\n", "\n")
        above, hint, asked = self.hints.get(request.file, ("\0", "", 0.0))
        kept = 0
        if now - asked <= HINT_SECONDS:
            kept = characters_kept(above, hint, prompt)
        is_rest = (prompt + text).endswith(above + hint)
        shown = 0 if is_rest else len(text)
        self.people.add(request.client, Usage(shown=shown, kept=kept))
        newest = prompt[-CURSOR_CHARS:], text, now
        set_newest(self.hints, request.file, newest, MAX_HINTS)

    @contextlib.contextmanager
    def completion(self, completion: Completion) -> Iterator[None]:
        """Count the start and the end of a completion, and note its figures for the log. Without a
        client who waits, only its work counts.
        """
        self.started += bool(completion.clients)
        reason = CANCELLED
        try:
            yield
        except Exception as error:
            reason = "INTERNAL_ERROR"
            if isinstance(error, HttpError):
                reason = error.code
            self.failed += bool(completion.clients) and reason != SUPERSEDED
            raise
        finally:
            figures = completion.figures()
            completion.notes |= figures
            self._charge(completion)
            if completion.clients or "tokens" in figures:
                self._tally(completion, reason)

    def _tally(self, completion: Completion, reason: str) -> None:
        """Count the end of a completion for its model."""
        attempt = completion.attempt
        model = attempt.model if attempt else "none"
        tally = self.tallies.setdefault(model, Tally())
        match attempt and attempt.outcome:
            # After an eviction, the completion may still have failed, such as by a 429 in the line.
            case Answered(ended) | Evicted(ended) if reason == CANCELLED:
                reason = ended
        tally.ended[reason] += 1
        if attempt and attempt.first_heard:
            tally.tokens += attempt.tokens
            started = completion.started
            tally.spoke(attempt.first_heard - started, attempt.last_heard - started, attempt.tokens)

    def _charge(self, completion: Completion) -> None:
        """Count what has come of a completion for each client who waits for it; they divide the
        tokens and the seconds evenly.
        """
        tokens = sum(attempt.tokens for attempt in completion.attempts)
        seconds = sum(attempt.released - attempt.begun for attempt in completion.attempts)
        among = len(completion.clients)
        for number, client in enumerate(completion.clients):
            part = (tokens + number) // among  # whole tokens, with the right sum
            self.people.add(client, Usage(1, part, round(seconds / among, 3)))

    def work(self, model: str, result: Members) -> None:
        """Count the work that a backend reports."""
        tally = self.tallies[model]
        cached = result.get("cached_tokens", 0)
        tally.prompt_tokens += max(0, result.get("prompt_tokens", 0) - cached)
        tally.cached_tokens += cached
        tally.draft_tokens += result.get("draft_tokens", 0)
        tally.accepted_tokens += result.get("accepted_tokens", 0)
