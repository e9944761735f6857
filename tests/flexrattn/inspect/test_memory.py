"""What layers keep between forward and backward, traced without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from flexrattn.inspect import memory
from flexrattn.inspect.problem import load


def problem(source: str, *flags: str, **options):
    defaults = {"layers": ["local", "global"], "seq_len": 256, "batch": 2, "dtype": "bf16"}
    others = {"documents": None, "arch": None, "gpu": None, "device": "cpu"}
    return load(source, flags, **(defaults | others | options))


def kept(made, checkpointing: bool = False) -> list[int]:
    return [memory.trace(made, layer, checkpointing=checkpointing).kept_bytes for layer in made.layers]


def test_full_checkpointing_keeps_the_output_alone():
    made = problem("configs/debug.yaml", "activation-checkpoint:full")
    output = 2 * 256 * made.model.dim * 2
    # Besides the layer's output (its input is the layer's before) nothing larger than the masks' and tables' indices.
    for bytes_ in kept(made, checkpointing=True):
        assert output <= bytes_ < 1.1 * output


def test_selective_checkpointing_keeps_less_than_none():
    made = problem("configs/debug.yaml", "activation-checkpoint:selective", layers=["local"])
    for less, more in zip(kept(made, checkpointing=True), kept(made), strict=True):
        assert less < 0.8 * more


def test_kept_memory_grows_with_the_tokens():
    (one,), (two,) = (kept(problem("configs/debug.yaml", batch=batch, layers=["local"])) for batch in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.05)


def test_the_3b_layer_keeps_what_was_measured():
    """docs/kernels.md: 8 local layers keep 22.3 GB for 32768 tokens, 18.7 GB with full attention (H200, measured)."""
    made = problem("configs/rattn_3b.yaml", seq_len=4096, batch=8, layers=["local"])
    assert 8 * kept(made)[0] == pytest.approx(22.3e9, rel=0.05)
    made = problem("configs/full_3b.yaml", seq_len=4096, batch=8, layers=["local"])
    assert 8 * kept(made)[0] == pytest.approx(18.7e9, rel=0.05)


def test_products_are_those_of_the_weights():
    """Forward two FLOPs a weight and token, backward twice that."""
    made = problem("configs/debug.yaml", layers=["local"])
    (layer,) = made.layers
    block = memory.make_block(made, layer, device="meta")
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    traced = memory.trace(made, layer)
    assert sum(m.flops for m in traced.forward) == 2 * weights * 2 * 256
    assert sum(m.flops for m in traced.backward) == 4 * weights * 2 * 256


def test_a_layer_is_traced_as_it_runs_on_a_gpu():
    """By the kernels, or by torch operations where "auto" takes those; an explicit choice stays."""

    def impl(*flags: str) -> str | None:
        made = problem("configs/debug.yaml", *flags, layers=["local"])
        return memory._kernels_impl(made, made.layers[0])

    assert impl() == "triton"
    assert impl("--recipe_args.model.head_dim", "48") == "torch"
    assert impl("--recipe_args.scan_impl", "torch") is None


def test_a_drawn_window_is_traced_as_in_training():
    """As data: the keys that it shifts are kept besides what a fixed window keeps."""
    fixed = problem("configs/debug.yaml", layers=["local"])
    flags = (
        "--recipe_args.local_mask.stochastic_window.low",
        "8",
        "--recipe_args.local_mask.stochastic_window.high",
        "9",
    )
    assert kept(problem("configs/debug.yaml", *flags, layers=["local"]))[0] > kept(fixed)[0]
