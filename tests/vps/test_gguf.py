"""GGUF files: their headers, weights in another type, and files that are written."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import numpy.typing as npt
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from harness import FILES

from cerebrum.vps import gguf as gguf_module
from cerebrum.vps.gguf import (
    SAMPLE_WEIGHTS,
    Source,
    Tensor,
    q4_k_to_q4_1,
    transcode,
    write_sample,
)
from cerebrum.vps.llama import ModelError, Settings
from cerebrum.vps.memory import needed

MODEL = FILES["qwen_0_5b"]

# -------------------------------------------------------------------------------------- transcoding


def random_blocks(count: int, seed: int) -> npt.NDArray[np.uint8]:
    """Super-blocks of Q4_K of any bits, but with scales as models have them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, 144), np.uint8)
    signs = rng.choice([-1, 1], (count, 2))
    scales = signs * rng.uniform(0.0005, 0.02, (count, 2))
    blocks[:, :4] = scales.astype("<f2").view(np.uint8)
    return blocks


def halves(value: float, *shape: int) -> npt.NDArray[np.uint8]:
    """The bytes of fp16 numbers of this value."""
    return np.full(shape, value, "<f2").view(np.uint8)


def weights(rows: npt.NDArray[Any], kind: str) -> Any:
    return quants.dequantize(rows, GGMLQuantizationType[kind]).reshape(-1, 32)


def test_only_the_scales_are_rounded():
    data = random_blocks(1024, 2)
    expected = weights(data, "Q4_K")
    got = weights(transcode(data, "Q4_K", "Q4_1"), "Q4_1")
    # fp16 has 11 bits, so a scale is off by at most 2^-12 of itself, and the minimum likewise.
    largest = np.abs(expected).max(axis=1)
    step = 2.0**-11 * (largest + np.ptp(expected, axis=1) * 15 / 14)
    errors = np.abs(got - expected)
    assert (errors.max(axis=1) <= 2 * step).all()
    assert not np.array_equal(got, expected)  # otherwise the bound tests nothing
    exact = random_blocks(64, 3)
    exact[:, :4] = halves(2.0**-8, 64, 2)
    new = transcode(exact, "Q4_K", "Q4_1")  # with a power of two there is nothing to round
    assert np.array_equal(weights(new, "Q4_1"), weights(exact, "Q4_K"))


def test_a_scale_that_fp16_cannot_hold_is_refused():
    blocks = random_blocks(8, 4)
    blocks[:, :2] = halves(60_000, 8, 1)
    with pytest.raises(ModelError, match="a scale of the weights is beyond the range of fp16"):
        transcode(blocks, "Q4_K", "Q4_1")


def test_other_types_become_q8_0_through_floats() -> None:
    for source, half in [("Q5_0", slice(0, 2)), ("Q6_K", slice(-2, None))]:
        _, width = GGML_QUANT_SIZES[GGMLQuantizationType[source]]
        data = np.random.default_rng(5).integers(0, 256, (16, width), np.uint8)
        data[:, half] = halves(0.01, 16, 1)
        expected = weights(data, source)
        got = weights(transcode(data, source, "Q8_0"), "Q8_0")
        step = np.abs(expected).max(axis=1, keepdims=True) / 127
        errors = np.abs(got - expected)
        assert (errors <= 0.57 * step).all()  # half a step, and the rounding of d to fp16


# ------------------------------------------------------------------------------------------- copies


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(families.write_quantized(tmp_path_factory.mktemp("source") / "m.gguf"))


def by_name(source: Source) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in source.tensors}


def is_same(tensor: Tensor, kind: str, data: npt.NDArray[Any]) -> bool:
    return tensor.type == kind and np.array_equal(tensor.data, data)


