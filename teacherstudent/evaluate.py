"""The `evaluate` step: decode the test speakers, once a system, and compare.

The acoustic scale of each system is chosen on the development speakers; the test speakers choose nothing.
"""

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from teacherstudent import checkpoint
from teacherstudent.config import Optimisation
from teacherstudent.dataset import prepared_shards, read_lexicon, read_prepared
from teacherstudent.decode import Hypothesis, decode_many
from teacherstudent.experiment import Experiment
from teacherstudent.features import FRAME_SHIFT_SECONDS
from teacherstudent.files import write_json, write_text
from teacherstudent.graph import Graph
from teacherstudent.label import infer
from teacherstudent.language_model import estimate_bigram
from teacherstudent.manifests import DEV, TEST
from teacherstudent.models import model_from_state
from teacherstudent.packed import open_shards
from teacherstudent.progress import HoursBar, hours_bar
from teacherstudent.scoring import Words, compare, count_errors, score
from teacherstudent.senones import Inventory


@dataclass(frozen=True)
class System:
    """A model that is decoded: one row of the table."""

    name: str
    kind: str
    label: str
    model: Path
    optimisation: Optimisation


@dataclass(frozen=True)
class Utterance:
    id: str
    words: tuple[str, ...]
    condition: str
    speaker: str

    @property
    def sentence(self) -> tuple[str, tuple[str, ...]]:
        """The same in all conditions: drawn together for an interval, since its errors go together."""
        return self.speaker, self.words


def find_systems(experiment: Experiment) -> list[System]:
    """The teacher, every student at its best on the development speakers, and the human-only students twice:
    early-stopped there, and after as many updates as the others.
    """
    teacher = experiment.config.teacher.optimisation
    systems = [System("teacher", "teacher", "teacher", experiment.path("teacher", "best.pt"), teacher)]
    for name, student in experiment.config.student_variants().items():
        best, final = (experiment.path("students", name, file) for file in ("best.pt", "final.pt"))
        rows = [(name, name, best)]
        if student.schedule.mode == "human-only":
            rows = [
                (f"{name}-final", f"{name}, as many updates", final),
                (f"{name}-early", f"{name}, early-stopped", best),
            ]
        systems += [System(row, "student", label, model, student.optimisation) for row, label, model in rows]
    names = [system.name for system in systems]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two systems would be called {name!r}: rename that variant of the student")
    return systems


def evaluate(experiment: Experiment) -> list[Path]:
    """Write evaluate/results.json, and every system's hypotheses of the test speakers."""
    experiment.path("evaluate").mkdir(exist_ok=True)
    inventory = Inventory.load(experiment.path("senones", "inventory.json"))
    graph = _build_graph(experiment, inventory)
    systems = find_systems(experiment)
    dev, test = (_read_utterances(experiment, part) for part in (DEV, TEST))
    _warn_unknown_words([*dev, *test], graph)
    scores, words = {}, {}
    seconds = len(systems) * (_seconds(experiment, DEV) + _seconds(experiment, TEST))
    with hours_bar(seconds, "decode") as bar:
        for system in systems:
            decoder = _SystemDecoder(experiment, system, graph, inventory.log_priors, bar)
            scale, dev_rate, dev_error = _choose_scale(decoder, dev)
            decoded, test_error = decoder.decode(TEST, [scale])
            words[system.name] = [decoded[scale][utterance.id].words for utterance in test]
            scores[system.name] = {
                "kind": system.kind,
                "label": system.label,
                "method": system.optimisation.method,
                "learning_rate": system.optimisation.learning_rate,
                "parameters": sum(parameter.numel() for parameter in decoder.model.parameters()),
                "acoustic_scale": scale,
                "dev_word_error_rate": dev_rate,
                "frame_error": {DEV: dev_error, TEST: test_error},
                "partial": sum(hypothesis.partial for hypothesis in decoded[scale].values()),
                "conditions": _score_conditions(experiment, test, words[system.name]),
            }
    results = {"systems": scores} | _compare(experiment, scores, test, words)
    outputs = [experiment.path("evaluate", "results.json")]
    write_json(outputs[0], results)
    for name, hypotheses in words.items():
        outputs.append(experiment.path("evaluate", f"{name}.txt"))
        lines = [f"{utterance.id} {' '.join(words)}\n" for utterance, words in zip(test, hypotheses)]
        write_text(outputs[-1], "".join(lines))
    return outputs


