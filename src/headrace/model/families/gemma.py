"""Gemma 2 and Gemma 3 (text): local layers with a window between global ones, norms around both halves of a layer,
scaled embeddings, norms' weights stored less 1."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout
from ..rope import MAX_CONTEXT, MAX_THETA, RopeSpec, read_hf_rope
from ..spec import MAX_LAYERS, ModelSpec
from .gguf import fields_of, read_gguf
from .hf import hf_layout, read_hf, require, windows_of

GLOBAL_EACH = {"gemma2": 2, "gemma3": 6}  # each so many-th layer is global
LOCAL_THETA = 10000.0  # of Gemma 3
LARGEST = {"gemma2": 46, "gemma3": 62}  # layers of the 27B models, whose queries are scaled by dim / heads
_HF_DEFAULTS = {
    "gemma2": {"head_dim": 256, "max_position_embeddings": 8192, "num_key_value_heads": 4},
    "gemma3": {
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "num_attention_heads": 8,
    },
}


def read_gemma2_gguf(source: GGUFFile) -> ModelSpec:
    fields = fields_of(source)
    softcaps: dict[str, Any] = {
        "softcap": fields.number("attn_logit_softcapping", 1e-3, 1e6, default=50.0),
        "logit_softcap": fields.number("final_logit_softcapping", 1e-3, 1e6, default=30.0),
    }
    return _from_gguf(read_gguf(source, post_norm=True, activation="gelu_tanh", **softcaps))


def read_gemma3_gguf(source: GGUFFile) -> ModelSpec:
    fields = fields_of(source)
    cap = fields.number("final_logit_softcapping", 0.0, 1e6, default=0.0) or None
    spec = _from_gguf(read_gguf(source, post_norm=True, qk_norm="head", activation="gelu_tanh", logit_softcap=cap))
    theta = fields.number("rope.freq_base_swa", 1.0001, MAX_THETA, default=LOCAL_THETA)
    return dataclasses.replace(spec, ropes=_ropes(spec, spec.ropes[0], RopeSpec(spec.head_dim, theta=theta)))


def _from_gguf(spec: ModelSpec) -> ModelSpec:
    """What llama.cpp knows by the family's name alone."""
    each, window = GLOBAL_EACH[spec.architecture], spec.windows[0]
    queries = spec.dim // spec.heads if spec.layers == LARGEST[spec.architecture] else spec.head_dim
    return dataclasses.replace(
        spec,
        embedding_scale=math.sqrt(spec.dim),
        attention_scale=1 / math.sqrt(queries),
        windows=tuple(window if (layer + 1) % each else None for layer in range(spec.layers)),
    )


def _ropes(spec: ModelSpec, of_global: RopeSpec | None, of_local: RopeSpec) -> tuple[RopeSpec | None, ...]:
    return tuple(of_global if window is None else of_local for window in spec.windows)


def read_gemma2(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    spec = _from_hf(source, "gemma2")
    return dataclasses.replace(
        spec,
        softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
    )


def read_gemma3_with_vision(source: Checkpoint) -> ModelSpec:
    """The text model of one that has a vision tower as well: its config is a table of the whole's."""
    text = Fields(source.path, source.config).table("text_config")
    config = {name.removeprefix(text.prefix): value for name, value in text.values.items()}
    stem = _text_stem(source)
    embedding = source.tensors.get(f"{stem}embed_tokens.weight")
    sizes = {} if embedding is None else {"vocab_size": embedding.shape[0]}  # which the config may leave out
    return read_gemma3(dataclasses.replace(source, config=sizes | config), stem)


def _text_stem(source: Checkpoint) -> str:
    """What the names of the text model begin with: one spelling or the other."""
    stems = ("language_model.model.", "model.language_model.")
    return next((stem for stem in stems if f"{stem}embed_tokens.weight" in source.tensors), stems[0])


def read_gemma3(source: Checkpoint, stem: str = "model.") -> ModelSpec:
    fields = Fields(source.path, source.config)
    spec = dataclasses.replace(_from_hf(source, "gemma3", stem), qk_norm="head")
    of_layers = fields.table("rope_parameters")
    if of_layers.has("full_attention"):
        places = (of_layers.table("full_attention"), of_layers.table("sliding_attention"))
        ropes = tuple(read_hf_rope(fields, spec.head_dim, spec.context_length, place) for place in places)
    else:
        theta = fields.number("rope_local_base_freq", 1.0001, MAX_THETA, default=LOCAL_THETA)
        whole = read_hf_rope(fields, spec.head_dim, spec.context_length, default_theta=1e6)
        ropes = (whole, RopeSpec(whole.rotated, theta=theta))
    return dataclasses.replace(
        spec,
        ropes=_ropes(spec, *ropes),
        softcap=_cap(fields, "attn_logit_softcapping", None),
        logit_softcap=_cap(fields, "final_logit_softcapping", None),
    )


def _from_hf(source: Checkpoint, architecture: str, stem: str = "model.") -> ModelSpec:
    fields = Fields(source.path, source.config)
    require(fields, "attention_bias", False)
    require(fields, "use_bidirectional_attention", False)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    window = fields.integer("sliding_window", 1, MAX_CONTEXT, default=4096)
    each = fields.integer("sliding_window_pattern", 1, MAX_LAYERS, default=GLOBAL_EACH[architecture])
    spec = read_hf(
        source,
        architecture=architecture,
        embedding=f"{stem}embed_tokens.weight",
        names={"hidden_act": "hidden_activation"},
        defaults=_HF_DEFAULTS[architecture] | {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True},
        windows=windows_of(fields, layers, window, each),
        post_norm=True,
        rotates=architecture == "gemma2",
    )
    scale = fields.number("query_pre_attn_scalar", 1e-3, 1e6, default=256.0) ** -0.5
    return dataclasses.replace(spec, embedding_scale=math.sqrt(spec.dim), attention_scale=scale)


def _cap(fields: Fields, name: str, default: float | None) -> float | None:
    """A softcap: the default where it is absent, none where it is null."""
    if name in fields.values and fields.values[name] is None:
        return None
    return fields.number(name, 1e-3, 1e6) if fields.has(name) else default


def gemma_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    parts = {
        "attention_post_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_post_norm": "post_feedforward_layernorm",
    }
    return hf_layout(source, spec, parts=parts, norm_offset=1.0)


def gemma3_with_vision_layout(source: Checkpoint, spec: ModelSpec) -> Layout:
    layout, stem = gemma_layout(source, spec), _text_stem(source)

    def renamed(name: str) -> str:
        return name.replace("model.", stem, 1)

    return dataclasses.replace(
        layout,
        tables={field: renamed(name) for field, name in layout.tables.items()},
        layer={field: dataclasses.replace(place, name=renamed(place.name)) for field, place in layout.layer.items()},
        others=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
        ignored=(*layout.ignored, "lm_head.weight"),
    )
