"""Rows of the empty chunks, whose queries are too young for a key: zeros, or what another reader of them gives.

No other stage looks at these chunks, for a window of 512 the first eight of every sequence.
"""

import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.launch import Launch, Sizes, strides


@triton.jit
def empty_rows_kernel(
    x, other, other_sb, other_st, other_sh, other_sd, T, H, WIDTH: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, d = (tl.program_id(0) * C + tl.arange(0, C)).to(tl.int64), tl.arange(0, WIDTH)
    m_t = (t < T)[:, None]
    row = tl.zeros((C, WIDTH), x.dtype.element_ty)
    if other is not None:
        p_other = other + b * other_sb + h * other_sh + (t * other_st)[:, None] + d[None, :] * other_sd
        row = tl.load(p_other, mask=m_t, other=0.0).to(x.dtype.element_ty)
    tl.store(x + (((b * T + t) * H + h) * WIDTH)[:, None] + d[None, :], row, mask=m_t)


def launch_empty_rows(sizes: Sizes, x: Tensor, other: Tensor | None = None) -> Launch:
    """Writes the rows of x (B, T, H, width), contiguous, that `sizes.empty` chunks are; there must be one."""
    args = {
        "x": x,
        "other": other,
        **strides(other, "other_sb other_st other_sh other_sd"),
        "T": sizes.T,
        "H": sizes.H,
        "WIDTH": x.shape[3],
        "C": sizes.chunk,
    }
    return Launch(empty_rows_kernel, (sizes.empty, sizes.H, sizes.B), args, {"num_warps": 4, "num_stages": 1})