def _build_graph(experiment: Experiment, inventory: Inventory) -> Graph:
    """From the lexicon, and a bigram of lm_text.txt."""
    lexicon = read_lexicon(experiment)
    text = (experiment.data_folder / "lm_text.txt").read_text(encoding="utf-8")
    return Graph.build(lexicon, inventory, estimate_bigram(text.splitlines(), lexicon.pronunciations))


def _read_utterances(experiment: Experiment, part: str) -> list[Utterance]:
    utterances = []
    for path in prepared_shards(experiment, part):
        for cut in read_prepared(experiment, part, path):
            text = " ".join(supervision.text or "" for supervision in cut.supervisions)
            custom = cut.custom or {}
            speaker = str(custom.get("speaker") or cut.supervisions[0].speaker)
            condition = str(custom.get("condition", "all"))
            utterances.append(Utterance(cut.id, tuple(text.split()), condition, speaker))
    return utterances


def _warn_unknown_words(utterances: Sequence[Utterance], graph: Graph) -> None:
    """Words that the graph cannot give are errors whatever the model says."""
    counts = Counter(word for utterance in utterances for word in utterance.words)
    known = set(graph.words)
    unknown = {word: count for word, count in counts.items() if word not in known}
    if unknown:
        most = sorted(unknown, key=lambda word: -unknown[word])[:10]
        warnings.warn(
            f"{sum(unknown.values())} of {counts.total()} words of the development and test transcripts are not in "
            f"the lexicon, so each is a word error: {', '.join(most)}{' …' if len(unknown) > 10 else ''}",
            stacklevel=2,
        )


def _seconds(experiment: Experiment, part: str) -> float:
    shards = open_shards(experiment.path("features", part), "features")
    return sum(float(shard.num_frames.sum()) for shard in shards) * FRAME_SHIFT_SECONDS


class _SystemDecoder:
    """One system's model, and the parts of the data decoded with it."""

    def __init__(
        self, experiment: Experiment, system: System, graph: Graph, log_priors: np.ndarray, bar: HoursBar
    ) -> None:
        self.experiment, self.graph, self.log_priors, self.bar = experiment, graph, log_priors, bar
        self.model = model_from_state(checkpoint.load(system.model))
        self.frame_errors = self.frames = 0

    def decode(self, part: str, scales: Sequence[float]) -> tuple[dict[float, dict[str, Hypothesis]], float]:
        """Every utterance's hypothesis at every acoustic scale, and the senone frame error in per cent."""
        self.frame_errors = self.frames = 0
        settings = self.experiment.config.decode
        decoded = decode_many(self.graph, self._posteriors(part), self.log_priors, scales, settings)
        return decoded, 100 * self.frame_errors / self.frames

    def _posteriors(self, part: str) -> Iterator[tuple[str, np.ndarray]]:
        features = open_shards(self.experiment.path("features", part), "features")
        labels = open_shards(self.experiment.path("senones", part), "labels")
        for values, senones in zip(features, labels):
            for name, logits in infer(self.model, values, self.experiment.config.label.batch_frames):
                posteriors = torch.log_softmax(logits, dim=1).numpy()
                self.frame_errors += int((posteriors.argmax(axis=1) != senones[name]["senone"]).sum())
                self.frames += len(posteriors)
                yield name, posteriors
                self.bar.update(len(posteriors) * FRAME_SHIFT_SECONDS)


def _choose_scale(decoder: _SystemDecoder, dev: Sequence[Utterance]) -> tuple[float, float, float]:
    """The acoustic scale with the fewest word errors on the development speakers, of equals the lowest; the word
    error rate with it, and the senone frame error, both in per cent.
    """
    decoded, frame_error = decoder.decode(DEV, decoder.experiment.config.decode.acoustic_scales)
    references = [utterance.words for utterance in dev]
    errors = {
        scale: count_errors(references, [hypotheses[utterance.id].words for utterance in dev])[:, 1:].sum()
        for scale, hypotheses in decoded.items()
    }
    scale = min(errors, key=lambda scale: (errors[scale], scale))
    return scale, 100 * float(errors[scale]) / sum(map(len, references)), frame_error


