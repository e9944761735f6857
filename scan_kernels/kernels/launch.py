"""A kernel with its grid, arguments and options, ready to run, or to be compiled for a GPU that is not there."""

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """The shape of a problem and how it is cut. Letters: scan_kernels/README.md; M keys, lag: state.py."""

    B: int
    T: int
    M: int
    H: int
    G: int
    D: int
    DV: int
    lag: int
    feature_map: int  # kernels/common.py
    halves: int
    chunk: int
    segment: int  # chunks
    empty: int = 0  # chunks in front whose queries have no key to read: they are in no segment
    reordered: bool = False  # states in the order of hopper_common.column_of

    @property
    def N(self) -> int:
        return -(-self.T // self.chunk)

    @property
    def segments(self) -> int:
        return -(-(self.N - self.empty) // self.segment)

    def even(self, most: int) -> int:
        """The chunks of a segment, at most `most`: no more segments than that takes, and none much shorter."""
        chunks = self.N - self.empty
        return -(-chunks // -(-chunks // most))

    @property
    def F(self) -> int:
        return self.halves * self.D

    @property
    def R(self) -> int:
        return self.H // self.G


@dataclass(frozen=True)
class Tensors:
    """A problem's inputs as the kernels read them. None: the problem has none."""

    q: Tensor
    k: Tensor
    v: Tensor
    cum_hi: Tensor | None = None  # (B, G, N, C): cumulative log decay inside the chunk, rows shifted by lag ...
    cum_lo: Tensor | None = None  # ... and what fp32 leaves of it
    query_doc: Tensor | None = None
    key_doc: Tensor | None = None
    carried_doc: Tensor | None = None
    start: Tensor | None = None  # (B, X, F, DV), in the dtype of the states, less its mean for softmax features
    start_sum: Tensor | None = None  # (B, X, DV) fp32: what that mean adds to every query
    start_log: Tensor | None = None  # (B, G, T) fp32, or None for no decay


@dataclass(frozen=True)
class States:
    """The states of stages 1 and 2 as the later stages read them (forward: before a chunk; backward: behind it)."""

    chunks: Tensor  # (B * G, N, F, DV): gathered in the segment
    sums: Tensor  # (B * G, N, DV) fp32: the values alone
    factors: Tensor | None  # (B * G, N) fp32: share of the carry that the chunk still sees
    carry: Tensor | None  # (B * G, segments + 1, F, DV): at the segments' borders; None: all zero
    carry_sums: Tensor | None  # (B * G, segments + 1, DV) fp32


@dataclass(frozen=True)
class Config:
    """How one stage is launched (kernels/configs.py). Blocks are at most the width that they cut."""

    num_warps: int
    num_stages: int = 1
    block_f: int = 128  # features of a program, where the stage cuts them
    block_v: int = 128  # value columns of a program, where the stage cuts them
    heads: int = 1  # query heads side by side in one tile
    registers: int | None = None  # most that a thread may take; None: the compiler's choice

    @property
    def options(self) -> dict[str, int]:
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **limit}


def precision(compute: torch.dtype) -> str:
    """Products of fp32 are exact to fp32; others are exact anyway."""
    return "ieee" if compute == torch.float32 else "tf32"


def strides(x: Tensor | None, names: str) -> dict[str, int]:
    """{name: stride} for space-separated names; without a tensor zeros."""
    return dict(zip(names.split(), (0,) * 9 if x is None else x.stride(), strict=x is not None))


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)  # num_warps, num_stages

    def run(self) -> Any:
        """Launch it; the compiled kernel."""
        return self.kernel[self.grid](**self.args, **self.options)

    def run_compiled(self, capability: int, cache: dict) -> Any:
        """Run what `compile` makes, so that kernels compiled by other processes are found; returns the kernel."""
        source, options = self.source(), tuple(self.options.items())
        key = (self.kernel.fn.__name__, source.hash(), options)
        if key not in cache:
            cache[key] = self.compile(capability)
        cache[key][(*self.grid, 1, 1)[:3]](*(self.args[parameter.name] for parameter in self.kernel.params))
        return cache[key]

    def compile(self, capability: int) -> Any:
        """The compiled kernel for a CUDA capability (80, 90, 100): nothing is launched, tensors may be meta."""
        from triton.backends.compiler import GPUTarget

        return triton.compile(self.source(), target=GPUTarget("cuda", capability, 32), options=self.options)

    def source(self) -> Any:
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, x = parameter.name, self.args[parameter.name]
            if parameter.is_constexpr or x is None or (isinstance(x, int) and x == 1):
                signature[name], constants[name] = "constexpr", x
                continue
            if isinstance(x, Tensor):
                signature[name] = "*" + _TYPES[x.dtype]
            else:
                signature[name] = "fp32" if isinstance(x, float) else "i32" if abs(x) < 2**31 else "i64"
            if isinstance(x, Tensor) or (isinstance(x, int) and x % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = GluonASTSource if self.kernel.is_gluon() else ASTSource
        return source(self.kernel, signature, constants, attributes)
