#!/usr/bin/env python3
"""Cerebrum's orchestrator for the Raspberry Pi: checks, prepares, routes, sheds, breaks, relays.

    python3 cm4d.py                       # listens on 0.0.0.0:7000, asks the backends
    curl http://localhost:7000/health
    curl -N http://localhost:7000/v1/complete/stream -H 'Content-Type: application/json' \
         -d '{"prompt": "def fibonacci(n):", "language": "python", "max_tokens": 128}'

The backends are those of models.toml, or one: the VPS at CEREBRUM_VPS_URL. Every completion is one async generator,
`Gateway.complete`. It chooses a model and a backend with a free place, fits the prompt and sends it there on a
connection of its own. If that backend fails before the first token, the next one gets the request. The generator yields
pairs of (kind, value) that depend neither on the client's API nor on the backend's: `/v1/complete/stream` renders them
as SSE, `/v1/complete` as one JSON answer. Editors and tools speak the dialects of cerebrum_dialects.py. They follow a
completion by a `Reading`: identical requests at the same time share one, a newer infill of the same file ends the older
one, and text that the last completion predicted is served without a backend.

It refuses a completion while all places are taken (429) and while every breaker is open (503); a completion in a
dialect waits for its place for a while. From a backend it refuses redirects, framing or JSON that is not exact, and a
stream that ends without saying so: the client gets all whole events up to the fault, then an error event, then a cut.
After its first token no request is sent again. Before it, no backend gets a request twice, but for a prompt that it has
refused as too long, a model that it could not load, if it has another one, and a 429. A connection to a backend is used
for one request only.

Who owns what: a `Backend` owns its places, its breaker, its learned ratios and what is known of it. Its probe task
keeps that knowledge fresh; a completion asks for lists of models only before any probe. `Gateway` owns the backends
and what belongs to clients: those who wait, what they share, what is predicted. A `Shared` completion owns the task
that computes it, and ends with its last reader. Everything runs on the event loop's thread; there is no other thread.
Standard library only, with cerebrum_*.py and models.toml beside it, and cerebrum_page.html, without which there is no
page at `/`.
"""

from __future__ import annotations

import sys

if sys.version_info < (3, 11):  # noqa: UP036 (Debian 11 has 3.9, which fails less clearly at an import below)
    print("cm4d.py: expected Python 3.11 or newer, got", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import os
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    sys.path.insert(0, str(here))  # `python3 -I` leaves it out

import asyncio
import contextlib
import functools
import hashlib
import io
import json
import logging
import math
import random
import re
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any

from cerebrum_backends import (
    COUNT,
    MAX_MESSAGE_CHARACTERS,
    MAX_PLACES,
    PASSED_ON,
    TOKENS,
    BackendConfig,
    BackendFailure,
    Body,
    Events,
    Misfit,
    Pair,
    TooLong,
    Translator,
    engine_refusal,
    find_models,
    parse_answer,
    parse_leniently,
    read_backends,
    read_loaded,
    read_models,
    read_result,
    read_text,
    refusal,
    take_apart,
    text_event,
)
from cerebrum_code import MIN_RATIO, TEMPLATE_TOKENS, Ratio, detect_mode, prepare
from cerebrum_common import (
    READ_BYTES,
    SSE_COMMENT,
    VERSION,
    Access,
    ConfigError,
    Environment,
    Field,
    HttpError,
    ListenError,
    Model,
    Request,
    Response,
    Route,
    Server,
    compact,
    describe,
    internal_error,
    is_ip_literal,
    load_catalog,
    log,
    own_names,
    parse_json,
    printable,
    read_environment,
    read_fields,
    request_id_var,
    scan_head,
    served_languages,
    sse_event,
    timestamp,
)
from cerebrum_dialects import (
    APIS,
    DEFAULT_TOKENS,
    DIALECTS,
    MAX_TOKENS,
    TOKENIZE,
    Asked,
    Dialect,
    Reply,
    Wanted,
    present,
    read_listed,
    read_props,
    write_error,
    write_model,
    write_props,
)
from cerebrum_languages import BY_NAME, LANGUAGES, guess_language
from cerebrum_metrics import (
    CANCELLED,
    COMPLETIONS,
    CONTENT_TYPE,
    SERVER,
    Metric,
    Table,
    Tally,
    Things,
    resident_bytes,
    write_metrics,
    write_stats,
)
from cerebrum_page import History, Page
from cerebrum_service import Service, make_parser, prompt_of, set_up_logging

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------- configuration

HOST = re.compile(r"[A-Za-z0-9.\-_]{1,255}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9.\-_]{1,32})?")  # a name or an address


@dataclass(frozen=True, slots=True)
class Config:
    """The settings. One of `client_keys` is expected from clients (none: nothing is)."""

    backends: tuple[BackendConfig, ...]
    models: tuple[Model, ...]
    prefer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ids of models, by mode
    host: str = "0.0.0.0"
    port: int = 7000
    client_keys: tuple[str, ...] = ()
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    log_level: str = "INFO"
    log_file: str = ""
    log_prompts: bool = False

    @property
    def access(self) -> Access:
        return Access(self.client_keys, own_names(self.hosts), self.origins)


def load_config(environ: Environment) -> Config:
    """The environment, checked. ConfigError names the variable that is wrong."""
    logs = HERE / "logs"
    path = Path(environ.text("CEREBRUM_MODELS_FILE", str(HERE / "models.toml"))).expanduser()
    try:
        catalog = load_catalog(path)
    except ValueError as error:
        raise ConfigError(f"CEREBRUM_MODELS_FILE: {error}") from None
    max_concurrent = environ.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, MAX_PLACES)
    host = environ.text("CEREBRUM_CM4_HOST", "0.0.0.0")
    if not HOST.fullmatch(host):
        raise ConfigError(f"CEREBRUM_CM4_HOST: expected an address or a host name, got {host!r}")
    return Config(
        backends=read_backends(catalog.backends, environ, max_concurrent),
        models=catalog.models,
        prefer=catalog.prefer,
        host=host,
        port=environ.integer("CEREBRUM_CM4_PORT", 7000, 0, 65535),
        client_keys=environ.keys("CEREBRUM_CM4_API_KEY"),
        hosts=environ.names("CEREBRUM_ALLOWED_HOSTS"),
        origins=environ.names("CEREBRUM_ALLOWED_ORIGINS"),
        log_level=environ.log_level(),
        log_file=environ.text("CEREBRUM_LOG_FILE", str(logs / "cerebrum.log") if logs.is_dir() else ""),
        log_prompts=environ.integer("CEREBRUM_LOG_PROMPTS", 0, 0, 1) == 1,
    )


NEEDS_RESTART = ("CEREBRUM_CM4_HOST", "CEREBRUM_CM4_PORT")


# ------------------------------------------------------------------------------------ policy: requests

FIELDS = {
    "prompt": Field(str, 1, required=True),
    "language": Field(str, 1, required=True),
    "max_tokens": Field(int, 1, MAX_TOKENS, DEFAULT_TOKENS),
    "temperature": Field(float, 0, 1, 0.4),
    "top_p": Field(float, 0, 1, above_low=True),
    "seed": Field(int, 0, 2**32 - 2),
    "stop": Field(list, 0, 16),
    "mode": Field(str, default="auto", choices=("auto", "complete", "infill", "instruct")),
    "suffix": Field(str),
    "filename": Field(str, 0, 1000),
    "instruction": Field(str, 1),
    "stop_at": Field(str, default="auto", choices=("auto", "none")),
    "progress": Field(bool, default=False),
    "session": Field(str, 1, 200),
    "model": Field(str, 1),
}
# At the start of a file there is nothing before the cursor, so the prompt may be empty.
FIELDS_WITHOUT_PROMPT = FIELDS | {"prompt": Field(str, 0, required=True)}
SAMPLED_BY = ("max_tokens", "temperature", "top_p", "seed", "stop")
PASSED_TO_BACKENDS = (*SAMPLED_BY, "stop_at", "progress", "indent", "predict_ms")


def read_completion(members: Mapping[str, Any], models: Collection[Model]) -> dict[str, Any]:
    """The checked fields of a completion. HttpError 400 names a bad field, 404 a model that is not in models.toml."""
    more = members.get("suffix") or members.get("instruction")
    fields = read_fields(members, FIELDS_WITHOUT_PROMPT if more else FIELDS)
    languages = served_languages(models)
    if fields["language"] not in languages:
        got = describe(fields["language"])
        raise HttpError("INVALID_REQUEST", f"language: expected one of {', '.join(languages)}, got {got}")
    ids = [model.id for model in models]
    if fields["model"] is not None and fields["model"] not in ids:
        got = describe(fields["model"])
        raise HttpError("MODEL_NOT_FOUND", f"model: expected one of {', '.join(ids)}, got {got}")
    return fields | {"mode": detect_mode(fields)}


def rank_models(
    config: Config, language: str, mode: str, present: Collection[str] | None, any_language: bool = False
) -> list[str]:
    """The ids of the models for a request, best first: of those `present` on a backend, first those that [prefer] lists
    for the mode and that serve the language, then the others in the table's order. A chat counts as an instruction.

    With `any_language`, a language that no present model serves goes to any of them. Without it, the one model may be
    one that is not there: a backend's 404 says which file is missing and how to get it. As long as it is unknown which
    models are there (None), there are no preferences.
    """
    here = [model for model in config.models if present is None or model.id in present]
    serving = [model.id for model in here if language in model.languages]
    if not language or (any_language and not serving):
        serving = [model.id for model in here]
    if not serving:
        return [next((model for model in config.models if language in model.languages), config.models[0]).id]
    preferred = () if present is None else config.prefer.get("instruct" if mode == "chat" else mode, ())
    return [*dict.fromkeys([*(id for id in preferred if id in serving), *serving])]


def session_of(address: str, session: str | None) -> str:
    """A name for the session that is unique across clients, or "" without one.

    Two clients may choose the same string and must not end each other's requests. A backend sees only the Pi's address,
    so it gets this name as well.
    """
    return hashlib.sha256(f"{address} {session}".encode()).hexdigest() if session else ""


def native_fields(asked: Asked, models: Collection[Model]) -> dict[str, Any]:
    """A dialect's request in the fields that `Gateway.complete` reads. A model may be named by an alias, and an unknown
    one is none; the language is what the text and the files' names tell."""
    fields: dict[str, Any] = {
        "prompt": "",
        "filename": "",
        "extra": [],
        "stop_at": "auto",
        "progress": False,
    } | asked.fields
    others = [entry["filename"] for entry in fields["extra"]]
    ids = {name: model.id for model in models for name in (*model.aliases, model.id)}
    language = "" if asked.kind == "chat" else guess_language(fields["filename"], fields["prompt"], others)
    return fields | {"language": language, "model": ids.get(fields["model"])}


DEFAULT_N_CTX = 4096  # until a backend tells its own
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


# ------------------------------------------------------------------------------------- policy: editors

