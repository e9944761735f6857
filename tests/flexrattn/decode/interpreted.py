"""The Triton step under Triton's interpreter on the CPU, against the torch step. `test_fast.py` runs this file.

fp32 throughout: the interpreter computes products of half precision wrongly.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as nnf
from torch.nn.attention import SDPBackend

from benchmarks import decode as benchmark
from flexrattn.decode import DecodeCache, clock, decode_step, prefill
from flexrattn.decode.engine import EagerStepper, Engine
from flexrattn.decode.fast import TritonStep, TritonStepper, Tuning
from flexrattn.decode.layer import make_clock
from flexrattn.decode.product import FusedProducts, Shape, choose_shape
from flexrattn.decode.sampling import Sampling
from flexrattn.decode.step import finish_step
from scan_kernels.kernels.decode_attention import Parts
from scan_kernels.kernels.decode_combine import launch_decode_combine
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
    "odd width": {"model": {"ffn_dim": 40}},
    "odd words": {"model": {"vocab_size": 67}},
}


def caches(model, rows, **options):
    return [
        DecodeCache(model.config, rows=rows, max_length=100, device="cpu", dtype=torch.float32, **options)
        for _ in range(2)
    ]


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_torch_steps(kind, late):
    """Rows of different lengths, one that rests, several splits; and the caches hold the same afterwards."""
    options = dict(KINDS[kind])
    fold_every = options.pop("fold_every", 1)
    model = build(dtype=torch.float32, **options)
    expected_cache, cache = caches(model, 3, fold_every=fold_every)
    prompt, counts = random_tokens(3, 40), [40, 3, 6]
    for each in (expected_cache, cache):
        prefill(model, each, prompt, rows=[0, 1, 2], counts=counts)
    step = TritonStep(model, cache, multiprocessors=5, tuning=Tuning(late_pending=late))
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


@pytest.mark.parametrize("activation", ["gelu", "silu"])
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_products_with_their_neighbours(rows, activation):
    """Addition, norm, gate; parts in any order; scratch memory of garbage, and rows behind the last are not written."""
    torch.manual_seed(rows)
    W, K, N, ffn = 128, 384, 192, 96
    o, table, token = torch.randn(rows, K), torch.randn(7, W), torch.randint(7, (rows,))
    wo, qkv = torch.randn(W, K) * 0.1, torch.randn(N, W) * 0.1
    gate_up, w2 = torch.randn(2 * ffn, W) * 0.1, torch.randn(W, ffn) * 0.1
    norms = [torch.nn.RMSNorm(W, eps=1e-5) for _ in range(3)]
    for norm in norms:
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    weights = [(qkv, False), (wo, False), (w2, False), (gate_up, True)]
    products = FusedProducts.build(weights, rows=rows, W=W, multiprocessors=12)
    assert choose_shape(rows, W, K, multiprocessors=12).parts == (3 if rows <= 16 else 6)
    padded = torch.full((rows + 1, W), torch.nan)
    products = dataclasses.replace(products, h=padded[:-1], x=products.x.fill_(torch.nan))
    products.embed(token, table, norms[0])
    h = table[token]
    for _ in range(2):
        qkv_parts = products.unscaled(qkv, norms[0])
        summed = qkv_parts.parts.sum(0) / (qkv_parts.squares.sum(0)[:, None] / W + 1e-5).sqrt()
        assert relative_error(summed, norms[0](h) @ qkv.T) < 1e-6
        assert relative_error(products.normed(qkv, norms[0]), norms[0](h) @ qkv.T) < 1e-6
        products.add(o, wo, next_norm=norms[1])
        h = h + o @ wo.T
        assert relative_error(products.h, h) < 1e-6
        gate, up = (norms[1](h) @ gate_up.T).split(ffn, dim=1)
        acted = nnf.gelu(gate, approximate="tanh") if activation == "gelu" else nnf.silu(gate)
        gated = products.normed(gate_up, norms[1], activation=activation)
        assert relative_error(gated, acted * up) < 1e-6
        products.launch(gated, w2, Shape(block_n=products.square, block_k=32), next_norm_W=norms[0].weight).run()
        h = h + gated @ w2.T
        assert relative_error(products.h, h) < 1e-6
    assert padded[-1].isnan().all()


@pytest.mark.parametrize("splits", [1, 64, 150])
def test_any_number_of_splits_is_put_together(splits):
    """More than are loaded at once, some of which saw nothing; a head that saw nothing at all gives zeros."""
    gen = torch.Generator().manual_seed(splits)
    B, G, R, D = 2, 2, 2, 16
    sums = torch.randn(B, G, splits, R, D, generator=gen)
    each_max = 20 * torch.randn(B, G, splits, R, generator=gen)
    weights = torch.rand(B, G, splits, R, generator=gen) + 0.5
    nothing = torch.rand(B, G, splits, R, generator=gen) < 0.3
    nothing[0, 1, :, 1] = True
    each_max[nothing], weights[nothing], sums[nothing] = -torch.inf, 0.0, 0.0
    out = torch.full((B, G * R, D), torch.nan)
    parts = Parts(softmax=(sums, each_max, weights), read=None, pending=None)
    length, active = torch.full((B,), 9), torch.ones(B, dtype=torch.bool)
    norms = {"softmax_weight": None, "linear_weight": None, "eps": 0.0}
    launch_decode_combine(parts, None, length, active, out_BHD=out, **norms).run()
    share = torch.exp2((each_max - each_max.amax(2, keepdim=True)).nan_to_num(-torch.inf).double())
    expected = (share[..., None] * sums).sum(2) / (share * weights).sum(2)[..., None]
    assert relative_error(out, expected.nan_to_num().flatten(1, 2)) < 1e-6
    assert not out[0, 2 * R - 1].any()


@pytest.mark.parametrize(("rows", "windows"), [(1, []), (5, [3]), (300, [3, 0, 9])], ids=str)
def test_the_clock_is_the_torch_clock(rows, windows):
    """Three steps, rows that rest: what the layers are told, and what the cache keeps."""
    gen = torch.Generator().manual_seed(rows)
    model = build(dtype=torch.float32)
    (cache, _), (expected_cache, _) = (caches(model, rows, fold_every=3) for _ in range(2))
    length = torch.randint(0, 90, (rows,), generator=gen)
    for each in (cache, expected_cache):
        each.lengths_B.copy_(length)
        each.absorbed = {window: (length - window - 1).clamp(min=0) for window in windows}
    for _ in range(3):
        active = torch.rand(rows, generator=gen) < 0.7
        expected, got = make_clock(expected_cache, active), clock.start_clock(cache, active)
        assert torch.equal(got.position_B, expected.position_B)
        for window in windows:
            assert torch.equal(got.absorbed[window], expected.absorbed[window])
            assert torch.equal(got.absorbed_after[window], expected.absorbed_after[window])
        finish_step(expected_cache, expected.absorbed_after, active)
        assert torch.equal(cache.lengths_B, expected_cache.lengths_B)
        for window in windows:
            assert torch.equal(cache.absorbed[window], expected_cache.absorbed[window])


@pytest.mark.parametrize("V", [1, 1000, 16384, 40000, 90000])
def test_the_likeliest_token_is_the_first_of_the_largest(V):
    """Logits of few values, so that many are equal, and a row of nothing but -inf."""
    gen = torch.Generator().manual_seed(V)
    logits = torch.randint(-5, 6, (4, V), generator=gen).float()
    logits[1] -= 1e6
    logits[2] = -torch.inf
    logits[3, V // 2] = torch.nan
    token = torch.full((5,), -1)
    clock.launch_likeliest(logits, token[:4]).run()
    expected = [int(row.eq(row.max()).nonzero()[0]) for row in logits[:3]] + [V // 2]
    assert token.tolist() == [*expected, -1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_engine_draws_the_same(temperature):
    model = build(dtype=torch.float32)
    results = []
    for stepper in (EagerStepper, TritonStepper):
        engine = Engine(model, slots=2, max_length=32, lag=1, fold_every=2, stepper=stepper)
        for i, n in enumerate((4, 9, 2)):
            sampling = Sampling(temperature=temperature, seed=i)
            engine.add(random_tokens(n, seed=n).tolist(), max_new_tokens=5, sampling=sampling)
        results.append(engine.run())
    assert results[0] == results[1]


@pytest.mark.parametrize("arm", ["RAttention-7", "SWA-9", "full, ours", "full, library"])
def test_the_benchmarks_gate(arm, monkeypatch):
    """It passes what is right, and sees a key of the window that is not read."""
    monkeypatch.setattr(benchmark, "GATE_SLOTS", 40)
    monkeypatch.setattr(benchmark, "GATE_ROWS", (3,))
    monkeypatch.setitem(benchmark.LIBRARY, "math", benchmark._sdpa(SDPBackend.MATH))
    (chosen,) = [each for each in benchmark.arms(7, 9) if each.name == arm]
    options = SimpleNamespace(flavor="debug", seed=0, fold_every=2, tuning=["resident=5", "block_f=8"])
    cpu = torch.device("cpu")
    tolerance = benchmark.TOLERANCE[torch.float32]
    assert benchmark.gate(chosen, options, cpu, torch.float32, "math") < tolerance
    if not chosen.library:
        right = clock.start_clock

        def early(cache, active):
            now = right(cache, active)
            return dataclasses.replace(now, position_B=now.position_B + 1)

        monkeypatch.setattr(clock, "start_clock", early)
        assert not benchmark.gate(chosen, options, cpu, torch.float32, "math") < tolerance
