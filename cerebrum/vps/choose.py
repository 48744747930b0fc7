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
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cerebrum.vps.drafts import pair_rate
from cerebrum.vps.encoding import FAITHFUL, READ_TOKENS, alone_in, measure, opened
from cerebrum.vps.gguf import Types, pypi
from cerebrum.vps.llama import ModelError, Settings, check_disk
from cerebrum.vps.schedule import Costs
from cerebrum_common import Model

SAMPLE_WEIGHTS = 350_000_000  # at least, 200 MB: less would stay in the caches of most CPUs
SAMPLE_TOKENS = 512  # read by each
HINT_READ, HINT_WRITTEN = 200, 24  # tokens
SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # the types of rows that are no multiple of 256


Shape = Mapping[str, int]  # of a model, as in models.toml


class Matrix(NamedTuple):
    """A matrix of a model, or one for each expert."""

    name: str
    type: str
    shape: tuple[int, ...]  # the number of experts (if any), rows and columns


def matrices(shape: Shape, layers: int, vocabulary: int) -> list[Matrix]:
    """The matrices of a model of this shape (models.toml), with this many layers and tokens. A
    Q4_K_M file has about half of attn_v and ffn_down in Q6_K.
    """
    width = shape["width"]
    forward = shape["feed_forward"]
    heads = shape["heads"] * shape["head"]
    keys = shape["kv_heads"] * shape["head"]
    count = (shape["experts"],) if shape["experts"] else ()
    suffix = "_exps" if count else ""
    up = (*count, forward, width)
    down = (*count, width, forward)
    shapes = {
        "attn_q": (heads, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, heads),
        f"ffn_gate{suffix}": up,
        f"ffn_up{suffix}": up,
        f"ffn_down{suffix}": down,
    }
    better = ("attn_v", f"ffn_down{suffix}")
    found = [matrix_of("output", "Q6_K", (vocabulary, width))]
    for layer in range(layers):
        for name, size in shapes.items():
            kind = "Q6_K" if layer % 2 and name in better else "Q4_K"
            found.append(matrix_of(f"blk.{layer}.{name}", kind, size))
    return found


def matrix_of(name: str, kind: str, shape: tuple[int, ...]) -> Matrix:
    """A matrix of this type, or of the one for rows that are no multiple of 256."""
    return Matrix(name, SMALL_BLOCKS[kind] if shape[-1] % 256 else kind, shape)


# The header's numbers by their names in models.toml.
HEADER = {
    "embedding_length": "width",
    "feed_forward_length": "feed_forward",
    "attention.head_count": "heads",
    "attention.head_count_kv": "kv_heads",
    "attention.key_length": "head",
    "attention.value_length": "head",
    "rope.dimension_count": "head",
    "expert_count": "experts",
    "expert_used_count": "used",
}


Arrays = dict[str, npt.NDArray[Any]]


def small_tensors(shape: Shape, layers: int, vocabulary: int) -> Arrays:
    """The tensors in floats: norms of ones, and random embeddings and routers, so that each token
    goes to other experts.
    """
    random = np.random.default_rng(1)
    width = shape["width"]
    experts = shape["experts"]
    ones = np.ones(width, np.float32)
    rows = random.normal(size=(1009, width)).astype(np.float16)
    tensors: Arrays = {"token_embd": np.resize(rows, (vocabulary, width)), "output_norm": ones}
    for layer in range(layers):
        tensors[f"blk.{layer}.attn_norm"] = ones
        tensors[f"blk.{layer}.ffn_norm"] = ones
        if experts:
            router = random.normal(size=(experts, width))
            tensors[f"blk.{layer}.ffn_gate_inp"] = router.astype(np.float32)
    return tensors


