"""What a load tells, by these formulas (every percentile is linear between neighbours, over completed requests):

TTFT       first token's arrival - sent                     (sent: the request was handed to the socket)
ITL        a token's arrival - that of the one before it    (all gaps of all requests in one list)
TPOT       (last token's arrival - first's) / (tokens - 1)  (one value a request)
E2E        the answer's end - sent
scheduled  TTFT and E2E counted from when the request was to be sent: what a user waited, the generator's own
           delays and the wait for a free place included
goodput    requests / s that were completed with TTFT (scheduled) and the longest ITL within the SLO
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import RequestError
from ..results import machine_facts, summarize, write_results
from .load import Load, Progress, Record

if TYPE_CHECKING:
    from rich.text import Text

TIMES = ("ttft_s", "ttft_scheduled_s", "tpot_s", "latency_s", "latency_scheduled_s")
BUSY = 0.5  # of a core: a generator that uses more may measure itself
LAG_SECONDS = 0.01  # so late the generator may be


def row_of(load: Load, record: Record) -> dict[str, Any]:
    """A request as a row of the results schema; times in seconds, `scheduled_s` and `sent_s` after the start."""
    answer, scheduled = record.answer, load.began + record.scheduled
    row: dict[str, Any] = {
        "test": load.options.name,
        "outcome": answer.outcome,
        "status": answer.status,
        "scheduled_s": record.scheduled,
        "sent_s": answer.sent - load.began,
    }
    if answer.outcome != "ok":
        return row | {"error": answer.error or "the answer held no token"}
    first, last, gaps = answer.arrivals[0], answer.arrivals[-1], gaps_of(record)
    row |= {
        "prompt_tokens": answer.prompt_tokens or record.shot.prompt,
        "tokens": answer.tokens,
        "ttft_s": first - answer.sent,
        "ttft_scheduled_s": first - scheduled,
        "latency_s": answer.ended - answer.sent,
        "latency_scheduled_s": answer.ended - scheduled,
        "tokens_per_second": answer.tokens / (answer.ended - answer.sent),
    }
    if answer.tokens > 1:
        row |= {"tpot_s": (last - first) / (answer.tokens - 1)}
    if gaps:
        row |= {"longest_itl_s": max(gaps)}
    options = load.options
    if options.slo_ttft is not None or options.slo_itl is not None:
        in_time = options.slo_ttft is None or row["ttft_scheduled_s"] <= options.slo_ttft
        row["slo_met"] = in_time and (options.slo_itl is None or row.get("longest_itl_s", 0.0) <= options.slo_itl)
    return row


def gaps_of(record: Record) -> list[float]:
    """Seconds between the tokens of a request."""
    return [after - before for before, after in pairwise(record.answer.arrivals)]


def summary_of(load: Load) -> dict[str, Any]:
    """`{stat}_{metric}` of the completed requests, then counts and rates over the whole run."""
    rows = [row_of(load, record) for record in load.records]
    done = [row for row in rows if row["outcome"] == "ok"]
    summary: dict[str, Any] = {}
    for name in TIMES:
        summary |= summarize([row for row in done if name in row], {name: name})
    gaps = [{"itl_s": gap} for record in load.records if record.answer.outcome == "ok" for gap in gaps_of(record)]
    summary |= summarize(gaps, {"itl_s": "itl_s"})
    lags = [{"lag": row["sent_s"] - row["scheduled_s"]} for row in rows]
    outcomes = Counter(row["outcome"] for row in rows)
    tokens, seconds = sum(row["tokens"] for row in done), max(load.seconds, 1e-9)
    summary |= {
        "requests": len(rows),
        "completed": len(done),
        "rejected": outcomes["rejected"],
        "failed": outcomes["failed"],
        "seconds": load.seconds,
        "requests_per_sec": len(done) / seconds,
        "tokens_per_sec": tokens / seconds,
        "prompt_tokens_per_sec": sum(row["prompt_tokens"] for row in done) / seconds,
        "p99_send_lag_s": summarize(lags, {"lag": "lag"}).get("p99_lag", 0.0),
        "client_cpu_s": load.cpu_seconds,
        "client_cpu_cores": load.cpu_seconds / seconds,
        "client_cpu_us_per_token": 1e6 * load.cpu_seconds / max(1, tokens),
    }
    met = [row for row in done if row.get("slo_met")]
    if any("slo_met" in row for row in done):
        summary |= {"goodput_requests_per_sec": len(met) / seconds, "slo_met_share": len(met) / max(1, len(rows))}
    return summary


def write_load(load: Load, path: Path) -> None:
    """The results file: a run is a request. ResultsError or RequestError where that fails."""
    config = machine_facts() | msgspec.to_builtins(load.options) | {"model": load.model, "prompts": load.prompts}
    try:
        write_results(path, config, [row_of(load, record) for record in load.records], summary_of(load))
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}") from None


def print_load(load: Load) -> None:
    """Counts, rates, and a table of times."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console, summary = Console(highlight=False), summary_of(load)
    console.print(f"{load.options.name} at {load.options.url}, model {load.model}; prompts of {load.prompts}")
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("ms")
    for stat in ("mean", "p50", "p95", "p99", "max"):
        table.add_column(stat, justify="right")
    for label, metric in (
        ("TTFT", "ttft_s"), ("TTFT, scheduled", "ttft_scheduled_s"), ("ITL", "itl_s"), ("TPOT", "tpot_s"),
        ("E2E", "latency_s"), ("E2E, scheduled", "latency_scheduled_s"),
    ):  # fmt: skip
        if f"mean_{metric}" in summary:
            stats = (summary[f"{stat}_{metric}"] for stat in ("mean", "p50", "p95", "p99", "max"))
            table.add_row(label, *(f"{1000 * value:,.1f}" for value in stats))
    console.print(table)
    for line in _lines(load, summary):
        console.print(line, soft_wrap=True)


