"""The arithmetic of the Hopper stages without a GPU, against float64: chunks of 64 rows, segments of one or two."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from scan_kernels import fused, residual_linear_attention
from scan_kernels.fused_ops import Inputs
from scan_kernels.kernels.configs import HOPPER
from tests.scan_kernels.cases import assert_close, cast, document_ids, make_inputs
from tests.scan_kernels.gluon_on_cpu import Machine


@pytest.fixture(scope="module")
def machine():
    return Machine()


def stages(
    machine: Machine, inputs: dict[str, Tensor], do: Tensor, *, window: int, feature_map: str = "softmax",
    ids: Tensor | None = None, segment: int = 1,
) -> dict[str, Tensor]:  # fmt: skip
    q, k, v = (inputs[name].detach() for name in "qkv")
    documents = {} if ids is None else {"query_doc": ids, "key_doc": ids, "carried_doc": ids[:, 0]}
    plan = replace(HOPPER, segment=segment)
    sizes, x, init, plan = fused.prepare(Inputs(q, k, v, **documents), window + 1, feature_map, plan=plan)
    o, *_ = fused.forward(sizes, x, init, plan, with_final=False, run=machine.run)
    found = fused.backward(sizes, x, init, do, None, plan, with_init_grad=False, run=machine.run)
    return {"o": o, "dq": found.dq, "dk": found.dk, "dv": found.dv}


# Heads of a group: one by one, with the states of a chunk before them, or half a state beside each.
@pytest.mark.parametrize(
    ("H", "D", "segment", "feature_map"),
    [
        (4, 64, 1, "softmax"),
        (2, 64, 4, "softmax"),
        (2, 64, 1, "softmax"),
        (3, 64, 2, "relu"),
        (6, 64, 1, "softmax"),
        (1, 64, 1, "softmax_single"),
        (2, 64, 1, "identity"),
        (4, 128, 1, "softmax"),
    ],
)
def test_stages(machine, H, D, segment, feature_map):
    inputs = cast(make_inputs(150, B=1, H=H, G=1, D=D, Dv=D), torch.bfloat16)
    check(machine, inputs, window=20, feature_map=feature_map, segment=segment)


def test_documents(machine):
    inputs = cast(make_inputs(150, B=1, H=4, G=1, D=64, Dv=64), torch.bfloat16)
    check(machine, inputs, window=20, ids=document_ids([[1, 30, 50, 69]]))


def check(machine, inputs, *, window, feature_map="softmax", ids=None, segment=1) -> None:
    do = torch.randn(inputs["q"].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = stages(machine, inputs, do, window=window, feature_map=feature_map, ids=ids, segment=segment)
    double = cast(inputs, torch.float64)
    o = residual_linear_attention(**double, window=window, feature_map=feature_map, document_ids=ids, impl="torch")
    expected = dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, list(double.values()), do.double()), strict=True))
    assert_close(got["o"], o.detach(), 1e-2, "o")
    for name, x in expected.items():
        assert_close(got[name], x, 1e-2, name)


@pytest.mark.parametrize("name", ["k", "v"])
def test_what_is_not_finite_stays_behind_itself(machine, name):
    inputs = cast(make_inputs(150, B=1, H=2, G=1, D=64, Dv=64), torch.bfloat16)
    do = torch.ones_like(inputs["q"])
    before = stages(machine, inputs, do, window=20)
    inputs[name].data[:, 70] = torch.nan
    after = stages(machine, inputs, do, window=20)
    assert torch.equal(before["o"][:, :91], after["o"][:, :91])
    assert after["o"][:, 91:].isnan().all()
    assert torch.equal(before["dq"][:, :91], after["dq"][:, :91])
