"""What the distributed optimisers share: wrapping a torch optimiser, agreeing on a step, skipping together."""

import contextlib
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.exchange import checksum_rates
from teacherstudent.distributed.flat import (
    Bucket,
    all_pieces,
    describe,
    describe_groups,
    hash_tensors,
    make_buckets,
    max_magnitude,
)
from teacherstudent.distributed.gathering import gather_texts, raise_together
from teacherstudent.distributed.grad_scaler import tell_scaler
from teacherstudent.distributed.step_problems import check_weight, find_problem
from teacherstudent.distributed.untrained import Untrained

INITIAL_WEIGHTS = ("broadcast", "check")
# Where state_dict() keeps what the inner optimiser knows nothing of.
STATE_KEY = "distributed"
# Ranks with a problem and ranks with a gradient that is not finite are counted in one integer.
PROBLEM = 2**32


@dataclass(frozen=True)
class Agreement:
    """What all ranks know of a step that is taken."""

    total_weight: int  # W
    present: list[bool]  # for each parameter, whether any rank has a gradient


class DistributedOptimizer(torch.optim.Optimizer):
    """A torch optimiser that trains together with the other ranks of `comm`.

    It wraps the caller's optimiser and shares its `param_groups` and `state`, so that schedulers, hooks and
    GradScaler work on it as on any other. Learning rates may change between any two steps, on all ranks alike.

    All parameters that are ever to be trained must require a gradient when it is constructed. They may be frozen
    later.

    The constructor is collective. It compares settings, shapes, dtypes and parameter groups between the ranks, and
    makes the initial weights equal (initial_weights="broadcast", from rank 0) or demands that they are ("check"); the
    weights are verified by hash either way. What is wrong on any rank is a ValueError on every rank.

    An optimiser sees parameters only. Given the whole `model`, its buffers, as the statistics of BatchNorm, and its
    frozen parameters are made equal and verified as well, and `synchronize` brings the buffers together again: floating
    ones become their mean by the data that each rank has seen since, others the largest of any rank. The state holds
    the buffers then. Without a model they are left to the caller.
    """

    # GradScaler then always calls step() and leaves unscaling and skipping to it: had one rank alone skipped, the
    # others would wait for it.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        comm: Communicator,
        settings: Mapping[str, object],
        problems: list[str],
        initial_weights: str,
        model: torch.nn.Module | None = None,
    ) -> None:
        self._constructed = False
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner
        self.comm = comm
        self._share()
        self._buckets = make_buckets(inner.param_groups)
        self._untrained = Untrained(model, inner.param_groups)
        self._num_parameters = sum(1 for _ in all_pieces(self._buckets))
        self._counters: dict[str, float] = dict.fromkeys(
            ("steps", "skipped_nonfinite", "skipped_empty", "bytes_sent"), 0
        )
        self._problem = ""  # of the step at hand
        self._seconds_in_exchange = 0.0  # no part of the state, which is the same for the same training
        if not any(bucket.num_elements for bucket in self._buckets):
            problems = [*problems, "the optimizer has no parameter that requires a gradient"]
        if initial_weights not in INITIAL_WEIGHTS:
            problems = [*problems, f"initial_weights is {initial_weights!r}; choose one of {INITIAL_WEIGHTS}"]
        problems = [*problems, *self._untrained.find_problems(model, self._buckets)]
        with self._exchanging():
            self._compare_ranks(settings, problems)
            self._equalise_weights(initial_weights)
        self._constructed = True

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} cannot be copied or pickled, since it holds a communicator; save its state_dict(), "
            "and load it into another one"
        )

    # ---- surface ------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None, *, weight: int = 1) -> Any:
        """Take one step together with all other ranks.

        weight  how much data this rank's gradient is the mean of, such as its number of frames: an integer ≥ 0.
                0 takes part and adds nothing. Where all ranks give 0 nothing is updated.

        A gradient that is not finite makes all ranks that exchange gradients skip the step (with BMUF its rank alone,
        with TwoTier its group), which metrics() of these ranks count. Under a
        GradScaler the gradients are unscaled here, and it is told what all ranks found, so that scales stay equal.

        What is wrong on any rank, such as its weight, is a ValueError on every rank that takes part in this step;
        with BMUF, on every rank at the block's end.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.param_groups is not self.inner.param_groups:
            raise RuntimeError("a state was loaded into the inner optimizer; load it into this one instead")
        self._problem = self._find_problem(weight)
        weight = 0 if self._problem else check_weight(weight)
        self._untrained.weight += weight
        with torch.no_grad():
            self._unscale()
            self._take_step(weight)
        return loss

    def synchronize(self) -> None:
        """Bring all ranks to the common model. Collective; nothing to do without a `model` that has buffers, unless a
        subclass says otherwise."""
        self._average_buffers()

    @contextlib.contextmanager
    def global_weights(self) -> Iterator[None]:
        """Inside the `with` block the model holds the weights to evaluate and export."""
        yield

    def metrics(self) -> dict[str, float]:
        """Counts of the training so far: steps, skipped steps, bytes sent; seconds in exchange of this process."""
        return {**self._counters, "seconds_in_exchange": self._seconds_in_exchange}

    def state_dict(self) -> dict[str, Any]:
        """The inner optimiser's state_dict, and under "distributed" all that is hidden. Every rank has its own.

        As in torch the tensors are the live ones: save them, or copy them, before the next step.
        """
        hidden = {
            "kind": type(self).__name__,
            "size": self.comm.size,
            "rank": self.comm.rank,
            "counters": dict(self._counters),
            "buffers": self._untrained.state_dict(),
            **self._hidden_state(),
        }
        return {**self.inner.state_dict(), STATE_KEY: hidden}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state_dict of the same rank."""
        hidden = state_dict.get(STATE_KEY, {})
        if hidden.get("kind") != type(self).__name__:
            raise ValueError(
                f"this state was saved by {hidden.get('kind', 'a plain optimizer')}, not by {type(self).__name__}; "
                "load it into the optimizer it came from"
            )
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != STATE_KEY})
        self._share()
        self._counters.update(hidden["counters"])
        self._untrained.load_state_dict(hidden["buffers"])
        self._load_hidden_state(hidden)

    def ranks_to_load(self, saved_size: int) -> list[int]:
        """Whose states this rank needs of a training that `saved_size` workers saved; its own if there are as many."""
        return [self.comm.rank % saved_size]

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the states of `ranks_to_load`, with as many workers as saved them or another number."""
        (state,) = states
        self.load_state_dict(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._constructed:
            raise ValueError(
                f"{type(self).__name__} lays its parameters out once; add the group to the inner optimizer before "
                "constructing it"
            )
        super().add_param_group(param_group)

    # ---- what a method provides -----------------------------------------------------------------------------

    @abstractmethod
    def _take_step(self, weight: int) -> None:
        """One step with the gradients at hand, already unscaled."""

    def _hidden_state(self) -> dict[str, Any]:
        return {}

    def _load_hidden_state(self, hidden: dict[str, Any]) -> None:
        return None

    def _largest_factor(self) -> float:
        """What a gradient may be multiplied with: a rank that has all the weight has the share N."""
        return self.comm.size

    def _largest_update(self, bucket: Bucket) -> float:
        """What a gradient may be after that multiplication; above it the step is skipped."""
        return torch.finfo(bucket.dtype).max

    def _find_problem(self, weight: Any) -> str:
        """What is wrong on this rank, to be an error on all ranks; empty if nothing is."""
        return find_problem(weight, self.param_groups, self._buckets, type(self).__name__)

    # ---- shared parts -----------------------------------------------------------------------------------------

    def _agree(self, weight: int, problem: str = "") -> "Agreement | None":
        """What all ranks bring to this step, by one small integer all-reduce. None: all of them skip it."""
        present = [False] * self._num_parameters
        for piece in all_pieces(self._buckets):
            present[piece.index] = weight > 0 and piece.parameter.grad is not None
        nonfinite = weight > 0 and not self._gradients_are_finite()
        return self._agree_on(weight, present, nonfinite, problem)

    def _agree_on(
        self, weight: int, present: list[bool], nonfinite: bool, problem: str, *, steps: bool = True
    ) -> "Agreement | None":
        """present: for each parameter, whether this rank has a gradient. A `problem` is a ValueError on every rank.

        steps: whether this rank is in `step`, and not in `synchronize`.
        """
        problem = self._problem or problem
        troubles = int(nonfinite) + (PROBLEM if problem else 0)
        rates = checksum_rates(self._rates()) % 2**16
        facts = torch.tensor([weight, troubles, present.count(False), rates, rates**2, int(steps)])
        with self._exchanging():
            self.comm.all_reduce(facts)
            total, troubles, num_absent, rates, squares, num_stepping = facts.tolist()
            if num_stepping not in (0, self.comm.size):
                raise ValueError(
                    f"{num_stepping} of {self.comm.size} ranks have called step, the others synchronize: every rank "
                    "must call both equally often; a rank without data calls step(weight=0)"
                )
            if not num_stepping:
                return None
            num_problems, num_nonfinite = divmod(troubles, PROBLEM)
            if num_problems:
                raise_together(self.comm, problem)
            if self.comm.size * squares != rates**2:  # equal only where all are
                raise_together(self.comm, f"the ranks differ in learning rate: here it is {self._rates()}")
            if num_absent and total and not num_nonfinite:
                anywhere = self.comm.all_reduce(torch.tensor(present, dtype=torch.int64))
                present = [count > 0 for count in anywhere.tolist()]
        tell_scaler(self, bool(num_nonfinite), self.comm.device)
        if num_nonfinite:
            self._counters["skipped_nonfinite"] += 1
            return None
        if not total:
            self._counters["skipped_empty"] += 1
            return None
        return Agreement(total, present)

    def _agree_to_synchronize(self) -> None:
        """ValueError on every rank where others have come to `step`."""
        self._agree_on(0, [], nonfinite=False, problem="", steps=False)

    def _average(
        self, bucket: Bucket, gradients: Sequence[Tensor | None], share: float, present: list[bool]
    ) -> None:
        """Give the mean of all ranks' s·g, exchanged whole, to the inner optimiser; `gradients` for each piece.

        A parameter for which no rank has anything gets none.
        """
        dtype = next((gradient.dtype for gradient in gradients if gradient is not None), bucket.dtype)
        flat = bucket.new_zeros(dtype)
        if share:
            for piece, gradient in zip(bucket.pieces, gradients):
                if gradient is not None:
                    torch.mul(gradient, share, out=piece.of(flat))
        with self._exchanging():
            self.comm.all_reduce(flat)
        flat.div_(self.comm.size)
        for piece in bucket.pieces:
            mean = piece.of(flat)
            if present[piece.index] or bool(mean.any()):
                set_gradient(piece.parameter, mean)
            else:
                piece.parameter.grad = None

    def _gradients_are_finite(self) -> bool:
        return all(map(self._is_finite, self._buckets))

    def _is_finite(self, bucket: Bucket) -> bool:
        """Whether every gradient of a bucket, times the largest factor it can meet, is finite."""
        grads = [piece.parameter.grad for piece in bucket.pieces if piece.parameter.grad is not None]
        grads = [grad for grad in grads if grad.numel()]
        return not grads or max_magnitude(grads) * self._largest_factor() <= self._largest_update(bucket)

    def _rates(self) -> list[float]:
        """The learning rates of the parameter groups, as they are now."""
        return [float(group.get("lr", 0.0)) for group in self.param_groups]

    def _unscale(self) -> None:
        scale = getattr(self, "grad_scale", None)  # set by GradScaler while it calls step()
        if scale is None:
            return
        for piece in all_pieces(self._buckets):
            if piece.parameter.grad is not None:
                piece.parameter.grad.div_(scale.to(piece.parameter.device))

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Counts the bytes and seconds of what is exchanged inside."""
        bytes_before, start = self.comm.bytes_sent, time.perf_counter()
        try:
            yield
        finally:
            self._counters["bytes_sent"] += self.comm.bytes_sent - bytes_before
            self._seconds_in_exchange += time.perf_counter() - start

    @torch.no_grad()
    def _average_buffers(self) -> None:
        problem = self._untrained.find_problem()
        if any(gather_texts(self.comm, problem) if self._untrained.start else ()):
            raise_together(self.comm, problem)
        with self._exchanging():
            left_out = self._untrained.average(self.comm)
        for rank in left_out:
            self._counters["buffers_left_out"] = self._counters.get("buffers_left_out", 0) + 1
            warnings.warn(f"the buffers of rank {rank} are not finite: left out of their mean", stacklevel=3)

    def _share(self) -> None:
        self.param_groups = self.inner.param_groups
        self.state = self.inner.state
        self.defaults = self.inner.defaults

    def _compare_ranks(self, settings: Mapping[str, object], problems: list[str]) -> None:
        found = gather_texts(self.comm, "; ".join(problems))
        if any(found):
            raise_together(self.comm, "; ".join(problems))
        own = f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
        groups = describe_groups(self.param_groups)
        named = {"settings": own, "parameters": describe(self._buckets), "groups": groups}
        for what, text in (named | {"buffers": self._untrained.describe()}).items():
            texts = gather_texts(self.comm, text)
            differing = [rank for rank, other in enumerate(texts) if other != texts[0]]
            if differing:
                lines = zip_longest(
                    texts[0].splitlines(), texts[differing[0]].splitlines(), fillvalue="nothing"
                )
                first, other = next((first, other) for first, other in lines if first != other)
                raise ValueError(
                    f"the {what} differ between ranks: rank 0 has {first}, rank {differing[0]} has {other}; build the "
                    "same model and optimizer on every rank"
                )

    def _equalise_weights(self, initial_weights: str) -> None:
        if initial_weights == "broadcast":
            for bucket in self._buckets:
                bucket.write_parameters(self.comm.broadcast(bucket.read_parameters(), root=0))
            self._untrained.broadcast(self.comm)
        self._untrained.remember()
        trained = [piece.parameter for piece in all_pieces(self._buckets)]
        hashes = gather_texts(self.comm, hash_tensors([*trained, *self._untrained.tensors()]))
        differing = [rank for rank, other in enumerate(hashes) if other != hashes[0]]
        if differing:
            raise ValueError(
                f"the initial weights of rank {', '.join(map(str, differing))} differ from those of rank 0 (frozen "
                "parameters count, and the buffers of model=); build the model from the same seed or checkpoint on "
                "every rank, or use initial_weights='broadcast'"
            )


def scale_of(weight: int, total: int, size: int) -> float:
    """s = N·w/W: this rank's share of the mean, 1 when all weights are equal."""
    return size * weight / total


def set_gradient(parameter: Tensor, value: Tensor) -> None:
    """Write `value` into the gradient in place, where there is one."""
    if parameter.grad is None:
        parameter.grad = value.to(parameter.dtype, copy=True)
    else:
        parameter.grad.copy_(value)
