"""The kernels under Triton's interpreter on the CPU, against float64. `test_triton.py` runs this file.

Chunks of 16 rows and segments of 2 chunks, so that 70 tokens cross every kind of border.
"""

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from scan_kernels import residual_linear_attention, residual_linear_attention_and_inputs, sum_of_head_norms
from scan_kernels.branch_sum import branch_sum_fwd
from scan_kernels.fused_ops import fused_bwd, fused_fwd
from scan_kernels.kernels import branch_sum as branch_sum_kernels
from scan_kernels.kernels import configs, state_scan
from scan_kernels.kernels.launch import Config
from tests.scan_kernels import branch_sum_cases, interpreted_bf16, shared_inputs
from tests.scan_kernels.cases import (
    assert_close,
    assert_same,
    cast,
    document_ids,
    gradients,
    make_inputs,
    output_gradient,
    random_lengths,
    run,
)

SMALL = configs.Plan(16, 2, *(Config(num_warps=4, heads=heads) for heads in (1, 1, 2, 2, 1)))
DOCUMENTS = {17: [[1, 16], [3, 1, 13]], 70: [[1, 1, 30, 38], random_lengths(70, 1, 25)]}


@pytest.fixture(autouse=True)
def small_plan(monkeypatch):
    monkeypatch.setattr(configs, "plan_for", lambda *_: SMALL)
    # The interpreter calls Python for every element of an associative scan; one test scans several at once.
    monkeypatch.setattr(state_scan, "BLOCK_S", 1)


def inputs_of(T: int, **options) -> dict[str, Tensor]:
    return make_inputs(T, **({"H": 2, "G": 1, "D": 16, "Dv": 16} | options))


def check(inputs, tolerance=1e-5, dtype=torch.float32, **options) -> None:
    inputs = cast(cast(inputs, dtype), torch.float64)
    expected = run(residual_linear_attention, inputs, impl="torch", **options)
    got = run(residual_linear_attention, cast(inputs, dtype), impl="triton", **options)
    assert got["o"].dtype == dtype
    assert_same(got, expected, tolerance)


@pytest.mark.parametrize("feature_map", ["softmax", "relu", "softmax_single", "identity"])
def test_feature_maps(feature_map):
    check(inputs_of(70, feature_map=feature_map), window=5, feature_map=feature_map)
    extras = {"decay": True, "start": "query", "feature_map": feature_map}
    check(inputs_of(33, **extras), window=0, feature_map=feature_map, document_ids=document_ids([[20, 13], [1, 32]]))


@pytest.mark.parametrize(("T", "window"), itertools.product((1, 17, 70), (None, 0, 5)))
def test_lengths_and_windows(T, window):
    check(inputs_of(T), window=window)


@pytest.mark.parametrize("window", [14, 15, 16, 47, 48, 69, 200])
@pytest.mark.parametrize(("save_every", "documents"), [(0, False), (1, True), (2, False), (4, True)])
def test_chunks_without_keys(window, save_every, documents):
    """Whole chunks in front are too young for a residual key; a window of all tokens leaves one chunk to look at."""
    T = 70
    ids = document_ids(DOCUMENTS[T]) if documents else None
    check(inputs_of(T), window=window, document_ids=ids, save_every=save_every)


@pytest.mark.parametrize(
    ("T", "decay", "start", "documents"),
    [
        (70, True, "", False),
        (70, False, "", True),
        (70, True, "query", True),
        (17, True, "kv", True),
        (17, False, "query", False),
        (17, True, "kv", False),
        (17, False, "kv", True),
    ],
)
def test_options(T, decay, start, documents):
    ids = document_ids(DOCUMENTS[T]) if documents else None
    check(inputs_of(T, decay=decay, start=start), window=5, document_ids=ids)


@pytest.mark.parametrize(("D", "Dv"), [(32, 16), (64, 32), (16, 256), (256, 32)])
def test_widths(D, Dv):
    """Values of (16, 256) and (256, 32) are taken in parts."""
    everything = Dv < 256
    inputs = inputs_of(18, B=1, D=D, Dv=Dv, decay=everything, start="kv" if everything else "")
    check(inputs, window=1, document_ids=document_ids([[7, 11]]) if everything else None, save_every=2)


