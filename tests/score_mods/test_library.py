"""Every mask of the library: its law against a loop, its blocks and counts against the dense mask, and its residual."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from score_mods import (
    MaskInfo,
    Residual,
    all_of,
    any_of,
    available_masks,
    build_block_mask,
    causal,
    check_mask,
    dense_mask,
    describe,
    document,
    drawn_window,
    in_documents,
    kept_pairs,
    make_mask,
    mask_info,
    reads_ahead,
    residual_mask,
    residual_of,
    sliding_window,
    stochastic_window,
)
from score_mods.blocks import can_judge
from tests.score_mods.catalogue import MASKS

T = 53
LENGTHS = {"one document": [T], "packed": [1, 9, 2, 24, 16, 1]}


def dense(mask, length=T, batch=None):
    return dense_mask(mask, batch=batch, q_len=length, kv_len=length, device="cpu")


def packed(lengths):
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return {"document_ids": ids, "positions": torch.cat([torch.arange(n) for n in lengths])[None]}


def looped(law, lengths):
    """law(t, j) over positions in each document, False across documents."""
    whole = torch.zeros(sum(lengths), sum(lengths), dtype=torch.bool)
    start = 0
    for n in lengths:
        for t in range(n):
            for j in range(n):
                whole[start + t, start + j] = law(t, j)
        start += n
    return whole


def listed(block_mask: BlockMask):
    """Kept and full blocks, (rows, columns) each."""
    columns = block_mask.kv_indices.shape[-1]
    full = torch.zeros_like(block_mask.kv_indices, dtype=torch.bool)
    full.scatter_(
        -1, block_mask.full_kv_indices.long(), torch.arange(columns) < block_mask.full_kv_num_blocks[..., None]
    )
    return block_mask.to_dense().bool()[0, 0], full[0, 0]


def blocks_of(kept, size):
    """Which blocks hold a kept pair, and which hold nothing else and lie inside the sequence."""
    number = -(-len(kept) // size)
    room = number * size - len(kept)
    parts = torch.nn.functional.pad(kept, (0, room, 0, room)).unflatten(1, (number, size)).unflatten(0, (number, size))
    return parts.any(3).any(1), parts.all(3).all(1)


def test_every_mask_is_looked_at():
    assert {case.name for case in MASKS.values()} | {"document"} == set(available_masks())


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_law(case):
    assert torch.equal(dense(make_mask(case.name, **case.args))[0, 0], looped(case.law, [T]))


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_law_in_packed_documents(case):
    mask = in_documents(make_mask(case.name, **case.args), **packed(LENGTHS["packed"]))
    assert torch.equal(dense(mask, batch=1)[0, 0], looped(case.law, LENGTHS["packed"]))


@pytest.mark.parametrize("size", [1, 4, 8, 16, 64])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_blocks_lose_no_pair_and_are_few(case, size):
    """A block that is kept in vain costs time, one that is lost or wrongly full would change numbers."""
    mask = make_mask(case.name, **case.args)
    assert can_judge(mask)
    kept, full = listed(build_block_mask(mask, q_len=T, kv_len=T, device="cpu", block_size=size))
    any_kept, all_kept = blocks_of(dense(mask)[0, 0], size)
    assert (kept >= any_kept).all()
    assert (full <= all_kept).all()
    if case.name not in ("neighborhood_2d", "windows_2d"):
        assert torch.equal(kept, any_kept)
    if case.name in ("causal", "sliding_window", "stochastic_window", "chunked", "prefix_lm"):
        assert torch.equal(full, all_kept)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_blocks_of_packed_documents_lose_no_pair(case, size):
    mask = in_documents(make_mask(case.name, **case.args), **packed(LENGTHS["packed"]))
    assert can_judge(mask)
    kept, full = listed(build_block_mask(mask, batch=1, q_len=T, kv_len=T, device="cpu", block_size=size))
    any_kept, all_kept = blocks_of(dense(mask, batch=1)[0, 0], size)
    assert (kept >= any_kept).all()
    assert (full <= all_kept).all()
    # Blocks of several documents are judged by the widest of them; single tokens leave nothing to guess.
    if size == 1 and case.name not in ("neighborhood_2d", "windows_2d"):
        assert torch.equal(kept, any_kept)


def test_blocks_of_combinations_lose_no_pair():
    sink, strided = make_mask("attention_sink", sinks=2, window=9), make_mask("strided", stride=8, window=3)
    mine = describe(lambda b, h, q, k: (q * k) % 3 == 0, MaskInfo(name="mine"))
    for mask in (any_of(sink, strided), all_of(sink, strided), all_of(any_of(sink, sliding_window(20)), strided)):
        assert can_judge(mask)
        kept, full = listed(build_block_mask(mask, q_len=T, kv_len=T, device="cpu", block_size=8))
        any_kept, all_kept = blocks_of(dense(mask)[0, 0], 8)
        assert (kept >= any_kept).all()
        assert (full <= all_kept).all()
    assert not can_judge(any_of(sink, mine))
    assert not can_judge(all_of(sink, mine))


def test_a_mask_without_info_is_asked_for_positions():
    def first_two(b, h, q_idx, kv_idx):
        return kv_idx < 2

    mask = in_documents(first_two, **packed(LENGTHS["packed"]))
    expected = looped(lambda t, j: j < 2, LENGTHS["packed"])
    assert torch.equal(dense(mask, batch=1)[0, 0], expected)
    kept, _ = listed(build_block_mask(mask, batch=1, q_len=T, kv_len=T, device="cpu", block_size=8))
    assert torch.equal(kept, blocks_of(expected, 8)[0])


@pytest.mark.parametrize("length", [1, 53, 300])
@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_pairs_are_counted_as_in_the_dense_mask(case, length):
    mask = make_mask(case.name, **case.args)
    assert kept_pairs(mask, length) == int(dense(mask, length).sum())


def test_pairs_of_a_mask_without_info_are_counted():
    def odd(b, h, q_idx, kv_idx):
        return (q_idx + 2 * kv_idx) % 3 == 0

    assert kept_pairs(odd, 200) == int(dense(odd, 200).sum())


@pytest.mark.parametrize("case", MASKS.values(), ids=MASKS)
def test_masks_that_read_ahead(case):
    mask = make_mask(case.name, **case.args)
    assert reads_ahead(mask) == bool(dense(mask).triu(1).any())
    assert reads_ahead(lambda b, h, q, k: mask(b, h, q, k)) == reads_ahead(mask)


READABLE = {name: case for name, case in MASKS.items() if case.residual is not None}
UNREADABLE = {name: case for name, case in MASKS.items() if case.residual is None}


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("case", READABLE.values(), ids=READABLE)
def test_mask_and_residual_partition_the_causal_pairs(case, lengths):
    """Each (t, j <= t) of a document is read by exactly one of the two, and no other pair by either."""
    mask = make_mask(case.name, **case.args)
    residual = residual_of(mask).mask()
    parts = [dense(in_documents(each, **packed(lengths)), batch=1)[0, 0].int() for each in (mask, residual)]
    assert torch.equal(parts[0] + parts[1], looped(lambda t, j: j <= t, lengths).int())
    assert torch.equal(parts[1].bool(), looped(case.residual, lengths))
    assert torch.equal(parts[1].bool(), dense(in_documents(residual_mask(mask), **packed(lengths)), batch=1)[0, 0])


REASONS = {
    "causal": "it leaves no key to a linear branch",
    "prefix_lm": "it is not causal",
    "neighborhood_2d": "it is not causal",
    "windows_2d": "it is not causal",
}


@pytest.mark.parametrize(("name", "case"), UNREADABLE.items(), ids=UNREADABLE)
def test_other_masks_have_no_residual_that_can_be_read(name, case):
    why = REASONS.get(name, "what it leaves out is not all keys before a window")
    with pytest.raises(ValueError, match=f"does not go with a linear branch: {why}; those that do: sliding_window"):
        residual_of(make_mask(case.name, **case.args))


def test_residuals_of_other_masks():
    assert residual_of(all_of(sliding_window(7), causal(), sliding_window(3))) == Residual(window=3)
    ids = packed(LENGTHS["packed"])["document_ids"]
    assert residual_of(all_of(sliding_window(7), document(ids))) == Residual(window=7)
    with pytest.raises(ValueError, match=r"'<lambda>' does not go .* it does not say what it leaves out"):
        residual_of(lambda b, h, q, k: k <= q)


def test_a_false_residual_is_seen():
    def keep(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & ((q_idx - kv_idx <= 3) | (kv_idx < 1))

    check_mask(describe(keep, MaskInfo(name="mine", causal=True, residual=Residual(window=3, sinks=1))))
    for wrong in (Residual(window=3), Residual(window=4, sinks=1), Residual(window=3, sinks=2)):
        mask = describe(keep, MaskInfo(name="mine", causal=True, residual=wrong))
        with pytest.raises(ValueError, match="exactly one of mask and residual must read key"):
            check_mask(mask)


def test_drawn_window_is_a_sliding_window_of_data():
    window = torch.tensor(0)
    mask = drawn_window(window)
    for value in (0, 3, 20, 100):
        window.fill_(value)
        assert torch.equal(dense(mask), dense(sliding_window(value)))
        for each in (mask, in_documents(mask, **packed(LENGTHS["packed"]))):
            batch = None if each is mask else 1
            kept, full = listed(build_block_mask(each, batch=batch, q_len=T, kv_len=T, device="cpu", block_size=8))
            any_kept, all_kept = blocks_of(dense(each, batch=batch)[0, 0], 8)
            assert torch.equal(kept, any_kept)
            assert torch.equal(full, all_kept)


def test_windows_are_drawn_from_step_and_seed_alone():
    def draws(**args):
        return [mask_info(stochastic_window(7, **args)).schedule.at(step) for step in range(1, 201)]

    drawn = draws(low=3, high=6)
    assert set(drawn) == {3, 4, 5, 6}
    # 200 draws of 4 windows, 50 each on average: no window is rare.
    assert min(drawn.count(window) for window in range(3, 7)) > 25
    assert drawn == draws(low=3, high=6)
    assert drawn != draws(low=3, high=6, seed=1)
    assert set(draws(values=[2, 512])) == {2, 512}
    held = draws(low=3, high=6, until=101)
    assert held[:100] == drawn[:100]
    assert set(held[100:]) == {7}


BAD = {
    "sinks": ("attention_sink", {"sinks": 0, "window": 4}, "sinks must be >= 1"),
    "sink window": ("attention_sink", {"sinks": 1, "window": -1}, "window must be >= 0"),
    "dilation": ("dilated_window", {"window": 1, "dilation": 0}, "dilation must be >= 1"),
    "chunk": ("chunked", {"chunk": 0}, "chunk must be >= 1"),
    "prefix": ("prefix_lm", {"prefix": 1.5}, r"prefix must be a whole number .* got 1.5 \(float\)"),
    "stride": ("strided", {"stride": 0}, "stride must be >= 1"),
    "strided window": ("strided", {"stride": 3, "window": -2}, "window must be >= 0"),
    "radius": ("neighborhood_2d", {"height": 4, "width": 4, "radius": -1}, "radius must be >= 0"),
    "image": ("neighborhood_2d", {"height": 0, "width": 4, "radius": 1}, "height must be >= 1"),
    "causal": ("windows_2d", {"height": 4, "width": 4, "size": 2, "causal": 1}, "causal must be true or false, got 1"),
    "shift": ("windows_2d", {"height": 4, "width": 4, "size": 2, "shift": 2}, "shift must be below size 2, got 2"),
    "order": ("stochastic_window", {"window": 4, "low": 5, "high": 3}, "high must be >= 5"),
    "neither": ("stochastic_window", {"window": 4, "low": 5}, "give low and high, or values, to draw windows from"),
    "both": ("stochastic_window", {"window": 4, "low": 1, "high": 2, "values": [3]}, "give low and high, or values"),
    "no values": ("stochastic_window", {"window": 4, "values": []}, "values must be a list of windows"),
    "a value": ("stochastic_window", {"window": 4, "values": [3, -1]}, "values must be >= 0"),
}


@pytest.mark.parametrize(("name", "args", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        make_mask(name, **args)


def test_names_tell_masks_apart():
    assert make_mask("attention_sink", sinks=4, window=64).__name__ == "attention_sink_4_64"
    image = {"height": 4, "width": 6, "radius": 1}
    assert make_mask("neighborhood_2d", **image).__name__ == "neighborhood_2d_4_6_1"
    assert make_mask("neighborhood_2d", **image, causal=True).__name__ == "neighborhood_2d_4_6_1_causal"
    assert make_mask("stochastic_window", window=4, values=[2, 8]).__name__ == "stochastic_window_4_2x8_0"
