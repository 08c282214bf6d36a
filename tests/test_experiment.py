"""One folder, one configuration; a step is done as long as what it read has not changed."""

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
import tomli_w

from teacherstudent.config import (
    Align,
    Config,
    Corpus,
    Data,
    Decode,
    Label,
    Network,
    Senones,
    Student,
    to_toml,
)
from teacherstudent.experiment import Experiment
from teacherstudent.files import hash_file, write_json, write_text
from teacherstudent.settings import flatten


def make(folder: Path, **settings: object) -> Experiment:
    experiment = Experiment(dataclasses.replace(Config(folder=str(folder)), **settings))  # type: ignore[arg-type]
    experiment.create()
    return experiment


def run(experiment: Experiment, step: str, after: tuple[str, ...] = (), text: str = "x") -> None:
    """A step that writes one file with `text` in a folder of its own."""
    experiment.begin(step, after, clear=(step,))
    path = experiment.path(step, "result.txt")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    experiment.finish(step, [path])


def test_a_folder_opens_again_for_its_own_configuration(tmp_path: Path) -> None:
    make(tmp_path / "exp", seed=3)
    make(tmp_path / "exp", seed=3)


def test_a_folder_moved_elsewhere_opens_for_the_same_configuration(tmp_path: Path) -> None:
    make(tmp_path / "exp")
    (tmp_path / "exp").rename(tmp_path / "moved")
    make(tmp_path / "moved")


def test_settings_of_where_and_how_fast_do_not_make_another_configuration(tmp_path: Path) -> None:
    make(tmp_path / "exp")
    make(tmp_path / "exp", corpus=Corpus(jobs=7), student=Student(only="student"))


def test_a_folder_of_other_settings_is_refused_naming_every_one_that_a_step_has_read(tmp_path: Path) -> None:
    run(make(tmp_path / "exp", seed=3), "corpus")
    with pytest.raises(ValueError) as refused:
        make(tmp_path / "exp", seed=4, corpus=Corpus(split=9), student=Student(variants={"a": {}}))
    message = str(refused.value)
    assert str(tmp_path / "exp") in message
    assert "seed: 3 there, 4 now" in message
    assert "corpus.split: 0 there, 9 now" in message
    assert message.count(" there, ") == 2  # no student was begun: the new one is in nobody's way


def test_of_very_many_settings_that_differ_some_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    variants = {f"a{number}": {"workers": 2} for number in range(100)}
    run(make(tmp_path / "exp", student=Student(variants=variants)), "evaluate")
    for table in variants.values():
        table["workers"] = 3
    with pytest.raises(ValueError) as refused:
        make(tmp_path / "exp", student=Student(variants=variants))
    message = str(refused.value)
    assert message.count(": 2 there, 3 now") == 20 and "\n  and 80 more\n" in message


def done_steps(folder: Path, *steps: str) -> Experiment:
    experiment = make(folder, student=Student(variants={"a": {}, "a.b": {}}))
    for step in steps:
        run(experiment, step)
    return experiment


ALL_STEPS = ("corpus", "resources", "prepare", "align", "senones", "teacher", "label")
ALL_STEPS += ("student-a", "student-a.b", "evaluate", "report")


@pytest.mark.parametrize(
    "changed, stale",
    [
        ({"seed": 1}, "corpus prepare align senones teacher label student-a student-a.b evaluate"),
        ({"align": Align(jobs=7, states=2)}, "align senones teacher label student-a student-a.b evaluate"),
        ({"senones": Senones(target=9)}, "align senones teacher label student-a student-a.b evaluate"),
        ({"label": Label(k=3)}, "label student-a student-a.b evaluate"),
        (
            {"student": Student(network=Network(cells=3), variants={"a": {}, "a.b": {}})},
            "student-a student-a.b evaluate",
        ),
        ({"student": Student(variants={"a": {"network": {"cells": 3}}, "a.b": {}})}, "student-a evaluate"),
        ({"student": Student(variants={"a": {}, "a.b": {}, "c": {}})}, "evaluate"),
        ({"decode": Decode(beam=3)}, "evaluate"),
    ],
)
def test_a_changed_setting_is_taken_once_no_step_that_reads_it_has_a_record(
    tmp_path: Path, changed: dict[str, object], stale: str
) -> None:
    done_steps(tmp_path / "exp", *ALL_STEPS)
    settings = {"student": Student(variants={"a": {}, "a.b": {}})} | changed
    with pytest.raises(ValueError, match="folder=OTHER") as refused:
        make(tmp_path / "exp", **settings)
    named = [Path(word) for word in str(refused.value).split("rm ")[1].split()]
    assert sorted(path.stem for path in named) == sorted(stale.split())
    for path in named:
        path.unlink()
    experiment = make(tmp_path / "exp", **settings)
    assert all(experiment.is_done(step) == (step not in stale.split()) for step in ALL_STEPS)
    kept = tmp_path / "exp" / "evaluate" / "result.txt"
    assert kept.is_file()
    experiment.begin("evaluate", (), clear=("evaluate",))
    assert not kept.exists()  # what other settings have made is not gone on with


