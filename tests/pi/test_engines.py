"""Real engines behind a real Pi: llama-server and llama_cpp.server. `make test-scale` runs the same
tests with vLLM.

`make test-engines` installs and builds them. Both are processes, and run the 0.5B at temperature 0.
What a model says cannot be asserted to the letter, since kernels differ between machines. But it
completes a function to one that computes the right numbers, and what follows the function must not
be there.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import pytest
from engines import Engine, Unavailable
from harness import FILES, PATIENCE, Client, Daemon, Reply, daemon
from test_editors import data

pytestmark = pytest.mark.engines
NIGHTLY = pytest.mark.nightly

MODEL, FILE = "qwen_0_5b", FILES["qwen_0_5b"]
ALIAS = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
KEY = "the-key-of-an-engine"
CATALOG = f"""
[[models]]
id = "{MODEL}"
name = "Qwen 0.5B"
parameters = "0.5B"
quantization = "Q4"
languages = ["python"]
file = "{FILE.name}"
aliases = ["{ALIAS}"]
fim = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]

[[backends]]
id = "one"
key_env = "KEY_OF_ONE"
"""

FIBONACCI = "def fibonacci(n):\n    if n < 2:\n        return n\n"
PREFIX, LINE = "def add(a, b):\n", "    return "
SUFFIX = "\n\n\nprint(add(1, 2))\n"
CHAT = [{"role": "user", "content": "Write a Python function add(a, b) that returns the sum."}]
NUMBER = itertools.count()  # makes a prompt one that no engine has in its cache


GREEDY = {"language": "python", "temperature": 0}


# -------------------------------------------------------------------------------------- the engines


@dataclass(frozen=True)
class EngineKind:
    """An engine: how to start it, and how to configure the Pi for it."""

    name: str
    api: str
    start: Callable[[Path], AbstractContextManager[Engine]]
    places: int = 2
    counts: bool = True  # its streams report the prompt's tokens, even if the Pi hangs up

    def __str__(self) -> str:
        return self.name


def start_llama_server(folder: Path, context: int = 4096) -> AbstractContextManager[Engine]:
    return engines.llama_server(folder, FILE, KEY, context)


def start_llama_cpp(folder: Path, context: int = 4096) -> AbstractContextManager[Engine]:
    return engines.llama_cpp_server(folder, FILE, KEY, ALIAS, context)


LLAMA_SERVER = EngineKind("llama-server", "llama.cpp", start_llama_server)
# A second request would end the first one.
LLAMA_CPP = EngineKind("llama_cpp.server", "openai", start_llama_cpp, places=1, counts=False)


def had(context: AbstractContextManager[Engine], stack: ExitStack) -> Engine:
    """Enter it, or skip the test where there is no such engine."""
    if not FILE.exists():
        pytest.skip(f"{FILE} is missing: python3 vpsd.py fetch")
    try:
        return stack.enter_context(context)
    except Unavailable as reason:
        pytest.skip(str(reason))


# ------------------------------------------------------------------------------------------- the Pi


@dataclass(kw_only=True)
class Pi(Client):
    """cm4d as a process, and its client."""

    daemon: Daemon

    async def answered(self, path: str, **fields: Any) -> Reply:
        """A good answer."""
        reply = await self.post(path, fields)
        assert (reply.status, reply.clean) == (200, True), reply.body.decode()
        return reply

    async def both(self, **fields: Any) -> list[tuple[str, Any]]:
        """The text and the result of a completion, whole and as a stream."""
        asked = {**GREEDY, **fields}
        whole = (await self.answered("/v1/complete", **asked)).json
        *events, last = (await self.answered("/v1/complete/stream", **asked)).events
        tokens = [event for event in events if "token" in event]  # the others are comments
        numbers = [event["total_tokens"] for event in tokens]
        assert numbers == sorted(set(numbers))
        return [(whole["completion"], whole), ("".join(event["token"] for event in tokens), last)]

    async def backend(self) -> Any:
        """The figures of the only one."""
        (backend,) = (await self.stats())["backends"]
        return backend


@contextmanager
def start_pi(folder: Path, table: dict[str, Any]) -> Iterator[Pi]:
    """A Pi with one backend, whose key is KEY."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{name} = {json.dumps(value)}\n" for name, value in table.items()]
    catalog = folder / "models.toml"
    catalog.write_text(CATALOG + "".join(rows))
    more = {"CEREBRUM_CM4_API_KEY": "", "CEREBRUM_MODELS_FILE": str(catalog), "KEY_OF_ONE": KEY}
    with daemon("cm4d", folder, **more) as started:
        started.wait_for_line("one: VPS backend is available")
        yield Pi(port=started.port, daemon=started)
    assert started.complaints() == ""


def backend(engine: Engine, api: str, **more: Any) -> Any:
    return {"url": engine.url, "api": api, **more}


def table_of(kind: EngineKind, engine: Engine) -> Any:
    return backend(engine, kind.api, max_concurrent=kind.places)


def endless(max_tokens: int = 2000) -> Any:
    """The fields of a completion that nobody has asked for yet: by default it goes on for half a
    minute or longer.
    """
    prompt = f"# list {next(NUMBER)}\n1\n2\n3\n4\n"
    return {**GREEDY, "prompt": prompt, "stop_at": "none", "max_tokens": max_tokens}


