"""The softmax branch by each backend, against dense float64 attention. `python -m pytest tests/gpu -m gpu`."""

from __future__ import annotations

import pytest
import torch
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.activation_checkpoint import with_linear_branch
from flexrattn.flash_window import PlainWindow, flash_window_attention, flash_window_fwd
from flexrattn.masked_attention import KERNEL_OPTIONS, MaskedAttention, check_backend
from score_mods import all_of, build_block_mask, causal, dense_mask, document, reference_attention, sliding_window
from tests.closeness import relative_error

pytestmark = pytest.mark.gpu


def needs(backend: str) -> None:
    try:
        check_backend(KERNEL_OPTIONS[backend], torch.device("cuda"))
    except ValueError as error:
        pytest.skip(str(error))


def results(attend, q, k, v, do) -> dict[str, torch.Tensor]:
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    o = attend(*given)
    return dict(zip(("o", "dq", "dk", "dv"), (o.detach(), *torch.autograd.grad(o, given, do)), strict=True))


@pytest.mark.parametrize("backend", KERNEL_OPTIONS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("D", "T", "window"), [(64, 700, 100), (128, 1024, 512)])
def test_a_window_of_documents(backend, documents, D, T, window):
    needs(backend)
    generator = torch.Generator("cuda").manual_seed(T)
    q, k, v, do = (torch.randn(2, T, heads, D, device="cuda", generator=generator).bfloat16() for heads in (8, 2, 2, 8))
    mask_mod = sliding_window(window)
    if documents:
        ids = (torch.arange(T, device="cuda") // 150).expand(2, T).contiguous()
        mask_mod = all_of(mask_mod, document(ids))
    sizes = {"q_len": T, "kv_len": T, "device": "cuda"} | ({"batch": 2} if documents else {})
    inner = MaskedAttention.Config(kernel_options=dict(KERNEL_OPTIONS[backend])).build()
    mask = build_block_mask(mask_mod, **sizes)
    found = results(lambda *x: inner(*x, attention_masks=mask, enable_gqa=True), q, k, v, do)
    dense = dense_mask(mask_mod, **sizes)
    wanted = results(lambda *x: reference_attention(*x, dense), *(x.double() for x in (q, k, v, do)))
    for name, x in found.items():
        assert relative_error(x, wanted[name]) < 0.01, name


def exactly(window: int | None, q, k, v, do) -> dict[str, torch.Tensor]:
    mask_mod = causal() if window is None else sliding_window(window)
    mask = dense_mask(mask_mod, q_len=q.shape[1], kv_len=q.shape[1], device="cuda")
    return results(lambda *x: reference_attention(*x, mask), *(x.double() for x in (q, k, v, do)))


def errors(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], do: torch.Tensor) -> dict[str, float]:
    """Relative norms; beside 1 % of do where a gradient is zero, as those of q and k are when queries see one key."""
    floor = 0.01 * float(do.double().norm())
    return {
        name: float((x.double() - wanted[name]).norm() / wanted[name].norm().clamp(min=floor))
        for name, x in found.items()
    }


def poisoned(*sizes: int) -> None:
    """NaN where the next allocations will lie."""
    for size in sizes:
        torch.full((size,), torch.nan, device="cuda")


# The first lengths fill one tile, or less: the package must not take their strides for those of the later ones.
CASES = [
    *((1, w, 64, (4, 1), torch.bfloat16) for w in (0, 512, None)),
    (2, 0, 128, (4, 4), torch.bfloat16),
    (127, 1, 128, (8, 2), torch.float16),
    (128, 100, 64, (8, 1), torch.bfloat16),
    *((700, w, D, heads, torch.bfloat16) for w in (0, 1, 100, 512) for D, heads in ((64, (8, 1)), (128, (8, 2)))),
    (700, None, 128, (8, 2), torch.bfloat16),
    (1025, 512, 128, (4, 4), torch.float16),
    (1025, 1023, 64, (4, 1), torch.float16),
    (1025, 1024, 64, (4, 1), torch.bfloat16),
    (1000, 100, 32, (4, 2), torch.bfloat16),
    (1000, 100, 96, (4, 2), torch.bfloat16),
]


