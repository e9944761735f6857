"""Paired comparisons of few seeds: t intervals, equivalence (TOST), exact tests, Holm's correction, a bootstrap.

Differences are arm minus control, seed by seed, with data order and evaluation shared. Of a loss, below zero is better.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

ALPHA = 0.05


# ---------------------------------------------------------------------------------------------- Student's t


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t: the regularised incomplete beta function of df / (df + t^2)."""
    if df <= 0:
        raise ValueError(f"degrees of freedom must be positive, got {df}")
    if math.isinf(t):
        return 0.0 if t < 0 else 1.0
    tail = 0.5 * _incomplete_beta(df / 2, 0.5, df / (df + t * t))
    return tail if t < 0 else 1.0 - tail


@cache
def t_quantile(p: float, df: float) -> float:
    """t with P(T <= t) = p, by bisection of `t_cdf`."""
    if not 0 < p < 1:
        raise ValueError(f"p must be between 0 and 1, got {p}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    low, high = 0.0, 1.0
    while t_cdf(high, df) < p:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, df) < p else (low, middle)
    return (low + high) / 2


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by its continued fraction (Lentz's method), on the side where that converges fast."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(b, a, 1 - x)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    tiny = 1e-300
    c, d = 1.0, 1.0 - (a + b) * x / (a + 1)
    d = 1 / (d if abs(d) > tiny else tiny)
    result = d
    for m in range(1, 500):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 + numerator * d
            d = 1 / (d if abs(d) > tiny else tiny)
            c = 1 + numerator / c
            c = c if abs(c) > tiny else tiny
            result *= d * c
        if abs(d * c - 1) < 1e-15:
            break
    return front * result


# ---------------------------------------------------------------------------------------------- one comparison


@dataclass(frozen=True, kw_only=True)
class Paired:
    """n differences: their mean, its 95 % t interval, the two-sided t test's p, TOST's p for |difference| < margin, and
    the two-sided p of the exact test over all signs. None where n is too small to say."""

    n: int
    mean: float
    low: float | None
    high: float | None
    p: float | None
    p_equal: float | None
    p_sign_flip: float


def paired(differences: Sequence[float], *, margin: float, confidence: float = 1 - ALPHA) -> Paired:
    """Compare by n >= 1 paired differences. margin: the largest difference that counts as none (> 0)."""
    n = len(differences)
    if n == 0:
        raise ValueError("no paired differences: arm and control share no seed")
    mean = statistics.fmean(differences)
    flip = sign_flip_p(differences)
    if n == 1:
        return Paired(n=n, mean=mean, low=None, high=None, p=None, p_equal=None, p_sign_flip=flip)
    error = statistics.stdev(differences) / math.sqrt(n)
    half = t_quantile(0.5 + confidence / 2, n - 1) * error
    return Paired(
        n=n,
        mean=mean,
        low=mean - half,
        high=mean + half,
        p=2 * t_cdf(-abs(_over(mean, error)), n - 1),
        p_equal=max(t_cdf(-_over(margin - mean, error), n - 1), t_cdf(-_over(margin + mean, error), n - 1)),
        p_sign_flip=flip,
    )


def _over(value: float, error: float) -> float:
    if error > 0:
        return value / error
    return 0.0 if value == 0 else math.copysign(math.inf, value)


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p of |mean| under every flip of signs: exact, at least 2 / 2^n (.125 for four pairs)."""
    observed = abs(sum(differences)) * (1 - 1e-12)
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    return sum(abs(sum(s * d for s, d in zip(flip, differences, strict=True))) >= observed for flip in flips) / len(
        flips
    )


def rank_sum_p(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the exact rank-sum test, ties at mean ranks: at least .10 for 3 against 3, .029 for 4 and 4."""
    values = [*a, *b]
    order = sorted(values)
    ranks = [statistics.fmean(i + 1 for i, w in enumerate(order) if w == v) for v in values]
    expected = len(a) * (len(values) + 1) / 2
    observed = abs(sum(ranks[: len(a)]) - expected) - 1e-9
    subsets = list(itertools.combinations(ranks, len(a)))
    return sum(abs(sum(subset) - expected) >= observed for subset in subsets) / len(subsets)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Holm's adjusted p values, in the given order; None stays None and counts as a test all the same."""
    m = len(ps)
    adjusted: list[float | None] = [None] * m
    largest = 0.0
    order = sorted((i for i in range(m) if ps[i] is not None), key=lambda i: ps[i] or 0.0)
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (m - rank) * (ps[i] or 0.0)))
        adjusted[i] = largest
    return adjusted


def bootstrap_interval(
    arm: Sequence[np.ndarray], control: Sequence[np.ndarray], *, confidence: float = 1 - ALPHA, draws: int = 2000
) -> tuple[float, float]:
    """Interval of the difference of mean losses, over seeds and, inside a seed, over validation rows.

    arm, control: for each shared seed (rows, 2) of [sum of losses, tokens], row by row of the same text.
    """
    if len(arm) != len(control) or any(a.shape != c.shape for a, c in zip(arm, control, strict=True)):
        raise ValueError("arm and control must have the same seeds and validation rows")
    generator = np.random.default_rng(0)
    means = np.empty(draws)
    for i in range(draws):
        per_seed = []
        for seed in generator.integers(len(arm), size=len(arm)):
            rows = len(arm[seed])
            weights = np.bincount(generator.integers(rows, size=rows), minlength=rows)
            sums_a, sums_c = weights @ arm[seed], weights @ control[seed]
            per_seed.append(sums_a[0] / sums_a[1] - sums_c[0] / sums_c[1])
        means[i] = np.mean(per_seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def verdict(comparison: Paired, *, margin: float, p_holm: float | None, p_equal_holm: float | None) -> str:
    """What may be said of a difference of losses. Only an interval says it: no p above .05 is a match.

    "matches": equivalence holds (TOST, Holm). "better", "worse": the t test holds (Holm). Both can. "inconclusive":
    neither; with "interval wider than the margin" where even a true match could not have been seen.
    """
    if comparison.low is None or comparison.high is None:
        return "inconclusive (one seed)"
    said = []
    if p_equal_holm is not None and p_equal_holm < ALPHA:
        said.append(f"matches within {margin:g}")
    if p_holm is not None and p_holm < ALPHA:
        said.append("better" if comparison.mean < 0 else "worse")
    if said:
        return ", ".join(said)
    wide = comparison.high - comparison.low > 2 * margin
    return "inconclusive (interval wider than the margin)" if wide else "inconclusive"
