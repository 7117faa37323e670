"""Noticing that the other side of a TCP connection has vanished without a word: its host is off, or the way is cut.

The kernel's TCP_USER_TIMEOUT would do that too, and also break a connection whose other side is well and reads nothing
for that long, as one that computes a long step does (tcp(7): "untransmitted due to zero window size").
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
import time
from contextlib import suppress

LOOKS = 4  # in the time after which a silent other side counts as gone
_INFO = struct.Struct("=8B13I")  # struct tcp_info's beginning, linux/tcp.h
_RETRANSMITS, _PROBES, _LAST_ACK = 2, 3, 8 + 12  # the last in milliseconds


class Watch:
    """One connection, whose small messages are sent at once from now on. One on which nothing is sent is probed and
    broken by the kernel, after `seconds` and two more; of others `vanished` tells."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection, self.seconds = connection, seconds
        self._suspect = False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if sys.platform == "linux":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(seconds)))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)

    def vanished(self) -> bool:
        """Whether nothing was acknowledged for so many seconds although it was sent again, at this look and at the last
        one: at a single one an answer may be on its way. Other systems than Linux never tell."""
        if sys.platform != "linux":
            return False
        try:
            info = self._connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
        except OSError:
            return True
        values = _INFO.unpack(info)
        unanswered = values[_RETRANSMITS] >= 1 or values[_PROBES] >= 2
        before, self._suspect = self._suspect, unanswered and values[_LAST_ACK] > self.seconds * 1000
        return before and self._suspect

    def shut(self) -> None:
        """Let whoever waits on the connection hear that it is gone."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class Watcher:
    """A thread that shuts connections whose other side has vanished."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def add(self, connection: socket.socket, seconds: float) -> None:
        """Watch a connection until it is closed."""
        with self._changed:
            self._watches.append(Watch(connection, seconds))
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="headrace-watch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _look(self) -> None:
        while True:
            with self._changed:
                while not self._watches:
                    self._changed.wait()
                pause = min(watch.seconds for watch in self._watches) / LOOKS
                gone = [watch for watch in self._watches if watch.vanished()]
                self._watches = [watch for watch in self._watches if watch not in gone]
            for watch in gone:
                watch.shut()
            time.sleep(pause)
