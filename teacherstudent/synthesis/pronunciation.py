"""What espeak-ng said, in the phones of the corpus: which phones each word has, and when they are spoken.

Phones belong to words by the order of espeak-ng's events. The events' times are when it starts to make a sound:
good to some tens of milliseconds, and too late for a stop, whose closure comes first.

Phones are plain, or those of syllables carry a digit for their stress: AE1 primary, AE2 secondary, AE0 none. With
stress, `align` marks the place in the word as well: AE1_B.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, zip_longest

import numpy as np

from teacherstudent.data.lexicon import SILENCE, Lexicon, Pronunciation, base_phones, mark_positions
from teacherstudent.synthesis.espeak import SAMPLING_RATE, Event, Speech

# espeak-ng's phonemes, without stress, to one set for all accents (in the manner of ARPAbet). What only some
# accents have goes to the nearest sound that all have. "" is a glide into the next vowel, a part of its phone.
PHONES = {
    "_": SILENCE, "_:": SILENCE, "_|": SILENCE, "_!": SILENCE, "_;": SILENCE, ";": "",
    "i:": "IY", "i": "IY", "I": "IH", "I2": "IH", "I#": "IH", "i@": "IH", "i@3": "IH", "E": "EH", "e@": "EH",
    "a": "AE", "aa": "AE", "A:": "AA", "A@": "AA", "0": "OH", "O2": "AO", "O:": "AO", "O@": "AO", "o@": "AO",
    "U": "UH", "U@": "UH", "u:": "UW", "u": "UW", "V": "AH", "3:": "ER", "VR": "ER", "IR": "ER",
    "@": "AX", "@-": "AX", "@2": "AX", "@5": "AX", "a#": "AX", "3": "AX", "@L": "EL",
    "eI": "EY", "aI": "AY", "aI2": "AY", "aI@": "AY", "aI3": "AY", "OI": "OY", "oU": "OW", "aU": "AW",
    "p": "P", "b": "B", "t": "T", "t2": "T", "t#": "T", "t[": "T", "?": "T", "d": "D", "k": "K", "x": "K", "g": "G",
    "tS": "CH", "dZ": "JH", "f": "F", "v": "V", "T": "TH", "D": "DH", "s": "S", "z": "Z", "S": "SH", "Z": "ZH",
    "h": "HH", "m": "M", "n": "N", "n-": "N", "N": "NG", "l": "L", "r": "R", "r-": "R", "w": "W", "w#": "W", "j": "Y",
}  # fmt: skip
STRESS = "',%="
SYLLABIC = {
    "IY", "IH", "EH", "AE", "AA", "OH", "AO", "UH", "UW", "AH", "ER", "AX", "EL", "EY", "AY", "OY", "OW", "AW",
}  # fmt: skip
STOPS = {"P", "B", "T", "D", "K", "G", "CH", "JH"}

MAX_CLOSURE_SECONDS = 0.06
MIN_PHONE_SECONDS = 0.032  # the centre of a frame of 30 ms surely lies in it
QUIET = 0.01  # of the peak
MIN_SHARE = 0.02  # of what is said for a word: a rarer pronunciation is left out of the lexicon


class Uncovered(ValueError):
    """An utterance whose words and phones cannot be told, or are not in the lexicon; `word` is the first such one."""

    def __init__(self, word: str, why: str) -> None:
        super().__init__(f"{word!r} {why}")
        self.word = word


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


def group_phones(text: str, speech: Speech, spoken: str = "", stress: bool = False) -> list[Group]:
    """The groups of an utterance in order, without the pauses before and after it.

    spoken: what espeak-ng was given, as many words as the text; the text itself by default. Raises Uncovered for a
    phoneme that is not one of PHONES, and for phones of no word.
    """
    said, numbers = _group_words(text.split(), (spoken or text).split(), speech.events)
    number = -1
    marks: list[tuple[str, int, int]] = []  # phone, first sample, number of its group
    for event in speech.events:
        if event.kind == "word":
            number = numbers[event.character]
            continue
        try:
            phone = _read_phoneme(event.name, stress)
        except KeyError:
            raise Uncovered(
                _name(said, number), f"is said with {event.name!r}, which is no phone here"
            ) from None
        if phone and not (phone == SILENCE and marks and marks[-1][0] == SILENCE):  # two pauses are one
            marks.append((phone, event.sample, number))
    marks = _leave_out_inner_pauses(marks)
    if all(phone == SILENCE for phone, _, _ in marks):
        raise Uncovered(text, "is not said at all")
    ends = [start for _, start, _ in marks[1:]] + [len(speech.samples) // 2]
    timed = [(Segment(phone, start, end), number) for (phone, start, number), end in zip(marks, ends)]
    sounding = [place for place, (segment, _) in enumerate(timed) if segment.symbol != SILENCE]
    timed = timed[sounding[0] : sounding[-1] + 1]
    if any(number < 0 for segment, number in timed if segment.symbol != SILENCE):
        raise Uncovered(text, "begins with phones of no word")
    return [
        Group(said[number] if number >= 0 else (), tuple(segment for segment, _ in segments))
        for number, segments in groupby(timed, key=lambda item: item[1])
    ]


def _name(said: Sequence[tuple[str, ...]], number: int) -> str:
    return " ".join(said[number]) if number >= 0 else ""


def _read_phoneme(name: str, stress: bool) -> str:
    bare = name.lstrip(STRESS)
    phone = PHONES[bare]
    if stress and phone in SYLLABIC:
        marks = name[: len(name) - len(bare)]
        phone += "1" if "'" in marks else "2" if "," in marks else "0"
    return phone


def _leave_out_inner_pauses(marks: list[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """A pause within a word (letters that are spelled out) is a part of the phone before; others are of no group."""
    kept = []
    for index, (phone, start, number) in enumerate(marks):
        if phone != SILENCE:
            kept.append((phone, start, number))
        elif not 0 < index < len(marks) - 1 or marks[index - 1][2] != marks[index + 1][2]:
            kept.append((phone, start, -1))
    return kept


def _group_words(
    words: Sequence[str], spoken: Sequence[str], events: Iterable[Event]
) -> tuple[list[tuple[str, ...]], dict[int, int]]:
    """The words of each group, and the number of the group to which a word event at some character belongs.

    A word belongs to the first event within it, or, where it has none, to the one before ("in the" is said as one). An
    event within a word that has one already goes on with the same group (x-ray).
    """
    begins = sorted({event.character for event in events if event.kind == "word"})
    owned: dict[int, tuple[str, ...]] = {}
    character = 1
    for word, form in zip(words, spoken, strict=True):
        end = character + len(form)
        within = [begin for begin in begins if character <= begin < end]
        before = [begin for begin in begins if begin < character and begin in owned]
        if not within and not before:
            raise Uncovered(word, "is not said at all")
        owner = within[0] if within else before[-1]
        owned[owner] = (*owned.get(owner, ()), word)
        character = end + 1
    owners = sorted(owned)
    numbers = {begin: max(0, bisect_right(owners, begin) - 1) for begin in begins}
    return [owned[owner] for owner in owners], numbers


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

    Words said as one ("in the") are taken apart by how the accent says them elsewhere, whatever the stress there;
    of two ("for the"), one may be said as it is nowhere else.
    """
    counts: Counter[tuple[str, Pronunciation]] = Counter()
    merged = []
    for group in (group for groups in utterances for group in groups):
        if len(group.words) == 1:
            counts[group.words[0], group.pronunciation] += 1
        elif group.words:
            merged.append(group)
    alone = Lexicon.of((word, _without_stress(phones)) for word, phones in counts)
    for group in merged:
        bare = _without_stress(group.pronunciation)
        parts = split_phones(group.words, bare, alone.pronunciations)
        parts = parts or _split_around_one(group.words, bare, alone.pronunciations)
        phones = iter(group.pronunciation)
        counts.update(
            (word, tuple(islice(phones, len(part)))) for word, part in zip(group.words, parts or ())
        )
    return counts


