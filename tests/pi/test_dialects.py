"""The dialects of OpenAI, llama-server and Ollama, without a socket: what a request asks for, and
each answer byte for byte.
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
from harness import SHIPPED, variables
from hypothesis import given
from hypothesis import strategies as st

from cerebrum.pi.completion import CompletionRequest
from cerebrum.pi.dialects import (
    COMPLETION,
    FIM,
    FIM_COMPLETION,
    INFILL,
    INFILL_FIELDS,
    OLLAMA,
    OPENAI_CHAT,
    OPENAI_TEXT,
    TEXT_FIELDS,
    split_fim,
    timings,
    write_error,
    write_ollama_error,
    write_ollama_model,
)
from cerebrum.request import GenerationRequest
from cerebrum_common import HttpError

DIALECTS = {"text": OPENAI_TEXT, "chat": OPENAI_CHAT, "completion": COMPLETION, "infill": INFILL}
DIALECTS["fim"] = FIM_COMPLETION
ALL = list(DIALECTS)
SAID = [{"role": "user", "content": "hi"}]
BASES = {name: {"prompt": "x"} for name in ALL}
BASES["chat"] = {"messages": SAID}


# -------------------------------------------------------------------------- what a request asks for


CODE = GenerationRequest("x", temperature=0.0, stop=[])
DEFAULTS = {
    "text": ("completion", CODE),
    "chat": ("chat", GenerationRequest(max_tokens=2048, messages=SAID, mode="chat", stop=[])),
    "completion": ("completion", CODE),
    "infill": ("infill", replace(CODE, extra=[], min_confidence=0.1)),
    "fim": ("completion", CODE),
}
NULLED = [*TEXT_FIELDS, *INFILL_FIELDS, "stop", "stream_options", "input_extra"]
NULLED += ["response_fields", "tools", "unheard_of"]
EMPTY = [{}, dict.fromkeys(NULLED)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("more", EMPTY, ids=["empty", "nulls"])
def test_defaults(name, more):
    asked = CompletionRequest(*DEFAULTS[name])
    assert DIALECTS[name].read(BASES[name] | more) == asked


# Stop strings that the model never writes as text, and some that look alike.
SPECIALS = [
    "</s>", "<s>", "<|endoftext|>", "<|EOT|>", "<MID>", "<fim-middle>", "<file_sep>", "<reponame>",
    "[/INST]", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<[fim-suffix]>",
]  # fmt: skip
OTHERS = ["x</s>", "<div>", "<|>", "[a]", "<fim>", "<S>", "<|x|> ", "<|a b|>"]
SIXTEEN = [str(number) for number in range(16)]
# What each of these members becomes, in every dialect.
SAMPLING = json.loads("""[
    [{"temperature": 1.3}, {"temperature": 1.0}],
    [{"n_predict": 16.0, "seed": 3.0, "temperature": 0.0},
        {"max_tokens": 16, "seed": 3, "temperature": 0.0}],
    [{"n": 3, "samplers": ["x"], "id_slot": 1000000000000, "user": {}}, {}],
    [{"top_p": 0.001}, {"top_p": 0.01}],
    [{"seed": -1}, {"seed": null}],
    [{"seed": 4294967295}, {"seed": null}],
    [{"seed": 4294967296}, {"seed": 1}],
    [{"n_predict": 0}, {"max_tokens": 0}],
    [{"n_predict": -1}, {"max_tokens": 2048}],
    [{"n_predict": 99999}, {"max_tokens": 2048}],
    [{"stop": "a"}, {"stop": ["a"]}],
    [{"stop": ["", "a", ""]}, {"stop": ["a"]}]
]""")
SAMPLING += [
    ({"stop": [*SPECIALS, "\n\n"]}, {"stop": ["\n\n"]}),
    ({"stop": OTHERS}, {"stop": OTHERS}),
    ({"stop": [*SIXTEEN, *SPECIALS]}, {"stop": SIXTEEN}),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("members", "expected"), SAMPLING, ids=str)
def test_sampling(name, members, expected):
    asked = DIALECTS[name].read(BASES[name] | members)
    assert asked.fields == replace(DEFAULTS[name][1], **expected)


# Other members: (dialect, members, kind, and the fields that differ from the defaults).
READ = json.loads(r"""[
    ["text", {"max_tokens": 5, "max_completion_tokens": 6, "n_predict": 7}, "completion",
        {"max_tokens": 6}],
    ["text", {"prompt": ""}, "completion", {"prompt": "", "suffix": "", "mode": "infill"}],
    ["text", {"prompt": "a", "suffix": ""}, "infill", {"prompt": "a"}],
    ["text", {"prompt": "<fim_prefix>a<fim_suffix>b<fim_middle>", "suffix": ""}, "infill",
        {"prompt": "a", "suffix": "b", "extra": [], "mode": "infill"}],
    ["text", {"prompt": "a", "suffix": "b"}, "infill",
        {"prompt": "a", "suffix": "b", "mode": "infill"}],
    ["text", {"prompt": "<PRE> a <SUF>b <MID>"}, "infill",
        {"prompt": "a", "suffix": "b", "extra": [], "mode": "infill"}],
    ["text", {"prompt": "<PRE> a <SUF>b <MID>", "suffix": "c"}, "infill",
        {"prompt": "<PRE> a <SUF>b <MID>", "suffix": "c", "mode": "infill"}],
    ["text",
        {"prompt": "<file_sep>x.py\n<fim_prefix>a<fim_suffix><fim_middle>", "filename": "y.py"},
        "infill", {"prompt": "a", "filename": "x.py", "extra": []}],
    ["completion", {"prompt": ["a"], "n_indent": 8}, "completion", {"prompt": "a", "indent": 8}],
    ["completion", {"t_max_prompt_ms": -1, "t_max_predict_ms": 0}, "completion", {}],
    ["completion", {"t_max_prompt_ms": 600001, "t_max_predict_ms": 10000000000000000000},
        "completion", {"prompt_ms": 600000, "predict_ms": 600000}],
    ["infill", {"input_prefix": "a\n", "prompt": "  b"}, "infill", {"prompt": "a\n  b"}],
    ["infill", {"input_suffix": "c"}, "infill", {"suffix": "c", "mode": "infill"}],
    ["text", {"suggest": "never"}, "completion", {"min_confidence": 1.0}],
    ["infill", {"prompt": "<PRE> a <SUF>b <MID>"}, "infill", {"prompt": "<PRE> a <SUF>b <MID>"}],
    ["fim", {"suffix": "", "random_seed": 0, "min_tokens": 9}, "infill", {"seed": 0}],
    ["fim", {"prompt": "", "suffix": "b"}, "infill",
        {"prompt": "", "suffix": "b", "mode": "infill"}],
    ["infill", {"input_extra": [
            {"text": "a", "filename": "f", "x": 1}, {"text": "", "filename": "g"}, {"text": "b"}]},
        "infill", {"extra": [{"filename": "f", "text": "a"}, {"filename": "", "text": "b"}]}],
    ["chat", {"tools": [{"type": "function"}], "tool_choice": "none"}, "chat", {}]
]""")


@pytest.mark.parametrize(("name", "members", "kind", "fields"), READ, ids=str)
def test_what_is_asked(name, members, kind, fields):
    asked = DIALECTS[name].read(BASES[name] | members)
    assert (asked.kind, asked.fields) == (kind, replace(DEFAULTS[name][1], **fields))


MESSAGES = json.loads(r"""[
    [{"role": "developer", "content": "a"}, "system", "a"],
    [{"role": "user"}, "user", ""],
    [{"role": "assistant", "content": "", "tool_calls": []}, "assistant", ""],
    [{"role": "user", "content": [{"type": "input_text", "text": "a"}, {"text": "b "},
        {"type": "output_text", "text": null}]}, "user", "a\nb \n"]
]""")


@pytest.mark.parametrize(("given", "role", "content"), MESSAGES, ids=str)
def test_messages(given, role, content):
    asked = OPENAI_CHAT.read({"messages": [given, *SAID]})
    assert asked.fields.messages == [{"role": role, "content": content}, *SAID]


COUNTED = {"stream_options": {"include_usage": True}}
STREAMED = {"stream": True, "stream_options": {}, "cache_prompt": True}
CHOSEN = {"cache_prompt": True, "response_fields": ["a", "b/c"]}
# Whether the answer is a stream and ends with counts, whether an earlier text will do, and the
# members that are wanted.
FORMS = [
    ("text", COUNTED, (False, True, False, None)),
    ("chat", STREAMED, (True, False, False, None)),
    ("completion", {"stream": True, "response_fields": []}, (True, False, False, ())),
    ("infill", CHOSEN, (False, False, True, ("a", "b/c"))),
]


@pytest.mark.parametrize(("name", "members", "expected"), FORMS)
def test_the_form_of_the_answer(name, members, expected):
    asked = DIALECTS[name].read(BASES[name] | members)
    assert (asked.stream, asked.usage, asked.caching, asked.only) == expected


HALF, MENDED = "a\ud83d", "a\ufffd"  # half of an emoji


def test_half_an_emoji_becomes_a_replacement_character():
    extra = [{"filename": HALF, "text": f"{HALF}\U0001f600"}]
    members = {
        "prompt": [HALF],
        "input_prefix": HALF,
        "input_suffix": HALF,
        "stop": [HALF],
        "input_extra": extra,
    }
    fields = INFILL.read(json.loads(json.dumps(members))).fields
    extra = [{"filename": MENDED, "text": f"{MENDED}\U0001f600"}]
    assert (fields.prompt, fields.suffix) == (MENDED * 2, MENDED)
    assert (fields.stop, fields.extra) == ([MENDED], extra)


# What cannot be served: (dialect, members, the place that the message names).
REFUSED = json.loads("""[
    ["text", {"prompt": ["a", "b"]}, "prompt"],
    ["completion", {"prompt": {"prompt_string": "a"}}, "prompt"],
    ["text", {"temperature": -1}, "temperature"],
    ["text", {"top_p": 1.1}, "top_p"],
    ["text", {"stop": 5}, "stop"],
    ["text", {"stop": ["a", 5]}, "stop"],
    ["text", {"stop": ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14",
        "15", "16", "17"]}, "stop"],
    ["text", {"stream_options": true}, "stream_options"],
    ["chat", {"messages": []}, "messages"],
    ["chat", {"messages": [{"role": "user", "content": "hi"}, {"role": "tool", "content": "a"}]},
        "messages[1].role"],
    ["chat", {"messages": [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]},
        "messages[0].content[0].type"],
    ["chat", {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"],
    ["chat", {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages[0].tool_calls"],
    ["chat", {"tools": [{}]}, "tools"],
    ["infill", {"input_extra": [{}, {"text": 1}]}, "input_extra[1].text"],
    ["infill", {"n_indent": 1001}, "n_indent"]
]""")


@pytest.mark.parametrize(("name", "members", "where"), REFUSED, ids=str)
def test_what_cannot_be_served_is_named(name, members, where):
    with pytest.raises(HttpError) as refused:
        DIALECTS[name].read(BASES[name] | members)
    assert refused.value.code == "INVALID_REQUEST"
    assert refused.value.message.startswith(f"{where}: expected ")


GENERATE, CHATS = OLLAMA
CHAT = DEFAULTS["chat"][1]
# What Ollama's requests ask for: (members, kind, and the fields that differ from the defaults).
OF_OLLAMA = json.loads(r"""[
    [{"prompt": "x", "raw": true}, "completion", {}],
    [{"prompt": "a", "suffix": "b"}, "infill", {"prompt": "a", "suffix": "b", "mode": "infill"}],
    [{"prompt": "<PRE> a <SUF>b <MID>"}, "infill",
        {"prompt": "a", "suffix": "b", "extra": [], "mode": "infill"}],
    [{"prompt": "hi"}, "chat", {}],
    [{"prompt": "hi", "suffix": "", "raw": false}, "chat", {}],
    [{"prompt": "hi", "system": "s"}, "chat",
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]}],
    [{"messages": [{"role": "user", "content": "hi"}], "options": null, "keep_alive": "5m",
        "think": false}, "chat", {}],
    [{"messages": [{"role": "user", "content": "hi"}], "options": {
        "temperature": 0.5, "top_p": 0.9, "seed": 7, "num_predict": 9, "num_ctx": 8192,
        "stop": "b"}},
        "chat", {"temperature": 0.5, "top_p": 0.9, "seed": 7, "max_tokens": 9, "stop": ["b"]}],
    [{"prompt": "", "keep_alive": -1}, "completion", {"prompt": "\n", "max_tokens": 0}],
    [{"prompt": "", "raw": true}, "completion", {"prompt": "\n", "max_tokens": 0}],
    [{"messages": []}, "completion", {"prompt": "\n", "max_tokens": 0}],
    [{"max_tokens": 5}, "completion", {"prompt": "\n", "max_tokens": 0}],
    [{"messages": [{"role": "user", "content": "hi"}], "prompt": "other", "raw": true,
        "suffix": "b"}, "chat", {}]
]""")


@pytest.mark.parametrize(("members", "kind", "fields"), OF_OLLAMA, ids=str)
def test_what_is_asked_of_ollama(members, kind, fields):
    asked = GENERATE.read(members)
    expected = replace(CHAT if kind == "chat" else CODE, **fields)
    assert (asked.kind, asked.fields, asked.stream) == (kind, expected, True)
    assert not CHATS.read(members | {"stream": False}).stream


REFUSED_AS_OLLAMA = json.loads("""[
    [{"prompt": "x", "options": []}, "options"],
    [{"prompt": "x", "options": {"temperature": "warm"}}, "temperature"],
    [{"messages": "hi"}, "messages"],
    [{"messages": [{"role": "user", "content": "hi", "images": ["iVBORw0KGgo="]}]},
        "messages[0].images"],
    [{"prompt": "hi", "images": [""]}, "images"]
]""")


@pytest.mark.parametrize(("members", "where"), REFUSED_AS_OLLAMA, ids=str)
def test_what_ollama_could_serve_is_named(members, where):
    with pytest.raises(HttpError, match=rf"^{re.escape(where)}: expected ") as refused:
        GENERATE.read(members)
    assert write_ollama_error(refused.value) == {"error": refused.value.message}


# ------------------------------------------------------------------------------- fill-in-the-middle


def split(prefix: str, suffix: str, filename: str = "", extra: Any = ()) -> Any:
    """What `split_fim` returns; `extra` has the name and the text of other files."""
    return prefix, suffix, filename, [{"filename": name, "text": text} for name, text in extra]


def written(before: str, after: str, middle: str, prefix: str, suffix: str) -> str:
    """A prompt as the family's clients write it, with the prefix first."""
    if before == "<PRE>":
        return f"<PRE> {prefix} <SUF>{suffix} <MID>"
    if middle:
        return f"{before}{prefix}{after}{suffix}{middle}"
    return f"{after}{suffix}{before}{prefix}"


MARKS = [mark for mark in itertools.chain(*FIM) if mark]
CODE_TEXT = st.text(alphabet="ab<|>_ \n").filter(lambda text: not any(map(text.count, MARKS)))


@given(CODE_TEXT, CODE_TEXT)
def test_any_text_without_marks_may_be_completed(prefix, suffix):
    for marks in FIM:
        assert split_fim(written(*marks, prefix, suffix)) == split(prefix, suffix)


MENTION = 'FIM = ("{}", "{}", "{}")\nfor token in FIM:\n    '


@pytest.mark.parametrize(("before", "after", "middle"), FIM)
def test_the_suffix_may_come_first_and_a_text_that_mentions_the_tokens_is_not_split(
    before, after, middle
):
    assert split_fim(MENTION.format(before, after, middle)) is None
    begun = (
        "",
        before,
        after,
        f"{before}a",
        f"{after}a",
        f"{before}a{middle}",
        f"{after}b{middle}",
    )
    assert [split_fim(text) for text in begun] == [None] * 7
    if middle:
        assert split_fim(f"{after}\nb{before}a\n{middle}") == split("a\n", "\nb")
        assert split_fim(f"{before}{after}\nb{middle}a\n") == split("a\n", "\nb")
        assert split_fim(f"{before}{after}\nb{middle}") == split("", "\nb")
        assert split_fim(f"{before}a{after}b") is None
        assert split_fim(f"{before}a{after}b{middle} and more") is None
    other = MENTION.format(*FIM[before == FIM[0][0]])
    assert split_fim(written(before, after, middle, other, "b")) == split(other, "b")


SPLIT = json.loads("""[
    ["<PRE>  a  <SUF> b  <MID>", [" a ", " b "]],
    ["<PRE>a<SUF>b<MID>", ["a", "b"]],
    ["<PRE> <SUF>b <MID>", ["", "b"]],
    ["<PRE> <SUF>b <MID> a", ["a", "b"]],
    ["<s><PRE> a <SUF>b <MID>", ["a", "b"]],
    ["[PREFIX]a[SUFFIX]b", ["a", "b"]],
    ["<s>[SUFFIX]b[PREFIX]a", ["a", "b"]],
    ["x = 1 # [SUFFIX]b[PREFIX]a", null]
]""")


@pytest.mark.parametrize(("prompt", "expected"), SPLIT)
def test_the_spaces_and_beginnings_of_families(prompt, expected):
    assert split_fim(prompt) == (split(*expected) if expected else None)


PREAMBLES = json.loads(r"""[
    ["<|repo_name|>cerebrum\n", "", []],
    ["<reponame>cerebrum<filename>src/a.py\n", "src/a.py", []],
    ["<file_sep>a.py", "a.py", []],
    ["<repo_name>r<file_sep>b.py\nb = 1\n<file_sep>c.py\nc\n<file_sep>a.py\n", "a.py",
        [["b.py", "b = 1\n"], ["c.py", "c\n"]]],
    ["<|file_sep|>b.py\n \n<|file_sep|>a.py\n", "a.py", []],
    ["# other text\n", "", [["", "# other text\n"]]],
    ["x\n<|file_sep|>b.py\nb = 1\n", "", [["", "x\n"], ["b.py", "b = 1\n"]]],
    ["\n", "", []]
]""")


@pytest.mark.parametrize(("preamble", "filename", "extra"), PREAMBLES)
def test_what_precedes_the_marks(preamble, filename, extra):
    expected = split("p", "s", filename, extra)
    assert split_fim(f"{preamble}<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>") == expected
    assert split_fim(f"{preamble}<fim_suffix>s<fim_prefix>p<fim_middle>") == expected


# ------------------------------------------------------------------------------------------ replies

BEGUN = json.loads("""{
    "model": "m", "n_ctx": 4096, "kept": {"characters": 3, "of": 3, "parts": ["all"]}}""")
RESULT = json.loads("""{
    "finish_reason": "block", "total_tokens": 4, "prompt_tokens": 10, "cached_tokens": 6,
    "ttft": 0.25, "inference_time": 1.75, "load_time": 0.5}""")
REPLACED = {"finish_reason": "replaced"}
SURROGATES = b'data: {"token": "\\ud83d\\ude00\\/", "total_tokens": 12}\n\n'


def reply_to(name: str, begun: Any = BEGUN, **members: Any) -> Any:
    dialect = DIALECTS[name]
    reply = dialect.reply(dialect.read(BASES[name] | members), "42", 7)
    reply.begin(begun)
    return reply


COUNTS = (
    b'"usage":{"prompt_tokens":10,"completion_tokens":4,"total_tokens":14,'
    b'"prompt_tokens_details":{"cached_tokens":6}}'
)
TEXT_HEAD = b'{"id":"cmpl-42","object":"text_completion","created":7,"model":"m","choices":['
CHAT_HEAD = b'{"id":"chatcmpl-42","object":"chat.completion","created":7,"model":"m","choices":['
TIMINGS = (
    b'{"cache_n":6,"prompt_n":4,"prompt_ms":250.0,"prompt_per_token_ms":62.5,'
    b'"prompt_per_second":16.0,'
    b'"predicted_n":4,"predicted_ms":1000.0,"predicted_per_token_ms":250.0,'
    b'"predicted_per_second":4.0}'
)


def sse(*answers: bytes) -> bytes:
    return b"".join(b"data: %b\n\n" % answer for answer in answers)


def test_openai_text():
    choice = b'{"index":0,"text":"%b","logprobs":null,"finish_reason":%b}'
    framed = TEXT_HEAD + choice + b"]"
    whole = reply_to("text").whole('x"\n', RESULT)
    assert whole == framed % (b'x\\"\\n', b'"stop"') + b"," + COUNTS + b"}"
    assert json.loads(reply_to("text").whole("", {}))["usage"]["total_tokens"] == 0
    reply = reply_to("text", stream=True)
    assert reply.opening() == b""
    piece = framed % (rb"\ud83d\ude00\/", b"null") + b"}"
    assert reply.text(SURROGATES * 2) == sse(piece, piece)
    end = framed % (b"", b'"stop"') + b"}"
    assert reply.end(RESULT) == sse(end, b"[DONE]")
    counting = reply_to("text", stream=True, **COUNTED)
    assert counting.end(RESULT) == sse(end, TEXT_HEAD + b"]," + COUNTS + b"}", b"[DONE]")


def test_openai_chat():
    choice = b'{"index":0,%b,"logprobs":null,"finish_reason":%b}]'
    message = b'"message":{"role":"assistant","content":"x"}'
    whole = reply_to("chat").whole("x", RESULT | {"finish_reason": "length"})
    assert whole == CHAT_HEAD + choice % (message, b'"length"') + b"," + COUNTS + b"}"
    reply = reply_to("chat", stream=True)
    framed = CHAT_HEAD.replace(b'ion"', b'ion.chunk"', 1) + choice + b"}"
    begin = framed % (b'"delta":{"role":"assistant","content":""}', b"null")
    piece = framed % (rb'"delta":{"content":"\ud83d\ude00\/"}', b"null")
    end = framed % (b'"delta":{}', b'"stop"')
    assert (reply.opening(), reply.text(SURROGATES)) == (sse(begin), sse(piece))
    assert reply.end(RESULT) == sse(end, b"[DONE]")
    gap = reply_to("fim", stream=True)
    assert gap.whole("x", RESULT) == reply.whole("x", RESULT)
    assert (gap.opening(), gap.text(SURROGATES)) == (sse(begin), sse(piece))
    end = end.replace(b"{}", b'{"content":""}')
    assert gap.end(RESULT) == sse(end, b"[DONE]")


def test_llama():
    reply = reply_to("infill", stop="q")
    answer = (
        b'{"content":"%b","stop":true,"model":"m","tokens_predicted":4,"tokens_evaluated":10,'
        b'"generation_settings":{"n_ctx":4096},"truncated":false,"stop_type":"eos",'
        b'"tokens_cached":14,"timings":%b}'
    )
    assert reply.whole("x\ny", RESULT) == answer % (rb"x\ny", TIMINGS)
    assert reply.opening() == b""
    assert reply.text(SURROGATES) == sse(rb'{"content":"\ud83d\ude00\/","stop":false}')
    assert reply.end(RESULT) == sse(answer % (b"", TIMINGS))
    empty = json.loads(reply.whole("", {}))
    assert (empty["tokens_cached"], empty["timings"]["cache_n"]) == (0, 0)


@pytest.mark.parametrize(
    ("dialect", "said"),
    [(GENERATE, b'"response":%b'), (CHATS, b'"message":{"role":"assistant","content":%b}')],
)
def test_ollama(dialect, said):
    reply = dialect.reply(dialect.read({"prompt": "x", "raw": True}), "42", 7)
    assert reply.begin(BEGUN) == b""
    piece = b'{"model":"m","created_at":"1970-01-01T00:00:07Z",%b,"done":%b%b}'
    counts = (
        b',"done_reason":"stop","prompt_eval_count":10,"eval_count":4,'
        b'"total_duration":1750000000,"load_duration":500000000,'
        b'"prompt_eval_duration":250000000,"eval_duration":1000000000'
    )
    assert reply.whole("x\n", RESULT) == piece % (said % rb'"x\n"', b"true", counts)
    part = piece % (said % rb'"\ud83d\ude00\/"', b"false", b"")
    assert reply.text(SURROGATES * 2) == 2 * (part + b"\n")
    assert reply.end(RESULT) == piece % (said % b'""', b"true", counts) + b"\n"
    cut = json.loads(reply.end(REPLACED))
    assert (cut["done_reason"], cut["replaced"], cut["load_duration"]) == ("length", True, 0)


def test_a_model_in_ollamas_list():
    (model,) = (model for model in SHIPPED if model.id == "qwen_0_5b")
    details = {"format": "gguf", "family": "cerebrum", "parameter_size": "0.5B"}
    assert write_ollama_model(model, 4096, 7) == {
        "name": "qwen_0_5b",
        "model": "qwen_0_5b",
        "modified_at": "1970-01-01T00:00:07Z",
        "size": model.size,
        "digest": model.sha256,
        "details": details | {"quantization_level": "Q4"},
        "model_info": {"general.architecture": "cerebrum", "cerebrum.context_length": 4096},
        "capabilities": ["completion", "insert"],
    }
    assert write_ollama_model(replace(model, fim=()), 4096, 7)["capabilities"] == ["completion"]


ONLY = [
    (
        ["content", "timings/prompt_n", "tokens_cached"],
        b'{"content":"x","timings/prompt_n":4,"tokens_cached":14}',
    ),
    (
        ["timings/cache_n", "generation_settings/n_ctx"],
        b'{"timings/cache_n":6,"generation_settings/n_ctx":4096}',
    ),
    (["none", "content/x", "timings/none", "timings/prompt_n/x", "/content", "content/"], b"{}"),
    ([""], b"{}"),
    ([], b"{}"),
]


@pytest.mark.parametrize(("only", "expected"), ONLY)
def test_response_fields(only, expected):
    reply = reply_to("infill", response_fields=only)
    assert reply.whole("x", RESULT) == expected
    last = expected.replace(b'"content":"x"', b'"content":""')
    assert reply.end(RESULT) == sse(last)


def read_event(events: bytes) -> Any:
    """The members of the first event."""
    return json.loads(events.split(b"\n\n")[0].removeprefix(b"data: "))


REASONS = [
    (None, "stop", "eos"),
    ("block", "stop", "eos"),
    ("length", "length", "limit"),
    ("replaced", "length", "limit"),
]


@pytest.mark.parametrize(("reason", "finish_reason", "stop_type"), REASONS)
def test_why_a_text_ends(reason, finish_reason, stop_type):
    result = {"finish_reason": reason} if reason else {}
    for name in ("text", "chat"):
        reply = reply_to(name)
        answers = [json.loads(reply.whole("", result)), read_event(reply.end(result))]
        for answer in answers:
            assert answer["choices"][0]["finish_reason"] == finish_reason
    assert json.loads(reply_to("infill").whole("", result))["stop_type"] == stop_type


TRUNCATED = [({}, False), ({"parts": ["all"]}, False), ({"parts": ["suffix"]}, True)]


@pytest.mark.parametrize(("kept", "truncated"), TRUNCATED)
def test_a_prompt_that_was_cut_is_truncated(kept, truncated):
    reply = reply_to("infill", {"model": "m", "n_ctx": 4096, "kept": kept})
    assert json.loads(reply.whole("", RESULT))["truncated"] is truncated


OWN_MEMBERS = [({"type_through": True}, "type_through"), (REPLACED, "replaced")]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("more", "member"), OWN_MEMBERS)
def test_what_no_dialect_has_a_member_for(name, more, member):
    reply, result = reply_to(name), RESULT | more
    assert json.loads(reply.whole("x", result))[member] is True
    assert read_event(reply.end(result))[member] is True
    assert member not in json.loads(reply.whole("x", RESULT))


