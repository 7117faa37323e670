"""vLLM's CPU build, bfloat16. It reads Hugging Face folders."""

from __future__ import annotations

import os
from collections.abc import Callable

from loop import answer, rate_by_difference  # type: ignore[import-not-found]


def load(path: str, threads: int) -> Callable[[str], float]:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(path, dtype="bfloat16", max_model_len=4096, max_num_seqs=256, enable_prefix_caching=False)

    def generate(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)

    vocab = llm.llm_engine.model_config.get_vocab_size()
    return lambda test: rate_by_difference(generate, test, vocab)


if __name__ == "__main__":
    answer(load)
