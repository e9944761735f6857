"""Between stages 2 and 3, where a forward keeps states: the whole state before every EVERY-th chunk.

K_i = S_n + f_n carry,  n = FIRST + i EVERY        with a row of zeros behind the last one, so that K is a carry, too
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.common import load_state
from scan_kernels.kernels.launch import Launch, Sizes, States

BLOCK_F = 32


@triton.jit
def border_states_kernel(
    states, sums, factors, carry, carry_sums, kept, kept_sums,
    N, SEGMENT, FIRST, EVERY, empty,
    F: tl.constexpr, DV: tl.constexpr, BLOCK_F: tl.constexpr, HAS_FACTOR: tl.constexpr, HAS_CARRY: tl.constexpr,
    HAS_SUMS: tl.constexpr,
):  # fmt: skip
    i, f0, bg = tl.program_id(0), tl.program_id(1) * BLOCK_F, tl.program_id(2).to(tl.int64)
    rows = tl.num_programs(0)
    n = FIRST + i * EVERY
    o_f, o_v = f0 + tl.arange(0, BLOCK_F), tl.arange(0, DV)
    o_tile = o_f[:, None] * DV + o_v[None, :]
    p_kept = kept + (bg * rows + i) * F * DV + o_tile
    p_kept_sums = kept_sums + (bg * rows + i) * DV + o_v
    state = tl.zeros((BLOCK_F, DV), kept.dtype.element_ty)
    value_sum = tl.zeros((DV,), tl.float32)
    if (n >= empty) & (n < N):
        segment = (n - empty) // SEGMENT
        segments = (N - empty + SEGMENT - 1) // SEGMENT
        p_state = states + (bg * N + n) * F * DV + o_tile
        p_carry = carry + (bg * (segments + 1) + segment) * F * DV + o_tile if HAS_CARRY else p_state
        factor = tl.load(factors + bg * N + n) if HAS_FACTOR and HAS_CARRY else 1.0
        state = load_state(p_state, p_carry, factor, HAS_CARRY, HAS_FACTOR)
        if HAS_SUMS:
            p_sums = sums + (bg * N + n) * DV + o_v
            p_carry_sums = carry_sums + (bg * (segments + 1) + segment) * DV + o_v if HAS_CARRY else p_sums
            value_sum = load_state(p_sums, p_carry_sums, factor, HAS_CARRY, HAS_FACTOR)
    tl.store(p_kept, state)
    if f0 == 0:
        tl.store(p_kept_sums, value_sum)


def kept_rows(sizes: Sizes, every: int) -> int:
    """Rows of `kept`: with every = 1 the states of all chunks, else a carry for segments of `every` chunks, which the
    empty ones are not in."""
    return sizes.N if every == 1 else -(-(sizes.N - sizes.empty) // every) + 1


def launch_border_states(sizes: Sizes, states: States, every: int, has_sums: bool) -> tuple[Launch, Tensor, Tensor]:
    """kept (B * G, rows, F, DV) in the dtype of the states and, in fp32, the sums of the values."""
    rows = kept_rows(sizes, every)
    kept = states.chunks.new_empty(sizes.B * sizes.G, rows, sizes.F, sizes.DV)
    kept_sums = states.chunks.new_empty(sizes.B * sizes.G, rows, sizes.DV, dtype=torch.float32)
    args = {
        "states": states.chunks,
        "sums": states.sums,
        "factors": states.factors,
        "carry": states.carry,
        "carry_sums": states.carry_sums,
        "kept": kept,
        "kept_sums": kept_sums,
        "N": sizes.N,
        "SEGMENT": sizes.segment,
        "FIRST": 0 if every == 1 else sizes.empty,
        "EVERY": sizes.even(every),
        "empty": sizes.empty,
        "F": sizes.F,
        "DV": sizes.DV,
        "BLOCK_F": min(BLOCK_F, sizes.F),
        "HAS_FACTOR": states.factors is not None,
        "HAS_CARRY": states.carry is not None,
        "HAS_SUMS": has_sums,
    }
    grid = (rows, sizes.F // min(BLOCK_F, sizes.F), sizes.B * sizes.G)
    return Launch(border_states_kernel, grid, args, {"num_warps": 4, "num_stages": 1}), kept, kept_sums
