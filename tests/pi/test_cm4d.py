"""cm4d from its client's side: configuration, endpoints and errors of the API text, places,
sessions, a process.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
import time
from itertools import product

import pytest
from harness import (
    KEY,
    PATIENCE,
    ROOT,
    SHIPPED,
    Client,
    daemon,
    rows,
    run_to_the_end,
    until,
    variables,
)
from scripted import (
    CHUNKED,
    DONE,
    GOOD,
    HANG,
    USUAL,
    Backend,
    Flood,
    answer,
    chunk,
    config_of,
    error,
    event,
    gated,
    head,
    pi_for,
    pi_with,
    token,
)

from cerebrum.pi import backend as pi_backend
from cerebrum.pi.backend import KINDS
from cerebrum.pi.upstream import Endpoint
from cerebrum.settings import ConfigError, Environment, load_catalog
from cerebrum.text.languages import LANGUAGES
from cerebrum_common import HttpError
from cm4d import Config, load_config, read_native, warn_of

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")
PATHS = ("/v1/complete", "/v1/complete/stream")


# ------------------------------------------------------------------------------------ configuration


def test_defaults():
    config = load_config(Environment({}))
    endpoint = Endpoint("127.0.0.1", 9000, "127.0.0.1:9000", "", False)
    backends = (config_of("vps", endpoint, key_env="CEREBRUM_API_KEY"),)
    usual = USUAL | {"prefer": config.prefer, "state_dir": config.state_dir}
    assert config == Config(backends=backends, **usual)
    (backend,) = load_config(Environment({"CEREBRUM_VPS_URL": "http://[fd7a::1]:9000"})).backends
    assert backend.endpoint == Endpoint("fd7a::1", 9000, "[fd7a::1]:9000", "", False)


BAD_VARIABLES = r"""
CEREBRUM_VPS_URL        | 127.0.0.1:9000
CEREBRUM_VPS_URL        | ftp://vps
CEREBRUM_VPS_URL        | http://vps:0
CEREBRUM_VPS_URL        | http://user:pass@vps
CEREBRUM_VPS_URL        | http://vps/\r\nX: y
CEREBRUM_CM4_HOST       | two words
CEREBRUM_LOG_LEVEL      | LOUD
CEREBRUM_CM4_PORT       | 7e3
CEREBRUM_MAX_CONCURRENT | 0
CEREBRUM_API_KEY        | two words
CEREBRUM_MODELS_FILE    | /nonexistent/models.toml
"""


@pytest.mark.parametrize(("name", "value"), rows(BAD_VARIABLES))
def test_a_bad_variable_is_named(name, value):
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        load_config(Environment({name: value}))
    assert "KEY" not in name or value not in str(caught.value)


SECRET = "gsk_Ab12345678"  # of a form that a variable, a host or a path could have, too
LINE = f"http://100.64.0.1:9000 {SECRET}"  # as `cerebrum-backend setup` prints it
TABLE = '[[backends]]\nid = "a"\nurl = "http://a"\n'
PASTED = [  # variables, and the backends of models.toml
    *(
        ({f"CEREBRUM_{name}": LINE}, "")
        for name in ("VPS_URL", "CM4_HOST", "API_KEY", "CM4_KEYS_FILE")
    ),
    *(({"CEREBRUM_CM4_KEYS_FILE": text}, "") for text in (SECRET, SECRET * 99, f"/{SECRET}")),
    ({"CEREBRUM_VPS_URL": f"http://user:{SECRET}@vps"}, ""),
    ({"CEREBRUM_VPS_URL": SECRET}, ""),
    *(
        ({}, TABLE.replace(old, new))
        for old, new in product(("http://a", '"a"'), (LINE, f'"{SECRET} "', f'["{SECRET}"]'))
    ),
    *(({}, TABLE + f'{name} = "{SECRET}"') for name in ("api", "n_ctx", "infill", "key")),
    *(({}, TABLE + f'key_env = "{text}"') for text in (f"{SECRET}-", f"{SECRET} ")),
    *(({}, f"backends = {text}") for text in (f'"{SECRET}"', f'["{SECRET}"]')),
]


@pytest.mark.parametrize(("variables", "backends"), PASTED)
def test_no_text_is_shown_that_may_be_a_key(variables, backends, tmp_path):
    (tmp_path / "models.toml").write_text(backends + "\n" + (ROOT / "models.toml").read_text())
    with pytest.raises(ConfigError) as caught:
        load_config(
            Environment({"CEREBRUM_MODELS_FILE": str(tmp_path / "models.toml"), **variables})
        )
    assert SECRET not in str(caught.value)


def test_a_key_in_key_env_is_not_shown(tmp_path, caplog):
    """Nor in the answer to a client, if the backend refuses it."""
    (tmp_path / "models.toml").write_text(
        f'{TABLE}key_env = "{SECRET}"\n' + (ROOT / "models.toml").read_text()
    )
    config = load_config(Environment({"CEREBRUM_MODELS_FILE": str(tmp_path / "models.toml")}))
    warn_of(config)
    refused = KINDS["openai"](config.backends[0], []).refusal(401, {}).message
    assert caplog.messages == [
        "a: the variable of key_env is not set: it will refuse every completion"
    ]
    assert refused.endswith("the right one in the variable of key_env")


# ----------------------------------------------------------------------------------------- requests

GOOD_FIELDS = {"prompt": "x =", "language": "python"}
EDITOR = GOOD_FIELDS | {"session": "editor"}
FIELDS = [
    ("prompt", ["a"], ["", None, 7]),
    ("language", ["c"], ["", None, "Python", "c" * 41]),
    ("max_tokens", [1, 2048], [0, 2049, True]),
    ("temperature", [0, 1], [-0.1, 1.1]),
    ("top_p", [0.1, 1], [0, 1.1]),
    ("seed", [0, 2**32 - 2], [-1, 1.5, 2**32 - 1]),
    ("stop", [[], ["a"] * 16, "a"], [["a"] * 17, [""], [1]]),
    ("mode", ["complete"], ["edit"]),
    ("stop_at", ["none"], ["end"]),
    ("progress", [True], [1]),
    ("suffix", [""], [1]),
    ("session", ["s" * 200], ["", "s" * 201]),
]


@pytest.mark.parametrize(("field", "good", "bad"), FIELDS)
def test_a_bad_field_is_named(field, good, bad):
    for value in good:
        read = getattr(read_native(GOOD_FIELDS | {field: value}, SHIPPED), field)
        assert read in (value, [value])
    for value in bad:
        body = GOOD_FIELDS | {field: value}
        if value is None:
            del body[field]
        with pytest.raises(HttpError, match=f"^{field}: expected ") as caught:
            read_native(body, SHIPPED)
        assert caught.value.status == 400
        assert caught.value.code == "INVALID_REQUEST"


SENT = json.loads("""{
    "mode": "complete", "max_tokens": 512, "temperature": 0.4, "stop_at": "auto", "progress": false,
    "stop": [], "indent": 0, "predict_ms": 0, "special": false, "model": "qwen_0_5b",
    "heal": true}""")


async def test_defaults_of_a_completion_and_what_reaches_the_vps():
    async with pi_with() as (pi, backend):
        await pi.stream()
        more = {"stop": "END", "seed": 7, "top_p": 0.5, "stop_at": "none", "max_tokens": 9}
        await pi.complete(**more, temperature=0, language="rust", session="s" * 200)
        first, second = backend.completions
        assert first == GOOD_FIELDS | SENT
        expected = {"stop": ["END"], "temperature": 0.0, "language": "rust", "model": "qwen_0_5b"}
        assert second == second | more | expected
        assert re.fullmatch("[0-9a-f]{64}", second["session"])


# ------------------------------------------------------------------------------------ the endpoints


async def test_complete_has_the_fields_of_the_text_and_the_vps():
    silent = [
        CHUNKED,
        chunk(token("h\u00e9\U0001f600", 1)),
        chunk(b'data: {"done": true}\n\n'),
        b"0\r\n\r\n",
    ]
    told = [*GOOD[:3], chunk(DONE.replace(b"0.25", b"1.23456")), GOOD[4]]
    async with pi_with(told, silent) as (pi, backend):
        reply = await pi.complete()
        assert reply.status == 200
        assert reply.one("Content-Type") == "application/json"
        assert TIMESTAMP.fullmatch(reply.json["timestamp"])
        result = {"completion": "ab", "total_tokens": 2, "inference_time": 1.235}
        assert reply.json == reply.json | result | {"finish_reason": "stop", "prompt_tokens": 5}
        second = (
            await pi.complete(prompt="# \u00fc\n")
        ).json  # measured where the VPS says nothing
        assert second["completion"] == "h\u00e9\U0001f600"
        assert second["total_tokens"] == 1
        assert 0 <= second["inference_time"] == round(second["inference_time"], 3) < 60
        assert backend.completions[1]["prompt"] == "# \u00fc\n"


async def test_health_and_stats_and_models_while_the_vps_is_up():
    async with pi_with() as (pi, backend):
        await pi.stream()
        asked = len(backend.asked)
        health, stats, _ = [await pi.get(path) for path in ("/health", "/v1/stats", "/v1/models")]
        assert len(backend.asked) == asked, "the VPS is asked per call"
        assert health.status == 200
        assert health.json["status"] == "healthy"
        assert health.json["vps_available"]
        assert health.json.keys() == {"status", "timestamp", "vps_available", "uptime", "backends"}
        assert health.json["backends"] == [{"id": "vps", "available": True, "message": ""}]
        (told,) = stats.json["backends"]
        assert told.pop("breaker") == stats.json["breaker"]
        assert told.pop("response_time_ms") == stats.json["vps_response_time_ms"] > 0
        about = {"id": "vps", "api": "cerebrum", "version": "1.0.9", "tokens_total": 2}
        assert told == told | {**about, "requests_total": 1, "models": ["qwen_0_5b"]}
        assert 5 < stats.json["memory_mb"] < 500


async def test_a_vps_that_refuses_our_key_is_not_healthy():
    refusal = error(401, "UNAUTHORIZED")
    async with Backend(models=refusal) as backend, pi_for(backend.port) as pi:
        health = await pi.get("/health")
        assert (health.status, health.json["status"]) == (503, "unhealthy")
        assert "refuses our key" in health.json["message"]


@pytest.mark.parametrize(
    "health", [answer(500, {}), answer(200, [1]), head(302, "Location: /x"), b"nonsense"]
)
async def test_a_bad_health_is_no_health(health):
    async with Backend(health=health) as backend, pi_for(backend.port) as pi:
        assert (await pi.get("/health")).status == 503


@pytest.mark.parametrize(
    ("told", "loaded"), [(["a", 1, None, "b"], ["a", "b"]), ("no", []), (None, [])]
)
async def test_a_health_that_lies_about_the_models_in_memory(told, loaded):
    async with (
        Backend(health=answer(200, {"models_loaded": told})) as backend,
        pi_for(backend.port) as pi,
    ):
        assert pi.first.models_loaded == loaded


async def test_an_answer_has_the_request_id_and_the_vps_gets_it():
    async with pi_with() as (pi, backend):
        reply = await pi.post("/v1/complete", GOOD_FIELDS, X_Request_ID="abc-1")
        assert reply.one("X-Request-ID") == backend.asked[-1][1]["x-request-id"] == "abc-1"


# ------------------------------------------------------------------------------------------- places


TOKEN_A = chunk(token("a", 1))
HANGS = {
    "before its head": [HANG],
    "after its head": [CHUNKED, HANG],
    "after a token": [CHUNKED, TOKEN_A, HANG],
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hang", HANGS)
async def test_a_client_that_leaves_frees_its_place_and_the_vps(path, hang):
    async with pi_with(HANGS[hang]) as (pi, backend):
        _, writer = await pi.open("POST", path, GOOD_FIELDS)
        await backend.begun.wait()
        assert pi.active == 1
        writer.transport.abort()
        await until(lambda: backend.left.is_set() and not pi.active, seconds=20)  # < IDLE_SECONDS
        assert pi.first.breaker.failures == 0


# ----------------------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("hang", HANGS)
@pytest.mark.parametrize("by", ["the Pi", "the VPS"])
async def test_a_newer_completion_of_a_session_ends_the_older(hang, path, by):
    """The Pi needs no VPS for this: one that hangs keeps neither the older completion nor its
    place. Two Pis with the same client are one client to the VPS, so it ends the older request
    itself, which is no failure.
    """
    begun = hang != "before its head"
    ended = chunk(event(error=True, message="m", code="SUPERSEDED"))
    script = HANGS[hang]
    if by == "the VPS":
        script = [*script[:-1], ended] if begun else [error(409, "SUPERSEDED")]
    async with pi_with(script, GOOD, max_concurrent=1) as (pi, vps):
        older = asyncio.create_task(pi.post(path, EDITOR))
        await vps.begun.wait()
        if by == "the Pi":
            assert (await pi.stream(session="another")).status == 429
            assert (await pi.stream(session="editor")).clean
            assert vps.most_running == 1, "the newer one was sent while the older still ran"
        reply, is_stream = await older, path.endswith("stream") and begun
        # 409, or an error event and a cut once a stream has begun.
        assert (reply.status, reply.clean) == ((200, False) if is_stream else (409, True))
        assert (reply.events[-1] if is_stream else reply.json)["code"] == "SUPERSEDED"
        first = pi.first
        assert first.requests_failed == 0
        assert first.breaker.failures == 0
        assert pi.gateway.counting.failed == (by == "the Pi"), "the 429 alone has failed"


async def test_a_client_that_reads_nothing_cannot_keep_the_place_of_its_session(monkeypatch):
    monkeypatch.setattr(pi_backend, "MAX_TEXT_BYTES", sys.maxsize)
    scripts = [[CHUNKED, Flood(TOKEN_A * 1000)], GOOD]
    async with pi_with(*scripts, max_concurrent=1) as (pi, backend):
        _, writer = await pi.open("POST", "/v1/complete/stream", EDITOR)
        await until(lambda: pi.server.connections)
        (connection,) = pi.server.connections.values()
        await until(lambda: connection.transport.get_write_buffer_size() > 65_536)
        assert (await pi.stream(session="editor")).clean
        await backend.left.wait()
        assert pi.active == 0
        writer.transport.abort()


REFUSED = [({"model": "gpt"}, "MODEL_NOT_FOUND"), ({}, "VPS_UNAVAILABLE")]


@pytest.mark.parametrize(("more", "code"), REFUSED)
async def test_a_newer_completion_that_is_refused_or_another_clients_ends_nothing(more, code):
    go = asyncio.Event()
    async with pi_with(gated(go)) as (pi, backend):
        older = asyncio.create_task(pi.stream(session="editor"))
        others = asyncio.create_task(pi.from_address("127.0.0.2").stream(session="editor"))
        await until(lambda: len(backend.completions) == 2)
        if not more:
            pi.first.breaker.open(time.monotonic())
        assert (await pi.complete(session="editor", **more)).json["code"] == code
        go.set()
        assert (await older).clean
        assert (await others).clean
        assert len({body["session"] for body in backend.completions}) == 2


# ----------------------------------------------------------------------------- routing and fitting


IDS = ("qwen_7b", "codellama_7b", "qwen_1_5b", "qwen_0_5b")
ALL = answer(200, {"models": [{"id": id} for id in IDS]})
PREFER = {"infill": ("qwen_0_5b", "qwen_1_5b"), "instruct": ("codellama_7b", "qwen_1_5b")}
CHOSEN = [({"suffix": "\n)"}, "qwen_0_5b"), ({"instruction": "Write it"}, "qwen_1_5b")]


@pytest.mark.parametrize(("asked", "model"), CHOSEN)
async def test_which_model_answers(asked, model):
    """The first that is preferred, and lists the language; test_dispatcher.py has more cases. The
    prompt may be empty beside a suffix or an instruction.
    """
    async with Backend(models=ALL) as backend, pi_for(backend.port, prefer=PREFER) as pi:
        reply = await pi.complete(prompt="", **asked)
        assert reply.json["model"] == backend.completions[0]["model"] == model


async def test_any_language_that_models_toml_names_may_be_asked_for(tmp_path):
    path = tmp_path / "models.toml"
    text = (ROOT / "models.toml").read_text()
    path.write_text(text.replace('languages = ["rust"', 'languages = ["cobol", "C#", "rust"'))
    async with (
        Backend(models=ALL) as backend,
        pi_for(backend.port, models=load_catalog(path, LANGUAGES).models) as pi,
    ):
        for language, model in (
            ("java", "qwen_7b"), ("cobol", "codellama_7b"),
            ("C#", "codellama_7b"), ("cs", "qwen_7b"),
        ):  # fmt: skip
            assert (await pi.complete(language=language)).json["model"] == model
        assert [sent.get("language") for sent in backend.completions] == [
            "java",
            None,
            "csharp",
            "csharp",
        ]
        refused = (await pi.complete(language="abap")).json["message"]
        listed = ", ".join([*LANGUAGES, "cobol", "C#"])
        assert refused == f'language: expected one of {listed}, got the string "abap"'
        changed = (await pi.complete(language="abap", instruction="rename x")).json
        assert (changed["language"], changed["model"]) == ("abap", "codellama_7b")
        sent = backend.completions[-1]
        assert "language" not in sent
        assert sent["messages"][-1]["content"] == "```abap\n"


# The ids of VS Code's documentation; then those that only Neovim, lsp-mode of Emacs, eglot or Helix
# sends.
EDITORS = """
javascriptreact=javascript typescriptreact=typescript js=javascript tsx=typescript
jsonc=json json5=json less=css scss=css mhtml=html dockercompose=yaml mdx=markdown make=makefile
shellscript=shell sh=shell bash=shell zsh=shell ps1=powershell
cs=csharp c-sharp=csharp c++=cpp
"""
UNKNOWN = ("abap", "cuda-cpp", "objective-c", "plaintext", "vue", "text", "vim", "")


def test_editors_names_of_a_language_are_known():
    for name, language in {**variables(EDITORS), **{name: name for name in LANGUAGES}}.items():
        assert read_native({"prompt": "x", "language": name}, SHIPPED).language == language, name
    for name in UNKNOWN:
        with pytest.raises(HttpError, match="language: expected ") as refused:
            read_native({"prompt": "x", "language": name}, SHIPPED)
        assert refused.value.code == "INVALID_REQUEST"


async def test_a_long_prompt_is_fitted_and_refitted_once_before_the_first_token():
    """An event may say that it is too long: vpsd begins its answer before it has loaded the model,
    which counts.
    """
    long = "".join(f"value_{n} = {n}\n" for n in range(4000))
    counts = {"prompt_tokens": 4000, "n_ctx": 1024}
    early = [error(400, "INVALID_REQUEST", **counts)]
    late = chunk(event(error=True, message="m", code="INVALID_REQUEST", **counts))
    scripts = [early, GOOD, [CHUNKED, late], GOOD, early, early, [CHUNKED, TOKEN_A, late]]
    async with pi_with(*scripts) as (pi, backend):
        for _ in range(2):
            assert (await pi.complete(prompt=long, max_tokens=256)).status == 200
            first, second = (len(body["prompt"]) for body in backend.completions[-2:])
            assert second < 0.6 * first < first < len(long)
        reply = await pi.complete(prompt=long, max_tokens=256)
        assert reply.status == 400
        assert reply.json["code"] == "INVALID_REQUEST"
        assert reply.json["prompt_tokens"] == 4000
        assert (await pi.stream()).said == "a INVALID_REQUEST"
        assert len(backend.completions) == 7


# ----------------------------------------------------------------------------------- a real process


async def test_from_start_to_stop(tmp_path):
    """A stream that runs when SIGTERM comes is finished."""
    go, file = asyncio.Event(), tmp_path / "logs" / "cm4.log"
    async with Backend([GOOD, [CHUNKED, TOKEN_A, go.wait, *GOOD[2:]]]) as backend:
        more = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}", "CEREBRUM_CM4_API_KEY": ""}
        with daemon("cm4d", tmp_path, CEREBRUM_LOG_FILE=str(file), **more) as process:
            await asyncio.to_thread(process.wait_for_line, "VPS backend is available")
            client = Client(port=process.port)
            reply = await client.post("/v1/complete/stream", GOOD_FIELDS, X_Request_ID="the-id")
            assert reply.said.split() == ["a", "b"]
            assert reply.events[-1]["done"]
            line = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - INFO - \[the-id\] POST /v1/complete/stream"
            line += r" 200 \d+\.\d\ds model=qwen_0_5b tokens=2 ttft=\d\.\d\ds$"
            running = asyncio.create_task(client.stream())
            await until(lambda: len(backend.completions) == 2)
            process.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait_for_line, "stopping")
            go.set()
            assert (await running).clean
            await asyncio.to_thread(process.process.wait, PATIENCE)
        assert re.search(line, file.read_text(), re.M)
        assert KEY not in process.stdout() + process.stderr()


def test_an_address_that_is_not_there_yet_is_no_wrong_configuration(tmp_path):
    """The unit restarts the daemon after a status of 1, and never after 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_to_the_end("cm4d", tmp_path, CEREBRUM_CM4_PORT=port)
    said = done.stdout + done.stderr
    assert re.search(rf" - ERROR - \[-\] cannot listen on 127.0.0.1 port {port}: .", said)
    assert done.returncode == 1
    assert "Traceback" not in said
    assert "CEREBRUM_CM4" not in said
