"""The launches of a layer's linear branch and their work."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from flexrattn import model_registry
from flexrattn.inspect import binary, scan
from flexrattn.inspect.scan import ScanShape, scan_launches, why_no_kernels, work

HERE = Path(__file__).parent
SHAPE = ScanShape(
    B=2,
    T=1000,
    H=8,
    G=2,
    D=128,
    dtype=torch.bfloat16,
    window=10,
    feature_map="softmax",
    save_every=16,
    start=False,
    joined="",
    summed=False,
    decays=False,
    capability=90,
)


def changed(**fields) -> ScanShape:
    return dataclasses.replace(SHAPE, **fields)


def names(shape: ScanShape) -> list[str]:
    return [each.name for each in scan_launches(shape)]


def test_launches_on_hopper():
    """T = 1000 is 16 chunks, one segment: no scan in front of the states."""
    assert names(SHAPE) == [
        *("hopper_state", "hopper_output", "border_states"),
        *("hopper_state (backward)", "hopper_dkv", "hopper_state", "hopper_dq"),
    ]
    longer = names(changed(T=4096))
    assert longer[:2] == ["hopper_state (totals)", "state_scan"]
    assert "state_scan (reversed)" in longer
    assert [each.backward for each in scan_launches(SHAPE)] == [False] * 3 + [True] * 4


@pytest.mark.parametrize("joined", ["", "qkv"])
def test_chunks_that_are_too_young_for_keys_are_no_work(joined):
    """Four of sixteen under a window of 300. A kernel writes their rows of o and dq, and no other one."""
    kinds = {each.name: work(each.launch) for each in scan_launches(changed(T=1024, joined=joined))}
    fewer = list(scan_launches(changed(T=1024, window=300, joined=joined)))
    assert [each.backward for each in fewer if each.name == "empty_rows"] == [False, True]
    rows = 2 * SHAPE.B * 256 * SHAPE.H * SHAPE.D
    for each in fewer:
        flops, nbytes = work(each.launch)
        if each.name == "empty_rows":
            assert (flops, nbytes) == (0, rows * (2 if joined and each.backward else 1))
        else:
            assert flops == kinds[each.name][0] * 3 // 4
            assert nbytes < kinds[each.name][1]
    output = next(each for each in fewer if each.name == "hopper_output")
    keys = 2 * SHAPE.B * 1024 * SHAPE.G * SHAPE.D * 2 + 4 * SHAPE.B * 1025
    assert work(output.launch)[1] - keys == (kinds["hopper_output"][1] - keys) * 3 // 4


def test_launches_elsewhere_and_with_a_start_state():
    portable = ["chunk_state_fwd", "chunk_output_fwd", "border_states"]
    assert names(changed(capability=80))[:3] == portable
    assert names(changed(start=True))[:3] == portable
    assert names(changed(dtype=torch.float32))[:3] == ["chunk_state_fwd", "state_scan", "chunk_output_fwd"]


def test_without_kept_states_the_backward_makes_them_again():
    assert "border_states" not in names(changed(save_every=0))
    assert names(changed(save_every=0, T=4096)).count("hopper_state (totals)") == 2


def test_the_branches_sum_reads_and_writes_each_tensor_once():
    """It stands between the linear branch's forward and its backward, and multiplies no matrices."""
    launches = scan_launches(changed(summed=True))
    assert [each.name for each in launches if each.sums] == ["branch_sum_fwd", "branch_sum_bwd"]
    assert [each.name for each in launches if not each.sums] == names(SHAPE)
    assert [each.backward for each in launches] == [False] * 4 + [True] * 5
    branch = 2 * SHAPE.B * SHAPE.T * SHAPE.H * SHAPE.D
    for each, tensors in zip((each for each in launches if each.sums), (3, 5), strict=True):
        flops, nbytes = work(each.launch)
        assert flops == 0
        # Scales, and the programs' shares of their gradients.
        assert tensors * branch < nbytes < 1.6 * tensors * branch


def test_gradients_of_the_softmax_branch_are_read_where_they_are_added():
    head = 2 * SHAPE.B * SHAPE.T * SHAPE.D
    more = {"hopper_dq": {"q": SHAPE.H * head}, "hopper_dkv": {"k": SHAPE.G * head, "v": SHAPE.G * head}}
    for joined in ("qkv", "v"):
        for each, apart in zip(scan_launches(changed(joined=joined)), scan_launches(SHAPE), strict=True):
            read = sum(nbytes for name, nbytes in more.get(each.name, {}).items() if name in joined)
            assert work(each.launch)[1] == work(apart.launch)[1] + read


def shape_of(**layers) -> ScanShape:
    attention = model_registry("debug", **layers).model.layers[0].attention
    return scan.scan_shape(attention, batch=1, seq_len=64, dtype=torch.bfloat16, capability=90)


def test_a_layer_is_asked_for_what_it_hands_to_its_scan():
    """Half of the heads, a decay, a window that is data: each as the layer itself does it."""
    assert (shape_of(window=9).H, shape_of(window=9).G, shape_of(window=9).window) == (4, 2, 9)
    assert (shape_of(layer_kind="hymba", window=9).H, shape_of(layer_kind="hymba", window=9).G) == (2, 1)
    decays = shape_of(window=9, decay_gate=True)
    assert (decays.dtype, decays.decays) == (torch.bfloat16, True)
    assert {each.launch.args["p_a"].dtype for each in scan_launches(decays) if each.sums} == {torch.bfloat16}
    assert shape_of(window=9, local_mask={"stochastic_window": {"low": 2, "high": 4}}).window is None


