"""Split models behind the server: their tokens, what is told of their stages, and workers that die, come and go."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.harness import ServerProcess, until
from tests.serve.test_recovery import Client, all_streams, meaning, wait_for_events
from tests.serve.test_web import DASHBOARD, OF_STAGES

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.config import SchedulerConfig
from headrace.errors import CapacityError, ConfigError
from headrace.plan.plan import Plan
from headrace.schedule.pages import Pages
from headrace.schedule.routes import Routes
from headrace.schedule.scheduler import Scheduler
from headrace.serve.stages import outline
from headrace.trace import Mark, Trace
from headrace.workers.staged import RankStatus
from headrace.workers.watch import StageWatch

JOBS: list[dict[str, Any]] = [
    {"prompt": [7 * n + 1 for _ in range(20 * n + 1)], "max_tokens": 380, "ignore_eos": True, "seed": n,
     "temperature": 0 if n % 2 else 0.9}
    for n in range(6)
]  # fmt: skip
ADMIN = {"Authorization": "Bearer admin-key"}


def serving(model: str, plan: str, folder: Path, *flags: str) -> ServerProcess:
    keys = folder / "keys"
    keys.write_text("admin-key\n")
    return ServerProcess(
        f"tiny={model}", "--plan", plan, "--admin-key-file", str(keys), *flags, log=folder / "log"
    )  # fmt: skip


@pytest.fixture(scope="module")
def split(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serving(tiny_model, "0-0 x2 | 1-2 x2; heartbeat=0.5", tmp_path_factory.mktemp("split")) as server:
        yield server


@pytest.fixture(scope="module")
def quiet(tiny_model: str) -> list[list[int]]:
    """What one process says to JOBS."""
    with LLM(tiny_model, threads=1) as llm:
        return [
            llm.generate([job["prompt"]], SamplingParams(max_tokens=380, ignore_eos=True, seed=job["seed"],
                                                         temperature=job["temperature"]))[0].samples[0].token_ids
            for job in JOBS
        ]  # fmt: skip


def replicas(server: ServerProcess) -> list[dict[str, Any]]:
    """As the live view shows them; none while the engine starts."""
    stages = server.call("GET", "/live")[1].get("stages", [])
    return [{"stage": stage["stage"], **one} for stage in stages for one in stage["replicas"]]


def whole(server: ServerProcess) -> bool:
    status, body = server.call("GET", "/health")
    return status == 200 and not body["degraded"] and len(replicas(server)) > 1


def started(server: ServerProcess) -> list[Client]:
    clients = [Client(server, job) for job in JOBS]
    for client in clients:
        client.start()
    return clients


def tokens(clients: list[Client]) -> list[list[int]]:
    for client in clients:
        client.join(60)
        assert client.complete
    return [client.result[0][0] for client in clients]


def is_there(pid: int) -> bool:
    """Whether a process runs still; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- tokens, and workers that die -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_every_stream_goes_on_with_the_same_tokens(split: ServerProcess, quiet: list[list[int]], how: int):
    until(lambda: whole(split))
    engines, restarts = split.engine_pids(), split.metric("replica_restarts_total")
    clients = started(split)
    wait_for_events(clients, 3)
    os.kill(next(one["pids"][0] for one in replicas(split) if one["stage"] == 1), how)
    assert tokens(clients) == quiet
    assert split.engine_pids() == engines and not split.metric("engine_restarts_total")
    until(lambda: split.metric("replica_restarts_total") == restarts + 1)
    until(lambda: whole(split))
    split.wait_idle()


def test_a_dead_engine_leaves_no_worker(split: ServerProcess, quiet: list[list[int]]):
    until(lambda: whole(split))
    workers = [pid for one in replicas(split) for pid in one["pids"]]
    clients = started(split)
    wait_for_events(clients, 3)
    os.kill(split.engine_pids()[0], signal.SIGKILL)
    assert tokens(clients) == quiet
    until(lambda: not any(map(is_there, workers)))
    until(lambda: whole(split))
    assert not {pid for one in replicas(split) for pid in one["pids"]} & set(workers)


def test_a_drain_ends_all(tiny_model: str, quiet: list[list[int]], tmp_path: Path):
    server = serving(tiny_model, "0-0 | 1-2", tmp_path)
    processes = [*server.engine_pids(), *(pid for one in replicas(server) for pid in one["pids"])]
    clients = started(server)
    wait_for_events(clients, 3)
    assert len(processes) == 3 and server.stop() == 0
    assert tokens(clients) == quiet
    until(lambda: not any(map(is_there, processes)))


