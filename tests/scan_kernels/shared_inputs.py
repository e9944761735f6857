"""A linear branch and another reader of its q, k, v: one node for their gradients, and autograd's additions."""

from collections.abc import Callable

import torch
from torch import Tensor

from scan_kernels import residual_linear_attention, residual_linear_attention_and_inputs
from tests.scan_kernels.cases import Inputs, assert_close, cast, output_gradient

Entry = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def apart(q: Tensor, k: Tensor, v: Tensor, **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same without a node: autograd adds."""
    return residual_linear_attention(q, k, v, **options), q, k, v


def other(q: Tensor, k: Tensor, v: Tensor, used: str = "qkv") -> Tensor:
    """The other reader, of q, k, v or some of them, as wide as the linear branch.

    In float64, so that its own rounding is in no comparison: CUDA sums fp32 in fp32, 1.4e-5 here by 1000 tokens.
    """
    q, k, v = (x.double() for x in (q, k, v))
    R = q.shape[2] // k.shape[2]
    o = torch.zeros_like(v).repeat_interleave(R, dim=2)
    if "v" in used:
        o = o + v.repeat_interleave(R, dim=2).sin()
    if "q" in used:
        o = o + q.cos().sum(-1, keepdim=True)
    if "k" in used:
        o = o + k.cumsum(1).sin().mean(-1, keepdim=True).repeat_interleave(R, dim=2)
    return o


def solve(entry: Entry, inputs: Inputs, used: str = "qkv", **options) -> dict[str, Tensor]:
    """The sum of both readers, and the gradients of all inputs."""
    o, q, k, v = entry(**inputs, **options)
    y = o + other(q, k, v, used)
    grads = torch.autograd.grad(y, list(inputs.values()), output_gradient(y), allow_unused=True, materialize_grads=True)
    return {"o": y.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def check(inputs: Inputs, dtype: torch.dtype, tolerance: float, used: str = "qkv", **options) -> None:
    """Against float64; in fp32, where a sum is rounded once either way, also bit by bit with autograd's additions."""
    inputs = cast(cast(inputs, dtype), torch.float64)
    expected = solve(apart, inputs, used, impl="torch", **options)
    got = solve(residual_linear_attention_and_inputs, cast(inputs, dtype), used, impl="triton", **options)
    for name, x in got.items():
        assert_close(x, expected[name], tolerance, name)
    if dtype == torch.float32:
        added = solve(apart, cast(inputs, dtype), used, impl="triton", **options)
        for name, x in got.items():
            assert torch.equal(x, added[name]), name


def additions_in_the_backward(entry: Entry, inputs: Inputs, **options) -> tuple[int, dict[str, Tensor]]:
    """How many sums the compiled backward makes of the kernels' dq, dk, dv, and what `solve` finds with it."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def compiler(module, _):
        graphs.append(module.graph)
        return make_boxed_func(module)

    def both(**inputs: Tensor) -> tuple[Tensor, ...]:
        o, q, k, v = entry(**inputs, **options)
        return o + other(q, k, v), *(x.detach() for x in (q, k, v))

    backend = aot_autograd(fw_compiler=compiler)
    torch._dynamo.reset()
    y, *_ = torch.compile(both, fullgraph=True, backend=backend, dynamic=False)(**inputs)
    grads = torch.autograd.grad(y, list(inputs.values()), output_gradient(y))
    (call,) = graphs[-1].find_nodes(op="call_function", target=torch.ops.scan_kernels.fused_bwd.default)
    grads_of_qkv = [found for found in call.users if found.args[1] < 3]
    sums = [user for found in grads_of_qkv for user in found.users if user.target is torch.ops.aten.add.Tensor]
    return len(sums), {"o": y.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
