"""A causal window, or all earlier keys, by flash-attn-4's own kernels: custom ops around the package.

    o_t = sum_j softmax_j(scale q_t . k_j) v_j over t - window <= j <= t; without a window over j <= t

FlexAttention's BACKEND="FLASH" runs the same kernels with a mask function for each pair and lists of blocks; a mask
that is nothing but this law needs neither (docs/kernels.md). What else torch has for them,
`activate_flash_attention_impl("FA4")`, exchanges SDPA's kernels for the whole process, and torch 2.11's refuses windows
in the backward.
Shapes: B batch, T tokens, H query heads, G key/value heads, D head width (legend: scan_kernels/README.md).
"""

import functools
import importlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from score_mods import MaskMod, mask_info, tensors_in

DTYPES = (torch.bfloat16, torch.float16)
# The package's backward on Hopper pads heads to a multiple of 16 in one kernel and of 32 in those around it: without an
# error, the dq of heads of 80 was noise (4.0.0b36; flash-attention's pull request 2896). FlexAttention's FLASH calls
# the same kernels.
WIDTHS = (32, 64, 96, 128)


@dataclass(frozen=True, kw_only=True)
class PlainWindow:
    """A mask that is its law, t - window <= j <= t (None: j <= t), over rows that are one document each."""

    window: int | None


def plain_window(mask: MaskMod) -> PlainWindow | None:
    """What `mask` is within one document, if that is a causal window or causal alone; None where it is anything else.

    A mask whose training draws windows is no plain one: its window is data then.
    """
    info = mask_info(mask)
    if info is None or not (info.exact and info.causal) or info.schedule is not None:
        return None
    if info.documents or info.tensors or next(tensors_in(mask), None) is not None:
        return None
    return PlainWindow(window=info.window)


def check_width(D: int) -> None:
    """ValueError for heads whose gradients flash-attn-4 can get wrong, by whatever way it is called."""
    if D not in WIDTHS:
        raise ValueError(
            f"softmax_backend 'flash' takes heads of {', '.join(map(str, WIDTHS))}, got {D}: flash-attn-4's gradients "
            "of others can be wrong, use 'triton'"
        )


def check_backend(kernel_options: Mapping[str, Any], device: torch.device) -> None:
    """ValueError where the backend that `kernel_options` ask for cannot run."""
    if kernel_options.get("BACKEND") != "FLASH":
        return
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ValueError(f"softmax_backend 'flash' needs a Hopper or newer GPU, this is {name}: use 'triton'")
    try:
        found = importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:
        found = False
    if not found:
        raise ValueError(
            "softmax_backend 'flash' needs the package flash-attn-4: pip install flash-attn-4, or use 'triton'"
        )


@functools.cache
def _package(device: torch.device) -> ModuleType:
    check_backend({"BACKEND": "FLASH"}, device)
    return importlib.import_module("flash_attn.cute.interface")


def flash_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, scale: float | None = None
) -> Tensor:
    """The law at the top of this file: q (B, T, H, D), k and v (B, T, G, D) to (B, T, H, D), contiguous.

    window: previous keys that a query sees besides itself; None: all. scale: 1 / sqrt(D) by default.
    Differentiable; sums of the gradients come in no fixed order, but for torch.use_deterministic_algorithms(True).

    Raises ValueError: shapes that do not fit, a dtype other than bfloat16 and float16, a head width that is not among
    WIDTHS, a negative window, and where the kernels cannot run (check_backend).
    """
    B, T, H, D = q.shape
    if not (k.shape == v.shape == (B, T, k.shape[2], D) and H % k.shape[2] == 0):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        raise ValueError(f"q must be (B, T, H, D), k and v (B, T, G, D) with H a multiple of G, got {shapes}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        got = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        raise ValueError(
            f"softmax_backend 'flash' takes bfloat16 or float16, q, k and v alike, got {got}: "
            "train in bfloat16, or use 'triton'"
        )
    check_width(D)
    if window is not None and window < 0:
        raise ValueError(f"window must be 0 or more (previous keys a query sees besides itself), got {window}")
    return flash_window_fwd(q, k, v, window, D**-0.5 if scale is None else scale)[0]


def _law(window: int | None, T: int) -> dict[str, Any]:
    """The package's arguments. A window that leaves nothing out is causal attention, which has kernels of its own."""
    left = None if window is None or window >= T - 1 else window
    return {"causal": True, "window_size_left": left, "window_size_right": 0 if left is not None else None}


def _as_kernels_read(x: Tensor) -> Tensor:
    """Rows of whole 16-byte words, one after the other in a head: what the layer's own tensors are."""
    words = 16 // x.element_size()
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(step % words == 0 for step in x.stride()[:-1]):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("flexrattn::flash_window_fwd", mutates_args=())
def flash_window_fwd(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, T, H, D), and the logarithms of the sums (B, H, T) in fp32, for the backward."""
    o, lse = _results(q)
    q, k, v = (_as_kernels_read(x) for x in (q, k, v))
    law = _law(window, q.shape[1])
    # What is returned has another length in each version.
    _package(q.device)._flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True, out=o, lse=lse, **law)
    return o, lse


@flash_window_fwd.register_fake
def _(q, k, v, window, scale):
    return _results(q)


def _results(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return _like(q), q.new_empty(B, H, T, dtype=torch.float32)


@torch.library.custom_op("flexrattn::flash_window_bwd", mutates_args=())
def flash_window_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (B, T, H, D), dk and dv (B, T, G, D), contiguous."""
    do, q, k, v = (_as_kernels_read(x) for x in (do, q, k, v))
    grads = {f"d{name}": _like(x) for name, x in (("q", q), ("k", k), ("v", v))}
    # What FlexAttention asks for, too.
    wanted = torch.are_deterministic_algorithms_enabled()
    deterministic = wanted and not torch.is_deterministic_algorithms_warn_only_enabled()
    law = _law(window, q.shape[1])
    _package(q.device)._flash_attn_bwd(
        q, k, v, o, do, lse, softmax_scale=scale, deterministic=deterministic, **law, **grads
    )
    return grads["dq"], grads["dk"], grads["dv"]


@flash_window_bwd.register_fake
def _(do, q, k, v, o, lse, window, scale):
    return _like(q), _like(k), _like(v)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.window, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, do: Tensor | None, _lse: None):
    if do is None:
        return (None,) * 5
    return *flash_window_bwd(do, *ctx.saved_tensors, ctx.window, ctx.scale), None, None


flash_window_fwd.register_autograd(_backward, setup_context=_setup_context)
