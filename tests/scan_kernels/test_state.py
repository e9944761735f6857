"""A sequence cut anywhere equals the sequence in one piece."""

import itertools

import pytest
import torch

from scan_kernels import ResidualState, apply_feature_map, initial_state_from_pairs, residual_linear_attention
from tests.scan_kernels.cases import TIGHT, assert_close, assert_same, document_ids, make_inputs, run

CUTS = {
    "tokens": [1] * 12,
    "shorter than the window": [3, 1, 2, 4, 2],
    "halves": [6, 6],
    "prefill and steps": [9, 1, 1, 1],
    "step and rest": [1, 11],
}
DOCUMENTS = {
    "no documents": None,
    "one document": [[12], [12]],
    "borders on cuts": [[6, 3, 3], [1, 11]],
    "borders between": [[2, 5, 1, 4], [10, 2]],
    "single tokens": [[1] * 12, [4, 1, 7]],
}


def in_segments(cut, *, document_ids=None, initial_state=None, return_final_state=False, **inputs):
    options = {name: inputs.pop(name) for name in ("window", "impl", "feature_map") if name in inputs}
    outputs, state, begin = [], initial_state, 0
    for length in cut:
        part = {name: x[:, begin : begin + length] for name, x in inputs.items()}
        ids = None if document_ids is None else document_ids[:, begin : begin + length]
        o, state = residual_linear_attention(
            **part, document_ids=ids, initial_state=state, return_final_state=True, **options
        )
        outputs.append(o)
        begin += length
        assert isinstance(state, ResidualState)
        assert state.tokens_seen == begin
    o = torch.cat(outputs, dim=1)
    return (o, state) if return_final_state else o


def assert_same_state(got, reference):
    for name, x, y in zip(ResidualState._fields, got, reference, strict=True):
        if isinstance(y, torch.Tensor) and y.is_floating_point():
            assert_close(x, y, TIGHT, name)
        elif isinstance(y, torch.Tensor):
            assert torch.equal(x, y), name
        else:
            assert x == y, name


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
@pytest.mark.parametrize(
    ("decay", "start"),
    [(False, ""), (True, "query"), (False, "kv")],
    ids=["plain", "decay start-per-query-head", "start"],
)
@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_segments_equal_the_whole(impl, cut, documents, decay, start):
    inputs = make_inputs(12, H=2, G=1, D=4, Dv=3, decay=decay, start=start)
    ids = None if documents is None else document_ids(documents)
    for window in (0, 4, None, 20):
        options = {"window": window, "document_ids": ids, "impl": impl}
        o, state = residual_linear_attention(**inputs, **options, return_final_state=True)
        o_cut, state_cut = in_segments(cut, **inputs, **options, return_final_state=True)
        assert_close(o_cut, o, TIGHT)
        assert_same_state(state_cut, state)


@pytest.mark.parametrize("window", [0, 7, 63, 70, None, 300], ids=str)
@pytest.mark.parametrize("documents", [None, [[100, 1, 39], [30, 35, 75]]], ids=["no documents", "documents"])
def test_segments_longer_than_chunks_with_gradients(window, documents):
    inputs = make_inputs(140, decay=True, start="query")
    options = {"window": window, "document_ids": None if documents is None else document_ids(documents)}
    whole = run(residual_linear_attention, inputs, **options)
    parts = run(lambda **kw: in_segments([65, 3, 1, 71], **kw), inputs, **options)
    assert_same(parts, whole, TIGHT)


def test_every_cut_of_a_short_sequence():
    inputs = make_inputs(6, H=2, G=1, D=4, Dv=3, decay=True, start="query")
    options = {"window": 2, "document_ids": document_ids([[2, 4], [3, 3]])}
    whole = residual_linear_attention(**inputs, **options)
    for places in itertools.product([False, True], repeat=5):
        borders = [0, *(i + 1 for i, cut in enumerate(places) if cut), 6]
        lengths = [b - a for a, b in itertools.pairwise(borders)]
        assert_close(in_segments(lengths, **inputs, **options), whole, TIGHT, str(lengths))


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_state_is_what_the_last_query_read(impl):
    inputs = make_inputs(20)
    _, state = residual_linear_attention(**inputs, window=4, return_final_state=True, impl=impl)
    phi = apply_feature_map(inputs["k"], "softmax")[:, :15]
    assert_close(state.carried_BGFD, torch.einsum("btgf,btgd->bgfd", phi, inputs["v"][:, :15]), TIGHT)
    assert torch.equal(state.pending_k_BPGD, inputs["k"][:, 15:])
    assert state.pending_v_BPGD.shape[1] == 5


def test_gradient_reaches_through_the_state_and_detach_cuts_it():
    inputs = make_inputs(20)
    first = {name: x[:, :10] for name, x in inputs.items()}
    second = {name: x[:, 10:].detach() for name, x in inputs.items()}
    _, state = residual_linear_attention(**first, window=3, return_final_state=True)
    o = residual_linear_attention(**second, window=3, initial_state=state)
    (dk,) = torch.autograd.grad(o.sum(), inputs["k"], retain_graph=True)
    assert (dk[:, :10] != 0).any(-1).all()
    assert not residual_linear_attention(**second, window=3, initial_state=state.detach()).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_state_is_fp32_and_does_not_keep_the_sequence_alive(dtype):
    inputs = {name: x.detach().to(dtype) for name, x in make_inputs(100, B=1).items()}
    _, state = residual_linear_attention(**inputs, window=3, return_final_state=True)
    assert state.carried_BGFD.dtype == torch.float32
    assert state.pending_k_BPGD.dtype == dtype
    assert state.pending_k_BPGD.untyped_storage().nbytes() == 4 * 2 * 8 * dtype.itemsize
    assert state.carried_BGFD.untyped_storage().nbytes() == 2 * 16 * 6 * 4


def test_initial_state_from_pairs():
    """A start state made of pairs is those pairs, read by every query as if they stood before the sequence."""
    inputs = make_inputs(30)
    pairs = make_inputs(5, seed=3)
    start = initial_state_from_pairs(pairs["k"], pairs["v"], feature_map="softmax")
    o = residual_linear_attention(**inputs, window=None, initial_state=start)
    longer = {name: torch.cat((pairs[name], inputs[name]), dim=1) for name in "qkv"}
    assert_close(o, residual_linear_attention(**longer, window=None)[:, 5:], TIGHT)


def test_queries_before_any_key_read_the_start_state():
    inputs = make_inputs(10, start="query")
    o = residual_linear_attention(**inputs, window=20)
    assert_close(
        o, torch.einsum("bthf,bhfd->bthd", apply_feature_map(inputs["q"], "softmax"), inputs["initial_state"]), TIGHT
    )
