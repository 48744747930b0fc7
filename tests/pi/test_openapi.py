"""The document of openapi.py: that it is valid, and that real requests are as it says."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
from harness import KEY, ROOT, Client, daemon
from jsonschema import Draft202012Validator
from openapi import JSON, write_openapi
from openapi_spec_validator import OpenAPIV31SpecValidator
from scripted import Backend, answer, in_a_thread, pi_for

from cerebrum.http import METHODS
from cm4d import ROUTES

DOCUMENT = json.loads(json.dumps(write_openapi()))
OPERATIONS = {
    (route.method, route.path): DOCUMENT["paths"][route.path][route.method.lower()]
    for route in ROUTES
}
TOKENS = answer(200, {"tokens": [1, 2]})


def test_the_document_is_valid():
    OpenAPIV31SpecValidator(DOCUMENT).validate()


# Examples of the members that no `Field` checks.
MORE = json.loads("""{
    "/v1/complete": {
        "prompt": "def add(a, b):", "language": "python", "model": "qwen_0_5b", "stop": ["b"]},
    "/v1/complete/stream": {
        "prompt": "def add(a, b):", "language": "python", "model": "qwen_0_5b", "stop": ["b"]},
    "/v1/completions": {"prompt": ["a"], "stop": "b", "stream_options": {"include_usage": true}},
    "/v1/chat/completions": {"stop": ["b"], "stream_options": null, "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Sort."}]},
        {"role": "assistant", "content": "a"}]},
    "/v1/fim/completions": {"prompt": "a", "suffix": "b", "random_seed": 1, "stop": "c"},
    "/completion": {"prompt": "a", "response_fields": ["content"]},
    "/infill": {"prompt": "", "stop": null, "input_extra": [{"filename": "a.py", "text": "b"}]},
    "/api/generate": {"prompt": "a", "suffix": "b", "options": {"stop": ["b"], "seed": 1}},
    "/api/chat": {"messages": [
        {"role": "user", "content": [{"type": "text", "text": "Sort."}]},
        {"role": "assistant", "content": "a"}]},
    "/api/show": {"model": "qwen_0_5b"},
    "/v1/accepted": {"characters": 12},
    "/tokenize": {"content": "a + b"}}""")


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", MORE)
async def test_a_post_is_answered_as_described(path, stream):
    async with Backend(tokens=TOKENS) as backend, pi_for(backend.port) as pi:
        await check_post(pi, path, stream)


async def check_post(pi: Client, path: str, stream: bool):
    schema = OPERATIONS["POST", path]["requestBody"]["content"][JSON]["schema"]
    asked = MORE[path] | ({"stream": stream} if "stream" in schema["properties"] else {})
    Draft202012Validator(schema).validate(asked)
    reply = await pi.ask("POST", path, asked, X_API_Key=KEY)
    streams = path.endswith("/stream") or asked.get("stream", False)
    kind = reply.one("Content-Type").partition(";")[0]
    stream = "application/x-ndjson" if path.startswith("/api/") else "text/event-stream"
    assert (reply.status, kind) == (200, stream if streams else JSON)


@pytest.mark.parametrize("path", [path for method, path in OPERATIONS if method == "GET"])
async def test_a_get_is_answered_as_described(path):
    async with Backend() as backend, pi_for(backend.port) as pi:
        reply = await pi.get(path.replace("{id}", "qwen_7b"))
        (kind,) = OPERATIONS["GET", path]["responses"]["200"]["content"]
        assert (reply.status, reply.one("Content-Type").partition(";")[0]) == (200, kind)


@pytest.mark.clients
@pytest.mark.nightly
def test_schemathesis_finds_nothing(tmp_path):
    """Thousands of requests made from the document, valid and invalid, and each response held
    against it.

    The document allows some requests that are refused. Some requests are left out: the method
    QUERY, which gets 501 whatever the path, and those that schemathesis_hooks.py names.
    """
    pytest.importorskip("schemathesis")
    (tmp_path / "openapi.json").write_text(json.dumps(DOCUMENT))
    methods = json.dumps(sorted({*METHODS.split(", ")} - {"HEAD"}))  # schemathesis knows no HEAD
    settings = f"[phases.coverage]\nunexpected-methods = {methods}\n"
    (tmp_path / "schemathesis.toml").write_text(settings)
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(in_a_thread(Backend(tokens=TOKENS)))
        url = f"http://127.0.0.1:{backend.port}"
        pi = stack.enter_context(daemon("cm4d", tmp_path, CEREBRUM_VPS_URL=url))
        pi.wait_for_line("VPS backend is available")
        options = f"run openapi.json --url http://127.0.0.1:{pi.port} --seed 1 --max-examples 10"
        options += " --warnings off --exclude-checks=positive_data_acceptance"
        command = [sys.executable, "-m", "schemathesis.cli", *options.split()]
        command += ["--header", f"X-API-Key: {KEY}"]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        more = {"PYTHONPATH": paths, "SCHEMATHESIS_HOOKS": "schemathesis_hooks"}
        result = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, **more}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        (passed,) = re.findall(r"\d+ generated, (\d+) passed", result.stdout)
        assert int(passed) > 500
        assert pi.complaints() == ""
