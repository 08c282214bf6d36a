"""Gradient threshold compression: exact bookkeeping, whatever happens to the learning rate."""

import copy
import struct
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

from teacherstudent.distributed import GTC, Communicator, ExactAveraging, codec, in_process

NUM_ELEMENTS = 400
RATES = [0.1, 0.1, 0.3, 0.1, 1.7, 0.0, 0.02, 0.02, 5e-3, 0.4]
WEIGHTS = [(1, 1, 1), (2, 5, 1), (0, 3, 3), (4, 0, 0), (1, 1, 2)]


def gradient_of(
    rank: int, step: int, dtype: torch.dtype = torch.float32, size: int = NUM_ELEMENTS
) -> torch.Tensor:
    """Noise around a drift; elements of very different sizes."""
    sizes = np.exp(np.random.default_rng(0).normal(size=size))
    noise = np.random.default_rng([1, rank, step]).normal(size=size)
    return torch.tensor(sizes * (noise + 0.3), dtype=dtype)


class Worker:
    """A GTC worker that is given its gradients, and whose messages are listened to."""

    def __init__(self, comm: Communicator, dtype: torch.dtype = torch.float32, **options: float) -> None:
        self.comm = comm
        self.parameter = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS, dtype=dtype))
        self.optimizer = quiet_gtc(torch.optim.SGD([self.parameter], lr=0.1), comm, **options)
        self.messages: list[list[torch.Tensor]] = []  # of each step, one for each rank
        gather = comm.all_gather

        def listen(tensor: torch.Tensor) -> list[torch.Tensor]:
            self.messages.append(gather(tensor))
            return self.messages[-1]

        comm.all_gather = listen  # type: ignore[method-assign]

    @property
    def residual(self) -> torch.Tensor:
        return self.optimizer._residuals[0]

    @property
    def last_threshold(self) -> float:
        return struct.unpack_from("<d", self.messages[-1][self.comm.rank].numpy(), 16)[0]

    def step(self, gradient: torch.Tensor, rate: float = 0.1, weight: int = 1) -> None:
        self.optimizer.param_groups[0]["lr"] = rate
        self.parameter.grad = gradient.to(self.parameter.dtype, copy=True)
        self.optimizer.step(weight=weight)


def quiet_gtc(inner: torch.optim.Optimizer, comm: Communicator, **options: float) -> GTC:
    """Without the remark that there is one worker only."""
    if comm.size > 1:  # several threads must not touch the filters of warnings
        return GTC(inner, comm, **options)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return GTC(inner, comm, **options)  # type: ignore[arg-type]


def as_rational(tensor: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in tensor.double().tolist()]


