"""Rotary positions: what a model file says of them, and the frequencies that follow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..errors import ModelFileError, UnsupportedModelError
from ..kernels.ops import RopeTable
from .fields import Fields

RopeKind = Literal["default", "linear", "llama3", "yarn", "factors", "longrope"]

MAX_THETA = 1e12
MAX_FACTOR = 1e6
MAX_CONTEXT = 1 << 27


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of the first `rotated` columns of each head (Su et al. 2021), and how it is stretched.

    - linear: positions are divided by `factor` (Chen et al. 2023).
    - llama3: frequencies that turn less than `low_freq_factor` times within `original_context` are divided by `factor`,
      those that turn more than `high_freq_factor` times are kept, those between are blended (Llama 3.1).
    - yarn: the same between `beta_slow` and `beta_fast` turns, blended by column, with cos and sin times
      `attention_factor` (Peng et al. 2023, section 3.3); `truncate` widens the blend to whole columns.
    - factors: each frequency is divided by its own entry of `factors` (what GGUF stores for llama3).
    - longrope: by its entry of `factors` where the model is to serve contexts up to `original_context`, of
      `long_factors` where longer ones, with cos and sin times `attention_factor` (Ding et al. 2024).
    """

    rotated: int
    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()


def rope_table(rope: RopeSpec, context: int) -> RopeTable:
    """Frequencies in radians a position, float32 [rotated / 2], and the factor on cos and sin.

    `context` is the longest that is served: some kinds are other frequencies for longer ones.
    """
    if rope.kind == "longrope" and context > rope.original_context:
        rope = dataclasses.replace(rope, factors=rope.long_factors)
    exponents = np.arange(0, rope.rotated, 2, dtype=np.float32) / np.float32(rope.rotated)
    inv_freq = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    stretched = _STRETCH[rope.kind](rope, inv_freq).astype(np.float32)
    return RopeTable(stretched, rope.attention_factor)


