"""flexrattn: RAttention (arXiv 2506.15545) for PyTorch, trained with torchtitan.

Importing this package fills what an older torch lacks and, on a machine without a GPU, tells torchtitan to use the
CPU; both must happen before torchtitan's own modules are imported.
"""

from flexrattn import compat, platform

compat.fill()
platform.setup()

from flexrattn.attention import HeadRMSNorm, LayerKind, RAttention, ResidualLinearBranch  # noqa: E402
from flexrattn.flavors import FLAVORS, Flavor, Layers, build_model_config, make_layers, resolve_flavor  # noqa: E402
from flexrattn.masked_attention import MaskSpec  # noqa: E402
from flexrattn.model import RAttentionModel  # noqa: E402
from flexrattn.registry import model_registry  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "FLAVORS",
    "Flavor",
    "HeadRMSNorm",
    "LayerKind",
    "Layers",
    "MaskSpec",
    "RAttention",
    "RAttentionModel",
    "ResidualLinearBranch",
    "build_model_config",
    "make_layers",
    "model_registry",
    "resolve_flavor",
]
