"""Safetensors checkpoints, single and in shards: against the safetensors package, and hostile ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from headrace.errors import ModelFileError, ModelNotFoundError, UnsupportedModelError
from headrace.formats.safetensors import open_safetensors, read_config, read_json


def raw(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(5, 7, generator=random),
        "b.weight": torch.randn(3, 4, generator=random).to(torch.float16),
        "c.weight": torch.randn(9, generator=random).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
    }


def assert_holds(file, expected: dict[str, torch.Tensor]) -> None:
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert file.tensors[name].decode().tobytes() == tensor.float().numpy().tobytes()
        assert not file.tensors[name].data.flags.owndata


def test_single_file(tmp_path: Path):
    save_file(weights(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / "model.safetensors"):
        file = open_safetensors(path)
        assert_holds(file, weights())
        assert file.metadata == {"format": "pt"} and file.path == tmp_path / "model.safetensors"


def test_single_file_of_another_name(tmp_path: Path):
    save_file(weights(), tmp_path / "other.safetensors")
    assert_holds(open_safetensors(tmp_path), weights())


def shards(folder: Path) -> dict[str, str]:
    """Two shards and their index in `folder`; the index's map."""
    folder.mkdir(exist_ok=True)
    names = {"a.weight": "model-00001-of-00002.safetensors", "c.weight": "model-00001-of-00002.safetensors"}
    names |= {"b.weight": "model-00002-of-00002.safetensors", "scalar": "model-00002-of-00002.safetensors"}
    for shard in set(names.values()):
        save_file({name: tensor for name, tensor in weights().items() if names[name] == shard}, folder / shard)
    write_index(folder, names)
    return names


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(tmp_path: Path):
    shards(tmp_path)
    assert_holds(open_safetensors(tmp_path), weights())


def test_shards_in_a_hub_cache_are_links_to_blobs(tmp_path: Path):
    snapshot = tmp_path / "models--o--n" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shards(snapshot)
    (blobs := tmp_path / "models--o--n" / "blobs").mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / f"blob-{file.name}")
        file.symlink_to(f"../../blobs/blob-{file.name}")
    assert_holds(open_safetensors(snapshot), weights())


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "sub/x.safetensors",
        "..",
        "",
        ".",
        "a\0.safetensors",
        "x.bin",
    ],
)
def test_a_shard_name_that_leaves_the_folder(tmp_path: Path, name: str):
    save_file(weights(), tmp_path / "x.safetensors")
    names = shards(tmp_path / "m")
    write_index(tmp_path / "m", names | {"scalar": name})
    with pytest.raises(ModelFileError, match="plain name"):
        open_safetensors(tmp_path / "m")


def test_a_shard_that_links_out_of_the_folder(tmp_path: Path):
    names = shards(tmp_path / "m")
    shard = tmp_path / "m" / names["scalar"]
    shard.rename(tmp_path / shard.name)
    shard.symlink_to(tmp_path / shard.name)
    with pytest.raises(ModelFileError, match="leads out of its folder"):
        open_safetensors(tmp_path / "m")


def test_a_missing_shard_is_named(tmp_path: Path):
    names = shards(tmp_path)
    (tmp_path / names["scalar"]).unlink()
    with pytest.raises(ModelFileError, match=names["scalar"]):
        open_safetensors(tmp_path)


def test_a_tensor_that_is_not_where_the_index_says(tmp_path: Path):
    names = shards(tmp_path)
    write_index(tmp_path, names | {"a.weight": names["scalar"]})
    with pytest.raises(ModelFileError, match=r"a\.weight.*is not in model-00002"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 1}, {"a": None}])
def test_a_malformed_index(tmp_path: Path, weight_map: Any):
    write_index(tmp_path, weight_map)
    with pytest.raises(ModelFileError, match="weight_map"):
        open_safetensors(tmp_path)


