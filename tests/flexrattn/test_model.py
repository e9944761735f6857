"""The decoder: one mask per distinct mask, documents that do not see each other, and what a change may touch."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.flavors import GatedFeedForward, _feed_forward
from score_mods import build_block_mask
from tests.closeness import relative_error
from tests.flexrattn.spread import spread_weights

T = 48


def build(seed: int = 0, **options):
    layers = {"window": 5, **options}
    model = build_model_config(resolve_flavor("debug", {"vocab_size": 32}), make_layers(**layers)).build()
    spread_weights(model, 0.2, seed)
    return model


def run(model, tokens, positions):
    return model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))


@pytest.mark.parametrize(
    "options",
    [
        {"window": 5},
        {"window": None},
        {"layer_kind": "swa"},
        {"layer_kind": "full", "window": None},
        {"window": 5, "learned_initial_state": True, "learned_qk_scale": True},
        {"window": 5, "feature_map": "relu"},
        {"window": 5, "decay_gate": True, "learned_initial_state": True},
        {"layer_kind": "hymba"},
    ],
    ids=["rattention", "linear-only", "swa", "full", "learned-options", "relu", "decay-gate", "hymba"],
)
def test_packed_documents_are_each_run_alone(options):
    """Logits and gradients of a row of three documents are those of three rows: nothing crosses a border."""
    model = build(**options)
    lengths = [17, 1, 30]
    tokens = torch.randint(0, 32, (1, T))
    weight = torch.randn(1, T, 32)
    packed = run(model, tokens, torch.cat([torch.arange(n) for n in lengths])[None])
    (packed * weight).sum().backward()
    packed_grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    alone, start = [], 0
    for n in lengths:
        part = slice(start, start + n)
        alone.append(run(model, tokens[:, part], torch.arange(n)[None]))
        (alone[-1] * weight[:, part]).sum().backward()
        start += n
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-5
    for name, p in model.named_parameters():
        assert relative_error(packed_grads[name], p.grad) < 1e-4, name


def test_future_tokens_change_nothing_before_them():
    model = build()
    tokens = torch.randint(0, 32, (1, T))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 32
    positions = torch.arange(T)[None]
    before, after = run(model, tokens, positions), run(model, changed, positions)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_local_stack_without_a_linear_branch_forgets():
    """What the linear branch is for: an all-local SWA stack of 4 layers sees 4 * window tokens back, RAttention all."""
    tokens = torch.randint(0, 32, (1, T))
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 32
    positions = torch.arange(T)[None]
    last = {}
    for kind in ("swa", "rattention"):
        model = build(layer_kind=kind, window=5, pattern=["local"])
        last[kind] = (run(model, tokens, positions) - run(model, changed, positions))[:, -1].abs().max()
    assert last["swa"] == 0
    assert last["rattention"] > 1e-4


def test_one_mask_per_distinct_mask():
    model = build()
    positions = torch.arange(T).expand(2, T)
    masks = model.get_attention_masks(positions)
    assert set(masks) == {"sliding_window_5", "causal"}
    assert all(mask.dtype == torch.bool and mask.shape[-2:] == (T, T) for mask in masks.values())
    assert set(build(window=None, pattern=["local"]).get_attention_masks(positions)) == set()


def test_block_masks_hold_the_dense_masks_pairs(monkeypatch):
    """The masks that a GPU gets keep exactly the pairs that the CPU gets."""
    model = build()
    positions = torch.cat([torch.arange(n) for n in (20, 3, 25)]).expand(2, T)
    dense = model.get_attention_masks(positions)
    monkeypatch.setattr("flexrattn.model.dense_mask", build_block_mask)
    sparse = model.get_attention_masks(positions)
    b, h = torch.arange(2)[:, None, None], torch.zeros(1, dtype=torch.long)
    t, j = torch.arange(T)[:, None], torch.arange(T)
    for key, mask in sparse.items():
        assert isinstance(mask, BlockMask)
        assert torch.equal(mask.mask_mod(b, h, t, j), dense[key].expand(2, 1, T, T)[:, 0]), key


def test_feed_forward_activations():
    x = torch.randn(3, 128)
    for name, activation in (("silu", torch.nn.SiLU()), ("gelu", torch.nn.GELU(approximate="tanh"))):
        ffn = _feed_forward(resolve_flavor("debug", {"activation": name})).build()
        assert isinstance(ffn, GatedFeedForward)
        expected = (activation(x @ ffn.w1.weight.T) * (x @ ffn.w3.weight.T)) @ ffn.w2.weight.T
        assert relative_error(ffn(x), expected) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_tied_or_not(tied):
    model = build_model_config(resolve_flavor("debug", {"tied": tied}), make_layers(window=4)).build()
    with torch.no_grad():
        model.init_weights()
    assert (model.tok_embeddings.weight is model.lm_head.weight) == tied
    assert float(model.tok_embeddings.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_window_past_the_sequence_is_attention_alone():
    """Law 2: with window >= T - 1 the linear branch is exactly zero, and RAttention is the normed softmax branch."""
    model = build(window=T - 1)
    attention = model.layers["0"].attention
    seen = []
    attention.residual.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    run(model, torch.randint(0, 32, (1, T)), torch.arange(T)[None])
    assert not seen[0].any()
