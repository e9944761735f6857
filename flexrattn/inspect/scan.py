"""The kernels of `scan_kernels` that a layer launches in one step, compiled for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flexrattn.inspect.compiler import assembles_as_training
from scan_kernels import feature_dim
from scan_kernels.fused_ops import DEFAULT_SAVE_EVERY, DTYPES, WIDTHS, Inputs, OtherGrads, value_columns
from scan_kernels.window import residual_shift


@dataclass(frozen=True, kw_only=True)
class ScanShape:
    """A linear branch's call in training, as plain values: processes pass it on. Letters: scan_kernels/README.md."""

    B: int
    T: int
    H: int
    G: int
    D: int
    dtype: torch.dtype
    window: int | None
    feature_map: str
    save_every: int
    start: bool  # a learned initial state
    joined: str  # of "qkv": whose gradients of the softmax branch its kernels add to their own
    summed: bool  # both branches' norms and their sum by scan_kernels.sum_of_head_norms
    decays: bool
    capability: int

    @property
    def parts(self) -> int:
        """Problems that the values' columns are cut into: every kernel is launched so often."""
        return -(-self.D // value_columns(self.dtype, self.D))


def scan_shape(attention: Any, *, batch: int, seq_len: int, dtype: torch.dtype, capability: int) -> ScanShape:
    """Of an attention config with a linear branch, as its layer calls it in training."""
    residual = attention.residual
    decays = attention.decay_gate is not None
    halves = 2 if attention.splits_heads else 1
    return ScanShape(
        B=batch,
        T=seq_len,
        H=attention.n_heads // halves,
        G=attention.n_kv_heads // halves,
        D=attention.head_dim,
        dtype=dtype,
        # Keys of a drawn window are shifted in front of the scan.
        window=None if residual.draws else residual.window,
        feature_map=residual.feature_map,
        save_every=DEFAULT_SAVE_EVERY if residual.save_every is None else residual.save_every,
        start=attention.initial_state is not None,
        joined=_joined(attention, dtype),
        summed=attention.sum_impl is not None and attention.swa_norm is not None and not attention.splits_heads,
        decays=decays,
        capability=capability,
    )


def _joined(attention: Any, dtype: torch.dtype) -> str:
    """Which of q, k and v both branches read as they are."""
    residual = attention.residual
    if not (attention.joins_gradients and attention.has_softmax) or attention.splits_heads:
        return ""
    if attention.head_dim > value_columns(dtype, attention.head_dim):
        return ""
    scaled = attention.q_scale is not None
    changed = {"q": scaled, "k": scaled or residual.draws, "v": residual.draws or residual.sinks > 0}
    return "".join(name for name, is_changed in changed.items() if not is_changed)


def why_no_kernels(impl: str, shape: ScanShape) -> str:
    """Why this branch launches none of them on a GPU of their architectures; "" if it does."""
    reason = ""
    if importlib.util.find_spec("triton") is None:
        raise ValueError("the kernels of the linear branch are compiled by the package triton: pip install triton")
    if shape.dtype not in DTYPES:
        reason = f"the kernels take bf16, fp16 and fp32, not {shape.dtype}"
    elif shape.D not in WIDTHS:
        reason = f"the kernels take head sizes {', '.join(map(str, WIDTHS))}, not {shape.D}"
    if impl in ("torch", "reference"):
        return f'scan_impl "{impl}" uses torch operations'
    if impl == "auto":
        return reason and f'{reason}: "auto" uses torch operations'
    if reason:
        raise ValueError(f'scan_impl "triton": {reason}')
    return ""


@dataclass(frozen=True, kw_only=True)
class ScanLaunch:
    """A launch with the direction it belongs to and a name that tells variants of one kernel apart."""

    name: str
    backward: bool
    launch: Any

    @property
    def kernel(self) -> str:
        return self.launch.kernel.fn.__name__

    @property
    def sums(self) -> bool:
        """Whether it is part of the branches' sum, and not of the linear branch."""
        return self.kernel.startswith("branch_sum")


def scan_launches(shape: ScanShape) -> list[ScanLaunch]:
    """Forward and backward of one training step, in their order; of the first part of the values. Nothing is allocated.

    With document ids, which training always passes.
    """
    # Importing these needs Triton.
    from scan_kernels import fused
    from scan_kernels.kernels import branch_sum

    def empty(*sizes: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    B, T, H, G, D = shape.B, shape.T, shape.H, shape.G, shape.D
    DV, F = min(D, value_columns(shape.dtype, D)), feature_dim(shape.feature_map, D)
    q, k, v, do = empty(B, T, H, D), empty(B, T, G, D), empty(B, T, G, DV), empty(B, T, H, DV)
    ids = empty(B, T, dtype=torch.int32)
    start = empty(B, H, F, DV, dtype=torch.float32) if shape.start else None
    rows = empty(B, G, T, dtype=torch.float64) if shape.decays else None
    start_log = None if start is None else rows
    inputs = Inputs(q, k, v, rows, ids, ids, carried_doc=ids[:, 0], start=start, start_log=start_log)
    lag = residual_shift(shape.window)
    sizes, x, init, plan = fused.prepare(inputs, lag, shape.feature_map, capability=shape.capability)
    found: list[ScanLaunch] = []

    def collect(backward: bool) -> Callable[[Any], None]:
        return lambda launch: found.append(ScanLaunch(name=_name(launch), backward=backward, launch=launch))

    *_, kept = fused.forward(sizes, x, init, plan, with_final=False, save_every=shape.save_every, run=collect(False))
    if shape.summed:
        a, b, dy, weight_a, weight_b = (empty(*sizes_of) for sizes_of in (*3 * [(B, T, H, D)], *2 * [(H, D)]))
        collect(False)(branch_sum.branch_sum_fwd(a, b, weight_a, weight_b, 1e-8)[0])
        collect(True)(branch_sum.branch_sum_bwd(dy, a, b, weight_a, weight_b, 1e-8)[0])
    # Tensors of their own, so that their bytes count.
    shared = {"q": q, "k": k, "v": v}
    others = OtherGrads(*(y.new_empty(y.shape) if name in shape.joined else None for name, y in shared.items()))
    fused.backward(sizes, x, init, do, None, plan, with_init_grad=False, kept=kept, others=others, run=collect(True))
    return found


def _name(launch: Any) -> str:
    """The kernel's name, with what it is used for where one kernel serves for several things."""
    name, args = launch.kernel.fn.__name__.removesuffix("_kernel"), launch.args
    if "totals" in args and "states" in args:
        if args["states"] is None:
            return f"{name} (totals)"
        return f"{name} (backward)" if args.get("BACKWARD") else name
    return f"{name} (reversed)" if args.get("REVERSED") else name


def work(launch: Any) -> tuple[int | None, int]:
    """(FLOPs of the products that this launch computes, least bytes: every tensor of its arguments once).

    A multiply-add counts as two. None for a kernel that is not known here. Chunks are computed whole, also where rows
    are masked.
    """
    args = launch.args
    tensors = {id(x): x for x in args.values() if isinstance(x, Tensor)}
    sizes_of = {key: x.numel() * x.element_size() for key, x in tensors.items()}
    names, part, whole = _in_part(launch)
    for name in names:
        if args.get(name) is not None:
            sizes_of[id(args[name])] = sizes_of[id(args[name])] * part // whole
    if "kept" in args:  # of all states it reads the rows that it keeps
        most = sizes_of[id(args["kept"])]
        sizes_of = {key: min(size, most) for key, size in sizes_of.items()}
    nbytes = sum(sizes_of.values())
    formula = _FLOPS.get(launch.kernel.fn.__name__)
    if formula is None:
        return None, nbytes
    sizes = _Sizes(args, _rows_of_heads(args))
    return formula(sizes) * sizes.N * sizes.BG, nbytes


def _in_part(launch: Any) -> tuple[tuple[str, ...], int, int]:
    """Arguments of which a launch touches `part` of `whole` alone: (names, part, whole).

    The empty chunks in front are one kernel's, which writes their rows of o and dq, and no other one's.
    """
    args = launch.args
    if launch.kernel.fn.__name__ == "empty_rows_kernel":
        return ("x", "other"), launch.grid[0] * args["C"], args["T"]
    if not args.get("empty"):
        return (), 1, 1
    names = ("q", "do", "o", "dq", "dq_other", "states", "value_sums", "sums", "factors", "logs")
    return names + (("x", "y") if args.get("BACKWARD") else ()), args["N"] - args["empty"], args["N"]


class _Sizes:
    """The letters of a launch's arguments."""

    def __init__(self, args: dict[str, Any], BG: int) -> None:
        self.BG = BG
        self.N, self.C, self.D, self.F = (args.get(letter, 0) for letter in "NCDF")
        self.N -= args.get("empty", 0)  # chunks in front that have no products
        self.DV = args.get("DV", self.D)
        self.R = args.get("R", 1)
        self.start = args.get("start") is not None
        self.decays = args.get("cum_hi") is not None
        self.carries = args.get("carry") is not None


def _rows_of_heads(args: dict[str, Any]) -> int:
    """B * G, from a tensor with one row for each KV head of each sequence."""
    for name in ("states", "totals", "kept"):
        if args.get(name) is not None:
            return args[name].shape[0]
    return 0


def _state(s: _Sizes) -> int:
    return 2 * s.R * s.C * s.F * s.DV  # phi(k)^T v; backward phi(q)^T do of every head


def _output(s: _Sizes) -> int:
    scores, state, values = s.C * s.C * s.F, s.C * s.F * s.DV, s.C * s.C * s.DV
    return 2 * s.R * (scores + state * (2 if s.start else 1) + values)


def _dq(s: _Sizes) -> int:
    d_scores, state, keys = s.C * s.C * s.DV, s.C * s.DV * s.F, s.C * s.C * s.F
    scores = s.C * s.C * s.F if s.decays else 0
    return 2 * s.R * (d_scores + state * (2 if s.start else 1) + keys + scores)


def _dkv(s: _Sizes, times_d_scores: int, times_state: int = 1) -> int:
    states = 2 * s.C * s.F * s.DV * times_state
    scores, values = 2 * s.C * s.C * s.F, s.C * s.C * s.DV * (1 + times_d_scores)
    return 2 * (states + s.R * (scores + values))


_FLOPS: dict[str, Callable[[_Sizes], int]] = {
    "chunk_state_fwd_kernel": _state,
    "chunk_state_bwd_kernel": _state,
    "hopper_state_kernel": _state,
    "chunk_output_fwd_kernel": _output,
    "hopper_output_kernel": _output,
    "chunk_dq_kernel": _dq,
    "hopper_dq_kernel": _dq,
    # The portable kernel computes do v^T again for each half of the features.
    "chunk_dkv_kernel": lambda s: _dkv(s, s.F // s.D),
    # On Hopper the state from behind the segment is a product of its own.
    "hopper_dkv_kernel": lambda s: _dkv(s, 1, 2 if s.carries else 1),
    "chunk_given_kernel": lambda s: 2 * s.C * s.F * s.DV * (2 if s.carries else 1),
    # Additions and copies alone.
    "state_scan_kernel": lambda s: 0,
    "border_states_kernel": lambda s: 0,
    "empty_rows_kernel": lambda s: 0,
    "branch_sum_fwd_kernel": lambda s: 0,
    "branch_sum_bwd_kernel": lambda s: 0,
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A kernel's texts and resources, or why it did not compile."""

    asm: dict[str, str]  # ttir, ttgir, ptx, sass; gluon: what Gluon hands to Triton
    registers: int = 0
    stack: int = 0
    spilled: int = 0
    shared: int = 0
    warps: int = 0
    error: str = ""


def compile_one(job: tuple[ScanShape, int, bool]) -> Compiled:
    """The body of a worker: the numbered launch of a shape."""
    from scan_kernels.kernels.resources import resources

    assembles_as_training()
    shape, number, with_sass = job
    launch = scan_launches(shape)[number].launch
    try:
        compiled = launch.compile(shape.capability)
        used = resources(compiled)
        # A kernel in Gluon enters Triton behind TTIR.
        asm = {"gluon" if launch.kernel.is_gluon() else "ttir": compiled.asm.get("ttir", compiled.asm["source"])}
        asm |= {stage: compiled.asm[stage] for stage in ("ttgir", "ptx")}
        if with_sass:
            asm["sass"] = compiled.asm["sass"]
        return Compiled(
            asm=asm,
            registers=used.registers,
            stack=used.stack,
            spilled=used.spilled,
            shared=used.shared,
            warps=compiled.metadata.num_warps,
        )
    except Exception as error:
        return Compiled(asm={}, error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


# Begins to compile (shape, number of the launch, with SASS), and returns what waits for the results.
CompileJobs = Callable[[Iterable[tuple[ScanShape, int, bool]]], Callable[[], list[Compiled]]]


@contextmanager
def compilers(processes: int) -> Iterator[CompileJobs]:
    """Compile in processes of their own, while the caller does other things; with one, in this one."""
    if processes <= 1:
        yield lambda jobs: lambda: [compile_one(job) for job in jobs]
        return
    # Forked from a server that imports torch once; nothing of CUDA is touched in it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "scan_kernels.kernels.resources"])
    with ProcessPoolExecutor(processes, context, initializer=_leave_interrupts_to_the_caller) as pool:

        def begin(jobs: Iterable[tuple[ScanShape, int, bool]]) -> Callable[[], list[Compiled]]:
            running = [pool.submit(compile_one, job) for job in jobs]
            return lambda: [each.result() for each in running]

        try:
            yield begin
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _leave_interrupts_to_the_caller() -> None:
    """Ctrl-C reaches every process of the terminal; this one ends with its caller's pool."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def different(launches: list[ScanLaunch]) -> dict[int, int]:
    """{launch: the first launch that compiles to the same kernel}, by their numbers."""
    first: dict[Any, int] = {}
    same = {}
    for number, each in enumerate(launches):
        key = (each.kernel, each.launch.source().hash(), tuple(each.launch.options.items()))
        same[number] = first.setdefault(key, number)
    return same
