"""The one results schema: what every bench and experiment writes, and the facts of the machine that it ran on.

    {"config": {...}, "runs": [{"test", "latency_s", "tokens_per_second", ...}], "summary": {"mean_latency_s", ...}}

With several tests in one file, `summary` holds one such object per test.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .errors import ResultsError

# Metrics by their name in a run and in a summary.
METRICS: Mapping[str, str] = {"latency_s": "latency_s", "tokens_per_second": "tokens_per_sec"}

MAX_FILE_BYTES = 256 << 20

# As /proc/cpuinfo spells them.
_X86_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx_vnni")
_ARM_FLAGS = ("asimd", "asimddp", "i8mm", "bf16", "sve")
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)  # Student's t, two-sided, 1..10 degrees


def summarize(runs: Sequence[Mapping[str, Any]], metrics: Mapping[str, str] = METRICS) -> dict[str, float | None]:
    """Statistics of one test's runs: `{stat}_{metric}` for each metric that the runs have, named by `metrics`' values.

    stat is mean, std (of a sample: n - 1), min, max, median, p50, p95, p99 (the value at rank 1 + (n - 1) q, linear
    between neighbours) and ci95 (half the width of the mean's 95% confidence interval, by Student's t). A single run
    has neither std nor ci95: None. Raises ResultsError where only some runs have a metric, or it is no finite number.
    """
    summary: dict[str, float | None] = {}
    for field, metric in metrics.items():
        values = [run[field] for run in runs if field in run]
        if not values:
            continue
        if len(values) < len(runs):
            raise ResultsError(f"{len(values)} of {len(runs)} runs have {field}; give it in all or in none")
        for index, value in enumerate(values):
            _check(value, f"runs[{index}].{field}", number=True)
        summary |= {f"{stat}_{metric}": value for stat, value in _statistics(np.asarray(values, np.float64)).items()}
    return summary


def summarize_tests(
    runs: Iterable[Mapping[str, Any]], metrics: Mapping[str, str] = METRICS
) -> dict[str, dict[str, float | None]]:
    """One `summarize` object per value of the runs' "test", in order of first appearance."""
    tests: dict[str, list[Mapping[str, Any]]] = {}
    for index, run in enumerate(runs):
        if "test" not in run:
            raise ResultsError(f'runs[{index}] has no "test": name it, or summarize the runs as one test')
        tests.setdefault(run["test"], []).append(run)
    return {test: summarize(its_runs, metrics) for test, its_runs in tests.items()}


def machine_facts() -> dict[str, Any]:
    """What the machine and the software are; a fact that the system does not tell is None (or an empty list)."""
    cpuinfo = _read("/proc/cpuinfo")
    flags = set(_field(cpuinfo, r"(?:flags|Features)").split())
    memory = _field(_read("/proc/meminfo"), "MemTotal").split()
    return {
        "cpu": _field(cpuinfo, "model name") or platform.processor() or platform.machine() or None,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": int(memory[0]) * 1024 if memory else None,
        "isa": [flag for flag in (*_X86_FLAGS, *_ARM_FLAGS) if flag in flags],
        "os": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "headrace": __version__,
        "commit": _commit(),
    }


def write_results(
    path: str | Path, config: dict[str, Any], runs: Sequence[dict[str, Any]], summary: Mapping[str, Any]
) -> None:
    """Write a results file, whole or not at all. Raises ResultsError where a value is not finite or not plain data."""
    results = {"config": config, "runs": list(runs), "summary": dict(summary)}
    _check(results, "results")
    text = json.dumps(results, indent=1, default=lambda value: value.item(), allow_nan=False)
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_results(path: str | Path) -> dict[str, Any]:
    """Read a results file. Raises ResultsError where it is none: too large, no JSON, a part missing, not finite."""
    size = Path(path).stat().st_size
    if size > MAX_FILE_BYTES:
        raise ResultsError(f"{path}: {size} bytes; a results file has at most {MAX_FILE_BYTES}")
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        _check(results, str(path))
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: not a results file: {error}") from None
    names = {dict: "object", list: "array"}
    for part, kind in (("config", dict), ("runs", list), ("summary", dict)):
        if not isinstance(results, dict) or not isinstance(results.get(part), kind):
            raise ResultsError(f"{path}: not a results file: {part} must be a JSON {names[kind]}")
    return results


def _statistics(values: np.ndarray) -> dict[str, float | None]:
    count = len(values)
    std = float(values.std(ddof=1)) if count > 1 else None
    p50, p95, p99 = (float(np.quantile(values, q, method="linear")) for q in (0.5, 0.95, 0.99))
    return {
        "mean": float(values.mean()),
        "std": std,
        "min": float(values.min()),
        "max": float(values.max()),
        "median": p50,
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "ci95": None if std is None else _student_t(count - 1) * std / math.sqrt(count),
    }


def _student_t(degrees: int) -> float:
    """The 97.5% quantile of Student's t: a table, then the expansion of Abramowitz & Stegun 26.7.5."""
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def _check(value: Any, where: str, number: bool = False) -> None:
    """Refuse what JSON cannot hold, naming the place; with `number`, whatever is not a number."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ResultsError(
            f"{where} is {value}: results hold finite numbers only; leave the field out, or find out why"
        )
    if isinstance(value, int | float) and not isinstance(value, bool):
        return
    if number:
        raise ResultsError(f"{where} must be a number, got {value!r:.80}")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ResultsError(f"{where} has the key {key!r:.80}; a key must be text")
            _check(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check(item, f"{where}[{index}]")
    elif not isinstance(value, str | bool | None):
        raise ResultsError(f"{where} is a {type(value).__name__}; results hold numbers, text, lists and objects")


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    match = re.search(rf"^{name}\s*:[ \t]*(.*)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None outside a checkout of Headrace."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
