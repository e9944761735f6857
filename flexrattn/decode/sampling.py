"""The next token from logits, on the device, with numbers that depend on the request alone.

The random number of a token is a hash of its request's seed and its position. So a request draws the same tokens in any
slot, beside any others and on any device (up to the rounding of the logits), and nothing is kept between steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a request draws: temperature 0 takes the likeliest token. top_k 0 and top_p 1 leave all tokens in.

    Top-k keeps the k likeliest tokens; top-p then keeps the likeliest whose probabilities, before the last of them, sum
    to less than p. ValueError for values outside.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be 0 (the likeliest token) or more, got {self.temperature}")
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, got {self.top_k!r}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {self.top_p}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0 to 2^63 - 1, got {self.seed!r}")

    @property
    def mode(self) -> Mode:
        if self.temperature == 0:
            return Mode.GREEDY
        return Mode.FILTERED if self.top_k or self.top_p < 1 else Mode.PLAIN


class Mode(StrEnum):
    """What a batch needs: every later one also does what the earlier ones do, for the rows that ask for it."""

    GREEDY = "greedy"
    PLAIN = "plain"  # temperatures
    FILTERED = "filtered"  # top-k or top-p, which sort the vocabulary


_ORDER = list(Mode)


def widest(modes: list[Mode]) -> Mode:
    return max(modes, key=_ORDER.index, default=Mode.GREEDY)


class SamplingRows:
    """The rows' settings as tensors (B,) of fixed addresses."""

    def __init__(self, rows: int, device: torch.device):
        self.temperature_B = torch.zeros(rows, dtype=torch.float32, device=device)
        self.top_k_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.top_p_B = torch.ones(rows, dtype=torch.float32, device=device)
        self.seed_B = torch.zeros(rows, dtype=torch.int64, device=device)

    def set(self, row: int, sampling: Sampling) -> None:
        self.temperature_B[row] = sampling.temperature
        self.top_k_B[row] = sampling.top_k
        self.top_p_B[row] = sampling.top_p
        self.seed_B[row] = sampling.seed

    def of(self, row_N: Tensor) -> SamplingRows:
        part = SamplingRows.__new__(SamplingRows)
        for name, x in vars(self).items():
            setattr(part, name, x[row_N])
        return part


def sample(logits_BV: Tensor, rows: SamplingRows, position_B: Tensor, mode: Mode) -> Tensor:
    """The next tokens (B,), int64. position_B: where they will stand. No host sync."""
    likeliest_B = logits_BV.argmax(-1)
    if mode is Mode.GREEDY:
        return likeliest_B
    scaled_BV = logits_BV.float() / rows.temperature_B.clamp(min=1e-6)[:, None]
    uniform_B1 = uniform(rows.seed_B, position_B)[:, None]
    p_BV = torch.softmax(scaled_BV, -1)
    if mode is Mode.FILTERED:
        # Only which tokens stay is decided in order of likelihood, so that a row without filters draws as in PLAIN.
        ordered_BV, token_BV = scaled_BV.sort(dim=-1, descending=True, stable=True)
        rank_V = torch.arange(logits_BV.shape[-1], device=logits_BV.device)
        k_B1 = torch.where(rows.top_k_B > 0, rows.top_k_B, logits_BV.shape[-1])[:, None]
        top_BV = torch.softmax(ordered_BV.masked_fill(rank_V >= k_B1, -torch.inf), -1)
        stays_BV = (top_BV.cumsum(-1) - top_BV < rows.top_p_B[:, None]) | (rows.top_p_B[:, None] >= 1)
        stays_BV = stays_BV & (rank_V < k_B1)
        p_BV = torch.where(torch.empty_like(stays_BV).scatter(1, token_BV, stays_BV), p_BV, 0.0)
    drawn_B = _inverse_cdf(p_BV, uniform_B1)
    return torch.where(rows.temperature_B > 0, drawn_B, likeliest_B)


def _inverse_cdf(p_BV: Tensor, uniform_B1: Tensor) -> Tensor:
    """The first index whose cumulative share lies above the uniform number; never one of probability 0."""
    cumulative_BV = p_BV.double().cumsum(-1)
    # The total times a number below 1 is below the total, so that some index is always above it.
    target_B1 = torch.minimum(
        uniform_B1 * cumulative_BV[:, -1:], torch.nextafter(cumulative_BV[:, -1:], -p_BV.new_ones(1).double())
    )
    return (cumulative_BV <= target_B1).sum(-1)


_MASK_64 = 2**64 - 1


def _signed(x: int) -> int:
    x &= _MASK_64
    return x - 2**64 if x >= 2**63 else x


def _shifted(x: Tensor, by: int) -> Tensor:
    # int64's >> repeats the sign.
    return (x >> by) & (2 ** (64 - by) - 1)


def _mix(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele, Lea, Flood 2014), in integers that wrap around."""
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def uniform(seed_B: Tensor, position_B: Tensor) -> Tensor:
    """Numbers in [0, 1), float64, a function of seed and position alone."""
    golden = _signed(0x9E3779B97F4A7C15)
    mixed_B = _mix(_mix(seed_B + golden) + (position_B + 1) * golden)
    return _shifted(mixed_B, 11).double() * 2.0**-53
