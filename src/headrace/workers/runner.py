"""One rank: a Step in; a StepResult out, or the hidden states for the next stage.

prepare  notes who came and left, and makes arrays of the chunks      in the order of the steps
launch   computes, given the hidden states of the stage before        where there is such a stage, as they come
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..kernels.native import SAMPLE, NativeOps, NativeProgram, Ticket, logits_spec, sample_spec
from ..kernels.ops import Ops
from ..model.decoder import Decoder
from ..types import LATE, NO_TOKEN, Step, StepResult
from .answers import answer
from .executor import Single
from .residents import Resident, Residents, Rows

Reduces = tuple[int, int, float]  # sums over a replica's ranks: how many, bytes, seconds waited for


class Prepared(NamedTuple):
    step: Step
    rows: Rows


class Launched(Protocol):
    """A step under way on this rank."""

    def done(self) -> bool:
        """Whether a result is there at once."""
        ...

    def result(self) -> StepResult:
        """Of a range that ends the model. Waits, as the next one."""
        ...

    def hidden(self) -> np.ndarray:
        """Of any other range: float32 [rows, dim]."""
        ...

    @property
    def times(self) -> tuple[float, float]:
        """When it started and ended, in seconds of time.monotonic. To be read after a result."""
        ...

    @property
    def reduces(self) -> Reduces:
        """To be read after a result."""
        ...


class Runner:
    """Runs a range of layers with an op set whose calls run at once. `caches[pool]` lists a KV group's caches, one per
    layer."""

    def __init__(self, decoder: Decoder, ops: Ops, caches: list[list[Any]], residents: Residents) -> None:
        self._decoder, self._ops, self._caches, self._residents = decoder, ops, caches, residents
        self._ends = decoder.layers.stop == decoder.spec.layers

    def run(self, step: Step) -> StepResult:
        """Compute and sample one step of a whole model."""
        return self.launch(self.prepare(step)).result()

    def prepare(self, step: Step) -> Prepared:
        return Prepared(step, self._residents.prepare(step))

    def launch(self, prepared: Prepared, hidden: np.ndarray | None = None) -> Launched:
        started, (step, rows) = time.monotonic(), prepared
        for copy in self._residents.copies(step):
            self._ops.copy_page(self._caches[copy.pool], copy.source, copy.target)
        for index, chunk in enumerate(rows.chunks):
            if chunk.tokens[-1] == LATE:
                rows.bind(index)
        batch = rows.batch(hidden)
        output = np.asarray(self._decoder.forward(self._ops, batch, self._caches))
        load = tuple(int(count) for layer in batch.expert_load for count in layer)
        times = (started, time.monotonic())
        if not self._ends:
            return _Done(None, output, times)
        return _Done(answer(step.number, rows, [NO_TOKEN] * len(output), iter(output), *times, load), output, times)

    def clear(self) -> None:
        """Forget every sequence."""
        self._residents.clear()

    def ring(self, eventfd: int) -> None:
        """Nobody waits here for a step that was launched."""

    def rest(self) -> None:
        """Nothing computes here while the host does something else."""


class _Done:
    """A step that was computed as it was launched."""

    reduces: Reduces = (0, 0, 0.0)

    def __init__(self, result: StepResult | None, output: np.ndarray, times: tuple[float, float]) -> None:
        self._result, self._output, self.times = result, output, times

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        assert self._result is not None
        return self._result

    def hidden(self) -> np.ndarray:
        return self._output


class NativeRunner(Single):
    """Runs a range of layers as one captured program. For a whole model it is an Executor: steps queue in native code,
    so no thread of Python's is kept busy and a step can be queued before the one that samples its tokens has run."""

    def __init__(
        self,
        program: NativeProgram,
        ops: NativeOps,
        caches: list[list[Any]],
        residents: Residents,
        ends: bool = True,
    ) -> None:
        super().__init__()
        self._program, self._ops, self._caches, self._residents, self._ends = program, ops, caches, residents, ends
        self._last: Queued | None = None  # its result, and those before it, may still have to be noted

    def submit(self, step: Step) -> None:
        self._open.append((step.number, self.launch(self.prepare(step))))

    def prepare(self, step: Step) -> Prepared:
        return Prepared(step, self._residents.prepare(step))

    def launch(self, prepared: Prepared, hidden: np.ndarray | None = None) -> Queued:
        """Queue a step. `hidden` is copied."""
        step, rows = prepared
        for copy in self._residents.copies(step):
            self._ops.copy_page(self._caches[copy.pool], copy.source, copy.target)
        for index, (chunk, resident) in enumerate(zip(rows.chunks, rows.residents, strict=True)):
            if resident.in_python and chunk.tokens[-1] == LATE and self._last is not None:
                self._last.result()
                rows.bind(index)
        logit_rows, samples = (rows.logit_rows, _samples(rows)) if self._ends else (_NO_ROWS, _NO_SAMPLES)
        tokens = rows.tokens if hidden is None else _NO_ROWS
        ticket = self._program.submit(tokens, rows.positions, rows.chunk_rows, logit_rows, rows.groups, samples, hidden)
        queued = Queued(step.number, rows, ticket, self._last)
        if self._ends:
            self._last = queued
            for chunk, resident in zip(rows.chunks, rows.residents, strict=True):
                if resident.matcher is not None and chunk.samples:
                    resident.matcher.prepare(resident.output_ids)  # while the step is computed
        return queued

    def reset(self) -> None:
        while self._open:
            with suppress(Exception):
                self._open.popleft()[1].result()
        self.clear()

    def ring(self, eventfd: int) -> None:
        """Add one to this eventfd whenever a step is done, from now on."""
        self._ops.ring(eventfd)

    def rest(self) -> None:
        """The host waits, for a step or for news."""
        self._ops.rest()

    def clear(self) -> None:
        self._last = None
        self._residents.clear()

    def close(self) -> None:
        self.reset()


