"""The recipes of examples/: the commands of their READMEs, on tiny corpora in the same folders, up to word errors."""

import gzip
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
import recipe_data as tiny
from conftest import ROOT
from lhotse.bin.modes import download

from teacherstudent import config
from teacherstudent.data.packed import open_shards

TINY = (
    "features.jobs=1", "align.jobs=1", "senones.jobs=1", "decode.jobs=1",
    "align.monophone_gaussians=120", "align.monophone_iterations=10",
    "align.triphone_leaves=60", "align.triphone_gaussians=150", "align.triphone_iterations=5",
    "senones.target=80", "senones.min_count=5", "senones.min_gain=5",
    "teacher.network.layers=1", "teacher.network.cells=48", "teacher.optimisation.batch_frames=300",
    "teacher.schedule.steps=80", "teacher.schedule.validate_every_steps=40", "teacher.schedule.warmup_steps=5",
    "student.network.layers=1", "student.network.cells=48", "student.optimisation.batch_frames=300",
    "student.schedule.steps=120", "student.schedule.validate_every_steps=60", "student.schedule.warmup_steps=5",
    "decode.acoustic_scales=[0.5]", "decode.beam=10", "decode.bootstrap_samples=100", "decode.speed_seconds=0",
)  # fmt: skip


def shell_commands(recipe: str, heading: str = "") -> list[str]:
    """Of the first sh block of the recipe's README after the heading."""
    text = (ROOT / "examples" / recipe / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```sh\n(.*?)```", text[text.index(heading) :], re.DOTALL)
    assert block is not None
    return block[1].splitlines()


def run_commands(lines: Sequence[str], folder: Path, overrides: Sequence[str] = ()) -> str:
    """Run them one after the other in a folder that stands for the user's; returns what they printed.

    `overrides` go to teacherstudent. What would be downloaded must be there already; lhotse parses its commands.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    printed = ""
    for line in lines:
        if line.startswith("wget "):
            assert (folder / "corpora" / Path(shlex.split(line)[-1]).name).is_file()
        elif line.startswith("lhotse download "):
            recipe, *arguments = line.split()[2:]
            parsed = download.commands[recipe].make_context(recipe, arguments)
            assert parsed.params["target_dir"] == "corpora"
        else:
            command = (
                shlex.join([*shlex.split(line), *overrides]) if line.startswith("teacherstudent ") else line
            )
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
            printed += done.stdout
    return printed


def read_lines(paths: Iterable[Path]) -> list[dict]:
    return [
        json.loads(line) for path in sorted(paths) for line in path.read_text(encoding="utf-8").splitlines()
    ]


def read_cuts(folder: Path, part: str) -> list[dict]:
    return read_lines((folder / part).glob("cuts.*.jsonl"))


def read_results(experiment: Path) -> dict:
    return json.loads((experiment / "evaluate" / "results.json").read_text())


# -- LibriSpeech ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder after every command of the recipe."""
    folder = tmp_path_factory.mktemp("librispeech")
    (folder / "examples").symlink_to(ROOT / "examples")
    subsets = {
        "train-clean-5": tiny.speak(8, 10, unknown=True),
        "dev-clean-2": tiny.speak(4, 4, first_speaker=84),
    }
    tiny.write_librispeech(folder / "corpora" / "LibriSpeech", subsets)
    tiny.write_lexicon(folder / "corpora" / "librispeech-lexicon.txt")
    tiny.write_language_model(folder / "corpora" / "3-gram.pruned.3e-7.arpa.gz")
    run_commands(shell_commands("librispeech", "## mini"), folder, TINY)
    return folder


def transcripts(folder: Path, subset: str) -> dict[str, str]:
    """Read from the corpus itself."""
    lines = [line for path in (folder / "corpora" / "LibriSpeech" / subset).rglob("*.trans.txt")
             for line in path.read_text().splitlines()]  # fmt: skip
    return dict(line.split(maxsplit=1) for line in lines)


def test_every_utterance_is_in_one_part_and_every_speaker_too(mini: Path) -> None:
    parts = {
        part: read_cuts(mini / "corpora" / "mini", part) for part in ("human", "unlabelled", "dev", "test")
    }
    ids = {part: [cut["id"] for cut in cuts] for part, cuts in parts.items()}
    assert sorted(ids["human"] + ids["unlabelled"]) == sorted(transcripts(mini, "train-clean-5"))
    assert sorted(ids["dev"] + ids["test"]) == sorted(transcripts(mini, "dev-clean-2"))
    speakers = {part: {cut["custom"]["speaker"] for cut in cuts} for part, cuts in parts.items()}
    assert {part: len(names) for part, names in speakers.items()} == {
        "human": 2, "unlabelled": 6, "dev": 2, "test": 2
    }  # fmt: skip
    assert len(set.union(*speakers.values())) == 12
    assert ids["unlabelled"] != sorted(ids["unlabelled"])  # neighbours in a shard are of many speakers


def test_labelled_parts_have_their_transcripts_and_withheld_ones_are_nowhere(mini: Path) -> None:
    said = transcripts(mini, "train-clean-5") | transcripts(mini, "dev-clean-2")
    for part in ("human", "dev", "test"):
        for cut in read_cuts(mini / "corpora" / "mini", part):
            assert cut["supervisions"][0]["text"] == said[cut["id"]]
    withheld = {said[cut["id"]].encode() for cut in read_cuts(mini / "corpora" / "mini", "unlabelled")}
    assert len(withheld) == 60
    files = [
        path
        for place in ("corpora/mini", "experiments")
        for path in (mini / place).rglob("*")
        if path.is_file()
    ]
    assert any(path.suffix == ".h5" for path in files)
    for path in files:
        contents = path.read_bytes()
        assert not any(text in contents for text in withheld), path


def test_a_word_that_the_lexicon_lacks_is_aligned_as_noise_and_nothing_is_dropped(mini: Path) -> None:
    experiment = mini / "experiments" / "librispeech-mini"
    phones: set[str] = set()
    for part, count in (("human", 20), ("dev", 8), ("test", 8)):
        shards = open_shards(experiment / "align" / part, "phones")
        assert sum(len(shard.ids) for shard in shards) == count
        for shard in shards:
            for name in shard.ids:
                names = [shard.header["phones"][phone - 1] for phone in shard[name]["phone"]]
                said = name.endswith("0009") and part == "human"
                assert ("SPN_S" in names) == said, name
                phones |= set(names)
    assert {"SIL", "K_B", "IH1_I", "NG_E"} <= phones


def test_the_table_of_word_error_rates_has_a_row_for_each_subset(mini: Path) -> None:
    systems = read_results(mini / "experiments" / "librispeech-mini")["systems"]
    assert set(systems) == {"teacher", "human-only-final", "human-only-early", "gtc"}
    for name, system in systems.items():
        assert set(system["by"]["subset"]) == {"dev-clean-2"}, name
        row = system["by"]["subset"]["dev-clean-2"]
        assert (row["utterances"], row["words"]) == (8, 48)
        assert row["word_error_rate"] == system["conditions"]["all"]["word_error_rate"] < 100, name
    assert systems["teacher"]["conditions"]["all"]["word_error_rate"] < 70


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both preparations of the recipe, of seven subsets with a speaker each."""
    folder = tmp_path_factory.mktemp("full")
    (folder / "examples").symlink_to(ROOT / "examples")
    names = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean",
             "test-other")  # fmt: skip
    subsets = {name: tiny.speak(1, 2, first_speaker=100 + index) for index, name in enumerate(names)}
    tiny.write_librispeech(folder / "corpora" / "LibriSpeech", subsets)
    commands = [line for line in shell_commands("librispeech", "## full") if not line.startswith("launch/")]
    run_commands(commands, folder)
    return folder


def test_all_of_librispeech_is_dealt_by_subset(full: Path) -> None:
    found = {
        part: sorted(
            (cut["custom"]["subset"], bool(cut["supervisions"]))
            for cut in read_cuts(full / "corpora/full", part)
        )
        for part in ("human", "unlabelled", "dev", "test")
    }
    assert found == {
        "human": [("train-clean-100", True)] * 2,
        "unlabelled": [("train-clean-360", False)] * 2 + [("train-other-500", False)] * 2,
        "dev": [("dev-clean", True)] * 2 + [("dev-other", True)] * 2,
        "test": [("test-clean", True)] * 2 + [("test-other", True)] * 2,
    }


def test_the_split_is_the_same_again_and_says_what_it_lacks(
    full: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(full)
    monkeypatch.syspath_prepend(ROOT / "examples" / "librispeech")
    split = importlib.import_module("split")

    def say(size: str, status: int) -> str:
        assert split.main([size, "corpora"]) == status
        return capsys.readouterr().err

    assert "corpora/full is there" in say("full", status=2)
    assert "librispeech_recordings_train-clean-5.jsonl.gz" in say("mini", status=2)
    before = {path.name: path.read_bytes() for path in Path("corpora/full/unlabelled").iterdir()}
    Path("corpora/full").rename("corpora/before")
    say("full", status=0)
    assert {path.name: path.read_bytes() for path in Path("corpora/full/unlabelled").iterdir()} == before
    Path("corpora/full").rename("corpora/again")
    manifest = Path("corpora/manifests/librispeech_supervisions_test-other.jsonl.gz")
    lines = gzip.decompress(manifest.read_bytes()).splitlines(keepends=True)
    for kept in (lines[:1], lines[::-1]):
        manifest.write_bytes(gzip.compress(b"".join(kept)))
        assert "not of one preparation" in say("full", status=2)
    manifest.write_bytes(gzip.compress(b"".join(lines)))
    next(Path("corpora/LibriSpeech/test-other").rglob("*.flac")).unlink()
    assert "no audio at corpora/LibriSpeech/test-other/" in say("full", status=2)
    assert not Path("corpora/full").exists()


# -- Kaldi ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken() -> dict[str, list[tiny.Utterance]]:
    return {
        "train": tiny.speak(3, 10, unknown=True),
        "unlabelled": tiny.speak(2, 10, first_speaker=40),
        "dev": tiny.speak(2, 4, first_speaker=84),
        "test": tiny.speak(2, 4, first_speaker=88),
    }


@pytest.fixture(scope="module")
def kaldi(spoken: dict[str, list[tiny.Utterance]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Kaldi experiment's folder after the commands of the recipe."""
    folder = tmp_path_factory.mktemp("s5")
    for part, utterances in spoken.items():
        tiny.write_kaldi_data(folder / "data" / part, utterances, labelled=part != "unlabelled")
    for part, name in (("train", "tri3_ali"), ("dev", "tri3_ali_dev"), ("test", "tri3_ali_test")):
        tiny.write_kaldi_alignments(folder / "exp" / name, spoken[part])
    tiny.write_lexicon(
        folder / "data/local/dict/lexicon.txt", ("!SIL SIL", "<SPOKEN_NOISE> SPN", "<UNK> SPN")
    )
    tiny.write_language_model(folder / "data/local/lm/G.arpa.gz")
    (folder / "kaldi.toml").write_bytes((ROOT / "examples" / "kaldi" / "kaldi.toml").read_bytes())
    run_commands(shell_commands("kaldi", "## The commands"), folder, TINY)
    return folder


def test_the_frames_of_a_word_have_the_phones_that_kaldi_gave_them(
    kaldi: Path, spoken: dict[str, list[tiny.Utterance]]
) -> None:
    experiment = kaldi / "experiments" / "kaldi"
    for part, name in (("human", "train"), ("dev", "dev"), ("test", "test")):
        shards = open_shards(experiment / "align" / part, "phones")
        found = {utterance: (shard, shard[utterance]) for shard in shards for utterance in shard.ids}
        assert set(found) == {utterance.id for utterance in spoken[name]}
        for utterance in spoken[name]:
            shard, arrays = found[utterance.id]
            middles = (np.array(utterance.starts[:-1]) + utterance.starts[1:]) / 2 / tiny.SAMPLING_RATE
            for word, frame in zip(utterance.words, (middles / 0.03).astype(int)):
                phone = shard.header["phones"][arrays["phone"][frame] - 1]
                assert phone[:-2] in tiny.PRONUNCIATIONS.get(word, "SPN").split(), (utterance.id, word)


def test_a_kaldi_experiment_gives_word_error_rates(kaldi: Path) -> None:
    systems = read_results(kaldi / "experiments" / "kaldi")["systems"]
    assert set(systems) == {"teacher", "human-only-final", "human-only-early", "gtc"}
    for name, system in systems.items():
        assert {speaker: row["utterances"] for speaker, row in system["by"]["speaker"].items()} == {
            "88": 4,
            "89": 4,
        }
        assert system["conditions"]["all"]["word_error_rate"] < 100, name
    assert systems["teacher"]["conditions"]["all"]["word_error_rate"] < 70


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*/*.toml")), ids=lambda path: path.name)
def test_every_setting_of_the_recipes_is_known(path: Path) -> None:
    config.load(path)
