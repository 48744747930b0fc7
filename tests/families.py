"""Tiny models of other families: real shapes, random weights, and a vocabulary of bytes with the
family's own marks.

llama.cpp itself knows which tensors an architecture has: it makes the model from the header alone,
asks for each tensor's values, and saves the file. A random model writes nonsense, but always the
same nonsense, so what is cached, drafted or batched can be compared with a bare greedy loop.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from harness import ROOT

from cerebrum.vps.encoding import Passport  # harness has set the path to it
from cerebrum.vps.gguf import Source
from cerebrum.vps.llama import start_library
from cerebrum.vps.vocabulary import api

assert ROOT
NORMAL, UNKNOWN = 1, 2  # llama.cpp's kinds of tokens
CONTROL, USER = 3, 4
BYTE = 6
EMBEDDING, HEADS = 64, 2
SIZES = json.loads("""{
    "context_length": 4096, "embedding_length": 64, "feed_forward_length": 96,
    "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5,
    "attention.key_length": 32, "attention.value_length": 32,
    "rope.dimension_count": 32, "rope.dimension_sections": [8, 8, 8, 8]}""")
MERGES = ["d e", "de f", "i n", "r e", "re t"]
QWEN_MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>", "<|repo_name|>")


def tuned_passport(source: str = "abc", **seconds: Any) -> Passport:
    """The passport of a tuned file that any machine may have."""
    return Passport(source, "", "", "", 2, 2, True, {"Q4_K": "Q4_1"}, 0, **seconds)


@dataclass(frozen=True)
class Family:
    """An architecture's header. `values` are added below its name; `marks` are control tokens, the
    first is its end.
    """

    architecture: str = "llama"
    values: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    kv_heads: Sequence[int] | int = HEADS
    marks: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_MARKS)
    plain: Sequence[str] = ()  # marks that the file takes for text
    sentencepiece: bool = False
    pre: str = "qwen2"  # how a text is split before it is tokenized
    template: str = ""
    tokenizer: dict[str, bool] = field(default_factory=dict)  # below "tokenizer.ggml."
    # whether the model writes nothing but printable ASCII and line ends, and never its end
    printable: bool = False


def families_of(text: str) -> dict[str, Family]:
    return {name: Family(**members) for name, members in json.loads(text).items()}


# Of each kind of state that we treat in a way of its own. Two have attention in every second layer.
FAMILIES = families_of("""{
    "dense": {},
    "longrope": {"values": {"rope.scaling.original_context_length": 512}},
    "window": {"architecture": "gemma3", "values": {"attention.sliding_window": 192}, "layers": 6},
    "recurrent": {
        "architecture": "mamba", "kv_heads": 0,
        "values": {"ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.state_size": 16,
                   "ssm.time_step_rank": 4, "ssm.group_count": 1}},
    "hybrid": {
        "architecture": "granitehybrid", "layers": 4, "kv_heads": [0, 2, 0, 2],
        "values": {"ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.state_size": 16,
                   "ssm.time_step_rank": 4, "ssm.group_count": 1}},
    "rollback": {
        "architecture": "lfm2", "layers": 4, "kv_heads": [0, 2, 0, 2],
        "values": {"shortconv.l_cache": 3}}}""")

# Families whose marks differ.
MARKED = families_of(r"""{
    "starcoder": {
        "marks": ["<|endoftext|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"]},
    "codegemma": {
        "marks": ["<eos>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
                  "<|file_separator|>"],
        "tokenizer": {"add_bos_token": false}},
    "codellama": {
        "marks": [], "plain": ["\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>"],
        "sentencepiece": true},
    "codestral": {"marks": ["[PREFIX]", "[SUFFIX]"], "sentencepiece": true},
    "gpt-oss": {
        "marks": ["<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"],
        "template": "<|start|>{{ '<|channel|>' }}"},
    "thinking": {
        "template": "<|im_start|>{{ '<think></think>' }}", "plain": ["<think>", "</think>"]},
    "silent": {"template": "{{ ' \u0410\u0441\u0441\u0438\u0441\u0442\u0435\u043d\u0442:' }}"},
    "base": {"marks": ["<|endoftext|>"]},
    "qwen": {}}""")

LETTERS_OF_BLANKS = "\u0120\u010a"  # how GPT-2 writes a space and a line end
WIDE = json.loads("""{
    "context_length": 32768, "embedding_length": 256, "feed_forward_length": 1024,
    "attention.head_count": 4, "attention.key_length": 64, "attention.value_length": 64,
    "rope.dimension_count": 64}""")
# A stand-in for the 0.5B: 24 MB, and about 2 ms a token on one core, so that a completion lasts
# long enough to be left.
STAND_IN = Family("qwen2", WIDE, layers=6, kv_heads=4, printable=True)


def vocabulary(family: Family) -> tuple[list[str], list[int], list[float]]:
    """(tokens, kinds, scores): the marks, every byte, and some words."""
    words = "def return self import print for in the and if"
    if family.sentencepiece:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        pieces = ["\u2581", *map(chr, range(33, 127)), *(f"\u2581{word}" for word in words.split())]
        kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(pieces)
        tokens += pieces
    else:
        letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 writes bytes
        others = [byte for byte in range(256) if byte not in letters]
        tokens = [*map(chr, letters), *map(chr, range(256, 256 + len(others)))]
        tokens += [merge.replace(" ", "") for merge in MERGES]
        kinds = [NORMAL] * len(tokens)
    tokens += [*family.marks, *family.plain]
    kinds += [CONTROL] * len(family.marks)
    kinds += [USER if "think" in name else NORMAL for name in family.plain]
    return tokens, kinds, [-float(number) for number in range(len(tokens))]


def write_header(path: Path, family: Family) -> None:
    tokens, kinds, scores = vocabulary(family)
    writer = gguf.GGUFWriter(path, family.architecture)
    numbers: dict[str, Any] = {"vocab_size": len(tokens), "block_count": family.layers, **SIZES}
    if isinstance(family.kv_heads, int):
        heads: dict[str, Any] = {"head_count": HEADS, "head_count_kv": family.kv_heads}
    else:
        heads = {"head_count": [HEADS] * family.layers, "head_count_kv": [*family.kv_heads]}
    numbers |= {f"attention.{name}": value for name, value in heads.items()}
    add = {list: writer.add_array, float: writer.add_float32, int: writer.add_uint32}
    for name, value in (numbers | family.values).items():
        add[type(value)](f"{family.architecture}.{name}", value)
    writer.add_tokenizer_model("llama" if family.sentencepiece else "gpt2")
    if not family.sentencepiece:
        writer.add_tokenizer_pre(family.pre)
        writer.add_token_merges(MERGES)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_eos_token_id(tokens.index(family.marks[0]) if family.marks else 2)
    for name, value in family.tokenizer.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def silent_tokens(family: Family) -> list[bool]:
    """For each token, whether the family never writes it."""
    tokens, kinds, _ = vocabulary(family)
    printable = [token.isascii() or token in LETTERS_OF_BLANKS for token in tokens]
    return [
        family.printable and not (kind == NORMAL and ok)
        for kind, ok in zip(kinds, printable, strict=True)
    ]


def fill(tensor: int, name: str, seed: int, silent: Sequence[bool]) -> None:
    """Give a tensor its values: the same for the same name and seed. The logit of a silent token is
    always 0.
    """
    lib = ggml()
    lib.ggml_nelements.restype, lib.ggml_nelements.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    pointers, sizes = [ctypes.c_void_p] * 2, [ctypes.c_size_t] * 2
    lib.ggml_backend_tensor_set.argtypes = [*pointers, *sizes]
    kind = gguf.GGMLQuantizationType(ctypes.c_int.from_address(tensor).value)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    rng = np.random.default_rng(list(digest))
    values = rng.normal(0, 0.3, lib.ggml_nelements(tensor)).astype(np.float32)
    if "ssm_a" in name:
        values = -np.abs(values)  # a state decays
    elif "norm" in name:
        values = 1 + values / 3
    elif name == "output.weight":
        values.reshape(len(silent), -1)[silent] = 0
    data = values if kind == gguf.GGMLQuantizationType.F32 else values.astype(np.float16)
    lib.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)


def ggml() -> ctypes.CDLL:
    return ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))


class GgufParams(ctypes.Structure):  # struct gguf_init_params
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def copy_with(source: Source, path: Path, **values: str | int) -> None:
    """Write a copy that has these tensors, and these values in its header."""
    fields = source.reader.fields
    writer = gguf.GGUFWriter(path, fields["general.architecture"].contents())
    for name, old in fields.items():
        if old.data and not name.startswith(("GGUF.", "general.architecture")):
            writer.add_key_value(name, old.contents(), old.types[0], old.types[-1])
    for name, value in values.items():
        kind = "STRING" if isinstance(value, str) else "UINT32"
        writer.add_key_value(name.replace("__", "."), value, gguf.GGUFValueType[kind])
    for tensor in source.tensors:
        kind = gguf.GGMLQuantizationType[tensor.type]
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=kind)
    finish(writer)


def make(path: Path, family: Family, seed: int = 1) -> Path:
    """Write the model's file."""
    header = path.with_suffix(".header")
    write_header(header, family)
    lib, silent = ggml(), silent_tokens(family)
    lib.ggml_get_name.restype, lib.ggml_get_name.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)

    @api.llama_model_set_tensor_data_t  # type: ignore[untyped-decorator]
    def give(tensor: int, _data: object) -> None:
        fill(tensor, lib.ggml_get_name(tensor).decode(), seed, silent)

    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = ctypes.c_char_p, GgufParams
    lib.gguf_free.argtypes = (ctypes.c_void_p,)
    file = lib.gguf_init_from_file(str(header).encode(), GgufParams(True, None))
    model = api.llama_model_init_from_user(file, give, None, api.llama_model_default_params())
    assert model, f"llama.cpp cannot make a model of {family.architecture}"
    api.llama_model_save_to_file(model, str(path).encode())
    api.llama_model_free(model)
    lib.gguf_free(file)
    header.unlink()
    if family.template:  # which the library does not save
        plain = path.rename(path.with_suffix(".plain"))
        copy_with(Source(plain), path, tokenizer__chat_template=family.template)
        plain.unlink()
    return path


