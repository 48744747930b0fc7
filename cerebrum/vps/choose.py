"""Predict how fast each model would be on this machine, without its file, and choose the best with
quick hints.

A *hint* is what an editor shows while somebody types: a few new tokens are read, a line or two is
written.

A model is imitated by a *sample*: a part of its layers and the same part of its vocabulary, with
its shapes and the types of a Q4_K_M file. A sample's times are that part of the model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cerebrum.vps.encoding import FAITHFUL, READ_TOKENS, alone_in, measure, opened
from cerebrum.vps.gguf import pypi
from cerebrum.vps.llama import ModelError, Settings, check_disk
from cerebrum_common import Model

SAMPLE_WEIGHTS = 350_000_000  # at least, 200 MB: less would stay in the caches of most CPUs
SAMPLE_TOKENS = 512  # read by each
HINT_READ, HINT_WRITTEN = 200, 24  # tokens
SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # the types of rows that are no multiple of 256
Matrix = tuple[
    str, str, tuple[int, ...]
]  # name, type, and the number of experts (if any), rows and columns


def matrices(shape: Mapping[str, int], layers: int, vocabulary: int) -> list[Matrix]:
    """The matrices of a model of this shape (models.toml), with this many layers and tokens. A
    Q4_K_M file has about half of attn_v and ffn_down in Q6_K.
    """
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
    return [
        (name, SMALL_BLOCKS[kind] if size[-1] % 256 else kind, size) for name, kind, size in found
    ]


def write_sample(
    path: Path, shape: Mapping[str, int], weights: Sequence[Matrix], layers: int
) -> None:
    """A model of these matrices, for llama.cpp's architecture of the plain transformer. OSError if
    the disk is too small.
    """
    writer, random, width = (
        pypi().GGUFWriter(path, "llama"),
        np.random.default_rng(1),
        shape["width"],
    )
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
        **dict.fromkeys(
            ("attention.key_length", "attention.value_length", "rope.dimension_count"),
            shape["head"],
        ),
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
            tensors[f"blk.{layer}.ffn_gate_inp"] = random.normal(
                size=(shape["experts"], width)
            ).astype(np.float32)
    for name, values in tensors.items():
        writer.add_tensor(f"{name}.weight", values)
    for name, kind, size in weights:
        raw = pypi().GGMLQuantizationType[kind]
        data = np.zeros(
            pypi().quants.quant_shape_to_byte_shape(size, raw), np.uint8
        )  # no kernel looks at them
        writer.add_tensor(f"{name}.weight", data, raw_dtype=raw)
    check_disk(path.parent, sum(tensor.nbytes for tensor in writer.tensors[0].values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Speed(NamedTuple):
    """What to expect of a model."""

    rate: float  # tokens a second
    wait: float  # seconds to the first token behind READ_TOKENS new ones

    @property
    def hint(self) -> float:
        """Seconds to read HINT_READ tokens and write HINT_WRITTEN."""
        return HINT_READ / READ_TOKENS * self.wait + HINT_WRITTEN / self.rate


def predict(shape: Mapping[str, int], settings: Settings, folder: Path) -> Speed:
    """The speed of a model of this shape here, with the types and the attention that are faster, as
    `tune` will find them. Samples are written to `folder`. ModelError if llama.cpp fails, OSError
    if the disk is too small.
    """
    whole = matrices(shape, shape["layers"], shape["vocabulary"])
    samples = shape["layers"] * SAMPLE_WEIGHTS / sum(math.prod(size) for _, _, size in whole)
    layers = min(shape["layers"], 2 * math.ceil(samples / 2))
    part, times = layers / shape["layers"], []
    published = matrices(shape, layers, round(shape["vocabulary"] * part))
    path = folder / "sample.gguf"
    for types in ({}, FAITHFUL):
        path.unlink(missing_ok=True)  # the one before
        weights = [(name, types.get(kind, kind), size) for name, kind, size in published]
        write_sample(path, shape, weights, layers)
        for used in (settings, replace(settings, flash_attention=False)):
            with opened(path, used) as model:
                times.append(measure(model, SAMPLE_TOKENS))
    best = min(times, key=lambda timing: timing.work)
    return Speed(part / best.decode[1], READ_TOKENS * best.read / part)


Speeds = Sequence[tuple[Model, Speed | None]]  # None: unknown


def predict_all(
    models: Sequence[Model],
    settings: Settings,
    report: Callable[[int], None],
    complain: Callable[[Model, Exception], None],
) -> Speeds:
    """The speed of each model that has a shape and can be measured. `report` gets the number of
    models that are done, `complain` each failure. TuneError while a model is being tuned.
    """
    speeds = list[tuple[Model, Speed | None]]()
    with alone_in(settings.state_dir / "tuned") as folder:  # a tuning would spoil the measurements
        for model in models:
            report(len(speeds))
            speed = None
            try:
                if model.shape:
                    speed = predict(model.shape, settings, folder)
            except (ModelError, OSError) as error:
                complain(model, error)
            speeds.append((model, speed))
    return speeds


# --------------------------------------------------------------------------------------- the choice


def best_of(speeds: Speeds, most_seconds: float) -> Model | None:
    """The first model whose hint takes `most_seconds` at most, else the one with the quickest hint;
    None if no speed is known. Models with less than half of the languages that another one has do
    not count.
    """
    most = max((len(model.languages) for model, _ in speeds), default=0)
    hints = [
        (speed.hint, model) for model, speed in speeds if speed and 2 * len(model.languages) >= most
    ]
    quickest = min(hints, key=lambda pair: pair[0], default=(0.0, None))[1]
    return next((model for seconds, model in hints if seconds <= most_seconds), quickest)


def table(speeds: Speeds, best: Model | None) -> list[str]:
    """One model a line; `*` marks the best."""
    lines = [
        f"{'memory':>37} {'tokens/s':>9} {f'first of {READ_TOKENS:,}':>15} {'hint':>8} {'file':>9}"
    ]
    for model, speed in speeds:
        name = f"{'*' if model is best else ' '} {model.id:<14} {model.parameters:<10}{model.memory_mb / 1e3:>7.1f} GB"
        figures = f"{'?':>9} {'?':>15} {'?':>8}"
        if speed:
            figures = f"{speed.rate:>9.1f} {speed.wait:>13.1f} s {speed.hint:>6.1f} s"
        size = f"{model.size / 1e9:.1f} GB" if model.size else "?"
        lines.append(f"{name} {figures} {size:>9}")
    return lines
