"""Completions and their readers: running ones that several clients share, finished ones whose text
users type.

A `Broadcast` is one completion, running or finished; a `Subscriber` is one client's request and its
position in the text. `Broadcasts` finds the broadcast that a request can read, and ends an editor's
older infills.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass, field, replace
from os.path import commonprefix

from cerebrum.pi.completion import (
    CUT,
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
    remember,
    text_event,
)
from cerebrum.pi.counting import Usage
from cerebrum.pi.dispatcher import MAX_SERVED
from cerebrum.pi.runner import Runner
from cerebrum.request import GenerationRequest
from cerebrum_common import HttpError, internal_error

# ---------------------------------------------------------------------------------- policy: editors

MAX_TYPED_CHARS = 1024  # typed while a completion is computed, accepted suggestions included
MAX_RETYPED_CHARS = 8  # of a word that the user corrects meanwhile
# Of the text before a cursor. Two cursors with an equal end of this length are the same one.
CURSOR_CHARS = 1024
MAX_FINISHED = 32  # completions remembered, of at most MAX_FINISHED_CHARS each
MAX_FINISHED_CHARS = 2048
# The answer to one request can begin the answer to another only if these fields are equal in both.
EQUAL_FIELDS = ("mode", "suffix", "model", "language", "filename", "min_confidence", *SAMPLED_BY)


def is_typed_on(older: GenerationRequest, newer: GenerationRequest) -> bool:
    """Whether a user has typed between two infills: the text before one cursor nearly continues the
    text before the other, and the lines below are the same. Two gaps of one file do not match, nor
    do two texts of a program.
    """
    if older.filename != newer.filename:
        return False
    above = older.prompt
    above_newer = newer.prompt
    below = text_below(older)
    below_newer = text_below(newer)
    if bool(below) != bool(below_newer):
        return False
    if not (below.startswith(below_newer) or below_newer.startswith(below)):
        return False
    return nearly_continues(above, above_newer) or nearly_continues(above_newer, above)


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
    since an editor's window moves: `earlier` needs no more than CURSOR_CHARS, after `omitted`
    characters. In a text that repeats itself, the lengths decide.

    >>> typed_of("def f():\\n    ret", "urn 1", "def f():\\n    return")
    3
    """
    tail = prompt[-CURSOR_CHARS:]
    before = earlier[-CURSOR_CHARS:]
    typed = len(prompt) - len(earlier) - omitted
    if 0 <= typed <= len(text) and (before + text[:typed]).endswith(tail):
        return typed
    if len(tail) < CURSOR_CHARS:  # a whole prompt, which must agree from its first character
        return 0
    start = max(0, len(before) + 1 - CURSOR_CHARS)
    found = (before + text).find(tail, start)
    return found + CURSOR_CHARS - len(before) if found >= 0 else 0


# ------------------------------------------------------------------------ policy: what a user keeps

HINT_SECONDS = 60  # from the request for a hint to the next one
MAX_HINTS = 256  # remembered


def kept_of(above: str, hint: str, prompt: str) -> int:
    """How many characters of a hint stand behind its place in a newer prompt; 0 if this is not near
    the prompt's end. `above`: the end of the text before the hint, at most CURSOR_CHARS. Both
    texts begin with "\\0" where the editor's window begins, which moves in a longer file.

    >>> kept_of("\\0x = ", "foo(a)", "\\0x = foo(b")
    4
    """
    nearby = prompt[-CURSOR_CHARS - len(hint) - MAX_TYPED_CHARS :]
    behind = nearby.partition(above)[2]
    return len(commonprefix([hint, behind]))  # noqa: RUF071, characters are meant


# --------------------------------------------------------------------------- policy: who reads what


@dataclass(slots=True, eq=False)
class Broadcast:
    """One completion for all clients that ask for it: finished if it has no completion, else
    running. A running one keeps all pairs but "idle" and "progress", so that a late client gets the
    whole text. A finished one keeps its text and the end of its prompt, for the clients who got the
    text; or it is an answer for which no backend was asked.
    """

    digest: bytes  # of the request, by `digest_of`
    prompt: str  # or its end
    pairs: list[Pair] = field(default_factory=list)
    # Running.
    completion: Completion | None = None
    task: asyncio.Task[None] = field(init=False)  # computes it
    failure: HttpError | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # its readers wait for it
    kept: Broadcast | None = None  # its finished form, once a client has the whole text
    # Finished.
    asked: bytes = b""  # a digest of all fields of an infill that it answers whenever it comes
    omitted: int = 0  # characters of the prompt before its end
    is_cut: bool = False  # the model that was asked for has not read all of the prompt
    clients: set[str] = field(default_factory=set)  # who got the whole text

    @property
    def text(self) -> str:
        return read_text(b"".join(value for event, value in self.pairs if event == "text"))

    def wake(self) -> None:
        """Wake its readers."""
        self.changed.set()
        self.changed = asyncio.Event()


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


