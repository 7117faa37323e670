"""GGUF headers: what a good one says; a bad one ends in one typed error, soon, and without large allocations."""

from __future__ import annotations

import itertools
import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from headrace.formats.gguf import MIN_METADATA_ENTRY, MIN_TENSOR_ENTRY, GGUFFile, open_gguf

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, values: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + values


def tensor(
    name: str | bytes, dims: tuple[int, ...] = (4, 2), type: int = 0, offset: int = 0, number: int | None = None
) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return (
        text(name)
        + struct.pack("<I", len(dims) if number is None else number)
        + sizes
        + struct.pack("<IQ", type, offset)
    )


def values(kind: int, count: int, data: bytes) -> bytes:
    """A metadata entry "k", an array."""
    return entry("k", ARRAY, array(kind, count, data))


def aligned(kind: int, value: bytes) -> bytes:
    return entry("general.alignment", kind, value)


def build(
    *,
    metadata: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (tensor("w"),),
    data: int = 64,
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    tensor_count, metadata_count = counts or (len(tensors), len(metadata))
    header = magic + struct.pack("<IQQ", version, tensor_count, metadata_count) + b"".join(metadata) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(range(256))[:data] * (data > 0)


def opened(tmp_path: Path, data: bytes) -> GGUFFile:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return open_gguf(path)


@pytest.mark.parametrize("version", [2, 3])
def test_a_good_file(tmp_path: Path, version: int):
    metadata = (
        entry("i8", I8, b"\xff"),
        entry("u16", U16, struct.pack("<H", 65535)),
        entry("f", F32, struct.pack("<f", 0.5)),
        entry("f64", F64, struct.pack("<d", 1e300)),
        entry("yes", BOOL, b"\1"),
        entry("u64", U64, struct.pack("<Q", 2**64 - 1)),
        entry("name", STRING, text("Größe 🙂")),
        entry("empty", STRING, text("")),
        entry("strings", ARRAY, array(STRING, 3, text("a") + text("") + text("ç"))),
        entry("numbers", ARRAY, array(I32, 2, struct.pack("<2i", -1, 7))),
        entry("flags", ARRAY, array(BOOL, 2, b"\0\1")),
        entry("none", ARRAY, array(F32, 0, b"")),
        entry("general.alignment", U32, struct.pack("<I", 64)),
    )
    tensors = (tensor("a", (4, 2)), tensor("b", (3,), offset=64))
    file = opened(tmp_path, build(metadata=metadata, tensors=tensors, data=128, version=version, alignment=64))
    assert file.metadata == {
        "i8": -1,
        "u16": 65535,
        "f": 0.5,
        "f64": 1e300,
        "yes": True,
        "u64": 2**64 - 1,
        "name": "Größe 🙂",
        "empty": "",
        "strings": ["a", "", "ç"],
        "numbers": [-1, 7],
        "flags": [False, True],
        "none": [],
        "general.alignment": 64,
    }
    assert type(file.metadata["yes"]) is bool and type(file.metadata["i8"]) is int
    assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"a": (2, 4), "b": (3,)}
    assert file.tensors["b"].data.tobytes() == bytes(range(64, 76))


STRINGS = st.lists(
    st.one_of(st.text(max_size=12), st.text("\0a", max_size=24), st.integers(250, 300).map("x".__mul__)), max_size=20
)


@example(["a"], True)
@example(["a", ""], True)
@example(["a", "b\0" * 12, "c"], True)
@example(["x" * 255, "x" * 256], True)
@given(STRINGS, st.booleans())
def test_arrays_of_strings(tmp_path_factory, strings: list[str], more: bool):
    """Whatever is in them, and whatever follows."""
    metadata = [entry("k", ARRAY, array(STRING, len(strings), b"".join(map(text, strings))))]
    metadata += [entry("after", U64, bytes(8))] * more
    file = opened(tmp_path_factory.getbasetemp(), build(metadata=tuple(metadata)))
    assert file.metadata == {"k": strings} | ({"after": 0} if more else {})


