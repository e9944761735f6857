"""Contenders that are parts of the model: its windows, the core of a local layer, whole blocks.

Shapes: B batch, T tokens, H query heads, G KV heads, D head width (legend: scan_kernels/README.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.contenders import (
    CUDNN_OP,
    Contender,
    Prepared,
    Shape,
    Unavailable,
    compiled,
    flex_contender,
    full_attention,
    linear_reference,
    packed_positions,
    sdpa,
    softmax_reference,
)
from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.flash_window import PlainWindow
from flexrattn.masked_attention import KERNEL_OPTIONS, Mask, MaskedAttention, check_backend
from score_mods import build_block_mask, causal, dense_mask, sliding_window


def swa(windows: Sequence[int]) -> list[Contender]:
    """The softmax branch over windows, as a layer runs it: by FlexAttention's backends and by flash-attn-4 itself."""
    ways: list[tuple[str, dict[str, Any]]] = [
        ("Flex", {}),
        ("Flex flash", {"backend": "flash", "own_window": False}),
        ("flash", {"backend": "flash"}),
    ]
    return [
        *full_attention(),
        *(window_contender(f"{name} window {window}", window, **way) for window in windows for name, way in ways),
    ]


def _check_backend(backend: str, device: torch.device) -> None:
    try:
        check_backend(KERNEL_OPTIONS[backend], device)
    except ValueError as error:
        raise Unavailable(str(error)) from error


def _mask(window: int, shape: Shape, device: torch.device, *, own_window: bool) -> Mask:
    """Of rows of one document. own_window: for flash-attn-4's own kernels."""
    if own_window:
        return PlainWindow(window=window)
    mask_mod = causal() if window >= shape.T else sliding_window(window)
    build = dense_mask if device.type == "cpu" else build_block_mask
    return build(mask_mod, q_len=shape.T, kv_len=shape.T, device=device)


def window_contender(name: str, window: int, *, backend: str = "triton", own_window: bool = True) -> Contender:
    """`MaskedAttention` under a sliding window. own_window: what backend "flash" does of rows of one document."""

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        _check_backend(backend, device)
        inner = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS[backend])).build()
        mask = _mask(window, shape, device, own_window=own_window and backend == "flash")

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
            return inner(q, k, v, attention_masks=mask, enable_gqa=q.shape[2] != k.shape[2])

        run = compiled(attend, device)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run(q, k, v, mask)

        return Prepared(forward=forward, reference=softmax_reference(window))

    return Contender(name=name, prepare=prepare, ours=backend == "triton", window=window)


def rattention(window: int, packed: int | None = None) -> list[Contender]:
    """A local layer between its projections, without and with the document ids that training always passes. packed: it
    and FlexAttention also with documents of this length (`packed_positions`)."""
    documents = []
    if packed is not None:
        documents = [
            flex_contender(packed),
            core_contender("rattention core packed", window, documents=True, packed=packed),
            core_contender("rattention core packed flash", window, documents=True, packed=packed, backend="flash"),
        ]
    return [
        *full_attention(),
        core_contender("rattention core", window, documents=False),
        core_contender("rattention core documents", window, documents=True),
        core_contender("rattention core flash", window, documents=False, backend="flash"),
        core_contender("rattention core Flex flash", window, documents=False, backend="flash", own_window=False),
        core_contender("rattention core documents flash", window, documents=True, backend="flash"),
        *documents,
    ]


