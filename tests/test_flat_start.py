"""A flat start finds the phones of speech whose phones are known, whatever interrupts it and however it is shared."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lhotse import MonoCut, SupervisionSegment

from teacherstudent.alignment import flat_start
from teacherstudent.alignment.flat_start import Stage, train_and_align
from teacherstudent.alignment.gaussians import Mixtures
from teacherstudent.config import Align, Config, Data
from teacherstudent.data.features import FRAME_RULE, stack
from teacherstudent.data.lexicon import Lexicon
from teacherstudent.data.manifests import LABELLED_PARTS
from teacherstudent.data.packed import PackedWriter, shard_path
from teacherstudent.experiment import Experiment

LEXICON = Lexicon.of(  # no word ends as another begins: nobody could hear where one ends then
    [
        ("one", ("A_B", "B_E")),
        ("two", ("C_B", "A_I", "D_E")),
        ("two", ("C_B", "B_I", "D_E")),
        ("three", ("C_B", "B_E")),
        ("<unk>", ("A_B", "D_E")),
    ]
)
SETTINGS = Align(
    source="transcripts",
    monophone_gaussians=24,
    monophone_iterations=8,
    triphone_leaves=24,
    triphone_gaussians=48,
    triphone_iterations=3,
    max_dropped_share=0.2,
    jobs=1,
)
WORDS = ("one", "two", "three")
BAD = {
    "unknown": ("one seven", 120),
    "empty": ("", 120),
    "short": ("one two one two", 9),
}

Truth = dict[str, list[tuple[str, int]]]  # by utterance: phones and their first frames


def speak(
    rng: np.random.Generator, sounds: dict[str, np.ndarray]
) -> tuple[str, list[tuple[str, int]], np.ndarray]:
    """A transcript, its phones with their first frames, and (T10, 64) log-mel frames."""
    text = rng.choice(WORDS, size=rng.integers(6, 12)).tolist()
    phones = ["SIL"]
    for word in text:
        said = LEXICON.pronunciations[word]
        phones += said[rng.integers(len(said))]
        phones += ["SIL"] if rng.random() < 0.1 else []
    phones += ["SIL"] if phones[-1] != "SIL" else []
    lengths = rng.integers(6, 14, size=len(phones)) + 6 * (np.array(phones) == "SIL")
    lengths[[0, -1]] += 8
    edges = np.concatenate([[0], np.cumsum(lengths)])
    means = np.concatenate([np.tile(sounds[name[:1]], (length, 1)) for name, length in zip(phones, lengths)])
    return (
        " ".join(text),
        list(zip(phones, edges[:-1].tolist())),
        means + 0.3 * rng.standard_normal(means.shape),
    )


def make_cut(name: str, text: str, num_frames: int, custom: dict[str, object]) -> MonoCut:
    seconds = num_frames / 100
    supervision = SupervisionSegment(name, name, start=0, duration=seconds, text=text)
    cut = MonoCut(name, start=0, duration=seconds, channel=0, supervisions=[supervision], custom=custom)
    return dataclasses.replace(cut, recording=recording(name, num_frames))


def recording(name: str, num_frames: int) -> object:
    from lhotse import Recording

    return Recording(
        name, sources=[], sampling_rate=16000, num_samples=160 * num_frames, duration=num_frames / 100
    )


def utterances(part: str, number: int) -> Iterator[tuple[MonoCut, np.ndarray, list[tuple[str, int]]]]:
    sounds = {name: 3 * wave for name, wave in zip("SABCD", _waves(5))}
    rng = np.random.default_rng([LABELLED_PARTS.index(part), number])
    for index in range(20):
        text, phones, log_mel = speak(rng, sounds)
        name = f"{part}-{number}-{index}"
        yield make_cut(name, text, len(log_mel), {}), log_mel, phones
        if index == 0:
            yield make_cut(f"{name}-copy", text, len(log_mel), {"copy_of": {"id": name}}), log_mel, phones
    if (part, number) == ("human", 1):
        for name, (text, num_frames) in BAD.items():
            log_mel = 5 * rng.standard_normal((num_frames, 64))
            if name == "unknown":
                log_mel = np.repeat([sounds[sound] for sound in "SABADS"], num_frames // 6, axis=0)
                log_mel = log_mel + 0.3 * rng.standard_normal(log_mel.shape)
            yield make_cut(name, text, num_frames, {}), log_mel, []


def _waves(count: int) -> np.ndarray:
    """(count, 64) spectra that differ in their first cepstra."""
    weights = np.random.default_rng(7).standard_normal((count, 6))
    return weights @ np.cos(np.pi / 64 * np.outer(np.arange(1, 7), np.arange(64) + 0.5))


def make_experiment(folder: Path, data: Path, **settings: object) -> Experiment:
    """With two prepared shards of every labelled part."""
    align = dataclasses.replace(SETTINGS, **settings)
    experiment = Experiment(Config(folder=str(folder), align=align, data=Data(folder=str(data))))
    experiment.create()
    data.mkdir(exist_ok=True)
    LEXICON.write(data / "lexicon.txt")
    for part in LABELLED_PARTS:
        experiment.path("features", part).mkdir(parents=True)
        for number in range(2):
            path = shard_path(experiment.path("features", part), "features", number)
            header = {"frame_rule": FRAME_RULE, "num_mels": 64, "sampling_rate": 16000}
            lines = []
            with PackedWriter(path, header, {"values": ("float16", (192,))}) as writer:
                for cut, log_mel, _ in utterances(part, number):
                    writer.write(cut.id, values=stack(log_mel).astype(np.float16))
                    lines.append(json.dumps(cut.to_dict()) + "\n")
            path.with_name(f"cuts.{number:06d}.jsonl").write_text("".join(lines))
    return experiment


def read_segments(folder: Path) -> dict[str, dict]:
    lines = [
        line for path in sorted(folder.glob("*/segments.*.jsonl")) for line in path.read_text().splitlines()
    ]
    return {entry["id"]: entry for entry in map(json.loads, lines)}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("flat")
    return train_and_align(make_experiment(top / "experiment", top / "data"))


def known() -> Truth:
    shards = [(part, number) for part in LABELLED_PARTS for number in range(2)]
    return {cut.id: phones for shard in shards for cut, _, phones in utterances(*shard)}


def test_known_phones_are_found_within_the_two_frames_that_slopes_look_ahead(trained: Path) -> None:
    truth, found = known(), read_segments(trained)
    off = []
    for name, entry in found.items():
        if name in BAD:
            continue
        assert entry["phones"] == [phone for phone, _ in truth[name]], name
        off += [abs(100 * start - frame) for start, (_, frame) in zip(entry["starts"], truth[name])]
    assert len(off) > 2000
    assert np.mean(np.array(off) < 2.5) > 0.99  # frames
    assert np.median(off) < 1.5


def test_every_utterance_but_the_copies_is_listed_once_and_bad_ones_say_why(trained: Path) -> None:
    found = read_segments(trained)
    assert set(found) == {name for name in known() if not name.endswith("-copy")}
    reasons = {name: entry["reason"] for name, entry in found.items() if "reason" in entry}
    assert reasons.keys() == BAD.keys()
    assert "'seven'" in reasons["unknown"]
    assert "empty" in reasons["empty"]
    assert "9 frames" in reasons["short"]


def test_segments_follow_each_other_from_the_first_frame_to_the_last(trained: Path) -> None:
    lengths = {
        cut.id: cut.duration
        for part in LABELLED_PARTS
        for number in range(2)
        for cut, _, _ in utterances(part, number)
    }
    for name, entry in read_segments(trained).items():
        if "starts" in entry:
            assert entry["starts"] == [0.0, *entry["ends"][:-1]]
            assert entry["ends"][-1] == pytest.approx(lengths[name])


def test_two_processes_give_the_same_bytes_as_none(trained: Path, tmp_path: Path) -> None:
    again = train_and_align(make_experiment(tmp_path / "other", tmp_path / "data", jobs=2))
    assert contents(again) == contents(trained)


@pytest.mark.parametrize(
    "interrupted", [("monophone", 0), ("monophone", 5), ("triphone", 0), ("triphone", 2)]
)
def test_an_interrupted_training_goes_on_to_the_same_end(
    interrupted: tuple[str, int], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make_experiment(tmp_path / "other", tmp_path / "data")
    save, saved = Stage.save, []

    def save_and_stop(stage: Stage, mixtures: Mixtures, iteration: int) -> None:
        save(stage, mixtures, iteration)
        saved.append((stage.name, iteration))
        if (stage.name, iteration) == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(Stage, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train_and_align(experiment)
    again = train_and_align(experiment)
    assert len(saved) == len(set(saved))  # nothing was done twice
    assert contents(again) == contents(trained)


def test_a_shard_whose_segments_are_there_is_left_alone(trained: Path, tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path / "other", tmp_path / "data")
    for name, data in contents(trained).items():
        path = experiment.path("align", "flat-start", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    kept, removed = (
        experiment.path("align", "flat-start", "dev", f"segments.00000{n}.jsonl") for n in (0, 1)
    )
    kept.write_text("{}\n")
    removed.unlink()
    train_and_align(experiment)
    assert kept.read_text() == "{}\n"
    assert removed.read_bytes() == (trained / "dev" / removed.name).read_bytes()


def test_a_word_that_the_lexicon_lacks_is_said_as_the_word_that_stands_for_it(tmp_path: Path) -> None:
    quick = {"monophone_iterations": 2, "triphone_leaves": 0, "unknown_word": "<unk>"}
    experiment = make_experiment(tmp_path / "experiment", tmp_path / "data", **quick)
    found = read_segments(train_and_align(experiment))
    spoken = [phone for phone in found["unknown"]["phones"] if phone != "SIL"]
    assert spoken == ["A_B", "B_E", "A_B", "D_E"]  # one <unk>
    assert not experiment.path("align", "flat-start", "models", "triphone.json").exists()


def test_a_stand_in_that_the_lexicon_lacks_is_refused(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path / "experiment", tmp_path / "data", unknown_word="<spoken>")
    with pytest.raises(ValueError, match=re.escape("align.unknown_word = '<spoken>' is not in the lexicon")):
        train_and_align(experiment)


def test_too_many_bad_utterances_are_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    experiment = make_experiment(tmp_path / "experiment", tmp_path / "data", max_dropped_share=0.01)
    with pytest.raises(
        ValueError, match=r"3 of 43 human-labelled utterances .* align.max_dropped_share = 0.01"
    ) as error:
        train_and_align(experiment)
    for row in ("1 x a word is not in the lexicon: 'seven' (unknown)", "1 x the transcript is empty (empty)"):
        assert f"\n  {row}\n" in str(error.value)
    assert not list(experiment.path("align", "flat-start", "models").glob("*.npz"))


def test_training_hours_leave_out_shards_evenly() -> None:
    class Features:
        def __init__(self, hours: float) -> None:
            self.num_frames = np.array([round(hours * 3600 / 0.03)])

    shards = [flat_start.Shard(Path(str(number)), Features(1.0)) for number in range(10)]  # type: ignore[arg-type]
    numbers = lambda hours: [int(shard.cuts.name) for shard in flat_start._thin_out(shards, hours)]  # noqa: E731
    assert numbers(10.0) == list(range(10))
    assert numbers(5.0) == [0, 2, 4, 6, 8]
    assert numbers(0.1) == [0]
