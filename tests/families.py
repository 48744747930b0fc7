"""Tiny models of other families: real shapes, random weights, and a vocabulary of bytes with the family's own marks.

    python tests/families.py FOLDER     # writes all of them

llama.cpp itself knows which tensors an architecture has: it makes the model from the header alone, asks for each
tensor's values, and saves the file. A random model writes nonsense, but always the same nonsense, so what is cached,
drafted or batched can be compared with a bare greedy loop.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from harness import ROOT

from cerebrum.vps.gguf import Source  # harness has set the path to it
from cerebrum.vps.llama import start_library
from cerebrum.vps.vocabulary import api

assert ROOT
CONTROL, NORMAL, USER, BYTE = 3, 1, 4, 6  # llama.cpp's kinds of tokens
EMBEDDING, HEADS, FEED_FORWARD = 64, 2, 96
SSM = {"ssm.inner_size": 128, "ssm.conv_kernel": 4, "ssm.state_size": 16, "ssm.time_step_rank": 2, "ssm.group_count": 1}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48, "expert_gating_func": 2}
EXPERTS |= {"expert_shared_feed_forward_length": 48, "expert_shared_count": 1}
MERGES = ["d e", "de f", "i n", "r e", "re t"]
QWEN_MARKS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|file_sep|>", "<|repo_name|>")


@dataclass(frozen=True)
class Family:
    """An architecture's header. `values` are added below its name; `marks` are control tokens, the first is its end."""

    architecture: str
    values: dict[str, Any] = field(default_factory=dict)
    layers: int = 2
    kv_heads: Sequence[int] | int = HEADS
    marks: Sequence[str] = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *QWEN_MARKS)
    plain: Sequence[str] = ()  # marks that the file takes for text
    sentencepiece: bool = False
    template: str = ""
    tokenizer: dict[str, bool] = field(default_factory=dict)  # below "tokenizer.ggml."
    printable: bool = False  # whether the model writes nothing but printable ASCII and line ends, and never its end


FAMILIES = {
    "dense": Family("llama"),
    "moe": Family("qwen2moe", EXPERTS),
    "longrope": Family("llama", {"rope.scaling.original_context_length": 512}),
    "window": Family("gemma3", {"attention.sliding_window": 192}, layers=6),
    "recurrent": Family("mamba", SSM | {"ssm.time_step_rank": 4}, kv_heads=0),
    "hybrid": Family("granitehybrid", SSM | {"ssm.time_step_rank": 4}, layers=4, kv_heads=(0, HEADS, 0, HEADS)),
    "rollback": Family("lfm2", {"shortconv.l_cache": 3}, layers=4, kv_heads=(0, HEADS, 0, HEADS)),
    "delta": Family(
        "qwen35", SSM | {"ssm.state_size": 32, "ssm.inner_size": 64, "full_attention_interval": 2}, layers=4
    ),
}

STARCODER = ("<|endoftext|>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>")
CODELLAMA = ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", "\u2581<EOT>")
MARKED = {  # families whose marks differ
    "starcoder": Family("llama", marks=STARCODER),
    "codegemma": Family(
        "llama", marks=("<eos>", *QWEN_MARKS[:3], "<|file_separator|>"), tokenizer={"add_bos_token": False}
    ),
    "codellama": Family("llama", marks=(), plain=CODELLAMA, sentencepiece=True),
    "codestral": Family("llama", marks=("[PREFIX]", "[SUFFIX]"), sentencepiece=True),
    "gpt-oss": Family(
        "llama",
        marks=("<|return|>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>"),
        template="<|start|>{{ '<|channel|>' }}",
    ),
    "thinking": Family("llama", template="<|im_start|>{{ '<think></think>' }}", plain=("<think>", "</think>")),
    "silent": Family("llama", template="{{ ' \u0410\u0441\u0441\u0438\u0441\u0442\u0435\u043d\u0442:' }}"),
    "base": Family("llama", marks=("<|endoftext|>",)),
    "qwen": Family("llama"),
}

