"""Layer options on a GPU: kernels against float64 on the CPU, and train.py with compiled blocks and validation."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.attention import ResidualLinearBranch
from flexrattn.evaluation import GROUPS
from tests.closeness import relative_error
from tests.flexrattn.runs import losses

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "decay-gate": {"decay_gate": True},
    "decay-gate-linear-only": {"decay_gate": True, "window": None},
    "hymba": {"layer_kind": "hymba"},
    "hymba-decay-gate": {"layer_kind": "hymba", "decay_gate": True},
    "global-rope": {"global_rope": True, "rla_norm_init": 0.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer_on_the_gpu_is_the_layer_in_float64(options):
    """Output, input gradient and parameter gradients in fp32, packed documents, a length that no block divides."""
    T = 389
    size = resolve_flavor("debug", {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32})
    config = build_model_config(size, make_layers(**{"window": 40, "pattern": ["local", "global"], **options}))
    torch.manual_seed(0)
    with torch.no_grad():
        exact = config.build()
        exact.init_weights()
        for parameter in exact.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2) + (parameter.ndim == 1))
        fast = config.build().cuda()
        fast.load_state_dict(exact.state_dict())
        # Tables of rotations are no part of the state.
        for ours, theirs in zip(fast.buffers(), exact.buffers(), strict=True):
            ours.copy_(theirs)
    exact.double()
    positions = torch.cat([torch.arange(n) for n in (1, 200, 188)]).expand(2, T)
    x, grad = torch.randn(2, T, 64), torch.randn(2, T, 64)
    for layer in ("0", "1"):
        found = []
        for model, device, dtype in ((exact, "cpu", torch.float64), (fast, "cuda", torch.float32)):
            attention = model.layers[layer].attention
            leaf = x.detach().to(device, dtype).requires_grad_(True)
            places = positions.to(device)
            y = attention(leaf, model.get_attention_masks(places), places)
            y.backward(grad.to(device, dtype))
            found.append({"y": y, "x": leaf.grad} | {name: p.grad for name, p in attention.named_parameters()})
        for name, expected in found[0].items():
            # The kernels hold a decay's gradient to 5e-5 in fp32 (test_triton_gpu.py), and its sum over these tokens,
            # which the gate's parameters get, cancels forty-fold.
            tolerance = 2e-3 if name.startswith("decay_gate") else 2e-4
            error = relative_error(found[1][name], expected)
            print(f"layer {layer} {name}: {error:.1e}")
            assert error < tolerance, (layer, name)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=str)
def test_gates_gradients(precision, tolerance):
    """What A_log and dt_bias get is a sum over tokens that cancels; it survives bf16."""
    T, D = 2048, 64
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v, grad = (torch.randn(2, T, n, D, generator=gen, device="cuda").bfloat16() for n in (4, 2, 2, 4))
    decay = -0.2 * torch.rand(2, T, 2, generator=gen, device="cuda")
    positions = torch.arange(T, device="cuda").expand(2, T)
    found = []
    for dtype, impl in ((torch.float64, "torch"), (precision, "triton")):
        branch = ResidualLinearBranch.Config(window=128, impl=impl).build()
        leaf = (decay.double() if dtype == torch.float64 else decay).clone().requires_grad_(True)
        o = branch(q.to(dtype), k.to(dtype), v.to(dtype), positions=positions, decay=leaf)
        assert o.dtype == dtype
        o.backward(grad.to(dtype))
        found.append((leaf.grad, (leaf.grad * leaf.detach()).sum((0, 1))))
    assert relative_error(found[1][0], found[0][0]) < tolerance
    assert relative_error(found[1][1], found[0][1]) < 1e-2


@pytest.mark.parametrize("options", [OPTIONS["hymba-decay-gate"], OPTIONS["decay-gate"], OPTIONS["global-rope"]],
                         ids=["hymba-decay-gate", "decay-gate", "global-rope"])  # fmt: skip
def test_trains_compiled_and_validates(options, tmp_path):
    """Blocks are compiled whole (fullgraph), in bf16; validation writes its groups and the branches' shares."""
    flags = [part for key, value in options.items() for part in (f"--recipe_args.{key}", json.dumps(value))]
    flags += ["--training.steps", "30", "--lr_scheduler.warmup_steps", "5", "--validator.steps", "2"]
    flags += ["--training.mixed_precision_param", "bfloat16", "--compile.enable", "--checkpoint.no-enable"]
    done = subprocess.run(
        [sys.executable, "train.py", "configs/debug.yaml", *flags, "--dump_folder", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "FLEXRATTN_DEVICE": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    loss = list(losses(tmp_path).values())
    assert all(map(math.isfinite, loss))
    assert loss[-1] < loss[0] - 1
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["step"] == 30
    assert all(math.isfinite(result["groups"][name]["loss"]) for name in GROUPS)
    shares = losses(tmp_path, "branches/layer_00/linear_over_softmax")
    assert list(shares) == [0, 30]
    assert all(value > 0 for value in shares.values())
