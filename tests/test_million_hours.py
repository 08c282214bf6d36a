"""The full-size settings: what they say without data, and two steps of each of their trainings."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, teacherstudent

from teacherstudent.config import load
from teacherstudent.data.features import FRAME_SHIFT_SECONDS, Normalisation
from teacherstudent.distributed import Communicator, in_process
from teacherstudent.training.batches import Batch
from teacherstudent.training.gradient import Part, agree_numeric_mode, compute_gradient
from teacherstudent.training.models import build_model, num_parameters
from teacherstudent.training.schedule import Plan
from teacherstudent.training.workers import make_optimizer

CONFIG = ROOT / "examples" / "million_hours" / "million_hours.toml"
NUM_SENONES, NUM_FEATURES, KEPT, FRAMES = 3183, 192, 20, 20


def test_the_networks_have_78_and_24_point_3_million_parameters_within_a_hundredth() -> None:
    config = load(CONFIG)
    counts = {"teacher": num_parameters(config.teacher.network, NUM_SENONES, NUM_FEATURES)}
    counts |= {
        name: num_parameters(student.network, NUM_SENONES, NUM_FEATURES)
        for name, student in config.student_variants().items()
    }
    assert counts["teacher"] == pytest.approx(78e6, rel=0.01)
    assert counts["gtc"] == counts["bmuf"] == pytest.approx(24.3e6, rel=0.01)


def test_a_dry_run_shows_both_networks_with_nothing_there() -> None:
    done = teacherstudent("run", CONFIG, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "78.64 M parameters with 3183 senones" in done.stdout
    assert done.stdout.count("24.30 M parameters with 3183 senones") == 2


@pytest.mark.parametrize("name", ["gtc", "bmuf"])
def test_a_student_takes_a_million_machine_labelled_hours_once_and_the_human_ones_seven_times(
    name: str,
) -> None:
    student = load(CONFIG).student_variants()[name]
    plan = Plan(student.schedule, 1.0)
    hours_of_a_step = student.workers * student.optimisation.batch_frames * FRAME_SHIFT_SECONDS / 3600
    assert plan.num_steps("machine") * hours_of_a_step == pytest.approx(1e6, rel=0.01)
    assert plan.num_steps("human") * hours_of_a_step == pytest.approx(7 * 7000, rel=0.03)


def make_batch(is_human: bool, rank: int) -> Batch:
    generator = torch.Generator().manual_seed(rank)
    features = torch.randn(1, FRAMES, NUM_FEATURES, generator=generator)
    lengths = torch.tensor([FRAMES])
    if is_human:
        return Batch(features, lengths, torch.randint(0, NUM_SENONES, (1, FRAMES), generator=generator))
    ids = torch.arange(KEPT).expand(1, FRAMES, KEPT) + 100 * rank
    return Batch(features, lengths, ids=ids, probabilities=torch.full((1, FRAMES, KEPT), 1 / KEPT))


@pytest.mark.parametrize("name", ["teacher", "gtc", "bmuf"])
def test_two_steps_at_full_size_move_the_model_and_leave_all_workers_with_the_same(name: str) -> None:
    """From the settings of the file, but for the warm-up by exact averaging, which is longer than this."""
    config = load(CONFIG)
    settings = config.teacher if name == "teacher" else config.student_variants()[name]
    optimisation = dataclasses.replace(settings.optimisation, exact_steps=0, learning_rate=0.05)
    blank = np.zeros(NUM_FEATURES, np.float32)

    def sum_bits(model: torch.nn.Module) -> int:
        return sum(int(value.detach().view(torch.int32).sum()) for value in model.parameters())

    def work(comm: Communicator) -> tuple[list[float], int, int]:
        agreed = agree_numeric_mode(optimisation, comm)
        model = build_model(settings.network, NUM_SENONES, Normalisation(blank, blank + 1), seed=1)
        before = sum_bits(model)
        optimizer = make_optimizer(model.parameters(), comm, agreed)
        part = Part(make_batch(name == "teacher", comm.rank))
        noise = torch.Generator().manual_seed(0)
        losses = []
        for _ in range(2):
            [measured], _ = compute_gradient(model, optimizer, [part], noise, agreed, 1.0)
            optimizer.step(weight=measured.num_frames)
            losses.append(measured.loss / FRAMES)
        optimizer.synchronize()
        return losses, before, sum_bits(model)

    results = in_process(2, work)
    [(before, after)] = {(before, after) for _, before, after in results}
    assert before != after
    for losses, *_ in results:
        assert losses == pytest.approx(2 * [math.log(NUM_SENONES)], rel=0.02)
