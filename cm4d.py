#!/usr/bin/env python3
"""Cerebrum's orchestrator for the Raspberry Pi: checks, prepares, routes, sheds, breaks, relays.

    python3 cm4d.py                       # listens on 0.0.0.0:7000, asks the VPS at CEREBRUM_VPS_URL
    curl http://localhost:7000/health
    curl -N http://localhost:7000/v1/complete/stream -H 'Content-Type: application/json' \
         -d '{"prompt": "def fibonacci(n):", "language": "python", "max_tokens": 128}'

Every completion is one async generator, `Gateway.complete`. It takes a place, asks the breaker, routes the language to
a model, fits the prompt and sends it to the VPS on a connection of its own. It yields pairs of (kind, value) that do
not depend on the client's API: `/v1/complete/stream` renders them as SSE, `/v1/complete` as one JSON answer. Editors
and tools speak the dialects of cerebrum_dialects.py. They follow a completion by a `Reading`: identical requests at the
same time share one, a newer infill of the same file ends the older one, and text that the last completion predicted is
served without the VPS.

It refuses a third completion at a time (429) and every completion while the breaker is open (503); a completion in a
dialect waits for its place for a while. From the VPS it refuses redirects, framing or JSON that is not exact, and a
stream that ends without a done event: the client gets all whole events up to the fault, then an error event, then a
cut. A POST is never sent again once a byte of it is out, and a connection to the VPS is used for one request only.

Who owns what: `Gateway` owns the places, the breaker, the learned ratios and what is known of the VPS. Its probe task
keeps that knowledge fresh; a completion asks for the list of models only if none has come yet. A `Shared` completion
owns the task that computes it, and ends with its last reader. Everything runs on the event loop's thread; there is no
other thread. Standard library only, with cerebrum_*.py and models.toml beside it, and cerebrum_page.html, without which
there is no page at `/`.
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
    # asyncio and hmac load OpenSSL where they find it: 6 MB of 30, needed only for a VPS behind https.
    dotenv = here / ".env"
    readable = dotenv.read_text(errors="replace") if dotenv.is_file() and os.access(dotenv, os.R_OK) else ""
    if "https://" not in os.environ.get("CEREBRUM_VPS_URL", "") + readable:
        sys.modules |= {"ssl": None, "_hashlib": None}  # type: ignore[dict-item]
    # Where no .pyc can be written, every start compiles. Compiling the largest modules first, while little else is in
    # memory, lowers the peak.
    import cerebrum_code  # noqa: F401

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
import signal
import socket
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
from typing import TYPE_CHECKING, Any

from cerebrum_code import Ratio, common_length, detect_mode, prepare
from cerebrum_common import (
    READ_BYTES,
    SSE_COMMENT,
    STATUS_LINE,
    Access,
    ChunkedDecoder,
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
    chunk,
    compact,
    describe,
    internal_error,
    load_catalog,
    log,
    notify,
    own_names,
    parse_framing,
    parse_headers,
    parse_json,
    read_environment,
    read_fields,
    request_id_var,
    route_language,
    scan_head,
    served_languages,
    set_up_logging,
    sse_event,
    timestamp,
)
from cerebrum_dialects import (
    COMPLETION,
    DEFAULT_TOKENS,
    INFILL,
    MAX_TOKENS,
    OPENAI_CHAT,
    OPENAI_TEXT,
    TOKENIZE,
    Asked,
    Dialect,
    Reply,
    present,
    write_error,
    write_model,
    write_props,
)
from cerebrum_languages import BY_NAME, LANGUAGES, guess_language
from cerebrum_page import History, Page

if TYPE_CHECKING:
    import ssl

HERE = Path(__file__).resolve().parent

# --------------------------------------------------------------------------------------- configuration

VPS_URL = re.compile(
    r"(https?)://([A-Za-z0-9.\-_]{1,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?(/[A-Za-z0-9._~/\-]*)?"
)
KEY = re.compile(r"[!-~]*")
HOST = re.compile(r"[A-Za-z0-9.\-_]{1,255}|[0-9A-Fa-f:.]{2,45}(%[A-Za-z0-9.\-_]{1,32})?")  # a name or an address


@dataclass(frozen=True, slots=True)
class Vps:
    """Where the VPS is. `authority` goes into the Host header, `prefix` before every path."""

    host: str
    port: int
    authority: str
    prefix: str
    tls: bool


@dataclass(frozen=True, slots=True)
class Config:
    """The settings. `key` is sent to the VPS; `client_key` is expected from clients (empty: from nobody)."""

    vps: Vps
    models: tuple[Model, ...]
    prefer: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # ids of models, by mode
    host: str = "0.0.0.0"
    port: int = 7000
    key: str = ""
    client_key: str = ""
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()
    max_concurrent: int = 2
    log_level: str = "INFO"
    log_file: str = ""


def parse_vps_url(text: str) -> Vps:
    """`http://name[:port][/prefix]` to a Vps; ConfigError names the variable.

    >>> parse_vps_url("http://127.0.0.1:9000")
    Vps(host='127.0.0.1', port=9000, authority='127.0.0.1:9000', prefix='', tls=False)
    """
    match = VPS_URL.fullmatch(text)
    if not match or int(match[3] or 1) not in range(1, 65536):
        raise ConfigError(f"CEREBRUM_VPS_URL: expected http://HOST[:PORT] or https://HOST[:PORT], got {text!r}")
    scheme, host, port, prefix = match.groups()
    tls = scheme == "https"
    authority = f"{host}:{port}" if port else host
    return Vps(host.strip("[]"), int(port or (443 if tls else 80)), authority, (prefix or "").rstrip("/"), tls)


def load_config(environ: Environment) -> Config:
    """The environment, checked. ConfigError names the variable that is wrong."""
    path = Path(environ.text("CEREBRUM_MODELS_FILE", str(HERE / "models.toml"))).expanduser()
    try:
        catalog = load_catalog(path)
    except ValueError as error:
        raise ConfigError(f"CEREBRUM_MODELS_FILE: {error}") from None
    keys = {name: environ.text(name) for name in ("CEREBRUM_API_KEY", "CEREBRUM_CM4_API_KEY")}
    for name, key in keys.items():
        if not KEY.fullmatch(key):
            raise ConfigError(f"{name}: expected printable ASCII without spaces")
    host = environ.text("CEREBRUM_CM4_HOST", "0.0.0.0")
    if not HOST.fullmatch(host):
        raise ConfigError(f"CEREBRUM_CM4_HOST: expected an address or a host name, got {host!r}")
    return Config(
        vps=parse_vps_url(environ.text("CEREBRUM_VPS_URL", "http://127.0.0.1:9000")),
        models=catalog.models,
        prefer=catalog.prefer,
        host=host,
        port=environ.integer("CEREBRUM_CM4_PORT", 7000, 0, 65535),
        key=keys["CEREBRUM_API_KEY"],
        client_key=keys["CEREBRUM_CM4_API_KEY"],
        hosts=environ.names("CEREBRUM_ALLOWED_HOSTS"),
        origins=environ.names("CEREBRUM_ALLOWED_ORIGINS"),
        max_concurrent=environ.integer("CEREBRUM_MAX_CONCURRENT", 2, 1, 64),
        log_level=environ.text("CEREBRUM_LOG_LEVEL", "INFO"),
        log_file=environ.text("CEREBRUM_LOG_FILE"),
    )


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
PASSED_TO_VPS = ("max_tokens", "temperature", "top_p", "seed", "stop", "stop_at", "progress", "indent", "predict_ms")


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


def choose_model(
    config: Config, language: str, mode: str, present: Collection[str] | None, any_language: bool = False
) -> str:
    """The id of the model for a request: of those `present` on the VPS the first that [prefer] lists for the mode and
    that serves the language, else the first in the table's order. A chat counts as an instruction.

    With `any_language`, a language that no present model serves goes to the first of all. Without it, the model may be
    one that is not there: the VPS's 404 says which file is missing and how to get it. As long as it is unknown which
    models are there (None), there are no preferences.
    """
    models, here = config.models, [model for model in config.models if present is None or model.id in present]
    if any_language and not any(language in model.languages for model in here):
        language = ""
    ids = config.prefer.get("instruct" if mode == "chat" else mode, ())
    preferred = [model for id in ids for model in models if model.id == id]
    model = route_language(preferred, language, present or ()) or route_language(models, language, present)
    return (model or route_language(models, language, None) or models[0]).id


def session_of(address: str, session: str | None) -> str:
    """A name for the session that is unique across clients, or "" without one.

    Two clients may choose the same string and must not end each other's requests. The VPS sees only the Pi's address,
    so it gets this name as well.
    """
    return hashlib.sha256(f"{address} {session}".encode()).hexdigest() if session else ""


def native_fields(asked: Asked, models: Collection[Model]) -> dict[str, Any]:
    """A dialect's request in the fields that `Gateway.complete` reads. An unknown model is none; the language is what
    the text and the files' names tell."""
    fields: dict[str, Any] = {
        "prompt": "",
        "filename": "",
        "extra": [],
        "stop_at": "auto",
        "progress": False,
    } | asked.fields
    others = [entry["filename"] for entry in fields["extra"]]
    known = fields["model"] in {model.id for model in models}
    language = "" if asked.kind == "chat" else guess_language(fields["filename"], fields["prompt"], others)
    return fields | {"language": language, "model": fields["model"] if known else None}


