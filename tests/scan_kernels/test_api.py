"""Options, refusals, the choice of an implementation, autocast and torch.compile."""

import ast
import logging
import sys
from pathlib import Path

import pytest
import torch

import scan_kernels
from scan_kernels import api, check_values, residual_linear_attention
from tests.scan_kernels.cases import assert_close, assert_same, cast, document_ids, gradients, make_inputs, run

B, T, H, G, D, Dv = 2, 9, 4, 2, 8, 6
ids = torch.zeros(B, T, dtype=torch.int64)


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Recompilations are counted per function, over all tests of a process."""
    torch._dynamo.reset()


def state_of(**options):
    inputs = make_inputs(T)
    options = {"window": 3} | options
    return residual_linear_attention(**inputs, return_final_state=True, **options)[1]


REFUSALS = {
    "window negative": ({"window": -1}, "window must be an int >= 0 .* or None, got -1"),
    "window bool": ({"window": True}, "window must be an int"),
    "window float": ({"window": 4.0}, "window must be an int"),
    "feature map": ({"feature_map": "elu"}, "one of softmax, relu, softmax_single, identity, got 'elu'"),
    "impl": ({"impl": "cuda"}, "impl must be one of auto, reference, torch, triton, got 'cuda'"),
    "save_every negative": ({"save_every": -1}, "save_every must be an int >= 0 .* or None, got -1"),
    "save_every bool": ({"save_every": True}, "save_every must be an int >= 0 .* got True"),
    "rank": ({"q": torch.zeros(B, T, D)}, r"q must be \(batch, tokens, heads, width\), got shape \(2, 9, 8\)"),
    "integers": ({"v": torch.zeros(B, T, G, Dv, dtype=torch.int64)}, "v must be float32, .* got torch.int64"),
    "mixed dtypes": ({"v": torch.zeros(B, T, G, Dv, dtype=torch.float32)}, "must share a dtype"),
    "key width": ({"k": torch.zeros(B, T, G, D + 1, dtype=torch.float64)}, "k must match q"),
    "key length": ({"k": torch.zeros(B, T + 1, G, D, dtype=torch.float64)}, "k must match q"),
    "value heads": ({"v": torch.zeros(B, T, 1, Dv, dtype=torch.float64)}, "v must match k"),
    "heads": ({"q": torch.zeros(B, T, 3, D, dtype=torch.float64)}, "multiple of KV heads, got 3 and 2"),
    "empty": ({name: torch.zeros(B, 0, 2, D, dtype=torch.float64) for name in "qkv"}, "empty"),
    "device": ({"v": torch.zeros(B, T, G, Dv, dtype=torch.float64, device="meta")}, "v is on meta but q is on cpu"),
    "decay shape": ({"decay": torch.zeros(B, T, H)}, r"decay must be .* = \(2, 9, 2\), got \(2, 9, 4\)"),
    "decay dtype": ({"decay": torch.zeros(B, T, G, dtype=torch.int64)}, "decay must be floating point"),
    "decay positive": ({"decay": torch.ones(B, T, G)}, "must be <= 0 everywhere, got a maximum of 1.0"),
    "decay nan": ({"decay": torch.full((B, T, G), torch.nan)}, "must be <= 0 everywhere"),
    "documents shape": ({"document_ids": ids[0]}, r"document_ids must be .* = \(2, 9\), got \(9,\)"),
    "documents dtype": ({"document_ids": ids.float()}, "document_ids must be integers, got torch.float32"),
    "documents fall": ({"document_ids": torch.arange(9).flip(0).expand(2, 9)}, "must not fall along T"),
    "start shape": ({"initial_state": torch.zeros(G, 16, Dv)}, r"\(2, 2, 16, 6\) or \(2, 4, 16, 6\), got \(2, 16, 6\)"),
    "start type": ({"initial_state": 0}, "must be a Tensor, a ResidualState or None, got int"),
    "state window": ({"initial_state": state_of(), "window": 4}, "made with window=3, this call has window=4"),
    "state map": ({"initial_state": state_of(feature_map="relu")}, "made with feature_map='relu', not 'softmax'"),
    "state batch": ({"initial_state": state_of()._replace(carried_BGFD=torch.zeros(1))}, "the state does not fit"),
    "state documents": ({"initial_state": state_of(document_ids=ids)}, "made with document_ids: pass"),
    "state no documents": ({"initial_state": state_of(), "document_ids": ids}, "made without document_ids: pass"),
    "state decay": ({"initial_state": state_of(decay=torch.zeros(B, T, G))}, "made with decay: pass"),
    "state behind": (
        {"initial_state": state_of(document_ids=ids + 1), "document_ids": ids},
        "must not fall behind the document that the state ends in",
    ),
}


@pytest.mark.parametrize(("changes", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        residual_linear_attention(**({**make_inputs(T), "window": 3} | changes))


def test_triton_needs_a_cuda_device():
    with pytest.raises(ValueError, match='impl="triton" needs a CUDA device, the tensors are on cpu; impl="torch"'):
        residual_linear_attention(**make_inputs(T), window=3, impl="triton")


def test_check_values():
    check_values(document_ids=ids, decay=torch.zeros(B, T, G))
    with pytest.raises(ValueError, match="must not fall"):
        check_values(document_ids=torch.tensor([[1, 0]]))


def test_values_of_other_devices_are_not_read():
    # A read of a meta tensor raises, as a read of a CUDA tensor would wait.
    inputs = {name: x.to("meta") for name, x in make_inputs(T, decay=True).items()}
    o = residual_linear_attention(**inputs, window=3, document_ids=ids.to("meta"))
    assert o.shape == (B, T, H, Dv)


def test_auto_says_once_what_it_chose(caplog, monkeypatch):
    monkeypatch.setattr(api, "_announced", set())
    with caplog.at_level(logging.INFO, logger="scan_kernels"):
        for _ in range(3):
            residual_linear_attention(**make_inputs(T), window=3)
        residual_linear_attention(**make_inputs(T), window=3, impl="torch")
    assert [record.getMessage() for record in caplog.records] == [
        "residual_linear_attention: impl=\"auto\" uses 'torch' on cpu"
    ]


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(impl, dtype):
    inputs = cast(make_inputs(T), dtype)
    o, state = residual_linear_attention(**inputs, window=3, impl=impl, return_final_state=True)
    assert o.dtype == dtype
    assert state.carried_BGFD.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_autocast_changes_nothing(impl):
    inputs = cast(make_inputs(100, start="kv", decay=True), torch.float32)
    plain = run(residual_linear_attention, inputs, window=3, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        o = residual_linear_attention(**inputs, window=3, impl=impl)
    assert_same(gradients(o, inputs), plain, 0.0)


def test_compile_fullgraph():
    inputs = cast(make_inputs(100, decay=True, start="query"), torch.float32)
    options = {"window": 5, "document_ids": document_ids([[30, 70], [99, 1]])}
    compiled = torch.compile(residual_linear_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    assert_same(run(compiled, inputs, **options), run(residual_linear_attention, inputs, **options), 1e-6)


def test_compile_fullgraph_with_inductor():
    inputs = cast(make_inputs(100), torch.float32)
    compiled = torch.compile(residual_linear_attention, fullgraph=True, dynamic=False)
    assert_close(compiled(**inputs, window=5), residual_linear_attention(**inputs, window=5), 1e-6)


def test_compiled_steps_carry_the_state():
    inputs = {name: x.detach().float() for name, x in make_inputs(7, decay=True, start="query").items()}
    start = inputs.pop("initial_state")
    whole = residual_linear_attention(**inputs, window=1, initial_state=start)
    step = torch.compile(residual_linear_attention, fullgraph=True, backend="eager")
    state, rows = start, []
    for t in range(7):
        now = {name: x[:, t : t + 1] for name, x in inputs.items()}
        o, state = step(**now, window=1, initial_state=state, return_final_state=True)
        rows.append(o)
    assert_close(torch.cat(rows, dim=1), whole, 1e-6)


def test_imports_nothing_but_torch_and_triton():
    for file in Path(scan_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                root = name.split(".")[0]
                assert root in {"torch", "triton", "scan_kernels"} or root in sys.stdlib_module_names, (file, name)
