"""What an encoder is, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ..kernels.ops import Activation
from .spec import Shapes

# How a text's hidden states become one vector: their mean, that of its first token, or the largest of each element.
Pooling = Literal["mean", "cls", "max"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class HeadSpec:
    """What stands on the hidden states: a dense layer and its activation, then a product.

    "masked": of each token, normed in between, to the vocabulary. "classify": of a text's first token, to `labels`.
    """

    task: Literal["masked", "classify"]
    activation: Activation | Literal["tanh"]
    tied: bool = False  # the product is with the embedding
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder in which every token of a text sees all others (Devlin et al. 2019). Sizes are in elements.

    The embedding is norm(word + position + type). A layer is x = norm(x + attention(x)), then x = norm(x + mlp(x)),
    with biases throughout.
    """

    name: str
    architecture: str
    layers: int
    dim: int
    heads: int
    ffn_dim: int
    vocab_size: int
    context_length: int  # tokens of a text, those at its ends included
    norm_eps: float
    activation: Activation
    positions: int  # rows of the table of positions
    position_offset: int = 0  # position 0 is this row of it
    token_types: int = 0  # rows of the table of types, of which texts have the first; 0 for none
    pooling: Pooling = "mean"
    head: HeadSpec | None = None

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def table_shapes(self) -> Shapes:
        """Weights outside the layers; those of the head begin with "head"."""
        shapes: Shapes = {"embedding": (self.vocab_size, self.dim), "positions": (self.positions, self.dim)}
        if self.token_types:
            shapes["token_types"] = (self.token_types, self.dim)
        shapes |= {"embedding_norm": (self.dim,), "embedding_norm_bias": (self.dim,)}
        if self.head is None:
            return shapes
        shapes |= {"head_dense": (self.dim, self.dim), "head_dense_bias": (self.dim,)}
        if self.head.task == "masked":
            shapes |= {"head_norm": (self.dim,), "head_norm_bias": (self.dim,)}
        outputs = self.vocab_size if self.head.task == "masked" else len(self.head.labels)
        shapes |= {"head_bias": (outputs,)}
        return shapes if self.head.tied else shapes | {"head": (outputs, self.dim)}

    @property
    def layer_shapes(self) -> Shapes:
        """One layer's weights, as fields of LayerWeights: matrices [out, in]."""
        shapes: Shapes = {name: (self.dim, self.dim) for name in "qkvo"}
        shapes |= {"up": (self.ffn_dim, self.dim), "down": (self.dim, self.ffn_dim)}
        shapes |= {f"{name}_bias": shape[:1] for name, shape in shapes.items()}
        for norm in ("attention_post_norm", "mlp_post_norm"):
            shapes |= {norm: (self.dim,), f"{norm}_bias": (self.dim,)}
        return shapes
