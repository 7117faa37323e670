"""Weights that are whole numbers times scales, as blocks of GGUF's types, which keep numbers and scales exactly.

    w[output, input] = scale[output, group of the input] * (code - zero point)

A block is 32 inputs of one output with a scale in half precision. With the numbers (code - zero point) in -8..7 it is
Q4_0, in -16..15 (4 bits with a zero point of their own) Q5_0, in -128..127 Q8_0. What fits in none is float32, which
holds any product of a number and a scale in half precision or bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..formats.tensor import F32, TENSOR_TYPES, TensorType

BLOCK = 32

_RANGES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-128, 127)}
_RECORDS = {
    "Q4_0": np.dtype([("scale", "<f2"), ("codes", "u1", 16)]),
    "Q5_0": np.dtype([("scale", "<f2"), ("high", "u1", 4), ("codes", "u1", 16)]),
    "Q8_0": np.dtype([("scale", "<f2"), ("codes", "i1", 32)]),
}


@dataclass(frozen=True)
class Integers:
    """A weight [outputs, inputs]: `numbers(first, last)` are int16 [last - first, inputs] of these outputs, from `low`
    to `high`; `scales` float32 [outputs, groups]; input i is in group i // `group`, or in group_of[i] where that is
    given."""

    inputs: int
    group: int
    scales: np.ndarray
    low: int
    high: int
    numbers: Callable[[int, int], np.ndarray]
    group_of: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.scales), self.inputs


def storage(weight: Integers) -> tuple[TensorType, str]:
    """The type that keeps a weight exactly, and why it is float32 if it is."""
    if weight.group_of is not None:
        return F32, "the inputs of a group are not neighbours (desc_act)"
    if weight.inputs % BLOCK or (weight.group % BLOCK and weight.scales.shape[1] > 1):
        return F32, f"groups of {weight.group} of {weight.inputs} inputs are not whole blocks of {BLOCK}"
    with np.errstate(over="ignore"):
        if not np.array_equal(weight.scales.astype(np.float16), weight.scales):
            return F32, "half precision does not hold their scales"
    for name, (low, high) in _RANGES.items():
        if low <= weight.low and weight.high <= high:
            return TENSOR_TYPES[name], ""
    return F32, f"numbers from {weight.low} to {weight.high} do not fit in 8 bits"


def stored_rows(weight: Integers, type: TensorType, first: int, last: int) -> np.ndarray:
    """Outputs `first` to `last` as they are stored in `type`: uint8 [last - first, bytes of a row]."""
    numbers, scales = weight.numbers(first, last), weight.scales[first:last]
    if type is F32:
        group_of = np.arange(weight.inputs) // weight.group if weight.group_of is None else weight.group_of
        return (numbers * scales[:, group_of]).astype(np.float32, copy=False).view(np.uint8)
    rows, blocks = last - first, weight.inputs // BLOCK
    out = np.empty((rows, blocks), _RECORDS[type.name])
    out["scale"] = np.repeat(scales, -(-weight.group // BLOCK), axis=1)[:, :blocks]
    numbers = numbers.reshape(rows, blocks, BLOCK)
    if type.name == "Q8_0":
        out["codes"] = numbers
    else:
        codes = (numbers - _RANGES[type.name][0]).astype(np.uint8)
        out["codes"] = codes[..., :16] & 15 | codes[..., 16:] << 4
        if type.name == "Q5_0":
            out["high"] = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return out.view(np.uint8).reshape(rows, -1)


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` codes of each row, uint8 [rows, count], from contiguous bytes of a row: `bits` each, low bits
    first, with no gaps."""
    if bits == 8:
        return data[:, :count]
    if 8 % bits == 0:
        codes = np.empty((*data.shape, 8 // bits), np.uint8)
        for place in range(8 // bits):
            np.bitwise_and(data >> (place * bits), (1 << bits) - 1, out=codes[..., place])
        return codes.reshape(len(data), -1)[:, :count]
    flags = np.unpackbits(data, axis=1, count=count * bits, bitorder="little").reshape(len(data), count, bits)
    return (flags << np.arange(bits, dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
