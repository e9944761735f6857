"""Records of a study as CSV, Markdown and a picture. What may be concluded is in `stats.verdict`."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexrattn.ablate.records import Record, metric
from flexrattn.ablate.stats import (
    Paired,
    bootstrap_interval,
    holm,
    paired,
    rank_sum_p,
    verdict,
)
from flexrattn.ablate.study import Study

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One arm beside one control by one metric, over the seeds that both have."""

    arm: str
    control: str
    metric: str
    seeds: tuple[int, ...]
    paired: Paired
    p_holm: float | None
    p_equal_holm: float | None
    p_rank_sum: float
    bootstrap: tuple[float, float] | None
    verdict: str


def write_all(study: Study, records: dict[str, Record], out: Path, say: Say) -> None:
    """results.csv, comparisons.csv, table.md and plot.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    metrics = present_metrics(study, records, say)
    comparisons = compare(study, records, metrics)
    write_results(study, records, metrics, out / "results.csv")
    write_comparisons(comparisons, out / "comparisons.csv")
    (out / "table.md").write_text(table(study, records, metrics, comparisons))
    written = "results.csv, comparisons.csv and table.md"
    if any(values(records, arm.name, metrics[0]) for arm in study.arms):
        try:
            write_plot(study, records, metrics[0], out / "plot.png")
            written += ", plot.png"
        except ImportError as error:
            say(f"no picture: {error} (pip install matplotlib)")
    say(f"wrote {written} in {out}")


def present_metrics(study: Study, records: dict[str, Record], say: Say) -> list[str]:
    """The study's metrics that its records hold, the one that is compared first. Says which are missing."""
    done = [r for r in records.values() if r["status"] == "done" and r["stage"] == "run"]
    found = [name for name in study.metrics if any(metric(r["evaluation"], name) is not None for r in done)]
    if done and study.primary not in found:
        say(f"the primary metric {study.primary!r} is in no record: comparing 'loss' instead")
    missing = [name for name in study.metrics if name not in found]
    if done and missing:
        say(f"not in the runs' evaluation, and left out: {', '.join(missing)}")
    return list(dict.fromkeys([study.primary if study.primary in found else "loss", *found]))


def values(records: dict[str, Record], arm: str, name: str) -> dict[int, float]:
    """Seed -> metric of an arm's finished runs."""
    found = {}
    for record in records.values():
        if record["stage"] == "run" and record["arm"] == arm and record["status"] == "done":
            value = metric(record["evaluation"], name)
            if value is not None:
                found[record["seed"]] = value
    return dict(sorted(found.items()))


def compare(study: Study, records: dict[str, Record], metrics: Sequence[str]) -> list[Comparison]:
    """Every pair of the study by every metric. Holm's correction is taken within a metric, over the pairs."""
    result = []
    for name in metrics:
        rows: list[tuple[str, str, tuple[int, ...], Paired, float]] = []
        for arm, control in study.comparisons:
            a, c = values(records, arm, name), values(records, control, name)
            shared = tuple(seed for seed in a if seed in c)
            if shared:
                p = paired([a[s] - c[s] for s in shared], margin=study.margin)
                rows.append((arm, control, shared, p, rank_sum_p([a[s] for s in shared], [c[s] for s in shared])))
        different, equal = holm([row[3].p for row in rows]), holm([row[3].p_equal for row in rows])
        for (arm, control, shared, p, rank), p_holm, p_equal_holm in zip(rows, different, equal, strict=True):
            result.append(
                Comparison(
                    arm=arm,
                    control=control,
                    metric=name,
                    seeds=shared,
                    paired=p,
                    p_holm=p_holm,
                    p_equal_holm=p_equal_holm,
                    p_rank_sum=rank,
                    bootstrap=_bootstrap(records, arm, control, shared) if name == "loss" else None,
                    verdict=verdict(p, margin=study.margin, p_holm=p_holm, p_equal_holm=p_equal_holm),
                )
            )
    return result


def _bootstrap(records: dict[str, Record], arm: str, control: str, seeds: Iterable[int]) -> tuple[float, float] | None:
    """None where the runs kept no loss of each validation row."""
    rows = []
    for name in (arm, control):
        own = {r["seed"]: r for r in records.values() if r["stage"] == "run" and r["arm"] == name}
        kept = [own[seed]["evaluation"].get("rows") for seed in seeds]
        if not all(kept):
            return None
        rows.append([np.array(row, float) for row in kept])
    if any(a.shape != c.shape for a, c in zip(*rows, strict=True)):
        return None
    return bootstrap_interval(*rows)


