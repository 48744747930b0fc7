"""Other engines behind the Pi: their table, the requests that they get, and how their streams are
read.

The streams have the shapes that llama-server, llama_cpp.server and vLLM really send. Each is read
whole and in any split, and ends for the client like a stream of a backend of our own.
"""

from __future__ import annotations

import asyncio
import contextlib
import doctest
import importlib
import json
import pkgutil
import re
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from harness import NO_FILE, SHIPPED, rows, until
from scripted import (
    CHUNKED,
    HANG,
    RESET,
    Backend,
    Pi,
    answer,
    backend_at,
    chunk,
    config_of,
    head,
    pi_for,
    statuses,
)

from cerebrum import pi as pi_package
from cerebrum.pi import engines
from cerebrum.pi.backend import find_models
from cerebrum.pi.completion import Fitted, read_text
from cerebrum.pi.engines import (
    NEAR_CHARS,
    LlamaServer,
    OpenAI,
    Translator,
    end_of,
    read_overflow,
    read_props,
)
from cerebrum.pi.upstream import (
    BackendConfig,
    BackendFailure,
    Endpoint,
    TooLong,
    parse_url,
    read_backends,
)
from cerebrum.settings import ConfigError, Environment
from cerebrum.text.ending import Ending
from cerebrum_common import Model

FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


MODULES = [module.name for module in pkgutil.iter_modules(pi_package.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name):
    module = importlib.import_module(f"cerebrum.pi.{name}")
    assert doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE).failed == 0


# ---------------------------------------------------------------------------------------- the table

ATTIC = {"id": "attic", "url": "http://100.64.0.1:9000"}
GPU = json.loads("""{
    "id": "gpu", "url": "https://gpu.lan/llm/v1/", "api": "openai", "key_env": "GPU_KEY",
    "max_concurrent": 16, "n_ctx": 8192, "infill": "suffix", "affinity_header": "X-Session-Id"}""")


def read(*tables: Any, **variables: str) -> tuple[BackendConfig, ...]:
    return read_backends(tables, Environment(variables), 3)


def test_a_table():
    attic, gpu = read(ATTIC, GPU, GPU_KEY="secret", CEREBRUM_API_KEY="other")
    assert attic == config_of("attic", Endpoint("100.64.0.1", 9000, "100.64.0.1:9000", "", False))
    wanted = {name: value for name, value in GPU.items() if name not in ("id", "url")}
    address = Endpoint("gpu.lan", 443, "gpu.lan", "/llm", True)
    assert gpu == config_of("gpu", address, key="secret", **wanted)


def test_without_a_table_there_is_one_vps():
    (vps,) = read(CEREBRUM_VPS_URL="http://vps:1", CEREBRUM_API_KEY="k")
    address = Endpoint("vps", 1, "vps:1", "", False)
    assert vps == config_of("vps", address, key="k", key_env="CEREBRUM_API_KEY", max_concurrent=3)


BAD_TABLES = json.loads(r"""[
    [[{"id": "a", "url": "http://b", "affinity_header": "Host"}],
        "backend 1: affinity_header: expected a string of the form "],
    [[{"id": "a", "url": "http://b", "affinity_header": "X-A: b\r\nC"}],
        "backend 1: affinity_header: expected a string of the form "],
    [[{"id": "a", "url": "http://b", "affinity_header": "X-request-ID"}],
        "backend 1: affinity_header: expected a string of the form "],
    [[7], "backend 1: expected a table, got something else"],
    [[{"id": "a b"}], "backend 1: id: expected a string of the form "],
    [[{"id": "a"}], "backend 1: url: expected a string, got nothing"],
    [[{"id": "a", "url": "http://b"}, {"id": "a", "url": "ftp://x"}],
        "backend 2: url: expected http://HOST[:PORT] or https://HOST[:PORT], "],
    [[{"id": "a", "url": "http://b", "api": "vllm"}],
        "backend 1: api: expected one of cerebrum, llama.cpp, openai, got the string"],
    [[{"id": "a", "url": "http://b", "n_ctx": true}],
        "backend 1: n_ctx: expected an integer from 0 to 10000000, got the boolean true"],
    [[{"id": "a", "url": "http://b", "max_concurent": 2}],
        "backend 1: expected one of id, url, api, key_env, ca_file, infill, "],
    [[{"id": "a", "url": "http://b", "ca_file": "/a.pem"}],
        "backend 1: ca_file: expected a url with https for '/a.pem'"],
    [[{"id": "a", "url": "http://b"}, {"id": "a", "url": "http://b"}],
        "backends: expected every id once"],
    [[{"id": "a", "url": "http://b", "key_env": "BAD"}],
        "BAD: expected printable ASCII without spaces"]
]""")


@pytest.mark.parametrize(("tables", "says"), BAD_TABLES)
def test_a_bad_table(tables, says):
    with pytest.raises(ConfigError) as caught:
        read(*tables, BAD="two words")
    assert str(caught.value).startswith(says)
    assert "two words" not in str(caught.value)


NAMES = {"file": "m-q4.gguf", "aliases": ("org/M", "m:7b")}
MODEL = Model("m", "M", ("python",), "7B", "Q4", **NO_FILE | NAMES)
# What a backend lists, and its name for the model.
LISTS = r"""
m                     | m
other org/M           | org/M
m:7b org/M            | org/M
/srv/models/m-q4.gguf | /srv/models/m-q4.gguf
C:\\models\\m-q4.gguf | C:\\models\\m-q4.gguf
m-q4                  | m-q4
m-q4.gguf m           | m
M org/m m-q8.gguf     |
"""


