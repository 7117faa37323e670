"""Embeddings beside other engines': compared with ours, and refused where they are others."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

import headrace
from headrace.errors import ConfigError, HeadraceError
from headrace.lab.against import EMBEDDERS, PEERS, peers_folder, started
from headrace.lab.embedding import largest_distance, measure_embedding, print_embedding

# A peer that is this package again, after what {change} does to its embeddings.
TWIN = """
from loop import answer, rate_of_embedding
from headrace import LLM

def load(path, threads):
    llm = LLM(path, threads=threads)
    return rate_of_embedding(lambda texts: llm.embed(texts){change})

if __name__ == "__main__":
    answer(load)
"""


def twin(folder: Path, change: str) -> dict[str, str]:
    """The twin's script, with an environment for it in `folder`."""
    python = folder / "twin" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join((str(PEERS), str(Path(headrace.__file__).parents[1])))
    python.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (folder / "twin.py").write_text(TWIN.format(change=change))
    return {"twin": str(folder / "twin.py")}


def test_distances() -> None:
    rows = np.array([[1, 0], [3, 4]], np.float32)
    assert largest_distance(rows, rows * 7) == pytest.approx(0, abs=1e-15)  # lengths do not count
    assert largest_distance(rows, np.array([[5, 0], [4, 3]], np.float32)) == pytest.approx(1 - 24 / 25)
    assert largest_distance(rows, np.array([[-1, 0], [3, 4]], np.float32)) == pytest.approx(2)


def test_a_peer_of_the_same_embeddings(tmp_path: Path, minilm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with started(["twin"], tmp_path, {"twin": str(minilm)}, 1, twin(tmp_path, "")) as peers:
        report = measure_embedding(str(minilm), 8, 2, peers=peers, threads=1)
    assert [run["test"] for run in report["runs"]] == ["headrace", "twin"] * 2
    for run in report["runs"]:
        assert run["tokens_per_second"] * run["latency_s"] == pytest.approx(report["config"]["tokens"])
        assert run["test"] == "headrace" or run["cosine_distance"] < 1e-12
    print_embedding(report)
    assert "twin" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("[::-1]", "more than 1e-03"),
        (" * float('nan')", "more than 1e-03"),
        (" + 0.004", "more than 1e-03"),  # 384 of its squares are 6e-3 of the squared length
        ("[:, :-1]", "another model"),
    ],
)
def test_a_peer_of_other_embeddings_is_refused(tmp_path: Path, minilm: Path, change: str, reason: str) -> None:
    with (
        started(["twin"], tmp_path, {"twin": str(minilm)}, 1, twin(tmp_path, change)) as peers,
        pytest.raises(HeadraceError, match=reason),
    ):
        measure_embedding(str(minilm), 4, 1, peers=peers, threads=1)


def test_a_peer_that_only_generates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="known are openvino, sentence-transformers"):
        started(["llama.cpp"], tmp_path, {}, 1, EMBEDDERS).__enter__()


# HEADRACE_PEERS=FOLDER pytest -m slow tests/lab/test_embedding.py
@pytest.mark.slow
@pytest.mark.parametrize(("name", "most"), [("sentence-transformers", 1e-4), ("openvino", 1e-3)])
def test_the_peers_make_our_embeddings(minilm: Path, name: str, most: float) -> None:
    folder = peers_folder(None)
    if not (folder / name / "bin" / "python").exists():
        pytest.skip(f"{name} has no environment in {folder}")
    with started([name], folder, {name: str(minilm)}, 2, EMBEDDERS) as peers:
        report = measure_embedding(str(minilm), 64, 1, peers=peers, threads=2)
    assert report["runs"][1]["cosine_distance"] <= most