def test_final_state_in_parts():
    inputs = cast(inputs_of(18, B=1, D=256, Dv=32), torch.float32)

    def state(impl: str) -> Tensor:
        return residual_linear_attention(**inputs, window=1, return_final_state=True, impl=impl)[1].carried_BGFD

    assert_close(state("triton"), state("torch"), 1e-5)


def test_scan_of_several_segments_at_once(monkeypatch):
    monkeypatch.setattr(state_scan, "BLOCK_S", 4)
    inputs = make_inputs(70, B=1, H=1, G=1, D=16, Dv=16, decay=True)
    check(inputs, window=0, feature_map="softmax_single")


def test_strong_decay():
    inputs = inputs_of(40, decay=True)
    with torch.no_grad():
        inputs["decay"] *= 100
        inputs["decay"][:, 7] = -torch.inf
    inputs = cast(inputs, torch.float32)
    expected = run(residual_linear_attention, cast(inputs, torch.float64), impl="torch", window=1)
    assert_same(run(residual_linear_attention, inputs, impl="triton", window=1), expected, 1e-5)


@pytest.mark.parametrize("cuts", [(30,), (3, 10, 41)], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one", "documents"])
def test_a_split_sequence_is_the_unsplit_one(cuts, documents):
    T, window = 70, 5
    ids = document_ids(DOCUMENTS[T]) if documents else None
    inputs = inputs_of(T, decay=True, start="query")

    def split(inputs, impl):
        state, rows = inputs["initial_state"], []
        for a, b in itertools.pairwise((0, *cuts, T)):
            now = {name: inputs[name][:, a:b] for name in ("q", "k", "v", "decay")}
            o, state = residual_linear_attention(
                **now,
                window=window,
                initial_state=state,
                document_ids=None if ids is None else ids[:, a:b],
                return_final_state=True,
                impl=impl,
            )
            rows.append(o)
        # The last state counts, too: its gradient enters at the far end.
        return torch.cat((torch.cat(rows, dim=1).flatten(), state.carried_BGFD.flatten()))

    single = cast(inputs, torch.float32)
    expected = gradients(split(inputs, "torch"), inputs)
    assert_same(gradients(split(single, "triton"), single), expected, 1e-5)
    whole = residual_linear_attention(**single, window=window, document_ids=ids, impl="triton").flatten()
    assert_close(split(single, "triton")[: whole.numel()], whole, 1e-5)


@pytest.mark.parametrize("save_every", [1, 2, 4, 8])
@pytest.mark.parametrize("extras", ["", "documents", "decay", "all"])
def test_kept_states_change_no_gradient(save_every, extras):
    """Nor does what a backward starts from: 57 tokens are 4 chunks, the last of them partial."""
    T, everything = 57, extras == "all"
    ids = document_ids([[1, 16, 40], [30, 27]]) if everything or extras == "documents" else None
    inputs = inputs_of(T, decay=everything or extras == "decay", start="query" if everything else "")
    check(inputs, window=2, document_ids=ids, save_every=save_every)


@pytest.mark.parametrize("save_every", [0, 1, 2, 8])
def test_kept_states_of_a_continued_sequence(save_every):
    inputs = inputs_of(41, decay=True, start="kv")

    def both_ends(impl, inputs):
        """The second call begins at a carried state, and its last state counts, too."""
        rows, state = [], inputs["initial_state"]
        for part in (slice(0, 20), slice(20, 41)):
            now = {name: inputs[name][:, part] for name in ("q", "k", "v", "decay")}
            o, state = residual_linear_attention(
                **now, window=2, initial_state=state, return_final_state=True, impl=impl, save_every=save_every
            )
            rows.append(o.flatten())
        return torch.cat((*rows, state.carried_BGFD.flatten()))

    single = cast(inputs, torch.float32)
    assert_same(gradients(both_ends("triton", single), single), gradients(both_ends("torch", inputs), inputs), 1e-5)


def test_kept_bytes():
    """Beyond the inputs a forward keeps nothing with 0, one state a chunk with 1, and less with more."""
    inputs = cast(inputs_of(16 * 8), torch.float32)
    own = {x.data_ptr() for x in inputs.values()}

    def kept(save_every) -> int:
        sizes = []

        def pack(x: Tensor) -> Tensor:
            if x.data_ptr() not in own:
                sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            residual_linear_attention(**inputs, window=2, impl="triton", save_every=save_every)
        return sum(sizes)

    state = 2 * 4 * 16 * (2 * 16 + 1)  # B, bytes, Dv, features and the sum of the values
    assert [kept(m) for m in (0, 1, 2, 4, 8)] == [0, 8 * state, 5 * state, 3 * state, 2 * state]


def test_strides():
    inputs = cast(inputs_of(33), torch.float32)
    expected = run(residual_linear_attention, cast(inputs, torch.float64), impl="torch", window=2)
    folded = {name: x.detach().permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1) for name, x in inputs.items()}
    folded = {name: x.requires_grad_() for name, x in folded.items()}
    o = residual_linear_attention(**folded, window=2, impl="triton")
    do = output_gradient(o.double()).float().transpose(1, 3).contiguous().transpose(1, 3)
    got = dict(zip(["dq", "dk", "dv"], torch.autograd.grad(o, list(folded.values()), do), strict=True))
    assert_same({"o": o.detach()} | got, expected, 1e-5)


