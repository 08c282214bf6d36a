"""Section `train` of `make bench`: steps of the full-size student, what a plain loop takes for the same, and the start.

python benchmarks/train.py [ROUNDS]

Utterances of 3 to 15 seconds, a few thousand, dealt by Source as in training; the plain loop has as many a batch, on
average, in random order. Both make their step of the same 20 posteriors a frame, and only frames that are no padding
are counted: of the places in a batch, the share that an epoch has, since a few random ones may be lucky or not.
In every round each way takes one step, one after the other. One thread is timed by its own seconds on a
processor, which what else the machine does disturbs least; two threads by the clock on the wall.
"""
# B batch, T frames, F features, S senones, K kept

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from memory import peak_memory
from sampling import measure_sampling
from torch import Tensor, nn
from torch.nn import functional

from teacherstudent.config import Network, Optimisation
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, Normalisation
from teacherstudent.training.batches import Batch, Position, Source, collate
from teacherstudent.training.gradient import Part, compute_gradient
from teacherstudent.training.inference import has_bfloat16
from teacherstudent.training.models import AcousticModel, build_model
from teacherstudent.training.shard_table import ShardTable

NUM_FEATURES, NUM_SENONES, K = 192, 3183, 20
STUDENT = Network(layers=5, cells=768, output_delay_frames=4)
BATCH_FRAMES, CHUNK_FRAMES = 4000, 64
UTTERANCES, TYPICAL_SECONDS, SHORTEST_SECONDS, LONGEST_SECONDS = 4000, 7.0, 3.0, 15.0
ROUNDS = 3
SMALL = Network(layers=2, cells=128, output_delay_frames=4)
SMALL_FRAMES, SMALL_STEPS, SMALL_RATE = 2000, 20, 1.0
PLAIN = "plain, fp32"
SPEED_AIM, MEMORY_AIM = 2.5, 0.6

Step = Callable[[Batch], float]  # takes one, and says what the loss of a frame was before


@dataclass(frozen=True)
class Way:
    """To train: its step, a batch for every round, and which share of an epoch's places are frames, not padding."""

    step: Step
    batches: Sequence[Batch]
    filled: float


# -- data ----------------------------------------------------------------------------------------------------


