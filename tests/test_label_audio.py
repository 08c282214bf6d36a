"""Audio that goes bad between `prepare` and `label`, where features are computed on the fly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_audio import make_cut, make_samples, open_config, write_audio, write_cuts, write_data

from teacherstudent.config import Data, Features, Label, Network
from teacherstudent.data.feature_reader import read_normalisation
from teacherstudent.data.prepare import prepare
from teacherstudent.distributed import connect
from teacherstudent.experiment import Experiment
from teacherstudent.store import TargetStore
from teacherstudent.training import checkpoint
from teacherstudent.training.label import label
from teacherstudent.training.models import build_model, model_state

torch.set_num_threads(1)
NUM_CUTS = 8


def open_experiment(folder: Path, storage: str) -> Experiment:
    """Prepared, with a teacher of random weights."""
    data = write_data(folder / "data")
    cuts = [
        make_cut(data / "unlabelled", f"u-{number}", make_samples("unlabelled", number))
        for number in range(NUM_CUTS)
    ]
    write_cuts(data / "unlabelled", 0, cuts[:5])
    write_cuts(data / "unlabelled", 1, cuts[5:])
    experiment = open_config(
        folder / "experiment",
        data=Data(str(data)),
        features=Features(num_mels=20, jobs=1, storage=storage),
        label=Label(5, numeric_mode="fp32", batch_frames=40, max_bad_share=0.9),
    )
    prepare(experiment)
    network = Network(layers=1, cells=4, bidirectional=True)
    teacher = build_model(network, 30, read_normalisation(experiment), seed=1)
    checkpoint.save(experiment.path("teacher", "best.pt"), model_state(teacher, {}))
    experiment.path("senones").mkdir()
    experiment.path("senones", "inventory.json").write_text("an inventory")
    return experiment


def test_audio_that_went_bad_in_any_way_is_listed_with_its_reason_and_the_rest_is_labelled(
    tmp_path: Path,
) -> None:
    stored = open_experiment(tmp_path / "stored", "stored")
    label(stored, connect())
    experiment = open_experiment(tmp_path / "fly", "on-the-fly")
    audio = tmp_path / "fly" / "data" / "unlabelled" / "audio"
    (audio / "u-0.wav").unlink()
    (audio / "u-1.wav").write_bytes(b"")
    (audio / "u-2.wav").write_bytes((audio / "u-2.wav").read_bytes()[:40])
    write_audio(audio / "u-3.wav", make_samples("unlabelled", 3), rate=8000)
    samples = make_samples("unlabelled", 5)
    samples[100] = np.nan
    write_audio(audio / "u-5.wav", samples)
    write_audio(audio / "u-6.wav", make_samples("unlabelled", 6)[:1000])
    with pytest.warns(UserWarning, match="6 of 8 unlabelled utterances"):
        label(experiment, connect())
    lines = experiment.path("targets", "skipped.jsonl").read_text().splitlines()
    skipped = {entry["id"]: entry["reason"] for entry in map(json.loads, lines)}
    assert set(skipped) == {"u-0", "u-1", "u-2", "u-3", "u-5", "u-6"}
    assert skipped["u-0"] == "the audio is missing: audio/u-0.wav"
    assert skipped["u-5"] == "samples that are not finite"
    assert skipped["u-3"].endswith("audio/u-3.wav (at 8000 Hz, its manifest says 16000)")
    for name in ("u-1", "u-2", "u-3", "u-6"):
        assert skipped[name].startswith("the audio cannot be read: audio/"), skipped[name]
    assert str(tmp_path) not in "".join(lines)
    found, true = (TargetStore(each.path("targets")) for each in (experiment, stored))
    assert [found.shard_ids(number) for number in range(2)] == [("u-4",), ("u-7",)]
    for name in ("u-4", "u-7"):
        np.testing.assert_allclose(found[name][1][:, 0], true[name][1][:, 0], atol=0.07)


def test_features_on_the_fly_give_the_bytes_of_stored_ones(tmp_path: Path) -> None:
    experiments = [open_experiment(tmp_path / storage, storage) for storage in ("stored", "on-the-fly")]
    for experiment in experiments:
        label(experiment, connect())
    for number in range(2):
        name = f"targets.{number:06d}.h5"
        first, second = (experiment.path("targets", name).read_bytes() for experiment in experiments)
        assert first == second
