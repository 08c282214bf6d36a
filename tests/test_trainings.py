"""Features beside labels: utterances without an alignment have no labels, and are not trained on."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_training import make_source

from teacherstudent.config import Config, Loss, Network, Schedule
from teacherstudent.data.feature_reader import open_features
from teacherstudent.data.packed import PackedWriter, open_shards, shard_path
from teacherstudent.distributed import in_process
from teacherstudent.experiment import Experiment
from teacherstudent.settings import build
from teacherstudent.store import TargetWriter
from teacherstudent.training import table_files, trainings
from teacherstudent.training.batches import Position, Source
from teacherstudent.training.schedule import Plan
from teacherstudent.training.table_files import TABLE, write_table
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
    for number in range(source.num_batches(0)):
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
    for number in range(source.num_batches(0)):
        batch = source.batch(Position(0, number))
        assert batch.ids is not None
        for features, ids, length in zip(batch.features, batch.ids, batch.lengths.tolist()):
            assert (features[:length] == length).all() and (ids[:length] == length).all()
            met.append(length)
    assert sorted(met) == sorted(FRAMES[name] for shard in targets for name in shard)


def test_the_first_opening_looks_at_every_shard_and_the_next_at_none(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, [["a", "c"], ["e"]])
    source = labelled_source(experiment, "human", Network(), batch_frames=15)
    shards = [*tmp_path.glob("*/human/*.h5")]
    assert len(shards) == 4
    for path in shards:
        path.write_bytes(b"no shard any more")
    again = labelled_source(experiment, "human", Network(), batch_frames=15)
    assert again.num_batches(0) == source.num_batches(0) == 2
    assert again.total_frames == source.total_frames
    with pytest.raises(ValueError, match=r"\.h5.* damaged"):
        again.batch(Position())


def test_a_shard_that_was_exchanged_after_the_table_was_made_is_an_error_that_names_both(
    tmp_path: Path,
) -> None:
    experiment = make_experiment(tmp_path, [["a", "c"], ["e"]])
    labelled_source(experiment, "human", Network(), batch_frames=15)
    write_shards(experiment.path("senones", "human"), "labels", "senone", (), [["a", "b"], ["e"]])
    table = experiment.path("senones", "human", TABLE)
    with pytest.raises(ValueError, match=rf"'human', shard 0: its 2 utterances .* \({table}\)"):
        labelled_source(experiment, "human", Network(), batch_frames=15).batch(Position())
    table.unlink()
    assert labelled_source(experiment, "human", Network(), batch_frames=15).batch(Position()).num_frames


def test_a_table_of_fewer_shards_than_there_are_now_is_made_anew(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, FEATURES)
    before = labelled_source(experiment, "human", Network(), batch_frames=15).total_frames
    for step, stem, name, shape in (
        ("features", "features", "values", (2,)),
        ("senones", "labels", "senone", ()),
    ):
        write_shards(experiment.path(step, "human"), stem, name, shape, [*FEATURES, ["c", "b"]])
    source = labelled_source(experiment, "human", Network(), batch_frames=15)
    assert source.total_frames == before + FRAMES["c"] + FRAMES["b"]


def test_a_table_made_in_processes_is_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = make_experiment(tmp_path, [["a", "c"], ["e"]])
    labels = open_shards(experiment.path("senones", "human"), "labels")
    written = []
    for shards_of_a_process in (1000, 1):
        monkeypatch.setattr(table_files, "_SHARDS_OF_A_PROCESS", shards_of_a_process)
        write_table(tmp_path / TABLE, "human", open_features(experiment, "human"), labels, jobs=2)
        written.append((tmp_path / TABLE).read_bytes())
    assert written[0] == written[1]


def test_labels_in_another_order_or_of_other_utterances_are_refused(tmp_path: Path) -> None:
    for number, shard in enumerate((["c", "a"], ["a", "d"])):
        with pytest.raises(ValueError, match="different utterances"):
            labelled_source(
                make_experiment(tmp_path / str(number), [shard, ["d", "e"]]), "human", Network(), 15
            )


def test_another_number_of_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'human': 2 feature shards but 1 label shards"):
        labelled_source(make_experiment(tmp_path, [["a"]]), "human", Network(), 15)


def write_targets(experiment: Experiment, name: str, targets: Sequence[Sequence[str]]) -> None:
    """The best senone of each frame is its utterance's number of frames."""
    for file in ("senones/inventory.json", "features/normalisation.json", "teacher/best.pt"):
        experiment.path(file).parent.mkdir(parents=True, exist_ok=True)
        experiment.path(file).write_text(file)
    for number, names in enumerate(targets):
        path = shard_path(experiment.path(name), "targets", number)
        with TargetWriter(path, 20, 2, target_provenance(experiment)) as writer:
            for utterance in names:
                writer.write(utterance, 3 * torch.eye(20)[[FRAMES[utterance]] * FRAMES[utterance]])


@pytest.mark.parametrize("targets", [FEATURES, [["a", "c"], ["e"]]])
def test_human_labelled_frames_have_the_teachers_posteriors_beside_their_labels_if_the_loss_asks_for_them(
    tmp_path: Path, targets: Sequence[Sequence[str]]
) -> None:
    experiment = make_experiment(tmp_path, [["a", "c"], ["d", "e"]])
    write_targets(experiment, "targets-human", targets)
    plain = trainings.open_source(experiment, "human", Network(), batch_frames=15)
    assert plain.batch(Position(0, 0)).ids is None
    source = trainings.open_source(experiment, "human", Network(), 15, Loss(soft_share=0.5))
    met = []
    for number in range(source.num_batches(0)):
        batch = source.batch(Position(0, number))
        assert batch.senones is not None and batch.ids is not None
        assert batch.probabilities is not None and batch.dropped is not None
        for row, length in enumerate(batch.lengths.tolist()):
            assert (batch.senones[row, :length] == length).all()
            assert (batch.ids[row, :length, 0] == length).all()
            kept = 1 - batch.dropped[row, :length]
            highest = np.exp(3) / (np.exp(3) + 19)
            assert torch.allclose(
                kept * batch.probabilities[row, :length, 0], torch.tensor(highest).float(), atol=0.01
            )
            assert (batch.dropped[row, length:] == 0).all()
            met.append(length)
    expected = [FRAMES[name] for names in targets for name in names if name in "acde"]
    assert sorted(met) == sorted(expected)


