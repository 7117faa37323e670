"""Channels: one directed edge between two processes, over which framed messages go in order. A file for each transport.

    frame = header, then the array's bytes in C order
    header (64 bytes, little-endian) = magic, dtype code, ndim, index, number, payload bytes, 4 dims

`number` is the caller's tag. `index` counts the channel's messages: one that is lost or doubled is noticed.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import ChannelError, ConfigError

TRANSPORTS = ("shm", "tcp", "gloo")
MAX_DIMS = 4
MAX_MESSAGE_BYTES = 1 << 32
MAX_MESSAGES = 1024

# numpy has no bfloat16: `array.view(BFLOAT16)` of uint16 bits is sent as such, `.view(np.uint16)` gives the bits back.
BFLOAT16 = np.dtype([("bfloat16", "<u2")])

_MAGIC = b"HRc1"
_GOODBYE = 0xFF  # in place of a dtype code: the last frame of a sender that closed
_HEADER = struct.Struct("<4sBB2xQQQ4Q")
HEADER_BYTES = _HEADER.size
_CODED: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f2"),
    3: BFLOAT16,
    4: np.dtype("<f8"),
    5: np.dtype("i1"),
    6: np.dtype("<i2"),
    7: np.dtype("<i4"),
    8: np.dtype("<i8"),
    9: np.dtype("u1"),
    10: np.dtype("<u2"),
    11: np.dtype("<u4"),
    12: np.dtype("<u8"),
    13: np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _CODED.items()}
DTYPES = tuple(_CODES)


@dataclass(frozen=True)
class Edge:
    """What both ends of a channel must agree on: the channel's name in errors, bytes of a message's array at most, and
    how many messages it holds unread; `timeout`: seconds that a sender waits for room. ConfigError where one is out of
    range."""

    name: str
    max_bytes: int
    messages: int
    timeout: float = 10.0

    def __post_init__(self) -> None:
        for field, value, most in (
            ("max_bytes", self.max_bytes, MAX_MESSAGE_BYTES),
            ("messages", self.messages, MAX_MESSAGES),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"{self.name}: {field} must be from 1 to {most}, got {value}")
        if not 0 <= self.timeout < math.inf:
            raise ConfigError(f"{self.name}: timeout must be 0 or more seconds, got {self.timeout}")


class Sender(Protocol):
    """The writing end, for one thread."""

    def send(self, number: int, array: np.ndarray) -> None:
        """Send an array, of a dtype of DTYPES and at most 4 dimensions, under a number below 2^64. The array may be
        changed afterwards.

        Does not wait for the receiver while fewer than the edge's `messages` are unread (`gloo` holds two more); then
        waits at most the edge's `timeout` for room. ChannelError where it stays full (send again later), where the
        array cannot be sent, and once the receiver closed or died. A message that was underway then is lost.
        """
        ...

    def close(self) -> None:
        """Let go of the channel. What was sent stays to be received: always by `shm`; the others take at most a second
        to pass it on. Closing twice does nothing."""
        ...


class Receiver(Protocol):
    """The reading end, for one thread."""

    def receive(self, timeout: float | None) -> tuple[int, np.ndarray] | None:
        """The next message, whole: its number, and its array as a view that is valid until the next call of this
        method; copy what must stay. None where none came within `timeout` seconds (None: wait for ever).

        ChannelError once the sender closed or died and what it sent is read, and where what came is no message: then
        the channel is of no more use.
        """
        ...

    def fileno(self) -> int:
        """A descriptor to poll (level-triggered): readable whenever a message may be waiting, or the sender is gone."""
        ...

    def close(self) -> None:
        """Let go of the channel: the sender's next message fails. Closing twice does nothing."""
        ...


def open_sender(transport: str, where: Any, edge: Edge) -> Sender:
    """The sending end of a channel.

    `where`: for "shm" its ShmFds, for "tcp" a connection from tcp.connect or TcpListener.accept, for "gloo" a listening
    socket at one end and its address at the other. The end owns these and closes them. ConfigError where the transport
    is not there; ChannelError where the other end does not come.
    """
    if transport == "shm":
        from .shm import ShmSender as end
    elif transport == "tcp":
        from .tcp import TcpSender as end
    elif transport == "gloo":
        from .gloo import GlooSender as end
    else:
        raise _unknown(transport)
    return end(where, edge)


def open_receiver(transport: str, where: Any, edge: Edge) -> Receiver:
    """The receiving end of a channel; `where` and errors as in `open_sender`."""
    if transport == "shm":
        from .shm import ShmReceiver as end
    elif transport == "tcp":
        from .tcp import TcpReceiver as end
    elif transport == "gloo":
        from .gloo import GlooReceiver as end
    else:
        raise _unknown(transport)
    return end(where, edge)