def core_contender(
    name: str,
    window: int,
    *,
    documents: bool,
    backend: str = "triton",
    own_window: bool = True,
    packed: int | None = None,
) -> Contender:
    """RMSNorm(softmax branch) + RMSNorm(linear branch) from q, k, v, by the layer's own modules, compiled.

    RoPE and the projections are left out: a layer of full attention has them, too. `documents` passes positions, of
    one document a row unless `packed`: nothing else is computed, but masks and states are looked up by document.
    own_window: what backend "flash" does of rows that are known to be one document each.
    """

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        _check_backend(backend, device)
        model, attention = _local_layer(shape, window, device, backend)
        attention.rope = None
        positions = None
        if packed is not None:
            positions = packed_positions(shape, packed, device)
        elif documents:
            positions = torch.arange(shape.T, device=device).expand(shape.B, shape.T)
        if positions is not None:
            mask = model.get_attention_masks(positions)[attention.mask]
        else:
            mask = _mask(window, shape, device, own_window=own_window and backend == "flash")
        weights = {"swa_norm": attention.swa_norm.weight, "rla_norm": attention.rla_norm.weight}

        def core(q: Tensor, k: Tensor, v: Tensor, mask: Mask, positions: Tensor | None) -> Tensor:
            # As the layer's own forward adds them.
            return attention.join(*attention._branches(q, k, v, mask, None, positions))

        run = compiled(core, device)

        def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return run(q, k, v, mask, positions)

        return Prepared(forward=forward, reference=_core_reference(window, positions), parameters=weights)

    return Contender(name=name, prepare=prepare, ours=backend == "triton", window=window)


def _local_layer(shape: Shape, window: int, device: torch.device, backend: str) -> tuple[Any, Any]:
    """A model of one local layer with `shape`'s heads, and that layer."""
    sizes = {"dim": 64, "ffn_dim": 64, "vocab_size": 16, "n_layers": 1, "max_seq_len": shape.T}
    heads = {"n_heads": shape.H, "n_kv_heads": shape.G, "head_dim": shape.D}
    layers = make_layers(layer_kind="rattention", window=window, pattern=("local",), softmax_backend=backend)
    with torch.device(device):
        model = build_model_config(resolve_flavor("debug", sizes | heads), layers).build()
    attention = model.layers["0"].attention
    with torch.no_grad():
        for norm in (attention.swa_norm, attention.rla_norm):
            # Away from one, so that a norm without its weights is seen.
            norm.weight.copy_(1 + 0.2 * torch.randn(norm.weight.shape, device=device))
    _cast_parameters(model, shape.dtype)
    return model, attention


def _cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    # Not `model.to`: under mixed precision the tables of RoPE stay fp32.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _core_reference(window: int, positions: Tensor | None) -> Callable[..., Tensor]:
    softmax, linear = softmax_reference(window, positions), linear_reference(window, positions)

    def reference(q: Tensor, k: Tensor, v: Tensor, swa_weight: Tensor, rla_weight: Tensor) -> Tensor:
        return _norm(softmax(q, k, v), swa_weight) + _norm(linear(q, k, v), rla_weight)

    return reference


def _norm(x_BTHD: Tensor, weight_HD: Tensor) -> Tensor:
    # A row of zeros stays zero and passes no gradient on.
    empty = (x_BTHD == 0).all(dim=-1, keepdim=True)
    mean_square = x_BTHD.masked_fill(empty, 1.0).square().mean(dim=-1, keepdim=True)
    return x_BTHD.masked_fill(empty, 0.0) / (mean_square + 1e-8).sqrt() * weight_HD


