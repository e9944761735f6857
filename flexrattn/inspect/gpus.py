"""GPUs by name: what their makers promise, where each number is from, and how many programs fit an SM.

Peaks are dense (no structured sparsity) and assume the boost clock, which a long run does not keep: on a GPU the
report measures its own ceilings and uses those instead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from flexrattn.suggest import choose


@dataclass(frozen=True, kw_only=True)
class GPU:
    """FLOP/s by dtype: `bf16` (and fp16) on tensor cores, `fp32` without them. bandwidth: bytes/s. memory: bytes."""

    name: str
    arch: str
    sms: int
    bf16: float
    fp32: float
    bandwidth: float
    memory: float
    source: str
    measured: bool = False

    def peak(self, dtype: str) -> float:
        return self.fp32 if dtype == "fp32" else self.bf16

    def roofline_s(self, flops: float, nbytes: float, dtype: str) -> float:
        """The least time for this arithmetic and these bytes: the slower of the two, perfectly overlapped."""
        return max(flops / self.peak(dtype), nbytes / self.bandwidth)

    def bound(self, flops: float, nbytes: float, dtype: str) -> str:
        return "compute" if flops / self.peak(dtype) > nbytes / self.bandwidth else "memory"

    def with_ceilings(self, *, bf16: float, bandwidth: float) -> GPU:
        """The same with what was measured on this one."""
        return replace(self, bf16=bf16, bandwidth=bandwidth, measured=True)


_A100 = "NVIDIA A100 datasheet (2021): 312 TFLOPS bf16, 19.5 fp32; 108 SMs from the A100 architecture whitepaper"
_H100 = "NVIDIA H100 datasheet (2023), half of the bf16 number given with sparsity; SMs from the H100 whitepaper"
_H200 = "NVIDIA H200 datasheet (2024): 1979 TFLOPS bf16 with sparsity, 67 fp32, 4.8 TB/s; the SMs are the H100's"
_B200 = "NVIDIA HGX B200 page (2024): per GPU 4.5 PFLOPS bf16 with sparsity, 75 TFLOPS fp32, 8 TB/s; 148 SMs"

GPUS = {
    "a100-40gb": GPU(
        name="A100 40GB SXM", arch="sm_80", sms=108, bf16=312e12, fp32=19.5e12, bandwidth=1.555e12, memory=40e9,
        source=_A100,
    ),
    "a100": GPU(
        name="A100 80GB SXM", arch="sm_80", sms=108, bf16=312e12, fp32=19.5e12, bandwidth=2.039e12, memory=80e9,
        source=_A100,
    ),
    "h100": GPU(
        name="H100 SXM", arch="sm_90", sms=132, bf16=989.4e12, fp32=67e12, bandwidth=3.35e12, memory=80e9, source=_H100
    ),
    "h100-pcie": GPU(
        name="H100 PCIe", arch="sm_90", sms=114, bf16=756e12, fp32=51e12, bandwidth=2.0e12, memory=80e9, source=_H100
    ),
    "h200": GPU(
        name="H200 SXM", arch="sm_90", sms=132, bf16=989.4e12, fp32=67e12, bandwidth=4.8e12, memory=141e9, source=_H200
    ),
    "b200": GPU(
        name="B200 SXM", arch="sm_100", sms=148, bf16=2250e12, fp32=75e12, bandwidth=8.0e12, memory=180e9, source=_B200
    ),
}  # fmt: skip

# The GPU whose roofline is drawn for an architecture, where none is named and none is there.
DEFAULT_GPU = {"sm_80": "a100", "sm_90": "h200", "sm_100": "b200"}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one SM holds (CUDA programming guide, "compute capabilities"). Bytes of shared memory: of an SM, of a
    program; every program takes `reserved` more."""

    warps: int = 64
    programs: int = 32
    registers: int = 65536
    shared: int = 228 * 1024
    program_shared: int = 227 * 1024
    reserved: int = 1024


LIMITS = {"sm_80": Limits(shared=164 * 1024, program_shared=163 * 1024), "sm_90": Limits(), "sm_100": Limits()}


def choose_arch(given: str) -> str:
    """ "sm_90", also written "90" or "sm90"; ValueError lists what the kernels are made for."""
    name = given if given.startswith("sm_") else f"sm_{given.removeprefix('sm')}"
    return name if name in LIMITS else choose(given, LIMITS, what="architecture")


def capability_of(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def choose_gpu(given: str, arch: str) -> GPU:
    """A GPU of the table that has `arch`."""
    gpu = GPUS[choose(given.lower(), GPUS, what="GPU")]
    if gpu.arch != arch:
        raise ValueError(f"GPU {given!r} is {gpu.arch}, the kernels are for {arch}: use --arch {gpu.arch}")
    return gpu


def find_gpu(device_name: str, arch: str) -> GPU | None:
    """The table's entry for what a driver calls its device, or None."""
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    # All parts of a key are words of the name, and the longest wins: "NVIDIA A100-SXM4-40GB" is the a100-40gb.
    found = [key for key in GPUS if GPUS[key].arch == arch and words.issuperset(key.split("-"))]
    return GPUS[max(found, key=len)] if found else None


@dataclass(frozen=True, kw_only=True)
class Occupancy:
    """Programs of a kernel that one SM runs at a time, the share of its warps, and what keeps more from fitting."""

    programs: int
    warps_share: float
    limit: str


def occupancy(arch: str, *, registers: int, shared: int, warps: int) -> Occupancy:
    """From what a program takes: registers of a thread, bytes of shared memory, warps."""
    limits = LIMITS[arch]
    # Registers are given out to warps in units of 256, eight for each thread.
    per_warp = -(-max(registers, 1) * 32 // 256) * 256
    fits = {
        "warps": limits.warps // warps,
        "registers": limits.registers // (per_warp * warps),
        "shared memory": limits.shared // (shared + limits.reserved) if shared <= limits.program_shared else 0,
        "programs": limits.programs,
    }
    limit = min(fits, key=lambda name: fits[name])
    return Occupancy(programs=fits[limit], warps_share=fits[limit] * warps / limits.warps, limit=limit)
