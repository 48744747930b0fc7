"""One backend: its breaker, its models, the prompts that fit, and its answers. Places are the
dispatcher's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Mapping, Sequence
from typing import Any

from cerebrum.fields import Field, members_of, printable
from cerebrum.pi import upstream
from cerebrum.pi.breaker import Admission, Breaker
from cerebrum.pi.completion import FINISHED, SUPERSEDED, WITHOUT_MODEL, Attempt, Fitted
from cerebrum.pi.dialects import (
    APIS,
    DEFAULT_TOKENS,
    LENGTH,
    CompletionRequest,
    Wanted,
    read_listed,
    read_props,
)
from cerebrum.pi.engines import READING_SECONDS, Translator, translate
from cerebrum.pi.upstream import (
    BackendConfig,
    BackendFailure,
    Pair,
    TooLong,
    Unusable,
    Upstream,
    relay,
)
from cerebrum.text.languages import BY_NAME
from cerebrum.text.prompt import MIN_RATIO, TEMPLATE_TOKENS, Ratio, prepare
from cerebrum_common import FIM_LAYOUTS, HttpError, Model, log, threshold_of

# ------------------------------------------------------------------------------------------- models

LISTED = {
    "n_ctx": LENGTH,
    "loaded": Field(bool),
    "encoding": Field(str, 1, 100),
    "memory_mb": Field(float, 0, 10**9),
    "fim_layout": Field(str, choices=FIM_LAYOUTS),
}


def read_models(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Parse vpsd's /v1/models: for each available model, the valid ones of the LISTED fields.

    >>> read_models({"models": [{"id": "m", "loaded": False, "path": "/x"}, {"id": "n", "available":
    False}]}) {'m': {'loaded': False}}
    """
    listed, models = answer.get("models"), dict[str, dict[str, Any]]()
    for entry in map(members_of, listed if isinstance(listed, list) else ()):
        if isinstance(entry.get("id"), str) and entry.get("available") is not False:
            models[entry["id"]] = {
                name: entry[name] for name, kind in LISTED.items() if kind.accepts(entry.get(name))
            }
    return models


def find_models(models: Sequence[Model], listed: Collection[str]) -> dict[str, str]:
    """Match our models with a backend's list: our id -> the backend's name. A listed name matches a
    model's id, one of its aliases, or its file name, with or without folder and ending.
    """
    names = {
        re.split(r"[/\\\\]", name)[-1].removesuffix(".gguf"): name for name in reversed([*listed])
    }
    found = {}
    for model in models:
        file = names.get(model.file.removesuffix(".gguf")) if model.file else None
        name = next((name for name in (model.id, *model.aliases) if name in listed), file)
        if name is not None:
            found[model.id] = name
    return found


DEFAULT_N_CTX = 4096  # until a backend reports its own
MODELS_SECONDS = 60.0  # the age at which a backend's list of models is fetched again

# ------------------------------------------------------------------------------------------ prompts

SAMPLED_BY = ("max_tokens", "temperature", "top_p", "seed", "stop")
PASSED_TO_BACKENDS = (*SAMPLED_BY, "stop_at", "progress", "indent", "predict_ms", "special")
MARGIN_TOKENS = 8  # of n_ctx, never used
PLAUSIBLE = (
    4  # another engine's token count is accepted if it is within this factor of our estimate
)
# the one retry assumes this share of the weight per token that the backend has just measured
REFIT = 0.95
# other engines refuse or cut an answer that might not fit, so count their prompts longer by this
# factor
SPARE = 1.1


