"""The native op set: C++ kernels (csrc/), one pool of threads, a model recorded once and replayed a step at a time.

    ops = NativeOps(threads=2)                                  # one pool, shared by every model that uses this op set
    weights = load_weights(source, spec, ops, layers)           # pack, vector: pack() returns at once, the pool packs
    caches = [ops.kv_cache(...) for group in decoder.kv_groups]
    program = ops.capture(lambda batch: decoder.forward(ops, batch, caches), limits)
    ticket = program.submit(tokens, positions, chunk_rows, logit_rows, groups, samples)
    tokens, logits = ticket.result()

`pack`, `vector`, `kv_cache` and `copy_page` run when called. The ops on activations only record, and only while
`capture` runs: it calls the model once with symbolic operands, fuses what it recorded, and builds the native program.

`submit` copies the step's arrays and returns at once; steps of all programs of the pool, packs and page copies run one
after the other, in the order they were queued. So a step may be queued before the previous one has answered: a token
-1 - s means "what slot s sampled last", and `samples["slot"]` says which slot takes a row's token.

`samples` is an array of SAMPLE, one per row of `logit_rows`; `sample_spec` makes an entry from SamplingParams, or says
that the row's logits must come back (`logits_spec`) and be sampled in Python. A token of the answer is -1 where none
was to be chosen, and BROKEN_LOGITS where a logit was NaN or infinite.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import ConfigError, EngineDeadError
from ..types import SamplingParams
from .ops import Activation, Array, Batch, Group, KVGroupBatch, RopeTable

try:
    _native: Any = importlib.import_module("headrace.kernels._native")
    _missing: str | None = None
except ImportError as error:
    _native, _missing = None, str(error)

BROKEN_LOGITS = -2  # in place of a sampled token: the row's logits are not finite

SAMPLE = np.dtype(
    [
        ("temperature", "f8"),  # 0: greedy
        ("top_p", "f8"),
        ("min_p", "f8"),
        ("seed", "u8"),
        ("top_k", "i4"),
        ("sample_index", "u4"),
        ("slot", "i4"),  # takes the token, for a later step's late-bound one; -1: none
        ("choose", "u1"),  # whether to choose a token
        ("logits", "u1"),  # whether to give back the row's logits
        ("unused", "u2"),
    ]
)


def missing() -> str | None:
    """Why the compiled kernels cannot be used here, or None if they can."""
    return _missing


def supported_isas() -> list[str]:
    """Instruction sets that this machine runs, widest first; HEADRACE_ISA chooses another than the first."""
    return list(_native.supported_isas)


def shared_group(file: int, rank: int) -> Any:
    """A rank's end of parallel/group.py's SharedGroup."""
    return _native.shared_group(file, rank)


def channel_group(
    rank: int, sizes: Sequence[int], send: Callable[[int, np.ndarray], None], fill: Callable[..., None]
) -> Any:
    """A rank's end of a ChannelGroup: send(number, bytes) to all others, fill(rank, number, bytes) from one. They are
    called on threads of the pool."""
    return _native.channel_group(rank, *sizes, send, fill)


def sample_spec(
    params: SamplingParams, seed: int, sample_index: int, slot: int, choose: bool = True
) -> tuple[Any, ...] | None:
    """An entry of a SAMPLE array, or None where the row needs the Python sampler (and `logits_spec`)."""
    plain = (
        params.repetition_penalty == 1
        and not (params.presence_penalty or params.frequency_penalty or params.logit_bias or params.banned_tokens)
        and not (params.min_tokens or params.return_logits)
        and params.typical_p == 1
        and params.logprobs is None
        and params.grammar is None
    )
    if not plain:
        return None
    filters = (params.temperature, params.top_p, params.min_p)
    return (*filters, seed % 2**64, params.top_k, sample_index, slot, choose, False, 0)


def logits_spec() -> tuple[Any, ...]:
    """An entry of a SAMPLE array for a row that gives back its logits and chooses nothing."""
    return (0.0, 1.0, 0.0, 0, 0, 0, -1, False, True, 0)


@dataclass(frozen=True)
class Limits:
    """What a program can hold of one step. Its buffers are touched, and so resident, only as far as steps need them."""

    rows: int
    logits: int  # rows that the head computes
    chunks: int
    sequences: int  # slots for late-bound tokens
    pages: tuple[int, ...]  # of each KV group: pages of one sequence


@dataclass(frozen=True)
class NativeCache:
    """One layer's keys and values."""

    pool: Any
    layer: int


_NOTHING = np.empty(0, np.float32)


