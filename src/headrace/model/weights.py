"""From a model file's tensors to packed weights: find -> choose rows -> pack, only what a range of layers needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import ModelFileError, UnsupportedModelError
from ..formats.gguf import GGUFFile
from ..formats.safetensors import Checkpoint
from ..formats.tensor import F32, Tensor
from ..kernels.ops import SCREENED_ROWS, Array, Matrix, Ops
from .families import family_of
from .layout import Layout
from .shares import Blocks, Share
from .spec import ModelSpec, Shapes


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights, as `ModelSpec.layer_shapes` says which: matrices [out, in], norms and biases [out]."""

    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix | None = None
    up: Matrix | None = None
    down: Matrix | None = None
    router: Matrix | None = None
    gates: Sequence[Matrix] = ()  # of each expert
    ups: Sequence[Matrix] = ()
    downs: Sequence[Matrix] = ()
    attention_norm: Array | None = None
    attention_norm_bias: Array | None = None
    attention_post_norm: Array | None = None
    attention_post_norm_bias: Array | None = None
    mlp_norm: Array | None = None
    mlp_norm_bias: Array | None = None
    mlp_post_norm: Array | None = None
    mlp_post_norm_bias: Array | None = None
    q_norm: Array | None = None
    k_norm: Array | None = None
    q_bias: Array | None = None
    k_bias: Array | None = None
    v_bias: Array | None = None
    o_bias: Array | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of a range of layers: with those of the embedding if it starts the model, `norm` and `head` if it ends
    it."""

    layers: tuple[LayerWeights, ...]
    embedding: Matrix | None = None
    positions: Matrix | None = None
    embedding_norm: Array | None = None
    embedding_norm_bias: Array | None = None
    norm: Array | None = None
    norm_bias: Array | None = None
    head: Matrix | None = None


class _Part(NamedTuple):
    """One weight in the file: its field, its tensors (one, or one an expert), the shape that each must have, and the
    rows that are chosen of it."""

    field: str
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    rows: np.ndarray | None = None


_START = ("embedding", "positions", "embedding_norm", "embedding_norm_bias")


def load_weights(
    source: GGUFFile | Checkpoint, spec: ModelSpec, ops: Ops, layers: range, share: Share | None = None
) -> DecoderWeights:
    """Pack the weights of `layers`, or a rank's share of them, from an opened model into `ops`' own form, on all cores.

    Names and shapes of all tensors are checked against the spec before any is read; what `layers` do not need is never
    read. Raises ModelFileError for a tensor that is missing, of another shape, or unknown.
    """
    first, last = layers.start == 0, layers.stop == spec.layers
    wanted = {field for field in spec.table_shapes if (first if field in _START else last)}
    if last and spec.tied:
        wanted.add("embedding")
    chosen = _Choice(spec, share, _screened_field(spec) if last else None)
    found, packed = load_parts(source, spec, ops, family_of(source).layout(source, spec), layers, wanted, chosen)
    if last and spec.tied:  # the embedding's own Matrix where one range holds both
        found["head"] = found["embedding"] if first else found.pop("embedding")
    return DecoderWeights(layers=packed, **found)


def column_blocks(source: GGUFFile | Checkpoint, spec: ModelSpec) -> Blocks:
    """How the file stores the matrices that ranks cut along their columns: the widest blocks of any layer."""
    layout = family_of(source).layout(source, spec)
    parts = [part for layer in range(spec.layers) for part in _layer_parts(spec, layout, layer)]

    def widest(*fields: str) -> int:
        names = (name for part in parts if part.field in fields for name in part.tensors if name in source.tensors)
        return max((source.tensors[name].type.block for name in names), default=1)

    return Blocks(widest("o"), widest("down", "downs"))


def _screened_field(spec: ModelSpec) -> str | None:
    """The field of the head, if its best product is the best logit."""
    plain = spec.logit_scale == 1 and spec.logit_softcap is None
    return ("embedding" if spec.tied else "head") if plain else None


class _Choice:
    """What is taken of each weight: a share's rows and columns, or everything."""

    def __init__(self, spec: ModelSpec | None = None, share: Share | None = None, screened: str | None = None) -> None:
        self._spec, self._share, self.screened = spec, share, screened

    def holds(self, field: str) -> bool:
        return self._share is None or self._share.holds(field)

    def rows(self, part: _Part) -> np.ndarray | None:
        """The rows of its tensor that become the weight's, in order; None: all."""
        rows = None if self._share is None or self._spec is None else self._share.rows(part.field, self._spec)
        if rows is None:
            return part.rows
        return np.arange(rows.start, rows.stop) if part.rows is None else part.rows[rows.start : rows.stop]

    def cut(self, field: str, tensor: Tensor, rows: np.ndarray | None) -> tuple[Tensor, np.ndarray | None]:
        """A matrix without what a share has not, and the rows counted in it."""
        if self._share is None or self._spec is None:
            return tensor, rows
        columns = self._share.columns(field, self._spec) or range(tensor.shape[1])
        if rows is None:
            return tensor.part(range(tensor.shape[0]), columns), None
        first, past = int(rows.min()), int(rows.max()) + 1
        in_order = past - first == len(rows) and bool((np.diff(rows) == 1).all())
        return tensor.part(range(first, past), columns), None if in_order else rows - first


