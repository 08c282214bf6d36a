"""GTC, BMUF, two tiers and exact averaging with 1 to 64 workers on the same data, each at its own learning rate.

    python examples/smoke/methods.py [--workers 1 4 16 64] [--seeds 3 4] [--folder experiments/methods]
        [--methods exact gtc bmuf two-tiers] [--micro-batches 6144] [--filled 3]

On the corpus of smoke.toml, with in-process workers. Every training reads the same number of frames: with N workers
1/N of the steps. The learning rate of each method and number of workers is chosen on the development speakers of
seed 0, from one grid of powers of two: the rate is moved by a factor of two for as long as the frame error falls. The
table is made of other seeds and another split of the speakers, which no choice has seen. What was trained before is
not trained again; other --methods, --micro-batches or --filled want another --folder.
"""

import argparse
import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import EXPONENTS, JOBS, ROOT, Experiments, Tables, climb

CHOICE_SEED = 0
CHOICE_SPLIT, SPLIT = 3, 4  # of the speakers: for choices, and for the table
METHODS = ("exact", "gtc", "bmuf", "two-tiers")
MICRO_BATCHES, BATCH_FRAMES, VALIDATIONS = 6144, 240, 4
MOST_MOMENTUM = 1 - 1 / 16  # 64 workers' own, 1 - 1/64, would need 192 blocks, more than there are steps
NETWORK = {"layers": 2, "cells": 64, "dropout": 0.0}  # smaller than smoke.toml's: there are many trainings
SETTINGS = {"corpus": {"dev_minutes": 3.0}, "decode": {"beam": 12.0}}  # as they were when it was measured
FIRST_EXPONENT = {"exact": 0, "gtc": 0, "bmuf": -2, "two-tiers": -1}  # where the search of a rate begins
FILLED = 3  # times 1 / (1 - momentum): so many blocks a run has at least, or the filter never fills


@dataclass(frozen=True)
class Cell:
    """A method with so many workers."""

    method: str
    workers: int
    group_size: int = 1
    micro_batches: int = MICRO_BATCHES  # over all workers
    filled: int = FILLED

    @property
    def steps(self) -> int:
        return self.micro_batches // self.workers

    @property
    def momentum(self) -> float:
        """The default of so many workers, or groups, up to MOST_MOMENTUM."""
        return min(MOST_MOMENTUM, 1 - self.group_size / self.workers)

    @property
    def block_steps(self) -> int:
        """About 50, but fewer where the filter would not fill."""
        return max(1, min(50, int(self.steps * (1 - self.momentum) / self.filled)))

    @property
    def is_blockwise(self) -> bool:
        return self.method in ("bmuf", "two-tiers")

    @property
    def label(self) -> str:
        if not self.is_blockwise:
            return self.method
        groups = f", groups of {self.group_size}" if self.group_size > 1 else ""
        return f"{self.method} (momentum {self.momentum:.3g}, blocks of {self.block_steps}{groups})"

    def name(self, exponent: int) -> str:
        """Of its student."""
        return f"{self.method}-n{self.workers}-r{exponent - EXPONENTS.start}"

    def variant(self, exponent: int) -> Tables:
        """Its student, as a table of the configuration."""
        schedule = {
            "mode": "interleaved",
            "steps": self.steps,
            "warmup_steps": self.steps // 50,
            "final_learning_rate_ratio": 0.05,
            "validate_every_steps": self.steps // VALIDATIONS,
        }
        optimisation: dict[str, Any] = {
            "method": self.method,
            "batch_frames": BATCH_FRAMES,
            "learning_rate": 2.0**exponent,
            "density": 0.1,
            "multi_quantum": True,
        }
        if self.is_blockwise:
            optimisation |= {
                "block_steps": self.block_steps,
                "block_momentum": self.momentum,
                "group_size": self.group_size,
            }
        return {
            "workers": self.workers,
            "network": NETWORK,
            "schedule": schedule,
            "optimisation": optimisation,
        }


def list_cells(options: argparse.Namespace) -> list[Cell]:
    """One worker has nobody to share with: BMUF is plain SGD there, and two tiers are GTC."""
    return [
        Cell(
            method,
            workers,
            round(workers**0.5) if method == "two-tiers" else 1,
            options.micro_batches,
            options.filled,
        )
        for workers in options.workers
        for method in options.methods
        if workers > 1 or method in ("exact", "gtc")
    ]


def choose_exponent(runs: Experiments, cell: Cell) -> tuple[int, int]:
    """Of its learning rate, and how many were tried."""

    def frame_error(exponent: int) -> float:
        return runs.frame_error(cell.name(exponent), CHOICE_SEED)

    best, number = climb(frame_error, FIRST_EXPONENT[cell.method])
    print(
        f"{cell.workers} workers, {cell.label}: learning rate {2.0**best:g}, frame error {frame_error(best):.1f} %",
        flush=True,
    )
    return best, number


def table(runs: Experiments, seeds: list[int], chosen: dict[Cell, int]) -> str:
    """Markdown: mean and every seed's own figure."""
    systems = [runs.evaluate(seed) for seed in seeds]
    conditions = list(next(iter(systems[0].values()))["conditions"])
    lines = [
        f"| workers | method | learning rate | dev loss | dev frame error, % | {' | '.join(conditions)} |",
        "| ---: | --- | ---: |" + " --- |" * (2 + len(conditions)),
    ]
    for cell, exponent in chosen.items():
        name = cell.name(exponent)
        losses = [runs.validations(name, seed, "dev_loss")[-1] for seed in seeds]
        errors = [min(runs.validations(name, seed, "dev_frame_error")) for seed in seeds]
        scored = [system[name]["conditions"] for system in systems]
        words = [[each[condition]["word_error_rate"] for each in scored] for condition in conditions]
        figures = [several(losses, 3), *(several(values, 1) for values in (errors, *words))]
        lines.append(f"| {cell.workers} | {cell.label} | {2.0**exponent:g} | {' | '.join(figures)} |")
    return "\n".join(lines)


def several(values: list[float], digits: int) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    own = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{statistics.mean(values):.{digits}f} ({own})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments/methods")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--micro-batches", type=int, default=MICRO_BATCHES)
    parser.add_argument(
        "--filled", type=int, default=FILLED, help="times 1 / (1 - momentum): blocks, at least"
    )
    options = parser.parse_args()
    splits = dict.fromkeys(options.seeds, SPLIT) | {CHOICE_SEED: CHOICE_SPLIT}
    runs, cells = Experiments(options.folder, splits, SETTINGS), list_cells(options)
    runs.prepare(CHOICE_SEED, {cell.name(e): cell.variant(e) for cell in cells for e in EXPONENTS})
    with ThreadPoolExecutor(JOBS) as pool:
        found = list(pool.map(lambda cell: choose_exponent(runs, cell), cells))
        print(f"{sum(number for _, number in found)} trainings tried", flush=True)
        chosen = {cell: best for cell, (best, _) in zip(cells, found)}
        variants = {cell.name(best): cell.variant(best) for cell, best in chosen.items()}
        list(pool.map(lambda seed: runs.prepare(seed, variants), options.seeds))
        again = [(name, seed) for seed in options.seeds for name in variants]
        list(pool.map(lambda training: runs.frame_error(*training), again))
    print(f"\nmean (seeds {', '.join(map(str, options.seeds))}); word error rates in %\n")
    print(table(runs, options.seeds, chosen))


if __name__ == "__main__":
    main()
