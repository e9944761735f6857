"""Documents on the Hopper stages without a GPU: any lengths, resumed sequences, and what a mask keeps out."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from scan_kernels import ResidualState, fused, residual_linear_attention
from scan_kernels.feature_maps import FeatureMap
from scan_kernels.fused_ops import _op_inputs
from scan_kernels.kernels.configs import HOPPER
from scan_kernels.kernels.launch import Launch
from scan_kernels.state import begin
from tests.scan_kernels.cases import assert_close, cast, document_ids, make_inputs, random_lengths
from tests.scan_kernels.gluon_on_cpu import Machine


@pytest.fixture(scope="module")
def machine():
    return Machine()


def stages(
    machine: Machine,
    inputs: dict[str, Tensor],
    ids: Tensor,
    window: int | None,
    state: ResidualState | None = None,
    segment: int = 2,
    run: Callable[[Launch], None] | None = None,
) -> dict[str, Tensor]:
    """o and the gradients of the new tokens, for do = 1 in every second row."""
    problem = begin(
        **{
            f"{name}_{letters}": inputs[name].detach()
            for name, letters in (("q", "BTHD"), ("k", "BTGD"), ("v", "BTGD"))
        },
        window=window,
        feature_map=FeatureMap.SOFTMAX,
        decay_BTG=None,
        document_BT=ids,
        initial_state=state,
    )
    given, *_ = _op_inputs(problem, with_final=False)
    sizes, x, init, plan = fused.prepare(given, problem.lag, "softmax", plan=replace(HOPPER, segment=segment))
    sizes = replace(sizes, empty=0)  # chunks without keys, of which Triton's kernels write the rows
    run = run or machine.run
    o, *_ = fused.forward(sizes, x, init, plan, with_final=False, run=run)
    found = fused.backward(sizes, x, init, some_rows(o), None, plan, with_init_grad=False, run=run)
    pending = problem.k_BMGD.shape[1] - o.shape[1]
    return {"o": o, "dq": found.dq, "dk": found.dk[:, pending:], "dv": found.dv[:, pending:]}


def some_rows(o: Tensor) -> Tensor:
    do = torch.zeros_like(o)
    do[:, ::2] = 1.0
    do[:, 1::2] = -0.5
    return do * torch.linspace(-1, 1, o.shape[-1]).to(o.dtype)


def exact(inputs: dict[str, Tensor], ids: Tensor, window: int | None, state=None) -> dict[str, Tensor]:
    double = cast(inputs, torch.float64)
    o = residual_linear_attention(**double, window=window, document_ids=ids, initial_state=state, impl="torch")
    grads = torch.autograd.grad(o, list(double.values()), some_rows(o), allow_unused=True, materialize_grads=True)
    return {"o": o.detach()} | dict(zip(("dq", "dk", "dv"), grads, strict=True))


# Documents shorter than the window and longer than a chunk of 64 rows; keys of the row before, of an older chunk.
@pytest.mark.parametrize(("window", "longest", "H"), [(20, 90, 2), (0, 9, 4), (63, 300, 1), (100, 150, 2)])
def test_any_lengths(machine, window, longest, H):
    inputs = cast(make_inputs(230, B=2, H=H, G=1, D=64, Dv=64), torch.bfloat16)
    ids = document_ids([random_lengths(230, 1, longest), random_lengths(230, 2, longest)])
    expected = exact(inputs, ids, window)
    for name, x in stages(machine, inputs, ids, window).items():
        assert_close(x, expected[name], 1e-2, name)


@pytest.mark.parametrize("before", [5, 70, 130])
@pytest.mark.parametrize("longest", [12, 200])
def test_resumed(machine, before, longest):
    """The carried state, pending keys of other documents, or rows in front of all keys."""
    inputs = cast(make_inputs(before + 150, B=1, H=2, G=1, D=64, Dv=64), torch.bfloat16)
    ids = document_ids([random_lengths(before + 150, 3, longest)])
    first, rest = (
        {name: x.detach()[:, part] for name, x in inputs.items()} for part in (slice(before), slice(before, None))
    )
    states = [
        residual_linear_attention(
            **cast(first, dtype), window=20, document_ids=ids[:, :before], impl="torch", return_final_state=True
        )[1].detach()
        for dtype in (torch.float64, torch.bfloat16)
    ]
    rest = {name: x.requires_grad_() for name, x in rest.items()}
    expected = exact(rest, ids[:, before:], 20, states[0])
    for name, x in stages(machine, rest, ids[:, before:], 20, states[1]).items():
        assert_close(x, expected[name], 1e-2, name)


def test_nothing_of_another_document_passes(machine):
    """A document whose keys and values are not finite, states in front of and behind other documents included."""
    inputs = cast(make_inputs(300, B=1, H=2, G=1, D=64, Dv=64), torch.bfloat16)
    ids = document_ids([[70, 100, 130]])
    # One segment: the scan over several is not the kernel's here.
    before = stages(machine, inputs, ids, 20, segment=5)
    for name in "kv":
        inputs[name].data[:, 70:170] = torch.nan
    after = stages(machine, inputs, ids, 20, segment=5)
    others = ids[0] != ids[0, 70]
    for name, x in after.items():
        assert torch.equal(x[:, others], before[name][:, others]), name


def chunks_with_readers(ids: Tensor, lag: int, chunk: int = 64) -> list[bool]:
    """Whether a query of each chunk, or a later one, reads a key that is not younger than the chunk's."""
    T = len(ids)
    found = []
    for first in range(0, T, chunk):
        youngest = max(min(first + chunk, T) - 1 - lag, 0)
        found.append(bool((ids[first:, None] == ids[None, : youngest + 1]).any()))
    return found


