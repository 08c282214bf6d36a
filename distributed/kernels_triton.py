"""GTC's passes over memory as a Triton kernel, for float32 residuals on CUDA: see kernels.py.

One launch a part reads r and g and writes r. Each program compacts the quanta of its block and reserves their place
in a common buffer by an atomic addition, so that they arrive in any order; sorting these few makes it the rising one.
Blocks that found the buffer full leave their elements as they are and are gone through again with enough room.

`apply` is plain torch: it clears the gradients at full bandwidth, and all the rest touches only what was sent.
"""
# K elements that send, r residual, g gradient, held: where r stays, τ threshold

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from teacherstudent.distributed.kernels import Part
from teacherstudent.distributed.kernels_torch import apply as apply

BLOCK = 4096  # elements of one program
# Room for quanta: a share of the elements, as few as sending 1 % of them needs.
BUFFER_SHARE, LEAST_BUFFER = 2**-6, 2**10


def fire(
    residual: Tensor, parts: Sequence[Part], threshold: float, share: float, most: int, commit: bool
) -> tuple[Tensor, Tensor]:
    launches = [_Launch(residual[part.start : part.stop], part, share, commit) for part in parts]
    room = max(LEAST_BUFFER, int(sum(part.stop - part.start for part in parts) * BUFFER_SHARE))
    sent = _Buffer(room, residual.device)
    for launch in launches:
        launch.run(sent, threshold, most, again=False)
    num_firing, num_sent = sent.lengths.tolist()
    chunks = [sent.chunk(num_sent)]
    if num_sent < num_firing:
        rest = _Buffer(num_firing - num_sent, residual.device)
        for launch in launches:
            launch.run(rest, threshold, most, again=True)
        chunks.append(rest.chunk(num_firing - num_sent))
    for launch in launches:
        launch.write_back()
    indices, order = torch.cat([indices for indices, _ in chunks]).sort()
    counts = torch.cat([counts for _, counts in chunks])[order]
    return indices.to(torch.int64), counts.to(torch.int64)


class _Buffer:
    """Quanta in the order of their arrival; how many wanted a place, and how many got one."""

    def __init__(self, room: int, device: torch.device) -> None:
        self.room = room
        self.indices, self.counts = torch.empty(2, room, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(2, dtype=torch.int32, device=device)

    def chunk(self, length: int) -> tuple[Tensor, Tensor]:
        return self.indices[:length], self.counts[:length]


class _Launch:
    """What the kernel needs of one part."""

    def __init__(self, residual: Tensor, part: Part, share: float, commit: bool) -> None:
        self._residual, self._part, self._commit = residual, part, commit
        self._gradient = residual if part.gradient is None else part.gradient.detach().reshape(-1)
        self._held = residual if commit else self._gradient
        self._adds = part.gradient is not None and share != 0
        self._scale = part.rate * share
        self._blocks = triton.cdiv(part.stop - part.start, BLOCK)
        self._waits = torch.empty(self._blocks, dtype=torch.int32, device=residual.device)

    def run(self, sent: _Buffer, threshold: float, most: int, again: bool) -> None:
        residual = self._held if again else self._residual
        # The context makes the residual's GPU the one that the kernel runs on.
        with torch.cuda.device(residual.device if residual.is_cuda else -1):
            _fire[(self._blocks,)](
                self._held, residual, self._gradient, self._waits, sent.indices, sent.counts, sent.lengths,
                sent.room, self._part.start, len(residual), self._scale, threshold, float(most),
                ADDS=self._adds and not again, AGAIN=again, SIZE=BLOCK, num_warps=8, enable_fp_fusion=False,
            )  # fmt: skip

    def write_back(self) -> None:
        """Where the gradients were to be overwritten, and are not contiguous, a copy was."""
        gradient = self._part.gradient
        if not self._commit and gradient is not None and self._held.data_ptr() != gradient.data_ptr():
            gradient.copy_(self._held.view_as(gradient))


@triton.jit(do_not_specialize=["room", "first", "size"])
def _fire(  # type: ignore[no-untyped-def]
    held, residual, gradient, waits, indices, counts, lengths, room, first, size, scale, threshold, most,
    ADDS: tl.constexpr, AGAIN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    places = block.to(tl.int64) * SIZE + tl.arange(0, SIZE)
    within = places < (tl.load(waits + block) * size if AGAIN else size)
    value = tl.load(residual + places, mask=within, other=0.0)
    if ADDS:
        value = value + tl.load(gradient + places, mask=within, other=0.0).to(tl.float32) * scale
    magnitude = tl.abs(value)
    fires = within & (magnitude >= threshold)
    length = tl.sum(fires.to(tl.int32))
    begin = tl.atomic_add(lengths, length)
    fits = begin + length <= room
    tl.atomic_add(lengths + 1, tl.where(fits, length, 0))
    fires = fires & (places < tl.where(fits, size, 0))
    count = tl.minimum(tl.floor(tl.div_rn(magnitude, tl.full((SIZE,), threshold, tl.float32))), most)
    count = tl.where(value < 0.0, -count, count)
    tl.store(held + places, tl.where(fires, value - count * threshold, value), mask=within)
    place = begin + tl.cumsum(fires.to(tl.int32)) - 1
    tl.store(indices + place, (first + places).to(tl.int32), mask=fires)
    tl.store(counts + place, count.to(tl.int32), mask=fires)
    tl.store(waits + block, tl.where(fits, 0, 1))
