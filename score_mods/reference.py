"""Masked softmax attention by its definition: slow, dense, float64. The oracle of the tests.

Shapes (legend in scan_kernels/README.md): B batch, T tokens, H query heads, G KV heads, D head width.
"""

import math

import torch
from torch import Tensor

from score_mods.dense import apply_score_mod
from score_mods.score_info import ScoreMod


def reference_attention(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGDv: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    score_mod: ScoreMod | None = None,
) -> Tensor:
    """o_t = sum_j softmax_j(s(scale q_t . k_j)) v_j over the j that mask[b, h, t, j] keeps; (B, T, H, Dv), float64.

    Query head h reads KV head h // (H / G). mask: bool, broadcastable to (B, H, Tq, Tk). scale: 1 / sqrt(D) by default.
    score_mod: s, the scores as they are by default. A query that may read nothing gives zeros.
    """
    heads, kv_heads, width = q_BTHD.shape[2], k_BTGD.shape[2], q_BTHD.shape[3]
    if heads % kv_heads:
        raise ValueError(f"query heads must be a multiple of KV heads, got {heads} and {kv_heads}")
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be boolean, got {mask.dtype}")
    q, k, v = (x.double().transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGDv))
    k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (1 / math.sqrt(width) if scale is None else scale)
    if score_mod is not None:
        scores = apply_score_mod(score_mod, scores)
    # The weights of an empty row are 0 / 0: its maximum is kept finite, and its weights are set to zero.
    scores = scores.masked_fill(~mask, -math.inf)
    weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).min))
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / total.masked_fill(total == 0, 1) @ v).transpose(1, 2)
