"""Decode: one query a row over a ring (or an array) of cached keys, split over the slots, and the parts put together.

    o_t = softmax over the slots s with t - window <= p(s) <= t of (q_t . k_s * scale) v_s

Slot s holds the newest position p(s) <= t with p(s) mod S = s; the order of slots does not matter to a softmax.
Letters: B rows, G KV heads, R query heads of a KV head (one tile, since they share keys), S slots, D width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.launch import Launch, precision

LOG2E = 1.4426950408889634


@triton.jit
def decode_softmax_fwd_kernel(
    q,
    k,
    v,
    length,
    active,
    partial,
    partial_max,
    partial_sum,
    S,
    window,
    splits,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one KV head: sums of exp2(score - max) v and of exp2(score - max), and the max."""
    split, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = bg // G
    t = tl.load(length + b)
    o_r, o_d, o_t = tl.arange(0, BLOCK_R), tl.arange(0, D), tl.arange(0, BLOCK_S)
    m_r = o_r < R
    # A row that rests reads nothing.
    used = tl.where(tl.load(active + b) != 0, tl.minimum(t + 1, S), 0).to(tl.int32)
    tiles_a_split = tl.cdiv(tl.cdiv(used, BLOCK_S), splits)
    begin = split * tiles_a_split * BLOCK_S
    end = tl.minimum(begin + tiles_a_split * BLOCK_S, used)
    slot = (t % S).to(tl.int32)
    b_q = tl.load(q + (bg * R + o_r[:, None]) * D + o_d[None, :], mask=m_r[:, None], other=0.0)
    p_k, p_v = k + bg * S * D, v + bg * S * D
    b_max = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    b_o = tl.zeros((BLOCK_R, D), tl.float32)
    for first in range(begin, end, BLOCK_S):
        o_s = first + o_t
        m_s = o_s < end
        # Slots are counted in int32, elements of a long cache are not.
        o_row = o_s.to(tl.int64) * D
        b_k = tl.load(p_k + o_row[None, :] + o_d[:, None], mask=m_s[None, :], other=0.0)
        b_v = tl.load(p_v + o_row[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0)
        visible = m_s
        if WINDOWED:
            age = slot - o_s
            age = tl.where(age < 0, age + S, age)
            visible = visible & (age <= window)
        score = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2
        score = tl.where(visible[None, :], score, -float("inf"))
        new_max = tl.maximum(b_max, tl.max(score, 1))
        # A tile may show nothing: its exponents would be inf - inf.
        safe = tl.where(new_max == -float("inf"), 0.0, new_max)
        weight = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(b_max - safe)
        b_sum = b_sum * shrink + tl.sum(weight, 1)
        b_o = b_o * shrink[:, None] + tl.dot(weight.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = new_max
    o_part = (bg * splits + split) * R + o_r
    tl.store(partial + o_part[:, None] * D + o_d[None, :], b_o, mask=m_r[:, None])
    tl.store(partial_max + o_part, b_max, mask=m_r)
    tl.store(partial_sum + o_part, b_sum, mask=m_r)


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
    linear,
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
    state_splits,
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

    The linear branch is what the state gave, and, with a ring, the pending keys by their features.
    """
    bh = tl.program_id(0).to(tl.int64)
    h = bh % H
    bg, r = bh // R, bh % R
    o_d, o_i = tl.arange(0, D), tl.arange(0, BLOCK_SPLITS)
    total = tl.zeros((D,), tl.float32)
    if partial is not None:
        b_max = -float("inf")
        for first in range(0, splits, BLOCK_SPLITS):
            m_i = first + o_i < splits
            o_part = (bg * splits + first + o_i) * R + r
            b_max = tl.maximum(b_max, tl.max(tl.load(partial_max + o_part, mask=m_i, other=-float("inf")), 0))
        b_max = tl.where(b_max == -float("inf"), 0.0, b_max)
        b_sum = 0.0
        b_o = tl.zeros((D,), tl.float32)
        for first in range(0, splits, BLOCK_SPLITS):
            m_i = first + o_i < splits
            o_part = (bg * splits + first + o_i) * R + r
            share = tl.exp2(tl.load(partial_max + o_part, mask=m_i, other=-float("inf")) - b_max)
            b_sum += tl.sum(share * tl.load(partial_sum + o_part, mask=m_i, other=0.0), 0)
            rows = tl.load(partial + o_part[:, None] * D + o_d[None, :], mask=m_i[:, None], other=0.0)
            b_o += tl.sum(share[:, None] * rows, 0)
        b_o = tl.where(b_sum > 0, b_o / tl.where(b_sum > 0, b_sum, 1.0), 0.0)
        if softmax_weight is not None:
            b_o = _head_norm(b_o, tl.load(softmax_weight + h * D + o_d).to(tl.float32), eps, D)
        total += b_o
    if linear is not None:
        b_l = tl.zeros((D,), tl.float32)
        for i in range(0, state_splits):
            b_l += tl.load(linear + (bh * state_splits + i) * D + o_d)
        if absorbed is not None:
            b = bh // H
            before = tl.load(absorbed + b)
            pending = tl.where(tl.load(active + b) != 0, tl.load(length + b) - window - before, 0).to(tl.int32)
            o_f = tl.arange(0, F)
            b_q = tl.load(phi_q + bh * F + o_f)
            for first in range(0, pending, BLOCK_P):
                o_p = first + tl.arange(0, BLOCK_P)
                m_p = o_p < pending
                p_k = phi_k + (bg * P + o_p[:, None]) * F + o_f[None, :]
                weight = tl.sum(tl.load(p_k, mask=m_p[:, None], other=0.0) * b_q[None, :], 1)
                p_v = v + (bg * S + (before + o_p[:, None]) % S) * D + o_d[None, :]
                value = tl.load(p_v, mask=m_p[:, None], other=0.0).to(tl.float32)
                b_l += tl.sum(weight[:, None] * value, 0)
        if linear_weight is not None:
            b_l = _head_norm(b_l, tl.load(linear_weight + h * D + o_d).to(tl.float32), eps, D)
        total += b_l
    tl.store(out + bh * D + o_d, total.to(out.dtype.element_ty))


def choose_splits(programs: int, S: int, *, multiprocessors: int, block_s: int = 64, waves: int = 4) -> int:
    """Splits of the slots, so that a GPU has `waves` programs a multiprocessor to do; at most one a tile of slots."""
    return max(1, min(-(-S // block_s), -(-waves * multiprocessors // programs)))


def launch_decode_softmax_fwd(
    q_BHD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    length_B: Tensor,
    active_B: Tensor,
    *,
    window: int | None,
    scale: float,
    splits: int,
    block_s: int | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
) -> tuple[Launch, Tensor, Tensor, Tensor]:
    """The launch and its outputs: sums (B, G, splits, R, D), maxima and weights (B, G, splits, R), all fp32."""
    B, H, D = q_BHD.shape
    G, S = k_BGSD.shape[1:3]
    R = H // G
    if block_s is None:
        # A tile of keys or of values is 16 KiB: three stages of both fit into the shared memory of every GPU.
        block_s = max(16, min(64, 16384 // (D * k_BGSD.element_size())))
    partial = torch.empty(B, G, splits, R, D, dtype=torch.float32, device=q_BHD.device)
    partial_max = torch.empty(B, G, splits, R, dtype=torch.float32, device=q_BHD.device)
    partial_sum = torch.empty_like(partial_max)
    args = {
        "q": q_BHD,
        "k": k_BGSD,
        "v": v_BGSD,
        "length": length_B,
        "active": active_B.view(torch.uint8),
        "partial": partial,
        "partial_max": partial_max,
        "partial_sum": partial_sum,
        "S": S,
        "window": 0 if window is None else window,
        "splits": splits,
        "scale_log2": scale * LOG2E,
        "G": G,
        "R": R,
        "D": D,
        # A full array's oldest key is visible, too.
        "WINDOWED": window is not None,
        "BLOCK_R": max(16, triton.next_power_of_2(R)),
        "BLOCK_S": block_s,
        "PRECISION": precision(q_BHD.dtype),
    }
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return Launch(decode_softmax_fwd_kernel, (splits, B * G), args, options), partial, partial_max, partial_sum


@dataclass(frozen=True, kw_only=True)
class LinearParts:
    """What the linear branch of a step consists of.

    read: (B, H, splits, D) of `launch_decode_state_fwd`. With a ring also its values v (B, G, S, D), the features of
    queries (B, H, F) and pending keys (B, G, P, F), and the clock.
    """

    read: Tensor
    phi_q: Tensor
    phi_k: Tensor
    v: Tensor | None = None
    window: int = 0
    length: Tensor | None = None
    active: Tensor | None = None
    absorbed: Tensor | None = None


def launch_decode_combine(
    partials: tuple[Tensor, Tensor, Tensor] | None,
    linear: LinearParts | None,
    *,
    softmax_weight: Tensor | None,
    linear_weight: Tensor | None,
    eps: float,
    out_BHD: Tensor,
) -> Launch:
    """`out` = norm(softmax branch) + norm(linear branch); partials as `launch_decode_softmax_fwd` returns them."""
    B, H, D = out_BHD.shape
    partial, partial_max, partial_sum = partials or (None, None, None)
    R = 1
    if linear is not None:
        R = H // linear.phi_k.shape[1]
    elif partial is not None:
        R = partial.shape[3]
    args = {
        "partial": partial,
        "partial_max": partial_max,
        "partial_sum": partial_sum,
        "linear": None if linear is None else linear.read,
        "phi_q": None if linear is None else linear.phi_q,
        "phi_k": None if linear is None else linear.phi_k,
        "v": None if linear is None else linear.v,
        "length": None if linear is None else linear.length,
        "active": None if linear is None or linear.active is None else linear.active.view(torch.uint8),
        "absorbed": None if linear is None else linear.absorbed,
        "softmax_weight": softmax_weight,
        "linear_weight": linear_weight,
        "eps": eps,
        "out": out_BHD,
        "splits": 0 if partial is None else partial.shape[2],
        "state_splits": 0 if linear is None else linear.read.shape[2],
        "S": 0 if linear is None or linear.v is None else linear.v.shape[2],
        "P": 0 if linear is None else linear.phi_k.shape[2],
        "window": 0 if linear is None else linear.window,
        "R": R,
        "H": H,
        "D": D,
        "F": 0 if linear is None else linear.phi_q.shape[2],
        "BLOCK_SPLITS": 16,
        "BLOCK_P": 8,
    }
    return Launch(decode_combine_kernel, (B * H,), args, {"num_warps": 4, "num_stages": 1})
