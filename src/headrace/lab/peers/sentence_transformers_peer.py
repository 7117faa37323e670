"""sentence-transformers, float32, in batches of its own making."""

from __future__ import annotations

from collections.abc import Callable

from loop import answer, rate_of_embedding  # type: ignore[import-not-found]


def load(path: str, threads: int) -> Callable[[str], float]:
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    model = SentenceTransformer(path, device="cpu")
    return rate_of_embedding(lambda texts: model.encode(texts, show_progress_bar=False))


if __name__ == "__main__":
    answer(load)
