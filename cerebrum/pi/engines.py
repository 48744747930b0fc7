"""Other engines than vpsd: llama-server, and whatever speaks OpenAI's API.

Their requests are written from the fields of vpsd's request, and what they stream becomes the pairs
of a native stream. A `Translator` parses the events; it also ends the text where the requested
piece is complete, which these engines do not do.

    >>> fields = {"prompt": "def f(n):\\n", "language": "python", "mode": "complete"}
    >>> fields |= {"stop": [], "stop_at": "auto", "indent": 0, "predict_ms": 0, "progress": False}
    >>> translator = Translator(fields, [])
    >>> event = b'data: {"choices": [{"text": "    return n\\\\n\\\\nf(1)"}]}\\n\\n'
    >>> list(translator.feed(event, 0.0))
    [('text', b'data: {"token": "    return n\\\\n", "total_tokens": 1}\\n\\n'),
     ('done', {'finish_reason': 'block', 'total_tokens': 1})]

From an engine, only members of the right type count; the rest is absent. The formats come from the
documentation of OpenAI, llama-server, vLLM, SGLang and TGI, and from the answers of llama-server
and of llama-cpp-python's server.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

from cerebrum.fields import LONE, Field, JsonObject, Members, items_of, members_of, valid_members
from cerebrum.pi.completion import Fitted, Pair, Pairs, text_event
from cerebrum.pi.kind import COUNT, RESULT_FIELDS, TOO_MANY, Kind, Models
from cerebrum.pi.upstream import (
    EVENT_STREAM,
    LATE,
    LENGTH,
    N_CTX,
    Answer,
    BackendFailure,
    Events,
    TooLong,
    Unusable,
    blamed,
    data_of,
)
from cerebrum.request import MAX_TOKENS
from cerebrum.text.languages import language_named
from cerebrum.text.prompt import arrange_gap, find_statement
from cerebrum.text.stages import Written, confidence_of
from cerebrum_common import HttpError

# ------------------------------------------------------------------------------ what they are asked

MOST_STOPS = 4  # OpenAI refuses a fifth; the Pi looks for all of them itself
# Counts even if we hang up, and signs of life.
LLAMA_MORE = {"timings_per_token": True, "return_progress": True}
# Without this list, the last event would include the whole prompt, and might be longer than we
# accept.
LLAMA_LAST = ["content", "stop", "stop_type", "tokens_evaluated", "tokens_predicted", "timings"]


def write_sampling(wanted: Fitted, limit: str) -> JsonObject:
    """The members that every request has. `limit` is the engine's name for the maximum number of
    tokens.
    """
    fields = wanted.fields
    most = min(fields["max_tokens"], max(1, wanted.answer_tokens))
    members = {"model": wanted.name, "stream": True, limit: most}
    for name in ("temperature", "top_p", "seed"):
        if name in fields:
            members[name] = fields[name]
    if members.get("top_p", 0) >= 1:
        del members["top_p"]  # 1 leaves all tokens; TGI refuses 1
    # Some engines refuse an empty list; in others it replaces the model's own stops.
    if stops := fields["stop"]:
        members["stop"] = stops[:MOST_STOPS]
    return members


def write_openai(wanted: Fitted) -> JsonObject:
    """The members of both of OpenAI's requests."""
    return write_sampling(wanted, "max_tokens") | {"stream_options": {"include_usage": True}}


def write_files(fields: Members) -> str:
    """Other files' texts, which precede the file itself."""
    written = ""
    for entry in fields.get("extra", ()):
        written += entry["text"].rstrip("\n") + "\n"
    return written


def write_chat(wanted: Fitted) -> JsonObject:
    """POST /v1/chat/completions. The beginning that we write for the answer to an instruction is
    left out: many engines would not continue it.
    """
    messages = wanted.fields["messages"]
    if wanted.fields["mode"] == "instruct" and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    return write_openai(wanted) | {"messages": messages}


# --------------------------------------------------------------------------------- what they answer


def parse_leniently(data: bytes) -> JsonObject:
    """Parse an engine's JSON object; HttpError if `data` is anything else. Bytes that are not UTF-8
    become U+FFFD, since an engine may cut its text inside a character.
    """
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data.decode("utf-8", "replace"))
        if isinstance(value, dict):
            return value
    raise HttpError("INVALID_REQUEST", "expected a JSON object")


def text_of(value: Any) -> str:
    """A string with U+FFFD for half a character; "" for any other value."""
    if isinstance(value, str):
        return LONE.sub("\ufffd", value)
    return ""


