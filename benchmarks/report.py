"""Rows of a benchmark as a table, a CSV and a plot."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch


@dataclass(kw_only=True)
class Row:
    """One contender at one length. None where nothing was measured; `note` says why.

    ms are medians with the 20th and 80th percentile; host_ms is what the launches take on the CPU; speedup is the
    baseline's time divided by this one; MB are 10^6 bytes; error is the largest relative norm at the gate.
    """

    command: str
    contender: str
    T: int
    B: int
    H: int
    G: int
    D: int
    window: int | None
    layers: int | None = None
    dtype: str
    fwd_ms: float | None = None
    fwd_p20: float | None = None
    fwd_p80: float | None = None
    fwd_host_ms: float | None = None
    fwdbwd_ms: float | None = None
    fwdbwd_p20: float | None = None
    fwdbwd_p80: float | None = None
    fwdbwd_host_ms: float | None = None
    baseline: str = ""
    fwd_speedup: float | None = None
    fwdbwd_speedup: float | None = None
    kept_MB: float | None = None
    peak_MB: float | None = None
    error: float | None = None
    tolerance: float | None = None
    rounds: int | None = None
    note: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""
    fla: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def set_speedups(rows: Sequence[Row], baselines: Sequence[str]) -> None:
    """Ratios of rows of one length to the first of `baselines` that was timed there."""
    timed = {row.contender: row for row in rows if row.fwdbwd_ms is not None}
    base = next((timed[name] for name in baselines if name in timed), None)
    if base is None:
        return
    for row in rows:
        if row.fwd_ms is not None and base.fwd_ms is not None:
            row.baseline = base.contender
            row.fwd_speedup = base.fwd_ms / row.fwd_ms
        if row.fwdbwd_ms is not None and base.fwdbwd_ms is not None:
            row.fwdbwd_speedup = base.fwdbwd_ms / row.fwdbwd_ms


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions that a number belongs to; "" for a package that is not installed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name, "torch": torch.__version__, "triton": version("triton"), "fla": version("fla-core")}


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def table(rows: Sequence[Row]) -> str:
    """One line a row, and a line in front of each length that says what its ratios (x) refer to."""
    lines = []
    header = [
        "contender",
        "fwd ms",
        "20-80 %",
        "x",
        "fwd+bwd ms",
        "20-80 %",
        "x",
        "host ms",
        "kept MB",
        "peak MB",
        "error",
    ]
    for length in dict.fromkeys((row.T, row.B) for row in rows):
        own = [row for row in rows if length == (row.T, row.B)]
        base = next((row.baseline for row in own if row.baseline), "")
        lines.append(f"\nT={length[0]} B={length[1]}" + (f", x: times as fast as {base}" if base else ""))
        cells = [header, *(_cells(row) for row in own)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        for line, note in zip(cells, ["", *(row.note for row in own)], strict=True):
            padded = [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]
            lines.append(("  ".join(padded) + (f"  {note}" if note else "")).rstrip())
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    def shown(x: float | None, digits: int) -> str:
        return "-" if x is None else f"{x:.{digits}f}"

    def between(low: float | None, high: float | None) -> str:
        return "-" if low is None or high is None else f"{low:.3f}-{high:.3f}"

    host = "-" if row.fwd_host_ms is None else f"{row.fwd_host_ms:.2f}/{shown(row.fwdbwd_host_ms, 2)}"
    return [
        row.contender,
        shown(row.fwd_ms, 3),
        between(row.fwd_p20, row.fwd_p80),
        shown(row.fwd_speedup, 2),
        shown(row.fwdbwd_ms, 3),
        between(row.fwdbwd_p20, row.fwdbwd_p80),
        shown(row.fwdbwd_speedup, 2),
        host,
        shown(row.kept_MB, 1),
        shown(row.peak_MB, 1),
        "-" if row.error is None else f"{row.error:.1e}",
    ]


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """All columns of all rows; an empty cell where nothing was measured. No date: equal runs give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            values = (getattr(row, name) for name in COLUMNS)
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in values])


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Forward, and forward and backward, over T, one line a contender; bands are the 20th to 80th percentile."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharex=True)
    for axis, prefix, title in zip(axes, ("fwd", "fwdbwd"), ("forward", "forward + backward"), strict=True):
        for contender in dict.fromkeys(row.contender for row in rows):
            own = [row for row in rows if row.contender == contender and getattr(row, f"{prefix}_ms") is not None]
            if not own:
                continue
            lengths = [row.T for row in own]
            (line,) = axis.plot(lengths, [getattr(row, f"{prefix}_ms") for row in own], marker="o", label=contender)
            low, high = ([getattr(row, f"{prefix}_{p}") for row in own] for p in ("p20", "p80"))
            axis.fill_between(lengths, low, high, color=line.get_color(), alpha=0.2)
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("T (tokens of a sequence)")
        axis.set_ylabel("ms")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize="small")
    first = rows[0]
    shape = f"{first.B * first.T} tokens, H={first.H} G={first.G} D={first.D} {first.dtype}"
    figure.suptitle(f"{first.command}: {shape}, {first.device}, torch {first.torch}, triton {first.triton}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
