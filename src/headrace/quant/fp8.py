"""FP8 (E4M3) checkpoints: a weight of 8-bit floats times a scale of the tensor, of an output, or of a block.

    weight           F8_E4M3 [out, in]
    weight_scale_inv or weight_scale: [], [1], [out, 1], or [out / block, in / block] (config: weight_block_size)

A code times its scale is rounded to the type that the checkpoint's config gives for the model, as the tools that write
these checkpoints do where they take them apart. Two codes never become one: they differ in their first 4 bits, and
bfloat16 keeps 8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..formats.tensor import BF16, F8_E4M3_VALUES, F16, F32, Tensor, TensorType
from .module import Module, unsupported

PARTS = ("weight_scale_inv", "weight_scale")
KNOWN = "only e4m3 is"

_DTYPES = {"bfloat16": BF16, "float16": F16, "float32": F32}


@dataclass(frozen=True)
class Floats:
    """A weight of FP8 codes, and what each row and column of a grid of blocks is multiplied by: scales float32
    [ceil(out / rows), ceil(in / columns)]."""

    codes: Tensor
    scales: tuple[np.ndarray, int, int]


class Reader:
    """Reads the modules of one checkpoint."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        form = config.get("fmt", "e4m3")
        if form not in ("e4m3", "float8_e4m3fn"):
            raise unsupported(path, "fmt", form, KNOWN)
        block = config.get("weight_block_size")
        self.block = block if isinstance(block, list) else None

    def has(self, module: Module) -> bool:
        return "weight" in module.parts and module.parts["weight"].type.name == "F8_E4M3"

    def read(self, module: Module) -> Floats:
        weight = module.part("weight", ("F8_E4M3",), 2)
        name = next((name for name in PARTS if name in module.parts), None)
        if name is None:
            return Floats(weight, (np.ones((1, 1), np.float32), weight.shape[0], weight.shape[1]))
        return Floats(weight, block_scales(module, name, weight.shape, self.block))


def block_scales(
    module: Module, name: str, shape: tuple[int, ...], block: list[int] | None
) -> tuple[np.ndarray, int, int]:
    """Scales, and how many rows and columns of the weight share one: the config's, or what divides the weight."""
    scales = module.scales(name, ("F16", "BF16", "F32", "F8_E8M0"))
    scales = scales.reshape(scales.shape if scales.ndim == 2 else (-1, 1))
    grids = [[max(1, size // count) for size, count in zip(shape, scales.shape, strict=True)]]
    if block is not None and len(block) == 2 and all(type(size) is int and size > 0 for size in block):
        grids.insert(0, block)
    for rows, columns in grids:
        if (-(-shape[0] // rows), -(-shape[1] // columns)) == scales.shape:
            return scales, rows, columns
    raise module.error(name, f"has shape {list(scales.shape)}, which blocks of {grids[0]} of {list(shape)} do not make")


def float_type(config: Mapping[str, Any]) -> TensorType:
    """The type of the model's weights that config.json names; float32 where it names none."""
    name = config.get("dtype") or config.get("torch_dtype")
    return _DTYPES.get(str(name), F32)


def stored_rows(weight: Floats, type: TensorType, module: Module, first: int, last: int) -> np.ndarray:
    """Outputs `first` to `last` in `type`: uint8 [last - first, bytes of a row]."""
    outputs, inputs = weight.codes.shape
    codes = weight.codes.data.reshape(outputs, inputs)[first:last]
    if ((codes & 127) == 127).any():
        raise module.error("weight", f"holds a NaN in rows {first} to {last - 1}")
    scales, rows, columns = weight.scales
    values = F8_E4M3_VALUES[codes] * scales[np.arange(first, last) // rows][:, np.arange(inputs) // columns]
    if type is BF16:  # to the nearest, ties to even
        bits = values.view(np.uint32)
        return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if type is F16 else np.float32, copy=False).view(np.uint8)
