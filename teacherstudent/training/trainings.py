"""What the `teacher` and `student` steps train on, from the experiment's folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from teacherstudent.config import Network, Optimisation, Schedule
from teacherstudent.data.feature_reader import FeatureShard, open_features, read_normalisation
from teacherstudent.data.manifests import DEV, HUMAN, UNLABELLED
from teacherstudent.data.packed import open_shards
from teacherstudent.data.prefetch import num_readers
from teacherstudent.distributed import Communicator
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file
from teacherstudent.store import TargetStore
from teacherstudent.training.batches import Source, Utterances
from teacherstudent.training.schedule import HUMAN as HUMAN_SOURCE
from teacherstudent.training.schedule import MACHINE as MACHINE_SOURCE
from teacherstudent.training.schedule import Plan
from teacherstudent.training.train import Training, train
from teacherstudent.tying.senones import Inventory


def train_teacher(experiment: Experiment, comm: Communicator) -> list[Path]:
    teacher = experiment.config.teacher
    folder = experiment.path("teacher")
    return _train(
        experiment, comm, "teacher", folder, teacher.network, teacher.schedule, teacher.optimisation
    )


def train_student(experiment: Experiment, comm: Communicator, name: str) -> list[Path]:
    student = experiment.config.student_variants()[name]
    folder = experiment.path("students", name)
    return _train(
        experiment, comm, f"student {name}", folder, student.network, student.schedule, student.optimisation
    )


def _train(
    experiment: Experiment,
    comm: Communicator,
    name: str,
    folder: Path,
    network: Network,
    schedule: Schedule,
    optimisation: Optimisation,
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
        readers=num_readers(experiment.config.features),
    )
    batch_frames = optimisation.batch_frames
    sources = {source: open_source(experiment, source, network, batch_frames) for source in plan.sources}
    dev = labelled_source(experiment, DEV, network, batch_frames)
    train(comm, training, sources, dev)
    return [folder / "best.pt", folder / "final.pt", folder / "log.jsonl"]


def provenance(experiment: Experiment) -> dict[str, str]:
    """Which senone inventory and features a model, or targets, belong to."""
    return {
        "inventory": hash_file(experiment.path("senones", "inventory.json")),
        "features": hash_file(experiment.path("features", "normalisation.json")),
    }


def target_provenance(experiment: Experiment) -> dict[str, str]:
    """What the targets of this experiment belong to; the store sees to it that all of them are computed alike."""
    return provenance(experiment) | {"teacher": hash_file(experiment.path("teacher", "best.pt"))}


def labelled_source(experiment: Experiment, part: str, network: Network, batch_frames: int) -> Source:
    labels = open_shards(experiment.path("senones", part), "labels")
    return _source(experiment, HUMAN_SOURCE, part, network, labels, batch_frames)


def open_source(experiment: Experiment, source: str, network: Network, batch_frames: int) -> Source:
    if source == HUMAN_SOURCE:
        return labelled_source(experiment, HUMAN, network, batch_frames)
    store = TargetStore(experiment.path("targets"), expect=target_provenance(experiment))
    targets = [_Targets(store, number) for number in range(store.num_shards)]
    return _source(experiment, MACHINE_SOURCE, UNLABELLED, network, targets, batch_frames)


def _source(
    experiment: Experiment,
    name: str,
    part: str,
    network: Network,
    labels: Sequence[Utterances],
    batch_frames: int,
) -> Source:
    features = open_features(experiment, part, network.normalisation)
    if len(features) != len(labels):
        raise ValueError(
            f"part {part!r}: {len(features)} shards of features but {len(labels)} of labels: the step that makes the "
            "labels has to run again"
        )
    chosen = [_choose(*pair) for pair in zip(features, labels)]
    lengths = [shard.num_frames for shard in chosen]
    return Source(name, chosen, labels, lengths, batch_frames, experiment.config.seed)


def _choose(features: FeatureShard, labels: Utterances) -> "FeatureShard | _Chosen":
    return features if tuple(features.ids) == tuple(labels.ids) else _Chosen(features, labels)


class _Chosen:
    """The utterances of a feature shard that have labels: those without an alignment, or whose audio was spoilt when
    the teacher came to them, have none.
    """

    def __init__(self, features: FeatureShard, labels: Utterances) -> None:
        labelled = set(labels.ids)
        self._features = features
        self._rows = np.array([row for row, name in enumerate(features.ids) if name in labelled], np.int64)
        self.num_frames = features.num_frames[self._rows]

    @property
    def ids(self) -> Sequence[str]:
        ids = self._features.ids
        return [ids[row] for row in self._rows]

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        return self._features[utterance_id]


class _Targets:
    """One shard of the target store, as a source's labels."""

    def __init__(self, store: TargetStore, number: int) -> None:
        self._store, self._number = store, number

    @property
    def ids(self) -> Sequence[str]:
        return self._store.shard_ids(self._number)

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        ids, log_posteriors = self._store.read(self._number, utterance_id)
        return {"ids": ids, "probabilities": np.exp(log_posteriors)}
