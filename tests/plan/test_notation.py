"""The notation of plans: what it means, that it comes back, and that errors point at their place."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.errors import ConfigError
from headrace.plan.notation import MAX_CHARS, parse_notation, to_notation
from headrace.plan.plan import Plan, Rank, Replica, Stage

from .plans import model, plans

ONE, PAIR = Replica(), Replica((Rank(), Rank()))


def one(*replicas: Replica, pages: int | None = None) -> Plan:
    return Plan((Stage(0, 29, replicas, pages),))


MEANINGS = {
    "0-14 x2 | 15-29": Plan((Stage(0, 14, (ONE, ONE)), Stage(15, 29))),
    "0-29 /2": one(PAIR),
    "0-14 x2/2 | 15-29/2": Plan((Stage(0, 14, (PAIR, PAIR)), Stage(15, 29, (PAIR,)))),
    "0-14 /1 + /2 | 15-29": Plan((Stage(0, 14, (ONE, PAIR)), Stage(15, 29))),
    "0-29 x2 + /2": one(ONE, ONE, PAIR),
    "2": Plan((Stage(), Stage())),
    " * | * ": Plan((Stage(), Stage())),
    "*": Plan(),
    "0-9 | * | *x2": Plan((Stage(0, 9), Stage(), Stage(replicas=(ONE, ONE)))),
    "0-29 p512": one(ONE, pages=512),
    "0-29p512x2": one(ONE, ONE, pages=512),
    "0-29 t2": one(Replica((Rank(2),))),
    "0-29 /2 t2": one(Replica((Rank(2), Rank(2)))),
    "0-29 t2 /2": one(Replica((Rank(2), Rank(2)))),
    "0-29 t2/1": one(Replica((Rank(2), Rank(1)))),
    "0-29 t2/*/1 /3": one(Replica((Rank(2), Rank(), Rank(1)))),
    "0-29 c0,1": one(Replica((Rank(cores=(0, 1)),))),
    "0-29 c4-6,0/2,9 t2": one(Replica((Rank(2, (4, 5, 6, 0)), Rank(2, (2, 9))))),
    "0-29 @worker-2": one(Replica(host="worker-2")),
    "0-29 x2 @b + @c": one(Replica(host="b"), Replica(host="b"), Replica(host="c")),
    "0-0 | 1-29; channel=tcp": Plan((Stage(0, 0), Stage(1, 29)), "tcp"),
    "3; channel=shm , tcp ;lost=fail": Plan((Stage(),) * 3, ("shm", "tcp"), lost="fail"),
    "2; micro=3; routing=least-kv; heartbeat = 0.5": Plan(
        (Stage(),) * 2, routing="least-kv", micro_batches=3, heartbeat=0.5
    ),
}


@pytest.mark.parametrize("text", MEANINGS)
def test_what_a_text_means(text):
    assert parse_notation(text) == Plan.parse(text) == MEANINGS[text]


@settings(max_examples=150, deadline=None)
@given(plans())
@example(Plan())
@example(Plan((Stage(),) * 3, heartbeat=2.0))
@example(Plan((Stage(0, 0), Stage(1, 1), Stage(2, 2)), ("tcp", "shm")))
@example(one(Replica((Rank(1, (3,)),)), ONE, ONE, PAIR))
def test_every_plan_comes_back(plan):
    text = to_notation(plan)
    assert parse_notation(text) == plan
    assert to_notation(parse_notation(text)) == str(plan) == text
    assert parse_notation(text.replace(" ", "  ")) == plan


def test_the_notation_is_short():
    for text in ("0-14 x2 | 15-29", "0-29 /2", "0-14 x2/2 | 15-29 /2", "0-14 /1 + /2 | 15-29", "2", "0-29 c0-3,8"):
        assert str(Plan.parse(text)) == text


ERRORS = {
    "": (1, "expected stages"),
    "0-14 x2 | 15_29": (13, 'expected "-"'),
    "0-14 x2 | 15-": (14, "expected the last layer, got nothing"),
    "0-14 | x2": (8, "expected layers"),
    "0-14 |": (7, "expected layers"),
    "0-14 x": (7, "expected a number of replicas"),
    "0-14 x0": (7, "from 1 to 64, got 0"),
    "0-14 x99": (7, "from 1 to 64, got 99"),
    "0-14 x2 x3": (9, '"x" is given twice'),
    "0-14 x40 + x40": (1, "at most 64 replicas"),
    "0-14 /17": (7, "from 1 to 16, got 17"),
    "0-14 t0": (7, "from 1 to 1024, got 0"),
    "0-14 t1/2 /3": (6, "3 ranks, and threads or cores for 2"),
    "0-14 /2 c0": (6, "2 ranks, and threads or cores for 1"),
    "0-14 c3-1": (7, "got 3-1"),
    "0-14 c0-4096": (7, "up to 4095"),
    "0-14 c0/0": (6, "two ranks of a replica are on core 0"),
    "0-14 t3 c0,1": (6, "3 for 2 cores"),
    "0-14 @": (7, "the name of a host"),
    "0-14 @-b": (6, "host must be a name"),
    "0-14 +": (7, 'behind "+"'),
    "0-14 p1": (1, "kv_pages"),
    "0-14 x2 p5": (9, "right behind the layers"),
    "0-14 y": (6, 'expected "|"'),
    "14-0": (1, "comes after its last"),
    "0-14 | 16-20": (8, "leaves a gap; begin at 15"),
    "0-14 | 14-20": (8, "overlap; begin at 15"),
    "0-14 | * | 15-20": (12, "begin at 16 or later"),
    "0-99999": (1, "from 0 to 1023, got 99999"),
    "0-9999999999": (3, "expected the last layer"),
    "0": (1, "1 to 64 stages, got 0"),
    "65": (1, "1 to 64 stages, got 65"),
    "* | " * 64 + "*": (256, "at most 64 stages"),
    "2; speed=3": (4, "is none of channel, routing"),
    "2; lost=fail; lost=fail": (15, "is given twice"),
    "2; lost fail": (9, 'expected "="'),
    "2; lost=maybe": (9, "lost must be one of wait, fail, got 'maybe'"),
    "2; channel=tcp,shm": (12, "for each of the 1 edges, got 2"),
    "2; channel=tcp,": (16, "expected a channel"),
    "2; micro=0": (10, "micro_batches must be"),
    "2; heartbeat=99": (14, "heartbeat must be"),
    "2; heartbeat=soon": (14, "expected seconds"),
    "0-14 @b | 15-29; channel=shm": (26, "stays within the coordinator's host"),
    "2;": (3, "expected an option"),
    "0-1\n| 3-4": (7, "leaves a gap"),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_point_at_their_place(text):
    column, problem = ERRORS[text]
    with pytest.raises(ConfigError) as found:
        Plan.parse(text)
    first, shown, caret = str(found.value).split("\n")
    assert problem in first and first.startswith(f"plan, column {column}: ")
    at = len(caret) - 1
    assert caret == " " * at + "^" and at >= 2
    if column <= len(text):
        assert shown[at] == text[column - 1]


def test_a_model_s_objections_point_too():
    with pytest.raises(ConfigError) as found:
        Plan.parse("0-5 | 6-11", model(24))
    assert str(found.value).split("\n") == [
        "plan, column 7: plan covers layers 0 to 11, the model has 24; end the last stage at 23",
        "  0-5 | 6-11",
        "        ^",
    ]


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789-*|x/tcp@+,;= .abn\n", max_size=40) | st.text(max_size=20))
def test_any_text_is_a_plan_or_a_configuration_error(text):
    try:
        plan = parse_notation(text)
    except ConfigError:
        return
    assert parse_notation(str(plan)) == plan


def test_long_texts_are_refused():
    with pytest.raises(ConfigError, match=f"at most {MAX_CHARS} characters"):
        parse_notation(" " * (MAX_CHARS + 1))