# ------------------------------------------------------------------------------------------------------------ CSV


def write_results(study: Study, records: dict[str, Record], metrics: Sequence[str], path: Path) -> None:
    """One line a run, tuning and failures included."""
    tuned = list(study.tune.values) if study.tune else []
    header = [
        "study",
        "stage",
        "arm",
        "seed",
        *tuned,
        "kind",
        "window",
        "parameters",
        "tokens",
        "cache_bytes",
        "status",
    ]
    header += [*metrics, "seconds", "tokens_per_s", "device", "torch", "triton", "torchtitan", "commit"]
    header += ["code_hash", "config_hash", "error"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, header, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for record in records.values():
            evaluation = record.get("evaluation", {})
            numbers = {name: metric(evaluation, name) for name in metrics}
            writer.writerow(
                {
                    **record,
                    **{key: record["choice"].get(key) for key in tuned},
                    **{name: "" if value is None else f"{value:.6g}" for name, value in numbers.items()},
                    **record["versions"],
                }
            )


def write_comparisons(comparisons: Sequence[Comparison], path: Path) -> None:
    header = ["metric", "arm", "control", "seeds", "difference", "low_95", "high_95", "p_t", "p_t_holm", "p_tost"]
    header += ["p_tost_holm", "p_sign_flip", "p_rank_sum", "bootstrap_low", "bootstrap_high", "verdict"]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for each in comparisons:
            p = each.paired
            numbers = [p.mean, p.low, p.high, p.p, each.p_holm, p.p_equal, each.p_equal_holm, p.p_sign_flip]
            numbers += [each.p_rank_sum, *(each.bootstrap or (None, None))]
            shown = ["" if x is None else f"{x:.6g}" for x in numbers]
            seeds = " ".join(map(str, each.seeds))
            writer.writerow([each.metric, each.arm, each.control, seeds, *shown, each.verdict])


# ------------------------------------------------------------------------------------------------------- Markdown


def table(study: Study, records: dict[str, Record], metrics: Sequence[str], comparisons: Sequence[Comparison]) -> str:
    """The study's page: arms with every seed, comparisons with intervals, tuning, failures, what it was made with."""
    parts = [f"# {study.name}", study.note, _settings(study, records), _arms(study, records, metrics[0])]
    if comparisons:
        parts += ["## Comparisons", _comparisons(study, [c for c in comparisons if c.metric == metrics[0]])]
    others = [name for name in metrics if name != metrics[0]]
    if others:
        parts += ["## Other metrics", _others(study, records, others)]
    if study.tune:
        parts += ["## Tuning", _tuning(study, records, metrics[0])]
    failed = [r for r in records.values() if r["status"] == "failed"]
    if failed:
        rows = [[r["name"], r["error"].replace("|", "\\|"), r["log"]] for r in failed]
        parts += ["## Failed runs", _markdown(["run", "what it said", "log"], rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _settings(study: Study, records: dict[str, Record]) -> str:
    done = [r for r in records.values() if r["status"] == "done"]
    if not done:
        return "No run has finished."
    expected = len(study.arms) * len(study.seeds)
    there = sum(r["stage"] == "run" for r in done)
    distinct = {
        "devices": sorted({r["device"] or "unknown" for r in done}),
        "versions": sorted({", ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in done}),
        "code": sorted({f"{r['code_hash']} {r['commit']}".strip() for r in done}),
        "tokens a run": sorted({f"{r['tokens']:,}" for r in done if r["stage"] == "run"}),
    }
    said = "; ".join(f"{key}: {' and '.join(found)}" for key, found in distinct.items())
    missing = "" if there == expected else f" **{expected - there} of {expected} runs are missing.**"
    return f"{there} runs. {said}.{missing}"


def _arms(study: Study, records: dict[str, Record], name: str) -> str:
    header = ["arm", "parameters", "cache bytes/sequence", *(study.tune.values if study.tune else []), name]
    header += [*(f"seed {seed}" for seed in study.seeds), f"difference to {study.control} [95 %]"]
    rows = []
    for arm in study.arms:
        own = [r for r in records.values() if r["stage"] == "run" and r["arm"] == arm.name]
        first = own[0] if own else {}
        found = values(records, arm.name, name)
        row = [arm.name, _count(first.get("parameters")), _count(first.get("cache_bytes"))]
        row += [_value(first.get("choice", {}).get(key)) for key in (study.tune.values if study.tune else [])]
        row.append(f"{statistics.fmean(found.values()):.4f}" if found else "-")
        row += [f"{found[seed]:.4f}" if seed in found else "-" for seed in study.seeds]
        row.append(_beside_control(study, records, arm.name, name))
        rows.append(row)
    return _markdown(header, rows)


def _beside_control(study: Study, records: dict[str, Record], arm: str, name: str) -> str:
    a, c = values(records, arm, name), values(records, study.control, name)
    differences = [a[seed] - c[seed] for seed in a if seed in c]
    return _interval(paired(differences, margin=study.margin)) if differences and arm != study.control else "-"


def _comparisons(study: Study, comparisons: Sequence[Comparison]) -> str:
    header = ["arm", "against", "difference [95 %]", "p (Holm)", "p of equality (TOST, Holm)", "exact p", "verdict"]
    bootstrap = any(c.bootstrap for c in comparisons)
    if bootstrap:
        header.insert(3, "bootstrap over seeds and rows")
    rows = []
    for c in comparisons:
        row = [c.arm, c.control, _interval(c.paired), _p(c.p_holm), _p(c.p_equal_holm), _p(c.paired.p_sign_flip)]
        if bootstrap:
            row.insert(3, f"[{c.bootstrap[0]:+.4f}, {c.bootstrap[1]:+.4f}]" if c.bootstrap else "-")
        rows.append([*row, c.verdict])
    note = (
        "Differences are arm minus control of the same seed, with a t interval. Equality means within "
        f"{study.margin:g}, by two one-sided tests. The exact test flips the signs of the differences."
    )
    return f"{_markdown(header, rows)}\n\n{note}"


def _others(study: Study, records: dict[str, Record], metrics: Sequence[str]) -> str:
    header = ["arm", *metrics]
    rows = []
    for arm in study.arms:
        row = [arm.name]
        for name in metrics:
            found = values(records, arm.name, name)
            cell = f"{statistics.fmean(found.values()):.4f}" if found else "-"
            beside = _beside_control(study, records, arm.name, name)
            row.append(cell + (f" ({beside})" if beside != "-" else ""))
        rows.append(row)
    return f"Means over seeds, in brackets the difference to {study.control}.\n\n{_markdown(header, rows)}"


def _tuning(study: Study, records: dict[str, Record], name: str) -> str:
    from flexrattn.ablate.runner import chosen

    assert study.tune is not None
    runs = study.tuning_runs()
    choices = list({json.dumps(run.choice): run.choice for run in runs}.values())
    header = ["arm", *(", ".join(map(_value, choice.values())) for choice in choices), "taken"]
    rows = []
    for arm in study.arms:
        row = [arm.name]
        for choice in choices:
            record = next((records.get(r.name) for r in runs if r.arm == arm.name and r.choice == choice), None)
            value = metric(record["evaluation"], name) if record and record["status"] == "done" else None
            row.append(
                "failed" if record and record["status"] == "failed" else "-" if value is None else f"{value:.4f}"
            )
        taken = chosen(study, arm.name, records)
        edge = [
            key for key, tried in study.tune.values.items() if taken and len(tried) > 1 and _at_edge(taken[key], tried)
        ]
        mark = " (at the edge of what was tried)" if edge else ""
        rows.append([*row, "-" if taken is None else ", ".join(map(_value, taken.values())) + mark])
    keys = ", ".join(study.tune.values)
    tokens = sorted({f"{r['tokens']:,}" for r in records.values() if r["stage"] == "tune"})
    return (
        f"{name} for each {keys}, on seed {study.tune.seed}, {' and '.join(tokens) or '-'} tokens; the best is taken."
        f"\n\n{_markdown(header, rows)}"
    )


def _at_edge(value: Any, tried: Sequence[Any]) -> bool:
    try:
        return value in (min(tried), max(tried))
    except TypeError:
        return False


def _interval(p: Paired) -> str:
    return f"{p.mean:+.4f}" + (f" [{p.low:+.4f}, {p.high:+.4f}]" if p.low is not None else " (one seed)")


def _p(p: float | None) -> str:
    return "-" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"


def _count(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# -------------------------------------------------------------------------------------------------------- picture


def write_plot(study: Study, records: dict[str, Record], name: str, path: Path) -> None:
    """The metric over the window, and over cache bytes per sequence; every seed a dot, means joined inside a series.

    Arms without a window (full attention, the linear branch alone) are lines across the first panel. Where evaluations
    hold losses by position, a third panel has each arm's difference to the control.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    facts = {r["arm"]: r for r in records.values() if r["stage"] == "run"}
    found = {arm.name: values(records, arm.name, name) for arm in study.arms}
    positions = by_position(study, records)
    panels = 3 if positions else 2
    figure, axes = plt.subplots(1, panels, figsize=(6 * panels, 5))
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    all_series = list(dict.fromkeys(arm.series for arm in study.arms))
    left, right = axes[:2]
    right.sharey(left)
    for i, series in enumerate(all_series):
        color = colors[i % len(colors)]
        arms = [arm.name for arm in study.arms if arm.series == series and found[arm.name]]
        points = [(facts[a]["window"], statistics.fmean(found[a].values()), a) for a in arms]
        windows = sorted((p for p in points if p[0] is not None), key=lambda p: p[0])
        left.plot([p[0] for p in windows], [p[1] for p in windows], color=color, label=series if windows else None)
        for window, _, arm in windows:
            left.plot([window] * len(found[arm]), list(found[arm].values()), "o", color=color, markersize=4)
        for window, mean, arm in points:
            if window is None:
                left.axhline(mean, color=color, linestyle="--", label=arm)
        cached = sorted((facts[a]["cache_bytes"], mean, a) for _, mean, a in points if facts[a]["cache_bytes"])
        right.plot([p[0] for p in cached], [p[1] for p in cached], color=color, label=series)
        for nbytes, mean, arm in cached:
            right.plot([nbytes] * len(found[arm]), list(found[arm].values()), "o", color=color, markersize=4)
            right.annotate(arm, (nbytes, mean), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    seen = sorted({facts[arm]["window"] for arm in facts if found[arm] and facts[arm]["window"] is not None})
    left.set_xscale("symlog", base=2, linthresh=16)
    left.set_xticks(seen, [str(window) for window in seen])
    left.minorticks_off()
    left.set_xlabel("window (previous keys that a query of a local layer sees)")
    left.set_ylabel(name)
    left.legend(fontsize="small")
    right.set_xlabel("cache bytes per sequence")
    right.set_xscale("log")
    if positions:
        styles = ("-", "--", ":", "-.")
        for shown in (arm for arm in study.arms if arm.name in positions):
            own = [arm.name for arm in study.arms if arm.series == shown.series]
            color = colors[all_series.index(shown.series) % len(colors)]
            style = styles[own.index(shown.name) % len(styles)]
            axes[2].plot(*positions[shown.name], style, color=color, label=shown.name)
        axes[2].axhline(0, color="black", linewidth=0.8)
        axes[2].set_xscale("log", base=2)
        axes[2].set_xlabel("position in the document")
        axes[2].set_ylabel(f"loss minus that of {study.control}")
        axes[2].legend(fontsize="small")
    for axis in axes:
        axis.grid(alpha=0.3)
    done = [r for r in records.values() if r["stage"] == "run" and r["status"] == "done"]
    devices = ", ".join(sorted({r["device"] for r in done if r["device"]}))
    figure.suptitle(f"{study.name}: {done[0]['tokens']:,} tokens a run, {len(study.seeds)} seeds, {devices}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def by_position(study: Study, records: dict[str, Record]) -> dict[str, tuple[list[float], list[float]]]:
    """Arm -> middles of the bins of positions, and loss minus the control's there, means over the shared seeds."""
    result = {}
    done = [r for r in records.values() if r["stage"] == "run" and r["status"] == "done"]
    bins = {(r["arm"], r["seed"]): r["evaluation"].get("by_position") for r in done}
    for arm in study.arms:
        pairs = [
            (own, bins[study.control, seed])
            for (name, seed), own in bins.items()
            if name == arm.name != study.control and own and bins.get((study.control, seed))
        ]
        if not pairs or len({tuple((b["from"], b["to"]) for b in each) for pair in pairs for each in pair}) != 1:
            continue
        x, y = [], []
        for i, edge in enumerate(pairs[0][0]):
            differences = [own[i]["loss"] - other[i]["loss"] for own, other in pairs if own[i]["n"] and other[i]["n"]]
            if differences:
                x.append((edge["from"] + edge["to"]) / 2 + 1)
                y.append(statistics.fmean(differences))
        result[arm.name] = (x, y)
    return result
