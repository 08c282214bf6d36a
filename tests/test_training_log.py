"""log.jsonl holds the means of its steps, and TensorBoard the same numbers."""

import json
import math
import sys
from pathlib import Path

import pytest

from teacherstudent.training.gradient import Measured
from teacherstudent.training.schedule import Portion, Step
from teacherstudent.training.training_log import TrainingLog

STEP = Step((Portion("machine", 1.0, 0.1), Portion("human", 1.0, 0.2)), 0.1, 1.0)
HOURS = {"machine": 2.0, "human": 1.0}


def write(log: TrainingLog, first: int = 1) -> None:
    log.add(STEP, [Measured(30.0, 5, 10), Measured(8.0, 1, 4)], norm=2.0)
    log.add(STEP, [Measured(10.0, 8, 10), Measured(0.0, 0, 0)], norm=4.0)
    log.step(first + 1, HOURS, lambda: {"bytes_sent": 7}, pauses=True)
    log.write({"step": first + 1, "source": "human", "dev_loss": 0.5})


def test_losses_and_errors_are_means_over_frames_and_norms_over_the_steps_that_had_any(
    tmp_path: Path,
) -> None:
    with TrainingLog(tmp_path / "log.jsonl", 0, writes=True) as log:
        write(log)
    machine, human, dev = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert (machine["loss"], machine["frame_error"], machine["gradient_norm"]) == (2.0, 65.0, 3.0)
    assert (human["loss"], human["frame_error"], human["gradient_norm"]) == (2.0, 25.0, 2.0)
    assert (machine["learning_rate"], human["learning_rate"]) == (0.1, 0.2)
    assert (machine["hours"], machine["source_hours"], human["source_hours"]) == (3.0, 2.0, 1.0)
    assert dev == {"step": 2, "source": "human", "dev_loss": 0.5}


def test_a_log_that_goes_on_forgets_the_steps_that_are_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    for resumed_at in (0, 2, 2):
        with TrainingLog(path, resumed_at, writes=True) as log:
            write(log, 1 + resumed_at)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 2, 2, 4, 4, 4]


def test_other_workers_write_nothing(tmp_path: Path) -> None:
    with TrainingLog(tmp_path / "log.jsonl", 0, writes=False) as log:
        write(log)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("writes", [True, False])
def test_without_tensorboard_every_worker_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: bool
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(ValueError, match=r"pip install 'teacherstudent\[report\]'"):
        TrainingLog(tmp_path / "log.jsonl", 0, writes, tmp_path / "board")


def test_tensorboard_gets_the_numbers_of_the_log_once_also_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_at in (0, 2, 2):
        with TrainingLog(tmp_path / "log.jsonl", resumed_at, True, tmp_path / "board") as log:
            write(log, 1 + resumed_at)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    shown = {
        (name, event.step, event.value) for name in board.Tags()["scalars"] for event in board.Scalars(name)
    }
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    expected = {
        (f"{name}/{line['source']}", line["step"], value)
        for line in lines
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float)
    }
    assert {place[:2] for place in shown} == {place[:2] for place in expected}
    for name, step, value in expected:
        (found,) = (event.value for event in board.Scalars(name) if event.step == step)
        assert math.isclose(found, value, rel_tol=1e-6)
