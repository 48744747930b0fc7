"""/metrics of both daemons: the text, the numbers behind it, and whether others can read it.

The peers are prometheus_client's parser, Debian's promtool, and a Debian Prometheus that scrapes both daemons as
docs/operate.md says and evaluates its queries.
"""

from __future__ import annotations

import doctest
import json
import math
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from harness import FILES, KEY, MODELS, PATIENCE, ROOT, Daemon, daemon, until, wait_until
from prometheus_client.parser import text_string_to_metric_families
from scripted import CHUNKED, GOOD, HANG, RESET, Backend, Pi, chunk, error, event, pi_for, token

from cerebrum import metrics
from cerebrum.metrics import Histogram, Metric, Tally, write_metrics, write_stats
from cerebrum.pi import breaker

SMALL = "qwen_0_5b"

Samples = dict[tuple[str, ...], float]
Daemons = tuple[Daemon, Daemon]


def read(text: str) -> Samples:
    """The value of each sample, by its name and the values of its labels in the order of the labels' names."""
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in samples, f"{key} is there twice"
            samples[key] = sample.value
    return samples


def of(samples: Samples, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric that are not 0, by the values of their labels."""
    return {key[1:]: value for key, value in samples.items() if key[0] == name and value}


async def scrape(pi: Pi) -> Samples:
    reply = await pi.get("/metrics")
    assert (reply.status, reply.one("Content-Type")) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return read(reply.body.decode())


def check_agreement(samples: Samples, stats: dict[str, Any]) -> None:
    """That the Pi's /metrics and /v1/stats report the same, with one backend."""
    (one,) = stats["backends"]
    for metric, number in (
        ("completions_started_total", stats["requests_total"]),
        ("completions_active", stats["requests_active"]),
        *((f"{name}_total", stats[name]) for name in ("shared", "replaced", "type_through")),
        ("tokens_total", one["tokens_total"]),
        ("backend_up", one["available"]),
        ("backend_places", one["max_concurrent"]),
        ("backend_active", one["requests_active"]),
        ("backend_requests_total", one["requests_total"]),
        ("backend_failures_total", one["requests_failed"]),
        ("backend_tokens_total", one["tokens_total"]),
        ("backend_models", len(one["models"])),
        ("backend_models_loaded", len(one["models_loaded"])),
        ("breaker_opens_total", one["breaker"]["opens"]),
    ):
        assert sum(of(samples, f"cerebrum_{metric}").values()) == number, metric
    assert of(samples, "cerebrum_breaker_state") == {(one["id"], one["breaker"]["state"]): 1}


# ----------------------------------------------------------------------------------------------- the table


def test_the_examples_of_the_module_are_true() -> None:
    assert doctest.testmod(metrics).failed == 0


def test_a_row_is_a_metric_and_a_member_of_the_statistics() -> None:
    histogram = Histogram((0.1, 1.0))
    for value in (0.0, 0.1, 0.1000001, 1.0, 1e9):
        histogram.observe(value)
    rows = (
        Metric("size_bytes", "Size.", "size", "size_mb", 2**20),
        Metric("kinds_total", "Kinds.", lambda _: {("a", 1): 2, ("b", 3): 4}, "kinds", labels=("kind", "code")),
        Metric("time_seconds", "Time.", lambda _: histogram),
        Metric("nothing", "Nothing now.", lambda _: None),
    )
    table, things = {"model": rows}, {"model": {"m": SimpleNamespace(size=2**20 / 3)}}
    assert write_stats(table, things) == {"size_mb": 0.3, "kinds": 6}
    text = write_metrics(table, things).decode()
    assert re.findall("^# TYPE (.*)", text, re.M) == [
        "size_bytes gauge",
        "kinds_total counter",
        "time_seconds histogram",
    ]
    assert read(text) == {
        ("size_bytes", "m"): 2**20 / 3,
        ("kinds_total", "1", "a", "m"): 2,
        ("kinds_total", "3", "b", "m"): 4,
        ("time_seconds_bucket", "0.1", "m"): 2,
        ("time_seconds_bucket", "1", "m"): 4,
        ("time_seconds_bucket", "+Inf", "m"): 5,
        ("time_seconds_sum", "m"): sum((0.0, 0.1, 0.1000001, 1.0, 1e9)),
        ("time_seconds_count", "m"): 5,
    }


def test_one_token_alone_has_no_time_per_token() -> None:
    tally = Tally()
    tally.spoke(0.5, 0.5, tokens=1)
    tally.spoke(1.0, 3.0, tokens=5)
    assert (tally.first_token.sum, tally.first_token.cumulative()[-1]) == (1.5, (math.inf, 2))
    assert (tally.per_token.sum, tally.per_token.cumulative()[-1]) == (0.5, (math.inf, 1))


# ------------------------------------------------------------------------------------- the Pi, scripted


async def test_the_pi_counts_what_it_does() -> None:
    work = {"prompt_tokens": 9, "cached_tokens": 6, "draft_tokens": 3, "accepted_tokens": 2}
    whole = event(done=True, total_tokens=4, finish_reason="block", **work)
    lies = {"prompt_tokens": 1, "cached_tokens": 5, "draft_tokens": -1, "accepted_tokens": "2"}
    lying = event(done=True, total_tokens=2, finish_reason="x\n" * 9, **lies)
    scripts = [
        GOOD,
        [CHUNKED, *map(chunk, (token("a", 1), token("bcd", 4), whole)), b"0\r\n\r\n"],
        [CHUNKED, *map(chunk, (token("a", 1), token("b", 2), lying)), b"0\r\n\r\n"],
        [error(500, "MODEL_LOAD_FAILED")],
        [CHUNKED, chunk(token("a", 1)), HANG],
    ]
    async with Backend(scripts) as backend, pi_for(backend.port) as pi:
        before = await scrape(pi)
        assert before["cerebrum_http_requests_total", "200", "/v1/complete/stream"] == 0
        asked = [(await pi.complete()).status, (await pi.complete()).status, (await pi.stream()).status]
        assert [*asked, (await pi.complete()).status] == [200, 200, 200, 500]
        reader, writer = await pi.open("POST", "/v1/complete/stream", {"prompt": "x =", "language": "python"})
        await reader.readuntil(b"total_tokens")
        assert (await scrape(pi))["cerebrum_completions_active",] == 1
        writer.transport.abort()
        await until(lambda: not pi.gateway.dispatcher.active)
        assert (await pi.complete(max_tokens=0)).status == 400
        for path in ("/nothing", "/v1/models/nothing", f"/v1/models/{SMALL}", "/v1/complete"):
            await pi.get(path)
        pi.gateway.reconfigure(pi.gateway.config)  # keeps the numbers
        samples, stats = await scrape(pi), (await pi.get("/v1/stats")).json
        assert of(samples, "cerebrum_http_requests_total") == {
            ("200", "/v1/complete"): 2, ("400", "/v1/complete"): 1, ("405", "/v1/complete"): 1,
            ("500", "/v1/complete"): 1, ("200", "/v1/complete/stream"): 1, ("499", "/v1/complete/stream"): 1,
            ("200", "/v1/models/{id}"): 1, ("404", "/v1/models/{id}"): 1, ("200", "/metrics"): 2,
            ("404", "other"): 1,
        }  # fmt: skip
        assert of(samples, "cerebrum_completions_ended_total") == dict.fromkeys(
            ((SMALL, how) for how in ("stop", "block", "other", "MODEL_LOAD_FAILED", "CANCELLED")), 1
        )
        counted = ("tokens", "prompt_tokens", "prompt_tokens_cached", "draft_tokens", "accepted_tokens")
        numbers = [samples[f"cerebrum_{name}_total", SMALL] for name in counted]
        assert numbers == [2 + 4 + 2 + 1, 5 + 3, 6 + 5, 3, 2]
        assert samples["cerebrum_time_to_first_token_seconds_count", SMALL] == 4
        assert samples["cerebrum_time_per_token_seconds_count", SMALL] == 3
        assert samples["cerebrum_reloads_total",] == 1
        check_agreement(samples, stats)
        assert (stats["requests_total"], stats["breaker"]["state"]) == (5, "closed")


async def test_the_breaker_that_opens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "OPEN_SECONDS", 60.0)
    async with Backend([[RESET]]) as backend, pi_for(backend.port) as pi:
        assert [(await pi.complete()).status for _ in range(4)] == [503] * 4
        samples = await scrape(pi)
        assert of(samples, "cerebrum_breaker_state") == {("vps", "open"): 1}
        assert samples["cerebrum_breaker_state", "vps", "closed"] == samples["cerebrum_backend_up", "vps"] == 0
        assert samples["cerebrum_breaker_opens_total", "vps"] == 1
        assert of(samples, "cerebrum_completions_ended_total") == {
            (SMALL, "VPS_UNAVAILABLE"): 3,
            ("none", "VPS_UNAVAILABLE"): 1,  # nobody was asked
        }
        check_agreement(samples, (await pi.get("/v1/stats")).json)


