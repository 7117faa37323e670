"""How far the clock of another host is from this one's, from round trips."""

from __future__ import annotations

import math
import time

from .control import Ping, Pong

DRIFT = 1e-4  # seconds that two clocks move apart in one, at most: crystals keep within 50 parts in a million


class Clock:
    """`offset`: seconds to add to the other side's time.monotonic; 0 before the first round trip.

    Half a round trip is the most that it can be wrong by (Cristian's method, Distributed Computing 3, 1989), and the
    drift since: the round trip with the least of both counts.
    """

    def __init__(self) -> None:
        self.offset = 0.0
        self.trips = 0
        self.asks = False  # a ping is not answered yet
        self._error, self._when = math.inf, 0.0

    def ping(self) -> Ping:
        self.asks = True
        return Ping(time.monotonic())

    def take(self, pong: Pong) -> None:
        """Learn from the answer to a ping."""
        self.asks, now = False, time.monotonic()
        error = (now - pong.asked) / 2
        if error < 0:
            return
        self.trips += 1
        if error <= self._error + DRIFT * (now - self._when):
            self.offset, self._error, self._when = pong.asked + error - pong.time, error, now
