"""Op sets: the table (`ops.py`), its plain twin in numpy (`reference.py`) and the native set."""

from __future__ import annotations

import warnings

from ..errors import ConfigError
from . import native
from .native import NativeOps
from .ops import Group
from .reference import ReferenceOps


def choose_ops(
    kernels: str, threads: int, activations: str = "group", group: Group | None = None
) -> NativeOps | ReferenceOps:
    """The op set for a setting of `kernels`: "auto" is native where that was built; otherwise a warning says what
    is missing. `group`: the ranks that hold the model between them, where this is one of several.

    Raises ConfigError where "native", or `activations` that only it has, are asked for and not there.
    """
    reason = native.missing()
    if kernels == "reference" or (kernels == "auto" and reason is not None):
        if kernels == "auto":
            warnings.warn(
                f"running the numpy op set, many times slower: the native kernels are missing ({reason}); "
                "reinstall with a C++ compiler",
                stacklevel=2,
            )
        if activations != "group":
            raise ConfigError(f"activations {activations!r} need the native op set; leave them out or use that")
        return ReferenceOps(threads, group)
    return NativeOps(threads, per_row=activations == "row", group=group)
