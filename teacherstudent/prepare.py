"""The `prepare` step: from cuts to stacked log-mel features, shard by shard, in parallel processes."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lhotse import Fbank, FbankConfig
from lhotse.cut import Cut

from teacherstudent.config import Features
from teacherstudent.dataset import source_shards
from teacherstudent.experiment import Experiment
from teacherstudent.features import FRAME_RULE, STACKED_FRAMES, Moments, Normalisation, stack
from teacherstudent.files import write_json, write_text
from teacherstudent.manifests import HUMAN, PARTS, UNLABELLED, read_cuts
from teacherstudent.packed import PackedShard, PackedWriter, shard_path
from teacherstudent.progress import hours_bar


@dataclass(frozen=True)
class _Task:
    cuts: Path
    output: Path
    settings: Features

    @property
    def kept(self) -> Path:
        """The cuts that have features."""
        return self.output.with_name(self.cuts.name)


def prepare(experiment: Experiment) -> list[Path]:
    """Write features/PART/features.*.h5 for every part, and features/normalisation.json.

    Raises ValueError for audio that is missing, has another sampling rate or more than one channel, or holds
    values that are not finite, naming the cut.
    """
    settings = experiment.config.features
    tasks = [
        _Task(cuts, shard_path(experiment.path("features", part), "features", index), settings)
        for part in PARTS
        for index, cuts in enumerate(source_shards(experiment, part))
    ]
    missing = [task for task in tasks if not task.output.exists()]
    for folder in {task.output.parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    seconds = {task: sum(cut.duration for cut in read_cuts(task.cuts)) for task in missing}
    with hours_bar(sum(seconds.values()), "features") as bar:
        for task in _run(missing, settings.jobs):
            bar.update(seconds[task])
    normalisation = Normalisation.from_moments(_moments(tasks))
    path = experiment.path("features", "normalisation.json")
    write_json(path, normalisation.as_dict())
    return [*(task.output for task in tasks), *(task.kept for task in tasks), path]


def _run(tasks: list[_Task], jobs: int) -> Iterator[_Task]:
    if jobs < 1:
        raise ValueError(f"features.jobs = {jobs}: at least one process is needed")
    with ProcessPoolExecutor(min(jobs, len(tasks)) or 1, multiprocessing.get_context("spawn")) as pool:
        pending = {pool.submit(_prepare_shard, task): task for task in tasks}
        try:
            for future in as_completed(pending):
                future.result()
                yield pending[future]
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare_shard(task: _Task) -> None:
    torch.set_num_threads(1)
    settings = task.settings
    extractor = Fbank(FbankConfig(sampling_rate=settings.sampling_rate, num_filters=settings.num_mels))
    num_values = settings.num_mels * STACKED_FRAMES
    header = {
        "frame_rule": FRAME_RULE,
        "num_mels": settings.num_mels,
        "sampling_rate": settings.sampling_rate,
    }
    with PackedWriter(task.output, header, {"values": ("float16", (num_values,))}) as writer:
        for cut in read_cuts(task.cuts):
            log_mel = extractor.extract(_load(cut, settings.sampling_rate), settings.sampling_rate)
            writer.write(cut.id, values=stack(log_mel).astype(np.float16))
        write_text(task.kept, task.cuts.read_text(encoding="utf-8"))


def _load(cut: Cut, sampling_rate: int) -> np.ndarray:
    """(1, num_samples) float32."""
    if cut.sampling_rate != sampling_rate:
        raise ValueError(
            f"cut {cut.id}: the audio has {cut.sampling_rate} samples a second, features.sampling_rate is "
            f"{sampling_rate}: write the manifests anew after lhotse's cuts.resample({sampling_rate})"
        )
    if cut.num_channels != 1:
        raise ValueError(
            f"cut {cut.id}: {cut.num_channels} channels, one is needed: take one with lhotse's to_mono()"
        )
    try:
        samples = cut.load_audio()
    except Exception as error:  # lhotse raises many kinds, from its backends too
        sources = [source.source for source in cut.recording.sources]
        reason = str(error).partition("\n[extra info]")[0]  # what follows is the whole cut, more than once
        raise ValueError(f"cut {cut.id}: the audio {sources} cannot be read: {reason}") from None
    if not np.isfinite(samples).all():
        raise ValueError(f"cut {cut.id}: the audio holds values that are not finite")
    return samples


def _moments(tasks: list[_Task]) -> Moments:
    """Over the training parts."""
    training = [task.output for task in tasks if task.output.parent.name in (HUMAN, UNLABELLED)]
    shards = (np.concatenate([arrays["values"] for _, arrays in PackedShard(path)]) for path in training)
    return Moments.add(Moments.of(values) for values in shards)
