"""Code of both Cerebrum daemons: routing tables, errors and their statuses, request ids, SSE
events.

Every error is an `HttpError` with a code; `STATUSES` maps each code to its HTTP status. A daemon's
API is a table of `Route` entries, and its languages come from its `Model` entries.

No socket, no file, no environment; but timestamps read the clock, and `internal_error` writes to
the log. The only state is in `log`, whose handlers `service.set_up_logging` sets, and in
`request_id_var`, which cerebrum/http.py sets in the task of each request. Standard library only.
"""

from __future__ import annotations

import contextvars
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple

VERSION = "1.1.0"  # of all files that are copied together; pyproject.toml has the same
request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
log = logging.getLogger("cerebrum")

# ------------------------------------------------------------------------------------------- errors

# Every error code of either daemon and its HTTP status. The first code of a status also names its
# reason phrase.
STATUSES = {
    "INVALID_REQUEST": 400,
    "UNAUTHORIZED": 401,
    "FORBIDDEN": 403,
    "NOT_FOUND": 404,
    "MODEL_NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405,
    "TIMEOUT": 408,
    "SUPERSEDED": 409,
    "MODEL_BUSY": 409,
    "LENGTH_REQUIRED": 411,
    "PAYLOAD_TOO_LARGE": 413,
    "URI_TOO_LONG": 414,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "EXPECTATION_FAILED": 417,
    "MISDIRECTED_REQUEST": 421,
    "RATE_LIMIT": 429,
    "HEADERS_TOO_LARGE": 431,
    "INTERNAL_ERROR": 500,
    "MODEL_LOAD_FAILED": 500,
    "NOT_IMPLEMENTED": 501,
    "OVERLOADED": 503,
    "VPS_UNAVAILABLE": 503,
    "RESOURCE_EXHAUSTED": 503,
    "SHUTTING_DOWN": 503,
    "VERSION_NOT_SUPPORTED": 505,
}
REASONS = {200: "OK", 204: "No Content"}
for code, status in STATUSES.items():
    REASONS.setdefault(status, code.replace("_", " ").title())
Headers = tuple[tuple[str, str], ...]


class HttpError(Exception):
    """An error response: a code, its status, and a message that a client may read. `close` ends the
    connection after the answer, because the framing can no longer be trusted. `extra` holds more
    members of the JSON object, `headers` more response headers. `retry_after`: the seconds for
    which a backend wants no other request; clients are not told.
    """

    retry_after = 0

    def __init__(
        self,
        code: str,
        message: str,
        *,
        close: bool = False,
        extra: Mapping[str, Any] = {},
        headers: Headers = (),
    ) -> None:
        super().__init__(message)
        self.status = STATUSES[code]
        self.message = message
        self.code = code
        self.close = close
        self.extra = extra
        self.headers = headers


def internal_error(exception: Exception) -> HttpError:
    """A fault of ours. The traceback goes to the log; the client learns the request id and nothing
    else.
    """
    log.error("internal error", exc_info=exception)
    return HttpError(
        "INTERNAL_ERROR", "internal error; the log has the details under this request's id"
    )


def timestamp(ago: float = 0.0) -> str:
    """The UTC time `ago` seconds before now, as `2025-12-25T12:00:00.000000`."""
    time = datetime.now(UTC) - timedelta(seconds=ago)
    return time.strftime("%Y-%m-%dT%H:%M:%S.%f")


def error_body(error: HttpError) -> dict[str, Any]:
    """`{"error": true, "message", "code", "timestamp"}` and the error's `extra`."""
    return {
        "error": True,
        "message": error.message,
        "code": error.code,
        "timestamp": timestamp(),
        **error.extra,
    }


# --------------------------------------------------------------------------- requests and responses


CHUNKED = -1  # the length of a body that comes in chunks


class Head(NamedTuple):
    """A parsed request head. `path` is decoded once, for routing and authentication alike. `length`
    is the body's in bytes, CHUNKED if chunks will tell it, None if nothing does. `host` is the name
    in the Host header, "" in HTTP/1.0 without that header. `authority` is the name in a target of
    absolute form.
    """

    method: str
    path: str
    version: str
    headers: dict[str, str]
    host: str
    authority: str
    length: int | None
    request_id: str
    keep_alive: bool

    @property
    def has_body(self) -> bool:
        return bool(self.length)

    @property
    def expects(self) -> bool:
        """Whether the client waits for a 100 before it sends the body (RFC 9110 section 10.1.1;
        never in HTTP/1.0).
        """
        return self.has_body and self.version == "HTTP/1.1" and "expect" in self.headers

    @property
    def is_preflight(self) -> bool:
        """Whether this is a browser's CORS preflight, which never carries the key."""
        asked = {"origin", "access-control-request-method"}
        return self.method == "OPTIONS" and asked <= self.headers.keys()


