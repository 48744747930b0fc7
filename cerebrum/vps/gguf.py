"""GGUF files that are written: copies with weights in other types, and samples of one type.

    from cerebrum.vps.gguf import Source
    Source(Path("model.gguf")).write(Path("new.gguf"), {"output.weight": "Q8_0"}, print)

PyPI's gguf reads the files. Types go by their names there: `Q4_K`, `Q8_0`. Sources of
the block layouts: ggml-common.h and ggml-quants.c of llama.cpp (MIT), and docs/gguf.md of ggml.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cerebrum.vps.llama import ModelError
from cerebrum.vps.memory import check_disk

PIECE_BYTES = 1 << 22  # transcoded at once, by one thread
# Of a tensor: (n, weights), or (n, bytes of its blocks) where the type has blocks.
Rows = npt.NDArray[Any]


@functools.cache
def pypi() -> Any:
    """PyPI's gguf. ModelError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ModelError("expected PyPI's gguf, which is not installed: pip install gguf") from None
    return gguf


def q4_k_to_q4_1(rows: Rows) -> Rows:
    """Exact but for rounding each block's scale and minimum to fp16: d·q + m has the same 4-bit q.
    A quantizer would choose another scale. ModelError if a scale is beyond the range of fp16, as in
    no real model.

    A super-block of Q4_K has two fp16, 8 scales and 8 minima of 6 bits, and 128 bytes of 4-bit
    numbers: byte l of the g-th 32 bytes has weight l of block 2g in its low half, and weight l of
    block 2g + 1 in its high half. A block of Q4_1 has two fp16 and 16 bytes: weights j and j + 16
    share byte j.
    """
    blocks = rows.reshape(-1, 144)
    factors = blocks[:, :4].view("<f2").astype(np.float32)
    steps, offsets = pypi().quants.Q4_K.get_scale_min(blocks[:, 4:16])
    scales = factors[:, :1] * steps
    minima = -factors[:, 1:] * offsets
    with np.errstate(over="ignore"):
        halves = np.stack((scales, minima), axis=-1).astype("<f2")
    if not np.isfinite(halves).all():
        raise ModelError("a scale of the weights is beyond the range of fp16")
    pairs = blocks[:, 16:].reshape(-1, 4, 32)
    weights = np.stack((pairs & 15, pairs >> 4), axis=2).reshape(-1, 8, 32)
    packed = weights[..., :16] | weights[..., 16:] << np.uint8(4)
    new_blocks = np.concatenate((halves.view(np.uint8), packed), axis=-1)
    return new_blocks.reshape(len(rows), -1)


def transcode(rows: Rows, old: str, new: str) -> Any:
    """Convert rows from one type to another."""
    if (old, new) == ("Q4_K", "Q4_1"):
        return q4_k_to_q4_1(rows)
    kinds = pypi().GGMLQuantizationType
    quants = pypi().quants
    return quants.quantize(quants.dequantize(rows, kinds[old]), kinds[new])


def byte_shape(shape: Sequence[int], kind: str) -> Any:
    """The shape in bytes of a tensor of this type, from that in weights."""
    return pypi().quants.quant_shape_to_byte_shape(shape, pypi().GGMLQuantizationType[kind])