# ---- conservation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.05},
        {"density": 0.4},
        {"threshold": 0.125},
        {"density": 0.05, "multi_quantum": True},
        {"threshold": 0.125, "multi_quantum": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_step_conserves_every_element_bit_for_bit(
    options: dict[str, float], dtype: torch.dtype
) -> None:
    """fl(r + fl(lr·s·g)) = r′ + quanta·τ exactly, across changing rates, weights, thresholds and codecs.

    Hence Σ sent + residual is the sum of the increments as rounded, checked in rational numbers.
    """
    to_numpy = np.float32 if dtype == torch.float32 else np.float64

    def work(comm: Communicator) -> tuple[set[int], set[float]]:
        worker = Worker(comm, dtype, **options)
        ledger = [Fraction(0)] * NUM_ELEMENTS  # earned and not yet sent
        codecs, thresholds = set(), set()
        for step in range(60):
            rate, weights = RATES[step % len(RATES)], WEIGHTS[step % len(WEIGHTS)]
            gradient = gradient_of(comm.rank, step, dtype)
            before = worker.residual.clone()
            worker.step(gradient, rate, weights[comm.rank])
            threshold = worker.last_threshold
            # numpy rounds the product, and then the sum
            earned = gradient.numpy() * to_numpy(rate * (3 * weights[comm.rank] / sum(weights)))
            grown = torch.from_numpy(before.numpy() + earned)
            quanta = (grown.double() - worker.residual.double()) / threshold
            due = (grown.abs() >= threshold) & (rate > 0)
            whole = (grown.double().abs() / threshold).floor() if options.get("multi_quantum") else 1
            assert torch.equal(quanta, torch.where(due, grown.sign().double() * whole, 0))
            assert torch.equal(grown.double(), worker.residual.double() + quanta * threshold)
            ledger = [
                owed + after - had - sent
                for owed, after, had, sent in zip(
                    ledger, as_rational(grown), as_rational(before), as_rational(quanta * threshold)
                )
            ]
            codecs.add(int(worker.messages[-1][comm.rank][4]))
            thresholds.add(threshold)
        assert ledger == as_rational(worker.residual)
        return codecs, thresholds

    seen = in_process(3, work)
    if options == {"density": 0.4}:
        assert all(codecs == {codec.WORDS, codec.DENSE} for codecs, _ in seen)
    assert all(
        thresholds == seen[0][1] and (len(thresholds) > 1) == ("density" in options) for _, thresholds in seen
    )


def test_with_many_quanta_a_step_no_residual_outgrows_the_threshold_and_the_weights_follow_plain_sgd() -> (
    None
):
    """Where one quantum a step falls behind: gradients of a thousand thresholds, in a few elements."""

    def work(comm: Communicator, multi_quantum: bool) -> tuple[float, float]:
        worker = Worker(comm, threshold=0.125, multi_quantum=multi_quantum)
        followed = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        for step in range(30):
            gradients = [gradient_of(rank, step) for rank in range(comm.size)]
            for gradient in gradients:
                gradient[:5] += 1000.0
            worker.step(gradients[comm.rank], rate=0.5)
            followed -= 0.5 * torch.stack(gradients).double().mean(dim=0)
        behind = (worker.parameter.detach().double() - followed).abs().max()
        return float(behind), float(worker.residual.abs().max())

    for behind, residual in in_process(2, lambda comm: work(comm, True)):
        assert residual < 0.125
        assert behind < 0.125 + 0.01  # what all workers still hold, on average, and rounding
    for behind, residual in in_process(2, lambda comm: work(comm, False)):
        assert residual > 1000
        assert behind > 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_update_is_the_quanta_of_all_workers_whatever_the_present_rate(dtype: torch.dtype) -> None:
    """The weights move by fl(τ·c)/N, to the two roundings of dividing and multiplying by the rate."""

    def work(comm: Communicator) -> list[int]:
        worker = Worker(comm, dtype, density=0.1)
        precision = torch.finfo(dtype).eps
        for step in range(40):
            rate = RATES[step % len(RATES)]
            before = worker.parameter.detach().clone()
            worker.step(gradient_of(comm.rank, step, dtype), rate)
            counts = torch.zeros(NUM_ELEMENTS, dtype=torch.int64)
            for message in worker.messages[-1]:  # read by hand, not by the decoder
                header, body = message[:40], message[40:]
                if header[4] == codec.DENSE:
                    counts += body.view(torch.int8)
                else:
                    for word in body.clone().view(torch.int32).tolist():
                        counts[word // 2] += -1 if word % 2 else 1
            expected = counts.to(dtype) * worker.last_threshold / comm.size
            moved = before.double() - worker.parameter.detach().double()
            slack = precision * (4 * expected.abs() + 2 * before.abs())
            assert bool(((moved - expected).abs() <= slack).all())
        return counts.tolist()

    in_process(3, work)


def test_a_residual_earned_at_one_rate_is_never_applied_at_another() -> None:
    """Weights + residuals = −Σ lr·s·g / N in float64, though the rate moves by three orders of magnitude."""

    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        worker = Worker(comm, torch.float64, density=0.05)
        earned = torch.zeros(NUM_ELEMENTS, dtype=torch.float64)
        for step in range(200):
            rate, weights = RATES[step % len(RATES)] * 0.99**step, WEIGHTS[step % len(WEIGHTS)]
            gradient = gradient_of(comm.rank, step, torch.float64)
            worker.step(gradient, rate, weights[comm.rank])
            earned += rate * weights[comm.rank] / sum(weights) * gradient
        return worker.parameter.detach(), worker.residual, earned

    weights, residuals, earned = (torch.stack(column) for column in zip(*in_process(3, work)))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[0], weights[2])
    assert float(residuals.abs().max()) > 1e-3
    error = weights[0] - residuals.sum(0) / 3 + earned.sum(0)
    assert float(error.abs().max()) < 1e-12


def test_a_rate_of_0_sends_nothing_keeps_the_residual_and_leaves_momentum_alone() -> None:
    def work(comm: Communicator) -> None:
        parameters = [torch.nn.Parameter(torch.zeros(NUM_ELEMENTS)) for _ in range(2)]
        groups = [{"params": [parameter], "lr": 0.1} for parameter in parameters]
        optimizer = quiet_gtc(torch.optim.SGD(groups, momentum=0.9), comm, density=0.1)

        def step(number: int) -> None:
            for parameter in parameters:
                parameter.grad = gradient_of(comm.rank, number)
            optimizer.step()

        for number in range(5):
            step(number)
        optimizer.param_groups[0]["lr"] = 0.0
        still = slice(0, NUM_ELEMENTS)
        residual = optimizer._residuals[0][still].clone()
        buffer = optimizer.state[parameters[0]]["momentum_buffer"].clone()
        weights = parameters[0].detach().clone()
        other = parameters[1].detach().clone()
        optimizer._controller.level -= 8  # type: ignore[operator]  # halved: much would be due
        for number in range(5, 8):
            step(number)
        assert torch.equal(optimizer._residuals[0][still], residual)
        assert torch.equal(optimizer.state[parameters[0]]["momentum_buffer"], buffer)
        assert torch.equal(parameters[0], weights)
        assert not torch.equal(parameters[1], other)
        optimizer.param_groups[1]["lr"] = 0.0
        quanta = optimizer.metrics()["quanta_sent"]
        step(8)
        assert optimizer.metrics()["quanta_sent"] == quanta

    in_process(2, work)


def test_training_may_begin_at_a_rate_of_0() -> None:
    def work(comm: Communicator) -> float:
        worker = Worker(comm, density=0.1)
        for step in range(6):
            worker.step(gradient_of(comm.rank, step), rate=0.01 * max(0, step - 1))
        assert "threshold" in worker.optimizer.metrics()
        return worker.optimizer.metrics()["quanta_sent"]

    assert all(num_quanta > 0 for num_quanta in in_process(2, work))


def test_groups_with_their_own_rates_each_conserve_what_they_earned() -> None:
    def work(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros(NUM_ELEMENTS, dtype=torch.float64)) for _ in range(2)]
        groups = [{"params": [parameters[0]], "lr": 0.5}, {"params": [parameters[1]], "lr": 0.01}]
        optimizer = quiet_gtc(torch.optim.SGD(groups), comm, density=0.1)
        earned = torch.zeros(2 * NUM_ELEMENTS, dtype=torch.float64)
        for step in range(100):
            gradient = gradient_of(comm.rank, step, torch.float64)
            earned += torch.cat([group["lr"] * gradient for group in optimizer.param_groups])
            for parameter in parameters:
                parameter.grad = gradient.clone()
            optimizer.step()
            optimizer.param_groups[0]["lr"] *= 0.98
        assert all(float(parameter.detach().abs().max()) > 0.1 for parameter in parameters)
        return torch.cat([parameter.detach() for parameter in parameters]), optimizer._residuals[0] - earned

    (weights, one), (_, other) = in_process(2, work)
    assert float((weights - (one + other) / 2).abs().max()) < 1e-12


