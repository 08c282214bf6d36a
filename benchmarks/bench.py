"""`make bench`: every performance figure that RESULTS.md claims, as ratios within one run, medians.

python benchmarks/bench.py [SECTION …]
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bmuf_links
import gtc
import gtc_links
import gtc_loss
import label as labelling
import numpy as np
import prepare
import senone_corpus
import senones as tree
import store as targets
import torch
import train as training

from teacherstudent.config import Network
from teacherstudent.data.features import Normalisation
from teacherstudent.distributed import BMUF, GTC, Communicator, ExactAveraging, in_process
from teacherstudent.training.models import AcousticModel, build_model

NUM_FEATURES, NUM_SENONES = 192, 3183
TEACHER = Network(layers=5, cells=832, bidirectional=True)
STUDENT = Network(layers=5, cells=768, output_delay_frames=4)
REPEATS = 5


def median_seconds(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of calls after one that is not counted."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def make(network: Network) -> AcousticModel:
    flat = Normalisation(np.zeros(NUM_FEATURES, np.float32), np.ones(NUM_FEATURES, np.float32))
    return build_model(network, NUM_SENONES, flat, seed=0)


def models() -> None:
    """Teacher and student at full size: frames of 30 ms a second through the network alone."""
    batch, frames = 8, 64
    features, lengths = torch.randn(batch, frames, NUM_FEATURES), torch.full((batch,), frames)
    speeds = {}
    for name, network in (("teacher", TEACHER), ("student", STUDENT)):
        model = make(network).eval()
        with torch.inference_mode():
            speeds[name] = batch * frames / median_seconds(lambda model=model: model(features, lengths))
        parameters = sum(parameter.numel() for parameter in model.parameters())
        print(f"{name:8} {parameters / 1e6:6.1f} M parameters {speeds[name]:8.0f} frames a second")
    print(f"the teacher is {speeds['student'] / speeds['teacher']:.1f} times as slow as the student")


def exchange() -> None:
    """What sharing a step costs: optimizer.step() of the full-size student, two in-process workers."""
    block_steps = 5
    methods = {
        "exact": (1, lambda inner, comm: ExactAveraging(inner, comm)),
        "gtc 1e-3": (1, lambda inner, comm: GTC(inner, comm, density=1e-3)),
        "bmuf": (block_steps, lambda inner, comm: BMUF(inner, comm, block_steps=block_steps)),
    }

    def measure(comm: Communicator, name: str) -> tuple[float, float]:
        steps, wrap = methods[name]
        model = make(STUDENT)
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.01), comm)
        generator = torch.Generator().manual_seed(comm.rank)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 1e-3
        gradients = [parameter.grad.clone() for parameter in model.parameters()]

        def take_block() -> None:
            for _ in range(steps):
                for parameter, gradient in zip(model.parameters(), gradients):
                    parameter.grad.copy_(gradient)
                optimizer.step()

        for _ in range(2):
            take_block()  # until thresholds have settled
        before = optimizer.metrics()["bytes_sent"]
        seconds = median_seconds(take_block, repeats=3)
        return seconds / steps, (optimizer.metrics()["bytes_sent"] - before) / (4 * steps)

    results = {name: in_process(2, lambda comm, name=name: measure(comm, name))[0] for name in methods}
    exact_seconds, exact_bytes = results["exact"]
    for name, (seconds, num_bytes) in results.items():
        print(
            f"{name:9} {seconds:7.3f} s a step, {seconds / exact_seconds:6.2f} of exact averaging; "
            f"{num_bytes / 1e6:8.2f} MB sent, {num_bytes / exact_bytes:8.4f} of it"
            + (f" (blocks of {block_steps} steps)" if name == "bmuf" else "")
        )


def senones() -> None:
    """From hours of audio to about 3,000 senones: features, a tree from a known tying, a corpus of pseudo-words."""
    prepare.measure_prepare()
    tree.senones()
    with tempfile.TemporaryDirectory() as folder:
        senone_corpus.measure_corpus(Path(folder))


SECTIONS = {
    "models": models,
    "exchange": exchange,
    "gtc": gtc.gtc,
    "gtc-links": gtc_links.gtc_links,
    "gtc-loss": gtc_loss.gtc_loss,
    "bmuf": bmuf_links.bmuf_links,
    "senones": senones,
    "store": targets.store,
    "label": labelling.label,
    "train": training.train,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; all by default"
    )
    chosen = parser.parse_args().sections or list(SECTIONS)
    unknown = set(chosen) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}")
    for name in chosen:
        print(f"\n[{name}] {SECTIONS[name].__doc__}", flush=True)
        SECTIONS[name]()


if __name__ == "__main__":
    main()
