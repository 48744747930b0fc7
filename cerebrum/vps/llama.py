"""llama.cpp through the ctypes API of llama-cpp-python: settings, and a model with its
sequences.

A model belongs to the thread that loaded it. Shortcut: a model's jinja chat template is never run
(CVE-2024-34359); llama.cpp's own table of templates is used.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from cerebrum.vps.vocabulary import Vocabulary, api, metadata

MB = 1 << 20
# ----------------------------------------------------------------------------------------- settings

MAX_DRAFT = 63
KV_TYPES = {"f16": api.GGML_TYPE_F16, "q8_0": api.GGML_TYPE_Q8_0}


def cpus() -> int:
    """The number of hardware threads that this process may use."""
    return len(os.sched_getaffinity(0))


def usable_cores() -> int:
    """Number of physical cores that this process may use. A second thread on a core usually only
    makes llama.cpp wait.
    """
    return min(cpus(), psutil.cpu_count(logical=False) or cpus())


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is run: as configured, but for a context that fits into memory, and for what
    `tune` found.
    """

    threads: int = field(default_factory=usable_cores)
    n_ctx: int = 4096  # tokens of one sequence, its prompt and completion together
    sequences: int = 2  # at a time
    early: int = 0  # further sequences, in the cells of these, for answers of a draft model
    kv_type: str = "f16"  # of the KV cache; q8_0 takes half the memory
    micro_batch: int = 256  # tokens of a chunk computed together; their attention takes memory
    flash_attention: bool = True
    fixed_threads: bool = False  # the user chose the number of threads
    cache_mb: int = 256  # of parked sequences, in memory and on disk
    draft: bool = True
    # Logits that a decode may give for a sequence: after one token and after each of its draft.
    outputs: int = MAX_DRAFT + 1
    # Of parked sequences, tuned files, and notes of verified files.
    state_dir: Path = field(default_factory=lambda: Path("~/.local/state/cerebrum").expanduser())

    @property
    def context(self) -> str:
        """In words, for messages."""
        return f"a context of {self.n_ctx:,} tokens and {self.sequences} at a time"


MAX_CHUNK = 512  # n_batch
HEAL_CANDIDATES = 512  # likeliest tokens that are checked
# Drafted tokens that a recurrent model can take back, where llama.cpp keeps the states between.
ROLLBACK = 4
# ------------------------------------------------------------------------------------ IO: llama.cpp


class ModelError(Exception):
    """A model file that llama.cpp cannot load. The message is fit for a client."""


class _Log(threading.local):
    """llama.cpp's latest messages on this thread."""

    def __init__(self) -> None:
        self.lines = deque[str](maxlen=1000)


llama_log = _Log()


@api.llama_log_callback  # type: ignore[untyped-decorator]
def keep_log(_level: int, text: bytes, _data: Any) -> None:
    llama_log.lines.append(text.decode("utf-8", "replace").rstrip())


@functools.cache
def start_library() -> None:
    """Set up llama.cpp, once in a process."""
    api.llama_log_set(keep_log, None)
    api.llama_backend_init()


ABORTED = 2  # returned by llama_decode after the abort callback has returned true


def load_model(
    path: Path,
    give_up: Callable[[float], bool] | None = None,
    weights: bool = True,
    mapped: bool = False,
) -> Any:
    """A llama_model. Without `weights`, llama.cpp only knows their sizes; `mapped` ones are in
    memory that the system may take back. `give_up` gets the share that has been read, now and then.
    ModelError if llama.cpp cannot load the file, or `give_up` returns True. OSError if the file
    cannot be read.
    """
    start_library()
    path.open("rb").close()
    params = api.llama_model_default_params()
    if give_up:
        go_on = api.llama_progress_callback(lambda done, _data: not give_up(done))
        params.progress_callback = go_on
    # Not mapped: many weights are repacked in memory, and the mapped pages would stay as well. The
    # system counts mapped pages as available memory, so a second model would seem to fit.
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP if mapped else api.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = not mapped
    params.no_alloc = not weights
    if model := api.llama_model_load_from_file(os.fsencode(path), params):
        return model
    raise ModelError(
        "llama.cpp cannot load this file; it is damaged, cut short or of an unknown kind"
    )


def check_kind(model: Any, context: Any) -> None:
    """ModelError unless a llama_model goes on with a text token by token. In a decode of more than
    a micro-batch by another kind, llama.cpp ends the process.
    """
    if not context:
        raise ModelError(
            "llama.cpp cannot make a context for this model; there is too little memory"
        )
    if api.llama_model_has_encoder(model) or not api.llama_get_memory(context):
        kind = "a diffusion model" if api.llama_model_is_diffusion(model) else "an encoder"
        architecture = metadata(model, "general.architecture")
        raise ModelError(f"it is {kind} ({architecture}), which cannot complete a text")


