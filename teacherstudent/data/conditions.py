"""Copies of utterances in other conditions: faster or slower, with noise added, reverberated.

A copy is a lhotse cut of the original's audio whose custom fields say what is done to it when it is read:

    condition    "speed0.9", "snr10", "reverb"
    copy_of      {"id": of the original} and one of
      speed          times as fast: done by lhotse as the audio is read; supervisions and alignments are scaled with it
      added_noise    {"sound": path inside conditions.noise_folder, "offset_seconds", "snr_db"}
      reverberation  path of the impulse response inside conditions.impulse_response_folder

The signal-to-noise ratio is that of the mean squares of the whole utterance and of the noise under it, as in lhotse's
mix(snr=…). Noise that is too short is repeated. Reverberation is lhotse's: the response's strongest sample falls on
the utterance's own time, so alignments stay true, and the power stays what it was. Which sound, where in it and at
which ratio is drawn from the seed and the utterance's id alone; with conditions.redraw a training draws the sound and
where in it anew in every epoch, from the epoch's number as well.

# N samples
"""

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lhotse import MonoCut, Recording
from lhotse.augmentation import ReverbWithImpulseResponse
from lhotse.utils import fastcopy

from teacherstudent.config import Conditions
from teacherstudent.data.manifests import COPY_OF
from teacherstudent.files import walk_files
from teacherstudent.synthesis.noise import mean_square, mix

_SUFFIXES = (".wav", ".flac")


@dataclass(frozen=True)
class Sound:
    """A file of noise, or an impulse response."""

    path: str  # inside its folder
    seconds: float


@dataclass(frozen=True)
class Sounds:
    """All that may be drawn from."""

    noises: tuple[Sound, ...] = ()
    impulse_responses: tuple[Sound, ...] = ()

    @classmethod
    def find(cls, settings: Conditions) -> "Sounds":
        """Raises ValueError for a folder that is missing or without audio, and for files that are not audio."""
        return cls(
            _find(settings.noise_folder, "noise_folder"),
            _find(settings.impulse_response_folder, "impulse_response_folder"),
        )

    @classmethod
    def load(cls, path: Path) -> "Sounds":
        """Those that `prepare` has found, from features/sounds.json."""
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: tuple(Sound(**sound) for sound in sounds) for name, sounds in found.items()})


def list_audio(folder: Path) -> list[Path]:
    """WAV and FLAC files at any depth, in the order of their paths."""
    return [path for path in walk_files(folder) if path.suffix.lower() in _SUFFIXES]


def _find(folder: str, setting: str) -> tuple[Sound, ...]:
    if not folder:
        return ()
    if not Path(folder).is_dir():
        raise ValueError(f"conditions.{setting} = {folder!r}: there is no such folder")
    found = []
    for path in list_audio(Path(folder)):
        try:
            seconds = Recording.from_file(path).duration
        except Exception as error:  # lhotse's backends raise many kinds
            raise ValueError(
                f"conditions.{setting}: {path} is not audio ({type(error).__name__}): remove it"
            ) from None
        if seconds <= 0:
            raise ValueError(f"conditions.{setting}: {path} is empty: remove it")
        found.append(Sound(path.relative_to(folder).as_posix(), seconds))
    if not found:
        raise ValueError(f"conditions.{setting} = {folder!r}: it holds no {' or '.join(_SUFFIXES)} file")
    return tuple(found)


def make_copies(
    cut: MonoCut, settings: Conditions, sounds: Sounds, every_ratio: bool, seed: int
) -> list[MonoCut]:
    """The copies of an utterance. every_ratio: one with noise at each ratio, instead of one at a drawn one."""
    copies = [
        _copy(cut.perturb_speed(speed, affix_id=False), f"speed{speed:g}", speed=speed)
        for speed in settings.speeds
    ]
    random = np.random.default_rng([seed, zlib.crc32(f"conditions {cut.id}".encode())])
    if sounds.noises:
        ratios: Sequence[float] = settings.snr_db
        for snr_db in ratios if every_ratio else [float(random.choice(ratios))]:
            added = _draw_noise(cut, sounds, random) | {"snr_db": snr_db}
            copies.append(_copy(cut, f"snr{snr_db:g}", added_noise=added))
    if sounds.impulse_responses:
        sound = sounds.impulse_responses[random.integers(len(sounds.impulse_responses))]
        copies.append(_copy(cut, "reverb", reverberation=sound.path))
    return copies


def _draw_noise(cut: MonoCut, sounds: Sounds, random: np.random.Generator) -> dict[str, Any]:
    """A sound and a place in it."""
    sound = sounds.noises[random.integers(len(sounds.noises))]
    room = sound.seconds - cut.duration  # where the noise is shorter it is repeated from any place in it
    offset = round(float(random.uniform(0, room if room > 0 else sound.seconds)), 3)
    return {"sound": sound.path, "offset_seconds": offset}


def draw_anew(cut: MonoCut, sounds: Sounds, seed: int, epoch: int) -> MonoCut:
    """A copy with another noise, at the same ratio, or in another room; any other cut as it is.

    Epoch 0 is what was prepared.
    """
    made = (cut.custom or {}).get(COPY_OF, {})
    if not epoch or not ("added_noise" in made or "reverberation" in made):
        return cut
    random = np.random.default_rng([seed, zlib.crc32(f"conditions {cut.id}".encode()), epoch])
    if "added_noise" in made:
        drawn = {"added_noise": made["added_noise"] | _draw_noise(cut, sounds, random)}
    else:
        rooms = sounds.impulse_responses
        drawn = {"reverberation": rooms[random.integers(len(rooms))].path}
    return fastcopy(cut, custom=cut.custom | {COPY_OF: made | drawn})


def _copy(cut: MonoCut, condition: str, **made: object) -> MonoCut:
    described = {**(cut.custom or {}), "condition": condition, COPY_OF: {"id": cut.id, **made}}
    return fastcopy(cut, id=f"{cut.id}_{condition}", custom=described)


def apply_condition(cut: MonoCut, samples: np.ndarray, settings: Conditions) -> np.ndarray:
    """(1, N) float32 as read from the cut -> (1, N) as it sounds in the copy's condition.

    Raises ValueError where speech or noise is silent, so that no ratio can be had.
    """
    made = (cut.custom or {}).get(COPY_OF, {})
    if added := made.get("added_noise"):
        path = Path(settings.noise_folder, added["sound"])
        noise = _read_noise(path, added["offset_seconds"], samples.shape[1], cut.sampling_rate)
        if not mean_square(samples[0]) or not mean_square(noise):
            raise ValueError(
                f"no signal-to-noise ratio: the speech, or the noise {added['sound']}, is silent"
            )
        return mix(samples[0], noise, added["snr_db"], slice(None))[None]
    if inside := made.get("reverberation"):
        response = Recording.from_file(Path(settings.impulse_response_folder, inside)).resample(
            cut.sampling_rate
        )
        return ReverbWithImpulseResponse(rir=response)(samples, cut.sampling_rate)
    return samples


def _read_noise(path: Path, offset_seconds: float, num_samples: int, sampling_rate: int) -> np.ndarray:
    """(N,) of the first channel, repeated where it ends."""
    recording = Recording.from_file(path).resample(sampling_rate)
    whole = recording.num_samples
    start = min(math.floor(offset_seconds * sampling_rate), whole - 1)
    if start + num_samples <= whole:
        cut = recording.to_cut().truncate(offset=start / sampling_rate, duration=num_samples / sampling_rate)
        return cut.load_audio()[0, :num_samples]
    samples = recording.load_audio()[0]
    return samples[(start + np.arange(num_samples)) % len(samples)]
