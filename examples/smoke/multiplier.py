"""When a higher learning rate on human labels pays: by the share of human-labelled steps, and by the teacher.

    python examples/smoke/multiplier.py [--seeds 3 4 5 6 7] [--folder experiments/multiplier]
        [--teachers good poor]

The interleaved students of evidence.py with little decay, after a good teacher or a poor one, trained for less. Each
has a learning rate of its own, chosen as there, and is compared with multiplier 1 under the same teacher and turns, in
frame errors on the development speakers and in words on the test speakers of seeds that no choice has seen.
"""

import argparse
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from evidence import CHOICE_SEED, FIRST_EXPONENT, FLAT, SPLITS, Rates, Row, make_settings, word_error_rates
from experiments import EXPONENTS, JOBS, ROOT, Experiments, Tables, climb, interval

TEACHERS = {"good": 500, "poor": 150}  # steps of training


@dataclass(frozen=True)
class Student:
    teacher: str
    turn: int  # machine-labelled steps to one human-labelled
    multiplier: int

    @property
    def name(self) -> str:
        return f"{self.teacher}-turns{self.turn}-times{self.multiplier}"

    @property
    def row(self) -> Row:
        changes = {
            "machine_turn_steps": self.turn,
            "human_learning_rate_multiplier": float(self.multiplier),
        }
        return Row(self.name, "", {"schedule": changes | FLAT})


STUDENTS = (
    *(Student("good", turn, multiplier) for turn in (3, 9, 19) for multiplier in (1, 2)),
    *(Student("poor", 3, multiplier) for multiplier in (1, 2, 4)),
)


class Comparison:
    """Every seed once for each teacher."""

    def __init__(self, folder: Path, students: list[Student]) -> None:
        self.students = students
        self._experiments = {
            teacher: Experiments(folder / teacher, SPLITS, make_settings() | {"teacher": _teacher(steps)})
            for teacher, steps in TEACHERS.items()
            if any(student.teacher == teacher for student in students)
        }

    def prepare(self, seed: int, exponents: Mapping[Student, list[int]]) -> None:
        for teacher, experiments in self._experiments.items():
            variants = {
                student.row.student(exponent): student.row.variant(exponent, quick=False)
                for student in self.students
                if student.teacher == teacher
                for exponent in exponents[student]
            }
            experiments.prepare(seed, variants)

    def frame_error(self, student: Student, exponent: int, seed: int) -> float:
        return self._experiments[student.teacher].frame_error(student.row.student(exponent), seed)

    def run(self, seed: int, chosen: Mapping[Student, int]) -> Rates:
        """By teacher and student: error rates, of frames and by condition of words."""
        self.prepare(seed, {student: [exponent] for student, exponent in chosen.items()})
        with ThreadPoolExecutor(JOBS) as pool:
            frames = pool.map(lambda student: self.frame_error(student, chosen[student], seed), self.students)
            frame_errors = dict(zip(self.students, frames, strict=True))
        found: Rates = {}
        for teacher, experiments in self._experiments.items():
            systems = experiments.evaluate(seed)
            frame_error = min(experiments.validations("teacher", seed, "dev_frame_error"))
            found[teacher] = {"frames": frame_error} | word_error_rates(systems["teacher"])
            for student in self.students:
                if student.teacher == teacher:
                    words = word_error_rates(systems[student.row.student(chosen[student])])
                    found[student.name] = {"frames": frame_errors[student]} | words
        return found


def _teacher(steps: int) -> Tables:
    """That of smoke.toml, trained for so many steps."""
    schedule = {"steps": steps, "warmup_steps": 30, "final_learning_rate_ratio": 0.05}
    return {"schedule": schedule | {"validate_every_steps": steps // 5}}


def table(runs: list[Rates], chosen: Mapping[Student, int]) -> str:
    """Markdown: error rates, and how many errors fewer than with multiplier 1, in per cent of them."""
    conditions = list(runs[0][next(iter(chosen)).name])
    heads = ["teacher's steps", "turns", "multiplier", "learning rate", *conditions]
    heads += [f"fewer: {condition}" for condition in conditions]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---:'] * 4 + ['---'] * (len(heads) - 4))} |"]
    for teacher in dict.fromkeys(student.teacher for student in chosen):
        cells = [str(TEACHERS[teacher]), "the teacher", "", "", *_own(runs, teacher)]
        lines.append(f"| {' | '.join(cells + [''] * len(conditions))} |")
    for student, exponent in chosen.items():
        even = Student(student.teacher, student.turn, 1)
        cells = [
            str(TEACHERS[student.teacher]),
            str(student.turn),
            str(student.multiplier),
            f"{2.0**exponent:g}",
        ]
        cells += _own(runs, student.name)
        for condition in conditions:
            gains = [100 * (1 - run[student.name][condition] / run[even.name][condition]) for run in runs]
            cells.append(interval(gains) if student != even else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _own(runs: list[Rates], name: str) -> list[str]:
    return [interval([run[name][condition] for run in runs]) for condition in runs[0][name]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[3, 4, 5, 6, 7])
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments/multiplier")
    parser.add_argument("--teachers", nargs="+", choices=list(TEACHERS), default=list(TEACHERS))
    options = parser.parse_args()
    students = [student for student in STUDENTS if student.teacher in options.teachers]
    comparison = Comparison(options.folder, students)
    comparison.prepare(CHOICE_SEED, {student: list(EXPONENTS) for student in students})

    def choose(student: Student) -> int:
        def frame_error(exponent: int) -> float:
            return comparison.frame_error(student, exponent, CHOICE_SEED)

        best, _ = climb(frame_error, FIRST_EXPONENT)
        print(
            f"{student.name}: learning rate {2.0**best:g}, frame error {frame_error(best):.1f} %", flush=True
        )
        return best

    with ThreadPoolExecutor(JOBS) as pool:
        chosen = dict(zip(students, pool.map(choose, students), strict=True))
    runs: list[Rates] = []
    for seed in options.seeds:
        runs.append(comparison.run(seed, chosen))
        print(f"\nseeds {options.seeds[: len(runs)]}\n\n{table(runs, chosen)}\n", flush=True)


if __name__ == "__main__":
    main()
