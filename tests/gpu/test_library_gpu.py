"""Every mask and score mod through compiled FlexAttention, forward and backward, against dense float64."""

from __future__ import annotations

import pytest
import torch

from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.masked_attention import MaskedAttention, ScoreModSpec
from score_mods import (
    build_block_mask,
    dense_mask,
    drawn_window,
    in_documents,
    make_mask,
    reference_attention,
    score_info,
    sliding_window,
)
from tests.closeness import relative_error
from tests.flexrattn.spread import spread_weights

pytestmark = pytest.mark.gpu

B, H, G, T, D = 2, 4, 2, 700, 64

MASKS = {
    "causal": {},
    "sliding_window": {"window": 100},
    "attention_sink": {"sinks": 5, "window": 100},
    "stochastic_window": {"window": 100, "values": [10, 200]},
    "dilated_window": {"window": 40, "dilation": 3},
    "chunked": {"chunk": 96},
    "prefix_lm": {"prefix": 90},
    "strided": {"stride": 17},
    "neighborhood_2d": {"height": 12, "width": 15, "radius": 3},
    "windows_2d": {"height": 12, "width": 15, "size": 4, "shift": 2},
}
SCORE_MODS = {
    "soft_cap": {"cap": 1.5},
    "alibi": {"heads": H},
    "relative_bias": {"heads": H, "buckets": 16, "max_distance": 64},
}


@pytest.fixture(autouse=True)
def _room_for_compilations():
    # Every mask is a compilation of its own, and torch stops at eight of one function.
    torch._dynamo.reset()


def documents() -> dict[str, torch.Tensor]:
    lengths = ([300, 1, 399], [128, 128, 444])
    ids = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]
    positions = [torch.cat([torch.arange(each) for each in n]) for n in lengths]
    return {"document_ids": torch.stack(ids).cuda(), "positions": torch.stack(positions).cuda()}


def inputs() -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(T)
    shapes = ((B, T, H, D), (B, T, G, D), (B, T, G, D), (B, T, H, D))
    return [torch.randn(shape, device="cuda", generator=generator).bfloat16() for shape in shapes]


def compare(inner: MaskedAttention, mask_mod, *, batch: int | None) -> None:
    q, k, v, do = inputs()
    sizes = {"batch": batch, "q_len": T, "kv_len": T, "device": "cuda"}
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    names, score_mod = ["o", "dq", "dk", "dv"], inner.score_mod
    if inner.score_table is not None:
        table = inner.score_table.detach().double().requires_grad_()
        score_mod = score_info(inner.score_mod).bind(table)
        given, exact, names = [*given, inner.score_table], [*exact, table], [*names, "dtable"]
    o = inner(*given[:3], attention_masks=build_block_mask(mask_mod, **sizes), enable_gqa=True)
    found = [o, *torch.autograd.grad(o, given, do)]
    o = reference_attention(*exact[:3], dense_mask(mask_mod, **sizes), score_mod=score_mod)
    wanted = [o, *torch.autograd.grad(o, exact, do.double())]
    for name, x, y in zip(names, found, wanted, strict=True):
        assert relative_error(x, y) < 0.01, name


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, packed):
    mask = make_mask(name, **MASKS[name])
    compare(
        MaskedAttention.Config().build(),
        in_documents(mask, **documents()) if packed else mask,
        batch=B if packed else None,
    )


@pytest.mark.parametrize("name", SCORE_MODS)
def test_score_mods(name):
    inner = MaskedAttention.Config(score_mod=ScoreModSpec(name=name, args=SCORE_MODS[name])).build().cuda()
    if inner.score_table is not None:
        torch.nn.init.normal_(inner.score_table)
    compare(inner, in_documents(sliding_window(200), **documents()), batch=B)


def test_drawn_windows_compile_once():
    window = torch.tensor(0, device="cuda")
    inner = MaskedAttention.Config().build()
    counts = []
    for value in (3, 100, 64, 650, 127):
        window.fill_(value)
        compare(inner, in_documents(drawn_window(window), **documents()), batch=B)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(counts)) == 1


def test_building_the_blocks_does_not_wait_for_the_device():
    positions = documents()
    window = torch.tensor(100, device="cuda")
    masks = [make_mask(name, **args) for name, args in MASKS.items()] + [drawn_window(window)]
    for build in (False, True):
        torch.cuda.set_sync_debug_mode("error" if build else "default")
        try:
            for mask in masks:
                build_block_mask(in_documents(mask, **positions), batch=B, q_len=T, kv_len=T, device="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_sinks_and_drawn_windows_train_compiled():
    """Compiled blocks on the GPU, fp32, against the uncompiled model on the CPU in float64; no step compiles again."""
    layers = make_layers(
        window=20,
        local_mask={"stochastic_window": {"low": 0, "high": 150}},
        layer_masks={"1": {"attention_sink": {"sinks": 3}}},
        local_score_mod={"soft_cap": {"cap": 5.0}},
        global_score_mod="relative_bias",
    )
    config = build_model_config(resolve_flavor("debug", {"vocab_size": 64}), layers)
    tokens = torch.randint(0, 64, (2, 300), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ([170, 130], [1, 299])])
    exact = config.build()
    spread_weights(exact, 0.1)
    model = config.build()
    with torch.no_grad():
        model.init_weights()
    model.load_state_dict(exact.state_dict())
    model.cuda()
    exact.double()
    for block in model.layers.values():
        block.compile(fullgraph=True, dynamic=False)
    graphs = []
    for step in range(1, 5):
        results = []
        for each, device in ((model, "cuda"), (exact, "cpu")):
            each.set_step(step)
            each.zero_grad()
            at = positions.to(device)
            logits = each(tokens.to(device), positions=at, attention_masks=each.get_attention_masks(at))
            logits.square().mean().backward()
            results.append({"logits": logits, **{name: p.grad for name, p in each.named_parameters()}})
        for name, wanted in results[1].items():
            assert relative_error(results[0][name], wanted) < 1e-3, (step, name)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(graphs)) == 1
