from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace import LLM
from headrace.errors import ConfigError, RequestError
from headrace.lab.perplexity import measure, read_text, windows

TEXT = "The headrace brings water to the wheel. The tailrace takes it away again, and the wheel turns the stone. " * 4


def ignore(done: int, total: int) -> None:
    pass


@given(st.integers(2, 300), st.integers(2, 40), st.data())
def test_windows_score_every_token_once_that_has_one_before_it(tokens, context, data):
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for first, end, start in windows(tokens, context, stride):
        assert 0 <= first < end <= min(tokens, first + context) and start > first
        scored += range(start, end)
    assert len(scored) == len(set(scored))
    unscored = set(range(tokens)) - set(scored)
    # A window's first token has nothing before it; only where windows overlap has another window scored it.
    assert unscored == ({0} if stride < context else set(range(0, tokens, stride)))


def test_windows_by_hand():
    assert list(windows(10, 4, 4)) == [(0, 4, 1), (4, 8, 5), (8, 10, 9)]
    assert list(windows(10, 4, 2)) == [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert list(windows(4, 4, 4)) == [(0, 4, 1)]


class Told:
    """An LLM whose token t is e^-t likely: what is scored can be added up by hand."""

    tokenizer = SimpleNamespace(encode=lambda text: list(range(1, len(text) + 1)))

    def generate(self, prompts, params, kind):
        return [
            SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=[SimpleNamespace(logprob=-float(t)) for t in ids[1:]])
            for ids in prompts
        ]


@pytest.mark.parametrize(("stride", "unscored"), [(4, {1, 5, 9}), (3, {1}), (1, {1})])
def test_measure_is_the_mean_over_scored_tokens(stride, unscored):
    scored = [t for t in range(1, 11) if t not in unscored]
    result = measure(Told(), "x" * 10, 4, stride, ignore)  # type: ignore[arg-type]
    assert result.scored == len(scored) and result.tokens == 10
    assert math.isclose(result.perplexity, math.exp(sum(scored) / len(scored)))


def test_measure_agrees_with_the_logits(smollm2):
    with LLM(str(smollm2), max_context=64) as llm:
        ids = llm.tokenizer.encode(TEXT)
        heard: list[tuple[int, int]] = []
        result = measure(llm, TEXT, 32, 20, lambda done, total: heard.append((done, total)))
        total, count = 0.0, 0
        for first, end, start in windows(len(ids), 32, 20):
            logits = llm.logits(ids[first:end]).astype(np.float64)
            logprobs = (
                logits
                - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
                - logits.max(1, keepdims=True)
            )
            total -= sum(logprobs[t - first - 1, ids[t]] for t in range(start, end))
            count += end - start
    assert result.scored == count == len(ids) - 1
    assert math.isclose(result.mean_nll, total / count, rel_tol=1e-5)
    assert heard[-1] == (result.windows, result.windows)
    assert 1 < result.perplexity < 60, "this text is plain English, said four times"


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("stride", [128, 64])
def test_measure_agrees_with_transformers(smollm2, stride):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32).eval()
    text = TEXT * 3
    with LLM(str(smollm2), kernels="reference", max_context=128) as llm:
        ids = llm.tokenizer.encode(text)
        result = measure(llm, text, 128, stride, ignore)
    assert result.windows > 2
    total, count, previous = 0.0, 0, 0
    for first in range(0, len(ids), stride):
        end = min(first + 128, len(ids))
        labels = torch.tensor([ids[first:end]])
        labels[:, : previous - first if first else 0] = -100
        with torch.no_grad():
            logits = model(torch.tensor([ids[first:end]])).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], ignore_index=-100, reduction="sum")
        total, count, previous = total + loss.item(), count + int((labels[0, 1:] != -100).sum()), end
        if end == len(ids):
            break
    assert result.scored == count
    assert math.isclose(result.perplexity, math.exp(total / count), rel_tol=5e-5)


@pytest.mark.parametrize(("context", "stride"), [(1, 1), (4, 0), (4, 5)])
def test_settings_out_of_range(context, stride):
    with pytest.raises(ConfigError, match=f"{context} and {stride}"):
        measure(Told(), "xxxx", context, stride, ignore)  # type: ignore[arg-type]


def test_a_text_too_short():
    with pytest.raises(RequestError, match="has 1 tokens"):
        measure(Told(), "x", 4, 4, ignore)  # type: ignore[arg-type]


def test_read_text_cuts_between_characters(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("aé€", encoding="utf-8")  # 1, 2 and 3 bytes
    assert [read_text(path, n) for n in range(1, 8)] == ["a", "a", "aé", "aé", "aé", "aé€", "aé€"]
    assert read_text(path) == "aé€"


def test_read_text_refuses_what_is_not_utf8(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"ab\xffcd")
    for limit in (None, 4, 5):
        with pytest.raises(RequestError, match="not UTF-8 at byte 2"):
            read_text(path, limit)
    path.write_bytes(b"ab\xc3")
    with pytest.raises(RequestError, match="not UTF-8 at byte 2"):
        read_text(path)
    with pytest.raises(RequestError, match="cannot read"):
        read_text(tmp_path / "none")
