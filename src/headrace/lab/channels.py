"""What a hop between two processes costs by each transport, beside a plain copy of the same bytes.

The other process is this module run as a program: it sends back what is tagged ECHO, reads what is tagged KEEP, and
answers an ANSWER with an empty message.
"""

from __future__ import annotations

import json
import re
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import ChannelError, ConfigError, RequestError
from ..parallel.channel import (
    MAX_MESSAGE_BYTES,
    TRANSPORTS,
    Edge,
    Receiver,
    Sender,
    open_receiver,
    open_sender,
)
from ..processes import die_with_parent
from ..results import machine_facts, summarize_tests, write_results

METRICS = {"latency_s": "latency_s", "gb_per_s": "gb_per_sec", "burst_gb_per_s": "burst_gb_per_sec"}
MESSAGES = 4  # unread at most, on each edge
ECHO, KEEP, ANSWER = range(3)
PATIENCE = 60.0  # seconds for an answer
_HOPS_BYTES, _MIN_HOPS, _MAX_HOPS = 64 << 20, 10, 200  # sent in one measurement, there and back
_BURST_BYTES, _MIN_BURST, _MAX_BURST = 64 << 20, 16, 1000


def parse_sizes(text: str) -> list[int]:
    """Bytes, comma-separated, as in 1k,64k,16M (1k is 1024). ConfigError for anything else."""
    sizes = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{1,10})([kM]?)", word.strip())
        size = int(match[1]) << {"": 0, "k": 10, "M": 20}[match[2]] if match else 0
        if not 1 <= size <= MAX_MESSAGE_BYTES:
            raise ConfigError(
                f"{word!r:.40} is not a size of 1 to {MAX_MESSAGE_BYTES} bytes; write them as in 1k,64k,16M"
            )
        sizes.append(size)
    return sizes


def measure_channels(
    sizes: Sequence[int], reps: int, advance: Callable[[int, int], None], transports: Sequence[str] = TRANSPORTS
) -> dict[str, Any]:
    """`reps` runs, after one to warm up, of each transport that is there and each size, in turn, so that all meet the
    machine in the same mood.

    A dict of the results schema. latency_s: half of a message's way there and back, from `send` to the other process's
    `receive`, median of a run; gb_per_s: of one such hop; burst_gb_per_s: of many messages one way, with at most
    MESSAGES of them unread. Test "copy": what numpy takes to copy the bytes within a process.
    """
    missing: dict[str, str] = {}
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        pairs: dict[str, _Pair] = {}
        for transport in transports:
            try:
                pairs[transport] = stack.enter_context(_pair(transport, max(sizes)))
            except ConfigError as error:
                missing[transport] = str(error)
        for rep in range(-1, reps):
            for index, size in enumerate(sizes):
                payload = np.random.default_rng(size).integers(0, 256, size, np.uint8)
                rows = [
                    {**_row(transport, size, pair.hop(payload)), "burst_gb_per_s": pair.burst(payload)}
                    for transport, pair in pairs.items()
                ]
                rows.append(_row("copy", size, _copy_seconds(payload)))
                if rep >= 0:  # before that memory is touched for the first time
                    runs += rows
                advance((rep + 1) * len(sizes) + index + 1, (reps + 1) * len(sizes))
    config = {"machine": machine_facts(), "sizes": list(sizes), "reps": reps, "messages": MESSAGES, "missing": missing}
    return {"config": config, "runs": runs, "summary": summarize_tests(runs, METRICS)}


def write_channels(report: dict[str, Any], path: Path) -> None:
    """Write the results file. ResultsError or RequestError where that fails."""
    try:
        write_results(path, report["config"], report["runs"], report["summary"])
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def _row(transport: str, size: int, seconds: float) -> dict[str, Any]:
    return {
        "test": f"{transport} {size}",
        "transport": transport,
        "bytes": size,
        "latency_s": seconds,
        "gb_per_s": size / seconds / 1e9,
    }


