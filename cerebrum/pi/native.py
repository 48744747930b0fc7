"""Backends of our own kind, which run vpsd: their lists of models, their errors and their events.

Inexact JSON is refused, and so is a stream that ends without its done event. Only the error texts
of this kind reach a client.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cerebrum.fields import (
    Field,
    JsonObject,
    Members,
    items_of,
    members_of,
    parse_json,
    valid_members,
)
from cerebrum.pi.completion import Fitted, Pair, Pairs, text_event
from cerebrum.pi.kind import COUNT, Kind, Models
from cerebrum.pi.upstream import (
    EVENT_STREAM,
    IDLE_SECONDS,
    LATE,
    LENGTH,
    Answer,
    BackendFailure,
    Events,
    TooLong,
    Unusable,
    blamed,
    data_of,
)
from cerebrum_common import FIM_LAYOUTS, HttpError

# ------------------------------------------------------------------------------------------- models

LISTED = {
    "n_ctx": LENGTH,
    "loaded": Field(bool),
    "encoding": Field(str, 1, 100),
    "memory_mb": Field(float, 0, 10**9),
    "fim_layout": Field(str, choices=FIM_LAYOUTS),
}


def read_models(answer: Members) -> Models:
    """Parse vpsd's /v1/models: for each available model, the valid ones of the LISTED fields.

    >>> away = {"id": "n", "available": False}
    >>> read_models({"models": [{"id": "m", "loaded": False, "path": "/x"}, away]})
    {'m': {'loaded': False}}
    """
    models = Models()
    for entry in map(members_of, items_of(answer.get("models"))):
        id = entry.get("id")
        if isinstance(id, str) and entry.get("available") is not False:
            models[id] = valid_members(entry, LISTED)
    return models


# ------------------------------------------------------------------------------------------- errors

MAX_MESSAGE_CHARACTERS = 2000  # of a backend's error message that is passed on
# Codes of the VPS that mean something to the client; all others become VPS_UNAVAILABLE.
PASSED_ON = {
    "INVALID_REQUEST",
    "MODEL_NOT_FOUND",
    "SUPERSEDED",
    "MODEL_BUSY",
    "RATE_LIMIT",
    "MODEL_LOAD_FAILED",
    "OVERLOADED",
    "RESOURCE_EXHAUSTED",
    "SHUTTING_DOWN",
}
EXPLAINED = {
    401: "VPS backend refuses our key: {} of the Pi and CEREBRUM_API_KEY of the VPS do not match",
    421: "VPS backend refuses the host of its URL: add it to CEREBRUM_ALLOWED_HOSTS on the VPS",
}
ERROR_CODE = Field(str, pattern=r"[A-Z][A-Z_]{0,63}")
# Characters that could act on a client's terminal.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]+")


def our_error(members: Members, key: str) -> HttpError | None:
    """The client's error if this JSON object has the error format of our daemons, else None."""
    message = members.get("message")
    code = members.get("code", "")
    is_error = members.get("error") is True and ERROR_CODE.accepts(code)
    if not is_error or not isinstance(message, str):
        return None
    message = CONTROLS.sub(" ", message)
    if key:  # it goes before the cut, which could leave half of it
        message = message.replace(key, "***")
    message = message[:MAX_MESSAGE_CHARACTERS]
    lengths = valid_members(members, {"prompt_tokens": LENGTH, "n_ctx": LENGTH})
    if code == "INVALID_REQUEST" and len(lengths) == 2:
        return TooLong(lengths, message)
    if code not in PASSED_ON:
        code = "VPS_UNAVAILABLE"
    return HttpError(code, message, extra=lengths)


# ------------------------------------------------------------------------------------------- events

# Nearly all traffic is runs of token events exactly as vpsd writes them, which are relayed
# untouched. Any other valid event is parsed, which costs microseconds. Comments right behind it are
# dropped: it shows well enough that the backend is alive. The possessive `++` keeps the regex from
# backtracking into a long run.
TOKEN_EVENT = (
    rb'data: \{"token": "(?:[^"\\\x00-\x1f\x7f-\xff]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
    rb', "total_tokens": (?:0|[1-9][0-9]{0,8})\}\n\n'
)
TOKENS_OR_EVENT = re.compile(rb"((?:%b)++)|(?s:(.*?)\n\n)(?::[^\n]*+\n\n)*+" % TOKEN_EVENT)


