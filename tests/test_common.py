"""Fields, configuration and models: what both daemons share beside HTTP."""

from __future__ import annotations

import ast
import builtins
import json
import re
import shutil
import socket
from pathlib import Path

import pytest
from harness import ROOT, SHIPPED, rows

from cerebrum.fields import Field, describe, read_fields
from cerebrum.http import own_names
from cerebrum.settings import ConfigError, Environment, load_catalog, read_environment
from cerebrum.text.languages import LANGUAGES
from cerebrum_common import HttpError, error_body, sse_event, timestamp

# ------------------------------------------------------------------------------------------- fields


# A rule (its type, its limits, and more), what it takes, what it refuses, what it expects.
RULES = json.loads(r"""[
    ["str", [], {}, ["", "a"], [null, 1, true, ["a"]], "a string"],
    ["str", [1], {}, ["a"], [""], "a non-empty string"],
    ["str", [0, 3], {}, ["", "abc"], ["abcd"], "a string from 0 to 3 characters"],
    ["str", [], {"choices": ["a", "b"]}, ["a"], ["c", "", 1], "one of a, b"],
    ["int", [1, 9], {}, [1, 9], [0, 10, 1.0, true, "1", null], "an integer from 1 to 9"],
    ["float", [0, 1], {}, [0, 1, 0.5], [-0.1, 1.1, true, "0", null], "a number from 0 to 1"],
    ["float", [0, 1], {"above_low": true}, [0.1, 1], [0], "a number above 0 to 1"],
    ["str", [], {"pattern": "[a-z]+"}, ["a"], ["", "A", "a\n", 1], "a string of the form [a-z]+"],
    ["bool", [], {}, [true, false], [0, 1, "true", null], "true or false"],
    ["list", [0, 2], {}, ["a", ["a", "b"], []], [["a", "b", "c"], [""], "", [1], {}, 1, null],
     "a string, or an array of 0 to 2 non-empty strings"]]""")


def test_fields() -> None:
    for kind, limits, more, good, bad, expected in RULES:
        rule = Field(getattr(builtins, kind), *limits, **more)
        for value in good:
            (read,) = read_fields({"x": value}, {"x": rule}).values()
            assert read == ([value] if rule.json_type is list and isinstance(value, str) else value)
            assert rule.json_type is not float or isinstance(read, float)
        for value in bad:
            with pytest.raises(HttpError) as error:
                read_fields({"x": value}, {"x": rule})
            assert (error.value.status, error.value.close) == (400, False)
            assert error.value.message == f"x: expected {expected}, got {describe(value)}"


def test_other_fields_and_surrogates():
    assert read_fields({"y": 1}, {"x": Field(int, default=7)}) == {"x": 7}
    with pytest.raises(HttpError, match="x: expected an integer, got nothing"):
        read_fields({}, {"x": Field(int, required=True)})
    for value in ("\ud800", ["a", "\udfff"]):
        with pytest.raises(HttpError, match="x: expected Unicode text, got a lone surrogate"):
            read_fields({"x": value}, {"x": Field(type(value), 0, 9)})


# A value, and its words. Messages are logged, so they show no prompt.
DESCRIBED = json.loads(r"""[
    ["def f():", "a string of 8 characters"],
    ["aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "a string of 41 characters"],
    [null, "null"],
    [true, "the boolean true"],
    [1.5, "the number 1.5"],
    ["q_1.5b", "the string \"q_1.5b\""],
    [[1, 2], "an array of 2"],
    [{}, "an object of 0"]]""")


def test_describe():
    for value, text in DESCRIBED:
        assert describe(value) == text


def test_shapes():
    error = HttpError("INVALID_REQUEST", "no", extra={"n_ctx": 4})
    body = error_body(error)
    assert list(body) == ["error", "message", "code", "timestamp", "n_ctx"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}", body["timestamp"], re.A)
    assert timestamp(60.0) < timestamp()
    assert sse_event({"token": "ä\n\u2028"}) == b'data: {"token": "\\u00e4\\n\\u2028"}\n\n'
    assert {"localhost", socket.gethostname().lower(), "x"} <= own_names(["x"])


# ------------------------------------------------------------------------------------ configuration


def test_dotenv(tmp_path):
    text = "\ufeff# comment\r\n\nA=1\nexport B='two words'\nC=\"x\"\nD=a#b \nE=\nF=it's\nG=a=b\r\n"
    (tmp_path / ".env").write_text(text, "utf-8")
    environment = read_environment({"A": "env", "E": "env"}, tmp_path)
    expected = {"B": "two words", "C": "x", "D": "a#b", "F": "it's", "G": "a=b"}
    for name, value in {**expected, "A": "env", "E": "env"}.items():
        assert environment.text(name) == value
    assert read_environment({}, tmp_path).text("E", "default") == "default"
    assert read_environment({"X": "1"}, tmp_path / "absent").text("X") == "1"


