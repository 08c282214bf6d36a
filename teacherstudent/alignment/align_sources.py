"""Where alignments come from, each told about one cut at a time.

Files know utterances by id. A cut's alignment is the one of its own id, in time from the cut's beginning; else those
of its supervisions' ids, each from the supervision's beginning; else that of its recording's id, from the recording's
beginning.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from lhotse import SupervisionSegment
from lhotse.cut import Cut

from teacherstudent import wheels
from teacherstudent.alignment import ctm, textgrid
from teacherstudent.alignment.alignment_index import AlignmentIndex, Record, write_index
from teacherstudent.alignment.alignments import LENGTH_TOLERANCE_SECONDS, AlignmentError, PhoneSegments
from teacherstudent.alignment.flat_start import check_unknown_word, train_and_align
from teacherstudent.alignment.kaldi_alignments import (
    KaldiFrames,
    TransitionModel,
    pdf_segments,
    phone_segments,
    read_archives,
    read_phone_names,
    unpack,
)
from teacherstudent.data.dataset import read_lexicon
from teacherstudent.data.manifests import LABELLED_PARTS
from teacherstudent.experiment import Experiment

Segments = Callable[[Cut], PhoneSegments]


class Source(ABC):
    """Of one part's alignments; may be pickled."""

    knows_copies = False  # in other conditions: otherwise theirs follow from the original's
    knows_ids_alone = False  # so that what it has for an id may be other speech

    @property
    def offset_seconds(self) -> float:
        """What is added to the times that stand in the source."""
        return 0.0

    @abstractmethod
    def open(self, number: int) -> Segments:
        """For the cuts of shard `number`. What it gives raises AlignmentError for a cut without an alignment."""

    def report(self) -> dict[str, object]:
        return {"offset_ms": round(self.offset_seconds * 1000, 2)}


class CutSource(Source):
    """Alignment items "phone" (or "phones") of the cuts' supervisions; "word" (or "words") for the places in words."""

    knows_copies = True

    def open(self, number: int) -> Segments:
        return cut_segments


def cut_segments(cut: Cut) -> PhoneSegments:
    """Of a cut's own alignment items."""
    phones = _items(cut, _PHONES)
    if not phones:
        raise AlignmentError(
            "no phone alignment in the cut: each supervision needs alignment={'phone': [...]}, or align.source says "
            'where the alignments are; align.source = "transcripts" makes them from the transcripts'
        )
    words = [item for item in _items(cut, _WORDS) if item[2]]
    return PhoneSegments.of(phones, words or None).within(cut.start, cut.duration)


_PHONES, _WORDS = ("phone", "phones"), ("word", "words")


def _items(cut: Cut, kinds: Sequence[str]) -> list[tuple[float, float, str]]:
    """(start, end, symbol) in time of the recording: from its beginning lhotse counts, also when it cuts."""
    return [item for supervision in cut.supervisions for item in _items_of(cut, supervision, kinds)]


def _items_of(
    cut: Cut, supervision: SupervisionSegment, kinds: Sequence[str]
) -> list[tuple[float, float, str]]:
    begin, end = (round(time + cut.start, 8) for time in (supervision.start, supervision.end))
    items = [item for kind in kinds for item in (supervision.alignment or {}).get(kind, ())]
    for item in items:
        if item.start < begin - LENGTH_TOLERANCE_SECONDS or item.end > end + LENGTH_TOLERANCE_SECONDS:
            raise AlignmentError(
                f"alignment of other audio: {item.symbol!r} lies from {item.start:.2f} to {item.end:.2f} s of the "
                f"recording, what is said from {begin:.2f} to {end:.2f} s"
            )
    return [(item.start, item.end, item.symbol) for item in items]


def _of_this_audio(segments: PhoneSegments, duration: float) -> PhoneSegments:
    """A CTM may end before the audio does, but not after it."""
    end = float(segments.ends.max(initial=0.0))
    if end > duration + LENGTH_TOLERANCE_SECONDS:
        raise AlignmentError(
            f"alignment of other audio: it ends at {end:.2f} s, the audio at {duration:.2f} s"
        )
    return segments.within(0.0, duration)


