"""Messages between processes: a 4-byte length, then msgpack of one tagged struct. Arrays travel as dtype, shape and
raw bytes."""

from __future__ import annotations

import struct
from typing import Any, Literal

import msgspec
import numpy as np

from .. import errors
from ..config import Resolved, Settings
from ..errors import HeadraceError
from ..trace import Mark, StageSpan, StepTrace
from ..types import Event, FinishReason, Request

MAX_FRAME = 1 << 30
HEADER = struct.Struct("<I")
_DTYPES = ("float32", "int32", "int64")

HOP_SECONDS = (2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1, 1.0)  # bounds of Status.hops

Wait = Literal["sequences", "tokens", "pages", "sibling"]


class Load(msgspec.Struct, frozen=True, tag=True):
    """Open this model and be ready."""

    model: str
    settings: Settings


class Ready(msgspec.Struct, frozen=True, tag=True):
    resolved: Resolved


class EncoderReady(msgspec.Struct, frozen=True, tag=True):
    """The model is an encoder, and takes texts."""


class Embed(msgspec.Struct, frozen=True, tag=True):
    """Embed these texts, given as token ids."""

    number: int
    texts: list[list[int]]


class Embedded(msgspec.Struct, frozen=True, tag=True):
    """The vectors of a message's texts: float32 [texts, dim], of length 1."""

    number: int
    vectors: np.ndarray


class Add(msgspec.Struct, frozen=True, tag=True):
    """Queue all samples of one request."""

    requests: tuple[Request, ...]


class Finish(msgspec.Struct, frozen=True, tag=True):
    request_id: str
    sample_index: int | None
    reason: FinishReason


class Inspect(msgspec.Struct, frozen=True, tag=True):
    """Ask for a PageMap."""


class PageMap(msgspec.Struct, frozen=True, tag=True):
    """What each page of each pool holds: a byte a page, 0 free, 1 kept for its prefix, 2 held by one sequence, 3 shared
    by several. Page 0 is the trash page and always 0."""

    pools: list[bytes]


class Recall(msgspec.Struct, frozen=True, tag=True):
    """Ask for a Recent of the last seconds, with at most so many steps, spans and marks."""

    seconds: float
    most: int


class Recent(msgspec.Struct, frozen=True, tag=True):
    """What happened of late; times in seconds, time.monotonic."""

    steps: list[StepTrace]
    spans: list[StageSpan]
    marks: list[Mark]


class Scale(msgspec.Struct, frozen=True, tag=True):
    """Ask for so many replicas of a stage; answered by Scaled, before which a Status has come."""

    stage: int
    replicas: int


class Scaled(msgspec.Struct, frozen=True, tag=True):
    """`problem`: why that cannot be."""

    problem: str | None


class ReplicaStatus(msgspec.Struct, frozen=True, array_like=True):
    """A replica of a split model. `state`: starting, connecting, ready, leaving, waiting (to be started), or given up.
    Times in seconds of time.monotonic, 0 for never."""

    stage: int
    number: int
    state: str
    host: str | None
    pids: tuple[int, ...]  # of its ranks; 0 where it is not started, or on another host
    sequences: int
    in_flight: int  # steps
    pages_held: int
    pages: int
    restarts: int
    joined: float
    lost: float
    why: str  # it was lost
    busy: float  # seconds that its ranks have computed, together


class Status(msgspec.Struct, frozen=True, tag=True):
    """How a split model's stages stand: sent on every change, and each second. Sums are over an engine's life."""

    at: float
    lost_policy: str  # "wait" or "fail": what requests do while a stage has no replica
    layers: list[tuple[int, int]]  # of each stage, both included
    replicas: list[ReplicaStatus]  # by stage and number
    busy: list[float]  # of each stage, seconds that ranks have computed
    reduces: list[float]  # of each stage, seconds of sums over ranks
    hops: list[int]  # from one stage to the next, by HOP_SECONDS and above
    hop_seconds: float  # their sum

    @property
    def missing(self) -> list[int]:
        """Stages of which no replica is ready."""
        there = {one.stage for one in self.replicas if one.state == "ready"}
        return [stage for stage in range(len(self.layers)) if stage not in there]


class OpenedPart(msgspec.Struct, frozen=True, array_like=True):
    """A sequence that a step admitted, for the first time or again after a preemption."""

    handle: int
    request_id: str
    sample_index: int
    cached: int  # tokens taken from the prefix cache, or from a sibling
    length: int  # tokens that it starts with


class Report(msgspec.Struct, frozen=True, array_like=True):
    """One applied step: its times (seconds, time.monotonic, which processes of a machine share), what it was made of,
    and where the engine stood after it."""

    number: int
    rows: int
    planned: float
    submitted: float
    started: float
    ended: float
    answered: float
    applied: float
    parts: list[tuple[int, int, int]]  # of each chunk: handle, start, tokens
    opened: list[OpenedPart]
    running: int
    waiting: int
    pages_held: tuple[int, ...]  # of each pool
    pages: tuple[int, ...]  # of each pool, the trash page left out
    waits_for: Wait | None  # what the first waiting sequence lacked


class Events(msgspec.Struct, frozen=True, tag=True):
    """What came of a turn of the engine's loop: at most one such message a step."""

    events: list[Event]
    reports: list[Report] = []


class Refused(msgspec.Struct, frozen=True, tag=True):
    """A request was not queued, or (without an id) the engine cannot start: the error's class, and its text."""

    request_id: str | None
    kind: str
    message: str


ToEngine = Load | Add | Finish | Inspect | Recall | Scale | Embed
FromEngine = Ready | EncoderReady | Events | Refused | PageMap | Recent | Scaled | Status | Embedded


def error_of(refused: Refused) -> HeadraceError:
    """The error that a refusal stands for, as the door raises it."""
    return error_of_kind(refused.kind, refused.message)


def error_of_kind(name: str, message: str) -> HeadraceError:
    """An error of another process: of the class of this name, with this text."""
    kind = getattr(errors, name, HeadraceError)
    error = HeadraceError.__new__(kind if isinstance(kind, type) and issubclass(kind, HeadraceError) else HeadraceError)
    error.args = (message,)
    return error


def encode_array(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, np.ascontiguousarray(value).tobytes()
    raise NotImplementedError(f"{type(value).__name__} does not travel between processes")


def decode_array(kind: type, value: Any) -> Any:
    dtype, shape, data = value
    if kind is not np.ndarray or dtype not in _DTYPES:
        raise ValueError(f"not an array of a known dtype: {dtype!r:.40}")
    return np.frombuffer(data, dtype).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=encode_array)
to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=decode_array)
from_engine = msgspec.msgpack.Decoder(FromEngine, dec_hook=decode_array)


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
