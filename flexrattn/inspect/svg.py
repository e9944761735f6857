"""Pictures of a report as inline SVG: the roofline, and masks by their blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from flexrattn.inspect.report import GROUPS, Kernel
from flexrattn.inspect.text import ms, percent, si

# The palette of docs/pictures.py.
CELLS = {"0": "#eef1f4", "1": "#9cc4ea", "2": "#1f6fb4"}
COLORS = dict(zip(GROUPS, ("#d1495b", "#1f6fb4", "#8e5ea2", "#6c757d", "#2a9d8f"), strict=True))


def mask_picture(mask: dict[str, Any], size: int = 260) -> str:
    """Queries down, keys across; runs of equal blocks are one rectangle."""
    rows = mask["blocks"]
    cell = size / max(len(rows), len(rows[0]))
    parts = []
    for y, row in enumerate(rows):
        start = 0
        for x in range(1, len(row) + 1):
            if x == len(row) or row[x] != row[start]:
                parts.append(_rect(start * cell, y * cell, (x - start) * cell, cell, CELLS[row[start]]))
                start = x
    width, height = cell * len(rows[0]), cell * len(rows)
    label = f"{mask['name']}: {mask['full']} full, {mask['partial']} partial, {mask['skipped']} skipped blocks"
    across, down = f"{width + 20:.0f}", f"{height + 20:.0f}"
    return (
        f'<svg class="mask" role="img" aria-label="{escape(label)}" viewBox="-18 -18 {across} {down}" '
        f'width="{across}" height="{down}"><text x="0" y="-6">key</text>'
        f'<text x="-6" y="{height:.0f}" transform="rotate(-90 -6 {height:.0f})">query</text>'
        f"{''.join(parts)}</svg>"
    )


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height + 0.3:.2f}" fill="{fill}"/>'


class _Log:
    """A logarithmic axis from `low` to `high`, on pixels."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low, self.high = low, high
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times powers of ten."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        return [value for value in every if self.low <= value <= self.high]


def roofline(report: dict[str, Any], width: int = 760, height: int = 420) -> str:
    """FLOP/s over FLOP/byte. Hollow: where a kernel's roof is; filled: what was measured, with a line to its roof."""
    gpu = report["gpu"]
    points = [
        (layer, kernel)
        for layer in report["layers"]
        for kernel in layer["kernels"]
        if kernel.flops and kernel.bytes and kernel.roofline_s
    ]
    if not points:
        return ""
    intensity = [kernel.flops / kernel.bytes for _, kernel in points]
    speeds = [kernel.flops / kernel.roofline_s for _, kernel in points]
    speeds += [kernel.flops / kernel.measured_s for _, kernel in points if kernel.measured_s]
    ridge = gpu["bf16"] / gpu["bandwidth"]
    left, right, top, bottom = 62, width - 12, 14, height - 44
    x_of = _Log(min(*intensity, ridge) / 1.5, max(*intensity, ridge) * 1.5, left, right)
    y_of = _Log(min(*speeds, gpu["bf16"] / 20) / 1.5, gpu["bf16"] * 1.4, bottom, top)
    parts = [_grid(x_of, y_of, left, right, top, bottom)]
    start = max(x_of.low, y_of.low / gpu["bandwidth"])
    roof = [(start, start * gpu["bandwidth"]), (ridge, gpu["bf16"]), (x_of.high, gpu["bf16"])]
    parts.append(f'<polyline class="roof" points="{" ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in roof)}"/>')
    parts.append(
        f'<text class="small" x="{right - 4}" y="{y_of(gpu["bf16"]) - 5:.1f}" text-anchor="end">'
        f"{gpu['bf16'] / 1e12:.0f} TFLOP/s</text>"
    )
    slope_x = start * 1.15
    parts.append(
        f'<text class="small" x="{x_of(slope_x) + 6:.1f}" y="{y_of(slope_x * gpu["bandwidth"]) + 12:.1f}">'
        f"{gpu['bandwidth'] / 1e12:.2f} TB/s</text>"
    )
    for layer, kernel in points:
        parts.append(_point(report, layer, kernel, x_of, y_of))
    label = f"roofline of {gpu['name']}, {len(points)} kernels"
    return (
        f'<svg id="roofline-plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {width} {height}" '
        f'style="max-width:{width}px;width:100%">{"".join(parts)}</svg>{_legend(report, [p[1] for p in points])}'
    )


