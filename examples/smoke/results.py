"""The table of RESULTS.md: the smoke experiment with seeds and speaker splits that no choice has seen.

    python examples/smoke/results.py [--seeds 3 4 5 6 7] [--splits 3 4] [--folder experiments/results]

One run a seed, with the splits in turn. Corpus, schedule and learning rates of smoke.toml were chosen with seeds 0 to 2
and split 0, on development speakers; SETTINGS_TRIED counts how many. Runs that are there are not run again.
"""

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

from experiments import CONFIG, ROOT, interval

SETTINGS_TRIED = 73  # 64 trainings of students, 7 of teachers, 2 rules for the best model
Results = dict[str, dict]  # of one run, by system


def run(seed: int, split: int, folder: Path) -> Results:
    """One experiment; returns its systems."""
    settings = [f"seed={seed}", f"corpus.split={split}", f"folder={folder}"]
    command = [
        sys.executable,
        "-m",
        "teacherstudent",
        "run",
        str(CONFIG),
        *settings,
    ]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads((folder / "evaluate" / "results.json").read_text(encoding="utf-8"))["systems"]


def word_error_rates(runs: list[Results], system: str, condition: str) -> list[float]:
    return [systems[system]["conditions"][condition]["word_error_rate"] for systems in runs]


def reductions(runs: list[Results], system: str, condition: str) -> list[float]:
    """Relative reduction in per cent, in each run against the better of its human-only rows on the same speech."""
    human_only = [name for name in runs[0] if name.startswith("human-only")]
    best = [min(rates) for rates in zip(*(word_error_rates(runs, name, condition) for name in human_only))]
    ours = word_error_rates(runs, system, condition)
    return [100 * (base - rate) / base for base, rate in zip(best, ours)]


def table(runs: list[Results]) -> str:
    """Markdown: word error rates, and what the machine labels bring."""
    first = next(iter(runs[0].values()))
    conditions = list(first["conditions"])
    lines = [
        f"| word error rate, % | {' | '.join(conditions)} | fewer errors, %: {' | '.join(conditions)} |",
        "| --- |" + " --- |" * (2 * len(conditions)),
    ]
    for name, system in runs[0].items():
        rates = [interval(word_error_rates(runs, name, condition)) for condition in conditions]
        gains = ["" if "human-only" in name else interval(reductions(runs, name, c)) for c in conditions]
        trained = f"{system['label']} ({system['method']}, learning rate {system['learning_rate']:g})"
        lines.append(f"| {trained} | {' | '.join(rates)} | {' | '.join(gains)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    parser.add_argument("--splits", type=int, nargs="+", default=[3, 4])
    parser.add_argument("--folder", type=Path, default=ROOT / "experiments/results")
    options = parser.parse_args()
    runs = []
    for seed, split in zip(options.seeds, itertools.cycle(options.splits)):
        runs.append(run(seed, split, options.folder / f"seed{seed}-split{split}"))
        if len(runs) > 1:
            print(
                f"\n{len(runs)} runs; mean [95 % interval over runs]; {SETTINGS_TRIED} settings tried before"
            )
            print(f"\n{table(runs)}\n", flush=True)


if __name__ == "__main__":
    main()
