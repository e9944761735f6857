"""The choice of an implementation, by which the public ops are called."""

from enum import StrEnum


class Impl(StrEnum):
    """AUTO takes the fastest that the tensors allow and says once which; the others never fall back."""

    AUTO = "auto"
    REFERENCE = "reference"  # float64 token loop
    TORCH = "torch"  # chunked, any device
    TRITON = "triton"  # fused kernels


# Dynamo of torch 2.11 cannot iterate over an enum class.
_IMPLS = tuple(Impl)


def parse_impl(impl: Impl | str) -> Impl:
    for each in _IMPLS:
        if impl == each.value:
            return each
    raise ValueError(f"impl must be one of {', '.join(_IMPLS)}, got {impl!r}")
