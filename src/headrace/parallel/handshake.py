"""Two processes prove to each other that they know a shared secret, before anything else goes over their connection.

    connector ─▶ listener   mark, nonce c, label's length; label
    listener  ─▶ connector  mark, nonce l
    connector ─▶ listener   HMAC-SHA256(secret, "connector", label, c, l)
    listener  ─▶ connector  HMAC-SHA256(secret, "listener", label, c, l)

Challenge and response with nonces of both sides (ISO/IEC 9798-4, mutual authentication): neither a recorded exchange
nor the other side's own proof is of use. It says who is there, and hides nothing: what follows goes over the wire as it
is.
"""

from __future__ import annotations

import hmac
import secrets
import select
import socket
import time
from collections.abc import Generator

from ..errors import ConfigError, HandshakeError

MIN_SECRET_BYTES = 16
MAX_LABEL_BYTES = 255
_MARK = b"headrac1"
_NONCE_BYTES = _PROOF_BYTES = 32

_Steps = Generator[tuple[bytes, int], bytes, str]  # yields (bytes to send, bytes wanted), returns the label


class Handshake:
    """One side's handshake over a connection that it makes non-blocking: call `advance` whenever that is readable.
    `label` is what the connection is for; None accepts any, and `advance` tells it. ConfigError where the secret or the
    label is of a wrong length."""

    def __init__(self, connection: socket.socket, secret: bytes, label: str | None, *, listens: bool) -> None:
        check_lengths(secret, label)
        connection.setblocking(False)
        self.connection = connection
        self._steps = _listen(secret, label) if listens else _connect(secret, label or "")
        self._got = b""
        self._wanted = self._send(next(self._steps))

    def advance(self) -> str | None:
        """Do what can be done without waiting. The label once both sides are sure of each other, None before.
        HandshakeError where the other side is not who it should be."""
        try:
            while True:
                while len(self._got) < self._wanted:
                    try:
                        data = self.connection.recv(self._wanted - len(self._got))
                    except BlockingIOError:
                        return None
                    except OSError as error:
                        raise _broken(error) from None
                    if not data:
                        raise HandshakeError("the other side hung up: it has another secret, or expects another label")
                    self._got += data
                got, self._got = self._got, b""
                self._wanted = self._send(self._steps.send(got))
        except StopIteration as end:
            return end.value

    def _send(self, step: tuple[bytes, int]) -> int:
        data, wanted = step
        try:
            if data and self.connection.send(data) != len(data):  # a new connection has room for these few bytes
                raise HandshakeError("the other side does not take the handshake's bytes")
        except OSError as error:
            raise _broken(error) from None
        return wanted


def check_lengths(secret: bytes, label: str | None) -> None:
    """ConfigError where a secret or a label is too short or too long."""
    if len(secret) < MIN_SECRET_BYTES:
        raise ConfigError(f"a secret has at least {MIN_SECRET_BYTES} bytes, this one has {len(secret)}")
    if label is not None and not 1 <= len(label.encode()) <= MAX_LABEL_BYTES:
        raise ConfigError(f"a connection's label has 1 to {MAX_LABEL_BYTES} bytes, got {label!r:.80}")


def complete(handshake: Handshake, deadline: float) -> str:
    """Finish a handshake, by a moment of time.monotonic. Returns the label. HandshakeError as `Handshake.advance`
    raises, or where it takes too long."""
    poll = select.poll()
    poll.register(handshake.connection, select.POLLIN)
    while (label := handshake.advance()) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise HandshakeError("the other side did not finish the handshake in time; is it Headrace?")
        poll.poll(left * 1e3 + 1)
    return label


def _connect(secret: bytes, label: str) -> _Steps:
    ours, name = secrets.token_bytes(_NONCE_BYTES), label.encode()
    answer = yield _MARK + ours + bytes([len(name)]) + name, len(_MARK) + _NONCE_BYTES
    theirs = _after_mark(answer)
    proof = yield _proof(secret, b"connector", name, ours, theirs), _PROOF_BYTES
    if not hmac.compare_digest(proof, _proof(secret, b"listener", name, ours, theirs)):
        raise HandshakeError(f"{label}: the listener has another secret")
    return label


def _listen(secret: bytes, expected: str | None) -> _Steps:
    hello = yield b"", len(_MARK) + _NONCE_BYTES + 1
    theirs, length = _after_mark(hello[:-1]), hello[-1]
    name = yield b"", length
    ours = secrets.token_bytes(_NONCE_BYTES)
    proof = yield _MARK + ours, _PROOF_BYTES
    if not hmac.compare_digest(proof, _proof(secret, b"connector", name, theirs, ours)):
        raise HandshakeError("whoever connected has another secret")
    label = name.decode(errors="replace")
    if expected is not None and label != expected:
        raise HandshakeError(f"a connection for {label!r} came where one for {expected!r} is expected")
    yield _proof(secret, b"listener", name, theirs, ours), 0
    return label


def _broken(error: OSError) -> HandshakeError:
    return HandshakeError(f"the connection broke during the handshake: {error.strerror or error}")


def _after_mark(data: bytes) -> bytes:
    if data[: len(_MARK)] != _MARK:
        raise HandshakeError("what came is no handshake of Headrace's")
    return data[len(_MARK) :]


def _proof(secret: bytes, role: bytes, label: bytes, connector: bytes, listener: bytes) -> bytes:
    # All parts but the label have a fixed length for their role, so no two exchanges give the same bytes.
    return hmac.digest(secret, _MARK + role + connector + listener + label, "sha256")
