"""Every kernel of a decode step as it is launched for a model of the paper's heads: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flexrattn.decode.glue import launch_add_norm, launch_gate, launch_heads
from scan_kernels.kernels.decode_softmax import LinearParts, launch_decode_combine, launch_decode_softmax_fwd
from scan_kernels.kernels.decode_state import launch_decode_state_fwd
from scan_kernels.kernels.launch import Launch


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(dtype: torch.dtype = torch.bfloat16, D: int = 128, options: bool = False) -> Iterator[tuple[str, Launch]]:
    B, H, G, S, W = 64, 16, 4, 520, 2048
    fp32 = torch.float32
    length, active = empty(B, dtype=torch.int64), empty(B, dtype=torch.bool)
    k, v = (empty(B, G, S, D, dtype=dtype) for _ in range(2))
    table, scale = empty(8192, 2 * D, dtype=fp32), empty(D, dtype=dtype)
    norm = empty(H, D, dtype=dtype)
    q = empty(B, H, D, dtype=dtype)
    for name, window in (("ring", 512), ("all", None)):
        launch, *partials = launch_decode_softmax_fwd(q, k, v, length, active, window=window, scale=0.1, splits=3)
        yield f"softmax {name}", launch
    phi_q = empty(B, H, 2 * D, dtype=fp32)
    for name, ring in (("alone", False), ("ring", True)):
        phi_k = empty(B, G, S - 512 if ring else 1, 2 * D, dtype=fp32)
        launch, read = launch_decode_state_fwd(
            phi_q,
            phi_k,
            v if ring else empty(B, G, D, dtype=dtype),
            empty(B, G, 2 * D, D, dtype=fp32),
            active,
            absorbed_B=length if ring else None,
            absorbed_after_B=length if ring else None,
            start_HFD=empty(H, 2 * D, D, dtype=fp32) if options else None,
        )
        yield f"state {name}", launch
    yield (
        "combine",
        launch_decode_combine(
            (partials[0], partials[1], partials[2]),
            LinearParts(
                read=read,
                phi_q=phi_q,
                phi_k=phi_k,
                v=v,
                window=512,
                length=length,
                active=active,
                absorbed=length,
            ),
            softmax_weight=norm,
            linear_weight=norm,
            eps=1e-8,
            out_BHD=q,
        ),
    )
    x = empty(B, W, dtype=dtype)
    yield "add_norm", launch_add_norm(x, x, empty(W, dtype=dtype), 1e-6, x)
    yield "gate", launch_gate(empty(B, 2 * 6656, dtype=dtype), empty(B, 6656, dtype=dtype), activation="gelu")
    for name, cache in (("heads", (k, v)), ("heads alone", None)):
        yield (
            name,
            launch_heads(
                empty(B, (H + 2 * G) * D, dtype=dtype),
                H=H,
                G=G,
                D=D,
                norms=(scale, scale, 1e-6),
                scales=(scale, scale) if options else None,
                table=None if cache is None else table,
                length_B=length,
                active_B=active,
                cache=cache,
                feature_map="softmax",
                window=None if cache is None else 512,
                absorbed_B=None if cache is None else length,
            )[0][0],
        )
