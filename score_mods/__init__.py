"""Masks and score mods for FlexAttention: one file each, a registry by name, block masks, and the same densely.

A mask is a function `keep(b, h, q_idx, kv_idx) -> bool tensor`: True where query q_idx may read key kv_idx. A score mod
is a function `score_mod(score, b, h, q_idx, kv_idx) -> score`. Here t is the query's position and j the key's; `window`
is the number of *previous* keys a query sees besides itself.
"""

from score_mods.block_masks import build_block_mask, clear_block_mask_cache
from score_mods.blocks import BlockPairs, Judgement
from score_mods.counting import kept_pairs, reads_ahead
from score_mods.dense import apply_score_mod, dense_attention, dense_mask
from score_mods.info import MaskInfo, MaskMod, describe, fingerprint, mask_info, tensors_in
from score_mods.masks.attention_sink import attention_sink
from score_mods.masks.causal import causal
from score_mods.masks.chunked import chunked
from score_mods.masks.combinators import all_of, any_of, in_documents
from score_mods.masks.dilated_window import dilated_window
from score_mods.masks.document import document
from score_mods.masks.neighborhood_2d import neighborhood_2d
from score_mods.masks.prefix_lm import prefix_lm
from score_mods.masks.sliding_window import sliding_window
from score_mods.masks.stochastic_window import drawn_window, stochastic_window
from score_mods.masks.strided import strided
from score_mods.masks.windows_2d import windows_2d
from score_mods.mods.alibi import alibi
from score_mods.mods.relative_bias import relative_bias
from score_mods.mods.soft_cap import soft_cap
from score_mods.reference import reference_attention
from score_mods.registry import (
    available_masks,
    available_score_mods,
    check_mask,
    check_score_mod,
    make_mask,
    make_score_mod,
    required_arguments,
)
from score_mods.residual import Residual, residual_mask, residual_of
from score_mods.schedule import WindowSchedule
from score_mods.score_info import ScoreInfo, ScoreMod, describe_score, score_info

__all__ = [
    "BlockPairs",
    "Judgement",
    "MaskInfo",
    "MaskMod",
    "Residual",
    "ScoreInfo",
    "ScoreMod",
    "WindowSchedule",
    "alibi",
    "all_of",
    "any_of",
    "apply_score_mod",
    "attention_sink",
    "available_masks",
    "available_score_mods",
    "build_block_mask",
    "causal",
    "check_mask",
    "check_score_mod",
    "chunked",
    "clear_block_mask_cache",
    "dense_attention",
    "dense_mask",
    "describe",
    "describe_score",
    "dilated_window",
    "document",
    "drawn_window",
    "fingerprint",
    "in_documents",
    "kept_pairs",
    "make_mask",
    "make_score_mod",
    "mask_info",
    "neighborhood_2d",
    "prefix_lm",
    "reads_ahead",
    "reference_attention",
    "relative_bias",
    "required_arguments",
    "residual_mask",
    "residual_of",
    "score_info",
    "sliding_window",
    "soft_cap",
    "stochastic_window",
    "strided",
    "tensors_in",
    "windows_2d",
]