class Queued:
    """A queued step. Tokens are noted with their sequences in the order of the steps, so a result waits for those of
    the steps before it."""

    def __init__(self, number: int, rows: Rows, ticket: Ticket, before: Queued | None) -> None:
        self._number, self._rows, self._ticket, self._before = number, rows, ticket, before
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            if self._before is not None:
                self._before.result()
                self._before = None
            chosen, logits = self._ticket.result()
            load = tuple(self._ticket.expert_load)
            self._result = answer(self._number, self._rows, chosen, iter(logits), *self._ticket.times, load)
        return self._result

    def done(self) -> bool:
        return self._ticket.done()

    def hidden(self) -> np.ndarray:
        return self._ticket.result()[1]

    @property
    def times(self) -> tuple[float, float]:
        return self._ticket.times

    @property
    def reduces(self) -> Reduces:
        return self._ticket.reduces


_LOGITS = np.array([logits_spec()], SAMPLE).tobytes()
_NO_ROWS, _NO_SAMPLES = np.empty(0, np.int32), np.empty(0, SAMPLE)


def _sampling(resident: Resident) -> bytes | None:
    """The entry that makes the kernels sample for a sequence, or None where Python must."""
    if resident.sampling is None:
        request = resident.request
        spec = sample_spec(request.params, request.seed, request.sample_index, resident.slot)
        resident.sampling = b"" if spec is None else np.array([spec], SAMPLE).tobytes()
    return resident.sampling or None


def _samples(rows: Rows) -> np.ndarray:
    """SAMPLE entries of the step's logit rows; notes with each sequence whether Python samples its token."""
    entries = []
    for chunk, resident in zip(rows.chunks, rows.residents, strict=True):
        if chunk.logit_rows:
            entry = _sampling(resident) if chunk.logit_rows == 1 and chunk.samples else None
            resident.in_python = entry is None
            entries.append(entry or _LOGITS * chunk.logit_rows)
    return np.frombuffer(b"".join(entries), SAMPLE)
