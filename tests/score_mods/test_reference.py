import pytest
import torch
import torch.nn.functional as F

from score_mods import all_of, causal, dense_mask, document, reference_attention, sliding_window

B, T, H, G, D, DV = 2, 13, 4, 2, 8, 6
IDS = torch.tensor([[0] * 5 + [1] * 8, [0] * 1 + [1] * 12])


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = ((B, T, H, D), (B, T, G, D), (B, T, G, DV))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_reference_equals_sdpa(scale):
    q, k, v = inputs()
    mask = dense_mask(all_of(sliding_window(3), document(IDS)), batch=B, q_len=T, kv_len=T, device="cpu")
    rows = (x.transpose(1, 2) for x in (q, k, v))
    sdpa = F.scaled_dot_product_attention(*rows, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
    out = reference_attention(q, k, v, mask, scale=scale)
    assert (out - sdpa).norm() / sdpa.norm() < 1e-12


def test_reference_equals_a_loop():
    q, k, v = inputs()
    out = reference_attention(q, k, v, dense_mask(sliding_window(3), q_len=T, kv_len=T, device="cpu"))
    for h in range(H):
        for t in range(T):
            low, g = max(0, t - 3), h // (H // G)
            weights = torch.softmax(k[0, low : t + 1, g] @ q[0, t, h] / D**0.5, dim=0)
            assert torch.allclose(out[0, t, h], weights @ v[0, low : t + 1, g], rtol=1e-12, atol=0)


def test_queries_that_may_read_nothing_give_zeros_and_no_nan_gradients():
    q, k, v = (x.requires_grad_() for x in inputs())
    mask = dense_mask(causal(), q_len=T, kv_len=T, device="cpu").clone()
    mask[..., 4, :] = False
    out = reference_attention(q, k, v, mask)
    assert (out[:, 4] == 0).all()
    assert (out[:, 5] != 0).all()
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_scores_of_any_size_stay_finite():
    q, k, v = inputs()
    out = reference_attention(1e4 * q, k, v, dense_mask(causal(), q_len=T, kv_len=T, device="cpu"))
    assert out.isfinite().all()


def test_bad_input_is_refused():
    q, k, v = inputs()
    mask = dense_mask(causal(), q_len=T, kv_len=T, device="cpu")
    with pytest.raises(ValueError, match="query heads must be a multiple of KV heads, got 3 and 2"):
        reference_attention(q[:, :, :3], k, v, mask)
    with pytest.raises(ValueError, match=r"mask must be boolean, got torch\.float32"):
        reference_attention(q, k, v, mask.float())
