"""The Triton step without a GPU: some of `interpreted.py`, and its kernels compiled for GPUs that are not there.

All of it takes minutes: `TRITON_INTERPRET=1 python -m pytest tests/flexrattn/decode/interpreted.py`.
FLEXRATTN_ALL_KERNELS=1 compiles every kernel, width and dtype.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexrattn.decode import DecodeCache
from flexrattn.decode.fast import TritonStep, joined_weights, refusal
from tests.flexrattn.decode.models import build

HERE = Path(__file__).parent
EVERYTHING = os.environ.get("FLEXRATTN_ALL_KERNELS") == "1"


def test_steps_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(HERE / "interpreted.py")]
    command += ["-k", "options or products or splits or clock or likeliest or gate and library"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=HERE.parents[2], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_kernels_fit(capability):
    pytest.importorskip("triton")
    from scan_kernels.kernels.resources import SHARED, resources
    from tests.flexrattn.decode.launches import launches

    cases = [(torch.bfloat16, 128, True)]
    if EVERYTHING:
        cases = [
            (dtype, D, options)
            for dtype in (torch.bfloat16, torch.float32)
            for D in (16, 64, 128, 256)
            for options in (False, True)
        ]
    unfit = []
    for dtype, D, options in cases:
        for name, launch in launches(dtype, D, options):
            if not EVERYTHING and capability != 90 and name != "attention ring":
                continue
            found = resources(launch.compile(capability))
            spills = found.spilled > (0 if D <= 128 else 1200)
            if spills or found.shared > SHARED[capability] or found.registers < 8:
                unfit.append(f"sm_{capability} {dtype} D={D}: {name} {found}")
    assert not unfit, "\n".join(unfit)


def test_joined_weights_are_the_modules_own():
    """Written through the module they are seen, a second time they are the same, and a cast model has new ones."""
    model = build(dtype=torch.float32)
    block = model.layers["0"]
    qkv, ffn = block.attention.qkv_linear, block.feed_forward
    before = [x.clone() for x in (qkv.wq.weight, qkv.wk.weight, qkv.wv.weight, ffn.w1.weight, ffn.w3.weight)]
    first, second = joined_weights(block)
    assert torch.equal(first, torch.cat(before[:3]))
    assert torch.equal(second, torch.cat(before[3:]))
    qkv.wk.weight.fill_(2.0)
    assert joined_weights(block)[0] is first
    assert (first[len(before[0]) : -len(before[2])] == 2.0).all()
    model.to(torch.bfloat16)
    assert joined_weights(block)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({}, torch.float32, "needs a CUDA device, the model is on cpu"),
        ({}, torch.float64, "takes bfloat16, float16 and float32, the model is torch.float64"),
        ({"model": {"head_dim": 24}}, torch.float32, "head sizes 16, 32, 64, 128 and 256, the model has 24"),
        (
            {"global_mask": "tests.flexrattn.decode.models:position_parity"},
            torch.float32,
            "takes causal masks and sliding windows, the model has mask 'tests",
        ),
    ],
)
def test_refusals(options, dtype, message, monkeypatch):
    pytest.importorskip("triton")
    if "CUDA" not in message:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    model = build(dtype=dtype, **options)
    assert message in refusal(model.config, device=torch.device("cpu"), dtype=dtype)
    cache = DecodeCache(model.config, rows=1, max_length=8, device="cpu", dtype=dtype)
    with pytest.raises(ValueError, match="use impl 'torch'"):
        TritonStep(model, cache)


@pytest.mark.parametrize("shared", [64, 99, 163, 227])
def test_products_fit_into_the_gpus_shared_memory(shared):
    """Stages are given up, down to two; where there is room, rows and widths decide."""
    pytest.importorskip("triton")
    from flexrattn.decode.product import choose_shape

    stages = []
    for rows in (1, 16, 64):
        for N, K, gated in ((3072, 2048, False), (2048, 6656, False), (6656, 2048, True)):
            shape = choose_shape(rows, N, K, multiprocessors=132, shared=shared * 1024, gated=gated)
            tile = 2 * shape.block_k * ((1 + gated) * shape.block_n + max(16, rows))
            assert shape.num_stages * tile <= shared * 1024
            stages.append(shape.num_stages)
    assert min(stages) >= 2
    assert shared < 163 or max(stages) == 7


def test_a_cache_of_another_dtype_is_refused():
    model = build(dtype=torch.float32)
    cache = DecodeCache(model.config, rows=1, max_length=8, device="cpu", dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="needs a cache of the model's dtype"):
        TritonStep(model, cache)
