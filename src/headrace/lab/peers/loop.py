"""What every peer's script does: load a model, then run one test for each line that comes in, and answer with its rate.

These scripts run under the peer's own Python, where Headrace is not installed: they import nothing of it.
"""

from __future__ import annotations

import json
import random
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

rng = random.Random(0)


def prompts(batch: int, length: int, vocab: int) -> list[list[int]]:
    """Random token ids, new ones every time."""
    return [[rng.randrange(100, vocab - 1) for _ in range(length)] for _ in range(batch)]


def sizes(test: str) -> tuple[int, int, int]:
    """Batch, prompt tokens and timed new tokens (0: the prompt is timed) of ppN, tgN[@D] and bB."""
    name, first, depth = re.fullmatch(r"(pp|tg|b)(\d+)(?:@(\d+))?", test).groups()  # type: ignore[union-attr]
    return {
        "pp": (1, int(first), 0),
        "tg": (1, int(depth or 8), int(first)),
        "b": (int(first), 64, 64),
    }[name]


def rate_by_difference(generate: Callable[[list[list[int]], int], None], test: str, vocab: int) -> float:
    """Tokens per second of a peer whose `generate(prompts, new)` does all; the time for 1 token stands for prefill."""
    batch, length, new = sizes(test)

    def seconds(tokens: int) -> float:
        given = prompts(batch, length, vocab)
        started = time.perf_counter()
        generate(given, tokens)
        return time.perf_counter() - started

    return length / seconds(1) if not new else batch * new / (seconds(new + 1) - seconds(1))


def rate_of_embedding(embed: Callable[[list[str]], Any]) -> Callable[[str], float]:
    """What runs tests of a peer whose `embed(texts)` gives an array of float32 [texts, dim].

    A test is the path of a JSON object of "texts" and of the "tokens" that they are. The embeddings are left beside it,
    as .f32, to be compared.
    """

    def run(test: str) -> float:
        path = Path(test)
        given = json.loads(path.read_text())
        started = time.perf_counter()
        embeddings = embed(given["texts"])
        seconds = time.perf_counter() - started
        path.with_suffix(".f32").write_bytes(embeddings.tobytes())
        return given["tokens"] / seconds

    return run


def answer(load: Callable[[str, int], Callable[[str], float]]) -> None:
    """`load(model, threads)` gives the function that runs a test. One JSON line says ready, then one for each test."""
    out = sys.stdout
    sys.stdout = sys.stderr  # what the peer prints must not come between the answers
    run = load(sys.argv[1], int(sys.argv[2]))
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps({"test": line.strip(), "tokens_per_second": run(line.strip())}), file=out, flush=True)
