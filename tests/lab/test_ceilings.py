from __future__ import annotations

import itertools

import numpy as np
import pytest

from headrace.errors import ConfigError
from headrace.kernels import native
from headrace.lab import ceilings
from headrace.lab.ceilings import PASS_BYTES, matmul_rate, read_bandwidth, sample_ceilings


@pytest.fixture
def a_second_a_look(monkeypatch):
    """Each look at the clock finds it one second on, so that a rate is what is counted."""
    looks = itertools.count()
    monkeypatch.setattr(ceilings.time, "perf_counter", lambda: float(next(looks)))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [96 << 20, 700 << 20])
def test_every_byte_read_counts_once(a_second_a_look, monkeypatch, size, threads):
    read = []
    monkeypatch.setattr(np, "array_split", lambda array, n: [Part(array, n, read)] * n)
    rate = ceilings._numpy_bandwidth(size, threads)
    passes = max(1, PASS_BYTES // size)
    assert rate == passes * size / 1e9
    assert sum(read) == pytest.approx(ceilings.REPEATS * passes * size, rel=1e-6)


class Part:
    """A share of an array that notes how many bytes were read of it, and reads none."""

    def __init__(self, array: np.ndarray, shares: int, read: list[float]) -> None:
        self.nbytes, self.read = array.nbytes / shares, read

    def max(self) -> None:
        self.read.append(self.nbytes)


def test_a_multiply_add_is_two_operations(a_second_a_look):
    assert matmul_rate(64) == 2 * 64**3 / 1e9


def test_the_product_is_not_of_a_matrix_with_itself(monkeypatch):
    # numpy computes x @ x.T by half the work: the rate would come out double.
    factors = []
    monkeypatch.setattr(np, "matmul", lambda x, y, out: factors.append((x, y)))
    matmul_rate(16)
    assert all(not np.shares_memory(x, y) for x, y in factors) and len(factors) == ceilings.REPEATS


def test_ceilings_are_of_the_op_set_s_arithmetic():
    plain = sample_ceilings("reference", 1 << 20, 1)
    assert plain.arithmetic == "float32" and plain.read > 0.1 and plain.compute > 0.1
    if native.missing() is None:
        compiled = sample_ceilings("native-any", 1 << 20, 1)
        assert compiled.arithmetic == "int8" and compiled.read > 0.1 and compiled.compute > 1


@pytest.mark.parametrize(("size", "threads"), [(0, 1), (1, 0), (-5, 2)])
def test_out_of_range(size, threads):
    with pytest.raises(ConfigError, match=f"got {size} bytes and {threads} threads"):
        read_bandwidth(size, threads)
