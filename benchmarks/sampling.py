"""What stateless sampling costs at a million hours: 100,000 shards of ten hours, 360 million utterances.

Part of the section `train`; by itself: python benchmarks/sampling.py. Shards are simulated, so that what is measured
is ours and not the disk's: their names are there, listed twice as those of features and of targets are, and nothing is
in the files. A real shard adds the time to open two. Every start is a process of its own; its seconds on a processor
are those that other work on the machine disturbs least.
"""

import functools
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from memory import peak_megabytes

from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.packed import open_shards, shard_path
from teacherstudent.data.prefetch import BatchReader, list_requests
from teacherstudent.data.shard_sequence import ShardSequence
from teacherstudent.targets.shard_folder import ShardFolder
from teacherstudent.training.batches import WINDOW_SHARDS, Position, Source
from teacherstudent.training.shard_table import ShardTable
from teacherstudent.training.table_files import TABLE

HOURS, SHARD_HOURS = 1_000_000, 10
MEAN_SECONDS, LONGEST_SECONDS = 10.0, 40.0
BATCH_FRAMES, NUM_FEATURES, K = 4000, 192, 20
RANK, WORKERS = 5, 64
DIFFERENT = 100
READERS = 2
STEPS = 100  # read one after the other: more than the 75 that a window has for each worker
PLACES = {
    "start": (0, 0.0),
    "resume": (3, 0.5),
}  # epoch, and how far into it: the middle stands for any place
STEM = "targets"


class SimulatedShard:
    """Features or targets of one shard: its lengths follow from its number, its values from nothing.

    DIFFERENT shards later, the lengths come again.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    @functools.cached_property
    def num_frames(self) -> np.ndarray:
        random = np.random.default_rng(self.number % DIFFERENT)
        count = int(SHARD_HOURS * 3600 / MEAN_SECONDS)
        seconds = np.clip(random.lognormal(np.log(MEAN_SECONDS) - 0.25, 0.7, count), 0.5, LONGEST_SECONDS)
        return np.ceil(seconds / FRAME_SHIFT_SECONDS).astype(np.int64)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(f"speaker-{self.number:06d}-recording-{row:05d}" for row in range(len(self.num_frames)))

    def _length(self, utterance_id: str) -> int:
        return int(self.num_frames[int(utterance_id.rsplit("-", 1)[1])])


class SimulatedFeatures(SimulatedShard):
    def in_epoch(self, epoch: int) -> "SimulatedFeatures":
        return self

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        return {"values": np.zeros((self._length(utterance_id), NUM_FEATURES), np.float16)}


class SimulatedTargets(SimulatedShard):
    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        shape = (self._length(utterance_id), K)
        return {"ids": np.zeros(shape, np.int32), "probabilities": np.full(shape, 1 / K, np.float32)}


def write_simulated(folder: Path, num_shards: int) -> None:
    """The table as `label` leaves it, but quickly: the rows of the few shards that differ, again and again."""
    folder.mkdir()
    path = folder / TABLE
    ShardTable.make(SimulatedShard(number).num_frames for number in range(DIFFERENT)).save(path)
    cells = np.load(path)
    rows = np.resize(cells[1:], (num_shards, cells.shape[1]))  # it repeats them
    np.save(path, np.concatenate([cells[:1], rows]))
    for number in range(num_shards):
        shard_path(folder, STEM, number).touch()


def open_simulated(folder: Path) -> Source:
    features = ShardSequence(SimulatedFeatures, len(open_shards(folder, STEM)))
    labels = ShardSequence(SimulatedTargets, ShardFolder(folder, STEM).num_shards)
    return Source("machine", features, labels, ShardTable.load(folder / TABLE), BATCH_FRAMES, seed=1)


def take_steps(
    folder: Path, epoch: int, share: float, num_steps: int, readers: int = 0
) -> tuple[list[float], float]:
    """Seconds until each of some steps has its batch, from before anything was opened; this process's megabytes."""
    begun, seconds = time.perf_counter(), []
    source = open_simulated(folder)
    sources, position = {"machine": source}, Position(epoch, int(share * source.num_batches(epoch)))
    requests = list_requests(["machine"] * num_steps, sources, {"machine": position}, RANK, WORKERS)
    with BatchReader(sources, readers) as reader:
        for _, batch in reader.read(requests):
            assert batch.num_frames
            seconds.append(time.perf_counter() - begun)
    return seconds, peak_megabytes()


class Start(NamedTuple):
    """Seconds to the first batch; the same with the start of Python and torch, by the clock and on a processor."""

    seconds: float
    whole_seconds: float
    processor_seconds: float
    megabytes: float  # at most

    def __str__(self) -> str:
        return (
            f"{self.seconds:6.2f} s to the first batch; with the start of Python and torch "
            f"{self.whole_seconds:5.1f} s, {self.processor_seconds:4.1f} s of a processor"
        )


def in_fresh_process(place: str, folder: Path, readers: int = 0) -> Start:
    """Without what its readers need of processor and memory."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, place, str(folder), str(readers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, processor_seconds, megabytes = map(float, done.stdout.split())
    return Start(seconds, time.perf_counter() - begun, processor_seconds, megabytes)


def measure_sampling(hours: int = HOURS) -> None:
    """Start, resume and steps on a table of so many hours, and memory beside that of a table of one shard."""
    num_shards = hours // SHARD_HOURS
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place) / "whole", Path(place) / "small"
        write_simulated(folder, num_shards)
        write_simulated(small, 1)
        utterances = int(ShardTable.load(folder / TABLE).num_utterances.sum())
        print(f"table of {num_shards:,} shards, {utterances / 1e6:.0f} M utterances: "
              f"{(folder / TABLE).stat().st_size / 1e6:.0f} MB")  # fmt: skip
        empty = in_fresh_process("start", small).megabytes
        for action in PLACES:
            start = in_fresh_process(action, folder)
            print(f"{action:8} {start}; {start.megabytes - empty:.0f} MB above one shard ({empty:.0f} MB)")
        print(f"start    {in_fresh_process('start', folder, READERS)}, with {READERS} reader processes")
        found = np.diff(take_steps(folder, 1, 0.1, STEPS)[0])
        print(f"a step   {1e3 * np.median(found):6.1f} ms to make its batch, {1e3 * found.mean():.1f} ms with the "
              f"windows of {WINDOW_SHARDS} shards that it opens, {1e3 * found.max():.0f} ms at most")  # fmt: skip


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in PLACES:  # in the fresh process
        seconds, megabytes = take_steps(Path(sys.argv[2]), *PLACES[sys.argv[1]], 1, int(sys.argv[3]))
        print(seconds[0], time.process_time(), megabytes)
    else:
        measure_sampling(*map(int, sys.argv[1:]))


if __name__ == "__main__":
    main()
