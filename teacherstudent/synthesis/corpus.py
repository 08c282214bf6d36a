"""The `corpus` step: speech made by espeak-ng, with a lexicon, in the four parts of an experiment.

Speakers differ in voice, accent, rate and pitch, and no speaker is in two parts. The sentences come from a
voice-assistant grammar, or from an open vocabulary of pseudo-words or of a word list (corpus.text). Human-labelled
and unlabelled utterances are clean or noisy in the same shares; every development and test sentence is there clean
and at every signal-to-noise ratio. The noise is made: babble of background speakers who are in no part (and not the
same ones for training as for development and test), coloured noise, mains hum.

    lexicon.txt  lm_text.txt  speakers.json  settings.json
    {human,unlabelled,dev,test}/cuts.000000.jsonl …    {human,unlabelled,dev,test}/audio/SPEAKER/UTTERANCE.flac
    withheld/unlabelled.jsonl                          what was said in the unlabelled part, for studies
    report.json                                        open vocabulary: sentences that the lexicon did not cover

Everything follows from the settings and the seed: each session runs in a fresh synthesiser with its own
generators, so the number of jobs changes nothing.
"""

import dataclasses
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from teacherstudent import wheels
from teacherstudent.config import Corpus
from teacherstudent.data.manifests import DEV, HUMAN, PARTS, TEST, UNLABELLED
from teacherstudent.files import hash_text, write_json, write_text
from teacherstudent.processes import ProcessMap
from teacherstudent.progress import hours_bar
from teacherstudent.synthesis.espeak import EXTRA, WHEEL
from teacherstudent.synthesis.grammar import Grammar, Sentences
from teacherstudent.synthesis.pronunciation import MIN_SHARE, build_lexicon
from teacherstudent.synthesis.recording import (
    CARRIER_RATE,
    Session,
    count_accent,
    derive,
    record,
    record_background,
)
from teacherstudent.synthesis.speakers import ACCENTS, Speaker, draw_speakers
from teacherstudent.synthesis.vocabulary import make_vocabulary, read_vocabulary

GRAMMAR, PSEUDO_WORDS = "grammar", "pseudo-words"  # corpus.text; anything else is the path of a word list
LM_SENTENCES = 5000
MAX_LEFT_OUT_SHARE = 0.05  # of the sentences: beyond it there is a warning
SESSION_SECONDS = 600.0  # a speaker with more to say says it in several sessions
BACKGROUNDS = {"background-training": (HUMAN, UNLABELLED), "background-evaluation": (DEV, TEST)}
BACKGROUND_SPEAKERS = 6  # in each of them


def make_corpus(folder: Path, settings: Corpus, sampling_rate: int, seed: int) -> None:
    """Make the corpus in `folder`, which is there only when it is complete.

    An interrupted call is gone on with by the next one. Raises ValueError without the wheels of
    teacherstudent[corpus], for a word list that cannot be said, for a folder that holds a corpus of other settings, and
    when a process dies.
    """
    if seed < 0:
        raise ValueError(f"seed = {seed}: it must be >= 0")
    sentences = _open_sentences(settings, seed)
    made_from = _describe(settings, sentences, sampling_rate, seed)
    if folder.exists():
        if _read_settings(folder) != made_from:
            raise ValueError(
                f"{folder} is there and holds no corpus of these settings: remove it, or name another"
            )
        return
    for wheel in (WHEEL, "scipy"):
        wheels.load(wheel, EXTRA)
    partial = folder.with_name(f"{folder.name}.partial")
    if _read_settings(partial) != made_from:
        shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True, exist_ok=True)
    write_json(partial / "settings.json", made_from)
    speakers = draw_speakers(_count_speakers(settings), settings.split)
    write_json(partial / "speakers.json", {speaker.id: dataclasses.asdict(speaker) for speaker in speakers})
    _write_lm_text(partial, sentences, settings, seed)
    with ProcessMap(settings.jobs, _performer) as pool:
        _write_lexicon(partial, sentences, settings, pool)
        _write_backgrounds(partial, speakers, sentences, settings, sampling_rate, seed, pool)
        sessions = _plan_sessions(partial, speakers, sentences, settings, sampling_rate, seed)
        _record(sessions, settings, pool)
    shutil.rmtree(partial / "withheld", ignore_errors=True)
    for part in PARTS:
        paths = [session.path for session in sessions if session.speaker.part == part]
        _write_shards(partial, part, paths, settings, seed)
    _report_left_out(partial, sessions, settings)
    for scratch in ("sessions", "background"):
        shutil.rmtree(partial / scratch)
    partial.replace(folder)


