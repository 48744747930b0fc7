"""GGUF files: their headers, weights in another type, and files that are written."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from harness import FILES

from cerebrum.vps.gguf import EXACT, PIECE_WEIGHTS, Bytes, Gguf, Part, ggml, read_shape, transcode
from cerebrum.vps.llama import ModelError, Shape

MODEL = FILES["qwen_0_5b"]

# ------------------------------------------------------------------------------------------- transcoding

HALVES = {"q5_0": [0], "q4_K": [0, 2], "q5_K": [0, 2]}  # offsets of fp16


def random_blocks(name: str, count: int, seed: int) -> Bytes:
    """Blocks of any bits, but with scales as models have them."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, ggml().type_size(name)), np.uint8)
    for offset in HALVES[name]:
        scales = (rng.uniform(0.0005, 0.02, (count, 1)) * rng.choice([-1, 1], (count, 1))).astype("<f2")
        blocks[:, offset : offset + 2] = scales.view(np.uint8)
    return blocks.reshape(-1)


def test_q8_0_says_exactly_what_q5_0_says() -> None:
    data = random_blocks("q5_0", 4096, 1)
    new = transcode(data, "q5_0", "q8_0")
    assert np.array_equal(ggml().dequantize(new, "q8_0"), ggml().dequantize(data, "q5_0"))


@pytest.mark.parametrize(("source", "target", "largest"), [("q4_K", "q4_1", 15), ("q5_K", "q5_1", 31)])
def test_only_the_scales_are_rounded(source: str, target: str, largest: int) -> None:
    data = random_blocks(source, 1024, 2)
    expected = ggml().dequantize(data, source).reshape(-1, 32)
    got = ggml().dequantize(transcode(data, source, target), target).reshape(-1, 32)
    # fp16 has 11 bits, so a scale is off by at most 2^-12 of itself, and the minimum likewise.
    step = 2.0**-11 * (np.abs(expected).max(axis=1) + np.ptp(expected, axis=1) * largest / (largest - 1))
    assert (np.abs(got - expected).max(axis=1) <= 2 * step).all()
    assert not np.array_equal(got, expected)  # otherwise the bound tests nothing
    exact = random_blocks(source, 64, 3)
    ones = np.full((64, 1), 2.0**-8, "<f2").view(np.uint8)
    for offset in HALVES[source]:
        exact.reshape(64, -1)[:, offset : offset + 2] = ones
    new = transcode(exact, source, target)  # with a power of two there is nothing to round
    assert np.array_equal(ggml().dequantize(new, target), ggml().dequantize(exact, source))


@pytest.mark.parametrize("source", ["q4_K", "q5_K"])
def test_a_scale_that_fp16_cannot_hold_is_refused(source: str) -> None:
    blocks = random_blocks(source, 8, 4).reshape(8, -1)
    blocks[:, :2] = np.full((8, 1), 60_000, "<f2").view(np.uint8)
    (target,) = [target for name, target in EXACT if name == source]
    with pytest.raises(ModelError, match="a scale of the weights is beyond the range of fp16"):
        transcode(blocks.reshape(-1), source, target)


@pytest.mark.parametrize(
    "source",
    ["q6_K", "q3_K", "q2_K", "q4_0", "q4_1", "q5_1", "q4_K", "q5_K", "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s"],
)
def test_other_types_become_q8_0_through_floats(source: str) -> None:
    floats = np.random.default_rng(5).normal(0, 0.05, 16 * 256).astype(np.float32)
    data = ggml().quantize(floats, source)
    expected = ggml().dequantize(data, source).reshape(-1, 32)
    got = ggml().dequantize(transcode(data, source, "q8_0"), "q8_0").reshape(-1, 32)
    step = np.abs(expected).max(axis=1, keepdims=True) / 127
    assert (np.abs(got - expected) <= 0.57 * step).all()  # half a step, and the rounding of d to fp16


def test_the_same_type_stays_as_it_is() -> None:
    data = random_blocks("q4_K", 8, 6)
    assert transcode(data, "q4_K", "q4_K") is data


# ------------------------------------------------------------------------------------------------ header


