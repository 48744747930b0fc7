"""Other people's dialects: the APIs of OpenAI, Mistral, llama.cpp and Ollama, as editors and tools
speak them.

A `Dialect` reads a client's request into a `CompletionRequest`, with fields like those of our own
API, and writes the answer in the client's format (`Reply`), whole or as a stream.

    >>> body = {"input_prefix": "def add(a, b):\\n", "prompt": "    return ", "input_suffix": "\\n"}
    >>> request = INFILL.read(body)
    >>> request.fields.prompt
    'def add(a, b):\\n    return '
    >>> reply = INFILL.reply(request, "some-id", 0)
    >>> reply.begin({"model": "qwen_0_5b", "n_ctx": 4096})
    b''
    >>> reply.whole("a + b", {"finish_reason": "block", "total_tokens": 4})[:18]
    b'{"content":"a + b"'

Clients' requests are read leniently: unknown fields are ignored, a null field counts as absent, a
limit above ours is lowered, and of several completions the first is returned. HttpError 400 names a
field that cannot be served.

Pure: no socket, no clock, no state. Standard library only. The formats come from the clients'
sources (llama.vim, llama.vscode, Zed, Continue, kilocode, minuet, codecompanion, Tabby, the
packages openai and ollama), and from the documentation of OpenAI, Mistral, llama-server and Ollama.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from cerebrum.fields import (
    LONE,
    Field,
    JsonObject,
    Members,
    read_fields,
    read_object,
    read_objects,
    wrong,
)
from cerebrum.pi.completion import CUT, NEVER, SURENESS, CompletionRequest
from cerebrum.request import DEFAULT_TOKENS, MAX_TOKENS, RULES, GenerationRequest
from cerebrum_common import HttpError, Model, compact, json_line, sse_block

# ----------------------------------------------------------------------------------------- requests

# Beside the names of special tokens; OpenAI allows 4, Continue sends about 20 with these names.
MAX_STOPS = 16
MAX_EXTRAS = 256  # texts of other files; llama.vim sends 16
MAX_MESSAGES = 1000  # of a chat
MAX_MS = 600_000  # of a time limit; longer limits are lowered
ANY_SEED = 2**32 - 1  # llama.cpp's value for no seed
MIN_TOP_P = 0.01  # OpenAI allows 0; either value leaves only the likeliest token
# How readily an editor shows what was not asked for: the least chance that a line is right, as
# `min_confidence`.
SUGGEST = {"always": None, "often": 0.1, "normal": 0.2, "seldom": 0.5, "never": NEVER}
TEXT = Field(str, default="")
FLAG = Field(bool, default=False)
LIMIT = Field(int, -math.inf, default=0)  # milliseconds
# Of an answer in tokens. llama.vim sends n_predict to /v1/chat/completions, too.
LIMITS = ("max_completion_tokens", "max_tokens", "n_predict", "num_predict")
NAME = RULES["filename"]  # of a file or a language
CHAT_FIELDS = {
    "model": TEXT,
    "temperature": Field(float, 0, 100, 0.4),  # OpenAI allows 2; values above 1 are lowered
    "top_p": Field(float, 0, 1),
    **dict.fromkeys(("seed", "random_seed"), Field(int, -(2**63), 2**64 - 1)),
    "stream": FLAG,
    **dict.fromkeys(LIMITS, Field(int, -math.inf)),
}
CODE_FIELDS = {
    **CHAT_FIELDS,
    "temperature": Field(float, 0, 100, 0.0),
    "cache_prompt": FLAG,
    "n_indent": RULES["indent"],
    "t_max_prompt_ms": LIMIT,
    "t_max_predict_ms": LIMIT,
    "filename": NAME,
    "language": NAME,
    "min_confidence": RULES["min_confidence"],
    "suggest": Field(str, default="always", choices=tuple(SUGGEST)),
}
TEXT_FIELDS = {**CODE_FIELDS, "suffix": TEXT}
INFILL_FIELDS = {
    **CODE_FIELDS,
    "input_prefix": TEXT,
    "input_suffix": TEXT,
    "speculative": FLAG,
    # llama.vim's key for "complete now" sends the same as its automatic requests.
    "suggest": replace(CODE_FIELDS["suggest"], default="often"),
}
TOKENIZE = {"content": TEXT, "add_special": FLAG, "parse_special": Field(bool, default=True)}
PART = {
    "type": Field(str, default="text", choices=("text", "input_text", "output_text")),
    "text": TEXT,
}
EXTRA = {"filename": NAME, "text": TEXT}
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MESSAGE = {"role": Field(str, required=True, choices=tuple(ROLES))}
STREAM_OPTIONS = {"include_usage": FLAG}
# JSON objects with two texts: the messages of a chat, {"role", "content"}, or other files,
# {"filename", "text"}.
Texts = list[dict[str, str]]


def present(value: Any) -> Any:
    """A JSON value without null members, at every depth. 16.0 becomes 16, because some languages
    write integers like this. Half an emoji becomes U+FFFD, because an editor may cut one in two.
    """
    if isinstance(value, dict):
        return {name: present(member) for name, member in value.items() if member is not None}
    if isinstance(value, list):
        return [present(item) for item in value]
    if isinstance(value, str) and not value.isascii():
        return LONE.sub("\ufffd", value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def read_texts(members: Members, name: str) -> list[str]:
    """A member that is a string or an array of strings, as a list; empty without this member."""
    value = members.get(name, [])
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise wrong(name, "a string, or an array of strings", value)
    return value


def read_sampling(read: Members, stops: list[str], limit: int = DEFAULT_TOKENS) -> JsonObject:
    """The fields of our API that every request has. `limit` (tokens) is the default."""
    given = [read[name] for name in LIMITS if read[name] is not None]
    if given:
        limit = given[0]
    if limit < 0:
        limit = MAX_TOKENS
    top_p = read["top_p"]
    if top_p is not None:
        top_p = max(top_p, MIN_TOP_P)
    seed = read["seed"]
    if seed is None:
        seed = read["random_seed"]
    if seed in (None, ANY_SEED) or seed < 0:
        seed = None
    else:
        seed %= ANY_SEED
    return {
        "model": read["model"],
        "max_tokens": min(limit, MAX_TOKENS),
        "temperature": min(read["temperature"], 1.0),
        "top_p": top_p,
        "seed": seed,
        "stop": stops,
    }


def read_stops(members: Members, special: bool = False) -> list[str]:
    """`stop` as a list, without the names of special tokens, which our text contains only if it is
    about them.
    """
    stops = [stop for stop in read_texts(members, "stop") if stop]
    if not special:
        stops = [stop for stop in stops if not SPECIAL.fullmatch(stop)]
    if len(stops) > MAX_STOPS:
        raise wrong("stop", f"at most {MAX_STOPS} strings", stops)
    return stops


def read_prompt(members: Members) -> str:
    texts = read_texts(members, "prompt") or [""]
    if len(texts) > 1:
        raise wrong("prompt", "one string", texts)
    return texts[0]


def read_messages(value: Any) -> Texts:
    """`messages` with the roles that a chat template knows, and only text as content. Parts of a
    content are joined by line ends.
    """
    read_objects(value, "messages", 1, MAX_MESSAGES, MESSAGE)
    messages = []
    for number, entry in enumerate(value):
        where = f"messages[{number}]"
        for name in ("tool_calls", "images"):
            if entry.get(name, []) != []:
                raise wrong(f"{where}.{name}", "nothing", entry[name])
        content = read_content(entry.get("content", ""), f"{where}.content")
        messages.append({"role": ROLES[entry["role"]], "content": content})
    return messages


def read_content(content: Any, where: str) -> str:
    if isinstance(content, list):
        parts = read_objects(content, where, 0, MAX_MESSAGES, PART)
        return "\n".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise wrong(where, "a string, or an array of text parts", content)
    return content


def wants_usage(members: Members) -> bool:
    options = members.get("stream_options", {})
    return bool(read_object(options, "stream_options", STREAM_OPTIONS)["include_usage"])


# ------------------------------------------------------------------------ fill-in-the-middle tokens

# The marks before the prefix, before the suffix and at the prompt's end, by family. Codestral has
# no mark at the end.
FIM = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, Granite, Refact
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    (
        "<\uff5cfim\u2581begin\uff5c>",
        "<\uff5cfim\u2581hole\uff5c>",
        "<\uff5cfim\u2581end\uff5c>",
    ),  # DeepSeek
    ("<PRE>", "<SUF>", "<MID>"),  # CodeLlama
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>"),  # Seed-Coder
    ("[PREFIX]", "[SUFFIX]", ""),  # Codestral
)
# Before a name, and a text on the next line.
FILE_MARK = re.compile(r"<\|?file_sep(?:arator)?\|?>|<filename>")
UNUSED = re.compile(  # at the prompt's beginning: a begin-of-text token, and a repository's name
    r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>|<\uff5cbegin\u2581of\u2581sentence\uff5c>)?"
    r"\s*(?:(?:<\|repo_name\|>|<repo_name>|<reponame>)[^\n<]*)?\n?"
)
SPECIAL = re.compile(
    r"</?s>|<\|[A-Za-z_]{2,30}\|>|<\uff5c[^<>\n]{2,40}\uff5c>"
    r"|<fim[_-][a-z]{3,10}>|<(?:file_sep|repo_name)>"
    r"|<\[fim-[a-z]+\]>|<(?:EOT|PRE|SUF|MID|bos|eos|end_of_turn|filename|reponame)>"
    r"|\[/?(?:INST|PREFIX|SUFFIX|MIDDLE)\]"
)

# Layouts of models that predict the next edit: Sweep's, and the two of Zed's Zeta. Their marks are
# the model's, and the client cuts the answer itself. A text that only mentions such a mark has none
# of these layouts.
NEXT_EDIT = re.compile(
    r"(?ms)"
    r"\A\s*+(?:<\|repo_name\|>[^\n]*\n)?<\|file_sep\|>.*^<\|file_sep\|>(?:original|current|updated)/"
    r"|\A\s*+<\[fim-suffix\]>(?>.*?<\[fim-prefix\]>)"
    r"(?>.*?(?:<filename>|^<<<<<<< CURRENT|<\|\w+\|>))(?>.*<\[fim-middle\]>)[^\n]*\Z"
    r"|\A### Instruction:(?>.*?^<\|editable_region_start\|>)(?>.*^### Response:)\s*\Z"
)


def split_fim(prompt: str) -> tuple[str, str, str, Texts] | None:
    """(prefix, suffix, file name, [{"filename", "text"}] of other files) of a prompt that a client
    has written with a family's tokens; None for any other prompt.

    Prefix and suffix may come in either order. A text that only mentions the tokens, such as this
    file, is not split: the last token must end the prompt, or precede the prefix in a prompt whose
    usual place for the prefix is blank.

    >>> split_fim("<PRE> def f():\\n    return  <SUF>\\n\\nf() <MID>")
    ('def f():\\n    return ', '\\n\\nf()', '', [])
    """
    for before, after, middle in FIM:
        if parts := split_by(prompt, before, after, middle):
            preamble, prefix, suffix = parts
            return prefix, suffix, *split_files(preamble)
    return None


def split_by(prompt: str, before: str, after: str, middle: str) -> tuple[str, str, str] | None:
    """(preamble, prefix, suffix) of a prompt with the marks of one family, else None."""
    start = min(prompt.find(before), prompt.find(after))
    if start < 0:
        return None
    preamble = prompt[:start]
    body = prompt[start:]
    behind = ""
    if middle:
        body, _, behind = body.rpartition(middle)
    elif not UNUSED.fullmatch(preamble):
        return None
    if body.startswith(before):
        prefix, found, suffix = body.removeprefix(before).partition(after)
    else:
        suffix, found, prefix = body.removeprefix(after).partition(before)
    if not found or (behind.strip() and prefix.strip()):
        return None
    # CodeLlama's family writes a space after the first and the last mark, and before the others.
    if before == "<PRE>":
        prefix = prefix.removeprefix(" ").removesuffix(" ")
        suffix = suffix.removesuffix(" ")
        behind = behind.removeprefix(" ")
    # Behind a prefix is only a template's last line end.
    if not prefix.strip():
        prefix = behind or prefix
    return preamble, prefix, suffix


def split_files(preamble: str) -> tuple[str, Texts]:
    """Parse the text before the first mark: the name of the file itself, and other files."""
    loose, *files = FILE_MARK.split(UNUSED.sub("", preamble, count=1))
    filename = ""
    extra = []
    for file in ("\n" + loose, *files[-MAX_EXTRAS:]):  # what precedes the first mark has no name
        name, _, text = file.partition("\n")
        name = name[: int(NAME.high)]
        if text.strip():
            extra.append({"filename": name, "text": text})
        else:
            filename = name
    return filename, extra


# --------------------------------------------------------------------------------- reading requests


def read_code(
    members: Members, read: Members, prefix: str, suffix: str, kind: str, **more: Any
) -> CompletionRequest:
    """A request of this kind for code, with `more` fields. At the end of a file there is no gap:
    the text before the cursor is completed.
    """
    fields = read_sampling(read, read_stops(members, "special" in more))
    least = read["min_confidence"]
    if least is None:
        least = SUGGEST[read["suggest"]]
    fields["min_confidence"] = least
    for name in ("prompt_ms", "predict_ms"):
        fields[name] = min(max(0, read[f"t_max_{name}"]), MAX_MS)
    fields |= {"filename": read["filename"], "language": read["language"], "prompt": prefix}
    if suffix.strip() or not prefix:
        fields |= {"suffix": suffix, "mode": "infill"}
    asked = GenerationRequest(**fields | more, indent=read["n_indent"])
    only = None
    if "response_fields" in members:
        only = tuple(read_texts(members, "response_fields"))
    return CompletionRequest(
        kind, asked, read["stream"], wants_usage(members), read["cache_prompt"], only
    )


def read_completion(members: Members) -> CompletionRequest:
    """POST /v1/completions, /v1/fim/completions and /completion: a text to complete. `prompt` may
    carry fill-in-the-middle tokens, or have a layout of its own.
    """
    members = present(members)
    read = read_fields(members, TEXT_FIELDS)
    prompt = read_prompt(members)
    suffix = read["suffix"]
    if not suffix and NEXT_EDIT.match(prompt):
        return read_code(members, read, prompt, "", "completion", stop_at="none", special=True)
    split = None if suffix else split_fim(prompt)
    if not split:
        kind = "infill" if "suffix" in members else "completion"  # empty at the end of a file
        return read_code(members, read, prompt, suffix, kind)
    prefix, suffix, filename, extra = split
    filename = filename or read["filename"]
    return read_code(members, read, prefix, suffix, "infill", filename=filename, extra=extra)


def read_infill(members: Members) -> CompletionRequest:
    """POST /infill: llama-server's completion between two texts. `prompt` continues
    `input_prefix`.
    """
    members = present(members)
    read = read_fields(members, INFILL_FIELDS)
    prefix = read["input_prefix"] + read_prompt(members)
    files = read_objects(members.get("input_extra", []), "input_extra", 0, MAX_EXTRAS, EXTRA)
    extra = [file for file in files if file["text"]]
    request = read_code(members, read, prefix, read["input_suffix"], "infill", extra=extra)
    return replace(request, speculative=read["speculative"])


def read_chat(members: Members) -> CompletionRequest:
    """POST /v1/chat/completions: OpenAI's chat."""
    members = present(members)
    read = read_fields(members, CHAT_FIELDS)
    may_call = members.get("tool_choice") != "none"
    if may_call and members.get("tools", []) != []:
        raise wrong("tools", 'nothing, or tool_choice "none"', members["tools"])
    # The limit is the highest: an answer ends by itself.
    sampling = read_sampling(read, read_stops(members), limit=MAX_TOKENS)
    messages = read_messages(members.get("messages", []))
    fields = GenerationRequest(**sampling, messages=messages, mode="chat")
    return CompletionRequest("chat", fields, read["stream"], wants_usage(members))


