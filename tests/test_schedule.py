"""The schedule is data: every step has one source and one learning rate, known before anything runs."""

import dataclasses
import itertools
import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from teacherstudent.config import Optimisation, Schedule, Student
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


MODES = ("interleaved", "sequential", "mixed", "human-only", "machine-only")
schedules = st.builds(
    Schedule,
    mode=st.sampled_from(MODES),
    steps=st.integers(1, 40),
    machine_turn_steps=st.integers(1, 7),
    human_turn_steps=st.integers(1, 7),
    sequence=st.sampled_from(["machine-human", "human-machine"]),
    validate_every_steps=st.integers(1, 15),
)


@settings(max_examples=60, deadline=None)
@given(schedule=schedules)
def test_steps_are_counted_and_found_as_walking_through_them_finds_them(schedule: Schedule) -> None:
    plan = Plan(schedule, 0.1)
    taken = [{portion.source for portion in step.portions} for step in steps(plan)]
    for source in ("human", "machine"):
        places = [place for place, sources in enumerate(taken) if source in sources]
        assert plan.num_steps(source) == len(places)
        for step in range(len(plan)):
            expected = next((place for place in places if place >= step), None)
            found = plan.next_step(source, step)
            assert found == expected if expected is not None else found >= len(plan)


@settings(max_examples=60, deadline=None)
@given(schedule=schedules)
def test_sequential_takes_one_source_after_the_other_as_often_as_interleaved_takes_it(
    schedule: Schedule,
) -> None:
    sequential = steps(Plan(dataclasses.replace(schedule, mode="sequential"), 0.1))
    interleaved = steps(Plan(dataclasses.replace(schedule, mode="interleaved"), 0.1))
    order = [step.source for step in sequential]
    assert sorted(order) == sorted(step.source for step in interleaved)
    assert len(list(itertools.groupby(order))) <= 2
    assert order[0] == schedule.sequence.split("-")[0] or len(set(order)) == 1
    for now, then in zip(sequential, interleaved, strict=True):
        assert now.base_learning_rate == then.base_learning_rate


def test_mixed_takes_both_in_every_step_each_with_the_share_of_its_turns() -> None:
    schedule = Schedule(mode="mixed", steps=5, machine_turn_steps=3, human_turn_steps=1)
    plan = Plan(schedule, 0.1)
    for step in steps(plan):
        assert {portion.source for portion in step.portions} == {"human", "machine"}
    assert (plan.batch_frames("machine", 4000), plan.batch_frames("human", 4000)) == (3000, 1000)
    assert Plan(dataclasses.replace(schedule, mode="interleaved"), 0.1).batch_frames("human", 4000) == 4000
    for source in ("human", "machine"):  # never nothing
        assert Plan(dataclasses.replace(schedule, machine_turn_steps=500), 0.1).batch_frames(source, 3) >= 1


@pytest.mark.parametrize("mode", MODES)
def test_each_source_has_its_own_multiplier_and_loss_weight_where_there_are_two(mode: str) -> None:
    schedule = Schedule(
        mode=mode,  # type: ignore[arg-type]
        steps=12,
        human_learning_rate_multiplier=4.0,
        machine_learning_rate_multiplier=0.5,
        human_loss_weight=3.0,
        machine_loss_weight=0.25,
    )
    for step in steps(Plan(schedule, 0.1)):
        for portion in step.portions:
            human = portion.source == "human"
            multiplier, weight = ((4.0, 3.0) if human else (0.5, 0.25)) if "only" not in mode else (1.0, 1.0)
            assert portion.learning_rate == step.base_learning_rate * multiplier
            if mode == "mixed":
                assert (step.multiplier, portion.loss_weight) == (1.0, weight * multiplier)
            else:
                assert (step.multiplier, portion.loss_weight) == (multiplier, weight)
                assert step.learning_rate == portion.learning_rate


