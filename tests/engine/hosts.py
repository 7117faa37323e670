"""Coordinators and workers in processes of their own, also in network namespaces, for tests of several hosts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from queue import Empty, Queue
from typing import Any

DRIVER = Path(__file__).with_name("host_driver.py")
PATIENCE = 40.0
TOKEN = "HEADRACE_TEST_HOSTS"


class Process:
    """A process whose lines can be waited for. It is killed with the block, and so is what it left behind."""

    def __init__(self, command: list[str], token: str) -> None:
        self._lines: Queue[tuple[str, str]] = Queue()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, TOKEN: token},
        )
        self.said: list[str] = []
        for name in ("stdout", "stderr"):
            threading.Thread(target=self._read, args=(name,), daemon=True).start()

    def _read(self, name: str) -> None:
        for line in getattr(self.process, name):
            self._lines.put((name, line))
        self._lines.put((name, ""))

    def wait_for(self, pattern: str, stream: str = "stderr") -> re.Match[str]:
        """The next line of a stream that matches. AssertionError with all that was said where none comes."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                name, line = self._lines.get(timeout=max(0.0, end - time.monotonic()))
            except Empty:
                raise AssertionError(f"no line like {pattern!r} within {PATIENCE} s, but {self.said}") from None
            self.said.append(line)
            if name == stream and not line:
                raise AssertionError(f"ended without a line like {pattern!r}: {''.join(self.said)}")
            if name == stream and (match := re.search(pattern, line)):
                return match

    def lines(self) -> list[str]:
        """All that it said until now."""
        while not self._lines.empty():
            self.said.append(self._lines.get()[1])
        return self.said

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()


class Coordinator(Process):
    """host_driver.py: `ready` waits until it has started."""

    def ready(self) -> str:
        return json.loads(self.wait_for(r'^\{"ready"', "stdout").string)["ready"]

    def obey(self, **order: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.wait_for(r"^\{", "stdout").string)


class Hosts:
    """Starts processes, and sees at the end that none is left."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self._stack, self.token = stack, uuid.uuid4().hex
        self.secret = folder / "secret"
        self.secret.touch(mode=0o600)
        self.secret.write_text(uuid.uuid4().hex)

    def coordinator(
        self, model: Path, plan: str, listen: str | None = "127.0.0.1:0", before: tuple[str, ...] = (), **settings: Any
    ) -> Coordinator:
        values = {"model": str(model), "plan": plan, "listen": listen, "secret_file": str(self.secret)} | settings
        command = [*before, sys.executable, str(DRIVER), json.dumps(values)]
        return self._started(Coordinator(command, self.token))

    def worker(
        self, address: str, name: str, *more: str, before: tuple[str, ...] = (), secret: Path | None = None
    ) -> Process:
        command = [*before, sys.executable, "-m", "headrace", "worker", "--join", address, "--name", name]
        return self._started(Process([*command, "--secret-file", str(secret or self.secret), *more], self.token))

    def _started(self, process: Any) -> Any:
        self._stack.callback(process.end)
        return process

    def left(self) -> list[int]:
        """Processes that were started in this block and are there."""
        mark, found = f"{TOKEN}={self.token}".encode(), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                pass  # it has just ended
        return found

    def wait_until_none_is_left(self, seconds: float = 10.0) -> None:
        end = time.monotonic() + seconds
        while left := self.left():
            assert time.monotonic() < end, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
            time.sleep(0.05)


@contextmanager
def hosts(folder: Path) -> Iterator[Hosts]:
    with ExitStack() as stack:
        started = Hosts(stack, folder)
        try:
            yield started
            stack.close()
            started.wait_until_none_is_left()
        finally:
            for pid in started.left():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


# -- network namespaces ------------------------------------------------------------------------------------------------


def why_no_namespaces() -> str | None:
    """Why this machine cannot make network namespaces; None where it can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and iproute2"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"hr{uuid.uuid4().hex[:8]}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode == 0:
        linked = subprocess.run(
            ["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"],
            capture_output=True,
            text=True,
        )
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
        return f"no veth: {linked.stderr.strip()}" if linked.returncode else None
    return f"no network namespaces: {made.stderr.strip()}"


class Network:
    """A namespace for the coordinator, at 10.77.N.1 towards host N, which is at 10.77.N.2; it forwards between them."""

    def __init__(self, hosts: int) -> None:
        self._id = uuid.uuid4().hex[:6]
        self.names = [f"hr{self._id}n{number}" for number in range(hosts + 1)]

    def make(self) -> None:
        for name in self.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        for number, name in enumerate(self.names[1:], 1):
            _ip("-n", self.names[0], "link", "add", f"v{number}", "type", "veth", "peer", "name", "w", "netns", name)
            for space, link, end in ((self.names[0], f"v{number}", 1), (name, "w", 2)):
                _ip("-n", space, "addr", "add", f"10.77.{number}.{end}/24", "dev", link)
                _ip("-n", space, "link", "set", link, "up")
            _ip("-n", name, "route", "add", "default", "via", f"10.77.{number}.1")
        forward = "echo 1 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run([*self.inside(0), "sh", "-c", forward], check=True, capture_output=True)

    def inside(self, number: int) -> tuple[str, ...]:
        """What to put before a command that is to run on a host; 0 is the coordinator's."""
        return ("ip", "netns", "exec", self.names[number])

    def link(self, number: int, state: str) -> list[str]:
        """The command that sets the coordinator's link to a host "down" or "up"; to be run on the coordinator's."""
        return ["ip", "link", "set", f"v{number}", state]

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def network(hosts: int) -> Iterator[Network]:
    made = Network(hosts)
    try:
        made.make()
        yield made
    finally:
        made.remove()