LETTERS_OF_BLANKS = "\u0120\u010a"  # how GPT-2 writes a space and a line end
WIDTH, WIDE_HEADS = 256, 4
# A stand-in for the 0.5B: 24 MB, and about 2 ms a token on one core, so that a completion lasts long enough to be left.
STAND_IN = Family(
    "qwen2",
    {
        "context_length": 32_768,
        "embedding_length": WIDTH,
        "feed_forward_length": 4 * WIDTH,
        "attention.head_count": WIDE_HEADS,
        "attention.key_length": WIDTH // WIDE_HEADS,
        "attention.value_length": WIDTH // WIDE_HEADS,
        "rope.dimension_count": WIDTH // WIDE_HEADS,
    },
    layers=6,
    kv_heads=WIDE_HEADS,
    printable=True,
)


def vocabulary(family: Family) -> tuple[list[str], list[int], list[float]]:
    """(tokens, kinds, scores): the marks, every byte, and some words."""
    words = ["def", "return", "self", "import", "print", "for", "in", "the", "and", "if"]
    if family.sentencepiece:
        tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        kinds = [2, CONTROL, CONTROL] + [BYTE] * 256
        pieces = ["\u2581", *(chr(code) for code in range(33, 127)), *(f"\u2581{word}" for word in words)]
        tokens, kinds = tokens + pieces, kinds + [NORMAL] * len(pieces)
    else:
        letters = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as GPT-2 writes bytes
        others = [byte for byte in range(256) if byte not in letters]
        tokens = [chr(code) for code in letters] + [chr(256 + n) for n in range(len(others))]
        tokens += [merge.replace(" ", "") for merge in MERGES]
        kinds = [NORMAL] * len(tokens)
    tokens, kinds = tokens + list(family.marks), kinds + [CONTROL] * len(family.marks)
    tokens, kinds = tokens + list(family.plain), kinds + [USER if "think" in name else NORMAL for name in family.plain]
    return tokens, kinds, [-float(place) for place in range(len(tokens))]


def write_header(path: Path, family: Family) -> None:
    tokens, kinds, scores = vocabulary(family)
    writer = gguf.GGUFWriter(path, family.architecture)
    numbers: dict[str, Any] = {
        "vocab_size": len(tokens),
        "context_length": 4096,
        "embedding_length": EMBEDDING,
        "block_count": family.layers,
        "feed_forward_length": FEED_FORWARD,
        "attention.head_count": HEADS if isinstance(family.kv_heads, int) else [HEADS] * family.layers,
        "attention.head_count_kv": family.kv_heads if isinstance(family.kv_heads, int) else list(family.kv_heads),
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.key_length": EMBEDDING // HEADS,
        "attention.value_length": EMBEDDING // HEADS,
        "rope.dimension_count": EMBEDDING // HEADS,
        "rope.dimension_sections": [8, 8, 8, 8],
        **family.values,
    }
    for name, value in numbers.items():
        key = f"{family.architecture}.{name}"
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_uint32(key, value)
    writer.add_tokenizer_model("llama" if family.sentencepiece else "gpt2")
    if not family.sentencepiece:
        writer.add_tokenizer_pre("qwen2")
        writer.add_token_merges(MERGES)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_eos_token_id(tokens.index(family.marks[0]) if family.marks else 2)
    for name, value in family.tokenizer.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def silent_tokens(family: Family) -> list[bool]:
    """For each token, whether the family never writes it."""
    tokens, kinds, _ = vocabulary(family)
    return [
        family.printable and (kind != NORMAL or not (token.isascii() or token in LETTERS_OF_BLANKS))
        for token, kind in zip(tokens, kinds, strict=True)
    ]


