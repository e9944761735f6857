"""What the commands that read checkpoints share: a parser whose mistakes are one line, dtypes by name, the device."""

from __future__ import annotations

import argparse
from typing import NoReturn

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Parser(argparse.ArgumentParser):
    """A wrong flag is a ValueError, as any other bad input."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def check_device(name: str | None) -> None:
    """ValueError for a device that was asked for and is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda, but torch {torch.__version__} sees no GPU on this machine")
