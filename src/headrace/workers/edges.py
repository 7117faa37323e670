"""A rank's ends of channels: opened when the coordinator says so, those between hosts in threads of their own."""

from __future__ import annotations

import os
import socket
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import ChannelError, HeadraceError
from ..parallel.channel import Edge, Receiver, Sender, open_receiver, open_sender
from ..parallel.joining import channel_secret
from ..parallel.shm import ShmFds, ShmReceiver, ShmSender
from ..parallel.tcp import TcpListener, connect
from ..parallel.watch import Watcher
from .control import Connect, Connected, FromRank, Listening, Torn

CONNECT_SECONDS = 20.0


class Edges:
    """`host`: the address at which others reach this rank. `say` sends a message to the coordinator, from any thread;
    `fileno` is readable when an end was opened by a thread, see `settle`. `secret`: the one that this rank joined with,
    where it did."""

    def __init__(self, host: str, say: Callable[[FromRank], None], secret: bytes = b"") -> None:
        self._host, self._say, self._secret = host, say, secret
        self.receivers: dict[int, Receiver] = {}  # by descriptor
        self._edges: dict[int, Receiver | Sender] = {}
        self.within: list[int] = []  # those to other ranks of the replica
        self._opened: deque[tuple[Connect, Receiver | Sender | None, str]] = deque()
        self._watcher = Watcher()
        self._opening: set[int] = set()  # by threads
        self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self._bell

    def open(self, order: Connect, fds: tuple[int, ...]) -> None:
        """Open an end; the coordinator hears of it."""
        if order.transport == "shm":
            self._add(order, _open(order, ShmFds(*fds)), "")
            return
        self._opening.add(order.edge)
        threading.Thread(target=self._open_far, args=(order,), daemon=True).start()

    def _open_far(self, order: Connect) -> None:
        try:
            self._opened.append((order, _open(order, self._far_end(order)), ""))
        except Exception as error:
            self._opened.append((order, None, f"{type(error).__name__}: {error}"))
        os.eventfd_write(self._bell, 1)

    def _far_end(self, order: Connect) -> Any:
        """What opens a channel to another host: for tcp a connection, for gloo a socket that listens or an address."""
        host = order.host or self._host
        if order.transport == "gloo":
            if order.address is not None:
                return order.address
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listener = socket.create_server((host, 0), family=family)
            self._say(Listening(order.edge, listener.getsockname()[:2]))
            return listener
        connection = self._tcp_connection(order, host)
        self._watcher.add(connection, order.patience)
        return connection

    def _tcp_connection(self, order: Connect, host: str) -> socket.socket:
        secret = channel_secret(self._secret, order.secret) if self._secret else order.secret
        if order.address is not None:
            return connect(order.address, secret, order.name, CONNECT_SECONDS)
        listener = TcpListener(host)
        try:
            self._say(Listening(order.edge, listener.address))
            return listener.accept(secret, order.name, CONNECT_SECONDS)
        finally:
            listener.close()

    def settle(self) -> None:
        """Take in what threads have opened."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._bell)
        while self._opened:
            order, end, error = self._opened.popleft()
            if order.edge in self._opening:
                self._opening.discard(order.edge)
                self._add(order, end, error)
            elif end is not None:  # nobody wants it any more
                with suppress(HeadraceError):
                    end.close()

    def _add(self, order: Connect, end: Receiver | Sender | None, error: str) -> None:
        if end is not None:
            self._edges[order.edge] = end
            if not order.sends:
                self.receivers[end.fileno()] = end  # type: ignore[union-attr,assignment]
            elif order.within:
                self.within.append(order.edge)
        self._say(Connected(order.edge, error or None))

    def send(self, edge: int, number: int, array: np.ndarray) -> None:
        """Send over an edge. Where it or its other end is gone, nobody wants the array any more."""
        sender = self._edges.get(edge)
        if sender is None:
            return
        try:
            sender.send(number, array)  # type: ignore[union-attr]
        except ChannelError:
            self._tear(edge)

    def _tear(self, edge: int) -> None:
        """Close an edge that is of no more use. The coordinator usually knows that the other end is gone, or is about
        to notice; where only the way between two hosts is cut, nobody else could tell it."""
        self.close(edge)
        self._say(Torn(edge))

    def close(self, edge: int) -> None:
        self._opening.discard(edge)
        end = self._edges.pop(edge, None)
        if end is None:
            return
        if edge in self.within:
            self.within.remove(edge)
        self.receivers = {fd: other for fd, other in self.receivers.items() if other is not end}
        if isinstance(end, ShmSender | ShmReceiver):
            end.close()
        else:  # it may wait for an other end that is out of reach
            threading.Thread(target=end.close).start()

    def close_receiver(self, fd: int) -> None:
        end = self.receivers[fd]
        self._tear(next(edge for edge, other in self._edges.items() if other is end))


def _open(order: Connect, where: Any) -> Receiver | Sender:
    edge = Edge(order.name, order.max_bytes, order.messages)
    return (open_sender if order.sends else open_receiver)(order.transport, where, edge)
