"""Who gets a place at which backend, and when: the Pi's only owner of places.

The policy is two pure functions: `decide` for completions that clients await, `decide_spare` for
prompts that are read ahead and for speculative requests. `Dispatcher` carries out what they decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cerebrum.fields import describe
from cerebrum.pi.backend import Backend
from cerebrum.pi.breaker import BREAKER_OPEN, NEVER_ASKED
from cerebrum.pi.completion import (
    NOTHING_SENT,
    PREEMPTED,
    SUPERSEDED,
    WITHOUT_MODEL,
    Attempt,
    Completion,
    CompletionRequest,
    Evicted,
    set_newest,
)
from cerebrum.pi.counting import Counting
from cerebrum.pi.fleet import Fleet, Option
from cerebrum.pi.kind import TOO_MANY
from cerebrum.pi.upstream import BackendFailure
from cerebrum_common import HttpError, internal_error, log

# ----------------------------------------------------------------------------- policy: the decision

# For this long after an infill, a place is kept for the next one; and after a regular client
# has got a place, guests leave one free.
EDITOR_SECONDS = 60.0
REPLICAS = 2  # behind a balancer, that may fail a completion


@dataclass(slots=True)
class State:
    """All that the decisions read. `Dispatcher` writes it, and `Fleet` its backends. Times are
    monotonic seconds.
    """

    fleet: Fleet
    # All attempts until they leave, maybe at a backend that has left models.toml. Spare ones are
    # here, too, but take no place from anybody.
    places: dict[Attempt, Backend] = field(default_factory=dict)
    # The completions that wait for a place, in order of arrival.
    line: dict[Completion, asyncio.Future[Attempt]] = field(default_factory=dict)
    # When each client, but for guests, last asked for an infill.
    editors: dict[str, float] = field(default_factory=dict)
    turns: dict[str, float] = field(default_factory=dict)  # when each client last got a place
    regular_turn: float = -math.inf  # when a client that is no guest last got a place
    # The id of the last backend of each `CompletionRequest.file`.
    served: dict[str, str] = field(default_factory=dict)

    @property
    def answering(self) -> dict[Attempt, Backend]:
        """The attempts that take a place: not the spare ones, for which nobody waits."""
        return {
            attempt: backend
            for attempt, backend in self.places.items()
            if not attempt.request.is_spare
        }

    def running(self, backends: Sequence[Backend], session: str = "") -> list[Attempt]:
        """Those at these backends, but for the ones that are being ended, or that a new request of
        this session ends.
        """
        here = [attempt for attempt, where in self.answering.items() if where in backends]
        return [
            other
            for other in here
            if not other.evicted and (session == "" or other.request.session != session)
        ]

    def in_turn(self) -> list[Completion]:
        """The completions that wait for a place, the next one first. Guests come last; then people
        take turns, those with the fewest places first, then those who have had no turn or whose
        last one is the longest ago; of one person's, infills come first.
        """
        clients = [attempt.completion.client for attempt in self.answering if not attempt.evicted]

        def order(completion: Completion) -> tuple[float, ...]:
            request = completion.request
            client = completion.client
            last_turn = self.turns.get(client, 0.0)
            return request.guest > 0, clients.count(client), last_turn, request.kind != "infill"

        return sorted(self.line, key=order)


class Wait(NamedTuple):
    """Ask again when a place becomes free, at the latest at this time (monotonic seconds)."""

    until: float


class Preempt(NamedTuple):
    """End this attempt of a guest, and decide again."""

    guest: Attempt


class Claim(NamedTuple):
    """A completion that has no place, and the backends that may be asked for one."""

    state: State
    completion: Completion
    options: Sequence[Option]
    usable: Sequence[Backend]
    now: float


def decide(state: State, completion: Completion, now: float) -> Option | Preempt | Wait | HttpError:
    """What happens now to a completion that has no place: an option gives it one, an error ends
    it.
    """
    request = completion.request
    deadline = completion.deadline
    may_wait = now < deadline
    # 1. Which models may answer, best first, and which backends have each of them?
    options = state.fleet.options(request)
    # 2. What has failed this completion is not asked again, but for a 429 after its pause.
    options = untried(completion, options)
    able = dict.fromkeys(option.backend for option in options)
    rests = [backend.rests_until for backend in able if backend.rests_until > now]
    resume = min(rests, default=math.inf)
    until = min(resume, deadline)
    # 3. May any of them be asked? A trial may end at any moment, since each key that somebody types
    #    replaces the request before: so wait for it.
    usable = which_admit(able, now)
    if not usable:
        if may_wait and (resume <= deadline or any(backend.breaker.trial for backend in able)):
            return Wait(until)
        why = why_nobody(state.fleet, request) if resume == math.inf else HttpError(*TOO_MANY)
        return completion.failure or why
    # 4. Is a place free, and may this client take it? `place_for` does not count the older requests
    #    of its session; `_assign` ends them.
    claim = Claim(state, completion, options, usable, now)
    if place := place_for(claim):
        return place
    # 5. Guests make room for everybody else.
    if not request.guest and (guest := who_makes_room(claim)):
        return Preempt(guest)
    # 6. A dialect's request waits; one of our own API gets its last failure, or 429, at once, as
    #    docs/api.md promises.
    return Wait(until) if may_wait else completion.failure or all_taken(state, request.guest)


def decide_spare(state: State, request: CompletionRequest, now: float) -> Option | None:
    """Where a prompt is to be read ahead now, or a speculative request sent; None for nowhere. It
    must cost nothing, and nobody may wait for a place meanwhile. It goes where the next request of
    its file will go, once that backend has nothing else to do.
    """
    options = state.fleet.options(request)
    readers = [option.backend for option in options if option.backend.kind.reads_ahead]
    place = best_place(state, request, options, which_admit(readers, now))
    if not place or place.backend.breaker.state != "closed" or state.line:
        return None
    busy = [attempt.request for attempt, where in state.places.items() if where is place.backend]
    # A speculative request ends reading, and the older one of its client.
    if request.speculative:
        busy = [older for older in busy if not older.ahead]
        busy = [older for older in busy if not older.speculative or older.client != request.client]
    return None if busy else place


def untried(completion: Completion, options: Iterable[Option]) -> list[Option]:
    """The options without the backends that have failed this completion, and without the models
    that a backend could not load. A 429 is no failure if the client is ready to wait. Behind a
    balancer, another replica may answer what one has broken off; a refusal is final, and so is a
    failure that took long.
    """
    # Replicas that count as failed, by the ids of a backend and of a model; "" for all its models.
    failed = Counter[tuple[str, str]]()
    for attempt in completion.attempts:
        error = attempt.outcome
        if not isinstance(error, HttpError):
            continue
        if error.code != "RATE_LIMIT" or not completion.request.in_dialect:
            model = attempt.model if error.code in WITHOUT_MODEL else ""
            broke_off = isinstance(error, BackendFailure) and not error.late
            failed[attempt.backend, model] += 1 if broke_off else REPLICAS

    def may_try(option: Option) -> bool:
        backend = option.backend
        most = REPLICAS if backend.config.affinity_header else 1  # it is behind a balancer
        return failed[backend.id, option.model] + failed[backend.id, ""] < most

    return list(filter(may_try, options))


def which_admit(backends: Iterable[Backend], now: float) -> list[Backend]:
    """The backends that may be asked; those in trouble only if there are no others."""
    awake = [backend for backend in backends if backend.rests_until <= now]
    admitting = [backend for backend in awake if backend.breaker.admits]
    return [backend for backend in admitting if not backend.breaker.trouble] or admitting


def place_for(claim: Claim) -> Option | None:
    """A free place that this client may take."""
    if not spares_editors(claim) or not guest_may_start(claim):
        return None
    request = claim.completion.request
    free = [
        backend
        for backend in claim.usable
        if len(claim.state.running([backend], request.session)) < backend.limit
    ]
    return best_place(claim.state, request, claim.options, free)


def best_place(
    state: State, request: CompletionRequest, options: Sequence[Option], free: Sequence[Backend]
) -> Option | None:
    """The best model that one of these backends has, at the one that probably has the beginning of
    the prompt in its cache, or else at the least busy one.
    """
    last = state.served.get(request.file)
    busy = Counter(state.answering.values())  # with requests that are being ended
    models = [option.model for option in options]

    def order(option: Option) -> tuple[float, ...]:
        backend = option.backend
        return models.index(option.model), backend.id != last, busy[backend] / backend.limit

    return min((option for option in options if option.backend in free), key=order, default=None)


def who_makes_room(claim: Claim) -> Attempt | None:
    """A guest's attempt to end, so that this completion gets a place; None if no end of guests'
    attempts would give it one. They are tried in turn, first those that are no infill, and of these
    the newest, which loses least, until there is a place; the last one tried is the one.
    """
    state = claim.state

    def order(guest: Attempt) -> tuple[float, ...]:
        return guest.request.kind != "infill", guest.begun

    # An attempt whose answer is whole leaves by itself.
    running = state.running(claim.usable)
    guests = [other for other in running if other.request.guest and not other.outcome]
    places = {**state.places}
    left = claim._replace(state=replace(state, places=places))
    for guest in sorted(guests, key=order, reverse=True):
        del places[guest]
        if place_for(left):
            return guest  # those before it may not be needed then
    return None


def limit_of(backends: Sequence[Backend]) -> int:
    return sum(backend.limit for backend in backends)


def spares_editors(claim: Claim) -> bool:
    """Whether a completion leaves a place for editors. After a recent infill, chats and plain
    completions leave one for infills, and one client's infills leave one for another client's.
    A guest's place is as good as a free one for all others. Requests of our own API take any place.
    """
    kind = claim.completion.request.kind
    if not kind:
        return True
    client = claim.completion.client
    since = claim.now - EDITOR_SECONDS
    editors = {name for name, seen in claim.state.editors.items() if seen > since}
    running = claim.state.running(claim.usable)
    alike = [other for other in running if (other.request.kind == "infill") == (kind == "infill")]
    if kind == "infill":
        editors.discard(client)
        alike = [attempt for attempt in alike if attempt.completion.client == client]
    elif not claim.completion.request.guest:
        alike = [attempt for attempt in alike if not attempt.request.guest]
    most = max(1, limit_of(claim.usable) - 1)
    return not editors or len(alike) < most


def guest_may_start(claim: Claim) -> bool:
    """Whether a guest may start: no regular client waits, guests leave one place free for a minute
    after a regular completion, and this guest is below its limit.
    """
    state = claim.state
    request = claim.completion.request
    if not request.guest:
        return True
    if not all(other.request.guest for other in state.line):
        return False
    # Also at backends that cannot be asked now: what these break off comes back.
    running = state.running(state.fleet.backends, request.session)
    guests = [attempt for attempt in running if attempt.request.guest]
    own = [guest for guest in guests if guest.completion.client == claim.completion.client]
    if len(own) >= request.guest:
        return False
    spared = claim.now - state.regular_turn < EDITOR_SECONDS
    return len(guests) < max(1, limit_of(claim.usable) - spared)


def all_taken(state: State, guest: int) -> HttpError:
    known = state.fleet.backends
    there = [backend for backend in known if backend.available] or known
    return HttpError(
        "RATE_LIMIT",
        f"expected at most {guest or limit_of(there)} completions at a time; try again later",
    )


def why_nobody(fleet: Fleet, request: CompletionRequest) -> HttpError:
    """Why no backend may be asked."""
    if fleet.options(request):
        return HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
    if unknown := [backend.breaker.message for backend in fleet.backends if backend.models is None]:
        return HttpError("VPS_UNAVAILABLE", next(filter(None, unknown), NEVER_ASKED))
    known = ", ".join(fleet.models or ())
    model = fleet.rank(request)[0]
    expected = f"expected a model that a backend has ({known or 'none'})"
    return HttpError("MODEL_NOT_FOUND", f"{expected}, got {describe(model)}")


# ----------------------------------------------------------------------------------- the dispatcher

ENDING_SECONDS = 1.0  # for a completion that makes room to leave its place
# Files with the backend that served them last, and clients with their last turn or infill.
MAX_SERVED = 512
MAX_AHEAD = 4  # prompts to be read ahead, one of each client


class Dispatcher:
    """Sole owner of the line, of the places, and of the prompts to be read ahead, whose work it
    counts. A completion passes in these steps:

    1. `Runner` calls `place` for each attempt; `_enter` puts the completion into the line.
    2. `_advance` asks `decide` about each that waits, in turns. One that gets a place leaves the
       line, and `_assign` begins its attempt, for which older requests may have to end.
    3. It wakes up in `_enter`, and `place` waits until those older ones have left.
    4. `Runner` makes the attempt. `_leave` gives the place back, and lets those that wait advance.

    Spare requests never wait in the line: `_enter` sends a speculative one to an idle backend or
    refuses it, and `_advance` lets backends read ahead when nobody waits.
    """

    def __init__(self, fleet: Fleet, counting: Counting) -> None:
        self.state = State(fleet)
        # Prompts that are read ahead, now or later, by client.
        self.ahead: dict[str, Completion] = {}
        self._counting = counting
        # Calls `_advance` for those that wait.
        self._timer: asyncio.TimerHandle | None = None

    @property
    def active(self) -> int:
        """Attempts that take a place."""
        return len(self.state.answering)

    # Whatever may give somebody a place calls `_advance`: a request comes or leaves the line
    # (`_enter`); the time of one that waits has come (`_timer`); a place is left (`_leave`); a
    # prompt is to be read ahead (`read_ahead`); something else has `changed`.

    @contextlib.asynccontextmanager
    async def place(self, completion: Completion) -> AsyncIterator[tuple[Attempt, Backend]]:
        """Wait for a place and hold it for as long as the context lasts: the attempt, and where it
        is to be made. HttpError if there is no place for the completion. So that a backend does not
        work on more requests than its limit, those that are being ended there leave first; but none
        is waited for longer than ENDING_SECONDS.
        """
        attempt = await self._enter(completion)
        places = self.state.places
        backend = places[attempt]
        older = [
            other
            for other in places
            if other.evicted and places[other] is backend and other != attempt
        ]
        try:
            # Those that are being ended are cut, but a client may be slow to take its last text.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENDING_SECONDS):
                    for other in older:
                        await other.ended.wait()
            yield attempt, backend
        finally:
            self._leave(attempt)

    async def _enter(self, completion: Completion) -> Attempt:
        state = self.state
        await state.fleet.know()
        request = completion.request  # somebody may wait for a speculative one by now
        if request.speculative:
            if place := decide_spare(state, request, time.monotonic()):
                return self._assign(completion, place)
            raise HttpError(SUPERSEDED, "expected an idle backend, got none")
        called = state.line[completion] = asyncio.Future[Attempt]()
        try:
            self._advance()
            await asyncio.wait([called])
            return called.result()
        except asyncio.CancelledError:  # the client has left, perhaps just as it got its place
            if called.done() and not called.exception():
                self._leave(called.result())
            raise
        finally:
            if state.line.pop(completion, None):  # it has not been called: its client has left
                self._advance()

    def changed(self) -> None:
        """A backend, its breaker, the settings or who waits for a completion has changed."""
        self._advance()

    def _advance(self) -> None:
        """Call those that wait, in turns: with a place for each that gets one, with an error if it
        need not wait longer. The others are asked about again when the first of their times has
        come: the end of a backend's pause, or a deadline. If nobody waits, idle backends read
        ahead.
        """
        state = self.state
        waits = dict[Completion, float]()
        # A place that is given or taken away changes whose turn it is, so look anew each time.
        while waiting := [other for other in state.in_turn() if other not in waits]:
            completion = waiting[0]
            match decide(state, completion, time.monotonic()):
                case Option() as place:
                    state.line.pop(completion).set_result(self._assign(completion, place))
                case Preempt(guest):
                    self._preempt(guest)
                case Wait(until):
                    waits[completion] = until
                case HttpError() as error:
                    state.line.pop(completion).set_exception(error)
        if self._timer:
            self._timer.cancel()
        if waits:
            seconds = min(waits.values()) - time.monotonic()
            self._timer = asyncio.get_running_loop().call_later(seconds, self._advance)
        self._advance_reading()

    def _assign(self, completion: Completion, place: Option) -> Attempt:
        """Begin an attempt: take the place, and end the requests that it replaces, those of its
        session and the spare ones there.
        """
        state = self.state
        backend = place.backend
        request = completion.request
        for other, where in [*state.places.items()]:
            is_older = other.request.session == request.session != ""
            if is_older or (other.request.is_spare and where is backend):
                self._supersede(other)
        admission = backend.breaker.admit(time.monotonic())
        attempt = Attempt(completion, backend.id, place.model, admission)
        completion.attempts.append(attempt)
        state.places[attempt] = backend
        if not request.is_spare:
            self._note_turn(completion)
        if request.file:
            set_newest(state.served, request.file, backend.id, MAX_SERVED)
        return attempt

    def _note_turn(self, completion: Completion) -> None:
        """A client that waits gets a place."""
        state = self.state
        now = time.monotonic()
        set_newest(state.turns, completion.client, now, MAX_SERVED)
        if not completion.request.guest:
            state.regular_turn = now

    def note_editor(self, request: CompletionRequest, now: float) -> None:
        """A client asks for an infill, which perhaps needs no place."""
        if request.kind == "infill" and not (request.guest or request.is_spare):
            set_newest(self.state.editors, request.client, now, MAX_SERVED)

    def promote(self, completion: Completion, client: str) -> None:
        """This client waits for a speculative completion from now on: it takes a place."""
        completion.request = replace(completion.request, speculative=False)
        completion.client = client
        self._note_turn(completion)

    def _supersede(self, attempt: Attempt) -> None:
        if not attempt.evicted:
            attempt.settle(Evicted(SUPERSEDED))
            attempt.completion.end(HttpError(SUPERSEDED, "another request took its place"))

    def _preempt(self, attempt: Attempt) -> None:
        """End a guest's attempt. Without a text it starts again, if its client still waits."""
        attempt.settle(Evicted(PREEMPTED, time.monotonic() < attempt.completion.deadline))
        attempt.admission.left()
        attempt.cut()

    def _leave(self, attempt: Attempt) -> None:
        """Give the place of an attempt back."""
        request = attempt.request
        del self.state.places[attempt]
        attempt.admission.left()
        attempt.released = time.monotonic()
        attempt.ended.set()
        asked = self.ahead.get(request.client)
        if attempt.prompt_cut and (not asked or asked.started <= attempt.begun):
            # So that the next prompt of its file need not be cut; unless the client has asked at
            # another cursor meanwhile.
            self.read_all(request)
        self._advance()

    # Reading ahead.

    def read_ahead(self, request: CompletionRequest) -> None:
        """Queue a prompt to be read into a backend's cache. Only the newest of each client is kept,
        which ends the reading of its older one unless it begins with that; and if the client is no
        guest, the reading of guests. Reading stops when the backend gets a request, and begins
        again later: the backend keeps the part that it has read.
        """
        ahead = replace(request, session="", ahead=True, speculative=False)
        set_newest(self.ahead, ahead.client, Completion(ahead), MAX_AHEAD)
        for attempt in self.state.places:
            older = attempt.request
            is_own = older.client == ahead.client
            # A jump to another cursor has another suffix.
            same_gap = is_own and ahead.fields.suffix == older.fields.suffix
            goes_on = same_gap and ahead.fields.prompt.startswith(older.fields.prompt)
            if older.ahead and not goes_on and (is_own or older.guest > ahead.guest == 0):
                self._supersede(attempt)
        self._advance()

    def end_reading(self) -> None:
        """Read nothing ahead any more of what was asked for until now."""
        self.ahead.clear()
        for attempt in self.state.places:
            if attempt.request.ahead:
                self._supersede(attempt)

    def read_all(self, request: CompletionRequest) -> None:
        """Queue all of a request's prompt to be read."""
        fields = replace(request.fields, max_tokens=0, prompt_ms=0)
        self.read_ahead(replace(request, fields=fields))

    def _advance_reading(self) -> None:
        """Begin to read the prompts for which a backend is idle, those of guests last."""
        readers = [attempt.request.client for attempt in self.state.places if attempt.request.ahead]
        for completion in sorted(self.ahead.values(), key=lambda other: other.request.guest > 0):
            place = decide_spare(self.state, completion.request, time.monotonic())
            if place and completion.request.client not in readers:
                self._begin_reading(completion, place)

    def _begin_reading(self, completion: Completion, place: Option) -> None:
        attempt = self._assign(completion, place)
        task = asyncio.create_task(self._read(place.backend, attempt))
        completion.end = lambda _: task.cancel()
        # Called even if the task never begins.
        task.add_done_callback(functools.partial(self._has_read, attempt))

    async def _read(self, backend: Backend, attempt: Attempt) -> None:
        try:
            async with contextlib.aclosing(backend.answer(attempt)) as pairs:
                async for event, value in pairs:
                    if event == "done":
                        self._counting.work(attempt.model, value)
        except HttpError as error:
            log.info("%s: no prompt was read ahead: %s", backend.id, error.message)
        except Exception as exception:
            internal_error(exception)

    def _has_read(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        client = attempt.request.client
        attempt.sent = NOTHING_SENT  # the completion may stay in `ahead`
        if not attempt.evicted:
            if self.ahead.get(client) is attempt.completion:
                del self.ahead[client]
            if task.cancelled():
                self.ahead.clear()  # the daemon stops
        self._leave(attempt)
