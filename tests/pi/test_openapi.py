"""Fields of requests, against their JSON Schema, and thousands of requests from openapi.py."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from harness import KEY, ROOT, daemon
from jsonschema import Draft202012Validator
from openapi import schema_of, write_openapi
from scripted import Backend, answer, in_a_thread

from cerebrum.fields import Field
from cerebrum.http import METHODS
from cerebrum.pi import dialects
from cm4d import FIELDS

VALUES = [
    None, True, False, -3, -1, 0, 1, 2, 16, 17, 200, 1000, 1001, 2048, 2049, 10**9, -(2**63),
    2**32 - 2, 2**32 - 1, 2**64 - 1, 2**64, -0.5, 0.001, 0.5, 1.5, "", "a", "é", "auto", "infill",
    "user", "text", "a" * 200, "a" * 201, "a" * 1000, "a" * 1001, [], ["a"], ["a", ""], ["a", 1],
    ["a"] * 16, ["a"] * 17, {},
]  # fmt: skip
TABLES = [FIELDS, dialects.TEXT_FIELDS, dialects.INFILL_FIELDS, dialects.TOKENIZE]
CHECKED = dict.fromkeys(itertools.chain(*(table.values() for table in TABLES)))


@pytest.mark.parametrize("field", CHECKED)
def test_a_field_accepts_what_its_schema_says(field: Field):
    for nullable in (False, True):
        schema = Draft202012Validator(schema_of(field, nullable))
        for value in VALUES:
            is_one_text = field.json_type is list and isinstance(value, str)
            accepted = field.accepts([value] if is_one_text else value)
            if nullable and value is None:
                accepted = True
            assert schema.is_valid(value) == accepted, (value, schema.schema)
        assert not field.default or schema.is_valid(field.default)


@pytest.mark.clients
@pytest.mark.nightly
def test_schemathesis_finds_nothing(tmp_path: Path):
    """Thousands of requests made from the document, valid and invalid, and each response held
    against it.

    The document allows some requests that are refused. Some requests are left out: the method
    QUERY, which gets 501 whatever the path, and those that schemathesis_hooks.py names.
    """
    pytest.importorskip("schemathesis")
    (tmp_path / "openapi.json").write_text(json.dumps(write_openapi()))
    methods = json.dumps(sorted(METHODS - {"HEAD"}))  # schemathesis knows no HEAD
    settings = f"[phases.coverage]\nunexpected-methods = {methods}\n"
    (tmp_path / "schemathesis.toml").write_text(settings)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(in_a_thread(Backend(tokens=answer(200, {"tokens": [1, 2]}))))
        url = f"http://127.0.0.1:{backend.port}"
        pi = stack.enter_context(daemon("cm4d", tmp_path, CEREBRUM_VPS_URL=url))
        pi.wait_for_line("VPS backend is available")
        command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json"]
        command += ["--url", f"http://127.0.0.1:{pi.port}"]
        command += ["--header", f"X-API-Key: {KEY}", "--seed", "1", "--max-examples", "10"]
        command += ["--warnings", "off", "--exclude-checks=positive_data_acceptance"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        more = {"PYTHONPATH": paths, "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
        result = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **more}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        (passed,) = re.findall(r"\d+ generated, (\d+) passed", result.stdout)
        assert int(passed) > 500
        assert pi.complaints() == ""
