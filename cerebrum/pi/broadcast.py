"""Completions and their readers: running ones that several clients share, finished ones whose text
users type.

A `Broadcast` is a running completion, `Remembered` the text of a finished one; a `Subscriber` is
one client's request and its position in the text. `Broadcasts` finds the text that a request can
read, and ends an editor's older infills.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from cerebrum.fields import JsonObject
from cerebrum.pi.completion import (
    CURSOR_CHARS,
    CUT,
    MAX_TYPED_CHARS,
    NEVER,
    SAMPLED_BY,
    SUPERSEDED,
    SURENESS,
    Completion,
    CompletionRequest,
    Pair,
    Pairs,
    digest_of,
    read_text,
    text_event,
)
from cerebrum.pi.counting import Usage
from cerebrum.pi.runner import Runner
from cerebrum.request import GenerationRequest
from cerebrum_common import HttpError, internal_error

# ---------------------------------------------------------------------------------- policy: editors

MAX_RETYPED_CHARS = 8  # of a word that the user corrects meanwhile
MAX_FINISHED = 32  # completions remembered, of at most MAX_FINISHED_CHARS each
MAX_FINISHED_CHARS = 2048
FIRST_MS = 250  # llama.vim's time limit for all infills but the speculative ones
# The answer to one request can begin the answer to another only if these fields are equal in both.
EQUAL_FIELDS = ("mode", "suffix", "model", "language", "filename", "min_confidence", *SAMPLED_BY)


def is_typed_on(one: GenerationRequest, other: GenerationRequest) -> bool:
    """Whether a user has typed between two infills: the text before one cursor nearly continues the
    text before the other, and the lines below are the same. Two gaps of one file do not match, nor
    do two texts of a program.
    """
    if one.filename != other.filename:
        return False
    below, longer_below = sorted(map(text_below, (one, other)), key=len)
    if bool(below) != bool(longer_below) or not longer_below.startswith(below):
        return False
    above = one.prompt
    above_other = other.prompt
    return nearly_continues(above, above_other) or nearly_continues(above_other, above)


def text_below(fields: GenerationRequest) -> str:
    """The beginning of the text below the cursor's line, or else of the rest of this line, which
    changes if an editor closes a bracket.
    """
    suffix = fields.suffix or ""
    return (suffix.partition("\n")[2] or suffix)[:CURSOR_CHARS]


def nearly_continues(text: str, longer: str) -> bool:
    """Whether `longer` is `text` plus at most MAX_TYPED_CHARS. Up to MAX_RETYPED_CHARS at the end
    of the last line may differ if the line's beginning is equal. An editor's window moves, so
    `longer` may begin later.

    >>> nearly_continues("import os\\nx = fo", "import os\\nx = bar()")
    True
    >>> nearly_continues("a\\nx", "a\\ny = ")
    False
    """
    line = text[text.rfind("\n") + 1 :]
    retyped = min(MAX_RETYPED_CHARS, max(0, len(line.lstrip()) - 1))
    tail = text[: len(text) - retyped][-CURSOR_CHARS:]
    start = max(0, len(longer) - len(tail) - MAX_TYPED_CHARS)
    if len(tail) == CURSOR_CHARS:
        return tail in longer[start:]
    return not start and longer.startswith(tail)


def typed_of(earlier: str, text: str, prompt: str, omitted: int = 0) -> int:
    """How many characters of `text`, the completion of the prompt `earlier`, precede the cursor in
    another prompt; 0 if the two cursors are in different gaps. The ends of the prompts decide,
    since an editor's window moves, so `earlier` may be the end of a prompt alone, CURSOR_CHARS
    long; `omitted` counts what precedes it.

    >>> typed_of("def f():\\n    ret", "urn 1", "def f():\\n    return")
    3
    """
    tail = prompt[-CURSOR_CHARS:]
    before = earlier[-CURSOR_CHARS:]
    # If the window has not moved, the lengths tell how much was typed, also in a text that repeats
    # itself.
    typed = len(prompt) - len(earlier) - omitted
    if 0 <= typed <= len(text) and (before + text[:typed]).endswith(tail):
        return typed
    if len(tail) < CURSOR_CHARS:  # a whole prompt, which must agree from its first character
        return 0
    # If it has moved, the cursor is where the earlier prompt with its text has the tail.
    start = max(0, len(before) + 1 - CURSOR_CHARS)  # so that at least one character is typed
    found = (before + text).find(tail, start)
    return found + CURSOR_CHARS - len(before) if found >= 0 else 0


# --------------------------------------------------------------------------- policy: who reads what


@dataclass(slots=True, eq=False)
class Remembered:
    """The text of a finished completion, for the clients who got it and may type it."""

    digest: bytes  # of the request's EQUAL_FIELDS
    prompt: str  # the end of it
    omitted: int  # characters of the prompt before this end
    text: str
    pairs: list[Pair]
    prompt_cut: bool  # the model that was asked for has not read all of the prompt
    # A digest of all fields of an infill: an equal one gets this text, whenever it comes. Empty for
    # a text that no request gets so.
    exact: bytes = b""
    clients: set[str] = field(default_factory=set)  # who got the whole text

    def typed_so_far(self, prompt: str, exact: bytes) -> int | None:
        """How many characters of the text precede the cursor of a newer request, because the user
        has typed them; 0 if the two requests are equal, by the digest `exact` of all their fields;
        None if the text is no answer to it, as for another gap.
        """
        if self.exact == exact:
            return 0
        typed = typed_of(self.prompt, self.text, prompt, self.omitted)
        return typed if 0 < typed < len(self.text) else None


@dataclass(slots=True, eq=False)
class Broadcast:
    """A running completion for all clients that ask for it. It has all pairs but "idle" and
    "progress", so that a late client gets the whole text.
    """

    completion: Completion
    digest: bytes  # of the request's EQUAL_FIELDS
    task: asyncio.Task[None] = field(init=False)  # computes it
    pairs: list[Pair] = field(default_factory=list)
    failure: HttpError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # its readers wait for it
    remembered: Remembered | None = None  # once a client has the whole text

    def typed_so_far(self, request: CompletionRequest, may_type: bool) -> int | None:
        """How many characters of the text precede the cursor of a newer request, because the user
        has typed them as they came; 0 if the two requests are equal; None if the text is no answer
        to it, as for another gap. `may_type`: it is of the same editor and differs in the prompt
        alone, and its client takes the rest of a text as its answer.
        """
        older = self.completion.request
        if may_share(request, older):
            return 0
        if not may_type or request.kind != "infill":
            return None
        return typed_of(older.fields.prompt, text_in(self.pairs), request.fields.prompt) or None

    def wake(self) -> None:
        """Wake its readers."""
        self.changed.set()
        self.changed = asyncio.Event()

    def end(self, error: HttpError) -> None:
        """End the completion for all who read it."""
        self.failure = error
        self.task.cancel()
        self.wake()


def text_in(pairs: Sequence[Pair]) -> str:
    return read_text(b"".join(value for event, value in pairs if event == "text"))


def may_type_through(request: CompletionRequest) -> bool:
    """Whether the client takes the rest of an earlier completion's text as its answer."""
    return request.kind != "chat" and (request.caching or request.fields.temperature == 0)


