"""GGUF: read the header of a model file, convert its weights to other types, and write them to a new file.

    from cerebrum.vps.gguf import Gguf, Part
    with Gguf(Path("model.gguf")) as file:
        parts = [Part(tensor, {"q5_0": "q8_0"}.get(tensor.type, tensor.type)) for tensor in file.tensors]
        file.write(Path("new.gguf"), parts)

llama.cpp reads and writes the headers. Where a type can hold another type's weights exactly (`EXACT`), this module
transcodes them: llama.cpp's quantizer uses floats and chooses new scales. Type names are ggml's: `q4_K`, `q8_0`.

Sources of the block layouts: ggml-common.h and ggml-quants.c of llama.cpp (MIT), and docs/gguf.md of ggml.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from cerebrum.vps.llama import ROLLBACK, ROLLING_BACK, ModelError, Shape, keep_log, llama

Bytes = npt.NDArray[np.uint8]


# ------------------------------------------------------------------------------------ policy: transcoding

# A block holds 32 weights, a super-block 256. "d" is a scale and "m" a minimum, both fp16, at the block's beginning.
# Weights j and j + 16 of a block share a byte: j in its low half, j + 16 in its high half.


def q5_0_to_q8_0(blocks: Bytes) -> Bytes:
    """Exact: d · (q - 16) keeps d, and q - 16 fits into an int8. Q5_0 has d, the fifth bits of its 32 numbers, their
    nibbles; Q8_0 has d, then 32 int8."""
    high = np.unpackbits(blocks[:, 2:6], axis=-1, bitorder="little")
    low = np.concatenate((blocks[:, 6:] & 15, blocks[:, 6:] >> 4), axis=-1)
    return np.concatenate((blocks[:, :2], (low | high << np.uint8(4)) - np.uint8(16)), axis=-1)


def k_scales(blocks: Bytes) -> Bytes:
    """Scale and minimum of each of a super-block's 8 blocks, as Q4_1 and Q5_1 store them: (n, 8, 4) bytes of two fp16.

    Q4_K and Q5_K store two fp16, and 8 scales and 8 minima of 6 bits in 12 bytes (`get_scale_min_k4` in ggml-quants.c).
    """
    first, middle, last = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate((first & 63, last & 15 | first >> 6 << 4), axis=-1)
    least = np.concatenate((middle & 63, last >> 4 | middle >> 6 << 4), axis=-1)
    scales = finite(scales_of(blocks).astype(np.float32) * scale)
    minima = finite(scales_of(blocks, 2).astype(np.float32) * -least.astype(np.float32))
    return np.stack((scales, minima), axis=-1).view(np.uint8)


def k_nibbles(packed: Bytes) -> Bytes:
    """A super-block's 4-bit numbers as Q4_1 and Q5_1 pack them, (n, 8, 16) bytes.

    Byte l of the g-th 32 bytes has weight l of block 2g in its low half, and weight l of block 2g + 1 in its high half.
    """
    pairs = packed.reshape(-1, 4, 32)
    values = np.stack((pairs & 15, pairs >> 4), axis=2).reshape(-1, 8, 32)
    joined: Bytes = values[..., :16] | values[..., 16:] << np.uint8(4)
    return joined


def q4_k_to_q4_1(blocks: Bytes) -> Bytes:
    """Exact but for rounding each block's scale and minimum to fp16: d·q + m has the same 4-bit q."""
    return np.concatenate((k_scales(blocks), k_nibbles(blocks[:, 16:])), axis=-1)


def q5_k_to_q5_1(blocks: Bytes) -> Bytes:
    """Exact but for rounding, like Q4_K. Bit b of byte l of the fifth bits belongs to weight l of block b."""
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    high = np.packbits(fifth, axis=-1, bitorder="little")
    return np.concatenate((k_scales(blocks), high, k_nibbles(blocks[:, 48:])), axis=-1)


def scales_of(blocks: Bytes, offset: int = 0) -> npt.NDArray[np.float16]:
    """The fp16 at `offset` of each block, shape (n, 1)."""
    return np.ascontiguousarray(blocks[:, offset : offset + 2]).view("<f2")


