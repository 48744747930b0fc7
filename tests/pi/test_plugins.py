"""Editors' plugins, replayed: each sends the fields that the plugin sends, and reads the answer as the plugin does.

The plugins are llama.vim, llama.vscode, Zed, Continue, minuet, codecompanion, Tabby and Twinny. What they send and read
comes from their sources. The Pi is a process, and a script stands for the VPS, so every text is exact.
tests/pi/test_clients.py sends the same requests to real weights.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import PATIENCE, ROOT, daemon, wait_until
from scripted import CHUNKED, Backend, answer, chunk, error, event, in_a_thread, token
from test_peers import needs

PREFIX, LINE, SUFFIX = "def add(a, b):\n", "    return ", "\n\n\nprint(add(1, 2))\n"
PIECES = ("a + b", "  # ä", '\n"c"')
TEXT = "".join(PIECES)
FIM_PROMPT = f"<|fim_prefix|>{PREFIX}{LINE}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
OTHER = {"filename": "other.py", "text": "def subtract(a, b):\n    return a - b\n"}


def completion(*pieces: Any, reason: str = "stop") -> list[Any]:
    """A script of the VPS. A piece that is no string is a step of its own, such as a gate."""
    texts = [piece for piece in pieces if isinstance(piece, str)]
    done = event(done=True, model="qwen_0_5b", total_tokens=len(texts), inference_time=0.25, ttft=0.1,
                 finish_reason=reason, prompt_tokens=7, cached_tokens=5)  # fmt: skip
    steps: list[Any] = [CHUNKED]
    for number, piece in enumerate(pieces, 1):
        steps.append(chunk(token(piece, number)) if isinstance(piece, str) else piece)
    return [*steps, chunk(done), b"0\r\n\r\n"]


@dataclass
class Gate:
    """A step that keeps the VPS waiting until the test opens it."""

    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self) -> Any:
        return asyncio.to_thread(self.opened.wait, PATIENCE)


@dataclass
class Pi:
    """cm4d as a process, and what it takes for its VPS."""

    url: str
    backend: Backend

    def post(self, path: str, body: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE, trust_env=False)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE, trust_env=False)

    def asked(self, path: str, body: Any) -> Any:
        """The members of a good answer, which is compact JSON on one line."""
        response = self.post(path, body)
        assert (response.status_code, response.headers["content-type"]) == (200, "application/json"), response.text
        assert response.text == json.dumps(response.json(), separators=(",", ":"))
        return response.json()

    def events(self, path: str, body: Any) -> list[Any]:
        """The members of each event of a stream, and "[DONE]"."""
        response = self.post(path, body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].split(";")[0] == "text/event-stream"
        return read_events(response.text)

    @property
    def counts(self) -> dict[str, int]:
        stats = self.get("/v1/stats").json()
        return {name: stats[name] for name in ("type_through", "shared", "replaced")}


def read_events(stream: str) -> list[Any]:
    """As plugins do that look for the lines that begin with "data: "."""
    lines = [line for line in stream.split("\n") if line]
    assert not [line for line in lines if line.startswith(": ping")], "Continue takes it for the end"
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [text if text == "[DONE]" else json.loads(text) for text in data]


@contextmanager
def start_pi(folder: Path, scripts: Sequence[Any], **more: str) -> Iterator[Pi]:
    with in_a_thread(Backend(scripts)) as backend:
        settings = {"CEREBRUM_CM4_API_KEY": "", "CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}", **more}
        with daemon("cm4d", folder, **settings) as started:
            pi = Pi(f"http://127.0.0.1:{started.port}", backend)
            wait_until(lambda: pi.get("/health").status_code == 200, "the Pi knows its VPS")
            yield pi
        assert started.complaints() == ""


@pytest.fixture(scope="module")
def shared_pi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pi]:
    with start_pi(tmp_path_factory.mktemp("pi"), []) as pi:
        yield pi


@pytest.fixture
def pi(shared_pi: Pi) -> Pi:
    """The VPS answers each request with TEXT, and has not been asked for anything yet."""
    shared_pi.backend.scripts = [completion(*PIECES)]
    shared_pi.backend.asked.clear()
    return shared_pi


# --------------------------------------------------------------------------------------------- llama.vim

TIMINGS = (
    "prompt_n",
    "prompt_ms",
    "prompt_per_token_ms",
    "prompt_per_second",
    "predicted_n",
    "predicted_ms",
    "predicted_per_token_ms",
    "predicted_per_second",
)
LLAMA_VIM = {
    "id_slot": 0,
    "input_prefix": PREFIX,
    "input_suffix": SUFFIX,
    "input_extra": [OTHER | {"time": [1, 2]}],
    "prompt": LINE,
    "n_predict": 128,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "samplers": ["top_k", "top_p", "infill"],
    "stream": False,
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    "response_fields": ["content", *(f"timings/{name}" for name in TIMINGS), "truncated", "tokens_cached"],
    "model": "",
}
LLAMA_VIM_WARMS = LLAMA_VIM | {
    "input_prefix": "",
    "input_suffix": "",
    "prompt": "",
    "n_predict": 0,
    "temperature": 0.0,
    "samplers": [],
    "t_max_prompt_ms": 1,
    "t_max_predict_ms": 1,
    "response_fields": [""],
}
CONTENT = re.compile(r'\A\s*\{.*"content"\s*:"', re.S)  # it drops an answer that does not match


def test_llama_vim(pi: Pi) -> None:
    response = pi.post("/infill", LLAMA_VIM)
    assert response.status_code == 200
    assert "\n" not in response.text
    assert CONTENT.search(response.text)
    read = response.json()
    assert list(read) == LLAMA_VIM["response_fields"]
    assert (read["content"], read["tokens_cached"], read["truncated"]) == (TEXT, 10, False)
    figures = [read[f"timings/{name}"] for name in TIMINGS]
    assert figures == [2, 100.0, 50.0, 20.0, 3, 150.0, 50.0, 20.0]
    (sent,) = pi.backend.completions
    asked = {name: sent[name] for name in ("model", "mode", "prompt", "suffix", "max_tokens", "temperature", "top_p")}
    assert asked == {
        "model": "qwen_0_5b",
        "mode": "infill",
        "prompt": PREFIX + LINE,
        "suffix": SUFFIX,
        "max_tokens": 128,
        "temperature": 0.0,
        "top_p": 0.9,
    }
    assert (sent["language"], sent["indent"], sent["predict_ms"]) == ("python", 4, 1000)
    assert sent["extra"] == [OTHER]


def test_llama_vim_is_replaced_by_its_next_keystroke(tmp_path: Path) -> None:
    gate = Gate()
    with start_pi(tmp_path, [completion("a", gate, "b"), completion("c")]) as pi, ThreadPoolExecutor() as threads:
        older = threads.submit(pi.asked, "/infill", LLAMA_VIM)
        wait_until(pi.backend.begun.is_set, "the first request runs")
        newer = pi.asked("/infill", LLAMA_VIM | {"prompt": LINE + "x"})
        assert newer["content"] == "c"
        read = older.result(PATIENCE)
        assert "content" not in read  # it would keep an empty one, and show nothing at this place again
        assert pi.counts == {"type_through": 0, "shared": 0, "replaced": 1}
        gate.opened.set()


def test_llama_vim_warms_and_instructs(tmp_path: Path) -> None:
    """A warm-up may go on behind a later request, so this Pi serves no other test."""
    warms = {"id_slot": 7, "messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": ""}]}
    warms |= {"samplers": [], "n_predict": 0, "stream": False, "cache_prompt": True, "response_fields": [""]}
    messages = [{"role": "system", "content": "You help."}, {"role": "user", "content": "Add."}]
    body = {"id_slot": 8, "messages": messages, "min_p": 0.1, "temperature": 0.1, "samplers": ["min_p", "temperature"]}
    body |= {"stream": True, "cache_prompt": True, "model": ""}
    with start_pi(tmp_path, [completion(*PIECES)]) as pi:
        assert pi.asked("/infill", LLAMA_VIM_WARMS) == {}
        wait_until(lambda: pi.backend.completions, "the prompt is read")
        assert pi.backend.completions[0]["max_tokens"] == 0
        assert pi.asked("/v1/chat/completions", warms)["choices"][0]["message"] == {"role": "assistant", "content": ""}
        *chunks, end = pi.events("/v1/chat/completions", body)
        assert end == "[DONE]"
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == TEXT
        assert messages in [sent.get("messages") for sent in pi.backend.completions]


# ------------------------------------------------------------------------------------------ llama.vscode

LLAMA_VSCODE = {
    "id_slot": 0,
    "input_prefix": PREFIX,
    "input_suffix": SUFFIX,
    "input_extra": [OTHER],
    "prompt": LINE,
    "n_predict": 128,
    "n_cmpl": 3,
    "top_k": 40,
    "top_p": 0.99,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "n_indent": 4,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 2500,
}


def test_llama_vscode(pi: Pi) -> None:
    read = pi.asked("/infill", LLAMA_VSCODE)
    assert (read["content"], read["tokens_cached"], read["generation_settings"]["n_ctx"]) == (TEXT, 10, 4096)
    assert [read["timings"][name] for name in TIMINGS] == [2, 100.0, 50.0, 20.0, 3, 150.0, 50.0, 20.0]
    assert (read["stop"], read["stop_type"], read["model"]) == (True, "eos", "qwen_0_5b")
    assert len(pi.backend.completions) == 1  # whatever n_cmpl says


def test_llama_vscode_looks_around(pi: Pi) -> None:
    pi.backend.scripts = [[answer(200, {"tokens": [1, 2, 3]})]]
    assert pi.get("/health").json()["status"] == "healthy"  # it takes "ok" and "healthy" as good
    listed = pi.get("/v1/models").json()["data"]
    assert [(model["id"], model["object"], model["owned_by"]) for model in listed] == [
        ("qwen_0_5b", "model", "llamacpp")
    ]
    assert pi.get("/models").json()["data"] == listed
    assert pi.get("/v1/models/qwen_0_5b").json() == listed[0]
    props = pi.get("/props?model=qwen_0_5b&autoload=false").json()
    assert (props["default_generation_settings"]["n_ctx"], props["total_slots"]) == (4096, 2)
    text = {"content": "def add", "add_special": False, "parse_special": True}
    assert pi.asked("/tokenize", text) == {"tokens": [1, 2, 3]}
    assert pi.backend.completions == [{"text": "def add", "first": False, "special": True, "model": "qwen_0_5b"}]


# --------------------------------------------------------------------------------------------------- Zed

ZED = {"model": "qwen2.5-coder", "prompt": FIM_PROMPT, "max_tokens": 64, "stop": ["<|endoftext|>", "<|file_sep|>"]}
FAMILIES = {
    "qwen": FIM_PROMPT,
    "star_coder": f"<fim_prefix>{PREFIX}{LINE}<fim_suffix>{SUFFIX}<fim_middle>",
    "deepseek_coder": f"<｜fim▁begin｜>{PREFIX}{LINE}<｜fim▁hole｜>{SUFFIX}<｜fim▁end｜>",  # noqa: RUF001
    "code_llama": f"<PRE> {PREFIX}{LINE} <SUF>{SUFFIX} <MID>",
    "codestral": f"[SUFFIX]{SUFFIX}[PREFIX]{PREFIX}{LINE}",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_zed(pi: Pi, family: str) -> None:
    read = pi.asked("/v1/completions", ZED | {"prompt": FAMILIES[family]})
    assert (read["object"], read["model"], type(read["created"])) == ("text_completion", "qwen_0_5b", int)
    assert read["id"].startswith("cmpl-")
    assert read["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    counts = {name: read["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    assert counts == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    (sent,) = pi.backend.completions
    assert (sent["prompt"], sent["suffix"], sent["temperature"], sent["stop"]) == (PREFIX + LINE, SUFFIX, 0.0, [])


# ---------------------------------------------------------------------------------------------- Continue

# It writes snippets of other files, and the file's own name, as comments above the text.
CONTINUE_PREFIX = "# Path: other.py\n# def subtract(a, b):\n#     return a - b\n# sum.py\n" + PREFIX + LINE
CONTINUE_PROMPT = f"<|fim_prefix|>{CONTINUE_PREFIX}<|fim_suffix|>{SUFFIX}<|fim_middle|>"
CONTINUE_STOPS = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
                  "<|file_sep|>", "<|im_start|>", "<|im_end|>", "/src/", "#- coding: utf-8", "```"]  # fmt: skip
CONTINUE_OPENAI = {
    "model": "qwen2.5-coder",
    "prompt": CONTINUE_PROMPT,
    "max_tokens": 256,
    "temperature": 0.01,
    "top_p": None,
    "frequency_penalty": None,
    "presence_penalty": None,
    "stop": CONTINUE_STOPS,
    "stream": True,
}
CONTINUE_LLAMA_CPP = {
    "prompt": CONTINUE_PROMPT,
    "stream": True,
    "n_predict": 256,
    "stop": CONTINUE_STOPS,
    "temperature": 0.01,
}


def test_continue_as_openai(pi: Pi) -> None:
    *chunks, end = pi.events("/v1/completions", CONTINUE_OPENAI)
    assert end == "[DONE]"
    assert [chunk["choices"][0]["text"] for chunk in chunks] == [*PIECES, ""]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    (sent,) = pi.backend.completions
    assert (sent["prompt"], sent["suffix"], sent["language"]) == (CONTINUE_PREFIX, SUFFIX, "python")
    assert sent["stop"] == ["/src/", "#- coding: utf-8", "```"]


# ------------------------------------------------------------------------------------------------ minuet

MINUET_PREFIX = "# language: python\n# indentation: use 4 spaces for a tab\n" + PREFIX + LINE
MINUET = {"model": "PLACEHOLDER", "prompt": MINUET_PREFIX, "suffix": SUFFIX, "stream": True}


def test_minuet(pi: Pi) -> None:
    *chunks, end = pi.events("/v1/completions", MINUET)
    assert end == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == TEXT
    (sent,) = pi.backend.completions
    assert (sent["prompt"], sent["language"], sent["max_tokens"]) == (MINUET_PREFIX, "python", 512)


# ----------------------------------------------------------------------------------------- codecompanion

CODECOMPANION = {
    "model": "qwen_0_5b",
    "messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": "Add."}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
    "top_p": 1,
    "stop": None,
    "max_tokens": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": None,
    "user": None,
}


def test_codecompanion(pi: Pi) -> None:
    assert [model["id"] for model in pi.get("/v1/models").json()["data"]] == ["qwen_0_5b"]
    *chunks, counts, end = pi.events("/v1/chat/completions", CODECOMPANION)
    assert end == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant", "content": ""},
        *({"content": piece} for piece in PIECES),
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, None, "stop"]
    assert (counts["choices"], counts["usage"]["total_tokens"]) == ([], 10)


# ----------------------------------------------------------------------------------------- Tabby, Twinny

TABBY = {
    "seed": 7,
    "prompt": FIM_PROMPT,
    "n_predict": 64,
    "temperature": 0.1,
    "stream": True,
    "penalty_last_n": 0,
    "presence_penalty": 0.0,
}
TWINNY = {
    "prompt": FIM_PROMPT,
    "stream": True,
    "temperature": 0.2,
    "max_tokens": 512,
    "stop": ["<|endoftext|>", "\n\n"],
}


@pytest.mark.parametrize("body", [CONTINUE_LLAMA_CPP, TABBY, TWINNY], ids=["continue", "tabby", "twinny"])
def test_continue_tabby_and_twinny_as_llama_cpp(pi: Pi, body: dict[str, Any]) -> None:
    chunks = pi.events("/completion", body)
    assert [(chunk["content"], chunk["stop"]) for chunk in chunks] == [
        *((piece, False) for piece in PIECES),
        ("", True),
    ]
    assert (chunks[-1]["tokens_evaluated"], chunks[-1]["tokens_predicted"]) == (7, 3)


# ------------------------------------------------------------------------------------- all of the plugins

REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama.vim": ("/infill", LLAMA_VIM),
    "llama.vscode": ("/infill", LLAMA_VSCODE),
    "zed": ("/v1/completions", ZED),
    "continue, openai": ("/v1/completions", CONTINUE_OPENAI),
    "continue, llama.cpp": ("/completion", CONTINUE_LLAMA_CPP),
    "minuet": ("/v1/completions", MINUET),
    "codecompanion": ("/v1/chat/completions", CODECOMPANION),
    "tabby": ("/completion", TABBY),
    "twinny": ("/completion", TWINNY),
}


def text_of(members: Any) -> str:
    """The text in an answer or an event of any dialect."""
    if "content" in members:
        return str(members["content"])
    choices = [choice.get("delta", choice.get("message", choice)) for choice in members["choices"]]
    return "".join(choice.get("text", choice.get("content", "")) for choice in choices)


def completed(pi: Pi, name: str) -> str:
    """What a plugin gets for its request."""
    path, body = REQUESTS[name]
    if body.get("stream"):
        return "".join(text_of(members) for members in pi.events(path, body) if members != "[DONE]")
    return text_of(pi.asked(path, body))


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plugin_gets_the_text_that_a_limit_has_cut(pi: Pi, name: str) -> None:
    pi.backend.scripts = [completion(*PIECES, reason="length")]
    assert completed(pi, name) == TEXT


@pytest.mark.parametrize("name", REQUESTS)
def test_an_error_says_what_is_wrong(pi: Pi, name: str) -> None:
    """Before a stream has begun, an error is a status, and its message is where plugins look for it."""
    pi.backend.scripts = [[error(503, "RESOURCE_EXHAUSTED", "too little memory")]]
    response = pi.post(*REQUESTS[name])
    wrong = {"message": "too little memory", "type": "unavailable_error", "param": None, "code": "RESOURCE_EXHAUSTED"}
    assert (response.status_code, response.json()) == (503, {"error": wrong})


# -------------------------------------------------------------------------------------------- an editor


class Neovim:
    """A headless Neovim that a test types into. `tests/editor.lua` makes it ask the Pi as llama.vim does."""

    def __init__(self, program: str, folder: Path, url: str, text: str) -> None:
        folder.mkdir()
        (folder / "sum.py").write_text(text)
        self.socket = str(folder / "socket")
        self.program = program
        self.environment = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder), "CEREBRUM_URL": url}
        self.environment["NVIM_LOG_FILE"] = str(folder / "log")
        command = [program, "--headless", "--clean", "--listen", self.socket, "-S", str(ROOT / "tests/editor.lua")]
        self.process = subprocess.Popen(
            [*command, str(folder / "sum.py")], env=self.environment, cwd=folder, stdin=subprocess.DEVNULL
        )
        wait_until(lambda: self._starts(), "Neovim listens")

    def _starts(self) -> bool:
        with suppress(subprocess.CalledProcessError):
            return self.evaluate("exists('g:cerebrum_hint')") == "1"
        return False

    def evaluate(self, expression: str) -> str:
        return self._remote("--remote-expr", expression)

    def type(self, keys: str) -> None:
        self._remote("--remote-send", keys)

    def _remote(self, *options: str) -> str:
        command = [self.program, "--clean", "--server", self.socket, *options]
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE, check=True
        )
        return done.stdout + done.stderr  # it prints a value to either, depending on its version

    @property
    def hint(self) -> str:
        return self.evaluate("g:cerebrum_hint")

    @property
    def lines(self) -> list[str]:
        return self.evaluate("join(getline(1, '$'), nr2char(10))").split("\n")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def editing(folder: Path, url: str, text: str) -> Iterator[Neovim]:
    editor = Neovim(needs("nvim"), folder, url, text)
    try:
        yield editor
    finally:
        editor.close()


def test_an_editor_shows_and_inserts_a_completion(tmp_path: Path) -> None:
    nothing = completion()  # Tab changes the text, so the editor asks again
    with (
        start_pi(tmp_path / "pi", [completion("a", " + b"), nothing]) as pi,
        editing(tmp_path / "editor", pi.url, PREFIX + SUFFIX[1:]) as editor,
    ):
        editor.type("2Gi    return ")
        wait_until(lambda: editor.hint == "a + b", "the hint")
        assert editor.evaluate("g:cerebrum_shown") == "a + b"
        editor.type("a")
        wait_until(lambda: editor.hint == " + b", "the rest of the hint")
        assert [sent["prompt"] for sent in pi.backend.completions] == [PREFIX + LINE]  # the Pi knew the rest
        assert pi.counts["type_through"] == 1
        editor.type("<Tab>")
        wait_until(lambda: editor.hint == "", "the hint is taken")
        assert editor.lines == ["def add(a, b):", "    return a + b", "", "print(add(1, 2))"]