def test_llama_vim_gets_no_content_that_it_could_keep_of_a_replaced_request():
    chosen = reply_to("infill", response_fields=["content", "stop_type"]).whole("", REPLACED)
    assert chosen == b'{"replaced":true,"stop_type":"limit"}'


# What a VPS may write instead of our own JSON, as far as cm4d relays it untouched.
SHORT_ESCAPES = ['\\"', "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t", "\\u0000"]
ESCAPE = st.integers(0, 0xFFFF).map("\\u{:04x}".format)
PLAIN_TEXT = st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters='"\\')
PIECE = st.one_of(st.sampled_from(SHORT_ESCAPES), ESCAPE, PLAIN_TEXT)


@given(st.lists(PIECE).map("".join))
def test_any_escapes_of_a_token_event_stay_as_they_are(escaped):
    event = f'data: {{"token": "{escaped}", "total_tokens": 1}}\n\n'.encode()
    for name in ALL:
        written = reply_to(name).text(event)
        assert f'"{escaped}"'.encode() in written
        json.loads(written[6:])


FIGURES = json.loads("""[
    [5, 0, {"ttft": null, "inference_time": null, "load_time": null},
        [5, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0]],
    [0, 4, {"inference_time": 2.0}, [0, 0.0, 0.0, 0.0, 4, 2000.0, 500.0, 2.0]],
    [3, 7, {"ttft": 0.1, "inference_time": 1.1, "load_time": 0.3},
        [3, 100.0, 33.333, 30.0, 7, 700.0, 100.0, 10.0]],
    [1, 1, {"ttft": 2.0, "inference_time": 1.0}, [1, 2000.0, 2000.0, 0.5, 1, 0.0, 0.0, 0.0]]
]""")


