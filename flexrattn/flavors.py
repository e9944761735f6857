"""Model sizes, and the one function that turns a size and a choice of layers into a model config.

3b and 12b are the paper's table (arXiv 2506.15545); it does not give a vocabulary, so theirs is ours. The layer kind,
the window and the feature map are arguments: two arms of a comparison differ in nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

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
from flexrattn.flash_window import check_width
from flexrattn.initializers import Constant, DecayRate, Normal, StepBias
from flexrattn.layer_choice import check_selectors, resolve_layers
from flexrattn.masked_attention import KERNEL_OPTIONS, MaskedAttention, MaskSpec, ScoreModSpec
from flexrattn.model import Block, GatedFeedForward, RAttentionModel
from flexrattn.suggest import choose
from scan_kernels import available_feature_maps
from score_mods import MaskMod, mask_info, required_arguments, residual_of, score_info

INIT_STD = 0.02

Spec = TypeVar("Spec", MaskSpec, ScoreModSpec)


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

# A norm gives a branch unit RMS from the first step, ten times what embeddings and feed-forward add then. With 0.1
# local layers begin where those of plain windows do (docs/results/python_source_30m.md).
BRANCH_SCALE = 0.1

DEFAULT_PATTERN = ("local", "local", "local", "global")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """What the layers are: the pattern, the local kind and its options, the masks.

    window: previous keys a query sees besides itself; None with kind "rattention" is the linear branch alone.
    local_mask / global_mask: a registered mask or "package.module:factory"; None is the kind's own (a sliding window
    of `window`, or causal). Beside a linear branch only masks go whose residual it can read (score_mods/residual.py):
    window and sinks of the branch are then the mask's.
    local_score_mod / global_score_mod: a registered score mod or "package.module:factory".
    layer_masks, layer_score_mods: the same for single layers, by index or slice ("0", "-1", "4:12", "::4"); later
    entries come before earlier ones, all of them before local_... and global_...
    A required argument `window` (`heads`) that a mask (score mod) is not given is the layers' own.
    branch_norm: the per-head norms before the sum; False is the paper's "no group norm" row.
    swa_norm_init, rla_norm_init: what the scales of the softmax and of the linear branch's norms begin as; None is 0.1,
    and for a linear branch that is added to a softmax branch 0. 1 and 1 is the authors' choice; with it small models
    learned later (docs/results/norm_init.md).
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
    layer_masks: tuple[tuple[str, MaskSpec | None], ...] = ()
    local_score_mod: ScoreModSpec | None = None
    global_score_mod: ScoreModSpec | None = None
    layer_score_mods: tuple[tuple[str, ScoreModSpec | None], ...] = ()
    branch_norm: bool = True
    swa_norm_init: float | None = None
    rla_norm_init: float | None = None
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
    local_mask: str | dict[str, Any] | None = None,
    local_mask_args: dict[str, Any] | None = None,
    global_mask: str | dict[str, Any] | None = None,
    global_mask_args: dict[str, Any] | None = None,
    layer_masks: Mapping[Any, Any] | None = None,
    local_score_mod: str | dict[str, Any] | None = None,
    local_score_mod_args: dict[str, Any] | None = None,
    global_score_mod: str | dict[str, Any] | None = None,
    global_score_mod_args: dict[str, Any] | None = None,
    layer_score_mods: Mapping[Any, Any] | None = None,
    branch_norm: bool = True,
    swa_norm_init: float | None = None,
    rla_norm_init: float | None = None,
    decay_gate: bool = False,
    global_rope: bool = False,
    learned_initial_state: bool = False,
    learned_qk_scale: bool = False,
    scan_impl: str = "auto",
    scan_save_every: int | None = None,
    softmax_backend: str = "triton",
) -> Layers:
    """Check a choice of layers and give it its types. ValueError says what was given and what would do.

    A mask or score mod is a name, with its arguments in `..._args`, or both at once: {"attention_sink": {"sinks": 4}}.
    """
    kind = LayerKind(choose(layer_kind, [k.value for k in LayerKind], what="layer_kind"))
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
        raise ValueError(f"window must be an integer >= 0 (previous keys a query sees) or null, got {window!r}")
    needs_window = kind in (LayerKind.SWA, LayerKind.HYMBA)
    if needs_window and window is None and local_mask is None and not layer_masks:
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
    for name, value in (("swa_norm_init", swa_norm_init), ("rla_norm_init", rla_norm_init)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
        if not branch_norm:
            raise ValueError(f"{name} {value} is the scale of a norm that branch_norm false leaves out")
    return Layers(
        kind=kind,
        window=window,
        feature_map=feature_map,
        pattern=tuple(pattern),
        local_mask=_named(MaskSpec, "local_mask", local_mask, local_mask_args),
        global_mask=_named(MaskSpec, "global_mask", global_mask, global_mask_args),
        layer_masks=_by_layer(MaskSpec, "layer_masks", layer_masks),
        local_score_mod=_named(ScoreModSpec, "local_score_mod", local_score_mod, local_score_mod_args),
        global_score_mod=_named(ScoreModSpec, "global_score_mod", global_score_mod, global_score_mod_args),
        layer_score_mods=_by_layer(ScoreModSpec, "layer_score_mods", layer_score_mods),
        branch_norm=branch_norm,
        swa_norm_init=swa_norm_init,
        rla_norm_init=rla_norm_init,
        decay_gate=decay_gate,
        global_rope=global_rope,
        learned_initial_state=learned_initial_state,
        learned_qk_scale=learned_qk_scale,
        scan_impl=scan_impl,
        scan_save_every=scan_save_every,
        softmax_backend=softmax_backend,
    )


def _named(spec: type[Spec], what: str, given: object, args: dict[str, Any] | None = None) -> Spec | None:
    """A name, or {name: arguments}, as a spec."""
    if given is None:
        if args:
            raise ValueError(f"{what}_args given without {what}: name what they belong to")
        return None
    if isinstance(given, Mapping) and len(given) == 1:
        name, inner = next(iter(given.items()))
        if args:
            raise ValueError(f"{what} {name!r} is given its arguments twice: in {what} and in {what}_args")
        given, args = name, {} if inner is None else inner
    if not isinstance(given, str) or not isinstance(args or {}, dict):
        raise ValueError(f"{what} must be a name or {{name: {{argument: value}}}}, got {given!r} with {args!r}")
    return spec(name=given, args=dict(args or {}))


def _by_layer(spec: type[Spec], what: str, given: Mapping[Any, Any] | None) -> tuple[tuple[str, Spec | None], ...]:
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f'{what} must be a mapping of layers to names, such as {{"0:4": causal}}, got {given!r}')
    entries = tuple((str(layers), _named(spec, f"{what}[{layers}]", each)) for layers, each in (given or {}).items())
    check_selectors(what, [layers for layers, _ in entries])
    return entries