def _lines(load: Load, summary: dict[str, Any]) -> Iterator[str]:
    s = summary
    yield (
        f"{s['completed']} of {s['requests']} requests completed, {s['rejected']} rejected (429), "
        f"{s['failed']} failed, in {s['seconds']:.1f} s"
    )
    yield (
        f"{s['requests_per_sec']:.2f} requests/s, {s['tokens_per_sec']:,.1f} tokens/s generated, "
        f"{s['prompt_tokens_per_sec']:,.1f} tokens/s of prompts"
    )
    if "goodput_requests_per_sec" in s:
        yield f"goodput {s['goodput_requests_per_sec']:.2f} requests/s; {s['slo_met_share']:.1%} within the SLO"
    yield (
        f"the generator used {s['client_cpu_s']:.2f} s of CPU ({s['client_cpu_cores']:.1%} of a core, "
        f"{s['client_cpu_us_per_token']:.0f} us a token) and sent {1000 * s['p99_send_lag_s']:.1f} ms late at p99"
    )
    if s["client_cpu_cores"] > BUSY:
        yield f"warning: it used more than {BUSY:.0%} of a core, so these are in part its own delays"
    if s["p99_send_lag_s"] > LAG_SECONDS and load.options.concurrency is None:
        yield f"warning: it was more than {1000 * LAG_SECONDS:.0f} ms late; count from scheduled"
    faults = Counter(row["error"] for row in (row_of(load, r) for r in load.records) if row["outcome"] == "failed")
    for error, times in faults.most_common(3):
        yield f"failed {times} times: {error[:200]}"


@contextmanager
def live() -> Iterator[Callable[[Progress], None]]:
    """A line on stderr that tells how it goes; nothing where there is no terminal to see it."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda progress: None
        return
    from rich.live import Live

    with Live(console=console, auto_refresh=False, transient=True) as display:
        seen = [(0.0, 0)]

        def look(progress: Progress) -> None:
            seen.append((time.perf_counter() - progress.began, progress.tokens))
            del seen[:-9]  # two seconds
            display.update(_line(progress, seen), refresh=True)

        yield look


def _line(progress: Progress, seen: list[tuple[float, int]]) -> Text:
    from rich.text import Text

    (then, before), (now, tokens) = seen[0], seen[-1]
    rate = (tokens - before) / max(now - then, 1e-9)
    outcomes = Counter(record.answer.outcome for record in progress.records)
    of = f"/{progress.total:,}" if progress.total is not None else ""
    limit = f"/{progress.seconds:g}" if progress.seconds is not None else ""
    firsts = sorted(r.answer.arrivals[0] - r.answer.sent for r in progress.records[-64:] if r.answer.arrivals)
    ttft = f"{1000 * firsts[len(firsts) // 2]:,.0f} ms" if firsts else "-"
    return Text(
        f"{now:.1f}{limit} s  {len(progress.records):,}{of} done  {progress.sent - len(progress.records)} open  "
        f"{outcomes['rejected']} rejected  {outcomes['failed']} failed  {rate:,.0f} tokens/s  TTFT p50 {ttft}"
    )
