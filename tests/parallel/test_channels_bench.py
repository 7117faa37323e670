from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.parallel.channel_pairs import needs_torch

import headrace
from headrace.errors import ConfigError
from headrace.lab.channels import measure_channels, parse_sizes, print_channels
from headrace.results import read_results

SOURCE = Path(headrace.__file__).resolve().parents[1]


def test_sizes():
    assert parse_sizes("1, 1k,16M,3000") == [1, 1024, 16 << 20, 3000]
    for text in ("", "0", "k", "-1", "1K", "1.5k", "5000M", "1,,2", "9" * 50):
        with pytest.raises(ConfigError, match="is not a size of 1 to 4294967296 bytes"):
            parse_sizes(text)


def test_the_command_measures_what_is_there_and_says_what_is_not(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    command = [sys.executable, "-m", "headrace", "bench", "--channels", "--sizes", "1k,3000", "--reps", "2"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{SOURCE}"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert "gloo: the gloo transport needs torch" in done.stdout
    for word in ("shm", "tcp", "copy", "1k", "3000"):
        assert word in done.stdout
    results = read_results(tmp_path / "out.json")
    tests = [f"{transport} {size}" for size in (1024, 3000) for transport in ("shm", "tcp", "copy")]
    assert [run["test"] for run in results["runs"]] == tests * 2 and list(results["summary"]) == tests
    for run in results["runs"]:
        assert run["latency_s"] > 0 and run["gb_per_s"] == pytest.approx(run["bytes"] / run["latency_s"] / 1e9)
        assert (run["transport"] == "copy") != ("burst_gb_per_s" in run)
    assert results["summary"]["shm 1024"]["median_burst_gb_per_sec"] > 0


@needs_torch
def test_gloo_is_measured_too(capsys):
    report = measure_channels([64], 1, lambda done, total: None, ["gloo"])
    assert [run["transport"] for run in report["runs"]] == ["gloo", "copy"] and not report["config"]["missing"]
    print_channels(report)
    assert "gloo" in capsys.readouterr().out
