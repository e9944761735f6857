"""Real training runs for the tests: a tiny model on a tiny corpus, each in processes of its own.

Importing torch and torchtitan takes ten seconds here, so the processes are forked from a server that has imported them
(and nothing else: no thread, no gradient, no process group). They run the same `main` that `train.py` calls.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import yaml

ROOT = Path(__file__).parents[2]
TIMEOUT = 300

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.flexrattn.preload"])

# Small enough that a step takes a few milliseconds, with every part of the model in place.
TINY = {
    "recipe": "rattention",
    "recipe_args": {
        "flavor": "debug",
        "window": 8,
        # From the first step on both branches matter.
        "swa_norm_init": 1.0,
        "rla_norm_init": 1.0,
        "model": {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48},
        "data": "local",
        "lr": 3e-3,
    },
    "training": {"steps": 8, "seq_len": 64, "local_batch_size": 4, "mixed_precision_param": "float32"},
    "lr_scheduler": {"warmup_steps": 2, "total_steps": 100},
    "metrics": {"log_freq": 1, "disable_color_printing": True},
    "validator": {"enable": False},
    "checkpoint": {"interval": 4, "keep_latest_k": 0},
    "dataloader": {"shard_by": "rows"},
    "debug": {"enable_structured_logging": False},
}


def write_corpus(folder: Path, n_files: int = 24) -> Path:
    """Text files of varied length, some shorter than a row and some longer."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n_files):
        lines = [f"def function_{i}_{j}(x): return x * {i * 31 + j * 7} + {j}" for j in range(1 + i % 9)]
        (folder / f"file_{i:02d}.txt").write_text("\n".join(lines))
    return folder


def write_config(folder: Path, **sections) -> Path:
    """A YAML file with TINY and `sections` merged over it, on a corpus beside it."""
    config = {k: dict(v) if isinstance(v, dict) else v for k, v in TINY.items()}
    config["recipe_args"]["data_path"] = str(write_corpus(folder / "corpus"))
    config["dump_folder"] = str(folder / "out")
    for key, value in sections.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Finished:
    """What a run left: the exit code of its worst rank, and what rank 0 printed on both streams."""

    returncode: int
    output: str


def train(config: Path, *flags: str, ranks: int = 1, check: bool = True, kill_at: str | None = None) -> Finished:
    """Train on `ranks` processes; with `check`, a failure shows the end of what was printed.

    kill_at: SIGKILL every process once rank 0 has printed a line that matches the pattern.
    """
    done = run([str(config), *flags], logs=config.parent, ranks=ranks, kill_at=kill_at)
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.output[-4000:]}")
    return done


def run(
    args: list[str], *, logs: Path, ranks: int = 1, kill_at: str | None = None, python_path: str | None = None
) -> Finished:
    """What `python train.py ARGS` does, its output kept in the folder `logs`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    files = [logs / f"rank_{rank}.log" for rank in range(ranks)]
    processes = []
    for rank, log in enumerate(files):
        log.unlink(missing_ok=True)
        launch = {}
        if ranks > 1:
            launch = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(_server.Process(target=_rank, args=(args, launch, str(log), python_path)))
        processes[-1].start()

    def seen() -> bool:
        return kill_at is not None and files[0].exists() and re.search(kill_at, files[0].read_text()) is not None

    _wait(lambda: all(p.exitcode is not None for p in processes) or seen())
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    worst = max((p.exitcode or 0 for p in processes), key=abs)
    return Finished(worst, files[0].read_text())


def _wait(done: Callable[[], bool]) -> None:
    started = time.monotonic()
    while not done():
        if time.monotonic() - started > TIMEOUT:
            return
        time.sleep(0.02)


def _rank(args: list[str], launch: dict[str, str], log: str, python_path: str | None) -> None:
    """The body of one process."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(launch)
    if python_path is not None:
        sys.path.insert(0, python_path)
    import torchtitan.trainer

    from flexrattn.launch import main

    # It ends with two seconds of waiting for other ranks' last lines; every rank has a log of its own here.
    torchtitan.trainer.time = SimpleNamespace(sleep=lambda seconds: None, perf_counter=time.perf_counter)

    sys.exit(main(args))


def script(*args: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """`python train.py ARGS` itself, or under a launcher's `-m` arguments, as a user types it."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return subprocess.run(
        [sys.executable, *launcher, str(ROOT / "train.py"), *args],
        cwd=ROOT,
        env=inherited,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def losses(out: Path, tag: str = "loss_metrics/global_avg_loss") -> dict[int, float]:
    """Step -> the float32 that TensorBoard holds, the newest run's where steps repeat."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[int, tuple[float, float]] = {}
    for file in sorted(out.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == tag and event.wall_time >= found.get(event.step, (0.0, 0.0))[0]:
                    found[event.step] = (event.wall_time, value.tensor.float_val[0])
    return {step: number for step, (_, number) in sorted(found.items())}
