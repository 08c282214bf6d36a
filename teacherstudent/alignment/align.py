"""The `align` step: from alignments to the phone of every 30 ms frame, and the frames that open a phone.

Whatever the source, times become frames by the same rule (alignments.py). An utterance that has no alignment, or one
that cannot be its own, is left out of the shard and listed in align/skipped.jsonl.

    align/PART/phones.000000.h5    arrays phone (1 is silence) and first; or pdf, for pdf ids that Kaldi made
    align/PART/summary.000000.json what was left out of that shard, and the sums that the report adds up
    align/skipped.jsonl            {"part", "id", "reason"} a line
    align/report.json              by part: coverage, what was dropped and why, how far boundaries moved
"""

import json
import shutil
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from teacherstudent.alignment.align_sources import (
    CutSource,
    KaldiSource,
    Segments,
    Source,
    cut_segments,
    open_sources,
)
from teacherstudent.alignment.alignments import (
    LENGTH_TOLERANCE_SECONDS,
    AlignmentError,
    PhoneNames,
    PhoneSegments,
    Shifts,
    boundary_shifts,
    frame_labels,
    frame_values,
    grid_shifts,
)
from teacherstudent.alignment.spelling import check_spelling, spelling_distance
from teacherstudent.data.dataset import prepared_shards, read_lexicon, read_prepared
from teacherstudent.data.feature_reader import open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.data.manifests import COPY_OF, LABELLED_PARTS, original_of, transcript_of
from teacherstudent.data.packed import PackedWriter, shard_number, shard_path
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json, write_text
from teacherstudent.processes import map_in_processes
from teacherstudent.progress import hours_bar
from teacherstudent.tying.kaldi_inventory import read_kaldi_inventory

PHONE_ARRAYS = {"phone": ("int16", ()), "first": ("bool", ())}
PDF_ARRAYS = {"pdf": ("int32", ())}
_EXAMPLES = 3  # ids named in messages, and reasons


class Phones:
    """Labels frames with phones of the lexicon."""

    arrays = PHONE_ARRAYS

    def __init__(self, lexicon: Lexicon, word_positions: bool) -> None:
        self.header = {"phones": [SILENCE, *lexicon.phones]}
        self._lexicon = lexicon
        self._names = PhoneNames(frozenset(lexicon.phones), word_positions)
        self._ids = {phone: index for index, phone in enumerate(self.header["phones"], 1)}

    def rename(self, segments: PhoneSegments) -> PhoneSegments:
        return self._names.rename(segments)

    def check(self, segments: PhoneSegments, cut: Cut) -> None:
        if (transcript := _find_transcript(cut)) is not None:
            check_spelling(segments, transcript, self._lexicon)

    def is_spelt(self, segments: PhoneSegments, cut: Cut) -> bool:
        """Exactly as the lexicon says."""
        transcript = _find_transcript(cut)
        return transcript is not None and not spelling_distance(segments, transcript, self._lexicon)

    def count_unknown(self, cut: Cut) -> int:
        """Words of the transcript that the lexicon lacks."""
        return sum(word not in self._lexicon.pronunciations for word in transcript_of(cut).split())

    def label(self, segments: PhoneSegments, num_frames: int) -> dict[str, np.ndarray]:
        ids = [self._ids[phone] for phone in segments.phones]
        phone, first = frame_labels(segments.starts, segments.ends, ids, num_frames)
        return {"phone": phone, "first": first}


def _find_transcript(cut: Cut) -> str | None:
    """None where some of it was cut off."""
    ends = (cut.duration + LENGTH_TOLERANCE_SECONDS, -LENGTH_TOLERANCE_SECONDS)
    whole = all(part.end <= ends[0] and part.start >= ends[1] for part in cut.supervisions)
    return transcript_of(cut) if whole else None


class Pdfs:
    """Labels frames with the pdfs of Kaldi's tree, which do not tell what was said."""

    arrays = PDF_ARRAYS

    def __init__(self, num_pdfs: int) -> None:
        self.header = {"num_pdfs": num_pdfs}

    def rename(self, segments: PhoneSegments) -> PhoneSegments:
        highest = max(map(int, segments.phones), default=-1)
        if highest >= self.header["num_pdfs"]:
            raise AlignmentError(f"alignment of another tree: pdf {highest} of {self.header['num_pdfs']}")
        return segments

    def check(self, segments: PhoneSegments, cut: Cut) -> None:
        pass

    def label(self, segments: PhoneSegments, num_frames: int) -> dict[str, np.ndarray]:
        pdfs = np.array(list(map(int, segments.phones)), np.int32)
        return {"pdf": frame_values(segments.starts, segments.ends, pdfs, num_frames)}


