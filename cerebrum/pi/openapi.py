"""The Pi's API as an OpenAPI 3.1 document, built from the tables that check requests and the code that answers them.

In: cm4d's routes, dialects, fields and models. Out: the document as one JSON value:

    >>> schema_of(Field(int, 1, 2048, 512))
    {'type': 'integer', 'minimum': 1, 'maximum': 2048, 'default': 512}
    >>> like({"id": "a", "created?": 1})
    {'type': 'object', 'properties': {'id': {'type': 'string'}, 'created': {'type': 'integer'}}, 'required': ['id']}

Strategy
- A request's schema comes from the `Field` tables. For members checked by a function, the schemas are here (`MEMBERS`),
  built from the function's own limits.
- A response's schema comes from an example. A dialect writes its own; the examples of our own API are here (`ANSWERS`),
  with the members that a client may rely on. A response may have more.
- The kind of a route determines its possible errors.

OpenAPI 3.1 does not define the schema of a stream. Here it describes one event, like the `itemSchema` of 3.2.
Pure: no socket, no clock, no state. Standard library only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cerebrum_common as common
from cerebrum.fields import MAX_INTEGER_DIGITS, MAX_JSON_DEPTH, Field
from cerebrum.pi import dialects
from cerebrum.pi.counting import ACCEPTED
from cerebrum.pi.dialects import Dialect
from cerebrum_common import HttpError, Model, Route

DESCRIPTION = (
    "Code completion at home. Beside Cerebrum's own API, the Pi speaks OpenAI's and llama-server's, so that an editor"
    " works by entering its address. Unknown members of a request are ignored. JSON is strict: UTF-8, each name once in"
    f" an object, integers without a fraction and of at most {MAX_INTEGER_DIGITS} digits, at most"
    f" {MAX_JSON_DEPTH} levels. A lone surrogate is refused. Paths of other people's APIs read their JSON under"
    " any Content-Type, a null as an absent member, 16.0 as 16 and a lone surrogate as U+FFFD. The schema of a stream"
    " describes one event. An error after the beginning of a stream is an event, and then the connection is cut. An"
    " unknown path gets 404, another method 405. HEAD is answered like GET without a body, OPTIONS with 204. Each"
    " response has an X-Request-ID, which is the request's if it sent one."
)
Schema = dict[str, Any]
# ---------------------------------------------------------------------------------------------- schemas

TYPES: dict[type, str] = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
NULL: Schema = {"type": "null"}
STRING: Schema = {"type": "string"}


def schema_of(field: Field, nullable: bool = False) -> Schema:
    """The schema of `field`. With `nullable`, null is accepted too and counts as absent."""
    if field.kind is list:
        item = {"type": "string", "minLength": 1}
        return any_of(item, array_of(item, field.low, field.high), *[NULL] * nullable)
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
    return schema | ({} if field.default is None else {"default": field.default})


def object_of(fields: Mapping[str, Field], nullable: bool = False, **more: Schema) -> Schema:
    """An object with the members of a table, and `more` beside them."""
    required = [name for name, field in fields.items() if field.required]
    properties = {name: schema_of(field, nullable) for name, field in fields.items()}
    return {"type": "object", "properties": properties | more, "required": required}


def array_of(entries: Schema, low: float, high: float) -> Schema:
    return {"type": "array", "items": entries, "minItems": low, "maxItems": high}


def any_of(*schemas: Schema) -> Schema:
    return {"anyOf": schemas}


def like(example: Any, required: bool = True) -> Schema:
    """The schema of a value like the example, or like one of a tuple of examples. If `required`, all members of its
    objects are required, except those with a "?" behind their names."""
    if isinstance(example, tuple):
        return any_of(*(like(one, required) for one in example))
    if isinstance(example, list):
        return {"type": "array", "items": like(example[0], required) if example else {}}
    if not isinstance(example, Mapping):
        return {"type": TYPES[type(example)]}
    properties = {name.rstrip("?"): like(value, required) for name, value in example.items()}
    names = [name for name in example if required and not name.endswith("?")]
    return {"type": "object", "properties": properties, "required": names}


def ref(kind: str, name: str) -> Schema:
    return {"$ref": f"#/components/{kind}/{name}"}


# --------------------------------------------------------------------------------------------- requests

# Members checked by a function of dialects.py: `read_prompt`, `read_stops`, and so on.
STOPS = {"type": "array", "items": STRING, "contains": {"not": {"pattern": f"^(?:{dialects.SPECIAL.pattern})?$"}},
         "minContains": 0, "maxContains": dialects.MAX_STOPS,
         "description": f"At most {dialects.MAX_STOPS} beside empty strings and names of special tokens."}  # fmt: skip
CONTENT = any_of(STRING, array_of(object_of(dialects.PART, nullable=True), 0, dialects.MAX_MESSAGES), NULL)
SAID = object_of(dialects.MESSAGE, content=CONTENT, tool_calls={"enum": [[], None]})
MEMBERS: dict[str, Schema] = {
    "prompt": any_of(STRING, array_of(STRING, 1, 1), NULL),
    "stop": any_of(STRING, STOPS, NULL),
    "stream_options": any_of(object_of(dialects.STREAM_OPTIONS, nullable=True), NULL),
    "messages": array_of(SAID, 1, dialects.MAX_MESSAGES),
    "input_extra": any_of(array_of(object_of(dialects.EXTRA, nullable=True), 0, dialects.MAX_EXTRAS), NULL),
    "response_fields": any_of({"type": "array", "items": STRING}, NULL),
}


def accepted(fields: Mapping[str, Field], names: str) -> Schema:
    """A request with the members of a dialect's table and the named members of `MEMBERS`."""
    return object_of(fields, nullable=True, **{name: MEMBERS[name] for name in names.split()})


