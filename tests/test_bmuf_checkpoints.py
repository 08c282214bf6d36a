"""Going on from a checkpoint of BMUF, whatever its options and wherever in a block."""

import copy

import pytest
import torch
from tiny_bmuf import gradient_of, make_parameter
from torch import Tensor

from teacherstudent.distributed import BMUF, Communicator, in_process

OPTIONS: dict[str, dict] = {
    "plain": {},
    "reset": {"local_state": "reset"},
    "average": {"local_state": "average", "outlier_factor": 5.0},
    "adam": {"local_state": "adam", "block_momentum": 0.6},
    "warm-up": {"warmup_steps": 7},
    "fewer bits": {"wire": "int8"},
    "fragments": {"fragments": 2, "wire": "bf16"},
    "delay": {"delay_steps": 2, "nesterov": False},
    "delay beside fragments": {"delay_steps": 3, "fragments": 2},
    "everything": {
        "delay_steps": 1,
        "fragments": 2,
        "wire": "int8",
        "warmup_steps": 3,
        "outlier_factor": 5.0,
    },
}


def build(comm: Communicator, options: dict) -> tuple[list[torch.nn.Parameter], BMUF]:
    parameters = [make_parameter(torch.float32), make_parameter(torch.float32)]
    return parameters, BMUF(torch.optim.Adam(parameters, lr=0.05), comm, block_steps=4, **options)


def train(comm: Communicator, parameters: list[torch.nn.Parameter], optimizer: BMUF, step: int) -> None:
    for number, parameter in enumerate(parameters):
        parameter.grad = gradient_of(comm.rank, 100 * number + step, parameter.detach())
    optimizer.report_loss(1.0 + 0.1 * ((step + comm.rank) % 5))
    optimizer.step(weight=(step + comm.rank) % 4)


def all_that_counts(parameters: list[torch.nn.Parameter], optimizer: BMUF) -> Tensor:
    values = [parameter.detach().clone() for parameter in parameters]
    values += [optimizer.state[parameter][name] for parameter in parameters for name in ("exp_avg", "exp_avg_sq")
               if parameter in optimizer.state]  # fmt: skip
    with optimizer.global_weights():
        values += [parameter.detach().clone() for parameter in parameters]
    return torch.cat(values)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_going_on_from_a_checkpoint_at_any_step_is_going_on_and_saving_changes_nothing(options: dict) -> None:
    num_steps = 15

    def uninterrupted(comm: Communicator, saving: bool) -> tuple[Tensor, list[dict]]:
        parameters, optimizer = build(comm, options)
        saved = []
        for step in range(num_steps):
            if saving:
                comm.barrier()  # which ends whatever was started before it
                saved.append(copy.deepcopy(optimizer.state_dict()))
            train(comm, parameters, optimizer, step)
        return all_that_counts(parameters, optimizer), saved

    def resumed(comm: Communicator, stop: int, states: list[dict]) -> Tensor:
        parameters, optimizer = build(comm, options)
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(7.0)
        optimizer.load_state_dict(copy.deepcopy(states[stop]))
        for step in range(stop, num_steps):
            train(comm, parameters, optimizer, step)
        return all_that_counts(parameters, optimizer)

    reference = in_process(2, lambda comm: uninterrupted(comm, False)[0])
    saving = in_process(2, lambda comm: uninterrupted(comm, True))
    for rank, (end, _) in enumerate(saving):
        assert torch.equal(end, reference[rank])
    for stop in range(num_steps):
        for rank, end in enumerate(
            in_process(2, lambda comm, stop=stop: resumed(comm, stop, saving[comm.rank][1]))
        ):
            assert torch.equal(end, reference[rank]), f"rank {rank}, from step {stop}"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_synchronize_leaves_w_in_the_model_the_same_bits_on_every_worker(options: dict) -> None:
    def work(comm: Communicator) -> None:
        parameters, optimizer = build(comm, options)
        for step in range(21):
            train(comm, parameters, optimizer, step)
            if step in (1, 10, 12, 20):
                optimizer.synchronize()
                own = torch.cat([parameter.detach() for parameter in parameters])
                assert all(torch.equal(own, other) for other in comm.all_gather(own))
                with optimizer.global_weights():
                    assert torch.equal(own, torch.cat([parameter.detach() for parameter in parameters]))

    in_process(3, work)


def test_a_state_with_other_fragments_is_refused() -> None:
    def work(comm: Communicator) -> None:
        _, optimizer = build(comm, {})
        _, other = build(comm, {"fragments": 2})
        with pytest.raises(ValueError, match="saved with fragments=1, and is loaded with 2"):
            other.load_state_dict(optimizer.state_dict())

    in_process(2, work)


def test_an_exchange_under_way_is_among_what_another_number_of_workers_loses() -> None:
    def save(comm: Communicator) -> tuple[dict, Tensor]:
        parameters, optimizer = build(comm, {"delay_steps": 2})
        for step in range(5):
            train(comm, parameters, optimizer, step)
        return copy.deepcopy(optimizer.state_dict()), optimizer._fragments[0].filter.weights[0].clone()

    states, weights = zip(*in_process(3, save))

    def load(comm: Communicator) -> None:
        parameters, optimizer = build(comm, {"delay_steps": 2})
        optimizer.load_state_dict(states[comm.rank])
        assert torch.equal(torch.cat([parameter.detach() for parameter in parameters]), weights[0])
        for step in range(5, 12):
            train(comm, parameters, optimizer, step)

    with pytest.warns(UserWarning, match="the 5 steps since the last block are lost"):
        in_process(2, load)
