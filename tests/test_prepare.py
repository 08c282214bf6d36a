"""Features are lhotse's log-mel energies, stacked: of every cut, whoever computes them and however often begun."""

import gzip
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lhotse import Fbank, FbankConfig
from lhotse.utils import fastcopy
from tiny_audio import (
    RATE,
    SIZES,
    contents,
    make_cut,
    make_samples,
    open_experiment,
    write_audio,
    write_cuts,
    write_data,
)

from teacherstudent.config import Conditions
from teacherstudent.data import prepare as prepare_module
from teacherstudent.data.dataset import prepared_shards, read_prepared
from teacherstudent.data.feature_shards import Task, make_shard
from teacherstudent.data.features import stack
from teacherstudent.data.packed import PackedShard, open_shards
from teacherstudent.data.prepare import prepare
from teacherstudent.experiment import Experiment


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def test_features_are_those_of_lhotse_stacked_by_three_in_half_precision(data: Path) -> None:
    experiment = open_experiment(data)
    prepare(experiment)
    extractor = Fbank(FbankConfig(sampling_rate=RATE, num_filters=20))
    for part, sizes in SIZES.items():
        number = 0
        shards = open_shards(experiment.path("features", part), "features")
        assert [len(shard) for shard in shards] == sizes
        for shard in shards:
            for name, arrays in shard:
                assert name == f"{part}-{number}"
                log_mel = extractor.extract(make_samples(part, number)[None], RATE)
                while len(log_mel) % 3:
                    log_mel = np.vstack([log_mel, log_mel[-1:]])
                stacked = np.hstack([log_mel[0::3], log_mel[1::3], log_mel[2::3]])
                assert arrays["values"].dtype == np.float16
                assert np.array_equal(arrays["values"], stacked.astype(np.float16))
                number += 1


def test_the_normalisation_is_mean_and_deviation_of_the_training_parts_alone(data: Path) -> None:
    experiment = open_experiment(data)
    prepare(experiment)
    frames = [
        arrays["values"].astype(np.float64)
        for part in ("human", "unlabelled")
        for shard in open_shards(experiment.path("features", part), "features")
        for _, arrays in shard
    ]
    found = json.loads(experiment.path("features", "normalisation.json").read_text())
    everything = np.concatenate(frames)
    np.testing.assert_allclose(found["mean"], everything.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found["deviation"], everything.std(axis=0), rtol=1e-4)


def test_two_processes_write_the_same_bytes_as_none(data: Path) -> None:
    together = contents(prepare(open_experiment(data, "together", jobs=2)))
    assert contents(prepare(open_experiment(data, "alone"))) == together


def test_a_second_start_makes_what_is_missing_and_leaves_the_rest_alone(data: Path) -> None:
    experiment = open_experiment(data)
    outputs = prepare(experiment)
    before, missing = contents(outputs), experiment.path("features", "human", "index.000001.json")
    missing.unlink()
    others = [path for path in outputs if "000001" not in path.name and path.name.count(".") == 2]
    times = {path: path.stat().st_mtime_ns for path in others}
    assert contents(prepare(experiment)) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_data_that_are_mended_give_what_whole_data_give(data: Path) -> None:
    whole = contents(prepare(open_experiment(data, "whole")))
    audio = data / "human" / "audio" / "human-1.wav"
    audio.rename(audio.with_suffix(".away"))
    experiment = open_experiment(data)
    with pytest.raises(ValueError, match="human-1"):
        prepare(experiment)
    assert not list(experiment.folder.rglob("*.partial"))
    audio.with_suffix(".away").rename(audio)
    assert contents(prepare(experiment)) == whole


@pytest.mark.parametrize("storage", ["stored", "on-the-fly"])
def test_an_interruption_after_any_shard_changes_nothing(
    data: Path, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = contents(prepare(open_experiment(data, "whole", storage=storage)))
    experiment, made = open_experiment(data, storage=storage), []

    def stop_later(task: Task) -> None:
        if len(made) >= 3:
            raise KeyboardInterrupt
        make_shard(task)
        made.append(task)

    monkeypatch.setattr(prepare_module, "make_shard", stop_later)
    with pytest.raises(KeyboardInterrupt):
        prepare(experiment)
    monkeypatch.undo()
    assert contents(prepare(experiment)) == whole


# -- what cannot be used -------------------------------------------------------------------------------------


def spoil(data: Path, samples: np.ndarray, rate: int = RATE, text: str | None = "yes") -> None:
    """Another cut in the place of human-2, the only one of the human part's second shard."""
    write_cuts(data / "human", 1, [make_cut(data / "human", "human-2", samples, rate, text)])


def edit_cut(data: Path, **changes: object) -> None:
    path = data / "human" / "cuts.000001.jsonl"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes) + "\n")


