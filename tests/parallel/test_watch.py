"""Who has vanished, and who is only busy. That a cut way is noticed is tested with hosts, in network namespaces."""

from __future__ import annotations

import socket
import sys
import time
from contextlib import suppress

import pytest

from headrace.parallel.watch import LOOKS, Watch, Watcher

SECONDS = 0.2


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    with ours, theirs:
        yield ours, theirs


def fill(connection: socket.socket) -> int:
    connection.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += connection.send(b"x" * 65536)
    return sent


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_one_who_reads_nothing_is_there(pair):
    ours, theirs = pair
    watch, sent = Watch(ours, SECONDS), fill(ours)
    for _ in range(12 * LOOKS):
        time.sleep(SECONDS / LOOKS)
        assert not watch.vanished()
    ours.setblocking(True)
    left = sent
    while left:
        left -= len(theirs.recv(1 << 20))


def test_a_watcher_leaves_the_well_and_forgets_the_closed(pair):
    ours, theirs = pair
    watcher = Watcher()
    watcher.add(ours, SECONDS)
    watcher.add(theirs, SECONDS)
    fill(ours)
    time.sleep(4 * SECONDS)
    assert theirs.recv(1) == b"x"
    theirs.close()
    ours.close()
    end = time.monotonic() + 20
    while watcher._watches:
        assert time.monotonic() < end
        time.sleep(0.01)
