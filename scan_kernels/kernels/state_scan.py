"""Stage 2: the associative scan of (factor, state) pairs over segments, (a1, S1) o (a2, S2) = (a1 a2, a2 S1 + S2).

Writes the state at every border of segments: S_0 = init, S_{s+1} = a_s S_s + total_s; reversed: S_s = a_s S_{s+1} +
total_s from S_segments = init. One program per row of a state; the row behind the features is the sum of the values.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.launch import Launch, Sizes

BLOCK_S = 32


@triton.jit
def _compose(factor1, state1, factor2, state2):
    # A factor of 0 lets nothing pass, not even NaN.
    return factor1 * factor2, tl.where(factor2 == 0, 0.0, factor2 * state1) + state2


@triton.jit
def state_scan_kernel(
    totals, total_factors, init, carry, carry_sums, final,
    segments, F: tl.constexpr, DV: tl.constexpr, HAS_FACTOR: tl.constexpr, REVERSED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    f, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_s, o_v = tl.arange(0, BLOCK_S), tl.arange(0, DV)
    state = tl.zeros((DV,), tl.float32)
    if init is not None:
        state = tl.load(init + (bg * (F + 1) + f) * DV + o_v)
    p_carry = carry + (bg * (segments + 1) * F + f) * DV + o_v
    p_sums = carry_sums + bg * (segments + 1) * DV + o_v
    first = (segments if REVERSED else 0) * tl.full((), 1, tl.int64)
    if f < F:
        tl.store(p_carry + first * F * DV, state.to(carry.dtype.element_ty))
    else:
        tl.store(p_sums + first * DV, state)
    for done in range(0, segments, BLOCK_S):
        o_done = done + o_s
        m_s = o_done < segments
        o_segment = tl.where(m_s, segments - 1 - o_done if REVERSED else o_done, 0).to(tl.int64)
        p_total = totals + ((bg * segments + o_segment[:, None]) * (F + 1) + f) * DV + o_v[None, :]
        states = tl.load(p_total, mask=m_s[:, None], other=0.0)
        if HAS_FACTOR:
            factor = tl.load(total_factors + bg * segments + o_segment, mask=m_s, other=1.0)
            factor = tl.broadcast_to(factor[:, None], BLOCK_S, DV)
            factor, states = tl.associative_scan((factor, states), 0, _compose)
            states += tl.where(factor == 0, 0.0, factor * state[None, :])
        else:
            states = tl.cumsum(states, 0) + state[None, :]
        state = tl.sum(tl.where((o_s == BLOCK_S - 1)[:, None], states, 0.0), 0)
        o_border = o_segment if REVERSED else o_segment + 1
        if f < F:
            p_border = p_carry[None, :] + o_border[:, None] * F * DV
            tl.store(p_border, states.to(carry.dtype.element_ty), mask=m_s[:, None])
        else:
            tl.store(p_sums[None, :] + o_border[:, None] * DV, states, mask=m_s[:, None])
    if final is not None:
        tl.store(final + (bg * (F + 1) + f) * DV + o_v, state)


def launch_state_scan(
    sizes: Sizes,
    totals: Tensor,
    total_factors: Tensor | None,
    init: Tensor | None,
    *,
    dtype: torch.dtype,
    backward: bool,
    with_final: bool,
) -> tuple[Launch, Tensor, Tensor, Tensor | None]:
    """carry (B * G, segments + 1, F, DV) in `dtype`, its sums in fp32, and in fp32 the state at the far end."""
    BG, F, DV = sizes.B * sizes.G, sizes.F, sizes.DV
    carry = totals.new_empty(BG, sizes.segments + 1, F, DV, dtype=dtype)
    carry_sums = totals.new_empty(BG, sizes.segments + 1, DV)
    final = totals.new_empty(BG, F + 1, DV) if with_final else None
    args = {
        "totals": totals,
        "total_factors": total_factors,
        "init": init,
        "carry": carry,
        "carry_sums": carry_sums,
        "final": final,
        "segments": sizes.segments,
        "F": F,
        "DV": DV,
        "HAS_FACTOR": total_factors is not None,
        "REVERSED": backward,
        "BLOCK_S": min(BLOCK_S, 1 << (sizes.segments - 1).bit_length()),
    }
    warps = 1 if sizes.segments <= 8 else 4
    launch = Launch(state_scan_kernel, (F + 1, BG), args, {"num_warps": warps, "num_stages": 1})
    return launch, carry, carry_sums, final
