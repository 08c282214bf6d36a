"""What a model holds beside the weights that are trained: buffers, as those of BatchNorm, and frozen parameters."""
# N ranks, w weight of the data that a rank has seen, W = Σ w

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.block_exchange import average_tensors
from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.flat import Bucket, all_pieces


class Untrained:
    """The buffers and the frozen parameters of `model`; without a model, the frozen parameters of the optimiser alone.

    All of them are made equal at the start. Buffers are brought together again by `average`; frozen parameters are
    taken to stay what they are. Buffers are looked up by name each time, since modules may replace them.

    start   what each buffer held when all ranks last had the same
    weight  of the data that this rank has seen since
    """

    def __init__(self, model: torch.nn.Module | None, param_groups: list[dict[str, Any]]) -> None:
        self._model = model if isinstance(model, torch.nn.Module) else None
        parameters = [parameter for group in param_groups for parameter in group["params"]]
        if self._model is not None:
            parameters += self._model.parameters()
        self._frozen = list({id(each): each for each in parameters if not each.requires_grad}.values())
        self._names = list(self._buffers())
        self._aside: list[Tensor] | None = (
            None  # this rank's own buffers while the model shows the common ones
        )
        self.remember()

    def find_problems(self, model: object, buckets: list[Bucket]) -> Iterator[str]:
        if model is None:
            return
        if self._model is None:
            yield f"model is {model!r}; give the torch.nn.Module whose parameters are trained"
            return
        own = set(map(id, self._model.parameters()))
        if not any(id(piece.parameter) in own for piece in all_pieces(buckets)):
            yield "model holds none of the optimizer's parameters; give the model that is trained"
        for name, buffer in self._buffers().items():
            if buffer.layout != torch.strided:
                yield f"the buffer '{name}' is sparse, and only dense ones are exchanged; leave model out"

    def describe(self) -> str:
        """One line each, to be compared between ranks."""
        named = [("frozen parameter", parameter) for parameter in self._frozen]
        named += [(f"buffer '{name}'", buffer) for name, buffer in self._buffers().items()]
        return "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named)

    def tensors(self) -> list[Tensor]:
        return [*(parameter.detach() for parameter in self._frozen), *self._buffers().values()]

    def broadcast(self, comm: Communicator) -> None:
        """Those of rank 0 on every rank."""
        write(self.tensors(), [comm.broadcast(tensor.clone()) for tensor in self.tensors()])

    def remember(self) -> None:
        """All ranks hold the same."""
        self.start = self._read()
        self.weight = 0

    # ---- coming together ----------------------------------------------------------------------------------

    def find_problem(self) -> str:
        """What makes the buffers impossible to average; empty if nothing does."""
        for name, buffer, start in zip(self._names, self._current(), self.start):
            if (buffer.shape, buffer.dtype) != (start.shape, start.dtype):
                return (
                    f"the buffer '{name}' has become {tuple(buffer.shape)} {buffer.dtype}, and was "
                    f"{tuple(start.shape)} {start.dtype}: only buffers that keep their shape can be averaged; leave "
                    "model out"
                )
        return ""

    def is_finite(self) -> bool:
        """Whether what has changed is: a buffer may hold infinities for good, as masks do."""
        return all(bool(difference(*pair).isfinite().all()) for pair in zip(self._current(), self.start))

    def average(self, comm: Communicator) -> list[int]:
        """Floating-point buffers become their mean over the ranks, by the data that each has seen; all others, such as
        counts of batches, the largest of any rank that has seen data. Collective.

        The mean is taken of the differences to `start`: what nobody has changed keeps its bits, and is not sent. Where
        nobody has seen data, all go back to `start`. Ranks whose buffers are not finite do not count, and are returned.
        """
        buffers = self._current()
        if not buffers:
            return []
        changed = [not same(*pair) for pair in zip(buffers, self.start)]
        facts = [self.weight, int(self.is_finite()), *changed]
        rows = [row.tolist() for row in comm.all_gather(torch.tensor(facts, dtype=torch.int64))]
        weights = [row[0] if row[1] else 0 for row in rows]
        share = comm.size * weights[comm.rank] / sum(weights) if any(weights) else 0.0
        moved = [number for number, flags in enumerate(zip(*(row[2:] for row in rows))) if any(flags)]
        means = [buffer.clone() if share else start.clone() for buffer, start in zip(buffers, self.start)]
        floating = [number for number in moved if means[number].is_floating_point()]
        differences = [difference(means[number], self.start[number]) for number in floating]
        average_tensors(comm, differences, share)
        for number, mean in zip(floating, differences):
            means[number] = torch.where(mean == 0, self.start[number], base_of(self.start[number]) + mean)
        for number in sorted(set(moved) - set(floating)):
            comm.all_reduce(means[number], op="max")
        write(buffers, means)
        self.remember()
        return [rank for rank, row in enumerate(rows) if not row[1]]

    def start_again(self) -> None:
        """What this rank has seen is lost."""
        write(self._current(), self.start)
        self.weight = 0

    # ---- showing and saving -------------------------------------------------------------------------------

    def show(self) -> None:
        """The model holds what all ranks last had in common, until `hide`."""
        self._aside = self._read()
        write(self._current(), self.start)

    def hide(self) -> None:
        assert self._aside is not None
        write(self._current(), self._aside)
        self._aside = None

    def state_dict(self) -> dict[str, Any]:
        own = self._aside or self._current()
        return {"names": self._names, "start": self.start, "own": own, "weight": self.weight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """ValueError where it is of other buffers."""
        found, needed = (
            [(name, tuple(tensor.shape)) for name, tensor in zip(names, tensors)]
            for names, tensors in ((state["names"], state["start"]), (self._names, self.start))
        )
        if found != needed:
            raise ValueError(
                f"this state was saved with the buffers {found or 'of no model'}, and is loaded with "
                f"{needed or 'those of no model'}; give the same model=, or none, as before"
            )
        write(self.start, state["start"])
        write(self._current(), state["own"])
        self.weight = state["weight"]

    def _buffers(self) -> dict[str, Tensor]:
        return {} if self._model is None else dict(self._model.named_buffers())

    def _current(self) -> list[Tensor]:
        """The buffers as real numbers; views, in the order of their names."""
        buffers = self._buffers()
        present = [buffers[name].detach() for name in self._names]
        return [torch.view_as_real(each) if each.is_complex() else each for each in present]

    def _read(self) -> list[Tensor]:
        return [buffer.clone() for buffer in self._current()]


def same(buffer: Tensor, start: Tensor) -> bool:
    return not bool(difference(buffer, start).any())


def difference(buffer: Tensor, start: Tensor) -> Tensor:
    """buffer − start; 0 also where both are the same infinity, or no number. Of integers, where they differ."""
    if not buffer.is_floating_point():
        return buffer != start
    is_same = (buffer == start) | (buffer.isnan() & start.isnan())
    return (buffer - base_of(start)).masked_fill_(is_same, 0)


def base_of(start: Tensor) -> Tensor:
    """What differences are taken to: a running minimum starts at infinity."""
    return start.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def write(tensors: list[Tensor], values: list[Tensor]) -> None:
    """In place, and only where something changes: constants may lie in memory that cannot be written."""
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            if not torch.equal(tensor, value.to(tensor.device)):
                tensor.copy_(value)
