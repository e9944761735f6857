"""What a mask leaves out, for the linear branch to read. This file is the one definition.

The residual of a causal mask is every key j <= t of the query's document that the mask does not keep: softmax branch
and residual then read each causal pair exactly once. `residual_mask` is that set for any causal mask.

A linear branch sums keys into a state and cannot skip some of them for some queries. So it reads the residuals of this
form and no other (`Residual`):

    j <= t - window - 1,  and the key's position in its document is >= sinks

A sliding window leaves out that with sinks = 0, attention_sink with its own sinks: their values are zero in the linear
branch, and a key with v = 0 adds nothing to the state.
"""

from dataclasses import dataclass

from torch import Tensor

from score_mods.info import MaskInfo, MaskMod, describe, mask_info, mask_name

READABLE = "sliding_window, stochastic_window, attention_sink"


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The keys j <= t - window - 1 whose position in the document is at least `sinks`."""

    window: int
    sinks: int = 0

    def mask(self) -> MaskMod:
        """The same as a mask: True where the linear branch reads the key."""
        window, sinks = self.window, self.sinks

        def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (q_idx - kv_idx > window) & (kv_idx >= sinks)

        args = (("window", window), ("sinks", sinks))
        return describe(keep, MaskInfo(name="residual", args=args, causal=True, relative=not sinks))


def residual_mask(mask: MaskMod) -> MaskMod:
    """Keep j <= t that `mask` leaves out, whether or not a linear branch could read it."""

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ~mask(b, h, q_idx, kv_idx)

    return keep


def residual_of(mask: MaskMod) -> Residual:
    """The residual of `mask` as a linear branch reads it.

    Raises ValueError, with the reason, for a mask whose residual is of another form.
    """
    info = mask_info(mask)
    if info is not None and info.residual is not None:
        return info.residual
    if info is not None and info.is_plain_window:
        assert info.window is not None
        return Residual(window=info.window)
    if info is None:
        why = "it does not say what it leaves out (info.residual)"
    elif info.exact and info.causal:
        why = "it leaves no key to a linear branch"
    elif not info.causal:
        why = "it is not causal"
    else:
        why = "what it leaves out is not all keys before a window"
    raise ValueError(f"mask {mask_name(mask)!r} does not go with a linear branch: {why}; those that do: {READABLE}")
