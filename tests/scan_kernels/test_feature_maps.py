import pytest
import torch

from scan_kernels import FeatureMap, apply_feature_map, available_feature_maps, feature_dim


def by_hand(x, name):
    if name == "softmax":
        return torch.cat((x.exp() / x.exp().sum(-1, True), (-x).exp() / (-x).exp().sum(-1, True)), -1)
    if name == "relu":
        return torch.cat((x.clamp(min=0), (-x).clamp(min=0)), -1)
    if name == "softmax_single":
        return x.exp() / x.exp().sum(-1, True)
    return x


@pytest.mark.parametrize("name", available_feature_maps())
def test_formula_width_and_gradient(name):
    x = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    phi = apply_feature_map(x, name)
    assert phi.shape == (3, 5, feature_dim(name, 8))
    torch.testing.assert_close(phi, by_hand(x, name), rtol=1e-14, atol=1e-16)
    assert torch.autograd.gradcheck(lambda x: apply_feature_map(x, name), (x,))


@pytest.mark.parametrize("name", available_feature_maps())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fp32_and_finite_for_large_inputs(name, dtype):
    phi = apply_feature_map(torch.tensor([[50.0, -50.0, 0.0, 49.0]]).to(dtype), name)
    assert phi.dtype == torch.float32
    assert phi.isfinite().all()


def test_relu_has_no_gradient_at_zero():
    x = torch.zeros(4, requires_grad=True)
    apply_feature_map(x, "relu").sum().backward()
    assert (x.grad == 0).all()


def test_names():
    assert available_feature_maps() == ("softmax", "relu", "softmax_single", "identity")
    assert feature_dim(FeatureMap.RELU, 16) == 32
    with pytest.raises(ValueError, match="must be one of softmax, relu, softmax_single, identity, got 'elu'"):
        feature_dim("elu", 16)