@dataclass(frozen=True)
class FlatStartSource(Source):
    """What flat_start.train_and_align wrote: folder/segments.NNNNNN.jsonl."""

    folder: Path

    def open(self, number: int) -> Segments:
        path = self.folder / f"segments.{number:06d}.jsonl"
        entries = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return partial(_stored_segments, {entry["id"]: entry for entry in entries})


def _stored_segments(entries: Mapping[str, dict], cut: Cut) -> PhoneSegments:
    entry = entries.get(cut.id)
    if entry is None:
        raise AlignmentError("no transcript")
    if "reason" in entry:
        raise AlignmentError(entry["reason"])
    return PhoneSegments(np.array(entry["starts"]), np.array(entry["ends"]), tuple(entry["phones"]))


@dataclass(frozen=True)
class FileSource(Source):
    """Alignments in files that know utterances by id, through an index of them."""

    knows_ids_alone = True

    index: AlignmentIndex

    def open(self, number: int) -> Segments:
        return self.segments

    @abstractmethod
    def parse(self, utterance_id: str, record: Record, duration: float) -> PhoneSegments:
        """duration: of what has the id."""

    def segments(self, cut: Cut) -> PhoneSegments:
        record = self.index[cut.id]
        if record is not None:
            return self.parse(cut.id, record, cut.duration)
        found = [(supervision, self.index[supervision.id]) for supervision in cut.supervisions]
        if any(record is not None for _, record in found):
            parts = []
            for supervision, record in found:
                if record is None:
                    raise AlignmentError(f"no alignment in align.folder: for supervision {supervision.id!r}")
                part = self.parse(supervision.id, record, supervision.duration)
                parts.append(part.within(-supervision.start, cut.duration))
            return PhoneSegments.join(parts)
        if cut.has_recording:
            record = self.index[cut.recording.id]
            if record is not None:
                whole = self.parse(cut.recording.id, record, cut.recording.duration)
                return whole.within(cut.start, cut.duration)
        raise AlignmentError(
            "no alignment in align.folder: not for the cut, its supervision or its recording"
        )

    def report(self) -> dict[str, object]:
        return {**super().report(), "utterances_in_folder": len(self.index)}


@dataclass(frozen=True)
class KaldiSource(FileSource):
    """ali.*.gz of transition ids; model: final.mdl, names: phones.txt. Without a model, of pdf ids."""

    frames: KaldiFrames
    model: Path | None
    names: Path | None

    @property
    def offset_seconds(self) -> float:
        return self.frames.offset_seconds

    def parse(self, utterance_id: str, record: Record, duration: float) -> PhoneSegments:
        assert isinstance(record, bytes)
        if self.model is None or self.names is None:
            return pdf_segments(unpack(record), self.frames, duration)
        return phone_segments(unpack(record), _model(self.model), _names(self.names), self.frames, duration)


_model = cache(TransitionModel.read)
_names = cache(read_phone_names)


@dataclass(frozen=True)
class CtmSource(FileSource):
    """*.ctm; words: those of words.ctm. frames: by whose numbers Kaldi told the time.

    Of snip_edges = false and the shift of 10 ms these are true times, and so are those of other aligners.
    """

    words: AlignmentIndex | None
    names: Path | None
    frames: KaldiFrames

    @property
    def offset_seconds(self) -> float:
        return self.frames.offset_seconds

    def parse(self, utterance_id: str, record: Record, duration: float) -> PhoneSegments:
        assert isinstance(record, str)
        phones = ctm.phones_of(record, {} if self.names is None else _names(self.names))
        lines = None if self.words is None else self.words[utterance_id]
        words = None if lines is None else ctm.words_of(str(lines))
        return _of_this_audio(PhoneSegments.of(phones, words), duration).later(self.offset_seconds, duration)


@dataclass(frozen=True)
class TextGridSource(FileSource):
    folder: Path

    def parse(self, utterance_id: str, record: Record, duration: float) -> PhoneSegments:
        segments, end = textgrid.read_textgrid(self.folder / str(record))
        if abs(end - duration) > LENGTH_TOLERANCE_SECONDS:
            raise AlignmentError(
                f"alignment of other audio: the TextGrid ends at {end:.2f} s, the audio at {duration:.2f} s"
            )
        return segments.within(0.0, duration)


