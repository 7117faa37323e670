"""Frames over connections, and who may connect."""

from __future__ import annotations

import hmac
import socket
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.parallel.channel_pairs import SECRET, edge_of, pair

from headrace.errors import ChannelError, ConfigError, HandshakeError
from headrace.parallel import channel, tcp
from headrace.parallel.channel import open_receiver, open_sender
from headrace.parallel.handshake import MIN_SECRET_BYTES, Handshake, complete
from headrace.parallel.tcp import MAX_HANDSHAKES, TcpListener, connect

PATIENCE = 20.0
OTHER_SECRET = b"x" * MIN_SECRET_BYTES
EDGE = edge_of(1 << 16)


def frame(array: np.ndarray, index: int = 0) -> bytes:
    header = bytearray(channel.HEADER_BYTES)
    channel.pack_header(header, 0, channel.dtype_code(EDGE, 7, array), index, 7, array)
    return bytes(header) + array.tobytes()


@pytest.fixture
def raw():
    """A receiver, and a bare socket in the sender's place."""
    ours, theirs = socket.socketpair()
    receiver = open_receiver("tcp", theirs, EDGE)
    with ours:
        yield ours, receiver
    receiver.close()


def test_a_message_in_pieces_comes_when_it_is_whole(raw):
    ours, receiver = raw
    data = frame(np.arange(6)) + frame(np.arange(3), index=1)
    for place in range(0, len(data), 20):
        whole = (place >= len(frame(np.arange(6)))) + (place >= len(data))
        assert whole or receiver.receive(0) is None
        ours.sendall(data[place : place + 20])
    for count in (6, 3):
        number, array = receiver.receive(PATIENCE)
        assert number == 7 and np.array_equal(array, np.arange(count))


@pytest.mark.parametrize("kept", [0, 1, 63, 64, 65, 64 + 47])
def test_a_connection_that_ends_within_a_message(raw, kept):
    ours, receiver = raw
    ours.sendall(frame(np.arange(6))[:kept])
    assert receiver.receive(0) is None
    ours.close()
    for _ in range(2):
        with pytest.raises(ChannelError, match="first to second: the other end is gone"):
            receiver.receive(PATIENCE)


def test_a_message_that_is_too_large_is_refused_before_it_is_read(raw):
    ours, receiver = raw
    header = bytearray(frame(np.zeros(1, np.uint8))[: channel.HEADER_BYTES])
    for place in (24, 32):
        header[place : place + 8] = (1 << 31).to_bytes(8, "little")
    ours.sendall(header)
    with pytest.raises(ChannelError, match="2147483648 bytes was announced, where at most 65536"):
        receiver.receive(PATIENCE)
    assert receiver._payload.nbytes == 0


@settings(max_examples=40, deadline=None)
@given(st.binary(min_size=64, max_size=300))
def test_any_bytes_in_place_of_a_message(data):
    ours, theirs = socket.socketpair()
    receiver = open_receiver("tcp", theirs, EDGE)
    ours.sendall(data)
    with pytest.raises(ChannelError, match="first to second: no header of message 0"):
        receiver.receive(PATIENCE)
    receiver.close()
    ours.close()


def test_credits_that_nobody_asked_for_end_the_channel():
    ours, theirs = socket.socketpair()
    sender = open_sender("tcp", theirs, EDGE)
    ours.sendall(b"\1" * 9)
    with pytest.raises(ChannelError, match="gone"):
        sender.send(1, np.zeros(3))
    sender.close()
    ours.close()


def test_a_close_loses_nothing_though_credits_are_unread():
    payload = np.zeros(1 << 20, np.uint8)
    for _ in range(5):
        with pair("tcp", edge_of(1 << 20, timeout=PATIENCE)) as (sender, receiver):
            sender.send(0, payload)
            receiver.receive(PATIENCE)
            sender.send(1, payload)
            receiver.receive(PATIENCE)  # its credit is not read by anyone
            sender.send(2, np.full(1000, 2, np.uint8))
            sender.close()
            number, array = receiver.receive(PATIENCE)
            assert number == 2 and (array == 2).all()


def test_a_close_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(tcp, "CLOSE_SECONDS", 0.2)
    with pair("tcp", edge_of(1 << 25, timeout=PATIENCE)) as (sender, receiver):
        sender.send(0, np.zeros(1 << 25, np.uint8))  # more than the connection holds, and nobody reads
        started = time.monotonic()
        sender.close()
        assert 0.15 < time.monotonic() - started < PATIENCE / 2
        with pytest.raises(ChannelError, match="gone"):
            receiver.receive(PATIENCE)


