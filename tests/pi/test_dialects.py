"""OpenAI's and llama-server's dialects, without a socket: what a request asks for, and each answer byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cerebrum.pi.dialects import (
    COMPLETION,
    ERROR_TYPES,
    FIM,
    INFILL,
    OPENAI_CHAT,
    OPENAI_TEXT,
    Dialect,
    Reply,
    read_completion,
    split_fim,
    timings,
    write_error,
    write_model,
    write_props,
)
from cerebrum_common import STATUSES, HttpError, sse_event

DIALECTS = {"text": OPENAI_TEXT, "chat": OPENAI_CHAT, "completion": COMPLETION, "infill": INFILL}
ALL = list(DIALECTS)
SAID = [{"role": "user", "content": "hi"}]
BASES: dict[str, dict[str, Any]] = {
    "text": {"prompt": "x"},
    "chat": {"messages": SAID},
    "completion": {"prompt": "x"},
    "infill": {"prompt": "x"},
}


# ------------------------------------------------------------------------------------- what a request asks for

PLAIN = {"model": "", "max_tokens": 512, "temperature": 0.0, "top_p": None, "seed": None, "stop": []}
CODE = PLAIN | {"filename": "", "indent": 0, "prompt_ms": 0, "predict_ms": 0}
DEFAULTS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("completion", CODE | {"prompt": "x", "mode": "complete"}),
    "chat": ("chat", PLAIN | {"max_tokens": 2048, "temperature": 0.4, "messages": SAID, "mode": "chat"}),
    "completion": ("completion", CODE | {"prompt": "x", "mode": "complete"}),
    "infill": ("infill", CODE | {"extra": [], "prompt": "x", "mode": "complete"}),
}
NULLED = [
    *("model", "max_tokens", "max_completion_tokens", "n_predict", "temperature", "top_p", "seed", "stop", "stream"),
    *("stream_options", "suffix", "filename", "input_prefix", "input_suffix", "input_extra", "cache_prompt"),
    *("response_fields", "n_indent", "t_max_prompt_ms", "t_max_predict_ms", "tools", "unheard_of"),
]
EMPTY: list[dict[str, Any]] = [{}, dict.fromkeys(NULLED)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("more", EMPTY, ids=["empty", "nulls"])
def test_defaults(name: str, more: dict[str, Any]) -> None:
    asked = DIALECTS[name].read(BASES[name] | more)
    assert (asked.kind, asked.fields) == DEFAULTS[name]


@pytest.mark.parametrize("name", ALL)
def test_unknown_members_are_ignored(name: str) -> None:
    unknown = {"n": 3, "best_of": 2, "n_cmpl": 3, "logprobs": 5, "samplers": ["x"], "id_slot": 10**12, "user": {}}
    assert DIALECTS[name].read(BASES[name] | unknown) == DIALECTS[name].read(BASES[name])


SPECIALS = [
    *("</s>", "<s>", "<|endoftext|>", "<|im_end|>", "<|fim_pad|>", "<|file_sep|>", "<|EOT|>", "<EOT>", "<MID>"),
    *("<fim_suffix>", "<fim-middle>", "<file_sep>", "<filename>", "<reponame>", "<end_of_turn>", "<eos>", "[INST]"),
    *("<\uff5cfim\u2581hole\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "<[fim-suffix]>", "[/INST]"),
    "[SUFFIX]",
]
OTHERS = ["x</s>", "<|x|> ", "<div>", "<|>", "<a|b>", "<|a b|>", "<>", "[a]", "<fim>", "</div>", "<S>", "|>"]
# What each of these members becomes, in every dialect.
SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"model": "qwen"}, {"model": "qwen"}),
    ({"temperature": 0}, {"temperature": 0.0}),
    ({"temperature": 1.3}, {"temperature": 1.0}),
    (
        {"max_tokens": 16.0, "n_predict": 16.0, "seed": 3.0, "temperature": 0.0},
        {"max_tokens": 16, "seed": 3, "temperature": 0.0},
    ),
    ({"top_p": 0}, {"top_p": 0.01}),
    ({"top_p": 0.001}, {"top_p": 0.01}),
    ({"top_p": 1}, {"top_p": 1.0}),
    ({"seed": 0}, {"seed": 0}),
    ({"seed": -1}, {"seed": None}),
    ({"seed": -(2**63)}, {"seed": None}),
    ({"seed": 2**32 - 2}, {"seed": 2**32 - 2}),
    ({"seed": 2**32 - 1}, {"seed": None}),
    ({"seed": 2**32}, {"seed": 1}),
    ({"seed": 2**64 - 1}, {"seed": (2**64 - 1) % (2**32 - 1)}),
    ({"n_predict": 0}, {"max_tokens": 0}),
    ({"n_predict": -1}, {"max_tokens": 2048}),
    ({"n_predict": 10**20 - 1}, {"max_tokens": 2048}),
    ({"stop": "a"}, {"stop": ["a"]}),
    ({"stop": ["a", "b"]}, {"stop": ["a", "b"]}),
    ({"stop": ["", "a", ""]}, {"stop": ["a"]}),
    ({"stop": [*SPECIALS, "\n\n"]}, {"stop": ["\n\n"]}),
    ({"stop": OTHERS}, {"stop": OTHERS}),
    ({"stop": [str(n) for n in range(16)] + SPECIALS}, {"stop": [str(n) for n in range(16)]}),
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("members", "expected"), SAMPLING, ids=str)
def test_sampling(name: str, members: dict[str, Any], expected: dict[str, Any]) -> None:
    assert DIALECTS[name].read(BASES[name] | members).fields == DEFAULTS[name][1] | expected


# The limit by all of its names: (dialect, members, max_tokens).
LIMITS: list[tuple[str, dict[str, Any], int]] = [
    ("text", {"max_tokens": 5}, 5),
    ("text", {"max_tokens": -1}, 2048),
    ("text", {"max_tokens": 5, "max_completion_tokens": 6, "n_predict": 7}, 6),
    ("text", {"max_tokens": 5, "n_predict": 7}, 5),
    ("text", {"max_tokens": None, "n_predict": 7}, 7),
    ("chat", {"max_completion_tokens": 6}, 6),
    ("chat", {"max_tokens": 5}, 5),
    ("chat", {"max_tokens": 0}, 0),
    ("chat", {"n_predict": 0}, 0),
    ("completion", {"max_tokens": 5}, 5),
    ("infill", {"n_predict": 128}, 128),
]


@pytest.mark.parametrize(("name", "members", "limit"), LIMITS)
def test_limits(name: str, members: dict[str, Any], limit: int) -> None:
    asked = DIALECTS[name].read(BASES[name] | members)
    assert asked.fields["max_tokens"] == limit


FILLS = {"mode": "infill"}
LATE = {"prompt_ms": 600_000, "predict_ms": 600_000}
MARKED = "<PRE> a <SUF>b <MID>"
# Other members: (dialect, members, kind, and the fields that differ from the defaults).
READ: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("text", {"prompt": ["a"]}, "completion", {"prompt": "a"}),
    ("text", {"prompt": "  a\n"}, "completion", {"prompt": "  a\n"}),
    ("text", {"prompt": ""}, "completion", {"prompt": "", "suffix": ""} | FILLS),
    ("text", {"prompt": None}, "completion", {"prompt": "", "suffix": ""} | FILLS),
    ("text", {"prompt": []}, "completion", {"prompt": "", "suffix": ""} | FILLS),
    ("text", {"prompt": "a", "suffix": ""}, "infill", {"prompt": "a"}),
    ("text", {"prompt": "a", "suffix": None}, "completion", {"prompt": "a"}),
    ("text", {"prompt": "<fim_prefix>a<fim_suffix>b<fim_middle>", "suffix": ""}, "infill",
     {"prompt": "a", "suffix": "b", "extra": []} | FILLS),
    ("text", {"prompt": "a", "suffix": " \n"}, "infill", {"prompt": "a"}),
    ("text", {"prompt": "a", "suffix": "b"}, "infill", {"prompt": "a", "suffix": "b"} | FILLS),
    ("text", {"prompt": "", "suffix": "\n"}, "infill", {"prompt": "", "suffix": "\n"} | FILLS),
    ("text", {"prompt": "a", "filename": "x.py"}, "completion", {"prompt": "a", "filename": "x.py"}),
    ("text", {"prompt": MARKED}, "infill", {"prompt": "a", "suffix": "b", "extra": []} | FILLS),
    ("text", {"prompt": MARKED, "suffix": "c"}, "infill", {"prompt": MARKED, "suffix": "c"} | FILLS),
    ("text", {"prompt": "<file_sep>x.py\n<fim_prefix>a<fim_suffix><fim_middle>", "filename": "y.py"}, "infill",
     {"prompt": "a", "filename": "x.py", "extra": []}),
    ("text", {"prompt": "<|file_sep|>o.py\nb = 1\n<|fim_prefix|>a<|fim_suffix|>c<|fim_middle|>", "filename": "y.py"},
     "infill",
     {"prompt": "a", "suffix": "c", "filename": "y.py", "extra": [{"filename": "o.py", "text": "b = 1\n"}]} | FILLS),
    ("completion", {"prompt": ["a"], "n_indent": 8}, "completion", {"prompt": "a", "indent": 8}),
    ("completion", {"prompt": "[SUFFIX]b[PREFIX]a"}, "infill", {"prompt": "a", "suffix": "b", "extra": []} | FILLS),
    ("completion", {"t_max_prompt_ms": 500}, "completion", {"prompt_ms": 500}),
    ("completion", {"t_max_predict_ms": 250}, "completion", {"predict_ms": 250}),
    ("completion", {"t_max_prompt_ms": -1, "t_max_predict_ms": 0}, "completion", {}),
    ("completion", {"t_max_prompt_ms": 600_001, "t_max_predict_ms": 10**19}, "completion", LATE),
    ("infill", {"input_prefix": "a\n", "prompt": "  b"}, "infill", {"prompt": "a\n  b"}),
    ("infill", {"input_prefix": "a", "prompt": None}, "infill", {"prompt": "a"}),
    ("infill", {"input_suffix": "c"}, "infill", {"suffix": "c"} | FILLS),
    ("infill", {"input_suffix": " \n"}, "infill", {}),
    ("infill", {"prompt": ""}, "infill", {"prompt": "", "suffix": ""} | FILLS),
    ("infill", {"prompt": ["b"]}, "infill", {"prompt": "b"}),
    ("infill", {"prompt": MARKED}, "infill", {"prompt": MARKED}),
    ("infill", {"filename": "a.rs"}, "infill", {"filename": "a.rs"}),
    ("infill",
     {"input_extra": [{"text": "a", "filename": "f", "time": 1}, {"text": "", "filename": "g"}, {"text": "b"}, {}]},
     "infill", {"extra": [{"filename": "f", "text": "a"}, {"filename": "", "text": "b"}]}),
    ("infill", {"input_extra": [{"text": "a", "filename": None}]}, "infill",
     {"extra": [{"filename": "", "text": "a"}]}),
    ("chat", {"tools": []}, "chat", {}),
    ("chat", {"tools": [{"type": "function"}], "tool_choice": "none"}, "chat", {}),
    ("chat", {"tools": [], "tool_choice": "auto"}, "chat", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "members", "kind", "fields"), READ, ids=str)
def test_what_is_asked(name: str, members: dict[str, Any], kind: str, fields: dict[str, Any]) -> None:
    asked = DIALECTS[name].read(BASES[name] | members)
    assert (asked.kind, asked.fields) == (kind, DEFAULTS[name][1] | fields)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"role": "system", "content": "a"}, ("system", "a")),
        ({"role": "developer", "content": "a"}, ("system", "a")),
        ({"role": "assistant", "content": "a"}, ("assistant", "a")),
        ({"role": "user"}, ("user", "")),
        ({"role": "user", "content": None, "name": "x"}, ("user", "")),
        ({"role": "assistant", "content": None, "tool_calls": None}, ("assistant", "")),
        ({"role": "assistant", "content": "", "tool_calls": []}, ("assistant", "")),
        ({"role": "user", "content": []}, ("user", "")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, ("user", "a")),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b "}]}, ("user", "a\nb ")),
        ({"role": "user", "content": [{"type": "input_text", "text": "a"}, {"text": None}]}, ("user", "a\n")),
        ({"role": "assistant", "content": [{"type": "output_text", "text": "a", "x": []}]}, ("assistant", "a")),
    ],
    ids=str,
)  # fmt: skip
def test_messages(given: dict[str, Any], expected: tuple[str, str]) -> None:
    role, content = expected
    asked = OPENAI_CHAT.read({"messages": [given, *SAID]})
    assert asked.fields["messages"] == [{"role": role, "content": content}, *SAID]


@pytest.mark.parametrize(
    ("name", "members", "expected"),
    [
        *((name, members, (False, False, False, None)) for name in ALL for members in EMPTY),
        ("text", {"stream": True}, (True, False, False, None)),
        ("text", {"stream_options": {"include_usage": True}}, (False, True, False, None)),
        ("text", {"stream_options": {"include_usage": False, "x": 1}}, (False, False, False, None)),
        ("chat", {"stream": True, "stream_options": {"include_usage": True}}, (True, True, False, None)),
        ("chat", {"stream_options": {"include_usage": None}}, (False, False, False, None)),
        ("chat", {"stream_options": {}, "cache_prompt": True}, (False, False, False, None)),
        ("completion", {"cache_prompt": True}, (False, False, True, None)),
        ("completion", {"stream": True, "response_fields": []}, (True, False, False, ())),
        ("infill", {"response_fields": [""]}, (False, False, False, ("",))),
        ("infill", {"cache_prompt": True, "response_fields": ["a", "b/c"]}, (False, False, True, ("a", "b/c"))),
    ],
)
def test_the_form_of_the_answer(name: str, members: dict[str, Any], expected: tuple[Any, ...]) -> None:
    asked = DIALECTS[name].read(BASES[name] | members)
    assert (asked.stream, asked.usage, asked.caching, asked.only) == expected


HALF, MENDED = "a\ud83d", "a\ufffd"  # half of an emoji


@pytest.mark.parametrize(
    ("name", "members", "expected"),
    [
        ("text", {"prompt": HALF}, {"prompt": MENDED}),
        ("text", {"prompt": [HALF], "suffix": HALF, "filename": HALF, "model": HALF, "stop": HALF},
         {"prompt": MENDED, "suffix": MENDED, "filename": MENDED, "model": MENDED, "stop": [MENDED]}),
        ("chat", {"messages": [{"role": "user", "content": HALF}], "stop": [HALF]},
         {"messages": [{"role": "user", "content": MENDED}], "stop": [MENDED]}),
        ("chat", {"messages": [{"role": "user", "content": [{"text": "\ude00\U0001f600"}]}]},
         {"messages": [{"role": "user", "content": "\ufffd\U0001f600"}]}),
        ("completion", {"prompt": f"<PRE> {HALF} <SUF>b <MID>"}, {"prompt": MENDED, "suffix": "b"}),
        ("infill", {"prompt": HALF, "input_prefix": HALF, "input_suffix": HALF,
                    "input_extra": [{"filename": HALF, "text": HALF}]},
         {"prompt": MENDED * 2, "suffix": MENDED, "extra": [{"filename": MENDED, "text": MENDED}]}),
    ],
)  # fmt: skip
def test_half_an_emoji_becomes_a_replacement_character(name: str, members: dict[str, Any], expected: Any) -> None:
    fields = DIALECTS[name].read(json.loads(json.dumps(members))).fields
    assert {member: fields[member] for member in expected} == expected


IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}
TEXTS = "prompt: expected a string, or an array of strings, got "
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"prompt": ["a", "b"]}, "prompt: expected one string, got an array of 2"),
    ("text", {"prompt": [1]}, TEXTS + "an array of 1"),
    ("text", {"prompt": [[1, 2]]}, TEXTS + "an array of 1"),
    ("text", {"prompt": 5}, TEXTS + "the number 5"),
    ("completion", {"prompt": {"prompt_string": "a"}}, TEXTS + "an object of 1"),
    ("infill", {"input_prefix": 1}, "input_prefix: expected a string, got the number 1"),
    ("text", {"suffix": ["b"]}, "suffix: expected a string, got an array of 1"),
    ("text", {"max_tokens": 1.5}, "max_tokens: expected an integer, got the number 1.5"),
    ("text", {"temperature": -1}, "temperature: expected a number from 0 to 100, got the number -1"),
    ("text", {"temperature": "0"}, 'temperature: expected a number from 0 to 100, got the string "0"'),
    ("text", {"top_p": 1.1}, "top_p: expected a number from 0 to 1, got the number 1.1"),
    ("text", {"stream": 1}, "stream: expected true or false, got the number 1"),
    ("text", {"stop": 5}, "stop: expected a string, or an array of strings, got the number 5"),
    ("text", {"stop": ["a", 5]}, "stop: expected a string, or an array of strings, got an array of 2"),
    ("text", {"stop": [str(n) for n in range(17)]}, "stop: expected at most 16 strings, got an array of 17"),
    ("text", {"stream_options": True}, "stream_options: expected an object, got the boolean true"),
    ("chat", {"stream_options": {"include_usage": 1}},
     "stream_options.include_usage: expected true or false, got the number 1"),
    ("chat", {"messages": []}, "messages: expected an array of 1 to 1000 objects, got an array of 0"),
    ("chat", {"messages": "hi"}, 'messages: expected an array of 1 to 1000 objects, got the string "hi"'),
    ("chat", {"messages": SAID * 1001}, "messages: expected an array of 1 to 1000 objects, got an array of 1001"),
    ("chat", {"messages": ["hi"]}, 'messages[0]: expected an object, got the string "hi"'),
    ("chat", {"messages": [{"content": "a"}]},
     "messages[0].role: expected one of system, developer, user, assistant, got nothing"),
    ("chat", {"messages": [*SAID, {"role": "tool", "content": "a"}]},
     'messages[1].role: expected one of system, developer, user, assistant, got the string "tool"'),
    ("chat", {"messages": [{"role": "user", "content": [IMAGE]}]},
     'messages[0].content[0].type: expected one of text, input_text, output_text, got the string "image_url"'),
    ("chat", {"messages": [{"role": "user", "content": ["a"]}]},
     'messages[0].content[0]: expected an object, got the string "a"'),
    ("chat", {"messages": [{"role": "user", "content": 5}]},
     "messages[0].content: expected a string, or an array of text parts, got the number 5"),
    ("chat", {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]},
     "messages[0].tool_calls: expected nothing, got an array of 1"),
    ("chat", {"tools": [{}]}, 'tools: expected nothing, or tool_choice "none", got an array of 1'),
    ("chat", {"tools": {}, "tool_choice": {}}, 'tools: expected nothing, or tool_choice "none", got an object of 0'),
    ("infill", {"input_extra": {}}, "input_extra: expected an array of 0 to 256 objects, got an object of 0"),
    ("infill", {"input_extra": [{}] * 257}, "input_extra: expected an array of 0 to 256 objects, got an array of 257"),
    ("infill", {"input_extra": [{}, {"text": 1}]}, "input_extra[1].text: expected a string, got the number 1"),
    ("infill", {"n_indent": 1001}, "n_indent: expected an integer from 0 to 1000, got the number 1001"),
    ("infill", {"response_fields": 5}, "response_fields: expected a string, or an array of strings, got the number 5"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "members", "message"), REFUSED, ids=str)
def test_what_cannot_be_served_is_named(name: str, members: dict[str, Any], message: str) -> None:
    with pytest.raises(HttpError) as refused:
        DIALECTS[name].read(BASES[name] | members)
    assert (refused.value.status, refused.value.code, refused.value.message) == (400, "INVALID_REQUEST", message)


# ------------------------------------------------------------------------------------------- fill-in-the-middle

FAMILIES = [pytest.param(*marks, id=marks[0]) for marks in FIM]
THREE = [pytest.param(*marks, id=marks[0]) for marks in FIM if marks[2]]


def split(prefix: str, suffix: str, filename: str = "", extra: Sequence[tuple[str, str]] = ()) -> tuple[Any, ...]:
    """What `split_fim` returns; `extra` has the name and the text of other files."""
    return prefix, suffix, filename, [{"filename": name, "text": text} for name, text in extra]


def written(before: str, after: str, middle: str, prefix: str, suffix: str) -> str:
    """A prompt as the family's clients write it, with the prefix first."""
    if before == "<PRE>":
        return f"<PRE> {prefix} <SUF>{suffix} <MID>"
    return f"{before}{prefix}{after}{suffix}{middle}" if middle else f"{after}{suffix}{before}{prefix}"


