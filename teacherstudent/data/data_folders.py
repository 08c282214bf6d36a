"""Utterances of a Kaldi data folder, of a folder of audio files with transcripts, or of a lhotse Shar folder.

Recordings, supervisions and cuts are lhotse's. What it offers for whole Kaldi folders (load_kaldi_data_dir) gives all
recordings one sampling rate and one channel, cuts their durations to milliseconds, and ends at the first file that is
missing: here each file's header is read, and what cannot be used is listed.
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lhotse import CutSet, MonoCut, MultiCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource
from lhotse.utils import fastcopy

from teacherstudent.data.conditions import list_audio
from teacherstudent.data.extraction import Unusable
from teacherstudent.files import split_lines

WAV_SCP, TRANSCRIPTS = "wav.scp", "transcripts.txt"
_UNPACKING = re.compile(r"flac(?:\s+-[cds]+)+\s+(\S+)\s*\|")  # what Kaldi's LibriSpeech recipe writes
KALDI_FILES = (WAV_SCP, "segments", "text", "utt2spk")  # what is read of a Kaldi folder
MAX_OVERSHOOT_SECONDS = 0.5  # of a segment over its recording, as in Kaldi's extract-segments: it ends there


@dataclass(frozen=True)
class Row:
    """One utterance before its audio is looked at."""

    id: str
    audio: str  # as in the cut: absolute, or relative to the data folder
    recording_id: str
    text: str | None = None
    speaker: str | None = None
    start_seconds: float = 0.0
    end_seconds: float | None = None  # None: with the recording


@dataclass(frozen=True)
class Listing:
    """All utterances of a folder: those to make cuts of, and those that cannot be, with the reason."""

    rows: list[Row]
    skipped: list[tuple[str, str]]


def read_table(path: Path, values_needed: bool = True) -> dict[str, str]:
    """`key value …` a line. Raises ValueError naming file and line for a repeated key or a missing value."""
    table: dict[str, str] = {}
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        key, *rest = line.split(maxsplit=1)[:2] or [""]
        if not key:
            continue
        if key in table:
            raise ValueError(f"{path}, line {number}: {key!r} is there twice; an id is needed once")
        if values_needed and not rest:
            raise ValueError(f"{path}, line {number}: {key!r} stands alone; `{key} VALUE` is needed")
        table[key] = rest[0].strip() if rest else ""
    return table


# -- Kaldi ---------------------------------------------------------------------------------------------------


def list_kaldi(folder: Path, labelled: bool) -> Listing:
    """wav.scp with segments, text and utt2spk where they are there; text is needed for labelled parts.

    Raises ValueError for files that are broken, and for a wav.scp whose entries are commands or archives.
    """
    audio = find_audio(folder)
    segments = folder / "segments"
    spans = _read_segments(segments) if segments.is_file() else {name: (name, 0.0, None) for name in audio}
    speakers = read_table(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
    texts = _read_texts(folder / "text", labelled)
    rows, skipped = [], _without_audio(texts, spans)
    for name, (recording, start, end) in spans.items():
        if recording not in audio:
            skipped.append((name, f"no recording: {recording} is not in wav.scp"))
        elif labelled and not texts.get(name):
            skipped.append((name, "no transcript"))
        else:
            rows.append(
                Row(name, audio[recording], recording, texts.get(name), speakers.get(name), start, end)
            )
    return Listing(rows, skipped)


def find_audio(folder: Path) -> dict[str, str]:
    """Where the recordings of wav.scp lie: absolute, or relative to the folder."""
    return {name: _find_file(folder, name, place) for name, place in read_table(folder / WAV_SCP).items()}


def _find_file(folder: Path, name: str, place: str) -> str:
    """Relative paths start at the folder, or, as Kaldi has it, where the program was started."""
    if decoded := _UNPACKING.fullmatch(place):
        place = decoded[1]  # the command only unpacks a file that is read as it is
    if place.endswith("|") or place.startswith("|"):
        raise ValueError(
            f"{folder / WAV_SCP}: {name} is a command ({place}): commands in data are not run. Name audio files, for "
            "instance those of `wav-copy scp:wav.scp scp:files.scp`, where files.scp names a WAV file for each id, or "
            "the flac file itself where the command only decodes it"
        )
    if re.search(r"\.ark:\d+(\[.*\])?$", place):
        raise ValueError(f"{folder / WAV_SCP}: {name} lies in an archive ({place}): name audio files instead")
    if not (folder / place).is_file() and Path(place).is_file():
        here = Path(place).parent.resolve()  # `..` of a folder that is a link leads out of where it points to
        return Path(os.path.relpath(here, folder.resolve()), Path(place).name).as_posix()
    return place


def _read_segments(path: Path) -> dict[str, tuple[str, float, float | None]]:
    """Utterance: recording, start and end in seconds; an end of -1 is the recording's."""
    spans: dict[str, tuple[str, float, float | None]] = {}
    for name, rest in read_table(path).items():
        try:
            recording, *times = rest.split()
            start, end = map(float, times)
            if not math.isfinite(start) or not math.isfinite(end):
                raise ValueError
            spans[name] = (recording, start, None if end == -1 else end)
        except ValueError:
            raise ValueError(
                f"{path}: {name} {rest}: `UTTERANCE RECORDING START END` is needed, in seconds"
            ) from None
    return spans


def _read_texts(path: Path, labelled: bool) -> dict[str, str]:
    """Words of every utterance; an unlabelled part has none, whatever lies there."""
    if not labelled:
        return {}
    if not path.is_file():
        raise ValueError(f"no {path}: a labelled part needs its transcripts, `UTTERANCE WORD WORD …` a line")
    return {name: " ".join(words.split()) for name, words in read_table(path, values_needed=False).items()}


