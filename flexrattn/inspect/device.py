"""What takes a GPU: a layer's block compiled and run, its kernels as they were launched, their times, its memory."""

from __future__ import annotations

import contextlib
import json
import re
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexrattn.inspect import compiler, memory
from flexrattn.inspect.compiler import InductorKernel
from flexrattn.inspect.gpus import GPU
from flexrattn.inspect.problem import Layer, Problem
from flexrattn.inspect.report import OTHERS, OURS, PRODUCTS, SOFTMAX, Kernel, finish, read_texts, set_occupancy

ROUNDS = 7
# Names of cuBLAS's and CUTLASS's matrix products.
_PRODUCT = re.compile(r"gemm|nvjet|cutlass|splitk|cublas|xmma", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A kernel on the GPU's timeline; seconds is the median over rounds."""

    name: str
    seconds: float
    grid: tuple[int, ...]
    registers: int | None


def ceilings(gpu: GPU) -> GPU:
    """`gpu` with the bf16 matrix product and the copy that this device reaches: medians of 20, 8192^3 and 2 GB."""
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bf16 = 2 * 8192**3 / _median_s(lambda: x @ y)
    source = torch.empty(2**30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * 2**30 / _median_s(lambda: target.copy_(source))
    return gpu.with_ceilings(bf16=bf16, bandwidth=bandwidth)


def _median_s(call: Callable[[], Any], rounds: int = 20) -> float:
    for _ in range(3):
        call()
    events = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3


class Step:
    """Forward and backward of one block, compiled as torchtitan compiles it."""

    def __init__(
        self, problem: Problem, layer: Layer, *, checkpointing: bool, device: str = "cuda", backend: str = "inductor"
    ) -> None:
        mask = problem.mask(layer, whole=False) if layer.attention.has_softmax else None
        self.block = memory.make_block(problem, layer, device=device, checkpointing=checkpointing)
        self.block.compile(fullgraph=True, backend=backend)
        self.inputs = memory.block_inputs(problem, layer, mask, device=device)
        self.wanted = [self.inputs[0], *self.block.parameters()]
        self.do = torch.randn_like(self.inputs[0])

    def forward(self) -> Tensor:
        return self.block(*self.inputs)

    def backward(self, y: Tensor) -> None:
        torch.autograd.grad(y, self.wanted, self.do)

    def kept_bytes(self) -> int:
        """Allocated by a forward and still there behind it, its output too."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = self.forward()
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before
        self.backward(y)
        return kept


def measure_layer(problem: Problem, layer: Layer, found: dict[str, Any], gpu: GPU) -> list[str]:
    """Fill a layer's report with what its run shows; returns what did not turn out as expected."""
    torch.compiler.reset()
    # As flexrattn.parallelize sets it: a second length compiles a second static kernel.
    with _static_shapes(), compiler.inductor_kernels() as generated, compiler.dynamo_events() as events:
        step = Step(problem, layer, checkpointing=False)
        for _ in range(2):
            step.backward(step.forward())
        torch.cuda.synchronize()
    found["memory"]["measured"] = step.kept_bytes()
    timeline = profile(step)
    del step
    flex = [kernel for kernel in generated if is_flex(kernel)]
    found["flex"] = {
        "dynamic": any(kernel.dynamic for kernel in flex),
        "compiles": events.graphs,
        "recompiles": [vars(event) for event in events.recompiles],
        "graph_breaks": [vars(event) for event in events.graph_breaks],
    }
    unexpected = assign(problem, found["kernels"], timeline, generated)
    for kernel in found["kernels"]:
        finish(kernel, gpu)
    if problem.config.activation_checkpoint is None:
        found["memory"]["measured_checkpointed"] = found["memory"]["measured"]
    else:
        torch.compiler.reset()
        with _static_shapes():
            checkpointed = Step(problem, layer, checkpointing=True)
            checkpointed.backward(checkpointed.forward())
            found["memory"]["measured_checkpointed"] = checkpointed.kept_bytes()
        del checkpointed
    torch.compiler.reset()
    torch.cuda.empty_cache()
    return unexpected


@contextlib.contextmanager
def _static_shapes() -> Iterator[None]:
    import torch._dynamo

    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


def profile(step: Step) -> dict[str, list[Launched]]:
    """{"forward": kernels in the order of their launches, "backward": ...}."""
    both = _traced(lambda: step.backward(step.forward()))
    forward = _traced(step.forward)
    names = [each.name for each in both[: len(forward)]]
    if names != [each.name for each in forward]:
        raise RuntimeError("a forward with and one without its backward launched different kernels")
    return {"forward": both[: len(forward)], "backward": both[len(forward) :]}


def _traced(call: Callable[[], Any]) -> list[Launched]:
    """The kernels of one call, from the profiler's trace of ROUNDS of them."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with warnings.catch_warnings(), torch.profiler.profile(activities=activities) as profiler:
        warnings.simplefilter("ignore")
        for _ in range(ROUNDS):
            call()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return parse_trace(json.loads(path.read_text()), ROUNDS)


def parse_trace(trace: dict[str, Any], rounds: int) -> list[Launched]:
    """One round's kernels. ValueError where the rounds did not launch the same."""
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    kernels.sort(key=lambda event: event["ts"])
    number = len(kernels) // rounds
    each = [kernels[i * number : (i + 1) * number] for i in range(rounds)]
    names = [[event["name"] for event in one] for one in each]
    if len(kernels) % rounds or any(one != names[0] for one in names):
        raise ValueError(f"{len(kernels)} kernels in {rounds} equal calls: the calls did not launch the same")
    return [
        Launched(
            name=same[0]["name"],
            seconds=statistics.median(event["dur"] for event in same) / 1e6,
            grid=tuple(same[0].get("args", {}).get("grid", ())),
            registers=same[0].get("args", {}).get("registers per thread"),
        )
        for same in zip(*each, strict=True)
    ]


def is_flex(kernel: InductorKernel) -> bool:
    """Every kernel of FlexAttention's templates walks a block mask's lists."""
    return "SPARSE_KV_BLOCK_SIZE" in kernel.constants or "SPARSE_Q_BLOCK_SIZE" in kernel.constants


def assign(
    problem: Problem,
    kernels: list[Kernel],
    timeline: dict[str, list[Launched]],
    generated: Sequence[InductorKernel],
) -> list[str]:
    """Give what was launched to the report's kernels, add those that it did not foresee; returns what is odd."""
    by_name = {kernel.name: kernel for kernel in generated}
    unexpected = []
    for phase, launched in timeline.items():
        rest = launched
        for group in OURS:
            rest, odd = _assign_ours(kernels, group, phase, rest)
            unexpected += odd
        rest, odd = _assign_flex(problem, kernels, phase, rest, by_name)
        unexpected += odd
        kernels += _others(problem, phase, rest, by_name)
    return unexpected


def _assign_ours(
    kernels: Sequence[Kernel], group: str, phase: str, launched: list[Launched]
) -> tuple[list[Launched], list[str]]:
    """The launches of a group of `scan_kernels`, in their order, which is that of the report's."""
    own = [kernel for kernel in kernels if kernel.group == group and kernel.phase == phase]
    names = {function_of(kernel) for kernel in own}
    mine = [each for each in launched if each.name in names]
    rest = [each for each in launched if each.name not in names]
    parts = own[0].launches if own else 1
    if [each.name for each in mine] != [function_of(kernel) for kernel in own] * parts:
        return launched, [f"{phase}: the {group} launched {', '.join(each.name for each in mine) or 'nothing'}"]
    odd = []
    for i, kernel in enumerate(own):
        kernel.measured_s = sum(each.seconds for each in mine[i :: len(own)])
        registers = mine[i].registers
        if registers is not None and kernel.registers is not None and registers != kernel.registers:
            odd.append(f"{kernel.name}: launched with {registers} registers, compiled here with {kernel.registers}")
    return rest, odd


def function_of(kernel: Kernel) -> str:
    return f"{kernel.name.partition(' ')[0]}_kernel"


def _assign_flex(
    problem: Problem,
    kernels: Sequence[Kernel],
    phase: str,
    launched: list[Launched],
    generated: dict[str, InductorKernel],
) -> tuple[list[Launched], list[str]]:
    own = [kernel for kernel in kernels if kernel.group == SOFTMAX and kernel.phase == phase]
    names = {name for name, kernel in generated.items() if is_flex(kernel)}
    mine = [each for each in launched if each.name in names or "flashattention" in each.name.lower()]
    if not own:
        return launched, []
    if not mine:
        return launched, [f"{phase}: no kernel of FlexAttention was launched"]
    (kernel,) = own
    kernel.measured_s = sum(each.seconds for each in mine)
    kernel.launches = len(mine)
    kernel.grid = list(mine[0].grid)
    if mine[0].name in generated:
        fill(problem, kernel, generated[mine[0].name])
        kernel.options = {"called": mine[0].name, **kernel.options}
    else:
        kernel.options = {"called": mine[0].name}
        kernel.note = "not a Triton kernel: FlexAttention's backend FLASH makes CuTe kernels"
    return [each for each in launched if each not in mine], []


def fill(problem: Problem, kernel: Kernel, generated: InductorKernel) -> None:
    """With what Inductor knows of a kernel that it generated."""
    kernel.registers, kernel.spilled, kernel.shared = generated.registers, generated.spilled, generated.shared
    kernel.warps, kernel.stages, kernel.dynamic = generated.warps, generated.stages, generated.dynamic
    kernel.options = generated.constants
    kernel.sources["python"] = generated.source
    read_texts(kernel, generated.asm)
    set_occupancy(kernel, problem)


def _others(
    problem: Problem, phase: str, launched: Sequence[Launched], generated: dict[str, InductorKernel]
) -> list[Kernel]:
    """Matrix products by cuBLAS, Inductor's fused kernels, and torch's own: one row each name."""
    kernels: dict[str, Kernel] = {}
    for each in launched:
        if each.name in kernels:
            kernel = kernels[each.name]
            kernel.launches += 1
            kernel.measured_s = (kernel.measured_s or 0.0) + each.seconds
            continue
        product = each.name not in generated and _PRODUCT.search(each.name)
        kernel = Kernel(name=each.name, group=PRODUCTS if product else OTHERS, phase=phase, measured_s=each.seconds)
        kernel.grid, kernel.registers = list(each.grid), each.registers
        if each.name in generated:
            fill(problem, kernel, generated[each.name])
            if kernel.group == OTHERS:
                kernel.flops = 0
        kernels[each.name] = kernel
    for name, kernel in kernels.items():
        if kernel.group == OTHERS and name in generated:
            kernel.bytes = generated[name].nbytes * kernel.launches
    return list(kernels.values())
