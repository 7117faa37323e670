"""The compiled module (csrc/bind.cpp). Slots, angles and KV groups are given as indices, -1 for none."""

from collections.abc import Sequence

import numpy as np

supported_isas: list[str]  # instruction sets that run here, widest first

def read_bandwidth(bytes: int, threads: int) -> float:
    """GB/s of one pass over `bytes` of memory shared out among `threads`: the best of five."""

def int8_peak(threads: int) -> float:
    """10^9 operations (multiplications and additions) a second of int8 products out of registers: the best of five."""

def sample(
    isa: str,
    logits: np.ndarray,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    sample_index: int,
    position: int,
) -> int:
    """The token at `position`, from finite logits float32 [vocab], with a temperature above 0."""

class Pool:
    """Compute threads. Jobs (packs, page copies, steps) run one after the other, each on all threads."""

    def __init__(self, threads: int) -> None: ...
    @property
    def threads(self) -> int: ...
    def wait(self) -> None:
        """Until all that is queued has run."""

class Weight:
    """A packed weight [rows, cols]."""

    @property
    def rows(self) -> int: ...
    @property
    def cols(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

def pack(pool: Pool, format: str, rows: int, cols: int, source: np.ndarray, row_order: np.ndarray | None) -> Weight:
    """Queue the packing of `source`, uint8 [bytes], which must live until the pool has come to it."""

class KvPool:
    """Pages of one KV group: `page_size` tokens (a multiple of 16) of all its layers. dtype as in memory/kv.py."""

    def __init__(self, dtype: str, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def copy_page(self, pool: Pool, source: int, target: int) -> None:
        """Queue the copy of a page."""

class Ticket:
    """A queued step."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def chosen(self) -> np.ndarray: ...
    def output(self) -> np.ndarray: ...
    @property
    def seconds(self) -> list[float]: ...
    @property
    def started(self) -> float: ...
    @property
    def ended(self) -> float: ...

class Program:
    """Instructions over slots: record, `finish`, then `submit`. The errors are ValueError."""

    def __init__(
        self, pool: Pool, isa: str, rows: int, logits: int, chunks: int, sequences: int, pages: list[int]
    ) -> None: ...
    def slot(self, width: int, logits: bool) -> int: ...
    def angles(self, inv_freq: np.ndarray, scale: float) -> int: ...
    def embed(self, table: Weight, out: int) -> None: ...
    def linear(
        self,
        x: int,
        parts: Sequence[tuple[Weight, np.ndarray | None, int, bool]],
        norm: tuple[np.ndarray, float] | None,
        gathered: bool,
        recipe: str,
    ) -> None:
        """Products of one input: weight, bias, output slot, and whether it adds to what the slot holds."""

    def gated(
        self,
        x: int,
        gate: Weight,
        gate_bias: np.ndarray | None,
        up: Weight,
        up_bias: np.ndarray | None,
        out: int,
        norm: tuple[np.ndarray, float] | None,
        recipe: str,
    ) -> None: ...
    def head(
        self,
        x: int,
        weight: Weight,
        bias: np.ndarray | None,
        logits: int,
        norm: tuple[np.ndarray, float] | None,
        gathered: bool,
        recipe: str,
    ) -> None: ...
    def rms_norm(self, x: int, weight: np.ndarray, eps: float, out: int) -> None: ...
    def rope(self, x: int, angles: int, heads: int, out: int) -> None: ...
    def kv_write(self, kv: KvPool, layer: int, group: int, k: int, v: int) -> None: ...
    def attention(
        self,
        kv: KvPool,
        layer: int,
        group: int,
        q: int,
        k: int,
        v: int,
        q_angles: int,
        k_angles: int,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        out: int,
    ) -> None: ...
    def silu_mul(self, gate: int, up: int, out: int) -> None: ...
    def add(self, x: int, y: int, out: int) -> None: ...
    def take_rows(self, x: int, out: int) -> None: ...
    def finish(self, hidden: int, output: int) -> None: ...
    def submit(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        chunk_rows: np.ndarray,
        logit_rows: np.ndarray,
        groups: Sequence[tuple[np.ndarray, np.ndarray]],
        samples: np.ndarray,
        hidden: np.ndarray | None,
        timed: bool,
    ) -> Ticket: ...
