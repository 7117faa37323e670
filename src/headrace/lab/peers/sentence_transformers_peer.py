"""sentence-transformers, float32, in batches of its own making. A test is the path of a JSON list of texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from loop import answer  # type: ignore[import-not-found]


def load(path: str, threads: int) -> Callable[[str], float]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(path, device="cpu")

    def rate(test: str) -> float:
        texts = json.loads(Path(test).read_text())
        limit = model.max_seq_length or 1 << 30
        tokens = sum(min(limit, len(ids)) for ids in model.tokenizer(texts)["input_ids"])
        started = time.perf_counter()
        model.encode(texts, show_progress_bar=False)
        return tokens / (time.perf_counter() - started)

    return rate


if __name__ == "__main__":
    answer(load)
