"""How fast `prepare` makes features, beside lhotse by itself on the same audio: called from the section `senones`."""

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse import CutSet, Fbank, FbankConfig, Recording
from lhotse.features.io import NumpyHdf5Writer

from teacherstudent.config import Conditions, Features
from teacherstudent.data.conditions import Sounds
from teacherstudent.data.feature_shards import Task, make_shard

RATE, SECONDS, UTTERANCES = 16000, 8.0, 300
REPEATS = 3


def write_speech(folder: Path) -> Path:
    """One shard of cuts, forty minutes of FLAC; what is said does not matter for the time it takes."""
    random = np.random.default_rng(0)
    recordings = []
    for number in range(UTTERANCES):
        path = folder / f"u{number:04}.flac"
        envelope = np.repeat(random.uniform(0, 0.2, 80), int(RATE * SECONDS) // 80)
        soundfile.write(path, envelope * np.clip(random.normal(size=len(envelope)), -4, 4), RATE)
        recordings.append(Recording.from_file(path).to_cut())
    CutSet.from_cuts(recordings).to_file(folder / "cuts.000000.jsonl")
    return folder / "cuts.000000.jsonl"


def by_lhotse(cuts: Path, output: Path) -> None:
    """Log-mel frames of 10 ms, every utterance a dataset of an HDF5 file."""
    extractor = Fbank(FbankConfig(sampling_rate=RATE, num_filters=64))
    CutSet.from_file(cuts).compute_and_store_features(
        extractor, output / "features", storage_type=NumpyHdf5Writer, progress_bar=False
    )


def by_prepare(cuts: Path, output: Path, storage: str = "stored") -> None:
    """The same, stacked, checked and normalised."""
    settings = Features(storage=storage)  # type: ignore[arg-type]
    kept = output / "cuts.000000.jsonl"
    make_shard(
        Task("unlabelled", cuts, kept, cuts.parent, settings, Conditions(), Sounds(), False, False, False, 0)
    )


def measure_prepare() -> None:
    """x real time on one core: medians of turns taken one after the other."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ways = {
        "lhotse compute_and_store_features": by_lhotse,
        "prepare, stored": by_prepare,
        "prepare, on the fly": lambda cuts, output: by_prepare(cuts, output, "on-the-fly"),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as name:
        cuts = write_speech(Path(name))
        for _ in range(REPEATS):
            for way, function in ways.items():
                with tempfile.TemporaryDirectory(dir=name) as output:
                    start = time.perf_counter()
                    function(cuts, Path(output))
                    speeds[way].append(UTTERANCES * SECONDS / (time.perf_counter() - start))
    plain = float(np.median(speeds["lhotse compute_and_store_features"]))
    for way, found in speeds.items():
        speed = float(np.median(found))
        print(f"{way:34} {speed:6.0f} x real time per core, {speed / plain:5.2f} of plain lhotse")