def edit_said(data: Path, **changes: object) -> None:
    [said] = json.loads((data / "human" / "cuts.000001.jsonl").read_text())["supervisions"]
    edit_cut(data, supervisions=[said | changes])


def not_finite(data: Path) -> None:
    samples = make_samples("human", 2)
    samples[100] = np.nan
    spoil(data, samples)


AUDIO = "audio/human-2.wav"
REASONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "another rate": (
        lambda data: spoil(data, np.zeros(44100), 44100),
        "another sampling rate: 44100, features.sampling_rate is 16000 and features.resample false",
    ),
    "two channels": (
        lambda data: spoil(data, np.zeros((RATE, 2))),
        "several channels: 2; features.channel says which one to take",
    ),
    "another rate than the manifest says": (
        lambda data: write_audio(data / "human" / AUDIO, np.zeros(44100), 44100),
        f"the audio cannot be read: {AUDIO}",
    ),
    "no audio": (lambda data: (data / "human" / AUDIO).unlink(), f"the audio is missing: {AUDIO}"),
    "no sound file": (
        lambda data: (data / "human" / AUDIO).write_bytes(b"not audio"),
        f"the audio cannot be read: {AUDIO}",
    ),
    "cut off": (
        lambda data: (data / "human" / AUDIO).write_bytes((data / "human" / AUDIO).read_bytes()[:3000]),
        f"the audio cannot be read: {AUDIO}",
    ),
    "longer than its recording": (
        lambda data: edit_cut(data, duration=9.0),
        f"the audio cannot be read: {AUDIO}",
    ),
    "not finite": (not_finite, "samples that are not finite"),
    "no transcript": (lambda data: spoil(data, make_samples("human", 2), text="  "), "no transcript"),
    "no transcript at all": (lambda data: spoil(data, make_samples("human", 2), text=None), "no transcript"),
    "zero duration": (lambda data: edit_cut(data, duration=0.0), "shorter than a frame of 10 ms"),
    "tiny": (lambda data: spoil(data, np.ones(159)), "shorter than a frame of 10 ms"),
    "no recording": (lambda data: edit_cut(data, recording=None), "no recording"),
    "another manifest": (lambda data: edit_cut(data, type="MixedCut"), "not a cut"),
    "half a cut": (lambda data: edit_cut(data, supervisions=[{"id": "x"}]), "not a cut"),
    "no duration": (
        lambda data: edit_cut(data, duration=math.nan),
        "not a cut: its start or duration is nan",
    ),
    "no start": (lambda data: edit_cut(data, start=math.inf), "not a cut: its start or duration is inf"),
    "a number said": (lambda data: edit_said(data, text=7), "not a cut: its text is 7"),
    "a field of ours": (
        lambda data: edit_cut(data, custom={"copy_of": "human-1"}),
        "a custom field of our own",
    ),
}


@pytest.mark.parametrize("problem", REASONS)
def test_what_cannot_be_used_is_left_out_with_its_reason_and_the_rest_is_as_ever(
    data: Path, problem: str
) -> None:
    whole = open_experiment(data, "whole")
    prepare(whole)
    break_data, reason = REASONS[problem]
    break_data(data)
    experiment = open_experiment(data, resample=False, max_left_out_share=0.4)
    with pytest.warns(UserWarning, match="1 of 3 utterances of the part 'human'") as told:
        prepare(experiment)
    skipped = [
        json.loads(line) for line in experiment.path("features", "skipped.jsonl").read_text().splitlines()
    ]
    assert [(entry["part"], entry["id"]) for entry in skipped] == [("human", "human-2")]
    assert skipped[0]["reason"].startswith(reason)
    assert str(data) not in skipped[0]["reason"]
    assert any("human-2" in str(warning.message) for warning in told)
    report = json.loads(experiment.path("features", "report.json").read_text())
    assert report["human"]["utterances"] == 2
    assert report["human"]["left_out"] == {reason.partition(":")[0]: 1}
    kept = "features", "human", "features.000000.h5"
    assert experiment.path(*kept).read_bytes() == whole.path(*kept).read_bytes()
    assert experiment.path("features", "human", "cuts.000001.jsonl").read_text() == ""


@pytest.mark.parametrize("problem", REASONS)
def test_too_much_left_out_is_an_error_with_reasons_and_examples(data: Path, problem: str) -> None:
    break_data, reason = REASONS[problem]
    break_data(data)
    with pytest.raises(ValueError, match=r"more than features.max_left_out_share = 0.33") as error:
        prepare(open_experiment(data, resample=False, max_left_out_share=0.33))
    assert f"1 x {reason}" in str(error.value)
    assert "(for instance human-2)" in str(error.value)
    assert "MonoCut(" not in str(error.value)


