"""The section `senones` of `make bench`: a tree for every phone of English with stress and place in the word."""

import itertools
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np

from teacherstudent.config import Senones
from teacherstudent.tying.events import NUM_TREE_FEATURES, SILENCE_ID, Statistics, frame_events
from teacherstudent.tying.questions import place_in_word, stress, variants
from teacherstudent.tying.senones import Inventory, build

VOWELS = ("AA", "AE", "AH", "AO", "AW", "AY", "EH", "ER", "EY", "IH", "IY", "OW", "OY", "UH", "UW")
CONSONANTS = (
    *("B", "CH", "D", "DH", "F", "G", "HH", "JH", "K", "L", "M", "N", "NG"),
    *("P", "R", "S", "SH", "T", "TH", "V", "W", "Y", "Z", "ZH"),
)
PLACES = "BIES"
PHONES = (
    "SIL",
    *(f"{vowel}{mark}_{place}" for vowel, mark, place in itertools.product(VOWELS, "012", PLACES)),
    *(f"{consonant}_{place}" for consonant, place in itertools.product(CONSONANTS, PLACES)),
)
NUM_CLASSES = 5  # of neighbours, in the tying that the data are drawn from; silence is one of them
NUM_WORDS, WORD_PHONES = 10_000, (1, 8)
FRAMES, CHUNK_FRAMES = 3_000_000, 100_000


class KnownTying:
    """Speech whose frames depend on base phone, state, stress, and the classes of the neighbours' base phones.

    Base phones of a class sound alike. Words are drawn with Zipf's frequencies. All depends on the seed alone.
    """

    def __init__(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        bases = variants(PHONES)
        size = len(bases) + 1
        self.base = np.zeros(len(PHONES) + 1, np.int64)
        for number, ids in enumerate(bases.values(), 1):
            self.base[list(ids)] = number
        self.stress = np.array([0, *(int(stress(name) or 0) for name in PHONES)])
        self.neighbour_class = np.concatenate([[0], 1 + np.arange(size - 1) % (NUM_CLASSES - 1)])
        self.of_base = self._normal(size, 2) + 4 * self._normal(NUM_CLASSES, 2)[self.neighbour_class]
        self.of_stress = self._normal(size, 2, 3)
        self.of_left, self.of_right = self._normal(size, 2, NUM_CLASSES), self._normal(size, 2, NUM_CLASSES)
        self.words = self._draw_words()

    def _normal(self, *shape: int) -> np.ndarray:
        return self.generator.normal(size=(*shape, NUM_TREE_FEATURES))

    def _draw_words(self) -> list[np.ndarray]:
        """Some with silence before them."""
        at = {
            place: [i for i, name in enumerate(PHONES, 1) if place_in_word(name) == place] for place in PLACES
        }
        words = []
        for length in self.generator.integers(*WORD_PHONES, NUM_WORDS):
            places = "S" if length == 1 else "B" + "I" * (length - 2) + "E"
            word = [self.generator.choice(at[place]) for place in places]
            words.append(np.array([SILENCE_ID, *word] if self.generator.random() < 0.1 else word))
        return words

    def draw_phones(self, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
        """Every phone lasts 1 to 4 frames."""
        shares = 1 / np.arange(1, NUM_WORDS + 1)
        drawn = self.generator.choice(NUM_WORDS, num_frames // WORD_PHONES[1], p=shares / shares.sum())
        phones = np.concatenate([self.words[word] for word in drawn])
        durations = self.generator.integers(1, 5, len(phones))
        first = np.zeros(durations.sum(), bool)
        first[np.cumsum(durations) - durations] = True
        return np.repeat(phones, durations), first

    def classes(self, events: np.ndarray) -> np.ndarray:
        """(N, 4) events -> (N, 5): base phone, state, stress, classes of left and right. Silence has one a state."""
        left, centre, right, state = events.T
        around = self.neighbour_class[self.base[left]], self.neighbour_class[self.base[right]]
        found = np.stack([self.base[centre], state, self.stress[centre], *around], axis=1)
        found[centre == SILENCE_ID, 2:] = 0
        return found

    def draw_features(self, events: np.ndarray) -> np.ndarray:
        base, state, mark, left, right = self.classes(events).T
        mean = self.of_base[base, state] + self.of_stress[base, state, mark]
        mean += self.of_left[base, state, left] + self.of_right[base, state, right]
        return mean + self.generator.normal(size=mean.shape)


def measure(num_frames: int = FRAMES) -> dict[str, float]:
    """In this process: seconds for statistics and for the tree, peak memory, and how much of the tying was found."""
    tying = KnownTying(seed=0)
    statistics, seconds = Statistics(len(PHONES)), 0.0
    while statistics.num_frames < num_frames:
        phone, first = tying.draw_phones(CHUNK_FRAMES)
        features = tying.draw_features(frame_events(phone, first))
        start = time.perf_counter()
        statistics.accumulate(features, phone, first)
        seconds += time.perf_counter() - start
    start = time.perf_counter()
    inventory = build(statistics, PHONES, Senones(target=3000, min_count=50))
    found = {"statistics_seconds": seconds, "tree_seconds": time.perf_counter() - start}
    found["peak_gigabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return found | _compare(statistics, inventory, tying) | {"frames": statistics.num_frames}


def _compare(statistics: Statistics, inventory: Inventory, tying: KnownTying) -> dict[str, float]:
    """Shares of frames that are in their senone's commonest class, and in their class's commonest senone."""
    events, moments = statistics.events()
    classes, truth = np.unique(tying.classes(events), axis=0, return_inverse=True)
    table = np.zeros((len(classes), inventory.num_senones))
    np.add.at(table, (truth.ravel(), inventory.senones(events)), moments[:, 0])
    return {
        "events": len(events),
        "senones": inventory.num_senones,
        "classes": len(classes),
        "pure": table.max(axis=0).sum() / table.sum(),
        "whole": table.max(axis=1).sum() / table.sum(),
    }


def senones() -> None:
    """A tree for phones with stress and place in the word, from data drawn from a known tying: time and memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:  # its memory is its own
        found = pool.submit(measure).result()
    print(
        f"{len(PHONES)} phones, {(len(PHONES) + 1) ** 2 * len(PHONES) / 1e6:.1f} M triphones, "
        f"{found['events'] / 1e3:.0f} k triphone states in {found['frames'] / 1e6:.1f} M frames of 30 ms: "
        f"{found['senones']} senones in {found['tree_seconds'] / 60:.2f} minutes on one core, "
        f"{found['peak_gigabytes']:.2f} GB at most; statistics at "
        f"{found['frames'] / found['statistics_seconds'] / 1e3:.0f} k frames a second"
    )
    print(
        f"of {found['classes']} classes that the data were drawn from: {100 * found['pure']:.1f} % of the frames are "
        f"of their senone's commonest class, {100 * found['whole']:.1f} % in their class's commonest senone"
    )


if __name__ == "__main__":
    senones()
