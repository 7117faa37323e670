"""Several hosts: workers that join over the network, in processes of their own, and in network namespaces.

pytest tests/engine/test_hosts.py            # over the loopback
pytest tests/engine/test_hosts.py -m slow    # with cut links (root and iproute2), gloo, and much else
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress

import pytest
from tests.engine.hosts import hosts, network, why_no_namespaces
from tests.tiny import write_tiny

from headrace import LLM, SamplingParams, __version__
from headrace.errors import ConfigError, HandshakeError
from headrace.kernels import native
from headrace.parallel.handshake import Handshake
from headrace.parallel.joining import JOIN_LABEL, channel_secret, parse_address, read_secret
from headrace.workers.clock import Clock
from headrace.workers.control import Hello, Ping, Pong, Refused, to_rank
from headrace.workers.link import Link
from headrace.workers.lobby import ACCEPTS, MAX_HANDSHAKES, Lobby

ISAS = [] if native.missing() else list(native.supported_isas())
NO_NAMESPACES = why_no_namespaces()
namespaces = pytest.mark.skipif(NO_NAMESPACES is not None, reason=str(NO_NAMESPACES))

PROMPTS = ["The sky is", "Water flows downhill, and", "One", "In a mill the wheel"]
PARAMS = [
    {"temperature": 0, "max_tokens": 120},
    {"temperature": 0.9, "seed": 5, "max_tokens": 90},
    {"temperature": 0, "max_tokens": 60},
    {"temperature": 1.2, "top_k": 40, "seed": 6, "max_tokens": 120},
]
WORK = {"prompts": PROMPTS, "params": PARAMS}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("hosts") / "tiny.gguf", layers=4)


@pytest.fixture(scope="module")
def expected(model):
    """The tokens of one process."""
    with LLM(str(model), threads=1) as llm:
        params = [SamplingParams(ignore_eos=True, **one) for one in PARAMS]
        return [list(output.token_ids) for output in llm.generate(PROMPTS, params)]


def listening(coordinator, name: str = "b") -> str:
    """The address at which a coordinator waits, once it has said so."""
    return coordinator.wait_for(rf"listening at (\S+), waiting for .*from host {name}")[1]


# -- over the loopback -------------------------------------------------------------------------------------------------


def test_a_worker_comes_late_is_killed_and_joins_the_next_coordinator(model, expected, tmp_path):
    with hosts(tmp_path) as started:
        first = started.coordinator(model, "0-1 | 2-3 @b")
        address = listening(first)
        worker = started.worker(address, "b")
        worker.wait_for("joined")
        assert "@b; channel=tcp" in first.ready()
        assert first.obey(**WORK)["tokens"] == expected
        assert first.obey(kill=[1, 0], **WORK)["tokens"] == expected
        assert first.obey(marks="lost")["marks"] == ["hung up"]
        spans = first.obey(spans=True)
        assert {span["stage"] for span in spans["spans"]} == {0, 1}
        first.send_signal(signal.SIGKILL)
        worker.wait_for("joining again")
        second = started.coordinator(model, "0-1 @b | 2-3", address)
        second.ready()
        assert second.obey(**WORK)["tokens"] == expected
        worker.send_signal(signal.SIGTERM)
        assert worker.process.wait(10) == 0
        second.send_signal(signal.SIGKILL)
        started.wait_until_none_is_left()


def test_ranks_of_a_replica_meet_on_another_host(model, tmp_path):
    def tokens(coordinator) -> list[list[int]]:
        coordinator.ready()
        return coordinator.obey(**WORK)["tokens"]

    with hosts(tmp_path) as started:
        far = started.coordinator(model, "0-1 | 2-3 /2 @b")
        started.worker(listening(far), "b", "--workers", "2")
        near = started.coordinator(model, "0-1 | 2-3 /2", listen=None)
        assert tokens(far) == tokens(near)


def test_a_worker_with_another_model_says_so(model, tmp_path):
    other = write_tiny(tmp_path / "tiny.gguf", layers=4, seed=1)
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 | 2-3 @b")
        worker = started.worker(listening(coordinator), "b", "--once", "--model-dir", str(other.parent))
        coordinator.wait_for("ModelFileError: .*host b: .*is another model than the coordinator's: 1 file of .* there")
        assert worker.process.wait(20) == 1


@pytest.mark.skipif(len(ISAS) < 2, reason="this machine, or this build, has one instruction set")
def test_a_worker_with_other_kernels_says_so(model, tmp_path):
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 | 2-3 @b")
        started.worker(listening(coordinator), "b", before=("env", f"HEADRACE_ISA={ISAS[-1]}"))
        coordinator.wait_for(f"ConfigError: .*host b: the kernels are native-{ISAS[-1]} here and native-{ISAS[0]}")


def test_a_host_that_is_not_in_the_plan_is_told(model, tmp_path):
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 | 2-3 @b")
        worker = started.worker(listening(coordinator), "c")
        worker.wait_for("refused by the coordinator: the plan has no replica on 'c'; it names b")
        time.sleep(1.0)
        assert len(worker.lines()) < 3  # it says so once, however often it tries
        coordinator.wait_for("the last that was refused: 127.0.0.1: the plan has no replica on 'c'")


def test_settings_that_contradict_the_plan(model, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x" * 16)
    secret.chmod(0o600)
    for message, settings in {
        "the plan has replicas on b, whose workers join over the network: give listen": {},
        "give secret_file": {"listen": "127.0.0.1:0"},
        "listen must be HOST:PORT, as in 10.0.0.1:5000, got '127.0.0.1'": {
            "listen": "127.0.0.1",
            "secret_file": secret,
        },
        "listen is for workers of other hosts, and the plan 0-1 .* names none": {
            "plan": "0-1 | 2-3",
            "listen": "127.0.0.1:0",
        },
    }.items():
        with pytest.raises(ConfigError, match=message):
            LLM(str(model), **{"plan": "0-1 | 2-3 @b", **settings})


# -- who may come in ---------------------------------------------------------------------------------------------------


@pytest.fixture
def secret_file(tmp_path):
    path = tmp_path / "secret"
    path.touch(mode=0o600)
    path.write_bytes(b"0123456789abcdef\n")
    return path


@pytest.fixture
def lobby(secret_file):
    made = Lobby("127.0.0.1:0", str(secret_file), ["b"])
    yield made
    made.close()


def turn(lobby: Lobby, done, seconds: float = 20.0) -> None:
    """Look as the executor does, until something is so."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, lobby.refused
        lobby.hear()
        lobby.look(time.monotonic(), deaf=False)
        time.sleep(0.001)


