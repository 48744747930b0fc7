"""One backend: its breaker, its models, the prompts that fit, and its answers. Places are the
dispatcher's.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import re
import sys
import time
from collections.abc import Collection, Sequence
from typing import Any

from cerebrum.fields import JsonObject, Members, printable, valid_members
from cerebrum.pi.breaker import Admission, Breaker
from cerebrum.pi.completion import (
    FINISHED,
    SAMPLED_BY,
    SUPERSEDED,
    WITHOUT_MODEL,
    Answered,
    Attempt,
    CompletionRequest,
    Fitted,
    Pairs,
)
from cerebrum.pi.engines import LlamaServer, OpenAI
from cerebrum.pi.kind import RESULT_FIELDS, Kind
from cerebrum.pi.native import MAX_MESSAGE_CHARACTERS, Vpsd
from cerebrum.pi.upstream import BackendConfig, BackendFailure, TooLong, Unusable
from cerebrum.request import DEFAULT_TOKENS
from cerebrum.text.languages import BY_NAME
from cerebrum.text.prompt import RATIO, SOON, TEMPLATE_TOKENS, WINDOW, prepare
from cerebrum_common import HttpError, Model, log

KINDS: dict[str, type[Kind]] = {"cerebrum": Vpsd, "llama.cpp": LlamaServer, "openai": OpenAI}

# ------------------------------------------------------------------------------------------- models


def find_models(models: Sequence[Model], listed: Collection[str]) -> dict[str, str]:
    """Match our models with a backend's list: our id -> the backend's name. A listed name matches a
    model's id, one of its aliases, or its file name, with or without folder and ending.
    """
    files = {
        re.split(r"[/\\]", name)[-1].removesuffix(".gguf"): name for name in reversed([*listed])
    }
    found = {}
    for model in models:
        file = files.get(model.file.removesuffix(".gguf") or None, model.id)
        known = [name for name in (model.id, *model.aliases, file) if name in listed]
        if known:
            found[model.id] = known[0]
    return found


DEFAULT_N_CTX = 4096  # until a backend reports its own
BUSY_SECONDS = 0.5  # pause before a busy backend is asked again
MODELS_SECONDS = 60.0  # the age at which a backend's list of models is fetched again

# ------------------------------------------------------------------------------------------ prompts

PASSED_TO_BACKENDS = (
    *SAMPLED_BY,
    "stop_at",
    "progress",
    "indent",
    "predict_ms",
    "special",
    "min_confidence",
)
MARGIN_TOKENS = 8  # of n_ctx, never used
# The one retry assumes this share of the weight per token that the backend has just measured. If it
# has told no count, the text becomes a quarter shorter.
REFIT = 0.95
UNCOUNTED = 0.75
# Other engines refuse or cut an answer that might not fit, so count their prompts longer by this
# factor.
OVERCOUNT = 1.1


def budget_of(request: CompletionRequest, n_ctx: int) -> int:
    """The largest prompt for a request, in tokens. An answer gets at most three quarters of the
    context, however long it may be.

    >>> from cerebrum.request import GenerationRequest
    >>> request = CompletionRequest("", GenerationRequest(max_tokens=2048))
    >>> budget_of(request, 4096), budget_of(request, 2048)
    (2040, 504)
    """
    # In the dialects, a limit below the default leaves no more room for the prompt: a warm-up, with
    # its limit of 0, must send the same text as the request that follows.
    shortest = DEFAULT_TOKENS if request.in_dialect else 0
    # A chat's answer is short, whatever its limit.
    longest = n_ctx // 4 if request.kind == "chat" else n_ctx
    answer = min(max(request.fields.max_tokens, shortest), longest)
    return int(max(n_ctx - answer, n_ctx // 4) - MARGIN_TOKENS)


def passed_fields(request: CompletionRequest) -> JsonObject:
    """vpsd's fields for a request, beside those of its text."""
    fields = request.fields
    given = vars(fields)
    passed = {name: given[name] for name in PASSED_TO_BACKENDS if given[name] is not None}
    if request.session:
        passed["session"] = request.session
    if request.guest:
        passed["priority"] = "low"
    # Backends know the syntax of these languages.
    if language := BY_NAME.get(fields.language.lower()):
        passed["language"] = language
    return passed


