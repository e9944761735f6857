"""A decode step's matrix products of few rows, each with what stands before and behind it.

    norm:      acc = (x W^T) / sqrt(mean(h^2) + eps)          x = h * norm weight, as the product before left it
    residual:  h += acc; x = h * next norm's weight; squares = sums of h^2 over blocks of columns
    gate:      out = activation(acc of gate rows) * acc of up rows

The mean of h^2 is one number a row, so it may as well scale the product as its operand; a norm then needs no launch,
only the sums of squares, which are left behind in blocks of columns and added up by who needs them.
A weight too narrow to occupy the GPU is split along the sum. Its parts are added up by the next kernel: the residual
addition below, or the heads (glue.py).

Letters: B rows, N outputs, K inputs, W model width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from flexrattn.decode.glue import Unscaled, launch_embed, row_norm_eps
from scan_kernels.kernels.launch import Launch, precision

MOST_ROWS = 64
SHARED = 227 * 1024  # bytes that a program may have on an H100
SILU, GELU = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == GELU:
        # 0.5 (1 + tanh(u)) = sigmoid(2 u)
        y = x * tl.sigmoid(2.0 * 0.7978845608028654 * (x + 0.044715 * x * x * x))
    else:
        y = x * tl.sigmoid(x)
    return y


@triton.jit
def product_kernel(
    x,
    weight,
    squares,
    h,
    next_weight,
    next_x,
    next_squares,
    out,
    B,
    N,
    K,
    part,
    eps,
    SQUARES: tl.constexpr,
    IN_PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N columns of one part of the sum (parts, B, N), in fp32, or of the whole one."""
    n, s = tl.program_id(0), tl.program_id(1)
    o_b, o_n = tl.arange(0, BLOCK_B), n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = s * part + tl.arange(0, BLOCK_K)
    p_row = weight + o_n.to(tl.int64) * K
    m_b = o_b < B
    p_x = x + o_b[None, :] * K + o_k[:, None]
    p_w = p_row[:, None] + o_k[None, :]
    if squares is not None:
        o_s = tl.arange(0, SQUARES)
        b_squares = tl.load(squares + o_s[:, None] * B + o_b[None, :], mask=m_b[None, :], other=0.0)
    o_out = o_b[None, :] * N + o_n[:, None]
    if h is not None:
        # On their way while the product is computed.
        b_h = tl.load(h + o_out, mask=m_b[None, :], other=0.0)
        b_next = tl.load(next_weight + o_n)
    # The weight's rows are the tile's rows, so that few rows of x still make a tile of the tensor cores.
    acc = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_B), tl.float32)
    for k in range(0, part, BLOCK_K):
        b_x = tl.load(p_x + k, mask=m_b[None, :], other=0.0)
        acc = tl.dot(tl.load(p_w + k), b_x, acc, input_precision=PRECISION)
        if ACTIVATION:
            up = tl.dot(tl.load(p_w + N * K + k), b_x, up, input_precision=PRECISION)
    if IN_PARTS:
        tl.store(out + s * B * N + o_out, acc, mask=m_b[None, :])
    else:
        if squares is not None:
            inverse = tl.rsqrt(tl.sum(b_squares, 0) / K + eps)[None, :]
            acc *= inverse
            up *= inverse
        dtype = x.dtype.element_ty
        # Rounded as a product of tensors rounds.
        acc = acc.to(dtype).to(tl.float32)
        if ACTIVATION:
            acc = _activated(acc, ACTIVATION).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        if h is not None:
            acc = (b_h.to(tl.float32) + acc).to(dtype).to(tl.float32)
            tl.store(h + o_out, acc.to(dtype), mask=m_b[None, :])
            y = acc * b_next.to(tl.float32)[:, None]
            tl.store(next_x + o_out, y.to(dtype), mask=m_b[None, :])
            tl.store(next_squares + n * B + o_b, tl.sum(acc * acc, 0), mask=m_b)
        else:
            tl.store(out + o_out, acc.to(dtype), mask=m_b[None, :])