class MadeSpeech:
    """One shard. A frame is the mean of its senone and noise; few senones are frequent, and each is mistaken for the
    same K - 1 others.
    """

    def __init__(self) -> None:
        draw = np.random.default_rng(0)
        seconds = draw.lognormal(np.log(TYPICAL_SECONDS), 0.5, UTTERANCES)
        seconds = seconds.clip(SHORTEST_SECONDS, LONGEST_SECONDS)
        self.num_frames = np.ceil(seconds / FRAME_SHIFT_SECONDS).astype(np.int64)
        self.ids = tuple(map(str, range(UTTERANCES)))
        self.means = draw.normal(size=(NUM_SENONES, NUM_FEATURES)).astype(np.float32)
        others = draw.integers(1, NUM_SENONES, K - 1).cumsum() % NUM_SENONES
        self.likely = (np.arange(NUM_SENONES)[:, None] + np.unique([0, *others])) % NUM_SENONES  # (S, K)

    def in_epoch(self, epoch: int) -> "MadeSpeech":
        return self

    def __getitem__(self, utterance_id: str) -> Mapping[str, np.ndarray]:
        draw = np.random.default_rng([1, int(utterance_id)])
        count = self.num_frames[int(utterance_id)]
        states = (NUM_SENONES * draw.random(count) ** 4).astype(int)
        senones = np.repeat(states, draw.integers(2, 7, count))[:count]
        noise = draw.normal(size=(count, NUM_FEATURES)).astype(np.float32)
        weights = 0.7 ** np.arange(K) * draw.uniform(0.9, 1, (count, 1)) + 0.01
        probabilities = weights / weights.sum(axis=1, keepdims=True)
        return {
            "values": self.means[senones] + noise,
            "ids": self.likely[senones],
            "probabilities": probabilities.astype(np.float32),
        }

    @cached_property
    def table(self) -> ShardTable:
        return ShardTable.make([self.num_frames])

    def source(self, batch_frames: int) -> Source:
        return Source("machine", [self], [self], self.table, batch_frames, seed=1)

    def random_batches(self, num_utterances: int) -> np.ndarray:
        """(N, num_utterances) of an epoch, without the rest: numbers of utterances."""
        shuffled = np.random.default_rng(2).permutation(UTTERANCES)
        return shuffled[: len(shuffled) // num_utterances * num_utterances].reshape(-1, num_utterances)

    def read(self, rows: np.ndarray) -> Batch:
        """Padded, the longest first, which costs nothing and which collate asks for."""
        chosen = [self[self.ids[row]] for row in sorted(rows, key=lambda row: -self.num_frames[row])]
        return collate([each["values"] for each in chosen], chosen)


# -- the ways to take a step ---------------------------------------------------------------------------------


class PlainStudent(nn.Module):
    """What one would write first; the last frame is repeated for the delay."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.delay = network.output_delay_frames
        self.lstm = nn.LSTM(NUM_FEATURES, network.cells, network.layers, batch_first=True)
        self.output = nn.Linear(network.cells, NUM_SENONES)

    def forward(self, features: Tensor, lengths: Tensor) -> Tensor:
        frames = torch.arange(features.shape[1] + self.delay).minimum(lengths[:, None] - 1)
        hidden, _ = self.lstm(features[torch.arange(len(lengths))[:, None], frames])
        return self.output(hidden[:, self.delay :])

    def copy(self, model: AcousticModel) -> "PlainStudent":
        """Its weights."""
        with torch.no_grad():
            for ours, theirs in zip(self.parameters(), model.parameters(), strict=True):
                ours.copy_(theirs)
        return self


def make_model(network: Network) -> AcousticModel:
    flat = Normalisation(np.zeros(NUM_FEATURES, np.float32), np.ones(NUM_FEATURES, np.float32))
    return build_model(network, NUM_SENONES, flat, seed=0)


def make_optimizer(model: nn.Module, learning_rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), learning_rate, Optimisation().momentum)


def make_step(model: AcousticModel, optimizer: torch.optim.SGD, **options: object) -> Step:
    """options: of Optimisation."""
    settings, noise = Optimisation(**options), torch.Generator()

    def step(batch: Batch) -> float:
        [measured], _ = compute_gradient(model, optimizer, [Part(batch)], noise, settings, 1.0)
        optimizer.step()
        optimizer.zero_grad()  # as in the plain step: between steps nobody has gradients
        return measured.loss / measured.num_frames

    return step


def make_plain_step(model: PlainStudent, optimizer: torch.optim.SGD) -> Step:
    """Its targets are dense, made of the same K posteriors; in padding they are zero."""

    def step(batch: Batch) -> float:
        logits = model(batch.features, batch.lengths)
        targets = torch.zeros_like(logits).scatter_(2, batch.ids, batch.probabilities)
        loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(0, 1), reduction="sum")
        loss = loss / batch.num_frames
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), Optimisation().clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def numeric_modes() -> list[str]:
    if has_bfloat16():
        return ["fp32", "bf16"]
    print("this processor has no bfloat16: fp32 alone is measured")
    return ["fp32"]


# -- speed and memory ----------------------------------------------------------------------------------------


class Record:
    """By way and number of threads, of each round: frames a second, and bytes at most beside weights and momentum."""

    def __init__(self) -> None:
        self.speeds: dict[tuple[str, int], list[float]] = defaultdict(list)
        self.memory: dict[str, list[float]] = defaultdict(list)
        self.rates: dict[tuple[str, int], list[float]] = defaultdict(list)  # operations a second, by mode

    def take(self, name: str, way: Way, number: int, num_threads: int) -> None:
        """One round."""
        batch = way.batches[number]
        with peak_memory() as found:
            seconds = seconds_of(partial(way.step, batch), num_threads)
        num_places = batch.features.shape[0] * batch.features.shape[1]
        self.speeds[name, num_threads].append(way.filled * num_places / seconds)
        self.memory[name].append(found[0])

    def speed(self, way: str, num_threads: int) -> float:
        return statistics.median(self.speeds[way, num_threads])

    def ratio(self, way: str, num_threads: int) -> float:
        """To the plain loop's speed in the same round."""
        pairs = zip(self.speeds[way, num_threads], self.speeds[PLAIN, num_threads], strict=True)
        return statistics.median(speed / plain for speed, plain in pairs)

    def measure_rate(self, mode: str, num_threads: int) -> None:
        """Multiplications and additions a second of one product: a layer's, of the frames of a micro-batch."""
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[mode]
        frames, weights = torch.randn(BATCH_FRAMES, 768).to(dtype), torch.randn(3072, 768).to(dtype)
        multiply = partial(functional.linear, frames, weights)
        multiply()
        seconds = statistics.median(seconds_of(multiply, num_threads) for _ in range(5))
        self.rates[mode, num_threads].append(2 * frames.numel() * len(weights) / seconds)


def seconds_of(function: Callable[[], object], num_threads: int) -> float:
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    begun = clock()
    function()
    return clock() - begun


def make_ways(model: AcousticModel, rounds: int) -> dict[str, Way]:
    """The plain one first."""
    speech = MadeSpeech()
    source = speech.source(BATCH_FRAMES)
    size = round(UTTERANCES / source.num_batches(0))
    rows = speech.random_batches(size)
    lengths = speech.num_frames[rows]
    filled = float(lengths.sum() / (size * lengths.max(axis=1).sum()))
    plain = PlainStudent(STUDENT).copy(model)
    step = make_plain_step(plain, make_optimizer(plain))
    ways = {PLAIN: Way(step, [speech.read(row) for row in rows[:rounds]], filled)}
    batches = [source.batch(Position(0, number)) for number in range(rounds)]
    ours = sum(batch.num_frames for batch in batches) / sum(
        batch.features[:, :, 0].numel() for batch in batches
    )
    optimizer = make_optimizer(model)
    for mode in numeric_modes():
        for name, chunk in ((f"ours, {mode}", 0), (f"ours, {mode}, chunks of {CHUNK_FRAMES}", CHUNK_FRAMES)):
            step = make_step(model, optimizer, numeric_mode=mode, chunk_frames=chunk)
            ways[name] = Way(step, batches, ours)
    print(f"{np.mean([len(batch.lengths) for batch in batches]):.1f} utterances a batch, "
          f"{100 * (1 - ours):.1f} % padding; plain: {size}, {100 * (1 - filled):.1f} % padding")  # fmt: skip
    return ways


def measure_steps(rounds: int) -> None:
    model = make_model(STUDENT)
    ways, record = make_ways(model, rounds), Record()
    few = ways[PLAIN].batches[0]
    few = Batch(few.features[:, :8], few.lengths.clamp(max=8), None, few.ids[:, :8], few.probabilities[:, :8])
    for way in ways.values():
        way.step(few)  # loads what is loaded once; makes the momentum
    modes = [mode for mode in ("fp32", "bf16") if any(mode in name for name in ways)]
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        for number in range(rounds):
            for mode in modes:
                record.measure_rate(mode, num_threads)
            for name, way in ways.items():
                record.take(name, way, number, num_threads)
        print_steps(record, list(ways), model, num_threads)
    torch.set_num_threads(1)
    print_memory(record, model)


def print_steps(record: Record, ways: Sequence[str], model: AcousticModel, num_threads: int) -> None:
    operations = count_operations(model)
    rates = {mode: statistics.median(found) for (mode, n), found in record.rates.items() if n == num_threads}
    floors = {mode: rate / operations for mode, rate in rates.items()}
    each = ", ".join(f"{mode} {rate / 1e9:.0f} Gop/s: {floors[mode]:.0f}" for mode, rate in rates.items())
    print(f"{num_threads} thread{'s' * (num_threads > 1)}; the floor: {operations / 1e6:.0f} M operations a frame at "
          f"this machine's matrix rate, {each} frames a second")  # fmt: skip
    for way in ways:
        speed, floor = record.speed(way, num_threads), floors["bf16" if "bf16" in way else "fp32"]
        print(f"  {way:26} {speed:7.0f} frames a second {record.ratio(way, num_threads):6.2f} of plain "
              f"{speed / floor:6.2f} of the floor")  # fmt: skip


def count_operations(model: AcousticModel) -> int:
    """Multiplications and additions of a frame's step: every weight forward, for the gradient of its input, and for its
    own; the features need no gradient.
    """
    matrices = [parameter.numel() for parameter in model.parameters() if parameter.dim() == 2]
    return 6 * sum(matrices) - 2 * matrices[0]


def print_memory(record: Record, model: AcousticModel) -> None:
    held = 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    peaks = {way: statistics.median(found) for way, found in record.memory.items()}
    print(
        f"memory at most in a step, gradients and activations; with weights and momentum ({held / 1e6:.0f} MB) too"
    )
    for way, peak in peaks.items():
        whole = (held + peak) / (held + peaks[PLAIN])
        print(f"  {way:26} {peak / 1e6:7.0f} MB {peak / peaks[PLAIN]:6.2f} of plain {whole:9.2f} with both")


# -- loss curves ---------------------------------------------------------------------------------------------


def measure_curves() -> None:
    """A small network, the same weights and batches: the loss before every step."""
    source = MadeSpeech().source(SMALL_FRAMES)
    model = make_model(SMALL)
    plain = PlainStudent(SMALL).copy(model)
    steps = {PLAIN: make_plain_step(plain, make_optimizer(plain, SMALL_RATE))}
    for mode in numeric_modes():
        model = make_model(SMALL)
        steps[f"ours, {mode}"] = make_step(model, make_optimizer(model, SMALL_RATE), numeric_mode=mode)
    curves: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(SMALL_STEPS):
        batch = source.batch(Position(0, number))
        for name, step in steps.items():
            curves[name].append(step(batch))
    print(f"loss of {SMALL_STEPS} steps, {SMALL.layers} x {SMALL.cells} cells")
    for name, curve in curves.items():
        worst = max(abs(got / expected - 1) for got, expected in zip(curve, curves[PLAIN], strict=True))
        print(f"  {name:12} {' '.join(f'{loss:.3f}' for loss in curve)}  differs by {worst:.1e} at most")


def train(rounds: int = ROUNDS) -> None:
    """Steps of the full-size student beside a plain loop's; start and resume on a table of a million hours."""
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    measure_curves()
    measure_steps(rounds)
    torch.set_num_threads(former)
    measure_sampling()


if __name__ == "__main__":
    train(*map(int, sys.argv[1:]))