def write_sample(
    path: Path, shape: Shape, weights: Sequence[Matrix], layers: int, types: Types
) -> None:
    """A model of these matrices, some in other `types`, for llama.cpp's architecture of the plain
    transformer. OSError if the disk is too small.
    """
    writer = pypi().GGUFWriter(path, "llama")
    vocabulary = weights[0].shape[0]
    for name, source in HEADER.items():
        writer.add_uint32(f"llama.{name}", shape[source])
    writer.add_uint32("llama.block_count", layers)
    writer.add_uint32("llama.vocab_size", vocabulary)
    writer.add_uint32("llama.context_length", 1 << 15)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    for name, values in small_tensors(shape, layers, vocabulary).items():
        writer.add_tensor(f"{name}.weight", values)
    for matrix in weights:
        kind = pypi().GGMLQuantizationType[types.get(matrix.type, matrix.type)]
        size = pypi().quants.quant_shape_to_byte_shape(matrix.shape, kind)
        zeros = np.zeros(size, np.uint8)  # take as long to compute as any other weights
        writer.add_tensor(f"{matrix.name}.weight", zeros, raw_dtype=kind)
    check_disk(path.parent, sum(tensor.nbytes for tensor in writer.tensors[0].values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Speed(NamedTuple):
    """What to expect of a model."""

    rate: float  # tokens a second
    wait: float  # seconds to the first token behind READ_TOKENS new ones
    decode: Mapping[int, float]  # seconds of one decode by its number of tokens

    @property
    def hint(self) -> float:
        """Seconds to read HINT_READ tokens and write HINT_WRITTEN."""
        return HINT_READ / READ_TOKENS * self.wait + HINT_WRITTEN / self.rate


def predict(shape: Shape, settings: Settings, folder: Path) -> Speed:
    """The speed of a model of this shape here, with the types and the attention that are faster, as
    `tune` will find them. Samples are written to `folder`. ModelError if llama.cpp fails, OSError
    if the disk is too small.
    """
    all_layers = shape["layers"]
    vocabulary = shape["vocabulary"]
    whole = matrices(shape, all_layers, vocabulary)
    weights = sum(math.prod(matrix.shape) for matrix in whole)
    least = all_layers * SAMPLE_WEIGHTS / weights  # layers
    layers = min(all_layers, 2 * math.ceil(least / 2))
    part = layers / all_layers
    published = matrices(shape, layers, round(vocabulary * part))
    path = folder / "sample.gguf"
    times = []
    for types in ({}, FAITHFUL):
        path.unlink(missing_ok=True)  # of the types before
        write_sample(path, shape, published, layers, types)
        for used in (settings, replace(settings, flash_attention=False)):
            with opened(path, used) as model:
                times.append(measure(model, SAMPLE_TOKENS))
    best = min(times, key=lambda timing: timing.work)
    decode = {size: seconds / part for size, seconds in best.decode.items()}
    return Speed(1 / decode[1], READ_TOKENS * best.read / part, decode)


Speeds = list[tuple[Model, Speed | None]]  # None: unknown


def predict_all(
    models: Sequence[Model],
    settings: Settings,
    report: Callable[[int], None],
    complain: Callable[[Model, Exception], None],
) -> Speeds:
    """The speed of each model that has a shape and can be measured. `report` gets the number of
    models that are done, `complain` each failure. TuneError while a model is being tuned.
    """
    speeds: Speeds = []
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


def with_drafts(speeds: Speeds, settings: Settings, room_mb: float) -> tuple[Speeds, list[str]]:
    """The speeds of models with their draft models, and a note on each pair that fits."""
    alone = {model.id: (model, speed) for model, speed in speeds}
    found: Speeds = []
    notes = []
    for model, speed in speeds:
        draft, draft_speed = alone.get(model.draft, (model, None))
        fits = settings.draft and model.memory_mb + draft.memory_mb <= room_mb
        if speed and draft_speed and fits:
            drafts = f"the drafts of {draft.id}"
            rate = pair_rate(Costs(speed.decode), 1 / draft_speed.rate)
            speed = speed._replace(rate=rate)
            notes.append(f"{model.id}: with {drafts}, if as many are right as usual")
        found.append((model, speed))
    return found, notes


# --------------------------------------------------------------------------------------- the choice


def best_of(speeds: Speeds, most_seconds: float) -> Model | None:
    """The first model whose hint takes `most_seconds` at most, else the one with the quickest hint;
    None if no speed is known. Models with less than half of the languages that another one has do
    not count.
    """
    most = max((len(model.languages) for model, _ in speeds), default=0)
    best = None
    best_seconds = math.inf
    for model, speed in speeds:
        if speed and 2 * len(model.languages) >= most:
            seconds = max(speed.hint, most_seconds)  # those that are quick enough are equal
            if seconds < best_seconds:
                best = model
                best_seconds = seconds
    return best


def table(speeds: Speeds, best: Model | None) -> list[str]:
    """One model a line; `*` marks the best."""
    first = f"first of {READ_TOKENS:,}"
    lines = [f"{'memory':>37} {'tokens/s':>9} {first:>15} {'hint':>8} {'file':>9}"]
    for model, speed in speeds:
        mark = "*" if model is best else " "
        memory = f"{model.memory_mb / 1e3:>7.1f} GB"
        figures = f"{'?':>9} {'?':>15} {'?':>8}"
        if speed:
            figures = f"{speed.rate:>9.1f} {speed.wait:>13.1f} s {speed.hint:>6.1f} s"
        size = f"{model.size / 1e9:.1f} GB" if model.size else "?"
        lines.append(f"{mark} {model.id:<14} {model.parameters:<10}{memory} {figures} {size:>9}")
    return lines
