"""Targets are the teacher's highest posteriors, utterance by utterance, whoever labels and however many."""

import json
import shutil
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from labelling import KEPT, NUM_SENONES, SHARDS, open_experiment, write_features

from teacherstudent.data.packed import PackedShard, hash_path, open_shards
from teacherstudent.distributed import connect, in_process
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file
from teacherstudent.posteriors import top_k
from teacherstudent.store import TargetStore
from teacherstudent.targets.target_codec import MAX_DROPPED_ERROR, MAX_LEVEL_ERROR_NATS
from teacherstudent.training import checkpoint
from teacherstudent.training import inference as inference_module
from teacherstudent.training import label as label_module
from teacherstudent.training.batches import collate
from teacherstudent.training.inference import has_bfloat16
from teacherstudent.training.label import label
from teacherstudent.training.models import AcousticModel, model_from_state

torch.set_num_threads(1)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    return open_experiment(tmp_path / "experiment")


def read_features(experiment: Experiment) -> list[PackedShard]:
    return open_shards(experiment.path("features", "unlabelled"), "features")


def contents(experiment: Experiment) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(experiment.path("targets").iterdir())}


def label_with(experiment: Experiment, num_workers: int) -> dict[str, bytes]:
    outputs = in_process(num_workers, lambda comm: label(experiment, comm), timeout_seconds=30)
    assert all(other == outputs[0] for other in outputs)
    found = contents(experiment)
    assert set(found) == {path.name for path in outputs[0]}  # nothing else is left there
    assert not experiment.path("steps", ".claims").exists()
    return found


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
            torch.testing.assert_close(kept.sort(descending=True).values, best.log_posteriors.exp())
            true = (kept / kept.sum(dim=1, keepdim=True)).log().numpy()
            assert np.abs(log_posteriors - true).max() <= 2 * MAX_LEVEL_ERROR_NATS + 1e-5
            dropped = 1 - kept.sum(dim=1).numpy()
            assert np.abs(store.dropped(name) - dropped).max() <= MAX_DROPPED_ERROR + 1e-5


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

    monkeypatch.setattr(inference_module, "collate", recording)
    found = []
    for size in (1, 2, 3, len(SHARDS) + 1):
        found.append((label_with(open_experiment(tmp_path / str(size)), size), sorted(batches)))
        batches.clear()
    assert all(other == found[0] for other in found[1:])


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_shard_that_is_there_is_not_labelled_again(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, num_workers: int
) -> None:
    whole = label_with(experiment, 1)
    targets = experiment.path("targets")
    for number in (1, 2):
        (targets / f"targets.{number:06d}.h5").unlink()
    times = {path: path.stat().st_mtime_ns for path in targets.glob("*.h5")}
    labelled = count_batches(monkeypatch)
    assert label_with(experiment, num_workers) == whole
    assert set(labelled) == {1, 2}
    assert {path: path.stat().st_mtime_ns for path in times} == times


def count_batches(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None] | None = None) -> list[int]:
    """The shard of every batch of features that is read from here on."""
    read: list[int] = []
    original = label_module._ReadBatch.__call__

    def counting(self, request):
        read.append(request.shard)
        if then:
            then(request.shard)
        return original(self, request)

    monkeypatch.setattr(label_module._ReadBatch, "__call__", counting)
    return read


@pytest.mark.parametrize("after", range(1, len(SHARDS)))
def test_labelling_that_was_interrupted_after_any_shard_ends_with_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    whole = label_with(open_experiment(tmp_path / "whole"), 1)
    experiment = open_experiment(tmp_path / "interrupted")
    met: list[int] = []

    def interrupt(number: int) -> None:
        met.append(number)
        if len(set(met)) > after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        count_batches(patch, interrupt)
        with pytest.raises(KeyboardInterrupt):
            label(experiment, connect())
    there = set(contents(experiment))
    assert not any(name.startswith(".") for name in there)
    assert sum(name.endswith(".h5") for name in there) <= after
    assert label_with(experiment, 3) == whole


def test_targets_are_refused_by_who_expects_another_teacher(experiment: Experiment) -> None:
    label_with(experiment, 1)
    provenance = TargetStore(experiment.path("targets")).header["provenance"]
    settings = {"batch_frames", "threads", "chunk_frames", "context_frames"}
    assert set(provenance) == {"teacher", "inventory", "features", "numeric_mode"} | settings
    with pytest.raises(ValueError, match=r"teacher.*Label again"):
        TargetStore(experiment.path("targets"), expect=provenance | {"teacher": "another"})