def test_rows_without_keys_are_zero_and_gradients_there_too():
    inputs = cast(inputs_of(20), torch.float32)
    o = residual_linear_attention(**inputs, window=7, impl="triton")
    assert (o[:, :8] == 0).all()
    assert not residual_linear_attention(**inputs, window=20, impl="triton").any()


def test_nan_stays_in_its_document():
    inputs = cast(inputs_of(70), torch.float32)
    with torch.no_grad():
        for name in "kv":
            inputs[name][:, 20:40] = torch.nan
    ids = document_ids([[20, 20, 30]] * 2)
    got = run(residual_linear_attention, inputs, impl="triton", window=2, document_ids=ids)
    assert got["o"][:, :20].isfinite().all()
    assert got["o"][:, 40:].isfinite().all()
    assert got["o"][:, 23:40].isnan().all()


def test_future_nan_leaks_nothing():
    inputs = cast(inputs_of(40), torch.float32)
    before = residual_linear_attention(**inputs, window=3, impl="triton")
    with torch.no_grad():
        inputs["k"][:, 25], inputs["v"][:, 25] = torch.nan, torch.nan
    after = residual_linear_attention(**inputs, window=3, impl="triton")
    assert torch.equal(after[:, :29], before[:, :29])
    assert after[:, 29:].isnan().all()


def test_opcheck():
    inputs = cast(inputs_of(20, decay=True, start="kv"), torch.float32)
    q, k, v, start = (inputs[name] for name in ("q", "k", "v", "initial_state"))
    rows = inputs["decay"].detach().double().transpose(1, 2).requires_grad_()
    ids = document_ids([[9, 11], [1, 19]])
    start_log = rows.detach().cumsum(2).requires_grad_()
    plain = (None,) * 7
    everything = (rows, ids, ids, ids[:, 0].clone(), start.detach() * 0, start, start_log)
    for options, save_every in ((plain, 0), (plain, 1), (everything, 2)):
        torch.library.opcheck(fused_fwd, (q, k, v, *options, 3, "softmax", True, save_every))


def test_opcheck_with_another_reader():
    q, k, v = (x for x in cast(inputs_of(9, B=1), torch.float32).values())
    plain = (None,) * 7
    torch.library.opcheck(torch.ops.scan_kernels.fused_with_inputs.default, (q, k, v, *plain, 3, "softmax", 1))
    with torch.no_grad():
        do, others = torch.ones_like(q), (torch.ones_like(q), None, torch.ones_like(v))
        torch.library.opcheck(fused_bwd, (do, None, q, k, v, *plain, None, None, *others, 3, "softmax", 0))


