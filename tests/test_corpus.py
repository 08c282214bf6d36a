import hashlib
import json
import os
import re
import signal
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from lhotse import CutSet
from lhotse.qa import validate

from teacherstudent.config import Corpus
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.data.manifests import LABELLED_PARTS, PARTS, read_cuts, shard_paths
from teacherstudent.synthesis import corpus as step
from teacherstudent.synthesis.corpus import BACKGROUNDS, make_corpus
from teacherstudent.synthesis.grammar import Grammar, draw_sentence, list_words
from teacherstudent.synthesis.recording import Session, record, record_background
from teacherstudent.synthesis.speakers import draw_speakers

RATE = 16000
SETTINGS = Corpus(
    human_speakers=2,
    unlabelled_speakers=2,
    dev_speakers=1,
    test_speakers=1,
    human_minutes=0.5,
    unlabelled_minutes=0.5,
    dev_minutes=0.12,
    test_minutes=0.12,
    snr_db=(20.0, 5.0),
    shard_minutes=0.25,
    split=3,
    jobs=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("first") / "corpus"
    make_corpus(path, SETTINGS, RATE, seed=1)
    return path


def read_entries(folder: Path, part: str) -> Iterator[dict[str, Any]]:
    for path in shard_paths(folder, part):
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def read_audio(folder: Path, part: str, cut: dict[str, Any]) -> np.ndarray:
    samples, rate = soundfile.read(folder / part / cut["recording"]["sources"][0]["source"])
    assert rate == RATE
    return samples


def hash_files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def decibels(samples: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(samples)) + 1e-20))


def test_the_same_seed_gives_the_same_bits_in_another_folder_with_other_jobs_and_after_an_interruption(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again"
    settings = replace(SETTINGS, jobs=1)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(step, "_write_shards", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make_corpus(again, settings, RATE, seed=1)
    assert not again.exists()
    sessions = sorted((tmp_path / "again.partial" / "sessions").iterdir())
    sessions[0].unlink()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "again.partial").rglob("*.flac")}
    make_corpus(again, settings, RATE, seed=1)

    assert hash_files(again) == hash_files(folder)
    assert not (tmp_path / "again.partial").exists()
    anew = {
        path.parent.name
        for path, time in written.items()
        if (again / path.relative_to(tmp_path / "again.partial")).stat().st_mtime_ns != time
    }
    assert anew == {sessions[0].stem.removesuffix("-000")}  # the other sessions were not recorded again


def test_lhotse_reads_the_manifests_and_gives_them_back_as_they_are(folder: Path) -> None:
    for part in PARTS:
        for path in shard_paths(folder, part):
            given_back = [json.dumps(cut.to_dict(), sort_keys=True) for cut in CutSet.from_file(path)]
            lines = path.read_text(encoding="utf-8").splitlines()
            assert given_back == [json.dumps(json.loads(line), sort_keys=True) for line in lines]
            for cut in read_cuts(path):
                validate(cut)
                assert cut.load_audio().shape == (1, cut.num_samples)
                assert "/" not in cut.id


def test_ids_are_unique_in_the_whole_corpus(folder: Path) -> None:
    ids = [entry["id"] for part in PARTS for entry in read_entries(folder, part)]
    assert len(ids) == len(set(ids))


def test_no_speaker_is_in_two_parts_and_none_of_the_background_is_in_any(folder: Path) -> None:
    speakers = json.loads((folder / "speakers.json").read_text())
    spoken: dict[str, set[str]] = {
        part: {entry["custom"]["speaker"] for entry in read_entries(folder, part)} for part in PARTS
    }
    for part in PARTS:
        assert spoken[part] == {name for name, speaker in speakers.items() if speaker["part"] == part}
    kinds = {(who["variant"], who["accent"], who["rate"], who["pitch"]) for who in speakers.values()}
    assert len(kinds) == len(speakers) == 6 + len(BACKGROUNDS) * step.BACKGROUND_SPEAKERS