def finite(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float16]:
    """Round scales to fp16. ModelError if a scale is beyond the range of fp16. Real models have no such scale."""
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = scales.astype("<f2")
    if not np.isfinite(rounded).all():
        raise ModelError("a scale of the weights is beyond the range of fp16")
    return rounded


EXACT: Mapping[tuple[str, str], Callable[[Bytes], Bytes]] = {
    ("q5_0", "q8_0"): q5_0_to_q8_0,
    ("q4_K", "q4_1"): q4_k_to_q4_1,
    ("q5_K", "q5_1"): q5_k_to_q5_1,
}


def transcode(data: Bytes, source: str, target: str) -> Bytes:
    """Convert whole rows from one type's blocks to another's."""
    if source == target:
        return data
    if exact := EXACT.get((source, target)):
        return exact(data.reshape(-1, ggml().type_size(source))).reshape(-1)
    return ggml().quantize(ggml().dequantize(data, source), target)


# ---------------------------------------------------------------------------------------------- IO: ggml


class _GgufParams(ctypes.Structure):  # struct gguf_init_params
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class _GgmlParams(ctypes.Structure):  # struct ggml_init_params
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _TypeTraits(ctypes.Structure):  # struct ggml_type_traits
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.c_void_p),
    )


_VOID, _INT, _LONG, _SIZE, _TEXT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_char_p
_FUNCTIONS: Mapping[str, tuple[Any, tuple[Any, ...]]] = {
    "gguf_init_from_file": (_VOID, (_TEXT, _GgufParams)),
    "gguf_init_empty": (_VOID, ()),
    "gguf_free": (None, (_VOID,)),
    "gguf_get_data_offset": (_SIZE, (_VOID,)),
    "gguf_find_key": (_LONG, (_VOID, _TEXT)),
    "gguf_get_kv_type": (_INT, (_VOID, _LONG)),
    "gguf_get_val_u32": (ctypes.c_uint32, (_VOID, _LONG)),
    "gguf_get_val_str": (_TEXT, (_VOID, _LONG)),
    "gguf_get_arr_n": (_SIZE, (_VOID, _LONG)),
    "gguf_get_arr_type": (_INT, (_VOID, _LONG)),
    "gguf_get_arr_data": (ctypes.POINTER(ctypes.c_uint32), (_VOID, _LONG)),
    "gguf_get_n_tensors": (_LONG, (_VOID,)),
    "gguf_get_tensor_name": (_TEXT, (_VOID, _LONG)),
    "gguf_get_tensor_type": (_INT, (_VOID, _LONG)),
    "gguf_get_tensor_offset": (_SIZE, (_VOID, _LONG)),
    "gguf_get_tensor_ne": (ctypes.POINTER(ctypes.c_int64), (_VOID, _LONG)),
    "gguf_set_kv": (None, (_VOID, _VOID)),
    "gguf_set_val_str": (None, (_VOID, _TEXT, _TEXT)),
    "gguf_set_val_u32": (None, (_VOID, _TEXT, ctypes.c_uint32)),
    "gguf_add_tensor": (None, (_VOID, _VOID)),
    "gguf_get_n_kv": (_LONG, (_VOID,)),
    "gguf_get_key": (_TEXT, (_VOID, _LONG)),
    "gguf_remove_key": (_LONG, (_VOID, _TEXT)),
    "gguf_get_meta_size": (_SIZE, (_VOID,)),
    "gguf_get_meta_data": (None, (_VOID, _VOID)),
    "ggml_free": (None, (_VOID,)),
    "ggml_init": (_VOID, (_GgmlParams,)),
    "ggml_tensor_overhead": (_SIZE, ()),
    "ggml_new_tensor": (_VOID, (_VOID, _INT, _INT, ctypes.POINTER(ctypes.c_int64))),
    "ggml_set_name": (_VOID, (_VOID, _TEXT)),
    "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), (_INT,)),
    "ggml_quantize_chunk": (_SIZE, (_INT, _VOID, _VOID, _LONG, _LONG, _LONG, _VOID)),
}
GGUF_UINT32, GGUF_INT32, GGUF_STRING, GGUF_ARRAY = 4, 5, 8, 9  # enum gguf_type


