"""What espeak-ng said, in the phones of the corpus: which phones each word has, and when they are spoken.

Phones belong to words by the order of espeak-ng's events. The events' times are when it starts to make a sound:
good to some tens of milliseconds, and too late for a stop, whose closure comes first.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from teacherstudent.espeak import SAMPLING_RATE, Event, Speech
from teacherstudent.lexicon import SILENCE, Lexicon, Pronunciation

# espeak-ng's phonemes, without stress, to one set for all accents (in the manner of ARPAbet). What only some
# accents have goes to the nearest sound that all have. "" is a glide into the next vowel, a part of its phone.
PHONES = {
    "_": SILENCE, "_:": SILENCE, "_|": SILENCE, "_!": SILENCE, "_;": SILENCE, ";": "",
    "i:": "IY", "i": "IY", "I": "IH", "I2": "IH", "I#": "IH", "i@": "IH", "E": "EH", "e@": "EH",
    "a": "AE", "aa": "AE", "A:": "AA", "A@": "AA", "0": "OH", "O2": "AO", "O:": "AO", "O@": "AO", "o@": "AO",
    "U": "UH", "U@": "UH", "u:": "UW", "V": "AH", "3:": "ER", "VR": "ER", "IR": "ER",
    "@": "AX", "@2": "AX", "@5": "AX", "a#": "AX", "3": "AX", "@L": "EL",
    "eI": "EY", "aI": "AY", "aI2": "AY", "aI@": "AY", "OI": "OY", "oU": "OW", "aU": "AW",
    "p": "P", "b": "B", "t": "T", "t2": "T", "t#": "T", "t[": "T", "d": "D", "k": "K", "g": "G",
    "tS": "CH", "dZ": "JH", "f": "F", "v": "V", "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH",
    "h": "HH", "m": "M", "n": "N", "N": "NG", "l": "L", "r": "R", "r-": "R", "w": "W", "w#": "W", "j": "Y",
}  # fmt: skip
STRESS = "',%="
STOPS = {"P", "B", "T", "D", "K", "G", "CH", "JH"}

MAX_CLOSURE_SECONDS = 0.06
MIN_PHONE_SECONDS = 0.032  # the centre of a frame of 30 ms surely lies in it
QUIET = 0.01  # of the peak
MIN_SHARE = 0.02  # of what is said for a word: a pronunciation as rare as this is left out of the lexicon


@dataclass(frozen=True)
class Segment:
    """A phone or a word, from one sample to another, at espeak-ng's sampling rate."""

    symbol: str
    start: int
    end: int


@dataclass(frozen=True)
class Group:
    """Words that espeak-ng says as one, mostly a single word, and their phones; a pause has no words."""

    words: tuple[str, ...]
    phones: tuple[Segment, ...]

    @property
    def pronunciation(self) -> Pronunciation:
        return tuple(phone.symbol for phone in self.phones)


@dataclass(frozen=True)
class Alignment:
    """Of an utterance. Phones follow each other without a gap, silence in pauses among them."""

    words: tuple[Segment, ...]
    phones: tuple[Segment, ...]

    @property
    def start(self) -> int:
        return self.phones[0].start

    @property
    def end(self) -> int:
        return self.phones[-1].end