NO_TOOLS = any_of(  # no tools, or none that may be called; see `read_chat`
    {"properties": {"tools": {"enum": [[], None]}}},
    {"properties": {"tool_choice": {"const": "none"}}, "required": ["tool_choice"]},
)
TEXT, CHAT = {"prompt": "def add(a, b):\n    return "}, {"messages": [{"role": "user", "content": "Write a stack."}]}
GAP = {"input_prefix": "def add(a, b):\n", "prompt": "    return ", "input_suffix": "\n", "stop": ["\n\n"]}
REQUESTS: dict[Dialect, tuple[str, Schema, dict[str, Any]]] = {  # a name, a schema, and an example
    dialects.OPENAI_TEXT: ("OpenAIText", accepted(dialects.TEXT_FIELDS, "prompt stop stream_options"), TEXT),
    dialects.OPENAI_CHAT: ("OpenAIChat", accepted(dialects.OPENAI_FIELDS, "messages stop stream_options")
                           | {"required": ["messages"], **NO_TOOLS}, CHAT),
    dialects.COMPLETION: ("Llama", accepted(dialects.LLAMA_FIELDS, "prompt stop response_fields"), TEXT),
    dialects.INFILL: ("Infill", accepted(dialects.INFILL_FIELDS, "prompt stop response_fields input_extra"), GAP),
}  # fmt: skip


def native_request(fields: Mapping[str, Field], models: Sequence[Model]) -> Schema:
    """A completion of our own API. The forms say which members go together, as checked by `detect_mode`."""
    schema = object_of({**fields, "prompt": replace(fields["prompt"], low=0)})
    schema["properties"]["language"] = {"enum": common.served_languages(models)}
    schema["properties"]["model"] = {"enum": [model.id for model in models]}
    some, blank, nothing = Schema(minLength=1), Schema(maxLength=0), {"not": Schema()}

    def form(modes: str, *required: str, **properties: Schema) -> Schema:
        return {"properties": {"mode": {"enum": modes.split()}, **properties}, "required": list(required)}

    gaps = [form("auto infill", prompt=some), form("auto infill", suffix={"pattern": r"\S"})]
    schema["anyOf"] = [
        form("auto complete instruct", prompt=some, suffix=blank, instruction=nothing),
        form("auto instruct", "instruction", suffix=blank),
        form("infill", "mode", "suffix", suffix=some, instruction=nothing),
        form("auto infill", "suffix", instruction=nothing) | {"anyOf": gaps},
    ]
    return schema


# -------------------------------------------------------------------------------------------- responses

