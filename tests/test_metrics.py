"""/metrics of both daemons: the text, the numbers behind it, and whether others can read it.

The peers are prometheus_client's parser, Debian's promtool, and a Debian Prometheus that scrapes both daemons as the
README says and evaluates its queries.
"""

from __future__ import annotations

import asyncio
import doctest
import http.client
import json
import math
import re
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from harness import FILES, KEY, MODELS, PATIENCE, ROOT, Daemon, daemon, run, until, wait_until
from prometheus_client import ProcessCollector
from prometheus_client.parser import text_string_to_metric_families
from scripted import CHUNKED, GOOD, HANG, RESET, Backend, Pi, chunk, error, event, pi_for, token

import cerebrum_metrics
import cm4d
from cerebrum_metrics import FIRST_TOKEN_SECONDS, Histogram, Metrics, Tally, add_process, add_requests

SMALL = "qwen_0_5b"

Samples = dict[tuple[str, ...], float]


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
    """What is not 0 of a metric, by the values of its labels."""
    return {key[1:]: value for key, value in samples.items() if key[0] == name and value}


async def scrape(pi: Pi) -> Samples:
    reply = await pi.get("/metrics")
    assert (reply.status, reply.one("Content-Type")) == (200, "text/plain; version=0.0.4; charset=utf-8")
    return read(reply.body.decode())


# ---------------------------------------------------------------------------------------------- the text


def test_the_examples_of_the_module_are_true() -> None:
    assert doctest.testmod(cerebrum_metrics).failed == 0


def test_any_text_can_be_a_label() -> None:
    metrics = Metrics()
    strange = 'a "quoted" \\ back\\nslash,\nline} end='
    metrics.gauge("one", 'Says "why" \\ and\nhow.', {(strange, "x"): 1.5}, "first", "second")
    text = metrics.encode().decode()
    assert text == (
        '# HELP one Says "why" \\\\ and\\nhow.\n# TYPE one gauge\n'
        'one{first="a \\"quoted\\" \\\\ back\\\\nslash,\\nline} end=",second="x"} 1.5\n'
    )
    (family,) = text_string_to_metric_families(text)
    assert family.samples[0].labels == {"first": strange, "second": "x"}
    assert (family.type, family.documentation) == ("gauge", 'Says "why" \\ and\nhow.')


@pytest.mark.parametrize("value", [0, 1, -2.5, 0.1 + 0.2, 1e-9, 2**53 + 1.0, 10**18, 1.7e308, math.inf, -math.inf])
def test_a_number_is_read_as_it_was(value: float) -> None:
    assert float(cerebrum_metrics.format_number(value)) == value


def test_a_histogram_counts_each_value_up_to_infinity() -> None:
    histogram = Histogram((0.1, 1.0, 10.0))
    for value in (0.0, 0.1, 0.1000001, 1.0, 10.0, 10.1, 1e9):
        histogram.observe(value)
    metrics = Metrics()
    metrics.histogram("time_seconds", "Time.", {"m": histogram}, "model")
    assert read(metrics.encode().decode()) == {
        ("time_seconds_bucket", "0.1", "m"): 2,
        ("time_seconds_bucket", "1", "m"): 4,
        ("time_seconds_bucket", "10", "m"): 5,
        ("time_seconds_bucket", "+Inf", "m"): 7,
        ("time_seconds_sum", "m"): sum((0.0, 0.1, 0.1000001, 1.0, 10.0, 10.1, 1e9)),
        ("time_seconds_count", "m"): 7,
    }


def test_a_family_without_samples_is_left_out() -> None:
    metrics = Metrics()
    metrics.counter("nothing_total", "Nothing.", {}, "model")
    add_requests(metrics, {})
    assert metrics.encode() == b""


def test_one_token_alone_has_no_time_per_token() -> None:
    tally = Tally()
    tally.spoke(0.5, 0.5, tokens=1)
    tally.spoke(1.0, 3.0, tokens=5)
    assert (tally.first_token.sum, tally.first_token.cumulative()[-1]) == (1.5, (math.inf, 2))
    assert (tally.per_token.sum, tally.per_token.cumulative()[-1]) == (0.5, (math.inf, 1))


def test_the_process_is_described_by_the_usual_names() -> None:
    ours = Metrics()
    add_process(ours)
    samples = {key[0]: value for key, value in read(ours.encode().decode()).items()}
    for family in ProcessCollector(registry=None).collect():
        for sample in family.samples:
            assert samples.pop(sample.name) == pytest.approx(sample.value, rel=0.1, abs=2.0), sample.name
    assert samples == {}