class CausalSdpa(torch.nn.Module):
    """Full causal attention by one SDPA backend in the place of a layer's `inner_attention`.

    flexrattn's layers compute full attention by FlexAttention and have no other choice, so the benchmark puts this
    module into blocks that are otherwise untouched. Masks are ignored: SDPA's fused kernels know no documents, and the
    benchmark's rows hold one.
    """

    def __init__(self, backend: SDPBackend) -> None:
        super().__init__()
        self.backend = backend

    def forward(
        self,
        q_BLNH: Tensor,
        k_BLNH: Tensor,
        v_BLNH: Tensor,
        *,
        attention_masks: Mask | None,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        return sdpa(q_BLNH, k_BLNH, v_BLNH, self.backend, scale)


def train_step(flavor: str, window: int) -> list[Contender]:
    """The same blocks with full attention by cuDNN and by FlexAttention, and with RAttention."""
    cudnn = CausalSdpa(SDPBackend.CUDNN_ATTENTION)
    return [
        stack_contender(f"{flavor} cuDNN full", flavor, inner=cudnn, op=CUDNN_OP),
        stack_contender(f"{flavor} Flex full", flavor),
        stack_contender(f"{flavor} rattention", flavor, window=window),
        stack_contender(f"{flavor} rattention flash", flavor, window=window, backend="flash"),
    ]


def stack_contender(
    name: str,
    flavor: str,
    *,
    window: int | None = None,
    inner: CausalSdpa | None = None,
    op: str = "",
    backend: str = "triton",
) -> Contender:
    """`Shape.layers` local blocks of a flavor on x (B, T, dim), each compiled by itself, as torchtitan does.

    Positions and masks are passed as in training, with one document a row. Weights are drawn alike for all arms.
    window: RAttention blocks; None is full attention, by `inner` if given, else by FlexAttention.
    """

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        if inner is None and window is None and device.type == "cpu":
            raise Unavailable("FlexAttention has no backward on the CPU")
        _check_backend(backend, device)
        model = _stack(flavor, window, shape, device, backend)
        blocks = [model.layers[str(i)] for i in range(shape.layers)]
        positions = torch.arange(shape.T, device=device).expand(shape.B, shape.T)
        masks: dict[str, Mask | None] = {blocks[0].attention.mask: None}
        if inner is None:
            # As the trainer, which sees them before they go to the device.
            model.see_batch(positions.cpu())
            masks = model.get_attention_masks(positions)
        for block in blocks:
            if inner is not None:
                block.attention.inner_attention = inner
            if device.type != "cpu":
                block.compile(fullgraph=True)

        def forward(x: Tensor) -> Tensor:
            for block in blocks:
                x = block(x, masks, positions)
            return x

        def reference(x: Tensor, *weights: Tensor) -> Tensor:
            given = iter(weights)
            for block in blocks:
                names = [name for name, _ in block.named_parameters()]
                x = _in_float64(block, window, x, positions, {name: next(given) for name in names})
            return x

        parameters = {f"{i}.{name}": p for i, block in enumerate(blocks) for name, p in block.named_parameters()}
        return Prepared(forward=forward, reference=reference, parameters=parameters)

    return Contender(
        name=name,
        prepare=prepare,
        ours=window is not None and backend == "triton",
        baseline=window is None,
        window=window,
        op=op,
        # A block rounds a dozen times in a row: eager bf16 of any attention gives gradients of weights 0.9 % off.
        slack=2,
    )


def _stack(flavor: str, window: int | None, shape: Shape, device: torch.device, backend: str) -> Any:
    kind = "full" if window is None else "rattention"
    # With scales of 1 the gate sees both branches.
    scales: dict[str, Any] = {} if window is None else {"swa_norm_init": 1.0, "rla_norm_init": 1.0}
    layers = make_layers(layer_kind=kind, window=window, pattern=("local",), softmax_backend=backend, **scales)
    # Embedding and head are not run.
    sizes = {"n_layers": shape.layers, "vocab_size": 16, "max_seq_len": shape.T}
    config = build_model_config(resolve_flavor(flavor, sizes), layers)
    torch.manual_seed(0)
    with torch.device(device), torch.no_grad():
        model = config.build()
        model.init_weights()
    _cast_parameters(model, shape.dtype)
    return model


def _in_float64(
    block: torch.nn.Module, window: int | None, x: Tensor, positions: Tensor, weights: dict[str, Tensor]
) -> Tensor:
    """The block's own formula on dense masks and the chunked scan, nothing of it in less than fp32."""
    twin: Any = copy.deepcopy(block).double()
    twin.attention.inner_attention = MaskedAttention.Config().build()
    if twin.attention.residual is not None:
        twin.attention.residual.impl = "torch"
    mask_mod = causal() if window is None else sliding_window(window)
    mask = dense_mask(mask_mod, q_len=x.shape[1], kv_len=x.shape[1], device=x.device)
    return torch.func.functional_call(twin, weights, (x, {twin.attention.mask: mask}, positions))


def block_inputs(shape: Shape, device: torch.device, seed: int, *, dim: int) -> dict[str, Tensor]:
    """x (B, T, dim), it wants a gradient, and do."""
    generator = torch.Generator(device).manual_seed(seed)
    x, do = (torch.randn(shape.B, shape.T, dim, device=device, generator=generator).to(shape.dtype) for _ in range(2))
    return {"x": x.requires_grad_(), "do": do}
