"""Hugging Face Transformers, bfloat16, eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loop import answer, rate_by_difference  # type: ignore[import-not-found]


def load(path: str, threads: int) -> Callable[[str], float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    place = Path(path)
    source = (place.parent, {"gguf_file": place.name}) if place.is_file() else (place, {})
    model: Any = AutoModelForCausalLM.from_pretrained(source[0], dtype=torch.bfloat16, **source[1]).eval()

    def generate(prompts: list[list[int]], new: int) -> None:
        ids = torch.tensor(prompts)
        options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return lambda test: rate_by_difference(generate, test, model.config.vocab_size)


if __name__ == "__main__":
    answer(load)
