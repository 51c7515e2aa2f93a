"""Means, deviations and intervals; the judges are NumPy, a printed table, and the integral of the density."""

import math

import numpy as np
import pytest

from lightning_peft.comparison.statistics import overlap, spread, t_quantile

# Two-sided, 95 %: any printed table of Student's distribution.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 7: 2.365, 10: 2.228, 20: 2.086, 30: 2.042, 120: 1.980}


@pytest.mark.parametrize("degrees", TABLE)
def test_quantiles_are_those_of_the_table(degrees: int) -> None:
    assert t_quantile(degrees) == pytest.approx(TABLE[degrees], abs=5e-4)


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 16])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_density_has_its_integral_between_the_quantiles(degrees: int, level: float) -> None:
    t = t_quantile(degrees, level)
    x = np.linspace(-t, t, 200_001)
    scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
    density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
    assert np.trapezoid(density, x) == pytest.approx(level, abs=1e-8)


def test_a_spread_is_that_of_numpy() -> None:
    values = [81.2, 79.9, 83.1]
    found = spread(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
    assert found.interval == pytest.approx((np.mean(values) - half, np.mean(values) + half))


def test_one_value_has_no_interval() -> None:
    found = spread([1.5])
    assert (found.mean, found.deviation, found.interval) == (1.5, None, None)
    assert overlap(found, spread([1.0, 2.0])) is None


@pytest.mark.parametrize(("other", "both"), [([3.0, 3.1], False), ([1.1, 1.3], True), ([0.0, 9.0], True)])
def test_intervals_overlap_or_do_not(other: list[float], both: bool) -> None:
    mine = spread([1.0, 1.1])
    assert overlap(mine, spread(other)) is both
    assert overlap(spread(other), mine) is both
