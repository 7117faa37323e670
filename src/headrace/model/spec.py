"""What a model is, without its weights: enough to build the decoder, and to compute bytes and operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ..kernels.ops import Activation
from .rope import RopeSpec

MAX_LAYERS = 1024
MAX_DIM = 1 << 17
MAX_HEADS = 1024
MAX_HEAD_DIM = 1024
MAX_FFN = 1 << 20
MAX_VOCAB = 1 << 22
MAX_EXPERTS = 1024

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class KVGroup:
    """Layers that share a window, and so a page list."""

    window: int | None
    layers: tuple[int, ...]


@dataclass(frozen=True)
class ExpertSpec:
    """Experts in place of an MLP, in every layer (Shazeer et al. 2017)."""

    count: int
    chosen: int  # by each token
    ffn_dim: int  # of each expert
    normalise: bool  # the weights of the chosen ones sum to 1


@dataclass(frozen=True)
class ModelSpec:
    """A decoder. Sizes are in elements.

    A layer is x + attention(norm(x)), then x + mlp(norm(x)), unless `pre_norm`, `post_norm` and `parallel` say
    otherwise.
    """

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
    tied: bool  # the head is the embedding
    windows: tuple[int | None, ...]  # of each layer: how many keys it sees, None for all
    ropes: tuple[RopeSpec | None, ...]  # of each layer, None where nothing is rotated
    attention_scale: float
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = False
    pre_norm: bool = True  # before attention and before the MLP
    post_norm: bool = False  # of what attention and the MLP give, before it is added
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x))
    shared_norm: bool = False  # with `parallel`: both read one norm
    qk_norm: Literal["head", "row"] | None = None  # of q and k, each head by itself or whole rows
    softcap: float | None = None  # of attention's scores
    alibi: bool = False
    activation: Activation = "silu"
    gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    experts: ExpertSpec | None = None
    positions: int = 0  # rows of a table of positions that is added to the embedding
    position_offset: int = 0  # position 0 is this row of it
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the MLP give
    logit_scale: float = 1.0
    logit_softcap: float | None = None

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
    def table_shapes(self) -> Shapes:
        """Weights outside the layers, as fields of DecoderWeights; `head` only where it is not the embedding."""
        shapes: Shapes = {"embedding": (self.vocab_size, self.dim)}
        if self.positions:
            shapes["positions"] = (self.positions, self.dim)
        if self.embedding_norm:
            shapes |= self._norm_shapes("embedding_norm")
        shapes |= self._norm_shapes("norm")
        return shapes if self.tied else shapes | {"head": (self.vocab_size, self.dim)}

    @property
    def layer_shapes(self) -> Shapes:
        """One layer's weights, as fields of LayerWeights: matrices [out, in], experts [experts, out, in]."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: Shapes = {"q": (q, self.dim), "k": (kv, self.dim), "v": (kv, self.dim)}
        shapes |= {"o": (self.dim, q)} | self._mlp_shapes()
        biased = ("q", "k", "v") * self.qkv_bias + ("o",) * self.o_bias + ("gate", "up", "down") * self.mlp_bias
        shapes |= {f"{name}_bias": shapes[name][:1] for name in biased if name in shapes}
        if self.qk_norm:
            shapes |= {"q_norm": (self.head_dim,), "k_norm": (self.head_dim,)}
        if self.qk_norm == "row":
            shapes |= {"q_norm": (q,), "k_norm": (kv,)}
        norms = ("attention_norm",) * self.pre_norm + ("mlp_norm",) * (self.pre_norm and not self.shared_norm)
        for norm in norms + ("attention_post_norm", "mlp_post_norm") * self.post_norm:
            shapes |= self._norm_shapes(norm)
        return shapes

    def _mlp_shapes(self) -> Shapes:
        if self.experts:
            up = (self.experts.count, self.experts.ffn_dim, self.dim)
            down = (self.experts.count, self.dim, self.experts.ffn_dim)
            return {"router": (self.experts.count, self.dim), "gates": up, "ups": up, "downs": down}
        shapes = {"up": (self.ffn_dim, self.dim), "down": (self.dim, self.ffn_dim)}
        return shapes | {"gate": shapes["up"]} if self.gated else shapes

    def _norm_shapes(self, name: str) -> Shapes:
        return dict.fromkeys((name, f"{name}_bias")[: 1 + self.norm_bias], (self.dim,))

    @property
    def parameters(self) -> int:
        """Weights of the model; a tied head counts once."""
        return _elements(self.table_shapes) + self.layers * _elements(self.layer_shapes)

    @property
    def active_share(self) -> float:
        """Of an expert's weights, how much one token reads: 1 where there are none."""
        return self.experts.chosen / self.experts.count if self.experts else 1.0

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations (a multiply-add is two) for the token that makes its sequence `context` tokens
        long: matrix products, head included, and attention; norms, biases and activations left out. Of experts only
        the chosen ones count."""
        weights = self.vocab_size * self.dim
        for shape in self.layer_shapes.values():
            if len(shape) == 3 and self.experts:
                weights += self.layers * math.prod(shape) // self.experts.count * self.experts.chosen
            elif len(shape) == 2:
                weights += self.layers * math.prod(shape)
        keys = sum(context if window is None else min(context, window) for window in self.windows)
        return 2 * weights + 4 * self.heads * self.head_dim * keys


def _elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())
