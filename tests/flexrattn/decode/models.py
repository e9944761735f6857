"""Small models whose every branch matters, and their full forward."""

from __future__ import annotations

import torch
from torch import Tensor

from flexrattn import RAttentionModel, build_model_config, make_layers, resolve_flavor

VOCAB = 64
SMALL = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 48}


def build(*, dtype: torch.dtype = torch.float64, seed: int = 0, model: dict | None = None, **layers) -> RAttentionModel:
    size = resolve_flavor("debug", SMALL | {"max_seq_len": 256} | (model or {}))
    built = build_model_config(size, make_layers(**({"window": 5, "pattern": ["local", "global"]} | layers))).build()
    torch.manual_seed(seed)
    with torch.no_grad():
        built.init_weights()
        for name, parameter in built.named_parameters():
            # Far from the small initialisation, so that every branch, scale and head matters to the logits.
            parameter.normal_(std=0.3) if parameter.ndim > 1 and "norm" not in name else parameter.uniform_(0.5, 1.5)
    return built.to(dtype).requires_grad_(False).eval()


def full_forward(model: RAttentionModel, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
    if positions is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))


def random_tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def position_parity():
    """A mask of a user: neither causal nor a window."""

    def keep(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (((q_idx - kv_idx) % 2 == 0) | (q_idx == kv_idx))

    return keep