class Ticket:
    """A step that was queued."""

    __slots__ = ("_group", "_ticket", "_width")

    def __init__(self, ticket: Any, width: int, group: Any = None) -> None:
        self._ticket, self._width, self._group = ticket, width, group

    def done(self) -> bool:
        return self._ticket.done()

    def result(self) -> tuple[list[int], np.ndarray]:
        """Wait, without holding the interpreter. Gives the chosen tokens, one a logit row, and float32 [n, width].

        The latter is the logits of the rows that asked for them, in order; or the output, where a program does not end
        in logits. Raises EngineDeadError where the group of ranks was aborted meanwhile.
        """
        self._ticket.wait()
        if self._ticket.failed:
            why = f" ({self._group.failure})" if self._group.failure else ""
            raise EngineDeadError(f"the step has no result: its group of ranks was aborted{why}; start the ranks anew")
        values = self._ticket.output()
        return self._ticket.chosen(), (_NOTHING if values is None else values).reshape(-1, self._width)

    @property
    def times(self) -> tuple[float, float]:
        """When the step started and ended, in seconds of time.monotonic. To be read after `result`."""
        return self._ticket.started, self._ticket.ended

    @property
    def led(self) -> int:
        """Instructions that all threads but the first did, which left its core to the host. To be read after
        `result`."""
        return self._ticket.led

    @property
    def apart(self) -> bool:
        """Whether each thread took rows of its own through all layers."""
        return self._ticket.apart

    @property
    def reduces(self) -> tuple[int, int, float]:
        """Of a rank's step: reductions, bytes given to the other ranks (tokens and logits included), and seconds of
        waiting for theirs. To be read after `result`."""
        return self._ticket.reduces

    @property
    def spared_bytes(self) -> int:
        """Bytes of the head's weights that were not read, because no best token could come from them. To be read after
        `result`."""
        return self._ticket.spared_bytes

    @property
    def expert_load(self) -> list[int]:
        """Of each call of `experts` in turn, how many rows chose each expert. To be read after `result`."""
        return self._ticket.expert_load

    @property
    def seconds(self) -> list[float]:
        """Seconds of each of the program's `instructions`, for a `timed` step. To be read after `result`."""
        return self._ticket.seconds


@dataclass(frozen=True)
class Instruction:
    """What a program does in one go: its kind (see `fuse`), and the weights that it multiplies with."""

    kind: str
    shapes: tuple[tuple[int, int], ...] = ()  # [out, in] of each weight
    weight_bytes: int = 0  # as packed


class NativeProgram:
    """A recorded range of layers. `instructions` are what it does, in order, after fusion."""

    def __init__(
        self, ops: NativeOps, program: Any, width: int, instructions: tuple[Instruction, ...], group: Any = None
    ) -> None:
        self._ops, self._program, self._width, self._group = ops, program, width, group
        self.instructions = instructions

    def submit(
        self,
        tokens: np.ndarray,
        positions: np.ndarray,
        chunk_rows: np.ndarray,
        logit_rows: np.ndarray,
        groups: Sequence[KVGroupBatch],
        samples: np.ndarray,
        hidden: np.ndarray | None = None,
        timed: bool = False,
    ) -> Ticket:
        """Queue a step: arrays as in `Batch`, `samples` of SAMPLE [logit rows]. All are copied.

        A range that starts with `hidden` takes no tokens. `timed` measures each instruction. Raises ValueError where an
        array breaks a limit or contradicts another. The first step of all lets go of the file (`finish_packing`).
        """
        self._ops.finish_packing()
        places = [(group.slots, group.page_table) for group in groups]
        ticket = self._program.submit(
            tokens, positions, chunk_rows, logit_rows, places, samples.view(np.uint8), hidden, timed
        )
        return Ticket(ticket, self._width, self._group)


