"""Where workers of other hosts wait for a replica: the coordinator's listening side.

connect ─▶ handshake ─▶ Hello ─▶ a few Pings and Pongs ─▶ waits under its host's name ─▶ taken: a rank

Nobody who connects can hold up the engine or others: connections are accepted a few at a time, so many handshakes are
underway at most and each for so long, and until one has proved the secret no more than its few bytes are read.
"""

from __future__ import annotations

import ipaddress
import selectors
import socket
import time
from collections.abc import Collection
from contextlib import suppress

from .. import __version__
from ..errors import ConfigError, HandshakeError, HeadraceError
from ..parallel.handshake import Handshake
from ..parallel.joining import JOIN_LABEL, parse_address, read_secret
from ..parallel.watch import Watch
from .control import Beat, FromRank, Hello, Ping, Pong, Refused, from_rank
from .crew import Rank
from .link import Link

ACCEPTS = 8  # connections accepted at one look
MAX_HANDSHAKES = 32  # at once; one more, and the oldest is hung up on
HANDSHAKE_SECONDS = 5.0  # from connecting to Hello
MAX_GUESTS = 1024
SILENCE_SECONDS = 5.0  # without an answer to a ping, while waiting
PING_SECONDS = 1.0
FIRST_TRIPS = 4  # round trips before a guest is taken: clocks are compared