class Shaped(Protocol):
    """What is asked of a spec: its weights' shapes, [out, in], by field."""

    @property
    def layers(self) -> int: ...
    @property
    def table_shapes(self) -> Shapes: ...
    @property
    def layer_shapes(self) -> Shapes: ...


def load_parts(
    source: GGUFFile | Checkpoint,
    spec: Shaped,
    ops: Ops,
    layout: Layout,
    layers: range,
    wanted: Set[str],
    choice: _Choice | None = None,
) -> tuple[dict[str, Any], tuple[LayerWeights, ...]]:
    """The tables `wanted`, by field, and the weights of `layers`, packed. Checks and raises as `load_weights` does."""
    choice = choice or _Choice()
    tables = {part.field: part for part in _table_parts(spec, layout)}
    _check(source, spec, layout)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        loader = _Loader(source, ops, layout, pool, choice)
        jobs = {field: loader.load(part) for field, part in tables.items() if field in wanted}
        layer_jobs = [
            {part.field: loader.load(part) for part in _layer_parts(spec, layout, layer) if choice.holds(part.field)}
            for layer in layers
        ]
        found = {field: job.result() for field, job in jobs.items()}
        packed = (LayerWeights(**{field: _result(job) for field, job in layer.items()}) for layer in layer_jobs)
        return found, tuple(packed)


def step_bytes(source: GGUFFile | Checkpoint, spec: ModelSpec, rows: int = 1) -> int:
    """Bytes of the file's weights that a step of `rows` tokens reads: of a table that is only looked up nothing, and of
    experts those that the tokens choose if they choose evenly."""
    layout = family_of(source).layout(source, spec)
    layers = (part for layer in range(spec.layers) for part in _layer_parts(spec, layout, layer))
    elsewhere = {name for part in layers for name in part.tensors}
    elsewhere |= {f"{layout.tables[field]}.weight" for field in ("embedding", "positions") if field in layout.tables}
    if spec.tied:
        elsewhere.discard(f"{layout.tables['embedding']}.weight")
    tables = sum(tensor.nbytes for name, tensor in source.tensors.items() if name not in elsewhere)
    return tables + sum(layer_bytes(source, spec, rows))


def spared_bytes(source: GGUFFile | Checkpoint, spec: ModelSpec, rows: int = 1) -> int:
    """Bytes of `step_bytes` that the native set may leave unread where `rows` sequences ask for their best token alone:
    the three lowest bits of a Q8_0 head (see csrc/matrix.h)."""
    field = _screened_field(spec)
    if field is None or rows > SCREENED_ROWS:
        return 0
    tensor = source.tensors[table_name(family_of(source).layout(source, spec), field)]
    return spec.vocab_size * spec.dim * 3 // 8 if tensor.type.name == "Q8_0" else 0


def layer_bytes(source: GGUFFile | Checkpoint, spec: ModelSpec, rows: int = 1) -> tuple[int, ...]:
    """The part of `step_bytes` that each layer reads."""
    layout = family_of(source).layout(source, spec)
    share = 1 - (1 - spec.active_share) ** rows

    def read(layer: int) -> int:
        shares: dict[str, float] = {}  # by tensor: several weights may lie in one
        for part in _layer_parts(spec, layout, layer):
            shares |= dict.fromkeys(part.tensors, share if part.field in ("gates", "ups", "downs") else 1.0)
        return sum(int(source.tensors[name].nbytes * one) for name, one in shares.items() if name in source.tensors)

    return tuple(map(read, range(spec.layers)))


def _result(job: Future[Any] | list[Future[Any]]) -> Any:
    return tuple(one.result() for one in job) if isinstance(job, list) else job.result()


