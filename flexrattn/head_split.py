"""Heads divided between two branches by KV groups: the even groups to one, the odd to the other, and back together.

Even and odd, so that every tensor-parallel rank has both. Works on what a rank has: whole pairs of groups, in order.
Shapes: B batch, T tokens, H query heads, G key/value heads, D head width (legend: scan_kernels/README.md).
"""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def local(x: torch.Tensor) -> torch.Tensor:
    """What this rank has of x."""
    return x.to_local() if isinstance(x, DTensor) else x


def split_groups(q_BTHD: torch.Tensor, k_BTGD: torch.Tensor, v_BTGD: torch.Tensor) -> tuple[QKV, QKV]:
    """(q, k, v) of the KV groups 0, 2, 4, ... and of the groups 1, 3, 5, ...; G must be even."""
    per_group = q_BTHD.shape[2] // k_BTGD.shape[2]
    q, k, v = (_even_and_odd(x, width) for x, width in ((q_BTHD, per_group), (k_BTGD, 1), (v_BTGD, 1)))
    return (q[0], k[0], v[0]), (q[1], k[1], v[1])


def merge_groups(even_BTHD: torch.Tensor, odd_BTHD: torch.Tensor, per_group: int) -> torch.Tensor:
    """What `split_groups` took apart, of one tensor with `per_group` heads a group: (B, T, 2 H, D)."""
    groups = [local(x).unflatten(2, (-1, per_group)) for x in (even_BTHD, odd_BTHD)]
    return _as_given(torch.stack(groups, 3).flatten(2, 4), even_BTHD)


def _even_and_odd(x_BTHD: torch.Tensor, per_group: int) -> tuple[torch.Tensor, torch.Tensor]:
    even, odd = local(x_BTHD).unflatten(2, (-1, 2, per_group)).unbind(3)
    return _as_given(even.flatten(2, 3), x_BTHD), _as_given(odd.flatten(2, 3), x_BTHD)


def _as_given(part: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """`part` distributed as `given` is."""
    if not isinstance(given, DTensor):
        return part
    return DTensor.from_local(part, given.device_mesh, given.placements, run_check=False)
