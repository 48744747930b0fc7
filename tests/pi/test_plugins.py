"""Editors' plugins, replayed: each sends the fields that the plugin sends, and reads the answer as
the plugin does.

The plugins are llama.vim, llama.vscode, Zed, Continue, minuet, codecompanion, Tabby, Twinny,
Jupyter's notebook-intelligence, and VS Code's own completions with a model of one's own.
What they send and read comes from their sources. The Pi is a process, and a script stands for the
VPS, so every text is exact. tests/pi/test_clients.py sends the same requests to real weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import httpx
import pytest
from harness import PATIENCE, daemon, wait_until
from scripted import Backend, answer, in_a_thread, script
from test_lsp import NOTHING, SELECTED, editing

from cerebrum_lsp import span

PREFIX, LINE = "def add(a, b):\n", "    return "
SUFFIX = "\n\n\nprint(add(1, 2))\n"
PIECES = ("a + b", "  # ä", '\n"c"')
TEXT = "".join(PIECES)
COUNTED = {"ttft": 0.1, "prompt_tokens": 7, "cached_tokens": 5}
WHOLE = script(*PIECES, **COUNTED)


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
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        assert response.text == json.dumps(response.json(), separators=(",", ":"))
        return response.json()

    def passed_on(self, **fields: Any):
        """The VPS was last asked with these fields, among others."""
        sent = self.backend.completions[-1]
        assert sent == sent | fields

    def events(self, path: str, body: Any) -> list[Any]:
        """The members of each event of a stream, and "[DONE]", as plugins read them that look for
        "data: "; or of each line in Ollama's dialect.
        """
        response = self.post(path, body)
        if response.headers["content-type"] == "application/x-ndjson":
            return [json.loads(line) for line in response.text.splitlines()]
        kind = response.headers["content-type"].split(";")[0]
        assert (response.status_code, kind) == (200, "text/event-stream"), response.text
        assert "\n: ping" not in response.text, "Continue takes it for the end"
        data = re.findall("^data: (.*)$", response.text, re.MULTILINE)
        return [text if text == "[DONE]" else json.loads(text) for text in data]


@contextmanager
def start_pi(folder: Path, scripts: Sequence[Any], **more: str) -> Iterator[Pi]:
    with in_a_thread(Backend(scripts)) as backend:
        given = {
            "CEREBRUM_VPS_URL": f"http://127.0.0.1:{backend.port}",
            "CEREBRUM_CM4_API_KEY": "",
            **more,
        }
        with daemon("cm4d", folder, **given) as started:
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
    shared_pi.backend.scripts = [WHOLE]
    shared_pi.backend.asked.clear()
    return shared_pi


# --------------------------------------------------------------------------- what each plugin sends

# The path and the body of a request, and what the VPS is asked for it. Continue and minuet write
# snippets of other files, the file's own name or its language as comments above the text.
PLUGINS = r"""{
"llama.vim": ["/infill", {
    "id_slot": 0, "input_prefix": "$PREFIX", "input_suffix": "$SUFFIX", "prompt": "$LINE",
    "input_extra": [{"filename": "other.py", "text": "$OTHER", "time": [1, 2]}],
    "n_predict": 128, "n_cmpl": 3, "top_k": 40, "top_p": 0.9, "stop": [], "stream": false,
    "cache_prompt": true, "n_indent": 4, "samplers": ["top_k", "top_p", "infill"],
    "t_max_prompt_ms": 500, "t_max_predict_ms": 1000, "model": "", "response_fields": [
        "content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms",
        "timings/prompt_per_second", "timings/predicted_n", "timings/predicted_ms",
        "timings/predicted_per_token_ms", "timings/predicted_per_second", "truncated",
        "tokens_cached"]
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX", "language": "python",
    "extra": [{"filename": "other.py", "text": "$OTHER"}], "indent": 4,
    "max_tokens": 128, "predict_ms": 1000, "temperature": 0, "top_p": 0.9}],
"llama.vscode": ["/infill", {
    "id_slot": 0, "input_prefix": "$PREFIX", "input_suffix": "$SUFFIX", "prompt": "$LINE",
    "input_extra": [{"filename": "other.py", "text": "$OTHER"}],
    "n_predict": 128, "n_cmpl": 3, "top_k": 40, "top_p": 0.99, "stream": false,
    "cache_prompt": true, "n_indent": 4, "samplers": ["top_k", "top_p", "infill"],
    "t_max_prompt_ms": 500, "t_max_predict_ms": 2500
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX", "language": "python",
    "extra": [{"filename": "other.py", "text": "$OTHER"}], "indent": 4,
    "max_tokens": 128, "predict_ms": 2500, "temperature": 0, "top_p": 0.99}],
"zed": ["/v1/completions", {
    "model": "qwen2.5-coder", "max_tokens": 64, "stop": ["<|endoftext|>", "<|file_sep|>"],
    "prompt": "<|fim_prefix|>$PREFIX$LINE<|fim_suffix|>$SUFFIX<|fim_middle|>"
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX",
    "max_tokens": 64, "temperature": 0, "stop": []}],
"continue, openai": ["/v1/completions", {
    "model": "qwen2.5-coder", "max_tokens": 256, "temperature": 0.01, "stream": true,
    "prompt": "<|fim_prefix|>$SNIPPET$PREFIX$LINE<|fim_suffix|>$SUFFIX<|fim_middle|>",
    "stop": [$STOPS], "top_p": null, "logit_bias": null, "user": null,
    "frequency_penalty": null, "presence_penalty": null
}, {
    "mode": "infill", "prompt": "$SNIPPET$PREFIX$LINE", "suffix": "$SUFFIX", "language": "python",
    "max_tokens": 256, "temperature": 0.01, "stop": ["/src/", "#- coding: utf-8", "```"]}],
"continue, llama.cpp": ["/completion", {
    "n_predict": 256, "temperature": 0.01, "stream": true, "stop": [$STOPS],
    "prompt": "<|fim_prefix|>$SNIPPET$PREFIX$LINE<|fim_suffix|>$SUFFIX<|fim_middle|>"
}, {
    "mode": "infill", "prompt": "$SNIPPET$PREFIX$LINE", "suffix": "$SUFFIX", "language": "python",
    "max_tokens": 256, "temperature": 0.01, "stop": ["/src/", "#- coding: utf-8", "```"]}],
"continue, ollama": ["/api/generate", {
    "model": "qwen2.5-coder:1.5b-base", "raw": true, "keep_alive": 1800,
    "prompt": "<|fim_prefix|>$SNIPPET$PREFIX$LINE<|fim_suffix|>$SUFFIX<|fim_middle|>",
    "options": {"num_predict": 256, "num_ctx": 4096, "temperature": 0.01, "stop": [$STOPS]}
}, {
    "mode": "infill", "prompt": "$SNIPPET$PREFIX$LINE", "suffix": "$SUFFIX", "language": "python",
    "max_tokens": 256, "temperature": 0.01, "stop": ["/src/", "#- coding: utf-8", "```"]}],
"minuet": ["/v1/completions", {
    "model": "PLACEHOLDER", "suffix": "$SUFFIX", "stream": true,
    "prompt": "# language: python\n# indentation: use 4 spaces for a tab\n$PREFIX$LINE"
}, {
    "mode": "infill", "language": "python", "max_tokens": 512, "suffix": "$SUFFIX",
    "prompt": "# language: python\n# indentation: use 4 spaces for a tab\n$PREFIX$LINE"}],
"codecompanion": ["/v1/chat/completions", {
    "model": "qwen_0_5b", "temperature": 0, "stream": true,
    "messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": "Add."}],
    "stream_options": {"include_usage": true}, "top_p": null, "stop": null, "max_tokens": null,
    "logit_bias": null, "user": null, "frequency_penalty": null, "presence_penalty": null
}, {
    "messages": [{"role": "system", "content": "You help."}, {"role": "user", "content": "Add."}],
    "max_tokens": 2048, "stop": []}],
