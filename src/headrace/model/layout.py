"""Where a model's weights lie in a file: the tensor of each, and how the file's rows become the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .spec import ModelSpec


@dataclass(frozen=True)
class Place:
    """A weight's tensor, and which of its rows make the weight, in order (None: all).

    `name` is without ".weight" or ".bias"; in a layer "{}" stands for its number, and "{expert}" for an expert's
    where each has tensors of its own (else they are stacked in one).
    """

    name: str
    rows: np.ndarray | None = None
    of: int = 0  # with `rows`: how many rows the tensor has


@dataclass(frozen=True)
class Layout:
    """The places of DecoderWeights' fields (`tables`) and of LayerWeights' (`layer`); a bias lies where its matrix or
    norm does."""

    tables: Mapping[str, str]
    layer: Mapping[str, Place]
    transposed: bool = False  # a layer's matrices are [in, out]
    norm_offset: float = 0.0  # what norms' weights lack in the file
    ignored: tuple[str, ...] = ()  # ends (or whole names) of tensors that say nothing the spec does not
    others: tuple[str, ...] = ()  # beginnings of tensors of other parts of the model


def fused(name: str, counts: Mapping[str, int]) -> dict[str, Place]:
    """Weights of `counts` rows each, one after the other in one tensor."""
    total, first, places = sum(counts.values()), 0, {}
    for field, count in counts.items():
        places[field] = Place(name, np.arange(first, first + count), total)
        first += count
    return places


def fused_qkv(name: str, spec: ModelSpec) -> dict[str, Place]:
    """q, k and v one after the other in one tensor."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    return fused(name, {"q": q, "k": kv, "v": kv})


def fused_heads(name: str, spec: ModelSpec) -> dict[str, Place]:
    """q, k and v in one tensor by KV head: its query heads, then its key, then its value."""
    group = spec.heads // spec.kv_heads
    heads = np.arange(spec.kv_heads * (group + 2)).reshape(spec.kv_heads, -1)
    total = heads.size * spec.head_dim

    def place(own: np.ndarray) -> Place:
        rows = own.reshape(-1, 1) * spec.head_dim + np.arange(spec.head_dim)
        return Place(name, rows.ravel(), total)

    return {"q": place(heads[:, :group]), "k": place(heads[:, group]), "v": place(heads[:, group + 1])}
