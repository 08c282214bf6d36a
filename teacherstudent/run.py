"""The way through: every step, what it comes after, and who takes part in it."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch

from teacherstudent.alignment.align import align
from teacherstudent.alignment.align_sources import check_brought
from teacherstudent.config import Network
from teacherstudent.data.features import STACKED_FRAMES
from teacherstudent.data.manifests import PARTS
from teacherstudent.data.prepare import prepare
from teacherstudent.data.sources import brings_data, find_texts, import_data
from teacherstudent.decoding.evaluate import evaluate
from teacherstudent.distributed import Communicator
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json
from teacherstudent.locks import lock_if_possible
from teacherstudent.reporting.report import write_report
from teacherstudent.synthesis.corpus import make_corpus
from teacherstudent.training.label import label
from teacherstudent.training.models import num_parameters
from teacherstudent.training.trainings import needs_targets, train_student, train_teacher
from teacherstudent.training.workers import run_workers
from teacherstudent.tying.tie import tie_senones

COPIES = 6  # weights, gradients, momentum, and up to three buffers of the method
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
    network: Network | None = None  # that every worker trains
    workers: int = 0  # in-process ones, where it has a number of its own
    shared: bool = False  # separate launches work at it together, and may come and go
    always: bool = False  # run it each time: it is quick, and looks at what may have changed outside


def find_steps(experiment: Experiment, name: str) -> list[Step]:
    """The records that a step of the command line, or `run`, stands for, in order."""
    students = experiment.config.student_variants()
    only = experiment.config.student.only
    teacher = experiment.config.teacher
    labelled = ("prepare", "senones")
    decoded = experiment.config.decode.only
    trained = ["teacher", *(f"student-{student}" for student in students)]
    if decoded:
        trained = ["teacher" if decoded == "teacher" else f"student-{decoded}"]
    steps = [
        Step(
            "corpus",
            (),
            ("corpus",),
            alone=_corpus,
            always=brings_data(experiment.config),
        ),
        Step("resources", (), (), alone=_resources, always=True),
        Step("prepare", ("corpus",), ("features",), alone=prepare),
        Step("align", ("corpus", "resources", "prepare"), ("align",), alone=align),
        Step("senones", ("resources", "prepare", "align"), ("senones",), alone=tie_senones),
        Step("teacher", labelled, ("teacher",), together=train_teacher, network=teacher.network),
        Step("label", ("prepare", "teacher"), ("targets", "targets-human"), together=label, shared=True),
        *(
            Step(
                f"student-{student_name}",
                (*labelled, "label") if needs_targets(student) else labelled,
                (f"students/{student_name}",),
                together=partial(train_student, name=student_name),
                network=student.network,
                workers=student.workers,
            )
            for student_name, student in students.items()
            if only in ("", student_name)
        ),
        Step("evaluate", ("corpus", "resources", *labelled, *trained), ("evaluate",), alone=evaluate),
        Step("report", (), (), alone=_report, always=True),
    ]
    if name == "run":
        return [step for step in steps if not only or step.record not in ("evaluate", "report")]
    chosen = [step for step in steps if step.record == name or step.record.startswith(f"{name}-")]
    if name in ("corpus", "report"):
        return chosen
    looked_at = [step for step in steps if step.always and step.record != "report"]
    return looked_at + chosen  # what was brought along may have changed since the last step


def run_steps(experiment: Experiment, comm: Communicator, steps: Sequence[Step]) -> None:
    """Run the steps that are not done. Every process of a launch calls this with the same steps."""
    for step in steps:
        if _agree_done(experiment, comm, step):
            if comm.rank == 0:
                print(f"{step.record}: done before", flush=True)
        elif step.alone is not None:
            _run_alone(experiment, comm, step, step.alone)
        else:
            assert step.together is not None
            _run_together(experiment, comm, step, step.together)
    if comm.rank == 0:
        write_json(experiment.path("hashes.json"), experiment.hashes())


def _agree_done(experiment: Experiment, comm: Communicator, step: Step) -> bool:
    """Rank 0 looks, so that no rank reads a record while another writes it."""
    done = torch.zeros(1, dtype=torch.int64)
    if comm.rank == 0:
        done += not step.always and experiment.is_done(step.record, step.after)
    return bool(comm.broadcast(done))


def _run_alone(experiment: Experiment, comm: Communicator, step: Step, function: Alone) -> None:
    if comm.rank == 0:
        with _recording(experiment, step):
            if step.always or not experiment.is_done(step.record, step.after):  # by another process meanwhile
                experiment.begin(step.record, step.after, step.folders, step.always)
                started = time.time()
                experiment.finish(step.record, function(experiment))
                _note(experiment, comm, step, started)
    comm.barrier(math.inf)  # the others wait as long as it takes; when rank 0 fails they are told


def _run_together(experiment: Experiment, comm: Communicator, step: Step, function: Together) -> None:
    with ExitStack() as alone:  # this launch, unless others may work at the step too
        if comm.rank == 0:
            if not step.shared:
                # A lock goes with its process: who goes on after a kill need not wait, as for a claim.
                path = experiment.path("steps", f".{step.record}.lock")
                alone.enter_context(lock_if_possible(path, partial(_tell_waiting, step)))
            with _recording(experiment, step):
                if not experiment.is_done(step.record, step.after):
                    experiment.begin(step.record, step.after, step.folders)
        comm.barrier(math.inf)  # rank 0 may have waited for another launch, which has done the step
        if not step.shared and _agree_done(experiment, comm, step):
            return
        started = time.time()
        work = partial(function, experiment)
        settings = experiment.config.distributed
        settings = replace(settings, workers=step.workers or settings.workers)
        outputs = run_workers(comm, settings, work, _worker_bytes(experiment, step))
        if comm.rank == 0:
            with _recording(experiment, step):
                if not experiment.is_done(step.record, step.after):  # who came first has written it
                    experiment.finish(step.record, outputs)
            _note(experiment, comm, step, started)
    comm.barrier(math.inf)


@contextmanager
def _recording(experiment: Experiment, step: Step) -> Iterator[None]:
    """One process at a time, of those that were started separately on this folder, writes a step's record."""
    with experiment.claims() as claims, claims.hold(f"record.{step.record}", partial(_tell_waiting, step)):
        yield


