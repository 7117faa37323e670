"""KV formats: how keys and values are stored, and what a token of them costs in bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError


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
