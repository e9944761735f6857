"""The benchmarks without a GPU: options, order, gate, tables. What they time, and how fast it is, needs one."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks import contenders, gate, layers, report, run, timing
from benchmarks.contenders import Contender, Prepared, Shape, Unavailable, attention_inputs
from benchmarks.report import Row
from benchmarks.timing import CudaMeter, Memory, Sample
from scan_kernels import residual_linear_attention, residual_linear_attention_quadratic
from tests.closeness import relative_error
from tests.flexrattn.flash_stand_in import install

CPU = torch.device("cpu")
WINDOW = 20
SHAPE = Shape(B=2, T=64, H=4, G=2, D=16, window=WINDOW, dtype=torch.bfloat16, layers=2)
linear_inputs = partial(attention_inputs, v_mean=0.3)


@pytest.fixture(autouse=True)
def _short_gate(monkeypatch):
    monkeypatch.setattr(gate, "GATE_TOKENS", 101)
    monkeypatch.setattr(gate, "BEHIND_WINDOW", 61)


def contender(name: str, forward: Callable[..., Tensor], *, window: int | None = WINDOW, **options) -> Contender:
    """A linear branch that computes `forward`, by law the one of `WINDOW`."""

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        return Prepared(forward=forward, reference=contenders.linear_reference(WINDOW))

    return Contender(name=name, prepare=prepare, window=window, **options)


def scan(q: Tensor, k: Tensor, v: Tensor, *, window: int = WINDOW) -> Tensor:
    return residual_linear_attention(q, k, v, window=window, impl="torch")


right = partial(contender, forward=scan)


class FakeMeter:
    """Calls and clock of no device: the n-th call takes n ms."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def time(self, name: str, call: Callable[[], object]) -> Sample:
        call()
        self.order.append(name)
        return Sample(gpu_ms=float(len(self.order)), host_ms=0.5)

    def memory(self, prepared: Prepared, inputs: Sequence[Tensor], do: Tensor) -> Memory:
        return Memory(peak=3_000_000, kept=1_000_000)


def timed(*given: Contender, rounds: int = 3, shapes: Sequence[Shape] = (SHAPE,)) -> tuple[dict[str, Row], bool, list]:
    """Rows by contender (of the last length), whether something failed, and the order of timed calls."""
    meter = FakeMeter()
    plan = run.Plan(
        command="rla",
        contenders=given,
        shapes=shapes,
        inputs_of=linear_inputs,
        rounds=rounds,
        seed=0,
        dtype="bf16",
    )
    rows, failed = list(run.benchmark(plan, meter, CPU))[-1]
    return {row.contender: row for row in rows}, failed, meter.order


# Options


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "command"),
        ("rlaa", "invalid choice: 'rlaa'"),
        ("rla --lengths 5000", "each length must divide --tokens 32768, got 5000"),
        ("rla --lengths 4096 0", "a length must be 1 or more, got 0"),
        ("rla --window -1", "a window must be 0 or more"),
        ("swa --windows 128 -1", "a window must be 0 or more"),
        ("rla --window 4096", "got 4096 with length 4096"),
        ("rattention --heads 6 4", "got --heads 6 4"),
        ("rattention --heads 4 0", "KV heads must be 1 or more, got 0"),
        ("rla --width 127", "--width must be even, got 127"),
        ("rla --dtype int8", "invalid choice: 'int8'"),
        ("rla --repeats 2", "--repeats must be 3 or more"),
        ("rla --plot out.pdf", "--plot must end in .png"),
        ("rla --csv .", "is a folder"),
        ("train_step --flavor 4b", "got '4b'"),
        ("train_step --heads 16 4", "unrecognized arguments: --heads"),
        ("swa --window 512x", "invalid"),
        ("rattention --only cuDNN core", "--only must be among cuDNN full, FA2 full, Flex full, rattention core, "),
        ("rla --save-every 4 -1", "--save-every must be 0 (none) or more (chunks), got -1"),
        ("rattention --packed 0", "--packed must be 1 or more (tokens of a document), got 0"),
    ],
)
def test_bad_options_are_one_line(arguments, said, capsys):
    assert run.main(arguments.split()) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert said in told.err