def _filled(spec: Spec, noun: str, known: dict[str, Any]) -> Spec:
    """The spec with those required arguments that it lacks and the layers know."""
    missing = [name for name in required_arguments(noun, spec.name) if name not in spec.args]
    found = {name: known[name] for name in missing if known.get(name) is not None}
    return dataclasses.replace(spec, args={**spec.args, **found}) if found else spec


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
    own_masks = resolve_layers("layer_masks", layers.layer_masks, size.n_layers)
    own_score_mods = resolve_layers("layer_score_mods", layers.layer_score_mods, size.n_layers)
    # Every mask and score mod is built here: a broken one is refused before anything is allocated.
    masks: dict[str, MaskSpec] = {}
    built: dict[str, MaskMod] = {}
    blocks = []
    for i in range(size.n_layers):
        local = layers.pattern[i % len(layers.pattern)] == "local"
        spec = own_masks.get(i) or _default_mask(layers, local=local)
        score_mod = own_score_mods.get(i) or (layers.local_score_mod if local else layers.global_score_mod)
        key, mask = "", None
        if spec is not None:
            spec = _filled(spec, "mask", {"window": layers.window})
            key = _key(spec, masks)
            if key not in masks:
                masks[key], built[key] = spec, spec.build()
            mask = built[key]
        if score_mod is not None:
            # Of the softmax branch.
            n_heads = size.n_heads // 2 if local and layers.kind is LayerKind.HYMBA else size.n_heads
            score_mod = _check_score_mod(_filled(score_mod, "score mod", {"heads": n_heads}), n_heads, i, mask)
        attention = _attention(size, layers, local=local, key=key, mask=mask, score_mod=score_mod)
        blocks.append(
            Block.Config(
                attention_norm=_norm(size, size.dim),
                ffn_norm=_norm(size, size.dim),
                attention=attention,
                feed_forward=_feed_forward(size),
            )
        )
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


def _default_mask(layers: Layers, *, local: bool) -> MaskSpec | None:
    """The mask of local or of global layers; None for the linear branch alone."""
    given = layers.local_mask if local else layers.global_mask
    if given is not None:
        return given
    if not local or layers.kind is LayerKind.FULL:
        return MaskSpec(name="causal")
    if layers.kind is LayerKind.RATTENTION and layers.window is None:
        return None
    return MaskSpec(name="sliding_window", args={"window": layers.window})


