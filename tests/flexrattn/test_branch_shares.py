"""The branches' RMS and the norms' scales: against the branches' outputs, on several ranks, and through compilation."""

from __future__ import annotations

import pytest
import torch

from flexrattn import branch_shares, build_model_config, make_layers, resolve_flavor
from tests.flexrattn.runs import losses, train, write_config

T, WINDOW = 48, 5
NAMES = ("softmax_rms", "linear_rms", "linear_over_softmax", "softmax_norm_scale", "linear_norm_scale")


def build(**options):
    model = build_model_config(
        resolve_flavor("debug", {"vocab_size": 32, "n_kv_heads": 4}), make_layers(**{"window": WINDOW, **options})
    ).build()
    torch.manual_seed(0)
    with torch.no_grad():
        model.init_weights()
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def run(model, positions) -> None:
    tokens = torch.randint(0, 32, positions.shape)
    with torch.no_grad():
        model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))


@pytest.mark.parametrize("kind", ["rattention", "hymba"])
def test_shares_are_those_of_the_branches_outputs(kind):
    model = build(layer_kind=kind)
    outputs: dict[str, list] = {"softmax": [], "linear": []}
    attention = model.layers["1"].attention
    attention.inner_attention.register_forward_hook(lambda module, args, out: outputs["softmax"].append(out.double()))
    linear_output = (lambda out: out) if kind == "hymba" else (lambda out: out[0])  # with q, k, v for the other branch
    attention.residual.register_forward_hook(
        lambda module, args, out: outputs["linear"].append(linear_output(out).double())
    )
    rows = [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((30, 3, 15), (48,))]
    positions = torch.stack(rows)
    branch_shares.begin([model])
    run(model, positions)
    run(model, positions)
    shares = branch_shares.end([model])
    # Where the linear branch's heads are split off they always read something, else beyond the window.
    reads = torch.cat([positions, positions]) >= (0 if kind == "hymba" else WINDOW + 1)
    rms = {name: torch.cat(out)[reads].square().mean().sqrt().item() for name, out in outputs.items()}
    tag = "branches/layer_01"
    assert shares[f"{tag}/softmax_rms"] == pytest.approx(rms["softmax"], rel=1e-5)
    assert shares[f"{tag}/linear_rms"] == pytest.approx(rms["linear"], rel=1e-5)
    assert shares[f"{tag}/linear_over_softmax"] == pytest.approx(rms["linear"] / rms["softmax"], rel=1e-5)
    assert shares[f"{tag}/softmax_norm_scale"] == pytest.approx(attention.swa_norm.weight.abs().mean().item())
    assert shares[f"{tag}/linear_norm_scale"] == pytest.approx(attention.rla_norm.weight.abs().mean().item())
    # Three of four layers are local.
    assert set(shares) == {f"branches/layer_0{i}/{name}" for i in range(3) for name in NAMES}


@pytest.mark.parametrize("options", [{"layer_kind": "swa"}, {"layer_kind": "full", "window": None}, {"window": None}])
def test_layers_of_one_branch_have_no_shares(options):
    model = build(**options)
    branch_shares.begin([model])
    run(model, torch.arange(T)[None])
    assert branch_shares.end([model]) == {}


def test_a_window_past_the_sequence_leaves_the_scales():
    model = build(window=T, branch_norm=True)
    branch_shares.begin([model])
    run(model, torch.arange(T)[None])
    assert {tag.rpartition("/")[2] for tag in branch_shares.end([model])} == set(NAMES[3:])
    assert build(branch_norm=False).layers["0"].attention.branch_squares is None


def test_training_forward_does_not_measure():
    model = build()
    before = [layer.attention.branch_squares for layer in model.layers.values()]
    branch_shares.begin([model])
    branch_shares.end([model])
    run(model, torch.arange(T)[None])
    assert before == [layer.attention.branch_squares for layer in model.layers.values()] == [None] * 4


VALIDATED = {
    "recipe_args": {
        "pattern": ["local", "global"],
        "model": {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "ffn_dim": 48},
    },
    "training": {"steps": 2},
    "validator": {"enable": True, "freq": 100, "steps": 2, "dataloader": {"shard_by": "rows"}},
    "checkpoint": {"enable": False},
}


def shares_of(out) -> dict[str, dict[int, float]]:
    return {f"{i}/{name}": losses(out, f"branches/layer_0{i}/{name}") for i in range(2) for name in NAMES}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    train(write_config(folder, **VALIDATED))
    return shares_of(folder / "out")


def test_tensorboard_has_them_at_each_validation(one_rank):
    for tag, found in one_rank.items():
        assert list(found) == ([] if tag.startswith("1/") else [0, 2]), tag
        assert all(value > 0 for value in found.values())
    assert one_rank["0/linear_norm_scale"][0] == 1.0


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, ["--training.local_batch_size", "2"], id="fsdp-2"),
        pytest.param(2, ["--parallelism.tensor_parallel_degree", "2"], id="tp-2"),
        pytest.param(
            2,
            ["--parallelism.tensor_parallel_degree", "2", "--parallelism.spmd_backend", "partial_dtensor"],
            id="tp-2-dtensor",
        ),
        # Without code generation: what is asked is that validation's blocks are one graph each.
        pytest.param(1, ["--compile.enable", "--compile.backend", "aot_eager"], id="compiled-selective"),
    ],
)
def test_ranks_and_graphs_measure_the_same(one_rank, tmp_path, ranks, flags):
    config = write_config(tmp_path, **VALIDATED)
    config.write_text(config.read_text() + "activation_checkpoint: selective\n")
    train(config, *flags, ranks=ranks)
    for tag, found in shares_of(tmp_path / "out").items():
        assert found == pytest.approx(one_rank[tag], rel=1e-4), tag
