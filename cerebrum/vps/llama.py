"""llama.cpp through the ctypes API of llama-cpp-python: settings, memory, a model with its sequences, sampling.

A model belongs to the thread that loaded it. Shortcut: a model's jinja chat template is never run (CVE-2024-34359);
llama.cpp's own table of templates is used.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# llama.cpp's threads meet at a barrier hundreds of times for each token, and by default they spin there for
# milliseconds. If another program occupies a core, the spinning keeps the thread that everyone waits for from running,
# and a token can take ten times as long. A much lower value makes the threads sleep too often on a quiet machine.
# libgomp reads the variable once, when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import llama_cpp.llama_cpp as _llama
import numpy as np

from cerebrum_common import HttpError

llama: Any = _llama  # ctypes: its signatures are C's, and its type stubs do not pass strict checking
MB = 1 << 20
# ---------------------------------------------------------------------------------- settings and requests

KV_TYPES = {"f16": llama.GGML_TYPE_F16, "q8_0": llama.GGML_TYPE_Q8_0}
MAX_SEED = 2**32 - 2  # 2**32 - 1 asks llama.cpp for a random seed
FLASH_ATTENTION = (llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama.LLAMA_FLASH_ATTN_TYPE_ENABLED)


def cpus() -> int:
    """The number of hardware threads that this process may use."""
    return len(os.sched_getaffinity(0))


def usable_cores() -> int:
    """Number of physical cores among the CPUs that this process may use. A second thread on a core usually only makes
    llama.cpp wait."""
    cpus = os.sched_getaffinity(0)
    siblings = set()
    for cpu in cpus:
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.exists() else str(cpu))
    return len(siblings)


@dataclass(frozen=True, slots=True)
class Settings:
    """How models are run. All workers of a process use the same settings."""

    threads: int = field(default_factory=usable_cores)
    n_ctx: int = 4096  # tokens of one sequence, its prompt and completion together
    sequences: int = 2  # at a time
    kv_type: str = "f16"  # of the KV cache; q8_0 takes half the memory
    micro_batch: int = 256  # tokens of a chunk that are computed together; their attention takes memory
    flash_attention: bool = False
    fixed_threads: bool = False  # the user chose the number of threads
    cache_mb: int = 256  # of parked sequences, in memory and on disk
    draft: bool = True
    # Calibration, parked sequences, tuned files.
    state_dir: Path = field(default_factory=lambda: Path("~/.local/state/cerebrum").expanduser())

    @property
    def uses_flash_attention(self) -> bool:
        """Whether flash attention is on. A quantized cache needs it."""
        return self.flash_attention or self.kv_type != "f16"


@dataclass(frozen=True, slots=True)
class TunedFile:
    """The model in an encoding that is faster on this machine; see encoding.py."""

    path: Path  # the published file itself, if only the settings differ
    settings: Settings
    source: str  # sha256 that the published file must have
    encoding: str  # in words, for messages


@dataclass(frozen=True, slots=True)
class CompletionRequest:
    """One completion as a caller requests it. The caller has checked the ranges.

    The caller gives either `prompt` or `messages`, pairs of a role (system, user, assistant) and a text. A `suffix`
    makes the request fill-in-the-middle. With `heal` the prompt's last token may be unfinished. `extra` has the name
    and text of other files.
    """

    prompt: str | None = None
    messages: Sequence[tuple[str, str]] | None = None
    suffix: str | None = None
    filename: str = ""
    extra: Sequence[tuple[str, str]] = ()
    language: str | None = None
    mode: str = "complete"  # or infill, instruct
    stop_at: str = "auto"  # or none
    indent: int = 0  # characters; the completion ends before a line that is indented less
    stop: Sequence[str] = ()
    max_tokens: int = 512  # 0 only reads the prompt into the cache
    predict_ms: int = 0  # a completion with a line end stops this long after its first token; 0: no limit
    temperature: float = 0.4
    top_p: float = 0.95
    seed: int | None = None  # of the random numbers, at a temperature above 0
    heal: bool = False
    special: bool = False  # the names of control tokens in the prompt are these tokens
    progress: bool = False


def begun_answer(messages: Sequence[tuple[str, str]]) -> str:
    """The text of the last message if it is the assistant's, else empty. The model continues this text."""
    role, content = messages[-1]
    return content if role == "assistant" else ""


