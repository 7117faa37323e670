"""Settings: frozen, checked once. What is left open is resolved at the door (`assemble.py`), where model and
machine are known."""

from __future__ import annotations

import os
from typing import Literal

import msgspec

from .errors import ConfigError

Policy = Literal["fcfs", "longest-prefix", "static"]
POLICIES = ("fcfs", "longest-prefix", "static")
Routing = Literal["round-robin", "random", "shortest-queue", "least-kv", "longest-prefix"]
KERNELS = ("auto", "native", "reference")
ACTIVATIONS = ("group", "row")


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a user may ask of an engine; `kv_memory` is in bytes, the rest in tokens, sequences, threads or steps.
    None and "auto" leave the choice to Headrace.

    `policy`: "fcfs" admits by priority, then arrival; "longest-prefix" prefers, within a short look-ahead, the
    prompt with the most cached tokens; "static" admits a batch only when the last one has finished (for
    comparison).
    `activations`: how the native set quantises what quantised weights are multiplied with, to int8 with a scale for
    each "group" of 32, or (faster, coarser) for each whole "row".
    `plan`: how to split the model over processes, in the notation of plan/notation.py, or as the path of a YAML
    or JSON file; a `Plan` is taken too. `threads` is then the plan's affair.
    `listen`: "host:port" at which workers of the hosts that a plan names join (`headrace worker`), and `secret_file`:
    the file of the secret that they must know.
    """

    kernels: str = "auto"
    threads: int | None = None
    activations: str = "group"
    max_context: int | None = None
    kv_memory: int | None = None
    kv_dtype: str = "auto"
    page_size: int = 32
    max_batch_tokens: int = 512
    max_sequences: int = 64
    policy: Policy = "fcfs"
    prefix_cache: bool = True
    steps_in_flight: int = 2
    plan: str | None = None
    listen: str | None = None
    secret_file: str | None = None

    def __post_init__(self) -> None:
        if self.plan is not None and not isinstance(self.plan, str):
            if not isinstance(self.plan, msgspec.Struct):
                raise ConfigError(f"plan must be a Plan or text, got {self.plan!r:.80}")
            msgspec.structs.force_setattr(self, "plan", str(self.plan))
        for name, high in (
            ("threads", 1024),
            ("max_context", 2**31 - 1),
            ("kv_memory", 2**62),
            ("page_size", 1024),
            ("max_batch_tokens", 2**20),
            ("max_sequences", 65536),
            ("steps_in_flight", 64),
        ):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high):
                raise ConfigError(f"{name} must be a whole number from 1 to {high}, got {value!r}")
        for name in ("listen", "secret_file"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                if not isinstance(value, os.PathLike):
                    raise ConfigError(f"{name} must be text, got {value!r:.80}")
                msgspec.structs.force_setattr(self, name, os.fspath(value))
        if self.listen is not None and self.plan is None:
            raise ConfigError("listen is for workers of the hosts that a plan names (@name): give a plan too")
        if not isinstance(self.prefix_cache, bool):
            raise ConfigError(f"prefix_cache must be true or false, got {self.prefix_cache!r:.80}")
        if not isinstance(self.kv_dtype, str):
            raise ConfigError(f"kv_dtype must be a name, got {self.kv_dtype!r:.80}")
        if self.kernels not in KERNELS:
            raise ConfigError(f"kernels must be one of {', '.join(KERNELS)}, got {self.kernels!r}")
        if self.activations not in ACTIVATIONS:
            raise ConfigError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {self.activations!r:.80}")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How steps are put together: at most `max_batch_tokens` rows, `max_sequences` sequences, and `max_logit_rows`
    rows of logits (4 bytes times the vocabulary each) in a step."""

    max_batch_tokens: int = 512
    max_sequences: int = 64
    max_logit_rows: int = 128
    max_context: int = 2048
    policy: Policy = "fcfs"
    prefix_cache: bool = True


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine really runs with: no "auto" is left. Printed by `headrace info`."""

    model: str
    kernels: str
    threads: int
    activations: str | None  # None where they stay as they are
    max_context: int
    kv_dtype: str
    kv_bytes_per_token: int  # of a token that all layers hold
    page_size: int
    pages: tuple[int, ...]  # in each KV group's pool, the trash page included
    kv_memory: int  # bytes
    max_batch_tokens: int
    max_sequences: int
    max_logit_rows: int
    policy: Policy
    prefix_cache: bool
    steps_in_flight: int
    plan: str | None = None
