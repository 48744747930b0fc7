#!/usr/bin/env python3
"""Cerebrum's orchestrator for the Raspberry Pi: checks, prepares, routes, sheds, breaks, relays.

    python3 cm4d.py                       # listens on 0.0.0.0:7000, asks the backends
    curl http://localhost:7000/health
    curl -N http://localhost:7000/v1/complete/stream -H 'Content-Type: application/json' \
         -d '{"prompt": "def fibonacci(n):", "language": "python", "max_tokens": 128}'

models.toml lists the backends; without any, the only one is the VPS at CEREBRUM_VPS_URL.
`Runner` runs every completion, and yields pairs of (event, value): `/v1/complete/stream` renders
them as SSE, `/v1/complete` as one JSON answer. Editors and tools speak the dialects of
cerebrum/pi/dialects.py. A `Subscriber` reads a completion for one of their clients: identical
requests share one completion, an editor that types on ends its older infill, and text that the last
completion predicted is served without a backend.

The Pi refuses a completion with 429 while all places are taken, and with 503 while every breaker is
open; a completion in a dialect first waits for a place or for a breaker's trial. From a backend the
Pi refuses redirects, inexact framing or JSON, and a stream without a proper end: the client gets
all whole events up to the fault, then an error event, then a cut. A request that fails before its
first token goes to the next backend; after the first token nothing is sent again. In five cases the
same backend gets the request again:

- it has closed a spare connection without a byte;
- it has answered 429, and the client is ready to wait;
- it has refused the prompt as too long: a shorter one is sent, once;
- it could not load one model, and has another;
- it has broken off behind a balancer, where another replica may answer.

Each class says which state it owns; docs/design.md has them in one table. Everything runs on the
event loop's thread, except asyncio's look-ups of names. Standard library only; cerebrum_common.py,
models.toml and the folder cerebrum must be beside cm4d.py, but cerebrum/vps and what the Pi hands
out (cerebrum/pi/files.py) may be missing.
"""

from __future__ import annotations

import sys

# Debian 11 has 3.9, which fails less clearly at an import below.
if sys.version_info < (3, 11):  # noqa: UP036
    print("cm4d.py: expected Python 3.11 or newer, got", sys.version.split()[0], file=sys.stderr)
    sys.exit(2)

import os
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))  # `python3 -I` leaves this folder out

import asyncio
import contextlib
import math
import ssl
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from cerebrum.fields import Field, JsonObject, Members, describe, parse_json, read_fields, wrong
from cerebrum.http import Access, Server, own_names
from cerebrum.metrics import COMPLETIONS, Metric, Table, metrics_of, resident_bytes, write_stats
from cerebrum.pi import dialects, upstream
from cerebrum.pi.breaker import BREAKER_STATES
from cerebrum.pi.broadcast import Broadcasts, Subscriber
from cerebrum.pi.completion import Completion, CompletionRequest, Pairs, read_text
from cerebrum.pi.counting import ACCEPTED, Counting
from cerebrum.pi.dispatcher import Dispatcher, limit_of
from cerebrum.pi.files import FILES, headers_of
from cerebrum.pi.fleet import Fleet, first_there
from cerebrum.pi.runner import Runner
from cerebrum.request import DEFAULT_TOKENS, MAX_TOKENS, RULES, GenerationRequest
from cerebrum.service import Service, make_parser, set_up_logging
from cerebrum.settings import Client, ConfigError, Environment, load_catalog, read_environment
from cerebrum.text.languages import BY_NAME, LANGUAGES, Language, guess_language, language_named
from cerebrum.text.prompt import detect_mode
from cerebrum_common import (
    LINES,
    SSE_COMMENT,
    VERSION,
    Headers,
    HttpError,
    Model,
    Request,
    Response,
    Route,
    compact,
    log,
    served_languages,
    sse_event,
    timestamp,
)

HERE = Path(__file__).resolve().parent
# ------------------------------------------------------------------------------------ configuration


TLS = "CEREBRUM_CM4_TLS_CERT, CEREBRUM_CM4_TLS_KEY"


def read_tls(environ: Environment) -> ssl.SSLContext | None:
    """A certificate and its key in PEM files, for https. ConfigError if they cannot be used."""
    certificate = environ.text("CEREBRUM_CM4_TLS_CERT")
    key = environ.text("CEREBRUM_CM4_TLS_KEY")
    if bool(certificate) != bool(key):
        raise ConfigError(f"{TLS}: expected both or neither, got one")
    if not certificate:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        # With a password, OpenSSL never asks for one at the terminal.
        context.load_cert_chain(certificate, key, password=b"")
    except (OSError, ValueError) as error:
        system = getattr(error, "strerror", "")
        raise ConfigError(
            f"{TLS}: expected PEM files that fit each other: {system or error}"
        ) from None
    return context


