"""Packed documents equal one run per document, with its gradients."""

import pytest
import torch

from scan_kernels import residual_linear_attention
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
