"""Words that nobody has heard: English syllables put together by chance, with a spelling each.

A syllable is an onset, a nucleus and a coda, drawn from the tables below; the weights follow how often English words
have them, roughly. One syllable of a word has primary stress; in longer words another may have secondary stress; the
rest are weak. No two words of a vocabulary are spelled or said alike, not even by accents that do not tell some
sounds apart.

Phones are espeak-ng's, as it takes them in double square brackets: [[str'INk@t]].
"""

import zlib
from typing import NamedTuple

import numpy as np

# phones, spelling and weight of each; the phones of a cluster are separated by dots
_ONSETS = (
    "/:9 p/p:6 b/b:6 t/t:6 d/d:6 k/k:7 g/g:4 f/f:5 v/v:3 T/th:2 D/dh:1 s/s:7 z/z:1 S/sh:3 Z/zh:0.3 h/h:4 m/m:6 n/n:5 "
    "l/l:6 r/r:6 w/w:4 j/y:2 tS/ch:3 dZ/j:3 p.l/pl:2 p.r/pr:3 b.l/bl:2 b.r/br:2 t.r/tr:3 t.w/tw:1 d.r/dr:2 k.l/cl:2 "
    "k.r/cr:2 k.w/qu:2 g.l/gl:1 g.r/gr:2 f.l/fl:2 f.r/fr:2 T.r/thr:1 S.r/shr:0.5 s.p/sp:2 s.t/st:4 s.k/sk:2 s.l/sl:2 "
    "s.m/sm:1 s.n/sn:1 s.w/sw:1 s.p.r/spr:1 s.p.l/spl:0.5 s.t.r/str:2 s.k.r/scr:1 s.k.w/squ:0.5"
)
_NUCLEI = (
    "I/i:9 E/e:8 a/a:8 V/u:6 0/o:6 U/oo:2 i:/ee:6 eI/ai:7 aI/igh:6 oU/oa:6 u:/ue:4 O:/aw:4 A:/ah:3 3:/ur:3 aU/ou:2 "
    "OI/oi:1"
)
_WEAK_NUCLEI = "@/a:10 I/i:5 i/y:1 oU/o:1.5 E/e:1 a/ae:0.7 u:/eu:0.7 V/uh:0.3 0/au:0.3 eI/ay:0.3 aI/ie:0.3"
_FINAL_CODAS = (
    "/:4 n/n:8 t/t:8 d/d:6 l/l:6 s/ss:5 k/ck:5 m/m:4 z/z:4 p/p:3 N/ng:3 f/ff:2 v/ve:2 tS/tch:2 dZ/dge:1 S/sh:2 "
    "T/th:1 D/dh:0.3 Z/zh:0.3 b/b:2 g/g:2 s.t/st:3 n.t/nt:4 n.d/nd:3 n.s/nce:2 m.p/mp:1 N.k/nk:1 k.s/x:2 l.t/lt:1 "
    "l.d/ld:1 f.t/ft:1 s.k/sk:1 p.t/pt:1 k.t/ct:1 l.k/lk:0.5 l.m/lm:0.5 l.p/lp:0.5 l.f/lf:0.5 n.tS/nch:1 n.dZ/nge:0.5"
)
_INNER_CODAS = "/:20 n/n:4 s/s:2 l/l:2 m/m:2 k/c:1 t/t:1 p/p:1 d/d:0.5 g/g:0.5 f/f:0.5"
_LAX = {"I", "E", "a", "V", "0", "U"}  # English has a consonant after these at the end of a word
_SYLLABLES = (0.25, 0.4, 0.25, 0.1)  # shares of words of 1, 2, 3 and 4
_SECONDARY = 0.6  # of the syllables two away from the primary stress
_MAX_DRAWS = 200  # for one word: after that there are none left

# What some accent does not tell apart; weak vowels are reduced in some.
_ALIKE = {"D": "d", "T": "t", "N": "n", "0": "O:"}
_ALIKE_WEAK = {"@": "V", "i:": "I", "i": "I", "u:": "U"}


