"""log.jsonl of a training: means per source over the last steps, and every validation. Written by one worker."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from teacherstudent import wheels
from teacherstudent.files import write_text
from teacherstudent.training.gradient import Measured
from teacherstudent.training.schedule import Step

EVERY_STEPS = 10


@dataclass
class _Sums:
    """Of one source, over the steps since the last line; norm: of the gradients before they were clipped."""

    learning_rate: float = 0.0
    loss: float = 0.0
    errors: int = 0
    num_frames: int = 0
    norm: float = 0.0
    num_steps: int = 0


class TrainingLog:
    """Appends lines; after a resume, the lines of steps that are done again are dropped first. A context manager.

    board: a folder for TensorBoard, which gets the numbers of every line. Raises ValueError where it is not installed.
    """

    def __init__(self, path: Path, step: int, writes: bool, board: Path | None = None) -> None:
        self._path, self._writes = path, writes
        self._sums: dict[str, _Sums] = {}
        self.latest = "-"
        # Looked for on every worker, so that all of them end where it is missing.
        tensorboard = wheels.load("torch.utils.tensorboard", "report") if board else None
        self._board = None
        if not writes:
            return
        if tensorboard:  # it hides what an interrupted run has written beyond the step
            self._board = tensorboard.SummaryWriter(str(board), purge_step=step + 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(path, "".join(line + "\n" for line in kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board:
            self._board.close()

    def add(self, now: Step, measured: Sequence[Measured], norm: float) -> None:
        """What one step of this worker gave, for each of its portions. Where sources are mixed the norm is of both."""
        for portion, part in zip(now.portions, measured, strict=True):
            sums = self._sums.setdefault(portion.source, _Sums())
            sums.learning_rate = portion.learning_rate
            if part.num_frames:
                sums.loss += part.loss
                sums.errors += part.errors
                sums.num_frames += part.num_frames
                sums.norm += norm
                sums.num_steps += 1

    def step(
        self,
        step: int,
        hours: Mapping[str, float],
        measure: Callable[[], Mapping[str, Any]],
        pauses: bool,
    ) -> None:
        """Every few steps, a line for each source; also where the training pauses: it may go on from there, and
        the sums of the steps before are not in its checkpoint. hours: of each source so far.
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
                    "frame_error": 100 * sums.errors / sums.num_frames,
                    "gradient_norm": sums.norm / sums.num_steps,
                    "learning_rate": sums.learning_rate,
                    "hours": sum(hours.values()),
                    "source_hours": hours[source],
                    "bytes_sent": metrics["bytes_sent"],
                    "density": metrics.get("density"),
                }
                self.write(line)
        self._sums.clear()

    def write(self, line: Mapping[str, Any]) -> None:
        if not self._writes:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._board:
            for name, value in line.items():
                if name != "step" and isinstance(value, int | float):
                    self._board.add_scalar(f"{name}/{line.get('source', 'all')}", value, line["step"])