def _unknown(transport: str) -> ConfigError:
    return ConfigError(f"{transport!r:.40} is not a transport; transports are {', '.join(TRANSPORTS)}")


# -- frames, for the transports ----------------------------------------------------------------------------------------


def dtype_code(edge: Edge, number: int, array: np.ndarray) -> int:
    """The code of an array's dtype. ChannelError where the channel cannot carry the array, or the number."""
    code = _CODES.get(array.dtype)
    if code is None or array.ndim > MAX_DIMS or array.nbytes > edge.max_bytes or not 0 <= number < 1 << 64:
        raise _refusal(edge, number, array)
    return code


def _refusal(edge: Edge, number: int, array: np.ndarray) -> ChannelError:
    if not 0 <= number < 1 << 64:
        return ChannelError(f"{edge.name}: message number {number} does not fit 64 bits without a sign")
    if array.dtype not in _CODES:
        names = ", ".join(dtype.names[0] if dtype.names else dtype.name for dtype in DTYPES)
        return ChannelError(f"{edge.name}: arrays of {array.dtype} are not carried; those of {names} are")
    if array.ndim > MAX_DIMS:
        return ChannelError(f"{edge.name}: {array.ndim} dimensions; an array has at most {MAX_DIMS}: reshape it")
    return ChannelError(
        f"{edge.name}: an array of {array.nbytes} bytes, where a message has at most {edge.max_bytes}; send fewer rows"
    )


def pack_header(buffer: Any, offset: int, code: int, index: int, number: int, array: np.ndarray) -> None:
    """Write an array's header at an offset of a writable buffer."""
    shape, ndim = array.shape, array.ndim
    dims = shape if ndim == MAX_DIMS else shape + (0,) * (MAX_DIMS - ndim)
    _HEADER.pack_into(buffer, offset, _MAGIC, code, ndim, index, number, array.nbytes, *dims)


def pack_goodbye(buffer: Any, offset: int, index: int) -> None:
    """Write the header of a sender's last frame."""
    _HEADER.pack_into(buffer, offset, _MAGIC, _GOODBYE, 0, index, 0, 0, 0, 0, 0, 0)


def unpack_header(edge: Edge, buffer: Any, offset: int, index: int) -> tuple[int, np.dtype, tuple[int, ...], int]:
    """(number, dtype, shape, bytes) of the header at an offset, all checked. ChannelError where it is not that of
    message `index`, or is the sender's goodbye."""
    magic, code, ndim, found, number, size, *dims = _HEADER.unpack_from(buffer, offset)
    if magic != _MAGIC or found != index:
        raise ChannelError(f"{edge.name}: no header of message {index}, but of {found} with mark {magic!r}; {_ANEW}")
    if code == _GOODBYE:
        raise gone(edge)
    dtype = _CODED.get(code)
    if dtype is None or ndim > MAX_DIMS:
        raise ChannelError(f"{edge.name}: a header with dtype code {code} and {ndim} dimensions; {_ANEW}")
    if size > edge.max_bytes:
        raise ChannelError(
            f"{edge.name}: a message of {size} bytes was announced, where at most {edge.max_bytes} are read; give both "
            "ends the same max_bytes"
        )
    shape = tuple(dims[:ndim])
    if math.prod(shape) * dtype.itemsize != size or (not size and _overflows(shape)):
        raise ChannelError(f"{edge.name}: a header with shape {shape} of {dtype} and {size} bytes; {_ANEW}")
    return number, dtype, shape, size


def _overflows(shape: tuple[int, ...]) -> bool:
    """Whether numpy refuses an empty array of this shape."""
    return math.prod(dim or 1 for dim in shape) >= 1 << 58


def payload_bytes(array: np.ndarray) -> np.ndarray:
    """An array's bytes in C order: uint8 [nbytes], a view where it is laid out so."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


# -- errors, for the transports ----------------------------------------------------------------------------------------

_ANEW = "close both ends and open the channel anew"


def gone(edge: Edge) -> ChannelError:
    return ChannelError(f"{edge.name}: the other end is gone; {_ANEW} with its replacement")


def closed(edge: Edge) -> ChannelError:
    return ChannelError(f"{edge.name}: this end is closed; open the channel anew")


def full(edge: Edge) -> ChannelError:
    return ChannelError(
        f"{edge.name}: {edge.messages} messages stayed unread for {edge.timeout:g} s; see what the receiver does, or "
        "send fewer at once"
    )