def may_share(request: CompletionRequest, running: CompletionRequest) -> bool:
    """Whether the answer to a running request is one to an equal request. Samples must differ, and
    guests do not hold the places of others.
    """
    fields = request.fields
    if fields.temperature > 0 and fields.seed is None:
        return False
    return running.fields == fields and bool(running.guest) == bool(request.guest)


def follows_one(request: CompletionRequest, got: Iterable[Remembered]) -> bool:
    """Whether this is certainly llama.vim's request for what follows a text that it shows: one of
    those that it `got`. That editor alone names the members of the answer that it wants.
    """
    if not request.only or request.fields.predict_ms == FIRST_MS:
        return False
    prompt = request.fields.prompt
    return any(typed_of(old.prompt, old.text, prompt, old.omitted) == len(old.text) for old in got)


def to_remember(broadcast: Broadcast) -> Remembered | None:
    """The text of a complete broadcast; None if nobody may type it. A plain completion may be a
    program's, which relies on its limit: a text cut by the limit must not begin another answer.
    """
    request = broadcast.completion.request
    fields = request.fields
    last = dict(broadcast.pairs)  # of each event
    result = last["done"]
    reason = result.get("finish_reason", "stop")
    if reason == "length" and request.kind == "completion":
        return None
    text = text_in(broadcast.pairs)
    if reason in CUT or not 1 < len(text) <= MAX_FINISHED_CHARS:
        return None
    # An answer for which no backend is asked has no figures.
    done = {name: result[name] for name in ("finish_reason", *SURENESS) if name in result}
    pairs: list[Pair] = [("started", last["started"]), ("text", text_event(text)), ("done", done)]
    omitted = max(0, len(fields.prompt) - CURSOR_CHARS)
    prompt_cut = result.get("prompt_cut", False)
    old = Remembered(broadcast.digest, fields.prompt[omitted:], omitted, text, pairs, prompt_cut)
    # The next time, a limit of time cuts the answer elsewhere, and more of the prompt is read.
    is_late = reason == "length" and result["total_tokens"] < fields.max_tokens
    if request.kind == "infill" and fields.temperature == 0 and not (is_late or prompt_cut):
        old.exact = digest_of(fields, vars(fields))
    return old


