"""BLOOM: slopes of distance in place of positions (ALiBi), and a norm of the embedding (Le Scao et al. 2022)."""

from __future__ import annotations

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout, Place, fused_heads
from ..spec import MAX_DIM, ModelSpec
from .gguf import LAYER_NORM, read_gguf
from .hf import read_hf, require


def read_bloom_gguf(source: GGUFFile) -> ModelSpec:
    return read_gguf(
        source, rotates=False, alibi=True, embedding_norm=True, activation="gelu_tanh", **LAYER_NORM, gated=False
    )


def read_bloom(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "apply_residual_connection_post_layernorm", False)
    names = {
        "hidden_size": "n_embed" if fields.has("n_embed") else "hidden_size",
        "num_attention_heads": "num_attention_heads" if fields.has("num_attention_heads") else "n_head",
        "num_hidden_layers": "num_hidden_layers" if fields.has("num_hidden_layers") else "n_layer",
        "max_position_embeddings": "seq_length",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    return read_hf(
        source,
        architecture="bloom",
        rotates=False,
        embedding=f"{_prefix(source)}word_embeddings.weight",
        names=names,
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        ffn_dim=4 * fields.integer(names["hidden_size"], 1, MAX_DIM),
        activation="gelu_tanh",
        alibi=True,
        embedding_norm=True,
        **LAYER_NORM,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def bloom_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    prefix = _prefix(source)
    parts = {
        "attention_norm": "input_layernorm",
        "o": "self_attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h",
    }
    places = {field: Place(f"{prefix}h.{{}}.{name}") for field, name in parts.items()}
    return Layout(
        {
            "embedding": f"{prefix}word_embeddings",
            "embedding_norm": f"{prefix}word_embeddings_layernorm",
            "norm": f"{prefix}ln_f",
            "head": "lm_head",
        },
        places | fused_heads(f"{prefix}h.{{}}.self_attention.query_key_value", spec),
    )


def _prefix(source: Checkpoint) -> str:
    return "" if "word_embeddings.weight" in source.tensors else "transformer."
