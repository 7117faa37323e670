"""What the engine (the coordinator) and the ranks of a split model say to each other, over one connection each.

coordinator ─▶ rank   Start, Connect, Run, Skip, Reset, Disconnect, Stop
rank ─▶ coordinator   Beat, Ready, Listening, Connected, Torn, Answer, Spans, Broke

One that joins from another host says Hello first, waits for its Start, and answers each Ping with a Pong. The ranks of
a replica there find each other by Meets and Mesh.
"""

from __future__ import annotations

import msgspec
import numpy as np

from ..config import Settings
from ..trace import StageSpan
from ..types import Step, StepResult
from .wire import decode_array, encode_array


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank stands in the plan."""

    stage: int
    stages: int
    replica: int
    rank: int
    ranks: int

    def __str__(self) -> str:
        rank = f" rank {self.rank}" if self.ranks > 1 else ""
        return f"stage {self.stage} replica {self.replica}{rank}"


class Start(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Load these layers and be ready. With several ranks the message brings the descriptor of their shared memory, or
    of one connection to each other rank."""

    model: str
    settings: Settings  # what concerns kernels, pages and steps
    place: Place
    layers: tuple[int, int]  # first, past the last
    pages: tuple[int, ...]  # of each of this stage's KV pools, the trash page included
    first_pool: int  # its place in a path
    max_context: int
    max_logit_rows: int
    threads: int  # 0: left open until it is known how many cores there are
    cores: tuple[int, ...]  # empty: wherever the system likes
    heartbeat: float  # seconds of silence after which the rank counts as dead
    fingerprint: str = ""  # of the model's files, and
    kernels: str = ""  # the op set's name: both for a rank on another host


class Connect(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Open an end of an edge. `shm` brings its descriptors; of `tcp` and `gloo` the receiver listens, and the sender
    gets its address. `within`: it leads from the first rank of a replica to another. `host`: where to listen, if not at
    the address that leads to the coordinator. `secret`: for ranks of other hosts only the salt of it."""

    edge: int
    name: str
    transport: str
    sends: bool
    within: bool
    max_bytes: int
    messages: int
    address: tuple[str, int] | None = None
    secret: bytes = b""
    host: str = ""
    patience: float = 1.0  # seconds of silence after which the other end counts as gone


class Disconnect(msgspec.Struct, frozen=True, tag=True, array_like=True):
    edges: tuple[int, ...]


class Run(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Compute a step. `source`: whether its hidden states come from another process; `target`: the edge to send its own
    to."""

    step: Step
    source: bool
    target: int | None


class Skip(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """These steps will not get their hidden states, or nobody wants them any more."""

    numbers: tuple[int, ...]


class Reset(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Forget every sequence, and every step before `number`."""

    number: int


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """End."""


class Ping(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Say what time it is."""

    time: float  # of the coordinator's clock


class Mesh(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Join the other ranks of the replica: `addresses`: where each listens for this one; `sizes`: of the GroupSizes."""

    name: str
    addresses: dict[int, tuple[str, int]]
    sizes: tuple[int, ...]
    salt: bytes
    patience: float


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A worker that joined is not wanted."""

    reason: str


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A worker has joined from another host, of this name."""

    version: str
    name: str
    cores: int
    pid: int


class Meets(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Where this rank listens for each of the others of its replica."""

    addresses: dict[int, tuple[str, int]]


class Pong(msgspec.Struct, frozen=True, tag=True, array_like=True):
    asked: float  # the Ping's time
    time: float  # of the rank's clock


class Beat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A sign of life."""

    time: float  # of the rank's clock


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    pid: int


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The rank cannot start: the error's class, and its text."""

    kind: str
    message: str


class Listening(msgspec.Struct, frozen=True, tag=True, array_like=True):
    edge: int
    address: tuple[str, int]


class Connected(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An end of an edge is open, or `error` says why it is not."""

    edge: int
    error: str | None = None


class Torn(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An edge broke that the coordinator had not asked to close."""

    edge: int


class Answer(msgspec.Struct, frozen=True, tag=True, array_like=True):
    result: StepResult


class Spans(msgspec.Struct, frozen=True, tag=True, array_like=True):
    spans: list[StageSpan]


class Broke(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A step failed here, and what this rank knows is in doubt."""

    number: int
    error: str


ToRank = Start | Connect | Disconnect | Run | Skip | Reset | Stop | Ping | Mesh | Refused
FromRank = Beat | Ready | Failed | Listening | Connected | Torn | Answer | Spans | Broke | Hello | Meets | Pong

encoder = msgspec.msgpack.Encoder(enc_hook=encode_array)
to_rank = msgspec.msgpack.Decoder(ToRank, dec_hook=decode_array)
from_rank = msgspec.msgpack.Decoder(FromRank, dec_hook=decode_array)

NO_HIDDEN = np.empty(0, np.uint8)  # in place of hidden states: the leader of the ranks skips the step
