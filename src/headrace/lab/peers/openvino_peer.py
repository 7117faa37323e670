"""OpenVINO GenAI: its plain pipeline alone, its continuous batching for batches."""

from __future__ import annotations

from collections.abc import Callable

from loop import answer, rate_by_difference  # type: ignore[import-not-found]


def load(path: str, threads: int) -> Callable[[str], float]:
    import numpy as np
    import openvino  # type: ignore[import-not-found]
    import openvino_genai  # type: ignore[import-not-found]

    options = {"INFERENCE_NUM_THREADS": threads}
    plain = openvino_genai.LLMPipeline(path, "CPU", **options)
    schedule = openvino_genai.SchedulerConfig()
    schedule.cache_size, schedule.max_num_seqs, schedule.max_num_batched_tokens = 2, 256, 2048
    schedule.enable_prefix_caching = False
    batched = openvino_genai.LLMPipeline(path, "CPU", scheduler_config=schedule, **options)
    vocab = len(plain.get_tokenizer().get_vocab())

    def run(test: str) -> float:
        def generate(prompts: list[list[int]], new: int) -> None:
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = new, True, False
            ids = np.array(prompts, np.int64)
            inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
            (batched if len(prompts) > 1 else plain).generate(inputs, config)

        return rate_by_difference(generate, test, vocab)

    return run


if __name__ == "__main__":
    answer(load)