@pytest.mark.parametrize(("listed", "name"), rows(LISTS))
def test_which_model_a_backend_has(listed, name):
    assert find_models([MODEL], listed.split()) == ({"m": name} if name else {})


def test_a_model_without_a_file_has_no_name_without_letters():
    assert find_models([replace(MODEL, file="")], ["org/", "", ".gguf"]) == {}


# ------------------------------------------------------------------------------ requests of engines

ASKED = {
    "max_tokens": 64,
    "temperature": 0,
    "stop": ["a", "b", "c", "d", "e"],
    "mode": "complete",
    "prompt": "x =",
}
OTHER_FILES = [{"filename": "b.py", "text": "import os"}]
GAP = {**ASKED, "mode": "infill", "suffix": "\ny", "extra": OTHER_FILES}
SAID = [{"role": "user", "content": "add"}, {"role": "assistant", "content": "```python\n"}]
SAMPLED = {"seed": 7, "top_p": 0.9}
CHAT = {name: value for name, value in ASKED.items() if name != "prompt"}
CHAT |= {"messages": SAID, **SAMPLED}
INSTRUCT = CHAT | {"mode": "instruct"}
PLAIN = ASKED | {"stop": [], "top_p": 1.0}
COMMON = {"model": "org/M", "stream": True, "temperature": 0}
UNSTOPPED = {**COMMON, "max_tokens": 64, "stream_options": {"include_usage": True}}
OPENAI = UNSTOPPED | {"stop": ASKED["stop"][:4]}
LIVE = {"timings_per_token": True, "return_progress": True}
LLAMA = json.loads("""{
    "model": "org/M", "stream": true, "temperature": 0, "n_predict": 64, "cache_prompt": true,
    "stop": ["a", "b", "c", "d"], "timings_per_token": true, "return_progress": true,
    "response_fields": [
        "content", "stop", "stop_type", "tokens_evaluated", "tokens_predicted", "timings"]}""")
LLAMA_GAP = {
    "input_prefix": "x =",
    "input_suffix": "\ny",
    "prompt": "",
    "input_extra": OTHER_FILES,
}
TEXT_PATH, CHAT_PATH = "/v1/completions", "/v1/chat/completions"
MARKED = f"import os\n{FIM[0]}x ={FIM[1]}\ny{FIM[2]}"
# The engine, the fields, the model's marks, and the path and the body that ask for them.
REQUESTS = [
    (OpenAI, ASKED, FIM, TEXT_PATH, OPENAI | {"prompt": "x ="}),
    (OpenAI, PLAIN, FIM, TEXT_PATH, UNSTOPPED | {"prompt": "x ="}),
    (OpenAI, GAP, FIM, TEXT_PATH, OPENAI | {"prompt": MARKED}),
    (OpenAI, GAP, (), TEXT_PATH, OPENAI | {"prompt": "import os\nx =", "suffix": "\ny"}),
    (OpenAI, INSTRUCT, FIM, CHAT_PATH, OPENAI | SAMPLED | {"messages": SAID[:1]}),
    (OpenAI, CHAT, FIM, CHAT_PATH, OPENAI | SAMPLED | {"messages": SAID}),
    (LlamaServer, ASKED, FIM, "/completion", LLAMA | {"prompt": "x ="}),
    (LlamaServer, GAP, FIM, "/infill", LLAMA | LLAMA_GAP),
    (LlamaServer, INSTRUCT, FIM, CHAT_PATH, OPENAI | LIVE | SAMPLED | {"messages": SAID[:1]}),
]
CONFIG = config_of("gpu", parse_url("http://gpu", "url"), api="openai", key_env="GPU_KEY")


@pytest.mark.parametrize(("kind", "asked", "marks", "path", "body"), REQUESTS)
def test_what_an_engine_is_asked(kind, asked, marks, path, body):
    asking = kind(CONFIG, [replace(MODEL, fim=marks)])
    assert asking.write(Fitted(asked, "m", "org/M")) == (path, body)


@pytest.mark.parametrize(("room", "most"), [(50, 50), (-50, 1)])
def test_an_answer_must_fit_into_the_context(room, most):
    _, body = OpenAI(CONFIG, []).write(Fitted(ASKED, "m", "org/M", room))
    assert body["max_tokens"] == most


