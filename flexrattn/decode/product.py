"""A matrix product of few rows, split along the sum: a GPU's multiprocessors all read the weight, whatever its width.

    out[s] = x[:, part s] W[:, part s]^T, and the residual addition that follows adds the parts up (glue.py)

cuBLAS does this with a kernel of its own for the sum. Where a weight is wide enough to fill the GPU, or the rows are
many, it is as fast or faster, and takes the product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.launch import Launch

MOST_ROWS = 64
_BLOCK_N = _BLOCK_K = 64


@triton.jit
def split_product_kernel(
    x, weight, out, B, N, K, part, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """BLOCK_N columns of one part; x (B, K), weight (N, K), out (parts, B, N) in fp32."""
    n, s = tl.program_id(0), tl.program_id(1)
    o_b, o_n = tl.arange(0, BLOCK_B), n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = s * part + tl.arange(0, BLOCK_K)
    p_x = x + o_b[None, :] * K + o_k[:, None]
    p_w = weight + o_n[:, None].to(tl.int64) * K + o_k[None, :]
    m_b = o_b < B
    # The weight's rows are the tile's rows, so that few rows of x still make a tile of the tensor cores.
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for k in range(0, part, BLOCK_K):
        b_w = tl.load(p_w + k)
        b_x = tl.load(p_x + k, mask=m_b[None, :], other=0.0)
        acc = tl.dot(b_w, b_x, acc)
    tl.store(out + (s * B + o_b[None, :]) * N + o_n[:, None], acc, mask=m_b[None, :])


def parts_of(rows: int, weight_NK: Tensor, *, multiprocessors: int) -> int:
    """Parts of the sum for so many rows and a weight (N, K); 1: leave it to cuBLAS."""
    N, K = weight_NK.shape
    if rows > MOST_ROWS or N % _BLOCK_N or weight_NK.dtype == torch.float32:
        return 1
    parts = multiprocessors // (N // _BLOCK_N)
    while parts > 1 and K % (parts * _BLOCK_K):
        parts -= 1
    return max(parts, 1)


def launch_split_product(x_BK: Tensor, weight_NK: Tensor, parts: int) -> tuple[Launch, Tensor]:
    """The launch, and its output (parts, B, N) in fp32."""
    (B, K), N = x_BK.shape, weight_NK.shape[0]
    out = torch.empty(parts, B, N, dtype=torch.float32, device=x_BK.device)
    args = {
        "x": x_BK,
        "weight": weight_NK,
        "out": out,
        "B": B,
        "N": N,
        "K": K,
        "part": K // parts,
        "BLOCK_B": max(16, triton.next_power_of_2(B)),
        "BLOCK_N": _BLOCK_N,
        "BLOCK_K": _BLOCK_K,
    }
    return Launch(split_product_kernel, (N // _BLOCK_N, parts), args, {"num_warps": 4, "num_stages": 7}), out