@triton.jit
def residual_kernel(
    parts,
    h,
    next_weight,
    next_x,
    next_squares,
    W,
    PARTS: tl.constexpr,
    SQUARE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What `product_kernel` does behind a product that it adds to h, for one in parts; BLOCK columns of a row."""
    b, B = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_w = o_w < W
    o_h = b * W + o_w
    b_h = tl.load(h + o_h, mask=m_w, other=0.0)
    b_next = tl.load(next_weight + o_w, mask=m_w, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(PARTS):
        acc += tl.load(parts + i * B * W + o_h, mask=m_w, other=0.0)
    dtype = b_h.dtype
    acc = (b_h.to(tl.float32) + acc.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(h + o_h, acc.to(dtype), mask=m_w)
    tl.store(next_x + o_h, (acc * b_next).to(dtype), mask=m_w)
    o_s = tl.program_id(1) * (BLOCK // SQUARE) + tl.arange(0, BLOCK // SQUARE)
    sums = tl.sum(tl.reshape(acc * acc, (BLOCK // SQUARE, SQUARE)), 1)
    tl.store(next_squares + o_s * B + b, sums, mask=o_s * SQUARE < W)


@triton.jit
def row_product_kernel(
    x,
    weight,
    h,
    next_weight,
    next_x,
    next_squares,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """h += x W^T for one row, with x and squares: BLOCK_N columns, the whole sum. No tile of the tensor cores, 15 rows
    of which would be empty, so that few columns are enough for a program and nothing has to be added up behind it."""
    n = tl.program_id(0)
    o_n, o_k = n * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    p_w = weight + o_n.to(tl.int64)[:, None] * K + o_k[None, :]
    # On their way while the product is computed.
    b_h, b_next = tl.load(h + o_n), tl.load(next_weight + o_n)
    # Sums over a warp's columns wait until the end.
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        m_k = k + o_k < K
        b_x = tl.load(x + k + o_k, mask=m_k, other=0.0).to(tl.float32)
        acc += tl.load(p_w + k, mask=m_k[None, :], other=0.0).to(tl.float32) * b_x[None, :]
    dtype = x.dtype.element_ty
    y = (b_h.to(tl.float32) + tl.sum(acc, 1).to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    tl.store(h + o_n, y.to(dtype))
    tl.store(next_x + o_n, (y * b_next.to(tl.float32)).to(dtype))
    tl.store(next_squares + n, tl.sum(y * y, 0))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How one product is cut: columns and summands of a tile, parts of the sum."""

    block_n: int = 64
    block_k: int = 64
    parts: int = 1
    num_warps: int = 4
    num_stages: int = 6


def choose_shape(
    rows: int,
    N: int,
    K: int,
    *,
    multiprocessors: int,
    shared: int = SHARED,
    gated: bool = False,
    whole: bool = False,
) -> Shape | None:
    """For so many rows and a weight (N, K), or (2N, K) where `gated`; None: leave it to cuBLAS. whole: in one part.

    shared: bytes of shared memory that a program may have.
    """
    few = rows <= 16
    block_n, block_k = math.gcd(N, 64), math.gcd(K, 128 if few and not gated else 64)
    if rows > MOST_ROWS or min(block_n, block_k) < 16:
        return None
    parts = 1 if gated or whole else max(1, multiprocessors // (N // block_n))
    while K % (parts * block_k):
        parts -= 1
    # Measured on an H200 with the 3b model.
    stages = 7 if gated else 4 if whole else 6 if few else 7
    stage = 2 * block_k * (block_n * (2 if gated else 1) + max(16, triton.next_power_of_2(rows)))
    return Shape(block_n=block_n, block_k=block_k, parts=parts, num_stages=max(2, min(stages, shared // stage)))


def split_product(x_BK: Tensor, weight_NK: Tensor, *, multiprocessors: int, shared: int = SHARED) -> Tensor | None:
    """x W^T in parts (parts, B, N), fp32, for `launch_add_norm`; None where cuBLAS is as good."""
    shape = choose_shape(len(x_BK), *weight_NK.shape, multiprocessors=multiprocessors, shared=shared)
    if x_BK.dtype == torch.float32 or shape is None or shape.parts == 1:
        return None
    parts = x_BK.new_empty(shape.parts, len(x_BK), len(weight_NK), dtype=torch.float32)
    launch_product(x_BK, weight_NK, shape, out=parts).run()
    return parts


@dataclass(frozen=True, kw_only=True)
class Residual:
    """The stream h (B, W) that a product is added to, the weight of the norm behind it, and what that needs."""

    h: Tensor
    next_norm_W: Tensor
    next_x: Tensor
    next_squares: Tensor


def launch_product(
    x_BK: Tensor,
    weight_NK: Tensor,
    shape: Shape,
    *,
    out: Tensor | None = None,
    squares: Tensor | None = None,
    norm_eps: float = 0.0,
    residual: Residual | None = None,
    activation: str = "",
) -> Launch:
    """One product: into out, (B, N) or, in fp32, (parts, B, N), or with `residual` into h, x and squares.

    squares: of the norm in front, with x times its weight. activation: the weight's rows are [gate, up].
    """
    (B, K), N = x_BK.shape, len(weight_NK) // (2 if activation else 1)
    args = {
        "x": x_BK,
        "weight": weight_NK,
        "squares": squares,
        "h": None if residual is None else residual.h,
        "next_weight": None if residual is None else residual.next_norm_W,
        "next_x": None if residual is None else residual.next_x,
        "next_squares": None if residual is None else residual.next_squares,
        "out": out,
        "B": B,
        "N": N,
        "K": K,
        "part": K // shape.parts,
        "eps": norm_eps,
        "SQUARES": 1 if squares is None else len(squares),
        "IN_PARTS": out is not None and out.dim() == 3,
        "ACTIVATION": 0 if not activation else GELU.value if activation == "gelu" else SILU.value,
        "BLOCK_B": max(16, triton.next_power_of_2(B)),
        "BLOCK_N": shape.block_n,
        "BLOCK_K": shape.block_k,
        "PRECISION": precision(x_BK.dtype),
    }
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    return Launch(product_kernel, (N // shape.block_n, shape.parts), args, options)


# Columns and summands of a tile of `row_product_kernel`, and tiles on their way at a time.
ROW_N, ROW_K, ROW_STAGES = 16, 512, 5


def launch_row_product(x_BK: Tensor, weight_NK: Tensor, residual: Residual) -> Launch:
    """`launch_product` into a residual stream of one row; its squares are of ROW_N columns each."""
    N, K = weight_NK.shape
    args = {
        "x": x_BK,
        "weight": weight_NK,
        "h": residual.h,
        "next_weight": residual.next_norm_W,
        "next_x": residual.next_x,
        "next_squares": residual.next_squares,
        "K": K,
        "BLOCK_N": ROW_N,
        "BLOCK_K": ROW_K,
        "STAGES": ROW_STAGES,
    }
    return Launch(row_product_kernel, (N // ROW_N,), args, {"num_warps": 4, "num_stages": 1})


@dataclass(frozen=True, kw_only=True)
class FusedProducts:
    """The products of a step, and what they hand on to one another.

    h, x (B, W) and squares (blocks, B) in fp32: the residual stream, times the next norm's weight, and sums of h^2 over
    blocks of `square` columns, zero behind the last block.
    """

    h: Tensor
    x: Tensor
    squares: Tensor
    square: int
    multiprocessors: int
    shared: int = SHARED

    @classmethod
    def build(
        cls,
        weights: Sequence[tuple[Tensor, bool]],
        *,
        rows: int,
        W: int,
        multiprocessors: int,
        shared: int = SHARED,
    ) -> FusedProducts | None:
        """For these weights, each with whether its rows are [gate, up]; None if one has to be left to cuBLAS."""
        for weight, gated in weights:
            N, K = len(weight) // (2 if gated else 1), weight.shape[1]
            if choose_shape(rows, N, K, multiprocessors=multiprocessors, gated=gated) is None:
                return None
        like, square = weights[0][0], ROW_N if rows == 1 else math.gcd(W, 64)
        h = like.new_empty(rows, W)
        return cls(
            h=h,
            x=torch.empty_like(h),
            squares=like.new_zeros(triton.next_power_of_2(W // square), rows, dtype=torch.float32),
            square=square,
            multiprocessors=multiprocessors,
            shared=shared,
        )

    def _shape(self, weight_NK: Tensor, *, gated: bool = False, whole: bool = False) -> Shape:
        N, K = len(weight_NK) // (2 if gated else 1), weight_NK.shape[1]
        shape = choose_shape(
            len(self.h), N, K, multiprocessors=self.multiprocessors, shared=self.shared, gated=gated, whole=whole
        )
        assert shape is not None
        return shape

    def takes(self, weight_NK: Tensor) -> bool:
        return choose_shape(len(self.h), *weight_NK.shape, multiprocessors=self.multiprocessors) is not None

    def embed(self, token_B: Tensor, table_VW: Tensor, norm: nn.RMSNorm) -> None:
        """h = the tokens' rows of the table; the first product divides by this norm."""
        launch_embed(token_B, table_VW, norm.weight, self.h, self.x, self.squares).run()

    def normed(self, weight_NK: Tensor, norm: nn.RMSNorm, *, activation: str = "") -> Tensor:
        """norm(h) W^T (B, N), or activation(gate) * up for rows [gate, up]; x was left for this norm."""
        out_BN = self.h.new_empty(len(self.h), len(weight_NK) // (2 if activation else 1))
        shape = self._shape(weight_NK, gated=bool(activation), whole=True)
        self.launch(self.x, weight_NK, shape, out=out_BN, norm_eps=row_norm_eps(norm), activation=activation).run()
        return out_BN

    def unscaled(self, weight_NK: Tensor, norm: nn.RMSNorm) -> Unscaled:
        """norm(h) W^T but for its last steps: the parts to be added up, and what divides them."""
        shape = self._shape(weight_NK)
        parts = self.h.new_empty(shape.parts, len(self.h), len(weight_NK), dtype=torch.float32)
        self.launch(self.x, weight_NK, shape, out=parts).run()
        return Unscaled(
            parts=parts, squares=self.squares, eps=row_norm_eps(norm), W=self.h.shape[1], dtype=self.h.dtype
        )

    def add(self, x_BK: Tensor, weight_NK: Tensor, *, next_norm: nn.RMSNorm) -> None:
        """h += x W^T, with x and squares for the norm behind it."""
        if len(self.h) == 1:
            launch_row_product(x_BK, weight_NK, self._residual(next_norm.weight)).run()
            return
        shape = self._shape(weight_NK)
        if shape.parts == 1 and shape.block_n == self.square:
            self.launch(x_BK, weight_NK, shape, next_norm_W=next_norm.weight).run()
        else:
            parts = self.h.new_empty(shape.parts, *self.h.shape, dtype=torch.float32)
            self.launch(x_BK, weight_NK, shape, out=parts).run()
            self.launch_residual(parts, next_norm.weight).run()

    def _residual(self, next_norm_W: Tensor) -> Residual:
        return Residual(h=self.h, next_norm_W=next_norm_W, next_x=self.x, next_squares=self.squares)

    def launch(
        self,
        x_BK: Tensor,
        weight_NK: Tensor,
        shape: Shape,
        *,
        out: Tensor | None = None,
        norm_eps: float | None = None,
        next_norm_W: Tensor | None = None,
        activation: str = "",
    ) -> Launch:
        """`launch_product`, behind a norm with norm_eps, into the stream with next_norm_W."""
        residual = None if next_norm_W is None else self._residual(next_norm_W)
        return launch_product(
            x_BK,
            weight_NK,
            shape,
            out=out,
            squares=None if norm_eps is None else self.squares,
            norm_eps=norm_eps or 0.0,
            residual=residual,
            activation=activation,
        )

    def launch_residual(self, parts: Tensor, next_norm_W: Tensor) -> Launch:
        """h += the sum of parts (parts, B, W), with x and squares."""
        B, W = self.h.shape
        args = {
            "parts": parts,
            "h": self.h,
            "next_weight": next_norm_W,
            "next_x": self.x,
            "next_squares": self.squares,
            "W": W,
            "PARTS": len(parts),
            "SQUARE": self.square,
            "BLOCK": 256,
        }
        return Launch(residual_kernel, (B, triton.cdiv(W, 256)), args, {"num_warps": 2, "num_stages": 1})