CUT_SHORT = ("length", "limit", "content_filter")


def read_engine_event(members: Members) -> tuple[str, str | None]:
    """(text, reason) of an event of OpenAI's two calls or of llama-server's own. The reason is None
    before the end of the text, then "stop" or "length". BackendFailure if the text is incomplete.
    A model's thoughts are not part of the text.
    """
    choices = items_of(members.get("choices"))
    choice = members_of(choices[0]) if choices else members
    delta = members_of(choice.get("delta", choice.get("message", choice)))
    text = text_of(choice.get("text")) or text_of(delta.get("content"))
    reason = text_of(choice.get("finish_reason"))
    if choice.get("stop") is True:  # the last event of llama-server
        reason = text_of(choice.get("stop_type")) or "stop"
    if reason in ("error", "abort"):
        raise BackendFailure("it gave up")
    if not reason:
        return text, None
    if reason in CUT_SHORT:
        return text, "length"
    return text, "stop"


LOGARITHM = Field(float, -(10**9), 0)  # of a probability


def read_probability(members: Members) -> float | None:
    """The probability of the tokens in an event of llama-server's; None if it is unknown. A token
    from a draft has a probability of 1 there, but lacks the candidates that we ask for.
    """
    tokens = map(members_of, items_of(members.get("completion_probabilities")))
    logarithms: list[Any] = [token.get("top_logprobs") and token.get("logprob") for token in tokens]
    if not logarithms or not all(map(LOGARITHM.accepts, logarithms)):
        return None
    return math.exp(sum(logarithms))


MILLISECONDS = Field(float, 0, 10**12)


def read_counts(members: Members) -> JsonObject:
    """The counts in an event, not yet checked, under the names of our own done event: from OpenAI's
    `usage`, llama-server's `timings`, and the numbers beside them.
    """
    used = members_of(members.get("usage"))
    timed = members_of(members.get("timings"))
    cached = timed.get("cache_n")
    fresh = timed.get("prompt_n")
    read = None
    if type(cached) is type(fresh) is int:
        read = cached + fresh
    read = used.get("prompt_tokens", read)
    written = used.get("completion_tokens", timed.get("predicted_n"))
    details = members_of(used.get("prompt_tokens_details"))
    counts = {
        "prompt_tokens": members.get("tokens_evaluated", read),
        "total_tokens": members.get("tokens_predicted", written),
        "cached_tokens": details.get("cached_tokens", cached),
    }
    counts |= {
        "tokens_per_second": timed.get("predicted_per_second"),
        "draft_tokens": timed.get("draft_n"),
        "accepted_tokens": timed.get("draft_n_accepted"),
    }
    if MILLISECONDS.accepts(timed.get("prompt_ms")):
        counts["ttft"] = timed["prompt_ms"] / 1000
    return {name: value for name, value in counts.items() if value is not None}


def read_listed(members: Members) -> Models:
    """The names in OpenAI's list of models, each with its `n_ctx` if the engine reports one. Such
    an engine has its model in memory as long as it runs, and does not say so.

    >>> read_listed({"data": [{"id": "org/Qwen2.5-Coder-7B", "max_model_len": 8192}, {"id": "m"}]})
    {'org/Qwen2.5-Coder-7B': {'loaded': True, 'n_ctx': 8192}, 'm': {'loaded': True}}
    """
    listed = Models()
    for entry in map(members_of, items_of(members.get("data"))):
        if isinstance(entry.get("id"), str):
            n_ctx = entry.get("max_model_len")  # of vLLM and SGLang; Ray has it in `metadata`
            n_ctx = n_ctx or members_of(entry.get("metadata")).get("max_request_context_length")
            listed[entry["id"]] = {"loaded": True} | read_n_ctx(n_ctx)
    return listed


def read_props(members: Members) -> JsonObject:
    """The `n_ctx` of one slot, from llama-server's /props."""
    return read_n_ctx(members_of(members.get("default_generation_settings")).get("n_ctx"))


def read_n_ctx(value: Any) -> JsonObject:
    """{"n_ctx": …} with the length of a context, {} if the value is none."""
    if N_CTX.accepts(value):
        return {"n_ctx": value}
    return {}


# OpenAI's and vLLM's sentences. Their count of the prompt is ignored: later vLLMs stop counting at
# the first token that does not fit.
OVERFLOW = re.compile(
    r"(?:context length is (?:only )?(?=\d+ tokens)|greater than max_model_len=)(\d{1,8})\b"
)