MAX_TYPED_CHARS = 1024  # while a completion is computed, accepted suggestions included
MAX_RETYPED_CHARS = 8  # of a word that is corrected meanwhile
TAIL_CHARS = 1024  # of the text before the cursor: with as many equal, two cursors are at the same place
MAX_PREDICTIONS = 32  # that are remembered, of at most MAX_PREDICTED_CHARS each
MAX_PREDICTED_CHARS = 2048
# What must be equal in two requests for the answer to one to be the beginning of the answer to the other.
ALIKE = ("mode", "suffix", "model", "language", "filename", *SAMPLED_BY)


def is_typed_on(older: Mapping[str, Any], newer: Mapping[str, Any]) -> bool:
    """Whether two infills are of one place where somebody types: the text before one cursor nearly continues that
    before the other, and the lines below are the same. Two gaps of one file are not, nor two of a program's texts."""
    if older["filename"] != newer["filename"]:
        return False
    one, other = (lines_below(fields.get("suffix") or "") for fields in (older, newer))
    if not (one.startswith(other) or other.startswith(one)) or bool(one) != bool(other):
        return False
    return nearly_continues(older["prompt"], newer["prompt"]) or nearly_continues(newer["prompt"], older["prompt"])


def lines_below(suffix: str) -> str:
    """What follows the cursor's line, whose rest changes when an editor closes a bracket; else that rest."""
    return (suffix.partition("\n")[2] or suffix)[:TAIL_CHARS]


def nearly_continues(text: str, longer: str) -> bool:
    """Whether `longer` is `text` and at most MAX_TYPED_CHARS more. Up to MAX_RETYPED_CHARS at the end of the last line
    may differ if that line begins alike. An editor's window moves, so `longer` may begin later.

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
    """A digest of all in a request that must be equal beside the prompt."""
    return hashlib.sha256(repr([fields.get(name) for name in ALIKE]).encode("utf-8", "replace")).digest()


def typed_of(asked: str, text: str, prompt: str) -> int:
    """How many characters of `text`, the completion of the prompt `asked`, stand before the cursor in another prompt;
    0 if that is another place. The ends of the prompts decide, since an editor's window moves.

    >>> typed_of("def f():\\n    ret", "urn 1", "def f():\\n    return")
    3
    """
    tail, before = prompt[-TAIL_CHARS:], asked[-TAIL_CHARS:]
    start = len(before)
    # A tail shorter than TAIL_CHARS is a whole prompt, which must agree from its first character.
    whole = len(tail) < TAIL_CHARS
    place = (before + text).find(tail, 0 if whole else max(0, start + 1 - TAIL_CHARS), len(tail) if whole else None)
    return max(0, place + len(tail) - start) if place >= 0 else 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """A completion that someone may type: who asked, the end of the prompt, the rest of the request, the answer."""

    client: str
    tail: str
    alike: bytes
    text: str
    begun: Mapping[str, Any]
    finish_reason: str


class Predictions:
    """The latest completions, for clients who type what they say. Pure; at most 500 KB."""

    def __init__(self) -> None:
        self.recent: deque[Prediction] = deque(maxlen=MAX_PREDICTIONS)

    def add(self, client: str, fields: Mapping[str, Any], text: str, begun: Mapping[str, Any], reason: str) -> None:
        if 1 < len(text) <= MAX_PREDICTED_CHARS:
            tail = fields["prompt"][-TAIL_CHARS:]
            self.recent.append(Prediction(client, tail, alike(fields), text, begun, reason))

    def find(self, client: str, fields: Mapping[str, Any]) -> tuple[Prediction, str] | None:
        """A completion of which the client has typed the beginning, and its rest."""
        rest = alike(fields)
        for prediction in reversed(self.recent):
            if prediction.client == client and prediction.alike == rest:
                typed = typed_of(prediction.tail, prediction.text, fields["prompt"])
                if 0 < typed < len(prediction.text):
                    return prediction, prediction.text[typed:]
        return None


# ------------------------------------------------------------------------------------- policy: breaker

FAILURES_TO_OPEN = 3  # in a row
OPEN_SECONDS, MAX_OPEN_SECONDS = 5.0, 60.0  # the first pause and the longest; each failed trial doubles it
JITTER = 0.2  # +- this share of every pause: several Pis should not come back in step
TRIAL_SECONDS = 180.0  # until a trial's first token: a 7B model loads in 30 s and reads 4,000 tokens in 100 s


BREAKER_STATES = ("closed", "open", "half-open")


class Breaker:
    """Decides when not to ask a backend at all. Pure: `now` (seconds, monotonic) and `chance` (0 to 1) are passed in.

    closed --3 failures in a row--> open --pause over, then a good /health--> half-open --a token--> closed.
    From half-open, a failed or overdue trial opens it again for twice as long. `admit` returns a ticket, which is the
    number of the current state: results under an older ticket are late and count for nothing.
    """

    def __init__(self, chance: Callable[[], float]) -> None:
        self.state = "closed"
        self.failures = 0  # in a row
        self.opens = 0  # ever
        self._generation = 1
        self._chance = chance
        self._pause = 0.0  # without jitter; 0 while closed
        self._until = 0.0  # open: the pause's end; half-open: the trial's deadline
        self._trial = False  # half-open: a trial is under way

    def admits(self, now: float) -> bool:
        """Whether a request may be sent: any while closed, one as a trial while half-open."""
        if self._trial:
            self._expire(now)
        return self.state == "closed" or (self.state == "half-open" and not self._trial)

    def admit(self, now: float) -> int | None:
        """A ticket for one request; None means do not ask."""
        if not self.admits(now):
            return None
        if self.state == "half-open":
            self._trial, self._until = True, now + TRIAL_SECONDS
        return self._generation

    def succeeded(self, ticket: int) -> int:
        """A valid token came. Returns the ticket that the same request carries from here on."""
        if ticket != self._generation:
            return ticket
        self.failures = 0
        if self.state == "half-open":
            self._change("closed")
            self._pause = 0.0
        return self._generation

    def failed(self, ticket: int, now: float) -> None:
        """The backend, or the network on the way to it, failed this request."""
        if ticket != self._generation:
            return
        self.failures += 1
        if self.state == "half-open" or self.failures >= FAILURES_TO_OPEN:
            self._pause = min(self._pause * 2 or OPEN_SECONDS, MAX_OPEN_SECONDS)
            self._until = now + self._pause * (1 - JITTER + 2 * JITTER * self._chance())
            self._change("open")
            self.opens += 1

    def left(self, ticket: int) -> None:
        """The request ended without a verdict, refused or left by its client. A trial becomes free again."""
        if ticket == self._generation:
            self._trial = False

    def healthy(self, now: float) -> None:
        """The backend answered a probe."""
        if self.state == "open" and now >= self._until:
            self._change("half-open")

    def reset(self) -> None:
        """Another backend has taken the place of this one. Results of the old one are late."""
        self.failures, self._pause = 0, 0.0
        self._change("closed")

    def retry_in(self, now: float) -> float:
        """Seconds until a good /health would count."""
        return max(0.0, self._until - now) if self.state == "open" else 0.0

    def describe(self, now: float) -> dict[str, Any]:
        """For /v1/stats."""
        self._expire(now)
        retry = round(self.retry_in(now), 3)
        return {"state": self.state, "failures": self.failures, "opens": self.opens, "retry_in_s": retry}

    def _expire(self, now: float) -> None:
        if self._trial and now >= self._until:
            self.failed(self._generation, now)

    def _change(self, state: str) -> None:
        self.state, self._trial = state, False
        self._generation += 1


# ---------------------------------------------------------------------------------- IO: asking backends

CONNECT_SECONDS = 5.0  # Tailscale over a bad uplink needs two; the client should not wait longer for a dead backend
HEAD_SECONDS = 10.0  # our own backend sends its head before it loads a model or reads a prompt
IDLE_SECONDS = 30.0  # between two reads of a stream: our own backend sends a comment every 5 s
READING_SECONDS = 180.0  # until another engine makes progress: it is silent while it loads a model or reads a prompt
ALIVE_SECONDS = 5.0  # after so much silence of another engine, the client gets a comment
COUNTS_SECONDS = 2.0  # behind the last text of another engine: its counts may follow
SPARE_SECONDS = 8.0  # for which a connection waits for its request; vpsd closes it after 10
STILL_SECONDS = 600.0  # of comments alone: a 7B loads in 30 s and reads two prompts of 4,000 tokens in 200 s
NAME_SECONDS = 60.0  # for which the addresses of a name are remembered
RACE_SECONDS = 0.25  # until the next address of a name is tried beside the last one (RFC 8305)
STREAM_SECONDS = 7200.0  # in all: 2,048 tokens at half a token per second, and the queue before them
ASIDE_SECONDS = 2.0  # /health and /v1/models, which are answered in milliseconds
LOAD_SECONDS = 120.0  # for an answer that waits until a model is loaded
MAX_ERROR_BYTES = 65_536  # an error's JSON
MAX_TOKENS_BYTES = 8 << 20  # the tokens of 1 MiB of text
MAX_JSON_BYTES = 1 << 20  # /v1/models, of which a cloud lists hundreds; an answer that is not streamed


class Watchdog:
    """Cuts a connection that stays silent for `idle` seconds while we read from it.

    It has one timer per stream, moved only when it runs out: asyncio.timeout around each read would cost more than the
    read.
    """

    def __init__(self, reader: Reader, transport: asyncio.WriteTransport, idle: float = IDLE_SECONDS) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader, self._transport = reader, transport
        self._idle = idle
        self._end = self._loop.time() + STREAM_SECONDS
        self.expired = False
        self._timer = self._loop.call_later(idle, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        left = min(self._reader.since + self._idle, self._end) - now
        if left <= 0:
            self.expired = True
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(min(left, self._idle), self._check)

    def stop(self) -> None:
        self._timer.cancel()


class Loop(asyncio.SelectorEventLoop):
    """An event loop that looks names up in threads of its own, one for each name, and remembers the addresses.

    asyncio's threads are joined at the end, so a resolver that hangs would keep the daemon from stopping.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[tuple[Any, ...], tuple[float, list[Any]]] = {}  # until when, and the addresses
        self._asked: dict[tuple[Any, ...], asyncio.Future[Any]] = {}  # those that a thread is looking up

    async def getaddrinfo(self, host: Any, port: Any, **how: int) -> list[Any]:
        """As socket.getaddrinfo."""
        key = (host, port, *sorted(how.items()))
        until, found = self.names.get(key, (0.0, []))
        if self.time() < until:
            return found
        if key not in self._asked:
            self._asked[key] = self.create_future()
            threading.Thread(target=self._look_up, args=(key, how), daemon=True).start()
        answer: list[Any] | OSError = await asyncio.shield(self._asked[key])
        if isinstance(answer, OSError):
            raise answer
        return answer

    def _look_up(self, key: tuple[Any, ...], how: Mapping[str, Any]) -> None:
        found: list[Any] | OSError
        try:
            found = socket.getaddrinfo(*key[:2], **how)
        except OSError as error:
            found = error
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self.call_soon_threadsafe(self._learn, key, found)

    def _learn(self, key: tuple[Any, ...], found: list[Any] | OSError) -> None:
        self._asked.pop(key).set_result(found)
        if not isinstance(found, OSError):
            self.names[key] = self.time() + NAME_SECONDS, found


