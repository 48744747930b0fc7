"""The Pi's API as an OpenAPI 3.1 document, made from the tables that check requests: what the tests
of requests and responses validate against, and what schemathesis makes its requests from.

A request's schema comes from the `Field` tables, and allows some requests that the Pi refuses, such
as one with a `suffix` and an `instruction`. A response's schema comes from an example, with the
members that a client may rely on. OpenAPI 3.1 does not define the schema of a stream; here it
describes one event, like the `itemSchema` of 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from harness import SHIPPED

import cerebrum_common as common
from cerebrum.fields import Field
from cerebrum.pi import dialects
from cerebrum.pi.counting import ACCEPTED
from cerebrum_common import HttpError, Route
from cm4d import FIELDS, ROUTES

Schema = dict[str, Any]
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
STRING = {"type": "string"}


def schema_of(field: Field, nullable: bool = False) -> Schema:
    """The schema of `field`. With `nullable`, null is accepted too and counts as absent."""
    null = ["null"] * nullable
    if field.json_type is list:
        texts = {"type": ["string", "array", *null], "minLength": 1}
        texts |= {"items": STRING | {"minLength": 1}}
        return texts | {"minItems": field.low, "maxItems": field.high}
    kind = TYPES[field.json_type]
    schema = {"type": [kind, "null"] if nullable else kind}
    if field.choices:
        schema["enum"] = [*field.choices, *[None] * nullable]
    elif field.json_type is not bool:
        schema |= limits_of(field)
    if field.default:
        schema["default"] = field.default
    return schema


def limits_of(field: Field) -> Schema:
    low, high = ("minLength", "maxLength") if field.json_type is str else ("minimum", "maximum")
    limits = {"exclusiveMinimum" if field.above_low else low: field.low, high: field.high}
    return {name: limit for name, limit in limits.items() if math.isfinite(limit)}


def object_of(fields: Mapping[str, Field], nullable: bool = False, **more: Schema) -> Schema:
    """An object with the members of a table, and `more` beside them."""
    properties = {name: schema_of(field, nullable) for name, field in fields.items()} | more
    required = [name for name, field in fields.items() if field.required]
    return {"type": "object", "properties": properties, "required": required}


def like(example: Any) -> Schema:
    """The schema of a value like the example; None is like any. A member whose name ends with "?"
    may be missing.
    """
    if example is None:
        return {}
    if isinstance(example, list):
        return {"type": "array", "items": like(example[0])}
    if not isinstance(example, Mapping):
        return {"type": TYPES[type(example)]}
    properties = {name.rstrip("?"): like(value) for name, value in example.items()}
    required = [name for name in example if not name.endswith("?")]
    return {"type": "object", "properties": properties, "required": required}


# Members of the dialects' requests that no `Field` checks.
TEXTS = {"type": ["string", "array", "null"], "items": STRING}
PROMPT = {"prompt": TEXTS | {"maxItems": 1}, "stop": TEXTS}
LLAMA = PROMPT | {"response_fields": TEXTS}
EXTRA = {
    "type": ["array", "null"],
    "items": object_of(dialects.EXTRA, True),
    "maxItems": dialects.MAX_EXTRAS,
}
USAGE = object_of(dialects.STREAM_OPTIONS, True) | {"type": ["object", "null"]}
SAID = object_of(dialects.MESSAGE, content=TEXTS | {"items": object_of(dialects.PART, True)})
MESSAGES = {"type": "array", "items": SAID, "minItems": 1, "maxItems": dialects.MAX_MESSAGES}
CHAT = object_of(dialects.CHAT_FIELDS, True, messages=MESSAGES, stop=TEXTS, stream_options=USAGE)
REQUESTS = {
    dialects.OPENAI_TEXT: object_of(dialects.TEXT_FIELDS, True, **PROMPT, stream_options=USAGE),
    dialects.OPENAI_CHAT: CHAT | {"required": ["messages"]},
    dialects.COMPLETION: object_of(dialects.TEXT_FIELDS, True, **LLAMA),
    dialects.INFILL: object_of(dialects.INFILL_FIELDS, True, **LLAMA, input_extra=EXTRA),
}

RESULT = {
    "language": "python",
    "model": "qwen_7b",
    "total_tokens": 4,
    "inference_time": 0.25,
    "timestamp": "",
    "mode": "complete",
    "finish_reason?": "stop",
    "prompt_tokens?": 16,
    "ttft?": 0.1,
    "backend?": "vps",
    "confidence?": 0.8,
    "text_confidence?": 0.8,
    "chance?": 0.8,
    "kept?": {"characters": 8120, "of": 102400, "parts": ["latest"]},
}
EVENTS = (
    {"token": "a", "total_tokens": 1},
    {"progress": {"stage": "load", "done": 1, "total": 2}},
    {"done": True, **RESULT},
    {"error": True, "message": "why", "code": "VPS_UNAVAILABLE"},
)
EVENT = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": {"anyOf": [*map(like, EVENTS)]},
}
STATE = {"id": "vps", "available": True, "message": ""}
USED = {"completions": 1, "tokens": 64, "seconds": 1.5, "accepted": 1, "shown": 100, "kept": 61}
CLIENT = {"name": "anna", **USED, "today": USED, "month": USED}
STATS = {
    "uptime": 1.5,
    "requests_total": 1,
    "requests_active": 0,
    "vps_available": True,
    "vps_response_time_ms": None,
    "memory_mb": 25.5,
    "load_avg": [0.5],
    "backends": [STATE],
    "unnamed": CLIENT,
    "clients": [CLIENT],
}
LISTED = {
    "id": "qwen_7b",
    "name": "Qwen 7B",
    "languages": ["python"],
    "parameters": "7B",
    "quantization": "Q4",
    "available": True,
    "backends": ["vps"],
    "loaded?": True,
    "n_ctx?": 4096,
}
MODEL = dialects.write_model("qwen_7b", 1)
ANSWERS = {  # by the last part of a path
    "health": {
        "status": "healthy",
        "timestamp": "",
        "vps_available": True,
        "uptime": 1.5,
        "backends": [STATE],
    },
    "complete": {"completion": "a + b", **RESULT},
    "models": {
        "models": [LISTED],
        "vps_available": True,
        "languages": [{"id": "python"}],
        "data": [MODEL],
    },
    "{id}": MODEL,
    "stats": STATS,
    "activity": {
        **STATS,
        "timestamp": "",
        "client": "",
        "extension": "",
        "step_s": 30,
        "requests": [1],
        "failed": [0],
        "tokens": [64],
    },
    "props": dialects.write_props("qwen_7b", 4096, 2),
    "tokenize": {"tokens": [1]},
    "accepted": {"accepted": 1, "accepted_characters": 12},
}
TEXT_FILES = {
    "/": "text/html",
    "/cerebrum_lsp.py": "text/x-python",
    "/cerebrum.vsix": "application/vsix",
    "/metrics": "text/plain",
}
KEYS = {
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"},
}


def content_of(route: Route) -> Schema:
    """The content of a route's response with status 200."""
    last = route.path.rpartition("/")[2]
    if route.path in TEXT_FILES:
        return {TEXT_FILES[route.path]: {"schema": STRING}}
    whole = {"application/json": {"schema": like(ANSWERS.get(last, {}))}}
    if last in ANSWERS:
        return whole
    properties = {"data": EVENT if last == "stream" else STRING}
    stream = {"text/event-stream": {"schema": {"type": "object", "properties": properties}}}
    return stream if last == "stream" else stream | whole


