"""Decode: one token of the linear branch. The state is read, and written only when keys enter it.

    o_t = phi(q_t) (S + sum over absorbed <= p <= t - window - 1 of phi(k_p)^T v_p)

The state holds the keys p < absorbed. Those behind it are added to the copy in registers, so that all heads of a group
read one state; where `absorbed_after` says so, key t - window is added as well, which the next query reads, and the
state is stored. It is fp32 throughout and rounded nowhere. Keys lie in the ring after RoPE and are turned back here.
Without a softmax branch (`ring` False) key t enters before the read, every step.

A program has all F features of BLOCK_V value columns. Letters as in decode_softmax.py; F = D or 2D features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.feature_maps import PAIRED, FeatureMap
from scan_kernels.kernels.common import LOG2E, RELU, SOFTMAX
from scan_kernels.kernels.launch import Launch

_MAPS = {
    FeatureMap.SOFTMAX: 0,
    FeatureMap.SOFTMAX_SINGLE: 0,
    FeatureMap.RELU: 1,
    FeatureMap.IDENTITY: 2,
}


@triton.jit
def _phi(x, MAP: tl.constexpr):
    """A half of phi of one vector, fp32."""
    if MAP == SOFTMAX:
        e = tl.exp2((x - tl.max(x, 0)) * LOG2E)
        x = e * (1.0 / tl.sum(e, 0))
    elif MAP == RELU:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def _ring_key(p_k, table, k_scale, position, slot, D: tl.constexpr):
    """The key of a slot before RoPE, scaled for the linear branch, fp32."""
    o_d = tl.arange(0, D)
    x = tl.load(p_k + slot * D + o_d).to(tl.float32)
    if table is not None:
        half: tl.constexpr = D // 2
        partner = tl.load(p_k + slot * D + (o_d + half) % D).to(tl.float32)
        cos = tl.load(table + position * 2 * D + o_d)
        sin = tl.load(table + position * 2 * D + D + o_d)
        x = x * cos + tl.where(o_d < half, partner, -partner) * sin
    if k_scale is not None:
        x = x * tl.load(k_scale + o_d).to(tl.float32)
    return x


@triton.jit
def decode_state_fwd_kernel(
    q,
    k,
    v,
    state,
    start,
    table,
    k_scale,
    out,
    length,
    active,
    absorbed,
    absorbed_after,
    S,
    window,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    bg = tl.program_id(1).to(tl.int64)
    b = bg // G
    runs = tl.load(active + b) != 0
    o_d = tl.arange(0, D)
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    p_tile = o_d[:, None] * DV + o_v[None, :]
    p_state = state + bg * (HALVES * D * DV) + p_tile
    b_s = tl.load(p_state)
    b_n = tl.zeros_like(b_s)
    if HALVES == 2:
        b_n = tl.load(p_state + D * DV)
    t = tl.load(length + b)
    stores = runs
    if RING:
        p_k, p_v = k + bg * S * D, v + bg * S * DV
        before = tl.load(absorbed + b)
        stores = tl.load(absorbed_after + b) > before
        pending = tl.where(runs, t - window - before, 0).to(tl.int32)
        for i in range(0, pending):
            position = before + i
            slot = position % S
            x = _ring_key(p_k, table, k_scale, position, slot, D)
            value = tl.load(p_v + slot * DV + o_v).to(tl.float32)
            b_s += _phi(x, MAP)[:, None] * value[None, :]
            if HALVES == 2:
                b_n += _phi(-x, MAP)[:, None] * value[None, :]
    elif runs:
        x = tl.load(k + bg * D + o_d).to(tl.float32)
        value = tl.load(v + bg * DV + o_v).to(tl.float32)
        b_s += _phi(x, MAP)[:, None] * value[None, :]
        if HALVES == 2:
            b_n += _phi(-x, MAP)[:, None] * value[None, :]
    for r in tl.static_range(R):
        x = tl.load(q + (bg * R + r) * D + o_d).to(tl.float32)
        phi = _phi(x, MAP)
        read = tl.sum(phi[:, None] * b_s, 0)
        if start is not None:
            h = (bg % G) * R + r
            p_start = start + h * (HALVES * D * DV) + p_tile
            read += tl.sum(phi[:, None] * tl.load(p_start), 0)
        if HALVES == 2:
            phi = _phi(-x, MAP)
            read += tl.sum(phi[:, None] * b_n, 0)
            if start is not None:
                h = (bg % G) * R + r
                p_start = start + h * (HALVES * D * DV) + p_tile
                read += tl.sum(phi[:, None] * tl.load(p_start + D * DV), 0)
        tl.store(out + (bg * R + r) * DV + o_v, read)
    if stores:
        if RING:
            position = t - window
            slot = position % S
            x = _ring_key(p_k, table, k_scale, position, slot, D)
            value = tl.load(p_v + slot * DV + o_v).to(tl.float32)
            b_s += _phi(x, MAP)[:, None] * value[None, :]
            if HALVES == 2:
                b_n += _phi(-x, MAP)[:, None] * value[None, :]
        tl.store(p_state, b_s)
        if HALVES == 2:
            tl.store(p_state + D * DV, b_n)


def launch_decode_state_fwd(
    q_BHD: Tensor,
    k: Tensor,
    v: Tensor,
    state_BGFD: Tensor,
    length_B: Tensor,
    active_B: Tensor,
    *,
    feature_map: FeatureMap | str,
    window: int | None,
    absorbed_B: Tensor | None = None,
    absorbed_after_B: Tensor | None = None,
    start_HFD: Tensor | None = None,
    table: Tensor | None = None,
    k_scale: Tensor | None = None,
    block_v: int = 32,
    num_warps: int = 4,
) -> tuple[Launch, Tensor]:
    """The launch, and its output (B, H, Dv) in fp32.

    k, v: the ring (B, G, S, D) that holds token t already, or with window None the new ones (B, G, D), scaled.
    q: before RoPE, scaled. table: cos and sin by position (max, 2D), if the ring's keys are rotated.
    """
    B, H, D = q_BHD.shape
    G, _, DV = state_BGFD.shape[1:]
    out = torch.empty(B, H, DV, dtype=torch.float32, device=q_BHD.device)
    block_v = min(block_v, DV)
    args = {
        "q": q_BHD,
        "k": k,
        "v": v,
        "state": state_BGFD,
        "start": start_HFD,
        "table": table,
        "k_scale": k_scale,
        "out": out,
        "length": length_B,
        "active": active_B.view(torch.uint8),
        "absorbed": absorbed_B,
        "absorbed_after": absorbed_after_B,
        "S": 0 if window is None else k.shape[2],
        "window": 0 if window is None else window,
        "G": G,
        "R": H // G,
        "D": D,
        "DV": DV,
        "MAP": _MAPS[FeatureMap(feature_map)],
        "HALVES": 2 if FeatureMap(feature_map) in PAIRED else 1,
        "RING": window is not None,
        "BLOCK_V": block_v,
    }
    options = {"num_warps": num_warps, "num_stages": 1}
    return Launch(decode_state_fwd_kernel, (DV // block_v, B * G), args, options), out
