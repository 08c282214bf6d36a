"""Section `label` of `make bench`: the speed of labelling with the full-size teacher, and what it is held against.

python benchmarks/label.py [EXPERIMENT]   with bfloat16 judged on the trained teacher of an experiment's folder too

Seconds are the process's own on the processor, one compute thread, so that other work on the machine counts little.
"""
# T frames, F features, S senones, K kept

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from memory import peak_megabytes
from store import MadeSpeech

from teacherstudent.config import Config, Label, Network
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, Normalisation
from teacherstudent.data.packed import PackedWriter, open_shards, shard_path
from teacherstudent.distributed import connect
from teacherstudent.experiment import Experiment
from teacherstudent.files import write_json
from teacherstudent.posteriors import TopK, top_k
from teacherstudent.store import TargetWriter
from teacherstudent.training import checkpoint
from teacherstudent.training.batches import collate
from teacherstudent.training.inference import (
    Pieces,
    computing,
    find_best,
    has_bfloat16,
    plan_batches,
    to_numeric_mode,
)
from teacherstudent.training.label import label as label_step
from teacherstudent.training.models import AcousticModel, build_model, model_from_state, model_state

TEACHER = Network(layers=5, cells=832, bidirectional=True)
NUM_FEATURES, NUM_SENONES, KEPT = 192, 3183, 20
UTTERANCES, MEAN_FRAMES, BATCH_FRAMES = 64, 120, 3000
ROUNDS = 1
WHOLE = Pieces(1 << 30, 0)
SMALL = Network(layers=2, cells=160, bidirectional=True)
TRAINING_STEPS = 200
SHARDS_IN_MEMORY_TEST = 4


def draw_lengths(number: int, mean_frames: int) -> list[int]:
    """Log-normal, as those of read speech."""
    draw = np.random.default_rng(0)
    return np.clip(draw.lognormal(np.log(mean_frames) - 0.18, 0.6, number), 10, 1000).astype(int).tolist()


def make_model(network: Network, num_features: int, num_senones: int) -> AcousticModel:
    flat = Normalisation(np.zeros(num_features, np.float32), np.ones(num_features, np.float32))
    return build_model(network, num_senones, flat, seed=0).eval()


def make_experiment(
    folder: Path, model: AcousticModel, shards: Iterator[list[np.ndarray]], settings: Label
) -> Experiment:
    """Prepared, with features of the given values."""
    experiment = Experiment(Config(folder=str(folder), label=settings))
    experiment.create()
    num_frames = num_utterances = 0
    for number, values in enumerate(shards):
        path = shard_path(experiment.path("features", "unlabelled"), "features", number)
        with PackedWriter(path, {}, {"values": ("float16", (len(model.mean),))}) as writer:
            for place, each in enumerate(values):
                writer.write(f"{number}-{place}", values=each)
                num_frames, num_utterances = num_frames + len(each), num_utterances + 1
    checkpoint.save(experiment.path("teacher", "best.pt"), model_state(model, {}))
    experiment.path("senones").mkdir()
    experiment.path("senones", "inventory.json").write_text("none")
    experiment.path("features", "normalisation.json").write_text("none")
    hours = num_frames * FRAME_SHIFT_SECONDS / 3600
    counts = {"utterances": num_utterances, "hours": hours, "copies": 0, "copy_hours": 0.0}
    write_json(experiment.path("features", "report.json"), {"unlabelled": counts})
    return experiment


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


# -- speed ---------------------------------------------------------------------------------------------------


def measure_ceiling(dtype: torch.dtype) -> float:
    """Multiplications and additions a second of one large matrix product."""
    inputs, weights = torch.randn(1024, 1664).to(dtype), torch.randn(3328, 1664).to(dtype)
    torch.nn.functional.linear(inputs, weights)
    seconds = [cpu_seconds(lambda: torch.nn.functional.linear(inputs, weights)) for _ in range(10)]
    return 2 * inputs.numel() * len(weights) / statistics.median(seconds)


def label_plainly(model: AcousticModel, values: list[np.ndarray]) -> int:
    """What one would write first: batches in the order given, padded, float32. Returns the padding."""
    padding, start = 0, 0
    with torch.inference_mode():
        while start < len(values):
            size = 1
            while start + size < len(values):
                longest = max(len(each) for each in values[start : start + size + 1])
                if longest * (size + 1) > BATCH_FRAMES:
                    break
                size += 1
            batch = sorted(values[start : start + size], key=lambda each: -len(each))
            start += size
            collated = collate(batch, [])
            logits = model(collated.features, collated.lengths)
            torch.log_softmax(logits, dim=2).topk(KEPT, dim=2)
            padding += collated.features.shape[0] * collated.features.shape[1] - collated.num_frames
    return padding


