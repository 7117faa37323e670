"""A rank of a split model: `python -m headrace.worker_process FD`, FD being its connection to the coordinator.

It loads its layers, says that it is ready, and works until the connection closes.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING

from .errors import CapacityError, ConfigError, HeadraceError
from .parallel.watch import Watch
from .processes import die_with_parent, settle, stand_back, threads
from .workers.control import Failed, Ready, Start, ToRank, to_rank
from .workers.link import Link
from .workers.worker import Worker, beat

if TYPE_CHECKING:
    from .kernels.ops import Group
    from .workers.joining import Joined


def serve(connection: socket.socket) -> None:
    """Obey the coordinator at the other end of a connection."""
    link: Link[ToRank] = Link(connection, to_rank)
    start = _first(link)
    if start is not None:
        obey(link, start)


def obey(link: Link[ToRank], start: Start, joined: Joined | None = None) -> bool:
    """Be the rank that a Start describes; whether it could be. `joined`: how it came, where it is on another host."""
    host, secret, watch = "127.0.0.1", b"", None
    if joined is not None:
        host, secret = joined.connection.getsockname()[0], joined.secret
        watch = Watch(joined.connection, max(1.0, start.heartbeat))
    threading.Thread(target=beat, args=(link, start.heartbeat, watch), name="headrace-beat", daemon=True).start()
    try:
        _pin(start.cores)
        from .assemble_split import build_rank  # slow to import, and the coordinator waits for signs of life

        before = threads()
        runner = build_rank(start, _group(link, start, host, secret) if start.place.ranks > 1 else None)
    except (HeadraceError, MemoryError) as error:
        problem = error if isinstance(error, HeadraceError) else _too_large(start)
        link.send(Failed(type(problem).__name__, str(problem)))
        if joined is not None:
            print(f"headrace worker: {problem}", file=sys.stderr, flush=True)
        return False
    stand_back(before)
    settle()
    worker = Worker(link, start.place, runner, host, secret)
    link.send(Ready(os.getpid()))
    worker.run()
    return True


def _too_large(start: Start) -> CapacityError:
    first, end = start.layers
    return CapacityError(
        f"there is no memory for layers {first} to {end - 1} with {max(start.pages)} KV pages; give it fewer of either"
    )


def _group(link: Link[ToRank], start: Start, host: str, secret: bytes) -> Group:
    if not secret:
        from .parallel.group import SharedGroup

        return SharedGroup(link.take_fds(1)[0], start.place.rank)
    from .workers.mesh import meet

    return meet(link, start, host, secret)


def _pin(cores: tuple[int, ...]) -> None:
    try:
        if cores:
            os.sched_setaffinity(0, cores)
    except OSError:
        own = sorted(os.sched_getaffinity(0))
        raise ConfigError(f"the plan puts a rank on cores {cores}, this process may use {own}; change one") from None


def _first(link: Link[ToRank]) -> Start | None:
    """The first message; None where the coordinator hangs up."""
    while not link.closed:
        select.select([link], [], [])
        for message in link.receive():
            return message if isinstance(message, Start) else None
    return None


def main() -> None:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
