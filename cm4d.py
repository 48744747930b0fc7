#!/usr/bin/env python3
"""Cerebrum's orchestrator for the Raspberry Pi: checks, prepares, routes, sheds, breaks, relays.

    python3 cm4d.py                       # listens on 0.0.0.0:7000, asks the backends
    curl http://localhost:7000/health
    curl -N http://localhost:7000/v1/complete/stream -H 'Content-Type: application/json' \
         -d '{"prompt": "def fibonacci(n):", "language": "python", "max_tokens": 128}'

models.toml lists the backends; without any, the only one is the VPS at CEREBRUM_VPS_URL.
`Gateway.complete` runs every completion, and yields pairs of (kind, value): `/v1/complete/stream`
renders them as SSE, `/v1/complete` as one JSON answer. Editors and tools speak the dialects of
cerebrum/pi/dialects.py. A `Subscriber` reads a completion for one of their clients: identical
requests share one completion, an editor that types on ends its older infill, and text that the last
completion predicted is served without a backend.

The Pi refuses a completion with 429 while all places are taken, and with 503 while every breaker is
open; a completion in a dialect first waits for a place or for a breaker's trial. From a backend the
Pi refuses redirects, inexact framing or JSON, and a stream without a proper end: the client gets
all whole events up to the fault, then an error event, then a cut. A request that fails before its
first token goes to the next backend. The same one gets it again only after it closed a spare
connection without a byte, answered 429, refused the prompt as too long, or could not load one model
and has another. After the first token nothing is sent again.

Each class says which state it owns; docs/design.md has them in one table. Everything runs on the
event loop's thread, except name look-ups. Standard library only; cerebrum_common.py, models.toml
and the folder cerebrum must be beside cm4d.py, but cerebrum/vps and cerebrum/pi/page.html may be
missing, as may cerebrum_lsp.py, which the Pi only hands out.
"""

from __future__ import annotations

import sys

