"""A plan in a line: `0-14 x2 | 15-29` is two stages, the first with two replicas.

    plan     = ( number | stage { "|" stage } ) { ";" option }     a number: so many stages, cut by cost
    stage    = layers [ pages ] [ group { "+" group } ]            groups of replicas; without one, a single replica
    layers   = "*" | number "-" number                             "*": cut by cost; else first and last, both included
    pages    = "p" number                                          KV pages of each replica
    group    = { "x" number | "/" number | threads | cores | host }   each at most once, and at least one of them
                                                                   x: equal replicas (1), /: ranks of each (1)
    threads  = "t" each { "/" each }                               of every rank, or of rank 0, rank 1, ...
    cores    = "c" set { "/" set }                                 of rank 0, rank 1, ...
    each     = number | "*"                                        "*": left open
    set      = span { "," span } | "*"
    span     = number [ "-" number ]
    host     = "@" name
    option   = "channel=" name { "," name } | "routing=" name | "lost=" name | "micro=" number | "heartbeat=" seconds

Spaces may stand between any two of these words, and not within one (`t2/1` is one word). Examples:

    2                              two stages, cut by cost
    0-29 /2                        one stage, split over two ranks
    0-14 x2/2 | 15-29/2            2 replicas of 2 ranks each, then one of 2 ranks
    0-14 /1 + /2 | 15-29           uneven: a replica of one rank and one of two
    * p512 t2 | * x3 t1 @worker-2  one replica of 2 threads here; three of 1 thread on the host worker-2
    0-29 /2 c0-3/4-7 t4            ranks on cores of their own
    0-9 | 10-29; channel=tcp; routing=least-kv; lost=fail; micro=3; heartbeat=0.5
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

from .plan import MAX_CORE, MAX_RANKS, MAX_REPLICAS, MAX_STAGES, MAX_THREADS, Plan, PlanError, Rank, Replica, Stage

if TYPE_CHECKING:
    from ..model.spec import ModelSpec

MAX_CHARS = 1 << 16
_NUMBER = re.compile(r"[0-9]{1,9}(?![0-9])")
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_DECIMAL = re.compile(r"[0-9]{1,9}(?:\.[0-9]{1,20})?")
_SHOWN = 100  # characters of the text that an error shows around its place


def parse_notation(text: str, spec: ModelSpec | None = None) -> Plan:
    """The plan that a text of the grammar above stands for, checked against a model where one is given. PlanError
    points at the place in the text."""
    if len(text) > MAX_CHARS:
        raise PlanError(f"a plan has at most {MAX_CHARS} characters, got {len(text)}; write it to a file")
    reader = _Reader(text)
    with reader.pointing(0):
        plan = _plan(reader)
    if spec is not None:
        with reader.pointing(0):
            plan.check(spec)
    return plan


def to_notation(plan: Plan) -> str:
    """The shortest text that `parse_notation` makes the same plan of."""
    if len(plan.stages) > 1 and all(stage == Stage() for stage in plan.stages):
        text = str(len(plan.stages))
    else:
        text = " | ".join(map(_stage_text, plan.stages))
    default = Plan()
    channel = plan.channel if isinstance(plan.channel, str) else ",".join(plan.channel)
    values = {"channel": channel, "routing": plan.routing, "lost": plan.lost, "micro": plan.micro_batches}
    usual = {"channel": default.channel, "routing": default.routing, "lost": default.lost, "micro": None}
    options = [f"; {name}={value}" for name, value in values.items() if value != usual[name]]
    if plan.heartbeat != default.heartbeat:
        options.append(f"; heartbeat={plan.heartbeat!r}".removesuffix(".0"))
    return text + "".join(options)


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader:
    """The text, and how far it was read."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.stages: list[int] = []  # where each begins
        self.options: dict[str, int] = {}

    def fail(self, problem: str, at: int | None = None) -> NoReturn:
        raise _Pointed(self._point(problem, self.at if at is None else at))

    def _point(self, problem: str, at: int) -> str:
        start = max(0, at - _SHOWN // 2)
        shown = self.text[start : start + _SHOWN].translate(dict.fromkeys(range(32), " "))
        return f"plan, column {at + 1}: {problem}\n  {shown}\n  {' ' * (at - start)}^"

    @contextmanager
    def pointing(self, at: int) -> Iterator[None]:
        """What a plan's own checks find wrong is at the stage or the option that they name, else here."""
        try:
            yield
        except _Pointed:
            raise
        except PlanError as error:
            if error.stage is not None and error.stage < len(self.stages):
                at = self.stages[error.stage]
            elif error.field in self.options:
                at = self.options[error.field]
            raise _Pointed(self._point(str(error), at), error.stage, error.field) from None

    def skip(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def peek(self) -> str:
        """The next character that is no space, "" at the end."""
        self.skip()
        return self.text[self.at : self.at + 1]

    def here(self, char: str) -> bool:
        """Take this very character, if it is next."""
        found = self.text.startswith(char, self.at)
        self.at += found
        return found

    def word(self, char: str) -> bool:
        self.skip()
        return self.here(char)

    def match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self.text, self.at)
        if not found:
            got = self.text[self.at : self.at + 10].split()
            self.fail(f"expected {what}, got {repr(got[0]) if got and self.text[self.at].strip() else 'nothing'}")
        self.at = found.end()
        return found[0]

    def number(self, what: str) -> int:
        return int(self.match(_NUMBER, what))


class _Pointed(PlanError):
    """Says already where in the text."""


def _plan(reader: _Reader) -> Plan:
    reader.skip()
    if reader.at == len(reader.text):
        reader.fail("expected stages, such as 0-14 | 15-29, or their number; got nothing")
    if re.match(r"[0-9]+\s*(;|$)", reader.text[reader.at :]):
        at = reader.at
        count = reader.number("a number of stages")
        if not 1 <= count <= MAX_STAGES:
            reader.fail(f"a plan has 1 to {MAX_STAGES} stages, got {count}", at)
        reader.stages, stages = [at] * count, [Stage()] * count
    else:
        stages = [_stage(reader)]
        while reader.word("|"):
            if len(stages) == MAX_STAGES:
                reader.fail(f"a plan has at most {MAX_STAGES} stages; take fewer")
            stages.append(_stage(reader))
    options = _options(reader)
    if reader.peek():
        reader.fail('expected "|", ";" or the end')
    return Plan(tuple(stages), **options)


def _stage(reader: _Reader) -> Stage:
    reader.skip()
    start = reader.at
    reader.stages.append(start)
    first = last = pages = None
    if not reader.here("*"):
        first = reader.number('layers, as first-last or "*"')
        if not reader.here("-"):
            reader.fail(f'expected "-" and the last layer behind the first, as in {first}-{first}')
        last = reader.number("the last layer")
    if reader.word("p"):
        pages = reader.number("a number of KV pages")
    replicas = _group(reader, required=False)
    while reader.word("+"):
        replicas += _group(reader, required=True)
        if len(replicas) > MAX_REPLICAS:
            reader.fail(f"a stage has at most {MAX_REPLICAS} replicas, got {len(replicas)}", start)
    if reader.peek() == "p":
        reader.fail("KV pages stand right behind the layers, as in 0-14 p512 x2")
    with reader.pointing(start):
        return Stage(first, last, tuple(replicas), pages)


def _group(reader: _Reader, required: bool) -> list[Replica]:
    """Equal replicas."""
    reader.skip()
    start = reader.at
    seen: dict[str, Any] = {}
    while (key := reader.peek()) and key in _PARTS:
        at = reader.at
        reader.at += 1
        if key in seen:
            reader.fail(f'"{key}" is given twice; give it once, or put "+" between replicas that differ', at)
        seen[key] = _PARTS[key](reader)
    if required and not seen:
        reader.fail('expected a replica behind "+", such as /1')
    threads, cores = seen.get("t", ()), seen.get("c", ())
    given = {len(each) for each in (threads, cores) if len(each) > 1}
    count = seen.get("/", max(given, default=1))
    if given - {count} or (len(cores) == 1 and count > 1 and cores != (None,)):
        wrong = next(each for each in (cores, threads) if len(each) not in (0, count))
        reader.fail(f'{count} ranks, and threads or cores for {len(wrong)}; give one for each, with "/" between', start)
    threads = threads * count if len(threads) == 1 else threads or (None,) * count
    cores = cores * count if len(cores) == 1 else cores or (None,) * count
    with reader.pointing(start):
        return [Replica(tuple(map(Rank, threads, cores)), seen.get("@"))] * seen.get("x", 1)


def _bounded(what: str, most: int):
    def read(reader: _Reader) -> int:
        at = reader.at
        count = reader.number(f"a number of {what}")
        if not 1 <= count <= most:
            reader.fail(f"a number of {what} is from 1 to {most}, got {count}", at)
        return count

    return read


def _slashed(read_one):
    """One, or several with "/" between, at most one a rank; "*" stands for None."""

    def read(reader: _Reader) -> tuple[Any, ...]:
        found = []
        while not found or reader.here("/"):
            if len(found) == MAX_RANKS:
                reader.fail(f"a replica has at most {MAX_RANKS} ranks")
            found.append(None if reader.here("*") else read_one(reader))
        return tuple(found)

    return read


def _core_set(reader: _Reader) -> tuple[int, ...]:
    cores: list[int] = []
    while not cores or reader.here(","):
        at = reader.at
        first = last = reader.number("the number of a core")
        if reader.here("-"):
            last = reader.number("the last core of a span")
        if not first <= last <= MAX_CORE:
            reader.fail(
                f"cores are numbered up to {MAX_CORE}, a span from the lower to the higher; got {first}-{last}", at
            )
        cores += range(first, last + 1)
        if len(cores) > MAX_THREADS:
            reader.fail(f"a rank has at most {MAX_THREADS} cores, got {len(cores)}", at)
    return tuple(cores)


_PARTS = {
    "x": _bounded("replicas", MAX_REPLICAS),
    "/": _bounded("ranks", MAX_RANKS),
    "t": _slashed(_bounded("threads", MAX_THREADS)),
    "c": _slashed(_core_set),
    "@": lambda reader: reader.match(_NAME, "the name of a host"),
}


def _options(reader: _Reader) -> dict[str, Any]:
    fields = {"channel": "channel", "routing": "routing", "lost": "lost", "micro": "micro_batches"}
    fields["heartbeat"] = "heartbeat"
    options: dict[str, Any] = {}
    while reader.word(";"):
        reader.skip()
        at = reader.at
        name = reader.match(_NAME, f"an option: {', '.join(fields)}")
        field = fields.get(name)
        if field is None or field in options:
            problem = f"is none of {', '.join(fields)}" if field is None else "is given twice"
            reader.fail(f"the option {name!r:.40} {problem}", at)
        if not reader.word("="):
            reader.fail(f'expected "=" behind {name}')
        reader.skip()
        reader.options[field] = reader.at
        options[field] = _option_value(reader, field)
    return options


def _option_value(reader: _Reader, field: str) -> Any:
    if field == "micro_batches":
        return reader.number("a number of micro-batches")
    if field == "heartbeat":
        return float(reader.match(_DECIMAL, "seconds, such as 0.5"))
    names = [reader.match(_NAME, f"a {field}")]
    while field == "channel" and reader.word(","):
        reader.skip()
        names.append(reader.match(_NAME, "a channel"))
    return names[0] if len(names) == 1 else tuple(names)


# -- writing -----------------------------------------------------------------------------------------------------------


def _stage_text(stage: Stage) -> str:
    words = ["*" if stage.first is None else f"{stage.first}-{stage.last}"]
    if stage.kv_pages is not None:
        words.append(f"p{stage.kv_pages}")
    groups = [(replica, len(list(equal))) for replica, equal in groupby(stage.replicas)]
    texts = [_group_text(replica, count, alone=len(groups) == 1) for replica, count in groups]
    return " ".join(words + [" + ".join(texts)] * any(texts))


def _group_text(replica: Replica, count: int, alone: bool) -> str:
    ranks = replica.ranks
    threads, cores = [rank.threads for rank in ranks], [rank.cores for rank in ranks]
    amount = f"x{count}" * (count > 1)
    amount += f"/{len(ranks)}" * (len(ranks) > 1 or (not alone and count == 1))
    words = [amount] if amount else []
    if set(threads) != {None}:
        several = threads if len(set(threads)) > 1 else threads[:1]
        words.append("t" + "/".join("*" if one is None else str(one) for one in several))
    if set(cores) != {None}:
        words.append("c" + "/".join("*" if one is None else _core_text(one) for one in cores))
    if replica.host is not None:
        words.append(f"@{replica.host}")
    return " ".join(words)


def _core_text(cores: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][-1] + 1:
            spans[-1].append(core)
        else:
            spans.append([core])
    return ",".join(f"{s[0]}-{s[-1]}" if len(s) > 2 else ",".join(map(str, s)) for s in spans)