# -- what is told -----------------------------------------------------------------------------------------------------


def test_health_metrics_and_log(split: ServerProcess):
    until(lambda: whole(split))
    body = {"prompt": [[1] * 60, [2] * 60, [3] * 60, [4] * 60], "max_tokens": 30, "ignore_eos": True}
    assert split.post("/v1/completions", body)[0] == 200
    split.wait_idle()
    status, body = split.call("GET", "/health")
    two = {"ready": 2, "replicas": 2}
    assert (status, body) == (
        200,
        {"status": "ok", "stages": [{"stage": 0, **two}, {"stage": 1, **two}], "degraded": []},
    )
    until(lambda: split.metric("hop_seconds_count") > 10 and not split.metric("kv_pages"))  # told once a second
    text = split.call("GET", "/metrics")[1]
    families = {family.name: family for family in text_string_to_metric_families(text)}
    both = {("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")}
    for name, value in (("replica_up", 1), ("kv_pages", 0), ("replica_sequences", 0)):
        samples = families[f"headrace_{name}"].samples
        assert {(one.labels["stage"], one.labels["replica"]): one.value for one in samples} == dict.fromkeys(
            both, value
        )
    assert all(one.value > 10 for one in families["headrace_kv_pages_capacity"].samples)
    assert all(one.value > 0 for one in families["headrace_stage_busy_seconds"].samples)
    assert [one.value for one in families["headrace_reduce_seconds"].samples] == [0, 0]  # of one rank each
    assert split.metric("hop_seconds_count") > 10 and split.metric("hop_seconds_sum") > 0
    assert split.metric('hop_seconds_bucket{le="+Inf",') == split.metric("hop_seconds_count")
    used = {name for name in re.findall(r"headrace_\w+", DASHBOARD.read_text()) if OF_STAGES.match(name)}
    assert len(used) == 8 and used <= {re.split(r"[{ ]", line)[0] for line in text.splitlines()}
    phases = [line["phase"] for line in split.logs() if line["event"] == "phase"]
    assert {"stage 0", "stage 1"} <= set(phases)
    ready = [(line["stage"], line["replica"]) for line in split.logs() if line["event"] == "replica ready"]
    assert set(ready) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_live_view_and_the_timeline(split: ServerProcess):
    until(lambda: whole(split))
    assert split.post("/v1/completions", {"prompt": [1] * 60, "max_tokens": 50, "ignore_eos": True})[0] == 200

    def seen() -> Any:
        state = split.call("GET", "/live")[1]
        lanes = state["lanes"]
        spans = lanes["spans"] if lanes else []
        return state if {span[1] for span in spans} == {0, 1} == {span[4] for span in spans} else None

    state = until(seen)
    assert [each["layers"] for each in state["stages"]] == [[0, 0], [1, 2]]
    assert all(span[5] <= span[6] <= span[7] <= state["now"] for span in state["lanes"]["spans"])
    assert split.call("GET", "/admin/timeline")[0] == 401
    for seconds in ("0", "-1", "nan", "61", "x"):
        assert split.call("GET", f"/admin/timeline?seconds={seconds}", headers=ADMIN)[0] == 400
    status, trace = split.call("GET", "/admin/timeline?seconds=20", headers=ADMIN)
    rows = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert status == 200 and {"coordinator", "stage 0 replica 0, layers 0-0", "stage 1 replica 1, layers 1-2"} <= rows
    assert any(event.get("cat") == "hop" for event in trace["traceEvents"])


def test_a_replica_that_is_given_up_is_told_of():
    plan, trace = Plan.parse("0-0 x2 | 1-2 x2"), Trace()
    routes = Routes([lambda: [Pages(8, 4)]] * 2)
    ranks = [RankStatus(0, 0, 0, 11, "ready"), RankStatus(1, 0, 0, 12, "ready"), RankStatus(1, 1, 0, 13, "starting")]
    executor = SimpleNamespace(plan=plan, status=lambda: ranks, scale=lambda stage, replicas: None)
    watch = StageWatch(Scheduler(SchedulerConfig(), routes), executor, trace)  # type: ignore[arg-type]
    for time_, kind, stage, replica in (
        (1.0, "joined", 0, 0), (1.0, "joined", 0, 1), (1.0, "joined", 1, 0), (2.0, "lost", 0, 1), (3.0, "left", 0, 1),
        (3.5, "joined", 1, 2), (4.0, "left", 1, 2),
    ):  # fmt: skip
        trace.add(Mark(time_, kind, stage, replica, None, "why"))  # type: ignore[arg-type]
    status = watch.status(5.0)
    assert [(one.stage, one.number, one.state) for one in status.replicas] == [
        (0, 0, "ready"), (0, 1, "given up"), (1, 0, "ready"), (1, 1, "starting")
    ]  # fmt: skip
    assert outline(status)["degraded"] == [
        {"stage": 0, "replica": 1, "state": "given up"}, {"stage": 1, "replica": 1, "state": "starting"}
    ]  # fmt: skip
    assert status.replicas[1].why == "why" and not status.missing
    watch.scale(0, 2)
    assert len(watch.status(6.0).replicas) == 3


