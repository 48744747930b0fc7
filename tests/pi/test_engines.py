"""Real engines behind a real Pi: a second vpsd, llama-server, llama_cpp.server, and what stands for vLLM, which
`make test-scale` runs itself.

`make test-engines` installs and builds them. All are processes, and all but the last run the 0.5B at temperature 0.
What a model says cannot be asserted to the letter, since kernels differ between machines. But it completes a function
to one that computes the right numbers, and what follows the function must not be there.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engines
import httpx
import psutil
import pytest
import scripted_vllm
from engines import Engine, Unavailable
from harness import FILES, PATIENCE, ROOT, Daemon, command_of, daemon, settings, wait_until

from cerebrum.pi import fleet as pi_fleet

pytestmark = pytest.mark.engines
NIGHTLY = pytest.mark.nightly

MODEL, FILE = "qwen_0_5b", FILES["qwen_0_5b"]
ALIAS = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
KEY = "the-key-of-an-engine"
SOON = 15.0  # seconds; the completions that must end sooner would take longer
CATALOG: dict[str, Any] = {
    "id": MODEL,
    "name": "Qwen 0.5B",
    "parameters": "0.5B",
    "quantization": "Q4",
    "languages": ["python"],
    "file": FILE.name,
    "aliases": [ALIAS],
    "fim": ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
}

FIBONACCI = "def fibonacci(n):\n    if n < 2:\n        return n\n"
PREFIX, LINE, SUFFIX = "def add(a, b):\n", "    return ", "\n\n\nprint(add(1, 2))\n"
INSTRUCTION = "Write a function add(a, b) that returns the sum of two numbers."
CHAT = [{"role": "user", "content": "Write a Python function add(a, b) that returns the sum."}]
NUMBER = itertools.count()  # makes a prompt one that no engine has in its cache


# --------------------------------------------------------------------------------------------- the engines


@dataclass(frozen=True)
class Kind:
    """An engine: how to start it, how to configure the Pi for it, and how to see that it is idle."""

    name: str
    api: str
    start: Callable[[Path], AbstractContextManager[Engine]]
    is_idle: Callable[[Engine], bool]
    places: int = 2
    counts: bool = True  # its streams report the prompt's tokens, even if the Pi hangs up
    n_ctx: int = 4096
    checks_keys: bool = True


@contextmanager
def start(name: str, folder: Path, command: Callable[[int], list[str]], key: str = KEY) -> Iterator[Engine]:
    engine = Engine(name, folder, command, 0, key)
    engine.start()
    try:
        yield engine
    finally:
        engine.kill()


def start_vpsd(folder: Path, **more: str) -> AbstractContextManager[Engine]:
    """vpsd with a folder for models of its own."""
    models = folder / "models"
    models.mkdir(parents=True)
    (models / FILE.name).symlink_to(FILE)
    more |= {"CEREBRUM_MAX_CPU_PERCENT": "100", "CEREBRUM_MIN_FREE_MB": "0", "CEREBRUM_MAX_CONCURRENT": "5"}

    def command(port: int) -> list[str]:
        given = settings(folder, None, CEREBRUM_API_KEY=KEY, CEREBRUM_VPS_PORT=str(port), **more)
        return ["env", *(f"{name}={value}" for name, value in given.items()), *command_of("vpsd")]

    return start("vpsd", folder, command)


def start_vllm(folder: Path, context: int = 4096) -> AbstractContextManager[Engine]:
    def command(port: int) -> list[str]:
        return [sys.executable, str(ROOT / "tests/scripted_vllm.py"), str(port), KEY, ALIAS, str(context)]

    return start("scripted vLLM", folder, command)


def start_llama_server(folder: Path, **more: Any) -> AbstractContextManager[Engine]:
    """Without an alias it lists the whole path of its model. With a thread for each core it is ten times slower as soon
    as another program computes, since its threads wait for each other."""
    return engines.llama_server(folder, FILE, **{"key": KEY, "slots": 2, "more": ("-t", "1"), **more})


def start_llama_cpp(folder: Path, **more: Any) -> AbstractContextManager[Engine]:
    return engines.llama_cpp_server(folder, FILE, **{"key": KEY, "alias": ALIAS, **more})


def ask_engine(engine: Engine, path: str) -> Any:
    headers = {"Authorization": f"Bearer {engine.key}"}
    return httpx.get(engine.url + path, headers=headers, timeout=PATIENCE, trust_env=False).json()


def rests(pid: int) -> bool:
    """Whether a process uses hardly any CPU for 0.3 seconds."""
    process, ended = psutil.Process(pid), threading.Event()
    before = process.cpu_times()
    ended.wait(0.3)
    return sum(process.cpu_times()[:2]) - sum(before[:2]) <= 0.03


def has_ended_all(engine: Engine) -> bool:
    """Whether what stands for vLLM runs no completion."""
    words = [line.split(" ")[0] for line in engine.output().splitlines()]
    return words.count("asked") == sum(map(words.count, ("ended", "left", "refused")))


KINDS = (
    Kind("vpsd", "cerebrum", start_vpsd, lambda engine: ask_engine(engine, "/v1/stats")["requests_active"] == 0),
    Kind(
        "llama-server",
        "llama.cpp",
        start_llama_server,
        lambda engine: not any(slot["is_processing"] for slot in ask_engine(engine, "/slots")),
    ),
    # A second request would end the first one.
    Kind(
        "llama_cpp.server", "openai", start_llama_cpp, lambda engine: rests(engine.process.pid), places=1, counts=False
    ),
    Kind("scripted vLLM", "openai", start_vllm, has_ended_all, counts=False),
)


def had(context: AbstractContextManager[Engine], stack: ExitStack) -> Engine:
    """Enter it, or skip the test where there is no such engine."""
    if not FILE.exists():
        pytest.skip(f"{FILE} is missing: python3 vpsd.py fetch")
    try:
        return stack.enter_context(context)
    except Unavailable as reason:
        pytest.skip(str(reason))


# -------------------------------------------------------------------------------------------------- the Pi


@dataclass
class Pi:
    """cm4d as a process, asked over HTTP."""

    url: str
    daemon: Daemon

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, timeout=PATIENCE, trust_env=False).json()

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE, trust_env=False)

    def answer(self, path: str, body: Any) -> Any:
        response = self.post(path, body)
        assert response.status_code == 200, response.text + self.daemon.stdout()
        return response.json()

    def complete(self, **fields: Any) -> dict[str, Any]:
        return dict(self.answer("/v1/complete", {"language": "python", "temperature": 0, **fields}))

    def refused(self, **fields: Any) -> dict[str, Any]:
        """The error of a completion that no backend serves."""
        response = self.post("/v1/complete", {"language": "python", "temperature": 0, **fields})
        assert response.status_code == 503, response.text
        return dict(response.json())

    def stats(self, id: str) -> dict[str, Any]:
        (stats,) = [entry for entry in self.get("/v1/stats")["backends"] if entry["id"] == id]
        return dict(stats)

    def wait_for(self, *ids: str) -> None:
        """Until these backends are there."""
        wait_until(lambda: all(self.stats(id)["available"] for id in ids), f"{ids} are there")

    def wait_without(self, id: str) -> None:
        wait_until(lambda: not self.stats(id)["available"], f"{id} is away")


class Stream(threading.Thread):
    """A client of a stream, in a thread. `clean` is None until it has ended, and False if the body was cut."""

    def __init__(self, pi: Pi, path: str = "/v1/complete/stream", **fields: Any) -> None:
        super().__init__(daemon=True)
        self.url = pi.url + path
        self.fields = fields if "messages" in fields else {"language": "python", "temperature": 0, **fields}
        self.status = 0
        self.events: list[dict[str, Any]] = []
        self.clean: bool | None = None
        self.leaving = False
        self.start()

    def run(self) -> None:
        clean = True
        with suppress(httpx.StreamError):
            try:
                with httpx.stream("POST", self.url, json=self.fields, timeout=PATIENCE, trust_env=False) as response:
                    self.status = response.status_code
                    for line in response.iter_lines():
                        if line.startswith("data: {"):
                            self.events.append(json.loads(line.removeprefix("data: ")))
                        if self.leaving:
                            break
            except httpx.TransportError:
                clean = False
        self.clean = clean

    @property
    def text(self) -> str:
        return "".join(event.get("token", "") for event in self.events)

    @property
    def last(self) -> dict[str, Any]:
        return self.events[-1] if self.events else {}

    def wait_for_tokens(self, count: int = 1) -> None:
        wait_until(lambda: len(self.events) >= count or self.clean is not None, f"{count} tokens")
        assert len(self.events) >= count, (self.status, self.events)

    def leave(self) -> None:
        self.leaving = True
        self.end()

    def end(self) -> Stream:
        self.join(PATIENCE)
        assert self.clean is not None, (self.status, self.events)
        return self


@contextmanager
def start_pi(folder: Path, tables: dict[str, dict[str, Any]], ready: bool = True, **keys: str) -> Iterator[Pi]:
    """A Pi with a backend for each table. The keys of all are KEY, unless `keys` has another one."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {id: f"KEY_OF_{id.upper()}" for id in tables}
    lines = ["[[models]]", *(f"{name} = {json.dumps(value)}" for name, value in CATALOG.items())]
    for id, members in tables.items():
        lines.append("[[backends]]")
        whole = {"id": id, "key_env": variables[id], **members}
        lines += [f"{name} = {json.dumps(value)}" for name, value in whole.items()]
    (folder / "models.toml").write_text("\n".join([*lines, ""]))
    more = {"CEREBRUM_CM4_API_KEY": "", "CEREBRUM_MODELS_FILE": str(folder / "models.toml")}
    more |= {variable: keys.get(id, KEY) for id, variable in variables.items()}
    with daemon("cm4d", folder, **more) as started:
        pi = Pi(f"http://127.0.0.1:{started.port}", started)
        if ready:
            pi.wait_for(*tables)
        yield pi
    assert started.complaints() == ""


