"""The encoder: all of a model's layers, in the ops of `kernels/ops.py`.

    tokens -> embed -> norm -> [ attention -> + -> norm -> mlp -> + -> norm ] x layers -> hidden states

A chunk of the batch is a whole text, whose tokens see each other and nothing else.
"""

from __future__ import annotations

import math

from ..kernels.ops import Array, Batch, Ops
from .encoder_spec import EncoderSpec
from .encoder_weights import EncoderWeights
from .weights import LayerWeights


class Encoder:
    """The model in `spec` (BERT, Devlin et al. 2019; RoBERTa, Liu et al. 2019; DistilBERT, Sanh et al. 2019)."""

    def __init__(self, spec: EncoderSpec, weights: EncoderWeights) -> None:
        self.spec, self.weights = spec, weights

    def forward(self, ops: Ops, batch: Batch) -> Array:
        """Hidden states float32 [rows, dim] of a batch whose chunks are whole texts; of `batch` only tokens, positions
        and chunks are read."""
        spec, weights = self.spec, self.weights
        positions = ops.embed(weights.positions, batch.positions, spec.position_offset)
        x = ops.add(ops.embed(weights.embedding, batch.tokens), positions)
        x = ops.layer_norm(x, weights.embedding_norm, weights.embedding_norm_bias, spec.norm_eps)
        for layer in weights.layers:
            x = self._layer(ops, x, layer, batch)
        return x

    def _layer(self, ops: Ops, x: Array, w: LayerWeights, batch: Batch) -> Array:
        spec = self.spec
        q, k, v = ops.linear(x, w.q, w.q_bias), ops.linear(x, w.k, w.k_bias), ops.linear(x, w.v, w.v_bias)
        scale = 1 / math.sqrt(spec.head_dim)
        mixed = ops.bidirectional_attention(q, k, v, batch, heads=spec.heads, scale=scale)
        x = ops.add(x, ops.linear(mixed, w.o, w.o_bias))
        x = ops.layer_norm(x, w.attention_post_norm, w.attention_post_norm_bias, spec.norm_eps)
        inner = ops.activate(ops.linear(x, w.up, w.up_bias), spec.activation)
        x = ops.add(x, ops.linear(inner, w.down, w.down_bias))
        return ops.layer_norm(x, w.mlp_post_norm, w.mlp_post_norm_bias, spec.norm_eps)

    def head(self, ops: Ops, x: Array) -> Array:
        """Logits of hidden states [n, dim], for a model with a head: float32 [n, vocabulary or labels]."""
        head, weights = self.spec.head, self.weights
        assert head is not None
        x = ops.linear(x, weights.head_dense, weights.head_dense_bias)
        x = ops.softcap(x, 1.0) if head.activation == "tanh" else ops.activate(x, head.activation)
        if weights.head_norm is not None:
            x = ops.layer_norm(x, weights.head_norm, weights.head_norm_bias, self.spec.norm_eps)
        return ops.linear(x, weights.head, weights.head_bias)