class _Loader:
    """Queues the packing of a file's weights."""

    def __init__(
        self, source: GGUFFile | Checkpoint, ops: Ops, layout: Layout, pool: ThreadPoolExecutor, choice: _Choice
    ) -> None:
        self._tensors, self._ops, self._layout, self._pool, self._choice = source.tensors, ops, layout, pool, choice

    def load(self, part: _Part) -> Any:
        """A future of the weight, or a list of them for experts."""
        tensors = [self._tensors[name] for name in part.tensors]
        if len(part.shape) == 3:
            return [self._pack(expert, part) for expert in _slices(tensors[0])]
        if len(tensors) > 1:
            return [self._pack(tensor, part) for tensor in tensors]
        (tensor,) = tensors
        if len(part.shape) == 1:
            return self._pool.submit(self._vector, tensor, part)
        turned = self._layout.transposed and part.field not in ("embedding", "positions", "head")
        return self._pack(_transposed(tensor) if turned else tensor, part)

    def _pack(self, tensor: Tensor, part: _Part) -> Future[Any]:
        def pack() -> Any:
            own, rows = self._choice.cut(part.field, tensor, self._choice.rows(part))
            return self._ops.pack(own.check_weights(), rows, part.field == self._choice.screened)

        return self._pool.submit(pack)

    def _vector(self, tensor: Tensor, part: _Part) -> Array:
        tensor.check_weights()
        if self._layout.norm_offset and part.field.endswith("norm"):
            tensor = _float_tensor(tensor, tensor.decode() + np.float32(self._layout.norm_offset))
        return self._ops.vector(tensor, self._choice.rows(part))


def _float_tensor(like: Tensor, values: np.ndarray) -> Tensor:
    values = np.ascontiguousarray(values, np.float32)
    return Tensor(like.name, values.shape, F32, values.reshape(-1).view(np.uint8), like.path)


def _slices(stacked: Tensor) -> list[Tensor]:
    """The matrices of a tensor [n, out, in]."""
    count, *shape = stacked.shape
    rows = stacked.data.reshape(count, -1)
    return [Tensor(f"{stacked.name}[{i}]", tuple(shape), stacked.type, rows[i], stacked.path) for i in range(count)]


def _transposed(tensor: Tensor) -> Tensor:
    """A tensor [in, out] as [out, in], in memory of its own."""
    if tensor.type.block > 1:
        raise UnsupportedModelError(f"{tensor.path}: tensor {tensor.name}: {tensor.type.name} weights stored [in, out]")
    cells = tensor.data.reshape(*tensor.shape, tensor.type.block_bytes).swapaxes(0, 1)
    return Tensor(tensor.name, tensor.shape[::-1], tensor.type, np.ascontiguousarray(cells).reshape(-1), tensor.path)


def table_name(layout: Layout, field: str) -> str:
    """The tensor of a table."""
    place = layout.tables.get(field) or layout.tables[field.removesuffix("_bias")]
    return f"{place}.{'bias' if field.endswith('_bias') else 'weight'}"


def _table_parts(spec: Shaped, layout: Layout) -> Iterator[_Part]:
    for field, shape in spec.table_shapes.items():
        yield _Part(field, (table_name(layout, field),), shape)


def _layer_parts(spec: Shaped, layout: Layout, layer: int) -> Iterator[_Part]:
    for field, shape in spec.layer_shapes.items():
        place = layout.layer[field.removesuffix("_bias")]
        ending = "bias" if field.endswith("_bias") else "weight"
        if "{expert}" in place.name:
            count, *shape = shape
            names = (place.name.format(layer, expert=expert) for expert in range(count))
            yield _Part(field, tuple(f"{name}.{ending}" for name in names), tuple(shape))
            continue
        if place.rows is not None:
            shape = (place.of, *shape[1:])
        if layout.transposed and len(shape) == 2:
            shape = shape[::-1]
        yield _Part(field, (f"{place.name.format(layer)}.{ending}",), shape, place.rows)


def _check(source: GGUFFile | Checkpoint, spec: Shaped, layout: Layout) -> None:
    parts = [*_table_parts(spec, layout)]
    for layer in range(spec.layers):
        parts += _layer_parts(spec, layout, layer)
    shapes = {name: part.shape for part in parts for name in part.tensors}
    for name, shape in shapes.items():
        if name not in source.tensors:
            raise ModelFileError(source.path, name, f"the tensor is missing; shape {list(shape)} was expected")
        if tuple(source.tensors[name].shape) != shape:
            found = list(source.tensors[name].shape)
            raise ModelFileError(source.path, name, f"has shape {found}, but the model's sizes make it {list(shape)}")
    # A Hugging Face file may hold a tied head twice.
    known = shapes.keys() | {f"{layout.tables['head']}.weight"}
    known |= source.spare if isinstance(source, Checkpoint) else set()
    for name in source.tensors:
        if name not in known and not name.endswith(layout.ignored) and not name.startswith(layout.others):
            raise ModelFileError(source.path, name, "is no tensor of this architecture; the model may be of another")
