"""The decoder: a range of a model's layers, in the ops of `kernels/ops.py`.

    tokens -> embed -> [ norm -> attention -> + -> norm -> mlp -> + ] x layers -> norm -> head -> logits

A range that does not start at layer 0 begins with `batch.hidden`; one that does not end at the last layer returns it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..kernels.ops import Array, Batch, KVGroupBatch, Ops
from .rope import rope_table
from .spec import ModelSpec
from .weights import DecoderWeights, LayerWeights


class _Place(NamedTuple):
    """A layer's window, and where its keys and values live."""

    window: int | None
    group: KVGroupBatch
    cache: Any


class Decoder:
    """Layers `layers` of the model in `spec` (Touvron et al. 2023; grouped queries: Ainslie et al. 2023)."""

    def __init__(self, spec: ModelSpec, weights: DecoderWeights, layers: range) -> None:
        self.spec, self.weights, self.layers = spec, weights, layers
        self.kv_groups = spec.kv_groups_of(layers)
        self._rope = rope_table(spec.rope)

    def forward(self, ops: Ops, batch: Batch, caches: Sequence[Sequence[Any]]) -> Array:
        """Run a batch. `caches[g][i]` belongs to layer `kv_groups[g].layers[i]`, `batch.groups[g]` to its whole group.

        Returns float32 logits [logit rows, vocab] from the range that ends the model, else float32 hidden [rows, dim].
        """
        places = {
            layer: _Place(group.window, batch.groups[g], caches[g][i])
            for g, group in enumerate(self.kv_groups)
            for i, layer in enumerate(group.layers)
        }
        x = ops.embed(self.weights.embedding, batch.tokens) if self.layers.start == 0 else batch.hidden
        for layer, weights in zip(self.layers, self.weights.layers, strict=True):
            normed = ops.rms_norm(x, weights.attention_norm, self.spec.norm_eps)
            x = ops.add(x, self._attention(ops, normed, weights, batch, places[layer]))
            normed = ops.rms_norm(x, weights.mlp_norm, self.spec.norm_eps)
            x = ops.add(x, self._mlp(ops, normed, weights))
        if self.layers.stop < self.spec.layers:
            return x
        x = ops.take_rows(x, batch.logit_rows)
        x = ops.rms_norm(x, self.weights.norm, self.spec.norm_eps)
        return ops.linear(x, self.weights.head)

    def _attention(self, ops: Ops, x: Array, weights: LayerWeights, batch: Batch, place: _Place) -> Array:
        spec = self.spec
        q = ops.rope(ops.linear(x, weights.q, weights.q_bias), batch.positions, self._rope, spec.heads)
        k = ops.rope(ops.linear(x, weights.k, weights.k_bias), batch.positions, self._rope, spec.kv_heads)
        v = ops.linear(x, weights.v, weights.v_bias)
        ops.kv_write(place.cache, k, v, place.group)
        mixed = ops.attention(
            q,
            place.cache,
            batch,
            place.group,
            heads=spec.heads,
            scale=spec.attention_scale,
            window=place.window,
            softcap=spec.softcap,
        )
        return ops.linear(mixed, weights.o, weights.o_bias)

    def _mlp(self, ops: Ops, x: Array, weights: LayerWeights) -> Array:
        gate = ops.linear(x, weights.gate, weights.gate_bias)
        up = ops.linear(x, weights.up, weights.up_bias)
        return ops.linear(ops.glu(gate, up, "silu"), weights.down, weights.down_bias)
