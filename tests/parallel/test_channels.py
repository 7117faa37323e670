"""What every transport promises, tried on each: in one process, and with an end in another that is killed."""

from __future__ import annotations

import os
import re
import select
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.parallel.channel_pairs import all_transports, edge_of, needs_torch, pair, peer
from tests.parallel.channel_peer import message

from headrace.errors import ChannelError, ConfigError
from headrace.parallel import channel
from headrace.parallel.channel import BFLOAT16, DTYPES, Edge, open_receiver, open_sender

PATIENCE = 20.0  # seconds: only a hang takes so long


def numbered(number: int) -> np.ndarray:
    return np.array([[number, number + 1]], np.int32)


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], 0)[0])


@pytest.fixture(scope="module", params=[param for param in all_transports.args[1]])
def open_pair(request):
    with pair(request.param, edge_of(1 << 16)) as ends:
        yield ends


@all_transports
def test_messages_come_in_order_with_their_numbers(transport):
    numbers = [0, 7, 7, (1 << 64) - 1, 3]
    with pair(transport, edge_of()) as (sender, receiver):
        for lap in range(5):  # more than the channel holds
            for number in numbers[lap % 3 :]:
                sender.send(number, numbered(lap))
                got, array = receiver.receive(PATIENCE)
                assert got == number and np.array_equal(array, numbered(lap))
            for number in range(3):
                sender.send(number, numbered(number))
            for number in range(3):
                got, array = receiver.receive(PATIENCE)
                assert got == number and np.array_equal(array, numbered(number))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.lists(st.integers(0, 5), max_size=4).map(tuple),
    order=st.sampled_from(["whole", "transposed", "strided", "backwards"]),
    number=st.integers(0, (1 << 64) - 1),
    data=st.randoms(use_true_random=False),
)
def test_every_dtype_and_shape(open_pair, dtype, shape, order, number, data):
    sender, receiver = open_pair
    if order == "strided" and shape:
        shape = (*shape[:-1], shape[-1] * 2)
    count = int(np.prod(shape, dtype=int)) * dtype.itemsize
    array = np.frombuffer(bytearray(data.randbytes(count)), np.uint8).view(dtype).reshape(shape)
    if order == "transposed":
        array = array.T
    elif shape and order != "whole":
        array = array[..., :: 2 if order == "strided" else -1]
    sender.send(number, array)
    got, found = receiver.receive(PATIENCE)
    assert (got, found.dtype, found.shape) == (number, array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


def test_bfloat16_is_told_from_its_bits(open_pair):
    sender, receiver = open_pair
    bits = np.array([0x3F80, 0xFF80], np.uint16)
    sender.send(1, bits.view(BFLOAT16))
    _, found = receiver.receive(PATIENCE)
    assert found.dtype == BFLOAT16 and np.array_equal(found.view(np.uint16), bits)


@pytest.mark.parametrize(
    ("number", "array", "said"),
    [
        (0, np.zeros(1 << 16 | 1, np.uint8), "65537 bytes.*65536"),
        (0, np.zeros(2, np.complex64), "complex64"),
        (0, np.zeros(2, ">f4"), ">f4"),
        (0, np.array([None]), "object"),
        (0, np.zeros((1,) * 5, np.int8), "5 dimensions.*4"),
        (-1, np.zeros(1), "number -1"),
        (1 << 64, np.zeros(1), "number 18446744073709551616"),
    ],
)
def test_what_cannot_be_sent_is_refused_and_harms_nothing(open_pair, number, array, said):
    sender, receiver = open_pair
    for _ in range(5):  # more often than there are places
        with pytest.raises(ChannelError, match=f"first to second.*{said}"):
            sender.send(number, array)
    sender.send(5, np.zeros(1 << 16, np.uint8))
    got, found = receiver.receive(PATIENCE)
    assert got == 5 and found.nbytes == 1 << 16


@all_transports
def test_ends_that_disagree_on_the_largest_message(transport):
    large, small = edge_of(8000), edge_of(4000)
    with pytest.raises((ChannelError, ConfigError), match="max_bytes"):
        with pair(transport, large, small) as (sender, receiver):
            assert transport == "tcp", "the others notice it at once"
            sender.send(1, np.zeros(1000, np.int8))
            assert receiver.receive(PATIENCE)[0] == 1
            sender.send(2, np.zeros(8000, np.int8))
            receiver.receive(PATIENCE)


@pytest.mark.parametrize(("max_bytes", "messages", "timeout"), [(0, 1, 1), (1 << 40, 1, 1), (1, 0, 1), (1, 1 << 20, 1)])
def test_an_edge_has_bounds(max_bytes, messages, timeout):
    with pytest.raises(ConfigError, match=r"a: (max_bytes|messages) must be from 1 to \d+, got"):
        Edge("a", max_bytes, messages, timeout)


def test_a_timeout_is_a_number_of_seconds():
    for timeout in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="timeout"):
            Edge("a", 1, 1, timeout)