def typed_in(
    broadcast: Broadcast, completion: Completion, digest: bytes, is_reader: bool
) -> int | None:
    """The number of characters of a broadcast's text that precede a request's cursor: 0 if the
    broadcast runs for an equal request; None if its text is no answer. `digest`: of EQUAL_FIELDS.
    `is_reader`: the same editor reads the running broadcast, or the same client got the whole text
    of the finished one.
    """
    request = completion.request
    running = broadcast.completion
    if running:
        if may_share(request, running.request):
            return 0
        is_reader = is_reader and request.kind == "infill"
    if not is_reader or not may_type_through(request) or broadcast.digest != digest:
        return None
    prompt = request.fields.prompt
    if broadcast.asked == completion.digest:
        return 0
    text = broadcast.text
    typed = typed_of(broadcast.prompt, text, prompt, broadcast.omitted)
    most = len(text) if running else len(text) - 1
    return typed if 0 < typed <= most else None


def to_keep(broadcast: Broadcast, completion: Completion) -> Broadcast | None:
    """The finished form of a complete broadcast; None if nobody may type its text. A plain
    completion may be a program's, which relies on its limit: a text cut by the limit must not begin
    another answer.
    """
    request = completion.request
    last = dict(broadcast.pairs)  # of each event
    begun = last["started"]
    result = last["done"]
    reason = result.get("finish_reason", "stop")
    if reason == "length" and request.kind == "completion":
        return None
    text = broadcast.text
    if reason in CUT or not 1 < len(text) <= MAX_FINISHED_CHARS:
        return None
    # An answer for which no backend is asked has no figures.
    done = {name: result[name] for name in ("finish_reason", *SURENESS) if name in result}
    pairs: list[Pair] = [("started", begun), ("text", text_event(text)), ("done", done)]
    omitted = max(0, len(broadcast.prompt) - CURSOR_CHARS)
    kept = Broadcast(broadcast.digest, broadcast.prompt[omitted:], omitted=omitted, pairs=pairs)
    # The next time, a limit of time cuts the answer elsewhere, and more of the prompt is read.
    is_late = reason == "length" and result["total_tokens"] < request.fields.max_tokens
    kept.is_cut = result.get("prompt_cut", False)
    is_whole = not (is_late or kept.is_cut)
    if request.kind == "infill" and request.fields.temperature == 0 and is_whole:
        kept.asked = completion.digest
    return kept


# --------------------------------------------------------------------------- following a completion


# Longer than an infill waits: editors act on its status. For others a silent connection looks dead.
WAITING_SECONDS = 5.0


@dataclass(slots=True, eq=False)
class Subscriber:
    """One client's request in a dialect, and its position in a broadcast, which others may read
    too.
    """

    broadcasts: Broadcasts
    completion: Completion
    editor: str
    has_comments: bool  # the client's dialect: "waiting" and "idle" can be sent
    broadcast: Broadcast | None = None  # once it has joined
    at: int = 0  # pairs read
    typed: int = 0  # characters of the text that the client typed before
    skip: int = 0  # those of them that are not yet read
    waits: bool = True  # False: the request is speculative
    replaced: bool = False  # the user has typed on, and the editor has asked again

    @property
    def request(self) -> CompletionRequest:
        return self.completion.request

    async def pairs(self) -> Pairs:
        """The pairs of `Runner.run` but "progress", which no dialect has, and "waiting".
        Several "idle" may come as one. A replaced request ends like a completion that a limit has
        cut, because some editors would show an error to the user; a speculative one fails, or
        llama.vim would remember the empty text.
        """
        try:
            broadcast = self.broadcasts.join(self)
            while not self.replaced:
                if self.at < len(broadcast.pairs):
                    event, value = self._next(broadcast)
                    yield event, value
                    if event == "done":
                        return
                elif broadcast.failure:
                    raise broadcast.failure
                elif pair := await self._wait(broadcast):
                    yield pair
            if not self.waits:
                raise HttpError(SUPERSEDED, "other requests came first")
            if not self.at:
                yield "started", self.broadcasts.runner.beginning(self.completion)
            yield "done", {"finish_reason": "replaced"}
        finally:
            self.broadcasts.leave(self)

    async def _wait(self, broadcast: Broadcast) -> Pair | None:
        """Wait for a change, or for WAITING_SECONDS in the line. Returns a pair if nothing is to be
        read then.
        """
        seconds = WAITING_SECONDS if self.has_comments and not self.at else None
        try:
            await asyncio.wait_for(broadcast.changed.wait(), seconds)
        except TimeoutError:
            for place, waiting in enumerate(self.broadcasts.runner.dispatcher.advance(), 1):
                if waiting is broadcast.completion:
                    return "waiting", place
        # Nothing else comes before "started": an error can still be an HTTP status.
        is_read = 0 < self.at == len(broadcast.pairs) and self.has_comments
        return ("idle", None) if is_read and not (broadcast.failure or self.replaced) else None

    def _next(self, broadcast: Broadcast) -> Pair:
        event, value = broadcast.pairs[self.at]
        self.at += 1
        if event == "text" and self.skip:
            value = self._rest_of(value)
        elif event == "done":
            if self.typed:
                value = value | {"type_through": True}
            self.broadcasts.keep(broadcast, self.request)
            if self.request.kind == "infill" and self.waits and self.request.fields.max_tokens:
                self.broadcasts.show(self.completion, broadcast.text[self.typed :])
        return event, value

    def _rest_of(self, events: bytes) -> bytes:
        """Events with text, without what the client has typed."""
        text = read_text(events)
        rest = text[self.skip :]
        self.skip = max(0, self.skip - len(text))
        return text_event(rest) if rest else b""


