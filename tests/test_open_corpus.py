"""Corpora over an open vocabulary, and phones with stress and word position."""

import hashlib
import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

from teacherstudent.config import Corpus
from teacherstudent.data.lexicon import SILENCE, Lexicon, base_phones, mark_positions
from teacherstudent.data.manifests import LABELLED_PARTS, shard_paths
from teacherstudent.synthesis.corpus import make_corpus
from teacherstudent.synthesis.grammar import Grammar
from teacherstudent.synthesis.pronunciation import PHONES, STRESS, SYLLABIC, build_lexicon
from teacherstudent.synthesis.pseudo_words import make_pseudo_words
from teacherstudent.synthesis.recording import Session, count_accent, record
from teacherstudent.synthesis.speakers import ACCENTS, Speaker
from teacherstudent.synthesis.vocabulary import Vocabulary, make_vocabulary

RATE = 8000
PSEUDO = Corpus(
    text="pseudo-words",
    vocabulary=80,
    phones="position-stress",
    human_speakers=2,
    unlabelled_speakers=1,
    dev_speakers=1,
    test_speakers=1,
    human_minutes=1.0,
    unlabelled_minutes=0.1,
    dev_minutes=0.1,
    test_minutes=0.1,
    snr_db=(10.0,),
    shard_minutes=0.5,
    jobs=1,
)
# said as one, letter by letter, by sense, with an accent and in figures
ODD = [
    "the", "in", "of", "don't", "o'clock", "rock'n'roll", "x-ray", "bbc", "xyz", "www", "record", "live", "café", "3",
    "iPhone", "&", "hall",
]  # fmt: skip


@pytest.fixture(scope="module")
def pseudo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pseudo") / "corpus"
    make_corpus(path, PSEUDO, RATE, seed=1)
    return path


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    (folder / "words.txt").write_text("\n".join(ODD), encoding="utf-8")
    settings = replace(PSEUDO, text=str(folder / "words.txt"), vocabulary=len(ODD))
    make_corpus(folder / "corpus", settings, RATE, seed=1)
    return folder / "corpus"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One speaker's session with the sentences of the grammar, in one accent, and its lexicon."""
    folder = tmp_path_factory.mktemp("spoken")
    (folder / "sessions").mkdir()
    counts, unsaid = count_accent("en-us", Grammar(), stress=True)
    assert not unsaid
    build_lexicon(Counter(counts)).with_word_positions().write(folder / "lexicon.txt")
    np.save(folder / "voices.npy", np.ones((4, 8000), np.float32))
    session = Session(
        speaker=Speaker("human-000", "human", "f1", "en-us", 170, 50),
        sentences=Grammar(),
        stress=True,
        number=0,
        seconds=120.0,
        labelled=True,
        every_condition=False,
        noisy_share=0.0,
        snr_db=(),
        sampling_rate=RATE,
        seed=0,
        split=0,
        voices=folder / "voices.npy",
        folder=folder,
    )
    record(session)
    return folder


def supervisions(folder: Path) -> Iterator[dict[str, Any]]:
    """Of all labelled utterances of a corpus, or of a session."""
    for session in folder.glob("sessions/*.jsonl"):
        for line in session.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)["cut"]["supervisions"][0]
    for part in filter(lambda part: (folder / part / "cuts.000000.jsonl").exists(), LABELLED_PARTS):
        for path in shard_paths(folder, part):
            for line in path.read_text(encoding="utf-8").splitlines():
                yield json.loads(line)["supervisions"][0]


def hash_files(folder: Path) -> dict[str, str]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def ends_of_words(phones: list[str], words: list[str], lexicon: Lexicon) -> set[int]:
    """Where the words may end, said one after the other from the first phone on, silence anywhere between them."""
    places = {0}
    for word in [None, *words]:
        if word is not None:
            places = {
                place + len(several)
                for place in places
                for several in lexicon.pronunciations[word]
                if tuple(phones[place : place + len(several)]) == several
            }
        places |= {place + 1 for place in places if phones[place : place + 1] == [SILENCE]}
    return places


