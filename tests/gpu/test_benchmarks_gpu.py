"""The benchmarks on a GPU, small: every contender of ours is right and timed. `python -m pytest tests/gpu -m gpu`."""

from __future__ import annotations

import csv

import pytest

from benchmarks import run

pytestmark = pytest.mark.gpu

SIZES = "--tokens 4096 --lengths 2048 1024 --repeats 3"


@pytest.mark.parametrize(
    ("arguments", "timed"),
    [
        ("rla --window 100", ("cuDNN full", "FA2 full", "Flex full", "rla triton", "rla triton compiled")),
        ("rla --window 100 --dtype fp32 --heads 4 2 --with-torch-scan", ("rla triton", "rla torch")),
        ("swa --windows 100 512", ("cuDNN full", "Flex window 512", "Flex window 100")),
        ("rattention --window 100", ("cuDNN full", "rattention core", "rattention core documents")),
        (
            "train_step --window 100 --flavor debug --layers 2",
            ("debug cuDNN full", "debug Flex full", "debug rattention"),
        ),
    ],
    ids=["rla", "rla-fp32", "swa", "rattention", "train_step"],
)
def test_the_command(arguments, timed, tmp_path):
    path = tmp_path / "rows.csv"
    assert run.main([*arguments.split(), *SIZES.split(), "--csv", str(path)]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    for T in ("2048", "1024"):
        found = {row["contender"]: row for row in rows if row["T"] == T}
        for name in timed:
            assert found[name]["note"] == "", found[name]
            assert min(float(found[name][column]) for column in ("fwd_ms", "fwdbwd_ms")) > 0
            assert float(found[name]["peak_MB"]) > float(found[name]["kept_MB"]) >= 0