@pytest.mark.parametrize(("before", "after", "middle"), THREE)
def test_the_suffix_may_come_first(before: str, after: str, middle: str) -> None:
    assert split_fim(f"{after}\nb{before}a\n{middle}") == split("a\n", "\nb")
    assert split_fim(f"{before}{after}\nb{middle}a\n") == split("a\n", "\nb")
    assert split_fim(f"{before}{after}\nb{middle}") == split("", "\nb")


def test_spaces_of_codellama() -> None:
    assert split_fim("<PRE>  a  <SUF> b  <MID>") == split(" a ", " b ")
    assert split_fim("<PRE>a<SUF>b<MID>") == split("a", "b")
    assert split_fim("<PRE> <SUF>b <MID>") == split("", "b")
    assert split_fim("<PRE> <SUF>b <MID> a") == split("a", "b")
    assert split_fim("<s><PRE> a <SUF>b <MID>") == split("a", "b")


def test_codestral() -> None:
    assert split_fim("[SUFFIX]\nb[PREFIX]a") == split("a", "\nb")
    assert split_fim("[PREFIX]a[SUFFIX]b") == split("a", "b")
    assert split_fim("<s>[SUFFIX]b[PREFIX]a") == split("a", "b")
    assert split_fim("x = 1 # [SUFFIX]b[PREFIX]a") is None


