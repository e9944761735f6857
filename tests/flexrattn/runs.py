"""Real training runs for the tests: a tiny model on a tiny corpus, through the same `main` that `train.py` calls."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]

# Small enough that a step takes a few milliseconds, with every part of the model in place.
TINY = {
    "recipe": "rattention",
    "recipe_args": {
        "flavor": "debug",
        "window": 8,
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


def environment(**extra: str) -> dict[str, str]:
    """For a run of its own: the CPU, one thread, no launch variables of the process that runs the tests."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    return {**inherited, "FLEXRATTN_DEVICE": "cpu", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **extra}


def command(config: Path, *flags: str, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [*launcher, str(ROOT / "train.py"), str(config), *flags]


def train(config: Path, *flags: str, ranks: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run train.py in processes of its own; with `check`, a failure shows the end of what it printed."""
    done = subprocess.run(
        command(config, *flags, ranks=ranks), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def losses(out: Path, tag: str = "loss_metrics/global_avg_loss") -> dict[int, float]:
    """Step -> the float32 that TensorBoard holds, the newest run's where steps repeat."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[int, tuple[float, float]] = {}
    for file in sorted(out.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag == tag and event.wall_time >= found.get(event.step, (0.0, 0.0))[0]:
                    number = value.tensor.float_val[0] if value.HasField("tensor") else value.simple_value
                    found[event.step] = (event.wall_time, number)
    return {step: number for step, (_, number) in sorted(found.items())}
