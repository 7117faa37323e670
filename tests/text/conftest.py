"""The default model's tokenizer, and transformers' reading of the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from headrace.formats.gguf import open_gguf
from headrace.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def smollm2_tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer.from_gguf(open_gguf(smollm2).metadata, smollm2)


@pytest.fixture(scope="session")
def transformers_smollm2(smollm2: Path) -> Any:
    """transformers' tokenizer of the same GGUF file (it keeps GPT-2's cut, whatever tokenizer.ggml.pre says)."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(str(smollm2.parent), gguf_file=smollm2.name)
