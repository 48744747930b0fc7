"""The Pi's API as an OpenAPI 3.1 document, made of the tables that check its requests and of the code that answers.

In: cm4d's routes, dialects, fields and models. Out: the document as one JSON value:

    >>> from cerebrum_common import Field
    >>> schema_of(Field(int, 1, 2048, 512))
    {'type': 'integer', 'minimum': 1, 'maximum': 2048, 'default': 512}
    >>> like({"id": "a", "created": 1})["properties"]
    {'id': {'type': 'string'}, 'created': {'type': 'integer'}}

Strategy
- A request's schema comes from the `Field` tables. Members that a function checks have theirs here (`MEMBERS`), made of
  that function's own limits.
- A dialect's response is described by an example that the dialect itself writes. Only our own API's responses, which
  handlers of cm4d write, have their examples here; a test holds them against real responses.
- Which errors a route can end with follows from what kind of route it is.

OpenAPI 3.1 leaves open what a stream's schema describes. Here it is one event, as in the `itemSchema` of 3.2.
Pure: no socket, no clock, no state. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from cerebrum_common import (
    MAX_INTEGER_DIGITS,
    MAX_JSON_DEPTH,
    STATUSES,
    VERSION,
    Field,
    HttpError,
    Model,
    Route,
    error_body,
    served_languages,
    sse_event,
)
from cerebrum_dialects import (
    APIS,
    COMPLETION,
    DIALECTS,
    EXTRA,
    INFILL,
    INFILL_FIELDS,
    LLAMA_FIELDS,
    MAX_EXTRAS,
    MAX_MESSAGES,
    MAX_STOPS,
    MESSAGE,
    OPENAI_CHAT,
    OPENAI_FIELDS,
    OPENAI_TEXT,
    PART,
    SPECIAL,
    STREAM_OPTIONS,
    TEXT_FIELDS,
    TOKENIZE,
    Dialect,
    write_model,
    write_props,
)

DESCRIPTION = (
    "Code completion at home. Beside Cerebrum's own API, the Pi speaks OpenAI's and llama-server's, so that an editor"
    " works by entering its address. Unknown members of a request are ignored. Paths of other people's APIs read their"
    " JSON under any Content-Type and take a member that is null for absent. JSON is read strictly: UTF-8 without lone"
    " surrogates, each name once in an object, integers without a fraction and of at most"
    f" {MAX_INTEGER_DIGITS} digits, and at most {MAX_JSON_DEPTH} levels. The schema of a stream describes one event."
    " An error after the beginning of a stream is an event, behind which the connection is cut. An unknown path gets"
    " 404 NOT_FOUND, another method 405 METHOD_NOT_ALLOWED. HEAD is answered like GET without a body, OPTIONS with 204."
)

Schema = dict[str, Any]

# ---------------------------------------------------------------------------------------------- schemas

TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}
NULL: Schema = {"type": "null"}
STRING: Schema = {"type": "string"}


class Given(dict[str, Any]):
    """A schema in the place of a value in an example."""


class Optional(Given):
    """The same for a member that may be missing."""


def schema_of(field: Field, nullable: bool = False) -> Schema:
    """What `field` accepts. With `nullable` null too, which then counts as absent."""
    if field.kind is list:
        item = {"type": "string", "minLength": 1}
        several = {"type": "array", "items": item, "minItems": field.low, "maxItems": field.high}
        return {"anyOf": [item, several] + [NULL] * nullable}
    schema: Schema = {"type": [TYPES[field.kind], "null"] if nullable else TYPES[field.kind]}
    if field.choices:
        schema["enum"] = [*field.choices, *[None] * nullable]
    elif field.kind is str:
        schema |= {"minLength": field.low} if field.low else {}
        schema |= {"maxLength": field.high} if field.high != math.inf else {}
    elif field.kind is not bool:
        least = field.low if field.low != -math.inf else 1 - 10 ** (MAX_INTEGER_DIGITS - 1)  # the sign counts
        schema["exclusiveMinimum" if field.above_low else "minimum"] = least
        schema["maximum"] = field.high if field.high != math.inf else 10**MAX_INTEGER_DIGITS - 1
    if field.default is not None:
        schema["default"] = field.default
    return schema


def object_of(fields: Mapping[str, Field], nullable: bool = False, **more: Schema) -> Schema:
    """An object with the members of a table, and `more` beside them. A required member is never null."""
    required = [name for name, field in fields.items() if field.required]
    properties = {name: schema_of(field, nullable and not field.required) for name, field in fields.items()}
    return {"type": "object", "properties": properties | more} | ({"required": required} if required else {})


def like(example: Any, required: bool = True) -> Schema:
    """A value of the same form as the example. All members of its objects are `required`, or none."""
    if isinstance(example, Given):
        return dict(example)
    if isinstance(example, Mapping):
        properties = {name: like(value, required) for name, value in example.items()}
        if isinstance(example.get("object"), str):
            properties["object"] = {"const": example["object"]}
        names = [name for name, value in example.items() if not isinstance(value, Optional)]
        return {"type": "object", "properties": properties} | ({"required": names} if required and names else {})
    if isinstance(example, list | tuple):
        return {"type": "array", **({"items": like(example[0], required)} if example else {})}
    return NULL if example is None else {"type": TYPES[type(example)]}


def any_of(schemas: Sequence[Schema]) -> Schema:
    """One of these, each of which is listed once."""
    different = [schema for at, schema in enumerate(schemas) if schema not in schemas[:at]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


# --------------------------------------------------------------------------------------------- requests


def array_of(entries: Schema, low: int, high: int) -> Schema:
    return {"type": "array", "items": entries, "minItems": low, "maxItems": high}


def or_null(*schemas: Schema) -> Schema:
    return {"anyOf": [*schemas, NULL]}


# What a function of cerebrum_dialects.py checks: `read_prompt`, `read_stops`, and so on.
STOPS = {
    "type": "array",
    "items": STRING,
    "contains": {"not": {"pattern": f"^(?:{SPECIAL.pattern})?$"}},
    "minContains": 0,
    "maxContains": MAX_STOPS,
    "description": f"At most {MAX_STOPS}. Empty strings and names of special tokens do not count.",
}
CONTENT = or_null(STRING, array_of(object_of(PART, nullable=True), 0, MAX_MESSAGES))
MEMBERS: dict[str, Schema] = {
    "prompt": or_null(STRING, array_of(STRING, 1, 1)),
    "stop": or_null(STRING, STOPS),
    "stream_options": object_of(STREAM_OPTIONS, nullable=True) | {"type": ["object", "null"]},
    "messages": array_of(object_of(MESSAGE, content=CONTENT, tool_calls={"enum": [[], None]}), 1, MAX_MESSAGES),
    "input_extra": or_null(array_of(object_of(EXTRA, nullable=True), 0, MAX_EXTRAS)),
    "response_fields": or_null({"type": "array", "items": STRING}),
}


def without(tools: str, choice: str) -> Schema:
    """No tools, or none that may be called; see `read_chat`."""
    nothing: Schema = {"properties": {tools: {"enum": [[], None]}}}
    return {"anyOf": [nothing, {"properties": {choice: {"const": "none"}}, "required": [choice]}]}


NO_TOOLS = {"allOf": [without("tools", "tool_choice"), without("functions", "function_call")]}

# Each dialect's table, the members that functions check, what else it requires, and an example.
REQUESTS: dict[Dialect, tuple[Mapping[str, Field], Sequence[str], Schema, dict[str, Any]]] = {
    OPENAI_TEXT: (
        TEXT_FIELDS,
        ("prompt", "stop", "stream_options"),
        {},
        {"prompt": "def add(a, b):\n    return ", "max_tokens": 64, "stop": ["\n\n"]},
    ),
    OPENAI_CHAT: (
        OPENAI_FIELDS,
        ("messages", "stop", "stream_options"),
        {"required": ["messages"], **NO_TOOLS},
        {"messages": [{"role": "user", "content": "Write a function that adds two numbers."}], "max_tokens": 64},
    ),
    COMPLETION: (
        LLAMA_FIELDS,
        ("prompt", "stop", "response_fields"),
        {},
        {"prompt": "def add(a, b):\n    return ", "n_predict": 64, "stop": ["\n\n"]},
    ),
    INFILL: (
        INFILL_FIELDS,
        ("prompt", "stop", "response_fields", "input_extra"),
        {},
        {"input_prefix": "def add(a, b):\n", "prompt": "    return ", "input_suffix": "\n", "stop": ["\n\n"]},
    ),
}


def dialect_request(dialect: Dialect) -> Schema:
    fields, names, more, _ = REQUESTS[dialect]
    return object_of(fields, nullable=True, **{name: MEMBERS[name] for name in names}) | more


def native_request(fields: Mapping[str, Field], models: Sequence[Model]) -> Schema:
    """A completion of our own API. The three forms say which members go together, as `detect_mode` checks it."""
    schema = object_of({**fields, "prompt": replace(fields["prompt"], low=0)})
    schema["properties"]["language"] = {"enum": served_languages(models)}
    schema["properties"]["model"] = {"enum": [model.id for model in models]}
    some, blank = {"minLength": 1}, {"maxLength": 0}
    nothing: Schema = {"not": {}}

    def form(modes: Sequence[str], *required: str, **properties: Schema) -> Schema:
        return {"properties": {"mode": {"enum": modes}, **properties}, "required": list(required)}

    both = [
        form(("auto", "infill"), prompt=some),
        form(("auto", "infill"), suffix={"pattern": r"\S"}),
        form(("infill",), "mode", suffix=some),
    ]
    schema["anyOf"] = [
        form(("auto", "complete", "instruct"), prompt=some, suffix=blank, instruction=nothing),
        form(("auto", "infill"), "suffix", instruction=nothing) | {"anyOf": both},
        form(("auto", "instruct"), "instruction", suffix=blank),
    ]
    return schema


# -------------------------------------------------------------------------------------------- responses

RESULT = {"finish_reason": "stop", "total_tokens": 4, "prompt_tokens": 16, "inference_time": 0.25, "ttft": 0.1}
TIME = "2025-12-25T12:00:00.000000"


def native_result(model: str) -> dict[str, Any]:
    kept = like({"characters": 8120, "of": 102400, "parts": ["imports", "latest"]})
    return {
        "language": "python",
        "model": model,
        "total_tokens": 4,
        "inference_time": 0.25,
        "timestamp": TIME,
        "mode": Given(enum=["complete", "infill", "instruct"]),
        "finish_reason": Optional(type="string"),
        "prompt_tokens": Optional(type="integer", minimum=0),
        "backend": Optional(type="string", description="Who has answered, if there are several."),
        "kept": Optional(**kept, description="How much of the text was sent to the model, and which parts."),
    }


def native_events(model: str) -> list[Schema]:
    progress = {"stage": "prefill", "done": 512, "total": 2048}
    events = (
        {"token": "a", "total_tokens": 1},
        {"progress": Given(like(progress, required=False))},
        {"done": Given(const=True), **native_result(model)},
        {"error": Given(const=True), "message": "why", "code": Given(enum=list(STATUSES))},
    )
    return [like(event) for event in events]


def listed(models: Sequence[Model]) -> dict[str, Any]:
    entry = {"id": "m", "name": "M", "languages": ["python"], "parameters": "7B", "quantization": "Q4"}
    told = {"loaded": Optional(type="boolean"), "encoding": Optional(type="string")}
    sizes = {"n_ctx": Optional(type="integer"), "memory_mb": Optional(type="number")}
    ids = {"type": "array", "items": STRING}
    return {
        "models": [{**entry, "available": True, "backends": ["vps"], **told, **sizes}],
        "vps_available": True,
        "languages": [{"id": "python", "endings": [".py"], "filenames": ["a"], "served": True}],
        "prefer": Given(type="object", additionalProperties=ids),
        "object": "list",
        "data": [write_model(models[0].id, 1)],
    }


STATE = {"id": "vps", "available": True, "message": ""}
BREAKER = {"state": Given(enum=["closed", "open", "half-open"]), "failures": 0, "opens": 0, "retry_in_s": 0.5}
BACKEND: dict[str, Any] = {
    **STATE,
    "api": Given(enum=["cerebrum", *APIS]),
    "response_time_ms": Given(type=["number", "null"]),
    "requests_total": 1,
    "requests_active": 0,
    "requests_failed": 0,
    "max_concurrent": 2,
    "tokens_total": 64,
    "models": ["m"],
    "models_loaded": ["m"],
    "breaker": BREAKER,
}
STATS: dict[str, Any] = {
    "uptime": 1.5,
    "requests_total": 1,
    "requests_active": 0,
    "vps_available": True,
    "vps_response_time_ms": Given(type=["number", "null"]),
    "memory_mb": 25.5,
    "load_avg": [0.5, 0.5, 0.5],
    "breaker": BREAKER,
    "backends": [BACKEND],
    "type_through": 0,
    "shared": 0,
    "replaced": 0,
}

# The responses of GETs, by the last part of their paths.
ANSWERS: dict[str, Callable[[Sequence[Model]], dict[str, Any]]] = {
    "health": lambda _: {
        "status": Given(const="healthy"),
        "timestamp": TIME,
        "vps_available": True,
        "uptime": 1.5,
        "backends": [STATE],
    },
    "models": listed,
    "{id}": lambda models: write_model(models[0].id, 1),
    "props": lambda models: write_props(models[0].id, 4096, 2),
    "tokenize": lambda _: {"tokens": [1]},
    "complete": lambda models: {"completion": "a + b", **native_result(models[0].id)},
    "openapi.json": lambda _: {"openapi": Given(const="3.1.0"), "info": Given(type="object")},
    "stats": lambda _: STATS,
    "activity": lambda _: {
        "timestamp": TIME,
        **STATS,
        "vps_message": "",
        "models_loaded": ["m"],
        "notes": ["why"],
        "step_s": 30,
        "requests": [1],
        "failed": [0],
        "tokens": [64],
    },
}


def stream_of(events: Sequence[Schema], last: str = "") -> dict[str, Any]:
    """Events with one of these JSON values as their data, and perhaps a last event with another text."""
    data: Schema = {"contentMediaType": "application/json", "contentSchema": any_of(events)}
    data = {"anyOf": [data, {"const": last}]} if last else data
    event = {"type": "object", "properties": {"data": {"type": "string", **data}}, "required": ["data"]}
    return {"text/event-stream": {"schema": event}}


def dialect_content(dialect: Dialect, model: str, foreign_error: Schema) -> dict[str, Any]:
    """What a dialect answers: in one piece, or as events if the client asks for `stream`."""
    _, names, _, example = REQUESTS[dialect]
    usage = {"stream_options": {"include_usage": True}} if "stream_options" in names else {}
    reply = dialect.reply(dialect.read(example | usage), "id", 1, {"model": model, "n_ctx": 4096, "kept": {}})
    stream = reply.begin() + reply.text(sse_event({"token": "a", "total_tokens": 1})) + reply.end(RESULT)
    data = [event[6:].decode() for event in stream.split(b"\n\n")[:-1]]
    last = "" if data[-1].startswith("{") else data.pop()
    full = "response_fields" not in names
    events = [like(json.loads(text), required=full) for text in data]
    whole = like(json.loads(reply.whole("a + b", RESULT)), required=full)
    return {"application/json": {"schema": whole}, **stream_of([*events, foreign_error], last)}


# ----------------------------------------------------------------------------------------------- errors

# Before the route is known, so always in our own form.
OF_ANY_HEAD = frozenset(
    {"INVALID_REQUEST", "TIMEOUT", "URI_TOO_LONG", "HEADERS_TOO_LARGE", "NOT_IMPLEMENTED", "OVERLOADED"}
    | {"VERSION_NOT_SUPPORTED"}
)
OF_ANY_ROUTE = frozenset(
    {"INVALID_REQUEST", "TIMEOUT", "FORBIDDEN", "PAYLOAD_TOO_LARGE", "UNSUPPORTED_MEDIA_TYPE", "EXPECTATION_FAILED"}
    | {"HEADERS_TOO_LARGE", "MISDIRECTED_REQUEST", "OVERLOADED", "INTERNAL_ERROR"}
)


def codes_of(route: Route, passed_on: Collection[str], keyed: bool) -> set[str]:
    """The codes of all errors with which a request of this route can end, once the route is known."""
    codes = set(OF_ANY_ROUTE)
    codes |= {"UNAUTHORIZED"} if keyed and not route.open else set()
    codes |= {"LENGTH_REQUIRED"} if route.json else set()
    codes |= {*passed_on, "RATE_LIMIT", "VPS_UNAVAILABLE"} if route.watched else set()  # these ask the VPS
    codes |= {"MODEL_NOT_FOUND"} if route.path.endswith("{id}") else set()
    codes |= {"VPS_UNAVAILABLE"} if route.path == "/health" else set()
    codes |= {"NOT_FOUND"} if route.path == "/" else set()
    return codes


def error_responses(route: Route, passed_on: Collection[str], keyed: bool) -> dict[str, tuple[str, Schema]]:
    """For each status the name and the value of its response."""
    shape = "ForeignError" if route.foreign_error else "Error"
    ways = [(code, shape) for code in codes_of(route, passed_on, keyed)] + [(code, "Error") for code in OF_ANY_HEAD]
    responses = {}
    for status in sorted({STATUSES[code] for code, _ in ways}):
        here = [way for way in ways if STATUSES[way[0]] == status]
        codes, shapes = sorted({code for code, _ in here}), sorted({shape for _, shape in here})
        headers = {"X-Request-ID": ref("headers", "X-Request-ID")}
        headers |= {"WWW-Authenticate": {"schema": STRING}} if status == 401 else {}
        schema = any_of([ref("schemas", shape) for shape in shapes])
        response = {
            "description": ", ".join(codes),
            "headers": headers,
            "content": {"application/json": {"schema": schema}},
        }
        responses[str(status)] = (".".join([*shapes, *codes]), response)
    return responses


# --------------------------------------------------------------------------------------------- document


def describe_operation(doc: str | None) -> dict[str, str]:
    """A handler's docstring, `GET /path: what it does. And more.`, as a summary and a description."""
    text = " ".join((doc or "").partition(": ")[2].replace("`", "").split())
    text = text[:1].upper() + text[1:]
    summary = text.partition(". ")[0].removesuffix(".")
    return {"summary": summary} | ({"description": text} if len(text) > len(summary) + 1 else {})


