"""Recording sessions: one speaker says sentences until there is enough, clean and in made noise.

What a process of the corpus step's pool does, so nothing heavy is imported here.
"""

import io
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from teacherstudent.data.lexicon import SILENCE, Lexicon, Pronunciation
from teacherstudent.synthesis.espeak import SAMPLING_RATE as SPOKEN_RATE
from teacherstudent.synthesis.espeak import Speech, Voice
from teacherstudent.synthesis.grammar import Sentences
from teacherstudent.synthesis.noise import KINDS, decibels_to_gain, make_noise, mean_square, mix
from teacherstudent.synthesis.pronunciation import (
    Alignment,
    Group,
    Segment,
    Uncovered,
    align,
    count_pronunciations,
    group_phones,
    without_positions,
)
from teacherstudent.synthesis.speakers import Speaker

CARRIER_RATE = 400  # words a minute: the fastest, since nobody hears them
BACKGROUND_SECONDS = 40.0  # of every background speaker

MARGIN_SECONDS = (0.1, 0.3)  # of silence before and after what is said
LEVEL_DB = (-30.0, -20.0)  # root mean square of the speech, 0 is full scale
FLOOR_DB = 60.0  # a recorder's own noise, below the speech
PEAK = 0.95  # of full scale: what would be louder is recorded at a lower level
MAX_DRAWS = 100


@dataclass(frozen=True)
class Session:
    """What one speaker is to record in one go.

    seconds: of clean audio. labelled: with transcripts and alignments. every_condition: each sentence clean and
    at every signal-to-noise ratio; otherwise noisy_share of them at one ratio. stress: phones have stress and word
    position. voices: file of (V, M) speech for babble. folder: the corpus'.
    """

    speaker: Speaker
    sentences: Sentences
    stress: bool
    number: int
    seconds: float
    labelled: bool
    every_condition: bool
    noisy_share: float
    snr_db: tuple[float, ...]
    sampling_rate: int
    seed: int
    split: int
    voices: Path
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.speaker.id}-{self.number:03d}"

    @property
    def path(self) -> Path:
        """Its cuts, a line of JSON each; it is there when the session is complete."""
        return self.folder / "sessions" / f"{self.name}.jsonl"


def derive(seed: int, split: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, split, zlib.crc32(name.encode())])


def count_accent(
    accent: str, sentences: Sentences, stress: bool
) -> tuple[dict[tuple[str, Pronunciation], int], dict[str, str]]:
    """How often an accent says each word how, in carrier sentences; and the words that it cannot say, and why."""
    unsaid: dict[str, str] = {}

    def listen(voice: Voice) -> Iterator[list[Group]]:
        for text in sentences.draw_carriers(accent):
            spoken = sentences.spell(text)
            try:
                yield group_phones(text, voice.speak(spoken), spoken, stress)
            except Uncovered as reason:
                unsaid[reason.word] = str(reason)

    with Voice(accent, CARRIER_RATE, 50) as voice:
        counts = dict(count_pronunciations(listen(voice)))
    said = {word for word, _ in counts}
    missing = [word for word in sentences.words if word not in said]
    reasons = {word: unsaid[word] for word in missing if word in unsaid}
    # Without a reason of its own, a word may lack only because of those that have one: they spoil whole sentences.
    return counts, reasons or {word: f"{word!r} is not said" for word in missing}


def record_background(
    speaker: Speaker, sentences: Sentences, sampling_rate: int, seed: int, split: int
) -> np.ndarray:
    """(M,) float32 speech of mean square 1, without a pause between the sentences."""
    rng = derive(seed, split, speaker.id)
    length = int(BACKGROUND_SECONDS * sampling_rate)
    pieces: list[np.ndarray] = []
    with Voice(speaker.voice, speaker.rate, speaker.pitch) as voice:
        while sum(map(len, pieces)) < length:
            spoken = _as_float(voice.speak(sentences.spell(sentences.draw(rng))).samples)
            pieces.append(_resample(spoken, sampling_rate))
    speech = np.concatenate(pieces)[:length]
    return speech / np.float32(np.sqrt(mean_square(speech)))


