import pytest
import torch

from scan_kernels.ops import chunk_state_scan, chunk_state_scan_bwd


def make(N=4, factor=True):
    gen = torch.Generator().manual_seed(0)
    update = torch.randn(2, 1, N, 3, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    first = torch.randn(2, 1, 3, 2, generator=gen, dtype=torch.float64, requires_grad=True)
    factors = torch.rand(2, 1, N, generator=gen, dtype=torch.float64, requires_grad=True) if factor else None
    return update, first, factors


@pytest.mark.parametrize("factor", [False, True], ids=["no factor", "factor"])
def test_recurrence_and_gradient(factor):
    update, first, factors = make(factor=factor)
    states = chunk_state_scan(update, first, factors)
    state = first
    for n in range(4):
        assert torch.equal(states[:, :, n], state)
        state = state * (1 if factors is None else factors[:, :, n, None, None]) + update[:, :, n]
    assert torch.equal(states[:, :, 4], state)
    inputs = (update, first) if factors is None else (update, first, factors)
    assert torch.autograd.gradcheck(lambda *x: chunk_state_scan(*x, *(None,) * (3 - len(x))), inputs)


@pytest.mark.parametrize("factor", [False, True], ids=["no factor", "factor"])
def test_opcheck(factor):
    update, first, factors = make(factor=factor)
    torch.library.opcheck(chunk_state_scan, (update, first, factors))
    with torch.no_grad():
        torch.library.opcheck(chunk_state_scan_bwd, (chunk_state_scan(update, first, factors), factors))


def test_a_factor_of_zero_stops_nan():
    update, first, _ = make()
    factors = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).expand(2, 1, 4).clone().requires_grad_()
    with torch.no_grad():
        update[:, :, 0] = torch.nan
    states = chunk_state_scan(update, first, factors)
    assert states[:, :, 1].isnan().all()
    assert states[:, :, 2:].isfinite().all()
    grads = torch.autograd.grad(states[:, :, 2:].sum(), (update, first, factors))
    assert all(grad.isfinite().all() for grad in grads)


def test_no_row_is_left_unwritten():
    update, first, factors = make()
    expected = chunk_state_scan(update, first, factors)
    # In this mode torch fills new memory with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        states = chunk_state_scan(update, first, factors)
        back = chunk_state_scan_bwd(torch.ones_like(states), factors)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(states, expected)
    assert back.isfinite().all()
