"""Who gets a place at which backend, and when: the Pi's only owner of places.

`decide` is the whole policy: one pure function. `Dispatcher` carries out what it decides, for
completions that clients await and for prompts that are read ahead.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cerebrum.fields import describe
from cerebrum.pi.backend import Backend
from cerebrum.pi.breaker import BREAKER_OPEN, NEVER_ASKED
from cerebrum.pi.completion import (
    PREEMPTED,
    SUPERSEDED,
    WITHOUT_MODEL,
    Attempt,
    Completion,
    CompletionRequest,
)
from cerebrum.pi.fleet import Fleet, Options
from cerebrum_common import HttpError, internal_error, log

# ----------------------------------------------------------------------------- policy: the decision

BUSY_SECONDS, MAX_BUSY_SECONDS = (
    0.1,
    1.0,
)  # pause before a dialect's request asks a busy backend again; it doubles
EDITOR_SECONDS = 60.0  # for this long after an infill, a place is kept for the next one
SHARE_SECONDS, SHARE_OF_SECONDS = (
    10.0,
    60.0,
)  # a guest's share of each minute, which other guests respect


@dataclass(slots=True)
class State:
    """All that `decide` reads. `Dispatcher` writes it, and `Fleet` its backends."""

    fleet: Fleet
    places: dict[Attempt, Backend] = field(
        default_factory=dict
    )  # maybe at a backend that has left models.toml
    line: dict[Completion, asyncio.Future[Attempt]] = field(
        default_factory=dict
    )  # in order of arrival
    editors: dict[str, float] = field(
        default_factory=dict
    )  # the time of each client's last infill, but for guests
    turns: dict[str, float] = field(default_factory=dict)  # when each client last got a place
    regular: float = -math.inf  # when a client that is no guest last got a place
    served: dict[str, Backend] = field(
        default_factory=dict
    )  # the last backend of each `CompletionRequest.file`
    visits: list[tuple[str, float, float]] = field(
        default_factory=list
    )  # a guest, and when it got and left a place

    def running(self, backends: Sequence[Backend]) -> list[Attempt]:
        """The attempts that take a place at these backends: not those that are being ended or that
        read ahead.
        """
        holders = (attempt for attempt, backend in self.places.items() if backend in backends)
        return [attempt for attempt in holders if not (attempt.makes_room or attempt.request.ahead)]

    def guest_seconds(self, client: str, now: float) -> float:
        """How long a guest has held places in the last minute; two places at a time count twice."""
        visits = [visit for visit in self.visits if visit[0] == client]
        holders = (
            one for one in self.places if one.completion.client == client and not one.request.ahead
        )
        visits += [(client, one.begun, now) for one in holders]
        return sum(max(0.0, left - max(begun, now - SHARE_OF_SECONDS)) for _, begun, left in visits)

    def load(self, backend: Backend) -> float:
        """How busy a backend is, as a share of its limit. Requests that are being ended still
        count.
        """
        holders = (attempt for attempt, place in self.places.items() if place is backend)
        return sum(not attempt.request.ahead for attempt in holders) / backend.limit


@dataclass(frozen=True, slots=True)
class Assign:
    """A place at this backend, for an answer by this model."""

    model: str
    backend: Backend


@dataclass(frozen=True, slots=True)
class Wait:
    """Ask again when a place becomes free, at the latest at this time (monotonic seconds)."""

    until: float


@dataclass(frozen=True, slots=True)
class Preempt:
    """End this completion of a guest, and decide again."""

    guest: Attempt


Decision = Assign | Preempt | Wait | HttpError  # an error ends the completion


def decide(state: State, completion: Completion, now: float) -> Decision:
    """What happens now to a completion that has no place."""
    request, deadline = completion.request, completion.deadline
    may_wait, resume = now < deadline, busy_until(completion)
    may_preempt = not (request.guest or request.ahead)
    until = resume if now < resume <= deadline else deadline
    # 1. Which models may answer, best first, and which backends have each of them?
    options = state.fleet.who_may(request.fields, any_language=bool(request.kind))
    # 2. What has failed this completion is not asked again.
    tried = functools.partial(is_tried, completion, is_pausing=now < resume)
    options = [
        (model, [one for one in having if not tried(one.id, model)]) for model, having in options
    ]
    able = [
        backend
        for backend in state.fleet.backends
        if any(backend in having for _, having in options)
    ]
    # 3. Reading ahead must cost nothing, and nobody may wait for a place meanwhile.
    if request.ahead:
        able = [backend for backend in able if backend.kind.reads_ahead]
        if not able or state.line:
            return Wait(math.inf) if able else nobody(state.fleet, options)
    # 4. May any of them be asked? Those in trouble only if there are no others. A trial's end is
    #    worth waiting for: somebody who types ends one trial after the other. A guest's trial makes
    #    room.
    usable = [backend for backend in able if backend.breaker.admits]
    usable = [backend for backend in usable if not backend.breaker.trouble] or usable
    if not usable:
        if may_preempt and (guest := who_tries(state, able)):
            return Preempt(guest)
        if may_wait and (until == resume or any(backend.breaker.trial for backend in able)):
            return Wait(until)
        return completion.failure or nobody(state.fleet, options)
    # 5. Is a place free, and may this client take it? It ends the older requests of its session.
    #    A prompt is read where its next request will go, once that backend has nothing else to do.
    chosen = place_for(state, completion, options, usable, now)
    if chosen and (not request.ahead or is_idle(state, chosen.backend)):
        return chosen
    # 6. Guests make room for everybody else.
    if may_preempt and (guest := who_makes_room(state, completion, options, usable, now)):
        return Preempt(guest)
    # 7. A dialect's request waits; one of our own API gets 429 at once, as docs/api.md promises.
    return Wait(until) if may_wait else completion.failure or all_taken(state, request.guest)


def place_for(
    state: State, completion: Completion, options: Options, usable: Sequence[Backend], now: float
) -> Assign | None:
    """A free place that this client may take. Reading ahead takes no place."""
    request = completion.request
    if request.ahead:
        return choose(state, request, options, usable)
    if not (is_fair(state, completion, usable, now) and is_left(state, completion, usable, now)):
        return None
    free = [one for one in usable if places_taken(state, one, request.session) < one.limit]
    return choose(state, request, options, free)


def who_makes_room(
    state: State, completion: Completion, options: Options, usable: Sequence[Backend], now: float
) -> Attempt | None:
    """The guest's attempt to end for this completion, None if it would get no place without guests
    either: one of the guest who has held places for longest in the last minute, rather no infill,
    and the newest, which loses least.
    """

    def finds_place_without(ended: Sequence[Attempt]) -> bool:
        places = {
            attempt: backend for attempt, backend in state.places.items() if attempt not in ended
        }
        return (
            place_for(replace(state, places=places), completion, options, usable, now) is not None
        )

    if not finds_place_without([one for one in state.places if one.request.guest]):
        return None
    guests = [one for one in state.running(usable) if one.request.guest and not one.last]
    enough = [one for one in guests if finds_place_without([one])]

    def order(one: Attempt) -> tuple[float, bool, float]:
        return (
            state.guest_seconds(one.completion.client, now),
            one.request.kind != "infill",
            one.begun,
        )

    return max(enough or guests, key=order, default=None)


def who_tries(state: State, able: Sequence[Backend]) -> Attempt | None:
    """A guest's attempt that is the trial of one of these backends."""
    trials = [backend.breaker.trial for backend in able]
    return next(
        (one for one in state.running(able) if one.request.guest and one.admission in trials), None
    )


