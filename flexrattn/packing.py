"""Packed rows: several documents in one row of T tokens, told apart by their positions.

The data stream writes positions, the model reads document ids. Both directions live here and nowhere else.
Shapes: B batch, T tokens of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def document_ids_from_positions(positions_BT: Tensor) -> Tensor:
    """ids[t] = number of s <= t with positions[s] == 0.

    (B, T) or (T,), integer -> the same shape, int32, non-decreasing along T, equal exactly where two tokens belong to
    one document. The first id is 1 when `positions[..., 0] == 0`, which torchtitan needs as well. No host sync.
    """
    return torch.cumsum(positions_BT == 0, dim=-1, dtype=torch.int32)


def rows_are_whole(positions_BT: Tensor) -> bool:
    """Whether every row is one document from its first token on: positions are 0 there and nowhere else.

    Waits for the device that holds the positions.
    """
    starts_BT = positions_BT == 0
    return bool(starts_BT[:, 0].all() and not starts_BT[:, 1:].any())


def positions_from_lengths(lengths: Sequence[int]) -> Tensor:
    """0..n-1 for each n of `lengths`, concatenated: (sum(lengths),), int64.

    A document that a row border cuts is a segment of its own in the next row and restarts at 0 there, so
    `positions[0] == 0` in every row and no position reaches the row's length (the size of a RoPE cache).
    """
    return torch.cat([torch.arange(length) for length in lengths])