def test_an_unknown_transport_is_refused():
    for opened in (open_sender, open_receiver):
        with pytest.raises(ConfigError, match="'pigeon' is not a transport; transports are shm, tcp, gloo"):
            opened("pigeon", None, edge_of())


@all_transports
def test_a_sender_goes_on_until_so_many_are_unread_then_waits_then_fails(transport):
    payload = np.zeros(4 << 20, np.uint8)  # more than a connection's buffers take
    with pair(transport, edge_of(4 << 20, messages=3, timeout=0.3)) as (sender, receiver):
        sent = 0
        with pytest.raises(ChannelError, match=r"first to second: 3 messages stayed unread for 0\.3 s"):
            while True:
                payload[:] = sent
                started = time.monotonic()
                sender.send(sent, payload)
                sent += 1
        assert time.monotonic() - started >= 0.29
        assert 3 <= sent <= (5 if transport == "gloo" else 3)
        for number in range(sent):
            got, array = receiver.receive(PATIENCE)
            assert got == number and (array == number).all()
        sender.send(99, payload)  # there is room again
        assert receiver.receive(PATIENCE)[0] == 99


@all_transports
def test_a_full_sender_goes_on_when_a_message_is_read(transport):
    with pair(transport, edge_of(messages=1, timeout=PATIENCE)) as (sender, receiver):
        got = []

        def read() -> None:
            while len(got) < 20:
                number, array = receiver.receive(PATIENCE)
                got.append((number, int(array[0, 0])))

        reader = threading.Thread(target=read)
        reader.start()
        for number in range(20):
            sender.send(number, numbered(number))
        reader.join(PATIENCE)
        assert got == [(number, number) for number in range(20)]


@all_transports
def test_nothing_comes_in_time(transport):
    with pair(transport, edge_of()) as (sender, receiver):
        assert receiver.receive(0) is None
        started = time.monotonic()
        assert receiver.receive(0.1) is None
        assert time.monotonic() - started >= 0.099
        sender.send(1, numbered(1))
        assert receiver.receive(PATIENCE)[0] == 1
        assert receiver.receive(0) is None


@all_transports
def test_the_descriptor_is_readable_while_a_message_waits_and_once_the_sender_is_gone(transport):
    with pair(transport, edge_of()) as (sender, receiver):
        assert not readable(receiver.fileno())
        for number in range(2):
            sender.send(number, numbered(number))
        assert select.select([receiver], [], [], PATIENCE)[0] and readable(receiver.fileno())
        for _ in range(2):
            receiver.receive(PATIENCE)
        assert not readable(receiver.fileno())
        sender.close()
        for _ in range(3):
            assert select.select([receiver], [], [], PATIENCE)[0]
            with pytest.raises(ChannelError, match="first to second: the other end is gone"):
                receiver.receive(PATIENCE)