def _score_conditions(
    experiment: Experiment, test: Sequence[Utterance], hypotheses: Sequence[Words]
) -> dict[str, dict[str, Any]]:
    """Word errors over all of the test speakers, and by condition, with intervals over sentences."""
    config = experiment.config
    found = list(dict.fromkeys(utterance.condition for utterance in test))
    rows = {}
    for condition in dict.fromkeys(["all", *sorted(found, key=_quietest_first)]):
        chosen = [index for index, utterance in enumerate(test) if condition in ("all", utterance.condition)]
        result = score(
            [test[index].words for index in chosen],
            [hypotheses[index] for index in chosen],
            blocks=[test[index].sentence for index in chosen],
            samples=config.decode.bootstrap_samples,
            seed=config.seed,
        )
        rows[condition] = {
            "utterances": len(chosen),
            "words": result.words,
            "errors": result.substitutions + result.insertions + result.deletions,
            "substitutions": result.substitutions,
            "insertions": result.insertions,
            "deletions": result.deletions,
            "word_error_rate": 100 * result.word_error_rate,
            "interval": [100 * result.low, 100 * result.high],
        }
    return rows


def _quietest_first(condition: str) -> tuple[float, str]:
    """ "clean", then "20dB", "10dB"; other fields of the cuts by name, after these."""
    decibels = re.fullmatch(r"(-?[\d.]+)dB", condition)
    if condition == "clean":
        return -math.inf, condition
    return (-float(decibels[1]), condition) if decibels else (math.inf, condition)


def _compare(
    experiment: Experiment,
    scores: Mapping[str, Mapping[str, Any]],
    test: Sequence[Utterance],
    words: Mapping[str, Sequence[Words]],
) -> dict[str, Any]:
    """Each system with machine labels against the better of the human-only students, paired by sentence."""
    variants = experiment.config.student_variants()
    helped = [name for name in variants if name in scores]
    human_only = [name for name in scores if name not in helped and name != "teacher"]
    if not human_only:
        return {"baseline": None, "comparisons": []}
    baseline = min(human_only, key=lambda name: scores[name]["conditions"]["all"]["errors"])
    references = [utterance.words for utterance in test]
    comparisons = []
    for name in ["teacher", *helped]:
        found = compare(
            references,
            words[baseline],
            words[name],
            blocks=[utterance.sentence for utterance in test],
            samples=experiment.config.decode.bootstrap_samples,
            seed=experiment.config.seed,
        )
        comparisons.append(
            {
                "system": name,
                "baseline": baseline,
                "relative_reduction": 100 * found.relative_reduction,
                "interval": [100 * found.low, 100 * found.high],
            }
        )
    return {"baseline": baseline, "comparisons": comparisons}


def summary(results_path: Path) -> str:
    """The table of word error rates, for a terminal."""
    results = json.loads(results_path.read_text(encoding="utf-8"))
    systems = results["systems"]
    conditions = list(next(iter(systems.values()))["conditions"])
    width = max(len(system["label"]) for system in systems.values())
    lines = [
        "word error rate, % [95 % interval over sentences]",
        f"{'':{width}}  learning rate" + _row(conditions),
    ]
    for system in systems.values():
        cells = [
            "{:.1f} [{:.1f}, {:.1f}]".format(cell["word_error_rate"], *cell["interval"])
            for cell in (system["conditions"][condition] for condition in conditions)
        ]
        rate = f"{system['learning_rate']:g} {system['method']}"
        lines.append(f"{system['label']:{width}}{rate:>15}" + _row(cells))
    for found in results["comparisons"]:
        label, baseline = (systems[found[key]]["label"] for key in ("system", "baseline"))
        lines.append(
            "{}: {:.1f} % [{:.1f}, {:.1f}] fewer word errors than {}".format(
                label, found["relative_reduction"], *found["interval"], baseline
            )
        )
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return "".join(f"  {cell:>20}" for cell in cells)
