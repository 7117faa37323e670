from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headrace.assemble import open_model
from headrace.errors import ModelFileError, ModelNotFoundError
from headrace.kernels.ops import SCREENED_ROWS
from headrace.lab.info import describe, print_facts
from headrace.model.weights import spared_bytes, step_bytes


def test_smollm2_as_it_is(smollm2, capsys):
    facts = describe(str(smollm2), "reference")
    model = facts["model"]
    assert model["parameters"] == 134_515_008
    assert model["weight_bytes"] == sum(model["weight_bytes_by_type"].values()) == model["bytes_per_step"]
    assert 96e6 < model["weight_bytes"] < 98_362_432  # the file is this long, with a vocabulary besides
    assert model["kv_bytes_per_token"] == 2 * 30 * 3 * 64 * 4
    assert facts["kernels"]["name"] == "reference" and facts["kernels"]["why"] == "asked for"
    room = model["settings"]["kv_memory"] - 32 * model["kv_bytes_per_token"]  # all pages but page 0
    for row in model["fits"]:
        needed = row["context"] * model["kv_bytes_per_token"]
        assert row["sequences"] * needed <= room < (row["sequences"] + 1) * needed
    assert [row["context"] for row in model["fits"]] == [512, 2048, 8192]
    json.dumps(facts)
    print_facts(facts)
    out = capsys.readouterr().out
    assert "134.5 M parameters" in out and "46,080 bytes a token" in out and "reference (asked for)" in out


def test_an_encoder(minilm, capsys):
    facts = describe(str(minilm), "reference")
    model = facts["model"]
    assert model["kind"] == "encoder" and model["spec"]["pooling"] == "mean"
    assert model["parameters"] == 22_713_216 - 384 * 384 - 384  # transformers' count, without the pooler, which is idle
    assert model["weight_bytes"] == sum(model["weight_bytes_by_type"].values()) >= 4 * model["parameters"]
    json.dumps(facts)
    print_facts(facts)
    assert "384 numbers, pooled by mean" in capsys.readouterr().out


def test_the_machine_alone(capsys):
    facts = describe()
    assert "model" not in facts and facts["machine"]["cores"] >= 1
    print_facts(facts)
    assert "op set" in capsys.readouterr().out


def test_an_embedding_that_is_not_the_head_is_not_read_by_a_step(smollm2):
    model = open_model(str(smollm2))
    embedding = model.file.tensors["token_embd.weight"].nbytes
    untied = replace(model.spec, tied=False)
    assert step_bytes(model.file, model.spec) - step_bytes(model.file, untied) == embedding
    codes = model.spec.vocab_size * model.spec.dim
    capped = replace(model.spec, logit_softcap=30.0)
    assert [spared_bytes(model.file, model.spec, rows) for rows in (1, SCREENED_ROWS, SCREENED_ROWS + 1)] == [
        codes * 3 // 8,
        codes * 3 // 8,
        0,
    ]
    assert spared_bytes(model.file, capped) == 0


def test_a_bad_file(tmp_path, smollm2):
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(smollm2.read_bytes()[:1000])
    with pytest.raises(ModelFileError, match=r"bad\.gguf"):
        describe(str(bad))
    with pytest.raises(ModelNotFoundError):
        describe("no-such-model")
