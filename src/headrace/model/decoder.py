"""The decoder: a range of a model's layers, in the ops of `kernels/ops.py`.

    tokens -> embed -> [ norm -> attention -> + -> norm -> mlp -> + ] x layers -> norm -> head -> logits

A range that does not start at layer 0 begins with `batch.hidden`; one that does not end at the last layer returns it.
What a family has besides (norms after attention and MLP, positions in a table, experts, ...) the spec says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..kernels.ops import Array, Batch, KVGroupBatch, Ops, RopeTable
from .alibi import alibi_slopes
from .rope import rope_table
from .shares import Share
from .spec import ModelSpec
from .weights import DecoderWeights, LayerWeights


class _Place(NamedTuple):
    """A layer's window and rotation, and where its keys and values live."""

    window: int | None
    rope: RopeTable | None
    group: KVGroupBatch
    cache: Any


class Decoder:
    """Layers `layers` of the model in `spec` (Touvron et al. 2023; grouped queries: Ainslie et al. 2023).

    `context` is the longest that is served, where that is less than the model's. With a `share`, `weights` are that
    share's, and the ranks of the op set's group sum up what attention and MLP give: two reductions a layer, and one
    for the embedding. All have the same hidden states and the same logits.
    """

    def __init__(
        self,
        spec: ModelSpec,
        weights: DecoderWeights,
        layers: range,
        context: int | None = None,
        share: Share | None = None,
    ) -> None:
        self.spec, self.weights, self.layers, self.share = spec, weights, layers, share
        heads, kv_heads = (share.heads, share.kv_heads) if share else (range(spec.heads), range(spec.kv_heads))
        self._heads, self._kv_heads = len(heads), len(kv_heads)
        self.kv_groups = spec.kv_groups_of(layers)
        tables = {rope: rope_table(rope, context or spec.context_length) for rope in set(spec.ropes) if rope}
        self._ropes = [tables[rope] if rope else None for rope in spec.ropes]
        self._slopes = alibi_slopes(spec.heads)[heads.start : heads.stop] if spec.alibi else None

    def forward(self, ops: Ops, batch: Batch, caches: Sequence[Sequence[Any]]) -> Array:
        """Run a batch. `caches[g][i]` belongs to layer `kv_groups[g].layers[i]`, `batch.groups[g]` to its whole group.

        Returns float32 logits [logit rows, vocab] from the range that ends the model, else float32 hidden [rows, dim].
        """
        places = {
            layer: _Place(group.window, self._ropes[layer], batch.groups[g], caches[g][i])
            for g, group in enumerate(self.kv_groups)
            for i, layer in enumerate(group.layers)
        }
        x = self._embed(ops, batch) if self.layers.start == 0 else batch.hidden
        for layer, weights in zip(self.layers, self.weights.layers, strict=True):
            x = self._layer(ops, x, weights, batch, places[layer])
        return x if self.layers.stop < self.spec.layers else self._logits(ops, x, batch)

    def _embed(self, ops: Ops, batch: Batch) -> Array:
        spec, weights = self.spec, self.weights
        if self.share is None:
            x = ops.embed(weights.embedding, batch.tokens)
        else:
            x = ops.embed(weights.embedding, batch.tokens, -self.share.vocab.start, spec.vocab_size)
        x = _scaled(ops, self._reduced(ops, x), spec.embedding_scale)
        if spec.positions:
            x = ops.add(x, ops.embed(weights.positions, batch.positions, spec.position_offset))
        return self._norm(ops, x, weights.embedding_norm, weights.embedding_norm_bias)

    def _logits(self, ops: Ops, x: Array, batch: Batch) -> Array:
        spec, weights = self.spec, self.weights
        x = self._norm(ops, ops.take_rows(x, batch.logit_rows), weights.norm, weights.norm_bias)
        logits = _scaled(ops, ops.linear(x, weights.head), spec.logit_scale)
        logits = logits if spec.logit_softcap is None else ops.softcap(logits, spec.logit_softcap)
        return logits if self.share is None else ops.all_gather(logits, self.share.vocab_cuts)

    def _reduced(self, ops: Ops, x: Array) -> Array:
        """The sum of all ranks' partial sums."""
        return x if self.share is None else ops.all_reduce(x)

    def _layer(self, ops: Ops, x: Array, weights: LayerWeights, batch: Batch, place: _Place) -> Array:
        scale = self.spec.residual_scale
        normed = self._norm(ops, x, weights.attention_norm, weights.attention_norm_bias)
        mixed = self._attention(ops, normed, weights, batch, place)
        mixed = self._norm(ops, mixed, weights.attention_post_norm, weights.attention_post_norm_bias)
        summed = ops.add(x, _scaled(ops, mixed, scale))
        if not (self.spec.parallel and self.spec.shared_norm):
            of_mlp = x if self.spec.parallel else summed
            normed = self._norm(ops, of_mlp, weights.mlp_norm, weights.mlp_norm_bias)
        inner = self._experts(ops, normed, weights, batch) if self.spec.experts else self._mlp(ops, normed, weights)
        inner = self._norm(ops, inner, weights.mlp_post_norm, weights.mlp_post_norm_bias)
        return ops.add(summed, _scaled(ops, inner, scale))

    def _norm(self, ops: Ops, x: Array, weight: Array | None, bias: Array | None) -> Array:
        """x itself where there is no such norm."""
        if weight is None:
            return x
        eps = self.spec.norm_eps
        return ops.rms_norm(x, weight, eps) if self.spec.norm == "rms" else ops.layer_norm(x, weight, bias, eps)

    def _attention(self, ops: Ops, x: Array, weights: LayerWeights, batch: Batch, place: _Place) -> Array:
        spec = self.spec
        q = self._placed(ops, ops.linear(x, weights.q, weights.q_bias), weights.q_norm, self._heads, batch, place)
        k = self._placed(ops, ops.linear(x, weights.k, weights.k_bias), weights.k_norm, self._kv_heads, batch, place)
        v = ops.linear(x, weights.v, weights.v_bias)
        ops.kv_write(place.cache, k, v, place.group)
        mixed = ops.attention(
            q,
            place.cache,
            batch,
            place.group,
            heads=self._heads,
            scale=spec.attention_scale,
            window=place.window,
            softcap=spec.softcap,
            slopes=self._slopes,
        )
        return self._reduced(ops, ops.linear(mixed, weights.o, weights.o_bias))

    def _placed(self, ops: Ops, x: Array, norm: Array | None, heads: int, batch: Batch, place: _Place) -> Array:
        """q or k, normed and rotated as the layer has it."""
        if norm is not None:
            x = ops.rms_norm(x, norm, self.spec.norm_eps)
        return x if place.rope is None else ops.rope(x, batch.positions, place.rope, heads)

    def _mlp(self, ops: Ops, x: Array, weights: LayerWeights) -> Array:
        up = ops.linear(x, weights.up, weights.up_bias)
        if self.spec.gated:
            hidden = ops.glu(ops.linear(x, weights.gate, weights.gate_bias), up, self.spec.activation)
        else:
            hidden = ops.activate(up, self.spec.activation)
        return self._reduced(ops, ops.linear(hidden, weights.down, weights.down_bias))

    def _experts(self, ops: Ops, x: Array, weights: LayerWeights, batch: Batch) -> Array:
        experts = self.spec.experts
        assert experts is not None
        mixed = ops.experts(
            x,
            ops.linear(x, weights.router),
            weights.gates,
            weights.ups,
            weights.downs,
            batch,
            chosen=experts.chosen,
            normalise=experts.normalise,
            activation=self.spec.activation,
        )
        return self._reduced(ops, mixed)


def _scaled(ops: Ops, x: Array, factor: float) -> Array:
    return x if factor == 1.0 else ops.scale(x, factor)
