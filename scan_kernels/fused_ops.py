"""Custom ops around `fused.py`, the problem that they solve, and what they refuse. Importing this file needs no Triton.

The ops take the decay per row (row i holds the decay of the key that query i reads) and the start state's decay ready
made, so that everything in front of them stays with autograd.
"""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from scan_kernels.chunked import SMALLEST_LOG_DECAY, _ChunkDocuments, _shifted_keys, start_log_decay
from scan_kernels.feature_maps import feature_dim
from scan_kernels.precision import without_autocast
from scan_kernels.state import ScanProblem, ScanResult

WIDTHS = (16, 32, 64, 128, 256)
# Others have less shared memory than the configurations need.
CAPABILITIES = ((8, 0), (9, 0), (10, 0))
# Chunks between the states that a forward keeps for its backward, where the caller does not say; 0 keeps none.
DEFAULT_SAVE_EVERY = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def environment_refusal(device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if device_type != "cuda" and not interpreted():
        return f"needs a CUDA device, the tensors are on {device_type}"
    if device_type == "cuda" and not interpreted() and torch.cuda.get_device_capability() not in CAPABILITIES:
        return f"is configured for sm_80, sm_90 and sm_100, not for {torch.cuda.get_device_name()}"
    return ""


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Why `impl="triton"` does not take these tensors; "" if it does."""
    if reason := environment_refusal(q.device.type):
        return reason
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"takes bfloat16, float16 or float32, got {q.dtype}"
    if q.shape[3] not in WIDTHS or v.shape[3] not in WIDTHS:
        return f"takes head sizes 16, 32, 64, 128 and 256, got {q.shape[3]} and {v.shape[3]} (values)"
    return ""


def value_columns(dtype: torch.dtype, D: int) -> int:
    """Value columns that the kernels take at a time: D rows of them lie in shared memory beside the keys."""
    return min(128, (4096 if dtype == torch.float32 else 16384) // D)


def fused_scan(problem: ScanProblem, *, with_final: bool, save_every: int | None = None) -> ScanResult:
    """`problem` by the kernels. Without `with_final` the carried state of the result is empty."""
    if save_every is None:
        save_every = DEFAULT_SAVE_EVERY
    with without_autocast(problem.q_BTHD.device.type):
        return _fused_scan(problem, with_final, save_every)


def _columns(problem: ScanProblem, begin: int, end: int) -> ScanProblem:
    carried, start = problem.carried_BGFD, problem.start_BXFD
    return replace(
        problem,
        v_BMGD=problem.v_BMGD[..., begin:end],
        carried_BGFD=None if carried is None else carried[..., begin:end],
        start_BXFD=None if start is None else start[..., begin:end],
    )


def _fused_scan(problem: ScanProblem, with_final: bool, save_every: int) -> ScanResult:
    Dv, columns = problem.v_BMGD.shape[3], value_columns(problem.q_BTHD.dtype, problem.q_BTHD.shape[3])
    if Dv > columns:
        # The columns of the values do not meet, so that each part is a problem of its own.
        parts = [
            _fused_scan(_columns(problem, begin, begin + columns), with_final, save_every)
            for begin in range(0, Dv, columns)
        ]
        o_BTHD = torch.cat([part.o_BTHD for part in parts], dim=3)
        carried_BGFD = torch.cat([part.carried_BGFD for part in parts], dim=-1)
        return ScanResult(o_BTHD, carried_BGFD, parts[0].start_log_decay_BG)
    inputs, final_log_BG, documents = _op_inputs(problem, with_final=with_final)
    o_BTHD, final_BGFD, _, _ = fused_fwd(
        *inputs,
        problem.lag,
        problem.feature_map.value,
        with_final,
        save_every if _needs_gradient(problem) else 0,
    )
    if with_final and documents is not None:
        final_BGFD = torch.where(documents.ends_running_B111, final_BGFD, 0.0)
    return ScanResult(o_BTHD, final_BGFD, final_log_BG)


def fused_scan_and_inputs(
    problem: ScanProblem, *, save_every: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, and the problem's q, k, v for other readers, whose gradients this branch's kernels add to their own."""
    in_parts = problem.v_BMGD.shape[3] > value_columns(problem.q_BTHD.dtype, problem.q_BTHD.shape[3])
    if in_parts or not _needs_gradient(problem):
        # Of parts, autograd adds up what they give to dq and dk anyway.
        o_BTHD = fused_scan(problem, with_final=False, save_every=save_every).o_BTHD
        return o_BTHD, problem.q_BTHD, problem.k_BMGD, problem.v_BMGD
    if save_every is None:
        save_every = DEFAULT_SAVE_EVERY
    with without_autocast(problem.q_BTHD.device.type):
        inputs, *_ = _op_inputs(problem, with_final=False)
        return torch.ops.scan_kernels.fused_with_inputs(*inputs, problem.lag, problem.feature_map.value, save_every)


def _op_inputs(problem: ScanProblem, *, with_final: bool) -> tuple["Inputs", Tensor | None, _ChunkDocuments | None]:
    """The ops' tensors, the start state's decay at the end, and where documents end if something asks for it."""
    T = problem.q_BTHD.shape[1]
    rows_BGT = None
    if problem.decay_BMG is not None:
        decay_fp64 = problem.decay_BMG.double().clamp(min=SMALLEST_LOG_DECAY)
        rows_BGT = _shifted_keys(decay_fp64, problem.lag, T, 0).transpose(1, 2)
    # The kernels look at the documents themselves; only what torch computes of the states needs them here.
    states = with_final or problem.start_BXFD is not None
    documents = _ChunkDocuments(problem, T, 1, T, 0) if states and problem.query_document_BT is not None else None
    start_log_BGT = final_log_BG = None
    if problem.start_BXFD is not None:
        start_log_BGT = start_log_decay(problem, rows_BGT, documents)
        final_log_BG = start_log_BGT[..., T - 1]
        if rows_BGT is None and problem.start_log_decay_BG is None:
            start_log_BGT = None
    inputs = Inputs(
        problem.q_BTHD,
        problem.k_BMGD,
        problem.v_BMGD,
        rows_BGT,
        problem.query_document_BT,
        problem.key_document_BM,
        problem.carried_document_B,
        problem.carried_BGFD,
        problem.start_BXFD,
        start_log_BGT,
    )
    return inputs, final_log_BG, documents


def _needs_gradient(problem: ScanProblem) -> bool:
    tensors = (
        problem.q_BTHD,
        problem.k_BMGD,
        problem.v_BMGD,
        problem.decay_BMG,
        problem.carried_BGFD,
        problem.start_BXFD,
        problem.start_log_decay_BG,
    )
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


class Inputs(NamedTuple):
    """The tensors that both ops take, in their order. None: the problem has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor | None = None  # (B, G, T) float64: decays
    query_doc: Tensor | None = None
    key_doc: Tensor | None = None
    carried_doc: Tensor | None = None
    carried: Tensor | None = None  # (B, G, F, Dv)
    start: Tensor | None = None  # (B, X, F, Dv)
    start_log: Tensor | None = None  # (B, G, T) float64: decay of `start`


class OtherGrads(NamedTuple):
    """What other readers of q, k, v give to their gradients; the kernels of dq, dk, dv add it. None: nothing."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None


NO_OTHERS = OtherGrads()


@torch.library.custom_op("scan_kernels::fused_fwd", mutates_args=())
def fused_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    query_doc: Tensor | None,
    key_doc: Tensor | None,
    carried_doc: Tensor | None,
    carried: Tensor | None,
    start: Tensor | None,
    start_log: Tensor | None,
    lag: int,
    feature_map: str,
    with_final: bool,
    save_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o (B, T, H, Dv) and, if asked, the state behind the last key (B, G, F, Dv) fp32; else an empty tensor.

    With save_every the states before every so many chunks (kernels/border_states.py) and, in fp32, the sums of their
    values: outputs, so that activation checkpointing keeps or recomputes them with o. Otherwise empty tensors.
    """
    from scan_kernels import fused

    inputs = Inputs(q, k, v, rows, query_doc, key_doc, carried_doc, carried, start, start_log)
    return fused.solve(inputs, lag, feature_map, with_final, save_every)


@fused_fwd.register_fake
def _(*arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:10])
    lag, feature_map, with_final, save_every = arguments[10:]
    q, k, v = inputs[:3]
    o = q.new_empty(*q.shape[:3], v.shape[3])
    B, G, F, Dv = q.shape[0], k.shape[2], feature_dim(feature_map, q.shape[3]), v.shape[3]
    final = q.new_empty((B, G, F, Dv) if with_final else (0,), dtype=torch.float32)
    kept_shape: tuple[int, ...] = (0,)
    kept_sums_shape: tuple[int, ...] = (0,)
    compute = torch.float32
    if q.dtype != torch.float32:
        compute = torch.bfloat16
    if save_every:
        from scan_kernels import fused

        rows_kept = fused.rows_kept(inputs, lag, feature_map, save_every)
        kept_shape, kept_sums_shape = (B * G, rows_kept, F, Dv), (B * G, rows_kept, Dv)
    return o, final, q.new_empty(kept_shape, dtype=compute), q.new_empty(kept_sums_shape, dtype=torch.float32)


@torch.library.custom_op("scan_kernels::fused_bwd", mutates_args=())
def fused_bwd(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    query_doc: Tensor | None,
    key_doc: Tensor | None,
    carried_doc: Tensor | None,
    carried: Tensor | None,
    start: Tensor | None,
    start_log: Tensor | None,
    kept: Tensor | None,
    kept_sums: Tensor | None,
    dq_other: Tensor | None,
    dk_other: Tensor | None,
    dv_other: Tensor | None,
    lag: int,
    feature_map: str,
    save_every: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, rows, carried, start, start_log; empty tensors for what is None.

    kept, kept_sums: what `fused_fwd` returned, with save_every; None otherwise.
    dq_other, dk_other, dv_other: added to dq, dk, dv before they are rounded.
    """
    from scan_kernels import fused

    inputs = Inputs(q, k, v, rows, query_doc, key_doc, carried_doc, carried, start, start_log)
    others = OtherGrads(dq_other, dk_other, dv_other)
    return fused.solve_bwd(do, d_final, inputs, kept, kept_sums, lag, feature_map, save_every, others)


@fused_bwd.register_fake
def _(do, d_final, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(*arguments[:10])

    def like(x: Tensor | None) -> Tensor:
        return inputs.q.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    q, k, v, rows, *_, carried, start, start_log = inputs
    return like(q), like(k), like(v), like(rows), like(carried), like(start), like(start_log)


def _setup_context(ctx, inputs, output) -> None:
    ctx.lag, ctx.feature_map, ctx.with_final, ctx.save_every = inputs[10:]
    *_, kept, kept_sums = output
    ctx.mark_non_differentiable(kept, kept_sums)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10], *((kept, kept_sums) if ctx.save_every else (None, None)))


