"""The two passes over memory of gradient threshold compression: firing quanta, and applying what arrived.

    fire      r ← fl(r + fl(lr·s·g)); where |r| ≥ τ: send count = min(⌊|r|/τ⌋, most), signed, and keep r ∓ count·τ
    put_back  the inverse, for quanta that may not travel this time
    apply     gradient ← fl(τ·c)/N/lr, with c the sum of all ranks' counts

Three variants give the same bits in the same order: numba (CPU), triton (CUDA, float32) and plain torch (anything
else, or where those are missing). None fuses a multiplication with an addition, or divides by a reciprocal: both
would round differently.
"""
# n elements of a bucket, K elements that send, N ranks, r residual, g gradient, s share, c sum of counts, τ threshold

import functools
import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from teacherstudent.distributed.codec import Quanta


class Part(NamedTuple):
    """One parameter's place in its bucket, its gradient (any shape and strides) and its learning rate."""

    start: int
    stop: int
    gradient: Tensor | None
    rate: float  # where it is 0 the residual neither grows nor sends


def fire(
    residual: Tensor,
    parts: Sequence[Part],
    threshold: float,
    *,
    share: float = 1.0,
    most: int = 1,
    commit: bool = True,
) -> Quanta:
    """Add the gradients of `parts` to the residual, and take out the quanta that have grown past the threshold.

    residual  (n), float32 or float64; changed in place to r ∓ count·τ, which is exact while |r| < 2²⁰·τ.
    parts     by rising place. One without a gradient, or any at share 0, adds nothing and sends what it holds.
    threshold τ = m·2^e with a whole 8 ≤ m < 16; where it is infinite the residual grows and nothing is sent.
    share     s; lr·s is rounded once, to the residual's dtype.
    most      how many quanta an element may send at once, 2²⁰ at most. All multiples of τ up to there are numbers of
              float32, so that no quotient |r|/τ below a whole one is rounded up to it.
    commit    False leaves the residual as it is and writes what it would become over the gradients. Every part with
              a rate then needs a gradient of the residual's dtype.
    """
    active = [part for part in parts if part.rate and part.start < part.stop]
    gradients = [part.gradient for part in active]
    assert commit or all(gradient is not None and gradient.dtype == residual.dtype for gradient in gradients)
    indices, counts = _variant(residual).fire(residual, active, threshold, share, most, commit)
    return Quanta(indices, counts)


def put_back(
    residual: Tensor, quanta: Quanta, threshold: float, uncommitted: Sequence[Part] | None = None
) -> None:
    """Undo `fire` for some or all of the quanta it returned: r ± count·τ, exact where `fire` was.

    uncommitted  after fire(commit=False), the parts whose gradients hold r.
    """
    taken = quanta.counts.to(residual.dtype) * threshold
    if uncommitted is None:
        residual[quanta.indices] += taken
        return
    for part, (begin, end) in zip(uncommitted, spans(uncommitted, quanta.indices)):
        if begin < end:
            assert part.gradient is not None
            held = part.gradient.reshape(-1)
            held[quanta.indices[begin:end] - part.start] += taken[begin:end]
            if not part.gradient.is_contiguous():  # then `held` is a copy
                part.gradient.copy_(held.view_as(part.gradient))


def apply(
    parts: Sequence[Part], received: Sequence[Quanta], threshold: float, num_ranks: int, dtype: torch.dtype
) -> None:
    """Overwrite the gradients of `parts` with fl(τ·c)/N/lr, every operation rounded in `dtype`, the residual's.

    parts     by rising place, each with a gradient and a rate. Quanta outside them are left out.
    received  the quanta of all N ranks, or none, which clears the gradients. They are counted in the gradients
              themselves, exactly in any order, since |c| ≤ 2²⁰; a gradient of another dtype costs a temporary of its
              own size.
    """
    present = [part for part in parts if part.start < part.stop]
    if present:
        assert present[0].gradient is not None
        _variant(present[0].gradient.new_empty(0, dtype=dtype)).apply(
            present, received, threshold, num_ranks, dtype
        )


def spans(parts: Sequence[Part], indices: Tensor) -> list[tuple[int, int]]:
    """Where the places of each part begin and end in rising `indices` (K)."""
    places = [place for part in parts for place in (part.start, part.stop)]
    bounds = torch.tensor(places, device=indices.device)
    found = torch.searchsorted(indices.contiguous(), bounds).tolist()
    return list(zip(found[::2], found[1::2]))


def compile_for(device: torch.device, dtype: torch.dtype) -> None:
    """Compile, or load from a cache, what residuals of this kind need: seconds that no step should take."""
    residual = torch.zeros(1, dtype=dtype, device=device)
    part = Part(0, 1, torch.ones_like(residual), 1.0)
    apply([part], [fire(residual, [part], 1.0)], 1.0, 1, dtype)


def _variant(residual: Tensor) -> ModuleType:
    if residual.device.type == "cpu" and residual.dtype in (torch.float32, torch.float64):
        return _load("numba")
    if residual.device.type == "cuda" and residual.dtype == torch.float32:
        return _load("triton")
    return _load("torch")


@functools.cache
def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(f"teacherstudent.distributed.kernels_{name}")
    except (ImportError, RuntimeError) as error:  # the latter where numba finds no folder for its cache
        warnings.warn(
            f"GTC's compiled kernels cannot be used ({error}): it goes on in plain torch with the same results, but "
            f"takes about 10 times as long to encode; install {name}",
            stacklevel=2,
        )
        return _load("torch")
