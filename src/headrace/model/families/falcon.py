"""Falcon: attention and MLP side by side, one or few KV heads (Almazrouei et al. 2023)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout, Place, fused_heads
from ..spec import MAX_DIM, MAX_FFN, MAX_HEADS, ModelSpec
from .gguf import LAYER_NORM, gguf_layout, read_gguf
from .hf import read_hf, require


def read_falcon_gguf(source: GGUFFile) -> ModelSpec:
    two_norms = "blk.0.attn_norm_2.weight" in source.tensors
    return read_gguf(source, parallel=True, shared_norm=not two_norms, activation="gelu", **LAYER_NORM, gated=False)


def falcon_gguf_layout(source: GGUFFile, spec: ModelSpec) -> Layout:
    layout = gguf_layout(source, spec)
    if spec.shared_norm:
        return layout
    norms = {"attention_norm": Place("blk.{}.attn_norm_2"), "mlp_norm": Place("blk.{}.attn_norm")}
    return dataclasses.replace(layout, layer={**layout.layer, **norms})


def read_falcon(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "alibi", False)
    require(fields, "parallel_attn", True)
    new = fields.boolean("new_decoder_architecture", default=False)
    norms = fields.integer("num_ln_in_parallel_attn", 1, 2, default=2 if new else 1)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    kv_heads = 1
    if new or not fields.boolean("multi_query", default=True):
        kv_heads = fields.integer("num_kv_heads", 1, heads, default=heads)
    biased = fields.boolean("bias", default=False)
    dim = fields.integer("hidden_size", 1, MAX_DIM)
    defaults: dict[str, Any] = {"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "num_key_value_heads": kv_heads}
    return read_hf(
        source,
        architecture="falcon",
        embedding="transformer.word_embeddings.weight",
        names={"rms_norm_eps": "layer_norm_epsilon", "hidden_act": "activation", "num_key_value_heads": ""},
        defaults=defaults | {"hidden_act": "gelu"},
        ffn_dim=fields.integer("ffn_hidden_size", 1, MAX_FFN, default=4 * dim),
        parallel=True,
        shared_norm=norms == 1,
        **LAYER_NORM,
        gated=False,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
    )


def falcon_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    names = {
        "attention_norm": "input_layernorm" if spec.shared_norm else "ln_attn",
        "o": "self_attention.dense",
        "mlp_norm": "ln_mlp",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    places = {field: Place(f"transformer.h.{{}}.{name}") for field, name in names.items()}
    return Layout(
        {"embedding": "transformer.word_embeddings", "norm": "transformer.ln_f", "head": "lm_head"},
        places | fused_heads("transformer.h.{}.self_attention.query_key_value", spec),
    )
