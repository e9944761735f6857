"""True FLOPs of a training step, so that MFU charges a layer the work it needs and not that of full attention.

Counted per token, forward plus twice that for the backward, a multiply-add as two:

    matmul parameters     2 each, the input embedding not (it is a look-up), a tied output embedding once
    softmax branch        4 D per head for every key a query sees: min(t, w) + 1 of them for query t of a window w, for
                          any other mask the pairs it keeps, counted; of a stochastic window the mean of its draws
    linear branch         2 F D per KV head to add a token to its state, 2 F D per query head to read it
    split heads (hymba)   each branch with its half of the heads

The linear branch is charged its recurrence. What a chunked kernel does on top of it (the products inside a chunk), as
what attention recomputes in its backward, is the implementation's choice and not work the model needs. Document
borders are not known ahead of a batch: rows are charged as one document.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from scan_kernels import feature_dim
from score_mods import MaskMod, kept_pairs, mask_info

if TYPE_CHECKING:
    from flexrattn.attention import RAttention

# A backward costs two matrix products for each of the forward's.
TRAINING_FACTOR = 3


def mean_visible_keys(window: int | None, seq_len: int) -> float:
    """Mean over queries 0 <= t < T of min(t, window) + 1, the keys of a causal window; None: no window."""
    w = seq_len - 1 if window is None else min(window, seq_len - 1)
    # Queries 0..w-1 see t+1 keys, the other T-w see w+1.
    return (w * (w + 1) / 2 + (seq_len - w) * (w + 1)) / seq_len


def mean_kept_keys(mask: MaskMod, seq_len: int) -> float:
    """Mean over the queries of a sequence of the keys that `mask` keeps; in training, where it draws windows."""
    info = mask_info(mask)
    if info is not None and info.schedule is not None:
        values = info.schedule.values
        return sum(mean_visible_keys(window, seq_len) for window in values) / len(values)
    return kept_pairs(mask, seq_len) / seq_len


def attention_flops_per_token(
    attention: RAttention.Config, seq_len: int, kept_keys: Mapping[str, float] | None = None
) -> float:
    """Forward FLOPs per token of a layer's branches, projections not included.

    kept_keys: `mean_kept_keys` of the model's masks; without them the layer has that of its kind, a window or causal.
    """
    n_heads, n_kv_heads, head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
    assert n_kv_heads is not None
    assert head_dim is not None
    if attention.splits_heads:
        n_heads, n_kv_heads = n_heads // 2, n_kv_heads // 2
    total = 0.0
    if attention.has_softmax:
        if kept_keys is None:
            keys = mean_visible_keys(attention.window if attention.kind != "full" else None, seq_len)
        else:
            keys = kept_keys[attention.mask]
        total += 4 * n_heads * head_dim * keys
    if attention.residual is not None:
        features = feature_dim(attention.residual.feature_map, head_dim)
        total += 2 * features * head_dim * (n_heads + n_kv_heads)
    return total


def nparams_and_flops_per_token(config: Any, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
    """Parameters of `model`, and FLOPs per token of its training step at `seq_len`, recomputation not counted."""
    nparams = sum(p.numel() for p in model.parameters())
    lookup = 0 if config.enable_weight_tying else config.vocab_size * config.dim
    forward = 2.0 * (nparams - lookup)
    kept_keys = {key: mean_kept_keys(spec.build(), seq_len) for key, spec in config.masks.items()}
    forward += sum(attention_flops_per_token(layer.attention, seq_len, kept_keys) for layer in config.layers)
    return nparams, int(TRAINING_FACTOR * forward)
