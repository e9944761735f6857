"""A report as text for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexrattn.inspect.report import GROUPS, LINEAR, SOFTMAX, SUM, Kernel, shortened

_CELLS = {"0": "··", "1": "▒▒", "2": "██"}
_ASCII = {"0": "..", "1": "::", "2": "##"}


def si(value: float | None, unit: str = "", digits: int = 3) -> str:
    """Three digits and a prefix: 30.1 G."""
    if value is None:
        return "-"
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.{digits}g} {prefix}{unit}"
    return f"{value:.{digits}g} {unit}".rstrip()


def ms(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.2f}"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def number(value: int | float | None) -> str:
    return "-" if value is None else f"{value:g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Columns as wide as they need to be, the first `left` of them flush left."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def padded(line: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()

    return [padded(lines[0]), "  ".join("-" * width for width in widths), *map(padded, lines[1:])]


def without_empty(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Without the columns in which no row has a value."""
    kept = [i for i in range(len(header)) if i == 0 or any(row[i] not in ("-", "") for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def title_of(report: dict[str, Any]) -> str:
    return " ".join([report["config"], *report["flags"]])


def shape_of(report: dict[str, Any]) -> str:
    problem, model = report["problem"], report["model"]
    documents = len(problem["documents"])
    each = "one document" if documents == 1 else f"{documents} documents"
    return (
        f"batch {problem['batch']} x {problem['seq_len']} tokens, {each} a row, {problem['dtype']}, "
        f"{model['layers']} layers of width {model['dim']}"
    )


def gpu_of(report: dict[str, Any]) -> str:
    gpu = report["gpu"]
    origin = "measured here" if gpu["measured"] else "its maker's numbers"
    where = f"on {gpu['device']}" if gpu["device"] else f"ahead of time for {report['problem']['arch']}"
    return (
        f"{where}; roofline of {gpu['name']}: {gpu['bf16'] / 1e12:.0f} TFLOP/s bf16, "
        f"{gpu['bandwidth'] / 1e12:.2f} TB/s ({origin})"
    )


def versions_of(report: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)


def to_text(report: dict[str, Any], *, encoding: str = "utf") -> str:
    """The whole report. encoding: "utf" or "ascii"."""
    lines = [title_of(report), shape_of(report), gpu_of(report), versions_of(report)]
    for layer in report["layers"]:
        lines += ["", *_layer(layer, encoding)]
    lines += ["", *_memory(report), "", *health_lines(report["health"])]
    if report["warnings"]:
        lines += ["", "Look at", *(f"  - {text}" for text in report["warnings"])]
    text = "\n".join(lines)
    return text if encoding == "utf" else text.encode("ascii", "replace").decode()


def _layer(layer: dict[str, Any], encoding: str) -> list[str]:
    of = f"layer {layer['index']}, {layer['count']} of the model's layers"
    head = f"{layer['name']}: {layer['what']} ({of})"
    lines = [head, "=" * len(head)]
    if layer["mask"] is not None:
        lines += ["", *mask_lines(layer["mask"], encoding)]
    kernels = layer["kernels"]
    lines += ["", *_work(kernels)]
    compiled = [kernel for kernel in kernels if kernel.shared is not None and kernel.group in (LINEAR, SOFTMAX, SUM)]
    if compiled:
        lines += ["", *_resources(compiled)]
    if layer["no_scan_kernels"]:
        lines += ["", f"No kernels of the linear branch: {layer['no_scan_kernels']}."]
    if layer["flex"] is not None:
        lines += ["", *flex_lines(layer["flex"], kernels)]
    return lines


def mask_lines(mask: dict[str, Any], encoding: str = "utf", widest: int = 32) -> list[str]:
    cells = _CELLS if encoding == "utf" else _ASCII
    step = -(-len(mask["blocks"]) // widest)
    rows = [_merged(mask["blocks"][i : i + step], step) for i in range(0, len(mask["blocks"]), step)]
    total = mask["skipped"] + mask["partial"] + mask["full"]
    return [
        f"mask {mask['name']}, {mask['seq_len']} queries (down) by keys (across), blocks of {mask['block_size']}",
        *("  " + "".join(cells[cell] for cell in row) for row in rows),
        f"  {cells['2']} full {mask['full']}  {cells['1']} partial {mask['partial']}  {cells['0']} skipped "
        f"{mask['skipped']} of {total}: {mask['skipped'] / total:.1%} skipped",
        f"  {mask['kept_pairs']:,} pairs kept: {mask['of_all_pairs']:.2%} of all, {mask['of_causal_pairs']:.1%} of the "
        f"causal ones, {percent(mask['of_computed_pairs'])} of those in computed blocks; "
        f"{mask['keys_per_query']:,.1f} keys a query",
    ]


def _merged(rows: Sequence[str], step: int) -> str:
    cells = []
    for left in range(0, len(rows[0]), step):
        kinds = set("".join(row[left : left + step] for row in rows))
        cells.append(kinds.pop() if len(kinds) == 1 else "1")
    return "".join(cells)


WORK_HEADER = ("kernel", "x", "FLOP", "bytes", "roofline ms", "bound", "measured ms", "of roofline")


def work_row(kernel: Kernel) -> tuple[str, ...]:
    return (
        kernel.name,
        str(kernel.launches),
        si(kernel.flops),
        si(kernel.bytes, "B"),
        ms(kernel.roofline_s),
        kernel.bound or "-",
        ms(kernel.measured_s),
        percent(kernel.share),
    )


def totals(kernels: Sequence[Kernel]) -> Kernel:
    """Their sum; what is None in some counts as nothing: an unknown kernel's time counts, its work cannot."""

    def add(name: str) -> Any:
        values = [value for kernel in kernels if (value := getattr(kernel, name)) is not None]
        return sum(values) if values else None

    # Measured matrix products are listed by shape and by kernel.
    launched = [kernel for kernel in kernels if kernel.measured_s is not None] or kernels
    whole = Kernel(name="", group="", phase="", launches=sum(kernel.launches for kernel in launched))
    whole.flops, whole.bytes = add("flops"), add("bytes")
    whole.roofline_s, whole.measured_s = add("roofline_s"), add("measured_s")
    if whole.measured_s and whole.roofline_s is not None:
        whole.share = whole.roofline_s / whole.measured_s
    return whole


def _work(kernels: Sequence[Kernel]) -> list[str]:
    rows = []
    for phase in ("forward", "backward"):
        for group in GROUPS:
            own = [kernel for kernel in kernels if (kernel.phase, kernel.group) == (phase, group)]
            if not own:
                continue
            # The page lists all; of products and generated kernels there are dozens.
            if group in (LINEAR, SOFTMAX, SUM):
                rows += [("  " + shortened(kernel.name), *work_row(kernel)[1:]) for kernel in own]
            whole = totals(own)
            rows.append((f"{phase}, {group}", *work_row(whole)[1:]))
        whole = totals([kernel for kernel in kernels if kernel.phase == phase])
        rows.append((f"{phase}, all", *work_row(whole)[1:]))
    return table(*without_empty(WORK_HEADER, rows))


RESOURCE_HEADER = (
    "kernel",
    "registers",
    "spilled",
    "shared",
    "warps",
    "stages",
    "per SM",
    "occupancy",
    "limit",
    "waves",
    "tensor cores",
    "off them",
    "loads >=16 B",
)


def resource_row(kernel: Kernel) -> tuple[str, ...]:
    off = sum(not dot["tensor_cores"] for dot in kernel.dots)
    loads = sum(kernel.loads.values()) + kernel.bulk_loads
    none = "none" if loads else "-"  # without loads its code was not read
    return (
        shortened(kernel.name),
        number(kernel.registers),
        number(kernel.spilled),
        number(kernel.shared),
        number(kernel.warps),
        number(kernel.stages),
        number(kernel.programs_per_sm),
        percent(kernel.warps_share),
        kernel.occupancy_limit or "-",
        "-" if kernel.waves is None else f"{kernel.waves:.1f}",
        ", ".join(f"{n} {name.removesuffix('.mma_async')}" for name, n in kernel.tensor_cores.items()) or none,
        f"{off} of {len(kernel.dots)}" if kernel.dots else "-",
        f"{wide_loads(kernel)} of {loads}" if loads else "-",
    )


def wide_loads(kernel: Kernel) -> int:
    return kernel.bulk_loads + sum(n for width, n in kernel.loads.items() if int(width) >= 16)


def _resources(kernels: Sequence[Kernel]) -> list[str]:
    return table(*without_empty(RESOURCE_HEADER, [resource_row(kernel) for kernel in kernels]))


def flex_lines(flex: dict[str, Any], kernels: Sequence[Kernel]) -> list[str]:
    shapes = "dynamic: slower by 26-38 %" if flex["dynamic"] else "static"
    lines = [f"FlexAttention: shapes {shapes}; {flex['compiles']} graph(s), {len(flex['recompiles'])} recompilations"]
    lines += [f"  {kernel.phase}: {flex_options(kernel)}" for kernel in kernels if kernel.group == SOFTMAX]
    lines += [f"  recompiled at {event['where']}: {event['why']}" for event in flex["recompiles"]]
    return lines


def flex_options(kernel: Kernel) -> str:
    """What was chosen for a FlexAttention kernel: "BLOCK_M 128, BLOCK_N 64, 8 warps, 3 stages"."""
    wanted = [
        name for name in kernel.options if name.startswith(("BLOCK_M", "BLOCK_N", "SPARSE_")) and "MULT" not in name
    ]
    blocks = [f"{name} {kernel.options[name]}" for name in wanted if isinstance(kernel.options[name], int)]
    return ", ".join([*blocks, f"{number(kernel.warps)} warps", f"{number(kernel.stages)} stages"])


def memory_rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for name, kept, count in [
        *((layer["name"], layer["memory"], layer["count"]) for layer in report["layers"]),
        ("all layers", report["memory"], report["model"]["layers"]),
    ]:
        rows.append(
            (
                name,
                str(count),
                *(si(kept[key], "B") for key in ("traced", "measured", "traced_checkpointed", "measured_checkpointed")),
            )
        )
    return rows


MEMORY_HEADER = ("kept to the backward", "layers", "traced", "measured", "checkpointed, traced", "measured")


def _memory(report: dict[str, Any]) -> list[str]:
    lines = table(*without_empty(MEMORY_HEADER, memory_rows(report)))
    return [*lines, f"  checkpointing: {report['model']['checkpointing']}; a layer's output counts as its own"]


def health_lines(health: dict[str, Any] | None) -> list[str]:
    if health is None:
        return ["Graph health: not looked at (it takes a GPU, and bf16 or fp32)."]
    lines = [
        f"Graph health, {health['what']}: {len(health['graph_breaks'])} graph breaks, {len(health['host_syncs'])} host "
        f"syncs, {len(health['recompiles'])} recompilations; {health['graphs']} graphs compiled before"
    ]
    for kind in ("graph_breaks", "host_syncs", "recompiles"):
        lines += [f"  {kind.replace('_', ' ')[:-1]} at {event['where']}: {event['why']}" for event in health[kind]]
    return lines