def test_what_the_package_writes(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "Ġt", "é"])
    weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    quantised = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_1)
    writer.add_tensor("w", weight)
    writer.add_tensor("q", quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "w.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["tokenizer.ggml.tokens"] == ["<s>", "Ġt", "é"]
    assert np.array_equal(file.tensors["w"].decode(), weight)
    assert file.tensors["q"].data.tobytes() == quantised.tobytes()


def test_a_real_file_is_what_the_package_reads(smollm2: Path):
    ours, theirs = open_gguf(smollm2), gguf.GGUFReader(smollm2)
    assert ours.metadata == {
        key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")
    }
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for expected in theirs.tensors:
        tensor = ours.tensors[expected.name]
        assert tensor.shape == tuple(int(dim) for dim in expected.shape[::-1])
        assert tensor.type.name == expected.tensor_type.name
        assert np.array_equal(tensor.data, np.asarray(expected.data).view(np.uint8).reshape(-1))
    for name, rows in (("token_embd.weight", slice(90, 190)), ("blk.7.ffn_up.weight", slice(None))):
        raw = ours.tensors[name].data.reshape(ours.tensors[name].shape[0], -1)[rows]
        expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[ours.tensors[name].type.name])
        assert np.array_equal(ours.tensors[name].decode(rows), expected)