def test_bad_dotenv(tmp_path):
    for line in ("A", "A = 1", "1A=1", "=1", "A B=1", "\x85A"):
        (tmp_path / ".env").write_text("X=1\n" + line + "\n", "utf-8")
        with pytest.raises(ConfigError, match=r"\.env: line 2: expected NAME=value"):
            read_environment({}, tmp_path)
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    (tmp_path / "folder" / ".env").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "folder"):
        with pytest.raises(ConfigError, match=r"\.env: "):
            read_environment({}, folder)


def test_environment():
    environment = Environment({"N": "1.5", "I": "7", "L": " a, B ,,", "Z": ""})
    assert environment.number("N", 0, 0, 2) == 1.5
    assert environment.integer("I", 0, 0, 9) == 7
    assert environment.integer("Z", 3, 0, 9) == 3
    assert environment.names("L") == {"a", "b"}
    assert environment.names("Z") == frozenset()
    for text in ("x", "-1", "1e3", " 1", "1_0", "٣", "11", "nan", "inf", "0x1", "1.", "+1"):
        with pytest.raises(ConfigError, match=r"^N: expected a number from 0 to 10, got "):
            Environment({"N": text}).number("N", 0, 0, 10)
    with pytest.raises(ConfigError, match=r"^N: expected an integer, got 1\.5"):
        environment.integer("N", 0, 0, 10)


def test_the_first_place_that_has_a_variable_wins(tmp_path):
    (tmp_path / ".env").write_text("CEREBRUM_A=file\nCEREBRUM_B=file\nCEREBRUM_C=file\n")
    credentials, runtime = tmp_path / "credentials", tmp_path / "runtime"
    for folder in (credentials, runtime):
        folder.mkdir()
        (folder / "CEREBRUM_C").write_text(f"{folder.name}\n")
        (folder / "not.a.variable").write_text(folder.name)
    environ = {"CEREBRUM_B": "environment", "CEREBRUM_C": "environment"}
    environ |= {"CREDENTIALS_DIRECTORY": f"{credentials}", "RUNTIME_DIRECTORY": f"{runtime}"}
    read = read_environment(environ, tmp_path)
    for name, value in {"A": "file", "B": "environment", "C": "credentials"}.items():
        assert read.text(f"CEREBRUM_{name}") == value
    assert "not.a.variable" not in read.values
    (credentials / "CEREBRUM_E").touch()  # as a full disk leaves it
    message = r"^CEREBRUM_E: expected a value in .*, got an empty file$"
    with pytest.raises(ConfigError, match=message):
        read_environment(environ, tmp_path)
    shutil.rmtree(credentials)
    assert read_environment(environ, tmp_path).text("CEREBRUM_C") == "environment"


KEYS = {"": (), "one": ("one",), "new,old": ("new", "old"), " new , old ": ("new", "old")}
BAD_KEYS = ("two words", "zwölf", "a,b\x00", " , ", "a,")


def test_keys():
    for text, keys in KEYS.items():
        assert Environment({"K": text}).keys("K") == keys
    for text in BAD_KEYS:
        with pytest.raises(ConfigError, match=r"^K: expected printable ASCII without spaces$"):
            Environment({"K": text}).keys("K")


# ------------------------------------------------------------------------------------------- models

GOOD = '[[models]]\nid = "m"\nname = "M"\nparameters = "1B"\nquantization = "Q4"\nfile = "m.gguf"\n'
GOOD += 'languages = ["python"]\n'


def test_the_table_of_models():
    served = {model.id: model.languages for model in SHIPPED}
    assert list(served).index("codellama_7b") < list(served).index("qwen_7b")
    assert served.pop("codellama_7b") == ("rust", "c", "cpp", "go")
    assert set(served.values()) == {tuple(LANGUAGES)}, "each of the others serves every language"
    smallest = min(model.memory_mb for model in SHIPPED)
    assert SHIPPED[-1].memory_mb == smallest, "the default model is the smallest"


def test_a_shape_has_as_many_weights_as_the_publisher_counts() -> None:
    for model in SHIPPED:
        layers, width, heads, kv_heads, head, feed, vocabulary, *experts = model.shape.values()
        attention = 2 * width * head * (heads + kv_heads)
        parameters = model.parameters.replace("B", "").split("-A")  # of all experts, of used ones
        for published, count in zip(parameters, experts, strict=False):
            layer = attention + 3 * width * feed * max(1, count)
            weights = layers * layer + width * vocabulary
            rounding = 0.5 / 10 ** len(published.partition(".")[2])  # the publishers round 3.4 to 3
            expected = pytest.approx(float(published), rel=0.12, abs=rounding)
            assert weights / 1e9 == expected, model.id