def choose(
    state: State, request: CompletionRequest, options: Options, free: Sequence[Backend]
) -> Assign | None:
    """The best model that one of these backends has, at the one that probably has the beginning of
    the prompt in its cache, or else at the least busy one.
    """
    last = state.served.get(request.file)
    for model, having in options:
        if best := [backend for backend in free if backend in having]:
            return Assign(model, last if last in best else min(best, key=state.load))
    return None


def is_idle(state: State, backend: Backend) -> bool:
    return backend.breaker.state == "closed" and backend not in state.places.values()


def busy_until(completion: Completion) -> float:
    """When to ask the backends again that answered 429 to a dialect's request; infinity if none
    did. Our own API passes a 429 on.
    """
    refused = [
        one.left for one in completion.attempts if one.error and one.error.code == "RATE_LIMIT"
    ]
    if not refused or not completion.request.kind:
        return math.inf
    return refused[-1] + min(BUSY_SECONDS * 2.0 ** (len(refused) - 1), MAX_BUSY_SECONDS)


def is_tried(completion: Completion, backend: str, model: str, is_pausing: bool) -> bool:
    """Whether another attempt with this model at this backend would be in vain: the backend has
    failed this completion, could not load this model, or was busy a moment ago.
    """
    for attempt in completion.attempts:
        if attempt.backend == backend and attempt.error:
            code = attempt.error.code
            if (
                attempt.model == model
                if code in WITHOUT_MODEL
                else is_pausing or code != "RATE_LIMIT"
            ):
                return True
    return False


