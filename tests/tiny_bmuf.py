"""One parameter trained by BMUF on made-up gradients."""

import warnings

import numpy as np
import torch

from teacherstudent.distributed import BMUF, Communicator
from teacherstudent.distributed.optimizers import DistributedOptimizer

NUM_ELEMENTS = 30


def gradient_of(rank: int, step: int, weights: torch.Tensor) -> torch.Tensor:
    """Noise, and a pull towards 3: training matters for what comes next."""
    noise = np.random.default_rng([2, rank, step]).normal(size=NUM_ELEMENTS)
    return torch.tensor(noise, dtype=weights.dtype) + 0.3 * (weights - 3)


def make_parameter(dtype: torch.dtype = torch.float64) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.linspace(-1, 1, NUM_ELEMENTS, dtype=dtype))


def quiet_bmuf(inner: torch.optim.Optimizer, comm: Communicator, **options) -> BMUF:  # type: ignore[no-untyped-def]
    """Without the remark that there is one worker only."""
    if comm.size > 1:  # several threads must not touch the filters of warnings
        return BMUF(inner, comm, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BMUF(inner, comm, **options)


def give_step(
    optimizer: DistributedOptimizer, parameter: torch.nn.Parameter, rank: int, step: int, weight: int = 1
) -> None:
    parameter.grad = gradient_of(rank, step, parameter.detach())
    optimizer.step(weight=weight)


def global_weights_of(optimizer: DistributedOptimizer, parameter: torch.nn.Parameter) -> torch.Tensor:
    with optimizer.global_weights():
        return parameter.detach().clone()