class _Guest:
    """A worker that has proved the secret."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.hello: Hello | None = None
        self.asked = 0.0  # when a ping was sent that is not answered; 0: all are
        self.deadline = rank.heard + HANDSHAKE_SECONDS  # for its Hello

    @property
    def present(self) -> bool:
        return self.hello is not None and self.rank.clock.trips >= FIRST_TRIPS


class Lobby:
    """Listens at `listen` ("host:port") for workers of these hosts, who must know the secret of a file. `address` is
    where it listens, `secret` that secret. Turned by whoever owns it: `hear` when `fileno` is readable, `look` now and
    then. ConfigError where nobody can listen there, or the file will not do."""

    def __init__(self, listen: str, secret_file: str, hosts: Collection[str]) -> None:
        self.secret, self._hosts = read_secret(secret_file), frozenset(hosts)
        host, port = parse_address(listen, "listen")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            problem = error.strerror or error
            raise ConfigError(f"cannot listen for workers at {listen}: {problem}; choose another address") from None
        self._socket.setblocking(False)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.refused = ""  # why the last one was
        self._selector = selectors.DefaultSelector()
        self._handshakes: dict[Handshake, float] = {}  # until when, oldest first
        self._guests: list[_Guest] = []

    def fileno(self) -> int:
        return self._selector.fileno()  # type: ignore[attr-defined]

    def waiting(self, host: str) -> int:
        """How many workers of a host could be taken."""
        return sum(guest.present and guest.hello.name == host for guest in self._guests if guest.hello)

    def take(self, host: str, count: int) -> list[Rank]:
        """So many workers of a host, which wait no more; none where there are fewer."""
        there = [guest for guest in self._guests if guest.present and guest.hello and guest.hello.name == host]
        if len(there) < count:
            return []
        for guest in there[:count]:
            self._guests.remove(guest)
            self._selector.unregister(guest.rank.link)
        return [guest.rank for guest in there[:count]]

    def hear(self) -> None:
        """Read what has come."""
        for key, _ in self._selector.select(0):
            if isinstance(key.data, Handshake):
                if key.data in self._handshakes:
                    self._shake(key.data)
            elif key.data in self._guests:
                self._listen_to(key.data)

    def look(self, now: float, *, deaf: bool) -> None:
        """Let in who has come, and see who is gone. `deaf`: nobody has looked or heard for some time, so that silence
        means nothing."""
        for _ in range(ACCEPTS):
            try:
                connection, address = self._socket.accept()
            except OSError:
                break
            self._greet(connection, address[0])
        for handshake in [one for one, end in self._handshakes.items() if end < now]:
            self._hang_up(handshake, "did not finish the handshake in time")
        for guest in list(self._guests):
            if deaf and guest.asked:
                guest.asked = now
            if guest.rank.link.closed:
                self._dismiss(guest)
            elif (guest.hello is None and now > guest.deadline) or (
                guest.asked and now > guest.asked + SILENCE_SECONDS
            ):
                self._dismiss(guest, "was silent for too long")
            elif not guest.asked and guest.hello is not None and now > guest.rank.heard + PING_SECONDS:
                self._ping(guest)

    def close(self) -> None:
        for handshake in list(self._handshakes):
            self._drop(handshake)
            handshake.connection.close()
        for guest in list(self._guests):
            self._dismiss(guest)
        self._selector.close()
        self._socket.close()

    # Handshakes

    def _greet(self, connection: socket.socket, address: str) -> None:
        try:
            Watch(connection, SILENCE_SECONDS)
            handshake = Handshake(connection, self.secret, JOIN_LABEL, listens=True)
        except (HandshakeError, OSError):
            connection.close()
            return
        if len(self._handshakes) == MAX_HANDSHAKES:
            self._hang_up(next(iter(self._handshakes)), "came with many others")
        self._handshakes[handshake] = time.monotonic() + HANDSHAKE_SECONDS
        self._selector.register(connection, selectors.EVENT_READ, handshake)

    def _shake(self, handshake: Handshake) -> None:
        try:
            if handshake.advance() is None:
                return
        except HandshakeError as error:
            self._hang_up(handshake, str(error))
            return
        self._drop(handshake)
        connection = handshake.connection
        try:
            here, there = connection.getsockname()[0], connection.getpeername()[0]
        except OSError:
            connection.close()
            return
        rank = Rank(Link(connection, from_rank), None, time.monotonic(), here=here, there=there)
        guest = _Guest(rank)
        self._guests.append(guest)
        self._selector.register(rank.link, selectors.EVENT_READ, guest)
        self._listen_to(guest)

    def _drop(self, handshake: Handshake) -> None:
        del self._handshakes[handshake]
        self._selector.unregister(handshake.connection)

    def _hang_up(self, handshake: Handshake, why: str) -> None:
        with suppress(OSError):
            self.refused = f"{handshake.connection.getpeername()[0]}: {why}"
        self._drop(handshake)
        handshake.connection.close()

    # Guests

    def _listen_to(self, guest: _Guest) -> None:
        try:
            messages = guest.rank.link.receive()
        except HeadraceError as error:
            self._dismiss(guest, str(error))
            return
        guest.rank.heard = time.monotonic()
        for message in messages:
            self._take_in(guest, message)
        if guest.rank.link.closed:
            self._dismiss(guest)

    def _take_in(self, guest: _Guest, message: FromRank) -> None:
        if isinstance(message, Hello) and guest.hello is None:
            if reason := self._objection(message):
                guest.rank.link.send(Refused(reason))
                self._dismiss(guest, reason)
                return
            guest.hello, guest.rank.pid, guest.rank.cores = message, message.pid, message.cores
            self._ping(guest)
        elif isinstance(message, Pong):
            guest.asked = 0.0
            guest.rank.clock.take(message)
            if not guest.present:
                self._ping(guest)
        elif not isinstance(message, Beat):
            self._dismiss(guest, f"said {type(message).__name__} before it was asked")

    def _objection(self, hello: Hello) -> str:
        if hello.version != __version__:
            return f"headrace {hello.version} there, {__version__} here; install the same version"
        if hello.name not in self._hosts:
            return f"the plan has no replica on {hello.name!r:.80}; it names {', '.join(sorted(self._hosts))}"
        if len(self._guests) > MAX_GUESTS:
            return f"{MAX_GUESTS} workers wait already"
        return ""

    def _ping(self, guest: _Guest) -> None:
        ping: Ping = guest.rank.clock.ping()
        guest.asked = ping.time
        guest.rank.link.send(ping)

    def _dismiss(self, guest: _Guest, why: str = "") -> None:
        if guest not in self._guests:
            return
        if why:
            self.refused = f"{guest.rank.there}: {why}"
        self._guests.remove(guest)
        self._selector.unregister(guest.rank.link)
        guest.rank.link.close()


def meeting_host(receiver: Rank, sender: Rank) -> str:
    """The address at which a receiver must listen to be reached by a sender; "": the one that leads to us, where it
    joined from another machine, or the loopback's."""
    if receiver.there and not _is_loopback(receiver.there):
        return ""
    return sender.here if sender.there and not _is_loopback(sender.there) else ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
