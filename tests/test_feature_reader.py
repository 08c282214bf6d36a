"""Stored or computed at every use, features are the same; every normalisation keeps the model's own one right."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_audio import make_cut, make_samples, open_experiment, write_audio, write_cuts, write_data

from teacherstudent.config import Conditions
from teacherstudent.data.feature_reader import FeatureShard, open_features, read_normalisation
from teacherstudent.data.features import (
    PRIOR_FRAMES,
    Moments,
    Normalisation,
    normalise_by,
    normalise_causally,
)
from teacherstudent.data.manifests import PARTS
from teacherstudent.data.packed import open_shards
from teacherstudent.data.prepare import prepare
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


@pytest.fixture
def conditions(tmp_path: Path) -> Conditions:
    random = np.random.default_rng(0)
    write_audio(tmp_path / "noises" / "n.wav", random.normal(size=3000) / 10)
    write_audio(tmp_path / "rooms" / "r.wav", np.r_[1.0, random.normal(size=200) / 20])
    return Conditions(
        parts=PARTS,
        speeds=(0.9, 1.1),
        noise_folder=str(tmp_path / "noises"),
        impulse_response_folder=str(tmp_path / "rooms"),
    )


def prepared(data: Path, name: str = "experiment", **settings: object) -> Experiment:
    experiment = open_experiment(data, name, **settings)  # type: ignore[arg-type]
    prepare(experiment)
    return experiment


def bytes_of(shard: FeatureShard) -> dict[str, bytes]:
    return {name: arrays["values"].tobytes() for name, arrays in shard}


def test_a_training_hears_copies_in_other_noise_in_every_epoch_and_nothing_else_changes(
    data: Path, conditions: Conditions
) -> None:
    kept = prepared(data, "kept", conditions=conditions, storage="on-the-fly")
    drawing = replace(conditions, redraw=True)
    drawn = prepared(data, "drawn", conditions=drawing, storage="on-the-fly")
    as_prepared, shard = (open_features(experiment, "human")[0] for experiment in (kept, drawn))
    first = bytes_of(as_prepared)
    assert bytes_of(shard) == bytes_of(shard.in_epoch(0)) == first == bytes_of(as_prepared.in_epoch(2))
    second, third = (bytes_of(pickle.loads(pickle.dumps(shard.in_epoch(epoch)))) for epoch in (1, 2))
    assert second == bytes_of(shard.in_epoch(1))
    noisy = {name for name in shard.ids if "_snr" in name}
    assert noisy
    assert {name for name in shard.ids if len({first[name], second[name], third[name]}) > 1} == noisy
    assert [len(values) for values in second.values()] == [len(values) for values in first.values()]


def test_what_cannot_be_drawn_sounds_as_it_was_prepared_and_that_is_told(
    data: Path, conditions: Conditions
) -> None:
    drawing = replace(conditions, redraw=True, speeds=())
    experiment = prepared(data, "drawn", conditions=drawing, storage="on-the-fly")
    shard = open_features(experiment, "human")[0]
    wanted = bytes_of(shard)
    write_json(
        experiment.path("features", "sounds.json"),
        {
            "noises": [{"path": "gone.wav", "seconds": 9.0}],
            "impulse_responses": [{"path": "r.wav", "seconds": 1}],
        },
    )
    with pytest.warns(UserWarning, match=r"redraw: \S+_snr\S+ in epoch 1: the condition cannot be made"):
        assert bytes_of(open_features(experiment, "human")[0].in_epoch(1)) == wanted


@pytest.mark.parametrize("normalisation", ["global", "speaker", "causal"])
def test_features_on_the_fly_are_those_that_would_have_been_stored(
    data: Path, conditions: Conditions, normalisation: str
) -> None:
    stored = prepared(data, "stored", conditions=conditions)
    computed = prepared(data, "computed", conditions=conditions, storage="on-the-fly")
    assert not list(computed.folder.rglob("features.*.h5"))
    for part in PARTS:
        pairs = zip(*(open_features(e, part, normalisation) for e in (stored, computed)), strict=True)  # type: ignore
        for kept, made in pairs:
            assert list(made.ids) == list(kept.ids)
            assert len(kept) >= 5
            assert made.num_frames.tolist() == kept.num_frames.tolist()
            for (name, values), (_, expected) in zip(made, kept, strict=True):
                assert values["values"].dtype == expected["values"].dtype
                assert np.array_equal(values["values"], expected["values"])
                assert np.array_equal(made[name]["values"], kept[name]["values"])
    for name in ("normalisation.json", "report.json", "human/speakers.h5", "human/cuts.000000.jsonl"):
        assert computed.path("features", name).read_bytes() == stored.path("features", name).read_bytes()


def test_values_do_not_depend_on_the_number_of_threads(data: Path) -> None:
    shard = open_features(prepared(data, storage="on-the-fly", num_mels=64), "human")[0]
    before, values = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            values.append(shard["human-1"]["values"])
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(*values)


def test_shards_do_not_keep_the_ids_that_they_are_asked_for(data: Path) -> None:
    experiment = prepared(data, storage="on-the-fly")
    for shard in open_features(experiment, "human", "speaker"):
        assert all(shard[name]["values"].size for name in shard.ids)
        assert "human-" not in str([vars(shard._raw), vars(shard._normaliser)])


def test_a_shard_may_be_pickled_and_asked_for_what_it_has_not(data: Path) -> None:
    for storage in ("stored", "on-the-fly"):
        experiment = prepared(data, storage, storage=storage)
        for normalisation in ("global", "speaker", "causal"):
            shard = open_features(experiment, "human", normalisation)[0]  # type: ignore[arg-type]
            again = pickle.loads(pickle.dumps(shard))
            assert np.array_equal(again["human-1"]["values"], shard["human-1"]["values"])
        with pytest.raises(KeyError, match="human-9"):
            shard["human-9"]


def test_audio_that_vanishes_after_prepare_is_an_error_that_names_it(data: Path) -> None:
    shard = open_features(prepared(data, storage="on-the-fly"), "human")[0]
    (data / "human" / "audio" / "human-1.wav").unlink()
    with pytest.raises(ValueError, match=r"'human-1': the audio is missing: audio/human-1.wav"):
        shard["human-1"]


def test_features_that_were_not_prepared_are_missed(data: Path) -> None:
    experiment = prepared(data, storage="on-the-fly")
    experiment.path("features", "human", "index.000001.json").unlink()
    with pytest.raises(ValueError, match=r"index.000001.json: run `prepare` again"):
        print([shard.ids for shard in open_features(experiment, "human")])


# -- normalisation -------------------------------------------------------------------------------------------


def by_model(values: np.ndarray, overall: Normalisation) -> np.ndarray:
    """What the network makes of its input before the first layer."""
    return (values.astype(np.float64) - overall.mean) / overall.deviation


def values_of(shards: list[FeatureShard]) -> dict[str, np.ndarray]:
    return {name: arrays["values"].astype(np.float64) for shard in shards for name, arrays in shard}


def test_the_normalisation_of_all_data_leaves_the_values_as_they_were_extracted(data: Path) -> None:
    experiment = prepared(data)
    for shard, raw in zip(
        open_features(experiment, "human"), open_shards(experiment.path("features", "human"), "features")
    ):
        for name, arrays in raw:
            assert np.array_equal(shard[name]["values"], arrays["values"])


def test_what_a_model_sees_of_each_speaker_has_mean_0_and_deviation_1(
    data: Path, conditions: Conditions
) -> None:
    experiment = prepared(data, conditions=conditions)
    overall = read_normalisation(experiment)
    for part in ("human", "test"):
        seen = values_of(open_features(experiment, part, "speaker"))
        groups: dict[tuple[str, str], list[np.ndarray]] = {}
        for name, values in seen.items():
            original, _, condition = name.partition("_")
            groups.setdefault(("ab"[ord(original[-1]) % 2], condition), []).append(by_model(values, overall))
        assert len(groups) >= 4
        for group in groups.values():
            everything = np.concatenate(group)
            np.testing.assert_allclose(everything.mean(axis=0), 0, atol=1e-3)
            np.testing.assert_allclose(everything.std(axis=0), 1, atol=1e-3)


def test_speakers_of_the_same_name_in_two_parts_are_two(data: Path) -> None:
    experiment = prepared(data)
    overall = read_normalisation(experiment)
    [values] = values_of(open_features(experiment, "dev", "speaker")).values()
    assert np.abs(by_model(values, overall).mean(axis=0)).max() < 1e-3


def test_an_utterance_without_a_speaker_is_normalised_by_itself_with_a_warning(data: Path) -> None:
    cuts = [make_cut(data / "human", f"u{n}", make_samples("human", n)) for n in range(2)]
    for cut in cuts:
        cut.supervisions[0].speaker = None
    write_cuts(data / "human", 0, cuts)
    experiment = prepared(data)
    with pytest.warns(UserWarning, match="2 of 3 utterances of the part 'human' name no speaker"):
        shards = open_features(experiment, "human", "speaker")
    overall = read_normalisation(experiment)
    for name in ("u0", "u1"):
        seen = by_model(shards[0][name]["values"], overall)
        np.testing.assert_allclose(seen.mean(axis=0), 0, atol=1e-3)
        np.testing.assert_allclose(seen.std(axis=0), 1, atol=1e-3)


def test_a_custom_field_names_the_speaker_before_the_supervision_does(data: Path) -> None:
    cuts = [make_cut(data / "human", f"u{n}", make_samples("human", n)) for n in range(2)]
    for cut in cuts:
        cut.custom = {"speaker": "  one  of us "}
    write_cuts(data / "human", 0, cuts)
    experiment = prepared(data)
    index = json.loads(experiment.path("features", "human", "index.000000.json").read_text())
    assert index["speakers"] == ["one of us", "one of us"]


FEATURES = st.integers(1, 40).flatmap(
    lambda length: st.integers(0, 10**6).map(
        lambda seed: np.random.default_rng(seed).normal(-6, 3, (length, 3)).astype(np.float16)
    )
)
OVERALL = Normalisation(np.float32([-5, -6, -7]), np.float32([1, 2, 3]))


@settings(max_examples=30, deadline=None)
@given(values=FEATURES, heard=st.integers(1, 40))
def test_causal_normalisation_of_a_beginning_is_the_beginning_of_that_of_the_whole(
    values: np.ndarray, heard: int
) -> None:
    whole = normalise_causally(values, OVERALL)
    assert whole.dtype == np.float32
    assert np.array_equal(normalise_causally(values[:heard], OVERALL), whole[:heard])


@settings(max_examples=30, deadline=None)
@given(values=FEATURES)
def test_causal_normalisation_is_by_what_was_heard_and_a_prior_of_so_many_frames(values: np.ndarray) -> None:
    normalised = normalise_causally(values, OVERALL)
    last = len(values) - 1
    # a prior of PRIOR_FRAMES frames, half of them a deviation above the mean and half of them one below
    sides = [np.tile(OVERALL.mean + sign * OVERALL.deviation, (PRIOR_FRAMES // 2, 1)) for sign in (-1, 1)]
    heard = np.concatenate([*sides, values.astype(np.float64)])
    own = (values[last].astype(np.float64) - heard.mean(axis=0)) / heard.std(axis=0)
    np.testing.assert_allclose(by_model(normalised[last], OVERALL), own, rtol=1e-4, atol=1e-5)


def test_normalising_by_what_is_already_normal_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(-6, 3, (50, 3)).astype(np.float32)
    np.testing.assert_allclose(normalise_by(values, OVERALL, OVERALL), values, atol=1e-5)


def test_the_speakers_of_all_shards_make_one_normalisation_each(data: Path) -> None:
    """Speaker a speaks in both shards of the part."""
    for shard, names in enumerate([["human-0", "human-1"], ["human-2"]]):
        write_cuts(
            data / "human",
            shard,
            [make_cut(data / "human", n, make_samples("human", int(n[-1]))) for n in names],
        )
    experiment = prepared(data)
    raw = values_of(open_features(experiment, "human"))
    together = np.concatenate([raw["human-0"], raw["human-2"]])
    own = Normalisation.from_moments(Moments.of(together))
    seen = values_of(open_features(experiment, "human", "speaker"))
    expected = normalise_by(raw["human-2"].astype(np.float16), own, read_normalisation(experiment))
    np.testing.assert_allclose(seen["human-2"], expected, atol=1e-4)


def test_a_part_prepared_again_in_the_same_place_is_read_anew(data: Path) -> None:
    experiment = prepared(data, storage="on-the-fly")
    before = open_features(experiment, "human")[1]["human-2"]["values"]
    write_cuts(data / "human", 1, [make_cut(data / "human", "human-2", make_samples("human", 7))])
    shutil.rmtree(experiment.path("features"))
    prepare(experiment)
    after = open_features(experiment, "human")[1]["human-2"]["values"]
    assert before.shape != after.shape
