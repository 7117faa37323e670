"""Headrace runs language models: one small engine whose output does not depend on what else is in the batch.

Names are imported when they are first used, so that `import headrace` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .async_llm import AsyncLLM
    from .completion import Output
    from .errors import HeadraceError
    from .llm import LLM
    from .types import GrammarSpec, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "Output": "completion",
    "SamplingParams": "types",
    "GrammarSpec": "types",
    "HeadraceError": "errors",
}

__all__ = ["LLM", "AsyncLLM", "Output", "SamplingParams", "GrammarSpec", "HeadraceError", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'headrace' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
