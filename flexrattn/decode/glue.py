"""Triton kernels between a step's matrix products: norms, rotation, the cache's new keys, the gate.

Each does what the layers' modules do one after another, in fp32, and rounds where they round.
Letters: B rows, H query heads, G KV heads, D head width, W model width (scan_kernels/README.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.decode_state import map_options, store_features
from scan_kernels.kernels.launch import Launch

# Of one head in a program: fewer and larger programs start sooner.
HEAD_ROWS = 4


@triton.jit
def add_norm_kernel(h, delta, weight, out, eps, B, W, PARTS: tl.constexpr, BLOCK_W: tl.constexpr):
    """h += the sum of delta's parts (where there is one); out = h / sqrt(mean(h^2) + eps) * weight, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, BLOCK_W)
    m_w = o_w < W
    x = tl.load(h + row * W + o_w, mask=m_w, other=0.0)
    if delta is not None:
        total = tl.load(delta + row * W + o_w, mask=m_w, other=0.0).to(tl.float32)
        for i in tl.static_range(1, PARTS):
            total += tl.load(delta + (i * B + row) * W + o_w, mask=m_w, other=0.0).to(tl.float32)
        # Rounded as the product and the addition of two tensors round.
        x = (x.to(tl.float32) + total.to(x.dtype).to(tl.float32)).to(x.dtype)
        tl.store(h + row * W + o_w, x, mask=m_w)
    y = x.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / W + eps)
    y = y * tl.load(weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    tl.store(out + row * W + o_w, y.to(out.dtype.element_ty), mask=m_w)


def launch_add_norm(h_BW: Tensor, delta: Tensor | None, weight_W: Tensor, eps: float, out_BW: Tensor) -> Launch:
    """delta: (B, W), or (parts, B, W) to be summed."""
    B, W = h_BW.shape
    block = triton.next_power_of_2(W)
    args = {
        "h": h_BW,
        "delta": delta,
        "weight": weight_W,
        "out": out_BW,
        "eps": eps,
        "B": B,
        "W": W,
        "PARTS": 1 if delta is None or delta.dim() == 2 else len(delta),
        "BLOCK_W": block,
    }
    return Launch(add_norm_kernel, (B,), args, {"num_warps": 8 if block >= 4096 else 4, "num_stages": 1})


@triton.jit
def embed_kernel(token, table, weight, h, x, squares, W, BLOCKS: tl.constexpr, BLOCK_W: tl.constexpr):
    """h = the token's row, x = h * weight, and the sum of h^2 as the first of BLOCKS: `product_kernel` goes on."""
    row, rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_w, o_s = tl.arange(0, BLOCK_W), tl.arange(0, BLOCKS)
    m_w = o_w < W
    b_h = tl.load(table + tl.load(token + row) * W + o_w, mask=m_w, other=0.0)
    y = b_h.to(tl.float32)
    tl.store(h + row * W + o_w, b_h, mask=m_w)
    b_x = y * tl.load(weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    tl.store(x + row * W + o_w, b_x.to(x.dtype.element_ty), mask=m_w)
    tl.store(squares + o_s * rows + row, tl.where(o_s == 0, tl.sum(y * y, 0), 0.0))


def launch_embed(
    token_B: Tensor, table_VW: Tensor, weight_W: Tensor, h_BW: Tensor, x_BW: Tensor, squares: Tensor
) -> Launch:
    """squares: (blocks, B) fp32, a power of two of blocks."""
    B, W = h_BW.shape
    args = {
        "token": token_B,
        "table": table_VW,
        "weight": weight_W,
        "h": h_BW,
        "x": x_BW,
        "squares": squares,
        "W": W,
        "BLOCKS": len(squares),
        "BLOCK_W": triton.next_power_of_2(W),
    }
    return Launch(embed_kernel, (B,), args, {"num_warps": 4, "num_stages": 1})


@triton.jit
def _unrotated(p_k, table, t, mask, D: tl.constexpr):
    """Keys of the ring before RoPE (rows, D), fp32. p_k, t, mask: (rows, 1)."""
    o_d = tl.arange(0, D)[None, :]
    x = tl.load(p_k + o_d, mask=mask, other=0.0).to(tl.float32)
    if table is not None:
        half: tl.constexpr = D // 2
        partner = tl.load(p_k + (o_d + half) % D, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(table + t * 2 * D + o_d, mask=mask, other=0.0)
        sin = tl.load(table + t * 2 * D + D + o_d, mask=mask, other=0.0)
        x = x * cos + tl.where(o_d < half, partner, -partner) * sin
    return x


@triton.jit
def _summed(qkv, b, mask, o_x, B, X, PARTS: tl.constexpr):
    """Elements of rows b of the q, k, v product, fp32; its parts may have to be added up."""
    y = tl.load(qkv + b * X + o_x, mask=mask, other=0.0).to(tl.float32)
    for i in tl.static_range(1, PARTS):
        y += tl.load(qkv + (i * B + b) * X + o_x, mask=mask, other=0.0)
    return y


@triton.jit
def _of_all_rows(p, ROWS: tl.constexpr, D: tl.constexpr):
    """A vector at p (1, D) for each row, fp32: a warp that has a row loads its own copy, none is handed around."""
    return tl.load(tl.broadcast_to(p, (ROWS, D))).to(tl.float32)


@triton.jit
def heads_kernel(
    qkv,
    squares,
    q_weight,
    k_weight,
    q_scale,
    k_scale,
    table,
    length,
    active,
    absorbed,
    absorbed_after,
    q_softmax,
    phi_q,
    k_cache,
    v_cache,
    phi_k,
    v_linear,
    B,
    S,
    P,
    window,
    eps,
    norm_eps,
    W,
    first_program,
    PARTS: tl.constexpr,
    SQUARES: tl.constexpr,
    DTYPE: tl.constexpr,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
    PENDING: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One head of ROWS rows' q, k or v: its norm, its rotation, its places. Outputs that are None are not wanted.

    The programs behind those: features of one key of the ring that enters the state in this step, or, with PENDING,
    that is not in the state yet.
    """
    head = tl.program_id(0) + first_program
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    m_b = b < B
    o_d, X = tl.arange(0, D)[None, :], (H + 2 * G) * D
    t = tl.load(length + b, mask=m_b, other=0)
    runs = tl.load(active + b, mask=m_b, other=0) != 0
    if head >= H + 2 * G:
        if absorbed is not None:
            g, i = (head - H - 2 * G) // P, (head - H - 2 * G) % P
            position = tl.load(absorbed + b, mask=m_b, other=0) + i
            end = tl.load(absorbed_after + b, mask=m_b, other=0)
            if PENDING:
                end = tl.where(runs, t - window + 1, end)
            m_k = position < end
            # In most steps no key enters.
            if tl.max(tl.reshape(m_k, (ROWS,)).to(tl.int32), 0) != 0:
                x = _unrotated(k_cache + ((b * G + g) * S + position.to(tl.int32) % S) * D, table, position, m_k, D)
                if k_scale is not None:
                    x = x * _of_all_rows(k_scale + o_d, ROWS, D)
                store_features(phi_k + ((b * G + g) * P + i) * HALVES * D, x, m_k, D, MAP, HALVES)
    else:
        # What is loaded is asked for before the first sum: sums wait, and a load behind them would wait once more.
        if squares is not None:
            b_squares = tl.load(squares + tl.arange(0, SQUARES)[None, :] * B + b, mask=m_b, other=0.0)
        half: tl.constexpr = D // 2
        o_partner = (o_d + half) % D
        o_head = head * D
        y = _summed(qkv, b, m_b, o_head + o_d, B, X, PARTS)
        turned = head < H + G
        partner = _summed(qkv, b, m_b & turned, o_head + o_partner, B, X, PARTS)
        if table is not None:
            cos = tl.load(table + t * 2 * D + o_d, mask=m_b & turned, other=0.0)
            sin = tl.load(table + t * 2 * D + D + o_d, mask=m_b & turned, other=0.0)
        if q_weight is not None:
            weight = k_weight
            if head < H:
                weight = q_weight
            b_weight = _of_all_rows(weight + o_d, ROWS, D)
            b_partner_weight = _of_all_rows(weight + o_partner, ROWS, D)
        if squares is not None:
            inverse = tl.rsqrt(tl.sum(b_squares, 1)[:, None] / W + norm_eps)
            # Rounded as the product rounds.
            y = (y * inverse).to(DTYPE).to(tl.float32)
            partner = (partner * inverse).to(DTYPE).to(tl.float32)
        if head >= H + G:
            g = head - H - G
            if v_cache is not None:
                tl.store(v_cache + ((b * G + g) * S + t.to(tl.int32) % S) * D + o_d, y.to(DTYPE), mask=runs)
            if v_linear is not None:
                tl.store(v_linear + (b * G + g) * D + o_d, y.to(DTYPE), mask=m_b)
        else:
            if q_weight is not None:
                scale = tl.rsqrt(tl.sum(y * y, 1)[:, None] / D + eps)
                y = (y * scale * b_weight).to(DTYPE).to(tl.float32)
                partner = (partner * scale * b_partner_weight).to(DTYPE).to(tl.float32)
            rotated = y
            if table is not None:
                rotated = y * cos + tl.where(o_d < half, -partner, partner) * sin
            if head < H:
                if q_softmax is not None:
                    tl.store(q_softmax + (b * H + head) * D + o_d, rotated.to(DTYPE), mask=m_b)
                if phi_q is not None:
                    if q_scale is not None:
                        y = (y * _of_all_rows(q_scale + o_d, ROWS, D)).to(DTYPE).to(tl.float32)
                    store_features(phi_q + (b * H + head) * HALVES * D, y, m_b, D, MAP, HALVES)
            else:
                g = head - H
                if k_cache is not None:
                    tl.store(k_cache + ((b * G + g) * S + t.to(tl.int32) % S) * D + o_d, rotated.to(DTYPE), mask=runs)
                if v_linear is not None:
                    if k_scale is not None:
                        y = (y * _of_all_rows(k_scale + o_d, ROWS, D)).to(DTYPE).to(tl.float32)
                    store_features(phi_k + (b * G + g) * HALVES * D, y, m_b, D, MAP, HALVES)


@triton.jit
def gate_kernel(gate_up, out, W, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """activation(gate) * up for rows [gate, up]: silu, or gelu in its tanh form."""
    row = tl.program_id(1).to(tl.int64)
    o_w = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_w = o_w < W
    gate = tl.load(gate_up + row * 2 * W + o_w, mask=m_w, other=0.0)
    up = tl.load(gate_up + row * 2 * W + W + o_w, mask=m_w, other=0.0).to(tl.float32)
    x = gate.to(tl.float32)
    if GELU:  # noqa: SIM108 (a branch of the compiler)
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        activated = x * tl.sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    else:
        activated = x * tl.sigmoid(x)
    y = activated.to(gate.dtype).to(tl.float32) * up
    tl.store(out + row * W + o_w, y.to(out.dtype.element_ty), mask=m_w)


def launch_gate(gate_up_BW: Tensor, out_BW: Tensor, *, activation: str) -> Launch:
    B, W = out_BW.shape
    args = {
        "gate_up": gate_up_BW,
        "out": out_BW,
        "W": W,
        "GELU": activation == "gelu",
        "BLOCK": 1024,
    }
    return Launch(gate_kernel, (triton.cdiv(W, 1024), B), args, {"num_warps": 4, "num_stages": 1})


@dataclass(frozen=True, kw_only=True)
class Heads:
    """What `launch_heads` writes beside the cache; None where a layer has no such branch.

    q_softmax (B, H, D) after RoPE. phi_q (B, H, F) and phi_k (B, G, P, F), fp32: of the keys that enter the state in
    this step, or of all that are not in it; without a ring of the token's own, with its v_linear (B, G, D).
    """

    q_softmax: Tensor | None
    phi_q: Tensor | None
    phi_k: Tensor | None
    v_linear: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Unscaled:
    """A product behind a norm: the sum of parts (parts, B, X), fp32, over sqrt(sum of squares (blocks, B) / W + eps).

    dtype: what it is rounded to.
    """

    parts: Tensor
    squares: Tensor
    eps: float
    W: int
    dtype: torch.dtype


_TRITON = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch_heads(
    qkv: Tensor | Unscaled,
    *,
    H: int,
    G: int,
    D: int,
    norms: tuple[Tensor, Tensor, float] | None,
    scales: tuple[Tensor, Tensor] | None,
    table: Tensor | None,
    length_B: Tensor,
    active_B: Tensor,
    cache: tuple[Tensor, Tensor] | None,
    feature_map: str | None,
    window: int | None = None,
    absorbed_B: Tensor | None = None,
    absorbed_after_B: Tensor | None = None,
    pending: bool = False,
) -> tuple[list[Launch], Heads]:
    """The launches in their order, and their outputs.

    cache: k and v (B, G, S, D), which take token t in. feature_map: of the linear branch, if the layer has one; window
    and absorbed_B before and after belong to it and to the ring. pending: features of keys that only later enter.
    """
    dtype, qkv_x = (qkv.dtype, qkv) if isinstance(qkv, Tensor) else (qkv.dtype, qkv.parts)
    norm = qkv if isinstance(qkv, Unscaled) else None
    B, alone, linear = qkv_x.shape[-2], cache is None, feature_map is not None
    k_cache, v_cache = cache or (None, None)
    S = 1 if k_cache is None else k_cache.shape[2]
    behind = 0 if window is None else window
    maps = map_options(feature_map) if feature_map is not None else {"MAP": 0, "HALVES": 1}
    F = maps["HALVES"] * D
    # A ring holds a window and P keys, unless the longest sequence is shorter.
    P = max(S - behind, 1) if absorbed_B is not None else 1
    heads = Heads(
        q_softmax=None if alone else qkv_x.new_empty(B, H, D, dtype=dtype),
        phi_q=qkv_x.new_empty(B, H, F, dtype=torch.float32) if linear else None,
        phi_k=qkv_x.new_empty(B, G, P, F, dtype=torch.float32) if linear else None,
        v_linear=qkv_x.new_empty(B, G, D, dtype=dtype) if alone else None,
    )
    rows = min(HEAD_ROWS, triton.next_power_of_2(B))
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    q_scale, k_scale = scales or (None, None)
    args = {
        "qkv": qkv_x,
        "squares": None if norm is None else norm.squares,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "q_scale": q_scale,
        "k_scale": k_scale,
        "table": table,
        "length": length_B,
        "active": active_B.view(torch.uint8),
        "absorbed": absorbed_B,
        "absorbed_after": absorbed_after_B,
        "q_softmax": heads.q_softmax,
        "phi_q": heads.phi_q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "phi_k": heads.phi_k,
        "v_linear": heads.v_linear,
        "B": B,
        "S": S,
        "P": P,
        "window": behind,
        "eps": eps,
        "norm_eps": 0.0 if norm is None else norm.eps,
        "W": 1 if norm is None else norm.W,
        "first_program": 0,
        "PARTS": 1 if norm is None else len(norm.parts),
        "SQUARES": 1 if norm is None else len(norm.squares),
        "DTYPE": _TRITON[dtype],
        "H": H,
        "G": G,
        "D": D,
        "PENDING": pending,
        "ROWS": rows,
        **maps,
    }
    # A row is a warp.
    options = {"num_warps": rows, "num_stages": 1}
    own, of_ring, blocks = H + 2 * G, 0 if absorbed_B is None else G * P, triton.cdiv(B, rows)
    if of_ring and behind == 0:
        # The token's own key is one of them: the second launch reads what the first writes.
        later = args | {"first_program": own}
        launches = [
            Launch(heads_kernel, (own, blocks), args, options),
            Launch(heads_kernel, (of_ring, blocks), later, options),
        ]
    else:
        launches = [Launch(heads_kernel, (own + of_ring, blocks), args, options)]
    return launches, heads


def row_norm_eps(norm: Any) -> float:
    """nn.RMSNorm's eps, also where it is left to the dtype."""
    eps = norm.eps
    return float(torch.finfo(norm.weight.dtype).eps if eps is None else eps)