def places_taken(state: State, backend: Backend, session: str) -> int:
    """The places of a backend that a request of this session does not get."""
    return sum(not session or one.request.session != session for one in state.running([backend]))


def is_fair(state: State, completion: Completion, usable: Sequence[Backend], now: float) -> bool:
    """Whether a completion leaves a place for editors. After a recent infill, chats and plain
    completions leave one for infills, and one client's infills leave one for another client's.
    Requests of our own API take any place.
    """
    kind, client = completion.request.kind, completion.client
    editors = {one for one, seen in state.editors.items() if now - seen < EDITOR_SECONDS}
    if not kind or not editors - ({client} if kind == "infill" else set()):
        return True
    running = [attempt.completion for attempt in state.running(usable)]
    if kind == "infill":
        alike = [one for one in running if one.request.kind == "infill" and one.client == client]
    else:
        alike = [one for one in running if one.request.kind in ("chat", "completion")]
    return len(alike) < max(1, sum(backend.limit for backend in usable) - 1)


def is_left(state: State, completion: Completion, usable: Sequence[Backend], now: float) -> bool:
    """Whether the others leave a place to a guest: nobody else waits, and after a recent completion
    of somebody else, guests together leave one place. A guest has no more than its own number of
    places.
    """
    request = completion.request
    if not request.guest:
        return True
    guests = [one for one in state.running(state.fleet.backends) if one.request.guest]
    guests = [
        one for one in guests if not request.session or one.request.session != request.session
    ]
    own = sum(one.completion.client == completion.client for one in guests)
    spared = now - state.regular < EDITOR_SECONDS
    most = max(1, sum(backend.limit for backend in usable) - spared)
    return (
        own < request.guest
        and len(guests) < most
        and all(other.request.guest for other in state.line)
    )


def whose_turn(
    state: State, running: Mapping[str, int], completion: Completion
) -> tuple[bool, int, float, bool]:
    """The lower, the sooner a completion that waits gets a place: guests come last; then people
    take turns, those with the fewest places first, then those who have had no turn or whose last
    one is the longest ago; of one person's, infills come first.
    """
    request, client = completion.request, completion.client
    return (
        request.guest > 0,
        running[client],
        state.turns.get(client, 0.0),
        request.kind != "infill",
    )


def all_taken(state: State, guest: int) -> HttpError:
    if guest:
        return HttpError(
            "RATE_LIMIT",
            f"expected at most {guest} completions at a time, and a place that others leave",
        )
    there = [
        backend for backend in state.fleet.backends if backend.available
    ] or state.fleet.backends
    limit = sum(backend.limit for backend in there)
    kept = "" if len(state.running(there)) >= limit else ", one of them for an editor"
    return HttpError(
        "RATE_LIMIT", f"expected at most {limit} completions at a time{kept}; try again later"
    )


def nobody(fleet: Fleet, options: Options) -> HttpError:
    """Why no backend may be asked."""
    if any(having for _, having in options):
        return HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
    if unknown := [backend.breaker.message for backend in fleet.backends if backend.models is None]:
        return HttpError("VPS_UNAVAILABLE", next(filter(None, unknown), NEVER_ASKED))
    expected, got = ", ".join(fleet.models or ()), describe(options[0][0])
    return HttpError(
        "MODEL_NOT_FOUND", f"expected a model that a backend has ({expected or 'none'}), got {got}"
    )


# ----------------------------------------------------------------------------------- the dispatcher

ENDING_SECONDS = 1.0  # for a completion that makes room to leave its place
# sessions and files with the backend that served them last, and clients with their last turn
MAX_SERVED = 512
MAX_AHEAD = 4  # prompts to be read ahead, one of each client


