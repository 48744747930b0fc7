"""A backend's circuit breaker: whether the backend works, and whether requests may be sent to it.

    >>> breaker = Breaker()
    >>> for now in (0.0, 1.0, 2.0): breaker.admit(now).failed(now, "VPS backend is unavailable")
    >>> breaker.state, breaker.admits
    ('open', False)

Pure: the caller passes in the time, in monotonic seconds. Standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cerebrum.fields import JsonObject

FAILURES_TO_OPEN = 3  # consecutive
# The first pause and the longest; each failed trial doubles the pause.
OPEN_SECONDS = 5.0
MAX_OPEN_SECONDS = 60.0
# Until a trial's first token: a 7B model loads in 30 s and reads 4,000 tokens in 100 s.
TRIAL_SECONDS = 180.0
BREAKER_STATES = ("closed", "open", "half-open")
NEVER_ASKED = "VPS backend has not been asked yet"
BREAKER_OPEN = "VPS backend is unavailable (circuit breaker open)"


class Breaker:
    """closed --3 failures in a row--> open --pause over, then a good /health--> half-open --a
    token--> closed.

    From half-open, a failed or overdue trial opens the breaker again for twice as long. Only
    results change the state: a request reports its own through its `Admission`, a probe through
    `healthy` and `expire`. Both may find `trouble`.
    """

    def __init__(self) -> None:
        self.state = "closed"
        self.trouble = NEVER_ASKED  # the reason to ask another backend first; "" if there is none
        self.failures = 0  # consecutive
        self.opens = 0  # in total
        self.changed = -math.inf  # when the state changed
        # When the last failure came that may have been the cause of others.
        self.last_failure = -math.inf
        self.trial: Admission | None = None  # half-open: the only request that was admitted
        self._pause = 0.0  # seconds; 0 while closed
        self._until = 0.0  # open: the pause's end; half-open: the trial's deadline

    @property
    def admits(self) -> bool:
        """Whether a request may be sent: any while closed, one as a trial while half-open."""
        return self.state != "open" and not self.trial

    @property
    def message(self) -> str:
        """Why the backend is not available; "" if it is."""
        return self.trouble or (BREAKER_OPEN if self.state == "open" else "")

    def admit(self, now: float) -> Admission:
        """Send one request; the breaker must admit it."""
        admission = Admission(self, now)
        if self.state == "half-open":
            self.trial = admission
            self._until = now + TRIAL_SECONDS
        return admission

    def expire(self, now: float) -> None:
        """Count an overdue trial as failed."""
        if self.trial and now >= self._until:
            self.trial.failed(now, BREAKER_OPEN)

    def healthy(self, now: float) -> None:
        """The backend answered a probe."""
        if self.state == "open" and now >= self._until:
            self.change("half-open", now)

    def open(self, now: float) -> None:
        """Stop sending requests, after a failed trial for twice as long as before."""
        self._pause = min(self._pause * 2 or OPEN_SECONDS, MAX_OPEN_SECONDS)
        self._until = now + self._pause
        self.opens += 1
        self.change("open", now)

    def change(self, state: str, now: float) -> None:
        self.state = state
        self.changed = now
        self.trial = None
        if state == "closed":
            self._pause = 0.0

    def retry_in(self, now: float) -> float:
        """Seconds until a good /health counts; 0 unless open."""
        return max(0.0, self._until - now) if self.state == "open" else 0.0

    def describe(self, now: float) -> JsonObject:
        """The breaker's entry in /v1/stats."""
        return {
            "state": self.state,
            "failures": self.failures,
            "opens": self.opens,
            "retry_in_s": round(self.retry_in(now), 3),
        }


@dataclass(eq=False)
class Admission:
    """One request that a breaker has admitted, and its results. `heard` is the time when the
    request was sent, later the time of its last token: a result that is older than a change of
    state does not count.
    """

    breaker: Breaker
    heard: float

    def succeeded(self, now: float) -> None:
        """A valid token arrived, or a whole answer without any."""
        breaker = self.breaker
        if self.heard >= breaker.changed:
            self.heard = now
            breaker.failures = 0
            breaker.trouble = ""
            if breaker.state == "half-open":
                breaker.change("closed", now)

    def failed(self, now: float, trouble: str, late: bool = False) -> None:
        """The backend, or the network to it, failed this request. A request that was sent before
        the last failure has the same cause, such as the death of one replica with many streams.
        `late`: by a timeout; each of these counts.
        """
        breaker = self.breaker
        if self.heard < max(breaker.changed, breaker.last_failure):
            return
        breaker.failures += 1
        breaker.trouble = trouble
        if not late:
            breaker.last_failure = now
        if breaker.state == "half-open" or breaker.failures >= FAILURES_TO_OPEN:
            breaker.open(now)

    def left(self) -> None:
        """The request ended, maybe without a verdict: refused, or abandoned by its client. Another
        trial may start.
        """
        if self.breaker.trial is self:
            self.breaker.trial = None