# --------------------------------------------------------------------------- following a completion


# Longer than an infill waits: editors act on its status. For others a silent connection looks dead.
WAITING_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Subscriber:
    """One client's request in a dialect, and its position in a text, which others may read too. It
    runs nothing: the task of a `Broadcast` does, on behalf of all who read it.
    """

    broadcasts: Broadcasts
    request: CompletionRequest
    notes: JsonObject  # for the request's line in the log
    editor: str  # client, address and user agent: one editor's requests have the same
    has_comments: bool  # the client's dialect: "waiting" and "idle" can be sent
    broadcast: Broadcast | None = None  # that it reads; None: it reads a finished text, or none
    at: int = 0  # pairs read
    typed: int = 0  # characters of the text that the client typed before
    skip: int = 0  # those of them that are not yet read
    replaced: bool = False  # it `gives_way` to a newer one
    started: float = field(default_factory=time.monotonic)

    @property
    def waits(self) -> bool:
        """Whether somebody waits for the answer now."""
        return not self.request.speculative

    async def pairs(self) -> Pairs:
        """The pairs of `Runner.run` without "progress", which no dialect has, and with "waiting".
        Several "idle" may come as one. A replaced request ends like a completion that a limit has
        cut, because some editors would show an error to the user; a speculative one fails, or
        llama.vim would remember the empty text.
        """
        try:
            pairs = self.broadcasts.join(self)
            while not self.replaced:
                if self.at < len(pairs):
                    event, value = self._next(pairs)
                    yield event, value
                    if event == "done":
                        return
                elif self.broadcast and (pair := await self._wait(self.broadcast)):
                    yield pair
            if not self.waits:
                raise HttpError(SUPERSEDED, "other requests came first")
            if self.broadcast and not self.at:
                yield "started", self.broadcasts.runner.beginning(self.broadcast.completion)
            yield "done", {"finish_reason": "replaced"}
        finally:
            self.broadcasts.leave(self)

    async def _wait(self, broadcast: Broadcast) -> Pair | None:
        """Wait for a change, or for WAITING_SECONDS in the line. Returns a pair if nothing is to be
        read then. HttpError if the completion has failed.
        """
        if broadcast.failure:
            raise broadcast.failure
        seconds = WAITING_SECONDS if self.has_comments and not self.at else None
        try:
            await asyncio.wait_for(broadcast.changed.wait(), seconds)
        except TimeoutError:
            line = self.broadcasts.runner.dispatcher.state.in_turn()
            if broadcast.completion in line:
                return "waiting", 1 + line.index(broadcast.completion)
        # Nothing else comes before "started": an error can still be an HTTP status.
        is_read = 0 < self.at == len(broadcast.pairs) and self.has_comments
        return ("idle", None) if is_read and not (broadcast.failure or self.replaced) else None

    def _next(self, pairs: Sequence[Pair]) -> Pair:
        """The pair at the client's position, without the text that the client has typed."""
        event, value = pairs[self.at]
        self.at += 1
        if event == "text" and self.skip:
            text = read_text(value)
            rest = text[self.skip :]
            self.skip = max(0, self.skip - len(text))
            value = text_event(rest) if rest else b""
        elif event == "done":
            if self.typed:
                value = value | {"type_through": True}
            self.broadcasts.remember(self)
            if self.request.kind == "infill" and self.waits and self.request.fields.max_tokens:
                counting = self.broadcasts.runner.counting
                counting.count_hint(self.request, self.started, text_in(pairs)[self.typed :])
        return event, value


