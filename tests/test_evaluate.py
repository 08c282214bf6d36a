"""The table of word error rates is what the hypotheses say, and the test speakers choose nothing."""

import json
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kaldi_decoder
import kaldifst
import numpy as np
import pytest
import torch
from conftest import TINY

from teacherstudent.config import Config, Schedule, Student, load, to_toml
from teacherstudent.data.lexicon import Lexicon
from teacherstudent.data.packed import PackedWriter, open_shards
from teacherstudent.decoding.decode import Decoder
from teacherstudent.decoding.error_tables import Utterance
from teacherstudent.decoding.evaluate import _check, _compare, _SystemDecoder, evaluate, find_systems
from teacherstudent.decoding.graph import Graph
from teacherstudent.decoding.graph_sources import build_graph
from teacherstudent.decoding.lattice import read_lattices
from teacherstudent.decoding.results_table import format_p, summary
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file, write_text
from teacherstudent.training import checkpoint
from teacherstudent.training.models import model_from_state
from teacherstudent.tying.senones import Inventory

torch.set_num_threads(1)

SYSTEMS = ["teacher", "human-only-final", "human-only-early", "gtc", "bmuf"]
SCALES = [0.2, 4.0]
NARROW = ("decode.speed_seconds=0", "decode.beam=8", "decode.max_active=300")


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
    paths = sorted((folder / "features" / "test").glob("cuts.*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def read_hypotheses(folder: Path, system: str) -> dict[str, list[str]]:
    lines = (folder / "evaluate" / f"{system}.txt").read_text().splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def evaluate_copy(experiment: Path, folder: Path, scales: Sequence[float], *settings: str) -> dict[str, Any]:
    """`evaluate` alone in another folder, which may be there already; a narrow search, and no speeds."""
    if not folder.exists():
        shutil.copytree(experiment, folder)
    overrides = [f"folder={folder}", f"decode.acoustic_scales={list(scales)}", "decode.jobs=1"]
    config = load(TINY, [*overrides, *NARROW, *settings])
    write_text(folder / "config.toml", to_toml(config))
    evaluate(Experiment(config))
    return read_results(folder)


def tamper_with_test_speakers(folder: Path) -> None:
    """Transcripts of other sentences, and senones that nobody spoke."""
    shuffler = random.Random(1)
    for path in (folder / "features" / "test").glob("cuts.*.jsonl"):
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


def test_no_student_may_be_called_as_sclite_calls_the_reference(tmp_path: Path) -> None:
    config = Config(folder=str(tmp_path), student=Student(variants={"ref": {}}))
    with pytest.raises(ValueError, match="would overwrite"):
        find_systems(Experiment(config))


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
    test = [Utterance(str(n), ("one", "two", "three", "four"), "speaker") for n in range(2)]
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
        wrong, total, nats = 0, 0, 0.0
        features = open_shards(tiny_experiment / "features" / part, "features")
        for values, labels in zip(features, open_shards(tiny_experiment / "senones" / part, "labels")):
            for name, arrays in values:
                frames = torch.from_numpy(arrays["values"].astype(np.float32))
                logits = model(frames[None], torch.tensor([len(frames)]))[0]
                senone = labels[name]["senone"]
                wrong += int((logits.argmax(dim=1).numpy() != senone).sum())
                target = torch.from_numpy(senone).long()
                nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
                total += len(senone)
        assert row["frame_error"][part] == pytest.approx(100 * wrong / total, abs=0.2)
        assert row["frame_cross_entropy"][part] == pytest.approx(nats / total, abs=1e-3)


@torch.no_grad()
def test_on_a_networks_posteriors_all_of_kaldis_searches_find_the_same(tiny_experiment: Path) -> None:
    experiment = Experiment(load(TINY, [f"folder={tiny_experiment}"]))
    inventory = Inventory.load(tiny_experiment / "senones" / "inventory.json")
    graph = build_graph(experiment, inventory)
    decoder, fst = Decoder(graph, lattice_beam=0.5), graph.load()
    simple = kaldi_decoder.SimpleDecoder(fst, 15.0)  # which does not keep the graph alive
    model = model_from_state(checkpoint.load(tiny_experiment / "teacher" / "best.pt"))
    (shard,) = open_shards(tiny_experiment / "features" / "test", "features")
    for name in shard.ids[:6]:
        frames = torch.from_numpy(shard[name]["values"].astype(np.float32))
        posteriors = model(frames[None], torch.tensor([len(frames)]))[0].log_softmax(dim=1).numpy()
        best = decoder(posteriors, inventory.log_priors, 1.0)
        scores = np.ascontiguousarray(posteriors - inventory.log_priors, np.float32)
        assert simple.decode(kaldi_decoder.DecodableCtc(scores))
        _, _, words, weight = kaldifst.get_linear_symbol_sequence(simple.get_best_path()[1])
        assert best.words == tuple(graph.words[word - 1] for word in words)
        assert best.score == pytest.approx(-(weight.value1 + weight.value2), abs=1e-3)
        found = decoder.nbest(decoder.lattice(posteriors, inventory.log_priors, 1.0), 2)
        assert found[0].words == best.words
        assert found[0].score == pytest.approx(best.score, abs=1e-3)
        narrow = [Decoder(graph, beam)(posteriors, inventory.log_priors, 1.0) for beam in (6.0, 10.0)]
        assert all(each.partial or each.score <= best.score + 1e-3 for each in narrow)


def test_scale_and_penalty_are_chosen_on_the_development_speakers_and_never_on_the_test_speakers(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    both = "decode.word_penalties=[0.0,-3.0]"
    pairs = [(scale, penalty) for scale in SCALES for penalty in (0.0, -3.0)]
    chosen = evaluate_copy(tiny_experiment, tmp_path / "all", SCALES, both)["systems"]
    alone = {
        (scale, penalty): evaluate_copy(
            tiny_experiment, tmp_path / "one", [scale], f"decode.word_penalties=[{penalty}]"
        )["systems"]
        for scale, penalty in pairs
    }
    assert len({(row["acoustic_scale"], row["word_penalty"]) for row in chosen.values()}) > 1
    for name, row in chosen.items():
        rates = {pair: systems[name]["dev_word_error_rate"] for pair, systems in alone.items()}
        best = min(pairs, key=lambda pair: (rates[pair], pair[0], abs(pair[1])))
        assert (row["acoustic_scale"], row["word_penalty"]) == best
        assert row["dev_word_error_rate"] == rates[best]
        assert [found["word_error_rate"] for found in row["dev_sweep"]] == [rates[pair] for pair in pairs]
        assert row["conditions"] == alone[best][name]["conditions"]
    hypotheses = {name: read_hypotheses(tmp_path / "all", name) for name in chosen}

    tamper_with_test_speakers(tmp_path / "all")
    tampered = evaluate_copy(tiny_experiment, tmp_path / "all", SCALES, both)["systems"]
    for name, row in tampered.items():
        for key in ("acoustic_scale", "word_penalty", "dev_word_error_rate", "dev_sweep"):
            assert row[key] == chosen[name][key]
        assert row["frame_error"]["dev"] == chosen[name]["frame_error"]["dev"]
        assert row["frame_error"]["test"] != chosen[name]["frame_error"]["test"]
        assert row["conditions"]["all"]["words"] == 2 * chosen[name]["conditions"]["all"]["words"]
        assert read_hypotheses(tmp_path / "all", name) == hypotheses[name]


def test_utterances_without_labels_are_decoded_and_count_for_words_alone(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    shutil.copytree(tiny_experiment, folder)
    whole = evaluate_copy(tiny_experiment, folder, [0.5])
    (shard,) = open_shards(folder / "senones" / "test", "labels")
    kept = {name: arrays["senone"] for name, arrays in shard if name != shard.ids[1]}
    shard.path.unlink()
    with PackedWriter(shard.path, shard.header, {"senone": ("int32", ())}) as writer:
        for name, senone in kept.items():
            writer.write(name, senone=senone)
    for path in (folder / "senones" / "dev").glob("labels.*"):
        path.unlink()
    row = {"part": "test", "id": "broken", "reason": "no audio"}
    write_text(folder / "features" / "skipped.jsonl", json.dumps(row) + "\n")
    partly = evaluate_copy(tiny_experiment, folder, [0.5])
    num_dev = len((folder / "features/dev/cuts.000000.jsonl").read_text().splitlines())
    assert whole["without_labels"] == {"dev": 0, "test": 0}
    assert partly["without_labels"] == {"dev": num_dev, "test": 1}
    assert (whole["left_out"], partly["left_out"]) == ({"dev": 0, "test": 0}, {"dev": 0, "test": 1})
    for name, found in partly["systems"].items():
        before = whole["systems"][name]
        assert found["conditions"] == before["conditions"]
        assert set(found["frame_error"]) == set(found["frame_cross_entropy"]) == {"test"}
        assert found["frame_error"]["test"] != before["frame_error"]["test"]
    text = summary(folder / "evaluate" / "results.json")
    assert "1 test utterances could not be used" in text
    assert "1 test utterances have no alignment" in text


def test_lattices_and_nbest_lists_say_what_the_hypotheses_say(tiny_experiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    wide = ("decode.beam=15", "decode.max_active=7000")
    narrow = ("decode.lattices=true", "decode.lattice_beam=1", "decode.nbest=3", *wide)
    results = evaluate_copy(tiny_experiment, folder, [1.0], "decode.word_penalties=[0.5]", *narrow)
    symbols = [line.split() for line in (folder / "evaluate/lattices/words.txt").read_text().splitlines()]
    names = {int(number): word for word, number in symbols}
    assert names[0] == "<eps>"
    for system in results["systems"]:
        hypotheses = read_hypotheses(folder, system)
        lists = [json.loads(line) for line in (folder / f"evaluate/nbest/{system}.jsonl").open()]
        lattices = dict(read_lattices(folder / f"evaluate/lattices/{system}.gz"))
        assert list(hypotheses) == [row["id"] for row in lists] == list(lattices)
        for row in lists:
            assert row["hypotheses"][0]["words"].split() == hypotheses[row["id"]]
            assert 1 <= len(row["hypotheses"]) <= 3
            best = lattices[row["id"]].reweighted(1.0, 0.5).nbest(1)[0]
            assert [names[word] for word in best.words] == hypotheses[row["id"]]
            assert -best.cost == pytest.approx(row["hypotheses"][0]["score"], abs=1e-3)
        ctm = [line.split() for line in (folder / f"evaluate/sclite/{system}.ctm").open() if ";;" not in line]
        assert [fields[4] for fields in ctm] == [
            word for name in sorted(hypotheses) for word in hypotheses[name]
        ]
        assert all(0 < float(fields[5]) <= 1 for fields in ctm)


def test_one_model_under_two_names_is_decoded_once_and_has_the_same_of_everything(
    tiny_experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_experiment, tmp_path / "x")
    students = tmp_path / "x" / "students" / "human-only"
    shutil.copyfile(students / "final.pt", students / "best.pt")
    decoded, transcribe = [], _SystemDecoder.transcribe

    def count(decoder: _SystemDecoder, *arguments: Any) -> Any:
        decoded.append(decoder.name)
        return transcribe(decoder, *arguments)

    monkeypatch.setattr(_SystemDecoder, "transcribe", count)
    settings = ("decode.only=human-only", "decode.lattices=true", "decode.speed_seconds=0.1")
    results = evaluate_copy(tiny_experiment, tmp_path / "x", [0.5], *settings)
    assert decoded == ["human-only-final"]
    final, early = (results["systems"][f"human-only-{name}"] for name in ("final", "early"))
    assert final.pop("label") != early.pop("label")
    assert final == early
    folder = tmp_path / "x" / "evaluate"
    for path in folder.glob("**/human-only-final.*"):
        twin = path.with_name(path.name.replace("final", "early"))
        assert twin.read_bytes() == path.read_bytes()
    assert len(list(folder.glob("**/human-only-early.*"))) == 5  # words, trn, ctm, lattices, n-best
    speeds = json.loads((folder / "speed.json").read_text())["systems"]
    assert speeds["human-only-final"] == speeds["human-only-early"]


def test_evaluating_again_gives_the_same_files_and_speeds_are_not_among_them(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_experiment, tmp_path / "x")
    config = load(
        TINY, [f"folder={tmp_path / 'x'}", "decode.jobs=1", "decode.speed_seconds=0.1"]
    )  # these change nothing
    outputs = evaluate(Experiment(config))
    record = json.loads((tiny_experiment / "steps" / "evaluate.json").read_text())["outputs"]
    hashes = {path.relative_to(tmp_path / "x").as_posix(): hash_file(path) for path in outputs}
    assert hashes == record
    assert "evaluate/speed.json" not in hashes
    written = {
        path.relative_to(tmp_path / "x").as_posix() for path in (tmp_path / "x/evaluate").glob("**/*.*")
    }
    assert written == {*hashes, "evaluate/speed.json"}


def test_speeds_compare_every_student_with_the_teacher(tiny_experiment: Path) -> None:
    speeds = json.loads((tiny_experiment / "evaluate" / "speed.json").read_text())
    systems = read_results(tiny_experiment)["systems"]
    assert list(speeds["systems"]) == list(systems)
    teacher = speeds["systems"]["teacher"]
    for name, row in speeds["systems"].items():
        assert row["parameters"] == systems[name]["parameters"]
        assert 2.0 <= row["audio_seconds"] < 20
        frames = row["audio_seconds"] / 0.03
        assert row["network_frames_per_second"] * row["network_real_time_factor"] * 0.03 == pytest.approx(1)
        assert row["real_time_factor"] > row["network_real_time_factor"] > 0
        assert frames == pytest.approx(round(frames))
        if name != "teacher":
            ratio = row["network_frames_per_second"] / teacher["network_frames_per_second"]
            assert row["times_faster_than_teacher"] == pytest.approx(ratio)
            assert row["times_smaller_than_teacher"] == teacher["parameters"] / row["parameters"]


@pytest.mark.parametrize(
    ("only", "systems"),
    [("gtc", ["gtc"]), ("human-only", ["human-only-final", "human-only-early"]), ("teacher", ["teacher"])],
)
def test_one_network_is_decoded_alone_with_its_speeds_and_nothing_to_compare(
    tiny_experiment: Path, tmp_path: Path, only: str, systems: list[str]
) -> None:
    settings = (f"decode.only={only}", "decode.speed_seconds=0.1")
    results = evaluate_copy(tiny_experiment, tmp_path / "x", [0.5], *settings)
    assert list(results["systems"]) == systems
    assert results["comparisons"] == []
    assert results["baseline"] in (None, *(name for name in systems if name.startswith("human-only")))
    speeds = json.loads((tmp_path / "x" / "evaluate" / "speed.json").read_text())["systems"]
    assert list(speeds) == systems
    assert not any("times_faster_than_teacher" in row for row in speeds.values())
    assert all(
        results["systems"][name]["label"] in summary(tmp_path / "x/evaluate/results.json") for name in systems
    )


def test_a_word_that_cannot_be_recognised_is_blamed_on_what_lacks_it() -> None:
    lexicon = Lexicon(dict.fromkeys(("yes", "no", "rare", "<UNK>"), (("AX",),)))
    said = [Utterance("u", ("yes", "rare", "rare", "polka", "<UNK>"), "s")]
    with pytest.warns(UserWarning, match="words of the development and test transcripts") as warned:
        _check(said, said, Graph(("no", "yes"), 1, b""), lexicon)
    told = [str(warning.message) for warning in warned]
    assert [text.split(" words")[0] for text in told] == ["2 of 10", "2 of 10", "4 of 10"]
    assert "are not in the lexicon, so each is a word error: polka" in told[0]
    assert "stand for unknown words, so each is a word error: <UNK>" in told[1]
    assert "in the lexicon, but not in the language model, so each is a word error: rare" in told[2]


def test_a_part_without_transcripts_and_a_field_that_no_cut_has_are_told(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "x"
    with pytest.warns(UserWarning, match="decode.score_by names 'planet', which no test cut has"):
        by = evaluate_copy(tiny_experiment, folder, [0.5], 'decode.score_by=["planet", "speaker"]')
    row = by["systems"]["teacher"]
    assert list(row["conditions"]) == ["all"]
    assert list(row["by"]) == ["speaker"]
    assert sum(cell["errors"] for cell in row["by"]["speaker"].values()) == row["conditions"]["all"]["errors"]
    path = folder / "features" / "dev" / "cuts.000000.jsonl"
    cuts = [json.loads(line) for line in path.read_text().splitlines()]
    for cut in cuts:
        cut["supervisions"][0]["text"] = ""
    path.write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    with pytest.raises(ValueError, match="part 'dev' has no transcripts"):
        evaluate_copy(tiny_experiment, folder, [0.5])


def test_the_summary_has_every_system_with_its_error_rates_and_every_comparison(
    tiny_experiment: Path,
) -> None:
    results = read_results(tiny_experiment)
    blocks = summary(tiny_experiment / "evaluate" / "results.json").split("\n\n")
    lines = blocks[0].splitlines()
    assert lines[1].split() == ["learning", "rate", "all", "clean", "10dB"]
    assert len(lines) == 2 + len(results["systems"])
    for line, row in zip(lines[2:], results["systems"].values()):
        assert line.startswith(row["label"])
        assert f" {row['learning_rate']:g} {row['method']} " in line
        for found in row["conditions"].values():
            assert "{:.1f} [{:.1f}, {:.1f}]".format(found["word_error_rate"], *found["interval"]) in line
    baseline = results["systems"][results["baseline"]]["label"]
    for line, found in zip(blocks[1].splitlines(), results["comparisons"], strict=True):
        label = results["systems"][found["system"]]["label"]
        assert line.startswith(f"{label}: {found['relative_reduction']:.1f} %")
        assert f"fewer word errors than {baseline} (p {format_p(found['p_value'])}; " in line
    for line, row in zip(blocks[2].splitlines()[2:], results["systems"].values(), strict=True):
        assert line.endswith(f"{row['frame_error']['test']:.1f}{row['frame_cross_entropy']['test']:14.3f}")
    assert blocks[3].startswith("speed on one core")
    assert len(blocks[3].splitlines()) == 2 + len(results["systems"])