def read_overflow(error: Any) -> dict[str, int] | None:
    """Parse an engine's `error`. If the error says that the prompt is too long: the given ones of
    {"n_ctx", "prompt_tokens"}, else None. llama-server sends members; OpenAI and vLLM send a
    sentence, which may be misread.
    """
    members = members_of(error)
    sentence = OVERFLOW.search(text_of(members.get("message", error)))
    stated = int(sentence[1]) if sentence else 0
    lengths = read_n_ctx(members.get("n_ctx", stated))
    codes = (members.get("code"), members.get("type"))
    if not lengths and "context_length_exceeded" not in codes:  # OpenAI's code
        return None
    counted = members.get("n_prompt_tokens")
    if LENGTH.accepts(counted):
        lengths["prompt_tokens"] = counted
    return lengths


# ---------------------------------------------------------------------------------- what they write

# Special tokens that an engine may leak. Each of them ends a text, unless the prompt itself
# contains it.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_end|>",
    "<|im_start|>",
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|repo_name|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
)
MAX_STOP_CHARS = 2000  # no answer has a longer stop string, which would take long to follow
# What of a prompt's end and of a suffix is followed: the Pi has one thread for all. Of some 2,000
# cases in Python of tests/bench/ending.py, 3 end elsewhere than with 16,000.
NEAR_CHARS = 8000


