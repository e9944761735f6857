"""What is compared: our kernels and what a user would pick instead, each a function of the same tensors.

Shapes: B batch, T tokens, H query heads, G KV heads, D head width (legend: scan_kernels/README.md). All contenders
take q (B, T, H, D), k and v (B, T, G, D) and return (B, T, H, D), as a layer has them; a transposed view is a
contender's own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from flexrattn.packing import document_ids_from_positions
from scan_kernels import (
    apply_feature_map,
    residual_linear_attention,
    residual_linear_attention_quadratic,
    residual_shift,
)
from score_mods import MaskMod, build_block_mask, causal, dense_mask, in_documents, reference_attention, sliding_window

CUDNN_OP = "aten::_scaled_dot_product_cudnn_attention"
FLASH_OP = "aten::_scaled_dot_product_flash_attention"


class Unavailable(Exception):
    """A contender that cannot run here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """window: previous keys that a query's softmax branch sees besides itself. layers: blocks, where blocks are run."""

    B: int
    T: int
    H: int
    G: int
    D: int
    window: int
    dtype: torch.dtype
    layers: int = 0


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """One contender at one shape: `forward(*inputs)`, and the same law as `reference(*inputs, *parameters)` in float64.

    parameters: what it learns beside its inputs; a backward computes their gradients, too.
    """

    forward: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    parameters: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A row of the table.

    ours: an error of it fails the run; a contender of others that cannot run is only reported.
    baseline: what ratios may refer to; the first of them that was timed is taken.
    window: the window it computes, None for full attention.
    op: an operator that must be seen to run, "" for none: torch may take another SDPA kernel than the one asked for.
    slack: how many times the tolerance of its dtype it may err.
    """

    name: str
    prepare: Callable[[Shape, torch.device], Prepared]
    ours: bool = False
    baseline: bool = False
    window: int | None = None
    op: str = ""
    slack: float = 1.0


def attention_inputs(shape: Shape, device: torch.device, seed: int, *, v_mean: float = 0.0) -> dict[str, Tensor]:
    """q, k, v (they want gradients) and do.

    A mean of v is the common mode that shows in the gradients of softmax features, and hides single keys from the eye
    of a softmax branch: the linear branch is compared with one, the others without.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(heads: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(shape.B, shape.T, heads, shape.D, device=device, generator=generator)
        return (x * std + mean).to(shape.dtype)

    q, k, v, do = normal(shape.H, 0.3), normal(shape.G), normal(shape.G, mean=v_mean), normal(shape.H)
    return {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_(), "do": do}


def compiled(fn: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`fn` through torch.compile with static shapes; on the CPU `fn` itself, as nothing is timed there."""
    if device.type == "cpu":
        return fn
    # Dynamo keeps its programs by code object and tries their guards in turn. Contenders that share one would pay for
    # each other's guards on the host, and count against one recompile limit.
    own = types.FunctionType(fn.__code__.replace(), fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__)
    own.__kwdefaults__ = fn.__kwdefaults__
    return torch.compile(own, fullgraph=True, dynamic=False)


def softmax_reference(window: int | None, positions: Tensor | None = None) -> Callable[..., Tensor]:
    """Dense float64 softmax attention over the window, or over all previous keys, in the documents of `positions`."""
    mask_mod = causal() if window is None else sliding_window(window)
    if positions is not None:
        mask_mod = _packed_mask(positions, mask_mod)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = dense_mask(mask_mod, batch=q.shape[0], q_len=q.shape[1], kv_len=k.shape[1], device=q.device)
        return reference_attention(q, k, v, mask)

    return reference


def sdpa(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, backend: SDPBackend, scale: float | None = None) -> Tensor:
    """torch's full causal attention by one backend, which refuses rather than falls back."""
    q_BHTD, k_BGTD, v_BGTD = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    with sdpa_kernel([backend]):
        o_BHTD = F.scaled_dot_product_attention(
            q_BHTD, k_BGTD, v_BGTD, is_causal=True, scale=scale, enable_gqa=q_BTHD.shape[2] != k_BTGD.shape[2]
        )
    return o_BHTD.transpose(1, 2)


def sdpa_contender(name: str, backend: SDPBackend, op: str) -> Contender:
    def prepare(shape: Shape, device: torch.device) -> Prepared:
        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return sdpa(q, k, v, backend)

        return Prepared(forward=forward, reference=softmax_reference(None))

    return Contender(name=name, prepare=prepare, baseline=True, op=op)


def _flex(q_BTHD: Tensor, k_BTGD: Tensor, v_BTGD: Tensor, mask: BlockMask) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BTHD, k_BTGD, v_BTGD))
    o = flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(o, Tensor)
    return o.transpose(1, 2)


def packed_positions(shape: Shape, length: int, device: torch.device) -> Tensor:
    """(B, T): how far each token is into its document. Rows are packed with documents of 1 to 2 length - 1 tokens, all
    equally likely, behind a first one of window + 65, whose residual keys the gate looks for; the last one is cut.
    """
    generator = torch.Generator().manual_seed(0)
    positions = torch.empty(shape.B, shape.T, dtype=torch.int64)
    for row in positions:
        begin = 0
        while begin < shape.T:
            drawn = int(torch.randint(1, 2 * length, (), generator=generator))
            tokens = shape.window + 65 if begin == 0 else drawn
            row[begin : begin + tokens] = torch.arange(min(tokens, shape.T - begin))
            begin += tokens
    return positions.to(device)


