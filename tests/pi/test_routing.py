"""Which of several backends gets a request, and what happens when it fails. `test_dispatcher.py`
has the decision.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from harness import KEY, PATIENCE, until
from scripted import (
    CHUNKED,
    HANG,
    RESET,
    Backend,
    Pi,
    answer,
    backend_at,
    chunk,
    config_of,
    error,
    event,
    pi_for,
    script,
)

from cerebrum.pi import breaker
from cerebrum.pi import fleet as pi_fleet
from cerebrum.pi.completion import Completion, CompletionRequest
from cerebrum.pi.upstream import BackendConfig, parse_url
from cerebrum.request import GenerationRequest
from cerebrum.settings import ConfigError

HANGING = [CHUNKED, HANG]
SAID = {"role": "user", "content": "Hello"}


def listing(*ids: str) -> bytes:
    return answer(200, {"models": [{"id": id, "n_ctx": 4096} for id in ids]})


@contextlib.asynccontextmanager
async def fleet(*backends: Backend, places: Sequence[int] = (), **config: Any) -> AsyncIterator[Pi]:
    """A Pi in front of these backends, which are named a, b, c, … Each writes its name, if no
    script is given.
    """
    async with contextlib.AsyncExitStack() as stack:
        configs = []
        for name, backend, limit in zip(
            "abcdef", backends, places or [2] * len(backends), strict=False
        ):
            if backend.scripts == Backend.scripts:
                backend.scripts = [script(name)]
            await stack.enter_async_context(backend)
            configs.append(
                backend_at(backend.port, name, max_concurrent=limit, key=f"{KEY}-{name}")
            )
        yield await stack.enter_async_context(pi_for(*configs, **config))


async def answered(pi: Pi, **more: Any) -> str:
    """The backend that answered."""
    reply = await pi.complete(**more)
    assert reply.status == 200, reply.json
    assert reply.json["completion"] == reply.json["backend"]
    return str(reply.json["backend"])


@contextlib.asynccontextmanager
async def running(pi: Pi, backend: Backend, **more: Any) -> AsyncIterator[None]:
    """Run a completion on this backend, whose next script must hang."""
    backend.begun.clear()
    _, writer = await pi.open(
        "POST", "/v1/complete/stream", {"prompt": "z", "language": "python", **more}
    )
    await backend.begun.wait()
    yield
    writer.transport.abort()
    ports = [one.config.endpoint.port for one in pi.backends]
    await until(lambda: not pi.at(ports.index(backend.port)))


def reconfigure(pi: Pi, *backends: BackendConfig):
    pi.gateway.reconfigure(dataclasses.replace(pi.gateway.config, backends=backends))


# ------------------------------------------------------------------------------------- who is asked


async def test_the_one_that_served_a_session_or_a_file_last():
    one = Backend([HANGING, script("a")])
    async with fleet(one, Backend()) as pi:
        async with running(pi, one):
            assert await answered(pi, session="s") == await answered(pi, filename="n.py") == "b"
        assert await answered(pi, session="s", prompt="other") == "b"
        assert await answered(pi, filename="n.py", prompt="other") == "b"
        assert await answered(pi, prompt="new") == "a"


@pytest.mark.parametrize("waits", [True, False])
async def test_a_client_that_leaves_the_line_or_as_it_gets_its_place_holds_none(waits):
    one = Backend([HANGING])
    async with fleet(one, places=(1,)) as pi:
        asked = CompletionRequest("chat", GenerationRequest(model="qwen_0_5b"))
        async with running(pi, one):
            pairs = pi.gateway.runner.run(Completion(asked))
            entering = asyncio.ensure_future(anext(pairs))
            await until(lambda: pi.line)
            (called,) = pi.line.values()
            if waits:
                entering.cancel()
                await asyncio.wait([entering])
            called.add_done_callback(lambda _: entering.cancel())
        await asyncio.wait([entering])
        assert entering.cancelled()
        assert pi.active == 0


async def test_each_gets_its_own_key_alone_and_none_with_health():
    one, two = Backend([[RESET]]), Backend()
    async with fleet(one, two) as pi:
        assert await answered(pi) == "b"
        for name, backend in (("a", one), ("b", two)):
            keys = {
                line.split(" ")[1]: headers.get("x-api-key") for line, headers, _ in backend.asked
            }
            own = f"{KEY}-{name}"
            assert keys == {"/health": None, "/v1/models": own, "/v1/inference/stream": own}
            assert all("authorization" not in headers for _, headers, _ in backend.asked)


# ------------------------------------------------------------------------------------------- models


async def test_the_models_of_all_backends_are_listed():
    one = Backend(models=listing("qwen_0_5b"))
    two = Backend(models=listing("qwen_1_5b"))
    async with fleet(one, two) as pi:
        models = (await pi.get("/v1/models")).json
        listed = {model["id"]: model["backends"] for model in models["models"] if model["backends"]}
        assert listed == {"qwen_1_5b": ["b"], "qwen_0_5b": ["a"]}
        assert [entry["id"] for entry in models["data"]] == ["qwen_1_5b", "qwen_0_5b"]


# ----------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "failure",
    [
        [RESET],
        [CHUNKED, chunk(event(error=True, message="m", code="MODEL_LOAD_FAILED"))],
        [CHUNKED, chunk(event(progress={"stage": "loading", "done": 1, "total": 2})), RESET],
    ],
)
async def test_before_the_first_token_the_next_one_is_asked(failure, monkeypatch):
    """Those that have failed are probed at once."""
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 2 * PATIENCE)
    backends = Backend([failure]), Backend([failure]), Backend()
    async with fleet(*backends) as pi:
        reply = await pi.stream(progress=True)
        assert (reply.status, reply.clean) == (200, True)
        *_, text, done = reply.events
        assert text == {"token": "c", "total_tokens": 1}
        assert (done["done"], done["backend"]) == (True, "c")
        assert [len(backend.completions) for backend in backends] == [1, 1, 1]
        assert pi.backends[2].has("qwen_0_5b")
        stats = await pi.stats()
        assert (stats["requests_total"], stats["requests_active"]) == (1, 0)
        assert [told["requests_failed"] for told in stats["backends"]] == [1, 1, 0]
        await until(lambda: [backend.probes for backend in pi.backends] == [2, 2, 1])


async def test_one_is_away():
    async with fleet(Backend(health=error(503, "SHUTTING_DOWN")), Backend()) as pi:
        health = (await pi.get("/health")).json
        assert health["vps_available"]
        assert [one["available"] for one in health["backends"]] == [False, True]
        assert (await pi.get("/v1/activity")).json["notes"] == ["a is away: says the VPS"]


async def test_all_are_away():
    async with pi_for(backend_at(1, "a"), backend_at(1, "b")) as pi:
        reply, health = await pi.complete(), (await pi.get("/health")).json
        refused = "VPS backend is unavailable (connection refused)"
        away = f"a: {refused}; b: {refused}"
        assert (reply.status, reply.json["message"]) == (503, refused)
        assert (health["code"], health["message"]) == ("VPS_UNAVAILABLE", away)
        for figures in (health, await pi.stats()):
            assert not figures["vps_available"]
        assert (await pi.get("/v1/activity")).json["vps_message"] == away
        assert not any(model["available"] for model in (await pi.get("/v1/models")).json["models"])


async def test_a_probe_ends_an_overdue_trial(monkeypatch):
    monkeypatch.setattr(breaker, "TRIAL_SECONDS", 0.0)
    async with pi_for(1, probing=False) as pi:
        first = pi.first
        first.breaker.open(0.0)
        first.breaker.healthy(time.monotonic())
        first.breaker.admit(time.monotonic())
        await first.probe()
        assert first.breaker.state == "open"


async def test_a_request_that_fails_over_gives_its_first_place_back():
    """While its second backend works on it, another request gets that place."""
    go = asyncio.Event()
    one = Backend([[RESET], script("a")])
    two = Backend([script(go.wait, "b")])
    async with fleet(one, two, places=(1, 1)) as pi:
        slow = asyncio.create_task(pi.complete())
        await two.begun.wait()
        # It has failed, and is asked first again.
        pi.first.breaker.trouble = ""
        assert await answered(pi, prompt="other") == "a"
        go.set()
        assert (await slow).json["completion"] == "b"


async def test_the_answer_names_the_model_of_the_backend_that_took_over():
    one = Backend([[CHUNKED, RESET]], models=listing("qwen_1_5b"))
    two = Backend(models=listing("qwen_0_5b"))
    async with fleet(one, two) as pi:
        reply = await pi.post("/v1/chat/completions", {"messages": [SAID], "stream": True})
        assert reply.body.count(b'"role"') == 1, "the answer began twice"
        assert b'"model":"qwen_0_5b"' in reply.body.split(b"\n\n")[1]


async def test_a_first_list_that_does_not_come_is_asked_for_at_the_next_probe():
    """A VPS with new files may be checking them."""
    async with Backend(models=answer(500, {})) as vps, pi_for(vps.port) as pi:
        backend = pi.first
        assert (backend.models, backend.available) == (None, True)
        vps.models = answer(200, {"models": [{"id": "qwen_0_5b"}]})
        backend.wake.set()
        await until(lambda: backend.models is not None)
        assert backend.names == {"qwen_0_5b": "qwen_0_5b"}


async def test_the_models_are_asked_for_once_if_nobody_lists_them():
    """The list is not asked for again before each attempt."""
    async with (
        Backend([[RESET]], models=answer(500, {})) as one,
        pi_for(one.port, probing=False) as pi,
    ):
        for _ in range(3):
            assert (await pi.complete()).status == 503
        assert sum(line.startswith("GET /v1/models") for line, _, _ in one.asked) == 1


async def test_a_newer_request_of_a_session_ends_the_older_one_at_another_backend():
    """The older one goes to nobody else."""
    one = Backend([[HANG]], models=listing("qwen_1_5b"))
    two = Backend(models=listing("qwen_0_5b"))
    async with fleet(one, two) as pi:
        older = asyncio.create_task(pi.complete(session="s"))
        await one.begun.wait()
        assert await answered(pi, session="s", model="qwen_0_5b") == "b"
        assert (await older).json["code"] == "SUPERSEDED"
        await one.left.wait()
        assert len(two.completions) == 1


@pytest.mark.parametrize(("status", "code"), [(500, "MODEL_LOAD_FAILED"), (404, "MODEL_NOT_FOUND")])
async def test_another_model_of_the_backend_takes_over(status, code):
    refusal, ids = error(status, code), ("qwen_1_5b", "qwen_0_5b")
    one = Backend([[refusal], script("b"), script("c")], models=listing(*ids))
    async with one, pi_for(one.port) as pi:
        one.models = listing("qwen_0_5b", "codellama_7b")  # what it will say when it is asked again
        reply = (await pi.complete()).json
        assert (reply["model"], reply["completion"]) == ("qwen_0_5b", "b")
        await until(lambda: pi.first.has("codellama_7b"), seconds=20)
        assert [fields["model"] for fields in one.completions] == ["qwen_1_5b", "qwen_0_5b"]
        assert (await pi.complete()).json["model"] == "qwen_0_5b"  # and is not asked for again


# ------------------------------------------------------------------------------------ reading ahead

WARM_UP = {"input_prefix": "x", "input_suffix": "", "n_predict": 0}


async def test_a_request_stops_what_its_own_backend_reads_ahead_and_no_other():
    """So does the end of that backend's table."""
    one = Backend([HANGING], models=listing("qwen_1_5b"))
    two = Backend(models=listing("qwen_0_5b"))
    async with fleet(one, two, places=(1, 1)) as pi:
        assert (await pi.post("/infill", WARM_UP)).status == 200
        await one.begun.wait()
        assert await answered(pi, model="qwen_0_5b") == "b"
        assert pi.reads_ahead()
        one.scripts = [HANGING, script("a"), HANGING]
        assert await answered(pi, model="qwen_1_5b") == "a"
        await until(lambda: one.running and pi.reads_ahead())  # it goes on
        assert one.completions[-1]["max_tokens"] == 0
        assert one.most_running == 1


