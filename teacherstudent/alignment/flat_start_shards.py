"""What a process does with one shard of a flat start: sums for the models to come, or the final segments."""
# T frames of 10 ms, D features, P pdfs, G components, E events, M = 1 + 2 D moments

import json
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut
from lhotse.utils import compute_num_frames

from teacherstudent.alignment import mfcc
from teacherstudent.alignment.alignments import AlignmentError
from teacherstudent.alignment.gaussians import Floats, Integers, Mixtures, sum_by_pdf
from teacherstudent.alignment.tied_states import TiedStates, frame_events, list_states, sum_events
from teacherstudent.alignment.training_graphs import StatePath, TrainingGraphs
from teacherstudent.config import Align
from teacherstudent.data.feature_reader import FeatureShard
from teacherstudent.data.features import STACKED_FRAMES
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.data.manifests import original_of, read_cuts, transcript_of
from teacherstudent.files import write_text

_BATCH_FRAMES = 50_000  # whose posteriors are computed together
NUM_EXAMPLES = 3  # of utterances without a path, in a message
_NUM_MOMENTS = 1 + 2 * mfcc.NUM_FEATURES

Found = tuple[
    str, Floats, StatePath | AlignmentError
]  # utterance, its features (T, D), its path or why there is none


@dataclass(frozen=True)
class Shard:
    cuts: Path
    features: FeatureShard


@dataclass(frozen=True)
class Models:
    """Their files. Without mixtures, as a flat start begins, an utterance's states share its frames equally."""

    tied: Path
    mixtures: Path | None = None


@dataclass
class Sums:
    """What the utterances of a shard, or of several, come to."""

    moments: Floats  # (P, M) of the pdfs, or (G, M) of the components
    log_likelihood: float = 0.0
    num_frames: int = 0
    num_utterances: int = 0
    failures: Counter[str] = field(default_factory=Counter)  # utterances without a path, by kind
    examples: dict[str, list[tuple[str, str]]] = field(
        default_factory=dict
    )  # (id, reason), a few of each kind

    def add(self, other: "Sums") -> None:
        self.moments += other.moments
        self.log_likelihood += other.log_likelihood
        self.num_frames += other.num_frames
        self.num_utterances += other.num_utterances
        self.failures += other.failures
        for examples in other.examples.values():
            for example in examples:
                self._exemplify(*example)

    def fail(self, utterance_id: str, error: AlignmentError) -> None:
        self.failures[error.kind] += 1
        self._exemplify(utterance_id, str(error))

    def _exemplify(self, utterance_id: str, reason: str) -> None:
        examples = self.examples.setdefault(AlignmentError(reason).kind, [])
        if len(examples) < NUM_EXAMPLES:
            examples.append((utterance_id, reason))


