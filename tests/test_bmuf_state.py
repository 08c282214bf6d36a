"""The inner optimiser's state at BMUF's block ends, and the warm-up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bmuf import NUM_ELEMENTS, give_step, global_weights_of, gradient_of, make_parameter
from torch import Tensor

from teacherstudent.distributed import BMUF, Communicator, ExactAveraging, in_process

BETAS = (0.6, 0.9)


def make_momentum_bmuf(
    comm: Communicator, local_state: str, block_steps: int = 3
) -> tuple[torch.nn.Parameter, BMUF]:
    parameter = make_parameter()
    inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    return parameter, BMUF(inner, comm, block_steps=block_steps, local_state=local_state)


# ---- keep, reset, average -------------------------------------------------------------------------------------------


def test_each_way_leaves_at_a_blocks_end_what_it_says() -> None:
    def work(comm: Communicator, local_state: str) -> tuple[Tensor, Tensor | None]:
        """The momentum buffer that the inner optimiser makes in a block, recomputed; and what is left of it."""
        parameter, optimizer = make_momentum_bmuf(comm, local_state)
        buffer: Tensor | None = None
        for step in range(3):
            gradient = gradient_of(comm.rank, step, parameter.detach())
            if comm.rank or step != 1:
                buffer = gradient if buffer is None else 0.9 * buffer + gradient
            give_step(
                optimizer, parameter, comm.rank, step, weight=1 + comm.rank if comm.rank or step != 1 else 0
            )
        assert buffer is not None
        return buffer, optimizer.state[parameter].get("momentum_buffer") if optimizer.state else None

    for own, left in in_process(2, lambda comm: work(comm, "keep")):
        assert left is not None and torch.equal(own, left)
    for _, left in in_process(2, lambda comm: work(comm, "reset")):
        assert left is None
    averaged = in_process(2, lambda comm: work(comm, "average"))
    mean = (2 * averaged[0][0] + 6 * averaged[1][0]) / 8  # the weights of the block
    for _, left in averaged:
        assert left is not None and float((left - mean).abs().max()) < 1e-14


@pytest.mark.parametrize("local_state", ["average", "adam"])
def test_a_worker_that_has_no_state_gets_the_common_one(local_state: str) -> None:
    def work(comm: Communicator) -> dict[str, Tensor]:
        parameter = make_parameter()
        inner = torch.optim.Adam([parameter], lr=0.1)
        optimizer = BMUF(inner, comm, block_steps=3, block_momentum=0.0, local_state=local_state)
        for step in range(3):
            give_step(optimizer, parameter, comm.rank, step, weight=4 if comm.rank else 0)
        return optimizer.state[parameter]

    one, other = in_process(2, work)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(one[name], other[name])
        assert bool(other[name].abs().max() > 0)
    assert float(one["step"]) == 3


def test_a_state_that_cannot_be_averaged_is_an_error_on_every_worker() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            super().step(closure)
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter]["calls"] = 1

    def work(comm: Communicator) -> None:
        parameter = make_parameter()
        optimizer = BMUF(Counting([parameter], lr=0.1), comm, block_steps=1, local_state="average")
        with pytest.raises(ValueError, match="keeps a state 'calls' that cannot be averaged"):
            give_step(optimizer, parameter, comm.rank, 0, weight=comm.rank)  # rank 0 has no such state itself

    in_process(2, work)


# ---- Adam's moments, re-estimated -----------------------------------------------------------------------------------


def make_adam_bmuf(comm: Communicator, block_steps: int, **options) -> tuple[torch.nn.Parameter, BMUF]:  # type: ignore[no-untyped-def]
    parameter = make_parameter()
    inner = torch.optim.Adam([parameter], lr=0.1, betas=BETAS, eps=0.0)
    return parameter, BMUF(inner, comm, block_steps=block_steps, local_state="adam", **options)


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
@pytest.mark.parametrize(("momentum", "lr"), [(0.0, 1.0), (0.75, 1.0), (0.9, 0.5)])
def test_under_a_constant_gradient_the_estimates_are_exact_and_steps_are_the_way_that_the_model_has_come(
    nesterov: bool, momentum: float, lr: float
) -> None:
    """Adam then moves each weight by its rate in every step, so that the way counts the steps of which it is worth."""
    gradient = torch.linspace(0.5, 2, NUM_ELEMENTS, dtype=torch.float64)

    def work(comm: Communicator) -> None:
        parameter, optimizer = make_adam_bmuf(
            comm, 4, block_momentum=momentum, block_lr=lr, nesterov=nesterov
        )
        for step in range(30):
            parameter.grad = gradient.clone()
            optimizer.step(weight=(step + comm.rank) % 3)  # the ranks take other numbers of steps
            if step == 17:
                optimizer.synchronize()  # and a block is cut short
            if optimizer.metrics()["steps_in_block"] == 0:
                state = optimizer.state[parameter]
                come = float((make_parameter() - parameter).detach().mean()) / 0.1
                assert float(state["step"]) == pytest.approx(come, rel=1e-6)
                for name, beta, wanted in (
                    ("exp_avg", BETAS[0], gradient),
                    ("exp_avg_sq", BETAS[1], gradient**2),
                ):
                    estimate = state[name] / (1 - beta**come)
                    assert float((estimate / wanted - 1).abs().max()) < 1e-5  # torch counts steps in float32

    in_process(2, work)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    block_steps=st.integers(1, 6),
    momentum=st.floats(0, 0.95),
    nesterov=st.booleans(),
)
def test_the_second_moment_is_never_negative_however_unequal_the_workers_steps(
    seed: int, block_steps: int, momentum: float, nesterov: bool
) -> None:
    def work(comm: Communicator) -> None:
        numbers = np.random.default_rng([seed, comm.rank])
        parameter, optimizer = make_adam_bmuf(comm, block_steps, block_momentum=momentum, nesterov=nesterov)
        optimizer.param_groups[0]["eps"] = 1e-3
        for step in range(25):
            scale = 10.0 ** numbers.integers(-6, 3) * numbers.integers(0, 2)  # often no gradient at all
            parameter.grad = torch.tensor(numbers.normal(size=NUM_ELEMENTS)) * scale
            optimizer.step(weight=int(numbers.integers(0, 4)))
            if step == 13:
                optimizer.synchronize()
            if optimizer.state:
                assert bool((optimizer.state[parameter]["exp_avg_sq"] >= 0).all())
        assert optimizer.metrics()["moments_guarded"] == 0

    in_process(3, work)


def test_a_second_moment_that_comes_out_negative_keeps_its_mean_and_is_counted() -> None:
    def work(comm: Communicator) -> None:
        parameter, optimizer = make_adam_bmuf(comm, 3, block_momentum=0.9)
        for step in range(5):
            give_step(optimizer, parameter, comm.rank, step)
        left = 1e-9 * (1 + comm.rank)
        give_step_and_shrink(optimizer, parameter, comm.rank, left)
        state = optimizer.state[parameter]["exp_avg_sq"]
        assert float((state[:7] - 1.5e-9).abs().max()) < 1e-15
        assert bool((state > 0).all())
        assert optimizer.metrics()["moments_guarded"] == 7

    in_process(2, work)


def give_step_and_shrink(optimizer: BMUF, parameter: torch.nn.Parameter, rank: int, left: float) -> None:
    """The last step of a block, after which some second moments are smaller than Adam can have left them."""
    optimizer.inner.register_step_post_hook(
        lambda inner, *_: inner.state[parameter]["exp_avg_sq"][:7].fill_(left)  # type: ignore[func-returns-value]
    )
    give_step(optimizer, parameter, rank, 5)


@pytest.mark.parametrize("local_state", ["average", "adam"])
def test_replicas_have_equal_states_after_every_block(local_state: str) -> None:
    def work(comm: Communicator) -> None:
        parameters = [make_parameter(torch.float32), make_parameter(torch.float64)]
        optimizer = BMUF(torch.optim.AdamW(parameters, lr=0.01), comm, block_steps=3, local_state=local_state)
        for step in range(12):
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, step, parameter.detach())
            optimizer.step(weight=(step + comm.rank) % 4)
            if (step + 1) % 3 == 0:
                for parameter in parameters:
                    for value in (parameter.detach(), *optimizer.state[parameter].values()):
                        assert torch.equal(*comm.all_gather(value.reshape(-1)))

    in_process(2, work)


# ---- the warm-up ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("local_state", ["keep", "reset", "average"])
def test_the_warm_up_is_exact_averaging_and_what_follows_is_bmuf_from_there(local_state: str) -> None:
    def train(optimizer, parameter: torch.nn.Parameter, rank: int, steps: range) -> list[Tensor]:  # type: ignore[no-untyped-def]
        history = []
        for step in steps:
            give_step(optimizer, parameter, rank, step, weight=(step + rank) % 3)
            with optimizer.global_weights():
                history.append(parameter.detach().clone())
        return history

    def work(comm: Communicator) -> list[Tensor]:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        optimizer = BMUF(inner, comm, block_steps=3, warmup_steps=5, local_state=local_state)
        history = train(optimizer, parameter, comm.rank, range(5))
        optimizer.synchronize()  # there is no block to close
        history += train(optimizer, parameter, comm.rank, range(5, 12))
        assert optimizer.metrics()["blocks"] == 2
        return history

    def by_parts(comm: Communicator) -> list[Tensor]:
        parameter = make_parameter()
        inner = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        history = train(ExactAveraging(inner, comm), parameter, comm.rank, range(5))
        blocks = BMUF(inner, comm, block_steps=3, local_state=local_state)
        return history + train(blocks, parameter, comm.rank, range(5, 12))

    for found, wanted in zip(in_process(3, work), in_process(3, by_parts)):
        assert torch.equal(torch.stack(found), torch.stack(wanted))


def test_a_warm_up_goes_on_with_another_number_of_workers() -> None:
    def save(comm: Communicator) -> tuple[dict, Tensor]:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, warmup_steps=10)
        for step in range(4):
            give_step(optimizer, parameter, comm.rank, step)
        return optimizer.state_dict(), parameter.detach()

    states, weights = zip(*in_process(3, save))

    def load(comm: Communicator) -> Tensor:
        parameter = make_parameter()
        optimizer = BMUF(torch.optim.SGD([parameter], lr=0.1), comm, warmup_steps=10)
        optimizer.load_state_dict(states[comm.rank])
        assert torch.equal(parameter, weights[0])
        give_step(optimizer, parameter, comm.rank, 4)
        return global_weights_of(optimizer, parameter)

    one, other = in_process(2, load)
    assert torch.equal(one, other) and not torch.equal(one, weights[0])


def test_adam_rests_exactly_where_no_worker_had_a_gradient_in_a_block() -> None:
    """Weights that differ round the mean of equal counts of steps, which is no step."""

    def work(comm: Communicator) -> list[tuple[float, bool]]:
        used, resting = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
        inner = torch.optim.Adam([used, resting], lr=0.01)
        optimizer = BMUF(inner, comm, block_steps=3, local_state="adam")
        counts = []
        for step in range(42):
            used.grad = torch.full((3,), 0.1 + comm.rank)
            resting.grad = torch.full((3,), 0.2) if step < 6 else None
            optimizer.step(weight=1 + (step * 389 + 277 * comm.rank) % 900)
            if step >= 8:
                counts.append((float(inner.state[resting]["step"]), bool(resting.isfinite().all())))
        return counts

    for counts in in_process(3, work):
        assert len(set(counts)) == 1 and counts[0][1]
