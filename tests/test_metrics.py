"""/metrics of both daemons: the text, the numbers behind it, and whether others can read it.

The peers are prometheus_client's parser and Debian's promtool, which also checks the queries of
docs/operate.md.
"""

from __future__ import annotations

import asyncio
import doctest
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from harness import KEY, ROOT, Client, Daemon, daemon, until, with_weights
from prometheus_client.parser import text_string_to_metric_families
from scripted import CHUNKED, GOOD, HANG, RESET, Backend, Pi, chunk, error, event, pi_for, token

from cerebrum import metrics
from cerebrum.metrics import Metric, Tally, write_metrics, write_stats
from cerebrum.pi import breaker

SMALL = "qwen_0_5b"

Samples = dict[tuple[str, ...], float]


def read(text: str) -> Samples:
    """The value of each sample, by its name and the values of its labels in the order of the
    labels' names.
    """
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *(sample.labels[name] for name in sorted(sample.labels)))
            assert key not in found, "a sample is there twice"
            found[key] = sample.value
    return found


def of(samples: Samples, name: str) -> dict[tuple[str, ...], float]:
    """The samples of a metric that are not 0, by the values of their labels."""
    return {key[1:]: value for key, value in samples.items() if key[0] == name and value}


async def scrape(pi: Pi) -> Samples:
    reply = await pi.get("/metrics")
    assert reply.status == 200
    assert reply.one("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    return read(reply.body.decode())


# ---------------------------------------------------------------------------------------- the table


ROWS = (
    Metric("size_bytes", "Size.", "size", "size_mb", 2**20),
    Metric("kinds_total", "Kinds.", "kinds", "kinds"),
    Metric("nothing", "Nothing now.", "nothing"),
)
KINDS = {'kind="a",code="1"': 2, 'kind="b",code="3"': 4}
SAMPLES = {
    ("size_bytes", "m"): 2**20 / 3,
    ("kinds_total", "1", "a", "m"): 2,
    ("kinds_total", "3", "b", "m"): 4,
}


def test_a_row_is_a_metric_and_a_member_of_the_statistics():
    assert doctest.testmod(metrics).failed == 0  # a Histogram's bounds, too
    subject = SimpleNamespace(size=2**20 / 3, kinds=KINDS, nothing={})
    table = [("model", {"m": subject}, ROWS)]
    assert write_stats(table) == {"size_mb": 0.3, "kinds": 6}
    text = write_metrics(table).decode()
    kinds = ["size_bytes gauge", "kinds_total counter"]
    assert re.findall("^# TYPE (.*)", text, re.M) == kinds
    assert read(text) == SAMPLES
    tally = Tally()
    tally.spoke(0.5, 0.5, tokens=1)  # one token alone has no time per token
    tally.spoke(1.0, 3.0, tokens=5)
    assert [*tally.first_token.lines("x", "")][-2:] == ["x_sum 1.5\n", "x_count 2\n"]
    assert [*tally.per_token.lines("x", "")][-2:] == ["x_sum 0.5\n", "x_count 1\n"]


# ------------------------------------------------------------------------------------ all the names


def members_of(value, name: str = "") -> set[str]:
    """`name type` of each member of JSON, at any depth."""
    if value and isinstance(value, list):
        value = {"": value[0]}
    if value and isinstance(value, dict):
        return set[str]().union(*(members_of(value[key], f"{name}.{key}") for key in value))
    return {f"{name} {type(value).__name__}"}


def names_of(text: str, stats) -> list[str]:
    """Each metric with its type and labels, and the members of /v1/stats with theirs, but for those
    of a draft model.
    """
    lines = members_of(stats)
    for family in text_string_to_metric_families(text):
        labels = set[str]().union(*(sample.labels for sample in family.samples))
        lines.add(" ".join([family.name, family.type, *sorted(labels)]))
    return sorted(line for line in lines if "draft_model" not in line)


OF_PI = """
.accepted int
.accepted_characters int
.backends..api str
.backends..available bool
.backends..breaker.failures int
.backends..breaker.opens int
.backends..breaker.retry_in_s float
.backends..breaker.state str
.backends..id str
.backends..max_concurrent int
.backends..message str
.backends..models. str
.backends..models_loaded list
.backends..requests_active int
.backends..requests_failed int
.backends..requests_total int
.backends..response_time_ms float
.backends..tokens_total int
.backends..version str
.breaker.failures int
.breaker.opens int
.breaker.retry_in_s float
.breaker.state str
.clients list
.load_avg. float
.memory_mb float
.replaced int
.requests_active int
.requests_total int
.requests_waiting int
.shared int
.speculative bool
.type_through int
.unnamed.accepted int
.unnamed.completions int
.unnamed.kept int
.unnamed.month.accepted int
.unnamed.month.completions int
.unnamed.month.kept int
.unnamed.month.seconds float
.unnamed.month.shown int
.unnamed.month.tokens int
.unnamed.name str
.unnamed.seconds float
.unnamed.shown int
.unnamed.today.accepted int
.unnamed.today.completions int
.unnamed.today.kept int
.unnamed.today.seconds float
.unnamed.today.shown int
.unnamed.today.tokens int
.unnamed.tokens int
.uptime float
.version str
.vps_available bool
.vps_response_time_ms float
cerebrum_accepted_characters counter
cerebrum_accepted_completions counter
cerebrum_accepted_tokens counter model
cerebrum_backend_active gauge backend
cerebrum_backend_failures counter backend
cerebrum_backend_models gauge backend
cerebrum_backend_models_loaded gauge backend
cerebrum_backend_places gauge backend
cerebrum_backend_probe_seconds gauge backend
cerebrum_backend_requests counter backend
cerebrum_backend_tokens counter backend
cerebrum_backend_up gauge backend
cerebrum_breaker_opens counter backend
cerebrum_breaker_state gauge backend state
cerebrum_build_info gauge daemon version
cerebrum_client_accepted counter client
cerebrum_client_completions counter client
cerebrum_client_kept_characters counter client
cerebrum_client_seconds counter client
cerebrum_client_shown_characters counter client
cerebrum_client_tokens counter client
cerebrum_completions_active gauge
cerebrum_completions_ended counter model reason
cerebrum_completions_failed counter
cerebrum_completions_started counter
cerebrum_completions_waiting gauge
cerebrum_draft_tokens counter model
cerebrum_http_requests counter code path
cerebrum_prompt_tokens counter model
cerebrum_prompt_tokens_cached counter model
cerebrum_reloads counter
cerebrum_replaced counter
cerebrum_shared counter
cerebrum_time_per_token_seconds histogram le model
cerebrum_time_to_first_token_seconds histogram le model
cerebrum_tokens counter model
cerebrum_type_through counter
process_cpu_seconds counter
process_resident_memory_bytes gauge
process_start_time_seconds gauge
"""
OF_VPSD = """
.accepted_tokens int
.cpu_percent float
.cpu_percent_others float
.draft_tokens int
.memory_available_mb float
.memory_total_mb float
.memory_used_mb float
.models_loaded int
.requests_active int
.requests_total int
.uptime float
.version str
cerebrum_build_info gauge daemon version
cerebrum_completions_active gauge
cerebrum_completions_started counter
cerebrum_cpu_others_ratio gauge
cerebrum_cpu_ratio gauge
cerebrum_http_requests counter code path
cerebrum_memory_available_bytes gauge
cerebrum_memory_total_bytes gauge
cerebrum_model_load_failures counter model
cerebrum_model_load_seconds counter model
cerebrum_model_loaded gauge model
cerebrum_model_loads counter model
cerebrum_model_memory_bytes gauge model
cerebrum_places gauge
cerebrum_prompt_cache_bytes gauge model
cerebrum_time_per_token_seconds histogram le model
cerebrum_time_to_first_token_seconds histogram le model
llamacpp:n_busy_slots_per_decode gauge model
llamacpp:n_decode counter model
llamacpp:prompt_seconds counter model
llamacpp:prompt_tokens counter model
llamacpp:prompt_tokens_cached counter model
llamacpp:requests_deferred gauge model
llamacpp:requests_processing gauge model
llamacpp:spec_decode_num_accepted_tokens counter model
llamacpp:spec_decode_num_draft_tokens counter model
llamacpp:spec_decode_num_drafts counter model
llamacpp:tokens_predicted counter model
llamacpp:tokens_predicted_seconds counter model
process_cpu_seconds counter
process_resident_memory_bytes gauge
process_start_time_seconds gauge
"""


def test_the_names_of_the_vps(tmp_path):
    with daemon("vpsd", tmp_path) as vps:
        stats = json.loads(ask(vps.port, "/v1/stats"))
        assert names_of(ask(vps.port, "/metrics"), stats) == OF_VPSD.split("\n")[1:-1]


# --------------------------------------------------------------------------------- the Pi, scripted


# The status, the path, and how often.
ANSWERED = """
200 /metrics 2
200 /v1/complete 2
200 /v1/complete/stream 1
200 /v1/models/{id} 1
400 /v1/complete 1
404 /v1/models/{id} 1
404 other 1
405 /v1/complete 1
499 /v1/complete/stream 1
500 /v1/complete 1
503 /v1/complete/stream 1
"""
ENDED = ("stop", "block", "other", "MODEL_LOAD_FAILED", "CANCELLED", "VPS_UNAVAILABLE")
# Of five answers, which had 2, 4, 2, 1 and 1 tokens.
COUNTED = json.loads("""{
    "tokens_total": 10,
    "prompt_tokens_total": 8,
    "prompt_tokens_cached_total": 11,
    "draft_tokens_total": 3,
    "accepted_tokens_total": 2,
    "time_to_first_token_seconds_count": 5,
    "time_per_token_seconds_count": 3}""")


async def test_the_pi_counts_what_it_does():
    work = {"prompt_tokens": 9, "cached_tokens": 6, "draft_tokens": 3, "accepted_tokens": 2}
    whole = event(done=True, total_tokens=4, finish_reason="block", **work)
    lies = {"prompt_tokens": 1, "cached_tokens": 5, "draft_tokens": -1, "accepted_tokens": "2"}
    lying = event(done=True, total_tokens=2, finish_reason="x\n" * 9, **lies)
    begun = [CHUNKED, chunk(token("a", 1))]
    end = b"0\r\n\r\n"
    scripts = [
        GOOD,
        [*begun, chunk(token("bcd", 4)), chunk(whole), end],
        [*begun, chunk(token("b", 2)), chunk(lying), end],
        [error(500, "MODEL_LOAD_FAILED")],
        [*begun, HANG],
        begun,
    ]
    stream = ("POST", "/v1/complete/stream", {"prompt": "x =", "language": "python"})
    async with Backend(scripts) as backend, pi_for(backend.port) as pi:
        assert (await scrape(pi))["cerebrum_http_requests_total", "200", "/v1/complete/stream"] == 0
        for method in (pi.complete, pi.complete, pi.stream):
            assert (await method()).status == 200
        assert (await pi.complete()).status == 500
        reader, writer = await pi.open(*stream)
        await reader.readuntil(b"total_tokens")
        assert (await scrape(pi))["cerebrum_completions_active",] == 1
        writer.transport.abort()
        await until(lambda: not pi.gateway.dispatcher.active)
        # An error behind the beginning of a stream counts once. A page gets some time to read the
        # error, and leaves meanwhile.
        reader, writer = await pi.open(*stream, Origin="http://127.0.0.1")
        await reader.readuntil(b"VPS_UNAVAILABLE")
        writer.transport.abort()
        await until(lambda: not pi.server.connections)
        assert (await pi.complete(max_tokens=0)).status == 400
        for path in ("/nothing", "/v1/models/nothing", f"/v1/models/{SMALL}", "/v1/complete"):
            await pi.get(path)
        pi.gateway.reconfigure(pi.gateway.config)  # keeps the numbers
        samples = await scrape(pi)
        answered = of(samples, "cerebrum_http_requests_total").items()
        found = sorted(f"{status} {path} {count:.0f}" for (status, path), count in answered)
        assert found == ANSWERED.split("\n")[1:-1]
        ended = of(samples, "cerebrum_completions_ended_total")
        assert ended == {(SMALL, reason): 1 for reason in ENDED}
        for name, number in COUNTED.items():
            assert samples[f"cerebrum_{name}", SMALL] == number, name
        assert samples["cerebrum_reloads_total",] == 1
        stats = (await pi.get("/v1/stats")).json
        assert (stats["requests_total"], stats["breaker"]["state"]) == (6, "closed")
        text = (await pi.get("/metrics")).body.decode()
        assert names_of(text, stats) == OF_PI.split("\n")[1:-1]


async def test_the_breaker_that_opens_is_seen(patch):
    patch(breaker, "OPEN_SECONDS", 60.0)
    async with Backend([[RESET]]) as backend, pi_for(backend.port) as pi:
        assert [(await pi.complete()).status for _ in range(4)] == [503] * 4
        samples = await scrape(pi)
        assert samples["cerebrum_breaker_state", "vps", "open"] == 1
        assert samples["cerebrum_breaker_opens_total", "vps"] == 1
        assert samples["cerebrum_backend_up", "vps"] == 0
        # At last nobody was asked.
        ended = {(SMALL, "VPS_UNAVAILABLE"): 3, ("none", "VPS_UNAVAILABLE"): 1}
        assert of(samples, "cerebrum_completions_ended_total") == ended


# -------------------------------------------------------------------- both daemons, real Prometheus


def ask(port: int, path: str, body=None) -> str:
    """The text of a good answer."""
    method = "GET" if body is None else "POST"
    reply = asyncio.run(Client(port=port).ask(method, path, body, X_API_Key=KEY))
    assert reply.status == 200, reply.body
    return reply.body.decode()


@pytest.fixture(scope="module")
def daemons(tmp_path_factory) -> Iterator[tuple[Daemon, Daemon]]:
    with with_weights(tmp_path_factory.mktemp("daemons")) as both:
        yield both


def traffic(pi: Daemon) -> list[dict[str, Any]]:
    """Completions that repeat themselves, so that something is drafted and cached."""
    prompt = "def total(items):\n    total = 0\n"
    for number in range(8):
        prompt += f"    total = total + items[{number}].price * items[{number}].count\n"
    body = {"prompt": prompt, "language": "python", "max_tokens": 40}
    body |= {"temperature": 0, "stop_at": "none"}
    return [json.loads(ask(pi.port, "/v1/complete", body)) for _ in range(2)]


@pytest.mark.slow
def test_both_agree_with_each_other(daemons):
    pi, vps = daemons
    results = traffic(pi)
    ours, theirs = (read(ask(one.port, "/metrics")) for one in daemons)
    assert theirs["llamacpp:n_busy_slots_per_decode", SMALL] == 1
    assert theirs["llamacpp:spec_decode_num_accepted_tokens_total", SMALL] > 0
    names = ("total_tokens", "cached_tokens", "prompt_tokens")
    tokens, cached, prompt = (sum(result[name] for result in results) for name in names)
    for expected, of_pi, of_vps in (
        (tokens, "tokens", "tokens_predicted"),
        (prompt - cached, "prompt_tokens", "prompt_tokens"),
        (cached, "prompt_tokens_cached", "prompt_tokens_cached"),
    ):
        assert ours[f"cerebrum_{of_pi}_total", SMALL] == expected
        assert theirs[f"llamacpp:{of_vps}_total", SMALL] == expected
    for server, samples in ((pi, ours), (vps, theirs)):
        assert sum(of(samples, "cerebrum_completions_ended_total").values()) == len(results)
        process = psutil.Process(server.process.pid)
        started = pytest.approx(process.create_time(), abs=10)
        assert samples["process_start_time_seconds",] == started
        resident = pytest.approx(process.memory_info().rss, rel=0.1)
        assert samples["process_resident_memory_bytes",] == resident
        spent = pytest.approx(sum(process.cpu_times()[:2]), rel=0.1, abs=1)
        assert samples["process_cpu_seconds_total",] == spent

    # The numbers outlive the model.
    assert theirs["cerebrum_model_memory_bytes", SMALL] > 1e8
    assert json.loads(ask(vps.port, f"/v1/unload/{SMALL}", {}))["unloaded"] is True
    gone = read(ask(vps.port, "/metrics"))
    for name in ("model_loaded", "model_memory_bytes", "prompt_cache_bytes"):
        assert gone[f"cerebrum_{name}", SMALL] == 0
    predicted = ("llamacpp:tokens_predicted_total", SMALL)
    for key in (predicted, ("cerebrum_completions_ended_total", SMALL, "length")):
        assert gone[key] == theirs[key] > 0
    traffic(pi)
    loads = "cerebrum_model_loads_total", SMALL
    assert read(ask(vps.port, "/metrics"))[loads] == gone[loads] + 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("promtool"), reason="expected Debian's package prometheus")
def test_promtool_accepts_the_metrics_and_the_queries_of_the_docs(daemons, tmp_path):
    docs = (ROOT / "docs/operate.md").read_text()
    queries = re.findall(r"^\| `([^`]+\[\d+[mh]\][^`]*)` \|", docs, re.M)
    assert len(queries) == 5
    rules = [{"record": "x", "expr": query} for query in queries]
    file = tmp_path / "rules.yml"
    file.write_text(json.dumps({"groups": [{"name": "docs", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", file], check=True, capture_output=True)
    metrics = [ask(one.port, "/metrics") for one in daemons]
    for name in re.findall(r"(?:cerebrum_|llamacpp:)\w+", "\n".join(queries)):
        assert re.search(rf"^{name}[{{ ]", "".join(metrics), re.M), name
    command = ["promtool", "check", "metrics"]
    for text in metrics:
        checked = subprocess.run(command, input=text, capture_output=True, text=True)
        foreign = sorted(set(re.findall(r"llamacpp:\w+", text)))
        expected = [f"{name} metric names should not contain ':'" for name in foreign]
        assert checked.stderr.splitlines() == expected
