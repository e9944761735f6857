"""The layer against an independent float64 reading of the paper, and what its norms do to all-zero rows."""

from __future__ import annotations

import pytest
import torch

from flexrattn import make_layers, resolve_flavor
from flexrattn.attention import HeadRMSNorm
from flexrattn.flavors import build_model_config
from flexrattn.head_split import merge_groups, split_groups
from flexrattn.inspect.scan import scan_shape
from flexrattn.masked_attention import MaskedAttention
from scan_kernels import residual_linear_attention_and_inputs
from score_mods import build_block_mask, sliding_window
from tests import paper
from tests.closeness import relative_error

T = 41
SIZE = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 32, "vocab_size": 16}
ONE_DOCUMENT = [41]
DOCUMENTS = [1, 13, 2, 24, 1]

CASES = [
    pytest.param({"layer_kind": "rattention", "window": 5}, id="rattention"),
    pytest.param({"layer_kind": "rattention", "window": 0}, id="window-0"),
    pytest.param({"layer_kind": "rattention", "window": 40}, id="window-T-minus-1"),
    pytest.param({"layer_kind": "rattention", "window": None}, id="linear-only"),
    pytest.param({"layer_kind": "rattention", "window": 5, "feature_map": "relu"}, id="relu"),
    pytest.param({"layer_kind": "rattention", "window": 5, "feature_map": "softmax_single"}, id="softmax-single"),
    pytest.param({"layer_kind": "rattention", "window": 5, "feature_map": "identity"}, id="identity"),
    pytest.param({"layer_kind": "rattention", "window": 5, "branch_norm": False}, id="no-branch-norm"),
    pytest.param({"layer_kind": "rattention", "window": 5, "learned_qk_scale": True}, id="learned-qk-scale"),
    pytest.param({"layer_kind": "rattention", "window": 5, "learned_initial_state": True}, id="learned-state"),
    pytest.param({"layer_kind": "rattention", "window": 5, "decay_gate": True}, id="decay-gate"),
    pytest.param({"layer_kind": "rattention", "window": None, "decay_gate": True}, id="decay-gate-linear-only"),
    pytest.param(
        {"layer_kind": "rattention", "window": 5, "decay_gate": True, "learned_initial_state": True},
        id="decay-gate-learned-state",
    ),
    pytest.param({"layer_kind": "hymba", "window": 5}, id="hymba"),
    pytest.param({"layer_kind": "hymba", "window": 5, "decay_gate": True}, id="hymba-decay-gate"),
    pytest.param({"layer_kind": "swa", "window": 5}, id="swa"),
    pytest.param({"layer_kind": "full", "window": None}, id="full"),
]


def positions_of(documents: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in documents])


def build(options: dict, *, layer: int = 0, pattern=("local", "global"), **model) -> tuple:
    """A model on the CPU with random weights, its attention layer and that layer's config."""
    config = build_model_config(resolve_flavor("debug", {**SIZE, **model}), make_layers(**options, pattern=pattern))
    torch.manual_seed(0)
    with torch.no_grad():
        built = config.build()
        built.init_weights()
        for parameter in built.parameters():
            # Norm scales away from one, projections large enough that no term of the layer vanishes.
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.ndim > 1 else 0.2) + (parameter.ndim == 1))
    return built, built.layers[str(layer)].attention, config.layers[layer].attention


@pytest.mark.parametrize("documents", [ONE_DOCUMENT, DOCUMENTS], ids=["one-document", "packed"])
@pytest.mark.parametrize("options", CASES)
def test_layer_is_the_papers(options, documents):
    model, attention, config = build(options)
    model.double()
    x = torch.randn(2, T, SIZE["dim"], dtype=torch.float64, requires_grad=True)
    positions = positions_of(documents).expand(2, T)
    actual = attention(x, model.get_attention_masks(positions), positions)
    weights = {name: p.detach().clone().requires_grad_(True) for name, p in attention.named_parameters()}
    x_ref = x.detach().clone().requires_grad_(True)
    expected = torch.stack(
        [
            paper.layer(
                row,
                weights,
                positions[0],
                n_heads=4,
                n_kv_heads=2,
                kind=config.kind,
                window=config.window,
                feature_map=options.get("feature_map", "softmax"),
                theta=5e5,
            )
            for row in x_ref
        ]
    )
    # The norms and feature maps run in fp32 whatever the input: that is the precision to hold.
    assert relative_error(actual, expected) < 1e-5
    grad = torch.randn_like(actual)
    actual.backward(grad)
    expected.backward(grad)
    assert relative_error(x.grad, x_ref.grad) < 1e-4
    for name, p in attention.named_parameters():
        assert relative_error(p.grad, weights[name].grad) < 1e-4, name


