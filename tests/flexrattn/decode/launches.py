"""Every kernel of a decode step as it is launched for a model of the paper's heads: nothing is allocated."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flexrattn.decode.clock import launch_clock, launch_likeliest
from flexrattn.decode.fast import Tuning
from flexrattn.decode.glue import (
    Unscaled,
    launch_add_norm,
    launch_embed,
    launch_gate,
    launch_heads,
)
from flexrattn.decode.product import FusedProducts, Shape, launch_row_product
from scan_kernels.kernels.decode_attention import LinearBranch, SoftmaxBranch, launch_decode_attention_fwd
from scan_kernels.kernels.decode_combine import launch_decode_combine
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
    phi_q = empty(B, H, 2 * D, dtype=fp32)
    cases = (
        ("ring", 1, 512),
        ("ring, 64 rows", 64, 512),
        ("ring, late", 256, 512),
        ("all", 64, None),
        ("alone", 64, None),
    )
    for name, rows, window in cases:
        softmax = SoftmaxBranch(q=q, k=k, v=v, window=window, scale=0.1, splits=3) if name != "alone" else None
        linear = LinearBranch(
            phi_q=phi_q,
            phi_k=empty(B, G, 1 if window is None else S - window, 2 * D, dtype=fp32),
            v=empty(B, G, D, dtype=dtype) if window is None else v,
            state=empty(B, G, 2 * D, D, dtype=fp32),
            start=empty(H, 2 * D, D, dtype=fp32) if options else None,
            window=window or 0,
            all_features=name == "ring, late",
            table=table,
            k_scale=scale if options else None,
            absorbed=None if window is None else length,
            absorbed_after=None if window is None else length,
        )
        tuning = Tuning.measured(rows).of_both_branches()
        both = softmax, None if name == "all" else linear
        launch, parts = launch_decode_attention_fwd(*both, length, active, **(tuning if both[1] else {}))
        yield f"attention {name}", launch
        launch = launch_decode_combine(
            parts, both[1], length, active, softmax_weight=norm, linear_weight=norm, eps=1e-8, out_BHD=q
        )
        yield f"combine {name}", launch
    yield "clock", launch_clock(length, active, length, length, length, window=512, fold_every=8, last=True)
    yield "likeliest", launch_likeliest(empty(B, 49152, dtype=dtype), length)
    x = empty(B, W, dtype=dtype)
    yield "add_norm", launch_add_norm(x, x, empty(W, dtype=dtype), 1e-6, x)
    if dtype == torch.bfloat16:
        ffn, norm_W, table = 6656, empty(W), empty(49152, W)
        qkv, wo, gate_up, w2 = empty(3072, W), empty(W, W), empty(2 * ffn, W), empty(W, ffn)
        for rows in (1, 64):
            weights = [(qkv, False), (wo, False), (w2, False), (gate_up, True)]
            products = FusedProducts.build(weights, rows=rows, W=W, multiprocessors=132)
            assert products is not None
            x, gated = products.x, empty(rows, ffn)
            yield "embed", launch_embed(empty(rows, dtype=torch.int64), table, norm_W, products.h, x, products.squares)
            for name, weight in (("q, k, v", qkv), ("output", wo)):
                parts = empty(3, rows, len(weight), dtype=fp32)
                yield name, products.launch(x, weight, products._shape(weight), out=parts)
            yield "residual", products.launch_residual(empty(4, rows, W, dtype=fp32), norm_W)
            if rows == 1:
                yield "output, one row", launch_row_product(x, wo, products._residual(norm_W))
            shape = products._shape(gate_up, gated=True)
            yield "gate, up", products.launch(x, gate_up, shape, norm_eps=1e-6, activation="gelu", out=gated)
            yield "residual at once", products.launch(gated, w2, Shape(block_n=products.square), next_norm_W=norm_W)
            shape = products._shape(table, whole=True)
            yield "words", products.launch(x, table, shape, norm_eps=1e-6, out=empty(rows, 49152))
    yield "gate", launch_gate(empty(B, 2 * 6656, dtype=dtype), empty(B, 6656, dtype=dtype), activation="gelu")
    parts = Unscaled(
        parts=empty(2, B, (H + 2 * G) * D, dtype=fp32), squares=empty(32, B, dtype=fp32), eps=1e-6, W=W, dtype=dtype
    )
    qkv = empty(B, (H + 2 * G) * D, dtype=dtype)
    for name, given, cache in (("heads", qkv, (k, v)), ("heads alone", qkv, None), ("heads of parts", parts, (k, v))):
        yield (
            name,
            launch_heads(
                given,
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
                absorbed_after_B=None if cache is None else length,
            )[0][0],
        )
