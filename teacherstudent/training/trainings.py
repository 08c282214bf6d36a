"""What the `teacher` and `student` steps train on, from the experiment's folder."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from teacherstudent.config import Loss, Network, Optimisation, Schedule, Student
from teacherstudent.data.feature_reader import open_features, read_normalisation
from teacherstudent.data.manifests import DEV, HUMAN, UNLABELLED
from teacherstudent.data.packed import open_shards
from teacherstudent.data.prefetch import num_readers
from teacherstudent.data.shard_sequence import ShardSequence
from teacherstudent.distributed import Communicator
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file
from teacherstudent.settings import require
from teacherstudent.store import TargetStore
from teacherstudent.training.batches import Source
from teacherstudent.training.losses import PLAIN
from teacherstudent.training.schedule import HUMAN as HUMAN_SOURCE
from teacherstudent.training.schedule import MACHINE as MACHINE_SOURCE
from teacherstudent.training.schedule import Plan
from teacherstudent.training.shard_pairs import Labels
from teacherstudent.training.table_files import TABLE, find_table
from teacherstudent.training.train import Training, train
from teacherstudent.tying.senones import Inventory


def train_teacher(experiment: Experiment, comm: Communicator) -> list[Path]:
    teacher = experiment.config.teacher
    folder = experiment.path("teacher")
    return _train(
        experiment,
        comm,
        "teacher",
        folder,
        teacher.network,
        teacher.schedule,
        teacher.optimisation,
        Loss(teacher.loss.label_smoothing),
    )


def train_student(experiment: Experiment, comm: Communicator, name: str) -> list[Path]:
    student = experiment.config.student_variants()[name]
    folder = experiment.path("students", name)
    return _train(
        experiment,
        comm,
        f"student {name}",
        folder,
        student.network,
        student.schedule,
        student.optimisation,
        student.loss,
    )


def needs_targets(student: Student) -> bool:
    """Whether it learns from what the teacher said."""
    return student.schedule.mode != "human-only" or student.loss.soft_share > 0


def _train(
    experiment: Experiment,
    comm: Communicator,
    name: str,
    folder: Path,
    network: Network,
    schedule: Schedule,
    optimisation: Optimisation,
    loss: Loss,
) -> list[Path]:
    plan = Plan(schedule, optimisation.learning_rate)
    inventory = Inventory.load(experiment.path("senones", "inventory.json"))
    training = Training(
        name=name,
        folder=folder,
        network=network,
        num_senones=inventory.num_senones,
        normalisation=read_normalisation(experiment),
        plan=plan,
        optimisation=optimisation,
        seed=experiment.config.seed,
        provenance=provenance(experiment),
        loss=loss,
        readers=num_readers(experiment.config.features),
        board=experiment.path("log", "tensorboard", name) if experiment.config.tensorboard else None,
    )
    if comm.rank > 0:
        comm.barrier(math.inf)  # until rank 0 has made the tables that there are not yet
    sources = _open_sources(experiment, plan, network, optimisation.batch_frames, loss)
    held_out = None
    if schedule.held_out_utterances and MACHINE_SOURCE in sources:
        rest, held_out = sources[MACHINE_SOURCE].hold_out(schedule.held_out_utterances, warns=comm.rank == 0)
        sources[MACHINE_SOURCE] = rest
    dev = _open_dev(experiment, network, optimisation.batch_frames)
    if comm.rank == 0:
        comm.barrier(math.inf)
    train(comm, training, sources, dev, held_out)
    models = ["best.pt", "final.pt", *(["averaged.pt"] if schedule.average_models else [])]
    return [folder / name for name in (*models, "log.jsonl")]


def _open_sources(
    experiment: Experiment, plan: Plan, network: Network, batch_frames: int, loss: Loss = PLAIN
) -> dict[str, Source]:
    """Raises ValueError naming the mode where it needs a part that has no data."""
    sources: dict[str, Source] = {}
    for name in plan.sources:
        try:
            frames = plan.batch_frames(name, batch_frames)
            sources[name] = open_source(experiment, name, network, frames, loss)
            if name == MACHINE_SOURCE and plan.schedule.machine_shards:
                sources[name] = sources[name].take_first(plan.schedule.machine_shards)
        except ValueError as error:
            part = HUMAN if name == HUMAN_SOURCE else UNLABELLED
            raise ValueError(
                f"schedule.mode = {plan.schedule.mode!r} trains on part {part!r}, {name}-labelled, and cannot: {error}"
            ) from None
    return sources


def _open_dev(experiment: Experiment, network: Network, batch_frames: int) -> Source:
    """Raises ValueError naming the part, which is human-labelled as another one is."""
    try:
        return labelled_source(experiment, DEV, network, batch_frames)
    except ValueError as error:
        raise ValueError(f"every training is validated on part {DEV!r}, and cannot be: {error}") from None


def provenance(experiment: Experiment) -> dict[str, str]:
    """Which senone inventory and features a model, or targets, belong to."""
    return {
        "inventory": hash_file(experiment.path("senones", "inventory.json")),
        "features": hash_file(experiment.path("features", "normalisation.json")),
    }


def target_provenance(experiment: Experiment) -> dict[str, str]:
    """What the targets of this experiment belong to; the store sees to it that all of them are computed alike."""
    return provenance(experiment) | {"teacher": hash_file(experiment.path("teacher", "best.pt"))}


def targets_folder(experiment: Experiment, part: str) -> Path:
    """Where the store of a part's targets lies."""
    return experiment.path("targets" if part == UNLABELLED else f"targets-{part}")