def test_every_section_of_a_configuration_blocks_the_last_step(tmp_path: Path) -> None:
    """None is forgotten: what was decoded with another value is not passed off as this one's."""
    run(make(tmp_path / "exp"), "evaluate")
    for key in flatten(tomllib.loads(to_toml(Config()))):
        text = (tmp_path / "exp" / "config.toml").read_text()
        there = tomllib.loads(text)
        *sections, name = key.split(".")
        table = there
        for section in sections:
            table = table[section]
        table[name] = "other"
        (tmp_path / "exp" / "config.toml").write_text(tomli_w.dumps(there))
        with pytest.raises(ValueError, match=rf"{re.escape(key)}: 'other' there"):
            make(tmp_path / "exp")
        (tmp_path / "exp" / "config.toml").write_text(text)


def test_a_folder_from_before_a_setting_existed_opens_with_its_default_alone(tmp_path: Path) -> None:
    run(make(tmp_path / "exp"), "evaluate")
    path = tmp_path / "exp" / "config.toml"
    path.write_text(re.sub(r"^beam = .*\n", "", path.read_text(), flags=re.MULTILINE))
    make(tmp_path / "exp")
    path.write_text(re.sub(r"^beam = .*\n", "", path.read_text(), flags=re.MULTILINE))
    with pytest.raises(ValueError, match=r"decode.beam: None there, 3"):
        make(tmp_path / "exp", decode=Decode(beam=3))


