"""One backend: its places, its breaker, its ratios, what is known of its models, and the counts of what it did.

A `Job` is one completion on its way. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cerebrum.pi.breaker import Breaker
from cerebrum.pi.dialects import APIS, DEFAULT_TOKENS, LENGTH, Wanted, read_listed, read_props
from cerebrum.pi.engines import READING_SECONDS, Translator, translate
from cerebrum.pi.upstream import (
    ASIDE_SECONDS,
    JSON,
    MAX_ERROR_BYTES,
    MAX_JSON_BYTES,
    MAX_MESSAGE_CHARACTERS,
    MAX_TOKENS_BYTES,
    BackendConfig,
    BackendFailure,
    Misfit,
    Pair,
    TooLong,
    Upstream,
    relay,
)
from cerebrum.text.languages import BY_NAME
from cerebrum.text.prompt import MIN_RATIO, TEMPLATE_TOKENS, Ratio, prepare
from cerebrum_common import Field, HttpError, Model, log, printable

# --------------------------------------------------------------------------------------------- models

TOLD = {
    "n_ctx": LENGTH,
    "loaded": Field(bool),
    "encoding": Field(str, 1, 100),
    "memory_mb": Field(float, 0, 10**9),
}


def read_models(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the /v1/models of a backend of our own tells of each model that it has: of TOLD what it tells.

    >>> read_models({"models": [{"id": "m", "loaded": False, "path": "/x"}, {"id": "n", "available": False}]})
    {'m': {'loaded': False}}
    """
    listed = answer.get("models")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    models: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if isinstance(entry.get("id"), str) and entry.get("available") is not False:
            models[entry["id"]] = {name: entry[name] for name, kind in TOLD.items() if kind.accepts(entry.get(name))}
    return models


