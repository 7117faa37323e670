"""Fixtures of more than one room."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.tiny import write_tiny

from headrace.formats import hub

# Shells start what they leave in the background with Ctrl-C ignored, which the commands that tests start would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The default model's GGUF file, pulled once into the cache."""
    return hub.pull(hub.DEFAULT_MODEL, progress=False)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, pulled once into the cache."""
    return hub.pull("minilm", progress=False)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's GGUF file, another for each module."""
    return str(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))
