"""A model run by hand: chunks with page lists in, logits out. No scheduler, no runner."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headrace.formats.gguf import GGUFFile, open_gguf
from headrace.formats.safetensors import Checkpoint, open_checkpoint
from headrace.kernels.native import SAMPLE, Limits, NativeOps, logits_spec
from headrace.kernels.ops import Batch, KVGroupBatch, Ops
from headrace.kernels.reference import ReferenceOps
from headrace.model.decoder import Decoder
from headrace.model.families import read_spec
from headrace.model.spec import ModelSpec
from headrace.model.weights import load_weights

PAGE_SIZE = 16
PAGES = 33


@dataclass(frozen=True)
class Part:
    """Tokens of one sequence from position `start` on; `pages` are its pages from position 0 on, in every group."""

    tokens: Sequence[int]
    start: int = 0
    pages: Sequence[int] = tuple(range(1, PAGES))


def open_model(path: Path) -> GGUFFile | Checkpoint:
    return open_checkpoint(path) if path.is_dir() else open_gguf(path)


def make_batch(parts: Sequence[Part], groups: int = 1, page_size: int = PAGE_SIZE) -> Batch:
    """The parts as one batch, logits wanted of every row."""
    chunk_rows = np.cumsum([0, *(len(part.tokens) for part in parts)]).astype(np.int32)
    positions = [np.arange(part.start, part.start + len(part.tokens), dtype=np.int32) for part in parts]
    table = np.zeros((len(parts), max(len(part.pages) for part in parts)), np.int32)
    slots = []
    for row, part, at in zip(table, parts, positions, strict=True):
        row[: len(part.pages)] = part.pages
        slots.append(row[at // page_size].astype(np.int64) * page_size + at % page_size)
    return Batch(
        tokens=np.concatenate([np.asarray(part.tokens, np.int32) for part in parts]),
        positions=np.concatenate(positions),
        chunk_rows=chunk_rows,
        logit_rows=np.arange(chunk_rows[-1], dtype=np.int32),
        groups=(KVGroupBatch(np.concatenate(slots), table),) * groups,
    )


class Model:
    """An opened model, packed into an op set, with fresh KV pools."""

    def __init__(
        self,
        source: GGUFFile | Checkpoint | Path,
        spec: ModelSpec | None = None,
        ops: Ops | None = None,
        kv_dtype: str = "float32",
        layers: range | None = None,
        pages: int = PAGES,
        context: int | None = None,
    ) -> None:
        source = open_model(source) if isinstance(source, Path) else source
        self.ops = ops or ReferenceOps()
        self.spec = spec or read_spec(source)
        layers = layers or range(self.spec.layers)
        self.decoder = Decoder(self.spec, load_weights(source, self.spec, self.ops, layers), layers, context)
        self.caches = [
            self.ops.kv_cache(len(group.layers), pages, PAGE_SIZE, self.spec.kv_heads, self.spec.head_dim, kv_dtype)
            for group in self.decoder.kv_groups
        ]

    def run(self, *parts: Part, hidden: np.ndarray | None = None) -> np.ndarray:
        """One step: logits (or hidden) of all the parts' rows."""
        batch = make_batch(parts, len(self.caches))
        batch.hidden = hidden
        return self.decoder.forward(self.ops, batch, self.caches)

    def logits(self, tokens: Sequence[int], chunk: int = 1 << 30, pages: Sequence[int] = Part.pages) -> np.ndarray:
        """A sequence from position 0 on, `chunk` tokens a step: float32 [tokens, vocab]."""
        steps = range(0, len(tokens), chunk)
        return np.concatenate([self.run(Part(tokens[start : start + chunk], start, pages)) for start in steps])


class NativeModel(Model):
    """The same with the native op set: float32 weights as they are, keys and values as `kv_dtype`."""

    def __init__(self, source: GGUFFile | Checkpoint | Path, ops: NativeOps, context: int | None = None) -> None:
        super().__init__(source, ops=ops, context=context)
        pages = (len(Part.pages),) * len(self.caches)
        limits = Limits(rows=128, logits=128, chunks=16, sequences=1, pages=pages)
        self.program = ops.capture(lambda batch: self.decoder.forward(ops, batch, self.caches), limits)

    def run(self, *parts: Part, hidden: np.ndarray | None = None) -> np.ndarray:
        batch = make_batch(parts, len(self.caches))
        samples = np.array([logits_spec()] * len(batch.logit_rows), SAMPLE)
        arrays = (batch.tokens, batch.positions, batch.chunk_rows, batch.logit_rows, batch.groups, samples)
        return self.program.submit(*arrays).result()[1].copy()


def perturbed(spec: ModelSpec, field: str, change: Callable) -> ModelSpec:
    """The spec with a field changed: its own, or one of its experts' ("experts.count") or of all ropes ("rope.theta")
    or of local layers' ("local.theta")."""
    owner, _, leaf = field.rpartition(".")
    if owner in ("rope", "local"):
        ropes = (
            rope and dataclasses.replace(rope, **{leaf: change(getattr(rope, leaf))})
            if owner == "rope" or window is not None
            else rope
            for rope, window in zip(spec.ropes, spec.windows, strict=True)
        )
        return dataclasses.replace(spec, ropes=tuple(ropes))
    whole: Any = spec.experts if owner else spec
    changed = dataclasses.replace(whole, **{leaf: change(getattr(whole, leaf))})
    return dataclasses.replace(spec, experts=changed) if owner else changed


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()
