"""Choosing a token from logits: penalties, filters, the draw, and logprobs.

A sampled token depends only on its logits, the sequence's own tokens, the parameters, and (seed, sample index,
position). A compiled twin must choose the same tokens, so every number that decides is made of IEEE additions,
multiplications and divisions in a stated order, without fused multiply-add or a maths library: adjusted logits are
float64 results rounded to float32, weights are `_exp2`'s, sums run in `_block_ends`' and `_shortest`'s order, and ties
go to the lower token id.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import numpy as np

from .errors import RequestError, SamplingError
from .types import SamplingParams, TokenLogprob

TokenIds = Sequence[int] | np.ndarray

_WORD = 0xFFFFFFFF  # mask of 32 bits
_BLOCK = 256  # values in a block of `_block_ends`
_CHUNK = 32 * _BLOCK  # values worked on at once: keeps temporaries in cache; does not change any result
_LEAST = -1000.0  # log2 of a weight that counts as zero; above the least normal float64, 2**-1022
_ROUND = 1.5 * 2.0**52  # added to a float64 of size below 2**51, it leaves the nearest integer in the low bits
_LN2 = 0.6931471805599453
_EXP_TERMS = tuple(accumulate(range(1, 12), lambda term, k: term * _LN2 / k, initial=1.0))  # Taylor, of 2**f


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 (Salmon et al. 2011): four random 32-bit words, a bijection of the counter words under the key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _WORD, (a >> 32) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def philox_uniform(seed: int, sample_index: int, position: int, draw: int = 0) -> float:
    """A uniform number in [0, 1) with 53 bits, a pure function of its arguments.

    The key is the seed modulo 2**64, low word first; the counter is (position, sample_index, draw, 0), each below
    2**32. Words 0 (high) and 1 (low) of the result give the bits.
    """
    high, low, _, _ = philox4x32((position, sample_index, draw, 0), (seed & _WORD, (seed >> 32) & _WORD))
    return ((high << 32 | low) >> 11) * 2.0**-53


def sample(
    logits: np.ndarray,
    params: SamplingParams,
    *,
    seed: int,
    sample_index: int,
    position: int,
    prompt_ids: TokenIds,
    output_ids: TokenIds,
    stop_ids: TokenIds,
    allowed: np.ndarray | None = None,
) -> int:
    """Choose the token at `position` (0 is the prompt's first) of a sequence from its logits, float32 [vocab].

    The order is that of SamplingParams; each filter sees the distribution that the previous ones left, renormalised.
    Top-k keeps exactly k tokens; top-p the fewest most likely tokens that hold p (Holtzman et al. 2020); typical-p the
    fewest tokens that hold p with a surprise closest to the entropy (Meister et al. 2023); min-p all tokens at least
    min_p times as likely as the best one (Nguyen et al. 2024). Ties go to the lower id, and at least one token stays.
    The draw inverts the cumulative distribution of what is left, in order of token ids.

    `prompt_ids` and `output_ids` are read only for penalties; long ones cost least as integer arrays. `allowed`, bool
    [vocab], bans all other tokens.

    Raises SamplingError where a logit is NaN or infinite, or every token is banned, and RequestError where a bias or a
    ban names a token outside the vocabulary.
    """
    logits = _checked(logits)
    adjusted = _adjusted(logits, params, prompt_ids, output_ids, stop_ids, allowed)
    best = int(adjusted.argmax())
    if adjusted[best] == -np.inf:
        raise SamplingError(f"all {len(logits)} tokens are banned at position {position}: ban fewer tokens")
    if params.temperature == 0:
        return best
    ids, uniform = _kept(adjusted, params), philox_uniform(seed, sample_index, position)
    if ids is None:
        return _draw(adjusted, params.temperature, uniform)
    return int(ids[_draw(adjusted[ids], params.temperature, uniform)])


def logprob_of(logits: np.ndarray, token: int, top: int) -> TokenLogprob:
    """Natural log of softmax(logits)[token], float64, the token's rank, and the `top` most likely tokens with theirs.

    It chooses no token, so it may use a maths library: last bits differ between machines, not between batches.
    `logits` are float32 [vocab]. Ranks start at 1; ties go to the lower id. Raises SamplingError where a logit is NaN
    or infinite.
    """
    logits = _checked(logits)
    value, best = logits[token], float(logits.max())
    weights = logits.astype(np.float64)
    weights -= best
    log_total = math.log(float(np.exp(weights, out=weights).sum()))
    rank = 1 + int(np.count_nonzero(logits > value)) + int(np.count_nonzero(logits[:token] == value))
    ids = _top_k(logits, top) if top else np.empty(0, np.int64)
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    pairs = zip(ids.tolist(), logits[ids].tolist(), strict=True)
    return TokenLogprob(
        token=int(token),
        logprob=float(value) - best - log_total,
        rank=rank,
        top=tuple((other, logit - best - log_total) for other, logit in pairs),
    )


def _checked(logits: np.ndarray) -> np.ndarray:
    if logits.ndim != 1 or not len(logits):
        raise ValueError(f"logits must have the shape [vocab], got {list(logits.shape)}")
    logits = np.ascontiguousarray(logits, dtype=np.float32)
    low, high = float(logits.min()), float(logits.max())
    if not (math.isfinite(low) and math.isfinite(high)):  # min and max carry a NaN through
        count = int(np.count_nonzero(~np.isfinite(logits)))
        raise SamplingError(f"{count} of {len(logits)} logits are NaN or infinite: check the model's weights and dtype")
    return logits


# Bias, bans and penalties


def _adjusted(
    logits: np.ndarray,
    params: SamplingParams,
    prompt_ids: TokenIds,
    output_ids: TokenIds,
    stop_ids: TokenIds,
    allowed: np.ndarray | None,
) -> np.ndarray:
    """Logits after all that comes before temperature, -inf where banned; `logits` itself if nothing applies."""
    vocab = len(logits)
    banned = _inside(params.banned_tokens, vocab, "banned_tokens")
    if len(output_ids) < params.min_tokens:
        stops = np.asarray(stop_ids, np.int64)
        stops = stops[stops < vocab]  # others cannot be sampled anyway
        if allowed is None or np.count_nonzero(allowed) > np.count_nonzero(allowed[stops]):
            banned = np.concatenate([banned, stops])
    counted = bool(params.presence_penalty or params.frequency_penalty) and len(output_ids) > 0
    if not (len(banned) or params.logit_bias or params.repetition_penalty != 1 or counted or allowed is not None):
        return logits

    out = logits.copy()
    if params.logit_bias:
        ids = _inside(tuple(params.logit_bias), vocab, "logit_bias")
        _store(out, ids, out[ids] + np.array(list(params.logit_bias.values()), np.float64))
    if params.repetition_penalty != 1:  # Keskar et al. 2019, with negative logits multiplied so that they fall too
        seen = np.zeros(vocab, bool)
        seen[np.asarray(prompt_ids, np.int64)] = True
        seen[np.asarray(output_ids, np.int64)] = True
        ids = np.flatnonzero(seen)
        values, penalty = out[ids].astype(np.float64), float(params.repetition_penalty)
        _store(out, ids, np.where(values > 0, values / penalty, values * penalty))
    if counted:  # OpenAI API reference, "frequency and presence penalties"
        ids, counts = np.unique(np.asarray(output_ids, np.int64), return_counts=True)
        _store(out, ids, out[ids] - (counts * float(params.frequency_penalty) + float(params.presence_penalty)))
    out[banned] = -np.inf
    if allowed is not None:
        out[~allowed] = -np.inf
    return out


def _inside(ids: tuple[int, ...], vocab: int, name: str) -> np.ndarray:
    array = np.array(ids, np.int64)
    if len(array) and array.max() >= vocab:
        raise RequestError(f"{name} has token id {array.max()}, but this model's ids go from 0 to {vocab - 1}")
    return array


def _store(out: np.ndarray, ids: np.ndarray, values: np.ndarray) -> None:
    limit = np.finfo(np.float32).max
    out[ids] = np.clip(values, -limit, limit)


# Filters: indices to keep, ascending, of the logits that they are given


def _kept(logits: np.ndarray, params: SamplingParams) -> np.ndarray | None:
    """Ids that all filters keep, ascending; None where no filter is on."""
    filters = (
        (params.top_k > 0, lambda x: _top_k(x, params.top_k)),
        (params.typical_p < 1, lambda x: _typical_p(x, params.typical_p, params.temperature)),
        (params.top_p < 1, lambda x: _top_p(x, params.top_p, params.temperature)),
        (params.min_p > 0, lambda x: _min_p(x, params.min_p, params.temperature)),
    )
    ids = None
    for on, indices_kept in filters:
        if on:
            keep = indices_kept(logits if ids is None else logits[ids])
            ids = keep if ids is None else ids[keep]
    return ids


def _top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits, ascending; of those equal to the k-th, the lower ids."""
    if k >= len(logits):
        return np.arange(len(logits))
    least = np.partition(logits, len(logits) - k)[len(logits) - k]
    near = np.flatnonzero(logits >= least)
    if len(near) == k:
        return near
    tied = logits[near] == least
    return near[~tied | (np.cumsum(tied) <= k - np.count_nonzero(~tied))]


def _typical_p(logits: np.ndarray, p: float, temperature: float) -> np.ndarray:
    # With log2 p_i = s_i - log2 Z, the distance of -log p_i from the entropy is |s_i - sum_j p_j s_j| ln 2: Z cancels.
    weights, scaled = _weights(logits, temperature), _scaled(logits, float(logits.max()), temperature)
    mean = _total(_parts(weights * scaled)) / _total(_parts(weights))
    return _shortest(np.abs(scaled - mean).astype(np.float32), weights, p)


def _top_p(logits: np.ndarray, p: float, temperature: float) -> np.ndarray:
    with np.errstate(over="ignore"):  # a distance may be infinite
        return _shortest(logits.max() - logits, _weights(logits, temperature), p)


def _min_p(logits: np.ndarray, p: float, temperature: float) -> np.ndarray:
    return np.flatnonzero(_weights(logits, temperature) >= p)


def _shortest(distance: np.ndarray, weights: np.ndarray, p: float) -> np.ndarray:
    """The fewest tokens, at least one, of least distance (float32 >= 0, ties to the lower index) that hold p of all.

    Weights are summed into buckets of nearly equal distance, in order of index; buckets, and then the tokens of the one
    in which p is reached, are summed in order of distance. So nothing else needs sorting.
    """
    bucket = np.abs(distance).view(np.int32) >> 18  # exponent and 5 bits of mantissa; abs: -0 is 0
    sums = np.cumsum(np.bincount(bucket, weights))
    mass = max(p * sums[-1], 1e-300)
    last = int(np.searchsorted(sums, mass, side="left"))
    inside = np.flatnonzero(bucket == last)
    inside = inside[np.argsort(distance[inside], kind="stable")]
    before = sums[last - 1] if last else 0.0
    count = 1 + int(np.searchsorted(before + np.cumsum(weights[inside]), mass, side="left"))
    keep = bucket < last
    keep[inside[:count]] = True
    return np.flatnonzero(keep)


# Weights: exp((logits - max) / temperature), float64; the best token's is 1


def _weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    weights = np.empty(len(logits))
    for out, part in zip(_parts(weights), _weight_parts(logits, temperature), strict=True):
        out[:] = part
    return weights


def _weight_parts(logits: np.ndarray, temperature: float) -> Iterator[np.ndarray]:
    """The weights in parts of _CHUNK."""
    best = float(logits.max())
    for part in _parts(logits):
        yield _weights_beside(part, best, temperature)


def _weights_beside(logits: np.ndarray, best: float, temperature: float) -> np.ndarray:
    weights = _exp2(_scaled(logits, best, temperature))
    weights -= 2.0**_LEAST
    return weights


def _scaled(logits: np.ndarray, best: float, temperature: float) -> np.ndarray:
    """(logits - best) / (temperature ln 2), log2 of the weights; not below _LEAST, which stands for a weight of 0."""
    scaled = logits.astype(np.float64)
    scaled -= best
    with np.errstate(over="ignore"):
        scaled /= max(temperature * _LN2, 1e-300)
    return np.maximum(scaled, _LEAST, out=scaled)


def _exp2(x: np.ndarray) -> np.ndarray:
    """2**x for x from _LEAST to 0, within 2e-14 of its value; the same bits on every machine.

    x = n + f with n the nearest integer; a Taylor polynomial in f by Horner's rule, with n added to its exponent.
    """
    whole = x + _ROUND
    fraction = x - (whole - _ROUND)
    power = fraction * _EXP_TERMS[-1]
    for term in _EXP_TERMS[-2:0:-1]:
        power += term
        power *= fraction
    power += _EXP_TERMS[0]
    exponent = power.view(np.int64)
    exponent += whole.view(np.int64) << 52
    return power


def _parts(values: np.ndarray) -> Iterator[np.ndarray]:
    return (values[start : start + _CHUNK] for start in range(0, len(values), _CHUNK))


# Sums and the draw


def _block_ends(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Running sums of the sums of blocks of _BLOCK values (the last may be shorter), float64 [blocks].

    `parts` are the values in parts of whole blocks. Inside a block, too, one value is added after the other; blocks do
    not wait for each other, as a compiled twin needs.
    """
    sums = []
    for part in parts:
        whole = len(part) // _BLOCK * _BLOCK
        sums.append(np.cumsum(part[:whole].reshape(-1, _BLOCK), axis=1)[:, -1])
        sums.append(np.cumsum(part[whole:])[-1:])
    return np.cumsum(np.concatenate(sums))


def _total(parts: Iterable[np.ndarray]) -> float:
    return float(_block_ends(parts)[-1])


def _draw(logits: np.ndarray, temperature: float, uniform: float) -> int:
    """The first index whose running sum of weights exceeds `uniform` (below 1) times the total; its weight is not 0."""
    ends = _block_ends(_weight_parts(logits, temperature))
    target = uniform * ends[-1]
    block = int(np.searchsorted(ends, target, side="right"))
    before, start = ends[block - 1] if block else 0.0, block * _BLOCK
    weights = _weights_beside(logits[start : start + _BLOCK], float(logits.max()), temperature)
    return start + int(np.searchsorted(before + np.cumsum(weights), target, side="right"))