def fill(tensor: int, name: str, seed: int, silent: Sequence[bool]) -> None:
    """Give a tensor its values: the same for the same name and seed. The logit of a silent token is always 0."""
    lib = ggml()
    lib.ggml_nelements.restype, lib.ggml_nelements.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
    lib.ggml_backend_tensor_set.restype = None
    lib.ggml_backend_tensor_set.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
    kind = gguf.GGMLQuantizationType(ctypes.c_int.from_address(tensor).value)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    values = np.random.default_rng(list(digest)).normal(0, 0.3, lib.ggml_nelements(tensor)).astype(np.float32)
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


def make(path: Path, family: Family, seed: int = 1) -> Path:
    """Write the model's file."""
    header = path.with_suffix(".header")
    write_header(header, family)
    lib, silent = ggml(), silent_tokens(family)
    lib.ggml_get_name.restype, lib.ggml_get_name.argtypes = ctypes.c_char_p, (ctypes.c_void_p,)

    @api.llama_model_set_tensor_data_t  # type: ignore[untyped-decorator]
    def give(tensor: int, _data: object) -> None:
        fill(tensor, lib.ggml_get_name(tensor).decode(), seed, silent)

    lib.gguf_init_from_file.restype, lib.gguf_init_from_file.argtypes = ctypes.c_void_p, (ctypes.c_char_p, GgufParams)
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
        Source(plain).write(path, {}, {"tokenizer.chat_template": family.template})
        plain.unlink()
    return path


QUANTIZED_VOCABULARY, QUANTIZED_WIDTH, QUANTIZED_FEED = 2048, 256, 512
HALVES = {"Q5_0": slice(2), "Q4_K": slice(4), "Q6_K": slice(-2, None), "Q8_0": slice(2)}  # where blocks have fp16


def write_quantized(path: Path, layers: int = 8, output: str = "Q6_K", types: Sequence[str] = ("Q4_K", "Q6_K")) -> Path:
    """A GGUF with random weights: `attn_q` is Q5_0, and `ffn_down` in turn of these types. Without a type for the
    output matrix the embedding serves as one."""
    writer = gguf.GGUFWriter(path, "qwen2")
    numbers = {
        "block_count": layers,
        "embedding_length": QUANTIZED_WIDTH,
        "attention.head_count": 4,
        "feed_forward_length": QUANTIZED_FEED,
    }
    for name, value in numbers.items():
        writer.add_uint32(f"qwen2.{name}", value)
    writer.add_token_list([f"t{i}" for i in range(QUANTIZED_VOCABULARY)])
    matrices = [("token_embd.weight", "Q6_K", (QUANTIZED_VOCABULARY, QUANTIZED_WIDTH))]
    matrices += [("output.weight", output, (QUANTIZED_VOCABULARY, QUANTIZED_WIDTH))] if output else []
    for i in range(layers):
        matrices.append((f"blk.{i}.attn_q.weight", "Q5_0", (QUANTIZED_WIDTH, QUANTIZED_WIDTH)))
        matrices.append((f"blk.{i}.ffn_down.weight", types[i % len(types)], (QUANTIZED_WIDTH, QUANTIZED_FEED)))
        matrices.append((f"blk.{i}.ffn_up_exps.weight", "Q5_0", (2, QUANTIZED_WIDTH, QUANTIZED_WIDTH)))
    rng = np.random.default_rng(1)
    for name, kind, shape in matrices:
        number = gguf.GGMLQuantizationType[kind]
        if kind == "F16":
            writer.add_tensor(name, rng.normal(0, 0.05, shape).astype(np.float16))
            continue
        size, width = gguf.GGML_QUANT_SIZES[number]
        blocks = rng.integers(0, 256, (math.prod(shape) // size, width), np.uint8)
        halves = blocks[:, HALVES[kind]]
        halves[:] = np.full((len(blocks), halves.shape[1] // 2), 0.001, "<f2").view(np.uint8)
        writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    start_library()
    for name, family in FAMILIES.items():
        print(make(Path(sys.argv[1]) / f"{name}.gguf", family))
