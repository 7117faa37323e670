"""Reading specs: what the two kinds of file say, both spellings of rope, and refusals that name the field."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.errors import ModelFileError, UnsupportedModelError
from headrace.formats.gguf import GGUFFile
from headrace.formats.safetensors import Checkpoint
from headrace.formats.tensor import F32, Tensor
from headrace.model.families import read_spec
from headrace.model.rope import RopeSpec, rope_table
from headrace.model.spec import KVGroup, ModelSpec

GGUF_VALUES: dict[str, Any] = {
    "general.architecture": "llama",
    "llama.block_count": 5,
    "llama.context_length": 256,
    "llama.embedding_length": 120,
    "llama.feed_forward_length": 53,
    "llama.attention.head_count": 6,
    "llama.attention.head_count_kv": 3,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.vocab_size": 97,
    "llama.rope.freq_base": 5000.0,
    "llama.rope.dimension_count": 20,
}
HF_VALUES: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 5,
    "max_position_embeddings": 256,
    "hidden_size": 120,
    "intermediate_size": 53,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "vocab_size": 97,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
}


def tensor(name: str, values: np.ndarray) -> Tensor:
    return Tensor(
        name, values.shape, F32, np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8), Path("m")
    )


def gguf_file(**tensors: np.ndarray) -> GGUFFile:
    values = {"token_embd.weight": np.zeros((97, 120))} | {name.replace("__", "."): x for name, x in tensors.items()}
    return GGUFFile(Path("m.gguf"), {}, {name: tensor(name, x) for name, x in values.items()})


def read_gguf(changes: dict[str, Any], **tensors: np.ndarray) -> ModelSpec:
    values = {key: value for key, value in (GGUF_VALUES | changes).items() if value is not None}
    return read_spec(dataclasses.replace(gguf_file(**tensors), metadata=values))


def read_hf(changes: dict[str, Any]) -> ModelSpec:
    name = "model.embed_tokens.weight"
    return read_spec(Checkpoint(Path("model"), HF_VALUES | changes, {name: tensor(name, np.zeros((97, 120)))}))


def test_both_kinds_of_file_say_the_same() -> None:
    ours = read_gguf({"general.name": "model"})
    assert ours == read_hf({})
    assert ours == ModelSpec(
        name="model",
        architecture="llama",
        layers=5,
        dim=120,
        heads=6,
        kv_heads=3,
        head_dim=20,
        ffn_dim=53,
        vocab_size=97,
        context_length=256,
        norm_eps=1e-5,
        tied=True,
        windows=(None,) * 5,
        ropes=(RopeSpec(20, "default", 5000.0),) * 5,
        attention_scale=20**-0.5,
    )


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        ({"type": "linear", "factor": 2.0}, RopeSpec(20, "linear", 5e3, 2.0)),
        (
            {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            RopeSpec(20, "llama3", 5e3, 8.0, 256),
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 2.0},
            RopeSpec(20, "yarn", 5e3, 4.0, 64, attention_factor=2.0),
        ),
        (
            {"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5},
            RopeSpec(20, "yarn", 5e3, 4.0, 256, attention_factor=(0.1 * np.log(4) + 1) / (0.05 * np.log(4) + 1)),
        ),
    ],
)
def test_old_and_new_spellings_of_rope(old: dict[str, Any], expected: RopeSpec) -> None:
    new = {"rope_type": old.get("type"), "rope_theta": 5e3} | {key: old[key] for key in old if key != "type"}
    assert read_hf({"rope_scaling": old}).ropes == (expected,) * 5
    assert read_hf({"rope_theta": None, "rope_parameters": new}).ropes == (expected,) * 5


def test_mistral_window_absent_null_or_given() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert read_hf(mistral).windows == (4096,) * 5
    assert read_hf(mistral | {"sliding_window": None}).windows == (None,) * 5
    assert read_hf(mistral | {"sliding_window": 9}).windows == (9,) * 5


def test_kv_groups_of_mixed_windows() -> None:
    spec = dataclasses.replace(read_hf({}), windows=(4, 4, None, 4, None))
    assert spec.kv_groups == (KVGroup(4, (0, 1, 3)), KVGroup(None, (2, 4)))
    assert spec.kv_groups_of(range(2, 4)) == (KVGroup(None, (2,)), KVGroup(4, (3,)))
    assert spec.flops_per_token(100) - spec.flops_per_token(10) == 4 * 120 * 90 * 2


@pytest.mark.parametrize(
    ("changes", "field", "numbers"),
    [
        ({"num_attention_heads": 7, "num_key_value_heads": 7}, "num_attention_heads", ("7", "120")),
        ({"num_key_value_heads": 4}, "num_key_value_heads", ("4", "6")),
        ({"vocab_size": 98}, "vocab_size", ("98", "97")),
        ({"head_dim": 19}, "head_dim", ("19",)),
        ({"head_dim": 2048}, "head_dim", ("1024", "2048")),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers", ("1024", "1000000000")),
        ({"hidden_size": None}, "hidden_size", ("missing",)),
        ({"rope_parameters": 3}, "rope_parameters", ("3",)),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor", ("missing",)),
        ({"rope_scaling": {"type": "linear", "factor": 0.0}}, "rope_scaling.factor", ("1", "0.0")),
        (
            {"rope_scaling": {"type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 4}},
            "rope_scaling.low_freq_factor",
            ("4.0",),
        ),
        ({"architectures": []}, "architectures", ("[]",)),
    ],
)
def test_refusals_name_the_field_and_both_numbers(
    changes: dict[str, Any], field: str, numbers: tuple[str, ...]
) -> None:
    with pytest.raises(ModelFileError) as caught:
        read_hf(changes)
    assert caught.value.field == field
    for number in numbers:
        assert number in caught.value.problem


@pytest.mark.parametrize(
    ("changes", "listed"),
    [
        ({"architectures": ["RwkvForCausalLM"]}, "MistralForCausalLM"),
        ({"hidden_act": "mish"}, "silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_supported_is_listed_against_what_is(changes: dict[str, Any], listed: str) -> None:
    with pytest.raises(UnsupportedModelError, match=listed):
        read_hf(changes)


def test_gguf_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="llama"):
        read_gguf({"general.architecture": "rwkv"})
    with pytest.raises(ModelFileError, match=r"vocab_size: is 50, but the embedding has 97 rows"):
        read_gguf({"llama.vocab_size": 50})
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight: must be 10 positive numbers"):
        read_gguf({}, rope_freqs__weight=np.ones(9))
    with pytest.raises(ModelFileError, match=r"rope_freqs.weight"):
        read_gguf({}, rope_freqs__weight=np.zeros(10))
    with pytest.raises(UnsupportedModelError, match="longrope"):
        read_gguf({"llama.rope.scaling.type": "longrope"})
    with pytest.raises(ModelFileError, match="value_length"):
        read_gguf({"llama.attention.value_length": 16})


HOSTILE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.sampled_from(["type", "rope_type", "factor"]), st.text() | st.integers(), max_size=3),
)


@given(
    field=st.sampled_from([*HF_VALUES, "head_dim", "rope_scaling", "rope_parameters", "sliding_window"]), value=HOSTILE
)
def test_hostile_config_values_end_in_typed_errors(field: str, value: Any) -> None:
    for architecture in ("LlamaForCausalLM", "MistralForCausalLM"):
        try:
            spec = read_hf({"architectures": [architecture], field: value})
        except (ModelFileError, UnsupportedModelError):
            continue
        assert spec.ropes[0] and np.isfinite(rope_table(spec.ropes[0], spec.context_length).inv_freq).all()


@given(field=st.sampled_from([*GGUF_VALUES, "llama.rope.scaling.type", "llama.attention.key_length"]), value=HOSTILE)
def test_hostile_metadata_values_end_in_typed_errors(field: str, value: Any) -> None:
    try:
        spec = read_gguf({field: value})
    except (ModelFileError, UnsupportedModelError):
        return
    assert spec.ropes[0] and np.isfinite(rope_table(spec.ropes[0], spec.context_length).inv_freq).all()
