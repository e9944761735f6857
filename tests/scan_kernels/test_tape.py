"""Tapes with kernels that run in Python: what is launched again, on which tensors, and what stays alive."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from scan_kernels import fused
from scan_kernels.fused_ops import Inputs, OtherGrads
from scan_kernels.kernels.launch import Launch
from scan_kernels.kernels.tape import Tapes


class Kernel:
    """A jitted kernel as a Launch sees one; `calls` counts launches through it, and through what it compiles to."""

    def __init__(self, fn, *names: str) -> None:
        self.fn, self.params = fn, [SimpleNamespace(name=name, is_constexpr=False) for name in names]
        self.jitted = self.compiled = 0

    def __getitem__(self, grid):
        def launch(**args):
            self.jitted += 1
            self.fn(*(args[parameter.name] for parameter in self.params))
            return Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        assert len(grid) == 3

        def launch(*args):
            self.kernel.compiled += 1
            self.kernel.fn(*args)

        return launch


def doubled(x: Tensor, out: Tensor, factor: int) -> None:
    out.copy_(factor * x)


def added(x: Tensor, y: Tensor, out: Tensor) -> None:
    out.copy_(x + y)


class Problem:
    """out = 2 x + y, by two kernels and a tensor between them; y is x where none is given."""

    def __init__(self) -> None:
        self.first, self.second = Kernel(doubled, "x", "out", "factor"), Kernel(added, "x", "y", "out")
        self.tapes, self.built, self.between = Tapes(size=2), 0, []

    def __call__(self, x: Tensor, y: Tensor | None = None, option: int = 0) -> Tensor:
        def build(inputs, run):
            self.built += 1
            x, _, y = inputs
            between, out = torch.empty_like(x), torch.empty_like(x)
            self.between.append(weakref.ref(between))
            run(Launch(self.first, (1,), {"x": x, "out": between, "factor": 2}))
            run(Launch(self.second, (1,), {"x": y, "y": between, "out": out}))
            return (out,)

        return self.tapes.call((x, None, x if y is None else y), option, build)[0]


def test_a_layout_is_built_once_and_repeated_on_other_tensors():
    problem = Problem()
    for _ in range(3):
        x = torch.randn(5)
        torch.testing.assert_close(problem(x), 3 * x)
    assert problem.built == 1
    assert (problem.first.jitted, problem.first.compiled) == (1, 2)


def test_inputs_that_were_one_tensor_may_be_two():
    problem = Problem()
    x, y = torch.randn(5), torch.randn(5)
    problem(x)
    torch.testing.assert_close(problem(x, y), 2 * x + y)
    assert problem.built == 1


def test_outputs_are_new_tensors():
    problem = Problem()
    x = torch.randn(5)
    one, two, three = problem(x), problem(x), problem(2 * x)
    assert len({one.data_ptr(), two.data_ptr(), three.data_ptr()}) == 3
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    "other",
    [torch.randn(6), torch.randn(5).double(), torch.randn(10)[::2], torch.randn(9)[1:6]],
    ids=["shape", "dtype", "stride", "alignment"],
)
def test_another_layout_is_built_anew(other):
    problem = Problem()
    problem(torch.randn(5))
    torch.testing.assert_close(problem(other), 3 * other)
    assert problem.built == 2


def test_another_option_is_built_anew():
    problem = Problem()
    problem(torch.randn(5))
    problem(torch.randn(5), option=1)
    assert problem.built == 2


def test_the_last_layouts_are_kept():
    problem = Problem()
    for size in (1, 2, 3, 2, 3):
        problem(torch.randn(size))
    assert problem.built == 3
    problem(torch.randn(1))
    assert problem.built == 4


def test_nothing_stays_alive():
    problem = Problem()
    x = torch.randn(5)
    alive = [weakref.ref(problem(x)), weakref.ref(x)]
    del x
    assert [ref() for ref in (*alive, *problem.between)] == [None, None, None]


# What the op launches on Hopper, with tensors that hold nothing.


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(documents: bool) -> Inputs:
    B, T, H, G, D = 2, 2100, 4, 2, 128
    ids = [empty(B, T, dtype=torch.int32), empty(B, T, dtype=torch.int32), empty(B, dtype=torch.int32)]
    return Inputs(empty(B, T, H, D), empty(B, T, G, D), empty(B, T, G, D), None, *(ids if documents else []))


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
@pytest.mark.parametrize(("save_every", "joined"), [(0, "qkv"), (1, ""), (4, "v")])
def test_a_repeated_step_launches_what_the_first_one_did(monkeypatch, documents, save_every, joined):
    launched: list[tuple[str, list]] = []

    def run(launch: Launch):
        name = launch.kernel.fn.__name__
        launched.append((name, [launch.args[each.name] for each in launch.kernel.params]))
        return Repeated(name)

    class Repeated:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid):
            return lambda *args: launched.append((self.name, list(args)))

    monkeypatch.setattr(Launch, "run", run)
    monkeypatch.setattr(fused, "_taped", lambda *tensors: True)
    monkeypatch.setattr(fused, "_forward_tapes", Tapes())
    monkeypatch.setattr(fused, "_backward_tapes", Tapes())

    def step() -> list:
        """Kernels with their arguments, tensors as (name, shape, dtype)."""
        launched.clear()
        inputs = problem(documents)
        o, _, kept, kept_sums = fused.solve(inputs, 513, "softmax", False, save_every)
        do, states = empty(*o.shape), (kept, kept_sums) if save_every else (None, None)
        shared = {
            f"d{name}": empty(*x.shape) if name in joined else None for name, x in zip("qkv", inputs, strict=False)
        }
        others = OtherGrads(**shared)
        dq, dk, dv, *_ = fused.solve_bwd(do, None, inputs, *states, 513, "softmax", save_every, others)
        assert [x.shape for x in (o, dq, dk, dv)] == [inputs[i].shape for i in (0, 0, 1, 2)]
        known = inputs._asdict() | {
            "do": do,
            "o": o,
            "dq": dq,
            "dk": dk,
            "dv": dv,
            "kept": kept,
            "kept_sums": kept_sums,
        }
        known |= {f"{name}_other": x for name, x in shared.items()}
        names = {id(x): name for name, x in known.items() if x is not None}
        return [
            (kernel, [(names.get(id(x)), x.shape, x.dtype) if isinstance(x, Tensor) else x for x in arguments])
            for kernel, arguments in launched
        ]

    def shapes(calls: list) -> list:
        return [(kernel, [x[1:] if isinstance(x, tuple) else x for x in args]) for kernel, args in calls]

    first, second, third = (step() for _ in range(3))
    assert shapes(second) == shapes(first)
    assert third == second
    read = {(kernel, x[0]) for kernel, args in second for x in args if isinstance(x, tuple) and x[0]}
    expected = {("hopper_state_kernel", name) for name in ("k", "v", "q", "do")}
    expected |= {("hopper_output_kernel", name) for name in ("q", "k", "v", "o")}
    expected |= {("hopper_dq_kernel", name) for name in ("q", "k", "v", "do", "dq")}
    expected |= {("hopper_dkv_kernel", name) for name in ("q", "k", "v", "do", "dk", "dv")}
    expected |= {("empty_rows_kernel", name) for name in ("o", "dq")}
    kernel_of = {"q": "hopper_dq_kernel", "k": "hopper_dkv_kernel", "v": "hopper_dkv_kernel"}
    expected |= {(kernel_of[name], f"d{name}_other") for name in joined}
    expected |= {("empty_rows_kernel", "dq_other")} if "q" in joined else set()
    if documents:
        kernels = ("hopper_output_kernel", "hopper_dq_kernel", "hopper_dkv_kernel")
        expected |= {(kernel, "carried_doc") for kernel in kernels}
        kernels += ("hopper_state_kernel",)
        expected |= {(kernel, name) for kernel in kernels for name in ("query_doc", "key_doc")}
    if save_every == 4:
        expected |= {("border_states_kernel", "kept"), ("border_states_kernel", "kept_sums")}
        expected |= {("hopper_state_kernel", "kept"), ("hopper_state_kernel", "kept_sums")}
    if save_every == 1:
        kept = {("hopper_state_kernel", "kept"), ("hopper_output_kernel", "kept"), ("hopper_dq_kernel", "kept")}
        expected |= kept | {("hopper_state_kernel", "kept_sums"), ("hopper_output_kernel", "kept_sums")}
    assert read == expected
