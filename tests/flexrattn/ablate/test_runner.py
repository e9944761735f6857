"""Runs: nothing done is done again, nothing of other code or configuration is mixed in, a failure stops no other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from flexrattn.ablate import runner as runner_module
from flexrattn.ablate.cli import _slots, main
from flexrattn.ablate.records import metric, read_evaluation
from tests.flexrattn.ablate.studies import fake_runner, record, started, write_study

NAMES = [f"run-{arm}-seed{seed}" for seed in (1, 2) for arm in ("full", "window-4", "window-16")]


@pytest.fixture(autouse=True)
def _environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_STARTED", str(tmp_path / "started"))


def alive(pid: int) -> bool:
    """A process that has ended and that nobody has waited for counts as ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_all_runs_in_order_and_never_twice(tmp_path):
    path = write_study(tmp_path)
    outcome = fake_runner(path).run()
    assert [line[0] for line in started(path)] == NAMES
    assert not outcome.failed
    assert not outcome.stopped
    assert record(path, "run-window-16-seed2")["evaluation"]["loss"] == pytest.approx(3 - 0.16 + 0.2 + 0.01)
    again = fake_runner(path)
    assert again.run().records.keys() == set(NAMES)
    assert len(started(path)) == len(NAMES)
    assert again.said == ["6 of 6 runs are there already"]


def test_parallel_jobs_get_a_device_each(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.5")
    path = write_study(tmp_path)
    began = time.monotonic()
    fake_runner(path, devices=["0", "1", "3"]).run()
    # Six runs of half a second, three at a time: well under the three seconds of one after another.
    assert time.monotonic() - began < 2.5
    by_device: dict[str, int] = {}
    for _, _, device, _ in started(path):
        by_device[device] = by_device.get(device, 0) + 1
    assert by_device == {"0": 2, "1": 2, "3": 2}


def test_a_failed_arm_is_reported_and_stops_no_other(tmp_path):
    path = write_study(tmp_path, arms={"good": {"recipe_args.window": 4}, "broken": {}, "fine": {}})
    first = fake_runner(path)
    outcome = first.run()
    assert [r["name"] for r in outcome.failed] == ["run-broken-seed1", "run-broken-seed2"]
    assert outcome.failed[0]["error"] == "exit code 3: ValueError: this arm is broken"
    assert "working on run-broken-seed1" in (tmp_path / "out" / outcome.failed[0]["log"]).read_text()
    assert sum(r["status"] == "done" for r in outcome.records.values()) == 4
    assert any("run-broken-seed1 FAILED: exit code 3" in line and "logs/" in line for line in first.said)
    fake_runner(path).run()
    assert len(started(path)) == 6
    fake_runner(path, retry_failed=True).run()
    assert [line[0] for line in started(path)[6:]] == ["run-broken-seed1", "run-broken-seed2"]


def test_a_run_without_an_evaluation_has_failed(tmp_path):
    path = write_study(tmp_path)
    runner = fake_runner(path)
    runner.command = lambda config, *, ranks: ["true"]
    outcome = runner.run()
    assert len(outcome.failed) == 6
    assert "holds neither eval.json nor a validation loss" in outcome.failed[0]["error"]


def test_an_evaluation_of_another_step_is_not_taken(tmp_path):
    """What an interrupted run left behind is no result of a whole one."""
    path = write_study(tmp_path)
    runner = fake_runner(path)
    script = tmp_path / "fake_train.py"
    script.write_text(script.read_text().replace('int(values["steps"])', "2"))
    outcome = runner.run()
    assert "its last evaluation is of step 2, not of step 4" in outcome.failed[0]["error"]


def run_in_a_process(path: Path, **options) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=lambda: fake_runner(path, **options).run())
    process.start()
    return process


