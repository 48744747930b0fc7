"""Copies of GGUF files with weights in other types, for `tune`.

    from cerebrum.vps.gguf import Source
    Source(Path("model.gguf")).write(Path("new.gguf"), {"output.weight": "Q8_0"})

PyPI's gguf reads and writes the files. Types go by their names there: `Q4_K`, `Q8_0`. Sources of
the block layouts: ggml-common.h and ggml-quants.c of llama.cpp (MIT), and docs/gguf.md of ggml.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cerebrum.vps.llama import ModelError

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
    steps, least = pypi().quants.Q4_K.get_scale_min(blocks[:, 4:16])
    scales = factors[:, :1] * steps
    minima = -factors[:, 1:] * least
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
    weights = quants.dequantize(rows, kinds[old])
    return quants.quantize(weights, kinds[new])


class Tensor(NamedTuple):
    """A tensor in a file."""

    name: str
    type: str
    data: Rows  # with all dimensions, those of the tensor in reverse

    @property
    def is_matrix(self) -> bool:
        return self.data.ndim > 1 and self.name.endswith(".weight")

    @property
    def layer(self) -> int | None:
        block = re.match(r"blk\.(\d+)\.", self.name)
        return int(block[1]) if block else None

    @property
    def shape(self) -> Any:
        """Its dimensions in weights, in the order of those of `data`."""
        if self.data.dtype != np.uint8:
            return self.data.shape
        kind = pypi().GGMLQuantizationType[self.type]  # which has blocks
        return pypi().quants.quant_shape_from_byte_shape(self.data.shape, kind)

    def byte_shape(self, new: str) -> Any:
        """The shape of its bytes in a type. ValueError if its rows are no whole blocks of it."""
        kind = pypi().GGMLQuantizationType[new]
        return pypi().quants.quant_shape_to_byte_shape(self.shape, kind)

    def can_be(self, new: str) -> bool:
        """Whether its rows are whole blocks of this type."""
        try:
            return bool(self.byte_shape(new))
        except ValueError:
            return False

    def size(self, new: str) -> int:
        """Bytes in a type."""
        return math.prod(self.byte_shape(new))

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
        return np.concatenate(new_rows).reshape(self.byte_shape(new))


Types = Mapping[str, str]  # new ones, by the names of tensors or by the old types
Values = Mapping[str, str | int]  # of a header, by key


# Keys of a header that gguf's writer adds by itself.
MADE_BY_WRITER = ("GGUF.", "general.architecture", "general.alignment")


class Source:
    """A model file to copy. ModelError if it is not a whole GGUF."""

    def __init__(self, path: Path) -> None:
        class Reader(pypi().GGUFReader):  # type: ignore[misc]
            """Reads the file through a plain array, which is three times as fast as a memmap."""

            data = property(
                lambda self: self._data,
                lambda self, mapped: setattr(self, "_data", np.asarray(mapped)),
            )

        try:
            self.reader = Reader(path)
        except (ValueError, IndexError, KeyError, TypeError, OverflowError):
            raise ModelError("the file is damaged or cut short") from None
        self.tensors = [
            Tensor(read.name, read.tensor_type.name, read.data) for read in self.reader.tensors
        ]
        self.architecture: str = self.reader.fields["general.architecture"].contents()
        rows = {tensor.name: len(tensor.data) for tensor in self.tensors}
        self.vocabulary = rows.get("token_embd.weight", 0)

    def write(
        self,
        path: Path,
        types: Types,
        values: Values | None = None,
        layers: Sequence[int] = (),
        vocabulary: int = 0,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write a copy in which some tensors have other `types` and the header has these values.

        With a `vocabulary`, it has only so many tokens, only these layers, and no tokenizer.
        `report(done, total)` counts tensors. ModelError if the header cannot be copied.
        """
        copies = {tensor.name: tensor for tensor in self.tensors}
        if vocabulary:
            copies = self._sampled(layers, vocabulary)
        writer = pypi().GGUFWriter(path, self.architecture)
        self._add_header(writer, values or {}, has_tokenizer=not vocabulary)
        for name, tensor in copies.items():
            kind = types.get(tensor.name, tensor.type)
            raw = pypi().GGMLQuantizationType[kind]
            writer.add_tensor_info(name, tensor.shape, None, tensor.size(kind), raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, tensor in enumerate(copies.values(), 1):
            data = tensor.convert(types.get(tensor.name, tensor.type))
            try:
                writer.write_tensor_data(data)
            except OSError as error:  # numpy's has no number
                number = error.errno or errno.ENOSPC
                raise OSError(number, os.strerror(number)) from None
            if report:
                report(done, len(copies))
        writer.close()

    def _add_header(self, writer: Any, values: Values, has_tokenizer: bool) -> None:
        """Copy the header's values but those in `values`, which are added."""
        kinds = pypi().GGUFValueType
        left_out = MADE_BY_WRITER if has_tokenizer else (*MADE_BY_WRITER, "tokenizer.")
        for name, field in self.reader.fields.items():
            empty = field.types[0] == kinds.ARRAY and not field.data  # gguf does not write it
            if empty or name.startswith(left_out) or name in values:
                continue
            try:
                content = field.contents()
            except UnicodeDecodeError:
                raise ModelError(
                    f"expected text in UTF-8 in the header, got other bytes in {name}"
                ) from None
            writer.add_key_value(name, content, field.types[0], field.types[-1])
        for name, value in values.items():
            kind = kinds.STRING if isinstance(value, str) else kinds.UINT32
            writer.add_key_value(name, value, kind)

    def _sampled(self, layers: Sequence[int], vocabulary: int) -> dict[str, Tensor]:
        """The tensors of a file with only these layers and this many tokens, by name there."""
        copies = {}
        for tensor in self.tensors:
            name = tensor.name
            layer = tensor.layer
            if layer in layers:
                name = name.replace(f"blk.{layer}.", f"blk.{layers.index(layer)}.", 1)
            elif layer is not None:
                continue
            elif len(tensor.data) == self.vocabulary:
                tensor = tensor._replace(data=tensor.data[:vocabulary])
            copies[name] = tensor
        return copies
