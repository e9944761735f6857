"""What a cache takes, and that it survives a file."""

from __future__ import annotations

import pytest
import torch

from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.decode import DecodeCache, decode_step, prefill
from tests.closeness import relative_error
from tests.flexrattn.decode.models import build, full_forward, random_tokens


def paper_bytes(flavor: str, *, kind: str, window: int | None, context: int) -> int:
    """S_kv of the paper's T_step, in bf16, with the linear branch's fp32 states: written down once more."""
    size = resolve_flavor(flavor)
    kv_row = 2 * size.n_kv_heads * size.head_dim * 2
    local_keys = context if window is None else min(window + 1, context)
    local = local_keys * kv_row
    if kind == "rattention":
        local += 4 * size.n_kv_heads * 2 * size.head_dim * size.head_dim
    n_global = size.n_layers // 4
    return n_global * context * kv_row + (size.n_layers - n_global) * local


@pytest.mark.parametrize("context", [8192, 32768, 131072])
@pytest.mark.parametrize(("kind", "window"), [("rattention", 512), ("swa", 4096), ("full", None)])
def test_bytes_are_the_papers(kind, window, context):
    config = build_config("3b", layer_kind=kind, window=window)
    for fold_every, allowed in ((1, 0.0), (8, 0.01)):
        cache = DecodeCache(
            config, rows=2, max_length=context, device="meta", dtype=torch.bfloat16, fold_every=fold_every
        )
        expected = paper_bytes("3b", kind=kind, window=window, context=context)
        assert abs(cache.bytes_per_sequence / expected - 1) <= allowed


def build_config(flavor, **layers):
    return build_model_config(resolve_flavor(flavor), make_layers(**layers))


def test_local_layers_do_not_grow_with_the_context():
    config = build_config("3b", layer_kind="rattention", window=512, pattern=["local"])
    sizes = {
        DecodeCache(config, rows=1, max_length=T, device="meta", dtype=torch.bfloat16).nbytes
        for T in (1024, 8192, 131072)
    }
    assert len(sizes) == 1


def cache_of(model, rows, max_length=64, fold_every=2):
    return DecodeCache(
        model.config, rows=rows, max_length=max_length, device="cpu", dtype=torch.float64, fold_every=fold_every
    )


@pytest.mark.parametrize("length", [3, 20])
@pytest.mark.parametrize("kind", ["rattention", "swa"])
def test_saved_and_loaded(kind, length, tmp_path):
    """Into other rows of a cache of another size, and on from there; also where a short cache has a short ring."""
    model = build(layer_kind=kind)
    tokens = random_tokens(2, length + 6)
    for saved_length in (length, 64):
        cache = cache_of(model, 3, max_length=saved_length)
        prefill(model, cache, tokens[:, :length], rows=[2, 0], counts=[length, length - 2])
        path = tmp_path / f"{saved_length}.safetensors"
        cache.save(path, [2, 0])
        other = cache_of(model, 2, max_length=40)
        prefill(model, other, random_tokens(2, 9), rows=[0, 1])
        other.load(path, [0, 1])
        assert other.lengths_B.tolist() == [length, length - 2]
        for i in range(6):
            new = tokens[:, length + i]
            logits = decode_step(model, other, new)
        for row, n in ((0, length), (1, length - 2)):
            sequence = torch.cat((tokens[row, :n], tokens[row, length:]))[None]
            assert relative_error(logits[row], full_forward(model, sequence)[0, -1]) < 2e-6


def test_a_wrong_file_is_refused(tmp_path):
    model = build()
    cache = cache_of(model, 2)
    prefill(model, cache, random_tokens(1, 20), rows=[0])
    path = tmp_path / "cache.safetensors"
    cache.save(path, [0])
    for other, rows, message in (
        (cache_of(build(layer_kind="swa"), 1), [0], "cache of another model: absorbed"),
        (cache_of(build(model={"n_kv_heads": 4}), 1), [0], "another model or dtype: layers.0.k"),
        (cache_of(model, 1, max_length=10), [0], "holds 20 tokens, this cache has room for 10"),
        (cache_of(model, 1, fold_every=1), [0], "made with fold_every 2, this cache has 1"),
        (cache_of(model, 2), [0, 1], "holds 1 sequences, 2 rows were given"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load(path, rows)
    # Tensors of the same shapes with another meaning.
    for kind, other_kind, message in (
        ({"layer_kind": "swa"}, {"layer_kind": "swa", "window": 9}, "layer 0 there has window 5, here 9"),
        ({}, {"feature_map": "relu"}, "layer 0 there has feature_map 'softmax', here 'relu'"),
        (
            {"layer_kind": "full", "window": None},
            {"layer_kind": "full", "window": None, "pattern": ["global"]},
            "layer 0 there has rope True, here Fa",
        ),
        (
            {"layer_kind": "swa", "window": None, "local_mask": "tests.flexrattn.decode.models:position_parity"},
            {"layer_kind": "full", "window": None},
            "layer 0 there has mask 'keep', here None",
        ),
    ):
        cache = cache_of(build(**kind), 1)
        prefill(build(**kind), cache, random_tokens(1, 20), rows=[0])
        cache.save(path, [0])
        with pytest.raises(ValueError, match=message):
            cache_of(build(**other_kind), 1).load(path, [0])
    (tmp_path / "text.safetensors").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot be read as a cache"):
        cache.load(tmp_path / "text.safetensors", [0])
    with pytest.raises(ValueError, match="cannot be read as a cache"):
        cache.load(tmp_path / "absent.safetensors", [0])


@pytest.mark.parametrize("options", [{"rows": 0}, {"max_length": 0}, {"fold_every": True}])
def test_sizes_are_checked(options):
    with pytest.raises(ValueError, match="must be a positive integer"):
        DecodeCache(build().config, **{"rows": 1, "max_length": 8, "device": "meta", "dtype": torch.float32, **options})


def test_a_cache_of_another_model_is_refused():
    """It would be read with another meaning; a model that is built again is the same."""
    cache = cache_of(build(), 1)
    prefill(build(seed=1), cache, random_tokens(1, 4), rows=[0])
    decode_step(build(seed=1), cache, random_tokens(1))
    for other in (build(window=6), build(layer_kind="swa"), build(feature_map="relu")):
        for call in (
            lambda m: prefill(m, cache, random_tokens(1, 4), rows=[0]),
            lambda m: decode_step(m, cache, random_tokens(1)),
        ):
            with pytest.raises(ValueError, match="the cache was made for another model"):
                call(other)
    assert cache.lengths_B.tolist() == [5]


@pytest.mark.parametrize("rows", [[], [2], [-1], [0, 0]], ids=str)
def test_rows_that_are_not_there_are_refused(rows, tmp_path):
    model = build()
    cache = cache_of(model, 2)
    prefill(model, cache, random_tokens(2, 4), rows=[0, 1])
    path = tmp_path / "cache.safetensors"
    cache.save(path, [0, 1])
    message = "rows must be different and from 0 to 1"
    for call in (cache.reset, lambda given: cache.save(tmp_path / "other", given)):
        with pytest.raises(ValueError, match=message):
            call(rows)
    if len(rows) == 2:
        with pytest.raises(ValueError, match=message):
            cache.load(path, rows)
    with pytest.raises(ValueError, match=message):
        prefill(model, cache, random_tokens(len(rows), 4), rows=rows)
    with pytest.raises(ValueError, match="cannot be written to"):
        cache.save(tmp_path / "absent" / "x", [0])
    assert cache.lengths_B.tolist() == [4, 4]
