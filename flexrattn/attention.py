"""The attention layers: RAttention (two branches), sliding window, full; and the linear branch as a torchtitan module.

    swa:  o_t = softmax over t-w <= j <= t of (rope(q_t) . rope(k_j) / sqrt(D)) v_j
    rla:  o_t = phi(q_t) S_{t-w-1},  S_t = S_{t-1} + phi(k_t)^T v_t
    out:  y_t = W_o (RMSNorm_swa(o_t^swa) + RMSNorm_rla(o_t^rla))                       (arXiv 2506.15545)

q, k, v are shared by the branches; the linear branch takes q and k after qk-norm, before RoPE and the softmax scale.
With a decay gate, S_t = exp(decay_t) S_{t-1} + phi(k_t)^T v_t with one decay a KV head and token.
Shapes: B batch, T tokens, H query heads, G key/value heads, D head width (legend: scan_kernels/README.md).
torchtitan's letters (L, N, H for T, heads, D) stay in argument names, which its sharding looks up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torchtitan.models.common import Linear
from torchtitan.models.common.attention import GQAttention
from torchtitan.protocols.module import Module

from flexrattn.branch_shares import add_squares
from flexrattn.flash_window import PlainWindow
from flexrattn.head_split import QKV, local, merge_groups, split_groups
from flexrattn.masked_attention import Mask, MaskedAttention
from flexrattn.packing import document_ids_from_positions
from scan_kernels import (
    head_rms_norm,
    initial_state_from_pairs,
    residual_linear_attention,
    residual_linear_attention_and_inputs,
    residual_shift,
    sum_of_head_norms,
)


class LayerKind(StrEnum):
    """What a layer computes; `window` means previous keys a query sees besides itself."""

    RATTENTION = "rattention"  # window and linear branch; window None: the linear branch alone
    SWA = "swa"  # the window alone
    FULL = "full"  # causal softmax attention
    HYMBA = "hymba"  # half of the heads the window, half of them linear over all that came before


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
        return head_rms_norm(input, self.weight, eps=self.eps)


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


class DecayGate(Module):
    """decay (B, T, G) <= 0 from the layer's input x (B, T, W): -exp(A_log) * softplus(x W^T + dt_bias), in fp32.

    Mamba2's parametrisation (arXiv 2405.21060), one gate a KV head; the log of what a state keeps when the key of that
    token enters it.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Module.Config):
        n_kv_heads: int
        proj: Linear.Config

    def __init__(self, config: Config):
        super().__init__()
        self.proj = config.proj.build()
        self.dt_bias = torch.nn.Parameter(torch.empty(config.n_kv_heads))
        self.A_log = torch.nn.Parameter(torch.empty(config.n_kv_heads))

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        step_BTG = F.softplus(_at_least_fp32(self.proj(x_BLD)) + _at_least_fp32(self.dt_bias))
        return local(-torch.exp(_at_least_fp32(self.A_log)) * step_BTG)


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
        k_HMD, v_HMD = local(self.k_tokens), local(self.v_tokens)
        k_BMHD, v_BMHD = k_HMD.transpose(0, 1)[None], v_HMD.transpose(0, 1)[None]
        return initial_state_from_pairs(k_BMHD, v_BMHD, feature_map=self.feature_map)[0]


