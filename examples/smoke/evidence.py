"""What scheduled learning brings: machine labels by their amount, the schedule, the multiplier, the kept posteriors.

    python examples/smoke/evidence.py [--seeds 3 4 5 6 7] [--folder experiments/evidence] [--quick | --why]
        [--human-minutes 20]

On the smoke experiment's corpus with ten times as much unlabelled as human-labelled speech, exact averaging, one
worker. Every row differs from "interleaved" in what it says, and has a learning rate of its own: a power of two, moved
by a factor of two for as long as the frame error on the development speakers of seed 0, split 0, falls. All students
take as many steps with as many frames. The table is of other seeds, each with speakers of its own (split = seed + 2),
which no choice has seen.

--why compares further students on the development speakers of seed 0 alone, for the reasons of what the table shows;
with --human-minutes 100 (and another --folder) the same where human labels are not as few.

--quick walks the same way in minutes, on one seed, little speech and short trainings at rates that are not chosen: it
shows that the way is whole, and nothing of the method.
"""

import argparse
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import EXPONENTS, JOBS, ROOT, Experiments, Tables, climb, interval

CHOICE_SEED = 0
HUMAN_MINUTES, SHARD_MINUTES, TIMES = 20.0, 10.0, 10
STEPS, BATCH_FRAMES, FIRST_EXPONENT = 1200, 1600, 0
SPLITS = {seed: seed + 2 if seed != CHOICE_SEED else 0 for seed in range(1000)}  # of the speakers
MAIN = "interleaved"
FLAT_MAIN = "flat"
FLAT: dict[str, Any] = {"final_learning_rate_ratio": 0.5}  # little decay; 0.05 in the other rows
DENSE = "dense"  # learns from targets of its own

Rates = dict[str, dict[str, float]]  # of a run, by system, then by condition


@dataclass(frozen=True)
class Row:
    """A student that differs from the main one in `changes`."""

    name: str
    label: str
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def base(self) -> str:
        """The interleaved row with as much decay."""
        return FLAT_MAIN if self.changes.get("schedule", {}).items() >= FLAT.items() else MAIN

    def student(self, exponent: int) -> str:
        return f"{self.name}-r{exponent - EXPONENTS.start}"

    def variant(self, exponent: int, quick: bool) -> Tables:
        steps = STEPS // 8 if quick else STEPS
        tables: Tables = {
            "workers": 1,
            "schedule": {
                "steps": steps,
                "warmup_steps": 30,
                "final_learning_rate_ratio": 0.05,
                "validate_every_steps": steps // 6,
            },
            "optimisation": {
                "method": "exact",
                "learning_rate": 2.0**exponent,
                "batch_frames": BATCH_FRAMES,
            },
        }
        for section, values in self.changes.items():
            tables[section] = tables.get(section, {}) | dict(values)
        return tables


def count_shards(times: int) -> int:
    return round(times * HUMAN_MINUTES / SHARD_MINUTES)


ROWS = (
    Row("human-only", "(a) human labels only", {"schedule": {"mode": "human-only"}}),
    Row("machine-1x", "(b) 1 x machine labels", {"schedule": {"machine_shards": count_shards(1)}}),
    Row("machine-3x", "(b) 3 x machine labels", {"schedule": {"machine_shards": count_shards(3)}}),
    Row(MAIN, "(b) 10 x machine labels, interleaved, multiplier 2, top 20"),
    Row("sequential", "(c) one source after the other", {"schedule": {"mode": "sequential"}}),
    Row("mixed", "(c) sources mixed in every batch", {"schedule": {"mode": "mixed"}}),
    Row("multiplier-1", "(d) multiplier 1", {"schedule": {"human_learning_rate_multiplier": 1.0}}),
    Row("multiplier-4", "(d) multiplier 4", {"schedule": {"human_learning_rate_multiplier": 4.0}}),
    Row("top-1", "(e) the best posterior alone", {"loss": {"kept": 1}}),
    Row("top-5", "(e) the best 5", {"loss": {"kept": 5}}),
    Row(
        "human-only-flat", "(a) human labels only, little decay", {"schedule": {"mode": "human-only"} | FLAT}
    ),
    Row(FLAT_MAIN, "(c) interleaved, little decay", {"schedule": FLAT}),
    Row(
        "sequential-flat",
        "(c) one source after the other, little decay",
        {"schedule": {"mode": "sequential"} | FLAT},
    ),
    Row(
        "even-flat",
        "(d) multiplier 1, little decay",
        {"schedule": {"human_learning_rate_multiplier": 1.0} | FLAT},
    ),
    Row(DENSE, "(e) all posteriors"),
)

