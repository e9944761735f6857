"""Sizes against their closed formulas on the meta device, and every refused choice of layers."""

from __future__ import annotations

import pytest
import torch

from flexrattn import FLAVORS, build_model_config, make_layers, resolve_flavor
from flexrattn.flops import attention_flops_per_token, mean_visible_keys, nparams_and_flops_per_token

KINDS = {
    "rattention": {"layer_kind": "rattention", "window": 512},
    "linear-only": {"layer_kind": "rattention", "window": None},
    "swa": {"layer_kind": "swa", "window": 2048},
    "full": {"layer_kind": "full"},
    "hymba": {"layer_kind": "hymba", "window": 512},
    "decay-gate": {"layer_kind": "rattention", "window": 512, "decay_gate": True},
    "hymba-decay-gate": {"layer_kind": "hymba", "window": 512, "decay_gate": True},
}


def closed_formula(name: str, kind: str) -> int:
    """Parameters by arithmetic: embeddings, projections, feed-forward, norms."""
    f = FLAVORS[name]
    attention = f.dim * f.head_dim * (2 * f.n_heads + 2 * f.n_kv_heads) + 2 * f.head_dim
    # Split heads have one norm each.
    head_norms = {"rattention": 2, "decay-gate": 2}.get(kind, 0 if kind in ("swa", "full") else 1)
    gated = {"decay-gate": f.n_kv_heads, "hymba-decay-gate": f.n_kv_heads // 2}.get(kind, 0)
    extra = head_norms * f.n_heads * f.head_dim + gated * (f.dim + 2)
    layer = attention + 3 * f.dim * f.ffn_dim + 2 * f.dim
    n_local = f.n_layers * 3 // 4
    assert f.n_layers % 4 == 0
    return f.n_layers * layer + n_local * extra + f.dim + f.vocab_size * f.dim * (1 if f.tied else 2)


def meta_model(name: str, kind: str):
    config = build_model_config(resolve_flavor(name), make_layers(**KINDS[kind]))
    with torch.device("meta"):
        return config, config.build()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FLAVORS)
def test_parameter_count(name, kind):
    _, model = meta_model(name, kind)
    assert sum(p.numel() for p in model.parameters()) == closed_formula(name, kind)


@pytest.mark.parametrize(
    ("name", "millions"), [("debug", 1), ("30m", 30), ("150m", 150), ("400m", 400), ("3b", 3000), ("12b", 12800)]
)
def test_flavor_is_about_its_name(name, millions):
    assert closed_formula(name, "rattention") / 1e6 == pytest.approx(millions, rel=0.2 if name == "debug" else 0.03)


def test_papers_table():
    three, twelve = FLAVORS["3b"], FLAVORS["12b"]
    assert (three.dim, three.n_layers, three.n_heads, three.n_kv_heads, three.head_dim) == (2048, 56, 16, 4, 128)
    assert (twelve.dim, twelve.n_layers, twelve.n_heads, twelve.n_kv_heads, twelve.head_dim) == (5120, 40, 40, 8, 128)
    assert (three.ffn_dim, twelve.ffn_dim) == (6656, 16384)
    assert {three.activation, twelve.activation} == {"gelu"}


def test_arms_differ_in_the_layer_kind_alone():
    """Every parameter of the full-attention arm stands in the other arms with the same shape."""
    shapes = {k: {n: tuple(p.shape) for n, p in meta_model("3b", k)[1].named_parameters()} for k in KINDS}
    for kind in ("swa", "rattention"):
        extra = {n.split(".", 2)[2] for n in shapes[kind].keys() - shapes["full"].keys()}
        assert extra == (set() if kind == "swa" else {"attention.swa_norm.weight", "attention.rla_norm.weight"})
        assert all(shapes[kind][n] == shape for n, shape in shapes["full"].items())


