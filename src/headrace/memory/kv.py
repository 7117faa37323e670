"""KV formats: how keys and values are stored, and what a token of them costs in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from ..schedule.pages import most_pages


@dataclass(frozen=True)
class KVFormat:
    """A row of the table. `scale_bytes` is spent once per token, head and plane (keys, values), where codes need it."""

    name: str
    bytes_per_element: int
    scale_bytes: int = 0

    def head_bytes(self, head_dim: int) -> int:
        """Bytes of one head's key or value of one token."""
        return head_dim * self.bytes_per_element + self.scale_bytes

    def token_bytes(self, layers: int, kv_heads: int, head_dim: int) -> int:
        """Bytes that one token's keys and values take in `layers` layers."""
        return 2 * layers * kv_heads * self.head_bytes(head_dim)


KV_FORMATS = {
    row.name: row
    for row in (
        KVFormat("float32", 4),
        KVFormat("float16", 2),
        KVFormat("bfloat16", 2),
        KVFormat("int8", 1, scale_bytes=4),
    )
}


def kv_format(name: str) -> KVFormat:
    """The KV format called `name`; ConfigError if there is none."""
    try:
        return KV_FORMATS[name]
    except KeyError:
        raise ConfigError(f"unknown kv_dtype {name!r}; choose one of {', '.join(KV_FORMATS)}") from None


@dataclass(frozen=True)
class PoolShape:
    """One KV group's pool: its layers' window, and the bytes of a page of all of them."""

    window: int | None
    page_bytes: int


def split_pages(
    pools: Sequence[PoolShape], memory: int, page_size: int, *, most: int, sequences: int, batch_tokens: int, steps: int
) -> tuple[int, ...]:
    """Pages of each pool, page 0 included, that fit `memory` bytes together.

    Pools of global layers get the same number, at most `most` beside page 0: they hold whole sequences. A pool with a
    window gets as many, or fewer where that is enough: for the windows of all `sequences`, and for what `steps` steps
    in flight of `batch_tokens` tokens write ahead of them.
    """

    def pages(whole: int) -> tuple[int, ...]:
        counts = []
        for pool in pools:
            count = whole
            if pool.window is not None:
                ahead = -(-steps * batch_tokens // page_size)
                count = min(whole, sequences * most_pages(page_size, pool.window, steps) + ahead)
            counts.append(count + 1)
        return tuple(counts)

    def fits(whole: int) -> bool:
        return sum(count * pool.page_bytes for count, pool in zip(pages(whole), pools, strict=True)) <= memory

    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return pages(low)
