"""The Triton step under Triton's interpreter on the CPU, against the torch step. `test_fast.py` runs this file.

fp32 throughout: the interpreter computes products of half precision wrongly.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import decode as benchmark
from flexrattn.decode import DecodeCache, decode_step, fast, prefill
from flexrattn.decode.engine import EagerStepper, Engine
from flexrattn.decode.fast import TritonStep, TritonStepper
from flexrattn.decode.glue import launch_add_norm
from flexrattn.decode.product import launch_split_product
from flexrattn.decode.sampling import Sampling
from tests.closeness import relative_error
from tests.flexrattn.decode.models import build, random_tokens

KINDS = {
    "rattention": {"fold_every": 1},
    "folded in threes": {"fold_every": 3},
    "relu": {"feature_map": "relu", "fold_every": 2},
    "one half": {"feature_map": "softmax_single", "window": 0},
    "linear only": {"window": None, "learned_qk_scale": True},
    "options": {"learned_initial_state": True, "learned_qk_scale": True, "fold_every": 2},
    "no norms": {"branch_norm": False, "model": {"qk_norm": False, "activation": "gelu", "n_kv_heads": 1}},
    "swa": {"layer_kind": "swa", "window": 33},
    "full": {"layer_kind": "full", "window": None, "pattern": ["local"]},
}


def caches(model, rows, **options):
    return [
        DecodeCache(model.config, rows=rows, max_length=100, device="cpu", dtype=torch.float32, **options)
        for _ in range(2)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_torch_steps(kind):
    """Rows of different lengths, one that rests, several splits; and the caches hold the same afterwards."""
    options = dict(KINDS[kind])
    fold_every = options.pop("fold_every", 1)
    model = build(dtype=torch.float32, **options)
    expected_cache, cache = caches(model, 3, fold_every=fold_every)
    prompt, counts = random_tokens(3, 40), [40, 3, 6]
    for each in (expected_cache, cache):
        prefill(model, each, prompt, rows=[0, 1, 2], counts=counts)
    step = TritonStep(model, cache, multiprocessors=5)
    for i in range(5):
        token, active = random_tokens(3, seed=10 + i), torch.tensor([True, True, i % 2 == 0])
        expected = decode_step(model, expected_cache, token, active)
        got = step(token, active)
        assert relative_error(got[active], expected[active]) < 1e-5, i
    for a, b in zip(cache.layers, expected_cache.layers, strict=True):
        for name, x in a.tensors().items():
            assert relative_error(x, b.tensors()[name]) < 1e-5, name
    assert torch.equal(cache.lengths_B, expected_cache.lengths_B)


def test_a_slot_of_garbage_is_never_read():
    """Slots behind the length hold NaN: a new row has read none of its ring."""
    model = build(dtype=torch.float32)
    expected_cache, cache = caches(model, 1)
    for layer in cache.layers:
        layer.k_BGSD.fill_(torch.nan)
        # Values are multiplied by weights of zero, and 0 * NaN is NaN: so only keys are poisoned.
    step = TritonStep(model, cache)
    for i in range(9):
        token, active = random_tokens(1, seed=i), torch.tensor([True])
        assert relative_error(step(token, active), decode_step(model, expected_cache, token, active)) < 1e-5


@pytest.mark.parametrize(("rows", "parts"), [(1, 2), (5, 3), (17, 6)])
def test_a_product_in_parts(rows, parts):
    """What the next norm adds up is the product, and rows behind the last are not written."""
    torch.manual_seed(rows)
    x, weight, h = torch.randn(rows, 384), torch.randn(128, 384), torch.randn(rows, 128)
    launch, out = launch_split_product(x, weight, parts)
    launch.args["out"] = padded = torch.full((parts * rows + 1, 128), torch.nan)
    launch.run()
    assert padded[-1].isnan().all()
    out.copy_(padded[:-1].view_as(out))
    expected = h + x @ weight.T
    norm = torch.empty_like(h)
    launch_add_norm(h, out, torch.ones(128), 1e-6, norm).run()
    assert relative_error(h, expected) < 1e-6
    assert relative_error(norm, expected * expected.square().mean(1, keepdim=True).rsqrt()) < 1e-5


def test_the_engine_draws_the_same():
    model = build(dtype=torch.float32)
    results = []
    for stepper in (EagerStepper, TritonStepper):
        engine = Engine(model, slots=2, max_length=32, lag=1, fold_every=2, stepper=stepper)
        for i, n in enumerate((4, 9, 2)):
            engine.add(random_tokens(n, seed=n).tolist(), max_new_tokens=5, sampling=Sampling(temperature=1.0, seed=i))
        results.append(engine.run())
    assert results[0] == results[1]


@pytest.mark.parametrize("arm", ["RAttention-7", "SWA-9", "full, ours", "full, library"])
def test_the_benchmarks_gate(arm, monkeypatch):
    """It passes what is right, and sees a key of the window that is not read."""
    monkeypatch.setattr(benchmark, "GATE_SLOTS", 40)
    monkeypatch.setitem(benchmark.LIBRARY, "math", benchmark._sdpa(SDPBackend.MATH))
    (chosen,) = [each for each in benchmark.arms(7, 9) if each.name == arm]
    options = SimpleNamespace(flavor="debug", seed=0, fold_every=2, tuning=["resident=5", "block_f=8"])
    cpu = torch.device("cpu")
    tolerance = benchmark.TOLERANCE[torch.float32]
    assert benchmark.gate(chosen, options, cpu, torch.float32, "math") < tolerance
    if not chosen.library:
        right = fast.make_clock

        def early(cache, active):
            clock = right(cache, active)
            return dataclasses.replace(clock, position_B=clock.position_B + 1)

        monkeypatch.setattr(fast, "make_clock", early)
        assert not benchmark.gate(chosen, options, cpu, torch.float32, "math") < tolerance
