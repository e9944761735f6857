import pytest
import torch

from score_mods import all_of, causal, dense_mask, document, sliding_window

IDS = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])


@pytest.mark.parametrize("batch", [None, 1, 2])
@pytest.mark.parametrize("heads", [None, 1, 3])
def test_shape_is_that_of_batch_and_heads_or_1(batch, heads):
    mask = dense_mask(causal(), batch=batch, heads=heads, q_len=4, kv_len=7, device="cpu")
    assert mask.shape == (batch or 1, heads or 1, 4, 7)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, torch.ones(4, 7).tril().bool().expand(mask.shape))


def test_masks_may_depend_on_the_head():
    def alternating(b, h, q_idx, kv_idx):
        return torch.where(h % 2 == 0, kv_idx <= q_idx, kv_idx == q_idx)

    mask = dense_mask(alternating, heads=2, q_len=5, kv_len=5, device="cpu")
    assert torch.equal(mask[0, 0], torch.ones(5, 5).tril().bool())
    assert torch.equal(mask[0, 1], torch.eye(5).bool())


def test_document_ids_may_be_longer_than_the_mask():
    mask = dense_mask(all_of(causal(), document(IDS)), batch=2, q_len=3, kv_len=3, device="cpu")
    assert mask[:, 0].sum(dim=(1, 2)).tolist() == [4, 4]


BAD = {
    "rows": (document(IDS), {"batch": 3}, "document_ids has 2 rows, so batch must be 2, got 3"),
    "no batch": (document(IDS), {}, "document_ids has 2 rows, so batch must be 2, got None"),
    "inside a combination": (all_of(causal(), document(IDS)), {}, "document_ids has 2 rows"),
    "tokens": (document(IDS), {"batch": 2, "q_len": 6}, "has 5 tokens, too few for 6 queries x 5 keys"),
    "device": (document(IDS), {"batch": 2, "device": "meta"}, "document_ids is on cpu, the mask is asked for on meta"),
    "q_len": (sliding_window(2), {"q_len": 0}, "q_len must be >= 1, got 0"),
    "batch 0": (sliding_window(2), {"batch": 0}, "batch must be >= 1, got 0"),
}


@pytest.mark.parametrize(("mask", "sizes", "message"), BAD.values(), ids=BAD.keys())
def test_sizes_that_do_not_fit_are_refused(mask, sizes, message):
    with pytest.raises(ValueError, match=message):
        dense_mask(mask, **({"q_len": 5, "kv_len": 5, "device": "cpu"} | sizes))
