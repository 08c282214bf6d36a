"""How far two alignments of the same speech lie apart, phone by phone.

What is compared is where each phone begins, silence too; where an utterance begins is no boundary. When the two say
an utterance with other phones (another pronunciation, a pause more), their sequences are matched first by the fewest
insertions, deletions and substitutions, and only equal phones are compared: the coverage says how many those are.

Two ways of aligning put boundaries of one kind steadily earlier or later: a synthesiser's event for a stop is the
release, an acoustic model's first frame the closure. That shift is taken for what it is, a convention: the median of
each class (the class of the phone that begins) is removed before differences are judged.
"""
# N boundaries

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from teacherstudent.alignment.alignments import PhoneSegments
from teacherstudent.data.lexicon import SILENCE, base_phones

PHONE_CLASSES = {
    "silence": SILENCE,
    "stop": "P B T D K G DX Q TX",
    "fricative": "F V TH DH S Z SH ZH HH X CH JH",  # and affricates
    "nasal": "M N NG EM EN",
    "liquid": "L R W Y WH EL",  # and glides
}
VOWEL = "vowel"  # every other phone


def phone_class(phone: str) -> str:
    """Of ARPAbet phones, marked by stress and place in the word or not."""
    (base,) = base_phones([phone])
    return next((name for name, members in PHONE_CLASSES.items() if base in members.split()), VOWEL)


@dataclass(frozen=True)
class Comparison:
    """Seconds. shifts: by class of phone, how much later ours begin (median). The rest is said without them."""

    boundaries: int
    coverage: float  # share of their boundaries that have one of ours
    median: float
    within_20_ms: float  # share
    within_50_ms: float
    shifts: dict[str, float]


def compare(pairs: Iterable[tuple[PhoneSegments, PhoneSegments]]) -> Comparison:
    """Ours and theirs, utterance by utterance. Raises ValueError when nothing can be compared."""
    differences: list[float] = []
    classes: list[str] = []
    total = 0
    for ours, theirs in pairs:
        total += max(0, len(theirs.phones) - 1)
        for here, there in match(ours.phones, theirs.phones):
            if here and there:
                differences.append(float(ours.starts[here] - theirs.starts[there]))
                classes.append(phone_class(theirs.phones[there]))
    if not differences:
        raise ValueError(
            f"none of {total} boundaries is in both alignments: are they of the same utterances?"
        )
    apart, names = np.array(differences), np.array(classes)
    shifts = {str(name): float(np.median(apart[names == name])) for name in np.unique(names)}
    left = np.abs(apart - [shifts[name] for name in classes])
    return Comparison(
        boundaries=len(left),
        coverage=len(left) / total,
        median=float(np.median(left)),
        within_20_ms=float(np.mean(left <= 0.020)),
        within_50_ms=float(np.mean(left <= 0.050)),
        shifts=shifts,
    )


def match(ours: tuple[str, ...], theirs: tuple[str, ...]) -> list[tuple[int, int]]:
    """Places of equal phones in an alignment with the fewest edits (Wagner & Fischer 1974), ascending.

    A substitution counts as two edits, so that as many as possible are equal; of equals, later phones are matched.
    """
    distance: NDArray[np.int64] = np.zeros((len(ours) + 1, len(theirs) + 1), np.int64)
    distance[:, 0] = np.arange(len(ours) + 1)
    distance[0] = np.arange(len(theirs) + 1)
    for here, phone in enumerate(ours, 1):
        for there, other in enumerate(theirs, 1):
            edits = 1 + min(distance[here - 1, there], distance[here, there - 1])
            distance[here, there] = distance[here - 1, there - 1] if phone == other else edits
    pairs = []
    here, there = len(ours), len(theirs)
    while here and there:
        if ours[here - 1] == theirs[there - 1]:
            here, there = here - 1, there - 1
            pairs.append((here, there))
        elif distance[here - 1, there] <= distance[here, there - 1]:
            here -= 1
        else:
            there -= 1
    return pairs[::-1]
