"""Features beside labels: utterances without an alignment have no labels, and are not trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from teacherstudent.config import Config, Network
from teacherstudent.data.packed import PackedWriter, shard_path
from teacherstudent.experiment import Experiment
from teacherstudent.store import TargetWriter
from teacherstudent.training import trainings
from teacherstudent.training.batches import Position
from teacherstudent.training.trainings import labelled_source, target_provenance

FEATURES = [["a", "b", "c"], ["d", "e"]]
FRAMES = {"a": 5, "b": 6, "c": 7, "d": 8, "e": 9}


def write_shards(
    folder: Path, stem: str, name: str, shape: tuple[int, ...], ids: Sequence[Sequence[str]]
) -> None:
    for number, shard in enumerate(ids):
        with PackedWriter(shard_path(folder, stem, number), {}, {name: ("float32", shape)}) as writer:
            for utterance in shard:
                writer.write(
                    utterance, **{name: np.full((FRAMES[utterance], *shape), FRAMES[utterance], np.float32)}
                )


def make_experiment(folder: Path, labels: Sequence[Sequence[str]]) -> Experiment:
    experiment = Experiment(Config(folder=str(folder)))
    write_shards(experiment.path("features", "human"), "features", "values", (2,), FEATURES)
    write_shards(experiment.path("senones", "human"), "labels", "senone", (), labels)
    return experiment


@pytest.mark.parametrize("labels", [FEATURES, [["a", "c"], ["e"]], [["b"], []], [[], ["d", "e"]]])
def test_an_epoch_holds_every_utterance_that_has_labels_once_beside_its_own_features(
    tmp_path: Path, labels: Sequence[Sequence[str]]
) -> None:
    source = labelled_source(make_experiment(tmp_path, labels), "human", Network(), batch_frames=15)
    assert source.total_frames == sum(FRAMES[name] for shard in labels for name in shard)
    met = []
    for number in range(len(source.plan(0))):
        batch = source.batch(Position(0, number))
        assert batch.senones is not None
        for features, senones, length in zip(batch.features, batch.senones, batch.lengths.tolist()):
            assert (features[:length] == length).all() and (senones[:length] == length).all()
            met.append(length)
    assert sorted(met) == sorted(FRAMES[name] for shard in labels for name in shard)


@pytest.mark.parametrize("targets", [FEATURES, [["a", "c"], ["e"]], [[], ["d", "e"]]])
def test_an_epoch_of_machine_labels_holds_every_utterance_that_has_targets_beside_its_own_features(
    tmp_path: Path, targets: Sequence[Sequence[str]]
) -> None:
    """The senone of each frame is the number of frames: what is met shows whose targets they are."""
    experiment = Experiment(Config(folder=str(tmp_path)))
    write_shards(experiment.path("features", "unlabelled"), "features", "values", (2,), FEATURES)
    for name in ("senones/inventory.json", "features/normalisation.json", "teacher/best.pt"):
        experiment.path(name).parent.mkdir(parents=True, exist_ok=True)
        experiment.path(name).write_text(name)
    for number, names in enumerate(targets):
        path = shard_path(experiment.path("targets"), "targets", number)
        with TargetWriter(path, 20, 1, target_provenance(experiment)) as writer:
            for name in names:
                writer.write(name, torch.eye(20)[[FRAMES[name]] * FRAMES[name]])
    source = trainings.open_source(experiment, "machine", Network(), batch_frames=15)
    met = []
    for number in range(len(source.plan(0))):
        batch = source.batch(Position(0, number))
        assert batch.ids is not None
        for features, ids, length in zip(batch.features, batch.ids, batch.lengths.tolist()):
            assert (features[:length] == length).all() and (ids[:length] == length).all()
            met.append(length)
    assert sorted(met) == sorted(FRAMES[name] for shard in targets for name in shard)


def test_ids_are_read_when_they_are_needed_and_not_kept(tmp_path: Path) -> None:
    source = labelled_source(
        make_experiment(tmp_path, [["a", "c"], ["e"]]), "human", Network(), batch_frames=15
    )
    assert [shard.ids for shard in source.features] == [["a", "c"], ["e"]]
    for shard in source.features:
        assert not any(isinstance(value, list) for value in vars(shard).values())


def test_labels_in_another_order_or_of_other_utterances_are_refused(tmp_path: Path) -> None:
    for number, shard in enumerate((["c", "a"], ["a", "d"])):
        with pytest.raises(ValueError, match="different utterances"):
            labelled_source(
                make_experiment(tmp_path / str(number), [shard, ["d", "e"]]), "human", Network(), 15
            )


def test_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 shards of features but 1 of labels"):
        labelled_source(make_experiment(tmp_path, [["a"]]), "human", Network(), 15)
