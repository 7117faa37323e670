"""Every instruction set that this machine runs keeps the promise of exactness, with one thread and with two."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.tiny import write_tiny

from headrace import LLM, SamplingParams
from headrace.kernels import native

ISAS = [] if native.missing() else list(native.supported_isas())


@pytest.mark.parametrize(
    "isa", ISAS[1:] or [pytest.param("none", marks=pytest.mark.skip("one instruction set, or none, is here"))]
)
def test_exactness_on_the_other_instruction_sets(isa: str) -> None:
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        str(here / "test_exactness.py"),
        "-k",
        "native and (default or budget7 or logits)",
    ]
    environment = {**os.environ, "HEADRACE_ISA": isa}
    done = subprocess.run(command, env=environment, cwd=here.parent.parent, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.mark.skipif(not ISAS, reason="the native kernels are not built")
def test_threads_do_not_change_a_bit(tmp_path: Path) -> None:
    model = str(write_tiny(tmp_path / "tiny.gguf", "Q4_1"))
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, return_logits=True)
    prompts = [[7 + index] * length for index, length in enumerate((1, 30, 300))]
    answers = []
    for threads in (1, 2, 3):
        with LLM(model, threads=threads) as llm:
            answers.append(
                [output.logits.tobytes() for output in llm.generate(prompts, params) if output.logits is not None]
            )
    assert answers[0] == answers[1] == answers[2]
