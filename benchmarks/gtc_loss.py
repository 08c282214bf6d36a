"""Section `gtc-loss` of `make bench`: what a fast exchange learns, loss beside bytes and time.

python benchmarks/gtc_loss.py [EXPERIMENT] [STEPS]   on the machine-labelled speech of an experiment's folder, as `make
smoke` leaves it, instead of made-up speech

The runs are short: a density of 1e-3 moves a weight once in a thousand steps, hence 1e-2, and the ramp from it to 1e-3.

Two real processes over a shaped link. Every method has the same batches and initial weights, SGD with momentum and
gradients clipped as in training (ours each worker's own before the exchange, as train.py does; DDP the mean after it),
and its own learning rate: the one of a common grid with the lowest loss on a development part, with a seed that is not
reported. Losses are on a test part, means over the reported seeds.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from links import Links, bytes_transmitted, find_obstacle
from store import NUM_INPUTS, NUM_SENONES, MadeSpeech
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from teacherstudent import config
from teacherstudent.config import Network
from teacherstudent.data.feature_reader import read_normalisation
from teacherstudent.data.features import Normalisation
from teacherstudent.data.manifests import DEV, TEST
from teacherstudent.distributed import GTC, Communicator, ExactAveraging
from teacherstudent.experiment import Experiment
from teacherstudent.training.batches import Batch, Position, collate
from teacherstudent.training.models import build_model
from teacherstudent.training.train import batch_loss
from teacherstudent.training.trainings import labelled_source, open_source
from teacherstudent.tying.senones import Inventory

NUM_WORKERS, BITS_PER_SECOND = 2, 10**8
STEPS = 300
GRID = (0.125, 0.25, 0.5, 1.0)
MOMENTUM, CLIP_NORM, WARMUP_STEPS = 0.9, 1.0, 20
PLAIN_STEPS = 2  # that PowerSGD's hook needs before it compresses
CHOOSING_SEED, REPORTED_SEEDS = 0, (1, 2, 3)
NETWORK = Network(layers=2, cells=96, output_delay_frames=4)
BATCH_FRAMES, UTTERANCE_PHONES, NOISE = 320, 20, 0.5
HELD_OUT_UTTERANCES, HELD_OUT_BATCHES = 40, 16

EXACT, POWER_SGD = "exact", "PowerSGD 1"


def list_methods(num_steps: int) -> dict[str, dict[str, Any]]:
    """Options of GTC by the method's name; the ramp ends with the run."""
    return {
        EXACT: {},
        POWER_SGD: {},
        "GTC 1e-2": {"density": 1e-2},
        "GTC 1e-2, multi": {"density": 1e-2, "multi_quantum": True},
        "GTC 1e-2, DGC": {"density": 1e-2, "multi_quantum": True, "momentum": MOMENTUM},
        "GTC ramp, multi": {"density": 1e-3, "ramp_steps": num_steps, "multi_quantum": True},
    }


@dataclass(frozen=True)
class Task:
    """What is learned. `batch(seed, step, rank)` is a pure function; `held_out` are batches of the two parts."""

    num_senones: int
    normalisation: Normalisation
    batch: Callable[[int, int, int], Batch]
    held_out: dict[str, list[Batch]]


# ---- in the workers ---------------------------------------------------------------------------------------------


def train_all(
    comm: Communicator, runs: list[dict[str, Any]], num_steps: int, experiment: str | None
) -> Iterator[dict[str, Any]]:
    """Yields the curve of each run: (step, bytes, seconds, held-out loss) now and then; of trials the end."""
    torch.set_num_threads(1)
    task = make_task() if experiment is None else open_task(experiment)
    for run in runs:
        yield {**run, "curve": list(train(comm, task, num_steps, **run))}