@dataclass
class _Sums:
    """What a shard, or a part, comes to."""

    skipped: list[dict[str, str]] = field(default_factory=list)  # id, kind, reason
    utterances: int = 0
    seconds: float = 0.0
    aligned_seconds: float = 0.0
    speech_seconds: float = 0.0
    spelt: int = 0  # utterances whose phones are exactly those that the lexicon has for the transcript
    unknown_words: int = 0  # said in those, and not in the lexicon
    grid: Shifts = field(default_factory=Shifts)  # of frames against the alignment that they were made of
    cuts: Shifts = field(default_factory=Shifts)  # of the alignment against the cuts' own phones

    def add(self, other: "_Sums") -> None:
        self.skipped += other.skipped
        self.utterances += other.utterances
        self.seconds += other.seconds
        self.aligned_seconds += other.aligned_seconds
        self.speech_seconds += other.speech_seconds
        self.spelt += other.spelt
        self.unknown_words += other.unknown_words
        self.grid.merge(other.grid)
        self.cuts.merge(other.cuts)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "grid": self.grid.as_dict(), "cuts": self.cuts.as_dict()}

    @classmethod
    def read(cls, path: Path) -> "_Sums":
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {name: Shifts.from_dict(values[name]) for name in ("grid", "cuts")})


def align(experiment: Experiment) -> list[Path]:
    """Write align/PART/phones.*.h5 for the labelled parts, with align/skipped.jsonl and align/report.json.

    What the flat start wrote is recorded with them. Shard by shard in align.jobs processes; shards that are there are
    left alone. Raises ValueError when more than align.max_dropped_share of a part has no alignment, saying why most of
    it has none.
    """
    sources = open_sources(experiment)
    shards = [
        (part, number) for part in LABELLED_PARTS for number in range(len(prepared_shards(experiment, part)))
    ]
    missing = [shard for shard in shards if not _output(experiment, *shard).exists()]
    lengths = {part: _shard_seconds(experiment, part) for part in {part for part, _ in missing}}
    seconds = [lengths[part][number] for part, number in missing]
    make = (_Aligner, experiment, sources, _open_labels(experiment, sources))
    with hours_bar(sum(seconds), "align") as bar:
        for done, _ in zip(seconds, map_in_processes(make, missing, experiment.config.align.jobs)):
            bar.update(done)
    described = {part: source.report() for part, source in sources.items()}
    shutil.rmtree(experiment.path("align", "index"), ignore_errors=True)
    reports = _report(experiment, described)
    outputs = [_output(experiment, *shard) for shard in shards]
    models = sorted(experiment.path("align", "flat-start").rglob("[!.]*.*"))
    return [*outputs, *map(_summary, outputs), *reports, *models]


def _shard_seconds(experiment: Experiment, part: str) -> list[float]:
    """One shard is held at a time: it knows the ids of all its utterances."""
    shards = open_features(experiment, part)[::-1]
    return [float(shards.pop().num_frames.sum()) * FRAME_SHIFT_SECONDS for _ in range(len(shards))]


def _output(experiment: Experiment, part: str, number: int) -> Path:
    return shard_path(experiment.path("align", part), "phones", number)


def _summary(output: Path) -> Path:
    return output.with_name(f"summary.{shard_number(output):06d}.json")


def _open_labels(experiment: Experiment, sources: dict[str, Source]) -> Phones | Pdfs:
    without_model = [
        part for part, source in sources.items() if isinstance(source, KaldiSource) and source.model is None
    ]
    if not without_model:
        return Phones(read_lexicon(experiment), experiment.config.data.word_positions)
    if len(without_model) < len(sources):
        raise ValueError(
            f"align.folder: {', '.join(without_model)} has no final.mdl, other parts have one: all or none is needed"
        )
    return Pdfs(read_kaldi_inventory(Path(experiment.config.senones.kaldi_tree)).num_senones)


class _Aligner:
    """What a process does: one shard after another."""

    def __init__(self, experiment: Experiment, sources: dict[str, Source], labels: Phones | Pdfs) -> None:
        self._experiment, self._sources, self._labels = experiment, sources, labels

    def __call__(self, shard: tuple[str, int]) -> None:
        part, number = shard
        features = open_features(self._experiment, part)[number]
        lengths = dict(zip(features.ids, features.num_frames.tolist()))
        cuts = read_prepared(self._experiment, part, prepared_shards(self._experiment, part)[number])
        source, labels = self._sources[part], self._labels
        find = source.open(number) if source.knows_copies else _Originals(source.open(number))
        output, sums = _output(self._experiment, part, number), _Sums()
        with PackedWriter(output, labels.header, labels.arrays) as writer:
            for cut in cuts:
                sums.utterances += 1
                sums.seconds += cut.duration
                try:
                    segments = labels.rename(find(cut))
                    if source.knows_ids_alone:
                        labels.check(segments, cut)
                    arrays = labels.label(segments, lengths[cut.id])
                except AlignmentError as error:
                    sums.skipped.append({"id": cut.id, "kind": error.kind, "reason": str(error)})
                    continue
                writer.write(cut.id, **arrays)
                self._measure(sums, source, cut, segments, arrays)
            write_json(_summary(output), sums.as_dict())  # before the shard, which says that both are there

    def _measure(
        self, sums: _Sums, source: Source, cut: Cut, segments: PhoneSegments, arrays: dict[str, np.ndarray]
    ) -> None:
        lengths = segments.ends - segments.starts
        sums.aligned_seconds += float(lengths.sum())
        if isinstance(self._labels, Pdfs):
            return
        sums.speech_seconds += float(lengths[segments.spoken].sum())
        sums.spelt += self._labels.is_spelt(segments, cut)
        sums.unknown_words += self._labels.count_unknown(cut)
        sums.grid.add(grid_shifts(segments, arrays["phone"], arrays["first"]))
        if isinstance(source, CutSource):
            return
        try:
            shifts = boundary_shifts(segments, self._labels.rename(cut_segments(cut)))
        except AlignmentError:  # most cuts have no phones of their own
            return
        if shifts is not None:
            sums.cuts.add(shifts)