"tabby": ["/completion", {
    "seed": 7, "n_predict": 64, "temperature": 0.1, "stream": true, "penalty_last_n": 0,
    "prompt": "<|fim_prefix|>$PREFIX$LINE<|fim_suffix|>$SUFFIX<|fim_middle|>"
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX",
    "max_tokens": 64, "seed": 7, "temperature": 0.1}],
"jupyter": ["/api/generate", {
    "model": "qwen2.5-coder", "raw": true, "stream": false,
    "prompt": "<|fim_prefix|>$PREFIX$LINE<|fim_suffix|>print(add(1, 2))<|fim_middle|>",
    "options": {"num_predict": 128, "temperature": 0, "stop": [
        "<|end\u2581of\u2581sentence|>", "<|EOT|>", "<EOT>", "\\n", "</s>", "<|eot_id|>"]}
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "print(add(1, 2))",
    "max_tokens": 128, "temperature": 0, "stop": ["<|end\u2581of\u2581sentence|>", "\\n"]}],
"vs code": ["/v1/completions", {
    "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX", "max_tokens": 500, "temperature": 0,
    "top_p": 1, "n": 1, "stop": ["\n\n\n", "\n```"], "stream": true, "nwo": "someone/sums",
    "code_annotations": false, "extra": {
        "language": "python", "languages": {"python": 1}, "next_indent": 0, "prompt_tokens": 9,
        "suffix_tokens": 7, "trim_by_indentation": true, "nwo": "someone/sums"}
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX",
    "max_tokens": 500, "temperature": 0, "top_p": 1, "stop": ["\n\n\n", "\n```"]}],