@dataclass(slots=True)
class Response:
    """A handler's result: a `body` for JSON, or `events`, an async generator of values that
    `render` turns into blocks of whole SSE events. `kind` is the media type of a `body` of bytes,
    which is sent unchanged. `headers` are read after the first block of `events` has arrived.
    """

    body: Any = None
    status: int = 200
    events: AsyncIterator[Any] | None = None
    render: Callable[[Any], bytes] = bytes
    headers: Headers = ()
    kind: str = "application/json"


def sse_event(data: Mapping[str, Any]) -> bytes:
    """One SSE event with one JSON object. ASCII only: simple clients decode each network read by
    itself and would lose a character that is cut in two.
    """
    return sse_block(json.dumps(data).encode("ascii"))


def sse_block(line: bytes) -> bytes:
    """One SSE event with one line of data."""
    return b"data: %b\n\n" % line


def compact(data: Any) -> bytes:
    """JSON in one line without spaces. The plugin llama.vim looks for `"content":"` and drops
    everything else.
    """
    return json.dumps(data, separators=(",", ":")).encode("ascii")


def json_line(data: Any) -> bytes:
    return compact(data) + b"\n"


# The media types of streams: SSE, and a JSON object in each line.
EVENTS = "text/event-stream; charset=utf-8"
LINES = "application/x-ndjson"
# Not ": ping", which ends the stream in the editor plugin Continue.
SSE_COMMENT = b": keep-alive\n\n"


class Request(NamedTuple):
    """A request as a handler gets it. `parameter` is the last path segment of a route that ends in
    `{id}`, `address` the client's address, `client` the name of its key or else its address.
    `end(error)` cancels the handler from outside and answers with the error instead. `notes` are
    added to the request's log line as `name=value`. `answered` is the count kept by `Server`.
    """

    head: Head
    body: bytes
    parameter: str
    address: str
    client: str
    end: Callable[[HttpError], None]
    notes: dict[str, Any]
    answered: Mapping[tuple[str, int], int]


class Route(NamedTuple):
    """One line of a daemon's API table."""

    method: str
    path: str
    handler: Callable[[Any, Request], Awaitable[Response]]
    open: bool = False  # needs no key
    quiet: bool = False  # successes are logged at DEBUG: clients poll this route every few seconds
    # Takes a JSON body, which other routes drop. The handler may run long: it is cancelled when its
    # client leaves.
    json: bool = False
    # Writes errors in the form of this API; for another one, a JSON body may have any Content-Type.
    write_error: Callable[[HttpError], Mapping[str, Any]] = error_body
    streams: str = EVENTS  # the media type of a stream


Routes = Mapping[str, Mapping[str, Route]]  # by path, then by method


def routes_of(routes: Routes, path: str) -> tuple[Mapping[str, Route], str]:
    """The routes of a path by method, none for an unknown path, and the value of `{id}` in it."""
    parent, _, last = path.rpartition("/")
    if path in routes or not last:
        return routes.get(path, {}), ""
    return routes.get(f"{parent}/{{id}}", {}), last


def route_of(methods: Mapping[str, Route], method: str) -> Route:
    """The one of a path's routes that answers this method. HttpError 405 names the methods that it
    has.
    """
    if route := methods.get(method):
        return route
    allow = ", ".join(sorted(methods))
    message = f"expected one of {allow}, got {method}"
    raise HttpError("METHOD_NOT_ALLOWED", message, headers=(("Allow", allow),))


# ------------------------------------------------------------------------------------------- models

FIM_LAYOUTS = ("psm", "spm", "spmv2")  # see `arrange_gap`


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of models.toml. An empty `sha256` is not checked; `fetch` downloads the file from
    `sources`. `aliases` are the model's names in other engines. `fim` holds its marks before the
    prefix, before the suffix and before the gap, or is empty; `fim_layout` is their order, see
    `arrange_gap`. A model that only other engines have needs no `file`. `size` is in bytes. A
    `size` or `memory_mb` of 0 is unknown. `shape` has the sizes of its tensors, by the names of
    settings.SHAPE, or is empty. `draft` is the id of a small model that writes ahead of it, or
    empty; with `early`, that one also answers where this one would be too late. A model to `keep`
    is loaded at the start and stays in memory.
    """

    id: str
    name: str
    languages: tuple[str, ...]
    parameters: str
    quantization: str
    file: str
    sha256: str
    size: int
    memory_mb: int
    sources: tuple[dict[str, Any], ...]
    aliases: tuple[str, ...]
    fim: tuple[str, ...]
    fim_layout: str
    draft: str
    early: bool = True
    shape: Mapping[str, int] = field(default_factory=dict)
    keep: bool = False


def served_languages(models: Iterable[Model]) -> list[str]:
    """The languages that the models list, each once, in the order of models.toml."""
    return list(dict.fromkeys(chain.from_iterable(model.languages for model in models)))
