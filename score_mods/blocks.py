"""Which block pairs a mask keeps, judged from the corners of the pairs instead of from every pair in them.

A judgement is two bool tensors, broadcastable to (B or 1, query blocks, key blocks): `kept` where a pair of the block
may be kept, `full` where every pair is. It may be careful: `kept` too often costs time, `full` too seldom as well, and
neither changes what is computed, since the kernel evaluates the mask in every block that is kept and not full.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from score_mods.info import MaskInfo, MaskMod, mask_info


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockPairs:
    """All pairs of query and key blocks, and what their positions range over.

    q_low, q_high: smallest and largest position of each query block, (B or 1, rows, 1), `kv_low`, `kv_high` of each key
    block, (B or 1, 1, columns). Positions are indices in the row, or positions in the documents after `at`.
    gap_low, gap_high: smallest and largest index t - j; every number between them occurs.
    """

    q_len: int
    kv_len: int
    block_size: int
    device: torch.device
    q_low: Tensor
    q_high: Tensor
    kv_low: Tensor
    kv_high: Tensor

    @classmethod
    def of(cls, q_len: int, kv_len: int, block_size: int, device: torch.device) -> BlockPairs:
        q_low, q_high = _block_ends(q_len, block_size, device)
        kv_low, kv_high = _block_ends(kv_len, block_size, device)
        return cls(
            q_len=q_len,
            kv_len=kv_len,
            block_size=block_size,
            device=device,
            q_low=q_low[None, :, None],
            q_high=q_high[None, :, None],
            kv_low=kv_low[None, None],
            kv_high=kv_high[None, None],
        )

    @cached_property
    def _gaps(self) -> tuple[Tensor, Tensor]:
        q_low, q_high = _block_ends(self.q_len, self.block_size, self.device)
        kv_low, kv_high = _block_ends(self.kv_len, self.block_size, self.device)
        return (q_low[:, None] - kv_high)[None], (q_high[:, None] - kv_low)[None]

    @property
    def gap_low(self) -> Tensor:
        return self._gaps[0]

    @property
    def gap_high(self) -> Tensor:
        return self._gaps[1]

    @cached_property
    def whole(self) -> Tensor:
        """Blocks that lie inside the sequence. As in torch, one that juts out over the end is never full."""
        q_first = torch.arange(0, self.q_len, self.block_size, device=self.device)
        kv_first = torch.arange(0, self.kv_len, self.block_size, device=self.device)
        return ((q_first + self.block_size <= self.q_len)[:, None] & (kv_first + self.block_size <= self.kv_len))[None]

    def at(self, positions_BT: Tensor) -> BlockPairs:
        """The same blocks, with positions in the documents: (B, T) numbers that restart at 0 with each document."""
        q_low, q_high = _range(positions_BT, self.q_len, self.block_size)
        kv_low, kv_high = _range(positions_BT, self.kv_len, self.block_size)
        return replace(
            self,
            q_low=q_low[:, :, None],
            q_high=q_high[:, :, None],
            kv_low=kv_low[:, None],
            kv_high=kv_high[:, None],
        )

    def same_document(self, ids_BT: Tensor) -> Judgement:
        """Pairs of one document id.

        Where ids never decrease, two blocks' ranges meet iff their nearest pair has one id, and the nearest pair is
        inside a window first: so each condition can be asked alone. Where ids do decrease, `kept` may be too much.
        """
        q_low, q_high = _range(ids_BT, self.q_len, self.block_size)
        kv_low, kv_high = _range(ids_BT, self.kv_len, self.block_size)
        kept = overlap(q_low[:, :, None], q_high[:, :, None], kv_low[:, None], kv_high[:, None])
        full = (q_low == q_high)[:, :, None] & (kv_low == kv_high)[:, None] & (q_low[:, :, None] == kv_low[:, None])
        return kept, full


Judgement = tuple[Tensor, Tensor]
BlockLaw = Callable[[BlockPairs], Judgement]


def overlap(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Whether low..high and other_low..other_high have a number in common."""
    return (low <= other_high) & (other_low <= high)


def can_judge(mask: MaskMod) -> bool:
    """Whether `judge` knows the mask's blocks."""
    info = mask_info(mask)
    return info is not None and (info.exact or info.blocks is not None)


def judge(mask: MaskMod, pairs: BlockPairs) -> Judgement:
    """The mask's judgement; for masks that `can_judge`."""
    info = mask_info(mask)
    assert info is not None
    kept, full = _bounds(info, pairs)
    if info.exact:
        return kept, full
    assert info.blocks is not None
    own_kept, own_full = info.blocks(pairs)
    # A bound holds for every pair that is kept, whatever else the mask asks.
    return kept & own_kept, own_full


def judge_all(masks: Sequence[MaskMod]) -> BlockLaw | None:
    """The law of the pairs that every mask keeps; None where one of the masks cannot be judged."""
    return _combined(masks, torch.logical_and)


def judge_any(masks: Sequence[MaskMod]) -> BlockLaw | None:
    """The law of the pairs that some mask keeps; None where one of the masks cannot be judged."""
    return _combined(masks, torch.logical_or)


def _combined(masks: Sequence[MaskMod], combine: Callable[[Tensor, Tensor], Tensor]) -> BlockLaw | None:
    if not all(map(can_judge, masks)):
        return None

    def blocks(pairs: BlockPairs) -> Judgement:
        kept, full = judge(masks[0], pairs)
        for mask in masks[1:]:
            next_kept, next_full = judge(mask, pairs)
            kept, full = combine(kept, next_kept), combine(full, next_full)
        return kept, full

    return blocks


def _bounds(info: MaskInfo, pairs: BlockPairs) -> Judgement:
    full = pairs.whole
    kept = torch.ones_like(full)
    if info.causal:
        kept, full = kept & (pairs.gap_high >= 0), full & (pairs.gap_low >= 0)
    if info.window is not None:
        kept, full = kept & (pairs.gap_low <= info.window), full & (pairs.gap_high <= info.window)
    for ids in info.documents:
        same_kept, same_full = pairs.same_document(ids)
        kept, full = kept & same_kept, full & same_full
    return kept, full


def _block_ends(length: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First and last index of each block."""
    first = torch.arange(0, length, block_size, device=device)
    return first, (first + block_size).clamp(max=length) - 1


def _range(numbers_BT: Tensor, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each block, (B, blocks) each."""
    blocks = -(-length // block_size)
    # The last block is filled up with its own last number.
    index = torch.arange(blocks * block_size, device=numbers_BT.device).clamp(max=length - 1)
    parts = numbers_BT[:, index].view(numbers_BT.shape[0], blocks, block_size)
    return parts.amin(dim=-1), parts.amax(dim=-1)