def end_of(prompt: str, language: str) -> str:
    """The last NEAR_CHARS of a prompt, from a statement on where the language's syntax is known."""
    start = len(prompt) - NEAR_CHARS
    if start > 0 and language_named(language):
        start = find_statement(prompt, start, start + NEAR_CHARS // 2)
    return prompt[max(0, start) :]


class Translator:
    """Turns another engine's stream into the pairs of a native stream. ("done", …) comes last: at
    the engine's own end, or earlier, where the requested piece is complete. `fields` are those of
    vpsd's request; `marks` are the special tokens of the model.
    """

    def __init__(self, fields: Members, marks: Sequence[str], least: float | None = None) -> None:
        # 3 MB that a Pi without other engines need not load
        from cerebrum.text.ending import Ending

        prompt = fields.get("prompt", "")
        suffix = fields.get("suffix", "")
        turns = [turn["content"] for turn in fields.get("messages", ())]
        asked = "\n".join([prompt, suffix, *turns])
        stops = [stop for stop in fields["stop"] if len(stop) <= MAX_STOP_CHARS]
        stops += [token for token in {*SPECIAL_TOKENS, *marks} if token not in asked]
        language = fields.get("language", "")
        self.ending = Ending(
            fields["mode"],
            language,
            end_of(prompt, language),
            suffix[:NEAR_CHARS],
            fields["stop_at"],
            fields["indent"],
            stops,
            least,
        )
        self.written = list[Written]()
        self.is_told = True  # the probability of all text
        self.sent = list[str]()
        self.events = Events()
        self.most = fields.get("max_tokens") or MAX_TOKENS
        self.seconds = fields["predict_ms"] / 1000 or math.inf  # for the text
        self.progress = fields["progress"]
        self.counts = JsonObject()  # of the last event that has any
        self.tokens = 0  # events with text; an engine may put several tokens into one
        self.deadline = math.inf  # after it, the text ends as soon as it has a line end
        self.has_line = False  # a line end has been generated
        self.heard = -math.inf  # when the last event came
        # Why the engine ended its text, or that we did at `most`; None before its end. `last_pair`
        # sends it, behind the counts that may follow.
        self.engine_reason: str | None = None
        self.done = False

    def feed(self, piece: bytes, now: float) -> Iterator[Pair]:
        """The pairs of the events that a piece of the stream completes, up to the pair "done". The
        piece came at `now` (seconds, monotonic). BackendFailure for an event that is an error or
        not JSON.
        """
        for event in self.events.feed(piece).split(b"\n\n"):
            if event and not self.done:
                yield from self._event(event, now)

    def last_pair(self) -> Pair:
        """The last pair, at the end of the stream. BackendFailure if the engine gave no reason for
        the end of its text: the text may have been cut.
        """
        if self.engine_reason is not None:
            return self._done(self.engine_reason)
        if self.heard == -math.inf:  # llama_cpp.server ends like this if the prompt is too long
            raise HttpError(
                "VPS_UNAVAILABLE", "VPS backend answered nothing; a lower n_ctx of it may help"
            )
        raise BackendFailure("it ended without saying that it is done")

    def _event(self, event: bytes, now: float) -> Iterator[Pair]:
        data = data_of(event)
        if data.strip() in (b"", b"[DONE]"):
            return
        with blamed("it sent an event that is not JSON"):
            members = parse_leniently(data)
        if error := members.get("error"):
            lengths = None if self.tokens else read_overflow(error)
            if lengths is not None:
                raise TooLong(lengths)
            raise BackendFailure("it reported an error")
        self.counts = read_counts(members) or self.counts
        self.heard = now
        if self.engine_reason is None:
            yield from self._text(members, now)
        if self.progress and not self.tokens:
            progress = members_of(members.get("prompt_progress"))  # llama-server's, in tokens
            counts = {"done": progress.get("processed"), "total": progress.get("total")}
            if all(map(COUNT.accepts, counts.values())):
                yield "progress", {"stage": "prefill"} | counts

    def _text(self, members: Members, now: float) -> Iterator[Pair]:
        text, reason = read_engine_event(members)
        probability = read_probability(members)
        # An event has at least one token, so this engine ignores max_tokens.
        if text and self.tokens == self.most:
            text = ""
            reason = "length"
        if text:
            self.deadline = min(self.deadline, now + self.seconds)  # the first one stays
            self.tokens += 1
            self.has_line |= "\n" in text
            self.is_told &= probability is not None
        if probability is None:
            probability = 1.0  # no text ends because its probability is unknown
        else:
            self.written.append((text, probability))
        text, ended = self.ending.feed(text, probability)
        if not ended and reason:
            text += self.ending.flush(whole=reason == "stop")
        elif not ended and self.has_line and now > self.deadline:
            text += self.ending.flush(whole=False)
            ended = "length"
        if text:
            self.sent.append(text)
            yield "text", text_event(text, self.tokens)
        self.engine_reason = reason
        if ended:
            yield self._done(ended)

    def _done(self, reason: str) -> Pair:
        self.done = True
        counts = valid_members(self.counts, RESULT_FIELDS)
        counts["total_tokens"] = counts.get("total_tokens") or self.tokens
        if self.is_told:
            counts |= confidence_of(self.written, self.ending.start, "".join(self.sent))
        return "done", {"finish_reason": reason, **counts}


# --------------------------------------------------------------------------------- reading a stream

# An engine that makes no progress for this long has failed: it is silent while it loads a model or
# reads a prompt.
READING_SECONDS = 180.0
ALIVE_SECONDS = 5.0  # the silence of another engine after which the client gets a comment
COUNTS_SECONDS = 2.0  # the wait after another engine's last text for its token counts


# ---------------------------------------------------------------------------------------- the kinds


class Engine(Kind):
    """What llama-server and OpenAI's API have in common. A client never gets the engine's own error
    texts, which may contain a path or a key.
    """

    health_path = "/v1/models"  # shows without cost that the engine is up
    tells_probabilities = False  # of the tokens of a text, so that it can end where they are low
    key_line = "Authorization: Bearer "
    idle_seconds = READING_SECONDS
    parse = staticmethod(parse_leniently)

    def refusal(self, status: int, members: Members) -> HttpError:
        error = members.get("error")
        if status in (401, 403):
            return Unusable(
                "VPS_UNAVAILABLE",
                f"VPS backend refuses our key: expected the right one in {self.config.variable}",
            )
        if status == 404:
            return HttpError(
                "MODEL_NOT_FOUND",
                "VPS backend does not have this model, or does not know this call",
            )
        if status == 429:
            return HttpError(*TOO_MANY)
        lengths = read_overflow(error)
        if lengths is not None and status in (400, 413, 422):
            return TooLong(lengths)
        if members_of(error).get("message") == "Loading model":
            return Unusable("VPS_UNAVAILABLE", "VPS backend is loading its model")
        return super().refusal(status, members)

    async def ask_health(self) -> None:
        try:
            await self.get(self.health_path)
        except HttpError as error:
            if error.code != "RATE_LIMIT":  # a 429 proves that the backend is up
                raise

    async def list_models(self) -> Models:
        return read_listed(await self.get("/v1/models"))

    def marks(self, model: str) -> Sequence[str]:
        """The special tokens around the parts of a gap, if the Pi writes the whole prompt."""
        if self.config.infill != "fim":
            return ()
        for known in self.catalog:
            if known.id == model:
                return known.fim
        return ()

    def layout(self, model: str, about: Members) -> str:
        """With "spmv2", a prompt ends in the middle of a line; other engines would not heal its
        last token.
        """
        suffix_first = [known.id for known in self.catalog if known.fim_layout == "spm"]
        if self.marks(model) and model in suffix_first:
            return "spm"
        return "psm"

    async def read(self, answer: Answer, wanted: Fitted) -> Pairs:
        await asyncio.sleep(0)  # following a long text takes a turn of the event loop by itself
        fields = wanted.fields
        marks = [mark.strip() for mark in self.marks(wanted.model)]
        least = None
        if self.tells_probabilities and "messages" not in fields:
            least = fields.get("min_confidence")
        translator = Translator(fields, marks, least)
        try:
            async with contextlib.aclosing(self._read_text(answer, translator)) as pairs:
                async for pair in pairs:
                    yield pair
            for pair in translator.feed(b"\n\n", 0.0):  # some engines omit the last blank line
                yield pair
        except BackendFailure:
            if translator.engine_reason is None:
                raise  # else the text is whole, whatever followed it
        if not translator.done:
            yield translator.last_pair()

    async def _read_text(self, answer: Answer, translator: Translator) -> Pairs:
        """The pairs up to the end of the requested piece or of the answer. After the engine's own
        end, its token counts may follow within COUNTS_SECONDS. While the engine is silent,
        ("idle", None) comes every ALIVE_SECONDS or a little later.
        """
        # The head may come only after the engine has read the prompt.
        while not await self.begin(answer, ALIVE_SECONDS, EVENT_STREAM):
            yield "idle", None
        yield "begun", None
        now = asyncio.get_running_loop().time
        begun = sent = now()  # `sent`: when the client last got something
        deadline = math.inf
        piece: bytes | None = None  # None if nothing came in time, b"" at the end
        while piece != b"" and not translator.done:
            piece = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(ALIVE_SECONDS, deadline - now())):
                    piece = await answer.read()
            came = now()
            if came >= deadline:
                return
            for pair in translator.feed(piece or b"", came):
                sent = now()
                yield pair
            # An engine that sends nothing but comments makes no progress.
            if came - max(begun, translator.heard) > self.idle_seconds:
                raise BackendFailure(LATE)
            if translator.engine_reason is not None:
                deadline = min(deadline, came + COUNTS_SECONDS)
            if now() - sent >= ALIVE_SECONDS:
                sent = now()
                yield "idle", None


