"""A small model and made-up batches, for tests of optimisers."""

import numpy as np
import torch
from torch.nn import functional


def make_model(seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model


def weights_of(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1).clone() for parameter in model.parameters()])


def backward(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    functional.mse_loss(model(inputs), targets).backward()


def batch_of(
    rank: int, step: int, size: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = np.random.default_rng([rank, step])
    return (
        torch.tensor(numbers.normal(size=(size, 6)), dtype=dtype),
        torch.tensor(numbers.normal(size=(size, 3)), dtype=dtype),
    )
