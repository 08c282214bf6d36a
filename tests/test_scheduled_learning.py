"""The higher learning rate of human labels reaches the weights, whatever momentum and method do."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tiny_training import NETWORK, make_source, make_training
from torch import Tensor, nn

from teacherstudent.config import Schedule
from teacherstudent.distributed import Communicator, in_process
from teacherstudent.training import gradient as gradient_module
from teacherstudent.training import train as train_module
from teacherstudent.training.batches import Batch
from teacherstudent.training.checkpoint import load
from teacherstudent.training.schedule import HUMAN, MACHINE, Plan
from teacherstudent.training.train import train

STEPS, RATE = 600, 1e-3


class Probe(nn.Module):
    """Two weights: human labels pull at the first alone, machine labels at the second alone, always by 1."""

    network, num_senones = NETWORK, 2

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(2))

    def forward(self, features: Tensor, lengths: Tensor, noise: torch.Generator | None = None) -> Tensor:
        return self.weights.expand(*features.shape[:2], 2)


def pull(logits: Tensor, batch: Batch) -> tuple[Tensor, None]:
    return logits[..., 0 if batch.senones is not None else 1].mean() * batch.num_frames, None


@pytest.mark.parametrize("method", ["exact", "gtc", "bmuf"])
@pytest.mark.parametrize("multiplier", [1.0, 2.0, 4.0])
def test_a_human_labelled_step_moves_the_weights_by_the_multiplier_also_with_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, multiplier: float
) -> None:
    monkeypatch.setattr(train_module, "build_model", lambda *_: Probe())
    for module in (gradient_module, train_module):
        monkeypatch.setattr(module, "batch_loss", pull)
    schedule = Schedule(
        steps=STEPS,
        machine_turn_steps=3,
        human_turn_steps=1,
        human_learning_rate_multiplier=multiplier,
        final_learning_rate_ratio=1.0,
        validate_every_steps=STEPS,
    )
    training = dataclasses.replace(make_training(tmp_path, method), plan=Plan(schedule, RATE))
    training = dataclasses.replace(
        training, optimisation=dataclasses.replace(training.optimisation, density=0.5, multi_quantum=True)
    )

    def work(comm: Communicator) -> None:
        # No batch is empty: two workers divide an even number of micro-batches.
        sources = {name: make_source(name, 8, batch_frames=20) for name in (HUMAN, MACHINE)}
        train(comm, training, sources, make_source("dev", 4))

    in_process(2, work)
    human, machine = load(tmp_path / "final.pt")["weights"]["weights"].neg().tolist()
    assert machine > 0
    assert 3 * human / machine == pytest.approx(multiplier, rel=0.05)
