"""Encoders as a user meets them: all-MiniLM-L6-v2 beside other implementations, tiny models behind LLM, commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import LLM
from headrace.assemble import open_model
from headrace.errors import EngineDeadError, RequestError, UnsupportedModelError
from headrace.kernels import native
from headrace.lab.embedding import measure_embedding, mixed_texts, print_embedding
from headrace.results import read_results

from .encoder_models import save_encoder
from .harness import relative_error, same_bytes

TEXTS = [
    "Why is the sky blue?",
    "",
    "Ελληνικά, naïve façades and 中文字; emoji 🙂 \u200b",
    "water " * 300,  # more than the model takes
    *mixed_texts(12),
]


@pytest.fixture(scope="module")
def theirs(minilm: Path) -> np.ndarray:
    """The embeddings by transformers, as sentence-transformers makes them: padded, cut off at 256 tokens, averaged."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.set_num_threads(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    model = transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()
    inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    mean = ((hidden * mask).sum(1) / mask.sum(1)).numpy()
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def llm(minilm: Path) -> Any:
    with LLM("minilm", threads=2) as llm:
        yield llm


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return 1 - (a.astype(np.float64) * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def test_minilm_is_transformers(llm: LLM, theirs: np.ndarray) -> None:
    ours = llm.embed(TEXTS)
    assert distances(ours, theirs).max() < 1e-6
    assert relative_error(ours, theirs) < 1e-4
    assert distances(ours, np.roll(theirs, 1, axis=0)).max() > 0.1  # the gate can fail


def test_minilm_is_sentence_transformers(llm: LLM, minilm: Path) -> None:
    module = pytest.importorskip("sentence_transformers")
    pytest.importorskip("torch").set_num_threads(1)  # its threads spin
    theirs = module.SentenceTransformer(str(minilm), device="cpu").encode(TEXTS, show_progress_bar=False)
    assert distances(llm.embed(TEXTS), theirs).max() < 1e-6


def test_the_reference_set_agrees(llm: LLM) -> None:
    with LLM("minilm", kernels="reference", threads=2) as reference:
        assert distances(llm.embed(TEXTS[:3]), reference.embed(TEXTS[:3])).max() < 1e-6


def test_a_text_alone_is_the_text_in_company(llm: LLM) -> None:
    together = llm.embed(TEXTS)
    assert all(same_bytes(llm.embed(text), together[index : index + 1]) for index, text in enumerate(TEXTS))
    plain = llm.embed(TEXTS, normalize=False)
    lengths = np.linalg.norm(plain, axis=1, keepdims=True)
    assert np.abs(lengths - 1).min() > 0.1 and np.abs(plain / lengths - together).max() < 1e-6
    assert llm.embed([]).shape == (0, 384)


def test_refusals(llm: LLM, smollm2: Path) -> None:
    for call in (lambda: llm.generate("x"), lambda: list(llm.stream("x")), lambda: llm.engine, lambda: llm.config):
        with pytest.raises(RequestError, match="is an encoder"):
            call()
    with pytest.raises(RequestError, match="has no head; this needs one for classes"):
        llm.classify("x")
    with pytest.raises(RequestError, match="has no head; this needs one for masked tokens"):
        llm.logits("x")
    with pytest.raises(RequestError, match="302 tokens, and the model takes 256"):
        llm.embed(["x", TEXTS[3]], truncate=False)
    with pytest.raises(RequestError, match="text 1 has 257 tokens"):
        llm.embed([[5], [5] * 257])
    for ids in ([30522], [-1], []):
        with pytest.raises(RequestError, match="from 0 to 30521"):
            llm.embed([[101], ids])
    with pytest.raises(UnsupportedModelError, match="minilm is an encoder"):
        open_model("minilm")
    with LLM(str(smollm2)) as decoder:
        with pytest.raises(RequestError, match="embeds none; take an encoder"):
            decoder.embed("x")
    with LLM("minilm", threads=1) as closed:
        pass
    with pytest.raises(EngineDeadError, match="was closed"):
        closed.embed("x")


def test_a_folder_with_vocab_txt_alone(llm: LLM, minilm: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(minilm, folder, ignore=shutil.ignore_patterns("tokenizer.json", "*.safetensors"))
    shutil.copy(minilm / "model.safetensors", folder)
    with LLM(str(folder), threads=2) as other:
        assert same_bytes(other.embed(TEXTS), llm.embed(TEXTS))


PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *(f"{a}{b}" for a in "abcdefghi" for b in "abcdefghij"),
    "x",
    "y",
]


def tiny_folder(name: str, folder: Path, ids: list[list[int]]) -> list[tuple[np.ndarray, np.ndarray | None]]:
    pytest.importorskip("transformers")
    found = save_encoder(name, folder, ids)
    (folder / "vocab.txt").write_text("\n".join(PIECES[:97]))
    return found


def test_logits_of_masked_tokens(tmp_path: Path) -> None:
    ids = [2, 7, 4, 30, 3]
    ((_, theirs),) = tiny_folder("bert-masked", tmp_path, [ids])
    with LLM(str(tmp_path)) as llm:
        assert theirs is not None and relative_error(llm.logits(ids), theirs) < 1e-4
        assert same_bytes(llm.logits("ac [MASK] cf"), llm.logits([2, 7, 1, 1, 1, 30, 3]))  # a name in a text is text
        assert llm.tokenizer.token_id("[MASK]") == 4
        with pytest.raises(RequestError, match="a head for masked tokens; this needs one for classes"):
            llm.classify("ac")
        with pytest.raises(RequestError, match="90 tokens, and the model takes 77"):
            llm.logits([5] * 90)
        maps = Path("/proc/self/maps").read_text()
        assert native.missing() or str(tmp_path.resolve()) not in maps, "weights are packed; the file is let go"


def test_classes(tmp_path: Path) -> None:
    ids = [[2, 7, 4, 30, 3], [2, 9, 3]]
    theirs = tiny_folder("distilbert-classify", tmp_path, ids)
    with LLM(str(tmp_path)) as llm:
        ours = llm.classify(ids)
        assert relative_error(ours, np.stack([logits for _, logits in theirs if logits is not None])) < 1e-4
        assert same_bytes(llm.classify(ids[1]), ours[1:])
        assert llm.classify([]).shape == (0, 5)
        assert llm.spec.head.labels == tuple(f"LABEL_{i}" for i in range(5))  # type: ignore[union-attr]
        with pytest.raises(RequestError, match="a head for classes; this needs one for masked tokens"):
            llm.logits("ab")


def headrace(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "headrace", *words], input=stdin, capture_output=True, text=True, timeout=100
    )


def test_the_command(llm: LLM) -> None:
    two = headrace("embed", "hello", "sky")
    vectors = np.array([json.loads(line) for line in two.stdout.splitlines()])
    assert np.abs(vectors - llm.embed(["hello", "sky"])).max() < 1e-6
    assert headrace("embed", stdin="hello\nsky\n").stdout == two.stdout
    assert headrace("embed", "--no-normalize", "hello").stdout != two.stdout.splitlines(keepends=True)[0]
    wrong = headrace("run", "hi", "-m", "minilm")
    assert wrong.returncode == 1 and "is an encoder" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_the_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_folder("bert", tmp_path, [])
    report = measure_embedding(str(tmp_path), 20, 2, threads=1)
    print_embedding(report)
    assert "20 texts" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "report.json").write_text(json.dumps(report))
    summary = read_results(tmp_path / "report.json")["summary"]["headrace"]
    assert summary["median_tokens_per_sec"] > 0