@pytest.mark.parametrize(
    ("T", "window", "extras"),
    [
        *itertools.product((1, 17, 70), (None, 0, 5), [""]),
        (70, 40, ""),
        *itertools.product((17, 70), (5, 100), ["documents"]),
        (33, 2, "decay"),
        (40, 3, "all"),
    ],
)
def test_gradients_of_another_reader_are_added_by_the_kernels(T, window, extras):
    inputs = inputs_of(
        T, H=4, G=2, decay=extras in ("decay", "all"), start="query" if extras == "all" else "", feature_map="softmax"
    )
    lengths = [[T], random_lengths(T, 1, 25)]
    ids = document_ids(lengths) if extras in ("documents", "all") else None
    shared_inputs.check(inputs, torch.float32, 1e-5, window=window, document_ids=ids)


@pytest.mark.parametrize("used", ["", "q", "v", "kv"])
def test_some_of_the_inputs_have_another_reader(used):
    shared_inputs.check(inputs_of(33), torch.float32, 1e-5, used=used, window=2)


def test_values_in_parts_have_another_reader():
    shared_inputs.check(inputs_of(18, B=1, D=16, Dv=256), torch.float32, 1e-5, window=1)


def test_another_reader_alone():
    inputs = cast(inputs_of(20), torch.float32)
    _, *others = residual_linear_attention_and_inputs(**inputs, window=2, impl="triton")
    grads = torch.autograd.grad(sum(x.square().sum() for x in others), list(inputs.values()))
    assert all(torch.equal(grad, 2 * x) for grad, x in zip(grads, inputs.values(), strict=True))


def test_gradients_of_any_strides_are_added():
    inputs = cast(inputs_of(33), torch.float32)

    def solve(entry) -> list[Tensor]:
        o, q, k, v = entry(**inputs, window=2, impl="triton")
        # One gradient is expanded (strides of 0), one has the heads before the tokens.
        other = q.sum() + (k.transpose(1, 2) * torch.randn(2, 1, 33, 16, generator=torch.manual_seed(0))).sum()
        return list(torch.autograd.grad(o.square().sum() + other + v.sum(), list(inputs.values())))

    got, expected = solve(residual_linear_attention_and_inputs), solve(shared_inputs.apart)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_shared_inputs_compile_to_one_graph():
    inputs = cast(inputs_of(40, decay=True, start="query"), torch.float32)
    options = {"window": 5, "document_ids": document_ids([[30, 10], [39, 1]]), "impl": "triton", "save_every": 2}
    expected = shared_inputs.solve(shared_inputs.apart, inputs, **options)
    for entry, additions in ((residual_linear_attention_and_inputs, 0), (shared_inputs.apart, 3)):
        found, got = shared_inputs.additions_in_the_backward(entry, inputs, **options)
        assert_same(got, expected, 1e-6)
        assert found == additions


def test_compile_fullgraph():
    inputs = cast(inputs_of(40, decay=True, start="query"), torch.float32)
    options = {"window": 5, "document_ids": document_ids([[30, 10], [39, 1]]), "impl": "triton", "save_every": 2}
    compiled = torch.compile(residual_linear_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(run(compiled, inputs, **options), run(residual_linear_attention, inputs, **options), 1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"D": 24}, "takes head sizes 16, 32, 64, 128 and 256, got 24"),
        ({"Dv": 8}, "got 16 and 8 .values.; impl=.torch."),
    ],
)
def test_refusals(changes, message):
    inputs = cast(make_inputs(5, **({"D": 16, "Dv": 16} | changes)), torch.float32)
    with pytest.raises(ValueError, match=message):
        residual_linear_attention(**inputs, window=1, impl="triton")


