"""Other people's clients against the Pi: openai (Python and node), llm, LiteLLM, curl.

`make test-clients` installs them. Where a test asserts an exact text, a script stands for the VPS; the tests with
`weights` in their name ask both daemons and the 0.5B.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from harness import FILES, KEY, PATIENCE, daemon, wait_until
from scripted import CHUNKED, HANG, Backend, chunk, token
from test_peers import needs
from test_plugins import (
    LINE,
    PIECES,
    PREFIX,
    REQUESTS,
    SUFFIX,
    TEXT,
    Gate,
    Pi,
    completed,
    completion,
    editing,
    start_pi,
)

from cerebrum.pi import upstream

pytestmark = pytest.mark.clients

CACHE = Path("~/.cache/cerebrum/clients").expanduser()  # node's packages
INSTALL = "please run: ./run.sh setup clients"
COUNTS = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "prompt_tokens_details": {"cached_tokens": 5}}
CHAT = [
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "a + b"},
    {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "subtract."}]},
]
CHAT_SENT = [*CHAT[:3], {"role": "user", "content": "And\nsubtract."}]


@pytest.fixture
def pi(tmp_path: Path) -> Iterator[Pi]:
    """The VPS answers each request with TEXT."""
    with start_pi(tmp_path / "pi", [completion(*PIECES)]) as pi:
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
        vps = stack.enter_context(daemon("vpsd", folder / "vpsd", CEREBRUM_MODELS_DIR=str(folder / "models"), **easy))
        url = f"http://127.0.0.1:{vps.port}"
        pi = stack.enter_context(daemon("cm4d", folder / "cm4d", CEREBRUM_CM4_API_KEY="", CEREBRUM_VPS_URL=url))
        yield Pi(f"http://127.0.0.1:{pi.port}", Backend())
        assert pi.complaints() == ""


def completes_the_sum(text: str) -> bool:
    """Whether `text` completes PREFIX and LINE to a function that adds. Text behind the function does not count: the Pi
    knows where it ends only if it knows the language."""
    names: dict[str, Any] = {}
    exec(PREFIX + LINE + text.partition("\n\n")[0], names)
    return bool(names["add"](20, 3) == 23)


# ------------------------------------------------------------------------------------------------- openai


@pytest.fixture(scope="session")
def openai() -> Any:
    return pytest.importorskip("openai", reason=INSTALL)


def client_of(openai: Any, url: str, key: str = "none") -> Any:
    return openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture
def client(openai: Any, pi: Pi) -> Any:
    return client_of(openai, pi.url + "/v1")


def test_openai_completes(client: Any, pi: Pi) -> None:
    raw = client.completions.with_raw_response.create(model="", prompt=PREFIX, max_tokens=16, stop="\n\n\n")
    assert raw.text == json.dumps(json.loads(raw.text), separators=(",", ":"))
    whole = raw.parse().to_dict()
    assert abs(whole.pop("created") - time.time()) < PATIENCE
    assert whole == {
        "id": "cmpl-" + raw.headers["X-Request-ID"],
        "object": "text_completion",
        "model": "qwen_0_5b",
        "choices": [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}],
        "usage": COUNTS,
    }
    (sent,) = pi.backend.completions
    assert (sent["mode"], sent["prompt"], sent["max_tokens"]) == ("complete", PREFIX, 16)
    assert (sent["temperature"], sent["stop"]) == (0.0, ["\n\n\n"])


def test_openai_fills_in(client: Any, pi: Pi) -> None:
    """More than one completion is asked for, and more tokens than there can be."""
    body = {
        "prompt": [PREFIX],
        "suffix": SUFFIX,
        "max_tokens": 99999,
        "n": 3,
        "best_of": 3,
        "temperature": 2,
        "seed": 5,
    }
    (choice,) = client.completions.create(model="gpt-3.5-turbo-instruct", **body).choices
    assert (choice.text, choice.finish_reason) == (TEXT, "stop")
    (sent,) = pi.backend.completions
    assert (sent["model"], sent["mode"], sent["prompt"], sent["suffix"]) == ("qwen_0_5b", "infill", PREFIX, SUFFIX)
    assert (sent["max_tokens"], sent["temperature"], sent["seed"]) == (2048, 1.0, 5)


@pytest.mark.parametrize("usage", [False, True])
def test_openai_streams_a_completion(client: Any, pi: Pi, usage: bool) -> None:
    gate = Gate()
    pi.backend.scripts = [completion(PIECES[0], gate, *PIECES[1:], reason="length")]
    options = {"stream_options": {"include_usage": True}} if usage else {}
    with client.completions.create(model="", prompt=PREFIX, stream=True, **options) as stream:
        chunks = [next(stream)]
        assert chunks[0].choices[0].text == PIECES[0]  # it came before the rest was written
        gate.opened.set()
        chunks += stream
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    if usage:
        counts = chunks.pop()
        assert (counts.choices, counts.usage.to_dict()) == ([], COUNTS)
    assert [(chunk.choices[0].text, chunk.choices[0].finish_reason) for chunk in chunks] == [
        *((piece, None) for piece in PIECES),
        ("", "length"),
    ]
    assert [chunk.usage for chunk in chunks] == [None] * 4


def test_openai_chats(client: Any, pi: Pi) -> None:
    raw = client.chat.completions.with_raw_response.create(model="", messages=CHAT, max_completion_tokens=50)
    whole = raw.parse().to_dict()
    assert abs(whole.pop("created") - time.time()) < PATIENCE
    message = {"role": "assistant", "content": TEXT}
    assert whole == {
        "id": "chatcmpl-" + raw.headers["X-Request-ID"],
        "object": "chat.completion",
        "model": "qwen_0_5b",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": COUNTS,
    }
    (sent,) = pi.backend.completions
    assert (sent["messages"], sent["max_tokens"], sent["stop_at"]) == (CHAT_SENT, 50, "none")


def test_openai_streams_a_chat(client: Any, pi: Pi) -> None:
    options = {"include_usage": True}
    stream = client.chat.completions.create(model="", messages=CHAT, stream=True, stream_options=options)
    *chunks, counts = list(stream)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert [(chunk.choices[0].delta.to_dict(), chunk.choices[0].finish_reason) for chunk in chunks] == [
        ({"role": "assistant", "content": ""}, None),
        *(({"content": piece}, None) for piece in PIECES),
        ({}, "stop"),
    ]
    assert (counts.choices, counts.usage.to_dict()) == ([], COUNTS)


def test_openai_lists_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert abs(model.created - time.time()) < PATIENCE
    listed = {"id": "qwen_0_5b", "object": "model", "created": model.created, "owned_by": "llamacpp"}
    assert model.to_dict() == listed
    assert client.models.retrieve("qwen_0_5b").to_dict() == listed


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_openai_takes_any_base_url(openai: Any, pi: Pi, ending: str) -> None:
    client = client_of(openai, pi.url + ending)
    assert client.completions.create(model="", prompt=PREFIX).choices[0].text == TEXT
    assert client.chat.completions.create(model="", messages=CHAT).choices[0].message.content == TEXT
    assert [model.id for model in client.models.list()] == ["qwen_0_5b"]
    assert client.models.retrieve("qwen_0_5b").id == "qwen_0_5b"


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "ls", "parameters": {"type": "object", "properties": {}}}}
REFUSED = [
    ({"messages": [{"role": "user", "content": [IMAGE]}]},
     'messages[0].content[0].type: expected one of text, input_text, output_text, got the string "image_url"'),
    ({"messages": CHAT, "tools": [TOOL]}, 'tools: expected nothing, or tool_choice "none", got '),
    ({"messages": []}, "messages: expected "),
    ({"messages": CHAT, "stop": ["x"] * 17}, "stop: expected "),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), REFUSED)
def test_openai_raises_bad_request_error(openai: Any, client: Any, pi: Pi, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="", **body)
    error = caught.value
    assert (error.status_code, error.code, error.type) == (400, "INVALID_REQUEST", "invalid_request_error")
    assert (error.param, error.body["message"].startswith(message)) == (None, True), error.body
    assert pi.backend.completions == []


def test_openai_raises_not_found_error(openai: Any, client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4")
    assert (caught.value.code, caught.value.type) == ("MODEL_NOT_FOUND", "not_found_error")
    with pytest.raises(openai.NotFoundError):  # a path that the Pi does not have
        client.embeddings.create(model="", input="text")


def test_openai_raises_authentication_error(openai: Any, tmp_path: Path) -> None:
    with start_pi(tmp_path, [completion(*PIECES)], CEREBRUM_CM4_API_KEY=KEY) as pi:
        stranger = client_of(openai, pi.url + "/v1", "another-key")
        for call in (
            lambda: stranger.completions.create(model="", prompt=PREFIX),
            lambda: stranger.chat.completions.create(model="", messages=CHAT, stream=True),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert (caught.value.code, caught.value.type) == ("UNAUTHORIZED", "authentication_error")
        with pytest.raises(openai.AuthenticationError):
            stranger.models.list()
        assert pi.backend.completions == []
        friend = client_of(openai, pi.url + "/v1", KEY)
        assert friend.completions.create(model="", prompt=PREFIX).choices[0].text == TEXT
        assert [model.id for model in friend.models.list()] == ["qwen_0_5b"]


def test_openai_raises_internal_server_error_without_a_vps(openai: Any, tmp_path: Path) -> None:
    """The list of models needs no VPS: one plugin of llm waits 0.1 s for it. Here the VPS accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with daemon("cm4d", tmp_path, CEREBRUM_CM4_API_KEY="", CEREBRUM_VPS_URL=url) as started:
            client = client_of(openai, f"http://127.0.0.1:{started.port}/v1")
            began = time.perf_counter()
            assert "qwen_0_5b" in [model.id for model in client.models.list()]
            assert time.perf_counter() - began < upstream.ASIDE_SECONDS  # as asking the VPS takes
    with daemon("cm4d", tmp_path / "alone", CEREBRUM_CM4_API_KEY="") as started:
        client = client_of(openai, f"http://127.0.0.1:{started.port}/v1")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="", prompt=PREFIX)
        assert (caught.value.status_code, caught.value.code) == (503, "VPS_UNAVAILABLE")


