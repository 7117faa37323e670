"""A tiny model file with random weights, and a tokenizer of single bytes: real in every way but its knowledge."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable stand-ins of GPT-2's byte-level BPE, by byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(spare)) for byte in range(256)]


def write_tiny(
    path: Path,
    kind: str = "F32",
    *,
    layers: int = 3,
    heads: int = 6,
    kv_heads: int = 3,
    head_dim: int = 32,
    ffn: int = 160,
    context: int = 512,
    window: int | None = None,
    seed: int = 0,
    specials: tuple[str, ...] = (),
) -> Path:
    """A llama GGUF of 259 tokens and more `specials`, its matrices stored as `kind`; quantised kinds need sizes that
    are multiples of 32."""
    rng = np.random.default_rng(seed)
    dim = heads * head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(context)
    writer.add_embedding_length(dim)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*SPECIALS, *byte_alphabet(), *specials]
    writer.add_vocab_size(len(tokens))
    if window is not None:
        writer.add_sliding_window(window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * 256 + [3] * len(specials))
    writer.add_token_merges([])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    quant = gguf.GGMLQuantizationType[kind]

    def matrix(name: str, rows: int, cols: int) -> None:
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(2 * cols**-0.5)
        data = values if kind == "F32" else gguf.quants.quantize(values, quant)
        writer.add_tensor(name, data, raw_dtype=quant)

    def vector(name: str) -> None:
        writer.add_tensor(name, 1 + 0.1 * rng.standard_normal(dim, dtype=np.float32))

    matrix("token_embd.weight", len(tokens), dim)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            vector(f"blk.{layer}.{norm}.weight")
        for name, rows, cols in (
            ("attn_q", dim, dim),
            ("attn_k", kv_heads * head_dim, dim),
            ("attn_v", kv_heads * head_dim, dim),
            ("attn_output", dim, dim),
            ("ffn_gate", ffn, dim),
            ("ffn_up", ffn, dim),
            ("ffn_down", dim, ffn),
        ):
            matrix(f"blk.{layer}.{name}.weight", rows, cols)
    vector("output_norm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file(progress=False)
    writer.close()
    return path