@pytest.mark.parametrize("theta", [None, 5e5], ids=["no-positions", "global-rope"])
def test_global_layer_rotates_only_where_asked(theta):
    options = {"layer_kind": "rattention", "window": 5, "global_rope": theta is not None}
    model, attention, _ = build(options, layer=1)
    model.double()
    x = torch.randn(1, T, SIZE["dim"], dtype=torch.float64)
    positions = positions_of(ONE_DOCUMENT)[None]
    weights = {name: p.detach() for name, p in attention.named_parameters()}
    expected = paper.layer(x[0], weights, positions[0], n_heads=4, n_kv_heads=2, kind="full", window=None, theta=theta)
    assert (attention.rope is None) == (theta is None)
    assert relative_error(attention(x, model.get_attention_masks(positions), positions)[0], expected) < 1e-5


@pytest.mark.parametrize("kind", ["swa", "full"])
def test_no_linear_parameters_without_a_linear_branch(kind):
    _, attention, _ = build({"layer_kind": kind, "window": 5 if kind == "swa" else None})
    names = {name for name, _ in attention.named_parameters()}
    assert names == {"qkv_linear.wq.weight", "qkv_linear.wk.weight", "qkv_linear.wv.weight", "wo.weight"} | {
        "q_norm.weight",
        "k_norm.weight",
    }


def test_branches_share_the_projections():
    """Beyond a sliding-window layer, RAttention has the two norms' scales and nothing else."""
    _, swa, _ = build({"layer_kind": "swa", "window": 5})
    _, rattention, _ = build({"layer_kind": "rattention", "window": 5})
    extra = {name for name, _ in rattention.named_parameters()} - {name for name, _ in swa.named_parameters()}
    assert extra == {"swa_norm.weight", "rla_norm.weight"}


@pytest.mark.parametrize("kind", ["rattention", "hymba"])
def test_decay_gate_begins_as_mamba2s(kind):
    """exp(A_log) from 1 to 16, softplus(dt_bias) from 0.001 to 0.1, and one of each for every KV head that is read."""
    size = resolve_flavor("debug", {**SIZE, "n_heads": 64, "n_kv_heads": 64})
    model = build_model_config(size, make_layers(layer_kind=kind, window=5, decay_gate=True)).build()
    with torch.no_grad():
        model.init_weights()
    gate = model.layers["0"].attention.decay_gate
    groups = 64 if kind == "rattention" else 32
    assert gate.proj.weight.shape == (groups, SIZE["dim"])
    assert gate.A_log.shape == gate.dt_bias.shape == (groups,)
    rate, step = gate.A_log.detach().exp(), torch.nn.functional.softplus(gate.dt_bias.detach())
    for x, low, high in ((rate, 1, 16), (step, 1e-3, 1e-1)):
        assert low <= x.min() < low * 2
        assert high / 2 < x.max() <= high * (1 + 1e-6)


@pytest.mark.parametrize("decay_gate", [False, True])
def test_the_scan_takes_what_the_layer_computes_in(decay_gate, monkeypatch):
    """bf16 stays bf16, but for the decays: a sum of many of them is an exponent."""
    seen = []

    def scan(q, k, v, **options):
        seen.append((q.dtype, k.dtype, v.dtype, options["decay"] is not None and options["decay"].dtype))
        return residual_linear_attention_and_inputs(q, k, v, **options)

    monkeypatch.setattr("flexrattn.attention.residual_linear_attention_and_inputs", scan)
    model, attention, _ = build({"layer_kind": "rattention", "window": 5, "decay_gate": decay_gate})
    model.bfloat16()
    positions = positions_of(ONE_DOCUMENT)[None]
    outputs = []
    attention.residual.register_forward_hook(lambda module, args, out: outputs.append(out[0].dtype))
    attention(torch.randn(1, T, SIZE["dim"]).bfloat16(), model.get_attention_masks(positions), positions)
    assert seen == [(*3 * [torch.bfloat16], torch.float32 if decay_gate else False)]
    assert outputs == [torch.bfloat16]


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, "qkv"),
        ({"learned_initial_state": True}, "qkv"),
        ({"learned_qk_scale": True}, "v"),
        ({"local_mask": "attention_sink", "local_mask_args": {"sinks": 2}}, "qk"),
        ({"local_mask": {"stochastic_window": {"low": 0, "high": 20}}}, "q"),
        ({"decay_gate": True}, "qkv"),
        ({"layer_kind": "hymba"}, ""),
    ],
    ids=["plain", "learned state", "learned scale", "sinks", "draws", "decay gate", "hymba"],
)
def test_which_gradients_the_linear_branch_joins(options, joined, monkeypatch):
    """The softmax branch reads what the scan passes on, where that is what it would read anyway."""
    passed: list[torch.Tensor] = []

    def scan(q, k, v, **options):
        o, *inputs = residual_linear_attention_and_inputs(q, k, v, **options)
        passed[:] = [x.view_as(x) for x in inputs]
        return o, *passed

    monkeypatch.setattr("flexrattn.attention.residual_linear_attention_and_inputs", scan)
    model, attention, config = build({"layer_kind": "rattention", "window": 5, **options})
    model.bfloat16()
    model.set_step(1)
    attention.rope = None  # so that q and k come as they are
    read: dict[str, torch.Tensor] = {}
    attention.inner_attention.register_forward_pre_hook(lambda module, args: read.update(zip("qkv", args, strict=True)))
    positions = positions_of(DOCUMENTS)[None]
    masks = model.get_attention_masks(positions)
    attention(torch.randn(1, T, SIZE["dim"]).bfloat16(), masks, positions)
    assert "".join(name for name, x in read.items() if any(x is y for y in passed)) == joined
    # What `python -m flexrattn.inspect` compiles is what trains.
    shape = scan_shape(config, batch=1, seq_len=T, dtype=torch.bfloat16, capability=90)
    assert shape.joined == joined
    attention.joins_gradients = False
    passed.clear()
    attention(torch.randn(1, T, SIZE["dim"]).bfloat16(), masks, positions)
    assert not passed


