"""Whole models with one thing wrong, opened as a user does: a typed error that names it, soon, and in little memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.tiny import write_tiny

from headrace.assemble import open_model
from headrace.errors import ModelFileError
from headrace.kernels.reference import ReferenceOps
from headrace.model.weights import load_weights

from . import fuzz
from .hostile import Examiner, complaint, contents, size_of, write_folder, write_gguf

Metadata, Tensors = dict[str, Any], dict[str, tuple[tuple[int, ...], int, bytes]]
SECONDS = 5


@pytest.fixture(scope="module")
def examiner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Examiner]:
    folder = tmp_path_factory.mktemp("whole")
    with Examiner() as examiner:
        for path in fuzz.seeds(folder):  # what loads whole is the control; and all that is imported on the way now is
            if path.name != "parts":
                assert examiner.examine(path, 60)["outcome"] == "loads"
        yield examiner


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Metadata, Tensors]:
    sizes = {"layers": 1, "heads": 2, "kv_heads": 1, "ffn": 64}
    return contents(write_tiny(tmp_path_factory.mktemp("tiny") / "m.gguf", "Q4_1", **sizes))


def check(examiner: Examiner, path: Path, outcome: str, said: str) -> None:
    answer, size = examiner.examine(path), size_of(path)
    assert complaint(answer, size, SECONDS) is None, answer
    assert answer["outcome"] == outcome and said in answer["message"], answer


def named(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    """Metadata changed: None takes an entry out; in names __ stands for a dot."""

    def change(metadata: Metadata, tensors: Tensors) -> None:
        for key, value in changes.items():
            metadata.pop(key.replace("__", "."), None)
            if value is not None:
                metadata[key.replace("__", ".")] = value

    return change


def tokens(change: Callable[[list[str]], Any]) -> Callable[[Metadata, Tensors], None]:
    def apply(metadata: Metadata, tensors: Tensors) -> None:
        metadata["tokenizer.ggml.tokens"] = change(list(metadata["tokenizer.ggml.tokens"]))

    return apply


def tensor(name: str, change: Callable[[tuple[int, ...], int, bytes], Any]) -> Callable[[Metadata, Tensors], None]:
    return lambda metadata, tensors: tensors.update({name: change(*tensors[name])})


def with_bytes(name: str, at: int, value: bytes) -> Callable[[Metadata, Tensors], None]:
    return tensor(name, lambda shape, type, data: (shape, type, data[:at] + value + data[at + len(value) :]))


NAN16, INF16, NAN32 = struct.pack("<e", float("nan")), struct.pack("<e", -float("inf")), struct.pack("<f", float("nan"))
EMBEDDING = "token_embd.weight"
GGUF: dict[str, tuple[Callable[[Metadata, Tensors], None], str, str]] = {
    "no heads": (named(llama__attention__head_count=0), "ModelFileError", "head_count"),
    "negative heads": (named(llama__attention__head_count=-2), "ModelFileError", "head_count"),
    "2^40 heads": (named(llama__attention__head_count=2**40), "ModelFileError", "head_count"),
    "heads that do not divide": (
        named(llama__attention__head_count=3, llama__attention__head_count_kv=2),
        "ModelFileError",
        "head",
    ),
    "more KV heads than heads": (named(llama__attention__head_count_kv=4), "ModelFileError", "head_count_kv"),
    "no layers": (named(llama__block_count=0), "ModelFileError", "block_count"),
    "negative layers": (named(llama__block_count=-1), "ModelFileError", "block_count"),
    "2^63 layers": (named(llama__block_count=2**63), "ModelFileError", "block_count"),
    "one layer more than there is": (named(llama__block_count=2), "ModelFileError", "blk.1."),
    "2^62 columns": (named(llama__embedding_length=2**62), "ModelFileError", "embedding_length"),
    "layers a text": (named(llama__block_count="1"), "ModelFileError", "block_count"),
    "layers a boolean": (named(llama__block_count=True), "ModelFileError", "block_count"),
    "layers a list": (named(llama__block_count=[1]), "ModelFileError", "block_count"),
    "context of 2^63": (named(llama__context_length=2**63), "ModelFileError", "context_length"),
    "no context": (named(llama__context_length=None), "ModelFileError", "context_length: is missing"),
    "eps NaN": (named(llama__attention__layer_norm_rms_epsilon=float("nan")), "ModelFileError", "epsilon"),
    "an architecture that is not known": (
        named(general__architecture="mamba"),
        "UnsupportedModelError",
        "'mamba' is not supported; in this kind of file: ",
    ),
    "an architecture that is a number": (named(general__architecture=7), "ModelFileError", "general.architecture"),
    "a rope that is not known": (
        named(llama__rope__scaling__type="spiral"),
        "UnsupportedModelError",
        "'spiral' is not supported",
    ),
    "rope base 0": (named(llama__rope__freq_base=0.0), "ModelFileError", "freq_base"),
    "rope base infinite": (named(llama__rope__freq_base=float("inf")), "ModelFileError", "freq_base"),
    "a pre-tokenizer that is not known": (
        named(tokenizer__ggml__pre="zig-zag"),
        "UnsupportedModelError",
        "'zig-zag'; supported are ",
    ),
    "a tokenizer that is not known": (
        named(tokenizer__ggml__model="rwkv"),
        "UnsupportedModelError",
        "'rwkv'; supported are 'gpt2', 'llama', 'bert'",
    ),
    "fewer tokens than rows": (tokens(lambda t: t[:-1]), "ModelFileError", "token_type: has 259 entries for 258"),
    "two tokens less than rows": (
        lambda m, t: m.update({key: m[key][:-2] for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type")}),
        "ModelFileError",
        "has 257 tokens for 259 rows of the embedding",
    ),
    "a vocabulary size that lies": (named(llama__vocab_size=260), "ModelFileError", "but the embedding has 259 rows"),
    "a token twice": (tokens(lambda t: [*t[:-1], t[9]]), "ModelFileError", "are both"),
    "tokens of numbers": (tokens(lambda t: [1] * len(t)), "ModelFileError", "not an array of str"),
    "merges of no pair": (named(tokenizer__ggml__merges=["a b c"]), "ModelFileError", "merge 0"),
    "merges of strangers": (named(tokenizer__ggml__merges=["zz yy"]), "ModelFileError", "merge 0 names"),
    "merges in a circle": (named(tokenizer__ggml__merges=["a b", "ab a", "aba b"]), "ModelFileError", "names 'ab'"),
    "an end that is no token": (named(tokenizer__ggml__eos_token_id=259), "ModelFileError", "eos_token_id"),
    "an endless template": (
        named(
            tokenizer__chat_template="{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
        ),
        "TemplateError",
        "the chat template",
    ),
    "a template that reaches out": (
        named(tokenizer__chat_template="{{ messages.__class__.__mro__[1].__subclasses__() }}"),
        "TemplateError",
        "",
    ),
    "a template of braces": (named(tokenizer__chat_template="{{" * 50_000), "TemplateError", "the chat template"),
    "a tensor missing": (lambda m, t: t.pop("blk.0.ffn_up.weight"), "ModelFileError", "blk.0.ffn_up.weight"),
    "a tensor too many": (lambda m, t: t.update(x=t[EMBEDDING]), "ModelFileError", "is no tensor of this architecture"),
    "a tensor of another shape": (
        tensor("blk.0.attn_q.weight", lambda s, t, d: ((32, 128), t, d)),
        "ModelFileError",
        "has shape [32, 128]",
    ),
    "an embedding with a row less": (tensor(EMBEDDING, lambda s, t, d: ((258, 64), t, d)), "ModelFileError", "258"),
    "an infinite scale": (
        with_bytes("blk.0.ffn_down.weight", 20 * 33, INF16),
        "ModelFileError",
        "blk.0.ffn_down.weight",
    ),
    "a minimum that is NaN": (
        with_bytes(EMBEDDING, 20 * 7 + 2, NAN16),
        "ModelFileError",
        "holds a NaN or an infinity in row",
    ),
    "a norm that is NaN": (with_bytes("output_norm.weight", 8, NAN32), "ModelFileError", "output_norm.weight"),
}


@pytest.mark.parametrize("case", GGUF)
def test_gguf(examiner: Examiner, tiny: tuple[Metadata, Tensors], tmp_path: Path, case: str) -> None:
    change, outcome, said = GGUF[case]
    metadata, tensors = dict(tiny[0]), dict(tiny[1])
    change(metadata, tensors)
    check(examiner, write_gguf(tmp_path / "m.gguf", metadata, tensors), outcome, said)


def test_merges_that_are_twice_there_do_no_harm(tmp_path: Path, tiny: tuple[Metadata, Tensors]) -> None:
    """And the later place counts, as in transformers' own reading."""
    metadata, tensors = dict(tiny[0]), dict(tiny[1])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"][:-2], "ab", "bc"]
    metadata["tokenizer.ggml.merges"] = ["a b", "b c", "a b"]
    model = open_model(str(write_gguf(tmp_path / "m.gguf", metadata, tensors)))
    tokenizer = model.tokenizer()
    assert tokenizer.encode("abc")[-1] == tokenizer.token_id("bc")


