"""Laws that hold between the packages: the masks' pairs and the linear branch's are a partition of the causal pairs."""

from __future__ import annotations

import pytest
import torch

from scan_kernels import residual_linear_attention, residual_pairs
from score_mods import all_of, dense_mask, make_mask
from tests.closeness import relative_error

T = 29
DOCUMENTS = {"one": [29], "packed": [1, 7, 2, 18, 1]}


def ids_of(lengths: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def pairs(mask) -> torch.Tensor:
    return dense_mask(mask, batch=1, heads=None, q_len=T, kv_len=T, device="cpu")[0, 0]


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [0, 1, 5, 28, 29, 100])
def test_branches_partition_the_causal_pairs(window, documents):
    """Each (t, j <= t) of a document is read by exactly one branch; no other pair is read by either."""
    ids = ids_of(documents)
    same = make_mask("document", document_ids=ids)
    causal = pairs(all_of(make_mask("causal"), same)).int()
    softmax = pairs(all_of(make_mask("sliding_window", window=window), same)).int()
    linear = residual_pairs(T, window, ids)
    linear = (linear[0] if linear.ndim == 3 else linear).int()
    assert torch.equal(softmax + linear, causal)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize("window", [0, 5, 28, None])
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_op_reads_the_pairs_it_says(impl, window, documents):
    """Read off the op itself: with v_j = e_j and positive features, o_t is non-zero exactly at the keys it read."""
    ids = ids_of(documents)
    q, k = torch.rand(1, T, 1, 4) + 0.1, torch.rand(1, T, 1, 4) + 0.1
    v = torch.eye(T)[None, :, None]
    o = residual_linear_attention(q, k, v, window=window, feature_map="softmax", document_ids=ids, impl=impl)
    read = o[0, :, 0] != 0
    expected = residual_pairs(T, window, ids)
    expected = expected[0] if expected.ndim == 3 else expected
    if window is None:
        assert torch.equal(expected, pairs(all_of(make_mask("causal"), make_mask("document", document_ids=ids))))
    assert torch.equal(read, expected)


def test_without_a_window_it_is_causal_linear_attention():
    """window None: o_t = sum over s <= t of (phi(q_t) . phi(k_s)) v_s."""
    q, k, v = torch.randn(2, T, 4, 8), torch.randn(2, T, 2, 8), torch.randn(2, T, 2, 8)

    def phi(x):
        return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)

    scores = torch.einsum("bthf,bshf->bhts", phi(q), phi(k.repeat_interleave(2, 2))).tril()
    expected = torch.einsum("bhts,bshd->bthd", scores, v.repeat_interleave(2, 2))
    for impl in ("reference", "torch"):
        assert relative_error(residual_linear_attention(q, k, v, window=None, impl=impl), expected) < 1e-5
