"""The launches of one call, recorded, and repeated for other tensors of the same layout.

A forward is four small kernels, and building their arguments takes the host longer than they take the GPU. Shapes,
strides and options repeat from step to step, so the arguments are built once and only the tensors change.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scan_kernels.kernels.launch import Launch


@dataclass(frozen=True)
class _Step:
    makes: list[tuple[int, tuple[int, ...], torch.dtype]]  # slots: the inputs, and behind them what the call makes
    launch: Callable[..., Any]  # a compiled kernel with its grid
    arguments: list[Any]
    tensors: list[tuple[int, int]]  # place in `arguments`, slot
    drops: list[int]  # slots that no later step reads


class Tape:
    """Record with `record`, then `repeat`. Every tensor that a launch writes must be new and contiguous, and no two
    inputs the same object.
    """

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self._inputs = list(inputs)
        self._launched: list[tuple[Launch, Any]] = []

    def record(self, launch: Launch) -> None:
        self._launched.append((launch, launch.run()))

    def finish(self, outputs: Sequence[Tensor]) -> "Tape":
        """After the last launch; `outputs` are what `repeat` returns."""
        slots = {id(x): number for number, x in enumerate(self._inputs) if x is not None}
        self._device = next(x.device for x in self._inputs if x is not None)
        made: list[Tensor] = []
        steps: list[_Step] = []
        last_read: dict[int, int] = {}
        for launch, compiled in self._launched:
            makes: list[tuple[int, tuple[int, ...], torch.dtype]] = []
            arguments: list[Any] = []
            tensors: list[tuple[int, int]] = []
            for parameter in launch.kernel.params:
                x = launch.args[parameter.name]
                if isinstance(x, Tensor):
                    if id(x) not in slots:
                        assert x.is_contiguous()
                        slots[id(x)] = len(self._inputs) + len(made)
                        made.append(x)
                        makes.append((slots[id(x)], tuple(x.shape), x.dtype))
                    tensors.append((len(arguments), slots[id(x)]))
                    last_read[slots[id(x)]] = len(steps)
                arguments.append(x)
            grid = (*launch.grid, 1, 1)[:3]
            for place, _ in tensors:
                arguments[place] = None  # keeps no tensor alive
            steps.append(_Step(makes, compiled[grid], arguments, tensors, []))
        self._outputs = [slots[id(x)] for x in outputs]
        for number, step in last_read.items():
            if number >= len(self._inputs) and number not in self._outputs:
                steps[step].drops.append(number)
        self._steps, self._count = steps, len(self._inputs) + len(made)
        self._inputs, self._launched = [None] * len(self._inputs), []  # keep no tensor alive
        return self

    def repeat(self, inputs: Sequence[Tensor | None]) -> list[Tensor]:
        """The outputs for `inputs`, which have the layouts of the recorded ones."""
        slots: list[Any] = [*inputs, *(None for _ in range(self._count - len(inputs)))]
        for step in self._steps:
            for number, shape, dtype in step.makes:
                slots[number] = torch.empty(shape, dtype=dtype, device=self._device)
            arguments = step.arguments.copy()
            for place, number in step.tensors:
                arguments[place] = slots[number]
            step.launch(*arguments)
            for number in step.drops:
                slots[number] = None
        return [slots[number] for number in self._outputs]


class Tapes:
    """The last `size` tapes by layout."""

    def __init__(self, size: int = 128) -> None:
        self._size = size
        self._tapes: OrderedDict[Hashable, Tape] = OrderedDict()

    def call(
        self,
        inputs: Sequence[Tensor | None],
        options: Hashable,
        build: Callable[[Sequence[Tensor | None], Callable[[Launch], None]], Sequence[Tensor]],
    ) -> Sequence[Tensor]:
        """What `build(inputs, run)` returns, launched through `run`; repeated from the tape where there is one."""
        key = (options, *map(_layout, inputs))
        tape = self._tapes.get(key)
        if tape is not None:
            self._tapes.move_to_end(key)
            return tape.repeat(inputs)
        # A tape tells tensors apart by identity, and two of the next call may be one of this.
        inputs = [None if x is None else x.detach() for x in inputs]
        tape = Tape(inputs)
        outputs = build(inputs, tape.record)
        self._tapes[key] = tape.finish(outputs)
        if len(self._tapes) > self._size:
            self._tapes.popitem(last=False)
        return outputs


def _layout(x: Tensor | None) -> Hashable:
    # Kernels are compiled for pointers that 16 bytes divide, or for others.
    return None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)
