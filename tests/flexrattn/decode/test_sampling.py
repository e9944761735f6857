"""The draw: its distribution, its filters, and that it depends on seed and position alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexrattn.decode.sampling import Mode, Sampling, SamplingRows, sample, uniform, widest

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0, -torch.inf])


def draws(sampling: Sampling, n: int = 20000) -> torch.Tensor:
    rows = SamplingRows(1, torch.device("cpu"))
    rows.set(0, sampling)
    many = rows.of(torch.zeros(n, dtype=torch.long))
    return sample(LOGITS.expand(n, -1), many, torch.arange(n), sampling.mode)


def shares(tokens: torch.Tensor) -> torch.Tensor:
    return torch.bincount(tokens, minlength=len(LOGITS)) / len(tokens)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = torch.softmax(LOGITS / temperature, -1)
    # Five standard errors.
    assert (shares(draws(Sampling(temperature=temperature))) - expected).abs().max() < 5 * 0.5 / 20000**0.5


def test_filters():
    p = torch.softmax(LOGITS, -1)
    for options, kept in (
        ({"top_k": 2}, [0, 3]),
        ({"top_p": 0.5}, [0]),
        ({"top_p": float(p[0]) + 0.01}, [0, 3]),
        ({"top_k": 1, "top_p": 0.9}, [0]),
        ({"top_k": 100}, [0, 1, 2, 3, 4]),
    ):
        expected = torch.zeros(len(LOGITS))
        expected[kept] = p[kept] / p[kept].sum()
        got = shares(draws(Sampling(temperature=1.0, **options)))
        assert (got > 0).nonzero()[:, 0].tolist() == kept, options
        assert (got - expected).abs().max() < 5 * 0.5 / 20000**0.5


def test_uniform_numbers():
    u = uniform(torch.full((100000,), 3), torch.arange(100000))
    assert 0 <= float(u.min()) < 1e-3
    assert 1 - 1e-3 < float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * 0.29 / 100000**0.5
    assert len(u.unique()) == 100000
    correlation = torch.corrcoef(torch.stack((u[:-1], u[1:])))[0, 1]
    assert abs(float(correlation)) < 0.02
    other = uniform(torch.full((100000,), 4), torch.arange(100000))
    assert abs(float(torch.corrcoef(torch.stack((u, other)))[0, 1])) < 0.02


def test_a_draw_does_not_depend_on_its_neighbours():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, generator=gen)
    settings = [
        Sampling(),
        Sampling(temperature=1.0, seed=2**63 - 1),
        Sampling(temperature=0.5, top_k=5, seed=1),
        Sampling(temperature=1.5, top_p=0.7, seed=1),
        Sampling(temperature=1.0, seed=0),
    ]
    rows = SamplingRows(5, torch.device("cpu"))
    for i, setting in enumerate(settings):
        rows.set(i, setting)
    position = torch.tensor([3, 0, 7, 7, 100000])
    together = sample(logits, rows, position, widest([s.mode for s in settings]))
    for i, setting in enumerate(settings):
        index = torch.tensor([i])
        single = sample(logits[index], rows.of(index), position[index], setting.mode)
        assert together[i] == single[0], setting
    assert together[0] == logits[0].argmax()


def test_widest():
    assert [widest(list(pair)) for pair in itertools.product([Mode.GREEDY, Mode.FILTERED], [Mode.PLAIN])] == [
        Mode.PLAIN,
        Mode.FILTERED,
    ]
    assert widest([]) is Mode.GREEDY


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"temperature": float("nan")}, "temperature must be 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p must be above 0 and at most 1"),
        ({"seed": -1}, "seed must be a whole number"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