def _without_audio(texts: dict[str, str], found: object) -> list[tuple[str, str]]:
    return [(name, "a transcript without audio") for name in texts if name not in found]  # type: ignore[operator]


# -- audio files ---------------------------------------------------------------------------------------------


def list_audio_folder(folder: Path, labelled: bool) -> Listing:
    """Every WAV and FLAC file is an utterance, its id the file's name without the suffix.

    A speaker is what utt2spk says, else the name of the folder that the file lies in; of files that lie at the top
    nothing is known. Raises ValueError for two files of one name.
    """
    files: dict[str, Path] = {}
    for path in list_audio(folder):
        if path.stem in files:
            raise ValueError(
                f"two files would be the utterance {path.stem!r}: {files[path.stem]} and {path}. Rename one: the id is "
                "the file's name"
            )
        files[path.stem] = path.relative_to(folder)
    speakers = read_table(folder / "utt2spk") if (folder / "utt2spk").is_file() else {}
    texts = _read_texts(folder / TRANSCRIPTS, labelled)
    rows, skipped = [], _without_audio(texts, files)
    for name, path in files.items():
        if labelled and not texts.get(name):
            skipped.append((name, "no transcript"))
        else:
            beside = path.parent.name if path.parent != Path(".") else None
            speaker = speakers.get(name, beside)
            rows.append(Row(name, path.as_posix(), name, texts.get(name), speaker))
    return Listing(rows, skipped)


# -- cuts ----------------------------------------------------------------------------------------------------


def make_cut(folder: Path, row: Row) -> MonoCut | MultiCut:
    """Reads the header of the row's audio. Raises Unusable, with the reason, where no cut can be made."""
    path = folder / row.audio
    if not path.is_file():
        raise Unusable(f"the audio is missing: {row.audio}")
    try:
        recording = Recording.from_file(path, recording_id=row.recording_id)
    except Exception as error:  # lhotse's backends raise many kinds
        raise Unusable(f"the audio cannot be read: {row.audio} ({type(error).__name__})") from None
    recording = fastcopy(recording, sources=[fastcopy(recording.sources[0], source=row.audio)])
    rate = recording.sampling_rate
    end = recording.duration if row.end_seconds is None else min(row.end_seconds, recording.duration)
    if row.end_seconds is not None and row.end_seconds > recording.duration + MAX_OVERSHOOT_SECONDS:
        raise Unusable(
            f"a segment beyond its recording: it ends at {row.end_seconds:g} s, that at {recording.duration:g} s"
        )
    num_samples = round((end - row.start_seconds) * rate)
    if row.start_seconds < 0 or num_samples <= 0:
        raise Unusable(f"a segment of no duration: from {row.start_seconds:g} s to {end:g} s")
    channel = recording.channel_ids if recording.num_channels > 1 else recording.channel_ids[0]
    duration = num_samples / rate
    supervision = SupervisionSegment(
        id=row.id,
        recording_id=recording.id,
        start=0.0,
        duration=duration,
        channel=channel,
        text=row.text,
        speaker=row.speaker,
    )
    kind = MultiCut if recording.num_channels > 1 else MonoCut
    return kind(
        id=row.id,
        start=row.start_seconds,
        duration=duration,
        channel=channel,
        recording=recording,
        supervisions=[supervision],
    )


def overshoots(row: Row, cut: MonoCut | MultiCut) -> bool:
    """Whether the segment ended after its recording, and was made to end with it."""
    return row.end_seconds is not None and row.end_seconds > cut.recording.duration


# -- lhotse Shar ---------------------------------------------------------------------------------------------

_SHAR_FIELDS = ("shard_origin", "shar_epoch")  # where lhotse read it from: absolute paths
_SUFFIXES = {b"fLaC": ".flac", b"RIFF": ".wav", b"OggS": ".ogg"}


def list_shar(folder: Path) -> list[tuple[Path, Path]]:
    """(cuts, recordings) of every shard. Raises ValueError where one is missing."""
    pairs = [
        (path, folder / f"recording.{path.name.split('.')[1]}.tar")
        for path in sorted(folder.glob("cuts.*.jsonl*"))
    ]
    for _, recordings in pairs:
        if not recordings.is_file():
            raise ValueError(f"{folder} is a lhotse Shar folder, but {recordings.name} is missing")
    return pairs


def extract_shar(
    cuts: Path, recordings: Path, audio: Path
) -> Iterator[tuple[str, MonoCut | MultiCut | Unusable]]:
    """The cuts of one shard by id, their audio written to numbered files in the folder `audio`, beside the cuts.

    A tar file is read from its beginning: no utterance could be had by itself from it.
    """
    audio.mkdir(parents=True)
    fields = {"cuts": [str(cuts)], "recording": [str(recordings)]}
    for number, cut in enumerate(CutSet.from_shar(fields=fields)):
        if not isinstance(cut, MonoCut | MultiCut) or not _in_memory(cut):
            yield cut.id, Unusable("no audio of its own in the tar file")
            continue
        contents = cut.recording.sources[0].source
        path = audio / f"{number:06d}{_SUFFIXES.get(contents[:4], '.audio')}"
        path.write_bytes(contents)
        source = AudioSource("file", cut.recording.sources[0].channels, f"audio/{audio.name}/{path.name}")
        custom = {key: value for key, value in (cut.custom or {}).items() if key not in _SHAR_FIELDS}
        yield (
            cut.id,
            fastcopy(cut, recording=fastcopy(cut.recording, sources=[source]), custom=custom or None),
        )


def _in_memory(cut: MonoCut | MultiCut) -> bool:
    return cut.has_recording and cut.recording.sources[0].type == "memory"