# -- what cannot be labelled ---------------------------------------------------------------------------------


def spoil(
    monkeypatch: pytest.MonkeyPatch, names: Sequence[str], how: Callable[[np.ndarray], np.ndarray]
) -> None:
    """As if these utterances' audio had changed since `prepare`."""
    original = PackedShard.__getitem__

    def spoilt(self, name):
        arrays = original(self, name)
        return {"values": how(arrays["values"].copy())} if name in names else arrays

    monkeypatch.setattr(PackedShard, "__getitem__", spoilt)


def lose(values: np.ndarray) -> np.ndarray:
    raise ValueError("the audio is missing: a.wav")


def put_nan(values: np.ndarray) -> np.ndarray:
    values[3, 1] = np.nan
    return values


HOWS = {
    "the audio is missing": lose,
    "no frames": lambda values: values[:0],
    "another length": lambda values: values[:-1],
    "features that are not finite": put_nan,
}


@pytest.mark.parametrize("kind", HOWS)
def test_an_utterance_that_went_bad_is_left_out_and_listed_and_the_others_are_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    whole = open_experiment(tmp_path / "whole", batch_frames=1)  # alone in its batch
    label_with(whole, 1)
    experiment = open_experiment(tmp_path / "spoilt", batch_frames=1, max_bad_share=0.5)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="2 of 12 unlabelled utterances"):
        spoil(patch, ["9-1", "8-2"], HOWS[kind])  # the first is all of its shard
        found = label_with(experiment, 1)
    assert json.loads(found["report.json"]) == {"utterances": 10, "left_out": {kind: 2}}
    listed = [json.loads(line) for line in found["skipped.jsonl"].splitlines()]
    assert [entry["id"] for entry in listed] == ["9-1", "8-2"]
    assert str(tmp_path).encode() not in found["skipped.jsonl"]
    store, true = TargetStore(experiment.path("targets")), TargetStore(whole.path("targets"))
    assert store.shard_ids(2) == ("9-2", "7-2", "6-2")
    assert store.shard_ids(1) == ()
    for name in store.shard_ids(2):
        for got, expected in zip(store[name], true[name]):
            assert np.array_equal(got, expected)
    store.verify()


def test_a_teacher_that_does_not_answer_with_numbers_loses_that_utterance_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_experiment(tmp_path / "experiment", max_bad_share=0.5)
    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="not finite"):
        encode = AcousticModel.encode

        def overflow(self, features, lengths, noise=None):
            hidden = encode(self, features, lengths, noise)
            hidden[lengths == 25, 2] = np.nan
            return hidden

        patch.setattr(AcousticModel, "encode", overflow)
        found = label_with(experiment, 1)
    assert json.loads(found["left_out.000002.json"]) == [["6-2", "the teacher's output is not finite"]]


def test_more_bad_audio_than_allowed_ends_the_job_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_experiment(tmp_path / "experiment", max_bad_share=0.1)
    spoil(monkeypatch, ["8-2", "9-4"], lose)
    with pytest.raises(ValueError, match=r"(?s)2 of 12.*a\.wav.*label\.max_bad_share = 0\.1"):
        label(experiment, connect())


def test_no_warning_is_given_where_nothing_is_left_out(experiment: Experiment) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        label_with(experiment, 1)


# -- what the store is computed in ---------------------------------------------------------------------------


@pytest.mark.parametrize("can", [True, False])
def test_auto_is_resolved_once_and_kept_by_whoever_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool
) -> None:
    if can and not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    experiment = open_experiment(tmp_path / "experiment", numeric_mode="auto")
    monkeypatch.setattr(label_module, "has_bfloat16", lambda device: can)
    whole = label_with(experiment, 1)
    mode = "bf16" if can else "fp32"
    assert TargetStore(experiment.path("targets")).header["provenance"]["numeric_mode"] == mode
    experiment.path("targets", "targets.000002.h5").unlink()
    monkeypatch.setattr(label_module, "has_bfloat16", lambda device: not can)
    assert label_with(experiment, 2) == whole


