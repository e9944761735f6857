"""Inputs and comparisons that the tests of scan_kernels share. Closeness is a relative norm against float64."""

from collections.abc import Callable

import torch
from torch import Tensor

from scan_kernels import feature_dim

LENGTHS = (1, 63, 64, 65, 130, 257)
WINDOWS = (0, 1, 5, 63, 64, 127, None, 1000)
TIGHT = 1e-12  # float64 sums in another order

Inputs = dict[str, Tensor]


def make_inputs(
    T: int,
    *,
    B: int = 2,
    H: int = 4,
    G: int = 2,
    D: int = 8,
    Dv: int = 6,
    seed: int = 0,
    decay: bool = False,
    start: str = "",
    feature_map: str = "softmax",
) -> Inputs:
    """q, k, v and, if asked, `decay` and `initial_state` (start = "kv" or "query"): float64 leaves with gradients."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    inputs = {"q": normal(B, T, H, D), "k": normal(B, T, G, D), "v": normal(B, T, G, Dv) + 0.3}
    if decay:
        inputs["decay"] = -0.2 * normal(B, T, G).abs()
    if start:
        heads = {"kv": G, "query": H}[start]
        inputs["initial_state"] = normal(B, heads, feature_dim(feature_map, D), Dv)
    return {name: x.requires_grad_() for name, x in inputs.items()}


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """A copy: changing it leaves `inputs` alone."""
    return {name: x.detach().to(dtype, copy=True).requires_grad_() for name, x in inputs.items()}


def document_ids(lengths: list[list[int]]) -> Tensor:
    """One list of document lengths per batch row; ids skip numbers, and rows differ."""
    return torch.stack(
        [torch.repeat_interleave(3 * torch.arange(len(row)) + b, torch.tensor(row)) for b, row in enumerate(lengths)]
    )


def random_lengths(T: int, seed: int, longest: int) -> list[int]:
    gen = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := T - sum(lengths)) > 0:
        lengths.append(min(left, int(torch.randint(1, longest + 1, (), generator=gen))))
    return lengths


def relative(x: Tensor, reference: Tensor) -> float:
    x, reference = x.detach().double(), reference.detach().double()
    assert x.shape == reference.shape
    norm = reference.norm().item()
    # Where the law says zero there is nothing to be relative to.
    return (x - reference).norm().item() / (norm if norm > 0 else 1.0)


def assert_close(x: Tensor, reference: Tensor, tolerance: float, what: str = "o") -> None:
    error = relative(x, reference)
    assert error <= tolerance, f"{what}: relative error {error:.2e} > {tolerance:.0e}"


def output_gradient(o: Tensor, seed: int = 7) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(o.shape, generator=gen, dtype=torch.float64).to(o) + 0.1


def run(fn: Callable[..., Tensor], inputs: Inputs, **options) -> dict[str, Tensor]:
    """o and the gradients of every input."""
    o = fn(**inputs, **options)
    return gradients(o, inputs)


def gradients(o: Tensor, inputs: Inputs) -> dict[str, Tensor]:
    if not o.requires_grad:  # nothing was read
        return {"o": o} | {f"d{name}": torch.zeros_like(x) for name, x in inputs.items()}
    grads = torch.autograd.grad(o, list(inputs.values()), output_gradient(o), allow_unused=True, materialize_grads=True)
    return {"o": o.detach()} | {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}


def assert_same(got: dict[str, Tensor], reference: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == reference.keys()
    for what, x in got.items():
        assert_close(x, reference[what], tolerance, what)