class Visitor:
    """A worker's side, without a worker."""

    def __init__(self, lobby: Lobby, secret: bytes = b"0123456789abcdef", label: str = JOIN_LABEL) -> None:
        connection = socket.create_connection(lobby.address)
        self.handshake = Handshake(connection, secret, label, listens=False)
        self.link = None

    def join(self, lobby: Lobby, name: str = "b", version: str = __version__) -> list[object]:
        """Go in and answer pings until that is enough, or we are hung up on. What else came."""
        turn(lobby, lambda: self.handshake.advance() is not None)
        self.link = link = Link(self.handshake.connection, to_rank)
        link.send(Hello(version, name, 2, 1))
        others = []

        def enough() -> bool:
            for message in link.receive():
                if isinstance(message, Ping):
                    link.send(Pong(message.time, message.time - 1000.0))
                else:
                    others.append(message)
            return link.closed or lobby.waiting(name) > 0

        turn(lobby, enough)
        return others


def test_one_who_knows_the_secret_is_taken_once(lobby):
    visitor = Visitor(lobby)
    assert visitor.join(lobby) == []
    assert lobby.waiting("b") == 1 and lobby.waiting("c") == 0
    assert lobby.take("b", 2) == [] and lobby.take("c", 1) == []
    (rank,) = lobby.take("b", 1)
    assert (rank.cores, rank.here, rank.there) == (2, "127.0.0.1", "127.0.0.1")
    assert 1000 <= rank.clock.offset < 1001
    assert lobby.take("b", 1) == [] and lobby.waiting("b") == 0
    rank.link.close()


