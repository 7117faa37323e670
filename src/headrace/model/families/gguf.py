"""What GGUF files have in common, whatever the family: llama.cpp's metadata keys and tensor names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from ...formats.gguf import GGUFFile
from ..fields import Fields
from ..layout import Layout, Place, fused_qkv
from ..rope import MAX_CONTEXT, read_gguf_rope
from ..spec import (
    MAX_DIM,
    MAX_EXPERTS,
    MAX_FFN,
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    ExpertSpec,
    ModelSpec,
)
from .sizes import head_dim_of, kv_heads_of, vocab_of

_TABLES = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "embedding_norm": "token_embd_norm",
    "norm": "output_norm",
    "head": "output",
}
_PARTS = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "attention_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
    "router": "ffn_gate_inp",
    "gates": "ffn_gate_exps",
    "ups": "ffn_up_exps",
    "downs": "ffn_down_exps",
}
LAYER_NORM: dict[str, Any] = {"norm": "layer", "norm_bias": True}
_IGNORED = ("rope_freqs.weight", ".attn_rot_embd", "rope_factors_long.weight", "rope_factors_short.weight")


def fields_of(source: GGUFFile) -> Fields:
    """The fields of the file's own architecture."""
    name = Fields(source.path, source.metadata).text("general.architecture")
    return Fields(source.path, source.metadata, f"{name}.")


def read_gguf(source: GGUFFile, rotates: bool = True, **more: Any) -> ModelSpec:
    """What the metadata says by the keys that all families share, and biases by being there.

    `rotates` says whether positions are rotations, and `more` are fields that it takes the family to know.

    Raises ModelFileError and UnsupportedModelError as `read_spec` does.
    """
    fields, tensors = fields_of(source), source.tensors
    dim = fields.integer("embedding_length", 1, MAX_DIM)
    heads = fields.integer("attention.head_count", 1, MAX_HEADS)
    head_dim = head_dim_of(fields, "attention.key_length", "embedding_length", dim, "attention.head_count", heads)
    value_dim = fields.integer("attention.value_length", 1, MAX_HEAD_DIM, default=head_dim)
    if value_dim != head_dim:
        raise fields.error("attention.value_length", f"must equal the key length {head_dim}, got {value_dim}")
    layers = fields.integer("block_count", 1, MAX_LAYERS)
    context = fields.integer("context_length", 1, MAX_CONTEXT)
    window = fields.integer("attention.sliding_window", 0, MAX_CONTEXT, default=0) or None
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise Fields(source.path, source.metadata).error("token_embd.weight", "the tensor is missing")
    eps = "attention.layer_norm_epsilon" if more.get("norm") == "layer" else "attention.layer_norm_rms_epsilon"
    rope = read_gguf_rope(fields, tensors, head_dim, context) if rotates else None
    found: dict[str, Any] = {
        "name": Fields(source.path, source.metadata).text("general.name", default=Path(source.path).stem),
        "architecture": fields.prefix[:-1],
        "layers": layers,
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads_of(fields, "attention.head_count_kv", heads, default=heads),
        "head_dim": head_dim,
        "ffn_dim": fields.integer("feed_forward_length", 1, MAX_FFN),
        "vocab_size": vocab_of(fields, "vocab_size", embedding, default=embedding.shape[0]),
        "context_length": context,
        "norm_eps": fields.number(eps, 1e-12, 1.0),
        "tied": "output.weight" not in tensors,
        "windows": (window,) * layers,
        "attention_scale": 1.0 / math.sqrt(head_dim),
        "ropes": (rope,) * layers,
        "qkv_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "o_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "experts": _experts(fields),
    }
    return ModelSpec(**(found | more))


def _experts(fields: Fields) -> ExpertSpec | None:
    count = fields.integer("expert_count", 0, MAX_EXPERTS, default=0)
    if not count:
        return None
    return ExpertSpec(
        count,
        chosen=fields.integer("expert_used_count", 1, count),
        ffn_dim=fields.integer(
            "expert_feed_forward_length", 1, MAX_FFN, default=fields.integer("feed_forward_length", 1, MAX_FFN)
        ),
        normalise=fields.boolean("expert_weights_norm", default=True),
    )


def gguf_layout(source: GGUFFile, spec: ModelSpec) -> Layout:
    """llama.cpp's names, with rotated pairs (i, i + rotated/2)."""
    places = {field: Place(f"blk.{{}}.{name}") for field, name in _PARTS.items()}
    if "blk.0.attn_qkv.weight" in source.tensors:
        places |= fused_qkv("blk.{}.attn_qkv", spec)
    return Layout(_TABLES, places, ignored=_IGNORED)


def gguf_layout_of_pairs(source: GGUFFile, spec: ModelSpec) -> Layout:
    """The same where the converter has turned rotated pairs (i, i + rotated/2) into (2i, 2i + 1), as it does for llama
    and its relatives."""
    layout = gguf_layout(source, spec)
    rope = next((rope for rope in spec.ropes if rope), None)
    head = np.arange(spec.head_dim)
    if rope:
        head[: rope.rotated] = np.arange(rope.rotated).reshape(-1, 2).T.ravel()

    def place(field: str, heads: int) -> Place:
        rows = np.arange(heads)[:, None] * spec.head_dim + head
        return Place(layout.layer[field].name, rows.ravel(), rows.size)

    turned = {"q": place("q", spec.heads), "k": place("k", spec.kv_heads)}
    return Layout(layout.tables, {**layout.layer, **turned}, ignored=layout.ignored)
