"""The command line: one report, or two side by side."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Never

import torch

from flexrattn.inspect import compare, device, health, memory, scan
from flexrattn.inspect import report as reports
from flexrattn.inspect.compiler import NotOneGraph
from flexrattn.inspect.gpus import GPUS, LIMITS
from flexrattn.inspect.page import page
from flexrattn.inspect.paths import without_paths
from flexrattn.inspect.problem import DTYPES, Problem, load
from flexrattn.inspect.text import to_text
from flexrattn.launch import TRACEBACK_VARIABLE
from flexrattn.suggest import did_you_mean

_ENDINGS = {"python": "py", "ttir": "ttir", "gluon": "gluon", "ttgir": "ttgir", "ptx": "ptx", "sass": "sass"}


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> Never:
        self.exit(2, f"flexrattn.inspect: error: {' '.join(message.split())}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="python -m flexrattn.inspect",
        description="What the compilers made of a configuration's layers: kernels, work, memory, graph health.",
        epilog="Behind the configuration also train.py's flags: --recipe_args.window 128, --compile.enable, ...",
        allow_abbrev=False,
    )
    parser.add_argument("config", nargs="?", help="a YAML file, such as configs/rattn_3b.yaml")
    parser.add_argument(
        "--compare", nargs=2, metavar=("A", "B"), help="two YAML files or saved report.json, side by side"
    )
    parser.add_argument(
        "--layer", nargs="+", default=["local", "global"], metavar="WHICH", help="local, global or an index; both kinds"
    )
    parser.add_argument("--seq-len", type=int, help="tokens of a row (default: the configuration's)")
    parser.add_argument("--batch", type=int, help="rows (default: the configuration's local_batch_size)")
    parser.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: the configuration's mixed_precision_param)")
    parser.add_argument("--documents", metavar="N,N,...", help="lengths that each row is packed from (default: one)")
    parser.add_argument("--arch", help=f"{', '.join(LIMITS)} (default: the GPU's here, else sm_90)")
    parser.add_argument("--gpu", help=f"whose roofline: {', '.join(GPUS)} (default: the one here, else by --arch)")
    parser.add_argument(
        "--device",
        choices=("auto", "cuda", "cpu"),
        default="auto",
        help="cuda: run the layers, too, on a GPU that must be here; cpu: compile only; auto: cuda where there is one",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.html, report.json and kernels/ there")
    parser.add_argument("--sass", action="store_true", help="also disassemble the kernels of the linear branch")
    parser.add_argument(
        "--embed",
        nargs="*",
        default=["python", "ttgir"],
        choices=("python", "ttir", "gluon", "ttgir", "ptx", "sass"),
        help="the texts that go into report.html (default: python ttgir); kernels/ holds all",
    )
    parser.add_argument(
        "--processes", type=int, default=min(8, os.cpu_count() or 1), help="that compile (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 with one line on stderr for input that does not fit; 130 when interrupted."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    parser = _parser()
    mine, flags = _split(sys.argv[1:] if arguments is None else arguments)
    given, rest = parser.parse_known_args(mine)
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:4.0f} s  {text}", file=sys.stderr, flush=True)

    try:
        # What is wrong here is the user's; what goes wrong behind it keeps its traceback, but for the two below.
        _check(given, rest)
        sources = [_source(name, given, flags) for name in given.compare or [given.config]]
        if given.out is not None:  # a folder that cannot be had is told before the work
            given.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError, NotImplementedError, AssertionError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        parser.error(str(error) or type(error).__name__)
    try:
        made = [
            make_report(source, processes=given.processes, with_sass=given.sass, say=say)
            if isinstance(source, Problem)
            else source
            for source in sources
        ]
    except NotOneGraph as error:
        parser.error(f"a layer cannot be compiled as one graph: {error}")
    except torch.OutOfMemoryError as error:
        parser.error(f"the GPU's memory is too small for these shapes, use a smaller --batch or --seq-len: {error}")
    shown = compare.to_text(*made) if given.compare else to_text(made[0], encoding=_encoding())
    print(shown)
    if given.out is not None:
        written = _write_both(made[0], made[1], given.out) if given.compare else _write(made[0], given.out, given.embed)
        print(f"\n{written}")
    say("done")
    return 0


def _check(given: argparse.Namespace, rest: Sequence[str]) -> None:
    if rest:
        _refuse(rest)
    if (given.config is None) == (given.compare is None):
        raise ValueError("give one configuration, or two with --compare (python -m flexrattn.inspect --help)")
    if given.processes < 1:
        raise ValueError(f"--processes must be positive, got {given.processes}")
    if given.out is not None and given.out.exists() and not given.out.is_dir():
        raise ValueError(f"--out {given.out} is a file: name a folder")


def _source(name: str, given: argparse.Namespace, flags: Sequence[str]) -> Problem | dict[str, Any]:
    """A configuration, or for --compare a report that was saved."""
    return _saved(name) if given.compare and name.endswith(".json") else _load(name, given, flags)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(this command's arguments, those of train.py): --section.key [value], and member choices such as
    activation-checkpoint:full."""
    mine, theirs = [], []
    given = list(arguments)
    while given:
        argument = given.pop(0)
        name, equals, _ = argument.partition("=")
        if name.startswith("--") and "." in name:
            theirs.append(argument)
            if not equals and given and not given[0].startswith("--"):
                theirs.append(given.pop(0))
        elif re.fullmatch(r"[a-z_-]+:[a-z_-]+", argument):
            theirs.append(argument)
        else:
            mine.append(argument)
    return mine, theirs


