"""Four parts of a quarter of a second an utterance, for the tests of all that comes before the first network."""

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import CutSet, MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.utils import fastcopy

from teacherstudent.config import Conditions, Config, Data, Features
from teacherstudent.data.manifests import PARTS
from teacherstudent.experiment import Experiment

RATE = 16000
SIZES = {"human": [2, 1], "unlabelled": [1, 2], "dev": [1], "test": [1]}  # cuts in each shard


def write_audio(path: Path, samples: np.ndarray, rate: int = RATE, subtype: str = "FLOAT") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype=subtype)


def make_cut(folder: Path, name: str, samples: np.ndarray, rate: int = RATE, text: str | None = "yes") -> Any:
    """Its audio path is relative to the part's folder. Two speakers: a and b, by the last letter of its name."""
    write_audio(folder / "audio" / f"{name}.wav", samples, rate)
    channels = list(range(samples.shape[1] if samples.ndim == 2 else 1))
    recording = Recording(
        id=name,
        sources=[AudioSource("file", channels, f"audio/{name}.wav")],
        sampling_rate=rate,
        num_samples=len(samples),
        duration=len(samples) / rate,
    )
    cut = recording.to_cut()
    channel = channels if len(channels) > 1 else 0
    speaker = "ab"[ord(name[-1]) % 2]
    supervision = SupervisionSegment(name, name, 0, cut.duration, channel, text=text, speaker=speaker)
    return fastcopy(cut, supervisions=[supervision])


def make_samples(part: str, number: int) -> np.ndarray:
    """Louder in one part than in the next, of a length that no frame divides."""
    random = np.random.default_rng([PARTS.index(part), number])
    num_samples = RATE // 4 + 531 * number + 7 * PARTS.index(part)
    return (0.2 / (1 + PARTS.index(part)) * random.uniform(-1, 1, num_samples)).astype(np.float32)


def write_cuts(folder: Path, shard: int, cuts: list[MonoCut]) -> None:
    CutSet.from_cuts(cuts).to_file(folder / f"cuts.{shard:06d}.jsonl")


def write_data(folder: Path, rate: int = RATE) -> Path:
    """Parts of the sizes above, and a lexicon."""
    for part, sizes in SIZES.items():
        number = 0
        for shard, size in enumerate(sizes):
            cuts = []
            for _ in range(size):
                cuts.append(make_cut(folder / part, f"{part}-{number}", make_samples(part, number), rate))
                number += 1
            write_cuts(folder / part, shard, cuts)
    (folder / "lexicon.txt").write_text("yes Y EH S\n")
    return folder


def open_experiment(
    data: Path, name: str = "experiment", conditions: Conditions | None = None, **features: Any
) -> Experiment:
    settings = {"num_mels": 20, "jobs": 1} | features
    return open_config(
        data.parent / name,
        data=Data(str(data)),
        features=Features(**settings),
        conditions=conditions or Conditions(),
    )


def open_config(folder: Path, **sections: Any) -> Experiment:
    experiment = Experiment(Config(folder=str(folder), **sections))
    experiment.create()
    return experiment


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]
