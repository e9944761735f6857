from torch import Tensor

from score_mods.info import MaskInfo, MaskMod, describe


def causal() -> MaskMod:
    """Keep j <= t: every key up to and including the query itself."""

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    return describe(keep, MaskInfo(name="causal", causal=True, exact=True, relative=True))
