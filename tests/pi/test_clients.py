"""Other people's clients against the Pi: openai (Python and node), llm, curl.

`make test-clients` installs them. Where a test asserts an exact text, a script stands for the VPS;
the tests with `weights` in their name ask both daemons and the 0.5B.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import FILES, KEY, PATIENCE, daemon
from scripted import CHUNKED, Backend, chunk, script, token
from test_peers import needs
from test_plugins import (
    COUNTED,
    LINE,
    PIECES,
    PREFIX,
    REQUESTS,
    SUFFIX,
    TEXT,
    WHOLE,
    Pi,
    completed,
    start_pi,
)

from cerebrum.pi import kind

pytestmark = pytest.mark.clients

CACHE = Path("~/.cache/cerebrum/clients").expanduser()  # node's packages
INSTALL = "please run: ./run.sh setup clients"
COUNTS = {
    "prompt_tokens": 7,
    "completion_tokens": 3,
    "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 5},
}
CHAT = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "a + b"},
    {
        "role": "user",
        "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "subtract."}],
    },
]
CHAT_SENT = [*CHAT[:3], {"role": "user", "content": "And\nsubtract."}]


@pytest.fixture
def pi(tmp_path: Path) -> Iterator[Pi]:
    """The VPS answers each request with TEXT."""
    with start_pi(tmp_path / "pi", [WHOLE]) as pi:
        yield pi


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pi]:
    """Both daemons, and the 0.5B."""
    file = FILES["qwen_0_5b"]
    if not file.exists():
        pytest.skip(f"{file} is missing: python3 vpsd.py fetch")
    folder = tmp_path_factory.mktemp("weights")
    (folder / "models").mkdir()
    (folder / "models" / file.name).symlink_to(file)
    easy = {"CEREBRUM_MAX_CPU_PERCENT": "100", "CEREBRUM_MIN_FREE_MB": "0", "CEREBRUM_THREADS": "1"}
    with ExitStack() as stack:
        vps = stack.enter_context(
            daemon("vpsd", folder / "vpsd", CEREBRUM_MODELS_DIR=str(folder / "models"), **easy)
        )
        url = f"http://127.0.0.1:{vps.port}"
        pi = stack.enter_context(
            daemon("cm4d", folder / "cm4d", CEREBRUM_CM4_API_KEY="", CEREBRUM_VPS_URL=url)
        )
        yield Pi(f"http://127.0.0.1:{pi.port}", Backend())
        assert pi.complaints() == ""


def completes_the_sum(text: str) -> bool:
    """Whether `text` completes PREFIX and LINE to a function that adds. Text behind the function
    does not count: the Pi knows where it ends only if it knows the language.
    """
    names: dict[str, Any] = {}
    exec(PREFIX + LINE + text.partition("\n\n")[0], names)
    return bool(names["add"](20, 3) == 23)


@pytest.fixture(scope="session")
def openai() -> Any:
    return pytest.importorskip("openai", reason=INSTALL)


def client_of(openai: Any, url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture
def client(openai: Any, pi: Pi) -> Any:
    return client_of(openai, pi.url + "/v1")


def test_openai_completes(client: Any, pi: Pi) -> None:
    raw = client.completions.with_raw_response.create(
        model="", prompt=PREFIX, max_tokens=16, stop="\n\n\n"
    )
    assert raw.text == json.dumps(json.loads(raw.text), separators=(",", ":"))
    whole = raw.parse().to_dict()
    assert abs(whole.pop("created") - time.time()) < PATIENCE
    about = {
        "id": "cmpl-" + raw.headers["X-Request-ID"],
        "object": "text_completion",
        "model": "qwen_0_5b",
    }
    choice = {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    assert whole == about | {"choices": [choice], "usage": COUNTS}
    (sent,) = pi.backend.completions
    assert sent == sent | {
        "mode": "complete",
        "prompt": PREFIX,
        "max_tokens": 16,
        "stop": ["\n\n\n"],
    }


def test_openai_streams_a_completion(client: Any, pi: Pi) -> None:
    gate = threading.Event()
    steps = PIECES[0], lambda: asyncio.to_thread(gate.wait, PATIENCE), *PIECES[1:]
    pi.backend.scripts = [script(*steps, **COUNTED, finish_reason="length")]
    body = {"prompt": PREFIX, "stream": True, "stream_options": {"include_usage": True}}
    with client.completions.create(model="", **body) as stream:
        chunks = [next(stream)]
        assert chunks[0].choices[0].text == PIECES[0]  # it came before the rest was written
        gate.set()
        chunks += stream
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    counts = chunks.pop()
    assert counts.choices == []
    assert counts.usage.to_dict() == COUNTS
    texts = [
        (chunk.choices[0].text, chunk.choices[0].finish_reason, chunk.usage) for chunk in chunks
    ]
    assert texts == [*((piece, None, None) for piece in PIECES), ("", "length", None)]


def test_openai_chats(client: Any, pi: Pi) -> None:
    whole = client.chat.completions.create(
        model="", messages=CHAT, max_completion_tokens=50
    ).to_dict()
    message = {"role": "assistant", "content": TEXT}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    assert whole == whole | {"object": "chat.completion", "choices": [choice], "usage": COUNTS}
    (sent,) = pi.backend.completions
    assert sent["messages"] == CHAT_SENT
    assert sent["max_tokens"] == 50
    assert sent["stop_at"] == "none"
    stream = client.chat.completions.create(model="", messages=CHAT, stream=True)
    deltas = [
        (chunk.choices[0].delta.to_dict(), chunk.choices[0].finish_reason) for chunk in stream
    ]
    texts = [({"content": piece}, None) for piece in PIECES]
    assert deltas == [({"role": "assistant", "content": ""}, None), *texts, ({}, "stop")]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_openai_takes_any_base_url(openai: Any, pi: Pi, ending: str) -> None:
    client = client_of(openai, pi.url + ending)
    assert client.completions.create(model="", prompt=PREFIX).choices[0].text == TEXT
    assert (
        client.chat.completions.create(model="", messages=CHAT).choices[0].message.content == TEXT
    )
    assert [model.id for model in client.models.list()] == ["qwen_0_5b"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def test_openai_raises_the_errors_of_a_bad_request(openai: Any, client: Any, pi: Pi) -> None:
    with pytest.raises(
        openai.BadRequestError, match=r"messages\[0\].content\[0\].type: "
    ) as caught:
        client.chat.completions.create(model="", messages=[{"role": "user", "content": [IMAGE]}])
    error = caught.value
    assert error.status_code == 400
    assert error.code == "INVALID_REQUEST"
    assert error.type == "invalid_request_error"
    with pytest.raises(openai.NotFoundError) as missed:
        client.models.retrieve("gpt-4")
    assert missed.value.code == "MODEL_NOT_FOUND"
    assert missed.value.type == "not_found_error"
    with pytest.raises(openai.NotFoundError):  # a path that the Pi does not have
        client.embeddings.create(model="", input="text")
    assert pi.backend.completions == []


def test_openai_raises_authentication_error(openai: Any, tmp_path: Path) -> None:
    with start_pi(tmp_path, [WHOLE], CEREBRUM_CM4_API_KEY=KEY) as pi:
        stranger = client_of(openai, pi.url + "/v1", "another-key")
        with pytest.raises(openai.AuthenticationError) as caught:
            stranger.chat.completions.create(model="", messages=CHAT, stream=True)
        assert caught.value.code == "UNAUTHORIZED"
        assert caught.value.type == "authentication_error"
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert pi.backend.completions == []
        friend = client_of(openai, pi.url + "/v1", KEY)
        assert friend.completions.create(model="", prompt=PREFIX).choices[0].text == TEXT


def test_openai_lists_models_without_a_vps(openai: Any, tmp_path: Path) -> None:
    """One plugin of llm waits 0.1 s for the list. Here the VPS accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with daemon("cm4d", tmp_path, CEREBRUM_CM4_API_KEY="", CEREBRUM_VPS_URL=url) as started:
            client = client_of(openai, f"http://127.0.0.1:{started.port}/v1")
            client = client.with_options(timeout=kind.ASIDE_SECONDS)  # as asking the VPS takes
            assert "qwen_0_5b" in [model.id for model in client.models.list()]


