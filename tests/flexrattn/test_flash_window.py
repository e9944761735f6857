"""flash-attn-4's own window: which masks take it and when, and what is around its kernels. Those are replaced here."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from flexrattn import build_model_config, flash_window, make_layers, resolve_flavor
from flexrattn.activation_checkpoint import with_linear_branch
from flexrattn.flash_window import PlainWindow, flash_window_attention, flash_window_fwd, plain_window
from flexrattn.masked_attention import KERNEL_OPTIONS, MaskedAttention, ScoreModSpec
from flexrattn.trainer import RAttentionTrainer
from score_mods import (
    all_of,
    any_of,
    build_block_mask,
    causal,
    dense_mask,
    document,
    drawn_window,
    make_mask,
    reference_attention,
    sliding_window,
)
from tests.closeness import relative_error
from tests.flexrattn.flash_stand_in import install
from tests.flexrattn.spread import spread_weights
from tests.score_mods.catalogue import MASKS

T = 24
SIZE = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32, "ffn_dim": 32, "vocab_size": 16}
WHOLE = torch.arange(T).expand(2, T)
PACKED = torch.cat([torch.arange(10), torch.arange(T - 10)]).expand(2, T)


@pytest.fixture
def kernels(monkeypatch):
    return install(monkeypatch)


def build(**options):
    options = {"window": 5, "softmax_backend": "flash", **options}
    model = build_model_config(resolve_flavor("debug", SIZE), make_layers(**options)).build()
    spread_weights(model, 0.3)
    return model


def on_a_gpu(model) -> dict:
    """The masks of a batch that is on another device than the CPU, whatever is in it."""
    return model.get_attention_masks(torch.zeros(2, T, dtype=torch.int64, device="meta"))


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_what_is_plain_is_its_law(case):
    mask = make_mask(case.name, **case.args)
    plain = plain_window(mask)
    if plain is None:
        assert case.name not in ("causal", "sliding_window")
        return
    law = causal() if plain.window is None else sliding_window(plain.window)
    size = {"q_len": T, "kv_len": T, "device": "cpu"}
    assert torch.equal(dense_mask(mask, **size), dense_mask(law, **size))


def test_which_masks_are_plain():
    ids = torch.zeros(1, T, dtype=torch.int32)
    assert plain_window(causal()) == PlainWindow(window=None)
    assert plain_window(sliding_window(0)) == PlainWindow(window=0)
    assert plain_window(all_of(causal(), sliding_window(7), sliding_window(5))) == PlainWindow(window=5)
    others = {
        "documents": all_of(sliding_window(5), document(ids)),
        "data": drawn_window(torch.tensor(5)),
        "drawn": make_mask("stochastic_window", window=5, low=0, high=9),
        "sinks": make_mask("attention_sink", sinks=1, window=5),
        "either": any_of(causal(), sliding_window(5)),
        "unknown": lambda b, h, q_idx, kv_idx: kv_idx <= q_idx,
    }
    assert {name: plain_window(mask) for name, mask in others.items()} == dict.fromkeys(others)


def test_whole_rows_train_with_plain_windows(caplog):
    model = build()
    assert all(isinstance(mask, BlockMask) for mask in on_a_gpu(model).values())
    with caplog.at_level(logging.INFO):
        model.see_batch(WHOLE)
        model.see_batch(WHOLE)
    assert on_a_gpu(model) == {"sliding_window_5": PlainWindow(window=5), "causal": PlainWindow(window=None)}
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "Masks sliding_window_5, causal by flash-attn-4's own kernels, as each row is one document",
    ]
    # On the CPU masks are dense whatever is known, and evaluation reads batches that nobody has seen.
    assert all(mask.dtype == torch.bool for mask in model.get_attention_masks(WHOLE).values())
    assert all(isinstance(mask, BlockMask) for mask in on_a_gpu(model.eval()).values())


def test_the_first_packed_row_ends_it(caplog):
    """The trainer's batches, as they pass from the loader to the device."""
    model = build()
    trainer = SimpleNamespace(model_parts=[model])
    batches = [({"positions": positions}, None) for positions in (WHOLE, PACKED, WHOLE)]
    kinds = []
    with caplog.at_level(logging.INFO):
        for _ in RAttentionTrainer._seen_by_the_model(trainer, iter(batches)):
            kinds.append({type(mask) for mask in on_a_gpu(model).values()})
    assert kinds == [{PlainWindow}, {BlockMask}, {BlockMask}]
    assert len(caplog.records) == 2
    assert "from this batch on, rows hold several documents" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({"softmax_backend": "triton"}, []),
        ({"local_score_mod": {"soft_cap": {"cap": 5.0}}}, ["causal"]),
        ({"layer_score_mods": {"-1": {"soft_cap": {"cap": 5.0}}}}, ["sliding_window_5"]),
        ({"local_mask": {"attention_sink": {"sinks": 2, "window": 5}}}, ["causal"]),
        ({"local_mask": {"stochastic_window": {"low": 0, "high": 9}}}, ["causal"]),
        ({"layer_kind": "hymba"}, ["causal", "sliding_window_5"]),
        ({"window": None}, ["causal"]),
    ],
    ids=str,
)
def test_every_other_layer_keeps_its_block_mask(options, plain):
    model = build(**options)
    model.set_step(1)
    model.see_batch(WHOLE)
    masks = on_a_gpu(model)
    assert {key for key, mask in masks.items() if isinstance(mask, PlainWindow)} == set(plain)
    assert all(isinstance(masks[key], BlockMask) for key in masks.keys() - set(plain))


