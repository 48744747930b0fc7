"""One backend: its places, breaker, ratios, known models and counters. And `Job`, one completion in progress."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cerebrum.fields import Field, printable
from cerebrum.pi import upstream
from cerebrum.pi.breaker import Breaker
from cerebrum.pi.dialects import APIS, DEFAULT_TOKENS, LENGTH, Wanted, members_of, read_listed, read_props
from cerebrum.pi.engines import READING_SECONDS, Translator, translate
from cerebrum.pi.upstream import BackendConfig, BackendFailure, Misfit, Pair, TooLong, Upstream, relay
from cerebrum.text.languages import BY_NAME
from cerebrum.text.prompt import MIN_RATIO, TEMPLATE_TOKENS, Prepared, Ratio, prepare
from cerebrum_common import FIM_LAYOUTS, HttpError, Model, log

# --------------------------------------------------------------------------------------------- models

TOLD = {
    "n_ctx": LENGTH,
    "loaded": Field(bool),
    "encoding": Field(str, 1, 100),
    "memory_mb": Field(float, 0, 10**9),
    "fim_layout": Field(str, choices=FIM_LAYOUTS),
}


def read_models(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parse vpsd's /v1/models: for each available model, the valid ones of the TOLD fields.

    >>> read_models({"models": [{"id": "m", "loaded": False, "path": "/x"}, {"id": "n", "available": False}]})
    {'m': {'loaded': False}}
    """
    listed, models = answer.get("models"), dict[str, dict[str, Any]]()
    for entry in map(members_of, listed if isinstance(listed, list) else ()):
        if isinstance(entry.get("id"), str) and entry.get("available") is not False:
            models[entry["id"]] = {name: entry[name] for name, kind in TOLD.items() if kind.accepts(entry.get(name))}
    return models


def find_models(models: Sequence[Model], listed: Collection[str]) -> dict[str, str]:
    """Match our models with a backend's list: our id -> the backend's name. A listed name matches a model's id, one of
    its aliases, or its file name, with or without folder and ending."""
    names = {re.split(r"[/\\\\]", name)[-1].removesuffix(".gguf"): name for name in reversed([*listed])}
    found = {}
    for model in models:
        file = names.get(model.file.removesuffix(".gguf")) if model.file else None
        name = next((name for name in (model.id, *model.aliases) if name in listed), file)
        if name is not None:
            found[model.id] = name
    return found


DEFAULT_N_CTX = 4096  # until a backend reports its own
MODELS_SECONDS = 60.0  # the age at which a backend's list of models is fetched again
BUSY_SECONDS, MAX_BUSY_SECONDS = 0.1, 1.0  # pause before a dialect's request asks a busy backend again; it doubles
WAIT_SECONDS = {"infill": 3.0, "completion": 30.0, "chat": 30.0}  # for a place; minuet gives up after 3 s
WITHOUT_MODEL = frozenset({"MODEL_NOT_FOUND", "MODEL_LOAD_FAILED"})  # another model may do better
NEVER_ASKED = "VPS backend has not been asked yet"
BREAKER_OPEN = "VPS backend is unavailable (circuit breaker open)"
SUPERSEDED = "SUPERSEDED"


@dataclass(slots=True)
class Came:
    """What a job has received, and when, in seconds of `time.perf_counter`."""

    started: float = field(default_factory=time.perf_counter)  # when the job was made
    tokens: int = 0
    size: int = 0  # bytes of text events
    first: float = 0.0  # when the first token came
    last: float = 0.0  # when the backend reported the answer as complete
    reason: str = ""  # why the answer ended: one of cm4d.py's FINISHED, "other", or SUPERSEDED


@dataclass(slots=True, eq=False)
class Job:
    """One completion: the client's request and its progress."""

    fields: dict[str, Any]  # as `read_completion` in cm4d.py returns them
    session: str = ""  # unique across clients; "" without one
    end: Callable[[HttpError], None] = lambda _: None  # ends the request with this error, whatever it waits for
    limit: float = math.inf  # bytes of text events that its client's API can take
    kind: str = ""  # of a dialect's request: "infill", "completion" or "chat"; "" for our own API
    client: str = ""  # the client's address, for a dialect's request
    asked: float = field(default_factory=time.perf_counter)  # when the last client that shares it asked
    notes: dict[str, Any] = field(default_factory=dict)  # for the request's line in the log
    model: str = ""  # the id of the model chosen last
    backend: Backend | None = None  # where it holds a place
    ticket: int = 0  # of this backend's breaker
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set when it gives the place back
    tried: list[Backend] = field(default_factory=list)  # backends that failed it
    busy: list[Backend] = field(default_factory=list)  # backends that answered 429 to a dialect's request
    pause: float = BUSY_SECONDS  # before the busy backends are asked again
    without: list[tuple[Backend, str]] = field(default_factory=list)  # backends, and the models they could not load
    failure: HttpError | None = None  # the most informative error so far
    sent: Prepared = field(default_factory=lambda: Prepared({}, {}, 0))  # the part of its text that was sent last
    n_ctx: int = 0  # the context in tokens that it was fitted to
    room: int = 0  # tokens left there for the answer
    came: Came = field(default_factory=Came)

    @property
    def superseded(self) -> bool:
        """Whether a newer request of its session has ended this job."""
        return self.came.reason == SUPERSEDED

    def patience(self) -> float:
        """Seconds that a dialect's request may still wait for a place."""
        return self.asked + WAIT_SECONDS[self.kind] - time.perf_counter()


