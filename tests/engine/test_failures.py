"""Workers that die, stop, come back late, leave or cannot start: no request is lost, and nothing is left behind."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import LLM, SamplingParams
from headrace.assemble import open_model
from headrace.completion import Output
from headrace.errors import ConfigError, EngineDeadError
from headrace.lab.chaos import Blow, ChaosOptions, ChaosReport, read_schedule, run_chaos
from headrace.model.shares import split
from headrace.model.weights import column_blocks
from headrace.parallel.channel import Edge
from headrace.parallel.shm import ShmEdge, ShmSender
from headrace.types import Step
from headrace.workers import control, crew
from headrace.workers.link import Link
from headrace.workers.runner import Prepared
from headrace.workers.staged import StagedExecutor
from headrace.workers.worker import Worker

TWICE = "0-0 x2 | 1-2"
GREEDY = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.95, seed=5, max_tokens=48, ignore_eos=True)
RNG = random.Random(1)
PROMPTS = [[RNG.randrange(3, 259) for _ in range(RNG.randrange(1, 100))] for _ in range(16)]
PARAMS = [GREEDY, DRAWN] * 8

Place = tuple[int, int, int]


@pytest.fixture(scope="module")
def expected(tiny: str) -> list[list[int]]:
    with LLM(tiny) as llm:
        return tokens_of(llm.generate(PROMPTS, PARAMS))


@pytest.fixture(scope="module")
def shared(tiny: str) -> Iterator[LLM]:
    """Two replicas, then one."""
    with LLM(tiny, plan=TWICE + "; routing=round-robin") as llm:
        yield llm
        wait_whole(llm)
        sound(llm)


def tokens_of(outputs: list[Output]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


def staged(llm: LLM) -> StagedExecutor:
    assert isinstance(llm.engine.executor, StagedExecutor)
    return llm.engine.executor


def pids(llm: LLM) -> dict[Place, int]:
    return {(one.stage, one.replica, one.rank): one.pid for one in staged(llm).status() if one.pid}


def strike(llm: LLM, *places: Place, number: int = signal.SIGKILL) -> None:
    there = pids(llm)
    for place in places:
        os.kill(there[place], number)


def tend_until(llm: LLM, done: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, staged(llm).status()
        llm.engine.tend()
        time.sleep(0.005)


def wait_whole(llm: LLM, workers: int = 3) -> None:
    def whole() -> bool:
        status = staged(llm).status()
        return len(status) == workers and all(one.state == "ready" for one in status)

    tend_until(llm, whole)


def sound(llm: LLM) -> None:
    """Nothing runs, and no page is held."""
    llm.engine.tend()
    scheduler = llm.engine.scheduler
    assert not llm.engine.busy
    scheduler.check()
    assert all(pool.available == pool.count - 1 for pool in scheduler.routes.pools)


@contextmanager
def after(count: int, llm: LLM, act: Callable[[], None]) -> Iterator[None]:
    """Act when so many more steps were applied."""
    left = count

    def observe(step: Step, _: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            act()

    llm.engine.observer = observe
    try:
        yield
    finally:
        llm.engine.observer = None
    assert left <= 0, "it was over too soon"


@contextmanager
def slowed(pid: int) -> Iterator[None]:
    """Give a process a tenth of the time, by stops much shorter than a beat."""
    ended = threading.Event()

    def slow_down() -> None:
        while not ended.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.045)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.005)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def gone(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    return True


# One death at a time


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("place", [(0, 0, 0), (1, 0, 0)], ids=["of-two", "the-only-one"])
def test_a_worker_dies_in_mid_decode(shared: LLM, expected: list[list[int]], place: Place, number: int) -> None:
    wait_whole(shared)
    restarts = staged(shared).restarts
    with after(6, shared, lambda: strike(shared, place, number=number)):
        assert tokens_of(shared.generate(PROMPTS, PARAMS)) == expected
    assert staged(shared).restarts == restarts + 1


def test_a_worker_that_stops_is_replaced(shared: LLM, expected: list[list[int]]) -> None:
    """Each beat is a quarter of the time after which silence is death, so it is noticed within that and a bit."""
    wait_whole(shared)
    with after(6, shared, lambda: strike(shared, (1, 0, 0), number=signal.SIGSTOP)):
        assert tokens_of(shared.generate(PROMPTS, PARAMS)) == expected
    assert "silent" in [mark for mark in shared.engine.trace.marks if mark.kind == "lost"][-1].text


def test_all_workers_die_while_nothing_runs(shared: LLM, expected: list[list[int]]) -> None:
    wait_whole(shared)
    strike(shared, *pids(shared))
    assert tokens_of(shared.generate(PROMPTS, PARAMS)) == expected


def test_a_slow_replica_permutes_nothing_and_holds_up_nobody(shared: LLM, expected: list[list[int]]) -> None:
    """One of the first stage's replicas has a tenth of the time, by stops much shorter than a beat."""
    wait_whole(shared)
    paths: list[int] = []
    shared.engine.observer = lambda step, _: paths.append(step.path[0])
    restarts = staged(shared).restarts
    try:
        with slowed(pids(shared)[0, 0, 0]):
            assert tokens_of(shared.generate(PROMPTS, PARAMS)) == expected
    finally:
        shared.engine.observer = None
    assert staged(shared).restarts == restarts
    last = max(index for index, replica in enumerate(paths) if replica == 1)
    assert set(paths) == {0, 1} and paths[last + 1 :].count(0) > paths.count(0) / 4, "the fast one was done long before"