def test_openai_raises_rate_limit_error(openai: Any, client: Any, pi: Pi) -> None:
    """Infills wait for a place for 3 s."""
    pi.backend.scripts = [[CHUNKED, chunk(token("a", 1)), HANG]]
    with ExitStack() as streams:
        for prompt in (PREFIX, "fn third("):
            stream = client.completions.create(model="", prompt=prompt, suffix=SUFFIX, stream=True)
            assert next(streams.enter_context(stream)).choices[0].text == "a"
        with pytest.raises(openai.RateLimitError) as caught:
            client.completions.create(model="", prompt="fn other(", suffix=") {}")
        assert (caught.value.code, caught.value.type) == ("RATE_LIMIT", "rate_limit_error")


def test_openai_raises_api_error_in_a_stream(openai: Any, client: Any, pi: Pi) -> None:
    pi.backend.scripts = [[CHUNKED, chunk(token("a", 1))]]  # then the VPS closes the connection
    texts = []
    with pytest.raises(openai.APIError) as caught:
        texts += [chunk.choices[0].text for chunk in client.completions.create(model="", prompt=PREFIX, stream=True)]
    assert caught.value.code == "VPS_UNAVAILABLE"
    assert caught.value.message == "VPS backend is unavailable (it ended in the middle of its answer)"


