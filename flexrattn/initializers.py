"""Initial values that do not depend on how a parameter is split over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor, Replicate


@dataclass(frozen=True)
class Constant:
    """Fill a parameter with one value."""

    value: float

    def __call__(self, parameter: torch.Tensor) -> None:
        parameter.fill_(self.value)


@dataclass(frozen=True)
class Normal:
    """Fill a parameter from a normal distribution of mean 0; the same values on any number of ranks."""

    std: float

    def __call__(self, parameter: torch.Tensor) -> None:
        _draw(parameter, lambda x: x.normal_(std=self.std))


@dataclass(frozen=True)
class DecayRate:
    """log(A), A uniform in [low, high): Mamba2's A_log (arXiv 2405.21060, the authors' code)."""

    low: float = 1.0
    high: float = 16.0

    def __call__(self, parameter: torch.Tensor) -> None:
        _draw(parameter, lambda x: x.uniform_(self.low, self.high).log_())


@dataclass(frozen=True)
class StepBias:
    """b with softplus(b) = dt, log(dt) uniform between those of low and high: Mamba2's dt_bias."""

    low: float = 1e-3
    high: float = 1e-1

    def __call__(self, parameter: torch.Tensor) -> None:
        # softplus's inverse, log(exp(dt) - 1), written so that a small dt loses no digits.
        _draw(parameter, lambda x: x.uniform_(math.log(self.low), math.log(self.high)).exp_().expm1_().log_())


def _draw(parameter: torch.Tensor, fill: Callable[[torch.Tensor], object]) -> None:
    """Fill a parameter with the same random values on any number of ranks.

    On a GPU DTensor's generator sees to that. On the CPU it has none: every rank would draw its shard from the same
    seed, and the shards would be copies of each other. So there every rank draws the whole and keeps its part.
    """
    if not (isinstance(parameter, DTensor) and parameter.device.type == "cpu"):
        fill(parameter)
        return
    whole = torch.empty(parameter.shape, dtype=parameter.dtype)
    fill(whole)
    mesh = parameter.device_mesh
    replicated = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    # Shard by shard: DTensor's copy_ takes a dimension of size 1 for one to broadcast, and refuses to split it.
    parameter.to_local().copy_(replicated.redistribute(mesh, parameter.placements).to_local())