def is_recurrent(model: Any) -> bool:
    """Whether a llama_model has recurrent states, alone or beside a KV cache."""
    return bool(api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model))


def context_params(model: Any, settings: Settings) -> Any:
    """llama.cpp's parameters of a context for a llama_model."""
    # In a decode of more than its context, llama.cpp ends the process.
    n_ctx = min(settings.n_ctx, max(256, api.llama_model_n_ctx_train(model) or settings.n_ctx))
    params = api.llama_context_default_params()
    params.n_ctx = n_ctx * settings.sequences
    params.n_batch = MAX_CHUNK
    params.n_ubatch = settings.micro_batch
    params.n_threads = params.n_threads_batch = settings.threads
    # LLAMA_FLASH_ATTN_TYPE_ENABLED is 1, _DISABLED is 0; the default lets llama.cpp choose. A
    # quantized cache needs it.
    params.flash_attn_type = settings.flash_attention or settings.kv_type != "f16"
    params.type_k = params.type_v = KV_TYPES[settings.kv_type]
    params.kv_unified = can_share_cells(model, settings, n_ctx)
    params.n_seq_max = settings.sequences + settings.early * params.kv_unified
    # By default the logits buffer would take 300 MB.
    params.n_outputs_max = params.n_seq_max * settings.outputs
    params.swa_full = False  # layers with a sliding window keep only the window
    params.n_rs_seq = ROLLBACK
    params.no_perf = True
    return params


def can_share_cells(model: Any, settings: Settings, n_ctx: int) -> bool:
    """Whether one KV cache serves all sequences. They then share a micro-batch, and a prefix
    without copying it.
    """
    # Cells that two sequences share never leave a sliding window, which would fill up.
    if api.llama_model_n_swa(model):
        return False
    # LongRoPE chooses its factors by the size of all sequences together.
    architecture = metadata(model, "general.architecture")
    original = int(metadata(model, f"{architecture}.rope.scaling.original_context_length") or 0)
    if n_ctx <= original < n_ctx * settings.sequences:
        return False
    # Idle cells slow the running sequences, so they are in the way if too large to be parked.
    if is_recurrent(model):
        return True
    heads = api.llama_model_n_layer(model) * api.llama_model_n_head_kv(model)
    width = api.llama_model_n_embd(model) // max(1, api.llama_model_n_head(model))
    # A sequence's K and V have two bytes each.
    return not 0 < settings.cache_mb * MB < 4 * n_ctx * heads * width


BYTES = ctypes.POINTER(ctypes.c_uint8)