def test_float64_is_refused():
    with pytest.raises(ValueError, match=r"takes bfloat16, float16 or float32, got torch.float64; impl=.torch."):
        residual_linear_attention(**inputs_of(5), window=1, impl="triton")


@pytest.mark.parametrize("shape", branch_sum_cases.SHAPES.values(), ids=branch_sum_cases.SHAPES)
def test_branch_sum(shape, monkeypatch):
    monkeypatch.setattr(branch_sum_kernels, "BACKWARD_PROGRAMS", 7)  # so that programs walk over several rows
    x = branch_sum_cases.make(shape, torch.float32)
    got = branch_sum_cases.solve(partial(sum_of_head_norms, eps=branch_sum_cases.EPS, impl="triton"), x)
    for name, value in branch_sum_cases.expected(x).items():
        assert_close(got[name], value, 1e-5)


def test_branch_sum_opcheck():
    x = branch_sum_cases.make((2, 3, 3, 16), torch.float32)
    tensors = [x[name].transpose(0, 1) for name in "ab"] + [x[f"weight_{name}"] for name in "ab"]
    torch.library.opcheck(branch_sum_fwd, (*(tensor.detach().requires_grad_() for tensor in tensors), 1e-8))


@pytest.mark.parametrize("feature_map", ["softmax", "identity"])
@pytest.mark.parametrize("extras", ["", "norm", "strong", "all"])
def test_gradient_of_a_decay_in_bf16(feature_map, extras, monkeypatch):
    """By token, and times the decay over all tokens, which is what a gate's rate gets.

    norm: do is orthogonal to o, as behind a norm, so that all that a query reads cancels. all: documents, a start
    state, and a final state that counts, too.
    """
    interpreted_bf16.correct(monkeypatch)
    T, options = 130, {"window": 5, "feature_map": feature_map, "save_every": {"": 0, "norm": 1}.get(extras, 2)}
    exact = inputs_of(T, B=1, G=2, decay=True, start="kv" if extras == "all" else "", feature_map=feature_map)
    rounded = {name: x.detach().to(torch.bfloat16 if name in "qkv" else torch.float32) for name, x in exact.items()}
    if extras == "strong":
        rounded["decay"] *= 20
    if extras == "all":
        options["document_ids"] = document_ids([[1, 40, 30, 59]])
    leaves = {name: x.double().requires_grad_() for name, x in rounded.items()}

    def results(inputs, impl) -> tuple[Tensor, ...]:
        if extras != "all":
            return (residual_linear_attention(**inputs, **options, impl=impl),)
        o, state = residual_linear_attention(**inputs, **options, return_final_state=True, impl=impl)
        return o, state.carried_BGFD

    found = results(leaves, "torch")
    ends = [output_gradient(x.detach()).bfloat16().double() for x in found]
    if extras == "norm":
        o = found[0].detach()
        ends[0] -= (ends[0] * o).sum(-1, keepdim=True) / (o * o).sum(-1, keepdim=True).clamp(min=1e-30) * o
        ends[0] = ends[0].bfloat16().double()
    (expected,) = torch.autograd.grad(found, leaves["decay"], ends)
    leaves = {name: x.requires_grad_() for name, x in rounded.items()}
    found = results(leaves, "triton")
    ends = [end.to(x.dtype) for end, x in zip(ends, found, strict=True)]
    (got,) = torch.autograd.grad(found, leaves["decay"], ends)
    assert_close(got, expected, 1e-2, "each token's")
    decay = rounded["decay"].detach().double()
    assert_close((got * decay).sum((0, 1)), (expected * decay).sum((0, 1)), 2e-2, "their sum")


@pytest.mark.parametrize("save_every", [1, 2])
def test_a_second_backward_finds_the_kept_states(save_every):
    """The gradients of states are written over those that a backward made itself, not over the forward's."""
    inputs = cast(inputs_of(40, B=1, decay=True), torch.float32)
    o = residual_linear_attention(**inputs, window=2, impl="triton", save_every=save_every)
    first, second = (
        torch.autograd.grad(o, list(inputs.values()), torch.ones_like(o), retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
