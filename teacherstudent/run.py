"""The way through: every step, what it comes after, and who takes part in it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from teacherstudent.align import align
from teacherstudent.corpus import make_corpus
from teacherstudent.distributed import Communicator
from teacherstudent.evaluate import evaluate
from teacherstudent.experiment import Experiment, write_json
from teacherstudent.label import label
from teacherstudent.manifests import PARTS, shard_paths
from teacherstudent.prepare import prepare
from teacherstudent.report import write_report
from teacherstudent.tie import tie_senones
from teacherstudent.trainings import train_student, train_teacher
from teacherstudent.workers import run_workers

Alone = Callable[[Experiment], list[Path]]
Together = Callable[[Experiment, Communicator], list[Path]]


@dataclass(frozen=True)
class Step:
    """One record in the experiment. It is done by rank 0 alone, or by all workers together."""

    record: str
    after: tuple[str, ...]
    folders: tuple[str, ...]  # what it writes: emptied when what it reads has changed
    alone: Alone | None = None
    together: Together | None = None


def find_steps(experiment: Experiment, name: str) -> list[Step]:
    """The records that a step of the command line, or `run`, stands for, in order."""
    students = experiment.config.student_variants()
    only = experiment.config.student.only
    labelled = ("prepare", "senones")
    trained = ("teacher", *(f"student-{student}" for student in students))
    steps = [
        Step("corpus", (), ("corpus",), alone=_corpus),
        Step("prepare", ("corpus",), ("features",), alone=prepare),
        Step("align", ("corpus", "prepare"), ("align",), alone=align),
        Step("senones", ("prepare", "align"), ("senones",), alone=tie_senones),
        Step("teacher", labelled, ("teacher",), together=train_teacher),
        Step("label", ("prepare", "teacher"), ("targets",), together=label),
        *(
            Step(
                f"student-{student}",
                (*labelled, "label") if settings.schedule.mode != "human-only" else labelled,
                (f"students/{student}",),
                together=partial(train_student, name=student),
            )
            for student, settings in students.items()
            if not only or student == only
        ),
        Step("evaluate", ("corpus", *labelled, *trained), ("evaluate",), alone=evaluate),
        Step("report", ("evaluate",), (), alone=_report),
    ]
    if name == "run":
        return steps
    return [step for step in steps if step.record == name or step.record.startswith(f"{name}-")]


def run_steps(experiment: Experiment, comm: Communicator, steps: Sequence[Step]) -> None:
    """Run the steps that are not done. Every process of a launch calls this with the same steps."""
    for step in steps:
        if experiment.is_done(step.record, step.after):
            if comm.rank == 0:
                print(f"{step.record}: done before", flush=True)
        elif step.alone is not None:
            _run_alone(experiment, comm, step, step.alone)
        else:
            assert step.together is not None
            _run_together(experiment, comm, step, step.together)
    if comm.rank == 0:
        write_json(experiment.path("hashes.json"), experiment.hashes())


def _run_alone(experiment: Experiment, comm: Communicator, step: Step, function: Alone) -> None:
    if comm.rank == 0:
        experiment.begin(step.record, step.after, step.folders)
        experiment.finish(step.record, function(experiment))
    comm.barrier(math.inf)  # the others wait as long as it takes; when rank 0 fails they are told


def _run_together(experiment: Experiment, comm: Communicator, step: Step, function: Together) -> None:
    if comm.rank == 0:
        experiment.begin(step.record, step.after, step.folders)
    comm.barrier()
    outputs = run_workers(comm, experiment.config.distributed, partial(function, experiment))
    if comm.rank == 0:
        experiment.finish(step.record, outputs)
    comm.barrier(math.inf)


def _corpus(experiment: Experiment) -> list[Path]:
    """Make speech, unless the experiment brings data along: those are only recorded."""
    config, folder = experiment.config, experiment.data_folder
    if not config.data.folder:
        make_corpus(folder, config.corpus, config.features.sampling_rate, config.seed)
        return [path for path in folder.rglob("*") if path.is_file()]
    texts = [folder / "lexicon.txt", folder / "lm_text.txt"]
    for path in texts:
        if not path.is_file():
            raise ValueError(f"no {path}: data.folder needs lexicon.txt and lm_text.txt beside its parts")
    return [*texts, *(path for part in PARTS for path in shard_paths(folder, part))]


def _report(experiment: Experiment) -> list[Path]:
    write_report(experiment.folder)
    return []
