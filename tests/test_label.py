"""Targets are the teacher's highest posteriors, utterance by utterance, whoever labels and however many."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from teacherstudent.config import Config, Label, Network
from teacherstudent.data.features import Normalisation
from teacherstudent.data.packed import PackedShard, PackedWriter, open_shards, shard_path
from teacherstudent.distributed import connect, in_process
from teacherstudent.experiment import Experiment
from teacherstudent.posteriors import top_k
from teacherstudent.store import TargetStore
from teacherstudent.training import checkpoint
from teacherstudent.training import label as label_module
from teacherstudent.training.batches import collate
from teacherstudent.training.label import infer, label
from teacherstudent.training.models import AcousticModel, build_model, model_from_state, model_state

torch.set_num_threads(1)

NUM_FEATURES, NUM_SENONES, KEPT = 6, 9, 4
SHARDS = [[7, 30, 12], [5], [18, 18, 3, 25], [9, 40], [11]]  # frames of the utterances of each
TEACHER = Network(layers=2, cells=5, bidirectional=True)


def open_experiment(folder: Path, batch_frames: int = 40) -> Experiment:
    """After `prepare` and `teacher`: the features of the unlabelled part, and a teacher."""
    experiment = Experiment(Config(folder=str(folder), label=Label(KEPT, batch_frames)))
    experiment.create()
    random = np.random.default_rng(8)
    for number, lengths in enumerate(SHARDS):
        path = shard_path(experiment.path("features", "unlabelled"), "features", number)
        with PackedWriter(path, {}, {"values": ("float16", (NUM_FEATURES,))}) as writer:
            for place, length in enumerate(lengths):  # no order of the alphabet, nor of length
                writer.write(
                    f"{9 - place}-{number}",
                    values=random.normal(size=(length, NUM_FEATURES)).astype("float16"),
                )
    blank = Normalisation(np.zeros(NUM_FEATURES, np.float32), np.full(NUM_FEATURES, 2, np.float32))
    teacher = build_model(TEACHER, NUM_SENONES, blank, seed=2)
    checkpoint.save(experiment.path("teacher", "best.pt"), model_state(teacher, {}))
    experiment.path("senones").mkdir()
    experiment.path("senones", "inventory.json").write_text("an inventory")
    experiment.path("features", "normalisation.json").write_text("a normalisation")
    return experiment


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return open_experiment(tmp_path / "experiment")


def read_features(experiment: Experiment) -> list[PackedShard]:
    return open_shards(experiment.path("features", "unlabelled"), "features")


def label_with(experiment: Experiment, num_workers: int) -> list[bytes]:
    outputs = in_process(num_workers, lambda comm: label(experiment, comm), timeout_seconds=30)
    assert all(other == outputs[0] for other in outputs)
    return [path.read_bytes() for path in outputs[0]]


def teacher_of(experiment: Experiment) -> AcousticModel:
    return model_from_state(checkpoint.load(experiment.path("teacher", "best.pt")))


@torch.no_grad()
def test_targets_are_the_highest_posteriors_of_a_forward_pass_of_each_utterance_alone(
    experiment: Experiment,
) -> None:
    label_with(experiment, 1)
    store, model = TargetStore(experiment.path("targets")), teacher_of(experiment)
    for number, shard in enumerate(read_features(experiment)):
        for name, arrays in shard:
            values = torch.from_numpy(arrays["values"].astype(np.float32))
            logits = model(values[None], torch.tensor([len(values)]))[0]
            posteriors = logits.softmax(dim=1)
            best = top_k(logits, KEPT)
            ids, log_posteriors = store.read(number, name)
            kept = posteriors.gather(1, torch.from_numpy(ids.astype(np.int64)))
            assert ids.shape == (len(values), KEPT)
            torch.testing.assert_close(kept, best.log_posteriors.exp(), rtol=1e-3, atol=1e-5)
            renormalised = kept / kept.sum(dim=1, keepdim=True)
            np.testing.assert_allclose(np.exp(log_posteriors), renormalised, rtol=2e-3, atol=1e-4)
            dropped = 1 - kept.sum(dim=1)
            np.testing.assert_allclose(store.dropped(name), dropped, rtol=2e-3, atol=1e-4)


def test_the_shards_have_the_utterances_of_the_features_in_their_order(experiment: Experiment) -> None:
    label_with(experiment, 2)
    store = TargetStore(experiment.path("targets"))
    shards = read_features(experiment)
    assert store.num_shards == len(SHARDS)
    for number, shard in enumerate(shards):
        assert [int(name[0]) for name in shard.ids] == [9 - place for place in range(len(shard.ids))]
        assert store.shard_ids(number) == shard.ids
        assert [len(ids) for _, ids, _ in store.iter_shard(number)] == SHARDS[number]


def test_the_bytes_and_the_batches_do_not_depend_on_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[int]] = []  # the frames of the utterances in each

    def recording(features, labels):
        batches.append([len(values) for values in features])
        return collate(features, labels)

    monkeypatch.setattr(label_module, "collate", recording)
    found = []
    for size in (1, 2, 3, len(SHARDS) + 1):
        found.append((label_with(open_experiment(tmp_path / str(size)), size), sorted(batches)))
        batches.clear()
    assert all(other == found[0] for other in found[1:])


def test_the_shards_are_dealt_out_evenly_among_the_workers(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    workers: list[str] = []
    count_inferences(monkeypatch, lambda _: workers.append(threading.current_thread().name))
    label_with(experiment, 2)
    assert sorted(workers.count(worker) for worker in set(workers)) == [2, 3]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_shard_that_is_there_is_not_labelled_again(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    whole = label_with(experiment, 1)
    outputs = label(experiment, connect())
    for number in (1, 2):
        outputs[number].unlink()
    times = {path: path.stat().st_mtime_ns for path in outputs if path.exists()}
    labelled = count_inferences(monkeypatch)
    assert label_with(experiment, num_workers) == whole
    assert sorted(labelled) == [path.name.replace("targets", "features") for path in outputs[1:3]]
    assert {path: path.stat().st_mtime_ns for path in times} == times


def count_inferences(monkeypatch: pytest.MonkeyPatch, then: Callable[[str], None] | None = None) -> list[str]:
    """The names of the feature shards that the teacher reads from here on."""
    read: list[str] = []

    def counting(model, shard, *others):
        read.append(shard.path.name)
        if then:
            then(shard.path.name)
        return infer(model, shard, *others)

    monkeypatch.setattr(label_module, "infer", counting)
    return read


@pytest.mark.parametrize("number", range(len(SHARDS)))
def test_labelling_that_was_interrupted_at_any_shard_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    whole = label_with(open_experiment(tmp_path / "whole"), 1)
    experiment = open_experiment(tmp_path / "interrupted")

    def interrupt(name: str) -> None:
        if name == f"features.{number:06d}.h5":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_inferences(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            label(experiment, connect())
    there = {path.name for path in experiment.path("targets").iterdir()}
    assert there == {f"targets.{done:06d}.h5" for done in range(number)}
    assert label_with(experiment, 3) == whole


@pytest.mark.parametrize("batch_frames", [1, 20, 60, 10_000])
def test_inference_in_batches_equals_inference_of_each_utterance_and_keeps_the_order(
    experiment: Experiment, batch_frames: int
) -> None:
    model = teacher_of(experiment)
    for shard in read_features(experiment):
        alone = dict(infer(model, shard, 1))
        found = list(infer(model, shard, batch_frames))
        assert tuple(name for name, _ in found) == shard.ids
        for name, logits in found:
            torch.testing.assert_close(logits, alone[name], rtol=1e-4, atol=1e-5)


def test_targets_are_refused_by_who_expects_another_teacher(experiment: Experiment) -> None:
    label_with(experiment, 1)
    provenance = TargetStore(experiment.path("targets")).header["provenance"]
    assert set(provenance) == {"teacher", "inventory", "features", "numeric_mode"}
    with pytest.raises(ValueError, match=r"teacher.*Label again"):
        TargetStore(experiment.path("targets"), expect=provenance | {"teacher": "another"})