def _key(spec: MaskSpec, masks: dict[str, MaskSpec]) -> str:
    """The name under which the batch's masks hold this one: sliding_window_512, attention_sink_sinks4_window64."""
    arguments = "_".join(f"{k}{v}" for k, v in sorted(spec.args.items()))
    if spec.name == "sliding_window" and set(spec.args) == {"window"}:
        arguments = str(spec.args["window"])
    key = f"{spec.name}_{arguments}".rstrip("_")
    while key in masks and masks[key] != spec:
        key += "'"
    return key


def _check_score_mod(spec: ScoreModSpec, n_heads: int, layer: int, mask: MaskMod | None) -> ScoreModSpec:
    if mask is None:
        raise ValueError(f"score mod {spec.name!r} of layer {layer} changes nothing: the layer has no softmax branch")
    info = score_info(spec.build())
    if info is not None and info.heads is not None and info.heads != n_heads:
        raise ValueError(f"score mod {spec.name!r} is for {info.heads} heads, layer {layer} has {n_heads}")
    return spec


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


def _attention(
    size: Flavor, layers: Layers, *, local: bool, key: str, mask: MaskMod | None, score_mod: ScoreModSpec | None
) -> RAttention.Config:
    """One layer's attention. Local layers rotate q and k; global ones only where asked to.

    mask: of its softmax branch, held under `key`; None: it has no such branch.
    """
    if layers.softmax_backend == "flash" and mask is not None:
        check_width(size.head_dim)
    gqa = make_gqa_config(
        dim=size.dim,
        n_heads=size.n_heads,
        n_kv_heads=size.n_kv_heads,
        head_dim=size.head_dim,
        wqkv_param_init=_linear_init(),
        wo_param_init=_linear_init(_residual_std(size)),
        qk_norm=_norm(size, size.head_dim) if size.qk_norm else None,
        inner_attention=MaskedAttention.Config(
            kernel_options=dict(KERNEL_OPTIONS[layers.softmax_backend]),
            score_mod=score_mod,
            param_init={"score_table": nn.init.zeros_},
        ),
        rope=CosSinRoPE.Config(dim=size.head_dim, max_seq_len=size.max_seq_len, theta=size.rope_theta),
    )
    inherited = {f.name: getattr(gqa, f.name) for f in dataclasses.fields(gqa)}
    kind = layers.kind if local else LayerKind.FULL
    info = None if mask is None else mask_info(mask)
    own_window = info.window if info is not None and info.is_plain_window else None
    if kind in (LayerKind.SWA, LayerKind.FULL):
        return RAttention.Config(
            **inherited,
            kind=kind,
            window=own_window if kind is LayerKind.SWA else None,
            use_rope=local or layers.global_rope,
            mask=key,
        )

    splits_heads = kind is LayerKind.HYMBA
    has_softmax = mask is not None
    # The linear heads of a split layer read every key: nothing is left out for them.
    residual = None if mask is None or splits_heads else residual_of(mask)
    residual_window = None if residual is None else residual.window
    # Heads of one branch.
    n_heads, n_kv_heads = (n // 2 if splits_heads else n for n in (size.n_heads, size.n_kv_heads))
    adds_to_softmax = has_softmax and not splits_heads
    swa_scale = BRANCH_SCALE if layers.swa_norm_init is None else layers.swa_norm_init
    rla_scale = (0.0 if adds_to_softmax else BRANCH_SCALE) if layers.rla_norm_init is None else layers.rla_norm_init
    swa_norm, rla_norm = (
        HeadRMSNorm.Config(n_heads=n_heads, head_dim=size.head_dim, param_init={"weight": Constant(float(scale))})
        for scale in (swa_scale, rla_scale)
    )
    head_scale = HeadScale.Config(head_dim=size.head_dim, param_init={"weight": nn.init.ones_})
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
        window=own_window if splits_heads else residual_window,
        use_rope=has_softmax,
        mask=key,
        residual=ResidualLinearBranch.Config(
            window=residual_window,
            feature_map=layers.feature_map,
            impl=layers.scan_impl,
            save_every=layers.scan_save_every,
            sinks=0 if residual is None else residual.sinks,
            draws=residual is not None and info is not None and info.schedule is not None,
        ),
        swa_norm=swa_norm if has_softmax and layers.branch_norm else None,
        rla_norm=rla_norm if layers.branch_norm else None,
        q_scale=head_scale if layers.learned_qk_scale else None,
        k_scale=dataclasses.replace(head_scale) if layers.learned_qk_scale else None,
        decay_gate=decay_gate if layers.decay_gate else None,
        initial_state=initial_state if layers.learned_initial_state else None,
        sum_impl=layers.scan_impl,
    )
