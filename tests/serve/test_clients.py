"""Other people's clients, unchanged: `pytest -m slow tests/serve/test_clients.py`. Each runs in a process of its own,
with the Python of $HEADRACE_CLIENTS where that is set (an environment with the packages of the extra `clients`)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.serve.harness import ServerProcess

from headrace import LLM, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PYTHON = os.environ.get("HEADRACE_CLIENTS", sys.executable)
MESSAGES = [{"role": "user", "content": "Name a colour."}]


@pytest.fixture(scope="module")
def expected(offline: LLM) -> str:
    return offline.chat(MESSAGES, SamplingParams(max_tokens=12, temperature=0)).text


def need(package: str) -> None:
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True).returncode:
        pytest.skip(f"{package} is not installed")


def client(code: str, cwd: Path, **values: str) -> Any:
    """What a script's last line says, as JSON. `values` are in its environment."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | values
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, timeout=300, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_litellm(server: ServerProcess, expected: str, tmp_path: Path) -> None:
    need("litellm")
    code = """
import json, os, litellm
options = {"model": "openai/smol", "api_base": os.environ["URL"] + "/v1", "api_key": "x", "max_tokens": 12,
           "temperature": 0, "messages": [{"role": "user", "content": "Name a colour."}]}
whole = litellm.completion(**options).choices[0].message.content
pieces = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(**options, stream=True)]
print(json.dumps([whole, "".join(pieces)]))
"""
    assert client(code, tmp_path, URL=server.url) == [expected, expected]


def test_langchain_openai(server: ServerProcess, expected: str, tmp_path: Path) -> None:
    need("langchain_openai")
    code = """
import json, os
from langchain_openai import ChatOpenAI, OpenAI
options = {"base_url": os.environ["URL"] + "/v1", "api_key": "x", "model": "smol", "max_tokens": 12, "temperature": 0}
chat = ChatOpenAI(**options)
whole = chat.invoke("Name a colour.").content
pieces = [chunk.content for chunk in chat.stream("Name a colour.")]
print(json.dumps([whole, "".join(pieces), OpenAI(**options).invoke("Once upon")]))
"""
    whole, pieces, text = client(code, tmp_path, URL=server.url)
    assert whole == pieces == expected and text


def test_lm_eval(server: ServerProcess, offline: LLM, tmp_path: Path) -> None:
    """A task of our own, whose score the offline API knows: which continuation is likelier."""
    need("lm_eval")
    rows = [
        ("The capital of France is", [" Paris", " banana"]),
        ("Two plus two is", [" purple", " four"]),
        ("The opposite of hot is", [" cold", " seven"]),
        ("Fish live in", [" the sky", " the water"]),
        ("A triangle has", [" ninety heads", " three sides"]),
        ("Once upon a", [" time", " xylophone"]),
    ]
    answers = [1, 1, 0, 0, 1, 0]  # some of them wrong, so that the score is not 1
    data = [
        {"question": question, "choices": choices, "answer": answer}
        for (question, choices), answer in zip(rows, answers, strict=True)
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, data)))
    (tmp_path / "task.yaml").write_text(
        "task: likelier\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: "
        f"{tmp_path / 'data.jsonl'}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\ntarget_delimiter: ''\n"
        "metric_list:\n  - metric: acc\n"
    )
    code = """
import json, os, lm_eval
from lm_eval.tasks import TaskManager
arguments = {"model": "smol", "base_url": os.environ["URL"] + "/v1/completions", "tokenizer_backend": "remote",
             "tokenized_requests": True, "num_concurrent": 2}
result = lm_eval.simple_evaluate("local-completions", model_args=arguments, tasks=["likelier"], bootstrap_iters=0,
                                 task_manager=TaskManager(include_path="."), cache_requests=False)
print(json.dumps(result["results"]["likelier"]["acc,none"]))
"""

    def logprob(question: str, choice: str) -> float:
        start = len(offline.tokenizer.encode(question))
        ids = offline.tokenizer.encode(question + choice)
        logits = offline.logits(ids).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return sum(logprobs[i, ids[i + 1]] for i in range(start - 1, len(ids) - 1))

    chosen = [int(np.argmax([logprob(question, choice) for choice in choices])) for question, choices in rows]
    score = sum(a == b for a, b in zip(chosen, answers, strict=True)) / len(rows)
    assert 0 < score < 1
    got = client(code, tmp_path, URL=server.url, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
    assert got == pytest.approx(score)


def test_schemathesis_finds_no_500(tiny_model: str, tmp_path: Path) -> None:
    need("schemathesis")
    with ServerProcess(
        f"tiny={tiny_model}", "--threads", "1", "--request-timeout", "4", log=tmp_path / "log"
    ) as server:
        program = Path(PYTHON).with_name("schemathesis")
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
        command = [str(program), "run", f"{server.url}/openapi.json", "--checks", checks, "--max-examples", "60"]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stdout[-4000:]
        server.wait_idle()


def test_openai_for_javascript(server: ServerProcess, expected: str, tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    installed = subprocess.run(
        ["npm", "install", "--no-audit", "--no-fund", "openai@6"], cwd=tmp_path, capture_output=True, timeout=200
    )
    if installed.returncode:
        pytest.skip("the openai package cannot be had")
    (tmp_path / "ask.mjs").write_text("""
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.URL + "/v1", apiKey: "x" });
const messages = [{ role: "user", content: "Name a colour." }];
const options = { model: "smol", messages, max_tokens: 12, temperature: 0 };
const whole = (await client.chat.completions.create(options)).choices[0].message.content;
let pieces = "";
for await (const chunk of await client.chat.completions.create({ ...options, stream: true }))
  pieces += chunk.choices[0]?.delta?.content ?? "";
console.log(JSON.stringify([whole, pieces]));
""")
    done = subprocess.run(
        ["node", "ask.mjs"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"URL": server.url},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout) == [expected, expected]


def test_curl(server: ServerProcess, expected: str) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    body = json.dumps({"messages": MESSAGES, "max_tokens": 12, "temperature": 0, "stream": True})
    command = ["curl", "-sN", f"{server.url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0]["delta"].get("content", "") for line in lines[:-2]]
    assert "".join(pieces) == expected


def test_guidellm(server: ServerProcess, tmp_path: Path) -> None:
    need("guidellm")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Once upon a time"}\n{"prompt": "Name three rivers"}\n')
    command = [str(Path(PYTHON).with_name("guidellm")), "run", "--disable-console-interactive"]
    for option in (
        f"backend kind=openai_http,target={server.url},model=smol",
        "profile kind=concurrent,streams=2",
        "constraint kind=max_requests,count=2",
        f"data kind=json_file,path={tmp_path / 'prompts.jsonl'}",
        f"output kind=json,path={tmp_path / 'report.json'}",
    ):
        name, value = option.split(" ")
        command += [f"--{name}", value]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment | {"HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 2 and not totals["errored"], totals
