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
def _unrotated(p_k, table, t, D: tl.constexpr):
    """A key of the ring before RoPE, fp32."""
    o_d = tl.arange(0, D)
    x = tl.load(p_k + o_d).to(tl.float32)
    if table is not None:
        half: tl.constexpr = D // 2
        partner = tl.load(p_k + (o_d + half) % D).to(tl.float32)
        cos = tl.load(table + t * 2 * D + o_d)
        sin = tl.load(table + t * 2 * D + D + o_d)
        x = x * cos + tl.where(o_d < half, partner, -partner) * sin
    return x


@triton.jit
def heads_kernel(
    qkv,
    q_weight,
    k_weight,
    q_scale,
    k_scale,
    table,
    length,
    active,
    absorbed,
    q_softmax,
    phi_q,
    k_cache,
    v_cache,
    phi_k,
    v_linear,
    S,
    P,
    window,
    eps,
    first_program,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
):
    """One head of one row's q, k or v: its norm, its rotation, its places. Outputs that are None are not wanted.

    The programs behind those: features of one key of the ring that is not yet in the state.
    """
    head, b = tl.program_id(0) + first_program, tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D)
    t = tl.load(length + b)
    runs = tl.load(active + b) != 0
    if head >= H + 2 * G:
        if absorbed is not None:
            g, i = (head - H - 2 * G) // P, (head - H - 2 * G) % P
            position = tl.load(absorbed + b) + i
            if runs and position <= t - window:
                x = _unrotated(k_cache + ((b * G + g) * S + position % S) * D, table, position, D)
                if k_scale is not None:
                    x = x * tl.load(k_scale + o_d).to(tl.float32)
                store_features(phi_k + ((b * G + g) * P + i) * HALVES * D, x, D, MAP, HALVES)
    elif head >= H + G:
        g = head - H - G
        x = tl.load(qkv + (b * (H + 2 * G) + head) * D + o_d)
        if v_cache is not None and runs:
            tl.store(v_cache + ((b * G + g) * S + t % S) * D + o_d, x)
        if v_linear is not None:
            tl.store(v_linear + (b * G + g) * D + o_d, x)
    else:
        half: tl.constexpr = D // 2
        o_partner = (o_d + half) % D
        p_x = qkv + (b * (H + 2 * G) + head) * D
        x = tl.load(p_x + o_d)
        dtype = x.dtype
        y = x.to(tl.float32)
        partner = tl.load(p_x + o_partner).to(tl.float32)
        if q_weight is not None:
            weight = k_weight
            if head < H:
                weight = q_weight
            inverse = tl.rsqrt(tl.sum(y * y, 0) / D + eps)
            y = (y * inverse * tl.load(weight + o_d).to(tl.float32)).to(dtype).to(tl.float32)
            partner = (partner * inverse * tl.load(weight + o_partner).to(tl.float32)).to(dtype).to(tl.float32)
        rotated = y
        if table is not None:
            cos = tl.load(table + t * 2 * D + o_d)
            sin = tl.load(table + t * 2 * D + D + o_d)
            rotated = y * cos + tl.where(o_d < half, -partner, partner) * sin
        if head < H:
            if q_softmax is not None:
                tl.store(q_softmax + (b * H + head) * D + o_d, rotated.to(dtype))
            if phi_q is not None:
                if q_scale is not None:
                    y = (y * tl.load(q_scale + o_d).to(tl.float32)).to(dtype).to(tl.float32)
                store_features(phi_q + (b * H + head) * HALVES * D, y, D, MAP, HALVES)
        else:
            g = head - H
            if k_cache is not None and runs:
                tl.store(k_cache + ((b * G + g) * S + t % S) * D + o_d, rotated.to(dtype))
            if v_linear is not None:
                if k_scale is not None:
                    y = (y * tl.load(k_scale + o_d).to(tl.float32)).to(dtype).to(tl.float32)
                store_features(phi_k + (b * G + g) * HALVES * D, y, D, MAP, HALVES)


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

    q_softmax (B, H, D) after RoPE. phi_q (B, H, F) and phi_k (B, G, P, F), fp32: of the keys that are not in the state,
    or, without a ring, of the token's own with its v_linear (B, G, D).
    """

    q_softmax: Tensor | None
    phi_q: Tensor | None
    phi_k: Tensor | None
    v_linear: Tensor | None


def launch_heads(
    qkv_BX: Tensor,
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
) -> tuple[list[Launch], Heads]:
    """The launches in their order, and their outputs.

    cache: k and v (B, G, S, D), which take token t in. feature_map: of the linear branch, if the layer has one; window
    and absorbed_B belong to it and to the ring.
    """
    B, alone, linear = qkv_BX.shape[0], cache is None, feature_map is not None
    k_cache, v_cache = cache or (None, None)
    S = 1 if k_cache is None else k_cache.shape[2]
    behind = 0 if window is None else window
    maps = map_options(feature_map) if feature_map is not None else {"MAP": 0, "HALVES": 1}
    F = maps["HALVES"] * D
    # A ring holds a window and P keys, unless the longest sequence is shorter.
    P = max(S - behind, 1) if absorbed_B is not None else 1
    heads = Heads(
        q_softmax=None if alone else qkv_BX.new_empty(B, H, D),
        phi_q=qkv_BX.new_empty(B, H, F, dtype=torch.float32) if linear else None,
        phi_k=qkv_BX.new_empty(B, G, P, F, dtype=torch.float32) if linear else None,
        v_linear=qkv_BX.new_empty(B, G, D) if alone else None,
    )
    q_weight, k_weight, eps = norms or (None, None, 0.0)
    q_scale, k_scale = scales or (None, None)
    args = {
        "qkv": qkv_BX,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "q_scale": q_scale,
        "k_scale": k_scale,
        "table": table,
        "length": length_B,
        "active": active_B.view(torch.uint8),
        "absorbed": absorbed_B,
        "q_softmax": heads.q_softmax,
        "phi_q": heads.phi_q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "phi_k": heads.phi_k,
        "v_linear": heads.v_linear,
        "S": S,
        "P": P,
        "window": behind,
        "eps": eps,
        "first_program": 0,
        "H": H,
        "G": G,
        "D": D,
        **maps,
    }
    options = {"num_warps": 1, "num_stages": 1}
    own, pending = H + 2 * G, 0 if absorbed_B is None else G * P
    if pending and behind == 0:
        # The token's own key is one of them: the second launch reads what the first writes.
        later = args | {"first_program": own}
        launches = [Launch(heads_kernel, (own, B), args, options), Launch(heads_kernel, (pending, B), later, options)]
    else:
        launches = [Launch(heads_kernel, (own + pending, B), args, options)]
    return launches, heads


def row_norm_eps(norm: Any) -> float:
    """nn.RMSNorm's eps, also where it is left to the dtype."""
    eps = norm.eps
    return float(torch.finfo(norm.weight.dtype).eps if eps is None else eps)