def header(**numbers: int) -> bytes:
    """A GGUF with metadata only."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("llama")]
    pairs += [
        text(f"llama.{name.replace('__', '.')}") + struct.pack("<II", 4, value) for name, value in numbers.items()
    ]
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


def test_the_shape_of_a_model_is_read_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(header(block_count=24, embedding_length=896, attention__head_count=14, attention__head_count_kv=2))
    shape = read_shape(path)
    assert shape == Shape(layers=24, kv_width=24 * 256, heads=14, embedding=896, feed_forward=3584, vocabulary=0)


SIZES = {"block_count": 24, "embedding_length": 896, "attention__head_count": 14}
NUMBER_AS_ARCHITECTURE = (
    b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 20) + b"general.architecture" + struct.pack("<II", 4, 7)
)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"GGUX" + bytes(100), "not a readable GGUF file"),
        (NUMBER_AS_ARCHITECTURE, "a GGUF file without an architecture"),
        *((header(**SIZES | {name: 0}), "expected at least one layer, head and embedding dim") for name in SIZES),
    ],
)
def test_a_bad_header_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ModelError, match=message):
        read_shape(tmp_path / "m.gguf")


def test_tensors() -> None:
    with Gguf(MODEL) as file:
        assert file.shape == Shape(24, 24 * 256, 14, 896, 4864, 151_936)
        tensors = {tensor.name: tensor for tensor in file.tensors}
    assert len(tensors) == 291
    down = tensors["blk.5.ffn_down.weight"]
    assert (down.type, down.dimensions, down.weights) == ("q4_K", (4864, 896, 1, 1), 4864 * 896)
    assert (down.size, down.layer, down.kind, down.is_matrix) == (4864 * 896 // 256 * 144, 5, "ffn_down", True)
    norm = tensors["output_norm.weight"]
    assert (norm.type, norm.layer, norm.kind, norm.is_matrix) == ("f32", None, "output_norm", False)
    assert max(tensor.offset + tensor.size for tensor in tensors.values()) == MODEL.stat().st_size


# ------------------------------------------------------------------------------------------------ writing


def test_parts_in_other_types_by_other_names_and_of_fewer_rows(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Gguf(MODEL) as file:
        tensors = {tensor.name: tensor for tensor in file.tensors}
        rows = (896, 1500, 1, 1)
        parts = [
            Part(tensors["token_embd.weight"], "q8_0", dimensions=rows),
            Part(tensors["blk.3.ffn_down.weight"], "q4_1", "blk.0.ffn_down.weight"),
        ]
        values: dict[str, str | int] = {"a.text": "first", "qwen2.block_count": 1, "tokenizer.ggml.model": "no_vocab"}
        file.write(tmp_path / "a", parts, values, "tokenizer.", lambda done, total: told.append((done, total)))
    assert PIECE_WEIGHTS < 1500 * 896  # so that there are tensors of one piece and of several
    with Gguf(tmp_path / "a") as copy:
        assert (copy.text("a.text"), copy.text("tokenizer.ggml.model"), copy.text("b")) == ("first", "no_vocab", "")
        assert (copy.shape.layers, copy.shape.vocabulary) == (1, 0)
        embedding, down = copy.tensors
    assert (embedding.name, embedding.type, embedding.dimensions) == ("token_embd.weight", "q8_0", rows)
    assert (down.name, down.type) == ("blk.0.ffn_down.weight", "q4_1")
    total = (tmp_path / "a").stat().st_size
    done = [done for done, _ in told]
    assert {all_ for _, all_ in told} == {total}
    assert done == sorted(done)
    assert done[-2:] == [embedding.size + down.size, total]
    with (tmp_path / "a").open("rb") as new, MODEL.open("rb") as old:
        for tensor, name in ((embedding, "token_embd.weight"), (down, "blk.3.ffn_down.weight")):
            data = np.frombuffer(os.pread(old.fileno(), tensors[name].size, tensors[name].offset), np.uint8)
            expected = transcode(data, tensors[name].type, tensor.type)[: tensor.size]
            assert os.pread(new.fileno(), tensor.size, tensor.offset) == expected.tobytes()


def test_the_alignment_of_the_source_is_not_that_of_the_copy(tmp_path: Path) -> None:
    with Gguf(MODEL) as file:
        parts = [Part(tensor, tensor.type) for tensor in file.tensors if tensor.layer == 0]
        file.write(tmp_path / "aligned", parts, {"general.alignment": 4096, "a.text": "old"}, "tokenizer.")
    data = (tmp_path / "aligned").read_bytes()
    start = data.index(b"general.alignment") + len(b"general.alignment") + 4
    assert data[start : start + 4] == struct.pack("<I", 4096)
    plain = tmp_path / "plain"
    plain.write_bytes(data[:start] + struct.pack("<I", 32) + data[start + 4 :])  # as this file is in fact aligned
    with Gguf(plain) as file:
        file.write(tmp_path / "new", [Part(tensor, tensor.type) for tensor in file.tensors], {"a.text": "new"})
    assert b"general.alignment" not in (tmp_path / "new").read_bytes()
    with Gguf(tmp_path / "new") as copy, Gguf(plain) as file:
        assert copy.text("a.text") == "new"
        assert [(t.name, t.dimensions, t.type) for t in copy.tensors] == [(p.name, p.dimensions, p.type) for p in parts]
        old, new = file.tensors[5], copy.tensors[5]
    assert (
        data[old.offset : old.offset + old.size] == (tmp_path / "new").read_bytes()[new.offset : new.offset + new.size]
    )


def test_a_source_that_is_cut_short_is_told(tmp_path: Path) -> None:
    with MODEL.open("rb") as file:
        (tmp_path / "cut").write_bytes(file.read(20_000_000))
    with Gguf(tmp_path / "cut") as cut:
        parts = [Part(tensor, tensor.type) for tensor in cut.tensors if tensor.layer == 20]
        with pytest.raises(ModelError, match="the file is cut short"):
            cut.write(tmp_path / "new", parts)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_file: int, _offset: int, _length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with Gguf(MODEL) as file, pytest.raises(OSError, match="No space left on device"):
        file.write(tmp_path / "new", [Part(file.tensors[0], file.tensors[0].type)])
    assert (tmp_path / "new").read_bytes() == b""


def test_a_write_that_ends_early_is_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: real(file, data[:7], offset))
    with Gguf(MODEL) as file, pytest.raises(OSError, match="No space left on device"):
        file.write(tmp_path / "new", [Part(file.tensors[0], file.tensors[0].type)])
