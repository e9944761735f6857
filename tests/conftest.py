"""The suite runs on the CPU, one thread a process, on any machine; tests marked gpu address their device themselves."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("FLEXRATTN_DEVICE", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
