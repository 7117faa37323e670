"""Llama 2 and 3, SmolLM2, Mistral, and Mixtral (Jiang et al. 2024)."""

from __future__ import annotations

from typing import Any

from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout
from ..rope import MAX_CONTEXT
from ..spec import MAX_EXPERTS, MAX_FFN, MAX_LAYERS, ExpertSpec, ModelSpec
from .hf import hf_layout, read_hf


def read_llama(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    biased = fields.boolean("attention_bias", default=False)
    mlp_bias = fields.boolean("mlp_bias", default=False)
    return read_hf(source, architecture="llama", qkv_bias=biased, o_bias=biased, mlp_bias=mlp_bias)


def read_mistral(source: Checkpoint) -> ModelSpec:
    return _read_mistral(source, "mistral", window=4096)


def read_mixtral(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    count = fields.integer("num_local_experts", 1, MAX_EXPERTS, default=8)
    experts = ExpertSpec(
        count,
        chosen=fields.integer("num_experts_per_tok", 1, count, default=2),
        ffn_dim=fields.integer("intermediate_size", 1, MAX_FFN),
        normalise=True,
    )
    return _read_mistral(source, "mixtral", window=None, experts=experts)


def _read_mistral(source: Checkpoint, architecture: str, window: int | None, **more: Any) -> ModelSpec:
    """`window` is what an absent field means; a null one means none."""
    fields = Fields(source.path, source.config)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    if source.config.get("sliding_window", window) is not None:
        window = fields.integer("sliding_window", 1, MAX_CONTEXT, default=window)
    else:
        window = None
    defaults: dict[str, Any] = {"max_position_embeddings": 1 << 17, "num_key_value_heads": 8}
    if architecture == "mixtral":
        defaults |= {"rms_norm_eps": 1e-5, "rope_theta": 1e6}
    return read_hf(source, architecture=architecture, defaults=defaults, windows=(window,) * layers, **more)


def mixtral_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    experts = "block_sparse_moe.experts.{expert}"
    parts = {"gates": f"{experts}.w1", "ups": f"{experts}.w3", "downs": f"{experts}.w2"}
    return hf_layout(source, spec, parts=parts | {"router": "block_sparse_moe.gate"})