# ---------------------------------------------------------------------------------------------------- policy: memory


@dataclass(frozen=True, slots=True)
class Shape:
    """The dimensions in a GGUF's header that decide how much memory the model needs."""

    layers: int
    kv_width: int  # elements of K and V of one token in all layers
    heads: int
    embedding: int
    feed_forward: int
    vocabulary: int
    state: int = 0  # bytes of one sequence's recurrent states, with those that can be gone back to


def estimate_bytes(file_size: int, shape: Shape, settings: Settings) -> dict[str, int]:
    """Bytes that a model will need when loaded: its weights, KV cache and compute buffers."""
    element = 2.0 if settings.kv_type == "f16" else 34 / 32  # q8_0: 32 values and a scale in 34 bytes
    cells, outputs = settings.sequences * settings.n_ctx, settings.sequences * (MAX_DRAFT + 1)
    per_cell = 2 if settings.uses_flash_attention else 4 * shape.heads + 2  # bytes; without it, scores of all cells
    per_token = 4 * (8 * shape.embedding + 3 * shape.feed_forward) + per_cell * cells
    return {
        "weights": file_size,
        "kv": int(cells * shape.kv_width * element) + settings.sequences * shape.state,
        "compute": settings.micro_batch * per_token + 2 * 4 * outputs * shape.vocabulary,
    }


MAX_CHUNK = 512  # n_batch
MAX_DRAFT = 63
ROLLBACK = 4  # drafted tokens that a recurrent model can take back, where llama.cpp keeps the states between:
ROLLING_BACK = ("qwen35", "qwen35moe", "lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe")
# ------------------------------------------------------------------------------------------ policy: text

# The word before the cursor, with the preceding character that tokenizers merge into it; or the white space before the
# cursor. Long words and scripts without spaces are left alone, because every healed token costs a decode.
UNFINISHED = re.compile(r"(?:[^\r\n\w]|_)?(?<![^\W\d_])[A-Za-z]{1,24}\Z|[ \t]+\Z")
HEAL_CANDIDATES = 512  # likeliest tokens that are checked


def heal_from(prompt: str) -> int:
    """The start of the text that the model writes again in tokens of its own choice ("token healing").

    A model seldom writes `ort` after the tokens of `imp`, because in its training text ` import` is one token.
    """
    match = UNFINISHED.search(prompt, max(0, len(prompt) - 64))
    return match.start() if match else len(prompt)


# ---------------------------------------------------------------------------------------- IO: llama.cpp


class ModelError(Exception):
    """A model file that llama.cpp cannot load. The message is fit for a client."""


_log_tail: deque[str] = deque(maxlen=20)  # llama.cpp's latest messages, logged when a load fails


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def keep_log(_level: int, text: bytes, _data: Any) -> None:
    _log_tail.append(text.decode("utf-8", "replace").rstrip())


def start_library() -> None:
    """Set up llama.cpp: once in a process, before the first worker starts."""
    llama.llama_log_set(keep_log, None)
    llama.llama_backend_init()


# Marks that some files do not declare as control tokens: CodeLlama's end, StarCoder's and CodeGemma's next file.
END_MARK = re.compile(
    r"\u2581?<(?:EOT|PRE|SUF|MID)>|<\|?file_sep(?:arator)?\|?>|<\|?(?:repo|file)_?name\|?>|<\|?fim_\w+\|?>"
)
FILE_MARKS = ("<|file_sep|>", "<file_sep>", "<|file_separator|>")  # before a file's name
APART = b"\x01"  # SentencePiece knows it as a byte
ABORTED = 2  # returned by llama_decode after the abort callback has returned true