def backend(engine: Engine, api: str, **more: Any) -> dict[str, Any]:
    return {"url": engine.url, "api": api, **more}


def table_of(kind: Kind, engine: Engine) -> dict[str, Any]:
    return backend(engine, kind.api, max_concurrent=kind.places)


def endless() -> dict[str, Any]:
    """The fields of a completion that goes on for half a minute or longer."""
    return {"prompt": f"# list {next(NUMBER)}\n1\n2\n3\n4\n", "stop_at": "none", "max_tokens": 2000}


def brief() -> dict[str, Any]:
    """The fields of a completion that nobody has asked for yet."""
    return {"prompt": f"# list {next(NUMBER)}\n1\n2\n3\n4\n", "max_tokens": 3, "stop_at": "none"}


# ------------------------------------------------------------------------------- one engine, and all it does


@pytest.fixture(
    scope="module",
    params=[pytest.param(kind, id=kind.name, marks=NIGHTLY if kind.start is start_llama_cpp else ()) for kind in KINDS],
)
def kind(request: pytest.FixtureRequest) -> Kind:
    assert isinstance(request.param, Kind)
    return request.param


@pytest.fixture(scope="module")
def shared_engine(kind: Kind, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with ExitStack() as stack:
        yield had(kind.start(tmp_path_factory.mktemp("engine") / "engine"), stack)


@pytest.fixture
def engine(shared_engine: Engine) -> Engine:
    if shared_engine.process.poll() is not None:  # a test has killed it, and failed
        shared_engine.start()
    return shared_engine


@pytest.fixture
def pi(kind: Kind, engine: Engine, tmp_path: Path) -> Iterator[Pi]:
    with start_pi(tmp_path / "pi", {"one": table_of(kind, engine)}) as pi:
        yield pi


def run_code(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {"print": lambda *_: None}
    exec(code, names)
    return names


def check_result(result: dict[str, Any], kind: Kind) -> None:
    """A result has the figures that its engine reports, and no others."""
    assert (result["model"], result["language"]) == (MODEL, "python")
    assert result["total_tokens"] > 0
    assert 0 < result["inference_time"] < PATIENCE
    assert "backend" not in result, "there is only one"
    if kind.counts:
        assert result["prompt_tokens"] > 0
    elif kind.name == "llama_cpp.server":
        assert "prompt_tokens" not in result, "it tells none"


def test_complete(kind: Kind, pi: Pi) -> None:
    """The body of a function, and nothing behind it."""
    whole = pi.complete(prompt=FIBONACCI, max_tokens=100)
    stream = Stream(pi, prompt=FIBONACCI, max_tokens=100).end()
    done = stream.last
    assert (stream.status, stream.clean, done["done"]) == (200, True, True)
    for text, result in ((whole["completion"], whole), (stream.text, done)):
        assert (result["mode"], result["finish_reason"]) == ("complete", "block"), (text, result)
        assert [line for line in text.splitlines() if line and not line.startswith("    ")] == [], text
        assert text.endswith("\n")
        assert run_code(FIBONACCI + text)["fibonacci"](10) == 55, text
        check_result(result, kind)
    numbers = [event["total_tokens"] for event in stream.events[:-1]]
    assert numbers == sorted(set(numbers))
    if kind.name == "scripted vLLM":
        assert stream.text == whole["completion"] == scripted_vllm.BODY


def test_infill(kind: Kind, pi: Pi) -> None:
    fields = {"prompt": PREFIX + LINE, "suffix": SUFFIX, "max_tokens": 48}
    whole, stream = pi.complete(**fields), Stream(pi, **fields).end()
    assert (stream.status, stream.clean) == (200, True)
    for text, result in ((whole["completion"], whole), (stream.text, stream.last)):
        assert result["mode"] == "infill"
        assert result["finish_reason"] != "length", text
        assert run_code(PREFIX + LINE + text + SUFFIX)["add"](20, 3) == 23, text
        assert SUFFIX.strip() not in text, "the text behind the gap is not repeated"
        check_result(result, kind)
    if kind.name == "scripted vLLM":
        assert stream.text == whole["completion"] == scripted_vllm.GAP


def test_instruct(kind: Kind, pi: Pi) -> None:
    """Code alone: no fence, no chatter."""
    fields = {"prompt": "", "instruction": INSTRUCTION, "max_tokens": 200}
    whole, stream = pi.complete(**fields), Stream(pi, **fields).end()
    assert (stream.status, stream.clean) == (200, True)
    for text, result in ((whole["completion"], whole), (stream.text, stream.last)):
        assert (result["mode"], result["finish_reason"] != "length") == ("instruct", True), (text, result)
        assert "`" not in text
        assert text.lstrip().startswith(("def ", "#", '"""')), text
        assert run_code(text)["add"](20, 3) == 23
        check_result(result, kind)
    if kind.name == "scripted vLLM":
        assert stream.text.strip() == whole["completion"].strip() == "def add(a, b):\n    return a + b"


def test_limit(kind: Kind, pi: Pi) -> None:
    """A text that the limit of tokens ends."""
    result = pi.complete(**brief())
    assert (result["finish_reason"], result["total_tokens"]) == ("length", 3)
    stream = Stream(pi, **brief()).end()
    assert (stream.last["finish_reason"], stream.last["total_tokens"]) == ("length", 3)


def test_stop(pi: Pi) -> None:
    """A client's own end, which is not in the text."""
    fields = endless() | {"max_tokens": 60, "stop": ["\n8"]}
    for text in (pi.complete(**fields)["completion"], Stream(pi, **fields).end().text):
        assert text.strip() == "5\n6\n7"


def test_chat_as_openai_does(kind: Kind, pi: Pi) -> None:
    body = {"model": "", "messages": CHAT, "max_tokens": 80, "temperature": 0}
    whole = pi.answer("/v1/chat/completions", body)
    (choice,) = whole["choices"]
    assert (whole["model"], choice["message"]["role"]) == (MODEL, "assistant")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    stream = Stream(pi, "/v1/chat/completions", **body, **options).end()
    *chunks, usage = stream.events
    streamed = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    for text in (choice["message"]["content"], streamed):
        assert "def add(a, b):" in text
        assert "```" in text, "a chat is left as it is"
    assert (stream.clean, chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")) == (True, True)
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] > 0
    if kind.name == "scripted vLLM":
        counted = scripted_vllm.count(CHAT[0]["content"])
        assert streamed == choice["message"]["content"] == scripted_vllm.CHAT
        assert usage["usage"]["prompt_tokens"] == whole["usage"]["prompt_tokens"] == counted


def test_infill_as_llama_cpp_does(pi: Pi) -> None:
    body = {"input_prefix": PREFIX, "prompt": LINE, "input_suffix": SUFFIX, "n_predict": 32, "temperature": 0}
    answer = pi.answer("/infill", body)
    assert run_code(PREFIX + LINE + answer["content"] + SUFFIX)["add"](20, 3) == 23, answer
    assert (answer["stop"], answer["tokens_predicted"] > 0) == (True, True)
    # What a small model takes from another file is unpredictable.
    answer = pi.answer(
        "/infill", body | {"input_extra": [{"filename": "other.py", "text": "def f():\n    return 2\n"}]}
    )
    assert answer["content"].strip()
    assert (answer["stop"], answer["tokens_predicted"] > 0) == (True, True)


def test_models_health_and_statistics(kind: Kind, pi: Pi) -> None:
    (model,) = pi.get("/v1/models")["models"]
    assert (model["id"], model["available"], model["backends"]) == (MODEL, True, ["one"])
    assert model["n_ctx"] == kind.n_ctx
    health = pi.get("/health")
    assert (health["status"], health["vps_available"]) == ("healthy", True)
    assert health["backends"] == [{"id": "one", "available": True, "message": ""}]
    before = pi.stats("one")
    pi.complete(**brief())
    after = pi.stats("one")
    assert (after["api"], after["available"], after["models"]) == (kind.api, True, [MODEL])
    assert after["requests_total"] - before["requests_total"] == 1
    assert after["tokens_total"] - before["tokens_total"] == 3
    assert (after["requests_active"], after["requests_failed"]) == (0, before["requests_failed"])
    assert after["response_time_ms"] > 0
    assert after["breaker"]["state"] == "closed"


def test_a_client_that_leaves_ends_the_work(kind: Kind, engine: Engine, pi: Pi) -> None:
    before = pi.stats("one")
    stream = Stream(pi, **endless())
    stream.wait_for_tokens(5)
    assert pi.stats("one")["requests_active"] == 1
    stream.leave()
    wait_until(lambda: kind.is_idle(engine), f"{kind.name} is idle", seconds=SOON)
    wait_until(lambda: pi.stats("one")["requests_active"] == 0, "the place is free", seconds=SOON)
    after = pi.stats("one")
    assert after["tokens_total"] - before["tokens_total"] < 1000, "it would have ended by itself"
    assert (after["requests_failed"], after["breaker"]["failures"]) == (before["requests_failed"], 0)
    assert pi.complete(**brief())["total_tokens"] == 3


def test_a_wrong_key(kind: Kind, engine: Engine, tmp_path: Path) -> None:
    """The variable is named, and no key: neither ours nor the right one."""
    if not kind.checks_keys:
        pytest.skip(f"{kind.name} checks no key")
    tables = {"one": table_of(kind, engine)}
    with start_pi(tmp_path / "alone", tables, ready=False, one="another-key") as pi:
        error = pi.refused(**brief())
        assert (error["code"], "KEY_OF_ONE" in error["message"]) == ("VPS_UNAVAILABLE", True), error
        told = json.dumps([error, *map(pi.get, ("/health", "/v1/stats", "/v1/activity"))]) + pi.daemon.stdout()
        assert "another-key" not in told
        assert KEY not in told
    with ExitStack() as stack:
        spare = stack.enter_context(start_vllm(tmp_path / "spare"))
        tables["two"] = backend(spare, "openai")
        pi = stack.enter_context(start_pi(tmp_path / "both", tables, ready=False, one="another-key"))
        pi.wait_for("two")
        assert [pi.complete(**brief())["backend"] for _ in range(3)] == ["two"] * 3
        health = {entry["id"]: entry for entry in pi.get("/health")["backends"]}
        assert (health["one"]["available"], "KEY_OF_ONE" in health["one"]["message"]) == (False, True)
        assert (pi.get("/health")["status"], health["two"]["available"]) == ("healthy", True)


def test_death_and_return(kind: Kind, engine: Engine, tmp_path: Path) -> None:
    """Killed while it streams: an error event and a cut, and the other backend serves the next request. Without that
    one there is a 503. Started again, it is used again."""
    with ExitStack() as stack:
        spare = stack.enter_context(start_vllm(tmp_path / "spare"))
        tables = {"one": table_of(kind, engine), "two": backend(spare, "openai")}
        pi = stack.enter_context(start_pi(tmp_path / "pi", tables))
        assert pi.complete(**brief())["backend"] == "one"
        stream = Stream(pi, **endless())
        stream.wait_for_tokens(5)
        engine.kill()
        stream.end()
        assert (stream.clean, stream.last.get("error"), stream.last.get("code")) == (False, True, "VPS_UNAVAILABLE")
        assert all("token" in event for event in stream.events[:-1])
        assert "\nasked " not in "\n" + spare.output(), "a stream that has begun is not sent again"
        result = pi.complete(**brief())
        assert (result["backend"], result["total_tokens"]) == ("two", 3)
        pi.wait_without("one")
        assert pi.get("/health")["status"] == "healthy"
        spare.kill()
        assert pi.refused(**brief())["code"] == "VPS_UNAVAILABLE"
        engine.start()
        pi.wait_for("one")
        assert pi.complete(**brief())["backend"] == "one"


# ------------------------------------------------------------------------------------------------ two vpsd


def test_one_of_two_is_killed_while_five_clients_stream(tmp_path: Path) -> None:
    """A stream without a token is served by the other one; one that has begun is never sent again."""
    with ExitStack() as stack:
        # Two threads of each would wait for each other on two cores.
        one = had(start_vpsd(tmp_path / "one", CEREBRUM_THREADS="1"), stack)
        two = had(start_vpsd(tmp_path / "two", CEREBRUM_THREADS="1"), stack)
        tables = {id: backend(vps, "cerebrum", max_concurrent=5) for id, vps in (("one", one), ("two", two))}
        pi = stack.enter_context(start_pi(tmp_path / "pi", tables))
        with ThreadPoolExecutor(2) as pool:  # both load the model
            results = pool.map(lambda _: pi.complete(**brief()), range(2))
        assert {result["backend"] for result in results} == {"one", "two"}
        before = {id: pi.stats(id)["requests_total"] for id in tables}

        # The first goes to the first backend, and the others to the least busy one: the second, and then by turns.
        lines = "".join(f"def f{number}(a, b):\n    return a * {number} + b\n\n" for number in range(60))
        reading = Stream(pi, **endless() | {"prompt": lines, "max_tokens": 40})
        wait_until(lambda: pi.stats("one")["requests_active"] == 1, "the long prompt is being read")
        streams = []
        for number in range(4):
            streams.append(Stream(pi, **endless() | {"max_tokens": 60}))
            active = number + 2
            wait_until(lambda: pi.get("/v1/stats")["requests_active"] == active, "it has a place")  # noqa: B023
        for stream in streams:
            stream.wait_for_tokens()
        assert (reading.events, pi.stats("one")["requests_active"] >= 2) == ([], True)
        one.kill()
        for stream in (reading, *streams):
            stream.end()

        broken = [stream for stream in (reading, *streams) if not stream.clean]
        assert broken, "none was streaming from the first one"
        assert reading not in broken, "a stream without a token is served by the other one"
        for stream in (reading, *streams):
            assert stream.status == 200
            assert all("token" in event for event in stream.events[:-1])
            if stream in broken:
                assert (stream.last.get("error"), stream.last.get("code")) == (True, "VPS_UNAVAILABLE")
                assert len(stream.events) > 1
            else:
                assert (stream.last.get("done"), stream.last.get("backend")) == (True, "two")
                numbers = [event["total_tokens"] for event in stream.events]
                assert numbers == sorted(numbers)
        asked = {id: pi.stats(id)["requests_total"] - count for id, count in before.items()}
        assert asked == {"one": len(broken) + 1, "two": 5 - len(broken)}, "one was sent again after its first token"

        assert [pi.complete(**brief())["backend"] for _ in range(3)] == ["two"] * 3
        one.start()
        pi.wait_for("one")
        assert pi.complete(**brief())["backend"] == "one"


# ----------------------------------------------------------------------------------------- contexts' lengths


def long_prompt(functions: int) -> str:
    """About 20 tokens for each function, and FIBONACCI at the end."""
    lines = (f"def f{number}(a, b):\n    return a * {number} + b\n\n\n" for number in range(functions))
    return "".join(lines) + FIBONACCI


def check_fitted(result: dict[str, Any], prompt: str) -> None:
    """The end of the prompt was sent, and left room for the answer."""
    assert run_code(FIBONACCI + result["completion"])["fibonacci"](10) == 55
    assert result["kept"]["characters"] < result["kept"]["of"] == len(prompt)


def check_long_prompts(pi: Pi) -> None:
    """The answer has its room, also once the Pi has learned how the engine counts tokens."""
    prompt = long_prompt(100)
    check_fitted(pi.complete(prompt=prompt, max_tokens=64), prompt)
    assert Stream(pi, prompt=prompt, max_tokens=64).end().last["finish_reason"] == "block"
    result = pi.complete(prompt=f"{prompt}    # {next(NUMBER)}\n", max_tokens=64, stop_at="none")
    assert (result["finish_reason"], result["total_tokens"]) == ("length", 64)
    assert pi.stats("one")["requests_failed"] == 0


@pytest.mark.parametrize(
    ("start_engine", "api", "more"),
    [
        pytest.param(start_llama_server, "llama.cpp", {}, id="llama-server"),
        pytest.param(start_llama_cpp, "openai", {"n_ctx": 512}, id="llama_cpp.server", marks=NIGHTLY),
    ],
)
def test_a_prompt_is_fitted_to_a_short_context(start_engine: Any, api: str, more: Any, tmp_path: Path) -> None:
    """The Pi knows the length from llama-server's /props. llama_cpp.server does not report it, so the table does."""
    with ExitStack() as stack:
        engine = had(start_engine(tmp_path / "engine", context=512), stack)
        pi = stack.enter_context(start_pi(tmp_path / "pi", {"one": backend(engine, api, **more)}))
        (model,) = pi.get("/v1/models")["models"]
        assert model["n_ctx"] == 512
        check_long_prompts(pi)


@pytest.mark.parametrize("tokens", [64, 2000])
def test_a_prompt_is_fitted_by_what_a_refusal_says(tokens: int, tmp_path: Path) -> None:
    """The table is wrong. vLLM says so in a sentence, another one where the limit alone exceeds the context, and the
    Pi believes it until the next list."""
    with ExitStack() as stack:
        engine = had(start_vllm(tmp_path / "engine", 1024), stack)
        pi = stack.enter_context(start_pi(tmp_path / "pi", {"one": backend(engine, "openai", n_ctx=8192)}))
        prompt = long_prompt(200)
        check_fitted(pi.complete(prompt=prompt, max_tokens=tokens), prompt)
        assert engine.output().count("asked ") == 2
        (model,) = pi.get("/v1/models")["models"]
        assert model["n_ctx"] == 1024
        assert (pi.stats("one")["requests_failed"], pi.stats("one")["breaker"]["failures"]) == (0, 0)


@pytest.mark.parametrize("context", [1024, 8192])
def test_a_model_that_knows_its_length(context: int, tmp_path: Path) -> None:
    """vLLM lists `max_model_len`."""
    with ExitStack() as stack:
        engine = had(start_vllm(tmp_path / "engine", context), stack)
        pi = stack.enter_context(start_pi(tmp_path / "pi", {"one": backend(engine, "openai")}))
        for number, functions in enumerate((500, 600, 700), 1):
            prompt = long_prompt(functions)
            check_fitted(pi.complete(prompt=prompt, max_tokens=64), prompt)
            # A whole stream ends with the number of prompt tokens, from which the Pi learns.
            result = pi.complete(prompt=prompt, max_tokens=30, stop_at="none")
            assert (result["finish_reason"], result["total_tokens"]) == ("length", 30)
            assert engine.output().count("asked ") == 2 * number, "it fits at once"


@NIGHTLY
def test_a_list_of_models_that_waits_for_completions(tmp_path: Path) -> None:
    """llama_cpp.server ends a completion when it is asked for its models. So it is not asked meanwhile, and a text that
    takes longer than the time between two probes comes whole."""
    with ExitStack() as stack:
        engine = had(start_llama_cpp(tmp_path / "engine"), stack)
        pi = stack.enter_context(start_pi(tmp_path / "pi", {"one": backend(engine, "openai", max_concurrent=1)}))
        began = time.monotonic()
        tokens = 300
        while time.monotonic() - began < 2 * pi_fleet.PROBE_SECONDS:
            stream = Stream(pi, **endless() | {"max_tokens": tokens}).end()
            assert (stream.clean, stream.last.get("finish_reason")) == (True, "length"), stream.last
            assert stream.last["total_tokens"] == tokens
            tokens *= 2
        assert pi.stats("one")["available"]
        assert pi.stats("one")["requests_failed"] == 0


# ------------------------------------------------------------------------------------------- vLLM's refusals


def test_a_suffix_that_is_not_supported(tmp_path: Path) -> None:
    """vLLM takes a gap only by the model's marks. Where the table asks for `suffix`, another backend serves it."""
    fields = {"prompt": PREFIX + LINE, "suffix": SUFFIX}
    with ExitStack() as stack:
        engine = had(start_vllm(tmp_path / "engine"), stack)
        spare = had(start_vllm(tmp_path / "spare"), stack)
        tables = {"one": backend(engine, "openai", infill="suffix")}
        with start_pi(tmp_path / "alone", tables) as pi:
            error = pi.refused(**fields)
            assert (error["code"], "(400)" in error["message"]) == ("VPS_UNAVAILABLE", True)
            assert "suffix is only supported" not in json.dumps(error)
            assert pi.stats("one")["breaker"]["failures"] == 0, "it is there"
        tables["two"] = backend(spare, "openai")
        with start_pi(tmp_path / "both", tables) as pi:
            result = pi.complete(**fields)
            assert (result["completion"], result["backend"]) == (scripted_vllm.GAP, "two")


def test_an_engine_that_starts_later(tmp_path: Path) -> None:
    """An engine whose models are unknown counts as away; the request is not to blame."""
    with ExitStack() as stack:
        engine = had(start_vllm(tmp_path / "engine"), stack)
        engine.kill()
        pi = stack.enter_context(start_pi(tmp_path / "pi", {"one": backend(engine, "openai")}, ready=False))
        for _ in range(2):
            assert pi.refused(**brief())["code"] == "VPS_UNAVAILABLE"
        engine.start()
        pi.wait_for("one")
        assert pi.complete(**brief())["total_tokens"] == 3


def test_a_model_that_is_not_served_any_more(tmp_path: Path) -> None:
    """Started again with another model, it answers 404 until the Pi has asked for the list again."""
    name = [ALIAS]

    def command(port: int) -> list[str]:
        return [sys.executable, str(ROOT / "tests/scripted_vllm.py"), str(port), KEY, name[0], "4096"]

    with ExitStack() as stack:
        engine = stack.enter_context(start("scripted vLLM", tmp_path / "engine", command))
        spare = had(start_vllm(tmp_path / "spare"), stack)
        tables = {"one": backend(engine, "openai"), "two": backend(spare, "openai")}
        pi = stack.enter_context(start_pi(tmp_path / "pi", tables))
        assert pi.complete(**brief())["backend"] == "one"
        engine.kill()
        name[0] = "Qwen/Qwen3-Coder"
        engine.start()
        assert [pi.complete(**brief())["backend"] for _ in range(3)] == ["two"] * 3
        wait_until(lambda: pi.stats("one")["models"] == [], "the new list is known")
        assert pi.complete(**brief())["backend"] == "two"


# ---------------------------------------------------------------------------------------------------- https


def make_certificates(folder: Path) -> None:
    """ca.pem of a private authority, and server.pem of a server at 127.0.0.1 with server.key."""

    def openssl(*arguments: str) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
        command = ["openssl", "req", "-x509", *key, *arguments]
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"openssl cannot make a certificate: {result.stderr.strip()}")

    usage = ["-addext", "keyUsage=critical,keyCertSign,cRLSign"]
    openssl("-subj", "/CN=A private authority", "-keyout", "ca.key", "-out", "ca.pem", *usage)
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key"]
    openssl("-subj", "/CN=127.0.0.1", "-keyout", "server.key", "-out", "server.pem", *signed, *names)


@contextmanager
def tls_proxy(folder: Path, port: int) -> Iterator[int]:
    """A proxy that ends TLS in front of a port; its own port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    loop, tasks = asyncio.new_event_loop(), set[asyncio.Task[Any]]()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        tasks.add(task)
        try:
            behind = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(copy(reader, behind[1]), copy(behind[0], writer))
        finally:
            tasks.discard(task)

    async def end(server: asyncio.Server) -> None:
        server.close()
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        starting = asyncio.start_server(accept, "127.0.0.1", 0, ssl=context)
        server = asyncio.run_coroutine_threadsafe(starting, loop).result(PATIENCE)
        yield server.sockets[0].getsockname()[1]
        asyncio.run_coroutine_threadsafe(end(server), loop).result(PATIENCE)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        loop.close()


def test_https_with_a_private_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    with ExitStack() as stack:
        engine = had(start_llama_server(tmp_path / "engine"), stack)
        port = stack.enter_context(tls_proxy(tmp_path, engine.port))
        table = {"url": f"https://127.0.0.1:{port}", "api": "llama.cpp"}
        with start_pi(tmp_path / "knows", {"one": {**table, "ca_file": str(tmp_path / "ca.pem")}}) as pi:
            assert run_code(FIBONACCI + pi.complete(prompt=FIBONACCI)["completion"])["fibonacci"](10) == 55
            assert Stream(pi, prompt=FIBONACCI).end().last["finish_reason"] == "block"
            stream = Stream(pi, **endless())
            stream.wait_for_tokens(5)
            stream.leave()
            wait_until(
                lambda: not any(slot["is_processing"] for slot in ask_engine(engine, "/slots")), "idle", seconds=SOON
            )
        with start_pi(tmp_path / "does-not", {"one": table}, ready=False) as pi:
            error = pi.refused(**brief())
            assert error["code"] == "VPS_UNAVAILABLE"
            told = json.dumps([error, pi.get("/health")]).lower()
            assert [word for word in ("certificate", "ssl", "_verify", "traceback", "errno") if word in told] == []
            assert engine.output().count("Traceback") == 0
