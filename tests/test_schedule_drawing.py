"""A schedule can be seen before anything runs."""

import pytest

from teacherstudent.config import Schedule
from teacherstudent.training.schedule import Plan
from teacherstudent.training.schedule_drawing import draw_learning_rates, draw_turns


def pictures(plan: Plan, width: int, height: int = 1) -> dict[str, list[str]]:
    """By source: its rows without labels, the axis last."""
    lines = draw_learning_rates(plan, width, height)
    size = height + 1
    blocks = [lines[i : i + size] for i in range(0, len(lines), size)]
    return {block[0].split()[0]: [line[17:] for line in block] for block in blocks}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("interleaved", "mmhmmhm"), ("sequential", "mmmmmhh"), ("mixed", "xxxxxxx"), ("human-only", "hhhhhhh")],
)
def test_a_letter_stands_for_each_step(mode: str, expected: str) -> None:
    plan = Plan(Schedule(mode=mode, steps=7, machine_turn_steps=2), 0.1)  # type: ignore[arg-type]
    assert draw_turns(plan) == expected
    assert draw_turns(plan, 3) == expected[:3]


def test_a_column_shows_the_rate_of_the_source_there_on_a_scale_of_both() -> None:
    schedule = Schedule(steps=8, machine_turn_steps=1, validate_every_steps=4, final_learning_rate_ratio=1.0)
    drawn = pictures(Plan(schedule, 0.1), 8)
    assert drawn == {"human": [" █ █ █ █", "───┴───┴"], "machine": ["▄ ▄ ▄ ▄", "───┴───┴"]}


def test_a_halving_rate_halves_the_blocks_over_all_rows() -> None:
    schedule = Schedule(mode="human-only", steps=4, final_learning_rate_ratio=1 / 8, validate_every_steps=1)
    drawn = pictures(Plan(schedule, 0.1), 4, height=2)
    assert drawn["human"] == ["█", "██▄▂", "────"]


def test_sources_one_after_the_other_leave_their_columns_to_each_other() -> None:
    schedule = Schedule(
        mode="sequential", steps=4000, final_learning_rate_ratio=1.0, sequence="human-machine"
    )
    drawn = pictures(Plan(schedule, 0.1), 8)
    assert drawn["human"][0].strip() == "██"
    assert drawn["machine"][0] == "  ▄▄▄▄▄▄"


def test_a_billion_steps_are_drawn_at_once() -> None:
    schedule = Schedule(steps=10**9, machine_turn_steps=10**6, human_turn_steps=10**6)
    assert len(draw_learning_rates(Plan(schedule, 0.1))) == 10