def fingerprint(path: Path) -> str:
    """The key of caches made for a model file: a hash of its size, modification time, first and last MiB."""
    stat = path.stat()
    digest = hashlib.sha256(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    with path.open("rb") as file:
        digest.update(file.read(MB))
        file.seek(max(0, stat.st_size - MB))
        digest.update(file.read(MB))
    return digest.hexdigest()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of `a` and `b`, two sequences of one type."""
    limit = min(len(a), len(b))
    start = 0
    while start < limit and a[start : start + 64] == b[start : start + 64]:
        start += 64
    start = min(start, limit)
    while start < limit and a[start] == b[start]:
        start += 1
    return start


class Llama:
    """One model and its context: the ctypes calls and nothing else.

    Only its worker's thread uses it. Exceptions: `encode` and `tokenize` read the vocabulary, `abort` sets a byte.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        progress: Callable[[float], bool],
        fim: Sequence[str] = (),
        suffix_first: bool = False,
    ) -> None:
        callback = llama.llama_progress_callback(lambda done, _data: progress(done))
        params = llama.llama_model_default_params()
        params.progress_callback = callback
        # Not mapped: many weights are repacked in memory, and the mapped pages would stay as well. The system counts
        # mapped pages as available memory, so a second model would seem to fit.
        params.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self.model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            raise ModelError("llama.cpp cannot load this file; it is damaged, cut short or of an unknown kind")
        self.vocab = llama.llama_model_get_vocab(self.model)
        self.n_vocab = int(llama.llama_vocab_n_tokens(self.vocab))
        self.logits_row = ctypes.c_float * self.n_vocab
        self.pieces, self.ends = dict[int, bytes](), dict[int, bool]()  # caches for `piece` and `is_end`
        spaces = self.metadata("add_space_prefix", "tokenizer.ggml") != "false"
        self.dummy_space = spaces and llama.llama_vocab_type(self.vocab) == llama.LLAMA_VOCAB_TYPE_SPM
        # The marks before the text above a gap, before the one below it, and at the end; -1 for none.
        names = ("pre", "suf", "mid")
        self.fim = [int(getattr(llama, f"llama_vocab_fim_{name}")(self.vocab)) for name in names]
        self.suffix_first = suffix_first
        if min(self.fim) < 0 and fim:
            self.fim = [self.mark(name) if name else -1 for name in fim]
        self.file_mark = max(int(llama.llama_vocab_fim_sep(self.vocab)), *map(self.mark, FILE_MARKS))
        trained = int(llama.llama_model_n_ctx_train(self.model))
        self.n_ctx = min(settings.n_ctx, trained) if trained > 0 else settings.n_ctx
        self.window = int(llama.llama_model_n_swa(self.model))  # tokens of a sliding window; 0: there is none
        # llama.cpp calls the abort callback for every graph node. A Python function would take the GIL each time. The C
        # library's strlen has a matching signature, and its result for a string of at most one byte is 1 if the byte is
        # set.
        self.abort_flag = ctypes.create_string_buffer(2)
        # While the model is being unloaded, a thread may still encode the prompt of a client that has left.
        self.vocab_lock, self.closed = threading.Lock(), False
        self._strlen = ctypes.cast(ctypes.CDLL(None).strlen, llama.ggml_abort_callback)
        self.batch = llama.llama_batch_init(MAX_CHUNK, 0, 1)
        for i in range(MAX_CHUNK):
            self.batch.n_seq_id[i] = 1
        params = llama.llama_context_default_params()
        params.n_ctx = self.n_ctx * settings.sequences
        params.n_batch, params.n_ubatch = MAX_CHUNK, settings.micro_batch
        params.n_seq_max = settings.sequences
        # One token and its draft for every slot. By default the logits buffer would take 300 MB.
        params.n_outputs_max = settings.sequences * (MAX_DRAFT + 1)
        params.n_threads = params.n_threads_batch = settings.threads
        params.flash_attn_type = FLASH_ATTENTION[settings.uses_flash_attention]
        params.type_k = params.type_v = KV_TYPES[settings.kv_type]
        # Unified, sequences share a micro-batch, and a prefix without copying it. But LongRoPE chooses its factors by
        # the size of all sequences together.
        original = int(self.metadata("rope.scaling.original_context_length") or 0)
        self.unified = not self.n_ctx <= original < params.n_ctx
        params.kv_unified = self.unified
        params.n_rs_seq = ROLLBACK
        params.no_perf = True
        params.abort_callback = self._strlen
        params.abort_callback_data = ctypes.addressof(self.abort_flag)
        self.context = llama.llama_init_from_model(self.model, params)
        if not self.context:
            self.close()
            raise ModelError("llama.cpp cannot make a context for this model; there is too little memory")
        self.memory = llama.llama_get_memory(self.context)
        # A recurrent state cannot be cut like a KV cache: only so many tokens can be taken back, right after they were
        # decoded.
        is_recurrent, is_hybrid = llama.llama_model_is_recurrent, llama.llama_model_is_hybrid
        self.recurrent = bool(is_recurrent(self.model) or is_hybrid(self.model))
        self.max_draft = int(llama.llama_n_rs_seq(self.context)) if self.recurrent else MAX_DRAFT

    def metadata(self, key: str, group: str = "") -> str:
        """A value of the model's header, below the architecture's name or `group`; "" if there is none."""
        buffer = ctypes.create_string_buffer(256)
        llama.llama_model_meta_val_str(self.model, b"general.architecture", buffer, len(buffer))
        name = b"%b.%b" % (group.encode() or buffer.value, key.encode())
        found = llama.llama_model_meta_val_str(self.model, name, buffer, len(buffer)) >= 0
        return buffer.value.decode() if found else ""

    def close(self) -> None:
        with self.vocab_lock:
            self.closed = True
        llama.llama_batch_free(self.batch)
        if self.context:
            llama.llama_free(self.context)
        llama.llama_model_free(self.model)

    def use_threads(self, count: int) -> None:
        llama.llama_set_n_threads(self.context, count, count)

    def abort(self) -> None:
        """Make a running `decode` end soon. Called by any thread."""
        self.abort_flag[0] = b"\x01"

    def decode(self, parts: Sequence[tuple[Slot, list[int], int]]) -> int:
        """One `llama_decode`. Each part is (slot, tokens to append, how many of the last tokens get logits). Returns 0,
        or ABORTED; anything else is a fault."""
        index = 0
        batch = self.batch
        for slot, tokens, outputs in parts:
            for i, token in enumerate(tokens):
                batch.token[index] = token
                batch.pos[index] = len(slot.tokens) + i
                batch.seq_id[index][0] = slot.id
                batch.logits[index] = i >= len(tokens) - outputs
                index += 1
        batch.n_tokens = index
        return int(llama.llama_decode(self.context, batch))

    def logits(self, index: int) -> Any:
        """float32[n_vocab] for batch position `index`: llama.cpp's own buffer, valid until the next decode."""
        logits = llama.llama_get_logits_ith(self.context, index)
        row: Any = self.logits_row.from_address(ctypes.addressof(logits.contents))
        return np.frombuffer(row, np.float32)

    def greedy(self, index: int) -> int:
        """The likeliest token at batch position `index`. Of equally likely tokens the first is taken, as in llama.cpp's
        greedy sampler."""
        return int(self.logits(index).argmax())

    def restrict(self, index: int, start: bytes) -> None:
        """Exclude every token at batch position `index` that contradicts the text `start`. A token may cover a part of
        `start` or go beyond it. Only the likeliest tokens and the tokenizer's own choice are checked and can stay."""
        row = self.logits(index)
        likeliest = np.argpartition(row, -HEAL_CANDIDATES)[-HEAL_CANDIDATES:].tolist()
        pieces = [(token, self.piece(token)) for token in likeliest + self.tokenize(start, False)[:1]]
        fits = [token for token, piece in pieces if piece and piece[: len(start)] == start[: len(piece)]]
        kept = row[fits]
        row.fill(-np.inf)
        row[fits] = kept

    def computed(self, slot: Slot) -> int:
        """Number of tokens in the slot's KV cells. After an abort they include the decode's finished micro-batches."""
        return int(llama.llama_memory_seq_pos_max(self.memory, slot.id)) + 1

    def trim(self, slot: Slot, length: int) -> bool:
        """Drop the slot's cells from position `length` on. False if what is left cannot be continued: a recurrent state
        has gone further, or a sliding window lacks cells."""
        done = bool(llama.llama_memory_seq_rm(self.memory, slot.id, length, -1))
        first = int(llama.llama_memory_seq_pos_min(self.memory, slot.id)) if self.window and length else 0
        return done and 0 <= first <= max(0, length - self.window)

    def reusable(self, tokens: list[int], prompt: list[int]) -> int:
        """How many first tokens of a prompt a sequence of these tokens saves. The prompt's last token is computed in
        any case, for the logits after it."""
        common = min(common_prefix(tokens, prompt), len(prompt) - 1)
        return common if not self.recurrent or common == len(tokens) else 0

    def copy_prefix(self, source: Slot, target: Slot, length: int) -> bool:
        """Let the empty `target` share the first cells of `source`; False if llama.cpp cannot."""
        if not self.unified:
            return self.restore(target, self.save(source))
        llama.llama_memory_seq_cp(self.memory, source.id, target.id, 0, length)
        return True

    def save(self, slot: Slot) -> bytes:
        """The slot's KV state, for `restore`."""
        size = llama.llama_state_seq_get_size(self.context, slot.id)
        buffer = (ctypes.c_uint8 * size)()
        written = llama.llama_state_seq_get_data(self.context, buffer, size, slot.id)
        return bytes(memoryview(buffer)[:written])

    def restore(self, slot: Slot, state: bytes) -> bool:
        """Fill the empty slot with a state that `save` returned for any slot; False if llama.cpp rejects the state."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return int(llama.llama_state_seq_set_data(self.context, buffer, len(state), slot.id)) == len(state)

    def piece(self, token: int) -> bytes:
        """A token's bytes. Control tokens have none."""
        if token not in self.pieces:
            buffer = ctypes.create_string_buffer(256)
            size = int(llama.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False))
            if size < 0:
                buffer = ctypes.create_string_buffer(-size)
                size = int(llama.llama_token_to_piece(self.vocab, token, buffer, -size, 0, False))
            self.pieces[token] = buffer.raw[:size]
        return self.pieces[token]

    def is_end(self, token: int) -> bool:
        """Whether a completion ends with this token: the model's own ends, and every mark that is no part of a text."""
        if token not in self.ends:
            text = (llama.llama_vocab_get_text(self.vocab, token) or b"").decode("utf-8", "replace")
            kinds = llama.llama_vocab_is_eog(self.vocab, token), llama.llama_vocab_is_control(self.vocab, token)
            self.ends[token] = any(kinds) or END_MARK.fullmatch(text) is not None
        return self.ends[token]

    def tokenize(self, text: str | bytes, first: bool, special: bool = False) -> list[int]:
        """Text to tokens. `first` adds the tokens that the model expects at the beginning of a text. With `special`,
        the names of control tokens in the text become those tokens."""
        data = text.encode() if isinstance(text, str) else text
        room = len(data) + 8
        tokens = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocab, data, len(data), tokens, room, first, special)
        return list(tokens[: max(0, count)])

    def tokenize_part(self, text: str | bytes, special: bool = False) -> list[int]:
        """A text that follows other tokens. SentencePiece would put a space before it, so it is tokenized behind a
        character that merges with nothing."""
        data = text.encode() if isinstance(text, str) else text
        if not self.dummy_space or not data:
            return self.tokenize(data, False, special)
        return self.tokenize(APART + data, False, special)[len(self.tokenize(APART, False)) :]

    def mark(self, name: str) -> int:
        """The token that is written so, -1 if there is none."""
        if llama.llama_vocab_type(self.vocab) == llama.LLAMA_VOCAB_TYPE_NONE:
            return -1  # a sample of `tune`, where llama.cpp would end the process
        tokens = self.tokenize(name.strip(), False, special=True)
        return tokens[0] if len(tokens) == 1 else -1

    def encode(self, request: CompletionRequest) -> tuple[list[int], bytes, int]:
        """A request's prompt as tokens (plain, fill-in-the-middle or chat), the end of its text that is left out for
        healing, and the number of tokens up to the cursor. Users' input is text, never control tokens, unless the
        request is `special`. HttpError 400 if a suffix is given and the model has no fill-in-the-middle tokens."""
        with self.vocab_lock:
            if self.closed:
                raise HttpError("SHUTTING_DOWN", "the model has just been unloaded")
            if request.messages:
                return self._encode_chat(request.messages), b"", 0
            prompt = request.prompt or ""
            if request.special:
                return self.tokenize(prompt, True, special=True), b"", 0
            if request.heal and llama.llama_vocab_type(self.vocab) == llama.LLAMA_VOCAB_TYPE_BPE:
                start = heal_from(prompt)
                tokens, before = self._encode_text(request, prompt[:start])
                if tokens:
                    return tokens, prompt[start:].encode(), before
            tokens, before = self._encode_text(request, prompt)
            return tokens, b"", before

    def _encode_text(self, request: CompletionRequest, prompt: str) -> tuple[list[int], int]:
        """(tokens, how many of them precede the cursor)."""
        files = self._encode_files(request)
        if request.suffix is None:
            start = self.tokenize("", True) if files else []
            tokens = [*start, *files, *self.tokenize_part(prompt)] if files else self.tokenize(prompt, True)
            return tokens, len(tokens)
        before, after, middle = self.fim
        if min(before, after) < 0:
            raise HttpError(
                "INVALID_REQUEST", "suffix: expected a model with fill-in-the-middle tokens, got one without"
            )
        start, end = [*self.tokenize("", True), *files], [middle] * (middle >= 0)
        text, suffix = [before, *self.tokenize_part(prompt)], [after, *self.tokenize_part(request.suffix)]
        parts = (suffix, text) if self.suffix_first else (text, suffix)
        tokens = [*start, *parts[0], *parts[1], *end]
        return tokens, len(tokens) - len(end) - len(suffix) * (not self.suffix_first)

    def _encode_files(self, request: CompletionRequest) -> list[int]:
        """Other files' texts, each after the model's file mark and the file's name; then the mark and the name of the
        request's own file. A model without the mark gets the texts alone. The mark before a repository's name is not
        used: with it, Qwen2.5-Coder completed the gaps beside other files worse."""
        mark, name = self.file_mark, request.filename
        files = [text if mark < 0 else f"{name}\n{text}" for name, text in request.extra]
        if name and mark >= 0 and (files or request.suffix is not None):
            files.append(name)
        marks = [mark] if mark >= 0 else []
        texts = [self.tokenize_part(file.rstrip("\n") + "\n") for file in files]
        return [token for text in texts for token in (*marks, *text)]

    def _encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Apply the chat template to placeholders, then replace these by the messages: the template's own text may
        contain control tokens, the messages may not. If the last message is the assistant's, the answer begins with
        that message. A base model, which has no template, goes on with the messages as a text."""
        begun = begun_answer(messages)
        messages = messages[: len(messages) - bool(begun)]
        template: bytes = llama.llama_model_chat_template(self.model, None) or b""
        if not template and self.mark("<|im_start|>") < 0:
            return self.tokenize("\n\n".join([*(text for _, text in messages), begun]), True)
        shown = self._apply(template, [role for role, _ in messages])
        if any(b"\x01%d\x02" % n not in shown for n in range(len(messages))):  # the template drops a role
            merged: list[tuple[str, str]] = []
            for role, text in [(role if role == "assistant" else "user", text) for role, text in messages]:
                same = merged and merged[-1][0] == role
                merged[-1:] = [(role, f"{merged[-1][1]}\n\n{text}")] if same else [*merged[-1:], (role, text)]
            messages, shown = merged, self._apply(template, [role for role, _ in merged])
        tokens: list[int] = []
        for number, (_, content) in enumerate(messages):
            glue, found, shown = shown.partition(b"\x01%d\x02" % number)
            tokens += self.tokenize_part(glue, special=True) if number else self.tokenize(glue, True, special=True)
            tokens += self.tokenize_part(content) if found else []
        # What makes a model answer at once instead of thinking first.
        if b"<|channel|>" in template:  # gpt-oss
            shown += b"<|channel|>final<|message|>"
        elif b"</think>" in template and self.mark("<think>") >= 0 and not begun.lstrip().startswith("<think>"):
            shown += b"<think>\n\n</think>\n\n"
        return tokens + self.tokenize_part(shown, special=True) + self.tokenize_part(begun)

    def _apply(self, template: bytes, roles: Sequence[str]) -> bytes:
        """The chat template's text for messages of these roles, with numbered placeholders as contents."""
        turns = [llama.llama_chat_message(role.encode(), b"\x01%d\x02" % n) for n, role in enumerate(roles)]
        chat, buffer = (
            (llama.llama_chat_message * len(turns))(*turns),
            ctypes.create_string_buffer(4096 + 128 * len(turns)),
        )
        for name in (template, b"chatml"):
            size = llama.llama_chat_apply_template(name, chat, len(turns), True, buffer, len(buffer))
            if size >= 0:
                break
        return buffer.raw[:size]


