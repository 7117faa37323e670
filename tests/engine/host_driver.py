"""A coordinator for tests of hosts, in a process of its own: takes orders on stdin and answers on stdout, a JSON object
a line. `python host_driver.py '{"model": ..., "plan": ...}'`"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import msgspec

from headrace import LLM, SamplingParams


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def obey(llm: LLM, order: dict[str, Any]) -> dict[str, Any]:
    engine = llm.engine
    executor: Any = engine.executor  # a StagedExecutor
    if "wait" in order:  # until so many replicas are there
        end = time.monotonic() + 20
        while sum(one.state == "ready" for one in executor.status()) < order["wait"]:
            assert time.monotonic() < end, executor.status()
            engine.tend()
            time.sleep(0.01)
        return {"status": executor.status()}
    if "marks" in order:
        return {"marks": [mark.text for mark in engine.trace.marks if mark.kind == order["marks"]]}
    if "spans" in order:
        return {
            "spans": [msgspec.structs.asdict(span) for span in engine.trace.spans],
            "steps": {step.number: (step.submitted, step.answered) for step in engine.trace},
        }
    steps = 0

    def strike(*_: Any) -> None:
        """After a few steps, when all requests are under way, what the test wants to happen."""
        nonlocal steps
        steps += 1
        if steps != 12:
            return
        if "kill" in order:
            stage, replica = order["kill"]
            pid = next(one.pid for one in executor.status() if (one.stage, one.replica) == (stage, replica))
            os.kill(pid, signal.SIGKILL)
        for command in order.get("run", ()):
            subprocess.run(command, check=True)
        if "later" in order:
            threading.Timer(1.5, subprocess.run, [order["later"]]).start()

    engine.observer = strike
    params = [SamplingParams(ignore_eos=True, **one) for one in order["params"]]
    outputs = llm.generate(order["prompts"], params)
    return {"tokens": [list(output.token_ids) for output in outputs], "steps": steps}


def main() -> None:
    with LLM(**json.loads(sys.argv[1])) as llm:
        say(ready=llm.config.plan)
        for line in sys.stdin:
            say(**obey(llm, json.loads(line)))


if __name__ == "__main__":
    main()
