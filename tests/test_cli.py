"""The first error a newcomer meets is kind: it says what was got, what is needed, and what to do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import ROOT, TINY, teacherstudent

from teacherstudent import cli


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The message of a command that must fail with status 2."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr().err
    _, start, message = f"\n{printed}".partition("\nteacherstudent: ")  # on a line of its own
    assert start
    assert "Traceback" not in printed
    return message


def test_an_old_python_is_told_which_one_is_needed() -> None:
    code = "import sys; sys.version_info = (3, 10, 1, 'final', 0); import teacherstudent"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode != 0
    assert "needs Python 3.11 or newer, this is 3.10" in done.stderr


def test_make_with_an_old_python_says_which_one_is_needed(tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1"\nexit 1\n')
    old.chmod(0o755)
    for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    done = subprocess.run(["make", f"PYTHON={old}", "install"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed" in done.stdout
    assert "Python 3.9.1" in done.stdout


def test_a_missing_configuration_is_named_with_one_to_start_from(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "run", "nowhere.toml")
    assert "nowhere.toml" in message
    assert "examples/smoke/smoke.toml" in message


def test_a_typo_in_a_key_names_the_nearest_key(capsys: pytest.CaptureFixture[str]) -> None:
    message = error_of(capsys, "run", TINY, "teacher.schedule.stpes=10")
    assert "'teacher.schedule.stpes'" in message
    assert "'steps'" in message


def test_a_step_that_does_not_exist_lists_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tran", str(TINY)])
    message = capsys.readouterr().err
    assert all(f"'{step}'" in message or step in message for step in cli.STEPS)


def test_a_missing_data_folder_is_named_with_what_it_should_hold(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = error_of(capsys, "run", TINY, f"folder={tmp_path / 'exp'}", f"data.folder={tmp_path / 'none'}")
    assert str(tmp_path / "none") in message
    assert "lexicon.txt" in message


def test_a_step_before_its_turn_names_the_step_that_is_missing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = error_of(capsys, "teacher", TINY, f"folder={tmp_path / 'exp'}")
    assert "prepare" in message
    assert "teacherstudent run" in message


def test_a_folder_of_another_configuration_is_refused_naming_the_setting(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_experiment: Path
) -> None:
    shutil.copytree(tiny_experiment, tmp_path / "exp")
    message = error_of(capsys, "run", TINY, f"folder={tmp_path / 'exp'}", "seed=17")
    assert "seed: 0 there, 17 now" in message


def test_an_unknown_student_is_refused_with_the_names_of_those_there_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = error_of(capsys, "student", TINY, f"folder={tmp_path / 'exp'}", "student.only=gct")
    assert "human-only, gtc, bmuf" in message


@pytest.fixture
def own_data(tmp_path: Path, tiny_experiment: Path) -> Path:
    """The tiny corpus as a user's own data, to be spoiled."""
    return Path(shutil.copytree(tiny_experiment / "corpus", tmp_path / "data"))


def first_cut(data: Path) -> tuple[Path, list[dict]]:
    path = data / "human" / "cuts.000000.jsonl"
    return path, [json.loads(line) for line in path.read_text().splitlines()]


def test_audio_that_is_not_there_is_named_with_its_cut(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own_data: Path
) -> None:
    _, cuts = first_cut(own_data)
    source = cuts[0]["recording"]["sources"][0]["source"]
    (own_data / "human" / source).unlink()
    settings = (f"folder={tmp_path / 'exp'}", f"data.folder={own_data}", "features.max_left_out_share=0")
    message = error_of(capsys, "prepare", TINY, *settings)
    assert cuts[0]["id"] in message
    assert source in message


def test_audio_of_another_sampling_rate_is_named_where_it_is_not_to_be_resampled(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own_data: Path
) -> None:
    path, cuts = first_cut(own_data)
    recording = cuts[0]["recording"]
    num_samples = round(recording["duration"] * 44100)
    soundfile.write(own_data / "human" / recording["sources"][0]["source"], np.zeros(num_samples), 44100)
    recording |= {"sampling_rate": 44100, "num_samples": num_samples}
    path.write_text("".join(json.dumps(cut) + "\n" for cut in cuts))
    settings = (f"folder={tmp_path / 'exp'}", f"data.folder={own_data}", "features.max_left_out_share=0")
    message = error_of(capsys, "prepare", TINY, *settings, "features.resample=false")
    assert cuts[0]["id"] in message
    assert "44100" in message
    assert "features.resample" in message


