"""The `prepare` step: from cuts to stacked log-mel features, shard by shard, in parallel processes.

    features/PART/…            see feature_shards.py
    features/PART/speakers.h5  mean and deviation of every speaker of the part
    features/normalisation.json  mean and deviation of the training parts, copies in other conditions included
    features/skipped.jsonl     {"part", "id", "reason"} of every utterance that was left out
    features/report.json       utterances, hours, and what was left out by reason, of every part

A shard that is there is not made again, so the step goes on where it was interrupted. When features are computed on
the fly the same is done and only the values are not written: audio that cannot be used is found before a training is.
"""

import json
import warnings
from collections import Counter
from dataclasses import asdict
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any

import numpy as np

from teacherstudent.data.conditions import Sounds
from teacherstudent.data.dataset import audio_folder, source_shards
from teacherstudent.data.feature_reader import read_index
from teacherstudent.data.feature_shards import (
    Survey,
    Task,
    hash_id,
    make_shard,
    read_moments,
    survey,
    write_speakers,
)
from teacherstudent.data.features import STACKED_FRAMES, Moments, Normalisation
from teacherstudent.data.manifests import DEV, HUMAN, LABELLED_PARTS, PARTS, TEST, UNLABELLED, read_entries
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json, write_text
from teacherstudent.processes import ProcessMap
from teacherstudent.progress import hours_bar

_EXAMPLES = 5  # reasons that are named in an error or a warning, each with an utterance


def prepare(experiment: Experiment) -> list[Path]:
    """Write the features folder.

    Raises ValueError for manifests that are broken, ids that are used twice, and parts of which more than
    features.max_left_out_share cannot be used.
    """
    settings = experiment.config.features
    tasks = _find_tasks(experiment, _find_sounds(experiment))
    for folder in {task.kept.parent for task in tasks}:
        folder.mkdir(parents=True, exist_ok=True)
    with ProcessMap(settings.jobs, methodcaller, "__call__") as processes:
        sources = [task.source for task in tasks]
        surveys = dict(zip(sources, processes.map(partial(survey, source) for source in sources)))
        _check_unique(tasks, surveys)
        missing = [task for task in tasks if not task.is_done]
        seconds = [surveys[task.source].seconds for task in missing]
        with hours_bar(sum(seconds), "features") as bar:
            for _, done in zip(processes.map(partial(make_shard, task) for task in missing), seconds):
                bar.update(done)
    skipped = _list_skipped(experiment, tasks)
    report = _report(tasks, skipped)
    lines = [
        json.dumps({"part": part, "id": name, "reason": why}) for part in PARTS for name, why in skipped[part]
    ]
    outputs = [
        experiment.path("features", name) for name in ("skipped.jsonl", "report.json", "normalisation.json")
    ]
    write_text(outputs[0], "".join(f"{line}\n" for line in lines))
    write_json(outputs[1], report)
    _check_left_out(report, skipped, tasks, settings.max_left_out_share)
    write_json(outputs[2], _normalise(experiment, tasks).as_dict())
    speakers = [experiment.path("features", part, "speakers.h5") for part in PARTS]
    return [path for task in tasks for path in task.outputs] + speakers + outputs


def _find_tasks(experiment: Experiment, sounds: Sounds) -> list[Task]:
    config = experiment.config
    return [
        Task(
            part=part,
            source=source,
            kept=experiment.path("features", part, source.name.removesuffix(".gz")),
            audio_folder=audio_folder(experiment, part),
            settings=config.features,
            conditions=config.conditions,
            sounds=sounds,
            labelled=part in LABELLED_PARTS,
            copied=part in config.conditions.parts,
            every_ratio=part in (DEV, TEST),
            seed=config.seed,
        )
        for part in PARTS
        for source in source_shards(experiment, part)
    ]


