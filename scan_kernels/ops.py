"""Custom ops of the chunked implementation: the scan of (decay, state) pairs over chunks.

A custom op, because the loop over chunks would otherwise be unrolled into a compiled graph, and because autograd would
keep every intermediate state twice.
"""

import torch
from torch import Tensor


def _decayed(factor_BG: Tensor | None, state_BGFD: Tensor) -> Tensor:
    if factor_BG is None:
        return state_BGFD
    factor = factor_BG[:, :, None, None]
    # Not a product where the factor is 0: a document that ends in NaN must not reach the next one.
    return torch.where(factor == 0, 0.0, factor * state_BGFD)


@torch.library.custom_op("scan_kernels::chunk_state_scan", mutates_args=())
def chunk_state_scan(update_BGNFD: Tensor, first_BGFD: Tensor, factor_BGN: Tensor | None) -> Tensor:
    """S_0 = first, S_{n+1} = factor_n S_n + update_n (no factor: 1). Returns S_0 ... S_N: (B, G, N + 1, F, D)."""
    B, G, N, F, D = update_BGNFD.shape
    states = update_BGNFD.new_empty(B, G, N + 1, F, D)
    states[:, :, 0] = first_BGFD
    for n in range(N):
        factor_BG = None if factor_BGN is None else factor_BGN[:, :, n]
        torch.add(_decayed(factor_BG, states[:, :, n]), update_BGNFD[:, :, n], out=states[:, :, n + 1])
    return states


@chunk_state_scan.register_fake
def _(update_BGNFD: Tensor, first_BGFD: Tensor, factor_BGN: Tensor | None) -> Tensor:
    B, G, N, F, D = update_BGNFD.shape
    return update_BGNFD.new_empty(B, G, N + 1, F, D)


@torch.library.custom_op("scan_kernels::chunk_state_scan_bwd", mutates_args=())
def chunk_state_scan_bwd(grad: Tensor, factor_BGN: Tensor | None) -> Tensor:
    """The same scan from the end: dS_N = grad_N, dS_n = grad_n + factor_n dS_{n+1}. Returns dS_0 ... dS_N."""
    total = torch.empty_like(grad, memory_format=torch.contiguous_format)
    N = grad.shape[2] - 1
    total[:, :, N] = grad[:, :, N]
    for n in reversed(range(N)):
        factor_BG = None if factor_BGN is None else factor_BGN[:, :, n]
        torch.add(_decayed(factor_BG, total[:, :, n + 1]), grad[:, :, n], out=total[:, :, n])
    return total


@chunk_state_scan_bwd.register_fake
def _(grad: Tensor, factor_BGN: Tensor | None) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    factor_BGN = inputs[2]
    # Only the gradient of the factor reads the states.
    ctx.save_for_backward(factor_BGN, output if ctx.needs_input_grad[2] else None)


def _backward(ctx, grad: Tensor):
    factor_BGN, states = ctx.saved_tensors
    total = chunk_state_scan_bwd(grad, factor_BGN)
    d_factor = None
    if ctx.needs_input_grad[2]:
        d_factor = (total[:, :, 1:] * states[:, :, :-1]).sum((-2, -1))
        d_factor = torch.where(factor_BGN == 0, 0.0, d_factor)
    return total[:, :, 1:], total[:, :, 0], d_factor


chunk_state_scan.register_autograd(_backward, setup_context=_setup_context)