def errors_of_case(T, window, D, heads, dtype) -> dict[str, float]:
    H, G = heads
    generator = torch.Generator("cuda").manual_seed(T + D)
    joint = torch.randn(2, T, H + 2 * G, D, device="cuda", generator=generator).to(dtype)
    q, k, v = joint.split((H, G, G), dim=2)
    do = torch.randn(2, T, H, D, device="cuda", generator=generator).to(dtype)
    poisoned(2 * T * H * D, 2 * T * G * D, 2 * T * G * D)
    found = results(lambda *x: flash_window_attention(*x, window=window), q, k, v, do)
    return errors(found, exactly(window, q, k, v, do), do)


def test_flash_windows_are_right():
    """Each against float64, with the strides of a layer's joint projection; all in one process, as lengths come."""
    needs("flash")
    for case in CASES:
        found = errors_of_case(*case)
        assert max(found.values()) < 0.01, (case, found)


def test_flash_window_operators():
    """Fakes, strides and autograd as torch checks them, also of tensors that are copied before kernels read them."""
    needs("flash")
    B, T, H, G, D = 2, 200, 4, 2, 64
    q, k, v = (torch.randn(B, T, n, D, device="cuda").bfloat16().requires_grad_() for n in (H, G, G))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash_window_fwd, (q, k, v, 100, 0.125), test_utils=tests)
    odd = torch.randn(B, T, 2 * G * D + 1, device="cuda").bfloat16()
    k, v = (x.unflatten(2, (G, D)) for x in odd[..., 1:].split(G * D, dim=2))
    q, do = (torch.randn(B, H, D, T, device="cuda").bfloat16().permute(0, 3, 1, 2) for _ in range(2))
    torch.library.opcheck(flash_window_fwd, (q, k, v, 100, 0.125), test_utils=tests)
    found = results(lambda *x: flash_window_attention(*x, window=100), q, k, v, do)
    for name, x in exactly(100, q, k, v, do).items():
        assert relative_error(found[name], x) < 0.01, name


@pytest.mark.parametrize("policy", [None, SelectiveAC, FullAC])
def test_a_flash_layer_compiled(policy):
    """A layer over whole rows: one graph, the same under checkpointing, whose selective kind runs no forward again."""
    needs("flash")
    T, window = 900, 100
    layers = make_layers(window=window, pattern=("local",), softmax_backend="flash", rla_norm_init=1.0)
    sizes = {"dim": 256, "n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "head_dim": 64, "max_seq_len": T}
    torch.manual_seed(0)
    with torch.device("cuda"), torch.no_grad():
        model = build_model_config(resolve_flavor("debug", sizes), layers).build()
        model.init_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    block = model.layers["0"]
    positions = torch.arange(T).expand(2, T)
    whole = model.get_attention_masks(positions.cuda())
    model.see_batch(positions)
    masks = model.get_attention_masks(positions.cuda())
    assert list(masks.values()) == [PlainWindow(window=window)]
    x, dy = (torch.randn(2, T, 256, device="cuda").bfloat16() for _ in range(2))

    def run(layer, masks):
        leaf = x.clone().requires_grad_()
        y = layer(leaf, masks, positions.cuda())
        return [y, *torch.autograd.grad(y, [leaf, *block.parameters()], dy)]

    expected = run(block, whole)
    wrapped = block
    if policy is not None:
        wrapped = with_linear_branch(policy.Config()).build()._wrap_block(block, base_fqn="layers.0")
    torch._dynamo.reset()
    compiled = torch.compile(wrapped, fullgraph=True)
    run(compiled, masks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        found = run(compiled, masks)
    forwards = sum(event.count for event in profile.key_averages() if event.key == "flexrattn::flash_window_fwd")
    assert forwards == (2 if policy is FullAC else 1)
    # Two ways to the same numbers, each rounded a dozen times.
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 0.02