@settings(max_examples=60, deadline=None)
@given(schedule=schedules, ratio=st.floats(1e-4, 1))
def test_with_decay_by_sub_epoch_the_rate_is_constant_in_each_and_falls_evenly_between_them(
    schedule: Schedule, ratio: float
) -> None:
    schedule = dataclasses.replace(schedule, decay="sub-epoch", final_learning_rate_ratio=ratio)
    plan = Plan(schedule, 0.4)
    rates = [
        {plan[step].base_learning_rate for step in range(begin, min(begin + size, len(plan)))}
        for size in [schedule.validate_every_steps]
        for begin in range(0, len(plan), size)
    ]
    assert len(rates) == plan.num_sub_epochs
    assert all(len(each) == 1 for each in rates)
    row = [each.pop() for each in rates]
    assert row[0] == 0.4
    assert row[-1] == pytest.approx(0.4 * ratio) or len(row) == 1
    for before, after in itertools.pairwise(row):
        assert after / before == pytest.approx(ratio ** (1 / (len(row) - 1)))


def student(method: str = "bmuf", block_steps: int = 4, exact_steps: int = 0, **schedule: object) -> Student:
    optimisation = Optimisation(method=method, block_steps=block_steps, exact_steps=exact_steps)  # type: ignore[arg-type]
    aligned = {"align_turns_to_blocks": True, "machine_turn_steps": 8, "human_turn_steps": 4, "steps": 40}
    return Student(
        schedule=Schedule(**{**aligned, "validate_every_steps": 8, **schedule}),  # type: ignore[arg-type]
        optimisation=optimisation,
    )


@pytest.mark.parametrize(
    ("changed", "name", "value", "such_as"),
    [
        ({"machine_turn_steps": 6}, "schedule.machine_turn_steps", 6, "4 or 8"),
        ({"human_turn_steps": 3}, "schedule.human_turn_steps", 3, "such as 4,"),
        ({"validate_every_steps": 10}, "schedule.validate_every_steps", 10, "8 or 12"),
        ({"exact_steps": 5}, "optimisation.exact_steps", 5, "4 or 8"),
        ({"mode": "sequential", "steps": 41}, "schedule.steps", 41, "40 or 44"),
        ({"method": "two-tiers", "human_turn_steps": 9}, "schedule.human_turn_steps", 9, "8 or 12"),
    ],
)
def test_turns_that_are_no_whole_blocks_are_refused_with_both_numbers(
    changed: dict[str, object], name: str, value: int, such_as: str
) -> None:
    with pytest.raises(ValueError) as error:
        student(**changed)  # type: ignore[arg-type]
    message = str(error.value)
    assert f"student.{name} = {value}" in message
    assert "block_steps = 4" in message
    assert such_as in message


@settings(max_examples=60, deadline=None)
@given(schedule=schedules, block_steps=st.integers(1, 5), exact_steps=st.integers(0, 5))
def test_aligned_blocks_hold_steps_of_one_source(
    schedule: Schedule, block_steps: int, exact_steps: int
) -> None:
    aligned = dataclasses.replace(schedule, align_turns_to_blocks=True)
    try:
        aligned.check_blocks(block_steps, exact_steps, "student")
    except ValueError:
        assume(False)
    plan = Plan(aligned, 0.1)
    for begin in range(exact_steps, len(plan), block_steps):
        assert len({plan[step].source for step in range(begin, min(begin + block_steps, len(plan)))}) == 1


def test_turns_of_any_length_go_with_methods_that_have_no_blocks_and_where_alignment_is_off() -> None:
    assert student(method="gtc", human_turn_steps=3).schedule.human_turn_steps == 3
    assert student(align_turns_to_blocks=False, human_turn_steps=3).schedule.human_turn_steps == 3


def test_an_unknown_mode_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ValueError, match=r"schedule\.mode = 'shuffled': it must be one of interleaved, .*mixed"
    ):
        Plan(Schedule(mode="shuffled"), 0.1)  # type: ignore[arg-type]


def test_the_description_tells_the_modes_apart() -> None:
    told = {mode: Plan(Schedule(mode=mode, steps=100), 0.1).describe() for mode in MODES}  # type: ignore[arg-type]
    assert "75 machine-labelled then 25 human-labelled steps, human at 2 x" in told["sequential"]
    assert "3 machine-labelled frames to 1 human-labelled in every step" in told["mixed"]
    weighted = Schedule(machine_learning_rate_multiplier=0.5, machine_loss_weight=0.25, decay="sub-epoch")
    text = Plan(weighted, 0.1).describe()
    for part in ("machine at 0.5 x", "machine loss times 0.25", "constant in a sub-epoch"):
        assert part in text