async def test_an_error_behind_the_beginning_of_a_stream_counts_once() -> None:
    async with Backend([[CHUNKED, chunk(token("a", 1))]]) as backend, pi_for(backend.port) as pi:
        body = {"prompt": "x =", "language": "python"}
        # A page gets some time to read its error. It leaves in that time.
        reader, writer = await pi.open("POST", "/v1/complete/stream", body, Origin="http://127.0.0.1")
        await reader.readuntil(b"VPS_UNAVAILABLE")
        writer.transport.abort()
        await until(lambda: not pi.server.connections)
        assert of(await scrape(pi), "cerebrum_http_requests_total") == {("503", "/v1/complete/stream"): 1}


# ------------------------------------------------------------------------- both daemons, real Prometheus


def ask(port: int, path: str, body: Any = None) -> str:
    """The text of a good answer."""
    headers = {"Content-Type": "application/json", "X-API-Key": KEY}
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)) as reply:
        return str(reply.read().decode())


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    if not FILES[SMALL].exists():
        pytest.skip(f"{FILES[SMALL]} is missing: vpsd.py fetch")
    folder, models = tmp_path_factory.mktemp("daemons"), tmp_path_factory.mktemp("models")
    (models / FILES[SMALL].name).symlink_to(MODELS / FILES[SMALL].name)
    with (
        daemon("vpsd", folder / "vps", CEREBRUM_MODELS_DIR=str(models), CEREBRUM_MAX_CPU_PERCENT="100") as vps,
        daemon("cm4d", folder / "pi", CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}") as pi,
    ):
        wait_until(lambda: json.loads(ask(pi.port, "/v1/stats"))["vps_available"], "the Pi finds the VPS")
        yield pi, vps


