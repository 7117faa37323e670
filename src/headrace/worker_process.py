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

from .errors import HeadraceError
from .processes import die_with_parent
from .workers.control import Failed, Ready, Start, ToRank, to_rank
from .workers.link import Link
from .workers.worker import Worker, beat


def serve(connection: socket.socket) -> None:
    """Obey the coordinator at the other end of a connection."""
    host = "127.0.0.1" if connection.family == socket.AF_UNIX else connection.getsockname()[0]
    link: Link[ToRank] = Link(connection, to_rank)
    start = _first(link)
    if start is None:
        return
    threading.Thread(target=beat, args=(link, start.heartbeat), name="headrace-beat", daemon=True).start()
    if start.cores:
        os.sched_setaffinity(0, start.cores)
    try:
        from .assemble_split import build_rank  # slow to import, and the coordinator waits for signs of life

        runner = build_rank(start, link.take_fds(1)[0] if start.place.ranks > 1 else None)
    except HeadraceError as error:
        link.send(Failed(type(error).__name__, str(error)))
        return
    worker = Worker(link, start.place, runner, host)
    link.send(Ready(os.getpid()))
    worker.run()


def _first(link: Link[ToRank]) -> Start | None:
    """The first message; None where the coordinator hangs up."""
    while not link.closed:
        select.select([link], [], [])
        for message in link.receive():
            return message if isinstance(message, Start) else None
    return None


def main() -> None:
    if "--die-with-parent" in sys.argv:
        die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    serve(socket.socket(fileno=int(sys.argv[1])))


if __name__ == "__main__":
    main()
