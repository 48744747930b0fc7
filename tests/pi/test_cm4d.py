"""cm4d from its client's side: configuration, endpoints and errors of the API text, places, sessions, a process."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from harness import KEY, PATIENCE, ROOT, Client, Reply, daemon, run_to_the_end, until
from scripted import (
    CHUNKED,
    DONE,
    GOOD,
    HANG,
    MODELS,
    Backend,
    Flood,
    answer,
    chunk,
    error,
    event,
    head,
    open_breaker,
    pi_for,
    token,
)

import cm4d
from cerebrum.pi import fleet as pi_fleet
from cerebrum.pi import upstream as pi_upstream
from cerebrum.pi.backend import MARGIN_TOKENS, prompt_budget
from cerebrum.pi.completion import Completion
from cerebrum.pi.dialects import CompletionRequest
from cerebrum.pi.upstream import BackendConfig, Endpoint, read_text
from cerebrum.settings import ConfigError, Environment, load_catalog
from cerebrum.text.languages import LANGUAGES
from cm4d import load_config, read_completion

TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}")
REQUEST_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
OF_CODELLAMA = ("rust", "c", "cpp", "go")
OF_QWEN = [name for name in LANGUAGES if name not in OF_CODELLAMA]
KNOWN = ", ".join([*OF_QWEN, *OF_CODELLAMA])


# ---------------------------------------------------------------------------------------- configuration


def test_defaults():
    config = load_config(Environment({}))
    assert (config.host, config.port) == ("0.0.0.0", 7000)
    assert (config.client_keys, config.log_level, config.log_file, config.log_prompts) == ((), "INFO", "", False)
    assert config.backends == (
        BackendConfig(
            id="vps",
            endpoint=Endpoint("127.0.0.1", 9000, "127.0.0.1:9000", "", False),
            api="cerebrum",
            key="",
            key_env="CEREBRUM_API_KEY",
            max_concurrent=2,
        ),
    )
    assert [model.id for model in config.models] == ["qwen_7b", "codellama_7b", "qwen_1_5b", "qwen_0_5b"]


@pytest.mark.parametrize(
    ("url", "host", "port", "authority", "prefix", "tls"),
    [
        ("http://vps", "vps", 80, "vps", "", False),
        ("http://[fd7a::1]:9000", "fd7a::1", 9000, "[fd7a::1]:9000", "", False),
    ],
)
def test_vps_url(url: str, host: str, port: int, authority: str, prefix: str, tls: bool):
    (backend,) = load_config(Environment({"CEREBRUM_VPS_URL": url})).backends
    assert backend.endpoint == Endpoint(host, port, authority, prefix, tls)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CEREBRUM_VPS_URL", "127.0.0.1:9000"),
        ("CEREBRUM_VPS_URL", "ftp://vps"),
        ("CEREBRUM_VPS_URL", "http://vps:0"),
        ("CEREBRUM_VPS_URL", "http://vps:65536"),
        ("CEREBRUM_VPS_URL", "http://user:pass@vps"),
        ("CEREBRUM_VPS_URL", "http://vps/\r\nX: y"),
        ("CEREBRUM_CM4_HOST", "two words"),
        ("CEREBRUM_LOG_LEVEL", "LOUD"),
        ("CEREBRUM_CM4_PORT", "65536"),
        ("CEREBRUM_CM4_PORT", "-1"),
        ("CEREBRUM_CM4_PORT", "7e3"),
        ("CEREBRUM_MAX_CONCURRENT", "0"),
        ("CEREBRUM_MAX_CONCURRENT", "two"),
        ("CEREBRUM_API_KEY", "two words"),
        ("CEREBRUM_API_KEY", "schlüssel"),
        ("CEREBRUM_CM4_API_KEY", "a\nb"),
        ("CEREBRUM_MODELS_FILE", "/nonexistent/models.toml"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str):
    with pytest.raises(ConfigError, match=f"^{name}: ") as caught:
        load_config(Environment({name: value}))
    assert "KEY" not in name or value not in str(caught.value)


# --------------------------------------------------------------------------------------------- requests

GOOD_FIELDS = {"prompt": "x =", "language": "python"}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("prompt", None, "prompt: expected a non-empty string, got nothing"),
        ("prompt", 7, "prompt: expected a non-empty string, got the number 7"),
        ("language", None, "language: expected a non-empty string, got nothing"),
        ("language", "Python", f'language: expected one of {KNOWN}, got the string "Python"'),
        ("max_tokens", 0, "max_tokens: expected an integer from 1 to 2048, got the number 0"),
        ("max_tokens", 2049, "max_tokens: expected an integer from 1 to 2048, got the number 2049"),
        ("max_tokens", True, "max_tokens: expected an integer from 1 to 2048, got the boolean true"),
        ("temperature", -0.1, "temperature: expected a number from 0 to 1, got the number -0.1"),
        ("temperature", 1.1, "temperature: expected a number from 0 to 1, got the number 1.1"),
        ("top_p", 0, "top_p: expected a number above 0 to 1, got the number 0"),
        ("mode", "edit", 'mode: expected one of auto, complete, infill, instruct, got the string "edit"'),
        ("stop_at", "end", 'stop_at: expected one of auto, none, got the string "end"'),
        ("progress", 1, "progress: expected true or false, got the number 1"),
        ("suffix", 1, "suffix: expected a string, got the number 1"),
    ],
)
async def test_a_bad_field_is_named(field: str, value: Any, message: str):
    body = GOOD_FIELDS | {field: value}
    if value is None:
        del body[field]
    async with Backend() as backend, pi_for(backend.port) as pi:
        for path in ("/v1/complete", "/v1/complete/stream"):
            reply = await pi.ask("POST", path, body)
            assert (reply.status, reply.json["code"], reply.json["message"]) == (400, "INVALID_REQUEST", message)
            assert reply.json["error"] is True
            assert TIMESTAMP.fullmatch(reply.json["timestamp"])
        assert backend.completions == []


@pytest.mark.parametrize("field", [{"stop": ["a"] * 17}, {"stop": [""]}, {"stop": [1]}, {"seed": -1}, {"seed": 1.5}])
def test_further_fields_have_ranges(field: dict[str, Any]):
    with pytest.raises(cm4d.HttpError) as caught:
        read_completion(GOOD_FIELDS | field, load_catalog(ROOT / "models.toml").models)
    assert (caught.value.status, caught.value.message.partition(":")[0]) == (400, next(iter(field)))


async def test_defaults_of_a_completion_and_what_reaches_the_vps():
    async with Backend() as backend, pi_for(backend.port) as pi:
        await pi.stream()
        more = {"stop": "END", "seed": 7, "top_p": 0.5, "stop_at": "none", "max_tokens": 9}
        await pi.complete(**more, temperature=0, language="rust", session="s" * 200)
        first, second = backend.completions
        assert first == {
            "model": "qwen_0_5b",
            "prompt": "x =",
            "heal": True,
            "mode": "complete",
            "language": "python",
            "max_tokens": 512,
            "temperature": 0.4,
            "stop_at": "auto",
            "progress": False,
        }
        expected = more | {"stop": ["END"], "temperature": 0.0, "language": "rust", "model": "qwen_0_5b"}
        assert {name: second[name] for name in expected} == expected
        assert re.fullmatch("[0-9a-f]{64}", second["session"])


def test_an_empty_prompt_is_allowed_beside_a_suffix_or_an_instruction():
    models = load_catalog(ROOT / "models.toml").models
    assert read_completion({"prompt": "", "language": "go", "suffix": "}\n"}, models)["mode"] == "infill"
    assert (
        read_completion({"prompt": "", "language": "go", "instruction": "Write a queue"}, models)["mode"] == "instruct"
    )


# ----------------------------------------------------------------------------------------- the endpoints


async def test_complete_has_the_fields_of_the_text_and_the_vps():
    async with Backend() as backend, pi_for(backend.port) as pi:
        reply = await pi.complete()
        assert (reply.status, reply.one("Content-Type")) == (200, "application/json")
        assert list(reply.json)[:6] == [
            "completion", "language", "model", "total_tokens", "inference_time", "timestamp"
        ]  # fmt: skip
        assert TIMESTAMP.fullmatch(reply.json["timestamp"])
        told = {name: reply.json[name] for name in ("completion", "language", "model", "total_tokens")}
        assert told == {"completion": "ab", "language": "python", "model": "qwen_0_5b", "total_tokens": 2}
        assert (reply.json["inference_time"], reply.json["mode"]) == (0.25, "complete")
        assert (reply.json["finish_reason"], reply.json["prompt_tokens"]) == ("stop", 5)


async def test_the_seam_yields_pairs_that_any_api_can_render():
    progress = {"stage": "prefill", "done": 1, "total": 2}
    told = [chunk(b": hello\n\n"), chunk(event(progress=progress)), chunk(token("a", 1) + token("b", 2)), chunk(DONE)]
    script = [CHUNKED, *told, b"0\r\n\r\n"]
    async with Backend([script, [CHUNKED]]) as backend, pi_for(backend.port) as pi:
        fields = read_completion(GOOD_FIELDS, pi.gateway.config.models)
        *pairs, (kind, result) = [pair async for pair in pi.gateway.complete(Completion(CompletionRequest("", fields)))]
        begun = {"model": "qwen_0_5b", "n_ctx": 4096, "kept": {"characters": 3, "of": 3, "parts": ["all"]}}
        assert pairs == [
            ("started", begun), ("idle", None), ("progress", progress), ("text", token("a", 1) + token("b", 2)),
        ]  # fmt: skip
        assert (kind, result["model"], result["total_tokens"]) == ("done", "qwen_0_5b", 2)
        assert "done" not in result
        assert read_text(pairs[-1][1]) == "ab"
        broken = pi.gateway.complete(Completion(CompletionRequest("", fields)))
        assert await anext(broken) == ("started", begun)
        with pytest.raises(pi_upstream.BackendFailure, match="in the middle of its answer"):
            await anext(broken)


async def test_inference_time_is_rounded_and_measured_where_the_vps_is_silent():
    done = json.dumps({"done": True, "inference_time": 1.23456}).encode()
    silent = b'{"done": true}'

    def script(done: bytes) -> list[Any]:
        return [CHUNKED, chunk(token("a", 1)), chunk(b"data: " + done + b"\n\n"), b"0\r\n\r\n"]

    async with Backend([script(done), script(silent)]) as backend, pi_for(backend.port) as pi:
        first, second = (await pi.complete()).json, (await pi.complete()).json
        assert (first["inference_time"], first["total_tokens"]) == (1.235, 1)
        assert 0 <= second["inference_time"] < 5
        assert second["inference_time"] == round(second["inference_time"], 3)


async def test_unicode_survives_both_ways():
    script = [CHUNKED, chunk(token("h\u00e9\U0001f600", 1)), chunk(DONE), b"0\r\n\r\n"]
    async with Backend([script]) as backend, pi_for(backend.port) as pi:
        assert (await pi.complete(prompt="# \u00fc\n")).json["completion"] == "h\u00e9\U0001f600"
        assert backend.completions[0]["prompt"] == "# \u00fc\n"
        assert b"\\ud83d" in (await pi.stream()).body


async def test_health_and_stats_and_models_while_the_vps_is_up():
    async with Backend() as backend, pi_for(backend.port) as pi:
        await pi.stream()
        asked = len(backend.asked)
        health, stats = await pi.get("/health"), await pi.get("/v1/stats")
        models = await pi.get("/v1/models")
        assert len(backend.asked) == asked, "the VPS is asked per call"
        assert (health.status, set(health.json)) == (
            200,
            {"status", "timestamp", "vps_available", "uptime", "backends"},
        )
        assert health.json["backends"] == [{"id": "vps", "available": True, "message": ""}]
        assert (health.json["status"], health.json["vps_available"]) == ("healthy", True)
        assert stats.json.keys() == {
            "uptime", "requests_total", "requests_active", "vps_available", "vps_response_time_ms", "memory_mb",
            "load_avg", "breaker", "backends", "type_through", "shared", "replaced", "accepted", "accepted_characters",
                "clients",
        }  # fmt: skip
        (told,) = stats.json["backends"]
        assert told.pop("breaker") == stats.json["breaker"]
        assert told.pop("response_time_ms") == stats.json["vps_response_time_ms"]
        assert told == {
            "id": "vps",
            "api": "cerebrum",
            "available": True,
            "message": "",
            "requests_total": 1,
            "requests_active": 0,
            "requests_failed": 0,
            "max_concurrent": 2,
            "tokens_total": 2,
            "models": ["qwen_0_5b"],
            "models_loaded": [],
        }
        assert (stats.json["requests_total"], stats.json["requests_active"]) == (1, 0)
        assert 0 < stats.json["vps_response_time_ms"] < 5000
        assert 5 < stats.json["memory_mb"] < 500
        assert len(stats.json["load_avg"]) == 3
        assert models.json["models"][0] == {
            "id": "qwen_7b",
            "name": "Qwen 7B",
            "languages": OF_QWEN,
            "parameters": "7B",
            "quantization": "Q4",
            "available": False,
            "backends": [],
        }
        assert models.json["models"][3]["backends"] == ["vps"]
        assert [model["available"] for model in models.json["models"]] == [False, False, False, True]


async def test_health_and_stats_and_models_while_the_vps_is_down():
    async with Backend() as backend:
        port = backend.port
    async with pi_for(port) as pi:
        health, stats = await pi.get("/health"), await pi.get("/v1/stats")
        assert (health.status, health.json["vps_available"], health.json["code"]) == (503, False, "VPS_UNAVAILABLE")
        assert (stats.json["vps_available"], stats.json["vps_response_time_ms"]) == (False, None)
        why = "VPS backend is unavailable (connection refused)"
        assert health.json["message"] == (await pi.get("/v1/activity")).json["vps_message"] == why
        models = (await pi.get("/v1/models")).json["models"]
        assert [model["available"] for model in models] == [False] * 4


@pytest.mark.parametrize("noticed_by", ["a probe", "a request"])
async def test_keys_that_do_not_match_are_not_healthy(monkeypatch: pytest.MonkeyPatch, noticed_by: str):
    unauthorized = error(401, "UNAUTHORIZED", "expected the API key")
    words = "VPS backend refuses our key: CEREBRUM_API_KEY of the Pi and CEREBRUM_API_KEY of the VPS do not match"
    probed = noticed_by == "a probe"
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 0.05 if probed else 2 * PATIENCE)
    models = unauthorized if probed else answer(200, MODELS)
    async with Backend([[unauthorized], GOOD], models=models) as backend, pi_for(backend.port) as pi:
        asks = [lambda: pi.get("/health"), pi.complete] if probed else [pi.stream, lambda: pi.get("/health")]
        for ask in asks:
            reply = await ask()
            assert (reply.status, reply.json["code"], reply.json["message"]) == (503, "VPS_UNAVAILABLE", words)
        health = (await pi.get("/health")).json
        assert (health["status"], health["vps_available"]) == ("unhealthy", False)
        assert (await pi.get("/v1/stats")).json["vps_available"] is False
        assert pi.gateway.fleet.first.breaker.describe(0)["failures"] == 0
        if probed:
            backend.models = answer(200, MODELS)
            await until(lambda: pi.gateway.fleet.available)
        replies = [await ask() for ask in asks]
        assert [(reply.status, reply.clean) for reply in replies] == [(200, True)] * 2


@pytest.mark.parametrize(
    "health",
    [answer(500, {}), answer(200, [1]), head(200, "Content-Length: 2") + b"no", head(302, "Location: /x"), b"nonsense"],
    ids=["500", "array", "text", "redirect", "nonsense"],
)
async def test_a_bad_health_is_no_health(health: bytes):
    async with Backend(health=health) as backend, pi_for(backend.port) as pi:
        assert (await pi.get("/health")).status == 503


async def test_every_answer_has_the_request_id_and_the_vps_gets_it():
    async with Backend() as backend, pi_for(backend.port) as pi:
        reply = await pi.ask("POST", "/v1/complete", GOOD_FIELDS, X_Request_ID="abc-1")
        assert reply.one("X-Request-ID") == "abc-1"
        assert backend.asked[-1][1]["x-request-id"] == "abc-1"
        made = (await pi.stream()).one("X-Request-ID")
        assert REQUEST_ID.fullmatch(made)
        assert backend.asked[-1][1]["x-request-id"] == made


async def test_a_client_key_is_needed_everywhere_but_for_health():
    async with Backend() as backend, pi_for(backend.port, client_keys=("secret",)) as pi:
        for method, path in [
            ("GET", "/v1/models"),
            ("GET", "/v1/stats"),
            ("POST", "/v1/complete"),
            ("GET", "/nothing"),
        ]:
            reply = await pi.ask(method, path, GOOD_FIELDS if method == "POST" else None)
            assert (reply.status, reply.json["code"]) == (401, "UNAUTHORIZED")
        assert (await pi.get("/health")).status == 200
        assert (await pi.get("/v1/stats", X_API_Key="secret")).status == 200
        assert (await pi.ask("POST", "/v1/complete", GOOD_FIELDS, X_API_Key="secret")).status == 200


# ----------------------------------------------------------------------------------------------- places


async def test_the_third_completion_gets_429_at_once():
    go = asyncio.Event()
    slow = [CHUNKED, go.wait, *GOOD[1:]]
    async with Backend([slow]) as backend, pi_for(backend.port) as pi:
        running = [asyncio.create_task(pi.stream()), asyncio.create_task(pi.complete())]
        await until(lambda: len(backend.completions) == 2)
        for reply in (await pi.stream(), await pi.complete()):
            assert (reply.status, reply.json["code"]) == (429, "RATE_LIMIT")
            assert reply.all("Retry-After") == []
        assert [(await pi.get(path)).status for path in ("/health", "/v1/stats", "/v1/models")] == [200] * 3
        assert (await pi.get("/v1/stats")).json["requests_active"] == 2
        go.set()
        assert [reply.status for reply in await asyncio.gather(*running)] == [200, 200]
        assert (await pi.complete()).status == 200


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/complete/stream"])
@pytest.mark.parametrize(
    "script", [[HANG], [CHUNKED, HANG], [CHUNKED, chunk(token("a", 1)), HANG]], ids=["head", "first", "later"]
)
async def test_a_client_that_leaves_frees_its_place_and_the_vps(path: str, script: list[Any]):
    async with Backend([script]) as backend, pi_for(backend.port) as pi:
        _, writer = await pi.open("POST", path, GOOD_FIELDS)
        await backend.begun.wait()
        assert pi.gateway.dispatcher.active == 1
        writer.transport.abort()
        await backend.left.wait()
        await until(lambda: pi.gateway.dispatcher.active == 0)
        assert pi.gateway.fleet.first.breaker.describe(0)["failures"] == 0


# --------------------------------------------------------------------------------------------- sessions

TOKEN_A = {"token": "a", "total_tokens": 1}
HANGS: dict[str, list[Any]] = {
    "before its head": [HANG],
    "after its head": [CHUNKED, HANG],
    "after a token": [CHUNKED, chunk(token("a", 1)), HANG],
}


def check_superseded(
    reply: Reply, path: str, begun: bool, message: str = "a newer request of this session took"
) -> None:
    """409, or an error event and a cut once a stream has begun."""
    if path.endswith("stream") and begun:
        assert (reply.status, reply.clean, reply.events[-1]["code"]) == (200, False, "SUPERSEDED")
        assert message in reply.events[-1]["message"]
    else:
        assert (reply.status, reply.clean, reply.json["code"]) == (409, True, "SUPERSEDED")
        assert message in reply.json["message"]


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/complete/stream"])
@pytest.mark.parametrize("hang", HANGS)
async def test_a_newer_completion_of_a_session_ends_the_older(hang: str, path: str):
    """The Pi needs no VPS for this: one that hangs keeps neither the older completion nor its place."""
    scripts = [HANGS[hang], GOOD]
    async with Backend(scripts) as backend, pi_for(backend.port, max_concurrent=1) as pi:
        older = asyncio.create_task(pi.ask("POST", path, GOOD_FIELDS | {"session": "editor"}))
        await backend.begun.wait()
        assert (await pi.stream(session="another")).status == 429
        newer = await pi.stream(session="editor")
        assert (newer.status, newer.clean) == (200, True)
        check_superseded(await older, path, begun=hang != "before its head")
        await backend.left.wait()
        assert backend.most_running == 1, "the newer one was sent while the older still ran"
        assert pi.gateway.fleet.first.breaker.describe(0)["failures"] == 0


async def test_a_completion_that_is_still_connecting_can_be_superseded(monkeypatch: pytest.MonkeyPatch):
    connecting, connect = asyncio.Event(), pi_upstream.Upstream._connect

    async def never(upstream: Any) -> Any:
        connecting.set()
        await asyncio.get_running_loop().create_future()

    async with Backend() as backend, pi_for(backend.port, max_concurrent=1) as pi:
        monkeypatch.setattr(pi_upstream.Upstream, "_connect", never)
        older = asyncio.create_task(pi.complete(session="editor"))
        await connecting.wait()
        monkeypatch.setattr(pi_upstream.Upstream, "_connect", connect)
        assert (await pi.complete(session="editor")).status == 200
        check_superseded(await older, "/v1/complete", begun=False)


async def test_a_client_that_reads_nothing_cannot_keep_the_place_of_its_session():
    scripts = [[CHUNKED, Flood(chunk(token("a", 1)) * 1000)], GOOD]
    async with Backend(scripts) as backend, pi_for(backend.port, max_concurrent=1) as pi:
        _, writer = await pi.open("POST", "/v1/complete/stream", GOOD_FIELDS | {"session": "editor"})
        await until(lambda: any(c.transport.get_write_buffer_size() > 65_536 for c in pi.server.connections.values()))
        assert (await pi.stream(session="editor")).clean
        await backend.left.wait()
        assert pi.gateway.dispatcher.active == 0
        writer.transport.abort()


async def test_a_flood_of_one_session_does_not_reach_the_vps_at_once():
    """Each ends its predecessor. The VPS never has more than max_concurrent of them, even if it answers none."""
    async with Backend([[HANG]]) as backend, pi_for(backend.port, max_concurrent=2) as pi:
        flood = [asyncio.create_task(pi.complete(session=f"editor {n % 2}")) for n in range(60)]
        done: set[Any] = set()
        while len(done) < 58:
            done, _ = await asyncio.wait(flood, return_when=asyncio.FIRST_COMPLETED)
            flood_left = [task for task in flood if not task.done()]
            await asyncio.sleep(0)
        for task in done:
            check_superseded(task.result(), "/v1/complete", begun=False)
        await until(lambda: backend.running == 2)
        assert backend.most_running == 2
        assert pi.gateway.dispatcher.active == 2
        for task in flood_left:
            task.cancel()


async def test_a_session_belongs_to_its_client():
    go = asyncio.Event()
    slow = [CHUNKED, go.wait, *GOOD[1:]]
    async with Backend([slow]) as backend, pi_for(backend.port) as pi:
        mine = asyncio.create_task(pi.stream(session="editor"))
        await until(lambda: len(backend.completions) == 1)
        theirs = asyncio.create_task(pi.from_address("127.0.0.2").stream(session="editor"))
        await until(lambda: len(backend.completions) == 2)
        go.set()
        assert [reply.clean for reply in await asyncio.gather(mine, theirs)] == [True, True]
        assert len({body["session"] for body in backend.completions}) == 2


@pytest.mark.parametrize(
    ("more", "status", "code"),
    [
        ({"max_tokens": 0}, 400, "INVALID_REQUEST"),
        ({"language": "cobol"}, 400, "INVALID_REQUEST"),
        ({"model": "gpt"}, 404, "MODEL_NOT_FOUND"),
        ({}, 503, "VPS_UNAVAILABLE"),
    ],
)
async def test_a_newer_completion_that_is_refused_ends_nothing(more: dict[str, Any], status: int, code: str):
    go = asyncio.Event()
    slow = [CHUNKED, go.wait, *GOOD[1:]]
    async with Backend([slow]) as backend, pi_for(backend.port) as pi:
        older = asyncio.create_task(pi.stream(session="editor"))
        await backend.begun.wait()
        if not more:
            open_breaker(pi.gateway.fleet.first.breaker)
        newer = await pi.complete(session="editor", **more)
        assert (newer.status, newer.json["code"]) == (status, code)
        go.set()
        assert (await older).clean


@pytest.mark.parametrize("path", ["/v1/complete", "/v1/complete/stream"])
@pytest.mark.parametrize("hang", HANGS)
async def test_what_the_vps_supersedes_is_no_failure_of_the_vps(hang: str, path: str):
    """To the VPS, two Pis with the same client address are one client, so the VPS itself ends the older request."""
    async with Backend([HANGS[hang], GOOD]) as backend, pi_for(backend.port) as pi, pi_for(backend.port) as other:
        older = asyncio.create_task(pi.ask("POST", path, GOOD_FIELDS | {"session": "editor"}))
        await backend.begun.wait()
        if hang == "after a token":
            await until(lambda: pi.at(0)[0].tokens == 1)
        assert (await other.complete(session="editor")).json["completion"] == "ab"
        check_superseded(await older, path, hang != "before its head", "a newer request of this session came")
        first = pi.gateway.fleet.first
        assert (first.requests_failed, first.breaker.describe(0)["failures"]) == (0, 0)


# ----------------------------------------------------------------------------- routing and fitting


def present(*ids: str, **more: Any) -> bytes:
    return answer(200, {"models": [{"id": id, **more} for id in ids]})


@pytest.mark.parametrize(
    ("models", "language", "model"),
    [
        (present("qwen_7b", "codellama_7b", "qwen_0_5b"), "python", "qwen_7b"),
        (present("qwen_7b", "codellama_7b", "qwen_0_5b"), "cpp", "codellama_7b"),
        (present("qwen_7b", available=False), "python", "qwen_7b"),
        (answer(200, {"models": "lies"}), "c", "codellama_7b"),
        (answer(500, {}), "c", "codellama_7b"),
    ],
)
async def test_a_language_goes_to_the_first_model_that_is_there(models: bytes, language: str, model: str):
    async with Backend(models=models) as backend, pi_for(backend.port) as pi:
        reply = await pi.complete(language=language)
        assert (reply.json["model"], backend.completions[0]["model"]) == (model, model)


ALL = present("qwen_7b", "codellama_7b", "qwen_1_5b", "qwen_0_5b")
PREFER = {"infill": ("qwen_0_5b", "qwen_1_5b"), "instruct": ("codellama_7b", "qwen_1_5b")}


@pytest.mark.parametrize(
    ("models", "asked", "model"),
    [
        (ALL, {"suffix": "\n)"}, "qwen_0_5b"),
        (ALL, {}, "qwen_7b"),  # no preference for it
        (ALL, {"instruction": "Write it"}, "qwen_1_5b"),  # codellama_7b does not list Python
        (ALL, {"suffix": "\n)", "model": "qwen_7b"}, "qwen_7b"),
        (present("qwen_7b", "qwen_1_5b"), {"suffix": "\n)"}, "qwen_1_5b"),
        (answer(500, {}), {"suffix": "\n)"}, "qwen_7b"),  # what the VPS has is unknown
    ],
)
async def test_a_mode_goes_to_the_model_that_is_preferred(models: bytes, asked: dict[str, Any], model: str):
    async with Backend(models=models) as backend, pi_for(backend.port, prefer=PREFER) as pi:
        assert (await pi.complete(**asked)).json["model"] == model


async def test_preferences_of_the_dialects():
    async with Backend(models=ALL) as backend, pi_for(backend.port, prefer=PREFER) as pi:
        infill = {"input_prefix": "def f(:", "input_suffix": "x", "n_predict": 5}
        assert (await pi.ask("POST", "/infill", infill)).json["model"] == "qwen_0_5b"
        chat = {"messages": [{"role": "user", "content": "a"}]}
        assert (await pi.ask("POST", "/v1/chat/completions", chat)).json["model"] == "codellama_7b"
        assert (await pi.ask("POST", "/v1/completions", {"prompt": "a"})).json["model"] == "qwen_7b"


@pytest.mark.parametrize(
    "asked",
    [
        {"input_prefix": "fn f", "input_suffix": "}", "filename": "a.rs"},
        {"input_prefix": "class A", "input_suffix": "}", "filename": "A.java"},
        {"input_prefix": "a", "input_suffix": "b", "filename": "a.unheard-of"},
        {"input_prefix": "a", "input_suffix": "b"},
    ],
)
async def test_a_dialect_never_fails_for_its_language(asked: dict[str, Any]):
    """The VPS has one model, which does not list Rust."""
    async with Backend(models=present("qwen_7b")) as backend, pi_for(backend.port) as pi:
        assert (await pi.ask("POST", "/infill", asked)).json["model"] == "qwen_7b"
        language = {"a.rs": "rust", "A.java": "java"}.get(asked.get("filename", ""))
        assert backend.completions[0].get("language") == language


async def test_any_language_that_models_toml_names_may_be_asked_for(tmp_path: Path):
    path = tmp_path / "models.toml"
    text = (ROOT / "models.toml").read_text()
    path.write_text(text.replace('languages = ["rust"', 'languages = ["cobol", "C#", "rust"'))
    models = load_catalog(path).models
    async with Backend(models=ALL) as backend, pi_for(backend.port, models=models) as pi:
        for language, model in (("java", "qwen_7b"), ("cobol", "codellama_7b"), ("C#", "codellama_7b")):
            assert (await pi.complete(language=language)).json["model"] == model
        assert [sent.get("language") for sent in backend.completions] == ["java", None, "csharp"]
        refused = (await pi.complete(language="abap")).json["message"]
        listed = [*OF_QWEN, "cobol", "C#", *OF_CODELLAMA]
        assert refused == f'language: expected one of {", ".join(listed)}, got the string "abap"'


async def test_a_model_that_has_gone_is_looked_for_again():
    scripts = [[error(404, "MODEL_NOT_FOUND")], GOOD]
    async with Backend(scripts, models=present("qwen_7b")) as backend, pi_for(backend.port) as pi:
        assert (await pi.complete()).json["code"] == "MODEL_NOT_FOUND"
        backend.models = answer(200, MODELS)
        pi.gateway.fleet.first.wake.set()
        await until(lambda: list(pi.gateway.fleet.models or ()) == ["qwen_0_5b"])
        assert (await pi.complete()).json["model"] == "qwen_0_5b"


async def test_a_long_prompt_is_fitted_and_refitted_once():
    long = "".join(f"value_{n} = {n}\n" for n in range(4000))
    too_long = [error(400, "INVALID_REQUEST", prompt_tokens=4000, n_ctx=1024)]
    async with Backend([too_long, GOOD, too_long, too_long, GOOD]) as backend, pi_for(backend.port) as pi:
        assert (await pi.complete(prompt=long, max_tokens=256)).status == 200
        first, second = (len(body["prompt"]) for body in backend.completions)
        assert second < first < len(long)
        reply = await pi.complete(prompt=long, max_tokens=256)
        assert (reply.status, reply.json["code"], reply.json["prompt_tokens"]) == (400, "INVALID_REQUEST", 4000)
        assert len(backend.completions) == 4


@pytest.mark.parametrize(("n_ctx", "max_tokens", "budget"), [(4096, 512, 3584), (4096, 2048, 2048), (2048, 2048, 512)])
def test_prompt_budget(n_ctx: int, max_tokens: int, budget: int):
    assert prompt_budget(n_ctx, max_tokens) == budget - MARGIN_TOKENS


async def test_an_http_1_0_client_gets_the_events_without_chunks():
    async with Backend() as backend, pi_for(backend.port) as pi:
        reader, writer = await asyncio.open_connection("127.0.0.1", pi.port)
        body = json.dumps(GOOD_FIELDS).encode()
        lines = ["POST /v1/complete/stream HTTP/1.0", "Content-Type: application/json", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        top, _, events = (await reader.read()).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in top.lower()
        assert events.startswith(token("a", 1) + token("b", 2) + b'data: {"done": true')
        writer.close()


# ------------------------------------------------------------------------------------- a real process


async def test_from_start_to_stop(tmp_path: Path):
    file = tmp_path / "logs" / "cm4.log"
    async with Backend() as backend:
        more = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}", "CEREBRUM_CM4_API_KEY": ""}
        with daemon("cm4d", tmp_path, CEREBRUM_LOG_FILE=str(file), **more) as process:
            await asyncio.to_thread(process.wait_for_line, "VPS backend is available")
            client = Client(port=process.port)
            reply = await client.ask("POST", "/v1/complete/stream", GOOD_FIELDS, X_Request_ID="the-id")
            assert reply.clean
            assert [event.get("token") for event in reply.events] == ["a", "b", None]
            line = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d - INFO - \[the-id\] POST /v1/complete/stream 200 \d+\.\d\ds"
            line += r" model=qwen_0_5b tokens=2 ttft=\d\.\d\ds$"
            await asyncio.to_thread(process.wait_for_line, line)
        assert "the-id" in file.read_text()
        assert KEY not in process.stdout() + process.stderr()


async def test_a_running_stream_is_finished_after_sigterm(tmp_path: Path):
    go = asyncio.Event()
    async with Backend([[CHUNKED, chunk(token("a", 1)), go.wait, *GOOD[2:]]]) as backend:
        more = {"CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}", "CEREBRUM_CM4_API_KEY": ""}
        with daemon("cm4d", tmp_path, **more) as process:
            running = asyncio.create_task(Client(port=process.port).stream())
            await backend.begun.wait()
            process.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(process.wait_for_line, "stopping")
            go.set()
            assert (await running).clean
            await asyncio.to_thread(process.process.wait, PATIENCE)


def test_a_start_that_fails_says_which_variable_is_wrong(tmp_path: Path):
    done = run_to_the_end("cm4d", tmp_path, CEREBRUM_CM4_PORT="x")
    said = done.stdout + done.stderr
    assert re.search(r"^cm4d\.py: CEREBRUM_CM4_PORT[:,]", said, re.MULTILINE)
    assert (done.returncode, "Traceback" in said) == (2, False)


@pytest.mark.parametrize("what", ["an address that is not up", "a port that is taken"])
def test_an_address_that_is_not_there_yet_is_no_wrong_configuration(tmp_path: Path, what: str):
    """The unit restarts the daemon after a status of 1, and never after 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        host = "127.0.0.1" if "port" in what else "192.0.2.1"
        done = run_to_the_end("cm4d", tmp_path, CEREBRUM_CM4_HOST=host, CEREBRUM_CM4_PORT=port)
    lines = (done.stdout + done.stderr).splitlines()
    assert re.search(rf" - ERROR - \[-\] cannot listen on {host} port {port}: .", done.stdout + done.stderr)
    assert done.returncode == 1
    assert [line for line in lines if "Traceback" in line or "CEREBRUM_CM4" in line] == []
    assert sum("cannot listen" in line for line in lines) == 1


def test_another_fault_of_the_system_does_not_read_as_an_address(monkeypatch: pytest.MonkeyPatch):
    async def serve(environ: Any, config: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cm4d, "serve", serve)
    monkeypatch.setattr(cm4d, "set_up_logging", lambda level, file: None)
    with pytest.raises(OSError, match="No space left on device"):
        cm4d.main([])