def _backward(ctx, do: Tensor | None, d_final: Tensor | None, _kept: None, _kept_sums: None):
    saved = ctx.saved_tensors
    inputs = Inputs(*saved[:10])
    if do is None:
        do = inputs.q.new_zeros(*inputs.q.shape[:3], inputs.v.shape[3])
    if not ctx.with_final:
        d_final = None
    grads = fused_bwd(do, d_final, *saved, *NO_OTHERS, ctx.lag, ctx.feature_map, ctx.save_every)
    return *_in_order(inputs, grads), None, None, None, None


def _in_order(inputs: Inputs, grads: Sequence[Tensor]) -> list[Tensor | None]:
    """What `fused_bwd` returned, a gradient for each of `inputs`."""
    dq, dk, dv, d_rows, d_carried, d_start, d_start_log = grads
    found = (dq, dk, dv, d_rows, None, None, None, d_carried, d_start, d_start_log)
    return [None if x is None else grad for x, grad in zip(inputs, found, strict=True)]


fused_fwd.register_autograd(_backward, setup_context=_setup_context)


class _WithInputs(torch.autograd.Function):
    """`fused_fwd` as a node that q, k, v pass through on their way to other readers.

    So it is the one place where their gradients meet, and its backward has those of the others in its hands.
    """

    @staticmethod
    def forward(ctx, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        inputs = Inputs(*arguments[:10])
        ctx.lag, ctx.feature_map, ctx.save_every = arguments[10:]
        o, _, kept, kept_sums = fused_fwd(*inputs, ctx.lag, ctx.feature_map, False, ctx.save_every)
        ctx.save_for_backward(*inputs, *((kept, kept_sums) if ctx.save_every else (None, None)))
        ctx.set_materialize_grads(False)
        return o, *(x.view_as(x) for x in inputs[:3])

    @staticmethod
    def backward(ctx, do: Tensor | None, *others: Tensor | None):
        if do is None:
            return *others, *(None,) * 10
        *saved, kept, kept_sums = ctx.saved_tensors  # checkpointing gives them once
        inputs = Inputs(*saved)
        options = (ctx.lag, ctx.feature_map, ctx.save_every)
        grads = fused_bwd(do, None, *inputs, kept, kept_sums, *others, *options)
        return *_in_order(inputs, grads), None, None, None


# An operator made of others, for the sake of torch.compile: Dynamo sees a single call, and `fused_fwd` is traced inside
# it later. A Function that Dynamo traces itself loses the tags of activation checkpointing in torch 2.11: `full` would
# keep what it should compute again. (And a custom op may not return its inputs.)
_LIBRARY = torch.library.Library("scan_kernels", "FRAGMENT")
_LIBRARY.define(
    "fused_with_inputs(Tensor(a) q, Tensor(b) k, Tensor(c) v, Tensor? rows, Tensor? query_doc, Tensor? key_doc, "
    "Tensor? carried_doc, Tensor? carried, Tensor? start, Tensor? start_log, int lag, str feature_map, int save_every)"
    " -> (Tensor, Tensor(a), Tensor(b), Tensor(c))"
)
_LIBRARY.impl("fused_with_inputs", _WithInputs.apply, "CompositeImplicitAutograd")