def _split_around_one(
    words: Sequence[str], phones: Pronunciation, pronunciations: Mapping[str, Iterable[Pronunciation]]
) -> list[Pronunciation] | None:
    """The one way to share phones out among two words of which one has such a pronunciation; or None."""
    if len(words) != 2:
        return None
    heads = {len(known) for known in pronunciations.get(words[0], ()) if phones[: len(known)] == known}
    tails = {len(known) for known in pronunciations.get(words[1], ()) if phones[-len(known) :] == known}
    cuts = (heads | {len(phones) - length for length in tails}) - {0, len(phones)}
    return [phones[: min(cuts)], phones[min(cuts) :]] if len(cuts) == 1 else None


def _without_stress(phones: Pronunciation) -> Pronunciation:
    return tuple(base_phones(phones))


def build_lexicon(counts: Counter[tuple[str, Pronunciation]], min_share: float = MIN_SHARE) -> Lexicon:
    """Every pronunciation that makes up min_share of what was said for its word, over all accents."""
    totals: Counter[str] = Counter()
    for (word, _), count in counts.items():
        totals[word] += count
    return Lexicon.of(pair for pair, count in counts.items() if count >= min_share * totals[pair[0]])


def align(text: str, speech: Speech, lexicon: Lexicon, spoken: str = "", stress: bool = False) -> Alignment:
    """When each phone and each word is spoken.

    spoken, stress: as in group_phones; the lexicon has the stress, but not the places in the word. Raises Uncovered for
    an utterance that the lexicon does not cover.
    """
    groups = group_phones(text, speech, spoken, stress)
    for given, said in zip_longest(text.split(), (word for group in groups for word in group.words)):
        if given != said:
            raise Uncovered(given or said, "is not said, or not as a word of its own")
    phones = _correct_times([phone for group in groups for phone in group.phones], speech)
    words: list[Segment] = []
    symbols: list[str] = []
    for group in groups:
        if not group.words:
            symbols += group.pronunciation
            continue
        parts = split_phones(group.words, group.pronunciation, lexicon.pronunciations)
        if parts is None:
            raise Uncovered(" ".join(group.words), f"is said {' '.join(group.pronunciation)}")
        for word, part in zip(group.words, parts):
            place = len(symbols)
            symbols += mark_positions(part) if stress else part
            words.append(Segment(word, phones[place].start, phones[len(symbols) - 1].end))
    named = (Segment(symbol, phone.start, phone.end) for symbol, phone in zip(symbols, phones, strict=True))
    return Alignment(tuple(words), tuple(named))


def without_positions(lexicon: Lexicon) -> Lexicon:
    """Of one with word positions: the phones as they are said."""
    return Lexicon.of(
        (word, tuple(phone.rpartition("_")[0] for phone in phones))
        for word, several in lexicon.pronunciations.items()
        for phones in several
    )


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
