"""Small programs of the native op set, for tests: a model of a few ops, run on given rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from headrace.formats.tensor import F32, Tensor
from headrace.kernels.native import SAMPLE, Limits, NativeOps, NativeProgram
from headrace.kernels.ops import Array, Batch, KVGroupBatch

LIMITS = Limits(rows=512, logits=512, chunks=64, sequences=64, pages=(64,))


def tensor(values: np.ndarray) -> Tensor:
    """Values as a float32 tensor of a file."""
    values = np.ascontiguousarray(values, np.float32)
    return Tensor("w", values.shape, F32, values.view(np.uint8).reshape(-1), Path("test"))


def columns(ops: Any, x: Array, first: int, past: int, width: int) -> Array:
    """Columns first..past-1 of x [rows, width], as a product with ones and zeros: exact."""
    return ops.linear(x, ops.pack(tensor(np.eye(width, dtype=np.float32)[first:past])))


def one_chunk(rows: int, start: int = 0) -> dict[str, np.ndarray]:
    return {
        "tokens": np.zeros(0, np.int32),
        "positions": np.arange(start, start + rows, dtype=np.int32),
        "chunk_rows": np.array([0, rows], np.int32),
        "logit_rows": np.zeros(0, np.int32),
    }


def no_samples(n: int) -> np.ndarray:
    samples = np.zeros(n, SAMPLE)
    samples["slot"], samples["top_p"] = -1, 1
    return samples


def run(
    program: NativeProgram, batch: dict[str, Any], hidden: np.ndarray, groups: Sequence[KVGroupBatch] = ()
) -> np.ndarray:
    """The output's rows for a step of a program that starts with `hidden` and does not end in logits."""
    ticket = program.submit(**batch, groups=groups, samples=no_samples(len(batch["logit_rows"])), hidden=hidden)
    return ticket.result()[1].copy()


def once(ops: NativeOps, model: Callable[[Batch], Array], hidden: np.ndarray, **changes: np.ndarray) -> np.ndarray:
    """A model without pages, run on rows of `hidden` after a step of NaNs has been through its buffers."""
    limits = Limits(rows=512, logits=512, chunks=64, sequences=64, pages=())
    program = ops.capture(model, limits, hidden=hidden.shape[1])
    batch = one_chunk(len(hidden)) | changes
    run(program, batch, np.full_like(hidden, np.nan))
    return run(program, batch, hidden)
