"""GPT-2: learned positions, LayerNorm, GELU, and matrices stored [in, out]."""

from __future__ import annotations

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout, Place, fused_qkv
from ..rope import MAX_CONTEXT
from ..spec import MAX_DIM, MAX_FFN, ModelSpec
from .gguf import LAYER_NORM, fields_of, read_gguf
from .hf import read_hf, require

_NAMES = {
    "hidden_size": "n_embd",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
    "max_position_embeddings": "n_positions",
    "hidden_act": "activation_function",
    "rms_norm_eps": "layer_norm_epsilon",
}


def read_gpt2_gguf(source: GGUFFile) -> ModelSpec:
    fields = fields_of(source)
    positions = fields.integer("context_length", 1, MAX_CONTEXT)
    return read_gguf(source, rotates=False, positions=positions, activation="gelu_tanh", **LAYER_NORM, gated=False)


def read_gpt2(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "scale_attn_weights", True)
    require(fields, "scale_attn_by_inverse_layer_idx", False)
    require(fields, "add_cross_attention", False)
    dim = fields.integer("n_embd", 1, MAX_DIM)
    return read_hf(
        source,
        architecture="gpt2",
        embedding=f"{_prefix(source)}wte.weight",
        rotates=False,
        names=_NAMES,
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_new",
            "max_position_embeddings": 1024,
        },
        ffn_dim=fields.integer("n_inner", 1, MAX_FFN, default=4 * dim),
        positions=fields.integer("n_positions", 1, MAX_CONTEXT, default=1024),
        **LAYER_NORM,
        gated=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
    )


def gpt2_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    prefix = _prefix(source)
    parts = {
        "attention_norm": "ln_1",
        "o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "up": "mlp.c_fc",
        "down": "mlp.c_proj",
    }
    places = {field: Place(f"{prefix}h.{{}}.{name}") for field, name in parts.items()}
    return Layout(
        {"embedding": f"{prefix}wte", "positions": f"{prefix}wpe", "norm": f"{prefix}ln_f", "head": "lm_head"},
        places | fused_qkv(f"{prefix}h.{{}}.attn.c_attn", spec),
        transposed=True,
        ignored=(".attn.bias", ".attn.masked_bias"),  # the causal mask
    )


def _prefix(source: Checkpoint) -> str:
    return "" if "wte.weight" in source.tensors else "transformer."