@pytest.mark.parametrize(
    ("preamble", "filename", "extra"),
    [
        ("", "", ()),
        ("<|repo_name|>cerebrum\n", "", ()),
        ("<|endoftext|><repo_name>me/cerebrum", "", ()),
        ("<reponame>cerebrum<filename>src/a.py\n", "src/a.py", ()),
        ("<|file_sep|>a.py\n", "a.py", ()),
        ("<file_sep>a.py", "a.py", ()),
        ("<|file_separator|>a.py\n", "a.py", ()),
        ("<|repo_name|>r\n<|file_sep|>b.py\nb = 1\n<|file_sep|>a.py\n", "a.py", (("b.py", "b = 1\n"),)),
        (
            "<repo_name>r<file_sep>b.py\nb\n<file_sep>c.py\nc\n<file_sep>a.py\n",
            "a.py",
            (("b.py", "b\n"), ("c.py", "c\n")),
        ),
        ("<|file_sep|>b.py\n \n<|file_sep|>a.py\n", "a.py", ()),
        ("# other text\n", "", (("", "# other text\n"),)),
        ("x\n<|file_sep|>b.py\ny", "", (("", "x\n"), ("b.py", "y"))),
        ("\n", "", ()),
    ],
)
def test_what_precedes_the_marks(preamble: str, filename: str, extra: tuple[tuple[str, str], ...]) -> None:
    expected = split("p", "s", filename, extra)
    assert split_fim(f"{preamble}<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>") == expected
    assert split_fim(f"{preamble}<fim_suffix>s<fim_prefix>p<fim_middle>") == expected