"twinny": ["/completion", {
    "stream": true, "temperature": 0.2, "max_tokens": 512, "stop": ["<|endoftext|>", "\n\n"],
    "prompt": "<|fim_prefix|>$PREFIX$LINE<|fim_suffix|>$SUFFIX<|fim_middle|>"
}, {
    "mode": "infill", "prompt": "$PREFIX$LINE", "suffix": "$SUFFIX",
    "max_tokens": 512, "stop": ["\n\n"]}]}"""
STOPS = "<|endoftext|> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> "
STOPS += "<|file_sep|> <|im_start|> <|im_end|> /src/"
VALUES = {
    "PREFIX": PREFIX,
    "LINE": LINE,
    "SUFFIX": SUFFIX,
    "OTHER": "def subtract(a, b):\n    return a - b\n",
    "SNIPPET": "# Path: other.py\n# def subtract(a, b):\n#     return a - b\n# sum.py\n",
    "STOPS": [*STOPS.split(), "#- coding: utf-8", "```"],
}
# As JSON, without its quotes or brackets.
QUOTED = {name: json.dumps(value)[1:-1] for name, value in VALUES.items()}
REQUESTS = json.loads(Template(PLUGINS).substitute(QUOTED))


def text_of(members: Any) -> str:
    """The text in an answer or an event of any dialect."""
    for name in ("content", "response"):
        if name in members:
            return str(members[name])
    choices = [choice.get("delta", choice.get("message", choice)) for choice in members["choices"]]
    return "".join(choice.get("text", choice.get("content", "")) for choice in choices)


def completed(pi: Pi, name: str) -> str:
    """What a plugin gets for its request."""
    path, body, _ = REQUESTS[name]
    if not body.get("stream", path == "/api/generate"):
        return text_of(pi.asked(path, body))
    events = pi.events(path, body)
    assert ("[DONE]" in events[-1:]) == path.startswith("/v1/")
    return "".join(text_of(members) for members in events if members != "[DONE]")


@pytest.mark.parametrize("name", REQUESTS)
def test_a_plugin(pi: Pi, name):
    *_, wanted = REQUESTS[name]
    assert completed(pi, name) == TEXT
    (sent,) = pi.backend.completions
    assert sent == sent | wanted | {"model": "qwen_0_5b"}


# ---------------------------------------------------------------------- what only some of them read


def test_llama_vscode_looks_around(pi: Pi):
    pi.backend.scripts = [[answer(200, {"tokens": [1, 2, 3]})]]
    assert pi.get("/health").json()["status"] == "healthy"  # it takes "ok" and "healthy" as good
    (listed,) = pi.get("/v1/models").json()["data"]
    entry = {"id": "qwen_0_5b", "object": "model", "owned_by": "llamacpp"}
    assert listed == listed | entry
    assert listed.keys() == {*entry, "created"}
    assert pi.get("/models").json()["data"] == [listed]
    assert pi.get("/v1/models/qwen_0_5b").json() == listed
    props = pi.get("/props?model=qwen_0_5b&autoload=false").json()
    assert props["default_generation_settings"] == {"n_ctx": 4096}
    assert (props["total_slots"], props["model_alias"]) == (2, "qwen_0_5b")
    assert props["modalities"] == {"vision": False, "audio": False}
    text = {"content": "def add", "add_special": False, "parse_special": True}
    assert pi.asked("/tokenize", text) == {"tokens": [1, 2, 3]}
    asked = {"text": "def add", "first": False, "special": True, "model": "qwen_0_5b"}
    assert pi.backend.completions == [asked]


def test_what_ollamas_clients_ask_for_first(pi: Pi):
    assert pi.get("/api/version").json() == {"version": "0.12.0"}
    (listed,) = pi.get("/api/tags").json()["models"]
    assert (listed["name"], listed["model_info"]["cerebrum.context_length"]) == ("qwen_0_5b", 4096)
    for name in ("qwen_0_5b", "qwen2.5-coder:0.5b"):
        assert pi.post("/api/show", {"name": name}).json() == listed
    wrong = pi.post("/api/show", {"model": "gpt"})
    assert wrong.status_code == 404
    assert wrong.json()["error"].startswith("model: expected one of ")


# ------------------------------------------------------------------------------ the language server

CHANGED = [  # the language, the VPS's text and its reason, what the VPS gets
    ("shellscript", "b=1\n", "block", "shell"),
    ("abap", "b = 1.\n", "stop", None),
    ("", "b = 1.\n", "stop", None),
]
REFUSED = [  # a text, the VPS's reason, what the user is told
    ("b = 1.\n", "length", "the answer is longer than 2048 tokens"),
    ("b = 1.\n", "repeat", "the model began to repeat itself"),
    ("b = 1.\n", "preempted", "the answer broke off"),
    ("\n", "stop", "the answer has no code"),
]


def test_the_language_server_changes_text_in_any_language(pi: Pi, tmp_path):
    """Also in one that the Pi does not know, or that has no name. Only a whole text counts."""
    with editing(tmp_path, pi.url) as editor:
        editor.start()
        for language, text, reason, known in CHANGED:
            pi.backend.scripts = [script(text, finish_reason=reason)]
            editor.open("x\na\n", language)
            number = editor.command("cerebrum.instruct", SELECTED)
            changes = editor.called("workspace/applyEdit")["params"]["edit"]["changes"]
            ((edit,),) = changes.values()
            assert (language, edit["newText"]) == (language, text)
            asked = pi.backend.completions[-1]
            assert asked.get("language") == known
            assert asked["messages"][0]["content"].startswith("rename a to total\n")
            assert editor.answer(number)["result"] is None
        for text, reason, told in REFUSED:
            pi.backend.scripts = [script(text, finish_reason=reason)]
            answered = editor.answer(editor.command("cerebrum.instruct", SELECTED))
            assert (text, answered["error"]["message"]) == (text, told + NOTHING)
        editor.open("x\n" + "a\n" * 20_000, "abap")
        long = SELECTED | {"range": span((1, 0), (20_001, 0))}
        answered = editor.answer(editor.command("cerebrum.instruct", long))
        assert answered["error"]["message"] == f"the text is too long for the model{NOTHING}"
        count = len(pi.backend.completions)
        empty = SELECTED | {"instruction": ""}
        answered = editor.answer(editor.command("cerebrum.instruct", empty))
        fault = 'expected a non-empty string, got the string ""'
        assert answered["error"]["message"] == f"the Pi answers 400: instruction: {fault}"
        assert len(pi.backend.completions) == count
