"""BERT (Devlin et al. 2019; MiniLM is one) and RoBERTa (Liu et al. 2019), from folders; BERT from GGUF."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ...errors import UnsupportedModelError
from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..encoder_spec import EncoderSpec, HeadSpec, Pooling
from ..fields import Fields
from ..layout import Layout, Place
from ..rope import MAX_CONTEXT
from ..spec import MAX_DIM, MAX_FFN, MAX_HEADS, MAX_LAYERS
from .gguf import fields_of
from .hf import activation_of, require
from .sentence import labels_of, longest_text, pooling_of
from .sizes import head_dim_of, vocab_of

MAX_TYPES = 1024
_PARTS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attention_post_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_post_norm": "output.LayerNorm",
}
_TABLES = {
    "embedding": "word_embeddings",
    "positions": "position_embeddings",
    "token_types": "token_type_embeddings",
    "embedding_norm": "LayerNorm",
}


def modern_names(source: Checkpoint) -> Checkpoint:
    """Norms of the first checkpoints have gamma and beta, not weight and bias."""
    old = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    tensors = dict(source.tensors)
    for name in source.tensors:
        for ending, modern in old.items():
            if name.endswith(ending):
                tensors[name.removesuffix(ending) + modern] = tensors.pop(name)
    return dataclasses.replace(source, tensors=tensors)


def read_bert(source: Checkpoint) -> EncoderSpec:
    fields = Fields(source.path, source.config)
    activation = activation_of(fields, "hidden_act", "gelu")
    tied = fields.boolean("tie_word_embeddings", default=True)
    heads = {
        "BertModel": None,
        "BertForMaskedLM": HeadSpec("masked", activation, tied),
        "BertForSequenceClassification": HeadSpec("classify", "tanh", labels=labels_of(source, "classifier.weight")),
    }
    return _read(source, "bert", heads[source.config["architectures"][0]], 0)


def read_roberta(source: Checkpoint) -> EncoderSpec:
    fields = Fields(source.path, source.config)
    padding = fields.integer("pad_token_id", 0, MAX_CONTEXT, default=1)
    labels = labels_of(source, "classifier.out_proj.weight")
    heads = {
        "RobertaModel": None,
        "RobertaForMaskedLM": HeadSpec("masked", "gelu", fields.boolean("tie_word_embeddings", default=True)),
        "RobertaForSequenceClassification": HeadSpec("classify", "tanh", labels=labels),
    }
    return _read(source, "roberta", heads[source.config["architectures"][0]], padding + 1)


def _read(source: Checkpoint, name: str, head: HeadSpec | None, offset: int) -> EncoderSpec:
    """`offset`: the row of position 0."""
    fields = Fields(source.path, source.config)
    require(fields, "is_decoder", False)
    require(fields, "add_cross_attention", False)
    require(fields, "position_embedding_type", "absolute")
    dim, heads = fields.integer("hidden_size", 1, MAX_DIM), fields.integer("num_attention_heads", 1, MAX_HEADS)
    head_dim_of(fields, "head_dim", "hidden_size", dim, "num_attention_heads", heads)
    embedding = source.tensors.get(f"{_prefix(source, name)}embeddings.word_embeddings.weight")
    if embedding is None:
        raise fields.error("embeddings.word_embeddings.weight", "the tensor is missing")
    positions = fields.integer("max_position_embeddings", offset + 1, MAX_CONTEXT, default=512)
    return EncoderSpec(
        name=Path(source.path).name,
        architecture=name,
        layers=fields.integer("num_hidden_layers", 1, MAX_LAYERS),
        dim=dim,
        heads=heads,
        ffn_dim=fields.integer("intermediate_size", 1, MAX_FFN),
        vocab_size=vocab_of(fields, "vocab_size", embedding, default=30522),
        context_length=longest_text(source, positions - offset),
        norm_eps=fields.number("layer_norm_eps", 1e-15, 1.0, default=1e-12),
        activation=activation_of(fields, "hidden_act", "gelu"),
        positions=positions,
        position_offset=offset,
        token_types=fields.integer("type_vocab_size", 1, MAX_TYPES, default=2),
        pooling=pooling_of(source, dim),
        head=head,
    )


def bert_layout(source: Checkpoint, spec: EncoderSpec) -> Layout:
    masked = {
        "head_dense": "cls.predictions.transform.dense",
        "head_norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions.decoder",
        "head_bias": _bias(source, spec, "cls.predictions"),
    }
    classify = {"head_dense": f"{_prefix(source, 'bert')}pooler.dense", "head": "classifier"}
    return _layout(source, "bert", classify if spec.head and spec.head.task == "classify" else masked)


def roberta_layout(source: Checkpoint, spec: EncoderSpec) -> Layout:
    masked = {
        "head_dense": "lm_head.dense",
        "head_norm": "lm_head.layer_norm",
        "head": "lm_head.decoder",
        "head_bias": _bias(source, spec, "lm_head"),
    }
    classify = {"head_dense": "classifier.dense", "head": "classifier.out_proj"}
    return _layout(source, "roberta", classify if spec.head and spec.head.task == "classify" else masked)


def _bias(source: Checkpoint, spec: EncoderSpec, head: str) -> str:
    """Where the bias of a head for masked tokens lies: with an untied product, if that has one."""
    own = f"{head}.decoder"
    return own if spec.head and not spec.head.tied and f"{own}.bias" in source.tensors else head


def _layout(source: Checkpoint, name: str, head: dict[str, str]) -> Layout:
    prefix = _prefix(source, name)
    return Layout(
        {field: f"{prefix}embeddings.{table}" for field, table in _TABLES.items()} | head,
        {field: Place(f"{prefix}encoder.layer.{{}}.{part}") for field, part in _PARTS.items()},
        ignored=("position_ids",),
        others=(f"{prefix}pooler.", "cls.", "lm_head."),
    )


def _prefix(source: Checkpoint, name: str) -> str:
    return f"{name}." if f"{name}.embeddings.word_embeddings.weight" in source.tensors else ""


_GGUF_TABLES = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "token_types": "token_types",
    "embedding_norm": "token_embd_norm",
    "head": "output",
}
_GGUF_PARTS = {
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "attention_post_norm": "attn_output_norm",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "layer_output_norm",
}
_GGUF_POOLINGS: dict[int, Pooling] = {0: "mean", 1: "mean", 2: "cls"}  # llama.cpp's numbers; 0: the file says none


def read_bert_gguf(source: GGUFFile) -> EncoderSpec:
    fields = fields_of(source)
    dim, heads = fields.integer("embedding_length", 1, MAX_DIM), fields.integer("attention.head_count", 1, MAX_HEADS)
    head_dim_of(fields, "attention.key_length", "embedding_length", dim, "attention.head_count", heads)
    require(fields, "attention.causal", False)
    pooling = fields.integer("pooling_type", 0, 2**31, default=0)
    if pooling not in _GGUF_POOLINGS:
        raise UnsupportedModelError(f"{source.path}: pooling type {pooling} is not supported; 1 (mean) and 2 (cls) are")
    tables = {name: source.tensors.get(f"{name}.weight") for name in ("token_embd", "position_embd", "token_types")}
    embedding, types = tables["token_embd"], tables["token_types"]
    if embedding is None:
        raise Fields(source.path, source.metadata).error("token_embd.weight", "the tensor is missing")
    context = fields.integer("context_length", 1, MAX_CONTEXT)
    return EncoderSpec(
        name=Fields(source.path, source.metadata).text("general.name", default=Path(source.path).stem),
        architecture="bert",
        layers=fields.integer("block_count", 1, MAX_LAYERS),
        dim=dim,
        heads=heads,
        ffn_dim=fields.integer("feed_forward_length", 1, MAX_FFN),
        vocab_size=vocab_of(fields, "vocab_size", embedding, default=embedding.shape[0]),
        context_length=context,
        norm_eps=fields.number("attention.layer_norm_epsilon", 1e-15, 1.0),
        activation="gelu",
        positions=context,
        token_types=0 if types is None else types.shape[0],
        pooling=_GGUF_POOLINGS[pooling],
    )


def bert_gguf_layout(source: GGUFFile, spec: EncoderSpec) -> Layout:
    places = {field: Place(f"blk.{{}}.{part}") for field, part in _GGUF_PARTS.items()}
    return Layout(_GGUF_TABLES, places, others=("cls.", "cls_"))