STRINGS = values(STRING, 2, text("ab") + text("cd"))
LONG_STRING = values(STRING, 2, text("a") + struct.pack("<Q", 2**63))
LONG_KEY = struct.pack("<Q", 2**64 - 1) + bytes(30)
MALFORMED = {
    "magic": (build(magic=b"GGML"), "magic", ["b'GGML'"]),
    "zip": (b"PK\3\4" + bytes(100), "magic", ["PK"]),
    "shorter than the magic": (b"GG", "magic", ["b'GG'"]),
    "magic alone": (b"GGUF", "version", ["4 bytes", "ends at 4"]),
    "version 1": (build(version=1), "version", ["1", "2 and 3"]),
    "version 4": (build(version=4), "version", ["4"]),
    "big endian": (build(version=3 << 24), "version", ["big-endian"]),
    "tensor count": (build(counts=(2**63, 0)), "tensor count", [str(2**63)]),
    "tensor count, too many": (build(counts=(4, 0), data=0), "tensor count", ["4", str(4 * MIN_TENSOR_ENTRY)]),
    "metadata count": (build(counts=(1, 2**64 - 1)), "metadata count", [str(MIN_METADATA_ENTRY * (2**64 - 1))]),
    "fewer tensors than counted": (build(counts=(2, 0), data=64), "name of tensor 1", ["got 0"]),
    "key past the end": (build(metadata=(LONG_KEY,)), "key of metadata entry 0", [str(2**64 - 1)]),
    "empty key": (build(metadata=(entry("", U8, b"\0"),)), "key", ["got 0"]),
    "long key": (build(metadata=(entry("k" * 65536, U8, b"\0"),)), "key", ["65536", "65535"]),
    "key of bad UTF-8": (build(metadata=(entry(b"k\xff", U8, b"\0"),)), "key", ["UTF-8", "byte 33"]),
    "key twice": (build(metadata=(entry("k", U8, b"\0"),) * 2), "k", ["twice", "1"]),
    "value type": (build(metadata=(entry("k", 13, bytes(8)),)), "k: type", ["13", "12"]),
    "array element type": (build(metadata=(values(99, 1, bytes(8)),)), "k: type", ["99"]),
    "array of arrays": (build(metadata=(values(ARRAY, 1, array(U8, 1, b"\0")),)), "k", ["array of arrays"]),
    "array too long": (build(metadata=(values(U8, 2**40, bytes(8)),)), "k: length", [str(2**40)]),
    "numbers too long": (build(metadata=(values(U64, 100, bytes(8)),)), "k", ["800"]),
    "strings too many": (build(metadata=(values(STRING, 2**61, b""),)), "k: length", [str(2**61)]),
    "string in array too long": (build(metadata=(LONG_STRING,)), "k[1]", [str(2**63)]),
    "string in array of bad UTF-8": (build(metadata=(values(STRING, 1, text(b"\xc3")),)), "k[0]", ["UTF-8"]),
    "string of bad UTF-8": (build(metadata=(entry("k", STRING, text(b"\xed\xa0\x80")),)), "k", ["UTF-8"]),
    "boolean": (build(metadata=(entry("k", BOOL, b"\2"),)), "k", ["0 or 1", "2"]),
    "alignment 0": (build(metadata=(aligned(U32, bytes(4)),)), "general.alignment", ["power of two", "0"]),
    "alignment 48": (build(metadata=(aligned(U32, struct.pack("<I", 48)),)), "general.alignment", ["48"]),
    "alignment 2^31": (build(metadata=(aligned(U32, b"\0\0\0\x80"),)), "general.alignment", [str(2**31)]),
    "alignment a string": (build(metadata=(aligned(STRING, text("32")),)), "general.alignment", ["'32'"]),
    "tensor twice": (build(tensors=(tensor("w"), tensor("w", offset=32))), "tensor w", ["twice", "1"]),
    "tensor without a name": (build(tensors=(tensor(""),)), "name of tensor 0", ["got 0"]),
    "tensor name of bad UTF-8": (build(tensors=(tensor(b"\xfe"),)), "name of tensor 0", ["UTF-8"]),
    "no dims": (build(tensors=(tensor("w", ()),)), "tensor w: number of dims", ["got 0"]),
    "5 dims": (build(tensors=(tensor("w", (1,) * 5),)), "tensor w: number of dims", ["got 5", "4"]),
    "2^32 - 1 dims": (build(tensors=(tensor("w", number=2**32 - 1),)), "tensor w: number of dims", [str(2**32 - 1)]),
    "empty axis": (build(tensors=(tensor("w", (4, 0)),)), "tensor w: shape", ["(0, 4)"]),
    "dims that overflow": (build(tensors=(tensor("w", (2**32, 2**32)),)), "tensor w", [str(4 * 2**64 + 96), "160"]),
    "dims of 2^64 - 1": (build(tensors=(tensor("w", (2**64 - 1,) * 4),)), "tensor w", ["past"]),
    "past the end by one float": (build(tensors=(tensor("w", (17,)),)), "tensor w", ["132", "128"]),
    "offset past the end": (build(tensors=(tensor("w", offset=2**64 - 32),)), "tensor w", ["past"]),
    "unaligned offset": (build(tensors=(tensor("w", offset=4),)), "tensor w: offset", ["4", "32"]),
    "overlap": (build(tensors=(tensor("a", (16,)), tensor("b", offset=32))), "tensor b", ["32", "64"]),
    "half a block": (build(tensors=(tensor("w", (16, 2), type=3),)), "tensor w", ["16", "32"]),
    "unknown type": (build(tensors=(tensor("w", type=4_000_000),)), "tensor w: type", ["4000000"]),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, case: str):
    data, field, said = MALFORMED[case]
    with pytest.raises(ModelFileError) as caught:
        opened(tmp_path, data)
    assert caught.value.path == str(tmp_path / "m.gguf")
    assert caught.value.field.startswith(field)
    for words in said:
        assert words in caught.value.problem


def test_the_good_neighbours_of_malformed_files(tmp_path: Path):
    """The table's files differ from good ones in one thing only: what builds them is not at fault."""
    opened(tmp_path, build())
    opened(tmp_path, build(metadata=(STRINGS, entry("k" * 65535, U8, b"\0"), entry("b", BOOL, b"\1"))))
    opened(tmp_path, build(tensors=(tensor("w", (16,)),)))
    opened(tmp_path, build(tensors=(tensor("a", (8,)), tensor("b", offset=32))))
    opened(tmp_path, build(tensors=(tensor("w", (32, 2), type=3),)))
    opened(tmp_path, build(tensors=(), data=0))