# ------------------------------------------------------------------------------------- the Pi, scripted

WHOLE = event(
    done=True, total_tokens=4, finish_reason="block", prompt_tokens=9, cached_tokens=6, draft_tokens=3,
    accepted_tokens=2,
)  # fmt: skip
LIES = event(
    done=True, total_tokens=2, finish_reason="x\n" * 9, prompt_tokens=1, cached_tokens=5, draft_tokens=-1,
    accepted_tokens="2",
)  # fmt: skip


def told(*events: bytes) -> list[Any]:
    return [CHUNKED, *map(chunk, events), b"0\r\n\r\n"]


def test_the_pi_counts_what_it_does() -> None:
    scripts = [
        GOOD,
        told(token("a", 1), token("bcd", 4), WHOLE),
        told(token("a", 1), token("b", 2), LIES),
        [error(500, "MODEL_LOAD_FAILED")],
        [CHUNKED, chunk(token("a", 1)), HANG],
    ]

    async def scenario() -> None:
        async with Backend(scripts) as backend, pi_for(backend.port) as pi:
            before = await scrape(pi)
            assert of(before, "cerebrum_completions_ended_total") == {}
            assert before["cerebrum_http_requests_total", "200", "/v1/complete/stream"] == 0
            for _ in range(2):
                assert (await pi.complete()).status == 200
            assert (await pi.stream()).status == 200
            assert (await pi.complete()).status == 500
            reader, writer = await pi.open("POST", "/v1/complete/stream", {"prompt": "x =", "language": "python"})
            await reader.readuntil(b"total_tokens")
            assert (await scrape(pi))["cerebrum_completions_active",] == 1
            writer.transport.abort()
            await until(lambda: not pi.gateway.active)
            assert (await pi.complete(max_tokens=0)).status == 400
            for path in ("/nothing", "/v1/models/nothing", f"/v1/models/{SMALL}", "/v1/complete"):
                await pi.get(path)
            reader, writer = await asyncio.open_connection("127.0.0.1", pi.port)
            writer.write(b"nonsense\r\n")
            assert b"400 Invalid Request" in await reader.read()
            writer.transport.abort()
            samples, stats = await scrape(pi), (await pi.get("/v1/stats")).json
            assert of(samples, "cerebrum_http_requests_total") == {
                ("200", "/v1/complete"): 2,
                ("400", "/v1/complete"): 1,
                ("405", "/v1/complete"): 1,
                ("500", "/v1/complete"): 1,
                ("200", "/v1/complete/stream"): 1,
                ("499", "/v1/complete/stream"): 1,
                ("200", "/v1/models/{id}"): 1,
                ("404", "/v1/models/{id}"): 1,
                ("200", "/metrics"): 2,
                ("404", "other"): 1,
                ("400", "other"): 1,
            }
            assert of(samples, "cerebrum_completions_ended_total") == {
                (SMALL, "stop"): 1,
                (SMALL, "block"): 1,
                (SMALL, "other"): 1,
                (SMALL, "MODEL_LOAD_FAILED"): 1,
                (SMALL, "CANCELLED"): 1,
            }
            counted = ("tokens", "prompt_tokens", "prompt_tokens_cached", "draft_tokens", "accepted_tokens")
            assert [of(samples, f"cerebrum_{name}_total") for name in counted] == [
                {(SMALL,): 2 + 4 + 2 + 1},
                {(SMALL,): 5 + 3},
                {(SMALL,): 6 + 5},
                {(SMALL,): 3},
                {(SMALL,): 2},
            ]
            assert samples["cerebrum_time_to_first_token_seconds_count", SMALL] == 4
            assert samples["cerebrum_time_per_token_seconds_count", SMALL] == 3
            bounds = [f"{bound:g}" for bound in FIRST_TOKEN_SECONDS]
            buckets = [samples["cerebrum_time_to_first_token_seconds_bucket", le, SMALL] for le in [*bounds, "+Inf"]]
            assert buckets == sorted(buckets)
            assert buckets[-1] == 4
            check_agreement(samples, stats)
            assert (samples["cerebrum_completions_started_total",], stats["requests_total"]) == (5, 5)
            assert of(samples, "cerebrum_breaker_state") == {("vps", "closed"): 1}

    run(scenario())


