"""Decode: one token of the linear branch. The state is read once a step, and written only when keys enter it.

    o_t = phi(q_t) (S + sum over absorbed <= p <= t - window - 1 of phi(k_p)^T v_p)

The state S holds the keys p < absorbed. What it gives to a query is computed here, a block of features a program, for
all heads of a group; the pending keys behind it are added where the parts are put together (decode_softmax.py), from
features that are made once a step. Where `absorbed_after` says so, all pending keys and key t - window, which the next
query reads, are added to the state, and it is stored. It is fp32 throughout and rounded nowhere.
Without a softmax branch (window None) key t enters before the read, every step.

Letters as in decode_softmax.py; F = D or 2D features, P features of pending keys.
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


def map_options(feature_map: FeatureMap | str) -> dict[str, int]:
    """MAP and HALVES of `store_features`."""
    known = FeatureMap(feature_map)
    return {"MAP": _MAPS[known], "HALVES": 2 if known in PAIRED else 1}


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
def store_features(p_phi, x, D: tl.constexpr, MAP: tl.constexpr, HALVES: tl.constexpr):
    """phi(x) of one vector of D, HALVES * D of fp32, to p_phi on."""
    o_d = tl.arange(0, D)
    tl.store(p_phi + o_d, _phi(x, MAP))
    if HALVES == 2:
        tl.store(p_phi + D + o_d, _phi(-x, MAP))


@triton.jit
def decode_state_fwd_kernel(
    phi_q,
    phi_k,
    v,
    state,
    start,
    out,
    active,
    absorbed,
    absorbed_after,
    S,
    P,
    splits,
    G: tl.constexpr,
    R: tl.constexpr,
    F: tl.constexpr,
    DV: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    split, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b = bg // G
    runs = tl.load(active + b) != 0
    o_f = split * BLOCK_F + tl.arange(0, BLOCK_F)
    o_v = tl.arange(0, DV)
    p_tile = o_f[:, None] * DV + o_v[None, :]
    p_state = state + bg * (F * DV) + p_tile
    # A row that rests reads nothing.
    b_s = tl.load(p_state, mask=runs, other=0.0)
    p_phi_k = phi_k + bg * P * F + o_f
    if not RING:
        value = tl.load(v + bg * DV + o_v).to(tl.float32)
        b_s += tl.load(p_phi_k)[:, None] * value[None, :]
    for r in tl.static_range(R):
        phi = tl.load(phi_q + (bg * R + r) * F + o_f)
        b_r = b_s
        if start is not None:
            h = (bg % G) * R + r
            b_r += tl.load(start + h * (F * DV) + p_tile)
        tl.store(out + ((bg * R + r) * splits + split) * DV + o_v, tl.sum(phi[:, None] * b_r, 0))
    if RING:
        before = tl.load(absorbed + b)
        count = (tl.load(absorbed_after + b) - before).to(tl.int32)
        if count > 0:
            for i in range(0, count):
                value = tl.load(v + (bg * S + (before + i) % S) * DV + o_v).to(tl.float32)
                b_s += tl.load(p_phi_k + i * F)[:, None] * value[None, :]
            tl.store(p_state, b_s)
    elif runs:
        tl.store(p_state, b_s)


def launch_decode_state_fwd(
    phi_q_BHF: Tensor,
    phi_k_BGPF: Tensor,
    v: Tensor,
    state_BGFD: Tensor,
    active_B: Tensor,
    *,
    absorbed_B: Tensor | None = None,
    absorbed_after_B: Tensor | None = None,
    start_HFD: Tensor | None = None,
    block_f: int = 64,
    num_warps: int | None = None,
) -> tuple[Launch, Tensor]:
    """The launch, and its output (B, H, splits, Dv) in fp32, to be summed over the splits of the features.

    v: the ring (B, G, S, D) with absorbed and absorbed_after; without these the token's own (B, G, D), phi_k of P = 1.
    """
    B, H, F = phi_q_BHF.shape
    G, DV = state_BGFD.shape[1], state_BGFD.shape[3]
    block_f = min(block_f, F)
    out = torch.empty(B, H, F // block_f, DV, dtype=torch.float32, device=phi_q_BHF.device)
    args = {
        "phi_q": phi_q_BHF,
        "phi_k": phi_k_BGPF,
        "v": v,
        "state": state_BGFD,
        "start": start_HFD,
        "out": out,
        "active": active_B.view(torch.uint8),
        "absorbed": absorbed_B,
        "absorbed_after": absorbed_after_B,
        "S": 0 if absorbed_B is None else v.shape[2],
        "P": phi_k_BGPF.shape[2],
        "splits": F // block_f,
        "G": G,
        "R": H // G,
        "F": F,
        "DV": DV,
        "RING": absorbed_B is not None,
        "BLOCK_F": block_f,
    }
    # A start state takes as many registers again.
    num_warps = num_warps or (4 if start_HFD is None else 8)
    options = {"num_warps": num_warps, "num_stages": 1}
    return Launch(decode_state_fwd_kernel, (F // block_f, B * G), args, options), out
