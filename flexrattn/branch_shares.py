"""How much each branch of a layer contributes: the RMS of both before their norms, and the scales of the norms.

Measured inside validation's forward passes: between `begin` and `end` each layer adds its branches' sums of squares to
a small tensor, in the graph that is compiled for validation anyway. A training step knows nothing of it (the tensor is
None, and compiled code is chosen by that), and the host waits once, in `end`.
Shapes: B batch, T tokens, H query heads, D head width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flexrattn.head_split import local


def add_squares(squares: Tensor, swa_BTHD: Tensor, rla_BTHD: Tensor, positions_BT: Tensor | None, first: int) -> None:
    """squares += (sum of swa^2, sum of rla^2, how many numbers each), over tokens from position `first` on: those at
    which both branches read something."""
    swa_BTHD, rla_BTHD = local(swa_BTHD), local(rla_BTHD)
    batch, tokens, heads, width = swa_BTHD.shape
    if positions_BT is None:
        positions_BT = torch.arange(tokens, device=swa_BTHD.device).expand(batch, tokens)
    reads_BT = positions_BT >= first
    sums = [torch.where(reads_BT, x.float().square().sum((2, 3)), 0.0).sum() for x in (swa_BTHD, rla_BTHD)]
    squares.add_(torch.stack([*sums, reads_BT.sum().float() * (heads * width)]))


def begin(model_parts: Iterable[torch.nn.Module]) -> None:
    """Let every layer with two branches add to its sums from here on."""
    for _, attention in _layers(model_parts):
        device = local(attention.wo.weight).device
        attention.branch_squares = torch.zeros(3, dtype=torch.float32, device=device)


@torch.no_grad()
def end(model_parts: Iterable[torch.nn.Module]) -> dict[str, float]:
    """TensorBoard's tags and numbers of what was added on all ranks, which must all call this.

    Of layer i: `softmax_rms` and `linear_rms` before the norms, their quotient `linear_over_softmax`, and the mean
    absolute scales of the norms. Nothing of layers whose two branches never read at one token.
    """
    layers = list(_layers(model_parts))
    if not layers:
        return {}
    rows = []
    for _, attention in layers:
        row = [attention.branch_squares]
        attention.branch_squares = None
        for norm in (attention.swa_norm, attention.rla_norm):
            # A rank has a shard of the scales or all of them: sum over count is the mean either way.
            weight = torch.zeros(0) if norm is None else local(norm.weight)
            row.append(weight.abs().sum()[None].to(row[0]))
            row.append(torch.full_like(row[-1], weight.numel()))
        rows.append(torch.cat(row).double())
    sums = torch.stack(rows)
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Ranks hold other tokens or other heads, equally many of each.
        dist.all_reduce(sums)
    found = {}
    for (index, _), (swa, rla, n, swa_scale, n_swa, rla_scale, n_rla) in zip(layers, sums.tolist(), strict=True):
        tag = f"branches/layer_{index:02d}"
        if n:
            found[f"{tag}/softmax_rms"] = (swa / n) ** 0.5
            found[f"{tag}/linear_rms"] = (rla / n) ** 0.5
            if swa:
                found[f"{tag}/linear_over_softmax"] = (rla / swa) ** 0.5
        if n_swa:
            found[f"{tag}/softmax_norm_scale"] = swa_scale / n_swa
        if n_rla:
            found[f"{tag}/linear_norm_scale"] = rla_scale / n_rla
    return found


def _layers(model_parts: Iterable[torch.nn.Module]) -> Iterator[tuple[int, Any]]:
    """(index, attention) of the layers with two branches, whatever wraps their blocks."""
    for part in model_parts:
        for name, module in part.named_modules():
            if hasattr(module, "branch_squares") and module.residual is not None and module.inner_attention is not None:
                found = re.search(r"layers\.(\d+)", name)
                assert found is not None
                yield int(found[1]), module