class Reader(asyncio.Protocol):
    """What has come on a connection and is not read yet. Beyond READ_BYTES the transport pauses.

    A StreamReader would copy each token twice, and drop what came before a reset.
    """

    def __init__(self) -> None:
        self.ended = self.broken = False  # nothing more comes; and the connection has failed
        self.since = math.inf  # when the current read began to wait; infinite while nobody waits
        self._bytes = b""
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._bytes += data
        if len(self._bytes) > READ_BYTES and self._transport:
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended, self.broken = True, exc is not None
        self._wake()

    def eof_received(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def read(self) -> bytes:
        """At most READ_BYTES; b"" at the end."""
        if not self._bytes and not self.ended:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            self.since = min(self.since, loop.time())  # a read that was cancelled goes on
            await self._waiter
            self.since = math.inf
        data, self._bytes = self._bytes[:READ_BYTES], self._bytes[READ_BYTES:]
        if len(data) == READ_BYTES and self._transport and not self.ended:
            self._transport.resume_reading()
        return data


class Answer:
    """A backend's answer to one request. Owns nothing: `Upstream.send` closes the connection."""

    def __init__(self, reader: Reader, transport: asyncio.WriteTransport, idle: float = IDLE_SECONDS) -> None:
        self.status, self.kind = 0, ""
        self._reader = reader
        self._ahead = b""  # read, but not yet used: a part of the head, then what came in one read with it
        self._scanned = self._skipped = 0  # bytes of a head, and heads
        self._body = Body(0, False)
        self._watchdog = Watchdog(reader, transport, idle)
        self.close = self._watchdog.stop

    async def read_head(self, *kinds: str) -> None:
        """Read the head, skipping those with status 1xx. HttpError or BackendFailure as in `parse_answer`. If this is
        cancelled, another call goes on where it was."""
        while self.status < 200:
            end = scan_head(self._ahead, self._scanned) if self._ahead else None
            if end is None:
                self._scanned = len(self._ahead)
                data = await self._reader.read()
                if not data:
                    raise BackendFailure(
                        "it did not answer in time"
                        if self._watchdog.expired
                        else "it closed the connection without an answer"
                    )
                self._ahead += data
                continue
            self.status, self.kind, self._body = parse_answer(self._ahead[:end], kinds)
            self._ahead, self._scanned, self._skipped = self._ahead[end:], 0, self._skipped + 1
            if self.status == 101 or self._skipped > 8:
                raise BackendFailure(f"it answered {self.status}")

    @property
    def ended(self) -> bool:
        """The framing says that the body is whole. Whatever follows is nobody's: the connection is not used again."""
        return self._body.done

    async def read(self) -> bytes:
        """More of the body's payload, b"" once it is whole, or BackendFailure."""
        body = self._body
        while not (body.failure or body.done):
            data, self._ahead = self._ahead, b""
            data = data or await self._reader.read()
            if payload := body.feed(data):
                return payload
            if not data:
                broken = "the connection broke" if self._reader.broken else ""
                body.end("it stopped" if self._watchdog.expired else broken)
                if not body.failure:
                    return b""
        if body.failure:
            raise body.failure
        return b""

    async def read_all(self, limit: int) -> bytes:
        """The whole body. BackendFailure over `limit` bytes, or if more than the body has come."""
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise BackendFailure("its answer is too long")
        if self._body.surplus:
            raise BackendFailure("its answer goes on past its end")
        return b"".join(pieces)


@contextlib.contextmanager
def blamed(broken: str, malformed: str = "") -> Iterator[None]:
    """Turns whatever a backend and the network do inside it into BackendFailure. No exception's own text reaches a
    client."""
    try:
        yield
    except TimeoutError:
        raise BackendFailure("it did not answer in time") from None
    except (OSError, UnicodeError):  # UnicodeError: a host name that cannot be encoded for DNS
        raise BackendFailure(broken) from None
    except BackendFailure:
        raise
    except HttpError:
        raise BackendFailure(malformed) from None


EVENTS, JSON = "text/event-stream", "application/json"


Connection = tuple[Reader, asyncio.Transport]


class Upstream:
    """Asks a backend, on a new connection for each request: a late answer can never reach another request.

    A POST leaves a spare connection behind for the next one, which saves a round trip, or three by TLS. It is closed if
    it is not used soon, so nothing connects while nobody asks.
    """

    def __init__(self, config: BackendConfig) -> None:
        self._config = config
        self._is_address = ":" in config.endpoint.host or is_ip_literal(config.endpoint.host)
        self._tls = make_tls(config.ca_file) if config.endpoint.tls else None
        self._spare: Connection | None = None
        self._keeper: asyncio.Task[None] | None = None  # opens the spare one, and closes it
        self._closed = False

    def close(self) -> None:
        """Close the spare connection, and leave none any more."""
        self._closed = True
        self._drop_spare()

    def _drop_spare(self) -> None:
        if self._keeper:
            self._keeper.cancel()
        if self._spare:
            self._spare[1].abort()
        self._spare = self._keeper = None

    async def _keep_spare(self) -> None:
        with contextlib.suppress(BackendFailure):
            spare = self._spare = await self._connect()
            try:
                await asyncio.sleep(SPARE_SECONDS)
            finally:
                if self._spare is spare:
                    self._spare = None
                    spare[1].abort()
        self._keeper = None

    def _take_spare(self) -> Connection | None:
        """The spare connection, unless the backend has closed it or sent anything."""
        spare, self._spare = self._spare, None
        if spare is None:
            return None
        self._drop_spare()  # its keeper
        if not spare[0].ended:
            poll = select.poll()
            poll.register(spare[1].get_extra_info("socket"), select.POLLIN)
            if not poll.poll(0):
                return spare
        spare[1].abort()
        return None

    @contextlib.asynccontextmanager
    async def send(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, idle: float | None = None
    ) -> AsyncIterator[Answer]:
        """Send one request once and yield its answer, of which nothing has been read. `idle` is for its Watchdog."""
        reader, transport = (self._take_spare() if body is not None else None) or await self._connect()
        answer, leaves_spare = Answer(reader, transport, idle or IDLE_SECONDS), body is not None
        try:
            transport.write(self._encode(method, path, body))
            yield answer
        except BackendFailure:
            leaves_spare = False
            raise
        finally:
            answer.close()
            transport.abort()
            # The backend should notice that this client has left before it gets the next request.
            if not answer.ended:
                self._drop_spare()
            if leaves_spare and not self._closed and not self._keeper:
                self._keeper = asyncio.create_task(self._keep_spare())

    async def begin(self, answer: Answer, seconds: float, *kinds: str) -> bool:
        """Read the head of a 200 of one of these media types; False if it has not come after `seconds`, then call
        again. HttpError if the backend refuses, BackendFailure if its answer is malformed."""
        with blamed("it closed the connection without an answer", "its answer is not HTTP/1.1"):
            try:
                async with asyncio.timeout(seconds):
                    await answer.read_head(*kinds)
            except TimeoutError:
                return False
            if answer.status == 200:
                return True
            config, refused = self._config, b""
            try:
                async with asyncio.timeout(seconds):
                    refused = await answer.read_all(MAX_ERROR_BYTES)
            except (BackendFailure, TimeoutError):  # of another engine, the status tells enough
                if config.api == "cerebrum":
                    raise
        if config.api == "cerebrum":
            raise refusal(answer.status, refused, config.key, config.key_env)
        raise engine_refusal(answer.status, refused, config.key_env)

    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        kind: str = EVENTS,
        seconds: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Send one request and yield its answer, whose head has been read, as by `begin`. BackendFailure if the head
        takes over `seconds` (None: HEAD_SECONDS)."""
        async with self.send(method, path, body, max(IDLE_SECONDS, seconds or 0.0)) as answer:
            if not await self.begin(answer, seconds or HEAD_SECONDS, kind):
                raise BackendFailure("it did not answer in time")
            yield answer

    async def get(self, path: str, limit: int) -> dict[str, Any]:
        """GET a JSON object, within ASIDE_SECONDS for the head and as much again for the body."""
        return await self._json("GET", path, None, limit, ASIDE_SECONDS)

    async def post(self, path: str, body: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """POST for a JSON object, which the backend may have to load a model for."""
        return await self._json("POST", path, body, limit, LOAD_SECONDS)

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit: int, seconds: float
    ) -> dict[str, Any]:
        async with self.ask(method, path, body, JSON, seconds) as answer:
            with blamed("the connection broke", "its answer is not JSON"):
                async with asyncio.timeout(ASIDE_SECONDS):
                    whole = await answer.read_all(limit)
                if self._config.api == "cerebrum":
                    return parse_json(whole)
        members = parse_leniently(whole)
        if members is None:
            raise BackendFailure("its answer is not JSON")
        return members

    async def _connect(self) -> Connection:
        endpoint, loop = self._config.endpoint, asyncio.get_running_loop()
        with blamed("it cannot be connected to"):
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    transport, reader = await loop.create_connection(
                        Reader,
                        endpoint.host,
                        endpoint.port,
                        ssl=self._tls,
                        happy_eyeballs_delay=None if self._is_address else RACE_SECONDS,
                    )
            except OSError as error:
                if isinstance(loop, Loop):
                    loop.names.clear()  # it may have moved
                if isinstance(error, ConnectionRefusedError):
                    raise BackendFailure("connection refused") from None
                raise
        # By default the kernel takes in megabytes, although the client may have stopped reading.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
        return reader, transport

    def _encode(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        endpoint, key = self._config.endpoint, self._config.key
        lines = [f"{method} {endpoint.prefix}{path} HTTP/1.1", f"Host: {endpoint.authority}", "Connection: close"]
        if key and self._config.api != "cerebrum":
            lines.append(f"Authorization: Bearer {key}")
        elif key and path != "/health":
            lines.append(f"X-API-Key: {key}")
        lines += [f"X-Request-ID: {request_id_var.get()}"] if request_id_var.get() != "-" else []
        payload = b""
        if body is not None:
            payload = json.dumps(body).encode("ascii")
            lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + payload


def make_tls(ca_file: str) -> ssl.SSLContext:
    """A context with the system's certificates, or with those of `ca_file` alone. ConfigError if the file has none."""
    try:
        return ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        raise ConfigError(f"ca_file: expected certificates in PEM form in {ca_file}, got {error}") from None


async def relay(answer: Answer, key: str) -> AsyncGenerator[Pair, None]:
    """The events of a backend of our own as pairs, behind ("begun", None); the last one is ("done", its members).

    The done event is held until the framing of the body has ended as well: whether a stream counts as finished must not
    depend on how its bytes were split. Every other end is a BackendFailure.
    """
    events, now = Events(), asyncio.get_running_loop().time
    moved = now()  # when anything but a comment came
    done: dict[str, Any] | None = None
    yield "begun", None
    while not answer.ended and (payload := await answer.read()):
        if done is None and not events.inside and TOKENS.fullmatch(payload):  # nearly always
            moved = now()
            yield "text", payload
            continue
        for kind, value in take_apart(events.feed(payload), key):
            if done is not None and kind in ("text", "done"):
                raise BackendFailure("it sent events after the last one")
            if kind == "done":
                done = value
                continue
            moved = moved if kind == "idle" else now()
            yield kind, value
        if now() - moved > STILL_SECONDS:
            raise BackendFailure("it makes no progress")
    if events.inside:
        raise BackendFailure("it ended in the middle of an event")
    if done is None:
        raise BackendFailure("it ended without saying that it is done")
    yield "done", done


async def translate(upstream: Upstream, answer: Answer, translator: Translator) -> AsyncGenerator[Pair, None]:
    """The same for another engine. It may send its head only when it has read the prompt, and it sends no comments:
    while it is silent, ("idle", None) comes every ALIVE_SECONDS or a little later. A text that the
    engine has ended is whole, whatever follows."""
    now = asyncio.get_running_loop().time
    events, life, ended = Events(), 0, 0.0  # `ended`: when the engine said that its text is whole
    spoke = lived = now()  # when the client got something for the last time, when the engine got on
    while not await upstream.begin(answer, ALIVE_SECONDS, EVENTS):
        if now() - lived > READING_SECONDS:
            raise BackendFailure("it did not answer in time")
        yield "idle", None
    yield "begun", None
    while not translator.done:
        payload = None
        try:
            async with asyncio.timeout(COUNTS_SECONDS if translator.reason else ALIVE_SECONDS):
                payload = await answer.read()
        except TimeoutError:
            pass
        except BackendFailure:
            if not translator.reason:
                raise
        # Some engines forget the blank line behind their last event.
        block = events.feed(b"\n\n" if payload == b"" else payload or b"")
        for pair in translator.feed(block, now()):
            spoke = now()
            yield pair
        if translator.reason:
            ended = ended or now()
        elif translator.life != life:
            life, lived = translator.life, now()
        elif now() - lived > READING_SECONDS:  # it sends nothing but comments
            raise BackendFailure("it did not answer in time")
        is_late = ended and (payload is None or now() - ended >= COUNTS_SECONDS)
        if not translator.done and (payload == b"" or is_late):
            yield translator.end()
        elif now() - spoke >= ALIVE_SECONDS:
            spoke = now()
            yield "idle", None


# ------------------------------------------------------------------------------------------- the gateway

PROBE_SECONDS = 5.0  # between two probes, +- 20 %
PAID_PROBE_SECONDS = 120.0  # of a cloud, which counts requests
STUCK_SECONDS = 300.0  # without a probe that ended; one takes a minute at most
MODELS_SECONDS = 60.0  # the age at which a backend's list of models is asked for again
EDITOR_SECONDS = 60.0  # after an infill, a place is kept for the next one
BUSY_SECONDS, MAX_BUSY_SECONDS = 0.1, 1.0  # before a dialect's request asks a busy backend again; the pause doubles
WAIT_SECONDS = {"infill": 3.0, "completion": 30.0, "chat": 30.0}  # for a place; minuet gives up after 3 s
RETRIED = frozenset({404, 429, 500, 503})  # another backend may do better; every other error is about the request
WITHOUT_MODEL = frozenset({"MODEL_NOT_FOUND", "MODEL_LOAD_FAILED"})  # another model may do better
MIN_READ_TOKENS = 32  # the time of fewer is mostly that of the first token
MAX_CACHED = 16  # texts that a backend has read, some 10 KB each
MAX_SERVED = 512  # sessions and files, each with the backend that served it last
SAME_BEGINNING = 200  # characters
MAX_TOKENIZING = 4  # texts at a time, which take no place; each can be 8 MB of tokens
MAX_TO_WARM = 4  # prompts, of as many clients
MAX_COLLECTED_BYTES = 2 << 20  # of text events for /v1/complete; 2,048 tokens take about 150 KB
NO_MODEL = "none"  # stands for the model of a completion that got none, in the counts of completions
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


class Shared:
    """One completion for all clients that ask the same at the same time, and the task that computes it.

    It remembers all pairs, so a client that comes late gets them all. It ends when its last reader leaves.
    """

    def __init__(self, pairs: Sequence[Pair] = (), job: Job | None = None, key: bytes = b"") -> None:
        self.pairs, self.job, self.key = list(pairs), job, key
        self.failure: HttpError | None = None
        self.readers: list[Reading] = []
        self.remembered = False  # as a prediction
        self.task: asyncio.Task[None] | None = None

    async def compute(self, pairs: AsyncGenerator[Pair, None]) -> None:
        """Take all pairs, and keep the error that ends them."""
        try:
            async with contextlib.aclosing(pairs):
                async for pair in pairs:
                    self.add(pair)
        except HttpError as error:
            self.failure = error
        except Exception as exception:
            self.failure = internal_error(exception)
        self.wake(all_of_them=True)

    def add(self, pair: Pair) -> None:
        self.pairs.append(pair)
        self.wake(all_of_them=pair[0] == "done")

    def wake(self, all_of_them: bool) -> None:
        """Whoever collects the whole text is woken for its end alone."""
        for reader in self.readers:
            if all_of_them or reader.streams:
                reader.woken.set()


class Reading:
    """One client's request in a dialect: its place in a completion, which it may share with others."""

    def __init__(self, gateway: Gateway, job: Job, asked: Asked, editor: str) -> None:
        self.gateway, self.job, self.streams, self.editor = gateway, job, asked.stream, editor
        self.predicts = asked.kind != "chat" and (asked.caching or job.fields["temperature"] == 0)
        self.shared = Shared()  # what it reads, once it has joined
        self.at = 0  # pairs read
        self.skip = self.typed = 0  # characters of the text that its client has typed before it asked, and has not got
        self.woken = asyncio.Event()
        self.replaced = False  # its editor has typed on, and asked again

    async def pairs(self) -> AsyncGenerator[Pair, None]:
        """The pairs of `Gateway.complete`, except that several texts may come as one. A reading that is replaced ends
        like a completion that a limit has cut. An error would be shown to the user by some editors."""
        try:
            shared = self.shared = self.gateway.join(self)
            while not self.replaced:
                if self.at < len(shared.pairs):
                    kind, value = self._next(shared.pairs)
                    yield kind, value
                    if kind == "done":
                        return
                elif shared.failure:
                    raise shared.failure
                else:
                    self.woken.clear()
                    await self.woken.wait()
            if not self.at:
                yield "started", self.gateway.beginning(self.job)
            yield "done", {"finish_reason": "replaced"}
        finally:
            self.gateway.leave(self)
            self.job.notes |= notes_of(self.shared.job or self.job)

    def _next(self, pairs: Sequence[Pair]) -> Pair:
        kind, value = pairs[self.at]
        self.at += 1
        if kind == "done" and self.predicts and self.shared.job:
            self.gateway.remember(self.job.client, self.shared)
            return kind, value | ({"type_through": True} if self.typed else {})
        texts = [value]
        while kind == "text" and self.at < len(pairs) and pairs[self.at][0] == "text":
            texts.append(pairs[self.at][1])
            self.at += 1
        if kind == "text" and self.skip:
            text = read_text(b"".join(texts))
            rest, self.skip = text[self.skip :], max(0, self.skip - len(text))
            return kind, text_event(rest) if rest else b""
        return kind, b"".join(texts) if len(texts) > 1 else value

    def replace(self) -> None:
        """End this reading, and at once what nobody else reads. Its client may be slow to take its answer."""
        self.replaced = True
        self.gateway.leave(self)
        self.woken.set()


def first_there(backends: Sequence[Backend]) -> Backend:
    """The first of these that is there, or else the first."""
    return next((backend for backend in backends if backend.available), backends[0])


@dataclass(frozen=True, slots=True)
class Candidates:
    """Who may answer a request: the models, best first, each with the backends that have it; and all these backends, in
    the table's order."""

    options: Sequence[tuple[str, frozenset[Backend]]]
    backends: Sequence[Backend]


REASONS = frozenset({"stop", "length", "block", "repeat"})  # why a completion ends by itself


def notes_of(job: Job) -> dict[str, Any]:
    """What the log says of a completion: its model, its tokens, and the seconds to the first one."""
    notes: dict[str, Any] = {"model": job.model} if job.model else {}
    if job.first_token:
        notes |= {"tokens": job.tokens, "ttft": f"{job.first_token - job.started:.2f}s"}
    return notes


def cache_key(job: Job) -> str:
    """Names the session of a job, or else its client's file. The backend that served it last probably has the beginning
    of the prompt in its cache."""
    return job.session or f"{job.client} {job.fields.get('filename') or ''}".lstrip()


class Gateway:
    """All state of the Pi. Owns the backends, and what belongs to clients."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.backends = [Backend(backend, config.models) for backend in config.backends]
        self.active: list[Job] = []  # that hold a place, maybe at a backend that is no longer in models.toml
        self.started, self.created = time.monotonic(), int(time.time())
        self.page = load_page(HERE / "cerebrum_page.html")
        self.requests_total = self.requests_failed = self.tokens = self.reconfigured = 0
        self.tallies = {model.id: Tally() for model in config.models}
        self.history = History(self.started)
        self.line: list[tuple[Job, asyncio.Event]] = []  # those who wait for a place, in the order of their coming
        self.shared: dict[bytes, Shared] = {}  # running completions of dialects, by what was asked
        self.readings: list[Reading] = []
        self.predictions = Predictions()
        self.editors: dict[str, float] = {}  # when each client asked for an infill last
        self.tokenizing = asyncio.Semaphore(MAX_TOKENIZING)
        self.counts = {"type_through": 0, "shared": 0, "replaced": 0}  # dialects' requests that ended so
        # Texts before a cursor that a backend has read, each behind its client, model and backend.
        self.cached: list[tuple[str, str, str, str]] = []
        self.served: dict[str, Backend] = {}  # the last backend of each session or file, by `cache_key`
        self.to_warm: dict[str, Job] = {}  # to be read into a backend's cache when it has nothing to do, by client
        self._reconfigured = asyncio.Event()

    @property
    def requests_active(self) -> int:
        return len(self.active)

    @property
    def available(self) -> bool:
        return any(backend.available for backend in self.backends)

    @property
    def first(self) -> Backend:
        """The backend whose figures stand for all."""
        return first_there(self.backends)

    @property
    def message(self) -> str:
        """Why no backend is available."""
        if self.available:
            return ""
        named = [f"{backend.id}: {backend.message}" for backend in self.backends]
        return "; ".join(named) if len(named) > 1 else self.first.message

    @property
    def models(self) -> dict[str, dict[str, Any]] | None:
        """What the first backend that has it tells of each model; None until a list came."""
        lists = [backend.models for backend in self.backends if backend.models is not None]
        return {id: about for models in reversed(lists) for id, about in models.items()} if lists else None

    @property
    def probes(self) -> int:
        """How often every backend has been probed."""
        return min(backend.probes for backend in self.backends)

    def sample(self) -> None:
        """Bring `history` up to date."""
        self.history.sample(time.monotonic(), (self.requests_total, self.requests_failed, self.tokens))

    def close(self) -> None:
        """Close what is kept for requests to come."""
        for backend in self.backends:
            backend.upstream.close()

    # Probing.

    def reconfigure(self, config: Config) -> None:
        """Apply new settings; running requests continue. A backend whose id stays keeps what is known of it.
        ConfigError if the settings cannot be used; then nothing has changed."""
        backends = [Backend(backend, config.models) for backend in config.backends]
        known = {(backend.id, backend.config.api): backend for backend in self.backends}
        for number, new in enumerate(backends):
            if old := known.get((new.id, new.config.api)):
                old.adopt(new)
                backends[number] = old
        gone = [backend for backend in self.backends if backend not in backends]
        self.config, self.backends = config, backends
        self.reconfigured += 1
        self.tallies = {model.id: Tally() for model in config.models} | self.tallies
        self.served = {key: backend for key, backend in self.served.items() if backend not in gone}
        for backend in gone:
            backend.wake.set()  # ends its probing
            backend.upstream.close()
            if backend.warming:
                backend.warming[1].cancel()
        self._reconfigured.set()
        self._call_next()

    async def probe_forever(self) -> None:
        """Keep `history` and what is known of each backend up to date: probe every 5 s, and when woken."""
        async with asyncio.TaskGroup() as group:
            probed = set[Backend]()
            while True:
                for backend in set(self.backends) - probed:
                    group.create_task(self._probe_forever(backend))
                probed = set(self.backends)
                self._reconfigured.clear()
                await self._reconfigured.wait()

    def stuck(self, now: float) -> str:
        """Names a backend whose probe has hung; "" if there is none."""
        stuck = [backend.id for backend in self.backends if now - backend.probed > STUCK_SECONDS]
        return f"the probe of {stuck[0]} has made no progress for {STUCK_SECONDS:g} s" if stuck else ""

    async def _probe_forever(self, backend: Backend) -> None:
        while backend in self.backends:
            backend.wake.clear()
            await backend.probe()
            self.sample()
            if not backend.trouble:
                self._call_next()
            delay = (PAID_PROBE_SECONDS if backend.is_paid else PROBE_SECONDS) * random.uniform(0.8, 1.2)
            if retry := backend.breaker.retry_in(time.monotonic()):
                delay = min(delay, retry)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await backend.wake.wait()

    # Routing.

    def route(self, fields: Mapping[str, Any]) -> str:
        """The id of the model that is asked for, or the best one, of those that are there if any is."""
        options = self._who_may(fields, any_language=True).options
        there = (model for model, having in options if any(backend.available for backend in having))
        return next(there, options[0][0])

    def _who_may(self, fields: Mapping[str, Any], any_language: bool) -> Candidates:
        """Who may answer, by the lists of models alone."""
        asked, language, mode = fields.get("model"), fields.get("language", ""), fields.get("mode", "")
        ids = [asked] if asked is not None else rank_models(self.config, language, mode, self.models, any_language)
        options = [(id, frozenset(backend for backend in self.backends if backend.has(id))) for id in ids]
        if not any(having for _, having in options):  # one of our own says what is missing, and how to get it
            options = [(ids[0], frozenset(backend for backend in self.backends if backend.api is None))]
        backends = [backend for backend in self.backends if any(backend in having for _, having in options)]
        return Candidates(options, backends)

    def _choose(self, job: Job) -> tuple[str, Backend] | None:
        """The model and the backend for a job; None if all places are taken. HttpError if nobody may be asked.

        Backends that the last probe did not reach are asked only if there are no others. Of those with a free place,
        the one comes first that probably has the beginning of the prompt in its cache, then the least busy one.
        """
        now, candidates = time.monotonic(), self._who_may(job.fields, bool(job.kind))
        passed = [*job.tried, *job.busy]
        usable = [one for one in candidates.backends if one not in passed and one.breaker.admits(now)]
        usable = [backend for backend in usable if not backend.trouble] or usable
        if not usable:
            raise job.failure or self._nobody(candidates)
        if not self._is_fair(job, usable):
            return None
        last = self.served.get(cache_key(job))
        free = [backend for backend in usable if backend.has_place(job)]
        for model, having in candidates.options:
            if best := [backend for backend in free if backend in having]:
                return model, last if last in best else min(best, key=Backend.load)
        return None

    def _nobody(self, candidates: Candidates) -> HttpError:
        if candidates.backends:
            return HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
        if unknown := [backend for backend in self.backends if backend.models is None]:
            return HttpError("VPS_UNAVAILABLE", next((one.message for one in unknown if one.message), NEVER_ASKED))
        expected, got = ", ".join(self.models or ()), describe(candidates.options[0][0])
        return HttpError("MODEL_NOT_FOUND", f"expected a model that a backend has ({expected or 'none'}), got {got}")

    def _is_fair(self, job: Job, usable: Sequence[Backend]) -> bool:
        """While an editor was seen lately, chats and plain completions leave a place for infills, and one client's
        infills leave one for another client's. Requests of our own API take any place."""
        now = time.monotonic()
        editors = {client for client, seen in self.editors.items() if now - seen < EDITOR_SECONDS}
        if not job.kind or not (editors - {job.client} if job.kind == "infill" else editors):
            return True
        running = [other for backend in usable for other in backend.active if not other.superseded]
        most = sum(backend.limit for backend in usable)
        if job.kind == "infill":
            alike = [other for other in running if other.kind == "infill" and other.client == job.client]
        else:
            alike = [other for other in running if other.kind in ("chat", "completion")]
        return len(alike) < max(1, most - 1)

    def _assign(self, job: Job) -> bool:
        """Give the job a place; False if all are taken. HttpError as by `_choose`."""
        chosen = self._choose(job)
        if not chosen:
            return False
        job.model, backend = chosen
        ticket = backend.breaker.admit(time.monotonic())
        assert ticket is not None
        job.ticket, job.backend, job.gone = ticket, backend, asyncio.Event()
        backend.active.append(job)
        self.active.append(job)
        backend.requests_total += 1
        self._remember_served(job, backend)
        return True

    def _remember_served(self, job: Job, backend: Backend) -> None:
        if key := cache_key(job):
            self.served.pop(key, None)
            self.served[key] = backend
            if len(self.served) > MAX_SERVED:
                del self.served[next(iter(self.served))]

    # Completing.

    async def complete(self, job: Job) -> AsyncGenerator[Pair, None]:
        """One completion as pairs of (kind, value), independent of the client's API and of the backend's:

            ("started", dict)   first: a backend answers. {"model", "n_ctx", "kept"}. An error before this pair can
                                still be an HTTP status. It comes again if another backend takes over.
            ("idle", None)      nothing new, but the backend is alive
            ("progress", dict)  {"stage": str, "done": int, "total": int}, if the job asks for progress
            ("text", bytes)     whole native token events, relayed without being parsed; `read_text` decodes them
            ("done", dict)      last: the result, which is the native done event without its `done`

        If a backend fails before its first token, the next one gets the request. A completion that fails raises
        HttpError. Whatever it holds is acquired in this body, so it is released when the generator ends or is closed; a
        generator that was never started holds nothing.
        """
        self.requests_total += 1
        begun: dict[str, Any] = {}
        if self.config.log_prompts:
            log.info("prompt: %s", prompt_of(job.fields))
        async with self._counting(job):
            while True:
                backend = await self._enter(job)
                try:
                    async with self._place(job, backend), contextlib.aclosing(self._answer(job, backend)) as pairs:
                        async for kind, value in pairs:
                            if (not begun or kind == "begun") and begun != (now := self.beginning(job)):
                                begun = now
                                yield "started", begun
                            if kind != "begun":
                                yield kind, value
                    return
                except HttpError as error:
                    may_fit = isinstance(error, TooLong)  # a longer context
                    if job.tokens or job.superseded or not (may_fit or error.status in RETRIED):
                        raise
                    if error.code == "RATE_LIMIT" and job.kind:
                        job.busy.append(backend)
                    elif error.code not in WITHOUT_MODEL or not self._has_another(backend, job):
                        job.tried.append(backend)
                    if job.failure is None or not isinstance(error, BackendFailure):  # what a backend says tells more
                        job.failure = error

    def _has_another(self, backend: Backend, job: Job) -> bool:
        """Whether a backend that could not load the job's model has another one for it."""
        job.without.append((backend, job.model))
        options = self._who_may(job.fields, bool(job.kind)).options
        others = [id for id, _ in options if backend.has(id) and (backend, id) not in job.without]
        if others and backend.models:
            backend.models.pop(job.model, None)  # until its next list
        return bool(others)

    @contextlib.asynccontextmanager
    async def _counting(self, job: Job) -> AsyncIterator[None]:
        """Count how the completion ends, and note for the log how it went."""
        reason = CANCELLED
        try:
            yield
        except Exception as error:
            reason = error.code if isinstance(error, HttpError) else "INTERNAL_ERROR"
            self.requests_failed += reason != "SUPERSEDED"
            raise
        finally:
            job.notes |= notes_of(job)
            self._count_end(job, job.reason or ("SUPERSEDED" if job.superseded else reason))

    def _count_end(self, job: Job, reason: str) -> None:
        tally = self.tallies.setdefault(job.model or NO_MODEL, Tally())
        tally.end(reason)
        tally.tokens += job.tokens
        if job.first_token:
            # When the last token of an answer came that is not whole, nobody has noted.
            last, tokens = (job.result_came, job.tokens) if job.reason else (job.first_token, 1)
            tally.spoke(job.first_token - job.started, last - job.started, tokens)

    def _count_work(self, job: Job, told: Mapping[str, Any]) -> None:
        """Count what the backend tells that it has done."""
        names = ("prompt_tokens", "cached_tokens", "draft_tokens", "accepted_tokens")
        prompt, cached, drafted, accepted = (told[name] if COUNT.accepts(told.get(name)) else 0 for name in names)
        tally = self.tallies[job.model]
        tally.prompt_tokens += max(0, prompt - cached)
        tally.cached_tokens += cached
        tally.draft_tokens += drafted
        tally.accepted_tokens += accepted

    async def _enter(self, job: Job) -> Backend:
        """Give the job a place, and return its backend. A dialect's job waits in line for one. A job of our own API
        gets its 429 at once, as its clients are promised. A job that a backend has failed gets that failure."""
        if not any(backend.is_known for backend in self.backends):  # the daemon has just been started
            await asyncio.gather(*(backend.probe() for backend in self.backends))
        while True:
            try:
                if not self._assign(job) and job.kind:
                    await self._wait_in_line(job)
                    if not job.backend:
                        self._assign(job)
                break
            except HttpError:
                if not job.busy or job.patience() < job.pause:
                    raise
                await asyncio.sleep(job.pause)
                job.busy.clear()
                job.pause = min(2 * job.pause, MAX_BUSY_SECONDS)
        if not job.backend:
            there = [backend for backend in self.backends if backend.available] or self.backends
            limit = sum(backend.limit for backend in there)
            kept = "" if sum(len(backend.active) for backend in there) >= limit else ", one of them for an editor"
            busy = HttpError("RATE_LIMIT", f"expected at most {limit} completions at a time{kept}; try again later")
            raise job.failure or busy
        return job.backend

    async def _wait_in_line(self, job: Job) -> None:
        """Until the job has a place, nobody may be asked, or its client has waited for long enough."""
        waiting = job, asyncio.Event()
        self.line.append(waiting)
        try:
            async with asyncio.timeout(job.patience()):
                await waiting[1].wait()
        except TimeoutError:
            pass
        except asyncio.CancelledError:
            if job.backend:
                self._release(job, job.backend)
            raise
        finally:
            if waiting in self.line:
                self.line.remove(waiting)

    @contextlib.asynccontextmanager
    async def _place(self, job: Job, backend: Backend) -> AsyncIterator[None]:
        """Hold the job's place, and tell the backend's breaker how it went.

        A newer completion ends the older one of its session. It waits until the older one has let go of the backend,
        which therefore never works on more than `max_concurrent` of our requests.
        """
        try:
            for other in self._running():
                if job.session and other.session == job.session and other is not job:
                    other.superseded = True
                    other.end(HttpError("SUPERSEDED", "a newer request of this session took its place"))
            for other in [other for other in backend.active if other.superseded]:
                await other.gone.wait()
            await self._stop_warming(backend)
            yield
        except HttpError as error:
            backend.requests_failed += error.code != "SUPERSEDED"
            backend.failed(job.ticket, error)
            raise
        finally:
            self._release(job, backend)

    def _release(self, job: Job, backend: Backend) -> None:
        backend.active.remove(job)
        self.active.remove(job)
        backend.breaker.left(job.ticket)
        job.backend = None
        job.gone.set()
        self._call_next()

    def _running(self) -> list[Job]:
        return [job for job in self.active if not job.superseded]

    def _call_next(self) -> None:
        """Give free places to those who wait: first to clients with the fewest running, then in the order of coming."""
        clients = [job.client for job in self._running()]
        for waiting in sorted(self.line, key=lambda waiting: clients.count(waiting[0].client)):
            try:
                called = self._assign(waiting[0])
            except HttpError:
                called = True  # it is told as soon as it asks again
            if called:
                self.line.remove(waiting)
                waiting[1].set()
        self._warm_next()

    async def _answer(self, job: Job, backend: Backend) -> AsyncGenerator[Pair, None]:
        """What the backend answers, as pairs. If it counts too many tokens, the prompt is fitted and sent again,
        once."""
        job.n_ctx, job.most = backend.n_ctx(job.model), sys.maxsize
        for ratio in (backend.ratio.get(job.model), None):
            try:
                asked = self._prepare(job, backend, ratio or max(REFIT * job.weight / job.counted, MIN_RATIO))
                async with backend.ask(job, asked) as pairs:
                    async for kind, value in pairs:
                        if kind == "text":
                            job.size += len(value)
                            if job.size > job.limit:
                                raise BackendFailure("its completion is too long")
                            self._tokens(job, backend, value.count(b"\n\n"))
                        elif kind == "done":
                            value = self._result(job, backend, value)
                        yield kind, value
                return
            except HttpError as error:
                backend.refused(job, error)
                if job.tokens or ratio is None or not isinstance(error, TooLong):
                    raise
                self._refit(job, backend, error)

    def _refit(self, job: Job, backend: Backend, error: TooLong) -> None:
        """Learn from a refusal that a prompt is too long. What another engine says may be misread, so it counts only if
        it is plausible; without a number, the prompt becomes shorter by a quarter."""
        counted, n_ctx = error.extra.get("prompt_tokens", 0), error.extra.get("n_ctx", job.n_ctx)
        estimated = backend.estimated_tokens(job)
        if backend.api:
            counted = counted if self._is_plausible(job, backend, counted) else 0
            n_ctx = min(n_ctx, job.n_ctx)
        if counted:
            backend.ratio.learn(job.model, job.weight, counted)
        else:
            job.most = int(0.75 * estimated)
        job.counted, job.n_ctx = counted or max(1, round(estimated)), n_ctx

    def _is_plausible(self, job: Job, backend: Backend, counted: int) -> bool:
        """Whether a prompt may have so many tokens."""
        estimated = backend.estimated_tokens(job)
        return estimated / PLAUSIBLE <= counted <= estimated * PLAUSIBLE

    # Following a completion in a dialect.

    def beginning(self, job: Job) -> dict[str, Any]:
        """The value of the pair "started"."""
        model = job.model or self.route(job.fields)
        return {"model": model, "n_ctx": job.n_ctx or self.n_ctx(model), "kept": job.kept}

    def join(self, reading: Reading) -> Shared:
        """What a reading reads: a completion that is running, or a new one; or at once, if nothing must be computed."""
        self.readings.append(reading)
        job, now = reading.job, time.monotonic()
        if job.kind == "infill":
            lately = {client: seen for client, seen in self.editors.items() if now - seen < EDITOR_SECONDS}
            self.editors = lately | {job.client: now}
        if job.fields["max_tokens"] == 0:
            self.warm(job)
            done = "done", {"finish_reason": "length"}
            return Shared([("started", self.beginning(job)), done])
        if reading.predicts and (found := self.predictions.find(job.client, job.fields)):
            self._count("type_through")
            self._replace_older(reading, ahead=True)
            job.notes |= {"model": found[0].begun["model"], "tokens": 0}
            return Shared(typed_pairs(*found))
        shared = self._typed_meanwhile(reading) or self._identical(job)
        shared.readers.append(reading)
        self._replace_older(reading)
        return shared

    def _typed_meanwhile(self, reading: Reading) -> Shared | None:
        """A running completion that has written what the client has typed since it asked for it."""
        job = reading.job
        if not reading.predicts or job.kind != "infill":
            return None
        wanted = alike(job.fields)
        for other in self.readings:
            shared = other.shared
            if not shared.job or not shared.task or shared.task.done() or other.editor != reading.editor:
                continue
            if alike(shared.job.fields) == wanted:
                text = "".join(read_text(value) for kind, value in shared.pairs if kind == "text")
                if typed := typed_of(shared.job.fields["prompt"], text, job.fields["prompt"]):
                    reading.skip = reading.typed = typed
                    self._count("type_through")
                    return shared
        return None

    def _identical(self, job: Job) -> Shared:
        """The running completion of the same request, or a new one. Samples without a seed shall differ."""
        key = hashlib.sha256(json.dumps(job.fields, sort_keys=True).encode("ascii")).digest()
        is_sample = job.fields["temperature"] > 0 and job.fields["seed"] is None
        shared = None if is_sample else self.shared.get(key)
        if shared:
            self._count("shared")
        else:
            shared = self.shared[key] = Shared(job=job, key=key)
            shared.task = asyncio.create_task(self._compute(shared, job))
        return shared

    async def _compute(self, shared: Shared, job: Job) -> None:
        try:
            await shared.compute(self.complete(job))
        finally:
            self._forget(shared)

    def _count(self, how: str) -> None:
        self.requests_total += 1
        self.counts[how] += 1

    def _forget(self, shared: Shared) -> None:
        """Nobody else may join it."""
        if self.shared.get(shared.key) is shared:
            del self.shared[shared.key]

    def _replace_older(self, reading: Reading, ahead: bool = False) -> None:
        """End the older infills of an editor that has typed on, unless they ask the same. With `ahead`, those that
        continue the reading's text go on: an editor asks ahead for what follows a completion that it shows."""
        fields = reading.job.fields
        for other in list(self.readings):
            of_editor = reading.job.kind == other.job.kind == "infill" and other.editor == reading.editor
            if other is reading or other.replaced or not of_editor or other.job.fields == fields:
                continue
            if ahead and other.job.fields["prompt"].startswith(fields["prompt"]):
                continue
            if is_typed_on(other.job.fields, fields):
                self.counts["replaced"] += 1
                other.replace()

    def leave(self, reading: Reading) -> None:
        """The reading has ended, or its client has left. The last one ends the completion; before, its place counts as
        that of a client who stays."""
        shared = reading.shared
        if reading in self.readings:
            self.readings.remove(reading)
        if reading not in shared.readers:
            return
        shared.readers.remove(reading)
        if shared.readers and shared.job:
            shared.job.client = shared.readers[0].job.client
            self._call_next()
        elif shared.task:
            shared.task.cancel()
            self._forget(shared)

    def remember(self, client: str, shared: Shared) -> None:
        """Keep a whole completion for a client who types what it says. One without a gap to fill may be a program's,
        which counts on its limit: if that has cut it, it is no beginning of another."""
        assert shared.job
        begun = [value for kind, value in shared.pairs if kind == "started"][-1]
        reason = shared.pairs[-1][1].get("finish_reason", "stop")
        if shared.remembered or (shared.job.kind == "completion" and reason == "length"):
            return
        shared.remembered = True
        text = "".join(read_text(value) for kind, value in shared.pairs if kind == "text")
        self.predictions.add(client, shared.job.fields, text, begun, reason)

    # Warming: reading a prompt into a backend's cache while it has nothing else to do.

    def warm(self, job: Job) -> None:
        """Read this prompt soon. Takes no place, waits until a backend has nothing to do, and ends when that gets a
        request; then it waits again. Of each client the newest counts."""
        self.to_warm.pop(job.client, None)
        self.to_warm[job.client] = job
        if len(self.to_warm) > MAX_TO_WARM:
            del self.to_warm[next(iter(self.to_warm))]
        self._warm_next()

    def _warm_next(self) -> None:
        for job in [] if self.line else [*self.to_warm.values()]:
            try:
                chosen = self._choose(job)
            except HttpError:
                continue  # nobody is there
            if not chosen:
                continue
            model, backend = chosen
            if not any(one.warms for one in self._who_may(job.fields, True).backends):
                del self.to_warm[job.client]
            elif backend.warms and not backend.active and not backend.warming and backend.breaker.state == "closed":
                del self.to_warm[job.client]
                job.model = model
                self._remember_served(job, backend)
                task = asyncio.create_task(self._warm(job, backend))
                task.add_done_callback(functools.partial(self._end_warming, backend))  # even if it never begins
                backend.warming = job, task

    async def _warm(self, job: Job, backend: Backend) -> None:
        try:
            async with contextlib.aclosing(self._answer(job, backend)) as pairs:
                async for _ in pairs:
                    pass
        except HttpError as error:
            log.info("%s: no prompt was read ahead: %s", backend.id, error.message)
        except Exception as exception:
            internal_error(exception)

    def _end_warming(self, backend: Backend, task: asyncio.Task[None]) -> None:
        backend.warming = None
        if not task.cancelled():
            self._warm_next()

    async def _stop_warming(self, backend: Backend) -> None:
        if backend.warming:
            job, task = backend.warming
            if job.client not in self.to_warm:
                self.warm(job)  # again, later: the backend keeps what it has read so far
            task.cancel()
            await asyncio.wait([task])

    def _max_fresh(self, job: Job, backend: Backend) -> tuple[int | None, list[str]]:
        """(how many tokens may be read for this job, texts that the backend has read for its client before)."""
        speed, limit = backend.read_speed.get(job.model), job.fields.get("prompt_ms", 0)
        if limit <= 1 or not speed or not job.fields["max_tokens"]:
            return None, []
        mine = [job.client, job.model, backend.id]
        return int(speed * limit / 1000), [text for *who, text in self.cached if who == mine]

    def _tokens(self, job: Job, backend: Backend, count: int) -> None:
        """Count valid tokens; a whole answer without any counts as a success too."""
        if not job.tokens and count:
            job.first_token = time.perf_counter()
        job.tokens += count
        backend.tokens += count
        self.tokens += count
        if backend.trouble or backend.breaker.failures:
            job.ticket = backend.breaker.succeeded(job.ticket)
            backend.found("")

    def n_ctx(self, model: str) -> int:
        """Of the first backend that has the model, of those that are there if any is."""
        having = [backend for backend in self.backends if backend.has(model)]
        return first_there(having or self.backends).n_ctx(model)

    def _prepare(self, job: Job, backend: Backend, ratio: float) -> dict[str, Any]:
        """The fields of vpsd's request, with a prompt that fits."""
        fields, n_ctx = job.fields, job.n_ctx
        longest = n_ctx // 4 if job.kind == "chat" else n_ctx  # a chat's answer is short, whatever its limit
        # In the dialects, a small limit leaves no more room than the usual one: a warm-up, with its limit of 0, must
        # fit the same text as the request that follows.
        least = DEFAULT_TOKENS if job.kind else 0
        budget = prompt_budget(n_ctx, min(max(fields["max_tokens"], least), longest))
        if backend.api:
            budget = min(int(budget / SPARE), job.most)
        prepared = prepare(fields, fields["mode"], budget, ratio, *self._max_fresh(job, backend))
        job.mode, job.kept, job.weight = fields["mode"], prepared.kept, prepared.weight
        job.above, job.cut = prepared.above, prepared.cut
        job.room = n_ctx - int(SPARE * (prepared.weight / ratio + TEMPLATE_TOKENS[fields["mode"]])) - MARGIN_TOKENS
        passed = {name: fields[name] for name in PASSED_TO_BACKENDS if fields.get(name) is not None}
        if job.session:
            passed["session"] = job.session
        if language := BY_NAME.get(fields["language"].lower()):  # a backend knows the syntax of these
            passed["language"] = language
        return {**passed, **prepared.body}

    def _result(self, job: Job, backend: Backend, done: Mapping[str, Any]) -> dict[str, Any]:
        """The result's own members, then whatever else the backend tells about it."""
        told = read_result(done)
        job.result_came, reason = time.perf_counter(), told.get("finish_reason", "stop")
        job.reason = reason if reason in REASONS else "other"
        self._count_work(job, told)
        self._tokens(job, backend, max(0, told.get("total_tokens", 0) - job.tokens))  # an event may have several
        counted = told.get("prompt_tokens", 0)
        if counted and (not backend.api or self._is_plausible(job, backend, counted)):
            backend.ratio.learn(job.model, job.weight, counted)
            self._learn_reading(job, backend, counted - told.get("cached_tokens", 0), told.get("ttft"))
        ours = {
            "language": job.fields["language"],
            "model": job.model,
            "total_tokens": told.pop("total_tokens", job.tokens),
            "inference_time": round(float(told.pop("inference_time", time.perf_counter() - job.started)), 3),
            "timestamp": timestamp(),
            "mode": job.mode,
        }
        if len(self.backends) > 1:
            ours["backend"] = backend.id
        return ours | told | ({"kept": job.kept} if job.kept else {})

    def _learn_reading(self, job: Job, backend: Backend, read: int, seconds: float | None) -> None:
        """How fast the backend reads prompts, and which text of a client's file it has read. A prompt that was cut
        short for the sake of time is read whole later, so that the next one need not be."""
        if seconds and seconds > 0.001 and read >= MIN_READ_TOKENS:
            backend.learn_speed(job.model, read / seconds)
        if job.kind not in ("infill", "completion"):
            return
        mine = job.client, job.model, backend.id
        # What begins alike is of the same file.
        of_others = [
            entry for entry in self.cached if entry[:3] != mine or not entry[3].startswith(job.above[:SAME_BEGINNING])
        ]
        self.cached = [*of_others, (*mine, job.above)][-MAX_CACHED:]
        if job.cut:
            self.warm(Job(job.fields | {"max_tokens": 0, "prompt_ms": 0}, kind=job.kind, client=job.client))


def typed_pairs(prediction: Prediction, rest: str) -> list[Pair]:
    """A completion that consists of the rest of an earlier one."""
    done = {"model": prediction.begun["model"], "finish_reason": prediction.finish_reason, "type_through": True}
    return [("started", prediction.begun), ("text", text_event(rest)), ("done", done)]


# -------------------------------------------------------------------------------------------- handlers


async def health(gateway: Gateway, request: Request) -> Response:
    """GET /health: the backends' state as the last probe and the traffic have shown it. `vps_available`: any of them is
    there. 503 says what is wrong."""
    told = {
        "vps_available": gateway.available,
        "uptime": round(time.monotonic() - gateway.started, 1),
        "backends": [
            {"id": backend.id, "available": backend.available, "message": backend.message}
            for backend in gateway.backends
        ],
    }
    if gateway.available:
        return Response({"status": "healthy", "timestamp": timestamp(), **told})
    raise HttpError("VPS_UNAVAILABLE", gateway.message, extra={"status": "unhealthy", **told})


def read_job(gateway: Gateway, request: Request, limit: float = math.inf) -> Job:
    """A native request as a Job."""
    fields = read_completion(request.json(), gateway.config.models)
    return Job(fields, session_of(request.address, fields["session"]), request.end, limit, notes=request.notes)


async def complete_stream(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete/stream: a completion as SSE, token by token."""
    return Response(events=gateway.complete(read_job(gateway, request)), render=write_event)


def write_event(pair: Pair) -> bytes:
    """A pair as native SSE, or b"" for a pair that has no event. The first one is "started", so the head goes out as
    soon as the backend answers."""
    kind, value = pair
    if kind == "text":
        return bytes(value)
    if kind == "idle":
        return SSE_COMMENT
    if kind == "progress":
        return sse_event({"progress": value})
    if kind == "done":
        return sse_event({"done": True, **value})
    return b""


async def complete(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete: a completion in one piece."""
    job = read_job(gateway, request, limit=MAX_COLLECTED_BYTES)
    job.fields["progress"] = False
    text, result = io.StringIO(), {}
    async with contextlib.aclosing(gateway.complete(job)) as pairs:
        async for kind, value in pairs:
            if kind == "text":
                text.write(read_text(value))
            elif kind == "done":
                result = value
    return Response({"completion": text.getvalue(), **result})


async def page(gateway: Gateway, request: Request) -> Response:
    """GET /: a page for a person, which uses this API."""
    if not gateway.page:
        raise HttpError(
            "NOT_FOUND", "expected cerebrum_page.html beside cm4d.py for this page; the API works without it"
        )
    status, body, headers = gateway.page.respond(request.head.headers)
    return Response(body, status, headers=headers, kind="text/html; charset=utf-8")


async def models(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models: the models of models.toml. `available`: a backend can be reached and has the model; then the
    entry also has what the first such backend tells about the model, and `backends` names all of them. `languages` has
    those that models.toml names (`served`) and those whose syntax is known. `data` is OpenAI's list: the models that
    some backend has, or all as long as that is unknown."""
    models, listed = gateway.config.models, list[dict[str, Any]]()
    for model in models:
        having = [one for one in gateway.backends if one.available and one.models and model.id in one.models]
        about = {
            "id": model.id,
            "name": model.name,
            "languages": list(model.languages),
            "parameters": model.parameters,
            "quantization": model.quantization,
            "available": bool(having),
            "backends": [backend.id for backend in having],
        }
        listed.append(about | ((having[0].models or {})[model.id] if having else {}))
    served = served_languages(models)
    languages: list[dict[str, Any]] = []
    for name in dict.fromkeys([*served, *LANGUAGES]):
        syntax = LANGUAGES.get(BY_NAME.get(name.lower(), ""))
        endings, filenames = (list(syntax.endings), list(syntax.filenames)) if syntax else ([], [])
        languages.append({"id": name, "endings": endings, "filenames": filenames, "served": name in served})
    here = [model for model in models if not gateway.models or model.id in gateway.models]
    data = [write_model(model.id, gateway.created) for model in here]
    prefer = {mode: list(ids) for mode, ids in gateway.config.prefer.items()}
    return Response(
        compact(
            {
                "models": listed,
                "vps_available": gateway.available,
                "languages": languages,
                "prefer": prefer,
                "object": "list",
                "data": data,
            }
        )
    )


async def model(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models/{id}: one model, as OpenAI lists it."""
    ids = [model.id for model in gateway.config.models]
    if request.parameter not in ids:
        raise HttpError("MODEL_NOT_FOUND", f"expected one of {', '.join(ids)}, got {describe(request.parameter)}")
    return Response(compact(write_model(request.parameter, gateway.created)))


async def props(gateway: Gateway, request: Request) -> Response:
    """GET /props: of the model that answers when none is named."""
    model = gateway.route({})
    places = sum(backend.limit for backend in gateway.backends)
    return Response(compact(write_props(model, gateway.n_ctx(model), places)))


async def tokenize(gateway: Gateway, request: Request) -> Response:
    """POST /tokenize: a text in tokens of the model that answers when none is named."""
    fields = read_fields(present(request.json()), TOKENIZE)
    model = gateway.route({})
    having = [one for one in gateway.backends if one.has(model) and (not one.api or one.api.tokenize)]
    if not having:
        raise HttpError("VPS_UNAVAILABLE", "expected a backend that counts tokens, got none")
    async with gateway.tokenizing:
        able = [backend for backend in having if backend.breaker.admits(time.monotonic())]
        if not able:
            raise HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
        tokens = await first_there(able).tokenize(model, fields)
    return Response(compact({"tokens": tokens}))


def speaking(dialect: Dialect) -> Callable[[Gateway, Request], Awaitable[Response]]:
    """The handler of a dialect's completions."""

    async def handle(gateway: Gateway, request: Request) -> Response:
        asked = dialect.read(request.json())
        fields = native_fields(asked, gateway.config.models)
        job = Job(fields, limit=MAX_COLLECTED_BYTES, kind=asked.kind, client=request.address, notes=request.notes)
        editor = f"{request.address} {request.head.headers.get('user-agent', '')}"
        reading = Reading(gateway, job, asked, editor)

        def reply_to(begun: Mapping[str, Any]) -> Reply:
            return dialect.reply(asked, request.head.request_id, int(time.time()), begun)

        if not asked.stream:
            return await collect(reading, reply_to)
        response = Response()
        response.events = dialect_stream(reading, reply_to, response)
        return response

    return handle


async def collect(reading: Reading, reply_to: Callable[[Mapping[str, Any]], Reply]) -> Response:
    """A completion in one piece, in a dialect."""
    text, response = io.StringIO(), Response()
    async with contextlib.aclosing(reading.pairs()) as pairs:
        async for kind, value in pairs:
            if kind == "started":
                reply, response.headers = reply_to(value), kept_headers(value["kept"])
            elif kind == "text":
                text.write(read_text(value))
            elif kind == "done":
                whole = text.getvalue() if value.get("finish_reason") != "replaced" else ""
                response.body = reply.whole(whole, value)
    return response


async def dialect_stream(
    reading: Reading, reply_to: Callable[[Mapping[str, Any]], Reply], response: Response
) -> AsyncGenerator[bytes, None]:
    """Blocks of whole SSE events in a dialect. The first may be empty, as in `write_event`."""
    begun = False
    async with contextlib.aclosing(reading.pairs()) as pairs:
        async for kind, value in pairs:
            if kind == "started":
                reply, response.headers = reply_to(value), kept_headers(value["kept"])
                yield b"" if begun else reply.begin()
                begun = True
            elif kind == "text":
                yield reply.text(value)
            elif kind == "idle":
                yield SSE_COMMENT
            elif kind == "done":
                yield reply.end(value)


def kept_headers(kept: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What of a request was sent, if that is not all: no dialect has a member for it."""
    if not kept or kept["parts"] == ["all"]:
        return ()
    messages = "{} of {} messages, ".format(*kept["messages"]) if "messages" in kept else ""
    return (("X-Cerebrum-Kept", f"{messages}{kept['characters']} of {kept['of']} characters"),)


async def stats(gateway: Gateway, request: Request) -> Response:
    """GET /v1/stats: counters and gauges; requests are completions. `backends` has those of each backend; `breaker` and
    `vps_response_time_ms`, which is the last good probe's and null before one, are those of the first that is there."""
    return Response(statistics(gateway))


async def activity(gateway: Gateway, request: Request) -> Response:
    """GET /v1/activity: the statistics, why no backend is available, and the counts of the last half hour. Each number
    of `requests`, `failed` and `tokens` counts `step_s` seconds, the last one the present step so far."""
    gateway.sample()
    loaded = dict.fromkeys(id for backend in gateway.backends for id in backend.models_loaded)
    away = [f"{one.id} is away: {one.message}" for one in gateway.backends if gateway.available and one.message]
    told = {"vps_message": gateway.message, "models_loaded": [*loaded], "notes": away}
    return Response({"timestamp": timestamp(), **statistics(gateway), **told, **gateway.history.describe()})


def statistics(gateway: Gateway) -> dict[str, Any]:
    """The members of /v1/stats."""
    now = time.monotonic()
    return {
        "uptime": round(now - gateway.started, 1),
        **write_stats(METRICS, things(gateway)),
        "vps_available": gateway.available,
        "vps_response_time_ms": gateway.first.response_ms,
        "memory_mb": round(resident_bytes() / 2**20, 1),
        "load_avg": [round(load, 2) for load in os.getloadavg()],
        "breaker": gateway.first.breaker.describe(now),
        "backends": [backend.describe(now) for backend in gateway.backends],
    }


METRICS: Table = {
    "": (
        Metric("cerebrum_build_info", "Which daemon this is; always 1.",
               lambda _: {("cm4d", VERSION): 1}, labels=("daemon", "version")),
        Metric("cerebrum_completions_started_total", "Requests for a completion.", "requests_total", "requests_total"),
        Metric("cerebrum_completions_failed_total", "Completions that failed.", "requests_failed"),
        Metric("cerebrum_completions_active", "Completions that hold a place.", "requests_active", "requests_active"),
        Metric("cerebrum_completions_waiting", "Completions that wait for a place.", lambda pi: len(pi.line)),
        Metric("cerebrum_shared_total", "Requests that shared a completion.", lambda pi: pi.counts["shared"], "shared"),
        Metric("cerebrum_replaced_total", "Infills that a newer one replaced.",
               lambda pi: pi.counts["replaced"], "replaced"),
        Metric("cerebrum_type_through_total", "Requests that the rest of an earlier completion answered.",
               lambda pi: pi.counts["type_through"], "type_through"),
        Metric("cerebrum_reloads_total", "How often the settings were read again.", "reconfigured"),
    ),
    "model": (
        *COMPLETIONS,
        Metric("cerebrum_tokens_total", "Tokens of completions that have ended.", "tokens"),
        Metric("cerebrum_prompt_tokens_total", "Tokens of prompts that backends computed.", "prompt_tokens"),
        Metric("cerebrum_prompt_tokens_cached_total", "Tokens of prompts that were in a cache.", "cached_tokens"),
        Metric("cerebrum_draft_tokens_total", "Tokens that drafts proposed.", "draft_tokens"),
        Metric("cerebrum_accepted_tokens_total", "Tokens of drafts that were accepted.", "accepted_tokens"),
    ),
    "backend": (  # of its part of /v1/stats
        Metric("cerebrum_backend_up", "Whether it is available.", lambda one: one["available"]),
        Metric("cerebrum_backend_places", "Completions that it takes at a time.", lambda one: one["max_concurrent"]),
        Metric("cerebrum_backend_active", "Completions that hold a place.", lambda one: one["requests_active"]),
        Metric("cerebrum_backend_models", "Models that it has.", lambda one: len(one["models"])),
        Metric("cerebrum_backend_models_loaded", "Models in its memory.", lambda one: len(one["models_loaded"])),
        Metric("cerebrum_backend_requests_total", "Requests sent to it.", lambda one: one["requests_total"]),
        Metric("cerebrum_backend_failures_total", "Requests that failed there.", lambda one: one["requests_failed"]),
        Metric("cerebrum_backend_tokens_total", "Tokens that came from there.", lambda one: one["tokens_total"]),
        Metric("cerebrum_backend_probe_seconds", "Time of the last good probe.",
               lambda one: None if one["response_time_ms"] is None else one["response_time_ms"] / 1000),
        Metric("cerebrum_breaker_state", "1 for the state of its circuit breaker.",
               lambda one: {(state,): one["breaker"]["state"] == state for state in BREAKER_STATES}, labels=("state",)),
        Metric("cerebrum_breaker_opens_total", "How often its breaker opened.", lambda one: one["breaker"]["opens"]),
    ),
}  # fmt: skip


def things(gateway: Gateway) -> Things:
    """What the rows of METRICS read."""
    now = time.monotonic()
    backends = {backend.id: backend.describe(now) for backend in gateway.backends}
    return {"": {"": gateway}, "model": gateway.tallies, "backend": backends}


async def metrics(gateway: Gateway, request: Request) -> Response:
    """GET /metrics: the counters of /v1/stats and more, for Prometheus."""
    server = write_metrics(SERVER, {"": {"": request.answered}})
    return Response(server + write_metrics(METRICS, things(gateway)), kind=CONTENT_TYPE)


async def openapi(gateway: Gateway, request: Request) -> Response:
    """GET /openapi.json: this document, which describes the API in OpenAPI 3.1."""
    from cerebrum_openapi import write_openapi  # compiled and loaded only for those who ask

    config = gateway.config
    return Response(compact(write_openapi(ROUTES, FIELDS, config.models, PASSED_ON, bool(config.client_keys))))


def load_page(path: Path) -> Page | None:
    """The page, or None and a line in the log: the daemon lives without it."""
    try:
        return Page(path.read_bytes())
    except OSError as error:
        log.warning("no page at /: cannot read %s: %s", path.name, error.strerror)
        return None


# ---------------------------------------------------------------------------------------------- routes

ROUTES = (
    Route("GET", "/", page, open=True),
    Route("GET", "/health", health, open=True, quiet=True),
    Route("POST", "/v1/complete", complete, json=True),
    Route("POST", "/v1/complete/stream", complete_stream, json=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/stats", stats),
    Route("GET", "/v1/activity", activity, quiet=True),
    Route("GET", "/metrics", metrics, quiet=True),
    *(
        Route("POST", path, speaking(dialect), json=True, foreign_error=write_error)
        for dialect in DIALECTS
        for path in dialect.paths
    ),
    *(Route("GET", f"{path}/{{id}}", model, foreign_error=write_error) for path in ("/v1/models", "/models")),
    Route("GET", "/models", models),
    Route("GET", "/openapi.json", openapi),
    Route("GET", "/props", props, foreign_error=write_error),
    Route("POST", "/tokenize", tokenize, json=True, foreign_error=write_error),
)

# ----------------------------------------------------------------------------------------------- start

DRAIN_SECONDS = 30.0  # given to running completions when we are told to stop


async def serve(environ: Environment, config: Config) -> int:
    """Listen and answer until SIGTERM or SIGINT, then let running completions end. Returns the exit status."""
    gateway = Gateway(config)
    server = Server(gateway, ROUTES, config.access)

    def reload() -> None:
        new_environ = read_environment(os.environ, HERE)
        new = load_config(new_environ)
        gateway.reconfigure(new)
        server.access = new.access
        set_up_logging(new.log_level, new.log_file)
        warn_of(new)
        environ.warn_of_changes(new_environ, NEEDS_RESTART)

    service = Service(reload, gateway.stuck)
    probing = asyncio.create_task(gateway.probe_forever())
    await server.start(config.host, config.port)
    log.info("listening on %s", server.url)
    failed = await service.run(probing)
    await server.stop(DRAIN_SECONDS)
    gateway.close()
    return int(failed)  # systemd starts it again


def warn_of(config: Config) -> None:
    """Log which backends will refuse us."""
    for backend in config.backends:
        if not backend.key and (backend.key_env or backend.api == "cerebrum"):
            log.warning("%s: %s is not set: it will refuse every completion", backend.id, backend.key_env or "key_env")


def answer_arguments(arguments: Sequence[str]) -> int:
    """Do what the options ask instead of serving. What they need is loaded only here."""
    about = "Cerebrum's daemon for the Raspberry Pi. Without an option it serves until it gets SIGTERM."
    make_parser("cm4d", about, HELP).parse_args(arguments)
    from cerebrum_check import check_pi

    return check_pi(HERE, load_config, Backend)


HELP = """\
configuration, the first that has a variable counts:
  files named like the variable in $CREDENTIALS_DIRECTORY
  the environment
  .env beside cm4d.py; .env.example lists all variables
  models.toml beside cm4d.py has the models and backends
SIGHUP reads them again.

exit status:
  0  told to stop; with --check: nothing has failed
  1  something that may pass, such as a busy port; with --check: something has failed
  2  wrong configuration or arguments
"""


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a wrong configuration, 1 for what may pass by itself."""
    if arguments:
        return answer_arguments(arguments)
    try:
        environ = read_environment(os.environ, HERE)
        config = load_config(environ)
        set_up_logging(config.log_level, config.log_file)
    except ConfigError as error:
        print(f"cm4d.py: {error}", file=sys.stderr)
        return 2
    warn_of(config)
    try:
        with asyncio.Runner(loop_factory=Loop) as runner:
            return runner.run(serve(environ, config))
    except ConfigError as error:
        print(f"cm4d.py: {error}", file=sys.stderr)
        return 2
    except ListenError as error:
        log.error("cannot listen on %s port %d: %s", config.host, config.port, error.strerror)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