LONG_MESSAGE = (
    "This model's maximum context length is 512 tokens. "
    "However, you requested 900 tokens (800 in …)."
)
LONG = {"error": {"message": LONG_MESSAGE}}
# What engines say of a context of 4096 tokens, and what is another error.
SAID_TOO_LONG = """
This model's maximum context length is 4096 tokens. However, you requested 5000 tokens (4488 in \
the messages, 512 in the …
This model's maximum context length is 4096 tokens, however you requested 5097 tokens (1000 in \
your prompt; 4097 for the …
This model's maximum context length is 4096 tokens. However, your prompt contains at least 4097 \
input tokens, which exceeds …
'max_tokens' is too large: 512. This model's maximum context length is 4096 tokens and your \
request has 4000 input …
You passed 3585 input tokens, but the model's context length is only 4096 tokens, …
maximum context length is 4096 tokens
max_tokens=5000 cannot be greater than max_model_len=4096. Please request fewer …
"""
SAID_OTHERWISE = """
The input (5000 tokens) is longer than the model's context length (4096 tokens).
temperature must be <= 2
the context length is 16 tokens
the context length is 4096 characters
"""
# Members of an error, and the lengths that count; null: another error. The first is llama-server's.
OVERFLOWS = json.loads("""[
    [{"message": "request (1180 tokens) exceeds …", "n_prompt_tokens": 1180, "n_ctx": 512},
        {"n_ctx": 512, "prompt_tokens": 1180}],
    [{"message": "It exceeds the context window.", "code": "context_length_exceeded"}, {}],
    [{"message": 5}, null],
    [{"message": "x", "n_ctx": true, "n_prompt_tokens": 800}, null],
    [{"message": "x", "n_ctx": 1000000000, "n_prompt_tokens": 800}, null],
    [{"message": "x", "n_ctx": 512, "n_prompt_tokens": "800"}, {"n_ctx": 512}]
]""")
for said, lengths in ((SAID_TOO_LONG, {"n_ctx": 4096}), (SAID_OTHERWISE, None)):
    OVERFLOWS += [({"message": line}, lengths) for line in said.strip().splitlines()]


@pytest.mark.parametrize(("error", "lengths"), OVERFLOWS, ids=str)
def test_how_engines_say_that_a_prompt_is_too_long(error, lengths):
    assert read_overflow(error) == lengths


PROPS = [({"n_ctx": 512}, {"n_ctx": 512}), (1, {}), ({"n_ctx": True}, {}), ({"n_ctx": 7}, {})]


@pytest.mark.parametrize(("settings", "length"), PROPS)
def test_the_length_of_the_context_in_props(settings, length):
    assert read_props({"default_generation_settings": settings, "n_ctx": 700}) == length


# The status and the body of a refusal; part of the message, and whether the breaker counts it.
REFUSALS = [
    (401, {"error": "x"}, "refuses our key: expected the right one in GPU_KEY", False),
    (501, {}, "refuses the request (501)", False),
    (503, {"error": {"message": "Loading model"}}, "is loading its model", False),
    (307, {}, "is unavailable (it answered 307)", True),
]


@pytest.mark.parametrize(("status", "body", "says", "counted"), REFUSALS)
def test_a_refusal_of_an_engine(status, body, says, counted):
    error = OpenAI(CONFIG, []).refusal(status, body)
    assert (error.code, isinstance(error, BackendFailure)) == ("VPS_UNAVAILABLE", counted)
    assert says in error.message


# ------------------------------------------------------------------------------- streams of engines

# A fake text of a def whose body is whole before the model goes on.
PIECES = ("    return", " a + b", "\n", "\n", "print(add(1, 2))", "\n")
BODY = "    return a + b\n"