def _packed_mask(positions: Tensor, mask_mod: MaskMod) -> MaskMod:
    return in_documents(mask_mod, document_ids=document_ids_from_positions(positions), positions=positions)


def flex_contender(packed: int | None = None) -> Contender:
    """FlexAttention over all previous keys, compiled as its documentation says, with static shapes. packed: see
    `packed_positions`."""

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        if device.type == "cpu":
            raise Unavailable("FlexAttention has no backward on the CPU")
        positions = None if packed is None else packed_positions(shape, packed, device)
        mask_mod = causal() if positions is None else _packed_mask(positions, causal())
        batch = None if positions is None else shape.B
        mask = build_block_mask(mask_mod, batch=batch, q_len=shape.T, kv_len=shape.T, device=device)
        attend = compiled(_flex, device)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, mask)

        return Prepared(forward=forward, reference=softmax_reference(None, positions))

    return Contender(
        name="Flex full" if packed is None else "Flex full packed", prepare=prepare, baseline=packed is None
    )


def full_attention() -> list[Contender]:
    """Full causal attention three ways, the first the one that ratios refer to."""
    return [
        sdpa_contender("cuDNN full", SDPBackend.CUDNN_ATTENTION, CUDNN_OP),
        sdpa_contender("FA2 full", SDPBackend.FLASH_ATTENTION, FLASH_OP),
        flex_contender(),
    ]


def linear_reference(window: int, positions: Tensor | None = None) -> Callable[..., Tensor]:
    """The linear branch by its pairs in float64: no chunks, no states, nothing of the kernels."""
    ids = None if positions is None else document_ids_from_positions(positions)

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return residual_linear_attention_quadratic(q, k, v, window=window, document_ids=ids)

    return reference


def scan_contender(
    name: str,
    window: int,
    *,
    impl: str,
    compile: bool = False,
    save_every: int | None = None,
    packed: int | None = None,
) -> Contender:
    def prepare(shape: Shape, device: torch.device) -> Prepared:
        positions = None if packed is None else packed_positions(shape, packed, device)
        ids = None if positions is None else document_ids_from_positions(positions)

        def scan(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return residual_linear_attention(q, k, v, window=window, document_ids=ids, impl=impl, save_every=save_every)

        return Prepared(
            forward=compiled(scan, device) if compile else scan,
            reference=linear_reference(window, positions),
        )

    return Contender(name=name, prepare=prepare, ours=True, window=window)


def shifted_features(q: Tensor, k: Tensor, v: Tensor, lag: int) -> tuple[Tensor, Tensor, Tensor]:
    """phi(q) and, `lag` tokens later and once per query head, phi(k) and v: a causal scan of them is the linear branch.

    q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, 2D) twice and (B, T, H, D), in q's dtype.
    """
    T, R = q.shape[1], q.shape[2] // k.shape[2]
    kept = max(T - lag, 0)
    phi_q, phi_k = (apply_feature_map(x, "softmax").to(x.dtype) for x in (q, k))
    # Zeros after the map, not before it: phi(0) is 1/D.
    phi_k, v = (F.pad(x[:, :kept], (0, 0, 0, 0, T - kept, 0)).repeat_interleave(R, dim=2) for x in (phi_k, v))
    return phi_q, phi_k, v


def fla_contender(window: int) -> Contender:
    """The linear branch as a user composes it from flash-linear-attention: a compiled map and shift, and its scan."""
    lag = residual_shift(window)

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        if device.type == "cpu":
            raise Unavailable("flash-linear-attention needs a GPU")
        if shape.dtype == torch.float32:
            # Measured with 0.6.0: an error of 1.8e-3 in the gradient of q.
            raise Unavailable("flash-linear-attention multiplies fp32 numbers as TF32")
        try:
            from fla.ops.linear_attn import chunk_linear_attn
        except ImportError as error:
            raise Unavailable(f"flash-linear-attention cannot be imported: {error}") from error

        def make_features(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return shifted_features(q, k, v, lag)

        features = compiled(make_features, device)

        def compose(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            phi_q, phi_k, v = features(q, k, v)
            return chunk_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=False)[0]

        return Prepared(forward=compose, reference=linear_reference(window))

    # Its features and chunk states are bf16 with the common mode in them, which the gradients of q and k feel; the
    # first rows behind the window, which the gate looks at apart, still show a wrong shift.
    return Contender(name="fla composition", prepare=prepare, window=window, slack=10)


def rla(window: int, *, with_torch: bool, save_every: Sequence[int] = (), packed: int | None = None) -> list[Contender]:
    """The linear branch: full attention for scale, flash-linear-attention's scan, and ours.

    save_every: ours once more for each m, with the states before every m-th chunk kept. packed: ours and FlexAttention
    once more, for documents of this length (`packed_positions`).
    """
    documents = []
    if packed is not None:
        documents = [flex_contender(packed), scan_contender("rla triton packed", window, impl="triton", packed=packed)]
    return [
        *full_attention(),
        fla_contender(window),
        scan_contender("rla triton", window, impl="triton"),
        scan_contender("rla triton compiled", window, impl="triton", compile=True),
        *(scan_contender(f"rla triton m={m}", window, impl="triton", save_every=m) for m in save_every),
        *([scan_contender("rla torch", window, impl="torch")] if with_torch else []),
        *documents,
    ]