def group_phones(text: str, speech: Speech) -> list[Group]:
    """The groups of an utterance in order, without the pauses before and after it."""
    said: list[tuple[str, ...]] = []
    marks: list[tuple[str, int, int]] = []  # phone, first sample, number of its group
    groups = _groups_by_character(text, speech.events)
    for event in speech.events:
        if event.kind == "word":
            said.append(groups[event.character])
            continue
        phone = PHONES[event.name.lstrip(STRESS)]
        if phone and not (phone == SILENCE and marks and marks[-1][0] == SILENCE):  # two pauses are one
            marks.append((phone, event.sample, -1 if phone == SILENCE else len(said) - 1))
    ends = [start for _, start, _ in marks[1:]] + [len(speech.samples) // 2]
    timed = [(Segment(phone, start, end), number) for (phone, start, number), end in zip(marks, ends)]
    spoken = [place for place, (segment, _) in enumerate(timed) if segment.symbol != SILENCE]
    timed = timed[spoken[0] : spoken[-1] + 1]
    return [
        Group(said[number] if number >= 0 else (), tuple(segment for segment, _ in segments))
        for number, segments in groupby(timed, key=lambda item: item[1])
    ]


def _groups_by_character(text: str, events: Iterable[Event]) -> dict[int, tuple[str, ...]]:
    """Where espeak-ng's word events stand in the text -> the words from there to the next event."""
    begins = [event.character for event in events if event.kind == "word"]
    groups: dict[int, tuple[str, ...]] = dict.fromkeys(begins, ())
    character = 1
    for word in text.split():
        begin = max(begin for begin in begins if begin <= character)
        groups[begin] += (word,)
        character += len(word) + 1
    return groups


def split_phones(
    words: Sequence[str], phones: Pronunciation, pronunciations: Mapping[str, Iterable[Pronunciation]]
) -> list[Pronunciation] | None:
    """The one way to share phones out among words that each has a pronunciation; None if there is no or another."""
    if not words:
        return None if phones else []
    ways = []
    for first in pronunciations.get(words[0], ()):
        if phones[: len(first)] == first:
            rest = split_phones(words[1:], phones[len(first) :], pronunciations)
            if rest is not None:
                ways.append([first, *rest])
    return ways[0] if len(ways) == 1 else None


def count_pronunciations(utterances: Iterable[list[Group]]) -> Counter[tuple[str, Pronunciation]]:
    """How often each word was said how, by one accent.

    Words said as one ("in the") are taken apart by how the accent says them elsewhere.
    """
    counts: Counter[tuple[str, Pronunciation]] = Counter()
    merged = []
    for group in (group for groups in utterances for group in groups):
        if len(group.words) == 1:
            counts[group.words[0], group.pronunciation] += 1
        elif group.words:
            merged.append(group)
    alone = Lexicon.of(counts)
    for group in merged:
        parts = split_phones(group.words, group.pronunciation, alone.pronunciations)
        counts.update(zip(group.words, parts or ()))
    return counts


def build_lexicon(counts: Counter[tuple[str, Pronunciation]]) -> Lexicon:
    """Every pronunciation that makes up MIN_SHARE of what was said for its word, over all accents."""
    totals: Counter[str] = Counter()
    for (word, _), count in counts.items():
        totals[word] += count
    return Lexicon.of(pair for pair, count in counts.items() if count >= MIN_SHARE * totals[pair[0]])


def align(text: str, speech: Speech, lexicon: Lexicon) -> Alignment | None:
    """When each phone and each word is spoken; None for an utterance that the lexicon does not cover."""
    groups = group_phones(text, speech)
    if " ".join(word for group in groups for word in group.words) != text:
        return None
    phones = _correct_times([phone for group in groups for phone in group.phones], speech)
    words: list[Segment] = []
    place = 0
    for group in groups:
        parts = (
            split_phones(group.words, group.pronunciation, lexicon.pronunciations) if group.words else None
        )
        if group.words and parts is None:
            return None
        for word, part in zip(group.words, parts or ()):
            words.append(Segment(word, phones[place].start, phones[place + len(part) - 1].end))
            place += len(part)
        place += 0 if group.words else len(group.phones)
    return Alignment(tuple(words), tuple(phones))


def _correct_times(phones: list[Segment], speech: Speech) -> list[Segment]:
    """Closures to their stops, and room for every phone."""
    samples = np.abs(np.frombuffer(speech.samples, np.int16).astype(np.int32))
    loud = samples > QUIET * samples.max()
    longest = int(SAMPLING_RATE * MAX_CLOSURE_SECONDS)
    corrected: list[Segment] = []
    for silent, stretch in groupby(phones, key=lambda phone: phone.symbol == SILENCE):
        segments = list(stretch)
        if silent:
            corrected += segments
            continue
        bounds = [*(segment.start for segment in segments), segments[-1].end]
        for index in range(1, len(segments)):
            if segments[index].symbol in STOPS:
                earliest = max(bounds[index - 1], bounds[index] - longest)
                sounding = np.flatnonzero(loud[earliest : bounds[index]])
                bounds[index] = earliest + (int(sounding[-1]) + 1 if len(sounding) else 0)
        bounds = _make_room(bounds)
        corrected += [Segment(*item) for item in zip((s.symbol for s in segments), bounds, bounds[1:])]
    return corrected


def _make_room(bounds: list[int]) -> list[int]:
    """Every phone as long as MIN_PHONE_SECONDS, or all equally long where there is no room for that.

    First at the cost of the phones before: espeak-ng says the l of "call" while it moves from the vowel to it,
    and puts the event after that.
    """
    first, *inner, last = bounds
    least = min(int(SAMPLING_RATE * MIN_PHONE_SECONDS), (last - first) // (len(bounds) - 1))
    for index in reversed(range(len(inner))):
        inner[index] = min(inner[index], (inner[index + 1] if index + 1 < len(inner) else last) - least)
    for index in range(len(inner)):
        inner[index] = max(inner[index], (inner[index - 1] if index else first) + least)
    return [first, *inner, last]
