"""Rows of `benchmarks.run decode` as a table, a CSV and a picture. What each column means: docs/generate.md."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(kw_only=True)
class Row:
    """One arm at one point. Empty cells were not measured; `note` says why."""

    contender: str
    B: int
    context: int
    kernel: str = ""
    step_ms: float | None = None
    step_p20: float | None = None
    step_p80: float | None = None
    host_ms: float | None = None
    tokens_per_s: float | None = None
    x_full: float | None = None
    cache_bytes: int | None = None
    formula_bytes: int | None = None
    cache_over_formula: float | None = None
    formula_ms: float | None = None
    step_over_formula: float | None = None
    error: float | None = None
    tolerance: float | None = None
    fold_every: int | None = None
    largest: bool = False
    bandwidth_TB_s: float | None = None
    matmul_TFLOP_s: float | None = None
    layers: int | None = None
    flavor: str = ""
    dtype: str = ""
    note: str = ""
    device: str = ""
    torch: str = ""
    triton: str = ""


COLUMNS = tuple(field.name for field in fields(Row))


def set_ratios(rows: Sequence[Row]) -> None:
    """Tokens/s beside the faster of the two arms with full attention."""
    full = [row.tokens_per_s for row in rows if row.contender.startswith("full") and row.tokens_per_s is not None]
    for row in rows:
        if full and row.tokens_per_s is not None:
            row.x_full = row.tokens_per_s / max(full)


def failed(rows: Sequence[Row]) -> bool:
    return any(row.note.startswith(("WRONG", "FAILED")) for row in rows)


def table(rows: Sequence[Row]) -> str:
    header = ["contender", "B", "context", "kernel", "step ms", "20-80 %", "tokens/s", "x full", "MB/seq", "/formula"]
    header += ["formula ms", "x formula", "host ms", "error"]

    def shown(x: float | None, digits: int) -> str:
        return "-" if x is None else f"{x:.{digits}f}"

    cells = [header]
    for row in rows:
        spread = "-" if row.step_p20 is None else f"{row.step_p20:.3f}-{row.step_p80:.3f}"
        cells.append(
            [
                row.contender,
                str(row.B),
                str(row.context),
                row.kernel or "ours",
                shown(row.step_ms, 3),
                spread,
                shown(row.tokens_per_s, 0),
                shown(row.x_full, 2),
                shown(None if row.cache_bytes is None else row.cache_bytes / 1e6, 1),
                shown(row.cache_over_formula, 4),
                shown(row.formula_ms, 3),
                shown(row.step_over_formula, 2),
                shown(row.host_ms, 3),
                "-" if row.error is None else f"{row.error:.1e}",
            ]
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    notes = ["", *(row.note for row in rows)]
    lines = []
    for line, note in zip(cells, notes, strict=True):
        padded = [line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))]
        lines.append(("  ".join(padded) + (f"  {note}" if note else "")).rstrip())
    return "\n".join(["", *lines])


def write_csv(rows: Sequence[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for row in rows:
            values = (getattr(row, name) for name in COLUMNS)
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in values])


def write_plot(rows: Sequence[Row], path: Path) -> None:
    """Tokens/s of every arm at every point, with the formula's bound as a line over each bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    points = list(dict.fromkeys((row.context, row.B if not row.largest else 0) for row in rows))
    names = list(dict.fromkeys(row.contender for row in rows))
    figure, axis = plt.subplots(figsize=(max(8, 1.8 * len(points)), 5))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        own = [row for row in rows if row.contender == name and row.tokens_per_s is not None]
        at = [points.index((row.context, row.B if not row.largest else 0)) + (i + 0.5) * width - 0.4 for row in own]
        axis.bar(at, [row.tokens_per_s or 0.0 for row in own], width, label=name)
        bounds = [1e3 * row.B / (row.formula_ms or 1.0) for row in own]
        label = "the paper's formula" if i == 0 else ""
        axis.hlines(bounds, [x - width / 2 for x in at], [x + width / 2 for x in at], colors="black", label=label)
    axis.set_xticks(range(len(points)))
    axis.set_xticklabels([f"{f'B={B}' if B else 'largest B'}\n{T} tokens" for T, B in points])
    axis.set_ylabel("tokens/s")
    axis.set_yscale("log")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize="small")
    first = rows[0]
    axis.set_title(f"decode, {first.flavor} {first.dtype}, {first.device}, torch {first.torch}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