def remember(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the newest of at most MAX_SERVED entries."""
    table.pop(key, None)
    table[key] = value
    if len(table) > MAX_SERVED:
        del table[next(iter(table))]


class Dispatcher:
    """Sole owner of the line, of the places, and of the prompts to be read ahead."""

    def __init__(self, fleet: Fleet, count_work: Callable[[str, Mapping[str, Any]], None]) -> None:
        self.state = State(fleet)
        self._count_work = (
            count_work  # called with the model and the result of a prompt that was read ahead
        )
        self.ahead: dict[str, Completion] = {}  # prompts to be read ahead, by client

    @property
    def active(self) -> int:
        """Completions that hold a place."""
        return sum(not attempt.request.ahead for attempt in self.state.places)

    def saw_editor(self, client: str) -> None:
        """A client asks for infills, so a place is kept for its next one."""
        now, editors = time.monotonic(), self.state.editors
        self.state.editors = {
            one: seen for one, seen in editors.items() if now - seen < EDITOR_SECONDS
        } | {client: now}

    def hand_over(self, completion: Completion, client: str) -> None:
        """The client of this completion has left, but another one still reads it."""
        completion.client = client
        self.advance()

    def reconfigured(self) -> None:
        """The list of backends has changed."""
        state, backends = self.state, self.state.fleet.backends
        state.served = {
            file: backend for file, backend in state.served.items() if backend in backends
        }
        for attempt, backend in [*state.places.items()]:
            if attempt.request.ahead and backend not in backends:
                self._supersede(attempt)
        self.advance()

    # Places.

    async def enter(self, completion: Completion) -> Attempt:
        """Give a completion a place; it must `hold` the place at once. HttpError if there is none
        for it.
        """
        await self.state.fleet.know()
        while True:
            match decide(self.state, completion, time.monotonic()):
                case Assign(model, backend):
                    return self._assign(completion, model, backend)
                case HttpError() as error:
                    raise error
                case Preempt(guest):
                    self._preempt(guest)
                case Wait(until):
                    if attempt := await self._wait_in_line(completion, until):
                        return attempt

    @contextlib.asynccontextmanager
    async def hold(self, attempt: Attempt) -> AsyncIterator[Backend]:
        """Hold a place for as long as the context lasts. A backend never works on more requests
        than its limit: an older request, which this one replaces, leaves first.
        """
        places, backend = self.state.places, self.state.places[attempt]
        try:
            with contextlib.suppress(
                TimeoutError
            ):  # they are cut, but a client may be slow to take its last text
                async with asyncio.timeout(ENDING_SECONDS):
                    for other in [
                        one for one, where in places.items() if where is backend and one.makes_room
                    ]:
                        if other is not attempt:
                            await other.ended.wait()
            if attempt.makes_room:
                raise HttpError("RATE_LIMIT", "somebody else needs the place")
            yield backend
        except HttpError as error:
            attempt.error = None if attempt.makes_room else error
            raise
        finally:
            self._leave(attempt)

    async def _wait_in_line(self, completion: Completion, until: float) -> Attempt | None:
        """The attempt that `advance` has begun for this completion, or None after a while.
        HttpError if it found that no backend may be asked any more.
        """
        called = self.state.line[completion] = asyncio.get_running_loop().create_future()
        try:
            await asyncio.wait([called], timeout=until - time.monotonic())
            return called.result() if called.done() else None
        except asyncio.CancelledError:
            if called.done() and not called.exception():
                self._leave(called.result())
            raise
        finally:
            self.state.line.pop(completion, None)

    def advance(self) -> None:
        """Give free places to those that wait, in turns. If nobody waits, idle backends read
        ahead.
        """
        state, waiting = self.state, [*self.state.line]
        running = Counter(
            attempt.completion.client for attempt in state.running([*state.places.values()])
        )
        while waiting:
            completion = min(waiting, key=functools.partial(whose_turn, state, running))
            waiting.remove(completion)
            match decide(state, completion, time.monotonic()):
                case Assign(model, backend):
                    running[completion.client] += 1
                    state.line.pop(completion).set_result(self._assign(completion, model, backend))
                case Preempt(guest):
                    self._preempt(guest)
                    waiting.append(completion)
                case HttpError() as error:
                    state.line.pop(completion).set_exception(error)
        for completion in [*self.ahead.values()]:
            decision = decide(state, completion, time.monotonic())
            if not isinstance(decision, Wait):
                del self.ahead[completion.client]
            if isinstance(decision, Assign):
                self._begin_reading(completion, decision)

    def _assign(self, completion: Completion, model: str, backend: Backend) -> Attempt:
        """Begin an attempt: take the place, and end the requests that it replaces, those of its
        session and the one that reads ahead there.
        """
        state, session, file = self.state, completion.request.session, completion.request.file
        for other, where in [*state.places.items()]:
            if other.request.session == session != "" or (other.request.ahead and where is backend):
                self._supersede(other)
        for older in completion.attempts:
            if older.backend == backend.id and older.error and older.error.code in WITHOUT_MODEL:
                backend.forget(older.model)
        now = time.monotonic()
        attempt = Attempt(completion, backend.id, model, backend.breaker.admit(now))
        completion.attempts.append(attempt)
        state.places[attempt] = backend
        if not completion.request.ahead:
            remember(state.turns, completion.client, now)
            state.regular = state.regular if completion.request.guest else now
        if file:
            remember(state.served, file, backend)
        return attempt

    def _supersede(self, attempt: Attempt) -> None:
        if not attempt.makes_room:
            attempt.reason = SUPERSEDED
            attempt.completion.end(
                HttpError(SUPERSEDED, "a newer request of this session took its place")
            )

    def _preempt(self, attempt: Attempt) -> None:
        """End a guest's attempt. One that ends within its guest's share of the minute comes first
        among guests.
        """
        state, completion, now = self.state, attempt.completion, time.monotonic()
        if state.guest_seconds(completion.client, now) < SHARE_SECONDS:
            state.turns[completion.client] = -math.inf  # before guests who have had no turn
            attempt.again = bool(attempt.request.kind)  # our own API never waits
            completion.requested = now
        attempt.reason = PREEMPTED
        attempt.admission.left()
        attempt.cut()

    def _leave(self, attempt: Attempt) -> None:
        """Give the place of an attempt back."""
        state = self.state
        del state.places[attempt]
        attempt.admission.left()
        attempt.left = now = time.monotonic()
        if attempt.request.guest and not attempt.request.ahead:
            state.visits = [visit for visit in state.visits if now - visit[2] < SHARE_OF_SECONDS]
            state.visits.append((attempt.completion.client, attempt.begun, now))
        attempt.ended.set()
        self.advance()

    # Reading ahead.

    def read_ahead(self, request: CompletionRequest) -> None:
        """Queue a prompt to be read into a backend's cache. Only the newest of each client is kept.
        Reading stops when the backend gets a request, and the prompt is queued again: the backend
        keeps the part that it has read.
        """
        self._queue(Completion(replace(request, session="", ahead=True)))
        self.advance()

    def end_reading(self) -> None:
        """Read nothing ahead any more of what was asked for until now."""
        self.ahead.clear()
        for attempt in self.state.places:
            if attempt.request.ahead:
                attempt.reason = ""  # it makes no room any more, so it is not queued again
                attempt.completion.end(HttpError("UNAUTHORIZED", "the keys have changed"))

    def _queue(self, completion: Completion) -> None:
        self.ahead.pop(completion.client, None)
        self.ahead[completion.client] = completion
        if len(self.ahead) > MAX_AHEAD:
            del self.ahead[next(iter(self.ahead))]

    def _begin_reading(self, completion: Completion, place: Assign) -> None:
        attempt = self._assign(completion, place.model, place.backend)
        task = asyncio.create_task(self._read(place.backend, attempt))
        completion.end = lambda _: task.cancel()
        task.add_done_callback(
            functools.partial(self._has_read, attempt)
        )  # even if it never begins

    async def _read(self, backend: Backend, attempt: Attempt) -> None:
        try:
            async with contextlib.aclosing(backend.answer(attempt)) as pairs:
                async for kind, value in pairs:
                    if kind == "done":
                        self._count_work(attempt.model, value)
        except HttpError as error:
            log.info("%s: no prompt was read ahead: %s", backend.id, error.message)
        except Exception as exception:
            internal_error(exception)

    def _has_read(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        if task.cancelled() and not attempt.makes_room:
            self.ahead.clear()  # the daemon stops, or the keys have changed
        if attempt.makes_room and attempt.completion.client not in self.ahead:
            self._queue(Completion(attempt.request))
        self._leave(attempt)
