"""Other people's clients against the Pi: openai (Python and node), ollama, llm, curl.

`make test-clients` installs them. Where a test asserts an exact text, a script stands for the VPS;
the tests with `weights` in their name ask both daemons and the 0.5B.
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import CAPTURED, KEY, PATIENCE, daemon, with_weights
from scripted import CHUNKED, Backend, chunk, token
from test_peers import needs
from test_plugins import (
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
COUNTS = json.loads("""{
    "prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10,
    "prompt_tokens_details": {"cached_tokens": 5}}""")
CHAT = json.loads("""[
    {"role": "system", "content": "You help."},
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "a + b"},
    {"role": "user", "content": [
        {"type": "text", "text": "And"}, {"type": "text", "text": "subtract."}]}]""")
CHAT_SENT = [*CHAT[:3], {"role": "user", "content": "And\nsubtract."}]


@pytest.fixture
def pi(tmp_path: Path) -> Iterator[Pi]:
    """The VPS answers each request with TEXT."""
    with start_pi(tmp_path / "pi", [WHOLE]) as pi:
        yield pi


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pi]:
    folder = tmp_path_factory.mktemp("weights")
    with with_weights(folder, CEREBRUM_CM4_API_KEY="") as (pi, _):
        yield Pi(f"http://127.0.0.1:{pi.port}", Backend())
        assert pi.complaints() == ""


def completes_the_sum(text: str) -> bool:
    """Whether `text` completes PREFIX and LINE to a function that adds. Text behind the function
    does not count: the Pi knows where it ends only if it knows the language.
    """
    names = {}
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


def test_openai(client, pi: Pi):
    whole = client.completions.create(model="", prompt=PREFIX, max_tokens=16, stop="\n\n\n")
    assert (whole.choices[0].text, whole.usage.to_dict()) == (TEXT, COUNTS)
    pi.passed_on(mode="complete", prompt=PREFIX, max_tokens=16, stop=["\n\n\n"])
    streamed = {"prompt": PREFIX + LINE, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, counts = client.completions.create(model="", **streamed)
    assert [chunk.choices[0].text for chunk in chunks] == [*PIECES, ""]
    assert (counts.choices, counts.usage.to_dict()) == ([], COUNTS)

    said = {"model": "", "messages": CHAT}
    chat = client.chat.completions.create(**said, max_completion_tokens=50)
    assert chat.choices[0].message.content == TEXT
    pi.passed_on(messages=CHAT_SENT, max_tokens=50, stop_at="none")
    stream = client.chat.completions.create(**said, stream=True, temperature=0.5)
    deltas = [chunk.choices[0].delta.to_dict() for chunk in stream]
    texts = [{"content": piece} for piece in PIECES]
    assert deltas == [{"role": "assistant", "content": ""}, *texts, {}]
    assert [model.id for model in client.models.list()] == ["qwen_0_5b"]


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
CUT = [[CHUNKED, chunk(token("a", 1))]]  # then the VPS closes the connection
BROKEN = "VPS backend is unavailable (it ended in the middle of its answer)"


def test_openai_raises_our_errors(openai, client, pi: Pi):
    wrong = {"model": "", "messages": [{"role": "user", "content": [IMAGE]}]}
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[0\].type: ") as bad:
        client.chat.completions.create(**wrong)
    assert (bad.value.code, bad.value.type) == ("INVALID_REQUEST", "invalid_request_error")
    with pytest.raises(openai.NotFoundError):  # a path that the Pi does not have
        client.embeddings.create(model="", input="text")
    pi.backend.scripts = CUT
    with pytest.raises(openai.APIError) as broken:
        list(client.completions.create(model="", prompt=PREFIX, stream=True))
    assert (broken.value.code, broken.value.message) == ("VPS_UNAVAILABLE", BROKEN)


def test_openai_lists_models_without_a_vps(openai, tmp_path):
    """One plugin of llm waits 0.1 s for the list. Here the VPS accepts and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with daemon("cm4d", tmp_path, CEREBRUM_CM4_API_KEY="", CEREBRUM_VPS_URL=url) as started:
            client = client_of(openai, f"http://127.0.0.1:{started.port}/v1")
            client = client.with_options(timeout=kind.ASIDE_SECONDS)  # as asking the VPS takes
            assert "qwen_0_5b" in [model.id for model in client.models.list()]


