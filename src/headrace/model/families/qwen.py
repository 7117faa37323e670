"""Qwen2 and 2.5 (biases on q, k and v), Qwen3 (norms of q's and k's heads), and Qwen3's experts."""

from __future__ import annotations

from typing import Any

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..rope import MAX_CONTEXT
from ..spec import MAX_EXPERTS, MAX_FFN, MAX_LAYERS, ExpertSpec, ModelSpec
from .gguf import read_gguf
from .hf import read_hf, require, windows_of


def read_qwen3_gguf(source: GGUFFile) -> ModelSpec:
    return read_gguf(source, qk_norm="head")


def read_qwen2(source: Checkpoint) -> ModelSpec:
    defaults = {"max_position_embeddings": 32768, "num_key_value_heads": 32}
    return read_hf(source, architecture="qwen2", defaults=defaults, qkv_bias=True, windows=_windows(source))


def read_qwen3(source: Checkpoint) -> ModelSpec:
    return _read_qwen3(source, architecture="qwen3")


def read_qwen3_moe(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "decoder_sparse_step", 1)
    require(fields, "mlp_only_layers", [])
    name = "num_experts" if fields.has("num_experts") else "num_local_experts"
    count = fields.integer(name, 1, MAX_EXPERTS, default=128)
    experts = ExpertSpec(
        count,
        chosen=fields.integer("num_experts_per_tok", 1, count, default=8),
        ffn_dim=fields.integer("moe_intermediate_size", 1, MAX_FFN, default=768),
        normalise=fields.boolean("norm_topk_prob", default=False),
    )
    return _read_qwen3(source, architecture="qwen3moe", experts=experts)


def _read_qwen3(source: Checkpoint, **more: Any) -> ModelSpec:
    fields = Fields(source.path, source.config)
    biased = fields.boolean("attention_bias", default=False)
    defaults = {"max_position_embeddings": 32768, "head_dim": 128 if more["architecture"] == "qwen3" else None}
    options = {"qkv_bias": biased, "o_bias": biased, "qk_norm": "head", "windows": _windows(source)}
    return read_hf(source, defaults=defaults, **options, **more)


def _windows(source: Checkpoint) -> tuple[int | None, ...]:
    """With `use_sliding_window`, the layers from `max_window_layers` on have one; otherwise none has."""
    fields = Fields(source.path, source.config)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    if not fields.boolean("use_sliding_window", default=False) or not fields.has("sliding_window"):
        return (None,) * layers
    window = fields.integer("sliding_window", 1, MAX_CONTEXT)
    if fields.has("layer_types"):
        return windows_of(fields, layers, window, 1)
    first = fields.integer("max_window_layers", 0, MAX_LAYERS, default=28)
    return tuple(window if layer >= first else None for layer in range(layers))
