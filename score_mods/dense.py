"""Masks and score mods densely: for attention on the CPU, and as the reference of the fused kernels.

Shapes (legend in scan_kernels/README.md): B batch, T tokens, H query heads, G KV heads, D head width.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from score_mods.info import MaskMod, check_sizes, resolve_device
from score_mods.score_info import ScoreMod


def dense_mask(
    mask_mod: MaskMod,
    *,
    batch: int | None = None,
    heads: int | None = None,
    q_len: int,
    kv_len: int,
    device: torch.device | str,
) -> Tensor:
    """The mask as a bool tensor (batch or 1, heads or 1, q_len, kv_len): True where the query may read the key.

    None for `batch` or `heads` is a mask that does not depend on it. Takes memory in q_len x kv_len.
    Raises ValueError where the sizes or the device do not fit the mask's document ids.
    """
    device = resolve_device(device)
    check_sizes(mask_mod, batch=batch, q_len=q_len, kv_len=kv_len, device=device)
    return create_mask(mask_mod, batch, heads, q_len, kv_len, device)


def apply_score_mod(score_mod: ScoreMod, scores_BHTT: Tensor) -> Tensor:
    """score_mod of each score: (B, H, Tq, Tk) to the same shape. Differentiable, in tensors it reads as well."""
    mapped = score_mod
    for score_axis, axis in ((0, 3), (0, 2), (0, 1), (0, 0)):
        in_dims = [score_axis, None, None, None, None]
        in_dims[1 + axis] = 0
        mapped = torch.vmap(mapped, in_dims=tuple(in_dims))
    return mapped(scores_BHTT, *(torch.arange(size, device=scores_BHTT.device) for size in scores_BHTT.shape))


def dense_attention(
    q_BHTD: Tensor,
    k_BGTD: Tensor,
    v_BGTD: Tensor,
    *,
    mask: Tensor,
    score_mod: ScoreMod,
    scale: float | None = None,
) -> Tensor:
    """softmax over the keys that mask keeps of score_mod(scale q . k), times v: (B, H, T, Dv) in the dtype of q.

    mask: bool, broadcastable to (B, H, Tq, Tk); True may be read. scale: 1 / sqrt(D) by default. Query head h reads KV
    head h // (H / G). Scores are fp32, or wider. A query that may read nothing gives zeros, as in FlexAttention.
    """
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    group = q_BHTD.shape[1] // k_BGTD.shape[1]
    k_BHTD, v_BHTD = (x.repeat_interleave(group, dim=1).to(wide) for x in (k_BGTD, v_BGTD))
    scores = q_BHTD.to(wide) @ k_BHTD.mT * (q_BHTD.shape[-1] ** -0.5 if scale is None else scale)
    scores = apply_score_mod(score_mod, scores)
    # A row of -inf would be 0 / 0, so its scores are finite before the softmax and its weights zero behind it.
    empty = ~mask.any(dim=-1, keepdim=True)
    weights = scores.masked_fill(~(mask | empty), -torch.inf).softmax(dim=-1).masked_fill(empty, 0.0)
    return (weights @ v_BHTD).to(q_BHTD.dtype)
