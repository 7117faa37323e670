"""Servers that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.serve.harness import ServerProcess
from tests.tiny import write_tiny

from headrace import LLM


@pytest.fixture(scope="session")
def server(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The real model."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with ServerProcess(f"smol={smollm2}", "--threads", "2", log=log) as server:
        yield server


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random model of 259 tokens and a context of 512: a step takes a tenth of a millisecond."""
    return str(write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture(scope="session")
def tiny_server(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Small limits, so that tests reach them."""
    log = tmp_path_factory.mktemp("serve") / "log"
    flags = ["--threads", "1", "--max-sequences", "4", "--max-queue", "8", "--kv-memory", "3000000"]
    flags += ["--header-timeout", "1", "--body-timeout", "1", "--write-timeout", "2", "--max-body-bytes", "200000"]
    flags += ["--keep-alive-comment", "1"]
    with ServerProcess(f"tiny={tiny_model}", *flags, log=log) as server:
        yield server


@pytest.fixture(scope="session")
def offline(smollm2: Path) -> Iterator[LLM]:
    """What a quiet run says, in this process."""
    with LLM(str(smollm2), threads=1) as llm:
        yield llm