MENTION = 'FIM = ("{}", "{}", "{}")\nfor token in FIM:\n    '


@pytest.mark.parametrize(("before", "after", "middle"), FAMILIES)
def test_a_text_that_mentions_the_tokens_is_not_split(before: str, after: str, middle: str) -> None:
    assert split_fim(MENTION.format(before, after, middle)) is None
    for text in (
        "",
        "def f():\n    ",
        before,
        after,
        f"{before}a",
        f"{after}a",
        f"{before}a{middle}",
        f"{after}b{middle}",
    ):
        assert split_fim(text) is None
    if middle:
        assert split_fim(f"{before}a{after}b") is None
        assert split_fim(f"{before}a{after}b{middle} and more") is None
        assert split_fim(middle) is None


def test_a_text_in_one_familys_tokens_may_mention_anothers() -> None:
    text = MENTION.format(*FIM[0])
    assert split_fim(f"<fim_prefix>{text}<fim_suffix>b<fim_middle>") == split(text, "b")
    text = MENTION.format(*FIM[1])
    assert split_fim(f"<|fim_prefix|>{text}<|fim_suffix|>b<|fim_middle|>") == split(text, "b")


MARKS = re.compile("|".join(re.escape(mark) for marks in FIM for mark in marks if mark))
CODE = st.text(alphabet="ab<|>_ \n").filter(lambda text: not MARKS.search(text))