def test_where_every_gradient_is_one_quantum_it_is_exact_averaging_also_with_momentum() -> None:
    """Then the residual stays empty, and the momentum buffer sees what exact averaging shows it."""

    def work(comm: Communicator, exact: bool) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(NUM_ELEMENTS))
        inner = torch.optim.SGD([parameter], lr=0.25, momentum=0.5, nesterov=True, weight_decay=0.125)
        optimizer = ExactAveraging(inner, comm) if exact else quiet_gtc(inner, comm, threshold=0.25)
        for step in range(20):
            rate = 0.25 if step % 3 else 0.5
            signs = torch.from_numpy(np.random.default_rng([comm.rank, step]).integers(-1, 2, NUM_ELEMENTS))
            optimizer.param_groups[0]["lr"] = rate
            parameter.grad = signs.float() * 0.25 / rate
            optimizer.step()
        return parameter.detach()

    exact = in_process(2, lambda comm: work(comm, True))[0]
    assert all(torch.equal(weights, exact) for weights in in_process(2, lambda comm: work(comm, False)))


def test_a_worker_with_weight_0_still_sends_what_it_owes() -> None:
    def work(comm: Communicator) -> list[float]:
        worker = Worker(comm, threshold=1.0)
        worker.step(torch.full((NUM_ELEMENTS,), 25.0))  # 2.5 in update units: one quantum now, one later
        worker.step(torch.full((NUM_ELEMENTS,), 0.0 if comm.rank else float("nan")), weight=comm.rank)
        return [worker.parameter[0].item(), worker.residual[0].item()]

    assert in_process(2, work) == [[-2.0, 0.5]] * 2


# ---- thresholds ----------------------------------------------------------------------------------------------


def test_a_fixed_threshold_is_moved_to_the_nearest_with_a_message() -> None:
    [comm] = in_process(1, lambda comm: comm)
    parameter = torch.nn.Parameter(torch.zeros(3))
    with pytest.warns(UserWarning) as warned:
        optimizer = GTC(torch.optim.SGD([parameter], lr=1.0), comm, threshold=0.3)
    assert any("threshold=0.3 is moved to 0.3125" in str(warning.message) for warning in warned)
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == [-0.3125] * 3
    assert optimizer.metrics()["threshold"] == 0.3125


