"""Model sizes, and the one function that turns a size and a choice of layers into a model config.

3b and 12b are the paper's table (arXiv 2506.15545); it does not give a vocabulary, so theirs is ours. The layer kind,
the window and the feature map are arguments: two arms of a comparison differ in nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn as nn
from torchtitan.models.common import CosSinRoPE, Embedding, Linear
from torchtitan.models.common.config_utils import make_gqa_config
from torchtitan.models.common.nn_modules import RMSNorm
from torchtitan.models.common.param_init import skip_param_init

from flexrattn.attention import (
    DecayGate,
    HeadRMSNorm,
    HeadScale,
    LayerKind,
    LearnedInitialState,
    RAttention,
    ResidualLinearBranch,
)
from flexrattn.initializers import Constant, DecayRate, Normal, StepBias
from flexrattn.masked_attention import KERNEL_OPTIONS, MaskedAttention
from flexrattn.model import Block, GatedFeedForward, MaskSpec, RAttentionModel
from flexrattn.suggest import choose
from scan_kernels import available_feature_maps

INIT_STD = 0.02


@dataclass(frozen=True, kw_only=True)
class Flavor:
    """One model size. `tied`: input and output embedding are one weight."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    ffn_dim: int
    activation: Literal["silu", "gelu"] = "silu"
    vocab_size: int
    tied: bool = True
    qk_norm: bool = True
    rope_theta: float = 5e5
    max_seq_len: int = 131072
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size", "max_seq_len")
        for name in sizes:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {self.n_heads} query and {self.n_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, got {self.head_dim}")
        choose(self.activation, ("silu", "gelu"), what="activation")


FLAVORS: dict[str, Flavor] = {
    "debug": Flavor(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, ffn_dim=384, vocab_size=320),
    "30m": Flavor(dim=512, n_layers=8, n_heads=8, n_kv_heads=2, head_dim=64, ffn_dim=1344, vocab_size=8192, tied=False),
    "150m": Flavor(dim=1024, n_layers=12, n_heads=16, n_kv_heads=4, head_dim=64, ffn_dim=2304, vocab_size=32768),
    "400m": Flavor(dim=1024, n_layers=24, n_heads=16, n_kv_heads=4, head_dim=64, ffn_dim=4096, vocab_size=32768),
    "3b": Flavor(
        dim=2048, n_layers=56, n_heads=16, n_kv_heads=4, head_dim=128, ffn_dim=6656, activation="gelu", vocab_size=49152
    ),
    "12b": Flavor(
        dim=5120,
        n_layers=40,
        n_heads=40,
        n_kv_heads=8,
        head_dim=128,
        ffn_dim=16384,
        activation="gelu",
        vocab_size=49152,
    ),
}

DEFAULT_PATTERN = ("local", "local", "local", "global")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What the layers are: the pattern, the local kind and its options, the masks.

    window: previous keys a query sees besides itself; None with kind "rattention" is the linear branch alone.
    local_mask / global_mask: a registered mask or "package.module:factory"; None is the kind's own (a sliding window
    of `window`, or causal). A linear branch reads what a plain window leaves out, so it goes with no other mask.
    branch_norm: the per-head norms before the sum; False is the paper's "no group norm" row.
    rla_norm_init: what the scale of the linear branch's norm begins as; the softmax branch's begins as 1.
    learned_initial_state, learned_qk_scale: the authors' options for the linear branch.
    decay_gate: the linear state decays by a learned gate a KV head and token; the paper's "Mamba2" row.
    global_rope: global layers rotate q and k as local ones do; else they carry no positions.
    Options of the linear branch say nothing about layers without one.
    softmax_backend: which kernels FlexAttention makes of the masks, on a GPU: its own, or FlashAttention-4's.
    """

    kind: LayerKind
    window: int | None
    feature_map: str = "softmax"
    pattern: tuple[str, ...] = DEFAULT_PATTERN
    local_mask: MaskSpec | None = None
    global_mask: MaskSpec | None = None
    branch_norm: bool = True
    rla_norm_init: float = 1.0
    decay_gate: bool = False
    global_rope: bool = False
    learned_initial_state: bool = False
    learned_qk_scale: bool = False
    scan_impl: str = "auto"
    scan_save_every: int | None = None
    softmax_backend: str = "triton"


def make_layers(
    *,
    layer_kind: str = "rattention",
    window: int | None = None,
    feature_map: str = "softmax",
    pattern: Sequence[str] = DEFAULT_PATTERN,
    local_mask: str | None = None,
    local_mask_args: dict[str, Any] | None = None,
    global_mask: str | None = None,
    global_mask_args: dict[str, Any] | None = None,
    branch_norm: bool = True,
    rla_norm_init: float = 1.0,
    decay_gate: bool = False,
    global_rope: bool = False,
    learned_initial_state: bool = False,
    learned_qk_scale: bool = False,
    scan_impl: str = "auto",
    scan_save_every: int | None = None,
    softmax_backend: str = "triton",
) -> Layers:
    """Check a choice of layers and give it its types. ValueError says what was given and what would do."""
    kind = LayerKind(choose(layer_kind, [k.value for k in LayerKind], what="layer_kind"))
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
        raise ValueError(f"window must be an integer >= 0 (previous keys a query sees) or null, got {window!r}")
    if kind in (LayerKind.SWA, LayerKind.HYMBA) and window is None and local_mask is None:
        raise ValueError(
            f"layer_kind {layer_kind!r} needs a window: the number of previous keys a query sees besides itself"
        )
    if kind is LayerKind.FULL and window is not None:
        raise ValueError(f"layer_kind 'full' has no window, got window {window}: leave it out or use 'swa'")
    choose(feature_map, available_feature_maps(), what="feature_map")
    choose(softmax_backend, KERNEL_OPTIONS, what="softmax_backend")
    if not pattern or isinstance(pattern, str):
        raise ValueError(f"pattern must be a list of 'local' and 'global', got {pattern!r}")
    for entry in pattern:
        choose(entry, ("local", "global"), what="pattern entry")
    if (
        isinstance(rla_norm_init, bool)
        or not isinstance(rla_norm_init, int | float)
        or not math.isfinite(rla_norm_init)
    ):
        raise ValueError(f"rla_norm_init must be a finite number, got {rla_norm_init!r}")
    if rla_norm_init != 1.0 and not branch_norm:
        raise ValueError(f"rla_norm_init {rla_norm_init} is the scale of a norm that branch_norm false leaves out")
    for name, args in (("local_mask", local_mask_args), ("global_mask", global_mask_args)):
        if args and {"local_mask": local_mask, "global_mask": global_mask}[name] is None:
            raise ValueError(f"{name}_args given without {name}: name the mask they belong to")
    if kind is LayerKind.RATTENTION and local_mask is not None:
        raise ValueError(
            f"local_mask {local_mask!r} does not go with layer_kind 'rattention': the linear branch reads what a "
            "sliding window leaves out, and other masks leave out something else; use layer_kind 'swa' or 'full'"
        )
    return Layers(
        kind=kind,
        window=window,
        feature_map=feature_map,
        pattern=tuple(pattern),
        local_mask=MaskSpec(name=local_mask, args=local_mask_args or {}) if local_mask else None,
        global_mask=MaskSpec(name=global_mask, args=global_mask_args or {}) if global_mask else None,
        branch_norm=branch_norm,
        rla_norm_init=rla_norm_init,
        decay_gate=decay_gate,
        global_rope=global_rope,
        learned_initial_state=learned_initial_state,
        learned_qk_scale=learned_qk_scale,
        scan_impl=scan_impl,
        scan_save_every=scan_save_every,
        softmax_backend=softmax_backend,
    )


def resolve_flavor(flavor: str, overrides: dict[str, Any] | None = None) -> Flavor:
    """A flavor by name, with fields replaced: ValueError lists what exists."""
    base = FLAVORS[choose(flavor, FLAVORS, what="flavor")]
    fields = [f.name for f in dataclasses.fields(Flavor)]
    for key in overrides or {}:
        choose(key, fields, what="model field")
    return dataclasses.replace(base, **(overrides or {}))


def build_model_config(size: Flavor, layers: Layers) -> RAttentionModel.Config:
    """The model config of a size and a choice of layers. Weights: normal, std 0.02, residual outputs scaled down."""
    if layers.kind is LayerKind.HYMBA and size.n_kv_heads % 2:
        raise ValueError(
            "layer_kind 'hymba' gives half of the KV groups to each branch: n_kv_heads must be even, "
            f"got {size.n_kv_heads}"
        )
    local_key, local_mask = _mask_of(layers.kind, layers.window, layers.local_mask)
    global_key, global_mask = _mask_of(LayerKind.FULL, None, layers.global_mask)
    if local_key == global_key and local_mask != global_mask:
        global_key = f"global_{global_key}"
    masks: dict[str, MaskSpec] = {}
    blocks = []
    for i in range(size.n_layers):
        local = layers.pattern[i % len(layers.pattern)] == "local"
        attention = _attention(size, layers, local=local, mask=local_key if local else global_key)
        if attention.has_softmax:
            masks[attention.mask] = local_mask if local else global_mask
        blocks.append(
            Block.Config(
                attention_norm=_norm(size, size.dim),
                ffn_norm=_norm(size, size.dim),
                attention=attention,
                feed_forward=_feed_forward(size),
            )
        )
    for spec in masks.values():
        spec.build()  # an unknown or broken mask is refused here, before anything is allocated
    return RAttentionModel.Config(
        dim=size.dim,
        vocab_size=size.vocab_size,
        enable_weight_tying=size.tied,
        tok_embeddings=Embedding.Config(
            num_embeddings=size.vocab_size,
            embedding_dim=size.dim,
            param_init={"weight": skip_param_init if size.tied else Normal(INIT_STD)},
        ),
        norm=_norm(size, size.dim),
        lm_head=_linear(size.dim, size.vocab_size),
        layers=blocks,
        masks=masks,
    )


def _mask_of(kind: LayerKind, window: int | None, given: MaskSpec | None) -> tuple[str, MaskSpec]:
    """A layer's mask and the key under which the batch's masks hold it."""
    if given is not None:
        arguments = "_".join(f"{k}{v}" for k, v in sorted(given.args.items()))
        return f"{given.name}_{arguments}".rstrip("_"), given
    if kind is LayerKind.FULL:
        return "causal", MaskSpec(name="causal")
    return f"sliding_window_{window}", MaskSpec(name="sliding_window", args={"window": window})


def _linear_init(std: float = INIT_STD) -> dict[str, Any]:
    return {"weight": Normal(std)}


def _linear(n_in: int, n_out: int, std: float = INIT_STD) -> Linear.Config:
    return Linear.Config(in_features=n_in, out_features=n_out, param_init=_linear_init(std))


def _residual_std(size: Flavor) -> float:
    # Two residual additions a layer: keeps the stream's variance from growing with depth.
    return INIT_STD / (2 * size.n_layers) ** 0.5


def _norm(size: Flavor, width: int) -> RMSNorm.Config:
    return RMSNorm.Config(normalized_shape=width, eps=size.norm_eps, param_init={"weight": nn.init.ones_})


def _feed_forward(size: Flavor) -> GatedFeedForward.Config:
    return GatedFeedForward.Config(
        w1=_linear(size.dim, size.ffn_dim),
        w2=_linear(size.ffn_dim, size.dim, _residual_std(size)),
        w3=_linear(size.dim, size.ffn_dim),
        activation=size.activation,
    )


def _attention(size: Flavor, layers: Layers, *, local: bool, mask: str) -> RAttention.Config:
    """One layer's attention. Local layers rotate q and k; global ones only where asked to."""
    gqa = make_gqa_config(
        dim=size.dim,
        n_heads=size.n_heads,
        n_kv_heads=size.n_kv_heads,
        head_dim=size.head_dim,
        wqkv_param_init=_linear_init(),
        wo_param_init=_linear_init(_residual_std(size)),
        qk_norm=_norm(size, size.head_dim) if size.qk_norm else None,
        inner_attention=MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS[layers.softmax_backend])),
        rope=CosSinRoPE.Config(dim=size.head_dim, max_seq_len=size.max_seq_len, theta=size.rope_theta),
    )
    inherited = {f.name: getattr(gqa, f.name) for f in dataclasses.fields(gqa)}
    kind = layers.kind if local else LayerKind.FULL
    if kind in (LayerKind.SWA, LayerKind.FULL):
        return RAttention.Config(
            **inherited,
            kind=kind,
            window=layers.window if local else None,
            use_rope=local or layers.global_rope,
            mask=mask,
        )

    splits_heads = kind is LayerKind.HYMBA
    has_softmax = splits_heads or layers.window is not None
    # Heads of one branch.
    n_heads, n_kv_heads = (n // 2 if splits_heads else n for n in (size.n_heads, size.n_kv_heads))
    ones = {"weight": nn.init.ones_}
    rla_scale = {"weight": Constant(float(layers.rla_norm_init))}
    swa_norm, rla_norm = (
        HeadRMSNorm.Config(n_heads=n_heads, head_dim=size.head_dim, param_init=init) for init in (ones, rla_scale)
    )
    head_scale = HeadScale.Config(head_dim=size.head_dim, param_init=ones)
    decay_gate = DecayGate.Config(
        n_kv_heads=n_kv_heads,
        proj=_linear(size.dim, n_kv_heads),
        param_init={"A_log": DecayRate(), "dt_bias": StepBias()},
    )
    # The authors draw both token tables with variance 1 / D.
    token_init = Normal(size.head_dim**-0.5)
    initial_state = LearnedInitialState.Config(
        n_heads=n_heads,
        head_dim=size.head_dim,
        feature_map=layers.feature_map,
        param_init={"k_tokens": token_init, "v_tokens": token_init},
    )
    return RAttention.Config(
        **inherited,
        kind=kind,
        window=layers.window,
        use_rope=has_softmax,
        mask=mask,
        residual=ResidualLinearBranch.Config(
            window=None if splits_heads else layers.window,
            feature_map=layers.feature_map,
            impl=layers.scan_impl,
            save_every=layers.scan_save_every,
        ),
        swa_norm=swa_norm if has_softmax and layers.branch_norm else None,
        rla_norm=rla_norm if layers.branch_norm else None,
        q_scale=head_scale if layers.learned_qk_scale else None,
        k_scale=dataclasses.replace(head_scale) if layers.learned_qk_scale else None,
        decay_gate=decay_gate if layers.decay_gate else None,
        initial_state=initial_state if layers.learned_initial_state else None,
        sum_impl=layers.scan_impl,
    )