def labelled_source(
    experiment: Experiment, part: str, network: Network, batch_frames: int, loss: Loss = PLAIN
) -> Source:
    """With the teacher's posteriors beside the labels, if the loss has a share for them."""
    labels: Sequence[Labels] = open_shards(experiment.path("senones", part), "labels")
    table = experiment.path("senones", part, TABLE)
    if loss.soft_share:
        targets = open_targets(experiment, part, loss)
        labels = ShardSequence(partial(_pair, labels, targets), min(len(labels), len(targets)))
        table = targets_folder(experiment, part) / f"labelled_{TABLE}"
    return _source(experiment, HUMAN_SOURCE, part, network, labels, table, batch_frames)


def open_source(
    experiment: Experiment, source: str, network: Network, batch_frames: int, loss: Loss = PLAIN
) -> Source:
    if source == HUMAN_SOURCE:
        return labelled_source(experiment, HUMAN, network, batch_frames, loss)
    targets, table = open_targets(experiment, UNLABELLED, loss), experiment.path("targets", TABLE)
    return _source(experiment, MACHINE_SOURCE, UNLABELLED, network, targets, table, batch_frames)


def open_targets(experiment: Experiment, part: str, loss: Loss = PLAIN) -> "ShardSequence[Targets]":
    """The teacher's targets for a part, shard by shard."""
    store = TargetStore(targets_folder(experiment, part), expect=target_provenance(experiment))
    if store.num_shards:
        stored = store.header["k"]
        require(loss.kept <= stored, "loss.kept", loss.kept, f"at most the {stored} that are stored")
    return ShardSequence(partial(Targets, store), store.num_shards)


def _source(
    experiment: Experiment,
    name: str,
    part: str,
    network: Network,
    labels: Sequence[Labels],
    table: Path,
    batch_frames: int,
) -> Source:
    features = open_features(experiment, part, network.normalisation)
    found = find_table(table, name, features, labels, experiment.config.features.jobs)
    return Source(name, features, labels, found, batch_frames, experiment.config.seed)


class Targets:
    """One shard of the target store, as a source's labels."""

    def __init__(self, store: TargetStore, number: int) -> None:
        self._store, self._number = store, number

    @property
    def ids(self) -> Sequence[str]:
        return self._store.shard_ids(self._number)

    num_frames = None  # whoever reads a record knows

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        ids, log_posteriors, dropped = self._store.decode(self._number, utterance_id)
        return {"ids": ids, "probabilities": np.exp(log_posteriors), "dropped": dropped}


def _pair(labels: Sequence[Labels], targets: Sequence[Labels], number: int) -> "_Both":
    return _Both(labels[number], targets[number])


class _Both:
    """The utterances of a shard that have human labels and targets: audio may have been spoilt in between."""

    num_frames = None  # whoever reads a record knows

    def __init__(self, labels: Labels, targets: Labels) -> None:
        self._labels, self._targets = labels, targets

    @property
    def ids(self) -> Sequence[str]:
        there = set(self._targets.ids)
        return [name for name in self._labels.ids if name in there]

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        return {**self._labels[utterance_id], **self._targets[utterance_id]}
