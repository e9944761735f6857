"""Studies for the tests, and a train.py that trains nothing: it takes a moment, and its loss is a formula."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

from flexrattn.ablate.processes import Slot
from flexrattn.ablate.runner import Runner
from flexrattn.ablate.study import Facts, Study, load_study

BASE = {
    "recipe": "rattention",
    "recipe_args": {"flavor": "debug", "window": 8, "lr": 0.1},
    "training": {"steps": 4, "seq_len": 64},
}

# Appends its name to `started`, leaves a checkpoint, sleeps, then writes the evaluation; it fails where told to.
FAKE_TRAIN = """
import json, os, sys, time, pathlib
config = pathlib.Path(sys.argv[1])
folder = config.parent / "run"
name = config.parent.name
values = dict(line.strip().split(": ", 1) for line in config.read_text().splitlines() if ": " in line)
checkpoint = folder / "checkpoint" / "step-2"
resumed = (checkpoint / ".metadata").exists()
with open(os.environ["FAKE_STARTED"], "a") as file:
    file.write(f"{name} {'resumed' if resumed else 'new'} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.getpid()}\\n")
print("working on", name, flush=True)
if "broken" in name:
    print("ValueError: this arm is broken", flush=True)
    sys.exit(3)
if os.environ.get("FAKE_CHECKPOINT"):
    checkpoint.mkdir(parents=True, exist_ok=True)
    (checkpoint / ".metadata").touch()
time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
window = 0 if values["window"] == "null" else int(values["window"])
loss = 3 - 0.01 * window + 0.1 * int(values["seed"]) + (float(values["lr"]) - 0.2) ** 2
rows = [[10 * loss + 0.1 * i, 10] for i in range(20)]
groups = {"beyond_window": {"loss": loss + 1, "n": 5}}
folder.mkdir(parents=True, exist_ok=True)
bins = [{"from": 0, "to": 15, "loss": loss - 1, "n": 9}, {"from": 16, "to": 63, "loss": 2 * loss, "n": 9}]
evaluation = {"step": int(values["steps"]), "tokens": 1, "loss": loss, "n_tokens": 200, "groups": groups, "rows": rows}
evaluation["by_position"] = bins
(folder / "eval.json").write_text(json.dumps(evaluation))
"""


def write_study(folder: Path, **changes: Any) -> Path:
    """Two arms, full (window 0 to the fake) and window-4 and window-16 from a grid, two seeds."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    study = {
        "base": str(folder / "base.yaml"),
        "seeds": [1, 2],
        "seed_keys": ["debug.seed"],
        "arms": {
            "full": {"recipe_args": {"layer_kind": "full", "window": None}},
            "window": {"recipe_args.layer_kind": "swa", "grid": {"recipe_args.window": [4, 16]}},
        },
        "metrics": ["groups.beyond_window.loss"],
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
    return path


def facts(study: Study) -> dict[str, Facts]:
    """Without building a model."""
    windows = {arm.name: arm.document["recipe_args"]["window"] for arm in study.arms}
    return {
        name: Facts(
            parameters=10,
            window=window,
            kind="full" if window is None else "swa",
            seq_len=64,
            tokens=400,
            tuning_tokens=200,
            flops_per_token=1,
            cache_bytes=1000 + 10 * (window or 64),
        )
        for name, window in windows.items()
    }


def fake_runner(path: Path, *, slots: int = 1, devices: list[str] | None = None, **options: Any) -> Runner:
    """A runner in the study's folder; what it says is kept in `runner.said`."""
    script = path.parent / "fake_train.py"
    script.write_text(FAKE_TRAIN)
    study = load_study(path)
    said: list[str] = []
    places: list[str | None] = list(devices) if devices else [None] * slots
    runner = Runner(
        study,
        facts(study),
        out=path.parent / "out",
        work=path.parent / "work",
        slots=[Slot(devices=place, threads=1) for place in places],
        command=lambda config, *, ranks: [sys.executable, "-S", str(script), str(config)],
        say=said.append,
        **options,
    )
    runner.said = said  # type: ignore[attr-defined]
    return runner


def started(path: Path) -> list[list[str]]:
    """(run, "new" or "resumed", devices, process) of every start so far."""
    file = path.parent / "started"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def record(path: Path, name: str) -> dict[str, Any]:
    return json.loads((path.parent / "out/records" / f"{name}.json").read_text())
