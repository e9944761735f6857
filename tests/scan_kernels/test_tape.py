"""Tapes with kernels that run in Python: what is launched again, on which tensors, and what stays alive."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

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
    """out = 2 x + x, by two kernels and a tensor between them."""

    def __init__(self) -> None:
        self.first, self.second = Kernel(doubled, "x", "out", "factor"), Kernel(added, "x", "y", "out")
        self.tapes, self.built, self.between = Tapes(size=2), 0, []

    def __call__(self, x: Tensor, option: int = 0) -> Tensor:
        def build(run):
            self.built += 1
            between, out = torch.empty_like(x), torch.empty_like(x)
            self.between.append(weakref.ref(between))
            run(Launch(self.first, (1,), {"x": x, "out": between, "factor": 2}))
            run(Launch(self.second, (1,), {"x": x, "y": between, "out": out}))
            return (out,)

        return self.tapes.call((x, None), option, build)[0]


def test_a_layout_is_built_once_and_repeated_on_other_tensors():
    problem = Problem()
    for _ in range(3):
        x = torch.randn(5)
        torch.testing.assert_close(problem(x), 3 * x)
    assert problem.built == 1
    assert (problem.first.jitted, problem.first.compiled) == (1, 2)


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