class ResidualLinearBranch(Module):
    """The linear branch as a module of its own: q, k, v in, phi(q_t) S_{t-window-1} out, reset at document borders.

    `positions` (B, T) restart at 0 with each document. Everything past v is keyword-only, as torchtitan's local_map
    wants it. What it reads is `score_mods.Residual`: with `sinks`, not the first tokens of a document.
    draws: in training the window is data, `drawn_window`, which the model sets for each step; `window` in evaluation.
    with_inputs: returns (o, (q, k, v)) for a softmax branch to read, whose gradients this one's kernels then add to
    their own.
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
        decay: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
        with_inputs: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, QKV]:
        scan = self._scan(q_BLNH, k_BLNH, v_BLNH, positions, decay, initial_state)
        if not with_inputs:
            return residual_linear_attention(**scan)
        o_BLNH, *passed = residual_linear_attention_and_inputs(**scan)
        # What was changed for this branch is not what the other one reads.
        q, k, v = (
            to_pass if scan[name] is given else given
            for name, given, to_pass in zip("qkv", (q_BLNH, k_BLNH, v_BLNH), passed, strict=True)
        )
        return o_BLNH, (q, k, v)

    def _scan(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        positions: torch.Tensor | None,
        decay: torch.Tensor | None,
        initial_state: torch.Tensor | None,
    ) -> dict[str, Any]:
        """The arguments of `residual_linear_attention`."""
        if initial_state is not None:
            initial_state = initial_state.expand(q_BLNH.shape[0], *initial_state.shape)
        window = self.window
        if self.sinks:
            # A key with v = 0 adds nothing to the state, and its v gets no gradient from here.
            v_BLNH = torch.where(_positions(k_BLNH, positions)[..., None, None] < self.sinks, 0.0, v_BLNH)
        if self.draws and self.training:
            assert self.drawn_window is not None, "set_step comes before a training step"
            k_BLNH, v_BLNH, decay = shifted_keys(k_BLNH, v_BLNH, decay, positions, self.drawn_window)
            window = None
        return {
            "q": q_BLNH,
            "k": k_BLNH,
            "v": v_BLNH,
            "window": window,
            "feature_map": self.feature_map,
            "decay": decay,
            "document_ids": None if positions is None else document_ids_from_positions(positions),
            "initial_state": initial_state,
            "impl": self.impl,
            "save_every": self.save_every,
        }


def _positions(k_BTGD: torch.Tensor, positions_BT: torch.Tensor | None) -> torch.Tensor:
    return torch.arange(k_BTGD.shape[1], device=k_BTGD.device)[None] if positions_BT is None else positions_BT


def shifted_keys(
    k_BTGD: torch.Tensor,
    v_BTGD: torch.Tensor,
    decay_BTG: torch.Tensor | None,
    positions_BT: torch.Tensor | None,
    window: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Row t holds the youngest key that the residual branch of query t reads, or zeros: a window that is data.

    The scan's own shift is a number that programs are compiled for. Over these keys it needs none (window=None), so
    that another window compiles nothing. Rows whose key would be of an earlier document hold k = v = 0. A decay belongs
    to its key and moves with it.
    """
    lag = residual_shift(window)
    T = k_BTGD.shape[1]
    # A permutation, so that no two rows add to one gradient.
    index_T = (torch.arange(T, device=k_BTGD.device) - lag) % T
    there_BT1 = (_positions(k_BTGD, positions_BT) >= lag)[..., None]
    k_BTGD, v_BTGD = (torch.where(there_BT1[..., None], x.index_select(1, index_T), 0.0) for x in (k_BTGD, v_BTGD))
    if decay_BTG is not None:
        decay_BTG = torch.where(there_BT1, decay_BTG.index_select(1, index_T), 0.0)
    return k_BTGD, v_BTGD, decay_BTG