# ---------------------------------------------------------------------- one engine, and all it does


KINDS = [LLAMA_SERVER, pytest.param(LLAMA_CPP, marks=NIGHTLY)]


@pytest.fixture(scope="module", params=KINDS, ids=str)
def kind(request: pytest.FixtureRequest) -> EngineKind:
    assert isinstance(request.param, EngineKind)
    return request.param


@pytest.fixture(scope="module")
def engine(kind: EngineKind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with ExitStack() as stack:
        yield had(kind.start(tmp_path_factory.mktemp("engine") / "engine"), stack)


@pytest.fixture
def pi(kind: EngineKind, engine: Engine, tmp_path: Path) -> Iterator[Pi]:
    with start_pi(tmp_path / "pi", table_of(kind, engine)) as pi:
        yield pi


def run_code(code: str) -> Any:
    names: Any = {"print": lambda *_: None}
    exec(code, names)
    return names


def check_result(result: Any, kind: EngineKind):
    """A result has the figures that its engine reports, and no others."""
    assert result == result | {"model": MODEL, "language": "python"}
    assert "backend" not in result
    assert result["total_tokens"] > 0
    assert 0 < result["inference_time"] < PATIENCE
    assert not kind.counts or result["prompt_tokens"] > 0
    assert kind is not LLAMA_CPP or "prompt_tokens" not in result, "it tells none"


async def test_complete(kind, pi: Pi):
    """The body of a function, and nothing behind it."""
    for text, result in await pi.both(prompt=FIBONACCI, max_tokens=100):
        assert (result["mode"], result["finish_reason"]) == ("complete", "block"), (text, result)
        assert all(line.startswith("    ") for line in text.splitlines() if line), text
        assert text.endswith("\n")
        assert run_code(FIBONACCI + text)["fibonacci"](10) == 55, text
        check_result(result, kind)


async def test_infill(kind, pi: Pi):
    for text, result in await pi.both(prompt=PREFIX + LINE, suffix=SUFFIX, max_tokens=48):
        assert result["mode"] == "infill"
        assert result["finish_reason"] != "length", text
        assert run_code(PREFIX + LINE + text + SUFFIX)["add"](20, 3) == 23, text
        assert SUFFIX.strip() not in text, "the text behind the gap is not repeated"
        check_result(result, kind)


async def test_instruct(kind, pi: Pi):
    """Code alone: no fence, no chatter."""
    instruction = "Write a function add(a, b) that returns the sum of two numbers."
    for text, result in await pi.both(prompt="", instruction=instruction, max_tokens=200):
        assert result["mode"] == "instruct"
        assert result["finish_reason"] != "length", text
        assert "`" not in text
        assert text.lstrip().startswith(("def ", "#", '"""')), text
        assert run_code(text)["add"](20, 3) == 23
        check_result(result, kind)


async def test_chat_as_openai_does(pi: Pi):
    body = {"model": "", "messages": CHAT, "max_tokens": 80, "temperature": 0}
    whole = (await pi.answered("/v1/chat/completions", **body)).json
    (choice,) = whole["choices"]
    assert (whole["model"], choice["message"]["role"]) == (MODEL, "assistant")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = await pi.answered("/v1/chat/completions", **body, **options)
    *chunks, usage, _ = data(stream)
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    for text in (choice["message"]["content"], streamed):
        assert "def add(a, b):" in text
        assert "```" in text, "a chat is left as it is"
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0


SHORT = [(LLAMA_SERVER, {}), pytest.param(LLAMA_CPP, {"n_ctx": 512}, marks=NIGHTLY)]


@pytest.mark.parametrize(("short", "more"), SHORT, ids=str)
async def test_a_prompt_is_fitted_to_a_short_context(short, more, tmp_path):
    """The Pi knows the length from llama-server's /props. llama_cpp.server does not report it, so
    the table does. The answer has its room, also once the Pi has learned how the engine counts
    tokens.
    """
    start: Any = short.start
    functions = [f"def f{n}(a, b):\n    return a * {n} + b\n\n\n" for n in range(100)]
    prompt = "".join(functions) + FIBONACCI
    with ExitStack() as stack:
        engine = had(start(tmp_path / "engine", context=512), stack)
        pi = stack.enter_context(start_pi(tmp_path / "pi", backend(engine, short.api, **more)))
        (model,) = (await pi.get("/v1/models")).json["models"]
        assert model["n_ctx"] == 512
        (text, result), (_, streamed) = await pi.both(prompt=prompt, max_tokens=64)
        code = FIBONACCI + text
        assert run_code(code)["fibonacci"](10) == 55, "the end of the prompt was not sent"
        assert result["kept"]["characters"] < result["kept"]["of"] == len(prompt)
        assert streamed["finish_reason"] == "block"
        asked = {**GREEDY, "prompt": f"{prompt}    # {next(NUMBER)}\n", "stop_at": "none"}
        result = (await pi.answered("/v1/complete", **asked, max_tokens=64)).json
        assert (result["finish_reason"], result["total_tokens"]) == ("length", 64)
        assert (await pi.backend())["requests_failed"] == 0
