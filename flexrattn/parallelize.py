"""FSDP2, HSDP, TP, activation checkpointing and per-block compile: torchtitan's, with what its CPU path still needs."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed._composable.fsdp import FSDPModule
from torchtitan.models.qwen3.parallelize import parallelize_qwen3

from flexrattn.activation_checkpoint import with_linear_branch


def parallelize(model: torch.nn.Module, **options: Any) -> torch.nn.Module:
    """Apply the parallelism of a torchtitan run to the model; the options are torchtitan's own.

    A dense decoder is parallelised alike whatever its attention, so torchtitan's function for one serves.
    """
    compile_config = options["compile_config"]
    if compile_config.enable and "model" in compile_config.components:
        # A second length (validation, say) would otherwise switch every block to dynamic shapes, which makes
        # FlexAttention 26-38 % slower (KERNELS.md); a second static compilation costs its time once.
        torch._dynamo.config.automatic_dynamic_shapes = False
    options["ac_config"] = with_linear_branch(options["ac_config"])
    model = parallelize_qwen3(model, **options)
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        # Gloo lacks the scaled sum that FSDP2 uses to reduce; a plain sum, divided after, is the same mean.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
    return model
