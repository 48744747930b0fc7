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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cerebrum.vps.llama import ModelError

PIECE_BYTES = 1 << 22  # or weights, of a type without blocks: transcoded at once, by one thread
Rows = npt.NDArray[
    Any
]  # of a tensor: (n, weights), or (n, bytes of its blocks) where the type has blocks


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
    factors = np.ascontiguousarray(blocks[:, :4]).view("<f2").astype(np.float32)
    steps, least = pypi().quants.Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))
    with np.errstate(over="ignore"):
        scales = np.stack((factors[:, :1] * steps, -factors[:, 1:] * least), axis=-1).astype("<f2")
    if not np.isfinite(scales).all():
        raise ModelError("a scale of the weights is beyond the range of fp16")
    pairs = blocks[:, 16:].reshape(-1, 4, 32)
    values = np.stack((pairs & 15, pairs >> 4), axis=2).reshape(-1, 8, 32)
    packed = values[..., :16] | values[..., 16:] << np.uint8(4)
    return np.concatenate((scales.view(np.uint8), packed), axis=-1).reshape(len(rows), -1)


def transcode(rows: Rows, old: str, new: str) -> Rows:
    """Convert rows from one type to another."""
    if (old, new) == ("Q4_K", "Q4_1"):
        return q4_k_to_q4_1(rows)
    kinds, quants = pypi().GGMLQuantizationType, pypi().quants
    converted: Rows = quants.quantize(quants.dequantize(rows, kinds[old]), kinds[new])
    return converted


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file."""

    name: str
    type: str
    data: Rows  # with all dimensions, those of the tensor in reverse

    @property
    def is_matrix(self) -> bool:
        return self.data.ndim > 1 and self.name.endswith(".weight")

    @property
    def layer(self) -> int | None:
        first, _, rest = self.name.partition(".")
        number = rest.partition(".")[0]
        return int(number) if first == "blk" and number.isdecimal() else None

    def shape(self, new: str) -> tuple[int, ...]:
        """The shape of `data` in another type."""
        kinds, quants = pypi().GGMLQuantizationType, pypi().quants
        if new == self.type:
            return self.data.shape
        blocks = self.data.dtype == np.uint8
        weights = (
            quants.quant_shape_from_byte_shape(self.data.shape, kinds[self.type])
            if blocks
            else self.data.shape
        )
        shape: tuple[int, ...] = quants.quant_shape_to_byte_shape(weights, kinds[new])
        return shape

    def can_be(self, new: str) -> bool:
        """Whether its rows are whole blocks of another type."""
        try:
            return bool(self.shape(new))
        except ValueError:
            return False

    def size(self, new: str) -> int:
        """Bytes in another type."""
        return self.data.nbytes if new == self.type else math.prod(self.shape(new))

    def convert(self, new: str) -> Rows:
        """`data` in another type. By pieces, because floats take up to eight times as much
        memory.
        """
        rows = self.data.reshape(-1, self.data.shape[-1])
        step = max(1, PIECE_BYTES // rows.shape[1])
        with ThreadPoolExecutor() as pool:
            pieces = [rows[start : start + step] for start in range(0, len(rows), step)]
            new_rows = list(pool.map(lambda piece: transcode(piece, self.type, new), pieces))
        return np.concatenate(new_rows).reshape(self.shape(new))


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
            Tensor(one.name, one.tensor_type.name, one.data) for one in self.reader.tensors
        ]
        self.architecture: str = self.reader.fields["general.architecture"].contents()
        self.vocabulary = next(
            (len(one.data) for one in self.tensors if one.name == "token_embd.weight"), 0
        )

    def write(
        self,
        path: Path,
        types: Mapping[str, str],
        values: Mapping[str, str | int] | None = None,
        layers: Sequence[int] | None = None,
        vocabulary: int = 0,
        report: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> None:
        """Write a copy in which some tensors have other `types` and the header has these values.

        With `layers`, it has only these layers, a smaller `vocabulary`, and no tokenizer.
        `report(done, total)` counts tensors. ModelError if the header cannot be copied.
        """
        kinds, values = pypi().GGUFValueType, values or {}
        writer = pypi().GGUFWriter(path, self.architecture)
        left_out = (
            "GGUF.",
            "general.architecture",
            "general.alignment",
            *([] if layers is None else ["tokenizer."]),
        )
        for name, field in self.reader.fields.items():
            kind, item = field.types[0], field.types[-1]
            empty = kind == kinds.ARRAY and not field.data  # gguf does not write it
            if empty or name.startswith(left_out) or name in values:
                continue
            try:
                writer.add_key_value(
                    name, field.contents(), kind, item if kind == kinds.ARRAY else None
                )
            except UnicodeDecodeError:
                raise ModelError(
                    f"expected text in UTF-8 in the header, got other bytes in {name}"
                ) from None
        for name, value in values.items():
            writer.add_key_value(
                name, value, kinds.STRING if isinstance(value, str) else kinds.UINT32
            )
        parts = []
        for tensor in self.tensors:
            name, kind = tensor.name, types.get(tensor.name, tensor.type)
            if layers is not None and tensor.layer is None and len(tensor.data) == self.vocabulary:
                tensor = replace(tensor, data=tensor.data[:vocabulary])
            elif layers is not None and tensor.layer is not None:
                if tensor.layer not in layers:
                    continue
                name = name.replace(f"blk.{tensor.layer}.", f"blk.{layers.index(tensor.layer)}.", 1)
            raw = pypi().GGMLQuantizationType[kind]
            dtype = tensor.data.dtype if kind == tensor.type else np.dtype(np.uint8)
            writer.add_tensor_info(name, tensor.shape(kind), dtype, tensor.size(kind), raw)
            parts.append((tensor, kind))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (tensor, kind) in enumerate(parts, 1):
            data = tensor.data if kind == tensor.type else tensor.convert(kind)
            try:
                writer.write_tensor_data(data)
            except OSError as error:  # numpy's has no number
                raise OSError(
                    error.errno or errno.ENOSPC, error.strerror or os.strerror(errno.ENOSPC)
                ) from None
            report(done, len(parts))
        writer.close()