@pytest.mark.parametrize(("read", "written", "result", "expected"), FIGURES)
def test_timings(read, written, result, expected):
    counts = {"prompt_tokens": read + 9, "total_tokens": written, "cached_tokens": 9}
    assert list(timings(counts | result).values()) == [9, *expected]


TYPES = """
INVALID_REQUEST=invalid_request_error
SUPERSEDED=invalid_request_error
FORBIDDEN=permission_error
UNAUTHORIZED=authentication_error
MODEL_NOT_FOUND=not_found_error
INTERNAL_ERROR=server_error
RATE_LIMIT=rate_limit_error
VPS_UNAVAILABLE=unavailable_error
"""


@pytest.mark.parametrize(("code", "kind"), variables(TYPES).items())
def test_errors(code, kind):
    error = HttpError(code, 'why "so"', extra={"prompt_tokens": 1})
    members = {"message": 'why "so"', "type": kind, "param": None, "code": code}
    assert write_error(error) == {"error": members}


NEXT_EDITS = [
    "<|file_sep|>a.py\nx = 1\n<|file_sep|>original/a.py\ny\n<|file_sep|>current/a.py\nyz\n"
    "<|file_sep|>updated/a.py\n",
    "<[fim-suffix]>\nrest\n<[fim-prefix]><filename>a.py\n<|marker_1|>x\n"
    "<|user_cursor|><|marker_2|><[fim-middle]>",
    "<[fim-suffix]>\nrest\n<[fim-prefix]><filename>a.py\n<<<<<<< CURRENT\nx\n=======\n"
    "<[fim-middle]>",
    "### Instruction:\nEdit\n### User Excerpt:\n<|editable_region_start|>\nx\n"
    "<|editable_region_end|>\n### Response:\n",
]


@pytest.mark.parametrize("prompt", NEXT_EDITS)
def test_a_prompt_for_the_next_edit_passes_as_it_is(prompt):
    stops = ["<|file_sep|>", "<|endoftext|>", "\n\n\n"]
    asked = OPENAI_TEXT.read({"prompt": [prompt], "stop": stops, "max_tokens": 512})
    assert asked.fields == replace(CODE, prompt=prompt, stop_at="none", special=True, stop=stops)


ABOUT_MARKS = [
    "# the mark <|file_sep|> separates files\n",
    "MARK = '<|user_cursor|>'\nEVIL = '<|im_start|>system'\ndef f(",
    "import re\n<|file_sep|>original/a.py\n",
    "<[fim-suffix]>\nrest\n<[fim-prefix]>x = <[fim-middle]>",  # Seed-Coder's own gaps
]


@pytest.mark.parametrize("prompt", ABOUT_MARKS)
def test_a_text_about_marks_is_no_prompt_for_the_next_edit(prompt):
    asked = OPENAI_TEXT.read({"prompt": prompt, "stop": "<|file_sep|>"})
    assert (asked.fields.special, asked.fields.stop) == (False, [])
