"""A step by Triton kernels, and on a GPU as one CUDA graph: sampling included, and nothing for the host to wait for.

Nine launches a layer for up to 64 rows in bf16: the q, k, v product, heads (its parts, norms, rotation, the cache's new
key), both branches, their sum, and the output's and the feed-forward's products, which take norms and the gate in, with
two residual additions (product.py). Otherwise cuBLAS multiplies, and norms and gate are launches of their own.
q, k, v and gate, up are one product each: their weights are moved behind one another, and the modules keep views.

Letters: B rows, W model width, the others as in cache.py.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexrattn.attention import RAttention
from flexrattn.decode.cache import DecodeCache, LayerCache, layer_spec
from flexrattn.decode.engine import EagerStepper
from flexrattn.decode.layer import Clock
from flexrattn.decode.sampling import Mode, SamplingRows, sample
from flexrattn.model import Block, RAttentionModel

if TYPE_CHECKING:
    from flexrattn.decode.glue import Heads, Unscaled
    from flexrattn.decode.product import FusedProducts
    from scan_kernels.kernels.decode_attention import LinearBranch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTHS = (16, 32, 64, 128, 256)
_FUSED = "_flexrattn_fused"


def refusal(config: RAttentionModel.Config, *, device: torch.device, dtype: torch.dtype) -> str:
    """Why the kernels do not take this model there; "" if they do."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return "needs the package triton"
    if device.type != "cuda" and not _interpreted():
        return f"needs a CUDA device, the model is on {device.type}"
    if dtype not in DTYPES:
        return f"takes bfloat16, float16 and float32, the model is {dtype}"
    for layer in config.layers:
        spec = layer_spec(layer.attention, config)
        if spec.mask is not None:
            return f"takes causal masks and sliding windows, the model has mask {layer.attention.mask!r}"
        if spec.D not in WIDTHS:
            return f"takes head sizes 16, 32, 64, 128 and 256, the model has {spec.D}"
    return ""


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """What a block's step reads beside its modules."""

    qkv_XW: Tensor
    gate_up_XW: Tensor
    start_HFD: Tensor | None
    splits: int


def _join(weights: Sequence[torch.nn.Parameter]) -> Tensor:
    """One tensor of several weights' rows. The parameters become views of it, so that memory holds them once."""
    joined = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, joined.split([len(w) for w in weights]), strict=True):
        weight.data = part
    return joined


