"""Encoders: hidden states and heads against transformers', float32 on both sides, on both op sets; and every way to
misread a model must fail this gate."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from headrace.errors import HeadraceError, ModelFileError, UnsupportedModelError
from headrace.formats.gguf import GGUFFile, open_gguf
from headrace.formats.safetensors import Checkpoint, open_checkpoint
from headrace.kernels import native
from headrace.kernels.native import NativeOps
from headrace.kernels.reference import ReferenceOps
from headrace.model.encoder import Encoder
from headrace.model.encoder_spec import EncoderSpec, HeadSpec
from headrace.model.encoder_weights import load_encoder_weights
from headrace.model.families.encoders import is_encoder, read_encoder
from headrace.workers.embedder import Embedder, pack_texts, pool

from .encoder_models import ENCODERS, save_encoder, write_bert_gguf
from .harness import relative_error, same_bytes

BOUND = 1e-4
ISAS = [] if native.missing() is not None else native._native.supported_isas
RANDOM = np.random.default_rng(3)
# From 2 on: 0 and 1 are padding, whose positions RoBERTa counts otherwise.
TEXTS = [RANDOM.integers(2, 97, length).tolist() for length in (1, 33, 7, 75, 16, 2, 64)]


@dataclass(frozen=True)
class Saved:
    folder: Path
    hidden: list[np.ndarray]
    logits: list[np.ndarray]  # empty where there is no head


Encoders = Callable[[str], Saved]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    pytest.importorskip("transformers")

    @cache
    def get(name: str) -> Saved:
        folder = tmp_path_factory.mktemp(name)
        found = save_encoder(name, folder, TEXTS)
        return Saved(folder, [hidden for hidden, _ in found], [logits for _, logits in found if logits is not None])

    return get


def embedder(
    source: Path | GGUFFile | Checkpoint, ops: Any = None, spec: EncoderSpec | None = None, rows: int = 100
) -> Embedder:
    source = open_checkpoint(source) if isinstance(source, Path) else source
    spec, ops = spec or read_encoder(source), ops or ReferenceOps()
    return Embedder(Encoder(spec, load_encoder_weights(source, spec, ops)), ops, rows, 4)


def error_of(model: Embedder, theirs: Saved, texts: Sequence[list[int]] = TEXTS) -> float:
    """Of the hidden states and, where there is a head, the logits."""
    found = [relative_error(ours, hidden) for ours, hidden in zip(model.hidden(texts), theirs.hidden)]
    if model.encoder.spec.head is not None:
        ours = [logits.reshape(them.shape) for logits, them in zip(model.logits(texts), theirs.logits)]
        found += [relative_error(us, them) for us, them in zip(ours, theirs.logits)]
    return max(found)


def check(model: Embedder, theirs: Saved) -> None:
    assert error_of(model, theirs) < BOUND
    together = list(model.hidden(TEXTS))
    alone = [next(model.hidden([text])) for text in TEXTS]
    backwards = list(model.hidden(TEXTS[::-1]))[::-1]
    assert all(map(same_bytes, together, alone)) and all(map(same_bytes, together, backwards))
    vectors = model.embed(TEXTS)
    assert same_bytes(vectors, np.concatenate([model.embed([text]) for text in TEXTS]))
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6
    if theirs.logits:
        logits = model.logits(TEXTS)
        assert all(same_bytes(many, model.logits([text])[0]) for many, text in zip(logits, TEXTS, strict=True))


@pytest.mark.parametrize("name", ENCODERS)
def test_reference_set(saved: Encoders, name: str) -> None:
    check(embedder(saved(name).folder), saved(name))


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("isa", ISAS)
def test_native_set(saved: Encoders, name: str, isa: str) -> None:
    check(embedder(saved(name).folder, NativeOps(2, isa)), saved(name))


def test_large_and_small_steps_agree(saved: Encoders) -> None:
    for ops in [ReferenceOps(), *[NativeOps(2, isa) for isa in ISAS[:1]]]:
        small, large = (embedder(saved("bert").folder, ops, rows=rows) for rows in (1, 1000))
        assert all(map(same_bytes, small.hidden(TEXTS), large.hidden(TEXTS)))


def test_steps_are_full_and_whole() -> None:
    assert pack_texts([], 10, 4) == []
    assert pack_texts([3, 7, 1, 10, 25, 2], 10, 4) == [range(0, 2), range(2, 3), range(3, 4), range(4, 5), range(5, 6)]
    assert pack_texts([1] * 9, 100, 4) == [range(0, 4), range(4, 8), range(8, 9)]


def test_poolings() -> None:
    hidden = np.array([[1.0, -4.0], [3.0, 0.0], [8.0, 1.0]], np.float32)
    assert pool(hidden, "mean").tolist() == [4.0, -1.0]
    assert pool(hidden, "cls").tolist() == [1.0, -4.0]
    assert pool(hidden, "max").tolist() == [8.0, 1.0]


# field, model, change
PERTURBATIONS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("layers", "bert", lambda value: value - 1),
    ("dim", "bert", lambda value: value - 6),
    ("heads", "bert", lambda value: 5),
    ("ffn_dim", "bert", lambda value: value - 1),
    ("vocab_size", "bert", lambda value: value - 1),
    ("norm_eps", "bert", lambda value: value * 2),
    ("activation", "bert", lambda value: "gelu_tanh"),
    ("activation", "bert-relu", lambda value: "gelu"),
    ("positions", "bert", lambda value: value - 1),
    ("position_offset", "bert", lambda value: 1),
    ("position_offset", "roberta", lambda value: 1),
    ("token_types", "bert", lambda value: 0),
    ("token_types", "distilbert", lambda value: 2),
    ("head.task", "bert-masked", lambda value: "classify"),
    ("head.task", "bert-classify", lambda value: "masked"),
    ("head.activation", "bert-masked", lambda value: "gelu_tanh"),
    ("head.activation", "bert-classify", lambda value: "relu"),
    ("head.activation", "distilbert-classify", lambda value: "tanh"),
    ("head.tied", "bert-untied", lambda value: True),
    ("head.tied", "bert-masked", lambda value: False),
    ("head.labels", "bert-classify", lambda value: value[:-1]),
]


def test_every_field_is_perturbed() -> None:
    # `pooling` has a test of its own; names and the longest text do not enter the hidden states.
    fields = {field.name for field in dataclasses.fields(EncoderSpec)}
    fields -= {"name", "architecture", "context_length", "pooling", "head"}
    fields |= {f"head.{field.name}" for field in dataclasses.fields(HeadSpec)}
    assert fields == {field for field, _, _ in PERTURBATIONS}


@pytest.mark.parametrize(("field", "name", "change"), PERTURBATIONS)
def test_a_wrong_spec_fails_the_gate(saved: Encoders, field: str, name: str, change: Callable[[Any], Any]) -> None:
    source = open_checkpoint(saved(name).folder)
    spec = read_encoder(source)
    owner: Any = spec.head if field.startswith("head.") else spec
    leaf = field.removeprefix("head.")
    wrong: Any = dataclasses.replace(owner, **{leaf: change(getattr(owner, leaf))})
    wrong = wrong if owner is spec else dataclasses.replace(spec, head=wrong)
    texts = [text[:60] for text in TEXTS]  # so that a shifted position is still one of the table
    short = dataclasses.replace(saved(name), hidden=[], logits=[])
    right = embedder(source)
    short.hidden.extend(right.hidden(texts))
    short.logits.extend(right.logits(texts) if saved(name).logits else [])
    try:
        assert error_of(embedder(source, spec=wrong), short, texts) > BOUND
    except (ModelFileError, KeyError, ValueError):  # a weight that the file does not have, or of another shape
        pass


# -- what real files are like


def copy_of(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    file = to / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return to


def test_gguf(saved: Encoders, tmp_path: Path) -> None:
    folder = saved("bert").folder
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    source = open_gguf(write_bert_gguf(config, tensors, tmp_path / "bert.gguf", pooling=2))
    assert is_encoder(source)
    model = embedder(source)
    assert error_of(model, saved("bert")) < BOUND
    from_folder = read_encoder(open_checkpoint(folder))
    mine = dataclasses.replace(model.encoder.spec, name=from_folder.name, norm_eps=from_folder.norm_eps)
    assert mine == dataclasses.replace(from_folder, pooling="cls")
    with pytest.raises(UnsupportedModelError, match="pooling type 3"):
        read_encoder(open_gguf(write_bert_gguf(config, tensors, tmp_path / "last.gguf", pooling=3)))


def test_norms_with_gamma_and_beta_and_tensors_of_other_heads(saved: Encoders, tmp_path: Path) -> None:
    folder = copy_of(saved("bert-masked").folder, tmp_path / "old")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        for ending, other in old.items():
            if name.endswith(ending):
                tensors[name.removesuffix(ending) + other] = tensors.pop(name)
    tensors["cls.seq_relationship.weight"] = np.zeros((2, 120), np.float32)
    tensors["bert.pooler.dense.weight"] = np.zeros((120, 120), np.float32)
    tensors["bert.embeddings.position_ids"] = np.arange(77)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].copy()
    save_file(tensors, folder / "model.safetensors")
    assert error_of(embedder(folder), saved("bert-masked")) < BOUND
    tensors["bert.encoder.layer.0.attention.rotation"] = np.zeros(3, np.float32)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFileError, match=r"layer\.0\.attention\.rotation"):
        embedder(folder)


def test_a_checkpoint_with_a_head_read_as_a_bare_model(saved: Encoders, tmp_path: Path) -> None:
    for name, bare in (("bert-masked", "BertModel"), ("distilbert-masked", "DistilBertModel")):
        folder = copy_of(saved(name).folder, tmp_path / bare, architectures=[bare])
        model = embedder(folder)
        assert model.encoder.spec.head is None
        assert error_of(model, saved(name)) < BOUND


OLD_POOLING = {
    "word_embedding_dimension": 120,
    "pooling_mode_cls_token": True,
    "pooling_mode_mean_tokens": False,
    "pooling_mode_max_tokens": False,
    "pooling_mode_mean_sqrt_len_tokens": False,
}


def sentence_folder(saved: Encoders, to: Path, pooling: Any, *kinds: str, path: str = "1_Pooling") -> Path:
    folder = copy_of(saved("bert").folder, to)
    modules = [("", "sentence_transformers.models.Transformer"), (path, "sentence_transformers.models.Pooling")]
    modules += [(f"2_{kind}", f"some.where.{kind}") for kind in kinds]
    (folder / "modules.json").write_text(json.dumps([{"path": path, "type": kind} for path, kind in modules]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


@pytest.mark.parametrize(
    ("pooling", "wanted"),
    [
        (OLD_POOLING, "cls"),
        (OLD_POOLING | {"pooling_mode_cls_token": False, "pooling_mode_max_tokens": True}, "max"),
        ({"embedding_dimension": 120, "pooling_mode": "mean", "include_prompt": True}, "mean"),
        ({"embedding_dimension": 120, "pooling_mode": "max"}, "max"),
    ],
)
def test_pooling_is_what_modules_json_points_to(saved: Encoders, tmp_path: Path, pooling: Any, wanted: Any) -> None:
    model = embedder(sentence_folder(saved, tmp_path / "m", pooling, "Normalize"))
    assert model.encoder.spec.pooling == wanted
    many = [text for text in TEXTS if len(text) > 1]  # of one token all are the same
    for ours, hidden in zip(model.embed(many, normalize=False), saved("bert").hidden[1:], strict=True):
        theirs = {"mean": hidden.mean(axis=0), "cls": hidden[0], "max": hidden.max(axis=0)}
        assert [kind for kind, vector in theirs.items() if relative_error(ours, vector) < BOUND] == [wanted]


@pytest.mark.parametrize(
    ("pooling", "kinds", "path", "said"),
    [
        (OLD_POOLING | {"pooling_mode_mean_tokens": True}, (), "1_Pooling", "cls, mean"),
        ({"pooling_mode": "lasttoken"}, (), "1_Pooling", "lasttoken is not supported"),
        ({"pooling_mode": "mean"}, ("Dense",), "1_Pooling", "module 'some.where.Dense'"),
        ({"pooling_mode": "mean", "embedding_dimension": 99}, (), "1_Pooling", "is 99, but the model's width is 120"),
        ({"pooling_mode": "mean"}, (), "../../1_Pooling", "leads out"),
        ([1], (), "1_Pooling", "JSON object"),
    ],
)
def test_pooling_that_is_refused(
    saved: Encoders, tmp_path: Path, pooling: Any, kinds: tuple[str, ...], path: str, said: str
) -> None:
    with pytest.raises(HeadraceError, match=said):
        read_encoder(open_checkpoint(sentence_folder(saved, tmp_path / "m", pooling, *kinds, path=path)))


@pytest.mark.parametrize("modules", ["{}", "[1]", '[{"path": 1, "type": "x.Pooling"}]', "[" * 100_000, "nothing"])
def test_modules_json_that_is_malformed(saved: Encoders, tmp_path: Path, modules: str) -> None:
    folder = copy_of(saved("bert").folder, tmp_path / "m")
    (folder / "modules.json").write_text(modules)
    with pytest.raises(ModelFileError, match=r"modules\.json"):
        read_encoder(open_checkpoint(folder))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_attention_heads": 7}, "7 heads do not divide"),
        ({"num_hidden_layers": 0}, "from 1 to"),
        ({"hidden_size": 1 << 40}, "from 1 to"),
        ({"vocab_size": 98}, "is 98, but the embedding has 97 rows"),
        ({"max_position_embeddings": 78}, r"\[78, 120\]"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"hidden_act": "mish"}, "mish"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
    ],
)
def test_configs_that_are_refused(saved: Encoders, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(HeadraceError, match=said):
        embedder(copy_of(saved("bert").folder, tmp_path / "m", **config))


def test_labels(saved: Encoders, tmp_path: Path) -> None:
    names = {str(i): f"class {i}" for i in range(5)}
    folder = copy_of(saved("bert-classify").folder, tmp_path / "m", id2label=names)
    head = read_encoder(open_checkpoint(folder)).head
    assert head is not None and head.labels == tuple(names.values())
    with pytest.raises(ModelFileError, match=r"names 4 classes, but classifier\.weight has 5 rows"):
        read_encoder(open_checkpoint(copy_of(folder, tmp_path / "n", id2label=dict(list(names.items())[:4]))))


def test_the_longest_text(saved: Encoders, tmp_path: Path) -> None:
    folder = copy_of(saved("bert").folder, tmp_path / "m")
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1000000000000000019884624838656}')
    assert read_encoder(open_checkpoint(folder)).context_length == 77
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 25}')
    assert read_encoder(open_checkpoint(folder)).context_length == 25
    assert read_encoder(open_checkpoint(saved("roberta").folder)).context_length == 75
