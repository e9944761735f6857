"""What `activation_checkpoint` runs again of the linear branch's op. The op's kernels are replaced: they need a GPU."""

import pytest
import torch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from flexrattn import ResidualLinearBranch
from flexrattn.activation_checkpoint import RAttentionSelectiveAC, with_linear_branch
from tests.closeness import relative_error


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

    def solve_bwd(do, d_final, inputs, *options):
        q, k, v = inputs[:3]
        found.append("backward")
        dv = torch.full_like(v, (do * q).sum().item() / v.numel())
        grads = [do * v.mean(), torch.zeros_like(k), dv]
        grads = [grad if other is None else grad + other for grad, other in zip(grads, options[-1], strict=True)]
        return *grads, *(q.new_empty(0) for _ in range(4))

    monkeypatch.setattr(fused, "solve", solve)
    monkeypatch.setattr(fused, "solve_bwd", solve_bwd)
    monkeypatch.setattr(fused_ops, "environment_refusal", lambda _: "")
    return found


class Block(torch.nn.Module):
    """Two readers of q, k, v. joins: the branch's op adds the gradients of both."""

    def __init__(self, joins: bool) -> None:
        super().__init__()
        self.joins = joins
        self.project = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(4))
        self.branch = ResidualLinearBranch(ResidualLinearBranch.Config(window=2, impl="triton"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = given = [layer(x.tanh())[:, :, None] for layer in self.project[:3]]
        if self.joins:
            o, (q, k, v) = self.branch(*given, positions=None, with_inputs=True)
        else:
            o = self.branch(*given, positions=None)
        return self.project[3]((o.tanh() + (q * k).sin() * v.cos())[:, :, 0])


def gradients(config, *, joins: bool, compiled: bool = False) -> list[torch.Tensor]:
    torch.manual_seed(0)
    block = Block(joins)
    x = torch.randn(2, 8, 16, requires_grad=True)
    parameters = [x, *block.parameters()]
    wrapped = block if config is None else config.build()._wrap_block(block, base_fqn="layers.0")
    if compiled:
        # As torchtitan does: what is wrapped is compiled. This backend splits forward from backward as Inductor does.
        torch._dynamo.reset()
        wrapped = torch.compile(wrapped, fullgraph=True, backend="aot_eager_decomp_partition")
    return list(torch.autograd.grad(wrapped(x).square().sum(), parameters))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("joins", [False, True], ids=["apart", "joined"])
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
def test_runs_and_gradients(runs, config, expected, joins, compiled):
    reference = gradients(None, joins=False)
    runs.clear()
    got = gradients(config, joins=joins, compiled=compiled)
    assert runs == expected
    # Sums of three terms may come in another order.
    tolerance = 1e-6 if joins or compiled else 0.0
    assert all(relative_error(x, y) <= tolerance for x, y in zip(got, reference, strict=True))


def test_fields_are_kept():
    config = SelectiveAC.Config(preserve_rng_state=False, force_recompute_mm_shapes_by_fqns=["wq"])
    ours = with_linear_branch(config)
    assert type(ours) is RAttentionSelectiveAC.Config
    assert not ours.preserve_rng_state
    assert ours.force_recompute_mm_shapes_by_fqns == ["wq"]
    assert with_linear_branch(ours) is ours
    assert with_linear_branch(None) is None
