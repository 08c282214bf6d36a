"""How fast each system recognises on one core: the network alone, and with the search.

Utterance after utterance, as a recogniser meets them, in one thread; the median of several repeats. These are
measurements: no two runs give the same, so that they stay outside of the results that are compared and hashed.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from teacherstudent.data.feature_reader import open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.manifests import TEST
from teacherstudent.decoding.decode import Decoder, Weights
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json
from teacherstudent.training.batches import collate
from teacherstudent.training.models import AcousticModel

REPEATS = 3


def measure_system(
    experiment: Experiment, model: AcousticModel, decoder: Decoder, log_priors: np.ndarray, weights: Weights
) -> dict[str, float]:
    """Parameters, frames a second, and real-time factors: seconds of work a second of audio."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        utterances = _first_utterances(experiment, model.network.normalisation)
        posteriors = [_posteriors(model, values) for values in utterances]  # also warms up
        network = _median_seconds(lambda: [_posteriors(model, values) for values in utterances])
        search = _median_seconds(lambda: [decoder(each, log_priors, *weights) for each in posteriors])
    finally:
        torch.set_num_threads(threads)
    num_frames = sum(map(len, utterances))
    audio = num_frames * FRAME_SHIFT_SECONDS
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "audio_seconds": audio,
        "network_frames_per_second": num_frames / network,
        "network_real_time_factor": network / audio,
        "search_real_time_factor": search / audio,
        "real_time_factor": (network + search) / audio,
    }


def write_speeds(path: Path, rows: Mapping[str, Mapping[str, float]], teacher: str) -> None:
    """As JSON; every other network beside the teacher's, if that is there: how many times faster and smaller."""
    systems = {name: dict(row) for name, row in rows.items()}
    reference = rows.get(teacher)
    for name, row in systems.items():
        if reference is not None and name != teacher:
            faster = row["network_frames_per_second"] / reference["network_frames_per_second"]
            smaller = reference["parameters"] / row["parameters"]
            row |= {"times_faster_than_teacher": faster, "times_smaller_than_teacher": smaller}
    write_json(path, {"threads": 1, "repeats": REPEATS, "systems": systems})


def _first_utterances(
    experiment: Experiment, normalisation: Literal["global", "speaker", "causal"]
) -> list[np.ndarray]:
    """Features (T, F) of as much of the test audio as decode.speed_seconds says, one utterance at least."""
    found: list[np.ndarray] = []
    seconds = 0.0
    for shard in open_features(experiment, TEST, normalisation):
        for name in shard.ids:
            if found and seconds >= experiment.config.decode.speed_seconds:
                return found
            values = shard[name]["values"]
            if len(values):
                found.append(values)
                seconds += len(values) * FRAME_SHIFT_SECONDS
    return found


@torch.inference_mode()
def _posteriors(model: AcousticModel, values: np.ndarray) -> np.ndarray:
    """Log posteriors (T, S) of one utterance."""
    batch = collate([values], [])
    return torch.log_softmax(model(batch.features, batch.lengths)[0], dim=1).numpy()


def _median_seconds(work: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)
