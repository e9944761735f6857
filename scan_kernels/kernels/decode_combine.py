"""Decode: the parts of both branches put together, normalized by head and added.

    out = norm(sum over splits of 2^(max_i - max) o_i / sum over splits of 2^(max_i - max) s_i) + norm(linear branch)

The linear branch is what the state gave and what the pending keys gave; those may be left to be added here:

    sum over absorbed <= p <= t - window - 1 of (phi(q_t) . phi(k_p)) v_p

Letters: decode_attention.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.decode_attention import LinearBranch, Parts
from scan_kernels.kernels.launch import Launch


@triton.jit
def _head_norm(x, weight, eps, D: tl.constexpr):
    """x / sqrt(mean(x^2) + eps) * weight; a row of zeros gives zeros, as in training."""
    mean_square = tl.sum(x * x, 0) / D
    inverse = tl.where(mean_square > 0, tl.rsqrt(mean_square + eps), 0.0)
    return x * inverse * weight


@triton.jit
def _join(b_max, b_sum, b_o, each_max, each_sum, rows):
    """Some more splits: maxima and sums (splits,), sums of values (splits, D)."""
    new_max = tl.maximum(b_max, tl.max(each_max, 0))
    safe = tl.where(new_max == -float("inf"), 0.0, new_max)
    share = tl.exp2(each_max - safe)
    shrink = tl.exp2(b_max - safe)
    return new_max, b_sum * shrink + tl.sum(share * each_sum, 0), b_o * shrink + tl.sum(share[:, None] * rows, 0)


@triton.jit
def decode_combine_kernel(
    partial,
    partial_max,
    partial_sum,
    read,
    pending_read,
    phi_q,
    phi_k,
    v,
    length,
    active,
    absorbed,
    softmax_weight,
    linear_weight,
    out,
    splits,
    S,
    P,
    window,
    eps,
    R: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """norm(softmax branch) + norm(linear branch) of one query head; a branch or its norm may be None.

    What is loaded is asked for before the first sum: sums wait, and a load behind them would wait once more.
    """
    bh = tl.program_id(0).to(tl.int64)
    h, bg, r = bh % H, bh // R, bh % R
    o_d = tl.arange(0, D)
    b_l = tl.zeros((D,), tl.float32)
    if partial is not None:
        o_i = tl.arange(0, BLOCK_SPLITS)
        o_part = (bg * splits + o_i) * R + r
        b_rows = tl.load(partial + o_part[:, None] * D + o_d[None, :], mask=(o_i < splits)[:, None], other=0.0)
        b_each_max = tl.load(partial_max + o_part, mask=o_i < splits, other=-float("inf"))
        b_each_sum = tl.load(partial_sum + o_part, mask=o_i < splits, other=0.0)
        if softmax_weight is not None:
            b_softmax_weight = tl.load(softmax_weight + h * D + o_d).to(tl.float32)
    if read is not None:
        b_l += tl.load(read + bh * D + o_d)
        if linear_weight is not None:
            b_linear_weight = tl.load(linear_weight + h * D + o_d).to(tl.float32)
        if pending_read is not None:
            b_l += tl.load(pending_read + bh * D + o_d)
        if phi_k is not None:
            b = bh // H
            before = tl.load(absorbed + b)
            pending = tl.where(tl.load(active + b) != 0, tl.load(length + b) - window - before, 0).to(tl.int32)
            b_q = tl.load(phi_q + bh * F + tl.arange(0, F))
            for first in range(0, P, BLOCK_P):
                o_p = first + tl.arange(0, BLOCK_P)
                b_k = tl.load(
                    phi_k + (bg * P + o_p[:, None]) * F + tl.arange(0, F)[None, :], mask=o_p[:, None] < P, other=0.0
                )
                m_p = o_p < pending
                p_v = v + (bg * S + (before.to(tl.int32) + o_p[:, None]) % S) * D + o_d[None, :]
                value = tl.load(p_v, mask=m_p[:, None], other=0.0).to(tl.float32)
                # Behind the pending keys lie features that nobody wrote.
                weight = tl.sum(tl.where(m_p[:, None], b_k * b_q[None, :], 0.0), 1)
                b_l += tl.sum(weight[:, None] * value, 0)
        if linear_weight is not None:
            b_l = _head_norm(b_l, b_linear_weight, eps, D)
    if partial is not None:
        b_max, b_sum, b_o = _join(-float("inf"), 0.0, tl.zeros((D,), tl.float32), b_each_max, b_each_sum, b_rows)
        for first in range(BLOCK_SPLITS, splits, BLOCK_SPLITS):
            m_i = first + o_i < splits
            o_part = (bg * splits + first + o_i) * R + r
            each_max = tl.load(partial_max + o_part, mask=m_i, other=-float("inf"))
            each_sum = tl.load(partial_sum + o_part, mask=m_i, other=0.0)
            rows = tl.load(partial + o_part[:, None] * D + o_d[None, :], mask=m_i[:, None], other=0.0)
            b_max, b_sum, b_o = _join(b_max, b_sum, b_o, each_max, each_sum, rows)
        b_o = tl.where(b_sum > 0, b_o / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
        if softmax_weight is not None:
            b_o = _head_norm(b_o, b_softmax_weight, eps, D)
        b_l += b_o
    tl.store(out + bh * D + o_d, b_l.to(out.dtype.element_ty))


def launch_decode_combine(
    parts: Parts,
    linear: LinearBranch | None,
    length_B: Tensor,
    active_B: Tensor,
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
    late = linear if linear is not None and linear.all_features else None
    P = 0 if late is None else late.phi_k.shape[2]
    args = {
        "partial": partial,
        "partial_max": partial_max,
        "partial_sum": partial_sum,
        "read": parts.read,
        "pending_read": parts.pending,
        "phi_q": None if late is None else late.phi_q,
        "phi_k": None if late is None else late.phi_k,
        "v": None if late is None else late.v,
        "length": length_B,
        "active": active_B.view(torch.uint8),
        "absorbed": None if late is None else late.absorbed,
        "softmax_weight": softmax_weight,
        "linear_weight": linear_weight,
        "out": out_BHD,
        "splits": splits,
        "S": 0 if late is None else late.v.shape[2],
        "P": P,
        "window": 0 if late is None else late.window,
        "eps": eps,
        "R": H if partial is None else partial.shape[3],
        "H": H,
        "D": D,
        "F": 0 if late is None else late.phi_q.shape[2],
        "BLOCK_P": min(8, triton.next_power_of_2(max(P, 1))),
        "BLOCK_SPLITS": min(64, triton.next_power_of_2(max(splits, 1))),
    }
    # One warp: sums across warps would take longer than all else. Many splits need more registers than it has.
    num_warps = 1 if D <= 128 and splits <= 16 else 4
    return Launch(decode_combine_kernel, (B * H,), args, {"num_warps": num_warps, "num_stages": 1})
