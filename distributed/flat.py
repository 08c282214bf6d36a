"""Trainable parameters laid end to end: one flat buffer for each (dtype, device)."""
# P parameters, n elements of a bucket

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """One parameter's place in its bucket."""

    parameter: Tensor
    group: int  # number of the optimiser's parameter group
    start: int
    stop: int
    index: int  # among all trainable parameters

    def of(self, flat: Tensor) -> Tensor:
        """This parameter's part of a flat buffer, in the parameter's shape."""
        return flat[self.start : self.stop].view(self.parameter.shape)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype on one device, in the order of the optimiser's groups."""

    pieces: list[Piece]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_elements(self) -> int:
        return self.pieces[-1].stop

    def new_zeros(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(self.num_elements, dtype=dtype or self.dtype, device=self.device)

    def read_parameters(self) -> Tensor:
        """A flat copy (n) of the parameters."""
        flat = torch.empty(self.num_elements, dtype=self.dtype, device=self.device)
        with torch.no_grad():
            for piece in self.pieces:
                piece.of(flat).copy_(piece.parameter)
        return flat

    def write_parameters(self, flat: Tensor) -> None:
        """Overwrite the parameters in place: cuDNN's flat LSTM weights and other views stay what they are."""
        with torch.no_grad():
            for piece in self.pieces:
                piece.parameter.copy_(piece.of(flat))


def make_buckets(param_groups: list[dict[str, Any]]) -> list[Bucket]:
    """Buckets of all parameters that require a gradient, the same on every rank with the same model."""
    pieces: dict[tuple[torch.dtype, torch.device], list[Piece]] = {}
    index = 0
    for number, group in enumerate(param_groups):
        for parameter in group["params"]:
            if not parameter.requires_grad:
                continue
            bucket = pieces.setdefault((parameter.dtype, parameter.device), [])
            start = bucket[-1].stop if bucket else 0
            bucket.append(Piece(parameter, number, start, start + parameter.numel(), index))
            index += 1
    return [Bucket(members, dtype, device) for (dtype, device), members in pieces.items()]


def all_pieces(buckets: list[Bucket]) -> Iterator[Piece]:
    for bucket in buckets:
        yield from bucket.pieces


def describe(buckets: list[Bucket]) -> str:
    """Shapes and dtypes, to be compared between ranks."""
    shapes = [f"{tuple(piece.parameter.shape)} {piece.parameter.dtype}" for piece in all_pieces(buckets)]
    elements = sum(bucket.num_elements for bucket in buckets)
    digest = hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:16]
    return f"{len(shapes)} parameters, {elements} elements, shapes {digest}"


def describe_groups(param_groups: list[dict[str, Any]]) -> str:
    """One line a group: its plain settings, except the learning rate, which is compared in every step."""
    lines = []
    for number, group in enumerate(param_groups):
        plain = [f"{name}={group[name]!r}" for name in sorted(group) if isinstance(group[name], int | float)]
        lines.append(f"group {number}: " + ", ".join(text for text in plain if not text.startswith("lr=")))
    return "\n".join(lines)


def hash_parameters(buckets: list[Bucket]) -> str:
    """A hash of every bit of the parameters."""
    return hash_tensors(piece.parameter for piece in all_pieces(buckets))


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        values = tensor.detach().contiguous().cpu().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def max_magnitude(tensors: list[Tensor]) -> float:
    """The largest absolute value of tensors on one device, NaN where there is one."""
    extremes = [extreme for tensor in tensors for extreme in torch.aminmax(tensor)]
    return float(torch.stack(extremes).abs().max())


def stay_finite(tensors: Iterable[Tensor], factor: float) -> bool:
    """Whether all elements of floating-point tensors, also times `factor`, are finite numbers of their dtypes."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return all(
        max_magnitude(group) * factor <= torch.finfo(dtype).max for (dtype, _), group in groups.items()
    )