@pytest.mark.parametrize("corpus", ["pseudo", "listed", "spoken"])
def test_the_phones_of_an_utterance_are_pronunciations_of_its_words_with_silence_between(
    corpus: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(corpus)
    lexicon = Lexicon.read(folder / "lexicon.txt")
    found = list(supervisions(folder))
    for supervision in found:
        phones = [symbol for symbol, *_ in supervision["alignment"]["phone"]]
        words = [symbol for symbol, *_ in supervision["alignment"]["word"]]
        assert words == supervision["text"].split()
        assert len(phones) in ends_of_words(phones, words, lexicon), supervision["text"]
        assert len(phones) not in ends_of_words(phones[:-2] + phones[-1:], words, lexicon)
    assert len(found) > 15


def test_the_same_settings_give_the_same_bits_with_another_number_of_jobs(
    pseudo: Path, tmp_path: Path
) -> None:
    make_corpus(tmp_path / "again", replace(PSEUDO, jobs=2), RATE, seed=1)
    assert hash_files(tmp_path / "again") == hash_files(pseudo)
    with pytest.raises(ValueError, match="no corpus of these settings"):
        make_corpus(pseudo, replace(PSEUDO, vocabulary=81), RATE, seed=1)


@pytest.mark.parametrize("corpus", ["pseudo", "spoken"])
def test_vowels_carry_stress_and_all_phones_their_place_in_the_word(
    corpus: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(corpus)
    lexicon = Lexicon.read(folder / "lexicon.txt")
    for several in lexicon.pronunciations.values():
        for marked in several:
            bare = tuple(phone.rpartition("_")[0] for phone in marked)
            assert marked == mark_positions(bare)
            for phone in bare:
                stressed = re.fullmatch(r"([A-Z]+)([012]?)", phone)
                assert stressed is not None
                assert (stressed[1] in SYLLABIC) == bool(stressed[2])
                assert base_phones([phone]) == [stressed[1]]
    digits = {phone.rpartition("_")[0][-1] for phone in lexicon.phones}
    assert digits >= {"0", "1", "2"}


def test_every_accent_says_every_pseudo_word_as_it_was_made() -> None:
    vocabulary = make_vocabulary(150, seed=5)
    intended = {
        word.spelling: tuple(
            PHONES[phone.lstrip(STRESS)]
            + ({"'": "1", ",": "2"}.get(phone[0], "0") if PHONES[phone.lstrip(STRESS)] in SYLLABIC else "")
            for phone in word.phones
        )
        for word in make_pseudo_words(150, seed=5)
    }
    pairs = set()
    for accent in ACCENTS:
        counts, unsaid = count_accent(accent, vocabulary, stress=True)
        assert not unsaid
        assert {word for word, _ in counts} == set(vocabulary.words)
        as_made = sum(count for pair, count in counts.items() if intended[pair[0]] == pair[1])
        assert as_made > 0.6 * sum(counts.values())
        pairs |= set(counts)
    said = [tuple(phone.rstrip("012") for phone in phones) for _, phones in pairs]
    words_of = {phones: {word for (word, _), same in zip(pairs, said) if same == phones} for phones in said}
    assert all(len(words) == 1 for words in words_of.values())  # no two words are said alike, in any accent


def test_the_stress_of_words_said_as_one_does_not_keep_a_sentence_out(spoken: Path) -> None:
    entries = [
        json.loads(line) for path in spoken.glob("sessions/*") for line in path.read_text().splitlines()
    ]
    assert any("on the" in entry["text"] for entry in entries)
    assert sum(len(entry["left_out"]) for entry in entries) <= 0.03 * len(entries)


def test_hardly_any_sentence_is_left_out_and_the_report_counts_them(pseudo: Path, listed: Path) -> None:
    for folder in (pseudo, listed):
        report = json.loads((folder / "report.json").read_text())
        assert report["recorded"] > 20
        assert report["left_out"] == sum(report["words"].values())
    assert report["left_out"] < 0.3 * report["recorded"]
    assert json.loads((pseudo / "report.json").read_text())["left_out"] <= 2


def test_three_thousand_pseudo_words_need_160_phones_and_more() -> None:
    phones = set()
    for word in make_pseudo_words(3000, seed=0):
        ours = [PHONES[phone.lstrip(STRESS)] for phone in word.phones]
        stress = [{"'": "1", ",": "2"}.get(phone[0], "0") for phone in word.phones]
        phones |= set(mark_positions(tuple(p + (s if p in SYLLABIC else "") for p, s in zip(ours, stress))))
    assert len(phones) ** 3 > 4_000_000


def test_the_text_for_the_language_model_is_over_the_lexicon_and_none_of_what_is_said(pseudo: Path) -> None:
    lexicon = Lexicon.read(pseudo / "lexicon.txt")
    assert lexicon.words == sorted(make_vocabulary(80, seed=1).words)
    text = (pseudo / "lm_text.txt").read_text().splitlines()
    assert {word for line in text for word in line.split()} == set(lexicon.words)
    said = {supervision["text"] for supervision in supervisions(pseudo)}
    assert len(said & set(text)) < 0.2 * len(said)


def test_odd_words_of_a_list_are_said_somehow(listed: Path) -> None:
    pronunciations = Lexicon.read(listed / "lexicon.txt").pronunciations
    assert set(pronunciations) == set(ODD)
    bbc = {tuple(base_phones(phones)) for phones in pronunciations["bbc"]}
    assert bbc == {("B", "IY", "B", "IY", "S", "IY")}
    assert ("R_B", "OH1_I", "K_I", "N_I", "R_I", "OW0_I", "L_E") in pronunciations["rock'n'roll"]
    assert len(pronunciations["the"]) > 1


def test_a_list_made_elsewhere_is_known_by_its_words(listed: Path, tmp_path: Path) -> None:
    again = tmp_path / "other.txt"
    again.write_text("\n\n".join(ODD) + "\nand more words that are not counted\n", encoding="utf-8")
    before = hash_files(listed)
    settings = replace(PSEUDO, text=str(again), vocabulary=len(ODD))
    make_corpus(listed, settings, RATE, seed=1)
    assert hash_files(listed) == before
    again.write_text("\n".join(reversed(ODD)), encoding="utf-8")
    with pytest.raises(ValueError, match="no corpus of these settings"):
        make_corpus(listed, settings, RATE, seed=1)
    assert str(tmp_path) not in (listed / "settings.json").read_text()


def test_words_that_cannot_be_said_are_named(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("hall\nчай\nbread\n—\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 of the 4 words of .*words.txt") as refused:
        make_corpus(tmp_path / "corpus", replace(PSEUDO, text=str(path), vocabulary=4), RATE, seed=0)
    assert "'чай' is said with" in str(refused.value)
    assert "'—' is not said" in str(refused.value)
    assert not (tmp_path / "corpus").exists()


def test_a_list_that_is_shorter_than_the_vocabulary_is_told(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("—\n", encoding="utf-8")
    with (
        pytest.warns(UserWarning, match=r"corpus.vocabulary = 80, and .* has 1 words"),
        pytest.raises(ValueError, match="no pronunciation for 1 of the 1 words"),
    ):
        make_corpus(tmp_path / "corpus", replace(PSEUDO, text=str(path)), RATE, seed=0)


def test_a_word_that_an_accent_never_says_alone_is_missing_for_a_reason() -> None:
    counts, unsaid = count_accent("en", Vocabulary(("hall", "—")), stress=False)
    assert {word for word, _ in counts} == {"hall"}
    assert list(unsaid) == ["—"]


def test_the_census_of_the_benchmark_counts_every_frame_of_every_phone(pseudo: Path) -> None:
    spec = importlib.util.spec_from_file_location("senone_corpus", ROOT / "benchmarks" / "senone_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["senone_corpus"] = benchmark
    spec.loader.exec_module(benchmark)
    census = benchmark.take_census(pseudo)
    human = [line for path in shard_paths(pseudo, "human") for line in path.read_text().splitlines()]
    phones = [
        [(name, duration) for name, _, duration, _ in supervision["alignment"]["phone"]]
        for line in human
        for supervision in json.loads(line)["supervisions"]
    ]
    seconds = sum(duration for utterance in phones for name, duration in utterance if name != SILENCE)
    assert census.frames.total() * 0.03 == pytest.approx(seconds, rel=0.02)
    assert census.hours * 3600 == pytest.approx(
        sum(duration for utterance in phones for _, duration in utterance), rel=1e-4
    )
    triples = {
        (utterance[i - 1][0], utterance[i][0], utterance[i + 1][0])
        for utterance in phones
        for i in range(1, len(utterance) - 1)
        if utterance[i][0] != SILENCE
    }
    assert set(census.frames) == triples
    assert census.possible_triphones == len(Lexicon.read(pseudo / "lexicon.txt").phones) ** 3
    assert census.share_of_frames_in_rare(1) == 0
    assert census.share_of_frames_in_rare(10**9) == 1
    assert "triphones seen of" in "\n".join(benchmark.describe(census, None))
