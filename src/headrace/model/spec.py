"""What a model is, without its weights: enough to build the decoder, and to compute bytes and operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UnsupportedModelError
from ..formats.gguf import GGUFFile
from ..formats.safetensors import Checkpoint
from ..formats.tensor import Tensor
from .fields import Fields
from .rope import MAX_CONTEXT, RopeSpec, read_gguf_rope, read_hf_rope


@dataclass(frozen=True)
class KVGroup:
    """Layers that share a window, and so a page list."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the Llama shape. Sizes are in elements; `windows[l]` is how many keys layer l sees, None for all."""

    name: str
    architecture: str
    layers: int
    dim: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope: RopeSpec
    tied: bool  # the head is the embedding
    windows: tuple[int | None, ...]
    attention_scale: float
    softcap: float | None = None
    activation: Literal["silu"] = "silu"
    attention_bias: bool = False  # on q, k, v and o
    mlp_bias: bool = False  # on gate, up and down

    @property
    def kv_groups(self) -> tuple[KVGroup, ...]:
        """The KV groups of the whole model."""
        return self.kv_groups_of(range(self.layers))

    def kv_groups_of(self, layers: range) -> tuple[KVGroup, ...]:
        """The KV groups of a range of layers, in the order in which their windows first appear."""
        members: dict[int | None, list[int]] = {}
        for layer in layers:
            members.setdefault(self.windows[layer], []).append(layer)
        return tuple(KVGroup(window, tuple(group)) for window, group in members.items())

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        matrices = self.dim * (2 * q + 2 * kv + 3 * self.ffn_dim)
        biases = self.attention_bias * (q + 2 * kv + self.dim) + self.mlp_bias * (2 * self.ffn_dim + self.dim)
        return matrices + biases + 2 * self.dim

    @property
    def parameters(self) -> int:
        """Weights of the model; a tied head counts once."""
        tables = self.vocab_size * self.dim * (1 if self.tied else 2)
        return tables + self.layers * self.layer_parameters + self.dim

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations (a multiply-add is two) for the token that makes its sequence `context` tokens
        long: matrix products, head included, and attention; norms, biases and activations left out."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        weights = self.layers * self.dim * (2 * q + 2 * kv + 3 * self.ffn_dim) + self.vocab_size * self.dim
        keys = sum(context if window is None else min(context, window) for window in self.windows)
        return 2 * weights + 4 * q * keys


MAX_LAYERS = 1024
MAX_DIM = 1 << 17
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_FFN = 1 << 20
MAX_VOCAB = 1 << 22


def read_spec(source: GGUFFile | Checkpoint) -> ModelSpec:
    """The spec of an opened model.

    Raises ModelFileError for a field that is missing or cannot be, UnsupportedModelError for an architecture,
    activation or rope that is not supported.
    """
    if isinstance(source, GGUFFile):
        name = Fields(source.path, source.metadata).text("general.architecture")
        return _reader(_GGUF_READERS, name, source.path)(source)
    name = _hf_architecture(Fields(source.path, source.config))
    return _reader(_HF_READERS, name, source.path)(source)


def _reader(readers: Mapping[str, Callable[[Any], ModelSpec]], name: str, path: Path) -> Callable[[Any], ModelSpec]:
    if name not in readers:
        known = ", ".join(readers)
        raise UnsupportedModelError(
            f"{path}: architecture {name!r:.80} is not supported; in this kind of file: {known}"
        )
    return readers[name]


def _hf_architecture(fields: Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list of one name, got {names!r:.80}")
    return names[0]


def _gguf_llama(source: GGUFFile) -> ModelSpec:
    fields = Fields(source.path, source.metadata, "llama.")
    head = Fields(source.path, source.metadata)
    dim = fields.integer("embedding_length", 1, MAX_DIM)
    heads = fields.integer("attention.head_count", 1, MAX_HEADS)
    head_dim = _head_dim(fields, "attention.key_length", "embedding_length", dim, "attention.head_count", heads)
    value_dim = fields.integer("attention.value_length", 1, MAX_HEAD_DIM, default=head_dim)
    if value_dim != head_dim:
        raise fields.error("attention.value_length", f"must equal the key length {head_dim}, got {value_dim}")
    layers = fields.integer("block_count", 1, MAX_LAYERS)
    context = fields.integer("context_length", 1, MAX_CONTEXT)
    window = fields.integer("attention.sliding_window", 0, MAX_CONTEXT, default=0) or None
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None:
        raise head.error("token_embd.weight", "the tensor is missing")
    return ModelSpec(
        name=head.text("general.name", default=Path(source.path).stem),
        architecture="llama",
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=_kv_heads(fields, "attention.head_count_kv", heads, default=heads),
        head_dim=head_dim,
        ffn_dim=fields.integer("feed_forward_length", 1, MAX_FFN),
        vocab_size=_vocab(fields, "vocab_size", embedding, default=embedding.shape[0]),
        context_length=context,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-12, 1.0),
        rope=read_gguf_rope(fields, source.tensors, head_dim, context),
        tied="output.weight" not in source.tensors,
        windows=(window,) * layers,
        attention_scale=1.0 / math.sqrt(head_dim),
        attention_bias="blk.0.attn_q.bias" in source.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in source.tensors,
    )


