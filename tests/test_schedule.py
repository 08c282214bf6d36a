"""The schedule is data: every step has one source and one learning rate, known before anything runs."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.config import Schedule
from teacherstudent.training.schedule import Plan, Step


def steps(plan: Plan) -> list[Step]:
    return [plan[step] for step in range(len(plan))]


@pytest.mark.parametrize(
    "machine, human, expected",
    [(3, 1, "mmmhmmmhmm"), (1, 1, "mhmhmhmhmh"), (2, 3, "mmhhhmmhhh"), (20, 1, "mmmmmmmmmm")],
)
def test_sources_take_turns_beginning_with_the_machine_labelled(
    machine: int, human: int, expected: str
) -> None:
    plan = Plan(Schedule(steps=10, machine_turn_steps=machine, human_turn_steps=human), 0.1)
    assert "".join(step.source[0] for step in steps(plan)) == expected
    assert set(plan.sources) == {"human", "machine"}


@pytest.mark.parametrize("mode, source", [("human-only", "human"), ("machine-only", "machine")])
def test_a_single_source_takes_every_step_at_the_plain_learning_rate(mode: str, source: str) -> None:
    schedule = Schedule(mode=mode, steps=8, human_learning_rate_multiplier=5.0)  # type: ignore[arg-type]
    plan = Plan(schedule, 0.1)
    assert plan.sources == (source,)
    assert {step.source for step in steps(plan)} == {source}
    assert plan[0].learning_rate == 0.1
    assert plan[7].learning_rate == pytest.approx(0.01)


@settings(max_examples=50, deadline=None)
@given(
    multiplier=st.floats(0.01, 100),
    ratio=st.floats(1e-6, 1),
    rate=st.floats(1e-6, 10),
    warmup=st.integers(0, 29),
    turns=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_human_steps_have_exactly_the_multiple_of_what_machine_steps_would_have_there(
    multiplier: float, ratio: float, rate: float, warmup: int, turns: tuple[int, int]
) -> None:
    interleaved = Schedule(
        steps=30,
        machine_turn_steps=turns[0],
        human_turn_steps=turns[1],
        human_learning_rate_multiplier=multiplier,
        final_learning_rate_ratio=ratio,
        warmup_steps=warmup,
    )
    plain = Plan(dataclasses.replace(interleaved, mode="machine-only"), rate)
    for now, reference in zip(steps(Plan(interleaved, rate)), steps(plain), strict=True):
        factor = multiplier if now.source == "human" else 1.0
        assert now.learning_rate == reference.learning_rate * factor


@pytest.mark.parametrize("ratio", [1.0, 0.1, 1e-4])
def test_the_decay_is_exponential_from_the_given_rate_to_the_given_share_of_it(ratio: float) -> None:
    plan = Plan(Schedule(mode="human-only", steps=51, final_learning_rate_ratio=ratio), 0.4)
    rates = [step.learning_rate for step in steps(plan)]
    assert rates[0] == 0.4
    assert rates[-1] == 0.4 * ratio
    for before, after in itertools.pairwise(rates):
        assert after / before == pytest.approx(ratio ** (1 / 50))


def test_one_step_has_the_given_rate() -> None:
    (step,) = steps(Plan(Schedule(mode="human-only", steps=1), 0.4))
    assert step.learning_rate == 0.4


def test_the_warm_up_rises_evenly_to_the_decay_and_leaves_it_alone_afterwards() -> None:
    schedule = Schedule(mode="human-only", steps=20, warmup_steps=4)
    cold = Plan(dataclasses.replace(schedule, warmup_steps=0), 0.1)
    shares = [
        warm.learning_rate / plain.learning_rate
        for warm, plain in zip(steps(Plan(schedule, 0.1)), steps(cold), strict=True)
    ]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert set(shares[4:]) == {1.0}


def test_a_step_is_the_same_whenever_it_is_asked_for() -> None:
    plan = Plan(Schedule(steps=20, warmup_steps=3), 0.1)
    assert [plan[step] for step in reversed(range(20))][::-1] == steps(plan)


@pytest.mark.parametrize("step", [-1, 20])
def test_there_is_no_step_before_the_first_or_after_the_last(step: int) -> None:
    plan = Plan(Schedule(steps=20), 0.1)
    with pytest.raises(IndexError):
        plan[step]


@pytest.mark.parametrize(
    "name, value",
    [
        ("steps", 0),
        ("machine_turn_steps", 0),
        ("human_turn_steps", -1),
        ("human_learning_rate_multiplier", 0.0),
        ("final_learning_rate_ratio", 0.0),
        ("final_learning_rate_ratio", 1.5),
        ("warmup_steps", -1),
        ("warmup_steps", 10),
        ("validate_every_steps", 0),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name_with_what_it_must_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"schedule.{name} = {value!r}: it must be "):
        dataclasses.replace(Schedule(steps=10), **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [0.0, -0.1, math.nan])
def test_a_learning_rate_that_is_not_above_zero_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"learning_rate = .*> 0"):
        Plan(Schedule(), rate)


def test_the_description_names_turns_multiplier_and_rates() -> None:
    text = Plan(Schedule(steps=100, warmup_steps=10, human_turn_steps=2), 0.1).describe()
    for part in ("interleaved", "3 machine", "2 human", "2 x", "100 steps", "to 0.01", "warm-up over 10"):
        assert part in text
    assert "human-labelled steps only" in Plan(Schedule(mode="human-only"), 0.1).describe()
