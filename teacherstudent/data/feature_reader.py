"""The features of a part, shard by shard, as a network reads them: stored or computed from the audio, normalised.

Whether they were stored or are computed at every use changes nothing about their values: both are in half precision.

# N utterances, T frames of 30 ms, F features
"""

import functools
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from lhotse import MonoCut

from teacherstudent.config import Conditions, Features
from teacherstudent.data.conditions import Sounds, draw_anew
from teacherstudent.data.dataset import audio_folder, prepared_shards
from teacherstudent.data.extraction import Extractor, Unusable, read_cut
from teacherstudent.data.features import Normalisation, normalise_by, normalise_causally
from teacherstudent.data.packed import Arrays, PackedShard, count_shards, shard_path
from teacherstudent.data.shard_sequence import ShardSequence
from teacherstudent.experiment import Experiment
from teacherstudent.processes import compute_threads

_SHARDS_IN_MEMORY = 32  # manifests that a process keeps: twice the shards that a source shuffles together


class ReadableShard(Protocol):
    """One shard of features: {"values": (T, F)} by utterance, or in order."""

    path: Path

    @property
    def ids(self) -> Sequence[str]: ...
    @property
    def num_frames(self) -> np.ndarray: ...
    def __getitem__(self, utterance_id: str) -> Arrays: ...
    def __iter__(self) -> Iterator[tuple[str, Arrays]]: ...


class Normaliser(Protocol):
    def __call__(self, utterance_id: str, values: np.ndarray) -> np.ndarray:
        """(T, F) -> (T, F)."""


def read_normalisation(experiment: Experiment) -> Normalisation:
    path = experiment.path("features", "normalisation.json")
    return Normalisation.from_dict(json.loads(path.read_text(encoding="utf-8")))


def open_features(
    experiment: Experiment, part: str, normalisation: Literal["global", "speaker", "causal"] = "global"
) -> ShardSequence["FeatureShard"]:
    """The shards of a part, in order. normalisation: that of the network that will read them.

    "global" leaves the values alone: the network itself normalises by the mean and deviation of all data. "speaker"
    and "causal" come before that, and keep it right (see normalise_by).
    """
    folder = experiment.path("features", part)
    if experiment.config.features.storage == "stored":
        count = count_shards(os.listdir(folder) if folder.is_dir() else [], folder, "features")
    else:
        count = len(prepared_shards(experiment, part))
    overall, speakers = None, None
    if normalisation != "global":
        overall = read_normalisation(experiment)
    if normalisation == "speaker":
        _warn_unknown_speakers(experiment, part)
        speakers = PackedShard(folder / "speakers.h5")
    audio = audio_folder(experiment, part)
    config = experiment.config
    drawing = None
    if config.conditions.redraw:
        drawing = Drawing(experiment.path("features", "sounds.json"), config.seed)
    opener = _Open(folder, audio, config.features, config.conditions, drawing, overall, speakers)
    return ShardSequence(opener, count)


@dataclass(frozen=True)
class Drawing:
    """What a training hears in an epoch: sounds drawn anew."""

    sounds: Path
    seed: int
    epoch: int = 0


@dataclass(frozen=True)
class _Open:
    """One shard of a part, by number."""

    folder: Path
    audio: Path
    settings: Features
    conditions: Conditions
    drawing: Drawing | None  # with conditions.redraw
    overall: Normalisation | None  # where the features are normalised before the network does
    speakers: PackedShard | None  # where that is by speaker

    def __call__(self, number: int) -> "FeatureShard":
        return FeatureShard(self._raw(number), self._normaliser(number))

    def _raw(self, number: int) -> "ReadableShard":
        if self.settings.storage == "stored":
            return PackedShard(shard_path(self.folder, "features", number))
        cuts = self.folder / f"cuts.{number:06d}.jsonl"
        return AudioShard(cuts, self.audio, self.settings, self.conditions, self.drawing)

    def _normaliser(self, number: int) -> "Normaliser | None":
        if self.overall is None:
            return None
        if self.speakers is None:
            return Causal(self.overall)
        return BySpeaker(self.folder / f"index.{number:06d}.json", self.speakers, self.overall)


class FeatureShard:
    """One shard: by utterance, or in order. May be pickled."""

    def __init__(self, raw: ReadableShard, normaliser: Normaliser | None = None) -> None:
        self._raw, self._normaliser = raw, normaliser
        self.path = raw.path

    def __repr__(self) -> str:
        return str(self.path)

    def in_epoch(self, epoch: int) -> "FeatureShard":
        """As a training hears it then: with conditions.redraw, copies in other noise and other rooms."""
        if not isinstance(self._raw, AudioShard):
            return self
        return FeatureShard(self._raw.in_epoch(epoch), self._normaliser)

    @property
    def ids(self) -> Sequence[str]:
        return self._raw.ids

    @property
    def num_frames(self) -> np.ndarray:
        """(N,) int64 frames of each utterance."""
        return np.asarray(self._raw.num_frames, np.int64)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, utterance_id: str) -> Arrays:
        """{"values": (T, F)}: float16 as extracted, float32 when normalised by speaker or causally."""
        return self._normalise(utterance_id, self._raw[utterance_id])

    def __iter__(self) -> Iterator[tuple[str, Arrays]]:
        """Utterance ids with their arrays, in order."""
        return ((name, self._normalise(name, arrays)) for name, arrays in self._raw)

    def _normalise(self, utterance_id: str, arrays: Arrays) -> Arrays:
        if self._normaliser is None:
            return arrays
        return {"values": self._normaliser(utterance_id, arrays["values"])}


