"""The formula on the CPU; the kernels are in interpreted.py and tests/gpu/test_branch_sum_gpu.py."""

from functools import partial

import pytest
import torch

from scan_kernels import sum_of_head_norms
from tests.closeness import relative_error
from tests.scan_kernels.branch_sum_cases import EPS, SHAPES, expected, make, solve


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_formula(shape):
    x = make(shape, torch.float64)
    got = solve(partial(sum_of_head_norms, eps=EPS), x)
    for name, value in expected(x).items():
        assert relative_error(got[name], value) < 1e-12, name


def test_rows_of_zeros_pass_nothing_on():
    x = make((1, 4, 2, 16), torch.float32)
    x["b"].zero_()
    x["dy"].fill_(1e4)
    got = solve(partial(sum_of_head_norms, eps=EPS), x)
    assert not got["d_b"].any()
    assert not got["d_weight_b"].any()
    assert torch.equal(got["y"], solve(partial(sum_of_head_norms, eps=EPS), x | {"weight_b": 7 * x["weight_b"]})["y"])


def test_half_precision_is_summed_in_fp32():
    x = make((2, 64, 3, 64), torch.bfloat16)
    got = solve(partial(sum_of_head_norms, eps=EPS), x)
    for name, value in expected(x).items():
        assert got[name].dtype == torch.bfloat16
        assert relative_error(got[name], value) < 1e-2, name


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": torch.zeros(1, 2, 3, 8)}, "alike"),
        ({"weight_a": torch.zeros(3, 16), "weight_b": torch.zeros(3, 16)}, "scales"),
        (
            {"b": torch.zeros(1, 2, 3, 16, dtype=torch.float64)},
            "of one floating dtype, got torch.float32 and torch.float64",
        ),
        ({"eps": -1e-3}, "eps must be >= 0"),
        ({"impl": "cuda"}, "impl must be one of"),
        ({"impl": "triton"}, "needs a CUDA device"),
    ],
    ids=["branches", "scales", "dtypes", "eps", "impl", "triton on a CPU"],
)
def test_refusals(change, said):
    x = {name: value for name, value in make((1, 2, 3, 16), torch.float32).items() if name != "dy"}
    if "weight_a" in change:
        change = {name: torch.zeros(4, 16) for name in change}
    with pytest.raises(ValueError, match=said):
        sum_of_head_norms(**(x | {"eps": EPS} | change))
