"""JSON and its fields: a strict parser, and tables of `Field` entries that check requests and
settings.

    >>> read_fields({"max_tokens": 5}, {"max_tokens": Field(int, 1, 2048, 512)})
    {'max_tokens': 5}

Pure. Standard library only.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cerebrum_common import HttpError

JsonObject = dict[str, Any]
Members = Mapping[str, Any]  # a JSON object that is only read

MAX_JSON_DEPTH = 64  # requests are flat; without this limit the C scanner ends in a RecursionError
NO_BRACKETS = bytes(set(range(256)).difference(b"[]{}"))
# Commas, colons and opening brackets: a chat of 1,000 messages in parts has half as many.
MAX_DELIMITERS = 20_000
MAX_INTEGER_DIGITS = 20  # 64 bits; no field takes a larger number


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):  # NaN, Infinity, and 1e999, which parse_constant never sees
        raise ValueError("expected finite numbers")
    return value


def _integer(text: str) -> int:
    if len(text) > MAX_INTEGER_DIGITS:
        raise ValueError(f"expected integers of at most {MAX_INTEGER_DIGITS} digits")
    return int(text)


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("expected every name once in an object")
    return members


DECODER = json.JSONDecoder(
    parse_constant=_finite, parse_float=_finite, parse_int=_integer, object_pairs_hook=_unique
)


def parse_json(body: bytes) -> JsonObject:
    """Parse a body as a JSON object: strict RFC 8259, UTF-8 without a BOM, no repeated names,
    finite numbers, at most 64 levels and MAX_DELIMITERS. HttpError 400 says what is wrong.
    """
    try:
        _bound_structure(body)
        value = DECODER.decode(body.decode("utf-8"))
        if isinstance(value, dict):
            return value
        problem = f"expected a JSON object, got {describe(value)}"
    except UnicodeDecodeError:
        problem = "expected a body in UTF-8"
    except json.JSONDecodeError as error:
        problem = f"expected a JSON object: {error.msg} at character {error.pos}"
    except ValueError as error:
        problem = f"expected a JSON object: {error}"
    raise HttpError("INVALID_REQUEST", problem)


def _bound_structure(body: bytes) -> None:
    """Bound the values and names of a body, each of which follows a delimiter, and its depth.
    Called before the parser, which lets nothing else run.
    """
    # Without escapes, each quote begins or ends a string.
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")
    outside = b"".join(plain.split(b'"', 2 * MAX_DELIMITERS)[::2])
    delimiters = len(outside) - len(outside.translate(None, b",:[{"))
    if delimiters > MAX_DELIMITERS:
        raise ValueError(f"expected at most {MAX_DELIMITERS} commas, colons and opening brackets")
    brackets = outside.translate(None, NO_BRACKETS)[: 2 * MAX_DELIMITERS]  # all of valid JSON
    depths = itertools.accumulate(1 if bracket in b"[{" else -1 for bracket in brackets)
    if max(depths, default=0) > MAX_JSON_DEPTH:
        raise ValueError(f"expected at most {MAX_JSON_DEPTH} levels")


def members_of(value: Any) -> Members:
    """The members of a JSON object; none of any other value."""
    return value if isinstance(value, dict) else {}


def items_of(value: Any) -> list[Any]:
    """The items of a JSON array; none of any other value."""
    return value if isinstance(value, list) else []


SHOWN = re.compile(r"[A-Za-z0-9._:+#/\-]{0,40}")  # ids and choices


def describe(value: Any) -> str:
    """Describe a value for a message: its JSON type and the value itself. Messages are logged, and
    a string that is not an id may be a prompt, so only the length of such a string is shown.
    """
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"an array of {len(value)}"
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    if isinstance(value, str) and not SHOWN.fullmatch(value):
        return f"a string of {len(value)} characters"
    name = {bool: "boolean", int: "number", float: "number", str: "string"}.get(type(value))
    return f"the {name} {json.dumps(value)}" if name else f"a {type(value).__name__}"  # a TOML type


def printable(text: str) -> str:
    """Escape every character that could act on a terminal or forge a line: line ends, controls,
    overrides.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