def data(members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def text_chunk(text: str, reason: str | None = None, **more: Any) -> bytes:
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
    return data({"choices": [choice], **more})


def chat_chunk(reason: str | None = None, /, **delta: Any) -> bytes:
    return data({"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})


def llama_chunk(text: str, count: int, **more: Any) -> bytes:
    counts = {"tokens_predicted": count, "tokens_evaluated": 9}
    return data({"index": 0, "content": text, "stop": False, **counts, **more})


TIMINGS = json.loads("""{
    "cache_n": 4, "prompt_n": 5, "prompt_ms": 250.0, "predicted_n": 2,
    "predicted_per_second": 20.0}""")
USAGE = data(
    {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
)
END = b"data: [DONE]\n\n"
LAST = json.loads("""{
    "index": 0, "content": "", "stop": true, "stop_type": "eos", "tokens_predicted": 2,
    "tokens_evaluated": 9}""")


def stream(*events: bytes, text: str = "1", asked: Any = None, **result: Any) -> Any:
    """The request, what an engine streams, the text that a client gets, and the result."""
    result = {"finish_reason": "stop", "total_tokens": 1} | result
    return asked or {}, b"".join(events), text, result


ONE = text_chunk("1", "stop")
IN_FILE = {"prompt": "def add(a, b):\n", "language": "python"}
SAYING = {"messages": SAID[:1], "stop_at": "none"}
COUNTED = {"prompt_tokens": 9, "cached_tokens": 4, "ttft": 0.25, "tokens_per_second": 20.0}
LENGTH = {"finish_reason": "length", "total_tokens": 2}
NINE = {"prompt_tokens": 9, "total_tokens": 3}
STREAMS = {
    "vLLM's text with its usage": stream(
        text_chunk("1"), text_chunk(" + 2", "stop"), USAGE, END, text="1 + 2", **NINE
    ),
    "a text that its limit cuts": stream(
        text_chunk("1"), text_chunk("2", "length"), END, text="12", **LENGTH
    ),
    "no [DONE]": stream(text_chunk("1", "eos_token")),
    "no blank line at its end": stream((ONE + END)[:-2]),
    "odd counts": stream(
        text_chunk("1", "stop", usage={"prompt_tokens": -1, "completion_tokens": "3"})
    ),
    "nulls and members of other types": stream(
        data({"choices": None, "error": None}),
        data({"choices": [7]}),
        data({"choices": [{}]}),
        text_chunk("1"),
        data({"choices": [{"text": None, "finish_reason": "stop"}], "usage": None}),
    ),
    "comments and events that nobody knows": stream(
        b": ping\n\nevent: x\nid: 1\n\n", data({"news": 1}), ONE
    ),
    "more than was asked for": stream(
        *map(text_chunk, "1234"), text="12", asked={"max_tokens": 2}, **LENGTH
    ),
    "an empty count behind the real one": stream(
        ONE, USAGE, data({"choices": [], "usage": None}), END, **NINE
    ),
    "huge numbers": stream(
        llama_chunk("1", 1, timings=TIMINGS | {"prompt_ms": 10**400}),
        data(LAST),
        prompt_tokens=9,
        total_tokens=2,
    ),
    "no text at all": stream(text_chunk("", "stop"), END, text="", total_tokens=0),
    "the natural end": stream(
        *map(text_chunk, PIECES), text=BODY, asked=IN_FILE, finish_reason="block", total_tokens=5
    ),
    "a gap that meets its suffix": stream(
        text_chunk("2, 3"),
        text_chunk("]\ny = 2"),
        text_chunk("\n"),
        text="2, 3",
        total_tokens=3,
        asked={
            "prompt": "x = [1, ",
            "suffix": "]\ny = 2\n",
            "mode": "infill",
            "language": "python",
        },
    ),
    "a stop over two events": stream(
        text_chunk("1E"), text_chunk("ND2"), asked={"stop": ["END"]}, total_tokens=2
    ),
    "a mark that leaks": stream(text_chunk("1<|end"), text_chunk("oftext|>Human:"), total_tokens=2),
    "a mark that the prompt has, too": stream(
        text_chunk(" '<|im_end|>'", "stop"),
        text=" '<|im_end|>'",
        asked={"prompt": "end = '<|im_end|>'\nx ="},
    ),
    "half of a character": stream(
        b'data: {"choices": [{"text": "\xe2"}]}\n\n',
        text_chunk("x", "stop"),
        text="\ufffdx",
        total_tokens=2,
    ),
    "a surrogate pair": stream(
        text_chunk("\ud83d\udc80"), text_chunk("", "stop"), text="\U0001f480"
    ),
    "half of one": stream(text_chunk("\ude00x", "stop"), text="\ufffdx"),
    "a chat": stream(
        chat_chunk(role="assistant", content=""),
        chat_chunk(content="Hi"),
        chat_chunk(content="!"),
        chat_chunk("stop"),
        USAGE,
        END,
        text="Hi!",
        asked=SAYING,
        **NINE,
    ),
    "the code of an instruction alone": stream(
        chat_chunk(content="Here you are:\n\n```py"),
        chat_chunk(content="thon\nx = 1\n``"),
        chat_chunk(content="`\nBye"),
        chat_chunk(content="."),
        text="x = 1\n",
        total_tokens=3,
        asked={"messages": SAID, "mode": "instruct", "language": "python"},
    ),
    "a chat in one piece": stream(
        data(
            {
                "choices": [{"message": {"content": "Hi"}, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 3},
            }
        ),
        text="Hi",
        asked=SAYING,
        prompt_tokens=3,
    ),
    "llama-server": stream(
        llama_chunk("1", 1),
        llama_chunk("2", 2),
        data({**LAST, "timings": TIMINGS}),
        text="12",
        total_tokens=2,
        **COUNTED,
    ),
    "llama-server at its limit": stream(
        llama_chunk("1", 1), data(LAST | {"stop_type": "limit"}), **LENGTH, prompt_tokens=9
    ),
    "llama-server before its end": stream(
        *(
            llama_chunk(piece, n, timings=TIMINGS | {"predicted_n": n})
            for n, piece in enumerate(PIECES, 1)
        ),
        text=BODY,
        asked=IN_FILE,
        finish_reason="block",
        total_tokens=5,
        **COUNTED,
    ),
}

BASE = json.loads("""{
    "prompt": "x =", "mode": "complete", "stop": [], "stop_at": "auto", "indent": 0,
    "predict_ms": 0, "progress": false}""")


def translate(name: str, cut: int) -> tuple[str, dict[str, Any]]:
    """The text and the result of a stream that is read in pieces of `cut` bytes."""
    asked, stream, _, _ = STREAMS[name]
    translator, pairs = Translator(BASE | asked, []), list[Any]()
    for start in range(0, len(stream), cut):
        pairs += translator.feed(stream[start : start + cut], 0.0)
    if not translator.done:
        pairs += translator.feed(b"\n\n", 0.0)
    if not translator.done:
        pairs.append(translator.last_pair())
    *texts, (last, result) = pairs
    assert last == "done"
    assert {kind for kind, _ in texts} <= {"text"}
    return read_text(b"".join(value for _, value in texts)), result


@pytest.mark.parametrize("cut", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_of_an_engine(name, cut):
    *_, text, result = STREAMS[name]
    assert translate(name, cut) == (text, result)


BOOM = {"message": "boom at /srv/x.py", "code": 500}
UNFINISHED = "it ended without saying that it is done"
NOT_JSON = "it sent an event that is not JSON"
FAILING = [
    (text_chunk("1"), UNFINISHED),
    (text_chunk("1") + END, UNFINISHED),  # llama_cpp.server, cut by another request
    (data({"error": BOOM}), "it reported an error"),
    (data({"error": "boom", "error_type": "overloaded"}), "it reported an error"),
    (text_chunk("1", "abort"), "it gave up"),
    (b"data: {oops\n\n", NOT_JSON),
    (b"data: 1\n\n", NOT_JSON),
    (b"data: " + b"[" * 100_000 + b"\n\n", NOT_JSON),
]


@pytest.mark.parametrize(("stream", "message"), FAILING)
def test_a_stream_that_fails(stream, message):
    translator = Translator(BASE, [])
    with pytest.raises(BackendFailure) as caught:
        [*translator.feed(stream, 0.0), translator.last_pair()]
    assert caught.value.message == f"VPS backend is unavailable ({message})"


def test_an_event_that_says_that_the_prompt_is_too_long():
    with pytest.raises(TooLong) as caught:
        list(Translator(BASE, []).feed(data(LONG), 0.0))
    assert caught.value.extra == {"n_ctx": 512}


def test_a_limit_of_time_counts_once_a_line_has_ended():
    translator = Translator(BASE | {"predict_ms": 500}, [])
    pairs = [*translator.feed(text_chunk("1"), 10.0), *translator.feed(text_chunk("2"), 10.9)]
    assert {kind for kind, _ in pairs} == {"text"}
    done = {"finish_reason": "length", "total_tokens": 3}
    assert list(translator.feed(text_chunk("3\n"), 11.0))[-1] == ("done", done)


PROGRESS = {"total": 90, "cache": 0, "processed": 64}
READ = ("progress", {"stage": "prefill", "done": 64, "total": 90})
PROGRESSES = [(True, PROGRESS, [READ]), (True, {"total": "x"}, []), (False, PROGRESS, [])]


@pytest.mark.parametrize(("wanted", "progress", "pairs"), PROGRESSES)
def test_progress_is_passed_on_if_asked_for(wanted, progress, pairs):
    event = data({"content": "", "stop": False, "prompt_progress": progress})
    assert list(Translator(BASE | {"progress": wanted}, []).feed(event, 0.0)) == pairs


# -------------------------------------------------------------------- engines behind a real gateway

LISTED = answer(200, {"object": "list", "data": [{"id": "qwen_0_5b", "max_model_len": 2048}]})
VLLM = (
    CHUNKED,
    chunk(text_chunk("1")),
    chunk(text_chunk(" + 2", "stop")),
    chunk(USAGE),
    chunk(END),
    b"0\r\n\r\n",
)
LLAMA_SERVER = (
    CHUNKED,
    chunk(llama_chunk("a", 1)),
    chunk(llama_chunk("b", 2)),
    chunk(data(LAST)),
    b"0\r\n\r\n",
)
ANSWERED = [
    ("openai", VLLM, "1 + 2", 3, "/v1/completions"),
    ("llama.cpp", LLAMA_SERVER, "ab", 2, "/completion"),
]
ALIVE = [
    lambda: asyncio.sleep(0.01),
    chunk(b": PROCESSING\n\n"),
] * 500  # it keeps the connection alive, no more


def engine(port: int, api: str = "openai", **more: Any) -> BackendConfig:
    return backend_at(port, "gpu", api=api, key="gpu-key", key_env="GPU_KEY", **more)


@contextlib.asynccontextmanager
async def pi_before(
    *scripts: Any, api: str = "openai", probing: bool = True, **more: Any
) -> AsyncIterator[tuple[Pi, Backend]]:
    """A Pi with one engine, which plays these scripts."""
    async with (
        Backend(scripts, **{"models": LISTED, **more}) as backend,
        pi_for(engine(backend.port, api), probing=probing) as pi,
    ):
        yield pi, backend


# A path, members of the request, and the token that it shares with others.
SYSTEM = {"role": "system", "content": "You help."}
FILES = [
    ("/infill", {"filename": "a.py"}, "a"),
    ("/infill", {"filename": "a.py", "input_prefix": "other"}, "a"),
    ("/infill", {"filename": "b.py"}, "b"),
    ("/v1/chat/completions", {"messages": [SYSTEM, *SAID]}, "c"),
    ("/v1/chat/completions", {"messages": [SYSTEM, *SAID, *SAID]}, "c"),
    ("/v1/chat/completions", {"messages": SAID}, "d"),
    ("/v1/complete", {"filename": "a.py", "prompt": "x", "language": "python"}, "a"),
]


async def test_a_balancer_learns_which_requests_belong_together():
    async with (
        Backend([VLLM], models=LISTED) as backend,
        pi_for(engine(backend.port, affinity_header="X-Replica")) as pi,
    ):
        tokens = {}
        for path, members, name in FILES:
            body = {"input_prefix": "x", "input_suffix": "\ny", **members}
            assert (await pi.post(path, body)).status == 200
            token = backend.asked[-1][1]["x-replica"]
            assert re.fullmatch("[0-9a-f]{32}", token)
            tokens.setdefault(name, set()).add(token)
        assert [len(found) for found in tokens.values()] == [1, 1, 1, 1]
        assert len(set.union(*tokens.values())) == 4
        assert (await pi.complete()).status == 200  # of no file: the balancer chooses
        assert "x-replica" not in backend.asked[-1][1]


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(("after", "pause"), [("7", 7), ("900000000", 60)])
async def test_a_pause_that_an_engine_asks_for(status, after, pause):
    """Nobody asks it before."""
    refused = head(status, "Content-Length: 2", f"Retry-After: {after}", kind="text/html") + b"no"
    async with pi_before([refused], VLLM) as (pi, backend):
        for _ in range(2):
            begun = time.monotonic()
            reply = await pi.complete()
            assert (reply.status, reply.json["code"]) == (429, "RATE_LIMIT")
            assert reply.all("Retry-After") == []
        first = pi.gateway.fleet.first
        assert first.rests_until == pytest.approx(begun + pause, abs=2)
        assert first.breaker.failures == 0
        assert len(backend.completions) == 1


async def test_a_later_refusal_shortens_no_pause():
    gate = asyncio.Event()
    plain = head(429, "Content-Length: 0")
    patient = head(429, "Content-Length: 0", "Retry-After: 30")
    async with pi_before([gate.wait, plain], [patient]) as (pi, backend):
        first = asyncio.create_task(pi.complete())
        await backend.begun.wait()
        await pi.complete()
        before = pi.gateway.fleet.first.rests_until
        gate.set()
        assert (await first).status == 429
        assert pi.gateway.fleet.first.rests_until == before


async def test_after_a_pause_those_that_wait_are_served():
    """The first request has ended with it, and no probe tells that it is over."""
    gate = asyncio.Event()
    refused = head(429, "Content-Length: 0", "Retry-After: 1")
    async with (
        Backend([[gate.wait, refused], VLLM], models=LISTED) as backend,
        pi_for(engine(backend.port, max_concurrent=1), probing=False) as pi,
    ):
        first = asyncio.create_task(pi.complete())
        await backend.begun.wait()
        waiting = asyncio.create_task(pi.post("/v1/chat/completions", {"messages": SAID}))
        await until(lambda: pi.line)
        gate.set()
        async with asyncio.timeout(10):
            assert await statuses(first, waiting) == [429, 200]


@pytest.mark.parametrize("after", ["0", "-1", "soon", "Wed, 02 Dec 2026 00:00:00 GMT"])
async def test_a_pause_that_is_no_number_of_seconds(after):
    refused = head(503, "Content-Length: 0", f"Retry-After: {after}")
    async with pi_before([refused], VLLM) as (pi, _):
        assert (await pi.complete()).json["code"] == "VPS_UNAVAILABLE"
        assert (await pi.complete()).status == 200


def listing(**about: Any) -> bytes:
    return answer(200, {"data": [{"id": "qwen_0_5b", **about}]})


@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytes"])
@pytest.mark.parametrize(("api", "script", "text", "tokens", "path"), ANSWERED)
async def test_a_completion(api, script, text, tokens, path, split):
    async with pi_before(script, api=api, split=split) as (pi, backend):
        reply = await pi.stream()
        *events, done = reply.events
        assert (reply.clean, "".join(event["token"] for event in events)) == (True, text)
        assert done == done | {"finish_reason": "stop", "prompt_tokens": 9, "total_tokens": tokens}
        assert (await pi.complete()).json["completion"] == text
        line, headers, body = backend.asked[-1]
        assert (line, json.loads(body)["model"]) == (f"POST {path} HTTP/1.1", "qwen_0_5b")
        assert (headers["authorization"], "x-api-key" in headers) == ("Bearer gpu-key", False)


ERROR = {"error": {"message": "boom"}}
REPORTED = "(it reported an error)"
NO_STREAM = "(its answer is not of the type that was asked for)"
NOTHING = "VPS backend answered nothing; a lower n_ctx of it may help"
PACKED = head(401, "Content-Encoding: gzip", "Content-Length: 2", kind="text/html") + b"\x1f\x8b"
LONG_PAGE = head(404, "Content-Length: 200000", kind="text/html") + b"x" * 200_000
FAULTS = [
    ([answer(200, ERROR)], NO_STREAM, True),
    ([CHUNKED, chunk(text_chunk("1")), chunk(data({"error": "boom"})), HANG], REPORTED, True),
    ([CHUNKED, chunk(END), b"0\r\n\r\n"], NOTHING, False),
    ([PACKED], "our key", False),
    ([LONG_PAGE], "not have this model", False),
]


@pytest.mark.parametrize(("script", "part", "counted"), FAULTS)
async def test_a_fault_before_the_first_token_or_behind_it(script, part, counted):
    async with pi_before(script, probing=False) as (pi, backend):
        reply = await pi.complete()
        assert part in reply.json["message"]
        assert "boom" not in reply.json["message"]
        assert len(backend.completions) == 1
        assert pi.gateway.fleet.first.breaker.failures == int(counted)


async def test_an_engine_at_work_is_probed_only_if_its_breaker_is_open():
    """Otherwise it would get no request until its running answers have ended."""
    go = asyncio.Event()
    async with pi_before([CHUNKED, go.wait, *VLLM[1:]]) as (pi, backend):
        running = asyncio.create_task(pi.complete())
        first = pi.gateway.fleet.first
        await until(lambda: backend.begun.is_set() and first.answering)
        asked = len(backend.asked)
        await first.probe()
        await first.learn_models()
        assert len(backend.asked) == asked
        first.breaker.open(0.0)
        await first.probe()
        assert first.breaker.state == "half-open"
        go.set()
        assert (await running).status == 200


WHOLE = [CHUNKED, chunk(text_chunk("1", "stop"))]
BROKEN_EVENT = chunk(text_chunk("1", "stop") + b"data: {oops\n\n")
LATE_ERROR = chunk(text_chunk("1", "stop") + data({"error": "boom"}) + text_chunk("2"))
FOLLOWED = [
    [*WHOLE, HANG],
    [*WHOLE, RESET],
    WHOLE,
    [*WHOLE, *ALIVE],
    [CHUNKED, LATE_ERROR, HANG],
    [CHUNKED, BROKEN_EVENT, HANG],
]
ENDLESS = [CHUNKED, *(chunk(text_chunk(piece)) for piece in PIECES[:5]), HANG]


async def test_what_follows_a_whole_text_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(engines, "COUNTS_SECONDS", 0.05)
    async with pi_before(*FOLLOWED, ENDLESS) as (pi, backend):
        # The last ends naturally.
        for text, reason in (*[("1", "stop")] * len(FOLLOWED), (BODY, "block")):
            result = (await pi.complete(prompt=IN_FILE["prompt"])).json
            assert (result["completion"], result["finish_reason"]) == (text, reason)
        await until(lambda: not backend.running)
        assert pi.gateway.fleet.first.breaker.failures == 0


SILENT = [
    ([HANG], "did not answer in time"),
    ([CHUNKED, HANG], "stopped in the middle of its answer"),
    ([CHUNKED, *ALIVE], "did not answer in time"),
]


@pytest.mark.parametrize(("script", "part"), SILENT)
async def test_an_engine_that_makes_no_progress_for_too_long_has_failed(script, part, monkeypatch):
    monkeypatch.setattr(engines, "ALIVE_SECONDS", 1.0)
    monkeypatch.setattr(engines.Engine, "idle_seconds", 0.1)
    async with pi_before(script) as (pi, _):
        assert part in (await pi.complete()).json["message"]


async def test_an_engine_that_thinks_or_is_silent_is_not_given_up(monkeypatch):
    """Meanwhile its client gets comments, which keep the connection alive: before the head, which
    comes once the prompt has been read, between thoughts, and before the text.
    """
    monkeypatch.setattr(engines, "ALIVE_SECONDS", 0.02)
    thought = chunk(chat_chunk(reasoning_content="hm"))
    gates = [asyncio.Event() for _ in range(12)]
    script = [gates[0].wait, CHUNKED]
    for gate in gates[1:]:
        script += [gate.wait, thought]
    async with pi_before([*script, chunk(chat_chunk("stop", content="x"))]) as (pi, _):
        body = {"prompt": "x", "instruction": "y", "language": "python"}
        reader, writer = await pi.open("POST", "/v1/complete/stream", body)
        for gate in gates:
            await reader.readuntil(b"\n\n\r\n")  # a comment
            # Less than the thoughts take together.
            monkeypatch.setattr(engines.Engine, "idle_seconds", 0.2)
            gate.set()
        assert b'"token": "x' in await reader.read()
        writer.close()


MISREAD = "maximum context length is 1000 tokens, and you requested 900000 input tokens"
WINDOW = "Your input exceeds the context window of this model."
# What a list reports, what a refusal says, and the length that counts.
TOO_LONG = [
    ({}, LONG_MESSAGE, 512),
    ({}, "invalid stop: the context window 16 chars", 4096),
    ({}, "the context length is 9000 tokens", 4096),
    ({}, MISREAD, 1000),
    ({"max_model_len": 2048}, "maximum context length is 1000 tokens", 1000),
    ({"max_model_len": 2048}, WINDOW, 2048),
]


@pytest.mark.parametrize(("about", "message", "n_ctx"), TOO_LONG)
async def test_a_prompt_that_an_engine_finds_too_long_is_fitted_again(about, message, n_ctx):
    """Once, although what a refusal says may be misread. A length in a known sentence counts until
    the next list.
    """
    fault = {"message": message, "code": "context_length_exceeded"}
    refused, prompt = answer(400, {"error": fault}), "x = 1\n" * 300
    async with (
        Backend([[refused], VLLM, [refused]], models=listing(**about)) as backend,
        Backend() as own,
        pi_for(engine(backend.port), backend_at(own.port, "own")) as pi,
    ):
        assert (await pi.complete(prompt=prompt)).json["backend"] == "gpu"
        lengths = [len(asked["prompt"]) for asked in backend.completions]
        assert 0.05 * lengths[0] < lengths[1] < 0.9 * lengths[0]
        assert pi.gateway.fleet.backends[0].n_ctx("qwen_0_5b") == n_ctx
        assert (await pi.complete(prompt=prompt)).json["backend"] == "own"  # with a longer context
        assert len(backend.completions) == 4


async def test_an_impossible_count_teaches_nothing():
    counted = text_chunk("1", "stop", usage={"prompt_tokens": 999_999, "completion_tokens": 1})
    async with pi_before([CHUNKED, chunk(counted)]) as (pi, _):
        reply = await pi.complete(prompt="x = 1\n" * 100)
        assert reply.json["prompt_tokens"] == 999_999


LOOSE = b'{"object": "list", "object": "list", "score": NaN, "data": [{"id": "qwen_0_5b"}]}'
SIZED = (f"Content-Length: {len(LOOSE)}", "Content-Encoding: identity")
# What an engine lists, and what a client hears that asks for another model.
LISTINGS = [
    (answer(500, {"error": "Traceback"}), "VPS backend is unavailable (it answered 500)"),
    (answer(200, {"data": [{"id": "org/Other"}, {"id": "one"}]}), "a backend has (none), got"),
    (
        head(200, *SIZED, kind="application/json") + LOOSE,
        "a backend has (qwen_0_5b), got",
    ),
]


@pytest.mark.parametrize(("models", "part"), LISTINGS)
async def test_what_an_engine_lists(models, part, caplog):
    async with pi_before(VLLM, models=models) as (pi, backend):
        assert part in (await pi.complete(model="qwen_7b")).json["message"]
        unknown = "gpu: expected a model of models.toml, got one, org/Other"
        assert (unknown in caplog.text) == ("none" in part)
        assert backend.completions == []
        backend.models = LISTED
        await pi.gateway.fleet.first.probe()
        await pi.gateway.fleet.first.learn_models()
        assert (await pi.complete()).status == 200
        backend.models = answer(429, {})  # it asks for patience
        first = pi.gateway.fleet.first
        await first.probe()
        assert (first.breaker.trouble, first.models_loaded) == ("", ["qwen_0_5b"])
        backend.models = head(503, "Content-Length: 0", "Retry-After: 7")
        await first.probe()
        assert first.breaker.trouble == "VPS backend is unavailable (it answered 503)"


# The engine, what its list reports, our settings, and the length that counts.
CONTEXTS = json.loads("""[
    ["openai", {"max_model_len": 1000}, {}, 1000],
    ["openai", {"metadata": {"max_request_context_length": 1000}}, {}, 1000],
    ["openai", {"max_model_len": 1000}, {"n_ctx": 500}, 500],
    ["openai", {"max_model_len": "long"}, {}, 4096],
    ["llama.cpp", {}, {}, 512]
]""")


@pytest.mark.parametrize(("api", "about", "table", "n_ctx"), CONTEXTS)
async def test_the_length_of_the_context(api, about, table, n_ctx):
    props = answer(200, {"default_generation_settings": {"n_ctx": 512}})
    async with (
        Backend(models=listing(**about), props=props) as backend,
        pi_for(engine(backend.port, api, **table)) as pi,
    ):
        assert pi.gateway.fleet.n_ctx("qwen_0_5b") == n_ctx


async def test_the_tokens_of_a_text_come_from_llama_server():
    fields, tokens = {"content": "a b", "add_special": True}, {"tokens": [1, 2]}
    async with pi_before([answer(200, tokens)], api="llama.cpp") as (pi, backend):
        assert (await pi.post("/tokenize", fields)).json == tokens
        assert backend.asked[-1][0] == "POST /tokenize HTTP/1.1"
        assert backend.completions == [fields | {"parse_special": True}]


FIM_OF_STARCODER = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>")
MARKS = {
    "qwen_0_5b": (FIM, "spmv2"),
    "qwen_1_5b": (FIM, "spmv2"),
    "qwen_7b": (FIM, "spmv2"),
    "codellama_7b": (("<PRE> ", " <SUF>", " <MID>"), "psm"),
    "mellum_4b": (FIM_OF_STARCODER, "spm"),
    "mellum2_12b": (FIM_OF_STARCODER, "spm"),
    "granite_3b": (FIM, "psm"),  # with the text below first it fills no gaps
    "granite_h_tiny": (FIM, "psm"),
}


def test_the_marks_of_the_models_that_ship():
    marks = {model.id: (model.fim, model.fim_layout) for model in SHIPPED}
    assert marks == marks | MARKS


LAYOUTS = [("spmv2", "<pre>a<suf>b<mid>"), ("spm", "<suf>b<pre>a<mid>")]


@pytest.mark.parametrize(("layout", "written"), LAYOUTS)
async def test_no_other_engine_gets_a_prompt_that_it_would_have_to_heal(layout, written):
    async with pi_before(VLLM) as (pi, backend):
        kind, marks = pi.gateway.fleet.first.kind, ("<pre>", "<suf>", "<mid>")
        kind.catalog = [replace(SHIPPED[-1], fim=marks, fim_layout=layout)]
        await pi.complete(prompt="a", suffix="b", language="python")
        assert backend.completions[0]["prompt"] == written


# A class of many methods, where quotes and brackets in texts stand for nothing: (head, method,
# cursor, text, piece).
LONG_CLASSES = {
    "python": (
        "class A:\n",
        '    def f(self):\n        """Say "it\'s {".\n\n        def x():\n        """\n'
        '        return [1, "("]\n\n',
        "    def g(self):\n",
        "        return 1\n\n    def h(self):\n",
        "        return 1\n",
    ),
    "javascript": (
        "class A {\n",
        "  f(a) {\n    /* it's {\n     */\n    return `a { ${a}`;\n  }\n\n",
        "  g(a) {\n",
        "    return 1;\n  }\n\n  h(a) {\n",
        "    return 1;\n  }\n",
    ),
}


@pytest.mark.parametrize("language", LONG_CLASSES)
@pytest.mark.parametrize("more", range(0, 110, 10))
def test_only_the_end_of_a_long_file_is_followed(language, more):
    """From a statement on, wherever the limit falls."""
    head, method, cursor, text, piece = LONG_CLASSES[language]
    prompt = head + 200 * method + " " * more + "\n" + cursor
    end = end_of(prompt, language)
    assert len(prompt) > NEAR_CHARS >= len(end)
    ending = Ending("complete", language, end, None, "auto")
    assert ending.feed(text) == (piece, "block")