@dataclass(frozen=True, slots=True)
class Config:
    """The settings. Clients must send one of `client_keys` or of `clients`; with neither, they need
    no key.
    """

    backends: tuple[upstream.BackendConfig, ...]
    models: tuple[Model, ...]
    prefer: Mapping[str, tuple[str, ...]]  # model ids by mode
    host: str
    port: int
    client_keys: tuple[str, ...]
    clients: Mapping[str, Client] | None  # by their keys; None: no client has a name
    hosts: frozenset[str]
    origins: frozenset[str]
    log_level: str
    log_file: str
    log_prompts: bool
    tls: ssl.SSLContext | None
    state_dir: Path

    @property
    def access(self) -> Access:
        return Access(self.client_keys, own_names(self.hosts), self.origins, self.clients)

    @property
    def names(self) -> dict[str, int]:
        """The places of each named client."""
        clients = self.clients or {}
        return {client.name: client.places for client in clients.values()}


CLIENTS = "CEREBRUM_CM4_KEYS_FILE", HERE / "client-keys"


def load_config(environ: Environment) -> Config:
    """Read the settings from the environment and models.toml. ConfigError names the bad variable, a
    bad key's first.
    """
    client_keys = environ.keys("CEREBRUM_CM4_API_KEY")
    clients = environ.clients(*CLIENTS)
    path = environ.path("CEREBRUM_MODELS_FILE", str(HERE / "models.toml"))
    catalog = load_catalog(path, LANGUAGES)
    max_concurrent = environ.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, upstream.MAX_PLACES)
    backends = upstream.read_backends(catalog.backends, environ, max_concurrent)
    host = environ.host("CEREBRUM_CM4_HOST", "0.0.0.0")
    port = environ.integer("CEREBRUM_CM4_PORT", 7000, 0, 65535)
    hosts = environ.names("CEREBRUM_ALLOWED_HOSTS")
    origins = environ.names("CEREBRUM_ALLOWED_ORIGINS")
    log_level = environ.log_level()
    folder = HERE / "logs"
    usual_log = str(folder / "cerebrum.log") if folder.is_dir() else ""
    log_file = environ.text("CEREBRUM_LOG_FILE", usual_log)
    log_prompts = environ.integer("CEREBRUM_LOG_PROMPTS", 0, 0, 1) == 1
    return Config(
        backends,
        catalog.models,
        catalog.prefer,
        host,
        port,
        client_keys,
        clients,
        hosts,
        origins,
        log_level,
        log_file,
        log_prompts,
        read_tls(environ),
        environ.state_dir(),
    )


# --------------------------------------------------------------------------------- policy: requests

# In what vpsd is asked.
SET_BY_US = ("indent", "predict_ms", "prompt_ms", "heal", "special", "priority")
FIELDS = {
    **{name: rule for name, rule in RULES.items() if name not in SET_BY_US},
    "prompt": Field(str, required=True),  # may be empty beside a suffix or an instruction
    "language": Field(str, 1, 40, required=True),
    "max_tokens": Field(int, 1, MAX_TOKENS, DEFAULT_TOKENS),
    "mode": Field(str, default="auto", choices=("auto", "complete", "infill", "instruct")),
    "instruction": Field(str, 1),
    "model": Field(str, 1, default=""),
}


def read_native(members: Members, models: Sequence[Model]) -> GenerationRequest:
    """The checked fields of a completion. HttpError 400 names a bad field, 404 a model that is not
    in models.toml. An alias of a language becomes the name that models.toml lists. An instruction
    may be for any other language: where its answer ends does not depend on the syntax.
    """
    fields = read_fields(members, FIELDS)
    languages = served_languages(models)
    given = fields["language"]
    if given not in languages:
        fields["language"] = BY_NAME.get(given, given)
    if fields["language"] not in languages and not fields["instruction"]:
        raise wrong("language", f"one of {', '.join(languages)}", given)
    if fields["model"]:
        fields["model"] = find_model(fields["model"], models).id
    return GenerationRequest(**fields | {"mode": detect_mode(fields)})


