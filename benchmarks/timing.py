"""Interleaved timing: GPU time between events with the launches queued ahead, host time beside it, memory."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.contenders import Prepared

MB = 1e6
FLUSH_BYTES = 256 * 2**20
LONGEST_SPIN_MS = 60.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One call. gaps: the GPU may have waited for the host inside it, so `gpu_ms` may hold more than kernels."""

    gpu_ms: float
    host_ms: float
    gaps: bool = False


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median and 20th and 80th percentile of the GPU time, median of the host time, in ms."""

    ms: float
    p20: float
    p80: float
    host_ms: float
    gaps: bool


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes above what was allocated before: the peak of a forward and backward, outputs and gradients included, and
    what stays between the two beside the output."""

    peak: int
    kept: int


class Meter(Protocol):
    """What `run` needs of a device; tests bring one of their own."""

    def time(self, name: str, call: Callable[[], Any]) -> Sample: ...
    def memory(self, prepared: Prepared, inputs: Sequence[Tensor], do: Tensor) -> Memory: ...


def summarize(samples: Sequence[Sample]) -> Timing:
    """At least two samples; percentiles are interpolated."""
    gpu = [sample.gpu_ms for sample in samples]
    fifths = statistics.quantiles(gpu, n=5, method="inclusive")
    return Timing(
        ms=statistics.median(gpu),
        p20=fifths[0],
        p80=fifths[3],
        host_ms=statistics.median(sample.host_ms for sample in samples),
        gaps=2 * sum(sample.gaps for sample in samples) > len(samples),
    )


@dataclass
class Interleaved:
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


def interleave(calls: Mapping[str, Callable[[], Any]], meter: Meter, *, rounds: int, rng: random.Random) -> Interleaved:
    """Each round times every call once, in an order of its own: a slow minute of the machine meets all alike.

    A call that raises is dropped from later rounds, with its error.
    """
    done = Interleaved({name: [] for name in calls})
    for _ in range(rounds):
        order = [name for name in calls if name not in done.failures]
        rng.shuffle(order)
        for name in order:
            try:
                done.samples[name].append(meter.time(name, calls[name]))
            except Exception as error:
                done.failures[name] = first_line(error)
    return done


def first_line(error: BaseException) -> str:
    """An error as a cell of a table."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "out of memory"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__


def forward_backward(prepared: Prepared, inputs: Sequence[Tensor], do: Tensor) -> Callable[[], Any]:
    """Output and all gradients for a fixed `do`, into new memory each time: nothing is accumulated."""
    wanted = (*inputs, *prepared.parameters.values())

    def call() -> Any:
        return torch.autograd.grad(prepared.forward(*inputs), wanted, do)

    return call


class CudaMeter:
    """Times on the current CUDA device.

    Before each call the L2 cache is overwritten and the GPU is kept spinning, while the host queues the start event,
    the call's kernels and the end event. The events then bracket kernels alone. If the GPU had reached the start
    event before the host was done, the spin is doubled and the call timed again, up to LONGEST_SPIN_MS.
    """

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._spin_ms: dict[str, float] = {}
        self._cycles_per_ms = self._measure_cycles()

    def _measure_cycles(self) -> float:
        cycles = 20_000_000
        for _ in range(2):
            begin, end = _events()
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            torch.cuda.synchronize()
        return cycles / begin.elapsed_time(end)

    def _once(self, call: Callable[[], Any], spin_ms: float) -> Sample:
        begin, end = _events()
        torch.cuda.synchronize()
        self._flush.zero_()
        torch.cuda._sleep(int(spin_ms * self._cycles_per_ms))
        begin.record()
        started = time.perf_counter()
        kept_alive = call()
        host_ms = 1e3 * (time.perf_counter() - started)
        gaps = begin.query()
        end.record()
        torch.cuda.synchronize()
        # Freed after the clock: returning memory is no part of a call.
        del kept_alive
        return Sample(gpu_ms=begin.elapsed_time(end), host_ms=host_ms, gaps=gaps)

    def time(self, name: str, call: Callable[[], Any]) -> Sample:
        spin_ms = self._spin_ms.get(name, 1.0)
        while True:
            sample = self._once(call, spin_ms)
            if not sample.gaps or spin_ms >= LONGEST_SPIN_MS:
                break
            spin_ms = min(LONGEST_SPIN_MS, 2 * spin_ms)
        self._spin_ms[name] = spin_ms
        return sample

    def memory(self, prepared: Prepared, inputs: Sequence[Tensor], do: Tensor) -> Memory:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        o = prepared.forward(*inputs)
        kept = torch.cuda.memory_allocated() - before - o.untyped_storage().nbytes()
        grads = torch.autograd.grad(o, (*inputs, *prepared.parameters.values()), do)
        peak = torch.cuda.max_memory_allocated() - before
        del o, grads
        return Memory(peak=peak, kept=kept)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
