"""One rank: a Step in, a StepResult out."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import numpy as np

from ..kernels.native import SAMPLE, NativeOps, NativeProgram, Ticket, logits_spec, sample_spec
from ..kernels.ops import Ops
from ..model.decoder import Decoder
from ..types import LATE, NO_TOKEN, Step, StepResult
from .answers import answer
from .executor import Single
from .residents import Resident, Residents, Rows


class Runner:
    """Runs a whole model with an op set whose calls run at once. `caches[pool]` lists a KV group's caches, one per
    layer."""

    def __init__(self, decoder: Decoder, ops: Ops, caches: list[list[Any]], residents: Residents) -> None:
        self._decoder, self._ops, self._caches, self._residents = decoder, ops, caches, residents

    def run(self, step: Step) -> StepResult:
        """Compute and sample one step."""
        started = time.monotonic()
        self._residents.update(step)
        for transfer in step.transfers:
            self._ops.copy_page(self._caches[transfer.pool], transfer.source, transfer.target)
        rows = self._residents.rows(step)
        for index, chunk in enumerate(rows.chunks):
            if chunk.tokens[-1] == LATE:
                rows.bind(index)
        batch = rows.batch()
        logits = np.asarray(self._decoder.forward(self._ops, batch, self._caches))
        load = tuple(int(count) for layer in batch.expert_load for count in layer)
        return answer(step.number, rows, [NO_TOKEN] * len(logits), iter(logits), started, time.monotonic(), load)


class NativeRunner(Single):
    """Runs a whole model as one captured program. An Executor: steps queue in native code, so no thread of Python's
    is kept busy and a step can be queued before the one that samples its tokens has run."""

    def __init__(self, program: NativeProgram, ops: NativeOps, caches: list[list[Any]], residents: Residents) -> None:
        super().__init__()
        self._program, self._ops, self._caches, self._residents = program, ops, caches, residents

    def submit(self, step: Step) -> None:
        self._ops.finish_packing()
        self._residents.update(step)
        for transfer in step.transfers:
            self._ops.copy_page(self._caches[transfer.pool], transfer.source, transfer.target)
        rows = self._residents.rows(step)
        for index, (chunk, resident) in enumerate(zip(rows.chunks, rows.residents, strict=True)):
            if chunk.tokens[-1] == LATE and resident.in_python:
                self._settle(chunk.late_step)
                rows.bind(index)
        ticket = self._program.submit(
            rows.tokens, rows.positions, rows.chunk_rows, rows.logit_rows, rows.groups, _samples(rows)
        )
        for chunk, resident in zip(rows.chunks, rows.residents, strict=True):
            if resident.matcher is not None and chunk.samples:
                resident.matcher.prepare(resident.output_ids)  # while the step is computed
        self._open.append((step.number, _Queued(step.number, rows, ticket)))

    def _settle(self, number: int) -> None:
        """Wait until the tokens of step `number` are noted: some of them are sampled in Python."""
        for earlier, queued in self._open:
            if earlier <= number:
                queued.result()

    def reset(self) -> None:
        while self._open:
            with suppress(Exception):
                self._open.popleft()[1].result()
        self._residents.clear()

    def close(self) -> None:
        self.reset()


class _Queued:
    """A queued step."""

    def __init__(self, number: int, rows: Rows, ticket: Ticket) -> None:
        self._number, self._rows, self._ticket = number, rows, ticket
        self._result: StepResult | None = None

    def result(self) -> StepResult:
        if self._result is None:
            chosen, logits = self._ticket.result()
            load = tuple(self._ticket.expert_load)
            self._result = answer(self._number, self._rows, chosen.tolist(), iter(logits), *self._ticket.times, load)
        return self._result


_LOGITS = np.array([logits_spec()], SAMPLE).tobytes()


def _sampling(resident: Resident) -> bytes | None:
    """The entry that makes the kernels sample for a sequence, or None where Python must."""
    if resident.sampling is None:
        request = resident.request
        spec = sample_spec(request.params, request.seed, request.sample_index, resident.slot)
        resident.sampling = b"" if spec is None else np.array([spec], SAMPLE).tobytes()
    return resident.sampling or None


def _samples(rows: Rows) -> np.ndarray:
    """SAMPLE entries of the step's logit rows; notes with each sequence who samples its token."""
    entries = []
    for chunk, resident in zip(rows.chunks, rows.residents, strict=True):
        if chunk.logit_rows:
            entry = _sampling(resident) if chunk.logit_rows == 1 and chunk.samples else None
            resident.in_python = entry is None
            entries.append(entry or _LOGITS * chunk.logit_rows)
    return np.frombuffer(b"".join(entries), SAMPLE)
