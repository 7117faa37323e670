"""How fast texts of mixed lengths are embedded, beside other engines in the same run."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..llm import LLM
from ..results import machine_facts, summarize_tests
from .against import Peer

WORDS = (
    "a an and at bread by corn day each field flour for from grain grinds heavy in into is it light long mill morning "
    "never night of old on over rain river road runs sky slow small stone stream that the then through to turns under "
    "valley village water wheel when where which wind winter with wood"
)
SHORTEST, LONGEST = 3, 60  # words of a text


def mixed_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of 3 to 60 words, always the same ones."""
    rng, words = random.Random(seed), WORDS.split()
    return [" ".join(rng.choices(words, k=rng.randint(SHORTEST, LONGEST))) for _ in range(count)]


def measure_embedding(
    model: str,
    count: int,
    reps: int,
    advance: Callable[[int, int], None] = lambda done, total: None,
    peers: Sequence[Peer] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Embed `count` texts `reps` times after one to warm up, tokenizing included; each of `peers` does so after each
    run of ours. A dict of the results schema: a run is of "headrace" or of a peer by its name."""
    texts, runs = mixed_texts(count), []
    with LLM(model, **settings) as llm, tempfile.TemporaryDirectory() as folder:
        limit = llm.spec.context_length
        tokens = sum(min(limit, len(llm.tokenizer.encode(text))) for text in texts)
        test = Path(folder) / "texts.json"
        test.write_text(json.dumps(texts))
        for rep in range(-1, reps):
            started = time.perf_counter()
            llm.embed(texts)
            rates = {"headrace": tokens / (time.perf_counter() - started)}
            rates |= {peer.name: peer.run(str(test)).rate for peer in peers}
            if rep >= 0:
                runs += [
                    {"test": name, "latency_s": tokens / rate, "tokens_per_second": rate}
                    for name, rate in rates.items()
                ]
            advance(rep + 2, reps + 1)
    config = {"machine": machine_facts(), "model": model, "texts": count, "tokens": tokens, "settings": settings}
    return {"config": config, "runs": runs, "summary": summarize_tests(runs)}


def print_embedding(report: dict[str, Any]) -> None:
    """The report as a table: medians."""
    from rich.console import Console
    from rich.table import Table

    config = report["config"]
    title = f"{config['model']}: {config['texts']} texts, {config['tokens']:,} tokens"
    table = Table(title=title, title_justify="left")
    for name in ("engine", "seconds", "texts/s", "tokens/s", "of ours"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    rates: dict[str, list[float]] = {}
    for run in report["runs"]:
        rates.setdefault(run["test"], []).append(run["tokens_per_second"])
    ours = median(rates["headrace"])
    for name, found in rates.items():
        rate = median(found)
        seconds = config["tokens"] / rate
        table.add_row(name, f"{seconds:.3f}", f"{config['texts'] / seconds:,.0f}", f"{rate:,.0f}", f"{rate / ours:.2f}")
    Console().print(table)
