"""What is summed in which dtype."""

from contextlib import AbstractContextManager, nullcontext

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager:
    """Autocast would round features and states to half precision."""
    # The meta device has no autocast to switch off.
    return torch.autocast(device_type, enabled=False) if torch.amp.is_autocast_available(device_type) else nullcontext()
