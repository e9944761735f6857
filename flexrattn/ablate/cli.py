"""`python -m flexrattn.ablate STUDY.yaml`: the command. Exit codes: 0 all runs done, 1 some failed, 2 bad input,
3 stopped at --time-limit, 130 interrupted; after each of them the same command goes on."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from flexrattn.ablate.processes import Slot
from flexrattn.ablate.study import Facts, Study, build_arms, load_study
from flexrattn.suggest import choose

# For a first guess of a run's time, before any has been seen: sustained training FLOP/s, and seconds to get going.
ROUGH_FLOPS = {"cuda": 1.2e14, "cpu": 2e10}
ROUGH_START_SECONDS = 30.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run, look at, or tabulate a study. Returns the process's exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return _main(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("FLEXRATTN_TRACEBACK"):
            raise
        print(f"ablate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexrattn.ablate", description="Run the arms of a study and compare them (docs/ablations.md)."
    )
    add = parser.add_argument
    add("study", type=Path, help="a file such as configs/ablations/windows.yaml")
    add("--out", type=Path, help="records, logs, table and picture (default: outputs/ablations/STUDY)")
    add("--work", type=Path, help="configurations, curves and checkpoints of runs (default: OUT/work)")
    add("--devices", metavar="0,1,...", help="GPUs; each run gets one of them, or --nproc of them")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one, or one for each device)")
    add("--jobs-per-device", type=int, default=1, metavar="N", help="runs at a time on each device (default: 1)")
    add("--nproc", type=int, default=1, metavar="N", help="processes of a run, under torchrun (default: 1)")
    add("--dry-run", action="store_true", help="build every arm, list what would run, and end")
    add("--report", action="store_true", help="write table and picture from the records that are there, and end")
    add("--redo", action="store_true", help="run again what is there from other code or another configuration")
    add("--retry-failed", action="store_true", help="run again what failed")
    add("--keep-checkpoints", action="store_true", help="of finished runs")
    add("--time-limit", type=float, metavar="SECONDS", help="start no run that would not end in time; stop then")
    add("--seeds", type=int, nargs="+", metavar="SEED", help="in place of the study's")
    add("--only", nargs="+", metavar="ARM", help="these arms alone")
    return parser


def _main(arguments: argparse.Namespace) -> int:
    study = load_study(arguments.study)
    if arguments.seeds:
        study = _with_seeds(study, arguments.seeds)
    if arguments.only:
        study = _with_arms(study, arguments.only)
    out = arguments.out or Path("outputs/ablations") / study.name
    slots = _slots(arguments)
    if arguments.report:
        return _report(study, out)
    facts = build_arms(study, ranks=arguments.nproc, check_files=not arguments.dry_run)
    if arguments.dry_run:
        _dry_run(study, facts, out, slots)
        return 0
    return _run(arguments, study, facts, out, slots)


def _with_seeds(study: Study, seeds: list[int]) -> Study:
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds must be different integers, got {seeds}")
    return dataclasses.replace(study, seeds=tuple(seeds))


def _with_arms(study: Study, names: list[str]) -> Study:
    for name in names:
        choose(name, [arm.name for arm in study.arms], what="arm of --only")
    return dataclasses.replace(
        study,
        arms=tuple(arm for arm in study.arms if arm.name in names),
        control=study.control if study.control in names else names[0],
        comparisons=tuple(pair for pair in study.comparisons if set(pair) <= set(names)),
    )


def _slots(arguments: argparse.Namespace) -> list[Slot]:
    """Where runs go. ValueError for numbers that do not fit."""
    for name in ("jobs", "jobs_per_device", "nproc"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {value}")
    places: list[str | None] = [None] * (arguments.jobs or 1)
    if arguments.devices:
        devices = arguments.devices.split(",")
        if not all(d.strip().isdigit() for d in devices) or len({d.strip() for d in devices}) != len(devices):
            raise ValueError(f"--devices must be different numbers such as 0,1,2,3, got {arguments.devices!r}")
        if len(devices) % arguments.nproc:
            raise ValueError(f"--devices {arguments.devices} cannot be dealt to runs of --nproc {arguments.nproc}")
        groups = [devices[i : i + arguments.nproc] for i in range(0, len(devices), arguments.nproc)]
        dealt = [",".join(d.strip() for d in group) for _ in range(arguments.jobs_per_device) for group in groups]
        places = list(dealt[: arguments.jobs])
    elif arguments.jobs_per_device > 1:
        raise ValueError("--jobs-per-device needs --devices")
    threads = max(1, (os.cpu_count() or 1) // (len(places) * arguments.nproc))
    return [Slot(devices=place, threads=threads) for place in places]


def _run(arguments: argparse.Namespace, study: Study, facts: dict[str, Facts], out: Path, slots: list[Slot]) -> int:
    from flexrattn.ablate.report import write_all
    from flexrattn.ablate.runner import Runner

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    runner = Runner(
        study,
        facts,
        out=out,
        work=arguments.work or out / "work",
        slots=slots,
        ranks=arguments.nproc,
        redo=arguments.redo,
        retry_failed=arguments.retry_failed,
        keep_checkpoints=arguments.keep_checkpoints,
        time_limit=arguments.time_limit,
    )
    try:
        outcome = runner.run()
    except KeyboardInterrupt:
        there = len(runner.records)
        print(f"stopped with {there} runs done; their records are in {out / 'records'}", file=sys.stderr)
        raise
    write_all(study, outcome.records, out, print)
    for record in outcome.failed:
        print(f"failed: {record['name']}: {record['error']}; log: {out / record['log']}", file=sys.stderr)
    if outcome.stopped:
        print("stopped at the time limit: the same command goes on", file=sys.stderr)
        return 3
    return 1 if outcome.failed else 0


def _report(study: Study, out: Path) -> int:
    from flexrattn.ablate.code import code_hash
    from flexrattn.ablate.records import read_records
    from flexrattn.ablate.report import write_all
    from flexrattn.ablate.runner import check_records

    records = check_records(study, read_records(out / "records"), code=None, redo=False)
    if not records:
        raise ValueError(f"{out / 'records'} holds no record of {study.path}: run the study first")
    codes = sorted({record["code_hash"] for record in records.values()})
    for what, found in (("code", codes), ("text", sorted({str(record.get("data")) for record in records.values()}))):
        if len(found) > 1:
            raise ValueError(f"{out / 'records'} mixes results of different {what} ({', '.join(found)}): use --redo")
    if codes[0] != code_hash():
        print(f"made with other code than is here ({codes[0]}, here {code_hash()})")
    write_all(study, records, out, print)
    return 0


def _dry_run(study: Study, facts: dict[str, Facts], out: Path, slots: list[Slot]) -> None:
    """Arms, parameters, tokens and the time that all of it may take."""
    from flexrattn import platform

    device = platform.device_type()
    tuning = study.tuning_runs()
    per_arm = len(tuning) // max(1, len(study.arms))
    seconds = 0.0
    width = max(len(name) for name in facts)
    print(f"{'arm'.ljust(width)}  parameters  cache bytes  layers")
    for name, fact in facts.items():
        cache = "-" if fact.cache_bytes is None else f"{fact.cache_bytes:,}"
        print(f"{name.ljust(width)}  {fact.parameters:>10,}  {cache:>11}  {', '.join(fact.layers)}")
        for runs, tokens in ((per_arm, fact.tuning_tokens), (len(study.seeds), fact.tokens)):
            seconds += runs * (ROUGH_START_SECONDS + tokens * fact.flops_per_token / ROUGH_FLOPS[device])
    first = next(iter(facts.values()))
    if study.tune:
        tried = "; ".join(f"{key}: {', '.join(map(str, values))}" for key, values in study.tune.values.items())
        print(f"tuning: {len(tuning)} runs of {first.tuning_tokens:,} tokens on seed {study.tune.seed} ({tried})")
    print(f"runs: {len(facts)} arms x {len(study.seeds)} seeds of {first.tokens:,} tokens, control {study.control}")
    total = timedelta(seconds=round(seconds / len(slots)))
    print(f"time: very roughly {total} on {device}, {len(slots)} at a time; records go to {out}")
