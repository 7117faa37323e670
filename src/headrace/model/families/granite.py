"""Granite: Llama with multipliers of the embedding, of attention's scores, of each layer's halves and of the logits."""

from __future__ import annotations

import dataclasses

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..spec import ModelSpec
from .gguf import fields_of, read_gguf
from .hf import read_hf

_MOST = 1e6


def read_granite_gguf(source: GGUFFile) -> ModelSpec:
    fields = fields_of(source)
    spec = read_gguf(source)
    return dataclasses.replace(
        spec,
        attention_scale=fields.number("attention.scale", 0.0, _MOST, default=0.0) or spec.attention_scale,
        embedding_scale=fields.number("embedding_scale", 1e-6, _MOST, default=1.0),
        residual_scale=fields.number("residual_scale", 1e-6, _MOST, default=1.0),
        logit_scale=1.0 / fields.number("logit_scale", 1e-6, _MOST, default=1.0),
    )


def read_granite(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    biased = fields.boolean("attention_bias", default=False)
    return read_hf(
        source,
        architecture="granite",
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=fields.boolean("mlp_bias", default=False),
        attention_scale=fields.number("attention_multiplier", 1e-6, _MOST, default=1.0),
        embedding_scale=fields.number("embedding_multiplier", 1e-6, _MOST, default=1.0),
        residual_scale=fields.number("residual_multiplier", 1e-6, _MOST, default=1.0),
        logit_scale=1.0 / fields.number("logits_scaling", 1e-6, _MOST, default=1.0),
    )
