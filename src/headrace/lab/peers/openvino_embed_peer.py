"""OpenVINO with an encoder of a Hugging Face folder, whose embedding is the mean of the last layer's rows, of length 1.

Its precision is the one that it chooses: bfloat16 where the processor multiplies it, else float32. In 8 bits by NNCF it
is half as fast again, but its embeddings of all-MiniLM-L6-v2 are then 7e-3 off in cosine distance (with the weights
alone in 8 bits 1.4e-3). Texts go in padded batches of similar lengths, as many batches at a time as there are threads.

Its environment needs openvino, torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from loop import answer, rate_of_embedding  # type: ignore[import-not-found]

if TYPE_CHECKING:
    import numpy as np

BATCH = 32  # texts, as sentence-transformers has it; from 8 to 64 the speed differs little


def padded(ids: list[list[int]]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
    """Batches of `ids`, the longest first: which they are, and int64 [texts, length] of their ids and of their mask."""
    import numpy as np

    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    for start in range(0, len(ids), BATCH):
        chosen = order[start : start + BATCH]
        batch = np.zeros((len(chosen), len(ids[chosen[0]])), np.int64)
        mask = np.zeros_like(batch)
        for row, i in enumerate(chosen):
            batch[row, : len(ids[i])] = ids[i]
            mask[row, : len(ids[i])] = 1
        yield chosen, batch, mask


def converted(path: str) -> Any:
    """The encoder, its mean and its norm as one graph: ids and mask to embeddings."""
    import openvino  # type: ignore[import-not-found]
    import torch
    from transformers import AutoModel

    class Embedder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = AutoModel.from_pretrained(path, dtype=torch.float32).eval()

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            kept = mask.unsqueeze(-1).to(hidden.dtype)
            return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)

    ids = torch.ones((2, 5), dtype=torch.int64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    any_size = ([-1, -1], openvino.Type.i64)
    with torch.inference_mode():
        return openvino.convert_model(Embedder(), example_input=(ids, mask), input=[any_size, any_size])


def load(path: str, threads: int) -> Callable[[str], float]:
    import numpy as np
    import openvino  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": threads}
    model = openvino.compile_model(converted(path), "CPU", options)
    dim = model.output(0).partial_shape[1].get_length()
    queue = openvino.AsyncInferQueue(model, threads)

    def embed(texts: list[str]) -> np.ndarray:
        embeddings = np.empty((len(texts), dim), np.float32)

        def keep(request: Any, chosen: list[int]) -> None:
            embeddings[chosen] = request.get_output_tensor(0).data

        queue.set_callback(keep)
        for chosen, ids, mask in padded(tokenizer(texts)["input_ids"]):
            queue.start_async([ids, mask], chosen)
        queue.wait_all()
        return embeddings

    return rate_of_embedding(embed)


if __name__ == "__main__":
    answer(load)
