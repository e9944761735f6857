"""What is summed in which dtype."""

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


# The meta device has no autocast to switch off. Dynamo of torch 2.11 cannot trace the question; the answer is constant.
@torch.compiler.assume_constant_result
def _has_autocast(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast would round features and states to half precision."""
    return torch.autocast(device_type, enabled=False) if _has_autocast(device_type) else nullcontext()
