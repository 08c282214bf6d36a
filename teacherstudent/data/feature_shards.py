"""One shard of `prepare`: what a worker process makes of one shard of cuts.

    cuts.000003.jsonl      the cuts that have features: originals, then their copies in other conditions
    features.000003.h5     their values, in the same order; not written when features are computed on the fly
    moments.000003.h5      sums over the frames of every speaker, from which all normalisations follow
    index.000003.json      ids, lengths, speakers, and what was left out; written last: the shard is done

# T frames, F features
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import MonoCut

from teacherstudent.config import Conditions, Features
from teacherstudent.data.conditions import Sounds, make_copies
from teacherstudent.data.extraction import Extractor, Unusable, choose_audio, read_cut
from teacherstudent.data.feature_reader import index_path
from teacherstudent.data.features import FRAME_RULE, STACKED_FRAMES, Moments, Normalisation
from teacherstudent.data.manifests import COPY_OF, read_entries, speaker_of
from teacherstudent.data.packed import PackedShard, PackedWriter
from teacherstudent.files import write_json, write_text
from teacherstudent.processes import compute_threads

_UNNAMED = " "  # no speaker's name is this: speaker_of leaves no space at either end
_BLOCK_SPEAKERS = 16


@dataclass(frozen=True)
class Task:
    """One shard of cuts, and all that decides over what becomes of it."""

    part: str
    source: Path
    kept: Path  # features/PART/cuts.*.jsonl
    audio_folder: Path
    settings: Features
    conditions: Conditions
    sounds: Sounds
    labelled: bool  # its utterances need a transcript
    copied: bool  # it is one of conditions.parts
    every_ratio: bool
    seed: int

    @property
    def index(self) -> Path:
        return index_path(self.kept)

    @property
    def features(self) -> Path:
        return self._beside("features")

    @property
    def moments(self) -> Path:
        return self._beside("moments")

    def _beside(self, stem: str) -> Path:
        return self.kept.with_name(self.kept.name.replace("cuts.", f"{stem}.", 1)).with_suffix(".h5")

    @property
    def outputs(self) -> list[Path]:
        stored = [self.features] if self.settings.storage == "stored" else []
        return [*stored, self.kept, self.moments, self.index]

    @property
    def is_done(self) -> bool:
        return all(path.is_file() for path in self.outputs)


@dataclass(frozen=True)
class Survey:
    """What is known of a shard of cuts from its manifest alone."""

    seconds: float
    id_hashes: np.ndarray  # (N,) uint64: eight bytes an utterance, to find ids that are used twice


def survey(path: Path) -> Survey:
    """Reads the whole manifest; raises ValueError, with the line, where it is broken."""
    seconds, hashes = 0.0, []
    for entry in read_entries(path):
        duration = entry.get("duration")
        if isinstance(duration, int | float) and math.isfinite(duration):
            seconds += duration
        hashes.append(hash_id(entry["id"]))
    return Survey(seconds, np.array(hashes, np.uint64))


def hash_id(utterance_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(utterance_id.encode(), digest_size=8).digest(), "little")


@dataclass
class _Shard:
    """What was made of a shard so far."""

    task: Task
    extractor: Extractor
    writer: PackedWriter | None
    lines: list[str] = field(default_factory=list)
    index: dict[str, Any] = field(
        default_factory=lambda: (
            {"seconds": 0.0, "copy_seconds": 0.0, "copies": 0}
            | {name: [] for name in ("ids", "num_frames", "speakers", "skipped")}
        )
    )
    moments: dict[str, Moments] = field(default_factory=dict)

    def add(self, cut: MonoCut, is_copy: bool) -> None:
        """Raises Unusable, and nothing has been added then."""
        values = self.extractor.extract(cut, self.task.audio_folder)
        if self.writer is not None:
            self.writer.write(cut.id, values=values)
        self.lines.append(json.dumps(cut.to_dict()) + "\n")
        speaker = speaker_of(cut)
        for name, value in (("ids", cut.id), ("num_frames", len(values)), ("speakers", speaker)):
            self.index[name].append(value)
        self.index["copies"] += is_copy
        self.index["copy_seconds" if is_copy else "seconds"] += cut.duration
        summed, name = Moments.of(values), speaker or _UNNAMED
        self.moments[name] = self.moments[name] + summed if name in self.moments else summed

    def skip(self, utterance_id: str, reason: Unusable) -> None:
        self.index["skipped"].append([utterance_id, str(reason)])


def make_shard(task: Task) -> None:
    """Write the task's outputs. An utterance that cannot be used is listed in the index with the reason.

    Raises ValueError for ids that are used twice.
    """
    with compute_threads(1):
        _make_shard(task)


def _make_shard(task: Task) -> None:
    settings = task.settings
    header = {
        "frame_rule": FRAME_RULE,
        "num_mels": settings.num_mels,
        "sampling_rate": settings.sampling_rate,
    }
    arrays = {"values": ("float16", (settings.num_mels * STACKED_FRAMES,))}
    stored = settings.storage == "stored"
    with PackedWriter(task.features, header, arrays) if stored else contextlib.nullcontext() as writer:
        shard = _Shard(task, Extractor(settings, task.conditions), writer)
        _add_originals(shard)
        if task.copied:
            _add_copies(shard)
        _check_unique(task, shard.index["ids"])
    write_text(task.kept, "".join(shard.lines))
    _write_moments(task.moments, shard.moments, settings)
    write_json(task.index, shard.index)


def _add_originals(shard: _Shard) -> None:
    for entry in read_entries(shard.task.source):
        try:
            whole = read_cut(entry)
            if COPY_OF in (whole.custom or {}):
                raise Unusable(
                    f"a custom field of our own: rename {COPY_OF!r}, which tells copies from originals"
                )
            cut = choose_audio(whole, shard.task.settings)
            if shard.task.labelled and not any((part.text or "").split() for part in cut.supervisions):
                raise Unusable("no transcript")
            shard.add(cut, is_copy=False)
        except Unusable as error:
            shard.skip(entry["id"], error)


def _add_copies(shard: _Shard) -> None:
    task = shard.task
    for line in shard.lines.copy():
        original = read_cut(json.loads(line))
        assert isinstance(original, MonoCut)
        for copy in make_copies(original, task.conditions, task.sounds, task.every_ratio, task.seed):
            try:
                shard.add(copy, is_copy=True)
            except Unusable as error:
                shard.skip(copy.id, error)


def _check_unique(task: Task, ids: list[str]) -> None:
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(
            f"{task.source}: two utterances, or copies in other conditions, are called {twice!r}"
        )


def _write_moments(path: Path, moments: dict[str, Moments], settings: Features) -> None:
    shape = (settings.num_mels * STACKED_FRAMES,)
    arrays = {"frames": ("int64", ()), "total": ("float64", shape), "total_squares": ("float64", shape)}
    with PackedWriter(path, {}, arrays, _BLOCK_SPEAKERS) as writer:
        for speaker, sums in moments.items():
            writer.write(
                speaker,
                frames=np.array([sums.num_frames]),
                total=sums.total[None],
                total_squares=sums.total_squares[None],
            )


def read_moments(path: Path) -> Iterator[tuple[str | None, Moments]]:
    """Of every speaker of a shard, None for those without a name."""
    for speaker, arrays in PackedShard(path):
        sums = Moments(int(arrays["frames"][0]), arrays["total"][0].copy(), arrays["total_squares"][0].copy())
        yield (None if speaker == _UNNAMED else speaker), sums


def write_speakers(path: Path, moments: dict[str, Moments], num_features: int) -> None:
    """Mean and deviation of every speaker of a part."""
    arrays = dict.fromkeys(("mean", "deviation"), ("float32", (num_features,)))
    with PackedWriter(path, {}, arrays, _BLOCK_SPEAKERS) as writer:
        for speaker, sums in moments.items():
            own = Normalisation.from_moments(sums)
            writer.write(speaker, mean=own.mean[None], deviation=own.deviation[None])
