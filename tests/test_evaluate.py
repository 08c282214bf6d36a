"""The table of word error rates is what the hypotheses say, and the test speakers choose nothing."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY

from teacherstudent import checkpoint
from teacherstudent.config import Config, Schedule, Student, load, to_toml
from teacherstudent.evaluate import Utterance, _compare, _score_conditions, evaluate, find_systems, summary
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_text
from teacherstudent.models import model_from_state
from teacherstudent.packed import PackedWriter, open_shards

torch.set_num_threads(1)

SYSTEMS = ["teacher", "human-only-final", "human-only-early", "gtc", "bmuf"]
SCALES = [0.05, 0.5, 4.0]


def num_word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Levenshtein distance, by the recurrence of the textbook."""
    row = list(range(len(hypothesis) + 1))
    for i, word in enumerate(reference, 1):
        before, row = row, [i]
        for j, other in enumerate(hypothesis, 1):
            row.append(min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (word != other)))
    return row[-1]


def read_results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluate" / "results.json").read_text())


def read_test_cuts(folder: Path) -> list[dict[str, Any]]:
    paths = sorted((folder / "corpus" / "test").glob("cuts.*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def read_hypotheses(folder: Path, system: str) -> dict[str, list[str]]:
    lines = (folder / "evaluate" / f"{system}.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def evaluate_copy(experiment: Path, folder: Path, scales: Sequence[float]) -> dict[str, Any]:
    """`evaluate` alone in another folder, which may be there already."""
    if not folder.exists():
        shutil.copytree(experiment, folder)
    config = load(TINY, [f"folder={folder}", f"decode.acoustic_scales={list(scales)}", "decode.jobs=1"])
    write_text(folder / "config.toml", to_toml(config))
    evaluate(Experiment(config))
    return read_results(folder)


def tamper_with_test_speakers(folder: Path) -> None:
    """Transcripts of other sentences, and senones that nobody spoke."""
    shuffler = random.Random(1)
    for path in (folder / "corpus" / "test").glob("cuts.*.jsonl"):
        cuts = [json.loads(line) for line in path.read_text().splitlines()]
        texts = [cut["supervisions"][0]["text"] for cut in cuts]
        shuffler.shuffle(texts)
        for cut, text in zip(cuts, texts):
            cut["supervisions"][0]["text"] = f"{text} {text}"
        path.write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    for shard in open_shards(folder / "senones" / "test", "labels"):
        labels = {name: np.zeros_like(arrays["senone"]) for name, arrays in shard}
        shard.path.unlink()
        with PackedWriter(shard.path, shard.header, {"senone": ("int32", ())}) as writer:
            for name, senone in labels.items():
                writer.write(name, senone=senone)


def test_every_student_is_a_row_and_the_human_only_one_is_two(tmp_path: Path) -> None:
    variants = {
        "alone": {"schedule": {"mode": "human-only"}},
        "a": {},
        "m": {"schedule": {"mode": "machine-only"}},
    }
    config = Config(folder=str(tmp_path), student=Student(schedule=Schedule(), variants=variants))
    rows = [
        (system.name, system.kind, str(system.model.relative_to(tmp_path)))
        for system in find_systems(Experiment(config))
    ]
    assert rows == [
        ("teacher", "teacher", "teacher/best.pt"),
        ("alone-final", "student", "students/alone/final.pt"),
        ("alone-early", "student", "students/alone/best.pt"),
        ("a", "student", "students/a/best.pt"),
        ("m", "student", "students/m/best.pt"),
    ]
    assert len({system.label for system in find_systems(Experiment(config))}) == len(rows)


def test_word_error_rates_are_those_of_the_hypotheses_that_are_written(tiny_experiment: Path) -> None:
    results, cuts = read_results(tiny_experiment), read_test_cuts(tiny_experiment)
    assert list(results["systems"]) == SYSTEMS
    for system, row in results["systems"].items():
        hypotheses = read_hypotheses(tiny_experiment, system)
        assert list(hypotheses) == [cut["id"] for cut in cuts]
        for condition, found in row["conditions"].items():
            chosen = [cut for cut in cuts if condition in ("all", cut["custom"]["condition"])]
            references = {cut["id"]: cut["supervisions"][0]["text"].split() for cut in chosen}
            errors = sum(num_word_errors(words, hypotheses[name]) for name, words in references.items())
            words = sum(map(len, references.values()))
            assert (found["utterances"], found["words"], found["errors"]) == (len(chosen), words, errors)
            assert found["errors"] == found["substitutions"] + found["insertions"] + found["deletions"]
            assert found["word_error_rate"] == pytest.approx(100 * errors / words)
            assert found["interval"][0] <= found["word_error_rate"] <= found["interval"][1]


def test_the_gain_is_against_the_better_of_the_human_only_students(tiny_experiment: Path) -> None:
    results = read_results(tiny_experiment)
    errors = {name: row["conditions"]["all"]["errors"] for name, row in results["systems"].items()}
    assert results["baseline"] in ("human-only-final", "human-only-early")
    assert errors[results["baseline"]] == min(errors["human-only-final"], errors["human-only-early"])
    assert [found["system"] for found in results["comparisons"]] == ["teacher", "gtc", "bmuf"]
    for found in results["comparisons"]:
        reduction = 100 * (1 - errors[found["system"]] / errors[results["baseline"]])
        assert found["relative_reduction"] == pytest.approx(reduction)


@pytest.mark.parametrize("better", ["alone-final", "alone-early"])
def test_whichever_human_only_student_makes_fewer_errors_is_the_baseline(tmp_path: Path, better: str) -> None:
    variants = {"alone": {"schedule": {"mode": "human-only"}}, "a": {}}
    experiment = Experiment(Config(folder=str(tmp_path / "x"), student=Student(variants=variants)))
    test = [Utterance(str(n), ("one", "two", "three", "four"), "clean", "speaker") for n in range(2)]
    num_right = {"teacher": 4, "alone-final": 1, "alone-early": 1, "a": 3} | {better: 2}
    words = {name: [test[0].words[:right]] * 2 for name, right in num_right.items()}
    scores = {name: {"conditions": {"all": {"errors": 2 * (4 - right)}}} for name, right in num_right.items()}
    found = _compare(experiment, scores, test, words)
    assert found["baseline"] == better
    reductions = {row["system"]: row["relative_reduction"] for row in found["comparisons"]}
    assert reductions == pytest.approx({"teacher": 100, "a": 50})


@torch.no_grad()
def test_the_frame_error_is_the_share_of_frames_whose_best_senone_is_another(tiny_experiment: Path) -> None:
    row = read_results(tiny_experiment)["systems"]["gtc"]
    model = model_from_state(checkpoint.load(tiny_experiment / "students" / "gtc" / "best.pt"))
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    for part in ("dev", "test"):
        wrong = total = 0
        features = open_shards(tiny_experiment / "features" / part, "features")
        for values, labels in zip(features, open_shards(tiny_experiment / "senones" / part, "labels")):
            for name, arrays in values:
                frames = torch.from_numpy(arrays["values"].astype(np.float32))
                best = model(frames[None], torch.tensor([len(frames)]))[0].argmax(dim=1).numpy()
                wrong += int((best != labels[name]["senone"]).sum())
                total += len(best)
        assert row["frame_error"][part] == pytest.approx(100 * wrong / total, abs=0.2)


def test_the_acoustic_scale_is_chosen_on_the_development_speakers_and_never_on_the_test_speakers(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    chosen = evaluate_copy(tiny_experiment, tmp_path / "all", SCALES)["systems"]
    alone = {scale: evaluate_copy(tiny_experiment, tmp_path / "one", [scale])["systems"] for scale in SCALES}
    assert len({row["acoustic_scale"] for row in chosen.values()}) > 1
    for name, row in chosen.items():
        rates = {scale: systems[name]["dev_word_error_rate"] for scale, systems in alone.items()}
        assert row["acoustic_scale"] == min(SCALES, key=lambda scale: (rates[scale], scale))
        assert row["dev_word_error_rate"] == rates[row["acoustic_scale"]]
        assert row["conditions"] == alone[row["acoustic_scale"]][name]["conditions"]
    hypotheses = {name: read_hypotheses(tmp_path / "all", name) for name in chosen}

    tamper_with_test_speakers(tmp_path / "all")
    tampered = evaluate_copy(tiny_experiment, tmp_path / "all", SCALES)["systems"]
    for name, row in tampered.items():
        for key in ("acoustic_scale", "dev_word_error_rate"):
            assert row[key] == chosen[name][key]
        assert row["frame_error"]["dev"] == chosen[name]["frame_error"]["dev"]
        assert row["frame_error"]["test"] != chosen[name]["frame_error"]["test"]
        assert row["conditions"]["all"]["words"] == 2 * chosen[name]["conditions"]["all"]["words"]
        assert read_hypotheses(tmp_path / "all", name) == hypotheses[name]


def test_conditions_come_from_clean_to_loud(tiny_experiment: Path, tmp_path: Path) -> None:
    for row in read_results(tiny_experiment)["systems"].values():
        assert list(row["conditions"]) == ["all", "clean", "10dB"]
    names = ["5dB", "car", "10dB", "-2.5dB", "clean", "20dB", "bus"]
    test = [Utterance(str(n), ("a", "b"), condition, "speaker") for n, condition in enumerate(names)]
    rows = _score_conditions(Experiment(Config(folder=str(tmp_path / "x"))), test, [("a",)] * len(test))
    assert list(rows) == ["all", "clean", "20dB", "10dB", "5dB", "-2.5dB", "bus", "car"]


def test_the_summary_has_every_system_with_its_error_rates_and_every_comparison(
    tiny_experiment: Path,
) -> None:
    results = read_results(tiny_experiment)
    lines = summary(tiny_experiment / "evaluate" / "results.json").splitlines()
    assert lines[1].split() == ["learning", "rate", "all", "clean", "10dB"]
    assert len(lines) == 2 + len(results["systems"]) + len(results["comparisons"])
    for line, row in zip(lines[2:], results["systems"].values()):
        assert line.startswith(row["label"])
        assert f" {row['learning_rate']:g} {row['method']} " in line
        for found in row["conditions"].values():
            assert "{:.1f} [{:.1f}, {:.1f}]".format(found["word_error_rate"], *found["interval"]) in line
    baseline = results["systems"][results["baseline"]]["label"]
    for line, found in zip(lines[-len(results["comparisons"]) :], results["comparisons"]):
        assert line.startswith(
            f"{results['systems'][found['system']]['label']}: {found['relative_reduction']:.1f} %"
        )
        assert line.endswith(f"fewer word errors than {baseline}")