def read_ollama(members: Members) -> CompletionRequest:
    """POST /api/generate and /api/chat: Ollama's completion of a text, and its chat. Its `options`
    are read like the other members. Without a suffix, FIM tokens or `raw`, a prompt is a chat's
    message; without any text, the model is loaded.
    """
    members = {"stream": True, **present(members)}
    options = members.pop("options", {})
    if not isinstance(options, dict):
        raise wrong("options", "an object", options)
    members = options | members
    if members.get("images"):
        raise wrong("images", "nothing", members["images"])
    if not members.get("messages"):
        prompt = read_prompt(members)
        suffix = members.get("suffix")
        if not prompt and not suffix:
            return read_completion(members | {"prompt": "\n", LIMITS[0]: 0})
        if suffix or members.get("raw") is True or split_fim(prompt):
            return read_completion(members)
        texts = {"system": members.get("system", ""), "user": prompt}
        messages = [{"role": role, "content": text} for role, text in texts.items() if text]
        members["messages"] = messages
    return read_chat(members)


# ------------------------------------------------------------------------------------------ replies

# A native token event, as cm4d relays it. Its JSON string goes into other events unchanged.
TOKEN_TEXT = re.compile(rb'data: \{"token": ("(?:[^"\\]|\\.)*+"), "total_tokens": [0-9]+\}\n\n')
SLOT = "\x00"  # placeholder for this string; no id or name has this character


