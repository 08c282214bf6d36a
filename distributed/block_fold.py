"""Making checkpoints of N workers those of N′: what waits to be sent goes to the workers that are there."""
# N ranks that saved, N′ ranks that load, r residual of a rank, q what the owner of a slice keeps back

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.block_exchange import slices_of
from teacherstudent.distributed.gtc_state import fold_states, ranks_to_fold
from teacherstudent.distributed.optimizers import STATE_KEY


def fold_exchanges(states: Sequence[dict[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """The hidden state of BMUF for rank `rank` of `size`, from those of `ranks_to_fold`, saved by N workers.

    What waits is Σ r / N + q, and it is what stays the same: rank j of N′ gets N′/N · r + N′ · q of the ranks
    i ≡ j (mod N′), each q at its slice, summed in float64; where N′ > N, ranks from N on start at zero. The rest is
    that of the first state.
    """
    saved_size = states[0]["size"]
    check_ranks([state["rank"] for state in states], rank, size, saved_size)
    fragments = []
    for number, first in enumerate(states[0]["fragments"]):
        exchanges = [state["fragments"][number]["exchange"] for state in states]
        folded = [
            sum_residuals(
                [exchange["residuals"][bucket] for exchange in exchanges],
                [exchange["slice_residuals"][bucket] for exchange in exchanges],
                [state["rank"] for state in states], saved_size, size if rank < saved_size else 0,
            )
            for bucket in range(len(exchanges[0].get("residuals", ())))
        ]  # fmt: skip
        fragments.append({**first, "exchange": {"under_way": [], "folded": folded}})
    return {**states[0], "fragments": fragments}


def sum_residuals(
    residuals: list[Tensor], slice_residuals: list[Tensor], ranks: list[int], saved_size: int, size: int
) -> Tensor:
    total = torch.zeros_like(residuals[0], dtype=torch.float64)
    for residual, kept, rank in zip(residuals, slice_residuals, ranks):
        total += residual.double() * (size / saved_size)
        slices_of(total, saved_size)[rank].add_(kept, alpha=size)
    return total


def fold_tiers(states: Sequence[dict[str, Any]], rank: int, size: int, group_size: int) -> dict[str, Any]:
    """The state of TwoTier for rank `rank` of `size`, from those of `ranks_to_fold`.

    These have the same place in their groups, so that residuals go from place to place: a group takes over from
    groups. The mean over all groups of what waits stays the same.
    """
    hidden = [state[STATE_KEY] for state in states]
    saved_size = hidden[0]["size"]
    check_ranks([each["rank"] for each in hidden], rank, size, saved_size)
    tiers = dict(hidden[0]["tiers"])
    group, place = divmod(rank, group_size)
    if "across" in tiers:
        across = [each["tiers"]["across"] for each in hidden]
        tiers["across"] = fold_exchanges(across, group, size // group_size)
    if "residuals" in tiers.get("inside", ()):
        inside = [
            {STATE_KEY: {**each["tiers"]["inside"], "size": saved_size, "rank": each["rank"]}}
            for each in hidden
        ]
        folded = fold_states(inside, rank, size)[STATE_KEY]
        tiers["inside"] = {**folded, "size": group_size, "rank": place}
    return {**states[0], STATE_KEY: {**hidden[0], "tiers": tiers, "is_folded": True}}


def check_ranks(found: list[int], rank: int, size: int, saved_size: int) -> None:
    needed = ranks_to_fold(rank, size, saved_size)
    if found != needed:
        raise ValueError(
            f"rank {rank} of {size} needs the states of ranks {needed} of {saved_size}, and got those of ranks "
            f"{found}; give those that ranks_to_load names, in their order"
        )