@given(CODE, CODE)
def test_any_text_without_marks_may_be_completed(prefix: str, suffix: str) -> None:
    for marks in FIM:
        assert split_fim(written(*marks, prefix, suffix)) == split(prefix, suffix)


# ----------------------------------------------------------------------------------------------------- replies

BEGUN = {"model": "m", "n_ctx": 4096, "kept": {"characters": 3, "of": 3, "parts": ["all"]}}
RESULT = {
    "finish_reason": "block", "total_tokens": 4, "prompt_tokens": 10, "cached_tokens": 6,
    "ttft": 0.25, "inference_time": 1.75, "load_time": 0.5,
}  # fmt: skip
SURROGATES = b'data: {"token": "\\ud83d\\ude00\\/", "total_tokens": 12}\n\n'


def reply_to(dialect: Dialect, begun: dict[str, Any] = BEGUN, **members: Any) -> Reply:
    base = BASES[next(name for name, one in DIALECTS.items() if one is dialect)]
    return dialect.reply(dialect.read(base | members), "42", 7, begun)


def test_openai_text_whole() -> None:
    assert reply_to(OPENAI_TEXT).whole('x"\n', RESULT) == (
        b'{"id":"cmpl-42","object":"text_completion","created":7,"model":"m",'
        b'"choices":[{"index":0,"text":"x\\"\\n","logprobs":null,"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":10,"completion_tokens":4,"total_tokens":14,'
        b'"prompt_tokens_details":{"cached_tokens":6}}}'
    )


