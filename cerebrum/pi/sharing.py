"""Sharing work: identical requests, infills replaced by newer ones, predictions that the user types."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from cerebrum.pi.backend import SAMPLED_BY, Backend, Job, notes_of
from cerebrum.pi.dialects import Asked
from cerebrum.pi.upstream import Pair, read_text, text_event
from cerebrum_common import HttpError, internal_error, log

# ------------------------------------------------------------------------------------- policy: editors

MAX_TYPED_CHARS = 1024  # typed while a completion is computed, accepted suggestions included
MAX_RETYPED_CHARS = 8  # of a word that the user corrects meanwhile
TAIL_CHARS = 1024  # of the text before the cursor: if these are equal, two cursors are at the same place
MAX_PREDICTIONS = 32  # completions remembered, of at most MAX_PREDICTED_CHARS each
MAX_PREDICTED_CHARS = 2048
# The answer to one request can begin the answer to another only if these fields are equal in both.
ALIKE = ("mode", "suffix", "model", "language", "filename", *SAMPLED_BY)


def is_typed_on(older: Mapping[str, Any], newer: Mapping[str, Any]) -> bool:
    """Whether two infills come from one place where a user types: the text before one cursor nearly continues the text
    before the other, and the lines below are the same. Two gaps of one file do not match, nor a program's two texts."""
    if older["filename"] != newer["filename"]:
        return False
    suffixes = (fields.get("suffix") or "" for fields in (older, newer))
    # The text below the cursor's line, or else the rest of this line, which changes if an editor closes a bracket.
    one, other = ((suffix.partition("\n")[2] or suffix)[:TAIL_CHARS] for suffix in suffixes)
    if not (one.startswith(other) or other.startswith(one)) or bool(one) != bool(other):
        return False
    return nearly_continues(older["prompt"], newer["prompt"]) or nearly_continues(newer["prompt"], older["prompt"])


def nearly_continues(text: str, longer: str) -> bool:
    """Whether `longer` is `text` plus at most MAX_TYPED_CHARS. Up to MAX_RETYPED_CHARS at the end of the last line may
    differ if the line's beginning is equal. An editor's window moves, so `longer` may begin later.

    >>> nearly_continues("import os\\nx = fo", "import os\\nx = bar()"), nearly_continues("a\\nx", "a\\ny = ")
    (True, False)
    """
    line = text[text.rfind("\n") + 1 :]
    retyped = min(MAX_RETYPED_CHARS, max(0, len(line.lstrip()) - 1))
    for end in range(len(text), len(text) - retyped - 1, -1):
        tail = text[max(0, end - TAIL_CHARS) : end]
        start = max(0, len(longer) - len(tail) - MAX_TYPED_CHARS)
        if longer.rfind(tail, start) >= 0 if len(tail) == TAIL_CHARS else not start and longer.startswith(tail):
            return True
    return False


def alike(fields: Mapping[str, Any]) -> bytes:
    """A digest of the ALIKE fields of a request."""
    return hashlib.sha256(repr([fields.get(name) for name in ALIKE]).encode("utf-8", "replace")).digest()


def typed_of(asked: str, text: str, prompt: str, omitted: int = 0) -> int:
    """How many characters of `text`, the completion of the prompt `asked`, precede the cursor in another prompt; 0 if
    the two cursors are at different places. The ends of the prompts decide, since an editor's window moves: `asked`
    needs no more than TAIL_CHARS, after `omitted` characters. In a text that repeats itself, the lengths decide.

    >>> typed_of("def f():\\n    ret", "urn 1", "def f():\\n    return")
    3
    """
    tail, before, typed = prompt[-TAIL_CHARS:], asked[-TAIL_CHARS:], len(prompt) - len(asked) - omitted
    if 0 <= typed <= len(text) and (before + text[:typed]).endswith(tail):
        return typed
    if len(tail) < TAIL_CHARS:  # a whole prompt, which must agree from its first character
        return 0
    place = (before + text).find(tail, max(0, len(before) + 1 - TAIL_CHARS))
    return max(0, place + TAIL_CHARS - len(before)) if place >= 0 else 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A finished completion whose text the user may now type, with its client, the prompt's end, and `alike`."""

    client: str
    tail: str
    omitted: int  # characters of the prompt before its tail
    alike: bytes
    text: str
    begun: Mapping[str, Any]
    finish_reason: str


