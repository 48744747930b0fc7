"""Predict how fast each model would be on this machine, without its file, and choose the best with
quick hints.

A *hint* is what an editor shows while somebody types: a few new tokens are read, a line or two is
written.

A model's time is that of the weights that each token uses, by their types in a Q4_K_M file: of a
mixture of experts, those of the chosen experts. What a weight of each type costs here, samples show
(`time_types`). Each type counts as `tune` will change it, where that is faster. A draft model may
make a model faster still.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from cerebrum.vps.encoding import READ_TOKENS, Timing, faster_types
from cerebrum.vps.gguf import SAMPLE_LAYERS, SAMPLE_WEIGHTS
from cerebrum_common import Model

HINT_READ = 200  # tokens
HINT_WRITTEN = 24  # tokens
EXPERTS_SLOWDOWN = 1.2  # of reading, since each expert gets few tokens at a time
SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}  # the types of rows that are no multiple of 256


def weights_of(shape: Mapping[str, int]) -> Counter[str]:
    """How many weights of each type a token uses in a model of this shape (models.toml)."""
    width = shape["width"]
    heads = shape["heads"] * shape["head"]
    keys = shape["kv_heads"] * shape["head"]
    forward = shape["feed_forward"] * max(1, shape["used"])
    layers = shape["layers"] * width
    found = Counter[str]()

    def add(kind: str, columns: int, weights: int) -> None:
        found[SMALL_BLOCKS[kind] if columns % 256 else kind] += weights

    add("Q6_K", width, shape["vocabulary"] * width)
    add("Q4_K", width, layers * (heads + keys + 2 * forward))
    add("Q4_K", heads, layers * heads)
    for kind in ("Q4_K", "Q6_K"):  # half of attn_v and of ffn_down each
        add(kind, width, layers * keys // 2)
        add(kind, shape["feed_forward"], layers * forward // 2)
    return found


class Speed(NamedTuple):
    """What to expect of a model."""

    rate: float  # tokens a second
    wait: float  # seconds to the first token behind READ_TOKENS new ones

    @property
    def hint(self) -> float:
        """Seconds to read HINT_READ tokens and write HINT_WRITTEN."""
        return HINT_READ / READ_TOKENS * self.wait + HINT_WRITTEN / self.rate


def predict(shape: Mapping[str, int], timings: Mapping[str, Timing]) -> Speed:
    """The speed of a model of this shape, from the times of samples in each type."""
    types = faster_types(timings)

    def seconds(shape: Mapping[str, int], times: Callable[[Timing], float]) -> float:
        """Of a token, if all of a sample's weights take these times."""
        weights = weights_of(shape).items()
        return sum(
            count / SAMPLE_WEIGHTS * times(timings[types.get(kind, kind)])
            for kind, count in weights
        )

    decode = seconds(shape, lambda timing: timing.decode[1])
    # A prompt needs the output matrix and most of the last layer for its last token only.
    read_shape = {**shape, "layers": shape["layers"] - 1, "vocabulary": 0}
    read = seconds(read_shape, lambda timing: timing.read * SAMPLE_LAYERS / (SAMPLE_LAYERS - 1))
    if shape["experts"]:
        read *= EXPERTS_SLOWDOWN
    return Speed(1 / decode, READ_TOKENS * read)


Speeds = Sequence[tuple[Model, Speed | None]]  # None: unknown


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
