"""Tiny random encoders of awkward sizes, saved by transformers; BERT's weights as GGUF, laid out as converters do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# 120 = 6 heads of 20, 5 layers, 97 tokens.
BERT: dict[str, Any] = {
    "hidden_size": 120,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "intermediate_size": 53,
    "vocab_size": 97,
    "max_position_embeddings": 77,
    "layer_norm_eps": 1e-3,
    "type_vocab_size": 3,
}
DISTILBERT: dict[str, Any] = {
    "dim": 120,
    "n_layers": 5,
    "n_heads": 6,
    "hidden_dim": 53,
    "vocab_size": 97,
    "max_position_embeddings": 77,
}
FIVE = {"num_labels": 5}


@dataclass(frozen=True)
class EncoderModel:
    stem: str
    head: str
    config: dict[str, Any]


ENCODERS = {
    "bert": EncoderModel("Bert", "Model", BERT),
    "bert-relu": EncoderModel("Bert", "Model", BERT | {"hidden_act": "relu", "type_vocab_size": 1}),
    "bert-masked": EncoderModel("Bert", "ForMaskedLM", BERT),
    "bert-untied": EncoderModel("Bert", "ForMaskedLM", BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "bert-classify": EncoderModel("Bert", "ForSequenceClassification", BERT | FIVE),
    "distilbert": EncoderModel("DistilBert", "Model", DISTILBERT),
    "distilbert-masked": EncoderModel("DistilBert", "ForMaskedLM", DISTILBERT),
    "distilbert-classify": EncoderModel("DistilBert", "ForSequenceClassification", DISTILBERT | FIVE),
    "roberta": EncoderModel("Roberta", "Model", BERT),
    "roberta-masked": EncoderModel("Roberta", "ForMaskedLM", BERT),
    "roberta-classify": EncoderModel("Roberta", "ForSequenceClassification", BERT | FIVE),
}


def save_encoder(name: str, folder: Path, texts: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Save the encoder with random weights; transformers' hidden states and logits of each text, run alone."""
    import torch
    import transformers

    torch.set_num_threads(1)  # its threads spin, and tests run side by side
    model = ENCODERS[name]
    torch.manual_seed(list(ENCODERS).index(name))
    config = getattr(transformers, f"{model.stem}Config")(**model.config)
    net = getattr(transformers, f"{model.stem}{model.head}")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in net.named_parameters():
            if "norm" in parameter_name.lower() and parameter_name.endswith("weight"):
                parameter.uniform_(0.5, 1.5)
            elif parameter.ndim == 1:
                parameter.normal_(0, 0.3)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    net.save_pretrained(folder)
    found = []
    with torch.inference_mode():
        for text in texts:
            out = net(torch.tensor([text]), output_hidden_states=True)
            logits = out.logits[0].numpy() if "logits" in out else None
            found.append((out.hidden_states[-1][0].numpy(), logits))
    return found


_GGUF_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.position_embeddings": "position_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def write_bert_gguf(config: dict[str, Any], tensors: dict[str, np.ndarray], path: Path, pooling: int) -> Path:
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_uint32("bert.pooling_type", pooling)
    for name, values in tensors.items():
        if name.startswith("pooler."):
            continue
        part, kind = name.rsplit(".", 1)
        prefix = ""
        if part.startswith("encoder.layer."):
            _, _, layer, part = part.split(".", 3)
            prefix = f"blk.{layer}."
        writer.add_tensor(f"{prefix}{_GGUF_NAMES[part]}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
