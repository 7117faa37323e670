"""Kills and stops workers of a split model while it answers, and proves that nothing shows: every request ends, with
the tokens of a quiet run, and nothing is left over."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ..assemble import open_model
from ..assemble_split import build_split_engine
from ..config import Settings
from ..engine import Engine
from ..errors import ConfigError, EngineDeadError
from ..plan.plan import Plan
from ..results import machine_facts, summarize, write_results
from ..trace import Mark
from ..types import Request, SamplingParams
from ..workers.staged import RankStatus, StagedExecutor

if TYPE_CHECKING:
    from rich.table import Table

Phase = Literal["starting", "idle", "prefill", "decode", "recovering"]
Look = Callable[[int, int], None]  # requests done, and to do so far

SIGNALS = ("KILL", "STOP", "CONT", "TERM", "INT", "SEGV", "ABRT", "HUP", "QUIT", "BUS", "ILL", "FPE", "USR1", "USR2")
MAX_PROMPT, MAX_NEW = 128, 64  # tokens
PREFIXES = 4  # that prompts share
SPARED = 6  # of so many blows one hits anyone, whatever it does; the others a worker in mid-decode
STOPPED = 4  # of so many blows one stops a worker instead of killing it
STALL_SECONDS = 120.0  # without a token: the run is given up
RETURN_SECONDS = 60.0  # for all replicas to be back when the load has ended
TOGETHER_SECONDS = 0.02  # between blows that count as one
MAX_BLOWS = 10_000
MAX_SCHEDULE_BYTES = 1 << 22


class Blow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A signal to a worker, `time` seconds after the load began; to all replicas of the stage, or all ranks, where
    those are None. `resume`: seconds after which a stopped worker goes on."""

    time: float
    stage: int
    replica: int | None = 0
    rank: int | None = 0
    signal: str = "KILL"
    resume: float | None = None

    def __post_init__(self) -> None:
        if self.signal not in SIGNALS:
            raise ConfigError(f"signal must be one of {', '.join(SIGNALS)}, got {self.signal!r:.40}")
        for name, value in (("time", self.time), ("resume", self.resume or 0.0)):
            if not 0 <= value <= 86_400:
                raise ConfigError(f"{name} must be from 0 to 86400 seconds, got {value}")