class NativeOps:
    """The native op set on one pool of threads.

    `isa` is an instruction set; without it HEADRACE_ISA says which, or it is the widest that runs here. `per_row`
    chooses the faster, coarser recipe for products of quantised weights: one scale for a row of activations. `group`:
    the ranks that hold the model between them; it serves one program.
    """

    # Half the memory of 16 bits and 7% more tokens a second at 64 sequences; SmolLM2's perplexity grows by 0.06%.
    default_kv_dtype = "int8"
    kv_head_multiple = 16

    def __init__(
        self,
        threads: int | None = None,
        isa: str | None = None,
        per_row: bool = False,
        group: Group | None = None,
    ) -> None:
        if _native is None:
            raise ConfigError(f"the native kernels are not built here ({_missing}); reinstall with a C++ compiler")
        if threads is None:
            threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.isa = isa or os.environ.get("HEADRACE_ISA") or _native.supported_isas[0]
        if self.isa not in _native.supported_isas:
            raise ConfigError(
                f"instruction set {self.isa!r} does not run here; choose one of {', '.join(_native.supported_isas)}"
            )
        self.name = f"native-{self.isa}"
        self.threads, self.per_row, self.group = threads, per_row, group
        self._pool, self._arena = _native.Pool(threads), _native.Arena()
        self._sources: list[Any] = []  # packed in the background: they must live until that is done
        self._recording: _Recording | None = None

    # What runs when called

    def pack(self, tensor: Any, row_order: np.ndarray | None = None, head: bool = False) -> Any:
        """Queue the packing of a file's tensor; see `finish_packing`."""
        rows, cols = tensor.shape
        order = None if row_order is None else np.ascontiguousarray(row_order, np.int32)
        data = tensor.data  # asked for once: it may be made anew each time
        weight = _native.pack(
            self._pool, self._arena, tensor.type.name, rows, cols, data, order, head and not self.per_row
        )
        self._sources.append(data)
        return weight

    def finish_packing(self) -> None:
        """Wait until all tensors are packed; after this the file is not read any more. Steps come after the packing in
        any case: this only lets go of the file."""
        if self._sources:
            self._pool.wait()
            self._sources.clear()
            _native.release_heap()  # what reading the file's own words took: some 5 MB

    def ring(self, eventfd: int) -> None:
        """Add one to this eventfd whenever a step, a pack or a copy is done, from now on."""
        self._pool.ring(eventfd)

    def rest(self) -> None:
        """The host has nothing to do until a step is done: where it has no core of its own, the threads take back the
        one that they left to it. Waiting for a result says so too."""
        self._pool.rest()

    def __del__(self) -> None:
        if getattr(self, "_sources", None):  # the pool may still be reading them
            self.finish_packing()

    def vector(self, tensor: Any, row_order: np.ndarray | None = None) -> np.ndarray:
        values = np.array(tensor.decode(), np.float32)
        return values if row_order is None else values[row_order]

    def kv_cache(
        self, layers: int, pages: int, page_size: int, kv_heads: int, head_dim: int, dtype: str
    ) -> list[NativeCache]:
        try:
            pool = _native.KvPool(dtype, layers, pages, page_size, kv_heads, head_dim)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        return [NativeCache(pool, layer) for layer in range(layers)]

    def copy_page(self, caches: list[NativeCache], source: int, target: int) -> None:
        caches[0].pool.copy_page(self._pool, source, target)

    # Recording

    def capture(self, model: Callable[[Batch], Array], limits: Limits, hidden: int | None = None) -> NativeProgram:
        """Record `model` and build its program.

        `hidden` is the width of `batch.hidden`, for a range that does not start at layer 0. A model that ends in a
        product of `logit_rows` rows gets sampling; any other gives back its output.
        """
        batch = Batch(
            tokens=Value(0),
            positions=Value(0),
            chunk_rows=Value(0),
            logit_rows=Value(0),
            groups=tuple(KVGroupBatch(Value(0), Value(0)) for _ in limits.pages),
            hidden=None if hidden is None else Value(hidden),
        )
        self._recording = _Recording(batch)
        try:
            output = model(batch)
            records = self._recording.records
        finally:
            self._recording = None
        return _build(self, batch, records, output, limits)

    def _record(self, op: str, inputs: Sequence[Array], width: int, gathers: bool = False, **attributes: Any) -> Value:
        if self._recording is None:
            raise RuntimeError(f"{op}: the native op set records inside `capture` only")
        out = Value(width, gathers or any(x.logits for x in inputs))
        self._recording.records.append(Record(op, tuple(inputs), out, attributes))
        return out

    def embed(self, table: Any, indices: Array, offset: int = 0, total: int | None = None) -> Array:
        by_position = self._recording is not None and indices is self._recording.batch.positions
        total = table.rows if total is None else total
        return self._record("embed", (), table.cols, table=table, by_position=by_position, offset=offset, total=total)

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self._record("norm", (x,), x.width, function=("rms_norm", weight, None, eps, 0.0))

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        return self._record("norm", (x,), x.width, function=("layer_norm", weight, bias, eps, 0.0))

    def linear(self, x: Array, weight: Any, bias: Array | None = None) -> Array:
        return self._record("linear", (x,), weight.rows, weight=weight, bias=bias)

    def rope(self, x: Array, positions: Array, table: RopeTable, heads: int) -> Array:
        return self._record("rope", (x,), x.width, table=table, heads=heads)

    def kv_write(self, cache: NativeCache, k: Array, v: Array, group: KVGroupBatch) -> None:
        self._record("kv_write", (k, v), 0, cache=cache, group=self._group(group))

    def attention(
        self,
        q: Array,
        cache: NativeCache,
        batch: Batch,
        group: KVGroupBatch,
        *,
        heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        slopes: np.ndarray | None = None,
    ) -> Array:
        options = {"heads": heads, "scale": scale, "window": window or 0, "softcap": softcap or 0.0, "slopes": slopes}
        return self._record("attention", (q,), q.width, cache=cache, group=self._group(group), **options)

    def bidirectional_attention(self, q: Array, k: Array, v: Array, batch: Batch, *, heads: int, scale: float) -> Array:
        return self._record("bidirectional", (q, k, v), q.width, heads=heads, scale=scale)

    def activate(self, x: Array, activation: Activation) -> Array:
        return self._record("activate", (x,), x.width, function=(activation, None, None, 0.0, 0.0))

    def glu(self, gate: Array, up: Array, activation: Activation) -> Array:
        return self._record("glu", (gate, up), gate.width, activation=activation)

    def experts(
        self,
        x: Array,
        scores: Array,
        gate: Sequence[Any],
        up: Sequence[Any],
        down: Sequence[Any],
        batch: Batch,
        *,
        chosen: int,
        normalise: bool,
        activation: Activation,
    ) -> Array:
        options = {"chosen": chosen, "normalise": normalise, "activation": activation}
        return self._record("experts", (x, scores), down[0].rows, gate=gate, up=up, down=down, **options)

    def add(self, x: Array, y: Array) -> Array:
        return self._record("add", (x, y), x.width)

    def scale(self, x: Array, factor: float) -> Array:
        return self._record("scale", (x,), x.width, function=("cap", None, None, factor, 0.0))

    def softcap(self, x: Array, cap: float) -> Array:
        return self._record("softcap", (x,), x.width, function=("cap", None, None, 1.0, cap))

    def all_reduce(self, x: Array) -> Array:
        return x if self.group is None else self._record("all_reduce", (x,), x.width)

    def all_gather(self, x: Array, cuts: Sequence[int]) -> Array:
        return x if self.group is None else self._record("all_gather", (x,), cuts[-1], cuts=list(cuts))

    def take_rows(self, x: Array, rows: Array) -> Array:
        return self._record("take_rows", (x,), x.width, gathers=True)

    def _group(self, group: KVGroupBatch) -> int:
        assert self._recording is not None
        return next(i for i, other in enumerate(self._recording.batch.groups) if other is group)