# -------------------------------------------------------------------------------------- the backend


MAX_TEXT_BYTES = 2 << 20  # the text events of one completion; 2,048 tokens take about 150 KB


class Backend:
    """One backend: what we know about it, and its answers. Owns its breaker, its list of models and
    its counts; its `kind` asks it.
    """

    def __init__(self, config: BackendConfig, catalog: Sequence[Model]) -> None:
        self._configure(KINDS[config.api](config, catalog))
        self.requests_total = 0  # for completions
        self.requests_failed = 0
        self.tokens = 0  # that came
        self.wake = asyncio.Event()  # probe now
        self.probes = 0  # completed
        self.probed = time.monotonic()  # when the last probe began
        self.response_ms: float | None = None  # of the last successful probe
        self.breaker = Breaker()
        # By our id of a model: the reported fields, with `n_ctx` (None until the first list), and
        # the backend's name.
        self.models: dict[str, JsonObject] | None = None
        self.names: dict[str, str] = {}
        self.models_loaded: list[str] = []  # in its memory, by the last successful probe
        self.answering = set[Attempt]()  # that it answers now
        self._warn_anew = functools.lru_cache(1)(log.warning)  # not of the same again
        self._models_until = 0.0
        self.rests_until = 0.0  # it wants no request before

    def _configure(self, kind: Kind) -> None:
        self.kind = kind
        self.config = kind.config
        self.id = kind.config.id
        self.limit = kind.config.max_concurrent

    def adopt(self, other: Backend) -> None:
        """Take over the settings of another object with the same id, API and address."""
        self.kind.client.close()
        self._configure(other.kind)
        self._models_until = 0.0
        self.wake.set()

    @property
    def available(self) -> bool:
        return not self.breaker.message

    def has(self, model: str) -> bool:
        """Whether the backend may have a model. Without a list only our own kind may: others need
        their own name for it.
        """
        return self.kind.is_ours if self.models is None else model in self.models

    def n_ctx(self, model: str) -> int:
        return int(self.about(model).get("n_ctx") or self.config.n_ctx or DEFAULT_N_CTX)

    def about(self, model: str) -> JsonObject:
        """What the backend reports about a model; {} if the model is unknown."""
        return (self.models or {}).get(model, {})

    # Probing.

    @property
    def _is_busy(self) -> bool:
        """Whether other requests would disturb the backend. llama_cpp.server would abort its
        answer, and cannot respond while it reads a prompt.
        """
        return bool(self.answering) and not self.kind.is_ours

    async def probe(self) -> None:
        """Ask for the backend's health, and for its list of models if that is old or may have
        changed. Updates the breaker and what is known. A busy backend is left alone: its answer
        shows that it is up.
        """
        self.probed = time.monotonic()
        self.breaker.expire(self.probed)
        if self._is_busy and self.breaker.state == "closed":
            return
        try:
            loaded = await self.kind.ask_health()
            now = time.monotonic()
            self.response_ms = round((now - self.probed) * 1000, 1)
            self.breaker.healthy(now)
            has_changed = loaded not in (None, self.models_loaded)
            if has_changed or self.breaker.trouble or now >= self._models_until:
                await self.learn_models()
            self.models_loaded = list(self.models or ()) if loaded is None else loaded
            self._learn_trouble("")
        except HttpError as error:
            self._learn_trouble(error.message)
        self.probes += 1

    def _learn_trouble(self, trouble: str) -> None:
        """Note that the backend has this trouble, or none, and log a change."""
        if trouble != self.breaker.trouble:
            level = logging.WARNING if trouble else logging.INFO
            log.log(level, "%s: %s", self.id, trouble or "VPS backend is available")
        self.breaker.trouble = trouble

    async def learn_models(self) -> None:
        """Fetch the list of models; without an answer the last list stays. HttpError if a list is
        needed and never came.
        """
        if self._is_busy:
            return  # a completion has begun since the start of this probe
        self._models_until = time.monotonic() + MODELS_SECONDS
        try:
            listed = await self.kind.list_models()
        except HttpError as error:
            is_unknown = self.models is None
            is_unusable = isinstance(error, Unusable)
            if is_unknown or is_unusable:
                self._models_until = 0.0  # a VPS may be checking new files
            if is_unusable or (is_unknown and not self.kind.is_ours):
                raise
            self._warn_anew("%s: no list of models: %s", self.id, error.message)
            return
        self.names = find_models(self.kind.catalog, listed)
        if self.names:
            self._warn_anew.cache_clear()
        else:
            strange = printable(", ".join(sorted(listed)))[:MAX_MESSAGE_CHARACTERS] or "none"
            self._warn_anew("%s: expected a model of models.toml, got %s", self.id, strange)
        fixed = {"n_ctx": self.config.n_ctx} if self.config.n_ctx else {}
        self.models = {
            id: {"n_ctx": DEFAULT_N_CTX} | listed[name] | fixed for id, name in self.names.items()
        }

    # Answering.

    async def answer(self, attempt: Attempt) -> Pairs:
        """The answer to an attempt, as pairs: ("begun", None) once the backend responds, then those
        of `Event`, with a result of checked members. If the backend counts too
        many tokens, the prompt is fitted again and sent once more, but no speculative one's. Every
        result that somebody waits for goes to the breaker that has admitted the attempt.
        """
        refused = None
        self.requests_total += not attempt.request.ahead
        self.answering.add(attempt)
        try:
            while True:
                try:
                    # Parsing a long request, fitting it and following its text get a turn of the
                    # event loop each.
                    await asyncio.sleep(0)
                    attempt.sent = wanted = self._fit(attempt, refused)
                    kind = self.kind  # a reload may replace it
                    async with (
                        kind.ask(wanted) as answer,
                        contextlib.aclosing(kind.read(answer, wanted)) as pairs,
                    ):
                        # From now on the dispatcher can cut the answer; perhaps it wanted to while
                        # the connection was opened.
                        attempt.cut = answer.cut
                        if attempt.evicted:
                            answer.cut()
                        async for event, value in pairs:
                            yield event, self._take(attempt, event, value)
                    return
                except HttpError as error:
                    if attempt.evicted:
                        raise  # it was ended on purpose: that says nothing about the backend
                    self._learn_refusal(attempt, error)
                    is_final = attempt.tokens or refused or attempt.request.speculative
                    if is_final or not isinstance(error, TooLong):
                        self._fail(attempt, error)
                        raise
                    refused = error
        finally:
            self.answering.remove(attempt)

    def _fit(self, attempt: Attempt, refused: TooLong | None) -> Fitted:
        """Fit the prompt of an attempt into the model's context, again if it was `refused`."""
        kind = self.kind
        model = attempt.model
        request = attempt.request
        fields = request.fields
        n_ctx = self.n_ctx(model)
        ratio: float = RATIO
        most = sys.maxsize
        if refused:
            n_ctx = min(n_ctx, refused.extra.get("n_ctx", n_ctx))
            weight = attempt.sent.weight
            if counted := refused.extra.get("prompt_tokens"):
                ratio = REFIT * max(weight, 1) / counted
            else:
                ratio = REFIT * RATIO
                most = int(UNCOUNTED * weight / RATIO)
        budget = budget_of(request, n_ctx)
        if not kind.is_ours:
            budget = min(int(budget / OVERCOUNT), most)
        budget = int(budget * ratio / RATIO)
        layout = kind.layout(model, self.about(model))
        is_limited = fields.prompt_ms > 1  # llama.vim's warm-ups have 1, and are read whole
        # vpsd knows what it has read, and chooses what to read in time.
        around = WINDOW if kind.is_ours or not is_limited else SOON
        text = prepare(vars(fields), fields.mode, budget, layout, request.kind == "infill", around)
        tokens = text.weight / ratio + TEMPLATE_TOKENS[fields.mode]
        answer_tokens = n_ctx - int(OVERCOUNT * tokens) - MARGIN_TOKENS
        body = passed_fields(request) | text.body
        if is_limited:
            body["prompt_ms"] = fields.prompt_ms
        name = self.names.get(model, model)
        return Fitted(body, model, name, answer_tokens, n_ctx, text.kept, text.weight, request.file)

    def _take(self, attempt: Attempt, event: str, value: Any) -> Any:
        """Count a pair that came, and return its value: of a result, what a backend may set. Note
        which model answers.
        """
        if event == "done":
            return self._finish(attempt, value)
        if event == "text":
            attempt.size += len(value)
            if attempt.size > MAX_TEXT_BYTES:
                raise BackendFailure("its completion is too long")
            self._count(attempt, value.count(b"\n\n"))
        elif event == "begun" and value in self.names:
            attempt.model = value
        return value

    def _count(self, attempt: Attempt, tokens: int) -> None:
        """Count tokens that came; 0 for a whole answer without any. Both show that the backend
        works.
        """
        now = time.monotonic()
        if not attempt.tokens and tokens:
            attempt.first_heard = now
        attempt.last_heard = now
        attempt.tokens += tokens
        self.tokens += tokens
        attempt.admission.succeeded(now)

    def _finish(self, attempt: Attempt, done: Members) -> JsonObject:
        """Count a whole answer, and return its result."""
        result = valid_members(done, RESULT_FIELDS)
        reason = result.get("finish_reason", "stop")
        attempt.settle(Answered(reason if reason in FINISHED else "other"))
        # One event may hold several tokens.
        self._count(attempt, max(0, result.get("total_tokens", 0) - attempt.tokens))
        attempt.prompt_cut = "prompt_ms" in attempt.sent.fields and result.get("prompt_cut", False)
        return result

    def _learn_refusal(self, attempt: Attempt, error: HttpError) -> None:
        """Learn what a refusal says about a model."""
        if error.code in WITHOUT_MODEL:
            self._models_until = 0.0
            self.wake.set()
        if error.code == "RATE_LIMIT":
            # Unless the backend asks for a pause, only those who are ready to wait make one.
            request = attempt.request
            waits = request.in_dialect and not request.is_spare
            pause = error.retry_after or BUSY_SECONDS * waits
            self.rests_until = max(time.monotonic() + pause, self.rests_until)
        n_ctx = error.extra.get("n_ctx", 0)
        if isinstance(error, TooLong) and 0 < n_ctx < attempt.sent.n_ctx:
            self.about(attempt.model)["n_ctx"] = n_ctx  # until the next list

    def _fail(self, attempt: Attempt, error: HttpError) -> None:
        """Count and report an error that ended an attempt. Nobody waits for a spare one, so it must
        not open the breaker for others.
        """
        if attempt.request.is_spare:
            return
        self.requests_failed += error.code != SUPERSEDED
        self._report(attempt.admission, error)

    def _report(self, admission: Admission, error: HttpError) -> None:
        """Report an error that ended a request to this backend."""
        if isinstance(error, Unusable):
            self._learn_trouble(error.message)
        elif isinstance(error, BackendFailure):
            admission.failed(time.monotonic(), error.message, error.late)
            log.warning("%s: %s; the breaker is %s", self.id, error.message, self.breaker.state)
            self.wake.set()  # probe at once to see whether the backend is gone

    def tokenizes(self, model: str) -> bool:
        """Whether it may be asked for the tokens of a text."""
        return self.has(model) and self.kind.tokenize_path != "" and self.breaker.admits

    async def tokenize(self, model: str, fields: Members) -> bytes:
        """The tokens of a text, as `read_tokens` returns them. `fields` are those of llama-server's
        /tokenize. The breaker must admit it.
        """
        admission = self.breaker.admit(time.monotonic())
        try:
            tokens = await self.kind.tokenize(self.names.get(model, model), fields)
            admission.succeeded(time.monotonic())
        except HttpError as error:
            self._report(admission, error)
            raise
        finally:
            admission.left()
        return tokens
