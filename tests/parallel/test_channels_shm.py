"""Rings in shared memory: what is in them is not trusted, and nobody waits for the dead."""

from __future__ import annotations

import mmap
import os
import re
import select
import socket
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parallel.channel_pairs import edge_of, peer
from tests.parallel.channel_peer import message

from headrace.errors import ChannelError
from headrace.parallel.channel import HEADER_BYTES, open_receiver, open_sender
from headrace.parallel.shm import ShmEdge, ShmFds

PATIENCE = 20.0
EDGE = edge_of(4096)


@pytest.fixture
def ring():
    """An edge, and its two ends."""
    edge = ShmEdge.create(EDGE.max_bytes, EDGE.messages)
    sender, receiver = (opened("shm", edge.fds.duplicate(), EDGE) for opened in (open_sender, open_receiver))
    yield edge, sender, receiver
    for one in (sender, receiver, edge):
        one.close()


def write(edge: ShmEdge, slot: int, place: int, data: bytes) -> None:
    with mmap.mmap(edge.fds.memory, 0) as memory:
        start = mmap.PAGESIZE + slot * (HEADER_BYTES + EDGE.max_bytes) + place
        memory[start : start + len(data)] = data


@pytest.mark.parametrize(
    ("place", "data"),
    [
        (0, b"\0" * HEADER_BYTES),
        (0, b"HRc2"),
        (4, b"\x63"),
        (5, b"\x09"),
        (8, b"\x01"),  # another message's index
        (24, (1 << 40).to_bytes(8, "little")),  # more bytes than a message has
        (32, b"\xff" * 8),  # a dimension
    ],
)
def test_a_corrupt_header_is_an_error_and_stays_one(ring, place, data):
    edge, sender, receiver = ring
    sender.send(3, np.ones((2, 3)))
    write(edge, 0, place, data)
    for _ in range(3):
        assert select.select([receiver], [], [], 0)[0]
        with pytest.raises(ChannelError, match=r"^first to second: .*(anew|max_bytes)"):
            receiver.receive(PATIENCE)


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES), st.booleans())
def test_any_bytes_in_place_of_a_header(data, marked):
    edge = ShmEdge.create(EDGE.max_bytes, EDGE.messages)
    receiver = open_receiver("shm", edge.fds.duplicate(), EDGE)
    write(edge, 0, 0, b"HRc1" + data[4:8] + bytes(8) + data[16:] if marked else data)
    os.eventfd_write(edge.fds.ready, 1)
    try:
        found = receiver.receive(0)
        assert found is not None and found[1].nbytes <= EDGE.max_bytes
        found[1].tobytes()
    except ChannelError:
        pass
    receiver.close()
    edge.close()


def test_half_a_message_is_none(ring):
    edge, sender, receiver = ring
    sender.send(1, np.ones(3))
    assert receiver.receive(0)[0] == 1
    os.eventfd_read(edge.fds.room)  # what a sender does, until it is killed
    write(edge, 1, 0, b"HRc1\1\1")
    assert receiver.receive(0.05) is None
    edge.abandon()
    for _ in range(2):
        with pytest.raises(ChannelError, match="gone"):
            receiver.receive(PATIENCE)
        with pytest.raises(ChannelError, match="gone"):
            sender.send(2, np.ones(3))


@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_abandoning_an_edge_ends_the_wait_of_both(role):
    edge = edge_of(1 << 16, messages=2, timeout=PATIENCE)
    with peer("shm", role, edge) as other:
        if role == "receiver":
            other.end.send(0, message(0, edge.max_bytes))
        time.sleep(0.1)
        other.shm.abandon()
        assert re.search("first to second: the other end is gone", other.line())
        with pytest.raises(ChannelError, match="gone"):
            other.end.receive(PATIENCE) if role == "sender" else other.end.send(1, message(1, edge.max_bytes))


def test_an_end_can_be_handed_over_by_a_socket():
    edge = ShmEdge.create(EDGE.max_bytes, EDGE.messages)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ends = []
        for opened in (open_sender, open_receiver):
            socket.send_fds(ours, [b"!"], list(edge.fds))
            ends.append(opened("shm", ShmFds(*socket.recv_fds(theirs, 1, 3)[1]), EDGE))
        edge.close()
        ends[0].send(5, np.arange(6))
        number, array = ends[1].receive(PATIENCE)
        assert number == 5 and np.array_equal(array, np.arange(6))
        for end in ends:
            end.close()


def test_memory_that_could_shrink_or_is_too_small_is_refused_and_closed():
    loose = os.memfd_create("loose")
    good = ShmEdge.create(EDGE.max_bytes, EDGE.messages)
    os.ftruncate(loose, os.fstat(good.fds.memory).st_size)
    small = ShmEdge.create(EDGE.max_bytes // 2, EDGE.messages)
    before = len(os.listdir("/proc/self/fd"))
    for memory in (loose, small.fds.memory):
        with pytest.raises(ChannelError, match=r"first to second: shared memory of \d+ bytes, or not sealed"):
            open_receiver("shm", ShmFds(memory, good.fds.ready, good.fds.room).duplicate(), EDGE)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(PermissionError):
        os.ftruncate(good.fds.memory, 0)
    good.close()
    small.close()
    os.close(loose)


def test_memory_is_taken_up_as_it_is_written():
    edge = edge_of(1 << 30, messages=8)
    made = ShmEdge.create(edge.max_bytes, edge.messages)
    sender, receiver = (opened("shm", made.fds.duplicate(), edge) for opened in (open_sender, open_receiver))
    for number in range(30):
        sender.send(number, np.zeros(1000, np.uint8))
        receiver.receive(PATIENCE)
    assert os.fstat(made.fds.memory).st_blocks * 512 < 1 << 20 < os.fstat(made.fds.memory).st_size
    for one in (sender, receiver, made):
        one.close()


def test_what_is_received_cannot_be_written_to_and_outlives_the_channel(ring):
    _, sender, receiver = ring
    sender.send(1, np.arange(5))
    _, array = receiver.receive(PATIENCE)
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    receiver.close()
    assert np.array_equal(array, np.arange(5))


def test_a_large_stream_between_threads_is_whole(ring):
    _, sender, receiver = ring
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 256, rng.integers(0, EDGE.max_bytes + 1), np.uint8) for _ in range(500)]
    thread = threading.Thread(target=lambda: [sender.send(number, array) for number, array in enumerate(sent)])
    thread.start()
    for number, array in enumerate(sent):
        got, found = receiver.receive(PATIENCE)
        assert got == number and np.array_equal(found, array)
    thread.join()
