"""The higher learning rate of human labels reaches the weights, whatever momentum and method do."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import NETWORK, make_source, make_training
from torch import Tensor, nn

from teacherstudent.config import Schedule
from teacherstudent.distributed import Communicator, in_process
from teacherstudent.distributed.optimizers import DistributedOptimizer
from teacherstudent.training import gradient as gradient_module
from teacherstudent.training import train as train_module
from teacherstudent.training.batches import Batch, Position
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

    def forward(self, features: Tensor, lengths: Tensor, *_: object) -> Tensor:
        return self.weights.expand(*features.shape[:2], 2)


def pull(logits: Tensor, batch: Batch, *_: object) -> tuple[Tensor, int]:
    return logits[..., 0 if batch.senones is not None else 1].mean() * batch.num_frames, 0


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
        training,
        optimisation=dataclasses.replace(
            training.optimisation, density=0.5, multi_quantum=True, local_state="keep"
        ),  # momentum that no block's end takes away
    )

    def work(comm: Communicator) -> None:
        # No batch is empty: two workers divide an even number of micro-batches.
        sources = {name: make_source(name, 8, batch_frames=20) for name in (HUMAN, MACHINE)}
        train(comm, training, sources, make_source("dev", 4))

    in_process(2, work)
    human, machine = load(tmp_path / "final.pt")["weights"]["weights"].neg().tolist()
    assert machine > 0
    assert 3 * human / machine == pytest.approx(multiplier, rel=0.05)


# -- exactly: with plain SGD inside, and pulls of which every step's size is known ------------------------------


class ExactProbe(Probe):
    """In float64, so that a law that holds can be told from one that nearly does."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


def exact_schedule(mode: str, **changed: object) -> Schedule:
    return Schedule(
        mode=mode,  # type: ignore[arg-type]
        steps=60,
        machine_turn_steps=4,
        human_turn_steps=2,
        human_learning_rate_multiplier=4.0,
        machine_learning_rate_multiplier=0.5,
        human_loss_weight=3.0,
        machine_loss_weight=1.5,
        final_learning_rate_ratio=0.25,
        warmup_steps=5,
        validate_every_steps=60,
        **changed,  # type: ignore[arg-type]
    )


def train_exactly(
    folder: Path, monkeypatch: pytest.MonkeyPatch, method: str, schedule: Schedule, **optimisation: object
) -> list[dict[str, Any]]:
    """What each worker had before every step and at the end: weights and, with GTC, residuals."""
    monkeypatch.setattr(train_module, "build_model", lambda *_: ExactProbe())
    for module in (gradient_module, train_module):
        monkeypatch.setattr(module, "batch_loss", pull)
    compute, histories = train_module.compute_gradient, [[], []]

    def note(model: ExactProbe, optimizer: DistributedOptimizer) -> None:
        hidden = optimizer.state_dict()["distributed"]
        residuals = hidden["residuals"][0].clone() if hidden.get("residuals") else torch.zeros(2)
        histories[optimizer.comm.rank].append(
            {"weights": model.weights.detach().clone(), "residual": residuals}
        )

    def noting(model: ExactProbe, optimizer: DistributedOptimizer, *rest: Any) -> Any:
        note(model, optimizer)
        return compute(model, optimizer, *rest)

    monkeypatch.setattr(train_module, "compute_gradient", noting)
    save = train_module._save
    monkeypatch.setattr(
        train_module, "_save", lambda worker: (note(worker.model, worker.optimizer), save(worker))
    )
    training = dataclasses.replace(make_training(folder, method), plan=Plan(schedule, RATE))
    settings = {"momentum": 0.0, "clip_norm": 1e6, "density": 0.5, **optimisation}
    training = dataclasses.replace(
        training,
        optimisation=dataclasses.replace(training.optimisation, **settings),  # type: ignore[arg-type]
    )

    def work(comm: Communicator) -> None:
        sources = {
            name: make_source(name, 8, training.plan.batch_frames(name, 30)) for name in (HUMAN, MACHINE)
        }
        train(comm, training, sources, make_source("dev", 4))

    in_process(2, work)
    return histories


