"""Each layout's weights against torch's reading of the same tensors, to the bit, and the type that keeps them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from headrace.errors import ModelFileError, UnsupportedModelError  # noqa: E402
from headrace.formats.safetensors import open_checkpoint  # noqa: E402
from headrace.formats.tensor import Tensor  # noqa: E402
from headrace.quant.read import read_quantised  # noqa: E402

from . import layouts as q  # noqa: E402

Parts = dict[str, Any]
PACKED = q.compressed("pack-quantized")


def weight(outputs: int = 48, inputs: int = 128, seed: int = 0) -> Any:
    """Outputs of different sizes, one of them all zero, and a few large values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator) * torch.logspace(-2, 0.5, outputs)[:, None]
    values[3] = 0
    values[:, 7] *= 5
    return values


def opened(folder: Path, parts: Parts, config: dict[str, Any] | None, **model: Any) -> Tensor:
    q.write_folder(folder, model, {f"layer.{name}": part for name, part in parts.items()}, config)
    checkpoint = read_quantised(open_checkpoint(folder))
    assert list(checkpoint.tensors) == ["layer.weight"]
    return checkpoint.tensors["layer.weight"]


W = weight()
CASES: dict[str, tuple[Callable[[], Parts], Callable[[Parts], Any], dict[str, Any], str]] = {
    "gptq": (lambda: q.gptq(W), lambda p: q.dequantise_gptq(p, 4, False), q.GPTQ, "Q4_0"),
    "gptq, one group": (
        lambda: q.gptq(W, group=-1),
        lambda p: q.dequantise_gptq(p, 4, False),
        q.GPTQ | {"group_size": -1},
        "Q4_0",
    ),
    "gptq, zero points": (
        lambda: q.gptq(W, symmetric=False),
        lambda p: q.dequantise_gptq(p, 4, False),
        q.GPTQ,
        "Q5_0",
    ),
    "gptq v2, zero points": (
        lambda: q.gptq(W, symmetric=False, v2=True),
        lambda p: q.dequantise_gptq(p, 4, True),
        q.GPTQ | {"checkpoint_format": "gptq_v2"},
        "Q5_0",
    ),
    "gptq, order": (lambda: q.gptq(W, order=True), lambda p: q.dequantise_gptq(p, 4, False), q.GPTQ, "F32"),
    "gptq, 2 bits": (
        lambda: q.gptq(W, bits=2),
        lambda p: q.dequantise_gptq(p, 2, False),
        q.GPTQ | {"bits": 2},
        "Q4_0",
    ),
    "gptq v2, 3 bits": (
        lambda: q.gptq(W, bits=3, v2=True),
        lambda p: q.dequantise_gptq(p, 3, True),
        q.GPTQ | {"bits": 3, "checkpoint_format": "gptq_v2"},
        "Q4_0",
    ),
    "gptq, 8 bits": (
        lambda: q.gptq(W, bits=8),
        lambda p: q.dequantise_gptq(p, 8, False),
        q.GPTQ | {"bits": 8},
        "Q8_0",
    ),
    "gptq, 8 bits, zero points": (
        lambda: q.gptq(W, bits=8, symmetric=False),
        lambda p: q.dequantise_gptq(p, 8, False),
        q.GPTQ | {"bits": 8},
        "F32",
    ),
    "gptq, small groups": (
        lambda: q.gptq(W, group=16),
        lambda p: q.dequantise_gptq(p, 4, False),
        q.GPTQ | {"group_size": 16},
        "F32",
    ),
    "awq": (lambda: q.awq(W), lambda p: q.dequantise_awq(p, 32), q.AWQ, "Q5_0"),
    "awq, one group": (
        lambda: q.awq(W, group=-1),
        lambda p: q.dequantise_awq(p, -1),
        q.AWQ | {"group_size": -1},
        "Q5_0",
    ),
    "packed": (
        lambda: q.packed_integers(W),
        lambda p: q.dequantise_packed(p, 4),
        PACKED,
        "Q4_0",
    ),
    "packed, zero points": (
        lambda: q.packed_integers(W, symmetric=False),
        lambda p: q.dequantise_packed(p, 4),
        q.compressed("pack-quantized", symmetric=False),
        "Q5_0",
    ),
    "packed, a group an output": (
        lambda: q.packed_integers(W, group=-1),
        lambda p: q.dequantise_packed(p, 4),
        q.compressed("pack-quantized", strategy="channel", group_size=None),
        "Q4_0",
    ),
    "packed, 8 bits": (
        lambda: q.packed_integers(W, bits=8, dtype=torch.float16),
        lambda p: q.dequantise_packed(p, 8),
        q.compressed("pack-quantized", num_bits=8),
        "Q8_0",
    ),
    "packed, 3 bits": (
        lambda: q.packed_integers(W, bits=3),
        lambda p: q.dequantise_packed(p, 3),
        q.compressed("pack-quantized", num_bits=3),
        "Q4_0",
    ),
    "packed, float32 scales": (
        lambda: q.packed_integers(W, dtype=torch.float32),
        lambda p: q.dequantise_packed(p, 4),
        PACKED,
        "F32",
    ),
    "int8": (lambda: q.int8(W), q.dequantise_scaled, q.compressed("int-quantized", num_bits=8), "Q8_0"),
    "int8, a scale for all": (
        lambda: q.int8(W, per="tensor"),
        q.dequantise_scaled,
        q.compressed("int-quantized", num_bits=8),
        "Q8_0",
    ),
    "fp8": (lambda: q.fp8(W), q.dequantise_scaled, q.FP8, "F32"),
    "fp8, a scale an output": (
        lambda: q.fp8(W, block=(1, 128)),
        lambda p: q.dequantise_scaled(p, (1, 128)),
        q.compressed("float-quantized"),
        "F32",
    ),
    "fp8, blocks of which one is wider": (
        lambda: q.fp8(weight(100, 80), block=(32, 128)),
        lambda p: q.dequantise_scaled(p, (32, 128)),
        q.FP8 | {"weight_block_size": [32, 128]},
        "F32",
    ),
    "fp8, blocks": (
        lambda: q.fp8(weight(100, 80), block=(32, 64), name="weight_scale_inv"),
        lambda p: q.dequantise_scaled(p, (32, 64)),
        q.FP8 | {"weight_block_size": [32, 64]},
        "F32",
    ),
}