def _find_sounds(experiment: Experiment) -> Sounds:
    """What conditions are made with; the same from the beginning of the step to its end."""
    sounds = Sounds.find(experiment.config.conditions)
    path = experiment.path("features", "sounds.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(json.dumps(asdict(sounds)))
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != found:
        raise ValueError(
            "conditions.noise_folder or conditions.impulse_response_folder holds other sounds than when the features "
            f"were begun: bring them back, or remove {path.parent} to prepare anew"
        )
    write_json(path, found)
    return sounds


def _check_unique(tasks: list[Task], surveys: dict[Path, Survey]) -> None:
    """Over all parts: a later step finds an utterance by its id, and no speech may be in two parts."""
    values, counts = np.unique(
        np.concatenate([surveys[task.source].id_hashes for task in tasks]), return_counts=True
    )
    suspects = set(values[counts > 1].tolist())
    seen: dict[str, Path] = {}
    for task in tasks if suspects else []:
        for entry in read_entries(task.source):
            name = entry["id"]
            if hash_id(name) in suspects:
                if name in seen:
                    raise ValueError(
                        f"the id {name!r} is used twice: in {seen[name]} and in {task.source}. Every utterance of "
                        "all parts needs an id of its own, and may be in one part only"
                    )
                seen[name] = task.source


def _normalise(experiment: Experiment, tasks: list[Task]) -> Normalisation:
    """Write every part's speakers.h5; returns what is global."""
    num_features = experiment.config.features.num_mels * STACKED_FRAMES
    training = Moments(0, np.zeros(num_features), np.zeros(num_features))
    for part in PARTS:
        speakers: dict[str, Moments] = {}
        for task in tasks:
            for speaker, moments in read_moments(task.moments) if task.part == part else ():
                if part in (HUMAN, UNLABELLED):
                    training += moments
                if speaker is not None:
                    speakers[speaker] = speakers[speaker] + moments if speaker in speakers else moments
        write_speakers(experiment.path("features", part, "speakers.h5"), speakers, num_features)
    return Normalisation.from_moments(Moments.add([training]))


def _list_skipped(experiment: Experiment, tasks: list[Task]) -> dict[str, list[tuple[str, str]]]:
    """(id, reason) of every part: what the import of the data could not use, and what has no features."""
    skipped: dict[str, list[tuple[str, str]]] = {}
    for part in PARTS:
        imported = experiment.path("corpus", part, "skipped.jsonl")
        lines = imported.read_text(encoding="utf-8").splitlines() if imported.is_file() else []
        skipped[part] = [(entry["id"], entry["reason"]) for entry in map(json.loads, lines)]
        for task in tasks:
            if task.part == part:
                skipped[part] += [(name, reason) for name, reason in read_index(task.index)["skipped"]]
    return skipped


def _report(tasks: list[Task], skipped: dict[str, list[tuple[str, str]]]) -> dict[str, Any]:
    report = {}
    for part in PARTS:
        sums: Counter[str] = Counter()
        for task in tasks:
            if task.part == part:  # one index at a time: it names every utterance of its shard
                index = read_index(task.index)
                sums["ids"] += len(index["ids"])
                sums["without_speaker"] += index["speakers"].count(None)
                for name in ("seconds", "copies", "copy_seconds"):
                    sums[name] += index[name]
        report[part] = {
            "utterances": sums["ids"] - sums["copies"],
            "hours": round(sums["seconds"] / 3600, 6),
            "copies": sums["copies"],
            "copy_hours": round(sums["copy_seconds"] / 3600, 6),
            "without_speaker": sums["without_speaker"],
            "left_out": dict(sorted(Counter(_kind(reason) for _, reason in skipped[part]).items())),
        }
    return report


def _kind(reason: str) -> str:
    return reason.partition(":")[0]


def _check_left_out(
    report: dict[str, Any],
    skipped: dict[str, list[tuple[str, str]]],
    tasks: list[Task],
    max_share: float,
) -> None:
    for part, found in report.items():
        if not skipped[part]:
            continue
        num_left_out, num_used = len(skipped[part]), found["utterances"] + found["copies"]
        share = num_left_out / (num_left_out + num_used)
        examples = {_kind(reason): (name, reason) for name, reason in reversed(skipped[part])}
        rows = [
            f"  {count} x {examples[kind][1]} (for instance {examples[kind][0]})"
            for kind, count in Counter(found["left_out"]).most_common(_EXAMPLES)
        ]
        told = f"{num_left_out} of {num_left_out + num_used} utterances of the part {part!r} are left out"
        told += " (features/skipped.jsonl lists them all):\n" + "\n".join(rows)
        if share > max_share:
            for task in tasks:  # they are looked at again when the data are mended
                if task.part == part and read_index(task.index)["skipped"]:
                    task.index.unlink()
            raise ValueError(
                f"{told}\nThat is {100 * share:.1f} %, more than features.max_left_out_share = {max_share:g}: mend the "
                "data, or allow a greater share"
            )
        warnings.warn(told, stacklevel=2)
