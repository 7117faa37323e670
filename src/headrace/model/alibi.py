"""Slopes of distance in attention's scores, in place of positions (Press et al. 2021)."""

from __future__ import annotations

import math

import numpy as np


def alibi_slopes(heads: int) -> np.ndarray:
    """float32 [heads]: for a power of two, 2^(-8/heads), its square, and so on; the heads beyond the largest power of
    two within have every other slope of twice as many."""
    whole = 1 << int(math.log2(heads))
    slopes = [2.0 ** (-8 * i / whole) for i in range(1, whole + 1)]
    between = [2.0 ** (-4 * i / whole) for i in range(1, 2 * (heads - whole), 2)]
    return np.array(slopes + between, np.float32)