@pytest.mark.filterwarnings("ignore:.*weights are held as F32")
@pytest.mark.parametrize("case", CASES)
def test_weights_equal_torchs_reading_of_the_same_tensors(tmp_path: Path, case: str) -> None:
    make, dequantise, config, type = CASES[case]
    parts = make()
    tensor = opened(tmp_path, parts, config)
    expected = dequantise(parts).numpy()
    assert tensor.shape == expected.shape and tensor.type.name == type
    assert np.array_equal(tensor.decode(), expected)
    assert len(tensor.data) == tensor.nbytes
    original = weight(*expected.shape).numpy()
    assert np.abs(expected - original).max() < 0.5 * np.abs(original).max()  # the layouts hold that weight
    for rows in (slice(5, 21), slice(0, 1), slice(None, None, 7), slice(9, 9)):
        assert np.array_equal(tensor.decode(rows), expected[rows])


@pytest.mark.filterwarnings("ignore:.*weights are held as F32")
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("fp8")])
def test_every_code_counts(tmp_path: Path, case: str) -> None:
    """The control: one bit of the codes turned around changes the weight, in one place."""
    make, dequantise, config, _ = CASES[case]
    parts = make()
    name = next(name for name in ("qweight", "weight_packed", "weight") if name in parts)
    before = opened(tmp_path / "a", parts, config).decode()
    parts[name].view(-1)[parts[name].numel() // 2] ^= 1 << 4
    changed = opened(tmp_path / "b", parts, config).decode()
    assert (before != changed).sum() == 1 and np.array_equal(changed, dequantise(parts).numpy())


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_fp8_is_rounded_to_the_models_type_as_torch_does(tmp_path: Path, name: str, dtype: Any) -> None:
    parts = q.fp8(W)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tensor = opened(tmp_path, parts, q.FP8, torch_dtype=name)
    assert tensor.type.name == {"bfloat16": "BF16", "float16": "F16"}[name]
    assert np.array_equal(tensor.decode(), q.dequantise_scaled(parts).to(dtype).float().numpy())


def test_fp8_without_a_word_or_a_scale(tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[~codes.float().isnan()].reshape(2, 127)
    tensor = opened(tmp_path, {"weight": codes}, None, torch_dtype="bfloat16")
    assert np.array_equal(tensor.decode(), codes.float().numpy())


def test_what_becomes_float32_is_said(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 gptq weights are held as F32: .*desc_act"):
        opened(tmp_path, q.gptq(W, order=True), q.GPTQ)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.quantised is None
    with pytest.warns(UserWarning):
        assert "gptq: 1 as F32 (the inputs of a group" in (read_quantised(checkpoint).quantised or "")


def test_settings_beside_the_config(tmp_path: Path) -> None:
    """Older tools wrote them to a file of their own."""
    parts = q.gptq(W)
    with pytest.raises(UnsupportedModelError, match="no quantization_config"):
        opened(tmp_path, parts, None)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32, "desc_act": false}')
    assert np.array_equal(opened(tmp_path, parts, None).decode(), q.dequantise_gptq(parts, 4, False).numpy())


def test_parts_that_are_no_weights_stay_or_go(tmp_path: Path) -> None:
    parts = {f"m.{name}": part for name, part in q.int8(W).items()} | {
        "m.bias": torch.ones(48),
        "m.input_scale": torch.ones(1),
        "norm.weight": torch.ones(8),
        "a.k_scale": torch.ones(1),
        "embed.weight": torch.ones(4, 8),
        "position_ids": torch.arange(4),
    }
    q.write_folder(tmp_path, {}, parts, q.compressed("int-quantized", num_bits=8))
    checkpoint = read_quantised(open_checkpoint(tmp_path))
    assert set(checkpoint.tensors) == {"m.weight", "m.bias", "norm.weight", "embed.weight", "position_ids"}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a method": ({"quant_method": "bitsandbytes"}, r"method 'bitsandbytes' is not supported; supported are awq \(gemm"),
    "no method": ({"bits": 4}, "method None is not supported; supported are awq"),
    "gptq of 5 bits": (q.GPTQ | {"bits": 5}, "bits 5 is not supported; formats gptq and gptq_v2"),
    "gptq in marlin": (q.GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
    "awq in gemv": (q.AWQ | {"version": "gemv"}, "version 'gemv' is not supported; the gemm layout"),
    "awq of 8 bits": (q.AWQ | {"bits": 8}, "bits 8 is not supported"),
    "a format": (q.compressed("nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized' is not supported; dense, pack"),
    "rotations": (PACKED | {"transform_config": {"a": 1}}, "transform_config"),
    "sparse": (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "only dense is"),
    "fp8 of e5m2": (q.FP8 | {"fmt": "e5m2"}, "fmt 'e5m2' is not supported; only e4m3 is"),
}


@pytest.mark.parametrize("config, problem", REFUSED.values(), ids=REFUSED)
def test_refused(tmp_path: Path, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedModelError, match=problem):
        opened(tmp_path, q.gptq(W), config)


def without(parts: Parts, name: str) -> Parts:
    return {key: value for key, value in parts.items() if key != name}


NAN = torch.tensor(float("nan"))
G, A, P, W8, F = q.gptq(W), q.awq(W), q.packed_integers(W, symmetric=False), q.int8(W), q.fp8(W)
MALFORMED: dict[str, tuple[Parts, dict[str, Any], str]] = {
    "no scales": (without(G, "scales"), q.GPTQ, r"layer.scales: is missing; the module has g_idx, qweight, qzeros"),
    "no zero points": (without(A, "qzeros"), q.AWQ, "layer.qzeros: is missing"),
    "scales of another size": (G | {"scales": G["scales"][:2]}, q.GPTQ, r"scales: has shape \[2, 48\]"),
    "scales of another group size": (G, q.GPTQ | {"group_size": 64}, r"scales: has shape \[4, 48\]"),
    "other bits": (G, q.GPTQ | {"bits": 8}, "scales: has shape"),
    "bits a text": (G, q.GPTQ | {"bits": "4"}, "quantization_config.bits: must be int"),
    "bits missing": (G, without(q.GPTQ, "bits"), "quantization_config.bits: is missing"),
    "group size a boolean": (G, q.GPTQ | {"group_size": True}, "group_size: must be int, got True"),
    "codes of floats": (G | {"qweight": G["qweight"].float()}, q.GPTQ, "qweight: must be I32 of 2 axes"),
    "codes of one axis": (G | {"qweight": G["qweight"].view(-1)}, q.GPTQ, "qweight: must be I32 of 2 axes"),
    "empty codes": (G | {"qweight": G["qweight"][:0]}, q.GPTQ, "that are not empty"),
    "a group outside": (G | {"g_idx": G["g_idx"] + 1}, q.GPTQ, "g_idx: must be 128 groups from 0 to 3"),
    "a group below 0": (G | {"g_idx": G["g_idx"] - 1}, q.GPTQ, "g_idx: must be 128 groups"),
    "too few groups": (G | {"g_idx": G["g_idx"][:9]}, q.GPTQ, "g_idx: must be 128 groups"),
    "a scale that is NaN": (G | {"scales": G["scales"] * NAN}, q.GPTQ, "scales: holds a NaN or an infinity"),
    "an infinite scale": (A | {"scales": A["scales"] * 1e9}, q.AWQ, "scales: holds a NaN or an infinity"),
    "zero points of another size": (A | {"qzeros": A["qzeros"][:, :2]}, q.AWQ, r"qzeros: has shape \[4, 2\]"),
    "a shape that lies": (P | {"weight_shape": torch.tensor([48, 2**40])}, PACKED, "weight_shape"),
    "a negative shape": (P | {"weight_shape": torch.tensor([48, -128])}, PACKED, "weight_shape"),
    "a shape of three": (P | {"weight_shape": torch.tensor([1, 48, 128])}, PACKED, "weight_shape"),
    "no shape": (without(P, "weight_shape"), PACKED, "weight_shape: is missing"),
    "groups that do not divide": (P | {"weight_scale": P["weight_scale"][:, :3]}, PACKED, "3 groups"),
    "int8 scales of another size": (
        W8 | {"weight_scale": torch.ones(47, 1)},
        q.compressed("int-quantized"),
        r"\[47, 1\] for 48",
    ),
    "int8 without scales": (without(W8, "weight_scale"), q.compressed("int-quantized"), "weight_scale: is missing"),
    "fp8 scales of another size": (
        F | {"weight_scale": torch.ones(5, 2)},
        q.FP8,
        r"weight_scale: has shape \[5, 2\], which blocks of \[9, 64\]",
    ),
    "an fp8 scale that is NaN": (F | {"weight_scale": torch.tensor([float("nan")])}, q.FP8, "NaN or an infinity"),
}


@pytest.mark.filterwarnings("ignore:.*weights are held as F32")
@pytest.mark.parametrize("parts, config, problem", MALFORMED.values(), ids=MALFORMED)
def test_malformed(tmp_path: Path, parts: Parts, config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=problem):
        opened(tmp_path, parts, config).decode()


@pytest.mark.filterwarnings("ignore:.*weights are held as F32")
def test_an_fp8_code_that_is_nan_is_named(tmp_path: Path) -> None:
    parts = q.fp8(W)
    parts["weight"].view(torch.uint8)[40, 5] = 0xFF
    with pytest.raises(ModelFileError, match=r"layer.weight: holds a NaN in rows 0 to 47"):
        opened(tmp_path, parts, q.FP8).decode()


def test_compressed_tensors_own_compressor(tmp_path: Path) -> None:
    """Checkpoints as the package itself packs them, and its own way back."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import IntQuantizationCompressor, PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    for bits, symmetric, form, compressor in (
        (4, True, "pack-quantized", PackedQuantizationCompressor),
        (4, False, "pack-quantized", PackedQuantizationCompressor),
        (8, True, "pack-quantized", PackedQuantizationCompressor),
        (8, True, "int-quantized", IntQuantizationCompressor),
    ):
        args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        _, scales, zeros = q.round_to_nearest(W, bits, 32, symmetric, torch.float16)
        zeros = (zeros - 2 ** (bits - 1)).to(torch.int8)
        state = {"weight": W.half(), "weight_scale": scales, "weight_zero_point": zeros}
        packed = compressor.compress(state, scheme)
        expected = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
        folder = tmp_path / f"{form}-{bits}-{symmetric}"
        tensor = opened(folder, packed, q.compressed(form, num_bits=bits, symmetric=symmetric))
        assert tensor.type.name != "F32"
        assert np.array_equal(tensor.decode().astype(np.float16), expected), folder.name  # it rounds to half precision