class Predictions:
    """The latest completions, for clients who type the predicted text. Pure; at most 500 KB."""

    def __init__(self) -> None:
        self.recent: deque[Prediction] = deque(maxlen=MAX_PREDICTIONS)

    def add(self, client: str, fields: Mapping[str, Any], text: str, begun: Mapping[str, Any], reason: str) -> None:
        if 1 < len(text) <= MAX_PREDICTED_CHARS:
            tail, omitted = fields["prompt"][-TAIL_CHARS:], max(0, len(fields["prompt"]) - TAIL_CHARS)
            found = Prediction(client, tail, omitted, alike(fields), text, begun, reason)
            if found not in self.recent:  # each reader of a shared completion adds it
                self.recent.append(found)

    def find(self, client: str, fields: Mapping[str, Any]) -> tuple[Prediction, str] | None:
        """A completion whose beginning the client has typed, and the rest of its text."""
        rest = alike(fields)
        for prediction in reversed(self.recent):
            if prediction.client == client and prediction.alike == rest:
                typed = typed_of(prediction.tail, prediction.text, fields["prompt"], prediction.omitted)
                if 0 < typed < len(prediction.text):
                    return prediction, prediction.text[typed:]
        return None


# ------------------------------------------------------------------------------- following a completion

EDITOR_SECONDS = 60.0  # for this long after an infill, a place is kept for the next one
MAX_TO_WARM = 4  # prompts, one of each client


@dataclass(slots=True, eq=False)
class Shared:
    """One completion for all clients that send the same request at the same time. It keeps all pairs but "idle" and
    "progress", so a late client gets the whole text, and ends when its last reader leaves."""

    job: Job  # the first reader's
    pairs: list[Pair] = field(default_factory=list)
    task: asyncio.Task[None] | None = None  # computes it; None if nothing must be computed
    failure: HttpError | None = None


class Reading:
    """One client's request in a dialect: its position in a completion, which other clients may share."""

    def __init__(self, sharing: Sharing, job: Job, asked: Asked, editor: str) -> None:
        self.sharing, self.job, self.streams, self.editor = sharing, job, asked.stream, editor
        self.predicts = asked.kind != "chat" and (asked.caching or job.fields["temperature"] == 0)
        self.shared = Shared(job)  # the completion that it reads; `Sharing.join` may replace it by a running one
        self.at = 0  # pairs read
        self.skip = self.typed = 0  # characters of the text: still to be left out; typed by the client before it asked
        self.woken = asyncio.Event()
        self.replaced = False  # the user has typed on, and the editor has asked again

    async def pairs(self) -> AsyncGenerator[Pair, None]:
        """The pairs of `Gateway.complete` but "progress", which no dialect has. Several texts, or several "idle", may
        come as one. A replaced reading ends like a completion that a limit has cut, because some editors would show an
        error to the user."""
        try:
            self.sharing.join(self)
            while not self.replaced:
                if self.at < len(self.shared.pairs):
                    kind, value = self._next(self.shared.pairs)
                    yield kind, value
                    if kind == "done":
                        return
                elif self.shared.failure:
                    raise self.shared.failure
                else:
                    self.woken.clear()
                    await self.woken.wait()
                    if self.at == len(self.shared.pairs) and not (self.shared.failure or self.replaced):
                        yield "idle", None
            if not self.at:
                yield "started", self.sharing.beginning(self.job)
            yield "done", {"finish_reason": "replaced"}
        finally:
            self.sharing.leave(self)
            self.job.notes |= notes_of(self.shared.job)

    def _next(self, pairs: Sequence[Pair]) -> Pair:
        kind, value = pairs[self.at]
        texts = [text for _, text in takewhile(lambda pair: pair[0] == "text", pairs[self.at :])]
        self.at += len(texts) or 1
        if texts:
            value = b"".join(texts)
        if texts and self.skip:
            text = read_text(value)
            rest, self.skip = text[self.skip :], max(0, self.skip - len(text))
            value = text_event(rest) if rest else b""
        elif kind == "done" and self.predicts and self.shared.task:
            self.sharing.remember(self.job.client, self.shared)
            value = value | ({"type_through": True} if self.typed else {})
        return kind, value