def _open_sentences(settings: Corpus, seed: int) -> Sentences:
    if settings.text == GRAMMAR:
        return Grammar()
    if settings.text == PSEUDO_WORDS:
        return make_vocabulary(settings.vocabulary, seed)
    vocabulary = read_vocabulary(Path(settings.text), settings.vocabulary)
    if len(vocabulary.words) < settings.vocabulary:
        warnings.warn(
            f"corpus.vocabulary = {settings.vocabulary}, and {settings.text} has {len(vocabulary.words)} words: all "
            "of them are said",
            stacklevel=3,
        )
    return vocabulary


def _describe(settings: Corpus, sentences: Sentences, sampling_rate: int, seed: int) -> Any:
    """What decides over the contents, as it comes back from JSON."""
    corpus = dataclasses.asdict(settings)
    del corpus["jobs"]
    if settings.text not in (GRAMMAR, PSEUDO_WORDS):
        corpus |= {"text": "word list", "words_sha256": hash_text("\n".join(sentences.words))}
    return json.loads(json.dumps({"corpus": corpus, "sampling_rate": sampling_rate, "seed": seed}))


def _read_settings(folder: Path) -> Any:
    path = folder / "settings.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _count_speakers(settings: Corpus) -> dict[str, int]:
    parts = {part: getattr(settings, f"{part}_speakers") for part in PARTS}
    return parts | dict.fromkeys(BACKGROUNDS, BACKGROUND_SPEAKERS)


def _write_lm_text(folder: Path, sentences: Sentences, settings: Corpus, seed: int) -> None:
    rng = derive(seed, settings.split, "language model")
    write_text(folder / "lm_text.txt", "".join(f"{sentences.draw(rng)}\n" for _ in range(LM_SENTENCES)))


def _write_lexicon(folder: Path, sentences: Sentences, settings: Corpus, pool: ProcessMap) -> None:
    path = folder / "lexicon.txt"
    if path.exists():
        return
    stress = settings.phones == "position-stress"
    counts: Counter[Any] = Counter()
    unsaid: dict[str, str] = {}
    # Every accent says nearly as many words; with a large vocabulary that takes hours, before anything is recorded.
    num_words = sum(len(text.split()) for text in sentences.draw_carriers(ACCENTS[0]))
    seconds = 60 * num_words / CARRIER_RATE
    with hours_bar(len(ACCENTS) * seconds, "speech for the lexicon") as bar:
        tasks = ((count_accent, accent, sentences, stress) for accent in ACCENTS)
        for accent, missing in pool.map(tasks):
            counts.update(accent)
            unsaid |= missing
            bar.update(seconds)
    if unsaid:
        named = "".join(f"\n  {why}" for why in islice(unsaid.values(), 10))
        raise ValueError(
            f"espeak-ng has no pronunciation for {len(unsaid)} of the {len(sentences.words)} words of "
            f"{settings.text} in some accent: take them out.{named}"
        )
    # Frequent words meet few of their neighbours in these carriers: what was heard once is not a rare accident there.
    lexicon = build_lexicon(counts, MIN_SHARE if settings.text == GRAMMAR else 0.0)
    temporary = path.with_suffix(".partial")
    (lexicon.with_word_positions() if stress else lexicon).write(temporary)
    temporary.replace(path)


def _write_backgrounds(
    folder: Path,
    speakers: list[Speaker],
    sentences: Sentences,
    settings: Corpus,
    sampling_rate: int,
    seed: int,
    pool: ProcessMap,
) -> None:
    (folder / "background").mkdir(exist_ok=True)
    for name in BACKGROUNDS:
        tasks = [
            (record_background, speaker, sentences, sampling_rate, seed, settings.split)
            for speaker in speakers
            if speaker.part == name
        ]
        np.save(folder / "background" / f"{name}.npy", np.stack(list(pool.map(tasks))))


