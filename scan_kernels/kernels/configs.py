"""The committed table of launch configurations, per (architecture, head size, dtype).

No tuning happens at run time. `python -m scan_kernels.tune` measures candidates and checks the numbers of each.
"""

from dataclasses import dataclass, replace

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
    hopper: bool = False  # the stages of kernels/hopper_*.py


# Measured on an H200 with D = Dv = 128, softmax, bf16: docs/kernels.md.
HALF = Plan(
    chunk=64,
    segment=16,
    state_fwd=Config(num_warps=4, num_stages=1),
    state_bwd=Config(num_warps=4, num_stages=1),
    output=Config(num_warps=8, num_stages=2, heads=2),
    dq=Config(num_warps=8, num_stages=2, heads=2),
    dkv=Config(num_warps=8, num_stages=2, heads=1),
)
# Not measured: what fits into shared memory.
SINGLE = Plan(
    chunk=16,
    segment=32,
    state_fwd=Config(num_warps=4, num_stages=1, block_f=64, block_v=64),
    state_bwd=Config(num_warps=4, num_stages=1, block_f=64, block_v=64),
    output=Config(num_warps=4, num_stages=1),
    dq=Config(num_warps=4, num_stages=1),
    dkv=Config(num_warps=4, num_stages=1),
)


# Not measured either: HALF in the 163 KB of shared memory that an A100 has, or beside a start state, which the output
# stage holds too.
HALF_LEAN = replace(
    HALF, output=Config(num_warps=8, num_stages=1, heads=1), dq=Config(num_warps=8, num_stages=1, heads=1)
)


# bf16, D = Dv = 64 or 128, neither decay nor a start state.
HOPPER = Plan(
    chunk=64,
    segment=16,
    state_fwd=Config(num_warps=8, registers=128),  # two programs an SM
    state_bwd=Config(num_warps=8, registers=128),
    output=Config(num_warps=4),
    dq=Config(num_warps=4),
    dkv=Config(num_warps=8),
    hopper=True,
)


def plan_for(
    dtype: torch.dtype, D: int, DV: int, capability: int = 90, with_start: bool = False, with_decay: bool = False
) -> Plan:
    """The plan for a CUDA capability (80, 90, 100), `with_start` where every document begins at a given state."""
    if dtype == torch.float32:
        return SINGLE
    if dtype == torch.bfloat16 and capability == 90 and D == DV and D in (64, 128) and not with_start and not with_decay:
        return HOPPER
    return HALF_LEAN if capability < 90 or with_start else HALF