def test_openai_leaves(client: Any, pi: Pi) -> None:
    """A client that closes its stream ends its own completion, and no other."""
    pi.backend.scripts = [[CHUNKED, chunk(token("a", 1)), HANG], completion(*PIECES)]
    with client.chat.completions.create(model="", messages=CHAT, stream=True) as stream:
        assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "a"]
        assert client.completions.create(model="", prompt=PREFIX, suffix=SUFFIX).choices[0].text == TEXT
        assert pi.backend.running == 1
    wait_until(lambda: pi.backend.running == 0, "the VPS is left")


def test_openai_with_weights(openai: Any, weights: Pi) -> None:
    client = client_of(openai, weights.url + "/v1")
    body = {"prompt": PREFIX + LINE, "suffix": SUFFIX, "max_tokens": 24}
    text = client.completions.create(model="", **body).choices[0].text
    assert completes_the_sum(text), text
    stream = client.completions.create(model="qwen_0_5b", stream=True, **body)
    assert "".join(chunk.choices[0].text for chunk in stream) == text
    cut = client.completions.create(model="", prompt="// Numbers\n1, 2, 3,", max_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    turns = [{"role": "user", "content": "Say the word tangerine."}]
    answer = client.chat.completions.create(model="", messages=turns, max_tokens=20, temperature=0)
    turns += [answer.choices[0].message.to_dict(), {"role": "user", "content": "Which word did I ask for?"}]
    stream = client.chat.completions.create(model="", messages=turns, max_tokens=40, temperature=0, stream=True)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert "tangerine" in told.lower()


# ---------------------------------------------------------------------------------------------------- llm


@pytest.fixture
def llm(tmp_path: Path) -> Any:
    """Runs `llm` in a user directory of its own, with the models `pi` (chats) and `code` (completions)."""
    pytest.importorskip("llm", reason=INSTALL)
    home = tmp_path / "llm"
    home.mkdir()

    def run(url: str, *arguments: str) -> str:
        models = [{"model_id": "pi", "model_name": "qwen_0_5b", "api_base": url}]
        models.append({"model_id": "code", "model_name": "qwen_0_5b", "api_base": url, "completion": True})
        (home / "extra-openai-models.yaml").write_text(json.dumps(models))  # YAML includes JSON
        environment = {"PATH": os.environ["PATH"], "HOME": str(home), "LLM_USER_PATH": str(home), "NO_PROXY": "*"}
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments],
            env=environment,
            cwd=home,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    return run


