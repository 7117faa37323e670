"""Tiny random models of awkward sizes, saved by transformers; the same weights as GGUF, laid out as converters do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Sizes that divide nothing in particular: 120 = 6 heads of 20, 3 KV heads, 5 layers, 97 tokens.
SIZES: dict[str, Any] = {
    "hidden_size": 120,
    "intermediate_size": 53,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 97,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "pad_token_id": None,
}
ROPE_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e3, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0}
ROPE_YARN = {"rope_type": "yarn", "rope_theta": 5e3, "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.25}
CONFIGS: dict[str, dict[str, Any]] = {
    "tied": {"tie_word_embeddings": True},
    "untied": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "wide": {"hidden_size": 96, "head_dim": 22},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    "llama3": {"rope_parameters": ROPE_LLAMA3 | {"original_max_position_embeddings": 64}},
    "yarn": {"rope_parameters": ROPE_YARN | {"original_max_position_embeddings": 64}},
    "yarn-exact": {
        "rope_parameters": ROPE_YARN
        | {"original_max_position_embeddings": 64, "truncate": False, "attention_factor": 1.3}
    },
    "mistral": {"sliding_window": None},
    "window": {"sliding_window": 7, "head_dim": 18},
}


def save_model(name: str, folder: Path) -> Path:
    """Save the config called `name` with random weights, norms and biases included."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    classes = (
        (MistralConfig, MistralForCausalLM) if "sliding_window" in CONFIGS[name] else (LlamaConfig, LlamaForCausalLM)
    )
    torch.manual_seed(list(CONFIGS).index(name))
    model = classes[1](classes[0](**(SIZES | CONFIGS[name])))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def transformers_logits(folder: Path, tokens: list[int], **kwargs: Any) -> np.ndarray:
    """float32 logits [tokens, vocab] of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # its threads spin, and tests run side by side
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **kwargs)
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].numpy()


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(path: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """The model of a Hugging Face config and its tensors as a llama GGUF in float32."""
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    head_dim = config.get("head_dim") or dim // heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(dim)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    if config.get("sliding_window") is not None:
        writer.add_sliding_window(config["sliding_window"])
    _write_rope(writer, config["rope_parameters"], head_dim)
    for name, values in tensors.items():
        writer.add_tensor(*_to_gguf(name, values, config))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _to_gguf(name: str, values: np.ndarray, config: dict[str, Any]) -> tuple[str, np.ndarray]:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name], values
    _, _, layer, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    if part in ("self_attn.q_proj", "self_attn.k_proj"):
        heads = config["num_attention_heads" if part == "self_attn.q_proj" else "num_key_value_heads"]
        halves = values.reshape(heads, 2, -1, *values.shape[1:])  # rotated pairs are (i, i + head_dim / 2) ...
        values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)  # ... and become (2i, 2i + 1)
    return f"blk.{layer}.{_GGUF_PARTS[part]}.{kind}", values


def _write_rope(writer: gguf.GGUFWriter, rope: dict[str, Any], head_dim: int) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind == "llama3":
        wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2) / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelengths
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0, 1)
        writer.add_tensor("rope_freqs.weight", (1 / ((1 - kept) / rope["factor"] + kept)).astype(np.float32))
    elif kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_float32("llama.rope.scaling.yarn_beta_fast", rope["beta_fast"])
        writer.add_float32("llama.rope.scaling.yarn_beta_slow", rope["beta_slow"])