def test_a_worker_without_bfloat16_refuses_a_store_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = open_experiment(tmp_path / "experiment", numeric_mode="bf16")
    monkeypatch.setattr(inference_module, "has_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match=r"bf16.*this processor does not have"):
        label(experiment, connect())
    assert not list(experiment.path("targets").glob("*.h5"))


@pytest.mark.skipif(not has_bfloat16(), reason="this processor has no bfloat16")
def test_bfloat16_gives_nearly_the_same_targets_and_the_same_bytes_by_any_number_of_workers(
    tmp_path: Path,
) -> None:
    found = [label_with(open_experiment(tmp_path / str(size), numeric_mode="bf16"), size) for size in (1, 3)]
    assert found[0] == found[1]
    label_with(open_experiment(tmp_path / "fp32"), 1)
    store, true = (TargetStore(tmp_path / name / "targets") for name in ("1", "fp32"))
    for number in range(len(SHARDS)):
        for (name, _, got), (_, _, expected) in zip(store.iter_shard(number), true.iter_shard(number)):
            assert np.abs(got - expected).max() < 0.15, name
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_coding_of_the_settings_is_the_store_s(tmp_path: Path) -> None:
    experiment = open_experiment(tmp_path / "experiment", coding="plain")
    label_with(experiment, 1)
    assert TargetStore(experiment.path("targets")).header["coding"]["name"] == "plain"


def test_the_human_labelled_part_has_a_store_of_its_own_if_it_is_asked_for(tmp_path: Path) -> None:
    plain, both = open_experiment(tmp_path / "plain"), open_experiment(tmp_path / "both", human=True)
    human = [[4, 9], [6]]
    write_features(both, "human", human)
    whole = label_with(plain, 1)
    outputs = in_process(2, lambda comm: label(both, comm), timeout_seconds=30)[0]
    assert contents(both) == whole
    folder = both.path("targets-human")
    assert {path for path in outputs if path.parent == folder} == set(folder.iterdir())
    store, features = TargetStore(folder), open_shards(both.path("features", "human"), "features")
    assert store.header["provenance"] == TargetStore(plain.path("targets")).header["provenance"]
    for number, shard in enumerate(features):
        assert store.shard_ids(number) == tuple(shard.ids)
        for name, arrays in shard:
            assert len(store[name][0]) == len(arrays["values"])
    assert not both.path("steps", ".claims").exists()


def test_k_of_zero_keeps_every_senone_and_nothing_is_dropped(tmp_path: Path) -> None:
    experiment = open_experiment(tmp_path, k=0)
    label(experiment, connect())
    store = TargetStore(experiment.path("targets"))
    assert store.header["k"] == NUM_SENONES
    for number in range(store.num_shards):
        for _, decoded in store.iter_decoded(number):
            assert (np.sort(decoded.ids, axis=1) == np.arange(NUM_SENONES)).all()
            assert (decoded.dropped == 0).all()


def test_more_senones_than_there_are_cannot_be_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label\.k = 10: it must be at most 9"):
        label(open_experiment(tmp_path, k=10), connect())


# -- many workers --------------------------------------------------------------------------------------------


def test_a_shard_that_another_worker_holds_is_waited_for_and_one_it_finished_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_experiment(tmp_path / "whole")
    label_with(whole, 1)
    experiment = open_experiment(tmp_path / "experiment", lease_seconds=0.5)
    labelled = count_batches(monkeypatch)
    experiment.path("targets").mkdir()
    with experiment.claims() as other:
        assert other.take("targets.000001")

        def finish() -> None:
            done = experiment.path("targets", "targets.000000.h5")
            assert wait_until(done.exists)
            for name in ("targets.000001.h5.sha256", "left_out.000001.json", "targets.000001.h5"):
                shutil.copy(whole.path("targets", name), experiment.path("targets", name))

        thread = threading.Thread(target=finish)
        thread.start()
        label(experiment, connect())
        thread.join()
    assert 1 not in labelled
    assert contents(experiment) == contents(whole)


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> bool:
    for _ in range(int(seconds / 0.02)):
        if holds():
            return True
        threading.Event().wait(0.02)
    return False


def test_the_hashes_of_the_record_are_those_of_the_files(experiment: Experiment) -> None:
    outputs = label(experiment, connect())
    for path in outputs:
        if path.suffix == ".h5":
            assert hash_path(path).read_text().split()[0] == hash_file(path)
