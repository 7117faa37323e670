"""AsyncLLM when its engine dies: requests go on, and what was told once is not told twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import pytest

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.async_llm import MAX_DEATHS
from headrace.errors import EngineDeadError
from headrace.types import Request

LONG = SamplingParams(max_tokens=400, temperature=0.9, seed=3, ignore_eos=True)


def kill(engine: AsyncLLM, number: int = signal.SIGKILL) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, number)


async def test_outputs_are_those_of_a_quiet_run(tiny: str) -> None:
    """With log-probabilities of prompt and answer and logits, some told before the death and some after."""
    params = SamplingParams(
        max_tokens=300, temperature=0.8, seed=1, n=2, logprobs=1, prompt_logprobs=1, ignore_eos=True,
        return_logits=True, presence_penalty=0.5, min_tokens=200,
    )  # fmt: skip
    with LLM(tiny, threads=1) as offline:
        quiet = offline.generate([[9] * 100], params)[0]
        text = offline.generate("stop", LONG)[0].text
    stop = SamplingParams(max_tokens=400, temperature=0.9, seed=3, ignore_eos=True, stop=(text[150:156],))
    async with AsyncLLM(tiny, threads=1) as engine:
        task = asyncio.create_task(engine.generate([9] * 100, params))
        stopping = asyncio.create_task(engine.generate("stop", stop))
        for _ in range(4):
            await asyncio.sleep(0.08)
            kill(engine)
            while engine.state != "restarting":
                await asyncio.sleep(0.001)
            while engine.state != "ready":
                await asyncio.sleep(0.01)
        output = await task
        assert [sample.token_ids for sample in output.samples] == [sample.token_ids for sample in quiet.samples]
        assert [sample.text for sample in output.samples] == [sample.text for sample in quiet.samples]
        assert [sample.logprobs for sample in output.samples] == [sample.logprobs for sample in quiet.samples]
        assert output.prompt_logprobs == quiet.prompt_logprobs
        for got, expected in zip(output.samples, quiet.samples, strict=True):
            assert got.logits is not None and expected.logits is not None
            assert got.logits[-300:].tobytes() == expected.logits[-300:].tobytes()
        stopped = await stopping
        assert stopped.finish_reason == "stop" and stopped.text == text[: text.index(text[150:156])]
        assert not engine._live


async def test_a_request_under_which_engines_die_is_refused(tiny: str) -> None:
    """One that never gets a token: the others are not held up by it for ever."""
    async with AsyncLLM(tiny, threads=1) as engine:
        long = asyncio.create_task(engine.generate([5] * 500, SamplingParams(max_tokens=1, prompt_logprobs=250)))
        for _ in range(MAX_DEATHS):
            await asyncio.sleep(0.005)
            kill(engine)
            while engine.state == "ready":
                await asyncio.sleep(0.001)
            while engine.state == "restarting":
                await asyncio.sleep(0.001)
        with pytest.raises(EngineDeadError, match=f"{MAX_DEATHS} times"):
            await long
        assert (await engine.generate("x", SamplingParams(max_tokens=2))).token_ids


async def test_cancels_and_new_requests_while_there_is_no_engine(tiny: str) -> None:
    async with AsyncLLM(tiny, threads=1) as engine:
        doomed = [asyncio.create_task(engine.generate(f"doomed {i}", LONG)) for i in range(3)]
        await asyncio.sleep(0.01)
        kill(engine)
        while engine.state != "restarting":
            await asyncio.sleep(0.001)
        new = asyncio.create_task(engine.generate("new", LONG))
        for task in doomed[:2]:
            task.cancel()
        await asyncio.gather(*doomed[:2], return_exceptions=True)
        assert len((await new).token_ids) == len((await doomed[2]).token_ids) == 400
        assert not engine._live
        pages = await engine.page_map()
        assert all(2 not in pool and 3 not in pool for pool in pages.pools), "no page is held"
        assert any(1 in pool for pool in pages.pools), "prefixes are kept"


async def test_a_stopped_engine_is_replaced_and_a_continued_one_is_not(tiny: str) -> None:
    async with AsyncLLM(tiny, threads=1) as engine:
        first = engine.pid
        task = asyncio.create_task(engine.generate("x", LONG))
        await asyncio.sleep(0.005)
        kill(engine, signal.SIGSTOP)
        began = time.monotonic()
        assert len((await task).token_ids) == 400 and time.monotonic() - began < 2.5
        assert engine.pid != first
        second = engine.pid
        kill(engine, signal.SIGSTOP)
        await asyncio.sleep(0.05)
        kill(engine, signal.SIGCONT)
        assert len((await engine.generate("x", LONG)).token_ids) == 400 and engine.pid == second


def test_a_resumed_request_needs_its_tokens(tiny: str) -> None:
    """A control: without the tokens that it has, or with others, the rest of the answer differs."""
    with LLM(tiny, threads=1) as llm:
        whole = llm.generate([[7, 8, 9]], LONG)[0].token_ids

        def rest(resumed: tuple[int, ...]) -> list[int]:
            request = Request(id=str(resumed), prompt_ids=(7, 8, 9), params=LONG, seed=3, resumed=resumed)
            llm.engine.add(request)
            tokens: list[int] = []
            while llm.engine.busy:
                tokens += [token for event in llm.engine.step() for token in event.tokens]
            return tokens

        assert rest(tuple(whole[:100])) == whole[100:]
        assert rest((*whole[:99], (whole[99] + 1) % 259)) != whole[100:]
        assert rest(()) == whole
