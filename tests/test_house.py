"""The papers of the house are true: commands parse, links lead somewhere, limits on size hold."""

import ast
import configparser
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from teacherstudent import cli, config

PAPERS = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
SOURCES = [path for folder in ("teacherstudent", "distributed", "examples", "benchmarks") for path in
           sorted((ROOT / folder).glob("**/*.py")) if "teacherstudent/distributed" not in path.as_posix()]  # fmt: skip


def commands() -> list[tuple[str, str]]:
    """(paper, command) of every line in a sh block of the papers; papers by their path in the checkout."""
    found = []
    for paper in PAPERS:
        for block in re.findall(r"```sh\n(.*?)```", paper.read_text(encoding="utf-8"), re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            name = paper.relative_to(ROOT).as_posix()
            found += [(name, line.strip()) for line in lines if line.strip()]
    return found


def dry_run(words: list[str], folder: Path) -> None:
    """Check one command of a paper in `folder` without starting its work."""
    while "=" in words[0] and not words[0].startswith("="):
        words = words[1:]  # an environment variable set for the command
    name, rest = Path(words[0]).name, words[1:]
    if name == "make":
        done = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    elif name in ("torchrun", "mpirun", "srun"):
        start = next(i for i, word in enumerate(rest) if word in ("python", "-m") or word.endswith(".py"))
        dry_run(rest[start:] if rest[start] == "python" else ["python", *rest[start:]], folder)
    elif name in ("torchrun.sh", "mpirun.sh", "slurm.sh"):
        script = ROOT / "launch" / name
        assert os.access(script, os.X_OK)
        assert int(rest[0]) > 0
        dry_run(["teacherstudent", *rest[1:]], folder)
    elif name.startswith("python") and rest[0] == "-m":
        assert rest[1] == "teacherstudent"
        dry_run(["teacherstudent", *rest[2:]], folder)
    elif name.startswith("python"):
        assert (ROOT / rest[0]).is_file()
    elif name == "teacherstudent":
        dry_run_step(rest, folder)
    elif name == "pip":
        check_extras(rest)
    elif name == "grep":
        done = subprocess.run(words[: words.index(">")], cwd=ROOT, capture_output=True, text=True)
        assert 0 < done.stdout.count("\n") < (ROOT / rest[-3]).read_text().count("\n")
    elif name in ("lhotse", "wget", "mkdir", "ln", "echo"):
        assert folder.parent == ROOT / "examples"  # tests/test_recipes.py runs what its papers say
    else:
        raise AssertionError(f"no way to check a command that starts with {words[0]}")


def dry_run_step(words: list[str], folder: Path) -> None:
    """The settings are those of the checkout, or those beside the paper, which its reader has copied."""
    options = cli.parse(words)
    if options.step != "store":
        settings = next(path for path in (ROOT / options.config, folder / options.config) if path.is_file())
        resolved = config.load(settings, options.overrides)
        only = resolved.student.only
        assert not only or only in resolved.student_variants()
    if getattr(options, "dry_run", False):
        assert cli.main([*words[:1], str(settings), *words[2:]]) == 0


def check_extras(words: list[str]) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    named = re.findall(r"\[([\w,]+)\]", " ".join(words))
    assert set(",".join(named).split(",")) <= set(setup["options.extras_require"])


@pytest.mark.parametrize(("paper", "command"), commands())
def test_every_command_of_the_papers_parses(
    paper: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a drawing lands there
    words = shlex.split(command, comments=True)
    if words:
        dry_run(words, (ROOT / paper).parent)


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: path.name)
def test_every_link_of_the_papers_leads_somewhere(paper: Path) -> None:
    text = paper.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w\- ]", "", line.lstrip("# ")).strip().lower().replace(" ", "-")
                for line in text.splitlines() if line.startswith("#")}  # fmt: skip
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, f"{paper.name} has no heading {target}"
        elif "://" not in target:
            assert (paper.parent / target.split("#")[0]).exists(), f"{paper.name} links to {target}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 50, f"{node.name} is too long"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("0*.py")), ids=lambda path: path.name)
def test_the_numbered_examples_fit_in_60_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60


def test_every_setting_of_the_smoke_experiment_is_known() -> None:
    config.load(ROOT / "examples" / "smoke" / "smoke.toml")
