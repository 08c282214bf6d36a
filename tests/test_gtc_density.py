"""The density of gradient threshold compression: held by a controller, ramped, limited by a capacity."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from gtc_worker import NUM_ELEMENTS, Worker, counts_of

from teacherstudent.distributed import GTC, Communicator, in_process
from teacherstudent.distributed.capacity import choose
from teacherstudent.distributed.codec import Quanta

SIZE = 8000
RATE_AT: dict[str, Callable[[int], float]] = {
    "constant": lambda step: 1.0,
    "decaying": lambda step: 0.997**step,
    "alternating": lambda step: 3.0 if step // 5 % 2 else 1.0,
}


def densities_of(
    comm: Communicator, num_steps: int, rate_at: Callable[[int], float], **options: Any
) -> list[float]:
    """The density of every step of a training of one large parameter: noise around a drift."""
    parameter = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = GTC(torch.optim.SGD([parameter], lr=1.0), comm, **options)
    sizes = np.exp(np.random.default_rng(0).normal(size=SIZE))
    noise = np.random.default_rng([1, comm.rank])
    densities = []
    for step in range(num_steps):
        optimizer.param_groups[0]["lr"] = rate_at(step)
        parameter.grad = torch.tensor(sizes * (noise.normal(size=SIZE) + 0.1), dtype=torch.float32)
        optimizer.step()
        densities.append(optimizer.metrics()["density"])
        assert optimizer.metrics()["mean_density"] == pytest.approx(np.mean(densities[-50:]))
    return densities


def means_of(densities: list[float]) -> np.ndarray:
    """Over 50 steps each."""
    return np.convolve(densities, np.full(50, 1 / 50), mode="valid")


@pytest.mark.parametrize("rate_at", RATE_AT.values(), ids=RATE_AT.keys())
@pytest.mark.parametrize("density", [1e-2, 2e-3])
def test_the_density_settles_near_its_target(density: float, rate_at: Callable[[int], float]) -> None:
    one, other = in_process(2, lambda comm: densities_of(comm, 400, rate_at, density=density))
    assert one == other
    means = means_of(one[200:])
    assert density / 1.5 < means.min() and means.max() < 1.5 * density


def test_with_momentum_correction_and_a_capacity_the_density_settles_too() -> None:
    options = {"density": 1e-2, "momentum": 0.9, "multi_quantum": True, "capacity": 2e-2}
    densities, _ = in_process(2, lambda comm: densities_of(comm, 400, RATE_AT["decaying"], **options))
    means = means_of(densities[200:])
    assert means.min() > 1e-2 / 1.5 and means.max() < 1.5e-2
    assert max(densities) <= 2e-2


def test_a_ramp_goes_down_to_the_density() -> None:
    work = {"ramp_steps": 150, "density": 1e-3}
    densities, _ = in_process(2, lambda comm: densities_of(comm, 400, RATE_AT["constant"], **work))
    target = [1e-2 * 0.1 ** (min(step, 150) / 150) for step in range(400)]
    ratios = means_of(densities) / means_of(target)
    assert ratios.min() > 1 / 1.5 and ratios.max() < 1.5
    assert means_of(densities)[-1] < 1.5e-3


# ---- capacity ------------------------------------------------------------------------------------------------


def test_a_capacity_is_kept_and_serves_every_element_in_its_turn() -> None:
    """All elements are due in every step, and a tenth may send: each sends in one step of ten, high indices too."""

    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=0.125, capacity=0.1)
        tenth, total = NUM_ELEMENTS // 10, torch.zeros(NUM_ELEMENTS, dtype=torch.int64)
        for step in range(30):
            worker.step(torch.full((NUM_ELEMENTS,), 1.25), rate=0.1)  # one threshold a step
            counts = counts_of(worker.fired[-1].quanta)
            assert int((counts != 0).sum()) == tenth
            total += counts
            if step % 10 == 9:
                assert total.tolist() == [step // 10 + 1] * NUM_ELEMENTS
        assert worker.optimizer.metrics()["carried_over"] == 30 * (NUM_ELEMENTS - tenth)
        assert worker.optimizer.metrics()["density"] == 0.1
        owed = torch.full((NUM_ELEMENTS,), 30 - 3) * 0.125
        assert torch.allclose(worker.residual, owed)
        for _ in range(27 * 10):  # nothing new is earned: the rest is sent in due time
            worker.step(torch.zeros(NUM_ELEMENTS), weight=1)
        assert float(worker.residual.abs().max()) < 0.125

    in_process(2, work)


def test_what_is_chosen_and_what_is_left_are_what_was_due() -> None:
    due = Quanta(torch.tensor([2, 3, 5, 8, 9]), torch.tensor([1, -1, 2, 1, -3]))
    chosen, left, cursor = choose(due, 8, 3)
    assert (chosen.indices.tolist(), chosen.counts.tolist()) == ([2, 8, 9], [1, 1, -3])
    assert (left.indices.tolist(), left.counts.tolist()) == ([3, 5], [-1, 2])
    assert cursor == 3
    chosen, left, cursor = choose(due, 10, 2)  # the last index was the last to send
    assert (chosen.indices.tolist(), left.indices.tolist(), cursor) == ([2, 3], [5, 8, 9], 4)
    chosen, left, cursor = choose(due, 8, 5)
    assert (chosen.indices.tolist(), len(left), cursor) == ([2, 3, 5, 8, 9], 0, 8)
