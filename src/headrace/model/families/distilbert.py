"""DistilBERT: half of BERT's layers, no token types (Sanh et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from ...formats.safetensors import Checkpoint
from ..encoder_spec import EncoderSpec, HeadSpec
from ..fields import Fields
from ..layout import Layout, Place
from ..rope import MAX_CONTEXT
from ..spec import MAX_DIM, MAX_FFN, MAX_HEADS, MAX_LAYERS
from .hf import activation_of
from .sentence import labels_of, longest_text, pooling_of
from .sizes import head_dim_of, vocab_of

EPS = 1e-12
_PARTS = {
    "q": "attention.q_lin",
    "k": "attention.k_lin",
    "v": "attention.v_lin",
    "o": "attention.out_lin",
    "attention_post_norm": "sa_layer_norm",
    "up": "ffn.lin1",
    "down": "ffn.lin2",
    "mlp_post_norm": "output_layer_norm",
}


def read_distilbert(source: Checkpoint) -> EncoderSpec:
    fields = Fields(source.path, source.config)
    activation = activation_of(fields, "activation", "gelu")
    dim, heads = fields.integer("dim", 1, MAX_DIM, default=768), fields.integer("n_heads", 1, MAX_HEADS, default=12)
    head_dim_of(fields, "head_dim", "dim", dim, "n_heads", heads)
    embedding = source.tensors.get(f"{_prefix(source)}embeddings.word_embeddings.weight")
    if embedding is None:
        raise fields.error("embeddings.word_embeddings.weight", "the tensor is missing")
    positions = fields.integer("max_position_embeddings", 1, MAX_CONTEXT, default=512)
    tied = fields.boolean("tie_word_embeddings", default=True)
    head_of = {
        "DistilBertModel": None,
        "DistilBertForMaskedLM": HeadSpec("masked", activation, tied),
        "DistilBertForSequenceClassification": HeadSpec(
            "classify", "relu", labels=labels_of(source, "classifier.weight")
        ),
    }
    return EncoderSpec(
        name=Path(source.path).name,
        architecture="distilbert",
        layers=fields.integer("n_layers", 1, MAX_LAYERS, default=6),
        dim=dim,
        heads=heads,
        ffn_dim=fields.integer("hidden_dim", 1, MAX_FFN, default=4 * dim),
        vocab_size=vocab_of(fields, "vocab_size", embedding, default=30522),
        context_length=longest_text(source, positions),
        norm_eps=EPS,
        activation=activation,
        positions=positions,
        pooling=pooling_of(source, dim),
        head=head_of[source.config["architectures"][0]],
    )


def distilbert_layout(source: Checkpoint, spec: EncoderSpec) -> Layout:
    prefix = _prefix(source)
    tables = {
        "embedding": f"{prefix}embeddings.word_embeddings",
        "positions": f"{prefix}embeddings.position_embeddings",
        "embedding_norm": f"{prefix}embeddings.LayerNorm",
        "head_dense": "vocab_transform",
        "head_norm": "vocab_layer_norm",
        "head": "vocab_projector",
    }
    if spec.head and spec.head.task == "classify":
        tables |= {"head_dense": "pre_classifier", "head": "classifier"}
    return Layout(
        tables,
        {field: Place(f"{prefix}transformer.layer.{{}}.{part}") for field, part in _PARTS.items()},
        ignored=("position_ids",),
        others=("vocab_",),
    )


def _prefix(source: Checkpoint) -> str:
    return "distilbert." if "distilbert.embeddings.word_embeddings.weight" in source.tensors else ""