class RAttention(GQAttention):
    """Any attention layer of the model, by `kind`: its two branches, or the one it has.

    `mask` names the layer's entry in the masks that the model builds for a batch. `use_rope` turns the softmax
    branch's rotation on; torchtitan's decoder reads the `rope` config either way.

    Of kind "hymba" the heads are split between the branches in place of reading twice (after Hymba, arXiv 2411.13676,
    whose other half are state-space heads; the row "Hymba-style head split" of arXiv 2506.15545): the softmax branch
    has the KV groups 0, 2, 4, ... with their query heads, the linear branch the groups 1, 3, 5, ..., each head with its
    norm, and all heads stand beside one another before W_o. The window leaves nothing out for the linear heads to read,
    so they read the whole document up to their own token.
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
        decay_gate: DecayGate.Config | None = None
        initial_state: LearnedInitialState.Config | None = None
        joins_gradients: bool = True
        """Whether the linear branch's kernels add the softmax branch's gradients of q, k and v to their own; tensor
        parallelism runs each branch for itself"""
        sum_impl: str | None = None
        """How both norms and their sum are computed at once (scan_kernels.sum_of_head_norms); None: norm by norm, as
        tensor parallelism splits them"""

        @property
        def has_softmax(self) -> bool:
            return not (self.kind is LayerKind.RATTENTION and self.window is None)

        @property
        def splits_heads(self) -> bool:
            return self.kind is LayerKind.HYMBA

    def __init__(self, config: Config):
        super().__init__(config)
        self.mask = config.mask
        self.splits_heads = config.splits_heads
        self.sum_impl = config.sum_impl
        self.joins_gradients = config.joins_gradients
        # The first position at which the linear branch reads something, too.
        self.both_read_from = 0
        if config.residual is not None and config.residual.window is not None:
            self.both_read_from = config.residual.window + 1 + config.residual.sinks
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
        self.decay_gate = config.decay_gate.build() if config.decay_gate else None
        self.initial_state = config.initial_state.build() if config.initial_state else None
        # Set while the branches are measured, and only then (flexrattn.branch_shares).
        self.branch_squares: torch.Tensor | None = None

    def forward(
        self,
        x_BLD: torch.Tensor,
        attention_masks: Mapping[str, Mask],
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        q_BTHD, k_BTGD, v_BTGD = self.qkv_linear(x_BLD)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        decay_BTG = None if self.decay_gate is None else self.decay_gate(x_BLD)
        mask = attention_masks[self.mask] if self.inner_attention is not None else None
        if isinstance(mask, PlainWindow):
            # Each row is one document: no border to reset at, and tokens stand where they are counted.
            positions = None
        swa_BTHD, rla_BTHD = self._branches(q_BTHD, k_BTGD, v_BTGD, mask, decay_BTG, positions)
        if self.branch_squares is not None and swa_BTHD is not None and rla_BTHD is not None:
            add_squares(self.branch_squares, swa_BTHD, rla_BTHD, positions, self.both_read_from)
        return self.wo(self.join(swa_BTHD, rla_BTHD).flatten(2))

    def _branches(
        self, q_BTHD, k_BTGD, v_BTGD, mask: Mask | None, decay_BTG, positions
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The softmax and the linear branch, before their norms; None for the one that the layer does not have."""
        for_softmax = for_linear = (q_BTHD, k_BTGD, v_BTGD)
        if self.splits_heads:
            for_softmax, for_linear = split_groups(q_BTHD, k_BTGD, v_BTGD)
        swa_BTHD = rla_BTHD = None
        if self.residual is not None:
            joins = self.joins_gradients and self.inner_attention is not None and not self.splits_heads
            rla_BTHD, passed = self._linear_branch(*for_linear, decay_BTG, positions, joins)
            for_softmax = passed or for_softmax
        if self.inner_attention is not None:
            swa_BTHD = self._softmax_branch(*for_softmax, mask, positions)
        return swa_BTHD, rla_BTHD

    def _softmax_branch(self, q_BTHD, k_BTGD, v_BTGD, mask: Mask | None, positions) -> torch.Tensor:
        if self.rope is not None:
            q_BTHD, k_BTGD = self.rope(q_BTHD, k_BTGD, positions)
        assert self.inner_attention is not None
        return self.inner_attention(
            q_BTHD, k_BTGD, v_BTGD, attention_masks=mask, scale=self.scaling, enable_gqa=self.enable_gqa
        ).contiguous()

    def _linear_branch(
        self, q_BTHD, k_BTGD, v_BTGD, decay_BTG, positions, joins: bool
    ) -> tuple[torch.Tensor, QKV | None]:
        """Its output and, where it joins gradients, q, k, v for the softmax branch."""
        scaled = (q_BTHD, k_BTGD, v_BTGD)
        if self.q_scale is not None and self.k_scale is not None:
            scaled = (self.q_scale(q_BTHD), self.k_scale(k_BTGD), v_BTGD)
        initial_state = None if self.initial_state is None else self.initial_state()
        assert self.residual is not None
        options = {"positions": positions, "decay": decay_BTG, "initial_state": initial_state}
        if not joins:
            return self.residual(*scaled, **options), None
        rla_BTHD, passed = self.residual(*scaled, **options, with_inputs=True)
        return rla_BTHD, passed if self.q_scale is None else (q_BTHD, k_BTGD, passed[2])

    def join(self, swa_BTHD: torch.Tensor | None, rla_BTHD: torch.Tensor | None) -> torch.Tensor:
        """The branches' outputs as one, each through its norm: their sum, or all heads in the order of q's."""
        swa_norm, rla_norm = self.swa_norm, self.rla_norm
        if rla_BTHD is None:
            assert swa_BTHD is not None
            return swa_BTHD
        if swa_BTHD is None:
            return rla_BTHD if rla_norm is None else rla_norm(rla_BTHD)
        if swa_norm is not None and rla_norm is not None:
            if self.sum_impl is not None and not self.splits_heads:
                weights = swa_norm.weight, rla_norm.weight
                return sum_of_head_norms(swa_BTHD, rla_BTHD, *weights, eps=swa_norm.eps, impl=self.sum_impl)
            swa_BTHD, rla_BTHD = swa_norm(swa_BTHD), rla_norm(rla_BTHD)
        if self.splits_heads:
            return merge_groups(swa_BTHD, rla_BTHD, self.n_heads // self.n_kv_heads)
        return swa_BTHD + rla_BTHD
