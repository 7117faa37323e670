"""When requests come and how long they are: Poisson arrivals, bursts, or the replay of a trace."""

from __future__ import annotations

import csv
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec

from ..errors import ConfigError

MAX_REQUESTS = 1_000_000
MAX_TOKENS = 1 << 20  # of a prompt, or of an answer
MAX_LINE = 1 << 20  # bytes of a trace
BLOCK = 512  # prompt tokens that one of a trace's hash_ids stands for

# Columns by the names that public traces give them, in lower case and without spaces.
_COLUMNS = {
    "at": ("timestamp",),
    "prompt": ("contexttokens", "input_length", "requesttokens", "prompt_tokens"),
    "new": ("generatedtokens", "output_length", "responsetokens", "completion_tokens"),
}


@dataclass(frozen=True, slots=True)
class Shot:
    """A request to come: `at` seconds after the start, with `prompt` tokens, `new` of them generated.

    `blocks` names what the prompt consists of, BLOCK tokens each: equal numbers are equal tokens.
    """

    at: float
    prompt: int
    new: int
    blocks: tuple[int, ...] = ()


def arrivals(rate: float, burst: int, seed: int) -> Iterator[float]:
    """Seconds after the start, for ever: groups of `burst` requests at the times of a Poisson process, `rate` requests
    a second on average."""
    rng = random.Random(seed)
    at = 0.0
    while True:
        yield from (at for _ in range(burst))
        at += rng.expovariate(rate / burst)


def read_trace(path: str | Path, limit: int, speed: float, most_prompt: int | None, most_new: int | None) -> list[Shot]:
    """The first `limit` requests of a trace, `speed` times as fast, none longer than given.

    CSV with a header (TIMESTAMP,ContextTokens,GeneratedTokens: time as a date or in seconds) or JSON lines (timestamp
    in milliseconds, input_length, output_length, hash_ids). ConfigError where it is neither.
    """
    rows = _json_rows if Path(path).suffix in (".jsonl", ".json") else _csv_rows
    shots: list[Shot] = []
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in islice(rows(file), limit):
                shots.append(_shot(row))
    except OSError as error:
        raise ConfigError(f"the trace {path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: request {len(shots) + 1} is not readable: {error!r:.300}") from None
    if not shots:
        raise ConfigError(f"{path} holds no requests")
    shots.sort(key=lambda shot: shot.at)
    first = shots[0].at
    return [
        Shot(
            (shot.at - first) / speed,
            min(shot.prompt, most_prompt or shot.prompt),
            min(shot.new, most_new or shot.new),
            shot.blocks,
        )
        for shot in shots
    ]


def _lines(file: Any) -> Iterator[str]:
    while line := file.readline(MAX_LINE + 1):
        if len(line) > MAX_LINE:
            raise ConfigError(f"a line of the trace is longer than {MAX_LINE} characters")
        if line.strip():
            yield line


def _csv_rows(file: Any) -> Iterator[dict[str, Any]]:
    rows = csv.reader(_lines(file))
    header = [name.strip().lower().replace(" ", "").lstrip("\ufeff") for name in next(rows, [])]
    where = {field: next((header.index(n) for n in names if n in header), -1) for field, names in _COLUMNS.items()}
    for field, column in where.items():
        if column < 0:
            raise ConfigError(f"the trace has no column {' or '.join(_COLUMNS[field])}, only {header}")
    for row in rows:
        if len(row) < len(header):
            raise ValueError(f"{len(row)} columns where the header has {len(header)}")
        yield {"at": _seconds(row[where["at"]]), "prompt": row[where["prompt"]], "new": row[where["new"]]}


def _json_rows(file: Any) -> Iterator[dict[str, Any]]:
    decoder = msgspec.json.Decoder(dict[str, Any])
    for line in _lines(file):
        row = decoder.decode(line)
        yield {
            "at": row["timestamp"] / 1000,
            "prompt": row["input_length"],
            "new": row["output_length"],
            "blocks": row.get("hash_ids", ()),
        }


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return datetime.fromisoformat(text.strip()).timestamp()


def _shot(row: dict[str, Any]) -> Shot:
    at, prompt, new = float(row["at"]), int(row["prompt"]), int(row["new"])
    if not math.isfinite(at):
        raise ValueError(f"its time is {at}")
    for name, value in (("prompt", prompt), ("generated", new)):
        if not 0 <= value <= MAX_TOKENS:
            raise ValueError(f"{value} {name} tokens; it must be from 0 to {MAX_TOKENS}")
    return Shot(at, max(1, prompt), max(1, new), tuple(int(block) for block in row.get("blocks", ())))


def prompt_ids(shot: Shot, number: int, seed: int, vocab: int) -> list[int]:
    """Token ids of request `number`: at random, the same for the same seed; those of a block for the same block."""
    ids: list[int] = []
    for block in shot.blocks:
        if len(ids) >= shot.prompt:
            break
        rng = random.Random(f"{seed}/block/{block}")
        ids += rng.choices(range(vocab), k=min(BLOCK, shot.prompt - len(ids)))
    rest = random.Random(f"{seed}/{number}")
    return ids + rest.choices(range(vocab), k=shot.prompt - len(ids))