TIME = "2025-12-25T12:00:00.000000"
STATE = {"id": "vps", "available": True, "message": ""}
EXAMPLE_RESULT = {
    "language": "python", "model": "qwen_7b", "total_tokens": 4, "inference_time": 0.25, "timestamp": TIME,
    "mode": "complete", "finish_reason?": "stop", "prompt_tokens?": 16, "ttft?": 0.1, "backend?": "vps",
    "kept?": {"characters": 8120, "of": 102400, "parts": ["latest"]}}  # fmt: skip
STATS = {"uptime": 1.5, "requests_total": 1, "requests_active": 0, "vps_available": True,
         "vps_response_time_ms": (12.5, None), "memory_mb": 25.5, "load_avg": [0.5], "backends": [STATE]}  # fmt: skip
LISTED = {"id": "qwen_7b", "name": "Qwen 7B", "languages": ["python"], "parameters": "7B", "quantization": "Q4",
          "available": True, "backends": ["vps"], "loaded?": True, "n_ctx?": 4096}  # fmt: skip
MODEL = dialects.write_model("qwen_7b", 1)
ANSWERS: dict[str, dict[str, Any]] = {  # the JSON of our own API, by the last part of a path
    "health": {"status": "healthy", "timestamp": TIME, "vps_available": True, "uptime": 1.5, "backends": [STATE]},
    "complete": {"completion": "a + b", **EXAMPLE_RESULT},
    "models": {"models": [LISTED], "vps_available": True, "languages": [{"id": "python"}], "data": [MODEL]},
    "{id}": MODEL,
    "stats": STATS,
    "activity": {**STATS, "timestamp": TIME, "step_s": 30, "requests": [1], "failed": [0], "tokens": [64]},
    "openapi.json": {"openapi": "3.1.0", "info": {}, "paths": {}},
    "props": dialects.write_props("qwen_7b", 4096, 2),
    "tokenize": {"tokens": [1]},
    "accepted": {"accepted": 1, "accepted_characters": 12},
}
KINDS = {"/": "text/html", "/cerebrum_lsp.py": "text/x-python"}  # of the files that the Pi serves
EXAMPLE_TOKEN = {"token": "a", "total_tokens": 1}
ERROR = {"error": True, "message": "why", "code": "VPS_UNAVAILABLE"}
EXAMPLE_EVENTS = (EXAMPLE_TOKEN, {"progress": {"stage": "load"}}, {"done": True, **EXAMPLE_RESULT}, ERROR)


def stream_of(schemas: Sequence[Schema], last: Sequence[str] = ()) -> dict[str, Any]:
    """Events whose data is JSON of one of these schemas, and perhaps a last event with another text."""
    data = {"contentMediaType": "application/json", "contentSchema": any_of(*schemas)}
    texts = {"type": "string", "anyOf": [data, *({"const": text} for text in last)]}
    return {"text/event-stream": {"schema": {"type": "object", "properties": {"data": texts}, "required": ["data"]}}}


def dialect_content(dialect: Dialect) -> dict[str, Any]:
    """The content of a dialect's response: one piece, or events if the client asks for `stream`."""
    _, request, example = REQUESTS[dialect]
    asked = dialect.read(example | {"stream_options": {"include_usage": True}})
    reply, result = dialect.reply(asked, "id", 1, {"model": "qwen_7b", "n_ctx": 4096}), {"total_tokens": 4}
    stream = reply.begin() + reply.text(common.sse_event(EXAMPLE_TOKEN)) + reply.end(result)
    data = [event[6:].decode() for event in stream.split(b"\n\n")[:-1]]
    full = "response_fields" not in request["properties"]
    events = [like(json.loads(text), full) for text in data if text.startswith("{")]
    content = stream_of([*events, ref("schemas", "ForeignError")], [text for text in data if not text.startswith("{")])
    return content | {"application/json": {"schema": like(json.loads(reply.whole("a + b", result)), full)}}


def content_of(route: Route, dialect: Dialect | None) -> dict[str, Any]:
    """The content of a route's response with status 200."""
    last = route.path.rpartition("/")[2]
    if dialect:
        return dialect_content(dialect)
    if last == "stream":
        return stream_of([like(event) for event in EXAMPLE_EVENTS])
    if last in ANSWERS:
        return {"application/json": {"schema": like(ANSWERS[last])}}
    return {KINDS.get(route.path, "text/plain"): {"schema": STRING}}