def test_nothing_in_the_unlabelled_part_says_what_was_said(folder: Path) -> None:
    for entry in read_entries(folder, "unlabelled"):
        assert entry["supervisions"] == []
        assert set(entry["custom"]) <= {"condition", "speaker", "noise"}
    withheld = [
        json.loads(line) for line in (folder / "withheld" / "unlabelled.jsonl").read_text().splitlines()
    ]
    assert [entry["id"] for entry in withheld] == [
        entry["id"] for entry in read_entries(folder, "unlabelled")
    ]
    everything = "".join(path.read_text() for path in shard_paths(folder, "unlabelled"))
    assert not any(entry["text"] in everything for entry in withheld)
    assert not any("text" in path.name for path in (folder / "unlabelled").rglob("*"))


def test_every_word_is_aligned_to_one_of_its_pronunciations(folder: Path) -> None:
    lexicon = Lexicon.read(folder / "lexicon.txt")
    for part in LABELLED_PARTS:
        for entry in read_entries(folder, part):
            (supervision,) = entry["supervisions"]
            words, phones = supervision["alignment"]["word"], supervision["alignment"]["phone"]
            assert " ".join(word for word, *_ in words) == supervision["text"]
            spelled = []
            for word, start, duration, _ in words:
                own = [name for name, begin, _, _ in phones if start <= begin < start + duration - 1e-6]
                assert tuple(own) in lexicon.pronunciations[word]
                spelled += own
            assert spelled == [name for name, *_ in phones if name != SILENCE]


def test_phones_follow_each_other_from_the_first_to_the_last_sample(folder: Path) -> None:
    for part in LABELLED_PARTS:
        for entry in read_entries(folder, part):
            phones = entry["supervisions"][0]["alignment"]["phone"]
            starts = np.array([start for _, start, _, _ in phones])
            durations = np.array([duration for _, _, duration, _ in phones])
            assert starts[0] == 0
            assert np.allclose(starts[1:], (starts + durations)[:-1], atol=1e-9)
            assert starts[-1] + durations[-1] == pytest.approx(entry["duration"], abs=1e-3)
            assert durations.min() > 0.029
            assert phones[0][0] == phones[-1][0] == SILENCE
            assert 0.1 <= durations[0] <= 0.31
            assert 0.1 <= durations[-1] <= 0.31


def test_silence_is_silent_and_speech_is_not(folder: Path) -> None:
    for part in LABELLED_PARTS:
        for entry in read_entries(folder, part):
            if entry["custom"]["condition"] != "clean":
                continue
            samples = read_audio(folder, part, entry)
            levels = defaultdict(list)
            for name, start, duration, _ in entry["supervisions"][0]["alignment"]["phone"]:
                piece = samples[round(start * RATE) : round((start + duration) * RATE)]
                levels[name == SILENCE].append(decibels(piece))
            loudest = max(levels[False])
            assert max(levels[True]) < loudest - 40
            assert min(levels[False]) > loudest - 60


def test_recordings_are_not_clipped_and_neither_whispered_nor_shouted(folder: Path) -> None:
    for part in PARTS:
        for entry in read_entries(folder, part):
            samples = read_audio(folder, part, entry)
            assert 0.05 < np.abs(samples).max() < 0.951
            assert 1.0 < entry["duration"] < 6.0


@pytest.mark.parametrize("part", ["dev", "test"])
def test_every_sentence_of_dev_and_test_is_there_in_every_condition_at_the_stated_ratio(
    folder: Path, part: str
) -> None:
    takes: dict[str, dict[str, Any]] = defaultdict(dict)
    for entry in read_entries(folder, part):
        name, condition = entry["id"].rsplit("-", 1)
        assert condition == entry["custom"]["condition"]
        takes[name][condition] = entry
    for take in takes.values():
        assert set(take) == {"clean", "20dB", "5dB"}
        assert len({json.dumps(entry["supervisions"][0]["alignment"]) for entry in take.values()}) == 1
        clean = read_audio(folder, part, take["clean"])
        phones = take["clean"]["supervisions"][0]["alignment"]["phone"]
        spoken = slice(round(phones[1][1] * RATE), round(phones[-1][1] * RATE))
        for snr_db in (20, 5):
            noise = read_audio(folder, part, take[f"{snr_db}dB"]) - clean
            assert decibels(clean[spoken]) - decibels(noise) == pytest.approx(snr_db, abs=0.1)


