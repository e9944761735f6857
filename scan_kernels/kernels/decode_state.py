"""Decode: one token of the linear branch. The state is read once a step, and written only when keys enter it.

    o_t = phi(q_t) (S + sum over absorbed <= p <= t - window - 1 of phi(k_p)^T v_p)

The state S holds the keys p < absorbed. What it gives to a query is computed here, a block of columns a program, for
all heads of a group. The pending keys behind it are taken from the ring by another program, or, where the rows are
many, added where the parts are put together (decode_combine.py), from features made before. Where `absorbed_after`
says so, all pending keys and key t - window, which the next query reads, are added to the state, and it is stored. It
is fp32 throughout and rounded nowhere.
Without a softmax branch (window None) key t enters before the read, every step.

Letters: decode_attention.py, whose kernel calls this.
"""

import triton
import triton.language as tl

from scan_kernels.feature_maps import PAIRED, FeatureMap
from scan_kernels.kernels.common import LOG2E, RELU, SOFTMAX

_MAPS = {
    FeatureMap.SOFTMAX: 0,
    FeatureMap.SOFTMAX_SINGLE: 0,
    FeatureMap.RELU: 1,
    FeatureMap.IDENTITY: 2,
}


def map_options(feature_map: FeatureMap | str) -> dict[str, int]:
    """MAP and HALVES of `store_features`."""
    known = FeatureMap(feature_map)
    return {"MAP": _MAPS[known], "HALVES": 2 if known in PAIRED else 1}


@triton.jit
def _phi_rows(x, MAP: tl.constexpr):
    """A half of phi of each row, fp32."""
    if MAP == SOFTMAX:
        e = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2E)
        x = e * (1.0 / tl.sum(e, 1))[:, None]
    elif MAP == RELU:
        x = tl.maximum(x, 0.0)
    return x


@triton.jit
def store_features(p_phi, x, mask, D: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr):
    """phi of the rows of x (rows, D), HALVES * D of fp32 each, to p_phi (rows, 1) on; mask (rows, 1)."""
    o_d = tl.arange(0, D)[None, :]
    tl.store(p_phi + o_d, _phi_rows(x, MAP), mask=mask)
    if HALVES == 2:
        tl.store(p_phi + D + o_d, _phi_rows(-x, MAP), mask=mask)


