"""Loading weights: row order, ranges, and files that do not hold what they should."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from headrace.errors import ModelFileError
from headrace.formats.tensor import Tensor
from headrace.kernels.ops import RopeTable
from headrace.kernels.reference import ReferenceOps
from headrace.model.families import read_spec
from headrace.model.families.gguf import gguf_layout_of_pairs
from headrace.model.rope import RopeSpec
from headrace.model.weights import load_weights

from .conftest import Tiny
from .harness import open_model
from .test_spec import gguf_file, read_hf, tensor

Tinies = Callable[[str], Tiny]


class Watched(Mapping[str, Tensor]):
    """A file's tensors, and the names of those that were decoded."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.read: set[str] = set()
        self._tensors = tensors

    def __getitem__(self, name: str) -> Any:
        real, read = self._tensors[name], self.read

        class Watch:
            shape = real.shape

            def check_weights(self) -> Watch:
                return self

            def decode(self) -> np.ndarray:
                read.add(name)
                return real.decode()

        return Watch()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def test_only_a_ranges_own_tensors_are_read(tiny: Tinies) -> None:
    source = open_model(tiny("untied").folder)
    for layers, whole in (
        (range(0, 2), {"model.embed_tokens.weight"}),
        (range(2, 4), set()),
        (range(4, 5), {"model.norm.weight", "lm_head.weight"}),
    ):
        watched = Watched(source.tensors)
        load_weights(dataclasses.replace(source, tensors=watched), read_spec(source), ReferenceOps(), layers)
        named = {
            name for name in source.tensors if name.startswith(tuple(f"model.layers.{layer}." for layer in layers))
        }
        assert watched.read == named | whole


def test_a_tied_head_is_the_embedding_itself(tiny: Tinies) -> None:
    source = open_model(tiny("tied").folder)
    spec, ops = read_spec(source), ReferenceOps()
    whole = load_weights(source, spec, ops, range(5))
    assert whole.head is whole.embedding
    last = load_weights(source, spec, ops, range(4, 5))
    assert last.embedding is None and last.head is not None and whole.head is not None
    assert np.array_equal(last.head.rows, whole.head.rows)


def test_missing_extra_and_misshapen_tensors_are_named(tiny: Tinies) -> None:
    source = open_model(tiny("tied").folder)
    spec, name = read_spec(source), "model.layers.3.mlp.up_proj.weight"
    for tensors, expected in (
        (
            {key: value for key, value in source.tensors.items() if key != name},
            r"up_proj.weight: the tensor is missing",
        ),
        (source.tensors | {"model.layers.3.q_norm.weight": source.tensors[name]}, r"3.q_norm.weight: is no tensor"),
        (source.tensors | {name: tensor(name, np.zeros((53, 60)))}, r"has shape \[53, 60\], .* \[53, 120\]"),
    ):
        with pytest.raises(ModelFileError, match=expected):
            load_weights(dataclasses.replace(source, tensors=tensors), spec, ReferenceOps(), range(5))


@pytest.mark.parametrize("rotated", [20, 12])
def test_row_order_turns_adjacent_pairs_into_halves(rotated: int) -> None:
    """Rotating a GGUF's rows pair by pair is rotating the reordered rows by halves; columns past `rotated` stay."""
    spec = dataclasses.replace(read_hf({}), ropes=(RopeSpec(rotated),) * 5)
    order = gguf_layout_of_pairs(gguf_file(), spec).layer["q"].rows
    assert order is not None
    table = RopeTable(np.linspace(1, 0.1, rotated // 2, dtype=np.float32))
    rows = np.random.default_rng(0).standard_normal((1, 6, 20), dtype=np.float32)
    pairs = rows[..., :rotated].reshape(6, -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(5j * table.inv_freq)
    expected = rows.copy()
    expected[..., :rotated] = np.stack([turned.real, turned.imag], axis=-1).reshape(6, -1)
    got = ReferenceOps().rope(rows.reshape(1, -1)[:, order], np.array([5], np.int32), table, heads=6)
    assert np.allclose(got, expected.reshape(1, -1)[:, order], atol=1e-6)
