"""Every family: logits against transformers', float32 on both sides, on both op sets, from folders and from GGUF; and
every way to misread a model must fail this gate."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from headrace.errors import ModelFileError, UnsupportedModelError
from headrace.kernels import native
from headrace.kernels.native import NativeOps
from headrace.model.families import read_spec
from headrace.model.rope import RopeSpec
from headrace.model.spec import ExpertSpec, ModelSpec

from .conftest import TOKENS, Families
from .family_models import FAMILIES
from .harness import Model, NativeModel, Part, open_model, perturbed, relative_error, same_bytes
from .test_gate import PERTURBATIONS
from .test_spec import HOSTILE

BOUND = 1e-4
ISAS = [] if native.missing() is not None else native._native.supported_isas


def check(model: Model, theirs: np.ndarray) -> None:
    """Prefill, chunks, 40 steps of decode, and a batch, on one model."""
    whole = model.logits(TOKENS)
    assert relative_error(whole, theirs) < BOUND
    assert same_bytes(model.logits(TOKENS, 7), whole)
    steps = [model.run(Part(TOKENS[:20]))] + [model.run(Part(TOKENS[at : at + 1], at)) for at in range(20, 60)]
    assert same_bytes(np.concatenate(steps), whole)
    first, second = range(1, 9), range(9, 17)
    model.run(Part(TOKENS[5:40], 0, second), Part(TOKENS[:33], 0, first))
    both = model.run(Part(TOKENS[40:41], 35, second), Part(TOKENS[33:50], 33, first), Part(TOKENS[:2], 0, (20,)))
    assert same_bytes(both[1:18], whole[33:50]) and same_bytes(both[18:], whole[:2])


@pytest.mark.parametrize("name", FAMILIES)
def test_reference_set(family: Families, name: str) -> None:
    check(Model(family(name).folder, context=FAMILIES[name].context), family(name).logits)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("isa", ISAS)
def test_native_set(family: Families, name: str, isa: str) -> None:
    model = NativeModel(family(name).folder, NativeOps(2, isa), FAMILIES[name].context)
    check(model, family(name).logits)


@pytest.mark.parametrize("name", [name for name, model in FAMILIES.items() if model.arch])
def test_same_weights_through_gguf(family: Families, name: str) -> None:
    saved, context = family(name), FAMILIES[name].context
    ours = Model(saved.gguf(), context=context).logits(TOKENS)
    assert relative_error(ours, saved.logits) < BOUND
    from_gguf, from_folder = read_spec(open_model(saved.gguf())), read_spec(open_model(saved.folder))
    for field in dataclasses.fields(ModelSpec):
        if field.name not in ("name", "architecture", "norm_eps", "ropes", "attention_scale"):
            ours, theirs = (getattr(spec, field.name) for spec in (from_gguf, from_folder))
            assert ours == theirs or abs(ours - theirs) < 1e-6 * abs(theirs), field.name


@pytest.mark.parametrize("stem", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_one_with_vision(family: Families, stem: str, tmp_path: Path) -> None:
    """Gemma 3's larger checkpoints: the text model's names have another beginning, and its config is a table."""
    saved = family("gemma3")
    config = json.loads((saved.folder / "config.json").read_text())
    text = {name: value for name, value in config.items() if name not in ("architectures", "vocab_size")}
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    tensors = load_file(saved.folder / "model.safetensors")
    renamed = {name.replace("model.", stem, 1): values for name, values in tensors.items()}
    save_file(renamed | {"vision_tower.patch.weight": np.zeros((2, 2), np.float32)}, tmp_path / "model.safetensors")
    assert same_bytes(Model(tmp_path).logits(TOKENS), Model(saved.folder).logits(TOKENS))


def test_parameters_are_the_files(family: Families) -> None:
    for name in ("gpt2", "gemma2", "qwen3moe", "olmo2", "opt", "bloom"):
        source = open_model(family(name).folder)
        counted = sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values())
        assert read_spec(source).parameters == counted


# What is perturbed, and on which model: PERTURBATIONS' fields on Llama, and these where Llama has nothing to perturb.
FAMILY_PERTURBATIONS: list[tuple[str, str, Callable]] = [
    ("norm", "gpt2", lambda value: "rms"),
    ("norm", "qwen3", lambda value: "layer"),
    ("norm_bias", "gpt2", lambda value: False),
    ("norm_eps", "gpt2", lambda value: value * 100),
    ("pre_norm", "qwen3", lambda value: False),
    ("pre_norm", "olmo2", lambda value: True),
    ("post_norm", "gemma2", lambda value: False),
    ("post_norm", "qwen3", lambda value: True),
    ("parallel", "falcon-new", lambda value: False),
    ("parallel", "qwen3", lambda value: True),
    ("shared_norm", "falcon", lambda value: False),
    ("shared_norm", "falcon-new", lambda value: True),
    ("qk_norm", "qwen3", lambda value: None),
    ("qk_norm", "olmo2", lambda value: "head"),
    ("softcap", "gemma2", lambda value: value * 1.02),
    ("softcap", "gemma2", lambda value: None),
    ("alibi", "bloom", lambda value: False),
    ("alibi", "qwen3", lambda value: True),
    ("activation", "gpt2", lambda value: "gelu"),
    ("activation", "falcon", lambda value: "gelu_tanh"),
    ("activation", "opt", lambda value: "relu2"),
    ("activation", "gemma2", lambda value: "gelu"),
    ("activation", "qwen3", lambda value: "gelu"),
    ("gated", "qwen3", lambda value: False),
    ("gated", "gpt2", lambda value: True),
    ("qkv_bias", "qwen2", lambda value: False),
    ("qkv_bias", "qwen3", lambda value: True),
    ("o_bias", "gpt2", lambda value: False),
    ("o_bias", "qwen2", lambda value: True),
    ("mlp_bias", "opt", lambda value: False),
    ("positions", "gpt2", lambda value: 0),
    ("positions", "gpt2", lambda value: value - 1),
    ("position_offset", "opt", lambda value: 1),
    ("embedding_norm", "bloom", lambda value: False),
    ("embedding_scale", "gemma2", lambda value: value * 1.002),
    ("embedding_scale", "granite", lambda value: 1.0),
    ("residual_scale", "granite", lambda value: value * 1.002),
    ("logit_scale", "granite", lambda value: value * 1.002),
    ("logit_softcap", "gemma2", lambda value: value * 1.01),
    ("logit_softcap", "gemma2", lambda value: None),
    ("attention_scale", "gemma3-types", lambda value: value * 1.01),
    ("attention_scale", "granite", lambda value: value * 1.002),
    ("windows", "gemma2", lambda value: (None, *value[1:])),
    ("windows", "gemma3", lambda value: value[::-1]),
    ("windows", "qwen2-window", lambda value: (7, *value[1:])),
    ("windows", "phi3", lambda value: (12,) * 5),
    ("local.theta", "gemma3", lambda value: 1e6),
    ("rope.theta", "qwen3", lambda value: value * 2),
    ("rope.kind", "gemma3", lambda value: "default"),
    ("rope.rotated", "phi3", lambda value: value - 2),
    ("rope.factors", "phi3-short", lambda value: (value[0] * 1.01, *value[1:])),
    ("rope.long_factors", "phi3-long", lambda value: (value[0] * 1.01, *value[1:])),
    ("rope.attention_factor", "phi3-long", lambda value: value * 1.002),
    ("rope.original_context", "phi3-short", lambda value: 50),
    ("rope.original_context", "phi3-long", lambda value: 1000),
    ("experts.count", "olmoe", lambda value: value - 1),
    ("experts.chosen", "olmoe", lambda value: value - 1),
    ("experts.ffn_dim", "qwen3moe", lambda value: value - 1),
    ("experts.normalise", "olmoe", lambda value: True),
    ("experts.normalise", "mixtral", lambda value: False),
]


# Names, and bounds that only the door holds requests to.
NOT_IN_THE_LOGITS = {"name", "architecture", "context_length"}


def test_every_field_is_perturbed() -> None:
    fields = {field.name for field in dataclasses.fields(ModelSpec)} - NOT_IN_THE_LOGITS - {"ropes", "experts"}
    fields |= {f"rope.{field.name}" for field in dataclasses.fields(RopeSpec)}
    fields |= {f"experts.{field.name}" for field in dataclasses.fields(ExpertSpec)}
    assert fields == {field for field, _, _ in PERTURBATIONS + FAMILY_PERTURBATIONS} - {"local.theta"}


@pytest.mark.parametrize(("field", "name", "change"), FAMILY_PERTURBATIONS, ids=lambda value: str(value)[:24])
def test_a_wrong_spec_fails_the_gate(family: Families, field: str, name: str, change: Callable) -> None:
    source = open_model(family(name).folder)
    spec = read_spec(source)
    wrong = perturbed(spec, field, change)
    assert wrong != spec
    try:
        model = Model(source, wrong, context=FAMILIES[name].context)
        error = relative_error(model.logits(TOKENS), family(name).logits)
    except (ModelFileError, KeyError):  # a weight that the file, or the family, does not have
        return
    assert error > BOUND


def hostile(values: dict[str, Any], data: st.DataObject) -> dict[str, Any]:
    """Values with one of them changed into anything, or left out."""
    field = data.draw(st.sampled_from(sorted(values)))
    value = data.draw(HOSTILE)
    return {name: old for name, old in values.items() if name != field} | ({} if value is None else {field: value})


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_hostile_values_end_in_typed_errors(family: Families, name: str, data: st.DataObject) -> None:
    folder = open_model(family(name).folder)
    try:
        read_spec(dataclasses.replace(folder, config=hostile(folder.config, data)))
    except (ModelFileError, UnsupportedModelError):
        pass
    if FAMILIES[name].arch is not None:
        file = open_model(family(name).gguf())
        own = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
        try:
            read_spec(dataclasses.replace(file, metadata=hostile(own, data)))
        except (ModelFileError, UnsupportedModelError):
            pass


def test_layers_without_rotation(family: Families) -> None:
    source = open_model(family("smollm3").folder)
    spec = read_spec(source)
    assert [rope is None for rope in spec.ropes] == [False, False, False, True, False]
    wrong = dataclasses.replace(spec, ropes=(spec.ropes[0],) * 5)
    assert relative_error(Model(source, wrong).logits(TOKENS), family("smollm3").logits) > BOUND


def test_expert_load_is_counted(family: Families) -> None:
    """Each row chooses three experts in each layer; both sets agree on which."""
    model = Model(family("olmoe").folder)
    batches = []
    forward = model.decoder.forward
    model.decoder.forward = lambda ops, batch, caches: batches.append(batch) or forward(ops, batch, caches)
    model.logits(TOKENS)
    loads = np.array(batches[0].expert_load)
    assert loads.shape == (5, 7) and (loads.sum(axis=1) == 3 * len(TOKENS)).all()