@pytest.mark.parametrize(("window", "seq_len"), [(0, 7), (1, 7), (3, 7), (6, 7), (9, 7), (None, 7), (511, 4096)])
def test_mean_visible_keys_counts_pairs(window, seq_len):
    w = seq_len if window is None else window
    pairs = sum(min(t, w) + 1 for t in range(seq_len))
    assert mean_visible_keys(window, seq_len) == pytest.approx(pairs / seq_len)


def test_flops_of_a_layer_by_hand():
    """Heads 4 over 2, width 32, T 8, window 2: 4 D H keys, and 2 F D (H + G) with F = 2 D."""
    config = build_model_config(resolve_flavor("debug"), make_layers(window=2))
    keys = (1 + 2 + 3 * 6) / 8
    assert attention_flops_per_token(config.layers[0].attention, 8) == pytest.approx(
        4 * 32 * 4 * keys + 2 * 64 * 32 * 6
    )
    assert attention_flops_per_token(config.layers[3].attention, 8) == pytest.approx(4 * 32 * 4 * 4.5)


def test_flops_of_split_heads_by_hand():
    """Two of the 4 heads see a window's keys, the other two read one of the 2 KV heads' states."""
    config = build_model_config(resolve_flavor("debug"), make_layers(layer_kind="hymba", window=2))
    keys = (1 + 2 + 3 * 6) / 8
    assert attention_flops_per_token(config.layers[0].attention, 8) == pytest.approx(
        4 * 32 * 2 * keys + 2 * 64 * 32 * (2 + 1)
    )


def test_training_flops_per_token():
    config, model = meta_model("30m", "rattention")
    nparams, per_token = nparams_and_flops_per_token(config, model, 1024)
    matmul = nparams - config.vocab_size * config.dim
    branches = sum(attention_flops_per_token(layer.attention, 1024) for layer in config.layers)
    assert per_token == pytest.approx(6 * matmul + 3 * branches)
    # A tied embedding is multiplied with once, so nothing is taken off.
    config, model = meta_model("150m", "full")
    nparams, per_token = nparams_and_flops_per_token(config, model, 1024)
    assert per_token == pytest.approx(6 * nparams + 3 * 12 * (4 * 16 * 64 * 512.5), rel=1e-3)


def test_full_attention_is_charged_more_than_a_window():
    counted = {k: nparams_and_flops_per_token(*meta_model("3b", k), 8192)[1] for k in KINDS}
    assert counted["hymba"] < counted["rattention"] < counted["decay-gate"] < counted["swa"]
    assert counted["linear-only"] < counted["rattention"] < counted["swa"] < counted["full"]


@pytest.mark.parametrize(("swa", "rla"), [(1.0, 0.25), (0.5, 0.0), (0.5, 1.0)])
def test_where_the_scales_of_the_norms_begin(swa, rla):
    layers = make_layers(window=4, swa_norm_init=swa, rla_norm_init=rla)
    config = build_model_config(resolve_flavor("debug"), layers)
    model = config.build()
    with torch.no_grad():
        model.init_weights()
    attention = model.layers["0"].attention
    assert (attention.swa_norm.weight == swa).all()
    assert (attention.rla_norm.weight == rla).all()
    assert config.to_dict()["layers"][0]["attention"]["rla_norm"]["param_init"] == {"weight": {"value": rla}}