class Ggml:
    """The functions of ggml's base library that llama-cpp-python does not declare. Types go by their names in ggml."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
        self.lib.ggml_log_set(keep_log, None)  # for this copy too: the wheel has the library under several names
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self.lib, name)
            function.restype, function.argtypes = result, arguments
        self.names: dict[int, str] = {}  # by number in enum ggml_type, which has gaps
        self.traits: dict[str, _TypeTraits] = {}
        for number in range(llama.GGML_TYPE_COUNT):
            traits = self.lib.ggml_get_type_traits(number).contents
            if traits.type_name:
                self.names[number] = traits.type_name.decode()
                self.traits[self.names[number]] = traits
        self.numbers = {name: number for number, name in self.names.items()}

    def type_size(self, name: str) -> int:
        """Bytes of a block."""
        return int(self.traits[name].type_size)

    def data_size(self, name: str, weights: int) -> int:
        """Bytes that `weights` weights take, a multiple of the type's block."""
        return weights // int(self.traits[name].blck_size) * self.type_size(name)

    def dequantize(self, data: Bytes, name: str) -> npt.NDArray[np.float32]:
        data = np.ascontiguousarray(data)
        floats = np.empty(data.size // self.type_size(name) * self.traits[name].blck_size, np.float32)
        self.traits[name].to_float(data.ctypes.data, floats.ctypes.data, floats.size)
        return floats

    def quantize(self, floats: npt.NDArray[np.float32], name: str) -> Bytes:
        data = np.empty(self.data_size(name, floats.size), np.uint8)
        self.lib.ggml_quantize_chunk(self.numbers[name], floats.ctypes.data, data.ctypes.data, 0, 1, floats.size, None)
        return data


@functools.cache
def ggml() -> Ggml:
    return Ggml()


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a GGUF file. `dimensions` always has 4 entries, the first of which is the length of a row; `offset`
    counts bytes from the file's beginning."""

    name: str
    type: str
    dimensions: tuple[int, ...]
    offset: int

    @property
    def weights(self) -> int:
        return math.prod(self.dimensions)

    @property
    def size(self) -> int:
        """In bytes."""
        return ggml().data_size(self.type, self.weights)

    @property
    def is_matrix(self) -> bool:
        return self.dimensions[1] > 1 and self.name.endswith(".weight")

    @property
    def layer(self) -> int | None:
        first, _, rest = self.name.partition(".")
        number = rest.partition(".")[0]
        return int(number) if first == "blk" and number.isdecimal() else None

    @property
    def kind(self) -> str:
        """The name without the layer: `ffn_down`, `token_embd`."""
        return self.name.removesuffix(".weight").removeprefix(f"blk.{self.layer}.")


ALIGNMENT = 32  # bytes; of tensors in a file that sets no other alignment
PIECE_WEIGHTS = 1 << 20  # transcoded at once, by one thread


class Part:
    """A tensor of a new file: one of the old file's, in another type, under another name, or only its first rows."""

    def __init__(self, tensor: Tensor, new_type: str, name: str = "", dimensions: tuple[int, ...] = ()) -> None:
        self.tensor, self.type, self.name = tensor, new_type, name or tensor.name
        self.dimensions = dimensions or tensor.dimensions
        self.weights = math.prod(self.dimensions)

    def read(self, source: int, start: int) -> Bytes:
        """Up to PIECE_WEIGHTS weights from `start` on, in the new type. ModelError if the file is cut short."""
        count, old = min(PIECE_WEIGHTS, self.weights - start), self.tensor.type
        size = ggml().data_size(old, count)
        data = os.pread(source, size, self.tensor.offset + ggml().data_size(old, start))
        if len(data) != size:
            raise ModelError("the file is cut short")
        return transcode(np.frombuffer(data, np.uint8), old, self.type)


class Gguf:
    """The header of a GGUF file, as a context manager. ModelError if the file is not a GGUF."""

    def __init__(self, path: Path) -> None:
        path.open("rb").close()  # an OSError says more than the library
        self.path, self.lib = path, ggml().lib
        self.handle = self.lib.gguf_init_from_file(os.fsencode(path), _GgufParams(True, None))
        if not self.handle:
            raise ModelError("not a readable GGUF file")

    def __enter__(self) -> Gguf:
        return self

    def __exit__(self, *_: object) -> None:
        self.lib.gguf_free(self.handle)

    def _place(self, key: str, kind: int) -> int:
        """The index of the key's pair, -1 if the key is missing or its value is of another kind."""
        place = int(self.lib.gguf_find_key(self.handle, key.encode()))
        return place if place >= 0 and self.lib.gguf_get_kv_type(self.handle, place) == kind else -1

    def number(self, key: str, default: int) -> int:
        place = self._place(key, GGUF_UINT32)
        return int(self.lib.gguf_get_val_u32(self.handle, place)) if place >= 0 else default

    def layered(self, key: str, layers: int, default: int) -> list[int]:
        """A number for each layer: the header has one for all, or an array."""
        place = self._place(key, GGUF_ARRAY)
        if place < 0 or self.lib.gguf_get_arr_type(self.handle, place) not in (GGUF_UINT32, GGUF_INT32):
            return [self.number(key, default)] * layers
        count = int(self.lib.gguf_get_arr_n(self.handle, place))
        values = self.lib.gguf_get_arr_data(self.handle, place)
        return [int(values[layer]) if layer < count else default for layer in range(layers)]

    def text(self, key: str) -> str:
        """The value of a text key, "" if there is none."""
        place = self._place(key, GGUF_STRING)
        value: bytes = self.lib.gguf_get_val_str(self.handle, place) if place >= 0 else b""
        return value.decode("utf-8", "replace")

    @property
    def architecture(self) -> str:
        if name := self.text("general.architecture"):
            return name
        raise ModelError("a GGUF file without an architecture")

    @property
    def shape(self) -> Shape:
        """ModelError if a dimension is missing or impossible."""
        arch = self.architecture
        layers, width = self.number(f"{arch}.block_count", 0), self.number(f"{arch}.embedding_length", 0)
        state = self._state(arch, width)
        heads = max(self.layered(f"{arch}.attention.head_count", layers, 0 if state else 1), default=0)
        if min(layers, width) < 1 or not (heads or state):
            raise ModelError("expected at least one layer, head and embedding dimension in the header")
        kv_heads = self.layered(f"{arch}.attention.head_count_kv", layers, heads)
        if every := self.number(f"{arch}.full_attention_interval", 0):  # only every so many layers attend
            kv_heads = [count * ((layer + 1) % every == 0) for layer, count in enumerate(kv_heads)]
        # Where some layers attend, the others are recurrent; where all do, all may be both.
        recurrent = kv_heads.count(0) or layers
        copies = 1 + ROLLBACK * (arch in ROLLING_BACK)
        tokens = self._place("tokenizer.ggml.tokens", GGUF_ARRAY)
        k_width = self.number(f"{arch}.attention.key_length", width // max(1, heads))
        v_width = self.number(f"{arch}.attention.value_length", width // max(1, heads))
        feed_forward = max(self.layered(f"{arch}.feed_forward_length", layers, 0)) or 4 * width
        expert = self.number(f"{arch}.expert_feed_forward_length", feed_forward)
        return Shape(
            layers=layers,
            kv_width=sum(kv_heads) * (k_width + v_width),
            heads=max(1, heads),
            embedding=width,
            feed_forward=max(feed_forward, self.number(f"{arch}.expert_used_count", 0) * expert),
            vocabulary=int(self.lib.gguf_get_arr_n(self.handle, tokens)) if tokens >= 0 else 0,
            state=recurrent * state * copies,
        )

    def _state(self, arch: str, width: int) -> int:
        """Bytes of one layer's recurrent state (`llama_hparams::n_embd_r` and `n_embd_s` of llama.cpp, in floats)."""
        if cached := self.number(f"{arch}.shortconv.l_cache", 0):
            return 4 * width * (cached - 1)
        if size := self.number(f"{arch}.wkv.head_size", 0):
            return 4 * width * (2 + size)
        names = "conv_kernel", "inner_size", "group_count", "state_size"
        kernel, inner, groups, size = (self.number(f"{arch}.ssm.{name}", 0) for name in names)
        return 4 * (max(0, kernel - 1) * (inner + 2 * groups * size) + size * inner)

    @property
    def tensors(self) -> list[Tensor]:
        lib, handle, start = self.lib, self.handle, int(self.lib.gguf_get_data_offset(self.handle))
        return [
            Tensor(
                name=lib.gguf_get_tensor_name(handle, i).decode("utf-8", "replace"),
                type=ggml().names[lib.gguf_get_tensor_type(handle, i)],
                dimensions=tuple(lib.gguf_get_tensor_ne(handle, i)[:4]),
                offset=start + int(lib.gguf_get_tensor_offset(handle, i)),
            )
            for i in range(lib.gguf_get_n_tensors(handle))
        ]

    def write(
        self,
        path: Path,
        parts: Sequence[Part],
        values: Mapping[str, str | int] | None = None,
        without: str = "",
        report: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> int:
        """Write a file of these parts, and return its size.

        The header has `values` and this file's pairs, except those whose keys begin with `without`.
        `report(done, total)` counts bytes. OSError if the disk is full: the space is reserved before the first byte is
        written.
        """
        header, offsets = self._header(parts, values or {}, without)
        sizes = [ggml().data_size(part.type, part.weights) for part in parts]
        total = max([len(header), *(offset + size for offset, size in zip(offsets, sizes, strict=True))])
        total += -total % ALIGNMENT
        with self.path.open("rb") as source, path.open("wb") as output, ThreadPoolExecutor() as pool:
            os.posix_fallocate(output.fileno(), 0, total)
            write_whole(output.fileno(), header, 0)

            def write_piece(part: Part, offset: int, start: int) -> int:
                data = part.read(source.fileno(), start)
                write_whole(output.fileno(), data.tobytes(), offset + ggml().data_size(part.type, start))
                return data.size

            pieces = [
                (part, offset, start)
                for part, offset in zip(parts, offsets, strict=True)
                for start in range(0, part.weights, PIECE_WEIGHTS)
            ]
            done = 0
            for written in pool.map(write_piece, *zip(*pieces, strict=True)):
                done += written
                report(done, total)
            report(total, total)
        return total

    def _header(self, parts: Sequence[Part], values: Mapping[str, str | int], without: str) -> tuple[bytes, list[int]]:
        """The header of a file of these parts, and the offset of each part in the file."""
        lib = self.lib
        handle = ctypes.c_void_p(lib.gguf_init_empty())
        context = ctypes.c_void_p(lib.ggml_init(_GgmlParams((len(parts) + 1) * lib.ggml_tensor_overhead(), None, True)))
        try:
            lib.gguf_set_kv(handle, self.handle)
            for key in [lib.gguf_get_key(handle, i) for i in range(lib.gguf_get_n_kv(handle))]:
                # Drop this file's alignment, which may be another one: the new file always has the default.
                if key == b"general.alignment" or (without and key.startswith(without.encode())):
                    lib.gguf_remove_key(handle, key)
            for name, value in values.items():
                if isinstance(value, str):
                    lib.gguf_set_val_str(handle, name.encode(), value.encode())
                else:
                    lib.gguf_set_val_u32(handle, name.encode(), value)
            for part in parts:
                dimensions = (ctypes.c_int64 * 4)(*part.dimensions)
                described = lib.ggml_new_tensor(context, ggml().numbers[part.type], 4, dimensions)
                lib.gguf_add_tensor(handle, lib.ggml_set_name(described, part.name.encode()))
            header = ctypes.create_string_buffer(lib.gguf_get_meta_size(handle))
            lib.gguf_get_meta_data(handle, header)
            return bytes(header), [len(header) + int(lib.gguf_get_tensor_offset(handle, i)) for i in range(len(parts))]
        finally:
            lib.gguf_free(handle)
            lib.ggml_free(context)


def write_whole(file: int, data: bytes, offset: int) -> None:
    if os.pwrite(file, data, offset) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_shape(path: Path) -> Shape:
    """The dimensions in a GGUF's header. ModelError if the file is not a GGUF."""
    with Gguf(path) as file:
        return file.shape