PAIRS = ((FLAT_MAIN, "sequential-flat"), (FLAT_MAIN, "sequential"))  # the first against the second
COMPARED = ("human-only", MAIN, "sequential", "multiplier-1")  # with these,
COMPARED += tuple(row.name for row in ROWS if row.base == FLAT_MAIN)  # and with all that have little decay
WHY = (
    Row("turns-9", "turns of 9 machine-labelled steps, not 3", {"schedule": {"machine_turn_steps": 9}}),
    Row(
        "turns-9-even",
        "turns of 9, multiplier 1",
        {"schedule": {"machine_turn_steps": 9, "human_learning_rate_multiplier": 1.0}},
    ),
    Row(
        "human-first",
        "human-labelled steps first",
        {"schedule": {"mode": "sequential", "sequence": "human-machine"}},
    ),
    Row(
        "human-first-flat",
        "human-labelled steps first, little decay",
        {"schedule": {"mode": "sequential", "sequence": "human-machine"} | FLAT},
    ),
    Row("decay-0.01", "decay to 0.01, not 0.05", {"schedule": {"final_learning_rate_ratio": 0.01}}),
)


def make_settings(quick: bool = False, human_minutes: float = HUMAN_MINUTES) -> dict[str, dict[str, Any]]:
    """Of the corpus and of decoding, over those of smoke.toml."""
    scale = 0.25 if quick else 1.0
    corpus = {
        "unlabelled_speakers": 32,
        "human_minutes": scale * human_minutes,
        "unlabelled_minutes": scale * TIMES * HUMAN_MINUTES,
        "shard_minutes": scale * SHARD_MINUTES,
        "dev_minutes": 1.0 if quick else 3.0,
    }
    return {
        "corpus": corpus | ({"test_minutes": 1.0} if quick else {}),
        "decode": {"acoustic_scales": [0.15, 0.2, 0.3, 0.45], "beam": 12.0, "max_active": 2000}
        | {"speed_seconds": 0.0},
    }


class Evidence:
    """Every seed twice: with the 20 best posteriors, and, from the same teacher, with all of them."""

    def __init__(self, folder: Path, quick: bool, human_minutes: float = HUMAN_MINUTES) -> None:
        settings = make_settings(quick, human_minutes)
        self._quick = quick
        self._kept = Experiments(folder / "top20", SPLITS, settings)
        self._dense = Experiments(folder / "dense", SPLITS, settings | {"label": {"k": 0}})

    def of(self, row: Row) -> Experiments:
        return self._dense if row.name == DENSE else self._kept

    def prepare(self, seed: int, exponents: Mapping[str, list[int]]) -> None:
        """exponents: of each row by name."""
        variants = {
            row.name: {row.student(e): row.variant(e, self._quick) for e in exponents[row.name]}
            for row in (*ROWS, *WHY)
            if row.name in exponents
        }
        kept = {
            name: table
            for row, students in variants.items()
            if row != DENSE
            for name, table in students.items()
        }
        self._kept.prepare(seed, kept, last="teacher")
        if not self._dense.path(seed).is_dir():
            shutil.copytree(self._kept.path(seed), self._dense.path(seed))
        self._kept.prepare(seed, kept)
        self._dense.prepare(seed, variants[DENSE])

    def choose(self, row: Row) -> tuple[int, int]:
        """The exponent of its learning rate, and how many were tried."""

        def frame_error(exponent: int) -> float:
            return self.of(row).frame_error(row.student(exponent), CHOICE_SEED)

        best, number = climb(frame_error, FIRST_EXPONENT)
        print(f"{row.name}: learning rate {2.0**best:g}, frame error {frame_error(best):.1f} %", flush=True)
        return best, number

    def run(self, seed: int, chosen: Mapping[str, int]) -> Rates:
        """Word error rates by row, then by condition; noisy: the mean of those with noise."""
        self.prepare(seed, {name: [exponent] for name, exponent in chosen.items()})
        with ThreadPoolExecutor(JOBS) as pool:
            list(pool.map(lambda row: self.of(row).frame_error(row.student(chosen[row.name]), seed), ROWS))
        systems = self._kept.evaluate(seed)
        systems |= self._dense.evaluate(seed, f"decode.only={ROWS[-1].student(chosen[DENSE])}")
        return {name: word_error_rates(system) for name, system in systems.items()}