def model_named(name: Any, models: Sequence[Model]) -> Model | None:
    """The model with this id or alias."""
    for model in models:
        if name in (model.id, *model.aliases):
            return model
    return None


def find_model(name: Any, models: Sequence[Model]) -> Model:
    """As `model_named`. HttpError 404 if there is none."""
    if model := model_named(name, models):
        return model
    ids = ", ".join(model.id for model in models)
    raise HttpError("MODEL_NOT_FOUND", f"model: expected one of {ids}, got {describe(name)}")


def native_fields(wanted: CompletionRequest, models: Sequence[Model]) -> GenerationRequest:
    """Convert a dialect's request to the fields that a backend is asked with. A request may name a
    model by an alias; an unknown name counts as no name. An unknown language, or none, is guessed
    from the text and the file names, which a chat lacks.
    """
    fields = wanted.fields
    model = model_named(fields.model, models)
    language = BY_NAME.get(fields.language.lower())
    if not language:
        others = [entry["filename"] for entry in fields.extra]
        language = guess_language(fields.filename, fields.prompt, others)
    return replace(fields, language=language, model=model.id if model else "")


# -------------------------------------------------------------------------------------- the gateway

MAX_TOKENIZING = 4  # texts at a time; they take no place, and one text can be 8 MB of tokens


class Gateway:
    """Connects the owners of state; `Server` has the sockets."""

    def __init__(self, config: Config) -> None:
        self.started = time.monotonic()
        self.created = int(time.time())
        self.reconfigured = 0
        self.fleet = Fleet()
        self.counting = Counting(config.state_dir / "people.json")
        self.dispatcher = Dispatcher(self.fleet, self.counting)
        self.runner = Runner(self.fleet, self.dispatcher, self.counting)
        self.broadcasts = Broadcasts(self.runner)
        self._use(config)
        self.model_names = list[dict[str, str]]()  # of the backends, when last probed
        self.tokenizing = asyncio.Semaphore(MAX_TOKENIZING)
        # A lock for each client that tokenizes, and one, named "", for all guests.
        self.tokenizers = weakref.WeakValueDictionary[str, asyncio.Lock]()
        self.files = dict[str, Response]()  # by path; everything else works without them
        for path, (source, kind, make) in FILES.items():
            try:
                body = make(HERE / source)
                self.files[path] = Response(body, headers=headers_of(body), kind=kind)
            except (OSError, ValueError) as error:
                log.warning("nothing at %s: %s", path, error)
        extension = self.files.get("/cerebrum.vsix")
        self.extension_sha256 = sha256(extension.body).hexdigest() if extension else ""

    def _use(self, config: Config) -> None:
        self.fleet.replace(config.backends, config.models, config.prefer)
        self.counting.configure(config.models, config.names)
        self.runner.logs_prompts = config.log_prompts
        self.config = config

    def use_keys(self, environ: Environment) -> None:
        """Apply the keys that can be read: whatever else is wrong, a revoked one must stop working.
        `load_config` says why others cannot be read.
        """
        config = self.config
        clients = config.clients
        with contextlib.suppress(ConfigError):
            clients = environ.clients(*CLIENTS, strict=False)
        keys = tuple[str, ...]()
        with contextlib.suppress(ConfigError):
            keys = environ.keys("CEREBRUM_CM4_API_KEY")
        if clients == {} and not keys:
            keys = config.client_keys  # some key must still work
        config = replace(config, clients=clients, client_keys=keys)
        if config.access.needs_key:  # only whole settings may let in everybody
            self.config = config
            self.counting.configure(config.models, config.names)
            self.dispatcher.end_reading()  # perhaps for a client who may no longer ask

    def reconfigure(self, config: Config) -> None:
        """Apply new settings; running requests continue. ConfigError if the settings cannot be
        used; then nothing has changed.
        """
        if self.config.clients is not None and not config.access.needs_key:
            raise ConfigError(
                "CEREBRUM_CM4_KEYS_FILE: expected the file, it has gone; an empty one lets nobody "
                "in"
            )
        self._use(config)
        self.broadcasts.forget()
        self.reconfigured += 1
        self.dispatcher.changed()

    def who(self, request: Request) -> JsonObject:
        """The fields of a CompletionRequest that say who asks."""
        places = self.config.names.get(request.client, 0)
        return {"client": request.client, "guest": places}

    @property
    def models_here(self) -> Sequence[Model]:
        """The models that some backend has, or all while no backend has listed any."""
        here = self.fleet.models
        if not here:
            return self.config.models
        return [model for model in self.config.models if model.id in here]

    @property
    def uptime(self) -> float:
        """In seconds."""
        return round(time.monotonic() - self.started, 1)

    @property
    def requests(self) -> int:
        """Completions that were asked for, computed or not."""
        return self.counting.started + self.broadcasts.shared + self.broadcasts.type_through

    def sample(self) -> None:
        """Bring the last half hour's counts up to date."""
        counting = self.counting
        tokens = sum(tally.tokens for tally in counting.tallies.values())
        tokens += sum(attempt.tokens for attempt in self.dispatcher.state.places)
        totals = self.requests, counting.failed, tokens
        counting.history.sample(time.monotonic(), totals)

    def probed(self) -> None:
        """A backend was probed. It may be back, so those that wait may get a place; or it may have
        other models than before, which would answer otherwise.
        """
        names = [backend.names for backend in self.fleet.backends]
        if names != self.model_names:
            self.model_names = names
            self.broadcasts.forget()
        self.sample()
        self.counting.people.save(time.monotonic())
        self.dispatcher.changed()