def test_openai_text_streamed() -> None:
    reply = reply_to(OPENAI_TEXT, stream=True)
    head = b'data: {"id":"cmpl-42","object":"text_completion","created":7,"model":"m","choices":['
    assert reply.begin() == b""
    assert reply.text(SURROGATES * 2) == 2 * (
        head + b'{"index":0,"text":"\\ud83d\\ude00\\/","logprobs":null,"finish_reason":null}]}\n\n'
    )
    end = head + b'{"index":0,"text":"","logprobs":null,"finish_reason":"stop"}]}\n\n'
    assert reply.end(RESULT) == end + b"data: [DONE]\n\n"
    counting = reply_to(OPENAI_TEXT, stream=True, stream_options={"include_usage": True})
    assert counting.end(RESULT) == end + head + (
        b'],"usage":{"prompt_tokens":10,"completion_tokens":4,"total_tokens":14,'
        b'"prompt_tokens_details":{"cached_tokens":6}}}\n\ndata: [DONE]\n\n'
    )


def test_openai_chat_whole() -> None:
    assert reply_to(OPENAI_CHAT).whole("x", RESULT | {"finish_reason": "length"}) == (
        b'{"id":"chatcmpl-42","object":"chat.completion","created":7,"model":"m","choices":[{"index":0,'
        b'"message":{"role":"assistant","content":"x"},"logprobs":null,"finish_reason":"length"}],'
        b'"usage":{"prompt_tokens":10,"completion_tokens":4,"total_tokens":14,'
        b'"prompt_tokens_details":{"cached_tokens":6}}}'
    )


def test_openai_chat_streamed() -> None:
    reply = reply_to(OPENAI_CHAT, stream=True)
    head = b'data: {"id":"chatcmpl-42","object":"chat.completion.chunk","created":7,"model":"m","choices":[{"index":0,'
    tail = b',"logprobs":null,"finish_reason":null}]}\n\n'
    assert reply.begin() == head + b'"delta":{"role":"assistant","content":""}' + tail
    assert reply.text(SURROGATES) == head + b'"delta":{"content":"\\ud83d\\ude00\\/"}' + tail
    assert reply.end(RESULT) == head + b'"delta":{}' + tail.replace(b"null}", b'"stop"}') + b"data: [DONE]\n\n"


WHOLE_LLAMA = (
    b'{"content":"x\\ny","stop":true,"model":"m","tokens_predicted":4,"tokens_evaluated":10,'
    b'"generation_settings":{"n_ctx":4096},'
    b'"truncated":false,"stop_type":"eos","tokens_cached":14,"timings":{"cache_n":6,"prompt_n":4,'
    b'"prompt_ms":250.0,"prompt_per_token_ms":62.5,"prompt_per_second":16.0,"predicted_n":4,"predicted_ms":1000.0,'
    b'"predicted_per_token_ms":250.0,"predicted_per_second":4.0}}'
)


