"""The attention layers: RAttention (two branches), sliding window, full; and the linear branch as a torchtitan module.

    swa:  o_t = softmax over t-w <= j <= t of (rope(q_t) . rope(k_j) / sqrt(D)) v_j
    rla:  o_t = phi(q_t) S_{t-w-1},  S_t = S_{t-1} + phi(k_t)^T v_t
    out:  y_t = W_o (RMSNorm_swa(o_t^swa) + RMSNorm_rla(o_t^rla))                       (arXiv 2506.15545)

q, k, v are shared by the branches; the linear branch takes q and k after qk-norm, before RoPE and the softmax scale.
Shapes: B batch, T tokens, H query heads, G key/value heads, D head width (legend: scan_kernels/README.md).
torchtitan's letters (L, N, H for T, heads, D) stay in argument names, which its sharding looks up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch.distributed.tensor import DTensor
from torchtitan.models.common.attention import GQAttention
from torchtitan.protocols.module import Module

from flexrattn.masked_attention import Mask, MaskedAttention
from flexrattn.packing import document_ids_from_positions
from scan_kernels import initial_state_from_pairs, residual_linear_attention, residual_shift


class LayerKind(StrEnum):
    """What a layer computes; `window` means previous keys a query sees besides itself."""

    RATTENTION = "rattention"  # window and linear branch; window None: the linear branch alone
    SWA = "swa"  # the window alone
    FULL = "full"  # causal softmax attention


def _at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class HeadRMSNorm(Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the head width, one scale vector a head, in fp32 or wider.

    A row of zeros gives zeros *and zero gradients*: the residual branch is exactly zero for the first window + 1
    tokens of a document, where the plain formula would multiply gradients by 1 / sqrt(eps) = 1e4.
    x (B, T, H, D), weight (H, D). eps 1e-8 is the authors'.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        n_heads: int
        head_dim: int
        eps: float = 1e-8

    def __init__(self, config: Config):
        super().__init__()
        self.eps = config.eps
        self.weight = torch.nn.Parameter(torch.empty(config.n_heads, config.head_dim))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        x = _at_least_fp32(input)
        mean_square = x.square().mean(-1, keepdim=True)
        inverse_rms = torch.where(mean_square > 0, torch.rsqrt(mean_square + self.eps), 0.0)
        return (x * inverse_rms * _at_least_fp32(self.weight)).to(input.dtype)


class HeadScale(Module):
    """x * weight with one weight a head dimension, shared by the heads: the authors' learned q and k scale."""

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        head_dim: int

    def __init__(self, config: Config):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(config.head_dim))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input * self.weight.to(input.dtype)


class LearnedInitialState(Module):
    """S_0 = phi(K)^T V of learned keys and values (H, M, D) of each query head: (H, F, D), fp32.

    The authors' option `use_learned_init`, with M = 128.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        n_heads: int
        head_dim: int
        feature_map: str
        n_tokens: int = 128

    def __init__(self, config: Config):
        super().__init__()
        self.feature_map = config.feature_map
        shape = (config.n_heads, config.n_tokens, config.head_dim)
        self.k_tokens = torch.nn.Parameter(torch.empty(shape))
        self.v_tokens = torch.nn.Parameter(torch.empty(shape))

    def forward(self) -> torch.Tensor:
        # Heads are split over tensor-parallel ranks, and a head's state needs that head alone.
        k_HMD, v_HMD = (x.to_local() if isinstance(x, DTensor) else x for x in (self.k_tokens, self.v_tokens))
        k_BMHD, v_BMHD = k_HMD.transpose(0, 1)[None], v_HMD.transpose(0, 1)[None]
        return initial_state_from_pairs(k_BMHD, v_BMHD, feature_map=self.feature_map)[0]


class ResidualLinearBranch(Module):
    """The linear branch as a module of its own: q, k, v in, phi(q_t) S_{t-window-1} out, reset at document borders.

    `positions` (B, T) restart at 0 with each document. Everything past v is keyword-only, as torchtitan's local_map
    wants it. What it reads is `score_mods.Residual`: with `sinks`, not the first tokens of a document.
    draws: in training the window is data, `drawn_window`, which the model sets for each step; `window` in evaluation.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        window: int | None
        feature_map: str = "softmax"
        impl: str = "auto"
        save_every: int | None = None
        sinks: int = 0
        draws: bool = False

    def __init__(self, config: Config):
        super().__init__()
        self.window = config.window
        self.sinks = config.sinks
        self.draws = config.draws
        self.drawn_window: torch.Tensor | None = None
        self.feature_map = config.feature_map
        self.impl = config.impl
        self.save_every = config.save_every

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        positions: torch.Tensor | None,
        initial_state: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if initial_state is not None:
            initial_state = initial_state.expand(q_BLNH.shape[0], *initial_state.shape)
        window = self.window
        if self.sinks:
            # A key with v = 0 adds nothing to the state, and its v gets no gradient from here.
            v_BLNH = torch.where(_positions(k_BLNH, positions)[..., None, None] < self.sinks, 0.0, v_BLNH)
        if self.draws and self.training:
            assert self.drawn_window is not None, "set_step comes before a training step"
            k_BLNH, v_BLNH = shifted_keys(k_BLNH, v_BLNH, positions, self.drawn_window)
            window = None
        return residual_linear_attention(
            q_BLNH,
            k_BLNH,
            v_BLNH,
            window=window,
            feature_map=self.feature_map,
            document_ids=None if positions is None else document_ids_from_positions(positions),
            initial_state=initial_state,
            impl=self.impl,
            save_every=self.save_every,
        )


