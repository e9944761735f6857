"""Triton kernels between a step's matrix products: norms, rotation, the cache's new keys, the gate.

Each does what the layers' modules do one after another, in fp32, and rounds where they round.
Letters: B rows, H query heads, G KV heads, D head width, W model width (scan_kernels/README.md).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.launch import Launch


@triton.jit
def add_norm_kernel(h, delta, weight, out, eps, W, BLOCK_W: tl.constexpr):
    """h += delta (where there is one); out = h / sqrt(mean(h^2) + eps) * weight, a row a program."""
    row = tl.program_id(0).to(tl.int64)
    o_w = tl.arange(0, BLOCK_W)
    m_w = o_w < W
    x = tl.load(h + row * W + o_w, mask=m_w, other=0.0)
    if delta is not None:
        # Rounded as the addition of two tensors rounds.
        x = (x.to(tl.float32) + tl.load(delta + row * W + o_w, mask=m_w, other=0.0).to(tl.float32)).to(x.dtype)
        tl.store(h + row * W + o_w, x, mask=m_w)
    y = x.to(tl.float32)
    y = y * tl.rsqrt(tl.sum(y * y, 0) / W + eps)
    y = y * tl.load(weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    tl.store(out + row * W + o_w, y.to(out.dtype.element_ty), mask=m_w)


def launch_add_norm(h_BW: Tensor, delta_BW: Tensor | None, weight_W: Tensor, eps: float, out_BW: Tensor) -> Launch:
    W = h_BW.shape[1]
    args = {"h": h_BW, "delta": delta_BW, "weight": weight_W, "out": out_BW, "eps": eps, "W": W}
    block = triton.next_power_of_2(W)
    return Launch(
        add_norm_kernel,
        (h_BW.shape[0],),
        args | {"BLOCK_W": block},
        {"num_warps": 8 if block >= 4096 else 4, "num_stages": 1},
    )


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
    q_softmax,
    q_linear,
    k_cache,
    v_cache,
    k_linear,
    v_linear,
    S,
    eps,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
):
    """One head of one row's q, k or v: its norm, its rotation, its places. Outputs that are None are not wanted."""
    head, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, D)
    half: tl.constexpr = D // 2
    o_partner = (o_d + half) % D
    p_x = qkv + (b * (H + 2 * G) + head) * D
    x = tl.load(p_x + o_d)
    dtype = x.dtype
    t = tl.load(length + b)
    runs = tl.load(active + b) != 0
    if head < H + G:
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
            if q_linear is not None:
                z = y
                if q_scale is not None:
                    z = y * tl.load(q_scale + o_d).to(tl.float32)
                tl.store(q_linear + (b * H + head) * D + o_d, z.to(dtype))
        else:
            g = head - H
            if k_cache is not None and runs:
                tl.store(k_cache + ((b * G + g) * S + t % S) * D + o_d, rotated.to(dtype))
            if k_linear is not None:
                z = y
                if k_scale is not None:
                    z = y * tl.load(k_scale + o_d).to(tl.float32)
                tl.store(k_linear + (b * G + g) * D + o_d, z.to(dtype))
    else:
        g = head - H - G
        if v_cache is not None and runs:
            tl.store(v_cache + ((b * G + g) * S + t % S) * D + o_d, x)
        if v_linear is not None:
            tl.store(v_linear + (b * G + g) * D + o_d, x)


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
    args = {"gate_up": gate_up_BW, "out": out_BW, "W": W, "GELU": activation == "gelu", "BLOCK": 1024}
    return Launch(gate_kernel, (triton.cdiv(W, 1024), B), args, {"num_warps": 4, "num_stages": 1})


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
    linear: bool,
) -> tuple[Launch, dict[str, Tensor | None]]:
    """The launch, and its outputs by name: q_softmax, q_linear (B, H, D), k_linear, v_linear (B, G, D).

    cache: k and v (B, G, S, D), which take token t in. linear: q_linear is wanted; without a cache also k and v.
    """
    B = qkv_BX.shape[0]
    alone = cache is None
    outputs: dict[str, Tensor | None] = {
        "q_softmax": None if alone else qkv_BX.new_empty(B, H, D),
        "q_linear": qkv_BX.new_empty(B, H, D) if linear else None,
        "k_linear": qkv_BX.new_empty(B, G, D) if alone else None,
        "v_linear": qkv_BX.new_empty(B, G, D) if alone else None,
    }
    k_cache, v_cache = cache or (None, None)
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
        **outputs,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "S": 1 if k_cache is None else k_cache.shape[2],
        "eps": eps,
        "H": H,
        "G": G,
        "D": D,
    }
    return Launch(heads_kernel, (H + 2 * G, B), args, {"num_warps": 1, "num_stages": 1}), outputs


def row_norm_eps(norm: Any) -> float:
    """nn.RMSNorm's eps, also where it is left to the dtype."""
    eps = norm.eps
    return float(torch.finfo(norm.weight.dtype).eps if eps is None else eps)
