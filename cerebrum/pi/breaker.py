"""Circuit breaker: decides when to stop sending requests to a backend.

    >>> breaker = Breaker(lambda: 0.5)
    >>> for _ in range(3): breaker.failed(breaker.admit(0.0), 0.0)
    >>> breaker.state, breaker.admits()
    ('open', False)

Pure: the caller passes in the time and the random numbers. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FAILURES_TO_OPEN = 3  # consecutive
OPEN_SECONDS, MAX_OPEN_SECONDS = 5.0, 60.0  # the first pause and the longest; each failed trial doubles the pause
JITTER = 0.2  # +- this share of every pause, so that several Pis do not retry in step
TRIAL_SECONDS = 180.0  # until a trial's first token: a 7B model loads in 30 s and reads 4,000 tokens in 100 s
BREAKER_STATES = ("closed", "open", "half-open")


class Breaker:
    """closed --3 failures in a row--> open --pause over, then a good /health--> half-open --a token--> closed.

    From half-open, a failed or overdue trial opens the breaker again for twice as long. `admit` returns a ticket, a
    number that grows with every failure but a timeout, and with every change of state. A failure with an older ticket
    does not count: it comes from before the change, or has the cause of a failure that was counted, such as the death
    of one replica with many streams. `now` is in monotonic seconds.
    """

    def __init__(self, chance: Callable[[], float]) -> None:
        self.state = "closed"
        self.failures = 0  # consecutive
        self.opens = 0  # in total
        self.generation = 1  # the ticket of a new request
        self._changed = 1  # the first ticket of this state
        self._chance = chance  # returns 0 to 1
        self._pause = 0.0  # without jitter; 0 while closed
        self._until = 0.0  # open: the pause's end; half-open: the trial's deadline
        self._trial = False  # half-open: a trial is under way

    def admits(self) -> bool:
        """Whether a request may be sent: any while closed, one as a trial while half-open."""
        return self.state == "closed" or (self.state == "half-open" and not self._trial)

    def admit(self, now: float) -> int | None:
        """A ticket for one request, or None if the request may not be sent."""
        if not self.admits():
            return None
        if self.state == "half-open":
            self._trial, self._until = True, now + TRIAL_SECONDS
        return self.generation

    def succeeded(self, ticket: int) -> int:
        """A valid token arrived. Returns the ticket that the request carries from now on."""
        if ticket < self._changed:
            return ticket
        self.failures = 0
        if self.state == "half-open":
            self.reset()
        return self.generation

    def failed(self, ticket: int, now: float, late: bool = False) -> None:
        """The backend, or the network to it, failed this request. `late`: by a timeout, each of which counts."""
        if ticket != self.generation:
            return
        self.failures += 1
        self.generation += not late
        if self.state == "half-open" or self.failures >= FAILURES_TO_OPEN:
            self._pause = min(self._pause * 2 or OPEN_SECONDS, MAX_OPEN_SECONDS)
            self._until = now + self._pause * (1 - JITTER + 2 * JITTER * self._chance())
            self._change("open")
            self.opens += 1

    def left(self, ticket: int) -> None:
        """The request ended without a verdict: refused, or abandoned by its client. Another trial may start."""
        if ticket == self.generation:
            self._trial = False

    def expire(self, now: float) -> None:
        """Count an overdue trial as failed."""
        if self._trial and now >= self._until:
            self.failed(self.generation, now)

    def healthy(self, now: float) -> None:
        """The backend answered a probe."""
        if self.state == "open" and now >= self._until:
            self._change("half-open")

    def reset(self) -> None:
        """Close it: the backend works, or another one has replaced it. Results from before count as late."""
        self.failures, self._pause = 0, 0.0
        self._change("closed")

    def retry_in(self, now: float) -> float:
        """Seconds until a good /health counts; 0 unless open."""
        return max(0.0, self._until - now) if self.state == "open" else 0.0

    def describe(self, now: float) -> dict[str, Any]:
        """The breaker's entry in /v1/stats."""
        retry = round(self.retry_in(now), 3)
        return {"state": self.state, "failures": self.failures, "opens": self.opens, "retry_in_s": retry}

    def _change(self, state: str) -> None:
        self.state, self._trial = state, False
        self.generation += 1
        self._changed = self.generation
