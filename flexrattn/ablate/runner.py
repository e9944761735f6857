"""Run a study's runs, some at a time, and keep a record of each: what is done is not done again.

Folders: `out/records/NAME.json` and `out/logs/NAME.log` are small and all that has to be kept; `work/NAME/` holds a
run's configuration, curves and checkpoints while it trains, and nothing is left of its checkpoints when it is done.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

import yaml
from tqdm import tqdm

from flexrattn.ablate.code import code_hash, commit, versions
from flexrattn.ablate.processes import Child, Slot, last_line, start, stop, train_command
from flexrattn.ablate.records import (
    VALIDATION_TAG,
    Record,
    difference,
    metric,
    read_curves,
    read_evaluation,
    read_records,
    write_record,
)
from flexrattn.ablate.study import Facts, Run, Study

IDENTITY = "identity.json"
POLL_SECONDS = 0.1
CURVE_POINTS = 200
# Without tqdm's own estimate, which takes all runs for equally long.
BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
# A run that is ended at the time limit has wasted no more than a GPU that waited: estimates are taken this lightly.
OPTIMISM = 0.85


@dataclass
class Outcome:
    """How a call ended. `stopped`: at the time limit, with runs left to do."""

    records: dict[str, Record]
    failed: list[Record] = field(default_factory=list)
    stopped: bool = False


def check_records(study: Study, records: dict[str, Record], *, code: str | None, redo: bool) -> dict[str, Record]:
    """The records that count. ValueError where one is of another code or configuration, unless it may be redone."""
    good, bad = {}, []
    for run in planned(study, records):
        record = records.get(run.name)
        if record is None:
            continue
        reason = difference(record, run, code)
        if reason is None:
            good[run.name] = record
        else:
            bad.append(f"{run.name}: {reason}")
    if bad and not redo:
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise ValueError(
            f"{study.path}: results are there that do not belong to this study as it is now: {bad[0]}{more}; "
            "run those again with --redo, or choose another --out"
        )
    return good


def planned(study: Study, records: dict[str, Record]) -> list[Run]:
    """Every run whose values are known by now: tuning, then seed by seed all arms, so that a study cut short has whole
    seeds."""
    runs = study.tuning_runs()
    for seed in study.seeds:
        for arm in study.arms:
            choice = chosen(study, arm.name, records)
            if choice is not None:
                runs.append(study.run(arm.name, seed, choice))
    return runs


def chosen(study: Study, arm: str, records: dict[str, Record]) -> dict[str, Any] | None:
    """An arm's tuned values: those with the best metric. None while runs are missing, or when none of them finished.

    A run that failed (a loss that is no number, say) is a value that is not taken.
    """
    if study.tune is None:
        return {}
    tried = [records.get(run.name) for run in study.tuning_runs() if run.arm == arm]
    if any(record is None for record in tried):
        return None
    scores = [
        (score, record["choice"])
        for record in tried
        if record is not None and (score := _score(study, record)) is not None
    ]
    return min(scores, key=lambda pair: pair[0])[1] if scores else None


def _score(study: Study, record: Record) -> float | None:
    if record["status"] != "done":
        return None
    value = metric(record["evaluation"], study.primary)
    return metric(record["evaluation"], "loss") if value is None else value


class Runner:
    """Runs what is missing. `say` prints one line."""

    def __init__(
        self,
        study: Study,
        facts: dict[str, Facts],
        *,
        out: Path,
        work: Path,
        slots: Sequence[Slot],
        ranks: int = 1,
        redo: bool = False,
        retry_failed: bool = False,
        keep_checkpoints: bool = False,
        time_limit: float | None = None,
        command: Callable[..., list[str]] = train_command,
        say: Callable[[str], None] = tqdm.write,
    ):
        self.study, self.facts = study, facts
        self.out, self.work = out, work
        self.slots, self.ranks = list(slots), ranks
        self.redo, self.retry_failed, self.keep_checkpoints = redo, retry_failed, keep_checkpoints
        self.time_limit = time_limit
        self.command, self.say = command, say
        self.code = code_hash()
        self.records: dict[str, Record] = {}
        self.began = time.monotonic()

    def run(self) -> Outcome:
        """Run everything that is missing. KeyboardInterrupt passes through, after the children have ended."""
        self.out.mkdir(parents=True, exist_ok=True)
        with _locked(self.out):
            everything = read_records(self.out / "records")
            self.records = check_records(self.study, everything, code=self.code, redo=self.redo)
            if self.retry_failed:
                self.records = {k: r for k, r in self.records.items() if r["status"] == "done"}
            return self._loop()

    def _planned(self) -> list[Run]:
        return planned(self.study, self.records)

    def _total(self) -> int:
        return len(self.study.tuning_runs()) + len(self.study.arms) * len(self.study.seeds)

    def _loop(self) -> Outcome:
        running: dict[int, tuple[Run, Child]] = {}
        stopped = False
        done_before = len(self.records)
        bar = tqdm(total=self._total(), initial=done_before, disable=None, dynamic_ncols=True, bar_format=BAR)
        if done_before:
            earlier = sum(record["status"] == "failed" for record in self.records.values())
            again = f", {earlier} of them failed: --retry-failed runs those again" if earlier else ""
            self.say(f"{done_before} of {self._total()} runs are there already{again}")
        try:
            while True:
                for place, (run, child) in list(running.items()):
                    code = child.returncode()
                    if code is not None:
                        del running[place]
                        self._finish(run, child, code, [r for r, _ in running.values()])
                        bar.update()
                waiting = self._waiting(running)
                for place in range(len(self.slots)):
                    if place in running or not waiting:
                        continue
                    run = waiting[0]
                    if not self._fits(run):
                        stopped = True
                        break
                    running[place] = (run, self._start(run, self.slots[place]))
                    waiting.pop(0)
                if not running:
                    break
                if self._over():
                    stopped = True
                    stop([child for _, child in running.values()])
                    self.say(f"time limit: {len(running)} runs ended before they were done")
                    running.clear()
                    break
                bar.set_postfix_str(f"{len(running)} running{self._left([r for r, _ in running.values()])}")
                time.sleep(POLL_SECONDS)
        finally:
            stop([child for _, child in running.values()])
            bar.close()
        left = self._waiting({})
        records = {run.name: self.records[run.name] for run in self._planned() if self._done(run)}
        failed = [record for record in records.values() if record["status"] == "failed"]
        return Outcome(records=records, failed=failed, stopped=stopped and bool(left))

    def _waiting(self, running: dict[int, tuple[Run, Child]]) -> list[Run]:
        busy = {run.name for run, _ in running.values()}
        return [run for run in self._planned() if run.name not in busy and not self._done(run)]

    def _done(self, run: Run) -> bool:
        # Tuning that was run again may have chosen another value than a record was made with.
        return self.records.get(run.name, {}).get("config_hash") == run.config_hash

    # ------------------------------------------------------------------------------------------------- one run

    def _start(self, run: Run, slot: Slot) -> Child:
        folder = self.work / run.name
        identity = {"config_hash": run.config_hash, "code_hash": self.code, "data": run.data}
        resumed = self._resumable(run, folder, identity)
        log = self.out / "logs" / f"{run.name}.log"
        if not resumed:
            shutil.rmtree(folder, ignore_errors=True)
            log.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / IDENTITY).write_text(json.dumps(identity))
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({**run.document, "dump_folder": str(folder / "run")}, sort_keys=False))
        if resumed:
            self.say(f"{run.name}: goes on from its checkpoint")
        return start(self.command(config, ranks=self.ranks), slot.environment(), log)

    def _resumable(self, run: Run, folder: Path, identity: dict[str, str | None]) -> bool:
        """Whether a half-done run's checkpoint is there; without one it begins anew."""
        if not list(folder.glob("run/*/step-*/.metadata")):
            return False
        try:
            before = json.loads((folder / IDENTITY).read_text())
        except (OSError, ValueError):
            before = {}
        if before == identity:
            return True
        if not self.redo:
            raise ValueError(
                f"{folder} holds a half-done run of other code or of another configuration: begin it again with "
                "--redo, or choose another --out"
            )
        return False

    def _finish(self, run: Run, child: Child, code: int, running: list[Run]) -> None:
        folder = self.work / run.name
        facts = self.facts[run.arm]
        record: Record = {
            "name": run.name,
            "study": self.study.name,
            "stage": run.stage,
            "arm": run.arm,
            "seed": run.seed,
            "choice": run.choice,
            "config_hash": run.config_hash,
            "code_hash": self.code,
            "data": run.data,
            "commit": commit(),
            "versions": versions(),
            "document": run.document,
            "tokens": facts.tuning_tokens if run.stage == "tune" else facts.tokens,
            "parameters": facts.parameters,
            "window": facts.window,
            "kind": facts.kind,
            "cache_bytes": facts.cache_bytes,
            "seconds": round(child.seconds, 2),
            "log": str(Path("logs") / child.log.name),
        }
        try:
            if code != 0:
                raise ValueError(f"exit code {code}: {last_line(child.log)}")
            curves = read_curves(folder / "run")
            evaluation = read_evaluation(folder / "run", curves)
            expected = int(run.document.get("training", {}).get("steps", evaluation.get("step", 0)))
            if evaluation.get("step", expected) != expected:
                raise ValueError(f"its last evaluation is of step {evaluation['step']}, not of step {expected}")
        except (ValueError, OSError) as error:
            record |= {"status": "failed", "error": str(error)}
        else:
            rates = [value for _, value in curves.get("throughput(tps)", [])[2:]]
            record |= {
                "status": "done",
                # A tuning run is compared by one number alone.
                "evaluation": {k: v for k, v in evaluation.items() if k != "rows" or run.stage == "run"},
                "validation": curves.get(VALIDATION_TAG, []),
                "training": _thinned(curves.get("loss_metrics/global_avg_loss", [])),
                "tokens_per_s": round(statistics.median(rates)) if rates else None,
                "device": _device(child.log),
            }
            if not self.keep_checkpoints:
                for checkpoint in folder.glob("run/*/step-*"):
                    shutil.rmtree(checkpoint, ignore_errors=True)
        write_record(self.out / "records", record)
        self.records[run.name] = record
        self._report(run, record, running)

    def _report(self, run: Run, record: Record, running: list[Run]) -> None:
        place = f"[{len(self.records)}/{self._total()}]"
        if record["status"] == "failed":
            self.say(f"{place} {run.name} FAILED: {record['error']}; log: {self.out / record['log']}")
        else:
            loss = record["evaluation"]["loss"]
            self.say(f"{place} {run.name}: loss {loss:.4f}, {record['seconds']:.0f} s{self._left(running)}")
        tuned = self.study.tune is not None and run.stage == "tune"
        if tuned and all(r.name in self.records for r in self.study.tuning_runs() if r.arm == run.arm):
            choice = chosen(self.study, run.arm, self.records)
            if choice is None:
                self.say(f"{run.arm}: no tuning run finished, so the arm cannot run")
            else:
                self.say(f"{run.arm}: takes " + ", ".join(f"{key} {value}" for key, value in choice.items()))

    # ---------------------------------------------------------------------------------------------------- time

    def seconds(self, stage: str, arm: str) -> float | None:
        """Estimated of one run, by the closest relatives that finished: the arm's, then the stage's, then any."""
        done = [r for r in self.records.values() if r["status"] == "done"]
        fact = self.facts[arm]
        tokens = fact.tuning_tokens if stage == "tune" else fact.tokens
        for relatives in (
            [r for r in done if r["stage"] == stage and r["arm"] == arm],
            [r for r in done if r["stage"] == stage],
            [r for r in done if r["arm"] == arm],
            done,
        ):
            if relatives:
                return statistics.fmean(_expected(r, tokens, self.ranks) for r in relatives)
        return None

    def _left(self, running: list[Run]) -> str:
        ahead = [(r.stage, r.arm) for r in self.study.tuning_runs() if r.name not in self.records]
        present = {(r["stage"], r["arm"], r["seed"]) for r in self.records.values()}
        ahead += [
            ("run", a.name) for a in self.study.arms for s in self.study.seeds if ("run", a.name, s) not in present
        ]
        estimates = [self.seconds(stage, arm) for stage, arm in ahead]
        known = [e for e in estimates if e is not None]
        if not known:
            return ""
        # Runs under way count half.
        total = sum(known) / len(known) * len(estimates) - 0.5 * len(running) * sum(known) / len(known)
        return f"; about {timedelta(seconds=round(max(0.0, total) / len(self.slots)))} left"

    def _over(self) -> bool:
        return self.time_limit is not None and time.monotonic() - self.began > self.time_limit

    def _fits(self, run: Run) -> bool:
        """Whether a run that starts now ends before the time limit, as far as can be told."""
        if self.time_limit is None:
            return True
        estimate = self.seconds(run.stage, run.arm) or 0.0
        return time.monotonic() - self.began + OPTIMISM * estimate < self.time_limit


