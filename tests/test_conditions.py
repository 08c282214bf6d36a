"""Copies in other conditions sound as they say, keep their alignments true, and follow from seed and id alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut
from lhotse.serialization import deserialize_item
from lhotse.supervision import AlignmentItem
from tiny_audio import RATE, make_cut, write_audio

from teacherstudent.config import Conditions, Features
from teacherstudent.data.conditions import Sound, Sounds, apply_condition, draw_anew, make_copies
from teacherstudent.data.extraction import Extractor, Unusable, choose_audio
from teacherstudent.data.manifests import original_of, speaker_of

RANDOM = np.random.default_rng(0)
SPEECH = (0.1 * RANDOM.normal(size=RATE) * np.hanning(RATE)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Noises that are longer and shorter than the speech, stereo, at another rate; impulse responses."""
    random = np.random.default_rng(1)
    write_audio(tmp_path / "noises" / "long.wav", 0.05 * random.normal(size=3 * RATE))
    write_audio(
        tmp_path / "noises" / "street" / "short.flac", 0.02 * random.normal(size=3000), subtype="PCM_24"
    )
    write_audio(tmp_path / "noises" / "stereo.wav", 0.3 * random.normal(size=(44100, 2)), 44100)
    write_audio(tmp_path / "rooms" / "room.wav", make_response(random))
    return tmp_path


