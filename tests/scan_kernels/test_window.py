import pytest
import torch

from scan_kernels import residual_pairs, residual_shift


@pytest.mark.parametrize("window", [0, 1, 5, 9, 50, None], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_window_and_residual_read_each_causal_pair_once(window, packed):
    T = 10
    ids = torch.tensor([[0] * 4 + [1] + [5] * 5, [2] * 10]) if packed else None
    residual = residual_pairs(T, window, ids).expand(2, T, T)
    for b in range(2):
        for t in range(T):
            for j in range(T):
                same = ids is None or bool(ids[b, t] == ids[b, j])
                causal = j <= t and same
                in_window = window is not None and causal and j >= t - window
                assert in_window + residual[b, t, j].item() == causal, (b, t, j)


def test_shift():
    assert residual_shift(0) == 1
    assert residual_shift(512) == 513
    assert residual_shift(None) == 0


def test_documents_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"document_ids must be \(B, 5\), got \(1, 4\)"):
        residual_pairs(5, 1, torch.zeros(1, 4, dtype=torch.int64))