@pytest.mark.filterwarnings("ignore:.*are left out")
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    problems=st.lists(st.sampled_from(["none", "nan", "missing", "text", "short"]), min_size=4, max_size=9)
)
def test_every_utterance_is_either_among_the_features_or_in_the_list_of_what_was_left_out(
    data: Path, problems: list[str]
) -> None:
    cuts = []
    for number, problem in enumerate(problems):
        samples = np.full(100 if problem == "short" else RATE // 8, np.nan if problem == "nan" else 0.1)
        text = "" if problem == "text" else "yes"
        cuts.append(make_cut(data / "human", f"u{number}", samples, text=text))
        if problem == "missing":
            (data / "human" / "audio" / f"u{number}.wav").unlink()
    for number, part in enumerate(np.array_split(np.arange(len(cuts)), 2)):
        write_cuts(data / "human", number, [cuts[index] for index in part])
    shutil.rmtree(data.parent / "experiment", ignore_errors=True)
    experiment = open_experiment(data, num_mels=5, max_left_out_share=1.0)
    prepare(experiment)
    used = [
        name for shard in open_shards(experiment.path("features", "human"), "features") for name in shard.ids
    ]
    lines = experiment.path("features", "skipped.jsonl").read_text().splitlines()
    left_out = {json.loads(line)["id"] for line in lines}
    assert used == [f"u{number}" for number, problem in enumerate(problems) if problem == "none"]
    assert left_out == {f"u{number}" for number, problem in enumerate(problems) if problem != "none"}
    kept = [
        cut.id
        for path in prepared_shards(experiment, "human")
        for cut in read_prepared(experiment, "human", path)
    ]
    assert kept == used


def repeat_cut(data: Path, part: str) -> None:
    with (data / part / "cuts.000000.jsonl").open("a") as file:
        file.write((data / "human" / "cuts.000001.jsonl").read_text())


def break_line(data: Path) -> None:
    with (data / "human" / "cuts.000000.jsonl").open("a") as file:
        file.write('{"id": "half a')


def damage_gzip(data: Path) -> None:
    path = data / "human" / "cuts.000001.jsonl"
    packed = bytearray(gzip.compress(path.read_bytes(), mtime=0))
    packed[10] |= 7  # the first block is of a kind that there is not
    path.with_name("cuts.000001.jsonl.gz").write_bytes(packed)
    path.unlink()


ERRORS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no part": (lambda data: (data / "dev").rename(data / "development"), ["/dev", "data.folder"]),
    "an empty part": (
        lambda data: (data / "dev" / "cuts.000000.jsonl").unlink(),
        ["/dev", "cuts.000000.jsonl"],
    ),
    "other numbers": (
        lambda data: (data / "dev" / "cuts.000000.jsonl").rename(data / "dev" / "cuts.1.jsonl"),
        ["/dev", "six digits"],
    ),
    "a shard twice": (
        lambda data: shutil.copy(data / "dev" / "cuts.000000.jsonl", data / "dev" / "cuts.000000.jsonl.gz"),
        ["cuts.000000.jsonl and cuts.000000.jsonl.gz"],
    ),
    "a gap": (
        lambda data: (data / "human" / "cuts.000001.jsonl").rename(data / "human" / "cuts.000002.jsonl"),
        ["/human", "cuts.000001.jsonl", "without a gap"],
    ),
    "a gap at the beginning": (
        lambda data: (data / "human" / "cuts.000000.jsonl").unlink(),
        ["/human", "cuts.000000.jsonl", "without a gap"],
    ),
    "a broken line": (break_line, ["/human/cuts.000000.jsonl, line 3"]),
    "a line that is no cut": (
        lambda data: (data / "human" / "cuts.000001.jsonl").write_text("7\n"),
        ["/human/cuts.000001.jsonl, line 1", "id"],
    ),
    "damaged gzip": (
        lambda data: (data / "human" / "cuts.000001.jsonl").rename(data / "human" / "cuts.000001.jsonl.gz"),
        ["/human/cuts.000001.jsonl.gz, line 0"],
    ),
    "gzip that is damaged within": (damage_gzip, ["/human/cuts.000001.jsonl.gz, line"]),
    "an id twice in a part": (lambda data: repeat_cut(data, "human"), ["'human-2' is used twice"]),
    "an utterance in two parts": (lambda data: repeat_cut(data, "test"), ["'human-2'", "/human/", "/test/"]),
}