def make_response(random: np.random.Generator) -> np.ndarray:
    """30 ms of nearly nothing, then the direct sound, then an echo that dies away."""
    response = random.normal(size=RATE // 4) * np.exp(-np.arange(RATE // 4) / 800) / 10
    return np.concatenate([1e-4 * random.normal(size=480), [1.0], response])


def settings_of(folder: Path, **changes: object) -> Conditions:
    return Conditions(**{"noise_folder": str(folder / "noises")} | changes)  # type: ignore[arg-type]


def listen(cut: MonoCut, folder: Path, settings: Conditions) -> np.ndarray:
    """As it sounds: (N,) float64. The cut goes through JSON first."""
    again = deserialize_item(json.loads(json.dumps(cut.to_dict())))
    samples = again.with_recording_path_prefix(str(folder)).load_audio()
    return apply_condition(again, samples, settings)[0].astype(np.float64)


@pytest.mark.parametrize("noise", ["long.wav", "street/short.flac", "stereo.wav"])
@pytest.mark.parametrize("snr_db", [20.0, 0.0, -5.0])
def test_noise_is_as_far_below_the_speech_as_was_asked(folder: Path, noise: str, snr_db: float) -> None:
    conditions = settings_of(folder, snr_db=(snr_db,))
    sounds = Sounds.find(conditions)
    chosen = Sounds(tuple(sound for sound in sounds.noises if sound.path == noise))
    [copy] = make_copies(make_cut(folder, "u", SPEECH), conditions, chosen, False, 3)
    heard = listen(copy, folder, conditions)
    added = heard - SPEECH
    assert len(heard) == len(SPEECH)
    assert 10 * np.log10(np.mean(SPEECH.astype(float) ** 2) / np.mean(added**2)) == pytest.approx(
        snr_db, abs=0.2
    )
    assert min(np.abs(part).max() for part in np.array_split(added, 20)) > 0  # nowhere is it missing
    assert copy.custom["condition"] == f"snr{snr_db:g}"
    assert original_of(copy) == "u"


@settings(max_examples=15, deadline=None)
@given(seconds=st.floats(0.2, 5), duration=st.floats(0.1, 3), seed=st.integers(0, 10**6))
def test_noise_that_is_long_enough_is_never_repeated(seconds: float, duration: float, seed: int) -> None:
    cut = MonoCut("u", 0, duration, 0)
    [copy] = make_copies(cut, Conditions(noise_folder="x"), Sounds((Sound("a", seconds),)), False, seed)
    last = seconds - duration if seconds > duration else seconds
    assert 0 <= copy.custom["copy_of"]["added_noise"]["offset_seconds"] <= last + 5e-4


def test_reverberated_speech_is_the_convolution_from_the_direct_sound_on_with_the_power_of_the_original(
    folder: Path,
) -> None:
    conditions = Conditions(impulse_response_folder=str(folder / "rooms"))
    [copy] = make_copies(make_cut(folder, "u", SPEECH), conditions, Sounds.find(conditions), False, 0)
    response = soundfile.read(folder / "rooms" / "room.wav")[0]
    direct = int(np.argmax(response))
    expected = np.convolve(SPEECH.astype(float), response)[direct : direct + len(SPEECH)]
    expected *= np.sqrt(np.mean(SPEECH.astype(float) ** 2) / np.mean(expected**2))
    np.testing.assert_allclose(listen(copy, folder, conditions), expected, atol=1e-5)
    assert copy.custom["condition"] == "reverb"


@pytest.mark.parametrize("speed", [0.9, 1.1])
def test_a_faster_copy_is_shorter_and_its_alignment_with_it(folder: Path, speed: float) -> None:
    time = np.arange(RATE) / RATE
    cut = make_cut(folder, "u", np.sin(2 * np.pi * 500 * time) / 4)
    phones = [AlignmentItem("AH", 0.2, 0.3), AlignmentItem("B", 0.5, 0.25)]
    cut.supervisions[0].alignment = {"phone": phones}
    [copy] = make_copies(cut, Conditions(speeds=(speed,)), Sounds(), False, 0)
    assert copy.duration == pytest.approx(1 / speed, abs=1 / RATE)
    for item, original in zip(copy.supervisions[0].alignment["phone"], phones, strict=True):
        assert item.start == pytest.approx(original.start / speed, abs=1e-3)
        assert item.duration == pytest.approx(original.duration / speed, abs=1e-3)
    assert copy.custom == {"condition": f"speed{speed:g}", "copy_of": {"id": "u", "speed": speed}}
    heard = listen(copy, folder, Conditions())
    assert len(heard) == copy.num_samples
    spectrum = np.abs(np.fft.rfft(heard * np.hanning(len(heard))))
    assert np.argmax(spectrum) * RATE / len(heard) == pytest.approx(500 * speed, abs=2)


def test_development_speech_is_there_at_every_ratio_and_training_speech_at_one_that_is_drawn(
    folder: Path,
) -> None:
    conditions = settings_of(folder, snr_db=(20.0, 10.0, 5.0))
    sounds = Sounds.find(conditions)
    drawn = set()
    for number in range(40):
        cut = make_cut(folder, f"u{number}", SPEECH[:400])
        every = make_copies(cut, conditions, sounds, True, 0)
        assert [copy.custom["condition"] for copy in every] == ["snr20", "snr10", "snr5"]
        [copy] = make_copies(cut, conditions, sounds, False, 0)
        drawn.add((copy.custom["condition"], copy.custom["copy_of"]["added_noise"]["sound"]))
    assert {condition for condition, _ in drawn} == {"snr20", "snr10", "snr5"}
    assert {sound for _, sound in drawn} == {"long.wav", "street/short.flac", "stereo.wav"}


def test_copies_follow_from_seed_and_id_alone(folder: Path) -> None:
    conditions = settings_of(folder)
    sounds = Sounds.find(conditions)
    cuts = [make_cut(folder, f"u{number}", SPEECH[:400]) for number in range(20)]
    first, again, other = (
        [make_copies(cut, conditions, sounds, False, seed)[0].to_dict() for cut in order]
        for seed, order in ((0, cuts), (0, cuts[::-1]), (1, cuts))
    )
    assert first == again[::-1]
    assert first != other


def test_a_copy_counts_as_a_speaker_of_its_own_because_it_sounds_otherwise(folder: Path) -> None:
    cut = make_cut(folder, "u", SPEECH)
    [copy] = make_copies(cut, Conditions(speeds=(0.9,)), Sounds(), False, 0)
    assert speaker_of(copy) == f"{speaker_of(cut)} speed0.9"
    assert cut.custom is None  # the original is left alone


@pytest.mark.parametrize("silent", ["speech", "noise"])
def test_silence_has_no_signal_to_noise_ratio_and_the_copy_is_unusable(folder: Path, silent: str) -> None:
    for path in (folder / "noises").rglob("*.*"):
        path.unlink()
    write_audio(folder / "noises" / "n.wav", np.zeros(RATE) if silent == "noise" else SPEECH)
    conditions = settings_of(folder)
    cut = make_cut(folder, "u", np.zeros(RATE) if silent == "speech" else SPEECH)
    [copy] = make_copies(cut, conditions, Sounds.find(conditions), False, 0)
    with pytest.raises(Unusable, match="no signal-to-noise ratio"):
        Extractor(Features(num_mels=5), conditions).extract(copy, folder)


def test_conditions_come_after_resampling_and_the_choice_of_a_channel(folder: Path) -> None:
    stereo = make_cut(folder, "u", np.stack([np.repeat(SPEECH, 3)[:44100], np.zeros(44100)], axis=1), 44100)
    conditions = settings_of(folder, impulse_response_folder=str(folder / "rooms"), speeds=(0.9,))
    cut = choose_audio(stereo, Features(channel=0))
    copies = make_copies(cut, conditions, Sounds.find(conditions), False, 0)
    assert [copy.id.split("_")[1][:3] for copy in copies] == ["spe", "snr", "rev"]
    lengths = [len(listen(copy, folder, conditions)) for copy in copies]
    assert lengths == [round(RATE / 0.9), RATE, RATE]


@pytest.mark.parametrize("setting", ["noise_folder", "impulse_response_folder"])
def test_folders_of_sounds_are_looked_at_first(folder: Path, setting: str) -> None:
    for path, words in (("nowhere", "no such folder"), ("empty", "holds no"), ("broken", "is not audio")):
        if path != "nowhere":
            (folder / path).mkdir()
        if path == "broken":
            (folder / path / "a.wav").write_bytes(b"not audio")
        with pytest.raises(ValueError, match=f"conditions.{setting}.*{words}"):
            Sounds.find(Conditions(**{setting: str(folder / path)}))


def test_a_copy_drawn_anew_is_another_in_every_epoch_and_the_same_whoever_asks(folder: Path) -> None:
    conditions = settings_of(folder, impulse_response_folder=str(folder / "rooms"), speeds=(0.9,))
    write_audio(folder / "rooms" / "hall.wav", make_response(np.random.default_rng(5)))
    sounds = Sounds.find(conditions)
    cut = make_cut(folder, "u", SPEECH)
    fast, noisy, reverberated = make_copies(cut, conditions, sounds, False, 3)
    for same in (cut, fast):
        assert draw_anew(same, sounds, 3, 4) is same
    assert draw_anew(noisy, sounds, 3, 0) is noisy
    drawn = [draw_anew(noisy, sounds, 3, epoch) for epoch in range(1, 30)]
    assert drawn == [draw_anew(noisy, sounds, 3, epoch) for epoch in range(1, 30)]
    added = [each.custom["copy_of"]["added_noise"] for each in drawn]
    assert len({(each["sound"], each["offset_seconds"]) for each in added}) == len(added)
    assert {each["sound"] for each in added} == {sound.path for sound in sounds.noises}
    assert {each["snr_db"] for each in added} == {noisy.custom["copy_of"]["added_noise"]["snr_db"]}
    assert {(each.id, each.duration, original_of(each)) for each in drawn} == {(noisy.id, cut.duration, "u")}
    rooms = {draw_anew(reverberated, sounds, 3, e).custom["copy_of"]["reverberation"] for e in range(1, 30)}
    assert rooms == {"room.wav", "hall.wav"}
    assert not np.array_equal(listen(drawn[0], folder, conditions), listen(drawn[1], folder, conditions))
