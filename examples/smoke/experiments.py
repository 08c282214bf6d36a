"""The smoke experiment many times over, for tables: seeds, variants of the student, each at its own learning rate.

Rates are chosen on the development speakers of one seed and split of the speakers; what a table reports comes from
others. What was trained before is not trained again.
"""

import json
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w
from scipy import stats

ROOT = Path(__file__).parent.parent.parent
CONFIG = ROOT / "examples/smoke/smoke.toml"
EXPONENTS = range(-7, 5)  # the grid of learning rates: 2 ** exponent
JOBS = 2  # trainings at the same time

Tables = dict[str, Any]


class Experiments:
    """Those in a folder, one a seed: smoke.toml with other speakers, students and settings."""

    def __init__(
        self, folder: Path, splits: Mapping[int, int], settings: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        """splits: of the speakers, by seed. settings: of sections, over those of smoke.toml."""
        self.folder, self.splits, self.settings = folder, splits, settings or {}
        self.frame_error = cache(self._frame_error)

    def prepare(self, seed: int, variants: Mapping[str, Tables], last: str = "label") -> None:
        """The configuration with its students, and the steps before them, up to the last one named."""
        tables = tomllib.loads(CONFIG.read_text(encoding="utf-8"))
        tables |= {"seed": seed, "folder": str(self.path(seed))}
        tables["corpus"]["split"] = self.splits[seed]
        for section, values in self.settings.items():
            tables[section] = tables.get(section, {}) | dict(values)
        tables["student"]["variants"] = dict(variants)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._config(seed).write_text(tomli_w.dumps(tables), encoding="utf-8")
        steps = ("corpus", "prepare", "align", "senones", "teacher", "label")
        for step in steps[: steps.index(last) + 1]:
            self._call(seed, step)

    def path(self, seed: int) -> Path:
        return self.folder / f"seed{seed}"

    def _config(self, seed: int) -> Path:
        return self.folder / f"seed{seed}.toml"

    def _frame_error(self, name: str, seed: int) -> float:
        """A student's lowest on the development speakers, trained first if need be; infinite where it diverges."""
        done = self._call(seed, "student", f"student.only={name}", may_diverge=True)
        return min(self.validations(name, seed, "dev_frame_error")) if done else float("inf")

    def validations(self, name: str, seed: int, figure: str) -> list[float]:
        """Of a student, or of the teacher, in the order in which they were made."""
        folder = self.path(seed) / ("teacher" if name == "teacher" else f"students/{name}")
        text = (folder / "log.jsonl").read_text(encoding="utf-8")
        return [line[figure] for line in map(json.loads, text.splitlines()) if figure in line]

    def evaluate(self, seed: int, *settings: str) -> Tables:
        """The systems of results.json: test speakers are decoded once."""
        self._call(seed, "evaluate", *settings)
        text = (self.path(seed) / "evaluate" / "results.json").read_text(encoding="utf-8")
        systems: Tables = json.loads(text)["systems"]
        return systems

    def _call(self, seed: int, step: str, *settings: str, may_diverge: bool = False) -> bool:
        """Whether it ended well."""
        command = [sys.executable, "-m", "teacherstudent", step, str(self._config(seed)), *settings]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode and not (may_diverge and "diverged" in done.stderr):
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        return not done.returncode


def climb(frame_error: Callable[[int], float], first: int) -> tuple[int, int]:
    """The exponent of a learning rate, and how many were tried: downhill on the grid from the first one, until the
    frame errors of both neighbours are no lower, or the grid ends.
    """
    tried: dict[int, float] = {}

    def of(exponent: int) -> float:
        if exponent not in tried:
            tried[exponent] = frame_error(exponent)
        return tried[exponent]

    best = first
    for direction in (1, -1):
        while best + direction in EXPONENTS and of(best + direction) < of(best):
            best += direction
    return best, len(tried)


def interval(values: list[float]) -> str:
    """Mean and 95 % Student interval over runs."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return f"{mean:.1f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.1f} [{mean - half:.1f}, {mean + half:.1f}]"
