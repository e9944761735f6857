"""Both branches of a layer on a GPU: the linear branch's kernels add the gradients of a softmax branch to their own."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from scan_kernels import residual_linear_attention_and_inputs
from score_mods import build_block_mask, sliding_window
from tests.closeness import relative_error
from tests.scan_kernels.cases import cast, document_ids, random_lengths
from tests.scan_kernels.shared_inputs import apart, solve

pytestmark = pytest.mark.gpu
joined = partial(residual_linear_attention_and_inputs, impl="triton")
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _poisoned_memory():
    # What a kernel does not write stays NaN.
    torch.cuda.empty_cache()
    poison = [torch.full((2**22,), torch.nan, device="cuda") for _ in range(8)]
    del poison


def make(T: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 128, decay: bool = False) -> dict[str, Tensor]:
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, device="cuda", dtype=torch.float64)

    inputs = {"q": normal(B, T, H, D), "k": normal(B, T, G, D), "v": normal(B, T, G, D) + 0.3}
    if decay:
        inputs["decay"] = -0.2 * normal(B, T, G).abs()
    return {name: x.requires_grad_() for name, x in inputs.items()}


def check(inputs: dict[str, Tensor], dtype: torch.dtype, used: str = "qkv", **options) -> None:
    """Against float64, and no further from it than sums that autograd rounds once more."""
    given = cast(inputs, dtype)
    expected = solve(apart, cast(given, torch.float64), used, impl="torch", **options)
    got = solve(joined, given, used, **options)
    added = solve(apart, cast(inputs, dtype), used, impl="triton", **options)
    for name, x in got.items():
        error, without = (relative_error(y, expected[name]) for y in (x, added[name]))
        assert error < TOLERANCE[dtype] * (5 if "decay" in inputs else 1), (name, error)
        assert error <= 1.02 * without + 1e-7, (name, error, without)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize(("T", "window"), [(1, 0), (63, None), (65, 64), (513, 512), (1000, 127), (1000, 5000)])
def test_lengths_and_windows(dtype, D, T, window):
    check(make(T, D=D), dtype, window=window)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("used", ["qkv", "kv", "q", "v"])
def test_documents_and_some_of_the_inputs(dtype, decay, used):
    ids = document_ids([random_lengths(1000, 3, 300), [1000]]).cuda()
    check(make(1000, decay=decay), dtype, used, window=60, document_ids=ids)


@pytest.mark.parametrize(("H", "G", "feature_map"), [(16, 4, "relu"), (3, 3, "softmax_single"), (8, 1, "identity")])
def test_groups_and_feature_maps(H, G, feature_map):
    check(make(700, B=1, H=H, G=G), torch.bfloat16, window=60, feature_map=feature_map)


@pytest.mark.parametrize("save_every", [0, 1, 2])
def test_gradients_of_any_strides_are_added(save_every):
    """Heads before tokens, as FlexAttention has them; expanded; and rows that no 16-byte load reads."""
    inputs = cast(make(700), torch.bfloat16)
    gen = torch.Generator("cuda").manual_seed(1)
    heads_first = torch.randn(2, 2, 700, 128, device="cuda", generator=gen).bfloat16()
    odd = torch.randn(2, 700, 2, 130, device="cuda", generator=gen).bfloat16()[..., 1:129]

    def grads(entry) -> list[Tensor]:
        o, q, k, v = entry(**inputs, window=60, save_every=save_every)
        y = (o.float().square().sum(), q.sum(), (k.transpose(1, 2) * heads_first).sum(), (v * odd).sum())
        return list(torch.autograd.grad(y, list(inputs.values())))

    for x, y in zip(grads(joined), grads(partial(apart, impl="triton")), strict=True):
        assert relative_error(x, y.double()) < 4e-3


def test_runs_repeat_bitwise():
    inputs = cast(make(4097), torch.bfloat16)
    first = solve(joined, inputs, window=512)
    for _ in range(25):
        for name, x in solve(joined, inputs, window=512).items():
            assert torch.equal(x, first[name]), name


@pytest.mark.parametrize("entry", [joined, partial(apart, impl="triton")], ids=["joined", "apart"])
def test_with_flex_attention_in_one_graph(entry):
    """As a layer runs them. The compiled backward makes no sum of the branches' gradients."""
    T, window = 1000, 100
    mask = build_block_mask(sliding_window(window), q_len=T, kv_len=T, device=torch.device("cuda"))
    inputs = make(T)
    single = cast(inputs, torch.bfloat16)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o, q, k, v = entry(q, k, v, window=window)
        softmax = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True)
        return o + softmax.transpose(1, 2)

    do = torch.randn(2, T, 4, 128, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).bfloat16()
    y = torch.compile(both, fullgraph=True, dynamic=False)(**single)
    grads = torch.autograd.grad(y, list(single.values()), do)

    double = cast(single, torch.float64)
    o, q, k, v = apart(**double, window=window, impl="torch")
    far = torch.arange(T, device="cuda")
    seen = (far[:, None] >= far) & (far[:, None] - far <= window)
    k, v = (x.repeat_interleave(2, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 128**0.5
    softmax = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
    expected = torch.autograd.grad(o + softmax, list(double.values()), do.double())
    assert relative_error(y, o + softmax) < 1e-2
    for got, value, name in zip(grads, expected, "qkv", strict=True):
        assert relative_error(got, value) < 1e-2, name