def test_split_groups_and_back():
    """Even groups and odd ones, each query head beside the KV head it reads."""
    q = torch.arange(8.0)[None, None, :, None].expand(2, 3, 8, 4)
    k = torch.arange(4.0)[None, None, :, None].expand(2, 3, 4, 4)
    even, odd = split_groups(q, k, k)
    assert even[0][0, 0, :, 0].tolist() == [0, 1, 4, 5]
    assert odd[0][0, 0, :, 0].tolist() == [2, 3, 6, 7]
    assert even[1][0, 0, :, 0].tolist() == [0, 2]
    assert odd[2][0, 0, :, 0].tolist() == [1, 3]
    assert torch.equal(merge_groups(even[0], odd[0], 2), q)


def norm(n_heads=2, head_dim=8) -> HeadRMSNorm:
    module = HeadRMSNorm.Config(n_heads=n_heads, head_dim=head_dim).build()
    torch.nn.init.normal_(module.weight, mean=1.0, std=0.1)
    return module


def test_zero_rows_carry_no_gradient():
    """A gradient of 1e4 arriving on all-zero rows changes nothing anywhere; the plain formula multiplies it by 1e4."""
    module = norm()
    x = torch.randn(1, 6, 2, 8)
    x[:, :3] = 0
    gradients = []
    for on_zero_rows in (0.0, 1e4):
        leaf = x.clone().requires_grad_(True)
        module.weight.grad = None
        upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        upstream[:, :3] = on_zero_rows
        module(leaf).backward(upstream)
        assert torch.isfinite(leaf.grad).all()
        gradients.append((leaf.grad, module.weight.grad.clone()))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert not gradients[1][0][:, :3].any()


def test_head_norm_is_rms_norm_elsewhere():
    module = norm().double()
    x = torch.randn(2, 5, 2, 8, dtype=torch.float64)
    assert relative_error(module(x), paper.rms_norm(x, module.weight.detach(), 1e-8)) < 1e-6


def test_layer_gradients_ignore_rows_before_the_window_fills():
    """1e4 on the linear branch's empty rows leaves every gradient of the layer as it was."""
    model, attention, _ = build({"layer_kind": "rattention", "window": 5})
    positions = positions_of(ONE_DOCUMENT)[None]
    masks = model.get_attention_masks(positions)
    x = torch.randn(1, T, SIZE["dim"])
    linear: list[torch.Tensor] = []
    attention.residual.register_forward_hook(lambda module, args, out: linear.append(out[0]))
    gradients = []
    for on_empty_rows in (0.0, 1e4):
        attention.zero_grad()
        y = attention(x, masks, positions)
        upstream = torch.zeros_like(linear[-1])
        upstream[:, :6] = on_empty_rows
        torch.autograd.backward([y, linear[-1]], [torch.ones_like(y), upstream])
        gradients.append({name: p.grad.clone() for name, p in attention.named_parameters()})
    assert not linear[-1][:, :6].any()
    assert linear[-1][:, 6:].any()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize(("backend", "asked_for"), [("triton", None), ("flash", {"BACKEND": "FLASH"})])
def test_softmax_backend_reaches_flex_attention(backend, asked_for, monkeypatch):
    seen = []

    def attend(q, k, v, **options):
        seen.append(options["kernel_options"])
        return q

    monkeypatch.setattr(MaskedAttention, "_static_flex", staticmethod(attend))
    layers = make_layers(layer_kind="swa", window=4, softmax_backend=backend)
    config = build_model_config(resolve_flavor("debug", {}), layers)
    mask = build_block_mask(sliding_window(4), q_len=8, kv_len=8, device="cpu")
    q, k = torch.zeros(1, 8, 4, 32), torch.zeros(1, 8, 2, 32)
    for layer in config.layers:
        layer.attention.inner_attention.build()(q, k, k, attention_masks=mask, enable_gqa=True)
    assert seen == [asked_for] * len(config.layers)
