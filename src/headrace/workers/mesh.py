"""The ranks of a replica on another host: a TCP channel from each to each, for the sums that they give each other."""

from __future__ import annotations

import select
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from ..errors import ChannelError
from ..parallel.channel import Edge, Receiver, Sender, open_receiver, open_sender
from ..parallel.group import ChannelGroup, GroupSizes
from ..parallel.joining import channel_secret
from ..parallel.tcp import TcpListener, connect
from ..parallel.watch import Watcher
from .control import Meets, Mesh, Ping, Pong, Start, ToRank
from .link import Link

CONNECT_SECONDS = 20.0
MESSAGES = 16  # that a channel holds: reductions under way, and a few


def meet(link: Link[ToRank], start: Start, host: str, secret: bytes) -> ChannelGroup:
    """Join this rank with the others of its replica, by the coordinator's help. ChannelError where one does not
    come."""
    rank, others = start.place.rank, [other for other in range(start.place.ranks) if other != start.place.rank]
    with ExitStack() as stack:
        listeners = {other: TcpListener(host) for other in others}
        for listener in listeners.values():
            stack.callback(listener.close)
        link.send(Meets({other: listener.address for other, listener in listeners.items()}))
        mesh = _mesh(link)
        key = channel_secret(secret, mesh.salt)
        pool = stack.enter_context(ThreadPoolExecutor(len(others), "headrace-mesh"))
        coming = {
            other: pool.submit(listeners[other].accept, key, f"{mesh.name} {other}>{rank}", CONNECT_SECONDS)
            for other in others
        }
        watcher, sizes = Watcher(), GroupSizes(*mesh.sizes)
        edge = Edge(f"{mesh.name} at rank {rank}", _most_bytes(sizes), MESSAGES)
        senders: list[Sender | None] = [None] * sizes.ranks
        receivers: list[Receiver | None] = [None] * sizes.ranks
        for other in others:
            connection = connect(mesh.addresses[other], key, f"{mesh.name} {rank}>{other}", CONNECT_SECONDS)
            watcher.add(connection, mesh.patience)
            senders[other] = open_sender("tcp", connection, edge)
        for other in others:
            connection = coming[other].result()
            watcher.add(connection, mesh.patience)
            receivers[other] = open_receiver("tcp", connection, edge)
    return ChannelGroup(sizes, rank, senders, receivers)


def _most_bytes(sizes: GroupSizes) -> int:
    """Of what ranks exchange: partial sums, logits, or each row's best token with its logit."""
    return max(sizes.rows * sizes.width * 4, sizes.logits * max(sizes.columns * 4, 16), 64)


def _mesh(link: Link[ToRank]) -> Mesh:
    while not link.closed:
        select.select([link], [], [])
        for message in link.receive():
            if isinstance(message, Mesh):
                return message
            if isinstance(message, Ping):
                link.send(Pong(message.time, time.monotonic()))
    raise ChannelError("the coordinator hung up while ranks met")