def _positions(k_BTGD: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(k_BTGD.shape[1], device=k_BTGD.device)[None] if positions_BT is None else positions_BT


def shifted_keys(
    k_BTGD: torch.Tensor, v_BTGD: torch.Tensor, positions_BT: torch.Tensor | None, window: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row t holds the youngest key that the residual branch of query t reads, or zeros: a window that is data.

    The scan's own shift is a number that programs are compiled for. Over these keys it needs none (window=None), so
    that another window compiles nothing. Rows whose key would be of an earlier document hold k = v = 0.
    """
    lag = residual_shift(window)
    T = k_BTGD.shape[1]
    # A permutation, so that no two rows add to one gradient.
    index_T = (torch.arange(T, device=k_BTGD.device) - lag) % T
    there = (_positions(k_BTGD, positions_BT) >= lag)[..., None, None]
    k_BTGD, v_BTGD = (torch.where(there, x.index_select(1, index_T), 0.0) for x in (k_BTGD, v_BTGD))
    return k_BTGD, v_BTGD


class RAttention(GQAttention):
    """Any attention layer of the model, by `kind`: its two branches, or the one it has.

    `mask` names the layer's entry in the masks that the model builds for a batch. `use_rope` turns the softmax
    branch's rotation on; torchtitan's decoder reads the `rope` config either way.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GQAttention.Config):
        kind: LayerKind
        window: int | None = None
        use_rope: bool = True
        mask: str
        residual: ResidualLinearBranch.Config | None = None
        swa_norm: HeadRMSNorm.Config | None = None
        rla_norm: HeadRMSNorm.Config | None = None
        q_scale: HeadScale.Config | None = None
        k_scale: HeadScale.Config | None = None
        initial_state: LearnedInitialState.Config | None = None

        @property
        def has_softmax(self) -> bool:
            return not (self.kind is LayerKind.RATTENTION and self.window is None)

    def __init__(self, config: Config):
        super().__init__(config)
        self.mask = config.mask
        # GQAttention builds both; a branch that is not there must not leave modules or buffers behind.
        if not config.has_softmax:
            self.inner_attention: MaskedAttention | None = None
        if not (config.use_rope and config.has_softmax):
            self.rope = None
        self.residual = config.residual.build() if config.residual else None
        self.swa_norm = config.swa_norm.build() if config.swa_norm else None
        self.rla_norm = config.rla_norm.build() if config.rla_norm else None
        self.q_scale = config.q_scale.build() if config.q_scale else None
        self.k_scale = config.k_scale.build() if config.k_scale else None
        self.initial_state = config.initial_state.build() if config.initial_state else None

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: Mapping[str, Mask],
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q_BTHD, k_BTGD, v_BTGD = self.qkv_linear(x_BLD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)

        branches = []
        if self.inner_attention is not None:
            branches.append(self._softmax_branch(q_BTHD, k_BTGD, v_BTGD, attention_masks[self.mask], positions))
        if self.residual is not None:
            branches.append(self._linear_branch(q_BTHD, k_BTGD, v_BTGD, positions))
        o_BTHD = branches[0] if len(branches) == 1 else branches[0] + branches[1]
        return self.wo(o_BTHD.flatten(2))

    def _softmax_branch(self, q_BTHD, k_BTGD, v_BTGD, mask: Mask, positions) -> torch.Tensor:
        if self.rope is not None:
            q_BTHD, k_BTGD = self.rope(q_BTHD, k_BTGD, positions)
        assert self.inner_attention is not None
        o_BTHD = self.inner_attention(
            q_BTHD, k_BTGD, v_BTGD, attention_masks=mask, scale=self.scaling, enable_gqa=self.enable_gqa
        ).contiguous()
        return o_BTHD if self.swa_norm is None else self.swa_norm(o_BTHD)

    def _linear_branch(self, q_BTHD, k_BTGD, v_BTGD, positions) -> torch.Tensor:
        if self.q_scale is not None and self.k_scale is not None:
            q_BTHD, k_BTGD = self.q_scale(q_BTHD), self.k_scale(k_BTGD)
        initial_state = None if self.initial_state is None else self.initial_state()
        assert self.residual is not None
        o_BTHD = self.residual(q_BTHD, k_BTGD, v_BTGD, positions=positions, initial_state=initial_state)
        return o_BTHD if self.rla_norm is None else self.rla_norm(o_BTHD)
