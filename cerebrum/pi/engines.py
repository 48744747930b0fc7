"""Translates the streams of engines other than vpsd into the pairs of a native stream.

`translate` reads the answer, a `Translator` parses its events. The Translator also ends the text
where the requested piece is complete, which these engines do not do.

    >>> fields = {"prompt": "def f(n):\\n", "language": "python", "mode": "complete"}
    >>> translator = Translator(fields, [])
    >>> event = b'data: {"choices": [{"text": "    return n\\\\n\\\\nf(1)"}]}\\n\\n'
    >>> list(translator.feed(event, 0.0))
    [('text', b'data: {"token": "    return n\\\\n", "total_tokens": 1}\\n\\n'),
     ('done', {'finish_reason': 'block', 'total_tokens': 1})]
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import re
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from cerebrum.fields import members_of
from cerebrum.pi import upstream
from cerebrum.pi.dialects import COUNTS, MAX_TOKENS, read_counts, read_engine_event, read_overflow
from cerebrum.pi.upstream import Answer, BackendFailure, Events, Pair, TooLong, Upstream, text_event
from cerebrum.text.languages import BY_NAME, LANGUAGES
from cerebrum.text.prompt import find_statement
from cerebrum_common import HttpError

# ---------------------------------------------------------------------- the events of other engines

# Special tokens that an engine may leak. Each of them ends a text, unless the prompt itself
# contains it.
MARKS = (
    "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>",
    "<|file_sep|>", "<|repo_name|>", "<\uff5cend\u2581of\u2581sentence\uff5c>",
)  # fmt: skip


MAX_STOP_CHARS = 2000  # no answer has a longer stop string
# What of a prompt's end and of a suffix is followed: the Pi has one thread for all. Of some 2,000
# cases in Python of tests/bench/ending.py, 3 end elsewhere than with 16,000.
NEAR_CHARS = 8000


def end_of(prompt: str, language: str) -> str:
    """The last NEAR_CHARS of a prompt, from a statement on where the language's syntax is known."""
    start, syntax = len(prompt) - NEAR_CHARS, LANGUAGES.get(BY_NAME.get(language.lower(), ""))
    if start > 0 and syntax:
        start = find_statement(prompt, syntax, start, start + NEAR_CHARS // 2)
    return prompt[max(0, start) :]


class Characters:
    """Joins the parts of characters that an engine has split: halves of a surrogate pair, or bytes
    of UTF-8 (as the lone surrogates of Python's "surrogateescape").
    """

    def __init__(self) -> None:
        self.bytes = codecs.getincrementaldecoder("utf-8")("replace")
        self.half = ""  # the first half of a pair

    def feed(self, text: str) -> str:
        if text.isascii() and not self.half and not self.bytes.getstate()[0]:
            return text  # as nearly always
        text, self.half = self.half + text, ""
        if "\ud800" <= text[-1:] <= "\udbff":
            text, self.half = text[:-1], text[-1]
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
        escaped = re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text)
        return self.bytes.decode(escaped.encode("utf-8", "surrogateescape"))