def test_llm(llm: Any, pi: Pi) -> None:
    url = pi.url + "/v1"
    assert llm(url, "-m", "pi", "-s", "You help.", "Add.") == TEXT + "\n"
    assert llm(url, "-c", "And subtract.") == TEXT + "\n"
    assert llm(url, "-m", "pi", "--no-stream", "Add.") == TEXT + "\n"
    assert llm(url, "-m", "code", PREFIX) == TEXT + "\n"
    turns = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Add."}]
    first, second, third, fourth = pi.backend.completions
    assert first["messages"] == turns
    more = [{"role": "assistant", "content": TEXT}, {"role": "user", "content": "And subtract."}]
    assert [turn for turn in second["messages"] if turn["role"] != "system"] == [turns[1], *more]
    assert third["messages"] == [turns[1]]
    assert (fourth["mode"], fourth["prompt"]) == ("complete", PREFIX)


def test_llm_with_weights(llm: Any, weights: Pi) -> None:
    greedy = ("-o", "temperature", "0", "-o", "max_tokens", "40")
    url = weights.url + "/v1"
    assert "tangerine" in llm(url, "-m", "pi", *greedy, "Say the word tangerine.").lower()
    assert "tangerine" in llm(url, "-c", *greedy, "Which word did I ask for?").lower()


# ------------------------------------------------------------------------------------------------ LiteLLM


@pytest.fixture(scope="module")
def litellm() -> Any:
    """Its own warnings are none of ours."""
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it fetches a list of prices
    module = pytest.importorskip("litellm", reason=INSTALL)
    module.telemetry = False
    return module


@pytest.mark.filterwarnings("ignore::UserWarning:pydantic")
def test_litellm(litellm: Any, pi: Pi) -> None:
    where = {"api_base": pi.url + "/v1", "api_key": "none", "max_retries": 0}
    chat = litellm.completion(model="openai/qwen_0_5b", messages=CHAT, **where)
    assert (chat.choices[0].message.content, chat.choices[0].finish_reason) == (TEXT, "stop")
    assert (chat.usage.prompt_tokens, chat.usage.completion_tokens) == (7, 3)
    text = litellm.text_completion(model="text-completion-openai/qwen_0_5b", prompt=PREFIX, suffix=SUFFIX, **where)
    assert text.choices[0].text == TEXT
    stream = litellm.completion(model="openai/qwen_0_5b", messages=CHAT, stream=True, **where)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == TEXT
    stream = litellm.text_completion(
        model="text-completion-openai/qwen_0_5b", prompt=PREFIX, max_tokens=9, stream=True, **where
    )
    assert "".join(chunk.choices[0].text or "" for chunk in stream) == TEXT
    sent = pi.backend.completions
    assert [body["mode"] for body in sent] == ["complete", "infill", "complete", "complete"]
    assert (sent[0]["messages"], sent[1]["suffix"], sent[3]["max_tokens"]) == (CHAT_SENT, SUFFIX, 9)
    with pytest.raises(litellm.BadRequestError, match="image_url"):
        litellm.completion(model="openai/qwen_0_5b", messages=[{"role": "user", "content": [IMAGE]}], **where)


