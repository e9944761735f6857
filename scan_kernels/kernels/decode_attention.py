"""Decode: both branches of one token in one launch, so that what bounds both, reading the cache, never pauses.

The first programs of a KV head read its state and the pending keys behind it (decode_state.py), the others its keys and
values (decode_softmax.py); a layer may have one branch alone. Their parts are put together in decode_combine.py.

Letters: B rows, G KV heads, R query heads of a KV head, S slots, D width of a head; F = D or 2D features, P features of
pending keys.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.decode_softmax import softmax_split
from scan_kernels.kernels.decode_state import map_options, pending_keys, state_block
from scan_kernels.kernels.launch import Launch, precision


@triton.jit
def decode_attention_fwd_kernel(
    q,
    k,
    v,
    length,
    active,
    partial,
    partial_max,
    partial_sum,
    phi_q,
    phi_k,
    state,
    start,
    read,
    table,
    k_scale,
    pending_read,
    absorbed,
    absorbed_after,
    S,
    P,
    window,
    splits,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    WINDOWED: tl.constexpr,
    RING: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    STATE_PROGRAMS: tl.constexpr,
    PENDING_PROGRAMS: tl.constexpr,
    PENDING_TILE: tl.constexpr,
    MAP: tl.constexpr,
    HALVES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if program < STATE_PROGRAMS:
        if state is not None:
            state_block(
                phi_q,
                phi_k,
                v,
                state,
                start,
                read,
                active,
                absorbed,
                absorbed_after,
                program,
                bg,
                S,
                P,
                G=G,
                R=R,
                F=F,
                DV=D,
                RING=RING,
                BLOCK_H=BLOCK_H,
                BLOCK_P=BLOCK_P,
                BLOCK_F=BLOCK_F,
                BLOCK_V=BLOCK_V,
                STAGES=STAGES,
            )
    elif program < STATE_PROGRAMS + PENDING_PROGRAMS:
        if pending_read is not None:
            pending_keys(
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
                G=G,
                R=R,
                D=D,
                MAP=MAP,
                HALVES=HALVES,
                BLOCK_H=BLOCK_H,
                BLOCK_P=PENDING_TILE,
            )
    else:
        if partial is not None:
            softmax_split(
                q,
                k,
                v,
                length,
                active,
                partial,
                partial_max,
                partial_sum,
                program - STATE_PROGRAMS - PENDING_PROGRAMS,
                bg,
                S,
                window,
                splits,
                scale_log2,
                G=G,
                R=R,
                D=D,
                WINDOWED=WINDOWED,
                BLOCK_R=BLOCK_R,
                BLOCK_S=BLOCK_S,
                PRECISION=PRECISION,
            )


@dataclass(frozen=True, kw_only=True)
class SoftmaxBranch:
    """q (B, H, D), k and v (B, G, S, D): a ring, or, where window is None, an array."""

    q: Tensor
    k: Tensor
    v: Tensor
    window: int | None
    scale: float
    splits: int


@dataclass(frozen=True, kw_only=True)
class LinearBranch:
    """phi_q (B, H, F), phi_k (B, G, P, F), state (B, G, F, D), all fp32, start the same (H, F, D) or None.

    v: the ring (B, G, S, D) with absorbed and absorbed_after; without these the token's own (B, G, D), phi_k of P = 1.
    phi_k: of the keys that enter the state; if all_features of all that are not in it. Otherwise a program makes those
    from the ring: table (positions, 2D) has the ring's rotations, if it has any; k_scale (D,) or None.
    """

    phi_q: Tensor
    phi_k: Tensor
    v: Tensor
    state: Tensor
    start: Tensor | None = None
    window: int = 0
    all_features: bool = False
    feature_map: str = "softmax"
    table: Tensor | None = None
    k_scale: Tensor | None = None
    absorbed: Tensor | None = None
    absorbed_after: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the kernel leaves, all fp32, None for a branch that is not there.

    softmax: sums (B, G, splits, R, D), maxima and weights (B, G, splits, R). read, pending: (B, H, D), what the state
    and, unless their features are given, the keys behind it give.
    """

    softmax: tuple[Tensor, Tensor, Tensor] | None
    read: Tensor | None
    pending: Tensor | None


