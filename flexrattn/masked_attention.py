"""Softmax attention under any mask: FlexAttention's fused kernel on a GPU, the same mask densely on the CPU.

Shapes: B batch, T tokens, H query heads, G key/value heads, D head width (legend: scan_kernels/README.md);
torchtitan calls the same axes B, L, N, N, H.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torchtitan.models.common.attention import FlexAttention

# A mask for one attention kind: sparse blocks where a kernel uses them, a (B or 1, 1, T, T) boolean where not.
Mask = BlockMask | torch.Tensor


class MaskedAttention(FlexAttention):
    """softmax(q k^T * scale, over the keys the mask keeps) v; grouped heads share a key/value head.

    A `BlockMask` goes to FlexAttention, a boolean tensor to `scaled_dot_product_attention`: FlexAttention has no
    backward on the CPU. The model builds the one that the device can use, so nothing is chosen here.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        pass

    # torchtitan compiles flex with max-autotune and coordinate descent: minutes per shape, and no measurable gain on an
    # H200 (KERNELS.md). Dynamic shapes, on the other hand, cost 26-38 %, so a second length compiles a second kernel.
    # Two kernel options look safe under a window and are not. ROWS_GUARANTEED_SAFE wants a key for every row in every
    # tile that is read, and a window's far end has rows without (seen on an H200: NaN). BLOCKS_ARE_CONTIGUOUS skips
    # from a window's far end to the block behind it, not to the diagonal.
    _static_flex: ClassVar[Callable[..., Any]] = torch.compile(flex_attention, dynamic=False)

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
        q_BHTD, k_BGTD, v_BGTD = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        if isinstance(attention_masks, BlockMask):
            o_BHTD = MaskedAttention._static_flex(
                q_BHTD,
                k_BGTD,
                v_BGTD,
                block_mask=attention_masks,
                scale=scale,
                enable_gqa=enable_gqa,
                kernel_options=self.kernel_options or None,
            )
        else:
            o_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BGTD, v_BGTD, attn_mask=attention_masks, scale=scale, enable_gqa=enable_gqa
            )
        return o_BHTD.transpose(1, 2)
