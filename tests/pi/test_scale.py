"""vLLM itself behind a real Pi, from a start to more clients than it has sequences. `make
test-scale` installs it.

What vLLM's model says is the 0.5B's, at temperature 0. `test_engines.py` has the details, with a
program that answers as vLLM does.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import ExitStack

import pytest
import scale
from engines import Engine
from harness import Client, until
from test_engines import FIBONACCI, KEY, backend, endless, run_code, start_pi

SEQUENCES, PLACES = 4, 6


async def metric(engine: Engine, name: str) -> float:
    """One of vLLM's own figures."""
    text = (await Client(port=engine.port).get("/metrics")).body.decode()
    (value,) = re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE)
    return float(value)


@pytest.mark.scale
async def test_vllm_behind_the_pi(tmp_path):
    with ExitStack() as stack:
        vllm = scale.vllm(tmp_path / "vllm", KEY, "--max-num-seqs", str(SEQUENCES))
        engine = stack.enter_context(vllm)
        table = backend(engine, "openai", max_concurrent=PLACES, n_ctx=8192)
        pi = stack.enter_context(start_pi(tmp_path / "pi", table))
        # With more above than fits.
        lines = [f"def f{n}(a, b):\n    return a * {n} + b\n\n\n" for n in range(200)]
        for text, result in await pi.both(prompt="".join(lines) + FIBONACCI, max_tokens=64):
            assert result["finish_reason"] == "block", result
            assert run_code(FIBONACCI + text)["fibonacci"](10) == 55, text
        (model,) = (await pi.get("/v1/models")).json["models"]
        # The table is wrong; what the engine says is believed.
        assert model["n_ctx"] == scale.CONTEXT
        reader, leaving = await pi.open("POST", "/v1/complete/stream", endless())
        for _ in range(5):
            await reader.readuntil(b'{"token"')
        leaving.transport.abort()

        async def has(count: int, state: str) -> bool:
            return await metric(engine, f"num_requests_{state}") == count

        await until(lambda: has(0, "running"), "its sequence has gone")
        streams = [asyncio.create_task(pi.stream(**endless(60))) for _ in range(PLACES)]
        await until(lambda: has(PLACES - SEQUENCES, "waiting"), "others wait")
        assert (await pi.complete(**endless())).status == 429
        for stream in await asyncio.gather(*streams):
            last = stream.events[-1]
            assert (stream.clean, last["finish_reason"]) == (True, "length"), last
            assert last["total_tokens"] == 60
        stats = await pi.backend()
        assert (stats["requests_failed"], stats["breaker"]["failures"]) == (0, 0)
