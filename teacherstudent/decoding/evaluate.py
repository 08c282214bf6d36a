"""The `evaluate` step: decode the test speakers, once a system, and compare.

The acoustic scale and the word penalty of each system are chosen on the development speakers; the test speakers
choose nothing. Writes, in evaluate/:

    results.json          all figures; the same for the same experiment
    NAME.txt              a system's words, `utterance word word …` a line
    sclite/               the same for sclite, with word times: see sclite.py
    lattices/ nbest/      if decode.lattices: NAME.gz with words.txt (see lattice.py), NAME.jsonl
    speed.json            measured at every run, and so no part of what is compared between runs
"""

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacherstudent.config import Optimisation
from teacherstudent.data.dataset import prepared_shards, read_lexicon, read_prepared
from teacherstudent.data.feature_reader import open_features
from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.lexicon import Lexicon
from teacherstudent.data.manifests import DEV, TEST
from teacherstudent.data.packed import PackedShard, open_shards
from teacherstudent.decoding import sclite, speed
from teacherstudent.decoding.decode import Decoder, Hypothesis, Recogniser, Transcript, Weights
from teacherstudent.decoding.error_tables import (
    ALL,
    Utterance,
    compare_systems,
    score_system,
    warn_missing_fields,
)
from teacherstudent.decoding.graph import Graph
from teacherstudent.decoding.graph_sources import build_graph
from teacherstudent.decoding.language_model import UNKNOWN
from teacherstudent.decoding.lattice import write_lattices
from teacherstudent.decoding.scoring import count_errors
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file, write_json, write_text
from teacherstudent.progress import HoursBar, hours_bar
from teacherstudent.training import checkpoint
from teacherstudent.training.inference import infer
from teacherstudent.training.models import model_from_state
from teacherstudent.tying.senones import Inventory

TEACHER = "teacher"


@dataclass(frozen=True)
class System:
    """A model that is decoded: one row of the table."""

    name: str
    kind: str
    label: str
    model: Path
    optimisation: Optimisation


def find_systems(experiment: Experiment) -> list[System]:
    """The teacher, every student at its best on the development speakers, and the human-only students twice:
    early-stopped there, and after as many updates as the others. Averaged models besides, where they are made. With
    decode.only, those of one network.
    """
    only = experiment.config.decode.only
    teacher = experiment.config.teacher.optimisation
    systems = [System(TEACHER, "teacher", "teacher", experiment.path("teacher", "best.pt"), teacher)]
    if only not in ("", TEACHER):
        systems = []
    for name, student in experiment.config.student_variants().items():
        if only not in ("", name):
            continue
        best, final, averaged = (
            experiment.path("students", name, file) for file in ("best.pt", "final.pt", "averaged.pt")
        )
        rows = [(name, name, best)]
        if student.schedule.mode == "human-only":
            rows = [
                (f"{name}-final", f"{name}, as many updates", final),
                (f"{name}-early", f"{name}, early-stopped", best),
            ]
        if student.schedule.average_models:
            rows.append((f"{name}-averaged", f"{name}, averaged", averaged))
        systems += [System(row, "student", label, model, student.optimisation) for row, label, model in rows]
    names = [system.name for system in systems]
    for name in names:
        if name == "ref":
            raise ValueError(
                "a system called 'ref' would overwrite sclite/ref.trn: rename that variant of the student"
            )
        if names.count(name) > 1:
            raise ValueError(f"two systems would be called {name!r}: rename that variant of the student")
    return systems


