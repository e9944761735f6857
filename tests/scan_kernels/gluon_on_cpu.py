"""The Python of Gluon kernels, run on the CPU: `gl` as functions of torch tensors, one program after the other.

Triton's interpreter runs no Gluon. What is seen here: values, indices, addresses out of bounds, shared memory that is
read before it is written (it begins as NaN). What is not: layouts, races, and whatever the compiler does.
"""

from __future__ import annotations

import importlib.util
import operator
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scan_kernels.kernels.launch import Launch

GLUON = "triton.experimental.gluon"
MODULES = ("hopper_common", "hopper_state", "hopper_query", "hopper_dkv")
FOLDS = (16, 2, 1)  # distances that halve the columns of a tile; layouts choose others


def raw(x: Any) -> Any:
    return x.x if isinstance(x, Value) else x


def tensor(x: Any, dtype: torch.dtype | None = None) -> Tensor:
    x = raw(x)
    return x if isinstance(x, Tensor) else torch.tensor(x, dtype=dtype)


class Value:
    """A tensor or a scalar of a kernel."""

    def __init__(self, x: Any):
        self.x = x if isinstance(x, Tensor) else torch.tensor(x)

    @property
    def type(self) -> Any:
        of_a_slice = types.SimpleNamespace(parent=None)
        return types.SimpleNamespace(layout=types.SimpleNamespace(parent=of_a_slice, columns=self.x.shape[-1]))

    @property
    def shape(self) -> list[int]:
        return list(self.x.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Value:
        return Value(self.x.view(dtype) if bitcast else self.x.to(dtype))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.x[index])

    def __bool__(self) -> bool:
        return bool(self.x)

    def __index__(self) -> int:
        return int(self.x)

    def __neg__(self) -> Value:
        return Value(-self.x)

    def with_other(self, other: Any, function: Callable, swapped: bool) -> Any:
        if isinstance(other, Pointer):
            return other + self
        other = raw(other)
        if isinstance(other, int) and not isinstance(other, bool) and self.x.dtype == torch.int32:
            other = torch.tensor(other, dtype=torch.int32)
        elif isinstance(other, float) and self.x.dtype == torch.bfloat16:
            other = torch.tensor(other, dtype=torch.bfloat16)
        return Value(function(other, self.x) if swapped else function(self.x, other))


def _divide(a: Any, b: Any) -> Tensor:
    return torch.div(torch.as_tensor(a), torch.as_tensor(b), rounding_mode="trunc")


def _remainder(a: Any, b: Any) -> Tensor:
    return torch.as_tensor(a) % torch.as_tensor(b)


def _operator(name: str, function: Callable) -> None:
    setattr(Value, f"__{name}__", lambda self, other: self.with_other(other, function, False))
    setattr(Value, f"__r{name}__", lambda self, other: self.with_other(other, function, True))


for _name in (
    "add",
    "sub",
    "mul",
    "truediv",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
):
    _operator(_name, getattr(operator, f"{_name}_" if _name in ("and", "or") else _name))
_operator("floordiv", _divide)
_operator("mod", _remainder)


