"""The law of decoding: any split of a sequence into prefills and steps gives the logits of the full forward."""

from __future__ import annotations

import pytest
import torch

from flexrattn.decode import DecodeCache, decode_step, prefill
from scan_kernels import sum_of_head_norms
from tests.closeness import relative_error
from tests.flexrattn.decode.models import build, full_forward, random_tokens

T = 23
# RoPE rounds q and k to fp32 in torchtitan, whatever the model's dtype, and keys are turned back from there.
TOLERANCE = 2e-6
KINDS = {
    "rattention": {},
    "relu": {"feature_map": "relu"},
    "window 0": {"window": 0},
    "wide window": {"window": 40},
    "linear only": {"window": None},
    "linear only, options": {"window": None, "learned_initial_state": True, "learned_qk_scale": True},
    "options": {"learned_initial_state": True, "learned_qk_scale": True},
    "no norms": {"branch_norm": False},
    "global rope": {"global_rope": True},
    "swa": {"layer_kind": "swa"},
    "full": {"layer_kind": "full", "window": None},
    "sinks": {"layer_kind": "swa", "local_mask": {"attention_sink": {"sinks": 2}}},
    "drawn windows": {"local_mask": {"stochastic_window": {"low": 0, "high": 20}}},
    "by layer": {
        "layer_kind": "swa",
        "layer_masks": {"0": {"chunked": {"chunk": 4}}, "1": {"strided": {"stride": 3}}},
    },
    "own mask": {
        "layer_kind": "swa",
        "window": None,
        "local_mask": "tests.flexrattn.decode.models:position_parity",
        "global_mask": "sliding_window",
        "global_mask_args": {"window": 9},
    },
}


def new_cache(model, rows=1, max_length=64, fold_every=1) -> DecodeCache:
    weight = model.norm.weight
    return DecodeCache(
        model.config,
        rows=rows,
        max_length=max_length,
        device=weight.device,
        dtype=weight.dtype,
        fold_every=fold_every,
    )


def steps(model, cache, tokens, active=None):
    """Logits (B, n, V) of n steps."""
    return torch.stack([decode_step(model, cache, tokens[:, i], active) for i in range(tokens.shape[1])], dim=1)


@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_split_point(kind, fold_every):
    model = build(**KINDS[kind])
    tokens = random_tokens(2, T)
    expected = full_forward(model, tokens)
    cache = new_cache(model, rows=2, fold_every=fold_every)
    for cut in range(T + 1):
        cache.reset([0, 1])
        parts = []
        if cut:
            parts.append(prefill(model, cache, tokens[:, :cut], rows=[0, 1], all_logits=True))
        if cut < T:
            parts.append(steps(model, cache, tokens[:, cut:]))
        assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE, cut


@pytest.mark.parametrize("fold_every", [1, 4])
@pytest.mark.parametrize("kind", ["rattention", "options", "linear only", "swa", "own mask"])
def test_prefill_in_pieces(kind, fold_every):
    """Prefill behind a prefill, and behind steps."""
    model = build(**KINDS[kind])
    tokens = random_tokens(1, T)
    expected = full_forward(model, tokens)
    for first, second in ((1, 5), (1, 17), (5, 7), (6, 17)):
        for middle in ("prefill", "steps"):
            cache = new_cache(model, fold_every=fold_every)
            parts = [prefill(model, cache, tokens[:, :first], rows=[0], all_logits=True)]
            if middle == "prefill":
                parts.append(prefill(model, cache, tokens[:, first:second], rows=[0], all_logits=True))
            else:
                parts.append(steps(model, cache, tokens[:, first:second]))
            parts.append(prefill(model, cache, tokens[:, second:20], rows=[0], all_logits=True))
            parts.append(steps(model, cache, tokens[:, 20:]))
            assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE, (first, second, middle)


def test_float32():
    model = build(dtype=torch.float32)
    tokens = random_tokens(1, 150)
    expected = full_forward(model.double(), tokens)
    model.float()
    cache = new_cache(model, max_length=150, fold_every=4)
    got = torch.cat(
        [prefill(model, cache, tokens[:, :40], rows=[0], all_logits=True), steps(model, cache, tokens[:, 40:])], 1
    )
    assert relative_error(got, expected) < 1e-5
    assert all(layer.state_BGFD is None or layer.state_BGFD.dtype == torch.float32 for layer in cache.layers)


