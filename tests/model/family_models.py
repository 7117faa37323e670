"""Tiny random models of every family, saved by transformers; the same weights as GGUF, laid out as converters do."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# Sizes that divide nothing in particular: 120 = 6 heads of 20, 3 KV heads, 5 layers, 97 tokens.
SIZES = {"hidden_size": 120, "num_hidden_layers": 5, "num_attention_heads": 6, "vocab_size": 97, "pad_token_id": None}
LLAMA = SIZES | {"num_key_value_heads": 3, "intermediate_size": 53, "max_position_embeddings": 256}
LLAMA |= {"rms_norm_eps": 1e-3}
STARCODER = {name: value for name, value in LLAMA.items() if name != "rms_norm_eps"} | {"norm_epsilon": 1e-3}
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3}
GEMMA = LLAMA | {"head_dim": 22, "sliding_window": 7, "query_pre_attn_scalar": 17, "pad_token_id": 0}
PHI = LLAMA | {"pad_token_id": 0, "hidden_size": 144, "num_attention_heads": 6}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 5e3,
    "partial_rotary_factor": 0.75,
    "short_factor": [1 + 0.1 * i for i in range(9)],
    "long_factor": [2 + 0.3 * i for i in range(9)],
}


@dataclass(frozen=True)
class FamilyModel:
    """One tiny model: transformers' classes begin with `stem`; `arch` is GGUF's name, None where it has none."""

    stem: str
    config: dict[str, Any]
    arch: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)  # GGUF keys that are not every family's
    head: str = "ForCausalLM"
    context: int | None = None  # that is served, where it makes a difference


ROPE_1M = {"rope_type": "default", "rope_theta": 1e6}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
LOCAL_GLOBAL = ("sliding_attention", "full_attention")
FAMILIES: dict[str, FamilyModel] = {
    "qwen2": FamilyModel("Qwen2", LLAMA | {"tie_word_embeddings": True}, "qwen2"),
    "qwen2-window": FamilyModel(
        "Qwen2", LLAMA | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
    ),
    "qwen3": FamilyModel("Qwen3", LLAMA | {"head_dim": 22, "rope_parameters": ROPE_1M}, "qwen3"),
    "gemma2": FamilyModel(
        "Gemma2",
        GEMMA | {"query_pre_attn_scalar": 22, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        "gemma2",
        {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": FamilyModel(
        "Gemma3",
        GEMMA | {"num_hidden_layers": 7, "query_pre_attn_scalar": 22, "rope_parameters": GEMMA3_ROPE},
        "gemma3",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base": 1e6},
    ),
    "gemma3-types": FamilyModel("Gemma3", GEMMA | {"layer_types": [*LOCAL_GLOBAL, *LOCAL_GLOBAL, "full_attention"]}),
    "phi3": FamilyModel("Phi3", PHI | {"sliding_window": 11}, "phi3", {"attention.sliding_window": 11}),
    "phi3-short": FamilyModel(
        "Phi3", PHI | {"rope_parameters": LONG, "original_max_position_embeddings": 64}, "phi3", context=64
    ),
    "phi3-long": FamilyModel("Phi3", PHI | {"rope_parameters": LONG, "original_max_position_embeddings": 32}, "phi3"),
    "gpt2": FamilyModel(
        "GPT2",
        {"n_embd": 120, "n_layer": 5, "n_head": 6, "vocab_size": 97, "n_positions": 77, "n_inner": 53},
        "gpt2",
        head="LMHeadModel",
    ),
    "opt": FamilyModel("OPT", SIZES | {"ffn_dim": 53, "max_position_embeddings": 77, "word_embed_proj_dim": 120}),
    "bloom": FamilyModel(
        "Bloom", {"hidden_size": 120, "n_layer": 5, "n_head": 6, "vocab_size": 97, "seq_length": 256}, "bloom"
    ),
    "falcon": FamilyModel("Falcon", SIZES | {"ffn_hidden_size": 53}, "falcon"),
    "falcon-new": FamilyModel(
        "Falcon",
        SIZES | {"ffn_hidden_size": 53, "new_decoder_architecture": True, "num_kv_heads": 3, "bias": True},
        "falcon",
    ),
    "starcoder2": FamilyModel("Starcoder2", STARCODER, "starcoder2"),
    "olmo2": FamilyModel("Olmo2", LLAMA, "olmo2"),
    "smollm3": FamilyModel("SmolLM3", LLAMA | {"pad_token_id": 0}, "smollm3"),
    "granite": FamilyModel(
        "Granite",
        LLAMA
        | {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.7, "logits_scaling": 5.0},
        "granite",
        {"attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 5.0},
    ),
    "mixtral": FamilyModel(
        "Mixtral", LLAMA | {"num_local_experts": 7, "num_experts_per_tok": 3, "rope_parameters": ROPE_1M}, "llama"
    ),
    "qwen3moe": FamilyModel(
        "Qwen3Moe", LLAMA | EXPERTS | {"head_dim": 22, "moe_intermediate_size": 31, "norm_topk_prob": True}, "qwen3moe"
    ),
    "olmoe": FamilyModel("Olmoe", LLAMA | EXPERTS | {"num_key_value_heads": 6}, "olmoe"),
    "gemma3-one": FamilyModel("Gemma3", GEMMA | {"num_key_value_heads": 1, "rope_parameters": GEMMA3_ROPE}),
}


def save_family(name: str, folder: Path, tokens: list[int]) -> np.ndarray:
    """Save the model called `name` with random weights; transformers' float32 logits [tokens, vocab] of it."""
    import torch
    import transformers

    family = FAMILIES[name]
    stem = family.stem
    config = getattr(transformers, f"{stem}TextConfig" if stem == "Gemma3" else f"{stem}Config")(**family.config)
    config._attn_implementation = config._experts_implementation = "eager"
    torch.manual_seed(list(FAMILIES).index(name))
    torch.set_num_threads(1)  # its threads spin, and tests run side by side
    model = getattr(transformers, f"{stem}{family.head}")(config)
    for parameter_name, parameter in model.named_parameters():
        _randomise(parameter_name, parameter, stem)
    model.save_pretrained(folder)
    with torch.inference_mode():
        return model.eval()(torch.tensor([tokens])).logits[0].float().numpy()


