"""Phi-3 and its successors: q, k and v in one tensor, gate and up in another, long contexts by factors of frequencies
(Ding et al. 2024)."""

from __future__ import annotations

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout, fused, fused_qkv
from ..rope import MAX_CONTEXT, read_hf_rope
from ..spec import MAX_DIM, MAX_HEADS, MAX_LAYERS, ModelSpec
from .gguf import gguf_layout, read_gguf
from .hf import hf_layout, read_hf
from .sizes import head_dim_of


def read_phi3_gguf(source: GGUFFile) -> ModelSpec:
    return read_gguf(source)


def read_phi3(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    window = fields.integer("sliding_window", 1, MAX_CONTEXT) if fields.has("sliding_window") else None
    dim, heads = fields.integer("hidden_size", 1, MAX_DIM), fields.integer("num_attention_heads", 1, MAX_HEADS)
    head_dim = head_dim_of(fields, "head_dim", "hidden_size", dim, "num_attention_heads", heads)
    context = fields.integer("max_position_embeddings", 1, MAX_CONTEXT, default=4096)
    rope = read_hf_rope(fields, head_dim, context, partial=True)
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}
    windows = (window,) * layers
    return read_hf(source, architecture="phi3", defaults=defaults, windows=windows, ropes=(rope,) * layers)


def phi3_gguf_layout(source: GGUFFile, spec: ModelSpec) -> Layout:
    layout = gguf_layout(source, spec)
    own = fused("blk.{}.ffn_up", {"gate": spec.ffn_dim, "up": spec.ffn_dim})
    return Layout(layout.tables, {**layout.layer, **own}, ignored=layout.ignored)


def phi3_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    layout = hf_layout(source, spec)
    own = fused_qkv("model.layers.{}.self_attn.qkv_proj", spec)
    own |= fused("model.layers.{}.mlp.gate_up_proj", {"gate": spec.ffn_dim, "up": spec.ffn_dim})
    return Layout(layout.tables, {**layout.layer, **own}, ignored=layout.ignored)
