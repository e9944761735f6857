import torch
from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe


def dilated_window(window: int, dilation: int) -> MaskMod:
    """Keep j = t - i * dilation for i = 0 ... window: itself and `window` previous keys, `dilation` apart.

    dilation = 1 is `sliding_window`. The oldest key lies window * dilation back. (arXiv 2004.05150, section 3.1)

    Raises ValueError for a negative window, dilation < 1, or anything but ints.
    """
    check_whole_number("window", window, at_least=0, meaning="previous keys a query sees besides itself")
    check_whole_number("dilation", dilation, at_least=1, meaning="distance from one of them to the next")
    reach = window * dilation

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        gap = q_idx - kv_idx
        return (gap >= 0) & (gap <= reach) & (gap % dilation == 0)

    def blocks(pairs: BlockPairs) -> Judgement:
        # The largest multiple of the dilation in the block pair and the window.
        largest = pairs.gap_high.clamp(max=reach) // dilation * dilation
        kept = (pairs.gap_high >= 0) & (largest >= pairs.gap_low)
        dense = (pairs.gap_low >= 0) & (pairs.gap_high <= reach)
        return kept, dense if dilation == 1 else torch.zeros_like(kept)

    info = MaskInfo(
        name="dilated_window",
        args=(("window", window), ("dilation", dilation)),
        causal=True,
        window=reach,
        exact=dilation == 1,
        relative=True,
        blocks=blocks,
    )
    return describe(keep, info)