FIRST_MS = 250  # llama.vim's time limit for all infills but the speculative ones


@dataclass(slots=True, eq=False)
class Broadcasts:
    """Owns all broadcasts, running and finished, and their subscribers."""

    runner: Runner
    # Requests that ended this way.
    type_through: int = 0
    shared: int = 0
    replaced: int = 0
    subscribers: list[Subscriber] = field(default_factory=list)
    # Finished ones, the newest last.
    memory: deque[Broadcast] = field(default_factory=lambda: deque(maxlen=MAX_FINISHED))
    # The last hint in each file: what precedes it, its text, and when it was asked for.
    hints: dict[str, tuple[str, str, float]] = field(default_factory=dict)

    def join(self, subscriber: Subscriber) -> Broadcast:
        """The broadcast that the subscriber reads: one that is there, or a new one."""
        request = subscriber.request
        completion = subscriber.completion
        self.subscribers.append(subscriber)
        dispatcher = self.runner.dispatcher
        digest = digest_of(request.fields, EQUAL_FIELDS)
        if request.speculative or self._is_llama_vims(request, digest):
            completion.request = request = replace(request, speculative=True)
            completion.clients.clear()
            subscriber.waits = False
        if request.fields.max_tokens == 0:
            dispatcher.read_ahead(request)
            return self._without_text(completion, "length")  # it replaces nothing
        if subscriber.waits and request.kind == "infill" and not request.guest:
            remember(dispatcher.state.editors, request.client, completion.started, MAX_SERVED)
        if request.fields.min_confidence == NEVER:
            broadcast = self._without_text(completion, "unsure")
        elif found := self._find(subscriber, digest):
            broadcast = found
            self._share(found, subscriber)
        else:
            broadcast = self._start(completion, digest)
        subscriber.broadcast = broadcast
        self._replace_older(subscriber, spares_later=not broadcast.completion)
        return broadcast

    def _start(self, completion: Completion, digest: bytes) -> Broadcast:
        prompt = completion.request.fields.prompt
        own = Broadcast(digest, prompt, completion=completion)
        own.task = asyncio.create_task(self._run(own, completion))
        completion.end = lambda error: self._end(own, error)
        return own

    def _without_text(self, completion: Completion, reason: str) -> Broadcast:
        """An answer for which no backend is asked."""
        done = {"finish_reason": reason}
        return Broadcast(b"", "", [("started", self.runner.beginning(completion)), ("done", done)])

    def forget(self) -> None:
        """Forget the finished texts."""
        self.memory.clear()

    def _is_llama_vims(self, request: CompletionRequest, digest: bytes) -> bool:
        """Whether this is certainly llama.vim's request for what follows a text that it shows."""
        if not request.only or request.fields.predict_ms == FIRST_MS:
            return False
        prompt = request.fields.prompt
        for old in self.memory:
            if request.client in old.clients and old.digest == digest:
                text = old.text
                if typed_of(old.prompt, text, prompt, old.omitted) == len(text):
                    return True
        return False

    def _share(self, broadcast: Broadcast, subscriber: Subscriber) -> None:
        """Count another reader of a broadcast, if he waits."""
        completion = subscriber.completion
        running = broadcast.completion
        client = subscriber.request.client
        if not subscriber.waits:
            return
        if subscriber.typed:
            self.type_through += 1
            if broadcast.is_cut:
                self.runner.dispatcher.read_all(subscriber.request)
        else:
            self.shared += 1
        if not running:
            self.runner.counting.people.add(client, Usage(completions=1))
            return
        running.clients.append(client)
        running.requested = completion.started  # it waits for a place from now on
        if running.request.speculative:
            self.runner.dispatcher.promote(running, client)

    def _find(self, subscriber: Subscriber, digest: bytes) -> Broadcast | None:
        """A finished completion whose text the client has begun to type, or a running one of an
        equal request, or one whose text begins with what the user has typed since the editor asked
        for it.
        """
        client = subscriber.request.client
        editor = subscriber.editor
        known = [(old, client in old.clients) for old in reversed(self.memory)]
        for other in self.subscribers:
            running = other.broadcast
            if running and running.completion and not running.failure:
                known.append((running, other.editor == editor))
        for broadcast, is_reader in known:
            typed = typed_in(broadcast, subscriber.completion, digest, is_reader)
            if typed is not None:
                subscriber.typed = subscriber.skip = typed
                return broadcast
        return None

    async def _run(self, broadcast: Broadcast, completion: Completion) -> None:
        """Collect the pairs, and keep the error that ends them. "idle" only wakes the
        subscribers.
        """
        try:
            async with contextlib.aclosing(self.runner.run(completion)) as pairs:
                async for event, value in pairs:
                    if event not in ("idle", "progress"):
                        broadcast.pairs.append((event, value))
                    broadcast.wake()
        except Exception as error:
            broadcast.failure = error if isinstance(error, HttpError) else internal_error(error)
        broadcast.wake()

    def _replace_older(self, subscriber: Subscriber, spares_later: bool) -> None:
        """End an editor's older infills once its user has typed on, unless they are equal. With
        `spares_later`, infills that continue the newer prompt go on: an editor asks ahead for the
        text after a completion that it shows.
        """
        request = subscriber.request
        if request.kind != "infill":
            return
        newer = request.fields
        infills = [other for other in self.subscribers if other.request.kind == "infill"]
        if not subscriber.waits:
            for other in infills:
                is_own = other.request.client == request.client
                if is_own and not other.waits and other is not subscriber:
                    self._replace(other)
            return
        for other in [other for other in infills if other.editor == subscriber.editor]:
            older = other.request.fields
            is_later = older.prompt.startswith(newer.prompt)
            goes_on = older == newer or (spares_later and is_later)
            if not goes_on and is_typed_on(older, newer):
                self.replaced += 1
                self._replace(other)

    def _end(self, broadcast: Broadcast, error: HttpError) -> None:
        """End a completion for all who read it."""
        broadcast.failure = error
        broadcast.task.cancel()
        broadcast.wake()

    def _replace(self, subscriber: Subscriber) -> None:
        """End a request. Its completion ends at once if nobody else reads it: a client may be
        slow.
        """
        subscriber.replaced = True
        self.leave(subscriber)
        if subscriber.broadcast:
            subscriber.broadcast.wake()

    def leave(self, subscriber: Subscriber) -> None:
        """Remove a subscriber that has ended or whose client has left. The last one to leave ends
        the completion; until then, its place counts as held by a client who stays.
        """
        if subscriber not in self.subscribers:
            return
        self.subscribers.remove(subscriber)
        broadcast = subscriber.broadcast
        if not broadcast or not broadcast.completion:
            return
        completion = broadcast.completion
        task = broadcast.task
        subscriber.completion.notes |= completion.figures()
        others = [other for other in self.subscribers if other.broadcast is broadcast]
        if waiting := [other for other in others if other.waits]:
            completion.client = waiting[0].request.client
            self.runner.dispatcher.advance()
        elif not others:
            task.cancel()
        elif not (completion.request.speculative or task.done()):
            self._end(broadcast, HttpError(SUPERSEDED, "nobody waits for it any more"))

    def show(self, completion: Completion, text: str) -> None:
        """Count what an infill's prompt has of the last hint in its file; then the text, which its
        client is shown now, unless it is the rest of this hint.
        """
        request = completion.request
        now = completion.started
        # A model may write either form of line ends, and an editor inserts its own.
        text = text.replace("\r\n", "\n")
        prompt = "\0" + request.fields.prompt.replace("\r\n", "\n")
        above, hint, asked = self.hints.get(request.file, ("\0", "", 0.0))
        kept = kept_of(above, hint, prompt) if now - asked <= HINT_SECONDS else 0
        shown = 0 if (prompt + text).endswith(above + hint) else len(text)
        self.runner.counting.people.add(request.client, Usage(shown=shown, kept=kept))
        remember(self.hints, request.file, (prompt[-CURSOR_CHARS:], text, now), MAX_HINTS)

    def keep(self, broadcast: Broadcast, request: CompletionRequest) -> None:
        """Remember the text that a client got as a whole, for when the user types it."""
        completion = broadcast.completion
        if not completion or not may_type_through(request):
            return
        if not broadcast.kept and (kept := to_keep(broadcast, completion)):
            broadcast.kept = kept
            self.memory.append(kept)
        if broadcast.kept:
            broadcast.kept.clients.add(request.client)