def traffic(pi: Daemon) -> list[dict[str, Any]]:
    """Completions that repeat themselves, so that something is drafted and cached."""
    lines = "".join(f"    total = total + items[{number}].price * items[{number}].count\n" for number in range(8))
    body = {"prompt": f"def total(items):\n    total = 0\n{lines}", "language": "python", "temperature": 0}
    return [json.loads(ask(pi.port, "/v1/complete", body | {"max_tokens": 40, "stop_at": "none"})) for _ in range(2)]


@pytest.mark.slow
def test_both_agree_with_their_statistics_and_with_each_other(daemons: Daemons) -> None:
    before = [read(ask(one.port, "/metrics")) for one in daemons]
    results = traffic(daemons[0])
    pi, vps = daemons
    ours, theirs = (read(ask(one.port, "/metrics")) for one in daemons)
    check_agreement(ours, json.loads(ask(pi.port, "/v1/stats")))
    stats = json.loads(ask(vps.port, "/v1/stats"))
    assert (stats["models_loaded"], stats["requests_active"]) == (1, 0)
    for metric, number in (
        ("cerebrum_completions_started_total", stats["requests_total"]),
        ("cerebrum_completions_active", stats["requests_active"]),
        ("cerebrum_model_loaded", stats["models_loaded"]),
        ("llamacpp:spec_decode_num_draft_tokens_total", stats["draft_tokens"]),
        ("llamacpp:spec_decode_num_accepted_tokens_total", stats["accepted_tokens"]),
    ):
        assert sum(of(theirs, metric).values()) == number, metric
    assert theirs["cerebrum_memory_total_bytes",] == psutil.virtual_memory().total
    assert stats["memory_total_mb"] == round(psutil.virtual_memory().total / 2**20, 1)
    assert stats["draft_tokens"] >= stats["accepted_tokens"] > 0
    tokens, cached, prompt = (
        sum(result[name] for result in results) for name in ("total_tokens", "cached_tokens", "prompt_tokens")
    )
    for expected, of_pi, of_vps in (
        (tokens, "cerebrum_tokens_total", "llamacpp:tokens_predicted_total"),
        (prompt - cached, "cerebrum_prompt_tokens_total", "llamacpp:prompt_tokens_total"),
        (cached, "cerebrum_prompt_tokens_cached_total", "llamacpp:prompt_tokens_cached_total"),
    ):
        assert ours[of_pi, SMALL] - before[0].get((of_pi, SMALL), 0) == expected
        assert theirs[of_vps, SMALL] - before[1].get((of_vps, SMALL), 0) == expected
    for one, old, new in zip(daemons, before, (ours, theirs), strict=True):
        ended = (sum(of(samples, "cerebrum_completions_ended_total").values()) for samples in (new, old))
        assert next(ended) - next(ended) == len(results)
        process = psutil.Process(one.process.pid)
        assert new["process_start_time_seconds",] == pytest.approx(process.create_time(), abs=10)
        assert new["process_resident_memory_bytes",] == pytest.approx(process.memory_info().rss, rel=0.1)
        assert new["process_cpu_seconds_total",] == pytest.approx(sum(process.cpu_times()[:2]), rel=0.1, abs=1)
        assert 0 < new["process_open_fds",] < new["process_max_fds",]


