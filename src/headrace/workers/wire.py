"""Messages between processes: a 4-byte length, then msgpack of one tagged struct. Arrays travel as dtype, shape and
raw bytes."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import numpy as np

from ..config import Resolved, Settings
from ..errors import HeadraceError
from ..types import Event, FinishReason, Request

MAX_FRAME = 1 << 30
HEADER = struct.Struct("<I")
_DTYPES = ("float32", "int32", "int64")


class Load(msgspec.Struct, frozen=True, tag=True):
    """Open this model and be ready."""

    model: str
    settings: Settings


class Ready(msgspec.Struct, frozen=True, tag=True):
    resolved: Resolved


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue all samples of one request."""

    requests: tuple[Request, ...]


class Finish(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    sample_index: int | None
    reason: FinishReason


class Events(msgspec.Struct, frozen=True, tag=True):
    events: list[Event]


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request was not queued, or (without an id) the engine cannot start: the error's class, and its text."""

    request_id: str | None
    kind: str
    message: str


ToEngine = Load | Add | Finish
FromEngine = Ready | Events | Refused


def _encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes()
    raise NotImplementedError(f"{type(value).__name__} does not travel between processes")


def _decode_array(kind: type, value: Any) -> Any:
    dtype, shape, data = value
    if kind is not np.ndarray or dtype not in _DTYPES:
        raise ValueError(f"not an array of a known dtype: {dtype!r:.40}")
    return np.frombuffer(data, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_array)
to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=_decode_array)
from_engine = msgspec.msgpack.Decoder(FromEngine, dec_hook=_decode_array)


def frame(message: ToEngine | FromEngine) -> bytes:
    """The bytes to send. HeadraceError where a message is longer than a frame may be."""
    body = _encoder.encode(message)
    if len(body) > MAX_FRAME:
        raise HeadraceError(f"a message of {len(body)} bytes does not fit a frame of {MAX_FRAME}; ask for fewer logits")
    return HEADER.pack(len(body)) + body


def frame_length(header: bytes) -> int:
    """The length that a header announces, checked before anything is read. HeadraceError where it cannot be."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME:
        raise HeadraceError(f"a frame of {length} bytes was announced; at most {MAX_FRAME} are read")
    return length
