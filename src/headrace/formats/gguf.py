"""GGUF files (versions 2 and 3, little-endian) as metadata and named tensors.

    "GGUF" version tensor_count metadata_count | key type value ... | name dims type offset ... | pad | data

The file is hostile until shown otherwise: a count, length, dimension or offset is compared with what the file can
hold before anything is built from it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ModelFileError, UnsupportedModelError
from .names import inside, part_names
from .tensor import TENSOR_TYPES, Tensor, TensorType, make_tensor, map_file

MAX_METADATA_BYTES = 128 << 20  # as Python objects they take up to 8 times as much
MAX_NAME_BYTES = 65535
MAX_DIMS = 4
MIN_METADATA_ENTRY = 8 + 1 + 4 + 1  # key length, one letter, type, the smallest value
MIN_TENSOR_ENTRY = 8 + 1 + 4 + 8 + 4 + 8  # name length, one letter, number of dims, one dim, type, offset
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16

_NUMBERS = {
    0: np.dtype("u1"),
    1: np.dtype("i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_WINDOW = 32  # bytes for each string of an array, in which all are looked for at once

_TENSOR_TYPE_IDS = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    30: "BF16",
}

_U32 = struct.Struct("<I").unpack_from
_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file. `metadata` holds plain Python values (arrays as lists); `tensors` is in the file's order."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def open_gguf(path: str | Path) -> GGUFFile:
    """Read the header of a GGUF file and map its tensors. Of a split one, any part opens the whole.

    Raises ModelNotFoundError where there is no such file, ModelFileError where it is malformed or a part is missing,
    UnsupportedModelError for a tensor type that Headrace does not know.
    """
    path = Path(path)
    file = _open_file(path)
    count = file.metadata.get("split.count", 0)
    if type(count) is not int or count < 0:
        raise ModelFileError(path, "split.count", f"must be a number of parts, got {count!r:.80}")
    return file if count < 2 else _join(file, count)


def _open_file(path: Path) -> GGUFFile:
    header = _Header(path, map_file(path))
    tensor_count, metadata_count = header.counts()
    metadata = header.metadata(metadata_count)
    return GGUFFile(path, metadata, header.tensors(tensor_count, _alignment(path, metadata)))


def _join(file: GGUFFile, count: int) -> GGUFFile:
    """All parts of a split model as one file: the first one's metadata, and every part's tensors."""
    path, names = file.path, part_names(file.path.name)
    if len(names) != count:
        problem = (
            f"is {count}, but the name says {len(names)}; keep the parts' own names (...-00001-of-{count:05d}.gguf)"
        )
        raise ModelFileError(path, "split.count", problem)
    if missing := [name for name in names if not path.with_name(name).exists()]:
        problem = (
            f"{len(missing)} of {count} parts are not in {path.parent}, the first is {missing[0]}; pull them again"
        )
        raise ModelFileError(path, "split.count", problem)
    parts = [_open_file(inside(path.parent, name)) for name in names]
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        place = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if place != (number, count):
            raise ModelFileError(
                part.path, "split.no", f"is part {place[0]} of {place[1]}, named as {number} of {count}"
            )
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise ModelFileError(part.path, f"tensor {name}", f"is in {tensors[name].path.name} too")
            tensors[name] = tensor
    total = parts[0].metadata.get("split.tensors.count", len(tensors))
    if total != len(tensors):
        raise ModelFileError(
            path, "split.tensors.count", f"is {total!r:.80}, and the parts hold {len(tensors)} tensors"
        )
    return GGUFFile(parts[0].path, parts[0].metadata, tensors)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= MAX_ALIGNMENT or value & (value - 1):
        problem = f"must be a power of two from 8 to {MAX_ALIGNMENT}, got {value!r:.80}"
        raise ModelFileError(path, "general.alignment", problem)
    return value


class _Header:
    """A cursor over the bytes before the tensors' data. Every read names the field that it reads."""

    def __init__(self, path: Path, file: np.ndarray) -> None:
        self.path, self.file = path, file
        self.bytes = file.data
        self.limit = min(len(file), MAX_METADATA_BYTES)
        self.position = 0

    def error(self, field: str, problem: str) -> ModelFileError:
        return ModelFileError(self.path, field, problem)

    def take(self, nbytes: int, field: str) -> int:
        """Position of the next `nbytes` bytes, which are there; the cursor moves past them."""
        start = self.position
        if nbytes > self.limit - start:
            of = "the file" if self.limit == len(self.file) else "what a header may take"
            raise self.error(field, f"needs {nbytes} bytes at {start}, and {of} ends at {self.limit}")
        self.position = start + nbytes
        return start

    def u32(self, field: str) -> int:
        return _U32(self.bytes, self.take(4, field))[0]

    def u64(self, field: str) -> int:
        return _U64(self.bytes, self.take(8, field))[0]

    def count(self, smallest: int, field: str) -> int:
        """A number of entries of at least `smallest` bytes each, which the rest of the header can hold."""
        count, left = self.u64(field), self.limit - self.position
        if count * smallest > left:
            raise self.error(field, f"{count} entries take {count * smallest} bytes or more, and {left} are left")
        return count

    def string(self, field: str) -> str:
        length = self.u64(f"{field}: length")
        return self.text(self.take(length, field), self.position, field)

    def text(self, start: int, end: int, field: str) -> str:
        try:
            return str(self.bytes[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(field, f"is not UTF-8 (byte {start + error.start} of the file)") from None

    def name(self, field: str) -> str:
        name = self.string(field)
        if not 1 <= len(name) <= MAX_NAME_BYTES:
            raise self.error(field, f"must have 1 to {MAX_NAME_BYTES} letters, got {len(name)}")
        return name

    def counts(self) -> tuple[int, int]:
        """Check magic and version; the numbers of tensors and of metadata entries."""
        if bytes(self.bytes[:4]) != b"GGUF":
            raise self.error("magic", f"a GGUF file begins with b'GGUF', this one with {bytes(self.bytes[:4])!r}")
        self.take(4, "magic")
        version = self.u32("version")
        if version in (2 << 24, 3 << 24):
            raise self.error("version", f"{version >> 24} in big-endian order; only little-endian files can be read")
        if version not in (2, 3):
            raise self.error("version", f"{version} cannot be read, only 2 and 3; convert the model again")
        tensor_count = self.count(MIN_TENSOR_ENTRY, "tensor count")
        return tensor_count, self.count(MIN_METADATA_ENTRY, "metadata count")

    def metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = self.name(f"key of metadata entry {index}")
            if key in metadata:
                raise self.error(key, f"is there twice, again as metadata entry {index}")
            metadata[key] = self.value(self.u32(f"{key}: type"), key)
        return metadata

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string(key)
        if kind == _ARRAY:
            return self.array(self.u32(f"{key}: element type"), key)
        return self.numbers(kind, 1, key)[0]

    def array(self, kind: int, key: str) -> list[Any]:
        if kind == _ARRAY:
            raise self.error(key, "is an array of arrays, which no known metadata is")
        if kind == _STRING:
            return self.strings(self.count(8, f"{key}: length"), key)
        return self.numbers(kind, self.count(1, f"{key}: length"), key)

    def numbers(self, kind: int, count: int, key: str) -> list[Any]:
        dtype = np.dtype("u1") if kind == _BOOL else _NUMBERS.get(kind)
        if dtype is None:
            raise self.error(f"{key}: type", f"{kind} is none of the known value types 0 to 12")
        start = self.take(count * dtype.itemsize, key)
        values = self.file[start : self.position].view(dtype)
        if kind == _BOOL:
            if count and values.max() > 1:
                raise self.error(key, f"a boolean is 0 or 1, got {values.max()}")
            values = values.astype(bool)
        return values.tolist()

    def strings(self, count: int, key: str) -> list[str]:
        # A vocabulary has 10^5 strings and more: all at once where they are as they should be, or else one by one,
        # with no call of our own per string.
        return self.short_strings(count) or self.any_strings(count, key)

    def short_strings(self, count: int) -> list[str] | None:
        """The next `count` strings, where none is empty or holds a NUL, and few take more than a line; else None."""
        window = self.file[self.position : min(self.limit, self.position + _WINDOW * count)]
        if count == 0 or len(window) < 8:
            return None
        # A length below 256 is seven zero bytes in a row; between two such places, all words are larger.
        words = np.ndarray(len(window) - 7, "<u8", window, strides=(1,))
        starts = np.flatnonzero(words < 256)[:count]
        ends = starts + 8 + window[starts]
        if len(starts) < count or starts[0] != 0 or (starts[1:] != ends[:-1]).any() or ends[-1] > len(window):
            return None
        text = np.ones(ends[-1], bool)
        for byte in range(7):  # a length's last byte is 0, and stays to part the strings
            text[starts + byte] = False
        try:
            strings = str(window[: ends[-1]][text].tobytes(), "utf-8").split("\0")[1:]
        except UnicodeDecodeError:
            return None
        if len(strings) != count:
            return None
        self.position += int(ends[-1])
        return strings

    def any_strings(self, count: int, key: str) -> list[str]:
        strings: list[str] = []
        append, unpack, buffer, limit, start = strings.append, _U64, self.bytes, self.limit, self.position
        try:
            for _ in range(count):
                (length,) = unpack(buffer, start)
                end = start + 8 + length
                if end > limit:
                    problem = f"a string of {length} bytes at {start + 8} passes the header's end at {limit}"
                    raise self.error(f"{key}[{len(strings)}]", problem)
                append(str(buffer[start + 8 : end], "utf-8"))
                start = end
        except struct.error:
            problem = f"needs 8 bytes at {start}, and the file ends at {len(self.file)}"
            raise self.error(f"{key}[{len(strings)}]", problem) from None
        except UnicodeDecodeError as error:
            problem = f"is not UTF-8 (byte {start + 8 + error.start} of the file)"
            raise self.error(f"{key}[{len(strings)}]", problem) from None
        self.position = start
        return strings

    def tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        """Read the tensors' entries, then map their bytes, which begin at the next multiple of `alignment`."""
        entries: dict[str, tuple[tuple[int, ...], TensorType, int]] = {}
        for index in range(count):
            name = self.name(f"name of tensor {index}")
            if name in entries:
                raise self.error(f"tensor {name}", f"is there twice, again as tensor {index}")
            entries[name] = self.tensor_entry(f"tensor {name}", alignment)
        data = -(-self.position // alignment) * alignment
        tensors = {
            name: make_tensor(self.path, self.file, name, shape, type, data + offset)
            for name, (shape, type, offset) in entries.items()
        }
        self.check_overlap(tensors, {name: offset for name, (_, _, offset) in entries.items()})
        return tensors

    def tensor_entry(self, field: str, alignment: int) -> tuple[tuple[int, ...], TensorType, int]:
        """Shape (row-major: the file's dims reversed), type, and offset from the start of the data."""
        dims = self.u32(f"{field}: number of dims")
        if not 1 <= dims <= MAX_DIMS:
            raise self.error(f"{field}: number of dims", f"must be 1 to {MAX_DIMS}, got {dims}")
        shape = tuple(self.u64(f"{field}: dim {index}") for index in range(dims))[::-1]
        if 0 in shape:
            raise self.error(f"{field}: shape", f"{shape} has an empty axis")
        type = self.tensor_type(field)
        offset = self.u64(f"{field}: offset")
        if offset % alignment:
            raise self.error(f"{field}: offset", f"{offset} is not a multiple of the alignment {alignment}")
        return shape, type, offset

    def tensor_type(self, field: str) -> TensorType:
        number = self.u32(f"{field}: type")
        if name := _TENSOR_TYPE_IDS.get(number):
            return TENSOR_TYPES[name]
        from gguf.constants import GGMLQuantizationType

        known = {int(member): member.name for member in GGMLQuantizationType}
        if number not in known:
            raise self.error(f"{field}: type", f"{number} is no tensor type that GGUF knows (0 to {max(known)})")
        problem = f"type {known[number]} is not supported; use one of {', '.join(TENSOR_TYPES)}"
        raise UnsupportedModelError(f"{self.path}: {field}: {problem}")

    def check_overlap(self, tensors: dict[str, Tensor], offsets: dict[str, int]) -> None:
        for name, following in pairwise(sorted(tensors, key=offsets.__getitem__)):
            if (end := offsets[name] + tensors[name].nbytes) > offsets[following]:
                problem = f"begins at offset {offsets[following]}, inside tensor {name} that ends at {end}"
                raise self.error(f"tensor {following}", problem)
