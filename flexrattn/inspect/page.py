"""A report, or two side by side, as one HTML file: no network, no script, styles and pictures inside."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from flexrattn.inspect import svg, text
from flexrattn.inspect.report import GROUPS, PRODUCTS, SOFTMAX, Kernel, shortened
from flexrattn.inspect.text import ms, number, percent, si

_STYLE = """
:root{--ink:#1d2733;--soft:#5b6878;--line:#dde3ea;--blue:#1f6fb4;--pale:#f5f7f9;--warn:#9a3412}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);margin:0 auto;max-width:1240px;
padding:28px 24px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:19px;margin:38px 0 8px;padding-top:10px;border-top:2px solid var(--line)}
h3{font-size:15px;margin:22px 0 6px}p{margin:6px 0}.soft,.legend{color:var(--soft)}
nav a{margin-right:16px}a{color:var(--blue)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px;margin:16px 0}
.card{background:var(--pale);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.card b{display:block;font-size:19px}.card span{color:var(--soft);font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;margin:6px 0}
th,td{padding:3px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:600;background:var(--pale)}th:first-child,td:first-child{text-align:left}
td.left,th.left{text-align:left}td.name{max-width:330px;overflow:hidden;text-overflow:ellipsis}
tr.sum td{font-weight:600;background:#fafbfc}tr.all td{font-weight:700;background:var(--pale);border-bottom-width:2px}
tr.part td:first-child{padding-left:24px}
td.bad,.bad{color:var(--warn);font-weight:600}td.good{color:#166534}
.bars{position:relative;display:inline-block;height:9px;vertical-align:middle;text-align:left}
.bar{position:absolute;left:0;top:0;height:9px;background:#b9d6ef;border-radius:2px}.bar.roof{background:var(--blue)}
.half{flex:1 1 460px}.side{display:flex;flex-wrap:wrap;gap:26px;align-items:flex-start}
svg text{font:12px system-ui,sans-serif;fill:var(--soft)}svg text.small{font-size:11px}
svg .grid{stroke:#e7ebf0}svg .roof{fill:none;stroke:var(--ink);stroke-width:1.8}
.legend span{margin-right:16px;font-size:13px}
details{border:1px solid var(--line);border-radius:6px;margin:6px 0;background:#fff}
details details{margin:6px 10px}
summary{cursor:pointer;padding:5px 10px;font-size:14px}summary:hover{background:var(--pale)}
details>div{padding:2px 12px 8px}
pre{font:12px/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;background:var(--pale);margin:0;padding:10px;
overflow:auto;max-height:560px}
ul{margin:6px 0;padding-left:22px}
@media print{body{max-width:none;padding:0;font-size:11px}h2,h3{break-after:avoid}svg,tr,.card,.side{break-inside:avoid}
h2{margin-top:18px}section[id^=layer]{break-before:page}
.scroll{overflow:visible}table{font-size:8.5px}th,td{padding:1px 4px}td.name{max-width:210px}nav,pre{display:none}
details{border:0}details:not([open]),.kernels:not(:has(>details[open])){display:none}
.cards{grid-template-columns:repeat(4,1fr)}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
@page{size:A4 landscape;margin:12mm}}
"""

# What a reader needs of TTGIR is the code; the locations of its lines are two thirds of the text.
_LOCATIONS = re.compile(r" loc\([^()]*(?:\([^()]*\)[^()]*)*\)|^#loc.*\n", re.M)


def page(report: dict[str, Any], *, embed: Sequence[str]) -> str:
    """One report. embed: which texts of the kernels go in (python, ttir, gluon, ttgir, ptx, sass)."""
    title = text.title_of(report)
    layers = "".join(_layer(report, layer, embed) for layer in report["layers"])
    links = [("warnings", "Look at"), ("roofline", "Roofline")] if report["warnings"] else [("roofline", "Roofline")]
    links += [(_id(layer), layer["name"]) for layer in report["layers"]]
    links += [("memory", "Memory"), ("health", "Graph health"), ("gpu", "GPU and versions")]
    navigation = "".join(f'<a href="#{name}">{escape(told)}</a>' for name, told in links)
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{escape(text.shape_of(report))}<br>{escape(text.gpu_of(report))}</p>',
        f"<nav>{navigation}</nav>",
        _cards(report),
        _warnings(report["warnings"]),
        f'<section id="roofline"><h2>Roofline</h2>{svg.roofline(report)}</section>',
        layers,
        _section("memory", "Memory between forward and backward", _memory(report)),
        _section("health", "Graph health", _health(report["health"])),
        _section("gpu", "GPU and versions", _gpu(report)),
    ]
    return document(title, "".join(body))


def document(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}: flexrattn.inspect</title><style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _section(name: str, title: str, body: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def _id(layer: dict[str, Any]) -> str:
    return f"layer-{layer['index']}"


def _shown(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], left: Sequence[str]) -> str:
    """Without empty columns; `left` names those that are flush left, besides the first."""
    kept, cells = text.without_empty(header, [line for _, line in rows])
    lines = [(kind, line) for (kind, _), line in zip(rows, cells, strict=True)]
    return html_table(kept, lines, left=[0, *(i for i, name in enumerate(kept) if name in left)])


def html_table(header: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], left: Sequence[int] = (0,)) -> str:
    """rows: (class, cells); cells are HTML."""

    def cells(tag: str, line: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=left' if i in left else ''}>{cell}</{tag}>" for i, cell in enumerate(line))

    body = "".join(f'<tr class="{kind}">{cells("td", line)}</tr>' for kind, line in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells("th", header)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cards(report: dict[str, Any]) -> str:
    cards = []
    for layer in report["layers"]:
        whole = text.totals(layer["kernels"])
        if whole.measured_s is not None:
            told = f"{layer['name']}: forward and backward, {percent(whole.share)} of the roofline"
            cards.append((f"{ms(whole.measured_s)} ms", told))
        else:
            cards.append((f"{ms(whole.roofline_s)} ms", f"{layer['name']}: roofline of forward and backward"))
        if layer["mask"] is not None:
            mask = layer["mask"]
            skipped = mask["skipped"] / (mask["skipped"] + mask["partial"] + mask["full"])
            cards.append((f"{skipped:.0%}", f"{layer['name']}: blocks of the mask skipped"))
    kept = report["memory"]["measured"] or report["memory"]["traced"]
    if kept is not None:
        cards.append((si(kept, "B"), "kept to the backward by all layers"))
    spilled = [k.spilled for layer in report["layers"] for k in layer["kernels"] if k.spilled is not None]
    if spilled:
        cards.append((f"{max(spilled)} B", "most registers spilled by a thread of a kernel"))
    health = report["health"]
    if health is not None:
        found = sum(len(health[kind]) for kind in ("graph_breaks", "host_syncs", "recompiles"))
        cards.append((str(found), "graph breaks, host syncs and recompilations in a step"))
    shown = "".join(f'<div class="card"><b>{value}</b><span>{escape(told)}</span></div>' for value, told in cards)
    return f'<div class="cards">{shown}</div>'


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    items = "".join(f"<li>{escape(each)}</li>" for each in warnings)
    return f'<section id="warnings"><h2>Look at</h2><ul>{items}</ul></section>'


def _layer(report: dict[str, Any], layer: dict[str, Any], embed: Sequence[str]) -> str:
    parts = [f'<p class="soft">{escape(layer["what"])}; {layer["count"]} of the model\'s layers are like this one</p>']
    if layer["mask"] is not None:
        parts.append(_mask(layer["mask"]))
    if layer["no_scan_kernels"]:
        parts.append(f"<p>No kernels of the linear branch: {escape(layer['no_scan_kernels'])}.</p>")
    parts.append(f"<h3>Work and time</h3>{_work(layer['kernels'])}")
    compiled = [kernel for kernel in layer["kernels"] if kernel.registers is not None and kernel.shared is not None]
    if compiled:
        parts.append(f"<h3>Resources</h3>{_resources(compiled)}")
    if layer["flex"] is not None:
        parts.append(f"<h3>FlexAttention</h3>{_flex(layer['flex'], layer['kernels'])}")
    told = [kernel for kernel in layer["kernels"] if kernel.sources or kernel.dots]
    if told:
        shown = "".join(_kernel(kernel, embed) for kernel in told)
        parts.append(f'<div class="kernels"><h3>Kernels</h3>{shown}</div>')
    return _section(_id(layer), f"{layer['name'].capitalize()} layer {layer['index']}", "".join(parts))


def _mask(mask: dict[str, Any]) -> str:
    total = mask["skipped"] + mask["partial"] + mask["full"]
    rows = [
        ("blocks of " + str(mask["block_size"]), f"{total}"),
        ("full (the mask is not evaluated)", f"{mask['full']}"),
        ("partial", f"{mask['partial']}"),
        ("skipped", f"{mask['skipped']} ({mask['skipped'] / total:.1%})"),
        ("pairs kept in a row", f"{mask['kept_pairs']:,}"),
        ("... of all pairs", f"{mask['of_all_pairs']:.2%}"),
        ("... of the causal pairs", f"{mask['of_causal_pairs']:.1%}"),
        ("... of those in computed blocks", percent(mask["of_computed_pairs"])),
        ("keys of a query, mean", f"{mask['keys_per_query']:,.1f}"),
    ]
    listed = html_table((escape(mask["name"]), ""), [("", row) for row in rows])
    legend = "".join(
        f'<span><svg width="12" height="12"><rect width="12" height="12" fill="{svg.CELLS[kind]}"/></svg> {name}</span>'
        for kind, name in (("2", "full"), ("1", "partial"), ("0", "skipped"))
    )
    return (
        f'<div class="side"><div>{svg.mask_picture(mask)}<p class="legend">{legend}</p></div><div>{listed}</div></div>'
    )


def _named(name: str) -> str:
    return f'<span title="{escape(name)}">{escape(shortened(name))}</span>'


def _work(kernels: Sequence[Kernel]) -> str:
    longest = max((max(k.measured_s or 0.0, k.roofline_s or 0.0) for k in kernels), default=0.0)
    rows: list[tuple[str, Sequence[str]]] = []
    for phase in ("forward", "backward"):
        for group in GROUPS:
            own = [kernel for kernel in kernels if (kernel.phase, kernel.group) == (phase, group)]
            if not own:
                continue
            rows.append(("sum", _work_cells(f"{phase}, {group}", text.totals(own), 0.0)))
            rows += [("part", _work_cells(_named(kernel.name), kernel, longest)) for kernel in own]
        whole = text.totals([kernel for kernel in kernels if kernel.phase == phase])
        rows.append(("all", _work_cells(f"{phase}, all", whole, 0.0)))
    rows.append(("all", _work_cells("forward and backward", text.totals(kernels), 0.0)))
    note = ""
    if any(kernel.group == PRODUCTS and kernel.measured_s for kernel in kernels):
        told = "Matrix products: their shapes with the work, then the kernels that computed them with the time."
        note = f'<p class="soft">{told}</p>'
    last = "measured, roofline in it" if any(kernel.measured_s for kernel in kernels) else "roofline"
    return _shown((*text.WORK_HEADER, last), rows, left=(last,)) + note


def _work_cells(name: str, kernel: Kernel, longest: float) -> tuple[str, ...]:
    return (name, *map(escape, text.work_row(kernel)[1:]), svg.bars(kernel, longest))


def _resources(kernels: Sequence[Kernel]) -> str:
    rows = []
    for kernel in kernels:
        cells = [escape(cell) for cell in text.resource_row(kernel)]
        cells[0] = _named(kernel.name)
        if kernel.spilled:
            cells[2] = f'<span class="bad">{cells[2]}</span>'
        rows.append(("", cells))
    return _shown(text.RESOURCE_HEADER, rows, left=("tensor cores",))


def _flex(flex: dict[str, Any], kernels: Sequence[Kernel]) -> str:
    shapes = (
        '<span class="bad">dynamic: 26-38 % slower than static ones (docs/kernels.md)</span>'
        if flex["dynamic"]
        else "static"
    )
    chosen = "".join(
        f"<li>{kernel.phase}: {escape(text.flex_options(kernel))}</li>" for kernel in kernels if kernel.group == SOFTMAX
    )
    return (
        f"<p>Shapes: {shapes}. {flex['compiles']} graph(s), {len(flex['recompiles'])} recompilations.</p>"
        f"<ul>{chosen}</ul>{_events(flex['recompiles'])}"
    )


def _events(events: Sequence[dict[str, str]]) -> str:
    items = "".join(f"<li><code>{escape(e['where'])}</code> {escape(e['why'])}</li>" for e in events)
    return f"<ul>{items}</ul>" if items else ""


def _kernel(kernel: Kernel, embed: Sequence[str]) -> str:
    head = f"{kernel.phase}: {shortened(kernel.name, 110)}"
    facts = []
    if kernel.grid:
        facts.append(("grid", " x ".join(map(str, kernel.grid))))
    facts += [(name, str(value)) for name, value in kernel.options.items()]
    parts = []
    if facts:
        parts.append("<p>" + ", ".join(f"{escape(name)} {escape(value)}" for name, value in facts) + "</p>")
    if kernel.loads or kernel.stores or kernel.bulk_loads:
        parts.append(f"<p>{escape(_accesses(kernel))}</p>")
    if kernel.dots:
        parts.append(_dots(kernel))
    if kernel.note:
        parts.append(f'<p class="bad">{escape(kernel.note)}</p>')
    for stage, source in kernel.sources.items():
        if stage in embed:
            told = {"python": "Source", "ttgir": "TTGIR, without locations"}.get(stage, stage.upper())
            shown = _LOCATIONS.sub("", source) if stage in ("ttgir", "ttir", "gluon") else source
            parts.append(f"<details><summary>{told}</summary><pre>{escape(shown)}</pre></details>")
    if kernel.files:
        links = ", ".join(f'<a href="{escape(path)}">{escape(stage)}</a>' for stage, path in kernel.files.items())
        parts.append(f'<p class="soft">Beside this page: {links}</p>')
    return f"<details><summary>{escape(head)}</summary><div>{''.join(parts)}</div></details>"


def _accesses(kernel: Kernel) -> str:
    def listed(widths: dict[str, int]) -> str:
        return ", ".join(f"{n} of {width} B" for width, n in widths.items()) or "none"

    bulk = f" and {kernel.bulk_loads} bulk copies" if kernel.bulk_loads else ""
    return f"In the code, by what a thread moves: loads {listed(kernel.loads)}{bulk}; stores {listed(kernel.stores)}."


def _dots(kernel: Kernel) -> str:
    rows = [
        (
            "",
            (
                escape(dot["where"]) or "-",
                f"{dot['M']} x {dot['K']} by {dot['K']} x {dot['N']}",
                dot["dtype"],
                escape(dot["op"]),
                "yes" if dot["tensor_cores"] else '<span class="bad">no</span>',
            ),
        )
        for dot in kernel.dots
    ]
    return html_table(("product at", "tiles", "dtype", "operation", "tensor cores"), rows, left=(0, 1, 3))


def _memory(report: dict[str, Any]) -> str:
    rows = [("", [escape(cell) for cell in row]) for row in text.memory_rows(report)]
    note = (
        f"Traced: the tensors that the compiler's split into forward and backward hands on, with the layer's output. "
        f"Checkpointing: {escape(report['model']['checkpointing'])}."
    )
    return _shown(text.MEMORY_HEADER, rows, left=()) + f'<p class="soft">{note}</p>'


def _health(health: dict[str, Any] | None) -> str:
    if health is None:
        return "<p>Not looked at: it takes a GPU, and bf16 or fp32.</p>"
    rows = []
    parts = []
    for kind, told in (
        ("graph_breaks", "graph breaks"),
        ("host_syncs", "host syncs"),
        ("recompiles", "recompilations"),
        ("warm_up_recompiles", "recompilations in the steps before"),
    ):
        events = health[kind]
        bad = events and kind != "warm_up_recompiles"
        rows.append(("", (told, f'<span class="bad">{len(events)}</span>' if bad else str(len(events)))))
        if events:
            parts.append(f"<h3>{told}</h3>{_events(events)}")
    head = f"<p>{escape(health['what'])}; {number(health['graphs'])} graphs were compiled.</p>"
    return head + html_table(("in the step", ""), rows) + "".join(parts)


def _gpu(report: dict[str, Any]) -> str:
    gpu = report["gpu"]
    rows = [
        ("name", gpu["device"] or gpu["name"]),
        ("architecture", gpu["arch"]),
        ("SMs", str(gpu["sms"])),
        ("bf16, fp16", f"{gpu['bf16'] / 1e12:.1f} TFLOP/s" + (" (measured)" if gpu["measured"] else "")),
        ("fp32", f"{gpu['fp32'] / 1e12:.1f} TFLOP/s"),
        ("memory bandwidth", f"{gpu['bandwidth'] / 1e12:.3f} TB/s" + (" (measured)" if gpu["measured"] else "")),
        ("source of the numbers not measured", gpu["source"]),
        *((name, version) for name, version in report["versions"].items()),
    ]
    return html_table(("", ""), [("", tuple(map(escape, row))) for row in rows], left=(0, 1))
