"""The tiny models, saved once, and what transformers makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from .family_models import save_family, write_family_gguf
from .tiny_models import save_model, transformers_logits, write_gguf

TOKENS = np.random.default_rng(7).integers(0, 97, 60).tolist()


@dataclass(frozen=True)
class Tiny:
    """One tiny model: a Hugging Face folder, transformers' logits of TOKENS on it, and its weights."""

    folder: Path
    logits: np.ndarray

    def gguf(self) -> Path:
        from safetensors.numpy import load_file

        config = json.loads((self.folder / "config.json").read_text())
        path = self.folder / "model.gguf"
        return path if path.exists() else write_gguf(path, config, load_file(self.folder / "model.safetensors"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """A tiny model by its name in CONFIGS."""
    pytest.importorskip("transformers")

    @cache
    def get(name: str) -> Tiny:
        folder = save_model(name, tmp_path_factory.mktemp(name))
        return Tiny(folder, transformers_logits(folder, TOKENS))

    return get


@dataclass(frozen=True)
class Saved:
    """A tiny model's folder, and transformers' logits of TOKENS."""

    name: str
    folder: Path
    logits: np.ndarray

    def gguf(self) -> Path:
        path = self.folder / "model.gguf"
        if not path.exists():
            from safetensors.numpy import load_file

            config = json.loads((self.folder / "config.json").read_text())
            write_family_gguf(self.name, config, load_file(self.folder / "model.safetensors"), path)
        return path


Families = Callable[[str], Saved]


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Families:
    pytest.importorskip("transformers")

    @cache
    def get(name: str) -> Saved:
        folder = tmp_path_factory.mktemp(name)
        return Saved(name, folder, save_family(name, folder, TOKENS))

    return get