# The recorded program


@dataclass(frozen=True, eq=False)
class Value:
    """Float32 [rows, width] of a recorded program; `logits` where its rows are the step's logit_rows."""

    width: int
    logits: bool = False


@dataclass(frozen=True, eq=False)
class Record:
    """One call of an op."""

    op: str
    inputs: tuple[Value, ...]
    out: Value
    attributes: dict[str, Any]


@dataclass
class _Recording:
    batch: Batch
    records: list[Record] = field(default_factory=list)


@dataclass(eq=False)
class Item:
    """An instruction of the fused program: its kind, what it reads and writes, and the rest."""

    kind: str
    reads: tuple[Value, ...]
    writes: tuple[Value, ...]
    attributes: dict[str, Any]


def fuse(records: Sequence[Record], output: Value | None) -> list[Item]:
    """Join records into the instructions that the native program has.

        take_rows? -> norm? -> linear, linear ...              "product": products of one input, which is prepared once
        activate -> linear                                     "product"
        product -> add                                         "product" with a residual that it adds to
        product, product -> glu                                "gated"
        product -> scale? -> softcap? -> all_gather? -> output "head", where its rows are logit_rows
        all_reduce                                             "reduce_start" after what makes its input
        all_reduce -> add?                                     "reduce_wait" before what first reads the sum
        norm? -> rope?, norm? -> rope? -> kv_write? -> attention   "attention"
        norm, activate, scale or softcap                       "apply"; a norm with the addition of its result
        scale -> add                                           "add"

    A record that another one absorbs is left out where it stood. Values never change, so an item may read one later
    than its record did.
    """
    return _late_waits(_joined(records, output), output)


def _joined(records: Sequence[Record], output: Value | None) -> list[Item]:
    graph, items, done = _Graph(records, output), [], set()
    for record in records:
        if record in done or graph.absorbed(record):
            continue
        if record is graph.logits:
            items.append(graph.head())
        elif record.op == "linear":
            group = graph.products_of(record.inputs[0])
            done.update(group)
            items.append(graph.product(group, None))
        elif record.op == "add" and (summand := graph.summand(record)):
            items += graph.sum(summand, record)
        elif record.op == "all_reduce":
            items += graph.reduction(record, None)
        elif record.op == "glu" and (pair := graph.gate_and_up(record)):
            items.append(graph.gated(pair, record))
        elif record.op == "attention":
            items.append(graph.attention(record))
        elif record.op in _APPLIED:
            items.append(Item("apply", record.inputs, (record.out,), record.attributes))
        else:
            items.append(Item(record.op, record.inputs, (record.out,), record.attributes))
    return items