# ----------------------------------------------------------------------------------------- handlers


async def health(gateway: Gateway, request: Request) -> Response:
    """GET /health: the backends' state, from the last probe and the traffic. `vps_available`: at
    least one backend is available. A 503 says what is wrong.
    """
    fleet = gateway.fleet
    backends = [
        {"id": backend.id, "available": backend.available, "message": backend.breaker.message}
        for backend in fleet.backends
    ]
    state = {"vps_available": fleet.available, "uptime": gateway.uptime, "backends": backends}
    if fleet.available:
        return Response({"status": "healthy", "timestamp": timestamp(), **state})
    raise HttpError("VPS_UNAVAILABLE", fleet.message, extra={"status": "unhealthy", **state})


def complete_natively(gateway: Gateway, request: Request) -> Pairs:
    """The pairs of a completion of our own API."""
    fields = read_native(parse_json(request.body), gateway.config.models)
    session = ""
    if fields.session:
        # Two clients may choose the same name, and a backend sees only the Pi's address.
        session = sha256(f"{request.client} {fields.session}".encode()).hexdigest()
    wanted = CompletionRequest("", fields, session=session, **gateway.who(request))
    return gateway.runner.run(Completion(wanted, request.end, request.notes))


async def complete_stream(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete/stream: a completion as SSE, token by token."""
    return Response(
        events=complete_natively(gateway, request),
        render=lambda pair: NATIVE_EVENTS[pair[0]](pair[1]),
    )


# Pairs as native SSE. "started" has no event; it comes first, so the response head goes out once
# the backend answers.
NATIVE_EVENTS: dict[str, Callable[[Any], bytes]] = {
    "started": lambda _: b"",
    "waiting": lambda place: b": waiting, place %d in the line\n\n" % place,
    "idle": lambda _: SSE_COMMENT,
    "progress": lambda progress: sse_event({"progress": progress}),
    "text": bytes,
    "done": lambda result: sse_event({"done": True, **result}),
}


async def complete(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete: a completion in one piece."""
    _, text, result = await collect(complete_natively(gateway, request))
    return Response({"completion": text, **result})


async def collect(pairs: Pairs) -> tuple[JsonObject, str, JsonObject]:
    """A completion in one piece: the value of its last pair "started", its text, and its result."""
    texts = []
    last = JsonObject()  # the last value of each event
    async with contextlib.aclosing(pairs):
        async for event, value in pairs:
            last[event] = value
            if event == "text":
                texts.append(value)
    return last["started"], read_text(b"".join(texts)), last["done"]


async def file(gateway: Gateway, request: Request) -> Response:
    """GET /: a web page for people, which uses this API. GET /cerebrum_lsp.py,
    /cerebrum-jetbrains.zip, /cerebrum.vsix: what editors install, of this Pi's version.
    """
    path = request.head.path
    if found := gateway.files.get(path):
        return found
    source, *_ = FILES[path]
    raise HttpError("NOT_FOUND", f"expected {source} beside cm4d.py, got none or a damaged one")


async def accepted(gateway: Gateway, request: Request) -> Response:
    """POST /v1/accepted: count a completion that the user of an editor has accepted."""
    read = read_fields(dialects.present(parse_json(request.body)), ACCEPTED)
    return Response(gateway.counting.accept(request.client, **read))


async def models(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models: the models of models.toml. `available`: a backend that has the model can be
    reached; the entry then also has the members that the first such backend reports, and `backends`
    names all such backends. `languages` lists the languages that models.toml names (`served`) and
    those with a known syntax. `data` is OpenAI's list.
    """
    catalog = gateway.config.models
    fleet = gateway.fleet
    entries = [describe_model(model, fleet) for model in catalog]
    listed = {
        "models": entries,
        "vps_available": fleet.available,
        "languages": describe_languages(catalog),
        "prefer": gateway.config.prefer,
        "object": "list",
        "data": [dialects.write_model(model.id, gateway.created) for model in gateway.models_here],
    }
    return Response(compact(listed))


def describe_model(model: Model, fleet: Fleet) -> JsonObject:
    """A model's entry in /v1/models."""
    names = ("id", "name", "languages", "parameters", "quantization")
    entry = {name: getattr(model, name) for name in names}
    ids = []
    reported = JsonObject()
    for backend in fleet.backends:
        about = backend.about(model.id)
        if backend.available and about:
            ids.append(backend.id)
            reported = reported or about
    return entry | {"available": bool(ids), "backends": ids} | reported


def describe_languages(catalog: Sequence[Model]) -> list[JsonObject]:
    """The member `languages` of /v1/models."""
    served = served_languages(catalog)
    entries = []
    for name in dict.fromkeys([*served, *LANGUAGES]):
        syntax = language_named(name) or Language()
        entry = {
            "id": name,
            "endings": syntax.endings.split(),
            "filenames": syntax.filenames.split(),
            "served": name in served,
        }
        entries.append(entry)
    return entries


async def model(gateway: Gateway, request: Request) -> Response:
    """GET /v1/models/{id}: one model, as OpenAI lists it."""
    found = find_model(request.parameter, gateway.config.models)
    return Response(compact(dialects.write_model(found.id, gateway.created)))


async def ollama_version(gateway: Gateway, request: Request) -> Response:
    """GET /api/version."""
    return Response({"version": dialects.OLLAMA_VERSION})


async def tags(gateway: Gateway, request: Request) -> Response:
    """GET /api/tags: Ollama's list of the models that some backend has."""
    return Response({"models": [in_ollama(gateway, model) for model in gateway.models_here]})


async def show(gateway: Gateway, request: Request) -> Response:
    """POST /api/show: one model, as Ollama lists it."""
    members = parse_json(request.body)
    asked = members.get("model") or members.get("name")  # older clients say `name`
    return Response(in_ollama(gateway, find_model(asked, gateway.config.models)))


def in_ollama(gateway: Gateway, model: Model) -> JsonObject:
    return dialects.write_ollama_model(model, gateway.fleet.n_ctx(model.id), gateway.created)


ANY = CompletionRequest("", GenerationRequest(mode=""))  # without model and language


async def props(gateway: Gateway, request: Request) -> Response:
    """GET /props: the properties of the model that answers a request without a model name."""
    fleet = gateway.fleet
    model = fleet.route(ANY)
    n_ctx = fleet.n_ctx(model)
    places = limit_of(fleet.backends)
    return Response(compact(dialects.write_props(model, n_ctx, places)))


async def tokenize(gateway: Gateway, request: Request) -> Response:
    """POST /tokenize: a text's tokens, in the model that answers a request without a model name."""
    fields = read_fields(dialects.present(parse_json(request.body)), dialects.TOKENIZE)
    fleet = gateway.fleet
    model = fleet.route(ANY)
    # A person tokenizes one text at a time, and so do all guests together.
    name = "" if gateway.who(request)["guest"] else request.client
    lock = gateway.tokenizers.setdefault(name, asyncio.Lock())
    async with lock, gateway.tokenizing:
        counting = [backend for backend in fleet.backends if backend.tokenizes(model)]
        if not counting:
            expected = "expected a backend that counts tokens, got none"
            raise HttpError("VPS_UNAVAILABLE", fleet.message or expected)
        try:
            tokens = await first_there(counting).tokenize(model, fields)
        finally:
            gateway.dispatcher.changed()  # it may have been a trial
    return Response(b'{"tokens":[%b]}' % tokens)


async def speak(dialect: dialects.Dialect, gateway: Gateway, request: Request) -> Response:
    """The handler of a dialect's completions. A stream's first block may be empty, as in
    NATIVE_EVENTS.
    """
    wanted = dialect.read(parse_json(request.body))
    fields = native_fields(wanted, gateway.config.models)
    wanted = replace(wanted, fields=fields, **gateway.who(request))
    head = request.head
    editor = f"{request.client} {request.address} {head.headers.get('user-agent', '')}"
    reply = dialect.reply(wanted, head.request_id, int(time.time()))
    reader = Subscriber(gateway.broadcasts, wanted, request.notes, editor, reply.has_comments)
    response = Response()

    def begin(beginning: Members) -> bytes:
        response.headers = kept_headers(beginning["kept"])
        return reply.begin(beginning)

    if wanted.stream:
        events = NATIVE_EVENTS | {"started": begin, "text": reply.text, "done": reply.end}
        response.events = reader.pairs()
        response.render = lambda pair: events[pair[0]](pair[1])
        return response
    beginning, text, result = await collect(reader.pairs())
    begin(beginning)
    if result.get("finish_reason") == "replaced":
        text = ""
    response.body = reply.whole(text, result)
    return response


def kept_headers(kept: Members) -> Headers:
    """A header with the part of a request that was sent, unless all was: no dialect has a member
    for this.
    """
    if not kept or kept["parts"] == ["all"]:
        return ()
    said = f"{kept['characters']} of {kept['of']} characters"
    if "messages" in kept:
        said = "{} of {} messages, ".format(*kept["messages"]) + said
    return (("X-Cerebrum-Kept", said),)


async def stats(gateway: Gateway, request: Request) -> Response:
    """GET /v1/stats: counters and gauges; requests are completions. `backends` has the figures of
    each backend. `breaker` and `vps_response_time_ms` (of the last good probe, null before one) are
    the first available backend's.
    """
    backends = describe_backends(gateway)
    first = backends[gateway.fleet.first.id]
    members: JsonObject = {"version": VERSION, "uptime": gateway.uptime, "speculative": True}
    members |= write_stats(table_of(gateway, backends))
    members |= {
        "vps_available": first.available,
        "vps_response_time_ms": first.response_time_ms,
        "memory_mb": round(resident_bytes() / 2**20, 1),
        "load_avg": os.getloadavg(),
        "breaker": first.breaker,
    }
    members["backends"] = list(map(vars, backends.values()))
    members["unnamed"], *members["clients"] = gateway.counting.people.describe()
    return Response(members)


async def activity(gateway: Gateway, request: Request) -> Response:
    """GET /v1/activity: the statistics, the reason if no backend is available, and the counts of
    the last half hour. Each number of `requests`, `failed` and `tokens` covers `step_s` seconds,
    the last one the current step so far. `client` is the name of who asks, "" without one;
    `extension` is the sha256 of the file for VS Code, "" without one.
    """
    fleet = gateway.fleet
    gateway.sample()
    loaded = set[str]()
    notes = []
    for backend in fleet.backends:
        loaded.update(backend.models_loaded)
        message = backend.breaker.message
        if message and fleet.available:  # else `vps_message` has all of them
            notes.append(f"{backend.id} is away: {message}")
    members: JsonObject = {"timestamp": timestamp(), "notes": notes}
    statistics = await stats(gateway, request)
    members |= statistics.body | gateway.counting.history.describe()
    has_name = request.client in gateway.config.names
    members |= {
        "vps_message": fleet.message,
        "models_loaded": sorted(loaded),
        "client": request.client if has_name else "",
        "extension": gateway.extension_sha256,
    }
    return Response(members)


# Members of a backend's entry in /v1/stats, and its attributes with the same value.
OF_BACKEND = {
    "id": "id",
    "api": "config.api",
    "available": "available",
    "message": "breaker.message",
    "version": "kind.version",
    "response_time_ms": "response_ms",
    "requests_total": "requests_total",
    "requests_failed": "requests_failed",
    "max_concurrent": "limit",
    "tokens_total": "tokens",
    "models_loaded": "models_loaded",
}


def describe_backends(gateway: Gateway) -> dict[str, SimpleNamespace]:
    """The entries of the backends in /v1/stats, by id."""
    active = Counter(gateway.dispatcher.state.answering.values())
    entries = {}
    for backend in gateway.fleet.backends:
        members = {name: attrgetter(path)(backend) for name, path in OF_BACKEND.items()}
        members |= {
            "requests_active": active[backend],
            "models": list(backend.models or ()),
            "breaker": backend.breaker.describe(time.monotonic()),
        }
        entries[backend.id] = SimpleNamespace(**members)
    return entries


METRICS = (
    (  # read from the Gateway
        Metric("cerebrum_build_info", "Which daemon this is; always 1.",
               lambda _: {f'daemon="cm4d",version="{VERSION}"': 1}),
        Metric("cerebrum_completions_started_total", "Requests for a completion.",
               "requests", "requests_total"),
        Metric("cerebrum_completions_failed_total", "Completions that failed.", "counting.failed"),
        Metric("cerebrum_completions_active", "Completions that hold a place.",
               "dispatcher.active", "requests_active"),
        Metric("cerebrum_completions_waiting", "Completions that wait for a place.",
               lambda pi: len(pi.dispatcher.state.line), "requests_waiting"),
        Metric("cerebrum_shared_total", "Requests that shared a completion.",
               "broadcasts.shared", "shared"),
        Metric("cerebrum_replaced_total", "Infills that a newer one replaced.",
               "broadcasts.replaced", "replaced"),
        Metric("cerebrum_type_through_total",
               "Requests that the rest of an earlier completion answered.",
               "broadcasts.type_through", "type_through"),
        Metric("cerebrum_accepted_completions_total",
               "Completions that users accepted, as editors report.",
               "counting.accepted", "accepted"),
        Metric("cerebrum_accepted_characters_total", "Characters of these completions.",
               "counting.accepted_characters", "accepted_characters"),
        Metric("cerebrum_reloads_total", "How often the settings were read again.", "reconfigured"),
    ),
    (  # read from a Tally
        *COMPLETIONS,
        Metric("cerebrum_tokens_total", "Tokens of completions that have ended.", "tokens"),
        Metric("cerebrum_prompt_tokens_total", "Tokens of prompts that backends computed.",
               "prompt_tokens"),
        Metric("cerebrum_prompt_tokens_cached_total", "Tokens of prompts that were in a cache.",
               "cached_tokens"),
        Metric("cerebrum_draft_tokens_total", "Tokens that drafts proposed.", "draft_tokens"),
        Metric("cerebrum_accepted_tokens_total", "Tokens of drafts that were accepted.",
               "accepted_tokens"),
    ),
    (  # read from a Usage
        Metric("cerebrum_client_completions_total",
               "Completions that ended, by the name of a key.", "completions"),
        Metric("cerebrum_client_tokens_total", "Tokens of these completions.", "tokens"),
        Metric("cerebrum_client_seconds_total", "Time in which these completions held a place.",
               "seconds"),
        Metric("cerebrum_client_accepted_total", "Completions that its user accepted.", "accepted"),
        Metric("cerebrum_client_shown_characters_total", "Characters of hints that it got.",
               "shown"),
        Metric("cerebrum_client_kept_characters_total",
               "Those of them that were then in the file.", "kept"),
    ),
    (  # read from a backend's entry in /v1/stats
        Metric("cerebrum_backend_up", "Whether it is available.", "available"),
        Metric("cerebrum_backend_places", "Completions that it takes at a time.",
               "max_concurrent"),
        Metric("cerebrum_backend_active", "Completions that hold a place.", "requests_active"),
        Metric("cerebrum_backend_models", "Models that it has.",
               lambda backend: len(backend.models)),
        Metric("cerebrum_backend_models_loaded", "Models in its memory.",
               lambda backend: len(backend.models_loaded)),
        Metric("cerebrum_backend_requests_total", "Requests sent to it.", "requests_total"),
        Metric("cerebrum_backend_failures_total", "Requests that failed there.",
               "requests_failed"),
        Metric("cerebrum_backend_tokens_total", "Tokens that came from there.", "tokens_total"),
        Metric("cerebrum_backend_probe_seconds", "Time of the last good probe.",
               lambda backend: (backend.response_time_ms or math.nan) / 1000),
        Metric("cerebrum_breaker_state", "1 for the state of its circuit breaker.",
               lambda backend: {f'state="{state}"': backend.breaker["state"] == state
                                for state in BREAKER_STATES}),
        Metric("cerebrum_breaker_opens_total", "How often its breaker opened.",
               lambda backend: backend.breaker["opens"]),
    ),
)  # fmt: skip


def table_of(gateway: Gateway, backends: Mapping[str, SimpleNamespace]) -> Table:
    """The rows of METRICS with their subjects; `backends` as `describe_backends` has them."""
    counting = gateway.counting
    subjects = ({"": gateway}, counting.tallies, counting.people.total, backends)
    return zip(("", "model", "client", "backend"), subjects, METRICS, strict=True)


async def metrics(gateway: Gateway, request: Request) -> Response:
    """GET /metrics: the counters of /v1/stats and more, for Prometheus."""
    return metrics_of(request, table_of(gateway, describe_backends(gateway)))


# ------------------------------------------------------------------------------------------- routes


# Routes of other APIs.
foreign = partial(Route, write_error=dialects.write_error)
ollama = partial(Route, write_error=dialects.write_ollama_error, streams=LINES)


def dialect_routes(
    route: Callable[..., Route], spoken: Sequence[dialects.Dialect]
) -> Iterator[Route]:
    """The routes of completions in these dialects."""
    for dialect in spoken:
        handler = partial(speak, dialect)
        for path in dialect.paths:
            yield route("POST", path, handler, json=True)


ROUTES = (
    *(Route("GET", path, file, open=True) for path in FILES),
    Route("GET", "/health", health, open=True, quiet=True),
    Route("POST", "/v1/complete", complete, json=True),
    Route("POST", "/v1/complete/stream", complete_stream, json=True),
    Route("POST", "/v1/accepted", accepted, json=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/stats", stats),
    Route("GET", "/v1/activity", activity, quiet=True),
    Route("GET", "/metrics", metrics, quiet=True),
    *dialect_routes(foreign, dialects.DIALECTS),
    *dialect_routes(ollama, dialects.OLLAMA),
    ollama("GET", "/api/version", ollama_version),
    ollama("GET", "/api/tags", tags),
    ollama("POST", "/api/show", show, json=True),
    foreign("GET", "/v1/models/{id}", model),
    foreign("GET", "/models/{id}", model),
    Route("GET", "/models", models),
    foreign("GET", "/props", props),
    foreign("POST", "/tokenize", tokenize, json=True),
)
# -------------------------------------------------------------------------------------------- start

DRAIN_SECONDS = 30.0  # for running completions to end at shutdown


async def serve(environ: Environment, config: Config) -> int:
    """Listen and answer until SIGTERM or SIGINT, then let running completions end. Returns the exit
    status.
    """
    gateway = Gateway(config)
    fleet = gateway.fleet
    server = Server(gateway, ROUTES, config.access)
    known = environ  # as last read

    def reload() -> None:
        nonlocal known
        with contextlib.suppress(ConfigError):  # raised below
            known = read_environment(os.environ, HERE, strict=False)
        gateway.use_keys(known)
        server.use(gateway.config.access)
        known = read_environment(os.environ, HERE)
        new = load_config(known)
        gateway.reconfigure(new)
        server.use(new.access)
        set_up_logging(new.log_level, new.log_file)
        warn_of(new)
        unchanged = ["CEREBRUM_CM4_HOST", "CEREBRUM_CM4_PORT", "CEREBRUM_STATE_DIR"]
        if config.tls and new.tls:
            server.tls = new.tls  # from the next connection on
        else:
            unchanged += TLS.split(", ")
        environ.warn_of_changes(known, unchanged)

    service = Service(reload, fleet.stuck)
    if not await server.start(config.host, config.port, tls=config.tls):
        return 1  # systemd tries again: an interface may come up late at boot
    probing = asyncio.create_task(fleet.probe_forever(gateway.probed))
    failed = await service.run(probing)
    await server.stop(DRAIN_SECONDS)
    gateway.counting.people.save(math.inf)
    for backend in fleet.backends:
        backend.kind.client.close()
    return int(failed)  # systemd restarts the daemon after a 1


def warn_of(config: Config) -> None:
    """Log which backends will refuse us."""
    for backend in config.backends:
        needs_key = backend.key_env or backend.api == "cerebrum"
        if needs_key and not backend.key:
            log.warning(
                "%s: %s is not set: it will refuse every completion", backend.id, backend.variable
            )


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a wrong configuration, 1 for a failure that may pass by
    itself.
    """
    if arguments:
        make_parser(
            "cm4d",
            "Cerebrum's daemon for the Raspberry Pi. Without an option it serves until it gets "
            "SIGTERM.",
        ).parse_args(arguments)
        from cerebrum.check import check_pi, check_settings, report  # only for an option

        return report(check_settings(HERE, load_config, check_pi))
    try:
        environ = read_environment(os.environ, HERE)
        config = load_config(environ)
        set_up_logging(config.log_level, config.log_file)
        warn_of(config)
        return asyncio.run(serve(environ, config))
    except ConfigError as error:
        print(f"cm4d.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
