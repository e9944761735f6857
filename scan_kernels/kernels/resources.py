"""What the compiled kernels of `impl="triton"` take from a GPU, read from their binaries. No GPU is needed.

python -m scan_kernels.kernels.resources --capability 90 --dtype bf16 --width 128
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from scan_kernels import fused
from scan_kernels.feature_maps import feature_dim
from scan_kernels.fused_ops import NO_OTHERS, Inputs, OtherGrads, value_columns
from scan_kernels.kernels.configs import Plan
from scan_kernels.kernels.launch import Launch

# Shared memory that one program may have, bytes.
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What a problem has beside q, k and v.
VARIANTS = {
    "plain": (),
    "documents": ("documents",),
    "decay": ("decay",),
    "start": ("start",),
    "all": ("documents", "decay", "start", "final"),
    "core": ("others",),
    "joined": ("documents", "others"),  # the other branch's gradients of q, k, v
}


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread
    stack: int  # bytes of a thread: what does not fit into registers
    spilled: int  # bytes of a thread, stores and loads as written in the code
    shared: int  # bytes of a program


def resources(compiled: Any) -> Resources:
    """Of what `Launch.compile` returns, from its binary: with other options than Triton's, ptxas spills otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))  # type: ignore[index]
    # Stores to and loads from a thread's own memory: of 4 bytes, or of as many bits as they say.
    accesses = re.findall(r"\b(?:STL|LDL)((?:\.\w+)*)", compiled.asm["sass"]) if stack else []
    widths = (re.search(r"\.(64|128)", modifiers) for modifiers in accesses)
    spilled = sum(int(width[1]) // 8 if width else 4 for width in widths)
    return Resources(registers, stack, spilled, compiled.metadata.shared)


@dataclass(frozen=True)
class Case:
    """A problem of 4 query heads, and the GPU that it is compiled for."""

    capability: int
    dtype: str
    D: int
    variant: str
    feature_map: str = "softmax"
    plan: Plan | None = None  # None: the committed one

    def launches(self) -> list[Launch]:
        """All of its forward and backward, each kernel once. Nothing is allocated."""
        T, B, H, G, F = 4096, 2, 16, 4, feature_dim(self.feature_map, self.D)
        has = VARIANTS[self.variant]

        def empty(*shape: int, dtype: torch.dtype = DTYPES[self.dtype]) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        DV = min(self.D, value_columns(DTYPES[self.dtype], self.D))
        q, k, v, do = empty(B, T, H, self.D), empty(B, T, G, self.D), empty(B, T, G, DV), empty(B, T, H, DV)
        rows = empty(B, G, T, dtype=torch.float64) if "decay" in has else None
        ids = empty(B, T, dtype=torch.int32) if "documents" in has else None  # as the trainer makes them
        start = empty(B, G, F, DV, dtype=torch.float32) if "start" in has else None
        inputs = Inputs(
            q,
            k,
            v,
            rows=rows,
            query_doc=ids,
            key_doc=ids,
            carried_doc=None if ids is None else ids[:, 0],
            start=start,
            start_log=rows if start is not None else None,
        )
        sizes, x, init, plan = fused.prepare(inputs, 513, self.feature_map, capability=self.capability, plan=self.plan)
        found: dict[tuple, Launch] = {}

        def collect(launch: Launch) -> None:
            # A kernel with other outputs is another one.
            args = launch.args
            without = {name for name in ("states", "totals") if name in args and args[name] is None}
            found.setdefault((_name(launch), args.get("REVERSED"), *sorted(without)), launch)

        others = OtherGrads(q, k, v) if "others" in has else NO_OTHERS
        with_final = "final" in has
        *_, kept = fused.forward(sizes, x, init, plan, with_final=with_final, save_every=2, run=collect)
        d_final = empty(B * G, F + 1, DV, dtype=torch.float32) if with_final else None
        for start_from in (None, kept):
            fused.backward(
                sizes,
                x,
                init,
                do,
                d_final,
                plan,
                with_init_grad=with_final,
                kept=start_from,
                others=others,
                run=collect,
            )
        return list(found.values())


def _measure(job: tuple[Case, int]) -> tuple[str, Resources | str]:
    case, number = job
    launch = case.launches()[number]
    try:
        return _name(launch), resources(launch.compile(case.capability))
    except Exception as error:
        return _name(launch), f"{type(error).__name__}: {str(error).strip()[:100]}"


def _name(launch: Launch) -> str:
    """Of the kernel, and of the direction where one kernel has both."""
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    return f"{name}_bwd" if launch.args.get("BACKWARD") else name


def measure(
    cases: Iterable[Case], processes: int = 2, kernels: Iterable[str] = ()
) -> list[tuple[Case, str, Resources | str]]:
    """(case, kernel, its resources or why it does not compile) for all kernels, or the named ones, of all cases."""
    jobs = [
        (case, number)
        for case in cases
        for number, launch in enumerate(case.launches())
        if not kernels or _name(launch) in kernels
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return [(case, *found) for (case, _), found in zip(jobs, pool.map(_measure, jobs), strict=True)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, nargs="*", choices=SHARED, default=[90])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=["bf16"])
    parser.add_argument("--width", type=int, nargs="*", default=[128])
    parser.add_argument("--variant", nargs="*", choices=VARIANTS, default=["plain", "documents", "all"])
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)
    cases = itertools.starmap(
        Case, itertools.product(options.capability, options.dtype, options.width, options.variant)
    )
    for case, kernel, found in measure(cases, options.processes):
        print(f"sm_{case.capability} {case.dtype} D={case.D} {case.variant}: {kernel} {found}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