def _randomise(name: str, parameter: Any, stem: str) -> None:
    import torch

    with torch.no_grad():
        if "norm" in name or "ln_" in name:
            low = -0.5 if stem.startswith("Gemma") or name.endswith("bias") else 0.5
            parameter.uniform_(low, low + 1.0)
        elif parameter.ndim == 1:
            parameter.normal_(0, 0.3)
        elif stem == "GPT2" and "wte" not in name and "wpe" not in name:
            parameter.normal_(0, 1.5 * parameter.shape[0] ** -0.5)
        else:
            parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)


def write_family_gguf(name: str, config: dict[str, Any], tensors: dict[str, np.ndarray], path: Path) -> Path:
    """The saved model as GGUF in float32: names by the `gguf` package's own table."""
    family = FAMILIES[name]
    assert family.arch is not None
    writer = gguf.GGUFWriter(path, family.arch)
    sizes = _sizes(config)
    _write_metadata(writer, family, config, sizes)
    arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == family.arch)
    names = gguf.get_tensor_name_map(arch, sizes["layers"])
    for hf_name, values in _stacked(tensors).items():
        if hf_name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        # BLOOM's own checkpoints have no prefix, and the table knows no other names of it.
        new = names.get_name(
            hf_name.removeprefix("transformer.") if family.stem == "Bloom" else hf_name,
            try_suffixes=(".weight", ".bias"),
        )
        assert new is not None, hf_name
        writer.add_tensor(new, np.ascontiguousarray(_converted(hf_name, values, family, sizes)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    heads, dim = first("num_attention_heads", "n_head"), first("hidden_size", "n_embd")
    kv_heads = first("num_key_value_heads") or heads
    if config["model_type"] == "falcon":
        kv_heads = config["num_kv_heads"] if config["new_decoder_architecture"] else 1
    return {
        "layers": first("num_hidden_layers", "n_layer"),
        "dim": dim,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": first("head_dim") or dim // heads,
        "ffn": first("intermediate_size", "n_inner", "ffn_hidden_size") or 4 * dim,
        "context": first("max_position_embeddings", "n_positions") or 256,
        "eps": first("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon"),
    }


def _write_metadata(
    writer: gguf.GGUFWriter, family: FamilyModel, config: dict[str, Any], sizes: dict[str, Any]
) -> None:
    writer.add_block_count(sizes["layers"])
    writer.add_context_length(sizes["context"])
    writer.add_embedding_length(sizes["dim"])
    writer.add_feed_forward_length(sizes["ffn"])
    writer.add_head_count(sizes["heads"])
    writer.add_head_count_kv(sizes["kv_heads"])
    layer_norm = "rms_norm_eps" not in config
    (writer.add_layer_norm_eps if layer_norm else writer.add_layer_norm_rms_eps)(sizes["eps"])
    if config.get("head_dim"):
        writer.add_key_length(sizes["head_dim"])
        writer.add_value_length(sizes["head_dim"])
    if family.arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config["sliding_window"])
    if "num_experts_per_tok" in config:
        writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        writer.add_rope_freq_base(rope["rope_theta"])
        writer.add_rope_dimension_count(int(sizes["head_dim"] * rope.get("partial_rotary_factor", 1)))
    if rope.get("rope_type") == "longrope":
        original = config["original_max_position_embeddings"]
        factor = sizes["context"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        for kind in ("short", "long"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32))
    for key, value in family.metadata.items():
        key = f"{family.arch}.{key}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_float32(key, value)


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors, with those of a layer's experts as one: [experts, out, in]."""
    out: dict[str, Any] = {}
    for name, values in sorted(
        tensors.items(), key=lambda item: [int(x) if x.isdigit() else x for x in item[0].split(".")]
    ):
        before, found, rest = name.partition(".experts.")
        if found:
            out.setdefault(f"{before}.experts.{rest.split('.', 1)[1]}", []).append(values)
        else:
            out[name] = values
    return {name: np.stack(values) if isinstance(values, list) else values for name, values in out.items()}


def _converted(name: str, values: np.ndarray, family: FamilyModel, sizes: dict[str, Any]) -> np.ndarray:
    head_dim, heads, kv_heads = sizes["head_dim"], sizes["heads"], sizes["kv_heads"]
    if family.stem == "GPT2" and values.ndim == 2 and ".h." in name:
        return values.T
    if family.arch in ("llama", "smollm3", "granite") and ("q_proj" in name or "k_proj" in name):
        own = heads if "q_proj" in name else kv_heads  # rotated pairs (i, i + head_dim / 2) become (2i, 2i + 1)
        return values.reshape(own, 2, head_dim // 2, -1).swapaxes(1, 2).reshape(values.shape)
    if family.arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return values + 1
    if family.arch in ("bloom", "falcon") and "query_key_value" in name:
        groups = values.reshape(kv_heads, heads // kv_heads + 2, head_dim, -1)
        parts = (groups[:, :-2], groups[:, -2], groups[:, -1])
        return np.concatenate([part.reshape(-1, *values.shape[1:]) for part in parts])
    return values
