"""Masks and score mods in the layers: what each branch reads, windows drawn by step, and choices without code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.attention import ResidualLinearBranch, shifted_keys
from flexrattn.decode.cache import DecodeCache
from flexrattn.flops import attention_flops_per_token, mean_kept_keys
from flexrattn.masked_attention import MaskedAttention, MaskSpec, ScoreModSpec
from flexrattn.model import describe_layer, refuse_split_heads
from score_mods import (
    build_block_mask,
    dense_mask,
    in_documents,
    make_mask,
    mask_info,
    reference_attention,
    residual_of,
)
from tests.closeness import relative_error
from tests.flexrattn.spread import spread_weights
from tests.score_mods.catalogue import HEADS, MASKS, SCORE_MODS

T = 41
SIZE = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 32, "vocab_size": 16}
LENGTHS = {"one document": [T], "packed": [1, 13, 2, 24, 1]}


def positions_of(lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


def dense(mask, positions):
    ids = (positions == 0).cumsum(-1)
    whole = in_documents(mask, document_ids=ids, positions=positions)
    return dense_mask(whole, batch=len(positions), q_len=T, kv_len=T, device="cpu")[0, 0]


def config_of(**options):
    return build_model_config(resolve_flavor("debug", SIZE), make_layers(**options))


def model_of(seed: int = 0, **options):
    model = config_of(**options).build()
    spread_weights(model, 0.3, seed)
    return model.double()


def run(model, tokens, positions):
    return model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))


READABLE = {name: case for name, case in MASKS.items() if case.residual is not None}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("case", READABLE.values(), ids=READABLE)
def test_the_branches_read_each_causal_pair_once(case, impl, lengths):
    """Read off the linear branch itself: with v_j = e_j and positive features, o_t is non-zero at the keys it read."""
    mask, positions = make_mask(case.name, **case.args), positions_of(lengths)
    residual = residual_of(mask)
    branch = ResidualLinearBranch.Config(window=residual.window, sinks=residual.sinks, impl=impl).build()
    q, k, v = torch.rand(1, T, 1, 4) + 0.1, torch.rand(1, T, 1, 4) + 0.1, torch.eye(T)[None, :, None]
    read = branch(q, k, v, positions=positions)[0, :, 0] != 0
    causal = dense(make_mask("causal"), positions)
    assert torch.equal(dense(mask, positions).int() + read.int(), causal.int())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("sinks", [0, 2])
@pytest.mark.parametrize("window", [0, 1, 7, 24, T - 1, T, 100])
def test_a_window_that_is_data_is_the_same_branch(window, sinks, lengths):
    """Outputs and gradients of the branch with its window as a tensor are those with the number, sinks too."""
    generator = torch.Generator().manual_seed(window)
    q, k, v, do = (torch.randn(1, T, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2, 4))
    positions = positions_of(lengths)
    state = torch.randn(4, 16, 8, generator=generator, dtype=torch.float64)
    decay = None if sinks else -torch.rand(1, T, 2, generator=generator, dtype=torch.float64) / 4
    results = []
    for draws in (False, True):
        branch = ResidualLinearBranch.Config(window=window, sinks=sinks, impl="torch", draws=draws).build()
        branch.drawn_window = torch.tensor(window)
        given = [x.clone().requires_grad_() for x in (q, k, v, decay) if x is not None]
        o = branch(*given[:3], positions=positions, decay=given[3] if len(given) == 4 else None, initial_state=state)
        results.append([o, *torch.autograd.grad(o, given, do)])
    for found, wanted in zip(results[1], results[0], strict=True):
        assert relative_error(found, wanted) < 1e-12


def test_what_is_not_finite_stays_with_the_queries_that_read_it():
    """A key that is shifted past a document's end must not leak as 0 * NaN."""
    positions = positions_of([20, 21])
    k, v = torch.rand(1, T, 1, 4), torch.rand(1, T, 1, 4)
    k[0, 17:20], v[0, 17:20] = torch.nan, torch.nan
    decay = -torch.rand(1, T, 1)
    decay[0, 17:20] = torch.nan
    for shifted in shifted_keys(k, v, decay, positions, torch.tensor(4)):
        assert shifted[0, :20].isfinite().all()
        assert shifted[0, 20:].isfinite().all()