@pytest.mark.parametrize(
    "setting, message",
    [
        ("align.unknown_word=unheard-of", "align.unknown_word = 'unheard-of' is not in the lexicon"),
        ("data.lexicon=LEXICON", "line 1: word 'mute' has no phones"),
        ("align.folder=nowhere", "align.folder = 'nowhere': there is no such folder"),
    ],
)
def test_what_align_would_refuse_is_refused_before_features_are_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, own_data: Path, setting: str, message: str
) -> None:
    (tmp_path / "mute.txt").write_text("mute\n")
    setting = setting.replace("LEXICON", str(tmp_path / "mute.txt"))
    source = "align.source=ctm" if "folder" in setting else "align.source=transcripts"
    settings = (f"folder={tmp_path / 'exp'}", f"data.folder={own_data}", source, setting)
    assert message in error_of(capsys, "run", TINY, *settings)
    assert not (tmp_path / "exp" / "features").exists()


def test_a_folder_that_cannot_be_made_is_named_by_its_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert "folder = '/proc/none' cannot be written" in error_of(capsys, "run", TINY, "folder=/proc/none")


def test_only_the_configuration_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["run"])
    assert "arguments are required: CONF.TOML\n" in capsys.readouterr().err


def test_a_dry_run_prints_parameters_and_schedule_and_starts_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["run", str(TINY), f"folder={tmp_path / 'exp'}", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "M parameters" in printed
    assert "student gtc" in printed
    assert "mmhmmhmmh" in printed
    assert not (tmp_path / "exp").exists()


def test_a_dry_run_counts_the_workers_that_a_student_has_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["run", str(TINY), f"folder={tmp_path / 'exp'}", "student.variants.gtc.workers=20", "--dry-run"]
    assert cli.main(words) == 0
    blocks = capsys.readouterr().out.split("\n\n")
    of = {block.splitlines()[0]: block for block in blocks}
    assert "workers     20 in this process" in of["student gtc"]
    assert "at most 0.8 hours of audio" in of["student gtc"]  # 16 steps x 300 frames of 30 ms x 20
    for name in ("teacher", "student bmuf"):
        assert "workers     2 in this process" in of[name]


@pytest.mark.parametrize(("name", "begins"), [("plan.png", b"\x89PNG"), ("deep/plan.svg", b"<?xml")])
def test_a_dry_run_draws_the_schedule_the_same_every_time(tmp_path: Path, name: str, begins: bytes) -> None:
    pytest.importorskip("matplotlib")
    words = ["student", str(TINY), f"folder={tmp_path / 'exp'}", "--dry-run", "--draw"]
    drawn = []
    for number in range(2):
        path = tmp_path / str(number) / name
        assert cli.main([*words, str(path)]) == 0
        drawn.append(path.read_bytes())
    assert drawn[0].startswith(begins)
    assert drawn[0] == drawn[1]
    assert not (tmp_path / "exp").exists()


def test_a_picture_needs_a_dry_run_and_a_suffix_that_is_known(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    assert "add --dry-run" in error_of(capsys, "student", TINY, "--draw", str(tmp_path / "plan.png"))
    assert ".png, .svg or .pdf" in error_of(
        capsys, "student", TINY, "--dry-run", "--draw", str(tmp_path / "plan")
    )
    assert not any(tmp_path.iterdir())


def test_the_tree_of_a_phone_is_drawn_and_kaldis_files_are_written_wherever_the_options_stand(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_experiment: Path
) -> None:
    folder = f"folder={tiny_experiment}"
    assert cli.main(["senones", str(TINY), "--show", "AE", folder]) == 0
    drawn = capsys.readouterr().out
    assert drawn.startswith("AE, first frame")
    assert cli.main(["senones", "--show", "AE", str(TINY), folder, "--kaldi", str(tmp_path / "kaldi")]) == 0
    assert capsys.readouterr().out.startswith(drawn)
    assert {path.name for path in (tmp_path / "kaldi").iterdir()} == {"tree", "topo", "phones.txt"}
    assert "nearest is 'AE'" in error_of(capsys, "senones", TINY, "--show", "AEE", folder)


def test_the_steps_of_the_help_are_those_that_run() -> None:
    done = teacherstudent("--help")
    assert done.returncode == 0
    for step in cli.STEPS:
        assert f"\n    {step} " in done.stdout
