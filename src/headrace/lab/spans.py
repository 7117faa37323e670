"""The spans of what a split model just did."""

from __future__ import annotations

import time

from ..llm import LLM
from ..trace import StageSpan
from ..workers.worker import SPAN_SECONDS


def spans_since(llm: LLM, began: float) -> list[StageSpan]:
    """Spans of the steps that workers received since `began`, seconds of time.monotonic. Waits until all are there:
    the workers report them with a delay."""
    until = time.monotonic() + 2 * SPAN_SECONDS
    while time.monotonic() < until:
        llm.engine.tend()
        time.sleep(SPAN_SECONDS / 4)
    return [span for span in llm.engine.trace.spans if span.received >= began]