NOUNS = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


@dataclass(frozen=True, slots=True)
class Field:
    """One member of a request: its JSON type (`str`, `int`, `float`, `bool` or `list` of strings),
    range and default. The range counts the characters of a string and the items of a list. A
    string, or each item of a list, is one of the `choices` and matches the `pattern` as a whole. A
    list field also accepts one string alone.
    """

    json_type: type
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
            noun = "strings" if self.json_type is list else "a string"
            return f"{noun} of the form {self.pattern}"
        if self.json_type is list:
            return f"a string, or an array of {self.low} to {self.high} non-empty strings"
        noun = NOUNS[self.json_type]
        if self.high == math.inf:
            return "a non-empty string" if self.json_type is str and self.low == 1 else noun
        unit = " characters" if self.json_type is str else ""
        begin = "above" if self.above_low else "from"
        return f"{noun} {begin} {self.low} to {self.high}{unit}"

    def accepts(self, value: Any) -> bool:
        # By the exact type: true and false are integers, too.
        kinds = (int, float) if self.json_type is float else (self.json_type,)
        if type(value) not in kinds:
            return False
        size: Any = len(value) if isinstance(value, str | list) else value
        inside = self.low < size if self.above_low else self.low <= size
        if not inside or size > self.high:
            return False
        if isinstance(value, list):
            return all(map(self._allows, value))
        return not isinstance(value, str) or self._allows(value)

    def _allows(self, text: Any) -> bool:
        """Whether the field accepts this string or list item."""
        if not isinstance(text, str):
            return False
        if self.choices and text not in self.choices:
            return False
        if self.pattern:
            return bool(re.fullmatch(self.pattern, text))
        return self.json_type is str or text != ""


Fields = Mapping[str, Field]  # by name
# Half of a character beyond U+FFFF; the JSON decoder has joined whole pairs.
LONE = re.compile("[\ud800-\udfff]")


def valid_members(members: Members, fields: Fields) -> JsonObject:
    """The members that their fields accept; all others are left out.

    >>> valid_members({"done": True, "tokens": "3", "cached": 5}, {"cached": Field(int)})
    {'cached': 5}
    """
    valid = [name for name in fields if fields[name].accepts(members.get(name))]
    return {name: members[name] for name in valid}


def wrong(name: str, expected: str, got: Any) -> HttpError:
    return HttpError("INVALID_REQUEST", f"{name}: expected {expected}, got {describe(got)}")


def read_fields(members: Members, fields: Fields, where: str = "") -> JsonObject:
    """The checked fields of a request with defaults filled in; unknown members are ignored.
    HttpError 400 names the field, after `where`, what was expected and what was found.
    """
    values: JsonObject = {}
    for name, rule in fields.items():
        if name not in members:
            if rule.required:
                raise HttpError(
                    "INVALID_REQUEST", f"{where}{name}: expected {rule.expected()}, got nothing"
                )
            values[name] = rule.default
            continue
        value = members[name]
        if rule.json_type is list and isinstance(value, str):
            value = [value]
        if not rule.accepts(value):
            raise wrong(where + name, rule.expected(), members[name])
        text = "".join(value) if rule.json_type is list else str(value)
        if LONE.search(text):
            raise HttpError(
                "INVALID_REQUEST", f"{where}{name}: expected Unicode text, got a lone surrogate"
            )
        values[name] = float(value) if rule.json_type is float else value
    return values


def read_object(value: Any, name: str, fields: Fields) -> JsonObject:
    """The checked members of an object within a request."""
    if not isinstance(value, dict):
        raise wrong(name, "an object", value)
    return read_fields(value, fields, f"{name}.")


def read_objects(value: Any, name: str, low: int, high: int, fields: Fields) -> list[JsonObject]:
    """The checked members of each object in an array. HttpError 400 names the array, the index and
    the field.
    """
    if not isinstance(value, list) or not low <= len(value) <= high:
        raise wrong(name, f"an array of {low} to {high} objects", value)
    return [read_object(entry, f"{name}[{number}]", fields) for number, entry in enumerate(value)]
