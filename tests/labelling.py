"""An experiment whose unlabelled part can be labelled: made by hand, in no time. As a program: labels such
experiments in processes that are killed.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacherstudent.config import Config, Label, Network
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, Normalisation
from teacherstudent.data.packed import PackedWriter, shard_path
from teacherstudent.distributed import connect
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json
from teacherstudent.run import Step, run_steps
from teacherstudent.training import checkpoint
from teacherstudent.training.label import label
from teacherstudent.training.models import build_model, model_state

NUM_FEATURES, NUM_SENONES, KEPT = 6, 9, 4
SHARDS = [[7, 30, 12], [5], [18, 18, 3, 25], [9, 40], [11, 2]]  # frames of the utterances of each
TEACHER = Network(layers=2, cells=5, bidirectional=True)


def settings(folder: Path, **given: Any) -> Config:
    common = {"k": KEPT, "batch_frames": 40, "numeric_mode": "fp32", "lease_seconds": 5.0}
    chosen: dict[str, Any] = common | given
    return Config(folder=str(folder), label=Label(**chosen))


def open_experiment(folder: Path, shards: list[list[int]] = SHARDS, **given: Any) -> Experiment:
    """After `prepare` and `teacher`: the features of the unlabelled part, and a teacher. given: of `label`."""
    experiment = Experiment(settings(folder, **given))
    experiment.create()
    write_features(experiment, "unlabelled", shards)
    blank = Normalisation(np.zeros(NUM_FEATURES, np.float32), np.full(NUM_FEATURES, 2, np.float32))
    teacher = build_model(TEACHER, NUM_SENONES, blank, seed=2)
    checkpoint.save(experiment.path("teacher", "best.pt"), model_state(teacher, {}))
    experiment.path("senones").mkdir()
    experiment.path("senones", "inventory.json").write_text("an inventory")
    experiment.path("features", "normalisation.json").write_text("a normalisation")
    return experiment


def write_features(experiment: Experiment, part: str, shards: list[list[int]]) -> None:
    """As `prepare` does."""
    random = np.random.default_rng(8)
    for number, lengths in enumerate(shards):
        path = shard_path(experiment.path("features", part), "features", number)
        with PackedWriter(path, {}, {"values": ("float16", (NUM_FEATURES,))}) as writer:
            for place, length in enumerate(lengths):  # no order of the alphabet, nor of length
                writer.write(
                    f"{9 - place}-{number}",
                    values=random.normal(size=(length, NUM_FEATURES)).astype("float16"),
                )
    hours = sum(map(sum, shards)) * FRAME_SHIFT_SECONDS / 3600
    counts = {"utterances": sum(map(len, shards)), "hours": hours, "copies": 0, "copy_hours": 0.0}
    report = experiment.path("features", "report.json")
    others = json.loads(report.read_text()) if report.is_file() else {}
    write_json(report, {**others, part: counts})


# -- killed at chosen moments --------------------------------------------------------------------------------


def count_file_operations(folder: str, then: Callable[[int], None]) -> None:
    """then(n) before the n-th time that this process opens, renames, lists or removes something in the folder."""
    count = 0

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        what = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir")
        if event in what and str(arguments[0]).startswith((f"{folder}/targets", f"{folder}/steps")):
            count += 1
            then(count)

    sys.addaudithook(note)


def work(folder: Path, limit: int | None, counted: Path | None = None) -> None:
    """In a process of its own: label, and be killed before the file operation `limit`."""

    def note(count: int) -> None:
        if count == limit:
            os.kill(os.getpid(), signal.SIGKILL)

    operations = [0]
    count_file_operations(str(folder), note if limit else lambda count: operations.append(count))
    there = Experiment(settings(folder))
    run_steps(there, connect(), [Step("label", (), ("targets",), together=label)])
    if counted is not None:
        counted.write_text(str(operations[-1]))


def fork(function: Callable[[], None]) -> int:
    """Nothing was computed in this process so far: there is no thread that the child would lack."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        function()
        status = 0
    finally:
        os._exit(status)


def label_in_processes(folder: Path, limits: list[int | None], seconds: float | None = None) -> list[int]:
    """Their exit codes. limits: the file operation before which each is killed; seconds: when all of them are."""
    pids = [fork(partial(work, folder, limit)) for limit in limits]
    if seconds is not None:
        threading.Event().wait(seconds)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main() -> None:
    """Each line of the input: a folder, seconds or -, the limit of each worker or -. Kills, then labels the rest."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        folder, seconds, *limits = line.split()
        if seconds == "count":
            counted = fork(partial(work, Path(folder), None, Path(folder, "count")))
            assert os.waitpid(counted, 0)[1] == 0
            continue
        kills = [None if limit == "-" else int(limit) for limit in limits]
        killed = label_in_processes(Path(folder), kills, None if seconds == "-" else float(seconds))
        there = len(list(Path(folder, "targets").glob("*.h5")))
        rest = label_in_processes(Path(folder), [None] * len(limits)) if any(killed) else []
        print(json.dumps({"killed": killed, "there": there, "rest": rest}), flush=True)


if __name__ == "__main__":
    main()
