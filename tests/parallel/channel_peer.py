"""The other process of the tests of channels: an end of a channel, as JSON on standard input says, that streams
messages, or reads and checks them, until the channel ends; then it prints why."""

from __future__ import annotations

import json
import sys

import numpy as np

from headrace.errors import ChannelError
from headrace.parallel.channel import Edge, open_receiver, open_sender
from headrace.parallel.shm import ShmFds
from headrace.parallel.tcp import connect
from headrace.processes import die_with_parent


def message(number: int, size: int) -> np.ndarray:
    """What the stream's message of this number holds: every byte tells a torn or mistaken one."""
    return np.full((number % 3 + 1, size // 4), number % 251 + 1, np.uint8)


def main() -> None:
    die_with_parent()
    spec = json.load(sys.stdin)
    edge = Edge(**spec["edge"])
    where = tuple(spec["where"])
    if spec["transport"] == "shm":
        where = ShmFds(*where)
    elif spec["transport"] == "tcp":
        where = connect((where[0], where[1]), bytes.fromhex(spec["secret"]), edge.name, 20)
    end = (open_sender if spec["role"] == "sender" else open_receiver)(spec["transport"], where, edge)
    print("open", flush=True)
    number = 0
    try:
        while True:
            if spec["role"] == "sender":
                end.send(number, message(number, edge.max_bytes))
            else:
                found, array = end.receive(None)
                assert found == number and np.array_equal(array, message(number, edge.max_bytes)), found
            number += 1
    except ChannelError as error:
        print(error, flush=True)
    end.close()


if __name__ == "__main__":
    main()
