"""The values that a threshold may take, and why these."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.distributed.thresholds import (
    LEVELS_PER_OCTAVE,
    LOWEST_THRESHOLD,
    DensityController,
    FixedThreshold,
    nearest_level,
    threshold_at,
)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-20, 1e20))
def test_a_threshold_is_the_nearest_with_a_whole_mantissa_from_8_to_16(value: float) -> None:
    found = threshold_at(nearest_level(value))
    mantissa, _ = math.frexp(found)
    assert 16 * mantissa in range(8, 16)
    for level in (nearest_level(value) - 1, nearest_level(value) + 1):
        assert abs(found - value) <= abs(threshold_at(level) - value)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-20, 1e20), st.floats(1.0, 2.0**19), st.integers(0, 2**20))
def test_subtracting_a_threshold_and_counting_it_is_exact_in_float32(
    value: float, factor: float, count: int
) -> None:
    threshold = threshold_at(nearest_level(value))
    residual = np.float32(threshold * factor)
    assert Fraction(float(residual - np.float32(threshold))) == Fraction(float(residual)) - Fraction(
        threshold
    )
    assert Fraction(float(np.float32(count) * np.float32(threshold))) == count * Fraction(threshold)


def test_with_nothing_left_to_send_the_threshold_stops_where_float32_still_holds_it() -> None:
    controller = DensityController(1e-3)
    controller.level = nearest_level(1e-3)
    for _ in range(3000):
        controller.update(0.0)
    assert threshold_at(controller.level) == LOWEST_THRESHOLD
    before = controller.level
    for _ in range(20):
        controller.update(0.5)
    assert controller.level > before


def test_a_threshold_that_was_far_too_low_is_not_overshot_and_sending_soon_goes_on() -> None:
    """Where the density goes as 1/τ², and every element sends until τ is a thousand times larger."""
    controller, settled = DensityController(1e-3), nearest_level(1.0)
    controller.level = settled - 10 * LEVELS_PER_OCTAVE
    levels = []
    for _ in range(200):
        controller.update(min(1.0, 1e-3 * threshold_at(controller.level) ** -2))
        levels.append(controller.level)
    assert max(levels) <= settled + 3 * LEVELS_PER_OCTAVE
    assert all(abs(level - settled) <= 2 for level in levels[100:])


def test_the_target_of_a_ramp_falls_geometrically_and_stays() -> None:
    controller = DensityController(1e-4, ramp_steps=20)
    controller.level = nearest_level(1e-3)
    targets = []
    for _ in range(30):
        targets.append(controller.target)
        controller.update(controller.target)
    assert np.allclose(targets[:21], np.geomspace(1e-2, 1e-4, 21))
    assert targets[20:] == [1e-4] * 10


def test_a_controller_goes_on_from_its_state() -> None:
    densities = np.random.default_rng(0).uniform(0, 2e-2, 60)
    whole = DensityController(1e-3, ramp_steps=40)
    whole.level = nearest_level(1e-3)
    levels = []
    for step, density in enumerate(densities):
        if step == 25:
            other = DensityController(1e-3, ramp_steps=40)
            other.load_state_dict(whole.state_dict())
        whole.update(density)
        levels.append(whole.level)
    for density, level in zip(densities[25:], levels[25:]):
        other.update(density)
        assert other.level == level
    assert len(set(levels[25:])) > 3


def test_a_fixed_threshold_does_not_move() -> None:
    threshold = FixedThreshold(5)
    threshold.update(0.9)
    threshold.load_state_dict(threshold.state_dict())
    assert threshold.level == 5