# -- the handshake -----------------------------------------------------------------------------------------------------


class Accepting:
    """A listener that waits for the right peer in a thread."""

    def __init__(self, stack: ExitStack, seconds: float = PATIENCE) -> None:
        self.listener = TcpListener("127.0.0.1")
        stack.callback(self.listener.close)
        self.address = self.listener.address
        self.connection: socket.socket | None = None
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._accept, args=(seconds,))
        self.thread.start()
        stack.callback(self.thread.join)

    def _accept(self, seconds: float) -> None:
        try:
            self.connection = self.listener.accept(SECRET, "edge", seconds)
        except Exception as error:
            self.error = error

    def expect_the_right_one(self) -> None:
        with connect(self.address, SECRET, "edge", PATIENCE) as connection:
            self.thread.join()
            assert self.error is None and self.connection is not None
            with self.connection:
                connection.sendall(b"now to the point")
                self.connection.setblocking(True)
                assert self.connection.recv(100) == b"now to the point"


@pytest.fixture
def accepting():
    with ExitStack() as stack:
        yield Accepting(stack)


def test_a_wrong_secret_is_refused_and_the_right_one_still_comes(accepting):
    with pytest.raises(HandshakeError, match="another secret"):
        connect(accepting.address, OTHER_SECRET, "edge", PATIENCE)
    accepting.expect_the_right_one()


def test_a_wrong_label_is_refused_and_the_right_one_still_comes(accepting):
    with pytest.raises(HandshakeError, match="another label"):
        connect(accepting.address, SECRET, "another edge", PATIENCE)
    accepting.expect_the_right_one()


@pytest.mark.parametrize(
    "data", [b"", b"G", b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100, b"\0" * 1000, b"headrac1" + b"\xff" * 400]
)
def test_garbage_is_hung_up_on_and_the_right_one_still_comes(accepting, data):
    with socket.create_connection(accepting.address) as other:
        try:
            other.sendall(data)
            if data:
                other.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # hung up on already
        accepting.expect_the_right_one()


def test_silent_connections_hold_up_nobody_however_many(accepting):
    with ExitStack() as stack:
        for _ in range(MAX_HANDSHAKES + 5):
            silent = stack.enter_context(socket.create_connection(accepting.address))
            silent.sendall(b"headr")
        accepting.expect_the_right_one()


def test_a_slow_connection_is_hung_up_on(monkeypatch):
    monkeypatch.setattr(tcp, "HANDSHAKE_SECONDS", 0.2)
    with ExitStack() as stack:
        accepting = Accepting(stack)
        slow = stack.enter_context(socket.create_connection(accepting.address))
        slow.settimeout(PATIENCE)
        with pytest.raises(OSError):  # its byte now and then buys it no time
            for _ in range(500):
                slow.sendall(b"h")
                time.sleep(0.02)
        monkeypatch.undo()
        accepting.expect_the_right_one()


def test_nobody_comes():
    with ExitStack() as stack:
        accepting = Accepting(stack, seconds=0.2)
        accepting.thread.join()
        assert isinstance(accepting.error, ChannelError)
        assert "edge: nobody came to 127.0.0.1:" in str(accepting.error) and "within 0.2 s" in str(accepting.error)


def test_only_the_wrong_one_comes():
    with ExitStack() as stack:
        accepting = Accepting(stack, seconds=1.5)
        with pytest.raises(HandshakeError):
            connect(accepting.address, OTHER_SECRET, "edge", PATIENCE)
        accepting.thread.join()
        assert "whoever connected has another secret" in str(accepting.error)


def test_a_listener_that_comes_late_is_waited_for_and_one_that_does_not_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
    with pytest.raises(ChannelError, match=r"edge: no connection to 127\.0\.0\.1:\d+ within 0\.2 s"):
        connect(address, SECRET, "edge", 0.2)
    found = []
    thread = threading.Thread(target=lambda: found.append(connect(address, SECRET, "edge", PATIENCE)))
    thread.start()
    time.sleep(0.1)
    listener = TcpListener(*address)
    listener.accept(SECRET, "edge", PATIENCE).close()
    thread.join()
    listener.close()
    found[0].close()