def sse(data: Members) -> bytes:
    return sse_block(compact(data))


def finish_reason(result: Members) -> str:
    """OpenAI's finish reason: "length" if a limit cut the text, else "stop"."""
    if result.get("finish_reason") in ("length", *CUT):
        return "length"
    return "stop"


def usage(result: Members) -> JsonObject:
    read = result.get("prompt_tokens", 0)
    written = result.get("total_tokens", 0)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": result.get("cached_tokens", 0)},
    }


@dataclass
class Reply:
    """The answer to one request in its dialect; here OpenAI's completion of a text: {"id",
    "object", "choices", …}.
    """

    request: CompletionRequest
    request_id: str
    created: int
    beginning: Members = field(default_factory=dict)

    prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = whole_object
    block = staticmethod(sse)  # of a stream
    has_comments = True  # which show that the connection is alive, or a place in the line

    def begin(self, beginning: Members) -> bytes:
        """The events for a pair "started", whose value is {"model", "n_ctx", …}. It comes again if
        another backend or model takes over.
        """
        is_first = not self.beginning
        self.beginning = beginning
        block = self.block(self.chunk(SLOT))
        self.template = block.replace(compact(SLOT), rb"\1")  # for `TOKEN_TEXT.sub`
        return self.opening() if is_first else b""

    def opening(self) -> bytes:
        """The events before the first text."""
        return b""

    def text(self, tokens: bytes) -> bytes:
        """The events for a block of whole native token events."""
        return TOKEN_TEXT.sub(self.template, tokens)

    def frame(self, part: JsonObject, reason: str | None = None) -> JsonObject:
        """An event whose one choice has this member; without a member it has no choice."""
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason}
        return {
            "id": f"{self.prefix}-{self.request_id}",
            "object": self.chunk_object,
            "created": self.created,
            "model": self.beginning["model"],
            "choices": [choice] if part else [],
        }

    def part(self, text: str, whole: bool = False) -> JsonObject:
        """A choice's member: the whole text, a piece of it, or "" after the last piece."""
        return {"text": text}

    def chunk(self, text: str) -> JsonObject:
        """The event for a piece of text."""
        return self.frame(self.part(text))

    def end(self, result: Members) -> bytes:
        """The events after the last text, for a native result."""
        last = self.frame(self.part(""), finish_reason(result))
        events = sse(last | own_members(result))
        if self.request.usage:
            events += sse(self.frame({}) | {"usage": usage(result)})
        return events + sse_block(b"[DONE]")

    def whole(self, text: str, result: Members) -> bytes:
        """The answer in one piece."""
        answer = self.frame(self.part(text, whole=True), finish_reason(result))
        answer |= {"object": self.whole_object, "usage": usage(result)}
        return compact(answer | own_members(result))


