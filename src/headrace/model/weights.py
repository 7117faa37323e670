"""From a model file's tensors to packed weights: rename -> reorder -> pack, only what a range of layers needs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ModelFileError
from ..formats.gguf import GGUFFile
from ..formats.safetensors import Checkpoint
from ..kernels.ops import Array, Matrix, Ops
from .spec import ModelSpec


@dataclass(frozen=True)
class LayerWeights:
    """One layer's weights: matrices [out, in], norms and biases [out]."""

    attention_norm: Array
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    mlp_norm: Array
    gate: Matrix
    up: Matrix
    down: Matrix
    q_bias: Array | None = None
    k_bias: Array | None = None
    v_bias: Array | None = None
    o_bias: Array | None = None
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


@dataclass(frozen=True)
class DecoderWeights:
    """Weights of a range of layers: with `embedding` if it starts the model, `norm` and `head` if it ends it."""

    layers: tuple[LayerWeights, ...]
    embedding: Matrix | None = None
    norm: Array | None = None
    head: Matrix | None = None


@dataclass(frozen=True)
class _Layout:
    """How one kind of file spells its tensors. A layer's are `layer` with its number, a part, and .weight or .bias."""

    embedding: str
    norm: str
    head: str
    layer: str
    parts: Mapping[str, str]
    ignored: frozenset[str]  # tensors that say nothing the spec does not
    ignored_ending: str
    row_orders: Callable[[ModelSpec], Mapping[str, np.ndarray]]  # by part, where rows are not in RopeTable's order


def _gguf_row_orders(spec: ModelSpec) -> Mapping[str, np.ndarray]:
    """GGUF's llama rotates rows (2i, 2i + 1) of each head; this order of its rows makes them (i, i + rotated/2)."""
    head = np.arange(spec.head_dim)
    head[: spec.rope.rotated] = np.arange(spec.rope.rotated).reshape(-1, 2).T.ravel()
    return {
        part: (np.arange(heads)[:, None] * spec.head_dim + head).ravel()
        for part, heads in (("q", spec.heads), ("k", spec.kv_heads))
    }


_GGUF = _Layout(
    embedding="token_embd.weight",
    norm="output_norm.weight",
    head="output.weight",
    layer="blk.{}.",
    parts={
        "attention_norm": "attn_norm",
        "q": "attn_q",
        "k": "attn_k",
        "v": "attn_v",
        "o": "attn_output",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    },
    ignored=frozenset({"rope_freqs.weight"}),
    ignored_ending=".attn_rot_embd",
    row_orders=_gguf_row_orders,
)

_HF = _Layout(
    embedding="model.embed_tokens.weight",
    norm="model.norm.weight",
    head="lm_head.weight",
    layer="model.layers.{}.",
    parts={
        "attention_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    ignored=frozenset(),
    ignored_ending=".rotary_emb.inv_freq",
    row_orders=lambda spec: {},
)


def load_weights(source: GGUFFile | Checkpoint, spec: ModelSpec, ops: Ops, layers: range) -> DecoderWeights:
    """Pack the weights of `layers` from an opened model into `ops`' own form, on all cores.

    Names and shapes of all tensors are checked against the spec before any is read; what `layers` do not need is never
    read. Raises ModelFileError for a tensor that is missing, of another shape, or unknown.
    """
    layout = _GGUF if isinstance(source, GGUFFile) else _HF
    _check(source, spec, layout)
    tensors = source.tensors
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def pack(name: str, order: np.ndarray | None = None) -> Any:
            method = ops.pack if len(tensors[name].shape) == 2 else ops.vector
            return pool.submit(method, tensors[name], order)

        first, last = layers.start == 0, layers.stop == spec.layers
        head_name = layout.embedding if spec.tied else layout.head
        # A tied head is the embedding's own Matrix where one range holds both.
        embedding = pack(layout.embedding) if first else None
        head = (embedding if first and spec.tied else pack(head_name)) if last else None
        norm = pack(layout.norm) if last else None
        orders = layout.row_orders(spec)
        jobs = [
            {part: pack(name, orders.get(part.removesuffix("_bias"))) for part, name, _ in _layer(spec, layout, layer)}
            for layer in layers
        ]
        return DecoderWeights(
            layers=tuple(LayerWeights(**{part: job.result() for part, job in layer.items()}) for layer in jobs),
            embedding=embedding and embedding.result(),
            norm=norm and norm.result(),
            head=head and head.result(),
        )


def _layer(spec: ModelSpec, layout: _Layout, layer: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """One layer's tensors: field of LayerWeights, name in the file, shape."""
    q, kv = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "attention_norm": (spec.dim,),
        "q": (q, spec.dim),
        "k": (kv, spec.dim),
        "v": (kv, spec.dim),
        "o": (spec.dim, q),
        "mlp_norm": (spec.dim,),
        "gate": (spec.ffn_dim, spec.dim),
        "up": (spec.ffn_dim, spec.dim),
        "down": (spec.dim, spec.ffn_dim),
    }
    biased = ("q", "k", "v", "o") * spec.attention_bias + ("gate", "up", "down") * spec.mlp_bias
    for field, shape in shapes.items():
        name = layout.layer.format(layer) + layout.parts[field]
        yield field, f"{name}.weight", shape
        if field in biased:
            yield f"{field}_bias", f"{name}.bias", shape[:1]


def _check(source: GGUFFile | Checkpoint, spec: ModelSpec, layout: _Layout) -> None:
    shapes = {layout.embedding: (spec.vocab_size, spec.dim), layout.norm: (spec.dim,)}
    if not spec.tied:
        shapes[layout.head] = (spec.vocab_size, spec.dim)
    for layer in range(spec.layers):
        shapes |= {name: shape for _, name, shape in _layer(spec, layout, layer)}
    for name, shape in shapes.items():
        if name not in source.tensors:
            raise ModelFileError(source.path, name, f"the tensor is missing; shape {list(shape)} was expected")
        if tuple(source.tensors[name].shape) != shape:
            found = list(source.tensors[name].shape)
            raise ModelFileError(source.path, name, f"has shape {found}, but the model's sizes make it {list(shape)}")
    # A Hugging Face file may hold a tied head twice.
    known = shapes.keys() | layout.ignored | {layout.head}
    for name in source.tensors:
        if name not in known and not name.endswith(layout.ignored_ending):
            raise ModelFileError(source.path, name, "is no tensor of this architecture; the model may be of another")