def train(
    comm: Communicator, task: Task, num_steps: int, method: str, rate: float, seed: int, part: str
) -> Iterator[tuple[int, int, float, float]]:
    model = build_model(NETWORK, task.num_senones, task.normalisation, seed)
    options = list_methods(num_steps)[method]
    momentum = 0.0 if "momentum" in options else MOMENTUM  # in GTC, or in what it wraps
    inner = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    take_step = make_stepper(method, options, model, inner, comm)
    first_bytes, seconds = bytes_transmitted(), 0.0
    for step in range(num_steps + 1):
        if step == num_steps or (part == TEST and is_shown(step, num_steps)):
            loss = held_out_loss(model, task.held_out[part]) if comm.rank == 0 else math.nan
            yield step, bytes_transmitted() - first_bytes, seconds, loss
        if step < num_steps:
            inner.param_groups[0]["lr"] = rate * min(1, (step + 1) / WARMUP_STEPS)
            batch = task.batch(seed, step, comm.rank)
            start = time.perf_counter()
            take_step(batch)
            seconds += time.perf_counter() - start


def is_shown(step: int, num_steps: int) -> bool:
    """Often at first, where a method that sends much soon has sent all that the others do."""
    return step & (step - 1) == 0 or step % max(1, num_steps // 10) == 0


def make_stepper(
    method: str, options: dict[str, Any], model: nn.Module, inner: torch.optim.Optimizer, comm: Communicator
) -> Callable[[Batch], None]:
    if method == POWER_SGD:
        # One bucket: on gloo the hook deadlocks with more.
        ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1000)
        state = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=1, start_powerSGD_iter=PLAIN_STEPS
        )
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return partial(step_by_ddp, ddp, inner)
    if method == EXACT:
        return partial(step_by_ours, model, ExactAveraging(inner, comm))
    return partial(step_by_ours, model, GTC(inner, comm, **options))