def _refuse(rest: Sequence[str]) -> None:
    known = [name for action in _parser()._actions for name in action.option_strings if name.startswith("--")]
    for flag in rest:
        if flag.startswith("-"):
            raise ValueError(f"unknown flag {flag}{did_you_mean(flag, known)}; known: {', '.join(known)}")
    raise ValueError(f"one configuration is looked at at a time, got {rest[0]!r} as well: use --compare A B for two")


def _documents(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(length) for length in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--documents takes lengths such as 1000,96,3000, got {text!r}") from error


def _load(source: str, given: argparse.Namespace, flags: Sequence[str]) -> Problem:
    problem = load(
        source,
        flags,
        layers=given.layer,
        seq_len=given.seq_len,
        batch=given.batch,
        dtype=given.dtype,
        documents=_documents(given.documents),
        arch=given.arch,
        gpu=given.gpu,
        device=given.device,
    )
    for layer in problem.layers:
        if layer.attention.residual is not None:
            scan.why_no_kernels(layer.attention.residual.impl, memory.scan_shape_of(problem, layer))
    return problem


def make_report(
    problem: Problem, *, processes: int, with_sass: bool = False, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Everything about a problem; what takes a GPU where `problem.on_device`. `say` is told what begins."""
    unexpected: list[str] = []
    with scan.compilers(processes) as compile_jobs:
        if problem.on_device:
            say("measuring what this GPU reaches")
            problem = dataclasses.replace(problem, gpu=device.ceilings(problem.gpu))
        made = reports.head_of(problem)
        made["layers"] = []
        for layer in problem.layers:
            say(f"{layer.name} layer: compiling the linear branch, tracing")
            found = reports.layer_report(problem, layer, compile_jobs, with_sass=with_sass)
            made["layers"].append(found)
            if problem.on_device:
                say(f"{layer.name} layer: torch.compile, running")
                odd = device.measure_layer(problem, layer, found, problem.gpu)
                unexpected += [f"{layer.name}, {text}" for text in odd]
    made["health"] = None
    if problem.on_device and problem.dtype in health.DTYPES:
        say("a training step")
        made["health"] = health.watch_step(problem)
    made["memory"] = reports.model_memory(made["layers"], len(problem.model.layers))
    made["warnings"] = unexpected + reports.warnings_of(made)
    return made


def _encoding() -> str:
    return "utf" if (sys.stdout.encoding or "").lower().startswith("utf") else "ascii"


def _write(made: dict[str, Any], out: Path, embed: Sequence[str]) -> str:
    """report.html, report.json and every text of every kernel; one line that says where."""
    for layer in made["layers"]:
        for number, kernel in enumerate(layer["kernels"]):
            kernel.sources = {stage: without_paths(source) for stage, source in kernel.sources.items()}
            for stage, source in kernel.sources.items():
                name = re.sub(r"\W+", "_", kernel.name)[:60].strip("_")
                path = Path(
                    "kernels", layer["name"].replace(" ", "_"), f"{number:02d}_{kernel.phase}_{name}.{_ENDINGS[stage]}"
                )
                (out / path).parent.mkdir(parents=True, exist_ok=True)
                (out / path).write_text(source)
                kernel.files[stage] = path.as_posix()
    (out / "report.json").write_text(json.dumps(reports.to_json(made), indent=1) + "\n")
    (out / "report.html").write_text(page(made, embed=embed))
    return f"{out / 'report.html'}, {out / 'report.json'}, texts of the kernels in {out / 'kernels'}"


def _write_both(a: dict[str, Any], b: dict[str, Any], out: Path) -> str:
    (out / "compare.html").write_text(compare.to_page(a, b))
    (out / "compare.json").write_text(json.dumps([reports.to_json(x) for x in (a, b)], indent=1) + "\n")
    return f"{out / 'compare.html'}, {out / 'compare.json'}"


def _saved(name: str) -> dict[str, Any]:
    """A report.json."""
    try:
        plain = json.loads(Path(name).read_text())
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist: give a YAML file or a report.json that --out wrote") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from None
    return reports.from_json(plain, name)