def test_openai_raises_api_error_in_a_stream(openai: Any, client: Any, pi: Pi) -> None:
    pi.backend.scripts = [[CHUNKED, chunk(token("a", 1))]]  # then the VPS closes the connection
    texts = []
    with pytest.raises(openai.APIError) as caught:
        texts += [
            chunk.choices[0].text
            for chunk in client.completions.create(model="", prompt=PREFIX, stream=True)
        ]
    assert caught.value.code == "VPS_UNAVAILABLE"
    assert (
        caught.value.message == "VPS backend is unavailable (it ended in the middle of its answer)"
    )


def test_llm(pi: Pi, tmp_path: Path) -> None:
    """The models `pi` (chats) and `code` (completions)."""
    pytest.importorskip("llm", reason=INSTALL)
    models = [{"model_id": "pi", "model_name": "qwen_0_5b", "api_base": pi.url + "/v1"}]
    models.append({**models[0], "model_id": "code", "completion": True})
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # YAML includes JSON
    home = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "LLM_USER_PATH": str(tmp_path),
        "NO_PROXY": "*",
    }
    for options in (
        ["-m", "pi", "-s", "You help.", "Add."],
        ["-c", "And subtract."],
        ["-m", "code", PREFIX],
    ):
        command = [sys.executable, "-m", "llm", *options]
        done = subprocess.run(
            command, env=home, cwd=tmp_path, input="", capture_output=True, text=True
        )
        assert done.returncode == 0
        assert done.stderr == ""
        assert done.stdout == TEXT + "\n"
    said = {"role": "user", "content": "Add."}
    more = {"role": "user", "content": "And subtract."}
    first, second, third = pi.backend.completions
    assert first["messages"] == [{"role": "system", "content": "You help."}, said]
    assert second["messages"][-3:] == [said, {"role": "assistant", "content": TEXT}, more]
    assert third["mode"] == "complete"
    assert third["prompt"] == PREFIX


