"""Softmax attention under any mask and score mod: FlexAttention's fused kernel on a GPU, the same densely on the CPU.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head width (legend: scan_kernels/README.md);
torchtitan calls the same axes B, L, N, N, H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtitan.models.common.attention import FlexAttention

from flexrattn.flash_window import PlainWindow, check_backend, check_width, flash_window_attention
from score_mods import MaskMod, ScoreMod, dense_attention, make_mask, make_score_mod, score_info, tensors_in

# A mask for one attention kind: sparse blocks where a kernel uses them, a (B or 1, 1, T, T) boolean where not, and no
# more than the law where a kernel knows it.
Mask = BlockMask | torch.Tensor | PlainWindow

# FlexAttention's options by the backend that they ask for. `flash` makes CuTe kernels of the same masks and score mods
# by way of the package flash-attn-4, and for a `PlainWindow` takes the package's own window. Under a window of 512 on
# an H200 it took three quarters of the time (docs/kernels.md); its gradients are sums in no fixed order, so that two
# runs differ in their last bits.
KERNEL_OPTIONS: dict[str, dict[str, str]] = {"triton": {}, "flash": {"BACKEND": "FLASH"}}


# A score mod that reads a tensor loads a value for each score. Pipelined, these loads want more shared memory than a
# Hopper has (seen on an H200: 242 KiB of 227 for FlexAttention's own choice of three stages).
_TABLE_OPTIONS = {"num_stages": 1}


@dataclass(frozen=True, kw_only=True)
class NamedFactory:
    """A registered name or "package.module:factory", and the factory's arguments."""

    name: str
    args: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "args": dict(self.args)}


class MaskSpec(NamedFactory):
    """A mask by its name."""

    def build(self) -> MaskMod:
        return make_mask(self.name, **self.args)


class ScoreModSpec(NamedFactory):
    """A score mod by its name."""

    def build(self) -> ScoreMod:
        return make_score_mod(self.name, **self.args)


class MaskedAttention(FlexAttention):
    """softmax(score_mod(q k^T * scale), over the keys the mask keeps) v; grouped heads share a key/value head.

    A `BlockMask` goes to FlexAttention, a `PlainWindow` to flash-attn-4's own kernels, a boolean tensor to
    `scaled_dot_product_attention` (with a score mod to `dense_attention`): FlexAttention has no backward on the CPU.
    The model builds the one that the device can use, so nothing is chosen here. `score_table` is the parameter of a
    score mod with a learned table.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        score_mod: ScoreModSpec | None = None

    # torchtitan compiles flex with max-autotune and coordinate descent: minutes per shape, and no measurable gain on an
    # H200 (KERNELS.md). Dynamic shapes, on the other hand, cost 26-38 %, so a second length compiles a second kernel.
    # Two kernel options look safe under a window and are not. ROWS_GUARANTEED_SAFE wants a key for every row in every
    # tile that is read, and a window's far end has rows without (seen on an H200: NaN). BLOCKS_ARE_CONTIGUOUS skips
    # from a window's far end to the block behind it, not to the diagonal.
    _static_flex: ClassVar[Callable[..., Any]] = torch.compile(flex_attention, dynamic=False)

    def __init__(self, config: Config):
        super().__init__(config)
        # Built in code that no device context reaches: a score mod may hold tensors of its own.
        self.score_mod = None
        self.score_table: torch.nn.Parameter | None = None
        if config.score_mod is not None:
            with torch.device("cpu"):
                self.score_mod = config.score_mod.build()
            if next(tensors_in(self.score_mod), None) is not None and config.kernel_options.get("BACKEND") != "FLASH":
                self.kernel_options = {**_TABLE_OPTIONS, **config.kernel_options}
            info = score_info(self.score_mod)
            if info is not None and info.table_shape is not None:
                self.score_table = torch.nn.Parameter(torch.empty(info.table_shape))

    def _bound_score_mod(self) -> ScoreMod | None:
        if self.score_mod is None or self.score_table is None:
            return self.score_mod
        info = score_info(self.score_mod)
        assert info is not None
        assert info.bind is not None
        # FlexAttention sums the gradient of a captured tensor in that tensor's dtype.
        return info.bind(self.score_table.float())

    def forward(
        self,
        q_BLNH: torch.Tensor,
        k_BLNH: torch.Tensor,
        v_BLNH: torch.Tensor,
        *,
        attention_masks: Mask,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if isinstance(attention_masks, PlainWindow):
            if self.score_mod is not None:
                raise ValueError(f"a score mod needs a block mask, got {attention_masks}")
            return flash_window_attention(q_BLNH, k_BLNH, v_BLNH, window=attention_masks.window, scale=scale)
        q_BHTD, k_BGTD, v_BGTD = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        score_mod = self._bound_score_mod()
        if isinstance(attention_masks, BlockMask):
            if self.kernel_options.get("BACKEND") == "FLASH":
                check_width(q_BLNH.shape[-1])
            o_BHTD = MaskedAttention._static_flex(
                q_BHTD,
                k_BGTD,
                v_BGTD,
                score_mod=score_mod,
                block_mask=attention_masks,
                scale=scale,
                enable_gqa=enable_gqa,
                kernel_options=self.kernel_options or None,
            )
        elif score_mod is not None:
            check_backend(self.kernel_options, q_BLNH.device)
            o_BHTD = dense_attention(q_BHTD, k_BGTD, v_BGTD, mask=attention_masks, score_mod=score_mod, scale=scale)
        else:
            check_backend(self.kernel_options, q_BLNH.device)
            o_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BGTD, v_BGTD, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
            )
        return o_BHTD.transpose(1, 2)
