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

import numpy as np

from ..errors import HeadraceError
from ..llm import LLM
from ..results import machine_facts, summarize_tests
from .against import Peer

WORDS = (
    "a an and at bread by corn day each field flour for from grain grinds heavy in into is it light long mill morning "
    "never night of old on over rain river road runs sky slow small stone stream that the then through to turns under "
    "valley village water wheel when where which wind winter with wood"
)
SHORTEST, LONGEST = 3, 60  # words of a text
MOST_DISTANCE = 1e-3


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
    run of ours. A dict of the results schema: a run is of "headrace" or of a peer by its name, with the largest cosine
    distance of its embeddings from ours. Raises HeadraceError where that is more than MOST_DISTANCE."""
    texts, runs = mixed_texts(count), []
    with LLM(model, **settings) as llm, tempfile.TemporaryDirectory() as folder:
        limit = llm.spec.context_length
        tokens = sum(min(limit, len(llm.tokenizer.encode(text))) for text in texts)
        test = Path(folder) / "texts.json"
        test.write_text(json.dumps({"texts": texts, "tokens": tokens}))
        for rep in range(-1, reps):
            started = time.perf_counter()
            ours = llm.embed(texts)
            found = [_run("headrace", tokens, tokens / (time.perf_counter() - started))]
            for peer in peers:
                rate = peer.run(str(test)).rate
                found.append(_run(peer.name, tokens, rate) | {"cosine_distance": _agreement(peer.name, ours, test)})
            if rep >= 0:
                runs += found
            advance(rep + 2, reps + 1)
    config = {"machine": machine_facts(), "model": model, "texts": count, "tokens": tokens, "settings": settings}
    return {"config": config, "runs": runs, "summary": summarize_tests(runs)}


def _run(engine: str, tokens: int, rate: float) -> dict[str, Any]:
    return {"test": engine, "latency_s": tokens / rate, "tokens_per_second": rate}


def _agreement(engine: str, ours: np.ndarray, test: Path) -> float:
    """How far at most the embeddings that a peer has left beside `test` are from ours. HeadraceError if too far."""
    theirs = np.fromfile(test.with_suffix(".f32"), np.float32)
    if theirs.size != ours.size:
        raise HeadraceError(f"{engine} gave {theirs.size} numbers where ours are {ours.size}: it runs another model")
    distance = largest_distance(ours, theirs.reshape(ours.shape))
    if not distance <= MOST_DISTANCE:  # NaN too
        raise HeadraceError(
            f"an embedding of {engine} is {distance:.1e} from ours in cosine distance, more than {MOST_DISTANCE:.0e}: "
            "it computes something else, or with too little precision"
        )
    return distance


def largest_distance(a: np.ndarray, b: np.ndarray) -> float:
    """The largest cosine distance, 1 - cos, of a row of `a` from the same row of `b`; both are [rows, dim]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return float(np.max(1 - cosines))


def print_embedding(report: dict[str, Any]) -> None:
    """The report as a table: medians, and the largest distance of a peer's embeddings from ours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    config = report["config"]
    title = f"{config['model']}: {config['texts']} texts, {config['tokens']:,} tokens"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("engine", "seconds", "texts/s", "tokens/s", "of ours", "cosine distance"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    runs: dict[str, list[dict[str, Any]]] = {}
    for run in report["runs"]:
        runs.setdefault(run["test"], []).append(run)
    rates = {name: median(run["tokens_per_second"] for run in found) for name, found in runs.items()}
    for name, rate in rates.items():
        seconds = config["tokens"] / rate
        distance = max(run.get("cosine_distance", 0.0) for run in runs[name])
        cells = f"{seconds:.3f}", f"{config['texts'] / seconds:,.0f}", f"{rate:,.0f}", f"{rate / rates['headrace']:.2f}"
        table.add_row(name, *cells, "" if name == "headrace" else f"{distance:.1e}")
    Console().print(table)