@pytest.mark.slow
def test_numbers_outlive_the_model(daemons: Daemons) -> None:
    pi, vps = daemons
    traffic(pi)
    loaded = read(ask(vps.port, "/metrics"))
    assert json.loads(ask(vps.port, f"/v1/unload/{SMALL}", {}))["unloaded"] is True
    gone = read(ask(vps.port, "/metrics"))
    assert (loaded["cerebrum_model_loaded", SMALL], gone["cerebrum_model_loaded", SMALL]) == (1, 0)
    assert loaded["cerebrum_model_memory_bytes", SMALL] > 1e8
    assert gone["cerebrum_model_memory_bytes", SMALL] == gone["cerebrum_prompt_cache_bytes", SMALL] == 0
    for key in ("llamacpp:tokens_predicted_total", SMALL), ("cerebrum_completions_ended_total", SMALL, "length"):
        assert gone[key] == loaded[key] > 0
    traffic(pi)
    assert (
        read(ask(vps.port, "/metrics"))["cerebrum_model_loads_total", SMALL]
        == gone["cerebrum_model_loads_total", SMALL] + 1
    )


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("prometheus"), reason="expected Debian's package prometheus")
def test_prometheus_answers_the_queries_of_the_docs(daemons: Daemons, tmp_path: Path) -> None:
    """It is configured as docs/operate.md says, but for names and the interval."""
    page = (ROOT / "docs/operate.md").read_text()
    (block,) = re.findall(r"^```yaml\n(scrape_configs:\n.*?)^```$", page, re.M | re.S)
    queries = re.findall(r"^\| `([^`]+\[\d+[mh]\][^`]*)` \|", page, re.M)
    assert len(queries) == 5
    key, config, log = (tmp_path / name for name in ("key", "prometheus.yml", "log"))
    key.write_text(f"{KEY}\n")
    block = re.sub(r"/etc/prometheus/cerebrum-\w+\.key", str(key), block)
    for name, one in zip(("pi.local:7000", "vps:9000"), daemons, strict=True):
        block = block.replace(name, f"127.0.0.1:{one.port}")
    config.write_text(f"global: {{scrape_interval: 1s, scrape_timeout: 1s}}\n{block}")
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={tmp_path}/tsdb"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stderr=output, stdout=output)
    try:
        listening = re.compile(r'Listening on"? .*address=127\.0\.0\.1:(\d+)')
        port = int(wait_until(lambda: listening.search(log.read_text()), "Prometheus listens")[1])

        def figures(query: str) -> list[float]:
            try:
                reply = json.loads(ask(port, f"/api/v1/query?{urllib.parse.urlencode({'query': query})}"))
            except urllib.error.HTTPError:  # 503: it is not ready yet
                return []
            values = [float(sample["value"][1]) for sample in reply["data"]["result"]]
            return [value for value in values if not math.isnan(value)]

        wait_until(lambda: figures("up") == [1, 1], "both are scraped")
        for one in daemons:
            text = ask(one.port, "/metrics")
            checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
            foreign = sorted(set(re.findall(r"llamacpp:\w+", text)))
            assert checked.stderr.splitlines() == [f"{name} metric names should not contain ':'" for name in foreign]
        traffic(daemons[0])
        for query in queries:
            wait_until(lambda query=query: figures(query), query)  # type: ignore[misc]
    finally:
        process.terminate()
        process.wait(PATIENCE)
