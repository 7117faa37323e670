"""One rank: a Step in, a StepResult out."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from ..errors import HeadraceError
from ..kernels.ops import Ops
from ..model.decoder import Decoder
from ..sampling import logprob_of, sample
from ..types import NO_TOKEN, Chunk, ChunkExtras, Step, StepResult, TokenLogprob
from .residents import Resident, Residents, Rows


class Runner:
    """Runs a whole model with an op set whose calls run at once. `caches[pool]` lists a KV group's caches, one per layer."""

    def __init__(self, decoder: Decoder, ops: Ops, caches: list[list[Any]], residents: Residents) -> None:
        self._decoder, self._ops, self._caches, self._residents = decoder, ops, caches, residents

    def run(self, step: Step) -> StepResult:
        """Compute and sample one step. What fails for one chunk alone is reported in its extras."""
        started = time.monotonic()
        self._residents.update(step)
        for transfer in step.transfers:
            self._ops.copy_page(self._caches[transfer.pool], transfer.source, transfer.target)
        rows = self._residents.rows(step)
        logits = self._decoder.forward(self._ops, rows.batch(_bind_late(rows)), self._caches)
        tokens, extras = choose(rows, np.asarray(logits))
        return StepResult(step.number, tokens, extras, started, time.monotonic())


def _bind_late(rows: Rows) -> np.ndarray:
    """The step's tokens, each LATE one replaced by what its sequence sampled meanwhile."""
    tokens = rows.tokens.copy()
    for row in np.flatnonzero(tokens < 0):
        chunk = int(np.searchsorted(rows.chunk_rows, row, side="right")) - 1
        tokens[row] = rows.residents[chunk].tokens[rows.positions[row]]
    return tokens


def choose(rows: Rows, logits: np.ndarray) -> tuple[tuple[int, ...], dict[int, ChunkExtras]]:
    """Sample what the chunks ask for from logits [len(rows.logit_rows), vocab], and note each token with its sequence."""
    tokens, extras, row = [], {}, 0
    for index, (chunk, resident) in enumerate(zip(rows.chunks, rows.residents, strict=True)):
        own = logits[row : row + chunk.logit_rows]
        row += chunk.logit_rows
        token = NO_TOKEN
        try:
            if chunk.samples:
                token = _sample(resident, own[-1])
            extra = _extras(chunk, resident, own, token)
        except HeadraceError as error:
            extra = ChunkExtras(error=str(error))
        if extra is not None:
            extras[index] = extra
        if chunk.samples:
            resident.tokens.append(max(token, 0))
        tokens.append(token)
    return tuple(tokens), extras


def _sample(resident: Resident, logits: np.ndarray) -> int:
    request, split = resident.request, resident.prompt_length
    return sample(
        logits,
        request.params,
        seed=request.seed,
        sample_index=request.sample_index,
        position=len(resident.tokens),
        prompt_ids=request.prompt_ids,
        output_ids=resident.tokens[split:],
        stop_ids=request.stop_ids,
    )


def _extras(chunk: Chunk, resident: Resident, logits: np.ndarray, token: int) -> ChunkExtras | None:
    """Logprobs and logits of the chunk's last `logit_rows` rows, where they are asked for."""
    params = resident.request.params
    logprob = logprob_of(logits[-1], token, params.logprobs) if chunk.samples and params.logprobs is not None else None
    prompt: list[TokenLogprob] = []
    if params.prompt_logprobs is not None:
        first = chunk.start + len(chunk.tokens) - chunk.logit_rows
        for index in range(min(chunk.logit_rows, resident.prompt_length - 1 - first)):
            target = resident.tokens[first + index + 1]
            prompt.append(logprob_of(logits[index], target, params.prompt_logprobs))
    kept = logits.copy() if params.return_logits and chunk.logit_rows else None
    if logprob is None and not prompt and kept is None:
        return None
    return ChunkExtras(logprob, tuple(prompt), kept)
