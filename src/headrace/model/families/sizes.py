"""Sizes that must agree with one another."""

from __future__ import annotations

from ...formats.tensor import Tensor
from ..fields import Fields
from ..spec import MAX_HEAD_DIM, MAX_VOCAB


def head_dim_of(fields: Fields, name: str, dim_name: str, dim: int, heads_name: str, heads: int) -> int:
    """The width of a head: what the field `name` says, else dim / heads."""
    if not fields.has(name) and dim % heads:
        raise fields.error(heads_name, f"{heads} heads do not divide {dim_name} {dim}, and {name} is missing")
    return fields.integer(name, 1, MAX_HEAD_DIM, default=dim // heads)


def kv_heads_of(fields: Fields, name: str, heads: int, default: int) -> int:
    """Heads of keys and values, which must divide `heads`."""
    kv_heads = fields.integer(name, 1, heads, default=default)
    if heads % kv_heads:
        raise fields.error(name, f"{kv_heads} KV heads do not divide {heads} heads")
    return kv_heads


def vocab_of(fields: Fields, name: str, embedding: Tensor, default: int | None) -> int:
    """The size of the vocabulary, which must be the embedding's."""
    size = fields.integer(name, 1, MAX_VOCAB, default=default)
    if size != embedding.shape[0]:
        raise fields.error(name, f"is {size}, but the embedding has {embedding.shape[0]} rows")
    return size
