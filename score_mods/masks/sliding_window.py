from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.info import MaskInfo, MaskMod, describe


def sliding_window(window: int) -> MaskMod:
    """Keep t - window <= j <= t: a query reads itself and `window` previous keys (fewer at the start).

    window = 0 keeps the diagonal; window >= T - 1 is the causal mask. Causality is included: no `causal` is needed.
    (arXiv 2506.15545, section 2; FlashAttention's `window_size=(window, 0)`)

    Raises ValueError for a window that is no int or is negative.
    """
    check_whole_number("window", window, at_least=0, meaning="previous keys a query sees besides itself")

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)

    info = MaskInfo(
        name="sliding_window", args=(("window", window),), causal=True, window=window, exact=True, relative=True
    )
    return describe(keep, info)