def evaluate(experiment: Experiment) -> list[Path]:
    """Decode and score every system. Returns what it wrote, but for the speeds."""
    config = experiment.config
    for folder in ("sclite", *(("lattices", "nbest") if config.decode.lattices else ())):
        experiment.path("evaluate", folder).mkdir(parents=True, exist_ok=True)
    inventory = Inventory.load(experiment.path("senones", "inventory.json"))
    graph = build_graph(experiment, inventory)
    here = Decoder(graph, config.decode.beam, config.decode.max_active)
    systems = find_systems(experiment)
    dev, test = (_read_utterances(experiment, part) for part in (DEV, TEST))
    lexicon = read_lexicon(experiment)
    _check(dev, test, graph, lexicon)
    warn_missing_fields(test, config.decode)
    outputs = [experiment.path("evaluate", "results.json")]
    outputs += sclite.write_references(experiment.path("evaluate", "sclite"), test)
    if config.decode.lattices:
        outputs.append(experiment.path("evaluate", "lattices", "words.txt"))
        write_text(outputs[-1], "".join(f"{w} {n}\n" for n, w in enumerate(("<eps>", *graph.words))))
    rows, words = {}, {}
    speeds: dict[str, dict[str, float]] = {}
    models = [hash_file(system.model) for system in systems]
    hours = hours_bar(len(set(models)) * sum(each.seconds for each in (*dev, *test)), "decode")
    recogniser = Recogniser(graph, inventory, lexicon, config.decode)
    decoded: _Decoded | None = None
    with recogniser, hours as bar:
        for system, model in zip(systems, models, strict=True):
            if decoded is None or decoded.model != model:
                decoder = _SystemDecoder(experiment, system, recogniser, bar)
                choice = _choose_weights(decoder, dev)
                decoded = _Decoded(system.name, model, *decoder.transcribe(choice.weights, test))
                if config.decode.speed_seconds:
                    decoded.speed = speed.measure_system(
                        experiment, decoder.model, here, inventory.log_priors, choice.weights
                    )
            outputs += decoded.outputs_as(system.name)
            words[system.name] = [decoded.transcripts[utterance.id].best.words for utterance in test]
            scored = score_system(test, words[system.name], config.decode, config.seed)
            odd = _count_odd(system, decoded.transcripts)
            rows[system.name] = _describe(system, decoder, choice) | odd | scored
            speeds |= {system.name: decoded.speed} if decoded.speed else {}
    compared = _compare(experiment, rows, test, words)
    write_json(outputs[0], {"systems": rows} | compared | _count_missing(experiment, dev, test))
    if speeds:
        speed.write_speeds(experiment.path("evaluate", "speed.json"), speeds, TEACHER)
    return outputs


# -- what was said -------------------------------------------------------------------------------------------


def _read_utterances(experiment: Experiment, part: str) -> list[Utterance]:
    fields = experiment.config.decode.score_by
    return [
        Utterance.of(cut, fields)
        for path in prepared_shards(experiment, part)
        for cut in read_prepared(experiment, part, path)
    ]


def _check(dev: Sequence[Utterance], test: Sequence[Utterance], graph: Graph, lexicon: Lexicon) -> None:
    """Words that the graph cannot give are errors whatever the model says: a warning. No words: an error."""
    for part, utterances in ((DEV, dev), (TEST, test)):
        if not any(utterance.words for utterance in utterances):
            raise ValueError(f"part {part!r} has no transcripts: word error rates need them")
    counts = Counter(word for utterance in (*dev, *test) for word in utterance.words)
    known = set(graph.words)
    unknown = Counter({word: count for word, count in counts.items() if word not in known})
    for what, chosen in (
        ("are not in the lexicon", [word for word in unknown if word not in lexicon.pronunciations]),
        ("stand for unknown words", [word for word in unknown if word in UNKNOWN]),
        ("are in the lexicon, but not in the language model", list(unknown)),
    ):
        told = Counter({word: unknown.pop(word) for word in chosen if word in unknown})
        if told:
            most = ", ".join(word for word, _ in told.most_common(10)) + (" …" if len(told) > 10 else "")
            warnings.warn(
                f"{told.total()} of {counts.total()} words of the development and test transcripts {what}, so each is "
                f"a word error: {most}",
                stacklevel=2,
            )


def _count_missing(
    experiment: Experiment, dev: Sequence[Utterance], test: Sequence[Utterance]
) -> dict[str, dict[str, int]]:
    """left_out: utterances that `prepare` could not use, so that no word error rate counts them; without_labels:
    those that count there, but that no frame error counts, since they have no alignment.
    """
    left_out = {DEV: 0, TEST: 0}
    path = experiment.path("features", "skipped.jsonl")
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        part = json.loads(line)["part"]
        if part in left_out:
            left_out[part] += 1
    without = {
        part: len(utterances) - sum(len(shard.ids) for shard in _open_labels(experiment, part))
        for part, utterances in ((DEV, dev), (TEST, test))
    }
    return {"left_out": left_out, "without_labels": without}


