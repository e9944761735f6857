"""Feature maps phi of the linear branch: (..., D) -> (..., F), computed in fp32 (float64 for float64 inputs)."""

from enum import StrEnum

import torch
from torch import Tensor

from scan_kernels.precision import accumulation_dtype


class FeatureMap(StrEnum):
    """The pair maps see x and -x, so that a feature of either sign has a weight: F = 2D. The others have F = D."""

    SOFTMAX = "softmax"  # concat(softmax(x), softmax(-x)), the paper's
    RELU = "relu"  # concat(relu(x), relu(-x))
    SOFTMAX_SINGLE = "softmax_single"  # softmax(x)
    IDENTITY = "identity"  # x


# Dynamo of torch 2.11 cannot iterate over an enum class.
_FEATURE_MAPS = tuple(FeatureMap)
PAIRED = (FeatureMap.SOFTMAX, FeatureMap.RELU)


def available_feature_maps() -> tuple[str, ...]:
    return tuple(each.value for each in _FEATURE_MAPS)


def parse_feature_map(feature_map: FeatureMap | str) -> FeatureMap:
    for each in _FEATURE_MAPS:
        if feature_map == each.value:
            return each
    raise ValueError(f"feature_map must be one of {', '.join(available_feature_maps())}, got {feature_map!r}")


def feature_dim(feature_map: FeatureMap | str, D: int) -> int:
    """F, the number of features of a head of width D."""
    return 2 * D if parse_feature_map(feature_map) in PAIRED else D


def apply_feature_map(x: Tensor, feature_map: FeatureMap | str) -> Tensor:
    """phi(x) over the last axis, (..., D) -> (..., F), in fp32 (float64 if x is)."""
    feature_map = parse_feature_map(feature_map)
    x = x.to(accumulation_dtype(x.dtype))
    # Stacking before the map, not concatenating after it, leaves one tensor to keep for the backward instead of three.
    if feature_map in PAIRED:
        x = torch.stack((x, -x), dim=-2)
    if feature_map in (FeatureMap.SOFTMAX, FeatureMap.SOFTMAX_SINGLE):
        x = torch.softmax(x, dim=-1)
    elif feature_map is FeatureMap.RELU:
        x = torch.relu(x)
    return x.flatten(-2) if feature_map in PAIRED else x
