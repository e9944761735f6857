"""Every mask against its law, written as a loop over plain integers."""

import pytest
import torch

from score_mods import all_of, any_of, causal, dense_mask, document, mask_info, sliding_window

T = 23


def keep_causal(t, j):
    return j <= t


def keep_window(window):
    return lambda t, j: t - window <= j <= t


def looped(law, length):
    return torch.tensor([[law(t, j) for j in range(length)] for t in range(length)])


def dense(mask, length=T, batch=None):
    return dense_mask(mask, batch=batch, q_len=length, kv_len=length, device="cpu")


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))


WINDOWS = [0, 1, 5, T - 2, T - 1, T, 10 * T]


def test_causal_keeps_keys_up_to_the_query():
    assert torch.equal(dense(causal())[0, 0], looped(keep_causal, T))


@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_window_keeps_the_query_and_window_previous_keys(window):
    assert torch.equal(dense(sliding_window(window))[0, 0], looped(keep_window(window), T))


@pytest.mark.parametrize("window", WINDOWS)
def test_sliding_window_counts_pairs(window):
    # Each query keeps window + 1 keys, fewer at the start.
    assert dense(sliding_window(window)).sum() == sum(min(t, window) + 1 for t in range(T))


def test_window_0_is_the_diagonal():
    assert torch.equal(dense(sliding_window(0))[0, 0], torch.eye(T, dtype=torch.bool))


@pytest.mark.parametrize("window", [T - 1, T, 10 * T])
def test_window_of_the_whole_sequence_is_causal(window):
    assert torch.equal(dense(sliding_window(window)), dense(causal()))


DOCUMENTS = {
    "one document": [packed(T)],
    "two": [packed(10, 13)],
    "length 1 at the ends and between": [packed(1, 7, 1, 1, 12, 1)],
    "all of length 1": [packed(*[1] * T)],
    "a batch": [packed(10, 13), packed(1, 22), packed(5, 5, 13)],
    "ids that jump and are negative": [packed(3, 20) * 7 - 5],
    "ids that return": [torch.tensor([0, 1] * 11 + [0])],
}


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_document_keeps_pairs_of_one_document(rows):
    ids = torch.stack(rows)
    kept = dense(document(ids), batch=len(rows))
    for row, kept_row in zip(rows, kept, strict=True):
        assert torch.equal(kept_row[0], looped(lambda t, j, row=row: bool(row[t] == row[j]), T))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_document_takes_any_integer_type(dtype):
    assert dense(document(packed(10, 13).to(dtype)[None]), batch=1).sum() == 10**2 + 13**2


@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("window", [0, 4, T])
def test_all_of_is_the_intersection(rows, window):
    ids = torch.stack(rows)
    kept = dense(all_of(sliding_window(window), document(ids)), batch=len(rows))
    for row, kept_row in zip(rows, kept, strict=True):
        law = lambda t, j, row=row: keep_window(window)(t, j) and bool(row[t] == row[j])  # noqa: E731
        assert torch.equal(kept_row[0], looped(law, T))


def test_any_of_is_the_union():
    def first_keys(b, h, q_idx, kv_idx):
        return kv_idx < 3

    kept = dense(all_of(causal(), any_of(sliding_window(4), first_keys)))
    assert torch.equal(kept[0, 0], looped(lambda t, j: j <= t and (j < 3 or t - 4 <= j), T))


@pytest.mark.parametrize("window", [0, 1, 6, T])
@pytest.mark.parametrize("rows", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_window_and_what_it_leaves_out_partition_the_causal_pairs(window, rows):
    """The youngest key that the window leaves out is t - window - 1."""
    ids = torch.stack(rows)

    def older(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx - window - 1

    parts = [dense(all_of(part, document(ids)), batch=len(rows)).int() for part in (sliding_window(window), older)]
    assert torch.equal(sum(parts), dense(all_of(causal(), document(ids)), batch=len(rows)).int())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sliding_window(-1), r"window must be >= 0 \(previous keys a query sees besides itself\), got -1"),
        (lambda: sliding_window(True), r"window must be a whole number .* got True \(bool\)"),
        (lambda: sliding_window(4.0), r"window must be a whole number .* got 4.0 \(float\)"),
        (lambda: sliding_window("512"), r"window must be a whole number .* got '512' \(str\)"),
        (lambda: sliding_window(None), r"window must be a whole number .* got None"),
        (lambda: document([0, 0, 1]), r"document_ids must be an integer tensor of shape \(B, T\), got list"),
        (lambda: document(torch.zeros(1, 4)), r"document_ids must hold integers, got torch.float32"),
        (lambda: document(torch.zeros(1, 4).bool()), r"document_ids must hold integers, got torch.bool"),
        (lambda: document(torch.arange(4)), r"document_ids must have shape \(B, T\) .* got \(4,\)"),
        (lambda: document(torch.zeros(0, 4).long()), r"document_ids must have shape \(B, T\) .* got \(0, 4\)"),
        (lambda: all_of(), "all_of needs at least one mask"),
        (lambda: any_of(), "any_of needs at least one mask"),
        (lambda: all_of(causal), r"all_of: a mask is a function of .* got causal\(\) \(is it a factory"),
        (lambda: any_of(causal(), 3), r"any_of: a mask is a function of .* got 3"),
        (lambda: all_of(lambda s, b, h, q, k: s), "five arguments make a score mod"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_names_say_what_is_kept():
    ids = packed(10, 13)[None]
    assert sliding_window(512).__name__ == "sliding_window_512"
    assert all_of(causal(), document(ids)).__name__ == "all_of(causal, document)"
    assert any_of(causal(), all_of(sliding_window(3), document(ids))).__name__ == (
        "any_of(causal, all_of(sliding_window_3, document))"
    )


def test_one_mask_alone_needs_no_combination():
    mask = sliding_window(3)
    assert all_of(mask) is mask
    assert any_of(mask) is mask


def test_info_of_the_masks():
    ids = packed(10, 13)[None]
    window, documents, whole = mask_info(sliding_window(3)), mask_info(document(ids)), mask_info(causal())
    assert (window.window, window.causal, window.exact, window.is_plain_window) == (3, True, True, True)
    assert (whole.window, whole.causal, whole.exact, whole.is_plain_window) == (None, True, True, False)
    assert (documents.window, documents.causal, documents.exact) == (None, False, True)
    assert documents.documents[0] is ids


def test_info_of_combinations():
    ids = packed(10, 13)[None]
    packed_window = mask_info(all_of(sliding_window(7), causal(), document(ids), sliding_window(3), document(ids)))
    assert packed_window.is_plain_window
    assert packed_window.window == 3
    assert len(packed_window.documents) == 1

    def anything(b, h, q_idx, kv_idx):
        return kv_idx >= 0

    bounded = mask_info(all_of(sliding_window(7), anything))
    assert (bounded.causal, bounded.window, bounded.exact, bounded.is_plain_window) == (True, 7, False, False)

    union = mask_info(any_of(all_of(sliding_window(7), document(ids)), all_of(sliding_window(3), document(ids))))
    assert (union.causal, union.window, union.exact) == (True, 7, False)
    assert union.documents[0] is ids

    loose = mask_info(any_of(sliding_window(7), document(ids)))
    assert (loose.causal, loose.window, loose.documents) == (False, None, ())