def prompt_budget(n_ctx: int, max_tokens: int) -> int:
    """The largest prompt in tokens. An answer gets at most three quarters of the context, however
    long it may be.

    >>> prompt_budget(4096, 512), prompt_budget(2048, 2048)
    (3576, 504)
    """
    return max(n_ctx - max_tokens, n_ctx // 4) - MARGIN_TOKENS


MIN_READ_TOKENS = 32  # for fewer tokens, the time is mostly the first token's
MAX_CACHED = 16  # texts that a backend has read, some 10 KB each
MAX_CACHED_EACH = 4  # of one client and model
SAME_BEGINNING = 200  # characters
JUDGED_BYTES = 50  # of an event that judges a line
FIRST_SPEED = 100.0  # prompt tokens per second, until measured: a small model on two cores


class Prompts:
    """Knowledge about one backend's prompts. Owns its ratios, its reading speeds, and the texts
    that it has read.
    """

    def __init__(self, is_engine: bool) -> None:
        self.ratio = Ratio()
        self.speed: dict[str, float] = {}  # prompt tokens per second, by model
        self._is_engine = is_engine
        self._read: list[tuple[str, str, str]] = []  # client, model, and a text up to a cursor

    def fit(self, attempt: Attempt, n_ctx: int, layout: str, refused: TooLong | None) -> Fitted:
        """Fit the prompt of a request into `n_ctx` tokens, or fit it again after it was
        `refused`.
        """
        request, model = attempt.request, attempt.model
        fields, ratio, most = request.fields, self.ratio.get(model), sys.maxsize
        if refused:
            n_ctx = min(n_ctx, refused.extra.get("n_ctx", n_ctx))
            ratio, most = self._refit(attempt, refused.extra.get("prompt_tokens", 0))
        longest = (
            n_ctx // 4 if request.kind == "chat" else n_ctx
        )  # a chat's answer is short, whatever its limit
        # In the dialects, a limit below the default leaves no more room for the prompt: a warm-up,
        # with its limit of 0, must send the same text as the request that follows.
        least = DEFAULT_TOKENS if request.kind else 0
        budget = prompt_budget(n_ctx, min(max(fields["max_tokens"], least), longest))
        if self._is_engine:
            budget = min(int(budget / SPARE), most)
        text = prepare(
            fields, fields["mode"], budget, ratio, *self._max_fresh(request, model), layout
        )
        tokens = text.weight / ratio + TEMPLATE_TOKENS[fields["mode"]]
        passed = {name: fields[name] for name in PASSED_TO_BACKENDS if fields.get(name) is not None}
        if request.session:
            passed["session"] = request.session
        if request.guest:
            passed["priority"] = "low"
        if attempt.threshold:
            passed["min_confidence"] = attempt.threshold
        if language := BY_NAME.get(
            fields["language"].lower()
        ):  # backends know the syntax of these languages
            passed["language"] = language
        return Fitted(
            {**passed, **text.body}, text, n_ctx, n_ctx - int(SPARE * tokens) - MARGIN_TOKENS
        )

    def _max_fresh(self, request: CompletionRequest, model: str) -> tuple[int | None, list[str]]:
        """(the most tokens to read for a request, or None; the texts already read for its client
        and model).
        """
        speed, limit = self.speed.get(model, FIRST_SPEED), request.fields.get("prompt_ms", 0)
        if limit <= 1 or not request.fields["max_tokens"]:
            return None, []
        return int(speed * limit / 1000), [
            text for *who, text in self._read if who == [request.client, model]
        ]

    def _refit(self, attempt: Attempt, counted: int) -> tuple[float, int]:
        """(weight per token, the most tokens) for a retry after a backend has counted too many
        tokens. If the count is not plausible, the prompt becomes a quarter shorter.
        """
        weight, ratio = attempt.sent.text.weight, self.ratio.get(attempt.model)
        if self._is_plausible(attempt, counted):
            self.ratio.learn(attempt.model, weight, counted)
            return max(REFIT * weight / counted, MIN_RATIO), sys.maxsize
        return max(REFIT * ratio, MIN_RATIO), int(0.75 * weight / ratio)

    def _is_plausible(self, attempt: Attempt, counted: int) -> bool:
        """Whether the prompt that was sent may have this many tokens. Another engine's count may be
        misread.
        """
        estimated = attempt.sent.text.weight / self.ratio.get(attempt.model)
        return counted > 0 and (
            not self._is_engine or estimated / PLAUSIBLE <= counted <= estimated * PLAUSIBLE
        )

    def learn(self, attempt: Attempt, result: Mapping[str, Any]) -> None:
        """Learn from a complete answer: the weight per token, the reading speed, and the text that
        was read.
        """
        counted, seconds = result.get("prompt_tokens", 0), result.get("ttft")
        if not self._is_plausible(attempt, counted):
            return
        model, text = attempt.model, attempt.sent.text
        self.ratio.learn(model, text.weight, counted)
        read = counted - result.get("cached_tokens", 0)
        if (
            seconds and seconds > 0.001 and read >= MIN_READ_TOKENS and not attempt.request.guest
        ):  # who stood still
            speed = read / seconds
            self.speed[model] = self.speed.get(model, speed) * 0.75 + speed * 0.25
        if attempt.request.kind in ("infill", "completion"):
            # Texts with the same beginning come from the same file: keep only the newest. With the
            # suffix first, each place in a file is a text of its own, so each client keeps few.
            mine, beginning = (attempt.request.client, model), text.above[:SAME_BEGINNING]
            known = [
                one for one in self._read if one[:2] == mine and not one[2].startswith(beginning)
            ]
            others = [one for one in self._read if one[:2] != mine]
            self._read = [*others, *known[1 - MAX_CACHED_EACH :], (*mine, text.above)][-MAX_CACHED:]


# -------------------------------------------------------------------------------------- the backend


class Backend:
    """One backend: what we know about it, and its answers. Owns its breaker, its list of models and
    its counts.
    """

    def __init__(self, config: BackendConfig, catalog: Sequence[Model]) -> None:
        self._configure(config, catalog, Upstream(config))
        self.api = APIS.get(config.api)  # None: vpsd
        self.prompts = Prompts(is_engine=self.api is not None)
        self.requests_total = self.requests_failed = self.tokens = (
            0  # requests for completions; tokens that came
        )
        self.wake = asyncio.Event()  # probe now
        self.probes = 0  # completed
        self.probed = time.monotonic()  # when the last probe began
        self.response_ms: float | None = None  # of the last successful probe
        self._forget_host()

    def _forget_host(self) -> None:
        """Know nothing about the host behind the address."""
        self.breaker = (
            Breaker()
        )  # results of requests to an earlier address go to the earlier breaker
        # By our id of a model: the reported fields, with `n_ctx` (None until the first list), and
        # the backend's name.
        self.models: dict[str, dict[str, Any]] | None = None
        self.names: dict[str, str] = {}
        self.models_loaded: list[str] = []  # in its memory, by the last successful probe
        self.answering = set[Attempt]()  # that it answers now
        self._strange: str | None = None  # the names in its last list, if it had none of our models
        self._models_until = 0.0

    def _configure(self, config: BackendConfig, catalog: Sequence[Model], client: Upstream) -> None:
        self.config, self.id, self.limit = config, config.id, config.max_concurrent
        self.fim = (
            {model.id: model for model in catalog if model.fim} if config.infill == "fim" else {}
        )
        self.upstream, self._catalog = client, catalog

    def adopt(self, other: Backend) -> None:
        """Take over the settings of another object with the same id and API. A new address is a
        new, unknown host.
        """
        if other.config.endpoint != self.config.endpoint:
            self._forget_host()
        self.upstream.close()
        self._configure(other.config, other._catalog, other.upstream)
        self._models_until = 0.0
        self.wake.set()

    @property
    def available(self) -> bool:
        return not self.breaker.message

    @property
    def reads_ahead(self) -> bool:
        """Whether the backend reads prompts ahead: reading costs nothing."""
        return self.api is None or self.api.warms

    def has(self, model: str) -> bool:
        """Whether the backend may have a model. Without a list only vpsd may: others need their own
        name for it.
        """
        return self.api is None if self.models is None else model in self.models

    def n_ctx(self, model: str) -> int:
        known = (self.models or {}).get(model)
        return int(known["n_ctx"]) if known else self.config.n_ctx or DEFAULT_N_CTX

    def layout(self, model: str) -> str:
        """How a gap's prompt is laid out for a model, see `arrange_gap`. With "spmv2", a prompt
        ends in the middle of a line; other engines would not heal its last token.
        """
        if self.api is None:
            return str((self.models or {}).get(model, {}).get("fim_layout", "psm"))
        return "spm" if model in self.fim and self.fim[model].fim_layout == "spm" else "psm"

    # Probing.

    async def probe(self) -> None:
        """Update the breaker, `response_ms` and `models`. Do not disturb another engine while it
        answers, which shows that it is up: llama_cpp.server would abort the answer, and cannot
        respond while it reads a prompt.
        """
        breaker, self.probed = self.breaker, time.monotonic()
        breaker.expire(self.probed)
        if self.api and breaker.state == "closed" and self.answering:
            return
        try:
            loaded = await self._ask_health()
            now = time.monotonic()
            self.response_ms = round((now - self.probed) * 1000, 1)
            breaker.healthy(now)
            if breaker.trouble or now >= self._models_until or loaded != self.models_loaded:
                await self.learn_models()
            self.models_loaded, trouble = list(self.models or ()) if self.api else loaded, ""
        except HttpError as error:
            trouble = error.message
        self._learn_trouble(
            breaker, trouble
        )  # an earlier one, if the address has changed meanwhile
        self.probes += 1

    async def _ask_health(self) -> list[str]:
        """The ids of the models in vpsd's memory. For another engine the status is enough: those of
        the last probe.
        """
        if self.api is None:
            loaded = (await self.upstream.get("/health", upstream.MAX_ERROR_BYTES)).get(
                "models_loaded"
            )
            return [id for id in loaded if isinstance(id, str)] if isinstance(loaded, list) else []
        try:
            await self.upstream.get(self.api.health, upstream.MAX_JSON_BYTES)
        except HttpError as error:
            if error.code != "RATE_LIMIT":  # a 429 proves that the backend is up
                raise
        return self.models_loaded

    def _learn_trouble(self, breaker: Breaker, trouble: str) -> None:
        """Note that the backend has this trouble, or none, and log a change."""
        if trouble != breaker.trouble:
            level = logging.WARNING if trouble else logging.INFO
            log.log(level, "%s: %s", self.id, trouble or "VPS backend is available")
        breaker.trouble = trouble

    async def learn_models(self) -> None:
        """Fetch the list of models; without an answer the last list stays. HttpError if an engine
        never sent one.
        """
        if self.api and self.answering:
            return  # a completion has begun since the start of this probe
        self._models_until = time.monotonic() + MODELS_SECONDS
        try:
            answer = await self.upstream.get("/v1/models", upstream.MAX_JSON_BYTES)
            listed = read_listed(answer) if self.api else read_models(answer)
            props = {}
            if self.api and self.api.props:
                with contextlib.suppress(HttpError):  # the server's /props can be turned off
                    props = read_props(
                        await self.upstream.get(self.api.props, upstream.MAX_JSON_BYTES)
                    )
        except HttpError as error:
            if isinstance(error, Unusable) or (self.api and self.models is None):
                self._models_until = 0.0
                raise
            log.warning("%s: no list of models: %s", self.id, error.message)
            return
        self.names = find_models(self._catalog, listed)
        strange = (
            None
            if self.names
            else printable(", ".join(sorted(listed)))[: upstream.MAX_MESSAGE_CHARACTERS]
        )
        if strange not in (None, self._strange):
            log.warning("%s: expected a model of models.toml, got %s", self.id, strange or "none")
        self._strange = strange
        fixed = {"n_ctx": self.config.n_ctx} if self.config.n_ctx else {}
        self.models = {
            id: {"n_ctx": DEFAULT_N_CTX} | props | listed[name] | fixed
            for id, name in self.names.items()
        }

    def forget(self, model: str) -> None:
        """Count this model as absent until the backend's next list."""
        if self.models:
            self.models.pop(model, None)

    # Answering.

    async def answer(self, attempt: Attempt) -> AsyncGenerator[Pair, None]:
        """The answer to an attempt, as pairs: ("begun", None) once the backend responds, then those
        that `Gateway.complete` lists, with a result of checked members. If the backend counts too
        many tokens, the prompt is fitted again and sent once more. Every result goes to the breaker
        that has admitted the attempt.
        """
        refused: TooLong | None = None
        self.requests_total += not attempt.request.ahead
        answering = self.answering
        answering.add(attempt)
        try:
            while True:
                try:
                    async with self._send(attempt, refused) as pairs:
                        async for kind, value in pairs:
                            if kind in ("text", "judged"):
                                attempt.size += len(value) if kind == "text" else JUDGED_BYTES
                                if attempt.size > attempt.request.limit:
                                    raise BackendFailure("its completion is too long")
                            if kind == "text":
                                self._count(attempt, value.count(b"\n\n"))
                            elif kind == "done":
                                value = self._finish(attempt, value)
                            yield kind, value
                    return
                except HttpError as error:
                    if attempt.makes_room:
                        raise  # it was ended on purpose: that says nothing about the backend
                    self._refused(attempt, error)
                    if attempt.tokens or refused or not isinstance(error, TooLong):
                        self.requests_failed += (
                            error.code != SUPERSEDED and not attempt.request.ahead
                        )
                        self._failed(attempt.admission, error)
                        raise
                    refused = error
        finally:
            answering.discard(attempt)

    @contextlib.asynccontextmanager
    async def _send(
        self, attempt: Attempt, refused: TooLong | None
    ) -> AsyncIterator[AsyncGenerator[Pair, None]]:
        """Fit the prompt of an attempt, again if it was `refused`, send it, and yield the unread
        answer.
        """
        # Parsing a long request, fitting it and following its text get a turn of the event loop
        # each.
        await asyncio.sleep(0)
        layout = self.layout(attempt.model)
        if not self.api:  # other engines do not say how sure they are
            attempt.threshold = threshold_of(
                self._catalog, attempt.model, attempt.request.fields.get("min_confidence")
            )
        attempt.sent = sent = self.prompts.fit(attempt, self.n_ctx(attempt.model), layout, refused)
        model = self.names.get(attempt.model, attempt.model)
        if self.api is None:
            body = {"model": model, **sent.fields}
            async with (
                self.upstream.send("/v1/inference/stream", body, upstream.IDLE_SECONDS) as answer,
                contextlib.aclosing(relay(self.upstream, answer, self.config.key)) as pairs,
            ):
                self._may_cut(attempt, answer)
                yield pairs
            return
        api, marked = self.api, self.fim.get(attempt.model)
        fim = marked.fim if marked else ()
        dialect = (
            api.chat
            if "messages" in sent.fields
            else api.infill
            if "suffix" in sent.fields
            else api.complete
        )
        body = dialect.write(Wanted(sent.fields, model, fim, layout, sent.room))
        await asyncio.sleep(0)
        translator = Translator(sent.fields, [mark.strip() for mark in fim])
        async with (
            self.upstream.send(dialect.paths[0], body, READING_SECONDS) as answer,
            contextlib.aclosing(translate(self.upstream, answer, translator)) as pairs,
        ):
            self._may_cut(attempt, answer)
            yield pairs

    def _may_cut(self, attempt: Attempt, answer: upstream.Answer) -> None:
        """From now on the dispatcher can cut this answer; perhaps it wanted to while the connection
        was opened.
        """
        attempt.cut = answer.cut
        if attempt.makes_room:
            answer.cut()

    def _count(self, attempt: Attempt, tokens: int) -> None:
        """Count tokens that came; 0 for a whole answer without any. Both show that the backend
        works.
        """
        now, had_trouble = time.monotonic(), self.breaker.trouble
        if not attempt.tokens and tokens:
            attempt.first = now
        attempt.tokens += tokens
        self.tokens += tokens
        attempt.admission.succeeded(now)
        if had_trouble and not self.breaker.trouble:
            log.info("%s: VPS backend is available", self.id)

    def _finish(self, attempt: Attempt, done: Mapping[str, Any]) -> dict[str, Any]:
        """Learn from a whole answer, and return its result, without what no backend may set."""
        result = upstream.read_result(done)
        attempt.last, reason = time.monotonic(), result.get("finish_reason", "stop")
        attempt.reason = reason if reason in FINISHED else "other"
        self._count(
            attempt, max(0, result.get("total_tokens", 0) - attempt.tokens)
        )  # one event may hold several
        self.prompts.learn(attempt, result)
        return result

    def _failed(self, admission: Admission, error: HttpError) -> None:
        """Report an error that ended a request to this backend."""
        breaker = admission.breaker
        if isinstance(error, Unusable):
            self._learn_trouble(breaker, error.message)
        elif isinstance(error, BackendFailure):
            admission.failed(time.monotonic(), error.message, error.late)
            log.warning("%s: %s; the breaker is %s", self.id, error.message, breaker.state)
            self.wake.set()  # probe at once to see whether the backend is gone

    def _refused(self, attempt: Attempt, error: HttpError) -> None:
        """Learn what a refusal says about a model."""
        if error.code in WITHOUT_MODEL:
            self._models_until = 0.0
            self.wake.set()
        n_ctx, known = error.extra.get("n_ctx", 0), (self.models or {}).get(attempt.model)
        if isinstance(error, TooLong) and known and 0 < n_ctx < attempt.sent.n_ctx:
            known["n_ctx"] = n_ctx  # until the next list

    async def tokenize(self, model: str, fields: Mapping[str, Any]) -> bytes:
        """The tokens of a text, as `read_tokens` returns them. `fields` are those of llama-server's
        /tokenize. The breaker must admit it.
        """
        admission = self.breaker.admit(time.monotonic())
        body, path = dict(fields), self.api.tokenize if self.api else "/v1/tokenize"
        if not self.api:
            body = {
                "text": fields["content"],
                "first": fields["add_special"],
                "special": fields["parse_special"],
            }
            body["model"] = self.names.get(model, model)
        try:
            tokens: bytes = await self.upstream.get(
                path, upstream.MAX_TOKENS_BYTES, body, upstream.read_tokens
            )
            admission.succeeded(time.monotonic())
        except HttpError as error:
            self._failed(admission, error)
            raise
        finally:
            admission.left()
        return tokens
