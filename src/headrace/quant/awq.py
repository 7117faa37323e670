"""AWQ checkpoints as AutoAWQ writes them in its gemm layout (Lin et al. 2023): 4 bits, with zero points.

qweight int32 [in, out / 8]      codes of 8 outputs in a word, in ORDER
qzeros  int32 [groups, out / 8]  zero points, packed likewise
scales  float16 [groups, out]
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .integers import Integers, unpack
from .module import Module, setting, unsupported

PARTS = ("qweight", "qzeros", "scales")
KNOWN = "the gemm layout with 4 bits is"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output of each code of a word, low bits first


class Reader:
    """Reads the modules of one checkpoint."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        bits = setting(path, config, ("bits", "w_bit"), int, default=4)
        self.group_size = setting(path, config, ("group_size", "q_group_size"), int, default=128)
        layout = setting(path, config, ("version", "checkpoint_format", "format"), str, default="gemm")
        if bits != 4:
            raise unsupported(path, "bits", bits, KNOWN)
        if layout.lower() != "gemm":
            raise unsupported(path, "version", layout, KNOWN)

    def has(self, module: Module) -> bool:
        return "qweight" in module.parts

    def read(self, module: Module) -> Integers:
        packed = module.part("qweight", ("I32",), 2)
        inputs, words = packed.shape
        outputs = words * 8
        group = inputs if self.group_size <= 0 else self.group_size
        groups = -(-inputs // group)
        scales, zeros = module.scales("scales"), module.integers("qzeros", ("I32",), 2)
        for name, shape, wanted in (("scales", scales.shape, outputs), ("qzeros", zeros.shape, words)):
            if shape != (groups, wanted):
                problem = f"has shape {list(shape)}; {inputs} inputs in groups of {group} make it {[groups, wanted]}"
                raise module.error(name, problem)
        zeros = _outputs_first(zeros).astype(np.int16)
        group_of = np.arange(inputs) // group

        def numbers(first: int, last: int) -> np.ndarray:
            columns = packed.data.view("<i4").reshape(inputs, words)[:, first // 8 : -(-last // 8)]
            codes = _outputs_first(columns)[first % 8 :][: last - first]
            return codes.astype(np.int16) - zeros[first:last][:, group_of]

        return Integers(
            inputs=inputs,
            group=group,
            scales=np.ascontiguousarray(scales.T),
            low=-int(zeros.max()),
            high=15 - int(zeros.min()),
            numbers=numbers,
        )


def _outputs_first(words: np.ndarray) -> np.ndarray:
    """int32 [n, out / 8] -> codes [out, n]."""
    codes = unpack(np.ascontiguousarray(words).view(np.uint8), 4, words.shape[1] * 8)
    ordered = np.empty((len(words), words.shape[1], 8), np.uint8)
    ordered[..., ORDER] = codes.reshape(ordered.shape)
    return np.ascontiguousarray(ordered.reshape(len(words), -1).T)