def test_ollama(pi: Pi):
    ollama = pytest.importorskip("ollama", reason=INSTALL)
    client = ollama.Client(host=pi.url, trust_env=False, timeout=PATIENCE)
    (listed,) = client.list().models
    shown = client.show(listed.model)
    assert (listed.model, shown.capabilities) == ("qwen_0_5b", ["completion", "insert"])
    assert shown.modelinfo[f"{shown.details.family}.context_length"] == 4096
    filled = client.generate("qwen_0_5b", PREFIX + LINE, suffix=SUFFIX, options={"num_predict": 9})
    assert (filled.response, filled.done_reason, filled.prompt_eval_count) == (TEXT, "stop", 7)
    pi.passed_on(mode="infill", suffix=SUFFIX, max_tokens=9)
    parts = client.generate("m", PREFIX, raw=True, stream=True)
    assert [part.response for part in parts] == [*PIECES, ""]
    chat = CHAT_SENT[:3]
    assert client.chat("m", chat).message.content == TEXT
    assert [part.message.content for part in client.chat("m", chat, stream=True)] == [*PIECES, ""]
    with pytest.raises(ollama.ResponseError, match="model: expected one of") as wrong:
        client.show("gpt")
    assert wrong.value.status_code == 404
    pi.backend.scripts = CUT
    with pytest.raises(ollama.ResponseError, match=re.escape(BROKEN)):
        list(client.generate("m", "x", raw=True, stream=True))


def test_ollama_and_a_key(tmp_path, monkeypatch):
    ollama = pytest.importorskip("ollama", reason=INSTALL)
    with start_pi(tmp_path, [WHOLE], CEREBRUM_CM4_API_KEY=KEY) as pi:
        with pytest.raises(ollama.ResponseError, match="API key") as refused:
            ollama.Client(host=pi.url, trust_env=False).list()
        assert refused.value.status_code == 401
        monkeypatch.setenv("OLLAMA_API_KEY", KEY)
        client = ollama.Client(host=pi.url, trust_env=False)
        assert client.generate("m", PREFIX, raw=True).response == TEXT


def test_llm(pi: Pi, tmp_path):
    """The models `pi` (chats) and `code` (completions)."""
    pytest.importorskip("llm", reason=INSTALL)
    models = [{"model_id": "pi", "model_name": "qwen_0_5b", "api_base": pi.url + "/v1"}]
    models.append({**models[0], "model_id": "code", "completion": True})
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # YAML includes JSON
    home = {"PATH": os.environ["PATH"], "LLM_USER_PATH": str(tmp_path), "NO_PROXY": "*"}
    chat = ["-m", "pi", "-s", "You help.", "Add."]
    for options in (chat, ["-c", "And subtract."], ["-m", "code", PREFIX]):
        command = [sys.executable, "-m", "llm", *options]
        done = subprocess.run(command, env=home, cwd=tmp_path, input="", **CAPTURED)
        assert (done.returncode, done.stderr, done.stdout) == (0, "", TEXT + "\n")
    said = {"role": "user", "content": "Add."}
    more = {"role": "user", "content": "And subtract."}
    first, second, third = pi.backend.completions
    assert first["messages"] == [{"role": "system", "content": "You help."}, said]
    assert second["messages"][-3:] == [said, {"role": "assistant", "content": TEXT}, more]
    assert (third["mode"], third["prompt"]) == ("complete", PREFIX)


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


def test_node_openai(pi: Pi):
    node, npm = needs("node"), needs("npm")
    if not (CACHE / "node_modules/openai").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        install = [npm, "install", "--silent", "--no-audit", "--no-fund", "openai@6"]
        subprocess.run(install, cwd=CACHE, check=True)
    command = [node, "--input-type=module", "-", pi.url, PREFIX, SUFFIX]
    done = subprocess.run(command, cwd=CACHE, input=NODE, **CAPTURED)  # CACHE has its packages
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["text"] == [TEXT, COUNTS]
    assert said["pieces"] == [*PIECES, ""]
    assert said["streamed"] == [TEXT, 10]
    assert said["chat"] == {"role": "assistant", "content": TEXT}
    assert said["error"] == ["NotFoundError", 404, "MODEL_NOT_FOUND", "not_found_error"]


# The default Content-Type is application/x-www-form-urlencoded; -0 is HTTP/1.0.
OPTIONS = [
    [],
    ["-H", "Content-Type:"],
    ["-0"],
    ["-H", "Transfer-Encoding: chunked"],
    ["-H", "Authorization: Bearer x"],
]


@pytest.mark.parametrize("options", OPTIONS)
def test_curl(pi: Pi, options):
    body = json.dumps({"prompt": PREFIX + LINE, "suffix": SUFFIX})
    command = [needs("curl"), "-sS", "--noproxy", "*", *options, "-d", body]
    done = subprocess.run([*command, f"{pi.url}/v1/completions"], **CAPTURED)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["choices"][0]["text"] == TEXT


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plugin_with_weights(weights: Pi, name):
    text = completed(weights, name)
    assert "<|" not in text
    assert text.strip() if name == "codecompanion" else completes_the_sum(text), text
