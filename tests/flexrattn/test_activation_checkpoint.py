"""What `activation_checkpoint` runs again of the linear branch's op. The op's kernels are replaced: they need a GPU."""

import pytest
import torch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from flexrattn import ResidualLinearBranch
from flexrattn.activation_checkpoint import RAttentionSelectiveAC, with_linear_branch


@pytest.fixture
def runs(monkeypatch) -> list[str]:
    """The runs of the op and of its backward, in order."""
    pytest.importorskip("triton")
    from scan_kernels import fused, fused_ops

    found: list[str] = []

    def solve(inputs, *others):
        q, _, v = inputs[:3]
        found.append("forward")
        return q * v.mean(), *(q.new_empty(0) for _ in range(3))

    def solve_bwd(do, d_final, inputs, *others):
        q, k, v = inputs[:3]
        found.append("backward")
        dv = torch.full_like(v, (do * q).sum().item() / v.numel())
        return do * v.mean(), torch.zeros_like(k), dv, *(q.new_empty(0) for _ in range(4))

    monkeypatch.setattr(fused, "solve", solve)
    monkeypatch.setattr(fused, "solve_bwd", solve_bwd)
    monkeypatch.setattr(fused_ops, "environment_refusal", lambda _: "")
    return found


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.branch = ResidualLinearBranch(ResidualLinearBranch.Config(window=2, impl="triton"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (layer(x.tanh())[:, :, None] for layer in self.project[:3])
        return self.project[3](self.branch(q, k, v, positions=None)[:, :, 0].tanh())


def gradients(config) -> list[torch.Tensor]:
    torch.manual_seed(0)
    block = Block()
    x = torch.randn(2, 8, 16, requires_grad=True)
    parameters = [x, *block.parameters()]
    wrapped = block if config is None else config.build()._wrap_block(block, base_fqn="layers.0")
    return list(torch.autograd.grad(wrapped(x).square().sum(), parameters))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, ["forward", "backward"]),
        (with_linear_branch(SelectiveAC.Config()), ["forward", "backward"]),
        (SelectiveAC.Config(), ["forward", "forward", "backward"]),
        (with_linear_branch(FullAC.Config()), ["forward", "forward", "backward"]),
    ],
    ids=["none", "selective", "selective of torchtitan", "full"],
)
def test_runs_and_gradients(runs, config, expected):
    reference = gradients(None)
    runs.clear()
    got = gradients(config)
    assert runs == expected
    assert all(torch.equal(x, y) for x, y in zip(got, reference, strict=True))


def test_fields_are_kept():
    config = SelectiveAC.Config(preserve_rng_state=False, force_recompute_mm_shapes_by_fqns=["wq"])
    ours = with_linear_branch(config)
    assert type(ours) is RAttentionSelectiveAC.Config
    assert not ours.preserve_rng_state
    assert ours.force_recompute_mm_shapes_by_fqns == ["wq"]
    assert with_linear_branch(ours) is ours
    assert with_linear_branch(None) is None