def test_a_foreign_folder_is_refused_unless_it_is_empty_or_holds_logs_alone(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    (tmp_path / "logs" / "log").mkdir(parents=True)
    make(tmp_path / "logs")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").touch()
    with pytest.raises(ValueError, match=r"letters is not empty .*folder=OTHER"):
        make(tmp_path / "letters")
    with pytest.raises(ValueError, match=r"dear.txt is a file"):
        make(tmp_path / "letters" / "dear.txt")


def test_opening_a_folder_writes_nothing(tmp_path: Path) -> None:
    Experiment(Config(folder=str(tmp_path / "exp")))
    assert not (tmp_path / "exp").exists()


def test_a_step_is_done_when_it_has_finished_and_not_before(tmp_path: Path) -> None:
    experiment = make(tmp_path / "exp")
    assert not experiment.is_done("corpus")
    experiment.begin("corpus", ())
    assert not experiment.is_done("corpus")
    run(experiment, "corpus")
    assert experiment.is_done("corpus")
    assert make(tmp_path / "exp").is_done("corpus")


def test_a_step_before_its_turn_names_the_step_that_is_missing(tmp_path: Path) -> None:
    experiment = make(tmp_path / "exp")
    run(experiment, "corpus")
    experiment.begin("prepare", ("corpus",))  # begun is not done
    with pytest.raises(ValueError, match=r"step 'prepare' is not done .*teacherstudent run"):
        experiment.begin("align", ("corpus", "prepare"))
    assert not experiment.is_done("align", ("corpus", "prepare"))


def test_a_step_is_stale_when_what_it_read_has_changed_and_only_then(tmp_path: Path) -> None:
    experiment = make(tmp_path / "exp")
    run(experiment, "corpus", text="one")
    run(experiment, "prepare", ("corpus",))
    run(experiment, "align", ("prepare",))
    run(experiment, "corpus", text="one")  # again, with the same result
    assert experiment.is_done("prepare", ("corpus",))
    run(experiment, "corpus", text="two")
    assert not experiment.is_done("prepare", ("corpus",))
    assert not experiment.is_done("align", ("prepare",))  # what it read is out of date
    with pytest.raises(ValueError, match=r"'prepare' is out of date.*corpus changed"):
        experiment.begin("align", ("prepare",))
    run(experiment, "prepare", ("corpus",), text="other")
    assert experiment.is_done("prepare", ("corpus",))
    assert not experiment.is_done("align", ("prepare",))


def test_a_step_is_stale_while_what_it_reads_is_being_made(tmp_path: Path) -> None:
    experiment = make(tmp_path / "exp")
    run(experiment, "corpus")
    run(experiment, "prepare", ("corpus",))
    experiment.begin("corpus", ())
    assert not experiment.is_done("prepare", ("corpus",))


def test_an_interrupted_step_finds_its_files_again(tmp_path: Path) -> None:
    experiment = make(tmp_path / "exp")
    run(experiment, "corpus")
    experiment.begin("prepare", ("corpus",), clear=("features",))
    half = experiment.path("features", "half")
    half.parent.mkdir()
    half.touch()
    make(tmp_path / "exp").begin("prepare", ("corpus",), clear=("features",))
    assert half.exists()


def test_a_step_whose_input_has_changed_starts_from_empty_folders_and_spares_the_others(
    tmp_path: Path,
) -> None:
    experiment = make(tmp_path / "exp")
    run(experiment, "corpus", text="one")
    for name in ("features", "more/inside", "others"):
        experiment.path(name).mkdir(parents=True)
        experiment.path(name, "file").touch()
    experiment.begin("prepare", ("corpus",))
    run(experiment, "corpus", text="two")
    experiment.begin("prepare", ("corpus",), clear=("features", "more/inside", "absent"))
    assert not experiment.path("features").exists()
    assert not experiment.path("more/inside").exists()
    assert experiment.path("others", "file").exists()


def test_a_step_interrupted_while_its_folders_are_emptied_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = make(tmp_path / "exp")
    run(experiment, "corpus", text="one")
    run(experiment, "prepare", ("corpus",))
    run(experiment, "corpus", text="two")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            experiment.begin("prepare", ("corpus",), clear=("prepare",))
    run(experiment, "corpus", text="one")  # as it was when prepare was done
    assert not experiment.is_done("prepare", ("corpus",))


def test_two_folders_with_the_same_results_have_the_same_records_and_hashes(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a"), make(tmp_path / "b" / "c")
    for experiment in (first, second):
        run(experiment, "corpus", text="one")
        run(experiment, "prepare", ("corpus",), text="two")
    assert first.hashes() == second.hashes()
    assert list(first.hashes()) == ["corpus/result.txt", "prepare/result.txt"]
    assert first.hashes()["corpus/result.txt"] == hash_file(first.path("corpus", "result.txt"))
    for step in ("corpus", "prepare"):
        name = f"steps/{step}.json"
        assert first.path(name).read_bytes() == second.path(name).read_bytes()
    run(second, "prepare", ("corpus",), text="three")
    assert first.hashes() != second.hashes()


def test_data_that_were_brought_along_are_recorded_without_the_place_where_they_lie(tmp_path: Path) -> None:
    data = tmp_path / "elsewhere"
    (data / "human").mkdir(parents=True)
    (data / "human" / "cuts").write_text("x")
    experiment = make(tmp_path / "exp", data=Data(folder=str(data)))
    experiment.begin("corpus", ())
    experiment.finish("corpus", [data / "human" / "cuts"])
    assert list(experiment.hashes()) == ["data/human/cuts"]


def test_a_reader_sees_the_old_text_or_the_new_and_no_other_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "old")
    write_text(tmp_path / "a", "new\n")
    write_json(tmp_path / "b", {"z": 1, "a": [2]})
    assert (tmp_path / "a").read_bytes() == b"new\n"
    assert json.loads((tmp_path / "b").read_text()) == {"a": [2], "z": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_hash_that_lies_beside_data_that_were_brought_along_is_not_believed(tmp_path: Path) -> None:
    brought = tmp_path / "data" / "lm.arpa.gz"
    brought.parent.mkdir()
    experiment = make(tmp_path / "exp", data=Data(folder=str(brought.parent)))
    brought.with_name("lm.arpa.gz.sha256").write_text(f"{'0' * 64}  lm.arpa.gz\n")
    brought.write_bytes(b"model")
    experiment.begin("corpus", ())
    experiment.finish("corpus", [brought])
    assert list(experiment.hashes().values()) == [hash_file(brought)]
