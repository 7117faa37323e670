"""An encoder's weights, packed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.gguf import GGUFFile
from ..formats.safetensors import Checkpoint
from ..formats.tensor import F32, Tensor
from ..kernels.ops import Array, Matrix, Ops
from .encoder_spec import EncoderSpec
from .families.encoders import encoder_family
from .weights import LayerWeights, load_parts, table_name


@dataclass(frozen=True)
class EncoderWeights:
    """`positions` are with the first token type's row added to each."""

    layers: tuple[LayerWeights, ...]
    embedding: Matrix
    positions: Matrix
    embedding_norm: Array
    embedding_norm_bias: Array
    head_dense: Matrix | None = None
    head_dense_bias: Array | None = None
    head_norm: Array | None = None
    head_norm_bias: Array | None = None
    head: Matrix | None = None
    head_bias: Array | None = None


def load_encoder_weights(source: GGUFFile | Checkpoint, spec: EncoderSpec, ops: Ops) -> EncoderWeights:
    """Pack a whole encoder's weights, on all cores. Raises as `load_weights` does."""
    family = encoder_family(source)
    source = family.normal(source)
    layout = family.layout(source, spec)
    wanted = spec.table_shapes.keys() - {"positions", "token_types"}
    found, layers = load_parts(source, spec, ops, layout, range(spec.layers), wanted)
    table = source.tensors[table_name(layout, "positions")].check_weights()
    rows = table.decode()
    if spec.token_types:
        rows += source.tensors[table_name(layout, "token_types")].check_weights().decode()[0]
    made = Tensor(table.name, rows.shape, F32, np.ascontiguousarray(rows).reshape(-1).view(np.uint8), table.path)
    more: dict[str, Any] = {"head": found["embedding"]} if spec.head and spec.head.tied else {}
    return EncoderWeights(layers=layers, positions=ops.pack(made), **found, **more)