def take_apart(block: bytes, key: str) -> Iterator[Pair]:
    """Split a block of whole events into pairs; ("done", dict) holds the members as the backend
    sent them. Raises the error that an error event reports, and BackendFailure for an event that is
    not JSON.
    """
    for tokens, event in TOKENS_OR_EVENT.findall(block):
        pair: Pair | None = ("text", tokens) if tokens else read_event(event, key)
        if pair:
            yield pair


def read_event(event: bytes, key: str) -> Pair | None:
    """Parse one event, without its final line ends, into a pair as in `take_apart`; None for an
    unknown event.
    """
    data = data_of(event)
    if not data:
        return ("idle", None) if event.startswith(b":") else None
    with blamed("it sent an event that is not JSON"):
        members = parse_json(data)
    if "error" in members:
        raise our_error(members, key) or BackendFailure("it sent an error without message and code")
    if members.get("done") is True:
        return "done", members
    if isinstance(members.get("token"), str):
        if not COUNT.accepts(members.get("total_tokens")):
            raise BackendFailure("it sent a token without its number")
        return "text", text_event(members["token"], members["total_tokens"])
    if isinstance(members.get("model"), str):
        return "begun", members["model"]
    progress = members.get("progress")
    return ("progress", progress) if isinstance(progress, dict) else None


# --------------------------------------------------------------------------------------------- vpsd

MAX_VERSION = 32  # characters
BEGIN_SECONDS = 10.0  # vpsd sends the head of a stream before it loads a model or reads a prompt


class Vpsd(Kind):
    """A backend of our own kind."""

    is_ours = reads_ahead = True
    tokenize_path = "/v1/tokenize"
    key_line = "X-API-Key: "
    idle_seconds = IDLE_SECONDS
    parse = staticmethod(parse_json)

    def refusal(self, status: int, members: Members) -> HttpError:
        error = our_error(members, self.config.key)
        if error is None or status < 400:
            return super().refusal(status, members)
        if status in EXPLAINED:
            return Unusable("VPS_UNAVAILABLE", EXPLAINED[status].format(self.config.variable))
        return error

    async def ask_health(self) -> list[str]:
        health = await self.get("/health")
        version = health.get("version")
        self.version = version[:MAX_VERSION] if isinstance(version, str) else ""
        return [id for id in items_of(health.get("models_loaded")) if isinstance(id, str)]

    async def list_models(self) -> Models:
        return read_models(await self.get("/v1/models"))

    def layout(self, model: str, about: Members) -> str:
        return str(about.get("fim_layout", "psm"))

    def write(self, wanted: Fitted) -> tuple[str, JsonObject]:
        return "/v1/inference/stream", {"model": wanted.name, **wanted.fields}

    def tokenize_body(self, name: str, fields: Members) -> JsonObject:
        return {
            "text": fields["content"],
            "first": fields["add_special"],
            "special": fields["parse_special"],
            "model": name,
        }

    async def read(self, answer: Answer, wanted: Fitted) -> Pairs:
        """The events of an answer as pairs: ("begun", None) first, ("done", members of the event)
        last. The done event waits until the framing of the body has ended as well: whether a
        stream counts as finished must not depend on how its bytes were split. Every other end is a
        BackendFailure.
        """
        if not await self.begin(answer, BEGIN_SECONDS, EVENT_STREAM):
            raise BackendFailure(LATE)
        yield "begun", None
        events = Events()
        done = None
        while payload := await answer.read():
            for event, value in take_apart(events.feed(payload), self.config.key):
                if done is not None and event in ("text", "done"):
                    raise BackendFailure("it sent events after the last one")
                if event == "done":
                    done = value
                else:
                    yield event, value
        if events.rest:
            raise BackendFailure("it ended in the middle of an event")
        if done is None:
            raise BackendFailure("it ended without saying that it is done")
        yield "done", done