def _hf_llama(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    biases = fields.boolean("attention_bias", default=False), fields.boolean("mlp_bias", default=False)
    return _hf_decoder(source, "llama", default_context=2048, default_kv_heads=None, window=None, biases=biases)


def _hf_mistral(source: Checkpoint) -> ModelSpec:
    fields = Fields(source.path, source.config)
    # Absent, the window is 4,096; null, there is none.
    window = fields.integer("sliding_window", 1, MAX_CONTEXT, default=4096)
    if "sliding_window" in source.config and source.config["sliding_window"] is None:
        window = None
    return _hf_decoder(
        source, "mistral", default_context=1 << 17, default_kv_heads=8, window=window, biases=(False, False)
    )


def _hf_decoder(
    source: Checkpoint,
    architecture: str,
    *,
    default_context: int,
    default_kv_heads: int | None,
    window: int | None,
    biases: tuple[bool, bool],
) -> ModelSpec:
    """What Llama and Mistral configs have in common."""
    fields = Fields(source.path, source.config)
    activation = fields.text("hidden_act", default="silu")
    if activation != "silu":
        raise UnsupportedModelError(f"{source.path}: hidden_act {activation!r:.80} is not supported; only silu is")
    dim = fields.integer("hidden_size", 1, MAX_DIM)
    heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    head_dim = _head_dim(fields, "head_dim", "hidden_size", dim, "num_attention_heads", heads)
    layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    context = fields.integer("max_position_embeddings", 1, MAX_CONTEXT, default=default_context)
    embedding = source.tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise fields.error("model.embed_tokens.weight", "the tensor is missing")
    return ModelSpec(
        name=Path(source.path).name,
        architecture=architecture,
        layers=layers,
        dim=dim,
        heads=heads,
        kv_heads=_kv_heads(fields, "num_key_value_heads", heads, default=default_kv_heads or heads),
        head_dim=head_dim,
        ffn_dim=fields.integer("intermediate_size", 1, MAX_FFN),
        vocab_size=_vocab(fields, "vocab_size", embedding, default=None),
        context_length=context,
        norm_eps=fields.number("rms_norm_eps", 1e-12, 1.0, default=1e-6),
        rope=read_hf_rope(fields, head_dim, context),
        tied=fields.boolean("tie_word_embeddings", default=False),
        windows=(window,) * layers,
        attention_scale=1.0 / math.sqrt(head_dim),
        attention_bias=biases[0],
        mlp_bias=biases[1],
    )


def _head_dim(fields: Fields, name: str, dim_name: str, dim: int, heads_name: str, heads: int) -> int:
    if not fields.has(name) and dim % heads:
        raise fields.error(heads_name, f"{heads} heads do not divide {dim_name} {dim}, and {name} is missing")
    return fields.integer(name, 1, MAX_HEAD_DIM, default=dim // heads)


def _kv_heads(fields: Fields, name: str, heads: int, default: int) -> int:
    kv_heads = fields.integer(name, 1, heads, default=default)
    if heads % kv_heads:
        raise fields.error(name, f"{kv_heads} KV heads do not divide {heads} heads")
    return kv_heads


def _vocab(fields: Fields, name: str, embedding: Tensor, default: int | None) -> int:
    size = fields.integer(name, 1, MAX_VOCAB, default=default)
    if size != embedding.shape[0]:
        raise fields.error(name, f"is {size}, but the embedding has {embedding.shape[0]} rows")
    return size


# A family is a reader here (and its tensor names in weights.py).
_GGUF_READERS = {"llama": _gguf_llama}
_HF_READERS = {"LlamaForCausalLM": _hf_llama, "MistralForCausalLM": _hf_mistral}