def launch_decode_attention_fwd(
    softmax: SoftmaxBranch | None,
    linear: LinearBranch | None,
    length_B: Tensor,
    active_B: Tensor,
    *,
    block_s: int = 64,
    num_warps: int = 4,
    num_stages: int = 3,
    block_f: int = 16,
    block_v: int = 32,
    state_stages: int = 3,
) -> tuple[Launch, Parts]:
    """The launch and its outputs; one branch may be None.

    num_stages, block_s: of the loop over the slots. state_stages, block_f, block_v: of the loop over a state's
    features, for which one warp is fastest: sums across warps take longer there than all the rest.
    """
    args: dict[str, Any] = dict.fromkeys(
        ("q", "k", "partial", "partial_max", "partial_sum", "phi_q", "phi_k", "state", "start", "read")
    )
    args |= dict.fromkeys(("table", "k_scale", "pending_read"))
    args |= {"absorbed": None, "absorbed_after": None, "S": 0, "P": 0, "window": 0, "splits": 0, "scale_log2": 0.0}
    options = {"R": 1, "F": 0, "WINDOWED": False, "RING": False, "BLOCK_R": 16, "BLOCK_S": 16, "STATE_PROGRAMS": 0}
    options |= {"PENDING_PROGRAMS": 0, "MAP": 0, "HALVES": 1}
    parts, read, pending, programs, pending_tile = None, None, None, 0, 8
    if softmax is not None:
        B, H, D = softmax.q.shape
        G, S = softmax.k.shape[1:3]
        R, v = H // G, softmax.v
        # Three stages of keys and values fit into the shared memory of every GPU, and a tile of fp32 into registers.
        most, tile = (32, 8192) if v.dtype == torch.float32 else (64, 16384)
        block_s = max(16, min(block_s, most, tile // (D * v.element_size())))
        partial = torch.empty(B, G, softmax.splits, R, D, dtype=torch.float32, device=v.device)
        partial_max = torch.empty(B, G, softmax.splits, R, dtype=torch.float32, device=v.device)
        parts = partial, partial_max, torch.empty_like(partial_max)
        args |= {
            "q": softmax.q,
            "k": softmax.k,
            "partial": parts[0],
            "partial_max": parts[1],
            "partial_sum": parts[2],
            "S": S,
            # A full array's oldest key is visible, too.
            "window": 0 if softmax.window is None else softmax.window,
            "splits": softmax.splits,
            "scale_log2": softmax.scale * math.log2(math.e),
        }
        options |= {
            "R": R,
            "WINDOWED": softmax.window is not None,
            "BLOCK_R": max(16, triton.next_power_of_2(R)),
            "BLOCK_S": block_s,
        }
        programs += softmax.splits
    if linear is not None:
        B, H, F = linear.phi_q.shape
        G, D = linear.state.shape[1], linear.state.shape[3]
        v, ring = linear.v, linear.absorbed is not None
        read = torch.empty(B, H, D, dtype=torch.float32, device=v.device)
        block_f, block_v = min(block_f, F), min(block_v, D)
        if linear.start is not None:
            # It comes for every head, and takes the registers and the shared memory of more stages and keys.
            state_stages, pending_tile = min(state_stages, 3), 4
        if softmax is None:
            state_stages = min(state_stages, 3)
        args |= {
            "phi_q": linear.phi_q,
            "phi_k": linear.phi_k,
            "state": linear.state,
            "start": linear.start,
            "read": read,
            "absorbed": linear.absorbed,
            "absorbed_after": linear.absorbed_after,
            "S": v.shape[2] if ring else 0,
            "P": linear.phi_k.shape[2],
        }
        options |= {
            "R": H // G,
            "F": F,
            "RING": ring,
            "STATE_PROGRAMS": D // block_v,
            **map_options(linear.feature_map),
        }
        programs += D // block_v
        if ring and linear.phi_k.shape[2] > 1 and not linear.all_features:
            pending = torch.empty_like(read)
            args |= {"table": linear.table, "k_scale": linear.k_scale, "pending_read": pending}
            options["PENDING_PROGRAMS"] = 1
            programs += 1
    args |= {"v": v, "length": length_B, "active": active_B.view(torch.uint8), "G": G, "D": D}
    args |= options | {
        "BLOCK_H": triton.next_power_of_2(options["R"]),
        "BLOCK_P": min(8, triton.next_power_of_2(max(args["P"], 1))),
        "PENDING_TILE": min(pending_tile, triton.next_power_of_2(max(args["P"] - 1, 1))),
        "BLOCK_F": block_f,
        "BLOCK_V": block_v,
        "STAGES": state_stages,
        "PRECISION": precision(v.dtype),
    }
    if softmax is not None:
        # Products of fp32 are made of single multiplications, and their operands take more registers than a warp has.
        num_warps = max(num_warps, 4 if v.dtype == torch.float32 else D // 128)
    launch = Launch(
        decode_attention_fwd_kernel, (programs, B * G), args, {"num_warps": num_warps, "num_stages": num_stages}
    )
    return launch, Parts(softmax=parts, read=read, pending=pending)
