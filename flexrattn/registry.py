"""`model_registry`: what torchtitan asks an out-of-tree model package for."""

from __future__ import annotations

from typing import Any

from torchtitan.distributed.pipeline_parallel import pipeline_llm
from torchtitan.protocols.model_spec import ModelSpec

from flexrattn.flavors import build_model_config, make_layers, resolve_flavor
from flexrattn.parallelize import parallelize


def model_registry(flavor: str, *, model: dict[str, Any] | None = None, **layers: Any) -> ModelSpec:
    """A flavor with its layers as torchtitan's ModelSpec.

    model: fields of `Flavor` to replace. layers: the arguments of `flexrattn.flavors.make_layers`.
    """
    size = resolve_flavor(flavor, model)
    return ModelSpec(
        name="flexrattn",
        flavor=flavor,
        model=build_model_config(size, make_layers(**layers)),
        parallelize_fn=parallelize,
        pipelining_fn=pipeline_llm,
        post_optimizer_build_fn=None,
        state_dict_adapter=None,
    )