# noqa: UP036 (Debian 11 has 3.9, which fails less clearly at an import below)
if sys.version_info < (3, 11):
    print("cm4d.py: expected Python 3.11 or newer, got", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import os
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python3 -I` leaves this folder out

import asyncio
import contextlib
import functools
import hashlib
import math
import ssl
import time
import weakref
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, replace
from typing import Any

import cerebrum_common as common
from cerebrum.fields import Field, describe, parse_json, read_fields, wrong
from cerebrum.http import Access, Server, own_names
from cerebrum.metrics import (
    COMPLETIONS,
    CONTENT_TYPE,
    SERVER,
    Metric,
    resident_bytes,
    write_metrics,
    write_stats,
)
from cerebrum.pi import dialects, upstream
from cerebrum.pi.backend import Backend
from cerebrum.pi.breaker import BREAKER_OPEN, BREAKER_STATES
from cerebrum.pi.broadcast import Broadcasts, Subscriber
from cerebrum.pi.completion import NOTHING_SENT, RETRIED, Attempt, Completion
from cerebrum.pi.confidence import shown
from cerebrum.pi.counting import ACCEPTED, Counting
from cerebrum.pi.dialects import PREEMPTED, CompletionRequest
from cerebrum.pi.dispatcher import Dispatcher
from cerebrum.pi.fleet import Fleet
from cerebrum.pi.page import page_of
from cerebrum.pi.upstream import BackendConfig, Loop, Pair
from cerebrum.service import Service, make_parser, prompt_of, set_up_logging
from cerebrum.settings import Client, ConfigError, Environment, load_catalog, read_environment
from cerebrum.text.languages import BY_NAME, LANGUAGES, guess_language
from cerebrum.text.prompt import detect_mode
from cerebrum_common import HttpError, Model, Request, Response, Route, compact, log

HERE = Path(__file__).resolve().parent
# ------------------------------------------------------------------------------------ configuration


class Tls:
    """A certificate and its key in PEM files, for https. ConfigError if they cannot be used."""

    def __init__(self, certificate: str, key: str) -> None:
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.files = certificate, key
        self.load(certificate, key)

    def load(self, certificate: str, key: str) -> None:
        """Use this certificate from the next connection on."""
        try:
            self.context.load_cert_chain(
                certificate, key, password=b""
            )  # never ask for one at the terminal
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise ConfigError(
                f"CEREBRUM_CM4_TLS_CERT, CEREBRUM_CM4_TLS_KEY: expected PEM files that fit each "
                f"other: {reason}"
            ) from None


def read_tls(environ: Environment) -> Tls | None:
    certificate, key = environ.text("CEREBRUM_CM4_TLS_CERT"), environ.text("CEREBRUM_CM4_TLS_KEY")
    if bool(certificate) != bool(key):
        raise ConfigError(
            "CEREBRUM_CM4_TLS_CERT, CEREBRUM_CM4_TLS_KEY: expected both or neither, got one"
        )
    return Tls(certificate, key) if certificate else None


@dataclass(frozen=True, slots=True)
class Config:
    """The settings. Clients must send one of `client_keys` or of `clients`; with neither, they need
    no key.
    """

    backends: tuple[BackendConfig, ...]
    models: tuple[Model, ...]
    prefer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # model ids by mode
    host: str = "0.0.0.0"
    port: int = 7000
    client_keys: tuple[str, ...] = ()
    clients: Mapping[str, Client] | None = None  # by their keys; None: no client has a name
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    log_level: str = "INFO"
    log_file: str = ""
    log_prompts: bool = False
    tls: Tls | None = None

    @property
    def access(self) -> Access:
        named = (
            None
            if self.clients is None
            else {key: client.name for key, client in self.clients.items()}
        )
        guests = frozenset(client.name for client in self.names.values() if client.places)
        return Access(self.client_keys, own_names(self.hosts), self.origins, named, guests)

    @property
    def names(self) -> dict[str, Client]:
        """The clients by name."""
        return {client.name: client for client in (self.clients or {}).values()}


CLIENTS = "CEREBRUM_CM4_KEYS_FILE", HERE / "client-keys"


def load_config(environ: Environment) -> Config:
    """Read the settings from the environment and models.toml. ConfigError names the bad variable, a
    bad key's first.
    """
    client_keys, clients = environ.keys("CEREBRUM_CM4_API_KEY"), environ.clients(*CLIENTS)
    logs = HERE / "logs"
    path = Path(environ.text("CEREBRUM_MODELS_FILE", str(HERE / "models.toml"))).expanduser()
    catalog = load_catalog(path, LANGUAGES)
    max_concurrent = environ.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, upstream.MAX_PLACES)
    return Config(
        backends=upstream.read_backends(catalog.backends, environ, max_concurrent),
        models=catalog.models,
        prefer=catalog.prefer,
        host=environ.host("CEREBRUM_CM4_HOST", "0.0.0.0"),
        port=environ.integer("CEREBRUM_CM4_PORT", 7000, 0, 65535),
        client_keys=client_keys,
        clients=clients,
        hosts=environ.names("CEREBRUM_ALLOWED_HOSTS"),
        origins=environ.names("CEREBRUM_ALLOWED_ORIGINS"),
        log_level=environ.log_level(),
        log_file=environ.text(
            "CEREBRUM_LOG_FILE", str(logs / "cerebrum.log") if logs.is_dir() else ""
        ),
        log_prompts=environ.integer("CEREBRUM_LOG_PROMPTS", 0, 0, 1) == 1,
        tls=read_tls(environ),
    )


# --------------------------------------------------------------------------------- policy: requests

FIELDS = {
    "prompt": Field(str, 1, required=True),
    "language": Field(str, 1, required=True),
    "max_tokens": Field(int, 1, dialects.MAX_TOKENS, dialects.DEFAULT_TOKENS),
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
    "min_confidence": Field(float, 0, 1),
    "session": Field(str, 1, 200),
    "model": Field(str, 1),
}
# At the start of a file there is nothing before the cursor, so the prompt may be empty.
FIELDS_WITHOUT_PROMPT = FIELDS | {"prompt": Field(str, 0, required=True)}


def read_completion(members: Mapping[str, Any], models: Collection[Model]) -> dict[str, Any]:
    """The checked fields of a completion. HttpError 400 names a bad field, 404 a model that is not
    in models.toml. An alias of a language becomes the name that models.toml lists.
    """
    more = members.get("suffix") or members.get("instruction")
    fields = read_fields(members, FIELDS_WITHOUT_PROMPT if more else FIELDS)
    languages, given = common.served_languages(models), fields["language"]
    if given not in languages:
        fields["language"] = BY_NAME.get(given)
    if fields["language"] not in languages:
        raise wrong("language", f"one of {', '.join(languages)}", given)
    ids = [model.id for model in models]
    if fields["model"] is not None and fields["model"] not in ids:
        raise HttpError(
            "MODEL_NOT_FOUND",
            f"model: expected one of {', '.join(ids)}, got {describe(fields['model'])}",
        )
    return fields | {"mode": detect_mode(fields)}


def session_of(client: str, session: str | None) -> str:
    """A session name that is unique across clients, or "" without a session. Two clients may choose
    the same string, and a backend sees only the Pi's address.
    """
    return hashlib.sha256(f"{client} {session}".encode()).hexdigest() if session else ""


def native_fields(wanted: CompletionRequest, models: Collection[Model]) -> dict[str, Any]:
    """Convert a dialect's request to the fields that `Gateway.complete` reads. A request may name a
    model by an alias; an unknown name counts as no name. The language, except for a chat, is
    guessed from the text and the file names.
    """
    unsaid: dict[str, Any] = {
        "prompt": "",
        "filename": "",
        "extra": [],
        "stop_at": "auto",
        "progress": False,
    }
    fields = unsaid | wanted.fields
    others = [entry["filename"] for entry in fields["extra"]]
    ids = {name: model.id for model in models for name in (*model.aliases, model.id)}
    language = (
        ""
        if wanted.kind == "chat"
        else guess_language(fields["filename"], fields["prompt"], others)
    )
    return fields | {"language": language, "model": ids.get(fields["model"])}


# -------------------------------------------------------------------------------------- the gateway

MAX_TOKENIZING = 4  # texts at a time; they take no place, and one text can be 8 MB of tokens
MAX_COLLECTED_BYTES = 2 << 20  # text events of one /v1/complete; 2,048 tokens take about 150 KB


class Gateway:
    """Connects the owners of state, and runs every completion; `Server` has the sockets."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.started, self.created = time.monotonic(), int(time.time())
        self.reconfigured = 0
        self.warn_once = functools.cache(log.warning)
        self.fleet = Fleet()
        self.fleet.replace(config.backends, config.models, config.prefer)
        self.dispatcher = Dispatcher(
            self.fleet, lambda model, result: self.counting.work(model, result)
        )
        self.broadcasts = Broadcasts(
            self.dispatcher, self.complete, self.beginning, self.count_typed
        )
        self.counting = Counting(self.broadcasts)
        self.counting.configure(config.models, config.names)
        self.tokenizing = asyncio.Semaphore(MAX_TOKENIZING)
        self.tokenizers = weakref.WeakValueDictionary[
            str, asyncio.Lock
        ]()  # who tokenizes; guests also share ""
        self.page: Response | None = None  # everything else works without it
        try:
            self.page = page_of((HERE / "cerebrum/pi/page.html").read_bytes())
        except OSError as error:
            log.warning("no page at /: cannot read page.html: %s", error.strerror)

    def use_keys(self, environ: Environment) -> None:
        """Apply the keys that can be read: whatever else is wrong, a revoked one must stop working.
        `load_config` says why others cannot be read.
        """
        config = self.config
        with contextlib.suppress(ConfigError):
            config = replace(config, clients=environ.clients(*CLIENTS, strict=False))
        with contextlib.suppress(ConfigError):
            config = replace(config, client_keys=environ.keys("CEREBRUM_CM4_API_KEY"))
        if config.access.needs_key:  # only whole settings may let in everybody
            self.config = config
            self.dispatcher.end_reading()  # perhaps for a client who may no longer ask

    def reconfigure(self, config: Config) -> None:
        """Apply new settings; running requests continue. ConfigError if the settings cannot be
        used; then nothing has changed.
        """
        if self.config.clients is not None and not config.access.needs_key:
            raise ConfigError(
                "CEREBRUM_CM4_KEYS_FILE: expected the file, it has gone; an empty one lets "
                "nobody in"
            )
        self.fleet.replace(config.backends, config.models, config.prefer)
        self.config = config
        self.reconfigured += 1
        self.counting.configure(config.models, config.names)
        self.dispatcher.reconfigured()

    def who(self, request: Request) -> dict[str, Any]:
        """The fields of a CompletionRequest that say who asks."""
        named = self.config.names.get(request.client)
        return {"client": request.client, "guest": named.places if named else 0}

    @contextlib.asynccontextmanager
    async def turn_to_tokenize(self, request: Request) -> AsyncIterator[None]:
        """A person tokenizes one text at a time, and so do all guests together."""
        own = self.tokenizers.setdefault(request.client, asyncio.Lock())
        rank = self.tokenizers.setdefault("", asyncio.Lock()) if self.who(request)["guest"] else own
        async with own, contextlib.nullcontext() if rank is own else rank, self.tokenizing:
            yield

    def count_typed(self, client: str) -> None:
        self.counting.typed(client)

    def probed(self) -> None:
        """A backend was probed. It may be back, so those that wait may get a place."""
        self.counting.sample()
        self.dispatcher.advance()

    async def complete(self, completion: Completion) -> AsyncGenerator[Pair, None]:
        """One completion as pairs of (kind, value), independent of the client's API and of the
        backend's:

            ("started", dict)   first: a backend answers. {"model", "n_ctx", "kept", "threshold"}.
                                An error before this pair can still be an HTTP status. The pair
                                comes again if another backend takes over. `threshold`: lines of
                                less confidence are not for the client; None: all are
            ("idle", None)      nothing new, but the backend is alive
            ("progress", dict)  {"stage": str, "done": int, "total": int}, if the request asks for
                                progress
            ("text", bytes)     whole native token events, relayed without being parsed; `read_text`
                                decodes them
            ("judged", tuple)   (confidence of a line, characters of the text up to its end), behind
                                the line, if there is a threshold
            ("done", dict)      last: the result, a native done event without its member `done`

        A completion that fails raises HttpError. All resources are acquired in this body, so they
        are released when the generator ends or is closed; a generator that was never started holds
        nothing.
        """
        begun: dict[str, Any] = {}
        if self.config.log_prompts:
            log.info("prompt: %s", prompt_of(completion.request.fields))
        async with self.counting.completion(completion):
            while True:
                attempt = await self.dispatcher.enter(completion)
                try:
                    async with (
                        self.dispatcher.hold(attempt) as backend,
                        contextlib.aclosing(backend.answer(attempt)) as pairs,
                    ):
                        has_spoken = False
                        async for kind, value in pairs:
                            if (not begun or kind == "begun") and begun != (
                                now := self.beginning(completion)
                            ):
                                begun = now
                                yield "started", begun
                            if kind == "text" and not has_spoken:
                                has_spoken = True
                                # a trial has succeeded: others waited for its end
                                self.dispatcher.advance()
                            elif kind == "done":
                                value = self._result(attempt, value)
                            if kind != "begun":
                                yield kind, value
                    return
                except HttpError as error:
                    if attempt.reason != PREEMPTED:
                        if not attempt.may_be_repeated(error):
                            raise
                    elif attempt.tokens or not attempt.again:
                        if not begun:
                            yield "started", self.beginning(completion)
                        yield "done", self._result(attempt, {"finish_reason": PREEMPTED})
                        return
                    attempt.sent, error.__traceback__ = (
                        NOTHING_SENT,
                        None,
                    )  # both hold the prompt as it was sent

    def beginning(self, completion: Completion) -> dict[str, Any]:
        """The value of the pair "started"."""
        model = completion.model or self.fleet.route(completion.request.fields)
        attempt = completion.attempt
        sent, threshold = (attempt.sent, attempt.threshold) if attempt else (NOTHING_SENT, None)
        n_ctx = sent.n_ctx or self.fleet.n_ctx(model)
        return {"model": model, "n_ctx": n_ctx, "kept": sent.text.kept, "threshold": threshold}

    def _result(self, attempt: Attempt, done: dict[str, Any]) -> dict[str, Any]:
        """Count the work of a whole answer, and return its result: our own members, then the
        backend's.
        """
        request, kept, spent = (
            attempt.request,
            attempt.sent.text.kept,
            time.monotonic() - attempt.completion.started,
        )
        self.counting.work(attempt.model, done)
        if (
            request.kind == "infill"
            and attempt.size
            and done.get("confidence", -1) >= (attempt.threshold or 0)
        ):
            self.counting.band(done["confidence"])["suggested"] += 1
        if (
            attempt.sent.text.cut and request.kind != "chat"
        ):  # read it all later, so that the next one need not be cut
            fields = request.fields | {"max_tokens": 0, "prompt_ms": 0}
            self.dispatcher.read_ahead(replace(request, fields=fields))
        ours = {
            "language": request.fields["language"],
            "model": attempt.model,
            "total_tokens": done.pop("total_tokens", attempt.tokens),
            "inference_time": round(float(done.pop("inference_time", spent)), 3),
            "timestamp": common.timestamp(),
            "mode": request.fields["mode"],
        }
        if len(self.fleet.backends) > 1:
            ours["backend"] = attempt.backend
        return ours | done | ({"kept": kept} if kept else {})


# ----------------------------------------------------------------------------------------- handlers


async def health(gateway: Gateway, request: Request) -> Response:
    """GET /health: the backends' state, from the last probe and the traffic. `vps_available`: at
    least one backend is available. A 503 says what is wrong.
    """
    fleet, uptime = gateway.fleet, round(time.monotonic() - gateway.started, 1)
    backends = [
        {"id": one.id, "available": one.available, "message": one.breaker.message}
        for one in fleet.backends
    ]
    state = {"vps_available": fleet.available, "uptime": uptime, "backends": backends}
    if fleet.available:
        return Response({"status": "healthy", "timestamp": common.timestamp(), **state})
    raise HttpError("VPS_UNAVAILABLE", fleet.message, extra={"status": "unhealthy", **state})


def read_native(gateway: Gateway, request: Request, is_whole: bool = False) -> Completion:
    """A request of our own API, for an answer in one piece or for a stream."""
    fields = read_completion(parse_json(request.body), gateway.config.models)
    fields, limit = (
        (fields | {"progress": False}, MAX_COLLECTED_BYTES) if is_whole else (fields, math.inf)
    )
    session = session_of(request.client, fields["session"])
    wanted = CompletionRequest("", fields, session=session, limit=limit, **gateway.who(request))
    return Completion(wanted, request.end, request.notes)


async def complete_stream(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete/stream: a completion as SSE, token by token."""
    completion = read_native(gateway, request)
    pairs = shown(gateway.complete(completion), completion.request.fields)
    return Response(events=pairs, render=lambda pair: NATIVE_EVENTS[pair[0]](pair[1]))


# Pairs as native SSE. "started" has no event; it comes first, so the response head goes out once
# the backend answers.
NATIVE_EVENTS: dict[str, Callable[[Any], bytes]] = {
    "started": lambda _: b"",
    "idle": lambda _: common.SSE_COMMENT,
    "progress": lambda progress: common.sse_event({"progress": progress}),
    "text": bytes,
    "done": lambda result: common.sse_event({"done": True, **result}),
}


async def complete(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete: a completion in one piece."""
    completion = read_native(gateway, request, is_whole=True)
    _, text, result = await collect(shown(gateway.complete(completion), completion.request.fields))
    return Response({"completion": text, **result})


async def collect(pairs: AsyncGenerator[Pair, None]) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A completion in one piece: the value of its last pair "started", its text, and its result."""
    begun, texts, result = {}, list[bytes](), {}
    async with contextlib.aclosing(pairs):
        async for kind, value in pairs:
            if kind == "started":
                begun = value
            elif kind == "text":
                texts.append(value)
            elif kind == "done":
                result = value
    return begun, upstream.read_text(b"".join(texts)), result


async def page(gateway: Gateway, request: Request) -> Response:
    """GET /: a web page for people, which uses this API."""
    if not gateway.page:
        raise HttpError(
            "NOT_FOUND",
            "expected the file cerebrum/pi/page.html, got none; the API works without it",
        )
    return gateway.page


async def language_server(gateway: Gateway, request: Request) -> Response:
    """GET /cerebrum_lsp.py: the language server for editors, a Python program of this Pi's
    version.
    """
    try:
        text = (HERE / "cerebrum_lsp.py").read_bytes()
    except OSError:
        raise HttpError(
            "NOT_FOUND", "expected the file cerebrum_lsp.py beside cm4d.py, got none"
        ) from None
    return Response(text, kind="text/x-python; charset=utf-8")


async def accepted(gateway: Gateway, request: Request) -> Response:
    """POST /v1/accepted: count a completion that the user of an editor has accepted."""
    read = read_fields(dialects.present(parse_json(request.body)), ACCEPTED)
    return Response(gateway.counting.accept(request.client, **read))


async def models(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models: the models of models.toml. `available`: a backend that has the model can be
    reached; the entry then also has the members that the first such backend reports, and `backends`
    names all such backends. `languages` lists the languages that models.toml names (`served`) and
    those with a known syntax. `data` is OpenAI's list: the models that some backend has, or all
    models while no backend has listed any.
    """
    models, listed = gateway.config.models, list[dict[str, Any]]()
    for model in models:
        having = [
            one
            for one in gateway.fleet.backends
            if one.available and one.models and model.id in one.models
        ]
        about = {
            name: getattr(model, name)
            for name in ("id", "name", "languages", "parameters", "quantization")
        }
        about |= {"available": bool(having), "backends": [backend.id for backend in having]}
        listed.append(about | ((having[0].models or {})[model.id] if having else {}))
    served = common.served_languages(models)
    languages: list[dict[str, Any]] = []
    for name in dict.fromkeys([*served, *LANGUAGES]):
        syntax = LANGUAGES.get(BY_NAME.get(name.lower(), ""))
        endings, filenames = (syntax.endings, syntax.filenames) if syntax else ((), ())
        languages.append(
            {"id": name, "endings": endings, "filenames": filenames, "served": name in served}
        )
    here = [
        model for model in models if not gateway.fleet.models or model.id in gateway.fleet.models
    ]
    data = [dialects.write_model(model.id, gateway.created) for model in here]
    ours = {"models": listed, "vps_available": gateway.fleet.available, "languages": languages}
    return Response(
        compact(ours | {"prefer": gateway.config.prefer, "object": "list", "data": data})
    )


async def model(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models/{id}: one model, as OpenAI lists it."""
    ids = [model.id for model in gateway.config.models]
    if request.parameter not in ids:
        raise HttpError(
            "MODEL_NOT_FOUND",
            f"expected one of {', '.join(ids)}, got {describe(request.parameter)}",
        )
    return Response(compact(dialects.write_model(request.parameter, gateway.created)))


async def props(gateway: Gateway, request: Request) -> Response:
    """GET /props: the properties of the model that answers a request without a model name."""
    model = gateway.fleet.route({})
    places = sum(backend.limit for backend in gateway.fleet.backends)
    return Response(compact(dialects.write_props(model, gateway.fleet.n_ctx(model), places)))


async def tokenize(gateway: Gateway, request: Request) -> Response:
    """POST /tokenize: a text's tokens, in the model that answers a request without a model name."""
    fields = read_fields(dialects.present(parse_json(request.body)), dialects.TOKENIZE)
    model = gateway.fleet.route({})
    having = [
        one
        for one in gateway.fleet.backends
        if one.has(model) and (not one.api or one.api.tokenize)
    ]
    fault = HttpError(
        "VPS_UNAVAILABLE",
        BREAKER_OPEN if having else "expected a backend that counts tokens, got none",
    )
    async with gateway.turn_to_tokenize(request):
        for backend in sorted(having, key=lambda one: not one.available):
            if backend.breaker.admits:
                try:
                    return Response(b'{"tokens":[%b]}' % await backend.tokenize(model, fields))
                except HttpError as error:
                    if error.status not in RETRIED:
                        raise
                    fault = error
                finally:
                    gateway.dispatcher.advance()  # it may have been a trial
    raise fault


def speaking(dialect: dialects.Dialect) -> Callable[[Gateway, Request], Awaitable[Response]]:
    """The handler of a dialect's completions."""

    async def handle(gateway: Gateway, request: Request) -> Response:
        members = parse_json(request.body)
        if dialects.GONE & members.keys():
            gateway.warn_once(dialects.GONE_WARNING)
        wanted = dialect.read(members)
        fields = native_fields(wanted, gateway.config.models)
        wanted = replace(wanted, fields=fields, limit=MAX_COLLECTED_BYTES, **gateway.who(request))
        editor = f"{request.client} {request.address} {request.head.headers.get('user-agent', '')}"
        subscriber = Subscriber(gateway.broadcasts, Completion(wanted, notes=request.notes), editor)
        pairs = shown(subscriber.pairs(), fields, lambda: subscriber.typed_text)
        reply_to = functools.partial(
            dialect.reply, wanted, request.head.request_id, int(time.time())
        )
        if not wanted.stream:
            begun, text, result = await collect(pairs)
            whole = text if result.get("finish_reason") != "replaced" else ""
            return Response(
                reply_to(begun).whole(whole, result), headers=kept_headers(begun["kept"])
            )
        response = Response()
        response.events = dialect_stream(pairs, reply_to, response)
        return response

    return handle


async def dialect_stream(
    whole: AsyncGenerator[Pair, None],
    reply_to: Callable[[Mapping[str, Any]], dialects.Reply],
    response: Response,
) -> AsyncGenerator[bytes, None]:
    """Blocks of whole SSE events in a dialect. The first block may be empty, as in
    NATIVE_EVENTS.
    """
    begun = False
    async with contextlib.aclosing(whole) as pairs:
        async for kind, value in pairs:
            if kind == "started":
                reply, response.headers = reply_to(value), kept_headers(value["kept"])
                yield b"" if begun else reply.begin()
                begun = True
            elif kind == "text":
                yield reply.text(value)
            elif kind == "idle":
                yield common.SSE_COMMENT
            elif kind == "done":
                yield reply.end(value)


def kept_headers(kept: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """A header with the part of a request that was sent, unless all was: no dialect has a member
    for this.
    """
    if not kept or kept["parts"] == ["all"]:
        return ()
    messages = "{} of {} messages, ".format(*kept["messages"]) if "messages" in kept else ""
    return (("X-Cerebrum-Kept", f"{messages}{kept['characters']} of {kept['of']} characters"),)


async def stats(gateway: Gateway, request: Request) -> Response:
    """GET /v1/stats: counters and gauges; requests are completions. `backends` has the figures of
    each backend. `breaker` and `vps_response_time_ms` (of the last good probe, null before one) are
    the first available backend's.
    """
    return Response(statistics(gateway))


async def activity(gateway: Gateway, request: Request) -> Response:
    """GET /v1/activity: the statistics, the reason if no backend is available, and the counts of
    the last half hour. Each number of `requests`, `failed` and `tokens` covers `step_s` seconds,
    the last one the current step so far.
    """
    fleet, counting = gateway.fleet, gateway.counting
    counting.sample()
    loaded = dict.fromkeys(id for backend in fleet.backends for id in backend.models_loaded)
    away = [
        f"{one.id} is away: {one.breaker.message}"
        for one in fleet.backends
        if fleet.available and one.breaker.message
    ]
    more = {
        "vps_message": fleet.message,
        "models_loaded": [*loaded],
        "notes": away,
        **counting.history.describe(),
    }
    return Response({"timestamp": common.timestamp(), **statistics(gateway), **more})


def statistics(gateway: Gateway) -> dict[str, Any]:
    """The members of /v1/stats."""
    measured, first = subjects(gateway), gateway.fleet.first
    return {
        "uptime": round(time.monotonic() - gateway.started, 1),
        **write_stats(METRICS, measured),
        "vps_available": gateway.fleet.available,
        "vps_response_time_ms": first.response_ms,
        "memory_mb": round(resident_bytes() / 2**20, 1),
        "load_avg": [round(load, 2) for load in os.getloadavg()],
        "breaker": measured["backend"][first.id]["breaker"],
        "backends": [*measured["backend"].values()],
        "by_confidence": gateway.counting.by_confidence,
        "clients": gateway.counting.people.describe(),
    }


def describe_backend(backend: Backend, active: int) -> dict[str, Any]:
    """A backend's entry in /v1/stats. `active`: completions that hold a place there."""
    return {
        "id": backend.id,
        "api": backend.config.api,
        "available": backend.available,
        "message": backend.breaker.message,
        "response_time_ms": backend.response_ms,
        "requests_total": backend.requests_total,
        "requests_active": active,
        "requests_failed": backend.requests_failed,
        "max_concurrent": backend.limit,
        "tokens_total": backend.tokens,
        "models": list(backend.models or ()),
        "models_loaded": backend.models_loaded,
        "breaker": backend.breaker.describe(time.monotonic()),
    }


METRICS = {
    "": (
        Metric("cerebrum_build_info", "Which daemon this is; always 1.",
               lambda _: {("cm4d", common.VERSION): 1}, labels=("daemon", "version")),
        Metric("cerebrum_completions_started_total", "Requests for a completion.",
               "counting.requests", "requests_total"),
        Metric("cerebrum_completions_failed_total", "Completions that failed.", "counting.failed"),
        Metric("cerebrum_completions_active", "Completions that hold a place.",
               "dispatcher.active", "requests_active"),
        Metric("cerebrum_completions_waiting", "Completions that wait for a place.",
               lambda pi: len(pi.dispatcher.state.line)),
        Metric("cerebrum_shared_total", "Requests that shared a completion.", "broadcasts.shared", "shared"),
        Metric("cerebrum_replaced_total", "Infills that a newer one replaced.", "broadcasts.replaced", "replaced"),
        Metric("cerebrum_type_through_total", "Requests that the rest of an earlier completion "
                                              "answered.",
               "broadcasts.type_through", "type_through"),
        Metric("cerebrum_accepted_completions_total", "Completions that users accepted, as editors "
                                                      "report.",
               "counting.accepted", "accepted"),
        Metric("cerebrum_accepted_characters_total", "Characters of these completions.",
               "counting.accepted_characters", "accepted_characters"),
        Metric("cerebrum_infills_suggested_total", "Infills with a text, by the confidence of "
                                                   "their first line.",
               lambda pi: pi.counting.by_band("suggested"), labels=("from",)),
        Metric("cerebrum_infills_accepted_total", "Those of them that users accepted, as editors "
                                                  "report.",
               lambda pi: pi.counting.by_band("accepted"), labels=("from",)),
        Metric("cerebrum_reloads_total", "How often the settings were read again.", "reconfigured"),
    ),
    "model": (
        *COMPLETIONS,
        Metric("cerebrum_tokens_total", "Tokens of completions that have ended.", "tokens"),
        Metric("cerebrum_prompt_tokens_total", "Tokens of prompts that backends computed.", "prompt_tokens"),
        Metric("cerebrum_prompt_tokens_cached_total", "Tokens of prompts that were in a "
                                                      "cache.", "cached_tokens"),
        Metric("cerebrum_draft_tokens_total", "Tokens that drafts proposed.", "draft_tokens"),
        Metric("cerebrum_accepted_tokens_total", "Tokens of drafts that were accepted.", "accepted_tokens"),
    ),
    "client": (
        Metric("cerebrum_client_completions_total", "Completions that ended, by the name of "
                                                    "a key.", "completions"),
        Metric("cerebrum_client_tokens_total", "Tokens of these completions.", "tokens"),
        Metric("cerebrum_client_seconds_total", "Time in which these completions held a "
                                                "place.", "seconds"),
        Metric("cerebrum_client_accepted_total", "Completions that its user accepted.", "accepted"),
    ),
    "backend": (  # read from a backend's entry in /v1/stats
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


def subjects(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """The objects that the rows of METRICS read."""
    active = Counter(
        attempt.backend for attempt in gateway.dispatcher.state.places if not attempt.request.ahead
    )
    backends = {
        backend.id: describe_backend(backend, active[backend.id])
        for backend in gateway.fleet.backends
    }
    counting = gateway.counting
    return {
        "": {"": gateway},
        "model": counting.tallies,
        "client": counting.people.total,
        "backend": backends,
    }


async def metrics(gateway: Gateway, request: Request) -> Response:
    """GET /metrics: the counters of /v1/stats and more, for Prometheus."""
    server = write_metrics(SERVER, {"": {"": request.answered}})
    return Response(server + write_metrics(METRICS, subjects(gateway)), kind=CONTENT_TYPE)


# ------------------------------------------------------------------------------------------- routes

ROUTES = (
    Route("GET", "/", page, open=True),
    Route("GET", "/cerebrum_lsp.py", language_server, open=True),
    Route("GET", "/health", health, open=True, quiet=True),
    Route("POST", "/v1/complete", complete, json=True),
    Route("POST", "/v1/complete/stream", complete_stream, json=True),
    Route("POST", "/v1/accepted", accepted, json=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/stats", stats),
    Route("GET", "/v1/activity", activity, quiet=True),
    Route("GET", "/metrics", metrics, quiet=True),
    *(
        Route("POST", path, speaking(dialect), json=True, foreign_error=dialects.write_error)
        for dialect in dialects.DIALECTS
        for path in dialect.paths
    ),
    *(
        Route("GET", f"{path}/{{id}}", model, foreign_error=dialects.write_error)
        for path in ("/v1/models", "/models")
    ),
    Route("GET", "/models", models),
    Route("GET", "/props", props, foreign_error=dialects.write_error),
    Route("POST", "/tokenize", tokenize, json=True, foreign_error=dialects.write_error),
)
# -------------------------------------------------------------------------------------------- start

DRAIN_SECONDS = 30.0  # for running completions to end at shutdown


async def serve(environ: Environment, config: Config) -> int:
    """Listen and answer until SIGTERM or SIGINT, then let running completions end. Returns the exit
    status.
    """
    gateway = Gateway(config)
    server = Server(gateway, ROUTES, config.access)
    known = environ  # as last read

    def reload() -> None:
        nonlocal known
        with contextlib.suppress(ConfigError):  # raised below
            known = read_environment(os.environ, HERE, known)
        gateway.use_keys(known)
        server.use(gateway.config.access)
        known = read_environment(os.environ, HERE)
        new = load_config(known)
        gateway.reconfigure(new)
        server.use(new.access)
        if config.tls and new.tls:
            config.tls.load(*new.tls.files)
        set_up_logging(new.log_level, new.log_file)
        warn_of(new)
        tls = (
            ("CEREBRUM_CM4_TLS_CERT", "CEREBRUM_CM4_TLS_KEY")
            if bool(config.tls) != bool(new.tls)
            else ()
        )
        environ.warn_of_changes(known, ("CEREBRUM_CM4_HOST", "CEREBRUM_CM4_PORT", *tls))

    service = Service(reload, gateway.fleet.stuck)
    try:
        await server.start(config.host, config.port, tls=config.tls.context if config.tls else None)
    except OSError as error:
        log.error("cannot listen on %s port %d: %s", config.host, config.port, error.strerror)
        return 1  # systemd tries again: an interface may come up late at boot
    log.info("listening on %s", server.url)
    failed = await service.run(asyncio.create_task(gateway.fleet.probe_forever(gateway.probed)))
    await server.stop(DRAIN_SECONDS)
    for backend in gateway.fleet.backends:
        backend.upstream.close()
    return int(failed)  # systemd restarts the daemon after a 1


def warn_of(config: Config) -> None:
    """Log which backends will refuse us."""
    for backend in config.backends:
        if not backend.key and (backend.key_env or backend.api == "cerebrum"):
            log.warning(
                "%s: %s is not set: it will refuse every completion", backend.id, backend.variable
            )


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a wrong configuration, 1 for a failure that may pass by
    itself.
    """
    if arguments:
        about = "Cerebrum's daemon for the Raspberry Pi. Without an option it serves until it gets SIGTERM."
        make_parser("cm4d", about).parse_args(arguments)
        from cerebrum.check import check_pi  # loaded only for an option

        return check_pi(HERE, load_config)
    try:
        environ = read_environment(os.environ, HERE)
        config = load_config(environ)
        set_up_logging(config.log_level, config.log_file)
        warn_of(config)
        with asyncio.Runner(loop_factory=Loop) as runner:
            return runner.run(serve(environ, config))
    except ConfigError as error:
        print(f"cm4d.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