DEFAULT_N_CTX = 4096  # until the VPS tells its own
MARGIN_TOKENS = 8  # of n_ctx, never used
REFIT = 0.95  # the one retry assumes this share of the weight per token that the VPS has just counted


def prompt_budget(n_ctx: int, max_tokens: int) -> int:
    """The largest prompt in tokens. An answer gets at most three quarters of the context, however long it may be.

    >>> prompt_budget(4096, 512), prompt_budget(2048, 2048)
    (3576, 504)
    """
    return max(n_ctx - max_tokens, n_ctx // 4) - MARGIN_TOKENS


# ------------------------------------------------------------------------------------- policy: editors

MIN_SAME, MIN_SAME_LINES = 0.5, 2  # of the shorter text's lines: two texts with fewer in common are of two files
TAIL_CHARS = 1024  # of the text before the cursor: with as many equal, two cursors are at the same place
MAX_PREDICTIONS = 32  # that are remembered, of at most MAX_PREDICTED_CHARS each
MAX_PREDICTED_CHARS = 2048
# What must be equal in two requests for the answer to one to be the beginning of the answer to the other.
ALIKE = ("mode", "suffix", "model", "language", "filename", "max_tokens", "stop", "temperature", "top_p", "seed")


def same_file(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two infills are of the same file. Most editors send no name, so the texts around the cursors decide."""
    if one["filename"] or other["filename"]:
        return bool(one["filename"] == other["filename"])
    shorter = min(len(one["prompt"]), len(other["prompt"]))
    beginning = common_length(one["prompt"], other["prompt"])
    if 0 < shorter <= 2 * beginning and one.get("suffix") == other.get("suffix"):
        return True
    lines, others = (
        {*around["prompt"].split("\n"), *around.get("suffix", "").split("\n")} - {""} for around in (one, other)
    )
    return len(lines & others) >= max(MIN_SAME * min(len(lines), len(others)), MIN_SAME_LINES)


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


# ---------------------------------------------------------------------------------- policy: preferences

RELOADS, RELOADS_SECONDS = 3, 600.0  # so many within this time are no accident


class Reloads:
    """Notices preferred models that push each other out of the VPS's memory. Pure; `now` is in seconds (monotonic)."""

    def __init__(self) -> None:
        self._seen: dict[str, float] = {}  # when each model was in memory for the last time
        self._loaded: frozenset[str] = frozenset()
        self._reloads: deque[float] = deque(maxlen=RELOADS)
        self._told = False

    def notice(self, loaded: Collection[str], now: float) -> str:
        """The id of a model that came back into memory and was the last of RELOADS, but only once; else "".

        `loaded` has the preferred models that are in memory now.
        """
        told = ""
        for model in sorted(set(loaded) - self._loaded):
            if now - self._seen.get(model, -math.inf) <= RELOADS_SECONDS:
                self._reloads.append(now)
                if len(self._reloads) == RELOADS and now - self._reloads[0] <= RELOADS_SECONDS and not self._told:
                    self._told, told = True, model
        self._loaded = frozenset(loaded)
        self._seen |= dict.fromkeys(loaded, now)
        return told


# ------------------------------------------------------------------------------------- policy: breaker

FAILURES_TO_OPEN = 3  # in a row
OPEN_SECONDS, MAX_OPEN_SECONDS = 5.0, 60.0  # the first pause and the longest; each failed trial doubles it
JITTER = 0.2  # +- this share of every pause: several Pis should not come back in step
TRIAL_SECONDS = 180.0  # until a trial's first token: a 7B model loads in 30 s and reads 4,000 tokens in 100 s


class Breaker:
    """Decides when not to ask the VPS at all. Pure: `now` (seconds, monotonic) and `chance` (0 to 1) are passed in.

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

    def admit(self, now: float) -> int | None:
        """A ticket for one request; None means do not ask."""
        self._expire(now)
        if self.state == "closed":
            return self._generation
        if self.state == "open" or self._trial:
            return None
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
        """The VPS, or the network on the way to it, failed this request."""
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
        """The VPS answered /health."""
        if self.state == "open" and now >= self._until:
            self._change("half-open")

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


# ------------------------------------------------------------------------------ policy: the VPS's answers


class VpsFailure(HttpError):
    """The VPS or the network on the way to it is at fault: 503, counted by the breaker. `reason` is our own wording."""

    def __init__(self, reason: str) -> None:
        super().__init__("VPS_UNAVAILABLE", f"VPS backend is unavailable ({reason})")
        self.reason = reason


BREAKER_OPEN = "VPS backend is unavailable (circuit breaker open)"


class Misfit(HttpError):
    """The VPS is there, but the two are not configured for each other: 503, not counted by the breaker."""

    def __init__(self, message: str) -> None:
        super().__init__("VPS_UNAVAILABLE", message)


MAX_MESSAGE_CHARACTERS = 2000  # of an error of the VPS that is passed on
PASSED_ON = frozenset(  # codes of the VPS that mean something to the client; all others become VPS_UNAVAILABLE
    {"INVALID_REQUEST", "MODEL_NOT_FOUND", "SUPERSEDED", "MODEL_BUSY", "RATE_LIMIT", "MODEL_LOAD_FAILED"}
    | {"OVERLOADED", "RESOURCE_EXHAUSTED", "SHUTTING_DOWN", "VPS_UNAVAILABLE"}
)
EXPLAINED = {
    401: "VPS backend refuses our key: CEREBRUM_API_KEY of the Pi and of the VPS do not match",
    421: "VPS backend does not know the name it was asked by: add the host of the Pi's CEREBRUM_VPS_URL to"
    " CEREBRUM_ALLOWED_HOSTS on the VPS",
}
CODE = re.compile(r"[A-Z][A-Z_]{0,63}")
CONTROLS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+"
)  # what could act on a client's terminal


def our_error(members: Any, key: str) -> tuple[str, str, dict[str, Any]] | None:
    """(message, code, further members) if this JSON value is an error in the form of both daemons, else None."""
    if not isinstance(members, dict) or members.get("error") is not True:
        return None
    message, code = members.get("message"), members.get("code")
    if not isinstance(message, str) or not isinstance(code, str) or not CODE.fullmatch(code):
        return None
    message = CONTROLS.sub(" ", message)
    message = message.replace(key, "***") if key else message  # before the cut, which could leave half of the key
    more = {name: members[name] for name in ("prompt_tokens", "n_ctx") if type(members.get(name)) is int}
    return message[:MAX_MESSAGE_CHARACTERS], code, more


def refusal(status: int, body: bytes, key: str) -> HttpError:
    """The error for the client when the VPS answers with a status other than 200. VpsFailure if no Cerebrum backend
    would answer that way."""
    try:
        ours = our_error(parse_json(body), key)
    except HttpError:
        ours = None
    if ours is None or status < 400:
        return VpsFailure(f"it answered {status}, and not as a Cerebrum backend does")
    message, code, more = ours
    if code in PASSED_ON:
        return HttpError(code, message, extra=more)
    if status in EXPLAINED:
        return Misfit(EXPLAINED[status])
    return HttpError("VPS_UNAVAILABLE", f"VPS backend answered {status} {code}")


COUNT = Field(int, 0, 10**9)
SECONDS = Field(float, 0, 10**9)
RESULT = dict.fromkeys(("total_tokens", "prompt_tokens", "cached_tokens"), COUNT)
RESULT |= dict.fromkeys(("inference_time", "load_time", "ttft"), SECONDS)
RESULT |= {"finish_reason": Field(str, 1, 40)}
OURS = frozenset(  # members that a result or an error of ours consists of: no backend may set them
    {"completion", "language", "model", "timestamp", "mode", "kept", "done", "token", "error", "message", "code"}
)


def read_result(done: Mapping[str, Any]) -> dict[str, Any]:
    """The members of a done event that may be passed on: none of ours, and none of a wrong type or range.

    >>> read_result({"done": True, "model": "lies", "total_tokens": "3", "prompt_tokens": 5, "ttft": 0.25})
    {'prompt_tokens': 5, 'ttft': 0.25}
    """
    return {
        name: value
        for name, value in done.items()
        if name not in OURS
        and (name not in RESULT or RESULT[name].accepts(value) or (name, value) == ("ttft", None))  # without a token
    }


TOLD = {"loaded": Field(bool), "encoding": Field(str, 1, 100), "memory_mb": Field(float, 0, 10**9)}


def read_models(answer: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the VPS's /v1/models tells of each model that it has: `n_ctx`, and of TOLD what it tells.

    >>> read_models({"models": [{"id": "m", "loaded": False, "path": "/x"}, {"id": "n", "available": False}]})
    {'m': {'n_ctx': 4096, 'loaded': False}}
    """
    listed = answer.get("models")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    models: dict[str, dict[str, Any]] = {}
    for entry in entries:
        if isinstance(entry.get("id"), str) and entry.get("available") is not False:
            n_ctx = entry.get("n_ctx")
            told = {name: entry[name] for name, kind in TOLD.items() if kind.accepts(entry.get(name))}
            models[entry["id"]] = {"n_ctx": n_ctx if type(n_ctx) is int and n_ctx > 0 else DEFAULT_N_CTX, **told}
    return models


def read_loaded(answer: Mapping[str, Any]) -> list[str]:
    """The ids of the models in the VPS's memory, from its /health."""
    loaded = answer.get("models_loaded")
    return [id for id in loaded if isinstance(id, str)] if isinstance(loaded, list) else []


class Body:
    """The body of an answer by its framing (RFC 9112 section 6.3): chunks, a length, or until the close.

    `failure` is its first fault. It is kept rather than raised, because the payload before it still counts: what a
    client sees must not depend on how the bytes were split.
    """

    def __init__(self, length: int | None, chunked: bool) -> None:
        self.done = length == 0
        self.failure: VpsFailure | None = None
        self._chunks = ChunkedDecoder() if chunked else None
        self._left = length

    @property
    def between_chunks(self) -> bool:
        return self._chunks is not None and self._chunks.between

    def feed(self, data: bytes) -> bytes:
        """The payload in `data`, up to the end of the body or its first fault."""
        if self.done:
            payload, past = b"", data
        elif self._chunks:
            payload, past = self._feed_chunks(self._chunks, data)
        elif self._left is not None:
            payload, past = data[: self._left], data[self._left :]
            self._left -= len(payload)
            self.done = self._left == 0
        else:
            payload, past = data, b""
        if past:
            self.failure = self.failure or VpsFailure("its answer goes on past its end")
        return payload

    def _feed_chunks(self, chunks: ChunkedDecoder, data: bytes) -> tuple[bytes, bytes]:
        try:
            payload = chunks.feed(data)
        except HttpError:
            self.failure = VpsFailure("it sent a malformed chunk")
            return chunks.before, b""
        self.done = chunks.done
        return payload, chunks.rest

    def end(self, cut: str) -> None:
        """The connection has ended, by a plain close or as `cut` says. That is a fault unless the body is whole."""
        if not self.done and (cut or self._chunks or self._left):
            self.failure = VpsFailure(f"{cut or 'it ended'} in the middle of its answer")


def parse_answer(block: bytes, kind: str) -> tuple[int, Body]:
    """A whole response head to its status and body. HttpError or VpsFailure if it is not exact HTTP/1.x, or if it is a
    200 of another media type than `kind`."""
    first, *lines = block[:-4].split(b"\r\n")
    match = STATUS_LINE.fullmatch(first)
    if not match:
        raise VpsFailure("its answer is not HTTP/1.1")
    status, headers = int(match[1]), parse_headers(lines)
    if "content-encoding" in headers:
        raise VpsFailure("its answer has a Content-Encoding that nobody asked for")
    if status == 200 and headers.get("content-type", kind).partition(";")[0].strip(" \t").lower() != kind:
        raise VpsFailure("its answer is not of the type that was asked for")
    length, chunked = parse_framing(first[:8].decode(), headers)
    return status, Body(0 if status in (204, 304) else length, chunked)


# ----------------------------------------------------------------------------------- policy: the events

# Nearly all traffic is runs of token events exactly as vpsd writes them, which are relayed untouched. Any other valid
# event is parsed, which costs microseconds. The possessive `++` keeps the regex from backtracking into a long run.
TOKEN = (
    rb'data: \{"token": "(?:[^"\\\x00-\x1f\x7f-\xff]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
    rb', "total_tokens": (?:0|[1-9][0-9]{0,8})\}\n\n'
)
TOKENS = re.compile(rb"(?:%b)++" % TOKEN)
CHUNK_OF_TOKEN = re.compile(rb"([0-9a-f]{1,4})\r\n(%b)\r\n" % TOKEN)


def is_chunk_of_token(data: bytes) -> bool:
    """Whether these bytes are exactly one chunk with exactly one token event."""
    match = CHUNK_OF_TOKEN.fullmatch(data)
    return match is not None and int(match[1], 16) == len(match[2])


MAX_EVENT_BYTES = 262_144  # one SSE event; a token's has 60


class Events:
    """Cuts a stream that arrives in any split into blocks of whole SSE events. Line ends may be LF or CRLF."""

    def __init__(self) -> None:
        self._rest = bytearray()  # the beginning of an event
        self._cr = b""  # perhaps half of a CRLF

    @property
    def inside(self) -> bool:
        """An event has begun and has not ended."""
        return bool(self._rest or self._cr)

    def feed(self, data: bytes) -> bytes:
        """The events that `data` completes, with LF line ends, or b"". VpsFailure for an event that is too long.

        `data` is at most one read and shorter than the limit. So only an event that began in an earlier read can be too
        long, and it is the first of its block: raising loses no event.
        """
        if self._cr or b"\r" in data:
            data = self._cr + data
            self._cr = b"\r" if data.endswith(b"\r") else b""
            data = data.removesuffix(b"\r").replace(b"\r\n", b"\n")
        if not self._rest and data.endswith(b"\n\n"):
            return data
        begun = len(self._rest)
        self._rest += data
        end = self._rest.rfind(b"\n\n", max(0, begun - 1)) + 2
        block = bytes(self._rest[:end]) if end > 1 else b""
        del self._rest[: len(block)]
        # The last byte of an unfinished event may be the first of its two line ends.
        if begun and (block.index(b"\n\n") if block else len(self._rest) - 1) > MAX_EVENT_BYTES:
            raise VpsFailure(f"it sent an event of more than {MAX_EVENT_BYTES} bytes")
        return block


Pair = tuple[str, Any]  # (kind, value), as `Gateway.complete` describes them


def take_apart(block: bytes, key: str) -> Iterator[Pair]:
    """A block of whole events to pairs; ("done", dict) holds the members as the VPS sent them.

    An error event is raised as its error. VpsFailure for an event that is not JSON.
    """
    position = 0
    while position < len(block):
        if match := TOKENS.match(block, position):
            yield "text", match[0]
            position = match.end()
            continue
        end = block.index(b"\n\n", position)
        if pair := read_event(block[position:end], key):
            yield pair
        position = end + 2


def read_event(event: bytes, key: str) -> Pair | None:
    """One event, without its final line ends, to a pair as in `take_apart`; None for an unknown one."""
    lines = event.split(b"\n")
    data = b"\n".join(line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:"))
    if not data:
        return ("idle", None) if event.startswith(b":") else None
    try:
        members = parse_json(data)
    except HttpError:
        raise VpsFailure("it sent an event that is not JSON") from None
    if "error" in members:
        ours = our_error(members, key)
        if ours is None:
            raise VpsFailure("it sent an error without message and code")
        message, code, more = ours
        raise HttpError(code if code in PASSED_ON else "VPS_UNAVAILABLE", message, extra=more)
    if members.get("done") is True:
        return "done", members
    if isinstance(members.get("token"), str):
        if not COUNT.accepts(members.get("total_tokens")):
            raise VpsFailure("it sent a token without its number")
        return "text", sse_event({"token": members["token"], "total_tokens": members["total_tokens"]})
    progress = members.get("progress")
    return ("progress", progress) if isinstance(progress, dict) else None


def read_text(events: bytes) -> str:
    """The text in a block of whole native token events.

    >>> read_text(b'data: {"token": "a", "total_tokens": 1}\\n\\ndata: {"token": "b", "total_tokens": 2}\\n\\n')
    'ab'
    """
    return "".join(json.loads(event[6:])["token"] for event in events.split(b"\n\n")[:-1])


def text_event(text: str) -> bytes:
    """A native token event with this text."""
    return sse_event({"token": text, "total_tokens": 1})


def write_event(kind: str, value: Any) -> bytes:
    """A pair as native SSE, or b"" for a pair that has no event."""
    if kind == "text":
        return bytes(value)
    if kind == "idle":
        return SSE_COMMENT
    if kind == "progress":
        return sse_event({"progress": value})
    if kind == "done":
        return sse_event({"done": True, **value})
    return b""


# -------------------------------------------------------------------------------------- IO: the VPS

CONNECT_SECONDS = 5.0  # Tailscale over a bad uplink needs two; the client should not wait longer for a dead VPS
HEAD_SECONDS = 10.0  # the VPS sends its head before it loads a model or reads a prompt
IDLE_SECONDS = 30.0  # between two reads of a stream: the VPS sends a comment every 5 s
CLOSE_SECONDS = 0.5  # the VPS closes right after its answer, as we ask; bytes instead of the close are a fault
STREAM_SECONDS = 7200.0  # in all: 2,048 tokens at half a token per second, and the queue before them
ASIDE_SECONDS = 2.0  # /health and /v1/models, which the VPS answers in milliseconds
LOAD_SECONDS = 120.0  # for an answer that waits until a model is loaded
MAX_ERROR_BYTES = 65_536  # an error's JSON
MAX_TOKENS_BYTES = 8 << 20  # the tokens of 1 MiB of text
MAX_LIST_BYTES = 262_144  # /v1/models of the VPS


class Watchdog:
    """Cuts a connection that stays silent for IDLE_SECONDS while we read from it.

    It has one timer per stream, moved only when it runs out: asyncio.timeout around each read would cost more than the
    read. `since` is when the current read began, infinite while nobody reads.
    """

    def __init__(self, transport: asyncio.WriteTransport) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._end = self._loop.time() + STREAM_SECONDS
        self.since = float("inf")
        self.expired = False
        self._timer = self._loop.call_later(IDLE_SECONDS, self._check)

    def _check(self) -> None:
        now = self._loop.time()
        left = min(self.since + IDLE_SECONDS, self._end) - now
        if left <= 0:
            self.expired = True
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(min(left, IDLE_SECONDS), self._check)

    def stop(self) -> None:
        self._timer.cancel()


class Reader(asyncio.StreamReader):
    """A StreamReader with an express lane: what `express` takes goes out without waking the reading task.

    Waking the task is a third of the cost of relaying a token. The lane is open only while that task waits for bytes
    and nothing that came earlier is still unsent.
    """

    express: Callable[[bytes], bool] | None = None
    broken = False  # the stream ended by a reset

    def feed_data(self, data: Any) -> None:
        if self.express and self.express(data):
            return
        self.express = None
        super().feed_data(data)

    def set_exception(self, exc: Exception) -> None:
        """A reset. StreamReader itself would drop the bytes before it that are not read yet."""
        self.broken = True
        self.feed_eof()


class Answer:
    """The VPS's answer to one request. Owns nothing: `Upstream.ask` closes the connection."""

    def __init__(self, reader: Reader, transport: asyncio.WriteTransport) -> None:
        self.status = 0
        self._reader = reader
        self._ahead = b""  # what came in one read with the head
        self._body = Body(0, False)
        self._watchdog = Watchdog(transport)
        self._now = asyncio.get_running_loop().time
        self.express: Callable[[bytes], bool] | None = None  # sends whole chunks on, and says whether it did
        self.close = self._watchdog.stop

    async def read_head(self, kind: str) -> None:
        """Read the head, skipping those with status 1xx. HttpError or VpsFailure as in `parse_answer`."""
        buffer, scanned, skipped = b"", 0, 0
        while True:
            end = scan_head(buffer, scanned) if buffer else None
            if end is None:
                scanned = len(buffer)
                data = await self._reader.read(READ_BYTES)
                if not data:
                    raise VpsFailure("it closed the connection without an answer")
                buffer += data
                continue
            self.status, self._body = parse_answer(buffer[:end], kind)
            buffer, scanned, skipped = buffer[end:], 0, skipped + 1
            if self.status >= 200:
                self._ahead = buffer
                return
            if self.status == 101 or skipped > 8:
                raise VpsFailure(f"it answered {self.status}")

    async def read(self, express: bool = False) -> bytes:
        """More of the body's payload, b"" once it is whole, or VpsFailure. With `express`, whole chunks that arrive
        while this waits may take the express lane."""
        body = self._body
        while not body.failure:
            data, self._ahead = self._ahead, b""
            data = data or await (self._receive_last() if body.done else self._receive(express))
            if payload := body.feed(data):
                return payload
            if not data:
                broken = "the connection broke" if self._reader.broken else ""
                body.end("it stopped" if self._watchdog.expired else broken)
                if not body.failure:
                    return b""
        raise body.failure

    async def _receive(self, express: bool) -> bytes:
        self._watchdog.since = self._now()
        self._reader.express = self._pass_by if express and self._body.between_chunks else None
        try:
            return await self._reader.read(READ_BYTES)
        finally:
            # Close the lane even if the read did not have to wait: a later token must not overtake these bytes.
            self._reader.express = None
            self._watchdog.since = float("inf")

    async def _receive_last(self) -> bytes:
        """What follows a whole body: b"" for the close that we asked for, or if no close comes soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                return await self._reader.read(READ_BYTES)
        return b""

    def _pass_by(self, data: bytes) -> bool:
        if self.express is None or not self.express(data):
            return False
        self._watchdog.since = self._now()
        return True

    async def read_all(self, limit: int) -> bytes:
        """The whole body. VpsFailure over `limit` bytes."""
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise VpsFailure("its answer is too long")
        return b"".join(pieces)


@contextlib.contextmanager
def blamed(broken: str, malformed: str = "") -> Iterator[None]:
    """Turns whatever the VPS and the network do inside it into VpsFailure. No exception's own text reaches a client."""
    try:
        yield
    except TimeoutError:
        raise VpsFailure("it did not answer in time") from None
    except (OSError, UnicodeError):  # UnicodeError: a host name that cannot be encoded for DNS
        raise VpsFailure(broken) from None
    except VpsFailure:
        raise
    except HttpError:
        raise VpsFailure(malformed) from None


class Upstream:
    """Asks the VPS, on a new connection for each request: a late answer can never reach another request."""

    def __init__(self, config: Config) -> None:
        self._vps, self._key = config.vps, config.key
        self._tls = make_tls() if config.vps.tls else None

    @contextlib.asynccontextmanager
    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        kind: str = "text/event-stream",
        seconds: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Send one request once and yield its 200 of the media type `kind`, whose head has been read. HttpError if the
        VPS refuses, VpsFailure if its answer is malformed or its head takes over `seconds` (None: HEAD_SECONDS)."""
        reader, transport = await self._connect()
        answer = Answer(reader, transport)
        try:
            transport.write(self._encode(method, path, body))
            with blamed("it closed the connection without an answer", "its answer is not HTTP/1.1"):
                async with asyncio.timeout(HEAD_SECONDS if seconds is None else seconds):
                    await answer.read_head(kind)
                    refused = b"" if answer.status == 200 else await answer.read_all(MAX_ERROR_BYTES)
            if answer.status != 200:
                raise refusal(answer.status, refused, self._key)
            yield answer
        finally:
            answer.close()
            transport.abort()

    async def get(self, path: str, limit: int) -> dict[str, Any]:
        """GET a JSON object, within ASIDE_SECONDS for the head and as much again for the body."""
        return await self._json("GET", path, None, limit, ASIDE_SECONDS)

    async def post(self, path: str, body: Mapping[str, Any], limit: int) -> dict[str, Any]:
        """POST for a JSON object, which the VPS may have to load a model for."""
        return await self._json("POST", path, body, limit, LOAD_SECONDS)

    async def _json(
        self, method: str, path: str, body: Mapping[str, Any] | None, limit: int, seconds: float
    ) -> dict[str, Any]:
        async with self.ask(method, path, body, "application/json", seconds) as answer:
            with blamed("the connection broke", "its answer is not JSON"):
                async with asyncio.timeout(ASIDE_SECONDS):
                    return parse_json(await answer.read_all(limit))

    async def _connect(self) -> tuple[Reader, asyncio.Transport]:
        vps, loop = self._vps, asyncio.get_running_loop()
        reader = Reader(limit=READ_BYTES, loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        with blamed("it cannot be connected to"):
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    transport, _ = await loop.create_connection(lambda: protocol, vps.host, vps.port, ssl=self._tls)
            except ConnectionRefusedError:
                raise VpsFailure("connection refused") from None
        # By default the kernel takes in megabytes, although the client may have stopped reading.
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, READ_BYTES)
        return reader, transport

    def _encode(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        lines = [f"{method} {self._vps.prefix}{path} HTTP/1.1", f"Host: {self._vps.authority}", "Connection: close"]
        lines += [f"X-API-Key: {self._key}"] if self._key and path != "/health" else []
        lines += [f"X-Request-ID: {request_id_var.get()}"] if request_id_var.get() != "-" else []
        payload = b""
        if body is not None:
            payload = json.dumps(body).encode("ascii")
            lines += ["Content-Type: application/json", f"Content-Length: {len(payload)}"]
        return "\r\n".join(lines).encode("ascii") + b"\r\n\r\n" + payload


def make_tls() -> ssl.SSLContext:
    """A context with the system's certificates. ssl is imported only where CEREBRUM_VPS_URL says https."""
    import ssl

    return ssl.create_default_context()


async def relay(answer: Answer, key: str) -> AsyncGenerator[Pair, None]:
    """The VPS's events as pairs; the last one is ("done", its members).

    The done event is held until the body has ended as well: whether a stream counts as finished must not depend on how
    its bytes were split. Every other end is a VpsFailure.
    """
    events = Events()
    done: dict[str, Any] | None = None
    while payload := await answer.read(express=not events.inside and done is None):
        for kind, value in take_apart(events.feed(payload), key):
            if done is not None and kind in ("text", "done"):
                raise VpsFailure("it sent events after the last one")
            if kind == "done":
                done = value
            else:
                yield kind, value
    if events.inside:
        raise VpsFailure("it ended in the middle of an event")
    if done is None:
        raise VpsFailure("it ended without saying that it is done")
    yield "done", done


# ------------------------------------------------------------------------------------------- the gateway

PROBE_SECONDS = 5.0  # between two probes, +- 20 %
MODELS_SECONDS = 60.0  # the age at which the list of the VPS's models is asked for again
WAIT_SECONDS = {"infill": 3.0, "completion": 30.0, "chat": 30.0}  # for a place; minuet gives up after 3 s
MIN_READ_TOKENS = 32  # the time of fewer is mostly that of the first token
MAX_CACHED = 16  # texts that the VPS has read, some 10 KB each
SAME_BEGINNING = 200  # characters
MAX_TO_WARM = 4  # prompts, of as many clients
MAX_COLLECTED_BYTES = 2 << 20  # of text events for /v1/complete; 2,048 tokens take about 150 KB


@dataclass(slots=True, eq=False)
class Job:
    """One completion: what the client asked, what was sent to the VPS, and what has come back."""

    fields: dict[str, Any]  # as `read_completion` gives them
    session: str = ""  # from `session_of`; "" without one
    end: Callable[[HttpError], None] = lambda _: None  # ends its request with this error, whatever it is waiting for
    limit: float = math.inf  # bytes of text events that its client's API can take
    send_now: Callable[[bytes], bool] = lambda _: False  # the client's end of the express lane
    kind: str = ""  # of a dialect's request: "infill", "completion" or "chat"; "" for our own API
    client: str = ""  # of a dialect's request: its address
    model: str = ""
    mode: str = ""
    n_ctx: int = 0  # of the model
    kept: dict[str, Any] = field(default_factory=dict)  # how much of the prompt was sent
    weight: int = 0  # of the prompt that was sent, for the ratio
    above: str = ""  # the text before the cursor that was sent
    cut: bool = False  # to what can be read in the time that the client allows
    tokens: int = 0  # relayed so far
    size: int = 0  # bytes of text events so far
    ticket: int = 0  # of the breaker
    superseded: bool = False  # a newer request of its session has ended it
    gone: asyncio.Event = field(default_factory=asyncio.Event)  # set once it holds nothing any more
    started: float = field(default_factory=time.perf_counter)


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

    def pass_by(self, data: bytes) -> bool:
        """The express lane: give one chunk with one token event to all readers, without waking those that keep up."""
        event = data[data.index(b"\n") + 1 : -2]
        self.pairs.append(("text", event))
        for reader in self.readers:
            if reader.at == len(self.pairs) - 1 and not reader.skip and reader.send_now(event):
                reader.at += 1
            elif reader.streams:
                reader.woken.set()
        return True


class Reading:
    """One client's request in a dialect: its place in a completion, which it may share with others."""

    def __init__(self, gateway: Gateway, job: Job, asked: Asked, editor: str) -> None:
        self.gateway, self.job, self.streams, self.editor = gateway, job, asked.stream, editor
        self.predicts = asked.kind != "chat" and (asked.caching or job.fields["temperature"] == 0)
        self.shared = Shared()  # what it reads, once it has joined
        self.at = 0  # pairs read
        self.skip = self.typed = 0  # characters of the text that its client has typed before it asked, and has not got
        self.woken = asyncio.Event()
        self.replaced = False  # a newer infill of this file came
        self.send_now: Callable[[bytes], bool] = lambda _: False  # sends token events, unless the client is behind

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


class Gateway:
    """All state of the Pi. Owns the places, the breaker, the ratios, and what is known of the VPS."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.upstream = Upstream(config)
        self.breaker = Breaker(random.random)
        self.ratio = Ratio()
        self.started, self.created = time.monotonic(), int(time.time())
        self.page = load_page(HERE / "cerebrum_page.html")
        self.requests_total = self.requests_failed = 0
        self.tokens_done = 0  # of the completions that have ended
        self.history = History(self.started)
        self.reloads = Reloads()
        self.notes: list[str] = []  # for the page: what its user may want to change
        self.active: list[Job] = []
        self.line: list[tuple[Job, asyncio.Event]] = []  # those who wait for a place, in the order of their coming
        self.shared: dict[bytes, Shared] = {}  # running completions of dialects, by what was asked
        self.readings: list[Reading] = []
        self.predictions = Predictions()
        self.tokenizing = asyncio.Lock()  # it takes no place, so it is done for one client at a time
        self.counts = {"type_through": 0, "shared": 0, "replaced": 0}  # dialects' requests that ended so
        self.cached: list[tuple[str, str, str]] = []  # (client, model, text before a cursor that the VPS has read)
        self.read_speed: dict[str, float] = {}  # of each model: tokens of a prompt per second
        self.to_warm: dict[str, Job] = {}  # to be read into the VPS's cache when nothing else is to do, by client
        self.warming: tuple[Job, asyncio.Task[None]] | None = None
        self.probes = 0  # that have ended
        self.trouble = "VPS backend has not been asked yet"  # what is wrong with the VPS; "": nothing
        self.response_ms: float | None = None  # of the last good probe
        # The VPS's models, as `read_models` gives them; None until a list came.
        self.models: dict[str, dict[str, Any]] | None = None
        self.models_loaded: list[str] = []  # by the last good probe
        self._models_until = 0.0
        self._wake = asyncio.Event()  # probe now

    @property
    def requests_active(self) -> int:
        return len(self.active)

    @property
    def available(self) -> bool:
        return not self.trouble and self.breaker.state != "open"

    def sample(self) -> None:
        """Bring `history` up to date."""
        tokens = self.tokens_done + sum(job.tokens for job in self.active)
        self.history.sample(time.monotonic(), (self.requests_total, self.requests_failed, tokens))

    # Probing: the only place that asks /health.

    async def probe_forever(self) -> None:
        """Keep `trouble`, `response_ms`, `models` and `history` up to date: probe every 5 s, and when woken."""
        while True:
            self._wake.clear()
            await self._probe()
            self.probes += 1
            self.sample()
            delay = PROBE_SECONDS * random.uniform(0.8, 1.2)
            if retry := self.breaker.retry_in(time.monotonic()):
                delay = min(delay, retry)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(delay):
                    await self._wake.wait()

    async def _probe(self) -> None:
        started = time.monotonic()
        try:
            answer = await self.upstream.get("/health", MAX_ERROR_BYTES)
            now = time.monotonic()
            self.response_ms = round((now - started) * 1000, 1)
            self.breaker.healthy(now)
            loaded = read_loaded(answer)
            if self.trouble or now >= self._models_until or loaded != self.models_loaded:
                await self._learn_models()
            self.models_loaded = loaded
            self._notice_reloads(loaded, now)
        except HttpError as error:
            self._found(error.message)
        else:
            self._found("")
            self._warm_next()

    def _notice_reloads(self, loaded: Sequence[str], now: float) -> None:
        preferred = {id for ids in self.config.prefer.values() for id in ids}
        if model := self.reloads.notice([id for id in loaded if id in preferred], now):
            note = (
                f"the VPS loads {model} again and again, since its memory does not hold all models that [prefer] in"
                " models.toml chooses: give the VPS more memory, or prefer one model"
            )
            log.warning("%s", note)
            self.notes.append(note)

    def _found(self, trouble: str) -> None:
        if trouble != self.trouble:
            log.log(logging.WARNING if trouble else logging.INFO, "%s", trouble or "VPS backend is available")
        self.trouble = trouble

    async def _learn_models(self) -> None:
        """Ask which models the VPS has. If it fails to answer, the last list stays; Misfit if it does not let us in."""
        self._models_until = time.monotonic() + MODELS_SECONDS
        try:
            self.models = read_models(await self.upstream.get("/v1/models", MAX_LIST_BYTES))
        except Misfit:
            raise
        except HttpError as error:
            log.warning("no list of models: %s", error.message)

    # Completing.

    async def complete(self, job: Job) -> AsyncGenerator[Pair, None]:
        """One completion as pairs of (kind, value), independent of the client's API and of the backend's:

            ("started", dict)   first: the backend answers. {"model", "n_ctx", "kept"}. An error before this pair can
                                still be an HTTP status.
            ("idle", None)      nothing new, but the backend is alive
            ("progress", dict)  {"stage": str, "done": int, "total": int}, if the job asks for progress
            ("text", bytes)     whole native token events, relayed without being parsed; `read_text` decodes them
            ("done", dict)      last: the result, which is the native done event without its `done`

        A completion that fails raises HttpError. Whatever it holds is acquired in this body, so it is released when the
        generator ends or is closed; a generator that was never started holds nothing.
        """
        self.requests_total += 1
        async with self._counting_failures(), self._place(job), contextlib.AsyncExitStack() as stack:
            answer = await self._ask(job, stack)
            yield "started", self.beginning(job)
            answer.express = functools.partial(self._express, job)
            async for kind, value in relay(answer, self.config.key):
                if kind == "text":
                    job.size += len(value)
                    if job.size > job.limit:
                        raise VpsFailure("its completion is too long")
                    self._tokens(job, value.count(b"\n\n"))
                elif kind == "done":
                    self._tokens(job, 0)
                    value = self._result(job, value)
                yield kind, value

    @contextlib.asynccontextmanager
    async def _counting_failures(self) -> AsyncIterator[None]:
        try:
            yield
        except Exception as error:
            self.requests_failed += not (isinstance(error, HttpError) and error.code == "SUPERSEDED")
            raise

    @contextlib.asynccontextmanager
    async def _place(self, job: Job) -> AsyncIterator[None]:
        """A place among the running completions and the breaker's permission, or HttpError 429 or 503.

        A newer completion that is admitted ends the older one of its session. It waits until the older one has let go
        of the VPS, which therefore never works on more than `max_concurrent` of our requests.
        """
        older = [other for other in self._running() if job.session and other.session == job.session]
        await self._enter(job, len(older))
        try:
            ticket = self.breaker.admit(time.monotonic())
            if ticket is None:
                raise HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
            job.ticket = ticket
            for other in older:
                other.superseded = True
                other.end(HttpError("SUPERSEDED", "a newer request of this session took its place"))
            for other in [other for other in self.active if other.superseded]:
                await other.gone.wait()
            await self._stop_warming()
            yield
        except VpsFailure as failure:
            self._failed(job.ticket, failure)
            raise
        except Misfit as error:
            self._found(error.message)
            raise
        finally:
            self.active.remove(job)
            self.tokens_done += job.tokens
            job.gone.set()
            self.breaker.left(job.ticket)
            self._call_next()

    def _running(self) -> list[Job]:
        return [job for job in self.active if not job.superseded]

    async def _enter(self, job: Job, leaving: int) -> None:
        """Add the job to `active`. A dialect's job waits in line for a place. One of our own API gets its 429 at once,
        as its clients are promised."""
        if self._may_run(job, leaving):
            self.active.append(job)
            return
        limit = self.config.max_concurrent
        busy = HttpError("RATE_LIMIT", f"expected at most {limit} completions at a time; try again later")
        if not job.kind:
            raise busy
        waiting = job, asyncio.Event()
        self.line.append(waiting)
        try:
            async with asyncio.timeout(WAIT_SECONDS[job.kind]):
                await waiting[1].wait()
        except TimeoutError:
            if job not in self.active:
                raise busy from None
        except asyncio.CancelledError:
            if job in self.active:
                self.active.remove(job)
                self._call_next()
            raise
        finally:
            if waiting in self.line:
                self.line.remove(waiting)

    def _may_run(self, job: Job, leaving: int = 0) -> bool:
        """Whether there is a place. Chats and plain completions leave one for infills, and the infills of one client
        leave one for other clients. Requests of our own API take any place."""
        running, most = self._running(), self.config.max_concurrent
        if len(running) - leaving >= most:
            return False
        if job.kind == "infill":
            alike = [other for other in running if other.kind == "infill" and other.client == job.client]
        else:
            alike = [other for other in running if other.kind in ("chat", "completion")]
        return not job.kind or len(alike) < max(1, most - 1)

    def _call_next(self) -> None:
        """Give free places to those who wait: first to clients with the fewest running, then in the order of coming."""
        clients = [job.client for job in self._running()]
        for waiting in sorted(self.line, key=lambda waiting: clients.count(waiting[0].client)):
            if self._may_run(waiting[0]):
                self.line.remove(waiting)
                self.active.append(waiting[0])
                waiting[1].set()
        self._warm_next()

    # Following a completion in a dialect.

    def beginning(self, job: Job) -> dict[str, Any]:
        """The value of the pair "started"."""
        model = job.model or self.route(job.fields, bool(job.kind))
        return {"model": model, "n_ctx": job.n_ctx or self.n_ctx(model), "kept": job.kept}

    def join(self, reading: Reading) -> Shared:
        """What a reading reads: a completion that is running, or a new one; or at once, if nothing must be computed."""
        self.readings.append(reading)
        job = reading.job
        if job.fields["max_tokens"] == 0:
            self.warm(job)
            done = "done", {"finish_reason": "length"}
            return Shared([("started", self.beginning(job)), done])
        if reading.predicts and (found := self.predictions.find(job.client, job.fields)):
            self._count("type_through")
            self._replace_older(reading, ahead=True)
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
        """The running completion of the same request, or a new one."""
        key = hashlib.sha256(json.dumps(job.fields, sort_keys=True).encode("ascii")).digest()
        shared = self.shared.get(key)
        if shared:
            self._count("shared")
        else:
            shared = self.shared[key] = Shared(job=job, key=key)
            job.send_now = shared.pass_by
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
        """End the older infills of the same editor and file, unless they ask the same. With `ahead`, those go on that
        continue the reading's text: an editor asks ahead for what follows a completion that it shows."""
        fields = reading.job.fields
        for other in list(self.readings):
            of_editor = reading.job.kind == other.job.kind == "infill" and other.editor == reading.editor
            if other is reading or other.replaced or not of_editor or other.job.fields == fields:
                continue
            if ahead and other.job.fields["prompt"].startswith(fields["prompt"]):
                continue
            if same_file(other.job.fields, fields):
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
        begun, reason = shared.pairs[0][1], shared.pairs[-1][1].get("finish_reason", "stop")
        if shared.remembered or (shared.job.kind == "completion" and reason == "length"):
            return
        shared.remembered = True
        text = "".join(read_text(value) for kind, value in shared.pairs if kind == "text")
        self.predictions.add(client, shared.job.fields, text, begun, reason)

    # Warming: reading a prompt into the VPS's cache while there is nothing else to do.

    def warm(self, job: Job) -> None:
        """Read this prompt soon. Takes no place, waits until none is taken, and ends when one is; then it waits again.
        Of each client the newest counts."""
        self.to_warm.pop(job.client, None)
        self.to_warm[job.client] = job
        if len(self.to_warm) > MAX_TO_WARM:
            del self.to_warm[next(iter(self.to_warm))]
        self._warm_next()

    def _warm_next(self) -> None:
        busy = self.active or self.line or self.warming
        if self.to_warm and not busy and self.breaker.state == "closed":
            job = self.to_warm.pop(next(iter(self.to_warm)))
            self.warming = job, asyncio.create_task(self._warm(job))

    async def _warm(self, job: Job) -> None:
        try:
            async with contextlib.AsyncExitStack() as stack:
                answer = await self._ask(job, stack)
                async for kind, value in relay(answer, self.config.key):
                    if kind == "done":
                        self._result(job, value)
        except HttpError as error:
            log.info("no prompt was read ahead: %s", error.message)
        except Exception as exception:
            internal_error(exception)
        finally:
            self.warming = None
        self._warm_next()

    async def _stop_warming(self) -> None:
        if self.warming:
            job, task = self.warming
            if job.client not in self.to_warm:
                self.warm(job)  # again, later: the VPS keeps what it has read so far
            task.cancel()
            await asyncio.wait([task])

    def _max_fresh(self, job: Job) -> tuple[int | None, list[str]]:
        """(how many tokens may be read for this job, texts that the VPS has read for its client before)."""
        speed, limit = self.read_speed.get(job.model), job.fields.get("prompt_ms", 0)
        if limit <= 1 or not speed or not job.fields["max_tokens"]:
            return None, []
        return int(speed * limit / 1000), [text for *who, text in self.cached if who == [job.client, job.model]]

    def _express(self, job: Job, data: bytes) -> bool:
        """The express lane: send one chunk with one token on as it came, unless the client is behind."""
        job.size += len(data)
        if job.size > job.limit or not is_chunk_of_token(data) or not job.send_now(data):
            return False
        self._tokens(job, 1)
        return True

    def _tokens(self, job: Job, count: int) -> None:
        """Count valid tokens; a whole answer without any counts as a success too."""
        job.tokens += count
        job.ticket = self.breaker.succeeded(job.ticket)
        if self.trouble:
            self._found("")

    def _failed(self, ticket: int, failure: VpsFailure) -> None:
        self.breaker.failed(ticket, time.monotonic())
        log.warning("%s; the breaker is %s", failure.message, self.breaker.state)
        self.trouble = failure.message
        self._wake.set()  # a probe finds out at once whether the VPS is gone

    async def _ask(self, job: Job, stack: contextlib.AsyncExitStack) -> Answer:
        """Choose the model, fit the prompt and send it; fit and send it again if the VPS counts too many tokens."""
        if self.models is None:
            await self._learn_models()
        job.model = self.route(job.fields, bool(job.kind))
        job.n_ctx = self.n_ctx(job.model)
        try:
            return await self._send(job, self.ratio.get(job.model), stack)
        except HttpError as error:
            counted, n_ctx = error.extra.get("prompt_tokens", 0), error.extra.get("n_ctx", 0)
            if error.status != 400 or counted <= 0 or n_ctx <= 0:
                raise
        self.ratio.learn(job.model, job.weight, counted)
        job.n_ctx = n_ctx
        return await self._send(job, REFIT * job.weight / counted, stack)

    def route(self, fields: Mapping[str, Any], any_language: bool = True) -> str:
        """The id of the model that is asked for, or as `choose_model` says."""
        if fields.get("model") is not None:
            return str(fields["model"])
        mode = fields.get("mode", "")
        return choose_model(self.config, fields.get("language", ""), mode, self.models, any_language)

    def n_ctx(self, model: str) -> int:
        told = (self.models or {}).get(model)
        return told["n_ctx"] if told else DEFAULT_N_CTX

    async def _send(self, job: Job, ratio: float, stack: contextlib.AsyncExitStack) -> Answer:
        fields, n_ctx = job.fields, job.n_ctx
        longest = n_ctx // 4 if job.kind == "chat" else n_ctx  # a chat's answer is short, whatever its limit
        # In the dialects, a small limit leaves no more room than the usual one: a warm-up, with its limit of 0, must
        # fit the same text as the request that follows.
        least = DEFAULT_TOKENS if job.kind else 0
        budget = prompt_budget(n_ctx, min(max(fields["max_tokens"], least), longest))
        prepared = prepare(fields, fields["mode"], budget, ratio, *self._max_fresh(job))
        job.mode, job.kept, job.weight = fields["mode"], prepared.kept, prepared.weight
        job.above, job.cut = prepared.above, prepared.cut
        passed = {name: fields[name] for name in PASSED_TO_VPS if fields.get(name) is not None}
        if job.session:
            passed["session"] = job.session
        if language := BY_NAME.get(fields["language"].lower()):  # the VPS knows the syntax of these
            passed["language"] = language
        body = {"model": job.model, **passed, **prepared.body}
        try:
            return await stack.enter_async_context(self.upstream.ask("POST", "/v1/inference/stream", body))
        except HttpError as error:
            if error.code == "MODEL_NOT_FOUND":
                self._models_until = 0.0
            raise

    def _result(self, job: Job, done: Mapping[str, Any]) -> dict[str, Any]:
        """The result's own members, then whatever else the VPS tells about it."""
        told = read_result(done)
        if counted := told.get("prompt_tokens"):
            self.ratio.learn(job.model, job.weight, counted)
            self._learn_reading(job, counted - told.get("cached_tokens", 0), told.get("ttft"))
        ours = {
            "language": job.fields["language"],
            "model": job.model,
            "total_tokens": told.pop("total_tokens", job.tokens),
            "inference_time": round(float(told.pop("inference_time", time.perf_counter() - job.started)), 3),
            "timestamp": timestamp(),
            "mode": job.mode,
        }
        return ours | told | ({"kept": job.kept} if job.kept else {})

    def _learn_reading(self, job: Job, read: int, seconds: float | None) -> None:
        """How fast the VPS reads prompts, and which text of a client's file it has read. A prompt that was cut short
        for the sake of time is read whole later, so that the next one need not be."""
        if seconds and read >= MIN_READ_TOKENS:
            speed = read / seconds
            self.read_speed[job.model] = self.read_speed.get(job.model, speed) * 0.75 + speed * 0.25
        if job.kind not in ("infill", "completion"):
            return
        mine = job.client, job.model
        # What begins alike is of the same file.
        of_others = [
            entry for entry in self.cached if entry[:2] != mine or not entry[2].startswith(job.above[:SAME_BEGINNING])
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
    """GET /health: the VPS's state as the last probe and the traffic have shown it. 503 says what is wrong."""
    uptime = round(time.monotonic() - gateway.started, 1)
    if gateway.available:
        return Response({"status": "healthy", "timestamp": timestamp(), "vps_available": True, "uptime": uptime})
    message = gateway.trouble or BREAKER_OPEN
    raise HttpError("VPS_UNAVAILABLE", message, extra={"status": "unhealthy", "vps_available": False, "uptime": uptime})


def read_job(gateway: Gateway, request: Request, limit: float = math.inf) -> Job:
    """A native request as a Job."""
    fields = read_completion(request.json(), gateway.config.models)
    return Job(fields, session_of(request.address, fields["session"]), request.end, limit)


async def complete_stream(gateway: Gateway, request: Request) -> Response:
    """POST /v1/complete/stream: a completion as SSE, token by token."""
    job = read_job(gateway, request)
    job.send_now = request.send_now
    return Response(events=native_stream(gateway.complete(job)))


async def native_stream(pairs: AsyncGenerator[Pair, None]) -> AsyncGenerator[bytes, None]:
    """Blocks of whole SSE events. The first is empty: it sends the head as soon as the backend answers."""
    async with contextlib.aclosing(pairs):
        async for kind, value in pairs:
            yield write_event(kind, value)


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
    """GET /v1/models: the models of models.toml. `available`: the VPS can be reached and has the model's file; then the
    entry also has what the VPS tells about the model. `languages` has those that models.toml names (`served`) and those
    whose syntax is known. `data` is OpenAI's list: the models that the VPS has, or all as long as that is unknown."""
    models, present = gateway.config.models, (gateway.models or {}) if gateway.available else {}
    listed = [
        {
            "id": model.id,
            "name": model.name,
            "languages": list(model.languages),
            "parameters": model.parameters,
            "quantization": model.quantization,
            "available": model.id in present,
            **present.get(model.id, {}),
        }
        for model in models
    ]
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
    return Response(compact(write_props(model, gateway.n_ctx(model), gateway.config.max_concurrent)))


async def tokenize(gateway: Gateway, request: Request) -> Response:
    """POST /tokenize: a text in tokens of the model that answers when none is named."""
    fields = read_fields(present(request.json()), TOKENIZE)
    if gateway.breaker.state == "open":
        raise HttpError("VPS_UNAVAILABLE", BREAKER_OPEN)
    asked = {"text": fields["content"], "first": fields["add_special"], "special": fields["parse_special"]}
    asked["model"] = gateway.route({})
    async with gateway.tokenizing:
        answer = await gateway.upstream.post("/v1/tokenize", asked, MAX_TOKENS_BYTES)
    return Response(compact({"tokens": answer.get("tokens", [])}))


def speaking(dialect: Dialect) -> Callable[[Gateway, Request], Awaitable[Response]]:
    """The handler of a dialect's completions."""

    async def handle(gateway: Gateway, request: Request) -> Response:
        asked = dialect.read(request.json())
        fields = native_fields(asked, gateway.config.models)
        job = Job(fields, limit=MAX_COLLECTED_BYTES, kind=asked.kind, client=request.address)
        editor = f"{request.address} {request.head.headers.get('user-agent', '')}"
        reading = Reading(gateway, job, asked, editor)

        def reply_to(begun: Mapping[str, Any]) -> Reply:
            return dialect.reply(asked, request.head.request_id, int(time.time()), begun)

        if not asked.stream:
            return await collect(reading, reply_to)
        response = Response()
        response.events = dialect_stream(reading, reply_to, request, response)
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
    reading: Reading, reply_to: Callable[[Mapping[str, Any]], Reply], request: Request, response: Response
) -> AsyncGenerator[bytes, None]:
    """Blocks of whole SSE events in a dialect. The first may be empty, as in `native_stream`."""
    async with contextlib.aclosing(reading.pairs()) as pairs:
        async for kind, value in pairs:
            if kind == "started":
                reply, response.headers = reply_to(value), kept_headers(value["kept"])
                reading.send_now = functools.partial(send_tokens, request, reply)
                yield reply.begin()
            elif kind == "text":
                yield reply.text(value)
            elif kind == "idle":
                yield SSE_COMMENT
            elif kind == "done":
                yield reply.end(value)


def send_tokens(request: Request, reply: Reply, tokens: bytes) -> bool:
    """The express lane's last part."""
    return request.send_now(chunk(reply.text(tokens)))


def kept_headers(kept: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What of a request was sent, if that is not all: no dialect has a member for it."""
    if not kept or kept["parts"] == ["all"]:
        return ()
    messages = "{} of {} messages, ".format(*kept["messages"]) if "messages" in kept else ""
    return (("X-Cerebrum-Kept", f"{messages}{kept['characters']} of {kept['of']} characters"),)


async def stats(gateway: Gateway, request: Request) -> Response:
    """GET /v1/stats: counters and gauges. `vps_response_time_ms` is the last good probe's, null before one; requests
    are completions."""
    return Response(statistics(gateway))


async def activity(gateway: Gateway, request: Request) -> Response:
    """GET /v1/activity: the statistics, why the VPS is not available, and the counts of the last half hour. Each number
    of `requests`, `failed` and `tokens` counts `step_s` seconds, the last one the present step so far."""
    gateway.sample()
    message = "" if gateway.available else gateway.trouble or BREAKER_OPEN
    told = {"vps_message": message, "models_loaded": gateway.models_loaded, "notes": gateway.notes}
    return Response({"timestamp": timestamp(), **statistics(gateway), **told, **gateway.history.describe()})


def statistics(gateway: Gateway) -> dict[str, Any]:
    """The members of /v1/stats."""
    now = time.monotonic()
    return {
        "uptime": round(now - gateway.started, 1),
        "requests_total": gateway.requests_total,
        "requests_active": gateway.requests_active,
        "vps_available": gateway.available,
        "vps_response_time_ms": gateway.response_ms,
        "memory_mb": memory_mb(),
        "load_avg": [round(load, 2) for load in os.getloadavg()],
        "breaker": gateway.breaker.describe(now),
        **gateway.counts,
    }


async def openapi(gateway: Gateway, request: Request) -> Response:
    """GET /openapi.json: this document, which describes the API in OpenAPI 3.1."""
    from cerebrum_openapi import write_openapi  # compiled and loaded only for those who ask

    config = gateway.config
    return Response(compact(write_openapi(ROUTES, DIALECTS, FIELDS, config.models, PASSED_ON, bool(config.client_key))))


def load_page(path: Path) -> Page | None:
    """The page, or None and a line in the log: the daemon lives without it."""
    try:
        return Page(path.read_bytes())
    except OSError as error:
        log.warning("no page at /: cannot read %s: %s", path.name, error.strerror)
        return None


def memory_mb() -> float:
    """This process's resident memory in MiB; where there is no /proc, its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])
        return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except OSError:
        import resource

        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


# ---------------------------------------------------------------------------------------------- routes

# Some clients put /v1 before their paths only if the URL that their user has typed ends so.
DIALECTS = {
    OPENAI_TEXT: ("/v1/completions", "/completions"),
    OPENAI_CHAT: ("/v1/chat/completions", "/chat/completions"),
    COMPLETION: ("/completion",),
    INFILL: ("/infill",),
}
ROUTES = (
    Route("GET", "/", page, open=True),
    Route("GET", "/health", health, open=True, quiet=True),
    Route("POST", "/v1/complete", complete, json=True, watched=True),
    Route("POST", "/v1/complete/stream", complete_stream, json=True, watched=True),
    Route("GET", "/v1/models", models),
    Route("GET", "/v1/stats", stats),
    Route("GET", "/v1/activity", activity, quiet=True),
    *(
        Route("POST", path, speaking(dialect), json=True, watched=True, any_type=True, foreign_error=write_error)
        for dialect, paths in DIALECTS.items()
        for path in paths
    ),
    *(Route("GET", f"{path}/{{id}}", model, foreign_error=write_error) for path in ("/v1/models", "/models")),
    Route("GET", "/models", models),
    Route("GET", "/openapi.json", openapi),
    Route("GET", "/props", props, foreign_error=write_error),
    Route("POST", "/tokenize", tokenize, json=True, watched=True, any_type=True, foreign_error=write_error),
)

# ----------------------------------------------------------------------------------------------- start

DRAIN_SECONDS = 10.0  # given to running completions when we are told to stop


async def serve(config: Config) -> None:
    """Listen and answer until SIGTERM or SIGINT, then let running completions end."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    gateway = Gateway(config)
    server = Server(gateway, ROUTES, Access(config.client_key, own_names(config.hosts), config.origins))
    probing = asyncio.create_task(gateway.probe_forever())
    port = await server.start(config.host, config.port)
    log.info("listening on http://%s:%d", f"[{config.host}]" if ":" in config.host else config.host, port)
    notify("READY=1")
    stopping = asyncio.create_task(told.wait())
    await asyncio.wait({probing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    notify("STOPPING=1")
    log.info("stopping")
    await server.stop(DRAIN_SECONDS)
    probing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await probing  # if it ended by itself, its error ends the daemon


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status: 2 for a wrong configuration, which no restart can mend, 1 for what one may mend."""
    if arguments:
        print("cm4d.py: expected no arguments; environment variables configure it, see .env.example", file=sys.stderr)
        return 2
    try:
        config = load_config(read_environment(os.environ, HERE))
        set_up_logging(config.log_level, config.log_file)
    except ConfigError as error:
        print(f"cm4d.py: {error}", file=sys.stderr)
        return 2
    if not config.key:
        log.warning("CEREBRUM_API_KEY is not set: the VPS will refuse every completion")
    try:
        asyncio.run(serve(config))
    except ListenError as error:
        log.error("cannot listen on %s port %d: %s", config.host, config.port, error.strerror)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
