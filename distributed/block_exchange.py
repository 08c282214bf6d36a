"""The mean of all ranks' updates, exchanged whole or in fewer bits.

In fewer bits, what rounding takes away is kept and added the next time, on both ways: by the sender of an update, and
by the owner of a slice, who sums it and sends the mean back. Nothing is lost, only late (error feedback: F. Seide et
al., "1-bit stochastic gradient descent and its application to data-parallel distributed training of speech DNNs",
Interspeech 2014; on both ways: H. Tang et al., "DoubleSqueeze", ICML 2019).
"""
# N ranks, n elements of a buffer, s share of a rank (N·w/W)

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.communicators import Communicator, Handle

# A reduction holds a few copies of what it reduces: in pieces of this size they stay small beside the model.
CHUNK_ELEMENTS = 2**20
INT8_CHUNK_ELEMENTS = 256  # share one scale


class Exchange:
    """Exchanges buffers as they are, in their own dtype."""

    keeps_nothing_back = True  # a buffer may be averaged part by part, wherever its parts lie

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        # What this rank has sent, which a checkpoint holds; a reduction works on copies, and may be over before
        # anybody waits for it.
        self._under_way: list[Tensor] = []
        self._reduced: list[Tensor] = []
        self._handles: list[Handle] = []

    def average(self, updates: list[Tensor], share: float) -> None:
        """Replace `updates`, flat buffers (n), by Σ s·update / N over all ranks. Collective.

        With share 0 the buffers' contents, finite or not, do not count.
        """
        for update in updates:
            self.average_parts([update], share)

    def average_parts(self, parts: list[Tensor], share: float) -> None:
        """The same for a buffer whose parts (flat, of one dtype) lie in different places."""
        for chunk in cut(parts, CHUNK_ELEMENTS):
            joined = torch.cat(chunk)
            weigh(joined, share)
            self.comm.all_reduce(joined)
            for part, mean in zip(chunk, joined.div_(self.comm.size).split([len(part) for part in chunk])):
                part.copy_(mean)

    def start(self, updates: list[Tensor], share: float) -> None:
        """As `average`, with the result from `finish`. `updates` must be left alone from here on."""
        for update in updates:
            weigh(update, share)
        self._send(updates)

    def finish(self) -> list[Tensor]:
        """The mean updates of the exchange that was started."""
        for handle in self._handles:
            handle.wait()
        means, self._reduced, self._under_way, self._handles = self._reduced, [], [], []
        return [mean.div_(self.comm.size) for mean in means]

    def _send(self, updates: list[Tensor]) -> None:
        self._under_way = updates
        self._reduced = [update.clone() for update in updates]
        self._handles = [self.comm.start_all_reduce(reduced) for reduced in self._reduced]

    def state_dict(self) -> dict[str, Any]:
        return {"under_way": self._under_way}

    def load_state_dict(self, state: dict[str, Any], devices: list[torch.device]) -> None:
        """Also starts again what was under way: all ranks load together. `devices`: that of each buffer."""
        num_parts = len(state["under_way"]) // len(devices)  # messages of a buffer, or the buffer itself
        self._send(
            [
                tensor.to(devices[number // num_parts], copy=True)
                for number, tensor in enumerate(state["under_way"])
            ]
        )

    def reset(self) -> None:
        """Nothing is under way, and nothing kept back."""
        self._under_way, self._reduced, self._handles = [], [], []

    def take_over(self, residuals: list[Tensor]) -> bool:
        """Start with what has been kept back elsewhere; whether there is a place for it."""
        return False


class CompressedExchange(Exchange):
    """Exchanges buffers in the format `wire`, in two rounds: slices to their owners, means to everybody.

    All ranks decode the same bytes, and so agree bit for bit on every transport.
    """

    keeps_nothing_back = False

    def __init__(self, comm: Communicator, buffers: list[Tensor], wire: "Wire") -> None:
        super().__init__(comm)
        self._wire = wire
        self._residuals = [torch.zeros_like(buffer, dtype=residual_dtype(buffer)) for buffer in buffers]
        self._slice_residuals = [
            torch.zeros_like(self._slices(residual)[comm.rank], dtype=torch.float64)
            for residual in self._residuals
        ]

    def average(self, updates: list[Tensor], share: float) -> None:
        self.start(updates, share)
        for update, mean in zip(updates, self.finish()):
            update.copy_(mean)

    def start(self, updates: list[Tensor], share: float) -> None:
        messages = []
        for update, residual in zip(updates, self._residuals, strict=True):
            if share:
                residual.add_(update, alpha=share)
            messages += [self._take(part) for part in self._slices(residual)]
        self._send(messages)

    def finish(self) -> list[Tensor]:
        means = []
        for handle, slice_residual, residual in zip(self._handles, self._slice_residuals, self._residuals):
            for message in handle.wait():
                slice_residual.add_(
                    self._wire.decode(message, slice_residual.numel()), alpha=1 / self.comm.size
                )
            parts = zip(self._slices(residual), self.comm.all_gather(self._take(slice_residual)))
            means.append(torch.cat([self._wire.decode(message, part.numel()) for part, message in parts]))
        self._under_way, self._handles = [], []
        return means

    def _send(self, updates: list[Tensor]) -> None:
        self._under_way = updates  # messages here: one for each rank, for each buffer
        self._handles = [
            self.comm.start_all_to_all(updates[first : first + self.comm.size])
            for first in range(0, len(updates), self.comm.size)
        ]

    def _take(self, residual: Tensor) -> Tensor:
        """A message of what the residual holds; what it does not express stays in the residual."""
        message = self._wire.encode(residual)
        residual.sub_(self._wire.decode(message, residual.numel()))
        return message

    def _slices(self, buffer: Tensor) -> list[Tensor]:
        return slices_of(buffer, self.comm.size)

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "residuals": self._residuals,
            "slice_residuals": self._slice_residuals,
        }

    def load_state_dict(self, state: dict[str, Any], devices: list[torch.device]) -> None:
        self.reset()  # what was saved without bits to spare has kept nothing back
        for name, kept in (("residuals", self._residuals), ("slice_residuals", self._slice_residuals)):
            for residual, saved in zip(kept, state.get(name, kept), strict=True):
                residual.copy_(saved)
        super().load_state_dict(state, devices)

    def reset(self) -> None:
        super().reset()
        for residual in (*self._residuals, *self._slice_residuals):
            residual.zero_()

    def take_over(self, residuals: list[Tensor]) -> bool:
        for residual, folded in zip(self._residuals, residuals, strict=True):
            residual.copy_(folded)
        return True


class Wire(ABC):
    """A format for floating-point values."""

    @abstractmethod
    def encode(self, values: Tensor) -> Tensor:
        """A message for finite `values` (n)."""

    @abstractmethod
    def decode(self, message: Tensor, num_elements: int) -> Tensor:
        """The values (n) that a message expresses, in float32."""


class HalfWire(Wire):
    """Two bytes an element; what exceeds the format's range is sent as its largest number."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._largest = torch.finfo(dtype).max

    def encode(self, values: Tensor) -> Tensor:
        return values.clamp(-self._largest, self._largest).to(self._dtype)

    def decode(self, message: Tensor, num_elements: int) -> Tensor:
        return message.float()


class Int8Wire(Wire):
    """One byte an element, and for each 256 of them a scale in float32: their largest magnitude / 127."""

    def encode(self, values: Tensor) -> Tensor:
        num_padding = -values.numel() % INT8_CHUNK_ELEMENTS
        chunks = torch.nn.functional.pad(values, (0, num_padding))
        chunks = chunks.view(chunks.numel() // INT8_CHUNK_ELEMENTS, INT8_CHUNK_ELEMENTS)
        scales = (chunks.abs().amax(dim=1) / 127).float()
        levels = chunks / scales.where(scales > 0, 1)[:, None]
        levels = levels.round_().clamp_(-127, 127).to(torch.int8).view(-1)[: values.numel()]
        return torch.cat((scales.view(torch.int8), levels))

    def decode(self, message: Tensor, num_elements: int) -> Tensor:
        scales = message[: message.numel() - num_elements].clone().view(torch.float32)
        levels = message[message.numel() - num_elements :].float()
        return levels * scales.repeat_interleave(INT8_CHUNK_ELEMENTS)[:num_elements]


WIRES: dict[str, Wire | None] = {
    "full": None,
    "bf16": HalfWire(torch.bfloat16),
    "fp16": HalfWire(torch.float16),
    "int8": Int8Wire(),
}


def average_tensors(comm: Communicator, tensors: Iterable[Tensor], share: float) -> None:
    """Replace tensors of any shapes by Σ s·tensor / N over all ranks, in one buffer for each dtype. Collective."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        Exchange(comm).average([flat], share)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group])):
            tensor.copy_(part.view(tensor.shape))


def weigh(update: Tensor, share: float) -> None:
    """Multiply in place; share 0 gives zeros also where the update is not finite."""
    if not share:
        update.zero_()
    elif share != 1:
        update.mul_(share)


def make_exchange(comm: Communicator, buffers: list[Tensor], wire: str) -> Exchange:
    """For buffers like these; one rank alone has nothing to exchange, and rounds nothing."""
    chosen = WIRES[wire]
    return Exchange(comm) if chosen is None or comm.size == 1 else CompressedExchange(comm, buffers, chosen)


def cut(parts: Iterable[Tensor], num_elements: int) -> Iterator[list[Tensor]]:
    """Flat tensors, laid end to end and cut every `num_elements`, as views."""
    chunk: list[Tensor] = []
    room = num_elements
    for part in parts:
        while len(part):
            taken, part = part[:room], part[room:]
            chunk.append(taken)
            room -= len(taken)
            if not room:
                yield chunk
                chunk, room = [], num_elements
    if chunk:
        yield chunk


def slices_of(buffer: Tensor, size: int) -> list[Tensor]:
    """The part of a buffer (n) that each of `size` ranks owns, in rank order."""
    bounds = [buffer.numel() * rank // size for rank in range(size + 1)]
    return [buffer[start:stop] for start, stop in pairwise(bounds)]


def residual_dtype(buffer: Tensor) -> torch.dtype:
    return torch.float32 if buffer.dtype in (torch.float16, torch.bfloat16) else buffer.dtype