def test_sinks_get_no_gradient_from_the_linear_branch():
    branch = ResidualLinearBranch.Config(window=3, sinks=2, impl="torch").build()
    q, k, v = (torch.randn(1, T, 1, 4).requires_grad_() for _ in range(3))
    branch(q, k, v, positions=positions_of([20, 21])).square().sum().backward()
    assert not v.grad[0, [0, 1, 20, 21]].any()
    assert v.grad[0, 2:16].all()
    assert not k.grad[0, [0, 1, 20, 21]].any()


OPTIONS = {
    "sinks": {"local_mask": "attention_sink", "local_mask_args": {"sinks": 2}, "window": 5},
    "chunks": {"layer_kind": "swa", "local_mask": {"chunked": {"chunk": 6}}},
    "strided": {"layer_kind": "swa", "local_mask": {"strided": {"stride": 5}}, "global_mask": {"dilated_window": {
        "window": 3, "dilation": 4}}},
    "prefix": {"layer_kind": "full", "local_mask": {"prefix_lm": {"prefix": 4}}},
    "image": {"layer_kind": "swa", "local_mask": {"windows_2d": {"height": 3, "width": 4, "size": 2}}},
    "soft cap": {"window": 5, "local_score_mod": {"soft_cap": {"cap": 1.5}}, "global_score_mod": "alibi"},
    "bias": {"window": 5, "local_score_mod": "relative_bias", "layer_score_mods": {"-1": {"relative_bias": {
        "buckets": 8, "max_distance": 20}}}},
    "hymba": {"layer_kind": "hymba", "window": 5, "local_mask": {"attention_sink": {"sinks": 2}}, "local_score_mod":
        "relative_bias"},
    "gate": {"window": 5, "local_mask": {"stochastic_window": {"low": 0, "high": 30}}, "decay_gate": True},
    "draws": {"window": 5, "local_mask": {"stochastic_window": {"low": 0, "high": 30}}},
    "users": {"layer_kind": "swa", "local_mask": "tests.flexrattn.test_masks:first_two"},
}  # fmt: skip


def first_two():
    """A mask of a user that asks for positions, without an info."""
    return lambda b, h, q_idx, kv_idx: (kv_idx <= q_idx) & ((kv_idx < 2) | (kv_idx == q_idx))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_packed_documents_are_each_run_alone(options):
    """Logits and gradients of a row of documents are those of a row each: positions restart, nothing crosses."""
    model = model_of(**options)
    model.set_step(3)
    lengths = [17, 1, 23]
    tokens, weight = torch.randint(0, 16, (1, T)), torch.randn(1, T, 16, dtype=torch.float64)
    packed = run(model, tokens, positions_of(lengths))
    (packed * weight).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    alone, start = [], 0
    for n in lengths:
        part = slice(start, start + n)
        alone.append(run(model, tokens[:, part], torch.arange(n)[None]))
        (alone[-1] * weight[:, part]).sum().backward()
        start += n
    # Scores beside a score mod's fp32 slopes and tables; all else is float64.
    assert relative_error(packed, torch.cat(alone, 1)) < 1e-6
    for name, p in model.named_parameters():
        assert relative_error(grads[name], p.grad) < 1e-6, name