def in_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config |= changes
        (folder / "config.json").write_text(json.dumps({key: v for key, v in config.items() if v is not None}))

    return change


def in_file(name: str, data: bytes | str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data) and None


def in_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """The safetensors header changed, its data as it was."""

    def apply(folder: Path) -> None:
        data = (folder / "model.safetensors").read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return apply


def index_to(shard: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "one.safetensors")
        (folder.parent / "outside.safetensors").write_bytes((folder / "one.safetensors").read_bytes())
        (folder / "link.safetensors").symlink_to(folder.parent / "outside.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))

    return change


def only_pickles(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").rename(folder / name) and None


def linked(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "away.safetensors")
    (folder / "model.safetensors").symlink_to(folder.parent / "away.safetensors")


def not_a_number(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = NAN16
    path.write_bytes(data)


Q = "model.layers.1.self_attn.q_proj.weight"
FOLDERS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "empty weights": (in_file("model.safetensors", b""), "ModelFileError", "is empty"),
    "weights cut": (lambda f: os.truncate(f / "model.safetensors", 900), "ModelFileError", ""),
    "header too long": (
        in_file("model.safetensors", struct.pack("<Q", 2**63) + b"{}"),
        "ModelFileError",
        "header length",
    ),
    "header nested": (
        in_file("model.safetensors", struct.pack("<Q", 400_000) + b'{"a":' + b"[" * 399_995),
        "ModelFileError",
        "JSON",
    ),
    "a shape that overflows": (in_header(lambda h: h[Q].update(shape=[2**62, 2**62])), "ModelFileError", Q),
    "offsets past the end": (
        in_header(lambda h: h[Q].update(data_offsets=[0, 2**62])),
        "ModelFileError",
        "data_offsets",
    ),
    "a shape of another size": (
        in_header(lambda h: h[Q].update(shape=[128, 32])),
        "ModelFileError",
        "has shape [128, 32]",
    ),
    "weights of integers": (
        in_header(lambda h: h[Q].update(dtype="I16")),
        "UnsupportedModelError",
        "weights of I16; use F32",
    ),
    "a type that is not known": (in_header(lambda h: h[Q].update(dtype="F4")), "UnsupportedModelError", "dtype F4"),
    "a missing shard": (index_to("two.safetensors"), "ModelFileError", "names the shard two.safetensors"),
    "a shard above": (index_to("../outside.safetensors"), "ModelFileError", "plain name"),
    "a shard of the root": (index_to("/etc/passwd"), "ModelFileError", "plain name"),
    "a shard that leads out": (index_to("link.safetensors"), "ModelFileError", "leads out of its folder"),
    "weights that lead out": (linked, "ModelFileError", "leads out of its folder"),
    "a pickle": (only_pickles("pytorch_model.bin"), "UnsupportedModelError", "is a pickle, which can run any code"),
    "another pickle": (
        only_pickles("model.pt"),
        "UnsupportedModelError",
        "save_pretrained(folder, safe_serialization=True)",
    ),
    "code of its own": (in_config(auto_map={"AutoModel": "x.Model"}), "loads", ""),  # with a warning, and never run
    "config empty": (in_file("config.json", b""), "ModelFileError", "is empty"),
    "config nested": (in_file("config.json", b"[" * 500_000), "ModelFileError", "JSON"),
    "config a list": (in_file("config.json", b"[]"), "ModelFileError", "must be a JSON object"),
    "no architecture": (in_config(architectures=None), "ModelFileError", "architectures"),
    "an architecture that is not known": (
        in_config(architectures=["MambaForCausalLM"]),
        "UnsupportedModelError",
        "'MambaForCausalLM' is not supported; in",
    ),
    "a rope that is not known": (
        in_config(rope_scaling={"rope_type": "spiral"}),
        "UnsupportedModelError",
        "'spiral' is not supported",
    ),
    "a quantisation that is not known": (
        in_config(quantization_config={"quant_method": "hqq"}),
        "UnsupportedModelError",
        "supported are awq (gemm",
    ),
    "heads 0": (in_config(num_attention_heads=0), "ModelFileError", "num_attention_heads"),
    "heads that do not divide": (in_config(num_attention_heads=5), "ModelFileError", "num_attention_heads"),
    "2^70 layers": (in_config(num_hidden_layers=2**70), "ModelFileError", "num_hidden_layers"),
    "a vocabulary that lies": (in_config(vocab_size=300), "ModelFileError", "but the embedding has 256 rows"),
    "a weight that is NaN": (not_a_number, "ModelFileError", "holds a NaN or an infinity in row"),
    "tokenizer cut": (lambda f: os.truncate(f / "tokenizer.json", 300), "ModelFileError", "is not a tokenizer"),
    "tokenizer gone": (lambda f: (f / "tokenizer.json").unlink(), "ModelFileError", "save the tokenizer again"),
    "an endless template": (
        in_file("chat_template.jinja", "{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}"),
        "TemplateError",
        "",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(examiner: Examiner, tmp_path: Path, case: str) -> None:
    change, outcome, said = FOLDERS[case]
    folder = write_folder(tmp_path / "model")
    change(folder)
    check(examiner, folder, outcome, said)


def test_a_folder_of_code_runs_none_of_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    in_config(auto_map={"AutoModelForCausalLM": "modeling_x.Model"})(folder)
    (folder / "modeling_x.py").write_text("raise SystemExit('run')")
    with pytest.warns(UserWarning, match="code of its own"):
        open_model(str(folder))


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path) -> None:
    """The model opens; loading its weights then says what happened, where reading them would end the process."""
    for path in (write_tiny(tmp_path / "m.gguf", "F16"), write_folder(tmp_path / "model")):
        model = open_model(str(path))
        file = path / "model.safetensors" if path.is_dir() else path
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(ModelFileError, match="when it was opened, and now has"):
            load_weights(model.file, model.spec, ReferenceOps(1), range(model.spec.layers))


def test_loaded_weights_do_not_need_the_file(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "F32")
    model = open_model(str(path))
    weights = load_weights(model.file, model.spec, ReferenceOps(1), range(model.spec.layers))
    before = np.copy(weights.embedding.rows)  # type: ignore[union-attr]
    os.truncate(path, 100)
    assert np.array_equal(weights.embedding.rows, before)  # type: ignore[union-attr]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32))
def test_damaged_models(examiner: Examiner, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """A few of what `fuzz.py` does for minutes."""
    import random
    import shutil

    base = tmp_path_factory.getbasetemp()
    if not (base / "seeds").exists():
        (base / "seeds").mkdir()
        fuzz.seeds(base / "seeds")
    rng = random.Random(seed)
    original = rng.choice(sorted((base / "seeds").iterdir()))
    path = base / "damaged" / original.name
    shutil.rmtree(path.parent, ignore_errors=True)
    path.parent.mkdir()
    (shutil.copytree if original.is_dir() else shutil.copy)(original, path)
    fuzz.damage(path, rng)
    answer = examiner.examine(path / "m-00001-of-00002.gguf" if path.name == "parts" else path)
    assert complaint(answer, size_of(path), SECONDS) is None


def test_the_examiner_sees_what_is_wrong(tmp_path: Path) -> None:
    """The control: a crash, a hang, memory and an error without a type are each found."""
    answer = {"outcome": "loads", "message": "", "seconds": 0.1, "bytes": 0}
    assert complaint(answer, 100) is None
    assert complaint(answer | {"outcome": "crash"}, 100) and complaint(answer | {"outcome": "hang"}, 100)
    assert complaint(answer | {"outcome": "untyped KeyError"}, 100) and complaint(answer | {"seconds": 11.0}, 100)
    assert complaint(answer | {"bytes": 1 << 30}, 100)
    with Examiner() as examiner:
        os.mkfifo(tmp_path / "config.json")
        assert examiner.examine(tmp_path)["outcome"] == "ModelFileError"
        examiner._process.kill()
        examiner._process.wait()
        assert examiner.examine(tmp_path)["outcome"] in ("crash", "ModelFileError")
