"""The decoder: pre-norm blocks in a repeating local/global pattern, and one mask per distinct mask of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torchtitan.models.common.decoder import Decoder, TransformerBlock
from torchtitan.models.common.feed_forward import FeedForward
from torchtitan.tools.logging import logger

from flexrattn import flops
from flexrattn.attention import RAttention
from flexrattn.flash_window import PlainWindow, plain_window
from flexrattn.masked_attention import Mask, MaskSpec
from flexrattn.packing import document_ids_from_positions, rows_are_whole
from score_mods import (
    MaskMod,
    build_block_mask,
    dense_mask,
    drawn_window,
    in_documents,
    mask_info,
    reads_ahead,
    score_info,
)


class GatedFeedForward(FeedForward):
    """w2(activation(w1 x) * w3 x): "silu" is SwiGLU, "gelu" is GeGLU (the tanh form, as JAX computes it)."""

    @dataclass(kw_only=True, slots=True)
    class Config(FeedForward.Config):
        activation: Literal["silu", "gelu"] = "silu"

    def __init__(self, config: Config):
        super().__init__(config)
        self.activation = config.activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.w1(x)) if self.activation == "silu" else F.gelu(self.w1(x), approximate="tanh")
        return self.w2(gate * self.w3(x))


class Block(TransformerBlock):
    """x + attention(norm(x)); x + feed_forward(norm(x))."""

    @dataclass(kw_only=True, slots=True)
    class Config(TransformerBlock.Config):
        pass

    def __init__(self, config: Config):
        super().__init__()
        self.attention = config.attention.build()
        assert config.feed_forward is not None
        self.feed_forward = config.feed_forward.build()
        self.attention_norm = config.attention_norm.build()
        self.ffn_norm = config.ffn_norm.build()

    def forward(
        self,
        x: torch.Tensor,
        attention_masks: dict[str, Mask],
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), attention_masks, positions)
        return x + self.feed_forward(self.ffn_norm(x))


class RAttentionModel(Decoder):
    """Decoder whose layers each name one of `masks`; every mask is confined to documents."""

    @dataclass(kw_only=True, slots=True)
    class Config(Decoder.Config):
        masks: dict[str, MaskSpec]

        def update_from_config(self, *, config: Any, **kwargs: Any) -> None:
            Decoder.Config.update_from_config(self, config=config, **kwargs)
            refuse_context_parallel(config.parallelism)
            refuse_split_heads(self, config.parallelism)
            refuse_uneven_head_split(self, config.parallelism)
            if config.parallelism.tensor_parallel_degree > 1:
                for layer in self.layers:
                    layer.attention.sum_impl = None
                    layer.attention.joins_gradients = False
            from flexrattn.sharding import set_sharding

            set_sharding(self, enable_sp=config.parallelism.enable_sequence_parallel)

        def get_nparams_and_flops(self, model: torch.nn.Module, seq_len: int) -> tuple[int, int]:
            return flops.nparams_and_flops_per_token(self, model, seq_len)

    def __init__(self, config: Config):
        super().__init__(config)
        self.mask_mods = {key: spec.build() for key, spec in config.masks.items()}
        self._drawn: dict[str, torch.Tensor] = {}
        self._plain = _plain_windows(config, self.mask_mods)
        # Whether all rows so far were one document each; None: no batch was seen.
        self._whole_rows: bool | None = None
        _make_room_for_compilations(config)

    def set_step(self, step: int) -> None:
        """Draw the windows of training step `step` (counted from 1), for both branches of every layer.

        The trainer calls it before each step; a loop of your own does, too, where a mask draws windows. They are data
        at fixed addresses: nothing is compiled again, and nothing waits for the device.
        """
        for key, mask in self.mask_mods.items():
            info = mask_info(mask)
            if info is None or info.schedule is None:
                continue
            window = info.schedule.at(step)
            if key not in self._drawn:
                device = next(self.parameters()).device
                self._drawn[key] = torch.full((), window, dtype=torch.int64, device=device)
            self._drawn[key].fill_(window)
        for block in self.layers.values():
            residual = block.attention.residual
            if residual is not None and residual.draws:
                residual.drawn_window = self._drawn[block.attention.mask]

    def see_batch(self, positions: torch.Tensor) -> None:
        """Look at the positions (B, T) of the next training batch while they are on the host.

        As long as every row is one document, layers of `softmax_backend: flash` whose mask is a plain window, or
        causal, train with flash-attn-4's own kernels and without document borders. The first row of two documents ends
        this for good, so that a run compiles its blocks twice at most. The trainer calls it for each batch; without
        calls masks are confined to documents.
        """
        if not self._plain or self._whole_rows is False:
            return
        whole, before = rows_are_whole(positions), self._whole_rows
        if whole != before:
            names = ", ".join(self._plain)
            way = "flash-attn-4's own kernels, as each row is one document" if whole else "FlexAttention's FLASH"
            since = "" if before is None else ": from this batch on, rows hold several documents"
            logger.info(f"Masks {names} by {way}{since}")
        self._whole_rows = whole

    def get_attention_masks(self, positions: torch.Tensor) -> dict[str, Mask]:
        """One mask per distinct mask for a batch of positions (B, T): sparse blocks on a GPU, dense on the CPU.

        Keeps a pair when the layer's mask keeps it, asked for positions in the document, and both tokens are of one
        document. A mask that draws windows is that of the step in training mode, and that of evaluation otherwise.
        Where `see_batch` found one document a row, a mask for flash-attn-4's own kernels is its law alone.
        """
        batch, tokens = positions.shape
        document_ids = document_ids_from_positions(positions)
        build = dense_mask if positions.device.type == "cpu" else build_block_mask

        def of_batch(key: str, mask: MaskMod) -> Mask:
            if self.training and self._whole_rows and key in self._plain and positions.device.type != "cpu":
                return self._plain[key]
            info = mask_info(mask)
            if self.training and info is not None and info.schedule is not None:
                if key not in self._drawn:
                    raise ValueError(f"mask {key!r} draws its window by training step: call model.set_step(step) first")
                mask = drawn_window(self._drawn[key])
            whole = in_documents(mask, document_ids=document_ids, positions=positions)
            return build(whole, batch=batch, heads=None, q_len=tokens, kv_len=tokens, device=positions.device)

        return {key: of_batch(key, mask) for key, mask in self.mask_mods.items()}


def _plain_windows(config: RAttentionModel.Config, mask_mods: dict[str, MaskMod]) -> dict[str, PlainWindow]:
    """The masks that flash-attn-4's own kernels can take for every layer that has them."""
    plain = {key: window for key, mask in mask_mods.items() if (window := plain_window(mask)) is not None}
    for layer in config.layers:
        inner = layer.attention.inner_attention
        if inner.kernel_options.get("BACKEND") != "FLASH" or inner.score_mod is not None:
            plain.pop(layer.attention.mask, None)
    return plain