NATIVE = object_of(
    FIELDS,
    language=STRING | {"examples": common.served_languages(SHIPPED)},
    model={"enum": [model.id for model in SHIPPED]},
)
BODIES = {
    "/v1/accepted": object_of(ACCEPTED, True),
    "/tokenize": object_of(dialects.TOKENIZE, True),
}
for dialect, schema in REQUESTS.items():
    BODIES |= dict.fromkeys(dialect.paths, schema)
OUR_ERROR = like(common.error_body(HttpError("NOT_FOUND", "")))
FOREIGN_ERROR = like(dialects.write_error(HttpError("NOT_FOUND", "")))


def operation_of(route: Route) -> Schema:
    # An error has our own form also before the route is known.
    error = {"anyOf": [FOREIGN_ERROR, OUR_ERROR]} if route.foreign_error else OUR_ERROR
    failed = {
        "description": "An error",
        "content": {"application/json": {"schema": error}},
    }
    answered = {"description": "OK", "content": content_of(route)}
    operation = Schema(responses={"200": answered, "default": failed})
    if route.open:
        operation["security"] = []
    if "{id}" in route.path:
        place = {"name": "id", "in": "path", "required": True, "schema": STRING}
        operation["parameters"] = [place]
    if route.json:
        content = {"application/json": {"schema": BODIES.get(route.path, NATIVE)}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def write_openapi() -> Schema:
    """The document of a Pi that needs a key and has the models of models.toml."""
    paths = Schema()
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = operation_of(route)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Cerebrum", "version": common.VERSION},
        "security": [{name: []} for name in KEYS],
        "paths": paths,
        "components": {"securitySchemes": KEYS},
    }
