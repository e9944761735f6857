"""Which keys the residual branch reads: the one place where `window` becomes a shift."""

from typing import overload

import torch
from torch import Tensor


@overload
def residual_shift(window: int | None) -> int: ...
@overload
def residual_shift(window: Tensor) -> Tensor: ...
def residual_shift(window: int | Tensor | None) -> int | Tensor:
    """Positions from a query back to the youngest key that its residual branch reads.

    `window` previous keys and the query's own belong to the softmax branch, so the youngest residual key of query t is
    `t - residual_shift(window)`. Without a softmax branch (`None`) it is t itself. A tensor gives a tensor.
    """
    return 0 if window is None else window + 1


def residual_pairs(T: int, window: int | None, document_ids: Tensor | None = None) -> Tensor:
    """Pairs (query, key) that the residual branch reads: bool (T, T), or (B, T, T) with `document_ids` (B, T).

    Together with the pairs of the sliding-window mask (same window, same documents) each causal pair occurs once.
    Quadratic in T: for tests and pictures.
    """
    device = None if document_ids is None else document_ids.device
    position_T = torch.arange(T, device=device)
    pairs = position_T[None, :] <= position_T[:, None] - residual_shift(window)
    if document_ids is None:
        return pairs
    if document_ids.shape[1:] != (T,):
        raise ValueError(f"document_ids must be (B, {T}), got {tuple(document_ids.shape)}")
    return pairs & (document_ids[:, :, None] == document_ids[:, None, :])
