"""Triton kernels at the two ends of a step: its time, and the likeliest token.

Letters: B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flexrattn.decode.cache import DecodeCache
from flexrattn.decode.layer import Clock
from scan_kernels.kernels.launch import Launch


@triton.jit
def clock_kernel(
    length, active, absorbed, position, before, B, window, fold_every, LAST: tl.constexpr, BLOCK: tl.constexpr
):
    """What `make_clock` says of one window, if there is one; where LAST, lengths go on."""
    o_b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_b = o_b < B
    t = tl.load(length + o_b, mask=m_b, other=0)
    runs = tl.load(active + o_b, mask=m_b, other=0) != 0
    tl.store(position + o_b, tl.where(runs, t, 0), mask=m_b)
    if absorbed is not None:
        held = tl.load(absorbed + o_b, mask=m_b, other=0)
        outside = t + 1 - window
        tl.store(before + o_b, held, mask=m_b)
        tl.store(absorbed + o_b, tl.where(runs & (outside - held >= fold_every), outside, held), mask=m_b)
    if LAST:
        tl.store(length + o_b, tl.where(runs, t + 1, t), mask=m_b)


def launch_clock(
    length_B: Tensor,
    active_B: Tensor,
    absorbed_B: Tensor | None,
    position_B: Tensor,
    before_B: Tensor | None,
    *,
    window: int,
    fold_every: int,
    last: bool,
) -> Launch:
    B = len(length_B)
    args = {
        "length": length_B,
        "active": active_B.view(torch.uint8),
        "absorbed": absorbed_B,
        "position": position_B,
        "before": before_B,
        "B": B,
        "window": window,
        "fold_every": fold_every,
        "LAST": last,
        "BLOCK": 128,
    }
    return Launch(clock_kernel, (triton.cdiv(B, 128),), args, {"num_warps": 4, "num_stages": 1})


def start_clock(cache: DecodeCache, active_B: Tensor) -> Clock:
    """`make_clock` and `finish_step` at once: the cache's own clock goes on, and the step keeps how it stood."""
    position_B = torch.empty_like(cache.lengths_B)
    before: dict[int, Tensor] = {}
    common = cache.lengths_B, active_B
    if not cache.absorbed:
        launch_clock(*common, None, position_B, None, window=0, fold_every=1, last=True).run()
    for i, (window, absorbed_B) in enumerate(cache.absorbed.items(), 1):
        before[window] = torch.empty_like(absorbed_B)
        launch_clock(
            *common,
            absorbed_B,
            position_B,
            before[window],
            window=window,
            fold_every=cache.fold_every,
            last=i == len(cache.absorbed),
        ).run()
    return Clock(position_B=position_B, active_B=active_B, absorbed=before, absorbed_after=dict(cache.absorbed))


@triton.jit
def likeliest_kernel(logits, token, V, BLOCK: tl.constexpr, TILES: tl.constexpr):
    """The first of the largest logits of one row; a NaN counts as infinity. TILES: loaded at once, the others later."""
    row = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), -float("inf"), tl.float32)
    first = o_v
    for i in tl.static_range(TILES):
        best, first = _larger(logits + row * V, i * BLOCK + o_v, V, best, first)
    for begin in range(TILES * BLOCK, V, BLOCK):
        best, first = _larger(logits + row * V, begin + o_v, V, best, first)
    tl.store(token + row, tl.min(tl.where(best == tl.max(best, 0), first, V), 0).to(tl.int64))


@triton.jit
def _larger(p_row, o_v, V, best, first):
    x = tl.load(p_row + o_v, mask=o_v < V, other=-float("inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    return tl.maximum(best, x), tl.where(x > best, o_v, first)


def launch_likeliest(logits_BV: Tensor, token_B: Tensor) -> Launch:
    """token = argmax of the logits, which are contiguous."""
    B, V = logits_BV.shape
    block = min(16384, triton.next_power_of_2(V))
    args = {"logits": logits_BV, "token": token_B, "V": V, "BLOCK": block, "TILES": min(4, triton.cdiv(V, block))}
    return Launch(likeliest_kernel, (B,), args, {"num_warps": 16, "num_stages": 1})
