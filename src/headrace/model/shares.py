"""What each rank of a group holds of a model's layers: tensor parallelism (Shoeybi et al. 2019), cut unevenly.

A matrix is cut along its rows (its outputs) or along its columns (its inputs); after the latter the ranks' results are
partial sums, which one reduction makes whole. So a layer costs two reductions: after `o` and after `down`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..errors import ConfigError, UnsupportedModelError
from .spec import ModelSpec

# What a weight's rows, or columns, are counted in. A bias follows its matrix's rows; one of a matrix that is cut along
# its columns is added once, by rank 0. What is named in neither is whole on every rank: norms, router, positions.
ROWS = {
    "q": "heads",
    "k": "kv_heads",
    "v": "kv_heads",
    "gate": "ffn",
    "up": "ffn",
    "gates": "ffn",
    "ups": "ffn",
    "embedding": "vocab",
    "head": "vocab",
}
COLUMNS = {"o": "heads", "down": "ffn", "downs": "ffn"}
# What attention costs beside products, in evening out the ranks: the keys that a row is taken to see, and the time of a
# multiplication of attention in those of products, as the native kernels take it.
KEYS, ATTENTION_COST = 256, 4
TILE = 16  # rows that the native kernels pack together; a cut inside costs room and time


@dataclass(frozen=True)
class Blocks:
    """Inputs that must stay together, as the file stores them, of `o` and of `down` (all experts')."""

    o: int = 1
    down: int = 1


@dataclass(frozen=True)
class Share:
    """Rank `rank`'s part of every layer, and of the vocabulary."""

    rank: int
    ranks: int
    heads: range
    kv_heads: range  # of its query heads; ranks may share one
    ffn: range  # columns of the MLP, or of each expert
    vocab_cuts: tuple[int, ...]  # where each rank's rows of the vocabulary begin, and how many there are in all

    @property
    def vocab(self) -> range:
        return range(self.vocab_cuts[self.rank], self.vocab_cuts[self.rank + 1])

    def holds(self, field: str) -> bool:
        """Whether this rank has any of a weight."""
        return self.rank == 0 or not (field.endswith("_bias") and field.removesuffix("_bias") in COLUMNS)

    def rows(self, field: str, spec: ModelSpec) -> range | None:
        """A weight's or bias's rows, or None for all."""
        return self._elements(ROWS.get(field.removesuffix("_bias")), spec)

    def columns(self, field: str, spec: ModelSpec) -> range | None:
        """A weight's columns, or None for all."""
        return self._elements(COLUMNS.get(field), spec)

    def _elements(self, counted: str | None, spec: ModelSpec) -> range | None:
        if counted is None:
            return None
        units: range = getattr(self, counted)
        size = spec.head_dim if counted in ("heads", "kv_heads") else 1
        return range(units.start * size, units.stop * size)

    def local(self, spec: ModelSpec) -> ModelSpec:
        """The spec with the sizes of this rank's part, for its memory: heads, KV heads, MLP and vocabulary."""
        experts = spec.experts and dataclasses.replace(spec.experts, ffn_dim=len(self.ffn))
        return dataclasses.replace(
            spec,
            heads=len(self.heads),
            kv_heads=len(self.kv_heads),
            ffn_dim=spec.ffn_dim if experts else len(self.ffn),
            vocab_size=len(self.vocab),
            experts=experts,
        )


def split(spec: ModelSpec, ranks: int, blocks: Blocks = Blocks()) -> tuple[Share, ...]:
    """Cut a model for `ranks` ranks: KV heads with their query heads as evenly as they go, then the MLP so that every
    rank reads about as many weights of a layer, then the vocabulary evenly.

    Where there are fewer KV heads than ranks, several ranks hold the same one and share out its query heads. Raises
    UnsupportedModelError for a model that cannot be cut at all, ConfigError for too many ranks.
    """
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks; a replica has at least 1")
    if ranks > 1 and spec.qk_norm == "row":
        raise UnsupportedModelError(
            f"{spec.name}: {spec.architecture} norms q and k over the whole width, which no rank has alone; "
            "use 1 rank, and cut the layers into stages"
        )
    heads = _split_heads(spec, ranks, blocks.o)
    ffn = _split_ffn(spec, heads, blocks.down)
    vocab = _cuts(spec.vocab_size, TILE if spec.vocab_size >= TILE * ranks else 1, [1.0] * ranks)
    group = spec.heads // spec.kv_heads
    return tuple(
        Share(rank, ranks, own, range(own.start // group, -(-own.stop // group)), columns, vocab)
        for rank, (own, columns) in enumerate(zip(heads, ffn, strict=True))
    )


def _split_heads(spec: ModelSpec, ranks: int, block: int) -> list[range]:
    """Each rank's query heads: those of whole KV heads, or part of one's."""
    group = spec.heads // spec.kv_heads
    unit = block // math.gcd(block, spec.head_dim)  # query heads that a block of o's columns binds together
    kv_unit = math.lcm(unit, group) // group
    bound = f"; {block} columns of o, {unit} heads, are one block of the file" if unit > 1 else ""
    if ranks <= spec.kv_heads:
        units = spec.kv_heads // kv_unit
        if ranks > units:
            raise ConfigError(f"{ranks} ranks for {spec.kv_heads} KV heads{bound}; use at most {units}")
        sizes = [group * kv_unit * (units // ranks + (rank < units % ranks)) for rank in range(ranks)]
    else:
        if ranks > spec.heads // unit or group % unit or -(-ranks // spec.kv_heads) > group // unit:
            most = spec.kv_heads * (group // unit) if group % unit == 0 else spec.kv_heads // kv_unit
            raise ConfigError(f"{ranks} ranks for {spec.heads} query heads{bound}; use at most {most}")
        sizes = []
        for kv_head in range(spec.kv_heads):
            owners, units = ranks // spec.kv_heads + (kv_head < ranks % spec.kv_heads), group // unit
            sizes += [unit * (units // owners + (owner < units % owners)) for owner in range(owners)]
    return [range(*pair) for pair in pairwise([0, *accumulate(sizes)])]


def _split_ffn(spec: ModelSpec, heads: Sequence[range], block: int) -> list[range]:
    """Each rank's columns of the MLP: more for those with fewer heads."""
    total, chosen = (spec.experts.ffn_dim, spec.experts.chosen) if spec.experts else (spec.ffn_dim, 1)
    group, ranks = spec.heads // spec.kv_heads, len(heads)
    unit = math.lcm(block, TILE) if total >= ranks * math.lcm(block, TILE) else block
    if total < ranks * unit:
        most = total // unit
        raise ConfigError(f"{ranks} ranks for an MLP of {total} columns in blocks of {block}; use at most {most}")
    of_column = spec.dim * (3 if spec.gated or spec.experts else 2) * chosen
    of_head = spec.head_dim * (spec.dim + ATTENTION_COST * KEYS)
    of_heads = [2 * (of_head * len(own) + spec.head_dim * spec.dim * -(-len(own) // group)) for own in heads]
    wanted = _level(of_heads, of_column * total)
    return [range(*pair) for pair in pairwise(_cuts(total, unit, wanted))]


def _level(had: Sequence[float], more: float) -> list[float]:
    """`more` shared out so that those who have less get up to the same level; nobody gives anything back."""
    level, takers = 0.0, sorted(had)
    for count in range(len(takers), 0, -1):
        level = (sum(takers[:count]) + more) / count
        if level >= takers[count - 1]:
            break
    return [max(0.0, level - own) for own in had]


def _cuts(total: int, unit: int, wanted: Sequence[float]) -> tuple[int, ...]:
    """Cut points of `total`, multiples of `unit`, so that the parts are in about the ratios wanted; no part is
    empty."""
    units, parts = -(-total // unit), len(wanted)
    cuts = [0]
    for part, so_far in enumerate(accumulate(wanted[:-1]), 1):
        nearest = round(so_far / sum(wanted) * total / unit)
        cuts.append(min(max(nearest, cuts[-1] + 1), units - (parts - part)))
    return (*(cut * unit for cut in cuts), total)
