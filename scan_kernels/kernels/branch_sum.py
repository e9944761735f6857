"""The end of a layer: both branches' per-head norms and their sum, and the backward of it with the scales' gradients.

Rows are tokens. A program walks over rows (program, program + programs, ...) with a block of heads in registers: the
scales are loaded once and their gradients summed on the way. One pass over memory, no atomics, always the same bits.

Letters: N = B T rows, H query heads, D head width (legend: scan_kernels/README.md).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.launch import Launch


@triton.jit
def _unit_rows(x_HD, D: tl.constexpr, eps):
    """1 / rms of each head; 0 for a row of zeros, which then passes nothing on."""
    mean_square = tl.sum(x_HD * x_HD, axis=1) / D
    return tl.where(mean_square > 0.0, tl.rsqrt(mean_square + eps), 0.0)


@triton.jit
def branch_sum_fwd_kernel(
    p_a,
    p_b,
    p_weight_a,
    p_weight_b,
    p_y,
    N,
    H,
    eps,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = norm(a) * weight_a + norm(b) * weight_b; all rows (N, H, D) contiguous."""
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, D)
    m_hd = (o_h < H)[:, None] & (o_d < D)[None, :]
    o_hd = o_h[:, None] * D + o_d[None, :]
    b_weight_a = tl.load(p_weight_a + o_hd, mask=m_hd, other=0.0).to(tl.float32)
    b_weight_b = tl.load(p_weight_b + o_hd, mask=m_hd, other=0.0).to(tl.float32)
    for n in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        o_row = tl.cast(n, tl.int64) * H * D
        b_a = tl.load(p_a + o_row + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + o_row + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_y = b_a * _unit_rows(b_a, D, eps)[:, None] * b_weight_a + b_b * _unit_rows(b_b, D, eps)[:, None] * b_weight_b
        tl.store(p_y + o_row + o_hd, b_y.to(p_y.dtype.element_ty), mask=m_hd)


@triton.jit
def _norm_bwd(b_x, b_dy, b_weight, D: tl.constexpr, eps):
    """dx and dy * normalized x: the part of one row in the scales' gradient."""
    b_inverse = _unit_rows(b_x, D, eps)[:, None]
    b_unit = b_x * b_inverse
    b_g = b_dy * b_weight
    b_along = tl.sum(b_g * b_unit, axis=1)[:, None] / D
    return b_inverse * (b_g - b_unit * b_along), b_dy * b_unit


@triton.jit
def branch_sum_bwd_kernel(
    p_dy,
    p_a,
    p_b,
    p_weight_a,
    p_weight_b,
    p_da,
    p_db,
    p_parts,
    N,
    H,
    eps,
    D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da, db; parts (programs, 2, H, D) fp32: each program's share of the scales' gradients."""
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, D)
    m_hd = (o_h < H)[:, None] & (o_d < D)[None, :]
    o_hd = o_h[:, None] * D + o_d[None, :]
    b_weight_a = tl.load(p_weight_a + o_hd, mask=m_hd, other=0.0).to(tl.float32)
    b_weight_b = tl.load(p_weight_b + o_hd, mask=m_hd, other=0.0).to(tl.float32)
    b_dweight_a = tl.zeros((BLOCK_H, D), tl.float32)
    b_dweight_b = tl.zeros((BLOCK_H, D), tl.float32)
    for n in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        o_row = tl.cast(n, tl.int64) * H * D
        b_dy = tl.load(p_dy + o_row + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_a = tl.load(p_a + o_row + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_b = tl.load(p_b + o_row + o_hd, mask=m_hd, other=0.0).to(tl.float32)
        b_da, b_share = _norm_bwd(b_a, b_dy, b_weight_a, D, eps)
        b_dweight_a += b_share
        tl.store(p_da + o_row + o_hd, b_da.to(p_da.dtype.element_ty), mask=m_hd)
        b_db, b_share = _norm_bwd(b_b, b_dy, b_weight_b, D, eps)
        b_dweight_b += b_share
        tl.store(p_db + o_row + o_hd, b_db.to(p_db.dtype.element_ty), mask=m_hd)
    o_part = tl.cast(tl.program_id(0), tl.int64) * 2 * H * D
    tl.store(p_parts + o_part + o_hd, b_dweight_a, mask=m_hd)
    tl.store(p_parts + o_part + H * D + o_hd, b_dweight_b, mask=m_hd)


# Elements of a row that a program holds: per head two scales, two sums for their gradients, and a, b and dy on the way.
TILE = 2048
# Measured on an H200 (docs/kernels.md). The forward has no sums to write at its end, so more programs cost it nothing.
FORWARD = {"num_warps": 8, "num_stages": 1}
BACKWARD = {"num_warps": 4, "num_stages": 3}
FORWARD_PROGRAMS, BACKWARD_PROGRAMS = 1056, 264


def _launch(kernel, tensors: dict[str, Tensor], eps: float, programs: int, options: dict[str, int]) -> Launch:
    B, T, H, D = tensors["p_a"].shape
    block_h = max(1, min(triton.next_power_of_2(H), TILE // D // (2 if "p_dy" in tensors else 1)))
    sizes = {"N": B * T, "H": H, "eps": eps, "D": D, "BLOCK_H": block_h, "STAGES": options["num_stages"]}
    return Launch(kernel, (min(programs, B * T), triton.cdiv(H, block_h)), tensors | sizes, options)


def branch_sum_fwd(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float) -> tuple[Launch, Tensor]:
    """The launch, and y that it writes. All contiguous; a, b (B, T, H, D), the scales (H, D)."""
    y = torch.empty_like(a)
    tensors = {"p_a": a, "p_b": b, "p_weight_a": weight_a, "p_weight_b": weight_b, "p_y": y}
    return _launch(branch_sum_fwd_kernel, tensors, eps, FORWARD_PROGRAMS, FORWARD), y


def branch_sum_bwd(
    dy: Tensor, a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The launch, and da, db and the programs' shares of the scales' gradients (programs, 2, H, D), fp32."""
    da, db = torch.empty_like(a), torch.empty_like(b)
    programs = min(BACKWARD_PROGRAMS, a.shape[0] * a.shape[1])
    parts = a.new_empty(programs, 2, *a.shape[2:], dtype=torch.float32)
    tensors = {"p_dy": dy, "p_a": a, "p_b": b, "p_weight_a": weight_a, "p_weight_b": weight_b}
    tensors |= {"p_da": da, "p_db": db, "p_parts": parts}
    return _launch(branch_sum_bwd_kernel, tensors, eps, programs, BACKWARD), da, db, parts
