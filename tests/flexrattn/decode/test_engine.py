"""Continuous batching: what joins, leaves, waits or is cancelled changes nobody else's tokens.

FLEXRATTN_SOAK=10000 runs the soak with that many requests.
"""

from __future__ import annotations

import gc
import os
import random

import pytest
import torch

from flexrattn.decode.engine import Engine, Finish
from flexrattn.decode.prompt import prefill
from flexrattn.decode.sampling import Sampling
from tests.flexrattn.decode.models import VOCAB, build, full_forward, random_tokens


def requests(n: int, seed: int = 0, longest: int = 20):
    """(prompt, max_new_tokens, sampling) of random lengths, drawn in three ways."""
    rng = random.Random(seed)
    kinds = ({}, {"temperature": 1.0}, {"temperature": 0.7, "top_k": 9, "top_p": 0.8})
    made = []
    for i in range(n):
        prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))]
        made.append((prompt, rng.randint(1, longest), Sampling(seed=rng.randrange(2**63), **kinds[i % 3])))
    return made


def alone(model, prompt, new, sampling) -> list[int]:
    engine = Engine(model, slots=1, max_length=64)
    engine.add(prompt, max_new_tokens=new, sampling=sampling)
    (tokens,) = engine.run().values()
    return tokens


def test_greedy_is_the_full_forwards_likeliest():
    model = build()
    prompt = random_tokens(11).tolist()
    tokens = alone(model, prompt, 12, None)
    row = torch.tensor([prompt + tokens])
    assert full_forward(model, row)[0, 10:-1].argmax(-1).tolist() == tokens


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_beside_others_as_alone(lag):
    """Seven requests over three slots, with prompts of several chunks."""
    model = build()
    made = requests(7)
    engine = Engine(model, slots=3, max_length=64, lag=lag, prefill_chunk=8, fold_every=2)
    ids = [engine.add(prompt, max_new_tokens=new, sampling=sampling) for prompt, new, sampling in made]
    tokens = engine.run()
    assert [tokens[id] for id in ids] == [alone(model, *request) for request in made]
    assert engine.free_slots == 3


def test_requests_join_between_steps():
    model = build()
    made = requests(6, seed=3)
    engine = Engine(model, slots=2, max_length=64)
    tokens: dict[int, list[int]] = {}
    ids = []
    for request in made:
        ids.append(engine.add(request[0], max_new_tokens=request[1], sampling=request[2]))
        for output in engine.step():
            tokens.setdefault(output.id, []).append(output.token)
    while engine.busy:
        for output in engine.step():
            tokens.setdefault(output.id, []).append(output.token)
    assert [tokens[id] for id in ids] == [alone(model, *request) for request in made]


@pytest.mark.parametrize("lag", [0, 2])
def test_cancel(lag):
    model = build()
    made = requests(4, seed=5)
    engine = Engine(model, slots=1, max_length=64, lag=lag)
    ids = [engine.add(prompt, max_new_tokens=30, sampling=sampling) for prompt, _, sampling in made]
    for _ in range(3):
        engine.step()
    assert engine.cancel(ids[0])  # it runs
    assert engine.cancel(ids[2])  # it waits
    assert not engine.cancel(ids[0])
    assert not engine.cancel(99)
    ended = [output.id for output in engine.step() if output.finish is Finish.CANCELLED]
    assert ended == [ids[0], ids[2]]
    tokens = engine.run()
    # The step above has returned tokens of the second request, too.
    for i in (1, 3):
        expected = alone(model, made[i][0], 30, made[i][2])
        assert tokens[ids[i]] == expected[len(expected) - len(tokens[ids[i]]) :]
        assert len(tokens[ids[i]]) >= 28


@pytest.mark.parametrize("lag", [0, 2])
def test_stops(lag):
    model = build()
    prompt = random_tokens(9).tolist()
    expected = alone(model, prompt, 20, Sampling(temperature=1.0, seed=4))
    stop_at = next(i for i in range(3, 20) if expected[i] not in expected[:i])
    for how in ("end_ids", "stop"):
        engine = Engine(model, slots=2, max_length=64, lag=lag)
        given = {"end_ids": [expected[stop_at]]} if how == "end_ids" else {"stop": expected[stop_at].__eq__}
        engine.add(prompt, max_new_tokens=20, sampling=Sampling(temperature=1.0, seed=4), **given)
        outputs = []
        while engine.busy:
            outputs += engine.step()
        assert [output.token for output in outputs] == expected[: stop_at + 1]
        assert outputs[-1].finish is Finish.STOP


