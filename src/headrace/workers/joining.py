"""A worker's way to a coordinator: connect, prove the secret, say Hello, wait for a Start."""

from __future__ import annotations

import os
import random
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from .. import __version__
from ..errors import ChannelError, HeadraceError
from ..parallel.handshake import Handshake, complete
from ..parallel.joining import JOIN_LABEL, parse_address, read_secret
from ..parallel.watch import LOOKS, Watch
from .control import Hello, Ping, Pong, Refused, Start, ToRank, to_rank
from .link import Link

CONNECT_SECONDS = 5.0
VANISHED_SECONDS = 5.0  # after which a coordinator that does not acknowledge anything counts as gone
PAUSE, LONGEST_PAUSE = 0.1, 2.0  # seconds between two attempts: twice as long each time


class Joined(NamedTuple):
    """What came of it; `connection` is the link's, which owns it."""

    start: Start
    link: Link[ToRank]
    connection: socket.socket
    secret: bytes


def join(address: str, secret_file: str, name: str, say: Callable[[str], None] | None = None) -> Joined:
    """Try until a coordinator at "host:port" has work for this worker, of the host `name`. `say` hears what happens,
    the same thing once. The secret is read for each attempt. ConfigError where address or secret file are wrong at the
    beginning."""
    where = parse_address(address, "--join")
    read_secret(secret_file)
    say, told, pause = say or _say, "", PAUSE

    def welcome() -> None:
        nonlocal told, pause
        say(f"joined {address} as a worker of {name}")
        told, pause = "", PAUSE

    while True:
        try:
            connection = _connect(where, secret := read_secret(secret_file))
            watch = Watch(connection, VANISHED_SECONDS)
            link: Link[ToRank] = Link(connection, to_rank)
            link.send(Hello(__version__, name, len(os.sched_getaffinity(0)), os.getpid()))
            return Joined(_wait(link, watch, welcome), link, connection, secret)
        except (HeadraceError, OSError) as error:
            if told != str(error):
                told = str(error)
                say(f"{told}; trying on")
        time.sleep(pause * random.uniform(0.7, 1.3))
        pause = min(LONGEST_PAUSE, 2 * pause)


def _connect(where: tuple[str, int], secret: bytes) -> socket.socket:
    """A connection to a coordinator that has proved the secret."""
    deadline = time.monotonic() + CONNECT_SECONDS
    try:
        connection = socket.create_connection(where, CONNECT_SECONDS)
    except OSError as error:
        raise ChannelError(f"no coordinator at {where[0]}:{where[1]}: {error.strerror or error}") from None
    try:
        if connection.getsockname() == connection.getpeername():  # TCP's simultaneous open, with itself
            raise ChannelError(f"no coordinator at {where[0]}:{where[1]}: nobody listens")
        complete(Handshake(connection, secret, JOIN_LABEL, listens=False), deadline)
        return connection
    except BaseException:
        connection.close()
        raise


def _wait(link: Link[ToRank], watch: Watch, welcome: Callable[[], None]) -> Start:
    """Answer pings until a Start comes; the first says that we are wanted. ChannelError where none will come."""
    pinged = False
    try:
        while not link.closed and not watch.vanished():
            select.select([link], [link] if link.unsent else [], [], watch.seconds / LOOKS)
            link.flush()
            for message in link.receive():
                if isinstance(message, Start):
                    return message
                if isinstance(message, Ping):
                    link.send(Pong(message.time, time.monotonic()))
                    if not pinged:
                        pinged = True
                        welcome()
                elif isinstance(message, Refused):
                    raise ChannelError(f"refused by the coordinator: {message.reason}")
                else:
                    raise ChannelError(f"the coordinator said {type(message).__name__} before Start")
        raise ChannelError("the coordinator is gone")
    except BaseException:
        link.close()
        raise


def _say(text: str) -> None:
    print(f"headrace worker: {text}", file=sys.stderr, flush=True)
