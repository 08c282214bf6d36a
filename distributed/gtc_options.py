"""The options of gradient threshold compression, and what may be wrong with them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from teacherstudent.distributed.codec import CODECS
from teacherstudent.distributed.thresholds import HIGHEST_THRESHOLD, LOWEST_THRESHOLD, RAMP_DENSITY

DEFAULT_DENSITY = 1e-3
DEFAULT_BUCKET_BYTES = 25 * 2**20
# A capacity nearer to the density would hide from the controller how much more there is to send.
CAPACITY_PER_DENSITY = 1.5


@dataclass(frozen=True)
class GTCOptions:
    """As GTC takes them; its docstring says what they mean."""

    density: float | None
    threshold: float | None
    multi_quantum: bool
    codec: str
    capacity: float | None
    ramp_steps: int
    warmup_steps: int
    momentum: float
    momentum_masking: bool
    clip_norm: float | None
    overlap: bool
    bucket_bytes: int | None
    delay: bool

    @property
    def most_bucket_bytes(self) -> int | None:
        """None for one bucket, however large."""
        return DEFAULT_BUCKET_BYTES if self.overlap and self.bucket_bytes is None else self.bucket_bytes

    @property
    def target_density(self) -> float:
        """The density that is held in the end."""
        return DEFAULT_DENSITY if self.density is None else self.density

    def find_problems(self, param_groups: list[dict[str, Any]]) -> list[str]:
        """Sentences that say what was got and what is needed, for an inner optimiser with these groups."""
        problems = [*self._threshold_problems(), *self._ramp_problems(), *self._capacity_problems()]
        problems += self._overlap_problems()
        if self.codec not in CODECS:
            problems.append(f"codec is {self.codec!r}; choose one of {', '.join(CODECS)}")
        if not is_count(self.warmup_steps):
            problems.append(f"warmup_steps is {self.warmup_steps!r}; give a number of steps ≥ 0")
        if not 0 <= self.momentum < 1:
            problems.append(f"momentum is {self.momentum!r}; give a number from 0 to below 1, such as 0.9")
        if self.clip_norm is not None and not 0 < self.clip_norm < float("inf"):
            problems.append(f"clip_norm is {self.clip_norm!r}; give the largest norm of a gradient, above 0")
        if any("lr" not in group for group in param_groups):
            problems.append("GTC needs an optimizer whose parameter groups have a learning rate 'lr'")
        if self.momentum and has_momentum(param_groups):
            problems.append(MOMENTUM_TWICE.format(self.momentum))
        return problems

    def _overlap_problems(self) -> Iterator[str]:
        if self.bucket_bytes is not None and not (is_count(self.bucket_bytes) and self.bucket_bytes):
            yield f"bucket_bytes is {self.bucket_bytes!r}; give a number of bytes, such as {DEFAULT_BUCKET_BYTES}"
        if self.overlap and self.clip_norm is not None:
            yield (
                f"clip_norm={self.clip_norm!r} needs all gradients before the first is sent; use overlap=False with it"
            )
        if self.overlap and self.momentum:
            yield (
                f"momentum={self.momentum!r} changes velocities, which cannot be undone where a later bucket is not "
                "finite; use overlap=False with it, or momentum in the inner optimizer"
            )

    def _threshold_problems(self) -> Iterator[str]:
        if self.density is not None and self.threshold is not None:
            yield "give density or threshold, not both"
        if self.density is not None and not 0 < self.density < 1:
            yield f"density is {self.density!r}; give a share of elements between 0 and 1, such as 1e-3"
        if self.threshold is not None and not LOWEST_THRESHOLD <= self.threshold <= HIGHEST_THRESHOLD:
            yield f"threshold is {self.threshold!r}; give a positive number in update units (lr times gradient)"

    def _ramp_problems(self) -> Iterator[str]:
        if not is_count(self.ramp_steps):
            yield f"ramp_steps is {self.ramp_steps!r}; give a number of steps ≥ 0"
        elif self.ramp_steps and self.threshold is not None:
            yield "ramp_steps lowers the density step by step; give a density with it, not a threshold"
        elif self.ramp_steps and not self.target_density < RAMP_DENSITY:
            yield (
                f"ramp_steps goes down from a density of {RAMP_DENSITY} to {self.target_density!r}, which is not "
                "below; give a lower density, or no ramp_steps"
            )

    def _capacity_problems(self) -> Iterator[str]:
        if self.capacity is None:
            return
        highest = RAMP_DENSITY if self.ramp_steps else self.target_density
        if not 0 < self.capacity < 1:
            yield f"capacity is {self.capacity!r}; give a share of elements between 0 and 1, or None for no limit"
        elif self.threshold is None and self.capacity < CAPACITY_PER_DENSITY * highest:
            yield (
                f"capacity is {self.capacity!r}, too near to the density to hold ({highest!r}); give at least "
                f"{CAPACITY_PER_DENSITY} times that density"
            )


MOMENTUM_TWICE = (
    "momentum={} corrects the momentum on every worker, but the inner optimizer has momentum of its own, which would "
    "count it twice; give it none, as in SGD(…, momentum=0), or leave momentum out of GTC"
)


def has_momentum(param_groups: list[dict[str, Any]]) -> bool:
    """Whether an optimiser averages gradients over steps itself, as far as its groups show."""
    return any(group.get("momentum") or group.get("betas", (0,))[0] for group in param_groups)


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
