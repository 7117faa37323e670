"""SmolLM3: Llama with layers where nothing is rotated (Yang et al. 2025)."""

from __future__ import annotations

import dataclasses

from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..rope import MAX_CONTEXT
from ..spec import MAX_LAYERS, ModelSpec
from .gguf import read_gguf
from .hf import read_hf, windows_of

STILL_EACH = 4  # each so many-th layer does not rotate


def read_smollm3_gguf(source: GGUFFile) -> ModelSpec:
    return _keep_still(read_gguf(source), STILL_EACH)


def read_smollm3(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    biased = fields.boolean("attention_bias", default=False)
    windows: tuple[int | None, ...] = (None,) * layers
    if fields.boolean("use_sliding_window", default=False) and fields.has("sliding_window"):
        windows = windows_of(fields, layers, fields.integer("sliding_window", 1, MAX_CONTEXT), layers + 1)
    spec = read_hf(
        source,
        architecture="smollm3",
        defaults={
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
        },
        windows=windows,
        qkv_bias=biased,
        o_bias=biased,
        mlp_bias=fields.boolean("mlp_bias", default=False),
    )
    if not fields.has("no_rope_layers"):
        return _keep_still(spec, fields.integer("no_rope_layer_interval", 1, MAX_LAYERS, default=STILL_EACH))
    rotates = fields.values["no_rope_layers"]  # despite its name: 1 where a layer rotates
    if not isinstance(rotates, list) or len(rotates) != layers or any(flag not in (0, 1) for flag in rotates):
        raise fields.error("no_rope_layers", f"must be a list of {layers} zeros and ones, got {rotates!r:.80}")
    return dataclasses.replace(spec, ropes=tuple(rope if flag else None for rope, flag in zip(spec.ropes, rotates)))


def _keep_still(spec: ModelSpec, each: int) -> ModelSpec:
    ropes = tuple(rope if (layer + 1) % each else None for layer, rope in enumerate(spec.ropes))
    return dataclasses.replace(spec, ropes=ropes)
