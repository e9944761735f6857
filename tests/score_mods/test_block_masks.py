"""Block masks against the dense mask, and the closed form against torch's own builder."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from score_mods import (
    MaskInfo,
    all_of,
    any_of,
    build_block_mask,
    causal,
    clear_block_mask_cache,
    dense_mask,
    describe,
    document,
    reference_attention,
    sliding_window,
)
from score_mods import block_masks as builder


@pytest.fixture(autouse=True)
def _empty_cache():
    clear_block_mask_cache()


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


def random_documents(length, rows=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.rand(rows, length, generator=generator) < torch.tensor([[0.02], [0.15], [0.9]])
    return starts.cumsum(dim=1)


def undescribed(mask):
    """The same mask without its info, which only torch's builder can take."""
    return lambda b, h, q_idx, kv_idx: mask(b, h, q_idx, kv_idx)


def same_lists(left, right):
    """Equal numbers and, as far as they count, equal indices of full and partial blocks."""
    for kind in ("kv", "full_kv", "q", "full_q"):
        number, indices = f"{kind}_num_blocks", f"{kind}_indices"
        if not torch.equal(getattr(left, number), getattr(right, number)):
            return False
        columns = torch.arange(getattr(left, indices).shape[-1])
        counted = columns < getattr(left, number)[..., None]
        if not torch.equal(getattr(left, indices)[counted], getattr(right, indices)[counted]):
            return False
    return left.seq_lengths == right.seq_lengths and left.BLOCK_SIZE == right.BLOCK_SIZE


def covers(block_mask, kept):
    """No kept pair in a skipped block, every pair of a full block kept, nothing full beyond the ends."""
    size = block_mask.BLOCK_SIZE[0]
    rows, columns = block_mask.kv_indices.shape[-2:]
    q_len, kv_len = block_mask.seq_lengths
    padded = torch.nn.functional.pad(kept, (0, columns * size - kv_len, 0, rows * size - q_len))
    blocks = padded.unflatten(-1, (columns, size)).unflatten(-3, (rows, size))
    any_kept, all_kept = blocks.any(dim=-1).any(dim=-2), blocks.all(dim=-1).all(dim=-2)
    listed = block_mask.to_dense().bool()
    full = torch.zeros_like(listed)
    counted = torch.arange(columns) < block_mask.full_kv_num_blocks[..., None]
    full.scatter_(-1, block_mask.full_kv_indices.long(), counted)
    return torch.equal(listed, any_kept.expand_as(listed)) and torch.equal(full, all_kept.expand_as(full))


# (tokens, block size): whole blocks, odd lengths, less than a block, one token.
SIZES = [(64, 16), (63, 16), (65, 16), (100, 16), (7, 16), (1, 16), (50, 1), (131, 128)]
WINDOWS = [0, 1, 15, 16, 17, 40, 1000]


@pytest.mark.parametrize(("length", "size"), SIZES)
@pytest.mark.parametrize("window", WINDOWS)
def test_window_by_closed_form_equals_torchs_builder(length, size, window):
    mask = sliding_window(window)
    sizes = {"q_len": length, "kv_len": length, "device": "cpu", "block_size": size}
    block_mask = build_block_mask(mask, **sizes)
    assert same_lists(block_mask, build_block_mask(undescribed(mask), **sizes))
    assert covers(block_mask, dense_mask(mask, q_len=length, kv_len=length, device="cpu"))


@pytest.mark.parametrize(("length", "size"), SIZES)
@pytest.mark.parametrize(
    "outer",
    [None, causal(), sliding_window(0), sliding_window(9), sliding_window(40)],
    ids=lambda mask: getattr(mask, "__name__", "alone"),
)
def test_documents_by_closed_form_equal_torchs_builder(length, size, outer):
    ids = random_documents(length)
    mask = document(ids) if outer is None else all_of(outer, document(ids))
    sizes = {"batch": len(ids), "q_len": length, "kv_len": length, "device": "cpu", "block_size": size}
    block_mask = build_block_mask(mask, **sizes)
    assert same_lists(block_mask, build_block_mask(undescribed(mask), **sizes))
    assert covers(block_mask, dense_mask(mask, batch=len(ids), q_len=length, kv_len=length, device="cpu"))


def test_documents_within_documents_by_closed_form_equal_torchs_builder():
    mask = all_of(document(random_documents(90)), causal(), document(random_documents(90, seed=1)))
    sizes = {"batch": 3, "q_len": 90, "kv_len": 90, "device": "cpu", "block_size": 8}
    assert same_lists(build_block_mask(mask, **sizes), build_block_mask(undescribed(mask), **sizes))


