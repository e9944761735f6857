"""`impl="triton"` on a GPU against float64: `python -m pytest tests/gpu -m gpu`. Nothing here runs without CUDA."""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from scan_kernels import residual_linear_attention
from tests.scan_kernels.cases import assert_close, document_ids, random_lengths

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
fused = partial(residual_linear_attention, impl="triton")
exact = partial(residual_linear_attention, impl="torch")


def make(
    T, dtype=torch.bfloat16, *, B=1, H=4, G=2, D=128, Dv=None, decay=False, start="", q_std=1.0
) -> dict[str, Tensor]:
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, device="cuda")

    inputs = {
        "q": (q_std * normal(B, T, H, D)).to(dtype),
        "k": normal(B, T, G, D).to(dtype),
        "v": (normal(B, T, G, Dv or D) + 0.3).to(dtype),
    }
    if decay:
        inputs["decay"] = -0.2 * normal(B, T, G).abs()
    if start:
        inputs["initial_state"] = normal(B, {"kv": G, "query": H}[start], 2 * D, Dv or D)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def both(fn, inputs: dict[str, Tensor], **options) -> dict[str, Tensor]:
    o = fn(**inputs, **options)
    gen = torch.Generator("cuda").manual_seed(1)
    do = torch.randn(o.shape, generator=gen, device="cuda").bfloat16().to(o.dtype)
    names = list(inputs)
    if not o.requires_grad:
        return {"o": o} | {f"d{name}": torch.zeros_like(inputs[name]) for name in names}
    grads = torch.autograd.grad(o, [inputs[name] for name in names], do, allow_unused=True, materialize_grads=True)
    return {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}


def check(inputs: dict[str, Tensor], tolerance: float, **options) -> None:
    double = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    expected = both(exact, double, **options)
    for name, x in both(fused, inputs, **options).items():
        assert_close(x, expected[name], tolerance, name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("T", [1, 63, 513, 1000, 4097])
@pytest.mark.parametrize("window", [0, 1, 127, 512, None])
def test_lengths_and_windows(dtype, D, T, window):
    check(make(T, dtype, D=D), TOLERANCE[dtype], window=window)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(32, 32), (256, 256), (256, 64), (64, 256)])
@pytest.mark.parametrize("everything", [False, True], ids=["plain", "everything"])
def test_widths(dtype, D, Dv, everything):
    inputs = make(1000, dtype, D=D, Dv=Dv, decay=everything, start="query" if everything else "")
    ids = document_ids([random_lengths(1000, 3, 300)]).cuda() if everything else None
    check(inputs, TOLERANCE[dtype], window=60, document_ids=ids)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("feature_map", ["softmax", "relu", "softmax_single", "identity"])