OPEN_REDUCTIONS = 2  # at once, at most: csrc/group.h


def _late_waits(items: Sequence[Item], output: Value | None) -> list[Item]:
    """The items with each wait for a reduction right before what first reads its sum, so that other work hides it; and
    never with more than OPEN_REDUCTIONS of them open while the next one's partial sums are made."""
    partials = {item.reads[0] for item in items if item.kind == "reduce_start"}
    late: list[Item] = []
    waiting: list[Item] = []

    def wait(past: int) -> None:
        late.extend(waiting[:past])
        del waiting[:past]

    for item in items:
        if item.kind == "reduce_wait":
            waiting.append(item)
            continue
        read = [index + 1 for index, other in enumerate(waiting) if other.writes[0] in item.reads]
        wait(max(read, default=0))
        if partials.intersection(item.writes):
            wait(len(waiting) - OPEN_REDUCTIONS + 1 if len(waiting) >= OPEN_REDUCTIONS else 0)
        late.append(item)
    wait(len(waiting))
    return late


_APPLIED = ("norm", "activate", "scale", "softcap")


class _Graph:
    """Who makes and who reads each value, and what follows from that."""

    def __init__(self, records: Sequence[Record], output: Value | None) -> None:
        self.output = output
        self.maker = {record.out: record for record in records}
        self.users: dict[Value, list[Record]] = {}
        for record in records:
            for value in record.inputs:
                self.users.setdefault(value, []).append(record)
        self._writes = _absorbed_writes(records)
        self.logits, self._head = self._find_head()

    def _find_head(self) -> tuple[Record | None, list[Record]]:
        """The record that makes the program's logits, and the chain that ends in it: a product, then what scales it."""
        last = self.maker.get(self.output) if self.output is not None and self.output.logits else None
        chain: list[Record] = []
        for op in ("all_gather", "softcap", "scale", "linear"):
            record = last if not chain else self.maker.get(chain[0].inputs[0])
            if record is not None and record.op == op and (not chain or self._only_user(record.out) is chain[0]):
                chain.insert(0, record)
        return (last, chain) if chain and chain[0].op == "linear" else (None, [])

    def _only_user(self, value: Value) -> Record | None:
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 and value is not self.output else None

    def _feeds_products(self, value: Value) -> bool:
        users = self.users.get(value, [])
        return bool(users) and value is not self.output and all(user.op == "linear" for user in users)

    def products_of(self, value: Value) -> list[Record]:
        """The products of a value that stand for themselves."""
        linears = (user for user in self.users[value] if user.op == "linear")
        return [record for record in linears if record is not self.logits and not self.absorbed(record)]

    def absorbed(self, record: Record) -> bool:
        """Whether what reads the record's value does its work."""
        user = self._only_user(record.out)
        if record.op == "kv_write":
            return record in self._writes.values()
        if record in self._head:
            return record is not self.logits
        if record.op in ("norm", "activate") and self._feeds_products(record.out) and _of_whole_rows(record):
            return True
        if record.op == "take_rows" and self._feeds_products(record.out):
            return True
        if user is None:
            return False
        if user.op == "add":
            return self.summand(user) is record
        if record.op == "take_rows":
            return user.op == "norm" and self.absorbed(user)
        if record.op == "rope" or (record.op == "norm" and self._of_heads(record)):
            return self._feeds_attention(record, user)
        return record.op == "linear" and self.gate_and_up(user) is not None

    def _of_heads(self, norm: Record) -> bool:
        """Whether a norm is of each head, and that of attention or of a rotation."""
        user = self._only_user(norm.out)
        parts = norm.out.width // len(norm.attributes["function"][1])
        if user is None or user.op not in ("rope", "attention", "kv_write"):
            return False
        if user.op == "kv_write":
            return parts == user.attributes["cache"].pool.kv_heads and user.inputs[0] is norm.out
        return parts == user.attributes["heads"]

    def _feeds_attention(self, record: Record, user: Record) -> bool:
        """Whether attention absorbs what happens to its queries, or to the keys that it absorbs the writing of."""
        if record.op == "norm" and user.op == "rope":
            return self.absorbed(user)
        before_write = user.op == "kv_write" and self.absorbed(user) and user.inputs[0] is record.out
        return user.op == "attention" or before_write

    def summand(self, add: Record) -> Record | None:
        """The product, norm or scaling that an addition absorbs: its second operand if that is one for it alone, else
        the first."""
        for value in reversed(add.inputs):
            maker = self.maker.get(value)
            fitting = maker is not None and maker.op in ("linear", "norm", "scale", "all_reduce")
            if fitting and self._only_user(value) is add:
                return maker
        return None

    def sum(self, summand: Record, add: Record) -> list[Item]:
        """An addition, and what it absorbs."""
        if summand.op == "linear":
            return [self.product([summand], add)]
        if summand.op == "all_reduce":
            return self.reduction(summand, add)
        residual = add.inputs[0] if add.inputs[1] is summand.out else add.inputs[1]
        if summand.op == "norm":
            return [Item("apply", (*summand.inputs, residual), (add.out,), summand.attributes)]
        factor = summand.attributes["function"][3]
        return [Item("add", (residual, *summand.inputs), (add.out,), {"factor": factor})]

    def reduction(self, record: Record, add: Record | None) -> list[Item]:
        """A reduction's two halves, and the addition that the second absorbs."""
        (partial,) = record.inputs
        if self._only_user(partial) is not record or partial not in self.maker:
            raise RuntimeError("all_reduce: partial sums are an op's result, and nothing else reads them")
        residual = () if add is None else (add.inputs[0] if add.inputs[1] is record.out else add.inputs[1],)
        out = record.out if add is None else add.out
        start = Item("reduce_start", (partial,), (), {})
        return [start, Item("reduce_wait", (partial, *residual), (out,), {})]

    def gate_and_up(self, record: Record) -> tuple[Record, Record] | None:
        """The two products of one input that a glu absorbs."""
        if record.op != "glu":
            return None
        gate, up = (self.maker.get(value) for value in record.inputs)
        if gate is None or up is None or gate.op != "linear" or up.op != "linear" or gate.inputs != up.inputs:
            return None
        alone = self._only_user(gate.out) is record and self._only_user(up.out) is record
        return (gate, up) if alone else None

    def _input(self, value: Value) -> tuple[Value, dict[str, Any]]:
        """Where products find their input: behind the norm or activation and the gathering that they absorb."""
        source: dict[str, Any] = {"before": None, "gathered": False}
        maker = self.maker.get(value)
        if maker is not None and maker.op in ("norm", "activate") and self.absorbed(maker):
            source["before"] = maker.attributes["function"]
            (value,) = maker.inputs
            maker = self.maker.get(value)
        if maker is not None and maker.op == "take_rows" and self.absorbed(maker):
            source["gathered"] = True
            (value,) = maker.inputs
        return value, source

    def product(self, linears: Sequence[Record], add: Record | None) -> Item:
        x, source = self._input(linears[0].inputs[0])
        source["parts"] = [record.attributes for record in linears]
        if add is not None:
            residual = add.inputs[0] if add.inputs[1] is linears[0].out else add.inputs[1]
            return Item("product", (x, residual), (add.out,), source)
        return Item("product", (x,), tuple(record.out for record in linears), source)

    def head(self) -> Item:
        linear, *after = self._head
        x, source = self._input(linear.inputs[0])
        source |= {"parts": [linear.attributes], "factor": 1.0, "cap": 0.0, "cuts": []}
        for record in after:
            if record.op == "all_gather":
                source["cuts"] = record.attributes["cuts"]
                continue
            *_, factor, cap = record.attributes["function"]
            source |= {"factor": source["factor"] * factor, "cap": cap}
        return Item("head", (x,), (self._head[-1].out,), source)

    def gated(self, pair: tuple[Record, Record], glu: Record) -> Item:
        x, source = self._input(pair[0].inputs[0])
        source |= {"parts": [record.attributes for record in pair], "activation": glu.attributes["activation"]}
        return Item("gated", (x,), (glu.out,), source)

    def attention(self, record: Record) -> Item:
        attributes = record.attributes | dict.fromkeys(("q_rope", "k_rope", "q_norm", "k_norm"))
        reads = [record.inputs[0]]
        if write := self._writes.get(record):
            reads.extend(write.inputs)
        for index, name in enumerate("qk"[: len(reads)]):
            for op, attribute in (("rope", "table"), ("norm", "function")):
                maker = self.maker.get(reads[index])
                if maker is not None and maker.op == op and self.absorbed(maker):
                    reads[index], attributes[f"{name}_{op}"] = maker.inputs[0], maker.attributes[attribute]
        return Item("attention", tuple(reads), (record.out,), attributes)


