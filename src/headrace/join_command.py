"""`headrace worker`: keeps processes that join a coordinator, and starts a new one when one ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from types import FrameType

from .errors import ConfigError
from .guest_process import FAILED
from .parallel.joining import parse_address, read_secret
from .plan.plan import HOST_NAME
from .workers.crew import environment

MAX_WORKERS = 64
LOOK_SECONDS = 0.1
END_SECONDS = 5.0
SHORT_LIFE = 5.0  # seconds: a process that lived shorter is started anew with growing pauses
PAUSES = (0.0, 0.2, 0.5, 1.0, 2.0)
FAILED_PAUSE = 5.0  # after one that could not load its part


@dataclass
class _Place:
    """One worker: the process that is there now, or when there is to be another."""

    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    due: float = 0.0
    short_lives: int = 0

    def ended(self, code: int, now: float) -> None:
        self.process = None
        self.short_lives = self.short_lives + 1 if now < self.began + SHORT_LIFE else 0
        pause = FAILED_PAUSE if code == FAILED else PAUSES[min(self.short_lives, len(PAUSES) - 1)]
        self.due = now + pause


class _Ended(Exception):
    """SIGTERM."""


def stay(join: str, secret_file: str, name: str | None, workers: int, model_dir: str | None, once: bool) -> int:
    """Keep workers until SIGTERM or Ctrl-C; with `once` until each has been a rank once. Returns the exit code.
    ConfigError where something is wrong from the start."""
    parse_address(join, "--join")
    read_secret(secret_file)
    name = name or re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()) or "worker"
    if not HOST_NAME.fullmatch(name):
        raise ConfigError(f"--name must be 1 to 253 letters, digits, '.', '_' and '-', got {name!r:.80}")
    if not 1 <= workers <= MAX_WORKERS:
        raise ConfigError(f"--workers must be from 1 to {MAX_WORKERS}, got {workers}")
    if model_dir is not None and not os.path.isdir(model_dir):
        raise ConfigError(f"--model-dir {model_dir} is no folder; give the one that holds the models")
    command = [sys.executable, "-m", f"{__package__}.guest_process", join, secret_file, name, model_dir or ""]
    places = [_Place() for _ in range(workers)]
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _keep(places, command, once)
    except (KeyboardInterrupt, _Ended):
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)
        _end(places)


def _keep(places: list[_Place], command: list[str], once: bool) -> int:
    code = 0
    while places:
        now = time.monotonic()
        for place in list(places):
            if place.process is None and now >= place.due:
                place.began = now
                place.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment())
            elif place.process is not None and (ended := place.process.poll()) is not None:
                place.ended(ended, now)
                if once:
                    code = max(code, int(ended != 0))
                    places.remove(place)
                else:
                    print(f"headrace worker: {_how(ended)}; joining again", file=sys.stderr, flush=True)
        time.sleep(LOOK_SECONDS)
    return code


def _how(code: int) -> str:
    if code == 0:
        return "the coordinator has ended"
    if code == FAILED:
        return "the rank could not start"
    return f"a process was ended by {signal.Signals(-code).name}" if code < 0 else "the coordinator is out of reach"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise _Ended


def _end(places: list[_Place]) -> None:
    processes = [place.process for place in places if place.process is not None]
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + END_SECONDS
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        process.kill()
        process.wait()
