"""The tree of a phone as text, its questions in words."""

import difflib
from collections.abc import Sequence

from teacherstudent.data.lexicon import base_phones
from teacherstudent.tying.decision_tree import POSITIONS, Question
from teacherstudent.tying.events import NUM_STATES
from teacherstudent.tying.questions import BOUNDARY, SILENCE_QUESTIONS, named_classes, variants
from teacherstudent.tying.senones import Inventory

_SUBJECTS = ("left neighbour", "phone", "right neighbour")
_STATES = ("first frame", "later frames")
# Sounds of one manner, in ARPAbet and in the IPA: a cluster within one is called by it.
_MANNERS = {
    "nasals": "M N NG EM EN ENG m n ŋ ɲ ɱ m̩ n̩",
    "stops": "P B T D K G DX p b t d k ɡ ʔ ɾ c ɟ pʰ tʰ kʰ cʰ",
    "affricates": "CH JH tʃ dʒ",
    "fricatives": "F V TH DH S Z SH ZH HH f v θ ð s z ʃ ʒ h ç",
    "liquids and glides": "L R W Y EL l ɹ ɫ ʎ j w",
    "vowels": "AA AE AH AO AX ER EH IH IY OH UH UW AW AY EY OW OY "
    "a ɑ æ ʌ ɔ ə ɛ ɜ ɝ ɚ ɪ i u ʊ e o ɒ ɐ iː uː ɑː ɔː ɜː aj aw ej ow ɔj aɪ aʊ eɪ oʊ əʊ ɔɪ",
}


def show(inventory: Inventory, phone: str) -> str:
    """The trees of a phone, or of all variants of a base phone, drawn as text: a root's questions down to its senones.

    Variants and states that share a root are shown together. What is known of the phone already is not asked again.
    Raises ValueError naming the nearest phone for one that the inventory lacks.
    """
    ids = _find_phones(inventory, phone)
    cells_of: dict[int, list[tuple[int, int]]] = {}
    for state in range(NUM_STATES):
        for member in ids:
            cells_of.setdefault(inventory.roots[member - 1][state], []).append((member, state))
    return "\n\n".join("\n".join(_draw(inventory, root, cells)) for root, cells in cells_of.items()) + "\n"


def _find_phones(inventory: Inventory, phone: str) -> Question:
    of_base = variants(inventory.phones)
    if phone in inventory.phones:
        return (inventory.phones.index(phone) + 1,)
    if phone in of_base:
        return of_base[phone]
    known = list(dict.fromkeys([*of_base, *inventory.phones]))
    letters = {name.lower(): name for name in reversed(known)}
    close = difflib.get_close_matches(phone.lower(), letters, n=1, cutoff=0.0)
    raise ValueError(
        f"the inventory has no phone {phone!r}: the nearest is {letters[close[0]]!r}. Its phones are "
        + " ".join(dict.fromkeys(base_phones(inventory.phones)))
    )


def _draw(inventory: Inventory, root: int, cells: Sequence[tuple[int, int]]) -> list[str]:
    """The lines of one root: a heading, then each place of the tree below the one that leads to it."""
    phones = sorted({phone for phone, _ in cells})
    states = sorted({state for _, state in cells})
    names = " ".join(inventory.phones[phone - 1] for phone in phones)
    lines = [f"{names}, {' and '.join(_STATES[state] for state in states)}"]
    everything = list(range(len(inventory.phones) + 1))
    start = (everything, phones, everything, states)
    waiting: list[tuple[int, tuple[list[int], ...], str, str, str]] = [(root, start, "", "", "")]
    while waiting:
        place, reach, indent, branch, answer = waiting.pop()
        while place >= 0:
            position, question, if_yes, if_no = inventory.nodes[place]
            members = set(inventory.questions[question])
            yes = [value for value in reach[position] if value in members]
            no = [value for value in reach[position] if value not in members]
            if yes and no:
                break
            place = if_yes if yes else if_no
        if place < 0:
            share = 100 * inventory.priors[~place]
            lines.append(f"{indent}{branch}{answer}senone {~place}, prior {share:.3g} %")
            continue
        words = describe(inventory.phones, position, yes, reach[position])
        lines.append(f"{indent}{branch}{answer}{words}?")
        below = indent + {"": "", "├─ ": "│  ", "└─ ": "   "}[branch]
        for place_below, values, sign, reply in ((if_no, no, "└─ ", "no: "), (if_yes, yes, "├─ ", "yes: ")):
            narrowed = (*reach[:position], values, *reach[position + 1 :])
            waiting.append((place_below, narrowed, below, sign, reply))
    return lines


def describe(phones: Sequence[str], position: int, members: Sequence[int], among: Sequence[int]) -> str:
    """A question in words: is the value at this position one of `members`, of those that it can be, `among`?"""
    if POSITIONS[position] == "state":
        return ("first frame of its phone", "later frame of its phone")[members[0]]
    subject = _SUBJECTS[position]
    chosen = set(members)
    for silent, words in zip(
        SILENCE_QUESTIONS, ("the utterance's edge", "silence or the utterance's edge", "silence")
    ):
        if chosen == set(silent):
            return f"{subject} is {words}"
    for words, ids in named_classes(phones).items():
        if chosen == set(ids).intersection(among):
            if POSITIONS[position] == "centre":
                return words
            return f"{subject}'s {words}" if words.startswith("stress") else f"{subject} is {_article(words)}"
    names = _shortest_names(phones, chosen, set(among))
    if len(names) == 1:
        return f"{subject} is {names[0]}"
    of_phone = base_phones(phones)
    bases = {of_phone[phone - 1] for phone in chosen if phone != BOUNDARY}
    manner = next((name for name, sounds in _MANNERS.items() if bases <= set(sounds.split())), "")
    return f"{subject} is one of: {' '.join(names)}" + (f" ({manner})" if manner else "")


def _article(words: str) -> str:
    return f"the {words}" if words.startswith(("first", "last")) else words


def _shortest_names(phones: Sequence[str], chosen: set[int], among: set[int]) -> list[str]:
    """A base phone's name where all its variants are meant, else the variants'."""
    names = ["the utterance's edge"] if BOUNDARY in chosen else []
    names += [phones[phone - 1] for phone in sorted(chosen) if phone == 1]
    for base, ids in variants(phones).items():
        possible = set(ids) & among
        if possible and possible <= chosen:
            names.append(base)
        else:
            names += [phones[phone - 1] for phone in sorted(possible & chosen)]
    return names
