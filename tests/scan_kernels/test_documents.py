"""Packed documents equal one run per document, with its gradients."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from scan_kernels import fused_ops, residual_linear_attention
from scan_kernels.feature_maps import FeatureMap
from scan_kernels.state import begin
from tests.scan_kernels.cases import TIGHT, assert_same, document_ids, make_inputs, run

LENGTHS = [[1, 40, 1, 1, 60, 27], [64, 64, 2], [130], [100, 3, 27]]


def each_alone(impl, window, lengths, **inputs):
    rows = []
    for b, row in enumerate(lengths):
        parts, begin = [], 0
        for length in row:
            own = {
                name: x[b : b + 1] if name == "initial_state" else x[b : b + 1, begin : begin + length]
                for name, x in inputs.items()
            }
            parts.append(residual_linear_attention(**own, window=window, impl=impl))
            begin += length
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


@pytest.mark.parametrize("window", [5, 63, None], ids=str)
@pytest.mark.parametrize(
    ("decay", "start"),
    [(False, ""), (True, ""), (False, "query"), (True, "kv")],
    ids=["plain", "decay", "start-per-query-head", "decay start"],
)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_packed_is_one_run_per_document(impl, window, decay, start):
    inputs = make_inputs(130, B=len(LENGTHS), H=2, G=1, decay=decay, start=start)
    packed = run(residual_linear_attention, inputs, window=window, document_ids=document_ids(LENGTHS), impl=impl)
    alone = run(lambda **inputs: each_alone("torch", window, LENGTHS, **inputs), inputs)
    assert_same(packed, alone, TIGHT)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
def test_integer_dtypes(dtype):
    inputs = make_inputs(130, B=len(LENGTHS))
    ids = document_ids(LENGTHS)
    o = residual_linear_attention(**inputs, window=5, document_ids=ids)
    assert torch.equal(o, residual_linear_attention(**inputs, window=5, document_ids=ids.to(dtype)))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("start", [False, True], ids=["no start", "start"])
def test_around_the_kernels_nothing_grows_with_the_square(start, monkeypatch):
    """The Triton implementation's own use of document ids, without its kernels."""
    T, H, D = 3000, 1, 4
    q, k, v = (torch.randn(1, T, H, D) for _ in range(3))
    monkeypatch.setattr(fused_ops, "fused_fwd", lambda q, *_: (q, torch.zeros(1, H, 2 * D, D), None, None))
    problem = begin(
        q,
        k,
        v,
        window=5,
        feature_map=FeatureMap.SOFTMAX,
        decay_BTG=None,
        document_BT=torch.arange(T)[None] // 700,
        initial_state=torch.zeros(1, H, 2 * D, D) if start else None,
    )
    with Largest() as largest:
        fused_ops.fused_scan(problem, with_final=True)
    assert 0 < largest.elements <= 8 * T
