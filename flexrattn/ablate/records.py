"""Records of runs: one small JSON file each, written when the run ends. They are all that tables are made of."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexrattn.ablate.study import Run

Record = dict[str, Any]
EVALUATION = "eval.json"
VALIDATION_TAG = "validation_metrics/loss"
# What every record has, of a run that is done or failed.
NEEDED = ("name", "stage", "arm", "seed", "choice", "config_hash", "code_hash", "tokens", "seconds", "status")


def read_evaluation(dump_folder: Path, curves: Mapping[str, list[tuple[int, float]]]) -> dict[str, Any]:
    """A run's eval.json, or else the last validation loss of its curves. ValueError where there is neither."""
    path = dump_folder / EVALUATION
    if path.is_file():
        evaluation = json.loads(path.read_text())
        if not isinstance(evaluation, dict) or not isinstance(evaluation.get("loss"), int | float):
            raise ValueError(f"{path} has no number 'loss'")
        return evaluation
    if curves.get(VALIDATION_TAG):
        step, loss = curves[VALIDATION_TAG][-1]
        return {"step": step, "loss": loss}
    raise ValueError(
        f"{dump_folder} holds neither {EVALUATION} nor a validation loss among its curves: the base configuration "
        "needs validator.enable and metrics.enable_tensorboard"
    )


def read_curves(dump_folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) in the order of the steps, the newest run's where steps repeat."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, dict[int, tuple[float, float]]] = {}
    for file in sorted(dump_folder.rglob("events.out.tfevents.*")):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if not value.HasField("tensor") or not value.tensor.float_val:
                    continue
                steps = found.setdefault(value.tag, {})
                if event.wall_time >= steps.get(event.step, (0.0, 0.0))[0]:
                    steps[event.step] = (event.wall_time, value.tensor.float_val[0])
    return {tag: [(step, number) for step, (_, number) in sorted(steps.items())] for tag, steps in found.items()}


def metric(evaluation: Mapping[str, Any], path: str) -> float | None:
    """The number at a dotted path such as "groups.beyond_window.loss" or "by_position.3.loss"; None: not there."""
    value: Any = evaluation
    for key in path.split("."):
        if isinstance(value, Mapping):
            value = value.get(key)
        elif isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        else:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def write_record(folder: Path, record: Record) -> None:
    """Whole or not at all: a reader never sees half a record."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{record['name']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record) + "\n")
    os.replace(part, path)


def read_records(folder: Path) -> dict[str, Record]:
    """Name -> record."""
    records = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            for key in NEEDED:
                record[key]
            records[record["name"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record ({type(error).__name__}: {error}): remove it") from None
    return records


def difference(record: Mapping[str, Any], run: Run, code: str | None) -> str | None:
    """Why a record is not that of `run` with this code, in a few words; None: it is. code None: of any code."""
    if record["config_hash"] != run.config_hash:
        return f"another configuration ({first_difference(record.get('document'), run.document)})"
    if run.data is not None and record.get("data") != run.data:
        return f"another text ({record.get('data')}, now {run.data})"
    if code is not None and record["code_hash"] != code:
        return f"other code or versions ({record['code_hash']} {record.get('commit', '')}, now {code})"
    return None


def first_difference(before: Any, now: Any, path: str = "") -> str:
    """ "training.steps was 3, is 4"."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            if before.get(key) != now.get(key):
                return first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
        return "the same"
    return f"{path} was {before!r}, is {now!r}"
