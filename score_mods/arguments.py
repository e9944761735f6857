"""Checks of mask arguments: what was given, and what would do."""

import math

import torch
from torch import Tensor


def check_whole_number(name: str, value: object, *, at_least: int, meaning: str) -> int:
    """`value` if it is an int (a bool is none) of at least `at_least`; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number ({meaning}), got {value!r} ({type(value).__name__})")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least} ({meaning}), got {value}")
    return value


def check_positive_number(name: str, value: object, *, meaning: str) -> float:
    """`value` if it is a finite int or float (a bool is none) above 0; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} must be a number above 0 ({meaning}), got {value!r} ({type(value).__name__})")
    return value


def check_token_ids(name: str, value: object) -> Tensor:
    """`value` if it is a (B, T) tensor of integers; ValueError otherwise."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be an integer tensor of shape (B, T), got {type(value).__name__}")
    if value.dtype == torch.bool or value.is_floating_point() or value.is_complex():
        raise ValueError(f"{name} must hold integers, got {value.dtype}")
    if value.ndim != 2 or value.numel() == 0:
        raise ValueError(f"{name} must have shape (B, T) with B, T >= 1, got {tuple(value.shape)}")
    return value