def record(session: Session) -> float:
    """Write a session's audio and cuts; returns seconds of audio. A session that is complete is left alone."""
    if not session.path.exists():
        lexicon = Lexicon.read(session.folder / "lexicon.txt")
        if session.stress:
            lexicon = without_positions(lexicon)
        voices = np.load(session.voices, mmap_mode="r")
        temporary = session.path.with_suffix(".partial")
        with (
            Voice(session.speaker.voice, session.speaker.rate, session.speaker.pitch) as voice,
            temporary.open("w", encoding="utf-8") as file,
        ):
            for entry in _record_utterances(session, voice, lexicon, voices):
                file.write(json.dumps(entry) + "\n")
        temporary.replace(session.path)
    with session.path.open(encoding="utf-8") as file:
        return sum(json.loads(line)["cut"]["duration"] for line in file)


def _record_utterances(
    session: Session, voice: Voice, lexicon: Lexicon, voices: np.ndarray
) -> Iterator[dict[str, Any]]:
    """Entries {"cut": …, "text": …, "left_out": …}, whose audio is written; left_out: words, see _Take."""
    seconds, number = 0.0, 0
    while seconds < session.seconds:
        name = f"{session.name}-{number:04d}"
        rng = derive(session.seed, session.split, name)
        take = _draw_take(voice, lexicon, session, rng)
        left_out = take.left_out
        for snr_db in _draw_conditions(session, rng):
            condition = "clean" if snr_db is None else f"{snr_db:g}dB"
            custom = {"condition": condition, "speaker": session.speaker.id}
            samples = take.speech
            if snr_db is not None:
                kind = KINDS[rng.integers(len(KINDS))]
                custom["noise"] = kind
                noise = make_noise(kind, len(samples), session.sampling_rate, voices, rng)
                samples = mix(samples, noise, snr_db, take.spoken)
            entry_id = f"{name}-{condition}" if session.every_condition else name
            audio = Path("audio", session.speaker.id, f"{entry_id}.flac")
            _write_audio(session.folder / session.speaker.part / audio, samples, session.sampling_rate)
            cut = _make_cut(entry_id, audio, take, custom, session)
            yield {"cut": cut, "text": take.text, "left_out": left_out}
            left_out = []
        seconds += len(take.speech) / session.sampling_rate
        number += 1


def _draw_conditions(session: Session, rng: np.random.Generator) -> list[float | None]:
    """Signal-to-noise ratios, None for clean."""
    if session.every_condition:
        return [None, *session.snr_db]
    noisy = rng.random() < session.noisy_share
    return [float(rng.choice(session.snr_db)) if noisy else None]


@dataclass(frozen=True)
class _Take:
    """A sentence as one speaker said it, without noise.

    words, phones: (symbol, start, duration) in seconds; the phones cover all of the recording.
    speech: (N,) float32, 1 is full scale. spoken: the samples from the first phone to the last. left_out: of each
    sentence drawn before that the lexicon does not cover, the word.
    """

    text: str
    words: list[tuple[str, float, float]]
    phones: list[tuple[str, float, float]]
    speech: np.ndarray
    spoken: slice
    left_out: list[str]


def _draw_take(voice: Voice, lexicon: Lexicon, session: Session, rng: np.random.Generator) -> _Take:
    """Sentences are drawn until one is said as the lexicon has it, which nearly all are."""
    left_out: list[str] = []
    for _ in range(MAX_DRAWS):
        text = session.sentences.draw(rng)
        spoken = session.sentences.spell(text)
        said = voice.speak(spoken)
        try:
            alignment = align(text, said, lexicon, spoken, session.stress)
        except Uncovered as reason:
            left_out.append(reason.word)
            last = reason
        else:
            return _make_take(text, said, alignment, session.sampling_rate, left_out, rng)
    raise RuntimeError(f"none of {MAX_DRAWS} sentences was said as the lexicon has it; in the last, {last}")


