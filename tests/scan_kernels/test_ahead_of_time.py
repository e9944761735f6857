"""The committed launch table, compiled for GPUs that are not there: no spilled registers, no excess of shared memory.

FLEXRATTN_ALL_KERNELS=1 compiles the whole table, which takes minutes, and not only its first rows.
"""

import itertools
import os
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from scan_kernels.kernels import branch_sum
from scan_kernels.kernels.configs import HALF, Config
from scan_kernels.kernels.resources import SHARED, Case, Resources, measure, resources

# Documents take what a plain problem takes, and more; sm_80 has the least shared memory, which a start state fills.
# Only a decay multiplies states with states, which Triton 3.6 does not compile for sm_100 in every form.
FIRST = [
    *(Case(capability, "bf16", 128, "documents") for capability in SHARED),
    *(Case(capability, "bf16", 128, "plain") for capability in (90, 100)),
    Case(80, "bf16", 128, "start"),
    Case(100, "bf16", 128, "decay"),
    Case(90, "bf16", 128, "all"),
]
REST = [
    case
    for case in itertools.starmap(
        Case,
        [
            *itertools.product(SHARED, ["bf16"], (64, 128), ("plain", "documents", "decay", "start", "all")),
            *itertools.product(SHARED, ["bf16"], (32, 256), ["documents"]),
            *itertools.product(SHARED, ["fp32"], (64, 128), ["documents"]),
        ],
    )
    if case not in FIRST
]


# Bytes that a thread may store and load beside its registers.
MOST_SPILLED = 16

EVERYTHING = os.environ.get("FLEXRATTN_ALL_KERNELS") == "1"


def test_kernels_fit():
    # Two kernels read the gradients of another branch.
    joined = [Case(90, "bf16", 128, variant) for variant in ("core", "joined")]
    if EVERYTHING:
        joined = list(itertools.starmap(Case, itertools.product(SHARED, ["bf16"], (64, 128), ("core", "joined"))))
    readers = ("chunk_dq", "chunk_dkv", "hopper_dq", "hopper_dkv")
    unfit = []
    for case, kernel, found in measure(FIRST + REST if EVERYTHING else FIRST) + measure(joined, kernels=readers):
        fits = isinstance(found, Resources) and found.spilled <= MOST_SPILLED
        # A kernel of next to no registers was optimized away; one fills rows, and needs few.
        least = 8 if kernel == "empty_rows" else 16
        if not fits or found.shared > SHARED[case.capability] or found.registers < least:
            unfit.append(f"sm_{case.capability} {case.dtype} D={case.D} {case.variant}: {kernel} {found}")
    assert not unfit, "\n".join(unfit)


def test_a_plan_that_does_not_fit_is_seen():
    crowded = replace(HALF, dq=Config(num_warps=8, num_stages=2, heads=2))
    case = Case(90, "bf16", 128, "plain", plan=crowded)
    (dq,) = (found for _, _, found in measure([case], kernels=("chunk_dq",)))
    assert dq.spilled > MOST_SPILLED
    assert dq.shared > SHARED[80]


def test_the_sum_of_the_branches_fits():
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 4096, 16, 128), (16, 128)))
    forward, _ = branch_sum.branch_sum_fwd(x, x, weight, weight, 1e-8)
    backward, *_ = branch_sum.branch_sum_bwd(x, x, x, weight, weight, 1e-8)
    for launch, capability in itertools.product((forward, backward), SHARED):
        found = resources(launch.compile(capability))
        assert found.spilled == 0
        assert 16 <= found.registers <= 96
        assert found.shared <= SHARED[capability]