@pytest.mark.parametrize("name", SCORE_MODS)
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masked_attention_on_the_cpu(case, name):
    """Every mask with every score mod, against the float64 reference."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, heads, 8, generator=generator) for heads in (HEADS, 2, 2))
    mask = dense_mask(make_mask(case.name, **case.args), q_len=T, kv_len=T, device="cpu")
    for spec in (None, ScoreModSpec(name=name, args=SCORE_MODS[name])):
        inner = MaskedAttention.Config(score_mod=spec).build()
        if inner.score_table is not None:
            torch.nn.init.normal_(inner.score_table, generator=generator)
        score_mod = inner._bound_score_mod()
        expected = reference_attention(q, k, v, mask, score_mod=score_mod)
        assert relative_error(inner(q, k, v, attention_masks=mask, enable_gqa=True), expected) < 1e-5


def test_a_learned_bias_is_a_parameter_that_learns():
    model = model_of(window=5, local_score_mod="relative_bias")
    names = [name for name, _ in model.named_parameters() if "score_table" in name]
    assert names == [f"layers.{i}.attention.inner_attention.score_table" for i in range(3)]
    run(model, torch.randint(0, 16, (1, T)), positions_of([T])).square().sum().backward()
    for name, p in model.named_parameters():
        if name in names:
            assert p.shape == (4, 32)
            # Distances 0 to 5 are read, and no farther one.
            assert p.grad[:, :6].all()
            assert not p.grad[:, 6:].any()


def test_training_draws_and_evaluation_does_not():
    """A training step is that of a model with the drawn window, in both branches; evaluation has the fixed one."""
    drawing = {"stochastic_window": {"low": 0, "high": 20, "seed": 1}}
    model = model_of(window=5, local_mask=drawing)
    schedule = mask_info(model.mask_mods[model.layers["0"].attention.mask]).schedule
    tokens, positions = torch.randint(0, 16, (1, T)), positions_of([25, 16])
    with pytest.raises(ValueError, match=r"draws its window by training step: call model.set_step\(step\) first"):
        model.get_attention_masks(positions)
    windows = [schedule.at(step) for step in range(1, 6)]
    assert len(set(windows)) > 2
    for step, window in enumerate(windows, start=1):
        model.set_step(step)
        fixed = model_of(window=window)
        fixed.load_state_dict(model.state_dict())
        results = []
        for each in (model.train(), fixed):
            each.zero_grad()
            logits = run(each, tokens, positions)
            logits.square().sum().backward()
            results.append({"logits": logits, **{name: p.grad for name, p in each.named_parameters()}})
        for name, wanted in results[1].items():
            assert relative_error(results[0][name], wanted) < 1e-10, name
    fixed = model_of(window=5)
    fixed.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(run(model, tokens, positions), run(fixed, tokens, positions))


def test_split_heads_have_score_mods_of_their_own_number():
    config = config_of(layer_kind="hymba", window=5, local_score_mod="alibi", global_score_mod="alibi")
    assert [layer.attention.inner_attention.score_mod.args["heads"] for layer in config.layers] == [2, 2, 2, 4]
    assert [layer.attention.residual and layer.attention.residual.window for layer in config.layers] == [None] * 4


def test_masks_by_layer():
    config = config_of(
        window=6,
        layer_masks={
            0: {"attention_sink": {"sinks": 2}},
            "1:3": {"sliding_window": {"window": 3}},
            "2": {"sliding_window": None},
            "-1": {"dilated_window": {"window": 2, "dilation": 2}},
        },
        layer_score_mods={"::2": {"soft_cap": {"cap": 3}}},
        global_score_mod="alibi",
    )
    attentions = [layer.attention for layer in config.layers]
    assert [a.mask for a in attentions] == [
        "attention_sink_sinks2_window6",
        "sliding_window_3",
        "sliding_window_6",
        "dilated_window_dilation2_window2",
    ]
    assert [(a.window, a.residual.window, a.residual.sinks) for a in attentions[:3]] == [
        (6, 6, 2),
        (3, 3, 0),
        (6, 6, 0),
    ]
    assert config.masks["attention_sink_sinks2_window6"] == MaskSpec(
        name="attention_sink", args={"sinks": 2, "window": 6}
    )
    assert len(config.masks) == 4
    assert [a.inner_attention.score_mod and a.inner_attention.score_mod.name for a in attentions] == [
        "soft_cap",
        None,
        "soft_cap",
        "alibi",
    ]
    assert describe_layer(attentions[2]) == (
        "rattention(window 6, softmax, rope, mask sliding_window_6, score mod soft_cap_3)"
    )


REFUSED = {
    "causal": ({"local_mask": "causal"}, "mask 'causal' does not go with a linear branch: it leaves no key"),
    "chunked": (
        {"local_mask": {"chunked": {"chunk": 4}}},
        "does not go with a linear branch: what it leaves out is not",
    ),
    "image": (
        {"local_mask": {"neighborhood_2d": {"height": 2, "width": 2, "radius": 1}}},
        "does not go with a linear branch: it is not causal",
    ),
    "of a layer": ({"layer_masks": {"1": "causal"}}, "mask 'causal' does not go with a linear branch"),
    "selector": ({"layer_masks": {"first": "causal"}}, 'by an index or a slice, such as "0", "-1", .* got \'first\''),
    "step 0": ({"layer_masks": {"::0": "causal"}}, "got '::0'"),
    "no layer": ({"layer_masks": {"4": "causal"}}, r"layer_masks\[4\] names no layer: the model has layers 0 to 3"),
    "empty slice": ({"layer_masks": {"3:3": "causal"}}, r"layer_masks\[3:3\] names no layer"),
    "no mapping": ({"layer_masks": ["causal"]}, "layer_masks must be a mapping of layers to names"),
    "two names": ({"global_mask": {"causal": {}, "chunked": {}}}, "global_mask must be a name or {name:"),
    "arguments": ({"layer_masks": {"3": {"causal": 3}}}, r"layer_masks\[3\] must be a name or {name:"),
    "twice": (
        {"global_mask": {"chunked": {"chunk": 3}}, "global_mask_args": {"chunk": 4}},
        "global_mask 'chunked' is given its arguments twice",
    ),
    "args alone": ({"local_score_mod_args": {"cap": 3}}, "local_score_mod_args given without local_score_mod"),
    "score mod": ({"global_score_mod": "softcap"}, "unknown score mod 'softcap'.*did you mean 'soft_cap'"),
    "its argument": ({"global_score_mod": "soft_cap"}, "score mod 'soft_cap' takes cap: float, given no arguments"),
    "a mask": ({"global_score_mod": "tests.flexrattn.test_masks:first_two"}, "four arguments make a mask"),
    "heads": ({"global_score_mod": {"alibi": {"heads": 3}}}, "'alibi' is for 3 heads, layer 3 has 4"),
    "no softmax": ({"window": None, "local_score_mod": {"soft_cap": {"cap": 3}}}, "has no softmax branch"),
    "no window": ({"layer_kind": "swa", "window": None, "local_mask": {"attention_sink": {"sinks": 2}}}, "'window'"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_choices(options, said):
    with pytest.raises(ValueError, match=said) as raised:
        config_of(**({"window": 4} | options))
    assert "\n" not in str(raised.value)


def test_later_entries_come_first_and_defaults_stay():
    config = config_of(window=4, layer_masks={":": {"sliding_window": {"window": 9}}, "0": {"sliding_window": None}})
    assert [layer.attention.mask for layer in config.layers] == ["sliding_window_4"] + ["sliding_window_9"] * 3


def test_flops_are_those_of_the_pairs_that_a_mask_keeps():
    config = config_of(
        window=5,
        layer_masks={
            "0": {"attention_sink": {"sinks": 2}},
            "1": {"stochastic_window": {"values": [2, 9]}},
            "3": {"strided": {"stride": 3}},
        },
    )
    kept = {
        0: [sum(MASKS_LAW[0](t, j) for j in range(T)) for t in range(T)],
        1: [(min(t, 2) + min(t, 9)) / 2 + 1 for t in range(T)],
        3: [sum(MASKS_LAW[3](t, j) for j in range(T)) for t in range(T)],
    }
    kept_keys = {key: mean_kept_keys(spec.build(), T) for key, spec in config.masks.items()}
    for i, keys in kept.items():
        attention = config.layers[i].attention
        expected = 4 * 4 * 8 * sum(keys) / T + (2 * 16 * 8 * 6 if i < 3 else 0)
        assert attention_flops_per_token(attention, T, kept_keys) == pytest.approx(expected)
    assert mean_kept_keys(make_mask("causal"), T) == (T + 1) / 2


MASKS_LAW = {
    0: lambda t, j: t - 5 <= j <= t or j <= min(t, 1),
    3: lambda t, j: t - 3 <= j <= t or j in range(t, -1, -3),
}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (OPTIONS["sinks"], "decoding keeps no sinks beside a linear branch yet.*layer_kind 'swa' decodes with it"),
        (OPTIONS["prefix"], "decoding needs causal masks: prefix_lm_prefix4 lets queries read later tokens"),
        (OPTIONS["image"], "decoding needs causal masks: windows_2d"),
        (OPTIONS["soft cap"], "decoding has no score mods yet, the model has 'soft_cap'"),
    ],
    ids=["sinks", "prefix", "image", "score mod"],
)
def test_what_decoding_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        DecodeCache(config_of(**options), rows=1, max_length=8, device="cpu", dtype=torch.float32)


def test_many_masks_leave_room_for_compilations():
    size = {**SIZE, "n_layers": 12}
    layers = make_layers(window=4, layer_masks={str(i): {"sliding_window": {"window": i}} for i in range(12)})
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        build_model_config(resolve_flavor("debug", size), layers).build()
        assert torch._dynamo.config.recompile_limit >= 12 * 4
        assert torch._dynamo.config.accumulated_recompile_limit >= 12 * 12 * 4


def test_heads_that_a_score_mod_tells_apart_are_not_split():
    parallelism = SimpleNamespace(tensor_parallel_degree=2)
    refuse_split_heads(config_of(window=4, local_score_mod={"soft_cap": {"cap": 3}}), parallelism)
    for name in ("alibi", "relative_bias"):
        config = config_of(window=4, layer_score_mods={"2": name})
        with pytest.raises(ValueError, match=f"degree = 2 splits the heads that score mod {name!r} tells apart: use 1"):
            refuse_split_heads(config, parallelism)
        parallelism_of_one = SimpleNamespace(tensor_parallel_degree=1)
        refuse_split_heads(config, parallelism_of_one)


def test_score_mods_reach_flex_attention(monkeypatch):
    """The block-mask path hands over the score mod, with the layer's table, and fewer stages where it reads one."""
    seen = []

    def attend(q, k, v, **options):
        seen.append(options)
        return q

    monkeypatch.setattr(MaskedAttention, "_static_flex", staticmethod(attend))
    block_mask = build_block_mask(make_mask("causal"), q_len=8, kv_len=8, device="cpu")
    q, k = torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, 2, 16)
    for name, args in SCORE_MODS.items():
        inner = MaskedAttention.Config(score_mod=ScoreModSpec(name=name, args=args)).build()
        if inner.score_table is not None:
            torch.nn.init.constant_(inner.score_table, 3.0)
        inner(q, k, k, attention_masks=block_mask, enable_gqa=True)
        assert seen[-1]["kernel_options"] == ({"num_stages": 1} if name == "relative_bias" else None)
    index = [torch.tensor(i) for i in (0, 1, 7, 2)]
    assert seen[-1]["score_mod"](torch.tensor(1.0), *index) == 4.0


def test_drawn_windows_and_sinks_compile_into_one_graph_once():
    """One graph a kind of layer, and no other one for another step's window."""
    model = model_of(window=5, local_mask={"stochastic_window": {"low": 0, "high": 30}}).float()
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for block in model.layers.values():
        block.compile(backend=count, fullgraph=True)
    tokens, positions = torch.randint(0, 16, (1, T)), positions_of([25, 16])
    compiled = []
    for step in range(1, 5):
        model.set_step(step)
        run(model, tokens, positions)
        compiled.append(len(graphs))
    assert compiled == [2] * 4