def test_wrong_secrets_labels_garbage_and_silence_hold_up_nobody(lobby):
    quiet = [socket.create_connection(lobby.address) for _ in range(MAX_HANDSHAKES)]
    garbage = [socket.create_connection(lobby.address) for _ in range(4)]
    for connection in garbage:
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
    liars = [Visitor(lobby, b"another secret, as long"), Visitor(lobby, label="edge 0")]
    visitor = Visitor(lobby)
    assert visitor.join(lobby) == []
    assert lobby.waiting("b") == 1
    for liar in liars:
        with pytest.raises(HandshakeError):
            turn(lobby, lambda handshake=liar.handshake: handshake.advance() is not None)
    for connection in quiet + garbage:
        connection.close()


def test_a_flood_takes_little_of_a_look(lobby):
    flood = [socket.create_connection(lobby.address) for _ in range(100)]
    lobby.look(time.monotonic(), deaf=False)
    assert len(lobby._handshakes) == ACCEPTS
    turn(lobby, lambda: len(lobby._handshakes) == MAX_HANDSHAKES)
    visitor = Visitor(lobby)
    assert visitor.join(lobby) == []
    assert len(lobby._handshakes) <= MAX_HANDSHAKES
    for connection in flood:
        connection.close()


def test_slow_handshakes_end(lobby):
    connection = socket.create_connection(lobby.address)
    connection.sendall(b"headrac1")
    turn(lobby, lambda: lobby._handshakes)
    lobby.look(time.monotonic() + 60, deaf=False)
    assert not lobby._handshakes and "did not finish" in lobby.refused
    with suppress(ConnectionResetError):
        assert connection.recv(1) == b""
    connection.close()


def test_a_guest_that_falls_silent_is_dismissed_unless_nobody_listened(lobby):
    visitor = Visitor(lobby)
    visitor.join(lobby)
    lobby.look(time.monotonic() + 1000, deaf=True)  # sends a ping, which stays unanswered
    lobby.look(time.monotonic() + 2000, deaf=True)
    assert lobby.waiting("b") == 1
    lobby.look(time.monotonic() + 3000, deaf=False)
    assert lobby.waiting("b") == 0 and "silent" in lobby.refused


def test_another_version_or_another_host_is_refused(lobby):
    assert Visitor(lobby).join(lobby, version="0.0") == [
        Refused(f"headrace 0.0 there, {__version__} here; install the same version")
    ]
    assert Visitor(lobby).join(lobby, name="c") == [Refused("the plan has no replica on 'c'; it names b")]
    assert lobby.waiting("b") == lobby.waiting("c") == 0