def find_models(models: Sequence[Model], listed: Mapping[str, dict[str, Any]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Which of our models a backend has: by our id its own name for it, and what it tells. It has a model if it lists
    the id, an alias, or the file's name with or without its folder and ending."""
    names = {re.split(r"[/\\\\]", name)[-1].removesuffix(".gguf"): name for name in reversed([*listed])}
    found = {}
    for model in models:
        file = names.get(model.file.removesuffix(".gguf")) if model.file else None
        name = next((name for name in (model.id, *model.aliases) if name in listed), file)
        if name is not None:
            found[model.id] = name, listed[name]
    return found


def read_loaded(answer: Mapping[str, Any]) -> list[str]:
    """The ids of the models in the memory of a backend of our own, from its /health."""
    loaded = answer.get("models_loaded")
    return [id for id in loaded if isinstance(id, str)] if isinstance(loaded, list) else []


DEFAULT_N_CTX = 4096  # until a backend tells its own
MODELS_SECONDS = 60.0  # the age at which a backend's list of models is asked for again
BUSY_SECONDS, MAX_BUSY_SECONDS = 0.1, 1.0  # before a dialect's request asks a busy backend again; the pause doubles
WAIT_SECONDS = {"infill": 3.0, "completion": 30.0, "chat": 30.0}  # for a place; minuet gives up after 3 s
WITHOUT_MODEL = frozenset({"MODEL_NOT_FOUND", "MODEL_LOAD_FAILED"})  # another model may do better
NEVER_ASKED = "VPS backend has not been asked yet"
BREAKER_OPEN = "VPS backend is unavailable (circuit breaker open)"


SUPERSEDED = "SUPERSEDED"


@dataclass(slots=True)
class Attempts:
    """Where a job has been in vain, and what came of it."""

    tried: list[Backend] = field(default_factory=list)  # that have failed it
    busy: list[Backend] = field(default_factory=list)  # that have answered 429 to a dialect's request
    pause: float = BUSY_SECONDS  # before they are asked again
    without: list[tuple[Backend, str]] = field(default_factory=list)  # those whose model could not be loaded
    failure: HttpError | None = None  # of the one whose error says most


@dataclass(frozen=True, slots=True)
class Sent:
    """What of a job's prompt was sent to a backend."""

    n_ctx: int = 0  # of the model, in tokens
    kept: Mapping[str, Any] = field(default_factory=dict)  # how much of the text, for the client
    weight: int = 0  # of the prompt, for the ratio
    room: int = 0  # tokens that the context has left for the answer
    above: str = ""  # the text before the cursor
    cut: bool = False  # to what can be read in the time that the client allows


@dataclass(slots=True)
class Came:
    """What has come back of a job."""

    tokens: int = 0
    size: int = 0  # bytes of text events
    first: float = 0.0  # when the first token came, as `Job.started`
    last: float = 0.0  # when its backend said that the answer is whole
    reason: str = ""  # why the answer ended, one of REASONS, or SUPERSEDED


@dataclass(slots=True, eq=False)
class Place:
    """A place that a job holds at a backend."""

    backend: Backend
    ticket: int  # of the backend's breaker
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set once it is given back


@dataclass(slots=True, eq=False)
class Job:
    """One completion: what the client asked, and where it stands."""

    fields: dict[str, Any]  # as `read_completion` in cm4d.py gives them
    session: str = ""  # unique across clients; "" without one
    end: Callable[[HttpError], None] = lambda _: None  # ends its request with this error, whatever it is waiting for
    limit: float = math.inf  # bytes of text events that its client's API can take
    kind: str = ""  # of a dialect's request: "infill", "completion" or "chat"; "" for our own API
    client: str = ""  # of a dialect's request: its address
    notes: dict[str, Any] = field(default_factory=dict)  # for its request's line in the log
    started: float = field(default_factory=time.perf_counter)
    model: str = ""  # its id, once one is chosen
    place: Place | None = None  # that it holds
    attempts: Attempts = field(default_factory=Attempts)
    sent: Sent = Sent()
    came: Came = field(default_factory=Came)

    @property
    def superseded(self) -> bool:
        """A newer request of its session has ended it."""
        return self.came.reason == SUPERSEDED

    def patience(self) -> float:
        """Seconds for which a dialect's request still waits for a place."""
        return self.started + WAIT_SECONDS[self.kind] - time.perf_counter()


# ------------------------------------------------------------------------------------------- prompts

SAMPLED_BY = ("max_tokens", "temperature", "top_p", "seed", "stop")
PASSED_TO_BACKENDS = (*SAMPLED_BY, "stop_at", "progress", "indent", "predict_ms")
MARGIN_TOKENS = 8  # of n_ctx, never used
PLAUSIBLE = 4  # what another engine counts is believed if it is within this factor of our estimate
REFIT = 0.95  # the one retry assumes this share of the weight per token that the backend has just counted
SPARE = 1.1  # other engines refuse an answer that might not fit, so their prompt counts as this much longer


def prompt_budget(n_ctx: int, max_tokens: int) -> int:
    """The largest prompt in tokens. An answer gets at most three quarters of the context, however long it may be.

    >>> prompt_budget(4096, 512), prompt_budget(2048, 2048)
    (3576, 504)
    """
    return max(n_ctx - max_tokens, n_ctx // 4) - MARGIN_TOKENS


MIN_READ_TOKENS = 32  # the time of fewer is mostly that of the first token
MAX_CACHED = 16  # texts that a backend has read, some 10 KB each
SAME_BEGINNING = 200  # characters


@dataclass(frozen=True, slots=True)
class Limits:
    """What a prompt is fitted to."""

    n_ctx: int  # tokens of the context
    ratio: float  # weight per token
    most: int = sys.maxsize  # tokens, if an engine has refused more without a number


class Prompts:
    """What one backend has shown of prompts. Owns its ratios, its reading speeds, and the texts that it has read."""

    def __init__(self, is_engine: bool) -> None:
        self.ratio = Ratio()
        self.speed: dict[str, float] = {}  # of each model: tokens of a prompt per second
        self._is_engine = is_engine
        self._read: list[tuple[str, str, str]] = []  # client, model, and a text before a cursor

    def limits(self, job: Job, n_ctx: int) -> Limits:
        return Limits(n_ctx, self.ratio.get(job.model))

    def prepare(self, job: Job, limits: Limits) -> tuple[dict[str, Any], Sent]:
        """The fields of vpsd's request, with a prompt that fits, and what of the text is in it."""
        fields, n_ctx = job.fields, limits.n_ctx
        longest = n_ctx // 4 if job.kind == "chat" else n_ctx  # a chat's answer is short, whatever its limit
        # In the dialects, a small limit leaves no more room than the usual one: a warm-up, with its limit of 0, must
        # fit the same text as the request that follows.
        least = DEFAULT_TOKENS if job.kind else 0
        budget = prompt_budget(n_ctx, min(max(fields["max_tokens"], least), longest))
        if self._is_engine:
            budget = min(int(budget / SPARE), limits.most)
        prepared = prepare(fields, fields["mode"], budget, limits.ratio, *self._max_fresh(job))
        tokens = prepared.weight / limits.ratio + TEMPLATE_TOKENS[fields["mode"]]
        room = n_ctx - int(SPARE * tokens) - MARGIN_TOKENS
        passed = {name: fields[name] for name in PASSED_TO_BACKENDS if fields.get(name) is not None}
        if job.session:
            passed["session"] = job.session
        if language := BY_NAME.get(fields["language"].lower()):  # a backend knows the syntax of these
            passed["language"] = language
        sent = Sent(n_ctx, prepared.kept, prepared.weight, room, prepared.above, prepared.cut)
        return {**passed, **prepared.body}, sent

    def _max_fresh(self, job: Job) -> tuple[int | None, list[str]]:
        """(how many tokens may be read for this job, texts that were read for its client before)."""
        speed, limit = self.speed.get(job.model), job.fields.get("prompt_ms", 0)
        if limit <= 1 or not speed or not job.fields["max_tokens"]:
            return None, []
        return int(speed * limit / 1000), [text for *who, text in self._read if who == [job.client, job.model]]

    def refit(self, job: Job, error: TooLong) -> Limits:
        """The limits of another try after a prompt was refused as too long. What another engine counts may be misread,
        so it must be plausible; without a number, the prompt becomes shorter by a quarter."""
        sent = job.sent
        counted, n_ctx = error.extra.get("prompt_tokens", 0), error.extra.get("n_ctx", sent.n_ctx)
        estimated, most = sent.weight / self.ratio.get(job.model), sys.maxsize
        if self._is_engine:
            counted = counted if self._is_plausible(job, counted) else 0
            n_ctx = min(n_ctx, sent.n_ctx)
        if counted:
            self.ratio.learn(job.model, sent.weight, counted)
        else:
            most = int(0.75 * estimated)
        return Limits(n_ctx, max(REFIT * sent.weight / (counted or max(1, round(estimated))), MIN_RATIO), most)

    def _is_plausible(self, job: Job, counted: int) -> bool:
        """Whether a prompt may have so many tokens."""
        estimated = job.sent.weight / self.ratio.get(job.model)
        return estimated / PLAUSIBLE <= counted <= estimated * PLAUSIBLE

    def learn(self, job: Job, result: Mapping[str, Any]) -> None:
        """Learn from a whole answer how many tokens a text has, how fast it was read, and that it was."""
        counted, seconds = result.get("prompt_tokens", 0), result.get("ttft")
        if not counted or (self._is_engine and not self._is_plausible(job, counted)):
            return
        self.ratio.learn(job.model, job.sent.weight, counted)
        read = counted - result.get("cached_tokens", 0)
        if seconds and seconds > 0.001 and read >= MIN_READ_TOKENS:
            speed = read / seconds
            self.speed[job.model] = self.speed.get(job.model, speed) * 0.75 + speed * 0.25
        if job.kind in ("infill", "completion"):
            # What begins alike is of the same file.
            mine, beginning = (job.client, job.model), job.sent.above[:SAME_BEGINNING]
            others = [one for one in self._read if one[:2] != mine or not one[2].startswith(beginning)]
            self._read = [*others, (*mine, job.sent.above)][-MAX_CACHED:]


# ------------------------------------------------------------------------------------------- the backend


class Backend:
    """One backend: what is known of it, and what it does for us. Owns its places, its breaker and its ratios."""

    def __init__(self, config: BackendConfig, catalog: Sequence[Model]) -> None:
        self._configure(config, catalog, Upstream(config))
        self.api = APIS.get(config.api)  # None: one of our own
        self.breaker = Breaker(random.random)
        self.prompts = Prompts(is_engine=self.api is not None)
        self.active: list[Job] = []  # that hold a place
        self.requests_total = self.requests_failed = 0
        self.tokens = 0  # that it has generated
        self.warming: tuple[Job, asyncio.Task[None]] | None = None
        self.wake = asyncio.Event()  # probe now
        self.probes = 0  # that have ended
        self.probed = time.monotonic()  # when the last one did
        self.is_known = False  # it has been asked for anything
        self.trouble = NEVER_ASKED  # what is wrong with it; "": nothing
        self.response_ms: float | None = None  # of the last good probe
        # Its models by our id: what it tells of each, with `n_ctx`, and its name for it. None until a list came.
        self.models: dict[str, dict[str, Any]] | None = None
        self.names: dict[str, str] = {}
        self.models_loaded: list[str] = []  # by the last good probe
        self._strange = ""  # what it listed when it had none of our models
        self._models_until = 0.0

    def _configure(self, config: BackendConfig, catalog: Sequence[Model], upstream: Upstream) -> None:
        self.config, self.id, self.limit = config, config.id, config.max_concurrent
        self.fim = {model.id: model.fim for model in catalog} if config.infill == "fim" else {}
        self.upstream, self._catalog = upstream, catalog

    def adopt(self, other: Backend) -> None:
        """Take the settings of another object with the same id and API. What is known of an address is forgotten if
        there is another one; what was counted stays."""
        if other.config.endpoint != self.config.endpoint:
            self.breaker.reset()
            self.trouble, self.models, self.names, self.models_loaded = NEVER_ASKED, None, {}, []
        self.upstream.close()
        self._configure(other.config, other._catalog, other.upstream)
        self._models_until = 0.0
        self.wake.set()

    @property
    def available(self) -> bool:
        return not self.trouble and self.breaker.state != "open"

    @property
    def message(self) -> str:
        """Why it is not available."""
        return "" if self.available else self.trouble or BREAKER_OPEN

    @property
    def warms(self) -> bool:
        """Whether reading a prompt ahead costs nothing."""
        return self.api is None or self.api.warms

    @property
    def may_warm(self) -> bool:
        """Whether it may read a prompt ahead now."""
        return self.warms and not self.active and not self.warming and self.breaker.state == "closed"

    @property
    def is_paid(self) -> bool:
        """Whether it is probably a cloud."""
        return self.config.api == "openai" and self.config.endpoint.tls

    @property
    def running(self) -> list[Job]:
        """The jobs that hold a place, but for those that a newer one of their session ends."""
        return [job for job in self.active if not job.superseded]

    def load(self) -> float:
        """The share of its places that is taken."""
        return len(self.active) / self.limit

    def has_place(self, job: Job) -> bool:
        """Whether it has a place for this job, which ends the older ones of its session."""
        if len(self.active) < self.limit:
            return True
        session = job.session or None
        return sum(other.session != session for other in self.running) < self.limit

    def has(self, model: str) -> bool:
        """Whether it may have a model. Of another engine, the name for it must be known."""
        return self.api is None if self.models is None else model in self.models

    def n_ctx(self, model: str) -> int:
        told = (self.models or {}).get(model)
        return int(told["n_ctx"]) if told else self.config.n_ctx or DEFAULT_N_CTX

    # Probing.

    async def probe(self) -> None:
        """Bring `trouble`, `response_ms` and `models` up to date. Another engine that is answering is not disturbed:
        llama_cpp.server would end its answer if anybody asked for its models, and it hears nothing while it reads a
        prompt. The answer itself shows that the engine is there."""
        self.probed = started = time.monotonic()
        if self.api and self.breaker.state == "closed" and (self.active or self.warming):
            return
        try:
            loaded = await self._ask_health()
            now = time.monotonic()
            self.response_ms = round((now - started) * 1000, 1)
            self.breaker.healthy(now)
            if self.trouble or now >= self._models_until or loaded != self.models_loaded:
                await self.learn_models()
            self.models_loaded = loaded
        except HttpError as error:
            self.found(error.message)
        else:
            self.found("")
        self.is_known = True
        self.probes += 1
        self.probed = time.monotonic()

    async def _ask_health(self) -> list[str]:
        """The ids of the models in its memory. Of another engine the status is enough."""
        if self.api is None:
            return read_loaded(await self.upstream.get("/health", MAX_ERROR_BYTES))
        try:
            async with self.upstream.ask("GET", self.api.health, kind=JSON, seconds=ASIDE_SECONDS):
                return []
        except HttpError as error:
            if error.code != "RATE_LIMIT":  # who refuses is there
                raise
            return []

    def found(self, trouble: str) -> None:
        if trouble != self.trouble:
            level = logging.WARNING if trouble else logging.INFO
            log.log(level, "%s: %s", self.id, trouble or "VPS backend is available")
        self.trouble = trouble

    async def learn_models(self) -> None:
        """Ask which models it has. If it fails to answer, the last list stays. HttpError if no list has ever come,
        except from a backend of our own, which can be asked without one; Misfit if it does not let us in."""
        if self.api and self.active:
            return  # a completion has begun since this probe did
        self._models_until = time.monotonic() + MODELS_SECONDS
        try:
            answer = await self.upstream.get("/v1/models", MAX_JSON_BYTES)
            listed = read_listed(answer) if self.api else read_models(answer)
            props = await self._ask_props()
        except HttpError as error:
            if isinstance(error, Misfit) or (self.api and self.models is None):
                self._models_until = 0.0
                raise
            log.warning("%s: no list of models: %s", self.id, error.message)
            return
        found = find_models(self._catalog, listed)
        strange = "" if found else printable(", ".join(sorted(listed)))[:MAX_MESSAGE_CHARACTERS] or "none"
        if strange and strange != self._strange:
            log.warning("%s: expected a model of models.toml, got %s", self.id, strange)
        self._strange = strange
        self.names = {id: name for id, (name, _) in found.items()}
        fixed = {"n_ctx": self.config.n_ctx} if self.config.n_ctx else {}
        self.models = {id: {"n_ctx": DEFAULT_N_CTX} | props | about | fixed for id, (_, about) in found.items()}

    async def _ask_props(self) -> dict[str, Any]:
        if not self.api or not self.api.props:
            return {}
        try:
            return read_props(await self.upstream.get(self.api.props, MAX_JSON_BYTES))
        except HttpError:
            return {}  # it can be turned off

    # Places.

    def take(self, job: Job, model: str) -> None:
        """Give the job a place for a completion by this model. The breaker must admit it."""
        ticket = self.breaker.admit(time.monotonic())
        assert ticket is not None
        job.model, job.place = model, Place(self, ticket)
        self.active.append(job)
        self.requests_total += 1

    def release(self, job: Job) -> None:
        """Take the job's place back."""
        assert job.place
        self.active.remove(job)
        self.breaker.left(job.place.ticket)
        job.place.gone.set()
        job.place = None

    def count(self, job: Job, tokens: int) -> None:
        """Tokens have come for a job, or a whole answer without any; the backend works."""
        self.tokens += tokens
        if job.place and (self.trouble or self.breaker.failures):
            job.place.ticket = self.breaker.succeeded(job.place.ticket)
            self.found("")

    # Completing.

    @contextlib.asynccontextmanager
    async def ask(self, job: Job, asked: Mapping[str, Any]) -> AsyncIterator[AsyncGenerator[Pair, None]]:
        """Send a request, whose fields are those of vpsd, and yield its answer: ("begun", None) when it begins, then
        the pairs that `Gateway.complete` describes."""
        model = self.names.get(job.model, job.model)
        if self.api is None:
            async with (
                self.upstream.ask("POST", "/v1/inference/stream", {"model": model, **asked}) as answer,
                contextlib.aclosing(relay(answer, self.config.key)) as pairs,
            ):
                yield pairs
            return
        api, fim = self.api, self.fim.get(job.model, ())
        dialect = api.chat if "messages" in asked else api.infill if "suffix" in asked else api.complete
        body = dialect.write(Wanted(asked, model, fim, job.sent.room))
        translator = Translator(dialect, asked, [mark.strip() for mark in fim])
        async with (
            self.upstream.send("POST", dialect.paths[0], body, READING_SECONDS) as answer,
            contextlib.aclosing(translate(self.upstream, answer, translator)) as pairs,
        ):
            yield pairs

    def failed(self, ticket: int, error: HttpError) -> None:
        """A request to it has ended with this error."""
        if isinstance(error, Misfit):
            self.found(error.message)
        elif isinstance(error, BackendFailure):
            self.breaker.failed(ticket, time.monotonic())
            log.warning("%s: %s; the breaker is %s", self.id, error.message, self.breaker.state)
            self.trouble = error.message
            self.wake.set()  # a probe finds out at once whether it is gone

    def refused(self, job: Job, error: HttpError) -> None:
        """Remember what a refusal tells about a model."""
        if error.code in WITHOUT_MODEL:
            self._models_until = 0.0
            self.wake.set()
        n_ctx = error.extra.get("n_ctx", 0)
        if isinstance(error, TooLong) and 0 < n_ctx < job.sent.n_ctx and self.models and job.model in self.models:
            self.models[job.model]["n_ctx"] = n_ctx  # until the next list

    async def tokenize(self, model: str, fields: Mapping[str, Any]) -> list[Any]:
        """The tokens of a text, as llama-server's /tokenize has it."""
        ticket = self.breaker.admit(time.monotonic()) or 0
        asked, path = dict(fields), self.api.tokenize if self.api else "/v1/tokenize"
        if not self.api:
            asked = {"text": fields["content"], "first": fields["add_special"], "special": fields["parse_special"]}
            asked["model"] = self.names.get(model, model)
        try:
            answer = await self.upstream.post(path, asked, MAX_TOKENS_BYTES)
            self.breaker.succeeded(ticket)
        except HttpError as error:
            self.failed(ticket, error)
            raise
        finally:
            self.breaker.left(ticket)
        tokens = answer.get("tokens", [])
        return tokens if isinstance(tokens, list) else []


def notes_of(job: Job) -> dict[str, Any]:
    """What the log says of a completion: its model, its tokens, and the seconds to the first one."""
    notes: dict[str, Any] = {"model": job.model} if job.model else {}
    if job.came.first:
        notes |= {"tokens": job.came.tokens, "ttft": f"{job.came.first - job.started:.2f}s"}
    return notes
