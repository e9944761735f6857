"""Runs some of `interpreted.py` in a process of its own: Triton reads TRITON_INTERPRET once, when it is imported.

All of it takes minutes: `TRITON_INTERPRET=1 python -m pytest tests/scan_kernels/interpreted.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_kernels_under_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", str(HERE / "interpreted.py")]
    some = "opcheck or fullgraph or refus or kept_bytes or branch_sum or second_backward or continued_sequence[0]"
    some += " or bf16 and (norm-identity or strong-identity or all-softmax)"
    some += " or strides_are_added or one_graph or 33-2-decay or 17-100"
    some += " or chunks_without_keys[2-False-48] or chunks_without_keys[4-True-16] or 70-40"
    command += ["-k", some]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_importing_the_package_needs_no_triton():
    script = "import sys; sys.modules['triton'] = None; import scan_kernels"
    subprocess.run([sys.executable, "-c", script], cwd=HERE.parents[1], check=True, timeout=300)