# ------------------------------------------------------------------------------------- new settings


async def test_new_settings_keep_what_runs_and_what_is_known():
    go = asyncio.Event()
    one = Backend([script("a", go.wait)])
    async with fleet(one, Backend()) as pi, Backend() as fresh:
        gateway, (old, other) = pi.gateway, pi.backends
        running = asyncio.create_task(pi.stream())
        await until(lambda: old.tokens == 1)
        changed = dataclasses.replace(other.config, max_concurrent=7, key="another")
        reconfigure(pi, changed, backend_at(fresh.port, "new"))
        kept, new = gateway.fleet.backends
        assert kept is other
        assert (kept.limit, kept.config.key, new.id) == (7, "another", "new")
        await until(lambda: new.probes > 0)  # it is probed without a restart
        go.set()
        reply = await running
        assert reply.clean
        assert reply.events[-1]["backend"] == "a"  # which is no longer in models.toml
        assert await answered(pi, prompt="y =") == "b"
        gateway.sample()
        assert sum(gateway.counting.history.describe()["tokens"]) == 2


async def test_a_backend_that_moves_is_another_and_its_running_streams_go_on():
    """Their tokens say nothing of the new address."""
    go, end = asyncio.Event(), asyncio.Event()
    one = Backend([script("a", go.wait, "a", end.wait)])
    async with (
        fleet(one, Backend()) as pi,
        Backend([script("a")], models=listing("qwen_7b")) as moved,
    ):
        backend, other = pi.backends

        def move(port):
            reconfigure(pi, backend_at(port, "a", max_concurrent=2), other.config)

        running = asyncio.create_task(pi.stream())
        await until(lambda: backend.tokens == 1)
        move(1)
        away = pi.first
        await until(lambda: "refused" in away.breaker.trouble)
        go.set()
        await until(lambda: backend.tokens == 2)
        assert not away.available
        move(moved.port)
        new = pi.first
        await until(lambda: new.available)
        assert list(new.models or ()) == ["qwen_7b"]
        assert await answered(pi, model="qwen_7b") == "a"
        end.set()
        assert (await running).clean
        assert (new.requests_total, new.tokens) == (1, 1)