def check_brought(experiment: Experiment) -> None:
    """What can be seen before anything is computed.

    Raises ValueError for an align.folder that is not there, a lexicon that is none, and an align.unknown_word that it
    lacks.
    """
    settings = experiment.config.align
    if settings.folder and not Path(settings.folder).is_dir():
        raise ValueError(f"align.folder = {settings.folder!r}: there is no such folder")
    check_unknown_word(settings, read_lexicon(experiment))


def open_sources(experiment: Experiment) -> dict[str, Source]:
    """By labelled part. Reads what is in align.folder once; trains the models of a flat start.

    Raises ValueError when align.folder lacks what align.source needs.
    """
    settings = experiment.config.align
    if settings.source == "cuts":
        return dict.fromkeys(LABELLED_PARTS, CutSource())
    if settings.source == "transcripts":
        folder = train_and_align(experiment)
        return {part: FlatStartSource(folder / part) for part in LABELLED_PARTS}
    check_brought(experiment)
    top = Path(settings.folder)
    kinds = {"kaldi": _open_kaldi, "ctm": _open_ctm, "textgrid": _open_textgrid}
    opened: dict[Path, Source] = {}
    sources = {}
    for part in LABELLED_PARTS:
        folder = top / part if (top / part).is_dir() else top
        if folder not in opened:
            name = "all" if folder == top else part
            opened[folder] = kinds[settings.source](
                experiment, folder, experiment.path("align", "index", name)
            )
        sources[part] = opened[folder]
    return sources


def _open_kaldi(experiment: Experiment, folder: Path, index: Path) -> Source:
    archives = sorted(folder.glob("ali.*.gz"))
    _need(archives, folder, "ali.*.gz")
    model, names = _find("final.mdl", experiment, folder), _find("phones.txt", experiment, folder)
    if model is None and not experiment.config.senones.kaldi_tree:
        raise ValueError(
            f"{folder} has no final.mdl, so its ali.*.gz are taken for pdf ids, which mean something with their tree "
            "alone: copy the model of these alignments there, or set senones.kaldi_tree to the folder of the tree"
        )
    if model is not None and names is None:
        raise ValueError(f"{folder} has no phones.txt: copy it there from the lang folder of the model")
    if model is not None:
        TransitionModel.read(model)  # what is wrong with it is found before anything runs
    return KaldiSource(_index(index, partial(read_archives, archives)), _frames(experiment), model, names)


def _open_ctm(experiment: Experiment, folder: Path, index: Path) -> Source:
    files = sorted(path for path in folder.iterdir() if path.name.endswith((".ctm", ".ctm.gz")))
    words = [path for path in files if path.name.split(".")[0] == "words"]
    phones = [path for path in files if path not in words]
    _need(phones, folder, "phones.ctm")
    found = _index(index, partial(ctm.read_lines, phones), join=True)
    said = index.with_name(f"{index.name}-words")
    spoken = _index(said, partial(ctm.read_lines, words), join=True) if words else None
    return CtmSource(found, spoken, _find("phones.txt", experiment, folder), _frames(experiment))


def _open_textgrid(experiment: Experiment, folder: Path, index: Path) -> Source:
    wheels.load("praatio.textgrid", textgrid.EXTRA)  # here, where the error can be understood
    found = _index(index, partial(textgrid.find_textgrids, folder))
    _need(found.first_ids(1), folder, "*.TextGrid")
    return TextGridSource(found, folder)


def _frames(experiment: Experiment) -> KaldiFrames:
    settings = experiment.config.align
    return KaldiFrames(settings.frame_shift_seconds, settings.snip_edges)


def _find(name: str, experiment: Experiment, folder: Path) -> Path | None:
    """In the part's folder, or in the one that holds the parts'."""
    folders = (folder, Path(experiment.config.align.folder))
    return next((path for path in (place / name for place in folders) if path.is_file()), None)


def _need(found: Sequence[object], folder: Path, what: str) -> None:
    if not found:
        raise ValueError(f"align.folder: {folder} has no {what}")


def _index(
    path: Path, records: Callable[[], Iterable[tuple[str, Record]]], join: bool = False
) -> AlignmentIndex:
    """Made once; what is there is whole."""
    if not path.exists():
        write_index(path, records(), join)
    return AlignmentIndex(path)