class Tensor(NamedTuple):
    """A tensor in a file."""

    name: str
    type: str
    data: Rows  # with all dimensions, those of the tensor in reverse
    shape: Sequence[int] = ()  # its dimensions in weights, in the order of those of `data`

    def size(self, new: str) -> int:
        """Bytes in a type."""
        return math.prod(byte_shape(self.shape, new))

    def convert(self, new: str) -> Rows:
        """`data` in another type, converted by pieces: floats take up to eight times as much
        memory.
        """
        if new == self.type:
            return self.data
        rows = self.data.reshape(-1, self.data.shape[-1])
        pieces = np.array_split(rows, 1 + rows.nbytes // PIECE_BYTES)
        convert = functools.partial(transcode, old=self.type, new=new)
        with ThreadPoolExecutor() as pool:
            new_rows = list(pool.map(convert, pieces))
        return np.concatenate(new_rows).reshape(byte_shape(self.shape, new))


Types = Mapping[str, str]  # new ones, by the names of tensors or by the old types


class Source:
    """A model file to copy. ModelError if it is not a whole GGUF."""

    def __init__(self, path: Path) -> None:
        try:
            self.reader = pypi().GGUFReader(path, "c")  # what is changed stays in memory
        except (ValueError, IndexError, KeyError, TypeError, OverflowError):
            raise ModelError("the file is damaged or cut short") from None
        self.tensors = [
            Tensor(read.name, read.tensor_type.name, read.data, read.shape.tolist()[::-1])
            for read in self.reader.tensors
        ]

    def changes(self, types: Types) -> dict[str, str]:
        """New types by the names of tensors, from those by the old types. Only matrices that are
        multiplied change: those of the layers, and the one that gives the logits.
        """
        names = {tensor.name for tensor in self.tensors}
        output = "output.weight" if "output.weight" in names else "token_embd.weight"
        found = {}
        for tensor in self.tensors:
            is_used = tensor.name.startswith("blk.") or tensor.name == output
            is_matrix = tensor.data.ndim > 1 and tensor.name.endswith(".weight")
            if is_used and is_matrix and tensor.type in types:
                found[tensor.name] = types[tensor.type]
        return found

    def write(self, path: Path, types: Types, report: Callable[[int, int], None]) -> None:
        """Write a copy in which some tensors, by name, have other types. `report(done, total)`
        counts tensors. Until all are written, the copy has no header.
        """
        reader = self.reader
        pairs = zip(self.tensors, reader.tensors, strict=True)
        with path.open("wb") as file:
            file.seek(reader.data_offset)
            for done, (tensor, read) in enumerate(pairs, 1):
                kind = types.get(tensor.name, tensor.type)
                *_, number, begin = read.field.parts  # of the header
                number[0] = pypi().GGMLQuantizationType[kind]
                begin[0] = file.tell() - reader.data_offset
                file.write(tensor.convert(kind).data)
                file.write(bytes(-file.tell() % int(reader.alignment)))
                report(done, len(self.tensors))
            file.seek(0)
            file.write(reader.data[: reader.data_offset])


# ----------------------------------------------------------------------------------------- a sample

# A plain transformer of 270 million weights: 150 MB and more, since less would stay in the caches
# of many CPUs. Its small vocabulary costs nothing.
SAMPLE_LAYERS = 8
SAMPLE_WIDTH = 1536
SAMPLE_VOCABULARY = 256
SAMPLE_HEADER = {
    "block_count": SAMPLE_LAYERS,
    "embedding_length": SAMPLE_WIDTH,
    "feed_forward_length": 6144,
    "attention.head_count": 12,
    "attention.head_count_kv": 2,
    "context_length": 1 << 15,
    "vocab_size": SAMPLE_VOCABULARY,
}
SAMPLE_MATRICES = {
    "attn_q": (SAMPLE_WIDTH, SAMPLE_WIDTH),
    "attn_k": (256, SAMPLE_WIDTH),
    "attn_v": (256, SAMPLE_WIDTH),
    "attn_output": (SAMPLE_WIDTH, SAMPLE_WIDTH),
    "ffn_gate": (6144, SAMPLE_WIDTH),
    "ffn_up": (6144, SAMPLE_WIDTH),
    "ffn_down": (SAMPLE_WIDTH, 6144),
}
SAMPLE_WEIGHTS = SAMPLE_LAYERS * sum(map(math.prod, SAMPLE_MATRICES.values()))


def write_sample(path: Path, kind: str) -> None:
    """Write the sample, with matrices of this type. OSError if the disk is too small."""
    writer = pypi().GGUFWriter(path, "llama")
    for name, value in SAMPLE_HEADER.items():
        writer.add_uint32(f"llama.{name}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("no_vocab")
    ones = np.ones((SAMPLE_VOCABULARY, SAMPLE_WIDTH), np.float32)
    writer.add_tensor("token_embd.weight", ones)
    writer.add_tensor("output_norm.weight", ones[0])
    for layer in range(SAMPLE_LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", ones[0])
        for name, shape in SAMPLE_MATRICES.items():
            writer.add_tensor(
                f"blk.{layer}.{name}.weight",
                np.zeros(byte_shape(shape, kind), np.uint8),
                raw_dtype=pypi().GGMLQuantizationType[kind],
            )
    check_disk(path.parent, sum(tensor.nbytes for tensor in writer.tensors[0].values()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
