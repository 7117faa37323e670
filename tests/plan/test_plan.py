"""Plans as data: what is refused and how it is said, files, and what a model makes of them."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given, settings

from headrace.errors import ConfigError
from headrace.plan.plan import MAX_FILE_BYTES, Plan, Rank, Replica, Stage

from .plans import model, plans

TWO = (Stage(0, 5), Stage(6, 11))


def stages(*ranges: tuple[int, int] | None) -> tuple[Stage, ...]:
    return tuple(Stage() if each is None else Stage(*each) for each in ranges)


def test_a_plan_without_anything_is_one_open_stage():
    plan = Plan()
    assert plan.stages == (Stage(None, None, (Replica((Rank(None, None),), None),), None),)
    assert (plan.paths, plan.workers, plan.channels, plan.cuts) == (1, 1, (), ())


def test_lists_become_tuples_and_a_plan_can_be_hashed():
    plan = Plan([Stage(0, 5, [Replica([Rank(2, [0, 1])])]), Stage(6, 11)])  # type: ignore[arg-type]
    assert plan.stages[0].replicas[0].ranks[0].cores == (0, 1)
    assert len({plan, Plan((Stage(0, 5, (Replica((Rank(2, (0, 1)),)),)), Stage(6, 11)))}) == 1


WRONG = {
    "threads of a rank must be a whole number from 1 to 1024, got 0": lambda: Rank(threads=0),
    "threads of a rank must be a whole number from 1 to 1024, got True": lambda: Rank(threads=True),
    "threads of a rank must be a whole number from 1 to 1024, got 1025": lambda: Rank(threads=1025),
    "threads of a rank: 3 for 2 cores": lambda: Rank(threads=3, cores=(0, 1)),
    "cores of a rank name core 4 twice": lambda: Rank(cores=(4, 5, 4)),
    "a core's number must be a whole number from 0 to 4095, got 4096": lambda: Rank(cores=(4096,)),
    "cores must number from 1 to 1024, got 0": lambda: Rank(cores=()),
    "cores must be a list of int, got 3": lambda: Rank(cores=3),  # type: ignore[arg-type]
    "two ranks of a replica are on core 1": lambda: Replica((Rank(cores=(0, 1)), Rank(cores=(1,)))),
    "ranks must number from 1 to 16, got 0": lambda: Replica(()),
    "ranks must number from 1 to 16, got 17": lambda: Replica((Rank(),) * 17),
    "ranks must be a list of Rank, got [1]": lambda: Replica([1]),  # type: ignore[list-item]
    "host must be a name": lambda: Replica(host="two words"),
    "host must be a name of 1 to 253": lambda: Replica(host="a" * 254),
    "a stage has first layer 3 and no last": lambda: Stage(3),
    "a stage has last layer 3 and no first": lambda: Stage(None, 3),
    "a stage's first layer 5 comes after its last, 4": lambda: Stage(5, 4),
    "last layer of a stage must be a whole number from 0 to 1023, got 1024": lambda: Stage(0, 1024),
    "first layer of a stage must be a whole number from 0 to 1023, got -1": lambda: Stage(-1, 4),
    "replicas must number from 1 to 64, got 65": lambda: Stage(0, 1, (Replica(),) * 65),
    "kv_pages must be a whole number from 2 to 2147483647, got 1": lambda: Stage(0, 1, kv_pages=1),
    "stages must number from 1 to 64, got 0": lambda: Plan(()),
    "stages must number from 1 to 64, got 65": lambda: Plan((Stage(),) * 65),
    "stage 0 begins at layer 1; a plan begins at layer 0": lambda: Plan(stages((1, 4))),
    "stage 1 begins at layer 6 and stage 0 ends at 4, which leaves a gap": lambda: Plan(stages((0, 4), (6, 7))),
    "stage 1 begins at layer 4 and stage 0 ends at 4, so they overlap": lambda: Plan(stages((0, 4), (4, 7))),
    "stage 3 begins at layer 6, with 2 stages before it that need": lambda: Plan(stages((0, 4), None, None, (6, 7))),
    "stage 1 begins at layer 0, with 1 stages before it": lambda: Plan(stages(None, (0, 7))),
    "8192 paths lead through the stages, at most 4096": lambda: Plan((Stage(replicas=(Replica(),) * 2),) * 13),
    "the plan has 1040 in all, at most 1024": lambda: Plan(
        (Stage(0, 0, (Replica((Rank(),) * 13),) * 40), Stage(1, 1, (Replica((Rank(),) * 13),) * 40))
    ),
    "channel must be one of auto, shm, tcp, gloo, got 'udp'": lambda: Plan(TWO, "udp"),  # type: ignore[arg-type]
    "channel must be one of auto, shm, tcp, gloo, got []": lambda: Plan(TWO, ([],)),  # type: ignore[arg-type]
    "channel must be a name, or one for each of the 1 edges, got 2": lambda: Plan(TWO, ("tcp", "shm")),
    "channel must be a name, or one for each of the 1 edges, got 7": lambda: Plan(TWO, 7),  # type: ignore[arg-type]
    "channel shm stays within the coordinator's host, stages 0 and 1 are on b and the coordinator's host": lambda: Plan(
        (Stage(0, 1), Stage(2, 3, (Replica(host="b"),))), "shm"
    ),
    "routing must be one of round-robin, random, shortest-queue": lambda: Plan(TWO, routing="best"),  # type: ignore[arg-type]
    "lost must be one of wait, fail, got None": lambda: Plan(TWO, lost=None),  # type: ignore[arg-type]
    "micro_batches must be a whole number from 1 to 64, got 65": lambda: Plan(TWO, micro_batches=65),
    "heartbeat must be from 0.05 to 60.0 seconds, got 0": lambda: Plan(TWO, heartbeat=0),
    "heartbeat must be from 0.05 to 60.0 seconds, got nan": lambda: Plan(TWO, heartbeat=float("nan")),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused_by_name_and_number(message):
    with pytest.raises(ConfigError) as found:
        WRONG[message]()
    assert message in str(found.value)


def test_a_plan_is_checked_against_a_model():
    Plan(TWO).check(model(12))
    Plan(stages((0, 5), None)).check(model(7))
    with pytest.raises(ConfigError, match="plan covers layers 0 to 11, the model has 24; end the last stage at 23"):
        Plan(TWO).check(model(24))
    with pytest.raises(ConfigError, match="plan covers layers 0 to 11, the model has 10"):
        Plan(TWO).check(model(10))
    with pytest.raises(ConfigError, match="leaves 1 of the model's 7 layers to its last 2 stages; end stage 0 at 4"):
        Plan(stages((0, 5), None, None)).check(model(7))
    with pytest.raises(ConfigError, match="3 stages, the model has 2 layers"):
        Plan((Stage(),) * 3).check(model(2))
    with pytest.raises(ConfigError, match="stage 1 has 9 ranks, a layer 8 heads"):
        Plan((Stage(0, 5), Stage(6, 11, (Replica(), Replica((Rank(),) * 9))))).check(model(12))


def test_channels_between_replicas():
    here, there = Replica(), Replica(host="b")
    plan = Plan((Stage(0, 0, (here, there)), Stage(1, 1, (there,)), Stage(2, 2, (there,))))
    assert plan.channels == ("auto", "auto")
    assert [plan.channel_between(0, 0, 0), plan.channel_between(0, 1, 0), plan.channel_between(1, 0, 0)] == [
        "tcp",
        "tcp",
        "tcp",
    ]
    mixed = Plan(plan.stages, ("tcp", "gloo"))
    assert (mixed.channel_between(0, 1, 0), mixed.channel_between(1, 0, 0)) == ("tcp", "gloo")
    assert Plan(plan.stages, ("gloo", "gloo")) == Plan(plan.stages, "gloo")


def test_the_coordinator_s_host_can_have_too_many_threads():
    plan = Plan((Stage(0, 0, (Replica((Rank(2), Rank())), Replica((Rank(9),), host="b"))),))
    assert not plan.oversubscribed(3) and plan.oversubscribed(2)


@settings(max_examples=50, deadline=None)
@given(plans())
def test_files_hold_the_plan(tmp_path_factory, plan):
    folder = tmp_path_factory.mktemp("plans")
    for name in ("plan.yaml", "plan.yml", "plan.json"):
        plan.write(folder / name)
        assert Plan.read(folder / name) == Plan.parse(folder / name) == Plan.parse(str(folder / name)) == plan
    assert Plan.parse(json.loads((folder / "plan.json").read_text()) and str(plan)) == plan
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=Plan) == plan


def test_files_that_are_no_plans_say_where(tmp_path):
    path = tmp_path / "plan.yaml"
    for text, message in (
        ("stages: [{first: 0, last: 3, replicas: [{ranks: [{threads: 0}]}]}]", "got 0 - at `$.stages[0].replicas[0]"),
        ("stages: [{first: 0, last: 3, replica: []}]", "unknown field `replica` - at `$.stages[0]`"),
        ("stages: [{first: 0, last: 3}, {first: 5, last: 6}]", "leaves a gap; begin at 4"),
        ("stages: [", "plan"),
        ("- 1", "Expected `object`, got `array`"),
        ("stages: [{first: zero, last: 3}]", "got `str` - at `$.stages[0].first`"),
        ("channel: quic", "channel"),
        ("heartbeat: .nan", "heartbeat must be from 0.05"),
        ("[" * 100_000, "plan"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as found:
            Plan.parse(path)
        assert message in str(found.value) and "plan.yaml" in str(found.value)


def test_json_files_that_are_no_plans_say_where(tmp_path):
    path = tmp_path / "plan.json"
    for text, message in (
        ('{"stages": [{"first": 0, "last": 3, "kv_pages": 1}]}', "got 1 - at `$.stages[0]`"),
        ('{"stages": [', "truncated"),
        ("[" * 100_000, "plan"),
        ("stages: []", "malformed"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as found:
            Plan.parse(path)
        assert message in str(found.value) and "plan.json" in str(found.value)


def test_files_are_bounded(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(ConfigError, match=f"larger than {MAX_FILE_BYTES} bytes"):
        Plan.parse(path)
    ranks = "{ranks: &a [" + "{}," * 17 + "]}, {ranks: *a}"
    path.write_text(f"stages: [{{first: 0, last: 1, replicas: [{ranks}]}}]")
    with pytest.raises(ConfigError, match="length <= 16"):
        Plan.parse(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        Plan.parse(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"ends in \.yaml, \.yml or \.json"):
        Plan().write(tmp_path / "plan.txt")
