"""A flat start: from transcripts alone to the phones in time, through Gaussian models of monophones and triphones.

It begins with every utterance's states sharing its frames equally. Each iteration finds the best path of every
utterance, sums up along the paths, and fits the Gaussians to the sums ("Viterbi training", as Kaldi's train_mono.sh
and train_deltas.sh do); their number grows on the way. Then human, dev and test are aligned with the last models.

    align/flat-start/models/monophone.json, triphone.json     which states share a mixture
    align/flat-start/models/monophone.25.npz, …               the mixtures after so many iterations, the last ones only
    align/flat-start/PART/segments.000000.jsonl               {"id", "starts", "ends", "phones"} or {"id", "reason"}

Sums are added in the order of the shards, so nothing depends on the number of processes. After an interruption the
training goes on from the last iteration, and gives the same.
"""
# P pdfs, E events, M moments

import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacherstudent.alignment.flat_start_shards import Models, Shard, ShardWorker, Sums
from teacherstudent.alignment.gaussians import VARIANCE_FLOOR, Floats, Integers, Mixtures
from teacherstudent.alignment.mfcc import NUM_FEATURES
from teacherstudent.alignment.tied_states import TiedStates, find_bases, sum_events, tie
from teacherstudent.config import Align
from teacherstudent.data.dataset import prepared_shards, read_lexicon
from teacherstudent.data.feature_reader import open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.data.manifests import HUMAN, LABELLED_PARTS
from teacherstudent.experiment import Experiment
from teacherstudent.processes import ProcessMap
from teacherstudent.progress import HoursBar, hours_bar

_GROWING_SHARE = 0.8  # of the iterations: then the number of components stays


@dataclass(frozen=True)
class Stage:
    """One kind of models."""

    name: str
    iterations: int
    components: int  # of all pdfs together, at the end
    folder: Path

    @property
    def tied(self) -> Path:
        return self.folder / f"{self.name}.json"

    def mixtures(self, iteration: int) -> Path:
        return self.folder / f"{self.name}.{iteration}.npz"

    @property
    def last(self) -> int:
        """The iteration that was reached, -1 for none."""
        reached = [int(path.name.split(".")[1]) for path in self.folder.glob(f"{self.name}.*.npz")]
        return max(reached, default=-1)

    def save(self, mixtures: Mixtures, iteration: int) -> None:
        mixtures.save(self.mixtures(iteration))
        for earlier in range(iteration):
            self.mixtures(earlier).unlink(missing_ok=True)


def train_and_align(experiment: Experiment) -> Path:
    """Write align/flat-start; what is there is kept. Returns the folder.

    Raises ValueError when more than align.max_dropped_share of the human-labelled utterances have no path, and for an
    align.unknown_word that the lexicon lacks.
    """
    settings = experiment.config.align
    folder = experiment.path("align", "flat-start")
    models = folder / "models"
    models.mkdir(parents=True, exist_ok=True)
    lexicon = read_lexicon(experiment)
    check_unknown_word(settings, lexicon)
    monophone = Stage("monophone", settings.monophone_iterations, settings.monophone_gaussians, models)
    triphone = Stage("triphone", settings.triphone_iterations, settings.triphone_gaussians, models)
    shards = {part: _open_shards(experiment, part) for part in LABELLED_PARTS}
    with ProcessMap(settings.jobs, _make_worker, settings, lexicon, experiment.config.seed) as processes:
        trainer = _Trainer(experiment, lexicon, shards[HUMAN], processes)
        trainer.train_monophones(monophone)
        if settings.triphone_leaves:
            trainer.train_triphones(triphone, monophone)
        final = triphone if settings.triphone_leaves else monophone
        for part in LABELLED_PARTS:
            _write_segments(processes, final, shards[part], folder / part)
    return folder


def check_unknown_word(settings: Align, lexicon: Lexicon) -> None:
    """Raises ValueError for an align.unknown_word that the lexicon lacks."""
    if settings.unknown_word and settings.unknown_word not in lexicon.pronunciations:
        raise ValueError(
            f"align.unknown_word = {settings.unknown_word!r} is not in the lexicon: name a word that is, or leave it "
            "empty and utterances with unknown words are left out"
        )