class _Originals:
    """Alignments of copies in other conditions, from those of the originals, which come before them in the shard."""

    def __init__(self, find: Segments) -> None:
        self._find = find
        self._found: dict[str, PhoneSegments | AlignmentError] = {}

    def __call__(self, cut: Cut) -> PhoneSegments:
        name = original_of(cut)
        if name is None:
            try:
                self._found[cut.id] = self._find(cut)
            except AlignmentError as error:
                self._found[cut.id] = error
        original = self._found.get(name or cut.id)
        if original is None:
            raise AlignmentError(f"a copy without its original in the shard: {name!r}")
        if isinstance(original, AlignmentError):
            raise AlignmentError(str(original))
        return original if name is None else original.at_speed(cut.custom[COPY_OF].get("speed", 1.0))


def _report(experiment: Experiment, sources: dict[str, dict[str, object]]) -> list[Path]:
    """Write skipped.jsonl and report.json, then raise or warn about what was dropped."""
    settings = experiment.config.align
    parts = {part: _Sums() for part in LABELLED_PARTS}
    for part, sums in parts.items():
        for number in range(len(prepared_shards(experiment, part))):
            sums.add(_Sums.read(_summary(_output(experiment, part, number))))
    skipped, report = experiment.path("align", "skipped.jsonl"), experiment.path("align", "report.json")
    rows = [
        {"part": part, "id": row["id"], "reason": row["reason"]}
        for part, sums in parts.items()
        for row in sums.skipped
    ]
    write_text(skipped, "".join(json.dumps(row) + "\n" for row in rows))
    summaries = {part: {**sources[part], **_summarise(sums)} for part, sums in parts.items()}
    write_json(report, {"source": settings.source, "parts": summaries})
    dropped = [part for part, sums in parts.items() if sums.skipped]
    refused = [
        part
        for part in dropped
        if len(parts[part].skipped) > settings.max_dropped_share * parts[part].utterances
    ]
    what = "\n".join(_describe(part, parts[part]) for part in refused or dropped)
    if refused:
        for part in refused:
            shutil.rmtree(experiment.path("align", part))  # the next run reads anew what was put right
        raise ValueError(
            f"{what}\nMore than align.max_dropped_share = {settings.max_dropped_share:g} allows; {skipped} lists "
            "them all"
        )
    if dropped:
        warnings.warn(f"{what}\nThey are left out; {skipped} lists them all", stacklevel=3)
    return [skipped, report]


def _summarise(sums: _Sums) -> dict[str, Any]:
    dropped = Counter(row["kind"] for row in sums.skipped)
    known = sums.grid.utterances  # whose phones are: not of pdfs
    speech = known and sums.speech_seconds / max(sums.aligned_seconds, 1e-9)
    return {
        "utterances": sums.utterances,
        "aligned": sums.utterances - len(sums.skipped),
        "dropped": dict(sorted(dropped.items())),
        "seconds": round(sums.seconds, 2),
        "coverage": round(sums.aligned_seconds / max(sums.seconds, 1e-9), 4),
        "speech_share": round(speech, 4),
        "spelt_as_in_lexicon": round(sums.spelt / known, 4) if known else None,
        "unknown_words": sums.unknown_words if known else None,
        "frames_after_alignment": sums.grid.summary(),
        "alignment_after_cuts": sums.cuts.summary(),
    }


def _describe(part: str, sums: _Sums) -> str:
    lines = [f"align: {len(sums.skipped)} of {sums.utterances} utterances of {part} have no alignment:"]
    for kind, count in Counter(row["kind"] for row in sums.skipped).most_common(_EXAMPLES):
        examples = [row for row in sums.skipped if row["kind"] == kind][:_EXAMPLES]
        lines.append(f"  {count} x {examples[0]['reason']} ({', '.join(row['id'] for row in examples)})")
    return "\n".join(lines)
