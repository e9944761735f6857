"""The residual linear branch of RAttention: the keys that a sliding window leaves out. Shapes: README.md."""

from scan_kernels.api import residual_linear_attention, residual_linear_attention_and_inputs
from scan_kernels.branch_sum import head_rms_norm, sum_of_head_norms
from scan_kernels.feature_maps import FeatureMap, apply_feature_map, available_feature_maps, feature_dim
from scan_kernels.impl import Impl
from scan_kernels.reference import residual_linear_attention_quadratic
from scan_kernels.state import ResidualState, initial_state_from_pairs
from scan_kernels.validation import check_values
from scan_kernels.window import residual_pairs, residual_shift

__all__ = [
    "FeatureMap",
    "Impl",
    "ResidualState",
    "apply_feature_map",
    "available_feature_maps",
    "check_values",
    "feature_dim",
    "head_rms_norm",
    "initial_state_from_pairs",
    "residual_linear_attention",
    "residual_linear_attention_and_inputs",
    "residual_linear_attention_quadratic",
    "residual_pairs",
    "residual_shift",
    "sum_of_head_norms",
]