def step_by_ddp(ddp: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    mean_loss(ddp, batch).backward()
    nn.utils.clip_grad_norm_(ddp.parameters(), CLIP_NORM)
    optimizer.step()


def step_by_ours(model: nn.Module, optimizer: Any, batch: Batch) -> None:
    optimizer.zero_grad()
    mean_loss(model, batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
    optimizer.step(weight=batch.num_frames)


def mean_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return batch_loss(model(batch.features, batch.lengths), batch)[0] / batch.num_frames


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: list[Batch]) -> float:
    """Of a frame; infinite once it is not a number."""
    total = sum(float(mean_loss(model, batch)) * batch.num_frames for batch in batches)
    loss = total / sum(batch.num_frames for batch in batches)
    return loss if math.isfinite(loss) else math.inf


# ---- tasks ------------------------------------------------------------------------------------------------------


def make_task() -> Task:
    """Made-up speech, new at every step."""
    speech = MadeSpeech(seed=0)

    def draw(num_utterances: int, *key: int) -> Batch:
        speech.draw = np.random.default_rng(key)
        made = [speech.utterance(NOISE, UTTERANCE_PHONES) for _ in range(num_utterances)]
        made.sort(key=lambda utterance: -len(utterance[0]))
        return collate([x.numpy() for x, _ in made], [{"senone": senones.numpy()} for _, senones in made])

    num_utterances = max(1, BATCH_FRAMES // (4 * UTTERANCE_PHONES))  # a phone lasts 4 frames on average
    flat = Normalisation(np.zeros(NUM_INPUTS, np.float32), np.ones(NUM_INPUTS, np.float32))
    held_out = {part: [draw(HELD_OUT_UTTERANCES, 0, number)] for number, part in enumerate((DEV, TEST))}
    return Task(
        NUM_SENONES, flat, lambda seed, step, rank: draw(num_utterances, 1, seed, step, rank), held_out
    )


def open_task(folder: str) -> Task:
    """The machine-labelled speech of an experiment; held-out losses against the aligned senones."""
    experiment = Experiment(config.load(f"{folder}/config.toml", [f"folder={folder}"]))
    source = open_source(experiment, "machine", NETWORK, BATCH_FRAMES)
    num_batches = len(source.plan(0))

    def batch(seed: int, step: int, rank: int) -> Batch:
        return source.batch(Position(seed, (step * NUM_WORKERS + rank) % num_batches))

    def batches_of(part: str) -> list[Batch]:
        held_out = labelled_source(experiment, part, NETWORK, BATCH_FRAMES)
        numbers = range(0, len(held_out.plan(0)), math.ceil(len(held_out.plan(0)) / HELD_OUT_BATCHES))
        return [held_out.batch(Position(0, number)) for number in numbers]

    num_senones = Inventory.load(experiment.path("senones", "inventory.json")).num_senones
    held_out = {part: batches_of(part) for part in (DEV, TEST)}
    return Task(num_senones, read_normalisation(experiment), batch, held_out)


# ---- in the process that started them ------------------------------------------------------------------------------


def gtc_loss(experiment: str | None = None, num_steps: int = STEPS) -> None:
    """Loss after equal steps, bytes and time: exact averaging, PowerSGD rank 1, GTC; two workers at 100 Mbit/s."""
    obstacle = find_obstacle()
    if obstacle is not None:
        print(f"skipped: {obstacle}")
        return
    print(f"{num_steps} steps; learning rates from {GRID}; seeds {REPORTED_SEEDS}", flush=True)
    trials = [
        {"method": m, "rate": rate, "seed": CHOOSING_SEED, "part": DEV}
        for m in list_methods(num_steps)
        for rate in GRID
    ]
    chosen: dict[str, tuple[float, float]] = {}
    for trial in run(trials, num_steps, experiment):
        loss = trial["curve"][-1][-1]
        print(f"   development loss {loss:.4f}: {trial['method']}, learning rate {trial['rate']}", flush=True)
        if loss < chosen.get(trial["method"], (math.inf, 0))[0]:
            chosen[trial["method"]] = loss, trial["rate"]
    runs = [
        {"method": method, "rate": rate, "seed": seed, "part": TEST}
        for method, (_, rate) in chosen.items()
        for seed in REPORTED_SEEDS
    ]
    print_table(list(run(runs, num_steps, experiment)))


def run(runs: list[dict[str, Any]], num_steps: int, experiment: str | None) -> Iterator[dict[str, Any]]:
    with Links(NUM_WORKERS, BITS_PER_SECOND) as links:
        for results in links.run(train_all, runs=runs, num_steps=num_steps, experiment=experiment):
            yield results[0]


def print_table(runs: list[dict[str, Any]]) -> None:
    """Equal bytes and equal time: what the most thrifty method, and the fastest, has used in the end.

    Bytes count from the third step: until then PowerSGD's hook sends whole gradients, much in a short run.
    """
    curves: dict[str, list[np.ndarray]] = {}
    rates = {}
    for made in runs:
        curve = np.array(made["curve"])
        curve[:, 1] = np.maximum(0, curve[:, 1] - curve[curve[:, 0] == PLAIN_STEPS, 1])
        curves.setdefault(made["method"], []).append(curve)
        rates[made["method"]] = made["rate"]
    ends = {method: np.mean([curve[-1] for curve in found], axis=0) for method, found in curves.items()}
    num_bytes, seconds = (min(end[column] for end in ends.values()) for column in (1, 2))
    print(
        f"   test loss after:              all steps | {num_bytes / 1e6:5.2f} MB | {seconds:5.0f} s | MB sent, seconds"
    )
    for method, found in curves.items():
        last = [curve[-1, 3] for curve in found]
        at_bytes, at_seconds = (
            np.mean([np.interp(most, curve[:, column], curve[:, 3]) for curve in found])
            for column, most in ((1, num_bytes), (2, seconds))
        )
        after_all = f"{np.mean(last):.4f} ± {statistics.stdev(last):.4f}"
        print(
            f"   {method:16} ({rates[method]:5}) {after_all} | {at_bytes:8.4f} | {at_seconds:7.4f} | "
            f"{ends[method][1] / 1e6:7.2f} {ends[method][2]:8.1f}"
        )


if __name__ == "__main__":
    given = sys.argv[1:]
    steps = [int(word) for word in given if word.isdigit()]
    folders = [word for word in given if not word.isdigit()]
    gtc_loss(folders[0] if folders else None, *steps)