@pytest.mark.parametrize("problem", ERRORS)
def test_data_that_cannot_be_understood_are_refused_before_anything_is_computed(
    data: Path, problem: str
) -> None:
    break_data, words = ERRORS[problem]
    break_data(data)
    with pytest.raises(ValueError) as error:
        prepare(open_experiment(data))
    for word in words:
        assert word in str(error.value)
    assert not list(data.parent.rglob("*.h5"))


# -- audio of all kinds --------------------------------------------------------------------------------------


def expect(samples: np.ndarray, rate: int) -> np.ndarray:
    """Features of 20 mel bands, by lhotse."""
    log_mel = Fbank(FbankConfig(sampling_rate=rate, num_filters=20)).extract(np.float32(samples)[None], rate)
    return stack(log_mel).astype(np.float16)


def features_of(experiment: Experiment, name: str, part: str = "human") -> np.ndarray:
    prepare(experiment)
    shards = open_shards(experiment.path("features", part), "features")
    return next(shard[name]["values"] for shard in shards if name in shard)


@pytest.mark.parametrize("channel", [0, 1])
def test_44_kHz_stereo_audio_is_resampled_and_its_chosen_channel_used(data: Path, channel: int) -> None:
    time = np.arange(44100) / 44100
    samples = np.stack([np.sin(2 * np.pi * 440 * time), np.sin(2 * np.pi * 3000 * time)], axis=1) / 4
    spoil(data, samples, 44100)
    experiment = open_experiment(data, channel=channel)
    found = features_of(experiment, "human-2")
    assert len(found) == 34
    pure = np.sin(2 * np.pi * (440, 3000)[channel] * np.arange(RATE) / RATE) / 4
    loud = expect(pure, RATE) > -2  # beyond them only noise of the resampling is heard
    np.testing.assert_allclose(found[1:-1][loud[1:-1]], expect(pure, RATE)[1:-1][loud[1:-1]], atol=0.05)
    shard = prepared_shards(experiment, "human")[1]
    [cut] = read_prepared(experiment, "human", shard)
    assert (cut.id, cut.channel, cut.sampling_rate, cut.supervisions[0].text) == (
        "human-2",
        channel,
        RATE,
        "yes",
    )


def test_a_channel_that_is_not_there_is_named(data: Path) -> None:
    spoil(data, np.zeros((RATE, 2)))
    with pytest.raises(ValueError, match=r"no such channel: features.channel is 2, there are \[0, 1\]"):
        prepare(open_experiment(data, channel=2))


def test_8_kHz_is_8_kHz(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", rate=8000)
    found = features_of(open_experiment(data, sampling_rate=8000), "human-2")
    assert np.array_equal(found, expect(make_samples("human", 2), 8000))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 4000), num_samples=st.integers(160, 1800))
