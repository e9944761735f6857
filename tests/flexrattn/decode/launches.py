"""Every kernel of a decode step as it is launched for a model of the paper's heads: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flexrattn.decode.fast import Tuning
from flexrattn.decode.glue import launch_add_norm, launch_gate, launch_heads
from flexrattn.decode.product import launch_split_product
from scan_kernels.kernels.decode_attention import LinearBranch, SoftmaxBranch, launch_decode_attention_fwd
from scan_kernels.kernels.decode_combine import launch_decode_combine
from scan_kernels.kernels.launch import Launch


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    dtype: torch.dtype = torch.bfloat16, D: int = 128, options: bool = False, tuning: dict | None = None
) -> Iterator[tuple[str, Launch]]:
    B, H, G, S, W = 64, 16, 4, 520, 2048
    fp32, tuning = torch.float32, Tuning().of_both_branches()
    length, active = empty(B, dtype=torch.int64), empty(B, dtype=torch.bool)
    k, v = (empty(B, G, S, D, dtype=dtype) for _ in range(2))
    table, scale = empty(8192, 2 * D, dtype=fp32), empty(D, dtype=dtype)
    norm = empty(H, D, dtype=dtype)
    q = empty(B, H, D, dtype=dtype)
    phi_q = empty(B, H, 2 * D, dtype=fp32)
    for name, window in (("ring", 512), ("all", None), ("alone", None)):
        softmax = SoftmaxBranch(q=q, k=k, v=v, window=window, scale=0.1, splits=3) if name != "alone" else None
        linear = LinearBranch(
            phi_q=phi_q,
            phi_k=empty(B, G, 1 if window is None else S - window, 2 * D, dtype=fp32),
            v=empty(B, G, D, dtype=dtype) if window is None else v,
            state=empty(B, G, 2 * D, D, dtype=fp32),
            start=empty(H, 2 * D, D, dtype=fp32) if options else None,
            window=window or 0,
            absorbed=None if window is None else length,
            absorbed_after=None if window is None else length,
        )
        both = softmax, None if name == "all" else linear
        launch, parts = launch_decode_attention_fwd(*both, length, active, **(tuning if both[1] else {}))
        yield f"attention {name}", launch
        launch = launch_decode_combine(
            parts, both[1], length, active, softmax_weight=norm, linear_weight=norm, eps=1e-8, out_BHD=q
        )
        yield f"combine {name}", launch
    x = empty(B, W, dtype=dtype)
    yield "add_norm", launch_add_norm(x, x, empty(W, dtype=dtype), 1e-6, x)
    if dtype != torch.float32:
        launch, parts_BW = launch_split_product(empty(B, 6656, dtype=dtype), empty(W, 6656, dtype=dtype), 4)
        yield "split product", launch
        yield "add parts, norm", launch_add_norm(x, parts_BW, empty(W, dtype=dtype), 1e-6, x)
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
