"""Placements of every parameter and activation for torchtitan's tensor parallelism: whole KV groups per rank.

The projections are split by heads, the linear branch and the norms work on the heads a rank has, and the vectors that
all heads share (qk-norm, the learned q and k scale) are replicated. FSDP2 and HSDP need nothing from here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import spmd_types as spmd
from torchtitan.models.common.decoder_sharding import (
    colwise_config,
    dense_activation_placement,
    dense_param_placement,
    dense_sequence_parallel_placement,
    norm_config,
    set_decoder_sharding_config,
    set_dense_ffn_sharding,
    set_gqa_attention_sharding,
    set_gqa_inner_attention_local_map,
)
from torchtitan.protocols.sharding import ShardingConfig

if TYPE_CHECKING:
    from flexrattn.attention import RAttention
    from flexrattn.model import RAttentionModel


def set_sharding(config: RAttentionModel.Config, *, enable_sp: bool) -> None:
    """Fill `sharding_config` on the model's configs. torchtitan drops the axes a run does not use."""
    set_decoder_sharding_config(config, enable_sp=enable_sp)
    block_input = dense_sequence_parallel_placement() if enable_sp else dense_activation_placement(tp=spmd.I)
    for layer in config.layers:
        layer.attention_norm.sharding_config = norm_config(enable_sp=enable_sp)
        layer.ffn_norm.sharding_config = norm_config(enable_sp=enable_sp)
        set_dense_ffn_sharding(layer.feed_forward, attn_x_layout=block_input, enable_sp=enable_sp)
        _set_attention_sharding(layer.attention, enable_sp=enable_sp)


def _set_attention_sharding(attention: RAttention.Config, *, enable_sp: bool) -> None:
    set_gqa_attention_sharding(attention, enable_sp=enable_sp)
    inner = attention.inner_attention
    set_gqa_inner_attention_local_map(inner)
    # A learned table of biases is whole on every rank: heads that it tells apart are not split (model.py refuses).
    inner.sharding_config = dataclasses.replace(
        inner.sharding_config, state_shardings={"score_table": dense_param_placement(tp=spmd.R)}
    )
    if attention.residual is not None:
        set_gqa_inner_attention_local_map(attention.residual)
    for shared in (attention.qk_norm, attention.q_scale, attention.k_scale):
        if shared is not None:
            shared.sharding_config = _on_local_heads(weight=spmd.R)
    for per_head in (attention.swa_norm, attention.rla_norm):
        if per_head is not None:
            per_head.sharding_config = _on_local_heads(weight=spmd.S(0))
    if attention.decay_gate is not None:
        per_group = dense_param_placement(tp=spmd.S(0))
        attention.decay_gate.proj.sharding_config = colwise_config()
        attention.decay_gate.sharding_config = ShardingConfig(
            state_shardings={"dt_bias": per_group, "A_log": per_group}
        )
    if attention.initial_state is not None:
        placement = dense_param_placement(tp=spmd.S(0))
        attention.initial_state.sharding_config = ShardingConfig(
            state_shardings={"k_tokens": placement, "v_tokens": placement}
        )


def _on_local_heads(*, weight: spmd.PerMeshAxisSpmdType) -> ShardingConfig:
    """A module that maps (B, T, heads, D) to the same, on the heads a rank has."""
    heads = dense_activation_placement(tp=spmd.S(2))
    return ShardingConfig(
        state_shardings={"weight": dense_param_placement(tp=weight)},
        in_src_shardings={"input": heads},
        in_dst_shardings={"input": heads},
        out_src_shardings=heads,
        out_dst_shardings=heads,
    )
