"""Features are lhotse's log-mel energies, stacked: of every cut, whoever computes them and however often begun."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Fbank, FbankConfig, MonoCut, Recording
from lhotse.audio import AudioSource

from teacherstudent import prepare as prepare_module
from teacherstudent.config import Config, Data, Features
from teacherstudent.experiment import Experiment
from teacherstudent.manifests import PARTS
from teacherstudent.packed import open_shards
from teacherstudent.prepare import prepare

RATE = 16000
SIZES = {"human": [2, 1], "unlabelled": [1, 2], "dev": [1], "test": [1]}  # cuts in each shard


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> None:
    soundfile.write(path, samples, rate, subtype=subtype)


def make_cut(folder: Path, name: str, samples: np.ndarray, rate: int = RATE) -> MonoCut:
    """Its audio path is relative to the part's folder."""
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    write_audio(folder / "audio" / f"{name}.wav", samples, rate)
    channels = list(range(samples.shape[1] if samples.ndim == 2 else 1))
    recording = Recording(
        id=name,
        sources=[AudioSource("file", channels, f"audio/{name}.wav")],
        sampling_rate=rate,
        num_samples=len(samples),
        duration=len(samples) / rate,
    )
    return recording.to_cut()


def make_samples(part: str, number: int) -> np.ndarray:
    """Louder in one part than in the next, of a length that no frame divides."""
    random = np.random.default_rng([PARTS.index(part), number])
    num_samples = RATE // 4 + 531 * number + 7 * PARTS.index(part)
    return (0.2 / (1 + PARTS.index(part)) * random.uniform(-1, 1, num_samples)).astype(np.float32)


def write_cuts(folder: Path, shard: int, cuts: list[MonoCut]) -> None:
    CutSet.from_cuts(cuts).to_file(folder / f"cuts.{shard:06d}.jsonl")


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process reads its libraries for seconds: one test starts some, the others have threads."""
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", lambda jobs, _: ThreadPoolExecutor(jobs))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for part, sizes in SIZES.items():
        folder, number = tmp_path / "data" / part, 0
        for shard, size in enumerate(sizes):
            cuts = []
            for _ in range(size):
                cuts.append(make_cut(folder, f"{part}-{number}", make_samples(part, number)))
                number += 1
            write_cuts(folder, shard, cuts)
    return tmp_path / "data"


def open_experiment(data: Path, name: str = "experiment", **features: int) -> Experiment:
    folder = data.parent / name
    settings = {"num_mels": 20, "jobs": 1} | features
    experiment = Experiment(Config(folder=str(folder), data=Data(str(data)), features=Features(**settings)))
    experiment.create()
    return experiment


def spoil(data: Path, samples: np.ndarray, rate: int = RATE) -> None:
    """Another cut in the place of human-2, the only one of the human part's second shard."""
    write_cuts(data / "human", 1, [make_cut(data / "human", "human-2", samples, rate)])


@pytest.mark.usefixtures("threads")
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


@pytest.mark.usefixtures("threads")
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


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_two_processes_write_the_same_bytes_as_one_thread(data: Path, request: pytest.FixtureRequest) -> None:
    together = contents(prepare(open_experiment(data, "together", jobs=2)))
    request.getfixturevalue("threads")
    assert contents(prepare(open_experiment(data, "alone"))) == together


@pytest.mark.usefixtures("threads")
def test_a_second_start_makes_what_is_missing_and_leaves_the_rest_alone(data: Path) -> None:
    experiment = open_experiment(data)
    outputs = prepare(experiment)
    before, missing = contents(outputs), outputs[1]
    missing.unlink()
    times = {path: path.stat().st_mtime_ns for path in outputs if path.suffix == ".h5" and path != missing}
    assert contents(prepare(experiment)) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


@pytest.mark.usefixtures("threads")
def test_an_interrupted_shard_leaves_no_file_and_the_next_start_makes_it(data: Path) -> None:
    whole = contents(prepare(open_experiment(data, "whole")))
    audio = data / "human" / "audio" / "human-1.wav"
    audio.rename(audio.with_suffix(".away"))
    experiment = open_experiment(data)
    with pytest.raises(ValueError, match="human-1"):
        prepare(experiment)
    assert not experiment.path("features", "human", "features.000000.h5").exists()
    assert not list(experiment.folder.rglob("*.partial"))
    audio.with_suffix(".away").rename(audio)
    assert contents(prepare(experiment)) == whole


def not_finite(data: Path) -> None:
    samples = make_samples("human", 2)
    samples[100] = np.nan
    spoil(data, samples)


PROBLEMS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "44.1 kHz": (
        lambda data: spoil(data, np.zeros(44100), 44100),
        ["human-2", "44100", "16000", "resample(16000)"],
    ),
    "two channels": (
        lambda data: spoil(data, np.zeros((RATE, 2))),
        ["human-2", "2 channels", "to_mono"],
    ),
    "audio of another rate than its manifest says": (
        lambda data: write_audio(data / "human" / "audio" / "human-2.wav", np.zeros(44100), 44100),
        ["human-2", "cannot be read"],
    ),
    "no audio": (
        lambda data: (data / "human" / "audio" / "human-2.wav").unlink(),
        ["human-2", "audio/human-2.wav", "cannot be read"],
    ),
    "no sound file": (
        lambda data: (data / "human" / "audio" / "human-2.wav").write_bytes(b"not audio"),
        ["human-2", "audio/human-2.wav", "cannot be read"],
    ),
    "samples that are no numbers": (not_finite, ["human-2", "not finite"]),
    "no part": (lambda data: (data / "dev").rename(data / "development"), ["/dev", "data.folder"]),
    "an empty part": (lambda data: (data / "dev" / "cuts.000000.jsonl").unlink(), ["/dev", "cuts.*.jsonl"]),
    "a gap": (
        lambda data: (data / "human" / "cuts.000001.jsonl").rename(data / "human" / "cuts.000002.jsonl"),
        ["/human", "cuts.000001.jsonl", "without a gap"],
    ),
    "a gap at the beginning": (
        lambda data: (data / "human" / "cuts.000000.jsonl").unlink(),
        ["/human", "cuts.000000.jsonl", "without a gap"],
    ),
}


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_cannot_be_used_is_refused_with_its_name_and_what_to_do(data: Path, problem: str) -> None:
    break_data, words = PROBLEMS[problem]
    break_data(data)
    with pytest.raises(ValueError) as error:
        prepare(open_experiment(data))
    for word in words:
        assert word in str(error.value)
    assert "MonoCut(" not in str(error.value)


@pytest.mark.usefixtures("threads")
def test_no_process_at_all_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match=r"features.jobs = 0"):
        prepare(open_experiment(data, jobs=0))
