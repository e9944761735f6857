"""`python -m scan_kernels.tune`: time launch configurations on this GPU; a candidate with wrong numbers cannot win.

Every candidate replaces one stage of the plan in use. It must reproduce o, dq, dk and dv of a float64 computation, and
do so twice with the same bits, before its time counts. Prints one line per candidate and writes a CSV.
"""

import argparse
import csv
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from scan_kernels import fused
from scan_kernels.api import residual_linear_attention
from scan_kernels.fused_ops import value_columns
from scan_kernels.kernels.configs import HALF, Plan, plan_for
from scan_kernels.kernels.launch import Config, Launch, Tensors

STAGES = {
    "state_fwd": "chunk_state_fwd_kernel",
    "state_bwd": "chunk_state_bwd_kernel",
    "output": "chunk_output_fwd_kernel",
    "dq": "chunk_dq_kernel",
    "dkv": "chunk_dkv_kernel",
}
HOPPER_STAGES = {
    "state_fwd": "hopper_state_kernel",
    "state_bwd": "hopper_state_kernel",
    "output": "hopper_output_kernel",
    "dq": "hopper_dq_kernel",
    "dkv": "hopper_dkv_kernel",
}
SCAN = "state_scan_kernel"
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    G: int
    D: int
    DV: int
    window: int
    feature_map: str
    dtype: torch.dtype

    def tensors(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, do; v with a mean, as the common mode of softmax features needs it to show."""
        generator = None if device == "meta" else torch.Generator(device).manual_seed(0)

        def normal(heads: int, width: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
            x = torch.randn(self.B, self.T, heads, width, device=device, generator=generator)
            return (x * scale + mean).to(self.dtype)

        return (
            normal(self.H, self.D, 0.3),
            normal(self.G, self.D),
            normal(self.G, self.DV, mean=0.3),
            normal(self.H, self.DV),
        )


def with_stage(plan: Plan, stage: str, config: Config) -> Plan:
    changes: dict[str, Any] = {stage: config}
    return replace(plan, **changes)


def candidates(stage: str, plan: Plan) -> list[Plan]:
    """Plans that differ from `plan` in one stage, or in how the sequence is cut."""
    found = []
    if plan.hopper:
        # Their tiles are fixed; what can be chosen is how many programs fit on an SM.
        own: Config = getattr(plan, stage)
        return [with_stage(plan, stage, replace(own, registers=limit)) for limit in (None, 128, 168, 224)]
    if stage.startswith("state"):
        for warps, stages, block_f, block_v in itertools.product((4, 8), (1, 2, 3), (64, 128), (64, 128)):
            found.append(with_stage(plan, stage, Config(warps, stages, block_f=block_f, block_v=block_v)))
    else:
        for warps, stages, heads in itertools.product((4, 8), (1, 2), (1, 2)):
            rows = plan.chunk * heads
            if 16 * warps <= rows * 2 and rows <= 16 * warps * (2 if stage == "dkv" else 1):
                found.append(with_stage(plan, stage, Config(warps, stages, heads=heads)))
    return found


def run_all(shape: Shape, plan: Plan, device: str, run: Callable[[Launch], Any], given=None) -> dict[str, Tensor]:
    q, k, v, do = given or shape.tensors(device)
    sizes = fused.sizes_of(q, k, v, shape.window + 1, shape.feature_map, plan)
    x = Tensors(q, k, v)
    o, *_ = fused.forward(sizes, x, None, plan, with_final=False, run=run)
    dq, dk, dv, *_ = fused.backward(sizes, x, None, do, None, plan, with_init_grad=False, run=run)
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}


def _compile(job: tuple[Shape, Plan, str, int]) -> tuple[str, float]:
    shape, plan, stage, capability = job
    begin = time.perf_counter()
    try:
        for launch in launches(shape, plan, "meta", None, stage):
            launch.compile(capability)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}", time.perf_counter() - begin
    return "", time.perf_counter() - begin


def launches(shape: Shape, plan: Plan, device: str, given: Any, stage: str) -> list[Launch]:
    """Of a stage, or of the scan; the same kernel once."""
    kernel = SCAN if stage == SCAN else (HOPPER_STAGES if plan.hopper else STAGES)[stage]
    found: list[Launch] = []

    def collect(launch: Launch) -> None:
        # One Hopper kernel makes totals and states, forward and backward.
        made_by = {"state_fwd": (False, True), "state_bwd": (True, True)}.get(stage) if plan.hopper else None
        makes = (launch.args.get("BACKWARD"), launch.args.get("states") is not None)
        if launch.kernel.fn.__name__ == kernel and made_by in (None, makes) and not found:
            found.append(launch)

    run_all(shape, plan, device, collect, given)
    return found


def queued(launch: Launch, kernel: Any) -> Callable[[], Any]:
    """The launch of a compiled kernel, without the search for it."""
    arguments = [launch.args[parameter.name] for parameter in launch.kernel.params]
    return partial(kernel[(*launch.grid, 1, 1)[:3]], *arguments)


def median_ms(fn: Callable[[], Any], repeats: int = 30) -> float:
    for _ in range(5):
        fn()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in events:
        torch.cuda._sleep(200_000)  # about .1 ms, in which the host queues the launch
        begin.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in events)
    return times[len(times) // 2]


def relative(x: Tensor, reference: Tensor) -> float:
    return ((x.double() - reference).norm() / reference.norm()).item()


def reference(shape: Shape, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    q, k, v = (x.double().requires_grad_() for x in given[:3])
    o = residual_linear_attention(q, k, v, window=shape.window, feature_map=shape.feature_map, impl="torch")
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), given[3].double())
    return {"o": o.detach(), "dq": dq, "dk": dk, "dv": dv}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, nargs=2, default=(16, 4), metavar=("QUERY", "KV"))
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--feature-map", default="softmax")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--chunk", type=int, nargs="*", help="rows of a chunk to try; the plan's by default")
    parser.add_argument("--segment", type=int, nargs="*", help="chunks of a segment to try; the plan's by default")
    parser.add_argument("--stage", choices=STAGES, nargs="*", default=list(STAGES))
    parser.add_argument("--portable", action="store_true", help="the stages that every GPU has, on a Hopper GPU, too")
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)

    H, G = options.heads
    shape = Shape(
        options.batch,
        options.tokens,
        H,
        G,
        options.width,
        min(options.width, value_columns(DTYPES[options.dtype], options.width)),
        options.window,
        options.feature_map,
        DTYPES[options.dtype],
    )
    capability = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    base = plan_for(shape.dtype, shape.D, shape.DV, capability)
    if base.hopper and options.portable:
        base = HALF
    plans = [
        replace(base, chunk=chunk, segment=segment)
        for chunk in options.chunk or [base.chunk]
        for segment in options.segment or [base.segment]
    ]
    jobs = [(plan, stage, each) for plan in plans for stage in options.stage for each in candidates(stage, plan)]
    to_compile = [(shape, plan, stage, capability) for _, stage, plan in jobs]
    to_compile += [(shape, plan, stage, capability) for plan in plans for stage in (*STAGES, SCAN)]
    with ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        failures = list(pool.map(_compile, to_compile))
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, triton {triton.__version__}, {shape}", flush=True)

    given = shape.tensors("cuda")
    expected = reference(shape, given)
    compiled: dict[Any, Any] = {}

    def run(launch: Launch) -> None:
        launch.run_compiled(capability, compiled)

    rows = []
    for (_, stage, plan), (failure, seconds) in zip(jobs, failures[: len(jobs)], strict=True):
        config: Config = getattr(plan, stage)
        row: dict[str, Any] = {"stage": stage, "chunk": plan.chunk, "segment": plan.segment, **vars(config)}
        row |= {"ms": "", "error": "", "used": "", "spills": "", "shared": "", "note": failure}
        row["compile_s"] = f"{seconds:.1f}"
        if not failure:
            try:
                first, second = (run_all(shape, plan, "cuda", run, given) for _ in range(2))
                same = all(torch.equal(first[name], second[name]) for name in first)
                errors = {name: relative(x, expected[name]) for name, x in first.items()}
                (launch,) = launches(shape, plan, "cuda", given, stage)
                kernel = launch.run_compiled(capability, compiled)
                row |= {"used": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared}
                row["error"] = f"{max(errors.values()):.1e}"
                right = all(error < TOLERANCE[shape.dtype] for error in errors.values())
                if not right or not same:
                    row["note"] = f"WRONG {errors}" if not right else "WRONG: differs between two runs"
                row["ms"] = f"{median_ms(queued(launch, kernel)):.4f}"
            except Exception as error:
                row["note"] = f"{type(error).__name__}: {str(error)[:80]}"
        rows.append(row)
    for row in rows:
        print(" ".join(f"{name}={value}" for name, value in row.items() if value != ""), flush=True)
    print("best per stage and cut:")
    for plan, stage in itertools.product(plans, options.stage):
        own = [
            row
            for row in rows
            if (row["stage"], row["chunk"], row["segment"]) == (stage, plan.chunk, plan.segment)
            and row["ms"]
            and not row["note"]
        ]
        if own:
            best = min(own, key=lambda row: float(row["ms"]))
            print(" ".join(f"{name}={value}" for name, value in best.items() if value != "" and name != "compile_s"))
    for plan in plans:
        for launch in launches(shape, plan, "cuda", given, SCAN):
            scan = queued(launch, launch.run_compiled(capability, compiled))
            print(f"state_scan chunk={plan.chunk} segment={plan.segment} ms={median_ms(scan):.4f}")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["device", "torch", "triton", *rows[0]])
            writer.writeheader()
            about = {"device": device, "torch": torch.__version__, "triton": triton.__version__}
            writer.writerows(about | row for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
