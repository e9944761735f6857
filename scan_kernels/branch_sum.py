"""The end of a layer with two branches: each head's RMS norm on both, and their sum, in one pass over memory.

    y = a / rms(a) * weight_a + b / rms(b) * weight_b,    rms(x) = sqrt(mean(x^2) + eps) over the head width

A row of zeros gives zeros *and zero gradients*: a linear branch is exactly zero for the first window + 1 tokens of a
document, where the plain formula would multiply gradients by 1 / sqrt(eps). (arXiv 2506.15545, section 3)

The compiler needs four passes over the branches for forward and backward: the scales' gradients are sums over tokens,
which it does not join with the sums over a head's width. The kernels (kernels/branch_sum.py) need two. What that is
worth: docs/kernels.md. Importing this file needs no Triton.
"""

import torch
from torch import Tensor

from scan_kernels.fused_ops import DTYPES, WIDTHS, environment_refusal
from scan_kernels.impl import Impl, parse_impl
from scan_kernels.precision import accumulation_dtype


def head_rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, in fp32 or wider; rows of zeros stay zero, in gradients
    too. x (..., H, D), weight (H, D)."""
    wide = x.to(accumulation_dtype(x.dtype))
    mean_square = wide.square().mean(-1, keepdim=True)
    inverse_rms = torch.where(mean_square > 0, torch.rsqrt(mean_square + eps), 0.0)
    return (wide * inverse_rms * weight.to(wide.dtype)).to(x.dtype)


def branch_sum_refusal(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor) -> str:
    """Why the kernels do not take these tensors; "" if they do."""
    if reason := environment_refusal(a.device.type):
        return reason
    if a.dtype not in DTYPES or b.dtype != a.dtype:
        return f"takes bfloat16, float16 or float32, both alike, got {a.dtype} and {b.dtype}"
    if not weight_a.dtype.is_floating_point or weight_b.dtype != weight_a.dtype:
        return f"takes two scales of one floating dtype, got {weight_a.dtype} and {weight_b.dtype}"
    if a.shape[-1] not in WIDTHS:
        return f"takes head sizes 16, 32, 64, 128 and 256, got {a.shape[-1]}"
    return ""


def sum_of_head_norms(
    a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, *, eps: float, impl: Impl | str = Impl.AUTO
) -> Tensor:
    """norm(a) * weight_a + norm(b) * weight_b over the head width (the law at the top of this file).

    Args:
        a, b: (B, T, H, D), the softmax and the linear branch.
        weight_a, weight_b: (H, D).
        eps: added to the mean square, >= 0.
        impl: "triton" are the kernels, ValueError where they cannot run; "torch" is the formula, left to the compiler;
            "auto" is the kernels where they can run. "reference" is the formula.

    Returns:
        (B, T, H, D) in the dtype of a. The kernels round the sum once, the formula each norm and the sum.

    Differentiable in all tensors; sums in fp32 or wider, in a fixed order.
    """
    if not (a.ndim == 4 and a.shape == b.shape and weight_a.shape == weight_b.shape == a.shape[2:]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (a, b, weight_a, weight_b))
        raise ValueError(f"branches must be (B, T, H, D) alike and their scales (H, D), got {shapes}")
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"branches must be of one floating dtype, got {a.dtype} and {b.dtype}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    impl = parse_impl(impl)
    if impl in (Impl.AUTO, Impl.TRITON):
        reason = branch_sum_refusal(a, b, weight_a, weight_b)
        if not reason and (a.device.type == "cuda" or impl is Impl.TRITON):
            return branch_sum_fwd(a, b, weight_a, weight_b, eps)
        if impl is Impl.TRITON:
            raise ValueError(f'impl="triton" {reason}; impl="torch" takes all inputs on every device')
    return head_rms_norm(a, weight_a, eps=eps) + head_rms_norm(b, weight_b, eps=eps)


@torch.library.custom_op("scan_kernels::branch_sum_fwd", mutates_args=())
def branch_sum_fwd(a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float) -> Tensor:
    from scan_kernels.kernels import branch_sum as kernels

    a, b, weight_a, weight_b = (x.contiguous() for x in (a, b, weight_a, weight_b))
    launch, y = kernels.branch_sum_fwd(a, b, weight_a, weight_b, eps)
    if y.numel():
        launch.run()
    return y


@branch_sum_fwd.register_fake
def _(a, b, weight_a, weight_b, eps):
    return torch.empty_like(a, memory_format=torch.contiguous_format)


@torch.library.custom_op("scan_kernels::branch_sum_bwd", mutates_args=())
def branch_sum_bwd(
    dy: Tensor, a: Tensor, b: Tensor, weight_a: Tensor, weight_b: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b, and of both scales (2, H, D)."""
    from scan_kernels.kernels import branch_sum as kernels

    dy, a, b, weight_a, weight_b = (x.contiguous() for x in (dy, a, b, weight_a, weight_b))
    launch, da, db, parts = kernels.branch_sum_bwd(dy, a, b, weight_a, weight_b, eps)
    if dy.numel():
        launch.run()
    return da, db, parts.sum(0).to(weight_a.dtype)


@branch_sum_bwd.register_fake
def _(dy, a, b, weight_a, weight_b, eps):
    da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))
    return da, db, weight_a.new_empty(2, *weight_a.shape)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy: Tensor):
    da, db, d_weights = branch_sum_bwd(dy, *ctx.saved_tensors, ctx.eps)
    return da, db, d_weights[0], d_weights[1], None


branch_sum_fwd.register_autograd(_backward, setup_context=_setup_context)
