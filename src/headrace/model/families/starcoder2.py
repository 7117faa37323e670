"""StarCoder2: rotation with LayerNorm, GELU and biases everywhere (Lozhkov et al. 2024)."""

from __future__ import annotations

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout
from ..rope import MAX_CONTEXT
from ..spec import MAX_LAYERS, ModelSpec
from .gguf import LAYER_NORM, read_gguf
from .hf import hf_layout, read_hf


def read_starcoder2_gguf(source: GGUFFile) -> ModelSpec:
    return read_gguf(source, activation="gelu_tanh", **LAYER_NORM, gated=False)


def read_starcoder2(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    window = fields.integer("sliding_window", 1, MAX_CONTEXT) if fields.has("sliding_window") else None
    biased = fields.boolean("use_bias", default=True)
    return read_hf(
        source,
        architecture="starcoder2",
        names={"rms_norm_eps": "norm_epsilon"},
        defaults={
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "num_key_value_heads": 2,
        },
        windows=(window,) * layers,
        **LAYER_NORM,
        gated=False,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=biased,
    )


def starcoder2_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    return hf_layout(source, spec, parts={"up": "mlp.c_fc", "down": "mlp.c_proj"})
