"""Time parts of RAttention beside what a user would pick instead; nothing with wrong numbers is timed.

    python -m benchmarks.run rla           # the linear branch
    python -m benchmarks.run swa           # the softmax branch over windows
    python -m benchmarks.run rattention    # both branches, their norms and their sum
    python -m benchmarks.run train_step    # whole blocks of a model, forward and backward
    python -m benchmarks.run decode        # whole steps of decoding, beside the paper's formula

Batch x length is --tokens at every length. What each column means: docs/benchmarks.md.
Exit code: 0; 1 if a contender was wrong or one of ours failed; 2 for bad options or no GPU.
"""

from __future__ import annotations

import argparse
import gc
import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks import decode, decode_report, layers
from benchmarks.contenders import Contender, Shape, Unavailable, attention_inputs, rla
from benchmarks.gate import InputsOf, Verdict, verify
from benchmarks.report import Row, environment, set_speedups, table, write_csv, write_plot
from benchmarks.timing import MB, CudaMeter, Meter, first_line, forward_backward, interleave, summarize
from flexrattn import FLAVORS

logger = logging.getLogger("benchmarks")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UPS = 3
# A second length must not make anything dynamic, and nothing may silently go on in eager mode: FlexAttention would then
# compute all T x T scores.
STATIC: dict[str, Any] = {"automatic_dynamic_shapes": False, "recompile_limit": 64, "fail_on_recompile_limit_hit": True}
FORWARD, BOTH = "forward", "forward+backward"