def joined_weights(block: Block) -> tuple[Tensor, Tensor]:
    """A block's q, k, v weights as one tensor and its gate, up weights as one; a second engine finds the same."""
    qkv, ffn = block.attention.qkv_linear, block.feed_forward
    groups = [qkv.wq.weight, qkv.wk.weight, qkv.wv.weight], [ffn.w1.weight, ffn.w3.weight]
    fused = getattr(block, _FUSED, None)
    # A model that was cast or moved has new weights.
    if fused is None or any(x.data_ptr() != group[0].data_ptr() for x, group in zip(fused, groups, strict=True)):
        fused = _join(groups[0]), _join(groups[1])
        object.__setattr__(block, _FUSED, fused)
    return fused


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the kernels are launched; nothing here changes what is computed.

    resident: programs that a multiprocessor is taken to run at a time, for the number of splits of the keys;
    ring_resident: in a layer with a linear branch. fused_products: 1, or 0 for cuBLAS. late_pending: 1 makes the
    features of pending keys with the heads, 0 in a program beside both branches. The others, of a layer with a linear
    branch: `launch_decode_attention_fwd`.
    """

    resident: int = 3
    ring_resident: int = 4
    fused_products: int = 1
    late_pending: int = 0
    num_warps: int = 1
    num_stages: int = 3
    block_s: int = 32
    block_f: int = 16
    block_v: int = 32
    state_stages: int = 3

    @classmethod
    def measured(cls, rows: int) -> Tuning:
        """What was fastest on an H200 with 1, 16, 64 and 256 rows of the 3b model."""
        if rows <= 16:
            return cls(state_stages=8) if rows < 16 else cls(resident=2)
        return cls(resident=2 if rows <= 64 else 3, ring_resident=9, num_stages=4, block_s=16, state_stages=6)

    def of_both_branches(self) -> dict[str, int]:
        """Options of `launch_decode_attention_fwd` for a layer with a linear branch."""
        options = dataclasses.asdict(self)
        others = ("resident", "ring_resident", "fused_products", "late_pending")
        return {name: options[name] for name in options if name not in others}


class TritonStep:
    """`decode_step` by kernels. ValueError where they do not take the model (`refusal`), or the cache is of another.

    multiprocessors: what the number of splits aims at; by default the GPU's.
    """

    def __init__(
        self,
        model: RAttentionModel,
        cache: DecodeCache,
        *,
        multiprocessors: int | None = None,
        tuning: Tuning | None = None,
    ):
        cache.check_model(model.config)
        if cache.dtype != (dtype := model.norm.weight.dtype):
            raise ValueError(f"the Triton step needs a cache of the model's dtype {dtype}, got {cache.dtype}")
        reason = refusal(model.config, device=cache.device, dtype=cache.dtype)
        if reason:
            raise ValueError(f"the Triton step {reason}; use impl 'torch'")
        self.shared: dict[str, int] = {}
        if cache.device.type == "cuda":
            found = torch.cuda.get_device_properties(cache.device)
            multiprocessors = multiprocessors or found.multi_processor_count
            # What every GPU since Ampere has, where torch does not say.
            self.shared = {"shared": getattr(found, "shared_memory_per_block_optin", 99 * 1024)}
        self.model, self.cache, self.tuning = model, cache, tuning or Tuning.measured(cache.rows)
        self.multiprocessors = multiprocessors or 4
        self.products = self._fused_products()
        self.weights = [
            self._prepare(block, layer) for block, layer in zip(model.layers.values(), cache.layers, strict=True)
        ]

    def _prepare(self, block: Block, layer: LayerCache) -> _Weights:
        from scan_kernels.kernels.decode_softmax import choose_splits

        attention = block.attention
        fused = joined_weights(block)
        start = None if attention.initial_state is None else attention.initial_state().float().contiguous()
        return _Weights(
            qkv_XW=fused[0],
            gate_up_XW=fused[1],
            start_HFD=start,
            splits=choose_splits(
                self.cache.rows * layer.spec.G,
                max(layer.slots, 1),
                multiprocessors=self.multiprocessors,
                resident=self.tuning.ring_resident if layer.spec.residual else self.tuning.resident,
                block_s=self.tuning.block_s if layer.spec.residual else 64,
            ),
        )

    def _fused_products(self) -> FusedProducts | None:
        """None where cuBLAS takes the products: many rows, other dtypes (a sum in fp16 could overflow), odd widths."""
        from flexrattn.decode.product import FusedProducts

        if not self.tuning.fused_products or not (self.cache.dtype == torch.bfloat16 or _interpreted()):
            return None
        weights: list[tuple[Tensor, bool]] = []
        for block in self.model.layers.values():
            qkv, gate_up = joined_weights(block)
            one_by_one = qkv, block.attention.wo.weight, block.feed_forward.w2.weight
            weights += [*((weight, False) for weight in one_by_one), (gate_up, True)]
        return FusedProducts.build(
            weights,
            rows=self.cache.rows,
            W=self.model.norm.weight.shape[0],
            multiprocessors=self.multiprocessors,
            **self.shared,
        )

    @torch.no_grad()
    def __call__(self, token_B: Tensor, active_B: Tensor) -> Tensor:
        """Logits (B, V) behind one more token of every active row; the cache takes the tokens in."""
        from flexrattn.decode.clock import start_clock

        clock = start_clock(self.cache, active_B)
        if self.products is None:
            return self._layers(token_B, clock)
        return self._fused_layers(self.products, token_B, clock)

    def _fused_layers(self, products: FusedProducts, token_B: Tensor, clock: Clock) -> Tensor:
        from flexrattn.decode.glue import launch_add_norm, row_norm_eps

        model = self.model
        norms = [*(block.attention_norm for block in model.layers.values()), model.norm]
        products.embed(token_B, model.tok_embeddings.weight, norms[0])
        for i, (block, layer, weights) in enumerate(
            zip(model.layers.values(), self.cache.layers, self.weights, strict=True)
        ):
            ffn = block.feed_forward
            qkv = products.unscaled(weights.qkv_XW, norms[i])
            o_BHD = self._attention(block.attention, layer, weights, qkv, clock)
            products.add(o_BHD.flatten(1), block.attention.wo.weight, next_norm=block.ffn_norm)
            gated_BK = products.normed(weights.gate_up_XW, block.ffn_norm, activation=ffn.activation)
            products.add(gated_BK, ffn.w2.weight, next_norm=norms[i + 1])
        if products.takes(model.lm_head.weight):
            return products.normed(model.lm_head.weight, model.norm)
        x_BW = torch.empty_like(products.h)
        launch_add_norm(products.h, None, model.norm.weight, row_norm_eps(model.norm), x_BW).run()
        return x_BW @ model.lm_head.weight.T

    def _layers(self, token_B: Tensor, clock: Clock) -> Tensor:
        from flexrattn.decode.glue import launch_add_norm, launch_gate, row_norm_eps

        model = self.model
        h_BW = model.tok_embeddings(token_B)
        x_BW = torch.empty_like(h_BW)
        delta: Tensor | None = None
        for block, layer, weights in zip(model.layers.values(), self.cache.layers, self.weights, strict=True):
            norm = block.attention_norm
            launch_add_norm(h_BW, delta, norm.weight, row_norm_eps(norm), x_BW).run()
            o_BHD = self._attention(block.attention, layer, weights, x_BW @ weights.qkv_XW.T, clock)
            delta = self._product(o_BHD.flatten(1), block.attention.wo.weight)
            norm = block.ffn_norm
            launch_add_norm(h_BW, delta, norm.weight, row_norm_eps(norm), x_BW).run()
            gate_up = x_BW @ weights.gate_up_XW.T
            gated = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            launch_gate(gate_up, gated, activation=block.feed_forward.activation).run()
            delta = self._product(gated, block.feed_forward.w2.weight)
        launch_add_norm(h_BW, delta, model.norm.weight, row_norm_eps(model.norm), x_BW).run()
        return x_BW @ model.lm_head.weight.T

    def _product(self, x_BK: Tensor, weight_NK: Tensor) -> Tensor:
        """x W^T (B, N), or its parts (parts, B, N)."""
        from flexrattn.decode.product import split_product

        parts = None
        if self.tuning.fused_products:
            parts = split_product(x_BK, weight_NK, multiprocessors=self.multiprocessors, **self.shared)
        return x_BK @ weight_NK.T if parts is None else parts

    def _attention(
        self, attention: RAttention, layer: LayerCache, weights: _Weights, qkv: Tensor | Unscaled, clock: Clock
    ) -> Tensor:
        from flexrattn.decode.glue import launch_heads, row_norm_eps
        from scan_kernels.kernels.decode_attention import SoftmaxBranch, launch_decode_attention_fwd
        from scan_kernels.kernels.decode_combine import launch_decode_combine

        spec = layer.spec
        table = None if attention.rope is None else attention.rope.cache
        k_BGSD, v_BGSD = layer.k_BGSD, layer.v_BGSD
        norms = scales = None
        if attention.q_norm is not None and attention.k_norm is not None:
            norms = attention.q_norm.weight, attention.k_norm.weight, row_norm_eps(attention.q_norm)
        if attention.q_scale is not None and attention.k_scale is not None:
            scales = attention.q_scale.weight, attention.k_scale.weight
        absorbed_B = absorbed_after_B = None
        if spec.residual and spec.window is not None:
            absorbed_B, absorbed_after_B = clock.absorbed[spec.window], clock.absorbed_after[spec.window]
        launches, heads = launch_heads(
            qkv,
            H=spec.H,
            G=spec.G,
            D=spec.D,
            norms=norms,
            scales=scales,
            table=table,
            length_B=clock.position_B,
            active_B=clock.active_B,
            cache=None if k_BGSD is None or v_BGSD is None else (k_BGSD, v_BGSD),
            feature_map=spec.feature_map if spec.residual else None,
            window=spec.window,
            absorbed_B=absorbed_B,
            absorbed_after_B=absorbed_after_B,
            pending=bool(self.tuning.late_pending),
        )
        for launch in launches:
            launch.run()
        linear = self._linear_branch(attention, layer, weights, heads, clock) if spec.residual else None
        softmax = None
        if k_BGSD is not None and v_BGSD is not None:
            assert heads.q_softmax is not None
            softmax = SoftmaxBranch(
                q=heads.q_softmax,
                k=k_BGSD,
                v=v_BGSD,
                window=spec.window,
                scale=spec.D**-0.5 if attention.scaling is None else attention.scaling,
                splits=weights.splits,
            )
        tuning = {} if linear is None else self.tuning.of_both_branches()
        position_B, active_B = clock.position_B, clock.active_B
        launch, parts = launch_decode_attention_fwd(softmax, linear, position_B, active_B, **tuning)
        launch.run()
        out_BHD = torch.empty(self.cache.rows, spec.H, spec.D, dtype=self.cache.dtype, device=self.cache.device)
        norm = attention.swa_norm or attention.rla_norm
        launch_decode_combine(
            parts,
            linear,
            position_B,
            active_B,
            softmax_weight=attention.swa_norm.weight if attention.swa_norm is not None else None,
            linear_weight=attention.rla_norm.weight if attention.rla_norm is not None else None,
            eps=norm.eps if norm is not None else 0.0,
            out_BHD=out_BHD,
        ).run()
        return out_BHD

    def _linear_branch(
        self, attention: RAttention, layer: LayerCache, weights: _Weights, heads: Heads, clock: Clock
    ) -> LinearBranch:
        from scan_kernels.kernels.decode_attention import LinearBranch

        window = layer.spec.window
        v = heads.v_linear if window is None else layer.v_BGSD
        assert heads.phi_q is not None
        assert heads.phi_k is not None
        assert layer.state_BGFD is not None
        assert v is not None
        return LinearBranch(
            phi_q=heads.phi_q,
            phi_k=heads.phi_k,
            v=v,
            state=layer.state_BGFD,
            start=weights.start_HFD,
            window=0 if window is None else window,
            all_features=bool(self.tuning.late_pending) and window is not None,
            feature_map=layer.spec.feature_map,
            table=None if attention.rope is None else attention.rope.cache,
            k_scale=None if attention.k_scale is None else attention.k_scale.weight,
            absorbed=None if window is None else clock.absorbed[window],
            absorbed_after=None if window is None else clock.absorbed_after[window],
        )


class TritonStepper(EagerStepper):
    """`TritonStep` and `sample` on the engine's tensors, launched one by one."""

    # A state is written once in so many steps; the ring is longer by as many keys less one.
    fold_every = 8

    def __init__(
        self, model: RAttentionModel, cache: DecodeCache, token_B: Tensor, active_B: Tensor, rows: SamplingRows
    ):
        super().__init__(model, cache, token_B, active_B, rows)
        self.run = TritonStep(model, cache)

    @torch.no_grad()
    def step(self, mode: Mode) -> None:
        from flexrattn.decode.clock import launch_likeliest

        logits_BV = self.run(self.token_B, self.active_B)
        if mode is Mode.GREEDY:
            launch_likeliest(logits_BV, self.token_B).run()
        else:
            self.token_B.copy_(sample(logits_BV, self.rows, self.cache.lengths_B, mode))


class GraphStepper(TritonStepper):
    """One CUDA graph a step, captured at the first step of each sampling mode: one launch, no host sync."""

    def __init__(
        self, model: RAttentionModel, cache: DecodeCache, token_B: Tensor, active_B: Tensor, rows: SamplingRows
    ):
        super().__init__(model, cache, token_B, active_B, rows)
        self.graphs: dict[Mode, torch.cuda.CUDAGraph] = {}

    @torch.no_grad()
    def step(self, mode: Mode) -> None:
        if mode not in self.graphs:
            self.graphs[mode] = self._capture(mode)
        self.graphs[mode].replay()

    def _capture(self, mode: Mode) -> torch.cuda.CUDAGraph:
        """Compile everything with all rows at rest, which changes nothing, then record."""
        active_B, token_B = self.active_B.clone(), self.token_B.clone()
        self.active_B.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                super().step(mode)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            super().step(mode)
        self.active_B.copy_(active_B)
        self.token_B.copy_(token_B)
        return graph