class _Pair:
    """This end of two channels, to another process and back."""

    def __init__(self, there: Sender, back: Receiver) -> None:
        self._there, self._back = there, back

    def hop(self, payload: np.ndarray) -> float:
        """Seconds of a message's way to the other process: median of several."""
        count = min(max(_HOPS_BYTES // len(payload), _MIN_HOPS), _MAX_HOPS)
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            self._there.send(ECHO, payload)
            number, echo = self._answer()
            seconds.append((time.perf_counter() - started) / 2)
        if number != ECHO or not np.array_equal(echo, payload):
            raise ChannelError("what came back is not what was sent: the channel is broken, and so is its measurement")
        return median(seconds)

    def burst(self, payload: np.ndarray) -> float:
        """GB/s of messages one way, until the last is read."""
        count = min(max(_BURST_BYTES // len(payload), _MIN_BURST), _MAX_BURST)
        started = time.perf_counter()
        for index in range(count):
            self._there.send(ANSWER if index == count - 1 else KEEP, payload)
        self._answer()
        return count * len(payload) / (time.perf_counter() - started) / 1e9

    def _answer(self) -> tuple[int, np.ndarray]:
        answer = self._back.receive(PATIENCE)
        if answer is None:
            raise ChannelError(f"the other process gave no answer within {PATIENCE:g} s; run the bench again")
        return answer


def _copy_seconds(payload: np.ndarray) -> float:
    target = np.empty_like(payload)
    count = min(max(_HOPS_BYTES // len(payload), _MIN_HOPS), _MAX_HOPS)
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        np.copyto(target, payload)
        seconds.append(time.perf_counter() - started)
    return median(seconds)


@contextmanager
def _pair(transport: str, max_bytes: int) -> Iterator[_Pair]:
    """Channels to a process of their own and back. ConfigError where the transport is not there."""
    there, back = (Edge(f"{transport} {way}", max_bytes, MESSAGES, PATIENCE) for way in ("there", "back"))
    with ExitStack() as stack:
        sender, receiver = {"shm": _open_shm, "tcp": _open_tcp, "gloo": _open_gloo}[transport](stack, there, back)
        stack.callback(receiver.close)
        stack.callback(sender.close)
        yield _Pair(sender, receiver)


def _start(
    stack: ExitStack, transport: str, there: Edge, back: Edge, where: dict[str, Any], fds: Sequence[int]
) -> None:
    """Start the other process, which ends when its channels do."""
    process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, pass_fds=fds, text=True)
    stack.callback(_end, process)
    spec = {"transport": transport, "max_bytes": there.max_bytes, "names": [there.name, back.name], **where}
    assert process.stdin is not None
    process.stdin.write(json.dumps(spec))
    process.stdin.close()


def _end(process: subprocess.Popen[str]) -> None:
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _open_shm(stack: ExitStack, there: Edge, back: Edge) -> tuple[Sender, Receiver]:
    from ..parallel.shm import ShmEdge

    edges = [ShmEdge.create(edge.max_bytes, edge.messages) for edge in (there, back)]
    fds = [list(edge.fds) for edge in edges]
    _start(stack, "shm", there, back, {"there": fds[0], "back": fds[1]}, [*fds[0], *fds[1]])
    return open_sender("shm", edges[0].fds, there), open_receiver("shm", edges[1].fds, back)


def _open_tcp(stack: ExitStack, there: Edge, back: Edge) -> tuple[Sender, Receiver]:
    from ..parallel.tcp import TcpListener

    secret = secrets.token_bytes(32)
    listener = TcpListener("127.0.0.1")
    stack.callback(listener.close)
    _start(stack, "tcp", there, back, {"address": listener.address, "secret": secret.hex()}, ())
    sender = open_sender("tcp", listener.accept(secret, there.name, PATIENCE), there)
    return sender, open_receiver("tcp", listener.accept(secret, back.name, PATIENCE), back)


def _open_gloo(stack: ExitStack, there: Edge, back: Edge) -> tuple[Sender, Receiver]:
    from ..parallel.gloo import load_torch

    load_torch()
    ours = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    addresses = [one.getsockname() for one in ours]
    _start(stack, "gloo", there, back, {"there": addresses[0], "back": addresses[1]}, ())
    return open_sender("gloo", ours[0], there), open_receiver("gloo", ours[1], back)


def main() -> None:
    """The other process: its channels as JSON on standard input."""
    die_with_parent()
    spec = json.load(sys.stdin)
    there, back = (Edge(name, spec["max_bytes"], MESSAGES, PATIENCE) for name in spec["names"])
    if spec["transport"] == "tcp":
        from ..parallel.tcp import connect

        address, secret = tuple(spec["address"]), bytes.fromhex(spec["secret"])
        wheres = [connect(address, secret, edge.name, PATIENCE) for edge in (there, back)]
    elif spec["transport"] == "shm":
        from ..parallel.shm import ShmFds

        wheres = [ShmFds(*spec["there"]), ShmFds(*spec["back"])]
    else:
        wheres = [tuple(spec["there"]), tuple(spec["back"])]
    receiver = open_receiver(spec["transport"], wheres[0], there)
    sender = open_sender(spec["transport"], wheres[1], back)
    try:
        _answer_all(receiver, sender)
    except ChannelError:
        pass  # the bench has closed them
    sender.close()
    receiver.close()


def _answer_all(receiver: Receiver, sender: Sender) -> None:
    nothing = np.empty(0, np.uint8)
    while True:
        number, payload = receiver.receive(None) or (KEEP, nothing)
        if number != KEEP:
            sender.send(number, payload if number == ECHO else nothing)


def print_channels(report: dict[str, Any]) -> None:
    """The report as a table: medians of the runs."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    config, runs = report["config"], report["runs"]
    names = [name for name in (*TRANSPORTS, "copy") if any(run["transport"] == name for run in runs)]
    title = f"A hop between two processes; burst: one way, {config['messages']} unread at most"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("bytes", justify="right")
    for name in names:
        for column in (f"{name}\nµs", "\nGB/s", "\nburst")[: 2 if name == "copy" else 3]:
            table.add_column(column, justify="right")
    for size in config["sizes"]:
        cells = []
        for name in names:
            own = [run for run in runs if (run["transport"], run["bytes"]) == (name, size)]
            cells.append(_figure(median(run["latency_s"] for run in own) * 1e6))
            cells.append(_figure(median(run["gb_per_s"] for run in own)))
            if name != "copy":
                cells.append(_figure(median(run["burst_gb_per_s"] for run in own)))
        table.add_row(_short(size), *cells)
    console = Console(highlight=False)
    console.print(table)
    for name, reason in config["missing"].items():
        console.print(f"{name}: {reason}")


def _figure(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 0.1 else 3}f}"


def _short(size: int) -> str:
    """As `parse_sizes` reads it."""
    for unit, shift in (("M", 20), ("k", 10)):
        if size % (1 << shift) == 0:
            return f"{size >> shift}{unit}"
    return str(size)


if __name__ == "__main__":
    main()
