"""A named tensor of a model file: its raw bytes, mapped and not copied, and the table of the types they can have.

A type is a row of the table: so many elements in a block of so many bytes, and how a block becomes float32. The
layouts of the quantised types are ggml's; the `gguf` package decodes them.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFileError, ModelNotFoundError, UnsupportedModelError

_BLOCKS_AT_ONCE = 1024  # so that the temporaries of a decoder stay in the first levels of cache
_WORDS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class TensorType:
    """How elements are stored: blocks of `block` consecutive elements of a row, `block_bytes` bytes each.

    `decode` takes blocks, uint8 [n, block_bytes], to float32 [n, block]. A block's value is finite where the floats at
    `floats` in it are: offsets in bytes, and `float_type`.
    """

    name: str
    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]
    floats: tuple[int, ...] = (0,)
    float_type: str = "F16"

    def row_bytes(self, elements: int) -> int:
        """Bytes of a row of `elements` elements, a multiple of `block`."""
        return elements // self.block * self.block_bytes


class Tensor:
    """A tensor of a model file. `shape` is row-major, [out, in] for a weight; `data` is its bytes as stored: read-only
    uint8 [nbytes].

    What is mapped from a file must not be read after the file became shorter: the system ends a process that does. So
    every use asks for `data` again, which looks at the file's size first, and nothing is read once a model is loaded.
    """

    def __init__(self, name: str, shape: tuple[int, ...], type: TensorType, data: np.ndarray, path: Path) -> None:
        self.name, self.shape, self.type, self.path = name, shape, type, path
        self._data = data

    @property
    def data(self) -> np.ndarray:
        """Raises ModelFileError where the file has become shorter since it was opened."""
        mapping = _mapping(self._data)
        if mapping is not None and (size := mapping.size()) < len(mapping):
            raise ModelFileError(self.path, "file", f"had {len(mapping)} bytes when it was opened, and now has {size}")
        return self._data

    @property
    def nbytes(self) -> int:
        return self.type.row_bytes(math.prod(self.shape))

    def part(self, rows: range, columns: range) -> Tensor:
        """Some of a matrix as a tensor of its own, in the same memory if it has all columns; these are whole blocks."""
        data = self._rows_data(rows.start, rows.stop)
        if len(columns) < self.shape[1]:
            first, past = (at // self.type.block * self.type.block_bytes for at in (columns.start, columns.stop))
            data = np.ascontiguousarray(data[:, first:past])
        name = f"{self.name}[{rows.start}:{rows.stop}, {columns.start}:{columns.stop}]"
        return Tensor(name, (len(rows), len(columns)), self.type, data.reshape(-1), self.path)

    def _rows_data(self, first: int, past: int) -> np.ndarray:
        """uint8 [past - first, bytes of a row]"""
        return self.data.reshape(self.shape[0], -1)[first:past]

    def check_weights(self) -> Tensor:
        """The tensor itself, if it can be weights: UnsupportedModelError for a type that cannot, ModelFileError where
        it holds a value that is NaN or infinite."""
        if self.type.name not in TENSOR_TYPES:
            known = ", ".join(TENSOR_TYPES)
            raise UnsupportedModelError(f"{self.path}: tensor {self.name}: weights of {self.type.name}; use {known}")
        word, magnitude, infinity = _FLOATS[self.type.float_type]
        blocks = self.data.reshape(-1, self.type.block_bytes)
        for first in range(0, len(blocks), _WORDS_AT_ONCE):
            for at in self.type.floats:
                words = blocks[first : first + _WORDS_AT_ONCE, at : at + word.itemsize].view(word)
                if (words & magnitude).max() >= infinity:
                    row = (first + int((words & magnitude).argmax())) * self.type.block // self.shape[-1]
                    of = f"in row {row} of {self.shape[0]}" if len(self.shape) > 1 else "among its values"
                    raise ModelFileError(self.path, f"tensor {self.name}", f"holds a NaN or an infinity {of}")
        return self

    def decode(self, rows: slice | None = None) -> np.ndarray:
        """The tensor, or only `rows` of its first axis (for 2 and more axes), as contiguous float32 of its own."""
        if rows is not None and len(self.shape) < 2:
            raise ValueError(f"tensor {self.name} has shape {self.shape}: rows can be chosen from 2 axes on")
        data, shape = self.data, self.shape
        if rows is not None:
            data = data.reshape(shape[0], -1)[rows]
            shape = (len(data), *shape[1:])
        blocks = data.reshape(-1, self.type.block_bytes)
        out = np.empty((len(blocks), self.type.block), np.float32)
        step = max(1, _BLOCKS_AT_ONCE * 32 // self.type.block)
        with np.errstate(over="ignore", invalid="ignore"):  # a file may hold infinities; they are the model's own
            for first in range(0, len(blocks), step):
                out[first : first + step] = self.type.decode(blocks[first : first + step])
        return out.reshape(shape)


def _decode_f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


def _decode_f16(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f2").astype(np.float32)


def _decode_bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _decode_quantised(name: str, blocks: np.ndarray) -> np.ndarray:
    import gguf.quants

    return getattr(gguf.quants, name).dequantize_blocks(blocks)


def _decode_integers(dtype: str, blocks: np.ndarray) -> np.ndarray:
    return blocks.view(dtype).astype(np.float32)


def _decode_f8_e4m3(blocks: np.ndarray) -> np.ndarray:
    return F8_E4M3_VALUES[blocks]


def _decode_f8_e8m0(blocks: np.ndarray) -> np.ndarray:
    return np.ldexp(np.float32(1), blocks.astype(np.int32) - 127, dtype=np.float32)


def _f8_e4m3_values() -> np.ndarray:
    """float32 [256]: sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, NaN is all ones (Micikevicius et
    al. 2022, FP8 formats for deep learning)."""
    codes = np.arange(128)
    exponent, mantissa = codes >> 3, codes & 7
    values = np.where(exponent, np.ldexp(8.0 + mantissa, exponent - 10), np.ldexp(1.0 * mantissa, -9))
    values[127] = np.nan
    return np.concatenate([values, -values]).astype(np.float32)


F8_E4M3_VALUES = _f8_e4m3_values()


def _quantised(name: str, block: int, block_bytes: int, floats: tuple[int, ...] = (0,)) -> TensorType:
    return TensorType(name, block, block_bytes, partial(_decode_quantised, name), floats)


F32 = TensorType("F32", 1, 4, _decode_f32, float_type="F32")
F16 = TensorType("F16", 1, 2, _decode_f16)
BF16 = TensorType("BF16", 1, 2, _decode_bf16, float_type="BF16")

# Of each float: the integer of its size, the bits of its magnitude, and the magnitude from which on it is not finite.
_FLOATS = {
    "F32": (np.dtype("<u4"), np.uint32(0x7FFFFFFF), 0x7F800000),
    "F16": (np.dtype("<u2"), np.uint16(0x7FFF), 0x7C00),
    "BF16": (np.dtype("<u2"), np.uint16(0x7FFF), 0x7F80),
}

# fmt: off
TENSOR_TYPES: dict[str, TensorType] = {row.name: row for row in (
    F32, F16, BF16,
    _quantised("Q8_0", 32, 2 + 32),                   # scale; 32 int8
    _quantised("Q4_0", 32, 2 + 16),                   # scale; 32 nibbles, -8
    _quantised("Q4_1", 32, 2 + 2 + 16, (0, 2)),       # scale, minimum; 32 nibbles
    _quantised("Q5_0", 32, 2 + 4 + 16),               # scale; 32 fifth bits; 32 nibbles, -16
    _quantised("Q5_1", 32, 2 + 2 + 4 + 16, (0, 2)),   # scale, minimum; 32 fifth bits; 32 nibbles
    _quantised("Q2_K", 256, 16 + 64 + 2 + 2, (80, 82)),  # 16 scales and minima of 4 bits; 2 bits each; scales of both
    _quantised("Q3_K", 256, 32 + 64 + 12 + 2, (108,)),   # third bits; 2 bits each; 16 scales of 6 bits; their scale
    _quantised("Q4_K", 256, 2 + 2 + 12 + 128, (0, 2)),   # two scales; 8 scales and minima of 6 bits; nibbles
    _quantised("Q5_K", 256, 2 + 2 + 12 + 32 + 128, (0, 2)),  # as Q4_K, with fifth bits before the nibbles
    _quantised("Q6_K", 256, 128 + 64 + 16 + 2, (208,)),      # nibbles; upper 2 bits; 16 int8 scales; their scale
    _quantised("IQ4_NL", 32, 2 + 16),                 # scale; 32 nibbles into a table of 16 values
)}
# What else a safetensors file can hold: the parts of quantised weights, and buffers that are no weights.
STORED_TYPES: dict[str, TensorType] = TENSOR_TYPES | {row.name: row for row in (
    TensorType("F8_E4M3", 1, 1, _decode_f8_e4m3),
    TensorType("F8_E8M0", 1, 1, _decode_f8_e8m0),     # a power of two
    *(TensorType(name, 1, np.dtype(dtype).itemsize, partial(_decode_integers, dtype)) for name, dtype in (
        ("I8", "i1"), ("U8", "u1"), ("BOOL", "u1"), ("I16", "<i2"), ("I32", "<i4"), ("I64", "<i8"), ("F64", "<f8"),
    )),
)}
# fmt: on


def _mapping(array: Any) -> mmap.mmap | None:
    """The mapped file that an array is a part of."""
    while isinstance(array, np.ndarray):
        array = array.base
    if isinstance(array, memoryview):
        array = array.obj
    return array if isinstance(array, mmap.mmap) else None


def map_file(path: Path) -> np.ndarray:
    """A regular file's bytes as read-only uint8 [size], memory-mapped.

    Raises ModelNotFoundError where there is no such file, ModelFileError where it is empty or cannot be mapped.
    """
    try:
        # O_NONBLOCK: a named pipe must not make the open wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(path, "file", f"cannot be opened ({error})") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(path, "file", "is not a regular file")
        if status.st_size == 0:
            raise ModelFileError(path, "file", "is empty (0 bytes)")
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise ModelFileError(path, "file", f"cannot be mapped ({error})") from None
    finally:
        os.close(descriptor)


def make_tensor(
    path: Path, file: np.ndarray, name: str, shape: tuple[int, ...], type: TensorType, start: int
) -> Tensor:
    """The tensor whose bytes begin at `start` of a mapped file. Raises ModelFileError where it reaches past the end."""
    elements = math.prod(shape)
    if shape[-1:] and shape[-1] % type.block:
        raise ModelFileError(
            path, f"tensor {name}", f"rows of {shape[-1]} elements are not whole blocks of {type.block} ({type.name})"
        )
    nbytes = type.row_bytes(elements)
    if start + nbytes > len(file):
        raise ModelFileError(
            path, f"tensor {name}", f"ends at byte {start + nbytes}, past the file's end at {len(file)}"
        )
    return Tensor(name, shape, type, file[start : start + nbytes], path)
