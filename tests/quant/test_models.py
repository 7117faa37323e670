"""Whole quantised models: the logits and greedy tokens of transformers with the dequantised weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.model.harness import Model, NativeModel, relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402

from headrace import LLM, SamplingParams  # noqa: E402
from headrace.errors import ModelFileError  # noqa: E402
from headrace.formats.safetensors import open_checkpoint  # noqa: E402
from headrace.kernels import native  # noqa: E402
from headrace.kernels.native import NativeOps  # noqa: E402
from headrace.quant.read import read_quantised  # noqa: E402

from . import layouts as q  # noqa: E402

Parts = dict[str, Any]
METHODS: dict[str, tuple[Callable[[Any], Parts], Callable[[Parts], Any], dict[str, Any]]] = {
    "gptq": (lambda w: q.gptq(w, symmetric=False), lambda p: q.dequantise_gptq(p, 4, False), q.GPTQ | {"sym": False}),
    "awq": (q.awq, lambda p: q.dequantise_awq(p, 32), q.AWQ),
    "packed": (q.packed_integers, lambda p: q.dequantise_packed(p, 4), q.compressed("pack-quantized")),
    "int8": (q.int8, q.dequantise_scaled, q.compressed("int-quantized", num_bits=8, strategy="channel")),
    "fp8": (q.fp8, q.dequantise_scaled, q.FP8),
}
TOKENS = [5, 96, 3, 3, 41, 0, 17, 88, 2, 60, 61, 7, 11, 90, 33, 32, 31, 30, 29, 28]


def quantise(model: Any, folder: Path, method: str) -> Any:
    """Write the folder with every linear of the layers quantised, and give the model those weights, dequantised."""
    make, dequantise, config = METHODS[method]
    state = model.state_dict()
    tensors = dict(state)
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    for name in [name for name in state if name.endswith("_proj.weight")]:
        parts = make(tensors.pop(name))
        tensors |= {name.removesuffix("weight") + part: value for part, value in parts.items()}
        state[name] = dequantise(parts)
    q.write_folder(folder, model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tensors, config)
    model.load_state_dict(state)
    return model


def tiny_llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=3,
        vocab_size=97,
        max_position_embeddings=256,
        pad_token_id=None,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    return model


@pytest.mark.filterwarnings("ignore:.*weights are held as F32")
@pytest.mark.parametrize("method", METHODS)
def test_tiny_models_equal_the_dequantised_weights(tmp_path: Path, method: str) -> None:
    original = tiny_llama()
    with torch.inference_mode():
        unquantised = original(torch.tensor([TOKENS])).logits[0].numpy()
        dequantised = quantise(original, tmp_path, method)
        theirs = dequantised(torch.tensor([TOKENS])).logits[0].numpy()
    source = read_quantised(open_checkpoint(tmp_path))
    ours = Model(source).logits(TOKENS)
    assert relative_error(ours, theirs) < 1e-4 < relative_error(unquantised, theirs)
    if native.missing() is None:
        fast = NativeModel(source, NativeOps(threads=1)).logits(TOKENS)
        error = float(np.abs(fast - theirs).max())
        # Activations in 8 bits, of a model whose weights are noise: no quieter part of it makes up for them.
        assert float(np.linalg.norm(fast - theirs) / np.linalg.norm(theirs)) < 0.04
        best = np.sort(theirs, axis=1)
        clear = best[:, -1] - best[:, -2] > 2 * error
        assert clear.any() and (fast.argmax(1) == theirs.argmax(1))[clear].all()


def test_biases_of_zeros_are_left_out_where_the_model_has_none(tmp_path: Path) -> None:
    """Some tools give one to every layer that they quantise."""
    quantise(tiny_llama(), tmp_path, "awq")
    source = read_quantised(open_checkpoint(tmp_path))
    plain = Model(source).logits(TOKENS)
    for value in (0.0, 1.0):
        raw = safetensors.torch.load_file(tmp_path / "model.safetensors")
        raw["model.layers.1.mlp.up_proj.bias"] = torch.full((160,), value, dtype=torch.float16)
        safetensors.torch.save_file(raw, tmp_path / "model.safetensors")
        source = read_quantised(open_checkpoint(tmp_path))
        if value:
            with pytest.raises(ModelFileError, match=r"up_proj\.bias: is no tensor of this architecture"):
                Model(source)
        else:
            assert source.spare == {"model.layers.1.mlp.up_proj.bias"}
            assert np.array_equal(Model(source).logits(TOKENS), plain)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq", "packed", "int8"])
def test_smollm2_says_the_same(tmp_path: Path, smollm2: Path, method: str) -> None:
    """The real model, quantised by hand in the tools' documented layouts: the greedy tokens of transformers."""
    load = {"gguf_file": smollm2.name, "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2.parent, **load).eval()
    transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name).save_pretrained(tmp_path)
    quantise(model, tmp_path, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no weight becomes float32
        llm = LLM(str(tmp_path), kernels="reference", max_sequences=1)
    with llm:
        prompt = llm.tokenizer.encode("The capital of France is")
        output = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))[0].token_ids
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    best = logits.topk(2).values
    wrong = [i for i, token in enumerate(output) if token != int(logits[i].argmax())]
    assert all(float(best[i, 0] - best[i, 1]) < 1e-3 for i in wrong) and len(wrong) < 2
