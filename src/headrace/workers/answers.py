"""From a step's logits and tokens to a StepResult: what is sampled in Python, and what only some requests ask for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ..errors import HeadraceError
from ..sampling import logprob_of, sample
from ..types import NO_TOKEN, Chunk, ChunkExtras, StepResult, TokenLogprob
from .residents import Resident, Rows


def answer(
    number: int,
    rows: Rows,
    chosen: list[int],
    logits: Iterator[np.ndarray],
    started: float,
    ended: float,
    expert_load: tuple[int, ...] = (),
) -> StepResult:
    """The answer to a step. `chosen[i]` is the token that the kernels chose for the step's i-th logit row, or
    NO_TOKEN where the row's logits, float32 [vocab], come next in `logits`. Every sampled token is noted with its
    sequence."""
    tokens: list[int] = []
    extras: dict[int, ChunkExtras] = {}
    row = 0
    for index, (chunk, resident) in enumerate(zip(rows.chunks, rows.residents, strict=True)):
        token, extra = NO_TOKEN, None
        if chunk.logit_rows:
            token = chosen[row]
            if chunk.logit_rows > 1 or token == NO_TOKEN:
                token, extra = _in_python(chunk, resident, [next(logits) for _ in range(chunk.logit_rows)])
            elif token < 0:
                extra = ChunkExtras(error="the model's output is not finite: its weights or dtype are broken")
            row += chunk.logit_rows
        if extra is not None:
            extras[index] = extra
        if chunk.samples:
            resident.tokens.append(token if token > 0 else 0)
        tokens.append(token)
    return StepResult(number, tuple(tokens), extras, started, ended, expert_load)


def _in_python(chunk: Chunk, resident: Resident, logits: list[np.ndarray]) -> tuple[int, ChunkExtras | None]:
    """Sample one chunk; what fails concerns this chunk alone."""
    try:
        token = _sample(resident, logits[-1]) if chunk.samples else NO_TOKEN
        return token, _extras(chunk, resident, logits, token)
    except HeadraceError as error:
        return NO_TOKEN, ChunkExtras(error=str(error))


def _sample(resident: Resident, logits: np.ndarray) -> int:
    request, output_ids = resident.request, resident.output_ids
    return sample(
        logits,
        request.params,
        seed=request.seed,
        sample_index=request.sample_index,
        position=len(resident.tokens),
        prompt_ids=request.prompt_ids,
        output_ids=output_ids,
        stop_ids=request.stop_ids,
        allowed=resident.matcher.allowed(output_ids) if resident.matcher else None,
    )


def _extras(chunk: Chunk, resident: Resident, logits: list[np.ndarray], token: int) -> ChunkExtras | None:
    """Logprobs and logits of the chunk's last `logit_rows` rows, where they are asked for."""
    params = resident.request.params
    logprob = logprob_of(logits[-1], token, params.logprobs) if chunk.samples and params.logprobs is not None else None
    prompt: list[TokenLogprob] = []
    if params.prompt_logprobs is not None:
        first = chunk.start + len(chunk.tokens) - chunk.logit_rows
        for index in range(min(chunk.logit_rows, resident.prompt_length - 1 - first)):
            target = resident.tokens[first + index + 1]
            prompt.append(logprob_of(logits[index], target, params.prompt_logprobs))
    kept = np.stack(logits) if params.return_logits else None
    if logprob is None and not prompt and kept is None:
        return None
    return ChunkExtras(logprob, tuple(prompt), kept)
