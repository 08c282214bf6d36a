"""Tiny corpora in the shapes of LibriSpeech and of a Kaldi experiment, said by espeak-ng.

Two dozen words with the pronunciations of CMUdict, drawn at random; where each word begins is known, and its phones
are taken to be of equal length, which is good enough for alignments that are only to be read.
"""

import gzip
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from scipy.signal import resample_poly

from teacherstudent.decoding.language_model import estimate_bigram
from teacherstudent.synthesis.espeak import SAMPLING_RATE as SPOKEN_RATE
from teacherstudent.synthesis.espeak import Voice

SAMPLING_RATE = 16000
MARGIN_SECONDS = 0.2  # of near silence before and after what is said
UNKNOWN = "XYLOPHONE"  # is said, and in no lexicon
PRONUNCIATIONS = {
    "ONE": "W AH1 N", "TWO": "T UW1", "THREE": "TH R IY1", "FOUR": "F AO1 R", "FIVE": "F AY1 V", "SIX": "S IH1 K S",
    "SEVEN": "S EH1 V AH0 N", "EIGHT": "EY1 T", "NINE": "N AY1 N", "ZERO": "Z IH1 R OW0", "RED": "R EH1 D",
    "BLUE": "B L UW1", "GREEN": "G R IY1 N", "YELLOW": "Y EH1 L OW0", "PURPLE": "P ER1 P AH0 L",
    "SHADOW": "SH AE1 D OW0", "ORANGE": "AO1 R AH0 N JH", "HOUSE": "HH AW1 S", "CHAIR": "CH EH1 R", "BOY'S": "B OY1 Z",
    "MOUTH": "M AW1 TH", "DOG": "D AO1 G", "KING": "K IH1 NG", "BOOK": "B UH1 K",
}  # fmt: skip
VOICES = (
    "f1", "m1", "m3", "m4", "zac", "ed", "max", "anika", "adam", "linda", "m5", "norbert", "paul", "steph"
)  # fmt: skip


@dataclass(frozen=True)
class Utterance:
    """One of a speaker's. starts: where each word begins, and where the last one ends, in samples."""

    id: str
    speaker: str
    words: tuple[str, ...]
    samples: np.ndarray  # (N,) 16-bit
    starts: tuple[int, ...]


def speak(
    num_speakers: int, num_utterances: int, first_speaker: int = 19, unknown: bool = False
) -> list[Utterance]:
    """num_utterances of each speaker, LibriSpeech's names on them; with `unknown`, each speaker's last one has a word
    that is in no lexicon.
    """
    utterances = []
    for speaker in range(first_speaker, first_speaker + num_speakers):
        rng = np.random.default_rng([speaker])
        with Voice(f"en-us+{VOICES[speaker % len(VOICES)]}", int(rng.integers(130, 180)), 50) as voice:
            for number in range(num_utterances):
                words = [str(word) for word in rng.choice(list(PRONUNCIATIONS), 6)]
                if unknown and number == num_utterances - 1:
                    words[2] = UNKNOWN
                name = f"{speaker}-{speaker + 100}-{number:04d}"
                utterances.append(_say(voice, name, str(speaker), words, rng))
    return utterances


def _say(voice: Voice, name: str, speaker: str, words: list[str], rng: np.random.Generator) -> Utterance:
    spoken = voice.speak(" ".join(words).lower())
    speech = resample_poly(np.frombuffer(spoken.samples, np.int16) / 2**15, 320, 441)
    margin = round(MARGIN_SECONDS * SAMPLING_RATE)
    samples = np.pad(speech, margin) + 1e-4 * rng.standard_normal(len(speech) + 2 * margin)
    seconds = [event.sample / SPOKEN_RATE for event in spoken.events if event.kind == "word"]
    seconds.append(next(event.sample / SPOKEN_RATE for event in spoken.events if event.name.startswith("_")))
    assert len(seconds) == len(words) + 1, "espeak-ng says each of the words for itself"
    starts = tuple(margin + round(second * SAMPLING_RATE) for second in seconds)
    return Utterance(name, speaker, tuple(words), np.round(samples * 0.9 * 2**15).astype(np.int16), starts)