def test_secret_files(secret_file):
    assert read_secret(secret_file) == b"0123456789abcdef"
    assert channel_secret(b"0" * 16, b"1" * 16) != channel_secret(b"0" * 16, b"2" * 16)
    secret_file.chmod(0o644)
    with pytest.raises(ConfigError, match=r"is open to all users \(mode 644\); chmod 600"):
        read_secret(secret_file)
    secret_file.chmod(0o600)
    for data, size in ((b"short\n", 5), (b" " * 30, 0), (b"x" * 5000, 4097)):
        secret_file.write_bytes(data)
        with pytest.raises(ConfigError, match=f"has {size}; make one"):
            read_secret(secret_file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_secret(secret_file.with_name("none"))
    os.mkfifo(secret_file.with_name("pipe"), 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        read_secret(secret_file.with_name("pipe"))


def test_addresses():
    assert parse_address("a.example:5000", "listen") == ("a.example", 5000)
    assert parse_address("[::1]:0", "listen") == ("::1", 0)
    for text in ("a", "a:", ":5", "a:65536", "a:-1", "a:x"):
        with pytest.raises(ConfigError, match="listen must be HOST:PORT"):
            parse_address(text, "listen")


def test_a_clock_keeps_the_best_round_trip(monkeypatch):
    clock, now = Clock(), 100.0
    monkeypatch.setattr("headrace.workers.clock.time.monotonic", lambda: now)
    for trip, late in ((0.5, 0.4), (0.01, 0.005), (0.2, 0.0)):  # the answer is given `late` after the ping
        ping = clock.ping()
        pong = Pong(ping.time, ping.time + late - 7.0)
        now += trip
        clock.take(pong)
    assert clock.offset == pytest.approx(7.0) and clock.trips == 3
    now += 10_000  # clocks drift: an old round trip is worth less than a new one
    ping, now = clock.ping(), now + 0.02
    clock.take(Pong(ping.time, ping.time + 0.01 - 7.5))
    assert clock.offset == pytest.approx(7.5)


# -- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp", "gloo"])
def test_every_transport_gives_the_same_tokens(model, expected, tmp_path, transport):
    if transport == "gloo":
        pytest.importorskip("torch")
    with hosts(tmp_path) as started:
        near = started.coordinator(model, f"0-0 x2 | 1-2 | 3-3; channel={transport}", listen=None)
        near.ready()
        assert near.obey(**WORK)["tokens"] == expected
        assert near.obey(kill=[1, 0], **WORK)["tokens"] == expected


@pytest.mark.slow
def test_gloo_between_hosts(model, expected, tmp_path):
    pytest.importorskip("torch")
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 @b | 2-3; channel=gloo")
        started.worker(listening(coordinator), "b")
        coordinator.ready()
        assert coordinator.obey(**WORK)["tokens"] == expected


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_its_replica_with_it_and_both_come_back(model, tmp_path):
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 | 2-3 /2 @b")
        started.worker(listening(coordinator), "b", "--workers", "2")
        coordinator.ready()
        quiet = coordinator.obey(**WORK)["tokens"]
        before = {one[3] for one in coordinator.obey(wait=3)["status"] if one[0] == 1}
        assert coordinator.obey(kill=[1, 0], **WORK)["tokens"] == quiet
        after = {one[3] for one in coordinator.obey(wait=3)["status"] if one[0] == 1}
        assert len(before) == len(after) == 2 and not before & after


@pytest.mark.slow
def test_two_coordinators_with_one_secret_do_not_mix(model, expected, tmp_path):
    with hosts(tmp_path) as started:
        both = [started.coordinator(model, plan) for plan in ("0-1 | 2-3 @b", "0-0 @b | 1-2 @c | 3-3")]
        for coordinator, names in zip(both, (("b",), ("b", "c")), strict=True):
            address = listening(coordinator)
            for name in names:
                started.worker(address, name)
        for coordinator in both:
            coordinator.ready()
        for _ in range(3):
            for coordinator in both:
                assert coordinator.obey(**WORK)["tokens"] == expected


@pytest.mark.slow
def test_a_stopped_worker_is_noticed_and_another_takes_its_place(model, expected, tmp_path):
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 | 2-3 @b; heartbeat=0.5")
        worker = started.worker(listening(coordinator), "b", "--workers", "2")
        coordinator.ready()
        pids = {one[3] for one in coordinator.obey(wait=2)["status"]}
        (guest,) = [pid for pid in pids if parent_of(pid) == worker.process.pid]
        stop = ["kill", "-STOP", str(guest)]
        assert coordinator.obey(run=[stop], **WORK)["tokens"] == expected
        (lost,) = coordinator.obey(marks="lost")["marks"]
        assert lost.startswith("has been silent for ")
        os.kill(guest, signal.SIGCONT)


def parent_of(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="time namespaces need root, unshare")
def test_spans_are_in_the_coordinator_s_time(model, expected, tmp_path):
    ahead = ("unshare", "--time", "--monotonic", "5000", "--fork", "--kill-child")
    if subprocess.run([*ahead, "true"], capture_output=True).returncode:
        pytest.skip("this system has no time namespaces")
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 | 2-3 @b")
        started.worker(listening(coordinator), "b", before=ahead)
        coordinator.ready()
        assert coordinator.obey(**WORK)["tokens"] == expected
        found = coordinator.obey(spans=True)
        steps, checked = found["steps"], 0
        for span in found["spans"]:
            if span["stage"] == 1 and (times := steps.get(str(span["step"]))):
                assert times[0] - 0.1 < span["received"] <= span["started"] <= span["ended"] < times[1] + 0.1
                checked += 1
        assert checked > 50


# -- network namespaces ------------------------------------------------------------------------------------------------


@pytest.fixture
def net():
    with network(2) as made:
        yield made


@namespaces
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["0-1 @a | 2-3 @b", "0-0 | 1-2 @a + @b | 3-3", "0-1 @b | 2-3", "* /2 @a"])
def test_hosts_give_the_tokens_of_one_process(model, expected, tmp_path, net, plan):
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, plan, "0.0.0.0:5000", net.inside(0))
        for number, name in ((1, "a"), (1, "a"), (2, "b")):
            started.worker(f"10.77.{number}.1:5000", name, before=net.inside(number))
        coordinator.ready()
        tokens = coordinator.obey(**WORK)["tokens"]
        if "/2" in plan:
            near = started.coordinator(model, "* /2", listen=None)
            near.ready()
            expected = near.obey(**WORK)["tokens"]
        assert tokens == expected


