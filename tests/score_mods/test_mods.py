"""Every score mod against its law as a loop, in dense attention, and its gradients."""

import math

import pytest
import torch

from score_mods import (
    ScoreInfo,
    apply_score_mod,
    available_score_mods,
    causal,
    dense_attention,
    dense_mask,
    describe_score,
    make_score_mod,
    reference_attention,
    relative_bias,
    required_arguments,
    score_info,
    sliding_window,
)
from score_mods.mods.relative_bias import bucket_widths
from tests.closeness import relative_error
from tests.score_mods.catalogue import HEADS, SCORE_MODS, alibi_slopes, bucket

T, D = 31, 8


def scores(dtype=torch.float64):
    return torch.randn(2, HEADS, T, T, generator=torch.Generator().manual_seed(0), dtype=dtype) * 3


def looped(law, given):
    out = torch.empty_like(given)
    for b, h, t, j in torch.cartesian_prod(*(torch.arange(n) for n in given.shape)).tolist():
        out[b, h, t, j] = law(float(given[b, h, t, j]), h, t, j)
    return out


def test_every_score_mod_is_looked_at():
    assert set(SCORE_MODS) == set(available_score_mods())


def test_soft_cap():
    given = scores()
    expected = looped(lambda s, h, t, j: 2.0 * math.tanh(s / 2.0), given)
    assert relative_error(apply_score_mod(make_score_mod("soft_cap", cap=2.0), given), expected) < 1e-12


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12])
def test_alibi(heads):
    slopes = alibi_slopes(heads)
    given = torch.randn(1, heads, 9, 9, dtype=torch.float64)
    expected = looped(lambda s, h, t, j: s - slopes[h] * abs(t - j), given)
    # The slopes are fp32, as the scores of a kernel are.
    assert relative_error(apply_score_mod(make_score_mod("alibi", heads=heads), given), expected) < 1e-6


@pytest.mark.parametrize(("buckets", "max_distance"), [(8, 20), (32, 128), (2, 5), (8, 5)])
def test_relative_bias(buckets, max_distance):
    table = torch.randn(HEADS, buckets, dtype=torch.float64)
    given = scores()
    expected = looped(lambda s, h, t, j: s + float(table[h, bucket(t - j, buckets, max_distance)]), given)
    found = apply_score_mod(relative_bias(HEADS, buckets, max_distance, table), given)
    assert relative_error(found, expected) < 1e-12
    assert sum(bucket_widths(buckets, max_distance)) == max_distance + 1


@pytest.mark.parametrize("name", SCORE_MODS)
def test_dense_attention_equals_the_reference(name):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, T, D, generator=generator) for heads in (HEADS, 2, 2))
    score_mod = make_score_mod(name, **SCORE_MODS[name])
    mask = dense_mask(sliding_window(6), q_len=T, kv_len=T, device="cpu").clone()
    mask[..., 4, :] = False
    for x in (q, k, v):
        x.requires_grad_()
    o = dense_attention(q, k, v, mask=mask, score_mod=score_mod)
    plain = reference_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, score_mod=score_mod).transpose(1, 2)
    assert relative_error(o, plain) < 1e-5
    assert (o[:, :, 4] == 0).all()
    do = torch.randn(o.shape, generator=generator)
    for found, wanted in zip(
        torch.autograd.grad(o, (q, k, v), do), torch.autograd.grad(plain, (q, k, v), do.double()), strict=True
    ):
        assert relative_error(found, wanted) < 1e-5


def test_the_table_of_a_relative_bias_is_learned():
    q, k, v = (torch.randn(1, heads, 7, D, dtype=torch.float64) for heads in (2, 1, 1))
    mask = dense_mask(causal(), q_len=7, kv_len=7, device="cpu")

    def attend(table):
        return dense_attention(q, k, v, mask=mask, score_mod=relative_bias(2, 4, 5, table))

    assert torch.autograd.gradcheck(attend, torch.randn(2, 4, dtype=torch.float64, requires_grad=True))
    info = score_info(relative_bias(2, 4, 5))
    table = torch.randn(2, 4, dtype=torch.float64)
    bound = dense_attention(q, k, v, mask=mask, score_mod=info.bind(table))
    assert info.table_shape == (2, 4)
    assert torch.equal(bound, attend(table))


def test_zeros_are_no_bias():
    given = scores()
    assert torch.equal(apply_score_mod(relative_bias(HEADS), given), given)


BAD = {
    "unknown": ("softcap", {"cap": 3}, r"unknown score mod 'softcap' \(did you mean 'soft_cap'\?\): known are alibi"),
    "cap": ("soft_cap", {"cap": 0}, r"cap must be a number above 0 \(bound of the scores\), got 0"),
    "cap text": ("soft_cap", {"cap": "50"}, r"got '50' \(str\)"),
    "heads": ("alibi", {"heads": 0}, "heads must be >= 1"),
    "missing": ("alibi", {}, "score mod 'alibi' takes heads: int, given no arguments"),
    "odd": ("relative_bias", {"heads": 2, "buckets": 7}, "buckets must be even"),
    "near": ("relative_bias", {"heads": 2, "buckets": 8, "max_distance": 4}, "max_distance must be >= 5"),
    "table": (
        "relative_bias",
        {"heads": 2, "table": torch.zeros(2, 3)},
        r"table must be .* got torch.float32 \(2, 3\)",
    ),
}


@pytest.mark.parametrize(("name", "args", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(name, args, message):
    with pytest.raises(ValueError, match=message):
        make_score_mod(name, **args)


WRONG = {
    "a mask": (lambda b, h, q, k: k <= q, r"a score mod is a function of .* \(four arguments make a mask"),
    "nothing": (None, "got None"),
    "a number": (lambda s, b, h, q, k: 3.0, r"a score mod returns a tensor, got 3.0 \(float\)"),
    "a bool": (lambda s, b, h, q, k: k <= q, "returns a floating-point score, got torch.bool"),
    "a row": (lambda s, b, h, q, k: s * torch.ones(4), r"one score for one score, got shape \(4,\)"),
    "an error": (lambda s, b, h, q, k: s + undefined, "NameError: name 'undefined'"),  # noqa: F821
    "control flow": (lambda s, b, h, q, k: s if k <= q else -s, "it fails for the first 8 queries and keys"),
}


@pytest.mark.parametrize(("made", "message"), WRONG.values(), ids=WRONG)
def test_a_users_factory_that_returns_the_wrong_thing(made, message, monkeypatch):
    monkeypatch.setattr("tests.score_mods.test_mods.user_factory", lambda: made)
    with pytest.raises(ValueError, match=message) as raised:
        make_score_mod("tests.score_mods.test_mods:user_factory")
    assert "returned the wrong thing" in str(raised.value)
    assert "\n" not in str(raised.value)


def user_factory():
    return lambda score, b, h, q_idx, kv_idx: score * 2


def test_a_users_factory_is_imported():
    given = scores()
    assert torch.equal(apply_score_mod(make_score_mod("tests.score_mods.test_mods:user_factory"), given), given * 2)


def test_required_arguments():
    assert required_arguments("score mod", "relative_bias") == ("heads",)
    assert required_arguments("mask", "attention_sink") == ("sinks", "window")
    assert required_arguments("mask", "causal") == ()


def test_a_table_needs_bind():
    with pytest.raises(ValueError, match="table_shape and bind go together"):
        describe_score(lambda s, b, h, q, k: s, ScoreInfo(name="mine", table_shape=(2, 3)))
