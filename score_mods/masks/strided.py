from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe


def strided(stride: int, window: int | None = None) -> MaskMod:
    """Keep t - window <= j <= t, and every j <= t with (t - j) % stride == 0: the window and each stride-th key before.

    window: `stride` by default, so that two layers reach every earlier key. The two patterns of the sparse transformer
    as one mask. (arXiv 1904.10509, section 4.2)

    Raises ValueError for stride < 1, a negative window, or anything but ints.
    """
    check_whole_number("stride", stride, at_least=1, meaning="distance from one far key to the next")
    reach = stride if window is None else window
    check_whole_number("window", reach, at_least=0, meaning="previous keys a query sees besides itself")

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        gap = q_idx - kv_idx
        return (gap >= 0) & ((gap <= reach) | (gap % stride == 0))

    def blocks(pairs: BlockPairs) -> Judgement:
        multiple = pairs.gap_high // stride * stride >= pairs.gap_low.clamp(min=0)
        kept = (pairs.gap_low <= reach) | multiple
        return kept, (pairs.gap_low >= 0) & ((pairs.gap_high <= reach) | (stride == 1))

    args = (("stride", stride), ("window", reach))
    return describe(keep, MaskInfo(name="strided", args=args, causal=True, relative=True, blocks=blocks))
