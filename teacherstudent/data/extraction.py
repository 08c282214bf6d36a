"""From one cut to its features, or to the reason why it has none.

# N samples, T frames of 30 ms, F features
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import Fbank, FbankConfig, MonoCut, MultiCut, Recording, set_audio_duration_mismatch_tolerance
from lhotse.serialization import deserialize_item
from lhotse.utils import fastcopy

from teacherstudent.config import Conditions, Features
from teacherstudent.data.conditions import apply_condition
from teacherstudent.data.features import num_stacked_frames, stack

TOO_SHORT = "shorter than a frame of 10 ms"
MAX_MISSING_SECONDS = 0.025  # of audio that ends before its manifest says: lhotse mirrors what is missing


class Unusable(ValueError):
    """Why an utterance is left out, as `kind` or `kind: details`; the kinds are counted."""


def read_cut(entry: dict[str, Any]) -> MonoCut | MultiCut:
    """A line of a manifest as lhotse's cut. Raises Unusable for what is none, or has no audio of its own."""
    if entry.get("type") in ("MonoCut", "MultiCut") and not entry.get("recording"):
        raise Unusable("no recording")
    try:
        cut = deserialize_item(dict(entry))
    except Exception as error:  # lhotse does not check what it reads
        raise Unusable(f"not a cut: {type(error).__name__} {error}") from None
    if not isinstance(cut, MonoCut | MultiCut):
        raise Unusable(f"not a cut of one recording: {entry.get('type', type(cut).__name__)}")
    for time in (cut.start, cut.duration):
        if not isinstance(time, int | float) or not math.isfinite(time):
            raise Unusable(f"not a cut: its start or duration is {time!r}")
    for part in cut.supervisions:
        if not isinstance(part.text, str | None):
            raise Unusable(f"not a cut: its text is {part.text!r}")
    return cut


def choose_audio(cut: MonoCut | MultiCut, settings: Features) -> MonoCut:
    """The one channel of the cut that is used, at features.sampling_rate. Raises Unusable where there is none."""
    if cut.sampling_rate <= 0 or cut.duration < 0.01 or cut.num_samples < cut.sampling_rate // 100:
        raise Unusable(TOO_SHORT)
    if cut.num_channels > 1:
        cut = _choose_channel(cut, settings.channel)
    elif isinstance(cut, MultiCut):
        cut = _choose_channel(cut, cut.channel[0])
    rate = settings.sampling_rate
    if cut.sampling_rate != rate:
        if not settings.resample:
            raise Unusable(
                f"another sampling rate: {cut.sampling_rate}, features.sampling_rate is {rate} and features.resample "
                "false"
            )
        cut = cut.resample(rate)
    return fastcopy(cut, features=None)


def _choose_channel(cut: MultiCut, channel: int) -> MonoCut:
    if channel == -1:
        raise Unusable(f"several channels: {cut.num_channels}; features.channel says which one to take")
    for chosen in cut.to_mono():
        if chosen.channel == channel:
            return fastcopy(chosen, id=cut.id)
    raise Unusable(f"no such channel: features.channel is {channel}, there are {list(cut.channel)}")


class Extractor:
    """Reads the audio of cuts and computes their features.

    Making one holds lhotse to MAX_MISSING_SECONDS in this process; by itself it makes up to half a second of audio.
    """

    def __init__(self, settings: Features, conditions: Conditions) -> None:
        self._conditions = conditions
        with warnings.catch_warnings():  # lhotse warns of any value below its own
            warnings.simplefilter("ignore")
            set_audio_duration_mismatch_tolerance(MAX_MISSING_SECONDS)
        self._fbank = Fbank(FbankConfig(sampling_rate=settings.sampling_rate, num_filters=settings.num_mels))

    def extract(self, cut: MonoCut, audio_folder: Path) -> np.ndarray:
        """(T, F) float16. audio_folder: where relative audio paths start. Raises Unusable."""
        samples = _load(cut, audio_folder)
        try:
            samples = apply_condition(cut, samples, self._conditions)
        except ValueError as error:
            raise Unusable(str(error)) from None
        except Exception as error:  # lhotse raises many kinds
            raise Unusable(f"the condition cannot be made{_reason(error, audio_folder)}") from None
        if samples.shape[1] < cut.sampling_rate // 100:
            raise Unusable(f"{TOO_SHORT}: in another condition")
        log_mel = self._fbank.extract(samples, cut.sampling_rate)
        values = stack(log_mel).astype(np.float16)
        assert len(values) == num_stacked_frames(samples.shape[1], cut.sampling_rate), cut.id
        return values


def _load(cut: MonoCut, audio_folder: Path) -> np.ndarray:
    """(1, N) float32."""
    sources = [source for source in cut.recording.sources if source.type == "file"]
    for source in sources:
        if not (audio_folder / source.source).is_file():
            raise Unusable(f"the audio is missing: {source.source}")
        _check_rate(cut, audio_folder / source.source, str(source.source))
    try:
        samples = cut.with_recording_path_prefix(str(audio_folder)).load_audio()
    except Exception as error:  # lhotse raises many kinds, from its backends too
        named = ", ".join(str(source.source) for source in sources)
        raise Unusable(f"the audio cannot be read: {named}{_reason(error, audio_folder)}") from None
    if samples.size == 0:
        raise Unusable("the audio is empty")
    if not np.isfinite(samples).all():
        raise Unusable("samples that are not finite")
    return samples


def _check_rate(cut: MonoCut, path: Path, name: str) -> None:
    """lhotse believes its manifest: a file of another rate would be heard as slower or faster speech."""
    if path.suffix.lower() not in (".wav", ".flac"):  # compressed ones are decoded to the manifest's rate
        return
    try:
        rate = soundfile.info(path).samplerate
    except soundfile.SoundFileError:
        return  # loading it says what is wrong
    if rate != (expected := _rate_of_file(cut.recording)):
        raise Unusable(f"the audio cannot be read: {name} (at {rate} Hz, its manifest says {expected})")


def _rate_of_file(recording: Recording) -> int:
    """Before lhotse resamples it."""
    for transform in recording.transforms or []:
        facts = transform if isinstance(transform, dict) else transform.to_dict()
        if facts["name"] == "Resample":
            return int(facts["kwargs"]["source_sampling_rate"])
    return int(recording.sampling_rate)


def _reason(error: Exception, audio_folder: Path) -> str:
    """What lhotse, or the first of its backends, says in a line: without the whole cut, and without where it lies."""
    text = str(error).partition("\n[extra info]")[0]
    first = re.search(r"^Exception #0 \(.*?\): (.*)$", text, re.MULTILINE)
    line = (first[1] if first else text.partition("\n")[0]).replace(f"{audio_folder}/", "")
    return f" ({line[:200]})" if line else ""