def test_minutes_are_reached_and_hardly_exceeded(folder: Path) -> None:
    for part in PARTS:
        clean = [
            entry["duration"]
            for entry in read_entries(folder, part)
            if part in ("human", "unlabelled") or entry["custom"]["condition"] == "clean"
        ]
        wanted = 60 * getattr(SETTINGS, f"{part}_minutes")
        assert wanted <= sum(clean) <= wanted + 5 * getattr(SETTINGS, f"{part}_speakers")


def test_shards_are_as_long_as_asked_for_and_speakers_are_mixed_in_them(folder: Path) -> None:
    assert len(shard_paths(folder, "human")) == 2
    for path in shard_paths(folder, "human"):
        entries = list(map(json.loads, path.read_text().splitlines()))
        assert sum(entry["duration"] for entry in entries) == pytest.approx(60 * 0.25, abs=5)
        speakers = [entry["custom"]["speaker"] for entry in entries]
        assert len(set(speakers)) == 2
        assert speakers != sorted(speakers)


def test_the_lexicon_and_the_text_for_the_language_model_have_every_word_of_the_grammar(folder: Path) -> None:
    lexicon = Lexicon.read(folder / "lexicon.txt")
    text = (folder / "lm_text.txt").read_text().splitlines()
    assert lexicon.words == list_words()
    assert {word for line in text for word in line.split()} == set(list_words())
    assert 35 <= len(lexicon.phones) <= 50
    assert max(map(len, lexicon.pronunciations.values())) <= 5
    assert ("T", "EH", "N") in lexicon.pronunciations["ten"]
    assert len(text) == step.LM_SENTENCES


def test_what_is_said_in_the_grammar_corpus_is_what_it_always_was(folder: Path) -> None:
    """Other versions of the step make the same corpus; its audio may differ in last bits from machine to machine."""
    files = hash_files(folder)
    assert files["lexicon.txt"] == "c3cbeed5b6b3c2eac1a07383cddb4813ac4909ef7a6f0f112511b16f6ed4d5d1"
    assert files["lm_text.txt"] == "969dbc018d50de3097c331653bee42b1c5ba3a1013146c71803c36733ce7d173"
    assert set(files) >= {"settings.json", "speakers.json", "withheld/unlabelled.jsonl"}
    assert "report.json" not in files


