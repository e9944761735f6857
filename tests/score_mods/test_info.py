import functools

import pytest
import torch

from score_mods import MaskInfo, all_of, any_of, causal, describe, document, fingerprint, mask_info, sliding_window
from score_mods.info import is_static, tensors_in

IDS = torch.tensor([[0, 0, 0, 1, 1]])


def own(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def another(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


SAME = {
    "causal": lambda: causal(),
    "sliding_window": lambda: sliding_window(3),
    "document": lambda: document(IDS),
    "all_of": lambda: all_of(sliding_window(3), document(IDS)),
    "a user's function": lambda: own,
}


@pytest.mark.parametrize("make", SAME.values(), ids=SAME.keys())
def test_equal_masks_have_equal_fingerprints(make):
    assert fingerprint(make()) == fingerprint(make())
    assert len({fingerprint(make()), fingerprint(make())}) == 1


def test_different_masks_have_different_fingerprints():
    masks = [
        causal(),
        sliding_window(3),
        sliding_window(4),
        document(IDS),
        document(IDS.clone()),
        all_of(sliding_window(3), document(IDS)),
        any_of(sliding_window(3), document(IDS)),
        all_of(sliding_window(4), document(IDS)),
        all_of(sliding_window(3), document(IDS.clone())),
        all_of(causal(), own),
        own,
        another,
    ]
    assert len({fingerprint(mask) for mask in masks}) == len(masks)


def test_two_users_masks_of_one_name_differ():
    def first(b, h, q_idx, kv_idx):
        return kv_idx < 3

    def second(b, h, q_idx, kv_idx):
        return kv_idx < 4

    described = [describe(mask, MaskInfo(name="mine", args=(("n", 3),))) for mask in (first, second)]
    assert fingerprint(described[0]) != fingerprint(described[1])


def test_only_described_masks_without_documents_are_static():
    assert is_static(causal())
    assert is_static(any_of(causal(), sliding_window(3)))
    assert not is_static(document(IDS))
    assert not is_static(any_of(causal(), document(IDS)))
    assert not is_static(own)
    assert not is_static(all_of(causal(), own))


def test_describe_wants_hashable_arguments():
    with pytest.raises(TypeError, match="unhashable"):
        describe(lambda b, h, q, k: k <= q, MaskInfo(name="mine", args=(("sizes", [1, 2]),)))


def test_undescribed_masks_have_no_info():
    assert mask_info(own) is None


def test_tensors_are_found_where_masks_hide_them():
    table = torch.arange(3)

    def reads_table(b, h, q_idx, kv_idx):
        return table[q_idx] == table[kv_idx]

    def with_argument(ids, b, h, q_idx, kv_idx):
        return ids[b] == ids[b]

    masks = [reads_table, all_of(causal(), reads_table), functools.partial(with_argument, table), document(table[None])]
    assert all(len(list(tensors_in(mask))) == 1 for mask in masks)
    assert not list(tensors_in(sliding_window(3)))