def test_a_store_that_keeps_fewer_senones_than_the_loss_takes_is_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, FEATURES)
    write_targets(experiment, "targets-human", FEATURES)
    with pytest.raises(ValueError, match=r"loss\.kept = 3: it must be at most the 2 that are stored"):
        trainings.open_source(experiment, "human", Network(), 15, Loss(soft_share=0.5, kept=3))


@pytest.mark.parametrize("mode", ["interleaved", "sequential", "mixed", "machine-only"])
def test_a_mode_without_the_data_it_needs_is_an_error_naming_mode_and_part(tmp_path: Path, mode: str) -> None:
    plan = Plan(Schedule(mode=mode, steps=10), 0.1)  # type: ignore[arg-type]
    experiment = make_experiment(tmp_path, FEATURES)
    write_shards(experiment.path("features", "unlabelled"), "features", "values", (2,), [[], []])
    write_targets(experiment, "targets", [[], []])
    with pytest.raises(ValueError, match=rf"schedule\.mode = '{mode}' trains on part 'unlabelled'.*machine"):
        trainings._open_sources(experiment, plan, Network(), 15)
    assert set(
        trainings._open_sources(experiment, Plan(Schedule(mode="human-only"), 0.1), Network(), 15)
    ) == {"human"}


def test_no_human_labelled_utterance_is_an_error_naming_mode_and_part(tmp_path: Path) -> None:
    plan = Plan(Schedule(mode="human-only", steps=10), 0.1)
    with pytest.raises(ValueError, match=r"schedule\.mode = 'human-only' trains on part 'human'"):
        trainings._open_sources(make_experiment(tmp_path, [[], []]), plan, Network(), 15)


def test_mixed_sources_are_opened_with_their_shares_of_a_batch(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, FEATURES)
    write_shards(experiment.path("features", "unlabelled"), "features", "values", (2,), FEATURES)
    write_targets(experiment, "targets", FEATURES)
    sources = trainings._open_sources(experiment, Plan(Schedule(mode="mixed", steps=10), 0.1), Network(), 400)
    assert {name: source.batch_frames for name, source in sources.items()} == {"human": 100, "machine": 300}


def test_of_the_machine_labelled_shards_the_first_are_taken(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, FEATURES)
    write_shards(experiment.path("features", "unlabelled"), "features", "values", (2,), FEATURES)
    write_targets(experiment, "targets", FEATURES)

    def open_sources(num_shards: int) -> dict[str, Source]:
        schedule = Schedule(mode="mixed", steps=10, machine_shards=num_shards)
        return trainings._open_sources(experiment, Plan(schedule, 0.1), Network(), 400)

    some, every = open_sources(1), open_sources(0)
    assert some["machine"].num_utterances == len(FEATURES[0]) < every["machine"].num_utterances
    assert some["human"].num_utterances == every["human"].num_utterances
    with pytest.raises(ValueError, match=r"part 'unlabelled', .*machine_shards = 9: source 'machine' has"):
        open_sources(9)


def test_held_out_utterances_are_validated_on_and_never_trained_on() -> None:
    whole = make_source("machine", 30)
    rest, held_out = whole.hold_out(3)

    def lengths(source: Source) -> list[int]:
        batches = [source.batch(Position(0, number)) for number in range(source.num_batches(0))]
        return sorted(length for batch in batches for length in batch.lengths.tolist())

    assert len(lengths(held_out)) == 3
    assert sorted(lengths(rest) + lengths(held_out)) == lengths(whole)  # every length is there once
    with pytest.raises(ValueError, match="0 utterances to hold out of 30"):
        whole.hold_out(0)


def test_of_all_workers_the_first_tells_that_fewer_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables = {"student": {"schedule": {"held_out_utterances": 4}}}
    experiment = Experiment(build(Config(folder=str(tmp_path)), tables, ""))
    there = {
        "_open_sources": lambda: {"machine": make_source("machine", 30)},
        "_open_dev": lambda: make_source("dev"),
        "provenance": dict,
        "read_normalisation": list,
        "train": list,
    }
    for name, make in there.items():
        monkeypatch.setattr(trainings, name, lambda *_, make=make: make())
    monkeypatch.setattr(trainings.Inventory, "load", lambda _: SimpleNamespace(num_senones=5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_process(3, lambda comm: trainings.train_student(experiment, comm, "student"), timeout_seconds=60)
    [told] = [str(warning.message) for warning in caught]
    assert "schedule.held_out_utterances = 4: that is more than a tenth of the 30" in told
    assert "3 are held out" in told


def test_a_development_part_without_labels_is_an_error_naming_it(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path, FEATURES)
    write_shards(experiment.path("features", "dev"), "features", "values", (2,), FEATURES)
    write_shards(experiment.path("senones", "dev"), "labels", "senone", (), [[], []])
    with pytest.raises(ValueError, match=r"validated on part 'dev', and cannot be: .*holds no utterance"):
        trainings._open_dev(experiment, Network(), 15)