MALFORMED = {
    "7 bytes": (b"\0" * 7, ["8 bytes", "7"]),
    "no header": (bytes(8), ["JSON"]),
    "header past the end": (raw({"w": entry()}, bytes(8), length=2**63), [str(2**63)]),
    "header longer than allowed": (raw({}, length=100_000_001), ["100000001"]),
    "not JSON": (raw(b"{'w': 1}"), ["JSON"]),
    "not UTF-8": (raw(b'{"\xff": 1}'), ["JSON"]),
    "a list": (raw([]), ["object", "list"]),
    "deep": (raw(b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"), ["JSON"]),
    "number of many digits": (raw(b'{"a":' + b"9" * 10_000 + b"}"), ["JSON"]),
    "a key twice": (raw(b'{"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]},"w":{}}', bytes(4)), ["twice", "'w'"]),
    "metadata of numbers": (raw({"__metadata__": {"a": 1}}), ["strings"]),
    "metadata a list": (raw({"__metadata__": []}), ["strings"]),
    "entry a list": (raw({"w": []}), ["object with"]),
    "entry without shape": (raw({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), ["object with"]),
    "dtype a number": (raw({"w": entry(dtype=3)}, bytes(8)), ["string", "3"]),
    "shape a number": (raw({"w": entry(shape=2)}, bytes(8)), ["sizes", "2"]),
    "shape of floats": (raw({"w": entry(shape=[2.0])}, bytes(8)), ["2.0"]),
    "shape of booleans": (raw({"w": entry(shape=[True, 2])}, bytes(8)), ["True"]),
    "negative size": (raw({"w": entry(shape=[-2])}, bytes(8)), ["-2"]),
    "two negative sizes": (raw({"w": entry(shape=[-1, -2])}, bytes(8)), ["-1"]),
    "shape that overflows": (raw({"w": entry(shape=[2**62, 2**62, 4])}, bytes(8)), ["past the file's end"]),
    "nine axes": (raw({"w": entry(shape=[1] * 8 + [2])}, bytes(8)), ["8"]),
    "offsets that fall": (raw({"w": entry(offsets=[8, 0])}, bytes(8)), ["[8, 0]"]),
    "three offsets": (raw({"w": entry(offsets=[0, 8, 8])}, bytes(8)), ["[0, 8, 8]"]),
    "offsets of strings": (raw({"w": entry(offsets=["0", "8"])}, bytes(8)), ["begin"]),
    "span too short": (raw({"w": entry(offsets=[0, 4])}, bytes(8)), ["span 4", "8"]),
    "span too long": (raw({"w": entry(offsets=[0, 12])}, bytes(12)), ["span 12", "8"]),
    "past the end": (raw({"w": entry()}, bytes(7)), ["past the file's end"]),
    "gap": (raw({"w": entry(), "v": entry(offsets=[12, 20])}, bytes(20)), ["begins at 12", "ends at 8"]),
    "gap before the first": (raw({"w": entry(offsets=[4, 12])}, bytes(12)), ["begins at 4", "ends at 0"]),
    "overlap": (raw({"w": entry(), "v": entry(offsets=[4, 12])}, bytes(12)), ["begins at 4", "ends at 8"]),
    "the same bytes twice": (raw({"w": entry(), "v": entry()}, bytes(8)), ["begins at 0", "ends at 8"]),
    "bytes left over": (raw({"w": entry()}, bytes(9)), ["take"]),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(tmp_path: Path, case: str):
    data, said = MALFORMED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelFileError) as caught:
        open_safetensors(path)
    assert caught.value.path == str(path)
    for words in said:
        assert words in caught.value.problem


def test_the_good_neighbours_of_malformed_files(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    for data in (raw({"w": entry()}, bytes(8)), raw({}), raw({"w": entry(), "v": entry(offsets=[8, 16])}, bytes(16))):
        path.write_bytes(data)
        assert len(open_safetensors(path).tensors) == data.count(b"dtype")
    path.write_bytes(raw({"e": entry(shape=[0, 3], offsets=[0, 0]), "w": entry()}, bytes(8)))
    assert open_safetensors(path).tensors["e"].decode().shape == (0, 3)


def test_unsupported(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw({"w": entry(), "q.scale": entry("F4_E2M1", [8], [8, 16])}, bytes(16)))
    problem = r"tensor q\.scale: dtype F4_E2M1 is not supported; use one of F32, F16, BF16, F8_E4M3"
    with pytest.raises(UnsupportedModelError, match=problem):
        open_safetensors(path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str):
    torch.save(weights(), tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UnsupportedModelError, match=rf"{name}: is a pickle.*safe_serialization"):
            open_safetensors(path)


def test_nothing_there(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match=r"no \.safetensors file"):
        open_safetensors(tmp_path)
    with pytest.raises(ModelNotFoundError):
        open_safetensors(tmp_path / "none")
    for name in ("one", "two"):
        save_file(weights(), tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelNotFoundError, match=r"2 \.safetensors files but no"):
        open_safetensors(tmp_path)


GOOD = raw({"__metadata__": {"a": "b"}, "w": entry(), "h": entry("BF16", [2, 3], [8, 20])}, bytes(range(20)))


@settings(max_examples=400, deadline=2000)
@given(
    st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.sampled_from(b'0123456789-eE.[]{}",:xtfn\0\xff')),
        min_size=1,
        max_size=4,
    )
)
def test_mutations_end_in_a_file_or_a_typed_error(tmp_path_factory, changes):
    data = bytearray(GOOD)
    for at, byte in changes:
        data[at] = byte
    path = tmp_path_factory.getbasetemp() / "model.safetensors"
    path.write_bytes(data)
    try:
        file = open_safetensors(path)
    except (ModelFileError, UnsupportedModelError):
        return
    for tensor in file.tensors.values():
        assert tensor.decode().shape == tensor.shape


def test_every_truncation(tmp_path: Path):
    for length in range(len(GOOD)):
        (tmp_path / "model.safetensors").write_bytes(GOOD[:length])
        with pytest.raises(ModelFileError):
            open_safetensors(tmp_path)


def test_read_json(tmp_path: Path):
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, {"b": null}]}')
    assert read_json(path, limit=23) == {"a": [1, {"b": None}]}
    with pytest.raises(ModelFileError, match="has 23 bytes; at most 22"):
        read_json(path, limit=22)
    for text in ("[" * 100_000, '{"a":' * 100_000, "", " ", "3", "null", "{", '{"a": 1, "a": 2}'):
        path.write_text(text)
        with pytest.raises(ModelFileError):
            read_json(path)
    with pytest.raises(ModelNotFoundError):
        read_json(tmp_path / "none.json")


def test_code_that_a_config_names_is_never_run(tmp_path: Path):
    (tmp_path / "modeling_x.py").write_text("raise SystemExit('run')")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "auto_map": {"AutoModel": "modeling_x.Model"}})
    )
    with pytest.warns(UserWarning, match="auto_map"):
        assert read_config(tmp_path) == {"model_type": "llama"}


def test_floats_at_odd_offsets(tmp_path: Path):
    """A BF16 tensor of odd length shifts the floats behind it."""
    expected = {"0": torch.randn(1, 3).to(torch.bfloat16), "1": torch.randn(64, 65)}
    header = {"0": entry("BF16", [1, 3], [0, 6]), "1": entry("F32", [64, 65], [6, 6 + 64 * 65 * 4])}
    data = expected["0"].view(torch.uint16).numpy().tobytes() + expected["1"].numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw(header, data))
    file = open_safetensors(tmp_path)
    assert_holds(file, expected)
    assert np.array_equal(file.tensors["1"].decode(slice(3, 9)), expected["1"].numpy()[3:9])