@all_transports
def test_a_message_stays_as_it_is_until_the_next_is_asked_for(transport):
    with pair(transport, edge_of()) as (sender, receiver):
        for number in range(9):
            sender.send(number, np.full(1000, number, np.int32))
            _, array = receiver.receive(PATIENCE)
            for other in range(2):  # with the one read, as many as the channel holds
                sender.send(100 + other, np.full(1000, 100 + other, np.int32))
            select.select([receiver], [], [], PATIENCE)
            assert (array == number).all()
            for other in range(2):
                assert receiver.receive(PATIENCE)[0] == 100 + other


@all_transports
def test_what_was_sent_before_a_close_is_read(transport):
    with pair(transport, edge_of(1 << 20)) as (sender, receiver):
        for number in range(2):
            sender.send(number, np.full(1 << 20, number, np.uint8))
        closing = threading.Thread(target=sender.close)  # it may wait for the reader for a while
        closing.start()
        for number in range(2):
            got, array = receiver.receive(PATIENCE)
            assert got == number and (array == number).all()
        with pytest.raises(ChannelError, match="gone"):
            receiver.receive(PATIENCE)
        closing.join()


@all_transports
def test_a_sender_whose_receiver_closed(transport):
    with pair(transport, edge_of(timeout=PATIENCE)) as (sender, receiver):
        sender.send(0, numbered(0))
        receiver.close()
        with pytest.raises(ChannelError, match="first to second: the other end is gone"):
            for number in range(1000):
                sender.send(number, numbered(number))
        with pytest.raises(ChannelError, match="gone"):
            sender.send(1, numbered(1))


@needs_torch
@pytest.mark.slow
def test_a_close_while_a_message_comes_ends():
    """gloo hands a completion to one waiter alone: a close that took it from the receiver's thread would hang."""
    for round_ in range(400):
        with pair("gloo", edge_of(1 << 16)) as (sender, receiver):
            for number in range(1 + round_ % 2):
                sender.send(number, np.zeros(1 << (round_ % 17), np.uint8))
            receiver.close()
            with pytest.raises(ChannelError, match="gone"):
                for number in range(1000):
                    sender.send(number, numbered(number))


@all_transports
def test_an_end_that_is_closed(transport):
    with pair(transport, edge_of()) as (sender, receiver):
        for end in (receiver, sender):
            end.close()
            end.close()
        with pytest.raises(ChannelError, match="this end is closed"):
            sender.send(0, numbered(0))
        with pytest.raises(ChannelError, match="this end is closed"):
            receiver.receive(0)


@needs_torch
def test_a_gloo_world_meets_at_an_address():
    for where in (("0.0.0.0", 1), ("::", 1)):
        with pytest.raises(ConfigError, match="meets at an address that the other host reaches, not at"):
            open_sender("gloo", where, edge_of())


# -- with another process ----------------------------------------------------------------------------------------------

LARGE = edge_of(1 << 20, messages=2, timeout=PATIENCE)


@all_transports
def test_a_sender_killed_at_any_moment_leaves_whole_messages_and_then_an_error(transport):
    with peer(transport, "sender", LARGE) as other:
        number = 0
        with pytest.raises(ChannelError, match="gone"):
            while True:
                got, array = other.end.receive(PATIENCE)
                assert got == number and np.array_equal(array, message(number, LARGE.max_bytes))
                number += 1
                if number == 40:
                    other.kill()
        assert number >= 40
        with pytest.raises(ChannelError):
            other.end.receive(0)


@all_transports
def test_a_receiver_killed_while_the_sender_waits_breaks_no_other_channel(transport):
    with pair(transport, edge_of()) as (sender, receiver), peer(transport, "receiver", LARGE) as other:
        sender.send(1, numbered(1))
        threading.Timer(0.3, other.kill).start()
        with pytest.raises(ChannelError, match="gone"):
            for number in range(1 << 20):
                other.end.send(number, message(number, LARGE.max_bytes))
        for number in (1, 2):
            assert receiver.receive(PATIENCE)[0] == number
            sender.send(number + 1, numbered(number))


@all_transports
@pytest.mark.parametrize("role", ["sender", "receiver"])
def test_a_close_ends_the_other_s_wait(transport, role):
    with peer(transport, role, LARGE) as other:
        if role == "receiver":
            for number in range(5):
                other.end.send(number, message(number, LARGE.max_bytes))
        time.sleep(0.1)  # now it waits: for a message, or for room
        other.end.close()
        assert re.search("first to second: the other end is gone", other.line())
        assert other.process.wait(PATIENCE) == 0


