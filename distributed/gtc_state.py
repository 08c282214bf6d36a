"""What a checkpoint of gradient threshold compression holds of one rank, and making it one of another world size.

saved_size = 4  # workers that saved
states = [load_state_of(old) for old in ranks_to_fold(comm.rank, comm.size, saved_size)]
optimizer.load_state_dict(fold_states(states, comm.rank, comm.size))
"""
# N ranks that saved, N′ ranks that load, r residual, u velocity

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.flat import Bucket
from teacherstudent.distributed.optimizers import STATE_KEY

# Every rank counts its own; all else in a state is the same on all ranks.
COUNTERS_OF_A_RANK = ("bytes_sent", "quanta_sent", "carried_over", "clipped", "rounded", "held_back")


def find_saved_size(state: dict[str, Any]) -> int | None:
    """How many workers saved this state; None where it is none of GTC."""
    return state.get(STATE_KEY, {}).get("size")


def ranks_to_fold(rank: int, size: int, saved_size: int) -> list[int]:
    """Whose states rank `rank` of `size` needs from a training that `saved_size` workers saved.

    Those that leave `rank` when divided by `size`. A rank with none of its own needs one for what is common.
    """
    if not (0 <= rank < size and saved_size > 0):
        raise ValueError(
            f"rank {rank} of {size} cannot take over from {saved_size} workers; ranks count from 0"
        )
    return list(range(rank, saved_size, size)) or [rank % saved_size]


def fold_states(states: Sequence[dict[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """The state of rank `rank` of `size`, from those of `ranks_to_fold`, saved by N workers.

    What waits to be applied is the mean (1/N)·Σ r over the ranks, and it is what stays the same: rank j of N′ gets
    N′/N · Σ r of the ranks i ≡ j (mod N′), summed in float64 and rounded once; where N′ > N, ranks from N on start
    at zero. The same for velocities. The states are left as they are.

    Raises ValueError where they are not those of `ranks_to_fold`, from one training, or hold a delayed step.
    """
    hidden = [state.get(STATE_KEY, {}) for state in states]
    if not hidden or any("residuals" not in each for each in hidden):
        raise ValueError("fold_states needs states of GTC, one or more; give those that ranks_to_fold names")
    saved_size = hidden[0]["size"]
    needed, found = ranks_to_fold(rank, size, saved_size), [each["rank"] for each in hidden]
    if sorted(found) != needed or any(each["size"] != saved_size for each in hidden):
        raise ValueError(
            f"rank {rank} of {size} needs the states of ranks {needed} of {saved_size}, and got those of ranks "
            f"{found}; give those that ranks_to_fold names"
        )
    if len({each["counters"]["steps"] for each in hidden}) > 1:
        raise ValueError("these states are from different steps; give those that were saved together")
    if size != saved_size and any(each["pending"] is not None for each in hidden):
        raise ValueError(
            "these states hold a delayed step, which belongs to the workers that saved it; call synchronize() before "
            "saving what another number of workers is to load"
        )
    factor = size / saved_size if rank < saved_size else 0.0
    folded = copy.deepcopy(
        {key: hidden[0][key] for key in hidden[0] if key not in ("residuals", "velocities")}
    )
    folded.update(rank=rank, size=size)
    for name in ("residuals", "velocities"):
        folded[name] = [_fold(parts, factor) for parts in zip(*(each[name] for each in hidden), strict=True)]
    for name in COUNTERS_OF_A_RANK:
        total = sum(each["counters"][name] for each in hidden)
        folded["counters"][name] = total if rank < saved_size else 0
    return {**states[0], STATE_KEY: folded}


def _fold(parts: Sequence[Tensor], factor: float) -> Tensor:
    total = parts[0].double()
    for part in parts[1:]:
        total = total + part.double()
    return (total * factor).to(parts[0].dtype)


def by_parameter(buckets: Iterable[Bucket], buffers: Iterable[Tensor]) -> list[Tensor]:
    """Flat buffers (n), one for each bucket, as views in the shapes and the order of the parameters.

    A state in this form does not depend on how parameters are laid out in buckets.
    """
    views = {
        piece.index: piece.of(buffer) for bucket, buffer in zip(buckets, buffers) for piece in bucket.pieces
    }
    return [views[index] for index in sorted(views)]


def overwrite(views: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copy what was saved into views of the same shapes; ValueError where it is of another model."""
    found, needed = ([tuple(tensor.shape) for tensor in tensors] for tensors in (saved, views))
    if found != needed:
        raise ValueError(
            f"this GTC state holds residuals of shapes {found}, and the model has {needed}; load the state of the same "
            "model, with the parameters in the same order"
        )
    with torch.no_grad():
        for view, tensor in zip(views, saved):
            view.copy_(tensor)
