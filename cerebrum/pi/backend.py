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
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any

from cerebrum.pi.breaker import Breaker
from cerebrum.pi.dialects import APIS, LENGTH, Wanted, read_listed, read_props
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
from cerebrum.text.prompt import Ratio
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


@dataclass(slots=True, eq=False)
class Job:
    """One completion: what the client asked, what was sent to a backend, and what has come back."""

    fields: dict[str, Any]  # as `read_completion` gives them
    session: str = ""  # from `session_of`; "" without one
    end: Callable[[HttpError], None] = lambda _: None  # ends its request with this error, whatever it is waiting for
    limit: float = math.inf  # bytes of text events that its client's API can take
    kind: str = ""  # of a dialect's request: "infill", "completion" or "chat"; "" for our own API
    client: str = ""  # of a dialect's request: its address
    backend: Backend | None = None  # where it holds a place
    tried: list[Backend] = field(default_factory=list)  # that have failed it
    busy: list[Backend] = field(default_factory=list)  # that have answered 429 to a dialect's request
    pause: float = BUSY_SECONDS  # before they are asked again
    without: list[tuple[Backend, str]] = field(default_factory=list)  # those whose model could not be loaded
    failure: HttpError | None = None  # of the one whose error tells most
    notes: dict[str, Any] = field(default_factory=dict)  # for its request's line in the log
    model: str = ""
    mode: str = ""
    n_ctx: int = 0  # of the model
    kept: dict[str, Any] = field(default_factory=dict)  # how much of the prompt was sent
    weight: int = 0  # of the prompt that was sent, for the ratio
    counted: int = 0  # tokens of it, if the backend has refused it as too long
    most: int = sys.maxsize  # tokens that another engine may get, if it has refused more without a number
    room: int = 0  # tokens that the context has left for the answer
    above: str = ""  # the text before the cursor that was sent
    cut: bool = False  # to what can be read in the time that the client allows
    tokens: int = 0  # relayed so far
    first_token: float = 0.0  # when the first of them came, as `started`
    result_came: float = 0.0  # when its backend said that it is whole
    reason: str = ""  # and why it ended, one of REASONS
    size: int = 0  # bytes of text events so far
    ticket: int = 0  # of the breaker
    superseded: bool = False  # a newer request of its session has ended it
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set once it holds no place any more
    started: float = field(default_factory=time.perf_counter)

    def patience(self) -> float:
        """Seconds for which a dialect's request still waits for a place."""
        return self.started + WAIT_SECONDS[self.kind] - time.perf_counter()


class Backend:
    """One backend: what is known of it, and what it does for us. Owns its places, its breaker and its ratios."""

    def __init__(self, config: BackendConfig, catalog: Sequence[Model]) -> None:
        self._configure(config, catalog, Upstream(config))
        self.api = APIS.get(config.api)  # None: one of our own
        self.breaker = Breaker(random.random)
        self.ratio = Ratio()
        self.active: list[Job] = []  # that hold a place
        self.requests_total = self.requests_failed = 0
        self.tokens = 0  # that it has generated
        self.read_speed: dict[str, float] = {}  # of each model: tokens of a prompt per second
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

    def load(self) -> float:
        """The share of its places that is taken."""
        return len(self.active) / self.limit

    def estimated_tokens(self, job: Job) -> float:
        """Of the job's prompt, by the ratio that it has learned."""
        return job.weight / self.ratio.get(job.model)

    def has_place(self, job: Job) -> bool:
        """Whether it has a place for this job, which ends the older ones of its session."""
        if len(self.active) < self.limit:
            return True
        session = job.session or None
        return sum(not other.superseded and other.session != session for other in self.active) < self.limit

    def has(self, model: str) -> bool:
        """Whether it may have a model. Of another engine, the name for it must be known."""
        return self.api is None if self.models is None else model in self.models

    def n_ctx(self, model: str) -> int:
        told = (self.models or {}).get(model)
        return int(told["n_ctx"]) if told else self.config.n_ctx or DEFAULT_N_CTX

    def describe(self, now: float) -> dict[str, Any]:
        """For /v1/stats."""
        return {
            "id": self.id,
            "api": self.config.api,
            "available": self.available,
            "message": self.message,
            "response_time_ms": self.response_ms,
            "requests_total": self.requests_total,
            "requests_active": len(self.active),
            "requests_failed": self.requests_failed,
            "max_concurrent": self.limit,
            "tokens_total": self.tokens,
            "models": list(self.models or ()),
            "models_loaded": self.models_loaded,
            "breaker": self.breaker.describe(now),
        }

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
            log.log(
                logging.WARNING if trouble else logging.INFO, "%s: %s", self.id, trouble or "VPS backend is available"
            )
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
        n_ctx = {"n_ctx": DEFAULT_N_CTX} | props
        fixed = {"n_ctx": self.config.n_ctx} if self.config.n_ctx else {}
        self.models = {id: n_ctx | about | fixed for id, (_, about) in found.items()}

    async def _ask_props(self) -> dict[str, Any]:
        if not self.api or not self.api.props:
            return {}
        try:
            return read_props(await self.upstream.get(self.api.props, MAX_JSON_BYTES))
        except HttpError:
            return {}  # it can be turned off

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
        body = dialect.write(Wanted(asked, model, fim, job.room))
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
        if isinstance(error, TooLong) and 0 < n_ctx < job.n_ctx and self.models and job.model in self.models:
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

    def learn_speed(self, model: str, speed: float) -> None:
        """How fast it reads prompts, in tokens per second."""
        self.read_speed[model] = self.read_speed.get(model, speed) * 0.75 + speed * 0.25


def first_there(backends: Sequence[Backend]) -> Backend:
    """The first of these that is there, or else the first."""
    return next((backend for backend in backends if backend.available), backends[0])


def notes_of(job: Job) -> dict[str, Any]:
    """What the log says of a completion: its model, its tokens, and the seconds to the first one."""
    notes: dict[str, Any] = {"model": job.model} if job.model else {}
    if job.first_token:
        notes |= {"tokens": job.tokens, "ttft": f"{job.first_token - job.started:.2f}s"}
    return notes