def test_a_cut_from_within_its_recording_has_the_features_of_those_samples(
    data: Path, first: int, num_samples: int
) -> None:
    samples = make_samples("human", 5)
    whole = make_cut(data / "human", "human-2", samples)
    part = fastcopy(whole, start=first / RATE, duration=num_samples / RATE)
    write_cuts(data / "human", 1, [part])
    shutil.rmtree(data.parent / "experiment", ignore_errors=True)
    found = features_of(open_experiment(data), "human-2")
    assert np.array_equal(found, expect(samples[first : first + num_samples], RATE))
    assert len(found) == math.ceil(((num_samples + 80) // 160) / 3)


def test_gzipped_shards_are_read_as_they_are(data: Path) -> None:
    whole = contents(prepare(open_experiment(data, "whole")))
    for path in (data / "human").glob("cuts.*.jsonl"):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    assert contents(prepare(open_experiment(data))) == whole


# -- copies in other conditions ------------------------------------------------------------------------------


def test_copies_follow_the_originals_of_their_shard_and_are_counted(data: Path) -> None:
    plain = open_experiment(data, "plain")
    prepare(plain)
    experiment = open_experiment(data, conditions=Conditions(parts=("human",), speeds=(0.5, 2.0)))
    prepare(experiment)
    for number, names in enumerate([["human-0", "human-1"], ["human-2"]]):
        path = "features", "human", f"features.{number:06d}.h5"
        found, before = PackedShard(experiment.path(*path)), PackedShard(plain.path(*path))
        assert list(found.ids) == names + [f"{name}_speed{speed}" for name in names for speed in ("0.5", "2")]
        for name in names:
            assert np.array_equal(found[name]["values"], before[name]["values"])
            length = len(found[name]["values"])
            assert abs(len(found[f"{name}_speed0.5"]["values"]) - 2 * length) <= 1
            assert abs(2 * len(found[f"{name}_speed2"]["values"]) - length) <= 2
    report = json.loads(experiment.path("features", "report.json").read_text())
    assert (report["human"]["utterances"], report["human"]["copies"], report["dev"]["copies"]) == (3, 6, 0)
    assert report["human"]["copy_hours"] == pytest.approx(2.5 * report["human"]["hours"], rel=1e-2)


def test_a_copy_of_the_name_of_another_utterance_is_refused(data: Path) -> None:
    write_cuts(
        data / "human",
        1,
        [make_cut(data / "human", name, make_samples("human", 2)) for name in ("u", "u_speed2")],
    )
    with pytest.raises(ValueError, match="'u_speed2'"):
        prepare(open_experiment(data, conditions=Conditions(speeds=(2.0,))))


def test_sounds_that_change_before_the_step_is_done_are_refused(data: Path) -> None:
    noises = data.parent / "noises"
    write_audio(noises / "hiss.wav", np.random.default_rng(0).normal(size=9000) / 10)
    experiment = open_experiment(data, conditions=Conditions(noise_folder=str(noises)))
    prepare(experiment)
    write_audio(noises / "hum.wav", np.random.default_rng(1).normal(size=9000) / 10)
    with pytest.raises(ValueError, match="other sounds"):
        prepare(experiment)


def test_a_copy_whose_noise_cannot_be_read_or_that_is_too_short_is_listed(data: Path) -> None:
    write_cuts(data / "human", 1, [make_cut(data / "human", "human-2", make_samples("human", 2)[:300])])
    noise = data.parent / "noises" / "hiss.flac"
    write_audio(noise, np.random.default_rng(0).normal(size=9000) / 10, subtype="PCM_16")
    conditions = Conditions(noise_folder=str(noise.parent), snr_db=(10.0,), speeds=(2.0,))
    experiment = open_experiment(data, conditions=conditions, max_left_out_share=0.5)
    noise.write_bytes(noise.read_bytes()[:2000])
    with pytest.warns(UserWarning, match="4 of 9 utterances of the part 'human' are left out"):
        prepare(experiment)
    entries = map(json.loads, experiment.path("features", "skipped.jsonl").read_text().splitlines())
    assert {entry["id"]: entry["reason"].partition(":")[0].partition(" (")[0] for entry in entries} == {
        f"human-{number}_snr10": "the condition cannot be made" for number in range(3)
    } | {"human-2_speed2": "shorter than a frame of 10 ms"}


def test_custom_fields_of_users_are_no_condition_and_go_with_the_copies(data: Path) -> None:
    conditions = Conditions(parts=("human",), speeds=(2.0,))
    plain, marked = open_experiment(data, "plain", conditions), open_experiment(data, "marked", conditions)
    prepare(plain)
    custom = {"original": "human-0", "speed": 3.0, "added_noise": "much", "reverberation": "hall"}
    for path in (data / "human").glob("cuts.*.jsonl"):
        path.write_text(
            "".join(json.dumps(json.loads(line) | {"custom": custom}) + "\n" for line in path.open())
        )
    prepare(marked)
    for number, shard in enumerate(open_shards(marked.path("features", "human"), "features")):
        path = plain.path("features", "human", f"features.{number:06d}.h5")
        assert shard.path.read_bytes() == path.read_bytes()
        lines = marked.path("features", "human", f"cuts.{number:06d}.jsonl").read_text().splitlines()
        assert all(json.loads(line)["custom"].items() >= custom.items() for line in lines)


def test_a_copy_that_cannot_be_made_is_listed_and_the_others_are_there(data: Path) -> None:
    spoil(data, np.zeros(RATE // 4))
    write_audio(data.parent / "noises" / "hiss.wav", np.random.default_rng(0).normal(size=9000) / 10)
    conditions = Conditions(noise_folder=str(data.parent / "noises"), snr_db=(10.0,), speeds=(2.0,))
    experiment = open_experiment(data, conditions=conditions, max_left_out_share=0.2)
    with pytest.warns(UserWarning, match="1 of 9 utterances of the part 'human' are left out"):
        prepare(experiment)
    [entry] = map(json.loads, experiment.path("features", "skipped.jsonl").read_text().splitlines())
    assert entry["id"] == "human-2_snr10"
    assert entry["reason"].startswith("no signal-to-noise ratio: the speech")
    shards = open_shards(experiment.path("features", "human"), "features")
    assert list(shards[1].ids) == ["human-2", "human-2_speed2"]
    assert list(shards[0].ids)[2:] == ["human-0_speed2", "human-0_snr10", "human-1_speed2", "human-1_snr10"]
