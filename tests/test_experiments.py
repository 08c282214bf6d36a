"""The tables of RESULTS.md: what is compared in them differs as it says, and the figures are those of the runs."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from teacherstudent.config import Config, build, load

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "examples/smoke"))

import evidence  # noqa: E402
import methods  # noqa: E402
import multiplier  # noqa: E402
from experiments import CONFIG, EXPONENTS, Experiments, climb, interval  # noqa: E402


@given(st.sampled_from(EXPONENTS), st.sampled_from(EXPONENTS))
def test_the_rate_of_the_lowest_error_is_found_from_anywhere(first: int, lowest: int) -> None:
    tried: list[int] = []

    def frame_error(exponent: int) -> float:
        tried.append(exponent)
        return float(abs(exponent - lowest))

    best, number = climb(frame_error, first)
    assert best == lowest
    assert number == len(tried) == len(set(tried))


def test_a_rate_at_which_training_diverges_is_left() -> None:
    assert climb(lambda exponent: float("inf") if exponent > -2 else -exponent, -1) == (-2, 4)


def test_an_interval_is_student_s() -> None:
    assert interval([1.0, 2.0, 3.0]) == "2.0 [-0.5, 4.5]"  # 4.303 · 1 / √3 = 2.48
    assert interval([7.0]) == "7.0"


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_of_the_evidence_is_a_valid_student_that_differs_in_what_it_says(quick: bool) -> None:
    rows = (*evidence.ROWS, *evidence.WHY)
    tables = {row.student(0): row.variant(0, quick) for row in rows}
    config = build(Config(), {"student": {"variants": tables}}, "")
    students = config.student_variants()
    [main] = [students[row.student(0)] for row in evidence.ROWS if row.name == evidence.MAIN]
    for row in rows:
        student = students[row.student(0)]
        assert (student.network, student.optimisation) == (main.network, main.optimisation)
        differing = [
            f"{section}.{name}"
            for section in ("schedule", "loss")
            for name, value in vars(getattr(student, section)).items()
            if value != vars(getattr(main, section))[name]
        ]
        changed = [f"{section}.{name}" for section, values in row.changes.items() for name in values]
        assert sorted(differing) == sorted(changed), row.name
        assert len(changed) <= 1 + (row in evidence.WHY) + (row.base == evidence.FLAT_MAIN), row.name
        little = student.schedule.final_learning_rate_ratio == 0.5
        assert ("little decay" in row.label) == little == (row.base == evidence.FLAT_MAIN)


def test_fewer_errors_are_counted_against_the_best_human_only_student_of_each_run() -> None:
    chosen = dict.fromkeys((row.name for row in evidence.ROWS), 0)
    students = {row.name: row.student(0) for row in evidence.ROWS}
    human, flat = students["human-only"], students["human-only-flat"]
    runs = []
    for final, early, rate in ((20.0, 25.0, 15.0), (30.0, 24.0, 12.0)):
        rates = {**dict.fromkeys(["teacher", *students.values()], rate), students["flat"]: 2 * rate}
        rates |= {
            f"{human}-final": final,
            f"{human}-early": early,
            f"{flat}-final": 40.0,
            f"{flat}-early": 26.0,
        }
        runs.append({name: dict.fromkeys(("all", "clean", "noisy"), value) for name, value in rates.items()})
    lines = evidence.tables(runs, chosen).splitlines()
    rates, fewer = (line.split("|") for line in lines if "sources mixed" in line)
    assert rates[3].startswith(" 13.5 [")
    assert fewer[2].startswith(" 37.5 [")  # of 25 % and 50 %
    assert fewer[5].startswith(" 0.0 [")  # as many as the main row
    _, fewer = (
        line.split("|") for line in lines if line.startswith("| (c) one source after the other, little")
    )
    assert fewer[2].startswith(" 37.5 [")
    assert fewer[5].startswith(" 50.0 [")  # half as many as the interleaved one with little decay
    assert lines[-2] == (
        "fewer errors, %, interleaved, little decay against one source after the other, little decay: "
        "all -100.0 [-100.0, -100.0], clean -100.0 [-100.0, -100.0], noisy -100.0 [-100.0, -100.0]"
    )


def test_the_noisy_rate_is_the_mean_of_the_noisy_conditions() -> None:
    conditions = {"all": 9.0, "clean": 1.0, "20dB": 10.0, "10dB": 20.0}
    system = {"conditions": {name: {"word_error_rate": rate} for name, rate in conditions.items()}}
    assert evidence.word_error_rates(system) == {"all": 9.0, "clean": 1.0, "noisy": 15.0}


def test_every_cell_of_the_methods_is_a_valid_student_and_all_read_as_much() -> None:
    options = Namespace(workers=[1, 4, 16, 64], methods=methods.METHODS, micro_batches=6144, filled=3)
    cells = methods.list_cells(options)
    tables = {cell.name(exponent): cell.variant(exponent) for cell in cells for exponent in EXPONENTS}
    config = build(Config(), {"student": {"variants": tables}}, "")
    for student in config.student_variants().values():
        assert student.workers * student.schedule.steps == 6144
        optimisation = student.optimisation
        if optimisation.method in ("bmuf", "two-tiers"):
            assert optimisation.block_momentum is not None
            blocks = student.schedule.steps // optimisation.block_steps
            assert blocks >= 3 / (1 - optimisation.block_momentum) - 1e-9


def test_a_configuration_is_the_smoke_experiment_s_but_for_what_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = Experiments(tmp_path, {5: 9}, {"label": {"k": 0}, "corpus": {"unlabelled_speakers": 32}})
    called: list[str] = []
    monkeypatch.setattr(runs, "_call", lambda seed, step: called.append(step))
    runs.prepare(5, {"one": {"workers": 3}}, last="senones")
    assert called == ["corpus", "prepare", "align", "senones"]
    made, smoke = load(tmp_path / "seed5.toml"), load(CONFIG)
    assert (made.seed, made.corpus.split, made.corpus.unlabelled_speakers, made.label.k) == (5, 9, 32, 0)
    assert list(made.student_variants()) == ["one"]
    assert (made.teacher, made.corpus.human_speakers) == (smoke.teacher, smoke.corpus.human_speakers)


def test_every_student_of_the_multipliers_is_valid_and_compared_with_multiplier_1_under_its_teacher() -> None:
    students = multiplier.STUDENTS
    tables = {student.name: student.row.variant(0, quick=False) for student in students}
    config = build(Config(), {"student": {"variants": tables}}, "").student_variants()
    chosen = dict.fromkeys(students, 0)
    rates = {"good": 9.0, "poor": 20.0}
    for student in students:
        schedule = config[student.name].schedule
        assert (schedule.machine_turn_steps, schedule.human_turn_steps) == (student.turn, 1)
        assert schedule.human_learning_rate_multiplier == student.multiplier
        rates[student.name] = 10.0 * student.turn / student.multiplier
    run = {name: dict.fromkeys(("frames", "all"), rate) for name, rate in rates.items()}
    lines = multiplier.table([run], chosen).splitlines()[4:]
    for student, line in zip(students, lines, strict=True):
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[5] == f"{10.0 * student.turn / student.multiplier:.1f}"
        assert cells[7] == ("" if student.multiplier == 1 else f"{100 - 100 / student.multiplier:.1f}")
