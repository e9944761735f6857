"""Masks as FlexAttention block masks. This file alone calls torch's `create_block_mask`.

A block mask lists for every block of queries the blocks of keys that are kept whole ("full": the kernel skips the mask)
and kept in part ("partial": the kernel evaluates the mask). Two routes lead to the same lists:

- closed form, for masks whose `info` is exact (causal, sliding_window, document, and all_of them): a block pair is
  judged by its corners. Time and memory in (T / block_size)^2, and no host sync.
- evaluation, for every other mask: torch's builder looks at every pair. It wants the whole T x T at once (int64
  temporaries included, 10 GB at T = 32k), so it is run on strips of query blocks that stay below EVALUATED_PAIRS.
"""

import threading
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from score_mods.arguments import check_whole_number
from score_mods.info import MaskInfo, MaskMod, check_sizes, fingerprint, is_static, mask_info, resolve_device

# About 300 MB of temporaries for a mask that subtracts int64 indices.
EVALUATED_PAIRS = 2**25
CACHED_BLOCK_MASKS = 32

_cache: OrderedDict[Hashable, BlockMask] = OrderedDict()
_cache_lock = threading.Lock()


def build_block_mask(
    mask_mod: MaskMod,
    *,
    batch: int | None = None,
    heads: int | None = None,
    q_len: int,
    kv_len: int,
    device: torch.device | str,
    block_size: int = 128,
) -> BlockMask:
    """The BlockMask of `mask_mod`, of shape (batch or 1, heads or 1, q_len, kv_len).

    Lengths need not fill their blocks.
    None for `batch` or `heads` is a mask that does not depend on it: FlexAttention broadcasts it.
    Masks that carry a MaskInfo and read no document ids are cached (the last 32): the same mask, sizes and device give
    the same BlockMask object. Everything else is built anew by each call, as what it reads may have changed.

    Raises ValueError where the sizes or the device do not fit the mask's document ids.
    """
    check_whole_number("block_size", block_size, at_least=1, meaning="queries and keys of a block")
    device = resolve_device(device)
    check_sizes(mask_mod, batch=batch, q_len=q_len, kv_len=kv_len, device=device)
    key = (fingerprint(mask_mod), batch, heads, q_len, kv_len, device, block_size) if is_static(mask_mod) else None
    if key is not None:
        with _cache_lock:
            if key in _cache:
                _cache.move_to_end(key)
                return _cache[key]

    info = mask_info(mask_mod)
    # A validator may run under inference_mode; its tensors could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        if info is not None and info.exact:
            block_mask = _by_closed_form(mask_mod, info, batch or 1, heads or 1, q_len, kv_len, device, block_size)
        else:
            block_mask = _by_evaluation(mask_mod, batch or 1, heads or 1, q_len, kv_len, device, block_size)

    # Fake tensors (tracing, memory estimates) must not outlive their mode.
    if key is not None and type(block_mask.kv_indices) is Tensor:
        with _cache_lock:
            _cache[key] = block_mask
            while len(_cache) > CACHED_BLOCK_MASKS:
                _cache.popitem(last=False)
    return block_mask


def clear_block_mask_cache() -> None:
    """Forget the cached block masks."""
    with _cache_lock:
        _cache.clear()


def _by_closed_form(
    mask_mod: MaskMod,
    info: MaskInfo,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    device: torch.device,
    block_size: int,
) -> BlockMask:
    q_first, q_last, q_whole = _blocks(q_len, block_size, device)
    kv_first, kv_last, kv_whole = _blocks(kv_len, block_size, device)
    # t - j takes every value from the smallest to the largest in a block pair.
    smallest = q_first[:, None] - kv_last
    largest = q_last[:, None] - kv_first
    # As in torch, a block that juts out over the end is never full.
    full = q_whole[:, None] & kv_whole
    kept = torch.ones_like(full)
    if info.causal:
        kept = kept & (largest >= 0)
        full = full & (smallest >= 0)
    if info.window is not None:
        kept = kept & (smallest <= info.window)
        full = full & (largest <= info.window)
    kept, full = kept[None], full[None]
    for ids in info.documents:
        q_low, q_high = _id_range(ids, q_len, block_size)
        kv_low, kv_high = _id_range(ids, kv_len, block_size)
        # Where ids never decrease, two blocks' ranges meet iff their nearest pair has one id, and the nearest pair is
        # inside the window first: so each condition can be asked alone. Where ids do decrease, `kept` may be too much.
        kept = kept & (q_low[:, :, None] <= kv_high[:, None]) & (kv_low[:, None] <= q_high[:, :, None])
        full = (
            full & (q_low == q_high)[:, :, None] & (kv_low == kv_high)[:, None] & (q_low[:, :, None] == kv_low[:, None])
        )
    shape = (batch, heads, *kept.shape[1:])
    partial_num, partial_indices = _ordered((kept & ~full)[:, None].expand(shape))
    full_num, full_indices = _ordered(full[:, None].expand(shape))
    return BlockMask.from_kv_blocks(
        partial_num,
        partial_indices,
        full_num,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
    )


def _blocks(length: int, block_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First and last position of each block, and whether the block is filled."""
    first = torch.arange(0, length, block_size, device=device)
    end = first + block_size
    return first, end.clamp(max=length) - 1, end <= length


def _id_range(ids_BT: Tensor, length: int, block_size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest document id of each block, (B, blocks) each."""
    blocks = -(-length // block_size)
    # The last block is filled up with its own last id.
    positions = torch.arange(blocks * block_size, device=ids_BT.device).clamp(max=length - 1)
    ids = ids_BT[:, positions].view(ids_BT.shape[0], blocks, block_size)
    return ids.amin(dim=-1), ids.amax(dim=-1)


def _ordered(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row chose, and their columns in ascending order before the others."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    return chosen.sum(dim=-1, dtype=torch.int32), order.to(torch.int32)


def _by_evaluation(
    mask_mod: MaskMod, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device, block_size: int
) -> BlockMask:
    strip = max(1, EVALUATED_PAIRS // (batch * heads * kv_len * block_size)) * block_size
    if strip >= q_len:
        return create_block_mask(mask_mod, batch, heads, q_len, kv_len, device, BLOCK_SIZE=block_size)

    rows = []
    for start in range(0, q_len, strip):

        def rows_from_start(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor, start: int = start) -> Tensor:
            return mask_mod(b, h, q_idx + start, kv_idx)

        length = min(strip, q_len - start)
        part = create_block_mask(rows_from_start, batch, heads, length, kv_len, device, BLOCK_SIZE=block_size)
        assert part.full_kv_num_blocks is not None
        assert part.full_kv_indices is not None
        rows.append((part.kv_num_blocks, part.kv_indices, part.full_kv_num_blocks, part.full_kv_indices))
    partial_num, partial_indices, full_num, full_indices = (
        torch.cat(lists, dim=2) for lists in zip(*rows, strict=True)
    )
    return BlockMask.from_kv_blocks(
        partial_num,
        partial_indices,
        full_num,
        full_indices,
        BLOCK_SIZE=block_size,
        mask_mod=mask_mod,
        seq_lengths=(q_len, kv_len),
    )