class Sampler:
    """Chooses the next token of one request: the likeliest at temperature 0, else by top-k 40, top-p, min-p,
    temperature and the seed.

    Drafts do not change the choice: each position is sampled in turn, with one random number per token. But the size of
    a batch changes how logits are rounded, so the same seed gives the same text only where the batches are the same.
    """

    def __init__(self, request: CompletionRequest) -> None:
        self.greedy = request.temperature == 0
        self.chain = None
        if self.greedy:
            return
        self.chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        seed = request.seed if request.seed is not None else int.from_bytes(os.urandom(4), "little") % MAX_SEED
        for sampler in (
            llama.llama_sampler_init_top_k(40),
            llama.llama_sampler_init_top_p(request.top_p, 1),
            llama.llama_sampler_init_min_p(0.05, 1),
            llama.llama_sampler_init_temp(request.temperature),
            llama.llama_sampler_init_dist(seed),
        ):
            llama.llama_sampler_chain_add(self.chain, sampler)

    def sample(self, model: Llama, index: int) -> int:
        if self.greedy:
            return model.greedy(index)
        return int(llama.llama_sampler_sample(self.chain, model.context, index))

    def close(self) -> None:
        chain, self.chain = self.chain, None
        if chain:
            llama.llama_sampler_free(chain)