@pytest.mark.parametrize(("q_len", "kv_len"), [(20, 70), (70, 20), (33, 47)])
def test_other_keys_than_queries(q_len, kv_len):
    mask = all_of(sliding_window(9), document(random_documents(70)))
    sizes = {"batch": 3, "q_len": q_len, "kv_len": kv_len, "device": "cpu", "block_size": 16}
    assert same_lists(build_block_mask(mask, **sizes), build_block_mask(undescribed(mask), **sizes))


def test_ids_that_return_lose_no_pair():
    """Decreasing ids may cost extra partial blocks, never a pair."""
    ids = torch.tensor([0, 3, 1, 2, 0, 0, 2, 2]).repeat_interleave(9)[None]
    mask = document(ids)
    block_mask = build_block_mask(mask, batch=1, q_len=72, kv_len=72, device="cpu", block_size=16)
    exact = build_block_mask(undescribed(mask), batch=1, q_len=72, kv_len=72, device="cpu", block_size=16)
    assert (block_mask.to_dense() >= exact.to_dense()).all()
    assert torch.equal(block_mask.full_kv_num_blocks, exact.full_kv_num_blocks)


@pytest.mark.parametrize("heads", [None, 2])
@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("described", [True, False], ids=["closed form", "evaluated"])
def test_shape_is_that_of_batch_and_heads_or_1(batch, heads, described):
    mask = sliding_window(5) if described else undescribed(sliding_window(5))
    block_mask = build_block_mask(mask, batch=batch, heads=heads, q_len=40, kv_len=24, device="cpu", block_size=8)
    assert block_mask.shape == (batch or 1, heads or 1, 40, 24)
    assert block_mask.kv_num_blocks.shape == (batch or 1, heads or 1, 5)
    assert block_mask.mask_mod is mask
    assert all(t.is_contiguous() and t.dtype == torch.int32 for t in block_mask.as_tuple() if torch.is_tensor(t))