def test_feature_maps(dtype, feature_map):
    check(make(1000, dtype), TOLERANCE[dtype], window=100, feature_map=feature_map)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("start", ["", "kv", "query"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_options(dtype, decay, start, documents):
    ids = document_ids([random_lengths(1000, 3, 300)]).cuda() if documents else None
    check(make(1000, dtype, decay=decay, start=start), TOLERANCE[dtype], window=60, document_ids=ids)


@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_a_split_sequence_is_the_unsplit_one(documents):
    inputs = make(1000, torch.float32, start="query", decay=True)
    ids = document_ids([random_lengths(1000, 3, 300)]).cuda() if documents else None
    whole = fused(**inputs, window=60, document_ids=ids)
    state, rows = inputs["initial_state"], []
    for a, b in itertools.pairwise((0, 7, 300, 301, 1000)):
        now = {name: inputs[name][:, a:b] for name in ("q", "k", "v", "decay")}
        part = None if ids is None else ids[:, a:b]
        o, state = fused(**now, window=60, document_ids=part, initial_state=state, return_final_state=True)
        rows.append(o)
    assert_close(torch.cat(rows, dim=1), whole, 1e-5)


def test_precision_of_a_long_sequence():
    check(make(32768, q_std=0.3), 1e-2, window=512)


@pytest.mark.parametrize("T", [1024, 4096])
@pytest.mark.parametrize("feature_map", ["softmax", "identity"])
@pytest.mark.parametrize("strength", [0.002, 0.2, 4.0])
def test_gradient_of_a_decay(T, feature_map, strength):
    """By token, and times the decay over all tokens, as a gate's rate gets it; do as behind a norm, orthogonal to o."""
    inputs = make(T, D=64, B=2)
    gen = torch.Generator("cuda").manual_seed(2)
    decay = -strength * torch.rand(2, T, 2, generator=gen, device="cuda")
    options = {"window": 128, "feature_map": feature_map}
    ids = document_ids([random_lengths(T, 3, T), random_lengths(T, 4, T // 4)]).cuda()
    double = {name: x.detach().double() for name, x in inputs.items()}
    leaf = decay.double().requires_grad_()
    o = exact(**double, decay=leaf, document_ids=ids, **options)
    do = torch.randn(o.shape, generator=gen, device="cuda").double() + 0.1
    unit = torch.nn.functional.normalize(o.detach(), dim=-1)
    do = (do - (do * unit).sum(-1, keepdim=True) * unit).bfloat16()
    (expected,) = torch.autograd.grad(o, leaf, do.double())
    leaf = decay.clone().requires_grad_()
    (got,) = torch.autograd.grad(fused(**inputs, decay=leaf, document_ids=ids, **options), leaf, do)
    assert_close(got, expected, 1e-2, "each token's")
    assert_close((got.double() * decay).sum((0, 1)), (expected * decay).sum((0, 1)), 2e-2, "their sum")


def test_outputs_do_not_depend_on_what_memory_held():
    inputs = make(1000)
    expected = both(fused, inputs, window=100)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills every torch.empty with NaN
    try:
        got = both(fused, inputs, window=100)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in got.items():
        assert torch.equal(x, expected[name]), name


@pytest.mark.parametrize("window", [0, 100, 999, 1000])
def test_rows_without_keys_are_zero(window):
    o = fused(**make(1000), window=window)
    assert (o[:, : window + 1] == 0).all()


def test_runs_repeat_bitwise():
    inputs = make(4097, B=2)
    first = both(fused, inputs, window=512)
    for _ in range(25):
        for name, x in both(fused, inputs, window=512).items():
            assert torch.equal(x, first[name]), name


def test_strides():
    inputs = {name: x.detach().transpose(1, 2).contiguous().transpose(1, 2) for name, x in make(1000).items()}
    check({name: x.requires_grad_() for name, x in inputs.items()}, 1e-2, window=60)


def odd_rows(x: Tensor) -> Tensor:
    return torch.cat((x, x), dim=3)[..., 1:129]


def odd_beginning(x: Tensor) -> Tensor:
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


@pytest.mark.parametrize("layout", [odd_rows, odd_beginning])
def test_rows_that_no_16_byte_load_reads(layout):
    inputs = {name: layout(x.detach()).requires_grad_() for name, x in make(1000).items()}
    check(inputs, 1e-2, window=60)


def test_offsets_beyond_32_bits():
    """A document behind 2^31 elements of q is what it is alone."""
    T, tail = 2**20 + 1000, 1000
    inputs = make(T, H=16, G=1)
    alone = {name: x[:, -tail:].detach().requires_grad_() for name, x in inputs.items()}
    ids = (torch.arange(T, device="cuda") >= T - tail).long()[None]
    o = fused(**inputs, window=60, document_ids=ids)
    expected = fused(**alone, window=60)
    torch.testing.assert_close(o[:, -tail:], expected, rtol=0, atol=0.02 * expected.abs().max().item())
    gen = torch.Generator("cuda").manual_seed(1)
    do = torch.randn(expected.shape, generator=gen, device="cuda").bfloat16()
    grads = torch.autograd.grad(o[:, -tail:], list(inputs.values()), do)
    for name, x, reference in zip(inputs, grads, torch.autograd.grad(expected, list(alone.values()), do), strict=True):
        assert_close(x[:, -tail:], reference.double(), 1e-2, name)
        assert (x[:, :-tail] == 0).all(), name


def test_one_tensor_for_all_and_then_three():
    x = make(333, H=2)["q"]
    both(fused, {"q": x, "k": x, "v": x}, window=60)
    check(make(333, H=2), 1e-2, window=60)


def test_compile_fullgraph():
    inputs = make(1000, decay=True, start="query")
    ids = document_ids([random_lengths(1000, 3, 300)]).cuda()
    compiled = torch.compile(fused, fullgraph=True, dynamic=False)
    got = both(compiled, inputs, window=60, document_ids=ids)
    for name, x in both(fused, inputs, window=60, document_ids=ids).items():
        assert_close(got[name], x, 1e-2, name)


def test_opcheck():
    from scan_kernels.fused_ops import fused_fwd

    inputs = make(200)
    arguments = (inputs["q"], inputs["k"], inputs["v"], *(None,) * 7, 61, "softmax", True, 2)
    torch.library.opcheck(fused_fwd, arguments)


@pytest.mark.parametrize("save_every", [1, 2, 8])
@pytest.mark.parametrize("decay", [False, True], ids=["plain", "decay"])
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_kept_states(save_every, decay, documents):
    ids = document_ids([random_lengths(4097, 3, 900)]).cuda() if documents else None
    check(make(4097, decay=decay), 1e-2, window=60, document_ids=ids, save_every=save_every)


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("save_every", [0, 1, 4, 16])
@pytest.mark.parametrize("longest", [300, 1500])
def test_documents_that_are_hardly_read(D, save_every, longest):
    """Of most chunks no query reads a key. What is not computed is not read: it is NaN here."""
    inputs, ids = make(4097, B=2, D=D), document_ids([random_lengths(4097, seed, longest) for seed in (3, 4)]).cuda()
    torch.full((2**28,), torch.nan, device="cuda")  # what the next tensors lie in
    check(inputs, 1e-2, window=200, document_ids=ids, save_every=save_every)


def test_auto_takes_triton():
    inputs = make(200)
    assert torch.equal(residual_linear_attention(**inputs, window=5), fused(**inputs, window=5))