def _absorbed_writes(records: Sequence[Record]) -> dict[Record, Record]:
    """The kv_write that each attention absorbs: the last thing before it to touch its cache."""
    touched: dict[NativeCache, Record] = {}
    writes = {}
    for record in records:
        if (cache := record.attributes.get("cache")) is None:
            continue
        last = touched.get(cache)
        same = last is not None and last.op == "kv_write" and last.attributes["group"] == record.attributes["group"]
        if record.op == "attention" and last is not None and same:
            writes[record] = last
        touched[cache] = record
    return writes


def _of_whole_rows(record: Record) -> bool:
    return record.op != "norm" or len(record.attributes["function"][1]) == record.out.width


# The native program


def _build(ops: NativeOps, batch: Batch, records: list[Record], output: Value | None, limits: Limits) -> NativeProgram:
    items = fuse(records, output)
    program = _native.Program(
        ops._pool, ops.isa, limits.rows, limits.logits, limits.chunks, limits.sequences, list(limits.pages)
    )
    group = ops.group.native() if ops.group else None
    try:
        if group is not None:
            program.join(group)
        _write(program, batch, items, output, ops.per_row)
    except ValueError as error:
        if group is None:
            raise
        raise ConfigError(f"the program does not fit its group of ranks: {error}") from None
    return NativeProgram(ops, program, 1 if output is None else output.width, tuple(map(_instruction, items)), group)