# --------------------------------------------------------------------------------------------------- node

NODE = """
import OpenAI from "openai"
const [url, prefix, suffix] = process.argv.slice(2)
const client = new OpenAI({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 })
const said = {}
const text = await client.completions.create({ model: "", prompt: prefix, suffix })
said.text = text.choices[0].text
said.usage = text.usage
said.pieces = []
for await (const chunk of await client.completions.create({ model: "", prompt: prefix, stream: true })) {
  said.pieces.push(chunk.choices[0].text)
}
const messages = [{ role: "user", content: "Add." }]
const chat = await client.chat.completions.create({ model: "", messages })
said.chat = chat.choices[0].message
const runner = client.chat.completions.stream({ model: "", messages, stream_options: { include_usage: true } })
said.streamed = await runner.finalContent()
said.total = (await runner.totalUsage()).total_tokens
said.models = []
for await (const model of client.models.list()) said.models.push(model.id)
try {
  await client.models.retrieve("gpt-4")
} catch (error) {
  said.error = [error.constructor.name, error.status, error.code, error.type]
}
console.log(JSON.stringify(said))
"""


def test_node_openai(pi: Pi) -> None:
    node, npm = needs("node"), needs("npm")
    if not (CACHE / "node_modules/openai").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run([npm, "install", "--silent", "--no-audit", "--no-fund", "openai@6"], cwd=CACHE, check=True)
    done = subprocess.run(
        [node, "--input-type=module", "-", pi.url, PREFIX, SUFFIX],
        cwd=CACHE,  # where it looks for packages
        input=NODE,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "text": TEXT,
        "usage": COUNTS,
        "pieces": [*PIECES, ""],
        "chat": {"role": "assistant", "content": TEXT},
        "streamed": TEXT,
        "total": 10,
        "models": ["qwen_0_5b"],
        "error": ["NotFoundError", 404, "MODEL_NOT_FOUND", "not_found_error"],
    }


# --------------------------------------------------------------------------------------------------- curl


def curl(*options: str) -> str:
    done = subprocess.run([needs("curl"), "-sS", "--noproxy", "*", *options], capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode()


@pytest.mark.parametrize(
    "options",
    [
        [],  # its default is application/x-www-form-urlencoded
        ["-H", "Content-Type: text/plain"],
        ["-H", "Content-Type:"],
        ["-H", "Content-Type: application/json; charset=utf-8"],
        ["-0"],  # HTTP/1.0
        ["-H", "Transfer-Encoding: chunked"],
        ["-H", "Authorization: Bearer whatever"],
    ],
)
def test_curl(pi: Pi, options: list[str]) -> None:
    body = json.dumps({"prompt": PREFIX + LINE, "suffix": SUFFIX})
    for path in ("/v1/completions", "/completions", "/v1/completions/"):
        assert json.loads(curl(*options, "-d", body, pi.url + path))["choices"][0]["text"] == TEXT


def test_curl_streams(pi: Pi) -> None:
    body = json.dumps({"prompt": PREFIX, "stream": True})
    for options in ([], ["-0"]):
        *events, done, nothing = curl("-N", *options, "-d", body, pi.url + "/v1/completions").split("\n\n")
        assert (done, nothing) == ("data: [DONE]", "")
        assert [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events] == [*PIECES, ""]


# ---------------------------------------------------------------------------------- editors, with weights


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plugin_with_weights(weights: Pi, name: str) -> None:
    text = completed(weights, name)
    assert "<|" not in text
    assert text.strip() if name == "codecompanion" else completes_the_sum(text), text


def test_an_editor_with_weights(weights: Pi, tmp_path: Path) -> None:
    with editing(tmp_path / "editor", weights.url, PREFIX + SUFFIX[1:]) as editor:
        editor.type("2Gi" + LINE)
        wait_until(lambda: editor.hint, "the hint")
        hint = editor.hint
        assert completes_the_sum(hint), hint
        editor.type("<Tab>")
        wait_until(lambda: editor.lines[1] == (LINE + hint).partition("\n")[0], "the buffer has the completion")