class ChatReply(Reply):
    """OpenAI's chat.completion, and chat.completion.chunk."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    always = False  # a `delta` has a content, also after the last text

    def opening(self) -> bytes:
        return sse(self.frame({"delta": {"role": "assistant", "content": ""}}))

    def part(self, text: str, whole: bool = False) -> JsonObject:
        if whole:
            return {"message": {"role": "assistant", "content": text}}
        if text or self.always:
            return {"delta": {"content": text}}
        return {"delta": {}}


class FimReply(ChatReply):
    """Mistral's answer: a chat's. Without a content, Continue would add "undefined" to the code."""

    always = True


class LlamaReply(Reply):
    """llama-server's own form: {"content", "stop", …}."""

    def chunk(self, text: str) -> JsonObject:
        return {"content": text, "stop": False}

    def end(self, result: Members) -> bytes:
        return sse_block(self.whole("", result))

    def whole(self, text: str, result: Members) -> bytes:
        """The answer's members, or those that `response_fields` names: "timings/prompt_n" names one
        in `timings`.
        """
        counts = usage(result)
        answer = {
            "content": text,
            "stop": True,
            "model": self.beginning["model"],
            "tokens_predicted": counts["completion_tokens"],
            "tokens_evaluated": counts["prompt_tokens"],
            "generation_settings": {"n_ctx": self.beginning["n_ctx"]},
        }
        kept = self.beginning.get("kept") or {}
        is_limited = finish_reason(result) == "length"
        answer |= {
            "truncated": kept.get("parts", ["all"]) != ["all"],
            "stop_type": "limit" if is_limited else "eos",
            "tokens_cached": counts["total_tokens"],
            "timings": timings(result),
        }
        answer |= own_members(result)
        if self.request.only is None:
            return compact(answer)
        # llama.vim would keep empty content, and show nothing at this place again.
        if "replaced" in answer or ("preempted" in answer and not text):
            del answer["content"]
        for outer in ("generation_settings", "timings"):
            for name, value in answer[outer].items():
                answer[f"{outer}/{name}"] = value
        names = (*CUT, *self.request.only)
        return compact({name: answer[name] for name in names if name in answer})


