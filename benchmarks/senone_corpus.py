"""A corpus that bears about 3,000 senones: hours of pseudo-words, whose phones have stress and word position.

python benchmarks/senone_corpus.py FOLDER [HOURS]
"""

import argparse
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from teacherstudent.config import Config, Corpus, Data, Senones
from teacherstudent.data.lexicon import SILENCE, Lexicon
from teacherstudent.data.manifests import HUMAN, shard_paths
from teacherstudent.distributed import connect
from teacherstudent.experiment import Experiment
from teacherstudent.run import find_steps, run_steps
from teacherstudent.synthesis.corpus import make_corpus
from teacherstudent.tying.senones import Inventory

STEPS = ("corpus", "resources", "prepare", "align", "senones")
HOURS = 8.0  # of human-labelled speech; the other parts are as small as they can be
SAMPLING_RATE, SEED = 16000, 0
FRAME_SECONDS = 0.03


@dataclass(frozen=True)
class Census:
    """Of the human-labelled part. Triphones are of phones and silence around a phone; silence is never the centre."""

    hours: float
    num_phones: int  # silence is not among them
    frames: Counter[tuple[str, str, str]]  # of 30 ms, by triphone

    @property
    def num_triphones(self) -> int:
        return len(self.frames)

    @property
    def possible_triphones(self) -> int:
        return self.num_phones**3

    def share_of_frames_in_rare(self, fewer_than: int) -> float:
        """In triphones that have fewer frames than this."""
        return sum(count for count in self.frames.values() if count < fewer_than) / self.frames.total()


def senone_corpus_settings(hours: float = HOURS) -> Corpus:
    return Corpus(
        text="pseudo-words",
        vocabulary=3000,
        phones="position-stress",
        human_speakers=24,
        unlabelled_speakers=2,
        dev_speakers=2,
        test_speakers=2,
        human_minutes=60 * hours,
        unlabelled_minutes=2.0,
        dev_minutes=1.0,
        test_minutes=1.0,
    )


def make_senone_corpus(folder: Path, hours: float = HOURS) -> float | None:
    """Make it, or use what is there; returns the seconds that it took, None for a corpus that was there."""
    there = folder.exists()
    start = time.perf_counter()
    make_corpus(folder, senone_corpus_settings(hours), SAMPLING_RATE, SEED)
    return None if there else time.perf_counter() - start


def take_census(folder: Path) -> Census:
    frames: Counter[tuple[str, str, str]] = Counter()
    seconds = 0.0
    for path in shard_paths(folder, HUMAN):
        with path.open(encoding="utf-8") as file:
            for line in file:
                (supervision,) = json.loads(line)["supervisions"]
                seconds += supervision["duration"]
                phones = [(name, duration) for name, _, duration, _ in supervision["alignment"]["phone"]]
                frames.update(_count_frames(phones))
    return Census(seconds / 3600, len(Lexicon.read(folder / "lexicon.txt").phones), frames)


def _count_frames(phones: list[tuple[str, float]]) -> dict[tuple[str, str, str], int]:
    counts: Counter[tuple[str, str, str]] = Counter()
    for (left, _), ((phone, duration), (right, _)) in zip(phones, pairwise(phones[1:])):
        if phone != SILENCE:
            counts[left, phone, right] += round(duration / FRAME_SECONDS)
    return counts


def describe(census: Census, seconds: float | None) -> Iterator[str]:
    took = "was there" if seconds is None else f"made in {seconds:.0f} s"
    yield f"{census.hours:.2f} hours of speech, {took}; {census.frames.total()} frames of 30 ms in phones"
    seen, possible = census.num_triphones, census.possible_triphones
    yield f"{census.num_phones} phones; {seen} triphones seen of {possible} possible ({seen / possible:.2%})"
    for count in (10, 50):
        share = census.share_of_frames_in_rare(count)
        yield f"{share:.1%} of the frames are in triphones with fewer than {count} frames"


def measure_corpus(folder: Path, hours: float = HOURS) -> None:
    """Make the corpus in folder/corpus if it is not there, and tie its senones in folder/experiment."""
    seconds = make_senone_corpus(folder / "corpus", hours)
    print("\n".join(describe(take_census(folder / "corpus"), seconds)), flush=True)
    shutil.rmtree(folder / "experiment", ignore_errors=True)
    walk(folder, hours)


def walk(folder: Path, hours: float = HOURS) -> None:
    """From the corpus to its senones by the steps themselves: of 3,600 leaves merging leaves about 3,000."""
    data = Data(folder=str(folder / "corpus"))
    config = Config(
        folder=str(folder / "experiment"), data=data, senones=Senones(target=3600)
    )  # of which merging leaves about 3,000
    experiment = Experiment(config)
    experiment.create()
    for step in [step for step in find_steps(experiment, "run") if step.record in STEPS]:
        start = time.perf_counter()
        run_steps(experiment, connect(), [step])
        seconds = time.perf_counter() - start
        print(f"{step.record}: {seconds:.0f} s, {hours * 3600 / seconds:.0f} x real time in two processes")
    inventory = Inventory.load(experiment.path("senones", "inventory.json"))
    print(f"{inventory.num_senones} senones; {json.dumps(inventory.provenance, sort_keys=True)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("hours", type=float, nargs="?", default=HOURS)
    arguments = parser.parse_args()
    measure_corpus(arguments.folder, arguments.hours)


if __name__ == "__main__":
    main()
