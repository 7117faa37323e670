"""A sequence, and what it has on the workers while it runs. Both belong to the scheduler."""

from __future__ import annotations

from ..types import Request, Timings
from .pages import Path, PrefixKeys, Tables


class Residence:
    """What a running sequence has on the workers. Never reused: a preempted sequence comes back with a new one."""

    __slots__ = ("closed", "handle", "in_flight", "path", "sequence", "tables")

    def __init__(self, handle: int, sequence: Sequence, path: Path, tables: Tables) -> None:
        self.handle, self.sequence, self.path, self.tables = handle, sequence, path, tables
        self.in_flight = 0  # steps in flight that name it
        self.closed = False


class Sequence:
    """One request's tokens, and how far they are computed. Owned by the scheduler alone."""

    __slots__ = (
        "admitted",
        "arrival_order",
        "cached_tokens",
        "computed",
        "crashes",
        "first_token",
        "generates",
        "keys",
        "last_sampler",
        "last_token",
        "max_length",
        "passed_over",
        "pending",
        "preemptions",
        "prompt_length",
        "published",
        "request",
        "residence",
        "route",
        "scheduled",
        "scored",
        "scores",
        "tokens",
    )  # fmt: skip

    def __init__(self, request: Request, order: int, max_length: int, page_size: int) -> None:
        self.request, self.arrival_order, self.max_length = request, order, max_length
        self.generates = request.kind == "generate"
        # Whether the logits of prompt positions are asked for. Of several samples, the first reports the prompt's.
        asked = request.params.prompt_logprobs is not None and request.sample_index == 0
        self.scores = asked or request.kind == "score"
        self.tokens = [*request.prompt_ids, *request.resumed]
        self.prompt_length = len(request.prompt_ids)
        self.keys = PrefixKeys(page_size, f"{request.adapter}:{request.salt}")
        self.residence: Residence | None = None
        self.route: Path | None = None  # the path that it waits for
        self.computed = self.scheduled = self.published = 0  # tokens, tokens, pages
        self.crashes = 0  # of workers that were computing it, since its last token
        self.pending = 0  # tokens that steps in flight will sample
        self.last_sampler = -1  # the last step planned to sample for it
        self.scored = 0  # prompt positions whose logits have been delivered
        self.passed_over = self.preemptions = self.cached_tokens = 0
        self.admitted = self.first_token = self.last_token = 0.0

    @property
    def rank(self) -> tuple[int, float, int]:
        """Order of service: priority, then arrival. A sequence is only ever preempted for one of lower rank."""
        return (-self.request.priority, self.request.arrival, self.arrival_order)

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def todo(self) -> int:
        """Tokens that could be computed now. The last token of a sequence at its maximum length need not be."""
        length = len(self.tokens)
        if self.pending:
            if self.residence is not None and not self.residence.path.late:
                return length - self.scheduled
            length += self.pending
        return (
            (length if length < self.max_length else 0) - self.scheduled if self.generates else length - self.scheduled
        )

    def timings(self, now: float) -> Timings:
        """Where the time went until `now`, at which the sequence ends."""
        admitted, first_token = self.admitted or now, self.first_token or now
        return Timings(
            queue=max(0.0, admitted - self.request.arrival),
            prefill=max(0.0, first_token - admitted),
            decode=max(0.0, self.last_token - first_token),
            cached_tokens=self.cached_tokens,
            preemptions=self.preemptions,
        )
