"""The settings of BMUF: which values they may have, and which of them a checkpoint holds a training to."""

import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from teacherstudent.distributed.block_exchange import WIRES
from teacherstudent.distributed.block_state import LOCAL_STATES, is_plain_adam

SETTINGS = (
    "block_steps", "block_momentum", "block_lr", "nesterov", "warmup_steps", "local_state", "outlier_factor", "wire",
    "fragments", "delay_steps",
)  # fmt: skip


def find_problems(settings: dict[str, Any], optimizer: torch.optim.Optimizer) -> list[str]:
    """Everything that is wrong with the settings."""
    problems = []
    for name, least in (("block_steps", 1), ("warmup_steps", 0), ("fragments", 1), ("delay_steps", 0)):
        if not is_integer_from(settings[name], least):
            problems.append(f"{name} is {settings[name]!r}; give a whole number, at least {least}")
    if problems:
        return problems
    block_steps, momentum, local_state = (
        settings[name] for name in ("block_steps", "block_momentum", "local_state")
    )
    if momentum is not None and not 0 <= momentum < 1:
        problems.append(f"block_momentum is {momentum!r}; give a number from 0 up to, not including, 1")
    if not 0 < settings["block_lr"] < float("inf"):
        problems.append(f"block_lr is {settings['block_lr']!r}; give a number above 0")
    if settings["outlier_factor"] is not None and not 1 < settings["outlier_factor"] < float("inf"):
        problems.append(f"outlier_factor is {settings['outlier_factor']!r}; give a number above 1, such as 3")
    for name, choices in (("local_state", LOCAL_STATES), ("wire", WIRES)):
        if settings[name] not in choices:
            problems.append(f"{name} is {settings[name]!r}; choose one of {', '.join(choices)}")
    if settings["fragments"] > block_steps:
        problems.append(f"fragments is {settings['fragments']}, more than the {block_steps} steps of a block")
    if settings["delay_steps"] >= block_steps:
        problems.append(
            f"delay_steps is {settings['delay_steps']}; give fewer than the {block_steps} of a block"
        )
    if settings["delay_steps"] and local_state in ("average", "adam"):
        problems.append(
            f"local_state={local_state!r} is exchanged at the block's end, which delay_steps is to hide"
        )
    if local_state == "adam" and not is_plain_adam(optimizer):
        problems.append("local_state='adam' re-estimates the moments of Adam and AdamW, without amsgrad")
    return problems


def is_integer_from(value: Any, least: int) -> bool:
    try:
        return operator.index(value) >= least
    except TypeError:
        return False


@dataclass(frozen=True)
class Progress:
    """How far the training is that a state was saved from."""

    num_steps: int
    is_in_block: bool  # whether any fragment has begun a block, or waits for an exchange
    is_under_way: bool  # whether any fragment waits for an exchange
    is_ahead: bool  # whether any block started from a look-ahead
    goes_on: bool  # whether as many workers load it: they go on inside their blocks
    num_unshared: int  # the steps whose work is in no mean yet

    @classmethod
    def of(cls, hidden: dict[str, Any], goes_on: bool) -> "Progress":
        """Of a hidden state of BMUF."""
        fragments, block_steps = hidden["fragments"], hidden["settings"]["block_steps"]
        is_under_way = any(fragment["own"] is not None for fragment in fragments)
        return cls(
            hidden["counters"]["steps"],
            is_under_way or any(fragment["tally"]["steps"] for fragment in fragments),
            is_under_way,
            any(fragment["filter"]["is_ahead"] for fragment in fragments),
            goes_on,
            max(each["tally"]["steps"] + block_steps * (each["own"] is not None) for each in fragments),
        )


def find_conflicts(
    saved: dict[str, Any], own: dict[str, Any], progress: Progress
) -> Iterator[tuple[str, str]]:
    """The settings that cannot have changed since a state was saved, and why.

    delay_steps, block_lr, nesterov and outlier_factor may change at any step; fragments never.
    """
    changed = {name for name in SETTINGS if saved[name] != own[name]}
    if "fragments" in changed:
        yield "fragments", "the state is laid out in as many parts; use the same"
    if progress.num_steps < saved["warmup_steps"]:
        return  # all workers hold the same, and no block has begun
    if progress.num_steps < own["warmup_steps"]:
        yield (
            "warmup_steps",
            f"the warm-up is over, {progress.num_steps} steps were taken; give no more than these",
        )
    in_block = progress.goes_on and progress.is_in_block
    if in_block and "block_steps" in changed:
        yield "block_steps", "a block is under way; save after synchronize() to change it"
    if in_block and progress.is_ahead and "block_momentum" in changed:
        yield (
            "block_momentum",
            "a block that started from its look-ahead is under way; save after synchronize()",
        )
    if "wire" in changed and progress.goes_on:
        if progress.is_under_way:
            yield "wire", "an exchange is under way in its format; save after synchronize()"
        elif own["wire"] == "full":
            yield "wire", "what rounding has kept back would be lost; choose any but full"
    parted = progress.is_in_block or saved["local_state"] == "keep"
    if "local_state" in changed and own["local_state"] == "adam" and parted:
        yield "local_state", "the moments at the block's start are not known; use the same"


def check_settings(saved: dict[str, Any], own: dict[str, Any], progress: Progress) -> None:
    """ValueError where a training cannot go on with the settings `own`."""
    conflicts = [
        f"this BMUF state was saved with {name}={saved[name]!r}, and is loaded with {own[name]!r}: {why}"
        for name, why in find_conflicts(saved, own, progress)
    ]
    if conflicts:
        raise ValueError("; ".join(conflicts))


def warn_of_lost(option: str, value: str, num_elements: int) -> None:
    if num_elements:
        warnings.warn(
            f"{option}={value!r}: what the loaded state had kept back to send later, {num_elements} elements, is lost "
            "with the change of the number of workers; give load_state_dicts the states of ranks_to_load",
            stacklevel=6,
        )