def write_openapi(
    routes: Sequence[Route],
    fields: Mapping[str, Field],
    models: Sequence[Model],
    passed_on: Collection[str],
    keyed: bool,
) -> dict[str, Any]:
    """The document. `passed_on` are the backends' codes that clients get to see; `keyed`: clients need a key."""
    speaking = {path: dialect for dialect in DIALECTS for path in dialect.paths}
    foreign = next(route.foreign_error for route in routes if route.foreign_error)
    sample = HttpError("INVALID_REQUEST", "why")
    extra = {"prompt_tokens": Optional(type="integer"), "n_ctx": Optional(type="integer")}
    health = {"status": Optional(type="string"), "vps_available": Optional(type="boolean")}
    health["backends"] = Optional(**like([STATE]))
    code = {"code": Given(enum=list(STATUSES))}
    schemas = {
        "Error": like({**error_body(sample), **code, **extra, **health, "uptime": Optional(type="number")}),
        "ForeignError": like({"error": {**foreign(sample)["error"], **code}}),
        "Completion": native_request(fields, models),
    }
    paths: dict[str, dict[str, Any]] = {}
    responses: dict[str, Schema] = {}  # those of several paths are equal
    for route in routes:
        dialect = speaking.get(route.path)
        named = {"200": success(route, dialect, models), **error_responses(route, passed_on, keyed)}
        responses |= dict(named.values())
        operation: dict[str, Any] = {
            "operationId": re.sub(r"\W+", "_", f"{route.method}{route.path}").strip("_").lower(),
            **describe_operation((dialect.read if dialect else route.handler).__doc__),
            "parameters": [ref("parameters", "X-Request-ID")],
            "responses": {status: ref("responses", name) for status, (name, _) in named.items()},
        }
        if route.open:
            operation["security"] = []
        if "{id}" in route.path:
            operation["parameters"] = [ref("parameters", "id"), *operation["parameters"]]
        if route.json:
            operation["requestBody"] = {"required": True, "content": {"application/json": body_of(route, dialect)}}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    for dialect in DIALECTS:
        schemas[name_of(dialect)] = dialect_request(dialect)
    model_id = {"type": "string", "pattern": r"^[^/\x00-\x1f\x7f]+$"}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Cerebrum",
            "version": VERSION,
            "description": DESCRIPTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/"}],
        "security": [{"X-API-Key": []}, {"Bearer": []}] if keyed else [],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": responses,
            "parameters": {
                "id": {"name": "id", "in": "path", "required": True, "schema": model_id, "example": models[0].id},
                "X-Request-ID": {
                    "name": "X-Request-ID",
                    "in": "header",
                    "description": "Taken over into the response and the logs if it has the form of one.",
                    "schema": STRING,
                },
            },
            "headers": {"X-Request-ID": {"required": True, "schema": STRING}},
            "securitySchemes": {
                "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
                "Bearer": {"type": "http", "scheme": "bearer"},
            },
        },
    }


