"""Code of both Cerebrum daemons: routing tables, errors and their statuses, request ids, field checks, SSE events.

Every error is an `HttpError` with a code; `STATUSES` maps each code to its HTTP status. A daemon's API is a table of
`Route` entries, and its languages come from its `Model` entries. A table of `Field` entries checks a request.

    >>> read_fields({"max_tokens": 5}, {"max_tokens": Field(int, 1, 2048, 512)})
    {'max_tokens': 5}

Pure but for the clock in timestamps: no socket, no file, no environment. Standard library only.
"""

from __future__ import annotations

import contextvars
import json
import logging
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

VERSION = "1.1.0"  # of all files that are copied together; pyproject.toml has the same
MAX_JSON_DEPTH = 64  # requests are flat; without this limit the C scanner ends in a RecursionError
MAX_INTEGER_DIGITS = 20  # 64 bits; no field takes a larger number
request_id_var: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="-")
log = logging.getLogger("cerebrum")

# ------------------------------------------------------------------------------------------------ errors

# Every error code of either daemon and its HTTP status. The first code of a status also names its reason phrase.
STATUSES = {
    "INVALID_REQUEST": 400, "UNAUTHORIZED": 401, "FORBIDDEN": 403, "NOT_FOUND": 404, "MODEL_NOT_FOUND": 404,
    "METHOD_NOT_ALLOWED": 405, "TIMEOUT": 408, "SUPERSEDED": 409, "MODEL_BUSY": 409, "LENGTH_REQUIRED": 411,
    "PAYLOAD_TOO_LARGE": 413, "URI_TOO_LONG": 414, "UNSUPPORTED_MEDIA_TYPE": 415, "EXPECTATION_FAILED": 417,
    "MISDIRECTED_REQUEST": 421, "RATE_LIMIT": 429, "HEADERS_TOO_LARGE": 431, "INTERNAL_ERROR": 500,
    "MODEL_LOAD_FAILED": 500, "NOT_IMPLEMENTED": 501, "OVERLOADED": 503, "VPS_UNAVAILABLE": 503,
    "RESOURCE_EXHAUSTED": 503, "SHUTTING_DOWN": 503, "VERSION_NOT_SUPPORTED": 505,
}  # fmt: skip
REASONS = {status: code.replace("_", " ").title() for code, status in reversed(STATUSES.items())}
REASONS |= {200: "OK", 204: "No Content", 304: "Not Modified"}
Headers = tuple[tuple[str, str], ...]


