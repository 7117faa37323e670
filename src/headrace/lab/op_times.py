"""Where a step's time goes: each kind of instruction of the native program, beside the machine's ceilings of then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from ..assemble import Model, open_model, resolve_settings, thread_count
from ..config import Settings
from ..errors import ConfigError
from ..kernels import choose_ops
from ..kernels.native import SAMPLE, Instruction, Limits, NativeOps, NativeProgram
from ..kernels.ops import KVGroupBatch
from ..memory.kv import kv_format
from ..model.decoder import Decoder
from ..model.weights import load_weights
from ..results import machine_facts
from .ceilings import Ceilings, sample_ceilings

PAGE_SIZE = 32
MAX_ROWS = 2048
MAX_CONTEXT = 1 << 15
WARM_UP = 2  # steps
PREFILL = 256  # tokens of a step that fills pages


@dataclass(frozen=True)
class Line:
    """All instructions of one kind in a step, together: what they read and compute, and in how long."""

    name: str
    count: int
    seconds: float
    bytes: int
    flops: int


@dataclass(frozen=True)
class Profile:
    """A step of `rows` sequences that all have `context` tokens before it."""

    rows: int
    context: int
    seconds: float
    lines: tuple[Line, ...]
    ceilings: Ceilings

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Bench:
    """A loaded model, and steps in which every sequence decodes one token."""

    def __init__(self, model: Model, settings: Settings, rows: int, context: int) -> None:
        ops = choose_ops(settings.kernels, thread_count(settings.threads), settings.activations)
        if not isinstance(ops, NativeOps):
            raise ConfigError("the times of single instructions need the native op set; see `headrace info`")
        self.ops, self.spec = ops, model.spec
        self.resolved = resolve_settings(model, settings, ops)
        layers = range(model.spec.layers)
        decoder = Decoder(model.spec, load_weights(model.file, model.spec, ops, layers), layers)
        pages = -(-(context + 1) // PAGE_SIZE)
        self.groups = decoder.kv_groups
        sizes = (model.spec.kv_heads, model.spec.head_dim, self.resolved.kv_dtype)
        caches = [ops.kv_cache(len(group.layers), rows * pages + 1, PAGE_SIZE, *sizes) for group in self.groups]
        most = max(rows, PREFILL)
        limits = Limits(rows=most, logits=rows, chunks=rows, sequences=rows, pages=(pages,) * len(caches))
        self.program: NativeProgram = ops.capture(lambda batch: decoder.forward(ops, batch, caches), limits)
        self.pages = 1 + np.arange(rows * pages, dtype=np.int32).reshape(rows, pages)
        self._fill(caches, context)

    def _fill(self, caches: list[list[Any]], context: int) -> None:
        """Give every sequence keys and values: pages never written are all one page of zeros, which stays in cache."""
        none = np.zeros(0, np.int32)
        for start in range(0, context, PREFILL):
            positions = np.arange(start, min(context, start + PREFILL), dtype=np.int32)
            table = self.pages[:1, : positions[-1] // PAGE_SIZE + 1].copy()
            slots = table[0, positions // PAGE_SIZE].astype(np.int64) * PAGE_SIZE + positions % PAGE_SIZE
            ends = np.array([0, len(positions)], np.int32)
            groups = [KVGroupBatch(slots, table) for _ in caches]
            self.program.submit(positions % 1000, positions, ends, none, groups, np.zeros(0, SAMPLE)).result()
        for cache in caches:
            for row in self.pages[1:]:
                for source, target in zip(self.pages[0].tolist(), row.tolist(), strict=True):
                    self.ops.copy_page(cache, source, target)

    def step(self, rows: int, context: int) -> tuple[list[float], int]:
        """Seconds of each instruction, and bytes of the head that were not read."""
        last = np.full(rows, context, np.int32)
        table = self.pages[:rows, : context // PAGE_SIZE + 1].copy()
        slots = table[:, -1].astype(np.int64) * PAGE_SIZE + context % PAGE_SIZE
        batch = [KVGroupBatch(slots, table) for _ in self.groups]
        each = np.arange(rows + 1, dtype=np.int32)
        tokens = np.random.default_rng(0).integers(0, self.spec.vocab_size, rows).astype(np.int32)
        greedy = np.zeros(rows, SAMPLE)
        greedy["top_p"], greedy["slot"], greedy["choose"] = 1, -1, True
        ticket = self.program.submit(tokens, last, each, each[:-1], batch, greedy, timed=True)
        ticket.result()
        return ticket.seconds, ticket.spared_bytes


def measure_ops(
    model: str, rows: Sequence[int], context: int, reps: int, advance: Callable[[int, int], None], **settings: Any
) -> tuple[dict[str, Any], list[Profile]]:
    """The configuration, and a profile of one step of each size: medians of `reps`. ConfigError where a size is wrong
    or the native set is not there."""
    for name, value, most in (*(("rows", row, MAX_ROWS) for row in rows), ("context", context, MAX_CONTEXT)):
        if not 0 <= value <= most or (name == "rows" and value < 1):
            raise ConfigError(f"{name} must be from {int(name == 'rows')} to {most}, got {value}")
    opened = open_model(model)
    if context >= opened.spec.context_length:
        raise ConfigError(
            f"context {context} leaves no room in the model's {opened.spec.context_length} tokens; lower it"
        )
    bench = _Bench(opened, Settings(**settings), max(rows), context)
    weights = sum(instruction.weight_bytes for instruction in bench.program.instructions)
    profiles = []
    for index, count in enumerate(rows):
        steps = [bench.step(count, context) for _ in range(WARM_UP + reps)][WARM_UP:]
        ceilings = sample_ceilings(bench.ops.name, weights, bench.ops.threads)
        seconds, spared = zip(*steps, strict=True)
        each = [median(times) for times in zip(*seconds, strict=True)]
        lines = _lines(bench, count, context, each, int(median(spared)))
        profiles.append(Profile(count, context, median(map(sum, seconds)), lines, ceilings))
        advance(index + 1, len(rows))
    facts = machine_facts() | {"model": model, "kernels": bench.ops.name, "threads": bench.ops.threads, "reps": reps}
    return facts | {"kv_dtype": bench.resolved.kv_dtype, "activations": bench.resolved.activations}, profiles


def _lines(bench: _Bench, rows: int, context: int, seconds: Sequence[float], spared: int) -> tuple[Line, ...]:
    lines: dict[str, Line] = {}
    windows = iter([bench.spec.windows[layer] for layer in range(bench.spec.layers)])
    for instruction, time in zip(bench.program.instructions, seconds, strict=True):
        name, read, flops = instruction.kind, instruction.weight_bytes, 0
        if instruction.shapes:
            name = _shape_name(instruction)
            flops = 2 * rows * sum(out * columns for out, columns in instruction.shapes)
            read -= spared if instruction.kind == "head" else 0
        elif instruction.kind == "attention":
            window = next(windows)
            keys = min(context + 1, window or context + 1)
            per_key = kv_format(bench.resolved.kv_dtype).token_bytes(1, bench.spec.kv_heads, bench.spec.head_dim)
            read, flops = rows * keys * per_key, 4 * rows * keys * bench.spec.heads * bench.spec.head_dim
        old = lines.get(name, Line(name, 0, 0.0, 0, 0))
        lines[name] = Line(name, old.count + 1, old.seconds + time, old.bytes + read, old.flops + flops)
    return tuple(sorted(lines.values(), key=lambda line: -line.seconds))


def _shape_name(instruction: Instruction) -> str:
    outs = "+".join(str(out) for out, _ in instruction.shapes)
    return f"{instruction.kind} {instruction.shapes[0][1]} to {outs}"


def print_ops(facts: dict[str, Any], profiles: Sequence[Profile]) -> None:
    """A table for each step."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(
        f"{facts['model']} on {facts['cpu']}, op set {facts['kernels']}, {facts['threads']} threads, "
        f"keys and values {facts['kv_dtype']}, activations by {facts['activations']}"
    )
    for profile in profiles:
        top = profile.ceilings
        title = f"{profile.rows} rows after {profile.context} tokens: {profile.seconds * 1e3:.2f} ms; "
        title += f"ceilings {top.read:.0f} GB/s, {top.compute:,.0f} GOP/s ({top.arithmetic})"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for name in ("instruction", "times", "ms", "share", "GB/s", "of ceiling", "GOP/s", "of ceiling"):
            table.add_column(name, justify="left" if name == "instruction" else "right")
        for line in profile.lines:
            read, compute = line.bytes / line.seconds / 1e9, line.flops / line.seconds / 1e9
            rates = (f"{read:,.1f}", f"{read / top.read:.0%}", f"{compute:,.0f}", f"{compute / top.compute:.0%}")
            share = f"{line.seconds / profile.seconds:.0%}"
            table.add_row(line.name, str(line.count), f"{line.seconds * 1e3:.3f}", share, *rates)
        console.print(table)