def test_ranks_launch_in_their_leaders_order() -> None:
    """Also where its hidden states have overtaken the steps, of two paths: or they would add up different steps."""

    class Idle:
        def ring(self, bell: int) -> None: ...
        def rest(self) -> None: ...
        def prepare(self, step: Step) -> Prepared:
            return Prepared(step, None)  # type: ignore[arg-type]

    ours, theirs = socket.socketpair()
    coordinator, edge = Link(ours, control.from_rank), Edge("within", 4096, 8)
    worker = Worker(Link(theirs, control.to_rank), control.Place(1, 2, 0, 1, 2), Idle(), "")  # type: ignore[arg-type]
    memory = ShmEdge.create(edge.max_bytes, edge.messages)
    coordinator.send(control.Connect(1, "within", "shm", False, True, edge.max_bytes, edge.messages), tuple(memory.fds))
    worker._listen(wait=True)
    leader = ShmSender(memory.fds, edge)
    hidden = np.ones((1, 8), np.float32)
    for number, array in ((5, hidden), (6, control.NO_HIDDEN), (4, hidden)):
        leader.send(number, array)
    worker._listen(wait=True)
    for number in (4, 5, 6, 7):
        coordinator.send(control.Run(Step(number, ()), True, None))
    worker._listen(wait=True)
    leader.send(7, hidden)
    worker._listen(wait=True)
    assert [waiting.run.step.number for waiting in worker._ready] == [5, 4, 7]
    leader.close()
    coordinator.close()


