"""A step by Triton kernels, and on a GPU as one CUDA graph: sampling included, and nothing for the host to wait for.

Eleven launches a layer: norm, the q, k, v product, heads (norms, rotation, the cache's new key), the softmax branch
over the ring, the linear branch, their sum, the output product, norm, and the feed-forward's two products with the gate
between.
q, k, v and gate, up are one product each: their weights are moved behind one another, and the modules keep views.

Letters: B rows, W model width, the others as in cache.py.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexrattn.attention import RAttention
from flexrattn.decode.cache import DecodeCache, LayerCache, layer_spec
from flexrattn.decode.engine import EagerStepper
from flexrattn.decode.layer import Clock, make_clock
from flexrattn.decode.sampling import Mode, SamplingRows, sample
from flexrattn.decode.step import finish_step
from flexrattn.model import Block, RAttentionModel

if TYPE_CHECKING:
    from flexrattn.decode.glue import Heads
    from scan_kernels.kernels.decode_softmax import LinearParts

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

    waves: programs of the softmax kernel that each multiprocessor gets, by splitting the keys.
    block_f: features of a program of the state's kernel. overlap: the two run beside each other.
    """

    waves: int = 4
    block_f: int = 64
    overlap: bool = False


class TritonStep:
    """`decode_step` by kernels. ValueError where they do not take the model (`refusal`).

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
        reason = refusal(model.config, device=cache.device, dtype=cache.dtype)
        if reason:
            raise ValueError(f"the Triton step {reason}; use impl 'torch'")
        if multiprocessors is None:
            on_gpu = cache.device.type == "cuda"
            multiprocessors = torch.cuda.get_device_properties(cache.device).multi_processor_count if on_gpu else 4
        self.model, self.cache, self.tuning = model, cache, tuning or Tuning()
        self.side = torch.cuda.Stream() if self.tuning.overlap and cache.device.type == "cuda" else None
        self.weights = [
            self._prepare(block, layer, multiprocessors)
            for block, layer in zip(model.layers.values(), cache.layers, strict=True)
        ]

    def _prepare(self, block: Block, layer: LayerCache, multiprocessors: int) -> _Weights:
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
                multiprocessors=multiprocessors,
                waves=self.tuning.waves,
            ),
        )

    @torch.no_grad()
    def __call__(self, token_B: Tensor, active_B: Tensor) -> Tensor:
        """Logits (B, V) behind one more token of every active row; the cache takes the tokens in."""
        from flexrattn.decode.glue import launch_add_norm, launch_gate, row_norm_eps

        model, cache = self.model, self.cache
        clock = make_clock(cache, active_B)
        h_BW = model.tok_embeddings(token_B)
        x_BW = torch.empty_like(h_BW)
        delta_BW: Tensor | None = None
        for block, layer, weights in zip(model.layers.values(), cache.layers, self.weights, strict=True):
            norm = block.attention_norm
            launch_add_norm(h_BW, delta_BW, norm.weight, row_norm_eps(norm), x_BW).run()
            o_BHD = self._attention(block.attention, layer, weights, x_BW @ weights.qkv_XW.T, clock)
            delta_BW = o_BHD.flatten(1) @ block.attention.wo.weight.T
            norm = block.ffn_norm
            launch_add_norm(h_BW, delta_BW, norm.weight, row_norm_eps(norm), x_BW).run()
            gate_up = x_BW @ weights.gate_up_XW.T
            gated = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            launch_gate(gate_up, gated, activation=block.feed_forward.activation).run()
            delta_BW = gated @ block.feed_forward.w2.weight.T
        launch_add_norm(h_BW, delta_BW, model.norm.weight, row_norm_eps(model.norm), x_BW).run()
        finish_step(cache, clock.absorbed_after, active_B)
        return x_BW @ model.lm_head.weight.T

    def _attention(
        self, attention: RAttention, layer: LayerCache, weights: _Weights, qkv_BX: Tensor, clock: Clock
    ) -> Tensor:
        from flexrattn.decode.glue import launch_heads, row_norm_eps
        from scan_kernels.kernels.decode_softmax import launch_decode_combine, launch_decode_softmax_fwd

        spec = layer.spec
        table = None if attention.rope is None else attention.rope.cache
        k_BGSD, v_BGSD = layer.k_BGSD, layer.v_BGSD
        norms = scales = None
        if attention.q_norm is not None and attention.k_norm is not None:
            norms = attention.q_norm.weight, attention.k_norm.weight, row_norm_eps(attention.q_norm)
        if attention.q_scale is not None and attention.k_scale is not None:
            scales = attention.q_scale.weight, attention.k_scale.weight
        absorbed_B = clock.absorbed[spec.window] if spec.residual and spec.window is not None else None
        launches, heads = launch_heads(
            qkv_BX,
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
        )
        for launch in launches:
            launch.run()
        partials = None
        linear = self._read_state(layer, weights, heads, clock) if spec.residual else None
        if k_BGSD is not None and v_BGSD is not None:
            assert heads.q_softmax is not None
            scale = spec.D**-0.5 if attention.scaling is None else attention.scaling
            launch, *found = launch_decode_softmax_fwd(
                heads.q_softmax,
                k_BGSD,
                v_BGSD,
                clock.position_B,
                clock.active_B,
                window=spec.window,
                scale=scale,
                splits=weights.splits,
            )
            launch.run()
            partials = found[0], found[1], found[2]
        if spec.residual and self.side is not None:
            torch.cuda.current_stream().wait_stream(self.side)
        out_BHD = qkv_BX.new_empty(qkv_BX.shape[0], spec.H, spec.D)
        norm = attention.swa_norm or attention.rla_norm
        launch_decode_combine(
            partials,
            linear,
            softmax_weight=attention.swa_norm.weight if attention.swa_norm is not None else None,
            linear_weight=attention.rla_norm.weight if attention.rla_norm is not None else None,
            eps=norm.eps if norm is not None else 0.0,
            out_BHD=out_BHD,
        ).run()
        return out_BHD

    def _read_state(self, layer: LayerCache, weights: _Weights, heads: Heads, clock: Clock) -> LinearParts:
        """What the state gives to the queries, on the side stream where there is one."""
        from scan_kernels.kernels.decode_softmax import LinearParts
        from scan_kernels.kernels.decode_state import launch_decode_state_fwd

        window = layer.spec.window
        v = heads.v_linear if window is None else layer.v_BGSD
        assert heads.phi_q is not None
        assert heads.phi_k is not None
        assert layer.state_BGFD is not None
        assert v is not None
        launch, read = launch_decode_state_fwd(
            heads.phi_q,
            heads.phi_k,
            v,
            layer.state_BGFD,
            clock.active_B,
            absorbed_B=None if window is None else clock.absorbed[window],
            absorbed_after_B=None if window is None else clock.absorbed_after[window],
            start_HFD=weights.start_HFD,
            block_f=self.tuning.block_f,
        )
        if self.side is None:
            launch.run()
        else:
            # Its tensors belong to the main stream, which waits for this one before the branches are added.
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                launch.run()
        if window is None:
            return LinearParts(read=read, phi_q=heads.phi_q, phi_k=heads.phi_k)
        return LinearParts(
            read=read,
            phi_q=heads.phi_q,
            phi_k=heads.phi_k,
            v=v,
            window=window,
            length=clock.position_B,
            active=clock.active_B,
            absorbed=clock.absorbed[window],
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
        logits_BV = self.run(self.token_B, self.active_B)
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
