"""Fixtures of more than one room."""

from __future__ import annotations

from pathlib import Path

import pytest

from headrace.formats import hub


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file, pulled once into the cache."""
    return hub.pull(hub.DEFAULT_MODEL, progress=False)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, pulled once into the cache."""
    return hub.pull("minilm", progress=False)