# -- a stage without replica ------------------------------------------------------------------------------------------


def first_stage(server: ServerProcess) -> int:
    """The process of stage 0's only replica, 0 where it waits to be started."""
    return next(one["pids"][0] for one in replicas(server) if one["stage"] == 0)


def lost_stage(server: ServerProcess) -> int:
    """Stage 0 has no replica: the process that is to be it next (its number is returned) stands still while it
    starts."""
    for _ in range(10):
        before = first_stage(server)
        os.kill(before, signal.SIGKILL)
        after = until(lambda before=before: first_stage(server) not in (0, before) and first_stage(server))
        os.kill(after, signal.SIGSTOP)
        time.sleep(0.1)
        if server.call("GET", "/health")[0] == 503:
            return after
        os.kill(after, signal.SIGCONT)
        until(lambda: whole(server))
    raise AssertionError("workers start faster than they can be stopped")


@pytest.mark.parametrize("policy", ["wait", "fail"])
def test_a_stage_without_replica(tiny_model: str, tmp_path: Path, policy: str):
    body = {"prompt": [1, 2, 3], "max_tokens": 5, "ignore_eos": True, "temperature": 0}
    plan, config = f"0-0 | 1-2; lost={policy}", tmp_path / "config.yaml"
    if policy == "wait":
        config.write_text(f"plan: {json.dumps(plan)}\n")
        server = ServerProcess(f"tiny={tiny_model}", "--config", str(config), log=tmp_path / "log")
    else:
        server = ServerProcess(f"tiny={tiny_model}", log=tmp_path / "log", HEADRACE_SERVE_PLAN=plan)
    with server:
        quiet = server.post("/v1/completions", body)[1]["choices"]
        next_one = lost_stage(server)
        status, health = server.call("GET", "/health")
        assert (status, health["status"]) == (503, "stage 0 has no replica")
        assert health["stages"][0]["ready"] == 0 and health["degraded"][0]["stage"] == 0
        assert server.call("GET", "/ready") == (
            503, {"status": "not ready", "models": {"tiny": "stage 0 has no replica"}}
        )  # fmt: skip
        assert server.metric("replica_up") == 1
        if policy == "fail":
            status, answer = server.post("/v1/completions", body)
            assert (status, answer["error"]["code"]) == (503, "stage_lost") and "stage 0" in answer["error"]["message"]
            raw = server.raw(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\nConnection: close\r\n\r\n"
                b'{"prompt":[1]}'
            )
            assert b"retry-after: 2" in raw.lower()
            os.kill(next_one, signal.SIGCONT)
            until(lambda: whole(server))
            assert server.post("/v1/completions", body)[1]["choices"] == quiet
            return
        status, answer = server.post("/v1/completions", {**body, "deadline_ms": 200})
        assert (status, answer["error"]["code"]) == (408, "deadline_exceeded")
        got: list[Any] = []
        waiting = threading.Thread(target=lambda: got.append(server.post("/v1/completions", body)))
        waiting.start()
        time.sleep(0.2)
        assert not got
        os.kill(next_one, signal.SIGCONT)
        waiting.join(30)
        status, answer = got[0]
        assert (status, answer["choices"], answer["timings"]["waited_for"]) == (200, quiet, "stage 0")


# -- joining and leaving ----------------------------------------------------------------------------------------------