class _Table(NamedTuple):
    parts: list[tuple[tuple[str, ...], str]]  # phones and spelling
    cumulative: np.ndarray  # of the weights, up to 1

    @classmethod
    def read(cls, text: str) -> "_Table":
        parts, weights = [], []
        for item in text.split():
            phones, _, rest = item.partition("/")
            spelling, _, weight = rest.partition(":")
            parts.append((tuple(filter(None, phones.split("."))), spelling))
            weights.append(float(weight))
        return cls(parts, np.cumsum(weights) / np.sum(weights))

    def draw(self, rng: np.random.Generator) -> tuple[tuple[str, ...], str]:
        return self.parts[int(np.searchsorted(self.cumulative, rng.random(), side="right"))]


class PseudoWord(NamedTuple):
    spelling: str
    phones: tuple[
        str, ...
    ]  # espeak-ng's; vowels begin with ' (primary) or , (secondary stress), or with neither

    @property
    def spoken(self) -> str:
        """As espeak-ng takes it. A bar keeps apart what it would read as one phoneme."""
        return f"[[{'|'.join(self.phones)}]]"


def make_pseudo_words(count: int, seed: int) -> list[PseudoWord]:
    """`count` words, no two spelled or pronounced alike; the first ones are the same for every count.

    Raises ValueError when there are not so many.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"pseudo-words")])
    tables = [_Table.read(text) for text in (_ONSETS, _NUCLEI, _WEAK_NUCLEI, _INNER_CODAS, _FINAL_CODAS)]
    words: list[PseudoWord] = []
    spellings: set[str] = set()
    sounds: set[tuple[str, ...]] = set()
    while len(words) < count:
        for _ in range(_MAX_DRAWS):
            word = _draw_word(tables, rng)
            sound = _sound(word.phones)
            if word.spelling not in spellings and sound not in sounds:
                break
        else:
            raise ValueError(
                f"there are no {count} pseudo-words: {len(words)} are about as many as can be made"
            )
        spellings.add(word.spelling)
        sounds.add(sound)
        words.append(word)
    return words


def _draw_word(tables: list[_Table], rng: np.random.Generator) -> PseudoWord:
    onsets, nuclei, weak_nuclei, inner_codas, final_codas = tables
    phones: list[str] = []
    spelling = ""
    stresses = _draw_stresses(rng)
    for index, stress in enumerate(stresses):
        last = index == len(stresses) - 1
        onset = onsets.draw(rng)
        while index and not onset[0]:  # no vowel beside a vowel
            onset = onsets.draw(rng)
        nucleus = (nuclei if stress else weak_nuclei).draw(rng)
        coda = (final_codas if last else inner_codas).draw(rng)
        while last and not coda[0] and nucleus[0][0] in _LAX:
            coda = final_codas.draw(rng)
        phones += [*onset[0], stress + nucleus[0][0], *coda[0]]
        spelling += onset[1] + nucleus[1] + coda[1]
    return PseudoWord(spelling, tuple(phones))


def _draw_stresses(rng: np.random.Generator) -> list[str]:
    """A mark for every syllable: ' primary, on one of the first three; , secondary; nothing for a weak one."""
    count = 1 + int(np.searchsorted(np.cumsum(_SYLLABLES), rng.random(), side="right"))
    primary = int(rng.integers(min(count, 3)))
    return [
        "'" if index == primary else "," if abs(index - primary) == 2 and rng.random() < _SECONDARY else ""
        for index in range(count)
    ]


def _sound(phones: tuple[str, ...]) -> tuple[str, ...]:
    """The same for words that some accent may say alike, whatever the stress."""
    sound = []
    for phone in phones:
        bare = phone.lstrip("',")
        weak = not phone.startswith("'")
        sound.append((_ALIKE | _ALIKE_WEAK if weak else _ALIKE).get(bare, bare))
    return tuple(sound)