def test_a_copy_in_other_types(source, tmp_path, patch):
    patch(gguf_module, "PIECE_BYTES", 256 * 100)  # some tensors have several pieces
    reported = []
    types = {"output.weight": "Q8_0", "blk.4.ffn_down.weight": "Q4_1"}
    source.write(tmp_path / "a", types, lambda *step: reported.append(step))
    copy, old = by_name(Source(tmp_path / "a")), by_name(source)
    assert reported == [(done, len(old)) for done in range(1, len(old) + 1)]
    rows = transcode(old["output.weight"].data, "Q6_K", "Q8_0")
    assert rows.shape == (2048, 256 // 32 * 34)
    assert is_same(copy.pop("output.weight"), "Q8_0", rows)
    down = q4_k_to_q4_1(old["blk.4.ffn_down.weight"].data)
    assert is_same(copy.pop("blk.4.ffn_down.weight"), "Q4_1", down)
    assert all(is_same(tensor, old[name].type, old[name].data) for name, tensor in copy.items())


def test_only_matrices_that_are_multiplied_change():
    matrix, vector = np.zeros((2, 144), np.uint8), np.zeros(144, np.uint8)
    names = {"blk.0.up.weight": "Q4_K", "blk.1.up.weight": "Q6_K", "y.weight": "Q4_K"}
    names |= {"token_embd.weight": "Q6_K", "blk.0.x.bias": "Q4_K", "blk.0.q.weight": "F16"}
    tensors = [Tensor(name, kind, matrix) for name, kind in names.items()]
    tensors.append(Tensor("blk.0.norm.weight", "Q4_K", vector))
    file: Any = SimpleNamespace(tensors=tensors)
    tied = {"blk.1.up.weight": "Q8_0", "token_embd.weight": "Q8_0"}
    assert Source.changes(file, {"Q6_K": "Q8_0"}) == tied
    tensors.append(Tensor("output.weight", "Q6_K", matrix))
    apart = {"blk.0.up.weight": "Q4_1", "blk.1.up.weight": "Q8_0", "output.weight": "Q8_0"}
    assert Source.changes(file, {"Q4_K": "Q4_1", "Q6_K": "Q8_0"}) == apart


def write(path: Path, alignment: int, **tensors: npt.NDArray[Any]) -> Source:
    writer = GGUFWriter(path, "gpt2")
    writer.add_custom_alignment(alignment)
    for name, data in tensors.items():
        writer.add_tensor(name.replace("__", "."), data)
    families.finish(writer)
    return Source(path)


def test_the_copy_has_the_header_and_the_alignment_of_the_source(tmp_path):
    source = write(tmp_path / "old", 4096, one__weight=np.arange(8.0), two__weight=np.arange(9.0))
    source.write(tmp_path / "new", {}, min)
    assert (tmp_path / "new").read_bytes() == (tmp_path / "old").read_bytes()


def test_a_source_that_is_cut_short_is_told(tmp_path):
    path = families.write_quantized(tmp_path / "m.gguf", layers=1)
    for size in (path.stat().st_size - 100, 1000, 30):
        os.truncate(path, size)
        with pytest.raises(ModelError, match="the file is damaged or cut short"):
            Source(path)


def test_without_the_package_that_writes_files(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gguf", None)
    gguf_module.pypi.cache_clear()
    expected = "expected PyPI's gguf, which is not installed: pip install gguf"
    with pytest.raises(ModelError, match=expected):
        Source(MODEL)
    assert needed(MODEL, [Settings(state_dir=tmp_path)])[0]["weights"] == MODEL.stat().st_size


def test_the_matrices_of_a_sample_have_one_type(tmp_path, patch):
    patch(gguf_module, "SAMPLE_LAYERS", 1)
    write_sample(tmp_path / "a", "Q4_1")
    layer = [tensor for tensor in Source(tmp_path / "a").tensors if tensor.type != "F32"]
    assert {tensor.type for tensor in layer} == {"Q4_1"}
    assert 8 * sum(math.prod(tensor.shape) for tensor in layer) == SAMPLE_WEIGHTS