def check_agreement(samples: Samples, stats: dict[str, Any]) -> None:
    """That the Pi's /metrics and /v1/stats say the same."""
    for metric, member in (
        ("completions_started_total", "requests_total"),
        ("completions_active", "requests_active"),
        ("shared_total", "shared"),
        ("replaced_total", "replaced"),
        ("type_through_total", "type_through"),
    ):
        assert samples[f"cerebrum_{metric}",] == stats[member], metric
    for one in stats["backends"]:
        for metric, member in (
            ("backend_up", "available"),
            ("backend_places", "max_concurrent"),
            ("backend_active", "requests_active"),
            ("backend_requests_total", "requests_total"),
            ("backend_failures_total", "requests_failed"),
            ("backend_tokens_total", "tokens_total"),
        ):
            assert samples[f"cerebrum_{metric}", one["id"]] == one[member], metric
        assert samples["cerebrum_backend_models", one["id"]] == len(one["models"])
        assert samples["cerebrum_backend_models_loaded", one["id"]] == len(one["models_loaded"])
        assert samples["cerebrum_breaker_opens_total", one["id"]] == one["breaker"]["opens"]
        assert of(samples, "cerebrum_breaker_state")[one["id"], one["breaker"]["state"]] == 1
    tokens = sum(of(samples, "cerebrum_tokens_total").values())
    assert tokens == sum(one["tokens_total"] for one in stats["backends"])


def test_the_breaker_that_opens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cm4d, "OPEN_SECONDS", 60.0)

    async def scenario() -> None:
        async with Backend([[RESET]]) as backend, pi_for(backend.port) as pi:
            for _ in range(4):
                assert (await pi.complete()).status == 503
            samples = await scrape(pi)
            assert {key[2]: samples[key] for key in samples if key[0] == "cerebrum_breaker_state"} == {
                "closed": 0,
                "open": 1,
                "half-open": 0,
            }
            assert samples["cerebrum_breaker_opens_total", "vps"] == 1
            assert samples["cerebrum_backend_up", "vps"] == 0
            assert of(samples, "cerebrum_completions_ended_total") == {
                (SMALL, "VPS_UNAVAILABLE"): 3,
                ("none", "VPS_UNAVAILABLE"): 1,  # nobody was asked
            }
            check_agreement(samples, (await pi.get("/v1/stats")).json)

    run(scenario())


def test_an_error_behind_the_beginning_of_a_stream_counts_once() -> None:
    async def scenario() -> None:
        broken = [CHUNKED, chunk(token("a", 1))]
        async with Backend([broken]) as backend, pi_for(backend.port) as pi:
            body = {"prompt": "x =", "language": "python"}
            # A page gets some time to read its error. It leaves in that time.
            reader, writer = await pi.open("POST", "/v1/complete/stream", body, Origin="http://127.0.0.1")
            await reader.readuntil(b"VPS_UNAVAILABLE")
            writer.transport.abort()
            await until(lambda: not pi.server.connections)
            codes = of(await scrape(pi), "cerebrum_http_requests_total")
            assert codes == {("503", "/v1/complete/stream"): 1}

    run(scenario())


def test_metrics_need_the_key_and_prometheus_way_of_sending_it_is_enough() -> None:
    async def scenario() -> None:
        async with Backend() as backend, pi_for(backend.port, client_keys=("k",)) as pi:
            assert (await pi.get("/metrics")).status == 401
            assert (await pi.get("/metrics", Authorization="Bearer k")).status == 200

    run(scenario())


def test_settings_that_are_read_again_keep_the_numbers() -> None:
    async def scenario() -> None:
        async with Backend() as backend, pi_for(backend.port) as pi:
            assert (await pi.complete()).status == 200
            pi.gateway.reconfigure(pi.gateway.config)
            samples = await scrape(pi)
            assert samples["cerebrum_reloads_total",] == 1
            assert of(samples, "cerebrum_tokens_total") == {(SMALL,): 2}

    run(scenario())


# ------------------------------------------------------------------------- both daemons, real Prometheus

needs_weights = pytest.mark.skipif(not FILES[SMALL].exists(), reason=f"{FILES[SMALL]} is missing: vpsd.py fetch")
needs_prometheus = pytest.mark.skipif(not shutil.which("prometheus"), reason="expected Debian's package prometheus")


