"""What a client asks for, the completion on its way, and the attempts to answer it. Plain data;
each class says who writes it. A completion's text travels as pairs, the last of them its result.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cerebrum.fields import JsonObject, Members
from cerebrum.pi.breaker import Admission
from cerebrum.pi.upstream import BackendFailure, TooLong
from cerebrum.request import MAX_TOKENS, GenerationRequest
from cerebrum_common import HttpError, sse_event

SAMPLED_BY = ("max_tokens", "temperature", "top_p", "seed", "stop")
# How long a dialect's request waits for a place, in seconds: minuet gives up after 3.
WAIT_SECONDS = {"infill": 3.0, "completion": 30.0, "chat": 30.0}
WITHOUT_MODEL = ("MODEL_NOT_FOUND", "MODEL_LOAD_FAILED")  # another model may do better
# Another backend may do better; every other error is about the request.
RETRIED = (404, 429, 500, 503)
# Reasons of a completion that ends by itself.
FINISHED = ("stop", "length", "block", "repeat", "unsure")
# How sure the model is of the text, in a result.
SURENESS = ("confidence", "text_confidence", "chance")
# Of the text before a cursor. Two cursors with an equal end of this length are the same one.
CURSOR_CHARS = 1024
MAX_TYPED_CHARS = 1024  # typed while a completion is computed, accepted suggestions included
MAX_OPENING = 200  # characters of a chat that tell it from others
NEVER = 1.0  # a `min_confidence` with which an editor is shown nothing, and no model is asked
SUPERSEDED = "SUPERSEDED"
PREEMPTED = "preempted"  # a guest's completion makes room for somebody else's
CUT = (PREEMPTED, "replaced")  # finish reasons of a text that ends wherever it was


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """What a client asks for, in a dialect or by our own API, and who asks. Nobody changes it."""

    kind: str  # "infill", "completion" or "chat"; "" for our own API
    fields: GenerationRequest
    stream: bool = False
    usage: bool = False  # the stream ends with token counts
    caching: bool = False  # the client accepts the text of an earlier completion
    # The members of the answer that the client wants; None: all.
    only: tuple[str, ...] | None = None
    client: str = ""  # the name of the client's key, or else its address
    guest: int = 0  # the most places of a client that gets only what the others leave; 0: no guest
    session: str = ""  # of our own API, unique across clients; "" without one
    # Nobody waits: a backend reads the prompt into its cache when it has nothing else to do.
    ahead: bool = False
    # Nobody waits yet: it is for the text behind one that the client shows, and may be accepted.
    speculative: bool = False

    @property
    def is_spare(self) -> bool:
        """Whether it takes no place, and ends for any request that somebody waits for."""
        return self.ahead or self.speculative

    @property
    def in_dialect(self) -> bool:
        return self.kind != ""

    @property
    def file(self) -> str:
        """A name for the session, or else for the client's file or chat; "" if our own API names
        none. The backend that last served it probably has the beginning of the prompt in its cache.
        """
        first, *_ = self.fields.messages or ({"content": ""},)
        name = self.fields.filename or first["content"][:MAX_OPENING]
        if self.session:
            return self.session
        return f"{self.client} {name}" if self.in_dialect or name else ""


def set_newest(table: dict[Any, Any], key: object, value: object, limit: int) -> None:
    """Set the newest of at most `limit` entries.

    >>> table = {"a": 1, "b": 2}
    >>> set_newest(table, "a", 3, limit=2)
    >>> set_newest(table, "c", 4, limit=2)
    >>> table
    {'a': 3, 'c': 4}
    """
    table.pop(key, None)
    table[key] = value
    if len(table) > limit:
        del table[next(iter(table))]


def digest_of(fields: GenerationRequest, names: Iterable[str]) -> bytes:
    """A digest of these fields of a request."""
    values = repr([getattr(fields, name) for name in names])
    return hashlib.sha256(values.encode("utf-8", "replace")).digest()


# -------------------------------------------------------------------------------------------- pairs

# What becomes of a completion, as pairs of an event's name and its value. The names depend neither
# on the client's API nor on the backend's.
#
#     ("waiting", int)    the place in the line; from then on an error is no HTTP status
#     ("begun", id)       a backend responds: None, or the model that answers instead of the one
#                         that was asked for. `Runner` replaces it by "started"
#     ("started", dict)   {"model", "n_ctx", "kept"}. An error before the first pair can still be an
#                         HTTP status. This one comes again if another backend or model takes over
#     ("idle", None)      nothing new, but the backend is alive
#     ("progress", dict)  {"stage": str, "done": int, "total": int}, if the request asks for it
#     ("text", bytes)     whole native token events, relayed without being parsed; `read_text`
#                         decodes them
#     ("done", dict)      last: the result, a native done event without its member `done`
#
# A completion that fails raises HttpError instead of "done".
Event = Literal["begun", "started", "waiting", "idle", "progress", "text", "done"]
Pair = tuple[Event, Any]
Pairs = AsyncGenerator[Pair, None]


def text_event(text: str, number: int = 1) -> bytes:
    """The value of a pair "text": a native token event, with `number` as its `total_tokens`."""
    return sse_event({"token": text, "total_tokens": number})


def read_text(events: bytes) -> str:
    """The text in a block of whole native token events."""
    return "".join(json.loads(event[6:])["token"] for event in events.split(b"\n\n")[:-1])


# ----------------------------------------------------------------------------------------- attempts


class Fitted(NamedTuple):
    """A request as a backend gets it."""

    fields: Members  # of vpsd's POST /v1/inference/stream
    model: str  # our id
    name: str  # the backend's name for it
    answer_tokens: int = MAX_TOKENS  # that the context leaves for the answer
    n_ctx: int = 0  # the context in tokens that the text was fitted to
    kept: Members = JsonObject()  # what was kept of the text, and its weight, as in `Prepared`
    weight: float = 0
    file: str = ""  # as `CompletionRequest.file`


NOTHING_SENT = Fitted({}, "", "")


class Answered(NamedTuple):
    """A whole answer has come."""

    reason: str  # one of FINISHED, or "other"


class Evicted(NamedTuple):
    """The attempt is being ended for another request, which gets its place."""

    reason: str  # SUPERSEDED or PREEMPTED
    again: bool = False  # its client still waits: unless it has text, the completion starts again


@dataclass(slots=True, eq=False)
class Attempt:
    """One try at one backend, which holds a place there. Its `Backend` writes what was sent, what
    came, that it was answered, and how to `cut` it; `Dispatcher` that it was evicted, and when it
    released its place; `Runner` its failure, after which it drops the prompt that was sent. The
    failure of reading ahead is only logged.
    """

    completion: Completion
    backend: str  # its id
    model: str  # that answers
    admission: Admission
    sent: Fitted = NOTHING_SENT
    tokens: int = 0
    size: int = 0  # bytes of the events with text
    first_heard: float = 0.0  # when the first token came
    last_heard: float = 0.0  # when the last token came, or the end of a whole answer
    prompt_cut: bool = False  # the model that was asked for has not read all of the prompt
    # What became of it, see `settle`. HttpError: it failed; None: it is on its way, its client has
    # left, or it has read ahead in vain.
    outcome: Answered | Evicted | HttpError | None = None
    begun: float = field(default_factory=time.monotonic)  # when it got its place
    released: float = 0.0  # when it gave its place back
    ended: asyncio.Event = field(default_factory=asyncio.Event)  # set when it is released
    # Closes its connection to the backend, once there is one.
    cut: Callable[[], object] = lambda: None

    @property
    def request(self) -> CompletionRequest:
        return self.completion.request

    def settle(self, outcome: Answered | Evicted | HttpError) -> None:
        """Write what became of it. An eviction stays, whatever still comes."""
        if not self.evicted:
            self.outcome = outcome

    @property
    def evicted(self) -> str:
        """Why it is being ended for another request; "" if it is not."""
        return self.outcome.reason if isinstance(self.outcome, Evicted) else ""

    @property
    def may_be_repeated(self) -> bool:
        """Whether another attempt may follow it. After the first token nothing is sent again, nor
        is a request for which nobody waits; a prompt that is too long may fit into another
        backend's context.
        """
        if self.tokens or self.request.is_spare:
            return False
        match self.outcome:
            case Evicted(again=again):
                return again
            case HttpError() as error:
                return isinstance(error, TooLong) or error.status in RETRIED
        return False


@dataclass(eq=False)
class Completion:
    """A request on its way, through one attempt or several. Times are monotonic seconds.

    `Dispatcher` adds the attempts. `Broadcasts` writes which clients share it, when the last of
    them asked, and whose it is then; so does `Dispatcher.promote`. `Counting` adds notes.
    """

    # As soon as somebody waits for a speculative one, `Dispatcher.promote` replaces it by the same
    # request that is not speculative.
    request: CompletionRequest
    # The dispatcher calls it with an error when another request takes its place. Whoever runs the
    # completion sets what that does:
    # - our own API: ends the handler, and the client gets the error;
    # - a dialect (`Broadcast.end`): ends the broadcast, and all who read it get the error;
    # - what the dispatcher reads ahead: ends the reading, and nobody gets the error.
    end: Callable[[HttpError], object] = lambda _: None
    notes: JsonObject = field(default_factory=dict)  # for the request's line in the log
    # Whose share of the places it takes: the first who waited for it, or else one who still does.
    client: str = ""
    # Of all requests that have waited for it; empty while it is speculative.
    clients: list[str] = field(default_factory=list)
    attempts: list[Attempt] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    # When the last client that shares it asked.
    requested: float = 0.0

    def __post_init__(self) -> None:
        self.client = self.request.client
        self.requested = self.started
        if not self.request.speculative:
            self.clients.append(self.client)

    @property
    def deadline(self) -> float:
        """Until when a dialect's request waits for a place. A request of our own API never
        waits.
        """
        return self.requested + WAIT_SECONDS.get(self.request.kind, -math.inf)

    @property
    def attempt(self) -> Attempt | None:
        """The last one."""
        return self.attempts[-1] if self.attempts else None

    @property
    def failure(self) -> HttpError | None:
        """The most informative error so far. One that a backend reports outweighs another backend's
        failure.
        """
        errors = [one.outcome for one in self.attempts if isinstance(one.outcome, HttpError)]
        reported = [error for error in errors if not isinstance(error, BackendFailure)]
        return next(reversed(reported or errors), None)

    def figures(self) -> JsonObject:
        """Its model, its tokens, and the seconds to the first token, for the log."""
        last = self.attempt
        if not last:
            return {}
        figures: JsonObject = {"model": last.model}
        if last.first_heard:
            figures |= {"tokens": last.tokens, "ttft": f"{last.first_heard - self.started:.2f}s"}
        return figures
