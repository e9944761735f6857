"""Reading a profile, and giving what was launched to the report's kernels; without a GPU, on profiles made up here."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from flexrattn.inspect import device
from flexrattn.inspect.compiler import InductorKernel
from flexrattn.inspect.device import Launched
from flexrattn.inspect.gpus import GPUS
from flexrattn.inspect.problem import load
from flexrattn.inspect.report import LINEAR, OTHERS, PRODUCTS, SOFTMAX, SUM, Kernel


def event(name: str, ts: float, dur: float, **args) -> dict:
    return {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "args": args}


def test_a_profile_is_cut_into_rounds():
    """In the order of their begin, whatever the order in the file; medians over rounds; copies are no kernels."""
    events = [
        event("b", 15, 4.0, grid=[2, 1, 1]),
        event("a", 10, 2.0, grid=[8, 4, 1], **{"registers per thread": 128}),
        event("a", 20, 6.0),
        event("b", 25, 4.0),
        event("a", 30, 3.0),
        event("b", 35, 9.0),
        {"cat": "gpu_memcpy", "name": "copy", "ts": 12, "dur": 1.0},
    ]
    a, b = device.parse_trace({"traceEvents": events}, rounds=3)
    assert (a.name, a.grid, a.registers) == ("a", (8, 4, 1), 128)
    assert (a.seconds, b.seconds) == (pytest.approx(3e-6), pytest.approx(4e-6))


def test_rounds_that_differ_are_refused():
    events = [event("a", 1, 1.0), event("b", 2, 1.0), event("b", 3, 1.0), event("a", 4, 1.0)]
    with pytest.raises(ValueError, match="did not launch the same"):
        device.parse_trace({"traceEvents": events}, rounds=2)
    with pytest.raises(ValueError, match="did not launch the same"):
        device.parse_trace({"traceEvents": events[:3]}, rounds=2)


def generated(name: str, **fields) -> InductorKernel:
    options = {
        "source": "def kernel(): ...",
        "constants": {},
        "warps": 4,
        "stages": 3,
        "registers": 100,
        "spilled": 0,
        "shared": 1024,
        "asm": {},
        "nbytes": 1000,
        "dynamic": False,
    }
    return InductorKernel(name=name, **(options | fields))


FLEX = generated("triton_tem_fused_0", constants={"BLOCK_M": 128, "SPARSE_KV_BLOCK_SIZE": 128})
FUSED = generated("triton_poi_fused_add_1")


def launched(name: str, seconds: float = 1e-3, registers: int | None = None) -> Launched:
    return Launched(name=name, seconds=seconds, grid=(4, 2, 1), registers=registers)


@pytest.fixture(scope="module")
def problem():
    others = {"documents": None, "arch": "sm_90", "gpu": None, "device": "cpu"}
    return load("configs/debug.yaml", [], layers=["local"], seq_len=128, batch=1, dtype="bf16", **others)


def kernels() -> list[Kernel]:
    states = [
        Kernel(name=f"hopper_state{of}", group=LINEAR, phase="forward", registers=128) for of in (" (totals)", "")
    ]
    flex = Kernel(name="flex_attention", group=SOFTMAX, phase="forward", flops=100, bytes=100)
    return [*states, Kernel(name="state_scan", group=LINEAR, phase="forward", registers=30), flex]


ORDER = (
    launched("hopper_state_kernel", 1e-3, 128),
    launched(FLEX.name, 7e-3),
    launched(FUSED.name, 2e-3),
    launched("hopper_state_kernel", 4e-3, 128),
    launched("nvjet_tst_128x256", 5e-3),
    launched(FUSED.name, 2e-3),
    launched("state_scan_kernel", 3e-3, 30),
)


def assign(problem, found: list[Kernel], timeline: list[Launched]) -> list[str]:
    return device.assign(problem, found, {"forward": timeline}, [FLEX, FUSED])


def test_what_was_launched_is_given_to_its_kernels(problem):
    found = kernels()
    assert assign(problem, found, list(ORDER)) == []
    totals, states, scan, flex, *others = found
    assert [k.measured_s for k in (totals, states, scan, flex)] == [1e-3, 4e-3, 3e-3, 7e-3]
    assert (flex.options["called"], flex.registers, flex.warps, flex.options["BLOCK_M"]) == (FLEX.name, 100, 4, 128)
    assert flex.programs_per_sm
    fused, product = sorted(others, key=lambda kernel: kernel.group)[::-1][0], others[1]
    assert {fused.group, product.group} == {OTHERS, PRODUCTS}
    assert (fused.launches, fused.measured_s, fused.bytes) == (2, pytest.approx(4e-3), 2000)
    assert product.measured_s == 5e-3


def test_other_kernels_of_the_linear_branch_are_told(problem):
    found = kernels()
    (odd,) = assign(problem, found, [each for each in ORDER if each.name != "state_scan_kernel"])
    assert odd == "forward: the linear branch launched hopper_state_kernel, hopper_state_kernel"
    assert all(kernel.measured_s is None for kernel in found if kernel.group == LINEAR)


def test_another_binary_is_told(problem):
    changed = [launched(x.name, x.seconds, 99 if x.name == "state_scan_kernel" else x.registers) for x in ORDER]
    (odd,) = assign(problem, kernels(), changed)
    assert odd == "state_scan: launched with 99 registers, compiled here with 30"


def test_a_missing_flex_kernel_is_told(problem):
    (odd,) = assign(problem, kernels(), [each for each in ORDER if each.name != FLEX.name])
    assert odd == "forward: no kernel of FlexAttention was launched"


def test_parts_of_the_values_repeat_all_launches(problem):
    found = [Kernel(name=n, group=LINEAR, phase="forward", launches=2, registers=9) for n in ("chunk_dq", "chunk_dkv")]
    names = ("chunk_dq_kernel", "chunk_dkv_kernel") * 2
    timeline = [launched(name, (i + 1) * 1e-3, 9) for i, name in enumerate(names)]
    assert assign(problem, found, timeline) == []
    assert [kernel.measured_s for kernel in found] == [pytest.approx(4e-3), pytest.approx(6e-3)]


def test_the_branches_sum_is_launched_once_beside_parts(problem):
    found = [Kernel(name="branch_sum_bwd", group=SUM, phase="forward", registers=80)]
    found += [Kernel(name=n, group=LINEAR, phase="forward", launches=2, registers=9) for n in ("chunk_dq", "chunk_dkv")]
    names = ("chunk_dq_kernel", "chunk_dkv_kernel") * 2
    timeline = [launched("branch_sum_bwd_kernel", 7e-3, 80), *(launched(name, 1e-3, 9) for name in names)]
    assert assign(problem, found, timeline) == []
    assert [kernel.measured_s for kernel in found] == [7e-3, pytest.approx(2e-3), pytest.approx(2e-3)]


def test_a_step_runs_without_a_gpu_as_it_does_with_one(problem):
    """Block, masks, positions and gradients fit together; eagerly, on the CPU."""
    for layer in problem.layers:
        step = device.Step(problem, layer, checkpointing=False, device="cpu", backend="aot_eager")
        y = step.forward()
        assert y.shape == (1, 128, problem.model.dim)
        step.backward(y)


def test_the_roofline_is_that_of_the_measured_ceilings(problem):
    from flexrattn.inspect.report import finish

    gpu = GPUS["h200"].with_ceilings(bf16=1e14, bandwidth=1e12)
    kernel = Kernel(name="x", group=OTHERS, phase="forward", flops=10**12, bytes=1, measured_s=0.02)
    assert finish(kernel, gpu).roofline_s == 0.01
    assert kernel.share == 0.5
