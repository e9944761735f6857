"""What a layer keeps between forward and backward, and its matrix products, from its traced graphs. No GPU needed."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from flexrattn.activation_checkpoint import with_linear_branch
from flexrattn.inspect import compiler, scan
from flexrattn.inspect.compiler import Matmul
from flexrattn.inspect.gpus import capability_of
from flexrattn.inspect.problem import Layer, Problem
from flexrattn.packing import document_ids_from_positions
from score_mods import MaskMod, build_block_mask, dense_mask, drawn_window, in_documents, mask_info


@dataclass(frozen=True, kw_only=True)
class Traced:
    """kept_bytes: tensors alive between a layer's forward and its backward, its output (the next layer's input) too."""

    kept_bytes: int
    forward: list[Matmul]
    backward: list[Matmul]


def trace(problem: Problem, layer: Layer, *, checkpointing: bool = False) -> Traced:
    """Of one block in the problem's dtype; `checkpointing`: under the configuration's policy."""
    mask = problem.mask(layer, whole=False) if layer.attention.has_softmax else None
    impl = _kernels_impl(problem, layer)
    graphs = compiler.trace_layer(
        lambda: make_block(problem, layer, device="meta", checkpointing=checkpointing, impl=impl),
        lambda: block_inputs(problem, layer, mask, device="meta"),
    )
    return Traced(
        kept_bytes=compiler.storage_bytes([*graphs.kept, *graphs.outputs]),
        forward=compiler.matmuls(graphs.forward),
        backward=compiler.matmuls(graphs.backward),
    )


def _kernels_impl(problem: Problem, layer: Layer) -> str | None:
    """What "auto" takes on a GPU; None leaves the layer as it is."""
    residual = layer.attention.residual
    if residual is None or residual.impl != "auto":
        return None
    return "torch" if scan.why_no_kernels("auto", scan_shape_of(problem, layer)) else "triton"


def scan_shape_of(problem: Problem, layer: Layer) -> scan.ScanShape:
    """The call of a layer's linear branch."""
    return scan.scan_shape(
        layer.attention,
        batch=problem.batch,
        seq_len=problem.seq_len,
        dtype=problem.torch_dtype,
        capability=capability_of(problem.arch),
    )


def make_block(
    problem: Problem, layer: Layer, *, device: str, checkpointing: bool = False, impl: str | None = None
) -> Any:
    """The layer's block in the problem's dtype, as FSDP's mixed precision computes it; tables of RoPE stay fp32."""
    config = layer.block
    if impl is not None:
        residual = dataclasses.replace(config.attention.residual, impl=impl)
        config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, residual=residual))
    with torch.device(device):
        block = config.build()
    if device != "meta":
        with torch.no_grad(), torch.device(device):
            block.init_states(buffer_device=torch.device(device))
    for parameter in block.parameters():
        parameter.data = parameter.data.to(problem.torch_dtype)
    if config.attention.residual is not None and config.attention.residual.draws:
        block.attention.residual.drawn_window = _drawn(config.attention.residual.window, device)
    policy = with_linear_branch(problem.config.activation_checkpoint)
    if not checkpointing or policy is None:
        return block
    stack = torch.nn.Module()
    stack.layers = torch.nn.ModuleDict({"0": block})
    policy.build(dump_folder=problem.config.dump_folder).apply(stack)
    return stack.layers["0"]


def _drawn(window: int | None, device: str) -> torch.Tensor:
    """A window that is data in training; here that of evaluation."""
    assert window is not None
    return torch.full((), window, dtype=torch.int64, device=device)


def block_inputs(
    problem: Problem, layer: Layer, mask: MaskMod | None, *, device: str
) -> tuple[Any, dict[str, Any], torch.Tensor]:
    """x (B, T, dim) that wants a gradient, the masks, and positions, as the trainer passes them to a block.

    mask: `problem.mask(layer, whole=False)`, or None for a layer without a softmax branch.
    """
    B, T = problem.batch, problem.seq_len
    x = torch.randn(B, T, problem.model.dim, dtype=problem.torch_dtype, device=device, requires_grad=True)
    traced = device == "meta"  # values cannot come from outside then
    positions = torch.zeros(B, T, dtype=torch.int64, device=device) if traced else problem.positions(device)
    masks: dict[str, Any] = {}
    if mask is not None:
        info = mask_info(mask)
        if info is not None and info.schedule is not None:
            mask = drawn_window(_drawn(info.window, device))
        whole = in_documents(mask, document_ids=document_ids_from_positions(positions), positions=positions)
        build = dense_mask if device == "cpu" else build_block_mask
        masks[layer.attention.mask] = build(whole, batch=B, heads=None, q_len=T, kv_len=T, device=device)
    return x, masks, positions
