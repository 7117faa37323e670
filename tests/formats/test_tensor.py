"""Every type of the table against the gguf package, and the rules of a Tensor."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from headrace.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from headrace.formats.gguf import open_gguf
from headrace.formats.tensor import STORED_TYPES, TENSOR_TYPES, Tensor, map_file


def random_tensor(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Random bytes, which are blocks of any type: scales of every size, infinities and NaN are among them."""
    type = TENSOR_TYPES[name]
    data = np.random.default_rng(seed).integers(0, 256, rows * type.row_bytes(columns), dtype=np.uint8)
    data.flags.writeable = False
    return Tensor("t", (rows, columns), type, data, Path("memory"))


def decoded_by_package(tensor: Tensor) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(tensor.data.reshape(tensor.shape[0], -1), GGMLQuantizationType[tensor.type.name])


def bits(array: np.ndarray) -> np.ndarray:
    """Bit patterns, all NaN alike."""
    return np.where(np.isnan(array), np.uint32(0x7FC00000), array.view(np.uint32))


def test_sizes_are_ggmls():
    for name, type in TENSOR_TYPES.items():
        assert (type.block, type.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[name]], name


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_decode_is_bit_equal_to_the_package(name: str):
    # 5 * 33 blocks of 32 or 256: both more and less than what is decoded at once
    tensor = random_tensor(name, 5, 33 * 256)
    decoded = tensor.decode()
    assert decoded.dtype == np.float32 and decoded.shape == tensor.shape and decoded.flags.c_contiguous
    assert np.array_equal(bits(decoded), bits(decoded_by_package(tensor)))


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_a_changed_byte_changes_the_decoded_row(name: str):
    tensor = random_tensor(name, 3, 512, seed=1)
    data = tensor.data.copy()
    data[tensor.nbytes // 2] ^= 0x11  # in the middle row
    changed = Tensor("t", tensor.shape, tensor.type, data, tensor.path).decode()
    same = (bits(changed) == bits(tensor.decode())).all(axis=1)
    assert same.tolist() == [True, False, True]


@pytest.mark.parametrize("name", ["F32", "F16", "Q4_1", "Q6_K"])
@pytest.mark.parametrize("rows", [slice(0, 2), slice(3, None), slice(1, 7, 3), slice(2, 2), slice(None)])
def test_rows(name: str, rows: slice):
    tensor = random_tensor(name, 7, 512)
    assert np.array_equal(bits(tensor.decode(rows)), bits(tensor.decode()[rows]))


def test_rows_of_a_vector_are_refused():
    tensor = Tensor("v", (2,), TENSOR_TYPES["F32"], np.zeros(8, np.uint8), Path("memory"))
    with pytest.raises(ValueError, match="2 axes"):
        tensor.decode(slice(0, 1))


def test_misaligned_floats_are_decoded_aligned():
    data = np.arange(9, dtype=np.uint8)[1:]
    decoded = Tensor("v", (2,), TENSOR_TYPES["F32"], data, Path("memory")).decode()
    assert decoded.flags.aligned and decoded.tobytes() == data.tobytes()


@pytest.mark.parametrize("name", TENSOR_TYPES)
def test_values_that_are_not_finite_are_named(name: str):
    """The check finds what decoding would show, in each type's own scales."""
    type = TENSOR_TYPES[name]
    width = type.float_type
    for seed in range(40):
        tensor = random_tensor(name, 3, 512, seed)
        data = tensor.data.copy().reshape(-1, type.block_bytes)
        size = {"F32": 4, "F16": 2, "BF16": 2}[width]
        for at in type.floats:  # finite, but for one in some
            data[:, at + size - 1] &= 0x3F
        tensor = Tensor("t", tensor.shape, type, data.reshape(-1), tensor.path)
        assert np.isfinite(tensor.decode()).all() and tensor.check_weights() is tensor
        place = seed * len(data) // 40
        words = data[place, type.floats[seed % len(type.floats)] :][:size].view("<u4" if size == 4 else "<u2")
        infinity, sign = {"F32": (0x7F800000, 1 << 31), "F16": (0x7C00, 1 << 15), "BF16": (0x7F80, 1 << 15)}[width]
        words[0] = infinity | seed % 2 | sign * (seed % 3 == 0)
        row = place * type.block // 512
        with pytest.raises(ModelFileError, match=f"tensor t: holds a NaN or an infinity in row {row} of 3"):
            tensor.check_weights()


def test_types_that_are_no_weights_are_refused():
    tensor = Tensor("codes", (2, 4), STORED_TYPES["I32"], np.zeros(32, np.uint8), Path("memory"))
    with pytest.raises(UnsupportedModelError, match="tensor codes: weights of I32; use F32, F16"):
        tensor.check_weights()


def test_data_is_a_read_only_map(smollm2: Path):
    tensor = open_gguf(smollm2).tensors["blk.0.attn_q.weight"]
    assert not tensor.data.flags.writeable and not tensor.data.flags.owndata
    with pytest.raises(ValueError):
        tensor.data[0] = 1


def test_what_cannot_be_mapped(tmp_path: Path):
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path / "empty",
        tmp_path / "pipe",
        tmp_path,
        Path("/dev/zero"),
        Path("a\0b"),
        tmp_path / ("x" * 300),
    ):
        with pytest.raises(ModelFileError):
            map_file(path)
    with pytest.raises(ModelNotFoundError):
        map_file(tmp_path / "absent")