# -- what stays behind -------------------------------------------------------------------------------------------------


def _held() -> tuple[int, int, int]:
    """Descriptors, shared memory and threads of this process."""
    with open("/proc/self/maps") as maps:
        shared = sum("memfd:headrace" in line for line in maps)
    return len(os.listdir("/proc/self/fd")), shared, len(os.listdir("/proc/self/task"))


def _more_than(before: tuple[int, int, int]) -> bool:
    """Less is well: what an earlier test left may go meanwhile."""
    return any(now > then for now, then in zip(_held(), before))


@pytest.mark.parametrize(
    ("transport", "rounds"),
    [
        ("shm", 200),
        ("tcp", 200),
        pytest.param("gloo", 20, marks=needs_torch),
        pytest.param("gloo", 200, marks=[needs_torch, pytest.mark.slow]),
    ],
)
def test_nothing_stays_behind(transport, rounds):
    def round_() -> None:
        with pair(transport, edge_of()) as (sender, receiver):
            sender.send(1, numbered(1))
            assert receiver.receive(PATIENCE)[0] == 1
            assert _held()[0] > before[0]

    before = (0, 0, 0)
    round_()
    before = _held()
    for _ in range(rounds):
        round_()
    deadline = time.monotonic() + PATIENCE
    while _more_than(before) and time.monotonic() < deadline:
        time.sleep(0.01)  # a thread that was joined may not have left the system yet
    assert not _more_than(before)


# -- headers -----------------------------------------------------------------------------------------------------------


def header(number: int = 3, array: np.ndarray | None = None, index: int = 0) -> bytearray:
    buffer = bytearray(channel.HEADER_BYTES)
    array = np.zeros((2, 3), np.float32) if array is None else array
    channel.pack_header(buffer, 0, channel.dtype_code(edge_of(), number, array), index, number, array)
    return buffer


def test_a_header_says_what_was_packed():
    assert channel.unpack_header(edge_of(), header(), 0, 0) == (3, np.float32, (2, 3), 24)
    assert channel.unpack_header(edge_of(), header(index=5), 0, 5) == (3, np.float32, (2, 3), 24)


@pytest.mark.parametrize("index", [0, 4, 6, 1 << 63])
def test_a_message_lost_or_doubled_is_noticed(index):
    with pytest.raises(ChannelError, match=f"no header of message 5, but of {index}"):
        channel.unpack_header(edge_of(), header(index=index), 0, 5)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.integers(0, channel.HEADER_BYTES - 1), st.integers(0, 255), max_size=20))
def test_a_damaged_header_gives_an_array_within_bounds_or_an_error(changes):
    buffer = header()
    for place, value in changes.items():
        buffer[place] = value
    try:
        _, dtype, shape, size = channel.unpack_header(edge_of(), buffer, 0, 0)
    except ChannelError as error:
        assert str(error).startswith("first to second: ")
        return
    assert size <= edge_of().max_bytes
    assert np.ndarray(shape, dtype, bytearray(size)).nbytes == size


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, b"X", "mark b'XRc1'"),
        (4, b"\0", "code 0"),
        (4, b"\x0e", "code 14"),
        (5, b"\5", "5 dimensions"),
        (5, b"\3", "shape"),
    ],
)
def test_damage_that_must_be_seen(place, value, said):
    buffer = header()
    buffer[place : place + len(value)] = value
    with pytest.raises(ChannelError, match=said):
        channel.unpack_header(edge_of(), buffer, 0, 0)


def test_dimensions_that_numpy_would_refuse():
    buffer = header(array=np.zeros((0, 3), np.float32))
    buffer[40:48] = (1 << 62).to_bytes(8, "little")
    with pytest.raises(ChannelError, match="shape"):
        channel.unpack_header(edge_of(), buffer, 0, 0)
