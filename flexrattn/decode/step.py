"""One token for every row of a cache, in plain torch on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from flexrattn.decode.cache import DecodeCache
from flexrattn.decode.layer import attend, make_clock
from flexrattn.model import RAttentionModel


@torch.no_grad()
def decode_step(model: RAttentionModel, cache: DecodeCache, token_B: Tensor, active_B: Tensor | None = None) -> Tensor:
    """Logits (B, V) behind one more token of every row; the cache takes the tokens in.

    Equal to the last row of the full forward over the running document. active_B: rows that take part; the others keep
    what they have, and their logits mean nothing. A row must have room: lengths < cache.max_length (not looked at here,
    as that would wait for the device).
    """
    cache.check_model(model.config)
    if active_B is None:
        active_B = torch.ones(cache.rows, dtype=torch.bool, device=cache.device)
    clock = make_clock(cache, active_B)
    h_B1D = model.tok_embeddings(token_B[:, None])
    for block, layer in zip(model.layers.values(), cache.layers, strict=True):
        attention = block.attention
        q_B1HD, k_B1GD, v_B1GD = attention.qkv_linear(block.attention_norm(h_B1D))
        if attention.q_norm is not None and attention.k_norm is not None:
            q_B1HD, k_B1GD = attention.q_norm(q_B1HD), attention.k_norm(k_B1GD)
        o_B1HD = attend(attention, layer, q_B1HD, k_B1GD, v_B1GD, clock, cache.fold_every)
        h_B1D = h_B1D + attention.wo(o_B1HD.flatten(2))
        h_B1D = h_B1D + block.feed_forward(block.ffn_norm(h_B1D))
    finish_step(cache, clock.absorbed_after, active_B)
    return model.lm_head(model.norm(h_B1D))[:, 0]


def finish_step(cache: DecodeCache, absorbed_after: dict[int, Tensor], active_B: Tensor) -> None:
    """The cache's clock goes on."""
    for window, after_B in absorbed_after.items():
        cache.absorbed[window].copy_(after_B)
    cache.lengths_B += active_B
