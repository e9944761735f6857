"""Statistics against tables, closed forms and exhaustive counts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from flexrattn.ablate.stats import (
    bootstrap_interval,
    holm,
    paired,
    rank_sum_p,
    sign_flip_p,
    t_cdf,
    t_quantile,
    verdict,
)

# Two-sided 95 % and one-sided 95 % points of Student's t, as tables print them.
QUANTILES = [
    (0.975, 1, 12.706205),
    (0.975, 2, 4.302653),
    (0.975, 3, 3.182446),
    (0.975, 4, 2.776445),
    (0.95, 3, 2.353363),
    (0.95, 10, 1.812461),
    (0.995, 30, 2.749996),
    (0.975, 1e6, 1.959966),
]


@pytest.mark.parametrize(("p", "df", "expected"), QUANTILES)
def test_t_quantiles(p, df, expected):
    assert t_quantile(p, df) == pytest.approx(expected, rel=1e-6)
    assert t_quantile(1 - p, df) == pytest.approx(-expected, rel=1e-6)


@pytest.mark.parametrize("t", [-30.0, -2.5, -0.1, 0.0, 0.7, 4.0, 1e3])
def test_t_cdf_in_closed_form(t):
    assert t_cdf(t, 1) == pytest.approx(0.5 + math.atan(t) / math.pi, rel=1e-9)
    assert t_cdf(t, 2) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-7)


def test_paired_interval_by_hand():
    """Differences .1 .2 .15 .12: mean .1425, standard error .043493 / 2, t(.975, 3) 3.182446."""
    found = paired([0.10, 0.20, 0.15, 0.12], margin=0.05)
    assert found.mean == pytest.approx(0.1425)
    half = 3.182446 * 0.0434933 / 2
    assert (found.low, found.high) == pytest.approx((0.1425 - half, 0.1425 + half), rel=1e-5)
    assert found.p == pytest.approx(2 * t_cdf(-0.1425 / (0.0434933 / 2), 3), rel=1e-4)
    # Far above the margin: the one-sided test against it fails.
    assert found.p_equal == pytest.approx(1 - t_cdf((0.05 - 0.1425) / (0.0434933 / 2), 3), rel=1e-4)


def test_tost_is_the_90_percent_interval_inside_the_margin():
    generator = np.random.default_rng(3)
    for _ in range(200):
        differences = generator.normal(0.002, 0.006, size=5).tolist()
        found = paired(differences, margin=0.01)
        ninety = paired(differences, margin=0.01, confidence=0.9)
        assert (found.p_equal < 0.05) == (ninety.low > -0.01 and ninety.high < 0.01)


def test_t_interval_covers_as_often_as_it_says():
    generator = np.random.default_rng(1)
    samples = generator.normal(1.0, 2.0, size=(2000, 4))
    inside = sum((found := paired(row.tolist(), margin=1)).low < 1.0 < found.high for row in samples)
    # 1900 of 2000 are expected, with a standard deviation of 10.
    assert abs(inside - 1900) < 40


def test_one_seed_has_no_interval():
    found = paired([0.3], margin=0.01)
    assert (found.low, found.high, found.p, found.p_equal) == (None, None, None, None)
    assert verdict(found, margin=0.01, p_holm=None, p_equal_holm=None) == "inconclusive (one seed)"
    with pytest.raises(ValueError, match="share no seed"):
        paired([], margin=0.01)


def test_equal_runs():
    found = paired([0.0, 0.0, 0.0], margin=0.01)
    assert (found.low, found.high, found.p, found.p_equal) == (0.0, 0.0, 1.0, 0.0)
    assert verdict(found, margin=0.01, p_holm=1.0, p_equal_holm=0.0) == "matches within 0.01"


@pytest.mark.parametrize(("n", "smallest"), [(3, 0.10), (4, 2 / 70), (5, 2 / 252)])
def test_smallest_rank_sum_p(n, smallest):
    assert rank_sum_p(range(n), range(n, 2 * n)) == pytest.approx(smallest)
    assert rank_sum_p(range(n, 2 * n), range(n)) == pytest.approx(smallest)


def test_rank_sum_of_overlapping_samples():
    # Ranks 1, 3 and 2, 4: of the six pairs of ranks, four are at least as far from 5 as 4 is.
    assert rank_sum_p([1.0, 3.0], [2.0, 4.0]) == pytest.approx(4 / 6)
    assert rank_sum_p([1.0, 1.0], [1.0, 1.0]) == 1.0


def test_sign_flips():
    assert sign_flip_p([0.1, 0.2, 0.3, 0.4]) == 2 / 16
    assert sign_flip_p([0.1, -0.1]) == 1.0
    assert sign_flip_p([-0.1, 0.2, 0.3]) == 4 / 8


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.01, None, 0.5]) == [pytest.approx(0.03), None, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.001, -0.001, 0.002, 0.0], "matches within 0.01"),
        ([-0.20, -0.21, -0.19, -0.20], "better"),
        ([0.20, 0.21, 0.19, 0.20], "worse"),
        ([-0.0041, -0.0040, -0.0039, -0.0040], "matches within 0.01, better"),
        ([0.10, -0.10, 0.05, -0.02], "inconclusive (interval wider than the margin)"),
        ([0.008, 0.012, 0.002, 0.016], "inconclusive"),
    ],
)
def test_verdicts(differences, said):
    found = paired(differences, margin=0.01)
    assert verdict(found, margin=0.01, p_holm=found.p, p_equal_holm=found.p_equal) == said


def test_bootstrap_holds_the_difference_and_shrinks_with_more_rows():
    generator = np.random.default_rng(0)

    def runs(rows: int, mean: float) -> list[np.ndarray]:
        return [np.stack([generator.normal(mean, 1.0, rows) * 10, np.full(rows, 10.0)], 1) for _ in range(3)]

    widths = []
    for rows in (50, 5000):
        low, high = bootstrap_interval(runs(rows, 2.0), runs(rows, 2.5), draws=400)
        assert low < -0.5 < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 4
    same = runs(20, 1.0)
    assert bootstrap_interval(same, same, draws=50) == (0.0, 0.0)
    with pytest.raises(ValueError, match="same seeds and validation rows"):
        bootstrap_interval(runs(5, 1.0), runs(6, 1.0))