@pytest.mark.parametrize(
    ("options", "swa", "rla"),
    [
        ({"window": 4}, 0.1, 0.0),
        ({"window": 4, "rla_norm_init": 1.0}, 0.1, 1.0),
        ({"window": 4, "swa_norm_init": 1.0}, 1.0, 0.0),
        ({"window": None}, None, 0.1),  # the linear branch alone
        ({"window": None, "layer_masks": {"0": {"attention_sink": {"window": 4, "sinks": 1}}}}, 0.1, 0.0),
        ({"window": 4, "layer_kind": "hymba"}, 0.1, 0.1),
    ],
    ids=str,
)
def test_where_the_scales_of_the_norms_begin_by_default(options, swa, rla):
    attention = build_model_config(resolve_flavor("debug"), make_layers(**options)).layers[0].attention
    norms = (attention.swa_norm, attention.rla_norm)
    assert [None if norm is None else norm.param_init["weight"].value for norm in norms] == [swa, rla]


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (["local"], "LLLL"),
        (["global"], "GGGG"),
        (["local", "global"], "LGLG"),
        (["local", "local", "local", "global"], "LLLG"),
        (["global", "local", "local"], "GLLG"),
    ],
    ids="-".join,
)
def test_pattern_repeats(pattern, kinds):
    config = build_model_config(resolve_flavor("debug"), make_layers(window=4, pattern=pattern))
    built = "".join("L" if layer.attention.kind == "rattention" else "G" for layer in config.layers)
    assert built == kinds
    expected = {"L": "sliding_window_4", "G": "causal"}
    assert set(config.masks) == {expected[k] for k in set(kinds)}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": -1}, "window must be an integer >= 0 .* got -1"),
        ({"window": 1.5}, "window must be an integer .* got 1.5"),
        ({"window": True}, "window must be an integer .* got True"),
        ({"layer_kind": "swa"}, "'swa' needs a window"),
        ({"layer_kind": "hymba"}, "'hymba' needs a window"),
        ({"layer_kind": "full", "window": 4}, "'full' has no window, got window 4"),
        (
            {"layer_kind": "ratention"},
            "unknown layer_kind 'ratention', did you mean 'rattention'.*known: rattention, swa",
        ),
        ({"window": 4, "feature_map": "softmx"}, "unknown feature_map 'softmx', did you mean 'softmax'.*relu"),
        ({"window": 4, "pattern": []}, "pattern must be a list"),
        ({"window": 4, "pattern": "LLLG"}, "pattern must be a list"),
        ({"window": 4, "pattern": ["local", "globl"]}, "unknown pattern entry 'globl', did you mean 'global'"),
        ({"window": 4, "rla_norm_init": "1"}, "rla_norm_init must be a finite number, got '1'"),
        ({"window": 4, "swa_norm_init": True}, "swa_norm_init must be a finite number, got True"),
        ({"window": 4, "rla_norm_init": float("nan")}, "rla_norm_init must be a finite number, got nan"),
        ({"window": 4, "rla_norm_init": 0.5, "branch_norm": False}, "a norm that branch_norm false leaves out"),
        ({"window": 4, "global_mask_args": {"window": 4}}, "global_mask_args given without global_mask"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_refused_layers(options, said):
    with pytest.raises(ValueError, match=said):
        make_layers(**options)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"n_kv_heads": 3}, "n_heads must be a multiple of n_kv_heads, got 4 query and 3 KV heads"),
        ({"head_dim": 33}, "head_dim must be even .* got 33"),
        ({"dim": 0}, "dim must be a positive integer, got 0"),
        ({"activation": "selu"}, "unknown activation 'selu', did you mean 'silu'"),
        ({"n_head": 3}, "unknown model field 'n_head', did you mean 'n_heads'"),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_refused_sizes(overrides, said):
    with pytest.raises(ValueError, match=said):
        resolve_flavor("debug", overrides)


def test_split_heads_want_pairs_of_groups():
    with pytest.raises(ValueError, match=r"'hymba' gives half .* n_kv_heads must be even, got 1"):
        build_model_config(resolve_flavor("debug", {"n_kv_heads": 1}), make_layers(layer_kind="hymba", window=4))


def test_unknown_flavor_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown flavor '3B', did you mean '3b'.*known: debug, 30m"):
        resolve_flavor("3B")


def test_unknown_mask_is_refused_when_the_model_is_described():
    layers = make_layers(layer_kind="swa", window=4, global_mask="causl")
    with pytest.raises(ValueError, match=r"causl.*causal"):
        build_model_config(resolve_flavor("debug"), layers)