class Pointer:
    """Elements of a memory, by their offsets."""

    def __init__(self, memory: Tensor, offset: Any):
        self.memory, self.offset = memory, torch.as_tensor(offset)

    @classmethod
    def to_tensor(cls, x: Tensor) -> Pointer:
        storage = x.untyped_storage()
        flat = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.element_size(),), (1,))
        return cls(flat, x.storage_offset())

    @property
    def dtype(self) -> Any:
        return types.SimpleNamespace(element_ty=self.memory.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.memory, self.offset + torch.as_tensor(raw(other)).long())

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, self.offset[index])

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Pointer:
        assert (self.offset % 2 == 0).all(), "a word begins at an odd column"
        return Pointer(self.memory[: self.memory.numel() // 2 * 2].view(dtype), self.offset // 2)

    def mask(self, mask: Any) -> Tensor:
        given = torch.tensor(True) if mask is None else tensor(mask)
        mask = torch.broadcast_to(given, self.offset.shape)
        inside = (self.offset >= 0) & (self.offset < self.memory.numel())
        assert (inside | ~mask).all(), "outside of a tensor's memory"
        return mask


class Shared:
    """A tile of shared memory."""

    def __init__(self, x: Tensor):
        self.x = x

    def index(self, i: Any) -> Shared:
        return Shared(self.x[int(i)])

    def slice(self, start: Any, length: Any, dim: int = 0) -> Shared:
        return Shared(self.x.narrow(dim, int(start), int(length)))

    def permute(self, order: list[int]) -> Shared:
        return Shared(self.x.permute(order))

    def load(self, layout: Any) -> Value:
        return Value(self.x.clone())

    def store(self, value: Value) -> None:
        assert (value.x.dtype, value.x.shape) == (self.x.dtype, self.x.shape)
        self.x.copy_(value.x)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
        if dtype != self.x.dtype:
            return Shared(self.x.view(dtype).view(shape))
        # Tiles of fewer columns: those of a wide tile lie behind each other.
        parts, width = shape[0] // self.x.shape[0], shape[2]
        split = self.x.unflatten(2, (parts, width)).movedim(2, 1)
        return types.SimpleNamespace(index=lambda i: Shared(split[int(i) // parts, int(i) % parts]))


def _load(p: Pointer, mask: Any = None, other: float = 0.0) -> Value:
    mask = p.mask(mask)
    return Value(torch.where(mask, p.memory[p.offset.where(mask, 0)], torch.tensor(other).to(p.memory.dtype)))


def _store(p: Pointer, value: Any, mask: Any = None) -> None:
    mask = p.mask(mask)
    p.memory[p.offset[mask]] = torch.broadcast_to(tensor(value), p.offset.shape)[mask].to(p.memory.dtype)


def _copy(shared: Shared, p: Pointer, mask: Any = None) -> None:
    shared.x.copy_(_load(p, mask).x)


def _alike(a: Any, b: Any) -> tuple[Tensor, Tensor]:
    a, b = raw(a), raw(b)
    dtype = next(
        (x.dtype for x in (a, b) if isinstance(x, Tensor)), torch.int32 if isinstance(a, int) else torch.float32
    )
    return tensor(a, dtype), tensor(b, dtype)


def _where(condition: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Pointer):
        return a if condition else b
    return Value(torch.where(tensor(condition), *_alike(a, b)))


def _product(a: Any, b: Any, sums: Value, use_acc: Any = True, is_async: bool = False) -> Value:
    assert a.x.dtype == b.x.dtype == torch.bfloat16
    product = a.x.float() @ b.x.float()
    return Value(product + sums.x) if use_acc else Value(product)


def _largest(x: Value, axis: int) -> Value:
    # A NaN loses against any number, as on the GPU.
    return Value((x.x.nan_to_num(-torch.inf, torch.inf, -torch.inf) if x.x.is_floating_point() else x.x).amax(axis))


def _pairwise(dtype: torch.dtype, function: Callable) -> Callable:
    return lambda a, b: function(a.contiguous().view(dtype), b.contiguous().view(dtype)).view(torch.int32)


ASSEMBLY: dict[str, Callable] = {
    "max.bf16x2": _pairwise(torch.bfloat16, torch.maximum),
    "min.bf16x2": _pairwise(torch.bfloat16, torch.minimum),
    "max.u16x2": _pairwise(torch.int16, torch.maximum),  # of numbers without a sign bit
    "cvt.rn.bf16x2.f32": lambda a, b: torch.stack((a, b), -1).bfloat16().view(torch.int32)[..., 0],
    "xor.b32": lambda a: a ^ -0x7FFF8000,
    "rcp.approx.ftz.f32": torch.reciprocal,
    "lg2.approx.ftz.f32": torch.log2,
    "and.b32": torch.bitwise_and,
    "bfind.u32": lambda a: torch.tensor((int(a) & 0xFFFFFFFF).bit_length() - 1, dtype=torch.int32),
    "popc.b32": lambda a: torch.tensor((int(a) & 0xFFFFFFFF).bit_count(), dtype=torch.int32),
    "shfl.sync.idx.b32": torch.clone,  # of a number that all threads have
    "bar.warp.sync": torch.clone,
    "mov.b32": torch.clone,
    "mov.b64": torch.clone,
}


def _assembly(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Value:
    return Value(ASSEMBLY[text.split()[0]](*(tensor(x) for x in args)))


class _Constant(int):
    @property
    def value(self) -> int:
        return int(self)


class _Layout:
    """Nothing of it matters here but what `tile_layout` is asked for."""

    def __init__(self, *args: Any, **options: Any):
        self.reg_bases, self.lane_bases, self.warp_bases = [], [], []
        self.shape = args[4] if len(args) > 4 else (0, 0)


def _integers(shape: Any) -> list[int]:
    return [int(size) for size in shape]


class Machine:
    """The modules of the Hopper kernels, with a `gl` of this file."""

    def __init__(self) -> None:
        self.program, self.grid = [0, 0, 0], [1, 1, 1]
        layouts = "SliceLayout BlockedLayout DistributedLinearLayout NVMMADistributedLayout DotOperandLayout"
        language = types.SimpleNamespace(
            **dict.fromkeys(f"{layouts} NVMMASharedLayout SwizzledSharedLayout".split(), _Layout),
            **{name: getattr(torch, name) for name in ("float32", "bfloat16", "int64", "int32", "int16")},
            constexpr=lambda x: _Constant(x) if type(x) is int else x,
            pointer_type=lambda dtype: dtype,
            program_id=lambda axis: Value(torch.tensor(self.program[axis], dtype=torch.int32)),
            num_programs=lambda axis: Value(torch.tensor(self.grid[axis], dtype=torch.int32)),
            arange=lambda start, end, layout=None: Value(torch.arange(int(start), int(end), dtype=torch.int32)),
            zeros=lambda shape, dtype, layout=None: Value(torch.zeros(_integers(shape), dtype=dtype)),
            zeros_like=lambda x: Value(torch.zeros_like(x.x)),
            to_tensor=lambda x: x if isinstance(x, Value) else Value(torch.tensor(int(x), dtype=torch.int32)),
            allocate_shared_memory=lambda dtype, shape, layout: Shared(
                torch.full(_integers(shape), torch.nan).to(dtype)
            ),
            convert_layout=lambda x, layout: x,
            reshape=lambda x, shape: Value(x.x.reshape(_integers(shape))),
            permute=lambda x, order: Value(x.x.permute(order)),
            split=lambda x: (Value(x.x[..., 0]), Value(x.x[..., 1])),
            join=lambda a, b: Value(torch.stack((a.x, b.x), -1)),
            expand_dims=lambda x, axis: Value(x.x.unsqueeze(axis)),
            broadcast=lambda *several: tuple(map(Value, torch.broadcast_tensors(*(x.x for x in several)))),
            where=_where,
            fma=lambda a, b, c: a * b + c,
            maximum=lambda a, b: Value(torch.fmax(*_alike(a, b))),
            minimum=lambda a, b: Value(torch.fmin(*_alike(a, b))),
            max=_largest,
            min=lambda x, axis: Value(x.x.amin(axis)),
            sum=lambda x, axis: Value(x.x.sum(axis, dtype=x.x.dtype)),
            reduce=lambda several, axis, combine: tuple(Value(x.x.sum(axis)) for x in several),
            exp2=lambda x: Value(x.x.exp2()),
            load=_load,
            store=_store,
            inline_asm_elementwise=_assembly,
            static_range=lambda *bounds: range(*_integers(bounds)),
            barrier=lambda: None,
        )
        copies = types.SimpleNamespace(
            async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda pending: None
        )
        fakes = {
            GLUON: types.SimpleNamespace(jit=lambda f: f, constexpr_function=lambda f: f, language=language),
            f"{GLUON}.language": language,
            f"{GLUON}.language.nvidia.ampere": types.SimpleNamespace(async_copy=copies),
            f"{GLUON}.language.nvidia.hopper": types.SimpleNamespace(
                fence_async_shared=lambda: None,
                warpgroup_mma=_product,
                warpgroup_mma_init=lambda sums: sums,
                warpgroup_mma_wait=lambda pending, deps: deps[0] if len(deps) == 1 else tuple(deps),
            ),
        }
        self.kernels: dict[str, Callable] = {}
        names = [f"scan_kernels.kernels.{name}" for name in MODULES]
        # `from triton.experimental import gluon` reads the package's attribute before sys.modules.
        importlib.import_module(GLUON)
        package = sys.modules["triton.experimental"]
        before = {name: sys.modules.get(name) for name in (*fakes, *names)}
        real = package.gluon
        try:
            sys.modules.update(fakes)  # type: ignore[arg-type]
            package.gluon = fakes[GLUON]  # type: ignore[attr-defined]
            for name in names:
                spec = importlib.util.find_spec(name) if before[name] is None else before[name].__spec__  # type: ignore[union-attr]
                assert spec is not None
                assert spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                sys.modules[name] = module
                spec.loader.exec_module(module)
                if hasattr(module, "columns_of_a_thread"):
                    module.columns_of_a_thread = lambda layout: [fold for fold in FOLDS if fold < layout.columns]
                self.kernels |= {key: x for key, x in vars(module).items() if key.endswith("_kernel")}
        finally:
            package.gluon = real  # type: ignore[attr-defined]
            for name, module_before in before.items():
                if module_before is None:
                    sys.modules.pop(name, None)
                else:
                    sys.modules[name] = module_before

    def run(self, launch: Launch) -> None:
        name = launch.kernel.fn.__name__
        if name == "state_scan_kernel":
            scan(**launch.args)
            return
        args = {key: Pointer.to_tensor(x) if isinstance(x, Tensor) else x for key, x in launch.args.items()}
        self.grid[:] = (*launch.grid, 1, 1)[:3]
        for y in range(self.grid[1]):
            for x in range(self.grid[0]):
                self.program[:] = x, y, 0
                self.kernels[name](**args)


def scan(
    totals: Tensor, total_factors: Tensor | None, init: Tensor | None, carry: Tensor, carry_sums: Tensor,
    final: Tensor | None, segments: int, REVERSED: bool, **_: Any,
) -> None:  # fmt: skip
    """`state_scan.py` in torch."""
    state = torch.zeros_like(totals[:, 0]) if init is None else init.clone()
    for i in range(segments + 1):
        border = segments - i if REVERSED else i
        carry[:, border], carry_sums[:, border] = state[:, :-1].to(carry.dtype), state[:, -1]
        if i < segments:
            segment = segments - 1 - i if REVERSED else i
            share = 1.0 if total_factors is None else total_factors[:, segment, None, None]
            state = share * state + totals[:, segment]
    if final is not None:
        final.copy_(state)
