"""A model's tokens, and what a request's prompt is in them: plain text, the text around a gap, or a
chat.

A `Vocabulary` only reads the model. So other threads may use it too, one at a time, while it is
`in_use`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import llama_cpp.llama_cpp as _llama

from cerebrum.request import GenerationRequest
from cerebrum.text.prompt import arrange_gap, steady_suffix
from cerebrum_common import HttpError

api: Any = _llama  # ctypes: its signatures are C's, and its type stubs do not pass strict checking
Messages = Sequence[tuple[str, str]]  # of a chat: the role and the text of each
# ------------------------------------------------------------------------------------------- policy


def begun_answer(messages: Messages) -> str:
    """The text of the last message if it is the assistant's, else empty. The model continues this
    text.
    """
    role, content = messages[-1]
    return content if role == "assistant" else ""


# The word before the cursor, with the preceding character that tokenizers merge into it; or the
# white space, the sign or the underscores before the cursor. Long words and scripts without spaces
# are left alone, because every healed token costs a decode.
UNFINISHED = re.compile(
    r"(?:[^\r\n\w]|_)?(?<![^\W\d_])[A-Za-z]{1,24}\Z|[ \t]+\Z|[!-/:-@\[-^`{-~]\Z|_{1,24}\Z"
)


def heal_from(prompt: str) -> int:
    """The start of the text that the model writes again in tokens of its own choice ("token
    healing").

    A model seldom writes `ort` after the tokens of `imp`, because in its training text ` import` is
    one token.
    """
    match = UNFINISHED.search(prompt, max(0, len(prompt) - 64))
    return match.start() if match else len(prompt)


# Tokens that some files do not declare as control tokens: CodeLlama's end, StarCoder's and
# CodeGemma's next file.
END_TOKEN = re.compile(
    r"\u2581?<(?:EOT|PRE|SUF|MID)>|<\|?file_sep(?:arator)?\|?>|<\|?(?:repo|file)_?name\|?>"
    r"|<\|?fim_\w+\|?>"
)
FILE_TOKENS = ("<|file_sep|>", "<file_sep>", "<|file_separator|>")  # before a file's name
APART = "\x01"  # SentencePiece knows it as a byte
PLACEHOLDER = "\x01%d\x02"  # a message's number, where its text belongs in a chat
MAX_PIECE_BYTES = 4096  # no known token is longer than a few hundred bytes
# The texts of many models are split by std::regex, which recurses for each character of a match. A
# match of 22,000 characters overflows a thread's stack of 8 MB, and a match may consist of two
# runs. SentencePiece takes minutes for a megabyte of line ends.
MAX_RUN = 4096  # characters
# What a match or a run consists of: visible characters; white space, as llama.cpp knows it; words
# with single spaces.
RUNS = [
    re.compile(f"{kind}{{1,{MAX_RUN}}}")
    for kind in (r"[\S\x1c-\x1f]", r"[^\S\x1c-\x1f]", r"[A-Za-z \x80-\U0010ffff]")
]


def cut_runs(text: str) -> list[str]:
    """The text in pieces: cut behind each MAX_RUN characters of one kind. Code has no such run."""
    ends = {len(text)}
    for pattern in RUNS:
        ends |= {run.end() for run in pattern.finditer(text) if len(run[0]) == MAX_RUN}
    return [text[start:end] for start, end in itertools.pairwise([0, *sorted(ends)])]


def merge_turns(messages: Messages) -> Messages:
    """The messages of users and assistant in turn: neighbours are one message, and the system is
    the user.
    """
    merged = list[tuple[str, str]]()
    for role, text in messages:
        role = "assistant" if role == "assistant" else "user"
        if merged and merged[-1][0] == role:
            text = f"{merged.pop()[1]}\n\n{text}"
        merged.append((role, text))
    return merged


# ------------------------------------------------------------------------------------ IO: llama.cpp


def metadata(model: Any, key: str) -> str:
    """A value in the header of a llama_model, "" if there is none."""
    buffer = ctypes.create_string_buffer(256)
    api.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode()


class PromptPart(NamedTuple):
    """What is read of a request's prompt: all of it, or what is near the cursor."""

    tokens: list[int]
    cursor: int = 0  # the number of tokens up to the cursor
    heal: bytes = b""  # the end of its text, which is left out for healing


class Vocabulary:
    """The tokens of one loaded model, given by its llama_model pointer.

    `fim` names the fill-in-the-middle tokens if the file names none, `layout` is their order, see
    `arrange_gap`.
    """

    def __init__(self, model: Any, fim: Sequence[str] = (), layout: str = "psm") -> None:
        self.model = model
        self.vocab = api.llama_model_get_vocab(model)
        self.piece = functools.cache(self._piece)
        self.is_end = functools.cache(self._is_end)
        # While the model is being unloaded, a thread may still encode the prompt of a client that
        # has left.
        self.closed = False
        self._use = threading.Lock()
        self.kind = api.llama_vocab_type(self.vocab)
        adds_space = metadata(model, "tokenizer.ggml.add_space_prefix") != "false"
        self.dummy_space = adds_space and self.kind == api.LLAMA_VOCAB_TYPE_SPM
        # The tokens before the prefix, before the suffix and before the middle; -1 for none.
        readers = (api.llama_vocab_fim_pre, api.llama_vocab_fim_suf, api.llama_vocab_fim_mid)
        self.fim = [read(self.vocab) for read in readers]
        if min(self.fim) < 0 and fim:
            self.fim = list(map(self.token_of, fim))
        if layout == "spmv2" and self.fim[2] < 0:
            layout = "psm"  # nothing would part the suffix from the prefix behind it
        self.layout = layout
        tokens = map(self.token_of, FILE_TOKENS)
        self.file_token = max(api.llama_vocab_fim_sep(self.vocab), *tokens)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[Vocabulary]:
        """The model is not freed meanwhile. HttpError 503 if it has been freed."""
        with self._use:
            if self.closed:
                raise HttpError("SHUTTING_DOWN", "the model has just been unloaded")
            yield self

    def close(self) -> None:
        """Wait until no thread uses the model; then it may be freed."""
        with self._use:
            self.closed = True

    def _piece(self, token: int) -> bytes:
        """A token's bytes. Control tokens have none."""
        buffer = ctypes.create_string_buffer(MAX_PIECE_BYTES)
        size = api.llama_token_to_piece(self.vocab, token, buffer, len(buffer), 0, False)
        return buffer.raw[: max(0, size)]

    def _is_end(self, token: int) -> bool:
        """Whether a completion ends with this token: the model's own ends, and every token that is
        no part of a text.
        """
        vocab = self.vocab
        if api.llama_vocab_is_eog(vocab, token) or api.llama_vocab_is_control(vocab, token):
            return True
        text = api.llama_vocab_get_text(vocab, token) or b""
        return END_TOKEN.fullmatch(text.decode(errors="replace")) is not None

    def tokenize(self, text: str, first: bool, special: bool = False) -> list[int]:
        """Text to tokens. `first` adds the tokens that the model expects at the beginning of a
        text. With `special`, the names of control tokens in the text become those tokens. Long runs
        of one kind are tokenized in pieces.
        """
        head, *rest = cut_runs(text)
        tokens = self.tokenize_bytes(head.encode(), first, special)
        for piece in rest:
            tokens += self.tokenize_part(piece, special)
        return tokens

    def tokenize_bytes(self, text: bytes, first: bool, special: bool) -> list[int]:
        """Bytes without long runs, perhaps with parts of characters."""
        capacity = len(text) + 8
        buffer = (api.llama_token * capacity)()
        count = api.llama_tokenize(self.vocab, text, len(text), buffer, capacity, first, special)
        return list(buffer[: max(0, count)])

    def tokenize_part(self, text: str, special: bool = False) -> list[int]:
        """A text that follows other tokens. SentencePiece would put a space before it, so it is
        tokenized behind a character that merges with nothing.
        """
        if not self.dummy_space:
            return self.tokenize(text, False, special)
        apart = self.tokenize(APART, False)
        tokens = self.tokenize(APART + text, False, special)
        return tokens[len(apart) :]

    def token_of(self, name: str) -> int:
        """The control token of this name, -1 if there is none."""
        if self.kind == api.LLAMA_VOCAB_TYPE_NONE:
            return -1  # a sample of `tune`, where llama.cpp would end the process
        tokens = self.tokenize(name.strip(), False, special=True)
        return tokens[0] if len(tokens) == 1 else -1

    def encode(self, request: GenerationRequest) -> PromptPart:
        """A request's prompt in tokens: plain, fill-in-the-middle or chat. Users' input is text,
        never control tokens, unless the request is `special`. HttpError 400 if a suffix is given
        and the model has no fill-in-the-middle tokens.
        """
        with self.in_use():
            if request.messages:
                return PromptPart(self._encode_chat(request.messages))
            prompt = request.prompt
            if request.special:
                return PromptPart(self.tokenize(prompt, True, special=True))
            if request.heal and self.kind == api.LLAMA_VOCAB_TYPE_BPE:
                start = heal_from(prompt)
                part = self._encode_text(request, prompt[:start])
                if part.tokens:
                    return part._replace(heal=prompt[start:].encode())
            return self._encode_text(request, prompt)

    def _encode_text(self, request: GenerationRequest, prompt: str) -> PromptPart:
        files = self._encode_files(request)
        if request.suffix is None and not files:
            tokens = self.tokenize(prompt, True)
            return PromptPart(tokens, len(tokens))
        tokens = self.tokenize("", True) + files
        text = self.tokenize_part(prompt)
        if request.suffix is None:
            tokens += text
            return PromptPart(tokens, len(tokens))
        before, after, middle = self.fim
        if min(before, after) < 0:
            raise HttpError(
                "INVALID_REQUEST",
                "suffix: expected a model with fill-in-the-middle tokens, got one without",
            )
        fim = [before], [after], [middle] * (middle >= 0)
        suffix = request.suffix
        if self.layout == "spmv2":
            suffix = steady_suffix(suffix)
        cursor = 0
        for part in arrange_gap(self.layout, fim, text, self.tokenize_part(suffix)):
            tokens += part
            if part is text:
                cursor = len(tokens)
        return PromptPart(tokens, cursor)

    def _encode_files(self, request: GenerationRequest) -> list[int]:
        """Other files' texts, each after the model's file token and the file's name; then the token
        and the name of the request's own file. A model without the token gets the texts alone. The
        token before a repository's name is not used: with it, Qwen2.5-Coder completed the gaps
        beside other files worse.
        """
        before = [self.file_token] if self.file_token >= 0 else []
        files = [f"{name}\n{text}" if before else text for name, text in request.extra]
        if before and request.filename and (files or request.suffix is not None):
            files.append(request.filename)
        tokens = []
        for file in files:
            tokens += before + self.tokenize_part(file.rstrip("\n") + "\n")
        return tokens

    def _encode_chat(self, messages: Messages) -> list[int]:
        """Apply the chat template to placeholders, then replace these by the messages: the
        template's own text may contain control tokens, the messages may not. If the last message is
        the assistant's, the answer begins with that message. A base model, which has no template,
        goes on with the messages as a text.
        """
        begun = begun_answer(messages)
        if begun:
            messages = messages[:-1]
        template = api.llama_model_chat_template(self.model, None) or b""
        if not template and self.token_of("<|im_start|>") < 0:
            texts = [text for _, text in messages]
            return self.tokenize("\n\n".join([*texts, begun]), True)
        rest = self._apply(template, messages)
        if any(PLACEHOLDER % number not in rest for number in range(len(messages))):
            messages = merge_turns(messages)  # since the template drops a role
            rest = self._apply(template, messages)
        tokens = []
        for number, (_, text) in enumerate(messages):
            before, found, rest = rest.partition(PLACEHOLDER % number)
            if number:
                tokens += self.tokenize_part(before, special=True)
            else:
                tokens += self.tokenize(before, True, special=True)
            if found:
                tokens += self.tokenize_part(text)
        rest += self._no_thoughts(template, begun)
        tokens += self.tokenize_part(rest, special=True)
        return tokens + self.tokenize_part(begun)

    def _no_thoughts(self, template: bytes, begun: str) -> str:
        """What makes a model answer at once instead of thinking first."""
        if b"<|channel|>" in template:  # gpt-oss
            return "<|channel|>final<|message|>"
        if b"</think>" not in template or self.token_of("<think>") < 0:
            return ""
        if begun.lstrip().startswith("<think>"):
            return ""
        return "<think>\n\n</think>\n\n"

    def _apply(self, template: bytes, messages: Messages) -> str:
        """The chat template's text for messages of these roles, with numbered placeholders as
        contents.
        """
        turns = [
            api.llama_chat_message(role.encode(), (PLACEHOLDER % number).encode())
            for number, (role, _) in enumerate(messages)
        ]
        chat = (api.llama_chat_message * len(turns))(*turns)
        buffer = ctypes.create_string_buffer(4096 + 128 * len(turns))
        for name in (template, b"chatml"):
            size = api.llama_chat_apply_template(name, chat, len(turns), True, buffer, len(buffer))
            if size >= 0:
                break
        return buffer.raw[:size].decode(errors="replace")