def _write(program: Any, batch: Batch, items: list[Item], output: Value | None, per_row: bool) -> None:
    builder = _Builder(program, items, output, per_row)
    hidden = -1 if batch.hidden is None else builder.slot_for(batch.hidden)
    for index, item in enumerate(items):
        builder.emit(index, item)
    ends_in_head = bool(items) and items[-1].kind == "head"
    program.finish(hidden, -1 if ends_in_head or output is None else builder.slots[output])


def _instruction(item: Item) -> Instruction:
    a = item.attributes
    weights = [part["weight"] for part in a.get("parts", ())]
    shapes = tuple((weight.rows, weight.cols) for weight in weights)
    if item.kind == "experts":  # those of one row, as if they were one
        weights = [weight for name in ("gate", "up", "down") for weight in a[name][: a["chosen"]]]
        width = a["chosen"] * a["gate"][0].rows
        shapes = ((width, a["gate"][0].cols), (width, a["up"][0].cols), (a["down"][0].rows, width))
    return Instruction(item.kind, shapes, sum(weight.nbytes for weight in weights))


class _Builder:
    """Gives each value a slot for as long as it is read, and writes the instructions."""

    def __init__(self, program: Any, items: list[Item], output: Value | None, per_row: bool) -> None:
        self._program, self._per_row = program, per_row
        self._last_read = {value: index for index, item in enumerate(items) for value in item.reads}
        self._partials = {item.reads[0] for item in items if item.kind == "reduce_start"}
        if output is not None:
            self._last_read[output] = len(items)
        self.slots: dict[Value, int] = {}
        self._free: dict[tuple[int, bool], list[int]] = {}
        self._angles: dict[int, tuple[RopeTable, int]] = {}  # by the table's identity

    def _recipe(self, shifted: bool = False) -> str:
        """Of a product of quantised weights. What a norm has scaled has outliers, which `shifted` bears better, for a
        fourteenth of the time: SmolLM2's perplexity is 0.5% over float's without it, 0.2% with it before q, k, v and
        the head, and no better with it everywhere."""
        return "row" if self._per_row else "shifted" if shifted else "group"

    def slot_for(self, value: Value) -> int:
        if value in self._partials:
            self.slots[value] = self._program.partial(value.width)
            return self.slots[value]
        free = self._free.get((value.width, value.logits))
        self.slots[value] = free.pop() if free else self._program.slot(value.width, value.logits)
        return self.slots[value]

    def emit(self, index: int, item: Item) -> None:
        getattr(self, "_" + item.kind)(index, item)
        for value in {*item.reads, *item.writes}:
            if value in self.slots and self._last_read.get(value, -1) <= index and value.width:
                slot = self.slots.pop(value)
                if value not in self._partials:
                    self._free.setdefault((value.width, value.logits), []).append(slot)

    def _read(self, item: Item) -> list[int]:
        return [self.slots[value] for value in item.reads]

    def _angles_of(self, table: RopeTable | None) -> int:
        if table is None:
            return -1
        if id(table) not in self._angles:
            frequencies = np.ascontiguousarray(table.inv_freq, np.float32)
            self._angles[id(table)] = (table, self._program.angles(frequencies, table.scale))
        return self._angles[id(table)][1]

    def _embed(self, index: int, item: Item) -> None:
        a = item.attributes
        self._program.embed(a["table"], a["by_position"], a["offset"], a["total"], self.slot_for(item.writes[0]))

    def _product(self, index: int, item: Item) -> None:
        attributes, x = item.attributes, self.slots[item.reads[0]]
        before = attributes["before"]
        source = (before, attributes["gathered"], self._recipe(shifted=before is not None and before[1] is not None))
        if len(item.reads) == 1:
            outs = [self.slot_for(value) for value in item.writes]
            parts = [(part["weight"], part["bias"], out, False) for part, out in zip(attributes["parts"], outs)]
            self._program.linear(x, parts, *source)
            return
        residual, (part,) = item.reads[1], attributes["parts"]
        in_place = self._last_read[residual] == index and residual is not item.reads[0]
        out = self.slots.pop(residual) if in_place else self.slot_for(item.writes[0])
        self.slots[item.writes[0]] = out
        parts = [(part["weight"], part["bias"], out, in_place)]
        self._program.linear(x, parts, *source)
        if not in_place:
            self._program.add(self.slots[residual], out, 1.0, out)

    def _gated(self, index: int, item: Item) -> None:
        gate, up = item.attributes["parts"]
        x, out = self.slots[item.reads[0]], self.slot_for(item.writes[0])
        weights = (gate["weight"], gate["bias"], up["weight"], up["bias"])
        a = item.attributes
        self._program.gated(x, *weights, a["activation"], out, a["before"], self._recipe())

    def _head(self, index: int, item: Item) -> None:
        (part,), attributes = item.attributes["parts"], item.attributes
        x, out = self.slots[item.reads[0]], self.slot_for(item.writes[0])
        source = (attributes["before"], attributes["gathered"], self._recipe(shifted=True))
        after = (attributes["factor"], attributes["cap"], attributes["cuts"])
        self._program.head(x, part["weight"], part["bias"], out, *source, *after)

    def _attention(self, index: int, item: Item) -> None:
        a, reads = item.attributes, self._read(item)
        q, k, v = reads if len(reads) == 3 else (*reads, -1, -1)
        before = (a["q_norm"], self._angles_of(a["q_rope"]), a["k_norm"], self._angles_of(a["k_rope"]))
        numbers = (a["heads"], a["scale"], a["window"], a["softcap"], a["slopes"])
        place = (a["cache"].pool, a["cache"].layer, a["group"])
        self._program.attention(*place, q, k, v, *before, *numbers, self.slot_for(item.writes[0]))

    def _bidirectional(self, index: int, item: Item) -> None:
        heads, scale = item.attributes["heads"], item.attributes["scale"]
        self._program.bidirectional(*self._read(item), heads, scale, self.slot_for(item.writes[0]))

    def _apply(self, index: int, item: Item) -> None:
        x, *residual = self._read(item)
        out = self.slot_for(item.writes[0])
        self._program.apply(x, item.attributes["function"], residual[0] if residual else -1, out)

    def _experts(self, index: int, item: Item) -> None:
        a, (x, scores) = item.attributes, self._read(item)
        out = item.writes[0]
        matrices = (list(a["gate"]), list(a["up"]), list(a["down"]))
        inner = (Value(a["chosen"] * a["gate"][0].rows), Value(a["chosen"] * out.width))
        slots = [self.slot_for(value) for value in (*inner, out)]
        for value in inner:
            self._free.setdefault((value.width, value.logits), []).append(self.slots.pop(value))
        options = (a["chosen"], a["normalise"], a["activation"])
        self._program.experts(x, scores, *matrices, *options, *slots, self._recipe())

    def _reduce_start(self, index: int, item: Item) -> None:
        self._program.reduce_start(self.slots[item.reads[0]])

    def _reduce_wait(self, index: int, item: Item) -> None:
        partial, *residual = self._read(item)
        in_place = bool(residual) and self._last_read[item.reads[1]] == index
        out = self.slots.pop(item.reads[1]) if in_place else self.slot_for(item.writes[0])
        self.slots[item.writes[0]] = out
        self._program.reduce_wait(partial, residual[0] if residual else -1, out)

    def _rope(self, index: int, item: Item) -> None:
        angles = self._angles_of(item.attributes["table"])
        self._program.rope(*self._read(item), angles, item.attributes["heads"], self.slot_for(item.writes[0]))

    def _kv_write(self, index: int, item: Item) -> None:
        cache = item.attributes["cache"]
        self._program.kv_write(cache.pool, cache.layer, item.attributes["group"], *self._read(item))

    def _glu(self, index: int, item: Item) -> None:
        self._program.glu(*self._read(item), item.attributes["activation"], self.slot_for(item.writes[0]))

    def _add(self, index: int, item: Item) -> None:
        factor = item.attributes.get("factor", 1.0)
        self._program.add(*self._read(item), factor, self.slot_for(item.writes[0]))

    def _take_rows(self, index: int, item: Item) -> None:
        self._program.take_rows(*self._read(item), self.slot_for(item.writes[0]))