# ------------------------------------------------------------------------------------------- prompts

SAMPLED_BY = ("max_tokens", "temperature", "top_p", "seed", "stop")
PASSED_TO_BACKENDS = (*SAMPLED_BY, "stop_at", "progress", "indent", "predict_ms", "special")
MARGIN_TOKENS = 8  # of n_ctx, never used
PLAUSIBLE = 4  # another engine's token count is accepted if it is within this factor of our estimate
REFIT = 0.95  # the one retry assumes this share of the weight per token that the backend has just measured
SPARE = 1.1  # other engines refuse or cut an answer that might not fit, so count their prompts longer by this factor


def prompt_budget(n_ctx: int, max_tokens: int) -> int:
    """The largest prompt in tokens. An answer gets at most three quarters of the context, however long it may be.

    >>> prompt_budget(4096, 512), prompt_budget(2048, 2048)
    (3576, 504)
    """
    return max(n_ctx - max_tokens, n_ctx // 4) - MARGIN_TOKENS


MIN_READ_TOKENS = 32  # for fewer tokens, the time is mostly the first token's
MAX_CACHED = 16  # texts that a backend has read, some 10 KB each
MAX_CACHED_EACH = 4  # of one client and model
SAME_BEGINNING = 200  # characters
FIRST_SPEED = 100.0  # prompt tokens per second, until measured: a small model on two cores


class Prompts:
    """Knowledge about one backend's prompts. Owns its ratios, its reading speeds, and the texts that it has read."""

    def __init__(self, is_engine: bool) -> None:
        self.ratio = Ratio()
        self.speed: dict[str, float] = {}  # prompt tokens per second, by model
        self._is_engine = is_engine
        self._read: list[tuple[str, str, str]] = []  # client, model, and a text up to a cursor

    def prepare(self, job: Job, n_ctx: int, layout: str, refused: TooLong | None) -> dict[str, Any]:
        """Fit the job's prompt, or fit it again after it was refused, and return the fields of vpsd's request."""
        fields, ratio, most = job.fields, self.ratio.get(job.model), sys.maxsize
        if refused:
            n_ctx = min(n_ctx, refused.extra.get("n_ctx", n_ctx))
            ratio, most = self._refit(job, refused.extra.get("prompt_tokens", 0))
        longest = n_ctx // 4 if job.kind == "chat" else n_ctx  # a chat's answer is short, whatever its limit
        # In the dialects, a limit below the default leaves no more room for the prompt: a warm-up, with its limit of 0,
        # must send the same text as the request that follows.
        least = DEFAULT_TOKENS if job.kind else 0
        budget = prompt_budget(n_ctx, min(max(fields["max_tokens"], least), longest))
        if self._is_engine:
            budget = min(int(budget / SPARE), most)
        job.sent = prepare(fields, fields["mode"], budget, ratio, *self._max_fresh(job), layout)
        tokens = job.sent.weight / ratio + TEMPLATE_TOKENS[fields["mode"]]
        job.n_ctx, job.room = n_ctx, n_ctx - int(SPARE * tokens) - MARGIN_TOKENS
        passed = {name: fields[name] for name in PASSED_TO_BACKENDS if fields.get(name) is not None}
        if job.session:
            passed["session"] = job.session
        if language := BY_NAME.get(fields["language"].lower()):  # backends know the syntax of these languages
            passed["language"] = language
        return {**passed, **job.sent.body}

    def _max_fresh(self, job: Job) -> tuple[int | None, list[str]]:
        """(the most tokens to read for this job, or None; the texts already read for its client and model)."""
        speed, limit = self.speed.get(job.model, FIRST_SPEED), job.fields.get("prompt_ms", 0)
        if limit <= 1 or not job.fields["max_tokens"]:
            return None, []
        return int(speed * limit / 1000), [text for *who, text in self._read if who == [job.client, job.model]]

    def _refit(self, job: Job, counted: int) -> tuple[float, int]:
        """(weight per token, the most tokens) for a retry after a backend has counted too many tokens. If the count is
        not plausible, the prompt becomes a quarter shorter."""
        weight, ratio = job.sent.weight, self.ratio.get(job.model)
        if self._is_plausible(job, counted):
            self.ratio.learn(job.model, weight, counted)
            return max(REFIT * weight / counted, MIN_RATIO), sys.maxsize
        return max(REFIT * ratio, MIN_RATIO), int(0.75 * weight / ratio)

    def _is_plausible(self, job: Job, counted: int) -> bool:
        """Whether the job's prompt may have this many tokens. Another engine's count may be misread."""
        estimated = job.sent.weight / self.ratio.get(job.model)
        return counted > 0 and (not self._is_engine or estimated / PLAUSIBLE <= counted <= estimated * PLAUSIBLE)

    def learn(self, job: Job, result: Mapping[str, Any]) -> None:
        """Learn from a complete answer: the weight per token, the reading speed, and the text that was read."""
        counted, seconds = result.get("prompt_tokens", 0), result.get("ttft")
        if not self._is_plausible(job, counted):
            return
        self.ratio.learn(job.model, job.sent.weight, counted)
        read = counted - result.get("cached_tokens", 0)
        if seconds and seconds > 0.001 and read >= MIN_READ_TOKENS:
            speed = read / seconds
            self.speed[job.model] = self.speed.get(job.model, speed) * 0.75 + speed * 0.25
        if job.kind in ("infill", "completion"):
            # Texts with the same beginning come from the same file: keep only the newest. With the suffix first, each
            # place in a file is a text of its own, so each client keeps few.
            mine, beginning = (job.client, job.model), job.sent.above[:SAME_BEGINNING]
            known = [one for one in self._read if one[:2] == mine and not one[2].startswith(beginning)]
            others = [one for one in self._read if one[:2] != mine]
            self._read = [*others, *known[1 - MAX_CACHED_EACH :], (*mine, job.sent.above)][-MAX_CACHED:]


# ------------------------------------------------------------------------------------------- the backend


class Backend:
    """One backend: what we know about it, and what it does for us. Owns its places, its breaker and its counts."""

    def __init__(self, config: BackendConfig, catalog: Sequence[Model]) -> None:
        self._configure(config, catalog, Upstream(config))
        self.api = APIS.get(config.api)  # None: vpsd
        self.breaker = Breaker(random.random)
        self.prompts = Prompts(is_engine=self.api is not None)
        self.active: list[Job] = []  # jobs that hold a place
        self.requests_total = self.requests_failed = 0
        self.tokens = 0  # generated so far
        self.warming: tuple[Job, asyncio.Task[None]] | None = None  # the prompt that it reads ahead; `Warming` sets it
        self.wake = asyncio.Event()  # probe now
        self.probes = 0  # completed
        self.probed = time.monotonic()  # when the last probe began
        self.trouble = NEVER_ASKED  # the reason why the backend cannot be used; "" if there is none
        self.response_ms: float | None = None  # of the last successful probe
        # By our id of a model: the reported fields, with `n_ctx` (None until the first list), and the backend's name.
        self.models: dict[str, dict[str, Any]] | None = None
        self.names: dict[str, str] = {}
        self.models_loaded: list[str] = []  # in its memory, by the last successful probe
        self._strange: str | None = None  # the names in its last list, if it had none of our models
        self._models_until = 0.0

    def _configure(self, config: BackendConfig, catalog: Sequence[Model], client: Upstream) -> None:
        self.config, self.id, self.limit = config, config.id, config.max_concurrent
        self.fim = {model.id: model for model in catalog if model.fim} if config.infill == "fim" else {}
        self.upstream, self._catalog = client, catalog

    def adopt(self, other: Backend) -> None:
        """Take over the settings of another object with the same id and API. A new address is a new, unknown host."""
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
    def message(self) -> str:  # why the backend is not available
        return "" if self.available else self.trouble or BREAKER_OPEN

    @property
    def warms(self) -> bool:
        """Whether the backend reads prompts ahead: reading costs nothing."""
        return self.api is None or self.api.warms

    @property
    def may_warm(self) -> bool:
        """Whether the backend may read a prompt ahead now, because it is idle."""
        return self.warms and not self.active and not self.warming and self.breaker.state == "closed"

    @property
    def is_paid(self) -> bool:
        """Whether the backend is probably a paid cloud service."""
        return self.config.api == "openai" and self.config.endpoint.tls

    @property
    def running(self) -> list[Job]:
        """The jobs that hold a place, without those superseded by a newer job of their session."""
        return [job for job in self.active if not job.superseded]

    def has_place(self, job: Job) -> bool:
        """Whether there is a place for this job, which ends the older jobs of its session."""
        if len(self.active) < self.limit:  # as nearly always
            return True
        return sum(other.session != (job.session or None) for other in self.running) < self.limit

    def has(self, model: str) -> bool:
        """Whether the backend may have a model. Without a list only vpsd may: others need their own name for it."""
        return self.api is None if self.models is None else model in self.models

    def n_ctx(self, model: str) -> int:
        told = (self.models or {}).get(model)
        return int(told["n_ctx"]) if told else self.config.n_ctx or DEFAULT_N_CTX

    def layout(self, model: str) -> str:
        """How a gap's prompt is laid out for a model, see `arrange_gap`. With "spmv2", a prompt ends in the middle of a
        line; other engines would not heal its last token."""
        if self.api is None:
            return str((self.models or {}).get(model, {}).get("fim_layout", "psm"))
        return "spm" if model in self.fim and self.fim[model].fim_layout == "spm" else "psm"

    # Probing.

    async def probe(self) -> None:
        """Update `trouble`, `response_ms` and `models`. Do not disturb another engine while it answers, which shows
        that it is up: llama_cpp.server would abort the answer, and cannot respond while it reads a prompt."""
        self.probed = started = time.monotonic()
        self.breaker.expire(started)
        if self.api and self.breaker.state == "closed" and (self.active or self.warming):
            return
        try:
            loaded = await self._ask_health()
            now = time.monotonic()
            self.response_ms = round((now - started) * 1000, 1)
            self.breaker.healthy(now)
            if self.trouble or now >= self._models_until or loaded != self.models_loaded:
                await self.learn_models()
            self.models_loaded = list(self.models or ()) if self.api else loaded
            self.found("")
        except HttpError as error:
            self.found(error.message)
        self.probes += 1

    async def _ask_health(self) -> list[str]:
        """The ids of the models in vpsd's memory. For another engine the status is enough: those of the last probe."""
        if self.api is None:
            loaded = (await self.upstream.get("/health", upstream.MAX_ERROR_BYTES)).get("models_loaded")
            return [id for id in loaded if isinstance(id, str)] if isinstance(loaded, list) else []
        try:
            async with self.upstream.ask(self.api.health, None, upstream.JSON, upstream.ASIDE_SECONDS):
                pass
        except HttpError as error:
            if error.code != "RATE_LIMIT":  # a 429 proves that the backend is up
                raise
        return self.models_loaded

    def found(self, trouble: str) -> None:
        if trouble != self.trouble:
            level = logging.WARNING if trouble else logging.INFO
            log.log(level, "%s: %s", self.id, trouble or "VPS backend is available")
        self.trouble = trouble

    async def learn_models(self) -> None:
        """Fetch the list of models; without an answer the last list stays. HttpError if an engine never sent one."""
        if self.api and self.active:
            return  # a completion has begun since the start of this probe
        self._models_until = time.monotonic() + MODELS_SECONDS
        try:
            answer = await self.upstream.get("/v1/models", upstream.MAX_JSON_BYTES)
            listed = read_listed(answer) if self.api else read_models(answer)
            props = {}
            if self.api and self.api.props:
                with contextlib.suppress(HttpError):  # the server's /props can be turned off
                    props = read_props(await self.upstream.get(self.api.props, upstream.MAX_JSON_BYTES))
        except HttpError as error:
            if isinstance(error, Misfit) or (self.api and self.models is None):
                self._models_until = 0.0
                raise
            log.warning("%s: no list of models: %s", self.id, error.message)
            return
        self.names = find_models(self._catalog, listed)
        strange = None if self.names else printable(", ".join(sorted(listed)))[: upstream.MAX_MESSAGE_CHARACTERS]
        if strange not in (None, self._strange):
            log.warning("%s: expected a model of models.toml, got %s", self.id, strange or "none")
        self._strange = strange
        fixed = {"n_ctx": self.config.n_ctx} if self.config.n_ctx else {}
        self.models = {id: {"n_ctx": DEFAULT_N_CTX} | props | listed[name] | fixed for id, name in self.names.items()}

    # Places.

    def take(self, job: Job, model: str) -> None:
        """Give the job a place for a completion by this model; the breaker must admit it."""
        ticket = self.breaker.admit(time.monotonic())
        assert ticket is not None
        job.model, job.backend, job.ticket, job.gone = model, self, ticket, asyncio.Event()
        self.active.append(job)
        self.requests_total += 1

    def release(self, job: Job) -> None:
        """Take the job's place back."""
        self.active.remove(job)
        self.breaker.left(job.ticket)
        job.gone.set()
        job.backend = None

    def count(self, job: Job, tokens: int) -> None:
        """Count tokens that came for a job; 0 for a complete answer without any. Both show that the backend works."""
        self.tokens += tokens
        if job.backend and (self.trouble or self.breaker.failures or job.ticket != self.breaker.generation):
            job.ticket = self.breaker.succeeded(job.ticket)
            if job.ticket == self.breaker.generation:  # otherwise the token may be from another address of the backend
                self.found("")

    # Completing.

    @contextlib.asynccontextmanager
    async def ask(self, job: Job, refused: TooLong | None) -> AsyncIterator[AsyncGenerator[Pair, None]]:
        """Fit the job's prompt, again if it was `refused`, send it, and yield the answer: ("begun", None) at the start,
        then the pairs described in `Gateway.complete`."""
        asked = self.prompts.prepare(job, self.n_ctx(job.model), self.layout(job.model), refused)
        model = self.names.get(job.model, job.model)
        if self.api is None:
            async with (
                self.upstream.ask("/v1/inference/stream", {"model": model, **asked}, upstream.EVENT_STREAM) as answer,
                contextlib.aclosing(relay(answer, self.config.key)) as pairs,
            ):
                yield pairs
            return
        api, marked = self.api, self.fim.get(job.model)
        fim = marked.fim if marked else ()
        dialect = api.chat if "messages" in asked else api.infill if "suffix" in asked else api.complete
        body = dialect.write(Wanted(asked, model, fim, self.layout(job.model), job.room))
        translator = Translator(dialect, asked, [mark.strip() for mark in fim])
        async with (
            self.upstream.send(dialect.paths[0], body, READING_SECONDS) as answer,
            contextlib.aclosing(translate(self.upstream, answer, translator)) as pairs,
        ):
            yield pairs

    def lost(self, job: Job, error: HttpError) -> None:
        """Record that a completion with a place has ended with this error."""
        self.requests_failed += error.code != SUPERSEDED
        self.failed(job.ticket, error)

    def failed(self, ticket: int, error: HttpError) -> None:
        """Record that a request to this backend has ended with this error."""
        if isinstance(error, Misfit):
            self.found(error.message)
        elif isinstance(error, BackendFailure):
            self.breaker.failed(ticket, time.monotonic(), error.late)
            log.warning("%s: %s; the breaker is %s", self.id, error.message, self.breaker.state)
            self.trouble = error.message
            self.wake.set()  # probe at once to see whether the backend is gone

    def forget(self, model: str) -> None:
        """Count this model as absent until the backend's next list."""
        if self.models:
            self.models.pop(model, None)

    def refused(self, job: Job, error: HttpError) -> None:
        """Record what a refusal says about a model."""
        if error.code in WITHOUT_MODEL:
            self._models_until = 0.0
            self.wake.set()
        n_ctx = error.extra.get("n_ctx", 0)
        if isinstance(error, TooLong) and 0 < n_ctx < job.n_ctx and self.models and job.model in self.models:
            self.models[job.model]["n_ctx"] = n_ctx  # until the next list

    async def tokenize(self, model: str, fields: Mapping[str, Any]) -> list[Any]:
        """Tokenize a text. `fields` and the result are those of llama-server's /tokenize."""
        ticket = self.breaker.admit(time.monotonic()) or 0
        asked, path = dict(fields), self.api.tokenize if self.api else "/v1/tokenize"
        if not self.api:
            asked = {"text": fields["content"], "first": fields["add_special"], "special": fields["parse_special"]}
            asked["model"] = self.names.get(model, model)
        try:
            answer = await self.upstream.get(path, upstream.MAX_TOKENS_BYTES, asked)
            self.breaker.succeeded(ticket)
        except HttpError as error:
            self.failed(ticket, error)
            raise
        finally:
            self.breaker.left(ticket)
        tokens = answer.get("tokens", [])
        return tokens if isinstance(tokens, list) else []


def notes_of(job: Job) -> dict[str, Any]:
    """The log's fields for a completion: its model, its tokens, and the seconds to the first token."""
    notes: dict[str, Any] = {"model": job.model} if job.model else {}
    if job.came.first:
        notes |= {"tokens": job.came.tokens, "ttft": f"{job.came.first - job.came.started:.2f}s"}
    return notes