NODE = """
import OpenAI from "openai"
const [url, prefix, suffix] = process.argv.slice(2)
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 })
const said = { pieces: [] }
const text = await client.completions.create({ model: "", prompt: prefix, suffix })
said.text = [text.choices[0].text, text.usage]
const stream = await client.completions.create({ model: "", prompt: prefix, stream: true })
for await (const chunk of stream) {
  said.pieces.push(chunk.choices[0].text)
}
const chat = { model: "", messages: [{ role: "user", content: "Add." }] }
said.chat = (await client.chat.completions.create(chat)).choices[0].message
const runner = client.chat.completions.stream({ ...chat, stream_options: { include_usage: true } })
said.streamed = [await runner.finalContent(), (await runner.totalUsage()).total_tokens]
await client.models.retrieve("gpt-4").catch((error) => {
  said.error = [error.constructor.name, error.status, error.code, error.type]
})
console.log(JSON.stringify(said))
"""


def test_node_openai(pi: Pi) -> None:
    node, npm = needs("node"), needs("npm")
    if not (CACHE / "node_modules/openai").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [npm, "install", "--silent", "--no-audit", "--no-fund", "openai@6"],
            cwd=CACHE,
            check=True,
        )
    command = [node, "--input-type=module", "-", pi.url, PREFIX, SUFFIX]
    done = subprocess.run(
        command, cwd=CACHE, input=NODE, capture_output=True, text=True
    )  # CACHE has its packages
    assert done.returncode == 0
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["text"] == [TEXT, COUNTS]
    assert said["pieces"] == [*PIECES, ""]
    assert said["streamed"] == [TEXT, 10]
    assert said["chat"] == {"role": "assistant", "content": TEXT}
    assert said["error"] == ["NotFoundError", 404, "MODEL_NOT_FOUND", "not_found_error"]


def curl(*options: str) -> str:
    done = subprocess.run(
        [needs("curl"), "-sS", "--noproxy", "*", *options], capture_output=True, timeout=PATIENCE
    )
    assert done.returncode == 0
    assert done.stderr == b""
    return done.stdout.decode()


# The default Content-Type is application/x-www-form-urlencoded; -0 is HTTP/1.0.
OPTIONS = [
    [],
    ["-H", "Content-Type:"],
    ["-0"],
    ["-H", "Transfer-Encoding: chunked"],
    ["-H", "Authorization: Bearer x"],
]


@pytest.mark.parametrize("options", OPTIONS)
def test_curl(pi: Pi, options: list[str]) -> None:
    body = {"prompt": PREFIX + LINE, "suffix": SUFFIX}
    for path in ("/v1/completions", "/completions", "/v1/completions/"):
        assert (
            json.loads(curl(*options, "-d", json.dumps(body), pi.url + path))["choices"][0]["text"]
            == TEXT
        )
    another = body | {"stream": True, "filename": f"{options}"}
    streamed = curl("-N", *options, "-d", json.dumps(another), pi.url + "/v1/completions")
    *events, done, nothing = streamed.split("\n\n")
    assert done == "data: [DONE]"
    assert nothing == ""
    assert [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events] == [
        *PIECES,
        "",
    ]


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plugin_with_weights(weights: Pi, name: str) -> None:
    text = completed(weights, name)
    assert "<|" not in text
    assert text.strip() if name == "codecompanion" else completes_the_sum(text), text