def make(H: int, G: int, D: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """q, k, v with the strides of a joint projection, and do."""
    generator = torch.Generator().manual_seed(H + G)
    joint = torch.randn(2, T, H + 2 * G, D, generator=generator).to(dtype)
    q, k, v = (x.requires_grad_() for x in joint.split((H, G, G), dim=2))
    return [q, k, v, torch.randn(2, T, H, D, generator=generator).to(dtype)]


@pytest.mark.parametrize("window", [None, 0, 5, T - 2, T - 1, T + 3])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 1)])
def test_masked_attention_hands_the_law_over(kernels, window, H, G):
    q, k, v, do = make(H, G, 32, torch.bfloat16)
    inner = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS["flash"])).build()
    o = inner(q, k, v, attention_masks=PlainWindow(window=window), scale=0.3, enable_gqa=H > G)
    grads = torch.autograd.grad(o, (q, k, v), do)
    left = window if window is not None and window < T - 1 else None
    assert kernels.calls == [("fwd", left), ("bwd", left)]
    doubles = [x.detach().double().requires_grad_() for x in (q, k, v)]
    mask = dense_mask(causal() if window is None else sliding_window(window), q_len=T, kv_len=T, device="cpu")
    expected = reference_attention(*doubles, mask, scale=0.3)
    wanted = (expected, *torch.autograd.grad(expected, doubles, do.double()))
    floor = 0.01 * do.double().norm()
    for got, want in zip((o, *grads), wanted, strict=True):
        assert (got.double() - want).norm() / want.norm().clamp(min=floor) < 5e-3
        assert got.is_contiguous()


def test_operators(kernels):
    """torch's own checks of schema, fakes and autograd; also of keys that have to be copied first."""
    q, k, v, _ = make(4, 2, 32, torch.bfloat16)
    odd = torch.randn(2, T, 2 * 2 * 32 + 1).bfloat16()[..., 1:]
    for keys, values in ((k, v), (x.unflatten(2, (2, 32)) for x in odd.split(2 * 32, dim=2))):
        for window in (5, None):
            torch.library.opcheck(flash_window_fwd, (q, keys, values, window, 0.25))


def test_one_graph_a_window(kernels):
    q, k, v, do = make(4, 2, 32, torch.bfloat16)
    inner = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS["flash"])).build()

    def attend(q, k, v, masks):
        return inner(q, k, v, attention_masks=masks["local"], enable_gqa=True)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, dynamic=False, backend=counter)
    for window in (5, 7, None, 5, 7, None):
        masks = {"local": PlainWindow(window=window)}
        found, expected = compiled(q, k, v, masks), attend(q, k, v, masks)
        assert torch.equal(found, expected)
        for x, y in zip(*(torch.autograd.grad(o, (q, k, v), do) for o in (found, expected)), strict=True):
            assert torch.equal(x, y)
    assert counter.frame_count == 3