RATE_AT = {
    "constant": lambda step: 1.0,
    "decaying": lambda step: 0.997**step,
    "alternating": lambda step: 3.0 if step // 5 % 2 else 1.0,
}


@pytest.mark.parametrize("rate_at", RATE_AT.values(), ids=RATE_AT.keys())
@pytest.mark.parametrize("density", [1e-2, 2e-3])
def test_the_density_settles_near_its_target(density: float, rate_at) -> None:  # type: ignore[no-untyped-def]
    size = 20000

    def work(comm: Communicator) -> list[float]:
        parameter = torch.nn.Parameter(torch.zeros(size))
        optimizer = GTC(torch.optim.SGD([parameter], lr=1.0), comm, density=density)
        means = []
        for step in range(500):
            optimizer.param_groups[0]["lr"] = rate_at(step)
            parameter.grad = gradient_of(comm.rank, step, size=size) - 0.2
            optimizer.step()
            means.append(optimizer.metrics()["mean_density"])
        return means

    one, other = in_process(2, work)
    assert one == other
    assert density / 1.5 < min(one[250:]) and max(one[250:]) < 1.5 * density


def test_one_worker_applies_its_threshold_and_says_so() -> None:
    [comm] = in_process(1, lambda comm: comm)
    with pytest.warns(UserWarning, match="GTC with one worker"):
        GTC(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0), comm)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density is 0.0"),
        ({"density": 1.0}, "density is 1.0"),
        ({"density": float("nan")}, "density is nan"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"threshold": -1.0}, "threshold is -1.0"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"threshold": 1.0, "density": 0.1}, "density or threshold, not both"),
    ],
)
def test_a_setting_out_of_range_is_an_error_on_every_worker(options: dict[str, float], message: str) -> None:
    def work(comm: Communicator) -> None:
        with pytest.raises(ValueError, match=message):
            GTC(torch.optim.SGD([torch.nn.Parameter(torch.zeros(3))], lr=1.0), comm, **options)  # type: ignore[arg-type]

    in_process(2, work)


# ---- messages ------------------------------------------------------------------------------------------------


def test_a_damaged_message_is_an_error_that_names_its_sender() -> None:
    def work(comm: Communicator) -> str:
        worker = Worker(comm, threshold=0.5)
        gather = comm.all_gather
        if comm.rank == 1:
            comm.all_gather = lambda tensor: gather(torch.cat((tensor[:-1], tensor[-1:] ^ 1)))  # type: ignore[method-assign]
        with pytest.raises(ValueError) as caught:
            worker.step(gradient_of(comm.rank, 0))
        assert torch.equal(worker.parameter, torch.zeros(NUM_ELEMENTS))
        return str(caught.value)

    assert all(
        "the GTC message of rank 1 cannot be used: its checksum" in message for message in in_process(3, work)
    )


def test_learning_rates_that_differ_between_workers_are_an_error() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, threshold=0.5)
        with pytest.raises(ValueError, match="differ in learning rate"):
            worker.step(gradient_of(comm.rank, 0), rate=0.1 + comm.rank)

    in_process(2, work)


# ---- checkpoints -------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_residual_of_its_own_rank() -> None:
    def work(comm: Communicator) -> None:
        worker = Worker(comm, density=0.1)
        for step in range(5):
            worker.step(gradient_of(comm.rank, step))
        states = copy.deepcopy(worker.optimizer.state_dict())
        fresh = Worker(comm, density=0.1)
        fresh.optimizer.load_state_dict(states)
        assert torch.equal(fresh.residual, worker.residual)
        states["distributed"]["rank"] = 1 - comm.rank
        with pytest.raises(ValueError, match="every rank loads its own"):
            fresh.optimizer.load_state_dict(states)

    in_process(2, work)


def test_a_checkpoint_for_another_number_of_workers_says_that_residuals_are_lost() -> None:
    def save(comm: Communicator) -> dict:
        worker = Worker(comm, density=0.1)
        for step in range(5):
            worker.step(gradient_of(comm.rank, step))
        return copy.deepcopy(worker.optimizer.state_dict())

    states = in_process(3, save)

    def load(comm: Communicator) -> float:
        worker = Worker(comm, density=0.1)
        worker.optimizer.load_state_dict(states[comm.rank])
        worker.step(gradient_of(comm.rank, 5))
        return worker.optimizer.metrics()["threshold"]

    with pytest.warns(
        UserWarning, match="saved by 3 workers and is loaded by 2: all residuals start at zero"
    ):
        assert len(set(in_process(2, load))) == 1
