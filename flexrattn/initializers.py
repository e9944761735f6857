"""Initial values that do not depend on how a parameter is split over ranks."""

from __future__ import annotations

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
    """Fill a parameter from a normal distribution of mean 0; the same values on any number of ranks.

    On a GPU DTensor's generator sees to that. On the CPU it has none: every rank would draw its shard from the same
    seed, and the shards would be copies of each other. So there every rank draws the whole and keeps its part.
    """

    std: float

    def __call__(self, parameter: torch.Tensor) -> None:
        if not (isinstance(parameter, DTensor) and parameter.device.type == "cpu"):
            parameter.normal_(std=self.std)
            return
        whole = torch.empty(parameter.shape, dtype=parameter.dtype).normal_(std=self.std)
        mesh = parameter.device_mesh
        parameter.copy_(DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False))