class Sharing:
    """Owns what requests share: the readers of each running completion, and the latest completions. `start` begins a
    completion, `beginning` returns the value of its pair "started", `warm` queues a prompt to be read ahead, and
    `moved` is called when a place passes to another client."""

    def __init__(
        self,
        start: Callable[[Job], AsyncGenerator[Pair, None]],
        beginning: Callable[[Job], dict[str, Any]],
        warm: Callable[[Job], None],
        moved: Callable[[], None],
    ) -> None:
        self._start, self.beginning, self._warm, self._moved = start, beginning, warm, moved
        self.type_through = self.shared = self.replaced = 0  # requests that ended this way
        self.readings: list[Reading] = []
        self.predictions = Predictions()
        self._editors: dict[str, float] = {}  # the time of each client's last infill

    def is_fair(self, job: Job, usable: Sequence[Backend]) -> bool:
        """Whether the job leaves a place for editors. After a recent infill, chats and plain completions leave one for
        infills, and one client's infills leave one for another client's. Requests of our own API take any place."""
        now = time.monotonic()
        self._editors = {client: seen for client, seen in self._editors.items() if now - seen < EDITOR_SECONDS}
        others = self._editors.keys() - ({job.client} if job.kind == "infill" else set())
        if not job.kind or not others:
            return True
        running = [other for backend in usable for other in backend.running]
        if job.kind == "infill":
            alike = [other for other in running if other.kind == "infill" and other.client == job.client]
        else:
            alike = [other for other in running if other.kind in ("chat", "completion")]
        return len(alike) < max(1, sum(backend.limit for backend in usable) - 1)

    def join(self, reading: Reading) -> None:
        """Let a reading read a running completion, or let its own one begin, unless nothing must be computed."""
        self.readings.append(reading)
        job, own = reading.job, reading.shared
        if job.kind == "infill":
            self._editors[job.client] = time.monotonic()
        if job.fields["max_tokens"] == 0:
            self._warm(job)
            own.pairs += [("started", self.beginning(job)), ("done", {"finish_reason": "length"})]
        elif reading.predicts and (found := self.predictions.find(job.client, job.fields)):
            prediction, rest = found
            self.type_through += 1
            self._replace_older(reading, ahead=True)
            model = {"model": prediction.begun["model"]}
            job.notes |= model | {"tokens": 0}
            done = model | {"finish_reason": prediction.finish_reason, "type_through": True}
            own.pairs += [("started", prediction.begun), ("text", text_event(rest)), ("done", done)]
        else:
            reading.shared = self._find_running(reading) or own
            reading.shared.job.asked = job.asked  # each reader may wait for a place as long as the first
            if reading.shared is own:
                own.task = asyncio.create_task(self._compute(own))
            self._replace_older(reading)

    def _find_running(self, reading: Reading) -> Shared | None:
        """A running completion of the same request, or one whose text begins with what the user has typed since the
        editor asked for it. Samples without a seed must differ."""
        job = reading.job
        is_sample = job.fields["temperature"] > 0 and job.fields["seed"] is None
        for other in self.readings:
            shared = other.shared
            if not shared.task or shared.task.done():
                continue
            if shared.job.fields == job.fields and not is_sample:
                self.shared += 1
                return shared
            may_continue = reading.predicts and job.kind == "infill" and other.editor == reading.editor
            if may_continue and alike(shared.job.fields) == alike(job.fields):
                text = "".join(read_text(value) for kind, value in shared.pairs if kind == "text")
                if typed := typed_of(shared.job.fields["prompt"], text, job.fields["prompt"]):
                    reading.skip = reading.typed = typed
                    self.type_through += 1
                    return shared
        return None

    async def _compute(self, shared: Shared) -> None:
        """Collect the pairs, and keep the error that ends them. "idle" only wakes the readers."""
        try:
            async with contextlib.aclosing(self._start(shared.job)) as pairs:
                async for kind, value in pairs:
                    if kind in ("started", "text", "done"):
                        shared.pairs.append((kind, value))
                    self._wake(shared, at_end=kind == "done")
        except Exception as error:
            shared.failure = error if isinstance(error, HttpError) else internal_error(error)
        self._wake(shared, at_end=True)

    def _wake(self, shared: Shared, at_end: bool) -> None:
        """Wake the readers. A reader that collects the whole text is woken only at the end."""
        for reading in self.readings:
            if reading.shared is shared and (at_end or reading.streams):
                reading.woken.set()

    def _replace_older(self, reading: Reading, ahead: bool = False) -> None:
        """End an editor's older infills once its user has typed on, unless they are equal. With `ahead`, infills that
        continue the reading's prompt go on: an editor asks ahead for the text after a completion that it shows."""
        newer = reading.job.fields
        for other in [*self.readings]:
            older = other.job.fields
            of_editor = reading.job.kind == other.job.kind == "infill" and other.editor == reading.editor
            goes_on = older == newer or (ahead and older["prompt"].startswith(newer["prompt"]))
            if of_editor and not goes_on and is_typed_on(older, newer):
                self.replaced += 1
                other.replaced = True
                self.leave(other)  # ends its completion at once if nobody else reads it: a client may be slow
                other.woken.set()

    def leave(self, reading: Reading) -> None:
        """Remove a reading that has ended or whose client has left. The last reader to leave ends the completion; until
        then, its place counts as held by a client who stays."""
        if reading not in self.readings:
            return
        self.readings.remove(reading)
        shared = reading.shared
        if others := [other for other in self.readings if other.shared is shared]:
            shared.job.client = others[0].job.client
            self._moved()
        elif shared.task:
            shared.task.cancel()

    def remember(self, client: str, shared: Shared) -> None:
        """Keep a finished completion for a client who types its text. A plain completion may be a program's, which
        relies on its limit: a text cut by the limit must not begin another answer."""
        begun = [value for kind, value in shared.pairs if kind == "started"][-1]
        reason = shared.pairs[-1][1].get("finish_reason", "stop")
        if shared.job.kind != "completion" or reason != "length":
            text = "".join(read_text(value) for kind, value in shared.pairs if kind == "text")
            self.predictions.add(client, shared.job.fields, text, begun, reason)