class _Trainer:
    """Fits models to the human-labelled part."""

    def __init__(
        self, experiment: Experiment, lexicon: Lexicon, shards: Sequence[Shard], processes: ProcessMap
    ) -> None:
        self._settings, self._seed = experiment.config.align, experiment.config.seed
        self._phones = (SILENCE, *lexicon.phones)
        self._shards = _thin_out(shards, self._settings.training_hours)
        self._seconds = [_seconds(shard) for shard in self._shards]
        self._processes = processes

    def train_monophones(self, stage: Stage) -> None:
        TiedStates.monophone(self._num_bases, self._settings.states).save(stage.tied)
        with self._bar(stage, passes=1 + stage.iterations) as bar:
            if stage.last < 0:
                sums = self._accumulate(Models(stage.tied), bar)
                self._check(sums)
                stage.save(Mixtures.from_moments(sums.moments), 0)
            self._iterate(stage, bar)

    def train_triphones(self, stage: Stage, monophone: Stage) -> None:
        with self._bar(stage, passes=1 + stage.iterations) as bar:
            if stage.last < 0:
                events, moments = self._observe(monophone, bar)
                floor = np.full(NUM_FEATURES, VARIANCE_FLOOR)
                shape = (self._num_bases, self._settings.states)
                tied, sums = tie(events, moments, *shape, self._settings.triphone_leaves, floor)
                self._warn_of_fewer("triphone_leaves", tied.num_pdfs)
                tied.save(stage.tied)
                stage.save(Mixtures.from_moments(sums), 0)
            self._iterate(stage, bar)

    def _warn_of_fewer(self, setting: str, num_pdfs: int) -> None:
        asked = getattr(self._settings, setting)
        if asked < num_pdfs:
            warnings.warn(
                f"align.{setting} = {asked} is less than the {num_pdfs} states of the models: each still has one",
                stacklevel=4,
            )

    @property
    def _num_bases(self) -> int:
        return int(find_bases(self._phones).max())

    def _bar(self, stage: Stage, passes: int) -> HoursBar:
        return hours_bar(
            sum(self._seconds) * (passes if stage.last < 0 else passes - 1 - stage.last), stage.name
        )

    def _iterate(self, stage: Stage, bar: HoursBar) -> None:
        self._warn_of_fewer(f"{stage.name}_gaussians", TiedStates.load(stage.tied).num_pdfs)
        for iteration in range(stage.last, stage.iterations):
            mixtures = Mixtures.load(stage.mixtures(iteration))
            sums = self._accumulate(Models(stage.tied, stage.mixtures(iteration)), bar)
            mixtures = mixtures.updated(sums.moments)
            share = min(1.0, (iteration + 1) / (_GROWING_SHARE * stage.iterations))
            target = mixtures.num_pdfs + int(share * (stage.components - mixtures.num_pdfs))
            if target > mixtures.num_components:
                rng = np.random.default_rng([self._seed, zlib.crc32(stage.name.encode()), iteration])
                mixtures = mixtures.split(target, sums.moments, rng)
            stage.save(mixtures, iteration + 1)

    def _accumulate(self, models: Models, bar: HoursBar) -> Sums:
        tasks = [(ShardWorker.accumulate, models, shard) for shard in self._shards]
        total: Sums | None = None
        for sums, seconds in zip(self._processes.map(tasks), self._seconds):
            if total is None:
                total = sums
            else:
                total.add(sums)
            frames = max(total.num_frames, 1)
            bar.update(seconds, log_likelihood=f"{total.log_likelihood / frames:.2f}")
        assert total is not None
        return total

    def _observe(self, monophone: Stage, bar: HoursBar) -> tuple[Integers, Floats]:
        """Events (E, 4) of all shards, and their moments (E, M)."""
        models = Models(monophone.tied, monophone.mixtures(monophone.last))
        tasks = [(ShardWorker.observe, models, shard) for shard in self._shards]
        events, moments = np.zeros((0, 4), np.int64), np.zeros((0, 1 + 2 * NUM_FEATURES))
        for (more, their), seconds in zip(self._processes.map(tasks), self._seconds):
            events, moments = sum_events(np.concatenate([events, more]), np.concatenate([moments, their]))
            bar.update(seconds)
        return events, moments

    def _check(self, sums: Sums) -> None:
        """Before hours are spent on what cannot be right."""
        failed, allowed = sums.failures.total(), self._settings.max_dropped_share
        if failed > allowed * sums.num_utterances or failed == sums.num_utterances:
            told = "\n".join(
                f"  {count} x {sums.examples[kind][0][1]} ({', '.join(name for name, _ in sums.examples[kind])})"
                for kind, count in sums.failures.most_common()
            )
            raise ValueError(
                f"{failed} of {sums.num_utterances} human-labelled utterances cannot be aligned, more than "
                f"align.max_dropped_share = {allowed:g} allows:\n{told}\n"
                "Add the words to the lexicon, set align.unknown_word, or correct the transcripts"
            )


def _open_shards(experiment: Experiment, part: str) -> list[Shard]:
    return [Shard(*both) for both in zip(prepared_shards(experiment, part), open_features(experiment, part))]


def _seconds(shard: Shard) -> float:
    return float(shard.features.num_frames.sum()) * FRAME_SHIFT_SECONDS


def _thin_out(shards: Sequence[Shard], hours: float) -> list[Shard]:
    """As many shards, evenly spread, as have about so many hours together; at least one."""
    total = sum(map(_seconds, shards)) / 3600
    if total <= hours:
        return list(shards)
    count = max(1, int(len(shards) * hours / total))
    return [shards[index * len(shards) // count] for index in range(count)]


def _write_segments(processes: ProcessMap, final: Stage, shards: Sequence[Shard], folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    models = Models(final.tied, final.mixtures(final.last))
    outputs = [folder / f"segments.{number:06d}.jsonl" for number in range(len(shards))]
    missing = [(shard, output) for shard, output in zip(shards, outputs) if not output.exists()]
    tasks = [(ShardWorker.write_segments, models, shard, output) for shard, output in missing]
    seconds = [_seconds(shard) for shard, _ in missing]
    with hours_bar(sum(seconds), f"align {folder.name}") as bar:
        for _, done in zip(processes.map(tasks), seconds):
            bar.update(done)


def _make_worker(*arguments: Any) -> Callable[[tuple[Any, ...]], Any]:
    """A method of ShardWorker with what it takes -> what it returns."""
    worker = ShardWorker(*arguments)
    return lambda task: task[0](worker, *task[1:])