# A models.toml, and what is said of it.
BAD = json.loads(r"""[
    [null, "No such file"],
    ["\u00ff", "'utf-8' codec can't decode"],
    ["", "at least one"],
    ["models = ['x']", "model 1: expected a table"],
    ["[[models]", "line 1"],
    ["GOODGOOD", "every id and alias once, got 'm' twice"],
    ["GOODaliases = [\"x\"]\nOTHERaliases = [\"m\"]\n", "every id and alias once, got 'm' twice"],
    ["GOODaliases = [\"x\"]\nOTHERaliases = [\"x\"]\n", "every id and alias once, got 'x' twice"],
    ["prefer = 5\nGOOD", "prefer: expected a table, got something else"],
    ["GOOD[prefer]\nchat = [\"m\"]\n",
     "prefer: expected one of complete, infill, instruct, got 'chat'"],
    ["GOOD[prefer]\ninfill = [\"m\", \"n\"]\n",
     "prefer: infill: expected one of m, got an array of 2"]]""")
# What is replaced in GOOD, or nothing, what by or what is added, and what is said.
BAD_LINES = r"""
"m"              | 5           | id: {form} [A-Za-z0-9._\\-]+, got the number 5
"m"              | "a b"       | id: {form}
name = "M"       |             | name: expected a non-empty string, got nothing
file = "m.gguf"  |             | file: expected a name, or aliases instead, got nothing
m.gguf           | a/m.gguf    | file: {form}
m.gguf           | ..          | file: {form}
["python"]       | ["a b"]     | languages: expected strings of the form
["python"]       | [[]]        | languages: expected strings of the form
| sha256 = "x"                 | sha256: {form}
| size = 2025-12-25            | size: expected an integer, got a date
| sources = [1]                | sources: expected [[models.sources]], got something else
| aliases = ["a", 1]           | aliases: expected a string, or an array of
| fim = ["a", "b"]             | fim: expected a string, or an array of 3 to 3 non-empty strings
| alias = "a"                  | expected one of id, name, parameters,
| shape = 5                    | shape: expected a table, got something else
| shape = {{layers = 0}}       | shape: layers: {number}, got the number 0
| shape = {{layers = 1}}       | shape: width: {number}
| shape = {{kv = 1}}           | shape: expected one of layers, width, heads, kv_heads,
| draft = "n"                  | m: draft: {draft}, got the string "n"
| draft = "m"                  | m: draft: {draft}, got the string "m"
"""
SAID = {
    "form": "expected a string of the form",
    "number": "expected an integer from 1 to 999999",
    "draft": "expected the id of a model with a file and without a draft",
}
for old, new, said in rows(BAD_LINES.format(**SAID)):
    text = GOOD.replace(old, new) if old else f"{GOOD}{new}\n"
    BAD.append((text, said if said.startswith("m: ") else f"model 1: {said}"))


def test_bad_models(tmp_path: Path):
    path = tmp_path / "models.toml"
    for text, says in BAD:
        if text is not None:
            other = GOOD.replace('"m"', '"n"')
            path.write_text(text.replace("GOOD", GOOD).replace("OTHER", other), "latin-1")
        with pytest.raises(ValueError, match=re.escape(says)) as error:
            load_catalog(path, LANGUAGES)
        assert str(error.value).startswith(f"CEREBRUM_MODELS_FILE: {path}: ")


def test_preferences_and_any_language_may_be_named(tmp_path):
    path = tmp_path / "models.toml"
    named = '["python", "haskell", "c#", "objective-c", "F90"]'
    other = GOOD.replace('"m"', '"n"').replace('["python"]', named)
    every = GOOD.replace('"m"', '"all"').replace('["python"]', '["cobol", "rust", "all"]')
    path.write_text(GOOD + other + every + '[prefer]\ninfill = ["n", "m"]\ncomplete = []\n')
    catalog = load_catalog(path, ["python", "rust"])
    assert catalog.prefer == {"infill": ("n", "m")}
    assert catalog.models[1].languages == ("python", "haskell", "c#", "objective-c", "F90")
    assert catalog.models[2].languages == ("cobol", "rust", "python")
    assert load_catalog(ROOT / "models.toml", LANGUAGES).prefer == {}, "off in the shipped file"


# ---------------------------------------------------------------------------------------- the house


def test_a_daemon_can_be_read_by_the_python_that_it_refuses() -> None:
    """Debian 11's Python 3.9 has to come as far as the line that says which one is expected."""
    for name in ("cm4d.py", "vpsd.py"):
        source = (ROOT / name).read_text()
        ast.parse(source, feature_version=(3, 8))
        before, check, _ = source.partition("\nif sys.version_info < (3, 11):")
        imports = ["from __future__ import annotations", "import sys"]
        assert check, name
        assert re.findall("^(?:import|from) .*", before, re.M) == imports