class OllamaReply(Reply):
    """Ollama's completion of a text, in lines of JSON: {"model", "created_at", "response", …}."""

    block = staticmethod(json_line)
    has_comments = False

    def part(self, text: str, whole: bool = False) -> JsonObject:
        return {"response": text}

    def frame(self, part: JsonObject, reason: str | None = None) -> JsonObject:
        return {
            "model": self.beginning["model"],
            "created_at": time_of(self.created),
            **part,
            "done": reason is not None,
        }

    def end(self, result: Members) -> bytes:
        return self.whole("", result) + b"\n"

    def whole(self, text: str, result: Members) -> bytes:
        """The answer's members. Durations are in nanoseconds."""
        reason = finish_reason(result)
        counts = usage(result)
        spent = timings(result)
        seconds = {
            "total": result.get("inference_time") or 0.0,
            "load": result.get("load_time") or 0.0,
            "prompt_eval": spent["prompt_ms"] / 1000,
            "eval": spent["predicted_ms"] / 1000,
        }
        answer = self.frame(self.part(text), reason)
        answer |= {
            "done_reason": reason,
            "prompt_eval_count": counts["prompt_tokens"],
            "eval_count": counts["completion_tokens"],
        }
        for name, value in seconds.items():
            answer[f"{name}_duration"] = round(1e9 * value)
        return compact(answer | own_members(result))