def _open_labels(experiment: Experiment, part: str) -> list[PackedShard]:
    """The senones of a part, of which there may be none at all."""
    folder = experiment.path("senones", part)
    return open_shards(folder, "labels") if any(folder.glob("labels.*.h5")) else []


# -- one system ----------------------------------------------------------------------------------------------


@dataclass
class _FrameErrors:
    """Over the frames that have labels."""

    frames: int = 0
    errors: int = 0
    nats: float = 0.0  # minus the log posteriors of the labels

    def add(self, log_posteriors: np.ndarray, senone: np.ndarray) -> None:
        self.frames += len(senone)
        self.errors += int((log_posteriors.argmax(axis=1) != senone).sum())
        self.nats -= float(np.take_along_axis(log_posteriors, senone[:, None], axis=1).sum(dtype=np.float64))


class _SystemDecoder:
    """One system's model, and the parts of the data decoded with it."""

    def __init__(self, experiment: Experiment, system: System, recogniser: Recogniser, bar: HoursBar) -> None:
        self.experiment, self.recogniser, self.bar = experiment, recogniser, bar
        self.settings = experiment.config.decode
        self.name = system.name
        self.model = model_from_state(checkpoint.load(system.model))
        self.frames: dict[str, _FrameErrors] = {}

    def sweep(self, weights: Sequence[Weights]) -> dict[Weights, dict[str, Hypothesis]]:
        """The development speakers' best paths for each of the weights."""
        return self.recogniser.best_paths(self._posteriors(DEV), weights)

    def transcribe(
        self, weights: Weights, test: Sequence[Utterance]
    ) -> tuple[dict[str, Transcript], list[Path]]:
        """The test speakers, and the files that say what was recognised."""
        found = self.recogniser.transcripts(self._posteriors(TEST), weights)
        transcripts: dict[str, Transcript] = {}
        folder = self.experiment.path("evaluate")
        outputs = [folder / f"{self.name}.txt"]
        if self.settings.lattices:
            outputs += self._write_lattices(folder, found, transcripts)
        else:
            transcripts.update(found)
        lines = [" ".join([each.id, *transcripts[each.id].best.words]) for each in test]
        write_text(outputs[0], "".join(f"{line}\n" for line in lines))
        timed = {name: transcript.words for name, transcript in transcripts.items()}
        return transcripts, outputs + sclite.write_hypotheses(folder / "sclite", self.name, test, timed)

    def _write_lattices(
        self, folder: Path, found: Iterator[tuple[str, Transcript]], transcripts: dict[str, Transcript]
    ) -> list[Path]:
        """As they come, since together they may be large."""
        lines: list[str] = []

        def texts() -> Iterator[str]:
            for name, transcript in found:
                rows = [{"words": " ".join(each.words), "score": each.score} for each in transcript.nbest]
                lines.append(json.dumps({"id": name, "hypotheses": rows}) + "\n")
                transcripts[name] = replace(transcript, nbest=transcript.nbest[:1], lattice="")
                yield transcript.lattice

        lattices, nbest = folder / "lattices" / f"{self.name}.gz", folder / "nbest" / f"{self.name}.jsonl"
        write_lattices(lattices, texts())
        write_text(nbest, "".join(lines))
        return [lattices, nbest]

    def _posteriors(self, part: str) -> Iterator[tuple[str, np.ndarray]]:
        """(utterance, log posteriors (T, S)) of a part; counts frame errors where there are labels."""
        counts = self.frames[part] = _FrameErrors()
        features = open_features(self.experiment, part, self.model.network.normalisation)
        labels = _open_labels(self.experiment, part)
        for number, values in enumerate(features):
            labelled = set(labels[number].ids) if labels else set()
            for name, logits in infer(self.model, values, self.experiment.config.label.batch_frames):
                posteriors = torch.log_softmax(logits, dim=1).numpy()
                if name in labelled:
                    counts.add(posteriors, labels[number][name]["senone"])
                yield name, posteriors
                self.bar.update(len(posteriors) * FRAME_SHIFT_SECONDS)


