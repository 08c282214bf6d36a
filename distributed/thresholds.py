"""Thresholds of gradient threshold compression: which values they may take, and holding a density.

A threshold is m·2^e with an integer 8 ≤ m < 16, so that r − τ is exact in float32 while |r| < 2²⁰·τ, and a count
times τ is exact too. These values are numbered by `level`, eight to every power of two.
"""

import math
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

LEVELS_PER_OCTAVE = 8
MEAN_DENSITY_STEPS = 50
# Where a ramp begins: dense enough for the first steps of a training, which change most.
RAMP_DENSITY = 1e-2


def threshold_at(level: int) -> float:
    """m·2^e of a level."""
    octave, step = divmod(level, LEVELS_PER_OCTAVE)
    return math.ldexp(8 + step, octave)


def nearest_level(value: float) -> int:
    """The level whose threshold is nearest to a positive `value`."""
    exponent = math.frexp(value)[1] - 4  # value / 2^exponent lies in [8, 16)
    return exponent * LEVELS_PER_OCTAVE + round(math.ldexp(value, -exponent)) - 8


def move_to_level(threshold: float) -> int:
    """The level that a user's threshold gets, with a warning where that is not exactly it."""
    level = nearest_level(threshold)
    if threshold_at(level) != threshold:
        warnings.warn(
            f"threshold={threshold!r} is moved to {threshold_at(level)!r}, the nearest m·2^e with a whole 8 ≤ m < 16: "
            "subtracting it is exact",
            stacklevel=3,
        )
    return level


# Well inside float32, so that residuals and counts times τ are too.
LOWEST_THRESHOLD, HIGHEST_THRESHOLD = 2.0**-100, 2.0**100
LOWEST_LEVEL, HIGHEST_LEVEL = nearest_level(LOWEST_THRESHOLD), nearest_level(HIGHEST_THRESHOLD)


class FixedThreshold:
    """The same threshold for the whole training."""

    def __init__(self, level: int) -> None:
        self.level: int | None = level

    def update(self, density: float) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keeps the threshold that was asked for, and says so where the state was saved at another."""
        if state["level"] != self.level:
            assert self.level is not None
            saved = "none yet" if state["level"] is None else repr(threshold_at(state["level"]))
            warnings.warn(
                f"the threshold in this state is {saved}; training goes on with threshold="
                f"{threshold_at(self.level)!r}, as asked",
                stacklevel=4,
            )


class DensityController:
    """Moves the level so that the share of elements sent stays near a target.

    It sees only densities over all ranks, which every rank reads from the same messages, so that all ranks move
    alike. Raising the threshold silences elements for a while; lowering it releases at once all those that wait
    between the two thresholds, hence the smaller steps down. Where gradients are mostly noise the density goes as
    1/τ², which makes GAIN levels per octave of density a cautious half of what would be needed. Where nothing is
    left to send, the level stops at LOWEST_LEVEL.

    ramp_steps  over so many steps the target goes geometrically from RAMP_DENSITY down to `density`.
    """

    MEMORY_STEPS = 10
    PATIENCE_STEPS = 4
    TOLERANCE = 1.1
    GAIN = 2.0
    MAX_LEVELS_UP = 8
    MAX_LEVELS_DOWN = 2
    LARGEST_EXCESS = 2 ** (MAX_LEVELS_UP / GAIN)
    LOWEST_DENSITY = 1e-9

    def __init__(self, density: float, ramp_steps: int = 0) -> None:
        self.level: int | None = None  # until the first gradients have been seen
        self._density = density
        self._ramp_steps = ramp_steps
        self._num_steps = 0
        self._smoothed = self.target
        self._steps_since_move = 0

    @property
    def target(self) -> float:
        """The density to have in the next step."""
        if self._num_steps >= self._ramp_steps:
            return self._density
        return float(RAMP_DENSITY * (self._density / RAMP_DENSITY) ** (self._num_steps / self._ramp_steps))

    def update(self, density: float) -> None:
        """Take note of the density of the step just made, and choose the level of the next one."""
        assert self.level is not None
        self._num_steps += 1
        # Beyond that the level cannot move up faster, and would go on moving long after the density has come down.
        limited = min(density, self.LARGEST_EXCESS * self.target)
        self._smoothed += (limited - self._smoothed) / self.MEMORY_STEPS
        self._steps_since_move += 1
        if self._steps_since_move < self.PATIENCE_STEPS:
            return
        octaves = math.log2(max(self._smoothed, self.LOWEST_DENSITY) / self.target)
        if abs(octaves) <= math.log2(self.TOLERANCE):
            return
        if octaves > 0:
            move = min(self.MAX_LEVELS_UP, max(1, round(self.GAIN * octaves)))
        else:
            move = -min(self.MAX_LEVELS_DOWN, max(1, round(-self.GAIN * octaves / 2)))
        self.level = min(HIGHEST_LEVEL, max(LOWEST_LEVEL, self.level + move))
        self._steps_since_move = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "smoothed": self._smoothed,
            "steps_since_move": self._steps_since_move,
            "num_steps": self._num_steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; from a fixed threshold, with that one as the first."""
        self.level = state["level"]
        self._num_steps = state.get("num_steps", 0)
        self._smoothed = state.get("smoothed", self.target)
        self._steps_since_move = state.get("steps_since_move", 0)


class MeanDensity:
    """The mean over the last steps."""

    def __init__(self, densities: Sequence[float] = ()) -> None:
        self.densities = deque(densities, maxlen=MEAN_DENSITY_STEPS)

    def add(self, density: float) -> None:
        self.densities.append(density)

    @property
    def value(self) -> float:
        return sum(self.densities) / len(self.densities) if self.densities else 0.0