@pytest.mark.parametrize("fold_every", [1, 3])
@pytest.mark.parametrize("kind", ["rattention", "options", "linear only", "swa"])
def test_rows_of_different_lengths(kind, fold_every):
    """Left-aligned rows, rows that rest, and a second prefill of rows that are at different places."""
    model = build(**KINDS[kind])
    counts, more = [1, 6, 19, 8], [9, 3, 1, 12]
    tokens = random_tokens(4, 40)
    cache = new_cache(model, rows=6, fold_every=fold_every)
    rows = [4, 0, 5, 2]
    seen = [tokens[i, :n] for i, n in enumerate(counts)]

    def check(logits, case):
        for i, row in enumerate(seen):
            expected = full_forward(model, row[None])[0, -1]
            assert relative_error(logits[i], expected) < TOLERANCE, (case, i)

    check(prefill(model, cache, tokens[:, :19], rows=rows, counts=counts), "first")
    active = torch.zeros(6, dtype=torch.bool)
    active[rows] = True
    for i in range(9):
        new = random_tokens(6, seed=100 + i)
        active[5] = i % 3 != 1  # a row that rests now and then
        logits = decode_step(model, cache, new, active)[rows]
        for j, row in enumerate(rows):
            if active[row]:
                seen[j] = torch.cat((seen[j], new[row : row + 1]))
            else:
                logits[j] = full_forward(model, seen[j][None])[0, -1]
        check(logits, i)
    new = random_tokens(4, 12, seed=7)
    seen = [torch.cat((row, new[i, : more[i]])) for i, row in enumerate(seen)]
    check(prefill(model, cache, new, rows=rows, counts=more), "second")
    new = random_tokens(6, seed=8)
    seen = [torch.cat((row, new[j : j + 1])) for row, j in zip(seen, rows, strict=True)]
    active[5] = True
    check(decode_step(model, cache, new, active)[rows], "last")


@pytest.mark.parametrize("kind", ["rattention", "options", "linear only", "swa", "own mask"])
def test_documents(kind):
    """Packed documents in a prefill; the last one goes on, also in a second prefill that packs further ones."""
    model = build(**KINDS[kind])
    tokens = random_tokens(2, 40)
    lengths = ([9, 1, 12, 18], [1, 20, 2, 17])
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    expected = full_forward(model, tokens, positions)
    for first, second in ((8, 9), (10, 16), (5, 30), (21, 24)):
        cache = new_cache(model, rows=2, fold_every=2)
        parts = [
            prefill(model, cache, tokens[:, :first], rows=[0, 1], positions=positions[:, :first], all_logits=True),
            prefill(
                model,
                cache,
                tokens[:, first:second],
                rows=[0, 1],
                positions=positions[:, first:second],
                all_logits=True,
            ),
        ]
        for i in range(second, 40):
            starts = (positions[:, i] == 0).nonzero()[:, 0]
            if len(starts):
                cache.reset(starts)
            parts.append(decode_step(model, cache, tokens[:, i])[:, None])
        assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE, (first, second)


def test_documents_in_rows_of_different_lengths():
    model = build(learned_initial_state=True)
    tokens = random_tokens(2, 30)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([9, 21], [4, 3, 23])])
    counts = [30, 16]  # the second row's last document goes on where other ones start behind its end
    positions[1, 20:] = torch.arange(10)
    cache = new_cache(model, rows=2)
    got = prefill(model, cache, tokens, rows=[0, 1], counts=counts, positions=positions)
    assert cache.lengths_B.tolist() == [21, 9]
    more = random_tokens(2, seed=9)
    after = decode_step(model, cache, more)
    for i, n in enumerate(counts):
        row, at = tokens[i : i + 1, :n], positions[i : i + 1, :n]
        assert relative_error(got[i], full_forward(model, row, at)[0, -1]) < TOLERANCE
        row, at = torch.cat((row, more[i].view(1, 1)), dim=1), torch.cat((at, at[:, -1:] + 1), dim=1)
        assert relative_error(after[i], full_forward(model, row, at)[0, -1]) < TOLERANCE