class Llama:
    """One model and its context: the ctypes calls and nothing else.

    Only its worker's thread uses it, except for its vocabulary and `abort`, which sets a byte. A
    draft model shares the byte of its model.
    """

    def __init__(
        self,
        path: Path,
        settings: Settings,
        give_up: Callable[[float], bool] | None = None,
        fim: Sequence[str] = (),
        layout: str = "psm",
        abort_flag: Any = None,
        mapped: bool = False,
    ) -> None:
        self.model = load_model(path, give_up, mapped=mapped)
        self.vocabulary = Vocabulary(self.model, fim, layout)
        self.n_vocab = int(api.llama_vocab_n_tokens(self.vocabulary.vocab))
        self.window = api.llama_model_n_swa(self.model)  # tokens; 0: no sliding window
        # A recurrent state can take back only its last few tokens, right after they were decoded.
        self.recurrent = is_recurrent(self.model)
        self.abort_flag = abort_flag or ctypes.create_string_buffer(2)
        self.batch = api.llama_batch_init(MAX_CHUNK, 0, 1)
        for i in range(MAX_CHUNK):
            self.batch.n_seq_id[i] = 1
        params = context_params(self.model, settings)
        self.n_ctx = int(params.n_ctx) // settings.sequences
        self.unified = params.kv_unified
        # llama.cpp calls the abort callback for every graph node, and a Python function would take
        # the GIL each time. The C library's strlen has a matching signature, and returns 1 if a
        # string's only byte is set.
        params.abort_callback = ctypes.cast(ctypes.CDLL(None).strlen, api.ggml_abort_callback)
        params.abort_callback_data = ctypes.addressof(self.abort_flag)
        self.context = api.llama_init_from_model(self.model, params)
        try:
            check_kind(self.model, self.context)
        except ModelError:
            self.close()
            raise
        self.memory = api.llama_get_memory(self.context)
        self.micro_batch = settings.micro_batch
        self.outputs = settings.outputs
        self.max_draft = int(api.llama_n_rs_seq(self.context)) if self.recurrent else MAX_DRAFT

    def close(self) -> None:
        self.vocabulary.close()
        api.llama_batch_free(self.batch)
        api.llama_free(self.context)  # which may be NULL
        api.llama_model_free(self.model)

    def abort(self) -> None:
        """Make a running `decode` end soon. Called by any thread."""
        self.abort_flag[0] = b"\x01"

    def decode(self, parts: Sequence[Part]) -> int:
        """One `llama_decode`. Returns 0, or ABORTED; anything else is a fault."""
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
        return int(api.llama_decode(self.context, batch))

    def logits(self, index: int) -> Any:
        """float32[n_vocab] for batch position `index`: llama.cpp's own buffer, valid until the next
        decode.
        """
        return np.ctypeslib.as_array(api.llama_get_logits_ith(self.context, index), (self.n_vocab,))

    def greedy(self, index: int) -> int:
        """The likeliest token at batch position `index`. Of equally likely tokens the first is
        taken, as in llama.cpp's greedy sampler.
        """
        return int(self.logits(index).argmax())

    def probability(self, index: int, token: int) -> float:
        """Of `token` at batch position `index`, at a temperature of 1, whatever the request samples
        with. 0.0 if the logits are no numbers.
        """
        row = self.logits(index)
        total = float(np.exp(row - row[token]).sum())
        return 1 / total if total >= 1 else 0.0

    def restrict(self, index: int, start: bytes) -> None:
        """Exclude every token at batch position `index` that contradicts the text `start`. A token
        may cover a part of `start` or go beyond it. Only the likeliest tokens and the tokenizer's
        own choice are checked and can stay.

        White space is covered as the tokenizer covers it, except for its last character, which may
        belong to the next word. A model that has begun to indent a line space by space may go on
        with spaces until its limit.
        """
        row = self.logits(index)
        likeliest = np.argpartition(row, -HEAL_CANDIDATES)[-HEAL_CANDIDATES:].tolist()
        own = self.vocabulary.tokenize_bytes(start, False, False)[0]
        shortest = 1
        if start.isspace():
            shortest = max(1, len(self.vocabulary.piece(own)) - 1)

        def fits(token: int) -> bool:
            piece = self.vocabulary.piece(token)
            return len(piece) >= shortest and piece[: len(start)] == start[: len(piece)]

        fitting = list(filter(fits, [*likeliest, own]))
        logits = row[fitting]
        row.fill(-np.inf)
        row[fitting] = logits

    def computed(self, slot: Slot) -> int:
        """Number of tokens in the slot's KV cells. After an abort they include the decode's
        finished micro-batches.
        """
        return int(api.llama_memory_seq_pos_max(self.memory, slot.id)) + 1

    def trim(self, slot: Slot, length: int) -> bool:
        """Drop the slot's cells from position `length` on. False if what is left cannot be
        continued: a recurrent state has gone further, or a sliding window lacks cells.
        """
        done = bool(api.llama_memory_seq_rm(self.memory, slot.id, length, -1))
        if not self.window or not length:
            return done
        first = api.llama_memory_seq_pos_min(self.memory, slot.id)
        return done and 0 <= first <= max(0, length - self.window)

    def cut(self, slot: Slot, length: int) -> None:
        """Drop the slot's tokens from `length` on, or all if the rest could not be continued, and
        whatever an aborted decode has left.
        """
        if not self.trim(slot, length):
            length = 0
            self.trim(slot, 0)
        del slot.tokens[length:]

    def copy_prefix(self, source: Slot, target: Slot, length: int) -> bool:
        """Let the empty `target` share the first cells of `source`; False if llama.cpp cannot."""
        # llama.cpp would copy only at the next decode, when the source may be another sequence.
        if not self.unified:
            return self.restore(target, self.save(source))
        api.llama_memory_seq_cp(self.memory, source.id, target.id, 0, length)
        return True

    def state_size(self, slot: Slot) -> int:
        """Bytes of the slot's KV state."""
        return int(api.llama_state_seq_get_size(self.context, slot.id))

    def save(self, slot: Slot) -> memoryview:
        """The slot's KV state, for `restore`. It can have hundreds of megabytes, so nothing copies
        it again.
        """
        state = np.empty(self.state_size(slot), np.uint8)
        data = state.ctypes.data_as(BYTES)
        size = api.llama_state_seq_get_data(self.context, data, len(state), slot.id)
        return state[:size].data

    def restore(self, slot: Slot, state: bytes | memoryview) -> bool:
        """Fill the empty slot with a state that `save` returned for any slot; False if llama.cpp
        rejects the state.
        """
        data = np.frombuffer(state, np.uint8).ctypes.data_as(BYTES)
        read = int(api.llama_state_seq_set_data(self.context, data, len(state), slot.id))
        return read == len(state)


@dataclass(slots=True)
class Slot:
    """A sequence id of the context, and the tokens whose KV it holds. `used` orders idle slots by
    age.
    """

    id: int
    tokens: list[int] = field(default_factory=list)
    run: Any = None  # a `Run`; None: the slot is idle
    used: float = 0.0
    low: bool = False  # the sequence is a request's of low priority


# Of a decode: the slot, the tokens to append to it, and how many of the last ones get logits.
Part = tuple[Slot, list[int], int]
