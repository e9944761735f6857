"""impl="torch" against the float64 token loop, and what a chunked scan gets wrong first."""

from functools import partial

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scan_kernels import available_feature_maps, residual_linear_attention, residual_linear_attention_quadratic
from scan_kernels.chunked import chunked
from scan_kernels.feature_maps import FeatureMap
from scan_kernels.state import begin
from tests.scan_kernels.cases import (
    LENGTHS,
    TIGHT,
    WINDOWS,
    assert_close,
    assert_same,
    cast,
    document_ids,
    make_inputs,
    output_gradient,
    random_lengths,
    run,
)

loop = partial(residual_linear_attention, impl="reference")
torch_impl = partial(residual_linear_attention, impl="torch")
EXTRAS = [(False, ""), (True, ""), (False, "kv"), (True, "query")]
EXTRA_IDS = ["plain", "decay", "start", "decay start-per-query-head"]


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_equals_loop(T, window):
    for decay, start in EXTRAS if T in (1, 65) else EXTRAS[:1]:
        inputs = make_inputs(T, decay=decay, start=start)
        assert_same(run(torch_impl, inputs, window=window), run(loop, inputs, window=window), TIGHT)


@pytest.mark.parametrize("T", [65, 200])
@pytest.mark.parametrize("window", [0, 5, 63, None], ids=str)
@pytest.mark.parametrize(("decay", "start"), EXTRAS, ids=EXTRA_IDS)
def test_equals_loop_with_documents(T, window, decay, start):
    inputs = make_inputs(T, decay=decay, start=start)
    ids = document_ids([random_lengths(T, 3, 120), random_lengths(T, 4, 12)])
    options = {"window": window, "document_ids": ids}
    assert_same(run(torch_impl, inputs, **options), run(loop, inputs, **options), TIGHT)


@pytest.mark.parametrize("feature_map", available_feature_maps())
@pytest.mark.parametrize(("H", "G"), [(3, 3), (6, 2), (5, 1)], ids=["heads 3/3", "heads 6/2", "heads 5/1"])
def test_feature_maps_and_groups(feature_map, H, G):
    inputs = make_inputs(70, H=H, G=G, D=4, Dv=9, decay=True, start="kv", feature_map=feature_map)
    options = {"window": 3, "feature_map": feature_map}
    assert_same(run(torch_impl, inputs, **options), run(loop, inputs, **options), TIGHT)


@pytest.mark.parametrize("feature_map", available_feature_maps())
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_gradcheck(feature_map, packed):
    inputs = make_inputs(5, B=1, H=2, G=1, D=2, Dv=1, decay=True, start="query", feature_map=feature_map)
    ids = document_ids([[3, 2]]) if packed else None

    def of(q, k, v, decay, initial_state):
        problem = begin(
            q,
            k,
            v,
            window=1,
            feature_map=FeatureMap(feature_map),
            decay_BTG=decay,
            document_BT=ids,
            initial_state=initial_state,
        )
        result = chunked(problem, chunk=2)
        return result.o_BTHD, result.carried_BGFD

    assert torch.autograd.gradcheck(of, tuple(inputs.values()))


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("feature_map", available_feature_maps())
def test_precision(dtype, tolerance, feature_map):
    """Long enough, and mean(v) far enough from 0, for the common mode of softmax features to dominate the state."""
    inputs = cast(make_inputs(1200, B=1, H=1, G=1, D=16, Dv=16), dtype)
    inputs["q"] = (inputs["q"].detach() * 0.3).requires_grad_()
    options = {"window": 100, "feature_map": feature_map}
    exact = run(residual_linear_attention_quadratic, cast(inputs, torch.float64), **options)
    assert_same(run(torch_impl, inputs, **options), exact, tolerance)


def test_precision_of_strong_decay():
    inputs = make_inputs(257, decay=True, start="kv")
    inputs["decay"] = (inputs["decay"].detach() * 60).requires_grad_()
    exact = run(loop, cast(cast(inputs, torch.float32), torch.float64), window=5)
    assert_same(run(torch_impl, cast(inputs, torch.float32), window=5), exact, 1e-5)


def test_decay_may_forget_everything():
    inputs = make_inputs(130, decay=True, start="query")
    decay = inputs["decay"].detach().clone()
    decay[:, [0, 20, 64, 100]] = -torch.inf
    inputs["decay"] = decay.requires_grad_()
    assert_same(run(torch_impl, inputs, window=5), run(loop, inputs, window=5), TIGHT)


@pytest.mark.parametrize("feature_map", available_feature_maps())
def test_large_inputs(feature_map):
    inputs = {name: x.detach() * (50 if name in "qk" else 1) for name, x in make_inputs(130).items()}
    inputs = cast(inputs, torch.float32)
    options = {"window": 5, "feature_map": feature_map}
    exact = run(loop, cast(inputs, torch.float64), **options)
    assert_same(run(torch_impl, inputs, **options), exact, 1e-5)


