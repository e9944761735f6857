"""Nothing is timed before its numbers are right: each contender against float64 on a length that no tile divides."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Prepared, Shape

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
# Odd, and far enough behind a window that the linear branch has read hundreds of keys.
GATE_TOKENS, BEHIND_WINDOW = 1000, 489
# Rows just behind the window: the linear branch reads so few keys there that a wrong shift cannot hide in a sum.
EDGE_ROWS = 16

InputsOf = Callable[[Shape, torch.device, int], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """errors: relative norms by tensor (o, its rows behind the window, gradients), inf for a NaN."""

    errors: dict[str, float]
    tolerance: float
    missing_op: str = ""

    @property
    def worst(self) -> str:
        return max(self.errors, key=lambda name: self.errors[name])

    @property
    def error(self) -> float:
        return self.errors[self.worst]

    @property
    def passed(self) -> bool:
        return self.error < self.tolerance and not self.missing_op

    def describe(self) -> str:
        if self.missing_op:
            return f"{self.missing_op} was asked for and did not run"
        if self.passed:
            return ""
        return f"WRONG: {self.worst} is off by {self.error:.1e}, allowed {self.tolerance:.0e}"


def gate_shape(shape: Shape, window: int | None) -> Shape:
    """`shape` with the tokens of the gate: 1000, or what a larger window needs; at most two sequences, one block."""
    T = max(GATE_TOKENS, 0 if window is None else window + BEHIND_WINDOW)
    return replace(shape, T=T, B=2 if T <= 2 * GATE_TOKENS else 1, layers=min(shape.layers, 1))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected|| in float64; the plain norm where `expected` is zero, inf for a NaN."""
    difference, scale = (actual.double() - expected).norm().item(), expected.norm().item()
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else difference


def results(
    fn: Callable[..., Tensor], arguments: Sequence[Tensor], wanted: Sequence[Tensor], do: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output, and the gradients of `wanted`."""
    o = fn(*arguments)
    return o.detach(), torch.autograd.grad(o, wanted, do)


def verify(contender: Contender, shape: Shape, inputs_of: InputsOf, device: torch.device, seed: int) -> Verdict:
    """Run the contender once at the gate's shape and compare all it returns with its float64 reference."""
    shape = gate_shape(shape, contender.window)
    prepared = contender.prepare(shape, device)
    tensors = inputs_of(shape, device, seed)
    do = tensors.pop("do")
    inputs = tuple(tensors.values())
    wanted = (*inputs, *prepared.parameters.values())
    o, grads = results(prepared.forward, inputs, wanted, do)
    doubles = [x.detach().double().requires_grad_() for x in wanted]
    expected_o, expected_grads = results(prepared.reference, doubles, doubles, do.double())
    errors = {"o": relative_error(o, expected_o)}
    if contender.window is not None:
        edge = slice(contender.window + 1, contender.window + 1 + EDGE_ROWS)
        errors["o behind the window"] = relative_error(o[:, edge], expected_o[:, edge])
    for name, grad, expected in zip((*tensors, *prepared.parameters), grads, expected_grads, strict=True):
        errors[f"d{name}"] = relative_error(grad, expected)
    return Verdict(
        errors=errors,
        tolerance=contender.slack * TOLERANCE[shape.dtype],
        missing_op=contender.op if contender.op and not _runs(contender.op, prepared, inputs) else "",
    )


def _runs(op: str, prepared: Prepared, inputs: Sequence[Tensor]) -> bool:
    # What the dispatcher saw, so that it also looks into compiled programs.
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        prepared.forward(*inputs)
    return any(event.key == op for event in profile.key_averages())