class ShardWorker:
    """Made once a process; its methods take one shard each."""

    def __init__(self, settings: Align, lexicon: Lexicon, seed: int) -> None:
        self._settings, self._lexicon, self._seed = settings, lexicon, seed
        self._phones = (SILENCE, *lexicon.phones)

    def accumulate(self, models: Models, shard: Shard) -> Sums:
        """Moments of the pdfs along equal paths; with mixtures, expected ones of components along the best paths."""
        tied, graphs = self._open(models, shard)
        mixtures = None if models.mixtures is None else Mixtures.load(models.mixtures)
        sums = Sums(np.zeros((mixtures.num_components if mixtures else tied.num_pdfs, _NUM_MOMENTS)))
        for features, pdfs in _batches(_count(sums, self._align(graphs, mixtures, shard))):
            if mixtures is None:
                sums.moments += sum_by_pdf(features, pdfs, tied.num_pdfs)
            else:
                moments, log_likelihood = mixtures.accumulate(features, pdfs)
                sums.moments += moments
                sums.log_likelihood += log_likelihood
        return sums

    def observe(self, models: Models, shard: Shard) -> tuple[Integers, Floats]:
        """Events (E, 4) of base phones along the best paths of monophone models, and their moments (E, M)."""
        assert models.mixtures is not None
        tied, graphs = self._open(models, shard)
        state_of = list_states(len(tied.roots), self._settings.states)[:, 1]  # every pdf is one
        seen = [(np.zeros((0, 4), np.int64), np.zeros((0, _NUM_MOMENTS)))]
        for _, features, path in self._align(graphs, Mixtures.load(models.mixtures), shard):
            if isinstance(path, StatePath):
                bases = graphs.bases[path.phones - 1]
                events = frame_events(bases, path.starts, state_of[path.pdfs])
                moments = np.concatenate([np.ones((len(features), 1)), features, features**2], axis=1)
                seen.append(sum_events(events, moments))
        events, moments = (np.concatenate(arrays) for arrays in zip(*seen))
        return sum_events(events, moments)

    def write_segments(self, models: Models, shard: Shard, output: Path) -> None:
        """The phones of every utterance, or why it has none, a line of JSON each."""
        assert models.mixtures is not None
        _, graphs = self._open(models, shard)
        lines = []
        for name, features, path in self._align(graphs, Mixtures.load(models.mixtures), shard):
            entry: dict[str, Any] = {"id": name}
            if isinstance(path, StatePath):
                edges = [*path.starts.tolist(), len(features)]
                times = [round(edge * mfcc.FRAME_SHIFT_SECONDS, 2) for edge in edges]
                entry |= {"starts": times[:-1], "ends": times[1:]}
                entry["phones"] = [self._phones[phone - 1] for phone in path.phones]
            else:
                entry["reason"] = str(path)
            lines.append(json.dumps(entry) + "\n")
        write_text(output, "".join(lines))

    def _open(self, models: Models, shard: Shard) -> tuple[TiedStates, TrainingGraphs]:
        tied = TiedStates.load(models.tied)
        words = {word for cut in _originals(shard) for word in transcript_of(cut).split()}
        words.add(self._settings.unknown_word)
        known = self._lexicon.pronunciations
        said = Lexicon(
            {word: known[word] for word in words if word in known}
        )  # large lexicons take their time
        return tied, TrainingGraphs(
            self._phones, self._settings.states, tied, said, self._settings.unknown_word
        )

    def _align(self, graphs: TrainingGraphs, mixtures: Mixtures | None, shard: Shard) -> Iterator[Found]:
        scorer = None if mixtures is None else graphs.load_mixtures(mixtures)
        for cut in _originals(shard):
            features = _extract(cut, shard.features)
            try:
                graph = graphs.compile(transcript_of(cut), len(features))
                if scorer is None:
                    seed = zlib.crc32(f"{self._seed} {cut.id}".encode()) >> 1  # the wheel takes 31 bits
                    yield cut.id, features, graphs.equal_path(graph, len(features), seed)
                else:
                    yield cut.id, features, graphs.best_path(graph, features, scorer, self._settings.beam)
            except AlignmentError as error:
                yield cut.id, features, error


def _originals(shard: Shard) -> Iterator[Cut]:
    """Copies in other conditions are left out: their alignment is that of the original."""
    return (cut for cut in read_cuts(shard.cuts) if original_of(cut) is None)


def _extract(cut: Cut, features: FeatureShard) -> Floats:
    """(T, D), without the frames that were repeated to fill the last stack."""
    stacked = features[cut.id]["values"]
    length = len(stacked) * STACKED_FRAMES
    exact = compute_num_frames(cut.duration, mfcc.FRAME_SHIFT_SECONDS, cut.sampling_rate)
    kept = exact if 0 <= length - exact < STACKED_FRAMES else length
    return mfcc.extract(mfcc.unstack(stacked, kept))


def _count(sums: Sums, found: Iterator[Found]) -> Iterator[tuple[Floats, StatePath]]:
    for name, features, path in found:
        sums.num_utterances += 1
        if isinstance(path, StatePath):
            sums.num_frames += len(features)
            yield features, path
        else:
            sums.fail(name, path)


def _batches(found: Iterator[tuple[Floats, StatePath]]) -> Iterator[tuple[Floats, Integers]]:
    """Features (N, D) and pdfs (N,) of many utterances at a time."""
    features: list[Floats] = []
    pdfs: list[Integers] = []
    size = 0
    for values, path in found:
        features.append(values)
        pdfs.append(path.pdfs)
        size += len(values)
        if size >= _BATCH_FRAMES:
            yield np.concatenate(features), np.concatenate(pdfs)
            features, pdfs, size = [], [], 0
    if features:
        yield np.concatenate(features), np.concatenate(pdfs)