@pytest.mark.parametrize("window", [0, 5, 64, 129, 1000], ids=str)
def test_rows_without_a_key_are_exactly_zero(window):
    inputs = cast(make_inputs(130), torch.float32)
    o = torch_impl(**inputs, window=window)
    assert (o[:, : window + 1] == 0).all()
    assert (o[:, window + 1 :] != 0).all()
    grads = torch.autograd.grad(o, list(inputs.values()), torch.where(o == 0, 1e4, 0.0))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(
    ("impl", "j"),
    [("reference", 64), *(("torch", j) for j in (0, 10, 58, 63, 64, 120))],
    ids=lambda value: f"key {value}" if isinstance(value, int) else value,
)
@pytest.mark.parametrize("window", [0, 5, None], ids=str)
@pytest.mark.parametrize("what", ["change", "nan key", "nan value", "inf value"])
def test_causality(j, window, what, impl):
    """Key j reaches the queries t >= j + window + 1, all of them and no other, in value and in gradient."""
    inputs = make_inputs(130, decay=True)
    # Weak, so that the change is still there 130 tokens later.
    inputs["decay"] = inputs["decay"].detach() * 0.05
    inputs = cast(inputs, torch.float32)
    first = j if window is None else j + window + 1
    bad = {"change": 9.0, "nan key": torch.nan, "nan value": torch.nan, "inf value": torch.inf}[what]
    changed = cast(inputs, torch.float32)
    with torch.no_grad():
        changed["k" if what == "nan key" else "v"][:, j, 0, 1] += bad
    results = []
    for case in (inputs, changed):
        o = residual_linear_attention(**case, window=window, impl=impl)
        grads = torch.autograd.grad(o[:, :first].sum(), list(case.values()), allow_unused=True)
        results.append((o, grads))
    (o, grads), (o_changed, grads_changed) = results
    assert torch.equal(o[:, :first], o_changed[:, :first])
    # Query heads 0 and 1 read KV head 0.
    assert (o[:, first:, :2] != o_changed[:, first:, :2]).any(-1).all()
    assert torch.equal(o[:, :, 2:], o_changed[:, :, 2:])
    # A query that reads NaN has no gradient, and the decay of a key meets every state behind it.
    rows = {"q": torch.arange(130) < first, "k": torch.arange(130) != j, "v": torch.arange(130) != j}
    for name, before, after in zip(inputs, grads, grads_changed, strict=True):
        if before is not None and name in rows:
            assert torch.equal(before[:, rows[name]], after[:, rows[name]]), name


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("end", [90, 55], ids=["over a chunk border", "inside a chunk"])
def test_nan_stays_in_its_document(impl, name, end):
    inputs = cast(make_inputs(130, B=1, decay=True, start="query"), torch.float32)
    ids = document_ids([[40, end - 40, 130 - end]])
    with torch.no_grad():
        inputs[name][:, 45:50] = torch.nan
    o = residual_linear_attention(**inputs, window=2, document_ids=ids, impl=impl)
    others = torch.arange(130).lt(40) | torch.arange(130).ge(end)
    assert o[:, others].isfinite().all()
    assert o[:, 48:end].isnan().all()
    grads = torch.autograd.grad(o[:, others].sum(), [inputs[name] for name in "qkv"])
    assert all(grad[:, others].isfinite().all() for grad in grads)


def test_non_contiguous():
    inputs = make_inputs(70, decay=True, start="kv")
    strided = {name: x.detach().transpose(1, -1).contiguous().transpose(1, -1) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    strided = {name: x.requires_grad_() for name, x in strided.items()}
    ids = document_ids([[30, 40], [70]]).T.contiguous().T
    options = {"window": 5, "document_ids": ids}
    assert_same(run(torch_impl, strided, **options), run(loop, inputs, **options), TIGHT)
    # A gradient that is not contiguous either.
    o = torch_impl(**strided, **options)
    do = output_gradient(o).transpose(1, 3).contiguous().transpose(1, 3)
    (dq,) = torch.autograd.grad(o, strided["q"], do)
    assert_close(dq, run(loop, inputs, **options)["dq"], TIGHT, "dq")


def test_expanded_inputs():
    inputs = make_inputs(70, start="query")
    shared = inputs["initial_state"][:1].expand_as(inputs["initial_state"])
    inputs["initial_state"] = shared.detach().requires_grad_()
    assert_same(run(torch_impl, inputs, window=5), run(loop, inputs, window=5), TIGHT)


def saved_bytes(T: int) -> int:
    """Storage kept for the backward beyond the inputs."""
    inputs = cast(make_inputs(T, B=1, decay=True, start="query"), torch.float32)
    theirs = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept: dict[int, int] = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in theirs:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        o = torch_impl(**inputs, window=64, document_ids=torch.zeros(1, T, dtype=torch.int64))
    del o
    return sum(kept.values())


def test_memory_and_work_are_linear_in_length():
    assert saved_bytes(2048) / saved_bytes(512) == pytest.approx(4, rel=0.05)

    def work(T):
        inputs = make_inputs(T, B=1)
        with FlopCounterMode(display=False) as counter:
            torch_impl(**inputs, window=64).sum().backward()
        return counter.get_total_flops()

    assert work(2048) / work(512) == pytest.approx(4, rel=0.05)
