"""Fill the few torch names that torchtitan 0.3.0 needs and older torches lack, and say so.

torchtitan 0.3.0 is made for torch >= 2.14. It also trains on 2.11 to 2.13 once the names below exist, so they are
filled *before* torchtitan is imported: `import flexrattn` does it. What cannot work on an older torch is refused by
`check_parallelism`, in one line, before a process group is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp

OLDEST_TORCH = (2, 11)
TITAN_TORCH = (2, 14)

filled: list[str] = []


def torch_version() -> tuple[int, int]:
    """The running torch as (major, minor)."""
    major, minor = torch.__version__.split("+")[0].split(".")[:2]
    return int(major), int(minor)


@dataclass(frozen=True)
class _DataParallelMeshDims:
    """Stand-in for torch 2.12's `DataParallelMeshDims`: only annotations and the refused backends name it."""

    shard: str | tuple[str, ...] | None = None
    replicate: str | tuple[str, ...] | None = None


def _set_timeout(timeout: timedelta, group: Any = None) -> None:
    from torch.distributed import distributed_c10d

    distributed_c10d._set_pg_timeout(timeout, group)


def fill() -> None:
    """Fill missing names once. Raises ImportError on a torch older than 2.11, naming what would do."""
    if torch_version() < OLDEST_TORCH:
        raise ImportError(
            f"flexrattn needs torch 2.11 or newer (2.14 is what torchtitan 0.3.0 is made for), got {torch.__version__}"
        )
    if not hasattr(fsdp, "DataParallelMeshDims"):
        setattr(fsdp, "DataParallelMeshDims", _DataParallelMeshDims)  # noqa: B010 (the name is new to this torch)
        filled.append("torch.distributed.fsdp.DataParallelMeshDims")
    if not hasattr(dist, "set_timeout"):
        dist.set_timeout = _set_timeout
        filled.append("torch.distributed.set_timeout")


def default_spmd_backend() -> str:
    """torchtitan's own default needs torch 2.14 for several ranks; DTensor on the model axes works everywhere."""
    return "spmd_types" if torch_version() >= TITAN_TORCH else "partial_dtensor"


def check_parallelism(parallelism: Any, *, world_size: int) -> None:
    """Refuse what the running torch cannot do: ValueError with the option to change."""
    if torch_version() >= TITAN_TORCH:
        return
    if parallelism.pipeline_parallel_degree > 1:
        raise ValueError(
            f"parallelism.pipeline_parallel_degree = {parallelism.pipeline_parallel_degree} needs torch 2.14 or newer, "
            f"this is torch {torch.__version__}: use 1"
        )
    if parallelism.spmd_backend != "partial_dtensor" and world_size > 1:
        raise ValueError(
            f"parallelism.spmd_backend = {parallelism.spmd_backend!r} works for one rank only before torch 2.14, "
            f"this is torch {torch.__version__} with {world_size} ranks: use 'partial_dtensor'"
        )
