"""The whole way: every step on the one before, the same contents everywhere, under every launcher."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, TINY, run, teacherstudent

from teacherstudent import cli
from teacherstudent.data.packed import open_shards
from teacherstudent.files import hash_file
from teacherstudent.store import TargetStore
from teacherstudent.tying.senones import Inventory

STUDENTS = ("human-only", "gtc", "bmuf")


def hashes(folder: Path) -> dict[str, str]:
    return json.loads((folder / "hashes.json").read_text())


def copy_without(experiment: Path, folder: Path, *steps: str) -> Path:
    """The experiment in another folder, as if these steps had not run."""
    shutil.copytree(experiment, folder)
    for step in steps:
        (folder / "steps" / f"{step}.json").unlink()
        shutil.rmtree(folder / step.replace("student-", "students/"), ignore_errors=True)
    return folder


def run_side_by_side(number: int, command: list[str]) -> None:
    """So many processes, which know nothing of each other."""
    processes = [
        subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(number)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


def test_run_leaves_a_report_word_error_rates_and_the_hash_of_every_artefact(tiny_experiment: Path) -> None:
    assert (tiny_experiment / "report.html").stat().st_size > 10_000
    systems = json.loads((tiny_experiment / "evaluate" / "results.json").read_text())["systems"]
    assert set(systems) == {"teacher", "human-only-final", "human-only-early", "gtc", "bmuf"}
    for system in systems.values():
        assert set(system["conditions"]) == {"all", "clean", "10dB"}
    listed = hashes(tiny_experiment)
    for name, value in listed.items():
        assert hash_file(tiny_experiment / name) == value
    for needed in ("corpus/human/cuts.000000.jsonl", "targets/targets.000000.h5", "evaluate/results.json"):
        assert needed in listed
    assert {f"students/{name}/best.pt" for name in STUDENTS} <= set(listed)


def test_the_same_experiment_in_another_folder_by_more_processes_has_the_same_contents(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    jobs = [f"{section}.jobs=2" for section in ("corpus", "features", "align", "senones", "decode")]
    done = teacherstudent("run", TINY, f"folder={tmp_path / 'else where'}", *jobs)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "else where") == hashes(tiny_experiment)


def test_no_artefact_tells_where_it_was_made(tiny_experiment: Path) -> None:
    place = str(tiny_experiment).encode()
    for name in hashes(tiny_experiment):
        assert place not in (tiny_experiment / name).read_bytes(), name


def test_shard_i_of_cuts_features_and_targets_hold_the_same_utterances_in_the_same_order(
    tiny_experiment: Path,
) -> None:
    features = open_shards(tiny_experiment / "features" / "unlabelled", "features")
    targets = TargetStore(tiny_experiment / "targets")
    cuts = sorted((tiny_experiment / "corpus" / "unlabelled").glob("cuts.*.jsonl"))
    assert len(features) == targets.num_shards == len(cuts) > 1
    for number, (path, values) in enumerate(zip(cuts, features)):
        names = tuple(json.loads(line)["id"] for line in path.read_text().splitlines())
        assert values.ids == targets.shard_ids(number) == names
        assert [len(ids) for _, ids, _ in targets.iter_shard(number)] == values.num_frames.tolist()


def test_targets_are_distributions_over_the_senones_of_the_inventory(tiny_experiment: Path) -> None:
    num_senones = Inventory.load(tiny_experiment / "senones" / "inventory.json").num_senones
    store = TargetStore(tiny_experiment / "targets")
    for name, ids, log_posteriors in store.iter_shard(0):
        assert ids.shape == log_posteriors.shape, name
        assert ids.min() >= 0
        assert ids.max() < num_senones
        assert np.allclose(np.exp(log_posteriors).sum(axis=1), 1, atol=1e-5)


def test_a_second_run_does_nothing_and_changes_nothing(
    tiny_experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_without(tiny_experiment, tmp_path / "again")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")}
    assert cli.main(["run", str(TINY), f"folder={folder}"]) == 0
    # The page alone is made every time.
    assert capsys.readouterr().out.count("done before") == 7 + len(STUDENTS)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.pt")} == before


def test_a_student_may_have_a_number_of_workers_of_its_own(tiny_experiment: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_experiment, tmp_path / "own", "student-gtc", "evaluate", "report")
    own = ["student.only=gtc", "student.variants.gtc.workers=3"]
    assert cli.main(["student", str(TINY), f"folder={folder}", *own]) == 0
    latest = folder / "students" / "gtc" / "checkpoint" / "latest.json"
    assert json.loads(latest.read_text(encoding="utf-8"))["num_workers"] == 3


@pytest.mark.parametrize("launcher", ["torchrun", "mpirun"])
@pytest.mark.parametrize("student", ["gtc", "bmuf"])
def test_a_launched_student_equals_the_one_trained_by_in_process_workers(
    tiny_experiment: Path, tmp_path: Path, launcher: str, student: str
) -> None:
    folder = copy_without(tiny_experiment, tmp_path / "launched", f"student-{student}", "evaluate", "report")
    script = ROOT / "launch" / f"{launcher}.sh"
    done = run([str(script), "2", "student", str(TINY), f"folder={folder}", f"student.only={student}"])
    assert done.returncode == 0, done.stderr
    for name in ("best.pt", "final.pt", "log.jsonl"):
        path = f"students/{student}/{name}"
        assert hash_file(folder / path) == hashes(tiny_experiment)[path]


def test_the_whole_run_under_torchrun_gives_the_same_contents(tiny_experiment: Path, tmp_path: Path) -> None:
    folder = tmp_path / "launched"
    done = run([str(ROOT / "launch" / "torchrun.sh"), "2", "run", str(TINY), f"folder={folder}"])
    assert done.returncode == 0, done.stderr
    assert hashes(folder) == hashes(tiny_experiment)


def test_processes_that_are_started_one_by_one_label_together_and_the_record_is_as_of_one(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    folder = copy_without(tiny_experiment, tmp_path / "together", "label")
    shutil.rmtree(folder / "targets")
    command = [sys.executable, "-m", "teacherstudent", "label", str(TINY), f"folder={folder}"]
    run_side_by_side(3, command)
    assert hashes(folder) == hashes(tiny_experiment)
    assert {path.name for path in (folder / "targets").iterdir()} == {
        path.name for path in (tiny_experiment / "targets").iterdir()
    }


def test_of_two_that_train_the_same_at_the_same_time_one_does_and_the_other_waits_for_it(
    tiny_experiment: Path, tmp_path: Path
) -> None:
    folder = copy_without(tiny_experiment, tmp_path / "twice", "teacher")
    command = [sys.executable, "-m", "teacherstudent", "teacher", str(TINY), f"folder={folder}"]
    run_side_by_side(2, command)
    assert hashes(folder) == hashes(tiny_experiment)
    started = [json.loads(line) for line in (folder / "log" / "steps.jsonl").read_text().splitlines()]
    before = (tiny_experiment / "log" / "steps.jsonl").read_text().count('"teacher"')
    assert sum(line["step"] == "teacher" for line in started) == before + 1


def test_an_error_of_one_launched_worker_ends_all_of_them(tiny_experiment: Path, tmp_path: Path) -> None:
    folder = copy_without(tiny_experiment, tmp_path / "broken", "student-gtc", "evaluate", "report")
    (folder / "targets" / "targets.000000.h5").write_bytes(b"not a store")
    done = run([str(ROOT / "launch" / "torchrun.sh"), "2", "student", str(TINY), f"folder={folder}"])
    assert done.returncode != 0
    assert "targets.000000.h5" in done.stderr


def run_killed_in(folder: Path, step: str, random: np.random.Generator) -> bool:
    """Start `run` and kill it, and all its processes, soon after it began a step, or that step is there from before.
    Returns whether it was still at work.
    """
    command = [sys.executable, "-m", "teacherstudent", "run", str(TINY), f"folder={folder}"]
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        record = folder / "steps" / f"{step}.json"
        while process.poll() is None and not record.exists():
            time.sleep(0.001)
        deadline = time.monotonic() + random.uniform(0, 0.7)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)  # the moment of the kill is what is random; nothing is waited for
        at_work = process.poll() is None
        if at_work:
            os.killpg(process.pid, signal.SIGKILL)
    return at_work


FEW = ("prepare", "student-gtc")
ALL = ("corpus", "prepare", "align", "senones", "teacher", "label", *(f"student-{name}" for name in STUDENTS))


@pytest.mark.parametrize(
    ("steps", "seed"),
    [(FEW, 0), *(pytest.param((*ALL, "evaluate"), seed, marks=pytest.mark.soak) for seed in (1, 2))],
)
def test_a_run_killed_in_the_midst_of_its_steps_ends_as_an_undisturbed_one(
    tiny_experiment: Path, tmp_path: Path, steps: Sequence[str], seed: int
) -> None:
    random = np.random.default_rng(seed)
    num_killed = sum(run_killed_in(tmp_path / "killed", step, random) for step in steps)
    assert num_killed == len(steps)
    done = teacherstudent("run", TINY, f"folder={tmp_path / 'killed'}")
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "killed") == hashes(tiny_experiment)


def test_a_word_more_in_the_lexicon_is_noticed_and_changes_no_feature(
    tmp_path: Path, tiny_experiment: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(shutil.copytree(tiny_experiment / "corpus", tmp_path / "data"))
    settings = [str(TINY), f"folder={tmp_path / 'exp'}", f"data.folder={data}"]
    for step in ("corpus", "prepare", "align", "senones"):
        assert cli.main([step, *settings]) == 0
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "exp" / "features").rglob("*.h5")}
    with (data / "lexicon.txt").open("a") as lexicon:
        lexicon.write("zebra Z EH B R AX\n")
    assert cli.main(["senones", *settings]) == 2
    refused = capsys.readouterr().err
    assert "'align' is out of date" in refused and "resources changed" in refused
    assert cli.main(["align", *settings]) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == made