@dataclass
class _Decoded:
    """What a model recognised. Rows that follow one another may be of the same one: it is decoded once, say when an
    early-stopped student was at its best at its last step.
    """

    name: str  # the first of them
    model: str  # its hash
    transcripts: dict[str, Transcript]
    outputs: list[Path]
    speed: dict[str, float] = field(default_factory=dict)

    def outputs_as(self, name: str) -> list[Path]:
        if name == self.name:
            return self.outputs
        copies = [path.with_name(name + path.name.removeprefix(self.name)) for path in self.outputs]
        for path, copy in zip(self.outputs, copies, strict=True):
            shutil.copyfile(path, copy)
        return copies


@dataclass(frozen=True)
class _Choice:
    """weights, and the word error rate with each that were tried, in per cent, on the development speakers."""

    weights: Weights
    sweep: Mapping[Weights, float]


def _choose_weights(decoder: _SystemDecoder, dev: Sequence[Utterance]) -> _Choice:
    """Those with the fewest word errors on the development speakers; of equals the lowest acoustic scale, then the
    smallest penalty.
    """
    settings = decoder.settings
    tried = [Weights(*pair) for pair in product(settings.acoustic_scales, settings.word_penalties)]
    references = [utterance.words for utterance in dev]
    errors = {
        weights: int(
            count_errors(references, [decoded[utterance.id].words for utterance in dev])[:, 1:].sum()
        )
        for weights, decoded in decoder.sweep(tried).items()
    }
    best = min(errors, key=lambda each: (errors[each], each.acoustic_scale, abs(each.word_penalty), each))
    total = sum(map(len, references))
    return _Choice(best, {weights: 100 * count / total for weights, count in errors.items()})


def _describe(system: System, decoder: _SystemDecoder, choice: _Choice) -> dict[str, Any]:
    labelled = {part: counts for part, counts in decoder.frames.items() if counts.frames}
    return {
        "kind": system.kind,
        "label": system.label,
        "method": system.optimisation.method,
        "learning_rate": system.optimisation.learning_rate,
        "parameters": sum(parameter.numel() for parameter in decoder.model.parameters()),
        **choice.weights._asdict(),
        "dev_word_error_rate": choice.sweep[choice.weights],
        "dev_sweep": [
            {**weights._asdict(), "word_error_rate": rate} for weights, rate in choice.sweep.items()
        ],
        "frame_error": {part: 100 * each.errors / each.frames for part, each in labelled.items()},
        "frame_cross_entropy": {part: each.nats / each.frames for part, each in labelled.items()},
    }


def _count_odd(system: System, transcripts: Mapping[str, Transcript]) -> dict[str, int]:
    """partial: hypotheses that end no sentence; lattice_disagrees: lattices whose best words are others."""
    partial = sum(transcript.best.partial for transcript in transcripts.values())
    with_lattice = [transcript for transcript in transcripts.values() if transcript.nbest]
    disagree = sum(each.nbest[0].words != each.best.words for each in with_lattice)
    if disagree:
        warnings.warn(
            f"{system.name}: the lattices of {disagree} of {len(with_lattice)} utterances have another best path than "
            "the one that is scored, since both searches are pruned: widen decode.beam, or raise decode.max_active",
            stacklevel=2,
        )
    return {"partial": partial, "lattice_disagrees": disagree}


def _compare(
    experiment: Experiment,
    rows: Mapping[str, Mapping[str, Any]],
    test: Sequence[Utterance],
    words: Mapping[str, Sequence[Sequence[str]]],
) -> dict[str, Any]:
    """The teacher and each student with machine labels, if decoded, against the better of the human-only students."""
    human_only = [
        row
        for name, student in experiment.config.student_variants().items()
        for row in (f"{name}-final", f"{name}-early", f"{name}-averaged")
        if row in rows and student.schedule.mode == "human-only"
    ]
    helped = [name for name in rows if name not in human_only]
    errors = {name: row["conditions"][ALL]["errors"] for name, row in rows.items()}
    config = experiment.config
    return compare_systems(helped, human_only, test, words, errors, config.decode, config.seed)