@pytest.mark.parametrize("start", [False, True])
def test_decays_are_read_by_the_kernels(start):
    with_decays = scan_launches(changed(dtype=torch.float32, decays=True, start=start))
    without = scan_launches(changed(dtype=torch.float32, start=start))
    # Last, what only the gradient of the decays needs.
    assert [each.name for each in with_decays] == [*(each.name for each in without), "chunk_given"]
    for a, b in zip(with_decays, without, strict=False):
        if "cum_hi" in b.launch.args:
            assert a.launch.args["cum_hi"] is not None
            assert b.launch.args["cum_hi"] is None
    assert sum(work(a.launch)[1] for a in with_decays) > sum(work(a.launch)[1] for a in without)


def test_values_are_taken_in_parts():
    assert changed(D=64).parts == 1
    assert changed(dtype=torch.float32).parts == 4


def test_why_there_are_none():
    assert why_no_kernels("auto", SHAPE) == ""
    assert "head sizes" in why_no_kernels("auto", changed(D=48))
    assert "torch operations" in why_no_kernels("torch", SHAPE)
    with pytest.raises(ValueError, match="head sizes"):
        why_no_kernels("triton", changed(D=48))


@pytest.mark.parametrize("feature_map", ["softmax", "identity"])
def test_work_of_hopper_is_that_of_its_products(feature_map):
    """The products in the compiled code, times the loops and programs that run them."""
    shape = changed(feature_map=feature_map, D=64)
    launches = scan_launches(shape)
    R, seen = shape.H // shape.G, set()
    for number, each in enumerate(launches):
        if each.kernel in seen or "hopper" not in each.kernel:
            continue
        seen.add(each.kernel)
        args = each.launch.args
        each_time = [2 * d.M * d.N * d.K for d in binary.dots(scan.compile_one((shape, number, False)).asm["ttgir"])]
        chunks = args["N"] * shape.B * shape.G
        halves = args["F"] // args["D"]
        if each.kernel == "hopper_dkv_kernel":
            # Those of the states once, the own and from behind the segment, then a head's: in the loop over heads, and
            # again for the last head.
            states = 2 * halves * (2 if args["HAS_CARRY"] else 1)
            expected = sum(each_time[:states]) + R * sum(each_time[states:]) // 2
        elif each.kernel == "hopper_state_kernel":
            expected = halves * sum(each_time)
        else:
            expected = R * sum(each_time)
        assert work(each.launch)[0] == expected * chunks, each.name
    assert len(seen) == 4


def test_work_of_the_portable_kernels_is_that_of_the_products_that_run():
    """Under Triton's interpreter every product is counted; in a process of its own, as Triton asks for it at import."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "counted.py")]
    done = subprocess.run(
        command,
        cwd=HERE.parents[2],
        env=environment | {"PYTHONPATH": str(HERE.parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "equal" in done.stdout


def test_bytes_are_those_of_the_tensors():
    shape = changed(T=1024)
    output = next(each for each in scan_launches(shape) if each.name == "hopper_output")
    rows, D, F, chunks = shape.B * shape.T, shape.D, 2 * shape.D, 16 * shape.B * shape.G
    queries, keys = 2 * rows * shape.H * D * 2, 2 * rows * shape.G * D * 2
    states, ids = chunks * D * (2 * F + 4), rows * 4 + shape.B * 4
    assert work(output.launch)[1] == queries + keys + states + ids


def test_an_unknown_kernel_has_no_work():
    launch = scan_launches(SHAPE)[0].launch
    known = scan._FLOPS.pop("hopper_state_kernel")
    try:
        assert work(launch)[0] is None
    finally:
        scan._FLOPS["hopper_state_kernel"] = known


def test_equal_kernels_are_compiled_once():
    shape = changed(capability=80, save_every=0, T=4096)
    launches = scan_launches(shape)
    same = scan.different(launches)
    again = [number for number, first in same.items() if number != first]
    assert [launches[number].name for number in again] == ["chunk_state_fwd", "state_scan"]


def test_kernels_are_assembled_as_in_training(tmp_path, monkeypatch):
    """By the ptxas that comes with torch, which torch.compile takes for all kernels that are compiled after it."""
    from torch._inductor.runtime import compile_tasks
    from triton import knobs

    from flexrattn.inspect.compiler import ptxas_version

    own, log, ours = knobs.nvidia.ptxas.path, tmp_path / "log", tmp_path / "torch" / "bin" / "ptxas"
    ours.parent.mkdir(parents=True)
    ours.write_text(f'#!/bin/sh\necho "$@" >> {log}\nexec {own} "$@"\n')
    ours.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", "")  # what is there now comes back behind the test
    monkeypatch.delenv("TRITON_PTXAS_PATH")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    place = tmp_path / "torch" / "_inductor" / "runtime" / "compile_tasks.py"
    monkeypatch.setattr(compile_tasks, "__file__", str(place))
    compile_tasks._set_triton_ptxas_path.cache_clear()
    try:
        assert ptxas_version() == knobs.nvidia.ptxas.version
        assert scan.compile_one((changed(D=32, T=64, B=1), 0, False)).registers > 0
    finally:
        compile_tasks._set_triton_ptxas_path.cache_clear()
    assert "sm_90" in log.read_text()
