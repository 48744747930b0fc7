"""Predict how fast each model would be on this machine, without its file, and choose the best that is fast enough.

A model is imitated by a *sample*: a part of its layers and the same part of its vocabulary, with its shapes and the
types of a Q4_K_M file. A sample's times are that part of the model's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cerebrum.vps.encoding import FAITHFUL, READ_TOKENS, alone_in, measure, opened
from cerebrum.vps.gguf import pypi
from cerebrum.vps.llama import Settings
from cerebrum_common import Model

SAMPLE_WEIGHTS = 350_000_000  # at least, 200 MB: less would stay in the caches of most CPUs
SAMPLE_TOKENS = 512  # read by each
SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # the types of rows that are no multiple of 256
Matrix = tuple[str, str, tuple[int, ...]]  # name, type, and the number of experts (if any), rows and columns


def matrices(shape: Mapping[str, int], layers: int, vocabulary: int) -> list[Matrix]:
    """The matrices of a model of this shape (models.toml), with this many layers and tokens. A Q4_K_M file has about
    half of attn_v and ffn_down in Q6_K."""
    width, forward = shape["width"], shape["feed_forward"]
    heads, keys = shape["heads"] * shape["head"], shape["kv_heads"] * shape["head"]
    count, suffix = ((shape["experts"],), "_exps") if shape["experts"] else ((), "")
    found: list[Matrix] = [("output", "Q6_K", (vocabulary, width))]
    for layer, better in zip(range(layers), ("Q4_K", "Q6_K") * layers, strict=False):
        of_layer: list[Matrix] = [
            ("attn_q", "Q4_K", (heads, width)),
            ("attn_k", "Q4_K", (keys, width)),
            ("attn_v", better, (keys, width)),
            ("attn_output", "Q4_K", (width, heads)),
            (f"ffn_gate{suffix}", "Q4_K", (*count, forward, width)),
            (f"ffn_up{suffix}", "Q4_K", (*count, forward, width)),
            (f"ffn_down{suffix}", better, (*count, width, forward)),
        ]
        found += [(f"blk.{layer}.{name}", kind, size) for name, kind, size in of_layer]
    return [(name, SMALL_BLOCKS[kind] if size[-1] % 256 else kind, size) for name, kind, size in found]


def write_sample(path: Path, shape: Mapping[str, int], weights: Sequence[Matrix], layers: int) -> None:
    """A model of these matrices, for llama.cpp's architecture of the plain transformer."""
    writer, random, width = pypi().GGUFWriter(path, "llama"), np.random.default_rng(1), shape["width"]
    vocabulary, ones = weights[0][2][0], np.ones(width, np.float32)
    numbers = {
        "block_count": layers,
        "context_length": 1 << 15,
        "vocab_size": vocabulary,
        "embedding_length": width,
        "feed_forward_length": shape["feed_forward"],
        "attention.head_count": shape["heads"],
        "attention.head_count_kv": shape["kv_heads"],
        "expert_count": shape["experts"],
        "expert_used_count": shape["used"],
        **dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), shape["head"]),
    }
    for name, number in numbers.items():
        writer.add_uint32(f"llama.{name}", number)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    # Random, so that each token goes to other experts.
    rows = random.normal(size=(1009, width)).astype(np.float16)
    tensors = {"token_embd": np.resize(rows, (vocabulary, width)), "output_norm": ones}
    for layer in range(layers):
        tensors |= dict.fromkeys((f"blk.{layer}.attn_norm", f"blk.{layer}.ffn_norm"), ones)
        if shape["experts"]:
            tensors[f"blk.{layer}.ffn_gate_inp"] = random.normal(size=(shape["experts"], width)).astype(np.float32)
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values)
    for name, kind, size in weights:
        raw = pypi().GGMLQuantizationType[kind]
        data = np.zeros(pypi().quants.quant_shape_to_byte_shape(size, raw), np.uint8)  # no kernel looks at them
        writer.add_tensor(f"{name}.weight", data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Speed(NamedTuple):
    """What to expect of a model; of one without a known shape nothing."""

    rate: float = 0.0  # tokens a second
    wait: float = math.inf  # seconds to the first token behind READ_TOKENS new ones


def predict(shape: Mapping[str, int], settings: Settings) -> Speed:
    """The speed of a model of this shape here, with the types and the attention that are faster, as `tune` will find
    them. ModelError if llama.cpp fails, TuneError while a model is being tuned."""
    whole = matrices(shape, shape["layers"], shape["vocabulary"])
    samples = shape["layers"] * SAMPLE_WEIGHTS / sum(math.prod(size) for _, _, size in whole)
    layers = min(shape["layers"], 2 * math.ceil(samples / 2))
    part, times = layers / shape["layers"], []
    published = matrices(shape, layers, round(shape["vocabulary"] * part))
    for types in ({}, FAITHFUL):
        weights = [(name, types.get(kind, kind), size) for name, kind, size in published]
        with alone_in(settings.state_dir / "tuned") as folder:
            write_sample(path := folder / "sample.gguf", shape, weights, layers)
            for used in (settings, replace(settings, flash_attention=False)):
                with opened(path, used) as model:
                    times.append(measure(model, SAMPLE_TOKENS))
    best = min(times, key=lambda timing: timing.work)
    return Speed(part / best.decode[1], READ_TOKENS * best.read / part)


# -------------------------------------------------------------------------------------------- the choice

Speeds = Sequence[tuple[Model, Speed]]


def best_of(speeds: Speeds, least_rate: float) -> Model | None:
    """The first of those with most languages that writes `least_rate` tokens a second; if none does, the fastest."""
    most = max((len(model.languages) for model, _ in speeds), default=0)
    rates = [(speed.rate, model) for model, speed in speeds if len(model.languages) == most]
    fastest = max(rates, key=lambda pair: pair[0], default=(0.0, None))[1]
    return next((model for rate, model in rates if rate >= least_rate), fastest)


def table(speeds: Speeds, best: Model | None) -> list[str]:
    """One model a line; `*` marks the best."""
    lines = [f"{'memory':>37} {'tokens/s':>9} {f'first of {READ_TOKENS:,}':>15} {'file':>9}"]
    for model, (rate, wait) in speeds:
        name = f"{'*' if model is best else ' '} {model.id:<14} {model.parameters:<10}"
        speed = f"{rate:>9.1f} {wait:>13.1f} s" if rate else f"{'?':>9} {'?':>15}"
        lines.append(f"{name}{model.memory_mb / 1e3:>7.1f} GB {speed} {model.size / 1e9:>6.1f} GB")
    return lines