def yarn_attention_factor(factor: float, scale: float = 1.0) -> float:
    """YaRN's temperature as a factor on cos and sin: 0.1 scale ln(factor) + 1 (Peng et al. 2023, equation 22)."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _linear(rope: RopeSpec, inv_freq: np.ndarray) -> np.ndarray:
    return inv_freq / np.float32(rope.factor)


def _llama3(rope: RopeSpec, inv_freq: np.ndarray) -> np.ndarray:
    turns = rope.original_context * inv_freq / np.float32(2 * math.pi)
    span = rope.high_freq_factor - rope.low_freq_factor
    kept = np.clip((turns - rope.low_freq_factor) / span, 0.0, 1.0)
    return (1 - kept) * inv_freq / np.float32(rope.factor) + kept * inv_freq


def _yarn(rope: RopeSpec, inv_freq: np.ndarray) -> np.ndarray:
    def column(turns: float) -> float:
        """The (fractional) column that turns `turns` times within the original context."""
        return rope.rotated * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = column(rope.beta_fast), column(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotated - 1)
    ramp = (np.arange(len(inv_freq), dtype=np.float32) - low) / (high - low if high != low else 0.001)
    stretched = np.clip(ramp, 0.0, 1.0)
    return stretched * inv_freq / np.float32(rope.factor) + (1 - stretched) * inv_freq


def _factors(rope: RopeSpec, inv_freq: np.ndarray) -> np.ndarray:
    return inv_freq / np.array(rope.factors, np.float32)


_STRETCH = {
    "default": lambda rope, inv_freq: inv_freq,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "factors": _factors,
    "longrope": _factors,
}


def read_gguf_rope(fields: Fields, tensors: Mapping[str, Any], head_dim: int, context_length: int) -> RopeSpec:
    """Rope from a GGUF's `{architecture}.rope.*` keys and its `rope_freqs.weight`.

    Raises ModelFileError for a value that cannot be, UnsupportedModelError for a kind that is not supported.
    """
    rotated = _rotated(fields, "rope.dimension_count", head_dim)
    theta = fields.number("rope.freq_base", 1.0001, MAX_THETA, default=10000.0)
    kind = fields.text("rope.scaling.type", default="none")
    if "rope_factors_long.weight" in tensors:
        return RopeSpec(
            rotated,
            "longrope",
            theta,
            original_context=fields.integer(
                "rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context_length
            ),
            attention_factor=fields.number("rope.scaling.attn_factor", 1e-6, MAX_FACTOR, default=1.0),
            factors=_gguf_factors(fields, tensors, "rope_factors_short.weight", rotated // 2),
            long_factors=_gguf_factors(fields, tensors, "rope_factors_long.weight", rotated // 2),
        )
    if "rope_freqs.weight" in tensors:
        if kind != "none":
            raise UnsupportedModelError(f"{fields.path}: rope_freqs.weight together with rope scaling {kind!r}")
        factors = _gguf_factors(fields, tensors, "rope_freqs.weight", rotated // 2)
        return RopeSpec(rotated, "factors", theta, factors=factors)
    if kind == "none":
        return RopeSpec(rotated, "default", theta)
    if kind not in ("linear", "yarn"):
        raise UnsupportedModelError(f"{fields.path}: rope scaling {kind!r} is not supported; none, linear and yarn are")
    factor = fields.number("rope.scaling.factor", 1.0, MAX_FACTOR)
    if kind == "linear":
        return RopeSpec(rotated, "linear", theta, factor)
    # The file's factor is on top of YaRN's own, as in the llama.cpp graph.
    attention = fields.number("rope.scaling.attn_factor", 1e-6, MAX_FACTOR, default=1.0) * yarn_attention_factor(factor)
    return RopeSpec(
        rotated,
        "yarn",
        theta,
        factor,
        original_context=fields.integer("rope.scaling.original_context_length", 1, MAX_CONTEXT, default=context_length),
        beta_fast=fields.number("rope.scaling.yarn_beta_fast", 1e-6, MAX_FACTOR, default=32.0),
        beta_slow=fields.number("rope.scaling.yarn_beta_slow", 1e-6, MAX_FACTOR, default=1.0),
        attention_factor=attention,
    )


def _gguf_factors(fields: Fields, tensors: Mapping[str, Any], name: str, pairs: int) -> tuple[float, ...]:
    """One positive number for each rotated pair, from a tensor."""
    factors = tensors[name].decode() if name in tensors else np.zeros(0)
    if factors.shape != (pairs,) or not (np.isfinite(factors) & (factors > 0)).all():
        problem = f"must be {pairs} positive numbers, one a rotated pair, got shape {factors.shape}"
        raise ModelFileError(fields.path, name, problem)
    return tuple(map(float, factors))


def read_hf_rope(
    fields: Fields,
    head_dim: int,
    context_length: int,
    scaling: Fields | None = None,
    *,
    partial: bool = False,
    default_theta: float = 10000.0,
) -> RopeSpec:
    """Rope from a Hugging Face config: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling`;
    or from the table `scaling`. `partial` says whether the family may rotate a part of each head only.

    Raises as `read_gguf_rope` does.
    """
    if scaling is None:
        scaling = fields.table("rope_parameters" if fields.has("rope_parameters") else "rope_scaling")
    kind = scaling.text("rope_type", default=scaling.text("type", default="default"))
    kind = "longrope" if kind == "su" else kind  # its first name
    known = ("default", "linear", "llama3", "yarn", "longrope")
    if kind not in known:
        raise UnsupportedModelError(f"{fields.path}: rope type {kind!r} is not supported; {', '.join(known)} are")
    share = scaling.number("partial_rotary_factor", 0.0, 1.0, fields.number("partial_rotary_factor", 0.0, 1.0, 1.0))
    if share != 1.0 and not partial:
        raise UnsupportedModelError(f"{fields.path}: partial_rotary_factor {share} is not supported here; only 1 is")
    rotated = _even(fields, "head_dim", int(head_dim * share))
    if rotated == 0:
        raise fields.error("partial_rotary_factor", f"{share} of {head_dim} columns leaves none to rotate")
    theta = scaling.number(
        "rope_theta", 1.0001, MAX_THETA, default=fields.number("rope_theta", 1.0001, MAX_THETA, default=default_theta)
    )
    if kind == "default":
        return RopeSpec(rotated, "default", theta)
    if kind == "linear":
        return RopeSpec(rotated, "linear", theta, scaling.number("factor", 1.0, MAX_FACTOR))
    original = fields.integer(
        "original_max_position_embeddings",
        1,
        MAX_CONTEXT,
        default=scaling.integer("original_max_position_embeddings", 1, MAX_CONTEXT, default=context_length),
    )
    if kind == "longrope":
        return _hf_longrope(scaling, rotated, theta, original, context_length)
    if kind == "llama3":
        low = scaling.number("low_freq_factor", 1e-6, MAX_FACTOR)
        high = scaling.number("high_freq_factor", 1e-6, MAX_FACTOR)
        if low >= high:
            raise scaling.error("low_freq_factor", f"must be less than high_freq_factor {high}, got {low}")
        factor = scaling.number("factor", 1.0, MAX_FACTOR)
        return RopeSpec(rotated, "llama3", theta, factor, original, low, high)
    factor = scaling.number("factor", 1.0, MAX_FACTOR, default=max(1.0, context_length / original))
    return RopeSpec(
        rotated,
        "yarn",
        theta,
        factor,
        original,
        beta_fast=scaling.number("beta_fast", 1e-6, MAX_FACTOR, default=32.0),
        beta_slow=scaling.number("beta_slow", 1e-6, MAX_FACTOR, default=1.0),
        attention_factor=scaling.number("attention_factor", 1e-6, MAX_FACTOR, default=_hf_temperature(scaling, factor)),
        truncate=scaling.boolean("truncate", default=True),
    )


def _hf_longrope(scaling: Fields, rotated: int, theta: float, original: int, context_length: int) -> RopeSpec:
    factor = scaling.number("factor", 0.0, MAX_FACTOR, default=context_length / original)
    temperature = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeSpec(
        rotated,
        "longrope",
        theta,
        original_context=original,
        attention_factor=scaling.number("attention_factor", 1e-6, MAX_FACTOR, default=temperature),
        factors=scaling.numbers("short_factor", rotated // 2, 1e-6, MAX_FACTOR),
        long_factors=scaling.numbers("long_factor", rotated // 2, 1e-6, MAX_FACTOR),
    )


def _hf_temperature(scaling: Fields, factor: float) -> float:
    """`mscale` over `mscale_all_dim` where both are given (DeepSeek's spelling), else YaRN's own."""
    scale = scaling.number("mscale", 0.0, MAX_FACTOR, default=0.0)
    all_dim = scaling.number("mscale_all_dim", 0.0, MAX_FACTOR, default=0.0)
    if scale and all_dim:
        return yarn_attention_factor(factor, scale) / yarn_attention_factor(factor, all_dim)
    return yarn_attention_factor(factor)


def _rotated(fields: Fields, name: str, head_dim: int) -> int:
    return _even(fields, name, fields.integer(name, 2, head_dim, default=head_dim))


def _even(fields: Fields, name: str, columns: int) -> int:
    if columns % 2:
        raise fields.error(name, f"must be even, columns are rotated in pairs; got {columns}")
    return columns