class OllamaChatReply(OllamaReply):
    """Ollama's chat: the same with a `message`."""

    def part(self, text: str, whole: bool = False) -> JsonObject:
        return {"message": {"role": "assistant", "content": text}}


def own_members(result: Members) -> JsonObject:
    """Members that other servers do not have: `type_through` if an earlier completion answered,
    `replaced` if a newer request took over, `preempted` if a guest made room, `unsure` if the text
    ends where the model was too unsure; and how sure the model is.
    """
    members = {name: result[name] for name in ("type_through", *SURENESS) if name in result}
    reason = result.get("finish_reason")
    if reason in (*CUT, "unsure"):
        members[reason] = True
    return members


def timings(result: Members) -> JsonObject:
    """llama-server's `timings`, in milliseconds."""
    seconds = result.get("ttft") or 0.0
    loading = result.get("load_time") or 0.0
    total = result.get("inference_time") or 0.0
    cached = result.get("cached_tokens", 0)
    read = result.get("prompt_tokens", 0) - cached
    written = result.get("total_tokens", 0)
    writing = max(0.0, total - loading - seconds)
    known = {"cache_n": cached} | timing("prompt", read, seconds)
    return known | timing("predicted", written, writing)


def timing(name: str, count: int, seconds: float) -> JsonObject:
    milliseconds = 1000 * seconds
    per_token = milliseconds / count if count else 0.0
    per_second = count / seconds if seconds else 0.0
    return {
        f"{name}_n": count,
        f"{name}_ms": round(milliseconds, 3),
        f"{name}_per_token_ms": round(per_token, 3),
        f"{name}_per_second": round(per_second, 3),
    }