def measure_speed(folder: Path) -> None:
    draw = np.random.default_rng(1)
    values = [
        draw.normal(size=(length, NUM_FEATURES)).astype("float16")
        for length in draw_lengths(UTTERANCES, MEAN_FRAMES)
    ]
    num_frames = sum(map(len, values))
    model = make_model(TEACHER, NUM_FEATURES, NUM_SENONES)
    modes = ["fp32", "bf16"] if has_bfloat16() else ["fp32"]
    experiments = {
        mode: make_experiment(
            folder / mode, model, iter([values]), Label(KEPT, numeric_mode=mode, batch_frames=BATCH_FRAMES)
        )
        for mode in modes
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", *modes)}
    padding = 0
    for _ in range(ROUNDS):
        start = time.process_time()
        padding = label_plainly(model, values)
        seconds["plain"].append(time.process_time() - start)
        for mode, experiment in experiments.items():
            for path in experiment.path("targets").glob("*.h5"):
                path.unlink()
            labelling = cpu_seconds(lambda experiment=experiment: label_step(experiment, connect()))
            starting = cpu_seconds(
                lambda experiment=experiment: label_step(experiment, connect())
            )  # all is there
            seconds[mode].append(labelling - starting)
    batches = plan_batches([len(each) for each in values], BATCH_FRAMES, 1 << 30)
    ours = sum(len(rows) * len(values[rows[0]]) for rows in batches) - num_frames
    print(
        f"{num_frames:,} frames, batches of {BATCH_FRAMES}: padding {padding / (num_frames + padding):.1%} in the "
        f"order given, {ours / (num_frames + ours):.1%} by length"
    )
    weights = sum(value.numel() for name, value in model.named_parameters() if "weight" in name)
    plain = statistics.median(seconds["plain"])
    ceilings = {"fp32": measure_ceiling(torch.float32), "bf16": measure_ceiling(torch.bfloat16)}
    for name, taken in seconds.items():
        speed = num_frames / statistics.median(taken)
        share = 2 * weights * speed / ceilings["bf16" if name == "bf16" else "fp32"]
        print(
            f"{name:5} {speed:7.0f} frames a second, {plain / statistics.median(taken):5.2f} of the plain loop, "
            f"{share:.2f} of the matrix product ({ceilings['bf16' if name == 'bf16' else 'fp32'] / 1e12:.3f} TFLOP/s)",
            flush=True,
        )
    measure_writing(folder, model, values, min(map(statistics.median, seconds.values())))


def measure_writing(folder: Path, model: AcousticModel, values: list[np.ndarray], labelling: float) -> None:
    longest = sorted(values, key=len, reverse=True)[:20]
    found = [best for best in find_best(model, longest, KEPT, 1 << 30, WHOLE) if isinstance(best, TopK)]
    num_frames = sum(map(len, values))

    def write(name: str) -> None:
        with TargetWriter(shard_path(folder / name, "targets", 0), NUM_SENONES, KEPT) as writer:
            for number, best in enumerate(found):
                writer.write_best(str(number), best)

    write("warm")
    seconds = cpu_seconds(lambda: write("timed")) * num_frames / sum(len(best.ids) for best in found)
    print(f"writing takes {seconds / labelling:.2%} of the fastest labelling")


# -- what bfloat16 and pieces change -------------------------------------------------------------------------


def judge(name: str, exact: list[TopK], found: list[TopK], logits: list[torch.Tensor]) -> None:
    """Against float32 on whole utterances. logits: (T, S) of each utterance in float32."""
    agree, mass, best_mass, divergence = [], [], [], []
    for right, got, all_logits in zip(exact, found, logits):
        logs = torch.log_softmax(all_logits, dim=1)
        agree.append(right.ids[:, 0] == got.ids[:, 0])
        mass.append(logs.gather(1, got.ids.long()).exp().sum(1))
        best_mass.append(right.log_posteriors.exp().sum(1))
        kept = torch.log_softmax(right.log_posteriors, 1)
        there = torch.full_like(logs, -30.0).scatter(
            1, got.ids.long(), torch.log_softmax(got.log_posteriors, 1)
        )
        divergence.append((kept.exp() * (kept - there.gather(1, right.ids.long()))).sum(1))
    same = torch.cat(agree).float().mean()
    print(
        f"{name}: {sum(map(len, agree)):,} frames; the best senone is the same in {same:.4%}, "
        f"the chosen have {torch.cat(mass).sum() / torch.cat(best_mass).sum():.5%} of the probability of the true "
        f"{exact[0].ids.shape[1]}; divergence {torch.cat(divergence).mean():.1e} nats",
        flush=True,
    )


@torch.inference_mode()
def measure_accuracy(model: AcousticModel, values: list[np.ndarray], k: int = KEPT) -> None:
    """Of bf16, and of long recordings in pieces, on a trained teacher."""
    values = sorted(values, key=len, reverse=True)
    logits = [model(*whole(each))[0] for each in values]
    exact = [top_k(each, k) for each in logits]
    joined = np.concatenate(values)
    longer = model(*whole(joined))[0]
    for context in (0, 50, 200):
        (found,) = find_best(model, [joined], k, 4000, Pieces(max(len(joined) // 4, 1), context))
        assert isinstance(found, TopK)
        judge(f"4 pieces, {context:3} frames of context", [top_k(longer, k)], [found], [longer])
    if has_bfloat16():
        to_numeric_mode(model, "bf16")
        with computing("bf16"):
            best = find_best(model, values, k, 1 << 30, WHOLE)
        judge("bf16", exact, [each for each in best if isinstance(each, TopK)], logits)


def whole(values: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(values.astype(np.float32))[None], torch.tensor([len(values)])


def train_small(speech: MadeSpeech) -> AcousticModel:
    model = make_model(SMALL, speech.means.shape[1], NUM_SENONES)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(TRAINING_STEPS):
        utterances = sorted((speech.utterance(0.5, 20) for _ in range(8)), key=lambda pair: -len(pair[1]))
        batch = collate([features.numpy() for features, _ in utterances], [])
        logits = model(batch.features, batch.lengths)
        loss = sum(torch.nn.functional.cross_entropy(row[: len(senones)], senones)
                   for row, (_, senones) in zip(logits, utterances))  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(
        f"-- {SMALL.layers} x {SMALL.cells} bidirectional, trained on made speech: {loss.item() / 8:.2f} nats a frame"
    )
    return model.eval()


# -- memory --------------------------------------------------------------------------------------------------


def measure_memory(folder: Path) -> None:
    """Peak memory of a process that labels, at 1 and 100 times as many shards."""
    draw = np.random.default_rng(2)
    model = make_model(Network(layers=1, cells=16, bidirectional=True), 12, 100)
    peaks = {}
    for times in (1, 100):
        shards = (
            [draw.normal(size=(40, 12)).astype("float16") for _ in range(5)]
            for _ in range(SHARDS_IN_MEMORY_TEST * times)
        )
        make_experiment(folder / str(times), model, shards, Label(KEPT))
        command = [sys.executable, __file__, "--memory", str(folder / str(times))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peaks[times] = float(done.stdout)
        print(
            f"peak memory with {SHARDS_IN_MEMORY_TEST * times:5} shards {peaks[times]:7.1f} MB above an idle process"
        )
    print(f"at 100 times the shards {peaks[100] - peaks[1]:+.1f} MB")


def label_for_memory(folder: str) -> None:
    """In a process of its own: prints by how many megabytes its peak grew."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of importing
    before = peak_megabytes()
    label_step(Experiment(Config(folder=folder, label=Label(KEPT))), connect())
    print(peak_megabytes() - before)


def label(experiment: Path | None = None) -> None:
    """Labelling with the 78 M teacher beside a plain loop and the matrix product; writing; bf16; pieces; memory."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        measure_speed(Path(name) / "speed")
        speech = MadeSpeech(seed=0)
        model = train_small(speech)
        measure_accuracy(model, [speech.utterance(0.5, 25)[0].numpy() for _ in range(40)])
        if experiment is not None:
            print(f"-- the teacher of {experiment}")
            trained = model_from_state(checkpoint.load(experiment / "teacher" / "best.pt"))
            shard = open_shards(experiment / "features" / "unlabelled", "features")[0]
            values = [arrays["values"].copy() for _, arrays in shard][:200]
            measure_accuracy(trained, values, min(KEPT, trained.num_senones))
        measure_memory(Path(name) / "memory")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--memory"]:
        label_for_memory(*sys.argv[2:])
    else:
        label(Path(sys.argv[1]) if sys.argv[1:] else None)
