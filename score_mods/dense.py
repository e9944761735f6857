"""A mask as a boolean tensor: for SDPA on CPU, and the reference of the block masks."""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from score_mods.info import MaskMod, check_sizes, resolve_device


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
