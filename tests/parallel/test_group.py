"""Groups: sums in the ranks' order, the same bytes by shared memory and by channels, in processes, and their end."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace.errors import ConfigError, EngineDeadError
from headrace.formats.tensor import F32, Tensor
from headrace.kernels import native
from headrace.kernels.native import BROKEN_LOGITS, SAMPLE, Limits, NativeOps
from headrace.kernels.ops import Batch
from headrace.parallel.channel import Edge, open_receiver, open_sender
from headrace.parallel.group import ChannelGroup, GroupSizes, SharedGroup
from headrace.parallel.shm import ShmEdge

NATIVE = native.missing() is None
needs_native = pytest.mark.skipif(not NATIVE, reason="no native kernels")
SIZES = GroupSizes(ranks=3, rows=160, width=24, logits=8, columns=11)
CUTS = (0, 11, 15, 22)  # of 22 columns, the first rank has half


def shared(sizes: GroupSizes) -> list[SharedGroup]:
    file = SharedGroup.create(sizes)
    groups = [SharedGroup(file, rank) for rank in range(sizes.ranks)]
    os.close(file)
    return groups


def channels(sizes: GroupSizes) -> list[ChannelGroup]:
    """Ranks joined by a mesh of edges in shared memory."""
    rank = range(sizes.ranks)
    edge = Edge("test", max(sizes.rows * sizes.width, sizes.logits * sizes.columns) * 4, 8)
    edges = {(a, b): ShmEdge.create(edge.max_bytes, edge.messages) for a in rank for b in rank if a != b}
    senders = {pair: open_sender("shm", made.fds.duplicate(), edge) for pair, made in edges.items()}
    receivers = {pair: open_receiver("shm", made.fds.duplicate(), edge) for pair, made in edges.items()}
    for made in edges.values():
        made.close()
    return [
        ChannelGroup(sizes, a, [senders.get((a, b)) for b in rank], [receivers.get((b, a)) for b in rank]) for a in rank
    ]


MAKERS: list[Callable[[GroupSizes], Sequence[Any]]] = [shared, channels]


@contextmanager
def together(groups: Sequence[Any]) -> Iterator[Callable[[Callable[[Any], Any]], list[Any]]]:
    """Runs a function on every rank at once; nothing that fails leaves another rank waiting."""
    with ThreadPoolExecutor(len(groups)) as pool:

        def run(work: Callable[[Any], Any]) -> list[Any]:
            def guarded(group: Any) -> Any:
                try:
                    return work(group)
                except BaseException:
                    for other in groups:
                        other.abort()
                    raise

            return list(pool.map(guarded, groups, timeout=60))

        yield run


def partial(rank: int, number: int, rows: int = 160) -> np.ndarray:
    random = np.random.default_rng(100 * number + rank)
    return random.standard_normal((rows, 24), dtype=np.float32) * np.float32(10.0 ** (3 * rank))


def expected(number: int, rows: int = 160) -> np.ndarray:
    return (partial(0, number, rows) + partial(1, number, rows)) + partial(2, number, rows)


@pytest.mark.parametrize("make", MAKERS)
def test_sums_are_in_the_ranks_order(make: Callable) -> None:
    with together(make(SIZES)) as run:
        for number, rows in enumerate([160, 1, 7, 40, 2, 3, 160, 160, 1]):
            sums = run(lambda group, n=number, r=rows: group.start(partial(group.rank, n, r)).wait())
            assert all(total.tobytes() == expected(number, rows).tobytes() for total in sums)
    other_order = (partial(1, 0) + partial(2, 0)) + partial(0, 0)
    assert other_order.tobytes() != expected(0).tobytes()


@pytest.mark.parametrize("make", MAKERS)
def test_two_reductions_at_once(make: Callable) -> None:
    """In either order of waiting, many times over."""

    def work(group: Any) -> list[np.ndarray]:
        out = []
        for number in range(0, 40, 2):
            first, second = (group.start(partial(group.rank, n)) for n in (number, number + 1))
            pair = [second.wait(), first.wait()][::-1] if number % 4 else [first.wait(), second.wait()]
            out += pair
        return out

    with together(make(SIZES)) as run:
        for sums in run(work):
            assert [total.tobytes() for total in sums] == [expected(n).tobytes() for n in range(40)]


@pytest.mark.parametrize("make", MAKERS)
def test_columns_are_gathered(make: Callable) -> None:
    with together(make(SIZES)) as run:
        for rows in (8, 1, 0, 5):
            whole = np.random.default_rng(rows).standard_normal((rows, 22), dtype=np.float32)
            own = lambda group, w=whole: group.gather(w[:, CUTS[group.rank] : CUTS[group.rank + 1]], CUTS)  # noqa: E731
            assert all(gathered.tobytes() == whole.tobytes() for gathered in run(own))


@pytest.mark.parametrize("make", MAKERS)
def test_what_does_not_fit_is_refused(make: Callable) -> None:
    group = make(SIZES)[0]
    for shape in ((161, 24), (4, 23)):
        with pytest.raises(ConfigError, match=f"{shape[0]} rows of {shape[1]} in a group made for 160 rows of 24"):
            group.start(np.zeros(shape, np.float32))
    with pytest.raises(ConfigError, match="9 rows of up to 11 columns in a group made for 8 rows of 11"):
        group.gather(np.zeros((9, 11), np.float32), CUTS)
    with pytest.raises(ConfigError, match="up to 12 columns"):
        group.gather(np.zeros((8, 12), np.float32), (0, 12, 15, 22))
    with pytest.raises(ConfigError, match="rows must be from 0 to"):
        GroupSizes(2, 1 << 25, 24)
    with pytest.raises(ConfigError, match="0 ranks"):
        GroupSizes(0, 1, 24)


@pytest.mark.parametrize("make", MAKERS)
def test_an_abort_ends_waits(make: Callable) -> None:
    groups = make(SIZES)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: groups[0].start(partial(0, 0)).wait())
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        (groups[1] if make is shared else groups[0]).abort()  # shared memory tells every rank
        with pytest.raises(EngineDeadError, match="aborted"):
            waiting.result(20)
    assert groups[0].aborted


def test_a_file_that_is_no_group(tmp_path: Path) -> None:
    file = SharedGroup.create(SIZES)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 4096)  # nobody can shrink it under those who have it mapped
    bytes_of = os.pread(file, os.fstat(file).st_size, 0)
    os.close(file)
    path = tmp_path / "group"
    for content in (
        b"",
        b"x",
        b"\0" * 8192,
        bytes_of[:-1],
        bytes_of + b"\0",
        struct.pack("<8s5q", b"hrgroup1", *[1 << 40] * 5),
    ):
        path.write_bytes(content)
        with path.open("r+b") as opened, pytest.raises(ConfigError):
            SharedGroup(opened.fileno(), 0)
        if NATIVE:
            with path.open("r+b") as opened, pytest.raises(ValueError, match="bytes"):
                native.shared_group(opened.fileno(), 0)
    path.write_bytes(bytes_of)
    for rank in (-1, 3):
        with path.open("r+b") as opened, pytest.raises(ConfigError, match=f"rank {rank}"):
            SharedGroup(opened.fileno(), rank)


def test_channels_of_a_group_are_all_there() -> None:
    with pytest.raises(ConfigError, match="one for each rank"):
        ChannelGroup(SIZES, 0, [None], [None])
    with pytest.raises(ConfigError, match="rank 0 lacks a channel"):
        ChannelGroup(SIZES, 0, [None] * 3, [None] * 3)


# ---- native programs


def tensor(values: np.ndarray) -> Tensor:
    return Tensor(
        "w", values.shape, F32, np.ascontiguousarray(values, np.float32).view(np.uint8).reshape(-1), Path("t")
    )


class Net:
    """A rank of a small net: hidden [rows, 24] -> two reductions -> logits of 22 columns."""

    def __init__(self, group: Any, threads: int = 1, wide: float = 1.0) -> None:
        self.ops = NativeOps(threads, group=group)
        random = np.random.default_rng(group.rank)
        weights = [random.standard_normal((24, 24)) / 5 for _ in range(2)]
        head = np.random.default_rng(7).standard_normal((22, 24))[CUTS[group.rank] : CUTS[group.rank + 1]]
        head[-1, 3] *= wide
        self.first, self.second = (self.ops.pack(tensor(weight)) for weight in weights)
        self.head = self.ops.pack(tensor(head))
        limits = Limits(rows=160, logits=8, chunks=8, sequences=4, pages=())
        self.program = self.ops.capture(self._forward, limits, hidden=24)

    def _forward(self, batch: Batch):
        ops, x = self.ops, batch.hidden
        for weight in (self.first, self.second):
            x = ops.add(x, ops.all_reduce(ops.linear(x, weight)))
        return ops.all_gather(ops.linear(ops.take_rows(x, batch.logit_rows), self.head), CUTS)

    def submit(self, hidden: np.ndarray, samples: np.ndarray):
        rows = np.arange(len(hidden), dtype=np.int32)
        chunk_rows = np.array([0, len(hidden)], np.int32)
        return self.program.submit(rows[:0], rows, chunk_rows, rows[: len(samples)], [], samples, hidden)


def samples_of(*temperatures: float, logits: bool = True) -> np.ndarray:
    samples = np.zeros(len(temperatures), SAMPLE)
    samples["temperature"], samples["top_p"], samples["slot"] = temperatures, 1, [0, 1, 2, 3, *[-1] * 4][: len(samples)]
    samples["choose"], samples["logits"], samples["seed"] = 1, logits, 11
    return samples


HIDDEN = np.random.default_rng(0).standard_normal((160, 24), dtype=np.float32)


@needs_native
@pytest.mark.parametrize("threads", [1, 2])
def test_native_ranks_by_channels_give_the_bytes_of_shared_memory(threads: int) -> None:
    """Logits and tokens, greedy and sampled, many steps queued."""
    results = []
    for make in MAKERS:
        groups = make(SIZES)
        nets = [Net(group, threads) for group in groups]
        steps = []
        for count in (160, 3, 1, 130, 40, 8, 1, 2):
            few = min(count, 8)
            for samples in (samples_of(*[0.0, 20.0] * 4)[:few], samples_of(*[0.0] * few, logits=False)):
                steps.append([net.submit(HIDDEN[:count], samples) for net in nets])
        outs = [[ticket.result() for ticket in step] for step in steps]
        for ranks in outs:
            assert all(ranks[0][0] == tokens for tokens, _ in ranks)
            assert all(ranks[0][1].tobytes() == logits.tobytes() for _, logits in ranks)
        assert [ticket.reduces[0] for ticket in steps[0]] == [2, 2, 2]
        results.append([(tokens, logits.tobytes()) for (tokens, logits), *_ in outs])
    assert results[0] == results[1]
    assert len({tuple(tokens) for tokens, _ in results[0]}) > 4


@needs_native
@pytest.mark.parametrize("make", MAKERS)
def test_broken_logits_of_one_rank_break_the_row_on_all(make: Callable) -> None:
    nets = [Net(group, wide=np.inf if group.rank == 1 else 1.0) for group in make(SIZES)]
    for temperature in (0.0, 0.8):
        tickets = [net.submit(HIDDEN[:2], samples_of(temperature, temperature, logits=False)) for net in nets]
        assert [ticket.result()[0] for ticket in tickets] == [[BROKEN_LOGITS] * 2] * 3


@needs_native
def test_equal_logits_go_to_the_lowest_id() -> None:
    nets = [Net(group) for group in shared(SIZES)]
    tickets = [net.submit(np.zeros((2, 24), np.float32), samples_of(0.0, 0.0)) for net in nets]
    assert [ticket.result()[0] for ticket in tickets] == [[0, 0]] * 3


@needs_native
@pytest.mark.parametrize("make", MAKERS)
def test_an_abort_ends_a_native_step(make: Callable) -> None:
    """With two threads a rank; the steps that follow fail too, and the rank can be let go of."""
    groups = make(SIZES)
    net = Net(groups[0], threads=2)
    tickets = [net.submit(HIDDEN, samples_of(0.0)) for _ in range(3)]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(tickets[0].result)
        with pytest.raises(TimeoutError):
            waiting.result(0.05)
        (groups[1] if make is shared else groups[0]).abort()
        with pytest.raises(EngineDeadError, match="aborted"):
            waiting.result(20)
    for ticket in tickets[1:]:
        with pytest.raises(EngineDeadError):
            ticket.result()


@needs_native
def test_a_channel_that_fails_is_named() -> None:
    groups = channels(SIZES)
    net = Net(groups[0])
    for end in groups[1]._mesh._senders.values():
        end.close()
    with pytest.raises(EngineDeadError, match=r"aborted \(.*other end is gone"):
        net.submit(HIDDEN, samples_of(0.0)).result()
    assert groups[0].aborted


LET_GO = """
from tests.parallel.test_group import HIDDEN, SIZES, Net, channels, samples_of
groups = channels(SIZES)
net = Net(groups[0])
net.ops.finish_packing()
groups[1]._mesh._senders[0].close()
net.submit(HIDDEN, samples_of(0.0))
del net
print("let go")
"""


@needs_native
def test_a_rank_whose_step_still_calls_its_channels_can_be_let_go_of() -> None:
    """The threads of the pool need the interpreter to end. In a process: one that stands still could not be ended."""
    done = subprocess.run(
        [sys.executable, "-c", LET_GO], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "let go\n", done.stderr


@needs_native
def test_a_group_serves_one_program_that_fits() -> None:
    group = shared(SIZES)[0]
    net = Net(group)
    with pytest.raises(ConfigError, match="used already"):
        net.ops.capture(net._forward, Limits(160, 8, 8, 4, ()), hidden=24)
    for sizes in (GroupSizes(3, 159, 24, 8, 11), GroupSizes(3, 160, 23, 8, 11), GroupSizes(3, 160, 24, 7, 11)):
        with pytest.raises(ConfigError, match="does not fit its group"):
            Net(shared(sizes)[0])
    with pytest.raises(ConfigError, match="does not fit its group"):
        Net(shared(GroupSizes(3, 160, 24, 8, 10))[0])


# ---- processes

WORKER = """
import sys, time
import numpy as np
from headrace.parallel.group import SharedGroup
file, rank, steps = map(int, sys.argv[1:])
group = SharedGroup(file, rank)
random = np.random.default_rng(rank)
total = np.float32(0)
for step in range(steps):
    rows = 1 + step * 7 % group.sizes.rows
    x = random.standard_normal((group.sizes.rows, group.sizes.width), dtype=np.float32)[:rows] * np.float32(10 ** rank)
    if random.random() < 0.1:
        time.sleep(random.random() * 1e-3)
    total = total * np.float32(0.5) + group.start(x).wait().sum(dtype=np.float32)
print(total.tobytes().hex())
"""


def test_ranks_in_processes() -> None:
    """Three processes, one of them slow now and then: all have the same sums, twice."""
    seen = set()
    for _ in range(2):
        file = SharedGroup.create(SIZES)
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(file), str(rank), "200"], pass_fds=[file], stdout=subprocess.PIPE
            )
            for rank in range(3)
        ]
        os.close(file)
        try:
            seen |= {worker.communicate(timeout=60)[0] for worker in workers}
        finally:
            for worker in workers:
                worker.kill()
    assert len(seen) == 1 and len(seen.pop()) == 9
