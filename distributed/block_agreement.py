"""What the ranks decide together at a block's end, from one small integer all-reduce."""
# N ranks, w a rank's weight in the block, W = Σ w over the ranks that are not left out, s = N·w/W

import math
import statistics
import struct
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

import torch

from teacherstudent.distributed.communicators import Communicator
from teacherstudent.distributed.gathering import gather_integers, gather_texts, raise_together
from teacherstudent.distributed.optimizers import scale_of

REQUESTS = ("stop", "checkpoint")
# Of a rank, worse from one to the next: why it is left out.
HEALTH = (
    "",
    "its model is not finite",
    "its optimizer's state is not finite",
    "its buffers are not finite",
)
PROBLEM = len(HEALTH)  # nobody can go on


@dataclass
class Tally:
    """What a rank has done in its block so far."""

    steps: int = 0
    weight: int = 0
    loss_sum: float = 0.0  # of the losses that were reported, each times its weight
    loss_weight: int = 0

    def add(self, weight: int, loss: float | None) -> None:
        """Count a step in which the rank has trained, with its loss where one was reported."""
        self.weight += weight
        if loss is not None:
            self.loss_sum += weight * loss
            self.loss_weight += weight

    def forfeit(self) -> None:
        """The rank starts again: its work so far is lost, the steps count."""
        self.weight = self.loss_weight = 0
        self.loss_sum = 0.0

    @property
    def loss(self) -> float:
        """The mean loss; NaN where none was reported."""
        return self.loss_sum / self.loss_weight if self.loss_weight else math.nan


@dataclass
class Report:
    """What a rank says of itself at a block's end."""

    tally: Tally = field(default_factory=Tally)
    health: int = 0  # index into HEALTH
    requests: Set[str] = frozenset()
    problem: str = ""  # to be an error on every rank


@dataclass(frozen=True)
class Verdict:
    """The outcome, the same on every rank."""

    shares: list[float]  # s of each rank; all 0 where nobody has trained
    left_out: dict[int, str]  # rank -> why its model is not in the average
    requests: frozenset[str]  # of any rank

    @property
    def has_trained(self) -> bool:
        return any(self.shares)


def agree(comm: Communicator, report: Report, outlier_factor: float | None) -> Verdict:
    """Decide whose models are averaged, and how much each counts. Collective.

    A rank whose model, state or buffers are not finite is left out. So, with an `outlier_factor`, is one whose mean
    loss is not finite or more than that factor times the median (the lower one of two) of the ranks that have trained.

    Raises on every rank: ValueError where a rank reports a problem, where ranks meet at different steps, or one has
    trained without reporting its loss; FloatingPointError where ranks are left out and nobody else has trained.
    """
    tally, health = report.tally, PROBLEM if report.problem else report.health
    flags = [int(name in report.requests) for name in REQUESTS]
    loss_bits = struct.unpack("<q", struct.pack("<d", tally.loss))[0]
    row = [tally.steps, tally.weight, health, int(tally.loss_weight > 0), loss_bits, *flags]
    steps, weights, states, has_loss, bits, *asked = zip(*gather_integers(comm, row))
    if PROBLEM in states:
        raise_together(comm, report.problem)
    check_steps(steps, comm.member)
    left_out = {rank: HEALTH[state] for rank, state in enumerate(states) if state}
    if outlier_factor is not None:
        trained = [rank for rank, weight in enumerate(weights) if weight and rank not in left_out]
        check_losses([rank for rank in trained if not has_loss[rank]], comm.member)
        losses = {rank: struct.unpack("<d", struct.pack("<q", bits[rank]))[0] for rank in trained}
        left_out |= find_outliers(losses, outlier_factor)
    kept = [0 if rank in left_out else weight for rank, weight in enumerate(weights)]
    total = sum(kept)
    if left_out and not total:
        reasons = "; ".join(f"{comm.member} {rank}: {reason}" for rank, reason in sorted(left_out.items()))
        raise FloatingPointError(
            f"nothing of this block can be used ({reasons}): training has diverged. Lower the learning rate, and go "
            "on from the last checkpoint"
        )
    shares = [scale_of(weight, total, comm.size) if total else 0.0 for weight in kept]
    return Verdict(shares, left_out, frozenset(name for name, flags in zip(REQUESTS, asked) if any(flags)))


def pool(comm: Communicator, report: Report) -> Report:
    """That of all ranks of `comm` together, which have taken the same steps. Collective."""
    tally = report.tally
    row = [
        tally.weight, tally.loss_sum, tally.loss_weight, PROBLEM if report.problem else report.health,
        *(name in report.requests for name in REQUESTS),
    ]  # fmt: skip
    rows = [part.tolist() for part in comm.all_gather(torch.tensor(row, dtype=torch.float64))]
    weights, loss_sums, loss_weights, states, *flags = zip(*rows)
    health, problem = int(max(states)), ""
    if health == PROBLEM:
        found = gather_texts(comm, report.problem)
        named = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text]
        problem = found[0] if len(set(found)) == 1 else "; ".join(named)
    asked = {name for name, column in zip(REQUESTS, flags) if any(column)}
    pooled = Tally(tally.steps, int(sum(weights)), sum(loss_sums), int(sum(loss_weights)))
    return Report(pooled, health, asked, problem)


def check_request(call: str, what: str) -> None:
    if what not in REQUESTS:
        raise ValueError(f"{call}({what!r}): choose one of {REQUESTS}")


def find_outliers(losses: dict[int, float], factor: float) -> dict[int, str]:
    """rank -> reason, for the losses of the ranks that have trained."""
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    median = statistics.median_low(finite) if finite else math.nan
    return {
        rank: f"its loss is {loss:.4g}, the median {median:.4g}"
        for rank, loss in losses.items()
        if not (
            math.isfinite(loss) and (loss <= factor * median or median == 0)
        )  # of 0 no loss is a multiple
    }


def check_steps(steps: Sequence[int], member: str) -> None:
    if len(set(steps)) > 1:
        raise ValueError(
            f"the {member}s meet at different steps of their blocks: {dict(enumerate(steps))}. Every rank must call "
            "step and synchronize equally often; a rank without data calls step(weight=0)"
        )


def check_losses(silent: list[int], member: str) -> None:
    if silent:
        raise ValueError(
            f"outlier_factor is set, but {member} {', '.join(map(str, silent))} has reported no loss in this block; "
            "call optimizer.report_loss(loss) before each step, or leave outlier_factor out"
        )
