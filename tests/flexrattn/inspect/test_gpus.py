"""The table of GPUs, and how many programs fit an SM (counted by hand from the programming guide's limits)."""

from __future__ import annotations

import pytest

from flexrattn.inspect.gpus import DEFAULT_GPU, GPUS, LIMITS, choose_arch, choose_gpu, find_gpu, occupancy


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "programs", "limit"),
    [
        ("sm_90", 255, 115456, 4, 2, "registers"),  # 4 warps x 8192 registers: 2 fit, as does the shared memory
        ("sm_90", 128, 83968, 8, 2, "registers"),
        ("sm_90", 64, 197120, 8, 1, "shared memory"),
        ("sm_90", 32, 0, 4, 16, "warps"),
        ("sm_90", 16, 0, 1, 32, "programs"),
        ("sm_80", 64, 80 * 1024, 8, 2, "shared memory"),
        ("sm_80", 64, 82 * 1024, 8, 1, "shared memory"),  # 164 KB hold no two, with 1 KB reserved for each
        ("sm_80", 33, 0, 8, 6, "registers"),  # 40 registers are given for 33
        ("sm_80", 64, 164 * 1024, 8, 0, "shared memory"),  # more than a program may have
    ],
)
def test_programs_on_an_sm(arch, registers, shared, warps, programs, limit):
    found = occupancy(arch, registers=registers, shared=shared, warps=warps)
    assert (found.programs, found.limit) == (programs, limit)
    assert found.warps_share == programs * warps / 64


@pytest.mark.parametrize(
    ("name", "arch", "key"),
    [
        ("NVIDIA H200", "sm_90", "h200"),
        ("NVIDIA H100 80GB HBM3", "sm_90", "h100"),
        ("NVIDIA H100 PCIe", "sm_90", "h100-pcie"),
        ("NVIDIA A100-SXM4-40GB", "sm_80", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "sm_80", "a100"),
        ("NVIDIA B200", "sm_100", "b200"),
    ],
)
def test_names_of_drivers(name, arch, key):
    assert find_gpu(name, arch) == GPUS[key]


def test_an_unknown_device_is_none():
    assert find_gpu("NVIDIA GeForce RTX 3090", "sm_80") is None
    assert find_gpu("NVIDIA GH200 480GB", "sm_90") is None  # its memory is another than the H200's


def test_every_number_has_a_source():
    for gpu in GPUS.values():
        assert gpu.source
        assert gpu.arch in LIMITS
    assert {GPUS[key].arch for key in DEFAULT_GPU.values()} == set(LIMITS)


def test_the_roofline_is_the_slower_of_the_two():
    gpu = GPUS["h200"]
    assert gpu.roofline_s(gpu.bf16, 1, "bf16") == 1.0
    assert gpu.roofline_s(1, 2 * gpu.bandwidth, "bf16") == 2.0
    assert gpu.roofline_s(gpu.fp32, 1, "fp32") == 1.0
    assert (gpu.bound(gpu.bf16, 1, "bf16"), gpu.bound(1, gpu.bandwidth, "bf16")) == ("compute", "memory")


def test_measured_ceilings_replace_the_makers():
    gpu = GPUS["h200"].with_ceilings(bf16=7e14, bandwidth=4e12)
    assert (gpu.bf16, gpu.bandwidth, gpu.measured) == (7e14, 4e12, True)
    assert not GPUS["h200"].measured


@pytest.mark.parametrize("given", ["sm_90", "sm90", "90"])
def test_architectures(given):
    assert choose_arch(given) == "sm_90"


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match="unknown architecture 'sm_70'"):
        choose_arch("sm_70")
    with pytest.raises(ValueError, match="did you mean 'h200'"):
        choose_gpu("h20", "sm_90")
    with pytest.raises(ValueError, match="is sm_80, the kernels are for sm_90: use --arch sm_80"):
        choose_gpu("a100", "sm_90")
