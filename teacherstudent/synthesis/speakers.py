"""The speakers of a made corpus: a voice variant, an accent, a speaking rate and a pitch each."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

# Variants of espeak-ng that sound different from one another. Left out: those with breath, which are not the
# same from run to run (Alicia, Demonic, Reed, Storm, caleb, f2, f3, f5, sandro, victor, whisper, whisperf);
# robots and strong echoes, whose phones run into each other; and all but one of those that sound the same.
VARIANTS = (
    "Alex", "Andrea", "Andy", "Annie", "Denis", "Diogo", "Gene", "Hugo", "Jacky", "Lee", "Mario", "Michael",
    "Mr serious", "Tweaky", "adam", "anika", "antonio", "aunty", "belinda", "boris", "croak", "david", "ed",
    "edward", "edward2", "f1", "grandma", "grandpa", "gustave", "ian", "iven", "iven2", "john", "kaukovalta",
    "klatt", "klatt3", "klatt4", "linda", "m1", "m3", "m4", "m5", "m7", "m8", "marcelo", "max", "michel",
    "mike2", "norbert", "pablo", "paul", "pedro", "quincy", "rob", "shelby", "steph", "travis", "zac",
)  # fmt: skip

# Britain, America, Scotland, received pronunciation, Lancaster, the Caribbean
ACCENTS = ("en", "en-us", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
RATES = range(130, 231, 5)  # words a minute
PITCHES = range(25, 76, 5)  # of 0 to 99, relative to the variant's own


@dataclass(frozen=True)
class Speaker:
    id: str
    part: str
    variant: str
    accent: str
    rate: int
    pitch: int

    @property
    def voice(self) -> str:
        """The name that espeak-ng knows it by."""
        return f"{self.accent}+{self.variant}"


def draw_speakers(counts: Mapping[str, int], split: int) -> list[Speaker]:
    """Draw speakers and deal them to parts, `counts[part]` each, in order. `split` alone decides who they are.

    No two are the same. No variant comes again before every other one has come, and the accents take turns, so
    that a part has as many of them as it has room for.
    """
    rng = np.random.default_rng([zlib.crc32(b"speakers"), split])
    possible = len(VARIANTS) * len(ACCENTS) * len(RATES) * len(PITCHES)
    if sum(counts.values()) > possible // 2:
        raise ValueError(
            f"{sum(counts.values())} speakers are too many: espeak-ng has {possible} different ones, "
            f"and at most {possible // 2} of them can be drawn"
        )
    parts = [(part, number) for part, count in counts.items() for number in range(count)]
    accents = rng.permutation(np.array(ACCENTS))
    variants: list[str] = []
    drawn: dict[tuple[str, str, int, int], Speaker] = {}
    for index, (part, number) in enumerate(parts):
        if not variants:
            variants = rng.permutation(np.array(VARIANTS)).tolist()
        variant, accent = variants.pop(), str(accents[index % len(accents)])
        while True:
            key = (variant, accent, int(rng.choice(RATES)), int(rng.choice(PITCHES)))
            if key not in drawn:
                break
        drawn[key] = Speaker(f"{part}-{number:03d}", part, *key)
    return list(drawn.values())
