"""What stateless sampling costs at a million hours: 100,000 shards of ten hours, 360 million utterances.

Part of the section `train`; by itself: python benchmarks/sampling.py. Shards are simulated, so that what is measured
is ours and not the disk's; every start is a process of its own. A real shard adds the time to open two files.
"""

import functools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from teacherstudent.data.features import FRAME_SHIFT_SECONDS
from teacherstudent.data.prefetch import BatchReader, list_requests
from teacherstudent.data.shard_sequence import ShardSequence
from teacherstudent.training.batches import WINDOW_SHARDS, Position, Source
from teacherstudent.training.shard_table import ShardTable

HOURS, SHARD_HOURS = 1_000_000, 10
MEAN_SECONDS, LONGEST_SECONDS = 10.0, 40.0
BATCH_FRAMES, NUM_FEATURES, K = 4000, 192, 20
RANK, WORKERS = 5, 64
DIFFERENT = 100
READERS = 2
STEPS = 100  # read one after the other: more than the 75 that a window has for each worker
ACTIONS = ("import", "start", "resume")


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
    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        return {"values": np.zeros((self._length(utterance_id), NUM_FEATURES), np.float16)}


class SimulatedTargets(SimulatedShard):
    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        shape = (self._length(utterance_id), K)
        return {"ids": np.zeros(shape, np.int32), "probabilities": np.full(shape, 1 / K, np.float32)}


def write_simulated_table(path: Path, num_shards: int) -> None:
    """As `label` leaves it, but quickly: the rows of the few shards that differ, again and again."""
    ShardTable.make(SimulatedShard(number).num_frames for number in range(DIFFERENT)).save(path)
    cells = np.load(path)
    rows = np.resize(cells[1:], (num_shards, cells.shape[1]))  # it repeats them
    np.save(path, np.concatenate([cells[:1], rows]))


def open_simulated(path: Path, num_shards: int) -> Source:
    features = ShardSequence(SimulatedFeatures, num_shards)
    labels = ShardSequence(SimulatedTargets, num_shards)
    return Source("machine", features, labels, ShardTable.load(path), BATCH_FRAMES, seed=1)


def take_steps(
    path: Path, num_shards: int, position: Position, num_steps: int, readers: int = 0
) -> list[float]:
    """Seconds until each of some steps has its batch, from before the table was opened."""
    begun = time.perf_counter()
    source = open_simulated(path, num_shards)
    sources, seconds = {"machine": source}, []
    requests = list_requests(["machine"] * num_steps, sources, {"machine": position}, RANK, WORKERS)
    with BatchReader(sources, readers) as reader:
        for _, batch in reader.read(requests):
            assert batch.num_frames
            seconds.append(time.perf_counter() - begun)
    return seconds


def in_fresh_process(
    action: str, path: Path, num_shards: int, readers: int = 0
) -> tuple[float, float, float]:
    """Seconds to the first batch, the same with the start of Python and torch, and megabytes at most."""
    begun = time.perf_counter()
    command = [sys.executable, __file__, action, str(path), str(num_shards), str(readers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, megabytes = map(float, done.stdout.split())
    return seconds, time.perf_counter() - begun, megabytes


def _act(action: str, path: Path, num_shards: int, readers: int) -> None:
    """In the fresh process. The middle of epoch 3 stands for any place."""
    seconds = 0.0
    if action != "import":
        middle = num_shards * int(SHARD_HOURS * 3600 / FRAME_SHIFT_SECONDS / BATCH_FRAMES) // 2
        position = Position(3, middle) if action == "resume" else Position()
        seconds = take_steps(path, num_shards, position, 1, readers)[0]
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(seconds, megabytes)


def measure_sampling(hours: int = HOURS) -> None:
    """Start, resume and steps on a table of so many hours, and memory beside that of an empty table."""
    num_shards = hours // SHARD_HOURS
    with tempfile.TemporaryDirectory() as folder:
        path, small = Path(folder) / "shard_table.npy", Path(folder) / "small.npy"
        write_simulated_table(path, num_shards)
        write_simulated_table(small, 1)
        size = path.stat().st_size / 1e6
        utterances = int(ShardTable.load(path).num_utterances.sum())
        print(f"table of {num_shards:,} shards, {utterances / 1e6:.0f} M utterances: {size:.0f} MB")
        empty = in_fresh_process("start", small, 1)[2]
        for action in ("start", "resume"):
            seconds, whole, megabytes = in_fresh_process(action, path, num_shards)
            print(f"{action:8} {seconds:6.2f} s to the first batch, {whole:5.1f} s with the start of Python and torch; "
                  f"{megabytes - empty:5.0f} MB above one shard ({empty:.0f} MB)")  # fmt: skip
        seconds, whole, _ = in_fresh_process("start", path, num_shards, READERS)
        print(f"start    {seconds:6.2f} s with {READERS} reader processes, {whole:5.1f} s in all")
        found = np.diff(take_steps(path, num_shards, Position(1, 12345), STEPS))
        print(f"a step   {1e3 * np.median(found):6.1f} ms to make its batch, {1e3 * found.mean():.1f} ms with the "
              f"windows of {WINDOW_SHARDS} shards that it opens, {1e3 * found.max():.0f} ms at most")  # fmt: skip


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in ACTIONS:
        _act(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        measure_sampling(*map(int, sys.argv[1:]))


if __name__ == "__main__":
    main()