# ---------------------------------------------------------------------------- errors, models, props


ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
}


def write_error(error: HttpError) -> JsonObject:
    """`{"error": {"message", "type", "param", "code"}}`, in a response or in a stream."""
    kind = ERROR_TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": error.message, "type": kind, "param": None, "code": error.code}}


def write_ollama_error(error: HttpError) -> JsonObject:
    return {"error": error.message}


OLLAMA_VERSION = "0.12.0"  # whose API this is; clients refuse old ones
FAMILY = "cerebrum"  # clients use a family's name alone to find the context's length


def time_of(seconds: float) -> str:
    """A Unix time in Ollama's form."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def write_ollama_model(model: Model, n_ctx: int, created: int) -> JsonObject:
    """A model in Ollama's list, and by itself. One with fill-in-the-middle tokens can `insert`."""
    details = {
        "format": "gguf",
        "family": FAMILY,
        "parameter_size": model.parameters,
        "quantization_level": model.quantization,
    }
    about = {"general.architecture": FAMILY, f"{FAMILY}.context_length": n_ctx}
    capabilities = ["completion"]
    if model.fim:
        capabilities.append("insert")
    return {
        "name": model.id,
        "model": model.id,
        "modified_at": time_of(created),
        "size": model.size,
        "digest": model.sha256,
        "details": details,
        "model_info": about,
        "capabilities": capabilities,
    }


def write_model(model_id: str, created: int) -> JsonObject:
    """An entry of OpenAI's list of models. llama.vscode concludes from `owned_by` that /props
    exists.
    """
    return {"id": model_id, "object": "model", "created": created, "owned_by": "llamacpp"}


def write_props(model_id: str, n_ctx: int, places: int) -> JsonObject:
    """llama-server's /props, as far as editors read it. Our chat template is the model's own and is
    not reported.
    """
    return {
        "default_generation_settings": {"n_ctx": n_ctx},
        "total_slots": places,
        "model_alias": model_id,
        "model_path": model_id,
        "modalities": {"vision": False, "audio": False},
        "chat_template": "",
        "build_info": "cerebrum",
    }


# ------------------------------------------------------------------------------------- the dialects


class Dialect(NamedTuple):
    """One kind of request that clients send."""

    paths: tuple[str, ...]
    read: Callable[[Members], CompletionRequest]
    reply: type[Reply]


# Some clients put /v1 before their paths only if the user's URL ends with /v1.
OPENAI_TEXT = Dialect(("/v1/completions", "/completions"), read_completion, Reply)
OPENAI_CHAT = Dialect(("/v1/chat/completions", "/chat/completions"), read_chat, ChatReply)
COMPLETION = Dialect(("/completion",), read_completion, LlamaReply)
INFILL = Dialect(("/infill",), read_infill, LlamaReply)
FIM_COMPLETION = Dialect(("/v1/fim/completions", "/fim/completions"), read_completion, FimReply)
DIALECTS = (OPENAI_TEXT, OPENAI_CHAT, FIM_COMPLETION, COMPLETION, INFILL)
OLLAMA = (
    Dialect(("/api/generate",), read_ollama, OllamaReply),
    Dialect(("/api/chat",), read_ollama, OllamaChatReply),
)