def ask(port: int, path: str, body: Any = None, key: str = KEY) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    headers = {"Content-Type": "application/json", "X-API-Key": key}
    connection.request("GET" if body is None else "POST", path, json.dumps(body) if body else None, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    return reply.status, text


def scrape_config() -> str:
    """The block of the README."""
    (block,) = re.findall(r"^```yaml\n(scrape_configs:\n.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    return str(block)


@contextmanager
def prometheus(folder: Path, pi: int, vps: int) -> Iterator[int]:
    """A Prometheus on a port of the kernel's choice, configured as the README says, but for names and the interval."""
    key = folder / "key"
    key.write_text(f"{KEY}\n")
    block = re.sub(r"/etc/prometheus/cerebrum-\w+\.key", str(key), scrape_config())
    block = block.replace("pi.local:7000", f"127.0.0.1:{pi}").replace("vps:9000", f"127.0.0.1:{vps}")
    assert block.count(str(key)) == block.count("127.0.0.1:") == 2
    config = folder / "prometheus.yml"
    config.write_text(f"global: {{scrape_interval: 1s, scrape_timeout: 1s}}\n{block}")
    checked = subprocess.run(["promtool", "check", "config", str(config)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    log = folder / "log"
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--web.listen-address=127.0.0.1:0"], stderr=output, stdout=output)
    try:
        listening = re.compile(r'Listening on"? .*address=127\.0\.0\.1:(\d+)')
        match = wait_until(lambda: listening.search(log.read_text()), "Prometheus listens")
        wait_until(lambda: answers(int(match[1])), "Prometheus is ready")
        yield int(match[1])
    finally:
        process.terminate()
        process.wait(PATIENCE)


def answers(port: int) -> bool:
    try:
        return ask(port, "/-/ready")[0] == 200
    except OSError:
        return False


def query(port: int, path: str, **parameters: str) -> Any:
    status, text = ask(port, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}")
    reply = json.loads(text)
    assert (status, reply["status"]) == (200, "success"), (parameters, text)
    return reply["data"]


@pytest.fixture(scope="module")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    folder, models = tmp_path_factory.mktemp("daemons"), tmp_path_factory.mktemp("models")
    (models / FILES[SMALL].name).symlink_to(MODELS / FILES[SMALL].name)
    with (
        daemon("vpsd", folder / "vps", CEREBRUM_MODELS_DIR=str(models), CEREBRUM_MAX_CPU_PERCENT="100") as vps,
        daemon("cm4d", folder / "pi", CEREBRUM_VPS_URL=f"http://127.0.0.1:{vps.port}") as pi,
    ):
        wait_until(lambda: json.loads(ask(pi.port, "/v1/stats")[1])["vps_available"], "the Pi finds the VPS")
        yield pi, vps


def traffic(pi: Daemon) -> list[dict[str, Any]]:
    """Completions that repeat themselves, so that something is drafted and cached; and one error."""
    lines = "".join(f"    total = total + items[{number}].price * items[{number}].count\n" for number in range(8))
    body = {"prompt": f"def total(items):\n    total = 0\n{lines}", "language": "python", "temperature": 0}
    results = []
    for _ in range(2):
        status, text = ask(pi.port, "/v1/complete", body | {"max_tokens": 40, "stop_at": "none"})
        assert status == 200, text
        results.append(json.loads(text))
    assert ask(pi.port, "/v1/complete", {"prompt": ""})[0] == 400
    return results


@pytest.mark.parametrize("which", [0, 1], ids=["cm4d", "vpsd"])
@pytest.mark.slow
@needs_weights
@needs_prometheus
def test_promtool_finds_nothing_but_the_colon_of_llama_server(daemons: tuple[Daemon, Daemon], which: int) -> None:
    traffic(daemons[0])
    _, text = ask(daemons[which].port, "/metrics")
    assert read(text)
    for renamed in (text.replace("llamacpp:", "llamacpp_"), text):
        checked = subprocess.run(["promtool", "check", "metrics"], input=renamed, capture_output=True, text=True)
        lines = checked.stderr.splitlines()
        foreign = sorted(set(re.findall(r"llamacpp:\w+", renamed)))
        assert lines == [f"{name} metric names should not contain ':'" for name in foreign]
        assert (checked.stdout, checked.returncode) == ("", 3 if foreign else 0)
    assert bool(foreign) == (which == 1)


@pytest.mark.slow
@needs_weights
def test_both_agree_with_their_statistics_and_with_each_other(daemons: tuple[Daemon, Daemon]) -> None:
    pi, vps = daemons
    before = [read(ask(one.port, "/metrics")[1]) for one in daemons]
    results = traffic(pi)
    ours, theirs = (read(ask(one.port, "/metrics")[1]) for one in daemons)
    check_agreement(ours, json.loads(ask(pi.port, "/v1/stats")[1]))
    stats = json.loads(ask(vps.port, "/v1/stats")[1])
    assert theirs["cerebrum_completions_started_total",] == stats["requests_total"]
    assert theirs["cerebrum_completions_active",] == stats["requests_active"] == 0
    assert sum(of(theirs, "cerebrum_model_loaded").values()) == stats["models_loaded"] == 1
    drafted, accepted = (
        sum(of(theirs, f"llamacpp:spec_decode_num_{name}_tokens_total").values()) for name in ("draft", "accepted")
    )
    assert (drafted, accepted) == (stats["draft_tokens"], stats["accepted_tokens"])
    assert drafted >= accepted > 0
    tokens = sum(result["total_tokens"] for result in results)
    cached = sum(result["cached_tokens"] for result in results)
    computed = sum(result["prompt_tokens"] for result in results) - cached
    for name, of_pi, of_vps in (
        ("tokens", "cerebrum_tokens_total", "llamacpp:tokens_predicted_total"),
        ("computed", "cerebrum_prompt_tokens_total", "llamacpp:prompt_tokens_total"),
        ("cached", "cerebrum_prompt_tokens_cached_total", "llamacpp:prompt_tokens_cached_total"),
    ):
        expected = {"tokens": tokens, "computed": computed, "cached": cached}[name]
        assert ours[of_pi, SMALL] - before[0][of_pi, SMALL] == expected, name
        assert theirs[of_vps, SMALL] - before[1][of_vps, SMALL] == expected, name
    ended = "cerebrum_completions_ended_total"
    for old, new in zip(before, (ours, theirs), strict=True):
        assert sum(of(new, ended).values()) - sum(of(old, ended).values()) == len(results)


@pytest.mark.slow
@needs_weights
def test_numbers_outlive_the_model(daemons: tuple[Daemon, Daemon]) -> None:
    pi, vps = daemons
    traffic(pi)
    loaded = read(ask(vps.port, "/metrics")[1])
    status, text = ask(vps.port, f"/v1/unload/{SMALL}", {"now": True})
    assert (status, json.loads(text)["unloaded"]) == (200, True)
    gone = read(ask(vps.port, "/metrics")[1])
    assert (loaded["cerebrum_model_loaded", SMALL], gone["cerebrum_model_loaded", SMALL]) == (1, 0)
    assert loaded["cerebrum_model_memory_bytes", SMALL] > 1e8
    assert gone["cerebrum_model_memory_bytes", SMALL] == gone["cerebrum_prompt_cache_bytes", SMALL] == 0
    kept = [key for key in loaded if re.match(r"llamacpp:|cerebrum_time|cerebrum_model_load|cerebrum_comp", key[0])]
    kept.remove(("cerebrum_model_loaded", SMALL))
    assert {key: gone[key] for key in kept} == {key: loaded[key] for key in kept}
    traffic(pi)
    again = read(ask(vps.port, "/metrics")[1])
    assert again["cerebrum_model_loads_total", SMALL] == loaded["cerebrum_model_loads_total", SMALL] + 1
    assert again["llamacpp:tokens_predicted_total", SMALL] > loaded["llamacpp:tokens_predicted_total", SMALL]


@pytest.mark.slow
@needs_weights
@needs_prometheus
def test_prometheus_scrapes_both_and_answers_the_queries_of_the_readme(
    daemons: tuple[Daemon, Daemon], tmp_path: Path
) -> None:
    queries = re.findall(r"^\| `([^`]+\[\d+[mh]\][^`]*)` \|", (ROOT / "README.md").read_text(), re.M)
    assert len(queries) == 5
    with prometheus(tmp_path, *(one.port for one in daemons)) as port:

        def figures(expression: str) -> list[float]:
            samples = query(port, "query", query=expression)["result"]
            return [value for value in (float(sample["value"][1]) for sample in samples) if not math.isnan(value)]

        wait_until(lambda: figures("up") == [1, 1], "both are scraped")
        traffic(daemons[0])
        for expression in queries:
            wait_until(lambda expression=expression: figures(expression), expression)  # type: ignore[misc]
