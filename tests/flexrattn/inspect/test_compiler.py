"""The private parts of torch that compiler.py uses, on code whose graphs, breaks and recompilations are known."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import Tensor

from flexrattn.inspect import compiler
from flexrattn.inspect.compiler import Matmul

HERE = "tests/flexrattn/inspect/test_compiler.py"


def line_of(text: str) -> int:
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if text in line and "line_of" not in line)


def test_graph_breaks_are_found_with_their_place():
    def breaks(x: Tensor) -> Tensor:
        y = x.sin()
        torch._dynamo.graph_break()  # here it breaks
        return y.cos()

    torch.compiler.reset()
    with compiler.dynamo_events() as events:
        torch.compile(breaks, backend="eager")(torch.ones(3))
    (event,) = events.graph_breaks
    assert event.where == f"{HERE}:{line_of('# here it breaks')}"
    assert event.why
    assert events.graphs == 2
    assert not events.recompiles


def test_recompilations_are_found_with_their_reason():
    def takes(x: Tensor) -> Tensor:  # takes any length
        return x.sin()

    torch.compiler.reset()
    compiled = torch.compile(takes, backend="eager", dynamic=False)
    with compiler.dynamo_events() as events:
        compiled(torch.ones(3))
        assert not events.recompiles
        compiled(torch.ones(4))
    (event,) = events.recompiles
    assert event.where == f"{HERE}:{line_of('# takes any length')}"
    assert re.search(r"size|stride|shape", event.why)
    assert events.graphs == 2
    with compiler.dynamo_events() as again:
        compiled(torch.ones(4))
    assert (again.graphs, again.recompiles, again.graph_breaks) == (0, [], [])


def test_logging_is_left_as_it_was(capfd):
    names = [name for name in logging.root.manager.loggerDict if "__graph_breaks" in name or "__recompiles" in name]
    before = [(logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names]
    with compiler.dynamo_events():
        pass
    assert before == [(logging.getLogger(n).level, logging.getLogger(n).propagate) for n in names]


class TwoLayers(torch.nn.Module):
    """y = relu(x W1) W2: the backward needs x, which is an input, and relu's result."""

    def __init__(self, inner: int) -> None:
        super().__init__()
        self.w1, self.w2 = torch.nn.Linear(32, inner, bias=False), torch.nn.Linear(inner, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(torch.relu(self.w1(x)))


@pytest.fixture(scope="module")
def graphs():
    return compiler.trace_layer(
        lambda: TwoLayers(64), lambda: [torch.empty(8, 32, dtype=torch.float32, requires_grad=True)]
    )


def test_what_a_traced_layer_keeps(graphs):
    hidden = 8 * 64 * 4
    # relu's result, and perhaps its mask or the sum before it: never more than both in fp32.
    assert hidden <= compiler.storage_bytes(graphs.kept) <= 2 * hidden
    assert compiler.storage_bytes(graphs.outputs) == 8 * 16 * 4


def test_products_of_a_traced_layer(graphs):
    def product(M: int, K: int, N: int) -> Matmul:
        return Matmul(batch=1, M=M, N=N, K=K, dtype=torch.float32)

    assert compiler.matmuls(graphs.forward) == [product(8, 32, 64), product(8, 64, 16)]
    backward = compiler.matmuls(graphs.backward)
    assert len(backward) == 4
    assert sum(m.flops for m in backward) == 2 * sum(m.flops for m in compiler.matmuls(graphs.forward))
    assert product(8, 32, 64).nbytes == 4 * (8 * 32 + 32 * 64 + 8 * 64)


def test_views_of_one_memory_count_once():
    x = torch.empty(4, 6)
    assert compiler.storage_bytes([x, x.t(), x[1:]]) == 4 * 6 * 4


def test_tracing_leaves_nothing_behind():
    from torch.nn.attention import flex_attention

    import scan_kernels.api

    x = torch.empty(1, 1, 1, 1, device="meta")
    with pytest.raises(ValueError, match="only supported on"):
        flex_attention._validate_device(x, x, x)
    assert scan_kernels.api.refusal(x, x, x)


def test_bytes_of_a_generated_kernels_arguments():
    table, index, out = torch.empty(1000, 4), torch.empty(8, dtype=torch.int64), torch.empty(8, 4)
    names = ("in_ptr0", "in_ptr1", "out_ptr0", "xnumel", "XBLOCK")
    args = (table, index, out, 32)
    assert compiler.argument_bytes(names, args, "") == 16000 + 64 + 128
    gather = 'tl.device_assert((0 <= tmp0) & (tmp0 < 1000), "index out of bounds: 0 <= tmp0 < 1000")'
    assert compiler.argument_bytes(names, args, gather) == 128 + 64 + 128
    assert compiler.argument_bytes(("in_out_ptr0", "in_ptr0"), (out, out), "") == 128