def test_ctrl_c_at_any_moment(shared: LLM, expected: list[list[int]]) -> None:
    wait_whole(shared)
    for attempt in range(8):
        timer = threading.Timer(0.004 + 0.011 * attempt, os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            timer.start()
            while True:
                shared.generate(PROMPTS, PARAMS)
        timer.join()
        shared.engine.scheduler.check()
        assert shared.engine.scheduler.unfinished == 0
    assert len(pids(shared)) == 3, "the workers do not hear it"
    assert tokens_of(shared.generate(PROMPTS, PARAMS)) == expected


def test_prefixes_on_a_replica_that_survives_are_used(shared: LLM) -> None:
    """Two sequences with one long prompt, on two of three replicas: the one whose replica dies starts behind the
    other's pages, though the third has nothing to do."""
    prompt = [RNG.randrange(3, 259) for _ in range(400)]
    with LLM(shared.config.model, plan="0-2 x3; routing=round-robin") as llm:
        starts: list[tuple[str, tuple[int, ...], int]] = []

        def observe(step: Step, _: Any) -> None:
            chunks = {chunk.seq: chunk.start for chunk in step.chunks}
            starts.extend((one.request.id, step.path, chunks[one.seq]) for one in step.opened)

        llm.engine.observer = observe
        streams = [llm.stream(prompt, LONG) for _ in range(2)]
        pieces = [[next(stream)] for stream in streams]  # each of a token or more: bytes wait for a whole character
        (_, first, _), (_, second, _) = starts
        assert first != second and [start for _, _, start in starts] == [0, 0]
        strike(llm, (0, second[0], 0))  # whose sequence has only begun; the first's may have ended by now
        for stream, early in zip(streams, pieces, strict=True):
            early.extend(stream)
        ((_, path, start),) = starts[2:]
        assert path == first and start >= 384
        both = [[token for piece in early for token in piece.token_ids] for early in pieces]
        assert both[0] == both[1] and len(both[0]) == LONG.max_tokens
        sound(llm)


@pytest.mark.parametrize("plan", [TWICE, "0-2"])
def test_a_request_that_crashes_its_workers_ends_alone(tiny: str, expected: list[list[int]], plan: str) -> None:
    """Whenever it is computed, its worker gets what a bad access would give it. All others have their tokens."""
    with LLM(tiny, plan=plan) as llm:
        poison = llm._start([9] * 7, GREEDY)
        handles: set[int] = set()
        submit = staged(llm).submit

        def crash(step: Step) -> None:
            handles.update(one.seq for one in step.opened if one.request.id == poison)
            if any(chunk.seq in handles for chunk in step.chunks):
                strike(llm, (len(step.path) - 1, 0, 0), number=signal.SIGSTOP)  # before it can answer
                submit(step)
                strike(llm, (len(step.path) - 1, 0, 0), number=signal.SIGSEGV)
                strike(llm, (len(step.path) - 1, 0, 0), number=signal.SIGCONT)
            else:
                submit(step)

        staged(llm).submit = crash  # type: ignore[method-assign]
        completion = llm._live[poison]
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        while not completion.done:
            llm._step()
        assert completion.output.finish_reason == "error"
        assert completion.output.samples[0].error == "its workers crashed 5 times in a row"
        assert staged(llm).restarts == 5
        wait_whole(llm, len(pids(llm)))
        sound(llm)


# Stages without replicas


def test_requests_wait_for_a_stage_that_is_gone(shared: LLM, expected: list[list[int]]) -> None:
    wait_whole(shared)
    strike(shared, (0, 0, 0), (0, 1, 0))
    tend_until(shared, lambda: shared.engine.scheduler.routes.missing == [0])
    assert {one.state for one in staged(shared).status() if one.stage == 0} <= {"waiting", "starting", "connecting"}
    assert tokens_of(shared.generate(PROMPTS, PARAMS)) == expected


def test_or_fail_at_once(tiny: str, expected: list[list[int]]) -> None:
    """New ones do; those that ran go on when a replica is back."""
    with LLM(tiny, plan=TWICE + "; lost=fail") as llm:
        stream = llm.stream(PROMPTS[0], PARAMS[0])
        tokens = [*next(stream).token_ids]
        strike(llm, (0, 0, 0), (0, 1, 0))
        tend_until(llm, lambda: llm.engine.scheduler.routes.missing == [0])
        began = time.monotonic()
        with pytest.raises(EngineDeadError, match="stage 0 has no replica now"):
            llm.generate("x", GREEDY)
        assert time.monotonic() - began < 0.1
        for piece in stream:
            tokens.extend(piece.token_ids)
        assert tokens == expected[0]
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        wait_whole(llm)
        strike(llm, *pids(llm))
        tend_until(llm, lambda: llm.engine.scheduler.routes.missing != [], 5)
        with pytest.raises(EngineDeadError, match="has no replica"):
            llm.logits("x")


def test_a_worker_that_cannot_load_is_given_up(
    tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[list[int]]
) -> None:
    """The engine goes on with the others; with none left it says why, and goes on saying it."""
    monkeypatch.setattr(crew, "PAUSES", (0.0,) * crew.MAX_STARTS)
    model = tmp_path / "model.gguf"
    shutil.copy(tiny, model)
    with LLM(str(model), plan=TWICE) as llm:
        model.rename(tmp_path / "away.gguf")
        strike(llm, (0, 1, 0))
        tend_until(llm, lambda: len(staged(llm).status()) == 2)
        assert f"{crew.MAX_STARTS} starts in a row have failed" in llm.engine.trace.marks[-1].text
        assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
        (tmp_path / "away.gguf").rename(model)
        staged(llm).scale(0, 2)
        wait_whole(llm)
        model.unlink()
        strike(llm, (1, 0, 0))
        for _ in range(2):
            with pytest.raises(EngineDeadError, match=r"stage 1 cannot start: .*model\.gguf"):
                llm.generate("x", GREEDY)


def test_a_model_that_no_worker_can_load(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that dies of its own while it starts: not without end."""
    monkeypatch.setattr(crew, "PAUSES", (0.0,) * crew.MAX_STARTS)
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(crew.sys, "executable", shutil.which("false"))
    with pytest.raises(EngineDeadError, match=r"ended with code 1; 5 starts in a row have failed"):
        LLM(tiny, plan=TWICE)


# Replicas that come and go


def test_replicas_join_and_leave_under_load(tiny: str, expected: list[list[int]]) -> None:
    with LLM(tiny, plan="0-0 | 1-2; routing=round-robin") as llm:
        executor, seen = staged(llm), set()

        def run(*changes: tuple[int, Callable[[], None]]) -> None:
            left = dict(changes)
            count = 0

            def observe(step: Step, _: Any) -> None:
                nonlocal count
                count += 1
                seen.add(step.path)
                if count in left:
                    left.pop(count)()

            llm.engine.observer = observe
            rounds = 0
            while left or not rounds:
                assert tokens_of(llm.generate(PROMPTS, PARAMS)) == expected
                rounds += 1
                assert rounds < 40

        run((5, lambda: executor.scale(0, 3)))
        wait_whole(llm, 4)
        run()
        assert seen == {(0, 0), (1, 0), (2, 0)}
        run((5, lambda: executor.scale(0, 2)), (9, lambda: executor.scale(1, 2)))
        wait_whole(llm, 4)
        # One leaves and is killed before it has; then as many are wanted as there were.
        run((5, lambda: executor.scale(0, 1)), (6, lambda: strike(llm, (0, 1, 0))), (8, lambda: executor.scale(0, 2)))
        wait_whole(llm, 4)
        run((5, lambda: executor.scale(0, 1)), (7, lambda: executor.scale(1, 1)))
        wait_whole(llm, 2)
        sound(llm)
        for wrong in ((0, 0), (2, 1), (-1, 1), (0, 65)):
            with pytest.raises(ConfigError):
                executor.scale(*wrong)


# Storms: kills in every phase, and what they leave


def chaos(model: str, plan: str, **options: Any) -> ChaosReport:
    report = run_chaos(model, ChaosOptions(plan, concurrency=16, **options), lambda done, total: None)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.finished >= report.config["requests"]
    return report


def test_a_storm(tiny: str) -> None:
    report = chaos(tiny, TWICE, requests=200, every=0.6, blows=6, seed=1)
    assert {hit.signal for hit in report.hits} == {"KILL", "STOP"}
    assert all(hit.detected is None or hit.detected < 5 for hit in report.hits)


def test_a_schedule(tiny: str, tmp_path: Path) -> None:
    """All at once, again while it starts, one during another's recovery, stops that end, and other signals."""
    path = tmp_path / "schedule.txt"
    path.write_text(
        """time stage replica rank signal
        0.2 0 * * KILL
        0.3 0 0 0 SIGKILL   # while it starts
        0.4, 1, 0, 0, STOP/0.3
        0.8 0 1 0 STOP/1.3
        0.9 1 0 1 9
        1.1 1 0 0 SEGV
        2.0 0 0 0 TERM
        2.1 0 0 0 INT
        2.2 0 0 0 STOP
        2.3 1 * * STOP/0.1
        2.5 0 0 0 CONT
        2.6 1 0 * KILL
        """
    )
    blows = read_schedule(path)
    assert blows[0] == Blow(0.2, 0, None, None) and blows[2] == Blow(0.4, 1, 0, 0, "STOP", 0.3)
    report = chaos(tiny, "0-0 x2 | 1-2 /2", requests=100, schedule=blows)
    assert len(report.hits) >= 10 and {hit.phase for hit in report.hits} >= {"starting", "decode"}


def test_a_lost_token_would_be_seen(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the two above."""
    from headrace.lab import chaos as lab

    found = lab._Load._take

    def forgetful(self: Any, event: Any, now: float) -> None:
        if self.expected and self.started > 20 and event.request_id.endswith("7") and not event.finish_reason:
            return
        found(self, event, now)

    monkeypatch.setattr(lab._Load, "_take", forgetful)
    options = ChaosOptions("0-2", requests=40, every=5.0, blows=1, schedule=(Blow(0.1, 0),))
    report = run_chaos(tiny, options, lambda done, total: None)
    assert [check.name for check in report.checks if not check.passed] == ["tokens equal to the quiet run's"]


@pytest.mark.parametrize(
    "line", ["1 0 0 KILL", "x 0 0 0 KILL\n1 0 0", "1 0 0 0 NOSUCH", "1 a 0 0 KILL", "-1 0 0 0 KILL", ""]
)
def test_schedules_that_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "schedule.txt").write_text(line)
    with pytest.raises(ConfigError):
        read_schedule(tmp_path / "schedule.txt")


# The coordinator

SCRIPT = """
import sys, threading, time
from headrace import LLM, SamplingParams
def make():
    global llm
    llm = LLM({model!r}, plan={plan!r})
if {thread}:
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
else:
    make()
print(*(one.pid for one in llm.engine.executor.status()), flush=True)
prompts, params = ["a", "b", "c"], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
first = llm.generate(prompts, params)
for line in sys.stdin:
    end = time.monotonic() + float(line)
    while time.monotonic() < end:
        assert [o.token_ids for o in llm.generate(prompts, params)] == [o.token_ids for o in first]
    print(llm.engine.executor.restarts, flush=True)
"""


def coordinator(model: str, plan: str, thread: bool = False) -> subprocess.Popen[str]:
    script = SCRIPT.format(model=model, plan=plan, thread=thread)
    return subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_dead_coordinator_leaves_nothing(tiny: str) -> None:
    """Whether its workers run or are stopped, and also where the thread that made them has ended."""
    made = [(coordinator(tiny, TWICE, thread), stop) for thread in (False, True) for stop in (False, True)]
    workers: list[list[int]] = []
    for process, _ in made:
        assert process.stdout
        workers.append([int(pid) for pid in process.stdout.readline().split()])
        assert len(workers[-1]) == 3
    time.sleep(0.3)  # the threads have ended, and their workers have not
    assert not any(gone(pid) for own in workers for pid in own)
    for (process, stop), own in zip(made, workers, strict=True):
        for pid in own if stop else ():
            os.kill(pid, signal.SIGSTOP)
        with process:
            process.kill()
    deadline = time.monotonic() + 2
    while not all(gone(pid) for own in workers for pid in own):
        assert time.monotonic() < deadline, workers
        time.sleep(0.02)


def test_a_coordinator_that_was_stopped_takes_nobody_for_dead(tiny: str) -> None:
    with coordinator(tiny, TWICE + "; heartbeat=0.4") as process:
        assert process.stdin and process.stdout
        process.stdout.readline()
        process.stdin.write("2.5\n")
        process.stdin.flush()
        for _ in range(2):
            time.sleep(0.2)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.9)
            process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == "0\n"
        process.stdin.close()


# Memory


def anonymous_memory(pid: int) -> tuple[int, int]:
    """Bytes of a process's own: its share of what is not of files, and what of its resident memory is not."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    status = Path(f"/proc/{pid}/status").read_text()

    def field(text: str, name: str) -> int:
        found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
        assert found, name
        return int(found[1]) * 1024

    return field(rollup, "Pss_Anon") + field(rollup, "Pss_Shmem"), field(status, "VmRSS") - field(status, "RssFile")


@pytest.mark.parametrize("plan", ["0-14 | 15-29", "0-29 /2"])
def test_workers_hold_only_their_share(smollm2: Path, plan: str) -> None:
    """Of the file's bytes: their layers, and the embedding where they begin or end the model; of ranks, their heads,
    columns and rows of it."""
    model = open_model(str(smollm2))
    sizes = {name: tensor.nbytes for name, tensor in model.file.tensors.items()}
    layers = [sum(size for name, size in sizes.items() if name.startswith(f"blk.{i}.")) for i in range(30)]
    shares = [sizes["token_embd.weight"] + sum(layers[:15]), sizes["token_embd.weight"] + sum(layers[15:])]
    if "/" in plan:
        parts = split(model.spec, 2, column_blocks(model.file, model.spec))
        shares = [int(sum(size * _part(name, model.spec, one) for name, size in sizes.items())) for one in parts]
    with LLM(str(smollm2), plan=plan, kv_memory=64 << 20) as llm:
        llm.generate([[7] * 200] * 16, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True))
        time.sleep(0.2)
        for (place, pid), share in zip(sorted(pids(llm).items()), shares, strict=True):
            for used in anonymous_memory(pid):
                most = share * 1.25 + (32 << 20) + (80 << 20)
                assert used <= most, f"{place}: {used >> 20} MB, at most {most / 2**20:.0f}; share {share >> 20}"


def _part(name: str, spec: Any, share: Any) -> float:
    """A rank's part of a tensor."""
    if name.startswith("token_embd"):
        return len(share.vocab) / spec.vocab_size
    if "ffn_" in name:
        return len(share.ffn) / spec.ffn_dim
    return len(share.kv_heads) / spec.kv_heads