def _make_take(
    text: str,
    said: Speech,
    alignment: Alignment,
    sampling_rate: int,
    left_out: list[str],
    rng: np.random.Generator,
) -> _Take:
    lead, trail = (round(seconds * SPOKEN_RATE) for seconds in rng.uniform(*MARGIN_SECONDS, 2))
    spoken = _as_float(said.samples)[alignment.start :]
    dying = len(spoken) - (alignment.end - alignment.start)  # what still sounds after the last phone
    speech = _resample(np.pad(spoken, (lead, max(0, trail - dying))), sampling_rate)

    shift = lead - alignment.start
    words = _as_items(alignment.words, shift)
    first, last = alignment.start + shift, alignment.end + shift
    end = round(len(speech) / sampling_rate * SPOKEN_RATE)
    margins = Segment(SILENCE, -shift, alignment.start), Segment(SILENCE, alignment.end, end - shift)
    phones = _as_items((margins[0], *alignment.phones, margins[1]), shift)

    active = slice(*(round(place / SPOKEN_RATE * sampling_rate) for place in (first, last)))
    level = decibels_to_gain(rng.uniform(*LEVEL_DB)) / np.sqrt(mean_square(speech[active]))
    speech = mix(speech * np.float32(level), rng.standard_normal(len(speech), np.float32), FLOOR_DB, active)
    return _Take(text, words, phones, speech, active, left_out)


def _as_items(segments: Iterable[Segment], shift: int) -> list[tuple[str, float, float]]:
    """(symbol, start, duration) in seconds. Each starts where the one before it ends, also when rounded."""
    items = []
    for segment in segments:
        start, end = (round((place + shift) / SPOKEN_RATE, 4) for place in (segment.start, segment.end))
        items.append((segment.symbol, start, round(end - start, 4)))
    return items


def _as_float(samples: bytes) -> np.ndarray:
    return np.frombuffer(samples, np.int16).astype(np.float32) / np.float32(2**15)


def _resample(samples: np.ndarray, sampling_rate: int) -> np.ndarray:
    from scipy.signal import resample_poly

    common = math.gcd(sampling_rate, SPOKEN_RATE)
    up, down = sampling_rate // common, SPOKEN_RATE // common
    return resample_poly(samples, up, down, window=_design_filter(max(up, down)))


@cache
def _design_filter(ratio: int) -> np.ndarray:
    """What resample_poly designs anew for every signal: as long to make as the signal takes to filter."""
    from scipy.signal import firwin

    return firwin(20 * ratio + 1, 1 / ratio, window=("kaiser", 5.0)).astype(np.float32)


def _write_audio(path: Path, samples: np.ndarray, sampling_rate: int) -> None:
    import soundfile

    samples = samples * min(1.0, PEAK / float(np.abs(samples).max()))
    buffer = io.BytesIO()  # written in one go: libsndfile's own small writes take several times as long
    soundfile.write(buffer, np.round(samples * (2**15 - 1)).astype(np.int16), sampling_rate, format="FLAC")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(buffer.getvalue())


def _make_cut(
    name: str, audio: Path, take: _Take, custom: dict[str, str], session: Session
) -> dict[str, Any]:
    """What lhotse's MonoCut.to_dict() gives; lhotse itself takes seconds to import."""
    num_samples = len(take.speech)
    duration = num_samples / session.sampling_rate
    recording = {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": audio.as_posix()}],
        "sampling_rate": session.sampling_rate,
        "num_samples": num_samples,
        "duration": duration,
        "channel_ids": [0],
    }
    alignment = {
        kind: [[*item, None] for item in items]
        for kind, items in (("word", take.words), ("phone", take.phones))
    }
    supervision = {
        "id": name,
        "recording_id": name,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "text": take.text,
        "speaker": session.speaker.id,
        "alignment": alignment,
    }
    return {
        "id": name,
        "start": 0.0,
        "duration": duration,
        "channel": 0,
        "supervisions": [supervision] if session.labelled else [],
        "recording": recording,
        "custom": custom,
        "type": "MonoCut",
    }
