"""The mean of the weights of several validated models of one training: averaged.pt.

Each model that may be in it waits in a file of its own beside the checkpoints, which say which ones count: a training
that goes on from a checkpoint averages what it would have averaged without the interruption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from teacherstudent.training import checkpoint


@dataclass(frozen=True, order=True)
class Validated:
    """A model that was validated."""

    step: int
    frame_error: float  # on the development speakers


def choose(
    validated: Sequence[Validated], num_models: int, which: Literal["last", "best"]
) -> list[Validated]:
    """At most num_models of them by step: the last ones, or those of the lowest frame errors (of equals the first)."""
    if which == "best":
        best = sorted(validated, key=lambda model: (model.frame_error, model.step))
        return sorted(best[:num_models])
    return sorted(validated)[-num_models:] if num_models else []


def keep(folder: Path, state: dict[str, Any]) -> None:
    """state: of models.model_state, with its step in the provenance."""
    checkpoint.save(_path(folder, state["provenance"]["step"]), state)


def forget_others(folder: Path, chosen: Sequence[Validated]) -> None:
    """Only when a checkpoint that counts no others is there."""
    needed = {_path(folder, model.step) for model in chosen}
    for path in folder.glob("model*.pt"):
        if path not in needed:
            path.unlink()


def average(folder: Path, chosen: Sequence[Validated]) -> dict[str, Any]:
    """The state of the mean: weights summed in float64 in the order of steps, and rounded once."""
    states = (checkpoint.load(_path(folder, model.step)) for model in chosen)
    mean = next(states)
    sums = {name: value.double() for name, value in mean["weights"].items()}
    for state in states:
        for name, value in state["weights"].items():
            sums[name] += value
    for name, value in mean["weights"].items():
        value.copy_(sums[name] / len(chosen))
    steps = [model.step for model in chosen]
    return mean | {"provenance": mean["provenance"] | {"step": steps[-1], "averaged_steps": steps}}


def _path(folder: Path, step: int) -> Path:
    return folder / f"model{step}.pt"
