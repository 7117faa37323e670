"""Other engines beside ours, in the same run: each in its own process, under its own Python, asked a test at a time."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import ConfigError, HeadraceError

# The scripts of the peers that generate, and of those that embed.
GENERATORS = {
    "llama.cpp": "llama_cpp_peer.py",
    "openvino": "openvino_peer.py",
    "transformers": "transformers_peer.py",
    "vllm": "vllm_peer.py",
}
EMBEDDERS = {
    "openvino": "openvino_embed_peer.py",
    "sentence-transformers": "sentence_transformers_peer.py",
}
PEERS = Path(__file__).parent / "peers"
DEFAULT_FOLDER = "~/.cache/headrace-peers"
LOAD_SECONDS = 300.0
TEST_SECONDS = 600.0
SETTLE_SECONDS = 0.03  # OpenMP's threads spin for some 10 ms after their work, on cores that the next engine needs


@dataclass(frozen=True)
class PeerRun:
    """One measurement of another engine."""

    engine: str
    test: str
    rate: float  # tokens per second

    def as_dict(self) -> dict[str, float | str]:
        return {"engine": self.engine, "test": self.test, "tokens_per_second": self.rate}


class Peer:
    """Another engine with a model loaded. It sleeps between tests."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self._process = name, process

    def run(self, test: str) -> PeerRun:
        """Run one test, and let the peer's threads fall asleep. HeadraceError where it fails or takes too long."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(test + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise HeadraceError(f"{self.name} has died; run it alone to see why") from None
        answer = self.read(TEST_SECONDS)
        time.sleep(SETTLE_SECONDS)
        return PeerRun(self.name, test, float(answer["tokens_per_second"]))

    def read(self, seconds: float) -> dict[str, float]:
        """The next answer."""
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if readable else ""
        if not line:
            what = "died" if readable else f"gave no answer in {seconds:.0f} s"
            raise HeadraceError(f"{self.name} {what}; run its script under its Python to see why")
        return json.loads(line)


def peers_folder(folder: str | None) -> Path:
    """Where the peers' environments are: FOLDER/<peer>/bin/python."""
    return Path(folder or os.environ.get("HEADRACE_PEERS", DEFAULT_FOLDER)).expanduser()


def peer_models(names: Sequence[str], chosen: Sequence[str], default: Path) -> dict[str, str]:
    """The model of each peer: of `chosen`, entries "PEER=PATH", or the default. ConfigError for a malformed entry."""
    models = dict.fromkeys(names, str(default))
    for entry in chosen:
        name, _, path = entry.partition("=")
        if name not in models or not path or not Path(path).exists():
            raise ConfigError(
                f"--peer-model {entry!r:.200} must be PEER=PATH, of a peer in --against and a path that exists"
            )
        models[name] = path
    return models


@contextmanager
def started(
    names: Sequence[str],
    folder: Path,
    models: Mapping[str, str],
    threads: int,
    scripts: Mapping[str, str] = GENERATORS,
) -> Iterator[list[Peer]]:
    """The named peers, each with its model loaded; `models` maps a peer's name to a path, and `scripts` to its script,
    a file of peers/ or a path. They end with the context.

    Raises ConfigError for a name that is unknown, and for a peer that has no environment in `folder`.
    """
    for name in names:
        if name not in scripts:
            raise ConfigError(f"unknown peer {name!r}; known are {', '.join(scripts)}")
        if not (folder / name / "bin" / "python").exists():
            raise ConfigError(f"{name} has no environment at {folder / name}; make one there, or name another folder")
    with ExitStack() as stack:
        log = stack.enter_context(open(os.devnull, "w"))
        peers = []
        for name in names:
            command = [str(folder / name / "bin" / "python"), str(PEERS / scripts[name]), models[name], str(threads)]
            peer = Peer(name, stack.enter_context(_process(command, log)))
            peer.read(LOAD_SECONDS)
            peers.append(peer)
        yield peers


@contextmanager
def _process(command: Sequence[str], log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    ours = ("PYTHONPATH", "OPENBLAS_NUM_THREADS")  # the latter is set by our command line
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
