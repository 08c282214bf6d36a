"""What one rank may bring to a step that no rank can take it with."""

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.flat import Bucket, all_pieces

# Of one rank, so that the sum over all ranks fits.
MOST_WEIGHT = 2**40
SPARSE = (
    "a gradient is sparse, and only dense ones are exchanged; build the layer with dense gradients, as in "
    "Embedding(…, sparse=False)"
)


def find_problem(weight: Any, param_groups: list[dict[str, Any]], buckets: list[Bucket], method: str) -> str:
    """A sentence that says what was got and what is needed; empty if nothing is wrong."""
    try:
        check_weight(weight)
    except ValueError as error:
        return str(error)
    known = [piece.parameter for piece in all_pieces(buckets)]
    num_new = count_trainable(parameter for group in param_groups for parameter in group["params"])
    num_new -= count_trainable(known)
    if num_new:
        return (
            f"{num_new} parameters were added to the inner optimizer, or began to require a gradient, after {method} "
            "was constructed: their gradients would not be exchanged. Construct it with all parameters requiring a "
            "gradient, and freeze afterwards, by requires_grad or lr=0"
        )
    grads = [parameter.grad for parameter in known if parameter.grad is not None]
    return "" if all(map(is_dense, grads)) else SPARSE


def check_weight(weight: Any) -> int:
    try:
        number = operator.index(weight)
    except TypeError:
        raise ValueError(f"weight is {weight!r}; give an integer ≥ 0, such as the number of frames") from None
    if not 0 <= number < MOST_WEIGHT:
        raise ValueError(
            f"weight is {number}; give an integer ≥ 0 and below 2^40, such as the number of frames"
        )
    return number


def find_loss_problem(loss: float | None) -> str:
    """A sentence on a loss that was reported; empty if nothing is wrong."""
    if loss is None or not loss < 0:
        return ""
    return f"the loss that was reported is {loss:g}; outlier_factor compares losses from 0 up"


def count_trainable(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.requires_grad for parameter in parameters)


def is_dense(gradient: Tensor) -> bool:
    return gradient.layout == torch.strided