class Warming:
    """Owns the prompts to be read into a backend's cache while the backend is idle, and the tasks that read them.
    `choose` sets the model of a prompt and returns its backend, or None; `answer` makes the backend read the prompt."""

    def __init__(
        self, choose: Callable[[Job], Backend | None], answer: Callable[[Job, Backend], AsyncGenerator[Pair, None]]
    ) -> None:
        self._choose, self._answer = choose, answer
        self.waiting: dict[str, Job] = {}  # by client

    def add(self, job: Job) -> None:
        """Queue this prompt to be read. Reading takes no place, waits for an idle backend, and stops when this backend
        gets a request; then the prompt waits again. Only the newest prompt of each client is kept."""
        self.waiting.pop(job.client, None)
        self.waiting[job.client] = job
        if len(self.waiting) > MAX_TO_WARM:
            del self.waiting[next(iter(self.waiting))]
        self.next()

    def next(self) -> None:
        """Start to read each prompt whose backend is idle."""
        for job in [*self.waiting.values()]:
            if backend := self._choose(job):
                del self.waiting[job.client]
                task = asyncio.create_task(self._read(job, backend))
                backend.warming = job, task
                task.add_done_callback(functools.partial(self._end, backend))  # even if it never begins

    async def _read(self, job: Job, backend: Backend) -> None:
        try:
            async with contextlib.aclosing(self._answer(job, backend)) as pairs:
                async for _ in pairs:
                    pass
        except HttpError as error:
            log.info("%s: no prompt was read ahead: %s", backend.id, error.message)
        except Exception as exception:
            internal_error(exception)

    def _end(self, backend: Backend, task: asyncio.Task[None]) -> None:
        backend.warming = None
        if not task.cancelled():
            self.next()

    async def stop(self, backend: Backend) -> None:
        """Stop reading ahead at a backend that a request needs. The interrupted prompt waits again."""
        if backend.warming:
            job, task = backend.warming
            if job.client not in self.waiting:
                self.add(job)  # again, later: the backend keeps the part that it has read
            task.cancel()
            await asyncio.wait([task])
