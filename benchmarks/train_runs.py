"""Train each configuration for a few steps in a process of its own, and tabulate what the log and the curves hold.

    python -m benchmarks.train_runs --steps 50 configs/debug.yaml configs/rattn_30m.yaml
    python -m benchmarks.train_runs --steps 50 configs/rattn_150m.yaml \
        "configs/rattn_150m.yaml --recipe_args.layer_kind swa --recipe_args.window 2048" \
        "configs/rattn_150m.yaml --recipe_args.layer_kind full --recipe_args.window null"

Each argument is a command line of train.py. The rate is the median over logged intervals behind the first two, which
hold compilation; the memory is the most that torch's allocator reserved. A run that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

COLUMNS = ("run", "loss_first", "loss_last", "tokens_per_s", "tflops", "peak_GiB", "device", "torch", "triton")


def curves(folder: Path) -> dict[str, list[float]]:
    """Every scalar that TensorBoard holds under `folder`, in the order of the steps."""
    found: dict[str, list[float]] = {}
    for file in sorted(folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.HasField("tensor"):
                    found.setdefault(value.tag, []).append(value.tensor.float_val[0])
    return found


def run(command_line: str, *, steps: int, log: Path, extra: list[str]) -> dict[str, object]:
    """One row of the table; the whole log goes to `log`."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "train.py", *shlex.split(command_line), "--training.steps", str(steps)]
        command += ["--dump_folder", out, "--metrics.log_freq", "5", "--validator.no-enable"]
        command += ["--checkpoint.no-enable", *extra]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        log.write_text(done.stdout)
        row: dict[str, object] = {"run": command_line, "torch": torch.__version__, "triton": triton.__version__}
        row["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        if done.returncode:
            return {**row, "loss_first": f"exit code {done.returncode}", "loss_last": f"see {log.name}"}
        scalars = curves(Path(out))
    losses = scalars["loss_metrics/global_avg_loss"]
    return {
        **row,
        "loss_first": round(losses[0], 4),
        "loss_last": round(losses[-1], 4),
        "tokens_per_s": round(statistics.median(scalars["throughput(tps)"][2:])),
        "tflops": round(statistics.median(scalars["tflops"][2:]), 1),
        "peak_GiB": round(max(scalars["memory/max_reserved(GiB)"]), 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="command lines of train.py")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("outputs/train_runs"), help="folder for the CSV and the logs")
    parser.add_argument("--extra", default="", help="flags added to every run")
    args = parser.parse_args()
    if args.steps < 20:
        parser.error(f"--steps must be 20 or more, so that intervals without compilation remain; got {args.steps}")
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, command_line in enumerate(args.runs):
        log = args.out / f"run_{i}.log"
        rows.append(run(command_line, steps=args.steps, log=log, extra=shlex.split(args.extra)))
        print(" | ".join(f"{k}={rows[-1].get(k)}" for k in COLUMNS[:6]), flush=True)
    with (args.out / "train_runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return int(any("tokens_per_s" not in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