async def test_new_settings_that_cannot_be_used_change_nothing(tmp_path):
    async with fleet(Backend(), Backend()) as pi:
        before = list(pi.backends)
        one, two = (backend.config for backend in before)
        endpoint = parse_url("https://desktop.lan", "url")
        bad = dataclasses.replace(two, endpoint=endpoint, ca_file=str(tmp_path / "none.pem"))
        with pytest.raises(ConfigError, match=r"^ca_file: expected certificates"):
            reconfigure(pi, dataclasses.replace(one, max_concurrent=9), bad)
        assert pi.backends == before
        assert [backend.limit for backend in before] == [2, 2]


async def test_a_backend_that_has_gone_is_forgotten():
    async with fleet(Backend()) as pi:
        gone = weakref.ref(pi.first)
        reconfigure(pi, dataclasses.replace(pi.gateway.config.backends[0], id="c"))
        await until(lambda: pi.probes > 0)
        await until(lambda: gc.collect() >= 0 and gone() is None, seconds=5)


async def test_a_cloud_is_probed_less_often(monkeypatch):
    for url, api, is_paid in (
        ("https://api.example", "openai", True),
        ("http://gpu", "openai", False),
        ("https://attic", "cerebrum", False),
    ):
        assert config_of("one", parse_url(url, "url"), api=api).is_paid == is_paid
    monkeypatch.setattr(pi_fleet, "PROBE_SECONDS", 0.001)
    monkeypatch.setattr(BackendConfig, "is_paid", property(lambda one: one.id == "a"))
    async with fleet(Backend(), Backend()) as pi:
        cloud, own = pi.backends
        await until(lambda: own.probes > 5)
        assert cloud.probes == 1
        cloud.wake.set()
        await until(lambda: cloud.probes == 2)


async def test_a_probe_that_hangs_is_noticed():
    async with fleet(Backend(), Backend()) as pi:
        now = time.monotonic()
        assert pi.gateway.fleet.stuck(now) == ""
        pi.backends[1].probed = now - pi_fleet.STUCK_SECONDS - 1
        assert pi.gateway.fleet.stuck(now) == "the probe of b has made no progress for 300 s"