@pytest.mark.parametrize("lengths", [[90, 60, 330, 20, 100], [600], [50] * 12, [70, 400, 130]])
@pytest.mark.parametrize("segment", [1, 3, 10])
def test_chunks_that_no_query_reads_are_left_out(machine, lengths, segment):
    """Their states are not written, and nobody misses them."""
    window = 100
    inputs = cast(make_inputs(600, B=1, H=2, G=1, D=64, Dv=64), torch.bfloat16)
    ids = document_ids([lengths])
    launched: list[Launch] = []

    def run(launch: Launch) -> None:
        if launch.kernel.fn.__name__ == "hopper_state_kernel":
            launched.append(launch)
            for name in ("states", "value_sums", "factors", "logs"):
                if launch.args[name] is not None:
                    launch.args[name].fill_(torch.nan)
        machine.run(launch)

    expected = exact(inputs, ids, window)
    for name, x in stages(machine, inputs, ids, window, segment=segment, run=run).items():
        assert_close(x, expected[name], 1e-2, name)
    visited = chunks_with_readers(ids[0], window + 1)
    cut = launched[0].args["SEGMENT"]
    for first in range(0, len(visited), cut):
        # A segment without any visits its first.
        visited[first] |= not any(visited[first : first + cut])
    for launch in launched:
        if launch.args["states"] is not None:
            assert [not x.isnan().any() for x in launch.args["states"][0]] == visited


def test_more_chunks_than_bits(machine, monkeypatch):
    """A segment of too many chunks visits all of them."""
    monkeypatch.setattr("scan_kernels.kernels.hopper_state.MOST_CHUNKS", SimpleNamespace(value=3))
    inputs = cast(make_inputs(400, B=1, H=2, G=1, D=64, Dv=64), torch.bfloat16)
    ids = document_ids([[50, 70, 160, 30, 90]])
    launched: list[Launch] = []

    def run(launch: Launch) -> None:
        launched.append(launch)
        machine.run(launch)

    expected = exact(inputs, ids, 100)
    for name, x in stages(machine, inputs, ids, 100, segment=4, run=run).items():
        assert_close(x, expected[name], 1e-2, name)
    assert not any(launch.args.get("SOME") for launch in launched)