class Translator:
    """Turns another engine's stream into the pairs of a native stream. ("done", …) comes last: at
    the engine's own end, or earlier, where the requested piece is complete. `fields` are those of
    vpsd's request.
    """

    def __init__(self, fields: Mapping[str, Any], marks: Sequence[str]) -> None:
        # 3 MB that a Pi without other engines need not load
        from cerebrum.text.ending import Ending

        turns = fields.get("messages") or ()
        given = [
            fields.get("prompt", ""),
            fields.get("suffix", ""),
            *(turn["content"] for turn in turns),
        ]
        marks = [mark for mark in {*MARKS, *marks} if not any(mark in text for text in given)]
        stops = [stop for stop in fields.get("stop", ()) if len(stop) <= MAX_STOP_CHARS]
        language, suffix = fields.get("language", ""), fields.get("suffix", "")[:NEAR_CHARS]
        where = (
            fields["mode"],
            language,
            end_of(given[0], language),
            suffix,
            fields.get("stop_at", "auto"),
        )
        self.ending = Ending(*where, fields.get("indent", 0), [*stops, *marks])
        self.characters = Characters()
        self.most = fields.get("max_tokens") or MAX_TOKENS
        self.limit = fields.get("predict_ms", 0) / 1000  # seconds; 0: none
        self.progress = fields.get("progress", False)
        self.counting: Mapping[str, Any] = {}  # the last event that counts tokens
        self.tokens = 0  # events with text; an engine may put several tokens into one
        self.began = 0.0  # when the first event with text came
        self.has_line = False  # a line end has been generated
        self.heard = False  # an event came
        self.lived = (
            0.0  # when the last event came; once the engine has ended its text, when it did
        )
        self.reason: str | None = None  # why the engine ended its text; None before its end
        self.done = False

    def feed(self, block: bytes, now: float) -> Iterator[Pair]:
        """The pairs of a block of whole events, up to the pair "done". The block came at `now`
        (seconds, monotonic). BackendFailure for an event that is an error or not JSON.
        """
        for event in block.split(b"\n\n"):
            if event and not self.done:
                yield from self._event(event, now)

    def end(self) -> Pair:
        """The last pair, at the end of the stream. BackendFailure if the engine gave no reason for
        the end of its text: the text may have been cut.
        """
        if self.reason is None:
            if not self.heard:  # llama_cpp.server ends like this if the prompt is too long
                raise HttpError(
                    "VPS_UNAVAILABLE", "VPS backend answered nothing; a lower n_ctx of it may help"
                )
            raise BackendFailure("it ended without saying that it is done")
        return self._done(self.reason)

    def _event(self, event: bytes, now: float) -> Iterator[Pair]:
        data = upstream.data_of(event)
        if data.strip() in (b"", b"[DONE]"):
            return
        with upstream.blamed("it sent an event that is not JSON"):
            members = upstream.parse_leniently(data)
        if error := members.get("error"):
            if not self.tokens and (lengths := read_overflow(error)) is not None:
                raise TooLong(lengths)
            raise BackendFailure("it reported an error")
        if any(members.get(name) is not None for name in COUNTS):
            self.counting = members
        self.heard = True
        if self.reason is None:
            self.lived = now
            yield from self._text(*read_engine_event(members), now)
        if self.progress and not self.tokens:
            progress = members_of(
                members.get("prompt_progress")
            )  # llama-server's, in tokens of the prompt
            read, total = progress.get("processed"), progress.get("total")
            if upstream.COUNT.accepts(read) and upstream.COUNT.accepts(total):
                yield "progress", {"stage": "prefill", "done": read, "total": total}

    def _text(self, text: str, reason: str | None, now: float) -> Iterator[Pair]:
        if reason == "error":
            raise BackendFailure("it gave up")
        if (
            text and self.tokens == self.most
        ):  # an event has at least one token: the engine ignores its limit
            text, reason = "", "length"
        if text:
            self.began = self.began if self.tokens else now
            self.tokens += 1
            self.has_line = self.has_line or "\n" in text
            text = self.characters.feed(text)
        text, ended = self.ending.feed(text)
        if (
            not ended
            and not reason
            and self.limit
            and self.has_line
            and now - self.began > self.limit
        ):
            ended, text = "length", text + self.ending.flush(whole=False)
        elif reason and not ended:
            text += self.ending.flush(whole=reason == "stop")
        if text:
            yield "text", text_event(text, self.tokens)
        self.reason = reason
        if ended:
            yield self._done(ended)

    def _done(self, reason: str) -> Pair:
        self.done = True
        counts = upstream.read_result(read_counts(self.counting))
        counts["total_tokens"] = counts.get("total_tokens") or self.tokens
        return "done", {"finish_reason": reason, **counts}


# without progress of another engine, which is silent while it loads a model or reads a prompt
READING_SECONDS = 180.0
ALIVE_SECONDS = 5.0  # the silence of another engine after which the client gets a comment
COUNTS_SECONDS = 2.0  # the wait after another engine's last text for its token counts


async def translate(
    client: Upstream, answer: Answer, translator: Translator
) -> AsyncGenerator[Pair, None]:
    """The counterpart of `relay` for another engine. The engine may send its head only after
    reading the prompt, and it sends no comments: during its silence, ("idle", None) comes every
    ALIVE_SECONDS or a little later. Once the engine has ended its text, the text is complete,
    whatever follows.
    """
    events, now = Events(), asyncio.get_running_loop().time
    while not await client.begin(answer, ALIVE_SECONDS, upstream.EVENT_STREAM):
        yield "idle", None
    yield "begun", None
    spoke = translator.lived = now()  # `spoke`: when the client last got something
    while not translator.done:
        data = None
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(COUNTS_SECONDS if translator.reason else ALIVE_SECONDS):
                    data = await answer.read()
            came = now()
            block = (
                b"" if data is None else events.feed(data or b"\n\n")
            )  # some engines omit the last blank line
            for pair in translator.feed(block, came):
                spoke = now()
                yield pair
        except BackendFailure:
            if not translator.reason:
                raise
            came, data = now(), b""
        silence = came - translator.lived
        if not translator.done and (
            data == b"" or (translator.reason and silence >= COUNTS_SECONDS)
        ):
            yield translator.end()
        elif (
            not translator.reason and silence > READING_SECONDS
        ):  # the engine sends nothing but comments
            raise BackendFailure(upstream.LATE)
        elif now() - spoke >= ALIVE_SECONDS:
            spoke = now()
            yield "idle", None
