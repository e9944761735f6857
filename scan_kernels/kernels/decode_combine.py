"""Decode: the parts of both branches put together, normalized by head and added.

    out = norm(sum over splits of 2^(max_i - max) o_i / sum over splits of 2^(max_i - max) s_i) + norm(linear branch)

The linear branch is what the state gave and what the pending keys gave.

Letters: decode_attention.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.decode_attention import Parts
from scan_kernels.kernels.launch import Launch


@triton.jit
def _head_norm(x, weight, eps, D: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight; a row of zeros gives zeros, as in training."""
    mean_square = tl.sum(x * x, 0) / D
    inverse = tl.where(mean_square > 0, tl.rsqrt(mean_square + eps), 0.0)
    return x * inverse * weight


@triton.jit
def decode_combine_kernel(
    partial,
    partial_max,
    partial_sum,
    read,
    pending_read,
    softmax_weight,
    linear_weight,
    out,
    splits,
    eps,
    R: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """norm(softmax branch) + norm(linear branch) of one query head; a branch or its norm may be None."""
    bh = tl.program_id(0).to(tl.int64)
    h, bg, r = bh % H, bh // R, bh % R
    o_d = tl.arange(0, D)
    b_l = tl.zeros((D,), tl.float32)
    if read is not None:
        b_l = tl.load(read + bh * D + o_d)
        if pending_read is not None:
            b_l += tl.load(pending_read + bh * D + o_d)
        if linear_weight is not None:
            b_l = _head_norm(b_l, tl.load(linear_weight + h * D + o_d).to(tl.float32), eps, D)
    if partial is not None:
        o_i = tl.arange(0, BLOCK_SPLITS)
        b_max = -float("inf")
        b_sum = 0.0
        b_o = tl.zeros((D,), tl.float32)
        for first in range(0, splits, BLOCK_SPLITS):
            m_i = first + o_i < splits
            o_part = (bg * splits + first + o_i) * R + r
            each_max = tl.load(partial_max + o_part, mask=m_i, other=-float("inf"))
            each_sum = tl.load(partial_sum + o_part, mask=m_i, other=0.0)
            rows = tl.load(partial + o_part[:, None] * D + o_d[None, :], mask=m_i[:, None], other=0.0)
            new_max = tl.maximum(b_max, tl.max(each_max, 0))
            safe = tl.where(new_max == -float("inf"), 0.0, new_max)
            share = tl.exp2(each_max - safe)
            shrink = tl.exp2(b_max - safe)
            b_sum = b_sum * shrink + tl.sum(share * each_sum, 0)
            b_o = b_o * shrink + tl.sum(share[:, None] * rows, 0)
            b_max = new_max
        b_o = tl.where(b_sum > 0, b_o / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
        if softmax_weight is not None:
            b_o = _head_norm(b_o, tl.load(softmax_weight + h * D + o_d).to(tl.float32), eps, D)
        b_l += b_o
    tl.store(out + bh * D + o_d, b_l.to(out.dtype.element_ty))


def launch_decode_combine(
    parts: Parts,
    *,
    softmax_weight: Tensor | None,
    linear_weight: Tensor | None,
    eps: float,
    out_BHD: Tensor,
) -> Launch:
    """`out` = norm(softmax branch) + norm(linear branch); parts as `launch_decode_attention_fwd` returns them."""
    B, H, D = out_BHD.shape
    partial, partial_max, partial_sum = parts.softmax or (None, None, None)
    splits = 0 if partial is None else partial.shape[2]
    args = {
        "partial": partial,
        "partial_max": partial_max,
        "partial_sum": partial_sum,
        "read": parts.read,
        "pending_read": parts.pending,
        "softmax_weight": softmax_weight,
        "linear_weight": linear_weight,
        "out": out_BHD,
        "splits": splits,
        "eps": eps,
        "R": H if partial is None else partial.shape[3],
        "H": H,
        "D": D,
        "BLOCK_SPLITS": min(64, triton.next_power_of_2(max(splits, 1))),
    }
    # One warp: sums across warps would take longer than all else. Many splits need more registers than it has.
    num_warps = 1 if D <= 128 and splits <= 16 else 4
    return Launch(decode_combine_kernel, (B * H,), args, {"num_warps": num_warps, "num_stages": 1})
