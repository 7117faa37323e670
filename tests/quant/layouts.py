"""Quantised checkpoints made by hand in the layouts that the public tools document, and taken apart again with torch.

Nothing here uses the project's own code: `dequantise_*` read the tensors that were packed, one value at a time where
that is plainest.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def round_to_nearest(
    weight: torch.Tensor, bits: int, group: int, symmetric: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes 0..2^bits - 1 [out, in], scales [out, groups] of `dtype`, zero points [out, groups])."""
    top = 2**bits - 1
    inputs = weight.shape[1]
    group = inputs if group <= 0 else group
    parts = torch.split(weight.float(), group, dim=1)
    low = torch.stack([part.amin(1).clamp(max=0) for part in parts], 1)
    high = torch.stack([part.amax(1).clamp(min=0) for part in parts], 1)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-4).to(dtype)
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else torch.round(-low / scales.float()).clamp(0, top)
    wide = [scales.float().repeat_interleave(group, 1)[:, :inputs], zeros.repeat_interleave(group, 1)[:, :inputs]]
    codes = torch.clamp(torch.round(weight.float() / wide[0]) + wide[1], 0, top)
    return codes.int(), scales, zeros.int()


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[rows, n] -> int32 [rows, n * bits / 32]: a stream of bits, low first; codes may cross words."""
    words = torch.zeros(len(codes), -(-codes.shape[1] * bits // 32), dtype=torch.int64)
    for i in range(codes.shape[1]):
        word, shift = divmod(i * bits, 32)
        words[:, word] |= (codes[:, i].long() << shift) & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= codes[:, i].long() >> (32 - shift)
    return (((words + 2**31) % 2**32) - 2**31).int().contiguous()


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse: int64 [rows, count]."""
    unsigned = words.long() & 0xFFFFFFFF
    columns = []
    for i in range(count):
        word, shift = divmod(i * bits, 32)
        value = unsigned[:, word] >> shift
        if shift + bits > 32:
            value = value | unsigned[:, word + 1] << (32 - shift)
        columns.append(value & (2**bits - 1))
    return torch.stack(columns, 1)


