"""Paired intervals: by hand, by another implementation, and by how often they claim what is not so."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from kdcli.studies.compare.stats import BETTER, INCONCLUSIVE, ONE_SEED, WORSE, holm, summary, verdict

accuracies = st.lists(st.tuples(st.integers(0, 360), st.integers(0, 360)), min_size=2, max_size=12)


def test_summary_of_five_values_by_hand() -> None:
    """1 … 5: mean 3, deviation √2.5, error √0.5; t(0.975; 4) = 2.776445; F has a closed form for 4 degrees."""
    found = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.count, found.mean) == (5, 3.0)
    assert found.deviation == pytest.approx(1.5811388, abs=1e-7)
    assert found.interval == pytest.approx((3 - 1.9632432, 3 + 1.9632432), abs=1e-6)
    t = 3 / math.sqrt(0.5)
    part = t / math.sqrt(1 + t * t / 4) * (1 - t * t / (1 + t * t / 4) / 12)
    assert found.p == pytest.approx(2 * (0.5 - 3 / 8 * part), abs=1e-9)
    assert verdict(found) == BETTER


def test_summary_of_two_values_by_hand() -> None:
    """1 and 3: mean 2, error 1; t(0.975; 1) = 12.706205; F is that of Cauchy."""
    found = summary([1.0, 3.0])
    assert found.interval == pytest.approx((2 - 12.706205, 2 + 12.706205), abs=1e-5)
    assert found.p == pytest.approx(1 - 2 * math.atan(2) / math.pi, abs=1e-12)
    assert verdict(found) == INCONCLUSIVE


def test_verdict_worse() -> None:
    assert verdict(summary([-1.0, -2.0, -3.0, -4.0, -5.0])) == WORSE


def test_verdict_without_interval() -> None:
    found = summary([7.0])
    assert (found.count, found.mean, found.deviation, found.interval, found.p) == (1, 7.0, None, None, None)
    assert verdict(found) == ONE_SEED == "one seed: no claim"


def test_summary_resolution_bounds_deviation() -> None:
    """Three times one image of 100 more: the rounding of both sides has deviation 1/√6, t(0.975; 2) = 4.302653."""
    exact = summary([1.0, 1.0, 1.0])
    assert exact.interval == (1.0, 1.0)
    assert exact.p == 0.0
    found = summary([1.0, 1.0, 1.0], resolution=1.0)
    assert found.deviation == 0.0
    assert found.interval == pytest.approx(
        (1 - 4.302653 / math.sqrt(18), 1 + 4.302653 / math.sqrt(18)), abs=1e-6
    )
    assert verdict(found) == INCONCLUSIVE
    assert summary([0.0, 4.0, 8.0], resolution=1.0) == summary([0.0, 4.0, 8.0])  # their own is larger


def test_summary_of_zero_differences() -> None:
    found = summary([0.0] * 5)
    assert (found.interval, found.p) == ((0.0, 0.0), 1.0)
    assert verdict(found) == INCONCLUSIVE


@given(accuracies)
def test_summary_equals_scipy_paired_t_test(pairs: list[tuple[int, int]]) -> None:
    ours, base = np.array(pairs, dtype=float).T
    found = summary(list(ours - base))
    if np.ptp(ours - base) == 0:
        return
    other = scipy_stats.ttest_rel(ours, base)
    low, high = other.confidence_interval(0.95)
    assert found.interval == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert found.p == pytest.approx(other.pvalue, rel=1e-7, abs=1e-12)


@given(accuracies, st.integers(-100, 100))
def test_summary_invariant_to_shift_per_seed(pairs: list[tuple[int, int]], shift: int) -> None:
    """Each seed, and all seeds together, may be easy or hard: only differences count."""
    plain = summary([float(ours - base) for ours, base in pairs])
    moved = summary(
        [
            float((ours + number * shift) - (base + number * shift))
            for number, (ours, base) in enumerate(pairs)
        ]
    )
    assert moved == plain
    turned = summary([float(base - ours) for ours, base in pairs])
    assert turned.mean == -plain.mean
    assert {BETTER: WORSE, WORSE: BETTER}.get(verdict(plain), INCONCLUSIVE) == verdict(turned)


def test_holm_by_hand() -> None:
    """Smallest × 3, next × 2, last × 1, none below the one before it, none above 1 (Holm 1979)."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@pytest.mark.parametrize("count", [3, 5, 10])
def test_verdict_false_positive_rate(count: int) -> None:
    """Shares of 400 images, as accuracies are; 2,000 comparisons: 5 % ± 1.5 is three standard errors."""
    random = np.random.default_rng(count)
    seeds = random.normal(0.8, 0.02, (2000, count, 1))  # what both runs of a seed have in common
    right = random.binomial(400, seeds.clip(0, 1), (2000, count, 2))
    claims = [
        verdict(summary(list((100 / 400) * (row[:, 1] - row[:, 0])), 100 / 400)) != INCONCLUSIVE
        for row in right
    ]
    assert 0.035 <= np.mean(claims) <= 0.065


def test_verdict_power_with_ten_seeds() -> None:
    """In four of five comparisons: the noncentral t-distribution says 80.3 %."""
    random = np.random.default_rng(0)
    found = [verdict(summary(list(row))) for row in random.normal(1.0, 1.0, (2000, 10))]
    edge = scipy_stats.t.ppf(0.975, 9)
    expected = scipy_stats.nct.sf(edge, 9, math.sqrt(10))
    assert expected == pytest.approx(0.803, abs=0.001)
    assert found.count(BETTER) / 2000 == pytest.approx(expected, abs=0.03)
    assert found.count(WORSE) == 0
