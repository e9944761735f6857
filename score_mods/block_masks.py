"""Masks as FlexAttention block masks. This file alone calls torch's `create_block_mask`.

A block mask lists for every block of queries the blocks of keys that are kept whole ("full": the kernel skips the mask)
and kept in part ("partial": the kernel evaluates the mask). Two routes lead to the same lists:

- closed form, for masks whose `info` judges blocks (the library's, and combinations of them): a block pair is judged by
  its corners (blocks.py). Time and memory in (T / block_size)^2, and no host sync.
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
from score_mods.blocks import BlockPairs, can_judge, judge
from score_mods.info import MaskMod, check_sizes, fingerprint, is_static, resolve_device

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
    Masks that carry a MaskInfo and read no tensors are cached (the last 32): the same mask, sizes and device give
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

    # A validator may run under inference_mode; its tensors could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        if can_judge(mask_mod):
            block_mask = _by_closed_form(mask_mod, batch or 1, heads or 1, q_len, kv_len, device, block_size)
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
    mask_mod: MaskMod, batch: int, heads: int, q_len: int, kv_len: int, device: torch.device, block_size: int
) -> BlockMask:
    pairs = BlockPairs.of(q_len, kv_len, block_size, device)
    kept, full = judge(mask_mod, pairs)
    full = full & pairs.whole
    rows, columns = pairs.whole.shape[1:]
    shape = (batch, heads, rows, columns)
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
