"""OPT: learned positions from row 2 on, LayerNorm, ReLU (Zhang et al. 2022)."""

from __future__ import annotations

from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout, Place
from ..rope import MAX_CONTEXT
from ..spec import MAX_DIM, ModelSpec
from .gguf import LAYER_NORM
from .hf import read_hf, require

OFFSET = 2  # rows of the table of positions before that of position 0


def read_opt(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "do_layer_norm_before", True)
    require(fields, "layer_norm_elementwise_affine", True)
    require(fields, "_remove_final_layer_norm", False)
    require(fields, "word_embed_proj_dim", fields.integer("hidden_size", 1, MAX_DIM))
    biased = fields.boolean("enable_bias", default=True)
    return read_hf(
        source,
        architecture="opt",
        embedding=f"{_prefix(source)}embed_tokens.weight",
        names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
        defaults={"rms_norm_eps": 1e-5, "tie_word_embeddings": True, "hidden_act": "relu"},
        rotates=False,
        positions=fields.integer("max_position_embeddings", 1, MAX_CONTEXT, default=2048) + OFFSET,
        position_offset=OFFSET,
        **LAYER_NORM,
        gated=False,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
    )


def opt_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    prefix = _prefix(source)
    parts = {
        "attention_norm": "self_attn_layer_norm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "mlp_norm": "final_layer_norm",
        "up": "fc1",
        "down": "fc2",
    }
    return Layout(
        {
            "embedding": f"{prefix}embed_tokens",
            "positions": f"{prefix}embed_positions",
            "norm": f"{prefix}final_layer_norm",
            "head": "lm_head",
        },
        {field: Place(f"{prefix}layers.{{}}.{name}") for field, name in parts.items()},
    )


def _prefix(source: Checkpoint) -> str:
    return "decoder." if "decoder.embed_tokens.weight" in source.tensors else "model.decoder."