@pytest.mark.parametrize("dialect", [COMPLETION, INFILL], ids=["completion", "infill"])
def test_llama(dialect: Dialect) -> None:
    reply = reply_to(dialect, stop="q")
    assert reply.whole("x\ny", RESULT) == WHOLE_LLAMA
    assert reply.begin() == b""
    assert reply.text(SURROGATES) == b'data: {"content":"\\ud83d\\ude00\\/","stop":false}\n\n'
    last = WHOLE_LLAMA.replace(b'"x\\ny"', b'""')
    assert reply.end(RESULT) == b"data: " + last + b"\n\n"


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["content"], b'{"content":"x"}'),
        (["content", "timings/prompt_n", "tokens_cached"], b'{"content":"x","timings/prompt_n":4,"tokens_cached":14}'),
        (["timings/cache_n", "generation_settings/n_ctx"], b'{"timings/cache_n":6,"generation_settings/n_ctx":4096}'),
        (["none", "content/x", "timings/none", "timings/prompt_n/x", "/content", "content/"], b"{}"),
        ([""], b"{}"),
        ([], b"{}"),
        (["stop", "truncated"], b'{"stop":true,"truncated":false}'),
    ],
)  # fmt: skip
def test_response_fields(only: list[str], expected: bytes) -> None:
    reply = reply_to(INFILL, response_fields=only)
    assert reply.whole("x", RESULT) == expected
    assert reply.end(RESULT) == b"data: %b\n\n" % expected.replace(b'"content":"x"', b'"content":""')


@pytest.mark.parametrize("dialect", [COMPLETION, INFILL], ids=["completion", "infill"])
def test_a_replaced_request(dialect: Dialect) -> None:
    """llama.vim asks with `response_fields`: its answer then has no content that it could keep."""
    replaced = {"finish_reason": "replaced"}
    chosen = reply_to(dialect, response_fields=["content", "stop_type"]).whole("", replaced)
    assert chosen == b'{"replaced":true,"stop_type":"limit"}'
    whole = json.loads(reply_to(dialect).whole("", replaced))
    assert (whole["content"], whole["stop"], whole["stop_type"], whole["tokens_cached"]) == ("", True, "limit", 0)


@pytest.mark.parametrize(
    ("reason", "openai", "llama"),
    [
        ("length", "length", "limit"),
        ("replaced", "length", "limit"),
        ("stop", "stop", "eos"),
        ("block", "stop", "eos"),
        ("time", "stop", "eos"),
        (None, "stop", "eos"),
    ],
)
def test_why_a_text_ends(reason: str | None, openai: str, llama: str) -> None:
    result = {"finish_reason": reason} if reason else {}
    for dialect in (OPENAI_TEXT, OPENAI_CHAT):
        assert json.loads(reply_to(dialect).whole("", result))["choices"][0]["finish_reason"] == openai
        last = reply_to(dialect).end(result).split(b"\n\n")[0]
        assert json.loads(last[6:])["choices"][0]["finish_reason"] == openai
    assert json.loads(reply_to(INFILL).whole("", result))["stop_type"] == llama


@pytest.mark.parametrize(
    ("kept", "truncated"),
    [({}, False), ({"parts": ["all"]}, False), ({"parts": ["latest"]}, True), ({"parts": ["suffix"]}, True)],
)
def test_a_prompt_that_was_cut_is_truncated(kept: dict[str, Any], truncated: bool) -> None:
    begun = {"model": "m", "n_ctx": 4096, "kept": kept}
    assert json.loads(reply_to(INFILL, begun).whole("", RESULT))["truncated"] is truncated


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("more", "mark"), [({"type_through": True}, "type_through"), ({"finish_reason": "replaced"}, "replaced")]
)
def test_what_no_dialect_has_a_member_for(name: str, more: dict[str, Any], mark: str) -> None:
    reply = reply_to(DIALECTS[name])
    assert json.loads(reply.whole("x", RESULT | more))[mark] is True
    assert json.loads(reply.end(RESULT | more).split(b"\n\n")[0][6:])[mark] is True
    assert mark not in json.loads(reply.whole("x", RESULT))


def text_of(name: str, event: dict[str, Any]) -> str:
    if name in ("completion", "infill"):
        return str(event["content"])
    (choice,) = event["choices"]
    return str(choice["text"] if name == "text" else choice["delta"].get("content", ""))


def texts_of(name: str, events: bytes) -> list[str]:
    return [text_of(name, json.loads(event[6:])) for event in events.split(b"\n\n")[:-1]]


@given(st.lists(st.tuples(st.text(), st.integers(0, 10**9)), max_size=5))
def test_any_token_event_is_rendered(tokens: list[tuple[str, int]]) -> None:
    events = b"".join(sse_event({"token": text, "total_tokens": count}) for text, count in tokens)
    for name in ALL:
        assert texts_of(name, reply_to(DIALECTS[name]).text(events)) == [text for text, _ in tokens]


# What a VPS may write instead of our own JSON, as far as cm4d relays it untouched.
PIECE = st.one_of(
    st.sampled_from(['\\"', "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t", "\\u0000"]),
    st.integers(0, 0xFFFF).map("\\u{:04x}".format),
    st.characters(min_codepoint=0x20, max_codepoint=0x7E, exclude_characters='"\\'),
)