def test_replicas_join_and_leave_under_load(split: ServerProcess, quiet: list[list[int]]):
    until(lambda: whole(split))
    for body, problem in (
        ({"stage": 0, "replicas": 0}, "from 1 to 64"),
        ({"stage": 0, "replicas": 65}, "from 1 to 64"),
        ({"stage": 2, "replicas": 1}, "stages 0 to 1"),
        ({"stage": -1, "replicas": 1}, "stages 0 to 1"),
        ({"stage": 0}, "replicas"),
        ({"stage": "0", "replicas": 1}, "int"),
    ):
        status, answer = split.post("/admin/scale", body, headers=ADMIN)
        assert status == 400 and problem in answer["error"]["message"], answer
    assert split.post("/admin/scale", {"stage": 0, "replicas": 1})[0] == 401
    clients = started(split)
    wait_for_events(clients, 3)
    status, answer = split.post("/admin/scale", {"stage": 1, "replicas": 3}, headers=ADMIN)
    assert (status, answer["model"], len(answer["stages"][1]["replicas"])) == (200, "tiny", 3)
    until(lambda: sum(one["state"] == "ready" for one in replicas(split)) == 5)
    status, answer = split.post("/admin/scale", {"stage": 1, "replicas": 1}, headers=ADMIN)
    assert status == 200 and sum(one["state"] == "ready" for one in answer["stages"][1]["replicas"]) == 1
    more = started(split)
    assert tokens(clients) == tokens(more) == quiet
    until(lambda: len(replicas(split)) == 3)
    (engine,) = split.engine_pids()
    os.kill(engine, signal.SIGKILL)  # the next engine knows what was asked for
    until(lambda: split.engine_pids() not in ([], [engine]))
    until(lambda: len(replicas(split)) == 3 and whole(split))
    keys = Path(split.log_path).parent / "keys"
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "scale", split.url, "--stage", "1", "--replicas", "2",
         "--api-key-file", keys],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and "stage 1  layers 1-2  1 of 2 ready" in done.stdout, done
    until(lambda: whole(split) and len(replicas(split)) == 4)
    split.wait_idle()


def test_a_model_that_is_not_split_does_not_scale(tiny_model: str):
    async def scaled() -> None:
        async with AsyncLLM(tiny_model, threads=1) as llm:
            with pytest.raises(ConfigError, match="not split"):
                await llm.scale(0, 1)
            await llm.generate([1, 2], SamplingParams(max_tokens=4, ignore_eos=True))
            recent = await llm.recent(10.0, 3)
            assert (len(recent.steps), recent.spans, llm.status) == (3, [], None)

    asyncio.run(scaled())


def test_a_plan_that_does_not_fit_is_told_at_once(tiny_model: str):
    async def start() -> None:
        async with AsyncLLM(tiny_model, plan="0-0 | 1-1"):
            pass

    with pytest.raises(ConfigError, match="plan covers layers 0 to 1, the model has 3"):
        asyncio.run(start())


def test_a_start_that_fails_names_the_replica(tiny_model: str):
    """More pages than any memory holds."""

    async def start() -> None:
        async with AsyncLLM(tiny_model, plan="0-0 | 1-2 p900000000"):
            pass

    with pytest.raises(CapacityError, match="replica 0 of stage 1: there is no memory for layers 1 to 2 with 9"):
        asyncio.run(start())


@pytest.mark.slow
def test_a_real_model_loses_worker_after_worker(smollm2: Path, tmp_path: Path):
    """Killed and stopped in turn, one every half second: nobody's stream shows more than a pause."""
    with serving(str(smollm2), "0-14 x2 | 15-29 x2; heartbeat=0.5", tmp_path) as server:
        quiet = meaning(all_streams(server))
        engines, gone = server.engine_pids(), 0

        def disturb(clients: list[Client]) -> None:
            nonlocal gone
            while any(client.is_alive() for client in clients):
                ready = [one for one in replicas(server) if one["state"] == "ready"]
                if {one["stage"] for one in ready} == {0, 1} and len(ready) > 2:
                    stage = gone // 2 % 2
                    victim = max((one for one in ready if one["stage"] == stage), key=lambda one: one["sequences"])
                    with suppress(ProcessLookupError):  # it has just ended, and that is not told yet
                        os.kill(victim["pids"][0], signal.SIGKILL if gone % 2 else signal.SIGSTOP)
                        gone += 1
                time.sleep(0.5)

        clients = all_streams(server, disturb)
        assert meaning(clients) == quiet
        assert server.engine_pids() == engines and gone >= 3
        gap = max(after - before for client in clients for before, after in zip(client.times, client.times[1:]))
        assert gap < 3.0, f"the longest pause of a stream was {gap:.2f} s"
        until(lambda: whole(server))
        server.wait_idle()
