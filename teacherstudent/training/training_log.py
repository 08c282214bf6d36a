"""log.jsonl of a training: means per source over the last steps, and every validation. Written by one worker."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teacherstudent.files import write_text
from teacherstudent.training.schedule import HUMAN, Step

EVERY_STEPS = 10


@dataclass
class _Sums:
    learning_rate: float = 0.0
    loss: float = 0.0
    errors: int = 0
    num_frames: int = 0


class TrainingLog:
    """Appends lines; after a resume, the lines of steps that are done again are dropped first."""

    def __init__(self, path: Path, step: int, writes: bool) -> None:
        self._path, self._writes = path, writes
        self._sums: dict[str, _Sums] = {}
        self.latest = "-"
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_text(path, "".join(line + "\n" for line in kept))

    def add(self, now: Step, loss: float, errors: int | None, num_frames: int) -> None:
        """The sums of one step of this worker."""
        sums = self._sums.setdefault(now.source, _Sums())
        sums.learning_rate = now.learning_rate
        sums.loss += loss
        sums.errors += errors or 0
        sums.num_frames += num_frames

    def step(self, step: int, hours: float, measure: Callable[[], Mapping[str, Any]], pauses: bool) -> None:
        """Every few steps, a line for each source; also where the training pauses: it may go on from there, and
        the sums of the steps before are not in its checkpoint.
        """
        if step % EVERY_STEPS and not pauses:
            return
        metrics = measure()
        for source, sums in self._sums.items():
            if sums.num_frames:
                self.latest = f"{sums.loss / sums.num_frames:.3f}"
                line = {
                    "step": step,
                    "source": source,
                    "loss": sums.loss / sums.num_frames,
                    "frame_error": 100 * sums.errors / sums.num_frames if source == HUMAN else None,
                    "learning_rate": sums.learning_rate,
                    "hours": hours,
                    "bytes_sent": metrics["bytes_sent"],
                    "density": metrics.get("density"),
                }
                self.write(line)
        self._sums.clear()

    def write(self, line: Mapping[str, Any]) -> None:
        if self._writes:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
