"""The references against the law written out pair by pair, against each other, and against numerical gradients."""

from functools import partial

import pytest
import torch

from scan_kernels import (
    apply_feature_map,
    available_feature_maps,
    residual_linear_attention,
    residual_linear_attention_quadratic,
    residual_pairs,
)
from tests.scan_kernels.cases import (
    LENGTHS,
    TIGHT,
    WINDOWS,
    assert_same,
    document_ids,
    make_inputs,
    random_lengths,
    run,
)

loop = partial(residual_linear_attention, impl="reference")
quadratic = residual_linear_attention_quadratic


def pair_by_pair(q, k, v, *, window, feature_map="softmax", document_ids=None, decay=None, initial_state=None):
    B, T, H, _ = q.shape
    R = H // k.shape[2]
    pairs = residual_pairs(T, window, document_ids).expand(B, T, T)
    o = []
    for b in range(B):
        for t in range(T):
            read = [j for j in range(T) if pairs[b, t, j]]
            for h in range(H):
                g = h // R
                phi_q = apply_feature_map(q[b, t, h], feature_map)
                total = torch.zeros_like(v[0, 0, 0])
                for j in read:
                    between = sum(decay[b, s, g] for s in read if s > j) if decay is not None else 0.0
                    weight = torch.as_tensor(between).exp()
                    total = total + weight * (phi_q @ apply_feature_map(k[b, j, g], feature_map)) * v[b, j, g]
                if initial_state is not None:
                    S0 = initial_state[b, h * initial_state.shape[1] // H]
                    before = sum(decay[b, s, g] for s in read) if decay is not None else 0.0
                    total = total + torch.as_tensor(before).exp() * (phi_q @ S0)
                o.append(total)
    return torch.stack(o).view(B, T, H, -1)


@pytest.mark.parametrize("fn", [loop, quadratic], ids=["loop", "quadratic"])
@pytest.mark.parametrize("window", [0, 2, None, 20], ids=str)
@pytest.mark.parametrize(
    ("decay", "start", "packed"),
    [(False, "", False), (True, "", False), (False, "kv", True), (True, "query", False), (True, "kv", True)],
    ids=["plain", "decay", "start documents", "decay start-per-query-head", "all"],
)
def test_law_pair_by_pair(fn, window, decay, start, packed):
    inputs = make_inputs(7, D=4, Dv=3, decay=decay, start=start)
    ids = document_ids([[1, 4, 2], [7]]) if packed else None
    options = {"window": window, "document_ids": ids}
    assert_same(run(fn, inputs, **options), run(pair_by_pair, inputs, **options), TIGHT)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("window", [0, 5, 64, None], ids=str)
def test_quadratic_is_loop(T, window):
    inputs = make_inputs(T, decay=True, start="query")
    options = {"window": window, "document_ids": document_ids([random_lengths(T, 1, 90), random_lengths(T, 2, 9)])}
    assert_same(run(quadratic, inputs, **options), run(loop, inputs, **options), TIGHT)


@pytest.mark.parametrize("fn", [loop, quadratic], ids=["loop", "quadratic"])
@pytest.mark.parametrize("feature_map", available_feature_maps())
@pytest.mark.parametrize("window", [1, None], ids=str)
def test_gradcheck(fn, feature_map, window):
    inputs = make_inputs(4, B=1, H=2, G=1, D=2, Dv=2, decay=True, start="query", feature_map=feature_map)
    ids = document_ids([[3, 1]])

    def of(*tensors):
        return fn(**dict(zip(inputs, tensors, strict=True)), window=window, feature_map=feature_map, document_ids=ids)

    assert torch.autograd.gradcheck(of, tuple(inputs.values()))


def test_windows_cover_the_cases():
    assert None in WINDOWS
    assert max(w for w in WINDOWS if w is not None) > max(LENGTHS)
