"""The committed table of launch configurations, per (architecture, head size, dtype).

No tuning happens at run time. `python -m scan_kernels.tune` measures candidates and checks the numbers of each.
"""

from dataclasses import dataclass

import torch

from scan_kernels.kernels.launch import Config


@dataclass(frozen=True)
class Plan:
    """How a problem is cut and how every stage is launched."""

    chunk: int
    segment: int  # chunks
    state_fwd: Config
    state_bwd: Config
    output: Config
    dq: Config
    dkv: Config


HALF = Plan(
    chunk=64,
    segment=16,
    state_fwd=Config(num_warps=8, num_stages=2),
    state_bwd=Config(num_warps=8, num_stages=2),
    output=Config(num_warps=8, num_stages=1, heads=2),
    dq=Config(num_warps=8, num_stages=1, heads=1),
    dkv=Config(num_warps=8, num_stages=1, heads=1),
)


def plan_for(dtype: torch.dtype, D: int, DV: int) -> Plan:
    return HALF