@pytest.mark.parametrize("checkpoint", [True, False], ids=["checkpoint", "none"])
def test_killed_study_goes_on(tmp_path, monkeypatch, checkpoint):
    """kill -9 in the third run: it ends with its study, and the next call redoes none of the two that were done."""
    path = write_study(tmp_path)
    if checkpoint:
        monkeypatch.setenv("FAKE_CHECKPOINT", "1")
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    process = run_in_a_process(path)
    third = tmp_path / "work" / NAMES[2]
    log = tmp_path / "out/logs" / f"{NAMES[2]}.log"
    wait_for(lambda: log.exists() and "working" in log.read_text())
    if checkpoint:
        wait_for((third / "run/checkpoint/step-2/.metadata").exists)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    orphan = int(started(path)[2][3])
    wait_for(lambda: not alive(orphan), seconds=5)
    assert not (third / "run/eval.json").exists()
    assert not (tmp_path / "out/records" / f"{NAMES[2]}.json").exists()
    fake_runner(path).run()
    assert [line[:2] for line in started(path)[3:]] == [
        [NAMES[2], "resumed" if checkpoint else "new"],
        *([name, "new"] for name in NAMES[3:]),
    ]
    # Checkpoints of finished runs are not kept.
    assert not list((tmp_path / "work").glob("*/run/*/step-*"))


def test_interrupt_ends_the_children(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    path = write_study(tmp_path)
    process = run_in_a_process(path, slots=2)
    wait_for(lambda: len(started(path)) == 2)
    os.kill(process.pid, signal.SIGINT)
    process.join(20)
    assert process.exitcode not in (None, 0)
    assert not any(alive(int(line[3])) for line in started(path))
    assert not list((tmp_path / "out").glob("records/*.json"))


def test_other_configuration_is_refused_and_redone_on_request(tmp_path):
    path = write_study(tmp_path)
    fake_runner(path).run()
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    base["training"]["steps"] = 5
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(ValueError, match=r"training\.steps was 4, is 5.* \(and 5 more\).*--redo"):
        fake_runner(path).run()
    assert len(started(path)) == 6
    fake_runner(path, redo=True).run()
    assert len(started(path)) == 12
    assert record(path, NAMES[0])["document"]["training"]["steps"] == 5


def test_other_code_is_refused(tmp_path, monkeypatch):
    path = write_study(tmp_path)
    fake_runner(path).run()
    monkeypatch.setattr(runner_module, "code_hash", lambda: "0123456789abcdef")
    with pytest.raises(ValueError, match=r"other code or versions .* now 0123456789abcdef"):
        fake_runner(path).run()
    outcome = fake_runner(path, redo=True).run()
    assert {r["code_hash"] for r in outcome.records.values()} == {"0123456789abcdef"}


def test_other_text_under_the_same_name_is_refused(tmp_path):
    prepared = tmp_path / "text"
    prepared.mkdir()
    (prepared / "tokens.json").write_text('{"fingerprint": "aaaa"}')
    path = write_study(tmp_path, set={"recipe_args": {"data": "tokens", "data_path": str(prepared)}})
    fake_runner(path).run()
    (prepared / "tokens.json").write_text('{"fingerprint": "bbbb"}')
    with pytest.raises(ValueError, match=r"another text \(aaaa, now bbbb\)"):
        fake_runner(path).run()


def test_half_done_run_of_another_configuration_does_not_go_on(tmp_path):
    path = write_study(tmp_path)
    folder = tmp_path / "work" / NAMES[0]
    (folder / "run/checkpoint/step-2").mkdir(parents=True)
    (folder / "run/checkpoint/step-2/.metadata").touch()
    (folder / "identity.json").write_text('{"config_hash": "other"}')
    with pytest.raises(ValueError, match="half-done run of other code or of another configuration"):
        fake_runner(path).run()
    fake_runner(path, redo=True).run()
    assert started(path)[0][:2] == [NAMES[0], "new"]


def test_tuning_takes_each_arms_best(tmp_path):
    tune = {"values": {"recipe_args.lr": [0.1, 0.25, 0.9]}, "seed": 7, "set": {"training.steps": 2}}
    path = write_study(tmp_path, tune=tune)
    runner = fake_runner(path)
    outcome = runner.run()
    names = [line[0] for line in started(path)]
    assert names[:9] == [
        f"tune-{arm}-{lr}-seed7" for lr in (0.1, 0.25, 0.9) for arm in ("full", "window-4", "window-16")
    ]
    assert names[9:] == NAMES
    assert record(path, names[0])["document"]["training"]["steps"] == 2
    assert record(path, NAMES[0])["document"]["training"]["steps"] == 4
    assert all(outcome.records[name]["choice"] == {"recipe_args.lr": 0.25} for name in NAMES)
    assert record(path, NAMES[0])["document"]["recipe_args"]["lr"] == 0.25
    assert any(line == "full: takes recipe_args.lr 0.25" for line in runner.said)


def test_time_limit_starts_no_run_that_cannot_end(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "0.4")
    path = write_study(tmp_path)
    outcome = fake_runner(path, time_limit=1.3).run()
    assert outcome.stopped
    assert 1 <= len(started(path)) < 6
    assert len(outcome.records) == len(started(path))
    assert not fake_runner(path).run().stopped
    assert len(started(path)) == 6


def test_one_study_at_a_time_in_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "60")
    path = write_study(tmp_path)
    process = run_in_a_process(path)
    wait_for(lambda: len(started(path)) == 1)
    with pytest.raises(ValueError, match="in use by a study that is running"):
        fake_runner(path).run()
    os.kill(process.pid, signal.SIGINT)
    process.join(20)


