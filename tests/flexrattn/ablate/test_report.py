"""Tables, CSV and picture of records, and a study of real runs through train.py."""

from __future__ import annotations

import csv
import shutil

import pytest
import yaml

from flexrattn.ablate.cli import main
from flexrattn.ablate.report import by_position, compare, present_metrics, write_all
from tests.flexrattn.ablate.studies import fake_runner, write_study
from tests.flexrattn.runs import write_config

TUNE = {"values": {"recipe_args.lr": [0.1, 0.25]}, "set": {"training.steps": 2}}


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The study of `write_study`, tuned, with every run done."""
    monkeypatch.setenv("FAKE_STARTED", str(tmp_path / "started"))
    path = write_study(tmp_path, tune=TUNE)
    runner = fake_runner(path)
    return path, runner.study, runner.run().records


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_files(finished, tmp_path):
    _, study, records = finished
    said: list[str] = []
    write_all(study, records, tmp_path / "report", said.append)
    results = rows(tmp_path / "report/results.csv")
    assert len(results) == 6 + 6
    one = next(row for row in results if row["arm"] == "window-16" and row["seed"] == "2" and row["stage"] == "run")
    # The fake's formula, with the better of the learning rates.
    assert float(one["loss"]) == pytest.approx(3 - 0.16 + 0.2 + 0.05**2, rel=1e-5)
    assert float(one["groups.beyond_window.loss"]) == pytest.approx(float(one["loss"]) + 1, rel=1e-5)
    assert (one["recipe_args.lr"], one["window"], one["cache_bytes"], one["status"]) == ("0.25", "16", "1160", "done")
    assert one["torch"]
    assert len(one["code_hash"]) == 16

    compared = rows(tmp_path / "report/comparisons.csv")
    loss = next(row for row in compared if row["metric"] == "loss" and row["arm"] == "window-16")
    # Every seed differs alike: the interval is a point, and the bootstrap over equal shifts as well.
    for column in ("difference", "low_95", "high_95", "bootstrap_low", "bootstrap_high"):
        assert float(loss[column]) == pytest.approx(-0.16, abs=1e-6)
    assert loss["verdict"] == "better"
    assert loss["control"] == "full"

    page = (tmp_path / "report/table.md").read_text()
    assert "| window-16 | 10 | 1,160 | 0.25 | 2.9925 | 2.9425 | 3.0425 | -0.1600 [-0.1600, -0.1600] |" in page
    assert "## Tuning" in page
    assert "0.25 (at the edge of what was tried)" in page
    assert "missing" not in page
    assert (tmp_path / "report/plot.png").read_bytes()[:4] == b"\x89PNG"
    assert said == [f"wrote results.csv, comparisons.csv and table.md, plot.png in {tmp_path / 'report'}"]


def test_half_a_study_says_what_is_missing(finished, tmp_path):
    _, study, records = finished
    del records["run-full-seed2"]
    records["run-window-4-seed1"] |= {"status": "failed", "error": "exit code 1: a | b", "log": "logs/x.log"}
    write_all(study, records, tmp_path / "report", print)
    page = (tmp_path / "report/table.md").read_text()
    assert "**2 of 6 runs are missing.**" in page
    assert "| run-window-4-seed1 | exit code 1: a \\| b | logs/x.log |" in page
    # window-16 shares one seed with full, window-4 none.
    assert "(one seed)" in page
    assert {c.arm for c in compare(study, records, ["loss"])} == {"window-16"}


def test_absent_metrics_are_said(finished):
    _, study, records = finished
    said: list[str] = []
    for record in records.values():
        del record["evaluation"]["groups"]
    assert present_metrics(study, records, said.append) == ["loss"]
    assert said == ["not in the runs' evaluation, and left out: groups.beyond_window.loss"]


def test_loss_by_position_beside_the_control(finished):
    _, study, records = finished
    found = by_position(study, records)
    assert found.keys() == {"window-4", "window-16"}
    x, y = found["window-16"]
    assert x == [8.5, 40.5]
    assert y == pytest.approx([-0.16, -0.32])
    # Bins that differ cannot be compared.
    records["run-full-seed1"]["evaluation"]["by_position"][0]["to"] = 14
    assert by_position(study, records) == {}


def test_report_alone(finished, tmp_path, capsys):
    path, _, _ = finished
    out = tmp_path / "out"
    assert main([str(path), "--out", str(out), "--report"]) == 0
    assert (out / "table.md").is_file()
    assert main([str(path), "--out", str(tmp_path / "empty"), "--report"]) == 2
    assert "holds no record" in capsys.readouterr().err
    base = tmp_path / "base.yaml"
    base.write_text(base.read_text().replace("steps: 4", "steps: 6"))
    assert main([str(path), "--out", str(out), "--report"]) == 2
    assert "another configuration (training.steps was 4, is 6)" in capsys.readouterr().err


def test_report_never_mixes_code(finished, tmp_path, capsys):
    path, _, _ = finished
    record = tmp_path / "out/records/run-full-seed1.json"
    text = record.read_text()
    code = text.partition('"code_hash": "')[2][:16]
    record.write_text(text.replace(code, "0123456789abcdef"))
    assert main([str(path), "--out", str(tmp_path / "out"), "--report"]) == 2
    assert "mixes results of different code" in capsys.readouterr().err


def test_a_real_study(tmp_path, capsys):
    """Two arms through train.py, at the same time: losses, table and picture are there; again, nothing runs."""
    base = write_config(
        tmp_path,
        training={"steps": 4},
        validator={"enable": True, "freq": 100, "steps": 2},
        checkpoint={"enable": False},
    )
    study = {
        "base": str(base),
        "seeds": [5],
        "arms": {"full": {"recipe_args": {"layer_kind": "full", "window": None}}, "rattention": {}},
    }
    path = tmp_path / "real.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    command = [str(path), "--out", str(tmp_path / "study"), "--jobs", "2"]
    assert main(command) == 0, capsys.readouterr()
    results = {row["arm"]: row for row in rows(tmp_path / "study/results.csv")}
    assert results.keys() == {"full", "rattention"}
    assert results["rattention"]["window"] == "8"
    assert results["rattention"]["tokens"] == str(4 * 4 * 64)
    # Bytes at random would be ln 320 = 5.77; four steps leave that behind.
    assert all(3.5 < float(row["loss"]) < 5.7 for row in results.values())
    assert results["full"]["loss"] != results["rattention"]["loss"]
    assert (tmp_path / "study/plot.png").is_file()
    assert "one seed" in (tmp_path / "study/table.md").read_text()
    shutil.rmtree(tmp_path / "study/work")
    assert main(command) == 0
    assert not (tmp_path / "study/work").exists()