def name_of(dialect: Dialect) -> str:
    """A name for its schemas: `read_chat` gives "DialectChat"."""
    return "Dialect" + dialect.read.__name__.removeprefix("read_").title()


def body_of(route: Route, dialect: Dialect | None) -> dict[str, Any]:
    if dialect:
        return {"schema": ref("schemas", name_of(dialect)), "example": REQUESTS[dialect][3]}
    if route.any_type:
        return {"schema": object_of(TOKENIZE, nullable=True), "example": {"content": "a + b"}}
    return {"schema": ref("schemas", "Completion"), "example": {"prompt": "def add(a, b):", "language": "python"}}


def success(route: Route, dialect: Dialect | None, models: Sequence[Model]) -> tuple[str, Schema]:
    """The name and the value of the response with status 200."""
    headers = {"X-Request-ID": ref("headers", "X-Request-ID")}
    last = route.path.rpartition("/")[2]
    if dialect:
        kept = {"description": "What was sent to the model, if that is not all.", "schema": STRING}
        headers["X-Cerebrum-Kept"] = kept
        content = dialect_content(dialect, models[0].id, ref("schemas", "ForeignError"))
    elif last == "stream":
        content = stream_of(native_events(models[0].id))
    elif not last:
        last, content = "page", {"text/html": {"schema": STRING}}
    elif last == "metrics":
        content = {"text/plain": {"schema": STRING}}
    else:
        content = {"application/json": {"schema": like(ANSWERS[last](models))}}
    name = name_of(dialect) if dialect else re.sub(r"\W", "", last)
    return name, {"description": "OK", "headers": headers, "content": content}
