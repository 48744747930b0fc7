"""vLLM itself behind a real Pi, from a start to more clients than it has sequences. `make
test-scale` installs it.

What vLLM's model says is the 0.5B's, at temperature 0. `test_engines.py` has the details, with a
program that answers as vLLM does.
"""

from __future__ import annotations

import re

import httpx
import pytest
import scale
from engines import Engine
from harness import PATIENCE, wait_until
from test_engines import FIBONACCI, KEY, Stream, backend, brief, endless, run_code, start_pi

SEQUENCES, PLACES = 4, 6


def metric(engine: Engine, name: str) -> float:
    """One of vLLM's own figures."""
    text = httpx.get(f"{engine.url}/metrics", timeout=PATIENCE, trust_env=False).text
    (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(value)


@pytest.mark.scale
def test_vllm_behind_the_pi(tmp_path):
    with scale.vllm(tmp_path / "vllm", KEY, "--max-num-seqs", str(SEQUENCES)) as engine:
        table = backend(engine, "openai", max_concurrent=PLACES, n_ctx=8192)
        with start_pi(tmp_path / "pi", {"one": table}) as pi:
            # With more above than fits.
            lines = [f"def f{n}(a, b):\n    return a * {n} + b\n\n\n" for n in range(200)]
            stream = Stream(pi, prompt="".join(lines) + FIBONACCI, max_tokens=64).end()
            assert (stream.clean, stream.last["finish_reason"]) == (True, "block"), stream.last
            assert run_code(FIBONACCI + stream.text)["fibonacci"](10) == 55, stream.text
            (model,) = pi.get("/v1/models")["models"]
            # The table is wrong; what the engine says is believed.
            assert model["n_ctx"] == scale.CONTEXT
            leaving = Stream(pi, **endless())
            leaving.wait_for_tokens(5)
            leaving.leave()
            wait_until(lambda: metric(engine, "num_requests_running") == 0, "its sequence has gone")
            streams = [Stream(pi, **endless() | {"max_tokens": 60}) for _ in range(PLACES)]
            others = PLACES - SEQUENCES
            wait_until(lambda: metric(engine, "num_requests_waiting") == others, "others wait")
            assert pi.post("/v1/complete", {"language": "python", **brief()}).status_code == 429
            for stream in streams:
                last = stream.end().last
                assert (stream.clean, last["finish_reason"]) == (True, "length"), last
                assert last["total_tokens"] == 60
            stats = pi.stats("one")
            assert (stats["requests_failed"], stats["breaker"]["failures"]) == (0, 0)