class LlamaServer(Engine):
    """llama-server, asked by its own calls, but for a chat."""

    reads_ahead = tells_probabilities = True
    health_path = "/health"
    tokenize_path = "/tokenize"

    def write(self, wanted: Fitted) -> tuple[str, JsonObject]:
        fields = wanted.fields
        if "messages" in fields:
            return "/v1/chat/completions", write_chat(wanted) | LLAMA_MORE
        members = write_sampling(wanted, "n_predict") | LLAMA_MORE
        members |= {"cache_prompt": True, "response_fields": LLAMA_LAST}
        if fields.get("min_confidence"):
            members["n_probs"] = 1
        if "suffix" not in fields:
            members["prompt"] = write_files(fields) + fields["prompt"]
            return "/completion", members
        members |= {
            "input_prefix": fields["prompt"],
            "input_suffix": fields["suffix"],
            "prompt": "",
            "input_extra": fields.get("extra", ()),
        }
        return "/infill", members

    async def list_models(self) -> Models:
        listed = await super().list_models()
        props = JsonObject()
        with contextlib.suppress(HttpError):  # the server's /props can be turned off
            props = read_props(await self.get("/props"))
        return {name: props | about for name, about in listed.items()}


class OpenAI(Engine):
    """Whatever speaks OpenAI's API. It may charge for each token, or count each request."""

    def write(self, wanted: Fitted) -> tuple[str, JsonObject]:
        """A gap is written with the model's marks, or as `suffix` if the model has none."""
        fields = wanted.fields
        marks = self.marks(wanted.model)
        if "messages" in fields:
            return "/v1/chat/completions", write_chat(wanted)
        members = write_openai(wanted)
        text = fields["prompt"]
        suffix = fields.get("suffix")
        if suffix is not None and marks:
            layout = self.layout(wanted.model, {})
            text = "".join(arrange_gap(layout, marks, text, suffix))
        elif suffix is not None:
            members["suffix"] = suffix
        members["prompt"] = write_files(fields) + text
        return "/v1/completions", members
