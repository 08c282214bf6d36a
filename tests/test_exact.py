"""Exact averaging of gradients."""

import torch
from workers.small_model import backward, batch_of, make_model, weights_of

from teacherstudent.distributed import Communicator, ExactAveraging, in_process


def test_workers_together_follow_one_worker_with_all_their_data() -> None:
    sizes = {0: 3, 1: 8, 2: 5}

    def work(comm: Communicator) -> torch.Tensor:
        model = make_model()
        optimizer = ExactAveraging(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), comm)
        for step in range(10):
            optimizer.zero_grad()
            backward(model, *batch_of(comm.rank, step, sizes[comm.rank]))
            optimizer.step(weight=sizes[comm.rank])
        return weights_of(model)

    together = in_process(3, work)
    alone = make_model()
    plain = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    for step in range(10):
        plain.zero_grad()
        batches = [batch_of(rank, step, sizes[rank]) for rank in range(3)]
        backward(alone, *(torch.cat(parts) for parts in zip(*batches)))
        plain.step()
    for weights in together:
        assert torch.equal(weights, together[0])
        assert float((weights - weights_of(alone)).abs().max()) < 1e-12


def test_one_worker_is_the_inner_optimizer_bit_for_bit() -> None:
    def train(wrap: bool) -> torch.Tensor:
        model = make_model(dtype=torch.float32)
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if wrap:
            [comm] = in_process(1, lambda comm: comm)
            optimizer = ExactAveraging(optimizer, comm)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, *batch_of(0, step, 4, torch.float32))
            optimizer.step()
        return weights_of(model)

    assert torch.equal(train(wrap=True), train(wrap=False))


def test_permuting_the_workers_changes_no_bit_with_equal_weights() -> None:
    def work(comm: Communicator, order: list[int]) -> torch.Tensor:
        model = make_model(dtype=torch.float32)
        optimizer = ExactAveraging(torch.optim.SGD(model.parameters(), lr=0.1), comm)
        for step in range(5):
            optimizer.zero_grad()
            backward(model, *batch_of(order[comm.rank], step, 4, torch.float32))
            optimizer.step()
        return weights_of(model)

    one = in_process(3, lambda comm: work(comm, [0, 1, 2]))[0]
    other = in_process(3, lambda comm: work(comm, [2, 0, 1]))[0]
    assert torch.equal(one, other)


def test_a_worker_with_weight_0_adds_nothing_even_when_its_gradient_is_not_finite() -> None:
    def work(comm: Communicator, others: bool) -> torch.Tensor:
        model = make_model()
        optimizer = ExactAveraging(torch.optim.SGD(model.parameters(), lr=0.1), comm)
        for step in range(3):
            optimizer.zero_grad()
            if comm.rank == 0 or others:
                backward(model, *batch_of(0, step, 4))
            if comm.rank == 1 and others:
                next(model.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
            optimizer.step(weight=7 if comm.rank == 0 else 0)
        return weights_of(model)

    reference = in_process(1, lambda comm: work(comm, False))[0]
    for others in (True, False):  # with a gradient that must be ignored, and with none at all
        both = in_process(2, lambda comm, others=others: work(comm, others))
        assert torch.equal(both[0], both[1])
        assert float((both[0] - reference).abs().max()) < 1e-14


def test_a_parameter_without_gradient_anywhere_is_left_alone_and_one_on_some_workers_counts_as_zero() -> None:
    def work(comm: Communicator) -> list[float]:
        parameters = [torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3)]
        optimizer = ExactAveraging(torch.optim.SGD(parameters, lr=1.0, weight_decay=0.5), comm)
        parameters[0].grad = torch.full((2,), 4.0, dtype=torch.float64)
        if comm.rank == 1:
            parameters[1].grad = torch.full((2,), 4.0, dtype=torch.float64)
        optimizer.step()
        return [parameter[0].item() for parameter in parameters]

    # 1 − (4 + 0.5), 1 − (2 + 0.5), and untouched by weight decay
    assert in_process(2, work) == [[-3.5, -1.5, 1.0]] * 2


def test_metrics_count_what_was_sent() -> None:
    def work(comm: Communicator) -> dict[str, float]:
        parameter = torch.nn.Parameter(torch.zeros(4000))
        optimizer = ExactAveraging(torch.optim.SGD([parameter], lr=0.1), comm)
        before = optimizer.metrics()["bytes_sent"]
        for _ in range(3):
            parameter.grad = torch.ones(4000)
            optimizer.step()
        metrics = optimizer.metrics()
        metrics["bytes_sent"] -= before
        return metrics

    for metrics in in_process(2, work):
        # half of the elements twice over, and six integers for the agreement
        assert metrics["bytes_sent"] == 3 * (2 * 2000 * 4 + 6 * 8)
        assert metrics["steps"] == 3
        assert metrics["seconds_in_exchange"] > 0