@pytest.mark.parametrize("kind", ["rattention", "swa", "hymba"])
def test_layers_over_whole_rows_are_those_of_documents(kernels, monkeypatch, kind):
    """What a layer leaves out for a plain window, borders and positions, changes nothing over rows of one document."""
    monkeypatch.setattr(flash_window, "DTYPES", (torch.float64,))
    options = {"layer_kind": kind, "swa_norm_init": 0.7, "rla_norm_init": 0.6}
    model, dense = (build(softmax_backend=backend, **options).double() for backend in ("flash", "triton"))
    model.see_batch(WHOLE)
    tokens = torch.randint(0, 16, (2, T), generator=torch.Generator().manual_seed(0))
    found = []
    for each, masks in ((model, on_a_gpu(model)), (dense, dense.get_attention_masks(WHOLE))):
        loss = each(tokens, positions=WHOLE, attention_masks=masks).square().sum()
        found.append([loss, *torch.autograd.grad(loss, list(each.parameters()))])
    assert len(kernels.calls) == 2 * len(model.layers)
    for x, y in zip(*found, strict=True):
        assert relative_error(x, y) < 1e-6


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (with_linear_branch(SelectiveAC.Config()), ["fwd", "bwd"]),
        (SelectiveAC.Config(), ["fwd", "fwd", "bwd"]),
        (with_linear_branch(FullAC.Config()), ["fwd", "fwd", "bwd"]),
    ],
    ids=["selective", "selective of torchtitan", "full"],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_checkpointing_runs_again(kernels, config, expected, compiled):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.project = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(3))
            self.inner = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS["flash"])).build()

        def forward(self, x):
            q, k, v = (layer(x.tanh())[:, :, None] for layer in self.project)
            return self.inner(q, k, v, attention_masks=PlainWindow(window=3)).sin()

    torch.manual_seed(0)
    block = Block().bfloat16()
    x = torch.randn(2, T, 32).bfloat16()
    wanted = torch.autograd.grad(block(x).sum(), list(block.parameters()))
    kernels.calls.clear()
    wrapped = config.build()._wrap_block(block, base_fqn="layers.0")
    if compiled:
        torch._dynamo.reset()
        wrapped = torch.compile(wrapped, fullgraph=True, backend="aot_eager_decomp_partition")
    found = torch.autograd.grad(wrapped(x).sum(), list(block.parameters()))
    assert [what for what, _ in kernels.calls] == expected
    for a, b in zip(found, wanted, strict=True):
        assert torch.equal(a, b)


def test_refusals():
    q, k, v, _ = make(4, 2, 32, torch.bfloat16)

    def refused(match: str, *given, **options):
        with pytest.raises(ValueError, match=match):
            flash_window_attention(*given, **{"window": 5} | options)

    refused(r"needs a Hopper or newer GPU, this is cpu: use 'triton'", q, k, v)
    refused(r"takes bfloat16 or float16, q, k and v alike, got float32, bfloat16", q.float(), k, v)
    refused(r"with H a multiple of G, got \(2, 24, 3, 32\)", q[:, :, :3], k, v)
    refused(r"k and v \(B, T, G, D\) with H a multiple of G", q, k[:, 1:], v[:, 1:])
    wrong = r"takes heads of 32, 64, 96, 128, got 16: flash-attn-4's gradients of others can be wrong, use 'triton'"
    refused(wrong, *(x[..., :16] for x in (q, k, v)))
    refused(r"window must be 0 or more .* got -1", q, k, v, window=-1)
    # By every way to the package.
    block_mask = build_block_mask(causal(), q_len=T, kv_len=T, device="cpu")
    flex = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS["flash"])).build()
    with pytest.raises(ValueError, match=wrong):
        flex(*(x[..., :16] for x in (q, k, v)), attention_masks=block_mask, enable_gqa=True)
    with pytest.raises(ValueError, match=wrong):
        build_model_config(resolve_flavor("debug", SIZE | {"head_dim": 16}), make_layers(softmax_backend="flash"))
    spec = ScoreModSpec(name="soft_cap", args={"cap": 5.0})
    inner = MaskedAttention.Config(score_mod=spec).build()
    with pytest.raises(ValueError, match=r"a score mod needs a block mask, got PlainWindow\(window=5\)"):
        inner(q, k, v, attention_masks=PlainWindow(window=5))
