"""Settings: frozen, checked once. Every "auto" is resolved at the door (`llm.py`), where model and machine are known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import ConfigError

Policy = Literal["fcfs", "longest-prefix", "static"]
POLICIES = ("fcfs", "longest-prefix", "static")


@dataclass(frozen=True)
class SchedulerConfig:
    """How steps are put together.

    `max_batch_tokens` rows and `max_sequences` sequences at most in a step; `max_logit_rows` rows of logits at most (a row is
    4 bytes times the vocabulary). `policy`: "fcfs" admits by priority, then arrival; "longest-prefix" prefers, within a short
    look-ahead, the prompt with the most cached tokens; "static" admits a batch only when the last one has finished (for comparison).
    """

    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_logit_rows: int = 128
    max_context: int = 2048
    policy: Policy = "fcfs"
    prefix_cache: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences", "max_logit_rows", "max_context"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