def test_a_full_row_can_rest():
    """Also at the model's limit, where its next position has no rotation."""
    model = build(model={"max_seq_len": 20})
    cache = new_cache(model, rows=2, max_length=20, fold_every=2)
    prefill(model, cache, random_tokens(2, 20), rows=[0, 1], counts=[20, 7])
    before = [x[0].clone() for layer in cache.layers for x in layer.tensors().values()]
    decode_step(model, cache, random_tokens(2), torch.tensor([False, True]))
    after = [x[0] for layer in cache.layers for x in layer.tensors().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert cache.lengths_B.tolist() == [20, 8]


def test_short_calls_filled_up(monkeypatch):
    """As on a GPU: nothing sees what a call is filled up with."""
    monkeypatch.setattr("flexrattn.decode.prompt._shortest", lambda device: 32)
    model = build(learned_initial_state=True)
    tokens = random_tokens(2, 20)
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([9, 11], [4, 16])])
    expected = full_forward(model, tokens, positions)
    cache = new_cache(model, rows=2)
    parts = [
        prefill(model, cache, tokens[:, a:b], rows=[0, 1], positions=positions[:, a:b], all_logits=True)
        for a, b in ((0, 3), (3, 12), (12, 17))
    ]
    parts.append(steps(model, cache, tokens[:, 17:]))
    assert relative_error(torch.cat(parts, dim=1), expected) < TOLERANCE


def test_what_follows_a_row_is_never_read():
    model = build()
    tokens = random_tokens(1, 20)
    cache = new_cache(model)
    expected = prefill(model, cache, tokens[:, :9], rows=[0], counts=[9])
    states = [layer.state_BGFD.clone() for layer in cache.layers if layer.state_BGFD is not None]
    cache.reset([0])
    got = prefill(model, cache, tokens, rows=[0], counts=[9])
    assert relative_error(got, expected) < 1e-12
    now = [layer.state_BGFD for layer in cache.layers if layer.state_BGFD is not None]
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(now, states, strict=True))


def test_a_perturbed_cache_is_seen():
    """The law can fail: one wrong key inside the window, or one state, changes the logits."""
    model = build()
    tokens = random_tokens(1, T)
    expected = full_forward(model, tokens)[:, -1]
    for name in ("k_BGSD", "v_BGSD", "state_BGFD"):
        cache = new_cache(model)
        prefill(model, cache, tokens[:, :-1], rows=[0])
        tensor = getattr(cache.layers[0], name)
        tensor[0, 1, 2] += 0.1
        assert relative_error(decode_step(model, cache, tokens[:, -1]), expected) > 100 * TOLERANCE, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rows": [0, 0]}, "rows must be different"),
        ({"rows": [0, 2]}, "from 0 to 1"),
        ({"counts": [0, 3]}, "counts must be 2 numbers from 1 to 10"),
        ({"positions": torch.arange(1, 11).expand(2, 10)}, "count on from the row's length"),
        ({"positions": torch.zeros(2, 9, dtype=torch.long)}, "shape of the tokens"),
    ],
)
def test_prefill_refuses(arguments, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        prefill(model, new_cache(model, rows=2), random_tokens(2, 10), **{"rows": [0, 1], **arguments})


def test_no_room_is_refused():
    model = build()
    with pytest.raises(ValueError, match="10 tokens do not fit into a cache of max_length 9"):
        prefill(model, new_cache(model, max_length=9), random_tokens(1, 10), rows=[0])
    with pytest.raises(ValueError, match=r"max_length 300 is more than the model's max_seq_len 256"):
        new_cache(model, max_length=300)


def test_prefill_ends_a_layer_as_training_does(monkeypatch):
    """Both norms and the sum in the one operation that has a kernel, once a layer with two branches."""
    seen = []

    def watched(*branches, **options):
        seen.append(options["impl"])
        return sum_of_head_norms(*branches, **options)

    monkeypatch.setattr("flexrattn.attention.sum_of_head_norms", watched)
    model = build(pattern=["local", "local", "global"], model={"n_layers": 3})
    prefill(model, new_cache(model), random_tokens(1, 9), rows=[0])
    assert len(seen) == 2
