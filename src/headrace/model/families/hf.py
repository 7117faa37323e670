"""What Hugging Face folders have in common, whatever the family: the spellings of Llama's config and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UnsupportedModelError
from ...formats.safetensors import Checkpoint
from ...kernels.ops import Activation
from ..fields import Fields
from ..layout import Layout, Place
from ..rope import MAX_CONTEXT, read_hf_rope
from ..spec import MAX_DIM, MAX_FFN, MAX_HEADS, MAX_LAYERS, ModelSpec
from .sizes import head_dim_of, kv_heads_of, vocab_of

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
_TABLES = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
_PARTS = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "router": "mlp.gate",
    "gates": "mlp.experts.{expert}.gate_proj",
    "ups": "mlp.experts.{expert}.up_proj",
    "downs": "mlp.experts.{expert}.down_proj",
}


def read_hf(
    source: Checkpoint,
    *,
    embedding: str = "model.embed_tokens.weight",
    rotates: bool = True,
    names: Mapping[str, str] | None = None,
    defaults: Mapping[str, Any] | None = None,
    **more: Any,
) -> ModelSpec:
    """What config.json says by the names that Llama's has.

    `names` are other spellings of them, `defaults` what the family takes for a name that is absent or null, `rotates`
    says whether positions are rotations, and `more` are fields that are not in the config or not spelled so.

    Raises ModelFileError and UnsupportedModelError as `read_spec` does.
    """
    spelled, default = names or {}, {**_DEFAULTS, **(defaults or {})}
    fields = Fields(source.path, source.config)

    def integer(name: str, high: int) -> int:
        return fields.integer(spelled.get(name, name), 1, high, default=default.get(name))

    dim, heads = integer("hidden_size", MAX_DIM), integer("num_attention_heads", MAX_HEADS)
    layers, context = integer("num_hidden_layers", MAX_LAYERS), integer("max_position_embeddings", MAX_CONTEXT)
    head_dim = default.get("head_dim") if not fields.has("head_dim") else None
    if head_dim is None:
        dim_name, heads_name = (spelled.get(name, name) for name in ("hidden_size", "num_attention_heads"))
        head_dim = head_dim_of(fields, "head_dim", dim_name, dim, heads_name, heads)
    table = source.tensors.get(embedding)
    if table is None:
        raise fields.error(embedding, "the tensor is missing")
    kv_name = spelled.get("num_key_value_heads", "num_key_value_heads")
    eps = spelled.get("rms_norm_eps", "rms_norm_eps")
    found: dict[str, Any] = {
        "name": Path(source.path).name,
        "layers": layers,
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads_of(fields, kv_name, heads, default=default.get("num_key_value_heads") or heads),
        "head_dim": head_dim,
        "vocab_size": vocab_of(fields, "vocab_size", table, default=default.get("vocab_size")),
        "context_length": context,
        "norm_eps": fields.number(eps, 1e-12, 1.0, default=default["rms_norm_eps"]),
        "tied": fields.boolean("tie_word_embeddings", default=default["tie_word_embeddings"]),
        "windows": (None,) * layers,
        "attention_scale": 1.0 / math.sqrt(head_dim),
    }
    if "ffn_dim" not in more:
        found["ffn_dim"] = integer("intermediate_size", MAX_FFN)
    if "activation" not in more:
        found["activation"] = activation_of(fields, spelled.get("hidden_act", "hidden_act"), default["hidden_act"])
    if "ropes" not in more:
        rope = read_hf_rope(fields, head_dim, context, default_theta=default["rope_theta"]) if rotates else None
        found["ropes"] = (rope,) * layers
    return ModelSpec(**(found | more))


_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
}


def activation_of(fields: Fields, name: str, default: str) -> Activation:
    value = fields.text(name, default=default)
    if value not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise UnsupportedModelError(f"{fields.path}: {name} {value!r:.80} is not supported; {known} are")
    return _ACTIVATIONS[value]


def require(fields: Fields, name: str, wanted: Any) -> None:
    """UnsupportedModelError where the config says anything but `wanted`; absent or null is `wanted`."""
    if fields.has(name) and (value := fields.values[fields.prefix + name]) != wanted:
        raise UnsupportedModelError(f"{fields.path}: {name} {value!r:.80} is not supported; only {wanted!r} is")


def windows_of(fields: Fields, layers: int, window: int | None, pattern: int) -> tuple[int | None, ...]:
    """Each layer's window: by `layer_types` where the config has them, else all but each `pattern`-th layer have it."""
    if not fields.has("layer_types"):
        return tuple(window if (layer + 1) % pattern else None for layer in range(layers))
    types = fields.values["layer_types"]
    known = {"sliding_attention": window, "full_attention": None}
    if not isinstance(types, list) or len(types) != layers:
        raise fields.error("layer_types", f"must be a list of {layers} names, one a layer, got {types!r:.80}")
    for name in types:
        if not isinstance(name, str) or name not in known:
            raise UnsupportedModelError(
                f"{fields.path}: layer type {name!r:.40} is not supported; {' and '.join(known)} are"
            )
    return tuple(known[name] for name in types)


def hf_layout(source: Checkpoint, spec: ModelSpec, **changes: Any) -> Layout:
    """Llama's names; `changes` are fields of Layout, and `parts` other names of a layer's weights."""
    parts = _PARTS | changes.pop("parts", {})
    places = {field: Place(f"model.layers.{{}}.{name}") for field, name in parts.items()}
    return Layout(**({"tables": _TABLES, "layer": places, "ignored": (".rotary_emb.inv_freq",)} | changes))
