"""How many pairs a mask keeps, without the T x T matrix where its blocks are known."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from score_mods.block_masks import build_block_mask
from score_mods.info import MaskMod, documents_in, fingerprint, is_static, mask_info

BLOCK = 128
# Pairs that are evaluated at a time, to bound the memory.
EVALUATED_PAIRS = 2**23
REMEMBERED = 64

SKIPPED, PARTIAL, FULL = 0, 1, 2

_counts: OrderedDict[Hashable, int] = OrderedDict()


def kept_pairs(mask: MaskMod, seq_len: int) -> int:
    """Pairs (t, j) with t, j < seq_len that the mask keeps, of one batch row and head; exact, on the CPU.

    Masks of t - j alone are counted by their gaps, the others by their blocks: only partial ones are looked into.
    """
    key = (fingerprint(mask), seq_len) if is_static(mask) else None
    if key is not None and key in _counts:
        return _counts[key]
    info = mask_info(mask)
    if info is not None and info.relative and not info.documents:
        count = _by_gaps(mask, seq_len)
    else:
        block_mask = build_block_mask(mask, batch=1, q_len=seq_len, kv_len=seq_len, device="cpu", block_size=BLOCK)
        blocks = classify_blocks(block_mask)[0, 0]
        # A full block is never one that juts out over the end.
        count = int((blocks == FULL).sum()) * BLOCK**2
        for block_pairs in in_partial_blocks(mask, blocks, seq_len, BLOCK):
            count += int(block_pairs.kept.sum())
    if key is not None:
        _counts[key] = count
        while len(_counts) > REMEMBERED:
            _counts.popitem(last=False)
    return count


def reads_ahead(mask: MaskMod) -> bool:
    """Whether the mask keeps a key after its query; of masks that do not say, the first 64 tokens are looked at."""
    info = mask_info(mask)
    if info is not None and info.causal:
        return False
    index = torch.arange(min([64, *(ids.shape[1] for ids in documents_in(mask))]))
    zero = torch.zeros((), dtype=torch.long)
    return bool(_evaluated(mask, zero, index[:, None], index).triu(1).any())


def _evaluated(mask: MaskMod, b: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    """The mask on tensors of indices that broadcast; it is mapped over them, as FlexAttention does."""
    q_idx, kv_idx = torch.broadcast_tensors(q_idx, kv_idx)
    kept = torch.vmap(mask, in_dims=(None, None, 0, 0))(b, b, q_idx.flatten(), kv_idx.flatten())
    return kept.view(q_idx.shape)


def _by_gaps(mask: MaskMod, seq_len: int) -> int:
    gap = torch.arange(seq_len)
    zero = torch.zeros((), dtype=torch.long)
    behind = _evaluated(mask, zero, gap, torch.zeros_like(gap))
    ahead = _evaluated(mask, zero, torch.zeros_like(gap), gap)
    ahead[0] = False
    return int(((seq_len - gap) * (behind.long() + ahead.long())).sum())


class InBlocks:
    """One part of the partial blocks: `kept` (n, block, block), and the n blocks' rows and columns."""

    def __init__(self, kept: Tensor, row: Tensor, column: Tensor) -> None:
        self.kept, self.row, self.column = kept, row, column


def in_partial_blocks(mask: MaskMod, blocks: Tensor, seq_len: int, block_size: int) -> Iterator[InBlocks]:
    """Yield what the partial blocks of (rows, columns) `blocks` keep, some blocks at a time."""
    rows, columns = (blocks == PARTIAL).nonzero(as_tuple=True)
    inside = torch.arange(block_size)
    zero = torch.zeros((), dtype=torch.long)
    each = max(1, EVALUATED_PAIRS // block_size**2)
    for start in range(0, len(rows), each):
        row, column = rows[start : start + each], columns[start : start + each]
        q_idx = (row[:, None] * block_size + inside)[:, :, None]
        kv_idx = (column[:, None] * block_size + inside)[:, None, :]
        there = (q_idx < seq_len) & (kv_idx < seq_len)
        kept = _evaluated(mask, zero, q_idx.clamp(max=seq_len - 1), kv_idx.clamp(max=seq_len - 1))
        yield InBlocks(kept & there, row, column)


def classify_blocks(block_mask: BlockMask) -> Tensor:
    """SKIPPED, PARTIAL or FULL for each block pair: (batch, heads, query blocks, key blocks), int8."""
    blocks = torch.zeros_like(block_mask.kv_indices, dtype=torch.int8)
    lists = (
        (PARTIAL, block_mask.kv_num_blocks, block_mask.kv_indices),
        (FULL, block_mask.full_kv_num_blocks, block_mask.full_kv_indices),
    )
    for kind, number, indices in lists:
        if number is None or indices is None:
            continue
        listed = torch.arange(indices.shape[-1], device=indices.device) < number[..., None]
        blocks += torch.zeros_like(blocks).scatter_(-1, indices.long(), listed.to(torch.int8) * kind)
    return blocks
