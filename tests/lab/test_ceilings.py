from __future__ import annotations

import time

import numpy as np
import pytest

from headrace.errors import ConfigError
from headrace.kernels import native
from headrace.lab.ceilings import _numpy_bandwidth, matmul_rate, read_bandwidth, sample_ceilings


@pytest.mark.parametrize("bandwidth", [_numpy_bandwidth, read_bandwidth])
def test_bandwidth_is_a_ceiling_of_a_plain_read(bandwidth):
    data = np.ones(32 << 20, np.int8)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        data.view(np.int64).sum()
        best = max(best, data.nbytes / (time.perf_counter() - started) / 1e9)
    measured = max(bandwidth(data.nbytes, 1) for _ in range(4))
    # Loose, since other tests run beside this one; counting a read twice or not at all would still fail.
    assert best / 4 < measured < best * 12


def test_matmul_rate_is_that_of_a_product():
    x, y = np.ones((2, 512, 512), np.float32)
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        x @ y
        best = max(best, 2 * 512**3 / (time.perf_counter() - started) / 1e9)
    assert best / 8 < matmul_rate(512) < best * 8


def test_ceilings_are_of_the_op_set_s_arithmetic():
    assert sample_ceilings("reference", 1 << 20, 1).arithmetic == "float32"
    if native.missing() is None:
        ceilings = sample_ceilings("native-any", 1 << 20, 1)
        assert ceilings.arithmetic == "int8" and ceilings.compute > 1 and ceilings.read > 0.1


@pytest.mark.parametrize(("size", "threads"), [(0, 1), (1, 0), (-5, 2)])
def test_out_of_range(size, threads):
    with pytest.raises(ConfigError, match=f"got {size} bytes and {threads} threads"):
        read_bandwidth(size, threads)
