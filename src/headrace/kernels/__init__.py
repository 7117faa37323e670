"""Op sets: the table (`ops.py`), its plain twin in numpy (`reference.py`) and the native set."""

from __future__ import annotations

from .reference import ReferenceOps


def choose_ops(kernels: str, threads: int) -> ReferenceOps:
    """The op set for a setting of `kernels`: "auto", "native" or "reference"."""
    return ReferenceOps(threads)
