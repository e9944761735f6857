"""What `flash_window` asks of flash-attn-4, by the formula in float64: on a CPU, in the place of the package."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexrattn import flash_window


@dataclass
class StandIn:
    """`_flash_attn_fwd` and `_flash_attn_bwd` with the arguments that both tested versions of the package take.

    calls: ("fwd" or "bwd", left window), in order. shift: added to every window, to break the law.
    """

    calls: list[tuple[str, int | None]] = field(default_factory=list)
    shift: int = 0

    def _flash_attn_fwd(
        self, q, k, v, *, softmax_scale, causal, window_size_left, window_size_right, return_lse, out, lse
    ) -> None:
        assert return_lse
        scores, v = self._scores("fwd", q, k, v, softmax_scale, causal, window_size_left, window_size_right)
        out.copy_((scores.softmax(-1) @ v).transpose(1, 2))
        lse.copy_(scores.logsumexp(-1))

    def _flash_attn_bwd(
        self,
        q,
        k,
        v,
        out,
        dout,
        lse,
        softmax_scale,
        causal,
        *,
        window_size_left,
        window_size_right,
        deterministic,
        dq,
        dk,
        dv,
    ) -> None:
        scores, wide_v = self._scores("bwd", q, k, v, softmax_scale, causal, window_size_left, window_size_right)
        weights = (scores - lse.double()[..., None]).exp()
        do, o, wide_q = (x.transpose(1, 2).double() for x in (dout, out, q))
        d_scores = weights * (do @ wide_v.mT - (do * o).sum(-1, keepdim=True)) * softmax_scale
        group = q.shape[2] // k.shape[2]
        dq.copy_((d_scores @ _heads(k, group)).transpose(1, 2))
        for given, found in ((dk, d_scores.mT @ wide_q), (dv, weights.mT @ do)):
            given.copy_(found.unflatten(1, (-1, group)).sum(2).transpose(1, 2))

    def _scores(self, what: str, q: Tensor, k: Tensor, v: Tensor, scale, causal, left, right) -> tuple[Tensor, Tensor]:
        """(B, H, T, T), -inf where the law keeps nothing, and v (B, H, T, D)."""
        assert causal
        assert right == (None if left is None else 0)
        self.calls.append((what, left))
        T, group = q.shape[1], q.shape[2] // k.shape[2]
        gap = torch.arange(T)[:, None] - torch.arange(T)
        kept = (gap >= 0) & (gap <= (T if left is None else left + self.shift))
        scores = q.transpose(1, 2).double() @ _heads(k, group).mT * scale
        return scores.masked_fill(~kept, -torch.inf), _heads(v, group)


def _heads(x: Tensor, group: int) -> Tensor:
    return x.transpose(1, 2).double().repeat_interleave(group, dim=1)


def install(monkeypatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(flash_window, "_package", lambda device: stand_in)
    return stand_in
