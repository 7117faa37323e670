"""Both ends of a channel in one process, or one of them in another."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.parallel.channel import Edge, Receiver, Sender, open_receiver, open_sender
from headrace.parallel.shm import ShmEdge
from headrace.parallel.tcp import TcpListener, connect

SECRET = b"only for the tests of channels"
PACKAGE = Path(headrace.__file__).resolve().parent

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the gloo transport needs torch")
all_transports = pytest.mark.parametrize("transport", ["shm", "tcp", pytest.param("gloo", marks=needs_torch)])


def edge_of(max_bytes: int = 4096, messages: int = 3, timeout: float = 20.0) -> Edge:
    return Edge("first to second", max_bytes, messages, timeout)


def wheres(stack: ExitStack, transport: str, label: str, ours: ShmEdge | None) -> tuple[Any, Any]:
    """What the two ends of a new channel in this process are opened with."""
    if ours is not None:
        return ours.fds.duplicate(), ours.fds.duplicate()
    if transport == "gloo":
        listening = socket.create_server(("127.0.0.1", 0))
        return listening, listening.getsockname()
    listener = TcpListener("127.0.0.1")
    stack.callback(listener.close)
    found: list[socket.socket] = []
    other = threading.Thread(target=lambda: found.append(connect(listener.address, SECRET, label, 20)))
    other.start()
    accepted = listener.accept(SECRET, label, 20)
    other.join()
    return accepted, found[0]


@contextmanager
def pair(transport: str, edge: Edge, receivers: Edge | None = None) -> Iterator[tuple[Sender, Receiver]]:
    """Both ends of a channel in this process; the receiver's edge may be another."""
    with ExitStack() as stack:
        ours = None
        if transport == "shm":
            ours = ShmEdge.create(edge.max_bytes, edge.messages)
            stack.callback(ours.close)
        one, two = wheres(stack, transport, edge.name, ours)
        ends: dict[str, Any] = {}

        def receive() -> None:
            try:
                ends["receiver"] = open_receiver(transport, two, receivers or edge)
            except Exception as error:
                ends["error"] = error

        other = threading.Thread(target=receive)  # an end of gloo's waits for the other
        other.start()
        try:
            sender = open_sender(transport, one, edge)
            stack.callback(sender.close)
        finally:
            other.join()
        if "error" in ends:
            raise ends["error"]
        stack.callback(ends["receiver"].close)
        yield sender, ends["receiver"]


class Peer:
    """A process with the other end of a channel, and this process's end."""

    def __init__(self, stack: ExitStack, transport: str, role: str, edge: Edge) -> None:
        self.shm: ShmEdge | None = None
        spec: dict[str, Any] = {"transport": transport, "role": role, "edge": asdict(edge)}
        fds: tuple[int, ...] = ()
        ours: Any
        if transport == "shm":
            self.shm = ShmEdge.create(edge.max_bytes, edge.messages)
            stack.callback(self.shm.close)
            ours = self.shm.fds.duplicate()
            spec["where"] = fds = tuple(self.shm.fds)
        elif transport == "tcp":
            listener = TcpListener("127.0.0.1")
            stack.callback(listener.close)
            spec |= {"where": listener.address, "secret": SECRET.hex()}
        else:
            ours = socket.create_server(("127.0.0.1", 0))
            spec["where"] = ours.getsockname()
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("channel_peer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            text=True,
            env=os.environ | {"PYTHONPATH": str(PACKAGE.parent)},
        )
        stack.callback(self._end)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(spec))
        self.process.stdin.close()
        if transport == "tcp":
            ours = listener.accept(SECRET, edge.name, 20)
        self.end = (open_receiver if role == "sender" else open_sender)(transport, ours, edge)
        stack.callback(self.end.close)
        assert self.line() == "open"

    def line(self) -> str:
        """The next that it prints, or "" where it has ended."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        """End it as a crash does, and say so to those who cannot notice, as its supervisor would."""
        self.process.kill()
        self.process.wait()
        if self.shm is not None:
            self.shm.abandon()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@contextmanager
def peer(transport: str, role: str, edge: Edge) -> Iterator[Peer]:
    """A process with the end of this role ("sender" or "receiver")."""
    with ExitStack() as stack:
        yield Peer(stack, transport, role, edge)
