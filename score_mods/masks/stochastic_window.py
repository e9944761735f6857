from collections.abc import Sequence

from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.blocks import BlockPairs, Judgement
from score_mods.info import MaskInfo, MaskMod, describe
from score_mods.schedule import WindowSchedule

_MEANING = "previous keys a query sees besides itself"


def stochastic_window(
    window: int,
    low: int | None = None,
    high: int | None = None,
    values: Sequence[int] | None = None,
    seed: int = 0,
    until: int | None = None,
) -> MaskMod:
    """Keep t - window <= j <= t; training draws its window anew at each step, and `window` is that of evaluation.

    low, high: each window low <= w <= high is as likely. values: the windows to draw from, in place of low and high.
    seed and the step determine what is drawn. until: from this step on training uses `window`, too.
    The mask is the window of evaluation; its info's `schedule` says what training draws, `drawn_window` is that mask.
    (after arXiv 2509.24552, which draws from a short and a long window)

    Raises ValueError for windows that are no ints or negative, low > high, both or neither of the two ways to draw.
    """
    check_whole_number("window", window, at_least=0, meaning=_MEANING)
    check_whole_number("seed", seed, at_least=0, meaning="of the draws")
    if until is not None:
        check_whole_number("until", until, at_least=1, meaning="first training step with the fixed window")
    drawn_from: range | tuple[int, ...]
    if values is not None and low is None and high is None:
        if not isinstance(values, list | tuple) or not values:
            raise ValueError(f"values must be a list of windows to draw from, got {values!r}")
        for value in values:
            check_whole_number("values", value, at_least=0, meaning=_MEANING)
        drawn_from = tuple(values)
    elif values is None and low is not None and high is not None:
        check_whole_number("low", low, at_least=0, meaning=_MEANING)
        check_whole_number("high", high, at_least=low, meaning="largest window drawn, not below low")
        drawn_from = range(low, high + 1)
    else:
        raise ValueError(
            f"give low and high, or values, to draw windows from; got low={low!r}, high={high!r}, values={values!r}"
        )

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)

    told = (low, high) if values is None else drawn_from
    info = MaskInfo(
        name="stochastic_window",
        args=(("window", window), ("from", told), ("seed", seed), ("until", until)),
        causal=True,
        window=window,
        exact=True,
        relative=True,
        schedule=WindowSchedule(values=drawn_from, window=window, seed=seed, until=until),
    )
    return describe(keep, info)


def drawn_window(window: Tensor) -> MaskMod:
    """Keep t - window <= j <= t for a window that is data: an integer tensor without axes, on the masks' device.

    Another value is no other mask: a compiled kernel reads it, and nothing compiles again.
    """

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx <= window)

    def blocks(pairs: BlockPairs) -> Judgement:
        return pairs.gap_low <= window, (pairs.gap_low >= 0) & (pairs.gap_high <= window)

    info = MaskInfo(name="drawn_window", causal=True, relative=True, tensors=(window,), blocks=blocks)
    return describe(keep, info)