def _grid(x_of: _Log, y_of: _Log, left: float, right: float, top: float, bottom: float) -> str:
    parts = []
    for x in x_of.ticks():
        parts.append(f'<line class="grid" x1="{x_of(x):.1f}" y1="{top}" x2="{x_of(x):.1f}" y2="{bottom}"/>')
        parts.append(f'<text class="small" x="{x_of(x):.1f}" y="{bottom + 16}" text-anchor="middle">{x:g}</text>')
    for y in y_of.ticks():
        parts.append(f'<line class="grid" x1="{left}" y1="{y_of(y):.1f}" x2="{right}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text class="small" x="{left - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y / 1e12:g}</text>')
    middle = (left + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 36}" text-anchor="middle">FLOP / byte</text>')
    across = (top + bottom) / 2
    parts.append(f'<text x="14" y="{across}" text-anchor="middle" transform="rotate(-90 14 {across})">TFLOP/s</text>')
    return "".join(parts)


def _point(report: dict[str, Any], layer: dict[str, Any], kernel: Kernel, x_of: _Log, y_of: _Log) -> str:
    assert kernel.flops
    assert kernel.bytes
    assert kernel.roofline_s
    color = COLORS[kernel.group]
    x, y = x_of(kernel.flops / kernel.bytes), y_of(kernel.flops / kernel.roofline_s)
    square = layer is not report["layers"][0]
    told = (
        f"{layer['name']}, {kernel.phase}: {kernel.name}; {si(kernel.flops, 'FLOP')}, {si(kernel.bytes, 'B')}, "
        f"roofline {ms(kernel.roofline_s)} ms"
    )
    parts = [f"<title>{escape(told)}</title>", _mark(x, y, square, f'fill="white" stroke="{color}"')]
    if kernel.measured_s:
        reached = y_of(kernel.flops / kernel.measured_s)
        told += f", measured {ms(kernel.measured_s)} ms ({percent(kernel.share)})"
        parts[0] = f"<title>{escape(told)}</title>"
        parts.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{reached:.1f}" stroke="{color}" opacity=".5"/>')
        parts.append(_mark(x, reached, square, f'fill="{color}" stroke="{color}"'))
    return f"<g>{''.join(parts)}</g>"


def _mark(x: float, y: float, square: bool, style: str) -> str:
    if square:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" stroke-width="1.6" {style}/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.4" stroke-width="1.6" {style}/>'


def _legend(report: dict[str, Any], kernels: Sequence[Kernel]) -> str:
    groups = [group for group in GROUPS if any(kernel.group == group for kernel in kernels)]
    parts = [
        f'<span><svg width="12" height="12"><rect width="12" height="12" rx="2" fill="{COLORS[group]}"/></svg> '
        f"{group}</span>"
        for group in groups
    ]
    shapes = ["&#9679; " + escape(report["layers"][0]["name"])]
    shapes += ["&#9632; " + escape(layer["name"]) for layer in report["layers"][1:]]
    parts += [f"<span>{shape}</span>" for shape in shapes]
    parts.append("<span>hollow: the roof</span>")
    if any(kernel.measured_s for kernel in kernels):
        parts.append("<span>filled: measured</span>")
    return f'<p class="legend">{"".join(parts)}</p>'


def bars(kernel: Kernel, longest_s: float, width: int = 120) -> str:
    """Measured time (light) with the roofline in it (dark), on the scale of the table's longest."""
    if not longest_s or (kernel.roofline_s is None and kernel.measured_s is None):
        return ""
    parts = []
    for seconds, shade in ((kernel.measured_s, "bar"), (kernel.roofline_s, "bar roof")):
        if seconds:
            parts.append(f'<i class="{shade}" style="width:{max(1.0, width * seconds / longest_s):.0f}px"></i>')
    return f'<span class="bars" style="width:{width}px">{"".join(parts)}</span>'