def word_error_rates(system: Tables) -> dict[str, float]:
    rates = {name: part["word_error_rate"] for name, part in system["conditions"].items()}
    noisy = [rate for name, rate in rates.items() if name not in ("all", "clean")]
    return {"all": rates["all"], "clean": rates["clean"], "noisy": sum(noisy) / len(noisy)}


def tables(runs: list[Rates], chosen: Mapping[str, int]) -> str:
    """Markdown: word error rates; then how many fewer errors than the best human-only student of each run, and than
    the interleaved one with as much decay.
    """
    systems = list(_systems(chosen))
    human_only = [system for system, _, _, _ in systems if system.startswith("human-only")]
    conditions = list(runs[0]["teacher"])
    rates = [
        f"| word error rate, % | learning rate | {' | '.join(conditions)} |",
        "| --- | ---: |" + " --- |" * 3,
    ]
    heads = [f"than {base}: {condition}" for base in ("human-only", MAIN) for condition in conditions]
    fewer = [f"| fewer errors, % | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for system, label, rate, base in systems:
        own = [interval([run[system][condition] for run in runs]) for condition in conditions]
        rates.append(f"| {label} | {rate} | {' | '.join(own)} |")
        gains = [
            "" if system in bases else _fewer(runs, system, bases, condition)
            for bases in (human_only, [base])
            for condition in conditions
        ]
        fewer.append(f"| {label} | {' | '.join(gains)} |")
    return "\n".join([*rates, "", *fewer, "", *_compare_pairs(runs, chosen)])


def _compare_pairs(runs: list[Rates], chosen: Mapping[str, int]) -> Iterator[str]:
    rows = {row.name: row for row in ROWS}
    for pair in PAIRS:
        ours, other = (rows[name].student(chosen[name]) for name in pair)
        labels = " against ".join(rows[name].label.removeprefix("(c) ") for name in pair)
        figures = [f"{name} {_fewer(runs, ours, [other], name)}" for name in runs[0]["teacher"]]
        yield f"fewer errors, %, {labels}: {', '.join(figures)}"


def _systems(chosen: Mapping[str, int]) -> Iterator[tuple[str, str, str, str]]:
    """Name, label, learning rate and interleaved system of each row of the tables."""
    students = {row.name: row.student(chosen[row.name]) for row in ROWS}
    for row in ROWS:
        student, rate, base = students[row.name], f"{2.0 ** chosen[row.name]:g}", students[row.base]
        if row.name.startswith("human-only"):
            yield f"{student}-final", f"{row.label}, as many updates", rate, base
            yield f"{student}-early", f"{row.label}, early-stopped", rate, base
        else:
            yield student, row.label, rate, base
    yield "teacher", "(f) the teacher", "", students[MAIN]


def _fewer(runs: list[Rates], system: str, bases: list[str], condition: str) -> str:
    """Relative reduction in each run against the best of the bases on the same speech."""
    best = [min(run[base][condition] for base in bases) for run in runs]
    return interval([100 * (base - run[system][condition]) / base for base, run in zip(best, runs)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments/evidence")
    parser.add_argument("--human-minutes", type=float, default=HUMAN_MINUTES)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true")
    how.add_argument("--why", action="store_true")
    options = parser.parse_args()
    folder = options.folder.with_name(options.folder.name + "-quick" * options.quick)
    evidence = Evidence(folder, options.quick, options.human_minutes)
    seeds = options.seeds[:1] if options.quick else options.seeds
    chosen = {row.name: FIRST_EXPONENT for row in ROWS}
    if not options.quick:
        rows = [row for row in ROWS if row.name in COMPARED] + list(WHY) if options.why else ROWS
        evidence.prepare(CHOICE_SEED, {row.name: list(EXPONENTS) for row in (*ROWS, *WHY)})
        with ThreadPoolExecutor(JOBS) as pool:
            found = list(pool.map(evidence.choose, rows))
        print(f"{sum(number for _, number in found)} trainings tried", flush=True)
        chosen = {row.name: best for row, (best, _) in zip(rows, found, strict=True)}
    runs = []
    for seed in () if options.why else seeds:
        runs.append(evidence.run(seed, chosen))
        print(
            f"\nseeds {seeds[: len(runs)]}; mean [95 % interval over runs]\n\n{tables(runs, chosen)}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