def test_unsupported(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="tensor w: type IQ2_XXS is not supported; use one of F32"):
        opened(tmp_path, build(tensors=(tensor("w", (256,), type=16),), data=66))


def split_part(number: int, count: int, tensors: tuple[bytes, ...], *more: bytes, total: int = 3) -> bytes:
    numbers = (("split.no", number), ("split.count", count), ("split.tensors.count", total))
    return build(metadata=(*more, *(entry(key, U16, struct.pack("<H", n)) for key, n in numbers)), tensors=tensors)


def write_split(folder: Path) -> list[Path]:
    """Three tensors in three parts, of which the first holds metadata alone, as converters write them."""
    folder.mkdir(exist_ok=True)
    parts = [
        split_part(0, 3, (), entry("general.name", STRING, text("whole"))),
        split_part(1, 3, (tensor("a", (4, 2)), tensor("b", (3,), offset=32))),
        split_part(2, 3, (tensor("c", (2, 2)),)),
    ]
    paths = [folder / f"m-{number:05d}-of-00003.gguf" for number in (1, 2, 3)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    return paths


def test_a_split_file_opens_by_any_part(tmp_path: Path):
    paths = write_split(tmp_path)
    for path in paths:
        file = open_gguf(path)
        assert file.path == paths[0] and file.metadata["general.name"] == "whole"
        assert {name: tensor.shape for name, tensor in file.tensors.items()} == {"a": (2, 4), "b": (3,), "c": (2, 2)}
        assert file.tensors["c"].path == paths[2]
        assert file.tensors["b"].data.tobytes() == bytes(range(32, 44))


def test_what_the_package_splits(tmp_path: Path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama", split_max_tensors=2)
    weights = {name: np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32) for name in "abcde"}
    for name, weight in weights.items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "w-00002-of-00003.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert all(np.array_equal(file.tensors[name].decode(), weight) for name, weight in weights.items())


def test_split_files_that_do_not_fit_together(tmp_path: Path):
    def broken(change, problem: str) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        paths = write_split(folder)
        change(paths)
        with pytest.raises(ModelFileError, match=problem):
            open_gguf(paths[0])

    broken(lambda p: p[1].unlink(), r"1 of 3 parts are not in .*, the first is m-00002-of-00003.gguf; pull them again")
    broken(lambda p: p[2].write_bytes(p[1].read_bytes()), r"is part 1 of 3, named as 2 of 3")
    broken(lambda p: p[2].write_bytes(split_part(2, 3, (tensor("a"),))), r"tensor a: is in m-00002-of-00003.gguf too")
    broken(lambda p: p[2].write_bytes(split_part(2, 3, ())), r"split.tensors.count: is 3, and the parts hold 2")
    broken(lambda p: p[2].write_bytes(build()), r"is part None of None")
    broken(lambda p: p[2].write_bytes(b""), r"is empty")
    broken(lambda p: p[0].write_bytes(split_part(0, 65535, ())), r"is 65535, but the name says 3")
    broken(lambda p: p[0].write_bytes(build(metadata=(entry("split.count", I8, b"\xff"),))), r"parts, got -1")
    broken(lambda p: p[0].write_bytes(build(metadata=(entry("split.count", STRING, text("3")),))), r"parts, got '3'")
    elsewhere = write_split(tmp_path / "elsewhere")

    def lead_out(paths: list[Path]) -> None:
        paths[1].unlink()
        paths[1].symlink_to(elsewhere[1])

    broken(lead_out, r"leads out of its folder")
    paths = write_split(tmp_path / "renamed")
    paths[0].rename(tmp_path / "renamed" / "m.gguf")
    with pytest.raises(ModelFileError, match=r"is 3, but the name says 1; keep the parts' own names"):
        open_gguf(tmp_path / "renamed" / "m.gguf")


def test_a_file_that_became_shorter_is_not_read(tmp_path: Path):
    """Reading it would end the process."""
    path = tmp_path / "m.gguf"
    path.write_bytes(build(tensors=(tensor("w", (4096, 2)),)) + bytes(32768))
    weight = open_gguf(path).tensors["w"]
    kept, first = weight.decode(), weight.decode(slice(0, 1))
    os.truncate(path, 4096)
    for use in (weight.decode, lambda: weight.decode(slice(0, 1)), lambda: weight.data, weight.check_weights):
        with pytest.raises(ModelFileError, match=r"had \d+ bytes when it was opened, and now has 4096"):
            use()
    assert np.array_equal(kept[:1], first)  # what was decoded is memory of its own


def test_absent(tmp_path: Path):
    with pytest.raises(ModelNotFoundError):
        open_gguf(tmp_path / "none.gguf")


def good_header() -> bytes:
    metadata = (
        entry("general.architecture", STRING, text("llama")),
        STRINGS,
        entry("n", ARRAY, array(F32, 3, struct.pack("<3f", 1, 2, 3))),
        entry("general.alignment", U32, struct.pack("<I", 32)),
        entry("yes", BOOL, b"\1"),
    )
    tensors = (tensor("a", (8, 2)), tensor("q", (32, 2), type=3, offset=64), tensor("h", (4, 4), type=1, offset=128))
    return build(metadata=metadata, tensors=tensors, data=160)


GOOD = good_header()
INTEGERS = st.one_of(
    st.integers(0, 40), st.integers(0, 2**64 - 1), st.sampled_from([2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63])
)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("bytes"), st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("u64"), st.integers(0, len(GOOD) - 8), INTEGERS),
        st.tuples(st.just("cut"), st.integers(0, len(GOOD)), st.just(0)),
        st.tuples(st.just("insert"), st.integers(0, len(GOOD)), st.binary(max_size=40)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=500, deadline=2000)
