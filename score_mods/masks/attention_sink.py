from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe
from score_mods.residual import Residual


def attention_sink(sinks: int, window: int) -> MaskMod:
    """Keep t - window <= j <= t, and every j <= t with j < sinks: the window and the first `sinks` tokens.

    In packed rows these are the first tokens of each document. A sink inside the window is read once, as any key.
    (arXiv 2309.17453)

    Raises ValueError for sinks < 1, a negative window, or anything but ints.
    """
    check_whole_number("sinks", sinks, at_least=1, meaning="first tokens that every later query sees")
    check_whole_number("window", window, at_least=0, meaning="previous keys a query sees besides itself")

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((q_idx - kv_idx <= window) | (kv_idx < sinks))

    def blocks(pairs: BlockPairs) -> Judgement:
        kept = (pairs.gap_low <= window) | (pairs.kv_low < sinks)
        return kept, (pairs.gap_low >= 0) & ((pairs.gap_high <= window) | (pairs.kv_high < sinks))

    info = MaskInfo(
        name="attention_sink",
        args=(("sinks", sinks), ("window", window)),
        causal=True,
        blocks=blocks,
        residual=Residual(window=window, sinks=sinks),
    )
    return describe(keep, info)
