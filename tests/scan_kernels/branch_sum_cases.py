"""The sum of two normalized branches in float64, by loops, and inputs with rows of zeros."""

import torch
from torch import Tensor

EPS = 1e-8
SHAPES = {
    "3 heads": (2, 5, 3, 16),
    "one row": (1, 1, 1, 32),
    "many rows": (1, 300, 2, 16),
    "a block of heads": (2, 3, 40, 128),
}


def make(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    B, T, H, D = shape
    draw = {name: torch.randn(B, T, H, D, generator=generator) for name in ("a", "b", "dy")}
    draw |= {f"weight_{x}": 1 + 0.3 * torch.randn(H, D, generator=generator) for x in "ab"}
    draw["b"][:, : (T + 1) // 2, 0] = 0  # as a linear branch that nothing has left the window for
    draw["dy"][:, : (T + 1) // 2, 0] *= 1e4
    return {name: x.to(device, dtype) for name, x in draw.items()}


def expected(x: dict[str, Tensor], eps: float = EPS) -> dict[str, Tensor]:
    """y and the gradients, row by row, the gradient of x / rms(x) by its own formula."""
    wide = {name: value.double().cpu() for name, value in x.items()}
    y = torch.zeros_like(wide["a"])
    found = {f"d_{name}": torch.zeros_like(wide[name]) for name in ("a", "b", "weight_a", "weight_b")}
    for name in "ab":
        branch, weight, d_branch, d_weight = (
            wide[name],
            wide[f"weight_{name}"],
            found[f"d_{name}"],
            found[f"d_weight_{name}"],
        )
        for n, t, h in ((n, t, h) for n in range(y.shape[0]) for t in range(y.shape[1]) for h in range(y.shape[2])):
            row, dy = branch[n, t, h], wide["dy"][n, t, h]
            if not row.any():
                continue
            rms = (row.square().mean() + eps).sqrt()
            y[n, t, h] += row / rms * weight[h]
            d_weight[h] += dy * row / rms
            g = dy * weight[h]
            d_branch[n, t, h] = g / rms - row * (g * row).mean() / rms**3
    return {"y": y} | found


def solve(function, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """y and the gradients of `function(a, b, weight_a, weight_b)`."""
    names = ("a", "b", "weight_a", "weight_b")
    leaves = [x[name].detach().requires_grad_() for name in names]
    y = function(*leaves)
    grads = torch.autograd.grad(y, leaves, x["dy"])
    return {"y": y.detach()} | {f"d_{name}": grad for name, grad in zip(names, grads, strict=True)}