def test_secrets_and_labels_have_a_length(accepting):
    for secret, label in ((b"short", "edge"), (SECRET, ""), (SECRET, "x" * 256)):
        with pytest.raises(ConfigError, match="bytes"):
            connect(accepting.address, secret, label, PATIENCE)
        with pytest.raises(ConfigError, match="bytes"):
            accepting.listener.accept(secret, label, PATIENCE)
    accepting.expect_the_right_one()


def fake_listener(answer) -> tuple[str, int]:
    """Where somebody listens who gives `answer(bytes that came)` to whatever comes."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with server, server.accept()[0] as connection:
            connection.settimeout(PATIENCE)
            try:
                while data := connection.recv(1000):
                    connection.sendall(answer(data))
            except OSError:
                pass

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda data: b"HTTP/1.1 400 Bad Request\r\n" + b"x" * 99, "no handshake"),
        (lambda data: data[:40], "the listener has another secret"),  # the connector's own nonce, then its own proof
        (
            lambda data: b"headrac1" + b"n" * 32 if data[:1] == b"h" else hmac.digest(b"y" * 16, data, "sha256"),
            "secret",
        ),
    ],
)
def test_a_listener_without_the_secret_is_noticed(answer, said):
    with pytest.raises(HandshakeError, match=said):
        connect(fake_listener(answer), SECRET, "edge", PATIENCE)


def test_a_listener_that_says_nothing_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        with pytest.raises(HandshakeError, match="in time"):
            connect(silent.getsockname(), SECRET, "edge", 0.3)
        assert 0.29 <= time.monotonic() - started < PATIENCE / 2


def shake(relay) -> tuple[str | Exception, str | Exception]:
    """What the connector's and the listener's side of a handshake give, each message passing through `relay`."""
    connector, near = socket.socketpair()
    far, listener = socket.socketpair()

    def carry(source: socket.socket, target: socket.socket) -> None:
        source.settimeout(0.01)
        while running:
            try:
                data = source.recv(1000)
            except TimeoutError:
                continue
            if not data:
                target.shutdown(socket.SHUT_WR)
                break
            try:
                for piece in relay(source is near, data):
                    target.sendall(piece)
            except OSError:
                break  # that side has given up

    running = [True]
    carriers = [threading.Thread(target=carry, args=ends) for ends in ((near, far), (far, near))]
    results: list[str | Exception] = ["", ""]

    def run(side: int, connection: socket.socket) -> None:
        try:
            handshake = Handshake(connection, SECRET, None if side else "any", listens=bool(side))
            results[side] = complete(handshake, time.monotonic() + PATIENCE)
        except HandshakeError as error:
            results[side] = error
            connection.close()

    sides = [threading.Thread(target=run, args=item) for item in enumerate((connector, listener))]
    for thread in carriers + sides:
        thread.start()
    for thread in sides:
        thread.join()
    running.clear()
    for thread in carriers:
        thread.join()
    for one in (connector, near, far, listener):
        one.close()
    return results[0], results[1]


def bytewise(from_connector: bool, data: bytes) -> list[bytes]:
    return [data[place : place + 1] for place in range(len(data))]


def test_a_handshake_byte_by_byte_tells_the_label():
    assert shake(bytewise) == ("any", "any")


def test_a_recorded_handshake_is_of_no_use():
    recorded: list[bytes] = []

    def record(from_connector: bool, data: bytes) -> list[bytes]:
        if from_connector:
            recorded.append(data)
        return [data]

    assert shake(record) == ("any", "any")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(b"".join(recorded))
        with pytest.raises(HandshakeError, match="whoever connected has another secret"):
            complete(Handshake(theirs, SECRET, None, listens=True), time.monotonic() + PATIENCE)


@pytest.mark.parametrize("place", [8, 39, 41, 43, -1])
@pytest.mark.parametrize("from_connector", [True, False])
def test_one_changed_bit_is_noticed(from_connector, place):
    """Of the nonces, the label and the proofs."""
    seen: list[bytes] = []

    def flip(of_connector: bool, data: bytes) -> list[bytes]:
        if of_connector != from_connector:
            return [data]
        at = place if place >= 0 else len(data) - 1 if seen else None  # -1: the last of the second message, a proof
        seen.append(data)
        if at is None or at >= len(data) or (place >= 0 and len(seen) > 1):
            return [data]
        return [data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]]

    results = shake(flip)
    changed = not (not from_connector and place > 39)  # the listener's messages are shorter
    assert all(isinstance(result, str) for result in results) != changed
