"""The way back to the GradScaler that called step()."""

import sys
from typing import Any

import torch


def tell_scaler(optimizer: torch.optim.Optimizer, found: bool, device: torch.device) -> None:
    """Let the GradScaler know what all ranks found instead of what this one did, so that scales stay equal.

    It gives the optimiser a copy of what it found, and no other way back than through the stack. A rank that had
    no backward pass has looked at nothing, which update() would refuse.
    """
    frame = sys._getframe() if hasattr(optimizer, "found_inf") else None
    while frame is not None:
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler):
            per_device: dict[Any, torch.Tensor] = scaler._found_inf_per_device(optimizer)
            if not per_device:
                per_device[device] = torch.zeros((), device=device)
            for found_inf in per_device.values():
                found_inf.fill_(float(found))
            return
        frame = frame.f_back
