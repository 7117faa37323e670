"""Matrix products of the native set, on every instruction set that runs here: the twin's bits for quantised weights, a
bound for float ones, and the same bits however a product is cut up."""

from __future__ import annotations

import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.kernels import native, recipes

if native.missing() is not None:
    pytest.skip(f"the native kernels are not built: {native.missing()}", allow_module_level=True)

NATIVE = native._native
ISAS = NATIVE.supported_isas
FORMATS = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q8_0_APART", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
OF_FILE = {"Q8_0_APART": "Q8_0"}  # another form of the same file's format
RECIPES = ["group", "shifted", "row"]
SCALES_AT = {
    "Q4_1": (0, 2),
    "Q5_1": (0, 2),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}


def blocks(name: str, rows: int, cols: int, seed: int = 0, zeros: bool = True) -> np.ndarray:
    """Random bytes of a format, with small fp16 scales; some are negative and, with `zeros`, one in eight is zero."""
    inputs, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[OF_FILE.get(name, name)]]
    random = np.random.default_rng(seed)
    source = random.integers(0, 256, (rows * cols // inputs, size), np.uint8)
    for at in SCALES_AT.get(name, (0,)):
        scales = random.normal(0, 0.02, len(source)).astype(np.float16)
        if zeros:
            scales[random.random(len(source)) < 1 / 8] = 0
        source[:, at : at + 2] = scales[:, None].view(np.uint8)
    return source.reshape(-1)


def activations(rows: int, cols: int, seed: int = 1) -> np.ndarray:
    """Normal values with outliers, a group of zeros and one of tiny values."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, cols), dtype=np.float32)
    x[random.random(x.shape) < 0.01] *= 50
    x[0, :32], x[-1, -32:] = 0, 1e-30
    return x


def product(
    isa: str,
    name: str,
    rows: int,
    source: np.ndarray,
    x: np.ndarray,
    recipe: str = "group",
    cut: tuple[int, int] = (512, 64),
) -> np.ndarray:
    """x @ weight.T, computed in pieces of `cut` rows and tiles."""
    return NATIVE.matrix_product(isa, name, recipe, rows, source, x, *cut)


def multiply(recipe: str, name: str, weight: recipes.Blocks, x: np.ndarray) -> np.ndarray:
    """The twin's answer."""
    if recipe == "row":
        return recipes.multiply_rows(weight, recipes.OFFSETS.get(name, 0), x)
    return recipes.multiply_groups(weight, x, shifted=recipe == "shifted")


@pytest.mark.parametrize("name", FORMATS)
def test_packing_keeps_the_files_values(name: str) -> None:
    rows, cols = 37, 768
    source = blocks(name, rows, cols)
    of_file = OF_FILE.get(name, name)
    theirs = gguf.quants.dequantize(source.reshape(rows, -1), gguf.GGMLQuantizationType[of_file])
    order = np.random.default_rng(2).permutation(rows).astype(np.int32)
    np.testing.assert_array_equal(NATIVE.matrix_values(name, rows, cols, source, order), theirs[order])
    np.testing.assert_array_equal(recipes.read_blocks(of_file, source, rows, cols).values(), theirs)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Signs of zeros too."""
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantised_products_have_the_twins_bits(name: str, recipe: str) -> None:
    for rows, cols, count in ((50, 768, 21), (16, 256, 1), (33, 512, 3)):
        source, x = blocks(name, rows, cols, cols), activations(count, cols)
        weight = recipes.read_blocks(OF_FILE.get(name, name), source, rows, cols)
        twin = multiply(recipe, OF_FILE.get(name, name), weight, x)
        for isa in ISAS:
            assert_same_bits(product(isa, name, rows, source, x, recipe), twin)


@pytest.mark.parametrize("recipe", ["group", "shifted"])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q8_0_APART", "Q2_K", "Q4_K", "Q6_K"])
def test_all_remainders_of_rows_and_a_single_block_have_the_twins_bits(name: str, recipe: str) -> None:
    cols = 256 if name.endswith("_K") else 32
    x, of_file = activations(150, cols), OF_FILE.get(name, name)
    source = blocks(name, 33, cols)
    twin = multiply(recipe, of_file, recipes.read_blocks(of_file, source, 33, cols), x)
    for isa, count in itertools.product(ISAS, (*range(8, 17), 63, 64, 65, 66, 150)):
        assert_same_bits(product(isa, name, 33, source, x[:count], recipe), twin[:count])


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K"])
def test_pairs_of_codes_at_their_limits(name: str) -> None:
    """Sums of a weight's code and an input's fill 8 bits: with weights of 0 and 15, inputs of -120 and 120."""
    rows, cols = 32, 512
    source, random = blocks(name, rows, cols, zeros=False), np.random.default_rng(5)
    limits = source.reshape(-1, gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1])
    codes_at = {"Q4_0": 2, "Q4_1": 4, "Q4_K": 16}[name]
    limits[:, codes_at:] = random.choice([0, 15, 240, 255], (len(limits), limits.shape[1] - codes_at))
    x = np.float32(3) * random.choice(np.float32([-1, 1]), (64, cols))
    x[0], x[1] = 3, -3
    weight = recipes.read_blocks(name, source, rows, cols)
    assert {0, 15} <= {*(weight.codes + recipes.OFFSETS.get(name, 0)).ravel()}
    for recipe in ("group", "shifted"):
        twin = multiply(recipe, name, weight, x)
        for isa in ISAS:
            assert_same_bits(product(isa, name, rows, source, x, recipe), twin)


@pytest.mark.parametrize("name", sorted({*FORMATS} - {*OF_FILE}))
def test_the_twin_is_near_the_exact_product(name: str) -> None:
    rows, cols = 64, 1024
    source, x = blocks(name, rows, cols), np.random.default_rng(3).standard_normal((40, cols), dtype=np.float32)
    weight = recipes.read_blocks(name, source, rows, cols)
    exact = x.astype(np.float64) @ weight.values().T.astype(np.float64)
    for recipe, bound in (
        ("group", 0.01),
        ("shifted", 0.01),
        ("row", 0.03),
    ):
        twin = multiply(recipe, name, weight, x)
        error = np.sqrt(np.mean((twin - exact) ** 2) / np.mean(exact**2))
        assert 1e-4 < error < bound  # int8 activations err by about 1 in 200: no less, no more


def test_a_shift_halves_the_error_beside_an_outlier() -> None:
    rows, cols = 64, 1024
    x = np.random.default_rng(6).standard_normal((20, cols), dtype=np.float32)
    x[:, ::32] += 40
    source = blocks("Q4_1", rows, cols)
    weight = recipes.read_blocks("Q4_1", source, rows, cols)
    exact = x.astype(np.float64) @ weight.values().T.astype(np.float64)
    plain, shifted = (np.abs(multiply(recipe, "Q4_1", weight, x) - exact).mean() for recipe in ("group", "shifted"))
    assert shifted < 0.65 * plain


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q8_0_APART", "Q6_K", "F32", "F16", "BF16"])
@pytest.mark.parametrize("isa", ISAS)
def test_a_rows_bits_depend_on_nothing_else(isa: str, name: str, recipe: str) -> None:
    rows, cols, count = 90, 768, 64
    x = activations(count, cols)
    source = blocks(name, rows, cols, zeros=False) if name in FORMATS else float_weights(name, rows, cols)[0]
    whole = product(isa, name, rows, source, x, recipe)
    for cut in ((1, 1), (3, 2), (7, 5), (13, 64), (40, 3)):
        assert_same_bits(product(isa, name, rows, source, x, recipe, cut), whole)
    assert_same_bits(product(isa, name, rows, source, x[5:6].copy(), recipe), whole[5:6])
    changed = x.copy()
    changed[5, 700] += 3  # a control: another input does change the row, and only that row
    differs = (product(isa, name, rows, source, changed, recipe) != whole).any(axis=1)
    assert differs.nonzero()[0].tolist() == [5]


def tile_maxima(values: np.ndarray) -> np.ndarray:
    """The greatest of each 16 columns [rows, tiles]."""
    rows, columns = values.shape
    padded = np.pad(values, ((0, 0), (0, -columns % 16)), constant_values=-np.inf)
    return padded.reshape(rows, -1, 16).max(axis=2)


@pytest.mark.parametrize("recipe", ["group", "shifted"])
@pytest.mark.parametrize("isa", ISAS)
@given(st.integers(0, 2**32), st.sampled_from([32, 96, 576, 2048]), st.booleans())
@settings(max_examples=20, deadline=None)
def test_screening_loses_no_best(isa: str, recipe: str, seed: int, cols: int, worst: bool) -> None:
    rows, count = 150, 5
    source, x = blocks("Q8_0", rows, cols, seed), activations(count, cols, seed)
    if worst:  # for the first rows of x all the bits apart move the products up, or all of them down, all the way
        x[0] = np.where(x[0] > 0, 1, -1)
        x[1] = np.where(np.arange(cols) % 29 == seed % 29, 100, 1) * x[0]  # some stand out
        each = source.reshape(rows, -1, 34)
        each[:, :, :2] = np.array([0.02], np.float16).view(np.uint8)
        up = (x[0].reshape(-1, 32) > 0) ^ (np.arange(rows) % 2 == 0)[:, None, None]
        each[:, :, 2:] = (each[:, :, 2:] & 0xF8) | np.where(up, 7, 0)
    sums = tile_maxima(product(isa, "Q8_0", rows, source, x, recipe))
    for at_once in (1, count):
        kept = NATIVE.matrix_screening(isa, recipe, rows, source, x, sums, at_once)
        assert kept.all()  # nothing is spared that equals the best
    weights = np.linalg.norm(recipes.read_blocks("Q8_0", source, rows, cols).values(), axis=1)
    far = sums + 0.1 * np.linalg.norm(x, axis=1, keepdims=True) * tile_maxima(weights[None]) + np.float32(1e-9)
    kept = NATIVE.matrix_screening(isa, recipe, rows, source, x, far, 1)
    assert not kept.any()  # and what is far from it is


def float_weights(name: str, rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """A float format's bytes and values."""
    values = np.random.default_rng(4).standard_normal((rows, cols), dtype=np.float32)
    if name == "BF16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint8).reshape(-1), (bits.astype(np.uint32) << 16).view(np.float32)
    if name == "F16":
        half = values.astype(np.float16)
        return half.view(np.uint8).reshape(-1), half.astype(np.float32)
    return values.view(np.uint8).reshape(-1), values


@pytest.mark.parametrize("cols", [1, 20, 61, 576, 2100])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("isa", ISAS)
def test_float_products(isa: str, name: str, cols: int) -> None:
    rows, count = 83, 19
    source, values = float_weights(name, rows, cols)
    np.testing.assert_array_equal(NATIVE.matrix_values(name, rows, cols, source, None), values)
    x = np.random.default_rng(5).standard_normal((count, cols), dtype=np.float32)
    seen = x if name != "BF16" else round_to_bfloat16(x)
    exact = seen.astype(np.float64) @ values.T.astype(np.float64)
    size = np.abs(seen).astype(np.float64) @ np.abs(values).T.astype(np.float64)
    assert (np.abs(product(isa, name, rows, source, x) - exact) <= 2e-7 * np.sqrt(cols + 16) * size).all()


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def test_the_fused_multiply_add_rounds_once() -> None:
    def fused(a: float, b: float, c: float) -> float:
        return recipes.fused_multiply_add(*(np.array([v], np.float32) for v in (a, b, c)))[0]

    tiny = 2.0**-13
    assert fused(1 + tiny, 1 - tiny, -1) == -(tiny**2)
    assert np.float32(1 + tiny) * np.float32(1 - tiny) - np.float32(1) == 0  # as two roundings give

    step = 2.0**-23  # of float32 at 1; the sum is just below the middle of two floats, which float64 cannot tell
    a, b, c = step / 2 * (1 + step), 1 - step, 1 + step
    assert fused(a, b, c) == 1 + step
    assert np.float32(a * b + c) == 1 + 2 * step
