"""The families: for each name that a file gives its architecture, who reads its spec and where its weights lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ...errors import UnsupportedModelError
from ...formats.gguf import GGUFFile
from ...formats.safetensors import Checkpoint
from ..fields import Fields
from ..layout import Layout
from ..spec import ModelSpec
from .bloom import bloom_layout, read_bloom, read_bloom_gguf
from .falcon import falcon_gguf_layout, falcon_layout, read_falcon, read_falcon_gguf
from .gemma import (
    gemma3_with_vision_layout,
    gemma_layout,
    read_gemma2,
    read_gemma2_gguf,
    read_gemma3,
    read_gemma3_gguf,
    read_gemma3_with_vision,
)
from .gguf import gguf_layout, gguf_layout_of_pairs, read_gguf
from .gpt2 import gpt2_layout, read_gpt2, read_gpt2_gguf
from .granite import read_granite, read_granite_gguf
from .hf import hf_layout
from .llama import mixtral_layout, read_llama, read_mistral, read_mixtral
from .olmo import olmo2_layout, read_olmo2, read_olmo2_gguf, read_olmoe, read_olmoe_gguf
from .opt import opt_layout, read_opt
from .phi import phi3_gguf_layout, phi3_layout, read_phi3, read_phi3_gguf
from .qwen import read_qwen2, read_qwen3, read_qwen3_gguf, read_qwen3_moe
from .smollm3 import read_smollm3, read_smollm3_gguf
from .starcoder2 import read_starcoder2, read_starcoder2_gguf, starcoder2_layout


class Family(NamedTuple):
    """Both take the opened file or folder; the layout takes the spec as well."""

    read: Callable[[Any], ModelSpec]
    layout: Callable[[Any, ModelSpec], Layout]


GGUF = {
    "llama": Family(read_gguf, gguf_layout_of_pairs),
    "qwen2": Family(read_gguf, gguf_layout),
    "qwen3": Family(read_qwen3_gguf, gguf_layout),
    "qwen3moe": Family(read_qwen3_gguf, gguf_layout),
    "gemma2": Family(read_gemma2_gguf, gguf_layout),
    "gemma3": Family(read_gemma3_gguf, gguf_layout),
    "phi3": Family(read_phi3_gguf, phi3_gguf_layout),
    "gpt2": Family(read_gpt2_gguf, gguf_layout),
    "bloom": Family(read_bloom_gguf, gguf_layout),
    "falcon": Family(read_falcon_gguf, falcon_gguf_layout),
    "starcoder2": Family(read_starcoder2_gguf, gguf_layout),
    "olmo2": Family(read_olmo2_gguf, gguf_layout),
    "olmoe": Family(read_olmoe_gguf, gguf_layout),
    "smollm3": Family(read_smollm3_gguf, gguf_layout_of_pairs),
    "granite": Family(read_granite_gguf, gguf_layout_of_pairs),
}
HUGGING_FACE = {
    "LlamaForCausalLM": Family(read_llama, hf_layout),
    "MistralForCausalLM": Family(read_mistral, hf_layout),
    "MixtralForCausalLM": Family(read_mixtral, mixtral_layout),
    "Qwen2ForCausalLM": Family(read_qwen2, hf_layout),
    "Qwen3ForCausalLM": Family(read_qwen3, hf_layout),
    "Qwen3MoeForCausalLM": Family(read_qwen3_moe, hf_layout),
    "Gemma2ForCausalLM": Family(read_gemma2, gemma_layout),
    "Gemma3ForCausalLM": Family(read_gemma3, gemma_layout),
    "Gemma3ForConditionalGeneration": Family(read_gemma3_with_vision, gemma3_with_vision_layout),
    "Phi3ForCausalLM": Family(read_phi3, phi3_layout),
    "GPT2LMHeadModel": Family(read_gpt2, gpt2_layout),
    "OPTForCausalLM": Family(read_opt, opt_layout),
    "BloomForCausalLM": Family(read_bloom, bloom_layout),
    "FalconForCausalLM": Family(read_falcon, falcon_layout),
    "Starcoder2ForCausalLM": Family(read_starcoder2, starcoder2_layout),
    "Olmo2ForCausalLM": Family(read_olmo2, olmo2_layout),
    "OlmoeForCausalLM": Family(read_olmoe, hf_layout),
    "SmolLM3ForCausalLM": Family(read_smollm3, hf_layout),
    "GraniteForCausalLM": Family(read_granite, hf_layout),
}


def read_spec(source: GGUFFile | Checkpoint) -> ModelSpec:
    """The spec of an opened model.

    Raises ModelFileError for a field that is missing or cannot be, UnsupportedModelError for an architecture,
    activation or rope that is not supported.
    """
    return family_of(source).read(source)


def family_of(source: GGUFFile | Checkpoint) -> Family:
    """The family of an opened model. Raises as `read_spec` does."""
    if isinstance(source, GGUFFile):
        families, name = GGUF, Fields(source.path, source.metadata).text("general.architecture")
    else:
        families, name = HUGGING_FACE, _architecture(Fields(source.path, source.config))
    if name not in families:
        known = ", ".join(families)
        raise UnsupportedModelError(
            f"{source.path}: architecture {name!r:.80} is not supported; in this kind of file: {known}"
        )
    return families[name]


def _architecture(fields: Fields) -> str:
    names = fields.values.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise fields.error("architectures", f"must be a list of one name, got {names!r:.80}")
    return names[0]