class HttpError(Exception):
    """An error response: a code, its status, and a message that a client may read. `close` ends the connection after
    the answer, because the framing can no longer be trusted. `extra` holds more members of the JSON object, `headers`
    more response headers."""

    def __init__(
        self, code: str, message: str, *, close: bool = False, extra: Mapping[str, Any] = {}, headers: Headers = ()
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = STATUSES[code], message, code
        self.close, self.extra, self.headers = close, extra, headers


def internal_error(exception: Exception) -> HttpError:
    """A fault of ours. The traceback goes to the log; the client learns the request id and nothing else."""
    log.error("internal error", exc_info=exception)
    return HttpError("INTERNAL_ERROR", "internal error; the log has the details under this request's id")


def timestamp(ago: float = 0.0) -> str:
    """The UTC time `ago` seconds before now, as `2025-12-25T12:00:00.000000`."""
    return (datetime.now(UTC) - timedelta(seconds=ago)).replace(tzinfo=None).isoformat(timespec="microseconds")


def error_body(error: HttpError) -> dict[str, Any]:
    """`{"error": true, "message", "code", "timestamp"}` and the error's `extra`."""
    return {"error": True, "message": error.message, "code": error.code, "timestamp": timestamp(), **error.extra}


# --------------------------------------------------------------------------------- pure: JSON and fields


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity, and 1e999, which parse_constant never sees
        raise ValueError("expected finite numbers")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"expected integers of at most {MAX_INTEGER_DIGITS} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("expected every name once in an object")
    return members


DECODER = json.JSONDecoder(parse_constant=_finite, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique)


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a body as a JSON object: strict RFC 8259, UTF-8 without a BOM, no repeated names, finite numbers, at
    most 64 levels. HttpError 400 says what is wrong."""
    try:
        value = DECODER.decode(body.decode("utf-8"))
        _refuse_depth(value)
    except UnicodeDecodeError:
        raise HttpError("INVALID_REQUEST", "expected a body in UTF-8") from None
    except RecursionError:
        raise HttpError("INVALID_REQUEST", f"expected JSON of at most {MAX_JSON_DEPTH} levels") from None
    except json.JSONDecodeError as error:
        raise HttpError("INVALID_REQUEST", f"expected a JSON object: {error.msg} at character {error.pos}") from None
    except ValueError as error:
        raise HttpError("INVALID_REQUEST", f"expected a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise HttpError("INVALID_REQUEST", f"expected a JSON object, got {describe(value)}")
    return value


def _refuse_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):  # each turn descends by one level
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    raise RecursionError


SHOWN = re.compile(r"[A-Za-z0-9._:+#/\-]{0,40}")  # ids and choices


def describe(value: Any) -> str:
    """Describe a value for a message: its JSON type and the value itself. Messages are logged, and a string that is not
    an id may be a prompt, so only the length of such a string is shown."""
    if value is None:
        return "null"
    if isinstance(value, list | dict):
        return ("an array" if isinstance(value, list) else "an object") + f" of {len(value)}"
    if isinstance(value, str) and not SHOWN.fullmatch(value):
        return f"a string of {len(value)} characters"
    kind = {bool: "boolean", int: "number", float: "number", str: "string"}.get(type(value))
    return f"the {kind} {json.dumps(value)}" if kind else f"a {type(value).__name__}"  # a TOML type


def printable(text: str) -> str:
    """Escape every character that could act on a terminal or forge a line: line ends, controls, overrides."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a request: its JSON type (`str`, `int`, `float`, `bool` or `list` of strings), range and default.
    The range counts the characters of a string and the items of a list. A string, or each item of a list, is one of
    the `choices` and matches the `pattern` as a whole. A list field also accepts one string alone."""

    kind: type
    low: float = 0
    high: float = math.inf
    default: Any = None
    required: bool = False
    choices: tuple[str, ...] = ()
    above_low: bool = False  # the range is open at its lower end
    pattern: str = ""

    def expected(self) -> str:
        """The expectation in words: "an integer from 1 to 2048"."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        if self.pattern:
            return f"{'strings' if self.kind is list else 'a string'} of the form {self.pattern}"
        if self.kind is list:
            return f"a string, or an array of {self.low:g} to {self.high:g} non-empty strings"
        noun = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[self.kind]
        if self.high == math.inf:
            return "a non-empty string" if self.kind is str and self.low == 1 else noun
        unit = " characters" if self.kind is str else ""
        return f"{noun} {'above' if self.above_low else 'from'} {self.low:g} to {self.high:g}{unit}"

    def accepts(self, value: Any) -> bool:
        kinds = (int, float) if self.kind is float else self.kind
        if not isinstance(value, kinds) or isinstance(value, bool) != (self.kind is bool):
            return False
        size: Any = len(value) if isinstance(value, str | list) else value
        inside = self.low < size if self.above_low else self.low <= size
        texts = value if isinstance(value, list) else [value] if isinstance(value, str) else []
        return bool(inside and size <= self.high and all(map(self._allows, texts)))

    def _allows(self, text: Any) -> bool:
        """Whether the field accepts this string or list item."""
        if not isinstance(text, str) or (self.choices and text not in self.choices):
            return False
        return bool(re.fullmatch(self.pattern, text)) if self.pattern else self.kind is str or text != ""


def read_fields(members: Mapping[str, Any], fields: Mapping[str, Field]) -> dict[str, Any]:
    """The checked fields of a request with defaults filled in; unknown members are ignored. HttpError 400 names the
    field, what was expected and what came."""
    values: dict[str, Any] = {}
    for name, rule in fields.items():
        if name not in members:
            if rule.required:
                raise HttpError("INVALID_REQUEST", f"{name}: expected {rule.expected()}, got nothing")
            values[name] = rule.default
            continue
        value = members[name]
        if rule.kind is list and isinstance(value, str):
            value = [value]
        if not rule.accepts(value):
            raise HttpError("INVALID_REQUEST", f"{name}: expected {rule.expected()}, got {describe(members[name])}")
        try:
            "".join(value if isinstance(value, list) else [value if isinstance(value, str) else ""]).encode()
        except UnicodeEncodeError:
            raise HttpError("INVALID_REQUEST", f"{name}: expected Unicode text, got a lone surrogate") from None
        values[name] = float(value) if rule.kind is float else value
    return values


def read_objects(
    value: Any, name: str, low: int, high: int, fields: Mapping[str, Field], of: str = "objects"
) -> list[dict[str, Any]]:
    """The checked members of each object in an array. HttpError 400 names the array, the index and the field."""
    if not isinstance(value, list) or not low <= len(value) <= high:
        message = f"{name}: expected an array of {low} to {high} {of}, got {describe(value)}"
        raise HttpError("INVALID_REQUEST", message)
    entries = []
    for number, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise HttpError("INVALID_REQUEST", f"{name}[{number}]: expected an object, got {describe(entry)}")
        try:
            entries.append(read_fields(entry, fields))
        except HttpError as error:
            raise HttpError("INVALID_REQUEST", f"{name}[{number}].{error.message}") from None
    return entries


# -------------------------------------------------------------------------------- requests and responses


@dataclass(frozen=True, slots=True)
class Head:
    """A parsed request head. `path` is decoded once, for routing and authentication alike. `length` is the body's in
    bytes, None without a Content-Length. `host` is the name in the Host header, "" in HTTP/1.0 without that header.
    `authority` is the name in a target of absolute form."""

    method: str
    path: str
    version: str
    headers: dict[str, str]
    host: str
    authority: str
    length: int | None
    chunked: bool
    request_id: str
    keep_alive: bool

    @property
    def has_body(self) -> bool:
        return self.chunked or bool(self.length)

    @property
    def expects(self) -> bool:
        """Whether the client waits for a 100 before it sends the body (RFC 9110 section 10.1.1; never in HTTP/1.0)."""
        return self.has_body and self.version == "HTTP/1.1" and "expect" in self.headers

    @property
    def is_preflight(self) -> bool:
        """Whether this is a browser's CORS preflight, which never carries the key."""
        return self.method == "OPTIONS" and {"origin", "access-control-request-method"} <= self.headers.keys()


@dataclass(slots=True)
class Response:
    """A handler's result: a `body` for JSON, or `events`, an async generator of values that `render` turns into blocks
    of whole SSE events. `kind` is the media type of a `body` of bytes, which is sent unchanged. `headers` are read
    after the first block of `events` has arrived."""

    body: Any = None
    status: int = 200
    events: AsyncIterator[Any] | None = None
    render: Callable[[Any], bytes] = bytes
    headers: Headers = ()
    kind: str = "application/json"


def sse_event(data: Mapping[str, Any]) -> bytes:
    """One SSE event with one JSON object. ASCII only: simple clients decode each network read by itself and would lose
    a character that is cut in two."""
    return sse_block(json.dumps(data).encode("ascii"))


def sse_block(line: bytes) -> bytes:
    """One SSE event with one line of data."""
    return b"data: %b\n\n" % line


def error_event(error: HttpError) -> bytes:
    """`data: {"error": true, "message", "code"}` and the error's `extra`."""
    return sse_event({"error": True, "message": error.message, "code": error.code, **error.extra})


def compact(data: Any) -> bytes:
    """JSON in one line without spaces. The plugin llama.vim looks for `"content":"` and drops everything else."""
    return json.dumps(data, separators=(",", ":")).encode("ascii")


SSE_COMMENT = b": keep-alive\n\n"  # not ": ping", which ends the stream in the editor plugin Continue


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a handler gets it. `parameter` is the last path segment of a route that ends in `{id}`, `address`
    the client's address. `end(error)` cancels the handler from outside and answers with the error instead. `notes` are
    added to the request's log line as `name=value`. `answered` is the count kept by `Server`."""

    head: Head
    body: bytes
    parameter: str = ""
    address: str = ""
    end: Callable[[HttpError], None] = lambda _: None
    notes: dict[str, Any] = field(default_factory=dict)
    answered: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return parse_json(self.body)


@dataclass(frozen=True, slots=True)
class Route:
    """One line of a daemon's API table."""

    method: str
    path: str
    handler: Callable[[Any, Request], Awaitable[Response]]
    open: bool = False  # needs no key, and is answered even over the connection limit
    quiet: bool = False  # successes are logged at DEBUG: clients poll this route every few seconds
    # Takes a JSON body, which other routes drop. The handler may run long: it is cancelled when its client leaves.
    json: bool = False
    # Writes errors in the form of another API; the JSON body may then have any Content-Type.
    foreign_error: Callable[[HttpError], Mapping[str, Any]] | None = None


# ------------------------------------------------------------------------------------------------ models

FIM_LAYOUTS = ("psm", "spm", "spmv2")  # see `arrange_gap`


@dataclass(frozen=True, slots=True)
class Model:
    """One entry of models.toml. An empty `sha256` is not checked; `fetch` downloads the file from `sources`.
    `aliases` are the model's names in other engines. `fim` holds its marks before the prefix, before the suffix and
    before the gap, or is empty; `fim_layout` is their order, see `arrange_gap`. A model that only other engines have
    needs no `file`. `size` is in bytes. A `size` or `memory_mb` of 0 is unknown."""

    id: str
    name: str
    languages: tuple[str, ...]
    parameters: str
    quantization: str
    file: str = ""
    sha256: str = ""
    size: int = 0
    memory_mb: int = 0
    sources: tuple[dict[str, Any], ...] = ()
    aliases: tuple[str, ...] = ()
    fim: tuple[str, ...] = ()
    fim_layout: str = "psm"


def served_languages(models: Iterable[Model]) -> list[str]:
    """The languages that the models list, each once, in the order of models.toml."""
    return list(dict.fromkeys(language for model in models for language in model.languages))
