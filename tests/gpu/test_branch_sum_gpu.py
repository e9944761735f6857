"""The sum of both branches' norms on a GPU, against float64."""

from functools import partial

import pytest
import torch

from scan_kernels import sum_of_head_norms
from scan_kernels.branch_sum import branch_sum_bwd
from tests.closeness import relative_error
from tests.scan_kernels.branch_sum_cases import EPS, SHAPES, expected, make, solve

pytestmark = pytest.mark.gpu
KERNELS = partial(sum_of_head_norms, eps=EPS, impl="triton")


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # What a kernel does not write stays NaN.
    torch.cuda.empty_cache()
    poison = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(8)]
    del poison


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_kernels(shape, dtype):
    x = make(shape, dtype, "cuda")
    if dtype == torch.float16:
        x["dy"] = x["dy"].clamp(-100, 100)
    got = solve(KERNELS, x)
    for name, value in expected(x).items():
        assert relative_error(got[name], value) < (1e-5 if dtype == torch.float32 else 1e-2), name


def test_compiled_with_transposed_inputs():
    x = make((3, 70, 4, 64), torch.bfloat16, "cuda")
    x = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if t.ndim == 4 else t for n, t in x.items()}
    got = solve(torch.compile(KERNELS, fullgraph=True, dynamic=False), x)
    for name, value in expected(x).items():
        assert relative_error(got[name], value) < 1e-2, name


def test_same_bits_in_25_repeats():
    x = make((4, 1000, 16, 128), torch.bfloat16, "cuda")
    first = solve(KERNELS, x)
    for _ in range(24):
        again = solve(KERNELS, x)
        assert all(torch.equal(again[name], value) for name, value in first.items())


def test_offsets_beyond_32_bits():
    # 2^31 elements and a row more; only the last rows are looked at.
    T, H, D = 2**31 // (16 * 128) + 3, 16, 128
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of GPU memory")
    a = torch.zeros(1, T, H, D, device="cuda", dtype=torch.bfloat16)
    b, dy = torch.zeros_like(a), torch.zeros_like(a)
    tail = make((1, 4, H, D), torch.bfloat16, "cuda")
    for whole, name in ((a, "a"), (b, "b"), (dy, "dy")):
        whole[:, -4:] = tail[name]
    weights = tail["weight_a"], tail["weight_b"]
    wanted = expected(tail)
    assert relative_error(KERNELS(a, b, *weights)[:, -4:], wanted["y"]) < 1e-2
    da, db, d_weights = branch_sum_bwd(dy, a, b, *weights, EPS)
    for got, name in ((da[:, -4:], "a"), (db[:, -4:], "b"), (d_weights[0], "weight_a"), (d_weights[1], "weight_b")):
        assert relative_error(got, wanted[f"d_{name}"]) < 1e-2, name
