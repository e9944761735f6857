"""Two reports side by side: two configurations, or one by two versions of the code, torch or Triton."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from flexrattn.inspect import page, svg, text
from flexrattn.inspect.report import GROUPS, LINEAR, OTHERS, SOFTMAX, SUM, Kernel, shortened
from flexrattn.inspect.text import ms, number, percent, si


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, column names and rows; the first column names what is compared."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Table]:
    """Everything that two reports have numbers of, layer by layer (paired by name, "-" where one has none)."""
    tables = [_reports(a, b)]
    for name in dict.fromkeys(layer["name"] for layer in (*a["layers"], *b["layers"])):
        left, right = (next((x for x in report["layers"] if x["name"] == name), None) for report in (a, b))
        tables += _layers(name, left, right)
    return [*tables, _memory(a, b), _health(a, b)]


def ratio(a: float | None, b: float | None) -> str:
    """B / A."""
    return "-" if not a or b is None else f"{b / a:.2f}"


def _reports(a: dict[str, Any], b: dict[str, Any]) -> Table:
    facts: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("configuration", text.title_of),
        ("shapes", text.shape_of),
        ("GPU", lambda report: report["gpu"]["device"] or f"{report['gpu']['name']}, ahead of time"),
        ("ceilings", lambda r: f"{r['gpu']['bf16'] / 1e12:.0f} TFLOP/s, {r['gpu']['bandwidth'] / 1e12:.2f} TB/s"),
        ("versions", text.versions_of),
        ("things to look at", lambda report: str(len(report["warnings"]))),
    ]
    return Table(title="A and B", header=("", "A", "B"), rows=[(name, of(a), of(b)) for name, of in facts])


def _layers(name: str, a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[Table]:
    kernels_a, kernels_b = ([] if layer is None else layer["kernels"] for layer in (a, b))
    what = Table(
        title=f"{name} layer",
        header=("", "A", "B"),
        rows=[
            ("what", *("-" if layer is None else layer["what"] for layer in (a, b))),
            ("of the model's layers", *("-" if layer is None else str(layer["count"]) for layer in (a, b))),
            *_mask(a, b),
        ],
    )
    work = Table(
        title=f"{name} layer: time",
        header=("", "roofline ms A", "B", "B / A", "measured ms A", "B", "B / A", "of roofline A", "B"),
        rows=_times(kernels_a, kernels_b),
    )
    kernels = Table(
        title=f"{name} layer: kernels",
        header=(
            *("", "measured ms A", "B", "B / A"),
            *(name for fact in ("registers", "spilled", "shared", "occupancy") for name in (f"{fact} A", "B")),
        ),
        rows=_kernels(kernels_a, kernels_b),
    )
    return [what, work, *([kernels] if kernels.rows else [])]


def _mask(a: dict[str, Any] | None, b: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    masks = [None if layer is None else layer["mask"] for layer in (a, b)]

    def row(name: str, of: Callable[[dict[str, Any]], str]) -> tuple[str, str, str]:
        left, right = ("-" if mask is None else of(mask) for mask in masks)
        return name, left, right

    return [
        row("mask", lambda mask: mask["name"]),
        row("full, partial, skipped blocks", lambda m: f"{m['full']}, {m['partial']}, {m['skipped']}"),
        row("pairs kept in a row", lambda mask: f"{mask['kept_pairs']:,}"),
    ]


def _times(a: Sequence[Kernel], b: Sequence[Kernel]) -> list[tuple[str, ...]]:
    rows = []
    for phase in ("forward", "backward"):
        for group in (*GROUPS, "all"):
            left, right = ([k for k in kernels if k.phase == phase and group in (k.group, "all")] for kernels in (a, b))
            if left or right:
                rows.append((f"{phase}, {group}", *_time_cells(text.totals(left), text.totals(right))))
    rows.append(("forward and backward", *_time_cells(text.totals(a), text.totals(b))))
    return rows


def _time_cells(a: Kernel, b: Kernel) -> tuple[str, ...]:
    return (
        ms(a.roofline_s),
        ms(b.roofline_s),
        ratio(a.roofline_s, b.roofline_s),
        ms(a.measured_s),
        ms(b.measured_s),
        ratio(a.measured_s, b.measured_s),
        percent(a.share),
        percent(b.share),
    )


def _kernels(a: Sequence[Kernel], b: Sequence[Kernel]) -> list[tuple[str, ...]]:
    """Paired by phase and name; of several with one name, the first with the first."""
    left, right = (_numbered(kernels) for kernels in (a, b))
    empty = Kernel(name="", group="", phase="")
    rows = []
    for key in dict.fromkeys((*left, *right)):
        x, y = left.get(key, empty), right.get(key, empty)
        rows.append(
            (
                f"{key[0]}: {shortened(key[1])}" + (f" ({key[2] + 1})" if key[2] else ""),
                ms(x.measured_s),
                ms(y.measured_s),
                ratio(x.measured_s, y.measured_s),
                *(
                    shown
                    for name in ("registers", "spilled", "shared")
                    for shown in (number(getattr(x, name)), number(getattr(y, name)))
                ),
                percent(x.warps_share),
                percent(y.warps_share),
            )
        )
    return [row for row in rows if any(cell != "-" for cell in row[1:])]


def _numbered(kernels: Sequence[Kernel]) -> dict[tuple[str, str, int], Kernel]:
    found: dict[tuple[str, str, int], Kernel] = {}
    for kernel in kernels:
        if kernel.group not in (LINEAR, SOFTMAX, SUM, OTHERS):
            continue
        again = sum(key[:2] == (kernel.phase, kernel.name) for key in found)
        found[kernel.phase, kernel.name, again] = kernel
    return found


def _memory(a: dict[str, Any], b: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    layers = {layer["name"]: None for report in (a, b) for layer in report["layers"]}
    for name in (*layers, "all layers"):
        kept = [_kept(report, name) for report in (a, b)]
        for key, told in (
            ("traced", "traced"),
            ("measured", "measured"),
            ("traced_checkpointed", "checkpointed, traced"),
            ("measured_checkpointed", "checkpointed, measured"),
        ):
            x, y = (None if each is None else each[key] for each in kept)
            if x is not None or y is not None:
                rows.append((f"{name}, {told}", si(x, "B"), si(y, "B"), ratio(x, y)))
    return Table(title="Memory between forward and backward", header=("", "A", "B", "B / A"), rows=rows)


def _kept(report: dict[str, Any], name: str) -> dict[str, Any] | None:
    if name == "all layers":
        return report["memory"]
    return next((layer["memory"] for layer in report["layers"] if layer["name"] == name), None)


def _health(a: dict[str, Any], b: dict[str, Any]) -> Table:
    rows: list[tuple[str, ...]] = []
    for kind in ("graph_breaks", "host_syncs", "recompiles"):
        shown = ("not looked at" if r["health"] is None else str(len(r["health"][kind])) for r in (a, b))
        rows.append((kind.replace("_", " "), *shown))
    return Table(title="Graph health", header=("", "A", "B"), rows=rows)


def _left(header: Sequence[str]) -> int:
    """Columns that are flush left: all where they are words."""
    return len(header) if list(header) == ["", "A", "B"] else 1


def to_text(a: dict[str, Any], b: dict[str, Any]) -> str:
    """For the terminal."""
    lines = []
    for table in compare(a, b):
        header, rows = text.without_empty(table.header, table.rows)
        lines += [table.title, *text.table(header, rows, left=_left(header)), ""]
    return "\n".join(lines).rstrip()


def to_page(a: dict[str, Any], b: dict[str, Any]) -> str:
    """As one HTML file, the masks and rooflines of both beside each other."""
    title = f"{text.title_of(a)} | {text.title_of(b)}"
    parts = [f"<h1>{escape(title)}</h1>"]
    tables = compare(a, b)
    parts.append(_section(tables[0], "compared"))
    pictures = []
    for letter, report in (("A", a), ("B", b)):
        masks = "".join(
            f"<div><h3>{letter}, {escape(layer['name'])}: {escape(layer['mask']['name'])}</h3>"
            f"{svg.mask_picture(layer['mask'], 200)}</div>"
            for layer in report["layers"]
            if layer["mask"] is not None
        )
        pictures.append(masks)
    parts.append(f'<section id="masks"><h2>Masks</h2><div class="side">{"".join(pictures)}</div></section>')
    rooflines = "".join(
        f'<div class="half"><h3>{letter}</h3>{svg.roofline(report, 560, 340)}</div>'
        for letter, report in (("A", a), ("B", b))
    )
    parts.append(f'<section id="roofline"><h2>Rooflines</h2><div class="side">{rooflines}</div></section>')
    parts += [_section(table, f"table-{i}") for i, table in enumerate(tables[1:])]
    return page.document(title, "".join(parts))


def _section(table: Table, name: str) -> str:
    header, rows = text.without_empty(table.header, table.rows)
    cells = [("", tuple(map(escape, row))) for row in rows]
    shown = page.html_table(tuple(map(escape, header)), cells, left=range(_left(header)))
    return f'<section id="{name}"><h2>{escape(table.title)}</h2>{shown}</section>'
