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


# Chosen ahead of time (python -m scan_kernels.kernels.resources): the fastest looking that neither spill registers nor
# exceed the shared memory of any architecture. 64 rows, 8 warps and one head a tile: more rows do not fit.
_WIDE = Config(num_warps=8, num_stages=1)
HALF = Plan(
    chunk=64,
    segment=16,
    state_fwd=_WIDE,
    state_bwd=_WIDE,
    output=Config(num_warps=8, num_stages=2),
    dq=_WIDE,
    dkv=_WIDE,
)
# A decay, a start state, or the tensor cores of sm_80 take more registers per row.
HALF_LEAN = replace(HALF, chunk=32, segment=32, output=_WIDE)
_STATE = Config(num_warps=4, num_stages=1, block_f=64, block_v=64)
# Queries and keys of 256.
HALF_256 = replace(HALF_LEAN, state_fwd=_STATE, state_bwd=_STATE)
# Products of fp32 run without tensor cores.
SINGLE = Plan(chunk=16, segment=32, state_fwd=_STATE, state_bwd=_STATE, output=_WIDE, dq=_WIDE, dkv=_WIDE)


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
    """The plan for a CUDA capability (80, 90, 100), `with_start` where every document begins at a given state.

    DV is at most `fused_ops.value_columns`.
    """
    if dtype == torch.float32:
        return SINGLE
    if D > 128:
        return HALF_256
    if dtype == torch.bfloat16 and capability == 90 and D == DV and D in (64, 128) and not (with_start or with_decay):
        return HOPPER
    return HALF_LEAN if capability < 90 or with_start or with_decay else HALF