def test_a_full_cache_ends_a_request():
    engine = Engine(build(), slots=1, max_length=16)
    engine.add(random_tokens(10).tolist(), max_new_tokens=100)
    (tokens,) = engine.run().values()
    assert len(tokens) == 6


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "the prompt is empty"),
        (list(range(16)), {}, "the prompt has 16 tokens, the limit is 16 with at least one new token"),
        ([1, VOCAB], {}, "token 64, the model's vocabulary is 0 to 63"),
        ("abc", {}, "the prompt must be a row of token ids, got 'abc'"),
        ([1, 2.5], {}, "the prompt must be a row of token ids"),
        (torch.tensor([[1, 2]]), {}, r"the prompt must be a row of token ids, got a tensor \(1, 2\)"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens must be a whole number, 1 or more, got 0"),
        ([1], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number, 1 or more, got 2.5"),
        ([1], {"end_ids": 5}, "end_ids must be a row of token ids, got 5"),
        ([1], {"stop": "\n"}, "stop must be called with each token"),
        ([1], {"sampling": {"temperature": 1}}, "sampling must be a Sampling"),
    ],
)
def test_refused_requests_leave_the_engine_as_it_was(prompt, options, message):
    engine = Engine(build(), slots=1, max_length=16)
    with pytest.raises(ValueError, match=message):
        engine.add(prompt, **{"max_new_tokens": 5, **options})
    assert not engine.busy


@pytest.mark.parametrize(
    "options", [{"slots": 0}, {"lag": -1}, {"prefill_rows": 0}, {"prefill_chunk": 0}, {"slots": 2.0}], ids=str
)
def test_an_engine_that_could_not_run_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be a whole number"):
        Engine(build(), **{"slots": 1, "max_length": 16, **options})


@pytest.mark.parametrize("lag", [0, 2])
def test_a_stop_condition_that_raises_ends_its_request_alone(lag):
    model = build()
    made = requests(3, seed=7)
    engine = Engine(model, slots=3, max_length=64, lag=lag)

    def breaks(token: int) -> bool:
        raise RuntimeError("a bug of the caller")

    broken = engine.add(made[0][0], max_new_tokens=9, stop=breaks)
    ids = [engine.add(prompt, max_new_tokens=new, sampling=sampling) for prompt, new, sampling in made[1:]]
    outputs, raised = [], 0
    while engine.busy:
        try:
            outputs += engine.step()
        except RuntimeError:
            raised += 1
    assert raised == 1
    assert [output.finish for output in outputs if output.id == broken] == [Finish.CANCELLED]
    for id, request in zip(ids, made[1:], strict=True):
        assert [output.token for output in outputs if output.id == id] == alone(model, *request)
    assert engine.free_slots == 3


def test_a_prefill_that_fails_is_tried_again(monkeypatch):
    """Out of memory in the second chunk, when a short prompt has drawn its first token already."""
    model = build()
    made = [(random_tokens(n, seed=n).tolist(), 9, Sampling(temperature=1.0, seed=n)) for n in (3, 12, 5)]
    engine = Engine(model, slots=3, max_length=64, lag=1, prefill_chunk=8)
    first = engine.add(made[0][0], max_new_tokens=9, sampling=made[0][2])
    outputs = engine.step()
    ids = [first, *(engine.add(prompt, max_new_tokens=new, sampling=how) for prompt, new, how in made[1:])]
    calls = []

    def fails(*args, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return prefill(*args, **options)

    monkeypatch.setattr("flexrattn.decode.engine.prefill", fails)
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert (engine.queued, engine.free_slots) == (2, 2)
    while engine.busy:
        outputs += engine.step()
    for id, request in zip(ids, made, strict=True):
        assert [output.token for output in outputs if output.id == id] == alone(model, *request)


def test_soak():
    """Random requests come, wait, are cancelled and end; none is lost, and nothing is left behind."""
    total = int(os.environ.get("FLEXRATTN_SOAK", "150"))
    model = build(dtype=torch.float32)
    engine = Engine(model, slots=32, max_length=48, lag=1, fold_every=4)
    rng = random.Random(0)
    made = iter(requests(total, seed=1))
    wanted: dict[int, int] = {}
    received: dict[int, int] = {}
    finished: dict[int, Finish] = {}
    tensors = 0
    exhausted = False
    while engine.busy or not exhausted:
        for _ in range(rng.randint(0, 20)):
            request = next(made, None)
            if request is None:
                exhausted = True
                break
            id = engine.add(request[0], max_new_tokens=request[1], sampling=request[2])
            wanted[id], received[id] = request[1], 0
        if rng.random() < 0.3 and wanted:
            engine.cancel(rng.choice(list(wanted)[-40:]))
        for output in engine.step():
            assert output.id not in finished
            received[output.id] += output.token is not None
            if output.finish is not None:
                finished[output.id] = output.finish
        if len(finished) > total // 4 and not tensors:
            tensors = _live_tensors()
    assert len(wanted) == total
    assert set(finished) == set(wanted)
    for id, why in finished.items():
        assert why is Finish.CANCELLED or received[id] == wanted[id]
    assert sum(why is Finish.CANCELLED for why in finished.values()) > total // 100
    assert (engine.free_slots, engine.queued, len(engine._alive), len(engine._reads)) == (32, 0, 0, 0)
    assert _live_tensors() <= tensors + 4


def _live_tensors() -> int:
    gc.collect()
    return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