@dataclass(slots=True)
class Slot:
    """A sequence id of the context, and the tokens whose KV it holds. `used` orders idle slots by age."""

    id: int
    tokens: list[int] = field(default_factory=list)
    run: Any = None  # the worker's Run
    used: float = 0.0


# --------------------------------------------------------------------------------- IO: files of a worker


def file_digest(path: Path, tick: Callable[[int], None]) -> str:
    """The file's sha256. After each block `tick` gets the number of bytes read; its exceptions end the reading."""
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while data := file.read(4 * MB):
            digest.update(data)
            done += len(data)
            tick(done)
    return digest.hexdigest()


def file_stamp(path: Path) -> str:
    """The file's size and its ctime in nanoseconds. Programs can set a file's mtime back, but not its ctime."""
    stat = path.stat()
    return f"{stat.st_size}.{stat.st_ctime_ns}"


def check_digest(path: Path, sha256: str, state_dir: Path, stopping: Callable[[], bool]) -> None:
    """ModelError unless the file has this sha256 (empty: not checked). A match is remembered under the file's
    stamp."""
    if not sha256:
        return
    stamp = state_dir / "verified" / f"{path.name}.{file_stamp(path)}.{sha256[:16]}"
    if stamp.exists():
        return

    def tick(_done: int) -> None:
        if stopping():
            raise ModelError("cancelled")

    if (got := file_digest(path, tick)) != sha256:
        raise ModelError(f"expected sha256 {sha256}, got {got}; fetch it again")
    with contextlib.suppress(OSError):
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.touch()


def write_atomically(path: Path, data: bytes) -> None:
    """Replace the file in one step. The file and a new folder are for this user alone."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}")  # a fixed name, so that the next write replaces a killed process's file
    try:
        with open(temporary, "wb", opener=partial(os.open, mode=0o600)) as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:  # a full disk, say
        temporary.unlink(missing_ok=True)
        raise
