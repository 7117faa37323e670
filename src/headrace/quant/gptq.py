"""GPTQ checkpoints as AutoGPTQ and GPTQModel write them (Frantar et al. 2022).

qweight int32 [in * bits / 32, out]     codes, packed along the inputs
qzeros  int32 [groups, out * bits / 32] zero points, packed along the outputs; in format v1 each is one less
scales  float16 [groups, out]
g_idx   int32 [in]                      the group of each input
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .integers import Integers, unpack
from .module import Module, setting, unsupported

PARTS = ("qweight", "qzeros", "scales", "g_idx")
KNOWN = "formats gptq and gptq_v2 with 2, 3, 4 or 8 bits are"

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a one in every code of a word


class Reader:
    """Reads the modules of one checkpoint."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.bits = setting(path, config, ("bits",), int)
        self.group_size = setting(path, config, ("group_size",), int, default=-1)
        form = setting(path, config, ("checkpoint_format", "format"), str, default="gptq")
        if self.bits not in (2, 3, 4, 8):
            raise unsupported(path, "bits", self.bits, KNOWN)
        if form not in ("gptq", "gptq_v2"):
            raise unsupported(path, "checkpoint_format", form, KNOWN)
        self.one_less = form == "gptq"

    def has(self, module: Module) -> bool:
        return "qweight" in module.parts

    def read(self, module: Module) -> Integers:
        bits = self.bits
        packed = module.part("qweight", ("I32",), 2)
        words, outputs = packed.shape
        inputs = words * 32 // bits
        group = inputs if self.group_size <= 0 else self.group_size
        groups = -(-inputs // group)
        scales = module.scales("scales", ("F16", "BF16", "F32"))
        if scales.shape != (groups, outputs):
            problem = (
                f"has shape {list(scales.shape)}; {inputs} inputs in groups of {group} and {outputs} outputs make it"
            )
            raise module.error("scales", f"{problem} {[groups, outputs]}")
        zeros = self._zeros(module, groups, outputs)

        group_of = self._group_of(module, inputs, group, groups)
        own = np.arange(inputs) // group if group_of is None else group_of

        def numbers(first: int, last: int) -> np.ndarray:
            columns = packed.data.view("<i4").reshape(words, outputs)[:, first:last]
            codes = unpack(np.ascontiguousarray(columns.T).view(np.uint8), bits, inputs)
            return codes.astype(np.int16) - zeros[first:last][:, own]

        return Integers(
            inputs=inputs,
            group=group,
            scales=np.ascontiguousarray(scales.T),
            low=-int(zeros.max()),
            high=2**bits - 1 - int(zeros.min()),
            numbers=numbers,
            group_of=group_of,
        )

    def _zeros(self, module: Module, groups: int, outputs: int) -> np.ndarray:
        """Zero points, int16 [outputs, groups]."""
        words = module.integers("qzeros", ("I32",), 2).view("<u4")
        if words.shape != (groups, wanted := -(-outputs * self.bits // 32)):
            raise module.error("qzeros", f"has shape {list(words.shape)}, expected {[groups, wanted]}")
        if self.one_less and self.bits in _ONES:  # whole words were counted down, with what that borrows
            words = words + np.uint32(_ONES[self.bits])
        zeros = unpack(np.ascontiguousarray(words).view(np.uint8), self.bits, outputs).T.astype(np.int16)
        if self.one_less and self.bits not in _ONES:
            if zeros.max() == 2**self.bits - 1:
                raise module.error("qzeros", "has a zero point that was counted down below 0; save it as gptq_v2")
            zeros += 1
        return zeros

    def _group_of(self, module: Module, inputs: int, group: int, groups: int) -> np.ndarray | None:
        """Each input's group, or None where they follow each other."""
        if "g_idx" not in module.parts:
            return None
        given = module.integers("g_idx", ("I32", "I64"), 1)
        if given.shape != (inputs,) or given.min() < 0 or given.max() >= groups:
            problem = f"must be {inputs} groups from 0 to {groups - 1}, got {list(given.shape)} from {given.min()}"
            raise module.error("g_idx", f"{problem} to {given.max()}")
        return None if np.array_equal(given, np.arange(inputs) // group) else given.astype(np.int64)