def gives_way(older: Subscriber, newer: Subscriber) -> bool:
    """Whether an infill ends for a newer one: a speculative one for the next of its client; others
    once the user of their editor has typed on, unless both are equal. If the newer one has its
    answer already, infills that continue its prompt go on: an editor asks ahead for the text after
    a completion that it shows.
    """
    if not newer.waits:
        return not older.waits and older.request.client == newer.request.client
    fields = older.request.fields
    newest = newer.request.fields
    is_later = fields.prompt.startswith(newest.prompt)
    goes_on = fields == newest or (is_later and not newer.broadcast)
    return older.editor == newer.editor and not goes_on and is_typed_on(fields, newest)


@dataclass(slots=True, eq=False)
class Broadcasts:
    """Owns all broadcasts, the remembered texts, and their subscribers. A subscriber calls it three
    times: `join` finds or begins the text that it reads, and ends older requests of its editor;
    `remember` keeps a text that it has read to the end; `leave` ends a completion for which nobody
    waits any more.
    """

    runner: Runner
    # Requests that got the rest of a text that they type, or a text that another asked for too; and
    # times that one ended for a newer one that waits.
    type_through: int = 0
    shared: int = 0
    replaced: int = 0
    subscribers: list[Subscriber] = field(default_factory=list)
    # The newest last.
    memory: deque[Remembered] = field(default_factory=lambda: deque(maxlen=MAX_FINISHED))

    # Who reads which text.

    def join(self, subscriber: Subscriber) -> Sequence[Pair]:
        """The pairs that the subscriber reads: those of a text that is there, of a broadcast that
        runs, or of a new one.
        """
        request = subscriber.request
        self.subscribers.append(subscriber)
        dispatcher = self.runner.dispatcher
        digest = digest_of(request.fields, EQUAL_FIELDS)
        newest = reversed(self.memory)
        # The finished texts that this client got, of requests that differ in the prompt alone.
        got = [old for old in newest if old.digest == digest and request.client in old.clients]
        if follows_one(request, got):
            subscriber.request = request = replace(request, speculative=True)
        if request.fields.max_tokens == 0:
            dispatcher.read_ahead(request)
            return self._without_text(request, "length")  # it replaces nothing
        dispatcher.note_editor(request, subscriber.started)
        if request.fields.min_confidence == NEVER:
            pairs = self._without_text(request, "unsure")
        elif found := self._find(subscriber, digest, got):
            text, subscriber.typed = found
            subscriber.skip = subscriber.typed
            self._share(subscriber, text)
            pairs = text.pairs
        else:
            own = subscriber.broadcast = Broadcast(Completion(request), digest)
            own.completion.end = own.end
            own.task = asyncio.create_task(self._run(own))
            pairs = own.pairs
        self._replace_older(subscriber)
        return pairs

    def _without_text(self, request: CompletionRequest, reason: str) -> list[Pair]:
        """An answer for which no backend is asked."""
        return [
            ("started", self.runner.beginning(Completion(request))),
            ("done", {"finish_reason": reason}),
        ]

    def _find(
        self, subscriber: Subscriber, digest: bytes, got: Sequence[Remembered]
    ) -> tuple[Remembered | Broadcast, int] | None:
        """A text that answers this request, and how many characters of it precede its cursor. First
        the finished texts that the client `got`; then those that are being written: for anybody's
        equal request, or for this editor, whose user may type what it shows already.
        """
        request = subscriber.request
        may_type = may_type_through(request)
        fields = request.fields
        if got and may_type:
            exact = digest_of(fields, vars(fields))  # of a long text, this takes milliseconds
            for old in got:
                typed = old.typed_so_far(fields.prompt, exact)
                if typed is not None:
                    return old, typed
        for other in self.subscribers:
            running = other.broadcast
            if running and not running.failure:
                is_alike = running.digest == digest and other.editor == subscriber.editor
                typed = running.typed_so_far(request, may_type and is_alike)
                if typed is not None:
                    return running, typed
        return None

    def _share(self, subscriber: Subscriber, text: Remembered | Broadcast) -> None:
        """Let a subscriber read a text, and count him if he waits."""
        request = subscriber.request
        runner = self.runner
        if isinstance(text, Broadcast):
            subscriber.broadcast = text
        if not subscriber.waits:
            return
        if subscriber.typed:
            self.type_through += 1
        else:
            self.shared += 1
        if isinstance(text, Remembered):
            runner.counting.people.add(request.client, Usage(completions=1))
            if subscriber.typed and text.prompt_cut:
                runner.dispatcher.read_all(request)
            return
        running = text.completion
        running.clients.append(request.client)
        running.requested = subscriber.started  # it waits for a place from now on
        if running.request.speculative:
            runner.dispatcher.promote(running, request.client)

    async def _run(self, broadcast: Broadcast) -> None:
        """Collect the pairs, and keep the error that ends them. "idle" only wakes the
        subscribers.
        """
        try:
            async with contextlib.aclosing(self.runner.run(broadcast.completion)) as pairs:
                async for event, value in pairs:
                    if event not in ("idle", "progress"):
                        broadcast.pairs.append((event, value))
                    broadcast.wake()
        except Exception as error:
            broadcast.failure = error if isinstance(error, HttpError) else internal_error(error)
        broadcast.wake()

    # Whose request ends.

    def _replace_older(self, subscriber: Subscriber) -> None:
        """End the older infills that give way to a new one."""
        for other in [*self.subscribers]:
            kinds = {other.request.kind, subscriber.request.kind}
            if other is not subscriber and kinds == {"infill"} and gives_way(other, subscriber):
                self.replaced += subscriber.waits
                other.replaced = True
                # Its client may be slow to take the end: if nobody else reads the completion, that
                # must not hold its place meanwhile.
                self.leave(other)
                if other.broadcast:
                    other.broadcast.wake()

    def leave(self, subscriber: Subscriber) -> None:
        """Remove a subscriber that has ended or is replaced, or whose client has left. If others
        read its completion, that goes on; its place is then charged to one of those who wait for
        it. If nobody reads it, or only speculative readers keep a place, it ends.
        """
        if subscriber not in self.subscribers:
            return
        self.subscribers.remove(subscriber)
        broadcast = subscriber.broadcast
        if not broadcast:
            return
        completion = broadcast.completion
        subscriber.notes |= completion.figures()
        others = [other for other in self.subscribers if other.broadcast is broadcast]
        if waiting := [other for other in others if other.waits]:
            completion.client = waiting[0].request.client
            self.runner.dispatcher.changed()  # the client who has left may get another place now
        # One that somebody has waited for holds a place: not for speculative readers alone.
        elif not others or (completion.clients and not broadcast.task.done()):
            broadcast.end(HttpError(SUPERSEDED, "nobody waits for it any more"))

    # What is remembered.

    def forget(self) -> None:
        """Forget the finished texts."""
        self.memory.clear()

    def remember(self, subscriber: Subscriber) -> None:
        """Remember the text that a client got as a whole, for when the user types it."""
        broadcast = subscriber.broadcast
        if not broadcast or not may_type_through(subscriber.request):
            return
        if not broadcast.remembered and (old := to_remember(broadcast)):
            broadcast.remembered = old
            self.memory.append(old)
        if broadcast.remembered:
            broadcast.remembered.clients.add(subscriber.request.client)