def gptq(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int = 32,
    symmetric: bool = True,
    v2: bool = False,
    order: bool = False,
) -> dict[str, torch.Tensor]:
    """`order`: inputs are put in groups by another order than their own (desc_act)."""
    inputs = weight.shape[1]
    size = inputs if group <= 0 else group
    g_idx = torch.arange(inputs) // size
    permutation = torch.arange(inputs)
    if order:
        permutation = torch.randperm(inputs, generator=torch.Generator().manual_seed(0))
        g_idx = g_idx[torch.argsort(permutation)]
    codes, scales, zeros = round_to_nearest(weight[:, permutation], bits, group, symmetric, torch.float16)
    qzeros = pack(zeros.T.contiguous(), bits)
    if not v2:
        one = sum(1 << (bits * i) for i in range(32 // bits))  # every zero point less one, as whole words
        qzeros = ((qzeros.long() - one + 2**31) % 2**32 - 2**31).int()
    return {
        "qweight": pack(codes[:, torch.argsort(permutation)], bits).T.contiguous(),
        "qzeros": qzeros,
        "scales": scales.T.contiguous(),
        "g_idx": g_idx.int(),
    }


def dequantise_gptq(parts: dict[str, torch.Tensor], bits: int, v2: bool) -> torch.Tensor:
    inputs, outputs = len(parts["g_idx"]), parts["scales"].shape[1]
    words = parts["qzeros"].long()
    if not v2:
        words = words + sum(1 << (bits * i) for i in range(32 // bits))
    zeros = unpack(words, bits, outputs)
    codes = unpack(parts["qweight"].T, bits, inputs)
    group = parts["g_idx"].long()
    return (parts["scales"].float()[group] * (codes.T - zeros[group]).float()).T.contiguous()


def awq(weight: torch.Tensor, *, group: int = 32) -> dict[str, torch.Tensor]:
    codes, scales, zeros = round_to_nearest(weight, 4, group, False, torch.float16)

    def ordered(values: torch.Tensor) -> torch.Tensor:
        return pack(values.reshape(len(values), -1, 8)[..., list(AWQ_ORDER)].reshape(len(values), -1), 4)

    return {
        "qweight": ordered(codes.T.contiguous()),
        "qzeros": ordered(zeros.T.contiguous()),
        "scales": scales.T.contiguous(),
    }


def dequantise_awq(parts: dict[str, torch.Tensor], group: int) -> torch.Tensor:
    def values(words: torch.Tensor) -> torch.Tensor:
        packed = unpack(words, 4, words.shape[1] * 8)
        out = torch.empty_like(packed)
        for place, output in enumerate(AWQ_ORDER):
            out[:, output::8] = packed[:, place::8]
        return out

    codes, zeros, scales = values(parts["qweight"]), values(parts["qzeros"]), parts["scales"].float()
    own = torch.arange(len(codes)) // (len(codes) if group <= 0 else group)
    return (scales[own] * (codes - zeros[own]).float()).T.contiguous()


def packed_integers(
    weight: torch.Tensor, *, bits: int = 4, group: int = 32, symmetric: bool = True, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """compressed-tensors' pack-quantized."""
    codes, scales, zeros = round_to_nearest(weight, bits, group, symmetric, dtype)
    parts = {
        "weight_packed": pack(codes, bits),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not symmetric:
        parts["weight_zero_point"] = pack(zeros.T.contiguous(), bits).T.contiguous()
    return parts


def dequantise_packed(parts: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    outputs, inputs = parts["weight_shape"].tolist()
    scales = parts["weight_scale"].float()
    codes = unpack(parts["weight_packed"], bits, inputs)
    zeros = torch.full(scales.shape, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = unpack(parts["weight_zero_point"].T, bits, outputs).T
    own = torch.arange(inputs) // (inputs // scales.shape[1])
    return scales[:, own] * (codes - zeros[:, own]).float()


def int8(weight: torch.Tensor, *, per: str = "channel", dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """compressed-tensors' int-quantized (W8A8)."""
    peak = weight.float().abs().amax() if per == "tensor" else weight.float().abs().amax(1, keepdim=True)
    scales = (peak / 127).clamp(min=1e-4).to(dtype)
    codes = torch.clamp(torch.round(weight.float() / scales.float()), -128, 127).to(torch.int8)
    return {"weight": codes, "weight_scale": scales.reshape(1) if per == "tensor" else scales}


def fp8(
    weight: torch.Tensor, *, block: tuple[int, int] | None = None, name: str = "weight_scale"
) -> dict[str, torch.Tensor]:
    """A scale of the tensor, or of each block of rows and columns."""
    rows, columns = block or weight.shape
    grid = (-(-weight.shape[0] // rows), -(-weight.shape[1] // columns))
    scales, wide = torch.empty(grid), torch.empty_like(weight.float())
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = weight[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns].float()
            scales[i, j] = part.abs().amax().clamp(min=1e-6) / 448
            wide[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = scales[i, j]
    codes = (weight.float() / wide).to(torch.float8_e4m3fn)
    return {"weight": codes, name: scales if block else scales.reshape(1)}


def dequantise_scaled(parts: dict[str, torch.Tensor], block: tuple[int, int] | None = None) -> torch.Tensor:
    """Codes of one byte times their scale, in float32."""
    scales = next(part for name, part in parts.items() if "scale" in name).float()
    codes = parts["weight"].float()
    if block is not None:
        scales = scales.repeat_interleave(block[0], 0)[: len(codes)].repeat_interleave(block[1], 1)[:, : codes.shape[1]]
    return codes * scales


def write_folder(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], quantization_config: dict[str, Any] | None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if quantization_config is not None:
        config = config | {"quantization_config": quantization_config}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": args, "input_activations": None}},
    }


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
