"""`python -m flexrattn.inspect` on a GPU: what is measured, and a training step without faults."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexrattn.inspect import command, health
from flexrattn.inspect.problem import load

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
CONFIG = ("configs/rattn_150m.yaml", "--compile.enable", "--recipe_args.loss", "cross_entropy")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """In a process of its own: the suite's tells torchtitan to use the CPU."""
    out = tmp_path_factory.mktemp("inspected")
    options = ("--seq-len", "2048", "--batch", "2", "--device", "cuda", "--out", str(out))
    done = subprocess.run(
        [sys.executable, "-m", "flexrattn.inspect", *CONFIG, *options],
        cwd=ROOT,
        env=os.environ | {"FLEXRATTN_DEVICE": "cuda"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text()


def test_a_training_step_has_no_breaks_no_syncs_and_no_recompilations(report):
    found = report[0]["health"]
    assert (found["graph_breaks"], found["host_syncs"], found["recompiles"]) == ([], [], [])
    assert found["graphs"] >= 2


def test_a_host_sync_in_a_step_is_found():
    x = torch.ones(3, device="cuda")
    with health.host_syncs() as found:
        x.sum().item()  # waits
        x.add_(1)
    (event,) = found
    with open(__file__) as file:
        line = next(i for i, text in enumerate(file, 1) if text.rstrip().endswith("# waits"))
    assert event.where == f"tests/gpu/test_inspect_gpu.py:{line}"


def test_kernels_are_those_that_were_launched(report):
    """Nothing that the run showed is at odds with what was compiled, and everything was timed."""
    made = report[0]
    assert not [text for text in made["warnings"] if "launched" in text]
    for layer in made["layers"]:
        for kernel in layer["kernels"]:
            if kernel["group"] in ("linear branch", "softmax branch"):
                assert 0 < kernel["measured_s"] < 0.1, kernel["name"]
                # The smallest may find all that they read in the L2 cache.
                assert 0 < kernel["share"] < (1.05 if kernel["measured_s"] > 2e-5 else 4), kernel["name"]


def test_flex_kernels_are_described(report):
    for layer in report[0]["layers"]:
        forward, backward = (k for k in layer["kernels"] if k["group"] == "softmax branch")
        for kernel, blocks in ((forward, ("BLOCK_M", "BLOCK_N")), (backward, ("BLOCK_M1", "BLOCK_N1"))):
            assert all(kernel["options"][name] >= 16 for name in blocks), kernel["name"]
            assert kernel["registers"] > 0
            assert kernel["warps"] in (1, 2, 4, 8, 16)
            assert kernel["tensor_cores"]
            assert kernel["dynamic"] is False
        assert layer["flex"]["dynamic"] is False
        assert layer["flex"]["recompiles"] == []


def test_traced_memory_is_what_was_measured(report):
    for layer in report[0]["layers"]:
        kept = layer["memory"]
        assert kept["traced"] == pytest.approx(kept["measured"], rel=0.1), layer["name"]
        assert kept["traced_checkpointed"] == pytest.approx(kept["measured_checkpointed"], rel=0.1), layer["name"]


def test_ceilings_are_measured(report):
    gpu = report[0]["gpu"]
    assert gpu["measured"]
    assert gpu["device"] == torch.cuda.get_device_name()
    assert 1e14 < gpu["bf16"] < 5e15
    assert 5e11 < gpu["bandwidth"] < 2e13


def test_another_architecture_is_compiled_only(capsys, monkeypatch):
    monkeypatch.setenv("FLEXRATTN_DEVICE", "cuda")
    other = "sm_80" if torch.cuda.get_device_capability() != (8, 0) else "sm_90"
    made = load(
        "configs/debug.yaml",
        [],
        layers=["local"],
        seq_len=None,
        batch=None,
        dtype=None,
        documents=None,
        arch=other,
        gpu=None,
        device="auto",
    )
    assert not made.on_device
    with pytest.raises(SystemExit) as stop:
        command.main(["configs/debug.yaml", "--arch", other, "--device", "cuda"])
    assert stop.value.code == 2
    assert "leave --arch out" in capsys.readouterr().err
