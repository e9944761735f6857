"""Closeness as the whole suite measures it: relative norm against float64."""

from __future__ import annotations

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; 0 when both are all zero, inf for a NaN."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert actual.shape == expected.shape, f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}"
    difference = (actual - expected).norm()
    if not torch.isfinite(difference):
        return float("inf")
    scale = expected.norm()
    return float(difference / scale) if scale > 0 else float(difference)