def _plan_sessions(
    folder: Path,
    speakers: list[Speaker],
    sentences: Sentences,
    settings: Corpus,
    sampling_rate: int,
    seed: int,
) -> list[Session]:
    (folder / "sessions").mkdir(exist_ok=True)
    background = {part: name for name, parts in BACKGROUNDS.items() for part in parts}
    sessions = []
    for speaker in speakers:
        if speaker.part not in PARTS:
            continue
        minutes, count = (getattr(settings, f"{speaker.part}_{what}") for what in ("minutes", "speakers"))
        num_sessions = math.ceil(60 * minutes / count / SESSION_SECONDS)
        for number in range(num_sessions):
            sessions.append(
                Session(
                    speaker=speaker,
                    sentences=sentences,
                    stress=settings.phones == "position-stress",
                    number=number,
                    seconds=60 * minutes / count / num_sessions,
                    labelled=speaker.part != UNLABELLED,
                    every_condition=speaker.part in (DEV, TEST),
                    noisy_share=settings.noisy_share,
                    snr_db=settings.snr_db,
                    sampling_rate=sampling_rate,
                    seed=seed,
                    split=settings.split,
                    voices=folder / "background" / f"{background[speaker.part]}.npy",
                    folder=folder,
                )
            )
    return sessions


def _record(sessions: list[Session], settings: Corpus, pool: ProcessMap) -> None:
    conditions = 1 + len(settings.snr_db)
    total = sum(session.seconds * (conditions if session.every_condition else 1) for session in sessions)
    with hours_bar(total, "corpus") as bar:
        for seconds in pool.map((record, session) for session in sessions):
            bar.update(seconds)


def _report_left_out(folder: Path, sessions: list[Session], settings: Corpus) -> None:
    """Sentences that were drawn and then drawn anew, because someone said a word as the lexicon does not have it."""
    num_said, words = 0, Counter[str]()
    for session in sessions:
        with session.path.open(encoding="utf-8") as file:
            for line in file:
                entry = json.loads(line)
                num_said += 1
                words.update(entry["left_out"])
    if settings.text != GRAMMAR:
        report = {"recorded": num_said, "left_out": words.total(), "words": dict(words.most_common(20))}
        write_json(folder / "report.json", report)
    share = words.total() / (num_said + words.total())
    if share > MAX_LEFT_OUT_SHARE:
        warnings.warn(
            f"corpus.text = {settings.text!r}: {share:.0%} of the sentences were not said as the lexicon has it and "
            f"others were drawn for them, mostly for {', '.join(word for word, _ in words.most_common(5))}",
            stacklevel=3,
        )


def _write_shards(folder: Path, part: str, sessions: list[Path], settings: Corpus, seed: int) -> None:
    """Deal the utterances of all sessions to shards in random order; only their places are held in memory."""
    places: list[tuple[int, int]] = []  # session, where its line begins
    seconds: list[float] = []
    for number, path in enumerate(sessions):
        with path.open("rb") as file:
            place = 0
            for line in file:
                places.append((number, place))
                seconds.append(json.loads(line)["cut"]["duration"])
                place += len(line)
    num_shards = max(1, round(sum(seconds) / (60 * settings.shard_minutes)))
    order = derive(seed, settings.split, f"shards of {part}").permutation(len(places))
    ends = np.cumsum(np.array(seconds)[order])
    shards = np.minimum((ends - 1e-9) * num_shards // ends[-1], num_shards - 1).astype(int)
    for shard in range(num_shards):
        chosen = (places[index] for index in order[shards == shard])
        _write_shard(folder, part, shard, _read_entries(sessions, chosen))


def _read_entries(sessions: list[Path], places: Iterable[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    for number, place in places:
        with sessions[number].open("rb") as file:
            file.seek(place)
            yield json.loads(file.readline())


def _write_shard(folder: Path, part: str, shard: int, entries: Iterable[dict[str, Any]]) -> None:
    withheld = folder / "withheld" / "unlabelled.jsonl"
    withheld.parent.mkdir(exist_ok=True)
    with (
        (folder / part / f"cuts.{shard:06d}.jsonl").open("w", encoding="utf-8") as cuts,
        withheld.open("a", encoding="utf-8") as texts,
    ):
        for entry in entries:
            cuts.write(json.dumps(entry["cut"]) + "\n")
            if part == UNLABELLED:
                texts.write(json.dumps({"id": entry["cut"]["id"], "text": entry["text"]}) + "\n")


def _performer() -> Callable[[tuple[Any, ...]], Any]:
    return _perform


def _perform(task: tuple[Any, ...]) -> Any:
    """task: a function, and what it is called with."""
    function, *arguments = task
    return function(*arguments)
