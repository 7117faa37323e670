"""A real peer, in a process of its own: Transformers, which the tests have anyway."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tests.tiny import write_tiny

from headrace.errors import ConfigError, HeadraceError
from headrace.lab.against import peer_models, started
from headrace.lab.bench import measure, parse_tests, print_report, write_report
from headrace.results import read_results


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An environment for Transformers that is this one."""
    pytest.importorskip("transformers")
    python = tmp_path / "transformers" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return tmp_path


def test_a_peer_runs_in_turn_with_ours(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_tiny(folder / "tiny.gguf"))
    with started(["transformers"], folder, {"transformers": model}, 1) as peers:
        report = measure(model, parse_tests("pp8,b2"), 2, lambda done, of: None, peers, threads=1)
        with pytest.raises(HeadraceError, match="died"):
            peers[0].run("nonsense")
    assert [(run.engine, run.test) for run in report.peer_runs] == [
        ("transformers", name) for name in ("pp8",) * 2 + ("b2",) * 2
    ]
    assert all(run.rate > 0 for run in report.peer_runs)
    print_report(report)
    assert "headrace / best peer" in " ".join(capsys.readouterr().out.split())
    write_report(report, folder / "results.json")
    summary = read_results(folder / "results.json")["summary"]
    assert summary["pp8 transformers"]["median_tokens_per_sec"] > 0 and summary["pp8"]["median_tokens_per_sec"] > 0


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown peer 'ollama'"), started(["ollama"], tmp_path, {}, 1):
        pass
    with pytest.raises(ConfigError, match="no environment"), started(["vllm"], tmp_path, {}, 1):
        pass
    assert peer_models(["vllm"], [f"vllm={tmp_path}"], Path("x")) == {"vllm": str(tmp_path)}
    for entry in ("vllm", "openvino=/", f"vllm={tmp_path}/nothing"):
        with pytest.raises(ConfigError, match="PEER=PATH"):
            peer_models(["vllm"], [entry], Path("x"))
