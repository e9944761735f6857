"""Masks for FlexAttention: one file a mask, a registry by name, block masks, and the same masks densely.

A mask is a function `keep(b, h, q_idx, kv_idx) -> bool tensor`: True where query q_idx may read key kv_idx. Here t is
the query's position and j the key's; `window` is the number of *previous* keys a query sees besides itself.
"""

from score_mods.block_masks import build_block_mask, clear_block_mask_cache
from score_mods.dense import dense_mask
from score_mods.info import MaskInfo, MaskMod, describe, fingerprint, mask_info
from score_mods.masks.causal import causal
from score_mods.masks.combinators import all_of, any_of
from score_mods.masks.document import document
from score_mods.masks.sliding_window import sliding_window
from score_mods.reference import reference_attention
from score_mods.registry import available_masks, check_mask, make_mask

__all__ = [
    "MaskInfo",
    "MaskMod",
    "all_of",
    "any_of",
    "available_masks",
    "build_block_mask",
    "causal",
    "check_mask",
    "clear_block_mask_cache",
    "dense_mask",
    "describe",
    "document",
    "fingerprint",
    "make_mask",
    "mask_info",
    "reference_attention",
    "sliding_window",
]
