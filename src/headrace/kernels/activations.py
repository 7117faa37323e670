"""Activations in numpy, float32: what the native row kernels are tested against."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from .ops import Activation


def activate(x: np.ndarray, activation: Activation) -> np.ndarray:
    """The activation of each element of x."""
    with np.errstate(over="ignore"):  # an exponential may be inf, and then its reciprocal is 0
        return _KINDS[activation](x)


def glu(gate: np.ndarray, up: np.ndarray, activation: Activation) -> np.ndarray:
    """activation(gate) * up."""
    return activate(gate, activation) * up


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (np.float32(1) + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return np.float32(0.5) * x * (np.float32(1) + _erf(x * np.float32(math.sqrt(0.5))))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.float32(0.5) * x * (np.float32(1) + np.tanh(inner))


def _erf(x: np.ndarray) -> np.ndarray:
    """The error function within 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26)."""
    t = np.float32(1) / (np.float32(1) + np.float32(0.3275911) * np.abs(x))
    p = np.float32(0)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = (p + np.float32(coefficient)) * t
    return np.copysign(np.float32(1) - p * np.exp(-x * x), x)


_KINDS: dict[Activation, Callable[[np.ndarray], np.ndarray]] = {
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: np.maximum(x, np.float32(0)),
    "relu2": lambda x: np.square(np.maximum(x, np.float32(0))),
}
