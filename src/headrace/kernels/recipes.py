"""The native matrix products' arithmetic in numpy, step for step: what csrc/matrix.h states, and nothing of its layout.

With quantised weights the answer has the same bits as the native one, on every instruction set. Weights come as the
GGUF file has them: `read_blocks` takes a format's blocks apart into codes, scales and minima.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

GROUP = 32  # inputs that share a scale of the activation
CODE_LIMIT = 120  # of activations by group
ROW_STEPS = np.float32(126)  # per-row recipe: a weight row's largest value, in steps

IQ4_NL_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])


@dataclass(frozen=True)
class Blocks:
    """Weights [out, in] as d * code + m, with integer codes (offset taken off) and d and m for every `group` inputs.

    `m` is None where the format has no minimum.
    """

    codes: np.ndarray  # int32 [out, in]
    d: np.ndarray  # float32 [out, in / group]
    m: np.ndarray | None
    group: int
    centred: bool = False  # multiplied as d * (code - 8) + (m + 8 * d)

    def values(self) -> np.ndarray:
        """float32 [out, in], rounded once."""
        d = np.repeat(self.d, self.group, axis=1)
        m = 0 if self.m is None else np.repeat(self.m, self.group, axis=1)
        return (d * self.codes.astype(np.float32) + m).astype(np.float32)


# ---- weights


def read_blocks(name: str, source: np.ndarray, rows: int, cols: int) -> Blocks:
    """Take apart a tensor's bytes (uint8), `rows` rows of GGUF blocks of the quantised format `name`."""
    inputs, size, read = _FORMATS[name]
    if cols % inputs or source.size != rows * (cols // inputs) * size:
        raise ValueError(f"{name} [{rows}, {cols}] has {rows * cols // inputs * size} bytes, got {source.size}")
    codes, d, m = read(source.reshape(-1, size))
    group = codes.shape[1] // d.shape[1]
    return Blocks(
        codes.reshape(rows, cols).astype(np.int32),
        d.reshape(rows, -1),
        None if m is None else m.reshape(rows, -1),
        group,
        name in CENTRED,
    )


_Parts = tuple[np.ndarray, np.ndarray, np.ndarray | None]


def _half(b: np.ndarray, at: int) -> np.ndarray:
    return b[:, at : at + 2].copy().view(np.float16).astype(np.float32)


def _nibbles(b: np.ndarray) -> np.ndarray:
    return np.concatenate([b & 15, b >> 4], axis=-1).astype(np.int32)


def _bits(b: np.ndarray) -> np.ndarray:
    return np.unpackbits(b, axis=-1, bitorder="little").astype(np.int32)


def _q4_0(b: np.ndarray) -> _Parts:
    return _nibbles(b[:, 2:]) - 8, _half(b, 0), None


def _q4_1(b: np.ndarray) -> _Parts:
    return _nibbles(b[:, 4:]), _half(b, 0), _half(b, 2)


def _q5_0(b: np.ndarray) -> _Parts:
    return (_nibbles(b[:, 6:]) | _bits(b[:, 2:6]) << 4) - 16, _half(b, 0), None


def _q5_1(b: np.ndarray) -> _Parts:
    return _nibbles(b[:, 8:]) | _bits(b[:, 4:8]) << 4, _half(b, 0), _half(b, 2)


def _q8_0(b: np.ndarray) -> _Parts:
    return b[:, 2:].copy().view(np.int8).astype(np.int32), _half(b, 0), None


def _iq4_nl(b: np.ndarray) -> _Parts:
    return IQ4_NL_VALUES[_nibbles(b[:, 2:])], _half(b, 0), None


def _crumbs(b: np.ndarray) -> np.ndarray:
    """2-bit codes of 256 inputs from 64 bytes: 128 inputs lie in 32 bytes, lowest bits first."""
    four = [b.reshape(-1, 2, 1, 32) >> 2 * j & 3 for j in range(4)]
    return np.concatenate(four, axis=2).reshape(len(b), 256).astype(np.int32)


def _q2_k(b: np.ndarray) -> _Parts:
    scales = b[:, :16]
    d, least = _half(b, 80), _half(b, 82)
    return _crumbs(b[:, 16:80]), d * (scales & 15).astype(np.float32), -(least * (scales >> 4).astype(np.float32))


def _q3_k(b: np.ndarray) -> _Parts:
    high = np.concatenate([b[:, :32] >> j & 1 for j in range(8)], axis=1).astype(np.int32)
    packed = b[:, 96:108]
    low = np.concatenate([packed[:, :8] & 15, packed[:, :8] >> 4], axis=1)
    top = np.concatenate([packed[:, 8:] >> 2 * j & 3 for j in range(4)], axis=1)
    scales = (low | top << 4).astype(np.int32) - 32
    return (_crumbs(b[:, 32:96]) | high << 2) - 4, _half(b, 108) * scales.astype(np.float32), None


def _scales_and_minima(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minima of Q4_K and Q5_K, from 12 bytes."""
    first, second, third = b[:, :4], b[:, 4:8], b[:, 8:]
    scales = np.concatenate([first & 63, third & 15 | first >> 6 << 4], axis=1)
    minima = np.concatenate([second & 63, third >> 4 | second >> 6 << 4], axis=1)
    return scales.astype(np.float32), minima.astype(np.float32)


def _q4_k(b: np.ndarray, nibbles_at: int = 16) -> _Parts:
    scales, minima = _scales_and_minima(b[:, 4:16])
    codes = _nibbles(b[:, nibbles_at:].reshape(len(b), 4, 32)).reshape(len(b), 256)
    return codes, _half(b, 0) * scales, -(_half(b, 2) * minima)


def _q5_k(b: np.ndarray) -> _Parts:
    codes, d, m = _q4_k(b, 48)
    high = np.concatenate([b[:, 16:48] >> j & 1 for j in range(8)], axis=1).astype(np.int32)
    return codes | high << 4, d, m


def _q6_k(b: np.ndarray) -> _Parts:
    low = _nibbles(b[:, :128].reshape(len(b), 2, 64)).reshape(len(b), 256)
    scales = b[:, 192:208].copy().view(np.int8).astype(np.float32)
    return (low | _crumbs(b[:, 128:192]) << 4) - 32, _half(b, 208) * scales, None


_FORMATS = {  # inputs of a block, its bytes, how to read it
    "Q4_0": (32, 18, _q4_0),
    "Q4_1": (32, 20, _q4_1),
    "Q5_0": (32, 22, _q5_0),
    "Q5_1": (32, 24, _q5_1),
    "Q8_0": (32, 34, _q8_0),
    "IQ4_NL": (32, 18, _iq4_nl),
    "Q2_K": (256, 84, _q2_k),
    "Q3_K": (256, 110, _q3_k),
    "Q4_K": (256, 144, _q4_k),
    "Q5_K": (256, 176, _q5_k),
    "Q6_K": (256, 210, _q6_k),
}
CENTRED = ("Q4_1", "Q4_K")
OFFSETS = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128, "IQ4_NL": 128, "Q3_K": 4, "Q6_K": 32}  # what was taken off the codes


# ---- activations


def quantise_groups(x: np.ndarray, shifted: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x float32 [rows, in] -> codes int32 [rows, in], scales and offsets float32 [rows, in / 32]: one a group."""
    groups = x.reshape(len(x), -1, GROUP)
    offsets = np.zeros(groups.shape[:2], np.float32)
    size = np.abs(groups).max(axis=2)
    if shifted:
        most, least = groups.max(axis=2), groups.min(axis=2)
        offsets = np.float32(0.5) * (most + least)
        size = np.maximum(most - offsets, offsets - least)
        groups = groups - offsets[..., None]
    scales = _bounded(size * (np.float32(1) / np.float32(CODE_LIMIT)))
    return _codes(groups, scales[..., None], CODE_LIMIT).reshape(x.shape), scales, offsets


def quantise_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x float32 [rows, in] -> codes int32 [rows, in], scales float32 [rows]."""
    scales = _bounded(np.abs(x).max(axis=1) * np.float32(1 / np.float32(127)))
    return _codes(x, scales[:, None], 127), scales


def _bounded(scales: np.ndarray) -> np.ndarray:
    return np.clip(scales, np.float32(2.0**-64), np.float32(2.0**64))


def _codes(x: np.ndarray, scales: np.ndarray, limit: int) -> np.ndarray:
    return np.rint(np.clip(x * (np.float32(1) / scales), np.float32(-limit), np.float32(limit))).astype(np.int32)


# ---- products


def multiply_groups(weight: Blocks, x: np.ndarray, shifted: bool = False) -> np.ndarray:
    """x [rows, in] times weight [out, in] -> float32 [rows, out], activations quantised per group of 32, `shifted` by
    the middle of their range or not."""
    codes, scales, offsets = quantise_groups(x, shifted)
    if weight.centred:
        assert weight.m is not None
        centred = fused_multiply_add(np.full_like(weight.d, 8), weight.d, weight.m)
        weight = replace(weight, codes=weight.codes - 8, m=centred)
    per = GROUP // weight.group  # sums a group of 32 has: two with scales for 16 inputs
    x_parts = codes.reshape(len(x), -1, weight.group)
    w_parts = weight.codes.reshape(len(weight.codes), -1, weight.group)
    acc = np.zeros((len(x), len(weight.codes)), np.float32)
    for group in range(scales.shape[1]):
        s = scales[:, group, None]
        parts = range(group * per, (group + 1) * per)
        if shifted:
            acc = fused_multiply_add(_sum_of_weights(weight, parts)[None, :], offsets[:, group, None], acc)
        if weight.m is not None:
            for part in parts:
                total = x_parts[:, part].sum(axis=1, dtype=np.int32).astype(np.float32)[:, None]
                acc = fused_multiply_add(weight.m[None, :, part], s * total, acc)
        for part in parts:
            total = (x_parts[:, part] @ w_parts[:, part].T).astype(np.float32)
            acc = fused_multiply_add(weight.d[None, :, part] * s, total, acc)
    return acc


def _sum_of_weights(weight: Blocks, parts: range) -> np.ndarray:
    """float32 [out] of one group of 32: the sums of codes are exact, each part's is scaled and added in turn."""
    count = np.float32(weight.group)
    sums = weight.codes.reshape(len(weight.codes), -1, weight.group).sum(axis=2, dtype=np.int32).astype(np.float32)
    first = weight.d[:, parts[0]]
    if weight.m is None:
        total = first * sums[:, parts[0]]
    else:
        minima = weight.m[:, parts[0]]
        for part in parts[1:]:
            minima = minima + weight.m[:, part]
        total = fused_multiply_add(first, sums[:, parts[0]], count * minima)
    for part in parts[1:]:
        total = fused_multiply_add(weight.d[:, part], sums[:, part], total)
    return total


def multiply_rows(weight: Blocks, offset: int, x: np.ndarray) -> np.ndarray:
    """The same with one scale per row of x, and weights in steps of their row's largest value.

    `offset` is the format's (OFFSETS, else 0): it enters the weights' rounding.
    """
    codes, scales = quantise_rows(x)
    values = weight.values()
    steps = np.abs(values).max(axis=1) / ROW_STEPS
    inverse = (np.float32(256) / np.maximum(steps, np.float32(2.0**-100)))[:, None]
    factor = np.rint(weight.d * inverse).astype(np.int32)
    addend = -offset * factor
    if weight.m is not None:
        addend = addend + np.rint(weight.m * inverse).astype(np.int32)
    factor, addend = (np.repeat(part, weight.group, axis=1) for part in (factor, addend))
    w8 = ((weight.codes + offset) * factor + addend + 128) >> 8
    total = codes.astype(np.int64) @ w8.T.astype(np.int64)
    return total.astype(np.float32) * (steps[None, :] * scales[:, None])


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 arrays, rounded once.

    The product is exact in float64. Its sum with c is rounded to odd there, so that rounding to float32 afterwards is
    as good as from the exact sum (Boldo and Melquiond 2008).
    """
    product, addend = np.asarray(a, np.float64) * b, np.asarray(c, np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64)
    even = (error != 0) & (bits & 1 == 0)
    towards = np.where((error > 0) == (total > 0), 1, -1)
    return (bits + np.where(even, towards, 0)).view(np.float64).astype(np.float32)
