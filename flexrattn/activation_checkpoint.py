"""torchtitan's selective activation checkpointing with this package's kernels among what it saves."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torchtitan.distributed import activation_checkpoint as titan

import scan_kernels  # noqa: F401, registers the op
from flexrattn import flash_window


class RAttentionSelectiveAC(titan.SelectiveAC):
    """Saves, besides torchtitan's list, what the branches' kernels return: o, and states with `save_every`.

    A forward of a branch then runs once, as FlexAttention's does. Of `impl="torch"` nothing is saved: its states are
    those of all chunks, in fp32.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.SelectiveAC.Config):
        pass

    def get_save_ops(self) -> set:
        ours = {torch.ops.scan_kernels.fused_fwd.default, flash_window.flash_window_fwd._opoverload}
        return super().get_save_ops() | ours


def with_linear_branch(config: Any) -> Any:
    """torchtitan's choice of a policy, with `selective` as ours; a subclass of it is left alone."""
    if type(config) is not titan.SelectiveAC.Config:
        return config
    return RAttentionSelectiveAC.Config(**{field.name: getattr(config, field.name) for field in fields(config)})