@pytest.mark.parametrize("command", ["rla", "swa", "rattention", "train_step"])
def test_no_gpu_is_one_line(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([command]) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "CUDA" in told.err


@pytest.mark.parametrize(
    ("only", "taken"),
    [
        ("cuDNN", ["cuDNN full"]),
        ("rattention_core", ["rattention core"]),
        (
            "rattention_core_d cuDNN_full",
            ["cuDNN full", "rattention core documents", "rattention core documents flash"],
        ),
    ],
)
def test_only_some_of_the_contenders(only, taken):
    """In the table's order; a whole name does not stand for those that begin with it."""
    names = [name.replace("_", " ") for name in only.split()]
    plan = run.make_plan(run.make_parser().parse_args(["rattention", "--only", *names]))
    assert [each.name for each in plan.contenders] == taken


@pytest.mark.parametrize("command", ["rla", "swa", "rattention", "train_step"])
def test_plans_hold_the_tokens(command):
    plan = run.make_plan(run.make_parser().parse_args([command, "--lengths", "8192", "4096", "8192"]))
    assert [(shape.T, shape.B) for shape in plan.shapes] == [(8192, 4), (4096, 8)]
    names = [each.name for each in plan.contenders]
    assert len(set(names)) == len(names)
    assert "cuDNN full" in names[0]
    assert plan.contenders[0].baseline
    assert plan.contenders[0].op == contenders.CUDNN_OP
    assert any(each.ours for each in plan.contenders)
    tensors = plan.inputs_of(replace(plan.shapes[0], B=1, T=8), CPU, 0)
    assert all(x.dtype == torch.bfloat16 for x in tensors.values())


def test_kept_states_are_contenders(monkeypatch):
    plan = run.make_plan(run.make_parser().parse_args(["rla", "--save-every", "0", "4", "4"]))
    given = []
    monkeypatch.setattr(contenders, "residual_linear_attention", lambda *x, **options: given.append(options))
    for each in plan.contenders:
        if " m=" in each.name:
            each.prepare(SHAPE, CPU).forward(*[torch.empty(0)] * 3)
    assert [options["save_every"] for options in given] == [0, 4]


def test_rows_packed_with_documents():
    """Every document begins at 0; a row's first has residual keys, the others are as long as asked for."""
    shape = replace(SHAPE, B=4, T=20_000)
    positions = contenders.packed_positions(shape, 50, CPU)
    assert positions.shape == (4, 20_000)
    for row in positions:
        begins = (row == 0).nonzero()[:, 0]
        lengths = begins.diff()
        assert begins[0] == 0
        assert lengths[0] == WINDOW + 65
        assert 1 <= lengths[1:].min() < lengths[1:].max() <= 99
        assert 45 < lengths[1:].double().mean() < 55
        begin_of_each = begins[torch.bucketize(torch.arange(len(row)), begins, right=True) - 1]
        assert torch.equal(row, torch.arange(len(row)) - begin_of_each)
    assert torch.equal(positions, contenders.packed_positions(shape, 50, CPU))


@pytest.mark.parametrize("name", ["rla", "core"])
def test_packed_contenders_compute_their_law(name):
    """By documents, which the law of one document a row is not."""
    each = (
        contenders.scan_contender("rla", WINDOW, impl="torch", packed=30)
        if name == "rla"
        else layers.core_contender("core", WINDOW, documents=True, packed=30)
    )
    shape = replace(SHAPE, dtype=torch.float32)
    assert gate.verify(each, shape, linear_inputs, CPU, 0).passed
    whole = contenders.linear_reference(WINDOW) if name == "rla" else layers._core_reference(WINDOW, None)

    def wrong(shape: Shape, device: torch.device) -> Prepared:
        return replace(each.prepare(shape, device), reference=whole)

    assert not gate.verify(replace(each, prepare=wrong), shape, linear_inputs, CPU, 0).passed


def test_packed_rows_are_contenders():
    plan = run.make_plan(run.make_parser().parse_args(["rattention", "--packed", "1000"]))
    names = [each.name for each in plan.contenders if "packed" in each.name]
    assert names == ["Flex full packed", "rattention core packed", "rattention core packed flash"]
    assert not any(each.baseline for each in plan.contenders if "packed" in each.name)
    assert "packed" not in str(run.make_plan(run.make_parser().parse_args(["rla"])).contenders)


def test_the_command_from_end_to_end(tmp_path, capsys, monkeypatch):
    """On a CPU in the place of a GPU: what needs one is reported, what does not is timed, and files are written."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(run, "find_device", lambda: CPU)
    monkeypatch.setattr(run, "CudaMeter", FakeMeter)
    paths = [tmp_path / "rows.csv", tmp_path / "rows.png"]
    files = f"--csv {paths[0]} --plot {paths[1]}"
    sizes = f"--tokens 128 --lengths 64 128 --window {WINDOW} --heads 4 2 --width 16 --repeats 3"
    assert run.main(f"rla --with-torch-scan {sizes} {files}".split()) == 1
    with paths[0].open() as file:
        notes = {(row["contender"], row["T"]): (row["note"], row["fwd_ms"]) for row in csv.DictReader(file)}
    for T in ("64", "128"):
        assert notes["fla composition", T] == ("unavailable: flash-linear-attention needs a GPU", "")
        assert notes["rla triton", T][0].startswith('FAILED: ValueError: impl="triton" needs a CUDA device')
        assert notes["cuDNN full", T][1] == ""
        assert notes["rla torch", T][0] == ""
        assert float(notes["rla torch", T][1]) > 0
    assert capsys.readouterr().out.startswith("rla: CPU, torch ")
    assert paths[1].exists()


# Order and clock


def test_each_round_times_every_call_once():
    meter = FakeMeter()
    names = list("abcdef")
    calls: dict[str, Callable[[], object]] = dict.fromkeys(names, lambda: None)
    done = timing.interleave(calls, meter, rounds=4, rng=random.Random(0))
    rounds = [meter.order[i : i + 6] for i in range(0, 24, 6)]
    assert all(sorted(each) == names for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1
    assert {name: [sample.gpu_ms for sample in done.samples[name]] for name in names} == {
        name: [6 * i + each.index(name) + 1 for i, each in enumerate(rounds)] for name in names
    }


def test_a_call_that_raises_is_dropped():
    meter = FakeMeter()
    done = timing.interleave({"bad": lambda: 1 // 0, "good": int}, meter, rounds=3, rng=random.Random(0))
    assert meter.order == ["good"] * 3
    assert done.failures == {"bad": "ZeroDivisionError: integer division or modulo by zero"}


def test_summary():
    samples = [Sample(gpu_ms=ms, host_ms=10 * ms) for ms in (5.0, 1.0, 2.0, 100.0, 3.0, 4.0)]
    assert timing.summarize(samples) == timing.Timing(ms=3.5, p20=2.0, p80=5.0, host_ms=35.0, gaps=False)
    gaps = [replace(sample, gaps=i < 4) for i, sample in enumerate(samples)]
    assert timing.summarize(gaps).gaps


class Slow(CudaMeter):
    """A host that needs `host_ms` to launch, without a device."""

    def __init__(self, host_ms: float) -> None:
        self._spin_ms: dict[str, float] = {}
        self.host_ms = host_ms
        self.spins: list[float] = []

    def _once(self, call: Callable[[], object], spin_ms: float) -> Sample:
        self.spins.append(spin_ms)
        return Sample(gpu_ms=1.0, host_ms=self.host_ms, gaps=spin_ms < self.host_ms)


def test_the_spin_outlasts_the_launches():
    meter = Slow(host_ms=5.0)
    assert not meter.time("a", int).gaps
    assert meter.spins == [1, 2, 4, 8]
    assert not meter.time("a", int).gaps
    assert meter.spins[4:] == [8]
    hopeless = Slow(host_ms=1e9)
    assert hopeless.time("a", int).gaps
    assert hopeless.spins[-1] == timing.LONGEST_SPIN_MS


def test_nothing_accumulates():
    tensors = attention_inputs(SHAPE, CPU, 0)
    do = tensors.pop("do")
    inputs = tuple(tensors.values())
    call = timing.forward_backward(right("a").prepare(SHAPE, CPU), inputs, do)
    first, second = call(), call()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(x.grad is None for x in inputs)


# Gate


RIGHT = [
    pytest.param(contenders.sdpa_contender("sdpa", SDPBackend.MATH, ""), attention_inputs, id="sdpa"),
    pytest.param(contenders.scan_contender("scan", WINDOW, impl="torch"), linear_inputs, id="scan"),
    pytest.param(layers.window_contender("window", WINDOW), attention_inputs, id="window"),
    pytest.param(layers.core_contender("core", WINDOW, documents=False), attention_inputs, id="core"),
    pytest.param(layers.core_contender("core", WINDOW, documents=True), attention_inputs, id="core-documents"),
    pytest.param(
        layers.stack_contender("rattention", "debug", window=WINDOW),
        partial(layers.block_inputs, dim=128),
        id="block-rattention",
    ),
    pytest.param(
        layers.stack_contender("full", "debug", inner=layers.CausalSdpa(SDPBackend.MATH)),
        partial(layers.block_inputs, dim=128),
        id="block-full",
    ),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("given", "inputs_of"), RIGHT)
def test_the_gate_passes_what_is_right(given, inputs_of, dtype):
    verdict = gate.verify(given, replace(SHAPE, dtype=dtype), inputs_of, CPU, 0)
    assert verdict.passed, verdict.errors
    assert verdict.describe() == ""


@pytest.mark.parametrize("core", [False, True], ids=["window", "core"])
def test_flash_contenders_take_the_own_window(core, monkeypatch):
    """What `softmax_backend: flash` does of rows of one document; the kernels are replaced. Off by one is seen."""
    kernels = install(monkeypatch)
    monkeypatch.setattr(layers, "_check_backend", lambda *_: None)
    made = {
        True: partial(layers.core_contender, "core flash", WINDOW, documents=False),
        False: partial(layers.window_contender, "flash window", WINDOW),
    }[core]
    shape = replace(SHAPE, D=32)
    verdict = gate.verify(made(backend="flash"), shape, attention_inputs, CPU, 0)
    assert verdict.passed, verdict.errors
    assert kernels.calls == [("fwd", WINDOW), ("bwd", WINDOW)]
    kernels.shift = 1
    assert not gate.verify(made(backend="flash"), shape, attention_inputs, CPU, 0).passed
    # The other way goes to FlexAttention, which refuses this device.
    with pytest.raises(ValueError, match="needs a Hopper or newer GPU"):
        gate.verify(made(backend="flash", own_window=False), shape, attention_inputs, CPU, 0)


def zero_gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scan(q, k.detach(), v) + 0 * k.sum()


WRONG = [
    pytest.param(partial(scan, window=WINDOW - 1), "o behind the window", id="shift-too-small"),
    pytest.param(partial(scan, window=WINDOW + 1), "o behind the window", id="shift-too-large"),
    pytest.param(lambda q, k, v: scan(q, k, 1.03 * v), None, id="scaled"),
    pytest.param(zero_gradient, "dk", id="no-gradient-of-k"),
    pytest.param(lambda q, k, v: scan(q, k, v) * float("nan"), None, id="nan"),
]


@pytest.mark.parametrize(("forward", "worst"), WRONG)
@pytest.mark.parametrize("slack", [1.0, 2.0])
def test_what_is_wrong_is_reported_and_not_timed(forward, worst, slack):
    rows, failed, order = timed(right("base", baseline=True), contender("wrong", forward, slack=slack))
    assert failed
    assert rows["wrong"].note.startswith("WRONG")
    assert rows["wrong"].error >= rows["wrong"].tolerance == slack * 1e-2
    assert rows["wrong"].fwd_ms is rows["wrong"].fwdbwd_ms is rows["wrong"].peak_MB is None
    if worst:
        assert worst in rows["wrong"].note
    assert set(order) == {"base/forward", "base/forward+backward"}
    assert rows["base"].fwd_ms is not None


def test_a_window_off_by_one_is_wrong():
    off = replace(layers.window_contender("off", WINDOW + 1), window=WINDOW)

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        return replace(off.prepare(shape, device), reference=contenders.softmax_reference(WINDOW))

    verdict = gate.verify(replace(off, prepare=prepare), SHAPE, attention_inputs, CPU, 0)
    assert not verdict.passed


@pytest.mark.parametrize("wrong", ["swa_norm", "rla_norm"])
def test_norm_weights_of_the_core_are_compared(wrong):
    core = layers.core_contender("core", WINDOW, documents=False)

    def prepare(shape: Shape, device: torch.device) -> Prepared:
        made = core.prepare(shape, device)

        def reference(q, k, v, swa_weight, rla_weight):
            given = {"swa_norm": swa_weight, "rla_norm": rla_weight}
            return made.reference(q, k, v, *({**given, wrong: 1.05 * given[wrong]}).values())

        return replace(made, reference=reference)

    assert not gate.verify(replace(core, prepare=prepare), SHAPE, attention_inputs, CPU, 0).passed


def test_a_kernel_that_did_not_run_is_noticed():
    ran = contenders.sdpa_contender("ran", SDPBackend.FLASH_ATTENTION, f"{contenders.FLASH_OP}_for_cpu")
    other = replace(ran, op=contenders.CUDNN_OP)
    assert gate.verify(ran, SHAPE, attention_inputs, CPU, 0).passed
    verdict = gate.verify(other, SHAPE, attention_inputs, CPU, 0)
    assert not verdict.passed
    assert verdict.describe() == f"{contenders.CUDNN_OP} was asked for and did not run"


def raising(error: Exception) -> Callable[..., Tensor]:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise error

    return forward


@pytest.mark.parametrize(
    ("error", "ours", "fails", "said"),
    [
        (Unavailable("not installed"), False, False, "unavailable: not installed"),
        (RuntimeError("No available kernel.\n  more"), False, False, "unavailable: RuntimeError: No available kernel."),
        (RuntimeError("broken"), True, True, "FAILED: RuntimeError: broken"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried ..."), True, False, "FAILED: out of memory"),
    ],
    ids=["unavailable", "theirs", "ours", "memory"],
)
def test_what_cannot_run_says_why(error, ours, fails, said):
    rows, failed, order = timed(right("base"), contender("other", raising(error), ours=ours))
    assert failed is fails
    assert rows["other"].note == said
    assert rows["other"].fwd_ms is None
    assert {name.split("/")[0] for name in order} == {"base"}


def test_a_window_over_the_whole_sequence_is_not_run():
    rows, failed, _ = timed(right("a"), shapes=[replace(SHAPE, T=WINDOW, B=4)])
    assert rows["a"].note == "not run: the window covers the sequence"
    assert not failed


def test_gate_lengths_reach_behind_large_windows(monkeypatch):
    monkeypatch.undo()
    for window in (None, 0, 512, 4096):
        shape = gate.gate_shape(replace(SHAPE, B=8), window)
        assert shape.T >= 1000
        assert shape.T % 16
        assert window is None or shape.T - window > 400
        assert shape.layers == 1


@pytest.mark.parametrize("T", [5, WINDOW + 1, 64])
def test_the_composition_is_the_linear_branch(T):
    """What flash-linear-attention is given, scanned causally, is the linear branch: its own kernel needs a GPU."""
    tensors = linear_inputs(replace(SHAPE, T=T, dtype=torch.float64), CPU, 0)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    phi_q, phi_k, shifted_v = contenders.shifted_features(q, k, v, WINDOW + 1)
    scores = torch.einsum("bthf,bshf->bhts", phi_q, phi_k).tril()
    o = torch.einsum("bhts,bshd->bthd", scores, shifted_v)
    assert relative_error(o, residual_linear_attention_quadratic(q, k, v, window=WINDOW)) < 1e-12


# Tables


def some_rows() -> list[Row]:
    rows, _, _ = timed(right("base", baseline=True), right("ours", ours=True))
    extra = contender("none", raising(Unavailable("not, installed")))
    more, _, _ = timed(right("base", baseline=True), extra, shapes=[replace(SHAPE, T=128, B=1)])
    return [*rows.values(), *more.values()]


def test_rows_hold_what_was_measured():
    rows, failed, order = timed(right("base", baseline=True), right("ours", ours=True), rounds=5)
    assert not failed
    row = rows["ours"]
    own = [i + 1 for i, name in enumerate(order) if name == "ours/forward+backward"]
    assert row.fwdbwd_ms == sorted(own)[2]
    assert (row.kept_MB, row.peak_MB, row.fwd_host_ms, row.rounds) == (1.0, 3.0, 0.5, 5)
    assert row.baseline == "base"
    assert row.fwd_speedup == rows["base"].fwd_ms / row.fwd_ms
    assert row.fwdbwd_speedup == rows["base"].fwdbwd_ms / row.fwdbwd_ms
    assert rows["base"].fwd_speedup == 1.0
    assert 0 < row.error < row.tolerance


def test_ratios_refer_to_the_first_baseline_that_ran():
    rows, _, _ = timed(
        contender("first", raising(Unavailable("no")), baseline=True), right("second", baseline=True), right("ours")
    )
    assert rows["ours"].baseline == "second"
    assert rows["first"].baseline == ""
    alone, _, _ = timed(right("ours"))
    assert alone["ours"].fwd_speedup is None


def test_csv(tmp_path):
    rows = some_rows()
    path = tmp_path / "deeper" / "rows.csv"
    report.write_csv(rows, path)
    with path.open() as file:
        read = list(csv.DictReader(file))
    assert list(read[0]) == list(report.COLUMNS)
    assert [(line["contender"], line["T"]) for line in read] == [(row.contender, str(row.T)) for row in rows]
    assert float(read[1]["fwdbwd_ms"]) == pytest.approx(rows[1].fwdbwd_ms, rel=1e-5)
    assert read[0]["torch"] == torch.__version__
    assert (read[0]["device"], read[0]["window"], read[0]["dtype"]) == ("CPU", str(WINDOW), "bf16")
    assert (read[3]["note"], read[3]["fwd_ms"]) == ("unavailable: not, installed", "")


def test_table():
    rows = some_rows()
    lines = report.table(rows).splitlines()
    assert [line for line in lines if line.startswith("T=")] == [
        "T=64 B=2, x: times as fast as base",
        "T=128 B=1, x: times as fast as base",
    ]
    (ours,) = [line for line in lines if line.startswith("ours")]
    assert f"{rows[1].fwd_ms:.3f}" in ours
    assert lines[-1].startswith("none")
    assert lines[-1].endswith("unavailable: not, installed")


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "deeper" / "rows.png"
    report.write_plot(some_rows(), path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
