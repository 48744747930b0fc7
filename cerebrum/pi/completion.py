"""A completion on its way: a request, and the attempts to answer it. Plain data; each class says
who writes it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cerebrum.pi.breaker import Admission
from cerebrum.pi.dialects import PREEMPTED, CompletionRequest
from cerebrum.pi.upstream import BackendFailure, TooLong
from cerebrum.text.prompt import Prepared
from cerebrum_common import HttpError

WAIT_SECONDS = {
    "infill": 3.0,
    "completion": 30.0,
    "chat": 30.0,
}  # for a place; minuet gives up after 3 s
WITHOUT_MODEL = frozenset({"MODEL_NOT_FOUND", "MODEL_LOAD_FAILED"})  # another model may do better
RETRIED = frozenset(
    {404, 429, 500, 503}
)  # another backend may do better; every other error is about the request
FINISHED = frozenset(
    {"stop", "length", "block", "repeat", "unsure"}
)  # reasons of a completion that ends by itself
SUPERSEDED = "SUPERSEDED"


@dataclass(frozen=True, slots=True)
class Fitted:
    """A request's text as a backend gets it."""

    fields: Mapping[str, Any]  # of vpsd's POST /v1/inference/stream
    text: Prepared
    n_ctx: int  # the context in tokens that it was fitted to
    room: int  # tokens left there for the answer


NOTHING_SENT = Fitted({}, Prepared({}, {}, 0), 0, 0)


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at one backend. Its `Backend` writes what was sent, what came and how to `cut` it,
    `Dispatcher` how its place ended. `Gateway.complete` drops what was sent once it has failed.
    """

    completion: Completion
    backend: str  # its id
    model: str
    admission: Admission
    sent: Fitted = NOTHING_SENT
    threshold: float | None = None  # lines of which the model is less sure are not shown
    tokens: int = 0
    size: int = 0  # bytes of the events with text, and of those that judge it
    first: float = 0.0  # when the first token came
    last: float = 0.0  # when the backend reported the answer as complete
    reason: str = ""  # one of FINISHED or "other" for a whole answer; SUPERSEDED; PREEMPTED
    error: HttpError | None = None
    begun: float = field(default_factory=time.monotonic)
    left: float = 0.0  # when it gave its place back
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # set at that time
    cut: Callable[[], object] = lambda: (
        None
    )  # closes its connection to the backend, once there is one
    again: bool = False  # preempted too early: unless it has text, the completion starts again

    @property
    def request(self) -> CompletionRequest:
        return self.completion.request

    @property
    def code(self) -> str:
        """The code of its error; "" without one."""
        return self.error.code if self.error else ""

    @property
    def makes_room(self) -> bool:
        """Whether it is being ended for another request, which gets its place."""
        return self.reason in (SUPERSEDED, PREEMPTED)

    def may_be_repeated(self, error: HttpError) -> bool:
        """Whether another attempt may follow this error. After the first token nothing is sent
        again; a prompt that is too long may fit into another backend's context.
        """
        if self.tokens:
            return False
        if self.makes_room:
            return self.again
        return isinstance(error, TooLong) or error.status in RETRIED


@dataclass(slots=True, eq=False)
class Completion:
    """A request on its way. `Dispatcher` writes the client and the attempts, `Broadcasts` who else
    asks for it; both write when it was last requested. `Counting` and `Broadcasts` add notes. Times
    are monotonic seconds.
    """

    request: CompletionRequest
    end: Callable[[HttpError], object] = lambda _: (
        None
    )  # ends the client's request with this error, whatever it awaits
    notes: dict[str, Any] = field(default_factory=dict)  # for the request's line in the log
    client: str = ""  # whose share of the places it takes: one who still reads it
    clients: list[str] = field(default_factory=list)  # of all requests that it answers
    attempts: list[Attempt] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    requested: float = (
        0.0  # when the last client that shares it asked, or when it had to start again
    )

    def __post_init__(self) -> None:
        self.client, self.requested = self.request.client, self.started
        self.clients.append(self.client)

    @property
    def deadline(self) -> float:
        """Until when a dialect's request waits for a place. A request of our own API never
        waits.
        """
        return self.requested + WAIT_SECONDS[self.request.kind] if self.request.kind else -math.inf

    @property
    def attempt(self) -> Attempt | None:
        """The last one."""
        return self.attempts[-1] if self.attempts else None

    @property
    def tokens(self) -> int:
        """Of its last attempt."""
        return self.attempts[-1].tokens if self.attempts else 0

    @property
    def model(self) -> str:
        return self.attempts[-1].model if self.attempts else ""

    @property
    def failure(self) -> HttpError | None:
        """The most informative error so far. One that a backend reports outweighs another backend's
        failure.
        """
        errors = [attempt.error for attempt in self.attempts if attempt.error]
        errors = [error for error in errors if not isinstance(error, BackendFailure)] or errors
        return errors[-1] if errors else None

    def figures(self) -> dict[str, Any]:
        """Its model, its tokens, and the seconds to the first token, for the log."""
        last = self.attempt
        if not last:
            return {}
        spoke = (
            {"tokens": last.tokens, "ttft": f"{last.first - self.started:.2f}s"}
            if last.first
            else {}
        )
        return {"model": last.model, **spoke}