@namespaces
@pytest.mark.slow
@pytest.mark.parametrize("plan", ["0-3 @a + @b", "0-1 | 2-3 @a + @b", "0-1 @a + @b | 2-3"])
def test_a_cut_link_leaves_the_other_path(model, expected, tmp_path, net, plan):
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, plan, "0.0.0.0:5000", net.inside(0))
        workers = [
            started.worker(f"10.77.{number}.1:5000", name, before=net.inside(number))
            for number, name in ((1, "a"), (2, "b"))
        ]
        coordinator.ready()
        replicas = 2 if plan.startswith("0-3") else 3
        coordinator.obey(wait=replicas)
        assert coordinator.obey(run=[net.link(1, "down")], **WORK)["tokens"] == expected
        (lost,) = coordinator.obey(marks="lost")["marks"]
        assert lost.startswith("has been silent for 1.")
        workers[0].wait_for("joining again|trying on")  # it has noticed too
        coordinator.obey(run=[net.link(1, "up")], **WORK)
        coordinator.obey(wait=replicas)  # and is back
        assert coordinator.obey(**WORK)["tokens"] == expected


@namespaces
@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "gloo"])
def test_requests_wait_for_the_only_link(model, expected, tmp_path, net, transport):
    if transport == "gloo":
        pytest.importorskip("torch")
    with hosts(tmp_path) as started:
        plan = f"0-1 @a | 2-3 @b; channel={transport}"
        coordinator = started.coordinator(model, plan, "0.0.0.0:5000", net.inside(0))
        for number, name in ((1, "a"), (2, "b")):
            started.worker(f"10.77.{number}.1:5000", name, before=net.inside(number))
        coordinator.ready()
        cut = {"run": [net.link(2, "down")], "later": net.link(2, "up")}
        assert coordinator.obey(**cut, **WORK)["tokens"] == expected


@namespaces
@pytest.mark.slow
def test_a_cut_between_two_workers_is_noticed(model, expected, tmp_path, net):
    """Both reach the coordinator, and not each other."""
    with hosts(tmp_path) as started:
        coordinator = started.coordinator(model, "0-1 @a | 2-3 @b", "0.0.0.0:5000", net.inside(0))
        for number, name in ((1, "a"), (2, "b")):
            started.worker(f"10.77.{number}.1:5000", name, before=net.inside(number))
        coordinator.ready()
        forward = "echo {} > /proc/sys/net/ipv4/ip_forward"
        cut = {"run": [["sh", "-c", forward.format(0)]], "later": ["sh", "-c", forward.format(1)]}
        assert coordinator.obey(**cut, **WORK)["tokens"] == expected
        assert any("is cut" in text for text in coordinator.obey(marks="lost")["marks"])
