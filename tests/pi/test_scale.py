"""vLLM, and Ray Serve with two replicas of it, behind a real Pi: all that other engines do, and many clients at once.

`make test-scale` installs them. What vLLM says is the 0.5B's, at temperature 0.
"""

from __future__ import annotations

# ruff: noqa: F401, F811 (fixtures and tests of another file, which run here with the engines below)
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import scale
from engines import Engine
from harness import PATIENCE, wait_until
from test_engines import (
    KEY,
    Kind,
    Pi,
    Stream,
    backend,
    brief,
    check_fitted,
    check_long_prompts,
    endless,
    engine,
    long_prompt,
    pi,
    rests,
    shared_engine,
    start_pi,
    test_a_client_that_leaves_ends_the_work,
    test_a_wrong_key,
    test_chat_as_openai_does,
    test_complete,
    test_death_and_return,
    test_infill,
    test_infill_as_llama_cpp_does,
    test_instruct,
    test_limit,
    test_models_health_and_statistics,
    test_stop,
)

pytestmark = pytest.mark.scale

CLIENTS = 16


def metric(engine: Engine, name: str) -> float:
    """One of vLLM's own figures."""
    text = httpx.get(f"{engine.url}/metrics", timeout=PATIENCE, trust_env=False).text
    (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(value)


def has_no_sequence(engine: Engine) -> bool:
    return metric(engine, "num_requests_running") == metric(engine, "num_requests_waiting") == 0


def workers_rest(engine: Engine) -> bool:
    assert isinstance(engine, scale.Tree)
    workers = engine.named("VLLM::Worker")
    assert len(workers) == scale.REPLICAS
    return all(rests(worker.pid) for worker in workers)


VLLM = Kind(
    "vLLM",
    "openai",
    lambda folder: scale.vllm(folder, KEY, "--max-num-seqs", str(CLIENTS)),
    has_no_sequence,
    places=CLIENTS,
    counts=False,
    n_ctx=scale.CONTEXT,
)
RAY = Kind(
    "Ray Serve",
    "openai",
    scale.ray_serve,
    workers_rest,
    places=CLIENTS,
    counts=False,
    n_ctx=scale.CONTEXT,
    checks_keys=False,
)


@pytest.fixture(scope="module", params=[VLLM, RAY], ids=["vLLM", "Ray Serve"])
def kind(request: pytest.FixtureRequest) -> Kind:
    assert isinstance(request.param, Kind)
    return request.param


def test_a_long_prompt_is_fitted(pi: Pi) -> None:
    check_long_prompts(pi)


def test_a_prompt_that_the_engine_refuses(kind: Kind, engine: Engine, tmp_path: Path) -> None:
    """The table is wrong; what the engine says is believed."""
    with start_pi(tmp_path, {"one": backend(engine, "openai", n_ctx=8192)}) as pi:
        prompt = long_prompt(200)
        check_fitted(pi.complete(prompt=prompt, max_tokens=64), prompt)
        (model,) = pi.get("/v1/models")["models"]
        assert model["n_ctx"] == kind.n_ctx
        assert (pi.stats("one")["requests_failed"], pi.stats("one")["breaker"]["failures"]) == (0, 0)


def test_sixteen_clients_at_once(kind: Kind, engine: Engine, pi: Pi) -> None:
    """Each gets its own text, and all have places at the same time."""
    firsts = [100 * number for number in range(1, CLIENTS + 1)]
    prompts = [f"# {first}\n" + "".join(f"print({first + step})\n" for step in range(6)) for first in firsts]
    streams = [Stream(pi, prompt=prompt, max_tokens=40, stop_at="none") for prompt in prompts]
    wait_until(lambda: pi.stats("one")["requests_active"] == CLIENTS, "all have a place")
    for first, stream in zip(firsts, streams, strict=True):
        stream.end()
        assert (stream.status, stream.clean, stream.last["finish_reason"]) == (200, True, "length"), stream.last
        assert stream.text.startswith(f"print({first + 6})\n"), stream.text
        assert (stream.last["total_tokens"], stream.last["prompt_tokens"] > 20) == (40, True)
    wait_until(lambda: kind.is_idle(engine), "idle")
    assert (pi.stats("one")["requests_failed"], pi.stats("one")["breaker"]["failures"]) == (0, 0)


# --------------------------------------------------------------------------------------------- vLLM's queue


@pytest.mark.parametrize("kind", [VLLM], ids=["vLLM"], indirect=True)
def test_vllm_queues_what_it_cannot_run(engine: Engine, tmp_path: Path) -> None:
    """It runs CLIENTS sequences, and lets any number wait. The Pi sends it as many as its table says, and answers 429
    to the next client."""
    more = CLIENTS + 4
    with start_pi(tmp_path, {"one": backend(engine, "openai", max_concurrent=more)}) as pi:
        streams = [Stream(pi, **endless() | {"max_tokens": 60}) for _ in range(more)]
        wait_until(lambda: metric(engine, "num_requests_waiting") == 4, "four wait in vLLM")
        assert metric(engine, "num_requests_running") == CLIENTS
        refused = pi.post("/v1/complete", {"language": "python", **brief()})
        assert (refused.status_code, refused.json()["code"]) == (429, "RATE_LIMIT")
        for stream in streams:
            stream.end()
            assert (stream.status, stream.clean, stream.last["finish_reason"]) == (200, True, "length"), stream.last
            assert stream.last["total_tokens"] == 60
        assert pi.stats("one")["requests_failed"] == 0


# ------------------------------------------------------------------------------------------- Ray's replicas


@pytest.mark.parametrize("kind", [RAY], ids=["Ray Serve"], indirect=True)
def test_a_replica_is_killed_under_sixteen_streams(engine: Engine, pi: Pi) -> None:
    """Ray ends the streams of the dead replica as if they were complete. The Pi says that they are not, and goes on
    with the other replica, also while no third one is there."""
    assert isinstance(engine, scale.Tree)
    streams = [Stream(pi, **endless() | {"max_tokens": 100}) for _ in range(CLIENTS)]
    for stream in streams:
        stream.wait_for_tokens(2)
    before = {worker.pid for worker in engine.named("VLLM::Worker")}
    first, _ = engine.named("ServeReplica:default:LLMServer")
    first.kill()
    wait_until(lambda: [stream.clean for stream in streams].count(False) >= 3, "the Pi has seen three failures")
    assert pi.complete(**brief())["total_tokens"] == 3
    for stream in streams:
        stream.end()
        assert stream.status == 200
    broken = [stream for stream in streams if not stream.clean]
    assert 0 < len(broken) < CLIENTS
    for stream in streams:
        if stream in broken:
            assert (stream.last.get("error"), stream.last.get("code")) == (True, "VPS_UNAVAILABLE"), stream.last
        else:
            assert (stream.last.get("finish_reason"), stream.last["total_tokens"]) == ("length", 100), stream.last
    after = pi.stats("one")
    assert (after["requests_failed"], after["breaker"]["opens"]) == (len(broken), 0)
    wait_until(
        lambda: len({worker.pid for worker in engine.named("VLLM::Worker")} - before) == 1, "another one", seconds=300
    )


@pytest.mark.parametrize("kind", [RAY], ids=["Ray Serve"], indirect=True)
def test_an_update_under_load(engine: Engine, pi: Pi) -> None:
    """Both replicas are replaced, one after the other, while eight clients ask again and again."""
    assert isinstance(engine, scale.Tree)
    wait_until(lambda: len(engine.named("VLLM::Worker")) == scale.REPLICAS, "both replicas", seconds=300)
    before = {worker.pid for worker in engine.named("VLLM::Worker")}
    updated = threading.Event()

    def work() -> list[dict[str, Any]]:
        results = []
        while not updated.is_set():
            results.append(pi.complete(**brief() | {"max_tokens": 20}))
        return results

    long = Stream(pi, **endless() | {"max_tokens": 200})
    long.wait_for_tokens()
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(work) for _ in range(8)]
        try:
            engine.process.send_signal(signal.SIGHUP)
            engine.daemon.wait_for_line("^updated$", 400)
        finally:
            updated.set()
        results = [result for client in clients for result in client.result()]
    assert {result["total_tokens"] for result in results} == {20}
    long.end()
    assert (long.clean, long.last.get("total_tokens")) == (True, 200), long.last
    after = {worker.pid for worker in engine.named("VLLM::Worker")}
    assert (len(after), after & before) == (scale.REPLICAS, set())
    assert (pi.stats("one")["requests_failed"], pi.stats("one")["breaker"]["opens"]) == (0, 0)
