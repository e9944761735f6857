"""Images in raster order: position p of a document is row p % (H W) // W, column p % W of image p // (H W)."""

import torch

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement, overlap


def check_image(height: int, width: int, causal: bool) -> None:
    check_whole_number("height", height, at_least=1, meaning="rows of an image")
    check_whole_number("width", width, at_least=1, meaning="columns of an image")
    if not isinstance(causal, bool):
        raise ValueError(f"causal must be true or false, got {causal!r}")


def rows_meet(pairs: BlockPairs, area: int, width: int, apart: int) -> Judgement:
    """Blocks of one image with rows at most `apart` apart; columns are not looked at, so no block is full."""
    images = overlap(pairs.q_low // area, pairs.q_high // area, pairs.kv_low // area, pairs.kv_high // area)
    q_low, q_high = pairs.q_low // width, pairs.q_high // width
    rows = overlap(q_low - apart, q_high + apart, pairs.kv_low // width, pairs.kv_high // width)
    kept = images & rows
    return kept, torch.zeros_like(kept)
