"""The Pi's API as an OpenAPI 3.1 document, made from the tables that check requests: what the tests
of requests and responses validate against, and what schemathesis makes its requests from.

A request's schema comes from the `Field` tables, and allows some requests that the Pi refuses, such
as one with a `suffix` and an `instruction`. Of a response it has the media type.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from harness import SHIPPED

import cerebrum_common as common
from cerebrum.fields import Field
from cerebrum.pi import dialects
from cerebrum.pi.counting import ACCEPTED
from cerebrum_common import Route
from cm4d import FIELDS, ROUTES

Schema = dict[str, Any]
TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}
STRING = {"type": "string"}
JSON = "application/json"


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
OLLAMA = object_of(
    {"model": dialects.TEXT, "suffix": dialects.TEXT, "stream": Field(bool, default=True)},
    True,
    prompt=TEXTS,
    messages=MESSAGES | {"minItems": 0},
    options=object_of(dialects.CHAT_FIELDS, True, stop=TEXTS),
)
REQUESTS = {
    dialects.OPENAI_TEXT: object_of(dialects.TEXT_FIELDS, True, **PROMPT, stream_options=USAGE),
    dialects.FIM_COMPLETION: object_of(dialects.TEXT_FIELDS, True, **PROMPT),
    dialects.OPENAI_CHAT: CHAT | {"required": ["messages"]},
    dialects.COMPLETION: object_of(dialects.TEXT_FIELDS, True, **LLAMA),
    dialects.INFILL: object_of(dialects.INFILL_FIELDS, True, **LLAMA, input_extra=EXTRA),
    **dict.fromkeys(dialects.OLLAMA, OLLAMA),
}

TEXT_FILES = {
    "/": "text/html",
    "/cerebrum_lsp.py": "text/x-python",
    "/cerebrum-jetbrains.zip": "application/zip",
    "/cerebrum.vsix": "application/vsix",
    "/metrics": "text/plain",
}
KEYS = json.loads("""{
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer"}}""")


NATIVE = object_of(
    FIELDS,
    language=STRING | {"examples": common.served_languages(SHIPPED)},
    model={"enum": [model.id for model in SHIPPED]},
)
BODIES = {
    "/v1/accepted": object_of(ACCEPTED, True),
    "/tokenize": object_of(dialects.TOKENIZE, True),
    "/api/show": object_of({"model": dialects.TEXT}, True),
}
for dialect, schema in REQUESTS.items():
    BODIES |= dict.fromkeys(dialect.paths, schema)


def media_of(route: Route) -> list[str]:
    """The media types of a route's response with status 200."""
    if route.path in TEXT_FILES:
        return [TEXT_FILES[route.path]]
    stream = route.streams.partition(";")[0]
    if route.path.endswith("/stream"):
        return [stream]
    asked = BODIES.get(route.path, NATIVE)["properties"]
    return [JSON, stream] if "stream" in asked else [JSON]


def operation_of(route: Route) -> Schema:
    answered = {"description": "OK", "content": {kind: {} for kind in media_of(route)}}
    failed = {"description": "An error", "content": {JSON: {}}}
    operation = Schema(responses={"200": answered, "default": failed})
    if route.open:
        operation["security"] = []
    if "{id}" in route.path:
        place = {"name": "id", "in": "path", "required": True, "schema": STRING}
        operation["parameters"] = [place]
    if route.json:
        content = {JSON: {"schema": BODIES.get(route.path, NATIVE)}}
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
