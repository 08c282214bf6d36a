"""The values that a threshold may take, and why these."""

import math
from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from teacherstudent.distributed.thresholds import (
    LOWEST_THRESHOLD,
    DensityController,
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