@triton.jit
def pending_keys(
    phi_q,
    k,
    v,
    table,
    k_scale,
    pending_read,
    length,
    active,
    absorbed,
    bg,
    S,
    window,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What the keys absorbed <= p < t - window of one KV head give to each head's query: (phi(q) . phi(k_p)) v_p."""
    b = bg // G
    before = tl.load(absorbed + b)
    count = tl.where(tl.load(active + b) != 0, tl.load(length + b) - window - before, 0).to(tl.int32)
    o_r, o_d, half = tl.arange(0, BLOCK_H), tl.arange(0, D), D // 2
    b_out = tl.zeros((BLOCK_H, D), tl.float32)
    for first in range(0, count, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        m_p = (o_p < count)[:, None]
        position = before + o_p
        p_row = (bg * S + position.to(tl.int32) % S)[:, None] * D
        x = tl.load(k + p_row + o_d[None, :], mask=m_p, other=0.0).to(tl.float32)
        value = tl.load(v + p_row + o_d[None, :], mask=m_p, other=0.0).to(tl.float32)
        if table is not None:
            # A key of the ring before RoPE.
            partner = tl.load(k + p_row + (o_d[None, :] + half) % D, mask=m_p, other=0.0).to(tl.float32)
            p_table = table + position[:, None] * 2 * D + o_d[None, :]
            cos, sin = tl.load(p_table, mask=m_p, other=0.0), tl.load(p_table + D, mask=m_p, other=0.0)
            x = x * cos + tl.where(o_d[None, :] < half, partner, -partner) * sin
        if k_scale is not None:
            x = x * tl.load(k_scale + o_d).to(tl.float32)[None, :]
        positive, negative = _phi_rows(x, MAP), _phi_rows(-x, MAP)
        for r in tl.static_range(R):
            p_q = phi_q + (bg * R + r) * HALVES * D + o_d
            weight = tl.sum(positive * tl.load(p_q)[None, :], 1)
            if HALVES == 2:
                weight += tl.sum(negative * tl.load(p_q + D)[None, :], 1)
            # Rows behind the last have values of zero.
            given = tl.sum(weight[:, None] * value, 0)
            b_out += tl.where(o_r[:, None] == r, given[None, :], 0.0)
    p_out = pending_read + (bg * R + o_r[:, None]) * D + o_d[None, :]
    tl.store(p_out, b_out, mask=o_r[:, None] < R)


@triton.jit
def state_block(
    phi_q,
    phi_k,
    v,
    state,
    start,
    read,
    active,
    absorbed,
    absorbed_after,
    block,
    bg,
    S,
    P,
    G: tl.constexpr,
    R: tl.constexpr,
    F: tl.constexpr,
    DV: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """BLOCK_V columns of one KV head's state: what they give to each head's query, and the keys that enter."""
    b = bg // G
    runs = tl.load(active + b) != 0
    o_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    p_state = state + bg * (F * DV) + o_v[None, :]
    p_start = start
    if start is not None:
        p_start = start + (bg % G) * R * (F * DV) + o_v[None, :]
    p_phi_q, p_phi_k = phi_q + bg * R * F, phi_k + bg * P * F
    o_r = tl.arange(0, BLOCK_H)
    m_r = o_r < R
    value = tl.zeros((BLOCK_V,), tl.float32)
    if not RING:
        value = tl.load(v + bg * DV + o_v).to(tl.float32)
    # Sums over features stay in their threads until the end: sums across threads are what takes time here.
    b_sum = tl.zeros((BLOCK_H, BLOCK_F, BLOCK_V), tl.float32)
    for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
        o_f = first + tl.arange(0, BLOCK_F)
        # A row that rests reads nothing.
        b_s = tl.load(p_state + o_f[:, None] * DV, mask=runs, other=0.0)
        if not RING:
            b_s += tl.load(p_phi_k + o_f)[:, None] * value[None, :]
            tl.store(p_state + o_f[:, None] * DV, b_s, mask=runs)
        phi = tl.load(p_phi_q + o_r[:, None] * F + o_f[None, :], mask=m_r[:, None], other=0.0)
        if start is not None:
            p_start_r = p_start[None, :, :] + o_r[:, None, None] * (F * DV) + o_f[None, :, None] * DV
            b_start = tl.load(p_start_r, mask=m_r[:, None, None], other=0.0)
            b_sum += phi[:, :, None] * (b_s[None, :, :] + b_start)
        else:
            b_sum += phi[:, :, None] * b_s[None, :, :]
    tl.store(read + (bg * R + o_r[:, None]) * DV + o_v[None, :], tl.sum(b_sum, 1), mask=m_r[:, None])
    if RING:
        before = tl.load(absorbed + b)
        count = (tl.load(absorbed_after + b) - before).to(tl.int32)
        p_v = v + bg * S * DV + o_v[None, :]
        for key in range(0, count, BLOCK_P):
            # A thread may store what another one reads.
            tl.debug_barrier()
            o_p = key + tl.arange(0, BLOCK_P)
            m_p = o_p < count
            values = tl.load(p_v + (before.to(tl.int32) + o_p[:, None]) % S * DV, mask=m_p[:, None], other=0.0).to(
                tl.float32
            )
            for first in tl.range(0, F, BLOCK_F, num_stages=STAGES):
                o_f = first + tl.arange(0, BLOCK_F)
                b_s = tl.load(p_state + o_f[:, None] * DV)
                phi_p = tl.load(p_phi_k + o_p[:, None] * F + o_f[None, :], mask=m_p[:, None], other=0.0)
                b_s += tl.sum(phi_p[:, :, None] * values[:, None, :], 0)
                tl.store(p_state + o_f[:, None] * DV, b_s)
