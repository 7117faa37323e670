"""An engine that dies or stands still under load: every stream ends complete, with the tokens of the quiet run."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.serve.harness import ServerProcess

JOBS: list[dict[str, Any]] = [
    {"prompt": "Tell me about rivers.", "max_tokens": 90, "temperature": 0.9, "seed": 11},
    {"prompt": "Count: one, two,", "max_tokens": 90, "temperature": 0},
    {"prompt": "penalties " * 20, "max_tokens": 80, "temperature": 1.0, "seed": 5, "frequency_penalty": 0.8,
     "presence_penalty": 0.4, "repetition_penalty": 1.1, "min_tokens": 60},
    {"prompt": "Many samples", "max_tokens": 40, "n": 3, "seed": 9, "ignore_eos": True},
    {"prompt": "Scored prompt " * 8, "max_tokens": 50, "temperature": 0.7, "seed": 2, "logprobs": 1},
    {"prompt": "With a stop string", "max_tokens": 120, "temperature": 0.8, "seed": 4, "stop": ["zebra", "the end of"]},
    {"prompt": ["two prompts", "in one request"], "max_tokens": 60, "temperature": 0.5, "seed": 6},
]  # fmt: skip


@pytest.fixture(scope="module")
def mortal(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("mortal") / "log"
    with ServerProcess(f"smol={smollm2}", "--threads", "2", "--max-restarts", "50", log=log) as server:
        yield server


class Client(threading.Thread):
    """One stream: its tokens, text and logprobs by choice, and when each event came."""

    def __init__(self, server: ServerProcess, job: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.server, self.job = server, job
        self.result: dict[int, tuple[list[int], str, list[float], list[str | None]]] = {}
        self.times: list[float] = []
        self.complete = False

    def run(self) -> None:
        body = {**self.job, "return_token_ids": True}
        for event in self.server.stream("/v1/completions", body, timeout=60):
            self.times.append(time.monotonic())
            if event == "[DONE]":
                self.complete = True
                continue
            assert "error" not in event, event
            for choice in event["choices"]:
                tokens, text, logprobs, finish = self.result.setdefault(choice["index"], ([], "", [], []))
                tokens += choice["token_ids"]
                logprobs += (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]
                finish.append(choice["finish_reason"])
                self.result[choice["index"]] = tokens, text + choice["text"], logprobs, finish


def all_streams(server: ServerProcess, disturb: Any = None) -> list[Client]:
    clients = [Client(server, job) for job in JOBS]
    for client in clients:
        client.start()
    if disturb is not None:
        disturb(clients)
    for client in clients:
        client.join(60)
        assert client.complete
    return clients


def meaning(clients: list[Client]) -> list[Any]:
    return [
        {
            index: (tokens, text, logprobs, finish[-1])
            for index, (tokens, text, logprobs, finish) in client.result.items()
        }
        for client in clients
    ]


def wait_for_events(clients: list[Client], more: int) -> None:
    """Until every stream has had so many more events, or is complete."""
    deadline, before = time.monotonic() + 30, [len(client.times) for client in clients]
    while any(len(c.times) < had + more and not c.complete for c, had in zip(clients, before, strict=True)):
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_every_stream_goes_on_with_the_same_tokens(mortal: ServerProcess, how: signal.Signals) -> None:
    quiet = meaning(all_streams(mortal))

    def disturb(clients: list[Client]) -> None:
        for _ in range(2):
            wait_for_events(clients, 4)
            (engine,) = mortal.engine_pids()
            os.kill(engine, how)
            wait_for_events(clients, 12)
            assert mortal.engine_pids() != [engine]

    restarts = mortal.metric("engine_restarts_total")
    clients = all_streams(mortal, disturb)
    assert meaning(clients) == quiet
    assert mortal.metric("engine_restarts_total") == restarts + 2
    gap = max(b - a for client in clients for a, b in zip(client.times, client.times[1:]))
    # The goal on a quiet machine is 2 s, which the slow tests measure; here others may want the cores too.
    assert gap < 10.0, f"the longest pause of a stream was {gap:.2f} s"
    mortal.wait_idle()


def test_a_death_in_prefill_and_in_the_queue_loses_nothing(mortal: ServerProcess) -> None:
    """Killed before the first token: nobody has said anything yet, and still everyone gets the answer."""
    body = {"prompt": list(range(100, 300)), "max_tokens": 4, "temperature": 0, "logprobs": 1, "echo": True}
    quiet = mortal.post("/v1/completions", body)[1]["choices"]
    got: list[Any] = []
    threads = [threading.Thread(target=lambda: got.append(mortal.post("/v1/completions", body))) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.15)
    os.kill(mortal.engine_pids()[0], signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert [status for status, _ in got] == [200] * 6
    assert all(answer["choices"] == quiet for _, answer in got)


def test_health_tells_of_a_death(mortal: ServerProcess) -> None:
    os.kill(mortal.engine_pids()[0], signal.SIGKILL)
    deadline, states = time.monotonic() + 20, set()
    while time.monotonic() < deadline:
        status, body = mortal.call("GET", "/health")
        states.add((status, body["status"]))
        if (503, "restarting") in states and status == 200:
            break
    assert states == {(200, "ok"), (503, "restarting")}
    assert mortal.post("/v1/completions", {"prompt": "x", "max_tokens": 1})[0] == 200


def test_an_engine_that_keeps_dying_is_given_up(smollm2: Path, tmp_path: Path) -> None:
    with ServerProcess(str(smollm2), "--max-restarts", "1", log=tmp_path / "log") as server:
        for _ in range(2):
            os.kill(server.engine_pids()[0], signal.SIGKILL)
            deadline = time.monotonic() + 20
            while server.call("GET", "/health")[1]["status"] == "ok" and time.monotonic() < deadline:
                time.sleep(0.01)
            while server.call("GET", "/health")[1]["status"] == "restarting" and time.monotonic() < deadline:
                time.sleep(0.01)
        assert server.call("GET", "/health") == (503, {"status": "dead"})
        status, body = server.post("/v1/completions", {"prompt": "x"})
        assert status == 503 and body["error"]["code"] == "engine_dead"
