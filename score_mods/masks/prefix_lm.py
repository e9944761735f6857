from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe


def prefix_lm(prefix: int) -> MaskMod:
    """Keep j <= t, and every j < prefix: the first `prefix` tokens see each other both ways, the others are causal.

    In packed rows these are the first tokens of each document. Not causal: the loss of tokens inside the prefix is not
    to be counted, as their queries see them. (arXiv 1910.10683, section 3.2.1)

    Raises ValueError for prefix < 1 or no int.
    """
    check_whole_number("prefix", prefix, at_least=1, meaning="first tokens that all queries see")

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) | (kv_idx < prefix)

    def blocks(pairs: BlockPairs) -> Judgement:
        kept = (pairs.gap_high >= 0) | (pairs.kv_low < prefix)
        return kept, (pairs.gap_low >= 0) | (pairs.kv_high < prefix)

    return describe(keep, MaskInfo(name="prefix_lm", args=(("prefix", prefix),), blocks=blocks))