def earned(schedule: Schedule) -> Tensor:
    """(steps + 1, 2) what human and machine labels have earned before every step, at the rates of the settings."""
    rates = []
    for step in range(schedule.steps):
        rate = RATE * schedule.final_learning_rate_ratio ** (step / (schedule.steps - 1))
        rates.append(rate * min(1.0, (step + 1) / schedule.warmup_steps))
    human = torch.tensor([step % 6 >= 4 for step in range(schedule.steps)])
    rate = torch.tensor(rates, dtype=torch.float64)
    each = torch.stack([rate * human * 4.0 * 3.0, rate * ~human * 0.5 * 1.5], dim=1)
    return torch.cat([torch.zeros(1, 2), each.cumsum(dim=0)])


@pytest.mark.parametrize("multi_quantum", [False, True])
def test_with_gtc_weights_and_residuals_together_hold_every_step_at_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multi_quantum: bool
) -> None:
    """Sum of updates = sum of scaled gradients - residual, for each source, before every step.

    What a human-labelled step has earned and a machine-labelled step sends is applied at the human rate.
    """
    schedule = exact_schedule("interleaved")
    ranks = train_exactly(tmp_path, monkeypatch, "gtc", schedule, multi_quantum=multi_quantum)
    expected = earned(schedule)
    weights = torch.stack([each["weights"] for each in ranks[0]])
    residual = torch.stack([torch.stack([each["residual"] for each in rank]) for rank in ranks]).mean(dim=0)
    torch.testing.assert_close(residual - weights, expected, rtol=1e-12, atol=0)
    moved = weights.diff(dim=0) != 0
    human = torch.tensor([step % 6 >= 4 for step in range(schedule.steps)])
    assert residual.abs().sum() > 0
    assert moved[~human, 0].any() or multi_quantum  # human labels' quanta in machine-labelled steps


def test_without_compression_every_step_moves_the_weights_at_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = exact_schedule("interleaved")
    ranks = train_exactly(tmp_path, monkeypatch, "exact", schedule)
    weights = torch.stack([each["weights"] for each in ranks[0]])
    torch.testing.assert_close(-weights, earned(schedule), rtol=1e-12, atol=0)


@pytest.mark.parametrize("block_momentum", [0.0, 0.5])
def test_with_bmuf_every_block_filters_what_its_steps_earned_at_their_own_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_momentum: float
) -> None:
    """The oracle is torch's SGD with momentum on what each block of two steps has earned: Nesterov's look-ahead says
    where a block begins, and these pulls are the same everywhere.
    """
    schedule = exact_schedule("interleaved", align_turns_to_blocks=True)
    schedule.check_blocks(2, 0, "student")
    ranks = train_exactly(
        tmp_path, monkeypatch, "bmuf", schedule, block_steps=2, block_momentum=block_momentum
    )
    weights = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    oracle = torch.optim.SGD([weights], lr=1.0, momentum=block_momentum)
    for pseudo_gradient in earned(schedule)[::2].diff(dim=0):
        assert (pseudo_gradient > 0).sum() == 1, "a block of one source"
        weights.grad = pseudo_gradient
        oracle.step()
    for rank in ranks:
        torch.testing.assert_close(rank[-1]["weights"], weights.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["exact", "gtc"])
def test_where_sources_are_mixed_each_pulls_by_its_frames_times_its_multiplier_and_loss_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    schedule = exact_schedule("mixed")
    ranks = train_exactly(tmp_path, monkeypatch, method, schedule)
    plan, comm_size, pulled = Plan(schedule, RATE), 2, torch.zeros(2, dtype=torch.float64)
    sources = [make_source(name, 8, plan.batch_frames(name, 30)) for name in (HUMAN, MACHINE)]
    positions = [Position(), Position()]
    for step in range(schedule.steps):
        frames = torch.tensor(
            [
                float(sum(source.batch(position, rank).num_frames for rank in range(comm_size)))
                for source, position in zip(sources, positions, strict=True)
            ],
            dtype=torch.float64,
        )
        rate = plan[step].base_learning_rate
        pulled += rate * frames / frames.sum() * torch.tensor([4.0 * 3.0, 0.5 * 1.5], dtype=torch.float64)
        positions = [
            source.advance(position, comm_size) for source, position in zip(sources, positions, strict=True)
        ]
    last = [rank[-1] for rank in ranks]
    residual = torch.stack([each["residual"] for each in last]).mean(dim=0)
    torch.testing.assert_close(residual - last[0]["weights"], pulled, rtol=1e-9, atol=0)