@dataclass(frozen=True)
class ChaosOptions:
    """What to run. Blows come `every` seconds, or as `schedule` says; requests are repeated until at least `blows` of
    them have come."""

    plan: str
    requests: int = 200
    concurrency: int = 16
    every: float = 2.0
    blows: int = 6
    seed: int = 0
    schedule: tuple[Blow, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (("requests", 1, 100_000), ("concurrency", 1, 4096), ("blows", 1, MAX_BLOWS)):
            if not low <= getattr(self, name) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, got {getattr(self, name)}")
        if not 0.05 <= self.every <= 3600:
            raise ConfigError(f"every must be from 0.05 to 3600 seconds, got {self.every}")


@dataclass
class Hit:
    """A signal that one worker got, and what came of it; times in seconds after the blow, None where it was not noticed
    (or did no harm)."""

    at: float  # time.monotonic
    stage: int
    replica: int
    rank: int
    signal: str
    phase: Phase
    victims: list[str]  # requests that were on it
    resume: float | None = None
    detected: float | None = None
    recovered: float | None = None  # until the replica was back
    first_token: float | None = None  # until one of its requests had a token again
    rate: float | None = None  # tokens per second until the replica was back, as a share of the quiet run's

    @property
    def where(self) -> str:
        return f"{self.stage}.{self.replica}.{self.rank}"


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    found: str


@dataclass
class ChaosReport:
    """Rates in tokens per second."""

    config: dict[str, Any]
    quiet_rate: float
    rate: float
    finished: int
    hits: list[Hit]
    checks: list[Check]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


def read_schedule(path: str | Path) -> tuple[Blow, ...]:
    """Blows from a file, in the order of their times: lines of `time stage replica rank signal`, where "*" is all of
    them and STOP/0.3 is continued after 0.3 s; or, in a .json file, a list of such lists or of Blow's fields."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_SCHEDULE_BYTES + 1).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"schedule {path} cannot be read: {error}") from None
    if len(text) > MAX_SCHEDULE_BYTES:
        raise ConfigError(f"schedule {path} is longer than {MAX_SCHEDULE_BYTES} bytes; shorten it")
    try:
        rows = json.loads(text) if path.suffix == ".json" else list(_lines(text))
        blows = [
            msgspec.convert(row, Blow) if isinstance(row, dict) else _blow([str(one) for one in row]) for row in rows
        ]
    except (ValueError, TypeError, msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(f"schedule {path}: {error}") from None
    if not 1 <= len(blows) <= MAX_BLOWS:
        raise ConfigError(f"schedule {path} has {len(blows)} blows; give 1 to {MAX_BLOWS}")
    return tuple(sorted(blows, key=lambda blow: blow.time))


def _lines(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        fields = line.partition("#")[0].replace(",", " ").split()
        if fields and fields[0][0].isdigit():  # not a heading
            yield fields


def _blow(fields: list[str]) -> Blow:
    if len(fields) != 5:
        raise ValueError(f"{' '.join(fields)!r:.80} should be: time stage replica rank signal")
    name, _, resume = fields[4].upper().removeprefix("SIG").partition("/")
    if name.isdigit():
        name = signal.Signals(int(name)).name.removeprefix("SIG")
    replica, rank = (None if one in ("*", "None") else int(one) for one in fields[2:4])
    return Blow(float(fields[0]), int(fields[1]), replica, rank, name, float(resume) if resume else None)


def requests_for(count: int, vocab: int, seed: int) -> list[Request]:
    """Requests of mixed lengths, some with a prefix in common, greedy and seeded, plain and with penalties."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(vocab) for _ in range(96)] for _ in range(PREFIXES)]
    made = []
    for index in range(count):
        length = rng.choice((rng.randint(1, 16), rng.randint(17, 64), rng.randint(65, MAX_PROMPT)))
        ids = [rng.randrange(vocab) for _ in range(length)]
        if index % 3 == 0:
            shared = rng.choice(prefixes)[: length * 3 // 4]
            ids[: len(shared)] = shared
        params = _params(index, rng.choice((rng.randint(8, MAX_NEW), MAX_NEW)))
        made.append(Request(id=str(index), prompt_ids=tuple(ids), params=params, seed=rng.getrandbits(64)))
    return made


def _params(index: int, new: int) -> SamplingParams:
    if index % 2:
        return SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    if index % 4:
        return SamplingParams(temperature=0.8, top_p=0.9, max_tokens=new, ignore_eos=True)
    return SamplingParams(temperature=1.0, top_k=40, repetition_penalty=1.1, max_tokens=new, ignore_eos=True)


class _Load:
    """Keeps `concurrency` requests in an engine, round after round of the same, and compares each with what it gave
    before. Rounds share no cached prefixes."""

    def __init__(self, engine: Engine, requests: Sequence[Request], concurrency: int) -> None:
        self._engine, self._requests, self._concurrency = engine, requests, concurrency
        self.expected: list[list[int]] = []
        self._learnt: dict[int, list[int]] = {}
        self.started = self.finished = 0
        self.live: dict[str, tuple[int, list[int]]] = {}  # by the engine's id: index, and tokens so far
        self.wrong: list[str] = []
        self.times: list[tuple[float, str]] = []  # when a token came, and whose it was
        self.salt = ""

    def run(self, look: Callable[[], bool]) -> float:
        """All requests once, and on while `look` says so; seconds that it took."""
        self.started = self.finished = 0
        self.wrong, self.times = [], []
        began = heard = time.monotonic()
        while self.finished < len(self._requests) or self.live or look():
            self._fill(look())
            events = self._engine.step()
            now = time.monotonic()
            heard = now if events or not self.live else heard
            if now - heard > STALL_SECONDS:
                raise EngineDeadError(f"no token came for {now - heard:.0f} s; {len(self.live)} requests wait")
            for event in events:
                self._take(event, now)
        return time.monotonic() - began

    def _fill(self, more: bool) -> None:
        while len(self.live) < self._concurrency and (self.started < len(self._requests) or more):
            index = self.started % len(self._requests)
            name = f"{self.salt}{self.started}"
            self.live[name] = (index, [])
            salt = f"{self.salt}{self.started // len(self._requests)}"
            self._engine.add(
                msgspec.structs.replace(self._requests[index], id=name, arrival=time.monotonic(), salt=salt)
            )
            self.started += 1

    def _take(self, event: Any, now: float) -> None:
        if event.request_id not in self.live:
            self.wrong.append(f"request {event.request_id} gave tokens after its end")
            return
        index, tokens = self.live[event.request_id]
        tokens.extend(event.tokens)
        self.times.extend((now, event.request_id) for _ in event.tokens)
        if event.finish_reason is None:
            return
        del self.live[event.request_id]
        self.finished += 1
        if event.finish_reason != "length":
            self.wrong.append(f"request {event.request_id} ended with {event.finish_reason}: {event.error}")
        elif len(self.expected) == len(self._requests):
            if tokens != self.expected[index]:
                self.wrong.append(f"request {event.request_id} gave other tokens than in the quiet run")
        else:
            self._learnt[index] = tokens

    def learn(self) -> float:
        """The quiet run: what every request should give. Tokens per second."""
        seconds = self.run(lambda: False)
        self.expected = [self._learnt[index] for index in range(len(self._requests))]
        return len(self.times) / seconds


class _Saboteur(threading.Thread):
    """Sends the signals, from a thread of its own: whatever the engine is doing at that moment."""

    def __init__(self, engine: Engine, executor: StagedExecutor, options: ChaosOptions) -> None:
        super().__init__(name="headrace-chaos", daemon=True)
        self._engine, self._executor, self._options = engine, executor, options
        self._random = random.Random(options.seed)
        self._ended = threading.Event()
        self._resumes: list[tuple[float, int]] = []
        self.hits: list[Hit] = []
        self.blows = 0
        self.wanted = len(options.schedule) or options.blows
        self.error: BaseException | None = None

    @property
    def wants_more(self) -> bool:
        return self.blows < self.wanted and self.is_alive()

    def end(self) -> None:
        self._ended.set()
        self.join()
        for _, pid in self._resumes:
            _send(pid, "CONT")

    def run(self) -> None:
        try:
            self._sabotage()
        except BaseException as error:
            self.error = error

    def _sabotage(self) -> None:
        began = time.monotonic()
        if self._options.schedule:
            for blow in self._options.schedule:
                if not self._sleep(began + blow.time):
                    return
                self._strike(blow)
                self.blows += 1
            return
        while self.blows < MAX_BLOWS and self._sleep(began + self._options.every):
            at = self._someone()
            if at is None:
                return
            began = time.monotonic()
            self._hit(at, "STOP" if self._random.randrange(STOPPED) == 0 else "KILL", None)
            self.blows += 1

    def _sleep(self, until: float) -> bool:
        """False where the load has ended."""
        while (left := until - time.monotonic()) > 0 and not self._ended.is_set():
            due = min((at for at, _ in self._resumes), default=until)
            self._ended.wait(max(0.0, min(left, due - time.monotonic())))
            for entry in [entry for entry in self._resumes if entry[0] <= time.monotonic()]:
                self._resumes.remove(entry)
                _send(entry[1], "CONT")
        return not self._ended.is_set()

    def _someone(self) -> RankStatus | None:
        """Whom to hit: most times a worker with sequences in mid-decode, waited for; None where the load has ended."""
        spares = self.blows % SPARED < SPARED - 1
        while not self._ended.is_set():
            there = [at for at in self._executor.status() if at.pid]
            if able := [at for at in there if not spares or self._phase(at)[0] == "decode"]:
                return self._random.choice(able)
            self._ended.wait(0.002)
        return None

    def _strike(self, blow: Blow) -> None:
        for at in self._executor.status():
            if (
                at.stage == blow.stage
                and blow.replica in (None, at.replica)
                and blow.rank in (None, at.rank)
                and at.pid
            ):
                self._hit(at, blow.signal, blow.resume)

    def _hit(self, at: RankStatus, name: str, resume: float | None) -> None:
        phase, victims = self._phase(at)
        self.hits.append(Hit(time.monotonic(), *at[:3], name, phase, victims, resume))
        _send(at.pid, name)
        if resume is not None:
            self._resumes.append((time.monotonic() + resume, at.pid))

    def _phase(self, at: RankStatus) -> tuple[Phase, list[str]]:
        """What a worker is about, and the requests that it holds."""
        if at.state != "ready":
            return "starting", []
        there = self._engine.scheduler.on((at.stage, at.replica))
        victims = [sequence.request.id for sequence in there]
        generating = [one for one in there if len(one.tokens) > one.prompt_length]
        if any(one.computed >= one.prompt_length and one.computed >= len(one.tokens) - 1 for one in generating):
            return "decode", victims
        return ("recovering" if generating else "prefill" if there else "idle"), victims


def _send(pid: int, name: str) -> None:
    try:
        os.kill(pid, signal.Signals[f"SIG{name}"])
    except ProcessLookupError:
        pass  # it is dead already


def run_chaos(
    model: str, options: ChaosOptions, look: Look, trace_file: Path | None = None, **settings: Any
) -> ChaosReport:
    """Run the requests once in quiet, then under blows, and check. `look(done, all)` hears of progress."""
    opened = open_model(model)
    before = _Belongings.now()
    settings.setdefault("max_sequences", max(Settings().max_sequences, options.concurrency))
    engine, resolved = build_split_engine(opened, Settings(plan=options.plan, **settings))
    executor = engine.executor
    assert isinstance(executor, StagedExecutor)
    plan = Plan.parse(resolved.plan or options.plan, opened.spec)
    try:
        load = _Load(engine, requests_for(options.requests, opened.spec.vocab_size, options.seed), options.concurrency)
        quiet_rate = load.learn()
        _all_back(engine, executor, plan)
        settled = _Belongings.now()
        engine.trace.clear()
        load.salt = "chaos "
        saboteur = _Saboteur(engine, executor, options)
        saboteur.start()
        done = options.requests

        def goes_on() -> bool:
            look(load.finished, max(done, load.started))
            return saboteur.wants_more

        try:
            seconds = load.run(goes_on)
        finally:
            saboteur.end()
        checks = [_all_back(engine, executor, plan), *_left_over(engine, settled, _Belongings.now())]
        marks = engine.trace.marks
        if trace_file is not None:
            from ..workers.timeline import write_timeline

            write_timeline(trace_file, engine.trace, engine.trace.spans, marks, plan)
    finally:
        engine.close()
    checks.append(_gone(before, _Belongings.now()))
    if saboteur.error is not None:
        raise saboteur.error
    _follow(saboteur.hits, marks, load.times, quiet_rate)
    checks[:0] = _answers(load, saboteur, options)
    config = machine_facts() | msgspec.to_builtins(resolved) | msgspec.to_builtins(options)
    return ChaosReport(config, quiet_rate, len(load.times) / seconds, load.finished, saboteur.hits, checks)


def _answers(load: _Load, saboteur: _Saboteur, options: ChaosOptions) -> list[Check]:
    unequal = sum("other tokens" in problem for problem in load.wrong)
    failed = [problem for problem in load.wrong if "other tokens" not in problem]
    in_decode = sum(hit.phase == "decode" for hit in saboteur.hits)
    checks = [
        Check("all finished", load.finished == load.started and not failed, f"{load.finished} of {load.started}"),
        Check("tokens equal to the quiet run's", not unequal, f"{unequal} of {load.finished} differ"),
    ]
    if not options.schedule:
        share = in_decode / max(1, len(saboteur.hits))
        found = f"{in_decode} of {len(saboteur.hits)}"
        checks.append(Check("80% of the blows hit a worker in mid-decode", share >= 0.8, found))
    checks += [Check("no surprise", False, problem) for problem in failed[:5]]
    return checks


def _follow(hits: Sequence[Hit], marks: Sequence[Mark], times: Sequence[tuple[float, str]], quiet_rate: float) -> None:
    """Find out what came of each blow."""
    moments = [moment for moment, _ in times]
    for hit in hits:
        own = [mark for mark in marks if (mark.stage, mark.replica) == (hit.stage, hit.replica) and mark.time >= hit.at]
        lost = next((mark for mark in own if mark.kind == "lost"), None)
        joined = next((mark for mark in own if mark.kind == "joined"), None)
        others = (one.at for one in hits if (one.stage, one.replica) == (hit.stage, hit.replica))
        following = min((at for at in others if at > hit.at + TOGETHER_SECONDS), default=math.inf)
        if lost is None or lost.time > following or (joined is not None and joined.time < lost.time):
            continue
        hit.detected = lost.time - hit.at
        start = bisect_right(moments, lost.time)
        victims = set(hit.victims)
        hit.first_token = next((at - hit.at for at, whose in times[start:] if whose in victims), None)
        if joined is not None:
            hit.recovered = joined.time - hit.at
            count = bisect_left(moments, joined.time) - bisect_left(moments, hit.at)
            hit.rate = count / hit.recovered / quiet_rate


def _all_back(engine: Engine, executor: StagedExecutor, plan: Plan) -> Check:
    """Wait until all replicas are there."""
    deadline = time.monotonic() + RETURN_SECONDS
    while time.monotonic() < deadline:
        engine.tend()
        status = executor.status()
        if len(status) == plan.workers and all(one.state == "ready" for one in status):
            time.sleep(0.1)  # what still says its last words
            engine.tend()
            return Check("all replicas back", True, f"{plan.workers} workers ready")
        time.sleep(0.01)
    return Check(
        "all replicas back", False, ", ".join(f"{at.stage}.{at.replica} {at.state}" for at in executor.status())
    )


# What a process holds


@dataclass(frozen=True)
class _Belongings:
    descriptors: int
    shared: int  # descriptors and mappings of the channels' and groups' memory
    children: tuple[str, ...] = field(default=())  # their states, as the system writes them

    @classmethod
    def now(cls) -> _Belongings:
        links = [_link(name) for name in os.listdir("/proc/self/fd")]
        mapped = Path("/proc/self/maps").read_text().count("/memfd:headrace")
        children = [
            pid for task in os.listdir("/proc/self/task") for pid in _text(f"/proc/self/task/{task}/children").split()
        ]
        states = tuple(sorted(_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[0] for pid in children))
        return cls(sum(map(bool, links)), mapped + sum("memfd:headrace" in link for link in links), states)


def _link(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{name}")
    except OSError:
        return ""  # the one that listed the others


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ") X" if path.endswith("stat") else ""


def _left_over(engine: Engine, settled: _Belongings, now: _Belongings) -> list[Check]:
    pools = engine.scheduler.routes.pools
    held = sum(pool.count - 1 - pool.available for pool in pools)
    try:
        engine.scheduler.check()
        problem = ""
    except AssertionError as error:
        problem = f"; {error}"
    zombies = now.children.count("Z")
    return [
        Check("no page is held", not held and not problem, f"{held} of {sum(p.count - 1 for p in pools)}{problem}"),
        Check(
            "no process too many",
            len(now.children) == len(settled.children) and not zombies,
            f"{len(now.children)} of {len(settled.children)}, {zombies} zombies",
        ),
        Check(
            "no descriptor too many",
            now.descriptors <= settled.descriptors,
            f"{now.descriptors}, {settled.descriptors} before",
        ),
        Check("no shared memory too much", now.shared <= settled.shared, f"{now.shared}, {settled.shared} before"),
    ]


def _gone(before: _Belongings, now: _Belongings) -> Check:
    more = (
        len(now.children) - len(before.children),
        now.descriptors - before.descriptors,
        now.shared - before.shared,
    )
    found = f"{more[0]} processes, {more[1]} descriptors, {more[2]} shared memories"
    return Check("nothing left when closed", max(more) <= 0, found)


# What is said of it


def as_runs(report: ChaosReport) -> list[dict[str, Any]]:
    """Rows of the results schema: one a hit."""
    first = min((hit.at for hit in report.hits), default=0.0)
    names = {"detected": "detection_s", "recovered": "recovery_s", "first_token": "first_token_s", "rate": "rate_share"}
    return [
        {"test": f"SIG{hit.signal} {hit.phase}", "worker": hit.where, "signal": hit.signal, "phase": hit.phase}
        | {"at_s": hit.at - first, "sequences": len(hit.victims)}
        | {name: value for field, name in names.items() if (value := getattr(hit, field)) is not None}
        for hit in report.hits
    ]


def summary(report: ChaosReport) -> dict[str, Any]:
    runs = as_runs(report)
    found: dict[str, Any] = {}
    for metric in ("detection_s", "recovery_s", "first_token_s", "rate_share"):
        found |= summarize([run for run in runs if metric in run], {metric: metric})
    return found | {
        "passed": report.passed,
        "finished": report.finished,
        "hits": len(report.hits),
        "quiet_tokens_per_second": report.quiet_rate,
        "tokens_per_second": report.rate,
        "checks": {check.name: check.passed for check in report.checks},
    }


def write_chaos(report: ChaosReport, path: Path) -> None:
    write_results(path, report.config, as_runs(report), summary(report))


def print_chaos(report: ChaosReport) -> None:
    """A line a hit, the distribution of what they cost, and the checks."""
    from rich.console import Console

    console = Console(highlight=False)
    console.print(_hits(report))
    console.print(_costs(report))
    change = report.rate / report.quiet_rate - 1
    console.print(
        f"{report.finished} requests, {len(report.hits)} blows; {report.quiet_rate:,.0f} tokens/s in quiet, "
        f"{report.rate:,.0f} under blows ({change:+.0%})"
    )
    for check in report.checks:
        console.print(f"{'[green]ok[/]' if check.passed else '[red]FAILED[/]'} {check.name}: {check.found}")


def _hits(report: ChaosReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    names = (
        "at s",
        "worker",
        "signal",
        "phase",
        "held",
        "detected ms",
        "back ms",
        "first token ms",
        "tokens/s of quiet",
    )
    for name in names:
        table.add_column(name, justify="left" if name in ("worker", "signal", "phase") else "right")
    first = min((hit.at for hit in report.hits), default=0.0)
    for hit in report.hits:
        named = hit.signal if hit.resume is None else f"{hit.signal}/{hit.resume:g}"
        times = (f"{value * 1e3:,.0f}" if value is not None else "-" for value in _times(hit))
        rate = "-" if hit.rate is None else f"{hit.rate:.0%}"
        table.add_row(f"{hit.at - first:.1f}", hit.where, named, hit.phase, str(len(hit.victims)), *times, rate)
    return table


def _times(hit: Hit) -> tuple[float | None, float | None, float | None]:
    return hit.detected, hit.recovered, hit.first_token


def _costs(report: ChaosReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("", "blows", "p50", "p99", "max"):
        table.add_column(name, justify="left" if not name else "right")
    rows = (
        ("detected, ms: killed", "detected", lambda hit: hit.signal != "STOP"),
        ("detected, ms: stopped", "detected", lambda hit: hit.signal == "STOP"),
        ("replica back, ms", "recovered", lambda hit: True),
        ("first token of its requests, ms", "first_token", lambda hit: True),
    )
    for title, name, wanted in rows:
        values = [getattr(hit, name) for hit in report.hits if wanted(hit) and getattr(hit, name) is not None]
        if values:
            stats = summarize([{"s": value} for value in values], {"s": "s"})
            shown = (f"{(stats[f'{stat}_s'] or 0.0) * 1e3:,.0f}" for stat in ("p50", "p99", "max"))
            table.add_row(title, str(len(values)), *shown)
    return table
