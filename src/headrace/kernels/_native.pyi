"""The compiled module (csrc/bind.cpp). Slots, angles and KV groups are given as indices, -1 for none."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

# What is done to a row: "rms_norm" or "layer_norm" (weight, bias, eps), an activation, or "cap" (its factor and cap are
# the two numbers).
Transform: TypeAlias = tuple[str, np.ndarray | None, np.ndarray | None, float, float]

supported_isas: list[str]  # instruction sets that run here, widest first
screened_rows: int  # SCREENED_ROWS

def release_heap() -> None:
    """Give memory that malloc holds and nobody uses back to the system, where the C library can (glibc)."""

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
    def ring(self, eventfd: int) -> None:
        """Add one to this eventfd whenever a job is done, from now on."""
    def rest(self) -> None:
        """The host has nothing to do until a job is done."""
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

def pack(
    pool: Pool,
    format: str,
    rows: int,
    cols: int,
    source: np.ndarray,
    row_order: np.ndarray | None,
    head: bool = False,
) -> Weight:
    """Queue the packing of `source`, uint8 [bytes] of [rows, cols], which must live until the pool has come to it: of
    its rows `row_order`, or of all. `head`: in the form that reads less where a row's best logit alone counts, if its
    format has one."""

class KvPool:
    """Pages of one KV group: `page_size` tokens (a multiple of 16) of all its layers. dtype as in memory/kv.py."""

    def __init__(self, dtype: str, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int) -> None: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def copy_page(self, pool: Pool, source: int, target: int) -> None:
        """Queue the copy of a page."""

class Group:
    """A rank's end of a group (csrc/group.h)."""

    @property
    def aborted(self) -> bool: ...
    @property
    def failure(self) -> str:
        """Why it was aborted, where that is known here."""
    def abort(self) -> None:
        """Ends every wait, on all ranks of one host: the steps that wait have failed."""

def shared_group(descriptor: int, rank: int) -> Group:
    """The ranks of one host: the file in memory of parallel/group.py."""

def channel_group(
    rank: int,
    ranks: int,
    rows: int,
    width: int,
    logits: int,
    columns: int,
    send: Callable[[int, np.ndarray], None],
    receive: Callable[[int, int, np.ndarray], None],
) -> Group:
    """Ranks anywhere: send(number, bytes) to all, receive(rank, number, bytes to fill) from one; called on threads of
    the pool. What they raise aborts the group."""

class Ticket:
    """A queued step."""

    def done(self) -> bool: ...
    def wait(self) -> None: ...
    def chosen(self) -> list[int]: ...
    def output(self) -> np.ndarray | None: ...
    @property
    def spared_bytes(self) -> int: ...
    @property
    def expert_load(self) -> list[int]: ...
    @property
    def seconds(self) -> list[float]: ...
    @property
    def failed(self) -> bool: ...
    @property
    def reduces(self) -> tuple[int, int, float]: ...
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
    def join(self, group: Group) -> None: ...
    def partial(self, width: int) -> int:
        """A slot for the partial sums of the next reduction."""

    def angles(self, inv_freq: np.ndarray, scale: float) -> int: ...
    def embed(self, table: Weight, by_position: bool, offset: int, total: int, out: int) -> None:
        """`total`: rows of the table on all ranks together; this one's begin with row -offset."""

    def linear(
        self,
        x: int,
        parts: Sequence[tuple[Weight, np.ndarray | None, int, bool]],
        before: Transform | None,
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
        activation: str,
        out: int,
        before: Transform | None,
        recipe: str,
    ) -> None: ...
    def head(
        self,
        x: int,
        weight: Weight,
        bias: np.ndarray | None,
        logits: int,
        before: Transform | None,
        gathered: bool,
        recipe: str,
        factor: float,
        cap: float,
        columns: Sequence[int],
    ) -> None:
        """Logits, each as "cap" makes it of the product, and the tokens that they choose. `columns`: of a group, where
        each rank's begin, and how many there are in all."""

    def reduce_start(self, partial: int) -> None: ...
    def reduce_wait(self, partial: int, residual: int, out: int) -> None: ...
    def apply(self, x: int, of_row: Transform, residual: int, out: int) -> None: ...
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
        q_norm: Transform | None,
        q_angles: int,
        k_norm: Transform | None,
        k_angles: int,
        heads: int,
        scale: float,
        window: int,
        softcap: float,
        slopes: np.ndarray | None,
        out: int,
    ) -> None: ...
    def bidirectional(self, q: int, k: int, v: int, heads: int, scale: float, out: int) -> None: ...
    def experts(
        self,
        x: int,
        scores: int,
        gate: list[Weight],
        up: list[Weight],
        down: list[Weight],
        chosen: int,
        normalise: bool,
        activation: str,
        hidden: int,
        results: int,
        out: int,
        recipe: str,
    ) -> None:
        """`hidden` and `results` are slots for the instruction's own use, `chosen` times as wide as an expert's."""

    def glu(self, gate: int, up: int, activation: str, out: int) -> None: ...
    def add(self, x: int, y: int, factor: float, out: int) -> None: ...
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