class AudioShard:
    """Features computed from the audio of a prepared shard's cuts, at every use."""

    def __init__(
        self,
        cuts: Path,
        audio: Path,
        settings: Features,
        conditions: Conditions,
        drawing: Drawing | None = None,
    ) -> None:
        self.path, self._audio = cuts, audio
        self._settings, self._conditions, self._drawing = settings, conditions, drawing

    def in_epoch(self, epoch: int) -> "AudioShard":
        drawing = self._drawing and replace(self._drawing, epoch=epoch)
        return AudioShard(self.path, self._audio, self._settings, self._conditions, drawing)

    def _read_index(self) -> dict[str, Any]:
        return _remember_index(index_path(self.path))

    @property
    def ids(self) -> Sequence[str]:
        ids: list[str] = self._read_index()["ids"]
        return ids

    @property
    def num_frames(self) -> np.ndarray:
        return np.asarray(self._read_index()["num_frames"], np.int64)

    def __getitem__(self, utterance_id: str) -> Arrays:
        lines = _read_lines(self.path, self.path.stat().st_mtime_ns)
        if utterance_id not in lines:
            raise KeyError(f"{self.path} has no utterance {utterance_id!r}")
        try:
            with compute_threads(1):  # as they would have been stored
                return {"values": self._extract(read_cut(json.loads(lines[utterance_id])))}
        except Unusable as error:
            raise ValueError(
                f"{self.path}: utterance {utterance_id!r}: {error}. It could be read when the features were "
                "prepared: bring the audio back, or prepare anew"
            ) from error

    def _extract(self, cut: MonoCut) -> np.ndarray:
        extractor = _make_extractor(self._settings, self._conditions)
        if self._drawing is not None and self._drawing.epoch:
            drawn = draw_anew(
                cut, _load_sounds(self._drawing.sounds), self._drawing.seed, self._drawing.epoch
            )
            try:
                return extractor.extract(drawn, self._audio)
            except Unusable as error:  # the sound is gone, or silent there
                if drawn is cut:
                    raise
                place = f"{cut.id} in epoch {self._drawing.epoch}"
                warnings.warn(
                    f"conditions.redraw: {place}: {error}: it sounds as it was prepared",
                    stacklevel=2,
                )
        return extractor.extract(cut, self._audio)

    def __iter__(self) -> Iterator[tuple[str, Arrays]]:
        return ((name, self[name]) for name in self.ids)


@functools.cache
def _load_sounds(path: Path) -> Sounds:
    return Sounds.load(path)


@functools.lru_cache(maxsize=_SHARDS_IN_MEMORY)
def _read_lines(path: Path, _changed: int) -> dict[str, bytes]:
    """The lines of a shard of prepared cuts by utterance, still text: few of them are used at a time."""
    ids = _remember_index(index_path(path))["ids"]
    return dict(zip(ids, path.read_bytes().splitlines(), strict=True))


def _remember_index(path: Path) -> dict[str, Any]:
    """Of the last few shards; with "speaker_of", by utterance."""
    return _read_index(path, path.stat().st_mtime_ns if path.is_file() else 0)


@functools.lru_cache(maxsize=_SHARDS_IN_MEMORY)
def _read_index(path: Path, _changed: int) -> dict[str, Any]:
    index = read_index(path)
    return index | {"speaker_of": dict(zip(index["ids"], index["speakers"], strict=True))}


@functools.cache
def _make_extractor(settings: Features, conditions: Conditions) -> Extractor:
    return Extractor(settings, conditions)


def index_path(cuts: Path) -> Path:
    """cuts.000003.jsonl -> index.000003.json: ids, lengths and speakers of a prepared shard."""
    return cuts.with_name(cuts.name.replace("cuts.", "index.", 1).removesuffix("l"))


def read_index(path: Path) -> dict[str, Any]:
    """Raises ValueError where `prepare` has not written it."""
    if not path.is_file():
        raise ValueError(f"no {path}: run `prepare` again, it makes what is missing")
    index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return index


class Causal:
    """By what was heard of the utterance so far, as a stream has to."""

    def __init__(self, overall: Normalisation) -> None:
        self._overall = overall

    def __call__(self, utterance_id: str, values: np.ndarray) -> np.ndarray:
        return normalise_causally(values, self._overall)


class BySpeaker:
    """By all that the speaker said in this part; where nobody is named, by the utterance itself."""

    def __init__(self, index: Path, speakers: PackedShard, overall: Normalisation) -> None:
        self._index, self._speakers, self._overall = index, speakers, overall

    def __call__(self, utterance_id: str, values: np.ndarray) -> np.ndarray:
        speaker = _remember_index(self._index)["speaker_of"][utterance_id]
        if speaker is None:
            own = Normalisation.of(values)
        else:
            arrays = self._speakers[speaker]
            own = Normalisation(arrays["mean"][0], arrays["deviation"][0])
        return normalise_by(values, own, self._overall)


def _warn_unknown_speakers(experiment: Experiment, part: str) -> None:
    report = json.loads(experiment.path("features", "report.json").read_text(encoding="utf-8"))
    unknown, total = report[part]["without_speaker"], report[part]["utterances"] + report[part]["copies"]
    if unknown:
        warnings.warn(
            f'normalisation = "speaker": {unknown} of {total} utterances of the part {part!r} name no speaker, so '
            "each is normalised by itself: give the cuts' supervisions a speaker",
            stacklevel=3,
        )