def write_lexicon(path: Path, first_lines: Iterable[str] = ()) -> None:
    """As on openslr.org/11: a tab after the word."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [*first_lines, *(f"{word}\t{phones}" for word, phones in sorted(PRONUNCIATIONS.items()))]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_language_model(path: Path) -> None:
    """A bigram in ARPA format with a probability for <UNK>, as SRILM's has."""
    rng = np.random.default_rng([0])
    sentences = [" ".join(rng.choice(list(PRONUNCIATIONS), 6)) for _ in range(200)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write(estimate_bigram([*sentences, "<UNK>"], PRONUNCIATIONS).to_arpa())


# -- LibriSpeech ------------------------------------------------------------------------------------------------


def write_librispeech(folder: Path, subsets: Mapping[str, Sequence[Utterance]]) -> None:
    """FOLDER/SUBSET/SPEAKER/CHAPTER/ID.flac and SPEAKER-CHAPTER.trans.txt"""
    for subset, utterances in subsets.items():
        for utterance in utterances:
            speaker, chapter, _ = utterance.id.split("-")
            place = folder / subset / speaker / chapter
            place.mkdir(parents=True, exist_ok=True)
            soundfile.write(place / f"{utterance.id}.flac", utterance.samples, SAMPLING_RATE)
            with (place / f"{speaker}-{chapter}.trans.txt").open("a", encoding="utf-8") as file:
                file.write(f"{utterance.id} {' '.join(utterance.words)}\n")


# -- Kaldi ------------------------------------------------------------------------------------------------------

POSITIONS = ("", "_B", "_E", "_I", "_S")
KALDI_PHONES = (
    *(f"SIL{position}" for position in POSITIONS),
    *(f"SPN{position}" for position in POSITIONS),
    *(f"{phone}{position}" for phone in sorted({p for line in PRONUNCIATIONS.values() for p in line.split()})
      for position in POSITIONS[1:]),
)  # fmt: skip
PHONE_IDS = {phone: number for number, phone in enumerate(KALDI_PHONES, start=1)}
NUM_SILENCE_PHONES = 2 * len(POSITIONS)

# utils/gen_topo.pl, 3 states and 5 for silence: of each state where its transitions lead, the last state being final.
SPEECH_STATES = ((0, 1), (1, 2), (2, 3))
SILENCE_STATES = ((0, 1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4), (4, 5))


def write_kaldi_data(folder: Path, utterances: Sequence[Utterance], labelled: bool) -> None:
    """A data folder with one recording a speaker: wav.scp as seen from the folder that holds data/, segments, text, and
    what feature extraction leaves behind.
    """
    (folder / "audio").mkdir(parents=True)
    tables: dict[str, list[str]] = {
        name: [] for name in ("wav.scp", "segments", "utt2spk", "feats.scp", "text")
    }
    spk2utt = []
    for speaker in sorted({utterance.speaker for utterance in utterances}):
        own = [utterance for utterance in utterances if utterance.speaker == speaker]
        path = folder / "audio" / f"{speaker}.wav"
        soundfile.write(path, np.concatenate([utterance.samples for utterance in own]), SAMPLING_RATE)
        tables["wav.scp"].append(f"rec{speaker} {path.relative_to(folder.parent.parent)}")
        spk2utt.append(" ".join([speaker, *(utterance.id for utterance in own)]))
        end = 0
        for utterance in own:
            start, end = end, end + len(utterance.samples)
            seconds = f"{start / SAMPLING_RATE:.4f} {end / SAMPLING_RATE:.4f}"
            tables["segments"].append(f"{utterance.id} rec{speaker} {seconds}")
            tables["utt2spk"].append(f"{utterance.id} {speaker}")
            tables["feats.scp"].append(f"{utterance.id} mfcc/raw_mfcc_{folder.name}.1.ark:{start}")
            tables["text"].append(f"{utterance.id} {' '.join(utterance.words)}")
    if not labelled:
        del tables["text"]
    for name, lines in [*tables.items(), ("spk2utt", spk2utt)]:
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_kaldi_alignments(folder: Path, utterances: Sequence[Utterance], num_jobs: int = 2) -> None:
    """What steps/align_fmllr.sh leaves behind: ali.*.gz, final.mdl, phones.txt, num_jobs."""
    folder.mkdir(parents=True)
    (folder / "num_jobs").write_text(f"{num_jobs}\n")
    symbols = ["<eps>", *KALDI_PHONES, "#0", "#1"]
    (folder / "phones.txt").write_text("".join(f"{phone} {index}\n" for index, phone in enumerate(symbols)))
    (folder / "final.mdl").write_bytes(_model())
    for job in range(num_jobs):
        archive = b"".join(
            f"{utterance.id} ".encode() + b"\0B" + _int(len(path)) + b"".join(map(_int, path))
            for utterance in utterances[job::num_jobs]
            for path in [_transition_ids(utterance)]
        )
        (folder / f"ali.{job + 1}.gz").write_bytes(gzip.compress(archive, mtime=0))


def _states(phone: int) -> tuple[tuple[int, ...], ...]:
    return SILENCE_STATES if phone <= NUM_SILENCE_PHONES else SPEECH_STATES


@cache
def _first_transition_ids() -> dict[tuple[int, int], int]:
    """(phone, state) -> its first transition id; they are numbered from 1, in the order of the states."""
    states = [(phone, state) for phone in PHONE_IDS.values() for state in range(len(_states(phone)))]
    counts = [len(_states(phone)[state]) for phone, state in states]
    return dict(zip(states, [1, *(1 + np.cumsum(counts)).tolist()]))


def _transition_ids(utterance: Utterance) -> list[int]:
    """Of every 10 ms frame, with snip_edges, and self-loops after the transition out of their state (--reorder)."""
    first = _first_transition_ids()
    num_frames = 1 + (len(utterance.samples) - 400) // 160
    marks, phones = [0], ["SIL"]
    for word, start, end in zip(utterance.words, utterance.starts, utterance.starts[1:]):
        names = PRONUNCIATIONS.get(word, "SPN").split()
        places = ["_S"] if len(names) == 1 else ["_B", *["_I"] * (len(names) - 2), "_E"]
        marks += np.linspace(start, end, len(names) + 1)[:-1].tolist()
        phones += [name + place for name, place in zip(names, places)]
    frames = np.round((np.array([*marks, utterance.starts[-1]]) - 200) / 160).astype(int)
    lengths = np.diff([0, *frames[1:], num_frames])
    path = []
    for phone, length in zip([*phones, "SIL"], lengths, strict=True):
        assert length >= 3, f"{utterance.id}: {phone} has {length} frames"
        states = (0, 1, 4) if phone == "SIL" or phone == "SPN_S" else (0, 1, 2)
        for place, state in enumerate(states):
            leads = _states(PHONE_IDS[phone])[state]
            left = leads.index(states[place + 1] if place < 2 else len(_states(PHONE_IDS[phone])))
            begin = first[PHONE_IDS[phone], state]
            stay = int(length) // 3 + (int(length) % 3 if place == 2 else 0)
            path += [begin + left] + [begin + leads.index(state)] * (stay - 1)
    return path


def _int(value: int) -> bytes:
    return b"\4" + struct.pack("<i", value)


def _model() -> bytes:
    """A transition model in Kaldi's binary format, and the beginning of the Gaussians that come after it."""
    ids = list(PHONE_IDS.values())
    entries = [SILENCE_STATES, SPEECH_STATES]
    to_entry = [-1, *(entries.index(_states(phone)) for phone in ids)]
    topology = _ints(ids) + _ints(to_entry) + _int(len(entries))
    for states in entries:
        topology += _int(len(states) + 1)
        for pdf_class, leads in enumerate(states):
            topology += _int(pdf_class) + _int(len(leads))
            topology += b"".join(_int(state) + b"\4" + struct.pack("<f", 1 / len(leads)) for state in leads)
        topology += _int(-1) + _int(0)  # the final state
    triples = list(_first_transition_ids())
    tied = b"".join(_int(phone) + _int(state) + _int(pdf) for pdf, (phone, state) in enumerate(triples))
    log_probs = [0.0, *(-np.log(len(leads)) for phone in ids for leads in _states(phone) for _ in leads)]
    vector = b"FV " + _int(len(log_probs)) + np.array(log_probs, "<f4").tobytes()
    return (
        b"\0B<TransitionModel> <Topology> " + topology + b"</Topology> <Triples> " + _int(len(triples)) + tied
        + b"</Triples> <LogProbs> " + vector + b"</LogProbs> </TransitionModel> <DIMENSION> " + _int(40)
    )  # fmt: skip


def _ints(values: Sequence[int]) -> bytes:
    """WriteIntegerVector"""
    return b"\4" + struct.pack("<i", len(values)) + np.array(values, "<i4").tobytes()