def _make_room_for_compilations(config: RAttentionModel.Config) -> None:
    """Let torch.compile keep a program for each distinct mask and score mod.

    Its limit is 8 of one function. Past it FlexAttention would go on uncompiled, and compute all scores. Each kind of
    layer is compiled for training, for evaluation, for training on whole rows where that is another program, and for a
    second length.
    """
    kinds = {(layer.attention.mask, str(layer.attention.inner_attention.score_mod)) for layer in config.layers}
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 6 * len(kinds) + 4)
    dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 16 * dynamo.recompile_limit)


def refuse_split_heads(config: RAttentionModel.Config, parallelism: Any) -> None:
    """ValueError where tensor parallelism would split the heads that a score mod tells apart."""
    if parallelism.tensor_parallel_degree == 1:
        return
    for layer in config.layers:
        spec = layer.attention.inner_attention.score_mod
        info = None if spec is None else score_info(spec.build())
        if info is not None and info.heads is not None:
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {parallelism.tensor_parallel_degree} splits the heads that "
                f"score mod {info.name!r} tells apart: use 1, or a score mod that treats all heads alike"
            )


def refuse_context_parallel(parallelism: Any) -> None:
    """ValueError for a degree above 1. The model asks, and the trainer before any device is touched."""
    if parallelism.context_parallel_degree > 1:
        raise ValueError(
            f"parallelism.context_parallel_degree = {parallelism.context_parallel_degree} is not supported: "
            "the linear branch needs the state of the ranks before it, which is not exchanged yet; use 1"
        )


def refuse_uneven_head_split(config: RAttentionModel.Config, parallelism: Any) -> None:
    """ValueError where a tensor-parallel rank would not have whole pairs of KV groups of a layer that splits them."""
    degree = parallelism.tensor_parallel_degree
    for layer in config.layers:
        groups = layer.attention.n_kv_heads
        if layer.attention.splits_heads and groups % (2 * degree):
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {degree} does not go with layer_kind 'hymba' and {groups} KV "
                f"heads: a rank needs whole pairs of them; use a degree that divides {groups // 2}"
            )


def log_layers(config: RAttentionModel.Config, seq_len: int) -> None:
    """Say once what the layers are, and where a window makes one of them pointless."""
    described = [describe_layer(layer.attention) for layer in config.layers]
    counts = {text: described.count(text) for text in dict.fromkeys(described)}
    logger.info("Layers: " + ", ".join(f"{n} x {text}" for text, n in counts.items()))
    for key, spec in config.masks.items():
        if reads_ahead(spec.build()):
            logger.warning(f"mask {key} lets queries read later tokens, so that their losses see the answers")
    for layer in config.layers:
        attention = layer.attention
        if attention.residual is not None and (attention.residual.window or 0) >= seq_len:
            logger.warning(
                f"window {attention.window} reaches past training.seq_len {seq_len}: the linear branch reads nothing"
            )
            return


def describe_layer(attention: RAttention.Config) -> str:
    """ "rattention(window 512, softmax)": kind, window, feature map, and the mask where it is not the kind's own."""
    details = []
    if attention.window is not None:
        details.append(f"window {attention.window}")
    elif not attention.has_softmax:
        details.append("no window")
    if attention.residual is not None:
        details.append(attention.residual.feature_map)
    if attention.decay_gate is not None:
        details.append("decay gate")
    if attention.has_softmax:
        details.append("rope" if attention.use_rope else "no positions")
        details.append(f"mask {attention.mask}")
        if attention.inner_attention.score_mod is not None:
            details.append(f"score mod {attention.inner_attention.score_mod.build().__name__}")
    return f"{attention.kind.value}({', '.join(details)})"
