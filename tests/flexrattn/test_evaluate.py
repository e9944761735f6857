"""The command on checkpoints that training wrote: a run's own numbers again, other lengths, and bad input."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from flexrattn import evaluate
from flexrattn.decode.checkpoint import export, find_checkpoint
from flexrattn.evaluate import Evaluator
from flexrattn.evaluation import GROUPS
from tests.flexrattn.runs import train, write_config

# torchdata's, of a name that torch no longer wants called.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Heads split and decayed, which decoding refuses; steps 4 and 8, and what the run measured at 8."""
    folder = tmp_path_factory.mktemp("trained")
    validator = {"enable": True, "freq": 100, "steps": 3, "dataloader": {"validation_fraction": 0.5}}
    flags = ["--recipe_args.layer_kind", "hymba", "--recipe_args.decay_gate", "true"]
    train(write_config(folder, validator=validator), *flags)
    return folder / "out"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("FLEXRATTN_DEVICE", "cpu")


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = evaluate.main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def close(actual: dict, expected: dict) -> None:
    assert actual["n_tokens"] == expected["n_tokens"]
    assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for name in GROUPS:
        assert actual["groups"][name]["n"] == expected["groups"][name]["n"]
        assert actual["groups"][name]["loss"] == pytest.approx(expected["groups"][name]["loss"], rel=1e-6)


def test_the_runs_own_numbers_again(trained, tmp_path, capsys):
    out = tmp_path / "eval.json"
    code, table, _ = command(capsys, "--checkpoint", str(trained), "--out", str(out))
    assert code == 0
    measured, again = (json.loads(path.read_text()) for path in (trained / "eval.json", out))
    close(again, measured)
    assert again.pop("branches")["branches/layer_00/linear_rms"] > 0
    assert again.keys() == measured.keys()
    for key in ("step", "tokens", "reference_window"):
        assert again[key] == measured[key]
    assert [n for _, n in again["rows"]] == [n for _, n in measured["rows"]]
    for (actual, _), (expected, _) in zip(again["rows"], measured["rows"], strict=True):
        assert actual == pytest.approx(expected, rel=1e-6)
    assert "step 8, rows of 64 tokens" in table
    assert f"{again['groups']['bigram_beyond_window']['loss']:.4f}" in table


def test_lengths_read_as_many_tokens(trained, tmp_path, capsys):
    out = tmp_path / "eval.json"
    base = ["--checkpoint", str(trained), "--steps", "2", "--reference-window", "16", "--out", str(out)]
    code, table, _ = command(capsys, *base, "--lengths", "16", "64", "256", "384")
    assert code == 0
    results = json.loads(out.read_text())["lengths"]
    assert [each["seq_len"] for each in results] == [16, 64, 256, 384]
    # 2 batches of 4 rows of 64 tokens; 384 divides them not, and reads on to the end of a row.
    assert [sum(n for _, n in each["rows"]) for each in results] == [512, 512, 512, 768]
    assert [each["by_position"][-1]["to"] for each in results] == [15, 63, 255, 383]
    assert {each["reference_window"] for each in results} == {16}
    assert "rows of 384 tokens" in table


def test_export_and_an_older_step(trained, tmp_path):
    exported = export(find_checkpoint(trained), tmp_path / "exported")
    newest, older, copied = (Evaluator.load(x) for x in (trained, trained / "checkpoint/step-4", exported))
    assert newest.trained == copied.trained == (8, 8 * 4 * 64)
    assert older.trained == (4, 4 * 4 * 64)
    result = newest.evaluate(steps=1)
    close(copied.evaluate(steps=1), result)
    assert older.evaluate(steps=1)["loss"] != result["loss"]


def test_other_text_to_its_end(trained, tmp_path):
    text = "a b c d e f g h " * 40
    (tmp_path / "mine.txt").write_text(text)
    result = Evaluator.load(trained, data_path=str(tmp_path / "mine.txt")).evaluate(steps=-1)
    # Bytes with a begin and an end token: every one but the first is predicted.
    assert result["n_tokens"] == len(text) + 1
    # Padding behind the end is in no group.
    assert sum(group["n"] for group in result["groups"].values()) == 2 * result["n_tokens"]


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    base = ["--checkpoint", str(trained)]
    for arguments, message in (
        (["--checkpoint", str(tmp_path / "absent")], "does not exist"),
        ([], "--checkpoint"),
        ([*base, "--lengths", "0"], "length must be from 1 to the model's limit 131072, got 0"),
        ([*base, "--lengths", "200000"], "length must be from 1 to the model's limit 131072, got 200000"),
        ([*base, "--steps", "0"], "batch_size and steps must be positive (steps -1: all), got 4 and 0"),
        ([*base, "--batch-size", "0"], "batch_size and steps must be positive (steps -1: all), got 0 and 3"),
        ([*base, "--reference-window", "-3"], "reference_window must be an integer >= 0 (tokens), got -3"),
        ([*base, "--data-path", str(tmp_path / "absent.txt")], "absent.txt"),
        ([*base, "--out", str(tmp_path)], "is a folder: name a file"),
        ([*base, "--steps", "1", "--out", f"{__file__}/eval.json"], "test_evaluate.py"),
        ([*base, "--length", "x"], "invalid int value: 'x'"),
    ):
        code, _, error = command(capsys, *arguments)
        assert code == 2, arguments
        assert message in error
        assert error.count("\n") == 1, error


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_checkpoint_is_one_line(trained, tmp_path, capsys, damage):
    shutil.copytree(trained, tmp_path / "run")
    shard = max((tmp_path / "run" / "checkpoint").glob("step-*/*.distcp"))
    if damage == "gone":
        shard.unlink()
    else:
        os.truncate(shard, 1000)
    code, _, error = command(capsys, "--checkpoint", str(tmp_path / "run"))
    assert code == 2
    assert "cannot be read" in error
    assert error.count("\n") == 1, error