def _tell_waiting(step: Step) -> None:
    print(f"{step.record}: another process is at it: waiting until it is done", flush=True)


def _worker_bytes(experiment: Experiment, step: Step) -> int:
    """What a worker's training holds at least, in float32: COPIES of the parameters."""
    if step.network is None:
        return 0
    config = experiment.config
    num_features = config.features.num_mels * STACKED_FRAMES
    return 4 * COPIES * num_parameters(step.network, config.senones.target, num_features)


def _note(experiment: Experiment, comm: Communicator, step: Step, started: float) -> None:
    """When, where and by how many: in the log, since no artefact may tell."""
    line = {
        "step": step.record,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 1),
        "host": comm.host,
        "launched_workers": comm.size,
    }
    with experiment.path("log", "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _corpus(experiment: Experiment) -> list[Path]:
    """Make speech, unless the experiment brings data along."""
    config, folder = experiment.config, experiment.data_folder
    if brings_data(config):
        return import_data(experiment)
    hours = sum(getattr(config.corpus, f"{part}_minutes") for part in PARTS) / 60
    print(f"corpus: no [data]: making {hours:.3g} h of speech", flush=True)
    make_corpus(folder, config.corpus, config.features.sampling_rate, config.seed)
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def _resources(experiment: Experiment) -> list[Path]:
    """All else that was brought along, recorded apart from the speech: a new word in the lexicon changes no feature."""
    config = experiment.config
    named = [config.data.lexicon, config.data.language_model]
    found = find_texts(experiment) if brings_data(config) else [Path(name) for name in named if name]
    if brings_data(config) or config.data.lexicon:
        check_brought(experiment)
    found += [Path(config.senones.questions)] if config.senones.questions else []
    for folder in filter(None, (config.align.folder, config.senones.kaldi_tree)):
        places = os.walk(folder, followlinks=True)
        found += [
            Path(place, name) for place, _, names in places for name in names if not name.startswith(".")
        ]
    return found


def _report(experiment: Experiment) -> list[Path]:
    write_report(experiment.folder)
    return []
