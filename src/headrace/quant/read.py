"""A quantised Hugging Face checkpoint, by its quantization_config, as one whose tensors are ordinary weights: named as
in the model that was quantised, of types that op sets pack, and without the loss of a code."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import UnsupportedModelError
from ..formats.safetensors import Checkpoint, read_json
from ..formats.tensor import F32, Tensor, TensorType
from . import awq, compressed, fp8, gptq, integers
from .module import MadeTensor, Module

METHODS = {
    "awq": awq,
    "compressed-tensors": compressed,
    "fbgemm_fp8": fp8,
    "fp8": fp8,
    "gptq": gptq,
}
SUPPORTED = (
    "awq (gemm, 4 bits), compressed-tensors (pack-quantized, int-quantized, float-quantized), "
    "fp8 and fbgemm_fp8 (e4m3), gptq (v1 and v2; 2, 3, 4 and 8 bits)"
)

# Of activations, keys and values, which are kept more exactly here.
_IGNORED = (
    *("input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "activation_scale"),
    *("output_scale", "output_zero_point", "q_scale", "k_scale", "v_scale", "k_zero_point", "v_zero_point"),
)
_OWN_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # of tools that left config.json alone


def read_quantised(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with ordinary weights; itself where it is not quantised.

    Raises UnsupportedModelError for a method or layout that cannot be read, ModelFileError where parts of a weight
    contradict each other. A weight's bytes are made when they are asked for. A warning says where weights had to become
    float32.
    """
    config = _config(checkpoint)
    if config is None:
        return checkpoint
    name = config.get("quant_method", "compressed-tensors" if "config_groups" in config else None)
    method = METHODS.get(str(name).lower())
    if method is None:
        raise UnsupportedModelError(
            f"{checkpoint.path}: quantization method {name!r:.80} is not supported; supported are {SUPPORTED}"
        )
    reader = method.Reader(checkpoint.path, config)
    modules: dict[str, dict[str, Tensor]] = {}
    for tensor_name, tensor in checkpoint.tensors.items():
        module, _, part = tensor_name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    tensors: dict[str, Tensor] = {}
    kinds: dict[tuple[str, str], int] = {}
    spare: set[str] = set()
    for module_name, parts in modules.items():
        module = Module(module_name, parts)
        left = {part: tensor for part, tensor in parts.items() if part not in _IGNORED}
        if reader.has(module):
            weight, reason = _weight(module, reader.read(module), checkpoint.config)
            left = {part: t for part, t in left.items() if part not in (*method.PARTS, "weight")} | {"weight": weight}
            if "bias" in left and not left["bias"].decode().any():
                spare.add(f"{module_name}.bias")
            kinds[weight.type.name, reason] = kinds.get((weight.type.name, reason), 0) + 1
        tensors |= {f"{module_name}.{part}" if module_name else part: tensor for part, tensor in left.items()}
    for (kind, reason), count in kinds.items():
        if reason:
            warnings.warn(f"{checkpoint.path}: {count} {name} weights are held as {kind}: {reason}", stacklevel=2)
    summary = ", ".join(f"{count} as {kind}{reason and f' ({reason})'}" for (kind, reason), count in kinds.items())
    quantised = f"{name}: {summary or 'no weights'}"
    return dataclasses.replace(checkpoint, tensors=tensors, quantised=quantised, spare=frozenset(spare))


def _config(checkpoint: Checkpoint) -> Mapping[str, Any] | None:
    """What the checkpoint says of its quantisation; where it says nothing, and has FP8 weights, that they are."""
    config = checkpoint.config.get("quantization_config") or checkpoint.config.get("compression_config")
    if isinstance(config, dict):
        return config
    if any(name.endswith(".qweight") for name in checkpoint.tensors):
        for name, method in _OWN_FILES.items():
            if (file := Path(checkpoint.path) / name).is_file():
                return {"quant_method": method} | read_json(file)
        raise UnsupportedModelError(
            f"{checkpoint.path}: has quantised weights (qweight), but config.json has no quantization_config"
        )
    if any(tensor.type.name == "F8_E4M3" for tensor in checkpoint.tensors.values()):
        return {"quant_method": "fp8"}
    return None


def _weight(
    module: Module, weight: integers.Integers | fp8.Floats, config: Mapping[str, Any]
) -> tuple[MadeTensor, str]:
    """A module's weight as a tensor, and why it is float32 if it is."""
    name = f"{module.name}.weight"
    if isinstance(weight, fp8.Floats):
        type = fp8.float_type(config)
        make = partial(fp8.stored_rows, weight, type, module)
        return MadeTensor(name, weight.codes.shape, type, module.path, make), _why_floats(type)  # type: ignore[arg-type]
    type, reason = integers.storage(weight)
    make = partial(integers.stored_rows, weight, type)
    return MadeTensor(name, weight.shape, type, module.path, make), reason


def _why_floats(type: TensorType) -> str:
    return "config.json names no other type" if type is F32 else ""
