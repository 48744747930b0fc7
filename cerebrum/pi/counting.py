"""What completions came to: totals since the start, one tally per model, and the last half hour.

Standard library only.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from cerebrum.metrics import CANCELLED, Tally
from cerebrum.pi.backend import SUPERSEDED, Job, notes_of
from cerebrum.pi.page import History
from cerebrum.pi.upstream import COUNT
from cerebrum_common import HttpError, Model

NO_MODEL = "none"  # stands for the model of a completion that got none


class Counting:
    """Owns the totals of completions. `shared` are the counts of `Sharing`, which serves some without a backend."""

    def __init__(self, shared: Mapping[str, int], models: Sequence[Model]) -> None:
        self.shared = shared
        self.started = self.failed = self.tokens = 0  # completions that were computed, those that failed, their tokens
        self.tallies: dict[str, Tally] = {}  # by model
        self.history = History(time.monotonic())
        self.add_models(models)

    def add_models(self, models: Sequence[Model]) -> None:
        """Count for these models too, from now on."""
        self.tallies = {model.id: Tally() for model in models} | self.tallies

    @property
    def requests(self) -> int:
        """Completions that were asked for, computed or not."""
        return self.started + self.shared["shared"] + self.shared["type_through"]

    def sample(self) -> None:
        """Bring `history` up to date."""
        self.history.sample(time.monotonic(), (self.requests, self.failed, self.tokens))

    @contextlib.asynccontextmanager
    async def completion(self, job: Job) -> AsyncIterator[None]:
        """Count that a completion begins and how it ends, and note for the log how it went."""
        self.started += 1
        reason = CANCELLED
        try:
            yield
        except Exception as error:
            reason = error.code if isinstance(error, HttpError) else "INTERNAL_ERROR"
            self.failed += reason != SUPERSEDED
            raise
        finally:
            job.notes |= notes_of(job)
            self._end(job, job.came.reason or reason)

    def _end(self, job: Job, reason: str) -> None:
        tally = self.tallies.setdefault(job.model or NO_MODEL, Tally())
        tally.end(reason)
        came = job.came
        tally.tokens += came.tokens
        if came.first:
            # When the last token of an answer came that is not whole, nobody has noted.
            last, tokens = (came.last, came.tokens) if came.last else (came.first, 1)
            tally.spoke(came.first - job.started, last - job.started, tokens)

    def work(self, job: Job, told: Mapping[str, Any]) -> None:
        """Count what the job's backend tells that it has done."""
        names = ("prompt_tokens", "cached_tokens", "draft_tokens", "accepted_tokens")
        prompt, cached, drafted, accepted = (told[name] if COUNT.accepts(told.get(name)) else 0 for name in names)
        tally = self.tallies[job.model]
        tally.prompt_tokens += max(0, prompt - cached)
        tally.cached_tokens += cached
        tally.draft_tokens += drafted
        tally.accepted_tokens += accepted