@example([("cut", 0, 0)])
@given(CHANGES)
def test_mutations_end_in_a_file_or_a_typed_error(tmp_path_factory, changes):
    data = bytearray(GOOD)
    for kind, at, value in changes:
        if kind == "bytes":
            data[at : at + len(value)] = value
        elif kind == "u64":
            data[at : at + 8] = struct.pack("<Q", value)
        elif kind == "cut":
            del data[at:]
        else:
            data[at:at] = value
    try:
        file = opened(tmp_path_factory.getbasetemp(), bytes(data))
    except (ModelFileError, UnsupportedModelError):
        return
    for tensor in file.tensors.values():  # what is accepted can be used
        assert tensor.decode().shape == tensor.shape


def test_every_truncation_of_a_header(tmp_path: Path):
    for length in range(len(GOOD)):
        with pytest.raises(ModelFileError):
            opened(tmp_path, GOOD[:length])


def test_a_real_header_cut_and_bitten(tmp_path: Path, smollm2: Path):
    real = smollm2.read_bytes()[:2_000_000]
    path = tmp_path / "m.gguf"
    random = np.random.default_rng(0)
    start = time.monotonic()
    for place in itertools.chain(range(4, 24), random.integers(24, 2000, 20), random.integers(24, len(real), 10)):
        bitten = bytearray(real)
        bitten[place] ^= 0xFF
        path.write_bytes(bitten)
        with pytest.raises((ModelFileError, UnsupportedModelError)):  # at the least, the data is missing
            open_gguf(path)
    assert time.monotonic() - start < 20


def test_claims_of_size_allocate_nothing(tmp_path: Path):
    cases = [case for case in MALFORMED if "count" in case or "too" in case or "past" in case or "dims" in case]
    assert len(cases) > 10
    for case in cases:
        (tmp_path / "m.gguf").write_bytes(MALFORMED[case][0])
        tracemalloc.start()
        with pytest.raises(ModelFileError):
            open_gguf(tmp_path / "m.gguf")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000, case
