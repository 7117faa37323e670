"""llama.cpp, through llama-cpp-python's C bindings: sampling and detokenising are left out, which favours it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

from loop import answer, prompts, sizes  # type: ignore[import-not-found]


def load(path: str, threads: int) -> Callable[[str], float]:
    import llama_cpp as api  # type: ignore[import-not-found]

    quiet = api.llama_log_callback(lambda *_: None)
    api.llama_log_set(quiet, ctypes.c_void_p())
    api.llama_backend_init()
    settings = api.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = api.llama_model_load_from_file(path.encode(), settings)
    vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def context(tokens: int, sequences: int) -> ctypes.c_void_p:
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = tokens, 2048, 512, sequences
        settings.n_threads = settings.n_threads_batch = threads
        return api.llama_init_from_model(model, settings)

    def decode(state: ctypes.c_void_p, rows: list[tuple[int, int, int, bool]]) -> float:
        """Seconds for rows of (token, position, sequence, wants logits)."""
        batch = api.llama_batch_init(len(rows), 0, 1)
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, logits
            batch.seq_id[i][0] = sequence
        started = time.perf_counter()
        api.llama_decode(state, batch)
        api.llama_synchronize(state)
        seconds = time.perf_counter() - started
        api.llama_batch_free(batch)
        return seconds

    def run(test: str, _log: object = quiet) -> float:  # held here, for the library keeps only a pointer to it
        batch, length, new = sizes(test)
        state = context(max(512, batch * (length + new + 16)), batch)
        given = prompts(batch, length, vocab)
        seconds = sum(
            decode(state, [(token, i, s, i == length - 1) for i, token in enumerate(ids)])
            for s, ids in enumerate(given)
        )
        if new:
            chosen = prompts(batch, new, vocab)
            seconds = sum(
                decode(state, [(chosen[s][i], length + i, s, True) for s in range(batch)]) for i in range(new)
            )
        api.llama_free(state)
        return batch * (new or length) / seconds

    return run


if __name__ == "__main__":
    answer(load)