def codes_of(route: Route, passed: frozenset[str], keyed: bool) -> list[str]:
    """The codes of all errors that can end a request of this route."""
    only = dict.fromkeys(passed - {"INVALID_REQUEST", "OVERLOADED"}, route.json)  # only JSON requests ask the VPS
    only |= {"UNAUTHORIZED": keyed and not route.open, "LENGTH_REQUIRED": route.json, "METHOD_NOT_ALLOWED": False}
    only |= {"NOT_FOUND": route.path in KINDS, "MODEL_NOT_FOUND": route.json or "{id}" in route.path}
    only |= {"VPS_UNAVAILABLE": route.json or route.path == "/health"}
    return [code for code in common.STATUSES if only.get(code, True)]


def error_responses(route: Route, codes: Sequence[str]) -> dict[str, tuple[str, Schema]]:
    """For each status, the name and the value of its response. Errors before the route is known have our own form."""
    shapes = ["ForeignError", "Error"] if route.foreign_error else ["Error"]
    content = {"application/json": {"schema": any_of(*(ref("schemas", shape) for shape in shapes))}}
    statuses = {code: str(common.STATUSES[code]) for code in codes}
    told = {at: [code for code in codes if statuses[code] == at] for at in statuses.values()}
    return {
        status: (".".join([shapes[0], *here]), {"description": ", ".join(here), "content": content})
        for status, here in told.items()
    }


# --------------------------------------------------------------------------------------------- document


def describe_operation(doc: str | None) -> dict[str, str]:
    """A handler's docstring, `GET /path: what it does. And more.`, as a summary and a description."""
    text = " ".join((doc or "").partition(": ")[2].replace("`", "").split())
    text = text[:1].upper() + text[1:]
    return {"summary": text.partition(". ")[0].removesuffix("."), "description": text}


def write_openapi(
    routes: Sequence[Route], fields: Mapping[str, Field], models: Sequence[Model], passed: frozenset[str], keyed: bool
) -> dict[str, Any]:
    """The document. `passed`: the backends' error codes that reach clients; `keyed`: clients need a key."""
    speaking = {path: dialect for dialect in dialects.DIALECTS for path in dialect.paths}
    sample = HttpError("INVALID_REQUEST", "why")
    schemas = {"Error": like(common.error_body(sample)), "ForeignError": like(dialects.write_error(sample))}
    native = ("Completion", native_request(fields, models), {"prompt": "def add(a, b):", "language": "python"})
    requests = {path: REQUESTS[dialect] for path, dialect in speaking.items()}
    requests["/v1/accepted"] = ("Accepted", object_of(ACCEPTED), {"characters": 12})
    requests["/tokenize"] = ("Text", object_of(dialects.TOKENIZE, nullable=True), {"content": "a + b"})
    schemas |= {name: request for name, request, _ in [native, *requests.values()]}
    keys = {"X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"}}
    keys |= {"Bearer": {"type": "http", "scheme": "bearer"}}
    id_schema = {"type": "string", "pattern": r"^[^/\x00-\x1f\x7f]+$"}
    id_parameter = {"name": "id", "in": "path", "required": True, "schema": id_schema, "example": models[0].id}
    paths: dict[str, dict[str, Any]] = {}
    responses: dict[str, Schema] = {}  # several paths share one entry
    for route in routes:
        dialect = speaking.get(route.path)
        errors = error_responses(route, codes_of(route, passed, keyed))
        responses |= dict(errors.values())
        operation: dict[str, Any] = {
            "operationId": re.sub(r"\W+", "_", f"{route.method}{route.path}").strip("_").lower(),
            **describe_operation((dialect.read if dialect else route.handler).__doc__),
            "responses": {"200": {"description": "OK", "content": content_of(route, dialect)}}
            | {status: ref("responses", name) for status, (name, _) in errors.items()},
        }
        if route.open:
            operation["security"] = []
        if "{id}" in route.path:
            operation["parameters"] = [id_parameter]
        if route.json:
            name, _, example = requests.get(route.path, native)
            content = {"application/json": {"schema": ref("schemas", name), "example": example}}
            operation["requestBody"] = {"required": True, "content": content}
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "Cerebrum", "version": common.VERSION, "description": DESCRIPTION},
        "security": [{name: []} for name in keys] if keyed else [],
        "paths": paths,
        "components": {"schemas": schemas, "responses": responses, "securitySchemes": keys},
    }