@pytest.fixture(scope="module")
def session(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """One of a human speaker's, in a folder of its own."""
    own = tmp_path_factory.mktemp("session")
    (own / "lexicon.txt").write_bytes((folder / "lexicon.txt").read_bytes())
    (own / "sessions").mkdir()
    speakers = draw_speakers({"human": 4}, split=0)
    np.save(
        own / "voices.npy", np.stack([record_background(who, Grammar(), 8000, 0, 0) for who in speakers[1:]])
    )
    return Session(
        speaker=speakers[0],
        sentences=Grammar(),
        stress=False,
        number=0,
        seconds=10.0,
        labelled=True,
        every_condition=False,
        noisy_share=1.0,
        snr_db=(10.0,),
        sampling_rate=8000,
        seed=0,
        split=0,
        voices=own / "voices.npy",
        folder=own,
    )


def record_texts(session: Session) -> list[tuple[str, str]]:
    record(session)
    entries = [json.loads(line) for line in session.path.read_text().splitlines()]
    session.path.unlink()
    return [(entry["text"], entry["cut"]["custom"]["condition"]) for entry in entries]


def test_another_seed_and_another_split_give_other_sentences(session: Session) -> None:
    first = record_texts(session)
    assert record_texts(session) == first
    assert record_texts(replace(session, seed=1)) != first
    assert record_texts(replace(session, split=1)) != first


def test_all_none_or_some_utterances_are_noisy_as_the_share_says(session: Session) -> None:
    assert {condition for _, condition in record_texts(session)} == {"10dB"}
    assert {condition for _, condition in record_texts(replace(session, noisy_share=0.0))} == {"clean"}
    some = record_texts(replace(session, noisy_share=0.5, seconds=60.0))
    assert 0.2 < np.mean([condition == "clean" for _, condition in some]) < 0.8


def test_a_corpus_that_is_there_is_left_alone_and_another_is_not_mistaken_for_it(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    make_corpus(folder, replace(SETTINGS, jobs=5), RATE, seed=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    with pytest.raises(ValueError, match="no corpus of these settings"):
        make_corpus(folder, SETTINGS, RATE, seed=2)


def test_a_process_that_is_killed_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "ACCENTS", ["en-us"])  # enough for a lexicon
    monkeypatch.setattr(step, "record_background", end_process)
    with pytest.raises(ValueError, match="a process ended before its work did: too little memory for 2"):
        make_corpus(tmp_path / "corpus", SETTINGS, RATE, seed=1)
    assert re.search(r"lexicon: 100%\|.*\| (\d\.\d\d)/\1 h", capsys.readouterr().err)  # what came before it


def end_process(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_without_the_synthesiser_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    with pytest.raises(ValueError, match=r"pip install 'teacherstudent\[corpus\]'"):
        make_corpus(tmp_path / "corpus", SETTINGS, RATE, seed=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "corpus.text = '': it must be 'grammar', 'pseudo-words' or the path"),
        ({"vocabulary": 0}, "corpus.vocabulary = 0: it must be >= 1"),
        ({"human_speakers": 0}, "corpus.human_speakers = 0: it must be >= 1"),
        ({"jobs": 0}, "corpus.jobs = 0"),
        ({"test_minutes": 0.0}, "corpus.test_minutes = 0.0: it must be > 0"),
        ({"dev_minutes": float("nan")}, "corpus.dev_minutes = nan"),
        ({"shard_minutes": float("inf")}, "corpus.shard_minutes = inf"),
        ({"noisy_share": 1.5}, r"corpus.noisy_share = 1.5: it must be in \[0, 1\]"),
        ({"snr_db": ()}, r"corpus.snr_db = \[\]: it must be one or more"),
        ({"snr_db": (10.0, 10.0)}, "different numbers"),
        ({"snr_db": (float("inf"),)}, "finite"),
        ({"split": -1}, "corpus.split = -1"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **change)
    assert replace(SETTINGS, snr_db=(), noisy_share=0.0).snr_db == ()


def test_what_cannot_be_made_is_refused_before_anything_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="too many"):
        make_corpus(tmp_path / "corpus", replace(SETTINGS, unlabelled_speakers=10**6), RATE, seed=0)
    with pytest.raises(ValueError, match="seed = -1: it must be >= 0"):
        make_corpus(tmp_path / "corpus", SETTINGS, RATE, seed=-1)
    with pytest.raises(ValueError, match=r"corpus.text = 'grammer': it must be .* there is no such file"):
        make_corpus(tmp_path / "corpus", replace(SETTINGS, text="grammer"), RATE, seed=0)
    assert not (tmp_path / "corpus").exists()


def test_the_sentences_of_the_language_model_are_not_those_that_are_spoken(folder: Path) -> None:
    text = (folder / "lm_text.txt").read_text().splitlines()
    spoken = [entry["supervisions"][0]["text"] for entry in read_entries(folder, "human")]
    assert text[: len(spoken)] != spoken
    assert draw_sentence(np.random.default_rng(0)) == draw_sentence(np.random.default_rng(0))