def _expected(record: Record, tokens: int, ranks: int) -> float:
    """Seconds of a run like `record`'s with so many tokens: what is not training (imports, compilation) stays."""
    if tokens == record["tokens"] or not record["tokens"]:
        return record["seconds"]
    training = record["seconds"] / 2
    if record.get("tokens_per_s"):
        training = min(record["seconds"], record["tokens"] / (record["tokens_per_s"] * ranks))
    return record["seconds"] - training + training * tokens / record["tokens"]


def _thinned(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    every = max(1, -(-len(curve) // CURVE_POINTS))
    return [(step, round(value, 5)) for i, (step, value) in enumerate(curve) if i % every == 0 or i == len(curve) - 1]


def _device(log: Path) -> str:
    """What torchtitan says the run was on: "CUDA capacity: NVIDIA H200 with 139.80GiB memory"."""
    for line in log.read_text(errors="replace").splitlines():
        if " capacity: " in line and " with " in line:
            return line.split(" capacity: ", 1)[1].rsplit(" with ", 1)[0].strip()
    return ""


@contextmanager
def _locked(out: Path) -> Iterator[IO[str]]:
    """One study at a time in a folder; the lock ends with the process, however that ends."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{out} is in use by a study that is running: wait for it, or choose another --out"
            ) from None
        yield file
