"""OLMo 2 (norms after attention and MLP only, and of whole rows of q and k), and OLMoE (Muennighoff et al. 2024)."""

from __future__ import annotations

import dataclasses

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout
from ..spec import MAX_EXPERTS, MAX_FFN, ExpertSpec, ModelSpec
from .gguf import fields_of, read_gguf
from .hf import hf_layout, read_hf, require


def read_olmo2(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    biased = fields.boolean("attention_bias", default=False)
    return read_hf(
        source,
        architecture="olmo2",
        defaults={"rms_norm_eps": 1e-5},
        pre_norm=False,
        post_norm=True,
        qk_norm="row",
        qkv_bias=biased,
        o_bias=biased,
    )


def olmo2_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    parts = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
    return hf_layout(source, spec, parts=parts)


def read_olmo2_gguf(source: GGUFFile) -> ModelSpec:
    return read_gguf(source, pre_norm=False, post_norm=True, qk_norm="row")


def read_olmoe_gguf(source: GGUFFile) -> ModelSpec:
    fields = fields_of(source)
    spec = read_gguf(source, qk_norm="row")
    if spec.experts is None:
        raise fields.error("expert_count", "is missing or 0; OLMoE has experts")
    normalise = fields.boolean("expert_weights_norm", default=False)
    return dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, normalise=normalise))


def read_olmoe(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "clip_qkv", None)
    biased = fields.boolean("attention_bias", default=False)
    count = fields.integer("num_experts", 1, MAX_EXPERTS, default=64)
    experts = ExpertSpec(
        count,
        chosen=fields.integer("num_experts_per_tok", 1, count, default=8),
        ffn_dim=fields.integer("intermediate_size", 1, MAX_FFN, default=2048),
        normalise=fields.boolean("norm_topk_prob", default=False),
    )
    return read_hf(
        source,
        architecture="olmoe",
        defaults={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "intermediate_size": 2048},
        qk_norm="row",
        qkv_bias=biased,
        o_bias=biased,
        experts=experts,
    )