class BadOptions(Exception):
    """A line for the user."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadOptions(message)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one command line asks for."""

    command: str
    contenders: Sequence[Contender]
    shapes: Sequence[Shape]
    inputs_of: InputsOf
    rounds: int
    seed: int
    dtype: str


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    for name, about in (
        ("rla", "the linear branch"),
        ("swa", "the softmax branch over windows"),
        ("rattention", "both branches, their norms and their sum"),
        ("train_step", "whole blocks of a model"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        blocks = name == "train_step"
        add = command.add_argument
        add("--tokens", type=int, default=32768, help="batch x length")
        add("--lengths", type=int, nargs="+", default=[4096, 8192] if blocks else [4096, 8192, 32768], metavar="T")
        if blocks:
            add("--flavor", default="3b", help="model size: heads and widths")
            add("--layers", type=int, default=8)
        else:
            add("--heads", type=int, nargs=2, default=[16, 4], metavar=("QUERY", "KV"))
            add("--width", type=int, default=128, help="of a head")
        if name == "swa":
            windows = [128, 512, 1024, 2048, 4096]
            add("--windows", type=int, nargs="+", default=windows, help="previous keys a query sees")
        else:
            add("--window", type=int, default=512, help="previous keys the softmax branch sees")
        if name == "rla":
            add("--with-torch-scan", action="store_true", help='also impl="torch", which is slow')
            add("--save-every", type=int, nargs="+", default=[], metavar="M", help="also with these states kept")
        if name in ("rla", "rattention"):
            add("--packed", type=int, metavar="TOKENS", help="also rows of documents of this length on average")
        add("--only", nargs="+", metavar="NAME", help="contenders by their names or beginnings of them")
        _add_common(add)
    about = "whole steps of decoding"
    command = commands.add_parser("decode", help=about, description=about)
    decode.add_options(command.add_argument)
    _add_common(command.add_argument)
    return parser


def _add_common(add: Callable[..., Any]) -> None:
    add("--dtype", choices=DTYPES, default="bf16")
    add("--repeats", type=int, default=30, help="rounds; each times every contender once")
    add("--seed", type=int, default=0, help="of the inputs and of the order within a round")
    add("--csv", type=Path)
    add("--plot", type=Path, help="a .png, drawn with matplotlib")
    add("--log", action="store_true", help="say what is being done, and every error of the gate")


def make_plan(options: argparse.Namespace) -> Plan:
    """Check the options and turn them into shapes and contenders. BadOptions says what was given and what would do."""
    blocks = options.command == "train_step"
    windows = list(dict.fromkeys(options.windows if options.command == "swa" else [options.window]))
    if blocks:
        if options.flavor not in FLAVORS:
            raise BadOptions(f"--flavor must be one of {', '.join(FLAVORS)}, got {options.flavor!r}")
        flavor = FLAVORS[options.flavor]
        H, G, D = flavor.n_heads, flavor.n_kv_heads, flavor.head_dim
    else:
        (H, G), D = options.heads, options.width
    sizes = [("--tokens", options.tokens), ("query heads", H), ("KV heads", G), ("--width", D)]
    sizes += [("--layers", options.layers)] if blocks else []
    sizes += [("a length", T) for T in options.lengths]
    for name, size in sizes:
        if size < 1:
            raise BadOptions(f"{name} must be 1 or more, got {size}")
    if H % G:
        raise BadOptions(f"query heads must be a multiple of KV heads, got --heads {H} {G}")
    if D % 2:
        raise BadOptions(f"--width must be even, got {D}")
    _check_outputs(options)
    for window in windows:
        if window < 0:
            raise BadOptions(f"a window must be 0 or more (previous keys a query sees), got {window}")
    for T in options.lengths:
        if options.tokens % T:
            raise BadOptions(f"each length must divide --tokens {options.tokens}, got {T}")
        if options.command != "swa" and options.window >= T - 1:
            raise BadOptions(f"--window must leave keys to the linear branch, got {options.window} with length {T}")
    packed = getattr(options, "packed", None)
    if packed is not None and packed < 1:
        raise BadOptions(f"--packed must be 1 or more (tokens of a document), got {packed}")
    inputs_of: InputsOf = attention_inputs
    if options.command == "rla":
        kept = list(dict.fromkeys(options.save_every))
        if min(kept, default=0) < 0:
            raise BadOptions(f"--save-every must be 0 (none) or more (chunks), got {min(kept)}")
        contenders = rla(options.window, with_torch=options.with_torch_scan, save_every=kept, packed=packed)
        inputs_of = partial(attention_inputs, v_mean=0.3)
    elif options.command == "swa":
        contenders = layers.swa(windows)
    elif options.command == "rattention":
        contenders = layers.rattention(options.window, packed)
    else:
        contenders = layers.train_step(options.flavor, options.window)
        inputs_of = partial(layers.block_inputs, dim=FLAVORS[options.flavor].dim)
    if options.only:
        contenders = _chosen(contenders, options.only)
    shapes = [
        Shape(
            B=options.tokens // T,
            T=T,
            H=H,
            G=G,
            D=D,
            window=windows[0],
            dtype=DTYPES[options.dtype],
            layers=options.layers if blocks else 0,
        )
        for T in dict.fromkeys(options.lengths)
    ]
    return Plan(
        command=options.command,
        contenders=contenders,
        shapes=shapes,
        inputs_of=inputs_of,
        rounds=options.repeats,
        seed=options.seed,
        dtype=options.dtype,
    )


def _chosen(contenders: Sequence[Contender], names: Sequence[str]) -> list[Contender]:
    known = [contender.name for contender in contenders]
    for name in names:
        if not any(each.startswith(name) for each in known):
            raise BadOptions(f"--only must be among {', '.join(known)}, got {name!r}")
    # A whole name is that one alone.
    beginnings = tuple(name for name in names if name not in known)
    return [each for each in contenders if each.name in names or (beginnings and each.name.startswith(beginnings))]


def _check_outputs(options: argparse.Namespace) -> None:
    """What all commands have."""
    if options.repeats < 3:
        raise BadOptions(f"--repeats must be 3 or more, so that there is a median, got {options.repeats}")
    if options.plot is not None and options.plot.suffix != ".png":
        raise BadOptions(f"--plot must end in .png, got {options.plot}")
    for path in (options.csv, options.plot):
        if path is not None and path.is_dir():
            raise BadOptions(f"{path} is a folder, a file is wanted")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """verdict is None where the contender could not be run at all; note is then its reason."""

    verdict: Verdict | None
    note: str
    failed: bool

    @property
    def may_be_timed(self) -> bool:
        return self.verdict is not None and self.verdict.passed


def judge(contender: Contender, plan: Plan, device: torch.device) -> Outcome:
    """The gate's answer for one contender, also where it does not run."""
    try:
        verdict = verify(contender, plan.shapes[0], plan.inputs_of, device, plan.seed)
    except Exception as error:
        logger.info("%s: %s", contender.name, error, exc_info=not isinstance(error, Unavailable))
        return Outcome(verdict=None, note=_refused(contender, error), failed=_is_our_failure(contender, error))
    finally:
        _release(device)
    errors = ", ".join(f"{name} {error:.1e}" for name, error in verdict.errors.items())
    logger.info("%s: %s", contender.name, errors)
    wrong = verdict.error >= verdict.tolerance
    return Outcome(verdict=verdict, note=verdict.describe(), failed=wrong or (contender.ours and not verdict.passed))


def _refused(contender: Contender, error: Exception) -> str:
    if isinstance(error, Unavailable):
        return f"unavailable: {error}"
    return f"{'FAILED' if contender.ours else 'unavailable'}: {first_line(error)}"


def _is_our_failure(contender: Contender, error: Exception) -> bool:
    return contender.ours and not isinstance(error, Unavailable | torch.cuda.OutOfMemoryError)


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def benchmark(plan: Plan, meter: Meter, device: torch.device) -> Iterator[tuple[list[Row], bool]]:
    """Gate every contender once, then time the right ones: for each length its rows, and if anything has failed yet."""
    outcomes = {contender.name: judge(contender, plan, device) for contender in plan.contenders}
    failed = any(outcome.failed for outcome in outcomes.values())
    for shape in plan.shapes:
        logger.info("timing T=%d B=%d", shape.T, shape.B)
        # Programs of other lengths would only make guards longer.
        torch._dynamo.reset()
        rows, broken = time_shape(plan, shape, outcomes, meter, device)
        set_speedups(rows, [contender.name for contender in plan.contenders if contender.baseline])
        failed = failed or broken
        yield rows, failed
        _release(device)


def time_shape(
    plan: Plan, shape: Shape, outcomes: dict[str, Outcome], meter: Meter, device: torch.device
) -> tuple[list[Row], bool]:
    """The rows of one length, without ratios, and whether one of ours failed."""
    tensors = plan.inputs_of(shape, device, plan.seed)
    do = tensors.pop("do")
    inputs = tuple(tensors.values())
    about = environment(device)
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    failed = False
    for contender in plan.contenders:
        row = rows[contender.name] = _empty_row(plan, shape, contender, about)
        outcome = outcomes[contender.name]
        row.note = outcome.note
        if outcome.verdict is not None:
            row.error, row.tolerance = outcome.verdict.error, outcome.verdict.tolerance
        if not outcome.may_be_timed:
            continue
        if contender.window is not None and contender.window >= shape.T:
            row.note = "not run: the window covers the sequence"
            continue
        try:
            prepared = contender.prepare(shape, device)
            both = forward_backward(prepared, inputs, do)
            for _ in range(WARM_UPS):
                both()
            memory = meter.memory(prepared, inputs, do)
        except Exception as error:
            row.note, failed = _refused(contender, error), failed or _is_our_failure(contender, error)
            logger.info("%s: %s", contender.name, error, exc_info=True)
            continue
        row.kept_MB, row.peak_MB = memory.kept / MB, memory.peak / MB
        calls[f"{contender.name}/{FORWARD}"] = partial(prepared.forward, *inputs)
        calls[f"{contender.name}/{BOTH}"] = both
    done = interleave(calls, meter, rounds=plan.rounds, rng=random.Random(plan.seed))
    for contender in plan.contenders:
        row = rows[contender.name]
        names = [f"{contender.name}/{what}" for what in (FORWARD, BOTH)]
        broke = [done.failures[name] for name in names if name in done.failures]
        if broke:
            row.note = broke[0]
            failed = failed or contender.ours
        elif names[0] in calls:
            forward, both_timing = (summarize(done.samples[name]) for name in names)
            row.rounds = plan.rounds
            row.fwd_ms, row.fwd_p20, row.fwd_p80, row.fwd_host_ms = (
                forward.ms,
                forward.p20,
                forward.p80,
                forward.host_ms,
            )
            row.fwdbwd_ms, row.fwdbwd_p20, row.fwdbwd_p80 = both_timing.ms, both_timing.p20, both_timing.p80
            row.fwdbwd_host_ms = both_timing.host_ms
            if forward.gaps or both_timing.gaps:
                row.note = "the GPU may have waited for launches"
    return list(rows.values()), failed


def _empty_row(plan: Plan, shape: Shape, contender: Contender, about: dict[str, Any]) -> Row:
    return Row(
        command=plan.command,
        contender=contender.name,
        T=shape.T,
        B=shape.B,
        H=shape.H,
        G=shape.G,
        D=shape.D,
        window=contender.window,
        layers=shape.layers or None,
        dtype=plan.dtype,
        **about,
    )


def main(arguments: list[str] | None = None) -> int:
    try:
        options = make_parser().parse_args(arguments)
        if options.command == "decode":
            return run_decode(options)
        plan = make_plan(options)
    except BadOptions as error:
        return _refuse(str(error))
    device = find_device()
    if device is None:
        return _refuse(f"needs a CUDA GPU, torch {torch.__version__} sees none on this machine")
    if options.plot is not None and not _can_draw():
        return _refuse("--plot needs matplotlib: pip install matplotlib, or leave it out")
    if options.log:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logger.setLevel(logging.INFO)
    about = environment(device)
    fla = f"flash-linear-attention {about['fla']}" if about["fla"] else "no flash-linear-attention"
    print(f"{plan.command}: {about['device']}, torch {about['torch']}, triton {about['triton']}, {fla}", flush=True)
    rows: list[Row] = []
    failed = False
    with torch._dynamo.config.patch(**STATIC):
        # What is done is on paper, should a later length run out of time.
        for of_length, so_far in benchmark(plan, CudaMeter(), device):
            print(table(of_length), flush=True)
            failed = so_far
            rows += of_length
            if options.csv is not None:
                write_csv(rows, options.csv)
    if options.plot is not None:
        write_plot(rows, options.plot)
    return int(failed)


def run_decode(options: argparse.Namespace) -> int:
    """The command `decode`: its rows are whole steps, so it has columns of its own."""
    try:
        points = decode.points_of(options)
        decode.chosen_arms(options)
    except ValueError as error:
        raise BadOptions(str(error)) from None
    _check_outputs(options)
    device = find_device()
    if device is None:
        return _refuse(f"needs a CUDA GPU, torch {torch.__version__} sees none on this machine")
    if options.plot is not None and not _can_draw():
        return _refuse("--plot needs matplotlib: pip install matplotlib, or leave it out")
    if options.log:
        logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
        logger.setLevel(logging.INFO)
    about = environment(device)
    print(f"decode: {about['device']}, torch {about['torch']}, triton {about['triton']}", flush=True)
    rows: list[decode_report.Row] = []
    with torch._dynamo.config.patch(**STATIC):
        for of_point in decode.benchmark(options, points, device, DTYPES[options.dtype]):
            print(decode_report.table(of_point), flush=True)
            rows += of_point
            if options.csv is not None:
                decode_report.write_csv(rows, options.csv)
    if options.plot is not None:
        decode_report.write_plot(rows, options.plot)
    return int(decode_report.failed(rows))


def find_device() -> torch.device | None:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _refuse(message: str) -> int:
    print(f"benchmarks.run: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _can_draw() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
