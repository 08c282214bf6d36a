"""Exchange while backward still runs: a bucket leaves when its gradients and those of all buckets before it are there.

Nothing is decided until step(): what a residual would become is kept where the gradient was, which nobody needs
between the hook and the step. If all ranks' gradients turn out finite it becomes the residual; if not it is dropped.
"""
# N ranks, w weight of a rank's step, W = Σ w, S scale of a GradScaler

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teacherstudent.distributed.exchange import Exchange, Fired
from teacherstudent.distributed.flat import Bucket, Piece
from teacherstudent.distributed.gathering import raise_together
from teacherstudent.distributed.optimizers import Agreement, scale_of
from teacherstudent.distributed.step_problems import SPARSE, check_weight, is_dense


@dataclass
class Announced:
    """What begin_step() has settled for the step to come."""

    weight: int
    total_weight: int  # W
    scale: float  # S
    rates: list[float]
    leaves_early: bool  # whether buckets leave during backward, or all of them in step()


class Departure(NamedTuple):
    """A bucket that has left, and for each of its parameters what the residual will be if the step is taken."""

    fired: Fired
    residuals: list[Tensor]
    exchange: Exchange


class Overlap:
    """What a GTC does between begin_step() and step()."""

    def __init__(self, gtc: Any) -> None:  # the GTC, which cannot be imported here
        self._gtc = gtc
        self._announced: Announced | None = None
        self._departures: list[Departure] = []
        self._num_awaited: list[int] = []  # gradients, for each bucket
        self._present: list[bool] = []  # for each parameter, whether it had a gradient when it left
        self._finite = True
        self._versions: dict[Tensor, tuple[Tensor | None, int]] = {}  # gradients as the hooks left them
        reference = weakref.ref(self)  # a model must not keep alive the optimisers it once had
        for number, bucket in enumerate(gtc._buckets):
            for piece in bucket.pieces:
                watch(piece.parameter, reference, number)

    @property
    def is_announced(self) -> bool:
        """Whether a step has begun and not been taken."""
        return self._announced is not None

    @property
    def has_unscaled(self) -> bool:
        """Whether gradients leave during backward in this step, and without the scale of a GradScaler."""
        return self._announced is not None and self._announced.leaves_early

    def begin(self, weight: int, scaler: torch.amp.GradScaler | None) -> None:
        gtc = self._gtc
        if self._announced is not None:
            raise ValueError(
                "begin_step() came twice in a row; every begin_step() needs its backward() and step(), or after an "
                "exception abandon_step() on every rank"
            )
        problem = gtc._find_problem(weight)
        weight = 0 if problem else check_weight(weight)
        facts = torch.tensor([weight, int(bool(problem))])
        with gtc._exchanging():
            total, num_problems = gtc.comm.all_reduce(facts).tolist()
            if num_problems:
                raise_together(gtc.comm, problem)
        gtc._counters["steps"] += 1
        self._announced = Announced(
            weight,
            total,
            scaler.get_scale() if scaler is not None else 1.0,
            gtc._rates(),
            leaves_early=total > 0 and gtc._controller.level is not None and not gtc._is_warming_up(),
        )
        self._departures, self._versions, self._finite = [], {}, True
        self._present = [False] * gtc._num_parameters
        self._num_awaited = [len(bucket.pieces) for bucket in gtc._buckets]

    def note_gradient(self, parameter: Tensor, number: int) -> None:
        """A gradient of bucket `number` is complete. Called by autograd, in its order, which may differ by rank."""
        if self._announced is None:
            return
        if parameter in self._versions:
            raise ValueError(
                "a second backward() came after begin_step(), when gradients of the first were on their way; to "
                "accumulate over several, call begin_step() before the last one"
            )
        self._note_version(parameter)
        self._num_awaited[number] -= 1
        while self._announced.leaves_early and self._next_is_complete():
            self._depart(self._announced)

    def agree(self, weight: int) -> Agreement | None:
        """What all ranks bring to this step; with buckets that leave early, after the last of them has left."""
        announced = self._announced
        if announced is None:
            raise ValueError(
                "step() came without begin_step(); with overlap=True call begin_step(weight=…) before backward()"
            )
        problem = self._find_problem(announced, weight)
        self._announced = None
        while announced.leaves_early and len(self._departures) < len(self._num_awaited):
            self._depart(announced)
        self._versions = {}  # which would keep the gradients alive
        if not announced.leaves_early:
            return self._gtc._agree(weight, problem)
        agreed = self._gtc._agree_on(weight, self._present, not self._finite, problem)
        if agreed is None:
            self._drop()
        return agreed

    def abandon(self) -> None:
        """Let what has not left leave empty, since other ranks wait for it, and forget the step."""
        announced, self._announced, self._versions = self._announced, None, {}
        if announced is None:
            raise ValueError("abandon_step() came without begin_step(); there is no step to abandon")
        for number in range(len(self._departures), len(self._num_awaited) if announced.leaves_early else 0):
            fired = self._gtc._fire_nothing(number)
            self._departures.append(Departure(fired, [], self._gtc._start(fired)))
        self._drop()
        self._gtc._counters["steps"] -= 1

    def commit(self) -> list[Exchange]:
        """Make the new residuals the residuals; the exchanges of this step, none if no bucket has left early."""
        departures, self._departures = self._departures, []
        for number, (fired, residuals, _) in enumerate(departures):
            rates = self._gtc._rates()
            for piece, residual in zip(self._gtc._buckets[number].pieces, residuals):
                if rates[piece.group]:
                    piece.of(self._gtc._residuals[number]).copy_(residual)
            self._gtc._note(fired)
        return [departure.exchange for departure in departures]

    def _next_is_complete(self) -> bool:
        number = len(self._departures)
        return number < len(self._num_awaited) and not self._num_awaited[number]

    @torch.no_grad()
    def _depart(self, announced: Announced) -> None:
        gtc, number = self._gtc, len(self._departures)
        bucket = gtc._buckets[number]
        for piece in bucket.pieces:
            gradient = piece.parameter.grad
            self._present[piece.index] = announced.weight > 0 and gradient is not None
            if gradient is not None and not is_dense(gradient):
                raise ValueError(SPARSE)
            if gradient is not None and announced.scale != 1.0:
                gradient.div_(announced.scale)
        self._finite = self._finite and (not announced.weight or gtc._is_finite(bucket))
        residuals = [hold_residual(piece, gtc._residuals[number].dtype) for piece in bucket.pieces]
        share = scale_of(announced.weight, announced.total_weight, gtc.comm.size)
        fired = gtc._fire(number, share, residuals) if self._finite else gtc._fire_nothing(number)
        self._departures.append(Departure(fired, residuals, gtc._start(fired)))
        for piece in bucket.pieces:
            self._note_version(piece.parameter)

    def _drop(self) -> None:
        """Forget what the residuals would have become, and the gradients with it."""
        for departure in self._departures:
            self._gtc._receive(departure.exchange)  # since all ranks have sent it
        for bucket in self._gtc._buckets:
            for piece in bucket.pieces:
                piece.parameter.grad = None
        self._departures = []

    def _find_problem(self, announced: Announced, weight: int) -> str:
        if weight != announced.weight:
            return f"begin_step() has weight={announced.weight}, and step() has weight={weight}; give both the same"
        if self._gtc._rates() != announced.rates:
            return (
                "the learning rate changed between begin_step() and step(); let schedulers step after step()"
            )
        if not announced.leaves_early:
            return ""
        scale = getattr(self._gtc, "grad_scale", None)  # set by GradScaler while it calls step()
        if (1.0 if scale is None else float(scale)) != announced.scale:
            return (
                f"begin_step() had a loss scale of {announced.scale}, and step() has {scale}; give the GradScaler to "
                "begin_step(scaler=…), and leave unscaling to step()"
            )
        if any(map(self._has_changed, self._versions)):
            return (
                "gradients changed between backward() and step(), as by clipping; with overlap=True they have left by "
                "then: leave them alone, or use overlap=False"
            )
        return ""

    def _note_version(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        self._versions[parameter] = (gradient, 0 if gradient is None else gradient._version)

    def _has_changed(self, parameter: Tensor) -> bool:
        gradient, version = self._versions[parameter]
        return parameter.grad is not gradient or (gradient is not None and gradient._version != version)


def watch(parameter: Tensor, overlap: "weakref.ref[Overlap]", number: int) -> None:
    def note(parameter: Tensor) -> None:
        alive = overlap()
        if alive is not None:
            alive.note_gradient(parameter, number)

    parameter.register_post_accumulate_grad_hook(note)


def hold_residual(piece: Piece, dtype: torch.dtype) -> Tensor:
    """The gradient of a parameter, to be overwritten by its residual: itself where it has the residual's dtype."""
    gradient = piece.parameter.grad
    if gradient is None:
        return torch.zeros_like(piece.parameter, dtype=dtype)
    return gradient.to(dtype)


def cut_buckets(buckets: Iterable[Bucket], bucket_bytes: int) -> list[Bucket]:
    """Buckets of at most so many bytes, or of one parameter, in the order in which backward brings the gradients.

    That is the reverse order of the parameters, for most models, and the same on all ranks in any case.
    """
    cut: list[Bucket] = []
    for bucket in buckets:
        element_bytes = torch.empty((), dtype=bucket.dtype).element_size()
        members: list[Piece] = []
        for piece in reversed(bucket.pieces):
            stop = members[-1].stop if members else 0
            size = piece.stop - piece.start
            if members and (stop + size) * element_bytes > bucket_bytes:
                cut.append(Bucket(members, bucket.dtype, bucket.device))
                members, stop = [], 0
            members.append(Piece(piece.parameter, piece.group, stop, stop + size, piece.index))
        cut.append(Bucket(members, bucket.dtype, bucket.device))
    return sorted(cut, key=lambda bucket: -bucket.pieces[0].index)
