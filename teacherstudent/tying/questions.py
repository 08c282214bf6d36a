"""What a tree may ask about a phone: is it one of these? Sets found from the data, or read from a file.

Variants of a base phone differ in stress or in their place in the word (AE1_B and AE0_E, both of AE). Clusters are
found over base phones, from all frames of their variants, so that a question treats all variants alike; which variant
a phone is, is asked apart. Source: Kaldi's cluster-phones and extra_questions.
"""
# P phones, Q questions, M moments of a cell (1 + 2 D)

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from teacherstudent.data.lexicon import base_phones, marks_positions
from teacherstudent.files import split_lines
from teacherstudent.tying.decision_tree import Question, cluster
from teacherstudent.tying.events import SILENCE_ID, Floats

BOUNDARY = 0  # stands for the neighbour where the utterance ends
STRESSES = {"0": "none", "1": "primary", "2": "secondary"}
# The question sets that word positions give: a neighbour that ends its word means that ours begins one.
POSITIONS_IN_WORD = {
    "first phone of its word": "BS",
    "last phone of its word": "ES",
    "inside its word": "I",
    "alone in its word": "S",
}


def stress(phone: str) -> str:
    """The digit of AE1 or AE1_B; "" where there is none."""
    match = re.search(r"(?<=\D)([0-9])(_[BIES])?$", phone)
    return match[1] if match else ""


def place_in_word(phone: str) -> str:
    """B first, I inside, E last, S alone: the mark of AE1_B; "" where there is none.

    Only of phones that carry such marks: see marks_positions.
    """
    match = re.search(r"_([BIES])$", phone)
    return match[1] if match else ""


def variants(phones: Sequence[str]) -> dict[str, Question]:
    """The ids of every base phone's variants, in the order of the phones; silence left out."""
    found: dict[str, list[int]] = {}
    for phone, base in enumerate(base_phones(phones), 1):
        if phone != SILENCE_ID:
            found.setdefault(base, []).append(phone)
    return {base: tuple(ids) for base, ids in found.items()}


def named_classes(phones: Sequence[str]) -> dict[str, Question]:
    """Classes that the names of the phones tell of, each with its name in words: stress, then place in the word."""
    ids = range(SILENCE_ID + 1, len(phones) + 1)
    marks = sorted({stress(name) for name in phones} - {""})
    classes = {
        f"stress is {STRESSES.get(mark, mark)}": tuple(i for i in ids if stress(phones[i - 1]) == mark)
        for mark in marks
    }
    for words, places in POSITIONS_IN_WORD.items() if marks_positions(phones) else ():
        classes[words] = tuple(i for i in ids if place_in_word(phones[i - 1]) in tuple(places))
    return {words: members for words, members in classes.items() if members}


def find_questions(
    cells: Floats, phones: Sequence[str], groups: Iterable[Question], variance_floor: Floats
) -> list[Question]:
    """Questions about the utterance's end, silence, stress, place in the word, clusters, groups, single phones.

    cells: (P + 1, states, M), of each phone's states; groups: phone ids that are asked about together, those of a
    base phone or single ones. A single phone without frames is not asked about by itself. Of questions that part
    the data alike the first is taken, hence the order: from classes that a person would name to single phones, which
    say the least about phones that were not seen.
    """
    groups = list(groups)
    sums = [cells[list(group)].sum(axis=0) for group in groups]
    heard = [index for index, total in enumerate(sums) if total[:, 0].sum() > 0]
    clusters = [
        tuple(sorted(phone for place in members for phone in groups[heard[place]]))
        for members in cluster([sums[index] for index in heard], variance_floor)
    ]
    singles = [(phone,) for phone in range(1, len(phones) + 1) if cells[phone, :, 0].sum() > 0]
    questions = [*SILENCE_QUESTIONS, *named_classes(phones).values(), *clusters, *groups, *singles]
    return list(dict.fromkeys(questions))


SILENCE_QUESTIONS: list[Question] = [(BOUNDARY,), (BOUNDARY, SILENCE_ID), (SILENCE_ID,)]


def read_questions(path: Path, phones: Sequence[str]) -> list[Question]:
    """Questions from a file: a set of phone names a line, as in Kaldi's extra_questions.txt.

    A base phone's name stands for all its variants. The utterance's end and silence are asked about in any case.
    Raises ValueError naming the file and the line for a name that is no phone, and for phones in no set.
    """
    try:
        lines = split_lines(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"senones.questions = {str(path)!r} cannot be read ({error}): a text file is needed, a set of phones a line"
        ) from None
    known: Mapping[str, Question] = variants(phones) | {name: (i,) for i, name in enumerate(phones, 1)}
    questions = list(SILENCE_QUESTIONS)
    for number, line in enumerate(lines, 1):
        names = line.split()
        wrong = [name for name in names if name not in known]
        if wrong:
            raise ValueError(
                f"{path}, line {number}: {wrong[0]!r} is no phone of the lexicon. Its phones are {_some(phones)}"
            )
        if names:
            questions.append(tuple(sorted({phone for name in names for phone in known[name]})))
    asked = {phone for question in questions for phone in question}
    missing = [name for phone, name in enumerate(phones, 1) if phone not in asked]
    if missing:
        raise ValueError(
            f"{path}: {len(missing)} phones are in no set of the file: {_some(missing)}. No question could tell them "
            "from others: add each to a set that it belongs to, or to a line of its own"
        )
    return list(dict.fromkeys(questions))


def _some(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")
