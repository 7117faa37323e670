"""compressed-tensors checkpoints as llm-compressor writes them. Of a module of format

    pack-quantized     weight_packed int32 [out, in * bits / 32]: codes and 2^(bits - 1), low bits first, without gaps;
                       weight_zero_point, where it is there, int32 [out * bits / 32, groups], packed along the outputs;
                       weight_shape int64 [2]; weight_g_idx int32 [in], where the groups are in no order
    int-quantized      weight int8 [out, in]; weight_zero_point int8 [out, groups]
    float-quantized    weight F8_E4M3 [out, in]

and for all weight_scale [out, groups], [1], or for FP8 a scale for each block of outputs and inputs. Scales of
activations are left out: activations are kept more exactly here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .fp8 import Floats, block_scales
from .integers import Integers, unpack
from .module import Module, unsupported

FORMATS = ("dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
PARTS = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
KNOWN = f"{', '.join(FORMATS)} are"


class Reader:
    """Reads the modules of one checkpoint."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        groups = config.get("config_groups")
        groups = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
        formats = [config.get("format"), *(group.get("format") for group in groups)]
        for form in formats:
            if form is not None and form not in FORMATS and form != "mixed-precision":
                raise unsupported(path, "format", form, KNOWN)
        if config.get("transform_config"):
            raise unsupported(path, "transform_config", config["transform_config"], "weights as they are")
        sparsity = config.get("sparsity_config")
        if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
            raise unsupported(path, "sparsity_config.format", sparsity["format"], "only dense is")
        blocks = [args.get("block_structure") for group in groups if isinstance(args := group.get("weights"), dict)]
        sizes = [args.get("group_size") for group in groups if isinstance(args := group.get("weights"), dict)]
        self.block = next((block for block in blocks if isinstance(block, list)), None)
        self.sizes = {size for size in sizes if type(size) is int and size > 0}

    def has(self, module: Module) -> bool:
        return "weight_packed" in module.parts or (
            "weight" in module.parts and module.parts["weight"].type.name in ("I8", "F8_E4M3")
        )

    def read(self, module: Module) -> Integers | Floats:
        if "weight_packed" in module.parts:
            return self._packed(module)
        weight = module.part("weight", ("I8", "F8_E4M3"), 2)
        if weight.type.name == "F8_E4M3":
            return Floats(weight, block_scales(module, "weight_scale", weight.shape, self.block))
        outputs, inputs = weight.shape
        scales = self._scales(module, outputs)
        group, group_of = self._groups(module, inputs, scales.shape[1])
        zeros = None
        if "weight_zero_point" in module.parts:
            zeros = module.integers("weight_zero_point", ("I8",), 2).astype(np.int16)
            zeros = self._like_scales(module, "weight_zero_point", zeros, scales)
        return self._integers(
            inputs,
            group,
            group_of,
            scales,
            zeros,
            8,
            lambda first, last: weight.data.view("i1").reshape(outputs, -1)[first:last],
        )

    def _packed(self, module: Module) -> Integers:
        packed = module.part("weight_packed", ("I32",), 2)
        shape = module.integers("weight_shape", ("I64", "I32"), 1)
        (outputs, words), inputs = packed.shape, int(shape[-1])
        bits = next((bits for bits in range(1, 9) if -(-inputs * bits // 32) == words), 0)
        if len(shape) != 2 or shape[0] != outputs or inputs < 1 or not bits:
            problem = f"says {shape.tolist()}, which {words} words for each of {outputs} outputs cannot hold"
            raise module.error("weight_shape", problem)
        scales = self._scales(module, outputs)
        groups, offset = scales.shape[1], 1 << (bits - 1)
        group, group_of = self._groups(module, inputs, groups)
        zeros = None
        if "weight_zero_point" in module.parts:
            given = module.integers("weight_zero_point", ("I32",), 2)
            if given.shape != (wanted := -(-outputs * bits // 32), groups):
                raise module.error("weight_zero_point", f"has shape {list(given.shape)}, expected {[wanted, groups]}")
            zeros = unpack(np.ascontiguousarray(given.T).view(np.uint8), bits, outputs).T.astype(np.int16) - offset

        def codes(first: int, last: int) -> np.ndarray:
            rows = packed.data.view("<i4").reshape(outputs, words)[first:last]
            return unpack(np.ascontiguousarray(rows).view(np.uint8), bits, inputs).astype(np.int16) - offset

        return self._integers(inputs, group, group_of, scales, zeros, bits, codes)

    @staticmethod
    def _integers(
        inputs: int,
        group: int,
        group_of: np.ndarray | None,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        bits: int,
        codes: Any,
    ) -> Integers:
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        if zeros is None:
            return Integers(inputs, group, scales, low, high, lambda *rows: codes(*rows).astype(np.int16), group_of)
        own = np.arange(inputs) // group if group_of is None else group_of

        def numbers(first: int, last: int) -> np.ndarray:
            return codes(first, last).astype(np.int16) - zeros[first:last][:, own]

        return Integers(inputs, group, scales, low - int(zeros.max()), high - int(zeros.min()), numbers, group_of)

    def _scales(self, module: Module, outputs: int) -> np.ndarray:
        """float32 [outputs, groups]."""
        scales = module.scales("weight_scale")
        if scales.size == 1:
            return np.full((outputs, 1), scales.item(), np.float32)
        if scales.ndim != 2 or len(scales) != outputs:
            raise module.error("weight_scale", f"has shape {list(scales.shape)} for {outputs} outputs")
        return scales

    @staticmethod
    def _like_scales(module: Module, name: str, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        if values.size == 1:
            return np.full(scales.shape, values.item(), values.dtype)
        if values.shape != scales.shape:
            raise module.error(name, f"has shape {list(values.shape)}, the scales {list(scales.shape)}")
        return values

    def _groups(self, module: Module, inputs: int, groups: int) -> tuple[int, np.ndarray | None]:
        """Inputs in a group, and each input's group where they are in no order."""
        fitting = [size for size in sorted(self.sizes) if -(-inputs // size) == groups]
        group = inputs // groups if inputs % groups == 0 else next(iter(fitting), 0)
        if not group:
            raise module.error("weight_scale", f"has {groups} groups, which do not divide {inputs} inputs")
        if "weight_g_idx" not in module.parts:
            return group, None
        given = module.integers("weight_g_idx", ("I32", "I64"), 1)
        if (given < 0).all():  # written where there is no order to keep
            return group, None
        if given.shape != (inputs,) or given.min() < 0 or given.max() >= groups:
            raise module.error("weight_g_idx", f"must be {inputs} groups from 0 to {groups - 1}")
        return group, None if np.array_equal(given, np.arange(inputs) // group) else given.astype(np.int64)
