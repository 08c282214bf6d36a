"""Section `store` of `make bench`: size, exactness, speed and memory of the target store.

python benchmarks/store.py [EXPERIMENT]   with the trained teacher of an experiment's folder instead of the small one
"""
# T frames, S senones, K kept

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import torch
from lhotse.features.io import NumpyHdf5Reader, NumpyHdf5Writer
from memory import peak_megabytes

from teacherstudent.data.packed import open_shards, shard_path
from teacherstudent.posteriors import TopK, renormalise, top_k
from teacherstudent.store import TargetStore, TargetWriter
from teacherstudent.targets.codings import CODINGS
from teacherstudent.targets.store_commands import estimate
from teacherstudent.targets.target_shard import iter_batches
from teacherstudent.training import checkpoint
from teacherstudent.training.models import model_from_state

KEPT = 20
NUM_SENONES, NUM_ROOTS, NUM_INPUTS = 3183, 80, 40
TRAINING_STEPS, UTTERANCES = 400, 500
SHARD_UTTERANCES = 100
ROUNDS = 5
READ_BLOCKS = 16  # at a time, as the store does
SHARDS_IN_MEMORY_TEST = 40

Outputs = dict[str, TopK]


class MadeSpeech:
    """Features with the confusions of speech: a phone state's senones lie near one another, and share their numbers'
    range; context chooses among them; noise is like that of the frame before.
    """

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng([seed, 1])
        self.root = np.sort(draw.integers(0, NUM_ROOTS, NUM_SENONES))
        self.first = np.searchsorted(self.root, np.arange(NUM_ROOTS))
        self.count = np.maximum(np.bincount(self.root, minlength=NUM_ROOTS), 1)
        self.means = draw.normal(size=(NUM_ROOTS, NUM_INPUTS))[self.root]
        self.means += 0.55 * draw.normal(size=(NUM_SENONES, NUM_INPUTS))
        self.draw = np.random.default_rng([seed, 2])

    def utterance(self, noise: float, num_phones: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (T, F) and senones (T,)."""
        draw = self.draw
        phones = draw.integers(0, NUM_ROOTS, num_phones + 2)
        left, middle, right = phones[:-2], phones[1:-1], phones[2:]
        context = (left * 7919 + right * 104729 + middle * 31) % 997 / 997
        senones = np.minimum(
            self.first[middle] + (self.count[middle] * context**2).astype(int), NUM_SENONES - 1
        )
        senones = np.repeat(senones, draw.integers(2, 7, num_phones))
        means = self.means[senones]
        blurred = (means + (np.roll(means, 1, 0) + np.roll(means, -1, 0)) / 2) / 1.6
        hiss = draw.normal(size=means.shape)
        hiss = (hiss + np.roll(hiss, 1, 0)) / 2**0.5
        features = blurred + 0.4 * draw.normal(size=NUM_INPUTS) + noise * hiss
        return torch.from_numpy(features.astype("float32")), torch.from_numpy(senones)


class SmallTeacher(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(NUM_INPUTS, 160, bidirectional=True, batch_first=True)
        self.output = torch.nn.Linear(320, NUM_SENONES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.output(self.lstm(features)[0])
        return logits


def train_small_teacher(speech: MadeSpeech) -> SmallTeacher:
    torch.manual_seed(0)
    model = SmallTeacher()
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    for step in range(TRAINING_STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * max(0.05, 1 - step / TRAINING_STEPS)
        pairs = [speech.utterance(float(speech.draw.choice([0.5, 0.9])), 30) for _ in range(12)]
        length = min(len(senones) for _, senones in pairs)
        features = torch.stack([x[:length] for x, _ in pairs])
        senones = torch.stack([y[:length] for _, y in pairs])
        loss = torch.nn.functional.cross_entropy(model(features).flatten(0, 1), senones.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def make_outputs(model: SmallTeacher, speech: MadeSpeech, noise: float) -> Outputs:
    """What it says of utterances that it has not seen."""
    outputs = {}
    with torch.inference_mode():
        for number in range(UTTERANCES):
            features, _ = speech.utterance(noise, int(speech.draw.integers(15, 90)))
            outputs[f"utterance-{number:05d}"] = top_k(model(features[None])[0], KEPT)
    return outputs


def read_outputs(experiment: Path) -> Outputs:
    """What an experiment's teacher says of the first utterances of its unlabelled part."""
    model = model_from_state(checkpoint.load(experiment / "teacher" / "best.pt")).eval()
    outputs: Outputs = {}
    with torch.inference_mode():
        for shard in open_shards(experiment / "features" / "unlabelled", "features"):
            for utterance_id, arrays in shard:
                if len(outputs) == UTTERANCES:
                    return outputs
                features = torch.from_numpy(arrays["values"].astype("float32"))[None]
                outputs[utterance_id] = top_k(model(features, torch.tensor([features.shape[1]]))[0], KEPT)
    return outputs


def write_store(folder: Path, outputs: Outputs, num_senones: int, coding: str) -> float:
    """Returns the seconds it took."""
    names = list(outputs)
    start = time.perf_counter()
    for number, first in enumerate(range(0, len(names), SHARD_UTTERANCES)):
        path = shard_path(folder, "targets", number)
        with TargetWriter(path, num_senones, KEPT, {"teacher": "benchmark"}, coding) as writer:
            for name in names[first : first + SHARD_UTTERANCES]:
                writer.write_best(name, outputs[name])
    return time.perf_counter() - start


def write_lhotse(path: Path, outputs: Outputs) -> None:
    """The same targets in the same types as our plain coding, an array each."""
    with NumpyHdf5Writer(str(path)) as writer:
        for name, best in outputs.items():
            writer.write(f"{name}-ids", best.ids.numpy().astype("uint16"))
            writer.write(f"{name}-log_posteriors", best.log_posteriors.numpy().astype("float16"))


def measure_divergence(store: TargetStore, outputs: Outputs) -> tuple[float, float]:
    """Mean and largest Kullback-Leibler divergence of a frame from the unquantised, renormalised targets, in nats."""
    divergences = []
    for number in range(store.num_shards):
        for name, ids, log_posteriors in store.iter_shard(number):
            true = renormalise(outputs[name].log_posteriors.double()).numpy()
            order, stored = outputs[name].ids.numpy().argsort(axis=1), ids.argsort(axis=1)
            true = np.take_along_axis(true, order, axis=1)
            got = np.take_along_axis(log_posteriors.astype(np.float64), stored, axis=1)
            divergences.append((np.exp(true) * (true - got)).sum(axis=1))
    joined = np.concatenate(divergences)
    return float(joined.mean()), float(joined.max())


def compare_reading(ours: dict[str, TargetStore], lhotse: NumpyHdf5Reader, outputs: Outputs) -> None:
    """In turns, so that other work on the machine meets all alike; medians of ratios."""
    names = list(outputs)
    shuffled = [names[place] for place in np.random.default_rng(0).permutation(len(names))]
    num_frames = sum(len(best.ids) for best in outputs.values())

    def read_lhotse(order: list[str], renormalised: bool) -> Iterator[object]:
        for name in order:
            ids, logs = lhotse.read(f"{name}-ids"), lhotse.read(f"{name}-log_posteriors")
            if renormalised:  # what a training needs, and what ours gives
                ids, logs = ids.astype(np.int32), logs.astype(np.float32)
                logs -= np.log(np.exp(logs).sum(axis=1, keepdims=True))
            yield ids, logs

    def read_in_order(store: TargetStore) -> Iterator[object]:
        for number in range(store.num_shards):
            yield from store.iter_shard(number)

    for what in ("in order", "at random"):
        seconds: dict[str, list[float]] = {}
        for _ in range(ROUNDS + 1):
            for name, store in (("lhotse", None), ("lhotse, renormalised", None), *ours.items()):
                start = time.perf_counter()
                if store is None:
                    reading = read_lhotse(names if what == "in order" else shuffled, name != "lhotse")
                else:
                    reading = read_in_order(store) if what == "in order" else map(store.__getitem__, shuffled)
                for _ in reading:
                    pass
                seconds.setdefault(name, []).append(time.perf_counter() - start)
        counted = {name: values[1:] for name, values in seconds.items()}  # the first round compiles
        for name, values in counted.items():
            ratio = np.median(np.divide(counted["lhotse"], values))
            speed = num_frames / np.median(values)
            print(f"read {what:9} {name:20} {speed / 1e6:6.2f} M frames a second, {ratio:5.1f} of lhotse's")


def measure_steps(folder: Path, num_frames: int) -> None:
    """Where the time of reading a compact store in order goes: each step does what those before it do, and more."""
    store, shards = TargetStore(folder), open_shards(folder, "targets")
    records = [h5py.File(shard.path, rdcc_nbytes=0)["arrays/records"] for shard in shards]
    rows = READ_BLOCKS * CODINGS["compact"].block_rows
    steps = {
        "HDF5": lambda number: (
            records[number][start : start + rows] for start in range(0, len(records[number]), rows)
        ),
        "+ checksums": lambda number: shards[number].iter_batches(READ_BLOCKS),
        "+ decoding": lambda number: iter_batches(shards[number]),
        "+ utterances": store.iter_shard,
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 1):
        for name, step in steps.items():
            start = time.process_time()
            for number in range(len(shards)):
                for _ in step(number):
                    pass
            seconds[name].append(time.process_time() - start)
    parts = (f"{name} {np.median(times[1:]) / num_frames * 1e9:.0f}" for name, times in seconds.items())
    print(f"read in order, processor time, ns a frame: {', '.join(parts)}")


def measure_memory(folder: Path, outputs: Outputs) -> None:
    """Peak memory of a process that reads at random and in order, at 1 and 100 times as many shards."""
    (first, best), *_ = outputs.items()
    few = TopK(*(part[:40] for part in best))
    peaks = {}
    for times in (1, 100):
        place = folder / str(times)
        for number in range(SHARDS_IN_MEMORY_TEST * times):
            with TargetWriter(shard_path(place, "targets", number), NUM_SENONES, KEPT) as writer:
                for row in range(20):
                    writer.write_best(f"{first}-{number}-{row}", few)
        command = [sys.executable, __file__, "--memory", str(place), str(folder / "cache"), first]
        peaks[times] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(
            f"peak memory with {SHARDS_IN_MEMORY_TEST * times:5} shards {peaks[times]:7.1f} MB above an idle process"
        )
    print(f"at 100 times the shards {peaks[100] - peaks[1]:+.1f} MB")


def read_for_memory(folder: str, cache: str, first: str) -> None:
    """In a process of its own: prints by how many megabytes its peak grew."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
    before = peak_megabytes()
    store = TargetStore(folder, cache_folder=cache)
    draw = np.random.default_rng(0)
    for _ in range(1000):
        number, row = draw.integers(store.num_shards), draw.integers(20)
        store[f"{first}-{number}-{row}"]
    for number in range(store.num_shards):
        for _ in store.iter_shard(number):
            pass
    print(peak_megabytes() - before)


def describe_outputs(outputs: Outputs) -> int:
    num_frames = sum(len(best.ids) for best in outputs.values())
    kept = 1 - float(torch.cat([best.dropped for best in outputs.values()]).mean())
    logs = renormalise(torch.cat([best.log_posteriors for best in outputs.values()]))
    known = [np.isin(a, b).mean() for best in list(outputs.values())[:50]
             for a, b in zip(best.ids.numpy()[1:], best.ids.numpy()[:-1])]  # fmt: skip
    print(
        f"{len(outputs)} utterances, {num_frames:,} frames; {kept:.4f} of the probability kept, entropy "
        f"{-float((logs.exp() * logs).sum(1).mean()):.3f} nats, {np.mean(known):.2f} of the senones known"
    )
    return num_frames


def measure_store(folder: Path, outputs: Outputs, num_senones: int) -> None:
    num_frames = describe_outputs(outputs)
    stores = {}
    for coding in CODINGS:
        write_store(folder / "warm", dict(list(outputs.items())[:2]), num_senones, coding)
        seconds = write_store(folder / coding, outputs, num_senones, coding)
        stores[coding] = TargetStore(folder / coding)
        size = stores[coding].info().bytes_per_frame
        guess = estimate(1, KEPT, num_senones).bytes_per_frame[coding]
        mean, most = measure_divergence(stores[coding], outputs)
        print(
            f"{coding:8} {size:6.2f} bytes a frame (estimated {guess:.1f}); divergence {mean:.1e} nats, "
            f"at most {most:.1e}; written at {num_frames / seconds / 1e6:.2f} M frames a second"
        )
    write_lhotse(folder / "lhotse.h5", outputs)
    print(f"lhotse   {(folder / 'lhotse.h5').stat().st_size / num_frames:6.2f} bytes a frame")
    measure_steps(folder / "compact", num_frames)
    compare_reading(stores, NumpyHdf5Reader(str(folder / "lhotse.h5")), outputs)


def store(experiment: Path | None = None) -> None:
    """The target store: bytes, divergence, writing, reading beside lhotse's NumpyHdf5 files, memory; one thread."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if experiment is not None:
            num_senones = model_from_state(checkpoint.load(experiment / "teacher" / "best.pt")).num_senones
            outputs = read_outputs(experiment)
            measure_store(Path(name), outputs, num_senones)
        else:
            speech = MadeSpeech(seed=0)
            model = train_small_teacher(speech)
            for noise in (0.5, 0.9):
                print(
                    f"-- a small LSTM trained on made speech of {NUM_SENONES} senones, noise {noise}",
                    flush=True,
                )
                outputs = make_outputs(model, speech, noise)
                measure_store(Path(name) / str(noise), outputs, NUM_SENONES)
        measure_memory(Path(name) / "memory", outputs)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        read_for_memory(*sys.argv[2:])
    else:
        store(Path(sys.argv[1]) if sys.argv[1:] else None)