@pytest.mark.parametrize("budget", [1, 16 * 100 * 3, 2 * 16 * 100 * 3])
def test_strips_join_to_the_whole(monkeypatch, budget):
    """The memory bound changes how the mask is evaluated, not what comes out."""

    def mask(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx + kv_idx + b) % 5 != 0) | (kv_idx // 20 == q_idx // 20)

    sizes = {"batch": 3, "q_len": 103, "kv_len": 100, "device": "cpu", "block_size": 16}
    whole = build_block_mask(mask, **sizes)
    monkeypatch.setattr(builder, "EVALUATED_PAIRS", budget)
    strips = build_block_mask(mask, **sizes)
    assert same_lists(strips, whole)
    assert strips.mask_mod is mask
    assert covers(strips, dense_mask(mask, batch=3, q_len=103, kv_len=100, device="cpu"))


def test_masks_that_are_only_bounded_are_evaluated():
    """any_of is causal and within window 9, but keeps less: its info must not be taken for its law."""

    def sparse(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (kv_idx % 40 == 0)

    described = describe(sparse, MaskInfo(name="sparse", causal=True))
    for mask in (described, any_of(sliding_window(3), described), all_of(sliding_window(50), described)):
        block_mask = build_block_mask(mask, q_len=90, kv_len=90, device="cpu", block_size=8)
        assert covers(block_mask, dense_mask(mask, q_len=90, kv_len=90, device="cpu"))


SIZE = {"q_len": 64, "kv_len": 64, "device": "cpu", "block_size": 16}


def test_static_masks_are_cached_by_what_they_are():
    first = build_block_mask(sliding_window(5), **SIZE)
    assert build_block_mask(sliding_window(5), **SIZE) is first
    assert build_block_mask(any_of(sliding_window(5), causal()), **SIZE) is (
        build_block_mask(any_of(sliding_window(5), causal()), **SIZE)
    )
    assert build_block_mask(sliding_window(6), **SIZE) is not first
    for change in ({"q_len": 63}, {"kv_len": 80}, {"batch": 1}, {"heads": 2}, {"block_size": 8}, {"device": "meta"}):
        other = build_block_mask(sliding_window(5), **(SIZE | change))
        assert other is not first


def test_masks_that_read_data_are_built_anew():
    ids = packed(30, 34)[None]
    mask = all_of(causal(), document(ids))
    before = build_block_mask(mask, batch=1, **SIZE)
    ids.zero_()
    after = build_block_mask(mask, batch=1, **SIZE)
    assert after.to_dense().sum() > before.to_dense().sum()


def test_masks_without_info_are_built_anew():
    reach = [3]

    def mask(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < reach[0]

    before = build_block_mask(mask, **SIZE)
    reach[0] = -20
    assert build_block_mask(mask, **SIZE).to_dense().sum() < before.to_dense().sum()


def test_the_cache_is_bounded_and_drops_the_oldest():
    kept = build_block_mask(sliding_window(0), **SIZE)
    dropped = build_block_mask(sliding_window(1), **SIZE)
    for window in range(2, builder.CACHED_BLOCK_MASKS + 1):
        build_block_mask(sliding_window(window), **SIZE)
        assert build_block_mask(sliding_window(0), **SIZE) is kept
    assert len(builder._cache) == builder.CACHED_BLOCK_MASKS
    assert build_block_mask(sliding_window(1), **SIZE) is not dropped


def test_a_mask_built_under_inference_mode_serves_training():
    with torch.inference_mode():
        block_mask = build_block_mask(sliding_window(5), **SIZE)
    assert not block_mask.kv_indices.is_inference()


def test_fake_tensors_are_not_cached():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        build_block_mask(sliding_window(5), **SIZE)
    assert type(build_block_mask(sliding_window(5), **SIZE).kv_indices) is torch.Tensor


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 0}, "block_size must be >= 1"),
        ({"q_len": 0}, "q_len must be >= 1, got 0"),
        ({"batch": 2}, "document_ids has 1 rows, so batch must be 1, got 2"),
        ({"batch": 1, "kv_len": 65}, "document_ids has 64 tokens, too few for 64 queries x 65 keys"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_block_mask(document(packed(30, 34)[None]), **(SIZE | change))


def attention_case(device, length=150, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    batch, heads, kv_heads, width = 2, 4, 2, 16
    ids = torch.stack([packed(50, length - 50), packed(1, 70, length - 71)]).to(device)
    mask = all_of(sliding_window(20), document(ids))
    q = torch.randn(batch, length, heads, width, generator=generator).to(device, dtype)
    k, v = (torch.randn(batch, length, kv_heads, width, generator=generator).to(device, dtype) for _ in range(2))
    sizes = {"batch": batch, "q_len": length, "kv_len": length, "device": device}
    expected = reference_attention(q, k, v, dense_mask(mask, **sizes))
    return [x.transpose(1, 2) for x in (q, k, v)], build_block_mask(mask, **sizes), expected.transpose(1, 2)


def relative_error(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("length", [100, 128, 150])
def test_flex_attention_with_our_block_mask_equals_the_reference(length):
    rows, block_mask, expected = attention_case("cpu", length)
    assert relative_error(flex_attention(*rows, block_mask=block_mask, enable_gqa=True), expected) < 1e-5


def test_masks_trace_into_one_graph():
    """torch.compile follows the masks' closures; generating the CPU kernel itself takes 20 s, so it is left out."""
    rows, block_mask, expected = attention_case("cpu")
    attend = torch.compile(flex_attention, backend="aot_eager", fullgraph=True, dynamic=False)
    assert relative_error(attend(*rows, block_mask=block_mask, enable_gqa=True), expected) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_fused_kernel_on_cuda_equals_the_reference():
    rows, block_mask, expected = attention_case("cuda", length=1000, dtype=torch.bfloat16)
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    assert relative_error(attend(*rows, block_mask=block_mask, enable_gqa=True), expected) < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("described", [True, False], ids=["closed form", "evaluated"])
def test_building_on_cuda_does_not_wait_for_the_device(described):
    ids = random_documents(1000).cuda()
    mask = all_of(sliding_window(100), document(ids))
    mask = mask if described else undescribed(mask)
    sizes = {"batch": 3, "q_len": 1000, "kv_len": 1000, "device": "cuda"}
    build_block_mask(mask, **sizes)
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_mask = build_block_mask(mask, **sizes)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    cpu_mask = all_of(sliding_window(100), document(ids.cpu()))
    assert same_lists(block_mask.to("cpu"), build_block_mask(cpu_mask, **(sizes | {"device": "cpu"})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("described", [True, False], ids=["closed form", "evaluated"])
def test_long_sequences_take_little_memory_on_cuda(described):
    mask = sliding_window(512) if described else undescribed(sliding_window(512))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    build_block_mask(mask, q_len=32768, kv_len=32768, device="cuda")
    assert torch.cuda.max_memory_allocated() - before < 2**30