@given(st.lists(PIECE).map("".join))
def test_any_escapes_of_a_token_event_stay_as_they_are(escaped: str) -> None:
    event = f'data: {{"token": "{escaped}", "total_tokens": 1}}\n\n'.encode()
    for name in ALL:
        reply = reply_to(DIALECTS[name])
        assert texts_of(name, reply.text(event)) == [json.loads(f'"{escaped}"')]
        assert reply.text(event).count(f'"{escaped}"'.encode()) >= 1


# -------------------------------------------------------------------------------- timings, errors, models, props


@pytest.mark.parametrize(
    ("read", "written", "result", "expected"),
    [
        (0, 0, {}, [0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0]),
        (5, 0, {"ttft": None, "inference_time": None, "load_time": None}, [5, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0.0]),
        (0, 4, {"inference_time": 2.0}, [0, 0.0, 0.0, 0.0, 4, 2000.0, 500.0, 2.0]),
        (8, 0, {"ttft": 0.5, "inference_time": 0.5}, [8, 500.0, 62.5, 16.0, 0, 0.0, 0.0, 0.0]),
        (3, 7, {"ttft": 0.1, "inference_time": 1.1, "load_time": 0.3}, [3, 100.0, 33.333, 30.0, 7, 700.0, 100.0, 10.0]),
        (1, 1, {"ttft": 2.0, "inference_time": 1.0}, [1, 2000.0, 2000.0, 0.5, 1, 0.0, 0.0, 0.0]),
    ],
)
def test_timings(read: int, written: int, result: dict[str, Any], expected: list[float]) -> None:
    names = [f"{part}_{what}" for part in ("prompt", "predicted") for what in ("n", "ms", "per_token_ms", "per_second")]
    counts = {"prompt_tokens": read + 9, "total_tokens": written, "cached_tokens": 9}
    assert timings(counts | result) == {"cache_n": 9, **dict(zip(names, expected, strict=True))}


TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    409: "invalid_request_error", 429: "rate_limit_error", 500: "server_error", 503: "unavailable_error",
}  # fmt: skip


@pytest.mark.parametrize("code", STATUSES)
def test_errors(code: str) -> None:
    kind = TYPES.get(STATUSES[code], "invalid_request_error")
    error = HttpError(code, 'why "so"', extra={"prompt_tokens": 1})
    assert write_error(error) == {"error": {"message": 'why "so"', "type": kind, "param": None, "code": code}}
    assert STATUSES[code] not in (500, 503) or STATUSES[code] in ERROR_TYPES


def test_models_and_props() -> None:
    assert write_model("m", 7) == {"id": "m", "object": "model", "created": 7, "owned_by": "llamacpp"}
    assert write_props("m", 4096, 2) == {
        "default_generation_settings": {"n_ctx": 4096},
        "total_slots": 2,
        "model_alias": "m",
        "model_path": "m",
        "modalities": {"vision": False, "audio": False},
        "chat_template": "",
        "build_info": "cerebrum",
    }


SWEEP = (
    "<|file_sep|>a.py\nx = 1\n<|file_sep|>original/a.py\ny\n<|file_sep|>current/a.py\nyz\n<|file_sep|>updated/a.py\n"
)
ZETA = "<[fim-suffix]>\nrest\n<[fim-prefix]><filename>a.py\n<|marker_1|>x\n<|user_cursor|><|marker_2|><[fim-middle]>"


ZETA_WITHOUT_MARKERS = "<[fim-suffix]>\nrest\n<[fim-prefix]><filename>a.py\n<<<<<<< CURRENT\nx\n=======\n<[fim-middle]>"
FIRST_ZETA = (
    "### Instruction:\nEdit\n### User Excerpt:\n<|editable_region_start|>\nx\n<|editable_region_end|>\n### Response:\n"
)


@pytest.mark.parametrize("prompt", [SWEEP, ZETA, ZETA_WITHOUT_MARKERS, FIRST_ZETA])
@pytest.mark.parametrize("in_array", [False, True])
def test_a_prompt_for_the_next_edit_passes_as_it_is(prompt: str, in_array: bool) -> None:
    stops = ["<|file_sep|>", "<|endoftext|>", "\n\n\n"]
    given = [prompt] if in_array else prompt
    asked = read_completion({"prompt": given, "stop": stops, "max_tokens": 512})
    fields = {name: asked.fields[name] for name in ("prompt", "mode", "stop_at", "special", "stop")}
    assert fields == {"prompt": prompt, "mode": "complete", "stop_at": "none", "special": True, "stop": stops}
    assert "suffix" not in asked.fields


@pytest.mark.parametrize(
    "prompt",
    [
        "# the mark <|file_sep|> separates files\n",
        "MARK = '<|user_cursor|>'\nEVIL = '<|im_start|>system'\ndef f(",
        "import re\n<|file_sep|>original/a.py\n",
        "<[fim-suffix]>\nrest\n<[fim-prefix]>x = <[fim-middle]>",  # Seed-Coder's own gaps
    ],
)
def test_a_text_about_marks_is_no_prompt_for_the_next_edit(prompt: str) -> None:
    asked = read_completion({"prompt": prompt, "stop": "<|file_sep|>"})
    assert "special" not in asked.fields
    assert asked.fields["stop"] == []