@pytest.mark.parametrize(
    "text", ['{"name": "run-full-se', "[]", '{"name": "run-full-seed1"}'], ids=["half", "list", "bare"]
)
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = write_study(tmp_path)
    (tmp_path / "out" / "records").mkdir(parents=True)
    (tmp_path / "out" / "records" / "run-full-seed1.json").write_text(text)
    with pytest.raises(ValueError, match=r"records/run-full-seed1\.json is no record .*: remove it"):
        fake_runner(path).run()


def test_a_folder_that_is_a_file_is_one_line(tmp_path, capsys):
    path = write_study(tmp_path)
    (tmp_path / "file").touch()
    assert main([str(path), "--out", str(tmp_path / "file"), "--only", "full"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_metrics_are_dotted_paths():
    evaluation = {"loss": 1.5, "by_position": [{"loss": 2.0}, {"loss": 3}], "groups": {"a": {"n": float("nan")}}}
    assert metric(evaluation, "loss") == 1.5
    assert metric(evaluation, "by_position.1.loss") == 3.0
    for absent in ("by_position.2.loss", "groups.a", "groups.a.n", "groups.b.n", "loss.x"):
        assert metric(evaluation, absent) is None


def test_evaluation_falls_back_to_the_curves(tmp_path):
    assert read_evaluation(tmp_path, {"validation_metrics/loss": [(0, 9.0), (4, 2.5)]}) == {"step": 4, "loss": 2.5}
    (tmp_path / "eval.json").write_text('{"step": 4, "loss": 2.25}')
    assert read_evaluation(tmp_path, {"validation_metrics/loss": [(4, 2.5)]})["loss"] == 2.25
    (tmp_path / "eval.json").write_text('{"step": 4}')
    with pytest.raises(ValueError, match="no number 'loss'"):
        read_evaluation(tmp_path, {})


class Arguments:
    jobs: int | None = None
    jobs_per_device = 1
    nproc = 1
    devices: str | None = None


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({}, [None]),
        ({"jobs": 3}, [None] * 3),
        ({"devices": "0,2"}, ["0", "2"]),
        ({"devices": "0,2", "jobs_per_device": 2}, ["0", "2", "0", "2"]),
        ({"devices": "0,1,2,3", "nproc": 2}, ["0,1", "2,3"]),
        ({"devices": "0,1", "jobs": 1}, ["0"]),
    ],
)
def test_slots(changes, places):
    arguments = Arguments()
    arguments.__dict__.update(changes)
    assert [slot.devices for slot in _slots(arguments)] == places


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"jobs": 0}, "--jobs must be positive"),
        ({"devices": "0,x"}, "--devices must be different numbers"),
        ({"devices": "1,1"}, "--devices must be different numbers"),
        ({"devices": "0,1,2", "nproc": 2}, "cannot be dealt to runs of --nproc 2"),
        ({"jobs_per_device": 2}, "--jobs-per-device needs --devices"),
    ],
)
def test_bad_slots(changes, said):
    arguments = Arguments()
    arguments.__dict__.update(changes)
    with pytest.raises(ValueError, match=said):
        _slots(arguments)