HALVES = {"Q5_0": slice(2), "Q4_K": slice(4), "Q6_K": slice(-2, None)}  # where blocks have fp16


def write_quantized(path: Path, layers: int = 8) -> Path:
    """A GGUF with random weights: `attn_q` is Q5_0, and `ffn_down` Q4_K and Q6_K in turn."""
    writer = gguf.GGUFWriter(path, "qwen2")
    width, feed_forward = 256, 512
    vocabulary = 2048
    writer.add_block_count(layers)
    writer.add_embedding_length(width)
    writer.add_head_count(4)
    writer.add_feed_forward_length(feed_forward)
    writer.add_token_list([f"t{i}" for i in range(vocabulary)])
    matrices: list[tuple[str, str, tuple[int, ...]]] = [
        (f"{name}.weight", "Q6_K", (vocabulary, width)) for name in ("token_embd", "output")
    ]
    for i in range(layers):
        down_type = "Q6_K" if i % 2 else "Q4_K"
        matrices.append((f"blk.{i}.attn_q.weight", "Q5_0", (width, width)))
        matrices.append((f"blk.{i}.ffn_down.weight", down_type, (width, feed_forward)))
        matrices.append((f"blk.{i}.ffn_up_exps.weight", "Q5_0", (2, width, width)))
    rng = np.random.default_rng(1)
    for name, kind, shape in matrices:
        number = gguf.GGMLQuantizationType[kind]
        size, block_bytes = gguf.GGML_QUANT_SIZES[number]
        blocks = rng.integers(0, 256, (math.prod(shape) // size, block_bytes), np.uint8)
        halves = blocks[:, HALVES[kind]]
        scales = np.full((len(blocks), halves.shape[1] // 2), 0.001, "<f2")
        halves[:] = scales.view(np.uint8)
        writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=number)
    finish(writer)
    return path


# ------------------------------------------------------------------------------------ the reference


class Reference:
    """A greedy loop over llama_decode, one token at a time: nothing is cached, drafted or
    batched.
    """

    def __init__(self, path: Path, n_ctx: int = 2048, flash: bool = True) -> None:
        start_library()
        self.model = api.llama_model_load_from_file(
            str(path).encode(), api.llama_model_default_params()
        )
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)
        params = api.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = 1
        params.flash_attn_type = int(flash)
        self.context = api.llama_init_from_model(self.model, params)

    def close(self) -> None:
        api.llama_free(self.context)
        api.llama_model_free(self.model)

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        data = text.encode()
        buffer = (api.llama_token * (len(data) + 8))()
        room = len(buffer)
        count = api.llama_tokenize(self.vocab, data, len(data), buffer, room, True, special)
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        size = api.llama_token_to_piece(self.vocab, token, buffer, 256, 0, False)
        return buffer.raw[:size]

    def is_end(self, token: int) -> bool:
        return bool(api.llama_vocab_is_eog(self.vocab, token))

    def greedy(self, prompt: Sequence[int], most: int) -> tuple[list[bytes], list[float]]:
        """The pieces of at most `most` tokens, and for each token its lead in logits over the
        second likeliest. Leaves their probabilities in `sure`.
        """
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        pieces, gaps = list[bytes](), list[float]()
        self.sure = list[float]()
        todo = prompt
        while True:
            for start in range(0, len(todo), 512):
                part = todo[start : start + 512]
                tokens = (api.llama_token * len(part))(*part)
                batch = api.llama_batch_get_one(tokens, len(part))
                assert api.llama_decode(self.context, batch) == 0
            row = api.llama_get_logits_ith(self.context, -1)
            logits = np.ctypeslib.as_array(row, (self.n_vocab,))
            token = int(logits.argmax())
            second, first = np.partition(logits, -2)[-2:]
            gaps.append(float(first - second))
            self.sure.append(1 / float(np.exp(logits - logits[token]).sum()))
            if not self.is_end(token):
                pieces.append(self.piece(token))
            if len(pieces) == most or len(pieces) < len(gaps):
                return pieces, gaps
            todo = [token]
